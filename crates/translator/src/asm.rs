//! A small assembler for the instructions the translator adds of its own.
//!
//! Guest instructions are re-encoded by iced-x86; what surrounds them (look-ups, register
//! moves, exits) comes from here, because it is emitted several times per guest instruction and a
//! few pushes of bytes are cheaper than a general encoder. Each form is checked against iced's
//! decoder in the tests.

use crate::layout::GUEST_RSP;

/// A memory operand.
#[derive(Clone, Copy, Debug)]
pub struct Mem {
    base: Option<u8>,
    index: Option<u8>,
    scale: u8,
    disp: i32,
    gs: bool,
}

impl Mem {
    /// `gs:[disp]`.
    pub const fn gs(disp: i32) -> Self {
        Self { base: None, index: None, scale: 0, disp, gs: true }
    }
    /// `gs:[index * 8 + disp]`.
    pub const fn gs_index8(index: u8, disp: i32) -> Self {
        Self { base: None, index: Some(index), scale: 3, disp, gs: true }
    }
    /// `[base + disp]`.
    pub const fn base(base: u8, disp: i32) -> Self {
        Self { base: Some(base), index: None, scale: 0, disp, gs: false }
    }
    /// `[base + index << shift + disp]`.
    pub const fn base_index(base: u8, index: u8, shift: u8, disp: i32) -> Self {
        Self { base: Some(base), index: Some(index), scale: shift, disp, gs: false }
    }
    /// `[index << shift + disp]`.
    pub const fn index(index: u8, shift: u8, disp: i32) -> Self {
        Self { base: None, index: Some(index), scale: shift, disp, gs: false }
    }
}

/// A forward JRCXZ to be bound within 127 bytes.
#[derive(Clone, Copy, Debug)]
pub struct Short(usize);

/// A 32-bit relative jump or call to be bound.
#[derive(Clone, Copy, Debug)]
pub struct Near(usize);

/// Bytes being assembled.
#[derive(Default)]
pub struct Asm {
    /// What has been emitted.
    pub buf: Vec<u8>,
    /// Offset of the first byte of the buffer: code in two buffers may share one numbering.
    start: usize,
    /// Offsets behind displacements that lead to fixed host addresses.
    pub absolute: Vec<u32>,
    /// Offsets behind displacements that lead to the other buffer.
    pub across: Vec<u32>,
}

#[allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "encoding takes numbers apart"
)]
impl Asm {
    /// Empties the buffer; its first byte gets an offset.
    pub fn restart(&mut self, start: usize) {
        self.buf.clear();
        self.absolute.clear();
        self.across.clear();
        self.start = start;
    }

    /// Current offset.
    pub fn pos(&self) -> usize {
        self.start + self.buf.len()
    }

    /// Whether the buffer holds the displacement of a jump.
    pub fn holds(&self, n: Near) -> bool {
        (self.start + 4..=self.pos()).contains(&n.0)
    }

    /// Appends raw bytes.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.buf.extend_from_slice(bytes);
    }

    fn modrm_mem(&mut self, reg: u8, m: &Mem) {
        let reg = (reg & 7) << 3;
        match (m.base, m.index) {
            (None, index) => {
                // SIB without base: mod 00, base 101, always disp32.
                let idx = index.map_or(4, |i| i & 7);
                self.bytes(&[reg | 4, (m.scale << 6) | (idx << 3) | 5]);
                self.bytes(&m.disp.to_le_bytes());
            }
            (Some(base), index) => {
                let short = i8::try_from(m.disp).ok();
                let md = match short {
                    Some(0) if base & 7 != 5 => 0x00,
                    Some(_) => 0x40,
                    None => 0x80,
                };
                if let Some(i) = index {
                    self.bytes(&[md | reg | 4, (m.scale << 6) | ((i & 7) << 3) | (base & 7)]);
                } else if base & 7 == 4 {
                    self.bytes(&[md | reg | 4, 0x24]);
                } else {
                    self.bytes(&[md | reg | (base & 7)]);
                }
                match md {
                    0x40 => self.buf.push(m.disp as u8),
                    0x80 => self.bytes(&m.disp.to_le_bytes()),
                    _ => {}
                }
            }
        }
    }

    fn rex(&mut self, w: bool, reg: u8, m: &Mem, force: bool) {
        let b = 0x40
            | (u8::from(w) << 3)
            | ((reg >> 3) << 2)
            | ((m.index.unwrap_or(0) >> 3) << 1)
            | (m.base.unwrap_or(0) >> 3);
        if b != 0x40 || force {
            self.buf.push(b);
        }
    }

    /// An instruction `opcode reg, m` (or `m, reg`) with one register and one memory operand.
    pub fn op_mem(&mut self, w: bool, opcode: &[u8], reg: u8, m: &Mem) {
        if m.gs {
            self.buf.push(0x65);
        }
        self.rex(w, reg, m, false);
        self.bytes(opcode);
        self.modrm_mem(reg, m);
    }

    /// An instruction with two registers, `reg` in ModRM.reg and `rm` in ModRM.rm.
    pub fn op_reg(&mut self, w: bool, opcode: &[u8], reg: u8, rm: u8) {
        let b = 0x40 | (u8::from(w) << 3) | ((reg >> 3) << 2) | (rm >> 3);
        if b != 0x40 {
            self.buf.push(b);
        }
        self.bytes(opcode);
        self.buf.push(0xc0 | ((reg & 7) << 3) | (rm & 7));
    }

    /// `mov dst, m` (64 bits).
    pub fn load(&mut self, dst: u8, m: &Mem) {
        self.op_mem(true, &[0x8b], dst, m);
    }
    /// `mov m, src` (64 bits).
    pub fn store(&mut self, m: &Mem, src: u8) {
        self.op_mem(true, &[0x89], src, m);
    }
    /// `mov qword m, imm32` (sign-extended).
    pub fn store_imm(&mut self, m: &Mem, imm: i32) {
        self.op_mem(true, &[0xc7], 0, m);
        self.bytes(&imm.to_le_bytes());
    }
    /// `lea dst, m` (64 bits).
    pub fn lea(&mut self, dst: u8, m: &Mem) {
        self.op_mem(true, &[0x8d], dst, m);
    }
    /// `lea dst32, m`.
    pub fn lea32(&mut self, dst: u8, m: &Mem) {
        self.op_mem(false, &[0x8d], dst, m);
    }
    /// `mov dst, src` (64 bits).
    pub fn mov(&mut self, dst: u8, src: u8) {
        self.op_reg(true, &[0x8b], dst, src);
    }
    /// `mov dst32, src32`.
    pub fn mov32(&mut self, dst: u8, src: u8) {
        self.op_reg(false, &[0x8b], dst, src);
    }
    /// `not r` (no flags).
    pub fn not(&mut self, r: u8) {
        self.op_reg(true, &[0xf7], 2, r);
    }
    /// `movzx dst32, src16`.
    pub fn movzx16(&mut self, dst: u8, src: u8) {
        self.op_reg(false, &[0x0f, 0xb7], dst, src);
    }
    /// `movsxd dst, src32`.
    pub fn movsxd(&mut self, dst: u8, src: u8) {
        self.op_reg(true, &[0x63], dst, src);
    }
    /// `movsx dst, src16` (to 64 bits).
    pub fn movsx16(&mut self, dst: u8, src: u8) {
        self.op_reg(true, &[0x0f, 0xbf], dst, src);
    }
    /// `mov dst, imm` by the shortest form.
    pub fn mov_imm(&mut self, dst: u8, imm: u64) {
        if let Ok(small) = u32::try_from(imm) {
            if dst >= 8 {
                self.buf.push(0x41);
            }
            self.buf.push(0xb8 | (dst & 7));
            self.bytes(&small.to_le_bytes());
        } else if let Ok(sx) = i32::try_from(imm as i64) {
            self.bytes(&[0x48 | (dst >> 3), 0xc7, 0xc0 | (dst & 7)]);
            self.bytes(&sx.to_le_bytes());
        } else {
            self.bytes(&[0x48 | (dst >> 3), 0xb8 | (dst & 7)]);
            self.bytes(&imm.to_le_bytes());
        }
    }
    /// `rorx dst, src, imm` (BMI2; no flags).
    pub fn rorx(&mut self, dst: u8, src: u8, imm: u8) {
        // VEX.LZ.F2.0F3A.W1 F0 /r ib
        self.bytes(&[
            0xc4,
            (u8::from(dst < 8) << 7) | (1 << 6) | (u8::from(src < 8) << 5) | 3,
            0x80 | (0xf << 3) | 3,
            0xf0,
            0xc0 | ((dst & 7) << 3) | (src & 7),
            imm,
        ]);
    }
    /// `pext dst, src, gs:[disp]` (BMI2; no flags).
    pub fn pext_gs(&mut self, dst: u8, src: u8, disp: i32) {
        // VEX.LZ.F3.0F38.W1 F5 /r
        self.bytes(&[
            0x65,
            0xc4,
            (u8::from(dst < 8) << 7) | (1 << 6) | (1 << 5) | 2,
            0x80 | ((!src & 0xf) << 3) | 2,
            0xf5,
        ]);
        self.modrm_mem(dst, &Mem::gs(disp));
    }
    /// `pdep dst, src, gs:[disp]` (BMI2; no flags).
    pub fn pdep_gs(&mut self, dst: u8, src: u8, disp: i32) {
        // VEX.LZ.F2.0F38.W1 F5 /r
        self.bytes(&[
            0x65,
            0xc4,
            (u8::from(dst < 8) << 7) | (1 << 6) | (1 << 5) | 2,
            0x80 | ((!src & 0xf) << 3) | 3,
            0xf5,
        ]);
        self.modrm_mem(dst, &Mem::gs(disp));
    }
    /// `wrgsbase src`.
    pub fn wrgsbase(&mut self, src: u8) {
        self.bytes(&[0xf3, 0x48 | (src >> 3), 0x0f, 0xae, 0xd8 | (src & 7)]);
    }
    /// `mov dst32, m`.
    pub fn load32(&mut self, dst: u8, m: &Mem) {
        self.op_mem(false, &[0x8b], dst, m);
    }
    /// `movzx dst32, word m`.
    pub fn load16(&mut self, dst: u8, m: &Mem) {
        self.op_mem(false, &[0x0f, 0xb7], dst, m);
    }
    /// `mov dword m, imm32`.
    pub fn store_imm32(&mut self, m: &Mem, imm: u32) {
        self.op_mem(false, &[0xc7], 0, m);
        self.bytes(&imm.to_le_bytes());
    }
    /// `sarx dst, src, count` (BMI2; no flags).
    pub fn sarx(&mut self, dst: u8, src: u8, count: u8) {
        // VEX.LZ.F3.0F38.W1 F7 /r
        self.bytes(&[
            0xc4,
            (u8::from(dst < 8) << 7) | (1 << 6) | (u8::from(src < 8) << 5) | 2,
            0x80 | ((!count & 0xf) << 3) | 2,
            0xf7,
            0xc0 | ((dst & 7) << 3) | (src & 7),
        ]);
    }
    /// `vmovdqu m, ymm`.
    pub fn store_ymm(&mut self, m: &Mem, ymm: u8) {
        self.ymm(0x7f, m, ymm);
    }
    /// `vmovdqu ymm, m`.
    pub fn load_ymm(&mut self, ymm: u8, m: &Mem) {
        self.ymm(0x6f, m, ymm);
    }
    fn ymm(&mut self, opcode: u8, m: &Mem, ymm: u8) {
        debug_assert!(m.base.is_none() && m.index.is_none());
        if m.gs {
            self.buf.push(0x65);
        }
        // VEX.256.F3.0F
        self.bytes(&[0xc5, (u8::from(ymm < 8) << 7) | (0xf << 3) | (1 << 2) | 2, opcode]);
        self.modrm_mem(ymm, m);
    }

    /// `jrcxz` forward.
    pub fn jrcxz(&mut self) -> Short {
        self.bytes(&[0xe3, 0]);
        Short(self.pos())
    }
    /// Binds a JRCXZ to the current position; `false` when it is too far.
    #[must_use]
    pub fn bind_short(&mut self, s: Short) -> bool {
        let d = self.pos() - s.0;
        let ok = d <= 127;
        if ok && let Some(b) = self.buf.get_mut(s.0 - 1 - self.start) {
            *b = d as u8;
        }
        ok
    }
    /// `jrcxz` back to an offset at most 126 bytes away; `false` when it is too far.
    #[must_use]
    pub fn jrcxz_to(&mut self, target: usize) -> bool {
        let d = i8::try_from(target as i64 - (self.pos() as i64 + 2));
        self.bytes(&[0xe3, d.unwrap_or(0) as u8]);
        d.is_ok()
    }
    /// `jmp rel32` forward, unless RCX is zero.
    pub fn jmp_unless_zero(&mut self) -> Near {
        let zero = self.jrcxz();
        let jump = self.jmp();
        let ok = self.bind_short(zero);
        debug_assert!(ok);
        jump
    }
    /// Distance from a pending JRCXZ to the current position.
    pub fn distance(&self, s: Short) -> usize {
        self.pos() - s.0
    }
    /// `jmp rel32` forward.
    pub fn jmp(&mut self) -> Near {
        self.bytes(&[0xe9, 0, 0, 0, 0]);
        Near(self.pos())
    }
    /// `call rel32` forward.
    pub fn call(&mut self) -> Near {
        self.bytes(&[0xe8, 0, 0, 0, 0]);
        Near(self.pos())
    }
    /// `jcc rel32` forward, `cc` 0 to 15.
    pub fn jcc(&mut self, cc: u8) -> Near {
        self.bytes(&[0x0f, 0x80 | cc, 0, 0, 0, 0]);
        Near(self.pos())
    }
    /// `jmp rel32` to an offset in this buffer.
    pub fn jmp_to(&mut self, target: usize) {
        let n = self.jmp();
        self.bind_near_to(n, target);
    }
    /// Binds a near jump to the current position.
    pub fn bind_near(&mut self, n: Near) {
        let pos = self.pos();
        self.bind_near_to(n, pos);
    }
    /// Binds a near jump to an offset.
    pub fn bind_near_to(&mut self, n: Near, target: usize) {
        let rel = (target as i64 - n.0 as i64) as i32;
        if target < self.start || target > self.pos() {
            self.across.push(n.0 as u32);
        }
        let at = n.0 - self.start;
        self.buf[at - 4..at].copy_from_slice(&rel.to_le_bytes());
    }
    /// `jmp` or `call` to an absolute host address, given the address this buffer will be at.
    pub fn near_abs(&mut self, opcode: u8, target: u64, buffer_at: u64) {
        let next = buffer_at.wrapping_add(self.pos() as u64 + 5);
        self.buf.push(opcode);
        self.bytes(&(target.wrapping_sub(next) as u32).to_le_bytes());
        self.absolute.push(self.pos() as u32);
    }
    /// `jmp m`.
    pub fn jmp_mem(&mut self, m: &Mem) {
        self.op_mem(false, &[0xff], 4, m);
    }
    /// `push r`.
    pub fn push(&mut self, r: u8) {
        if r >= 8 {
            self.buf.push(0x41);
        }
        self.buf.push(0x50 | (r & 7));
    }
    /// `pop r`.
    pub fn pop(&mut self, r: u8) {
        if r >= 8 {
            self.buf.push(0x41);
        }
        self.buf.push(0x58 | (r & 7));
    }
    /// `pushfq`.
    pub fn pushfq(&mut self) {
        self.buf.push(0x9c);
    }
    /// `push m`.
    pub fn push_mem(&mut self, m: &Mem) {
        self.op_mem(false, &[0xff], 6, m);
    }
    /// `pop m`.
    pub fn pop_mem(&mut self, m: &Mem) {
        self.op_mem(false, &[0x8f], 0, m);
    }
    /// `call r`.
    pub fn call_reg(&mut self, r: u8) {
        self.op_reg(false, &[0xff], 2, r);
    }
    /// `ret`.
    pub fn ret(&mut self) {
        self.buf.push(0xc3);
    }
    /// Adds to the guest's RSP (no flags).
    pub fn add_guest_rsp(&mut self, n: i32) {
        self.lea(GUEST_RSP, &Mem::base(GUEST_RSP, n));
    }
}

#[cfg(test)]
#[path = "asm_tests.rs"]
mod tests;
