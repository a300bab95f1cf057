//! Memory operands: where they shall point, and an addressing form that gets there.

use iced_x86::{Code, CodeSize, Instruction, Mnemonic, OpKind, Register};

use crate::case::Mode;
use crate::generate::Builder;
use crate::generate::registers::RSP;
use crate::layout::{CONST, DATA, HOLE, PAGE, STACK};

/// General registers by hardware number.
pub const GPR64: [Register; 16] = [
    Register::RAX,
    Register::RCX,
    Register::RDX,
    Register::RBX,
    Register::RSP,
    Register::RBP,
    Register::RSI,
    Register::RDI,
    Register::R8,
    Register::R9,
    Register::R10,
    Register::R11,
    Register::R12,
    Register::R13,
    Register::R14,
    Register::R15,
];

/// The lower halves.
pub const GPR32: [Register; 16] = [
    Register::EAX,
    Register::ECX,
    Register::EDX,
    Register::EBX,
    Register::ESP,
    Register::EBP,
    Register::ESI,
    Register::EDI,
    Register::R8D,
    Register::R9D,
    Register::R10D,
    Register::R11D,
    Register::R12D,
    Register::R13D,
    Register::R14D,
    Register::R15D,
];

/// What an access needs.
#[derive(Clone, Copy, Debug)]
pub struct Need {
    /// Bytes.
    pub size: u32,
    /// A misaligned address raises #GP.
    pub aligned: bool,
}

/// Whether a misaligned memory operand of this instruction faults (Intel SDM vol. 1, 14.9 for VEX,
/// vol. 2 of each instruction for SSE).
pub fn must_align(code: Code, size: u32) -> bool {
    let m = code.mnemonic();
    let always = matches!(
        m,
        Mnemonic::Movaps
            | Mnemonic::Movapd
            | Mnemonic::Movdqa
            | Mnemonic::Movntps
            | Mnemonic::Movntpd
            | Mnemonic::Movntdq
            | Mnemonic::Movntdqa
            | Mnemonic::Vmovaps
            | Mnemonic::Vmovapd
            | Mnemonic::Vmovdqa
            | Mnemonic::Vmovntps
            | Mnemonic::Vmovntpd
            | Mnemonic::Vmovntdq
            | Mnemonic::Vmovntdqa
            | Mnemonic::Cmpxchg16b
    );
    let never = matches!(
        m,
        Mnemonic::Movups
            | Mnemonic::Movupd
            | Mnemonic::Movdqu
            | Mnemonic::Lddqu
            | Mnemonic::Pcmpestri
            | Mnemonic::Pcmpestrm
            | Mnemonic::Pcmpistri
            | Mnemonic::Pcmpistrm
    );
    let legacy = code.encoding() == iced_x86::EncodingKind::Legacy;
    always || (legacy && size == 16 && !never)
}

impl Builder<'_> {
    /// Chooses where an access shall go.
    pub fn target(&mut self, need: Need) -> u64 {
        let size = need.size.max(1);
        let base = self.world.base();
        if self.fault_wanted && self.rng.percent(50) {
            self.fault_wanted = false;
            return self.bad_target(size);
        }
        let data = base + u64::from(DATA.offset);
        let span = u64::from(DATA.len() - size.min(DATA.len()));
        let any = self.rng.next_u64() % (span + 1);
        let aligned = any & !(u64::from(size.next_power_of_two()) - 1);
        let roll = self.rng.below(100);
        let need_alignment = need.aligned && self.rng.below(100) >= 2;
        if need_alignment || roll < 50 {
            return data + aligned;
        }
        if roll < 70 {
            return data + any;
        }
        if roll < 85 {
            // Across a page boundary, both pages mapped.
            let boundary = u64::from(PAGE) * u64::from(1 + self.rng.below(DATA.pages - 1));
            return data + boundary - u64::from(self.rng.below(size.min(PAGE)));
        }
        if roll < 92 {
            // Across a cache line.
            return data + (any & !63).min(span & !63) + 64
                - u64::from(self.rng.below(size.min(64)))
                - if any >= span - 64 { 64 } else { 0 };
        }
        if roll < 96 {
            // The last bytes before the hole, or the first of the data.
            return if roll < 94 { data + span } else { data };
        }
        let stack = base + u64::from(STACK.offset);
        stack + u64::from(self.rng.below(STACK.len() - size.min(STACK.len() - 1)))
    }

    /// An address that faults, at least for a write.
    fn bad_target(&mut self, size: u32) -> u64 {
        let base = self.world.base();
        let hole = base + u64::from(HOLE);
        let within = u64::from(self.rng.below(PAGE));
        let part = u64::from(1 + self.rng.below(size.max(2) - 1));
        let kinds = if self.mode == Mode::Bits64 { 9 } else { 6 };
        match self.rng.below(kinds) {
            0 => hole + within,
            // From mapped into unmapped, and the reverse.
            1 => hole - part.min(u64::from(size)),
            2 => base + u64::from(DATA.offset) - part,
            3 => base + u64::from(CONST.offset) + within % u64::from(PAGE - size.min(PAGE - 1)),
            4 => base + u64::from(CONST.offset + PAGE) - part,
            5 => base + u64::from(CONST.offset) - part,
            6 => 0x0000_8000_0000_0000 + within - u64::from(self.rng.below(64)),
            7 => self.rng.next_u64() | 0x4000_0000_0000_0000,
            _ => 0xffff_8000_0000_0000 | (self.rng.next_u64() >> 20),
        }
    }

    /// Sets the memory operand of `ins` so that it addresses `target`. Fails when no addressing
    /// form reaches it with the registers as they are.
    pub fn address(&mut self, ins: &mut Instruction, target: u64) -> Option<()> {
        for _ in 0..12 {
            let saved = self.regs.clone();
            if self.try_address(ins, target).is_some() {
                return Some(());
            }
            self.regs = saved;
        }
        None
    }

    fn try_address(&mut self, ins: &mut Instruction, target: u64) -> Option<()> {
        let wide = self.mode == Mode::Bits64 && !(target < 1 << 32 && self.rng.percent(10));
        let mut offset = target;
        ins.set_segment_prefix(Register::None);
        match self.rng.below(40) {
            0..=1 => {
                ins.set_segment_prefix(Register::FS);
                offset = target.wrapping_sub(self.fs_base?);
            }
            2..=3 => {
                ins.set_segment_prefix(Register::GS);
                offset = target.wrapping_sub(self.gs_base?);
            }
            4 => {
                let of = [Register::CS, Register::DS, Register::ES, Register::SS];
                let segment = self.rng.pick(&of);
                // In compatibility mode a code segment cannot be written.
                if self.mode == Mode::Compat32 && segment == Register::CS {
                    return None;
                }
                ins.set_segment_prefix(segment);
            }
            _ => {}
        }
        if !wide {
            offset &= 0xffff_ffff;
        }
        match self.rng.below(20) {
            0..=1 => self.relative(ins, offset, wide),
            2 => self.absolute(ins, offset, wide),
            _ => self.based(ins, offset, wide),
        }
    }

    fn relative(&mut self, ins: &mut Instruction, offset: u64, wide: bool) -> Option<()> {
        let distance = offset.wrapping_sub(self.world.base()) as i64;
        if self.mode != Mode::Bits64 || distance.unsigned_abs() > 1 << 30 {
            return None;
        }
        ins.set_memory_base(if wide { Register::RIP } else { Register::EIP });
        ins.set_memory_index(Register::None);
        ins.set_memory_displacement64(offset);
        ins.set_memory_displ_size(if wide { 8 } else { 4 });
        Some(())
    }

    fn absolute(&mut self, ins: &mut Instruction, offset: u64, wide: bool) -> Option<()> {
        if wide && i32::try_from(offset as i64).is_err() {
            return None;
        }
        ins.set_memory_base(Register::None);
        ins.set_memory_index(Register::None);
        ins.set_memory_displacement64(offset);
        ins.set_memory_displ_size(if wide { 8 } else { 4 });
        Some(())
    }

    /// Base, base and index, or index alone.
    fn based(&mut self, ins: &mut Instruction, offset: u64, wide: bool) -> Option<()> {
        let count = if self.mode == Mode::Bits64 { 16 } else { 8 };
        let names = if wide { &GPR64 } else { &GPR32 };
        let form = self.rng.below(10);
        let mut index = (form >= 4).then(|| self.rng.below(count) as usize).filter(|i| *i != RSP);
        let mut base = (form < 9 || index.is_none()).then(|| self.base_register(count));
        let mut scale = 1u32 << self.rng.below(4);
        // Neighbours often have the same registers; look-ups are shared between them.
        match self.registers {
            Some(last) if self.rng.percent(40) => (base, index, scale) = last,
            _ => self.registers = Some((base, index, scale)),
        }
        let mut rest = offset;
        if let Some(i) = index {
            if self.regs.free(i) && Some(i) != base {
                let value = self.index_value(wide);
                self.regs.choose(i, value);
            }
            rest = rest.wrapping_sub(self.regs.known(i)?.wrapping_mul(u64::from(scale)));
        }
        if let Some(b) = base.filter(|b| self.regs.free(*b)) {
            let displacement = match self.rng.below(4) {
                0 => 0,
                1 => i64::from(self.rng.next_u64() as i8),
                2 => i64::from(self.rng.next_u64() as i16),
                _ => i64::from(self.rng.next_u64() as i32),
            };
            let times = if index == base { u64::from(scale) + 1 } else { 1 };
            if times != 1 {
                return None;
            }
            let mut value = rest.wrapping_sub(displacement as u64);
            if !wide {
                value = (value & 0xffff_ffff) | (self.rng.next_u64() << 32);
            }
            self.regs.choose(b, value);
        }
        if let Some(b) = base {
            rest = rest.wrapping_sub(self.regs.known(b)?);
        }
        let displacement = if wide { i32::try_from(rest as i64).ok()? } else { rest as u32 as i32 };
        ins.set_memory_base(base.map_or(Register::None, |b| names[b]));
        ins.set_memory_index(index.map_or(Register::None, |i| names[i]));
        ins.set_memory_index_scale(if index.is_some() { scale } else { 1 });
        let stored = if wide { i64::from(displacement) as u64 } else { rest & 0xffff_ffff };
        ins.set_memory_displacement64(stored);
        let short = i8::try_from(displacement).is_ok() && self.rng.percent(85);
        ins.set_memory_displ_size(match (displacement, short, wide) {
            (0, true, _) if base.is_some() => 0,
            (_, true, _) if base.is_some() => 1,
            (_, _, true) => 8,
            _ => 4,
        });
        Some(())
    }

    /// A base register: one that holds an address already, or a free one.
    fn base_register(&mut self, count: u32) -> usize {
        for _ in 0..6 {
            let reg = self.rng.below(count) as usize;
            if self.regs.free(reg) {
                return reg;
            }
            let near = self
                .regs
                .known(reg)
                .is_some_and(|v| v.wrapping_sub(self.world.base()).wrapping_add(1 << 20) < 1 << 22);
            if near {
                return reg;
            }
        }
        self.rng.below(count) as usize
    }

    fn index_value(&mut self, wide: bool) -> u64 {
        match self.rng.below(4) {
            0 => u64::from(self.rng.below(64)),
            1 => 0u64.wrapping_sub(u64::from(self.rng.below(64))),
            2 => u64::from(self.rng.below(1 << 16)),
            _ if wide => i64::from(self.rng.next_u64() as i32 >> 8) as u64,
            _ => self.rng.next_u64(),
        }
    }

    /// A moffs operand: only an absolute address.
    pub fn offset_only(&mut self, ins: &mut Instruction, operand: u32, target: u64) {
        ins.set_op_kind(operand, OpKind::Memory);
        ins.set_memory_base(Register::None);
        ins.set_memory_index(Register::None);
        let narrow = self.mode == Mode::Compat32 || (target < 1 << 32 && self.rng.percent(20));
        ins.set_memory_displacement64(target);
        ins.set_memory_displ_size(if narrow { 4 } else { 8 });
        if narrow {
            ins.set_code_size(CodeSize::Unknown);
        }
    }
}
