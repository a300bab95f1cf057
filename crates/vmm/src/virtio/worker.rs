//! The thread of a device, from DRIVER_OK to reset.
//!
//! It can be parked: it finishes what the device has taken from its queues, says how far these are,
//! and waits.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::confine;
use crate::virtio::device::{Context, DEVICE_TOKENS, Device, DeviceError};
use crate::virtio::interrupt::Interrupter;
use crate::virtio::may_warn;
use crate::virtio::queue::QueuePosition;

const TOKEN_STOP: u64 = DEVICE_TOKENS;
const TOKEN_QUEUES: u64 = DEVICE_TOKENS + 1;
const EVENTS_PER_WAIT: usize = 64;

/// A running device. Dropping it stops the thread and waits for it.
pub(super) struct Worker {
    thread: Option<JoinHandle<Box<dyn Device>>>,
    stop: EventFd,
    done: Arc<AtomicBool>,
    parking: Arc<Parking>,
}

/// A device that is parked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Parked {
    /// How far its queues are; none for those that the driver did not enable.
    pub queues: Vec<Option<QueuePosition>>,
    /// [`Device::save`].
    pub saved: Vec<u8>,
}

/// What is wanted of the thread.
#[derive(Default)]
struct Parking {
    state: Mutex<ParkingState>,
    changed: Condvar,
}

#[derive(Default)]
struct ParkingState {
    stop: bool,
    park: bool,
    parked: Option<Parked>,
    ended: bool,
}

impl Parking {
    fn lock(&self) -> MutexGuard<'_, ParkingState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
        let parking = Arc::new(Parking::default());
        let guard = DoneGuard {
            done: Arc::clone(&done),
            interrupts: Arc::clone(&context.interrupts),
            parking: Arc::clone(&parking),
        };
        let wanted = Arc::clone(&parking);
        let name = device.info().name.to_owned();
        // The device travels through a slot, so that it is not lost when no thread can be made.
        let slot = Arc::new(Mutex::new(Some(device)));
        let inside = Arc::clone(&slot);
        let body = move || {
            let _guard = guard;
            let taken = inside.lock().unwrap_or_else(PoisonError::into_inner).take();
            let mut device = taken.expect("the slot was filled before the thread started");
            block_signals();
            confine::enter(device.confinement());
            run(device.as_mut(), context, &watched, &wanted);
            device
        };
        match std::thread::Builder::new().name(name).spawn(body) {
            Ok(thread) => Ok(Self { thread: Some(thread), stop, done, parking }),
            Err(error) => {
                let taken = slot.lock().unwrap_or_else(PoisonError::into_inner).take();
                Err((taken.expect("no thread took the device"), error))
            }
        }
    }

    /// Asks the thread to end without waiting.
    pub fn request_stop(&self) {
        self.parking.lock().stop = true;
        self.parking.changed.notify_all();
        let _ = self.stop.write(1);
    }

    /// Asks the thread to park without waiting.
    pub fn request_park(&self) {
        self.parking.lock().park = true;
        let _ = self.stop.write(1);
    }

    /// Waits until the thread has parked; none: the device has failed, and does nothing any more.
    pub fn wait_parked(&self) -> Option<Parked> {
        let state = self.parking.lock();
        let waiting = |state: &mut ParkingState| state.parked.is_none() && !state.ended;
        let state = self.parking.changed.wait_while(state, waiting);
        state.unwrap_or_else(PoisonError::into_inner).parked.clone()
    }

    /// Waits for the end of a thread that was asked to stop.
    pub fn wait_ended(&self) {
        let state = self.parking.lock();
        let state = self.parking.changed.wait_while(state, |state| !state.ended);
        drop(state.unwrap_or_else(PoisonError::into_inner));
    }

    /// Lets it go on.
    pub fn unpark(&self) {
        let mut state = self.parking.lock();
        state.park = false;
        state.parked = None;
        self.parking.changed.notify_all();
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
    parking: Arc<Parking>,
}

impl Drop for DoneGuard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.interrupts.needs_reset();
        }
        self.done.store(true, Ordering::Release);
        self.parking.lock().ended = true;
        self.parking.changed.notify_all();
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

fn run(device: &mut dyn Device, mut context: Context, stop: &EventFd, parking: &Parking) {
    let name = device.info().name;
    if let Err(error) = context.poller.add(stop.as_raw_fd(), TOKEN_STOP, EventSet::IN) {
        tracing::error!(device = name, %error, "the device cannot watch its stop event");
        context.interrupts.needs_reset();
        return;
    }
    let result = serve(device, &mut context, stop, parking);
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
fn serve(
    device: &mut dyn Device,
    context: &mut Context,
    stop: &EventFd,
    parking: &Parking,
) -> Result<(), DeviceError> {
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
                TOKEN_STOP => {
                    // Before looking: what is asked for from here on writes it again.
                    let _ = stop.read();
                    if !park(device, context, parking)? {
                        return Ok(());
                    }
                    // What else was reported may be out of date.
                    break;
                }
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

/// Parks if that is wanted, as long as it is; whether to go on afterwards.
fn park(
    device: &mut dyn Device,
    context: &mut Context,
    parking: &Parking,
) -> Result<bool, DeviceError> {
    let mut state = parking.lock();
    while state.park && !state.stop {
        if state.parked.is_some() {
            state = parking.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            continue;
        }
        drop(state);
        device.drain(context)?;
        let parked = Parked { queues: context.positions(), saved: device.save() };
        state = parking.lock();
        if state.park {
            state.parked = Some(parked);
            parking.changed.notify_all();
        }
    }
    Ok(!state.stop)
}
