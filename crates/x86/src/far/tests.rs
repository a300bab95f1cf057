//! Segment loads, far transfers and IRET: checks, error codes, stacks.

use super::{far_call, far_jump, far_ret, iret, lar, lldt, load_segment, lsl, ltr, verr, verw};
use crate::fake::{Flat, GDT, STACK, TSS, descriptor, gate, gdt, long, protected, real, sel};
use crate::size::OpSize::{self, Bits16, Bits32, Bits64};
use crate::state::{CodeSize, CpuState, Exception, Segment, flags, reg, sreg};

const TARGET: u64 = 0x4_5678;
const RSP0: u64 = 0xa000;

fn machine(is_long: bool, cpl: u8) -> (CpuState, Flat) {
    let mem = Flat::new();
    gdt(&mem, is_long);
    if is_long {
        mem.put64(TSS + 4, RSP0);
    } else {
        mem.put(TSS + 4, (RSP0 as u32).to_le_bytes());
        mem.put(TSS + 8, sel::DATA0.to_le_bytes());
    }
    (if is_long { long(cpl) } else { protected(cpl) }, mem)
}

fn push(mem: &Flat, size: OpSize, values: &[u64]) {
    for (i, value) in values.iter().enumerate() {
        let at = STACK + (i * size.bytes()) as u64;
        match size {
            Bits16 => mem.put(at, (*value as u16).to_le_bytes()),
            Bits32 => mem.put(at, (*value as u32).to_le_bytes()),
            Bits64 => mem.put64(at, *value),
        }
    }
}

/// The operation fails with `expected` and leaves the registers alone.
fn refused(
    cpu: &CpuState,
    mem: &mut Flat,
    expected: Exception,
    operation: impl FnOnce(&mut CpuState, &mut Flat) -> Result<(), Exception>,
) {
    let mut after = cpu.clone();
    assert_eq!(operation(&mut after, mem), Err(expected));
    assert_eq!(&after, cpu);
}

mod segments {
    use super::{
        Exception, Flat, GDT, Segment, descriptor, gate, lar, lldt, load_segment, lsl, ltr,
        machine, protected, real, refused, sel, sreg, verr, verw,
    };

    #[test]
    fn data_segment_matrix() {
        // Selector, outcome at CPL 0 and at CPL 3.
        let gp = |selector: u16| Some(Exception::gp(u32::from(selector & 0xfffc)));
        for (selector, at0, at3) in [
            (0, None, None),
            (3, None, None),
            (sel::DATA0, None, gp(sel::DATA0)),
            (sel::DATA0 | 3, gp(sel::DATA0), gp(sel::DATA0)),
            (sel::DATA3, None, None),
            (sel::DATA3 & !3, None, None),
            (sel::CODE0, None, gp(sel::CODE0)),
            (sel::CODE3, None, None),
            (sel::CONFORMING0, None, None),
            (sel::EXECUTE_ONLY3, gp(sel::EXECUTE_ONLY3), gp(sel::EXECUTE_ONLY3)),
            (sel::READ_ONLY3, None, None),
            (sel::ABSENT_DATA3, Some(Exception::np(0x50)), Some(Exception::np(0x50))),
            (sel::TSS, gp(sel::TSS), gp(sel::TSS)),
            (sel::OUTSIDE, gp(sel::OUTSIDE), gp(sel::OUTSIDE)),
            (sel::DATA3 | 4, gp(sel::DATA3 | 4), gp(sel::DATA3 | 4)),
        ] {
            for (cpl, expected) in [(0, at0), (3, at3)] {
                for is_long in [false, true] {
                    let (mut cpu, mut mem) = machine(is_long, cpl);
                    let before = cpu.clone();
                    let result = load_segment(&mut cpu, &mut mem, sreg::FS, selector);
                    assert_eq!(result.err(), expected, "{selector:#x} at CPL {cpl}");
                    if expected.is_some() {
                        assert_eq!(cpu, before);
                    } else {
                        let fs = cpu.seg[sreg::FS];
                        assert_eq!((fs.selector, fs.present()), (selector, selector > 3));
                    }
                }
            }
        }
    }

    #[test]
    fn stack_segment_matrix() {
        let gp = |code| Some(Exception::gp(code));
        // Long, CPL, selector, outcome.
        for (is_long, cpl, selector, expected) in [
            (true, 0, 0, None),
            (true, 0, 3, gp(0)),
            (true, 3, 3, gp(0)),
            (true, 1, 1, None),
            (false, 0, 0, gp(0)),
            (false, 0, sel::DATA0, None),
            (false, 0, sel::DATA0 | 1, gp(0x10)),
            (false, 0, sel::DATA3, gp(0x20)),
            (false, 0, sel::DATA3 & !3, gp(0x20)),
            (false, 0, sel::CODE0, gp(0x08)),
            (false, 3, sel::DATA3, None),
            (false, 3, sel::READ_ONLY3, gp(0x58)),
            (false, 3, sel::ABSENT_DATA3, Some(Exception::ss(0x50))),
            (false, 3, sel::OUTSIDE | 3, gp(0x200)),
            (true, 3, sel::DATA3, None),
        ] {
            let (mut cpu, mut mem) = machine(is_long, cpl);
            let result = load_segment(&mut cpu, &mut mem, sreg::SS, selector);
            assert_eq!(result.err(), expected, "{selector:#x} at CPL {cpl}, long {is_long}");
            assert_eq!(cpu.cpl(), cpl, "a load of SS never changes the CPL");
        }
    }

    #[test]
    fn hidden_part_and_accessed_bit() {
        let (mut cpu, mut mem) = machine(false, 0);
        mem.put64(GDT + 0x10, 0x92c0_9234_5678_9abc | 0xf << 48);
        load_segment(&mut cpu, &mut mem, sreg::ES, sel::DATA0).unwrap();
        let expected =
            Segment { base: 0x9234_5678, limit: 0xf9ab_cfff, selector: 0x10, attr: 0xc093 };
        assert_eq!(cpu.seg[sreg::ES], expected);
        assert_eq!(mem.get::<1>(GDT + 0x15), [0x93], "accessed");
        let writes = mem.writes;
        load_segment(&mut cpu, &mut mem, sreg::ES, sel::DATA0).unwrap();
        assert_eq!(mem.writes, writes, "not written again");
        assert_eq!(load_segment(&mut cpu, &mut mem, sreg::CS, 8), Err(Exception::ud()));
    }

    #[test]
    fn real_mode_keeps_limit_and_attributes() {
        let mut cpu = real();
        cpu.seg[sreg::DS].limit = u32::MAX;
        load_segment(&mut cpu, &mut Flat::new(), sreg::DS, 0x1234).unwrap();
        let ds = cpu.seg[sreg::DS];
        assert_eq!((ds.base, ds.limit, ds.selector), (0x12340, u32::MAX, 0x1234));
    }

    #[test]
    fn local_descriptor_table() {
        let (mut cpu, mut mem) = machine(false, 0);
        lldt(&mut cpu, &mut mem, sel::LDT).unwrap();
        assert_eq!((cpu.ldtr.base, cpu.ldtr.limit), (0x6000, 0x17));
        mem.put64(0x6010, descriptor(0xc093));
        load_segment(&mut cpu, &mut mem, sreg::ES, 0x14).unwrap();
        refused(&cpu, &mut mem, Exception::gp(0x1c), |cpu, mem| {
            load_segment(cpu, mem, sreg::ES, 0x1c)
        });
        lldt(&mut cpu, &mut mem, 0).unwrap();
        assert!(!cpu.ldtr.present());
        for (selector, expected) in [
            (sel::LDT | 4, Exception::gp(0x84)),
            (sel::DATA0, Exception::gp(0x10)),
            (sel::TSS, Exception::gp(0x28)),
            (sel::OUTSIDE, Exception::gp(0x200)),
        ] {
            refused(&cpu, &mut mem, expected, |cpu, mem| lldt(cpu, mem, selector));
        }
        assert_eq!(lldt(&mut real(), &mut mem, 0), Err(Exception::ud()));
        assert_eq!(lldt(&mut protected(3), &mut mem, 0), Err(Exception::gp(0)));
    }

    #[test]
    fn task_register() {
        let (mut cpu, mut mem) = machine(true, 0);
        mem.put64(GDT + 0x30, 0xffff_8000);
        cpu.tr = Segment::default();
        ltr(&mut cpu, &mut mem, sel::TSS).unwrap();
        assert_eq!((cpu.tr.base, cpu.tr.limit), (0xffff_8000_0000_4000, 0x67));
        assert_eq!((cpu.tr.typ(), mem.get::<1>(GDT + 0x2d)), (0xb, [0x8b]), "busy");
        refused(&cpu, &mut mem, Exception::gp(0x28), |cpu, mem| ltr(cpu, mem, sel::TSS));
        refused(&cpu, &mut mem, Exception::gp(0), |cpu, mem| ltr(cpu, mem, 3));
        mem.put(GDT + 0x2d, [0x09]);
        refused(&cpu, &mut mem, Exception::np(0x28), |cpu, mem| ltr(cpu, mem, sel::TSS));
        mem.put(GDT + 0x2d, [0x81]);
        refused(&cpu, &mut mem, Exception::gp(0x28), |cpu, mem| ltr(cpu, mem, sel::TSS));
        let (mut cpu, mut mem) = machine(false, 0);
        mem.put(GDT + 0x2d, [0x81]);
        ltr(&mut cpu, &mut mem, sel::TSS).unwrap();
        assert_eq!(cpu.tr.typ(), 3, "a 16-bit TSS outside long mode");
    }

    #[test]
    fn queries() {
        // Selector; VERR, VERW, LAR and LSL answer at CPL 0, then at CPL 3.
        let data = Some((0x00c0_9300, u32::MAX));
        for (selector, at0, at3) in [
            (0, (false, false, None), (false, false, None)),
            (sel::OUTSIDE, (false, false, None), (false, false, None)),
            (sel::DATA0, (true, true, data), (false, false, None)),
            (sel::DATA0 | 3, (false, false, None), (false, false, None)),
            (
                sel::READ_ONLY3,
                (true, false, Some((0x00c0_f100, u32::MAX))),
                (true, false, Some((0x00c0_f100, u32::MAX))),
            ),
            (
                sel::CONFORMING0,
                (true, false, Some((0x00c0_9f00, u32::MAX))),
                (true, false, Some((0x00c0_9f00, u32::MAX))),
            ),
            (sel::TSS, (false, false, Some((0x8900, 0x67))), (false, false, None)),
            (sel::LDT, (false, false, Some((0x8200, 0x17))), (false, false, None)),
        ] {
            for (cpl, (r, w, rights)) in [(0, at0), (3, at3)] {
                let (mut cpu, mut mem) = machine(false, cpl);
                let before = cpu.clone();
                assert_eq!(verr(&mut cpu, &mut mem, selector), Ok(r), "verr {selector:#x} {cpl}");
                assert_eq!(verw(&mut cpu, &mut mem, selector), Ok(w), "verw {selector:#x} {cpl}");
                let found = lar(&mut cpu, &mut mem, selector).unwrap();
                assert_eq!(found, rights.map(|r| r.0), "lar {selector:#x} {cpl}");
                let found = lsl(&mut cpu, &mut mem, selector).unwrap();
                assert_eq!(found, rights.map(|r| r.1), "lsl {selector:#x} {cpl}");
                assert_eq!(cpu, before);
            }
        }
        assert_eq!(verr(&mut real(), &mut Flat::new(), 8), Err(Exception::ud()));
        // Gates have rights but no limit; task gates do not exist in long mode.
        let (mut cpu, mut mem) = machine(true, 0);
        mem.put64(GDT + 0x70, gate(sel::CODE0, 0, 0x8c, 0)[0]);
        assert_eq!(lar(&mut cpu, &mut mem, sel::GATE0), Ok(Some(0x8c00)));
        assert_eq!(lsl(&mut cpu, &mut mem, sel::GATE0), Ok(None));
        mem.put64(GDT + 0x70, gate(sel::CODE0, 0, 0x85, 0)[0]);
        assert_eq!(lar(&mut cpu, &mut mem, sel::GATE0), Ok(None));
        assert_eq!(lar(&mut protected(0), &mut mem, sel::GATE0), Ok(Some(0x8500)));
    }
}

mod irets {
    use super::{
        Bits16, Bits32, Bits64, CodeSize, Exception, Flat, GDT, STACK, Segment, TARGET, flags,
        iret, load_segment, machine, push, real, refused, reg, sel, sreg,
    };

    const IMAGE: u64 = flags::FIXED | flags::IF | flags::CF;

    #[test]
    fn long_to_user() {
        let (mut cpu, mut mem) = machine(true, 0);
        cpu.nmi_masked = 1;
        cpu.seg[sreg::FS] = Segment { base: 0x7777, limit: 0, selector: 0, attr: 0 };
        push(&mem, Bits64, &[TARGET, 0x1b, IMAGE | flags::RF, 0x7fff_0000, 0x23]);
        iret(&mut cpu, &mut mem, Bits64).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.gpr[reg::RSP]), (TARGET, 3, 0x7fff_0000));
        assert_eq!(cpu.rflags, IMAGE | flags::RF);
        assert_eq!((cpu.nmi_masked, cpu.code_size()), (0, CodeSize::Bits64));
        assert!(!cpu.seg[sreg::DS].present(), "kernel data is dropped");
        assert_eq!(cpu.seg[sreg::DS].selector, 0);
        assert_eq!(cpu.seg[sreg::FS].base, 0x7777, "a null FS keeps its base");
    }

    #[test]
    fn what_the_outer_level_may_use_stays() {
        let (mut cpu, mut mem) = machine(true, 0);
        load_segment(&mut cpu, &mut mem, sreg::DS, sel::CONFORMING0).unwrap();
        load_segment(&mut cpu, &mut mem, sreg::ES, sel::DATA3).unwrap();
        load_segment(&mut cpu, &mut mem, sreg::GS, sel::CODE0).unwrap();
        push(&mem, Bits64, &[TARGET, 0x1b, IMAGE, 0x7fff_0000, 0x23]);
        iret(&mut cpu, &mut mem, Bits64).unwrap();
        let present = [sreg::DS, sreg::ES, sreg::FS, sreg::GS].map(|i| cpu.seg[i].present());
        assert_eq!(present, [true, true, false, false]);
    }

    #[test]
    fn long_to_compatibility_mode() {
        let (mut cpu, mut mem) = machine(true, 0);
        push(&mem, Bits64, &[TARGET, u64::from(sel::OTHER3), IMAGE, 0xf_0000_7000, 0x23]);
        iret(&mut cpu, &mut mem, Bits64).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[reg::RSP]), (TARGET, 0x7000));
        assert_eq!((cpu.cpl(), cpu.code_size()), (3, CodeSize::Bits32));
        // And from there a return within the level pops three values only.
        push(&mem, Bits32, &[0x1111, u64::from(sel::OTHER3), IMAGE]);
        cpu.gpr[reg::RSP] = STACK;
        iret(&mut cpu, &mut mem, Bits32).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[reg::RSP]), (0x1111, STACK + 12));
    }

    #[test]
    fn long_same_level_pops_the_stack() {
        for ss in [0, sel::DATA0] {
            let (mut cpu, mut mem) = machine(true, 0);
            push(&mem, Bits64, &[0xffff_8000_0000_0000, 8, IMAGE, 0x1238, u64::from(ss)]);
            iret(&mut cpu, &mut mem, Bits64).unwrap();
            assert_eq!((cpu.rip, cpu.gpr[reg::RSP]), (0xffff_8000_0000_0000, 0x1238));
            assert_eq!((cpu.cpl(), cpu.seg[sreg::SS].selector), (0, ss));
            assert!(cpu.seg[sreg::DS].present());
        }
        // Also with a 32-bit operand.
        let (mut cpu, mut mem) = machine(true, 0);
        push(&mem, Bits32, &[TARGET, 8, IMAGE, 0x1238, 0]);
        iret(&mut cpu, &mut mem, Bits32).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[reg::RSP]), (TARGET, 0x1238));
    }

    #[test]
    fn long_mode_faults() {
        let noncanonical = 1 << 47;
        for (frame, expected) in [
            ([TARGET, 0, IMAGE, 0, 0x23], Exception::gp(0)),
            ([TARGET, 3, IMAGE, 0, 0x23], Exception::gp(0)),
            ([TARGET, 0x203, IMAGE, 0, 0x23], Exception::gp(0x200)),
            ([TARGET, 0x23, IMAGE, 0, 0x23], Exception::gp(0x20)),
            ([TARGET, 0x0b, IMAGE, 0, 0x23], Exception::gp(0x08)),
            ([TARGET, 0x18, IMAGE, 0, 0x23], Exception::gp(0x18)),
            ([TARGET, 0xa0, IMAGE, 0, 0], Exception::gp(0xa0)),
            ([TARGET, 0x48, IMAGE, 0, 0], Exception::np(0x48)),
            ([TARGET, 0x1b, IMAGE, 0, 0], Exception::gp(0)),
            ([TARGET, 0x1b, IMAGE, 0, 3], Exception::gp(0)),
            ([TARGET, 0x08, IMAGE, 0, 3], Exception::gp(0)),
            ([TARGET, 0x3b, IMAGE, 0, 3], Exception::gp(0)),
            ([TARGET, 0x1b, IMAGE, 0, 0x20], Exception::gp(0x20)),
            ([TARGET, 0x1b, IMAGE, 0, 0x13], Exception::gp(0x10)),
            ([TARGET, 0x1b, IMAGE, 0, 0x5b], Exception::gp(0x58)),
            ([TARGET, 0x1b, IMAGE, 0, 0x53], Exception::ss(0x50)),
            ([TARGET, 0x1b, IMAGE, 0, 0x203], Exception::gp(0x200)),
            ([noncanonical, 0x1b, IMAGE, 0, 0x23], Exception::gp(0)),
            ([1 << 32, 0x3b, IMAGE, 0, 0x23], Exception::gp(0)),
        ] {
            let (cpu, mut mem) = machine(true, 0);
            push(&mem, Bits64, &frame);
            println!("{frame:x?}");
            refused(&cpu, &mut mem, expected, |cpu, mem| iret(cpu, mem, Bits64));
        }
        // To an inner level.
        let (cpu, mut mem) = machine(true, 3);
        push(&mem, Bits64, &[TARGET, 8, IMAGE, 0, 0x10]);
        refused(&cpu, &mut mem, Exception::gp(8), |cpu, mem| iret(cpu, mem, Bits64));
        let (mut cpu, mut mem) = machine(true, 0);
        cpu.rflags |= flags::NT;
        refused(&cpu, &mut mem, Exception::gp(0), |cpu, mem| iret(cpu, mem, Bits64));
        cpu.rflags = flags::FIXED;
        cpu.gpr[reg::RSP] = 1 << 47;
        refused(&cpu, &mut mem, Exception::ss(0), |cpu, mem| iret(cpu, mem, Bits64));
    }

    #[test]
    fn a_fault_unmasks_nmis_and_nothing_else() {
        let (mut cpu, mut mem) = machine(true, 0);
        cpu.nmi_masked = 1;
        mem.faulting = Some(STACK..STACK + 8);
        let mut after = cpu.clone();
        assert_eq!(iret(&mut after, &mut mem, Bits64), Err(Exception::pf(STACK, 0)));
        cpu.nmi_masked = 0;
        assert_eq!(after, cpu);
    }

    #[test]
    fn flags_follow_the_old_level() {
        let (mut cpu, mut mem) = machine(true, 3);
        cpu.rflags = flags::FIXED | flags::IF;
        let frame = [TARGET, 0x1b, flags::IOPL | flags::CF, STACK, 0x23];
        push(&mem, Bits64, &frame);
        iret(&mut cpu, &mut mem, Bits64).unwrap();
        assert_eq!(cpu.rflags, flags::FIXED | flags::IF | flags::CF);
        let (mut cpu, mut mem) = machine(true, 0);
        push(&mem, Bits64, &frame);
        iret(&mut cpu, &mut mem, Bits64).unwrap();
        assert_eq!(cpu.rflags, flags::FIXED | flags::IOPL | flags::CF);
    }

    #[test]
    fn legacy() {
        let (mut cpu, mut mem) = machine(false, 0);
        push(&mem, Bits32, &[TARGET, 8, IMAGE]);
        iret(&mut cpu, &mut mem, Bits32).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[reg::RSP], cpu.cpl()), (TARGET, STACK + 12, 0));
        let (mut cpu, mut mem) = machine(false, 0);
        push(&mem, Bits32, &[TARGET, 0x1b, IMAGE, 0x7000, 0x23]);
        iret(&mut cpu, &mut mem, Bits32).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[reg::RSP], cpu.cpl()), (TARGET, 0x7000, 3));
        assert!(!cpu.seg[sreg::ES].present());
        // A 16-bit stack keeps the upper half of ESP.
        let (mut cpu, mut mem) = machine(false, 0);
        push(&mem, Bits32, &[TARGET, 0x1b, IMAGE, 0x5_7000, u64::from(sel::STACK16_3)]);
        let frame: [u8; 20] = mem.get(STACK);
        mem.put(STACK + 0x1_0000, frame);
        cpu.gpr[reg::RSP] = STACK + 0x1_0000;
        iret(&mut cpu, &mut mem, Bits32).unwrap();
        assert_eq!(cpu.gpr[reg::RSP], 0x1_7000);
        // 16 bits.
        let (mut cpu, mut mem) = machine(false, 0);
        cpu.rflags |= flags::AC;
        push(&mem, Bits16, &[0x5678, 8, IMAGE]);
        iret(&mut cpu, &mut mem, Bits16).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[reg::RSP]), (0x5678, STACK + 6));
        assert_eq!(cpu.rflags, IMAGE | flags::AC);
    }

    #[test]
    fn to_virtual_8086_mode_and_back() {
        let (mut cpu, mut mem) = machine(false, 0);
        let frame = [0x5678, 0x900, IMAGE | flags::VM, 0x7000, 0x800, 0x100, 0x200, 0x300, 0x400];
        push(&mem, Bits32, &frame);
        iret(&mut cpu, &mut mem, Bits32).unwrap();
        assert!(cpu.virtual_8086() && cpu.real_segments());
        assert_eq!((cpu.cpl(), cpu.code_size(), cpu.rip), (3, CodeSize::Bits16, 0x5678));
        assert_eq!((cpu.gpr[reg::RSP], cpu.rflags), (0x7000, IMAGE | flags::VM));
        for (register, selector) in [
            (sreg::CS, 0x900),
            (sreg::SS, 0x800),
            (sreg::ES, 0x100),
            (sreg::DS, 0x200),
            (sreg::FS, 0x300),
            (sreg::GS, 0x400),
        ] {
            assert_eq!(cpu.seg[register], Segment::virtual_8086(selector));
            assert_eq!(cpu.seg[register].base, u64::from(selector) << 4);
        }
        // Back through the IRET of that mode, which needs IOPL 3 and changes neither VM nor IOPL.
        mem.put(0x8000 + 0x7000, [0x34, 0x12, 0x00, 0x0a, 0x03, 0x00]);
        refused(&cpu, &mut mem, Exception::gp(0), |cpu, mem| iret(cpu, mem, Bits16));
        cpu.rflags |= flags::IOPL;
        iret(&mut cpu, &mut mem, Bits16).unwrap();
        assert_eq!((cpu.rip, cpu.seg[sreg::CS].base), (0x1234, 0xa000));
        let expected = flags::FIXED | flags::CF | flags::IOPL | flags::VM;
        assert_eq!(cpu.rflags, expected);
        // A 16-bit frame, and the outer levels, go to protected mode.
        let (mut cpu, mut mem) = machine(false, 3);
        push(&mem, Bits32, &[TARGET, 0x1b, IMAGE | flags::VM]);
        iret(&mut cpu, &mut mem, Bits32).unwrap();
        assert!(!cpu.virtual_8086());
    }

    #[test]
    fn legacy_refusals() {
        let (mut cpu, mut mem) = machine(false, 0);
        push(&mem, Bits32, &[0x1_0000, 8, IMAGE | flags::VM, 0, 0, 0, 0, 0, 0]);
        refused(&cpu, &mut mem, Exception::gp(0), |cpu, mem| iret(cpu, mem, Bits32));
        cpu.rflags |= flags::NT;
        refused(&cpu, &mut mem, Exception::ts(0), |cpu, mem| iret(cpu, mem, Bits32));
        let (mut cpu, mut mem) = machine(false, 0);
        push(&mem, Bits32, &[TARGET, 0x1b, IMAGE, 0x7000, 0]);
        refused(&cpu, &mut mem, Exception::gp(0), |cpu, mem| iret(cpu, mem, Bits32));
        cpu.seg[sreg::SS].limit = STACK as u32 + 10;
        refused(&cpu, &mut mem, Exception::ss(0), |cpu, mem| iret(cpu, mem, Bits32));
        let (cpu, mut mem) = machine(false, 0);
        mem.put64(GDT + 8, 0x0040_9b00_0000_ffff);
        push(&mem, Bits32, &[0x1_0000, 8, IMAGE]);
        refused(&cpu, &mut mem, Exception::gp(0), |cpu, mem| iret(cpu, mem, Bits32));
    }

    #[test]
    fn real_mode() {
        let (mut cpu, mut mem) = (real(), Flat::new());
        push(&mem, Bits16, &[0x5678, 0x800, IMAGE]);
        iret(&mut cpu, &mut mem, Bits16).unwrap();
        assert_eq!((cpu.rip, cpu.seg[sreg::CS].base), (0x5678, 0x8000));
        assert_eq!((cpu.gpr[reg::RSP], cpu.rflags), (STACK + 6, IMAGE));
        let mut cpu = real();
        push(&mem, Bits32, &[0x5678, 0xffff_0800, IMAGE | flags::AC | flags::VIF]);
        iret(&mut cpu, &mut mem, Bits32).unwrap();
        assert_eq!((cpu.seg[sreg::CS].selector, cpu.rflags), (0x800, IMAGE | flags::AC));
        let cpu = real();
        push(&mem, Bits32, &[0x1_0000, 0x800, IMAGE]);
        refused(&cpu, &mut mem, Exception::gp(0), |cpu, mem| iret(cpu, mem, Bits32));
    }
}

mod transfers {
    use super::{
        Bits16, Bits32, Bits64, CodeSize, CpuState, Exception, Flat, GDT, RSP0, STACK, TARGET, TSS,
        far_call, far_jump, far_ret, gate, machine, push, real, refused, reg, sel, sreg,
    };

    #[test]
    fn jump_matrix() {
        // Long mode, CPL, selector, outcome.
        for (is_long, cpl, selector, expected) in [
            (true, 0, sel::CODE0, None),
            (true, 0, sel::CODE0 | 3, Some(Exception::gp(8))),
            (true, 3, sel::CODE0, Some(Exception::gp(8))),
            (true, 3, sel::CODE3, None),
            (true, 3, sel::CODE3 & !3, None),
            (true, 3, sel::OTHER3, None),
            (true, 0, sel::CODE3, Some(Exception::gp(0x18))),
            (true, 0, sel::CONFORMING0 | 3, None),
            (true, 3, sel::CONFORMING0, None),
            (true, 0, sel::DATA0, Some(Exception::gp(0x10))),
            (true, 0, sel::TSS, Some(Exception::gp(0x28))),
            (true, 0, sel::ABSENT0, Some(Exception::np(0x48))),
            (true, 0, sel::BOTH_SIZES0, Some(Exception::gp(0xa0))),
            (true, 0, 0, Some(Exception::gp(0))),
            (true, 0, sel::OUTSIDE, Some(Exception::gp(0x200))),
            (false, 0, sel::CODE0, None),
            (false, 3, sel::CODE3, None),
        ] {
            let (mut cpu, mut mem) = machine(is_long, cpl);
            let before = cpu.clone();
            let result = far_jump(&mut cpu, &mut mem, selector, TARGET, Bits32);
            assert_eq!(result.err(), expected, "{selector:#x} at CPL {cpl}, long {is_long}");
            if expected.is_none() {
                assert_eq!((cpu.rip, cpu.cpl()), (TARGET, cpl));
                assert_eq!(cpu.seg[sreg::CS].selector, selector & !3 | u16::from(cpl));
            } else {
                assert_eq!(cpu, before);
            }
        }
    }

    #[test]
    fn mode_switches_by_jump() {
        let mut cpu = real();
        far_jump(&mut cpu, &mut Flat::new(), 0x900, 0xffff_1234, Bits16).unwrap();
        assert_eq!((cpu.rip, cpu.seg[sreg::CS].base), (0x1234, 0x9000));
        refused(&real(), &mut Flat::new(), Exception::gp(0), |cpu, mem| {
            far_jump(cpu, mem, 0x900, 0x1_1234, Bits32)
        });
        // Protected mode just entered: CS still as in real mode, CPL 0.
        let (_, mut mem) = machine(false, 0);
        cpu.cr0 |= 1;
        assert_eq!(cpu.cpl(), 0);
        far_jump(&mut cpu, &mut mem, sel::CODE0, TARGET, Bits32).unwrap();
        assert_eq!((cpu.code_size(), cpu.rip), (CodeSize::Bits32, TARGET));
        // Compatibility mode into 64-bit mode.
        let (mut cpu, mut mem) = machine(true, 0);
        cpu.seg[sreg::CS].attr = 0xc09b;
        far_jump(&mut cpu, &mut mem, sel::CODE0, TARGET, Bits32).unwrap();
        assert_eq!(cpu.code_size(), CodeSize::Bits64);
        refused(&cpu, &mut mem, Exception::gp(0), |cpu, mem| {
            far_jump(cpu, mem, sel::CODE0, 1 << 50, Bits64)
        });
    }

    #[test]
    fn call_and_return_within_a_level() {
        for (is_long, size) in [(false, Bits16), (false, Bits32), (true, Bits32), (true, Bits64)] {
            let (mut cpu, mut mem) = machine(is_long, 0);
            let bytes = size.bytes() as u64;
            far_call(&mut cpu, &mut mem, sel::CODE0, 0x5678, size, 0x1240).unwrap();
            assert_eq!((cpu.rip, cpu.gpr[reg::RSP]), (0x5678, STACK - 2 * bytes));
            assert_eq!(mem.get16(STACK - bytes), sel::CODE0);
            far_ret(&mut cpu, &mut mem, size, 16).unwrap();
            assert_eq!((cpu.rip, cpu.gpr[reg::RSP]), (0x1240, STACK + 16));
        }
        let (mut cpu, mut mem) = (real(), Flat::new());
        far_call(&mut cpu, &mut mem, 0x900, 0x5678, Bits16, 0x1240).unwrap();
        assert_eq!((cpu.seg[sreg::CS].base, cpu.gpr[reg::RSP]), (0x9000, STACK - 4));
        far_ret(&mut cpu, &mut mem, Bits16, 2).unwrap();
        assert_eq!((cpu.seg[sreg::CS].base, cpu.rip), (0x7000, 0x1240));
        assert_eq!(cpu.gpr[reg::RSP], STACK + 2);
    }

    #[test]
    fn return_to_an_outer_level() {
        let (mut cpu, mut mem) = machine(false, 0);
        // The parameters lie between the return address and the outer stack pointer.
        push(&mem, Bits32, &[TARGET, 0x1b, 1, 2, 0x7000, 0x23]);
        far_ret(&mut cpu, &mut mem, Bits32, 8).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.gpr[reg::RSP]), (TARGET, 3, 0x7008));
        assert!(!cpu.seg[sreg::DS].present());
        let (mut cpu, mut mem) = machine(true, 0);
        push(&mem, Bits64, &[TARGET, 0x1b, 0x7000, 0x23]);
        far_ret(&mut cpu, &mut mem, Bits64, 0).unwrap();
        assert_eq!((cpu.cpl(), cpu.gpr[reg::RSP]), (3, 0x7000));
        for (frame, expected) in [
            ([TARGET, 0, 0, 0x23], Exception::gp(0)),
            ([TARGET, 0x0b, 0, 0x23], Exception::gp(8)),
            ([TARGET, 0x1b, 0, 0x10], Exception::gp(0x10)),
            ([TARGET, 0x1b, 0, 0], Exception::gp(0)),
            ([TARGET, 0x1b, 0, 0x53], Exception::ss(0x50)),
            ([1 << 47, 0x1b, 0, 0x23], Exception::gp(0)),
        ] {
            let (cpu, mut mem) = machine(true, 0);
            push(&mem, Bits64, &frame);
            refused(&cpu, &mut mem, expected, |cpu, mem| far_ret(cpu, mem, Bits64, 0));
        }
        let (cpu, mut mem) = machine(true, 3);
        push(&mem, Bits64, &[TARGET, 8]);
        refused(&cpu, &mut mem, Exception::gp(8), |cpu, mem| far_ret(cpu, mem, Bits64, 0));
    }

    fn put_gate(mem: &Flat, selector: u16, halves: [u64; 2]) {
        mem.put64(GDT + u64::from(selector & 0xfff8), halves[0]);
        mem.put64(GDT + u64::from(selector & 0xfff8) + 8, halves[1]);
    }

    #[test]
    fn call_gate_to_an_inner_level_copies_parameters() {
        let (mut cpu, mut mem) = machine(false, 3);
        put_gate(&mem, sel::GATE3, gate(sel::CODE0, TARGET, 0xec, 2));
        push(&mem, Bits32, &[0x11, 0x22]);
        far_call(&mut cpu, &mut mem, sel::GATE3, 0xdead, Bits32, 0x1240).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.gpr[reg::RSP]), (TARGET, 0, RSP0 - 24));
        let frame: [u32; 6] = std::array::from_fn(|i| mem.get32(RSP0 - 24 + i as u64 * 4));
        assert_eq!(frame, [0x1240, 0x1b, 0x11, 0x22, STACK as u32, 0x23]);
        assert_eq!(cpu.seg[sreg::SS].selector, sel::DATA0);
        far_ret(&mut cpu, &mut mem, Bits32, 8).unwrap();
        assert_eq!((cpu.rip, cpu.cpl(), cpu.gpr[reg::RSP]), (0x1240, 3, STACK + 8));
    }

    #[test]
    fn sixteen_bit_call_gate() {
        let (mut cpu, mut mem) = machine(false, 3);
        put_gate(&mem, sel::GATE3, gate(sel::CODE0, 0xffff_5678, 0xe4, 1));
        push(&mem, Bits16, &[0x11]);
        far_call(&mut cpu, &mut mem, sel::GATE3, 0, Bits32, 0x1240).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[reg::RSP]), (0x5678, RSP0 - 10));
        let frame: [u16; 5] = std::array::from_fn(|i| mem.get16(RSP0 - 10 + i as u64 * 2));
        assert_eq!(frame, [0x1240, 0x1b, 0x11, STACK as u16, 0x23]);
    }

    #[test]
    fn long_mode_call_gate() {
        let (mut cpu, mut mem) = machine(true, 3);
        put_gate(&mem, sel::GATE3, gate(sel::CODE0, 0xffff_8000_0000_5678, 0xec, 0));
        far_call(&mut cpu, &mut mem, sel::GATE3, 0, Bits32, 0x1240).unwrap();
        assert_eq!((cpu.rip, cpu.cpl()), (0xffff_8000_0000_5678, 0));
        assert_eq!((cpu.gpr[reg::RSP], cpu.seg[sreg::SS].selector), (RSP0 - 32, 0));
        let frame: [u64; 4] = std::array::from_fn(|i| mem.get64(RSP0 - 32 + i as u64 * 8));
        assert_eq!(frame, [0x1240, 0x1b, STACK, 0x23]);
    }

    #[test]
    fn gate_checks() {
        let code = u32::from(sel::GATE3 & !3);
        for (cpl, selector, halves, expected) in [
            (3, sel::GATE3, gate(sel::CODE0, TARGET, 0x8c, 0), Exception::gp(code)),
            (0, sel::GATE3, gate(sel::CODE0, TARGET, 0x8c, 0), Exception::gp(code)),
            (3, sel::GATE3, gate(sel::CODE0, TARGET, 0x6c, 0), Exception::np(code)),
            (3, sel::GATE3, gate(0, TARGET, 0xec, 0), Exception::gp(0)),
            (3, sel::GATE3, gate(sel::DATA0, TARGET, 0xec, 0), Exception::gp(0x10)),
            (3, sel::GATE3, gate(sel::OTHER3, TARGET, 0xec, 0), Exception::gp(0x38)),
            (3, sel::GATE3, gate(sel::ABSENT0, TARGET, 0xec, 0), Exception::np(0x48)),
            (3, sel::GATE3, gate(sel::OUTSIDE, TARGET, 0xec, 0), Exception::gp(0x200)),
            (3, sel::GATE3, gate(sel::CODE0, 1 << 47, 0xec, 0), Exception::gp(0)),
            (3, sel::GATE3, gate(sel::CODE0, TARGET, 0xe4, 0), Exception::gp(code)),
            (0, sel::GATE0, gate(sel::CODE3, TARGET, 0x8c, 0), Exception::gp(0x18)),
        ] {
            let (cpu, mut mem) = machine(true, cpl);
            put_gate(&mem, selector, halves);
            println!("{cpl} {halves:x?}");
            refused(&cpu, &mut mem, expected, |cpu, mem| {
                far_call(cpu, mem, selector, 0, Bits32, 0x1240)
            });
        }
        // A jump through a gate stays in its level.
        let (cpu, mut mem) = machine(true, 3);
        put_gate(&mem, sel::GATE3, gate(sel::CODE0, TARGET, 0xec, 0));
        refused(&cpu, &mut mem, Exception::gp(8), |cpu, mem| {
            far_jump(cpu, mem, sel::GATE3, 0, Bits32)
        });
        put_gate(&mem, sel::GATE3, gate(sel::CODE3, TARGET, 0xec, 0));
        let mut cpu = cpu;
        far_jump(&mut cpu, &mut mem, sel::GATE3, 0, Bits32).unwrap();
        assert_eq!((cpu.rip, cpu.cpl()), (TARGET, 3));
        // The second half of the gate is beyond the table.
        cpu.gdtr.limit = 0x67;
        refused(&cpu, &mut mem, Exception::gp(code), |cpu, mem| {
            far_jump(cpu, mem, sel::GATE3, 0, Bits32)
        });
    }

    #[test]
    fn inner_call_faults_change_nothing() {
        let (cpu, mut mem) = machine(false, 3);
        put_gate(&mem, sel::GATE3, gate(sel::CODE0, TARGET, 0xec, 2));
        let call =
            |cpu: &mut CpuState, mem: &mut Flat| far_call(cpu, mem, sel::GATE3, 0, Bits32, 0x1240);
        mem.faulting = Some(RSP0 - 8..RSP0);
        refused(&cpu, &mut mem, Exception::pf(RSP0 - 8, 2), call);
        mem.faulting = Some(STACK..STACK + 8);
        refused(&cpu, &mut mem, Exception::pf(STACK, 0), call);
        mem.faulting = None;
        mem.put(TSS + 8, sel::DATA3.to_le_bytes());
        refused(&cpu, &mut mem, Exception::ts(0x20), call);
        let (cpu, mut mem) = machine(true, 3);
        put_gate(&mem, sel::GATE3, gate(sel::CODE0, TARGET, 0xec, 0));
        mem.put64(TSS + 4, 1 << 47 | 0x100);
        refused(&cpu, &mut mem, Exception::ss(0), call);
    }
}
