//! A virtqueue in use: takes chains, gives them back, and interrupts when the driver wants it.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory, Permissions};

use crate::memory::Memory;
use crate::virtio::chain::{Chain, ChainError};
use crate::virtio::interrupt::Interrupter;
use crate::virtio::limits::CHAINS_PER_EVENT;

const AVAIL_NO_INTERRUPT: u16 = 1;

/// A ring the driver broke; the device needs a reset.
#[derive(Debug, Error)]
pub enum QueueError {
    /// Size or addresses cannot be.
    #[error("queue {index} is set up wrong")]
    Setup {
        /// Which queue.
        index: u16,
    },
    /// The ring itself is inconsistent.
    #[error("ring of queue {index} is broken")]
    Ring {
        /// Which queue.
        index: u16,
        /// What was found.
        source: virtio_queue::Error,
    },
    /// A chain in the ring is.
    #[error("queue {index} holds a broken chain")]
    Chain {
        /// Which queue.
        index: u16,
        /// What was found.
        source: ChainError,
    },
}

/// How the driver set a queue up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueueConfig {
    /// Entries.
    pub size: u16,
    /// Guest address of the descriptor table.
    pub descriptors: u64,
    /// Guest address of the available ring.
    pub available: u64,
    /// Guest address of the used ring.
    pub used: u64,
    /// Whether the driver enabled it.
    pub enabled: bool,
}

/// How far a device has come in a queue.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QueuePosition {
    /// The entry of the available ring to take next; counts on beyond the ring's size.
    pub next_available: u16,
    /// The entry of the used ring to fill next; counts on beyond the ring's size.
    pub next_used: u16,
}

/// One queue of a running device.
pub struct Virtqueue {
    queue: Queue,
    memory: Arc<Memory>,
    interrupts: Arc<Interrupter>,
    index: u16,
    /// Where the used index was when `signal` looked last.
    signalled: u16,
}

impl Virtqueue {
    /// Checks a configuration and starts at the ring's beginning.
    ///
    /// # Errors
    /// The size is not a power of two up to `size_max`, or a ring is misaligned or not in memory.
    pub fn new(
        index: u16,
        size_max: u16,
        config: &QueueConfig,
        event_idx: bool,
        memory: Arc<Memory>,
        interrupts: Arc<Interrupter>,
    ) -> Result<Self, QueueError> {
        let ring = |source| QueueError::Ring { index, source };
        let mut queue = Queue::new(size_max).map_err(ring)?;
        queue.try_set_size(config.size).map_err(ring)?;
        queue.try_set_desc_table_address(GuestAddress(config.descriptors)).map_err(ring)?;
        queue.try_set_avail_ring_address(GuestAddress(config.available)).map_err(ring)?;
        queue.try_set_used_ring_address(GuestAddress(config.used)).map_err(ring)?;
        let size = usize::from(config.size);
        let parts = [
            (config.descriptors, 16 * size, Permissions::Read),
            (config.available, 6 + 2 * size, Permissions::Read),
            (config.used, 6 + 8 * size, Permissions::Write),
        ];
        // Address 0 counts as "not set" in the queue crate.
        let inside = parts.iter().all(|(address, len, permissions)| {
            *address != 0 && memory.check_range(GuestAddress(*address), *len, *permissions)
        });
        if !inside {
            return Err(QueueError::Setup { index });
        }
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(Self { queue, memory, interrupts, index, signalled: 0 })
    }

    /// How far it has come.
    pub fn position(&self) -> QueuePosition {
        QueuePosition { next_available: self.queue.next_avail(), next_used: self.queue.next_used() }
    }

    /// Goes on from there instead of the rings' beginning. The driver knows of all that was used.
    pub fn set_position(&mut self, position: QueuePosition) {
        self.queue.set_next_avail(position.next_available);
        self.queue.set_next_used(position.next_used);
        self.signalled = position.next_used;
    }

    /// The memory its chains are in.
    pub fn memory(&self) -> &Arc<Memory> {
        &self.memory
    }

    /// Takes the next chain, if there is one.
    ///
    /// # Errors
    /// The ring or the chain is broken.
    pub fn pop(&mut self) -> Result<Option<Chain>, QueueError> {
        let index = self.index;
        let memory = &*self.memory;
        let mut available =
            self.queue.iter(memory).map_err(|source| QueueError::Ring { index, source })?;
        let Some(raw) = available.next() else { return Ok(None) };
        if raw.head_index() >= self.queue.size() {
            let source = ChainError::Malformed { head: raw.head_index() };
            return Err(QueueError::Chain { index, source });
        }
        let chain = Chain::collect(memory, raw);
        chain.map(Some).map_err(|source| QueueError::Chain { index, source })
    }

    /// Takes chains, which `each` gives back, until there are no more or [`CHAINS_PER_EVENT`] were taken;
    /// says whether there may be more. The driver notifies of what comes later.
    ///
    /// # Errors
    /// The ring or a chain is broken; those of `each`.
    pub fn take_each<E: From<QueueError>>(
        &mut self,
        mut each: impl FnMut(&mut Self, Chain) -> Result<(), E>,
    ) -> Result<bool, E> {
        self.disable_notification()?;
        for _ in 0..CHAINS_PER_EVENT {
            match self.pop()? {
                Some(chain) => each(self, chain)?,
                None if self.enable_notification()? => {}
                None => return Ok(false),
            }
        }
        Ok(true)
    }

    /// Puts the chain taken last back, as if it had not been taken.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Gives a chain back with `written` bytes in its writable part.
    ///
    /// # Errors
    /// The ring cannot be written.
    pub fn push(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        let result = self.queue.add_used(&*self.memory, head, written);
        result.map_err(|source| QueueError::Ring { index: self.index, source })
    }

    /// Gives several chains back that the driver sees all at once: parts of one packet.
    ///
    /// # Errors
    /// The ring cannot be written.
    pub fn push_together(&mut self, used: &[(u16, u32)]) -> Result<(), QueueError> {
        let Some(((head, written), before)) = used.split_last() else { return Ok(()) };
        let start = self.queue.next_used();
        for (position, (head, written)) in (0u16..).zip(before) {
            let slot = start.wrapping_add(position) % self.queue.size();
            // Inside the used ring, which was checked to be memory.
            let address = GuestAddress(self.queue.used_ring() + 4 + 8 * u64::from(slot));
            let entry = u64::from(*written) << 32 | u64::from(*head);
            self.memory.write_slice(&entry.to_le_bytes(), address).map_err(|source| {
                let source = virtio_queue::Error::GuestMemory(source);
                QueueError::Ring { index: self.index, source }
            })?;
        }
        // At most as many as were popped, which is less than the ring's size.
        self.queue.set_next_used(start.wrapping_add(before.len() as u16));
        self.push(*head, *written)
    }

    /// Interrupts for what was given back since the last call, if the driver wants to know.
    ///
    /// # Errors
    /// The ring cannot be read.
    pub fn signal(&mut self) -> Result<(), QueueError> {
        let (before, now) = (self.signalled, self.queue.next_used());
        if before == now {
            return Ok(());
        }
        self.signalled = now;
        // The used index must be visible before the driver's wish is read.
        fence(Ordering::SeqCst);
        let available = self.queue.avail_ring();
        let wanted = if self.queue.event_idx_enabled() {
            let event = self.load(available + 4 + 2 * u64::from(self.queue.size()))?;
            // The driver wants to hear when the index passes `event`.
            now.wrapping_sub(event).wrapping_sub(1) < now.wrapping_sub(before)
        } else {
            self.load(available)? & AVAIL_NO_INTERRUPT == 0
        };
        if wanted {
            self.interrupts.queue(self.index);
        }
        Ok(())
    }

    fn load(&self, address: u64) -> Result<u16, QueueError> {
        let value = self.memory.load(GuestAddress(address), Ordering::Relaxed);
        value.map(u16::from_le).map_err(|source| {
            let source = virtio_queue::Error::GuestMemory(source);
            QueueError::Ring { index: self.index, source }
        })
    }

    /// Whether the driver has offered a chain that was not taken yet.
    ///
    /// # Errors
    /// The ring cannot be read.
    pub fn has_available(&self) -> Result<bool, QueueError> {
        let ring = |source| QueueError::Ring { index: self.index, source };
        let index = self.queue.avail_idx(&*self.memory, Ordering::Acquire).map_err(ring)?;
        Ok(index.0 != self.queue.next_avail())
    }

    /// Asks the driver not to notify.
    ///
    /// # Errors
    /// The ring cannot be written.
    pub fn disable_notification(&mut self) -> Result<(), QueueError> {
        let result = self.queue.disable_notification(&*self.memory);
        result.map_err(|source| QueueError::Ring { index: self.index, source })
    }

    /// Asks the driver to notify; tells whether chains arrived meanwhile.
    ///
    /// # Errors
    /// The ring cannot be accessed.
    pub fn enable_notification(&mut self) -> Result<bool, QueueError> {
        let result = self.queue.enable_notification(&*self.memory);
        result.map_err(|source| QueueError::Ring { index: self.index, source })
    }
}
