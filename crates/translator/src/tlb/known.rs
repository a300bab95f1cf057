//! What a slot knows, for those who copy it.

use std::sync::atomic::Ordering;

use super::{PAGE_ENTRIES, Tlb, View};

/// Pages that are named at most, those that were entered last before others.
const MOST: usize = 1024;

impl Tlb {
    /// Addresses of pages of user memory that were accessed in a slot, in ascending order.
    pub fn known_data(&self, slot: usize) -> Vec<u64> {
        let user = &self.slots[slot].user;
        let pages = user.journal_pages.iter().rev();
        let old = pages.flat_map(|p| p * PAGE_ENTRIES..(p + 1) * PAGE_ENTRIES);
        let known = |i: &u64| user.entry(*i).load(Ordering::Relaxed) != user.unknown(*i);
        let indexes = user.journal.iter().rev().copied().chain(old);
        in_order(indexes.filter(known).map(|i| i << 12).take(MOST).collect())
    }

    /// Addresses of pages of user code that something jumped to in a slot, in ascending order.
    pub fn known_code(&self, slot: usize) -> Vec<u64> {
        let view = View::User(slot as u8);
        let indexes = self.slots[slot].jc_user.journal.iter().rev();
        let targets = indexes.map(|&index| {
            // SAFETY: an entry of the jump cache of a view, which is mapped as long as `self` lives.
            let [tag, _] = unsafe { self.jc_entry(view, index).read() };
            (index, tag.wrapping_neg())
        });
        // Others are empty.
        let targets = targets.filter(|(index, rip)| *rip as u16 == *index);
        in_order(targets.map(|(_, rip)| rip & !0xfff).take(MOST).collect())
    }
}

fn in_order(mut pages: Vec<u64>) -> Vec<u64> {
    pages.sort_unstable();
    pages.dedup();
    pages
}
