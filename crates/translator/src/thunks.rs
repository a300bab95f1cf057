//! The fixed pieces of generated code: entry, exits, and calls from generated code into Rust.
//!
//! All of them keep the same discipline. On the way out every guest register goes to the
//! [`Area`], the direction flag is cleared, the upper halves of the vector registers are zeroed and
//! MXCSR is set to the host's; on the way back everything is loaded again. x87 state stays in the
//! processor: Rust code does not touch it.

use std::mem::offset_of;

use crate::asm::{Asm, Mem};
use crate::code::CodeCache;
use crate::layout::{
    Area, ExitCode, GUEST_RCX, GUEST_RSP, S0, S1, SC, disp, gpr_disp, host, mapped,
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

/// Host addresses of the fixed pieces.
#[derive(Clone, Copy)]
pub struct Thunks {
    /// Slow path of an access.
    pub mem: u64,
    /// Commits a bounced store.
    pub commit: u64,
    /// Executes an instruction.
    pub helper: u64,
    /// Entry from Rust: `extern "C" fn()`.
    pub enter: u64,
    exits: [u64; 6],
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
    a.op_mem(false, &[0x0f, 0xae], 3, &field(offset_of!(Area, mxcsr))); // stmxcsr
    a.op_mem(false, &[0x0f, 0xae], 2, &field(offset_of!(Area, host_mxcsr))); // ldmxcsr
    a.bytes(&[0xfc]); // cld
    a.bytes(&[0xc5, 0xf8, 0x77]); // vzeroupper
}

fn restore(a: &mut Asm) {
    a.op_mem(false, &[0x0f, 0xae], 2, &field(offset_of!(Area, mxcsr)));
    for i in 0..16u8 {
        a.load_ymm(i, &field(offset_of!(Area, ymm) + usize::from(i) * 32));
    }
    a.push_mem(&field(offset_of!(Area, host_flags)));
    a.bytes(&[0x9d]); // popfq
    for (g, h) in mapped_regs() {
        a.load(h, &Mem::gs(gpr_disp(g)));
    }
    a.load(S0, &field(offset_of!(Area, s0)));
    a.load(S1, &field(offset_of!(Area, s1)));
    a.load(SC, &field(offset_of!(Area, sc)));
}

const CALLEE_SAVED: [u8; 6] = [host::RBX, host::RBP, host::R12, host::R13, host::R14, host::R15];

/// Back to Rust; everything is saved.
fn leave(a: &mut Asm) {
    a.load(host::RSP, &field(offset_of!(Area, host_rsp)));
    for r in CALLEE_SAVED.iter().rev() {
        a.pop(*r);
    }
    a.ret();
}

fn call(a: &mut Asm, f: HelperFn, leave_at: usize) {
    save(a);
    a.load(host::RDI, &field(offset_of!(Area, owner)));
    a.load(host::RSI, &Mem::base(host::RSP, 0));
    a.mov(host::RDX, S0);
    a.mov_imm(host::RAX, f as usize as u64);
    a.call_reg(host::RAX);
    a.bytes(&[0x83, 0xf8, 0x01]); // cmp eax, 1
    let above = a.jcc(7);
    a.bind_near_to(above, leave_at);
    let below = a.jcc(2);
    a.op_mem(true, &[0x83], 0, &Mem::base(host::RSP, 0)); // add qword [rsp], 5
    a.bytes(&[5]);
    a.bind_near(below);
    restore(a);
    a.ret();
}

impl Thunks {
    /// Generates the fixed pieces at the start of a cache.
    pub fn new(cache: &mut CodeCache, mem: HelperFn, commit: HelperFn, helper: HelperFn) -> Self {
        debug_assert!(mapped(1) == Some(GUEST_RCX) && mapped(4) == Some(GUEST_RSP));
        let base = cache.next_host();
        let mut a = Asm::default();
        let enter = base;
        for r in CALLEE_SAVED {
            a.push(r);
        }
        a.store(&field(offset_of!(Area, host_rsp)), host::RSP);
        restore(&mut a);
        a.jmp_mem(&field(offset_of!(Area, enter_pc)));
        let leave_at = a.pos();
        leave(&mut a);
        let thunk = |a: &mut Asm, f| {
            let at = base + a.pos() as u64;
            call(a, f, leave_at);
            at
        };
        let mem = thunk(&mut a, mem);
        let commit = thunk(&mut a, commit);
        let helper = thunk(&mut a, helper);
        let mut exits = [0; 6];
        let common = a.pos();
        save(&mut a);
        leave(&mut a);
        for code in [
            ExitCode::Link,
            ExitCode::Indirect,
            ExitCode::Interrupt,
            ExitCode::Helper,
            ExitCode::Fault,
        ] {
            exits[code as usize] = base + a.pos() as u64;
            a.store_imm(&field(offset_of!(Area, exit_code)), code as i32);
            a.jmp_to(common);
        }
        cache.push_permanent(&a.buf);
        Self { mem, commit, helper, enter, exits }
    }

    /// Host address of an exit.
    pub fn exit(&self, code: ExitCode) -> u64 {
        self.exits[code as usize]
    }
}
