//! What the process of an address space has mapped.

use std::io;

use arrayvec::ArrayVec;

use super::stub::{BREAKPOINTS, Change, END, Stub};
use crate::code::FastMap;
use crate::ram::PAGE;
use crate::tlb::Dropped;

/// Lowest address that any system lets be mapped.
const LOWEST: u64 = 0x1_0000;
/// Mappings that a process may have; a quarter of the usual limit of the system.
const MAX_MAPPINGS: usize = 16_000;
/// Pages that it may have mapped: 512 MiB.
const MAX_PAGES: usize = 1 << 17;
/// Bytes of a large page.
pub const LARGE: u64 = 2 << 20;

/// Offsets in a page.
pub type Places = ArrayVec<u16, BREAKPOINTS>;

/// A page that is mapped.
#[derive(Clone, Copy)]
pub struct Mapped {
    /// Guest physical address.
    pub gpa: u64,
    /// Rights (PROT_*); only to be executed if it is a copy.
    pub prot: i32,
}

impl Mapped {
    /// It is a copy that shows what is executed only.
    pub fn is_copy(self) -> bool {
        self.prot == libc::PROT_EXEC
    }
}

/// A page to be mapped.
#[derive(Clone)]
pub struct Wanted {
    /// Guest linear address.
    pub va: u64,
    /// What is there.
    pub page: Mapped,
    /// The file.
    pub fd: i32,
    /// Where in the file.
    pub offset: u64,
    /// Offsets of instructions that are not to be executed.
    pub stops: Places,
}

impl Wanted {
    /// Whether one mapping can show both pages.
    pub fn goes_on(&self, next: &Self) -> bool {
        next.va == self.va + PAGE
            && next.offset == self.offset + PAGE
            && (next.page.prot, next.fd) == (self.page.prot, self.fd)
    }
}

/// An address space and its process.
pub struct Space {
    /// The process.
    pub stub: Stub,
    /// By guest linear address.
    pages: FastMap<u64, Mapped>,
    /// Mappings made, and pieces that they may have been divided into since then.
    mappings: usize,
    /// Where the process stops.
    stops: ArrayVec<u64, BREAKPOINTS>,
    /// Changes that are to be made.
    changes: Vec<Change>,
}

impl Space {
    /// An empty one, that can map pieces of `files`.
    ///
    /// # Errors
    /// The system refuses to make the process.
    pub fn new(files: &[i32]) -> io::Result<Self> {
        let stops = ArrayVec::new();
        let (pages, changes) = (FastMap::default(), Vec::new());
        Ok(Self { stub: Stub::new(files)?, pages, mappings: 0, stops, changes })
    }

    /// Whether a page can be mapped at all.
    pub fn can_map(&self, va: u64) -> bool {
        (LOWEST..END).contains(&va) && !self.stub.is_ours(va)
    }

    /// What is mapped at a page.
    pub fn get(&self, va: u64) -> Option<Mapped> {
        self.pages.get(&va).copied()
    }

    /// The guest linear addresses at which a page of RAM is mapped.
    pub fn of_page(&self, gpa: u64) -> impl Iterator<Item = u64> + '_ {
        self.pages.iter().filter(move |(_, m)| m.gpa == gpa).map(|(va, _)| *va)
    }

    /// Does what was asked for since the last time.
    ///
    /// # Errors
    /// The system refuses; the process is of no use any more.
    pub fn drop_pages(&mut self, dropped: &mut Dropped) -> io::Result<()> {
        if std::mem::take(&mut dropped.all) {
            dropped.pieces.clear();
            return self.clear();
        }
        for (at, len) in dropped.pieces.drain(..) {
            // Supervisor's are of no interest.
            if at >= END {
                continue;
            }
            let piece = at..END.min(at + len);
            let pages = piece.clone().step_by(PAGE as usize);
            let gone: Vec<u64> = pages.filter(|va| self.pages.remove(va).is_some()).collect();
            self.mappings += usize::from(!gone.is_empty());
            if piece.contains(&self.stub.base()) {
                // Not what is ours.
                self.changes.extend(gone.into_iter().map(|at| Change::Unmap { at, len: PAGE }));
            } else if !gone.is_empty() {
                self.changes.push(Change::Unmap { at, len: piece.end - at });
            }
        }
        self.commit()
    }

    fn clear(&mut self) -> io::Result<()> {
        if self.pages.is_empty() {
            return Ok(());
        }
        self.pages.clear();
        self.mappings = 0;
        self.changes.clear();
        if !self.stops.is_empty() {
            self.stops.clear();
            self.stub.stop_at(&[])?;
        }
        self.stub.clear()
    }

    /// Maps pages, which are in ascending order.
    ///
    /// # Errors
    /// As for [`Space::drop_pages`].
    pub fn map(&mut self, mut wanted: Vec<Wanted>) -> io::Result<()> {
        if self.pages.len() + wanted.len() > MAX_PAGES || self.mappings > MAX_MAPPINGS {
            self.clear()?;
        }
        for w in &mut wanted {
            if !self.stop_at(w)? {
                w.page.prot &= !libc::PROT_EXEC;
            }
            self.pages.insert(w.va, w.page);
        }
        for run in wanted.chunk_by(Wanted::goes_on) {
            let Wanted { va: at, page: Mapped { prot, .. }, fd, offset, .. } = run[0];
            let len = run.len() as u64 * PAGE;
            // It may divide one that was there.
            self.mappings += 2;
            self.changes.push(Change::Map { at, len, prot, fd, offset });
        }
        self.commit()
    }

    /// Sees to it that the process stops where it must not go on; `false` if there are too many such
    /// places.
    fn stop_at(&mut self, w: &Wanted) -> io::Result<bool> {
        if w.page.prot & libc::PROT_EXEC == 0 {
            return Ok(true);
        }
        let new = w.stops.iter().map(|&offset| w.va + u64::from(offset));
        let new: ArrayVec<u64, BREAKPOINTS> = new.filter(|at| !self.stops.contains(at)).collect();
        if self.stops.try_extend_from_slice(&new).is_err() {
            return Ok(false);
        }
        if !new.is_empty() {
            self.stub.stop_at(&self.stops)?;
        }
        Ok(true)
    }

    fn commit(&mut self) -> io::Result<()> {
        if self.changes.is_empty() {
            return Ok(());
        }
        let done = self.stub.change(&self.changes);
        self.changes.clear();
        done
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use super::{Dropped, LARGE, Mapped, PAGE, Places, Space, Wanted};
    use crate::sys;

    #[test]
    fn regions_are_dropped_but_for_what_is_ours() {
        let ram = sys::memfd(c"ram", 1 << 20).unwrap();
        let mut space = Space::new(&[ram.as_raw_fd()]).unwrap();
        let base = space.stub.base();
        let region = base & !(LARGE - 1);
        let beside = if base > region { base - PAGE } else { base + 2 * PAGE };
        let mut dropped = Dropped::default();
        for va in [0x40_0000, beside] {
            let page = Mapped { gpa: 0x1000, prot: libc::PROT_READ };
            let (fd, stops) = (ram.as_raw_fd(), Places::new());
            space.map(vec![Wanted { va, page, fd, offset: 0, stops }]).unwrap();
            assert_eq!(space.of_page(0x1000).collect::<Vec<_>>(), [va]);
            dropped.add(va & !(LARGE - 1), LARGE);
            space.drop_pages(&mut dropped).unwrap();
            assert_eq!(space.of_page(0x1000).count(), 0);
        }
    }
}
