//! Address ranges and the devices behind them: one bus for ports, one for memory-mapped I/O.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use thiserror::Error;

/// A device that occupies ranges of a bus.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes at `offset` of the range that starts at `base`.
    fn read(&mut self, base: u64, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset` of the range that starts at `base`.
    fn write(&mut self, base: u64, offset: u64, data: &[u8]);
}

/// Why a range could not be inserted or removed.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or wraps around the address space.
    #[error("bus range {base:#x}+{len:#x} is empty or wraps")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device already answers somewhere in the range.
    #[error("bus range {base:#x}+{len:#x} overlaps another one")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// No range starts there.
    #[error("no bus range starts at {base:#x}")]
    NotFound {
        /// First address.
        base: u64,
    },
}

struct Range {
    len: u64,
    device: Arc<Mutex<dyn BusDevice>>,
}

/// Maps addresses to devices. Ranges may come and go while vCPUs use the bus.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Range>>,
}

impl Bus {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer for `len` bytes from `base`.
    ///
    /// # Errors
    /// The range is empty, wraps, or overlaps another.
    pub fn insert(
        &self,
        base: u64,
        len: u64,
        device: Arc<Mutex<dyn BusDevice>>,
    ) -> Result<(), BusError> {
        let end =
            base.checked_add(len).filter(|_| len > 0).ok_or(BusError::BadRange { base, len })?;
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let before = ranges.range(..end).next_back();
        if before.is_some_and(|(start, range)| start.saturating_add(range.len) > base) {
            return Err(BusError::Overlap { base, len });
        }
        ranges.insert(base, Range { len, device });
        Ok(())
    }

    /// Removes the range that starts at `base`.
    ///
    /// # Errors
    /// No range starts there.
    pub fn remove(&self, base: u64) -> Result<(), BusError> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        ranges.remove(&base).map(drop).ok_or(BusError::NotFound { base })
    }

    /// Reads from the device at `address`; all ones where there is none.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((base, device)) => device.lock().unwrap_or_else(PoisonError::into_inner).read(
                base,
                address - base,
                data,
            ),
            None => data.fill(0xff),
        }
    }

    /// Writes to the device at `address`; dropped where there is none.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((base, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(base, address - base, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<Mutex<dyn BusDevice>>)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (base, range) = ranges.range(..=address).next_back()?;
        let last = (address - base).checked_add(len as u64)?;
        (last <= range.len).then(|| (*base, Arc::clone(&range.device)))
    }
}
