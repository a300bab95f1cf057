//! Ways into the kernel and back: system calls, page faults, signals, processes.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::PathBuf;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::row::{Group, Row, Work, row};

const PAGE: usize = 4096;
const FAULT_PAGES: usize = 1024;
const MAP_PAGES: usize = 16;

/// The rows of this module.
pub const ROWS: &[Row] = &[
    row("getppid", Group::Kernel, 300_000, getppid),
    row("page-fault", Group::Kernel, 30 * FAULT_PAGES as u64, page_fault),
    row("mmap-munmap", Group::Kernel, 10_000, mmap_munmap),
    row("signal", Group::Kernel, 40_000, signal),
    row("pipe-switch", Group::Kernel, 5_000, pipe_switch),
    row("fork-wait", Group::Kernel, 200, fork_wait),
    row("fork-exec", Group::Kernel, 80, fork_exec),
    row("open-read-close", Group::Kernel, 30_000, open_read_close),
];

fn getppid(ops: u64) -> Result<Work, String> {
    Ok(Box::new(move || {
        let mut same = 0;
        // SAFETY: this has no conditions.
        let first = unsafe { libc::getppid() };
        for _ in 0..ops {
            // SAFETY: as above.
            same += u64::from(unsafe { libc::getppid() } == first);
        }
        same
    }))
}

/// New anonymous memory in small pages.
fn map(pages: usize) -> *mut u8 {
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping touches nothing that exists; advice on it changes no content.
    unsafe {
        let memory = libc::mmap(null_mut(), pages * PAGE, protection, flags, -1, 0);
        assert_ne!(memory, libc::MAP_FAILED, "mapping memory failed");
        libc::madvise(memory, pages * PAGE, libc::MADV_NOHUGEPAGE);
        memory.cast()
    }
}

fn unmap(memory: *mut u8, pages: usize) {
    // SAFETY: the callers have just mapped it and use it no more.
    let result = unsafe { libc::munmap(memory.cast(), pages * PAGE) };
    assert_eq!(result, 0, "unmapping memory failed");
}

fn page_fault(ops: u64) -> Result<Work, String> {
    Ok(Box::new(move || {
        let mut sum = 0;
        for _ in 0..ops / FAULT_PAGES as u64 {
            let memory = map(FAULT_PAGES);
            for page in 0..FAULT_PAGES {
                // SAFETY: within the mapping.
                unsafe { memory.add(page * PAGE).write_volatile(page as u8) };
                // SAFETY: as above.
                sum += u64::from(unsafe { memory.add(page * PAGE).read_volatile() });
            }
            unmap(memory, FAULT_PAGES);
        }
        sum
    }))
}

fn mmap_munmap(ops: u64) -> Result<Work, String> {
    Ok(Box::new(move || {
        for _ in 0..ops {
            let memory = map(MAP_PAGES);
            // SAFETY: within the mapping.
            unsafe { memory.write_volatile(1) };
            unmap(memory, MAP_PAGES);
        }
        ops
    }))
}

static SIGNALS: AtomicU64 = AtomicU64::new(0);

fn signal(ops: u64) -> Result<Work, String> {
    extern "C" fn count(_: libc::c_int) {
        SIGNALS.fetch_add(1, Ordering::Relaxed);
    }
    let handler: extern "C" fn(libc::c_int) = count;
    // SAFETY: the handler does nothing but count.
    unsafe { libc::signal(libc::SIGUSR1, handler as libc::sighandler_t) };
    Ok(Box::new(move || {
        let before = SIGNALS.load(Ordering::Relaxed);
        for _ in 0..ops {
            // SAFETY: the signal has a handler.
            unsafe { libc::raise(libc::SIGUSR1) };
        }
        SIGNALS.load(Ordering::Relaxed) - before
    }))
}

fn pipe() -> Result<(File, File), String> {
    let mut ends = [0; 2];
    // SAFETY: there is room for two descriptors, which nobody else owns.
    unsafe {
        match libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) {
            0 => Ok((OwnedFd::from_raw_fd(ends[0]).into(), OwnedFd::from_raw_fd(ends[1]).into())),
            _ => Err(std::io::Error::last_os_error().to_string()),
        }
    }
}

/// A byte to another process and back; both are on one processor, so that each turn is a switch.
fn pipe_switch(ops: u64) -> Result<Work, String> {
    let (mut request, mut to_child) = pipe()?;
    let (mut from_child, mut reply) = pipe()?;
    if fork() == 0 {
        drop((to_child, from_child));
        let mut byte = [0];
        while request.read_exact(&mut byte).is_ok() {
            byte[0] = byte[0].wrapping_mul(3);
            if reply.write_all(&byte).is_err() {
                break;
            }
        }
        exit_now();
    }
    drop((request, reply));
    Ok(Box::new(move || {
        let mut sum = 0;
        let mut byte = [0];
        for i in 0..ops {
            to_child.write_all(&[i as u8]).expect("the other process reads until we end");
            from_child.read_exact(&mut byte).expect("the other process answers until we end");
            sum += u64::from(byte[0]);
        }
        sum
    }))
}

fn fork() -> libc::pid_t {
    // SAFETY: rows for one processor run before any thread was started, so the child may go on.
    let child = unsafe { libc::fork() };
    assert!(child >= 0, "fork failed");
    child
}

fn exit_now() -> ! {
    // SAFETY: this has no conditions.
    unsafe { libc::_exit(7) }
}

/// The child's exit status.
fn wait(child: libc::pid_t) -> u64 {
    let mut status = 0;
    // SAFETY: there is room for the status.
    let waited = unsafe { libc::waitpid(child, &mut status, 0) };
    assert_eq!(waited, child, "waiting for a process failed");
    if libc::WIFEXITED(status) { libc::WEXITSTATUS(status) as u64 } else { 0 }
}

fn fork_wait(ops: u64) -> Result<Work, String> {
    Ok(Box::new(move || {
        (0..ops)
            .map(|_| match fork() {
                0 => exit_now(),
                child => wait(child),
            })
            .sum()
    }))
}

fn fork_exec(ops: u64) -> Result<Work, String> {
    let argument = c"--exit";
    Ok(Box::new(move || {
        let arguments = [c"bench".as_ptr(), argument.as_ptr(), std::ptr::null()];
        (0..ops)
            .map(|_| match fork() {
                0 => {
                    // SAFETY: the arguments are strings and end with a null pointer.
                    unsafe { libc::execv(c"/proc/self/exe".as_ptr(), arguments.as_ptr()) };
                    // SAFETY: this has no conditions.
                    unsafe { libc::_exit(1) }
                }
                child => wait(child),
            })
            .sum()
    }))
}

fn open_read_close(ops: u64) -> Result<Work, String> {
    let memory = PathBuf::from("/dev/shm");
    let directory = if memory.is_dir() { memory } else { PathBuf::from("/") };
    let path = directory.join(format!("bench-{}", std::process::id()));
    std::fs::write(&path, [5; PAGE]).map_err(|error| format!("{}: {error}", path.display()))?;
    let file = TemporaryFile(path);
    Ok(Box::new(move || {
        let mut buffer = [0; PAGE];
        let mut sum = 0;
        for _ in 0..ops {
            let mut file = File::open(&file.0).expect("it was just made");
            let len = file.read(&mut buffer).expect("files in memory can be read");
            sum += len as u64 + u64::from(buffer[PAGE - 1]);
        }
        sum
    }))
}

struct TemporaryFile(PathBuf);

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        // What is left in memory of a guest ends with it.
        let _ = std::fs::remove_file(&self.0);
    }
}
