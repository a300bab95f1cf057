//! Jump caches: where the translations of guest addresses begin, for indirect jumps.

use std::os::fd::AsRawFd;

use super::sources::Sources;
use super::{HEAD, Tlb, View};
use crate::layout::{AREA_SIZE, JC_ENTRIES, JC_SIZE};
use crate::sys;

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
        self.init_jcs();
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
    /// address 1 has index 1.
    const fn empty_tag(i: u16) -> u64 {
        if i == 0 { 1u64.wrapping_neg() } else { 0 }
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
            if self.jc_find(view, rip).is_some() {
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
        let cache = self.jc(view);
        cache.journal.push(index);
        cache.sources.add(rip, source.large);
        // SAFETY: as in `jc_empty`.
        unsafe { self.jc_entry(view, index).write([rip.wrapping_neg(), host]) };
    }
}

#[cfg(test)]
mod tests {
    use super::Tlb;

    /// A jump to 0xc000_0000_0000_0000 once matched the tag of empty entries and went to host
    /// address 0.
    #[test]
    fn empty_entries_match_no_address() {
        for i in 0..=u16::MAX {
            let rip = Tlb::empty_tag(i).wrapping_neg();
            assert_ne!(rip as u16, i);
        }
    }
}
