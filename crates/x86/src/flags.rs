//! Who may change which flags: POPF, PUSHF, IRET, CLI and STI by CPL and IOPL (Intel SDM vol. 2,
//! the pages of these instructions; table "Effect of POPF/POPFD on the EFLAGS Register").
//!
//! The extensions of virtual-8086 mode (VME, PVI) are not part of this processor: VIF and VIP are
//! plain bits that only IRET at CPL 0 sets. VM is set by IRET to that mode and by nothing here.

use crate::size::OpSize;
use crate::state::{CpuState, Exception, flags};

/// Flags every POPF and IRET may change at any privilege level.
const ALWAYS: u64 = flags::ARITH | flags::TF | flags::DF | flags::NT;

/// The flags word PUSHF stores: VM and RF read as zero.
#[must_use]
pub const fn pushf_image(cpu: &CpuState, opsize: OpSize) -> u64 {
    opsize.cut(cpu.rflags & !(flags::VM | flags::RF) | flags::FIXED)
}

/// RFLAGS after POPF of `new`: IOPL changes only at CPL 0, IF only with CPL <= IOPL; what may not
/// change is silently kept.
#[must_use]
pub const fn merge_flags(cpu: &CpuState, new: u64, opsize: OpSize) -> u64 {
    let mut kept = cpu.rflags;
    let mut mask = ALWAYS | privileged_mask(cpu);
    if !matches!(opsize, OpSize::Bits16) {
        mask |= flags::AC | flags::ID;
        kept &= !(flags::RF | flags::VIF | flags::VIP);
    }
    kept & !mask | new & mask | flags::FIXED
}

/// RFLAGS after IRET popped `new` at the current (old) CPL: as POPF, and RF is loaded; VIF and VIP
/// at CPL 0.
#[must_use]
pub const fn iret_flags(cpu: &CpuState, new: u64, opsize: OpSize) -> u64 {
    let mut mask = ALWAYS | privileged_mask(cpu);
    if !matches!(opsize, OpSize::Bits16) {
        mask |= flags::AC | flags::ID | flags::RF;
        if cpu.cpl() == 0 && cpu.protected() {
            mask |= flags::VIF | flags::VIP;
        }
    }
    cpu.rflags & !mask | new & mask | flags::FIXED
}

/// Whether PUSHF, POPF, INT n and IRET may be executed: in virtual-8086 mode with IOPL 3 only (SDM
/// vol. 3, 21.2.7).
///
/// # Errors
/// #GP(0).
pub const fn sensitive(cpu: &CpuState) -> Result<(), Exception> {
    if cpu.virtual_8086() && cpu.iopl() != 3 { Err(Exception::gp(0)) } else { Ok(()) }
}

/// CLI.
///
/// # Errors
/// #GP(0) when CPL > IOPL.
pub const fn cli(cpu: &mut CpuState) -> Result<(), Exception> {
    if cpu.cpl() > cpu.iopl() {
        return Err(Exception::gp(0));
    }
    cpu.rflags &= !flags::IF;
    Ok(())
}

/// STI; interrupts stay inhibited for one instruction when IF was clear (bit 0 of
/// [`CpuState::interrupt_shadow`]).
///
/// # Errors
/// #GP(0) when CPL > IOPL.
pub const fn sti(cpu: &mut CpuState) -> Result<(), Exception> {
    if cpu.cpl() > cpu.iopl() {
        return Err(Exception::gp(0));
    }
    if cpu.rflags & flags::IF == 0 {
        cpu.interrupt_shadow |= 1;
    }
    cpu.rflags |= flags::IF;
    Ok(())
}

/// IOPL and IF as far as the current privilege level may change them.
const fn privileged_mask(cpu: &CpuState) -> u64 {
    let mut mask = 0;
    if cpu.cpl() == 0 {
        mask |= flags::IOPL;
    }
    if cpu.cpl() <= cpu.iopl() {
        mask |= flags::IF;
    }
    mask
}

#[cfg(test)]
mod tests {
    use super::{cli, iret_flags, merge_flags, pushf_image, sensitive, sti};
    use crate::fake::{protected, real};
    use crate::size::OpSize::{Bits16, Bits32, Bits64};
    use crate::state::flags;

    /// Every flag bit that exists.
    const ALL: u64 = 0x3f_7fd7;

    #[test]
    fn popf_matrix() {
        // CPL, IOPL, size, bits that change from 0 to 1.
        let base = flags::ARITH | flags::TF | flags::DF | flags::NT;
        let wide = base | flags::AC | flags::ID;
        for (cpl, iopl, size, expected) in [
            (0, 0, Bits16, base | flags::IOPL | flags::IF),
            (0, 0, Bits32, wide | flags::IOPL | flags::IF),
            (0, 0, Bits64, wide | flags::IOPL | flags::IF),
            (0, 3, Bits64, wide | flags::IOPL | flags::IF),
            (3, 0, Bits16, base),
            (3, 0, Bits32, wide),
            (3, 2, Bits32, wide),
            (3, 3, Bits32, wide | flags::IF),
            (1, 1, Bits32, wide | flags::IF),
            (2, 1, Bits32, wide),
        ] {
            let mut cpu = protected(cpl);
            cpu.rflags = flags::FIXED | iopl << flags::IOPL_SHIFT;
            let merged = merge_flags(&cpu, ALL, size);
            assert_eq!(merged, cpu.rflags | expected, "set: cpl {cpl} iopl {iopl} {size:?}");
        }
    }

    #[test]
    fn popf_clears_by_the_same_rules() {
        let mut cpu = protected(3);
        cpu.rflags = ALL & !flags::IOPL & !flags::VM;
        assert_eq!(merge_flags(&cpu, 0, Bits16), flags::FIXED | flags::IF | (cpu.rflags & !0xffff));
        assert_eq!(merge_flags(&cpu, 0, Bits32), flags::FIXED | flags::IF);
        cpu = protected(0);
        cpu.rflags = ALL & !flags::VM;
        assert_eq!(merge_flags(&cpu, 0, Bits64), flags::FIXED);
    }

    #[test]
    fn reserved_bits_and_vm_are_never_set() {
        let cpu = protected(0);
        assert_eq!(merge_flags(&cpu, u64::MAX, Bits64) & !ALL, 0);
        assert_eq!(merge_flags(&cpu, u64::MAX, Bits64) & flags::VM, 0);
        assert_eq!(iret_flags(&cpu, u64::MAX, Bits64) & (!ALL | flags::VM), 0);
    }

    #[test]
    fn iret_loads_rf_and_at_cpl_0_vif() {
        let cpu = protected(0);
        let loaded = iret_flags(&cpu, ALL, Bits32);
        assert_eq!(loaded & flags::RF, flags::RF);
        assert_eq!(loaded & flags::VIF, flags::VIF);
        let loaded = iret_flags(&protected(3), ALL, Bits32);
        assert_eq!(loaded & flags::RF, flags::RF);
        assert_eq!(loaded & (flags::VIF | flags::VIP | flags::IF | flags::IOPL), 0);
        assert_eq!(iret_flags(&protected(0), ALL, Bits16) & flags::RF, 0);
        // Real mode keeps VIF and VIP.
        assert_eq!(iret_flags(&real(), ALL, Bits32) & (flags::VIF | flags::VIP), 0);
    }

    #[test]
    fn pushf_hides_rf_and_vm() {
        let mut cpu = protected(0);
        cpu.rflags = ALL;
        assert_eq!(pushf_image(&cpu, Bits64), ALL & !(flags::RF | flags::VM));
        assert_eq!(pushf_image(&cpu, Bits16), ALL & 0xffff);
    }

    #[test]
    fn what_is_sensitive_in_virtual_8086_mode() {
        let mut cpu = protected(3);
        assert!(sensitive(&cpu).is_ok());
        cpu.rflags |= flags::VM;
        for (iopl, allowed) in [(0, false), (2, false), (3, true)] {
            cpu.rflags = cpu.rflags & !flags::IOPL | iopl << flags::IOPL_SHIFT;
            assert_eq!(sensitive(&cpu).is_ok(), allowed);
        }
    }

    #[test]
    fn cli_and_sti_need_iopl() {
        for (cpl, iopl, allowed) in
            [(0, 0, true), (3, 0, false), (3, 2, false), (3, 3, true), (1, 0, false), (1, 1, true)]
        {
            let mut cpu = protected(cpl);
            cpu.rflags = flags::FIXED | iopl << flags::IOPL_SHIFT;
            assert_eq!(sti(&mut cpu).is_ok(), allowed);
            assert_eq!(cpu.rflags & flags::IF != 0, allowed);
            assert_eq!(cpu.interrupt_shadow, u32::from(allowed));
            cpu.interrupt_shadow = 0;
            assert_eq!(cli(&mut cpu).is_ok(), allowed);
            assert_eq!(cpu.rflags & flags::IF, 0);
        }
        let mut cpu = protected(0);
        cpu.rflags |= flags::IF;
        sti(&mut cpu).unwrap();
        assert_eq!(cpu.interrupt_shadow, 0, "IF was already set");
    }
}
