//! Host signals raised by generated code.
//!
//! An access to a page that is not in the TLB or across the end of a guarded one, a store to the
//! read-only view of RAM or to a write-protected page, a non-canonical address, a misaligned SSE
//! operand, a division by zero, an unmasked floating-point exception: the processor finds these for
//! us. The handler runs on its own stack, finds the vCPU by the GS base (checked by the PC being in a
//! code cache of ours), and changes only where the thread goes on: at the slow path of the access, or
//! at the exit that reports a fault. Signals from anywhere else get their default action.
//!
//! One more signal makes a thread leave generated code. Only between two guest instructions is the
//! state complete: the handler goes back to the start of an instruction that has done nothing yet, or
//! sets the trap flag and steps until that is possible.

use std::cell::Cell;
use std::io;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::layout::{AREA_SIZE, Area};
use crate::shared::MAX_VCPUS;

/// Code caches of the process: start and end.
static RANGES: [(AtomicU64, AtomicU64); RANGE_LIMIT] =
    [const { (AtomicU64::new(0), AtomicU64::new(0)) }; RANGE_LIMIT];
/// Translated vCPUs of one process (several machines, in tests).
const RANGE_LIMIT: usize = MAX_VCPUS * 16;
/// Bytes of the stack the handler runs on.
const STACK_BYTES: usize = 64 << 10;

static INSTALL: Once = Once::new();

/// Registers a code cache; `false` when there are too many.
pub fn register(range: (u64, u64)) -> bool {
    INSTALL.call_once(install);
    for (start, end) in &RANGES {
        if start.compare_exchange(0, range.0, Ordering::SeqCst, Ordering::SeqCst).is_ok() {
            end.store(range.1, Ordering::SeqCst);
            return true;
        }
    }
    false
}

/// Forgets a code cache.
pub fn unregister(range: (u64, u64)) {
    for (start, end) in &RANGES {
        if start.load(Ordering::SeqCst) == range.0 {
            end.store(0, Ordering::SeqCst);
            start.store(0, Ordering::SeqCst);
            return;
        }
    }
}

/// Trap flag in EFLAGS.
const TF: i64 = 1 << 8;

/// The signal that makes a thread leave generated code.
fn stop_signal() -> i32 {
    libc::SIGRTMIN() + 2
}

/// Thread id of the caller.
pub fn this_thread() -> i32 {
    // SAFETY: a system call without arguments.
    unsafe { libc::gettid() }
}

/// Makes another thread of this process leave generated code; nothing for the calling thread,
/// which is not in there.
pub fn stop(thread: i32) {
    if thread == this_thread() {
        return;
    }
    // SAFETY: a plain system call; the thread is one of ours, or has ended, which is an error that
    // does no harm.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), thread, stop_signal()) };
}

const SIGNALS: [i32; 5] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP];

fn install() {
    for sig in SIGNALS.into_iter().chain([stop_signal()]) {
        // SAFETY: a zeroed sigaction is a valid value to fill in; the handler only does what is
        // allowed in a handler (see `handler`).
        unsafe {
            let mut sa: libc::sigaction = std::mem::zeroed();
            sa.sa_sigaction = handler as *const () as usize;
            sa.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
            libc::sigemptyset(&mut sa.sa_mask);
            // In another handler it would find no generated code to leave, and nobody sends it again.
            libc::sigaddset(&mut sa.sa_mask, stop_signal());
            libc::sigaction(sig, &sa, std::ptr::null_mut());
        }
    }
}

thread_local! {
    static HAS_STACK: Cell<bool> = const { Cell::new(false) };
    static INSTEAD: Cell<i32> = const { Cell::new(0) };
}

/// Whoever wants the current thread to leave generated code wants this process to stop (0: none),
/// which executes user code for it.
pub fn tell_instead(pid: i32) {
    INSTEAD.set(pid);
    std::sync::atomic::compiler_fence(Ordering::SeqCst);
}

/// Gives the current thread a stack for signals; it stays for the thread's life.
///
/// # Errors
/// When the mapping or the system call fails.
pub fn prepare_thread() -> io::Result<()> {
    if HAS_STACK.get() {
        return Ok(());
    }
    // SAFETY: a fresh private mapping, never unmapped (threads of vCPUs are few), handed to the
    // kernel as this thread's signal stack.
    unsafe {
        let p = libc::mmap(
            std::ptr::null_mut(),
            STACK_BYTES,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        if p == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let ss = libc::stack_t { ss_sp: p, ss_flags: 0, ss_size: STACK_BYTES };
        if libc::sigaltstack(&ss, std::ptr::null_mut()) != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    HAS_STACK.set(true);
    Ok(())
}

fn ours(pc: u64) -> bool {
    RANGES.iter().any(|(s, e)| pc >= s.load(Ordering::Relaxed) && pc < e.load(Ordering::Relaxed))
}

/// What an interrupted vCPU does that is to leave generated code.
pub enum Stop {
    /// Nothing: it comes by where it looks anyway.
    Later,
    /// Goes on here, with this stack pointer if any, and leaves.
    Go(u64, Option<u64>),
    /// Executes one more instruction.
    Step,
}

extern "C" fn handler(sig: i32, info: *mut libc::siginfo_t, ctx: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid ucontext to an SA_SIGINFO handler.
    let uc = unsafe { &mut *ctx.cast::<libc::ucontext_t>() };
    let regs = &mut uc.uc_mcontext.gregs;
    let pc = regs[libc::REG_RIP as usize] as u64;
    if !ours(pc) {
        if sig == stop_signal() {
            let instead = INSTEAD.get();
            if instead != 0 {
                crate::direct::stub::tell(instead);
            }
        } else {
            // SAFETY: restores the default action; the instruction is run again and the process dies
            // as it would have without us.
            unsafe { libc::signal(sig, libc::SIG_DFL) };
        }
        return;
    }
    let gs: u64;
    // SAFETY: reads the GS base; the processor has the instruction (checked at set-up).
    unsafe { std::arch::asm!("rdgsbase {}", out(reg) gs, options(nomem, nostack)) };
    let area = (gs - AREA_SIZE as u64) as *mut Area;
    // SAFETY: the PC is in generated code, so GS is the base of a view of a live vCPU, whose area
    // lies before it; this thread was in generated code and holds no reference to it.
    unsafe {
        if sig == stop_signal() || sig == libc::SIGTRAP && (*area).stepping != 0 {
            // RCX is SC.
            let sc = regs[libc::REG_RCX as usize] as u64;
            let stop = crate::vcpu::stop_target((*area).owner, pc, sc, sig == libc::SIGTRAP);
            (*area).stepping = u64::from(matches!(stop, Stop::Step));
            regs[libc::REG_EFL as usize] &= !TF;
            match stop {
                Stop::Later => {}
                Stop::Step => regs[libc::REG_EFL as usize] |= TF,
                Stop::Go(pc, sp) => {
                    regs[libc::REG_RIP as usize] = pc as i64;
                    if let Some(sp) = sp {
                        regs[libc::REG_RSP as usize] = sp as i64;
                    }
                }
            }
            return;
        }
        if sig == libc::SIGSEGV
            && crate::vcpu::return_stack_full((*area).owner, (*info).si_addr() as u64)
        {
            regs[libc::REG_RSP as usize] = (*area).return_top as i64;
            (*area).user_return_sp = (*area).return_top;
            return;
        }
        let trap = regs[libc::REG_TRAPNO as usize] as u64;
        (*area).fault_trap = trap;
        (*area).fault_pc = pc;
        (*area).fault_signal = sig as u64;
        (*area).fault_address = (*info).si_addr() as u64;
        regs[libc::REG_RIP as usize] = crate::vcpu::signal_target((*area).owner, pc, sig) as i64;
    }
}
