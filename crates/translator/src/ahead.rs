//! What clones write at once: it is noted which pages that were, and those that come later copy them
//! before they run, in a few pieces, rather than one by one when they are written.
//!
//! This is a hint. A page that is copied in vain costs memory, one that is missing a trap.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex};

use crate::shared::lock;
use crate::sys;

const PAGE: usize = 4096;
/// Pages at most that are noted, or copied ahead.
const PAGES_MAX: usize = 2048;
/// Pages that are copied in one piece.
const PIECE: usize = 32;
/// Pages that are copied with those around them, so that mappings stay few: each costs as much time as ten
/// pages, but less memory than one.
const GAP: u64 = 1;

/// Numbers of pages, in files, that a machine wrote soon after it had begun.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Written {
    /// Of its memory.
    pub ram: Vec<Range<u64>>,
    /// Of what each vCPU has translated.
    pub code: Vec<Vec<Range<u64>>>,
}

/// Which pages of what was shared have been copied, until somebody asks.
pub struct Copies(Mutex<Option<Noted>>);

struct Noted {
    own: Arc<OwnedFd>,
    /// Before anything ran, and where they were before.
    ahead: Vec<(u32, Arc<OwnedFd>)>,
    later: Vec<u32>,
}

impl Copies {
    /// Copies pages into the file `own`, whose number is `own_number`, and says so in `of_page`. Those
    /// that cannot be copied stay where they are.
    pub fn begin(
        own: &Arc<OwnedFd>,
        own_number: u8,
        of_page: &mut [u8],
        file: impl Fn(u8) -> Option<Arc<OwnedFd>>,
        ahead: &[Range<u64>],
    ) -> Self {
        let mut copied = Vec::new();
        let mut bytes = vec![0; PIECE * PAGE];
        for range in joined(ahead, of_page.len() as u64) {
            let mut page = range.start as usize;
            while page < range.end as usize && copied.len() < PAGES_MAX {
                let rest = of_page.get(page..range.end as usize).unwrap_or_default();
                let Some(&number) = rest.first() else { break };
                let count = rest.iter().take(PIECE).take_while(|&&n| n == number).count();
                if number != own_number
                    && let Some(from) = file(number)
                    && copy(&from, own, page, bytes.get_mut(..count * PAGE).unwrap_or_default())
                        .is_ok()
                {
                    let pages = of_page.get_mut(page..page + count).unwrap_or_default();
                    pages.fill(own_number);
                    let pages = page..page + count;
                    copied.extend(pages.map(|page| (page as u32, Arc::clone(&from))));
                }
                page += count;
            }
        }
        let noted = Noted { own: Arc::clone(own), ahead: copied, later: Vec::new() };
        Self(Mutex::new(Some(noted)))
    }

    /// Notes that a page was copied, since it is about to be written.
    pub fn note(&self, page: u64) {
        if let Some(noted) = &mut *lock(&self.0)
            && noted.later.len() < PAGES_MAX
            && let Ok(page) = u32::try_from(page)
        {
            noted.later.push(page);
        }
    }

    /// Pages that have been written: of those that were copied ahead, these are not as they were. From
    /// here on nothing is noted.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn written(&self) -> io::Result<Vec<Range<u64>>> {
        let noted = lock(&self.0).take();
        let Some(Noted { own, ahead, later: mut pages }) = noted else { return Ok(Vec::new()) };
        let (mut now, mut before) = ([0; PAGE], [0; PAGE]);
        for (page, from) in ahead {
            let offset = u64::from(page) * PAGE as u64;
            sys::read_at(own.as_raw_fd(), &mut now, offset)?;
            sys::read_at(from.as_raw_fd(), &mut before, offset)?;
            if now != before {
                pages.push(page);
            }
        }
        pages.sort_unstable();
        pages.dedup();
        let mut ranges = Vec::new();
        for page in pages {
            append(&mut ranges, page.into());
        }
        Ok(ranges)
    }
}

/// Appends a page behind all those in ranges.
pub fn append(ranges: &mut Vec<Range<u64>>, page: u64) {
    match ranges.last_mut() {
        Some(last) if last.end == page => last.end += 1,
        _ => ranges.push(page..page + 1),
    }
}

/// The same pages in order, and some that lie between them; all below `end`.
fn joined(ranges: &[Range<u64>], end: u64) -> Vec<Range<u64>> {
    let mut sorted: Vec<_> = ranges.iter().map(|r| r.start.min(end)..r.end.min(end)).collect();
    sorted.retain(|range| !range.is_empty());
    sorted.sort_unstable_by_key(|range| range.start);
    let mut joined: Vec<Range<u64>> = Vec::new();
    for range in sorted {
        match joined.last_mut() {
            Some(last) if range.start <= last.end.saturating_add(GAP) => {
                last.end = last.end.max(range.end);
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// Copies neighbouring pages from one file to the same place in another one.
fn copy(from: &OwnedFd, to: &OwnedFd, page: usize, bytes: &mut [u8]) -> io::Result<()> {
    let offset = (page * PAGE) as u64;
    sys::read_at(from.as_raw_fd(), bytes, offset)?;
    sys::write_at(to.as_raw_fd(), bytes, offset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: &[u8]) -> Arc<OwnedFd> {
        let file = sys::memfd(c"test", bytes.len() as u64).unwrap();
        sys::write_at(file.as_raw_fd(), bytes, 0).unwrap();
        Arc::new(file)
    }

    #[test]
    fn pages_are_copied_and_only_those_that_were_written_are_told() {
        let old: Vec<u8> = (0..10 * PAGE).map(|at| (at / PAGE) as u8 + 1).collect();
        let (own, old) = (file(&vec![0; 10 * PAGE]), file(&old));
        let mut of_page = [1, 1, 0, 1, 1, 1, 1, 1, 1, 1];
        let from = |n| (n == 1).then(|| Arc::clone(&old));
        let rubbish = u64::MAX - 1..u64::MAX;
        let empty = Range { start: 9, end: 3 };
        let ahead = [5..6, 1..4, 7..u64::MAX, empty, rubbish, 2..3];
        let copies = Copies::begin(&own, 0, &mut of_page, from, &ahead);
        // With those that lie between them.
        assert_eq!(of_page, [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        let byte = |page: usize| {
            let mut byte = [0];
            sys::read_at(own.as_raw_fd(), &mut byte, (page * PAGE + 7) as u64).unwrap();
            byte[0]
        };
        let expected = [0, 2, 0, 4, 5, 6, 7, 8, 9, 10];
        for (page, expected) in expected.into_iter().enumerate() {
            assert_eq!(byte(page), expected, "{page}");
        }
        sys::write_at(own.as_raw_fd(), &[77], (8 * PAGE + 5) as u64).unwrap();
        sys::write_at(own.as_raw_fd(), &[77], (3 * PAGE) as u64).unwrap();
        copies.note(4);
        copies.note(0);
        copies.note(u64::MAX);
        assert_eq!(copies.written().unwrap(), [0..1, 3..5, 8..9]);
        copies.note(6);
        assert_eq!(copies.written().unwrap(), []);
    }

    #[test]
    fn what_is_copied_ahead_is_bounded() {
        let pages = PAGES_MAX + 3 * PIECE;
        let (own, old) = (file(&vec![0; pages * PAGE]), file(&vec![1; pages * PAGE]));
        let mut of_page = vec![1; pages];
        let from = |_| Some(Arc::clone(&old));
        let all = 0..u64::MAX;
        Copies::begin(&own, 0, &mut of_page, from, std::slice::from_ref(&all));
        let copied = of_page.iter().filter(|n| **n == 0).count();
        assert!((PAGES_MAX..PAGES_MAX + PIECE).contains(&copied), "{copied}");
    }
}
