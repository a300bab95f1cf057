//! Views that do not show each page before somebody asks for it.
//!
//! A page that is copied into another file has to be mapped from there, one by one, in each view. Most are
//! never looked for in more than one of them. So a view may go on showing what was there before: such a
//! page is *late*, and is mapped before an address in that view is given away.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::layers::{Bits, READ, WRITE, lost};
use super::{PAGE, Ram};
use crate::shared::lock;
use crate::sys::Reservation;

/// Pages beside one that is asked for which are mapped with it, if they are late, too.
const BESIDE: u64 = 32;
/// Pages in a row that are not mapped late, since they are one mapping.
const MANY: usize = 64;

/// A view of RAM, some pages of which may be late.
pub struct Late {
    pub(super) space: Arc<Reservation>,
    /// Pages that are late.
    pub(super) pages: Bits,
    /// Pages whose address somebody keeps: they may not become late.
    pub(super) kept: Bits,
}

impl Late {
    /// A view of so many pages, none of which is late.
    pub fn new(space: Arc<Reservation>, pages: u64) -> Self {
        Self { space, pages: Bits::new(pages), kept: Bits::new(pages) }
    }
}

impl Ram {
    /// Makes a view show what there is at an address.
    #[inline]
    pub(super) fn show(&self, view: &Late, gpa: u64, len: u64) {
        if self.has_layers() {
            self.show_slowly(view, gpa, len);
        }
    }

    #[cold]
    fn show_slowly(&self, view: &Late, gpa: u64, len: u64) {
        let end = gpa.saturating_add(len.max(1)).min(self.span()).div_ceil(PAGE);
        for page in gpa / PAGE..end {
            if view.pages.get(page) {
                let _guard = lock(&self.mapping);
                // Another one may have done so meanwhile.
                if view.pages.get(page)
                    && let Err(error) = self.map_late(view, page)
                {
                    lost("mapping a page of guest memory", &error);
                }
            }
        }
    }

    /// The same; whoever asks keeps the address until RAM is frozen.
    #[inline]
    pub(super) fn show_and_keep(&self, view: &Late, gpa: u64, len: u64) {
        if !self.has_layers() {
            return;
        }
        let pages = gpa / PAGE..gpa.saturating_add(len).min(self.span()).div_ceil(PAGE);
        if pages.clone().any(|page| !view.kept.get(page)) {
            // Before looking: who makes a page late does so before he looks for this.
            view.kept.add(pages.start, pages.end.saturating_sub(pages.start));
        }
        self.show_slowly(view, gpa, len);
    }

    /// After pages were copied: a view shows those that somebody keeps, others are late. The caller holds
    /// the lock of mappings.
    pub(super) fn moved(&self, view: &Late, gpa: u64, len: u64) -> io::Result<()> {
        let pages = gpa / PAGE..(gpa + len) / PAGE;
        view.pages.add(pages.start, pages.end - pages.start);
        for page in pages {
            if view.kept.get(page) && view.pages.get(page) {
                self.map_late(view, page)?;
            }
        }
        Ok(())
    }

    /// Maps a page that is late, and those beside it. The caller holds the lock of mappings.
    fn map_late(&self, view: &Late, page: u64) -> io::Result<()> {
        let slot = self.slots.iter().find(|s| (s.gpa..s.gpa + s.size).contains(&(page * PAGE)));
        let slot = slot.ok_or(io::ErrorKind::InvalidInput)?;
        let slot = slot.gpa / PAGE..(slot.gpa + slot.size) / PAGE;
        let key = |page| (view.pages.get(page), self.file_key(page * PAGE));
        let same = |other: &u64| key(*other) == key(page);
        let before = (slot.start.max(page.saturating_sub(BESIDE))..page).rev();
        let after = page + 1..slot.end.min(page + 1 + BESIDE);
        let first = page - before.take_while(same).count() as u64;
        let pages = first..page + 1 + after.take_while(same).count() as u64;
        let rights = if std::ptr::eq(view, &self.ro) { READ } else { self.raw_rights(page * PAGE) };
        self.map_in(&view.space, pages.start * PAGE, (pages.end - pages.start) * PAGE, rights)?;
        // Last: who finds it late waits, who does not looks.
        view.pages.clear(pages.start, pages.end - pages.start);
        Ok(())
    }

    /// Whoever writes to frozen pages has looked; tests make sure of that. One that is in our own file is
    /// about to be written.
    fn raw_rights(&self, gpa: u64) -> i32 {
        let looks = cfg!(debug_assertions) && self.is_frozen(gpa) && !self.is_in_own(gpa);
        if looks { READ } else { WRITE }
    }

    /// Files as a view shows them at first: pages of our own, file 0, that lie between others are late.
    pub(super) fn shown_at_first(files: &[u8], mut late: impl FnMut(Range<usize>)) -> Vec<u8> {
        let mut shown: Vec<u8> = Vec::with_capacity(files.len());
        for run in files.chunk_by(|a, b| a == b) {
            let first = shown.len();
            let file = match (run.first(), shown.last()) {
                (Some(0), Some(&before)) if before != 0 && run.len() < MANY => {
                    late(first..first + run.len());
                    before
                }
                (file, _) => file.copied().unwrap_or(0),
            };
            shown.resize(first + run.len(), file);
        }
        shown
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, AsRawFd};

    use super::*;
    use crate::{Config, RamSlot, sys};

    const SIZE: u64 = 64 * PAGE;

    fn file() -> std::os::fd::OwnedFd {
        sys::memfd(c"test", SIZE).unwrap()
    }

    fn ram() -> Ram {
        let own = file();
        let slots = [RamSlot { gpa: 0, size: SIZE, fd: own.as_fd(), offset: 0 }];
        Ram::new(&slots, None, None, &Config::default()).unwrap()
    }

    /// Writes as generated code does.
    fn store(ram: &Ram, gpa: u64, byte: u8) {
        ram.own(gpa, 1);
        // SAFETY: RAM that is this machine's own can be written there.
        unsafe { (ram.rw_addr(gpa) as *mut u8).write_volatile(byte) };
    }

    fn load(at: u64) -> u8 {
        // SAFETY: callers pass addresses in views, all of which can be read.
        unsafe { (at as *const u8).read_volatile() }
    }

    fn has_access(at: u64) -> bool {
        let mut ends = [0; 2];
        // SAFETY: plain system calls; the kernel says if it cannot read at the address.
        unsafe {
            assert_eq!(libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC), 0);
            let written = libc::write(ends[1], at as *const libc::c_void, 1);
            for end in ends {
                libc::close(end);
            }
            written == 1
        }
    }

    #[test]
    fn whoever_asked_sees_what_is_written_until_memory_is_frozen() {
        let ram = ram();
        let (asked, other) = (3 * PAGE, 9 * PAGE);
        for byte in 1..5 {
            let frozen = ram.freeze(file()).unwrap();
            ram.will_read(asked, 1);
            let read_only = ram.view_addr(asked, PAGE, false);
            for gpa in [asked, other] {
                store(&ram, gpa, byte);
            }
            assert_eq!([load(ram.raw_addr(asked)), load(read_only)], [byte; 2]);
            // One that nobody asked for is shown when somebody does.
            ram.will_read(other, 1);
            let other_read_only = ram.view_addr(other, PAGE, false);
            assert_eq!([load(ram.raw_addr(other)), load(other_read_only)], [byte; 2]);
            let mut held = [0];
            for file in &frozen.origin.files {
                sys::read_at(file.as_raw_fd(), &mut held, asked).unwrap();
                assert_ne!(held, [byte], "what was frozen has changed");
            }
            if byte % 2 == 0 {
                ram.unfreeze(frozen).unwrap();
            }
        }
    }

    #[test]
    fn what_follows_a_guarded_page_has_no_access_after_memory_was_frozen() {
        let ram = ram();
        for round in 0..3 {
            let pairs = [(PAGE, 5 * PAGE), (2 * PAGE, 9 * PAGE)];
            for pair in pairs {
                let at = ram.make_pair(pair, true, [true; 2]).unwrap();
                assert!(has_access(at) && has_access(at + PAGE), "{round}");
            }
            let guarded: Vec<_> =
                (20..30).map(|n| ram.make_guarded(n * PAGE, true, true).unwrap()).collect();
            for at in guarded {
                assert!(has_access(at) && !has_access(at + PAGE), "{round}");
            }
            drop(ram.freeze(file()).unwrap());
            assert_eq!(ram.guarded_addr(20 * PAGE, true), None);
            assert_eq!(ram.pair_addr(pairs[0], true), None);
        }
    }

    #[test]
    fn files_that_nobody_needs_are_not_mapped() {
        let ram = ram();
        for n in 0..150u64 {
            store(&ram, n % 64 * PAGE, n as u8);
            drop(ram.freeze(file()).unwrap());
        }
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let views = [ram.raw_addr(0), ram.rw_addr(0), ram.ro_addr(0)];
        let mut inodes: Vec<_> = maps
            .lines()
            .filter_map(|line| {
                let mut words = line.split_whitespace();
                let start = u64::from_str_radix(words.next()?.split('-').next()?, 16).ok()?;
                let inside = views.iter().any(|&view| (view..view + SIZE).contains(&start));
                inside.then(|| words.nth(3).map(str::to_owned)).flatten()
            })
            .collect();
        inodes.sort_unstable();
        inodes.dedup();
        assert!(inodes.len() <= ram.files().len(), "{} of {}", inodes.len(), ram.files().len());
    }

    #[test]
    fn what_is_late_lies_between_others() {
        let mut late = Vec::new();
        let mut files = vec![0, 0, 1, 0, 0, 1, 2, 0, 3];
        files.extend([0; MANY]);
        let shown = Ram::shown_at_first(&files, |pages| late.push(pages));
        let mut expected = vec![0, 0, 1, 1, 1, 1, 2, 2, 3];
        expected.extend([0; MANY]);
        assert_eq!((shown, late), (expected, vec![3..5, 7..8]));
    }
}
