//! Message-signalled interrupts: the vector table, the pending bits and their masks.
//!
//! A vector that fires while it or the whole function is masked leaves a pending bit; unmasking
//! sends it. The methods return the messages to send instead of sending them, so that the caller can
//! let go of its lock first.

use serde::{Deserialize, Serialize};

/// Bytes of one table entry: address, data, vector control.
pub const ENTRY_SIZE: usize = 16;

const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u32 = 1;

/// An interrupt message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Message {
    /// Where to write.
    pub address: u64,
    /// What to write.
    pub data: u32,
}

/// The vector table and the pending bits, as they are stored; enable and mask bits are in the
/// function's configuration space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredMsix {
    /// Four double words for each vector.
    pub table: Vec<[u32; 4]>,
    /// The vectors that are pending.
    pub pending: Vec<u16>,
}

/// State of the MSI-X capability of one function.
pub struct Msix {
    table: Vec<u8>,
    pending: Vec<u8>,
    vectors: u16,
    enabled: bool,
    masked: bool,
}

impl Msix {
    /// `vectors` vectors (at most 2048), all masked, the capability disabled.
    pub fn new(vectors: u16) -> Self {
        let vectors = vectors.clamp(1, 2048);
        let mut msix = Self {
            table: vec![0; usize::from(vectors) * ENTRY_SIZE],
            pending: vec![0; usize::from(vectors).div_ceil(64) * 8],
            vectors,
            enabled: false,
            masked: false,
        };
        for entry in msix.table.chunks_exact_mut(ENTRY_SIZE) {
            entry[12] = VECTOR_MASKED as u8;
        }
        msix
    }

    /// What is stored of it.
    pub fn save(&self) -> StoredMsix {
        let word = |bytes: &[u8]| bytes.try_into().map_or(0, u32::from_le_bytes);
        let entry = |entry: &[u8]| {
            let mut words = [0; 4];
            words.iter_mut().zip(entry.chunks(4)).for_each(|(to, from)| *to = word(from));
            words
        };
        let pending = (0..self.vectors).filter(|&index| self.is_pending(usize::from(index)));
        StoredMsix {
            table: self.table.chunks(ENTRY_SIZE).map(entry).collect(),
            pending: pending.collect(),
        }
    }

    /// Puts back what was stored. Nothing is sent.
    ///
    /// # Errors
    /// It has another number of vectors.
    pub fn restore(&mut self, stored: &StoredMsix) -> Result<(), &'static str> {
        let vectors = usize::from(self.vectors);
        if stored.table.len() != vectors
            || stored.pending.iter().any(|&index| usize::from(index) >= vectors)
        {
            return Err("a device with another number of interrupt vectors");
        }
        let words = stored.table.iter().flatten();
        for (to, word) in self.table.chunks_mut(4).zip(words) {
            to.copy_from_slice(&word.to_le_bytes());
        }
        self.pending.fill(0);
        stored.pending.iter().for_each(|&index| self.set_pending(usize::from(index), true));
        Ok(())
    }

    /// How many vectors there are.
    pub fn vectors(&self) -> u16 {
        self.vectors
    }

    /// Whether software switched MSI-X on, so that the interrupt pin is not used.
    pub fn enabled(&self) -> bool {
        self.enabled
    }

    /// Body of the PCI capability (after identifier and link): table and pending bits at these
    /// offsets of BAR `bar`.
    pub fn capability(&self, bar: u8, table_offset: u32, pba_offset: u32) -> [u8; 10] {
        let mut body = [0; 10];
        body[0..2].copy_from_slice(&(self.vectors - 1).to_le_bytes());
        body[2..6].copy_from_slice(&(table_offset | u32::from(bar)).to_le_bytes());
        body[6..10].copy_from_slice(&(pba_offset | u32::from(bar)).to_le_bytes());
        body
    }

    /// Takes over the message control register; returns what became deliverable.
    pub fn set_control(&mut self, control: u16) -> Vec<Message> {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.masked = control & CONTROL_FUNCTION_MASK != 0;
        self.take_deliverable(0..usize::from(self.vectors))
    }

    /// Fires a vector: the message to send now, if any.
    pub fn fire(&mut self, vector: u16) -> Option<Message> {
        if vector >= self.vectors || !self.enabled {
            return None;
        }
        let index = usize::from(vector);
        if self.masked || self.entry_masked(index) {
            self.set_pending(index, true);
            return None;
        }
        self.message(index)
    }

    /// Reads the table; zeroes past its end.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        copy_out(&self.table, offset, data);
    }

    /// Writes the table; returns what became deliverable.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) -> Vec<Message> {
        let Ok(start) = usize::try_from(offset) else { return Vec::new() };
        let Some(target) = self.table.get_mut(start..) else { return Vec::new() };
        for (byte, new) in target.iter_mut().zip(data) {
            *byte = *new;
        }
        let first = start / ENTRY_SIZE;
        let end = start.saturating_add(data.len()).div_ceil(ENTRY_SIZE);
        self.take_deliverable(first..end.min(usize::from(self.vectors)))
    }

    /// Reads the pending bits; zeroes past their end.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        copy_out(&self.pending, offset, data);
    }

    fn take_deliverable(&mut self, entries: std::ops::Range<usize>) -> Vec<Message> {
        if !self.enabled || self.masked {
            return Vec::new();
        }
        let mut messages = Vec::new();
        for index in entries {
            if self.is_pending(index) && !self.entry_masked(index) {
                self.set_pending(index, false);
                messages.extend(self.message(index));
            }
        }
        messages
    }

    fn entry(&self, index: usize) -> Option<&[u8; ENTRY_SIZE]> {
        let start = index * ENTRY_SIZE;
        self.table.get(start..start + ENTRY_SIZE)?.try_into().ok()
    }

    fn entry_masked(&self, index: usize) -> bool {
        self.entry(index).is_none_or(|entry| u32::from(entry[12]) & VECTOR_MASKED != 0)
    }

    fn message(&self, index: usize) -> Option<Message> {
        let entry = self.entry(index)?;
        let (address, rest) = entry.split_first_chunk::<8>()?;
        let (data, _) = rest.split_first_chunk::<4>()?;
        Some(Message { address: u64::from_le_bytes(*address), data: u32::from_le_bytes(*data) })
    }

    fn is_pending(&self, index: usize) -> bool {
        self.pending.get(index / 8).is_some_and(|byte| byte & (1 << (index % 8)) != 0)
    }

    fn set_pending(&mut self, index: usize, pending: bool) {
        if let Some(byte) = self.pending.get_mut(index / 8) {
            let bit = 1 << (index % 8);
            *byte = if pending { *byte | bit } else { *byte & !bit };
        }
    }
}

fn copy_out(from: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    for (index, byte) in data.iter_mut().enumerate() {
        *byte = from.get(start.saturating_add(index)).copied().unwrap_or(0);
    }
}
