//! A process whose memory shows one guest address space, and which executes guest user code there.
//!
//! It is traced by the vCPU's thread and makes no system call of its own accord: those of guest code
//! are stopped before they are executed (`PTRACE_SYSEMU`). Its only memory besides the guest's is two
//! pages at an address that is chosen at random: the instructions by which it changes its own mappings
//! on our behalf, and the list of such changes. Both are read-only there. A filter lets no system calls
//! through but those that such changes need.

use std::cell::Cell;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Error, Write};
use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use berth_x86::state::XSAVE_SIZE;

use crate::fpu::YMM_HIGH;
use crate::ram::PAGE;
use crate::sys::{self, Reservation};

/// Where the process begins: the lowest page that any system lets be mapped.
const START: u64 = 0x1_0000;
/// End of what the system lets programs map.
pub const END: u64 = 0x7fff_ffff_f000;
/// Between these are the two pages that are ours while guest code runs: far from where Linux puts
/// programs, their heaps, libraries and stacks.
const PLACES: std::ops::Range<u64> = 0x2000_0000_0000..0x5000_0000_0000;
/// Of the code below in its page.
const CALL_AT: u64 = 0x100;
const BATCH_AT: u64 = 0x110;
const FLAGS_AT: u64 = 0x180;
/// The processor's breakpoints, one for each instruction that is not to be executed.
pub const BREAKPOINTS: usize = 4;
/// System calls in one batch.
pub const BATCH: usize = 64;
/// `long`s of an entry of the list: number and arguments of a system call.
const WORDS: usize = 7;

const NT_X86_XSTATE: i32 = 0x202;
const PTRACE_SYSEMU: libc::c_uint = 31;
/// In `si_code`: a single step.
const TRAP_TRACE: i32 = 2;
/// The same: a breakpoint of the processor's.
const TRAP_HWBKPT: i32 = 4;
/// Where it is tried once whether there are pages that can be executed only.
const EXECUTE_ONLY_AT: u64 = 0x10_0000;
const ARCH_SET_CPUID: u64 = 0x1012;

/// SYSCALL; INT3.
const CALL: [u8; 3] = [0x0f, 0x05, 0xcc];
/// Executes as many system calls from the list at RBX as EBP says, until one fails; INT3.
const BATCH_CODE: [u8; 46] = [
    0x48, 0x8b, 0x03, // mov rax, [rbx]
    0x48, 0x8b, 0x7b, 0x08, // mov rdi, [rbx + 8]
    0x48, 0x8b, 0x73, 0x10, // mov rsi, [rbx + 16]
    0x48, 0x8b, 0x53, 0x18, // mov rdx, [rbx + 24]
    0x4c, 0x8b, 0x53, 0x20, // mov r10, [rbx + 32]
    0x4c, 0x8b, 0x43, 0x28, // mov r8, [rbx + 40]
    0x4c, 0x8b, 0x4b, 0x30, // mov r9, [rbx + 48]
    0x0f, 0x05, // syscall
    0x48, 0x3d, 0x01, 0xf0, 0xff, 0xff, // cmp rax, -4095
    0x73, 0x08, // jae end
    0x48, 0x83, 0xc3, 0x38, // add rbx, 56
    0xff, 0xcd, // dec ebp
    0x75, 0xd3, // jnz start
    0xcc, // end: int3
];
/// POPFQ; INT3.
const FLAGS_CODE: [u8; 2] = [0x9d, 0xcc];
/// The flag of programs that the system does not let tracers set: ID.
pub const STUBBORN: u64 = 1 << 21;
/// Signal that stops guest code.
const STOP: i32 = libc::SIGUSR1;

/// General registers as the host's kernel hands them out.
pub type Regs = libc::user_regs_struct;

/// Why the process stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stopped {
    /// At a system call, which was not executed; RIP is behind the instruction.
    Syscall,
    /// At an access to an address.
    Access {
        /// The address, 0 if not known.
        address: u64,
        /// The page is mapped; it was the kind of access that was refused.
        mapped: bool,
    },
    /// After INT3 or INT1.
    Trap,
    /// After a single step.
    Step,
    /// At a call of the host's vsyscall page, which has returned without having done anything.
    Vsyscall {
        /// The address that was called.
        at: u64,
    },
    /// At something else that guest code may not do or that has to be looked at.
    Other,
    /// Somebody wants the vCPU to do something.
    Told,
}

/// One change of mappings.
#[derive(Clone, Copy, Debug)]
pub enum Change {
    /// A piece of a file at an address.
    Map {
        /// Where.
        at: u64,
        /// Bytes.
        len: u64,
        /// Rights (PROT_*).
        prot: i32,
        /// The file.
        fd: i32,
        /// Where in the file.
        offset: u64,
    },
    /// Nothing at an address any more.
    Unmap {
        /// Where.
        at: u64,
        /// Bytes.
        len: u64,
    },
}

/// The process.
pub struct Stub {
    pid: i32,
    /// It has ended, and its number may be another's.
    gone: Cell<bool>,
    /// Its flags when they were last looked at.
    flags: Cell<u64>,
    /// Address of the two pages.
    base: u64,
    /// Registers as the process began.
    initial: Regs,
    /// The XSAVE area that was read or written last.
    xstate: Vec<u8>,
    /// What is behind AVX in it, as it began: what the guest has no part of.
    not_guests: Vec<u8>,
    list: Reservation,
    _list_file: OwnedFd,
    /// What a start and a stop take of the time between them.
    pub edge: Duration,
    /// The only processor it may run on.
    pinned: Option<usize>,
    /// CPUID traps.
    pub cpuid_traps: bool,
    /// What is mapped for being executed only cannot be read.
    pub execute_only: bool,
}

struct Start<'a> {
    program: i32,
    inherited: &'a [i32],
}

/// What the child does before it becomes the stub; it shares our memory and may not return.
extern "C" fn begin(arg: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `arg` is the `Start` of the parent, which waits. Only system calls are made; the
    // descriptors belong to the child's own table.
    unsafe {
        let start = &*(arg as *const Start<'_>);
        libc::setsid();
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        for &fd in start.inherited {
            libc::fcntl(fd, libc::F_SETFD, 0);
        }
        let none = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
        libc::setrlimit(libc::RLIMIT_CORE, &raw const none);
        let mut set = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        libc::sigprocmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut());
        if libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) == 0 {
            let empty: [*const libc::c_char; 1] = [std::ptr::null()];
            libc::syscall(
                libc::SYS_execveat,
                start.program,
                c"".as_ptr(),
                empty.as_ptr(),
                empty.as_ptr(),
                libc::AT_EMPTY_PATH,
            );
        }
        libc::_exit(127)
    }
}

/// The smallest program there is: a page of code.
fn program() -> Vec<u8> {
    let mut elf = vec![0u8; PAGE as usize];
    let put = |elf: &mut Vec<u8>, at: usize, bytes: &[u8]| {
        elf[at..at + bytes.len()].copy_from_slice(bytes);
    };
    put(&mut elf, 0, b"\x7fELF\x02\x01\x01");
    put(&mut elf, 16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(&mut elf, 24, &(START + CALL_AT).to_le_bytes());
    put(&mut elf, 32, &64u64.to_le_bytes());
    // Size of this header, size and number of the following ones.
    put(&mut elf, 52, &[64, 0, 56, 0, 2, 0]);
    // PT_LOAD, readable and executable.
    put(&mut elf, 64, &[1, 0, 0, 0, 5, 0, 0, 0]);
    put(&mut elf, 64 + 16, &START.to_le_bytes());
    put(&mut elf, 64 + 24, &START.to_le_bytes());
    put(&mut elf, 64 + 32, &PAGE.to_le_bytes());
    put(&mut elf, 64 + 40, &PAGE.to_le_bytes());
    put(&mut elf, 64 + 48, &PAGE.to_le_bytes());
    // PT_GNU_STACK: what is readable is not executable for that.
    put(&mut elf, 120, &[0x51, 0xe5, 0x74, 0x64, 6, 0, 0, 0]);
    put(&mut elf, CALL_AT as usize, &CALL);
    put(&mut elf, BATCH_AT as usize, &BATCH_CODE);
    put(&mut elf, FLAGS_AT as usize, &FLAGS_CODE);
    elf
}

fn file(name: &CStr, content: &[u8]) -> io::Result<OwnedFd> {
    let mut file = File::from(sys::memfd(name, content.len() as u64)?);
    file.write_all(content)?;
    Ok(file.into())
}

/// Where the two pages of a stub shall be; both in the same 4 GiB.
fn place() -> io::Result<u64> {
    let mut random = 0u64;
    // SAFETY: writes 8 bytes to the variable.
    if unsafe { libc::getrandom((&raw mut random).cast(), 8, 0) } != 8 {
        return Err(Error::last_os_error());
    }
    let pages = (PLACES.end - PLACES.start) / (2 * PAGE);
    Ok(PLACES.start + random % pages * 2 * PAGE)
}

fn failed(what: &str) -> Error {
    Error::other(what.to_owned())
}

impl Stub {
    /// Makes one that can map pieces of `files`.
    ///
    /// # Errors
    /// The system refuses something.
    pub fn new(files: &[i32]) -> io::Result<Self> {
        let program = file(c"berth-stub", &program())?;
        let list_file = sys::memfd(c"berth-stub-list", PAGE)?;
        let list = Reservation::new(PAGE as usize)?;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        list.map_file(0, PAGE as usize, rw, list_file.as_raw_fd(), 0)?;
        let mut inherited = files.to_vec();
        inherited.extend([program.as_raw_fd(), list_file.as_raw_fd()]);
        let pid = spawn(&Start { program: program.as_raw_fd(), inherited: &inherited })?;
        // From here on dropping it ends the process.
        // SAFETY: registers are plain numbers.
        let initial: Regs = unsafe { std::mem::zeroed() };
        let xstate = vec![0; 1 << 14];
        let mut stub = Self {
            pid,
            gone: Cell::new(false),
            flags: Cell::new(0),
            base: place()?,
            initial,
            xstate,
            not_guests: Vec::new(),
            list,
            _list_file: list_file,
            edge: Duration::MAX,
            pinned: None,
            cpuid_traps: false,
            execute_only: false,
        };
        stub.begin(program.as_raw_fd())?;
        stub.measure()?;
        Ok(stub)
    }

    fn begin(&mut self, program: i32) -> io::Result<()> {
        let status = self.wait()?;
        if !libc::WIFSTOPPED(status) || libc::WSTOPSIG(status) != libc::SIGTRAP {
            return Err(failed("the process for direct execution did not start"));
        }
        let options = libc::PTRACE_O_EXITKILL | libc::PTRACE_O_TRACESYSGOOD;
        self.ptrace(libc::PTRACE_SETOPTIONS as _, 0, options as u64)?;
        self.initial = self.registers()?;
        (self.initial.rip, self.initial.orig_rax) = (START + CALL_AT, u64::MAX);
        // To its place, and nothing else stays.
        let list = self._list_file.as_raw_fd();
        let maps = [
            (self.base, libc::PROT_READ | libc::PROT_EXEC, program),
            (self.list_at(), libc::PROT_READ, list),
        ];
        for (at, prot, fd) in maps {
            self.map_one(at, prot, fd)?;
        }
        self.initial.rip = self.base + CALL_AT;
        // The system gives such pages a protection key, whose rights are in PKRU from now on.
        self.map_one(EXECUTE_ONLY_AT, libc::PROT_EXEC, program)?;
        let len = self.xstate_by(libc::PTRACE_GETREGSET)?;
        self.xstate.truncate(len);
        self.not_guests = self.xstate.get(XSAVE_SIZE..).unwrap_or_default().to_vec();
        self.execute_only = !self.can_read(EXECUTE_ONLY_AT);
        for (at, len) in self.others() {
            self.call(libc::SYS_munmap, [at, len, 0, 0, 0, 0])?;
        }
        self.cpuid_traps = self.call(libc::SYS_arch_prctl, [ARCH_SET_CPUID, 0, 0, 0, 0, 0]).is_ok();
        self.filter()
    }

    /// Whether the process can read a page of its program.
    fn can_read(&mut self, rbx: u64) -> bool {
        // What is there is no number of a system call.
        let regs = Regs { rip: self.base + BATCH_AT, rbx, rbp: 1, ..self.initial };
        self.until_trap(&regs).is_ok()
    }

    /// Finds out how long it takes to execute nothing.
    fn measure(&mut self) -> io::Result<()> {
        self.stay_near(true);
        for _ in 0..8 {
            self.set_registers(&self.initial)?;
            let began = Instant::now();
            self.run()?;
            self.edge = self.edge.min(began.elapsed());
        }
        Ok(())
    }

    /// Where the list is.
    fn list_at(&self) -> u64 {
        self.base + PAGE
    }

    /// Whether a page is one of ours.
    pub fn is_ours(&self, va: u64) -> bool {
        (self.base..self.base + 2 * PAGE).contains(&va)
    }

    /// Address of the two pages.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// What is not ours: addresses and lengths.
    fn others(&self) -> [(u64, u64); 2] {
        let end = self.base + 2 * PAGE;
        [(0, self.base), (end, END - end)]
    }

    /// Unmaps everything that is the guest's.
    ///
    /// # Errors
    /// As for [`Stub::change`].
    pub fn clear(&mut self) -> io::Result<()> {
        self.change(&self.others().map(|(at, len)| Change::Unmap { at, len }))
    }

    fn map_one(&mut self, at: u64, prot: i32, fd: i32) -> io::Result<()> {
        let flags = (libc::MAP_SHARED | libc::MAP_FIXED) as u64;
        self.call(libc::SYS_mmap, [at, PAGE, prot as u64, flags, fd as u64, 0])
    }

    /// Lets through what [`Change`]s need, and not what the host does itself for programs that jump
    /// to its vsyscall page.
    fn filter(&mut self) -> io::Result<()> {
        let stmt = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
        let jump = |k: u32, jt: u8, jf: u8| libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt,
            jf,
            k,
        };
        let load = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
        let answer = libc::BPF_RET | libc::BPF_K;
        let program = [
            // The upper half of the instruction pointer.
            stmt(load, 12),
            jump((self.base >> 32) as u32, 0, 3),
            stmt(load, 0),
            jump(libc::SYS_mmap as u32, 2, 0),
            jump(libc::SYS_munmap as u32, 1, 0),
            stmt(answer, libc::SECCOMP_RET_TRAP),
            stmt(answer, libc::SECCOMP_RET_ALLOW),
        ];
        let mut words = [0u64; 9];
        words[0] = program.len() as u64;
        words[1] = self.list_at() + 16;
        for (word, f) in words[2..].iter_mut().zip(&program) {
            *word = u64::from(f.code)
                | u64::from(f.jt) << 16
                | u64::from(f.jf) << 24
                | u64::from(f.k) << 32;
        }
        self.write_list(&words);
        self.call(libc::SYS_prctl, [libc::PR_SET_NO_NEW_PRIVS as u64, 1, 0, 0, 0, 0])?;
        self.call(
            libc::SYS_seccomp,
            [u64::from(libc::SECCOMP_SET_MODE_FILTER), 0, self.list_at(), 0, 0, 0],
        )?;
        self.write_list(&[0; 9]);
        Ok(())
    }

    fn write_list(&self, words: &[u64]) {
        for (i, word) in words.iter().enumerate().take(PAGE as usize / 8) {
            let at = (self.list.addr() + i as u64 * 8) as *mut u64;
            // SAFETY: inside the page of the list, which is mapped as long as `self` lives; the other
            // process only reads it, and not now.
            unsafe { at.write_volatile(*word) };
        }
    }

    fn ptrace(&self, request: u32, address: u64, data: u64) -> io::Result<()> {
        // SAFETY: the requests of this module read or write structures that live during the call.
        if unsafe { libc::ptrace(request as _, self.pid, address, data) } == -1 {
            return Err(Error::last_os_error());
        }
        Ok(())
    }

    fn wait(&self) -> io::Result<i32> {
        let mut status = 0;
        loop {
            // SAFETY: writes the status; the process is ours.
            if unsafe { libc::waitpid(self.pid, &raw mut status, libc::__WALL) } == self.pid {
                self.gone.set(!libc::WIFSTOPPED(status));
                return Ok(status);
            }
            let error = Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// General registers.
    ///
    /// # Errors
    /// The process is gone.
    pub fn registers(&self) -> io::Result<Regs> {
        // SAFETY: registers are plain numbers.
        let mut regs: Regs = unsafe { std::mem::zeroed() };
        self.ptrace(libc::PTRACE_GETREGS as _, 0, &raw mut regs as u64)?;
        self.flags.set(regs.eflags);
        Ok(regs)
    }

    /// Sets general registers.
    ///
    /// # Errors
    /// The process is gone, or a value is refused.
    pub fn set_registers(&self, regs: &Regs) -> io::Result<()> {
        self.ptrace(libc::PTRACE_SETREGS as _, 0, &raw const *regs as u64)
    }

    /// Registers to begin with: the selectors are the host's for programs.
    pub fn initial(&self) -> &Regs {
        &self.initial
    }

    /// Reads or writes the XSAVE area; gives its length.
    fn xstate_by(&mut self, request: libc::c_uint) -> io::Result<usize> {
        let (iov_base, iov_len) = (self.xstate.as_mut_ptr().cast(), self.xstate.len());
        let mut io = libc::iovec { iov_base, iov_len };
        self.ptrace(request as _, NT_X86_XSTATE as u64, &raw mut io as u64)?;
        Ok(io.iov_len)
    }

    /// The XSAVE area of x87, SSE and AVX, in the standard format. Tells whether other components, PKRU
    /// above all, are as they were at the beginning; else [`Stub::set_xsave`] has to see to that.
    ///
    /// # Errors
    /// The process is gone.
    pub fn xsave(&mut self, out: &mut [u8]) -> io::Result<bool> {
        self.xstate_by(libc::PTRACE_GETREGSET)?;
        let len = out.len().min(self.xstate.len());
        out[..len].copy_from_slice(&self.xstate[..len]);
        Ok(self.xstate.get(XSAVE_SIZE..) == Some(&self.not_guests))
    }

    /// Sets x87, SSE and AVX from such an area; other components get their initial values.
    ///
    /// # Errors
    /// The process is gone, or a value is refused.
    pub fn set_xsave(&mut self, area: &[u8]) -> io::Result<()> {
        let len = area.len().min(self.xstate.len());
        self.xstate[..len].copy_from_slice(&area[..len]);
        if let Some(behind) = self.xstate.get_mut(XSAVE_SIZE..) {
            behind.copy_from_slice(&self.not_guests);
        }
        // What is zero is in its initial state: upper halves of YMM that are loaded as zeroes count as
        // used, and make SSE code slow.
        let upper = area.get(YMM_HIGH..).is_some_and(|upper| upper.iter().any(|&b| b != 0));
        self.xstate[512..576].fill(0);
        self.xstate[512] = if upper { 7 } else { 3 };
        // PKRU stays (SDM vol. 1, 13.4.2).
        self.xstate[513] = if self.execute_only { 2 } else { 0 };
        self.xstate_by(libc::PTRACE_SETREGSET).map(drop)
    }

    /// Executes one system call in the process; only before the filter is there.
    fn call(&mut self, number: i64, arguments: [u64; 6]) -> io::Result<()> {
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let rax = number as u64;
        let regs = Regs { rax, rdi, rsi, rdx, r10, r8, r9, orig_rax: u64::MAX, ..self.initial };
        let result = self.until_trap(&regs)?.rax as i64;
        if (-4095..0).contains(&result) {
            return Err(Error::from_raw_os_error(-result as i32));
        }
        Ok(())
    }

    /// Sets the flags that [`Stub::set_registers`] does not set ([`STUBBORN`]).
    ///
    /// # Errors
    /// The process is gone.
    pub fn set_stubborn(&mut self, flags: u64) -> io::Result<()> {
        let now = self.flags.get();
        if (now ^ flags) & STUBBORN == 0 {
            return Ok(());
        }
        self.write_list(&[now & !STUBBORN | flags & STUBBORN]);
        let regs = Regs { rip: self.base + FLAGS_AT, rsp: self.list_at(), ..self.initial };
        self.until_trap(&regs)?;
        self.write_list(&[0]);
        Ok(())
    }

    /// Executes our own code in the process up to its INT3.
    fn until_trap(&self, regs: &Regs) -> io::Result<Regs> {
        self.set_registers(regs)?;
        loop {
            self.ptrace(libc::PTRACE_CONT as _, 0, 0)?;
            let status = self.wait()?;
            if !libc::WIFSTOPPED(status) {
                return Err(failed("the process for direct execution has ended"));
            }
            match libc::WSTOPSIG(status) {
                libc::SIGTRAP => return self.registers(),
                libc::SIGSEGV | libc::SIGBUS | libc::SIGILL | libc::SIGSYS => {
                    return Err(failed("the process for direct execution failed"));
                }
                // The vCPU looks for what it is told by itself.
                _ => {}
            }
        }
    }

    /// Changes mappings.
    ///
    /// # Errors
    /// The system refused one of the changes; the rest was not made.
    pub fn change(&mut self, changes: &[Change]) -> io::Result<()> {
        for batch in changes.chunks(BATCH) {
            let mut words = Vec::with_capacity(batch.len() * WORDS);
            for change in batch {
                words.extend(match *change {
                    Change::Map { at, len, prot, fd, offset } => {
                        let flags = libc::MAP_SHARED
                            | libc::MAP_FIXED
                            | libc::MAP_NORESERVE
                            | libc::MAP_POPULATE;
                        let (prot, flags, fd) = (prot as u64, flags as u64, fd as u64);
                        [libc::SYS_mmap as u64, at, len, prot, flags, fd, offset]
                    }
                    Change::Unmap { at, len } => [libc::SYS_munmap as u64, at, len, 0, 0, 0, 0],
                });
            }
            self.write_list(&words);
            let regs = Regs {
                rip: self.base + BATCH_AT,
                rbx: self.list_at(),
                rbp: batch.len() as u64,
                orig_rax: u64::MAX,
                ..self.initial
            };
            let end = self.until_trap(&regs)?;
            // Where the guest's memory lies is none of its business.
            words.fill(0);
            self.write_list(&words);
            if end.rbp as u32 != 0 {
                return Err(Error::from_raw_os_error(-(end.rax as i64) as i32));
            }
        }
        Ok(())
    }

    /// Executes guest code until something happens.
    ///
    /// # Errors
    /// The process is gone.
    pub fn run(&self) -> io::Result<Stopped> {
        self.ptrace(PTRACE_SYSEMU, 0, 0)?;
        let status = self.wait()?;
        if !libc::WIFSTOPPED(status) {
            return Err(failed("the process for direct execution has ended"));
        }
        Ok(match libc::WSTOPSIG(status) {
            s if s == libc::SIGTRAP | 0x80 => Stopped::Syscall,
            libc::SIGSEGV => {
                let info = self.signal()?;
                // SAFETY: the kernel filled it in for SIGSEGV.
                let address = unsafe { info.si_addr() } as u64;
                match info.si_code {
                    // SEGV_MAPERR, SEGV_ACCERR, SEGV_PKUERR; others are no page faults.
                    1 => Stopped::Access { address, mapped: false },
                    2 | 4 => Stopped::Access { address, mapped: true },
                    _ => Stopped::Other,
                }
            }
            libc::SIGTRAP => match self.signal()?.si_code {
                TRAP_TRACE => Stopped::Step,
                TRAP_HWBKPT => Stopped::Other,
                _ => Stopped::Trap,
            },
            STOP => Stopped::Told,
            libc::SIGSYS => {
                // SAFETY: the kernel filled in the address of the call, at the same place.
                Stopped::Vsyscall { at: unsafe { self.signal()?.si_addr() } as u64 }
            }
            libc::SIGBUS | libc::SIGILL | libc::SIGFPE => Stopped::Other,
            _ => Stopped::Told,
        })
    }

    /// What the system says about the signal that stopped it.
    fn signal(&self) -> io::Result<libc::siginfo_t> {
        // SAFETY: the information about a signal is plain numbers.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        self.ptrace(libc::PTRACE_GETSIGINFO as _, 0, &raw mut info as u64)?;
        Ok(info)
    }

    /// Whether it runs on the processor of the calling thread, which waits for it, or wherever there is
    /// room: changing between two processes is faster than waking another processor up.
    pub fn stay_near(&mut self, near: bool) {
        // SAFETY: plain system calls; the set is plain bits and lives as long as they take.
        unsafe {
            let here = usize::try_from(libc::sched_getcpu()).ok();
            let here = here.filter(|cpu| near && *cpu < libc::CPU_SETSIZE as usize);
            if here == self.pinned {
                return;
            }
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            match here {
                Some(cpu) => libc::CPU_SET(cpu, &mut set),
                None => {
                    libc::sched_getaffinity(0, size_of_val(&set), &raw mut set);
                }
            }
            libc::sched_setaffinity(self.pid, size_of_val(&set), &raw const set);
            self.pinned = here;
        }
    }

    /// Makes it stop before it executes what is at these addresses, and no others.
    ///
    /// # Errors
    /// The system refuses it.
    pub fn stop_at(&self, addresses: &[u64]) -> io::Result<()> {
        let register = |n: usize| (offset_of!(libc::user, u_debugreg) + n * 8) as u64;
        let poke = libc::PTRACE_POKEUSER as _;
        self.ptrace(poke, register(7), 0)?;
        let mut enabled = 0;
        for (n, address) in addresses.iter().enumerate() {
            self.ptrace(poke, register(n), *address)?;
            // Executed there, one byte (SDM vol. 3, 18.2.4).
            enabled |= 1 << (2 * n);
        }
        self.ptrace(poke, register(7), enabled)
    }

    /// Its process number.
    pub fn pid(&self) -> i32 {
        self.pid
    }
}

/// Makes the process `pid` stop guest code; allowed in signal handlers.
pub fn tell(pid: i32) {
    // SAFETY: a system call without memory; the process is ours and not waited for as long as its
    // number is used.
    unsafe { libc::syscall(libc::SYS_tgkill, pid, pid, STOP) };
}

/// A child that shares our memory until it is the stub: no page tables are copied.
fn spawn(start: &Start<'_>) -> io::Result<i32> {
    const STACK: usize = 64 << 10;
    let mut stack = vec![0u128; STACK / 16];
    let top = stack.as_mut_ptr().wrapping_add(STACK / 16);
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: with CLONE_VFORK the child runs on `stack` while we wait, until it executes another
    // program or ends; `begin` only makes system calls.
    let pid = unsafe {
        libc::clone(begin, top.cast(), flags, std::ptr::from_ref(start).cast_mut().cast())
    };
    if pid < 0 { Err(Error::last_os_error()) } else { Ok(pid) }
}

impl Drop for Stub {
    fn drop(&mut self) {
        if self.gone.get() {
            return;
        }
        // SAFETY: a system call on a child of ours.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        while let Ok(status) = self.wait() {
            if !libc::WIFSTOPPED(status) {
                break;
            }
        }
    }
}

#[cfg(test)]
#[path = "stub_tests.rs"]
mod tests;
