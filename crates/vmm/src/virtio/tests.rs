//! The transport, and the fuzz targets with seeded random input.

use crate::pci::root::intx_gsi;
use crate::virtio::fuzz;
use crate::virtio::rng::device::Rng;
use crate::virtio::testing::{Guest, Part};

/// xorshift: the same numbers in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| (self.next() >> 24) as u8).collect()
    }
}

#[test]
fn random_queues_do_no_harm() {
    let mut random = Random(0x1234_5678);
    let mut chains = 0;
    for _ in 0..4000 {
        let mut data = random.bytes(0x1800);
        // Small numbers make chains that lead somewhere: the high bytes of addresses, lengths, flags
        // and links of the descriptor tables are cleared.
        for (i, byte) in data.iter_mut().skip(4).enumerate() {
            if matches!(i % 16, 2..=7 | 10 | 11 | 13 | 15) {
                *byte = 0;
            }
        }
        // The available index must not be far ahead, or the ring counts as broken.
        for shift in 0..4 {
            data[4 + 0x410 + shift * 0x600 + 2..][..2].copy_from_slice(&[1, 0]);
        }
        chains += fuzz::virtqueue(&data);
    }
    assert!(chains > 100, "only {chains} chains: the input leads nowhere");
    for len in 0..64 {
        fuzz::virtqueue(&random.bytes(len));
    }
}

#[test]
fn random_configuration_accesses_do_no_harm() {
    let mut random = Random(0xabcd_ef01);
    for _ in 0..300 {
        let len = (random.next() % 4000) as usize;
        fuzz::pci_config(&random.bytes(len));
    }
}

#[test]
fn random_vsock_packets_do_no_harm() {
    let mut random = Random(0x5eed);
    let mut packets = 0;
    for _ in 0..1500 {
        let len = (random.next() % 2000) as usize;
        packets += fuzz::vsock_packets(&random.bytes(len));
    }
    assert!(packets > 10_000, "only {packets} packets: the input leads nowhere");
}

#[test]
fn devices_survive_drivers_that_break_all_rules() {
    let mut random = Random(0xdec0de);
    for kind in 0..6 {
        for _ in 0..60 {
            let mut data = random.bytes(0x2000);
            data[0] = kind;
            // Small addresses, lengths and links, so that some chains are good.
            for (i, byte) in data.iter_mut().skip(5).enumerate() {
                if matches!(i % 16, 2..=7 | 10 | 11 | 13 | 15) {
                    *byte = 0;
                }
            }
            fuzz::devices(&data);
        }
    }
}

#[test]
fn msix_masks_hold_interrupts_back() {
    let mut guest = Guest::new(Rng::new());
    guest.start(0, 0);
    let at = guest.capability(0x11, None).unwrap();
    assert_eq!(guest.config_read(at + 2, 2), 0x8001);
    let request = |guest: &mut Guest| drop(guest.request(0, &[Part::In(8)], false));
    let pending = |guest: &Guest| guest.bar_read(0x5000, 8);
    let wait_pending = |guest: &Guest| {
        let sink = std::sync::Arc::clone(&guest.sink);
        sink.wait_until("a pending bit", || guest.bar_read(0x5000, 8) == 1);
    };
    request(&mut guest);
    let sink = std::sync::Arc::clone(&guest.sink);
    sink.wait_until("a message", || sink.messages().len() == 1);
    // The vector is masked: pending, sent when unmasked.
    guest.bar_write(0x400c, 4, 1);
    request(&mut guest);
    wait_pending(&guest);
    assert_eq!(guest.sink.messages().len(), 1);
    guest.bar_write(0x400c, 4, 0);
    assert_eq!((guest.sink.messages().len(), pending(&guest)), (2, 0));
    // The function is masked.
    guest.config_write(at + 2, 2, 0xc000);
    request(&mut guest);
    wait_pending(&guest);
    assert_eq!(guest.sink.messages().len(), 2);
    guest.config_write(at + 2, 2, 0x8000);
    assert_eq!((guest.sink.messages().len(), pending(&guest)), (3, 0));
    assert!(guest.sink.messages().iter().all(|message| *message == (0xfee0_0000, 0x40)));
}

#[test]
fn without_msix_the_interrupt_pin_is_used() {
    let mut guest = Guest::new(Rng::new());
    guest.start(0, 0);
    let at = guest.capability(0x11, None).unwrap();
    guest.config_write(at + 2, 2, 0);
    let gsi = intx_gsi(guest.slot);
    assert_eq!(gsi, 17);
    guest.request(0, &[Part::In(8)], false);
    let sink = std::sync::Arc::clone(&guest.sink);
    sink.wait_until("the line", || sink.line(gsi));
    assert_eq!(guest.bar_read(0x1000, 1), 1);
    assert!(!sink.line(gsi));
    assert_eq!(guest.bar_read(0x1000, 1), 0);
    // Disabled in the command register, and enabled again.
    guest.config_write(4, 2, 0x406);
    guest.request(0, &[Part::In(8)], false);
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert!(!sink.line(gsi));
    guest.config_write(4, 2, 6);
    assert!(sink.line(gsi));
}

#[test]
fn without_event_index_and_with_suppressed_interrupts() {
    let mut guest = Guest::new(Rng::new());
    guest.start(0, 1 << 29);
    guest.request(0, &[Part::In(8)], false);
    let sink = std::sync::Arc::clone(&guest.sink);
    sink.wait_until("a message", || sink.messages().len() == 1);
    // The driver's flag: no interrupt.
    vm_memory::Bytes::write_obj(&*guest.memory, 1u16, vm_memory::GuestAddress(0x10_8000)).unwrap();
    guest.request(0, &[Part::In(8)], false);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(sink.messages().len(), 1);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let guest = Guest::new(Rng::new());
    for (low, high) in [(1u64 << 5, 1u64), (0, 0), (0, 3)] {
        guest.bar_write(20, 1, 0);
        guest.bar_write(20, 1, 3);
        guest.bar_write(8, 4, 0);
        guest.bar_write(12, 4, low);
        guest.bar_write(8, 4, 1);
        guest.bar_write(12, 4, high);
        guest.bar_write(20, 1, 0xb);
        assert_eq!(guest.status(), 3, "{low:#x} {high:#x}");
    }
    // DRIVER_OK without agreement leads nowhere.
    guest.bar_write(20, 1, 0xf);
    assert_eq!(guest.status() & 0x40, 0x40);
}

#[test]
fn impossible_queues_stop_the_device() {
    let mut guest = Guest::new(Rng::new());
    let set_up: [(u64, usize, u64); 5] = [
        (24, 2, 3),                // not a power of two
        (24, 2, 0x8000),           // larger than offered
        (32, 8, 0x10_0008),        // misaligned descriptors
        (48, 8, u64::MAX - 3),     // wraps
        (40, 8, 0x7fff_ffff_0000), // not memory
    ];
    for (register, len, value) in set_up {
        guest.reset();
        guest.bar_write(20, 1, 3);
        guest.bar_write(8, 4, 1);
        guest.bar_write(12, 4, 1);
        guest.bar_write(20, 1, 0xb);
        guest.bar_write(22, 2, 0);
        guest.bar_write(32, 8, 0x10_0000);
        guest.bar_write(40, 8, 0x10_8000);
        guest.bar_write(48, 8, 0x10_c000);
        guest.bar_write(register, len, value);
        guest.bar_write(28, 2, 1);
        guest.bar_write(20, 1, 0xf);
        assert_eq!(guest.status() & 0x40, 0x40, "register {register}");
    }
    guest.start(0, 0);
    assert_eq!(guest.request(0, &[Part::In(8)], false).0, 8);
}

#[test]
fn the_window_in_configuration_space_reaches_the_registers() {
    let mut guest = Guest::new(Rng::new());
    let at = guest.capability(9, Some(5)).unwrap();
    guest.config_write(at + 4, 1, 0);
    // Number of queues.
    guest.config_write(at + 8, 4, 18);
    guest.config_write(at + 12, 4, 2);
    assert_eq!(guest.config_read(at + 16, 2), 1);
    // The status.
    guest.config_write(at + 8, 4, 20);
    guest.config_write(at + 12, 4, 1);
    guest.config_write(at + 16, 1, 3);
    assert_eq!(guest.status(), 3);
    // Windows that cannot be.
    for (bar, offset, len) in [(1, 20, 1), (0, 21, 2), (0, 20, 3), (0, u32::MAX - 3, 4)] {
        guest.config_write(at + 4, 1, bar);
        guest.config_write(at + 8, 4, offset);
        guest.config_write(at + 12, 4, len);
        guest.config_write(at + 16, 1, 0x80);
        guest.config_read(at + 16, 4);
    }
    assert_eq!(guest.status(), 3);
}

#[test]
fn dropping_the_bus_ends_running_devices() {
    let mut guest = Guest::new(Rng::new());
    guest.start(0, 0);
    guest.request(0, &[Part::In(8)], false);
    let (mmio, bar) = (std::sync::Arc::clone(&guest.mmio), guest.bar);
    drop(guest);
    assert!(!mmio.read(bar, &mut [0; 4]));
}
