//! Model-specific registers (Intel SDM vol. 4; AMD APM vol. 2, appendix A).
//!
//! Registers of the processor are handled here; the local APIC's, the TSC deadline, KVM's clock and
//! everything unknown go to the [`Platform`], which refuses what does not exist (#GP(0)).
//! Speculation controls, ARCH_CAPABILITIES and the AMD registers that Linux touches without asking
//! CPUID follow the vendor of the [`CpuidTable`].

use crate::control::{Flush, privileged};
use crate::cpuid::{CpuidTable, Vendor};
use crate::paging::{PHYS_BITS, canonical};
use crate::platform::Platform;
use crate::state::{CpuState, Exception, cr0, efer, sreg};

/// Numbers of the MSRs handled here.
pub mod index {
    #![allow(missing_docs, reason = "the names are the manual's, without IA32_")]
    pub const TSC: u32 = 0x10;
    pub const PLATFORM_ID: u32 = 0x17;
    pub const EBL_CR_POWERON: u32 = 0x2a;
    pub const FEATURE_CONTROL: u32 = 0x3a;
    pub const TSC_ADJUST: u32 = 0x3b;
    pub const SPEC_CTRL: u32 = 0x48;
    pub const PRED_CMD: u32 = 0x49;
    pub const BIOS_UPDT_TRIG: u32 = 0x79;
    pub const BIOS_SIGN_ID: u32 = 0x8b;
    pub const PLATFORM_INFO: u32 = 0xce;
    pub const MTRRCAP: u32 = 0xfe;
    pub const ARCH_CAPABILITIES: u32 = 0x10a;
    pub const SYSENTER_CS: u32 = 0x174;
    pub const SYSENTER_ESP: u32 = 0x175;
    pub const SYSENTER_EIP: u32 = 0x176;
    pub const MCG_CAP: u32 = 0x179;
    pub const MCG_STATUS: u32 = 0x17a;
    pub const MISC_ENABLE: u32 = 0x1a0;
    pub const DEBUGCTL: u32 = 0x1d9;
    pub const MTRR_PHYSBASE0: u32 = 0x200;
    pub const MTRR_PHYSMASK7: u32 = 0x20f;
    pub const MTRR_FIX64K: u32 = 0x250;
    pub const MTRR_FIX16K_80000: u32 = 0x258;
    pub const MTRR_FIX16K_A0000: u32 = 0x259;
    pub const MTRR_FIX4K_C0000: u32 = 0x268;
    pub const MTRR_FIX4K_F8000: u32 = 0x26f;
    pub const PAT: u32 = 0x277;
    pub const MTRR_DEF_TYPE: u32 = 0x2ff;
    pub const EFER: u32 = 0xc000_0080;
    pub const STAR: u32 = 0xc000_0081;
    pub const LSTAR: u32 = 0xc000_0082;
    pub const CSTAR: u32 = 0xc000_0083;
    pub const FMASK: u32 = 0xc000_0084;
    pub const FS_BASE: u32 = 0xc000_0100;
    pub const GS_BASE: u32 = 0xc000_0101;
    pub const KERNEL_GS_BASE: u32 = 0xc000_0102;
    pub const TSC_AUX: u32 = 0xc000_0103;
    pub const AMD_SYSCFG: u32 = 0xc001_0010;
    pub const AMD_HWCR: u32 = 0xc001_0015;
    pub const AMD_NB_CFG: u32 = 0xc001_001f;
    pub const AMD_PATCH_LOADER: u32 = 0xc001_0020;
    pub const AMD_INT_PENDING: u32 = 0xc001_0055;
    pub const AMD_MMIO_CONF_BASE: u32 = 0xc001_0058;
    pub const AMD_TSEG_BASE: u32 = 0xc001_0112;
    pub const AMD_TSEG_MASK: u32 = 0xc001_0113;
    pub const AMD_LS_CFG: u32 = 0xc001_1020;
    pub const AMD_IC_CFG: u32 = 0xc001_1021;
    pub const AMD_DC_CFG: u32 = 0xc001_1022;
    pub const AMD_DE_CFG: u32 = 0xc001_1029;
    pub const AMD_BU_CFG2: u32 = 0xc001_102a;
}

/// IA32_MTRRCAP: 8 variable ranges, fixed ranges, write combining.
const MTRRCAP_VALUE: u64 = 8 | 1 << 8 | 1 << 10;
/// IA32_ARCH_CAPABILITIES: RDCL_NO, IBRS_ALL, SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO,
/// SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO, PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
const ARCH_CAPABILITIES_VALUE: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;
/// IA32_BIOS_SIGN_ID: microcode revision 1.
const MICROCODE_REVISION: u64 = 1 << 32;
/// AMD's PATCH_LEVEL has the revision in the low half.
const AMD_PATCH_LEVEL: u64 = 0x0100_0065;
/// IA32_FEATURE_CONTROL: locked, nothing enabled.
const FEATURE_CONTROL_LOCKED: u64 = 1;
/// IA32_MISC_ENABLE bits that software may change: fast strings, thermal control, SpeedStep, MONITOR,
/// CPUID limit, xTPR, XD disable.
const MISC_ENABLE_WRITABLE: u64 = 1 | 1 << 3 | 1 << 16 | 1 << 18 | 1 << 22 | 1 << 23 | 1 << 34;
/// HWCR bits that are accepted and ignored, and the one that reads as set (TscFreqSel).
const HWCR_TSC_FREQ_SEL: u64 = 1 << 24;
/// DE_CFG: LFENCE is serializing.
const DE_CFG_LFENCE: u64 = 1 << 1;
/// EFER.AUTOIBRS, on AMD.
const EFER_AUTOIBRS: u64 = 1 << 21;

/// What RDMSR and WRMSR need besides the registers.
pub struct MsrContext<'a> {
    /// The machine, for what is not the processor's.
    pub platform: &'a mut dyn Platform,
    /// The CPUID model: vendor and features.
    pub table: &'a CpuidTable,
    /// Reads the host's time-stamp counter.
    pub host_tsc: fn() -> u64,
}

/// What the caller must do after WRMSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrEffect {
    /// Cached translations to drop.
    pub flush: Flush,
    /// The time-stamp counter moved: [`CpuState::tsc_offset`] changed.
    pub tsc_changed: bool,
}

impl MsrEffect {
    const NONE: Self = Self { flush: Flush::None, tsc_changed: false };
}

/// RDMSR.
///
/// # Errors
/// #GP(0) when CPL is not 0 or there is no such register.
pub fn read(cpu: &CpuState, context: &mut MsrContext<'_>, msr: u32) -> Result<u64, Exception> {
    privileged(cpu)?;
    let intel = context.table.vendor() == Vendor::Intel;
    Ok(match msr {
        index::TSC => (context.host_tsc)().wrapping_add(cpu.tsc_offset),
        index::TSC_ADJUST => cpu.tsc_adjust,
        index::SYSENTER_CS => cpu.sysenter_cs,
        index::SYSENTER_ESP => cpu.sysenter_esp,
        index::SYSENTER_EIP => cpu.sysenter_eip,
        index::MCG_CAP | index::DEBUGCTL => 0,
        index::MCG_STATUS => cpu.mcg_status,
        index::MISC_ENABLE => cpu.misc_enable,
        index::PAT => cpu.pat,
        index::MTRRCAP => MTRRCAP_VALUE,
        index::MTRR_DEF_TYPE => cpu.mtrr_def_type,
        index::MTRR_PHYSBASE0..=index::MTRR_PHYSMASK7 => {
            cpu.mtrr_var[(msr - index::MTRR_PHYSBASE0) as usize & 15]
        }
        index::EFER => cpu.efer,
        index::STAR => cpu.star,
        index::LSTAR => cpu.lstar,
        index::CSTAR => cpu.cstar,
        index::FMASK => cpu.sfmask,
        index::FS_BASE => cpu.seg[sreg::FS].base,
        index::GS_BASE => cpu.seg[sreg::GS].base,
        index::KERNEL_GS_BASE => cpu.kernel_gs_base,
        index::TSC_AUX => cpu.tsc_aux,
        index::BIOS_SIGN_ID => {
            if intel {
                MICROCODE_REVISION
            } else {
                AMD_PATCH_LEVEL
            }
        }
        index::PLATFORM_ID | index::EBL_CR_POWERON | index::PLATFORM_INFO if intel => 0,
        index::FEATURE_CONTROL if intel => FEATURE_CONTROL_LOCKED,
        index::SPEC_CTRL if intel => cpu.spec_ctrl,
        index::ARCH_CAPABILITIES if intel => ARCH_CAPABILITIES_VALUE,
        index::AMD_HWCR if !intel => HWCR_TSC_FREQ_SEL,
        index::AMD_DE_CFG if !intel => DE_CFG_LFENCE,
        _ if !intel && amd_zero(msr) => 0,
        _ => match fixed_mtrr(msr) {
            Some(slot) => cpu.mtrr_fixed[slot],
            None => context.platform.read_msr(cpu, msr).ok_or(Exception::gp(0))?,
        },
    })
}

/// WRMSR.
///
/// # Errors
/// #GP(0) when CPL is not 0, there is no such register, it is read-only, or the value has a reserved
/// bit or an invalid field.
pub fn write(
    cpu: &mut CpuState,
    context: &mut MsrContext<'_>,
    msr: u32,
    value: u64,
) -> Result<MsrEffect, Exception> {
    privileged(cpu)?;
    let intel = context.table.vendor() == Vendor::Intel;
    let wrong = Exception::gp(0);
    let require = |holds: bool| if holds { Ok(()) } else { Err(wrong) };
    match msr {
        index::TSC => {
            let now = (context.host_tsc)().wrapping_add(cpu.tsc_offset);
            return Ok(move_tsc(cpu, value.wrapping_sub(now)));
        }
        index::TSC_ADJUST => {
            let delta = value.wrapping_sub(cpu.tsc_adjust);
            return Ok(move_tsc(cpu, delta));
        }
        index::EFER => return write_efer(cpu, value, intel),
        index::SYSENTER_CS => cpu.sysenter_cs = value & 0xffff_ffff,
        index::SYSENTER_ESP => set_address(&mut cpu.sysenter_esp, value)?,
        index::SYSENTER_EIP => set_address(&mut cpu.sysenter_eip, value)?,
        index::LSTAR => set_address(&mut cpu.lstar, value)?,
        index::CSTAR => set_address(&mut cpu.cstar, value)?,
        index::FS_BASE => set_address(&mut cpu.seg[sreg::FS].base, value)?,
        index::GS_BASE => set_address(&mut cpu.seg[sreg::GS].base, value)?,
        index::KERNEL_GS_BASE => set_address(&mut cpu.kernel_gs_base, value)?,
        index::STAR => cpu.star = value,
        index::FMASK => cpu.sfmask = value & 0xffff_ffff,
        index::TSC_AUX => {
            require(value >> 32 == 0)?;
            cpu.tsc_aux = value;
        }
        index::MCG_STATUS => {
            require(value & !7 == 0)?;
            cpu.mcg_status = value;
        }
        index::MISC_ENABLE => {
            let kept = cpu.misc_enable & !MISC_ENABLE_WRITABLE;
            cpu.misc_enable = kept | value & MISC_ENABLE_WRITABLE;
        }
        // Last-branch records and branch single-step do not exist; their bits read as zero.
        index::DEBUGCTL => require(value & !3 == 0)?,
        index::PAT => {
            require(value.to_le_bytes().iter().all(|t| matches!(t, 0 | 1 | 4..=7)))?;
            cpu.pat = value;
        }
        index::MTRR_DEF_TYPE => {
            require(value & !0xcff == 0 && memory_type(value as u8))?;
            cpu.mtrr_def_type = value;
        }
        index::MTRR_PHYSBASE0..=index::MTRR_PHYSMASK7 => {
            let is_base = msr & 1 == 0;
            let low = if is_base { 0xf00 } else { 0x7ff };
            require(value & low == 0 && value >> PHYS_BITS == 0)?;
            require(!is_base || memory_type(value as u8))?;
            cpu.mtrr_var[(msr - index::MTRR_PHYSBASE0) as usize & 15] = value;
        }
        // Software writes 0 here before it asks for the revision; updates are not taken.
        index::BIOS_SIGN_ID | index::BIOS_UPDT_TRIG if intel => {}
        index::SPEC_CTRL if intel => {
            require(value & !3 == 0)?;
            cpu.spec_ctrl = value;
        }
        index::PRED_CMD if intel => require(value & !1 == 0)?,
        index::EBL_CR_POWERON if intel => {}
        index::AMD_HWCR | index::AMD_DE_CFG | index::AMD_PATCH_LOADER if !intel => {}
        _ if !intel && amd_zero(msr) => {}
        index::MTRRCAP
        | index::MCG_CAP
        | index::FEATURE_CONTROL
        | index::ARCH_CAPABILITIES
        | index::PLATFORM_ID
        | index::PLATFORM_INFO => return Err(wrong),
        _ => match fixed_mtrr(msr) {
            Some(slot) => {
                require(value.to_le_bytes().iter().all(|t| memory_type(*t)))?;
                cpu.mtrr_fixed[slot] = value;
            }
            None => context.platform.write_msr(cpu, msr, value).ok_or(wrong)?,
        },
    }
    Ok(MsrEffect::NONE)
}

/// IA32_EFER: SCE, LME and NXE (AMD: AUTOIBRS); LMA is read-only; LME may not change with paging on.
fn write_efer(cpu: &mut CpuState, value: u64, intel: bool) -> Result<MsrEffect, Exception> {
    let vendor = if intel { 0 } else { EFER_AUTOIBRS };
    let writable = efer::SCE | efer::LME | efer::NXE | vendor;
    if value & !(writable | efer::LMA) != 0 {
        return Err(Exception::gp(0));
    }
    let changed = (cpu.efer ^ value) & writable;
    if changed & efer::LME != 0 && cpu.cr0 & cr0::PG != 0 {
        return Err(Exception::gp(0));
    }
    cpu.efer ^= changed;
    let flush = if changed & efer::NXE != 0 { Flush::All } else { Flush::None };
    Ok(MsrEffect { flush, tsc_changed: false })
}

/// Moves the time-stamp counter; TSC_ADJUST follows (SDM vol. 3, 18.17.3).
const fn move_tsc(cpu: &mut CpuState, delta: u64) -> MsrEffect {
    cpu.tsc_offset = cpu.tsc_offset.wrapping_add(delta);
    cpu.tsc_adjust = cpu.tsc_adjust.wrapping_add(delta);
    MsrEffect { flush: Flush::None, tsc_changed: delta != 0 }
}

const fn set_address(register: &mut u64, value: u64) -> Result<(), Exception> {
    if !canonical(value) {
        return Err(Exception::gp(0));
    }
    *register = value;
    Ok(())
}

/// Memory types of MTRRs: UC, WC, WT, WP, WB.
const fn memory_type(value: u8) -> bool {
    matches!(value, 0 | 1 | 4 | 5 | 6)
}

/// Where a fixed-range MTRR is in [`CpuState::mtrr_fixed`].
const fn fixed_mtrr(msr: u32) -> Option<usize> {
    match msr {
        index::MTRR_FIX64K => Some(0),
        index::MTRR_FIX16K_80000 => Some(1),
        index::MTRR_FIX16K_A0000 => Some(2),
        index::MTRR_FIX4K_C0000..=index::MTRR_FIX4K_F8000 => {
            Some(3 + (msr - index::MTRR_FIX4K_C0000) as usize)
        }
        _ => None,
    }
}

/// Registers of AMD processors that system software reads and writes without asking CPUID; they read
/// as zero and ignore writes.
const fn amd_zero(msr: u32) -> bool {
    matches!(
        msr,
        index::AMD_SYSCFG
            | index::AMD_NB_CFG
            | index::AMD_INT_PENDING
            | index::AMD_MMIO_CONF_BASE
            | index::AMD_TSEG_BASE
            | index::AMD_TSEG_MASK
            | index::AMD_LS_CFG
            | index::AMD_IC_CFG
            | index::AMD_DC_CFG
            | index::AMD_BU_CFG2
    )
}

#[cfg(test)]
#[path = "msr_tests.rs"]
mod tests;
