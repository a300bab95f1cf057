//! The child process: takes cases from the exchange, runs each on the bare processor, and writes
//! back what the signal at its end reports.
//!
//! It is forked from a process that may have threads, so nothing here allocates, locks or panics;
//! what fails ends the process with an exit status the parent reports.
//!
//! A case is entered by loading every register and jumping. It always ends in an exception. The
//! kernel then puts the state into a signal frame on an alternate stack; the handler copies it to
//! the slot and continues after the entry (no sigreturn: all signals stay unblocked through
//! SA_NODEFER and an empty mask). FS and GS bases and selectors are not in the frame, so the
//! assembly entry of the handler saves them and restores the host's before any Rust code runs.

use std::mem::offset_of;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicU64, Ordering};

use crate::layout::{IMAGE, PAGE, Region, Rights, World};
use crate::native::slot::{Exchange, Input, Output, Slot, WORDS};

/// Exit statuses of the child.
pub mod status {
    /// Mapping the worlds failed (an address is in use).
    pub const MAP: i32 = 40;
    /// Setting up signals or the system call filter failed.
    pub const SETUP: i32 = 41;
    /// A signal outside a case.
    pub const STRAY: i32 = 42;
}

/// Host stack pointer to continue with after a case.
static HOST_RSP: AtomicU64 = AtomicU64::new(0);
/// Host FS base (thread-local storage).
static HOST_FS: AtomicU64 = AtomicU64::new(0);
/// Where the case begins (64-bit), and offset and selector for a far jump.
static TARGET: [AtomicU64; 2] = [AtomicU64::new(0), AtomicU64::new(0)];
/// FS base, GS base, and DS, ES, FS, GS as the case left them.
static LEFT: [AtomicU64; 6] = [const { AtomicU64::new(0) }; 6];
/// The slot of the running case; null outside.
static RUNNING: AtomicPtr<Slot> = AtomicPtr::new(std::ptr::null_mut());

std::arch::global_asm!(
    ".globl berth_difftest_enter",
    "berth_difftest_enter:",
    "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
    "mov [rip + {host_rsp}], rsp",
    "rdfsbase rax",
    "mov [rip + {host_fs}], rax",
    "mov eax, 7",
    "xor edx, edx",
    "xrstor64 [rdi]",
    "mov rax, [rdi + {data_selector}]",
    "mov ds, ax",
    "mov es, ax",
    "mov rax, [rdi + {fs_base}]",
    "wrfsbase rax",
    "mov rax, [rdi + {gs_base}]",
    "wrgsbase rax",
    "mov rax, [rdi + {rip}]",
    "mov [rip + {target}], rax",
    "mov rax, [rdi + {code_selector}]",
    "mov [rip + {target} + 4], eax",
    "cmp eax, 0x23",
    "push qword ptr [rdi + {rflags}]",
    "je 2f",
    // 64-bit: the high half of the address was overwritten by the selector; write it again.
    "mov rax, [rdi + {rip}]",
    "mov [rip + {target}], rax",
    "popfq",
    "mov rax, [rdi + {gpr}]",
    "mov rcx, [rdi + {gpr} + 8]",
    "mov rdx, [rdi + {gpr} + 16]",
    "mov rbx, [rdi + {gpr} + 24]",
    "mov rsp, [rdi + {gpr} + 32]",
    "mov rbp, [rdi + {gpr} + 40]",
    "mov rsi, [rdi + {gpr} + 48]",
    "mov r8, [rdi + {gpr} + 64]",
    "mov r9, [rdi + {gpr} + 72]",
    "mov r10, [rdi + {gpr} + 80]",
    "mov r11, [rdi + {gpr} + 88]",
    "mov r12, [rdi + {gpr} + 96]",
    "mov r13, [rdi + {gpr} + 104]",
    "mov r14, [rdi + {gpr} + 112]",
    "mov r15, [rdi + {gpr} + 120]",
    "mov rdi, [rdi + {gpr} + 56]",
    "jmp qword ptr [rip + {target}]",
    "2:",
    "popfq",
    "mov r8d, 0",
    "mov r9d, 0",
    "mov r10d, 0",
    "mov r11d, 0",
    "mov r12d, 0",
    "mov r13d, 0",
    "mov r14d, 0",
    "mov r15d, 0",
    "mov eax, [rdi + {gpr}]",
    "mov ecx, [rdi + {gpr} + 8]",
    "mov edx, [rdi + {gpr} + 16]",
    "mov ebx, [rdi + {gpr} + 24]",
    "mov esp, [rdi + {gpr} + 32]",
    "mov ebp, [rdi + {gpr} + 40]",
    "mov esi, [rdi + {gpr} + 48]",
    "mov edi, [rdi + {gpr} + 56]",
    "jmp fword ptr [rip + {target}]",
    ".globl berth_difftest_leave",
    "berth_difftest_leave:",
    "mov rsp, [rip + {host_rsp}]",
    "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
    "ret",
    ".globl berth_difftest_signal",
    "berth_difftest_signal:",
    // The kernel clears DF and TF but not AC, which would make our own accesses fault.
    "push 0x202",
    "popfq",
    "rdfsbase rax",
    "mov [rip + {left}], rax",
    "rdgsbase rax",
    "mov [rip + {left} + 8], rax",
    "mov eax, ds",
    "mov [rip + {left} + 16], rax",
    "mov eax, es",
    "mov [rip + {left} + 24], rax",
    "mov eax, fs",
    "mov [rip + {left} + 32], rax",
    "mov eax, gs",
    "mov [rip + {left} + 40], rax",
    "xor eax, eax",
    "mov ds, ax",
    "mov es, ax",
    "mov fs, ax",
    "mov gs, ax",
    "mov rcx, [rip + {host_fs}]",
    "wrfsbase rcx",
    "wrgsbase rax",
    "jmp {on_signal}",
    host_rsp = sym HOST_RSP,
    host_fs = sym HOST_FS,
    target = sym TARGET,
    left = sym LEFT,
    on_signal = sym on_signal,
    gpr = const offset_of!(Input, gpr),
    rip = const offset_of!(Input, rip),
    rflags = const offset_of!(Input, rflags),
    fs_base = const offset_of!(Input, fs_base),
    gs_base = const offset_of!(Input, gs_base),
    data_selector = const offset_of!(Input, data_selector),
    code_selector = const offset_of!(Input, code_selector),
);

unsafe extern "C" {
    fn berth_difftest_enter(input: *const Input);
    fn berth_difftest_leave() -> !;
    fn berth_difftest_signal();
}

/// Ends the child at once.
fn quit(code: i32) -> ! {
    // SAFETY: `_exit` takes no pointers and does not return.
    unsafe { libc::_exit(code) }
}

/// Registers of a signal frame in the order of `Final::gpr`.
const GREGS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

extern "C" fn on_signal(
    signal: i32,
    _info: *const libc::siginfo_t,
    context: *const libc::ucontext_t,
) -> ! {
    let slot = RUNNING.swap(std::ptr::null_mut(), Ordering::Relaxed);
    if slot.is_null() {
        quit(status::STRAY);
    }
    // SAFETY: the slot was set by `run_slot` and lies in the exchange, which stays mapped; nothing
    // else refers to its output. The kernel passes a complete context, whose `fpregs` points to an
    // XSAVE area of at least 832 bytes because AVX is enabled (checked by the parent).
    unsafe {
        let out = &mut (*slot).output;
        let regs = &(*context).uc_mcontext.gregs;
        for (to, from) in out.gpr.iter_mut().zip(GREGS) {
            *to = regs[from as usize] as u64;
        }
        out.rip = regs[libc::REG_RIP as usize] as u64;
        out.rflags = regs[libc::REG_EFL as usize] as u64;
        out.vector = regs[libc::REG_TRAPNO as usize] as u32;
        out.error = regs[libc::REG_ERR as usize] as u64;
        out.cr2 = regs[libc::REG_CR2 as usize] as u64;
        out.signal = signal as u32;
        let csgsfs = regs[libc::REG_CSGSFS as usize] as u64;
        let left = |i: usize| LEFT[i].load(Ordering::Relaxed);
        out.fs_base = left(0);
        out.gs_base = left(1);
        let (cs, ss) = (csgsfs as u16, (csgsfs >> 48) as u16);
        out.selectors = [left(3) as u16, cs, ss, left(2) as u16, left(4) as u16, left(5) as u16];
        let fpu: *const u8 = (*context).uc_mcontext.fpregs.cast();
        std::ptr::copy_nonoverlapping(fpu, out.xsave.0.as_mut_ptr(), out.xsave.0.len());
        berth_difftest_leave()
    }
}

/// What the child was given by the parent.
pub struct Setup {
    /// The exchange.
    pub exchange: *mut Exchange,
    /// File of both worlds' images.
    pub images: i32,
    /// The image all cases start from.
    pub base: *const u8,
}

/// Maps everything, then runs batches forever.
pub fn main(setup: &Setup) -> ! {
    let images = map_worlds(setup.images);
    if !install_signals() || !install_filter() {
        quit(status::SETUP);
    }
    // SAFETY: the parent mapped the exchange (shared) and the base image before forking, and both
    // stay mapped for the life of this process.
    let (header, base) = unsafe {
        (&(*setup.exchange).header, std::slice::from_raw_parts(setup.base, IMAGE as usize))
    };
    for world in 0..World::ALL.len() {
        // SAFETY: `images` maps IMAGE bytes for each world, writable, and nobody else uses it.
        unsafe {
            let to = images.add(world * IMAGE as usize);
            std::ptr::copy_nonoverlapping(base.as_ptr(), to, IMAGE as usize);
        }
    }
    let mut seen = 0;
    loop {
        while header.ordered.load(Ordering::Acquire) == seen {
            futex_wait(&header.ordered, seen);
        }
        seen = header.ordered.load(Ordering::Acquire);
        let first = header.first.load(Ordering::Relaxed);
        for i in first..header.count.load(Ordering::Relaxed) {
            header.current.store(i, Ordering::Relaxed);
            // SAFETY: the parent sets `count` to at most SLOTS and leaves the slots alone until
            // `done` says so; `images` is as above.
            unsafe { run_slot(&raw mut (*setup.exchange).slots[i as usize], images, base) };
        }
        header.done.store(seen, Ordering::Release);
        futex_wake(&header.done);
    }
}

/// # Safety
/// `slot` points to a filled slot nobody else uses now; `images` to both worlds' images.
unsafe fn run_slot(slot: *mut Slot, images: *mut u8, base: &[u8]) {
    // SAFETY: by the contract of this function; patches are bounded below.
    unsafe {
        let input = &(*slot).input;
        let image = images.add(input.world as usize * IMAGE as usize);
        let mut expected = [0u8; IMAGE as usize];
        expected.copy_from_slice(base);
        for patch in input.patches.iter().take(input.patch_count as usize) {
            let (at, len) = (patch.offset as usize, patch.len as usize);
            if at + len > expected.len() || len > patch.data.len() {
                quit(status::SETUP);
            }
            expected[at..at + len].copy_from_slice(&patch.data[..len]);
            std::ptr::copy_nonoverlapping(patch.data.as_ptr(), image.add(at), len);
        }
        RUNNING.store(slot, Ordering::Relaxed);
        berth_difftest_enter(&raw const (*slot).input);
        collect_memory(&mut (*slot).output, image, &expected);
        restore(image, base);
    }
}

/// # Safety
/// `image` points to a world's image.
unsafe fn collect_memory(out: &mut Output, image: *const u8, expected: &[u8]) {
    // SAFETY: by the contract; nothing writes the image now.
    let image = unsafe { std::slice::from_raw_parts(image, IMAGE as usize) };
    let mut changed = 0;
    let page = PAGE as usize;
    for (p, (is, was)) in image.chunks_exact(page).zip(expected.chunks_exact(page)).enumerate() {
        if is == was {
            continue;
        }
        for (w, (is, was)) in is.chunks_exact(8).zip(was.chunks_exact(8)).enumerate() {
            if is != was && changed < WORDS {
                let mut word = [0; 8];
                word.copy_from_slice(is);
                out.words[changed] = ((p * page + w * 8) as u32, u64::from_le_bytes(word));
                changed += 1;
            }
        }
    }
    out.changed = changed as u32;
}

/// # Safety
/// `image` points to a world's image.
unsafe fn restore(image: *mut u8, base: &[u8]) {
    for at in (0..base.len()).step_by(PAGE as usize) {
        let good = &base[at..at + PAGE as usize];
        // SAFETY: by the contract; the page is within the image.
        unsafe {
            let page = std::slice::from_raw_parts_mut(image.add(at), PAGE as usize);
            if page != good {
                page.copy_from_slice(good);
            }
        }
    }
}

/// Maps both worlds at their addresses and returns a writable view of both images.
fn map_worlds(images: i32) -> *mut u8 {
    let flags = libc::MAP_SHARED | libc::MAP_POPULATE;
    for world in World::ALL {
        for region in Region::ALL {
            let protection = libc::PROT_READ
                | match region.rights {
                    Rights::All => libc::PROT_WRITE | libc::PROT_EXEC,
                    Rights::Write => libc::PROT_WRITE,
                    Rights::Read => 0,
                };
            let at = (world.base() + u64::from(region.offset)) as usize;
            let offset = (world.index() as u32 * IMAGE + region.image) as libc::off_t;
            // SAFETY: MAP_FIXED_NOREPLACE never replaces an existing mapping.
            let got = unsafe {
                libc::mmap(
                    at as *mut libc::c_void,
                    region.len() as usize,
                    protection,
                    flags | libc::MAP_FIXED_NOREPLACE,
                    images,
                    offset,
                )
            };
            if got as usize != at {
                quit(status::MAP);
            }
        }
    }
    // SAFETY: a new mapping at an address the kernel chooses.
    let view = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            IMAGE as usize * World::ALL.len(),
            libc::PROT_READ | libc::PROT_WRITE,
            flags,
            images,
            0,
        )
    };
    if view == libc::MAP_FAILED {
        quit(status::MAP);
    }
    view.cast()
}

fn install_signals() -> bool {
    const STACK: usize = 64 * 1024;
    // SAFETY: a new mapping; the structures passed are complete and live through the calls. The
    // handler is the assembly entry above, made for SA_SIGINFO.
    unsafe {
        let stack = libc::mmap(
            std::ptr::null_mut(),
            STACK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
            -1,
            0,
        );
        if stack == libc::MAP_FAILED {
            return false;
        }
        let alternate = libc::stack_t { ss_sp: stack, ss_flags: 0, ss_size: STACK };
        if libc::sigaltstack(&raw const alternate, std::ptr::null_mut()) != 0 {
            return false;
        }
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = berth_difftest_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        let signals =
            [libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGTRAP, libc::SIGSYS];
        let empty: libc::sigset_t = std::mem::zeroed();
        libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, std::ptr::null_mut());
        signals.iter().all(|s| libc::sigaction(*s, &raw const action, std::ptr::null_mut()) == 0)
    }
}

/// Makes a system call from a case's code raise SIGSYS: generated bytes must not exit, kill or
/// unmap anything.
fn install_filter() -> bool {
    const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const AND: u16 = (libc::BPF_ALU | libc::BPF_AND | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
    let high = |w: World| (w.base() >> 32) as u32;
    let low = |w: World| w.base() as u32;
    // instruction_pointer is at 8 (low half) and 12 (high half) of struct seccomp_data; a world
    // with everything in it is smaller than 256 KiB.
    let mut filter = [
        op(LOAD, 0, 0, 12),
        op(EQUAL, 0, 3, high(World::Low)),
        op(LOAD, 0, 0, 8),
        op(AND, 0, 0, 0xfffc_0000),
        op(EQUAL, 5, 4, low(World::Low)),
        op(EQUAL, 0, 3, high(World::High)),
        op(LOAD, 0, 0, 8),
        op(AND, 0, 0, 0xfffc_0000),
        op(EQUAL, 1, 0, low(World::High)),
        op(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW),
        op(RETURN, 0, 0, libc::SECCOMP_RET_TRAP),
    ];
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: plain arguments, then a program that lives through the call.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0
            && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program) == 0
    }
}

/// Sleeps until `word` is no longer `value` (or for no reason).
fn futex_wait(word: &AtomicU32, value: u32) {
    // SAFETY: the word is valid; no timeout.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            libc::FUTEX_WAIT,
            value,
            std::ptr::null::<libc::timespec>(),
        );
    }
}

/// Wakes the other side.
pub fn futex_wake(word: &AtomicU32) {
    // SAFETY: the word is valid.
    unsafe {
        libc::syscall(libc::SYS_futex, word.as_ptr(), libc::FUTEX_WAKE, 1);
    }
}
