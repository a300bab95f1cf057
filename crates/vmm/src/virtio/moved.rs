//! Devices that are stored in the middle of their work and go on with another device behind the
//! same registers.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::pci::root::StoredPci;
use crate::virtio::block::device::{Block, F_FLUSH};
use crate::virtio::block::disk::DiskConfig;
use crate::virtio::console::device::{Console, F_SIZE};
use crate::virtio::rng::device::Rng;
use crate::virtio::testing::{Guest, Part};
use crate::virtio::transport_pci::StoredVirtio;
use crate::virtio::vsock::device::{VsockConfig, VsockDevice};

fn read_header(sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

#[test]
fn requests_under_way_are_done_before_or_after() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let sectors: Vec<u8> = (0..4096u32).flat_map(|n| n.to_le_bytes().repeat(128)).collect();
    File::create(file.path()).unwrap().write_all(&sectors).unwrap();
    for no_io_uring in [false, true] {
        let config = DiskConfig { path: file.path().into(), no_io_uring, ..DiskConfig::default() };
        let open = || Block::new(&config).unwrap();
        let mut guest = Guest::new(open());
        guest.start(F_FLUSH, 0);
        let mut expected = std::collections::HashMap::new();
        for round in 0..40u64 {
            for i in 0..6 {
                let sector = round * 50 + i;
                let header = read_header(sector);
                let parts = [Part::Out(&header), Part::In(512), Part::In(1)];
                let head = guest.add(0, &parts, i % 2 == 0);
                expected.insert(head, sector as u32);
            }
            guest.kick(0);
            guest = guest.moved(open);
            for _ in 0..6 {
                let (head, _, data) = guest.used(0);
                let sector = expected.remove(&head).unwrap();
                assert_eq!(data[..512], sector.to_le_bytes().repeat(128));
                assert_eq!(data[512], 0);
            }
            assert!(expected.is_empty() && guest.poll_used(0).is_none());
        }
    }
}

#[test]
fn who_is_parked_does_nothing_until_it_goes_on() {
    let mut guest = Guest::new(Rng::new());
    guest.start(0, 0);
    for _ in 0..50 {
        guest.root.park();
        guest.add(0, &[Part::In(32)], false);
        guest.kick(0);
        assert!(guest.poll_used(0).is_none());
        guest.root.unpark();
        // At once again: what was asked for may be done before or after.
        guest.root.park();
        guest.root.unpark();
        guest.used(0);
    }
    // A device that is reset while it is parked ends.
    guest.root.park();
    guest.bar_write(20, 1, 0);
    guest.sink.wait_until("the reset", || guest.status() == 0);
    guest.root.unpark();
    guest.start(0, 0);
    guest.request(0, &[Part::In(32)], false);
}

#[test]
fn what_the_guest_printed_is_not_lost() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut guest = Guest::new(Console::new(far).unwrap());
    guest.start(F_SIZE, 0);
    let blocks: Vec<Vec<u8>> = (0..40u8).map(|i| vec![i; 32_768]).collect();
    for block in &blocks {
        guest.add(1, &[Part::Out(block)], false);
    }
    guest.kick(1);
    let (mut next, far) = UnixStream::pair().unwrap();
    guest.root.park();
    // What the old one gave out before it was stored.
    let mut got = Vec::new();
    near.set_nonblocking(true).unwrap();
    let _ = near.read_to_end(&mut got);
    let guest = guest.moved(|| Console::new(far).unwrap());
    let mut rest = vec![0; 40 * 32_768 - got.len()];
    next.read_exact(&mut rest).unwrap();
    got.extend(rest);
    assert!(got == blocks.concat());
    drop(guest);
}

#[test]
fn vsock_connections_end_with_a_word() {
    let device = || VsockDevice::new(&VsockConfig::default()).unwrap().0;
    let mut guest = Guest::new(device());
    guest.start(0, 0);
    guest.add(2, &[Part::In(4)], false);
    guest.kick(2);
    let mut guest = guest.moved(device);
    assert_eq!(guest.used(2).2, [0; 4]);
    // Without a buffer it is told when there is one.
    let mut guest = guest.moved(device);
    guest.add(2, &[Part::In(4)], false);
    guest.kick(2);
    assert_eq!(guest.used(2).2, [0; 4]);
    assert!(guest.poll_used(2).is_none());
}

#[test]
fn what_is_altered_is_refused_or_does_no_harm() {
    let mut guest = Guest::new(Rng::new());
    guest.start(0, 0);
    let good = guest.stored();
    let restore = |change: &dyn Fn(&mut StoredPci)| {
        let mut stored = good.clone();
        change(&mut stored);
        let mut fresh = Guest::new(Rng::new());
        fresh.root.restore(&stored)
    };
    restore(&|_| {}).unwrap();
    let refused = |part: &str, change: &dyn Fn(&mut StoredPci)| {
        let why = restore(change).unwrap_err();
        assert!(why.contains(part), "{why}");
    };
    refused("PCI devices", &|pci| drop(pci.slots.pop()));
    refused("slot 1", &|pci| pci.slots[1].virtio = None);
    refused("another one", &|pci| pci.slots[1].config[0] ^= 1);
    refused("another one", &|pci| pci.slots[1].config.truncate(63));
    fn rng(pci: &mut StoredPci) -> &mut StoredVirtio {
        pci.slots[1].virtio.as_mut().unwrap()
    }
    refused("another one", &|pci| rng(pci).device_type = 2);
    refused("another one", &|pci| rng(pci).queues.clear());
    refused("less", &|pci| rng(pci).driver_features |= 1 << 60);
    refused("vector", &|pci| rng(pci).interrupts.config_vector = 77);
    refused("vectors", &|pci| rng(pci).interrupts.msix.table.clear());
    refused("vectors", &|pci| rng(pci).interrupts.msix.pending.push(9));
    refused("stores nothing", &|pci| rng(pci).device.push(1));
    refused("queues", &|pci| rng(pci).positions = Some(Vec::new()));
    // What the driver could have done, too.
    restore(&|pci| rng(pci).queues[0].used = 1 << 50).unwrap();
    restore(&|pci| rng(pci).queues[0].size = 3).unwrap();
    restore(&|pci| {
        let positions = rng(pci).positions.as_mut().unwrap();
        positions[0].as_mut().unwrap().next_available = 40_000;
    })
    .unwrap();
}
