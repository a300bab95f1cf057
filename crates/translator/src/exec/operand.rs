//! Operands of instructions that helpers execute.

use berth_x86::paging::{Kind, Rights};
use berth_x86::state::{CodeSize, reg, sreg};
use berth_x86::{Exception, Segment};
use iced_x86::{Instruction, OpKind, Register};

use crate::mem;
use crate::translate::{GuestReg, access_size, segment_of, sreg_index};
use crate::vcpu::Inner;

/// All ones in the low `bytes` bytes.
pub fn mask(bytes: usize) -> u64 {
    if bytes >= 8 { !0 } else { (1 << (bytes * 8)) - 1 }
}

impl Inner {
    /// A general register operand's value.
    pub(super) fn reg(&self, r: Register) -> u64 {
        let Some(g) = GuestReg::of(r) else { return 0 };
        let v = self.area.state.gpr[usize::from(g.n)];
        if g.high { v >> 8 & 0xff } else { v & mask(g.size) }
    }

    /// Writes a general register operand (32-bit writes clear the upper half).
    pub(super) fn set_reg(&mut self, r: Register, value: u64) {
        let Some(g) = GuestReg::of(r) else { return };
        let slot = &mut self.area.state.gpr[usize::from(g.n)];
        *slot = match (g.size, g.high) {
            (1, true) => *slot & !0xff00 | (value & 0xff) << 8,
            (1, false) => *slot & !0xff | value & 0xff,
            (2, _) => *slot & !0xffff | value & 0xffff,
            (4, _) => value & 0xffff_ffff,
            _ => value,
        };
    }

    /// Segment and offset of the memory operand.
    pub(super) fn address(&self, ins: &Instruction) -> (u8, u64) {
        let bits = if self.area.state.code_size() == CodeSize::Bits64 { 64 } else { 32 };
        let seg = segment_of(ins, bits);
        let base = ins.memory_base();
        if base == Register::RIP || base == Register::EIP {
            return (seg, ins.memory_displacement64());
        }
        let mut a = ins.memory_displacement64();
        let mut size = 0;
        if base != Register::None {
            a = a.wrapping_add(self.reg(base));
            size = base.size();
        }
        let index = ins.memory_index();
        if index.is_gpr() {
            a = a.wrapping_add(self.reg(index).wrapping_mul(u64::from(ins.memory_index_scale())));
            size = index.size();
        }
        if size == 0 {
            size = match self.area.state.code_size() {
                CodeSize::Bits64 if ins.memory_displ_size() != 4 => 8,
                CodeSize::Bits64 => 8,
                _ if ins.memory_displ_size() == 2 => 2,
                _ => 4,
            };
        }
        (seg, a & mask(size))
    }

    /// Linear address of an access.
    pub(super) fn linear(
        &self,
        seg: u8,
        offset: u64,
        len: usize,
        write: bool,
    ) -> Result<u64, Exception> {
        mem::linear(&self.area.state, seg, offset, len, write)
    }

    /// Reads memory with the rights of the running code.
    pub(super) fn read_mem(
        &mut self,
        seg: u8,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), Exception> {
        let va = self.linear(seg, offset, buf.len(), false)?;
        self.check_aligned(seg, va, buf.len())?;
        self.read_linear(seg, va, buf)
    }

    /// As [`Inner::read_mem`], for accesses whose alignment is never checked.
    pub(super) fn read_unaligned(
        &mut self,
        seg: u8,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), Exception> {
        let va = self.linear(seg, offset, buf.len(), false)?;
        self.read_linear(seg, va, buf)
    }

    fn read_linear(&mut self, seg: u8, va: u64, buf: &mut [u8]) -> Result<(), Exception> {
        let s = &self.area.state;
        let rights = Rights::explicit(s, Kind::Read);
        let p = self.lin.resolve(s, va, buf.len(), rights, usize::from(seg) == sreg::SS)?;
        self.lin.read_pieces(&p, buf);
        self.lin.watch(&self.area.state, va, buf.len(), false);
        Ok(())
    }

    /// Writes memory with the rights of the running code.
    pub(super) fn write_mem(&mut self, seg: u8, offset: u64, data: &[u8]) -> Result<(), Exception> {
        let va = self.linear(seg, offset, data.len(), true)?;
        self.check_aligned(seg, va, data.len())?;
        self.write_linear(seg, va, data)
    }

    /// As [`Inner::write_mem`], for accesses whose alignment is never checked.
    pub(super) fn write_unaligned(
        &mut self,
        seg: u8,
        offset: u64,
        data: &[u8],
    ) -> Result<(), Exception> {
        let va = self.linear(seg, offset, data.len(), true)?;
        self.write_linear(seg, va, data)
    }

    fn write_linear(&mut self, seg: u8, va: u64, data: &[u8]) -> Result<(), Exception> {
        let s = &self.area.state;
        let rights = Rights::explicit(s, Kind::Write);
        let p = self.lin.resolve(s, va, data.len(), rights, usize::from(seg) == sreg::SS)?;
        self.lin.write_pieces(&p, data);
        self.lin.watch(&self.area.state, va, data.len(), true);
        Ok(())
    }

    /// #GP or #SS for an address that is not canonical, then #AC for one that is not aligned.
    pub(super) fn check_aligned(&self, seg: u8, va: u64, len: usize) -> Result<(), Exception> {
        mem::check_canonical(&self.area.state, va, usize::from(seg) == sreg::SS)?;
        self.check_alignment(va, len)
    }

    fn check_alignment(&self, va: u64, len: usize) -> Result<(), Exception> {
        let aligned = va & (mem::natural_alignment(len) - 1) == 0;
        if !aligned && mem::alignment_checked(&self.area.state) {
            return Err(Exception::ac());
        }
        Ok(())
    }

    /// Reads up to 8 bytes.
    pub(super) fn read_uint(
        &mut self,
        seg: u8,
        offset: u64,
        size: usize,
    ) -> Result<u64, Exception> {
        let mut b = [0u8; 8];
        self.read_mem(seg, offset, &mut b[..size.min(8)])?;
        Ok(u64::from_le_bytes(b))
    }

    /// Writes up to 8 bytes.
    pub(super) fn write_uint(
        &mut self,
        seg: u8,
        offset: u64,
        size: usize,
        value: u64,
    ) -> Result<(), Exception> {
        self.write_mem(seg, offset, &value.to_le_bytes()[..size.min(8)])
    }

    /// Reads operand `i` (register, memory up to 8 bytes, immediate).
    pub(super) fn get(&mut self, ins: &Instruction, i: u32) -> Result<u64, Exception> {
        Ok(match ins.op_kind(i) {
            OpKind::Register => {
                let r = ins.op_register(i);
                if r.is_segment_register() {
                    let n = usize::from(sreg_index(r));
                    u64::from(self.area.state.seg[n].selector)
                } else {
                    self.reg(r)
                }
            }
            OpKind::Memory => {
                let (seg, off) = self.address(ins);
                self.read_uint(seg, off, access_size(ins))?
            }
            _ => ins.try_immediate(i).unwrap_or(0),
        })
    }

    /// Writes operand `i`.
    pub(super) fn set(&mut self, ins: &Instruction, i: u32, value: u64) -> Result<(), Exception> {
        if ins.op_kind(i) == OpKind::Memory {
            let (seg, off) = self.address(ins);
            self.write_uint(seg, off, access_size(ins), value)
        } else {
            self.set_reg(ins.op_register(i), value);
            Ok(())
        }
    }

    /// Bytes of the stack pointer in use.
    pub(super) fn stack_width(&self) -> usize {
        let s = &self.area.state;
        if s.code_size() == CodeSize::Bits64 {
            8
        } else if s.seg[sreg::SS].attr & Segment::DB != 0 {
            4
        } else {
            2
        }
    }

    /// Sets the stack pointer in its width.
    pub(super) fn set_sp(&mut self, value: u64) {
        let m = mask(self.stack_width());
        let sp = &mut self.area.state.gpr[reg::RSP];
        *sp = if m == 0xffff { *sp & !m | value & m } else { value & m };
    }

    /// The stack pointer in its width.
    pub(super) fn sp(&self) -> u64 {
        self.area.state.gpr[reg::RSP] & mask(self.stack_width())
    }

    /// Pushes a value.
    pub(super) fn push(&mut self, value: u64, size: usize) -> Result<(), Exception> {
        let sp = self.sp().wrapping_sub(size as u64) & mask(self.stack_width());
        self.write_uint(sreg::SS as u8, sp, size, value)?;
        self.set_sp(sp);
        Ok(())
    }

    /// Pops a value.
    pub(super) fn pop(&mut self, size: usize) -> Result<u64, Exception> {
        let sp = self.sp();
        let v = self.read_uint(sreg::SS as u8, sp, size)?;
        self.set_sp(sp.wrapping_add(size as u64));
        Ok(v)
    }
}
