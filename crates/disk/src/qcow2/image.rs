//! An open image: reads, writes, discards.
//!
//! Requests may come from several threads. What only looks at the tables (reads, and writes to
//! clusters that are there) goes on side by side; what changes them is alone. So a cluster cannot be
//! given to something else while it is read or written.
//!
//! Changes of tables stay in memory until a flush, or until there are too many, and then go to the
//! file in the order of `commit`. Until then the file is as it was, with more bytes in clusters that
//! it does not refer to.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::chain::Layer;
use crate::limits::{CACHED_MIN, FREED_MAX, TABLES_BYTES_MAX};
use crate::qcow2::header::{AUTOCLEAR_AT, Header, HeaderError};
use crate::qcow2::refcounts::Counts;
use crate::qcow2::table::{
    COPIED, Dirty, Mapping, PLACE, Table, damaged, entry_of_data, entry_of_zero, to_numbers,
};
use crate::storage::{Storage, read_exact, read_padded};

/// An open image.
#[derive(Debug)]
pub struct Image {
    pub(super) header: Header,
    pub(super) storage: Box<dyn Storage>,
    writable: AtomicBool,
    backing: Option<Box<Layer>>,
    pub(super) state: RwLock<State>,
    clock: AtomicU64,
}

/// The tables in memory.
#[derive(Debug)]
pub(super) struct State {
    pub l1: Vec<u64>,
    pub l1_dirty: BTreeSet<usize>,
    pub tables: HashMap<usize, Table>,
    /// Only of images that are open for writing.
    pub counts: Option<Counts>,
    /// Waiting for the disk failed: what the file holds is not known any more.
    pub broken: bool,
}

impl State {
    pub fn counts(&mut self) -> io::Result<&mut Counts> {
        self.counts.as_mut().ok_or_else(|| io::ErrorKind::ReadOnlyFilesystem.into())
    }
}

impl Image {
    /// Opens an image; what is below it is given, since its name in the header may not be trusted.
    ///
    /// # Errors
    /// It is damaged, needs what is not supported, or is not fit for writing.
    pub fn open(
        storage: Box<dyn Storage>,
        writable: bool,
        backing: Option<Box<Layer>>,
    ) -> Result<Self, HeaderError> {
        let header = Header::read(&*storage)?;
        let mut raw = vec![0; header.l1_entries as usize * 8];
        read_exact(&*storage, &mut raw, header.l1_offset).map_err(HeaderError::Read)?;
        let mut counts = None;
        if writable {
            if header.dirty {
                return Err(HeaderError::Dirty);
            }
            if header.corrupt {
                return Err(HeaderError::Corrupt);
            }
            if header.snapshots > 0 {
                return Err(HeaderError::Unsupported("internal snapshots".into()));
            }
            if header.autoclear != 0 {
                // They promise what a writer that does not know them does not keep.
                storage.write_at(&[0; 8], AUTOCLEAR_AT).map_err(HeaderError::Write)?;
                storage.sync().map_err(HeaderError::Write)?;
            }
            counts = Some(Counts::read(&*storage, &header).map_err(HeaderError::Read)?);
        }
        let state = State {
            l1: to_numbers(&raw),
            l1_dirty: BTreeSet::new(),
            tables: HashMap::new(),
            counts,
            broken: false,
        };
        let state = RwLock::new(state);
        let writable = AtomicBool::new(writable);
        Ok(Self { header, storage, writable, backing, state, clock: AtomicU64::new(0) })
    }

    /// What the header says.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Bytes of the disk as the guest sees it.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.header.size
    }

    /// Whether it may be written.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.writable.load(Ordering::SeqCst)
    }

    /// What is below it.
    #[must_use]
    pub fn backing(&self) -> Option<&Layer> {
        self.backing.as_deref()
    }

    fn shared(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn alone(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_range(&self, offset: u64, len: u64) -> io::Result<()> {
        match offset.checked_add(len) {
            Some(end) if end <= self.header.size => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "outside of the disk")),
        }
    }

    /// Indexes in L1 and L2, and the offset in the cluster.
    fn split(&self, offset: u64) -> (usize, usize, u64) {
        let cluster = offset >> self.header.cluster_bits;
        let (l1, l2) = (cluster / self.header.l2_entries(), cluster % self.header.l2_entries());
        (l1 as usize, l2 as usize, offset & (self.header.cluster_bytes() - 1))
    }

    /// Bytes to the end of the cluster.
    fn left_in_cluster(&self, offset: u64) -> u64 {
        self.header.cluster_bytes() - (offset & (self.header.cluster_bytes() - 1))
    }

    /// Where the bytes at an offset are, and how many of `len` are there in a row. None: the table is
    /// not in memory.
    fn look_up(&self, state: &State, offset: u64, len: u64) -> io::Result<Option<(Mapping, u64)>> {
        let (l1, mut l2, inside) = self.split(offset);
        let entry = *state.l1.get(l1).ok_or_else(|| damaged("its L1 table is too short"))?;
        let in_table = (self.header.l2_entries() - l2 as u64) * self.header.cluster_bytes();
        let len = len.min(in_table - inside);
        let Some(table) = state.tables.get(&l1) else {
            return Ok((entry & PLACE == 0).then_some((Mapping::Below, len)));
        };
        table.used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        let first = Mapping::decode(table.get(l2)?, &self.header)?;
        let mut run = self.left_in_cluster(offset);
        while run < len {
            l2 += 1;
            let next = Mapping::decode(table.get(l2)?, &self.header)?;
            if !next.follows(first, run + inside) {
                break;
            }
            run += self.header.cluster_bytes();
        }
        Ok(Some((first, run.min(len))))
    }

    /// Gets a table into memory.
    fn load(&self, state: &mut State, l1: usize) -> io::Result<()> {
        if state.tables.contains_key(&l1) {
            return Ok(());
        }
        let entry = *state.l1.get(l1).ok_or_else(|| damaged("its L1 table is too short"))?;
        if entry & PLACE == 0 {
            return Ok(());
        }
        let bytes = self.header.cluster_bytes();
        if !self.header.is_place(entry & PLACE, bytes) {
            return Err(damaged("the place of an L2 table"));
        }
        self.make_room(state)?;
        let mut raw = vec![0; bytes as usize];
        read_exact(&*self.storage, &mut raw, entry & PLACE)?;
        let table = Table {
            entries: to_numbers(&raw),
            place: entry & PLACE,
            dirty: Dirty::default(),
            fresh: false,
            used: AtomicU64::new(self.clock.fetch_add(1, Ordering::Relaxed)),
        };
        state.tables.insert(l1, table);
        Ok(())
    }

    /// Keeps what is in memory within its limits; nothing may be half done.
    fn make_room(&self, state: &mut State) -> io::Result<()> {
        if let Some(counts) = &state.counts
            && (counts.freed.len() >= FREED_MAX || counts.dirty_blocks() >= counts.blocks_max())
        {
            self.commit(state)?;
        }
        let limit = ((TABLES_BYTES_MAX >> self.header.cluster_bits) as usize).max(CACHED_MIN);
        while state.tables.len() >= limit {
            let clean = state.tables.iter().filter(|(_, table)| table.dirty.is_clean());
            let clean = clean.filter(|(_, table)| !table.fresh);
            let oldest = clean.min_by_key(|(_, table)| table.used.load(Ordering::Relaxed));
            match oldest.map(|(l1, _)| *l1) {
                Some(l1) => drop(state.tables.remove(&l1)),
                None => self.commit(state)?,
            }
        }
        Ok(())
    }

    /// Reads a range of the disk.
    ///
    /// # Errors
    /// It is outside, the image is damaged there, or the file cannot be read.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.check_range(offset, buffer.len() as u64)?;
        let (mut at, mut rest) = (offset, buffer);
        while !rest.is_empty() {
            let state = self.shared();
            let Some((mapping, run)) = self.look_up(&state, at, rest.len() as u64)? else {
                drop(state);
                let (l1, _, _) = self.split(at);
                self.load(&mut self.alone(), l1)?;
                continue;
            };
            let (part, more) = rest.split_at_mut(run as usize);
            self.read_mapped(mapping, at, part)?;
            (at, rest) = (at + run, more);
        }
        Ok(())
    }

    /// Reads bytes that are mapped alike; compressed ones are in one cluster.
    fn read_mapped(&self, mapping: Mapping, at: u64, part: &mut [u8]) -> io::Result<()> {
        let (_, _, inside) = self.split(at);
        match mapping {
            Mapping::Data { place, .. } => read_padded(&*self.storage, part, place + inside),
            Mapping::Zero { .. } => {
                part.fill(0);
                Ok(())
            }
            Mapping::Below => match &self.backing {
                Some(layer) => layer.read_padded(at, part),
                None => {
                    part.fill(0);
                    Ok(())
                }
            },
            Mapping::Compressed { place, bytes } => {
                let cluster = self.inflate(place, bytes)?;
                let found = cluster.get(inside as usize..).and_then(|rest| rest.get(..part.len()));
                part.copy_from_slice(found.ok_or_else(|| damaged("a compressed cluster"))?);
                Ok(())
            }
        }
    }

    fn inflate(&self, place: u64, bytes: u64) -> io::Result<Vec<u8>> {
        use miniz_oxide::inflate::core::{DecompressorOxide, decompress, inflate_flags};
        let mut packed = vec![0; bytes as usize];
        // The last sector may be incomplete at the end of the file.
        read_padded(&*self.storage, &mut packed, place)?;
        let mut cluster = vec![0; self.header.cluster_bytes() as usize];
        let flags = inflate_flags::TINFL_FLAG_USING_NON_WRAPPING_OUTPUT_BUF;
        let (_, _, count) =
            decompress(&mut DecompressorOxide::new(), &packed, &mut cluster, 0, flags);
        if count == cluster.len() { Ok(cluster) } else { Err(damaged("a compressed cluster")) }
    }

    /// Writes a range of the disk. It is safe after the next flush.
    ///
    /// # Errors
    /// It is outside, the image is damaged there or read-only, or the file cannot be written.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.check_range(offset, bytes.len() as u64)?;
        self.check_writable()?;
        let (mut at, mut rest) = (offset, bytes);
        while !rest.is_empty() {
            let state = self.shared();
            if let Some((Mapping::Data { place, copied: true }, run)) =
                self.look_up(&state, at, rest.len() as u64)?
            {
                let (_, _, inside) = self.split(at);
                let (part, more) = rest.split_at(run as usize);
                self.storage.write_at(part, place + inside)?;
                (at, rest) = (at + run, more);
                continue;
            }
            drop(state);
            let mut state = self.alone();
            let count = self.left_in_cluster(at).min(rest.len() as u64);
            let (part, more) = rest.split_at(count as usize);
            self.write_cluster(&mut state, at, part)?;
            (at, rest) = (at + count, more);
        }
        Ok(())
    }

    fn check_writable(&self) -> io::Result<()> {
        if self.is_writable() { Ok(()) } else { Err(io::ErrorKind::ReadOnlyFilesystem.into()) }
    }

    /// The table for an offset, made if there is none. Nothing else may be half done.
    fn table<'a>(&self, state: &'a mut State, l1: usize) -> io::Result<&'a mut Table> {
        self.load(state, l1)?;
        let entry =
            state.l1.get(l1).copied().ok_or_else(|| damaged("its L1 table is too short"))?;
        let found = state.tables.contains_key(&l1);
        if !found || (entry & COPIED == 0 && !self.is_fresh(state, l1)) {
            if !found {
                self.make_room(state)?;
            }
            let place = state.counts()?.allocate(&*self.storage)?;
            let old = state.tables.remove(&l1);
            if let Some(old) = &old {
                state.counts()?.free(old.place);
            }
            let entries = self.header.l2_entries() as usize;
            let table = Table {
                entries: old.map_or_else(|| vec![0; entries], |old| old.entries),
                place,
                dirty: Dirty::default(),
                fresh: true,
                used: AtomicU64::new(self.clock.fetch_add(1, Ordering::Relaxed)),
            };
            state.tables.insert(l1, table);
            if let Some(slot) = state.l1.get_mut(l1) {
                *slot = place | COPIED;
                state.l1_dirty.insert(l1);
            }
        }
        state.tables.get_mut(&l1).ok_or_else(|| damaged("an L2 table"))
    }

    fn is_fresh(&self, state: &State, l1: usize) -> bool {
        state.tables.get(&l1).is_some_and(|table| table.fresh)
    }

    /// Writes into one cluster whatever it is mapped to.
    fn write_cluster(&self, state: &mut State, at: u64, part: &[u8]) -> io::Result<()> {
        let (l1, l2, inside) = self.split(at);
        self.make_room(state)?;
        let entry = self.table(state, l1)?.get(l2)?;
        let mapping = Mapping::decode(entry, &self.header)?;
        let (place, is_new) = match mapping {
            // Another thread may have been faster.
            Mapping::Data { place, copied: true } => {
                return self.storage.write_at(part, place + inside);
            }
            Mapping::Zero { place: Some(place) } if entry & COPIED != 0 => (place, false),
            _ => (state.counts()?.allocate(&*self.storage)?, true),
        };
        if let Err(error) = self.fill(mapping, at - inside, place, inside, part) {
            if is_new {
                state.counts()?.free(place);
            }
            return Err(error);
        }
        self.table(state, l1)?.set(l2, entry_of_data(place));
        if is_new {
            self.forget(state, mapping)?;
        }
        Ok(())
    }

    /// Writes a whole cluster: what is there with a part of it replaced.
    fn fill(
        &self,
        old: Mapping,
        cluster_at: u64,
        place: u64,
        inside: u64,
        part: &[u8],
    ) -> io::Result<()> {
        if part.len() as u64 == self.header.cluster_bytes() {
            return self.storage.write_at(part, place);
        }
        let mut whole = vec![0; self.header.cluster_bytes() as usize];
        self.read_mapped(old, cluster_at, &mut whole)?;
        let target = whole.get_mut(inside as usize..).and_then(|rest| rest.get_mut(..part.len()));
        target.ok_or_else(|| damaged("an offset in a cluster"))?.copy_from_slice(part);
        self.storage.write_at(&whole, place)
    }

    /// Gives up the clusters that were mapped.
    fn forget(&self, state: &mut State, mapping: Mapping) -> io::Result<()> {
        let counts = state.counts()?;
        match mapping {
            Mapping::Data { place, .. } | Mapping::Zero { place: Some(place) } => {
                counts.free(place);
            }
            Mapping::Compressed { place, bytes } => {
                let cluster = self.header.cluster_bytes();
                let first = place / cluster;
                let last = (place + bytes - 1) / cluster;
                counts.free_run(first * cluster, last - first + 1);
            }
            Mapping::Below | Mapping::Zero { place: None } => {}
        }
        Ok(())
    }

    /// Makes a range read as zeroes; with `unmap` its space is given back where whole clusters are.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check_range(offset, len)?;
        self.check_writable()?;
        let end = offset + len;
        let mut at = offset;
        while at < end {
            let left = self.left_in_cluster(at);
            let whole = left == self.header.cluster_bytes()
                && (at + left <= end || end == self.header.size);
            let count = left.min(end - at);
            if whole {
                self.zero_cluster(&mut self.alone(), at, unmap)?;
            } else {
                self.zero_part(at, count)?;
            }
            at += count;
        }
        Ok(())
    }

    /// Gives a range back: its whole clusters read as zeroes then, the rest is left as it is.
    ///
    /// # Errors
    /// As [`Image::write`].
    pub fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check_range(offset, len)?;
        self.check_writable()?;
        let bytes = self.header.cluster_bytes();
        let mut end = offset + len;
        if end < self.header.size {
            end = end / bytes * bytes;
        }
        let mut at = offset.next_multiple_of(bytes);
        while at < end {
            self.zero_cluster(&mut self.alone(), at, true)?;
            at += bytes;
        }
        Ok(())
    }

    fn zero_part(&self, at: u64, count: u64) -> io::Result<()> {
        let mut old = vec![0; count as usize];
        self.read(at, &mut old)?;
        if old.iter().all(|byte| *byte == 0) {
            return Ok(());
        }
        old.fill(0);
        self.write(at, &old)
    }

    fn zero_cluster(&self, state: &mut State, at: u64, unmap: bool) -> io::Result<()> {
        let (l1, l2, _) = self.split(at);
        self.make_room(state)?;
        self.load(state, l1)?;
        if !state.tables.contains_key(&l1) && self.backing.is_none() {
            return Ok(());
        }
        let mapping = Mapping::decode(self.table(state, l1)?.get(l2)?, &self.header)?;
        let has_flag = self.header.version >= 3;
        let entry = match mapping {
            Mapping::Zero { place: None } => return Ok(()),
            Mapping::Below if self.backing.is_none() => return Ok(()),
            Mapping::Zero { place: Some(_) } if !unmap => return Ok(()),
            Mapping::Data { place, copied: true } if !unmap && has_flag => {
                self.table(state, l1)?.set(l2, entry_of_zero(Some(place)));
                return Ok(());
            }
            _ if has_flag => entry_of_zero(None),
            _ if self.backing.is_none() => 0,
            // Version 2 cannot say that something below is hidden.
            _ => {
                let zeroes = vec![0; self.header.cluster_bytes() as usize];
                return self.write_cluster(state, at, &zeroes);
            }
        };
        self.table(state, l1)?.set(l2, entry);
        self.forget(state, mapping)
    }

    /// Writes everything out and waits until it would survive a loss of power.
    ///
    /// # Errors
    /// The file cannot be written; after a failed wait nothing is accepted any more.
    pub fn flush(&self) -> io::Result<()> {
        let state = self.shared();
        if !state.is_dirty() {
            if state.broken {
                return Err(io::Error::other("an earlier flush failed"));
            }
            // Reads go on meanwhile.
            return self.storage.sync();
        }
        drop(state);
        self.commit(&mut self.alone())
    }

    /// Writes out what a flush leaves for the next one. It can be used afterwards.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn close(&self) -> io::Result<()> {
        if !self.is_writable() || !self.shared().is_dirty() {
            return Ok(());
        }
        self.flush()?;
        // What became free with it.
        self.flush()
    }

    /// Writes everything out, and never anything again; others may read it too then.
    ///
    /// # Errors
    /// As [`Image::flush`]; then it may be tried again.
    pub fn freeze(&self) -> io::Result<()> {
        self.close()?;
        self.flush()?;
        self.seal()
    }

    /// Gets changed tables into the file. What has an order waits for the disk, nothing else does: a
    /// flush is still to come.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn hand_over(&self) -> io::Result<()> {
        if !self.is_writable() || !self.shared().is_dirty() {
            return Ok(());
        }
        let state = &mut *self.alone();
        if !self.hand_over_counts(state)? {
            self.commit(state)?;
            // What became free with it.
            self.hand_over_counts(state)?;
        }
        Ok(())
    }

    /// As [`Image::freeze`], but what is in the file may not survive a loss of power before it is frozen
    /// or flushed.
    ///
    /// # Errors
    /// As [`Image::flush`]; then it may be tried again.
    pub fn write_out(&self) -> io::Result<()> {
        self.hand_over()?;
        self.seal()
    }

    fn seal(&self) -> io::Result<()> {
        self.writable.store(false, Ordering::SeqCst);
        self.alone().counts = None;
        self.storage.share()
    }

    /// How many files it is made of.
    #[must_use]
    pub fn depth(&self) -> usize {
        let (mut count, mut below) = (1, self.backing());
        while let Some(layer) = below {
            count += 1;
            below = match layer {
                Layer::Qcow2(image) => image.backing(),
                Layer::Raw { .. } => None,
            };
        }
        count
    }

    /// Whether a range is known to be zero, and how many bytes this holds for.
    ///
    /// # Errors
    /// As [`Image::read`].
    pub fn extent(&self, offset: u64, len: u64) -> io::Result<(bool, u64)> {
        self.check_range(offset, len)?;
        let (l1, _, _) = self.split(offset);
        self.load(&mut self.alone(), l1)?;
        let state = self.shared();
        let Some((mapping, run)) = self.look_up(&state, offset, len)? else {
            return Ok((false, self.left_in_cluster(offset).min(len)));
        };
        Ok(match (mapping, &self.backing) {
            (Mapping::Zero { .. }, _) | (Mapping::Below, None) => (true, run),
            (Mapping::Below, Some(layer)) => layer.extent(offset, run)?,
            _ => (false, run),
        })
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        // What fails here was not flushed by whoever wrote it.
        let _ = self.close();
    }
}
