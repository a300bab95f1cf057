//! How blocks jump to each other.

use super::{
    Block, BlockId, CodeCache, DETOUR, FAR_GIBS, Link, NONE, NOT_LISTED, index_of, segment_of,
};

impl CodeCache {
    /// Empties a block's list of incoming links; gives the last one that was made.
    pub(super) fn take_incoming(&mut self, id: u32) -> Option<u32> {
        let last = *self.of(id)?.incoming.get(index_of(id) as usize)?;
        self.set_incoming(id, NONE);
        Some(last)
    }

    pub(super) fn set_incoming(&mut self, id: u32, link: u32) {
        if let Some(segment) = self.segments.get_mut(segment_of(id)) {
            segment.incoming.set(&mut self.store, index_of(id) as usize, link);
        }
    }

    pub(super) fn listed(&self, link: u32) -> Option<&(u32, u32)> {
        self.of(link)?.listed.get(index_of(link) as usize)
    }

    pub(super) fn listed_mut(&mut self, link: u32) -> Option<&mut (u32, u32)> {
        let segment = self.segments.get_mut(segment_of(link))?;
        segment.listed.edit(&mut self.store, index_of(link) as usize)
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
        let segment = self.of(n)?;
        let index = segment.owner(|notes| notes.links, index_of(n))?;
        let delta = i64::from(self.link(n)?.delta);
        Some(segment.blocks.get(index)?.guest(segment.rip(index), delta))
    }

    /// Points a link at a host address, or at its exit.
    pub(super) fn patch(&mut self, n: u32, to: Option<u64>) {
        let (Some(link), Some(b)) = (self.link(n), self.source_of(n)) else { return };
        let host = self.host(b);
        let end = host + u64::from(link.patch);
        let to = to.unwrap_or(host + u64::from(b.cold) + u64::from(link.stub));
        self.write(end - 4, &(to.wrapping_sub(end) as u32).to_le_bytes());
    }

    /// Points link `n` at a block.
    pub fn connect(&mut self, n: u32, to: BlockId, far: bool) {
        let Some(b) = self.block(to).filter(|b| b.valid) else { return };
        let host = self.host(b);
        if far {
            if !self.far_links.has_room(1) {
                return;
            }
            if let Some(target) = self.target_of(n) {
                let (word, bit) = Self::reach(target);
                self.far_reach[word] |= bit;
            }
            self.far_links.push(&mut self.store, n);
        }
        self.list(n, to.0);
        self.patch(n, Some(host));
    }

    /// Puts link `n` into the list of a block. Undone links may still be in one.
    pub(super) fn list(&mut self, n: u32, block: u32) {
        let Some(&(next, owner)) = self.listed(n) else { return };
        if owner == block {
            return;
        }
        let incoming = |cache: &Self, id: u32| {
            cache.of(id).and_then(|s| s.incoming.get(index_of(id) as usize)).copied()
        };
        if let Some(mut at) = incoming(self, owner) {
            if at == n {
                self.set_incoming(owner, next);
            }
            while let Some(&(following, _)) = self.listed(at) {
                if following == n
                    && let Some(entry) = self.listed_mut(at)
                {
                    entry.0 = next;
                }
                at = if following == n { next } else { following };
            }
        }
        let before = incoming(self, block);
        if before.is_some() {
            self.set_incoming(block, n);
        }
        if let Some(entry) = self.listed_mut(n) {
            *entry = before.map_or((NONE, block), |before| (before, block));
        }
    }

    /// Appends code of no block and points link `n` at it.
    pub fn connect_to(&mut self, n: u32, code: &[u8]) {
        if !self.fits(code.len()) {
            return;
        }
        let host = self.next_cold();
        self.write(host, code);
        let segment = &mut self.segments[self.current];
        segment.cold_used = (segment.cold_used + code.len()).next_multiple_of(16);
        segment.detours.push(n);
        self.list(n, DETOUR);
        self.patch(n, Some(host));
        let segment = self.segments.get_mut(segment_of(n));
        if let Some(segment) = segment
            && let Some(source) = segment.owner(|notes| notes.links, index_of(n))
            && let Some(source) = segment.blocks.edit(&mut self.store, source)
        {
            source.detoured = true;
        }
    }

    /// Undoes the links to a block.
    pub(super) fn disconnect_from(&mut self, id: u32) {
        let Some(mut incoming) = self.take_incoming(id) else { return };
        while let Some(entry) = self.listed_mut(incoming) {
            let (next, _) = std::mem::replace(entry, NOT_LISTED);
            self.patch(incoming, None);
            incoming = next;
        }
    }

    /// Where in [`CodeCache::far_reach`] the bit of a guest address is.
    pub(super) const fn reach(address: u64) -> (usize, u64) {
        let gib = (address >> 30) as usize % FAR_GIBS;
        (gib / 64, 1 << (gib % 64))
    }

    /// Undoes the links between different pages when any may lead to the page of an address, however
    /// large that is.
    pub fn disconnect_far_to(&mut self, address: u64) {
        let (word, bit) = Self::reach(address);
        if self.far_reach[word] & bit != 0 {
            self.disconnect_far();
        }
    }

    /// Undoes all links between different pages.
    pub fn disconnect_far(&mut self) {
        for i in 0..self.far_links.len() {
            if let Some(&n) = self.far_links.get(i) {
                self.patch(n, None);
            }
        }
        self.far_links.clear();
        self.far_reach = [0; FAR_GIBS / 64];
    }
}
