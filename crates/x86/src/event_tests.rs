//! Event delivery tests: frames, gates, stacks, error codes and the double-fault matrix.

use super::{Event, TripleFault, deliver, deliver_with_escalation};
use crate::fake::{self, Flat, GDT, IDT, STACK, TSS, gate, gdt, long, protected, real, sel};
use crate::state::{CodeSize, CpuState, Exception, Segment, flags, reg, sreg, vector};

const HANDLER: u64 = 0x5678;
const RSP0: u64 = 0xa008;
const IST1: u64 = 0xb000;
const INT: u8 = 0x8e;
const TRAP: u8 = 0x8f;

fn idt64(mem: &Flat, vector: u8, gate: [u64; 2]) {
    mem.put64(IDT + u64::from(vector) * 16, gate[0]);
    mem.put64(IDT + u64::from(vector) * 16 + 8, gate[1]);
}

fn idt32(mem: &Flat, vector: u8, gate: [u64; 2]) {
    mem.put64(IDT + u64::from(vector) * 8, gate[0]);
}

/// Long mode with every vector an interrupt gate to `HANDLER`.
fn long_machine(cpl: u8) -> (CpuState, Flat) {
    let mem = Flat::new();
    gdt(&mem, true);
    for vector in 0..=255 {
        idt64(&mem, vector, gate(sel::CODE0, HANDLER, INT, 0));
    }
    mem.put64(TSS + 4, RSP0);
    mem.put64(TSS + 0x24, IST1);
    let mut cpu = long(cpl);
    cpu.rflags = flags::FIXED | flags::IF;
    (cpu, mem)
}

/// 32-bit protected mode with every vector a 32-bit interrupt gate to `HANDLER`.
fn legacy_machine(cpl: u8) -> (CpuState, Flat) {
    let mem = Flat::new();
    gdt(&mem, false);
    for vector in 0..=255 {
        idt32(&mem, vector, gate(sel::CODE0, HANDLER, INT, 0));
    }
    mem.put(TSS + 4, (RSP0 as u32).to_le_bytes());
    mem.put(TSS + 8, sel::DATA0.to_le_bytes());
    let mut cpu = protected(cpl);
    cpu.rflags = flags::FIXED | flags::IF;
    (cpu, mem)
}

fn frame64<const N: usize>(cpu: &CpuState, mem: &Flat) -> [u64; N] {
    std::array::from_fn(|i| mem.get64(cpu.gpr[reg::RSP] + i as u64 * 8))
}

fn frame32<const N: usize>(cpu: &CpuState, mem: &Flat) -> [u32; N] {
    std::array::from_fn(|i| mem.get32(cpu.gpr[reg::RSP] + i as u64 * 4))
}

/// Delivery fails with `expected` and leaves registers and memory alone.
fn refused(cpu: &CpuState, mem: &mut Flat, event: Event, expected: Exception) {
    let mut after = cpu.clone();
    let bytes = mem.snapshot();
    assert_eq!(deliver(&mut after, mem, event), Err(expected), "{event:?}");
    assert_eq!(mem.snapshot(), bytes, "memory after {event:?}");
    after.cr2 = cpu.cr2;
    after.dr6 = cpu.dr6;
    assert_eq!(&after, cpu, "registers after {event:?}");
}

#[test]
fn long_mode_from_user() {
    let (mut cpu, mut mem) = long_machine(3);
    cpu.rflags |= flags::TF | flags::NT | flags::CF | flags::AC;
    cpu.halted = 1;
    cpu.interrupt_shadow = 3;
    let old = cpu.rflags;
    deliver(&mut cpu, &mut mem, Event::Interrupt(0x40)).unwrap();
    assert_eq!(cpu.gpr[reg::RSP], (RSP0 & !0xf) - 40, "aligned to 16");
    let (cs, ss) = (u64::from(sel::CODE3), u64::from(sel::DATA3));
    assert_eq!(frame64::<5>(&cpu, &mem), [0x1234, cs, old, STACK, ss]);
    assert_eq!((cpu.cpl(), cpu.rip), (0, HANDLER));
    assert_eq!(cpu.seg[sreg::CS].selector, sel::CODE0);
    assert_eq!(cpu.seg[sreg::SS], Segment { base: 0, limit: 0, selector: 0, attr: 0 });
    assert_eq!(cpu.rflags, flags::FIXED | flags::CF | flags::AC);
    assert_eq!((cpu.halted, cpu.interrupt_shadow), (0, 0));
}

#[test]
fn long_mode_same_level_aligns_and_keeps_ss() {
    let (mut cpu, mut mem) = long_machine(0);
    cpu.gpr[reg::RSP] = STACK - 8;
    idt64(&mem, 6, gate(sel::CODE0, HANDLER, TRAP, 0));
    let ss = cpu.seg[sreg::SS];
    deliver(&mut cpu, &mut mem, Event::Exception(Exception::ud())).unwrap();
    assert_eq!(cpu.gpr[reg::RSP], STACK - 16 - 40);
    let [rip, _, image, rsp, _] = frame64(&cpu, &mem);
    assert_eq!((rip, rsp), (0x1234, STACK - 8));
    assert_eq!(image & flags::RF, flags::RF, "faults save RF");
    assert_eq!(cpu.rflags & flags::IF, flags::IF, "trap gate");
    assert_eq!(cpu.seg[sreg::SS], ss);
}

#[test]
fn long_mode_error_code_cr2_and_ist() {
    let (mut cpu, mut mem) = long_machine(0);
    idt64(&mem, 14, gate(sel::CODE0, 0xffff_8000_1234_5678, INT, 1));
    deliver(&mut cpu, &mut mem, Event::Exception(Exception::pf(0xdead, 2))).unwrap();
    assert_eq!((cpu.cr2, cpu.rip), (0xdead, 0xffff_8000_1234_5678));
    assert_eq!(cpu.gpr[reg::RSP], IST1 - 48);
    assert_eq!(frame64::<2>(&cpu, &mem), [2, 0x1234]);
    assert_eq!(cpu.seg[sreg::SS].selector, sel::DATA0, "no change of level");
}

#[test]
fn rf_by_kind_of_event() {
    for (event, expected) in [
        (Event::Exception(Exception::gp(0)), true),
        (Event::Exception(Exception::de()), true),
        (Event::Exception(Exception::pf(0, 0)), true),
        (Event::Exception(Exception::other(vector::BR)), true),
        (Event::Exception(Exception::db(1)), false),
        (Event::Exception(Exception::db(1 << 13)), true),
        (Event::Exception(Exception::other(vector::BP)), false),
        (Event::Exception(Exception::other(vector::MC)), false),
        (Event::Interrupt(0x30), false),
        (Event::Nmi, false),
        (Event::SoftInt { vector: 3, next_rip: 0x1235 }, false),
    ] {
        let (mut cpu, mut mem) = long_machine(0);
        deliver(&mut cpu, &mut mem, event).unwrap();
        let code = usize::from(matches!(event, Event::Exception(e) if e.error_code.is_some()));
        let frame: [u64; 4] = frame64(&cpu, &mem);
        assert_eq!(frame[2 + code] & flags::RF != 0, expected, "{event:?}");
        assert_eq!(cpu.rflags & flags::RF, 0);
    }
}

#[test]
fn debug_exception_updates_dr6_and_clears_gd() {
    let (mut cpu, mut mem) = long_machine(0);
    cpu.dr7 |= 1 << 13;
    cpu.dr6 = 0xffff_0ff0 | 0xf;
    deliver(&mut cpu, &mut mem, Event::Exception(Exception::db(1 << 14 | 2))).unwrap();
    assert_eq!(cpu.dr6, 0xffff_4ff2);
    assert_eq!(cpu.dr7, 0x400);
}

#[test]
fn nmi_is_masked_until_iret() {
    let (mut cpu, mut mem) = long_machine(3);
    deliver(&mut cpu, &mut mem, Event::Nmi).unwrap();
    assert_eq!(cpu.nmi_masked, 1);
    let (mut cpu, mut mem) = long_machine(3);
    deliver(&mut cpu, &mut mem, Event::Interrupt(2)).unwrap();
    assert_eq!(cpu.nmi_masked, 0);
}

#[test]
fn software_interrupts_check_the_gate() {
    for (cpl, dpl, allowed) in [(3, 0, false), (3, 2, false), (3, 3, true), (0, 0, true)] {
        let (mut cpu, mut mem) = long_machine(cpl);
        idt64(&mem, 0x80, gate(sel::CODE0, HANDLER, INT | dpl << 5, 0));
        let event = Event::SoftInt { vector: 0x80, next_rip: 0x1236 };
        if allowed {
            deliver(&mut cpu, &mut mem, event).unwrap();
            assert_eq!(frame64::<1>(&cpu, &mem), [0x1236]);
        } else {
            refused(&cpu, &mut mem, event, Exception::gp(0x80 << 3 | 2));
        }
        // Hardware does not look at the DPL.
        let (mut cpu, mut mem) = long_machine(cpl);
        deliver(&mut cpu, &mut mem, Event::Interrupt(0x80)).unwrap();
    }
}

#[test]
fn long_mode_gate_faults() {
    const V: u8 = 0x50;
    let at_gate = u32::from(V) << 3 | 2 | 1;
    let outside = u32::from(sel::OUTSIDE) | 1;
    for (bad, expected) in [
        (gate(sel::CODE0, HANDLER, 0x0e, 0), Exception::np(at_gate)),
        (gate(sel::CODE0, HANDLER, 0x85, 0), Exception::gp(at_gate)),
        (gate(sel::CODE0, HANDLER, 0x86, 0), Exception::gp(at_gate)),
        (gate(sel::CODE0, HANDLER, 0x8c, 0), Exception::gp(at_gate)),
        (gate(sel::CODE0, HANDLER, 0x9e, 0), Exception::gp(at_gate)),
        (gate(0, HANDLER, INT, 0), Exception::gp(1)),
        (gate(3, HANDLER, INT, 0), Exception::gp(1)),
        (gate(sel::OUTSIDE, HANDLER, INT, 0), Exception::gp(outside)),
        (gate(sel::DATA0, HANDLER, INT, 0), Exception::gp(u32::from(sel::DATA0) | 1)),
        (gate(sel::TSS, HANDLER, INT, 0), Exception::gp(u32::from(sel::TSS) | 1)),
        (gate(sel::OTHER3, HANDLER, INT, 0), Exception::gp(0x38 | 1)),
        (gate(sel::CODE3, HANDLER, INT, 0), Exception::gp(0x18 | 1)),
        (gate(sel::BOTH_SIZES0, HANDLER, INT, 0), Exception::gp(0xa0 | 1)),
        (gate(sel::ABSENT0, HANDLER, INT, 0), Exception::np(u32::from(sel::ABSENT0) | 1)),
        (gate(sel::CODE0, 1 << 47, INT, 0), Exception::gp(1)),
    ] {
        let (cpu, mut mem) = long_machine(0);
        idt64(&mem, V, bad);
        refused(&cpu, &mut mem, Event::Interrupt(V), expected);
        let soft = Event::SoftInt { vector: V, next_rip: 0 };
        let code = expected.error_code.map(|code| code & !1);
        refused(&cpu, &mut mem, soft, Exception { error_code: code, ..expected });
    }
}

#[test]
fn limits_of_tables() {
    let (mut cpu, mut mem) = long_machine(3);
    cpu.idtr.limit = 0x41 * 16 - 2;
    refused(&cpu, &mut mem, Event::Interrupt(0x40), Exception::gp(0x40 << 3 | 3));
    cpu.idtr.limit += 1;
    deliver(&mut cpu.clone(), &mut mem, Event::Interrupt(0x40)).unwrap();
    cpu.tr.limit = 10;
    refused(&cpu, &mut mem, Event::Interrupt(0x40), Exception::ts(u32::from(sel::TSS) | 1));
    cpu.tr.limit = 11;
    deliver(&mut cpu.clone(), &mut mem, Event::Interrupt(0x40)).unwrap();
}

#[test]
fn bad_stacks_in_long_mode() {
    let (cpu, mut mem) = long_machine(3);
    mem.put64(TSS + 4, 1 << 47 | 0x100);
    refused(&cpu, &mut mem, Event::Interrupt(0x40), Exception::ss(1));
    mem.put64(TSS + 4, RSP0);
    mem.faulting = Some(0xa000 - 8..0xa000);
    let expected = Exception::pf(0xa000 - 8, 2);
    refused(&cpu, &mut mem, Event::Exception(Exception::gp(0)), expected);
}

#[test]
fn conforming_handler_keeps_the_level() {
    let (mut cpu, mut mem) = long_machine(3);
    idt64(&mem, 0x40, gate(sel::CONFORMING0, HANDLER, INT, 0));
    deliver(&mut cpu, &mut mem, Event::Interrupt(0x40)).unwrap();
    assert_eq!((cpu.cpl(), cpu.seg[sreg::CS].selector), (3, sel::CONFORMING0 | 3));
    assert_eq!(cpu.gpr[reg::RSP], STACK - 40);
}

#[test]
fn compatibility_mode_is_left() {
    let (mut cpu, mut mem) = long_machine(3);
    cpu.seg[sreg::CS].attr = 0xc0fb;
    deliver(&mut cpu, &mut mem, Event::Interrupt(0x40)).unwrap();
    assert_eq!(cpu.code_size(), CodeSize::Bits64);
}

#[test]
fn legacy_inner_level() {
    let (mut cpu, mut mem) = legacy_machine(3);
    let old = cpu.rflags as u32;
    deliver(&mut cpu, &mut mem, Event::Exception(Exception::gp(0x18))).unwrap();
    let (cs, ss) = (u32::from(sel::CODE3), u32::from(sel::DATA3));
    assert_eq!(cpu.gpr[reg::RSP], RSP0 - 24);
    let expected = [0x18, 0x1234, cs, old | flags::RF as u32, STACK as u32, ss];
    assert_eq!(frame32::<6>(&cpu, &mem), expected);
    assert_eq!((cpu.cpl(), cpu.rip), (0, HANDLER));
    assert_eq!(cpu.seg[sreg::SS].selector, sel::DATA0);
    assert_eq!(cpu.rflags, flags::FIXED);
}

#[test]
fn legacy_same_level_and_16_bit_gates() {
    let (mut cpu, mut mem) = legacy_machine(0);
    let old = cpu.rflags as u32;
    deliver(&mut cpu, &mut mem, Event::Interrupt(0x20)).unwrap();
    assert_eq!(cpu.gpr[reg::RSP], STACK - 12);
    assert_eq!(frame32::<3>(&cpu, &mem), [0x1234, u32::from(sel::CODE0), old]);
    let (mut cpu, mut mem) = legacy_machine(0);
    idt32(&mem, 0x20, gate(sel::CODE0, 0xffff_5678, 0x87, 0));
    deliver(&mut cpu, &mut mem, Event::Interrupt(0x20)).unwrap();
    assert_eq!((cpu.gpr[reg::RSP], cpu.rip), (STACK - 6, 0x5678));
    assert_eq!(mem.get16(STACK - 6), 0x1234);
    assert_eq!(cpu.rflags & flags::IF, flags::IF, "0x87 is a trap gate");
}

#[test]
fn legacy_stack_faults() {
    type Change = fn(&mut CpuState, &mut Flat);
    let cases: [(Change, Exception); 9] = [
        (|_, mem| mem.put(TSS + 8, [0, 0]), Exception::ts(1)),
        (|_, mem| mem.put(TSS + 8, sel::OUTSIDE.to_le_bytes()), Exception::ts(0x201)),
        (|_, mem| mem.put(TSS + 8, sel::DATA3.to_le_bytes()), Exception::ts(0x21)),
        (|_, mem| mem.put(TSS + 8, (sel::DATA3 & !3).to_le_bytes()), Exception::ts(0x21)),
        (|_, mem| mem.put(TSS + 8, sel::CODE0.to_le_bytes()), Exception::ts(0x9)),
        (|cpu, _| cpu.tr.limit = 8, Exception::ts(u32::from(sel::TSS) | 1)),
        (|_, mem| mem.put64(GDT + 0x10, fake::descriptor(0xc013)), Exception::ss(0x11)),
        (|_, mem| mem.put64(GDT + 0x10, 0x0040_9300_0000_0fff), Exception::ss(0x11)),
        (|_, mem| idt32(mem, 0x20, gate(sel::CODE0, 0x1_0000, 0x8e, 0)), Exception::gp(1)),
    ];
    for (i, (change, expected)) in cases.into_iter().enumerate() {
        let (mut cpu, mut mem) = legacy_machine(3);
        // A small code segment for the last case.
        mem.put64(GDT + 8, 0x0040_9b00_0000_ffff);
        change(&mut cpu, &mut mem);
        println!("case {i}");
        refused(&cpu, &mut mem, Event::Interrupt(0x20), expected);
    }
    let (mut cpu, mut mem) = legacy_machine(0);
    cpu.seg[sreg::SS].limit = 0x8000;
    refused(&cpu, &mut mem, Event::Interrupt(0x20), Exception::ss(1));
}

#[test]
fn expand_down_stacks() {
    let (mut cpu, mut mem) = legacy_machine(0);
    cpu.seg[sreg::SS].attr |= 4;
    cpu.seg[sreg::SS].limit = STACK as u32 - 13;
    deliver(&mut cpu.clone(), &mut mem, Event::Interrupt(0x20)).unwrap();
    cpu.seg[sreg::SS].limit = STACK as u32 - 12;
    refused(&cpu, &mut mem, Event::Interrupt(0x20), Exception::ss(1));
}

#[test]
fn real_mode() {
    let mut mem = Flat::new();
    mem.put(IDT + 0x21 * 4, [0x34, 0x12, 0x00, 0x08]);
    let mut cpu = real();
    cpu.gpr[reg::RSP] = 0xabcd_9000;
    cpu.rflags = flags::FIXED | flags::IF | flags::TF | flags::CF;
    let old = cpu.rflags as u16;
    deliver(&mut cpu, &mut mem, Event::SoftInt { vector: 0x21, next_rip: 0x7777 }).unwrap();
    assert_eq!(cpu.gpr[reg::RSP], 0xabcd_8ffa, "only SP moves");
    assert_eq!([mem.get16(0x8ffa), mem.get16(0x8ffc), mem.get16(0x8ffe)], [0x7777, 0x700, old]);
    assert_eq!((cpu.rip, cpu.seg[sreg::CS].base), (0x1234, 0x8000));
    assert_eq!(cpu.rflags, flags::FIXED | flags::CF);
    // The stack wraps at 64 KiB.
    cpu.gpr[reg::RSP] = 2;
    deliver(&mut cpu, &mut mem, Event::Interrupt(0x21)).unwrap();
    assert_eq!((cpu.gpr[reg::RSP], mem.get16(0xfffc), mem.get16(0xfffe)), (0xfffc, 0x1234, 0x800));
    // No error code is pushed; a vector beyond the table is #GP.
    cpu.gpr[reg::RSP] = 0x9000;
    deliver(&mut cpu, &mut mem, Event::Exception(Exception::gp(5))).unwrap();
    assert_eq!(cpu.gpr[reg::RSP], 0x8ffa);
    cpu.idtr.limit = 0x21 * 4 + 2;
    refused(&cpu, &mut mem, Event::Interrupt(0x21), Exception::gp(0x21 << 3 | 3));
}

/// What ends up delivered when the gate of `first` raises `second`: a vector, or `None` for a triple
/// fault.
fn escalate(first: Exception, second: u8) -> Option<u8> {
    let (mut cpu, mut mem) = long_machine(0);
    // Every vector has its own handler address.
    for vector in 0..32u8 {
        idt64(&mem, vector, gate(sel::CODE0, 0x1_0000 + u64::from(vector), INT, 0));
    }
    let bad = match second {
        vector::GP => gate(0, HANDLER, INT, 0),
        vector::NP => gate(sel::CODE0, HANDLER, 0x0e, 0),
        // The stack of IST 2 is where pages fault; that of IST 3 is not canonical.
        vector::PF => gate(sel::CODE0, HANDLER, INT, 2),
        _ => gate(sel::CODE0, HANDLER, INT, 3),
    };
    mem.put64(TSS + 0x2c, 0xd000);
    mem.put64(TSS + 0x34, 1 << 47 | 0x100);
    mem.faulting = Some(0xcf00..0xd000);
    idt64(&mem, first.vector, bad);
    if deliver_with_escalation(&mut cpu, &mut mem, Event::Exception(first)).is_err() {
        return None;
    }
    let delivered = (cpu.rip - 0x1_0000) as u8;
    if delivered == vector::DF {
        assert_eq!(frame64::<2>(&cpu, &mem), [0, 0x1234], "error code 0");
    }
    Some(delivered)
}

#[test]
fn double_fault_matrix() {
    let df = Exception { error_code: Some(0), ..Exception::other(vector::DF) };
    let contributory =
        [Exception::de(), Exception::ts(0), Exception::np(0), Exception::ss(0), Exception::gp(0)];
    let benign = [
        Exception::db(0),
        Exception::ud(),
        Exception::nm(),
        Exception::mf(),
        Exception::ac(),
        Exception::xm(),
        Exception::other(vector::BP),
        Exception::other(vector::BR),
        Exception::other(vector::MC),
    ];
    for second in [vector::GP, vector::NP, vector::SS, vector::PF] {
        for first in benign {
            assert_eq!(escalate(first, second), Some(second), "{} {second}", first.vector);
        }
        for first in contributory {
            // Delivering the second runs into the broken gate again if it is the same vector.
            let expected = if second == vector::PF { vector::PF } else { vector::DF };
            assert_eq!(escalate(first, second), Some(expected), "{} {second}", first.vector);
        }
        assert_eq!(escalate(Exception::pf(1, 0), second), Some(vector::DF), "#PF {second}");
        assert_eq!(escalate(df, second), None, "#DF {second}");
    }
}

#[test]
fn no_table_is_a_triple_fault() {
    let (mut cpu, mut mem) = long_machine(0);
    cpu.idtr.limit = 0;
    for event in [
        Event::Exception(Exception::ud()),
        Event::Interrupt(0x20),
        Event::SoftInt { vector: 3, next_rip: 0 },
        Event::Nmi,
    ] {
        assert_eq!(deliver_with_escalation(&mut cpu, &mut mem, event), Err(TripleFault));
    }
}

#[test]
fn cr2_of_the_second_page_fault() {
    let (mut cpu, mut mem) = long_machine(3);
    mem.put64(TSS + 4, 0xd000);
    mem.faulting = Some(0xcf00..0xd000);
    idt64(&mem, 8, gate(sel::CODE0, HANDLER, INT, 1));
    let event = Event::Exception(Exception::pf(0x1111, 4));
    deliver_with_escalation(&mut cpu, &mut mem, event).unwrap();
    assert_eq!((cpu.cr2, cpu.gpr[reg::RSP]), (0xd000 - 48, IST1 - 48));
}
