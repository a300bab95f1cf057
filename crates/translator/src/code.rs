//! The code cache: host code, what it came from, and how blocks are linked.
//!
//! Host code is written through one mapping and run through another (never both writable and
//! executable). The cache belongs to one vCPU and consists of segments that are filled one after the
//! other, round and round. Each has two parts, for the bodies of blocks and for what is rarely
//! executed. When one is half full, the next one, whose blocks are the oldest, is on its way out:
//! nothing leads to its blocks any more, and those that are looked for nevertheless are copied. When
//! the segment is full, what is left of the next one is dropped.
//!
//! Blocks stay in the order of their host addresses, so that a host PC is found by binary search.

mod links;
mod moved;
mod notes;
mod places;
mod segment;
mod share;
mod store;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use crate::SetupError;
use crate::ram::Origin;
use crate::translate::Mode;

pub use moved::{Moved, Went};
use notes::View;
pub use notes::{
    Branch, Counts, Fix, Fixup, Helped, Is, Link, Notes, Place, Site, Slow, StringSite, Through,
};
pub use places::GoesOn;
use segment::{Segment, index_of, number, segment_of};
pub use share::CodePart;
use store::{Plain, Store, Stream};

/// Number of a block in [`CodeCache`], valid until its segment is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockId(pub u32);

/// What a block is found by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BlockKey {
    /// Guest linear address of the first instruction.
    pub rip: u64,
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Everything else the translation depends on.
    pub mode: u32,
}

/// A fast hash for keys that are addresses.
#[derive(Default)]
pub struct MulHasher(u64);

impl Hasher for MulHasher {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for &b in bytes {
            self.write_u64(u64::from(b));
        }
    }
    fn write_u32(&mut self, v: u32) {
        self.write_u64(u64::from(v));
    }
    fn write_u64(&mut self, v: u64) {
        self.0 = (self.0 ^ v).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29);
    }
}

/// A map with [`MulHasher`].
pub type FastMap<K, V> = HashMap<K, V, BuildHasherDefault<MulHasher>>;

/// The slow path of an access, made when it is first needed.
#[derive(Clone, Copy)]
pub struct Stub {
    /// Place in the cache of the first byte.
    place: u32,
    /// Host bytes.
    len: u32,
    /// The block.
    block: u32,
    /// The access.
    site: u32,
}

/// A translated block.
#[derive(Clone, Copy)]
pub struct Block {
    gpa: u64,
    mode: u32,
    /// One more than the number of the block that was made before, of those with the same hash of the
    /// physical address and the mode.
    older: u32,
    /// One more than the index of the block in this segment that was made before, of those with the
    /// same hash of the physical page.
    beside: u32,
    /// Place in the cache of the first byte.
    place: u32,
    /// Offset of what is rarely executed; offsets in it count from `place`, too.
    cold: u32,
    /// Host bytes.
    len: u16,
    /// Host bytes of what is rarely executed.
    cold_len: u16,
    /// Where its notes begin; they end where those of the next one do.
    notes: Counts,
    /// Instructions, here and right behind, that have look-ups of their own, and that look whether
    /// they cross into another page.
    ends: (u8, u8),
    /// Something jumps here; else it is only where an interrupt was.
    target: bool,
    /// A link of its leads to code of no block, which holds the target's address.
    detoured: bool,
    /// Still to be found.
    valid: bool,
    /// It can be put right for another guest address.
    movable: bool,
    /// Its last instruction crosses into another page.
    split: bool,
}

// SAFETY: numbers.
unsafe impl Plain for Block {}
// SAFETY: numbers.
unsafe impl Plain for Stub {}

impl Block {
    /// The guest physical address of the first byte.
    pub const fn gpa(&self) -> u64 {
        self.gpa
    }

    /// A guest address from its distance to `rip`, where the block is.
    fn guest(&self, rip: u64, delta: i64) -> u64 {
        let address = rip.wrapping_add_signed(delta);
        if Mode::bits_of(self.mode) == 64 { address } else { address & 0xffff_ffff }
    }
}

/// A finished translation.
pub struct Made<'a> {
    /// What it is found by.
    pub key: BlockKey,
    /// Physical address of the second page, when the last instruction crosses into one.
    pub second_page: Option<u64>,
    /// Instructions, here and right behind, that have look-ups of their own, and that look whether
    /// they cross into another page.
    pub ends: (u8, u8),
    /// Something jumps here; else it is only where an interrupt was.
    pub target: bool,
    /// All that changes in a copy at another guest address is in the notes.
    pub movable: bool,
    /// Host code.
    pub code: &'a [u8],
    /// Host code that is rarely executed.
    pub cold: &'a [u8],
    /// What is noted of them.
    pub notes: &'a Notes,
}

/// Bits of [`CodeCache::places`].
const PLACES: usize = 1 << 19;
/// Lists of blocks that are found by their physical address and mode.
const BUCKETS: usize = 1 << 16;
/// Those of one guest page, which lie together: clones change few pages of the table.
const BUCKETS_OF_PAGE: usize = 64;
/// Bits of [`CodeCache::far_reach`].
const FAR_GIBS: usize = 512;
/// Links between pages at most; more stay undone.
const FAR_MAX: usize = 1 << 20;
/// Bytes for code that stays.
const PERMANENT: usize = 16 << 10;
/// No link, no block.
const NONE: u32 = u32::MAX;
/// Instead of the block of a link that leads to code of none, which holds the target's address.
const DETOUR: u32 = u32::MAX - 1;
/// What is noted of a link in no list.
const NOT_LISTED: (u32, u32) = (NONE, NONE);

/// The cache of one vCPU.
pub struct CodeCache {
    store: Store,
    rx: u64,
    size: usize,
    segments: Vec<Segment>,
    /// The segment that is filled.
    current: usize,
    /// The next one is on its way out.
    leaving: bool,
    /// When so much more fits into the segment at most, the next one is to go.
    leave_at: usize,
    /// By a hash of physical address and mode: one more than the number of the last block that was
    /// made; the others follow by [`Block::older`].
    buckets: Stream<u32>,
    /// A bit for each place where code has a block, by a hash of its physical address; some more are
    /// set.
    places: Stream<u64>,
    /// Links between different guest pages; undone when the kernel's mappings change.
    far_links: Stream<u32>,
    /// For each GiB of guest addresses, by its number's lowest bits: whether such links lead there.
    far_reach: [u64; FAR_GIBS / 64],
    /// What there is only while it is shared.
    part: CodePart,
    /// Times a segment was dropped.
    pub drops: u64,
}

impl CodeCache {
    /// Maps an empty cache.
    ///
    /// # Errors
    /// When the host refuses the mappings.
    pub fn new(size: usize) -> Result<Self, SetupError> {
        Self::with(size, None)
    }

    /// The same with what another one, of the same size and program, has shared.
    ///
    /// # Errors
    /// As [`CodeCache::new`], or it is not that.
    fn with(size: usize, begin: Option<&Origin>) -> Result<Self, SetupError> {
        let err = |source| SetupError::Map { what: "the code cache", source };
        let size = size.next_multiple_of(1 << 16).max(4 << 20);
        let mut next = size;
        let mut segments = Segment::divide(PERMANENT, size, &mut next);
        let mut buckets = Stream::new(&mut next, BUCKETS);
        buckets.set_len(BUCKETS);
        let mut places = Stream::new(&mut next, PLACES / 64);
        places.set_len(PLACES / 64);
        let mut far_links = Stream::new(&mut next, FAR_MAX);
        let mut part = CodePart::new(&mut next, size);
        let begin = begin.map(|pages| (pages, PERMANENT));
        let store = Store::new(size, next, begin).map_err(err)?;
        segments.iter_mut().for_each(|segment| segment.connect(&store));
        buckets.connect(&store);
        places.connect(&store);
        far_links.connect(&store);
        part.connect(&store);
        let rx = store.rx();
        let mut cache = Self {
            store,
            rx,
            size,
            segments,
            current: 0,
            leaving: false,
            leave_at: 0,
            buckets,
            places,
            far_links,
            far_reach: [0; FAR_GIBS / 64],
            part,
            drops: 0,
        };
        cache.stay();
        Ok(cache)
    }

    /// Lets the next segment stay until half of what there is room for now is filled.
    fn stay(&mut self) {
        self.leaving = false;
        self.leave_at = self.now().room() / 2;
    }

    /// Whether the next segment is to be on its way out from now on.
    pub fn is_to_leave(&self) -> bool {
        !self.leaving && self.now().room() <= self.leave_at
    }

    /// Whether the next segment is on its way out.
    pub const fn is_leaving(&self) -> bool {
        self.leaving
    }

    /// Bytes of code it has room for.
    pub const fn size(&self) -> usize {
        self.size
    }

    /// How many bytes can be translated before anything of the cache has to go.
    pub fn room_before_loss(&self) -> usize {
        let room = self.now().room();
        if self.leaving { room } else { room.saturating_sub(self.leave_at) }
    }

    /// Makes nothing lead to the blocks of the next segment any more. Whatever knows host addresses of
    /// them has to forget these.
    pub fn leave(&mut self) {
        self.leaving = true;
        let next = self.after(self.current);
        for id in self.segments[next].blocks_of(next) {
            self.disconnect_from(id);
        }
    }

    /// First and one past the last executable address.
    pub fn range(&self) -> (u64, u64) {
        (self.rx, self.rx + self.size as u64)
    }

    /// Host address of the first byte of a block.
    pub fn host(&self, block: &Block) -> u64 {
        self.rx + u64::from(block.place)
    }

    /// The same by number.
    pub fn host_of(&self, id: BlockId) -> Option<u64> {
        self.block(id).map(|b| self.host(b))
    }

    /// Host address of an offset in a block. What was made later may lie below the block.
    pub fn at(&self, block: &Block, offset: u32) -> u64 {
        self.host(block).wrapping_add(offset as i32 as u64)
    }

    fn now(&self) -> &Segment {
        &self.segments[self.current]
    }

    /// The segment of a block, or of a note, by its number.
    fn of(&self, n: u32) -> Option<&Segment> {
        self.segments.get(segment_of(n))
    }

    fn of_mut(&mut self, n: u32) -> Option<&mut Segment> {
        self.segments.get_mut(segment_of(n))
    }

    /// Host address the next code will have.
    pub fn next_host(&self) -> u64 {
        self.rx + self.now().used as u64
    }

    /// Host address the next cold code will have.
    pub fn next_cold(&self) -> u64 {
        self.rx + self.now().cold_used as u64
    }

    fn write(&mut self, host: u64, bytes: &[u8]) {
        let place = host - self.rx;
        assert!(place + bytes.len() as u64 <= self.size as u64, "inside the cache");
        self.store.write(place as usize, bytes);
    }

    /// Puts code that stays for good (the thunks) at the beginning.
    pub fn push_permanent(&mut self, bytes: &[u8]) {
        assert!(bytes.len() <= PERMANENT, "room for code that stays");
        self.write(self.rx, bytes);
    }

    /// The code around `pc`, for reports, and its address.
    pub fn around(&self, pc: u64) -> (u64, Vec<u8>) {
        let start = pc.saturating_sub(48).max(self.rx);
        let end = (pc + 32).min(self.rx + self.size as u64);
        (start, self.bytes(start, end.saturating_sub(start) as u32).unwrap_or_default().to_vec())
    }

    /// Whether `bytes` more bytes fit into the segment that is filled.
    pub fn fits(&self, bytes: usize) -> bool {
        self.now().fits(bytes)
    }

    /// Drops all blocks.
    pub fn flush(&mut self) {
        for segment in &mut self.segments {
            segment.clear(&mut self.store);
        }
        self.current = 0;
        self.stay();
        if let Some(buckets) = self.buckets.edit_all(&mut self.store, 0..BUCKETS) {
            buckets.fill(0);
        }
        self.far_links.clear();
        self.far_reach = [0; FAR_GIBS / 64];
        self.drops += 1;
    }

    fn after(&self, segment: usize) -> usize {
        (segment + 1) % self.segments.len()
    }

    /// Goes on with the next segment, which loses what is in it. Whatever knows host addresses has to
    /// forget them.
    pub fn advance(&mut self) {
        self.current = self.after(self.current);
        self.drop_segment(self.current);
        self.stay();
        if let Some(places) = self.places.edit_all(&mut self.store, 0..PLACES / 64) {
            places.fill(0);
            for block in self.segments.iter().flat_map(|segment| segment.blocks.iter()) {
                let (word, bit) = Self::place(block.gpa);
                if let Some(places) = places.get_mut(word) {
                    *places |= bit;
                }
            }
        }
        self.drops += 1;
    }

    /// Whether a block is in a segment that is on its way out.
    fn leaves(&self, id: u32) -> bool {
        self.leaving && segment_of(id) == self.after(self.current)
    }

    fn drop_segment(&mut self, n: usize) {
        for id in self.segments[n].blocks_of(n) {
            self.disconnect_from(id);
        }
        let gone = |link: u32| segment_of(link) == n;
        // Nothing is older than these: where one follows, none does any more.
        for bucket in 0..BUCKETS {
            if self.buckets.get(bucket).and_then(|n| n.checked_sub(1)).is_some_and(gone) {
                self.buckets.set(&mut self.store, bucket, 0);
            }
        }
        for segment in &mut self.segments {
            for i in 0..segment.blocks.len() {
                let older = segment.blocks.get(i).and_then(|b| b.older.checked_sub(1));
                if older.is_some_and(gone)
                    && let Some(block) = segment.blocks.edit(&mut self.store, i)
                {
                    block.older = 0;
                }
            }
        }
        let mut owners: Vec<u32> =
            self.segments[n].listed.iter().map(|&(_, owner)| owner).collect();
        owners.sort_unstable();
        owners.dedup();
        for owner in owners {
            let Some(mut next) = self.take_incoming(owner) else { continue };
            let mut kept = Vec::new();
            while let Some(&(following, _)) = self.listed(next) {
                if !gone(next) {
                    kept.push(next);
                }
                next = following;
            }
            let mut head = NONE;
            for link in kept.into_iter().rev() {
                if let Some(entry) = self.listed_mut(link) {
                    entry.0 = head;
                    head = link;
                }
            }
            self.set_incoming(owner, head);
        }
        let mut kept = 0;
        for i in 0..self.far_links.len() {
            let Some(&link) = self.far_links.get(i) else { break };
            if !gone(link) {
                self.far_links.set(&mut self.store, kept, link);
                kept += 1;
            }
        }
        self.far_links.truncate(kept);
        // Code of this segment that belongs to blocks of others.
        let segment = &mut self.segments[n];
        let detours = std::mem::take(&mut segment.detours);
        let stubs = segment.stubs.to_vec();
        for link in detours.into_iter().filter(|&link| !gone(link)) {
            self.patch(link, None);
        }
        for stub in stubs.iter().filter(|stub| !gone(stub.site)) {
            if let Some(owner) = self.of_mut(stub.site) {
                owner.notes.slow.remove(&index_of(stub.site));
            }
        }
        self.segments[n].clear(&mut self.store);
        for segment in &mut self.segments {
            segment.detours.retain(|&link| !gone(link));
            let kept: Vec<_> = segment.stubs.iter().filter(|s| !gone(s.site)).copied().collect();
            if kept.len() != segment.stubs.len() {
                segment.stubs.clear();
                segment.stubs.extend(&mut self.store, &kept);
            }
        }
    }

    /// Appends a block that was made in an address space; `register`: make it findable.
    pub fn push_block(&mut self, made: &Made<'_>, space: u16, register: bool) -> BlockId {
        let id = number(self.current, self.now().blocks.len());
        let BlockKey { rip, gpa, mode } = made.key;
        let block = Block {
            gpa,
            mode,
            older: 0,
            beside: 0,
            place: (self.next_host() - self.rx) as u32,
            cold: (self.next_cold() - self.next_host()) as u32,
            len: made.code.len() as u16,
            cold_len: made.cold.len() as u16,
            notes: self.now().notes.counts(),
            ends: made.ends,
            target: made.target,
            detoured: false,
            valid: register,
            movable: made.movable && made.second_page.is_none(),
            split: made.second_page.is_some(),
        };
        assert!(made.code.len().max(made.cold.len()) <= usize::from(u16::MAX), "a block is small");
        self.write(self.next_host(), made.code);
        self.write(self.next_cold(), made.cold);
        let (segment, store) = (&mut self.segments[self.current], &mut self.store);
        segment.cold_used = (segment.cold_used + made.cold.len()).next_multiple_of(16);
        segment.used = (segment.used + made.code.len()).next_multiple_of(16);
        segment.notes.extend(store, made.notes);
        segment.push(store, block, rip, space);
        if register {
            segment.list_pages(store, self.current, made.second_page);
            self.register(id);
        }
        BlockId(id)
    }

    fn hash(gpa: u64, mode: u32) -> u64 {
        let mut hasher = MulHasher::default();
        hasher.write_u64(gpa);
        hasher.write_u32(mode);
        hasher.finish()
    }

    fn bucket(gpa: u64, mode: u32) -> usize {
        let of_page = Self::hash(gpa >> 12, 0) as usize % (BUCKETS / BUCKETS_OF_PAGE);
        of_page * BUCKETS_OF_PAGE + (Self::hash(gpa, mode) >> 20) as usize % BUCKETS_OF_PAGE
    }

    /// The blocks made of the code at a physical address, the last one first.
    fn made_of(&self, gpa: u64, mode: u32) -> impl Iterator<Item = u32> + use<'_> {
        let first = self.buckets.get(Self::bucket(gpa, mode)).copied().unwrap_or(0);
        let mut next = first;
        std::iter::from_fn(move || {
            loop {
                let id = next.checked_sub(1)?;
                let block = self.block(BlockId(id))?;
                next = block.older;
                if block.gpa == gpa && block.mode == mode {
                    return Some(id);
                }
            }
        })
    }

    /// Where in [`CodeCache::places`] the bit of a physical address is.
    const fn place(gpa: u64) -> (usize, u64) {
        let bit = (gpa.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % PLACES;
        (bit / 64, 1 << (bit % 64))
    }

    /// Makes a block findable.
    fn register(&mut self, id: u32) {
        let Some(&Block { gpa, mode, .. }) = self.block(BlockId(id)) else { return };
        let (word, bit) = Self::place(gpa);
        let places = self.places.get(word).copied().unwrap_or(0);
        self.places.set(&mut self.store, word, places | bit);
        self.bound(gpa, mode);
        let bucket = Self::bucket(gpa, mode);
        let older = self.buckets.get(bucket).copied().unwrap_or(0);
        if let Some(block) = self.block_mut(id) {
            block.older = older;
        }
        self.buckets.set(&mut self.store, bucket, id + 1);
    }

    /// Makes the oldest of many blocks of the same code unfindable.
    fn bound(&mut self, gpa: u64, mode: u32) {
        /// Copies that are found at most; each is looked at in turn.
        const MAX: usize = 64;
        let (count, oldest) =
            self.made_of(gpa, mode).fold((0, None), |(count, _), id| (count + 1, Some(id)));
        if count >= MAX
            && let Some(id) = oldest
        {
            self.retire(id);
        }
    }

    /// Makes a block unfindable.
    fn unregister(&mut self, id: u32) {
        let Some(&Block { gpa, mode, older, .. }) = self.block(BlockId(id)) else { return };
        let bucket = Self::bucket(gpa, mode);
        let first = self.buckets.get(bucket).copied().unwrap_or(0);
        if first == id + 1 {
            self.buckets.set(&mut self.store, bucket, older);
            return;
        }
        let mut newer = first.checked_sub(1);
        while let Some(n) = newer {
            let Some(next) = self.block(BlockId(n)).map(|b| b.older) else { return };
            if next == id + 1 {
                if let Some(block) = self.block_mut(n) {
                    block.older = older;
                }
                return;
            }
            newer = next.checked_sub(1);
        }
    }

    fn bytes(&self, host: u64, len: u32) -> Option<&[u8]> {
        let (place, len) = (usize::try_from(host.checked_sub(self.rx)?).ok()?, len as usize);
        if place > self.size || len > self.size - place {
            return None;
        }
        self.store.bytes(place, len)
    }

    /// The numbers that the next of each kind of note get.
    pub fn counts(&self) -> Counts {
        self.now().notes.counts().numbered(number(self.current, 0))
    }

    /// The notes of a block's segment, and where its own begin and end.
    fn notes_of(&self, id: u32) -> (View<'_>, Counts, Counts) {
        // Each block has a segment: numbers come from there.
        let segment = self.of(id).unwrap_or(self.now());
        let at = |i: usize| segment.blocks.get(i).map(|b| b.notes);
        let all = segment.notes.counts();
        let i = index_of(id) as usize;
        (segment.notes.view(), at(i).unwrap_or(all), at(i + 1).unwrap_or(all))
    }

    /// Finds a block.
    pub fn find(&self, key: &BlockKey) -> Option<BlockId> {
        let here = |id: &u32| self.rip_of(*id) == key.rip;
        self.made_of(key.gpa, key.mode).find(here).map(BlockId)
    }

    /// The address space a block was last looked for in.
    fn space_of(&self, id: u32) -> Option<u16> {
        self.of(id)?.spaces.get(index_of(id) as usize).copied()
    }

    fn set_space(&mut self, id: u32, space: u16) {
        if let Some(segment) = self.segments.get_mut(segment_of(id)) {
            segment.spaces.set(&mut self.store, index_of(id) as usize, space);
        }
    }

    /// Notes that a block was looked for in an address space, and whether by a jump.
    pub fn found(&mut self, id: BlockId, space: u16, target: bool) {
        self.set_space(id.0, space);
        if target
            && self.block(id).is_some_and(|b| !b.target)
            && let Some(b) = self.block_mut(id.0)
        {
            b.target = true;
        }
    }

    /// The blocks that something jumps to in the page of block `id`, for the same addresses and mode:
    /// their guest and host addresses. They count as looked for in `space`.
    pub fn page_of(&mut self, id: BlockId, space: u16, found: &mut Vec<(u64, u64)>) {
        found.clear();
        let Some(&first) = self.block(id) else { return };
        let base = self.rip_of(id.0).wrapping_sub(first.gpa);
        let rx = self.rx;
        for segment in &mut self.segments {
            let wanted = |index: &u32| {
                let block = segment.blocks.get(*index as usize)?;
                let rip = segment.rip(*index as usize);
                let is_there = block.valid && block.target && !block.split;
                let alike = block.mode == first.mode && rip.wrapping_sub(block.gpa) == base;
                (is_there && alike).then_some((block, rip))
            };
            let indexes: Vec<u32> = segment
                .beginning_in(first.gpa >> 12)
                .filter(|index| {
                    let block = wanted(index);
                    found.extend(block.map(|(b, rip)| (rip, rx + u64::from(b.place))));
                    block.is_some()
                })
                .collect();
            for index in indexes {
                segment.spaces.set(&mut self.store, index as usize, space);
            }
        }
    }

    /// Whether there is a block that something jumps to.
    pub fn has_target(&self, key: &BlockKey) -> bool {
        let (word, bit) = Self::place(key.gpa);
        self.places.get(word).is_some_and(|places| places & bit != 0)
            && self.find(key).and_then(|id| self.block(id)).is_some_and(|b| b.target)
    }

    /// Physical address of the second page of a block, when its last instruction crosses into one.
    pub fn second_page(&self, id: BlockId) -> Option<u64> {
        self.of(id.0)?.second_pages.get(&id.0).copied()
    }

    /// The block with an id.
    pub fn block(&self, id: BlockId) -> Option<&Block> {
        self.of(id.0)?.block(id.0)
    }

    /// The guest address of a block.
    fn rip_of(&self, id: u32) -> u64 {
        self.of(id).map_or(0, |segment| segment.rip(index_of(id) as usize))
    }

    /// What a block is found by.
    fn key_of(&self, id: u32) -> Option<BlockKey> {
        let &Block { gpa, mode, .. } = self.block(BlockId(id))?;
        Some(BlockKey { rip: self.rip_of(id), gpa, mode })
    }

    fn block_mut(&mut self, id: u32) -> Option<&mut Block> {
        let segment = self.segments.get_mut(segment_of(id))?;
        segment.blocks.edit(&mut self.store, index_of(id) as usize)
    }

    /// Takes the block at `pc` out of use, so that it is translated again.
    pub fn retire_at(&mut self, pc: u64) {
        if let Some(id) = self.index_at(pc) {
            self.retire(id);
        }
    }

    /// Makes a block unfindable. Code that runs in it may go on.
    fn retire(&mut self, id: u32) {
        let Some(b) = self.block_mut(id).filter(|b| b.valid) else { return };
        b.valid = false;
        self.unregister(id);
        self.disconnect_from(id);
    }

    /// Drops the blocks made from a guest physical page; tells whether there were any.
    pub fn invalidate_page(&mut self, page: u64) -> bool {
        let mut any = false;
        for n in 0..self.segments.len() {
            let ids: Vec<u32> = self.segments[n].in_page(n, page).collect();
            if !ids.is_empty() {
                self.segments[n].forget_page(&mut self.store, page);
                any = true;
            }
            for id in ids {
                self.retire(id);
            }
        }
        any
    }
}
