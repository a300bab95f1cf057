//! Jump caches: where the translations of guest addresses begin, for indirect jumps.

use std::os::fd::AsRawFd;

use super::sources::Sources;
use super::{HEAD, Tlb, View};
use crate::layout::{AREA_SIZE, JC_ENTRIES, JC_SIZE};
use crate::sys;

/// Bytes of a jump cache of a vCPU that has had nothing to do: what little it does then would take a page
/// for each entry otherwise. It is mapped again and again, so that indexes count modulo its entries.
const SMALL: usize = JC_SIZE / 8;
/// Entries after which a small one is made large again.
const GROWS_AT: usize = 16_384;

/// What is in the jump cache of a view.
#[derive(Default)]
pub(super) struct JumpCache {
    /// Indexes of entries that are set.
    pub(super) journal: Vec<u16>,
    /// Where the code that they lead to comes from.
    sources: Sources,
    /// Pages of which everything known has been entered.
    complete: Sources,
}

/// The mapping that code was fetched through.
#[derive(Clone, Copy, Debug)]
pub struct Source {
    /// It is global.
    pub global: bool,
    /// It maps more than 4 KiB.
    pub large: bool,
}

impl Tlb {
    /// Drops everything and gives its memory back.
    pub fn give_back(&mut self) {
        self.drop_tables();
        let len = (self.slots.len() as u64 + 1) * JC_SIZE as u64;
        // Where that fails they keep it, and are empty.
        let _ = sys::punch_hole(self.fd.as_raw_fd(), AREA_SIZE as u64, len);
        for view in self.views() {
            *self.jc(view) = JumpCache::default();
        }
        if self.jc_room.replace(GROWS_AT).is_none() {
            self.map_jcs(SMALL);
        }
        self.jcs_shown = 0;
        self.init_jcs();
    }

    /// Maps all of a small jump cache for a view: its few pages are in so many places that a fault for each
    /// takes longer.
    fn show_small(&mut self, view: View) {
        let bit = 1u64.checked_shl(Self::place(view, 0).0 as u32).unwrap_or(0);
        if self.jcs_shown & bit == 0 {
            self.jcs_shown |= bit;
            // Else they are mapped one by one.
            let _ = sys::populate(self.base(view) - HEAD as u64, JC_SIZE);
        }
    }

    /// Maps so much of each jump cache, until it fills its place. What cannot be mapped stays as it is: any
    /// page of a jump cache does in any place of it, since tags are whole addresses.
    fn map_jcs(&self, bytes: usize) {
        let start = self.space.addr();
        let kernels =
            self.slots.iter().map(|slot| (slot.kernel_view, 0)).chain([(self.kernel_view, 0)]);
        let users = (1..).zip(&self.slots).map(|(jc, slot)| (slot.user_view, jc));
        for (base, jc) in kernels.chain(users) {
            let at = (base - start) as usize - HEAD;
            let file = (AREA_SIZE + jc * JC_SIZE) as u64;
            for piece in (0..JC_SIZE).step_by(bytes) {
                let rw = libc::PROT_READ | libc::PROT_WRITE;
                let _ = self.space.map_file(at + piece, bytes, rw, self.fd.as_raw_fd(), file);
            }
        }
    }

    /// Clears the jump caches of all views.
    pub fn clear_all_jcs(&mut self) {
        self.clear_jc(View::Kernel);
        for i in 0..self.slots.len() {
            self.clear_jc(View::User(i as u8));
        }
    }

    pub(super) fn jc(&mut self, view: View) -> &mut JumpCache {
        match view {
            // Kernel code is the same on all of its views.
            View::Kernel | View::KernelUser(_) => &mut self.jc_kernel,
            View::User(s) => &mut self.slots[usize::from(s)].jc_user,
        }
    }

    pub(super) fn jc_entry(&self, view: View, index: u16) -> *mut [u64; 2] {
        let start = (self.base(view) - HEAD as u64) as *mut [u64; 2];
        start.wrapping_add(usize::from(index))
    }

    fn jc_empty(&mut self, view: View, index: u16) {
        // SAFETY: the jump cache of a view has an entry for each `u16`, is mapped as long as we live
        // and used by this thread only.
        unsafe { self.jc_entry(view, index).write([Self::empty_tag(index), 0]) };
    }

    /// One view for each jump cache.
    fn views(&self) -> impl Iterator<Item = View> + use<> {
        (0..self.slots.len()).map(|s| View::User(s as u8)).chain([View::Kernel])
    }

    pub(super) fn clear_jc(&mut self, view: View) {
        self.returns_stale = true;
        let journal = std::mem::take(&mut self.jc(view).journal);
        if journal.is_empty() {
            return;
        }
        self.jc_clears += 1;
        self.jc_kernel_clears += u64::from(!matches!(view, View::User(_)));
        for &i in &journal {
            self.jc_empty(view, i);
        }
        let cache = self.jc(view);
        cache.journal = journal;
        cache.journal.clear();
        cache.sources = Sources::default();
        cache.complete = Sources::default();
    }

    /// A tag that matches no address whose index is `i`, canonical or not: address 0 has index 0, and
    /// address 1 has index 1. In a small jump cache all indexes do that are a multiple of its entries.
    const fn empty_tag(i: u16) -> u64 {
        if (i as usize).is_multiple_of(SMALL / 16) { 1u64.wrapping_neg() } else { 0 }
    }

    /// Writes the empty tags that are not zero; once, at creation.
    pub fn init_jcs(&mut self) {
        self.jc_kernel.journal.push(0);
        for s in &mut self.slots {
            s.jc_user.journal.push(0);
        }
        self.clear_all_jcs();
    }

    /// Where the translation of `rip` begins, if the jump cache of a view knows.
    pub fn jc_find(&self, view: View, rip: u64) -> Option<u64> {
        // SAFETY: as in `jc_empty`.
        let [tag, host] = unsafe { self.jc_entry(view, rip as u16).read() };
        (tag.wrapping_add(rip) == 0).then_some(host)
    }

    /// Forgets the translation of `rip` in the jump caches of all views.
    pub fn jc_forget(&mut self, rip: u64) {
        for view in self.views() {
            // Looking would give it memory, if it has none there yet.
            let sources = &self.jc(view).sources;
            let may_have = sources.have(rip >> 12, false) || sources.have(rip >> 30, true);
            if may_have && self.jc_find(view, rip).is_some() {
                self.jc_empty(view, rip as u16);
            }
        }
    }

    /// Forgets all translations that begin in the page of `va`, whose mapping has changed, or may
    /// go on there.
    pub fn jc_invalidate(&mut self, va: u64) {
        let page = va >> 12;
        // A block may begin in the page before.
        let pages = [page, page.wrapping_sub(1)];
        for view in self.views() {
            let sources = &self.jc(view).sources;
            if sources.have(va >> 30, true) {
                self.clear_jc(view);
            } else if pages.iter().any(|&p| sources.have(p, false)) {
                self.returns_stale = true;
                let journal = std::mem::take(&mut self.jc(view).journal);
                for &i in &journal {
                    // SAFETY: as in `jc_empty`.
                    let [tag, _] = unsafe { self.jc_entry(view, i).read() };
                    if pages.contains(&(tag.wrapping_neg() >> 12)) {
                        self.jc_empty(view, i);
                    }
                }
                self.jc(view).journal = journal;
            }
        }
    }

    /// Whether this is the first that the jump cache of a view hears of the page of `rip` since it was
    /// cleared.
    pub fn jc_is_new(&mut self, view: View, rip: u64) -> bool {
        let complete = &mut self.jc(view).complete;
        let is_new = !complete.have(rip >> 12, false);
        complete.add(rip, false);
        is_new
    }

    /// Remembers where the translation of `rip` begins, for indirect jumps on a view.
    pub fn jc_insert(&mut self, view: View, rip: u64, host: u64, source: Source) {
        self.jc_local |= !source.global && !matches!(view, View::User(_));
        if self.jc(view).journal.len() > JC_ENTRIES {
            self.clear_jc(view);
        }
        let index = rip as u16;
        if self.jc_room.is_some() {
            self.show_small(view);
        }
        if let Some(room) = &mut self.jc_room {
            *room -= 1;
            if *room == 0 {
                self.jc_room = None;
                // Nothing stays that could not be found to be forgotten.
                self.clear_all_jcs();
                self.map_jcs(JC_SIZE);
            }
        }
        let cache = self.jc(view);
        cache.journal.push(index);
        cache.sources.add(rip, source.large);
        // SAFETY: as in `jc_empty`.
        unsafe { self.jc_entry(view, index).write([rip.wrapping_neg(), host]) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A jump to 0xc000_0000_0000_0000 once matched the tag of empty entries and went to host
    /// address 0.
    #[test]
    fn empty_entries_match_no_address() {
        for i in 0..=u16::MAX {
            let rip = Tlb::empty_tag(i).wrapping_neg();
            assert_ne!(rip as u16, i);
            assert_ne!(rip as usize % (SMALL / 16), usize::from(i) % (SMALL / 16));
        }
    }

    #[test]
    fn a_small_jump_cache_finds_what_a_large_one_does() {
        let source = Source { global: true, large: false };
        let mut tlb = Tlb::new(2).unwrap();
        tlb.init_jcs();
        let views = [View::Kernel, View::User(1)];
        let check = |tlb: &mut Tlb, from: u64, count: u64| {
            for n in from..from + count {
                // Whole numbers of small ones apart, too.
                let rip = 0xffff_ffff_8000_0000 + n * 0x2003;
                for view in views {
                    assert_eq!(tlb.jc_find(view, rip), None, "{n}");
                    tlb.jc_insert(view, rip, n, source);
                    assert_eq!(tlb.jc_find(view, rip), Some(n));
                    assert_eq!(tlb.jc_find(View::User(0), rip), None);
                }
            }
        };
        check(&mut tlb, 0, 10);
        tlb.give_back();
        check(&mut tlb, 0, 100);
        assert!(tlb.jc_room.is_some());
        // It grows meanwhile.
        check(&mut tlb, 100, GROWS_AT as u64);
        assert!(tlb.jc_room.is_none());
        tlb.clear_all_jcs();
        check(&mut tlb, 0, 200);
        tlb.give_back();
        tlb.give_back();
        check(&mut tlb, 0, 20);
    }
}
