//! Address ranges and the devices behind them: one [`Bus`] for memory-mapped I/O, one for ports.
//!
//! A device is locked for the time of one access. The map itself is locked only for the look-up, so a
//! device may change the map (PCI moves its BARs) while it handles an access.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

/// A device reached by addresses.
pub trait BusDevice: Send {
    /// Reads `data.len()` bytes at `base + offset`, where `base` is the start of the range.
    fn read(&mut self, base: u64, offset: u64, data: &mut [u8]);
    /// Writes `data` at `base + offset`, where `base` is the start of the range.
    fn write(&mut self, base: u64, offset: u64, data: &[u8]);
}

/// A device as buses hold it.
pub type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// Why a range could not be put on a bus.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BusError {
    /// The range is empty or passes the end of the address space.
    #[error("the bus range at {base:#x} of {len:#x} bytes is empty or too long")]
    BadRange {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
    },
    /// Another device is there already.
    #[error("the bus range at {base:#x} of {len:#x} bytes overlaps a device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Bytes.
        len: u64,
        /// First address of the range in the way.
        other: u64,
    },
    /// No range begins there.
    #[error("no device has a bus range beginning at {base:#x}")]
    NotFound {
        /// The address asked for.
        base: u64,
    },
}

struct Range {
    len: u64,
    device: SharedDevice,
}

/// Ranges of addresses, each with its device. Reads that no device answers give ones.
#[derive(Default)]
pub struct Bus {
    ranges: RwLock<BTreeMap<u64, Range>>,
}

impl Bus {
    /// An empty bus.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts a device at `[base, base + len)`.
    ///
    /// # Errors
    /// [`BusError::BadRange`] or [`BusError::Overlap`].
    pub fn insert(&self, base: u64, len: u64, device: SharedDevice) -> Result<(), BusError> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        check_free(&ranges, base, len)?;
        ranges.insert(base, Range { len, device });
        Ok(())
    }

    /// Takes away the range that begins at `base` and gives its device.
    ///
    /// # Errors
    /// [`BusError::NotFound`] when no range begins there.
    pub fn remove(&self, base: u64) -> Result<SharedDevice, BusError> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        ranges.remove(&base).map(|range| range.device).ok_or(BusError::NotFound { base })
    }

    /// Moves the range that begins at `old` so that it begins at `new`. On an error nothing moved.
    ///
    /// # Errors
    /// [`BusError::NotFound`] without such a range, otherwise as [`Bus::insert`].
    pub fn relocate(&self, old: u64, new: u64) -> Result<(), BusError> {
        let mut ranges = self.ranges.write().unwrap_or_else(PoisonError::into_inner);
        let range = ranges.remove(&old).ok_or(BusError::NotFound { base: old })?;
        let free = check_free(&ranges, new, range.len);
        ranges.insert(if free.is_ok() { new } else { old }, range);
        free
    }

    /// Reads from the device at `addr`; `data` becomes ones when there is none (or the access would
    /// leave its range). Tells whether a device answered.
    pub fn read(&self, addr: u64, data: &mut [u8]) -> bool {
        let Some((base, device)) = self.find(addr, data.len()) else {
            data.fill(0xff);
            return false;
        };
        device.lock().unwrap_or_else(PoisonError::into_inner).read(base, addr - base, data);
        true
    }

    /// Writes to the device at `addr`. Tells whether there was one.
    pub fn write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((base, device)) = self.find(addr, data.len()) else { return false };
        device.lock().unwrap_or_else(PoisonError::into_inner).write(base, addr - base, data);
        true
    }

    fn find(&self, addr: u64, len: usize) -> Option<(u64, SharedDevice)> {
        let ranges = self.ranges.read().unwrap_or_else(PoisonError::into_inner);
        let (&base, range) = ranges.range(..=addr).next_back()?;
        let end = (addr - base).checked_add(len as u64)?;
        (end <= range.len).then(|| (base, Arc::clone(&range.device)))
    }
}

fn check_free(ranges: &BTreeMap<u64, Range>, base: u64, len: u64) -> Result<(), BusError> {
    let last = match len.checked_sub(1).and_then(|rest| base.checked_add(rest)) {
        Some(last) => last,
        None => return Err(BusError::BadRange { base, len }),
    };
    if let Some((&other, range)) = ranges.range(..=last).next_back()
        && (other >= base || base - other < range.len)
    {
        return Err(BusError::Overlap { base, len, other });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{Bus, BusDevice, BusError};
    use std::sync::{Arc, Mutex};

    struct Echo(Vec<(u64, u64, Vec<u8>)>);

    impl BusDevice for Echo {
        fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&mut self, base: u64, offset: u64, data: &[u8]) {
            self.0.push((base, offset, data.to_vec()));
        }
    }

    #[test]
    fn accesses_reach_the_device_of_the_range() {
        let bus = Bus::new();
        let device = Arc::new(Mutex::new(Echo(Vec::new())));
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x103, &mut data));
        assert_eq!(data, [3, 3]);
        assert!(!bus.read(0x10f, &mut data), "crosses the end");
        assert_eq!(data, [0xff, 0xff]);
        assert!(!bus.read(0xff, &mut data));
        assert!(bus.write(0x10f, &[7]));
        assert!(!bus.write(0x110, &[7]));
        assert_eq!(device.lock().unwrap().0, [(0x100, 0xf, vec![7])]);
    }

    #[test]
    fn ranges_do_not_overlap() {
        let bus = Bus::new();
        let device = Arc::new(Mutex::new(Echo(Vec::new())));
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        for (base, len) in [(0x100, 1), (0x10f, 1), (0xf0, 0x11), (0xf0, 0x1000)] {
            let got = bus.insert(base, len, device.clone());
            assert!(matches!(got, Err(BusError::Overlap { .. })), "{base:#x} {len:#x}");
        }
        assert!(matches!(bus.insert(0, 0, device.clone()), Err(BusError::BadRange { .. })));
        assert!(matches!(bus.insert(!0, 2, device.clone()), Err(BusError::BadRange { .. })));
        bus.insert(0xf0, 0x10, device.clone()).unwrap();
        bus.insert(0x110, 0x10, device.clone()).unwrap();
        bus.insert(!0, 1, device).unwrap();
    }

    #[test]
    fn ranges_move() {
        let bus = Bus::new();
        let device = Arc::new(Mutex::new(Echo(Vec::new())));
        bus.insert(0x100, 0x10, device.clone()).unwrap();
        bus.insert(0x200, 0x10, device).unwrap();
        assert!(bus.relocate(0x100, 0x208).is_err());
        assert!(bus.read(0x100, &mut [0]), "stayed where it was");
        bus.relocate(0x100, 0x108).unwrap();
        assert!(!bus.read(0x100, &mut [0]));
        assert!(bus.read(0x117, &mut [0]));
        assert_eq!(bus.relocate(0x100, 0x300), Err(BusError::NotFound { base: 0x100 }));
        assert!(bus.remove(0x108).is_ok());
        assert!(bus.remove(0x108).is_err());
    }
}
