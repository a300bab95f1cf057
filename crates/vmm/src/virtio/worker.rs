//! The thread of a device, from DRIVER_OK to reset.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::device::{Context, DEVICE_TOKENS, Device, DeviceError};
use crate::virtio::interrupt::Interrupter;
use crate::virtio::may_warn;

const TOKEN_STOP: u64 = DEVICE_TOKENS;
const TOKEN_QUEUES: u64 = DEVICE_TOKENS + 1;
const EVENTS_PER_WAIT: usize = 64;

/// A running device. Dropping it stops the thread and waits for it.
pub(super) struct Worker {
    thread: Option<JoinHandle<Box<dyn Device>>>,
    stop: EventFd,
    done: Arc<AtomicBool>,
}

impl Worker {
    /// Starts the thread. The device comes back if that fails.
    pub fn start(
        device: Box<dyn Device>,
        context: Context,
    ) -> Result<Self, (Box<dyn Device>, std::io::Error)> {
        let stop = match EventFd::new(EFD_NONBLOCK) {
            Ok(stop) => stop,
            Err(error) => return Err((device, error)),
        };
        let watched = match stop.try_clone() {
            Ok(watched) => watched,
            Err(error) => return Err((device, error)),
        };
        let done = Arc::new(AtomicBool::new(false));
        let guard =
            DoneGuard { done: Arc::clone(&done), interrupts: Arc::clone(&context.interrupts) };
        let name = device.info().name.to_owned();
        // The device travels through a slot, so that it is not lost when no thread can be made.
        let slot = Arc::new(std::sync::Mutex::new(Some(device)));
        let inside = Arc::clone(&slot);
        let body = move || {
            let _guard = guard;
            let taken = inside.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
            let mut device = taken.expect("the slot was filled before the thread started");
            block_signals();
            run(device.as_mut(), context, &watched);
            device
        };
        match std::thread::Builder::new().name(name).spawn(body) {
            Ok(thread) => Ok(Self { thread: Some(thread), stop, done }),
            Err(error) => {
                let taken = slot.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
                Err((taken.expect("no thread took the device"), error))
            }
        }
    }

    /// Asks the thread to end without waiting.
    pub fn request_stop(&self) {
        let _ = self.stop.write(1);
    }

    /// Whether the thread has ended.
    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Waits for the thread; the device, unless the thread panicked.
    pub fn join(mut self) -> Option<Box<dyn Device>> {
        self.request_stop();
        self.thread.take()?.join().ok()
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.request_stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Says that the thread has ended, and that the device is broken if that was a panic.
struct DoneGuard {
    done: Arc<AtomicBool>,
    interrupts: Arc<Interrupter>,
}

impl Drop for DoneGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.interrupts.needs_reset();
        }
        self.done.store(true, Ordering::Release);
    }
}

/// Signals of the process (terminal, vCPU kicks) are for other threads.
fn block_signals() {
    // SAFETY: the set is initialised by sigfillset before use, and both pointers are to live locals
    // or null, which pthread_sigmask allows for the old set.
    unsafe {
        let mut set = std::mem::zeroed();
        libc::sigfillset(&raw mut set);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

fn run(device: &mut dyn Device, mut context: Context, stop: &EventFd) {
    let name = device.info().name;
    if let Err(error) = context.poller.add(stop.as_raw_fd(), TOKEN_STOP, EventSet::IN) {
        tracing::error!(device = name, %error, "the device cannot watch its stop event");
        context.interrupts.needs_reset();
        return;
    }
    let result = serve(device, &mut context);
    if let Err(error) = &result
        && may_warn()
    {
        tracing::warn!(device = name, error = error as &dyn std::error::Error, "device stopped");
    }
    device.stop(&mut context);
    if result.is_err() {
        context.interrupts.needs_reset();
    }
}

/// Handles events until told to stop, or until the device fails.
fn serve(device: &mut dyn Device, context: &mut Context) -> Result<(), DeviceError> {
    device.start(context)?;
    for queue in context.enabled_queues() {
        if let Some(kick) = context.kick(queue) {
            let fd = kick.as_raw_fd();
            let token = TOKEN_QUEUES + queue as u64;
            context
                .poller
                .add(fd, token, EventSet::IN)
                .map_err(DeviceError::host("watching a queue"))?;
        }
        device.queue_event(context, queue)?;
    }
    let mut events = [EpollEvent::default(); EVENTS_PER_WAIT];
    loop {
        let count =
            context.poller.wait(&mut events).map_err(DeviceError::host("waiting for events"))?;
        for event in events.iter().take(count) {
            match event.data() {
                TOKEN_STOP => return Ok(()),
                token if token >= TOKEN_QUEUES => {
                    let queue = (token - TOKEN_QUEUES) as usize;
                    if let Some(kick) = context.kick(queue) {
                        // Nothing to read means someone else took the event; harmless.
                        let _ = kick.read();
                    }
                    device.queue_event(context, queue)?;
                }
                token => device.fd_event(context, token, event.event_set())?,
            }
        }
    }
}
