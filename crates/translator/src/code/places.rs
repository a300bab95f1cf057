//! What a host address in the cache belongs to.

use super::notes::StringSite;
use super::segment::{Segment, index_of, number, segment_of};
use super::{Block, BlockId, BlockKey, CodeCache, Site, Slow, Stub};

/// Where generated code goes on after a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GoesOn {
    /// There.
    At(u64),
    /// An access has no slow path so far.
    First,
}

impl CodeCache {
    /// The block whose code contains host address `pc`.
    pub fn block_at(&self, pc: u64) -> Option<&Block> {
        self.block(BlockId(self.index_at(pc)?))
    }

    pub(super) fn index_at(&self, pc: u64) -> Option<u32> {
        let offset = usize::try_from(pc.checked_sub(self.rx)?).ok()?;
        let holds = |(n, s): (usize, &'_ Segment)| Some((n, s.holds(offset)?));
        let (n, cold) = self.segments.iter().enumerate().find_map(holds)?;
        let segment = &self.segments[n];
        if cold {
            let i = segment.stubs.partition_point(|s| s.place as usize <= offset);
            let stub = i.checked_sub(1).and_then(|i| segment.stubs.get(i));
            if let Some(stub) = stub.filter(|s| offset < s.place as usize + s.len as usize) {
                return Some(stub.block);
            }
        }
        let start = |b: &Block| self.host(b) + if cold { u64::from(b.cold) } else { 0 };
        let i = segment.blocks.partition_point(|b| start(b) <= pc).checked_sub(1)?;
        let b = segment.blocks.get(i)?;
        let len = if cold { b.cold_len } else { b.len };
        (pc <= start(b) + u64::from(len)).then_some(number(n, i))
    }

    /// The block at `pc`, and the offset from its start.
    fn offset_at(&self, pc: u64) -> Option<(u32, &Block, u32)> {
        let id = self.index_at(pc)?;
        let block = self.block(BlockId(id))?;
        Some((id, block, pc.wrapping_sub(self.host(block)) as u32))
    }

    fn sites_of(&self, id: u32) -> &[Site] {
        let (notes, start, end) = self.notes_of(id);
        notes.sites_between(start, end)
    }

    fn strings_of(&self, id: u32) -> &[StringSite] {
        let (notes, start, end) = self.notes_of(id);
        notes.strings_between(start, end)
    }

    /// Number of the first access of a block.
    fn first_site(&self, id: u32) -> u32 {
        number(segment_of(id), self.notes_of(id).1.sites as usize)
    }

    /// Slow paths of a block, with the numbers of their accesses.
    fn slow_of(&self, id: u32) -> impl Iterator<Item = (u32, &Slow)> {
        let (notes, start, end) = self.notes_of(id);
        let segment = segment_of(id);
        let slow = notes.slow.range(start.sites..end.sites);
        slow.map(move |(n, slow)| (number(segment, *n as usize), slow))
    }

    /// Offsets in the host and in the guest where the instructions of a block begin.
    fn instructions_of(&self, id: u32) -> impl Iterator<Item = (u32, u16)> {
        let (notes, start, end) = self.notes_of(id);
        notes.instructions(start, end)
    }

    /// Where a fault of a memory access at `pc` is dealt with; called by the signal handler.
    pub fn fault_target(&self, pc: u64) -> Option<GoesOn> {
        let (id, b, off) = self.offset_at(pc)?;
        let at = |offset: u32| Some(GoesOn::At(self.at(b, offset)));
        for (_, s) in self.slow_of(id) {
            if s.contains(off) {
                return at(s.cold);
            }
            let [start, end, fix] = s.cross;
            if off >= start && off < end {
                return at(fix);
            }
        }
        for (n, s) in (self.first_site(id)..).zip(self.sites_of(id)) {
            if s.contains(off) {
                return self.slow(n.into()).map_or(Some(GoesOn::First), |slow| at(slow.cold));
            }
        }
        for s in self.strings_of(id) {
            if off >= s.look && off < s.begun {
                return at(s.cold);
            }
            if off == s.op {
                return at(s.cold_fault);
            }
        }
        None
    }

    /// Where to go on to leave a string instruction that is under way at `pc`.
    pub fn string_stop(&self, pc: u64) -> Option<u64> {
        let (id, block, off) = self.offset_at(pc)?;
        let site = self.strings_of(id).iter().find(|s| s.op == off)?;
        Some(self.at(block, site.cold_stop))
    }

    /// Address of the guest instruction that host address `pc` belongs to.
    pub fn rip_at(&self, pc: u64) -> Option<u64> {
        let (id, _, off) = self.offset_at(pc)?;
        // Slow paths lie behind the body and name their instruction in their site.
        let slow = self.slow_of(id).find(|(_, s)| off >= s.cold && off < s.cold_end);
        let site = slow.and_then(|(n, _)| self.site(n.into()));
        let (_, rip) = self.begun_at(id, site.map_or(off, |s| s.op.into())).unwrap_or_default();
        Some(self.rip_of(id).wrapping_add(rip.into()))
    }

    /// The last guest instruction of a block that begins up to a host offset.
    fn begun_at(&self, id: u32, off: u32) -> Option<(u32, u16)> {
        self.instructions_of(id).take_while(|&(host, _)| host <= off).last()
    }

    /// The guest instruction that `pc` belongs to, if it has had no effect so far. `bounced`: if this
    /// is an access, the slow path has been there and read the operand.
    pub fn restart_at(&self, pc: u64, bounced: bool) -> Option<u64> {
        let (id, _, off) = self.offset_at(pc)?;
        let at = |rip: u16| Some(self.rip_of(id).wrapping_add(rip.into()));
        let sites = self.sites_of(id);
        if let Some(s) = self.strings_of(id).iter().find(|s| off >= s.look && off <= s.begun) {
            return at(s.rip);
        }
        // On the way to the slow path: the call has five bytes.
        if let Some((n, _)) = self.slow_of(id).find(|(_, s)| off >= s.cold && off + 5 <= s.ret) {
            let (first, rip) = self.instruction_of(n.into(), id)?;
            return if first { at(rip) } else { None };
        }
        let (start, rip) = self.begun_at(id, off)?;
        let before = || {
            let first = sites.iter().find(|s| u32::from(s.op) >= start);
            first.is_some_and(|s| s.is_looked_up_at(off) || off == u32::from(s.op) && !bounced)
        };
        if start == off || before() { at(rip) } else { None }
    }

    /// The address of the guest instruction behind the one whose store is committed by the call that
    /// returns to `ret`, when nothing of that one is left to do.
    pub fn end_of_store(&self, ret: u64) -> Option<u64> {
        let (id, _, off) = self.offset_at(ret)?;
        let (n, _) = self.slow_of(id).find(|(_, s)| s.commit_ret == off)?;
        let end = u32::from(self.site(n.into())?.op_end);
        let (_, rip) = self.instructions_of(id).find(|i| i.0 == end)?;
        Some(self.rip_of(id).wrapping_add(rip.into()))
    }

    /// Number of the access that faulted at host address `pc`.
    pub fn site_at(&self, pc: u64) -> Option<u64> {
        let (id, _, off) = self.offset_at(pc)?;
        let i = self.sites_of(id).iter().position(|s| s.contains(off))?;
        Some(u64::from(self.first_site(id)) + i as u64)
    }

    /// An access by number.
    pub fn site(&self, n: u64) -> Option<&Site> {
        let n = u32::try_from(n).ok()?;
        self.of(n)?.notes.sites.get(index_of(n) as usize)
    }

    /// The slow path of an access, if there is one.
    pub fn slow(&self, n: u64) -> Option<&Slow> {
        let n = u32::try_from(n).ok()?;
        self.of(n)?.notes.slow.get(&index_of(n))
    }

    /// The instruction of access `n` of a block: whether the access is its first, and its offset.
    fn instruction_of(&self, n: u64, id: u32) -> Option<(bool, u16)> {
        let (start, rip) = self.begun_at(id, self.site(n)?.op.into())?;
        let first = u64::from(self.first_site(id));
        let before = n.checked_sub(1).filter(|&n| n >= first).and_then(|n| self.site(n));
        Some((before.is_none_or(|s| u32::from(s.op) < start), rip))
    }

    /// The guest instruction of access `n`, which is at `pc`: its address, and whether this is its
    /// first access.
    pub fn accessing(&self, n: u64, pc: u64) -> Option<(u64, bool)> {
        let id = self.index_at(pc)?;
        let (first, rip) = self.instruction_of(n, id)?;
        Some((self.rip_of(id).wrapping_add(rip.into()), first))
    }

    /// An indirect branch by number: address and what it took from RSP.
    pub fn branch(&self, n: u64) -> Option<(u64, i32)> {
        let n = u32::try_from(n).ok()?;
        let branch = self.of(n)?.notes.branches.get(index_of(n) as usize)?;
        let index = self.of(n)?.owner(|notes| notes.branches, index_of(n))?;
        Some((self.of(n)?.rip(index).wrapping_add(branch.rip.into()), branch.taken))
    }

    /// An instruction for a helper by number.
    pub fn helper(&self, n: u64) -> Option<&super::Helped> {
        let n = u32::try_from(n).ok()?;
        self.of(n)?.notes.helpers.get(index_of(n) as usize)
    }

    /// What the block at `pc` is found by.
    pub fn key_at(&self, pc: u64) -> Option<BlockKey> {
        self.key_of(self.index_at(pc)?)
    }

    /// The block at `pc` and the code of its body.
    pub fn body_at(&self, pc: u64) -> Option<(&Block, &[u8])> {
        let block = self.block_at(pc)?;
        Some((block, self.bytes(self.host(block), block.len.into())?))
    }

    /// Appends the slow path of access `n`, which is at `pc`.
    pub fn push_stub(&mut self, n: u64, pc: u64, slow: Slow, code: &[u8]) {
        let (Some(block), Ok(n)) = (self.index_at(pc), u32::try_from(n)) else { return };
        let Some(segment) = self.of_mut(n) else { return };
        segment.notes.slow.insert(index_of(n), slow);
        let host = self.next_cold();
        self.write(host, code);
        let place = (host - self.rx) as u32;
        let segment = &mut self.segments[self.current];
        segment.cold_used = (segment.cold_used + code.len()).next_multiple_of(16);
        let stub = Stub { place, len: code.len() as u32, block, site: n };
        segment.stubs.push(&mut self.store, stub);
    }
}
