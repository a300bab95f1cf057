//! Pushes and pops of whole frames, checked before anything is changed.

use crate::paging::canonical;
use crate::platform::{Access, LinearMem};
use crate::state::{CodeSize, CpuState, Exception, Segment, reg, sreg};

/// Slots of the largest frame: 31 parameters of a call gate, SS, SP, CS, IP.
const SLOTS_MAX: usize = 35;

/// A stack and a pointer into it; the vCPU's own RSP is changed only by [`Stack::apply`].
pub(crate) struct Stack {
    segment: Segment,
    sp: u64,
    mask: u64,
    access: Access,
    code: u32,
}

impl Stack {
    /// The current stack; faults are #SS(`code`).
    pub(crate) const fn current(cpu: &CpuState, code: u32) -> Self {
        let segment = cpu.seg[sreg::SS];
        let mask = match cpu.code_size() {
            CodeSize::Bits64 => u64::MAX,
            _ => segment_mask(&segment),
        };
        Self { segment, sp: cpu.gpr[reg::RSP] & mask, mask, access: Access::Current, code }
    }

    /// A stack of an inner privilege level in `segment`; faults are #SS(`code`).
    pub(crate) const fn inner(segment: Segment, sp: u64, code: u32) -> Self {
        let mask = segment_mask(&segment);
        Self { segment, sp: sp & mask, mask, access: Access::System, code }
    }

    /// A flat 64-bit stack at `sp`; faults are #SS(`code`).
    pub(crate) const fn flat(sp: u64, access: Access, code: u32) -> Self {
        let segment = Segment { base: 0, limit: 0, selector: 0, attr: 0 };
        Self { segment, sp, mask: u64::MAX, access, code }
    }

    /// Pushes values in order, each `size` bytes. Nothing is written when any byte would fault.
    pub(crate) fn push(
        &mut self,
        cpu: &mut CpuState,
        mem: &mut dyn LinearMem,
        values: &[u64],
        size: usize,
    ) -> Result<(), Exception> {
        debug_assert!(values.len() <= SLOTS_MAX && size <= 8);
        let total = values.len() * size;
        let sp = self.sp.wrapping_sub(total as u64) & self.mask;
        let mut bytes = [0u8; SLOTS_MAX * 8];
        for (slot, value) in bytes.chunks_exact_mut(size).zip(values.iter().rev()) {
            slot.copy_from_slice(&value.to_le_bytes()[..size]);
        }
        if let Some(address) = self.contiguous(sp, total)? {
            mem.write(cpu, address, &bytes[..total], self.access)?;
        } else {
            for i in 0..values.len() {
                let address = self.linear(sp.wrapping_add((i * size) as u64), size)?;
                mem.probe_write(cpu, address, size, self.access)?;
            }
            for (i, slot) in bytes[..total].chunks_exact(size).enumerate() {
                let address = self.linear(sp.wrapping_add((i * size) as u64), size)?;
                mem.write(cpu, address, slot, self.access)?;
            }
        }
        self.sp = sp;
        Ok(())
    }

    /// Pops `N` values of `size` bytes, the first popped first.
    pub(crate) fn pop<const N: usize>(
        &mut self,
        cpu: &mut CpuState,
        mem: &mut dyn LinearMem,
        size: usize,
    ) -> Result<[u64; N], Exception> {
        let mut values = [0; N];
        self.pop_into(cpu, mem, &mut values, size)?;
        Ok(values)
    }

    /// Pops `values.len()` values of `size` bytes, the first popped first.
    pub(crate) fn pop_into(
        &mut self,
        cpu: &mut CpuState,
        mem: &mut dyn LinearMem,
        values: &mut [u64],
        size: usize,
    ) -> Result<(), Exception> {
        debug_assert!(values.len() <= SLOTS_MAX && size <= 8);
        let total = values.len() * size;
        let mut bytes = [0u8; SLOTS_MAX * 8];
        if let Some(address) = self.contiguous(self.sp, total)? {
            mem.read(cpu, address, &mut bytes[..total], self.access)?;
        } else {
            for (i, slot) in bytes[..total].chunks_exact_mut(size).enumerate() {
                let address = self.linear(self.sp.wrapping_add((i * size) as u64), size)?;
                mem.read(cpu, address, slot, self.access)?;
            }
        }
        for (slot, value) in bytes.chunks_exact(size).zip(values.iter_mut()) {
            let mut wide = [0; 8];
            wide[..size].copy_from_slice(slot);
            *value = u64::from_le_bytes(wide);
        }
        self.skip(total as u64);
        Ok(())
    }

    /// Moves the pointer up without reading.
    pub(crate) fn skip(&mut self, bytes: u64) {
        self.sp = self.sp.wrapping_add(bytes) & self.mask;
    }

    /// Makes the pointer the vCPU's: all of RSP, or only ESP or SP by the stack's size.
    pub(crate) fn apply(&self, cpu: &mut CpuState) {
        let rsp = &mut cpu.gpr[reg::RSP];
        *rsp = match self.mask {
            0xffff => *rsp & !0xffff | self.sp,
            _ => self.sp,
        };
    }

    /// The linear address of a frame that is in one piece, `None` when it wraps within the segment
    /// or the address space.
    fn contiguous(&self, sp: u64, total: usize) -> Result<Option<u64>, Exception> {
        if total == 0 {
            return Ok(None);
        }
        let last = total as u64 - 1;
        if self.mask != u64::MAX {
            let start = self.segment.base.wrapping_add(sp) & 0xffff_ffff;
            if sp + last > self.mask || start + last > 0xffff_ffff {
                return Ok(None);
            }
        }
        self.linear(sp, total).map(Some)
    }

    /// Checks `len` bytes at `offset` against the segment and gives their linear address.
    fn linear(&self, offset: u64, len: usize) -> Result<u64, Exception> {
        let offset = offset & self.mask;
        let last = offset.wrapping_add(len as u64 - 1);
        if self.mask == u64::MAX {
            let inside = canonical(offset) && canonical(last);
            return if inside { Ok(offset) } else { Err(Exception::ss(self.code)) };
        }
        let limit = u64::from(self.segment.limit);
        let inside = if self.segment.typ() & 0b1100 == 0b0100 {
            offset > limit && last <= self.mask
        } else {
            last <= limit
        };
        if !inside || !self.segment.present() {
            return Err(Exception::ss(self.code));
        }
        Ok(self.segment.base.wrapping_add(offset) & 0xffff_ffff)
    }
}

/// The bits of the stack pointer a stack segment uses.
const fn segment_mask(segment: &Segment) -> u64 {
    if segment.attr & Segment::DB != 0 { 0xffff_ffff } else { 0xffff }
}
