//! The fixed pieces of generated code: entry, exits, and calls from generated code into Rust.
//!
//! All of them keep the same discipline. On the way out every guest register goes to the
//! [`Area`], the direction flag is cleared, the upper halves of the vector registers are zeroed and
//! MXCSR is set to the host's; on the way back everything is loaded again. x87 state stays in the
//! processor: Rust code does not touch it. Generated code has a stack of its own
//! ([`crate::returns`]); Rust runs on the thread's.

use std::mem::offset_of;

use crate::asm::{Asm, Mem};
use crate::code::CodeCache;
use crate::fpu;
use crate::layout::{
    Area, ExitCode, GUEST_RCX, GUEST_RSP, JC_TAGS, JC_TARGETS, S0, S1, SC, disp, gpr_disp, host,
    mapped,
};

/// What a helper tells its thunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Then {
    /// Return to the call.
    Go = 0,
    /// Return behind the jump that follows the call: a store goes to the bounce buffer.
    Bounce = 1,
    /// Leave generated code; everything is in the area.
    Exit = 2,
}

/// A function that generated code calls: the vCPU, the return address, the address in S0.
pub type HelperFn = extern "C" fn(owner: u64, ret: u64, ea: u64) -> Then;

/// Stands for the number of a branch that cannot fault at its target.
const NO_BRANCH: u64 = u32::MAX as u64;

/// Host addresses of the fixed pieces.
#[derive(Clone, Copy)]
pub struct Thunks {
    /// Slow path of an access.
    pub mem: u64,
    /// Where the signal handler sends an access that has no slow path yet.
    pub first: u64,
    /// Commits a bounced store.
    pub commit: u64,
    /// Executes an instruction.
    pub helper: u64,
    /// Entry from Rust: `extern "C" fn()`.
    pub enter: u64,
    /// Where a jump to the canonical address in [`S0`] goes that missed the jump cache.
    pub miss: u64,
    /// Where a return goes when the return stack is empty.
    pub unexpected: u64,
    /// Where a jump to the address in [`S0`] goes that a return made.
    pub unmatched: u64,
    /// Where a return of the kernel goes when only user code's entries are left on the return stack.
    pub barrier: u64,
    exits: [u64; 7],
    /// Where code begins and ends that goes (back) into generated code after a look at
    /// [`Area::run`], and which can be begun again.
    tails: [(u64, u64); 5],
    start: u64,
    end: u64,
}

fn field(offset: usize) -> Mem {
    Mem::gs(disp(offset))
}

/// Guest registers that live in host registers.
fn mapped_regs() -> impl Iterator<Item = (u8, u8)> {
    (0..16u8).filter_map(|g| mapped(g).map(|h| (g, h)))
}

fn save(a: &mut Asm) {
    for (g, h) in mapped_regs() {
        a.store(&Mem::gs(gpr_disp(g)), h);
    }
    a.store(&field(offset_of!(Area, s0)), S0);
    a.store(&field(offset_of!(Area, s1)), S1);
    a.store(&field(offset_of!(Area, sc)), SC);
    a.bytes(&[0x9c]); // pushfq
    a.pop_mem(&field(offset_of!(Area, host_flags)));
    for i in 0..16u8 {
        a.store_ymm(&field(offset_of!(Area, ymm) + usize::from(i) * 32), i);
    }
    if fpu::knows_upper() {
        a.mov_imm(host::RCX, 1);
        a.bytes(&[0x0f, 0x01, 0xd0]); // xgetbv: XINUSE
        a.bytes(&[0x83, 0xe0, 0x04]); // and eax, AVX
        a.store(&field(offset_of!(Area, upper)), host::RAX);
    }
    a.op_mem(false, &[0x0f, 0xae], 3, &field(offset_of!(Area, mxcsr))); // stmxcsr
    host_units(a);
}

const VZEROUPPER: [u8; 3] = [0xc5, 0xf8, 0x77];

/// What Rust expects of the processor.
fn host_units(a: &mut Asm) {
    a.op_mem(false, &[0x0f, 0xae], 2, &field(offset_of!(Area, host_mxcsr))); // ldmxcsr
    a.bytes(&[0xfc]); // cld
    a.bytes(&VZEROUPPER);
}

/// Loads everything; the flags last, because a set TF traps from then on.
fn restore(a: &mut Asm) {
    a.op_mem(false, &[0x0f, 0xae], 2, &field(offset_of!(Area, mxcsr)));
    restore_vectors(a);
    for (g, h) in mapped_regs() {
        a.load(h, &Mem::gs(gpr_disp(g)));
    }
    a.load(S0, &field(offset_of!(Area, s0)));
    a.load(S1, &field(offset_of!(Area, s1)));
    a.load(SC, &field(offset_of!(Area, sc)));
    a.push_mem(&field(offset_of!(Area, host_flags)));
    a.bytes(&[0x9d]); // popfq
}

/// Registers whose upper halves have been written by VEX code make SSE code slow, whatever was
/// written (Intel optimization manual, 15.3): if all are zero they are left alone.
fn restore_vectors(a: &mut Asm) {
    let registers = (0..16u8).map(|i| (i, field(offset_of!(Area, ymm) + usize::from(i) * 32)));
    a.load(SC, &field(offset_of!(Area, upper)));
    let all = a.jmp_unless_zero();
    // Rust code may have left something there.
    a.bytes(&VZEROUPPER);
    for (i, m) in registers.clone() {
        a.op_mem(false, &[0x0f, 0x10], i, &m); // movups
    }
    let done = a.jmp();
    a.bind_near(all);
    for (i, m) in registers {
        a.load_ymm(i, &m);
    }
    a.bind_near(done);
}

/// RAX is there for the alignment of the stack.
const CALLEE_SAVED: [u8; 7] =
    [host::RAX, host::RBX, host::RBP, host::R12, host::R13, host::R14, host::R15];

/// Back to Rust; everything is saved.
fn leave(a: &mut Asm) {
    for r in CALLEE_SAVED.iter().rev() {
        a.pop(*r);
    }
    a.ret();
}

/// Emits what is done only when [`Area::run`] is zero.
fn if_asked_to_leave(a: &mut Asm, emit: impl FnOnce(&mut Asm)) {
    a.load(SC, &field(offset_of!(Area, run)));
    let go = a.jmp_unless_zero();
    emit(a);
    a.bind_near(go);
}

/// Gives the offset where the tail begins.
fn call(a: &mut Asm, f: HelperFn, leave_at: usize) -> usize {
    a.store(&field(offset_of!(Area, thunk_sp)), host::RSP);
    a.load(host::RSP, &field(offset_of!(Area, host_rsp)));
    save(a);
    a.load(host::RDI, &field(offset_of!(Area, owner)));
    a.load(host::RSI, &field(offset_of!(Area, thunk_sp)));
    a.load(host::RSI, &Mem::base(host::RSI, 0));
    a.mov(host::RDX, S0);
    a.mov_imm(host::RAX, f as usize as u64);
    a.call_reg(host::RAX);
    a.load(SC, &field(offset_of!(Area, thunk_sp)));
    a.lea(S0, &Mem::base(SC, 8));
    a.store(&field(offset_of!(Area, return_sp)), S0);
    a.bytes(&[0x83, 0xf8, 0x01]); // cmp eax, 1
    let above = a.jcc(7);
    a.bind_near_to(above, leave_at);
    let below = a.jcc(2);
    a.op_mem(true, &[0x83], 0, &Mem::base(SC, 0)); // add qword [rcx], 5
    a.bytes(&[5]);
    a.bind_near(below);
    let tail = a.pos();
    // Asked to leave, but in the middle of an instruction: step to its end.
    if_asked_to_leave(a, |a| {
        a.store_imm(&field(offset_of!(Area, stepping)), 1);
        a.op_mem(false, &[0x81], 1, &field(offset_of!(Area, host_flags))); // or dword, TF
        a.bytes(&0x100u32.to_le_bytes());
    });
    restore(a);
    a.load(host::RSP, &field(offset_of!(Area, thunk_sp)));
    a.ret();
    tail
}

/// Looks the guest address in [`S0`] up in the jump cache and goes there; falls through when it is
/// not in there.
pub fn through_jump_cache(a: &mut Asm) {
    a.movzx16(SC, S0);
    a.lea(S1, &Mem::base_index(SC, SC, 0, 0));
    a.load(SC, &Mem::gs_index8(S1, JC_TAGS));
    a.lea(SC, &Mem::base_index(SC, S0, 0, 0));
    let miss = a.jmp_unless_zero();
    a.jmp_mem(&Mem::gs_index8(S1, JC_TARGETS));
    a.bind_near(miss);
}

impl Thunks {
    /// Generates the fixed pieces at the start of a cache.
    pub fn new(cache: &mut CodeCache, [mem, first, commit, helper]: [HelperFn; 4]) -> Self {
        debug_assert!(mapped(1) == Some(GUEST_RCX) && mapped(4) == Some(GUEST_RSP));
        let base = cache.range().0;
        let mut a = Asm::default();
        let enter = base;
        for r in CALLEE_SAVED {
            a.push(r);
        }
        a.store(&field(offset_of!(Area, host_rsp)), host::RSP);
        let mut tails = [(0, 0); 5];
        let tail = a.pos();
        if_asked_to_leave(&mut a, |a| {
            a.store_imm(&field(offset_of!(Area, exit_code)), ExitCode::NotBegun as i32);
            host_units(a);
            leave(a);
        });
        restore(&mut a);
        a.load(host::RSP, &field(offset_of!(Area, return_sp)));
        a.jmp_mem(&field(offset_of!(Area, enter_pc)));
        tails[0] = (base + tail as u64, base + a.pos() as u64);
        let leave_at = a.pos();
        leave(&mut a);
        let mut n = 0;
        let mut thunk = |a: &mut Asm, f| {
            let at = base + a.pos() as u64;
            let tail = call(a, f, leave_at);
            n += 1;
            tails[n] = (base + tail as u64, base + a.pos() as u64);
            at
        };
        let mem = thunk(&mut a, mem);
        let first = thunk(&mut a, first);
        let commit = thunk(&mut a, commit);
        let helper = thunk(&mut a, helper);
        let call_first = base + a.pos() as u64;
        a.near_abs(0xe8, first, base);
        let mut exits = [0; 7];
        let common = a.pos();
        save(&mut a);
        leave(&mut a);
        for code in [
            ExitCode::Link,
            ExitCode::Indirect,
            ExitCode::Interrupt,
            ExitCode::Helper,
            ExitCode::Fault,
            ExitCode::Return,
        ] {
            exits[code as usize] = base + a.pos() as u64;
            match code {
                ExitCode::Link => a.store(&field(offset_of!(Area, exit_arg)), SC),
                ExitCode::Indirect => {
                    a.store(&field(offset_of!(Area, exit_arg)), SC);
                    a.store(&field(offset_of!(Area, exit_rip)), S0);
                }
                ExitCode::Return => a.store(&field(offset_of!(Area, exit_rip)), S0),
                _ => {}
            }
            a.store(&field(offset_of!(Area, return_sp)), host::RSP);
            a.load(host::RSP, &field(offset_of!(Area, host_rsp)));
            a.store_imm(&field(offset_of!(Area, exit_code)), code as i32);
            a.jmp_to(common);
        }
        let miss = base + a.pos() as u64;
        a.mov_imm(SC, NO_BRANCH);
        a.near_abs(0xe9, exits[ExitCode::Indirect as usize], base);
        let unexpected = base + a.pos() as u64;
        a.load(host::RSP, &field(offset_of!(Area, return_top)));
        through_jump_cache(&mut a);
        a.near_abs(0xe9, exits[ExitCode::Return as usize], base);
        let unmatched = base + a.pos() as u64;
        through_jump_cache(&mut a);
        a.near_abs(0xe9, exits[ExitCode::Return as usize], base);
        let barrier = base + a.pos() as u64;
        // It stays where it is.
        a.lea(host::RSP, &Mem::base(host::RSP, -8));
        through_jump_cache(&mut a);
        a.near_abs(0xe9, exits[ExitCode::Return as usize], base);
        let end = base + a.pos() as u64;
        cache.push_permanent(&a.buf);
        Self {
            mem,
            first: call_first,
            commit,
            helper,
            enter,
            miss,
            unexpected,
            unmatched,
            barrier,
            exits,
            tails,
            start: base,
            end,
        }
    }

    /// The beginning of the tail that `pc` is in. Tails run on the thread's stack, where it was when
    /// generated code was entered.
    pub fn tail_of(&self, pc: u64) -> Option<u64> {
        self.tails.iter().find(|t| pc >= t.0 && pc < t.1).map(|t| t.0)
    }

    /// Bytes of the fixed pieces.
    pub fn len(&self) -> u64 {
        self.end - self.start
    }

    /// Whether `pc` is in the fixed pieces.
    pub fn contain(&self, pc: u64) -> bool {
        pc >= self.start && pc < self.end
    }

    /// Host address of an exit.
    pub fn exit(&self, code: ExitCode) -> u64 {
        self.exits[code as usize]
    }
}
