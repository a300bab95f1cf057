//! The debug-exit port: a write ends the machine with the byte written.

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::outcome::{Ending, Outcome};

/// Its port.
pub const PORT: u64 = 0xf4;
/// Ports it takes; only the first does something.
pub const LEN: u64 = 4;

/// The device.
pub struct DebugExit(Arc<Ending>);

impl DebugExit {
    /// Ends the machine through `ending`.
    #[must_use]
    pub fn new(ending: Arc<Ending>) -> Self {
        Self(ending)
    }
}

impl BusDevice for DebugExit {
    fn read(&mut self, _base: u64, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        if offset != 0 {
            return;
        }
        self.0.end(Outcome::DebugExit(data.first().copied().unwrap_or(0)));
    }
}
