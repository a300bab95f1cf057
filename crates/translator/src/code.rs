//! The code cache: host code, what it came from, and how blocks are linked.
//!
//! Host code is written through one mapping and run through another (never both writable and
//! executable). The cache belongs to one vCPU and consists of segments that are filled one after the
//! other, round and round. Each has two parts, for the bodies of blocks and for what is rarely
//! executed. While one is filled, the next one, whose blocks are the oldest, is on its way out:
//! nothing leads to its blocks any more, and those that are looked for nevertheless are copied. When
//! the segment is full, what is left of the next one is dropped.
//!
//! Blocks stay in the order of their host addresses, so that a host PC is found by binary search.

mod moved;
mod notes;
mod places;
mod segment;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::AsRawFd;

use hashbrown::HashTable;

use crate::SetupError;
use crate::sys::{self, Reservation};
use crate::translate::Mode;

pub use moved::{Moved, Went};
pub use notes::{
    Branch, Counts, Fix, Fixup, Helped, Is, Link, Notes, Place, Site, Slow, StringSite, Through,
};
pub use places::GoesOn;
use segment::{Segment, index_of, number, segment_of};

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
struct Stub {
    /// Host address of the first byte.
    host: u64,
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
    rip: u64,
    gpa: u64,
    mode: u32,
    /// The block of the same code, at another guest address, that was made before.
    older: u32,
    /// Host address of the first byte.
    pub host: u64,
    /// Offset of what is rarely executed; offsets in it count from `host`, too.
    cold: u32,
    /// Host bytes.
    len: u16,
    /// Host bytes of what is rarely executed.
    cold_len: u16,
    /// Where its notes begin; they end where those of the next one do.
    notes: Counts,
    /// The last link that was made to jump here; the others follow it in `CodeCache::listed`.
    incoming: u32,
    /// The address space it was last looked for in.
    space: u16,
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
}

impl Block {
    /// What it is found by.
    pub const fn key(&self) -> BlockKey {
        BlockKey { rip: self.rip, gpa: self.gpa, mode: self.mode }
    }

    /// From its physical to its guest address: the same for all blocks of a page that is mapped there.
    const fn base(&self) -> u64 {
        self.rip.wrapping_sub(self.gpa)
    }

    /// Host address of an offset. What was made later may lie below the block.
    pub const fn at(&self, offset: u32) -> u64 {
        self.host.wrapping_add(offset as i32 as u64)
    }

    /// A guest address from its distance.
    fn guest(&self, delta: i64) -> u64 {
        let address = self.rip.wrapping_add_signed(delta);
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
/// No link, no block.
const NONE: u32 = u32::MAX;
/// Instead of the block of a link that leads to code of none, which holds the target's address.
const DETOUR: u32 = u32::MAX - 1;
/// What is noted of a link in no list.
const NOT_LISTED: (u32, u32) = (NONE, NONE);

/// The cache of one vCPU.
pub struct CodeCache {
    _rw_space: Reservation,
    _rx_space: Reservation,
    rw: u64,
    rx: u64,
    size: usize,
    /// Bytes of code that stays.
    permanent: usize,
    segments: Vec<Segment>,
    /// The segment that is filled.
    current: usize,
    /// The last block made of each piece of code; those of the same code at other guest addresses
    /// follow it by [`Block::older`].
    table: HashTable<u32>,
    /// A bit for each place where code has a block, by a hash of its physical address; some more are
    /// set.
    places: Box<[u64]>,
    /// Links between different guest pages; undone when the kernel's mappings change.
    far_links: Vec<u32>,
    /// Times a segment was dropped.
    pub drops: u64,
}

impl CodeCache {
    /// Maps an empty cache.
    ///
    /// # Errors
    /// When the host refuses the mappings.
    pub fn new(size: usize) -> Result<Self, SetupError> {
        let err = |source| SetupError::Map { what: "the code cache", source };
        let size = size.next_multiple_of(1 << 16).max(4 << 20);
        let fd = sys::memfd(c"berth-code", size as u64).map_err(err)?;
        let rw_space = Reservation::new(size).map_err(err)?;
        let rx_space = Reservation::new(size).map_err(err)?;
        let raw = fd.as_raw_fd();
        let rw =
            rw_space.map_file(0, size, libc::PROT_READ | libc::PROT_WRITE, raw, 0).map_err(err)?;
        let rx =
            rx_space.map_file(0, size, libc::PROT_READ | libc::PROT_EXEC, raw, 0).map_err(err)?;
        Ok(Self {
            _rw_space: rw_space,
            _rx_space: rx_space,
            rw,
            rx,
            size,
            permanent: 0,
            segments: Vec::new(),
            current: 0,
            table: HashTable::new(),
            places: vec![0; PLACES / 64].into(),
            far_links: Vec::new(),
            drops: 0,
        })
    }

    /// First and one past the last executable address.
    pub fn range(&self) -> (u64, u64) {
        (self.rx, self.rx + self.size as u64)
    }

    fn now(&self) -> &Segment {
        &self.segments[self.current]
    }

    fn now_mut(&mut self) -> &mut Segment {
        &mut self.segments[self.current]
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
        let off = host - self.rx;
        assert!(off + bytes.len() as u64 <= self.size as u64, "inside the cache");
        // SAFETY: the range is inside our writable mapping (asserted); the executing alias is used
        // only by this thread, which is here and not in generated code.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), (self.rw + off) as *mut u8, bytes.len());
        }
    }

    /// Puts code that stays for good (the thunks) at the beginning, and the segments behind it.
    pub fn push_permanent(&mut self, bytes: &[u8]) {
        self.write(self.rx, bytes);
        self.permanent = bytes.len().next_multiple_of(4096);
        self.segments = Segment::divide(self.permanent, self.size);
        self.current = 0;
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
            segment.clear();
        }
        self.current = 0;
        self.table.clear();
        self.far_links.clear();
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
        // Whoever still wants something of the next one has to ask for it.
        let leaving = self.after(self.current);
        for id in self.segments[leaving].blocks_of(leaving) {
            self.disconnect_from(id);
        }
        self.places.fill(0);
        for n in 0..self.segments.len() {
            for i in 0..self.segments[n].blocks.len() {
                self.set_place(self.segments[n].blocks[i].gpa);
            }
        }
        self.drops += 1;
    }

    /// Whether a block is in the segment that is dropped next.
    fn leaves(&self, id: u32) -> bool {
        segment_of(id) == self.after(self.current)
    }

    fn drop_segment(&mut self, n: usize) {
        for id in self.segments[n].blocks_of(n) {
            self.disconnect_from(id);
        }
        let gone = |link: u32| segment_of(link) == n;
        // Nothing is older than these: where one follows, none does any more.
        self.table.retain(|&mut id| !gone(id));
        for block in self.segments.iter_mut().flat_map(|segment| &mut segment.blocks) {
            if gone(block.older) {
                block.older = NONE;
            }
        }
        let mut owners: Vec<u32> =
            self.segments[n].listed.iter().map(|&(_, owner)| owner).collect();
        owners.sort_unstable();
        owners.dedup();
        for owner in owners {
            let Some(block) = self.block_mut(owner) else { continue };
            let mut next = std::mem::replace(&mut block.incoming, NONE);
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
            if let Some(block) = self.block_mut(owner) {
                block.incoming = head;
            }
        }
        self.far_links.retain(|&link| !gone(link));
        // Code of this segment that belongs to blocks of others.
        let segment = &mut self.segments[n];
        let (detours, stubs) =
            (std::mem::take(&mut segment.detours), std::mem::take(&mut segment.stubs));
        for link in detours.into_iter().filter(|&link| !gone(link)) {
            self.patch(link, None);
        }
        for stub in stubs.iter().filter(|stub| !gone(stub.site)) {
            if let Some(owner) = self.of_mut(stub.site) {
                owner.notes.slow.remove(&index_of(stub.site));
            }
        }
        self.segments[n].clear();
        for segment in &mut self.segments {
            segment.detours.retain(|&link| !gone(link));
            segment.stubs.retain(|stub| !gone(stub.site));
        }
    }

    /// Appends a block that was made in an address space; `register`: make it findable.
    pub fn push_block(&mut self, made: &Made<'_>, space: u16, register: bool) -> BlockId {
        let id = number(self.current, self.now().blocks.len());
        let BlockKey { rip, gpa, mode } = made.key;
        let block = Block {
            rip,
            gpa,
            mode,
            older: NONE,
            host: self.next_host(),
            cold: (self.next_cold() - self.next_host()) as u32,
            len: made.code.len() as u16,
            cold_len: made.cold.len() as u16,
            notes: self.now().notes.counts(),
            incoming: NONE,
            space,
            ends: made.ends,
            target: made.target,
            detoured: false,
            valid: register,
            movable: made.movable && made.second_page.is_none(),
        };
        assert!(made.code.len().max(made.cold.len()) <= usize::from(u16::MAX), "a block is small");
        self.write(self.next_host(), made.code);
        self.write(self.next_cold(), made.cold);
        let segment = self.now_mut();
        segment.cold_used = (segment.cold_used + made.cold.len()).next_multiple_of(16);
        segment.used = (segment.used + made.code.len()).next_multiple_of(16);
        segment.notes.extend(made.notes);
        segment.listed.resize(segment.notes.links.len(), NOT_LISTED);
        segment.blocks.push(block);
        if register {
            segment.pages.entry(gpa >> 12).or_default().push(id);
            if let Some(p) = made.second_page {
                segment.pages.entry(p >> 12).or_default().push(id);
                segment.second_pages.insert(id, p);
            }
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

    /// The last block made of the code at a physical address.
    fn newest(&self, gpa: u64, mode: u32) -> Option<u32> {
        let same =
            |id: &u32| self.block(BlockId(*id)).is_some_and(|b| b.gpa == gpa && b.mode == mode);
        self.table.find(Self::hash(gpa, mode), same).copied()
    }

    /// Where in [`CodeCache::places`] the bit of a physical address is.
    const fn place(gpa: u64) -> (usize, u64) {
        let bit = (gpa.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as usize % PLACES;
        (bit / 64, 1 << (bit % 64))
    }

    fn set_place(&mut self, gpa: u64) {
        let (word, bit) = Self::place(gpa);
        if let Some(places) = self.places.get_mut(word) {
            *places |= bit;
        }
    }

    /// Makes a block findable.
    fn register(&mut self, id: u32) {
        let Some(&Block { gpa, mode, .. }) = self.block(BlockId(id)) else { return };
        self.set_place(gpa);
        let hash = Self::hash(gpa, mode);
        if let Some(older) = self.newest(gpa, mode) {
            self.bound(older);
            if let Some(block) = self.block_mut(id) {
                block.older = older;
            }
            if let Some(slot) = self.table.find_mut(hash, |&n| n == older) {
                *slot = id;
            }
            return;
        }
        let segments = &self.segments;
        let rehash = |n: &u32| {
            let block = segments.get(segment_of(*n)).and_then(|s| s.block(*n));
            block.map_or(0, |b| Self::hash(b.gpa, b.mode))
        };
        self.table.insert_unique(hash, id, rehash);
    }

    /// Makes the oldest of many blocks of the same code unfindable.
    fn bound(&mut self, newest: u32) {
        /// Copies that are found at most; each is looked at in turn.
        const MAX: usize = 64;
        let (mut id, mut count) = (newest, 1);
        while let Some(older) = self.block(BlockId(id)).map(|b| b.older).filter(|&id| id != NONE) {
            (id, count) = (older, count + 1);
        }
        if count >= MAX {
            self.retire(id);
        }
    }

    /// Makes a block unfindable.
    fn unregister(&mut self, id: u32) {
        let Some(&Block { gpa, mode, older, .. }) = self.block(BlockId(id)) else { return };
        let Some(mut newer) = self.newest(gpa, mode) else { return };
        if newer == id {
            if let Ok(mut entry) = self.table.find_entry(Self::hash(gpa, mode), |&n| n == id) {
                if older == NONE {
                    entry.remove();
                } else {
                    *entry.get_mut() = older;
                }
            }
            return;
        }
        while let Some(b) = self.block_mut(newer) {
            if b.older == id {
                b.older = older;
                return;
            }
            newer = b.older;
        }
    }

    fn bytes(&self, host: u64, len: u32) -> Option<&[u8]> {
        let end = host.checked_add(u64::from(len))?;
        if host < self.rx || end > self.rx + self.size as u64 {
            return None;
        }
        // SAFETY: inside the executable mapping, which is readable, lives as long as we do, and is
        // written by this thread only, in methods that borrow us mutably.
        Some(unsafe { std::slice::from_raw_parts(host as *const u8, len as usize) })
    }

    /// The numbers that the next of each kind of note get.
    pub fn counts(&self) -> Counts {
        self.now().notes.counts().numbered(number(self.current, 0))
    }

    /// The notes of a block's segment, and where its own begin and end.
    fn notes_of(&self, id: u32) -> (&Notes, Counts, Counts) {
        // Each block has a segment: numbers come from there.
        let segment = self.of(id).unwrap_or(self.now());
        let at = |i: usize| segment.blocks.get(i).map(|b| b.notes);
        let all = segment.notes.counts();
        let i = index_of(id) as usize;
        (&segment.notes, at(i).unwrap_or(all), at(i + 1).unwrap_or(all))
    }

    /// Finds a block.
    pub fn find(&self, key: &BlockKey) -> Option<BlockId> {
        let mut id = self.newest(key.gpa, key.mode)?;
        loop {
            let b = self.block(BlockId(id))?;
            if b.rip == key.rip {
                return Some(BlockId(id));
            }
            id = b.older;
        }
    }

    /// Notes that a block was looked for in an address space, and whether by a jump.
    pub fn found(&mut self, id: BlockId, space: u16, target: bool) {
        if let Some(b) = self.block_mut(id.0) {
            b.space = space;
            b.target |= target;
        }
    }

    /// The blocks that something jumps to in the page of block `id`, for the same addresses and mode:
    /// their guest and host addresses. They count as looked for in `space`.
    pub fn page_of(&mut self, id: BlockId, space: u16, found: &mut Vec<(u64, u64)>) {
        found.clear();
        let Some(&first) = self.block(id) else { return };
        for segment in &mut self.segments {
            for n in segment.pages.get(&(first.gpa >> 12)).into_iter().flatten() {
                let Some(b) = segment.blocks.get_mut(index_of(*n) as usize) else { continue };
                let alike = b.mode == first.mode && b.base() == first.base();
                if b.valid && b.target && alike && !segment.second_pages.contains_key(n) {
                    b.space = space;
                    found.push((b.rip, b.host));
                }
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

    fn block_mut(&mut self, id: u32) -> Option<&mut Block> {
        self.of_mut(id)?.blocks.get_mut(index_of(id) as usize)
    }

    fn listed(&self, link: u32) -> Option<&(u32, u32)> {
        self.of(link)?.listed.get(index_of(link) as usize)
    }

    fn listed_mut(&mut self, link: u32) -> Option<&mut (u32, u32)> {
        self.of_mut(link)?.listed.get_mut(index_of(link) as usize)
    }

    /// The block of a link.
    pub fn source_of(&self, n: u32) -> Option<&Block> {
        self.of(n)?.block_with(|notes| notes.links, index_of(n))
    }

    /// A link by number.
    pub fn link(&self, n: u32) -> Option<&Link> {
        self.of(n)?.notes.links.get(index_of(n) as usize)
    }

    /// Guest address that a link leads to.
    pub fn target_of(&self, n: u32) -> Option<u64> {
        Some(self.source_of(n)?.guest(i64::from(self.link(n)?.delta)))
    }

    /// Points a link at a host address, or at its exit.
    fn patch(&mut self, n: u32, to: Option<u64>) {
        let (Some(link), Some(b)) = (self.link(n), self.source_of(n)) else { return };
        let end = b.host + u64::from(link.patch);
        let to = to.unwrap_or(b.host + u64::from(b.cold) + u64::from(link.stub));
        self.write(end - 4, &(to.wrapping_sub(end) as u32).to_le_bytes());
    }

    /// Points link `n` at a block.
    pub fn connect(&mut self, n: u32, to: BlockId, far: bool) {
        let Some(b) = self.block(to).filter(|b| b.valid) else { return };
        let host = b.host;
        self.list(n, to.0);
        self.patch(n, Some(host));
        if far {
            self.far_links.push(n);
        }
    }

    /// Puts link `n` into the list of a block. Undone links may still be in one.
    fn list(&mut self, n: u32, block: u32) {
        let Some(&(next, owner)) = self.listed(n) else { return };
        if owner == block {
            return;
        }
        if let Some(old) = self.block_mut(owner) {
            let mut at = old.incoming;
            if at == n {
                old.incoming = next;
            }
            while let Some(entry) = self.listed_mut(at) {
                if entry.0 == n {
                    entry.0 = next;
                }
                at = entry.0;
            }
        }
        if let Some(b) = self.block_mut(block) {
            let before = std::mem::replace(&mut b.incoming, n);
            if let Some(entry) = self.listed_mut(n) {
                *entry = (before, block);
            }
        } else if let Some(entry) = self.listed_mut(n) {
            *entry = (NONE, block);
        }
    }

    /// Appends code of no block and points link `n` at it.
    pub fn connect_to(&mut self, n: u32, code: &[u8]) {
        if !self.fits(code.len()) {
            return;
        }
        let host = self.next_cold();
        self.write(host, code);
        let segment = self.now_mut();
        segment.cold_used = (segment.cold_used + code.len()).next_multiple_of(16);
        segment.detours.push(n);
        self.list(n, DETOUR);
        self.patch(n, Some(host));
        let source =
            self.of_mut(n).and_then(|s| s.block_with_mut(|notes| notes.links, index_of(n)));
        if let Some(source) = source {
            source.detoured = true;
        }
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

    /// Undoes the links to a block.
    fn disconnect_from(&mut self, id: u32) {
        let Some(b) = self.block_mut(id) else { return };
        let mut incoming = std::mem::replace(&mut b.incoming, NONE);
        while let Some(entry) = self.listed_mut(incoming) {
            let (next, _) = std::mem::replace(entry, NOT_LISTED);
            self.patch(incoming, None);
            incoming = next;
        }
    }

    /// Undoes all links between different pages.
    pub fn disconnect_far(&mut self) {
        for n in std::mem::take(&mut self.far_links) {
            self.patch(n, None);
        }
    }

    /// Drops the blocks made from a guest physical page; tells whether there were any.
    pub fn invalidate_page(&mut self, page: u64) -> bool {
        let mut any = false;
        for n in 0..self.segments.len() {
            for id in self.segments[n].pages.remove(&page).unwrap_or_default() {
                self.retire(id);
                any = true;
            }
        }
        any
    }
}
