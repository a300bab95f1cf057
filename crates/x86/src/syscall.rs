//! SYSCALL, SYSRET, SYSENTER and SYSEXIT (Intel SDM vol. 2, the pages of these instructions).
//!
//! Where the vendors differ, both behaviours are offered: SYSCALL from compatibility mode goes to
//! CSTAR (AMD), SYSENTER works in long mode (Intel). SYSCALL outside long mode raises #UD (Intel).
//! SYSRET checks RCX before it leaves CPL 0 (Intel).

use crate::paging::canonical;
use crate::state::{CodeSize, CpuState, Exception, Segment, efer, flags, reg, sreg};

/// RFLAGS bits SYSRET loads from R11: all that exist but RF and VM.
const SYSRET_FLAGS: u64 = 0x3c_7fd7;

const CODE64: u16 = 0xa09b;
const CODE32: u16 = 0xc09b;
const DATA: u16 = 0xc093;

/// A flat segment as these instructions load it, without looking at a descriptor.
const fn flat(selector: u16, attr: u16, dpl: u8) -> Segment {
    Segment {
        base: 0,
        limit: 0xffff_ffff,
        selector: selector & 0xfffc | dpl as u16,
        attr: attr | (dpl as u16) << 5,
    }
}

/// SYSCALL; `next_rip` is the address of the next instruction.
///
/// # Errors
/// #UD when EFER.SCE is clear or long mode is not active.
pub fn syscall(cpu: &mut CpuState, next_rip: u64) -> Result<(), Exception> {
    if cpu.efer & efer::SCE == 0 || !cpu.long_mode() {
        return Err(Exception::ud());
    }
    let target = if cpu.code_size() == CodeSize::Bits64 { cpu.lstar } else { cpu.cstar };
    let selector = (cpu.star >> 32) as u16;
    cpu.gpr[reg::RCX] = next_rip;
    cpu.gpr[11] = cpu.rflags & !flags::RF | flags::FIXED;
    cpu.rflags = cpu.rflags & !cpu.sfmask & !(flags::RF | flags::VM) | flags::FIXED;
    cpu.rip = target;
    cpu.seg[sreg::CS] = flat(selector, CODE64, 0);
    cpu.seg[sreg::SS] = flat(selector.wrapping_add(8), DATA, 0);
    Ok(())
}

/// SYSRET, to 64-bit mode (`opsize64`) or compatibility mode.
///
/// # Errors
/// #UD when EFER.SCE is clear or outside 64-bit mode; #GP(0) when CPL is not 0 or RCX is not
/// canonical.
pub fn sysret(cpu: &mut CpuState, opsize64: bool) -> Result<(), Exception> {
    if cpu.efer & efer::SCE == 0 || cpu.code_size() != CodeSize::Bits64 {
        return Err(Exception::ud());
    }
    let rcx = cpu.gpr[reg::RCX];
    if cpu.cpl() != 0 || (opsize64 && !canonical(rcx)) {
        return Err(Exception::gp(0));
    }
    let selector = (cpu.star >> 48) as u16;
    if opsize64 {
        cpu.rip = rcx;
        cpu.seg[sreg::CS] = flat(selector.wrapping_add(16), CODE64, 3);
    } else {
        cpu.rip = rcx & 0xffff_ffff;
        cpu.seg[sreg::CS] = flat(selector, CODE32, 3);
    }
    cpu.seg[sreg::SS] = flat(selector.wrapping_add(8), DATA, 3);
    cpu.rflags = cpu.gpr[11] & SYSRET_FLAGS | flags::FIXED;
    Ok(())
}

/// SYSENTER.
///
/// # Errors
/// #GP(0) in real mode or when IA32_SYSENTER_CS holds a null selector.
pub fn sysenter(cpu: &mut CpuState) -> Result<(), Exception> {
    let selector = cpu.sysenter_cs as u16;
    if !cpu.protected() || selector & 0xfffc == 0 {
        return Err(Exception::gp(0));
    }
    let long = cpu.long_mode();
    let keep = if long { u64::MAX } else { 0xffff_ffff };
    cpu.rflags &= !(flags::VM | flags::IF);
    cpu.gpr[reg::RSP] = cpu.sysenter_esp & keep;
    cpu.rip = cpu.sysenter_eip & keep;
    cpu.seg[sreg::CS] = flat(selector, if long { CODE64 } else { CODE32 }, 0);
    cpu.seg[sreg::SS] = flat(selector.wrapping_add(8), DATA, 0);
    Ok(())
}

/// SYSEXIT, to 64-bit mode (`opsize64`, REX.W) or 32-bit code.
///
/// # Errors
/// #GP(0) in real mode, when IA32_SYSENTER_CS holds a null selector, CPL is not 0, or RCX or RDX is
/// not canonical.
pub fn sysexit(cpu: &mut CpuState, opsize64: bool) -> Result<(), Exception> {
    let selector = cpu.sysenter_cs as u16;
    if !cpu.protected() || selector & 0xfffc == 0 || cpu.cpl() != 0 {
        return Err(Exception::gp(0));
    }
    let (rsp, rip) = (cpu.gpr[reg::RCX], cpu.gpr[reg::RDX]);
    if opsize64 {
        if !canonical(rsp) || !canonical(rip) {
            return Err(Exception::gp(0));
        }
        cpu.gpr[reg::RSP] = rsp;
        cpu.rip = rip;
        cpu.seg[sreg::CS] = flat(selector.wrapping_add(32), CODE64, 3);
        cpu.seg[sreg::SS] = flat(selector.wrapping_add(40), DATA, 3);
    } else {
        cpu.gpr[reg::RSP] = rsp & 0xffff_ffff;
        cpu.rip = rip & 0xffff_ffff;
        cpu.seg[sreg::CS] = flat(selector.wrapping_add(16), CODE32, 3);
        cpu.seg[sreg::SS] = flat(selector.wrapping_add(24), DATA, 3);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{syscall, sysenter, sysexit, sysret};
    use crate::fake::{long, protected, real};
    use crate::state::{CodeSize, CpuState, Exception, Segment, efer, flags, reg, sreg};

    const RIP: u64 = 0xffff_8000_0000_1000;

    fn ready(cpl: u8) -> CpuState {
        let mut cpu = long(cpl);
        cpu.efer |= efer::SCE;
        cpu.star = 0x0023_0010_0000_0000;
        cpu.lstar = RIP;
        cpu.cstar = RIP + 0x100;
        cpu.sfmask = flags::IF | flags::TF;
        cpu
    }

    #[test]
    fn syscall_loads_kernel_segments_and_masks_flags() {
        let mut cpu = ready(3);
        cpu.rflags = flags::FIXED | flags::IF | flags::CF | flags::RF;
        syscall(&mut cpu, 0x40_0002).unwrap();
        assert_eq!((cpu.rip, cpu.gpr[reg::RCX]), (RIP, 0x40_0002));
        assert_eq!(cpu.gpr[11], flags::FIXED | flags::IF | flags::CF);
        assert_eq!(cpu.rflags, flags::FIXED | flags::CF);
        assert_eq!((cpu.cpl(), cpu.code_size()), (0, CodeSize::Bits64));
        assert_eq!((cpu.seg[sreg::CS].selector, cpu.seg[sreg::SS].selector), (0x10, 0x18));
    }

    #[test]
    fn syscall_from_compatibility_mode_goes_to_cstar() {
        let mut cpu = ready(3);
        cpu.seg[sreg::CS].attr = cpu.seg[sreg::CS].attr & !Segment::L | Segment::DB;
        syscall(&mut cpu, 7).unwrap();
        assert_eq!(cpu.rip, RIP + 0x100);
        assert_eq!(cpu.code_size(), CodeSize::Bits64);
    }

    #[test]
    fn syscall_needs_sce_and_long_mode() {
        let mut cpu = long(3);
        assert_eq!(syscall(&mut cpu, 0), Err(Exception::ud()));
        assert_eq!(sysret(&mut cpu, true), Err(Exception::ud()));
        let mut cpu = protected(3);
        cpu.efer = efer::SCE;
        assert_eq!(syscall(&mut cpu, 0), Err(Exception::ud()));
        assert_eq!(sysret(&mut cpu, false), Err(Exception::ud()));
    }

    #[test]
    fn sysret_returns_to_either_mode() {
        let mut cpu = ready(0);
        cpu.gpr[reg::RCX] = 0x1_2345_6789;
        cpu.gpr[11] = u64::MAX;
        sysret(&mut cpu, true).unwrap();
        assert_eq!((cpu.cpl(), cpu.code_size(), cpu.rip), (3, CodeSize::Bits64, 0x1_2345_6789));
        assert_eq!((cpu.seg[sreg::CS].selector, cpu.seg[sreg::SS].selector), (0x33, 0x2b));
        assert_eq!(cpu.rflags, 0x3c_7fd7);
        let mut cpu = ready(0);
        cpu.gpr[reg::RCX] = 0x1_2345_6789;
        sysret(&mut cpu, false).unwrap();
        assert_eq!((cpu.cpl(), cpu.code_size(), cpu.rip), (3, CodeSize::Bits32, 0x2345_6789));
        assert_eq!(cpu.seg[sreg::CS].selector, 0x23);
    }

    #[test]
    fn sysret_refuses_before_leaving_cpl_0() {
        let mut cpu = ready(0);
        cpu.gpr[reg::RCX] = 1 << 47;
        let before = cpu.clone();
        assert_eq!(sysret(&mut cpu, true), Err(Exception::gp(0)));
        assert_eq!(cpu, before);
        assert!(sysret(&mut cpu, false).is_ok(), "the high half is not used");
        assert_eq!(sysret(&mut ready(3), true), Err(Exception::gp(0)));
    }

    #[test]
    fn sysenter_and_sysexit() {
        let mut cpu = protected(3);
        assert_eq!(sysenter(&mut cpu), Err(Exception::gp(0)));
        assert_eq!(sysenter(&mut real()), Err(Exception::gp(0)));
        cpu.sysenter_cs = 0x10;
        cpu.sysenter_esp = 0xdead_0000_1000;
        cpu.sysenter_eip = 0x2000;
        cpu.rflags |= flags::IF;
        assert_eq!(sysexit(&mut cpu, false), Err(Exception::gp(0)), "CPL 3");
        sysenter(&mut cpu).unwrap();
        assert_eq!((cpu.cpl(), cpu.rip, cpu.gpr[reg::RSP]), (0, 0x2000, 0x1000));
        assert_eq!(cpu.rflags & flags::IF, 0);
        assert_eq!(cpu.code_size(), CodeSize::Bits32);
        cpu.gpr[reg::RCX] = 0x7000;
        cpu.gpr[reg::RDX] = 0x8000;
        sysexit(&mut cpu, false).unwrap();
        assert_eq!((cpu.cpl(), cpu.rip, cpu.gpr[reg::RSP]), (3, 0x8000, 0x7000));
        assert_eq!((cpu.seg[sreg::CS].selector, cpu.seg[sreg::SS].selector), (0x23, 0x2b));
    }

    #[test]
    fn sysenter_in_long_mode_enters_64_bit_code() {
        let mut cpu = long(3);
        cpu.sysenter_cs = 0x10;
        cpu.sysenter_esp = RIP;
        cpu.sysenter_eip = RIP;
        sysenter(&mut cpu).unwrap();
        assert_eq!((cpu.code_size(), cpu.rip, cpu.gpr[reg::RSP]), (CodeSize::Bits64, RIP, RIP));
        cpu.gpr[reg::RCX] = 0x7000;
        cpu.gpr[reg::RDX] = 1 << 63;
        assert_eq!(sysexit(&mut cpu, true), Err(Exception::gp(0)));
        cpu.gpr[reg::RDX] = 0x8000;
        sysexit(&mut cpu, true).unwrap();
        assert_eq!(cpu.code_size(), CodeSize::Bits64);
        assert_eq!((cpu.seg[sreg::CS].selector, cpu.seg[sreg::SS].selector), (0x33, 0x3b));
    }
}
