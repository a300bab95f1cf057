//! A part of the code cache that is dropped as a whole.

use super::notes::Counts;
use super::{Block, FastMap, Notes, Stub};

/// Segments of a cache.
const SEGMENTS: usize = 5;
/// Bits of the number of a block or a note that count within its segment. The others name the
/// segment, and are never all ones.
const INDEX_BITS: u32 = 27;

/// Number of the segment that a block or a note is in.
pub const fn segment_of(n: u32) -> usize {
    (n >> INDEX_BITS) as usize
}

/// What a number counts within its segment.
pub const fn index_of(n: u32) -> u32 {
    n & ((1 << INDEX_BITS) - 1)
}

/// A segment: places are offsets in the cache.
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
    pub blocks: Vec<Block>,
    /// Those of all blocks.
    pub notes: Notes,
    /// For each link in a block's list of incoming ones: the one made before it, and the block.
    pub listed: Vec<(u32, u32)>,
    /// Slow paths outside of their blocks' code, in the order of their addresses.
    pub stubs: Vec<Stub>,
    /// Links that lead to code of no block in this segment.
    pub detours: Vec<u32>,
    /// The blocks made from each guest physical page.
    pub pages: FastMap<u64, Vec<u32>>,
    /// Physical addresses of second pages, by block.
    pub second_pages: FastMap<u32, u64>,
}

impl Segment {
    /// Divides the cache from `start` to `end`.
    pub fn divide(start: usize, end: usize) -> Vec<Self> {
        let size = (end - start) / SEGMENTS / 64 * 64;
        let make = |n: usize| {
            let start = start + n * size;
            let cold_start = start + size / 16 / 64 * 11 * 64;
            Self {
                start,
                used: start,
                cold_start,
                cold_used: cold_start,
                end: start + size,
                // What is never used takes no memory, and lists that grow would leave holes.
                blocks: Vec::with_capacity(size / 150),
                notes: Notes::for_code(size),
                listed: Vec::with_capacity(size / 80),
                stubs: Vec::new(),
                detours: Vec::new(),
                pages: FastMap::default(),
                second_pages: FastMap::default(),
            }
        };
        (0..SEGMENTS).map(make).collect()
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.used = self.start;
        self.cold_used = self.cold_start;
        self.blocks.clear();
        self.notes.clear();
        self.listed.clear();
        self.stubs.clear();
        self.detours.clear();
        self.pages.clear();
        self.second_pages.clear();
    }

    /// Whether so many bytes more fit into either part.
    pub const fn fits(&self, bytes: usize) -> bool {
        self.used + bytes <= self.cold_start && self.cold_used + bytes <= self.end
    }

    /// Whether an offset in the cache is in here, and whether in the cold part.
    pub fn holds(&self, offset: usize) -> Option<bool> {
        (offset >= self.start && offset < self.end).then_some(offset >= self.cold_start)
    }

    /// The numbers of the blocks of what is segment `n`.
    pub fn blocks_of(&self, n: usize) -> std::ops::Range<u32> {
        number(n, 0)..number(n, self.blocks.len())
    }

    /// A block by its number.
    pub fn block(&self, id: u32) -> Option<&Block> {
        self.blocks.get(index_of(id) as usize)
    }

    /// The block that a note belongs to, which is the one with this index of the kind that `kind`
    /// counts.
    pub fn block_with(&self, kind: impl Fn(&Counts) -> u32, index: u32) -> Option<&Block> {
        self.blocks.get(self.owner(kind, index)?)
    }

    /// The same, to be changed.
    pub fn block_with_mut(
        &mut self,
        kind: impl Fn(&Counts) -> u32,
        index: u32,
    ) -> Option<&mut Block> {
        let i = self.owner(kind, index)?;
        self.blocks.get_mut(i)
    }

    fn owner(&self, kind: impl Fn(&Counts) -> u32, index: u32) -> Option<usize> {
        // Those without any begin where the next ones do.
        self.blocks.partition_point(|b| kind(&b.notes) <= index).checked_sub(1)
    }
}

/// The number of a block or a note with this index in segment `n`.
pub const fn number(n: usize, index: usize) -> u32 {
    (n as u32) << INDEX_BITS | index as u32
}
