//! Frozen pages that have been read, and reading them ahead.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use super::{PAGE, Ram};
use crate::ahead::append;
use crate::sys;

/// Bytes of an entry of `/proc/self/pagemap`, and in it: the page is mapped (Linux,
/// Documentation/admin-guide/mm/pagemap.rst).
const ENTRY: usize = 8;
const PRESENT: u64 = 1 << 63;
/// Entries that are read at once.
const ENTRIES: usize = 8 << 10;

impl Ram {
    /// Maps frozen pages of ranges of page numbers, and reads them from the disk before. So many were
    /// asked for, which are no more than there are.
    pub fn prefetch(&self, ranges: impl Iterator<Item = Range<u64>>) -> u64 {
        let pages = self.span / PAGE;
        let is_frozen = |page: u64| self.contains(page * PAGE, PAGE) && self.is_frozen(page * PAGE);
        let (mut looked, mut asked) = (0, 0);
        for range in ranges {
            let (mut page, end) = (range.start, range.end.min(pages));
            while page < end && looked < pages {
                let count = (page..end).take_while(|&page| is_frozen(page)).count() as u64;
                if count != 0 {
                    // Whatever is not done is done when the guest reads it.
                    let _ = sys::populate(self.ro_addr(page * PAGE), (count * PAGE) as usize);
                }
                asked += count;
                looked += count.max(1);
                page += count.max(1);
            }
        }
        asked
    }

    /// Numbers of frozen pages that have been read, and of some beside them. `pagemap` is
    /// `/proc/self/pagemap`.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn touched(&self, pagemap: &File) -> io::Result<Vec<Range<u64>>> {
        let mut found = Vec::new();
        let mut entries = vec![0; ENTRIES * ENTRY];
        for slot in &self.slots {
            let all = slot.gpa / PAGE..(slot.gpa + slot.size) / PAGE;
            for first in all.clone().step_by(ENTRIES) {
                let count = (all.end - first).min(ENTRIES as u64) as usize;
                let part = entries.get_mut(..count * ENTRY).unwrap_or_default();
                let at = self.ro_addr(first * PAGE) / PAGE * ENTRY as u64;
                pagemap.read_exact_at(part, at)?;
                let (entries, _) = part.as_chunks::<ENTRY>();
                for (page, entry) in (first..).zip(entries) {
                    if u64::from_le_bytes(*entry) & PRESENT != 0 && self.is_frozen(page * PAGE) {
                        append(&mut found, page);
                    }
                }
            }
        }
        Ok(found)
    }
}
