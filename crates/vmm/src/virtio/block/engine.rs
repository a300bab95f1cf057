//! Disk I/O off the caller's thread: io_uring, or a few threads where the kernel refuses it and for
//! disks that are not raw.
//!
//! A job's buffers are host addresses in guest memory. The engine holds that memory until every job
//! has ended: dropping it waits, since the kernel may still write.

use std::collections::VecDeque;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use io_uring::{IoUring, Probe, opcode, types};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::memory::Memory;
use crate::virtio::block::disk::Contents;
use crate::virtio::block::qcow2;
use crate::virtio::limits::{BLOCK_IDLE_FLUSH, BLOCK_REQUESTS_MAX, BLOCK_THREADS};

/// Buffers of a job, in host addresses of guest memory (or of memory that never goes away).
#[derive(Debug)]
pub struct Buffers(pub Vec<libc::iovec>);

// SAFETY: an iovec is an address and a length; the memory it names is guest RAM, which is shared
// between threads by design and which the engine keeps mapped.
unsafe impl Send for Buffers {}

impl Buffers {
    /// Bytes in all buffers.
    pub fn len(&self) -> usize {
        self.0.iter().map(|buffer| buffer.iov_len).sum()
    }

    /// Whether there is nothing to transfer.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Drops the first `count` bytes.
    pub fn advance(&mut self, count: usize) {
        let mut left = count;
        self.0.retain_mut(|buffer| {
            let part = left.min(buffer.iov_len);
            left -= part;
            buffer.iov_len -= part;
            // Inside the buffer, or its end: never dereferenced when nothing is left of it.
            buffer.iov_base = buffer.iov_base.wrapping_byte_add(part);
            buffer.iov_len > 0
        });
    }
}

/// One system call on the disk.
#[derive(Debug)]
pub enum Job {
    /// preadv
    Read {
        /// Where to.
        buffers: Buffers,
        /// Byte offset in the file.
        offset: u64,
    },
    /// pwritev2
    Write {
        /// Where from.
        buffers: Buffers,
        /// Byte offset in the file.
        offset: u64,
        /// Not done before it is on the disk.
        durable: bool,
    },
    /// fdatasync
    Flush,
    /// Giving space back; what is read there then does not matter.
    Discard {
        /// Byte offset in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
    },
    /// Zeroes.
    Zero {
        /// Byte offset in the file.
        offset: u64,
        /// How many bytes.
        len: u64,
        /// The space may be given back.
        unmap: bool,
    },
}

/// The system call that a raw file needs for a job: flags, offset and length for fallocate.
fn allocation(job: &Job) -> Option<(i32, u64, u64)> {
    let (what, offset, len) = match *job {
        Job::Discard { offset, len } | Job::Zero { offset, len, unmap: true } => {
            (libc::FALLOC_FL_PUNCH_HOLE, offset, len)
        }
        Job::Zero { offset, len, unmap: false } => (libc::FALLOC_FL_ZERO_RANGE, offset, len),
        _ => return None,
    };
    Some((what | libc::FALLOC_FL_KEEP_SIZE, offset, len))
}

/// A finished job: what the system call returned, or minus the error number.
#[derive(Debug)]
pub struct Done {
    /// The number given at submission.
    pub id: u16,
    /// The job, buffers as submitted.
    pub job: Job,
    /// Result.
    pub result: i64,
}

/// Does jobs.
pub enum Engine {
    /// By io_uring.
    Ring(Box<RingEngine>),
    /// By threads.
    Threads(ThreadEngine),
}

impl Engine {
    /// io_uring for a raw file if the kernel allows and it is not refused, else threads.
    ///
    /// # Errors
    /// Neither can be set up.
    pub fn new(
        contents: &Contents,
        memory: Arc<Memory>,
        no_io_uring: bool,
    ) -> std::io::Result<Self> {
        if let (Contents::Raw(file), false) = (contents, no_io_uring) {
            match RingEngine::new(Arc::clone(file), Arc::clone(&memory)) {
                Ok(ring) => return Ok(Self::Ring(Box::new(ring))),
                Err(error) => tracing::debug!(%error, "no io_uring; using threads"),
            }
        }
        ThreadEngine::new(contents.clone(), memory).map(Self::Threads)
    }

    /// Readable when jobs have ended.
    pub fn event_fd(&self) -> RawFd {
        match self {
            Self::Ring(ring) => ring.ring.as_raw_fd(),
            Self::Threads(threads) => threads.shared.event.as_raw_fd(),
        }
    }

    /// Queues a job; [`Engine::flush`] starts it at the latest.
    ///
    /// # Errors
    /// The job comes back when there is no room.
    pub fn submit(&mut self, id: u16, job: Job) -> Result<(), Job> {
        match self {
            Self::Ring(ring) => ring.submit(id, job),
            Self::Threads(threads) => {
                threads.submit(id, job);
                Ok(())
            }
        }
    }

    /// Starts what was submitted.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn flush(&mut self) -> std::io::Result<()> {
        match self {
            Self::Ring(ring) => ring.flush(),
            Self::Threads(_) => Ok(()),
        }
    }

    /// Waits until jobs have ended, when some are under way.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn wait(&self) -> std::io::Result<()> {
        // SAFETY: the descriptor is open as long as `self` lives.
        let event = unsafe { BorrowedFd::borrow_raw(self.event_fd()) };
        match rustix::event::poll(&mut [PollFd::from_borrowed_fd(event, PollFlags::IN)], None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Collects ended jobs.
    pub fn take_done(&mut self, out: &mut Vec<Done>) {
        match self {
            Self::Ring(ring) => ring.take_done(out),
            Self::Threads(threads) => threads.take_done(out),
        }
    }
}

/// The io_uring engine.
pub struct RingEngine {
    ring: IoUring,
    jobs: Vec<Option<Job>>,
    in_flight: usize,
    file: Arc<File>,
    _memory: Arc<Memory>,
}

impl RingEngine {
    fn new(file: Arc<File>, memory: Arc<Memory>) -> std::io::Result<Self> {
        let ring = IoUring::new(BLOCK_REQUESTS_MAX as u32)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        let needed = [
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.iter().all(|code| probe.is_supported(*code)) {
            return Err(std::io::ErrorKind::Unsupported.into());
        }
        let jobs = (0..BLOCK_REQUESTS_MAX).map(|_| None).collect();
        Ok(Self { ring, jobs, in_flight: 0, file, _memory: memory })
    }

    fn submit(&mut self, id: u16, job: Job) -> Result<(), Job> {
        let Some(slot) = self.jobs.get_mut(usize::from(id)).filter(|slot| slot.is_none()) else {
            return Err(job);
        };
        // The job moves first: the kernel gets the address of the iovec array, which stays where it
        // is on the heap until the job is taken out again.
        let job = slot.insert(job);
        let fd = types::Fd(self.file.as_raw_fd());
        let entry = match job {
            Job::Read { buffers: Buffers(list), offset } => {
                opcode::Readv::new(fd, list.as_ptr(), list.len() as u32).offset(*offset).build()
            }
            Job::Write { buffers: Buffers(list), offset, durable } => {
                opcode::Writev::new(fd, list.as_ptr(), list.len() as u32)
                    .offset(*offset)
                    .rw_flags(if *durable { libc::RWF_DSYNC } else { 0 })
                    .build()
            }
            Job::Flush => opcode::Fsync::new(fd).flags(types::FsyncFlags::DATASYNC).build(),
            Job::Discard { .. } | Job::Zero { .. } => {
                let (mode, offset, len) = allocation(job).unwrap_or_default();
                opcode::Fallocate::new(fd, len).offset(offset).mode(mode).build()
            }
        };
        let entry = entry.user_data(u64::from(id));
        // SAFETY: the file stays open while `self` lives; the iovec array is owned by `self.jobs`
        // until the completion is seen; the buffers are guest memory, kept mapped by `_memory`; drop
        // waits for all completions.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        match pushed {
            Ok(()) => {
                self.in_flight += 1;
                Ok(())
            }
            Err(_) => match self.jobs.get_mut(usize::from(id)).and_then(Option::take) {
                Some(job) => Err(job),
                None => Ok(()),
            },
        }
    }

    fn flush(&mut self) -> std::io::Result<()> {
        loop {
            if self.ring.submission().is_empty() {
                return Ok(());
            }
            match self.ring.submit() {
                Ok(_) => {}
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                // Completions have to be collected first; the rest goes with the next flush.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    fn take_done(&mut self, out: &mut Vec<Done>) {
        for entry in self.ring.completion() {
            let Ok(id) = u16::try_from(entry.user_data()) else { continue };
            if let Some(job) = self.jobs.get_mut(usize::from(id)).and_then(Option::take) {
                self.in_flight -= 1;
                out.push(Done { id, job, result: i64::from(entry.result()) });
            }
        }
    }
}

impl Drop for RingEngine {
    fn drop(&mut self) {
        let mut done = Vec::new();
        while self.in_flight > 0 {
            let waited = self.ring.submit_and_wait(1);
            self.take_done(&mut done);
            done.clear();
            if let Err(error) = waited
                && error.kind() != std::io::ErrorKind::Interrupted
                && self.in_flight > 0
            {
                // The kernel may still write to guest memory: it must never be unmapped.
                tracing::error!(%error, "cannot wait for disk requests; guest memory is kept");
                std::mem::forget(Arc::clone(&self._memory));
                self.jobs.drain(..).for_each(std::mem::forget);
                return;
            }
        }
    }
}

struct Shared {
    state: Mutex<ThreadState>,
    wake: Condvar,
    event: EventFd,
    contents: Contents,
    _memory: Arc<Memory>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, ThreadState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[derive(Default)]
struct ThreadState {
    waiting: VecDeque<(u16, Job)>,
    done: Vec<Done>,
    /// Something was written to an image that no flush has come after.
    unflushed: bool,
    stop: bool,
}

/// The engine of threads.
pub struct ThreadEngine {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl ThreadEngine {
    fn new(contents: Contents, memory: Arc<Memory>) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK)?,
            contents,
            _memory: memory,
        });
        let mut engine = Self { shared, threads: Vec::new() };
        for _ in 0..BLOCK_THREADS {
            let shared = Arc::clone(&engine.shared);
            let builder = std::thread::Builder::new().name("disk-io".to_owned());
            // An error drops the engine, which ends the threads made so far.
            engine.threads.push(builder.spawn(move || serve(&shared))?);
        }
        Ok(engine)
    }

    fn submit(&mut self, id: u16, job: Job) {
        let mut state = self.shared.lock();
        state.waiting.push_back((id, job));
        drop(state);
        self.shared.wake.notify_one();
    }

    fn take_done(&mut self, out: &mut Vec<Done>) {
        // Nothing to read only means that another call took these jobs.
        let _ = self.shared.event.read();
        let mut state = self.shared.lock();
        out.append(&mut state.done);
    }
}

impl Drop for ThreadEngine {
    fn drop(&mut self) {
        self.shared.lock().stop = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

fn serve(shared: &Shared) {
    loop {
        let Some((id, job)) = next(shared) else { return };
        let result = match &shared.contents {
            Contents::Raw(file) => execute(file, &job),
            Contents::Qcow2(image) => qcow2::execute(image, &job),
        };
        let mut state = shared.lock();
        state.done.push(Done { id, job, result });
        drop(state);
        let _ = shared.event.write(1);
    }
}

/// Waits for a job; none: the engine is stopped.
fn next(shared: &Shared) -> Option<(u16, Job)> {
    let mut state = shared.lock();
    loop {
        // What was accepted is done even when stopping: the guest may count on a write.
        if let Some((id, job)) = state.waiting.pop_front() {
            state.unflushed |= !matches!(job, Job::Read { .. } | Job::Flush);
            return Some((id, job));
        }
        if state.stop {
            return None;
        }
        let (Contents::Qcow2(image), true) = (&shared.contents, state.unflushed) else {
            state = shared.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        };
        let waited = shared.wake.wait_timeout(state, BLOCK_IDLE_FLUSH);
        let (again, timeout) = waited.unwrap_or_else(PoisonError::into_inner);
        state = again;
        if timeout.timed_out() && state.unflushed && state.waiting.is_empty() {
            // A machine that is killed loses little then.
            state.unflushed = false;
            drop(state);
            if let Err(error) = image.flush() {
                tracing::debug!(%error, "writing an idle disk out failed");
            }
            state = shared.lock();
        }
    }
}

fn execute(file: &File, job: &Job) -> i64 {
    let fd = file.as_raw_fd();
    loop {
        let result = match job {
            // SAFETY: the iovec array is alive and names guest memory that the engine keeps mapped;
            // the kernel checks the rest.
            Job::Read { buffers: Buffers(list), offset } => unsafe {
                libc::preadv(fd, list.as_ptr(), list.len() as i32, *offset as i64) as i64
            },
            // SAFETY: as above; the kernel only reads the buffers.
            Job::Write { buffers: Buffers(list), offset, durable } => unsafe {
                let flags = if *durable { libc::RWF_DSYNC } else { 0 };
                libc::pwritev2(fd, list.as_ptr(), list.len() as i32, *offset as i64, flags) as i64
            },
            // SAFETY: no memory is involved.
            Job::Flush => i64::from(unsafe { libc::fdatasync(fd) }),
            Job::Discard { .. } | Job::Zero { .. } => {
                let (mode, offset, len) = allocation(job).unwrap_or_default();
                // SAFETY: no memory is involved.
                i64::from(unsafe { libc::fallocate(fd, mode, offset as i64, len as i64) })
            }
        };
        if result >= 0 {
            return result;
        }
        let error = std::io::Error::last_os_error();
        if error.kind() != std::io::ErrorKind::Interrupted {
            return -i64::from(error.raw_os_error().unwrap_or(libc::EIO));
        }
    }
}
