//! Copies of blocks at other guest addresses.
//!
//! A program that is loaded at another address each time is the same code in the same frames. What
//! depends on the address, or on where the host code lies, is noted while a block is made; a copy
//! gets it put right. A block of an address space that is gone is put right where it is.

use berth_x86::paging::canonical;

use crate::layout::jump_cache_moved;

use super::segment::{number, segment_of};
use super::{BlockId, BlockKey, CodeCache, Fix, Fixup, Made, NONE, Notes};

/// A copy of a block for another guest address.
pub struct Moved {
    key: BlockKey,
    ends: (u8, u8),
    code: Vec<u8>,
    cold: Vec<u8>,
    notes: Notes,
    movable: bool,
}

impl Moved {
    /// The copy must be what the translator would make, unless that found out since that an
    /// instruction crosses into another page, or ends the block where another one begins.
    pub fn check(&self, made: &Made<'_>) {
        if self.ends != made.ends || self.notes.counts().steps != made.notes.counts().steps {
            return;
        }
        let (fresh, copied) = ((made.code, made.cold), (&self.code[..], &self.cold[..]));
        assert_eq!(copied, fresh, "a copied block at {:#x}", self.key.rip);
        assert_eq!(format!("{:?}", self.notes), format!("{:?}", made.notes));
    }

    /// As a translation.
    pub fn made(&self) -> Made<'_> {
        Made {
            key: self.key,
            second_page: None,
            ends: self.ends,
            target: true,
            movable: self.movable,
            code: &self.code,
            cold: &self.cold,
            notes: &self.notes,
        }
    }
}

/// A block that is at another guest address now.
#[derive(Clone, Copy, Debug)]
pub struct Went {
    /// Where it was.
    pub from: u64,
    /// Where it is.
    pub to: u64,
    /// Its host address.
    pub host: u64,
    /// Something jumps there.
    pub target: bool,
}

/// Puts right what depends on the guest address; `None` when the instruction that loads one could
/// not hold it.
fn put_right(bytes: &mut [u8], fixup: Fixup, delta: u64) -> Option<()> {
    let end = fixup.end;
    if fixup.kind == Fix::Entry {
        let field = field(bytes, end)?;
        let moved = jump_cache_moved(i32::from_le_bytes(*field), delta);
        *field = moved.to_le_bytes();
        return Some(());
    }
    let field = bytes.get_mut(end.checked_sub(8)?..end)?.as_mut_array::<8>()?;
    let old = u64::from_le_bytes(*field);
    let not = fixup.kind == Fix::NotAddress;
    let new = if not { old.wrapping_sub(delta) } else { old.wrapping_add(delta) };
    // A jump to where none can go has a number by which its fault is found.
    if !not && canonical(old) != canonical(new) {
        return None;
    }
    // Others would be loaded by a shorter instruction.
    if u32::try_from(new).is_ok() || i32::try_from(new as i64).is_ok() {
        return None;
    }
    *field = new.to_le_bytes();
    Some(())
}

/// The four bytes that end at `end`.
fn field(bytes: &mut [u8], end: usize) -> Option<&mut [u8; 4]> {
    bytes.get_mut(end.checked_sub(4)?..end)?.as_mut_array()
}

/// Whether it depends on the guest address and on nothing else.
const fn is_address(kind: Fix) -> bool {
    matches!(kind, Fix::Address | Fix::NotAddress | Fix::Entry)
}

impl CodeCache {
    /// The blocks of the same code as `key`.
    fn same_code(&self, key: &BlockKey) -> impl Iterator<Item = u32> {
        self.made_of(key.gpa, key.mode)
            .filter(|&id| self.block(BlockId(id)).is_some_and(|b| b.valid))
    }

    /// Changes a block of the same code, of an address space that `is_gone`, into one for `key` in the
    /// space `space`, and with it what else there is of its page, so that they stay linked; `went` says
    /// which. Whatever knew blocks under their former addresses has to forget them.
    pub fn moved_in_place(
        &mut self,
        key: &BlockKey,
        space: u16,
        is_gone: impl Fn(u16) -> bool,
        went: &mut Vec<Went>,
    ) -> Option<BlockId> {
        went.clear();
        let gone = |id: &u32| {
            let block = self.block(BlockId(*id));
            block.is_some_and(|b| b.movable)
                && self.space_of(*id).is_some_and(&is_gone)
                && !self.leaves(*id)
        };
        let id = self.same_code(key).find(gone)?;
        let (first, first_space) = (*self.block(BlockId(id))?, self.space_of(id));
        let first_rip = self.rip_of(id);
        let delta = key.rip.wrapping_sub(first_rip);
        let mut work = Vec::new();
        went.push(self.move_one(id, delta, space, &mut work)?);
        let page = first.gpa >> 12;
        let mut all: Vec<u32> = Vec::new();
        for (n, segment) in self.segments.iter().enumerate() {
            all.extend(segment.in_page(n, page));
        }
        let (to, from) = (key.rip.wrapping_sub(key.gpa), first_rip.wrapping_sub(first.gpa));
        // Usually none was made at the new address so far.
        let others = all.iter().any(|&other| {
            other != id
                && self.block(BlockId(other)).is_some_and(|b| b.valid)
                && self.base_of(other) == Some(to)
        });
        let mut stayed = false;
        for &other in &all {
            // Only blocks at addresses like the first one's are linked with it.
            if other == id || self.base_of(other) != Some(from) {
                continue;
            }
            let Some(&b) = self.block(BlockId(other)) else { continue };
            if !b.valid {
                // It may still be run.
                stayed = true;
                continue;
            }
            let rip = self.rip_of(other).wrapping_add(delta);
            let there = BlockKey { rip, gpa: b.gpa, mode: b.mode };
            let alike = b.movable
                && (b.mode, self.space_of(other)) == (first.mode, first_space)
                && !self.leaves(other)
                && !(others && self.find(&there).is_some());
            let moved = alike.then(|| self.move_one(other, delta, space, &mut work)).flatten();
            stayed |= moved.is_none();
            went.extend(moved);
        }
        for other in all {
            if stayed || self.block(BlockId(other)).is_some_and(|b| b.detoured) {
                self.undo_wrong_links(other);
            }
        }
        Some(BlockId(id))
    }

    /// From its physical to its guest address: the same for all blocks of a page that is mapped there.
    fn base_of(&self, id: u32) -> Option<u64> {
        Some(self.rip_of(id).wrapping_sub(self.block(BlockId(id))?.gpa))
    }

    /// Undoes the links of a block that do not lead to the block at their target's address.
    fn undo_wrong_links(&mut self, id: u32) {
        let Some(&b) = self.block(BlockId(id)) else { return };
        let rip = self.rip_of(id);
        let (_, start, end) = self.notes_of(id);
        let base = number(segment_of(id), 0);
        for n in start.links..end.links {
            let n = base | n;
            let (Some(link), Some(&(_, owner))) = (self.link(n), self.listed(n)) else { continue };
            if owner == NONE {
                continue;
            }
            let target = b.guest(rip, i64::from(link.delta));
            let right =
                self.block(BlockId(owner)).is_some_and(|t| t.valid) && self.rip_of(owner) == target;
            if !right {
                self.patch(n, None);
            }
        }
    }

    /// Puts a block right for an address `delta` further on. `None`: it cannot be there. `work` is room
    /// for what is to be written.
    fn move_one(
        &mut self,
        id: u32,
        delta: u64,
        space: u16,
        work: &mut Vec<(u64, usize, [u8; 8])>,
    ) -> Option<Went> {
        let b = *self.block(BlockId(id))?;
        let host = self.host(&b);
        let (notes, start, end) = self.notes_of(id);
        work.clear();
        for fixup in notes.fixups_between(start, end, b.len.into()) {
            if !is_address(fixup.kind) {
                continue;
            }
            let part = if fixup.cold { host + u64::from(b.cold) } else { host };
            let len = if fixup.kind == Fix::Entry { 4 } else { 8 };
            let at = part + (fixup.end - len) as u64;
            let mut field = [0; 8];
            field[8 - len..].copy_from_slice(self.bytes(at, len as u32)?);
            put_right(&mut field, Fixup { end: 8, ..fixup }, delta)?;
            work.push((at, len, field));
        }
        for (at, len, field) in work.drain(..) {
            self.write(at, &field[8 - len..]);
        }
        let notes = &mut self.segments.get_mut(segment_of(id))?.notes;
        notes.shift_helpers(&mut self.store, start, end, delta);
        // Slow paths that were made later hold the old address.
        let own = b.cold..b.cold + u32::from(b.cold_len);
        let sites = start.sites..end.sites;
        let later = notes.slow.range(sites).filter(|(_, s)| !own.contains(&s.cold));
        let later: Vec<u32> = later.map(|(n, _)| *n).collect();
        for n in later {
            notes.slow.remove(&n);
        }
        let from = self.rip_of(id);
        let to = from.wrapping_add(delta);
        self.segments.get_mut(segment_of(id))?.set_rip(&mut self.store, id, to);
        self.set_space(id, space);
        Some(Went { from, to, host, target: b.target })
    }

    /// A block that is in the segment to be dropped next, to be put at the end of the cache instead;
    /// it is found no more.
    pub fn rescued(&mut self, id: BlockId) -> Option<Moved> {
        if !self.leaves(id.0) || self.second_page(id).is_some() {
            return None;
        }
        let moved = self.copy(id, &self.key_of(id.0)?)?;
        self.retire(id.0);
        Some(moved)
    }

    /// A copy of a translation of the same code for another guest address, to be put at the end of
    /// the cache.
    pub fn moved(&self, key: &BlockKey) -> Option<Moved> {
        let movable = |id: &u32| self.block(BlockId(*id)).is_some_and(|b| b.movable);
        let id = self.same_code(key).find(movable)?;
        self.copy(BlockId(id), key)
    }

    /// A block as it would be at the end of the cache.
    pub fn as_new(&self, id: BlockId) -> Option<Moved> {
        self.copy(id, &self.key_of(id.0)?)
    }

    fn copy(&self, BlockId(id): BlockId, key: &BlockKey) -> Option<Moved> {
        let b = self.block(BlockId(id))?;
        let delta = key.rip.wrapping_sub(self.rip_of(id));
        let host = self.host(b);
        let (notes, start, end) = self.notes_of(id);
        let (from, to) = (host + u64::from(b.cold), self.next_cold());
        let shift = Shift {
            hot: self.next_host().wrapping_sub(host) as u32,
            cold: to.wrapping_sub(from) as u32,
            own: b.cold..b.cold + u32::from(b.cold_len),
        };
        let mut code = self.bytes(host, b.len.into())?.to_vec();
        let mut cold = self.bytes(from, b.cold_len.into())?.to_vec();
        let fixups = notes.fixups_between(start, end, b.len.into());
        let mut notes = notes.between(start, end);
        let (now, start) = (self.counts(), start.numbered(number(segment_of(id), 0)));
        for fixup in fixups {
            let bytes = if fixup.cold { &mut cold } else { &mut code };
            if is_address(fixup.kind) {
                if delta != 0 {
                    put_right(bytes, fixup, delta)?;
                }
                continue;
            }
            let field = field(bytes, fixup.end)?;
            let by = match (fixup.kind, fixup.cold) {
                (Fix::Absolute, false) => shift.hot.wrapping_neg(),
                (Fix::Absolute, true) => shift.cold.wrapping_neg(),
                (Fix::Across, false) => shift.apart(),
                (Fix::Across, true) => shift.apart().wrapping_neg(),
                (Fix::Site, _) => now.sites.wrapping_sub(start.sites),
                (Fix::Link, _) => now.links.wrapping_sub(start.links),
                (Fix::Branch, _) => now.branches.wrapping_sub(start.branches),
                _ => now.helpers.wrapping_sub(start.helpers),
            };
            *field = u32::from_le_bytes(*field).wrapping_add(by).to_le_bytes();
        }
        for link in &notes.links {
            // The original may lead to a block.
            let stub = b.cold.wrapping_add(shift.apart()).wrapping_add(link.stub.into());
            *field(&mut code, link.patch.into())? =
                stub.wrapping_sub(link.patch.into()).to_le_bytes();
        }
        notes.slow.retain(|_, slow| shift.own.contains(&slow.cold));
        for slow in notes.slow.values_mut() {
            let places = [&mut slow.cold, &mut slow.cold_end, &mut slow.ret];
            let more = [&mut slow.commit_ret, &mut slow.direct];
            for place in places.into_iter().chain(more).chain(&mut slow.cross) {
                *place = shift.place(*place);
            }
        }
        for s in &mut notes.strings {
            let places = [&mut s.look, &mut s.begun, &mut s.op];
            for place in
                places.into_iter().chain([&mut s.cold, &mut s.cold_fault, &mut s.cold_stop])
            {
                *place = shift.place(*place);
            }
        }
        for helped in &mut notes.helpers {
            helped.shift(delta);
        }
        Some(Moved { key: *key, ends: b.ends, code, cold, notes, movable: b.movable })
    }
}

/// How far the parts of a block move.
struct Shift {
    hot: u32,
    cold: u32,
    /// Where the cold part was.
    own: std::ops::Range<u32>,
}

impl Shift {
    /// How far the cold part moves away from the body.
    const fn apart(&self) -> u32 {
        self.cold.wrapping_sub(self.hot)
    }

    /// An offset in the moved block.
    fn place(&self, at: u32) -> u32 {
        if at >= self.own.start { at.wrapping_add(self.apart()) } else { at }
    }
}
