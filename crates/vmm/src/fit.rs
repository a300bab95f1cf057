//! Whether a machine that was stored can go on on this host, found out without starting anything.

use std::path::Path;

use crate::state::{MachineState, StateError};
use crate::vcpu::probe::{Accel, AccelChoice, probe};

/// What it would go on with.
#[derive(Clone, Copy, Debug)]
pub struct Fit {
    /// Which processor.
    pub accel: AccelChoice,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory_bytes: u64,
}

impl Fit {
    /// Looks at what is stored in a directory.
    ///
    /// # Errors
    /// [`StateError`] says why it cannot go on.
    pub fn check(self, directory: &Path) -> Result<(), StateError> {
        let accel = match self.accel {
            AccelChoice::Auto => probe().chosen,
            AccelChoice::Translate => Accel::Translate,
            AccelChoice::Kvm => Accel::Kvm,
        };
        if accel != Accel::Translate {
            return Err(StateError::Unfit(
                "only the translator can go on with it; try --accel translate".into(),
            ));
        }
        let state = MachineState::read(directory)?;
        let (cpus, bytes) = (state.cpus.len(), state.memory_bytes);
        if cpus != self.cpus as usize || bytes != self.memory_bytes {
            return Err(StateError::Unfit(format!(
                "it has {cpus} processors and {bytes} bytes of memory, and the machine {} and {}",
                self.cpus, self.memory_bytes
            )));
        }
        state.check_processor(&berth_translator::host_cpuid())
    }
}
