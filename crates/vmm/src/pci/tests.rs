//! The bus as software sees it through the ports.

use std::sync::{Arc, Mutex};

use crate::bus::{Bus, BusDevice};
use crate::irq::InterruptSink;
use crate::pci::config::{ConfigSpace, Identity, PciError};
use crate::pci::msix::{Message, Msix};
use crate::pci::root::{CONFIG_PORTS, MMIO_WINDOW_END, PciFunction, PciRoot, SLOT_COUNT};

struct NoSink;

impl InterruptSink for NoSink {
    fn set_line(&self, _gsi: u32, _level: bool) {}
    fn signal_msi(&self, _address: u64, _data: u32) {}
}

/// A function whose BAR reads back the offset.
struct Echo {
    config: ConfigSpace,
}

impl Echo {
    fn new(bar_size: u32) -> Self {
        let identity = Identity { vendor: 0x1234, device: 0x5678, ..Identity::default() };
        let mut config = ConfigSpace::new(&identity, true);
        config.add_memory_bar(0, bar_size).unwrap();
        Self { config }
    }
}

impl PciFunction for Echo {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn plugged(&mut self, _slot: u8) {}
    fn read_bar(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8);
    }
    fn write_bar(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

fn bus() -> (PciRoot, Arc<Bus>) {
    let mmio = Arc::new(Bus::new());
    (PciRoot::new(Arc::clone(&mmio), Arc::new(NoSink)), mmio)
}

fn add(root: &mut PciRoot, bar_size: u32) -> Result<u8, PciError> {
    root.add(Arc::new(Mutex::new(Echo::new(bar_size))))
}

fn read(root: &mut PciRoot, slot: u8, register: u8, len: usize) -> u32 {
    select(root, slot, register);
    let mut raw = [0; 4];
    root.read(CONFIG_PORTS, 4 + u64::from(register & 3), &mut raw[..len]);
    u32::from_le_bytes(raw)
}

fn write(root: &mut PciRoot, slot: u8, register: u8, value: u32) {
    select(root, slot, register);
    root.write(CONFIG_PORTS, 4, &value.to_le_bytes());
}

fn select(root: &mut PciRoot, slot: u8, register: u8) {
    let address = 1 << 31 | u32::from(slot) << 11 | u32::from(register & 0xfc);
    root.write(CONFIG_PORTS, 0, &address.to_le_bytes());
}

#[test]
fn functions_are_found_and_others_are_not() {
    let (mut root, _mmio) = bus();
    let slot = add(&mut root, 0x1000).unwrap();
    assert_eq!(slot, 1);
    assert_eq!(read(&mut root, 0, 8, 4) >> 8, 0x06_0000);
    assert_eq!(read(&mut root, 1, 0, 4), 0x5678_1234);
    assert_eq!(read(&mut root, 1, 2, 2), 0x5678);
    assert_eq!(read(&mut root, 1, 3, 1), 0x56);
    assert_eq!(read(&mut root, 2, 0, 4), u32::MAX);
    // Other buses and functions, and the mechanism switched off.
    for address in [1 << 31 | 1 << 16 | 1 << 11, 1 << 31 | 1 << 11 | 1 << 8, 1u32 << 11] {
        root.write(CONFIG_PORTS, 0, &address.to_le_bytes());
        let mut raw = [0; 4];
        root.read(CONFIG_PORTS, 4, &mut raw);
        assert_eq!(raw, [0xff; 4]);
    }
    // The address port reads back, and only double words change it.
    select(&mut root, 1, 0x3c);
    root.write(CONFIG_PORTS, 0, &[0]);
    let mut raw = [0; 4];
    root.read(CONFIG_PORTS, 0, &mut raw);
    assert_eq!(u32::from_le_bytes(raw), 1 << 31 | 1 << 11 | 0x3c);
    // An access across the end of the data port.
    root.read(CONFIG_PORTS, 7, &mut raw);
    assert_eq!(raw, [0xff; 4]);
}

#[test]
fn bars_are_sized_and_moved() {
    let (mut root, mmio) = bus();
    let slot = add(&mut root, 0x4000).unwrap();
    let first = u64::from(read(&mut root, slot, 0x10, 4));
    let answers = |address: u64| mmio.read(address, &mut [0; 4]);
    assert!(!answers(first), "decoding is off at first");
    write(&mut root, slot, 4, 2);
    assert!(answers(first) && answers(first + 0x3ffc) && !answers(first + 0x4000));
    write(&mut root, slot, 0x10, u32::MAX);
    assert_eq!(read(&mut root, slot, 0x10, 4), 0xffff_c000);
    assert!(!answers(first) && !answers(0xffff_c000));
    write(&mut root, slot, 0x10, 0xd000_1234);
    assert_eq!(read(&mut root, slot, 0x10, 4), 0xd000_0000);
    assert!(answers(0xd000_0000));
    // Over memory, over the interrupt controllers, half outside.
    for outside in [0, 0x10_0000, 0xbfff_c000, 0xfec0_0000, 0xfee0_0000, MMIO_WINDOW_END as u32] {
        write(&mut root, slot, 0x10, outside);
        assert!(!answers(u64::from(outside)));
    }
    // A BAR that does not exist has no size.
    write(&mut root, slot, 0x14, u32::MAX);
    assert_eq!(read(&mut root, slot, 0x14, 4), 0);
    write(&mut root, slot, 0x10, 0xd000_0000);
    write(&mut root, slot, 4, 0);
    assert!(!answers(0xd000_0000));
}

#[test]
fn two_bars_at_one_place() {
    let (mut root, mmio) = bus();
    let (one, two) = (add(&mut root, 0x1000).unwrap(), add(&mut root, 0x1000).unwrap());
    write(&mut root, one, 4, 2);
    write(&mut root, two, 4, 2);
    let old = read(&mut root, two, 0x10, 4);
    let taken = read(&mut root, one, 0x10, 4);
    write(&mut root, two, 0x10, taken);
    assert!(!mmio.read(u64::from(old), &mut [0]));
    write(&mut root, two, 0x10, old);
    assert!(mmio.read(u64::from(old), &mut [0]) && mmio.read(u64::from(taken), &mut [0]));
}

#[test]
fn the_bus_fills_up() {
    let (mut root, _mmio) = bus();
    for _ in 1..SLOT_COUNT {
        add(&mut root, 0x1000).unwrap();
    }
    assert_eq!(add(&mut root, 0x1000), Err(PciError::NoSlot(SLOT_COUNT)));
    let (mut root, _mmio) = bus();
    assert_eq!(add(&mut root, 1 << 30), Err(PciError::NoBarSpace(1 << 30)));
}

#[test]
fn impossible_bars_and_capabilities_are_refused() {
    let mut config = ConfigSpace::new(&Identity::default(), false);
    for (index, size) in [(0, 0), (0, 8), (0, 0x1001), (6, 0x1000)] {
        assert_eq!(config.add_memory_bar(index, size), Err(PciError::BadBar { index, size }));
    }
    let mut added = 0;
    while config.add_capability(9, &[0; 14]).is_ok() {
        added += 1;
    }
    assert_eq!(added, (256 - 64) / 16);
}

#[test]
fn msix_table_accesses_of_any_kind() {
    let mut msix = Msix::new(3);
    assert_eq!(msix.fire(0), None, "not enabled");
    msix.set_control(0x8000);
    assert_eq!(msix.fire(0), None, "vectors start masked");
    msix.write_table(0, &0xfee0_1000u64.to_le_bytes());
    msix.write_table(8, &[7, 0, 0, 0]);
    let sent = msix.write_table(12, &[0]);
    assert_eq!(sent, [Message { address: 0xfee0_1000, data: 7 }]);
    assert_eq!(msix.fire(0), Some(Message { address: 0xfee0_1000, data: 7 }));
    assert_eq!(msix.fire(3), None);
    assert_eq!(msix.fire(0xffff), None);
    // Wide, unaligned and outside.
    msix.write_table(40, &[0xff; 64]);
    msix.write_table(48, &[1]);
    msix.write_table(u64::MAX, &[1; 8]);
    let mut data = [9; 64];
    msix.read_table(u64::MAX - 2, &mut data);
    assert_eq!(data, [0; 64]);
    msix.read_pba(0, &mut data);
    assert_eq!(data, [0; 64]);
}
