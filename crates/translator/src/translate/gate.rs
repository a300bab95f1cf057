//! SYSCALL and SYSRET, emitted.
//!
//! Both change what most instructions never change: the mode, the view, two segment registers. What
//! they load is the same each time, so it lies ready in the area ([`crate::layout::Gate`]): the
//! dispatcher leaves it there when the helper has executed the instruction, and takes it away when
//! anything it follows from is written. The targets are found in the jump cache of the view on the
//! other side.
//!
//! The return stack is kept: user code's entries lie below the address of
//! [`crate::thunks::Thunks::barrier`], which no return of the kernel passes.

use std::mem::offset_of;

use berth_x86::state::{flags, sreg};
use berth_x86::{CpuState, Segment};
use iced_x86::{Code, Instruction};

use super::system::{RFLAGS, area, segment, state};
use super::{Mode, Translation};
use crate::asm::Mem;
use crate::layout::{Area, ExitCode, GUEST_RCX, Gate, S0, S1, SC, disp, gpr_disp, host};
use crate::thunks::through_jump_cache;

/// Flags that SYSRET loads from R11 (SDM vol. 2, SYSRET).
const LOADED: u64 = 0x3c_7fd7;
/// Of these, the ones left to the helper when they are set.
const ODD: u64 = flags::TF | flags::AC | flags::NT | flags::VIF | flags::VIP;
/// What SYSCALL must clear to be emitted code's.
pub const CLEARED: u64 =
    flags::ARITH | flags::DF | flags::TF | flags::IF | flags::AC | flags::NT | flags::IOPL;

/// Whether `ins` is emitted here.
pub(super) fn emitted(ins: &Instruction, mode: Mode) -> bool {
    let allowed = match ins.code() {
        Code::Syscall => mode.user,
        Code::Sysretq => mode.ring0,
        _ => false,
    };
    allowed && mode.bits == 64 && !mode.single
}

/// ALU operation `/n` of a register with an immediate.
fn immediate(t: &mut Translation, n: u8, reg: u8, value: u64) {
    t.asm.op_reg(false, &[0x81], n, reg);
    t.asm.bytes(&(value as u32).to_le_bytes());
}
const OR: u8 = 1;
const AND: u8 = 4;

impl Translation {
    /// Emits SYSCALL or SYSRET; the block ends.
    pub(super) fn gate(&mut self, ins: &Instruction) {
        // Longer than any JRCXZ reaches: none may be pending.
        self.reserve(127);
        let inwards = ins.code() == Code::Syscall;
        let gate = if inwards { offset_of!(Area, syscall) } else { offset_of!(Area, sysret) };
        self.asm.load(SC, &area(gate + offset_of!(Gate, closed)));
        let closed = self.asm.jmp_unless_zero();
        let helped = self.rarely(closed, ins);
        if inwards {
            self.enter_kernel(ins, gate)
        } else {
            self.leave_kernel(gate, helped)
        }
        through_jump_cache(&mut self.asm);
        self.asm.near_abs(0xe9, self.thunks.miss, self.at);
        self.helper_done(helped);
        self.exit_at(ins.next_ip(), ExitCode::Interrupt);
    }

    fn enter_kernel(&mut self, ins: &Instruction, gate: usize) {
        // R11 gets the flags without RF; RFLAGS those that stay.
        self.asm.pushfq();
        self.asm.pop(S1);
        immediate(self, AND, S1, flags::ARITH | flags::DF);
        self.asm.op_mem(true, &[0xff], 0, &area(offset_of!(Area, syscalls))); // inc
        self.asm.load(S0, &state(RFLAGS));
        immediate(self, AND, S0, !(flags::ARITH | flags::DF | flags::RF));
        self.asm.op_reg(true, &[0x0b], S1, S0); // or
        self.asm.store(&Mem::gs(gpr_disp(11)), S1);
        self.asm.op_mem(true, &[0x23], S0, &area(offset_of!(Area, syscall_keep))); // and
        self.asm.store(&state(RFLAGS), S0);
        self.load_address(GUEST_RCX, ins.next_ip(), false);
        self.asm.store(&area(offset_of!(Area, user_return_sp)), host::RSP);
        self.asm.push_mem(&area(offset_of!(Area, barrier)));
        self.other_side(gate);
        self.asm.load(S0, &state(offset_of!(CpuState, lstar)));
        // One bit set, nothing carried: all arithmetic flags clear.
        self.asm.mov_imm(SC, 1);
        self.asm.op_reg(false, &[0x83], 0, SC); // add ecx, 0
        self.asm.bytes(&[0, 0xfc]); // cld
    }

    fn leave_kernel(&mut self, gate: usize, helped: usize) {
        // Bit 47 and all above it are clear: a user address.
        self.asm.mov_imm(SC, 47);
        self.asm.sarx(SC, GUEST_RCX, SC);
        let high = self.asm.jmp_unless_zero();
        self.near.push((high, helped));
        // The flags from before are of no use any more.
        self.asm.load(S1, &Mem::gs(gpr_disp(11)));
        self.asm.op_reg(false, &[0xf7], 0, S1); // test
        self.asm.bytes(&(ODD as u32).to_le_bytes());
        let odd = self.asm.jcc(5);
        self.near.push((odd, helped));
        self.asm.load(SC, &area(offset_of!(Area, irq)));
        let quiet = self.asm.jrcxz();
        self.asm.op_reg(false, &[0xf7], 0, S1);
        self.asm.bytes(&(flags::IF as u32).to_le_bytes());
        let enabled = self.asm.jcc(5);
        self.near.push((enabled, helped));
        let ok = self.asm.bind_short(quiet);
        debug_assert!(ok);
        immediate(self, AND, S1, LOADED);
        immediate(self, OR, S1, flags::FIXED);
        self.asm.store(&state(RFLAGS), S1);
        self.asm.load(host::RSP, &area(offset_of!(Area, user_return_sp)));
        self.other_side(gate);
        immediate(self, AND, S1, flags::ARITH | flags::DF | flags::FIXED);
        immediate(self, OR, S1, flags::IF);
        self.asm.push(S1);
        self.asm.bytes(&[0x9d]); // popfq
        self.asm.mov(S0, GUEST_RCX);
    }

    /// Segments and view.
    fn other_side(&mut self, gate: usize) {
        let from = [offset_of!(Gate, cs), offset_of!(Gate, ss)];
        for (from, to) in from.into_iter().zip([segment(sreg::CS), segment(sreg::SS)]) {
            for word in (0..size_of::<Segment>()).step_by(8) {
                self.asm.load(S0, &area(gate + from + word));
                self.asm.store(&state(to + word), S0);
            }
        }
        self.asm.load(S0, &area(gate + offset_of!(Gate, base)));
        self.asm.wrgsbase(S0);
        self.asm.store_imm(&Mem::gs(disp(offset_of!(Area, crossed))), 1);
    }
}
