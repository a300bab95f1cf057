//! The registers of a virtio device on PCI (modern only).
//!
//! ```text
//! BAR 0 (32 KiB)
//!   0x0000 common configuration      0x4000 MSI-X table
//!   0x1000 interrupt status          0x5000 MSI-X pending bits
//!   0x2000 device configuration
//!   0x3000 notifications, 4 bytes per queue
//! ```
//!
//! Life of the device behind it:
//!
//! ```text
//!   Idle ──DRIVER_OK──► Running ──status 0──► Stopping ──thread ended──► Idle
//!     ▲                    │ worker failed: DEVICE_NEEDS_RESET, still Running
//!     └── thread cannot start: DEVICE_NEEDS_RESET, stays Idle
//! ```
//!
//! A reset does not make the vCPU wait: the status register reads non-zero until the worker has
//! ended, which the driver has to poll for anyway.

use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::irq::InterruptSink;
use crate::memory::Memory;
use crate::pci::config::{ConfigSpace, Identity, PciError};
use crate::pci::root::{PciFunction, PciRoot, StoredFunction, intx_gsi};
use crate::virtio::device::{
    COMMON_FEATURES, Context, Device, DeviceConfig, F_EVENT_IDX, F_VERSION_1, Info,
};
use crate::virtio::interrupt::{
    Interrupter, STATUS_DRIVER_OK, STATUS_NEEDS_RESET, StoredInterrupts,
};
use crate::virtio::limits::QUEUES_MAX;
use crate::virtio::may_warn;
use crate::virtio::queue::{QueueConfig, QueueError, QueuePosition, Virtqueue};
use crate::virtio::worker::Worker;

const BAR: u8 = 0;
const BAR_SIZE: u32 = 0x8000;
const COMMON: u32 = 0x0000;
const ISR: u32 = 0x1000;
const DEVICE: u32 = 0x2000;
const NOTIFY: u32 = 0x3000;
const MSIX_TABLE: u32 = 0x4000;
const MSIX_PBA: u32 = 0x5000;
const REGION_SIZE: u32 = 0x1000;
const NOTIFY_MULTIPLIER: u32 = 4;
const COMMON_SIZE: usize = 60;

const STATUS_FEATURES_OK: u8 = 8;

/// What is said of a device that was stored in the place of another one.
const OTHER: &str = "a device in the place of another one";

const CAPABILITY_VENDOR: u8 = 0x09;
const CAPABILITY_MSIX: u8 = 0x11;

/// Why a device could not be put on the bus.
#[derive(Debug, Error)]
pub enum AttachError {
    /// PCI is full.
    #[error("cannot attach {device}")]
    Pci {
        /// Name of the device.
        device: &'static str,
        /// What is full.
        source: PciError,
    },
    /// No event descriptor for its queues.
    #[error("cannot create the events of {device}")]
    Events {
        /// Name of the device.
        device: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// The device has more queues than the transport serves.
    #[error("{device} has {count} queues")]
    Queues {
        /// Name of the device.
        device: &'static str,
        /// How many.
        count: usize,
    },
}

/// Puts a device on the bus; returns its slot.
///
/// # Errors
/// The bus is full or the host is out of descriptors.
pub fn attach(
    root: &mut PciRoot,
    memory: Arc<Memory>,
    device: Box<dyn Device>,
) -> Result<u8, AttachError> {
    let name = device.info().name;
    let function = VirtioPci::new(device, memory, root.sink())?;
    let function: Arc<Mutex<dyn PciFunction>> = Arc::new(Mutex::new(function));
    root.add(function).map_err(|source| AttachError::Pci { device: name, source })
}

/// A virtio device as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredVirtio {
    /// Its type.
    pub device_type: u16,
    /// Features that it offered.
    pub features: u64,
    /// Features that the driver accepted.
    pub driver_features: u64,
    /// Selector registers: device features, driver features, queue.
    pub selected: (u32, u32, u16),
    /// How the driver set the queues up.
    pub queues: Vec<QueueConfig>,
    /// Interrupts and status.
    pub interrupts: StoredInterrupts,
    /// How far the queues are, unless the driver does not use the device.
    pub positions: Option<Vec<Option<QueuePosition>>>,
    /// Of the type's own.
    pub device: Vec<u8>,
}

enum State {
    Idle(Box<dyn Device>),
    Running(Worker),
    Stopping(Worker),
    /// Its thread panicked; there is no device any more.
    Lost,
}

/// A virtio device as a PCI function.
pub struct VirtioPci {
    config: ConfigSpace,
    info: Info,
    device_config: Arc<DeviceConfig>,
    memory: Arc<Memory>,
    interrupts: Arc<Interrupter>,
    kicks: Arc<[EventFd]>,
    state: State,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    queue_select: u16,
    queues: Vec<QueueConfig>,
    msix_capability: usize,
    access_capability: usize,
}

impl VirtioPci {
    /// A function for `device`, whose queues are in `memory`.
    ///
    /// # Errors
    /// The host is out of descriptors, or the device does not fit the transport.
    pub fn new(
        device: Box<dyn Device>,
        memory: Arc<Memory>,
        sink: Arc<dyn InterruptSink>,
    ) -> Result<Self, AttachError> {
        let info = device.info();
        let (name, count) = (info.name, info.queue_sizes.len());
        if count > QUEUES_MAX {
            return Err(AttachError::Queues { device: name, count });
        }
        let kicks: Result<Vec<_>, _> = (0..count).map(|_| EventFd::new(EFD_NONBLOCK)).collect();
        let kicks = kicks.map_err(|source| AttachError::Events { device: name, source })?;
        let device_config = device.config();
        let interrupts = Arc::new(Interrupter::new(count as u16, sink));
        device_config.connect(&interrupts);
        let (config, msix_capability, access_capability) =
            build_config(&info, &interrupts, device_config.len())
                .map_err(|source| AttachError::Pci { device: name, source })?;
        let mut function = Self {
            config,
            info,
            device_config,
            memory,
            interrupts,
            kicks: kicks.into(),
            state: State::Idle(device),
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues: Vec::new(),
            msix_capability,
            access_capability,
        };
        function.clear_registers();
        Ok(function)
    }

    fn features(&self) -> u64 {
        self.info.features | COMMON_FEATURES
    }

    fn clear_registers(&mut self) {
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
        let sizes = self.info.queue_sizes.iter();
        self.queues =
            sizes.map(|size| QueueConfig { size: *size, ..QueueConfig::default() }).collect();
        for kick in self.kicks.iter() {
            // Forget notifications of the previous use.
            let _ = kick.read();
        }
        self.interrupts.reset();
    }

    fn status(&mut self) -> u8 {
        let stopping = std::mem::replace(&mut self.state, State::Lost);
        self.state = match stopping {
            State::Stopping(worker) if worker.is_done() => match worker.join() {
                Some(device) => {
                    self.clear_registers();
                    State::Idle(device)
                }
                None => State::Lost,
            },
            other => other,
        };
        self.interrupts.status()
    }

    fn set_status(&mut self, value: u8) {
        let before = self.status();
        if value == 0 {
            self.reset();
            return;
        }
        if matches!(self.state, State::Stopping(_)) {
            return;
        }
        let mut added = value & !before & !STATUS_NEEDS_RESET;
        if added & STATUS_FEATURES_OK != 0 {
            let unknown = self.driver_features & !self.features() != 0;
            if unknown || self.driver_features & F_VERSION_1 == 0 {
                added &= !STATUS_FEATURES_OK;
            }
        }
        self.interrupts.add_status(added);
        if added & STATUS_DRIVER_OK != 0 {
            self.activate();
        }
    }

    fn reset(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Lost) {
            State::Running(worker) => {
                worker.request_stop();
                State::Stopping(worker)
            }
            other => other,
        };
        match self.state {
            State::Idle(_) => self.clear_registers(),
            // Often the worker is done before the driver asks.
            _ => drop(self.status()),
        }
    }

    fn activate(&mut self) {
        if self.interrupts.status() & STATUS_FEATURES_OK == 0 {
            self.interrupts.needs_reset();
            return;
        }
        self.begin(None);
    }

    /// Starts the device, at the rings' beginning or where it was.
    fn begin(&mut self, positions: Option<&[Option<QueuePosition>]>) {
        let name = self.info.name;
        let built = self.build_queues(positions);
        let context = built.map_err(|error| error.to_string()).and_then(|queues| {
            Context::new(
                Arc::clone(&self.memory),
                self.driver_features,
                Arc::clone(&self.interrupts),
                queues,
                Arc::clone(&self.kicks),
            )
            .map_err(|error| error.to_string())
        });
        let context = match context {
            Ok(context) => context,
            Err(error) => {
                if may_warn() {
                    tracing::warn!(device = name, error, "cannot start the device");
                }
                self.interrupts.needs_reset();
                return;
            }
        };
        self.state = match std::mem::replace(&mut self.state, State::Lost) {
            State::Idle(device) => match Worker::start(device, context) {
                Ok(worker) => State::Running(worker),
                Err((device, error)) => {
                    tracing::error!(device = name, %error, "cannot start the device's thread");
                    self.interrupts.needs_reset();
                    State::Idle(device)
                }
            },
            other => other,
        };
        if matches!(self.state, State::Lost) {
            self.interrupts.needs_reset();
        }
    }

    fn build_queues(
        &self,
        positions: Option<&[Option<QueuePosition>]>,
    ) -> Result<Vec<Option<Virtqueue>>, QueueError> {
        let event_idx = self.driver_features & F_EVENT_IDX != 0;
        let sizes = self.info.queue_sizes.iter();
        let configured = self.queues.iter().zip(sizes).enumerate();
        configured
            .map(|(index, (config, size_max))| {
                if !config.enabled {
                    return Ok(None);
                }
                let memory = Arc::clone(&self.memory);
                let interrupts = Arc::clone(&self.interrupts);
                let mut queue =
                    Virtqueue::new(index as u16, *size_max, config, event_idx, memory, interrupts)?;
                if let Some(position) = positions.and_then(|all| all.get(index).copied().flatten())
                {
                    queue.set_position(position);
                }
                Ok(Some(queue))
            })
            .collect()
    }

    fn selected(&self) -> Option<&QueueConfig> {
        self.queues.get(usize::from(self.queue_select))
    }

    fn read_common(&mut self, offset: u64, data: &mut [u8]) {
        let status = self.status();
        let mut image = [0; COMMON_SIZE];
        let queue = self.selected().copied();
        let mut put = |at: usize, value: u64, len: usize| {
            if let Some(target) = image.get_mut(at..at + len) {
                target.copy_from_slice(&value.to_le_bytes()[..len]);
            }
        };
        put(0, u64::from(self.device_feature_select), 4);
        put(4, half(self.features(), self.device_feature_select), 4);
        put(8, u64::from(self.driver_feature_select), 4);
        put(12, half(self.driver_features, self.driver_feature_select), 4);
        put(16, u64::from(self.interrupts.config_vector()), 2);
        put(18, self.queues.len() as u64, 2);
        put(20, u64::from(status), 1);
        put(21, u64::from(self.interrupts.generation()), 1);
        put(22, u64::from(self.queue_select), 2);
        put(26, u64::from(self.interrupts.queue_vector(self.queue_select)), 2);
        if let Some(queue) = queue {
            put(24, u64::from(queue.size), 2);
            put(28, u64::from(queue.enabled), 2);
            put(30, u64::from(self.queue_select), 2);
            put(32, queue.descriptors, 8);
            put(40, queue.available, 8);
            put(48, queue.used, 8);
        }
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = image.get(start.saturating_add(index)).copied().unwrap_or(0);
        }
    }

    /// Registers are written whole, 64-bit ones also by halves; anything else is dropped.
    fn write_common(&mut self, offset: u64, data: &[u8]) {
        let value = match *data {
            [a] => u64::from(a),
            [a, b] => u64::from(u16::from_le_bytes([a, b])),
            [a, b, c, d] => u64::from(u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => u64::from_le_bytes([a, b, c, d, e, f, g, h]),
            _ => return,
        };
        match (offset, data.len()) {
            (0, 4) => self.device_feature_select = value as u32,
            (8, 4) => self.driver_feature_select = value as u32,
            (12, 4) => self.set_driver_features(value as u32),
            (16, 2) => self.interrupts.set_config_vector(value as u16),
            (20, 1) => self.set_status(value as u8),
            (22, 2) => self.queue_select = value as u16,
            (26, 2) => self.interrupts.set_queue_vector(self.queue_select, value as u16),
            (24, 2) => self.change_queue(|queue| queue.size = value as u16),
            (28, 2) => self.change_queue(|queue| queue.enabled = value == 1),
            (32..56, 4) => self.change_queue(|queue| {
                let field = address_field(queue, offset);
                let (shift, keep) =
                    if offset.is_multiple_of(8) { (0, !0 << 32) } else { (32, 0xffff_ffff) };
                if offset.is_multiple_of(4) {
                    *field = *field & keep | value << shift;
                }
            }),
            (32 | 40 | 48, 8) => self.change_queue(|queue| *address_field(queue, offset) = value),
            _ => {}
        }
    }

    fn set_driver_features(&mut self, value: u32) {
        if self.interrupts.status() & STATUS_FEATURES_OK != 0 {
            return;
        }
        let value = u64::from(value);
        match self.driver_feature_select {
            0 => self.driver_features = self.driver_features & !0 << 32 | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    /// Queues may be changed only before the device runs, and once enabled only by a reset.
    fn change_queue(&mut self, change: impl FnOnce(&mut QueueConfig)) {
        if self.interrupts.status() & STATUS_DRIVER_OK != 0 {
            return;
        }
        if let Some(queue) = self.queues.get_mut(usize::from(self.queue_select))
            && !queue.enabled
        {
            change(queue);
        }
    }

    fn sync_interrupts(&mut self) {
        let control = self.config.u16_at(self.msix_capability + 2);
        self.interrupts.set_control(control, self.config.intx_allowed());
    }

    /// The window into BAR 0 that the PCI configuration access capability points at.
    fn access_window(&self) -> Option<(u64, usize)> {
        let mut bar = [0];
        self.config.read(self.access_capability + 4, &mut bar);
        let offset = self.config.u32_at(self.access_capability + 8);
        let len = self.config.u32_at(self.access_capability + 12);
        let valid = bar[0] == BAR && matches!(len, 1 | 2 | 4) && offset.is_multiple_of(len);
        valid.then_some((u64::from(offset), len as usize))
    }
}

/// One 32-bit half of a 64-bit register.
fn half(value: u64, select: u32) -> u64 {
    match select {
        0 => value & 0xffff_ffff,
        1 => value >> 32,
        _ => 0,
    }
}

fn address_field(queue: &mut QueueConfig, offset: u64) -> &mut u64 {
    match offset {
        0..40 => &mut queue.descriptors,
        40..48 => &mut queue.available,
        _ => &mut queue.used,
    }
}

fn build_config(
    info: &Info,
    interrupts: &Interrupter,
    device_config_len: usize,
) -> Result<(ConfigSpace, usize, usize), PciError> {
    let identity = Identity {
        vendor: 0x1af4,
        device: 0x1040 + info.device_type,
        revision: 1,
        class: info.class,
        subsystem_vendor: 0x1af4,
        subsystem: 0x1040 + info.device_type,
    };
    let mut config = ConfigSpace::new(&identity, true);
    config.add_memory_bar(usize::from(BAR), BAR_SIZE)?;
    let mut region = |kind: u8, offset: u32, len: u32, extra: &[u8]| {
        let mut body = vec![16 + extra.len() as u8, kind, BAR, 0, 0, 0];
        body.extend(offset.to_le_bytes());
        body.extend(len.to_le_bytes());
        body.extend(extra);
        config.add_capability(CAPABILITY_VENDOR, &body)
    };
    region(1, COMMON, COMMON_SIZE as u32, &[])?;
    region(2, NOTIFY, REGION_SIZE, &NOTIFY_MULTIPLIER.to_le_bytes())?;
    region(3, ISR, 1, &[])?;
    if device_config_len > 0 {
        region(4, DEVICE, device_config_len as u32, &[])?;
    }
    let access = region(5, 0, 0, &[0; 4])?;
    // BAR, offset, length and data of the access window belong to software.
    config.allow_writes(access + 4, &[0xff]);
    config.allow_writes(access + 8, &[0xff; 12]);
    let msix = interrupts.msix_capability(BAR, MSIX_TABLE, MSIX_PBA);
    let msix = config.add_capability(CAPABILITY_MSIX, &msix)?;
    config.allow_writes(msix + 3, &[0xc0]);
    Ok((config, msix, access))
}

impl PciFunction for VirtioPci {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }

    fn plugged(&mut self, slot: u8) {
        self.interrupts.set_gsi(intx_gsi(slot));
    }

    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        let window = self.access_capability + 16;
        if (window..window + 4).contains(&offset)
            && let Some((address, len)) = self.access_window()
        {
            let mut value = [0; 4];
            if let Some(target) = value.get_mut(..len) {
                self.read_bar(usize::from(BAR), address, target);
            }
            self.config.put(window, &value);
        }
        self.config.read(offset, data);
    }

    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config.write(offset, data);
        let window = self.access_capability + 16;
        if (window..window + 4).contains(&offset)
            && let Some((address, len)) = self.access_window()
        {
            let value = self.config.u32_at(window).to_le_bytes();
            self.write_bar(usize::from(BAR), address, value.get(..len).unwrap_or(&[]));
        }
        self.sync_interrupts();
    }

    fn request_park(&mut self) {
        if let State::Running(worker) = &self.state {
            worker.request_park();
        }
    }

    fn wait_parked(&mut self) {
        match &self.state {
            State::Running(worker) => drop(worker.wait_parked()),
            // It ends soon, since it was told to.
            State::Stopping(worker) => {
                worker.wait_ended();
                self.status();
            }
            State::Idle(_) | State::Lost => {}
        }
    }

    fn unpark(&mut self) {
        if let State::Running(worker) = &self.state {
            worker.unpark();
        }
    }

    fn save(&mut self) -> Option<StoredVirtio> {
        let (positions, device) = match &mut self.state {
            State::Running(worker) => match worker.wait_parked() {
                Some(parked) => (Some(parked.queues), parked.saved),
                None => (None, Vec::new()),
            },
            State::Idle(device) => (None, device.save()),
            State::Stopping(_) | State::Lost => (None, Vec::new()),
        };
        Some(StoredVirtio {
            device_type: self.info.device_type,
            features: self.features(),
            driver_features: self.driver_features,
            selected: (self.device_feature_select, self.driver_feature_select, self.queue_select),
            queues: self.queues.clone(),
            interrupts: self.interrupts.save(),
            positions,
            device,
        })
    }

    fn restore(&mut self, stored: &StoredFunction) -> Result<(), &'static str> {
        let virtio = stored.virtio.as_ref().ok_or(OTHER)?;
        let queues = virtio.queues.len();
        if virtio.device_type != self.info.device_type || queues != self.queues.len() {
            return Err(OTHER);
        }
        if virtio.driver_features & !self.features() != 0 {
            return Err("a device that offers the driver less than it used");
        }
        if virtio.positions.as_ref().is_some_and(|positions| positions.len() != queues) {
            return Err("a device with another number of queues");
        }
        let State::Idle(device) = &mut self.state else { return Err("a device that is in use") };
        device.restore(&virtio.device)?;
        self.config.restore(&stored.config)?;
        self.interrupts.restore(&virtio.interrupts)?;
        self.driver_features = virtio.driver_features;
        (self.device_feature_select, self.driver_feature_select, self.queue_select) =
            virtio.selected;
        self.queues.clone_from(&virtio.queues);
        self.sync_interrupts();
        match &virtio.positions {
            Some(positions) => self.begin(Some(positions)),
            // It had failed, and the driver was told so.
            None if virtio.interrupts.status & STATUS_DRIVER_OK != 0 => {
                self.interrupts.needs_reset();
            }
            None => {}
        }
        Ok(())
    }

    fn read_bar(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = offset % u64::from(REGION_SIZE);
        match (offset - within) as u32 {
            COMMON => self.read_common(within, data),
            ISR => {
                if let (0, Some(byte)) = (within, data.first_mut()) {
                    *byte = self.interrupts.take_isr();
                }
            }
            DEVICE => self.device_config.read(within, data),
            MSIX_TABLE => self.interrupts.read_table(within, data),
            MSIX_PBA => self.interrupts.read_pba(within, data),
            _ => {}
        }
    }

    fn write_bar(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        let within = offset % u64::from(REGION_SIZE);
        match (offset - within) as u32 {
            COMMON => self.write_common(within, data),
            // The address says which queue; the value repeats it.
            NOTIFY => {
                let queue = (within / u64::from(NOTIFY_MULTIPLIER)) as usize;
                if let Some(kick) = self.kicks.get(queue) {
                    // Fails only when the counter is full; then the event is pending anyway.
                    let _ = kick.write(1);
                }
            }
            DEVICE => self.device_config.write(within, data),
            MSIX_TABLE => self.interrupts.write_table(within, data),
            _ => {}
        }
    }
}
