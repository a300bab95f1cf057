//! Between the stored interrupt controllers and the structures of KVM.
//!
//! KVM does not tell which lines are asserted; whoever drives them knows. An edge that is not masked has
//! been delivered.

use kvm_bindings::{kvm_ioapic_state, kvm_pic_state};

use crate::chips::chipset::pin_of;
use crate::chips::ioapic::{self, LEVEL, MASKED, PINS};
use crate::chips::pic::{Chip, PicPair};
use crate::memory::IOAPIC_BASE;

/// Inputs whose mode can be set: not those of timer, keyboard and cascade, nor those of clock and FPU.
const LEVEL_MASKS: [u8; 2] = [0xf8, 0xde];
const CASCADE_BIT: u8 = 1 << 2;

/// Lines as pins of the I/O APIC.
fn pins_of(lines: u32) -> u32 {
    let asserted = (0..PINS).filter(|gsi| lines >> gsi & 1 == 1);
    asserted.filter_map(pin_of).fold(0, |pins, pin| pins | 1 << pin)
}

/// Pins of the I/O APIC as lines.
pub(super) fn lines_of(pins: u32) -> u32 {
    (0..PINS)
        .filter(|&gsi| pin_of(gsi).is_some_and(|pin| pins >> pin & 1 == 1))
        .fold(0, |lines, gsi| lines | 1 << gsi)
}

fn with(entries: &[u64; PINS as usize], wanted: impl Fn(u64) -> bool) -> u32 {
    (0..)
        .zip(entries)
        .filter(|(_, entry)| wanted(**entry))
        .fold(0, |bits, (pin, _)| bits | 1 << pin)
}

/// Edges that wait for their entry to be unmasked.
fn waiting_edges(entries: &[u64; PINS as usize]) -> u32 {
    with(entries, |entry| entry & LEVEL == 0 && entry & MASKED != 0)
}

pub(super) fn ioapic_from(kvm: &kvm_ioapic_state, lines: u32) -> ioapic::Registers {
    let mut entries = [0; PINS as usize];
    for (to, from) in entries.iter_mut().zip(&kvm.redirtbl) {
        // SAFETY: `bits` covers the whole of the union, and any bits are a number.
        *to = unsafe { from.bits };
    }
    ioapic::Registers {
        id: kvm.id as u8,
        index: kvm.ioregsel as u8,
        edges: kvm.irr & waiting_edges(&entries),
        lines: pins_of(lines),
        entries,
    }
}

pub(super) fn ioapic_to(stored: &ioapic::Registers) -> kvm_ioapic_state {
    let entries = &stored.entries;
    let levels = stored.lines & with(entries, |entry| entry & LEVEL != 0);
    let mut kvm = kvm_ioapic_state {
        base_address: IOAPIC_BASE,
        ioregsel: u32::from(stored.index),
        id: u32::from(stored.id),
        irr: levels | stored.edges & waiting_edges(entries),
        ..kvm_ioapic_state::default()
    };
    for (to, from) in kvm.redirtbl.iter_mut().zip(entries) {
        to.bits = *from;
    }
    kvm
}

fn pic_from_one(kvm: &kvm_pic_state, lines: u8) -> Chip {
    Chip {
        irr: kvm.irr,
        isr: kvm.isr,
        imr: kvm.imr,
        lines,
        level: kvm.elcr & kvm.elcr_mask,
        base: kvm.irq_base,
        top: kvm.priority_add,
        // KVM counts from the second initialization word.
        init_step: if kvm.init_state == 0 { 0 } else { kvm.init_state.saturating_add(1).min(4) },
        init_4: kvm.init4 != 0,
        read_isr: kvm.read_reg_select != 0,
        poll: kvm.poll != 0,
        special_mask: kvm.special_mask != 0,
        auto_eoi: kvm.auto_eoi != 0,
        rotate_auto: kvm.rotate_on_auto_eoi != 0,
        special_nested: kvm.special_fully_nested_mode != 0,
    }
}

/// The pair of them, the first one first.
pub(super) fn pic_from(kvm: &[kvm_pic_state; 2], lines: u32) -> PicPair {
    let [low, high, ..] = lines.to_le_bytes();
    let mut pair =
        PicPair { master: pic_from_one(&kvm[0], low), slave: pic_from_one(&kvm[1], high) };
    // KVM has an edge there, the emulated chip a line, which says whether the second one has something.
    for bits in [&mut pair.master.lines, &mut pair.master.irr] {
        *bits &= !CASCADE_BIT;
    }
    pair.update();
    pair.sound()
}

pub(super) fn pic_to(stored: &PicPair) -> [kvm_pic_state; 2] {
    let one = |chip: &Chip, mask: u8| kvm_pic_state {
        last_irr: chip.lines,
        irr: chip.irr,
        imr: chip.imr,
        isr: chip.isr,
        priority_add: chip.top & 7,
        irq_base: chip.base & 0xf8,
        read_reg_select: chip.read_isr.into(),
        poll: chip.poll.into(),
        special_mask: chip.special_mask.into(),
        init_state: chip.init_step.saturating_sub(1).min(3),
        auto_eoi: chip.auto_eoi.into(),
        rotate_on_auto_eoi: chip.rotate_auto.into(),
        special_fully_nested_mode: chip.special_nested.into(),
        init4: chip.init_4.into(),
        elcr: chip.level & mask,
        elcr_mask: mask,
    };
    let mut pair = [one(&stored.master, LEVEL_MASKS[0]), one(&stored.slave, LEVEL_MASKS[1])];
    // So that KVM sees an edge if the second one has something.
    pair[0].last_irr &= !CASCADE_BIT;
    pair
}

#[cfg(test)]
mod tests {
    use super::{ioapic_from, ioapic_to, lines_of, pic_from, pic_to, pins_of};
    use crate::bus::BusDevice;
    use crate::chips::ioapic::{LEVEL, MASKED};
    use crate::chips::pic::PicPair;
    use kvm_bindings::{kvm_ioapic_state, kvm_pic_state};

    #[test]
    fn lines_and_pins() {
        assert_eq!(pins_of(1 | 1 << 4 | 1 << 20), 1 << 2 | 1 << 4 | 1 << 20);
        assert_eq!(lines_of(1 << 2 | 1 << 4), 1 | 1 << 4);
        assert_eq!(pins_of(!0), 0xff_fffe);
    }

    /// As of a Linux guest: the timer's pin, the serial port's, and a level-triggered one that is served.
    fn linux() -> kvm_ioapic_state {
        let mut kvm = kvm_ioapic_state {
            base_address: 0xfec0_0000,
            ioregsel: 0x18,
            irr: 1 << 9 | 1 << 7 | 1 << 4,
            ..kvm_ioapic_state::default()
        };
        for entry in &mut kvm.redirtbl {
            entry.bits = MASKED;
        }
        kvm.redirtbl[2].bits = 0x30;
        kvm.redirtbl[4].bits = 0x0100_0000_0000_0824;
        kvm.redirtbl[9].bits = 0x29 | LEVEL | 1 << 14;
        kvm
    }

    #[test]
    fn an_io_apic_there_and_back() {
        let stored = ioapic_from(&linux(), 1 << 9 | 1 << 4);
        assert_eq!(stored.edges, 1 << 7, "one that is not masked was delivered");
        assert_eq!((stored.lines, stored.index), (1 << 9 | 1 << 4, 0x18));
        assert_eq!(stored.entries[4], 0x0100_0000_0000_0824);
        let kvm = ioapic_to(&stored);
        assert_eq!(kvm.irr, 1 << 9 | 1 << 7);
        assert_eq!((kvm.base_address, kvm.ioregsel, kvm.id), (0xfec0_0000, 0x18, 0));
        for (a, b) in kvm.redirtbl.iter().zip(&linux().redirtbl) {
            // SAFETY: as above.
            assert_eq!(unsafe { (a.bits, b.bits) }.0, unsafe { b.bits });
        }
    }

    #[test]
    fn a_pair_there_and_back() {
        let mut pair = PicPair::new();
        for (base, vector, cascade) in [(0x20, 0x30, 4), (0xa0, 0x38, 2)] {
            pair.write(base, 0, &[0x11]);
            for word in [vector, cascade, 1, 0] {
                pair.write(base, 1, &[word]);
            }
        }
        pair.write(0x4d0, 1, &[0x0c]);
        pair.set_line(10, true);
        pair.set_line(4, true);
        pair.set_line(1, true);
        assert_eq!(pair.acknowledge(), 0x31);
        let kvm = pic_to(&pair);
        assert_eq!((kvm[0].irq_base, kvm[0].isr, kvm[0].elcr_mask), (0x30, 2, 0xf8));
        assert_eq!((kvm[1].irr, kvm[1].elcr, kvm[1].last_irr), (4, 0x0c, 4));
        let lines = 1 << 10 | 1 << 4 | 1 << 1;
        let mut back = pic_from(&kvm, lines);
        assert_eq!(back, pair);
        // The handler of line 1 ends; then line 10, through the cascade, and then line 4.
        back.write(0x20, 0, &[0x20]);
        assert_eq!(back.acknowledge(), 0x3a);
        back.request_again(0x3a);
        assert_eq!(back, {
            pair.write(0x20, 0, &[0x20]);
            pair
        });
        assert_eq!(back.acknowledge(), 0x3a);
        back.set_line(10, false);
        back.write(0xa0, 0, &[0x20]);
        back.write(0x20, 0, &[0x20]);
        assert_eq!(back.acknowledge(), 0x34);
        back.request_again(0x34);
        assert_eq!(back.acknowledge(), 0x34);
    }

    #[test]
    fn initialization_goes_on_where_it_was() {
        let mut pair = PicPair::new();
        pair.write(0x20, 0, &[0x11]);
        for (word, step) in [(0x30, 1), (4, 2), (1, 3), (0xff, 0)] {
            let kvm = pic_to(&pair);
            assert_eq!(kvm[0].init_state, step);
            pair = pic_from(&kvm, 0);
            pair.write(0x20, 1, &[word]);
        }
        assert_eq!(pic_to(&pair)[0].imr, 0xff);
    }

    #[test]
    fn any_numbers_are_chips() {
        for byte in 0..=255 {
            let kvm = kvm_pic_state {
                irr: byte,
                isr: byte,
                imr: !byte,
                irq_base: byte,
                priority_add: byte,
                init_state: byte,
                ..kvm_pic_state::default()
            };
            let mut pair = pic_from(&[kvm, kvm], u32::from(byte) << 8);
            pair.acknowledge();
            pair.request_again(byte);
            let _ = pic_to(&pair);
        }
    }
}
