//! How often each cluster of the file is referenced, and which are free.
//!
//! A table refers to blocks, a block has the counts of a range of clusters. The block of a range
//! without one is put into the range's first cluster. Counts go up in memory as soon as a cluster is
//! taken; they go down only after the tables that referred to it are safely in the file (`commit`).

use std::collections::{BTreeSet, HashMap};
use std::io;

use crate::limits::{BLOCKS_BYTES_MAX, CACHED_MIN, REFTABLE_BYTES_MAX, SCAN_BLOCKS_MAX};
use crate::qcow2::header::Header;
use crate::qcow2::table::{Dirty, damaged, to_numbers};
use crate::storage::{Storage, read_exact, read_padded};

/// A block of counts.
#[derive(Debug)]
pub(super) struct Block {
    pub bytes: Vec<u8>,
    pub place: u64,
    /// Bytes that were changed.
    pub dirty: Dirty,
    /// Nothing in the file refers to it yet.
    pub fresh: bool,
}

/// The counts of an image.
#[derive(Debug)]
pub(super) struct Counts {
    header: Header,
    /// Where the blocks are; zero: there is none.
    pub table: Vec<u64>,
    pub table_place: u64,
    pub table_dirty: BTreeSet<usize>,
    /// Where the table is according to the file, while it is to be moved.
    pub moved_from: Option<(u64, u64)>,
    pub blocks: HashMap<usize, Block>,
    /// No cluster before this one is free.
    hint: u64,
    /// Clusters that lose a reference when the tables are in the file.
    pub freed: Vec<u64>,
}

/// Count number `index` of a block.
pub(super) fn count_in(bytes: &[u8], order: u32, index: usize) -> u64 {
    if order < 3 {
        let per_byte = 8 >> order;
        let mask = (1u64 << (1 << order)) - 1;
        let byte = bytes.get(index / per_byte).copied().unwrap_or_default();
        return (u64::from(byte) >> ((index % per_byte) << order)) & mask;
    }
    let width = 1 << (order - 3);
    let raw = bytes.get(index * width..).and_then(|rest| rest.get(..width)).unwrap_or_default();
    raw.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Block {
    fn set(&mut self, order: u32, index: usize, count: u64) -> io::Result<()> {
        let width_bits = 1u32 << order;
        if width_bits < 64 && count >> width_bits != 0 {
            return Err(damaged("a cluster is referenced more often than can be counted"));
        }
        if order < 3 {
            let per_byte = 8 >> order;
            let shift = (index % per_byte) << order;
            let mask = ((1u16 << width_bits) - 1) << shift;
            if let Some(byte) = self.bytes.get_mut(index / per_byte) {
                *byte = *byte & !(mask as u8) | (count << shift) as u8;
            }
            self.dirty.mark(index / per_byte);
            return Ok(());
        }
        let width = 1usize << (order - 3);
        let raw = count.to_be_bytes();
        let raw = raw.get(8 - width..).unwrap_or_default();
        for (at, byte) in raw.iter().enumerate() {
            if let Some(slot) = self.bytes.get_mut(index * width + at) {
                *slot = *byte;
            }
            self.dirty.mark(index * width + at);
        }
        Ok(())
    }
}

impl Counts {
    pub fn read(storage: &dyn Storage, header: &Header) -> io::Result<Self> {
        let bytes = u64::from(header.reftable_clusters) << header.cluster_bits;
        let mut raw = vec![0; bytes as usize];
        // A table at the end of the file may be incomplete.
        read_padded(storage, &mut raw, header.reftable_offset)?;
        Ok(Self {
            header: header.clone(),
            table: to_numbers(&raw),
            table_place: header.reftable_offset,
            table_dirty: BTreeSet::new(),
            moved_from: None,
            blocks: HashMap::new(),
            hint: 1,
            freed: Vec::new(),
        })
    }

    /// Counts of one block.
    fn entries(&self) -> u64 {
        (self.header.cluster_bytes() * 8) >> self.header.refcount_order
    }

    fn split(&self, cluster: u64) -> io::Result<(usize, usize)> {
        let index = usize::try_from(cluster / self.entries()).map_err(io::Error::other)?;
        Ok((index, (cluster % self.entries()) as usize))
    }

    /// Clusters the table takes in the file.
    pub fn table_clusters(&self) -> u64 {
        (self.table.len() as u64 * 8).div_ceil(self.header.cluster_bytes())
    }

    pub fn blocks_max(&self) -> usize {
        ((BLOCKS_BYTES_MAX >> self.header.cluster_bits) as usize).max(CACHED_MIN)
    }

    pub fn dirty_blocks(&self) -> usize {
        self.blocks.values().filter(|block| block.fresh || !block.dirty.is_clean()).count()
    }

    /// A block that is there.
    fn block(&mut self, storage: &dyn Storage, index: usize) -> io::Result<Option<&mut Block>> {
        let place = self.table.get(index).copied().unwrap_or_default();
        if place == 0 {
            return Ok(None);
        }
        if !self.blocks.contains_key(&index) {
            let bytes = self.header.cluster_bytes();
            if !self.header.is_place(place, bytes) {
                return Err(damaged("the place of a block of counts"));
            }
            if self.blocks.len() >= self.blocks_max() {
                self.blocks.retain(|_, block| block.fresh || !block.dirty.is_clean());
            }
            let mut raw = vec![0; bytes as usize];
            read_exact(storage, &mut raw, place)?;
            let block = Block { bytes: raw, place, dirty: Dirty::default(), fresh: false };
            self.blocks.insert(index, block);
        }
        Ok(self.blocks.get_mut(&index))
    }

    /// Makes an empty block that nothing refers to yet.
    fn new_block(&mut self, index: usize, place: u64) -> io::Result<()> {
        let bytes = vec![0; self.header.cluster_bytes() as usize];
        let slot = self.table.get_mut(index).ok_or_else(|| damaged("the table of counts"))?;
        *slot = place;
        self.table_dirty.insert(index);
        let block = Block { bytes, place, dirty: Dirty::default(), fresh: true };
        self.blocks.insert(index, block);
        Ok(())
    }

    fn ensure_block(&mut self, storage: &dyn Storage, index: usize) -> io::Result<()> {
        if index >= self.table.len() {
            self.grow_table(index)?;
        }
        if self.block(storage, index)?.is_some() {
            return Ok(());
        }
        if index == 0 {
            return Err(damaged("the counts of its first clusters"));
        }
        let cluster = index as u64 * self.entries();
        self.new_block(index, cluster << self.header.cluster_bits)?;
        self.set(storage, cluster, 1)
    }

    fn set(&mut self, storage: &dyn Storage, cluster: u64, count: u64) -> io::Result<()> {
        let (index, slot) = self.split(cluster)?;
        let order = self.header.refcount_order;
        match self.block(storage, index)? {
            Some(block) => block.set(order, slot, count),
            None => Err(damaged("a cluster without a count")),
        }
    }

    /// Takes a free cluster; returns its place.
    pub fn allocate(&mut self, storage: &dyn Storage) -> io::Result<u64> {
        let order = self.header.refcount_order;
        let entries = self.entries() as usize;
        for attempt in 0..2 {
            if attempt == 1 {
                // Not among so many: behind the end there must be one.
                let end = storage.size()?.div_ceil(self.header.cluster_bytes());
                self.hint = self.hint.max(end);
            }
            let (mut index, mut from) = self.split(self.hint.max(1))?;
            for _ in 0..SCAN_BLOCKS_MAX {
                self.ensure_block(storage, index)?;
                let block = self.block(storage, index)?;
                let block = block.ok_or_else(|| damaged("a block of counts"))?;
                let free = (from..entries).find(|slot| count_in(&block.bytes, order, *slot) == 0);
                if let Some(slot) = free {
                    block.set(order, slot, 1)?;
                    let cluster = index as u64 * self.entries() + slot as u64;
                    self.hint = cluster + 1;
                    return Ok(cluster << self.header.cluster_bits);
                }
                (index, from) = (index + 1, 0);
            }
            self.hint = index as u64 * self.entries();
        }
        Err(io::Error::new(io::ErrorKind::StorageFull, "no free cluster found in the image"))
    }

    /// Takes several clusters in a row; returns the place of the first.
    pub fn allocate_run(&mut self, storage: &dyn Storage, count: u64) -> io::Result<u64> {
        if count == 1 {
            return self.allocate(storage);
        }
        let order = self.header.refcount_order;
        let used = self.table.iter().rposition(|place| *place != 0).map_or(0, |last| last + 1);
        // Behind what the last block has of it, if there is room.
        if let Some(last) = used.checked_sub(1)
            && let Some(block) = self.block(storage, last)?
        {
            let bytes = &block.bytes;
            let entries = (bytes.len() * 8) >> order;
            let taken = (0..entries).rposition(|slot| count_in(bytes, order, slot) != 0);
            let first = taken.map_or(0, |slot| slot + 1) as u64;
            if first + count <= entries as u64 && (last > 0 || first > 0) {
                let cluster = last as u64 * entries as u64 + first;
                for at in cluster..cluster + count {
                    self.set(storage, at, 1)?;
                }
                return Ok(cluster << self.header.cluster_bits);
            }
        }
        let blocks = self.blocks_for(count);
        if used as u64 + blocks > self.table.len() as u64 {
            self.grow_table(used + blocks as usize)?;
            return self.allocate_run(storage, count);
        }
        self.claim(used, blocks, count)
    }

    /// Blocks for a row of clusters that they are put in front of.
    fn blocks_for(&self, count: u64) -> u64 {
        count.div_ceil(self.entries() - 1)
    }

    /// Takes so many clusters behind new blocks that have their counts. Nothing is there yet.
    fn claim(&mut self, first: usize, blocks: u64, count: u64) -> io::Result<u64> {
        let base = first as u64 * self.entries();
        let order = self.header.refcount_order;
        for index in 0..blocks {
            self.new_block(first + index as usize, (base + index) << self.header.cluster_bits)?;
        }
        for cluster in base..base + blocks + count {
            let (index, slot) = self.split(cluster)?;
            if let Some(block) = self.blocks.get_mut(&index) {
                block.set(order, slot, 1)?;
            }
        }
        Ok((base + blocks) << self.header.cluster_bits)
    }

    /// Makes the table longer, so that it has a place for block `index`. It is put behind all others.
    fn grow_table(&mut self, index: usize) -> io::Result<()> {
        let first = index.max(self.table.len());
        let cluster_bytes = self.header.cluster_bytes();
        let mut blocks = 1;
        let clusters = loop {
            let entries = first as u64 + blocks;
            let clusters = (entries * 8 * 3 / 2).div_ceil(cluster_bytes);
            if self.blocks_for(clusters) <= blocks {
                break clusters;
            }
            blocks = self.blocks_for(clusters);
        };
        if clusters * cluster_bytes > REFTABLE_BYTES_MAX.max(cluster_bytes) {
            return Err(io::Error::new(
                io::ErrorKind::StorageFull,
                "the image cannot grow further",
            ));
        }
        let old = (self.table_place, self.table_clusters());
        self.table.resize((clusters * cluster_bytes / 8) as usize, 0);
        self.table_place = self.claim(first, blocks, clusters)?;
        if self.moved_from.is_none() {
            self.moved_from = Some(old);
        } else {
            // The file does not know of it.
            self.free_run(old.0, old.1);
        }
        Ok(())
    }

    /// One reference less, once the tables are in the file.
    pub fn free(&mut self, place: u64) {
        self.freed.push(place >> self.header.cluster_bits);
    }

    /// The same for several in a row.
    pub fn free_run(&mut self, place: u64, count: u64) {
        let first = place >> self.header.cluster_bits;
        self.freed.extend(first..first.saturating_add(count));
    }

    /// Takes the references away, and gives what is free back to the host. The tables are in the file.
    pub fn apply_freed(&mut self, storage: &dyn Storage) -> io::Result<()> {
        let mut freed = std::mem::take(&mut self.freed);
        freed.sort_unstable();
        let order = self.header.refcount_order;
        let mut hole = 0..0;
        for cluster in freed {
            let (index, slot) = self.split(cluster)?;
            // Counts that are too low already are for a check to complain of.
            let Some(block) = self.block(storage, index)? else { continue };
            let count = count_in(&block.bytes, order, slot);
            if count == 0 {
                continue;
            }
            block.set(order, slot, count - 1)?;
            if count > 1 || cluster == 0 {
                continue;
            }
            self.hint = self.hint.min(cluster);
            if hole.end == cluster {
                hole.end += 1;
                continue;
            }
            self.punch(storage, hole);
            hole = cluster..cluster + 1;
        }
        self.punch(storage, hole);
        Ok(())
    }

    fn punch(&self, storage: &dyn Storage, clusters: std::ops::Range<u64>) {
        let bits = self.header.cluster_bits;
        if !clusters.is_empty() {
            // Space that stays with the image is no error.
            let _ = storage.punch(clusters.start << bits, (clusters.end - clusters.start) << bits);
        }
    }
}
