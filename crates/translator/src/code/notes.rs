//! What is noted of host code: where guest instructions begin, where memory is accessed, what can be
//! linked. A cache full of code has some for every byte of it, so they are small: addresses and
//! offsets count from the block they belong to.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::{Deref, Range};

use bitflags::bitflags;
use iced_x86::{Instruction, OpKind};

use crate::exec::Run;
use crate::layout::WINDOWS;

use super::store::{Plain, Store, Stream};

/// Where the address of an access comes from.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// A host register, computed by code of the body.
    Register {
        /// The register.
        ea: u8,
        /// Host offset of that code.
        start: u16,
        /// Its bytes.
        len: u8,
    },
    /// The sum of guest registers and a displacement, by a shared look-up.
    Shared {
        /// The registers.
        through: Through,
        /// The displacement.
        d: i32,
    },
}

/// The registers of an address: a base, and perhaps an index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Through {
    /// The base.
    pub base: u8,
    /// The index, or [`Through::NO_INDEX`], and above it the scale as a shift.
    index: u8,
}

impl Through {
    const NO_INDEX: u8 = 31;

    /// A base alone.
    pub const fn base(base: u8) -> Self {
        Self { base, index: Self::NO_INDEX }
    }

    /// A base and an index times `1 << shift`.
    pub const fn indexed(base: u8, index: u8, shift: u8) -> Self {
        Self { base, index: index | shift << 5 }
    }

    /// The index and its shift.
    pub const fn index(self) -> Option<(u8, u8)> {
        let index = self.index & 31;
        if index == Self::NO_INDEX { None } else { Some((index, self.index >> 5)) }
    }
}

bitflags! {
    /// What kind of access it is.
    #[derive(Clone, Copy, Debug)]
    pub struct Is: u8 {
        /// The operand is read.
        const READ = 1;
        /// The operand is written.
        const WRITE = 1 << 1;
        /// An x87 or MMX instruction: pending exceptions come first.
        const X87 = 1 << 2;
        /// An MMX instruction.
        const MMX = 1 << 3;
        /// VCVTPH2PS or VCVTPS2PH: alignment is never checked, and what the store's own computation
        /// raises comes before any fault.
        const CONVERTS = 1 << 4;
        /// The address is an offset in a segment that is not flat.
        const SEGMENTED = 1 << 5;
        /// Until the access itself, the address is where [`Place`] says.
        const SIMPLE = 1 << 6;
    }
}

/// A place in a block where a memory operand is accessed.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// What the slow path is made of.
    pub place: Place,
    /// Host offset (from the block's start) where the look-up begins.
    pub look: u16,
    /// Host offset of the access itself.
    pub op: u16,
    /// Host offset of the first byte after the guest instruction's part that follows the access.
    pub op_end: u16,
    /// Bytes accessed.
    pub size: u16,
    /// Bytes between the address that was looked up and the one that is accessed, and in the upper
    /// four bits the place in the area of the addend that is shared with other accesses.
    window: u16,
    /// The alignment that the instruction demands as a power of two, and in the upper four bits the
    /// segment register.
    align: u8,
    /// The rest.
    pub is: Is,
}

impl Site {
    /// An access of so many bytes that is to be emitted.
    pub fn new(place: Place, size: usize, is: Is, seg: u8, align: u8) -> Self {
        let align = align.max(1).trailing_zeros() as u8 | seg << 4;
        Self { place, look: 0, op: 0, op_end: 0, size: size as u16, window: 0, align, is }
    }

    /// Alignment that the instruction demands, 1 for none.
    pub const fn align(&self) -> u64 {
        1 << (self.align & 15)
    }

    /// Segment register (for faults and, when segmented, base and limit).
    pub const fn seg(&self) -> u8 {
        self.align >> 4
    }

    /// Lets the access use an addend that is shared with others, kept at a place in the area, and
    /// looked up so many bytes below.
    pub fn share(&mut self, window: usize, above: u16) {
        assert!(window < WINDOWS && WINDOWS <= 16 && above < 1 << 12, "within reach");
        self.window = (window as u16) << 12 | above;
    }

    /// Place in the area of the addend that is shared with other accesses.
    pub fn window(&self) -> Option<usize> {
        let shared = matches!(self.place, Place::Shared { .. });
        shared.then_some(usize::from(self.window >> 12))
    }

    /// Bytes between the address that was looked up and the one that is accessed.
    pub const fn above(&self) -> u64 {
        (self.window & 0xfff) as u64
    }

    /// Whether the body makes the access at this offset, or is on the way there.
    pub fn contains(&self, off: u32) -> bool {
        off >= u32::from(self.look) && off < u32::from(self.op_end)
    }

    /// Whether the address is being computed or looked up at this offset. Between the two, and
    /// before, may lie islands of code that belongs to earlier instructions.
    pub fn is_looked_up_at(&self, off: u32) -> bool {
        let computed = match self.place {
            Place::Register { start, len, .. } => off.wrapping_sub(start.into()) < len.into(),
            Place::Shared { .. } => false,
        };
        computed || off >= self.look.into() && off < self.op.into()
    }

    /// Where the access can be begun again.
    pub fn start(&self) -> u32 {
        u32::from(match self.place {
            Place::Register { start, len, .. } if len != 0 => start,
            _ => self.look,
        })
    }

    /// Whether the operand is written.
    pub const fn writes(&self) -> bool {
        self.is.contains(Is::WRITE)
    }

    /// Whether the operand is read.
    pub const fn reads(&self) -> bool {
        self.is.contains(Is::READ)
    }
}

/// The slow path of an access, which few have. Offsets are from the block's start, but it may lie
/// anywhere in the cache; below the block, offsets wrap.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slow {
    /// Host offset of the first byte.
    pub cold: u32,
    /// Host offset of the first byte after it.
    pub cold_end: u32,
    /// Host offset of the return address of its call.
    pub ret: u32,
    /// Host offset of the return address of the commit call, 0 when there is none.
    pub commit_ret: u32,
    /// Host offset where it makes the access itself, 0 when it never does. The page may have become
    /// inaccessible again by then.
    pub direct: u32,
    /// Host offsets of cold code that looks whether the next page follows in the host: where it
    /// begins and ends, and where it goes on when a look-up faults.
    pub cross: [u32; 3],
}

impl Slow {
    /// Whether the access is made at this offset.
    pub const fn contains(&self, off: u32) -> bool {
        self.direct != 0 && off >= self.direct && off < self.cold_end
    }
}

/// A string instruction, or a part of one, that is emitted. The registers that hold its addresses and
/// its count are the guest's until `begun`, then host addresses and what is left to do.
#[derive(Clone, Copy, Debug, Default)]
pub struct StringSite {
    /// Host offset of the first instruction from where on the guest's one can be begun again.
    pub look: u32,
    /// Host offset up to where it can.
    pub begun: u32,
    /// Host offset of the string instruction itself.
    pub op: u32,
    /// Host offset of the call of the helper, for a look-up that faults.
    pub cold: u32,
    /// Host offset of the code that puts the registers right and calls the helper.
    pub cold_fault: u32,
    /// Host offset of the code that puts the registers right and leaves.
    pub cold_stop: u32,
    /// Offset of the guest instruction from the block's address.
    pub rip: u16,
}

/// An instruction that Rust executes.
#[derive(Clone, Copy)]
pub struct Helped {
    /// The instruction.
    pub ins: Instruction,
    /// What is to be looked at first.
    pub run: Run,
}

impl fmt::Debug for Helped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {:#x}", self.ins, self.ins.ip())
    }
}

impl Helped {
    /// The same instruction `delta` bytes further on.
    pub fn shift(&mut self, delta: u64) {
        let ins = &mut self.ins;
        ins.set_ip(ins.ip().wrapping_add(delta));
        if ins.is_ip_rel_memory_operand() {
            ins.set_memory_displacement64(ins.memory_displacement64().wrapping_add(delta));
        }
        if ins.op_kinds().any(|k| k == OpKind::NearBranch64) {
            ins.set_near_branch64(ins.near_branch64().wrapping_add(delta));
        }
    }
}

/// A direct jump that can be pointed at its target's translation.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Host offset after the 32-bit displacement to patch.
    pub patch: u16,
    /// Offset in the cold part of the exit taken while unlinked.
    pub stub: u16,
    /// From the block's address to the target.
    pub delta: i32,
    /// Whether the target is in the page of the source (or a page that cannot move).
    pub linkable: bool,
}

/// An indirect branch.
#[derive(Clone, Copy, Debug)]
pub struct Branch {
    /// Offset of the guest instruction from the block's address.
    pub rip: u16,
    /// What it took from RSP.
    pub taken: i32,
}

/// Kinds of [`Fixup`]: displacements of 32 bits, guest addresses of 64, numbers of 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fix {
    /// Displacement to a fixed host address.
    Absolute,
    /// Displacement from the body to the cold part or back.
    Across,
    /// Guest address.
    Address,
    /// Complement of a guest address.
    NotAddress,
    /// Number of an access.
    Site,
    /// Number of an instruction for a helper.
    Helper,
    /// Number of a link.
    Link,
    /// Number of an indirect branch.
    Branch,
    /// Displacement to the entry of a guest address in the jump cache.
    Entry,
}

impl Fix {
    const ALL: [Self; 9] = [
        Self::Absolute,
        Self::Across,
        Self::Address,
        Self::NotAddress,
        Self::Site,
        Self::Helper,
        Self::Link,
        Self::Branch,
        Self::Entry,
    ];
}

/// Something in host code that depends on where its block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixup {
    /// It is in the cold part.
    pub cold: bool,
    /// Offset in its part of the first byte behind it.
    pub end: usize,
    /// What it is.
    pub kind: Fix,
}

/// A [`Fixup`] as it is noted: the distance from the end of the one before, the cold part following
/// the body (12 bits), and the kind, or [`FAR`].
#[derive(Clone, Copy, Debug)]
struct Packed(u16);

const PACKED_MAX: u16 = 0xfff;
/// No kind: the next one is further away.
const FAR: u16 = 15;

/// Where a guest instruction begins, as the distance from the one before: in the guest (4 bits) and
/// in the host. Nothing in the guest: it is still the one before.
#[derive(Clone, Copy, Debug)]
struct Step(u16);

const STEP_HOST_MAX: u16 = 0xfff;

/// A list of notes of one kind.
pub trait List<T>: Deref<Target = [T]> + Default {
    /// Forgets all.
    fn forget(&mut self);
}

impl<T> List<T> for Vec<T> {
    fn forget(&mut self) {
        self.clear();
    }
}

impl<T: Plain> List<T> for Stream<T> {
    fn forget(&mut self) {
        self.clear();
    }
}

/// Where notes are.
pub trait Keep {
    /// Those of one kind.
    type List<T: Plain>: List<T>;
}

/// On their own, as those of a block that is being made.
#[derive(Debug, Default)]
pub struct Loose;

/// In the store of a cache.
#[derive(Debug, Default)]
pub struct Stored;

impl Keep for Loose {
    type List<T: Plain> = Vec<T>;
}

impl Keep for Stored {
    type List<T: Plain> = Stream<T>;
}

/// The notes of any number of blocks, in the order of the blocks.
#[derive(Default)]
pub struct NotesIn<K: Keep> {
    steps: K::List<Step>,
    /// Memory accesses.
    pub sites: K::List<Site>,
    /// What slow paths there are, by the number of the access.
    pub slow: BTreeMap<u32, Slow>,
    /// Links.
    pub links: K::List<Link>,
    /// Indirect branches.
    pub branches: K::List<Branch>,
    /// String instructions.
    pub strings: K::List<StringSite>,
    /// Instructions for helpers.
    pub helpers: K::List<Helped>,
    /// What changes in copies.
    fixups: K::List<Packed>,
}

/// Of blocks that are being made or moved.
pub type Notes = NotesIn<Loose>;
/// Of the blocks of a segment.
pub type KeptNotes = NotesIn<Stored>;

/// How many of each kind there are, or where those of a block begin.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Guest instructions, about.
    pub steps: u32,
    /// Memory accesses.
    pub sites: u32,
    /// Links.
    pub links: u32,
    /// Indirect branches.
    pub branches: u32,
    pub(super) strings: u32,
    /// Instructions for helpers.
    pub helpers: u32,
    pub(super) fixups: u32,
}

impl Counts {
    /// As numbers in a segment, the first of which is `base`.
    pub fn numbered(self, base: u32) -> Self {
        Self {
            sites: base | self.sites,
            links: base | self.links,
            branches: base | self.branches,
            helpers: base | self.helpers,
            ..self
        }
    }
}

fn part<T>(all: &[T], start: u32, end: u32) -> &[T] {
    all.get(start as usize..end as usize).unwrap_or_default()
}

/// Notes to be read.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    steps: &'a [Step],
    sites: &'a [Site],
    /// What slow paths there are, by the number of the access.
    pub slow: &'a BTreeMap<u32, Slow>,
    links: &'a [Link],
    branches: &'a [Branch],
    strings: &'a [StringSite],
    helpers: &'a [Helped],
    fixups: &'a [Packed],
}

impl<K: Keep> fmt::Debug for NotesIn<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.view().fmt(f)
    }
}

impl<K: Keep> NotesIn<K> {
    /// How many there are of each kind.
    pub fn counts(&self) -> Counts {
        self.view().counts()
    }

    /// To be read.
    pub fn view(&self) -> View<'_> {
        View {
            steps: &self.steps,
            sites: &self.sites,
            slow: &self.slow,
            links: &self.links,
            branches: &self.branches,
            strings: &self.strings,
            helpers: &self.helpers,
            fixups: &self.fixups,
        }
    }

    /// Forgets all.
    pub fn clear(&mut self) {
        self.steps.forget();
        self.sites.forget();
        self.slow.clear();
        self.links.forget();
        self.branches.forget();
        self.strings.forget();
        self.helpers.forget();
        self.fixups.forget();
    }
}

impl Notes {
    /// Notes what changes in a copy: offsets of the first byte behind it, the cold part following the
    /// body.
    pub fn fix_all(&mut self, fixups: &mut [(u32, Fix)]) {
        fixups.sort_unstable_by_key(|&(at, _)| at);
        let mut last = 0;
        for &mut (at, kind) in fixups {
            let mut by = at - last;
            while by > u32::from(PACKED_MAX) {
                self.fixups.push(Packed(PACKED_MAX | FAR << 12));
                by -= u32::from(PACKED_MAX);
            }
            self.fixups.push(Packed(by as u16 | (kind as u16) << 12));
            last = at;
        }
    }

    /// Notes that a guest instruction begins: host and guest bytes since the one before.
    pub fn begin_instruction(&mut self, mut host: usize, guest: u16) {
        while host > usize::from(STEP_HOST_MAX) {
            self.steps.push(Step(STEP_HOST_MAX));
            host -= usize::from(STEP_HOST_MAX);
        }
        debug_assert!(guest < 16);
        self.steps.push(Step(host as u16 | guest << 12));
    }
}

impl<'a> View<'a> {
    /// How many there are of each kind.
    pub fn counts(self) -> Counts {
        Counts {
            steps: self.steps.len() as u32,
            sites: self.sites.len() as u32,
            links: self.links.len() as u32,
            branches: self.branches.len() as u32,
            strings: self.strings.len() as u32,
            helpers: self.helpers.len() as u32,
            fixups: self.fixups.len() as u32,
        }
    }

    /// Those from `start` to `end`.
    pub fn between(self, start: Counts, end: Counts) -> Notes {
        let slow = self.slow.range(start.sites..end.sites);
        Notes {
            steps: part(self.steps, start.steps, end.steps).to_vec(),
            sites: part(self.sites, start.sites, end.sites).to_vec(),
            slow: slow.map(|(n, slow)| (n - start.sites, *slow)).collect(),
            links: part(self.links, start.links, end.links).to_vec(),
            branches: part(self.branches, start.branches, end.branches).to_vec(),
            strings: part(self.strings, start.strings, end.strings).to_vec(),
            helpers: part(self.helpers, start.helpers, end.helpers).to_vec(),
            fixups: part(self.fixups, start.fixups, end.fixups).to_vec(),
        }
    }

    /// The accesses from `start` to `end`.
    pub fn sites_between(self, start: Counts, end: Counts) -> &'a [Site] {
        part(self.sites, start.sites, end.sites)
    }

    /// The string instructions from `start` to `end`.
    pub fn strings_between(self, start: Counts, end: Counts) -> &'a [StringSite] {
        part(self.strings, start.strings, end.strings)
    }

    /// What changes in a copy, from `start` to `end`, which is of one block with so many bytes of
    /// body.
    pub fn fixups_between(
        self,
        start: Counts,
        end: Counts,
        body: usize,
    ) -> impl Iterator<Item = Fixup> + use<'a> {
        let mut at = 0;
        part(self.fixups, start.fixups, end.fixups).iter().filter_map(move |packed| {
            at += usize::from(packed.0 & PACKED_MAX);
            let kind = *Fix::ALL.get(usize::from(packed.0 >> 12))?;
            let cold = at > body;
            Some(Fixup { cold, end: if cold { at - body } else { at }, kind })
        })
    }

    /// Offsets, in the host and in the guest, where the instructions from `start` to `end` begin,
    /// which are those of a block.
    pub fn instructions(
        self,
        start: Counts,
        end: Counts,
    ) -> impl Iterator<Item = (u32, u16)> + use<'a> {
        let (mut host, mut guest, mut first) = (0, 0, true);
        part(self.steps, start.steps, end.steps).iter().filter_map(move |step| {
            let by = step.0 >> 12;
            host += u32::from(step.0 & STEP_HOST_MAX);
            guest += by;
            (std::mem::take(&mut first) || by != 0).then_some((host, guest))
        })
    }
}

// SAFETY: numbers.
unsafe impl Plain for Step {}
// SAFETY: numbers, and a choice of numbers.
unsafe impl Plain for Site {}
// SAFETY: numbers.
unsafe impl Plain for Slow {}
// SAFETY: numbers.
unsafe impl Plain for Link {}
// SAFETY: numbers.
unsafe impl Plain for Branch {}
// SAFETY: numbers.
unsafe impl Plain for StringSite {}
// SAFETY: an instruction is numbers and choices; so is what executes it.
unsafe impl Plain for Helped {}
// SAFETY: numbers.
unsafe impl Plain for Packed {}

/// Notes a block has at most of each kind.
const ROOM: usize = 8 << 10;

impl KeptNotes {
    /// Room for those of so many bytes of host code, and much more, at the place `next` of a store.
    pub fn new(next: &mut usize, code: usize) -> Self {
        let most = |of: usize| code / of + 2 * ROOM;
        Self {
            steps: Stream::new(next, most(4)),
            sites: Stream::new(next, most(10)),
            slow: BTreeMap::new(),
            links: Stream::new(next, most(16)),
            branches: Stream::new(next, most(32)),
            strings: Stream::new(next, most(64)),
            helpers: Stream::new(next, most(20)),
            fixups: Stream::new(next, most(3)),
        }
    }

    /// Says where the store is.
    pub fn connect(&mut self, store: &Store) {
        self.steps.connect(store);
        self.sites.connect(store);
        self.links.connect(store);
        self.branches.connect(store);
        self.strings.connect(store);
        self.helpers.connect(store);
        self.fixups.connect(store);
    }

    /// Whether those of a block fit.
    pub const fn has_room(&self) -> bool {
        self.steps.has_room(ROOM)
            && self.sites.has_room(ROOM)
            && self.links.has_room(ROOM)
            && self.branches.has_room(ROOM)
            && self.strings.has_room(ROOM)
            && self.helpers.has_room(ROOM)
            && self.fixups.has_room(ROOM)
    }

    /// Where in the store they are.
    pub fn live(&self) -> [Range<usize>; 7] {
        [
            self.steps.live(),
            self.sites.live(),
            self.links.live(),
            self.branches.live(),
            self.strings.live(),
            self.helpers.live(),
            self.fixups.live(),
        ]
    }

    /// Sets how many there are; false if that cannot be.
    pub fn set_counts(&mut self, counts: Counts) -> bool {
        self.steps.set_len(counts.steps as usize)
            && self.sites.set_len(counts.sites as usize)
            && self.links.set_len(counts.links as usize)
            && self.branches.set_len(counts.branches as usize)
            && self.strings.set_len(counts.strings as usize)
            && self.helpers.set_len(counts.helpers as usize)
            && self.fixups.set_len(counts.fixups as usize)
    }

    /// Appends those of a block.
    pub fn extend(&mut self, store: &mut Store, new: &Notes) {
        let base = self.sites.len() as u32;
        self.slow.extend(new.slow.iter().map(|(n, slow)| (base + n, *slow)));
        self.steps.extend(store, &new.steps);
        self.sites.extend(store, &new.sites);
        self.links.extend(store, &new.links);
        self.branches.extend(store, &new.branches);
        self.strings.extend(store, &new.strings);
        self.helpers.extend(store, &new.helpers);
        self.fixups.extend(store, &new.fixups);
    }

    /// Moves instructions for helpers from `start` to `end` by `delta` bytes.
    pub fn shift_helpers(&mut self, store: &mut Store, start: Counts, end: Counts, delta: u64) {
        let range = start.helpers as usize..end.helpers as usize;
        if !range.is_empty() {
            let helpers = self.helpers.edit_all(store, range).unwrap_or_default();
            helpers.iter_mut().for_each(|helped| helped.shift(delta));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Counts, Fix, Notes};

    #[test]
    fn notes_are_small() {
        assert_eq!(size_of::<super::Site>(), 20);
        assert_eq!(size_of::<super::Link>(), 12);
        assert_eq!(size_of::<super::Branch>(), 8);
    }

    #[test]
    fn instructions_with_much_code_are_found() {
        let mut notes = Notes::default();
        for (host, guest) in [(0, 0), (7, 15), (9000, 3), (4095, 1), (0, 2)] {
            notes.begin_instruction(host, guest);
        }
        let all: Vec<_> = notes.view().instructions(Counts::default(), notes.counts()).collect();
        assert_eq!(all, [(0, 0), (7, 15), (9007, 18), (13102, 19), (13102, 21)]);
    }

    #[test]
    fn fixups_keep_what_they_are_given() {
        let mut notes = Notes::default();
        let mut given: Vec<_> =
            Fix::ALL.into_iter().enumerate().map(|(n, kind)| (5000 * n as u32 + 4, kind)).collect();
        given.push((24, Fix::Site));
        notes.fix_all(&mut given);
        let all = notes.view().fixups_between(Counts::default(), notes.counts(), 5004);
        let all: Vec<_> = all.map(|f| (f.cold, f.end, f.kind)).collect();
        assert_eq!(all.len(), 10);
        assert_eq!(
            all[..3],
            [(false, 4, Fix::Absolute), (false, 24, Fix::Site), (false, 5004, Fix::Across),]
        );
        assert_eq!(all[9], (true, 35_000, Fix::Entry));
    }
}
