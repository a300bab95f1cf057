//! The return stack: what host RSP points to while generated code runs.
//!
//! A guest CALL pushes the guest's return address to the guest's stack and makes a host CALL, so
//! that the guest's RET can be a host RET, which the processor predicts. The stack holds nothing but
//! addresses behind such calls in generated code. There the translation compares the guest's
//! return address with the one it expects; when they differ (a longjmp, a switch of stacks) it goes
//! through the jump cache. At the bottom lies the address of code that does the same. So the stack
//! is a hint that can be forgotten at any time, and is whenever translations or mappings change; a
//! full one traps at the guard below it and begins anew.

use std::io;

use crate::layout::Area;
use crate::sys::{self, Reservation};

/// Bytes of the stack.
const BYTES: usize = 64 << 10;
/// Bytes without access below it.
const GUARD: usize = 64 << 10;
/// Bytes above the lowest entry, for thunks that push.
const ABOVE: u64 = 64;

/// The stack of one vCPU.
pub struct Returns {
    space: Reservation,
}

impl Returns {
    /// An empty stack; returns from an empty one go to the host address `bottom`.
    ///
    /// # Errors
    /// When the mapping is refused.
    pub fn new(bottom: u64) -> io::Result<Self> {
        let space = Reservation::new(GUARD + BYTES)?;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        sys::mprotect(space.addr() + GUARD as u64, BYTES, rw)?;
        let returns = Self { space };
        // SAFETY: aligned, inside the writable part, which nobody else knows yet.
        unsafe { (returns.top() as *mut u64).write(bottom) };
        Ok(returns)
    }

    /// The stack pointer when it is empty.
    pub fn top(&self) -> u64 {
        self.space.addr() + (GUARD + BYTES) as u64 - ABOVE
    }

    /// Whether an access at `address` is a push to a full stack.
    pub fn is_full_at(&self, address: u64) -> bool {
        (self.space.addr()..self.space.addr() + GUARD as u64).contains(&address)
    }

    /// Makes a thunk that waits for Rust return to `host` instead of to its call.
    pub fn return_to(&self, area: &Area, host: u64) {
        // SAFETY: the thunk was called with its return address at `thunk_sp`, in the stack.
        unsafe { (area.thunk_sp as *mut u64).write(host) };
    }

    /// Forgets everything while generated code does not run, or, with `called`, while it waits for
    /// Rust to return to it.
    pub fn forget(&self, area: &mut Area, called: bool) {
        let top = self.top();
        area.return_sp = top;
        area.user_return_sp = top;
        if called && area.thunk_sp != top - 8 {
            // SAFETY: the thunk was called with its return address at `thunk_sp`, which lies in the
            // stack, as do the eight bytes below its top.
            unsafe { ((top - 8) as *mut u64).write((area.thunk_sp as *const u64).read()) };
            area.thunk_sp = top - 8;
        }
    }
}
