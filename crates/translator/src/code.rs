//! The code cache: host code, what it came from, and how blocks are linked.
//!
//! Host code is written through one mapping and run through another (never both writable and
//! executable). The cache belongs to one vCPU and has two parts, for the bodies of blocks and for
//! what is rarely executed, each filled front to back; when one is full, everything is dropped.
//! Blocks stay in the order of their host addresses, so that a host PC is found by binary search.

mod moved;

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::AsRawFd;

use iced_x86::Instruction;

use crate::SetupError;
use crate::exec::Run;
use crate::sys::{self, Reservation};

pub use moved::{Fix, Fixup};

/// Index of a block in [`CodeCache`], valid until the next flush.
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

/// Where the address of an access comes from.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    /// A host register, computed by code of the body: its first byte and its length.
    Register {
        /// The register.
        ea: u8,
        /// The code.
        code: (u16, u16),
    },
    /// The sum of a guest register and a displacement, by a shared look-up.
    Shared {
        /// The register.
        base: u8,
        /// The displacement.
        d: i32,
    },
}

/// The slow path of an access, made when it is first needed.
struct Stub {
    /// Host address of the first byte.
    host: u64,
    /// Host bytes.
    len: u32,
    /// Index of the block.
    block: usize,
}

/// A place in a block where a memory operand is accessed.
#[derive(Clone, Copy, Debug)]
pub struct Site {
    /// Host offset (from the block's start) where the look-up begins.
    pub look: u16,
    /// Host offset of the access itself.
    pub op: u16,
    /// Host offset of the first byte after the guest instruction's part that follows the access.
    pub op_end: u16,
    /// Host offset of the slow path; 0 while there is none.
    pub cold: u32,
    /// Host offset of the first byte after the slow path.
    pub cold_end: u32,
    /// Host offset of the return address of the slow path's call.
    pub ret: u32,
    /// Host offset of the return address of the commit call, 0 when there is none.
    pub commit_ret: u32,
    /// Host offset where the slow path makes the access itself, 0 when it never does. The page may
    /// have become inaccessible again by then.
    pub direct: u32,
    /// What the slow path is made of.
    pub place: Place,
    /// Until the access itself, the address is where [`Place`] says.
    pub simple: bool,
    /// Address of the guest instruction.
    pub rip: u64,
    /// Bytes accessed.
    pub size: u16,
    /// Alignment that the instruction demands, 1 for none.
    pub align: u8,
    /// An x87 or MMX instruction: pending exceptions come first.
    pub x87: bool,
    /// An MMX instruction.
    pub mmx: bool,
    /// VCVTPH2PS or VCVTPS2PH: alignment is never checked, and what the store's own computation
    /// raises comes before any fault.
    pub converts: bool,
    /// Segment register (for faults and, when `segmented`, base and limit).
    pub seg: u8,
    /// The operand is written.
    pub write: bool,
    /// The operand is read.
    pub read: bool,
    /// The address is an offset in a segment that is not flat.
    pub segmented: bool,
    /// Bytes between the address that was looked up and the one that is accessed.
    pub above: u16,
    /// Place in the area of the addend that is shared with other accesses.
    pub window: Option<u8>,
    /// Traps because the access crossed into another page.
    pub crossings: u8,
    /// Host offsets of cold code that looks whether the next page follows in the host: where it
    /// begins and ends, and where it goes on when a look-up faults.
    pub cross: [u32; 3],
}

impl Site {
    /// Whether the access is made at this offset, or on the way there.
    pub fn contains(&self, off: u32) -> bool {
        let out_of_line = self.direct != 0 && off >= self.direct && off < self.cold_end;
        off >= u32::from(self.look) && off < u32::from(self.op_end) || out_of_line
    }

    /// Whether the address is being computed or looked up at this offset. Between the two, and
    /// before, may lie islands of code that belongs to earlier instructions.
    pub fn is_looked_up_at(&self, off: u32) -> bool {
        let computed = match self.place {
            Place::Register { code: (start, len), .. } => {
                off.wrapping_sub(start.into()) < len.into()
            }
            Place::Shared { .. } => false,
        };
        computed || off >= self.look.into() && off < self.op.into()
    }

    /// Where the access can be begun again.
    pub fn start(&self) -> u32 {
        u32::from(match self.place {
            Place::Register { code: (start, len), .. } if len != 0 => start,
            _ => self.look,
        })
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
    /// Address of the guest instruction.
    pub rip: u64,
}

/// A translated block.
#[derive(Clone, Copy)]
pub struct Block {
    /// What it is found by.
    pub key: BlockKey,
    /// Guest bytes covered.
    pub guest_len: u16,
    /// Physical address of the second page, when the last instruction crosses into one.
    pub second_page: Option<u64>,
    /// Host address of the first byte.
    pub host: u64,
    /// Host bytes.
    pub len: u32,
    /// Host address of what is rarely executed; offsets in it count from `host`, too.
    pub cold: u64,
    /// Host bytes of that.
    pub cold_len: u32,
    /// Instructions: the first of them in the cache's list, and how many.
    insns: (u32, u32),
    /// Memory accesses: the first of them in [`CodeCache::site`]'s numbering, and how many.
    pub sites: (u32, u32),
    /// String instructions: the first of them, and how many.
    strings: (u32, u32),
    /// The first link, return and helper's instruction, and how many.
    others: [(u32, u32); 3],
    /// What changes in a copy: the first of them, and how many.
    fixups: (u32, u32),
    /// The last link that was made to jump here; the others follow it in `CodeCache::listed`.
    incoming: u32,
    /// Instructions, here and right behind, that look whether they cross into another page.
    pub looks: u16,
    /// Still to be found.
    pub valid: bool,
}

/// An instruction that Rust executes.
#[derive(Clone, Copy)]
pub struct Helped {
    /// The instruction.
    pub ins: Instruction,
    /// What executes it.
    pub run: Run,
}

/// A finished translation.
pub struct Made<'a> {
    /// The record.
    pub block: Block,
    /// Where each guest instruction begins: host offset, offset from the block's RIP.
    pub insns: &'a [(u16, u16)],
    /// Host code.
    pub code: &'a [u8],
    /// Host code that is rarely executed.
    pub cold: &'a [u8],
    /// Links, in order of their numbers.
    pub links: &'a [Link],
    /// Returns, in order of their numbers: address and what they took from RSP.
    pub returns: &'a [(u64, i32)],
    /// Accesses, in order of their numbers.
    pub sites: &'a [Site],
    /// String instructions.
    pub strings: &'a [StringSite],
    /// Instructions for helpers, in order of their numbers.
    pub helpers: &'a [Helped],
    /// What to change for a copy at another guest address, if it can be made.
    pub fixups: Option<&'a Vec<Fixup>>,
}

/// Traps of one access at page ends after which its block is translated again, with a look first.
const CROSSINGS_MAX: u8 = 4;
/// No link.
const NO_LINK: u32 = u32::MAX;
/// What is noted of a link in no list.
const NOT_LISTED: (u32, u32) = (NO_LINK, u32::MAX);

/// A direct jump that can be pointed at its target's translation.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Host address after the 32-bit displacement to patch.
    pub patch: u64,
    /// Host address of the exit taken while unlinked.
    pub stub: u64,
    /// Guest linear address of the target.
    pub target: u64,
    /// Whether the target is in the page of the source (or a page that cannot move).
    pub linkable: bool,
}

/// The cache of one vCPU.
pub struct CodeCache {
    _rw_space: Reservation,
    _rx_space: Reservation,
    rw: u64,
    rx: u64,
    size: usize,
    /// Where blocks begin (behind the thunks).
    start: usize,
    used: usize,
    /// Where cold code begins, so that hot code lies together.
    cold_start: usize,
    cold_used: usize,
    blocks: Vec<Block>,
    map: FastMap<BlockKey, BlockId>,
    pages: FastMap<u64, Vec<BlockId>>,
    insns: Vec<(u16, u16)>,
    links: Vec<Link>,
    /// For each link in a block's list of incoming ones: the one made before it, and the block.
    listed: Vec<(u32, u32)>,
    returns: Vec<(u64, i32)>,
    /// Accesses of all blocks, in the order of the blocks.
    sites: Vec<Site>,
    /// String instructions of all blocks, in the order of the blocks.
    strings: Vec<StringSite>,
    /// Slow paths outside of their blocks' code, in the order of their addresses.
    stubs: Vec<Stub>,
    /// Instructions that helpers execute.
    helpers: Vec<Helped>,
    /// What changes in copies of blocks, in the order of the blocks.
    fixups: Vec<Fixup>,
    /// Blocks that can be copied, by physical address and mode.
    movable: FastMap<(u64, u32), BlockId>,
    /// Links between different guest pages; undone when the kernel's mappings change.
    far_links: Vec<u32>,
    /// Times everything was dropped.
    pub flushes: u64,
}

impl CodeCache {
    /// Maps an empty cache.
    ///
    /// # Errors
    /// When the host refuses the mappings.
    pub fn new(size: usize) -> Result<Self, SetupError> {
        let err = |source| SetupError::Map { what: "the code cache", source };
        let size = size.next_multiple_of(1 << 21).max(4 << 20);
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
            start: 0,
            used: 0,
            cold_start: size / 16 * 11,
            cold_used: size / 16 * 11,
            blocks: Vec::new(),
            map: FastMap::default(),
            pages: FastMap::default(),
            insns: Vec::new(),
            links: Vec::new(),
            listed: Vec::new(),
            returns: Vec::new(),
            sites: Vec::new(),
            strings: Vec::new(),
            stubs: Vec::new(),
            helpers: Vec::new(),
            fixups: Vec::new(),
            movable: FastMap::default(),
            far_links: Vec::new(),
            flushes: 0,
        })
    }

    /// First and one past the last executable address.
    pub fn range(&self) -> (u64, u64) {
        (self.rx, self.rx + self.size as u64)
    }

    /// Host address the next code will have.
    pub fn next_host(&self) -> u64 {
        self.rx + self.used as u64
    }

    /// Host address the next cold code will have.
    pub fn next_cold(&self) -> u64 {
        self.rx + self.cold_used as u64
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

    /// Appends code that stays for good (the thunks); returns its host address.
    pub fn push_permanent(&mut self, bytes: &[u8]) -> u64 {
        let host = self.next_host();
        self.write(host, bytes);
        self.used = (self.used + bytes.len()).next_multiple_of(64);
        self.start = self.used;
        host
    }

    /// The code around `pc`, for reports, and its address.
    pub fn around(&self, pc: u64) -> (u64, Vec<u8>) {
        let start = pc.saturating_sub(48).max(self.rx);
        let end = (pc + 32).min(self.rx + self.size as u64);
        (start, self.bytes(start, end.saturating_sub(start) as u32).unwrap_or_default().to_vec())
    }

    /// Whether `bytes` more bytes fit.
    pub fn fits(&self, bytes: usize) -> bool {
        self.used + bytes <= self.cold_start && self.cold_used + bytes <= self.size
    }

    /// Drops all blocks.
    pub fn flush(&mut self) {
        self.used = self.start;
        self.cold_used = self.cold_start;
        self.blocks.clear();
        self.map.clear();
        self.pages.clear();
        self.insns.clear();
        self.links.clear();
        self.listed.clear();
        self.returns.clear();
        self.sites.clear();
        self.strings.clear();
        self.stubs.clear();
        self.helpers.clear();
        self.fixups.clear();
        self.movable.clear();
        self.far_links.clear();
        self.flushes += 1;
    }

    /// Appends a block; `register`: make it findable.
    pub fn push_block(&mut self, made: Made<'_>, register: bool) -> BlockId {
        let Made {
            mut block,
            insns,
            code: bytes,
            cold,
            links,
            returns,
            sites,
            strings,
            helpers,
            fixups,
        } = made;
        let range = |all: usize, new: usize| (all as u32, new as u32);
        block.others = [
            range(self.links.len(), links.len()),
            range(self.returns.len(), returns.len()),
            range(self.helpers.len(), helpers.len()),
        ];
        block.sites = (self.sites.len() as u32, sites.len() as u32);
        block.insns = (self.insns.len() as u32, insns.len() as u32);
        self.insns.extend_from_slice(insns);
        self.sites.extend_from_slice(sites);
        self.helpers.extend_from_slice(helpers);
        block.strings = (self.strings.len() as u32, strings.len() as u32);
        self.strings.extend_from_slice(strings);
        let id = BlockId(self.blocks.len() as u32);
        block.host = self.next_host();
        block.len = bytes.len() as u32;
        block.cold = self.next_cold();
        block.cold_len = cold.len() as u32;
        block.valid = register;
        self.write(block.host, bytes);
        self.write(block.cold, cold);
        self.cold_used = (self.cold_used + cold.len()).next_multiple_of(16);
        self.used = (self.used + bytes.len()).next_multiple_of(16);
        self.links.extend_from_slice(links);
        self.listed.resize(self.links.len(), NOT_LISTED);
        self.returns.extend_from_slice(returns);
        if let Some(fixups) = fixups.filter(|_| register && block.second_page.is_none()) {
            block.fixups = range(self.fixups.len(), fixups.len());
            self.fixups.extend_from_slice(fixups);
            self.movable.insert((block.key.gpa, block.key.mode), id);
        }
        if register {
            self.map.insert(block.key, id);
            self.pages.entry(block.key.gpa >> 12).or_default().push(id);
            if let Some(p) = block.second_page {
                self.pages.entry(p >> 12).or_default().push(id);
            }
        }
        self.blocks.push(block);
        id
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

    /// Number the next link gets.
    pub fn next_link(&self) -> u32 {
        self.links.len() as u32
    }

    /// Number the next return gets.
    pub fn next_return(&self) -> u32 {
        self.returns.len() as u32
    }

    /// A return by number: its address and what it took from RSP.
    pub fn return_of(&self, n: u64) -> Option<(u64, i32)> {
        self.returns.get(usize::try_from(n).ok()?).copied()
    }

    /// Number the next access gets.
    pub fn next_site(&self) -> u32 {
        self.sites.len() as u32
    }

    /// Number the next instruction for a helper gets.
    pub fn next_helper(&self) -> u32 {
        self.helpers.len() as u32
    }

    /// An access by number.
    pub fn site(&self, n: u64) -> Option<&Site> {
        self.sites.get(usize::try_from(n).ok()?)
    }

    /// Whether access `n` is the first of its instruction.
    pub fn first_of(&self, n: u64) -> bool {
        let before = n.checked_sub(1).and_then(|n| self.site(n));
        before.map(|s| s.rip) != self.site(n).map(|s| s.rip)
    }

    /// An instruction for a helper by number.
    pub fn helper(&self, n: u64) -> Option<&Helped> {
        self.helpers.get(usize::try_from(n).ok()?)
    }

    /// The accesses of a block.
    pub fn sites_of(&self, block: &Block) -> &[Site] {
        let (first, count) = (block.sites.0 as usize, block.sites.1 as usize);
        self.sites.get(first..first + count).unwrap_or_default()
    }

    fn insns_of(&self, block: &Block) -> &[(u16, u16)] {
        let (first, count) = (block.insns.0 as usize, block.insns.1 as usize);
        self.insns.get(first..first + count).unwrap_or_default()
    }

    /// The string instructions of a block.
    pub fn strings_of(&self, block: &Block) -> &[StringSite] {
        let (first, count) = (block.strings.0 as usize, block.strings.1 as usize);
        self.strings.get(first..first + count).unwrap_or_default()
    }

    /// Where to go on to leave a string instruction that is under way at `pc`.
    pub fn string_stop(&self, pc: u64) -> Option<u64> {
        let block = self.block_at(pc)?;
        let off = pc.wrapping_sub(block.host) as u32;
        let site = self.strings_of(block).iter().find(|s| s.op == off)?;
        Some(block.host + u64::from(site.cold_stop))
    }

    /// Address of the guest instruction that host address `pc` belongs to.
    pub fn rip_at(&self, pc: u64) -> Option<u64> {
        let block = self.block_at(pc)?;
        let off = pc.wrapping_sub(block.host) as u32;
        // Slow paths lie behind the body and name their instruction in their site.
        let in_cold = |s: &&Site| off >= s.cold && off < s.cold_end;
        if let Some(s) = self.sites_of(block).iter().find(in_cold) {
            return Some(s.rip);
        }
        let insns = self.insns_of(block);
        let i = insns.partition_point(|&(h, _)| u32::from(h) <= off);
        let r = insns.get(i.wrapping_sub(1)).map_or(0, |&(_, r)| r);
        Some(block.key.rip.wrapping_add(u64::from(r)))
    }

    /// The guest instruction that `pc` belongs to, if it has had no effect so far. `bounced`: if this
    /// is an access, the slow path has been there and read the operand.
    pub fn restart_at(&self, pc: u64, bounced: bool) -> Option<u64> {
        let block = self.block_at(pc)?;
        let off = pc.wrapping_sub(block.host) as u32;
        let sites = self.sites_of(block);
        let strings = self.strings_of(block);
        if let Some(s) = strings.iter().find(|s| off >= s.look && off <= s.begun) {
            return Some(s.rip);
        }
        // On the way to the slow path: the call has five bytes.
        if let Some(s) = sites.iter().find(|s| off >= s.cold && off + 5 <= s.ret) {
            let first = sites.iter().find(|f| f.rip == s.rip)?;
            return (first.cold == s.cold).then_some(s.rip);
        }
        let insns = self.insns_of(block);
        let i = insns.partition_point(|&(h, _)| u32::from(h) <= off).checked_sub(1)?;
        let &(start, r) = insns.get(i)?;
        let rip = block.key.rip.wrapping_add(u64::from(r));
        let before = || {
            let first = sites.iter().find(|s| s.rip == rip);
            first.is_some_and(|s| s.is_looked_up_at(off) || off == u32::from(s.op) && !bounced)
        };
        (u32::from(start) == off || before()).then_some(rip)
    }

    /// The address of the guest instruction behind the one whose store is committed by the call that
    /// returns to `ret`, when nothing of that one is left to do.
    pub fn end_of_store(&self, ret: u64) -> Option<u64> {
        let block = self.block_at(ret)?;
        let off = ret.wrapping_sub(block.host) as u32;
        let site = self.sites_of(block).iter().find(|s| s.commit_ret == off)?;
        let &(_, r) = self.insns_of(block).iter().find(|i| i.0 == site.op_end)?;
        Some(block.key.rip.wrapping_add(u64::from(r)))
    }

    /// Makes an empty block record for [`CodeCache::push_block`].
    pub fn record(key: BlockKey) -> Block {
        Block {
            key,
            guest_len: 0,
            second_page: None,
            host: 0,
            len: 0,
            cold: 0,
            cold_len: 0,
            insns: (0, 0),
            sites: (0, 0),
            strings: (0, 0),
            others: [(0, 0); 3],
            fixups: (0, 0),
            incoming: NO_LINK,
            looks: 0,
            valid: true,
        }
    }

    /// Finds a block.
    pub fn find(&self, key: &BlockKey) -> Option<BlockId> {
        self.map.get(key).copied()
    }

    /// The block with an id.
    pub fn block(&self, id: BlockId) -> Option<&Block> {
        self.blocks.get(id.0 as usize)
    }

    /// The block whose code contains host address `pc`.
    pub fn block_at(&self, pc: u64) -> Option<&Block> {
        self.blocks.get(self.index_at(pc)?)
    }

    fn index_at(&self, pc: u64) -> Option<usize> {
        let cold = pc >= self.rx + self.cold_start as u64;
        if cold {
            let i = self.stubs.partition_point(|s| s.host <= pc);
            let stub = i.checked_sub(1).and_then(|i| self.stubs.get(i));
            if let Some(stub) = stub.filter(|s| pc < s.host + u64::from(s.len)) {
                return Some(stub.block);
            }
        }
        let start = |b: &Block| if cold { b.cold } else { b.host };
        let i = self.blocks.partition_point(|b| start(b) <= pc).checked_sub(1)?;
        let b = self.blocks.get(i)?;
        let len = if cold { b.cold_len } else { b.len };
        (pc <= start(b) + u64::from(len)).then_some(i)
    }

    /// Number of the access that faulted at host address `pc`.
    pub fn site_at(&self, pc: u64) -> Option<u64> {
        let block = self.block_at(pc)?;
        let off = pc.wrapping_sub(block.host) as u32;
        let i = self.sites_of(block).iter().position(|s| s.contains(off))?;
        Some(u64::from(block.sites.0) + i as u64)
    }

    /// The block of access `n`, which is at `pc`, and its code.
    pub fn body_at(&self, pc: u64) -> Option<(&Block, &[u8])> {
        let block = self.block_at(pc)?;
        Some((block, self.bytes(block.host, block.len)?))
    }

    /// Appends the slow path of access `n`, which is at `pc`.
    pub fn push_stub(&mut self, n: u64, pc: u64, site: Site, code: &[u8]) {
        let Some(block) = self.index_at(pc) else { return };
        let Some(known) = self.sites.get_mut(n as usize) else { return };
        *known = site;
        let host = self.next_cold();
        self.write(host, code);
        self.cold_used = (self.cold_used + code.len()).next_multiple_of(16);
        self.stubs.push(Stub { host, len: code.len() as u32, block });
    }

    /// A link by number.
    pub fn link(&self, n: u32) -> Option<Link> {
        self.links.get(n as usize).copied()
    }

    fn patch(&mut self, link: &Link, to: u64) {
        let rel = to.wrapping_sub(link.patch) as u32;
        self.write(link.patch - 4, &rel.to_le_bytes());
    }

    /// Points link `n` at a block.
    pub fn connect(&mut self, n: u32, to: BlockId, far: bool) {
        let Some(link) = self.link(n) else { return };
        let Some(b) = self.blocks.get_mut(to.0 as usize) else { return };
        if !b.valid {
            return;
        }
        let host = b.host;
        self.list(n, to.0);
        self.patch(&link, host);
        if far {
            self.far_links.push(n);
        }
    }

    /// Puts link `n` into the list of a block. Undone links may still be in one.
    fn list(&mut self, n: u32, block: u32) {
        let Some(&(next, owner)) = self.listed.get(n as usize) else { return };
        if owner == block {
            return;
        }
        if let Some(old) = self.blocks.get_mut(owner as usize) {
            let mut at = old.incoming;
            if at == n {
                old.incoming = next;
            }
            while let Some(entry) = self.listed.get_mut(at as usize) {
                if entry.0 == n {
                    entry.0 = next;
                }
                at = entry.0;
            }
        }
        if let Some(b) = self.blocks.get_mut(block as usize) {
            let before = std::mem::replace(&mut b.incoming, n);
            self.listed[n as usize] = (before, block);
        }
    }

    /// Appends code of no block and points link `n` at it.
    pub fn connect_to(&mut self, n: u32, code: &[u8]) {
        let Some(link) = self.link(n) else { return };
        if !self.fits(code.len()) {
            return;
        }
        let host = self.next_cold();
        self.write(host, code);
        self.cold_used = (self.cold_used + code.len()).next_multiple_of(16);
        self.patch(&link, host);
    }

    /// Notes that an access trapped because it crossed into another page; gives the block's key and
    /// takes the block out of use once that has happened too often for a trap each.
    pub fn crossed(&mut self, n: u64, pc: u64) -> Option<BlockKey> {
        let site = self.sites.get_mut(usize::try_from(n).ok()?)?;
        site.crossings = site.crossings.saturating_add(1);
        if site.crossings != CROSSINGS_MAX {
            return None;
        }
        let key = self.block_at(pc)?.key;
        self.retire(&key);
        Some(key)
    }

    /// Makes a block unfindable. Code that runs in it may go on.
    fn retire(&mut self, key: &BlockKey) {
        let Some(id) = self.map.remove(key) else { return };
        let Some(b) = self.blocks.get_mut(id.0 as usize) else { return };
        b.valid = false;
        let mut incoming = std::mem::replace(&mut b.incoming, NO_LINK);
        while let Some(l) = self.link(incoming) {
            self.patch(&l, l.stub);
            let entry = self.listed.get_mut(incoming as usize);
            incoming = entry.map_or(NO_LINK, |e| std::mem::replace(e, NOT_LISTED).0);
        }
    }

    /// Undoes all links between different pages.
    pub fn disconnect_far(&mut self) {
        for n in std::mem::take(&mut self.far_links) {
            if let Some(l) = self.link(n) {
                self.patch(&l, l.stub);
            }
        }
    }

    /// Drops the blocks made from a guest physical page; tells whether there were any.
    pub fn invalidate_page(&mut self, page: u64) -> bool {
        let Some(ids) = self.pages.remove(&page) else { return false };
        for id in &ids {
            if let Some(key) = self.block(*id).filter(|b| b.valid).map(|b| b.key) {
                self.retire(&key);
            }
        }
        true
    }
}
