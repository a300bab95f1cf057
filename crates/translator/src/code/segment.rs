//! A part of the code cache that is dropped as a whole.

use std::ops::Range;

use super::notes::{Counts, KeptNotes};
use super::store::{Store, Stream};
use super::{Block, FastMap, NOT_LISTED, Stub};

/// Segments of a cache.
pub const SEGMENTS: usize = 5;
/// Bits of the number of a block or a note that count within its segment. The others name the
/// segment, and are never all ones.
const INDEX_BITS: u32 = 27;
/// Lists of blocks by their pages.
const HEADS: usize = 4096;
/// Blocks behind which there is always room.
const ROOM: usize = 16;

/// Number of the segment that a block or a note is in.
pub const fn segment_of(n: u32) -> usize {
    (n >> INDEX_BITS) as usize
}

/// What a number counts within its segment.
pub const fn index_of(n: u32) -> u32 {
    n & ((1 << INDEX_BITS) - 1)
}

/// A segment: places are offsets in the cache.
#[derive(Default)]
pub struct Segment {
    start: usize,
    /// Up to where there are bodies.
    pub used: usize,
    /// Where cold code begins, so that hot code lies together.
    pub cold_start: usize,
    /// Up to where there is cold code.
    pub cold_used: usize,
    end: usize,
    /// In the order of their places.
    pub blocks: Stream<Block>,
    /// Where each begins for the guest. That changes with each address space, of blocks far apart: beside
    /// each other these are in few pages.
    rips: Stream<u64>,
    /// The address space that each was last looked for in.
    pub spaces: Stream<u16>,
    /// The last link that was made to jump to each; the others follow it in `listed`.
    pub incoming: Stream<u32>,
    /// Those of all blocks.
    pub notes: KeptNotes,
    /// For each link in a block's list of incoming ones: the one made before it, and the block.
    pub listed: Stream<(u32, u32)>,
    /// Slow paths outside of their blocks' code, in the order of their addresses.
    pub stubs: Stream<Stub>,
    /// By a hash of the guest physical page: one more than the index of the last block that was made
    /// there; the others follow by [`Block::beside`].
    heads: Stream<u32>,
    /// Links that lead to code of no block in this segment.
    pub detours: Vec<u32>,
    /// The blocks whose last instruction crosses into a guest physical page.
    crossing: FastMap<u64, Vec<u32>>,
    /// Physical addresses of second pages, by block.
    pub second_pages: FastMap<u32, u64>,
}

impl Segment {
    /// Divides the cache from `start` to `end`; `next` is where in the store the tables begin.
    pub fn divide(start: usize, end: usize, next: &mut usize) -> Vec<Self> {
        let size = (end - start) / SEGMENTS / 64 * 64;
        let mut make = |n: usize| {
            let start = start + n * size;
            let cold_start = start + size / 16 / 64 * 11 * 64;
            // What is never used takes no memory.
            let blocks = size / 40;
            let mut heads = Stream::new(next, HEADS);
            heads.set_len(HEADS);
            Self {
                start,
                used: start,
                cold_start,
                cold_used: cold_start,
                end: start + size,
                blocks: Stream::new(next, blocks),
                rips: Stream::new(next, blocks),
                spaces: Stream::new(next, blocks),
                incoming: Stream::new(next, blocks),
                notes: KeptNotes::new(next, size),
                listed: Stream::new(next, size / 8),
                stubs: Stream::new(next, blocks),
                heads,
                ..Self::default()
            }
        };
        (0..SEGMENTS).map(&mut make).collect()
    }

    /// Sets up to where there is code; false if that cannot be.
    pub fn adopt_used(&mut self, used: usize, cold_used: usize) -> bool {
        (self.used, self.cold_used) = (used, cold_used);
        used >= self.start
            && used <= self.cold_start
            && cold_used >= self.cold_start
            && cold_used <= self.end
    }

    /// Says where the store is.
    pub fn connect(&mut self, store: &Store) {
        self.blocks.connect(store);
        self.rips.connect(store);
        self.spaces.connect(store);
        self.incoming.connect(store);
        self.notes.connect(store);
        self.listed.connect(store);
        self.stubs.connect(store);
        self.heads.connect(store);
    }

    /// Forgets everything.
    pub fn clear(&mut self, store: &mut Store) {
        self.used = self.start;
        self.cold_used = self.cold_start;
        if !self.blocks.is_empty()
            && let Some(heads) = self.heads.edit_all(store, 0..HEADS)
        {
            heads.fill(0);
        }
        self.blocks.clear();
        self.rips.clear();
        self.spaces.clear();
        self.incoming.clear();
        self.notes.clear();
        self.listed.clear();
        self.stubs.clear();
        self.detours.clear();
        self.crossing.clear();
        self.second_pages.clear();
    }

    /// Where in the store all of it is.
    pub fn live(&self) -> Vec<Range<usize>> {
        let mut live = vec![self.start..self.used, self.cold_start..self.cold_used];
        live.extend([self.blocks.live(), self.rips.live()]);
        live.extend([self.spaces.live(), self.incoming.live()]);
        live.extend(self.notes.live());
        live.extend([self.listed.live(), self.stubs.live(), self.heads.live()]);
        live
    }

    /// Bytes that fit into both parts.
    pub fn room(&self) -> usize {
        let cold = self.end.saturating_sub(self.cold_used);
        // The cold part is smaller, and takes less.
        self.cold_start.saturating_sub(self.used).min(cold * 2)
    }

    /// Whether so many bytes more fit into either part, and what is noted of them.
    pub fn fits(&self, bytes: usize) -> bool {
        self.used + bytes <= self.cold_start
            && self.cold_used + bytes <= self.end
            && self.blocks.has_room(ROOM)
            && self.stubs.has_room(ROOM)
            && self.notes.has_room()
    }

    /// Whether an offset in the cache is in here, and whether in the cold part.
    pub fn holds(&self, offset: usize) -> Option<bool> {
        (offset >= self.start && offset < self.end).then_some(offset >= self.cold_start)
    }

    /// The numbers of the blocks of what is segment `n`.
    pub fn blocks_of(&self, n: usize) -> Range<u32> {
        number(n, 0)..number(n, self.blocks.len())
    }

    /// A block by its number.
    pub fn block(&self, id: u32) -> Option<&Block> {
        self.blocks.get(index_of(id) as usize)
    }

    /// The guest address of the block with this index.
    pub fn rip(&self, index: usize) -> u64 {
        self.rips.get(index).copied().unwrap_or(0)
    }

    /// Sets that of a block by its number.
    pub fn set_rip(&mut self, store: &mut Store, id: u32, rip: u64) {
        self.rips.set(store, index_of(id) as usize, rip);
    }

    /// Sets how many blocks there are; false if that is too many.
    pub fn set_blocks(&mut self, count: usize) -> bool {
        self.blocks.set_len(count)
            && self.rips.set_len(count)
            && self.spaces.set_len(count)
            && self.incoming.set_len(count)
    }

    /// Appends a block at `rip`, last looked for in `space`, and its notes' room in lists.
    pub fn push(&mut self, store: &mut Store, block: Block, rip: u64, space: u16) {
        self.blocks.push(store, block);
        self.rips.push(store, rip);
        self.spaces.push(store, space);
        self.incoming.push(store, super::NONE);
        while self.listed.len() < self.notes.links.len() {
            self.listed.push(store, NOT_LISTED);
        }
    }

    /// The block that a note belongs to, which is the one with this index of the kind that `kind`
    /// counts.
    pub fn block_with(&self, kind: impl Fn(&Counts) -> u32, index: u32) -> Option<&Block> {
        self.blocks.get(self.owner(kind, index)?)
    }

    /// The index of that block.
    pub fn owner(&self, kind: impl Fn(&Counts) -> u32, index: u32) -> Option<usize> {
        // Those without any begin where the next ones do.
        self.blocks.partition_point(|b| kind(&b.notes) <= index).checked_sub(1)
    }

    const fn head(page: u64) -> usize {
        (page.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) as usize % HEADS
    }

    /// Puts the last block into the lists of its pages.
    pub fn list_pages(&mut self, store: &mut Store, n: usize, second_page: Option<u64>) {
        let Some(last) = self.blocks.len().checked_sub(1) else { return };
        let Some(page) = self.blocks.get(last).map(|b| b.gpa >> 12) else { return };
        if let Some(head) = self.heads.edit(store, Self::head(page)) {
            let before = std::mem::replace(head, last as u32 + 1);
            if let Some(block) = self.blocks.edit(store, last) {
                block.beside = before;
            }
        }
        if let Some(p) = second_page {
            self.crosses(number(n, last), p);
        }
    }

    /// Notes that the last instruction of a block crosses into the page of this address.
    pub fn crosses(&mut self, id: u32, second_page: u64) {
        self.crossing.entry(second_page >> 12).or_default().push(id);
        self.second_pages.insert(id, second_page);
    }

    /// The indexes of the blocks that begin in a guest physical page.
    pub fn beginning_in(&self, page: u64) -> impl Iterator<Item = u32> + use<'_> {
        let mut next = self.heads.get(Self::head(page)).copied().unwrap_or(0);
        // Each names one that was made before it.
        std::iter::from_fn(move || {
            loop {
                let index = next.checked_sub(1)?;
                let block = self.blocks.get(index as usize)?;
                next = block.beside.min(index);
                if block.gpa >> 12 == page {
                    return Some(index);
                }
            }
        })
    }

    /// The numbers of the blocks that have to do with a guest physical page of what is segment `n`.
    pub fn in_page(&self, n: usize, page: u64) -> impl Iterator<Item = u32> + use<'_> {
        let crossing = self.crossing.get(&page).into_iter().flatten().copied();
        self.beginning_in(page).map(move |index| number(n, index as usize)).chain(crossing)
    }

    /// Takes all blocks out of the lists of a page.
    pub fn forget_page(&mut self, store: &mut Store, page: u64) {
        self.crossing.remove(&page);
        let Some(&first) = self.heads.get(Self::head(page)) else { return };
        let (mut next, mut kept): (u32, Option<usize>) = (first, None);
        loop {
            let block = next.checked_sub(1).and_then(|i| self.blocks.get(i as usize)).copied();
            if let Some(block) = block
                && block.gpa >> 12 == page
            {
                next = block.beside;
                continue;
            }
            // What is kept, or nothing, follows what was kept last.
            match kept {
                None => self.heads.set(store, Self::head(page), next),
                Some(index) => {
                    if self.blocks.get(index).is_some_and(|b| b.beside != next)
                        && let Some(block) = self.blocks.edit(store, index)
                    {
                        block.beside = next;
                    }
                }
            }
            let Some(block) = block else { return };
            kept = Some(next as usize - 1);
            next = block.beside;
        }
    }
}

/// The number of a block or a note with this index in segment `n`.
pub const fn number(n: usize, index: usize) -> u32 {
    (n as u32) << INDEX_BITS | index as u32
}
