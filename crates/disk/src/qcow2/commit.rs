//! Writing changed tables to the file, so that a crash at any point leaves a consistent image.
//!
//! Between flushes the file's tables do not change, and only clusters are written that the file does
//! not refer to, or that were there already. A flush has three steps; in each, any part of it may be
//! lost or come before another:
//!
//! ```text
//! 1  new blocks of counts, a moved table of counts     nothing refers to them yet
//!    ── wait for the disk ──
//! 2  counts that went up, the table of counts, its     too high a count is a leak, not damage; nothing
//!    place in the header, new L2 tables                refers to the L2 tables yet
//!    ── wait for the disk ──
//! 3  entries of L2 tables and of the L1 table          each is the old or the new one; both are
//!    ── wait for the disk ──                           counted, and their clusters are in the file
//! ```
//!
//! Then the clusters that were given up lose their counts in memory, which is step 2 of the next flush.

use std::io;

use crate::qcow2::header::{REFTABLE_AT, SIZE_AT};
use crate::qcow2::image::{Image, State};
use crate::qcow2::refcounts::Counts;
use crate::qcow2::table::{damaged, to_bytes};
use crate::storage::Storage;

impl State {
    pub(super) fn is_dirty(&self) -> bool {
        let counts = self.counts.as_ref().is_some_and(|counts| {
            !counts.freed.is_empty()
                || counts.dirty_blocks() > 0
                || !counts.table_dirty.is_empty()
                || counts.moved_from.is_some()
        });
        counts || self.has_dirty_tables()
    }

    fn has_dirty_tables(&self) -> bool {
        !self.l1_dirty.is_empty()
            || self.tables.values().any(|table| table.fresh || !table.dirty.is_clean())
    }
}

impl Image {
    /// Writes all that was changed.
    pub(super) fn commit(&self, state: &mut State) -> io::Result<()> {
        if state.broken {
            return Err(io::Error::other("an earlier flush failed"));
        }
        let counts = state.counts()?;
        let storage = &*self.storage;
        if write_new_counts(storage, counts)? {
            self.wait(state)?;
        }
        let counts = state.counts()?;
        write_counts(storage, counts)?;
        for table in state.tables.values().filter(|table| table.fresh) {
            storage.write_at(&to_bytes(&table.entries), table.place)?;
        }
        self.wait(state)?;
        if state.has_dirty_tables() {
            self.write_tables(state)?;
            self.wait(state)?;
        }
        for table in state.tables.values_mut() {
            table.fresh = false;
            table.dirty.clear();
        }
        state.l1_dirty.clear();
        let counts = state.counts()?;
        for block in counts.blocks.values_mut() {
            block.fresh = false;
            block.dirty.clear();
        }
        counts.table_dirty.clear();
        if let Some((place, clusters)) = counts.moved_from.take() {
            counts.free_run(place, clusters);
        }
        counts.apply_freed(storage)
    }

    /// Writes counts that went down, for which nothing has to be waited: one that is lost is a leak.
    /// Says whether that was all there is to be written; otherwise nothing was.
    pub(super) fn hand_over_counts(&self, state: &mut State) -> io::Result<bool> {
        if state.broken || state.has_dirty_tables() {
            return Ok(false);
        }
        let counts = state.counts()?;
        let is_new = counts.moved_from.is_some() || !counts.table_dirty.is_empty();
        if is_new || counts.blocks.values().any(|block| block.fresh) {
            return Ok(false);
        }
        counts.apply_freed(&*self.storage)?;
        write_counts(&*self.storage, counts)?;
        counts.blocks.values_mut().for_each(|block| block.dirty.clear());
        Ok(true)
    }

    /// After a failure the kernel forgets what it could not write.
    fn wait(&self, state: &mut State) -> io::Result<()> {
        self.storage.sync().inspect_err(|_| state.broken = true)
    }

    fn write_tables(&self, state: &State) -> io::Result<()> {
        for table in state.tables.values().filter(|table| !table.fresh) {
            let Some(range) = table.dirty.sectors(8) else { continue };
            let entries = table.entries.get(range.start / 8..range.end / 8).unwrap_or_default();
            self.storage.write_at(&to_bytes(entries), table.place + range.start as u64)?;
        }
        for index in &state.l1_dirty {
            let entry = state.l1.get(*index).copied().unwrap_or_default();
            let at = self.header.l1_offset + *index as u64 * 8;
            self.storage.write_at(&entry.to_be_bytes(), at)?;
        }
        Ok(())
    }

    /// Makes the disk larger or smaller. What comes into sight reads as zeroes.
    ///
    /// # Errors
    /// The size is impossible, or the file cannot be written.
    pub fn resize(&mut self, size: u64) -> io::Result<()> {
        let old = self.header.size;
        if size < old {
            self.write_zeroes(size, old - size, true)?;
        }
        self.flush()?;
        let needed = self.header.l1_needed(size);
        if needed * 8 > crate::limits::L1_BYTES_MAX {
            let text = "a disk of clusters of this size cannot be so large";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        let mut state = self.state.write().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut given_up = None;
        let mut header = self.header.clone();
        header.size = size;
        if needed > u64::from(header.l1_entries) {
            let bytes = (needed * 8).next_multiple_of(header.cluster_bytes());
            let clusters = bytes / header.cluster_bytes();
            let place = state.counts()?.allocate_run(&*self.storage, clusters)?;
            let mut l1 = state.l1.clone();
            l1.resize((bytes / 8) as usize, 0);
            self.storage.write_at(&to_bytes(&l1), place)?;
            // Its counts, and with them the table itself, before the header refers to it.
            self.commit(&mut state)?;
            let old_bytes = u64::from(header.l1_entries) * 8;
            given_up = Some((header.l1_offset, old_bytes.div_ceil(header.cluster_bytes())));
            header.l1_entries = u32::try_from(needed).map_err(io::Error::other)?;
            header.l1_offset = place;
            l1.truncate(needed as usize);
            state.l1 = l1;
        }
        let mut raw = Vec::new();
        raw.extend(header.size.to_be_bytes());
        raw.extend(0u32.to_be_bytes());
        raw.extend(header.l1_entries.to_be_bytes());
        raw.extend(header.l1_offset.to_be_bytes());
        self.storage.write_at(&raw, SIZE_AT)?;
        self.wait(&mut state)?;
        if let Some((place, clusters)) = given_up {
            state.counts()?.free_run(place, clusters);
        }
        drop(state);
        self.header = header;
        if size > old {
            self.hide(old, size)?;
        }
        self.flush()
    }

    /// Makes zero what was behind the end: the rest of the last cluster, and what is below.
    fn hide(&self, old: u64, size: u64) -> io::Result<()> {
        let below = self.backing().map_or(0, crate::chain::Layer::size);
        let rest = old.next_multiple_of(self.header.cluster_bytes());
        let end = below.max(rest).min(size);
        if end > old { self.write_zeroes(old, end - old, true) } else { Ok(()) }
    }
}

/// What nothing in the file refers to yet; says whether there was any.
fn write_new_counts(storage: &dyn Storage, counts: &Counts) -> io::Result<bool> {
    let mut any = false;
    for block in counts.blocks.values().filter(|block| block.fresh) {
        storage.write_at(&block.bytes, block.place)?;
        any = true;
    }
    if counts.moved_from.is_some() {
        storage.write_at(&to_bytes(&counts.table), counts.table_place)?;
        any = true;
    }
    Ok(any)
}

fn write_counts(storage: &dyn Storage, counts: &Counts) -> io::Result<()> {
    for block in counts.blocks.values().filter(|block| !block.fresh) {
        let Some(range) = block.dirty.sectors(1) else { continue };
        let bytes = block.bytes.get(range.clone()).unwrap_or_default();
        storage.write_at(bytes, block.place + range.start as u64)?;
    }
    if counts.moved_from.is_some() {
        let clusters = u32::try_from(counts.table_clusters()).map_err(io::Error::other)?;
        let mut raw = counts.table_place.to_be_bytes().to_vec();
        raw.extend(clusters.to_be_bytes());
        return storage.write_at(&raw, REFTABLE_AT);
    }
    for index in &counts.table_dirty {
        let place = counts.table.get(*index).copied().ok_or_else(|| damaged("table of counts"))?;
        storage.write_at(&place.to_be_bytes(), counts.table_place + *index as u64 * 8)?;
    }
    Ok(())
}
