//! L2 tables: what an entry says, and a table in memory.
//!
//! ```text
//! bit 63 the cluster belongs to this table alone     bit 62 compressed
//! bits 9..56 the cluster's place in the file         bit 0  reads as zeroes (version 3)
//! compressed: bits 0..x the place, bits x..62 the number of further sectors of 512 bytes,
//!             with x = 62 - (cluster bits - 8)
//! ```

use std::io;
use std::sync::atomic::AtomicU64;

use crate::qcow2::header::Header;

/// The cluster, or the table, is referenced once only and may be written.
pub(super) const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;
/// The place in an entry of L1 or L2.
pub(super) const PLACE: u64 = 0x00ff_ffff_ffff_fe00;

/// What is damaged in an image that is in use.
pub(super) fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the image is damaged: {what}"))
}

/// Where a cluster's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mapping {
    /// In the file.
    Data { place: u64, copied: bool },
    /// Nowhere: they are zero. A place may be kept for them.
    Zero { place: Option<u64> },
    /// In the backing file, or zero without one.
    Below,
    /// In the file, compressed.
    Compressed { place: u64, bytes: u64 },
}

impl Mapping {
    /// Reads an entry.
    pub fn decode(entry: u64, header: &Header) -> io::Result<Self> {
        if entry & COMPRESSED != 0 {
            let bits = 62 - (header.cluster_bits - 8);
            let place = entry & ((1 << bits) - 1);
            let sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1;
            let bytes = sectors * 512 - (place & 511);
            if place < header.cluster_bytes() || place >= 1 << 56 {
                return Err(damaged("the place of a compressed cluster"));
            }
            return Ok(Self::Compressed { place, bytes });
        }
        let place = entry & PLACE;
        if place != 0 && !header.is_place(place, header.cluster_bytes()) {
            return Err(damaged("the place of a cluster"));
        }
        let is_zero = header.version >= 3 && entry & ZERO != 0;
        Ok(match (is_zero, place) {
            (true, 0) => Self::Zero { place: None },
            // A place that others use, too, is of no use.
            (true, place) => Self::Zero { place: Some(place) },
            (false, 0) => Self::Below,
            (false, place) => Self::Data { place, copied: entry & COPIED != 0 },
        })
    }

    /// Whether it goes on where the other one, `bytes` before, began.
    pub fn follows(self, first: Self, bytes: u64) -> bool {
        match (first, self) {
            (Self::Data { place: a, copied: c }, Self::Data { place: b, copied: d }) => {
                a.checked_add(bytes) == Some(b) && c == d
            }
            (Self::Zero { .. }, Self::Zero { .. }) | (Self::Below, Self::Below) => true,
            _ => false,
        }
    }
}

/// An entry for a cluster in the file.
pub(super) fn entry_of_data(place: u64) -> u64 {
    place | COPIED
}

/// An entry for zeroes.
pub(super) fn entry_of_zero(place: Option<u64>) -> u64 {
    place.map_or(ZERO, |place| place | COPIED | ZERO)
}

/// A range of entries, or bytes, that is not in the file yet.
#[derive(Clone, Debug, Default)]
pub(super) struct Dirty(Option<(usize, usize)>);

impl Dirty {
    pub fn mark(&mut self, at: usize) {
        let (low, high) = self.0.unwrap_or((at, at));
        self.0 = Some((low.min(at), high.max(at)));
    }

    pub fn is_clean(&self) -> bool {
        self.0.is_none()
    }

    pub fn clear(&mut self) {
        self.0 = None;
    }

    /// The sectors around it, in bytes, for items of so many bytes.
    pub fn sectors(&self, item_bytes: usize) -> Option<std::ops::Range<usize>> {
        let (low, high) = self.0?;
        Some(low * item_bytes / 512 * 512..((high + 1) * item_bytes).next_multiple_of(512))
    }
}

/// An L2 table in memory.
#[derive(Debug)]
pub(super) struct Table {
    /// As in the file, in this host's order of bytes.
    pub entries: Vec<u64>,
    /// Where it is.
    pub place: u64,
    /// What was changed.
    pub dirty: Dirty,
    /// Nothing in the file refers to it yet.
    pub fresh: bool,
    /// When it was used last.
    pub used: AtomicU64,
}

impl Table {
    pub fn get(&self, index: usize) -> io::Result<u64> {
        self.entries.get(index).copied().ok_or_else(|| damaged("an index of a table"))
    }

    pub fn set(&mut self, index: usize, entry: u64) {
        if let Some(slot) = self.entries.get_mut(index)
            && *slot != entry
        {
            *slot = entry;
            self.dirty.mark(index);
        }
    }
}

/// Numbers as they are in the file.
pub(super) fn to_bytes(numbers: &[u64]) -> Vec<u8> {
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}

/// Numbers of a part of the file.
pub(super) fn to_numbers(bytes: &[u8]) -> Vec<u64> {
    bytes.as_chunks::<8>().0.iter().map(|raw| u64::from_be_bytes(*raw)).collect()
}
