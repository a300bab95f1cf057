//! The generation id of a machine (Microsoft, "Virtual Machine Generation ID"): 16 random bytes in
//! its memory, which are others after a machine went back in time or became two. A guest that sees
//! them change mixes them into its random numbers, which would otherwise repeat; Linux does so with
//! the driver `vmgenid`.
//!
//! The bytes are at [`GENERATION_ID`], in what the memory map reserves, and the DSDT says where
//! (`acpi`). A machine that boots gets fresh ones. One that goes on after it was suspended keeps
//! them, as it is the same one; whoever restores a snapshot or makes a clone renews them, best before
//! the guest runs: [`crate::machine::MachineConfig::renew_generation`], else with
//! [`crate::machine::RunningMachine::generation`].

use vm_memory::{Bytes, GuestAddress};

use crate::boot::GENERATION_ID;
use crate::chips::events::{Event, Events, lock};
use crate::memory::Memory;
use crate::virtio::rng::fill_random;

/// Bytes of an id.
pub const ID_BYTES: usize = 16;

/// Why there is no new id.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// No random numbers.
    #[error("no random generation id")]
    Random(#[source] std::io::Error),
    /// There is no memory where it belongs.
    #[error("the generation id does not fit into memory at {GENERATION_ID:#x}")]
    Memory,
}

/// The generation of a machine, for whoever restores it.
#[derive(Clone)]
pub struct Generation {
    memory: Memory,
    events: Events,
}

/// Puts a fresh id into the memory of a machine that boots.
///
/// # Errors
/// [`GenerationError`].
pub fn install(memory: &Memory) -> Result<(), GenerationError> {
    let mut id = [0; ID_BYTES];
    fill_random(&mut id).map_err(GenerationError::Random)?;
    memory.write_slice(&id, GuestAddress(GENERATION_ID)).map_err(|_| GenerationError::Memory)
}

impl Generation {
    /// Of the machine with this memory and these events.
    #[must_use]
    pub fn new(memory: Memory, events: Events) -> Self {
        Self { memory, events }
    }

    /// The id as it is in memory; the guest may have written there.
    ///
    /// # Errors
    /// [`GenerationError::Memory`].
    pub fn id(&self) -> Result<[u8; ID_BYTES], GenerationError> {
        self.memory.read_obj(GuestAddress(GENERATION_ID)).map_err(|_| GenerationError::Memory)
    }

    /// Gives the machine a new id and tells the guest, also when it runs already.
    ///
    /// # Errors
    /// [`GenerationError`]; then nothing has changed.
    pub fn renew(&self) -> Result<(), GenerationError> {
        install(&self.memory)?;
        lock(&self.events).raise(Event::Generation);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Generation, install};
    use crate::boot::{GENERATION_ID, RangeKind, memory_map};
    use crate::chips::events::{Event, EventRegister, lock};
    use crate::irq::InterruptSink;
    use crate::memory::GuestRam;
    use std::sync::{Arc, Mutex};

    struct Deaf;

    impl InterruptSink for Deaf {
        fn set_line(&self, _gsi: u32, _level: bool) {}
        fn signal_msi(&self, _address: u64, _data: u32) {}
    }

    #[test]
    fn a_new_generation_is_told_of_and_written_where_writes_are_noticed() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let events = Arc::new(Mutex::new(EventRegister::new(Arc::new(Deaf))));
        let generation = Generation::new(ram.memory().clone(), Arc::clone(&events));
        assert_eq!(generation.id().unwrap(), [0; 16]);
        install(ram.memory()).unwrap();
        let first = generation.id().unwrap();
        assert_ne!(first, [0; 16]);
        assert!(!lock(&events).is_pending(Event::Generation));

        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let hook = Box::new(move |gpa, len| log.lock().unwrap().push((gpa, len)));
        assert!(ram.write_hook().set(hook).is_ok());
        generation.renew().unwrap();
        assert_ne!(generation.id().unwrap(), first);
        assert!(lock(&events).is_pending(Event::Generation));
        assert_eq!(*seen.lock().unwrap(), [(GENERATION_ID, 16)]);
    }

    #[test]
    fn the_id_is_in_memory_that_no_guest_uses() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let map = memory_map(&ram);
        let holds = |range: &&crate::boot::MapRange| {
            range.start <= GENERATION_ID && GENERATION_ID + 16 <= range.start + range.len
        };
        assert_eq!(map.iter().find(holds).unwrap().kind, RangeKind::Reserved);
        assert!(GENERATION_ID.is_multiple_of(8), "the specification wants it");
    }
}
