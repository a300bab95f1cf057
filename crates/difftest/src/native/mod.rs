//! Runs cases on the bare processor, in a child process of their own.

mod child;
mod slot;

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::case::{Backend, Case, Outcome};
use crate::layout::{IMAGE, World, base_image};
use crate::native::slot::{Exchange, SLOTS};

/// A case that runs this long is ended.
const CASE_TIME: Duration = Duration::from_millis(300);

/// Why the child could not be made.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    /// The host lacks a feature the harness itself needs.
    #[error("the host processor or kernel lacks {0}")]
    Host(&'static str),
    /// A system call failed.
    #[error("{what} failed")]
    System {
        /// The call.
        what: &'static str,
        /// The reason.
        source: std::io::Error,
    },
    /// The child ended although no case was running.
    #[error(
        "the child process ended with wait status {0:#x} (exit 40: an address of the layout is in use)"
    )]
    Child(i32),
}

impl NativeError {
    fn last(what: &'static str) -> Self {
        Self::System { what, source: std::io::Error::last_os_error() }
    }
}

/// The bare processor.
pub struct NativeBackend {
    exchange: *mut Exchange,
    images: OwnedFd,
    base: Vec<u8>,
    child: Option<libc::pid_t>,
}

impl NativeBackend {
    /// Maps the exchange and starts the child. The process should have no threads yet that could
    /// hold locks the child would need (it needs none).
    ///
    /// # Errors
    /// [`NativeError`] when a mapping or the fork fails or the host lacks a feature.
    pub fn new() -> Result<Self, NativeError> {
        if !std::arch::is_x86_feature_detected!("avx") {
            return Err(NativeError::Host("AVX"));
        }
        // SAFETY: reads a number of the auxiliary vector.
        if unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 == 0 {
            return Err(NativeError::Host("FSGSBASE"));
        }
        // SAFETY: a name and flags; the result is a new descriptor or -1.
        let images = unsafe { libc::memfd_create(c"difftest-images".as_ptr(), libc::MFD_CLOEXEC) };
        if images < 0 {
            return Err(NativeError::last("memfd_create"));
        }
        // SAFETY: the descriptor is new and owned by nobody else.
        let images = unsafe { OwnedFd::from_raw_fd(images) };
        let bytes = IMAGE as usize * World::ALL.len();
        // SAFETY: the descriptor is valid.
        if unsafe { libc::ftruncate(images.as_raw_fd(), bytes as libc::off_t) } != 0 {
            return Err(NativeError::last("ftruncate"));
        }
        // SAFETY: a new anonymous mapping at an address the kernel chooses.
        let exchange = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Exchange>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if exchange == libc::MAP_FAILED {
            return Err(NativeError::last("mmap"));
        }
        let exchange = exchange.cast();
        let mut backend = Self { exchange, images, base: base_image(), child: None };
        backend.start()?;
        // An empty batch shows that the child has set itself up.
        backend.order(0, 0);
        if let Wait::Ended(status) = backend.wait() {
            backend.child = None;
            return Err(NativeError::Child(status));
        }
        Ok(backend)
    }

    fn start(&mut self) -> Result<(), NativeError> {
        let header = self.header();
        header.ordered.store(0, Ordering::Relaxed);
        header.done.store(0, Ordering::Relaxed);
        let setup = child::Setup {
            exchange: self.exchange,
            images: self.images.as_raw_fd(),
            base: self.base.as_ptr(),
        };
        // SAFETY: the child runs only `child::main`, which neither allocates nor takes locks.
        match unsafe { libc::fork() } {
            -1 => Err(NativeError::last("fork")),
            0 => child::main(&setup),
            pid => {
                self.child = Some(pid);
                Ok(())
            }
        }
    }

    fn header(&self) -> &slot::Header {
        // SAFETY: the exchange is mapped for the life of `self`; the header holds only atomics.
        unsafe { &(*self.exchange).header }
    }

    fn order(&self, first: u32, count: u32) {
        let header = self.header();
        header.first.store(first, Ordering::Relaxed);
        header.count.store(count, Ordering::Relaxed);
        header.current.store(first, Ordering::Relaxed);
        header.ordered.fetch_add(1, Ordering::Release);
        child::futex_wake(&header.ordered);
    }

    /// Waits until the ordered batch is done, a case takes too long, or the child ends.
    fn wait(&self) -> Wait {
        let header = self.header();
        let ordered = header.ordered.load(Ordering::Relaxed);
        let mut current = header.current.load(Ordering::Relaxed);
        let mut since = Instant::now();
        loop {
            let done = header.done.load(Ordering::Acquire);
            if done == ordered {
                return Wait::Done;
            }
            let nap = libc::timespec { tv_sec: 0, tv_nsec: 20_000_000 };
            // SAFETY: the word and the timeout are valid through the call.
            unsafe {
                let word = header.done.as_ptr();
                libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, done, &raw const nap);
            }
            let mut status = 0;
            let Some(pid) = self.child else { return Wait::Ended(0) };
            // SAFETY: `pid` is our child and has not been waited for.
            if unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) } == pid {
                return Wait::Ended(status);
            }
            let now = header.current.load(Ordering::Relaxed);
            if now != current {
                (current, since) = (now, Instant::now());
            } else if since.elapsed() > CASE_TIME {
                return Wait::Stuck;
            }
        }
    }

    fn kill(&mut self) {
        if let Some(pid) = self.child.take() {
            // SAFETY: `pid` is our child and has not been waited for.
            unsafe {
                libc::kill(pid, libc::SIGKILL);
                libc::waitpid(pid, std::ptr::null_mut(), 0);
            }
        }
    }

    /// Runs at most [`SLOTS`] cases.
    fn run_slots(&mut self, cases: &[Case]) -> Vec<Outcome> {
        let mut outcomes: Vec<Option<Outcome>> = vec![None; cases.len()];
        for (i, case) in cases.iter().enumerate() {
            // SAFETY: the child is idle, so the slots are ours; `i` is below SLOTS.
            let input = unsafe { &mut (*self.exchange).slots[i].input };
            if input.load(case).is_err() {
                outcomes[i] =
                    Some(Outcome::Broken("too many patches for the native backend".to_owned()));
                input.patch_count = 0;
            }
        }
        let mut first = 0;
        while (first as usize) < cases.len() {
            self.order(first, cases.len() as u32);
            let waited = self.wait();
            let reached = match waited {
                Wait::Done => cases.len() as u32,
                Wait::Stuck | Wait::Ended(_) => self.header().current.load(Ordering::Relaxed),
            };
            for i in first..reached {
                // SAFETY: the child has finished this slot.
                let output = unsafe { &(*self.exchange).slots[i as usize].output };
                outcomes[i as usize].get_or_insert_with(|| output.outcome());
            }
            if reached as usize == cases.len() {
                break;
            }
            outcomes[reached as usize] = Some(match waited {
                Wait::Ended(_) => {
                    self.child = None;
                    Outcome::Broken("the native child died".to_owned())
                }
                _ => Outcome::Timeout,
            });
            self.kill();
            if self.start().is_err() {
                break;
            }
            first = reached + 1;
        }
        let missing = || Outcome::Broken("the native child could not be restarted".to_owned());
        outcomes.into_iter().map(|o| o.unwrap_or_else(missing)).collect()
    }
}

enum Wait {
    Done,
    Stuck,
    Ended(i32),
}

impl Backend for NativeBackend {
    fn run(&mut self, case: &Case) -> Outcome {
        self.run_slots(std::slice::from_ref(case)).pop().unwrap_or(Outcome::Timeout)
    }

    fn run_batch(&mut self, cases: &[Case]) -> Vec<Outcome> {
        cases.chunks(SLOTS).flat_map(|chunk| self.run_slots(chunk)).collect()
    }
}

impl Drop for NativeBackend {
    fn drop(&mut self) {
        self.kill();
        // SAFETY: mapped in `new` with this size; nothing refers to it any more.
        unsafe { libc::munmap(self.exchange.cast(), size_of::<Exchange>()) };
    }
}
