//! Operands of ordinary instructions, by the kinds iced-x86 lists for an encoding.

use iced_x86::{Code, Instruction, Mnemonic, OpCodeOperandKind, OpKind, Register};

use crate::case::Mode;
use crate::generate::Builder;
use crate::generate::memory::{GPR32, GPR64, Need, must_align};
use crate::layout::DATA;
use crate::values;

const GPR16: [Register; 16] = [
    Register::AX,
    Register::CX,
    Register::DX,
    Register::BX,
    Register::SP,
    Register::BP,
    Register::SI,
    Register::DI,
    Register::R8W,
    Register::R9W,
    Register::R10W,
    Register::R11W,
    Register::R12W,
    Register::R13W,
    Register::R14W,
    Register::R15W,
];

/// Without REX the numbers 4 to 7 are the high bytes, with REX the low bytes of SP, BP, SI, DI.
const GPR8: [Register; 20] = [
    Register::AL,
    Register::CL,
    Register::DL,
    Register::BL,
    Register::AH,
    Register::CH,
    Register::DH,
    Register::BH,
    Register::SPL,
    Register::BPL,
    Register::SIL,
    Register::DIL,
    Register::R8L,
    Register::R9L,
    Register::R10L,
    Register::R11L,
    Register::R12L,
    Register::R13L,
    Register::R14L,
    Register::R15L,
];

/// What one operand becomes.
enum Choice {
    Register(Register),
    Memory,
    Vsib { vector: Register, lanes32: bool },
    Implicit(OpKind),
    Immediate(OpKind),
    Offset,
    Unsupported,
}

impl Builder<'_> {
    fn gpr(&mut self, of: &[Register]) -> Register {
        let limit = if self.mode == Mode::Bits64 { of.len() } else { 8 };
        // The stack pointer as an operand mostly spoils the rest of the sequence.
        loop {
            let reg = of[self.rng.below(limit as u32) as usize];
            if reg.full_register() != Register::RSP && reg.full_register32() != Register::ESP
                || self.rng.percent(8)
            {
                return reg;
            }
        }
    }

    fn numbered(&mut self, first: Register, count: u32) -> Register {
        let count = if self.mode == Mode::Bits64 { count } else { 8 };
        first + self.rng.below(count)
    }

    fn choose(&mut self, kind: OpCodeOperandKind) -> Choice {
        use OpCodeOperandKind as K;
        let memory = self.rng.percent(60) && !self.no_memory;
        let wide = self.mode == Mode::Bits64;
        let implicit = |k64, k32| Choice::Implicit(if wide { k64 } else { k32 });
        match kind {
            K::mem => Choice::Memory,
            K::mem_offs => Choice::Offset,
            K::r8_or_mem
            | K::r16_or_mem
            | K::r32_or_mem
            | K::r64_or_mem
            | K::mm_or_mem
            | K::xmm_or_mem
            | K::ymm_or_mem
                if memory =>
            {
                Choice::Memory
            }
            K::mem_vsib32x => {
                Choice::Vsib { vector: self.numbered(Register::XMM0, 16), lanes32: true }
            }
            K::mem_vsib64x => {
                Choice::Vsib { vector: self.numbered(Register::XMM0, 16), lanes32: false }
            }
            K::mem_vsib32y => {
                Choice::Vsib { vector: self.numbered(Register::YMM0, 16), lanes32: true }
            }
            K::mem_vsib64y => {
                Choice::Vsib { vector: self.numbered(Register::YMM0, 16), lanes32: false }
            }
            K::r8_or_mem | K::r8_reg | K::r8_opcode => Choice::Register(self.gpr(&GPR8)),
            K::r16_or_mem | K::r16_reg | K::r16_rm | K::r16_opcode => {
                Choice::Register(self.gpr(&GPR16))
            }
            K::r32_or_mem | K::r32_reg | K::r32_rm | K::r32_opcode | K::r32_vvvv => {
                Choice::Register(self.gpr(&GPR32))
            }
            K::r64_or_mem | K::r64_reg | K::r64_rm | K::r64_opcode | K::r64_vvvv => {
                Choice::Register(self.gpr(&GPR64))
            }
            K::mm_or_mem | K::mm_reg | K::mm_rm => {
                Choice::Register(Register::MM0 + self.rng.below(8))
            }
            K::xmm_or_mem | K::xmm_reg | K::xmm_rm | K::xmm_vvvv | K::xmm_is4 | K::xmm_is5 => {
                Choice::Register(self.numbered(Register::XMM0, 16))
            }
            K::ymm_or_mem | K::ymm_reg | K::ymm_rm | K::ymm_vvvv | K::ymm_is4 | K::ymm_is5 => {
                Choice::Register(self.numbered(Register::YMM0, 16))
            }
            K::es => Choice::Register(Register::ES),
            K::cs => Choice::Register(Register::CS),
            K::ss => Choice::Register(Register::SS),
            K::ds => Choice::Register(Register::DS),
            K::fs => Choice::Register(Register::FS),
            K::gs => Choice::Register(Register::GS),
            K::seg_reg => {
                let of = [Register::ES, Register::CS, Register::SS, Register::DS];
                Choice::Register(self.rng.pick(&of))
            }
            K::cr_reg => Choice::Register(self.rng.pick(&[Register::CR0, Register::CR3])),
            K::dr_reg => Choice::Register(self.rng.pick(&[Register::DR0, Register::DR7])),
            K::al => Choice::Register(Register::AL),
            K::cl => Choice::Register(Register::CL),
            K::ax => Choice::Register(Register::AX),
            K::dx => Choice::Register(Register::DX),
            K::eax => Choice::Register(Register::EAX),
            K::rax => Choice::Register(Register::RAX),
            K::st0 => Choice::Register(Register::ST0),
            K::sti_opcode => Choice::Register(Register::ST0 + self.rng.below(8)),
            K::imm8 => Choice::Immediate(OpKind::Immediate8),
            K::imm8_const_1 => Choice::Immediate(OpKind::Immediate8),
            K::imm8sex16 => Choice::Immediate(OpKind::Immediate8to16),
            K::imm8sex32 => Choice::Immediate(OpKind::Immediate8to32),
            K::imm8sex64 => Choice::Immediate(OpKind::Immediate8to64),
            K::imm16 => Choice::Immediate(OpKind::Immediate16),
            K::imm32 => Choice::Immediate(OpKind::Immediate32),
            K::imm32sex64 => Choice::Immediate(OpKind::Immediate32to64),
            K::imm64 => Choice::Immediate(OpKind::Immediate64),
            K::seg_rSI => implicit(OpKind::MemorySegRSI, OpKind::MemorySegESI),
            K::es_rDI => implicit(OpKind::MemoryESRDI, OpKind::MemoryESEDI),
            K::seg_rDI => implicit(OpKind::MemorySegRDI, OpKind::MemorySegEDI),
            K::seg_rBX_al => Choice::Implicit(OpKind::Memory),
            _ => Choice::Unsupported,
        }
    }

    /// An instruction with operands chosen; `None` when this encoding cannot be made now.
    pub fn operands(&mut self, code: Code) -> Option<Instruction> {
        let info = code.op_code();
        let mut ins = Instruction::default();
        ins.set_code(code);
        let mut memory = false;
        let mut second_immediate = false;
        for i in 0..info.op_count() {
            let kind = info.op_kind(i);
            match self.choose(kind) {
                Choice::Register(reg) => {
                    ins.set_op_kind(i, OpKind::Register);
                    ins.set_op_register(i, reg);
                }
                Choice::Memory => {
                    ins.set_op_kind(i, OpKind::Memory);
                    memory = true;
                }
                Choice::Vsib { vector, lanes32 } => {
                    if self.no_memory {
                        return None;
                    }
                    ins.set_op_kind(i, OpKind::Memory);
                    self.vsib(&mut ins, vector, lanes32)?;
                }
                Choice::Implicit(op) => {
                    if self.no_memory {
                        return None;
                    }
                    ins.set_op_kind(i, op);
                    if kind == OpCodeOperandKind::seg_rBX_al {
                        let wide = self.mode == Mode::Bits64;
                        ins.set_memory_base(if wide { Register::RBX } else { Register::EBX });
                        ins.set_memory_index(Register::AL);
                    }
                }
                Choice::Immediate(op) if kind == OpCodeOperandKind::imm8_const_1 => {
                    ins.set_op_kind(i, op);
                    ins.set_immediate8(1);
                }
                Choice::Immediate(op) => {
                    let op = if second_immediate { OpKind::Immediate8_2nd } else { op };
                    self.immediate(&mut ins, i, op);
                    second_immediate = true;
                }
                Choice::Offset => {
                    if self.no_memory {
                        return None;
                    }
                    let size = info.memory_size().size() as u32;
                    let target = self.target(Need { size, aligned: false });
                    self.offset_only(&mut ins, i, target);
                }
                Choice::Unsupported => return None,
            }
        }
        if memory {
            self.memory(&mut ins)?;
        }
        self.unique_registers(&ins)?;
        Some(ins)
    }

    fn memory(&mut self, ins: &mut Instruction) -> Option<()> {
        if self.no_memory {
            return None;
        }
        let size = match ins.memory_size().size() as u32 {
            // Sizes iced-x86 does not state: prefetches, save areas.
            0 => 64,
            size => size,
        };
        let need = Need { size, aligned: must_align(ins.code(), size) };
        let target = self.target(need);
        self.address(ins, target)?;
        if self.rng.percent(30) {
            let mut data = values::vector(&mut self.rng).to_vec();
            if ins.memory_size() == iced_x86::MemorySize::Float80 {
                data[..10].copy_from_slice(&values::extended(&mut self.rng));
            }
            data.truncate(size.min(32) as usize);
            self.patch(target, data);
        }
        Some(())
    }

    /// A gather: an index vector nobody has used yet gets small indices.
    fn vsib(&mut self, ins: &mut Instruction, vector: Register, lanes32: bool) -> Option<()> {
        let number = vector.number();
        if self.vectors_used & (1 << number) != 0 {
            return None;
        }
        let scale = 1 << self.rng.below(4);
        let mut lanes = [0u8; 32];
        let step = if lanes32 { 4 } else { 8 };
        for lane in lanes.chunks_exact_mut(step) {
            let value = u64::from(self.rng.below(0x2000 / scale));
            lane.copy_from_slice(&value.to_le_bytes()[..step]);
        }
        let count = if self.mode == Mode::Bits64 { 16 } else { 8 };
        let base = self.rng.below(count) as usize;
        if !self.regs.free(base) {
            return None;
        }
        let data = self.world.base() + u64::from(DATA.offset) + u64::from(self.rng.below(0x1000));
        let displacement = i64::from(self.rng.next_u64() as i8);
        self.regs.choose(base, data.wrapping_sub(displacement as u64));
        let wide = self.mode == Mode::Bits64;
        ins.set_memory_base(if wide { GPR64[base] } else { GPR32[base] });
        ins.set_memory_index(vector);
        ins.set_memory_index_scale(scale);
        let stored = if wide { displacement as u64 } else { displacement as u64 & 0xffff_ffff };
        ins.set_memory_displacement64(stored);
        ins.set_memory_displ_size(1);
        self.set_vector(number, &lanes);
        Some(())
    }

    fn immediate(&mut self, ins: &mut Instruction, operand: u32, op: OpKind) {
        let mut value = values::integer(&mut self.rng);
        let shift = matches!(
            ins.mnemonic(),
            Mnemonic::Rol
                | Mnemonic::Ror
                | Mnemonic::Rcl
                | Mnemonic::Rcr
                | Mnemonic::Shl
                | Mnemonic::Sal
                | Mnemonic::Shr
                | Mnemonic::Sar
        );
        if shift && self.rng.percent(70) {
            value &= 0x1f;
        }
        if matches!(ins.mnemonic(), Mnemonic::Shld | Mnemonic::Shrd)
            && ins.op0_kind() == OpKind::Register
            && ins.op0_register().is_gpr16()
        {
            // Larger counts leave the destination undefined (Intel SDM, SHLD).
            value &= 0xf;
        }
        if ins.mnemonic() == Mnemonic::Enter && op == OpKind::Immediate16 {
            value &= 0x7f;
        }
        if ins.mnemonic() == Mnemonic::Enter && op == OpKind::Immediate8_2nd {
            value &= 3;
        }
        if ins.mnemonic() == Mnemonic::Int && value as u8 == 0x80 {
            value = 0x81;
        }
        ins.set_op_kind(operand, op);
        match op {
            OpKind::Immediate8_2nd => ins.set_immediate8_2nd(value as u8),
            OpKind::Immediate8 => ins.set_immediate8(value as u8),
            OpKind::Immediate16 => ins.set_immediate16(value as u16),
            OpKind::Immediate32 => ins.set_immediate32(value as u32),
            OpKind::Immediate64 => ins.set_immediate64(value),
            OpKind::Immediate32to64 => ins.set_immediate32to64(i64::from(value as i32)),
            OpKind::Immediate8to16 => ins.set_immediate8to16(i16::from(value as i8)),
            OpKind::Immediate8to32 => ins.set_immediate8to32(i32::from(value as i8)),
            _ => ins.set_immediate8to64(i64::from(value as i8)),
        }
    }

    /// Gathers whose registers coincide raise #UD; keep a few.
    fn unique_registers(&mut self, ins: &Instruction) -> Option<()> {
        if !ins.is_vsib() {
            return Some(());
        }
        let numbers =
            [ins.op0_register().number(), ins.memory_index().number(), ins.op2_register().number()];
        let unique =
            numbers[0] != numbers[1] && numbers[1] != numbers[2] && numbers[0] != numbers[2];
        (unique || (self.fault_wanted && self.rng.percent(20))).then_some(())
    }
}
