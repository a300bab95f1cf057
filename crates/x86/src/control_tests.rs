//! Control, debug and extended control registers: every #GP rule and what must be flushed.

use super::{
    CrEffect, Flush, Invpcid, clts, lmsw, mov_from_dr, mov_to_cr0, mov_to_cr3, mov_to_cr4,
    mov_to_dr, umip, xgetbv, xsetbv,
};
use crate::fake::{Flat, long, protected, real};
use crate::state::{CpuState, Exception, cr0, cr4, efer, sreg};

const GP: Exception = Exception::gp(0);

/// A write fails with #GP(0) and changes nothing.
fn refused(
    cpu: &CpuState,
    write: impl FnOnce(&mut CpuState, &Flat) -> Result<CrEffect, Exception>,
) {
    refused_in(cpu, &Flat::new(), write);
}

fn refused_in(
    cpu: &CpuState,
    mem: &Flat,
    write: impl FnOnce(&mut CpuState, &Flat) -> Result<CrEffect, Exception>,
) {
    let mut after = cpu.clone();
    assert_eq!(write(&mut after, mem), Err(GP));
    assert_eq!(&after, cpu);
}

#[test]
fn cr0_rules() {
    let mem = Flat::new();
    for value in [1 << 32, cr0::PG, cr0::NW, cr0::NW | cr0::PE, cr0::PG | cr0::PE | cr0::NW] {
        refused(&real(), |cpu, mem| mov_to_cr0(cpu, mem, value));
    }
    refused(&protected(3), |cpu, mem| mov_to_cr0(cpu, mem, cr0::PE));
    let mut cpu = real();
    let effect = mov_to_cr0(&mut cpu, &mem, cr0::PE | 1 << 10).unwrap();
    assert_eq!(cpu.cr0, cr0::PE | cr0::ET, "ET is one, undefined bits stay zero");
    assert!(effect.mode_changed);
    assert_eq!((effect.flush, effect.changed & cr0::PE), (Flush::All, cr0::PE));
    for (bit, flush) in [
        (cr0::TS, Flush::None),
        (cr0::MP, Flush::None),
        (cr0::NE, Flush::None),
        (cr0::AM, Flush::None),
        (cr0::WP, Flush::All),
    ] {
        let mut cpu = protected(0);
        let value = cpu.cr0 | bit;
        let effect = mov_to_cr0(&mut cpu, &mem, value).unwrap();
        assert_eq!(effect, CrEffect { flush, mode_changed: false, changed: bit });
    }
}

#[test]
fn entering_and_leaving_long_mode() {
    let mem = Flat::new();
    let mut cpu = protected(0);
    cpu.efer = efer::LME;
    let on = cpu.cr0 | cr0::PG;
    refused(&cpu, |cpu, mem| mov_to_cr0(cpu, mem, on));
    cpu.cr4 = cr4::PAE;
    let mut wrong = cpu.clone();
    wrong.seg[sreg::CS].attr = 0xa09b;
    refused(&wrong, |cpu, mem| mov_to_cr0(cpu, mem, on));
    let mut wrong = cpu.clone();
    wrong.tr.attr = 0x83;
    refused(&wrong, |cpu, mem| mov_to_cr0(cpu, mem, on));
    let effect = mov_to_cr0(&mut cpu, &mem, on).unwrap();
    assert!(cpu.long_mode() && effect.mode_changed);
    // Off again: from compatibility mode only, and without PCIDE.
    let off = on & !cr0::PG;
    let mut wrong = cpu.clone();
    wrong.seg[sreg::CS].attr = 0xa09b;
    refused(&wrong, |cpu, mem| mov_to_cr0(cpu, mem, off));
    let mut wrong = cpu.clone();
    wrong.cr4 |= cr4::PCIDE;
    refused(&wrong, |cpu, mem| mov_to_cr0(cpu, mem, off));
    mov_to_cr0(&mut cpu, &mem, off).unwrap();
    assert_eq!((cpu.long_mode(), cpu.efer), (false, efer::LME));
}

#[test]
fn pdptes_are_loaded_in_pae_mode() {
    let mem = Flat::new();
    mem.put64(0x8000, 0x9001);
    mem.put64(0x8020, 0x9007);
    let mut cpu = protected(0);
    cpu.cr4 = cr4::PAE;
    cpu.cr3 = 0x8000;
    let on = cpu.cr0 | cr0::PG;
    let mut wrong = cpu.clone();
    wrong.cr3 = 0x8020;
    refused_in(&wrong, &mem, |cpu, mem| mov_to_cr0(cpu, mem, on));
    mov_to_cr0(&mut cpu, &mem, on).unwrap();
    assert_eq!(cpu.pdpte, [0x9001, 0, 0, 0]);
    refused_in(&cpu, &mem, |cpu, mem| mov_to_cr3(cpu, mem, 0x8020));
    mem.put64(0x8020, 0xa001);
    mov_to_cr3(&mut cpu, &mem, 0x8020).unwrap();
    assert_eq!((cpu.cr3, cpu.pdpte), (0x8020, [0xa001, 0, 0, 0]));
    mem.put64(0x8020, 0xb001);
    mov_to_cr4(&mut cpu, &mem, cr4::PAE | cr4::DE).unwrap();
    assert_eq!(cpu.pdpte[0], 0xa001, "DE does not reload");
    mov_to_cr4(&mut cpu, &mem, cr4::PAE | cr4::PGE).unwrap();
    assert_eq!(cpu.pdpte[0], 0xb001);
    mem.put64(0x8020, 0xb003);
    refused_in(&cpu, &mem, |cpu, mem| mov_to_cr4(cpu, mem, cr4::PAE));
}

#[test]
fn cr3_and_pcids() {
    let mem = Flat::new();
    let mut cpu = long(0);
    for value in [1 << 46, 1 << 51, 1 << 62, 1 << 63] {
        refused(&cpu, |cpu, mem| mov_to_cr3(cpu, mem, value));
    }
    refused(&long(3), |cpu, mem| mov_to_cr3(cpu, mem, 0));
    assert_eq!(mov_to_cr3(&mut cpu, &mem, 0x5fff).unwrap().flush, Flush::Pcid(0));
    cpu.cr4 |= cr4::PCIDE;
    assert_eq!(mov_to_cr3(&mut cpu, &mem, 0x5123).unwrap().flush, Flush::Pcid(0x123));
    let effect = mov_to_cr3(&mut cpu, &mem, 0x6123 | 1 << 63).unwrap();
    assert_eq!((effect.flush, cpu.cr3), (Flush::None, 0x6123));
    refused(&cpu, |cpu, mem| mov_to_cr3(cpu, mem, 1 << 63 | 1 << 62));
    let mut cpu = protected(0);
    mov_to_cr3(&mut cpu, &mem, 0x1_2345_6000).unwrap();
    assert_eq!(cpu.cr3, 0x2345_6000);
}

#[test]
fn cr4_rules() {
    let mem = Flat::new();
    let base = long(0).cr4;
    for bit in [0, 1, 12, 13, 14, 15, 19, 22, 23, 24, 32, 63] {
        refused(&long(0), |cpu, mem| mov_to_cr4(cpu, mem, base | 1 << bit));
    }
    refused(&long(3), |cpu, mem| mov_to_cr4(cpu, mem, base));
    refused(&long(0), |cpu, mem| mov_to_cr4(cpu, mem, 0));
    refused(&protected(0), |cpu, mem| mov_to_cr4(cpu, mem, cr4::PCIDE | cr4::PAE));
    let mut cpu = long(0);
    cpu.cr3 = 0x5001;
    refused(&cpu, |cpu, mem| mov_to_cr4(cpu, mem, base | cr4::PCIDE));
    for (bit, set, clear) in [
        (cr4::PCIDE, Flush::None, Flush::All),
        (cr4::PGE, Flush::All, Flush::All),
        (cr4::PSE, Flush::All, Flush::All),
        (cr4::SMEP, Flush::All, Flush::All),
        (cr4::SMAP, Flush::All, Flush::All),
        (cr4::OSFXSR, Flush::None, Flush::None),
        (cr4::OSXSAVE, Flush::None, Flush::None),
        (cr4::FSGSBASE, Flush::None, Flush::None),
        (cr4::UMIP, Flush::None, Flush::None),
        (cr4::TSD, Flush::None, Flush::None),
    ] {
        let mut cpu = long(0);
        let effect = mov_to_cr4(&mut cpu, &mem, base | bit).unwrap();
        assert_eq!((effect.flush, effect.changed), (set, bit), "set {bit:#x}");
        assert_eq!(mov_to_cr4(&mut cpu, &mem, base).unwrap().flush, clear, "clear {bit:#x}");
    }
}

#[test]
fn lmsw_clts_and_umip() {
    let mem = Flat::new();
    let mut cpu = real();
    lmsw(&mut cpu, &mem, 0xffff).unwrap();
    assert_eq!(cpu.cr0 & 0xffff, 0x1f);
    lmsw(&mut cpu, &mem, 0).unwrap();
    assert_eq!(cpu.cr0 & 0xf, cr0::PE, "PE cannot be cleared");
    refused(&protected(1), |cpu, mem| lmsw(cpu, mem, 1));
    cpu.cr0 |= cr0::TS;
    clts(&mut cpu).unwrap();
    assert_eq!(cpu.cr0 & cr0::TS, 0);
    assert_eq!(clts(&mut protected(3)), Err(GP));
    for (cpl, on, expected) in [(0, true, Ok(())), (3, false, Ok(())), (3, true, Err(GP))] {
        let mut cpu = protected(cpl);
        cpu.cr4 = if on { cr4::UMIP } else { 0 };
        assert_eq!(umip(&cpu), expected);
    }
}

#[test]
fn debug_registers() {
    let mut cpu = long(0);
    mov_to_dr(&mut cpu, 2, 0x1234_5678_9abc).unwrap();
    assert_eq!(mov_from_dr(&cpu, 2), Ok(0x1234_5678_9abc));
    mov_to_dr(&mut cpu, 6, 0xffff_ffff).unwrap();
    assert_eq!(cpu.dr6, 0xffff_efff);
    mov_to_dr(&mut cpu, 4, 0).unwrap();
    assert_eq!(mov_from_dr(&cpu, 6), Ok(0xffff_0ff0), "DR4 is DR6");
    mov_to_dr(&mut cpu, 5, 0xffff_dfff).unwrap();
    assert_eq!(mov_from_dr(&cpu, 7), Ok(0xffff_07ff));
    for number in [6, 7] {
        assert_eq!(mov_to_dr(&mut cpu, number, 1 << 32), Err(GP));
    }
    assert_eq!(mov_to_dr(&mut cpu, 8, 0), Err(Exception::ud()));
    assert_eq!(mov_from_dr(&long(3), 0), Err(GP));
    cpu.cr4 |= cr4::DE;
    assert_eq!(mov_from_dr(&cpu, 4), Err(Exception::ud()));
    mov_to_dr(&mut cpu, 7, 1 << 13).unwrap();
    assert_eq!(mov_from_dr(&cpu, 0), Err(Exception::db(1 << 13)));
    assert_eq!(mov_to_dr(&mut cpu, 0, 0), Err(Exception::db(1 << 13)));
    assert_eq!(mov_to_dr(&mut cpu, 5, 0), Err(Exception::ud()), "#UD comes first");
}

#[test]
fn xcr0_rules() {
    let mut cpu = long(0);
    assert_eq!(xsetbv(&mut cpu, 7, 0, 7), Err(Exception::ud()));
    assert_eq!(xgetbv(&cpu, 0), Err(Exception::ud()));
    cpu.cr4 |= cr4::OSXSAVE;
    for (supported, index, value, good) in [
        (7, 0, 1, true),
        (7, 0, 3, true),
        (7, 0, 7, true),
        (3, 0, 7, false),
        (7, 0, 0, false),
        (7, 0, 2, false),
        (7, 0, 5, false),
        (7, 0, 0xf, false),
        (7, 1, 1, false),
        (0, 0, 1, false),
    ] {
        let result = xsetbv(&mut cpu, supported, index, value);
        assert_eq!(result.is_ok(), good, "{value:#x} of {supported:#x}");
        if good {
            assert_eq!(xgetbv(&cpu, 0), Ok(value));
        } else {
            assert_eq!(result, Err(GP));
        }
    }
    assert_eq!(xgetbv(&cpu, 1), Err(GP));
    let mut cpu = long(3);
    cpu.cr4 |= cr4::OSXSAVE;
    assert_eq!(xsetbv(&mut cpu, 7, 0, 1), Err(GP));
    assert_eq!(xgetbv(&cpu, 0), Ok(1));
}

#[test]
fn invpcid() {
    let descriptor = |low: u64, address: u64| -> [u8; 16] {
        (u128::from(address) << 64 | u128::from(low)).to_le_bytes()
    };
    let mut cpu = long(0);
    let noncanonical = 1 << 47;
    for (pcide, kind, low, address, expected) in [
        (true, 0, 5, 0x7000, Ok(Invpcid::Address { pcid: 5, address: 0x7000 })),
        (true, 0, 5, noncanonical, Err(GP)),
        (true, 1, 5, noncanonical, Ok(Invpcid::Pcid(5))),
        (true, 2, 5, 0, Ok(Invpcid::All)),
        (true, 3, 5, 0, Ok(Invpcid::AllNonGlobal)),
        (true, 4, 0, 0, Err(GP)),
        (true, 1 << 32, 0, 0, Err(GP)),
        (true, 2, 0x1000, 0, Err(GP)),
        (false, 0, 5, 0, Err(GP)),
        (false, 1, 5, 0, Err(GP)),
        (false, 1, 0, 0, Ok(Invpcid::Pcid(0))),
        (false, 2, 5, 0, Ok(Invpcid::All)),
    ] {
        cpu.cr4 = if pcide { cr4::PAE | cr4::PCIDE } else { cr4::PAE };
        let decoded = Invpcid::decode(&cpu, kind, &descriptor(low, address));
        assert_eq!(decoded, expected, "{kind} {low:#x} {address:#x}");
    }
    assert_eq!(Invpcid::decode(&long(3), 2, &[0; 16]), Err(GP));
}
