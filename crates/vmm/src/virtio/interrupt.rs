//! Interrupts of one virtio function, shared by its transport and its worker.

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::irq::InterruptSink;
use crate::pci::msix::{Message, Msix, StoredMsix};

/// "No vector": the driver wants no message for this.
pub const NO_VECTOR: u16 = 0xffff;

/// ISR bit: a queue has used buffers.
pub const ISR_QUEUE: u8 = 1;
/// ISR bit: the configuration or the status changed.
pub const ISR_CONFIG: u8 = 2;

/// Status bit: the device cannot go on without a reset.
pub const STATUS_NEEDS_RESET: u8 = 0x40;
/// Status bit: the driver is ready.
pub const STATUS_DRIVER_OK: u8 = 4;

struct State {
    msix: Msix,
    queue_vectors: Vec<u16>,
    config_vector: u16,
    isr: u8,
    gsi: Option<u32>,
    intx_allowed: bool,
    line: bool,
}

/// What is stored of the interrupts of a function.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredInterrupts {
    /// The vector table.
    pub msix: StoredMsix,
    /// Vector of each queue.
    pub queue_vectors: Vec<u16>,
    /// Vector of configuration changes.
    pub config_vector: u16,
    /// The ISR register.
    pub isr: u8,
    /// The device status register.
    pub status: u8,
    /// Changes of the configuration, modulo 256.
    pub generation: u8,
}

/// Raises interrupts the way the driver asked for.
pub struct Interrupter {
    state: Mutex<State>,
    sink: Arc<dyn InterruptSink>,
    /// The device status register; the worker only ever adds `STATUS_NEEDS_RESET`.
    status: AtomicU8,
    generation: AtomicU8,
}

impl Interrupter {
    /// For a function with `queues` queues: one vector each and one for configuration changes.
    pub fn new(queues: u16, sink: Arc<dyn InterruptSink>) -> Self {
        let state = State {
            msix: Msix::new(queues.saturating_add(1)),
            queue_vectors: vec![NO_VECTOR; usize::from(queues)],
            config_vector: NO_VECTOR,
            isr: 0,
            gsi: None,
            intx_allowed: true,
            line: false,
        };
        Self {
            state: Mutex::new(state),
            sink,
            status: AtomicU8::new(0),
            generation: AtomicU8::new(0),
        }
    }

    /// What is stored of them, while the device does nothing.
    pub fn save(&self) -> StoredInterrupts {
        let state = self.lock();
        StoredInterrupts {
            msix: state.msix.save(),
            queue_vectors: state.queue_vectors.clone(),
            config_vector: state.config_vector,
            isr: state.isr,
            status: self.status(),
            generation: self.generation(),
        }
    }

    /// Puts back what was stored. Nothing is sent; [`Interrupter::set_control`] comes next.
    ///
    /// # Errors
    /// It cannot be a state of this function.
    pub fn restore(&self, stored: &StoredInterrupts) -> Result<(), &'static str> {
        let mut state = self.lock();
        if stored.queue_vectors.len() != state.queue_vectors.len() {
            return Err("a device with another number of queues");
        }
        let vectors = state.msix.vectors();
        let known = |vector: &u16| *vector < vectors || *vector == NO_VECTOR;
        if !stored.queue_vectors.iter().chain([&stored.config_vector]).all(known) {
            return Err("an interrupt vector that the device does not have");
        }
        state.msix.restore(&stored.msix)?;
        state.queue_vectors.clone_from(&stored.queue_vectors);
        state.config_vector = stored.config_vector;
        state.isr = stored.isr & (ISR_QUEUE | ISR_CONFIG);
        self.status.store(stored.status, Ordering::SeqCst);
        self.generation.store(stored.generation, Ordering::SeqCst);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, messages: impl IntoIterator<Item = Message>) {
        for message in messages {
            self.sink.signal_msi(message.address, message.data);
        }
    }

    /// Queue `index` has used buffers.
    pub fn queue(&self, index: u16) {
        let message = {
            let mut state = self.lock();
            if state.msix.enabled() {
                let vector = state.queue_vectors.get(usize::from(index)).copied();
                vector.and_then(|vector| state.msix.fire(vector))
            } else {
                state.isr |= ISR_QUEUE;
                self.update_line(&mut state);
                None
            }
        };
        self.send(message);
    }

    /// The device's configuration changed.
    pub fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.notify_config();
    }

    /// The device gave up; the driver should reset it.
    pub fn needs_reset(&self) {
        let before = self.status.fetch_or(STATUS_NEEDS_RESET, Ordering::SeqCst);
        if before & STATUS_DRIVER_OK != 0 {
            self.notify_config();
        }
    }

    fn notify_config(&self) {
        let message = {
            let mut state = self.lock();
            state.isr |= ISR_CONFIG;
            if state.msix.enabled() {
                let vector = state.config_vector;
                state.msix.fire(vector)
            } else {
                self.update_line(&mut state);
                None
            }
        };
        self.send(message);
    }

    /// The device status register.
    pub fn status(&self) -> u8 {
        self.status.load(Ordering::SeqCst)
    }

    /// Adds bits to the status.
    pub fn add_status(&self, bits: u8) {
        self.status.fetch_or(bits, Ordering::SeqCst);
    }

    /// Counts changes of the configuration.
    pub fn generation(&self) -> u8 {
        self.generation.load(Ordering::SeqCst)
    }

    /// Reset of the device: no vectors, nothing pending, status 0. The MSI-X table stays.
    pub fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        let mut state = self.lock();
        state.queue_vectors.fill(NO_VECTOR);
        state.config_vector = NO_VECTOR;
        state.isr = 0;
        self.update_line(&mut state);
    }

    /// Reads and clears the ISR register, which also lowers the interrupt pin.
    pub fn take_isr(&self) -> u8 {
        let mut state = self.lock();
        let isr = std::mem::take(&mut state.isr);
        self.update_line(&mut state);
        isr
    }

    /// Vector of a queue.
    pub fn queue_vector(&self, queue: u16) -> u16 {
        self.lock().queue_vectors.get(usize::from(queue)).copied().unwrap_or(NO_VECTOR)
    }

    /// Sets the vector of a queue; one that does not exist reads back as [`NO_VECTOR`].
    pub fn set_queue_vector(&self, queue: u16, vector: u16) {
        let mut state = self.lock();
        let vector = if vector < state.msix.vectors() { vector } else { NO_VECTOR };
        if let Some(entry) = state.queue_vectors.get_mut(usize::from(queue)) {
            *entry = vector;
        }
    }

    /// Vector of configuration changes.
    pub fn config_vector(&self) -> u16 {
        self.lock().config_vector
    }

    /// Sets the vector of configuration changes.
    pub fn set_config_vector(&self, vector: u16) {
        let mut state = self.lock();
        state.config_vector = if vector < state.msix.vectors() { vector } else { NO_VECTOR };
    }

    /// Which line the interrupt pin is connected to.
    pub fn set_gsi(&self, gsi: u32) {
        self.lock().gsi = Some(gsi);
    }

    /// Takes over what software wrote to configuration space.
    pub fn set_control(&self, msix_control: u16, intx_allowed: bool) {
        let messages = {
            let mut state = self.lock();
            state.intx_allowed = intx_allowed;
            let messages = state.msix.set_control(msix_control);
            self.update_line(&mut state);
            messages
        };
        self.send(messages);
    }

    /// Body of the MSI-X capability.
    pub fn msix_capability(&self, bar: u8, table_offset: u32, pba_offset: u32) -> [u8; 10] {
        self.lock().msix.capability(bar, table_offset, pba_offset)
    }

    /// Reads the vector table.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        self.lock().msix.read_table(offset, data);
    }

    /// Writes the vector table; unmasked vectors that were pending are sent.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        let messages = self.lock().msix.write_table(offset, data);
        self.send(messages);
    }

    /// Reads the pending bits.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        self.lock().msix.read_pba(offset, data);
    }

    // The line is set with the state locked: two threads must not set it in the wrong order.
    fn update_line(&self, state: &mut State) {
        let level = state.isr != 0 && state.intx_allowed && !state.msix.enabled();
        if level != state.line {
            state.line = level;
            if let Some(gsi) = state.gsi {
                self.sink.set_line(gsi, level);
            }
        }
    }
}
