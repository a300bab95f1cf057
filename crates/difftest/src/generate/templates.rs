//! Short sequences that random choice would not find: loops, self-modifying stores, save images,
//! calls with returns, flag images, segment loads.

use iced_x86::{Code, FlowControl, Instruction, OpKind, Register};

use crate::case::{Mode, selector};
use crate::generate::assemble::Item;
use crate::generate::memory::{GPR32, GPR64};
use crate::generate::registers::RSP;
use crate::generate::{Builder, state};
use crate::layout::DATA;

impl Builder<'_> {
    /// One of the templates.
    pub fn template(&mut self) -> Option<()> {
        match self.rng.below(9) {
            0 | 1 => self.counted_loop(),
            2 => self.call_and_return(),
            3 | 4 => self.modify_code(),
            5 => self.pop_flags(),
            6 => self.segment_load(),
            _ if self.no_memory => None,
            7 => self.save_image(),
            _ => self.restore_image(),
        }
    }

    fn reg(&self, number: usize) -> Register {
        if self.mode == Mode::Bits64 { GPR64[number] } else { GPR32[number] }
    }

    fn wide(&self) -> bool {
        self.mode == Mode::Bits64
    }

    /// A few instructions repeated by LOOP, or by DEC and JNZ.
    fn counted_loop(&mut self) -> Option<()> {
        const RCX: usize = 1;
        if self.regs.protected != 0 {
            return None;
        }
        // A jump into the body would come without the count: earlier branches end here.
        let here = self.items.len();
        for (label, _) in std::mem::take(&mut self.pending) {
            self.labels[label.0] = here;
        }
        let times = u64::from(1 + self.rng.below(4));
        self.load(RCX, times)?;
        self.settle_flags();
        let start = self.label_here();
        self.regs.protected = 1 << RCX;
        for _ in 0..1 + self.rng.below(3) {
            let entry = self.catalog.pick(&mut self.rng);
            if entry.kind == crate::generate::catalog::Kind::Plain {
                let length = self.items.len();
                let (regs, undefined) = (self.regs.clone(), self.undefined);
                if self.plain(entry.code).is_none() {
                    // Nothing of it stays, a compare that defines flags neither.
                    self.items.truncate(length.max(self.labels[start.0]));
                    (self.regs, self.undefined) = (regs, undefined);
                }
            }
        }
        self.regs.protected = 0;
        self.settle_flags();
        // What a later round finds in registers the first did not leave is not known.
        let wide = self.wide();
        let code = match (wide, self.rng.percent(50)) {
            (true, true) => Code::Loop_rel8_64_RCX,
            (false, true) => Code::Loop_rel8_32_ECX,
            (_, false) => {
                let mut dec = Instruction::default();
                dec.set_code(if wide { Code::Dec_rm64 } else { Code::Dec_rm32 });
                dec.set_op0_kind(OpKind::Register);
                dec.set_op0_register(self.reg(RCX));
                self.emit(Item::from(dec))?;
                if wide { Code::Jne_rel8_64 } else { Code::Jne_rel8_32 }
            }
        };
        let mut ins = Instruction::default();
        ins.set_code(code);
        ins.set_op0_kind(if wide { OpKind::NearBranch64 } else { OpKind::NearBranch32 });
        self.emit(Item::from(ins))?;
        self.items.last_mut()?.branch = Some(start);
        Some(())
    }

    /// `call f; ...; jmp over; f: ...; ret; over:`
    fn call_and_return(&mut self) -> Option<()> {
        let wide = self.wide();
        let kind = if wide { OpKind::NearBranch64 } else { OpKind::NearBranch32 };
        self.settle_flags();
        let mut call = Instruction::default();
        call.set_code(if wide { Code::Call_rel32_64 } else { Code::Call_rel32_32 });
        call.set_op0_kind(kind);
        let before = self.regs.known(RSP);
        self.emit(Item::from(call))?;
        let call_at = self.items.len() - 1;
        let mut jump = Instruction::default();
        jump.set_code(if wide { Code::Jmp_rel8_64 } else { Code::Jmp_rel8_32 });
        jump.set_op0_kind(kind);
        self.emit(Item::from(jump))?;
        let jump_at = self.items.len() - 1;
        let function = self.label_here();
        self.items[call_at].branch = Some(function);
        self.regs.protected |= 1 << RSP;
        for _ in 0..self.rng.below(3) {
            let entry = self.catalog.pick(&mut self.rng);
            let length = self.items.len();
            let (regs, undefined) = (self.regs.clone(), self.undefined);
            let plain = entry.kind == crate::generate::catalog::Kind::Plain;
            if plain && self.plain(entry.code).is_none() {
                self.items.truncate(length);
                (self.regs, self.undefined) = (regs, undefined);
            }
        }
        self.regs.protected &= !(1 << RSP);
        self.settle_flags();
        let mut ret = Instruction::default();
        ret.set_code(if wide { Code::Retnq } else { Code::Retnd });
        self.emit(Item::from(ret))?;
        self.regs.written(RSP, before);
        let over = self.label_here();
        self.items[jump_at].branch = Some(over);
        Some(())
    }

    /// A store into an instruction that comes right after, or a little later.
    fn modify_code(&mut self) -> Option<()> {
        let wide = self.wide();
        let label = crate::generate::assemble::Label(self.labels.len());
        self.labels.push(usize::MAX);
        let mut store = Instruction::default();
        // MOV r32, imm32 is an opcode byte and four bytes of immediate; change one, or all.
        let byte = self.rng.percent(50);
        store.set_code(if byte { Code::Mov_rm8_imm8 } else { Code::Mov_rm32_imm32 });
        store.set_op0_kind(OpKind::Memory);
        store.set_memory_base(if wide { Register::RIP } else { Register::None });
        store.set_memory_displ_size(if wide { 8 } else { 4 });
        store.set_op1_kind(if byte { OpKind::Immediate8 } else { OpKind::Immediate32 });
        let value = self.rng.next_u64() as u32;
        if byte {
            store.set_immediate8(value as u8);
        } else {
            store.set_immediate32(value);
        }
        let mut item = Item::from(store);
        item.memory = Some((label, 1));
        self.emit(item)?;
        for _ in 0..self.rng.below(3) {
            let entry = self.catalog.pick(&mut self.rng);
            let length = self.items.len();
            let (regs, undefined) = (self.regs.clone(), self.undefined);
            let plain = entry.kind == crate::generate::catalog::Kind::Plain;
            if plain && self.plain(entry.code).is_none() {
                self.items.truncate(length);
                (self.regs, self.undefined) = (regs, undefined);
            }
        }
        let mut reg = self.rng.below(8) as usize;
        if reg == RSP {
            reg = 5;
        }
        let mut ins = Instruction::default();
        ins.set_code(Code::Mov_r32_imm32);
        ins.set_op0_kind(OpKind::Register);
        ins.set_op0_register(GPR32[reg]);
        ins.set_op1_kind(OpKind::Immediate32);
        ins.set_immediate32(self.rng.next_u64() as u32);
        self.labels[label.0] = self.items.len();
        self.emit(Item::from(ins))
    }

    /// POPF with a chosen image: user mode may change the arithmetic flags, TF, DF, NT, AC, ID.
    fn pop_flags(&mut self) -> Option<()> {
        let wide = self.wide();
        let mut image = self.rng.next_u64() as u32;
        // TF ends the sequence after one instruction, AC at the first misaligned access.
        if !(self.options.trap_flags && self.rng.percent(20)) {
            image &= !0x100;
        }
        if !(self.options.trap_flags && self.rng.percent(20)) {
            image &= !0x4_0000;
        }
        let mut push = Instruction::default();
        push.set_code(if wide { Code::Pushq_imm32 } else { Code::Pushd_imm32 });
        if wide {
            push.set_op0_kind(OpKind::Immediate32to64);
            push.set_immediate32to64(i64::from(image as i32));
        } else {
            push.set_op0_kind(OpKind::Immediate32);
            push.set_immediate32(image);
        }
        self.emit(Item::from(push))?;
        let mut pop = Instruction::default();
        pop.set_code(if wide { Code::Popfq } else { Code::Popfd });
        self.emit(Item::from(pop))
    }

    /// MOV to DS, ES, FS or GS with selectors that mean the same natively and in the guest.
    fn segment_load(&mut self) -> Option<()> {
        let of = if self.wide() {
            vec![Register::DS, Register::ES, Register::FS, Register::GS]
        } else {
            vec![Register::FS, Register::GS]
        };
        let segment = self.rng.pick(&of);
        let mut value =
            u64::from(self.rng.pick(&[0, 1, 2, 3, selector::DATA, selector::DATA & !3]));
        if self.fault_wanted && self.rng.percent(40) {
            // Supervisor segments and a selector outside every table.
            value = u64::from(self.rng.pick(&[0x10_u16, 0x18, 0x13, 0xfff8]));
        }
        let mut reg = self.rng.below(8) as usize;
        if reg == RSP {
            reg = 0;
        }
        self.load(reg, value)?;
        let mut ins = Instruction::default();
        ins.set_code(Code::Mov_Sreg_r32m16);
        ins.set_op0_kind(OpKind::Register);
        ins.set_op0_register(segment);
        ins.set_op1_kind(OpKind::Register);
        ins.set_op1_register(GPR32[reg]);
        self.emit(Item::from(ins))?;
        // Loading a selector replaces the base; how a null selector does it differs by vendor.
        match segment {
            Register::FS => self.fs_base = None,
            Register::GS => self.gs_base = None,
            _ => {}
        }
        Some(())
    }

    /// A target for a save area that is in the data for certain.
    fn area(&mut self, size: u32, align: u32) -> u64 {
        let place = self.rng.below((DATA.len() - size) / align + 1) * align;
        let misaligned = self.fault_wanted && self.rng.percent(30);
        let target = self.world.base() + u64::from(DATA.offset + place);
        if misaligned && place > 8 {
            self.fault_wanted = false;
            target - 8
        } else {
            target
        }
    }

    /// FXSAVE, FNSAVE, FNSTENV: what they store of the last x87 instruction is masked, and nothing
    /// in this sequence reads memory after them.
    fn save_image(&mut self) -> Option<()> {
        let wide = self.wide();
        let (code, size, align, hidden) = match self.rng.below(5) {
            0 if wide => (Code::Fxsave64_m512byte, 512, 16, (6, 24)),
            0 | 1 => (Code::Fxsave_m512byte, 512, 16, (6, 24)),
            2 => (Code::Fnsave_m108byte, 108, 1, (12, 28)),
            3 => (Code::Fnstenv_m28byte, 28, 1, (12, 28)),
            _ => (Code::Fnstenv_m14byte, 14, 1, (6, 14)),
        };
        let target = self.area(size, align);
        let mut ins = Instruction::default();
        ins.set_code(code);
        ins.set_op0_kind(OpKind::Memory);
        if self.items.iter().all(|i| i.ins.flow_control() == FlowControl::Next) {
            self.address(&mut ins, target)?;
        } else {
            self.certain_address(&mut ins, target)?;
        }
        self.emit(Item::from(ins))?;
        let offset = self.world.image_offset(target, size)?;
        self.masked.push((offset + hidden.0, hidden.1 - hidden.0));
        self.no_memory = true;
        Some(())
    }

    /// An address that holds whatever was skipped by earlier branches: they all end here, and the base
    /// is loaded after that.
    fn certain_address(&mut self, ins: &mut Instruction, target: u64) -> Option<()> {
        let here = self.items.len();
        for (label, _) in std::mem::take(&mut self.pending) {
            self.labels[label.0] = here;
        }
        let mut reg = self.rng.below(8) as usize;
        if reg == RSP {
            reg = 3;
        }
        let mut load = Instruction::default();
        load.set_code(if self.wide() { Code::Mov_r64_imm64 } else { Code::Mov_r32_imm32 });
        load.set_op0_kind(OpKind::Register);
        load.set_op0_register(self.reg(reg));
        if self.wide() {
            load.set_op1_kind(OpKind::Immediate64);
            load.set_immediate64(target);
        } else {
            load.set_op1_kind(OpKind::Immediate32);
            load.set_immediate32(target as u32);
        }
        self.emit(Item::from(load))?;
        self.regs.written(reg, Some(target));
        ins.set_memory_base(self.reg(reg));
        ins.set_memory_index(Register::None);
        ins.set_memory_index_scale(1);
        Some(())
    }

    /// FXRSTOR of a valid image, seldom with a reserved bit of MXCSR set.
    fn restore_image(&mut self) -> Option<()> {
        let target = self.area(512, 16);
        let mut ins = Instruction::default();
        let code = if self.wide() && self.rng.percent(50) {
            Code::Fxrstor64_m512byte
        } else {
            Code::Fxrstor_m512byte
        };
        ins.set_code(code);
        ins.set_op0_kind(OpKind::Memory);
        self.address(&mut ins, target)?;
        let mut image = state::initial_xsave(&mut self.rng).0[..512].to_vec();
        if self.fault_wanted && self.rng.percent(30) {
            image[26] |= 1;
        }
        self.patch(target, image);
        self.emit(Item::from(ins))
    }
}
