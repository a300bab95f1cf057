//! Control, debug and extended control registers, INVPCID (Intel SDM vol. 3, 2.5, 2.6, 4 and 18.2;
//! vol. 2, the pages of MOV CR, MOV DR, LMSW, CLTS, XSETBV and INVPCID).
//!
//! The functions change the registers and tell the caller which cached translations are no longer
//! valid. They assume a TLB that also caches permissions: changes of WP, SMEP, SMAP and NXE flush.

use crate::event::DR6_FIXED;
use crate::paging::{PHYS_BITS, canonical, load_pdptes};
use crate::platform::PhysMem;
use crate::state::{CodeSize, CpuState, Exception, Segment, cr0, cr4, efer, sreg};

/// Which cached translations to drop.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// None.
    None,
    /// Those of one PCID that are not global (also with CR4.PCIDE clear, when the PCID is 0).
    Pcid(u16),
    /// All that are not global, of every PCID.
    NonGlobal,
    /// All.
    All,
}

/// What a write to a control register means for the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CrEffect {
    /// Cached translations to drop.
    pub flush: Flush,
    /// PE, PG or LMA changed: the decoding mode or the kind of addresses is another.
    pub mode_changed: bool,
    /// The bits that are different now.
    pub changed: u64,
}

const CR0_DEFINED: u64 = cr0::PE
    | cr0::MP
    | cr0::EM
    | cr0::TS
    | cr0::ET
    | cr0::NE
    | cr0::WP
    | cr0::AM
    | cr0::NW
    | cr0::CD
    | cr0::PG;
const CR4_DEFINED: u64 = cr4::TSD
    | cr4::DE
    | cr4::PSE
    | cr4::PAE
    | cr4::MCE
    | cr4::PGE
    | cr4::PCE
    | cr4::OSFXSR
    | cr4::OSXMMEXCPT
    | cr4::UMIP
    | cr4::FSGSBASE
    | cr4::PCIDE
    | cr4::OSXSAVE
    | cr4::SMEP
    | cr4::SMAP;
/// CR3 bit 63 as a source operand: keep the translations of the PCID.
const CR3_NO_FLUSH: u64 = 1 << 63;
const PCID: u64 = 0xfff;

const DR7_FIXED: u64 = 1 << 10;
const DR7_WRITABLE: u64 = 0xffff_23ff;
const DR7_GD: u64 = 1 << 13;
const DR6_BD: u64 = 1 << 13;
const DR6_WRITABLE: u64 = 0xe00f;

/// The check of privileged instructions.
///
/// # Errors
/// #GP(0) when CPL is not 0.
pub const fn privileged(cpu: &CpuState) -> Result<(), Exception> {
    if cpu.cpl() == 0 { Ok(()) } else { Err(Exception::gp(0)) }
}

/// The check of SGDT, SIDT, SLDT, STR and SMSW.
///
/// # Errors
/// #GP(0) at CPL above 0 with CR4.UMIP set.
pub const fn umip(cpu: &CpuState) -> Result<(), Exception> {
    if cpu.cr4 & cr4::UMIP != 0 && cpu.cpl() != 0 { Err(Exception::gp(0)) } else { Ok(()) }
}

/// MOV to CR0.
///
/// # Errors
/// #GP(0) when CPL is not 0, or by the rules for PE, PG, CD, NW, long mode, PCIDE and PDPTEs.
pub fn mov_to_cr0<M: PhysMem + ?Sized>(
    cpu: &mut CpuState,
    mem: &M,
    value: u64,
) -> Result<CrEffect, Exception> {
    privileged(cpu)?;
    set_cr0(cpu, mem, value)
}

fn set_cr0<M: PhysMem + ?Sized>(
    cpu: &mut CpuState,
    mem: &M,
    value: u64,
) -> Result<CrEffect, Exception> {
    let has = |bit: u64| value & bit != 0;
    let wrong = Exception::gp(0);
    if value >> 32 != 0 || (has(cr0::PG) && !has(cr0::PE)) || (has(cr0::NW) && !has(cr0::CD)) {
        return Err(wrong);
    }
    let new = value & CR0_DEFINED | cr0::ET;
    let changed = new ^ cpu.cr0;
    let mut new_efer = cpu.efer;
    if changed & cr0::PG != 0 {
        let cs_long = cpu.seg[sreg::CS].attr & Segment::L != 0;
        if has(cr0::PG) {
            if cpu.efer & efer::LME != 0 {
                // A 16-bit TSS cannot be used in long mode.
                let tss16 = cpu.tr.present() && cpu.tr.typ() & 8 == 0;
                if cpu.cr4 & cr4::PAE == 0 || cs_long || tss16 {
                    return Err(wrong);
                }
                new_efer |= efer::LMA;
            }
        } else {
            if cpu.cr4 & cr4::PCIDE != 0 || (cpu.long_mode() && cs_long) {
                return Err(wrong);
            }
            new_efer &= !efer::LMA;
        }
    }
    let pae_only = cpu.cr4 & cr4::PAE != 0 && new_efer & efer::LMA == 0;
    if has(cr0::PG) && pae_only && changed & (cr0::PG | cr0::CD | cr0::NW) != 0 {
        cpu.pdpte = load_pdptes(mem, cpu)?;
    }
    cpu.cr0 = new;
    cpu.efer = new_efer;
    let flush = changed & (cr0::PG | cr0::PE | cr0::WP) != 0;
    Ok(CrEffect {
        flush: if flush { Flush::All } else { Flush::None },
        mode_changed: changed & (cr0::PG | cr0::PE) != 0,
        changed,
    })
}

/// MOV to CR3.
///
/// # Errors
/// #GP(0) when CPL is not 0, a reserved bit is set, or a PDPTE has one set.
pub fn mov_to_cr3<M: PhysMem + ?Sized>(
    cpu: &mut CpuState,
    mem: &M,
    value: u64,
) -> Result<CrEffect, Exception> {
    privileged(cpu)?;
    load_cr3(cpu, mem, value)
}

/// Loads CR3, as a task switch does at any privilege level.
///
/// # Errors
/// #GP(0) when a reserved bit is set, or a PDPTE has one set.
pub fn load_cr3<M: PhysMem + ?Sized>(
    cpu: &mut CpuState,
    mem: &M,
    value: u64,
) -> Result<CrEffect, Exception> {
    let old = cpu.cr3;
    let pcide = cpu.cr4 & cr4::PCIDE != 0;
    let mut flush = Flush::Pcid(0);
    let mut new = value;
    if cpu.long_mode() {
        if pcide {
            let keep = value & CR3_NO_FLUSH != 0;
            flush = if keep { Flush::None } else { Flush::Pcid((value & PCID) as u16) };
            new &= !CR3_NO_FLUSH;
        }
        if new >> PHYS_BITS != 0 {
            return Err(Exception::gp(0));
        }
    } else {
        new &= 0xffff_ffff;
    }
    cpu.cr3 = new;
    if cpu.paging() && cpu.cr4 & cr4::PAE != 0 && !cpu.long_mode() {
        match load_pdptes(mem, cpu) {
            Ok(entries) => cpu.pdpte = entries,
            Err(exception) => {
                cpu.cr3 = old;
                return Err(exception);
            }
        }
    }
    Ok(CrEffect { flush, mode_changed: false, changed: old ^ new })
}

/// MOV to CR4.
///
/// # Errors
/// #GP(0) when CPL is not 0, for reserved bits, for clearing PAE in long mode, for setting PCIDE
/// outside long mode or with a PCID in CR3, or when a PDPTE has a reserved bit set.
pub fn mov_to_cr4<M: PhysMem + ?Sized>(
    cpu: &mut CpuState,
    mem: &M,
    value: u64,
) -> Result<CrEffect, Exception> {
    privileged(cpu)?;
    let wrong = Exception::gp(0);
    if value & !CR4_DEFINED != 0 {
        return Err(wrong);
    }
    let changed = value ^ cpu.cr4;
    let set = changed & value;
    if cpu.long_mode() && value & cr4::PAE == 0 {
        return Err(wrong);
    }
    if set & cr4::PCIDE != 0 && (!cpu.long_mode() || cpu.cr3 & PCID != 0) {
        return Err(wrong);
    }
    let reload = cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP;
    if cpu.paging() && value & cr4::PAE != 0 && !cpu.long_mode() && changed & reload != 0 {
        cpu.pdpte = load_pdptes(mem, cpu)?;
    }
    cpu.cr4 = value;
    let flush = cr4::PAE | cr4::PSE | cr4::PGE | cr4::SMEP | cr4::SMAP | cr4::PCIDE;
    // Setting PCIDE invalidates nothing: until then every translation had PCID 0.
    let flush = changed & flush != 0 && changed & flush != set & cr4::PCIDE;
    Ok(CrEffect {
        flush: if flush { Flush::All } else { Flush::None },
        mode_changed: false,
        changed,
    })
}

/// LMSW: loads PE (which it cannot clear), MP, EM and TS.
///
/// # Errors
/// #GP(0) when CPL is not 0.
pub fn lmsw<M: PhysMem + ?Sized>(
    cpu: &mut CpuState,
    mem: &M,
    value: u16,
) -> Result<CrEffect, Exception> {
    privileged(cpu)?;
    let low = u64::from(value) & 0xf | cpu.cr0 & cr0::PE;
    set_cr0(cpu, mem, cpu.cr0 & !0xf | low)
}

/// CLTS.
///
/// # Errors
/// #GP(0) when CPL is not 0.
pub const fn clts(cpu: &mut CpuState) -> Result<(), Exception> {
    if let Err(exception) = privileged(cpu) {
        return Err(exception);
    }
    cpu.cr0 &= !cr0::TS;
    Ok(())
}

/// What a debug register number means, after the checks common to reads and writes.
fn debug_register(cpu: &CpuState, number: u8) -> Result<u8, Exception> {
    let number = match number {
        4 | 5 if cpu.cr4 & cr4::DE != 0 => return Err(Exception::ud()),
        4 | 5 => number + 2,
        0..=7 => number,
        _ => return Err(Exception::ud()),
    };
    privileged(cpu)?;
    if cpu.dr7 & DR7_GD != 0 {
        return Err(Exception::db(DR6_BD));
    }
    Ok(number)
}

/// MOV to a debug register.
///
/// # Errors
/// #UD for DR4 and DR5 with CR4.DE and for DR8 up; #GP(0) when CPL is not 0 or the high half of DR6 or DR7
/// is not zero; #DB with DR7.GD set.
pub fn mov_to_dr(cpu: &mut CpuState, number: u8, value: u64) -> Result<(), Exception> {
    let number = debug_register(cpu, number)?;
    if number >= 6 && value >> 32 != 0 {
        return Err(Exception::gp(0));
    }
    match number {
        6 => cpu.dr6 = value & DR6_WRITABLE | DR6_FIXED,
        7 => cpu.dr7 = value & DR7_WRITABLE | DR7_FIXED,
        n => cpu.dr[usize::from(n & 3)] = value,
    }
    Ok(())
}

/// MOV from a debug register.
///
/// # Errors
/// #UD for DR4 and DR5 with CR4.DE and for DR8 up; #GP(0) when CPL is not 0; #DB with DR7.GD set.
pub fn mov_from_dr(cpu: &CpuState, number: u8) -> Result<u64, Exception> {
    Ok(match debug_register(cpu, number)? {
        6 => cpu.dr6 | DR6_FIXED,
        7 => cpu.dr7 | DR7_FIXED,
        n => cpu.dr[usize::from(n & 3)],
    })
}

/// XSETBV of register `index`; `supported` is [`crate::cpuid::CpuidTable::xcr0_supported`].
///
/// # Errors
/// #UD without CR4.OSXSAVE; #GP(0) when CPL is not 0, for another register than 0, for unsupported
/// bits, x87 clear, or AVX without SSE.
pub fn xsetbv(cpu: &mut CpuState, supported: u64, index: u32, value: u64) -> Result<(), Exception> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::ud());
    }
    privileged(cpu)?;
    if index != 0 || value & !supported != 0 || value & 1 == 0 || value & 6 == 4 {
        return Err(Exception::gp(0));
    }
    cpu.xcr0 = value;
    Ok(())
}

/// XGETBV of register `index`.
///
/// # Errors
/// #UD without CR4.OSXSAVE; #GP(0) for another register than 0.
pub const fn xgetbv(cpu: &CpuState, index: u32) -> Result<u64, Exception> {
    if cpu.cr4 & cr4::OSXSAVE == 0 {
        return Err(Exception::ud());
    }
    if index != 0 {
        return Err(Exception::gp(0));
    }
    Ok(cpu.xcr0)
}

/// What an INVPCID invalidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invpcid {
    /// One address of one PCID, if not global.
    Address {
        /// The PCID.
        pcid: u16,
        /// The linear address.
        address: u64,
    },
    /// One PCID, except global translations.
    Pcid(u16),
    /// Everything.
    All,
    /// Everything but global translations.
    AllNonGlobal,
}

impl Invpcid {
    /// Decodes and checks the register operand and the 16-byte descriptor of an INVPCID.
    ///
    /// # Errors
    /// #GP(0) when CPL is not 0, the type is above 3, or a field of the descriptor is not valid.
    pub fn decode(cpu: &CpuState, kind: u64, descriptor: &[u8; 16]) -> Result<Self, Exception> {
        privileged(cpu)?;
        let wrong = Exception::gp(0);
        let both = u128::from_le_bytes(*descriptor);
        let (low, address) = (both as u64, (both >> 64) as u64);
        if kind > 3 || low >> 12 != 0 {
            return Err(wrong);
        }
        let pcid = low as u16;
        if kind < 2 && pcid != 0 && cpu.cr4 & cr4::PCIDE == 0 {
            return Err(wrong);
        }
        match kind {
            0 if cpu.code_size() == CodeSize::Bits64 && !canonical(address) => Err(wrong),
            0 => Ok(Self::Address { pcid, address }),
            1 => Ok(Self::Pcid(pcid)),
            2 => Ok(Self::All),
            _ => Ok(Self::AllNonGlobal),
        }
    }
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
