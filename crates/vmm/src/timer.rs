//! One thread that calls chips back when their timers expire.
//!
//! Each timer is a timerfd, so arming one is a single system call and does not wake the thread.
//! Callbacks run on the thread, one at a time, and must be short.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

/// What a chip needs of a timer.
pub trait Alarm: Send + Sync {
    /// Expires once `after_ns` from now (and never before); replaces what was set.
    fn set(&self, after_ns: u64);
    /// Does not expire any more. A callback may already be under way.
    fn clear(&self);
}

type Callback = Arc<dyn Fn() + Send + Sync>;

struct Entry {
    alarm: Arc<FdAlarm>,
    callback: Callback,
}

struct FdAlarm(Mutex<TimerFd>);

impl Alarm for FdAlarm {
    fn set(&self, after_ns: u64) {
        // A timerfd set to zero would be disarmed.
        let after = Duration::from_nanos(after_ns.max(1));
        let mut timer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = timer.reset(after, None) {
            tracing::error!(%error, "a timer could not be set");
        }
    }

    fn clear(&self) {
        let mut timer = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = timer.clear() {
            tracing::error!(%error, "a timer could not be cleared");
        }
    }
}

/// Why timers are not to be had.
#[derive(Debug, thiserror::Error)]
#[error("{operation} for the machine's timers failed")]
pub struct TimerError {
    operation: &'static str,
    source: io::Error,
}

fn failed(operation: &'static str) -> impl Fn(io::Error) -> TimerError {
    move |source| TimerError { operation, source }
}

/// The thread and its timers.
pub struct TimerThread {
    shared: Arc<SharedTimers>,
    thread: Option<JoinHandle<()>>,
}

struct SharedTimers {
    epoll: Epoll,
    stop: EventFd,
    entries: Mutex<Vec<Entry>>,
}

impl TimerThread {
    /// Starts the thread.
    ///
    /// # Errors
    /// [`TimerError`] when the system gives no epoll, eventfd or thread.
    pub fn start() -> Result<Self, TimerError> {
        let epoll = Epoll::new().map_err(failed("epoll_create"))?;
        let stop = EventFd::new(EFD_NONBLOCK).map_err(failed("eventfd"))?;
        let event = EpollEvent::new(EventSet::IN, STOP);
        epoll.ctl(ControlOperation::Add, stop.as_raw_fd(), event).map_err(failed("epoll_ctl"))?;
        let shared = Arc::new(SharedTimers { epoll, stop, entries: Mutex::default() });
        let inner = Arc::clone(&shared);
        let thread = std::thread::Builder::new()
            .name("timers".into())
            .spawn(move || inner.run())
            .map_err(failed("starting a thread"))?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// A new timer, not set, that calls `callback` on the thread when it expires.
    ///
    /// # Errors
    /// [`TimerError`] when the system gives no timerfd.
    pub fn add(
        &self,
        callback: impl Fn() + Send + Sync + 'static,
    ) -> Result<Arc<dyn Alarm>, TimerError> {
        let timer = TimerFd::new().map_err(|e| TimerError {
            operation: "timerfd_create",
            source: io::Error::from_raw_os_error(e.errno()),
        })?;
        let fd = timer.as_raw_fd();
        let alarm = Arc::new(FdAlarm(Mutex::new(timer)));
        let mut entries = self.shared.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let event = EpollEvent::new(EventSet::IN, entries.len() as u64);
        self.shared.epoll.ctl(ControlOperation::Add, fd, event).map_err(failed("epoll_ctl"))?;
        entries.push(Entry { alarm: Arc::clone(&alarm), callback: Arc::new(callback) });
        Ok(alarm)
    }
}

/// The event of [`SharedTimers::stop`]; timers count from zero.
const STOP: u64 = u64::MAX;

impl SharedTimers {
    fn run(&self) {
        let mut events = [EpollEvent::default(); 16];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return tracing::error!(%error, "the timer thread ends"),
            };
            for event in events.iter().take(count) {
                if event.data() == STOP {
                    return;
                }
                if let Some(callback) = self.take(event.data()) {
                    callback();
                }
            }
        }
    }

    /// Takes the expiration off the timerfd and gives the callback, unless the timer was set anew
    /// in the meantime.
    fn take(&self, index: u64) -> Option<Callback> {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = entries.get(usize::try_from(index).ok()?)?;
        let mut timer = entry.alarm.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut pollfd = libc::pollfd { fd: timer.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one valid pollfd is passed with the count 1.
        let ready = unsafe { libc::poll(&raw mut pollfd, 1, 0) };
        if ready < 1 {
            return None;
        }
        let expirations = timer.wait().unwrap_or(0);
        (expirations > 0).then(|| Arc::clone(&entry.callback))
    }
}

impl Drop for TimerThread {
    fn drop(&mut self) {
        if self.shared.stop.write(1).is_ok()
            && let Some(thread) = self.thread.take()
        {
            // A callback that panicked has reported itself.
            let _ = thread.join();
        }
        // Callbacks hold chips, which hold alarms.
        self.shared.entries.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

#[cfg(test)]
mod tests {
    use super::TimerThread;
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    #[test]
    fn an_alarm_calls_back_once_and_not_early() {
        let timers = TimerThread::start().unwrap();
        let (sender, receiver) = mpsc::channel();
        let alarm = timers.add(move || sender.send(Instant::now()).unwrap()).unwrap();
        let start = Instant::now();
        alarm.set(20_000_000);
        let fired = receiver.recv_timeout(Duration::from_secs(5)).unwrap();
        assert!(fired.duration_since(start) >= Duration::from_millis(20));
        assert!(receiver.recv_timeout(Duration::from_millis(50)).is_err());
        alarm.set(0);
        receiver.recv_timeout(Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn a_cleared_alarm_does_not_call() {
        let timers = TimerThread::start().unwrap();
        let (sender, receiver) = mpsc::channel();
        let alarm = timers.add(move || sender.send(()).unwrap()).unwrap();
        alarm.set(100_000_000);
        alarm.clear();
        assert!(receiver.recv_timeout(Duration::from_millis(200)).is_err());
    }
}
