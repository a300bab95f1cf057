//! Task switches: what is saved and loaded, the busy bits, the link, and what is refused.

use crate::event::{Event, deliver, deliver_with_escalation};
use crate::fake::{Flat, GDT, IDT, STACK, TSS, gate, gdt, protected, sel};
use crate::far::{far_call, far_jump, iret};
use crate::size::OpSize::{Bits16, Bits32};
use crate::state::{CpuState, Exception, Segment, cr0, flags, reg, sreg};

/// Selector of the other task's descriptor, and where its TSS is.
const OTHER: u16 = 0xb0;
const OTHER_TSS: u64 = 0xc000;
const GATE: u16 = 0xb8;
const ENTRY: u32 = 0x4_5678;
const STACK_THERE: u32 = 0xe000;

fn system_descriptor(base: u64, limit: u64, attr: u64) -> u64 {
    limit & 0xffff | (base & 0xff_ffff) << 16 | attr << 40 | (base >> 24 & 0xff) << 56
}

/// Where the busy bits of both tasks are.
fn types(mem: &Flat) -> [u8; 2] {
    [sel::TSS, OTHER].map(|s| mem.get::<1>(GDT + u64::from(s) + 5)[0] & 0xf)
}

fn machine(cpl: u8) -> (CpuState, Flat) {
    let mem = Flat::new();
    gdt(&mem, false);
    mem.put64(GDT + u64::from(sel::TSS), system_descriptor(TSS, 0x67, 0x8b));
    mem.put64(GDT + u64::from(OTHER), system_descriptor(OTHER_TSS, 0x67, 0xe9));
    mem.put64(GDT + u64::from(GATE), gate(OTHER, 0, 0xe5, 0)[0]);
    let words = [
        (0x1c, 0x7000),
        (0x20, ENTRY),
        (0x24, (flags::FIXED | flags::CF) as u32),
        (0x48, u32::from(sel::DATA0)),
        (0x4c, u32::from(sel::CODE0)),
        (0x50, u32::from(sel::DATA0)),
        (0x54, u32::from(sel::DATA3)),
        (0x58, 0),
        (0x5c, 0),
        (0x60, 0),
    ];
    for (at, value) in words {
        mem.put(OTHER_TSS + at, value.to_le_bytes());
    }
    for n in 0..8u32 {
        let value = if n == 4 { STACK_THERE } else { 0x1111 * (n + 1) };
        mem.put(OTHER_TSS + 0x28 + u64::from(n) * 4, value.to_le_bytes());
    }
    let mut cpu = protected(cpl);
    cpu.rflags = flags::FIXED | flags::IF;
    cpu.gpr[reg::RAX] = 0xaaaa;
    (cpu, mem)
}

fn is_in_the_other(cpu: &CpuState, nested: bool) {
    assert_eq!((cpu.rip, cpu.gpr[reg::RSP]), (u64::from(ENTRY), u64::from(STACK_THERE)));
    assert_eq!((cpu.gpr[reg::RAX], cpu.gpr[7]), (0x1111, 0x8888));
    let nt = if nested { flags::NT } else { 0 };
    assert_eq!(cpu.rflags, flags::FIXED | flags::CF | nt);
    assert_eq!((cpu.tr.selector, cpu.tr.base), (OTHER, OTHER_TSS));
    assert_eq!((cpu.cr0 & cr0::TS, cpu.cpl()), (cr0::TS, 0));
    assert_eq!(cpu.seg[sreg::DS].selector, sel::DATA3);
    assert!(cpu.seg[sreg::DS].present() && !cpu.seg[sreg::FS].present());
}

#[test]
fn a_call_and_the_way_back() {
    for target in [OTHER, GATE] {
        let (mut cpu, mut mem) = machine(0);
        far_call(&mut cpu, &mut mem, target, 0, Bits32, 0x1236).unwrap();
        is_in_the_other(&cpu, true);
        assert_eq!(types(&mem), [0xb, 0xb], "both are busy");
        assert_eq!(mem.get16(OTHER_TSS), sel::TSS, "the link");
        assert_eq!(mem.get32(TSS + 0x20), 0x1236);
        assert_eq!(mem.get32(TSS + 0x24), (flags::FIXED | flags::IF) as u32);
        assert_eq!(mem.get32(TSS + 0x28), 0xaaaa);
        assert_eq!(mem.get16(TSS + 0x4c), sel::CODE0);
        cpu.gpr[reg::RAX] = 0x7777;
        cpu.rip = 0x9999;
        iret(&mut cpu, &mut mem, Bits32).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[reg::RAX]), (0x1236, 0xaaaa));
        assert_eq!((cpu.rflags, cpu.tr.selector), (flags::FIXED | flags::IF, sel::TSS));
        assert_eq!(types(&mem), [0xb, 9]);
        assert_eq!((mem.get32(OTHER_TSS + 0x20), mem.get32(OTHER_TSS + 0x28)), (0x9999, 0x7777));
        let kept = mem.get32(OTHER_TSS + 0x24);
        assert_eq!(u64::from(kept) & flags::NT, 0, "the task that returned is nested no more");
    }
}

#[test]
fn a_jump_leaves_the_old_task() {
    let (mut cpu, mut mem) = machine(3);
    cpu.dr7 = 0x3ff;
    far_jump(&mut cpu, &mut mem, OTHER | 3, 0, Bits16).unwrap();
    is_in_the_other(&CpuState { tr: Segment { selector: OTHER, ..cpu.tr }, ..cpu.clone() }, false);
    assert_eq!(types(&mem), [9, 0xb]);
    assert_eq!((mem.get16(OTHER_TSS), mem.get32(TSS + 0x20)), (0, 0x1234));
    assert_eq!(cpu.dr7, 0x2aa, "local breakpoints are off");
}

#[test]
fn an_exception_through_a_task_gate() {
    let (mut cpu, mut mem) = machine(3);
    mem.put64(IDT + 13 * 8, gate(OTHER, 0, 0x85, 0)[0]);
    deliver(&mut cpu, &mut mem, Event::Exception(Exception::gp(0x1234))).unwrap();
    assert_eq!(cpu.gpr[reg::RSP], u64::from(STACK_THERE) - 4);
    assert_eq!(mem.get32(cpu.gpr[reg::RSP]), 0x1234);
    cpu.gpr[reg::RSP] += 4;
    is_in_the_other(&cpu, true);
    assert_eq!(mem.get32(TSS + 0x20), 0x1234, "the faulting instruction");
    assert_eq!(u64::from(mem.get32(TSS + 0x24)) & flags::RF, flags::RF);
    assert_eq!(mem.get16(TSS + 0x50), sel::DATA3);
    // INT n needs the gate's DPL.
    let (mut cpu, _) = machine(3);
    let int = Event::SoftInt { vector: 13, next_rip: 0x1236 };
    assert_eq!(deliver(&mut cpu, &mut mem, int), Err(Exception::gp(13 << 3 | 2)));
}

/// A trap of the new task is not part of the delivery: with tasks that are never busy, because their
/// registers are saved over their own descriptors, it would go on without end.
#[test]
fn a_trap_of_the_new_task_comes_after_the_delivery() {
    let (mut cpu, mut mem) = machine(0);
    mem.put(OTHER_TSS + 0x64, [1]);
    for vector in [1, 13] {
        mem.put64(IDT + vector * 8, gate(OTHER, 0, 0x85, 0)[0]);
    }
    deliver_with_escalation(&mut cpu, &mut mem, Event::Exception(Exception::db(0))).unwrap();
    assert_eq!(mem.task_trap, Some(Exception::db(1 << 15)));
    is_in_the_other(&cpu, true);
}

#[test]
fn a_task_in_virtual_8086_mode() {
    let (mut cpu, mut mem) = machine(0);
    mem.put(OTHER_TSS + 0x24, ((flags::FIXED | flags::VM) as u32).to_le_bytes());
    mem.put(OTHER_TSS + 0x20, 0x5678u32.to_le_bytes());
    far_jump(&mut cpu, &mut mem, OTHER, 0, Bits32).unwrap();
    assert!(cpu.virtual_8086());
    assert_eq!((cpu.cpl(), cpu.seg[sreg::CS]), (3, Segment::virtual_8086(sel::CODE0)));
}

#[test]
fn a_16_bit_task() {
    let (mut cpu, mut mem) = machine(0);
    mem.put64(GDT + u64::from(OTHER), system_descriptor(OTHER_TSS, 0x2b, 0x81));
    let words = [(0x0e, 0x5678), (0x10, 3), (0x12, 0xaaaa), (0x1a, 0xe000), (0x22, sel::DATA0)];
    let segments = [(0x24, sel::CODE0), (0x26, sel::DATA0), (0x28, 0), (0x2a, 0)];
    for (at, value) in words.into_iter().chain(segments) {
        mem.put(OTHER_TSS + at, value.to_le_bytes());
    }
    far_call(&mut cpu, &mut mem, OTHER, 0, Bits32, 0x1236).unwrap();
    assert_eq!((cpu.rip, cpu.gpr[reg::RSP] & 0xffff), (0x5678, 0xe000));
    assert_eq!(cpu.rflags, flags::FIXED | flags::CF | flags::NT);
    cpu.rip = 0x9999;
    iret(&mut cpu, &mut mem, Bits32).unwrap();
    assert_eq!((cpu.rip, mem.get16(OTHER_TSS + 0x0e)), (0x1236, 0x9999));
}

#[test]
fn what_is_refused_before_the_switch() {
    let put = |mem: &Flat, limit, attr| {
        mem.put64(GDT + u64::from(OTHER), system_descriptor(OTHER_TSS, limit, attr));
    };
    let code = u32::from(OTHER);
    // Limit, type and presence of the other's descriptor, CPL.
    for (limit, attr, cpl, expected) in [
        (0x67, 0x69, 0, Exception::np(code)),
        (0x66, 0xe9, 0, Exception::ts(code)),
        (0x67, 0x8b, 0, Exception::gp(code)),
        (0x67, 0x89, 3, Exception::gp(code)),
    ] {
        let (cpu, mut mem) = machine(cpl);
        put(&mem, limit, attr);
        let mut after = cpu.clone();
        let result = far_call(&mut after, &mut mem, OTHER, 0, Bits32, 0x1236);
        assert_eq!((result, mem.task_entered), (Err(expected), false));
        assert_eq!(after, cpu);
    }
    // IRET to a task that is not busy, and with no link at all.
    for (link, expected) in [(OTHER, Exception::ts(code)), (0, Exception::ts(0))] {
        let (mut cpu, mut mem) = machine(0);
        cpu.rflags |= flags::NT;
        mem.put(TSS, link.to_le_bytes());
        assert_eq!(iret(&mut cpu, &mut mem, Bits32), Err(expected));
        assert!(!mem.task_entered);
    }
    // A fault of the old TSS.
    let (cpu, mut mem) = machine(0);
    mem.faulting = Some(TSS + 0x40..TSS + 0x44);
    let mut after = cpu.clone();
    let result = far_jump(&mut after, &mut mem, OTHER, 0, Bits32);
    assert_eq!(result, Err(Exception::pf(TSS + 0x40, 2)));
    assert_eq!((after, types(&mem)), (cpu, [0xb, 9]));
}

#[test]
fn what_is_wrong_with_the_new_task_is_its_own_fault() {
    for (at, value, expected) in [
        (0x4c, 0, Exception::ts(0)),
        (0x4c, u32::from(sel::DATA0), Exception::ts(0x10)),
        (0x4c, u32::from(sel::ABSENT0), Exception::np(0x48)),
        (0x50, 0, Exception::ts(0)),
        (0x50, u32::from(sel::DATA3), Exception::ts(0x20)),
        (0x54, u32::from(sel::OUTSIDE), Exception::ts(0x200)),
        (0x54, u32::from(sel::ABSENT_DATA3), Exception::np(0x50)),
        (0x60, u32::from(sel::DATA0), Exception::ts(0x10)),
    ] {
        let (mut cpu, mut mem) = machine(0);
        mem.put(OTHER_TSS + at, value.to_le_bytes());
        let result = far_jump(&mut cpu, &mut mem, OTHER, 0, Bits32);
        assert_eq!(result, Err(expected), "{at:#x} {value:#x}");
        assert!(mem.task_entered);
        assert_eq!((cpu.rip, cpu.tr.selector), (u64::from(ENTRY), OTHER));
    }
    // In virtual-8086 mode, too, it has a level to be delivered from.
    let (mut cpu, mut mem) = machine(0);
    for (at, value) in [(0x24, (flags::FIXED | flags::VM) as u32), (0x4c, 0x1000), (0x60, 0x7000)] {
        mem.put(OTHER_TSS + at, value.to_le_bytes());
    }
    let result = far_jump(&mut cpu, &mut mem, OTHER, 0, Bits32);
    assert_eq!((result, cpu.cpl()), (Err(Exception::ts(0x7000)), 3));
    // The T bit.
    let (mut cpu, mut mem) = machine(0);
    mem.put(OTHER_TSS + 0x64, [1]);
    far_jump(&mut cpu, &mut mem, OTHER, 0, Bits32).unwrap();
    assert_eq!(mem.task_trap, Some(Exception::db(1 << 15)));
    is_in_the_other(&cpu, false);
    assert_eq!(mem.get32(STACK), 0);
}
