//! Short system instructions of 64-bit mode, emitted where the mode of the block says that they are
//! allowed. What they would have to do in rare cases is left to the helper, called from behind the
//! block.
//!
//! The state is in memory, but for the arithmetic flags and DF: these stay in the host's flags.

use std::mem::offset_of;

use berth_x86::state::{flags, reg, sreg};
use berth_x86::{CpuState, Segment};
use iced_x86::{Code, Instruction, OpKind, Register};

use super::access::Want;
use super::regs::GuestReg;
use super::{Cold, Mode, Translation};
use crate::asm::{Mem, Near};
use crate::code::{Helped, Is};
use crate::exec::runner;
use crate::layout::{
    Area, FlagMask, GUEST_RCX, GUEST_RSP, S0, S1, SC, disp, gpr_disp, host, mapped, state_disp,
};

/// Bits that POPFQ may change in generated code, besides what is in host flags.
const POPF_FREE: u64 = flags::IF;
/// Bits that POPFQ loads.
const POPF_LOADED: u64 = flags::ARITH
    | flags::DF
    | flags::IF
    | flags::TF
    | flags::IOPL
    | flags::NT
    | flags::AC
    | flags::ID;
/// Bits of RFLAGS that must be as they are, or, not being loaded, clear.
const POPF_KEPT: u64 =
    POPF_LOADED & !(POPF_FREE | flags::ARITH | flags::DF) | flags::VIF | flags::VIP;

/// Whether `ins` is emitted here.
pub(super) fn emitted(ins: &Instruction, mode: Mode) -> bool {
    if mode.bits != 64 {
        return false;
    }
    match ins.code() {
        Code::Cli | Code::Sti | Code::Popfq | Code::Swapgs | Code::Stac | Code::Clac => mode.ring0,
        Code::Pushfq => true,
        Code::Rdtsc | Code::Rdtscp => !mode.tsd,
        Code::Rdfsbase_r32
        | Code::Rdfsbase_r64
        | Code::Rdgsbase_r32
        | Code::Rdgsbase_r64
        | Code::Wrfsbase_r32
        | Code::Wrfsbase_r64
        | Code::Wrgsbase_r32
        | Code::Wrgsbase_r64 => mode.fsgsbase,
        Code::Mov_r64_cr => mode.ring0 && control(ins.op1_register()).is_some(),
        Code::Mov_cr_r64 => mode.ring0 && ins.op0_register() == Register::CR2,
        Code::Mov_rm16_Sreg | Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
            ins.op0_kind() == OpKind::Register
        }
        Code::Xgetbv => mode.avx,
        Code::Clflush_m8 | Code::Clflushopt_m8 | Code::Clwb_m8 => true,
        _ => false,
    }
}

/// The field of the state that holds a control register that is there to be read.
const fn control(r: Register) -> Option<usize> {
    Some(match r {
        Register::CR0 => offset_of!(CpuState, cr0),
        Register::CR2 => offset_of!(CpuState, cr2),
        Register::CR3 => offset_of!(CpuState, cr3),
        Register::CR4 => offset_of!(CpuState, cr4),
        _ => return None,
    })
}

pub(super) fn area(offset: usize) -> Mem {
    Mem::gs(disp(offset))
}

pub(super) fn state(offset: usize) -> Mem {
    Mem::gs(state_disp(offset))
}

pub(super) const RFLAGS: usize = offset_of!(CpuState, rflags);

pub(super) fn segment(n: usize) -> usize {
    offset_of!(CpuState, seg) + n * size_of::<Segment>()
}

fn base(n: usize) -> Mem {
    state(segment(n) + offset_of!(Segment, base))
}

impl Translation {
    /// Emits an instruction that [`emitted`] is true for.
    pub(super) fn system(&mut self, ins: &Instruction) {
        self.reserve(100);
        match ins.code() {
            Code::Cli => self.keep_flags(FlagMask::NotIf, 0),
            Code::Sti => self.sti(ins),
            Code::Stac | Code::Clac => {
                let on = ins.code() == Code::Stac;
                self.keep_flags(FlagMask::NotAc, if on { flags::AC as i32 } else { 0 });
                let view = offset_of!(Area, kernel_base) + usize::from(on) * 8;
                self.asm.load(S0, &area(view));
                self.asm.wrgsbase(S0);
            }
            Code::Pushfq => self.pushfq(),
            Code::Popfq => self.popfq(ins),
            Code::Swapgs => {
                let kernel = state(offset_of!(CpuState, kernel_gs_base));
                self.asm.load(S0, &kernel);
                self.asm.load(S1, &base(sreg::GS));
                self.asm.store(&kernel, S1);
                self.asm.store(&base(sreg::GS), S0);
            }
            Code::Rdtsc => self.rdtsc(),
            Code::Rdtscp => {
                self.asm.bytes(&[0x0f, 0xae, 0xe8]); // lfence
                self.rdtsc();
                self.asm.load32(GUEST_RCX, &state(offset_of!(CpuState, tsc_aux)));
            }
            Code::Rdfsbase_r32 | Code::Rdfsbase_r64 => self.load_to(ins, &base(sreg::FS)),
            Code::Rdgsbase_r32 | Code::Rdgsbase_r64 => self.load_to(ins, &base(sreg::GS)),
            Code::Wrfsbase_r32 | Code::Wrfsbase_r64 => self.write_base(ins, sreg::FS),
            Code::Wrgsbase_r32 | Code::Wrgsbase_r64 => self.write_base(ins, sreg::GS),
            Code::Mov_r64_cr => {
                if let Some(field) = control(ins.op1_register()) {
                    self.load_to(ins, &state(field));
                }
            }
            Code::Mov_cr_r64 => {
                if let Some(g) = GuestReg::of(ins.op1_register()) {
                    self.load_guest(S0, g.n);
                    self.asm.store(&state(offset_of!(CpuState, cr2)), S0);
                }
            }
            Code::Mov_r32m16_Sreg | Code::Mov_r64m16_Sreg => {
                let n = usize::from(super::sreg_index(ins.op1_register()));
                self.asm.load16(S0, &state(segment(n) + offset_of!(Segment, selector)));
                self.put(ins, S0);
            }
            Code::Mov_rm16_Sreg => self.mov16_from_segment(ins),
            Code::Xgetbv => self.xgetbv(ins),
            _ => self.touch_operand(ins),
        }
    }

    /// Jumps to a helper for `ins`, from which the block goes on at an offset that is set later by
    /// [`Translation::helper_done`].
    pub(super) fn rarely(&mut self, jump: Near, ins: &Instruction) -> usize {
        let cold = self.cold.len();
        self.near.push((jump, cold));
        let number = self.next_helper();
        self.notes.helpers.push(Helped { ins: *ins, run: runner(ins) });
        self.cold.push(Cold::Helper { number, back: 0 });
        cold
    }

    /// Says that what a helper has done instead ends here.
    pub(super) fn helper_done(&mut self, cold: usize) {
        let pos = self.asm.pos();
        if let Some(Cold::Helper { back, .. }) = self.cold.get_mut(cold) {
            *back = pos;
        }
    }

    /// Clears the flags in memory that are not in a mask and adds some.
    fn keep_flags(&mut self, mask: FlagMask, add: i32) {
        self.asm.load(S0, &state(RFLAGS));
        self.mask(S0, mask);
        if add != 0 {
            self.asm.lea(S0, &Mem::base(S0, add));
        }
        self.asm.store(&state(RFLAGS), S0);
    }

    /// `r &= mask`.
    fn mask(&mut self, r: u8, mask: FlagMask) {
        let at = disp(offset_of!(Area, flag_mask) + mask as usize * 8);
        self.asm.pext_gs(r, r, at);
        self.asm.pdep_gs(r, r, at);
    }

    /// The helper looks for an interrupt; without one that may wait, the one instruction after this
    /// goes first whatever comes in between.
    fn sti(&mut self, ins: &Instruction) {
        self.asm.load(SC, &area(offset_of!(Area, irq)));
        let quiet = self.asm.jrcxz();
        let jump = self.asm.jmp();
        let helped = self.rarely(jump, ins);
        let bound = self.asm.bind_short(quiet);
        debug_assert!(bound);
        self.asm.load(S0, &state(RFLAGS));
        self.asm.pext_gs(SC, S0, disp(offset_of!(Area, flag_mask) + FlagMask::If as usize * 8));
        let clear = self.asm.jrcxz();
        let done = self.asm.jmp();
        let bound = self.asm.bind_short(clear);
        debug_assert!(bound);
        self.asm.mov_imm(S1, ins.next_ip());
        self.asm.store(&area(offset_of!(Area, shadow_rip)), S1);
        self.asm.store_imm32(&state(offset_of!(CpuState, interrupt_shadow)), 1);
        self.asm.lea(S0, &Mem::base(S0, flags::IF as i32));
        self.asm.store(&state(RFLAGS), S0);
        self.asm.bind_near(done);
        self.helper_done(helped);
    }

    fn pushfq(&mut self) {
        let start = self.asm.pos();
        self.asm.lea(S0, &Mem::base(GUEST_RSP, -8));
        let code = start..self.asm.pos();
        let a = self.look_up(S0, Want { size: 8, read: false, write: true }, 2, false, code);
        self.notes.sites[a.site].is.remove(Is::SIMPLE);
        self.asm.lea(SC, &Mem::base_index(S0, SC, 0, 0));
        // The flags of a thread that is being stepped have TF set.
        self.asm.bytes(&[0x9c]); // pushfq
        self.asm.pop(S1);
        self.mask(S1, FlagMask::Host);
        self.asm.load(S0, &state(RFLAGS));
        self.mask(S0, FlagMask::Rest);
        self.asm.lea(S0, &Mem::base_index(S0, S1, 0, 0));
        self.asm.store(&Mem::base(SC, 0), S0);
        self.asm.add_guest_rsp(-8);
        self.end_access(a);
    }

    /// The flags may be changed here as soon as the new ones have been read.
    fn popfq(&mut self, ins: &Instruction) {
        let want = Want { size: 8, read: true, write: false };
        let a = self.look_up(GUEST_RSP, want, 2, false, 0..0);
        self.asm.load(S1, &Mem::base_index(GUEST_RSP, SC, 0, 0));
        self.end_access(a);
        self.reserve(100);
        self.asm.op_reg(false, &[0x81], 4, S1); // and r11d, ...
        self.asm.bytes(&(POPF_LOADED as u32).to_le_bytes());
        self.asm.load(S0, &state(RFLAGS));
        self.asm.op_reg(false, &[0x33], S0, S1); // xor r10d, r11d
        self.asm.op_reg(false, &[0xf7], 0, S0); // test r10d, ...
        self.asm.bytes(&(POPF_KEPT as u32).to_le_bytes());
        let other = self.asm.jcc(5);
        let helped = self.rarely(other, ins);
        self.asm.load(SC, &area(offset_of!(Area, irq)));
        let quiet = self.asm.jrcxz();
        self.asm.op_reg(false, &[0xf7], 0, S1); // test r11d, IF
        self.asm.bytes(&(flags::IF as u32).to_le_bytes());
        let enabled = self.asm.jcc(5);
        self.near.push((enabled, helped));
        let bound = self.asm.bind_short(quiet);
        debug_assert!(bound);
        self.asm.op_reg(false, &[0x83], 1, S1); // or r11d, 2
        self.asm.bytes(&[flags::FIXED as u8]);
        self.asm.store(&state(RFLAGS), S1);
        self.asm.op_reg(false, &[0x81], 4, S1); // and r11d, ...
        self.asm.bytes(&((flags::ARITH | flags::DF | flags::FIXED) as u32).to_le_bytes());
        self.asm.op_reg(false, &[0x81], 1, S1); // or r11d, IF
        self.asm.bytes(&(flags::IF as u32).to_le_bytes());
        self.asm.add_guest_rsp(8);
        self.asm.push(S1);
        self.asm.bytes(&[0x9d]); // popfq
        self.helper_done(helped);
    }

    fn rdtsc(&mut self) {
        self.asm.bytes(&[0x0f, 0x31]);
        self.asm.load(S0, &state(offset_of!(CpuState, tsc_offset)));
        self.asm.rorx(host::RDX, host::RDX, 32);
        self.asm.lea(host::RAX, &Mem::base_index(host::RAX, host::RDX, 0, 0));
        self.asm.lea(host::RAX, &Mem::base_index(host::RAX, S0, 0, 0));
        self.asm.rorx(host::RDX, host::RAX, 32);
        self.asm.mov32(host::RDX, host::RDX);
        self.asm.mov32(host::RAX, host::RAX);
    }

    fn xgetbv(&mut self, ins: &Instruction) {
        self.asm.mov32(SC, GUEST_RCX);
        let zero = self.asm.jrcxz();
        let jump = self.asm.jmp();
        let helped = self.rarely(jump, ins);
        let bound = self.asm.bind_short(zero);
        debug_assert!(bound);
        let xcr0 = offset_of!(CpuState, xcr0);
        self.asm.load32(host::RAX, &state(xcr0));
        self.asm.load32(host::RDX, &state(xcr0 + 4));
        self.helper_done(helped);
    }

    fn write_base(&mut self, ins: &Instruction, n: usize) {
        let Some(g) = GuestReg::of(ins.op0_register()) else { return };
        self.load_guest(S0, g.n);
        if g.size == 4 {
            self.asm.mov32(S0, S0);
            self.asm.store(&base(n), S0);
            return;
        }
        // Bit 47 and all above it are the same: -1 or 0.
        self.asm.mov_imm(SC, 47);
        self.asm.sarx(SC, S0, SC);
        let low = self.asm.jrcxz();
        self.asm.lea(SC, &Mem::base(SC, 1));
        let high = self.asm.jrcxz();
        let jump = self.asm.jmp();
        let helped = self.rarely(jump, ins);
        let bound = self.asm.bind_short(low) && self.asm.bind_short(high);
        debug_assert!(bound);
        self.asm.store(&base(n), S0);
        self.helper_done(helped);
    }

    /// Loads the register that is the first operand from a 64-bit field, or its lower half.
    fn load_to(&mut self, ins: &Instruction, m: &Mem) {
        if ins.op0_register().size() == 4 {
            self.asm.load32(S0, m);
        } else {
            self.asm.load(S0, m);
        }
        self.put(ins, S0);
    }

    /// Copies all of `r` to the register that is the first operand.
    fn put(&mut self, ins: &Instruction, r: u8) {
        let Some(g) = GuestReg::of(ins.op0_register()) else { return };
        match mapped(g.n) {
            Some(h) => self.asm.mov(h, r),
            None => self.asm.store(&Mem::gs(gpr_disp(g.n)), r),
        }
    }

    /// Loads a selector into the lower 16 bits of a register.
    fn mov16_from_segment(&mut self, ins: &Instruction) {
        let n = usize::from(super::sreg_index(ins.op1_register()));
        let selector = state(segment(n) + offset_of!(Segment, selector));
        let Some(g) = GuestReg::of(ins.op0_register()) else { return };
        self.asm.bytes(&[0x66]);
        match mapped(g.n) {
            Some(h) => self.asm.op_mem(false, &[0x8b], h, &selector), // mov h, selector
            None => {
                self.asm.op_mem(false, &[0x8b], S0, &selector);
                self.asm.bytes(&[0x66]);
                self.asm.op_mem(false, &[0x89], S0, &Mem::gs(gpr_disp(g.n)));
            }
        }
    }

    /// CLFLUSH and its like: the caches of the host are coherent, but the operand may fault.
    fn touch_operand(&mut self, ins: &Instruction) {
        let a = self.operand(ins, Want { size: 1, read: true, write: false });
        self.asm.op_mem(false, &[0x0f, 0xb6], S1, &Mem::base_index(a.ea, SC, 0, a.disp)); // movzx
        self.end_access(a);
    }
}

const _: () = assert!(reg::RAX == host::RAX as usize && reg::RDX == host::RDX as usize);
