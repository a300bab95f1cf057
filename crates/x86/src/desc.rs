//! Segment and gate descriptors in memory (Intel SDM vol. 3, 3.4.5 and 6.8).
//!
//! Used by event delivery and by everything that loads a segment register. Reads and writes of
//! descriptor tables are system accesses.

use crate::platform::{Access, LinearMem};
use crate::state::{CpuState, Exception, Segment};

/// System descriptor types (Intel SDM vol. 3, table 3-2).
pub(crate) mod system {
    pub(crate) const TSS16: u8 = 1;
    pub(crate) const LDT: u8 = 2;
    pub(crate) const TSS16_BUSY: u8 = 3;
    pub(crate) const CALL16: u8 = 4;
    pub(crate) const TASK_GATE: u8 = 5;
    pub(crate) const INT16: u8 = 6;
    pub(crate) const TRAP16: u8 = 7;
    pub(crate) const TSS: u8 = 9;
    pub(crate) const TSS_BUSY: u8 = 0xb;
    pub(crate) const CALL: u8 = 0xc;
    pub(crate) const INT: u8 = 0xe;
    pub(crate) const TRAP: u8 = 0xf;
}

/// The error code for a selector: index and table without the RPL.
pub(crate) const fn selector_code(selector: u16) -> u32 {
    (selector & 0xfffc) as u32
}

/// Whether a selector is null (index 0 of the GDT, any RPL).
pub(crate) const fn is_null(selector: u16) -> bool {
    selector & 0xfffc == 0
}

/// The RPL of a selector.
pub(crate) const fn rpl(selector: u16) -> u8 {
    (selector & 3) as u8
}

/// A linear address as the current mode wraps it: 32 bits outside long mode.
pub(crate) const fn wrap(cpu: &CpuState, address: u64) -> u64 {
    if cpu.long_mode() { address } else { address & 0xffff_ffff }
}

/// A descriptor read from the GDT or LDT.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Descriptor {
    /// Its first eight bytes.
    pub(crate) raw: u64,
    /// Its second eight bytes, for system descriptors of long mode.
    pub(crate) high: u64,
    /// The selector it was found by.
    pub(crate) selector: u16,
    /// Its linear address.
    address: u64,
}

impl Descriptor {
    pub(crate) const fn attr(&self) -> u16 {
        ((self.raw >> 40) & 0xf0ff) as u16
    }

    pub(crate) const fn typ(&self) -> u8 {
        (self.raw >> 40 & 0xf) as u8
    }

    pub(crate) const fn is_system(&self) -> bool {
        self.attr() & Segment::S == 0
    }

    pub(crate) const fn present(&self) -> bool {
        self.attr() & Segment::P != 0
    }

    pub(crate) const fn dpl(&self) -> u8 {
        (self.raw >> 45 & 3) as u8
    }

    pub(crate) const fn is_code(&self) -> bool {
        !self.is_system() && self.typ() & 8 != 0
    }

    pub(crate) const fn is_conforming(&self) -> bool {
        self.typ() & 4 != 0
    }

    pub(crate) const fn is_writable_data(&self) -> bool {
        !self.is_system() && self.typ() & 8 == 0 && self.typ() & 2 != 0
    }

    pub(crate) const fn is_readable(&self) -> bool {
        !self.is_system() && (self.typ() & 8 == 0 || self.typ() & 2 != 0)
    }

    pub(crate) const fn is_long(&self) -> bool {
        self.attr() & Segment::L != 0
    }

    pub(crate) const fn is_big(&self) -> bool {
        self.attr() & Segment::DB != 0
    }

    pub(crate) const fn limit(&self) -> u32 {
        let limit = (self.raw & 0xffff | self.raw >> 32 & 0xf_0000) as u32;
        if self.attr() & Segment::G != 0 { limit << 12 | 0xfff } else { limit }
    }

    /// The base; all 64 bits for a 16-byte system descriptor.
    pub(crate) const fn base(&self) -> u64 {
        let low = self.raw >> 16 & 0xff_ffff | self.raw >> 32 & 0xff00_0000;
        low | (self.high & 0xffff_ffff) << 32
    }

    /// The error code for this descriptor's selector.
    pub(crate) const fn code(&self) -> u32 {
        selector_code(self.selector)
    }

    /// The offset a gate leads to.
    pub(crate) const fn gate_offset(&self) -> u64 {
        gate_offset(self.raw, self.high)
    }

    /// The selector a gate leads to.
    pub(crate) const fn gate_selector(&self) -> u16 {
        (self.raw >> 16) as u16
    }

    /// The register contents after loading this descriptor with the given RPL.
    pub(crate) const fn segment(&self, rpl: u8) -> Segment {
        Segment {
            base: self.base(),
            limit: self.limit(),
            selector: self.selector & 0xfffc | (rpl & 3) as u16,
            attr: self.attr(),
        }
    }

    /// Sets the accessed bit of a code or data descriptor, here and in memory.
    pub(crate) fn set_accessed(
        &mut self,
        cpu: &mut CpuState,
        mem: &mut dyn LinearMem,
    ) -> Result<(), Exception> {
        if self.typ() & 1 == 0 {
            self.set_type_bits(cpu, mem, 1)?;
        }
        Ok(())
    }

    /// Sets bits of the type field, here and in memory (accessed, busy).
    pub(crate) fn set_type_bits(
        &mut self,
        cpu: &mut CpuState,
        mem: &mut dyn LinearMem,
        bits: u8,
    ) -> Result<(), Exception> {
        let raw = self.raw | u64::from(bits) << 40;
        let at = wrap(cpu, self.address.wrapping_add(5));
        mem.write(cpu, at, &[(raw >> 40) as u8], Access::System)?;
        self.raw = raw;
        Ok(())
    }
}

/// The offset in a gate: 32 bits, or 64 with the second half of a long-mode gate.
pub(crate) const fn gate_offset(raw: u64, high: u64) -> u64 {
    raw & 0xffff | raw >> 32 & 0xffff_0000 | (high & 0xffff_ffff) << 32
}

/// Reads the descriptor `selector` names; `None` when it lies outside its table.
///
/// # Errors
/// Only faults of the memory access.
pub(crate) fn lookup(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
) -> Result<Option<Descriptor>, Exception> {
    let Some(address) = entry_address(cpu, selector, 7) else { return Ok(None) };
    let mut bytes = [0; 8];
    mem.read(cpu, address, &mut bytes, Access::System)?;
    Ok(Some(Descriptor { raw: u64::from_le_bytes(bytes), high: 0, selector, address }))
}

/// Reads a descriptor that must lie within its table.
///
/// # Errors
/// `outside` when it does not; faults of the memory access.
pub(crate) fn fetch(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
    outside: Exception,
) -> Result<Descriptor, Exception> {
    lookup(cpu, mem, selector)?.ok_or(outside)
}

/// In long mode reads the second half of a system descriptor. `false` when it lies outside the
/// table or its type field is not zero.
///
/// # Errors
/// Only faults of the memory access.
pub(crate) fn complete(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    descriptor: &mut Descriptor,
) -> Result<bool, Exception> {
    if !cpu.long_mode() {
        return Ok(true);
    }
    let Some(address) = entry_address(cpu, descriptor.selector, 15) else { return Ok(false) };
    let mut bytes = [0; 8];
    mem.read(cpu, address.wrapping_add(8), &mut bytes, Access::System)?;
    descriptor.high = u64::from_le_bytes(bytes);
    Ok(descriptor.high >> 40 & 0x1f == 0)
}

/// Linear address of a descriptor whose byte `last` must be within the table's limit.
fn entry_address(cpu: &CpuState, selector: u16, last: u32) -> Option<u64> {
    let offset = u32::from(selector & 0xfff8);
    let (base, limit) = if selector & 4 == 0 {
        (cpu.gdtr.base, cpu.gdtr.limit)
    } else if cpu.ldtr.present() {
        (cpu.ldtr.base, cpu.ldtr.limit)
    } else {
        return None;
    };
    (offset + last <= limit).then(|| wrap(cpu, base.wrapping_add(u64::from(offset))))
}
