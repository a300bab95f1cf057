//! What a virtio device is.
//!
//! A [`Device`] is owned by its transport while the guest does not use it and by its worker thread
//! from DRIVER_OK to reset. There it is called for one event at a time.

use std::ops::Range;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use thiserror::Error;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use crate::confine::Kind;
use crate::memory::Memory;
use crate::virtio::chain::Chain;
use crate::virtio::interrupt::Interrupter;
use crate::virtio::queue::{QueueError, QueuePosition, Virtqueue};

/// Feature bit: indirect descriptors.
pub const F_INDIRECT_DESC: u64 = 1 << 28;
/// Feature bit: the event index fields of the rings.
pub const F_EVENT_IDX: u64 = 1 << 29;
/// Feature bit: virtio 1.x.
pub const F_VERSION_1: u64 = 1 << 32;
/// What the transport and the rings can do, for every device.
pub const COMMON_FEATURES: u64 = F_INDIRECT_DESC | F_EVENT_IDX | F_VERSION_1;

/// Event tokens of a device's own descriptors are below this; the rest belongs to the worker.
pub const DEVICE_TOKENS: u64 = 1 << 32;

/// Why a device stops working until it is reset.
#[derive(Debug, Error)]
pub enum DeviceError {
    /// The driver broke a queue.
    #[error("the driver broke a queue")]
    Queue(#[source] QueueError),
    /// The driver broke a request in a way that has no error status.
    #[error("the driver sent a broken request: {0}")]
    Request(&'static str),
    /// The host refused something.
    #[error("{operation} failed")]
    Host {
        /// What was attempted.
        operation: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
}

impl From<QueueError> for DeviceError {
    fn from(error: QueueError) -> Self {
        Self::Queue(error)
    }
}

impl DeviceError {
    /// For `map_err` after a system call.
    pub fn host(operation: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Host { operation, source }
    }
}

/// The unchanging description of a device.
#[derive(Clone, Debug)]
pub struct Info {
    /// Virtio device type (2 for a disk).
    pub device_type: u16,
    /// PCI class code, 0xCCSSPP.
    pub class: u32,
    /// Features of the device type, without [`COMMON_FEATURES`].
    pub features: u64,
    /// Largest size of each queue.
    pub queue_sizes: Vec<u16>,
    /// A name for the log and the thread.
    pub name: &'static str,
}

/// A virtio device.
pub trait Device: Send + 'static {
    /// Its description.
    fn info(&self) -> Info;
    /// Its configuration space.
    fn config(&self) -> Arc<DeviceConfig>;
    /// What its thread may ask of the kernel.
    fn confinement(&self) -> Kind {
        Kind::Device
    }
    /// The driver is ready: register descriptors, start what needs starting.
    ///
    /// # Errors
    /// The device cannot work.
    fn start(&mut self, context: &mut Context) -> Result<(), DeviceError>;
    /// The driver notified `queue`, which is enabled.
    ///
    /// # Errors
    /// The device cannot go on.
    fn queue_event(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError>;
    /// A descriptor registered under `token` is ready; never for a device that registers none.
    ///
    /// # Errors
    /// The device cannot go on.
    fn fd_event(
        &mut self,
        _context: &mut Context,
        _token: u64,
        _events: EventSet,
    ) -> Result<(), DeviceError> {
        Ok(())
    }
    /// The guest's use ends. After this returns nothing touches guest memory any more.
    fn stop(&mut self, context: &mut Context);
    /// Finishes what it has taken from the queues and takes nothing else, so that the queues alone
    /// say what is left to do. Nothing touches guest memory until the next event.
    ///
    /// # Errors
    /// The device cannot go on.
    fn drain(&mut self, _context: &mut Context) -> Result<(), DeviceError> {
        Ok(())
    }
    /// What the driver could miss besides the queues when the device goes on elsewhere. Called after
    /// [`Device::drain`], or while the guest does not use it.
    fn save(&mut self) -> Vec<u8> {
        Vec::new()
    }
    /// The driver, when it next uses the device, has used another one, which said this. Called
    /// before [`Device::start`].
    ///
    /// # Errors
    /// What was said cannot be.
    fn restore(&mut self, saved: &[u8]) -> Result<(), &'static str> {
        if saved.is_empty() {
            Ok(())
        } else {
            Err("a device that stores nothing has stored something")
        }
    }
}

/// What a device has while the guest uses it.
pub struct Context {
    /// Guest memory.
    pub memory: Arc<Memory>,
    /// Features both sides agreed on.
    pub features: u64,
    /// Interrupts and status.
    pub interrupts: Arc<Interrupter>,
    /// The device's event loop.
    pub poller: Poller,
    queues: Vec<Option<Virtqueue>>,
    kicks: Arc<[EventFd]>,
}

impl Context {
    pub(super) fn new(
        memory: Arc<Memory>,
        features: u64,
        interrupts: Arc<Interrupter>,
        queues: Vec<Option<Virtqueue>>,
        kicks: Arc<[EventFd]>,
    ) -> std::io::Result<Self> {
        Ok(Self { memory, features, interrupts, poller: Poller::new()?, queues, kicks })
    }

    /// A queue, if the driver enabled it.
    pub fn queue(&mut self, index: usize) -> Option<&mut Virtqueue> {
        self.queues.get_mut(index)?.as_mut()
    }

    /// Whether both sides agreed on a feature.
    pub fn negotiated(&self, feature: u64) -> bool {
        self.features & feature == feature
    }

    /// Serves what is in a queue, if the driver uses it: `each` gives chains back.
    ///
    /// # Errors
    /// The ring or a chain is broken; those of `each`.
    pub fn serve(
        &mut self,
        index: usize,
        mut each: impl FnMut(&mut Virtqueue, &Memory, &Chain) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let Some(queue) = self.queue(index) else { return Ok(()) };
        let memory = Arc::clone(queue.memory());
        let more = queue.take_each(|queue, chain| each(queue, &memory, &chain))?;
        queue.signal()?;
        if more {
            self.revisit(index);
        }
        Ok(())
    }

    /// Comes back to `queue` after other events had their turn.
    pub fn revisit(&self, queue: usize) {
        if let Some(kick) = self.kicks.get(queue) {
            // Fails only when the counter is full; then the event is pending anyway.
            let _ = kick.write(1);
        }
    }

    pub(super) fn positions(&self) -> Vec<Option<QueuePosition>> {
        self.queues.iter().map(|queue| queue.as_ref().map(Virtqueue::position)).collect()
    }

    pub(super) fn enabled_queues(&self) -> Vec<usize> {
        let enabled = self.queues.iter().enumerate().filter(|(_, queue)| queue.is_some());
        enabled.map(|(index, _)| index).collect()
    }

    pub(super) fn kick(&self, queue: usize) -> Option<&EventFd> {
        self.kicks.get(queue)
    }
}

/// A device's epoll instance.
pub struct Poller {
    epoll: Epoll,
}

impl Poller {
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(Self { epoll: Epoll::new()? })
    }

    /// Watches `fd` for `events` under `token`.
    ///
    /// # Errors
    /// The descriptor cannot be watched.
    pub fn add(&self, fd: RawFd, token: u64, events: EventSet) -> std::io::Result<()> {
        self.epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(events, token))
    }

    /// Watches a watched `fd` for other events.
    ///
    /// # Errors
    /// The descriptor is not watched.
    pub fn modify(&self, fd: RawFd, token: u64, events: EventSet) -> std::io::Result<()> {
        self.epoll.ctl(ControlOperation::Modify, fd, EpollEvent::new(events, token))
    }

    /// Stops watching `fd`.
    pub fn remove(&self, fd: RawFd) {
        // It may be gone already, closed by its owner.
        let _ = self.epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
    }

    pub(super) fn wait(&self, events: &mut [EpollEvent]) -> std::io::Result<usize> {
        loop {
            match self.epoll.wait(-1, events) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }
}

/// The device-specific configuration space; the device may change it at any time.
#[derive(Debug)]
pub struct DeviceConfig {
    bytes: Mutex<Vec<u8>>,
    /// What the driver may write.
    writable: Range<usize>,
    interrupts: Mutex<Weak<Interrupter>>,
}

impl std::fmt::Debug for Interrupter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Interrupter").field("status", &self.status()).finish_non_exhaustive()
    }
}

impl DeviceConfig {
    /// A configuration space of these bytes.
    pub fn new(bytes: Vec<u8>) -> Arc<Self> {
        Self::with_writable(bytes, 0..0)
    }

    /// The same, of which the driver may write a part.
    pub fn with_writable(bytes: Vec<u8>, writable: Range<usize>) -> Arc<Self> {
        let interrupts = Mutex::new(Weak::new());
        Arc::new(Self { bytes: Mutex::new(bytes), writable, interrupts })
    }

    /// The driver writes; nothing happens where it may not.
    pub fn write(&self, offset: u64, data: &[u8]) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, new) in data.iter().enumerate() {
            let at = start.saturating_add(index);
            if let Some(byte) = bytes.get_mut(at).filter(|_| self.writable.contains(&at)) {
                *byte = *new;
            }
        }
    }

    /// A little-endian number in it.
    pub fn u32_at(&self, offset: u64) -> u32 {
        let mut raw = [0; 4];
        self.read(offset, &mut raw);
        u32::from_le_bytes(raw)
    }

    /// Changes bytes without telling the driver.
    pub fn put(&self, offset: usize, data: &[u8]) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        for (byte, new) in bytes.iter_mut().skip(offset).zip(data) {
            *byte = *new;
        }
    }

    /// Reads; zeroes past the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        let bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = bytes.get(start.saturating_add(index)).copied().unwrap_or(0);
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.bytes.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// Whether the device has no configuration.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Changes bytes from the device's side and tells the driver.
    pub fn update(&self, offset: usize, data: &[u8]) {
        self.put(offset, data);
        let interrupts = self.interrupts.lock().unwrap_or_else(PoisonError::into_inner).upgrade();
        if let Some(interrupts) = interrupts {
            interrupts.config_changed();
        }
    }

    pub(super) fn connect(&self, interrupts: &Arc<Interrupter>) {
        *self.interrupts.lock().unwrap_or_else(PoisonError::into_inner) =
            Arc::downgrade(interrupts);
    }
}
