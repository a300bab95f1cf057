//! Branches, calls, returns and string instructions.

use iced_x86::{Code, FlowControl, Instruction, OpCodeOperandKind, OpKind, Register};

use crate::case::Mode;
use crate::generate::Builder;
use crate::generate::assemble::{Item, Label};
use crate::generate::memory::{GPR32, GPR64, Need};
use crate::generate::registers::RSP;
use crate::layout::DATA;

impl Builder<'_> {
    /// A label that will stand after some more instructions, or at the end.
    pub fn label_ahead(&mut self) -> Label {
        let label = Label(self.labels.len());
        self.labels.push(usize::MAX);
        let distance = 1 + self.rng.below(4);
        self.pending.push((label, distance));
        label
    }

    /// A label before the next instruction.
    pub fn label_here(&mut self) -> Label {
        let label = Label(self.labels.len());
        self.labels.push(self.items.len());
        label
    }

    /// Undefined flags must not meet defined ones where paths join.
    pub fn settle_flags(&mut self) {
        if self.undefined != 0 {
            self.define_flags();
        }
    }

    /// A near branch, call or return whose target is in the sequence.
    pub fn branch(&mut self, code: Code) -> Option<()> {
        self.settle_flags();
        match code.flow_control() {
            FlowControl::Return => self.ret(code),
            FlowControl::IndirectBranch | FlowControl::IndirectCall => self.indirect(code),
            FlowControl::ConditionalBranch
            | FlowControl::UnconditionalBranch
            | FlowControl::Call => {
                let mut ins = Instruction::default();
                ins.set_code(code);
                let kind = match code.op_code().op_kind(0) {
                    OpCodeOperandKind::br64_1 | OpCodeOperandKind::br64_4 => OpKind::NearBranch64,
                    OpCodeOperandKind::br32_1 | OpCodeOperandKind::br32_4 => OpKind::NearBranch32,
                    _ => return None,
                };
                ins.set_op0_kind(kind);
                if code.is_loop() || code.is_loopcc() || code.is_jcx_short() {
                    let few = u64::from(self.rng.below(3));
                    if self.regs.free(1) {
                        self.regs.choose(1, few);
                    }
                }
                self.push(ins, None, None)
            }
            _ => None,
        }
    }

    /// Emits a branch; without a label it goes ahead.
    fn push(&mut self, ins: Instruction, branch: Option<Label>, prefix: Option<u8>) -> Option<()> {
        let mut item = Item::from(ins);
        item.prefixes.extend(prefix);
        let near = matches!(ins.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32);
        // The distance counts from the instruction after the branch.
        self.emit(item)?;
        if near {
            let label = branch.unwrap_or_else(|| self.label_ahead());
            self.items.last_mut()?.branch = Some(label);
        }
        Some(())
    }

    /// Jump or call through a register or through memory.
    fn indirect(&mut self, code: Code) -> Option<()> {
        let mut ins = Instruction::default();
        ins.set_code(code);
        let wide = self.mode == Mode::Bits64;
        if self.rng.percent(50) {
            let mut reg = self.rng.below(if wide { 16 } else { 8 }) as usize;
            if reg == RSP {
                reg = 3;
            }
            let label = self.load_label(reg)?;
            ins.set_op0_kind(OpKind::Register);
            ins.set_op0_register(if wide { GPR64[reg] } else { GPR32[reg] });
            self.emit(Item::from(ins))?;
            self.place_ahead(label);
            return Some(());
        }
        if self.no_memory {
            return None;
        }
        let size = if wide { 8 } else { 4 };
        let slots = (DATA.len() - 8) / 8;
        let mut target = self.target(Need { size, aligned: false });
        if self.world.image_offset(target, size).is_none() && self.rng.percent(50) {
            let slot = 8 * self.rng.below(slots);
            target = self.world.base() + u64::from(DATA.offset + slot);
        }
        ins.set_op0_kind(OpKind::Memory);
        self.address(&mut ins, target)?;
        let label = Label(self.labels.len());
        self.labels.push(usize::MAX);
        if let Some(offset) = self.world.image_offset(target, size) {
            self.pointers.push((offset, label));
        }
        self.emit(Item::from(ins))?;
        self.place_ahead(label);
        Some(())
    }

    /// Loads a register with the address of a new label (placed by [`Self::place_ahead`]).
    fn load_label(&mut self, reg: usize) -> Option<Label> {
        let label = Label(self.labels.len());
        self.labels.push(usize::MAX);
        let mut ins = Instruction::default();
        ins.set_op0_kind(OpKind::Register);
        let mut item;
        if self.mode == Mode::Bits64 && self.rng.percent(50) {
            ins.set_code(Code::Lea_r64_m);
            ins.set_op0_register(GPR64[reg]);
            ins.set_op1_kind(OpKind::Memory);
            ins.set_memory_base(Register::RIP);
            ins.set_memory_displ_size(8);
            item = Item::from(ins);
            item.memory = Some((label, 0));
        } else {
            let wide = self.mode == Mode::Bits64;
            ins.set_code(if wide { Code::Mov_r64_imm64 } else { Code::Mov_r32_imm32 });
            ins.set_op0_register(if wide { GPR64[reg] } else { GPR32[reg] });
            ins.set_op1_kind(if wide { OpKind::Immediate64 } else { OpKind::Immediate32 });
            item = Item::from(ins);
            item.immediate = Some(label);
        }
        self.emit(item)?;
        Some(label)
    }

    fn place_ahead(&mut self, label: Label) {
        let distance = 1 + self.rng.below(4);
        self.pending.push((label, distance));
    }

    /// Pushes a label's address and returns to it.
    fn ret(&mut self, code: Code) -> Option<()> {
        let mut reg = self.rng.below(8) as usize;
        if reg == RSP {
            reg = 0;
        }
        let label = self.load_label(reg)?;
        let wide = self.mode == Mode::Bits64;
        let mut push = Instruction::default();
        push.set_code(if wide { Code::Push_r64 } else { Code::Push_r32 });
        push.set_op0_kind(OpKind::Register);
        push.set_op0_register(if wide { GPR64[reg] } else { GPR32[reg] });
        self.emit(Item::from(push))?;
        let mut ins = Instruction::default();
        ins.set_code(code);
        if code.op_code().op_count() == 1 {
            ins.set_op0_kind(OpKind::Immediate16);
            ins.set_immediate16(8 * self.rng.below(8) as u16);
        }
        self.emit(Item::from(ins))?;
        self.place_ahead(label);
        Some(())
    }

    /// A string instruction with its pointers and a bounded count.
    pub fn text(&mut self, code: Code) -> Option<()> {
        const RCX: usize = 1;
        const RSI: usize = 6;
        const RDI: usize = 7;
        if self.no_memory {
            return None;
        }
        let info = code.op_code();
        let mut ins = Instruction::default();
        ins.set_code(code);
        let narrow = self.mode == Mode::Compat32
            || (self.world == crate::layout::World::Low && self.rng.percent(10));
        let element = info.memory_size().size() as u32;
        let repeated = info.can_use_rep_prefix() && self.rng.percent(65);
        let count = match self.rng.below(10) {
            0 => 0,
            1 => self.rng.below(400),
            // Up to three pages and a bit: the end of the data is often on the way.
            2 => self.rng.below((3 * crate::layout::PAGE + 64) / element.max(1)),
            _ => self.rng.below(20),
        };
        // With a count of zero, whether the upper halves are cleared differs by processor.
        let dirty = narrow && self.mode == Mode::Bits64 && !(repeated && count == 0);
        for i in 0..info.op_count() {
            let kind = match info.op_kind(i) {
                OpCodeOperandKind::seg_rSI => {
                    self.load_pointer(RSI, element, dirty)?;
                    if narrow { OpKind::MemorySegESI } else { OpKind::MemorySegRSI }
                }
                OpCodeOperandKind::es_rDI => {
                    self.load_pointer(RDI, element, dirty)?;
                    if narrow { OpKind::MemoryESEDI } else { OpKind::MemoryESRDI }
                }
                OpCodeOperandKind::al => self.fixed(&mut ins, i, Register::AL),
                OpCodeOperandKind::ax => self.fixed(&mut ins, i, Register::AX),
                OpCodeOperandKind::eax => self.fixed(&mut ins, i, Register::EAX),
                OpCodeOperandKind::rax => self.fixed(&mut ins, i, Register::RAX),
                _ => return None,
            };
            ins.set_op_kind(i, kind);
        }
        if repeated {
            let mut value = u64::from(count);
            if dirty && self.rng.percent(50) {
                value |= self.rng.next_u64() << 32;
            }
            self.load(RCX, value)?;
            if info.can_use_repne_prefix() && self.rng.percent(50) {
                ins.set_has_repne_prefix(true);
            } else {
                ins.set_has_rep_prefix(true);
            }
        }
        self.emit(Item::from(ins))
    }

    fn fixed(&mut self, ins: &mut Instruction, operand: u32, reg: Register) -> OpKind {
        ins.set_op_register(operand, reg);
        OpKind::Register
    }

    /// Points RSI or RDI into the data; `dirty`: the upper half does not matter.
    fn load_pointer(&mut self, reg: usize, element: u32, dirty: bool) -> Option<()> {
        let mut target = self.target(Need { size: element, aligned: false });
        if dirty && self.rng.percent(50) {
            target = (target & 0xffff_ffff) | (self.rng.next_u64() << 32);
        }
        self.load(reg, target)
    }
}
