//! The I/O APIC: 24 pins, each with an entry that says which message it sends.
//!
//! Version 0x20, with an EOI register for one vector, which guests use to end an interrupt that
//! they had to mask.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::chips::lapic::message::{ApicBus, Delivery, Destination};

/// Number of pins.
pub const PINS: u32 = 24;

const VERSION: u32 = (PINS - 1) << 16 | 0x20;
const INDEX: u64 = 0x00;
const DATA: u64 = 0x10;
const EOI: u64 = 0x40;

const DELIVERY_STATUS: u64 = 1 << 12;
const ACTIVE_LOW: u64 = 1 << 13;
const REMOTE_IRR: u64 = 1 << 14;
pub(crate) const LEVEL: u64 = 1 << 15;
pub(crate) const MASKED: u64 = 1 << 16;

/// The chip.
pub struct IoApic {
    apics: Arc<ApicBus>,
    id: u8,
    index: u8,
    entries: [u64; PINS as usize],
    /// Lines that are asserted now.
    lines: u32,
    /// Edges that came while their entry was masked.
    edges: u32,
}

/// All of it, as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    pub(crate) id: u8,
    pub(crate) index: u8,
    pub(crate) entries: [u64; PINS as usize],
    pub(crate) lines: u32,
    pub(crate) edges: u32,
}

impl IoApic {
    /// What is to be stored.
    #[must_use]
    pub fn save(&self) -> Registers {
        let Self { id, index, entries, lines, edges, .. } = *self;
        Registers { id, index, entries, lines, edges }
    }

    /// Puts back what was stored. Interrupts that were sent are in the local APICs.
    pub fn restore(&mut self, saved: &Registers) {
        let Registers { id, index, entries, lines, edges } = *saved;
        (self.id, self.index, self.entries) = (id, index, entries);
        (self.lines, self.edges) = (lines, edges);
    }

    /// With all pins masked.
    #[must_use]
    pub fn new(apics: Arc<ApicBus>) -> Self {
        Self { apics, id: 0, index: 0, entries: [MASKED; PINS as usize], lines: 0, edges: 0 }
    }

    /// Sets a line, asserted or not (the polarity of an entry says what the guest believes about
    /// the wire and does not matter here).
    pub fn set_line(&mut self, pin: u32, level: bool) {
        if pin >= PINS {
            return;
        }
        let bit = 1 << pin;
        let rose = level && self.lines & bit == 0;
        if level {
            self.lines |= bit;
        } else {
            self.lines &= !bit;
        }
        if rose {
            self.edges |= bit;
        }
        self.service(pin);
    }

    fn service(&mut self, pin: u32) {
        let bit = 1u32 << pin;
        let Some(entry) = self.entries.get_mut(pin as usize) else { return };
        if *entry & MASKED != 0 {
            return;
        }
        let level = *entry & LEVEL != 0;
        let due = if level {
            self.lines & bit != 0 && *entry & REMOTE_IRR == 0
        } else {
            self.edges & bit != 0
        };
        self.edges &= !bit;
        if !due {
            return;
        }
        let destination = Destination {
            id: (*entry >> 56) as u32 | ((*entry >> 48 & 0x7f) as u32 * 0x100),
            logical: *entry >> 11 & 1 == 1,
            wide: false,
        };
        let taken =
            self.apics.deliver(destination, Delivery::from_bits(*entry >> 8), *entry as u8, level);
        if level && taken {
            *entry |= REMOTE_IRR;
        }
    }

    /// A local APIC ended a level-triggered interrupt.
    pub fn end_of_interrupt(&mut self, vector: u8) {
        for pin in 0..PINS {
            let Some(entry) = self.entries.get_mut(pin as usize) else { continue };
            if *entry as u8 == vector && *entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR {
                *entry &= !REMOTE_IRR;
                self.service(pin);
            }
        }
    }

    /// A read in the register page.
    pub fn mmio_read(&mut self, offset: u64, data: &mut [u8]) {
        let value = match offset & !3 {
            INDEX => u32::from(self.index),
            DATA => self.register(),
            _ => 0,
        };
        data.fill(0);
        let bytes = value.to_le_bytes();
        for (to, from) in data.iter_mut().zip(bytes.iter().skip((offset & 3) as usize)) {
            *to = *from;
        }
    }

    /// A write in the register page; only aligned ones do something.
    pub fn mmio_write(&mut self, offset: u64, data: &[u8]) {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            INDEX => self.index = value as u8,
            DATA if data.len() == 4 => self.set_register(value),
            EOI => self.end_of_interrupt(value as u8),
            _ => {}
        }
    }

    fn register(&self) -> u32 {
        match self.index {
            0 | 2 => u32::from(self.id) << 24,
            1 => VERSION,
            index => {
                let entry =
                    index.checked_sub(0x10).and_then(|i| self.entries.get(usize::from(i / 2)));
                entry.map_or(0, |entry| (entry >> (u32::from(index & 1) * 32)) as u32)
            }
        }
    }

    fn set_register(&mut self, value: u32) {
        if self.index == 0 {
            self.id = (value >> 24) as u8;
        }
        let Some(number) = self.index.checked_sub(0x10) else { return };
        let pin = number / 2;
        let Some(entry) = self.entries.get_mut(usize::from(pin)) else { return };
        if number & 1 == 1 {
            *entry = *entry & 0xffff_ffff | u64::from(value) << 32;
            return;
        }
        let read_only = DELIVERY_STATUS | REMOTE_IRR;
        let writable = (0xff | 7 << 8 | 1 << 11 | ACTIVE_LOW | LEVEL | MASKED) & !read_only;
        *entry = *entry & !(0xffff_ffff & !read_only) | u64::from(value) & writable;
        // Turning a pin to edge forgets the level-triggered interrupt under way.
        if *entry & LEVEL == 0 {
            *entry &= !REMOTE_IRR;
        }
        self.service(u32::from(pin));
    }
}

#[cfg(test)]
mod tests {
    use super::IoApic;
    use crate::chips::lapic::message::ApicBus;
    use crate::chips::lapic::{CpuSignals, Effect, Lapic};
    use crate::clock::fake::FakeClock;
    use std::sync::Arc;

    struct Quiet;
    impl CpuSignals for Quiet {
        fn interrupt(&self) {}
        fn nmi(&self) {}
        fn init(&self) {}
        fn startup(&self, _vector: u8) {}
    }

    struct Fixture {
        apics: Arc<ApicBus>,
        chip: IoApic,
    }

    impl Fixture {
        fn new() -> Self {
            let apics = (0..2).map(|id| {
                let apic = Lapic::new(id, id == 0, Arc::new(FakeClock::default()), Arc::new(Quiet));
                apic.mmio_write(0xf0, &0x1ffu32.to_le_bytes());
                apic
            });
            let apics = Arc::new(ApicBus::new(apics.collect()));
            Self { chip: IoApic::new(apics.clone()), apics }
        }
        fn set(&mut self, index: u8, value: u32) {
            self.chip.mmio_write(0, &[index]);
            self.chip.mmio_write(0x10, &value.to_le_bytes());
        }
        fn get(&mut self, index: u8) -> u32 {
            let mut data = [0; 4];
            self.chip.mmio_write(0, &[index]);
            self.chip.mmio_read(0x10, &mut data);
            u32::from_le_bytes(data)
        }
        fn take(&mut self, cpu: usize) -> Option<u8> {
            let vector = self.apics.apics()[cpu].acknowledge();
            if let Effect::Eoi(vector) = self.apics.apics()[cpu].mmio_write(0xb0, &[0; 4]) {
                self.chip.end_of_interrupt(vector);
            }
            vector
        }
    }

    #[test]
    fn an_edge_is_one_interrupt() {
        let mut f = Fixture::new();
        f.set(0x19, 1 << 24);
        f.set(0x18, 0x44);
        f.chip.set_line(4, true);
        f.chip.set_line(4, true);
        assert_eq!((f.take(0), f.take(1)), (None, Some(0x44)));
        assert_eq!(f.take(1), None);
        f.chip.set_line(4, false);
        f.chip.set_line(4, true);
        assert_eq!(f.take(1), Some(0x44));
    }

    #[test]
    fn an_edge_under_the_mask_comes_later() {
        let mut f = Fixture::new();
        f.set(0x18, 0x1_0044);
        f.chip.set_line(4, true);
        f.chip.set_line(4, false);
        assert_eq!(f.take(0), None);
        f.set(0x18, 0x44);
        assert_eq!(f.take(0), Some(0x44));
        f.set(0x18, 0x1_0044);
        f.set(0x18, 0x44);
        assert_eq!(f.take(0), None);
    }

    #[test]
    fn a_level_comes_again_until_it_falls() {
        let mut f = Fixture::new();
        f.set(0x24, 0x8055);
        f.chip.set_line(10, true);
        assert_eq!(f.get(0x24), 0xc055, "remote IRR");
        assert_eq!(f.take(0), Some(0x55));
        assert_eq!(f.take(0), Some(0x55));
        f.chip.set_line(10, false);
        assert_eq!(f.take(0), Some(0x55), "the one that was sent before");
        assert_eq!(f.take(0), None);
        assert_eq!(f.get(0x24), 0x8055);
    }

    #[test]
    fn registers_keep_what_can_be_written() {
        let mut f = Fixture::new();
        assert_eq!(f.get(1), 0x17_0020);
        assert_eq!(f.get(0x10), 0x1_0000);
        f.set(0x10, 0xffff_ffff);
        assert_eq!(f.get(0x10), 0x1_afff);
        f.set(0x3f, 0xff00_0000);
        assert_eq!(f.get(0x3f), 0xff00_0000);
        f.set(0x40, 1);
        assert_eq!(f.get(0x40), 0);
        f.chip.set_line(24, true);
        f.chip.set_line(u32::MAX, true);
    }
}
