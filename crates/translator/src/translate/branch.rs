//! Near branches.

use berth_x86::paging::canonical;
use iced_x86::{Code, ConditionCode, Instruction, Mnemonic, OpKind};

use super::access::Want;
use super::regs::GuestReg;
use super::{Cold, Mode, Translation};
use crate::asm::{Mem, Near};
use crate::code::{Branch, Fix, Link, Through};
use crate::layout::{
    Area, ExitCode, GUEST_RCX, GUEST_RSP, S0, S1, SC, TMP, disp, gpr_disp, mapped,
};
use crate::thunks::through_jump_cache;

/// A block goes on behind a conditional branch that is among its first so many instructions.
const GOES_ON: usize = 12;

/// Whether a block goes on behind a conditional branch, its `count`th instruction.
pub const fn goes_on(mode: Mode, count: usize) -> bool {
    mode.bits == 64 && !mode.single && count < GOES_ON
}

impl Translation {
    /// Translates a branch; tells whether the block ends with it.
    pub(super) fn branch(&mut self, ins: &Instruction) -> bool {
        let next = ins.next_ip();
        self.rsp_taken = 0;
        if ins.is_jmp_short_or_near() {
            let target = self.direct_target(ins);
            self.jump_to(target);
        } else if ins.is_jcc_short_or_near() {
            let target = self.direct_target(ins);
            self.reserve(40);
            let jump = self.asm.jcc(cc(ins.condition_code()));
            self.link(jump, target);
            if goes_on(self.mode, self.count) {
                return false;
            }
            self.jump_to(next);
        } else if super::decode::is_loop(ins) {
            self.loop_instruction(ins);
        } else if ins.is_call_near() {
            let target = self.direct_target(ins);
            self.push_return(next);
            self.rsp_taken = 8;
            if !self.mode.single {
                self.reserve(32);
                let call = self.asm.call();
                self.link(call, target);
                self.returned(next);
                return false;
            }
            self.jump_to(target);
        } else if ins.is_jmp_near_indirect() {
            self.load_target(ins);
            self.indirect();
        } else if ins.is_call_near_indirect() {
            self.load_target(ins);
            self.asm.store(&Mem::gs(TMP), S0);
            self.push_return(next);
            self.asm.load(S0, &Mem::gs(TMP));
            self.rsp_taken = 8;
            if !self.mode.single {
                self.reserve(32);
                let call = self.asm.call();
                self.near.push((call, self.cold.len()));
                let branch = self.branch_number();
                self.cold.push(Cold::Jump { branch });
                self.returned(next);
                return false;
            }
            self.indirect();
        } else {
            self.near_return(ins);
        }
        true
    }

    /// What follows a host call: some guest return came here, with its target in [`S0`]. Goes on in
    /// the block if this is where it wanted to go.
    fn returned(&mut self, next: u64) {
        self.reserve(32);
        self.load_address(SC, next, true);
        self.asm.lea(SC, &Mem::base_index(SC, S0, 0, 1));
        let expected = self.asm.jrcxz();
        self.asm.near_abs(0xe9, self.thunks.unmatched, self.at);
        let ok = self.asm.bind_short(expected);
        debug_assert!(ok);
    }

    fn direct_target(&self, ins: &Instruction) -> u64 {
        let t = ins.near_branch_target();
        match ins.op0_kind() {
            OpKind::NearBranch16 => t & 0xffff,
            OpKind::NearBranch32 => t & 0xffff_ffff,
            _ => t,
        }
    }

    /// An unconditional jump to a known address; ends the block's body.
    pub(super) fn jump_to(&mut self, target: u64) {
        self.reserve(32);
        if self.mode.single {
            self.exit_at(target, ExitCode::Interrupt);
            return;
        }
        let jump = self.asm.jmp();
        self.link(jump, target);
    }

    /// Makes `jump` (just emitted) a link to `target`.
    fn link(&mut self, jump: Near, target: u64) {
        let cold = self.cold.len();
        self.near.push((jump, cold));
        if self.mode.single {
            self.cold.push(Cold::Interrupt { rip: target });
            return;
        }
        let key = self.key;
        let delta = target.wrapping_sub(key.rip) as i64;
        let in_page = (key.gpa & 0xfff).checked_add_signed(delta).is_some_and(|o| o < 4096);
        let kernel = self.mode.bits == 64 && !self.mode.user && target >> 63 != 0;
        let long = self.mode.bits == 64 && i32::try_from(delta).is_err();
        if !in_page && (!kernel || long) && (self.mode.bits == 64 || self.mode.flat) {
            let faults = self.mode.bits == 64 && !canonical(target);
            let branch = faults.then(|| self.branch_number());
            self.cold.push(Cold::Far { target, branch });
            return;
        }
        let patch = self.asm.pos() as u16;
        self.notes.links.push(Link { patch, stub: 0, delta: delta as i32, linkable: in_page });
        self.cold.push(Cold::Link { link: self.notes.links.len() - 1 });
    }

    /// LOOP and JRCXZ: on a copy of the guest's counter in RCX, which is what they test.
    fn loop_instruction(&mut self, ins: &Instruction) {
        self.reserve(60);
        let target = self.direct_target(ins);
        let next = ins.next_ip();
        use Code as C;
        let wide = match ins.mnemonic() {
            Mnemonic::Jcxz => 2,
            Mnemonic::Jecxz => 4,
            Mnemonic::Jrcxz => 8,
            _ => match ins.code() {
                C::Loopne_rel8_16_CX
                | C::Loopne_rel8_32_CX
                | C::Loope_rel8_16_CX
                | C::Loope_rel8_32_CX
                | C::Loop_rel8_16_CX
                | C::Loop_rel8_32_CX => 2,
                C::Loopne_rel8_16_RCX
                | C::Loopne_rel8_64_RCX
                | C::Loope_rel8_16_RCX
                | C::Loope_rel8_64_RCX
                | C::Loop_rel8_16_RCX
                | C::Loop_rel8_64_RCX => 8,
                _ => 4,
            },
        };
        if !ins.is_jcx_short() {
            // The counter goes down without touching flags.
            match wide {
                8 => self.asm.lea(GUEST_RCX, &Mem::base(GUEST_RCX, -1)),
                4 => self.asm.lea32(GUEST_RCX, &Mem::base(GUEST_RCX, -1)),
                _ => {
                    self.asm.buf.push(0x66);
                    self.asm.op_mem(false, &[0x8d], GUEST_RCX, &Mem::base(GUEST_RCX, -1));
                }
            }
        }
        match wide {
            8 => self.asm.mov(SC, GUEST_RCX),
            4 => self.asm.mov32(SC, GUEST_RCX),
            _ => self.asm.movzx16(SC, GUEST_RCX),
        }
        // Short jumps over near ones: jrcxz zero; [jcc not]; jmp taken; zero: jmp next.
        let zero = self.asm.jrcxz();
        let (on_zero, on_other) = if ins.is_jcx_short() { (target, next) } else { (next, target) };
        let stop = match ins.mnemonic() {
            Mnemonic::Loope => Some(5),
            Mnemonic::Loopne => Some(4),
            _ => None,
        };
        if let Some(cc) = stop {
            let jump = self.asm.jcc(cc);
            self.link(jump, next);
        }
        let jump = self.asm.jmp();
        self.link(jump, on_other);
        let ok = self.asm.bind_short(zero);
        debug_assert!(ok);
        let jump = self.asm.jmp();
        self.link(jump, on_zero);
    }

    /// Pushes a return address.
    fn push_return(&mut self, next: u64) {
        let want = Want { size: 8, read: false, write: true };
        if let Some(a) = self.shared(Through::base(4), -8, want, 2) {
            self.load_address(S1, next, false);
            self.asm.store(&Mem::base_index(GUEST_RSP, SC, 0, -8), S1);
            self.asm.add_guest_rsp(-8);
            self.end_access(a);
            return;
        }
        let start = self.asm.pos();
        self.reserve(64);
        let start = start.max(self.asm.pos());
        self.asm.lea(S0, &Mem::base(GUEST_RSP, -8));
        let code = start..self.asm.pos();
        let a = self.look_up(S0, want, 2, false, code);
        self.load_address(S1, next, false);
        self.asm.store(&Mem::base_index(S0, SC, 0, 0), S1);
        self.asm.mov(GUEST_RSP, S0);
        self.end_access(a);
    }

    /// Loads the target of an indirect branch into [`S0`].
    fn load_target(&mut self, ins: &Instruction) {
        if ins.op0_kind() == OpKind::Register {
            if let Some(g) = GuestReg::of(ins.op0_register()) {
                match mapped(g.n) {
                    Some(h) => self.asm.mov(S0, h),
                    None => self.asm.load(S0, &Mem::gs(gpr_disp(g.n))),
                }
            }
            return;
        }
        let a = self.operand(ins, Want { size: 8, read: true, write: false });
        self.asm.load(S0, &Mem::base_index(a.ea, SC, 0, a.disp));
        self.end_access(a);
    }

    fn near_return(&mut self, ins: &Instruction) {
        let extra = if ins.op_count() > 0 { ins.immediate16() } else { 0 };
        let want = Want { size: 8, read: true, write: false };
        let a = self
            .shared(Through::base(4), 0, want, 2)
            .unwrap_or_else(|| self.look_up(GUEST_RSP, want, 2, false, 0..0));
        self.asm.load(S0, &Mem::base_index(GUEST_RSP, SC, 0, 0));
        self.asm.add_guest_rsp(8 + i32::from(extra));
        self.end_access(a);
        self.rsp_taken = -(8 + i32::from(extra));
        if self.mode.single {
            self.indirect();
            return;
        }
        let number = self.branch_number();
        let field = Mem::gs(disp(std::mem::offset_of!(Area, return_number)));
        self.asm.store_imm(&field, i32::try_from(number).unwrap_or(i32::MAX));
        self.note(Fix::Branch);
        self.asm.ret();
    }

    /// Gives the current branch a number, by which is found what to undo when it faults.
    pub(super) fn branch_number(&mut self) -> u32 {
        let number = self.base.branches + self.notes.branches.len() as u32;
        self.notes.branches.push(Branch { rip: self.rip_off, taken: self.rsp_taken });
        number
    }

    /// Jumps to the guest address in [`S0`] through the jump cache.
    pub(super) fn indirect(&mut self) {
        self.reserve(70);
        if !self.mode.single {
            through_jump_cache(&mut self.asm);
        }
        let miss = self.asm.jmp();
        self.near.push((miss, self.cold.len()));
        let branch = self.branch_number();
        self.cold.push(Cold::Miss { branch });
    }
}

/// The hardware number of a condition.
fn cc(c: ConditionCode) -> u8 {
    match c {
        ConditionCode::o => 0,
        ConditionCode::no => 1,
        ConditionCode::b => 2,
        ConditionCode::ae => 3,
        ConditionCode::e => 4,
        ConditionCode::ne => 5,
        ConditionCode::be => 6,
        ConditionCode::a => 7,
        ConditionCode::s => 8,
        ConditionCode::ns => 9,
        ConditionCode::p => 10,
        ConditionCode::np => 11,
        ConditionCode::l => 12,
        ConditionCode::ge => 13,
        ConditionCode::le => 14,
        _ => 15,
    }
}
