//! In which file each page of RAM is, and which pages may not be written there.
//!
//! ```text
//!              freeze                        write
//!   own ─────────────────► frozen, shared ─────────────► own (a copy, in the new file)
//!    ▲                          │
//!    └──────────────────────────┘ unfreeze: nobody else needs what was frozen
//! ```
//!
//! RAM is frozen by mapping all of it read-only and beginning a new, empty file. What was there stays
//! for whoever saves it, or for other machines that begin with it. Before a page is next written it is
//! copied into the new file, which is then mapped in its place: [`Ram::own`]. Generated code traps
//! there as it does for pages with translations, and comes to the slow path.
//!
//! Each page copied alone may cost two mappings of the host's in each of three views, whose number is
//! limited; after [`Config::single_copies`](crate::Config) whole regions are copied, which then are one mapping again.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::{PAGE, Ram};
use crate::shared::lock;
use crate::sys;

/// Bytes that are copied at once afterwards.
const REGION: u64 = 2 << 20;
/// Pages without data that are worth a mapping of their own.
const HOLE_PAGES: u64 = 64;
/// Files that RAM may be in before all of it is brought together.
const FILES_MANY: usize = 64;
/// And at most.
const FILES_MAX: usize = 250;

const READ: i32 = libc::PROT_READ;
const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Where pages of RAM are that somebody else shares.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// The files. Nobody writes to them or makes them shorter.
    pub files: Vec<Arc<OwnedFd>>,
    /// For each page of RAM, in the order of the files: 0 if it is zero, else one more than the index
    /// of the file that has it.
    pub of_page: Vec<u8>,
}

/// What RAM held when it was frozen.
#[derive(Debug, Default)]
pub struct Frozen {
    /// Where it is.
    pub origin: Origin,
    /// The numbers of these files here.
    numbers: Vec<u8>,
}

/// A set of pages.
pub struct Bits(Box<[AtomicU64]>);

impl Bits {
    /// None of so many.
    pub fn new(pages: u64) -> Self {
        Self(sys::zeroes((pages / 64) as usize + 1))
    }

    /// Whether a page is in it.
    #[inline]
    pub fn get(&self, page: u64) -> bool {
        let word = self.0.get((page / 64) as usize);
        word.is_some_and(|word| word.load(Ordering::Acquire) >> (page % 64) & 1 != 0)
    }

    /// Sets the words to what `word` says, given the number of the first of 64 pages.
    fn fill(&self, word: impl Fn(u64) -> u64) {
        for (first, to) in (0..).step_by(64).zip(&self.0) {
            to.store(word(first), Ordering::Release);
        }
    }

    /// Removes `count` pages from the first on.
    fn clear(&self, first: u64, count: u64) {
        let end = first + count;
        if count == 0 {
            return;
        }
        for word in first / 64..end.div_ceil(64) {
            let (from, to) =
                (first.max(word * 64) - word * 64, end.min(word * 64 + 64) - word * 64);
            let bits = (!0u64 >> (64 - (to - from))) << from;
            if let Some(word) = self.0.get(word as usize) {
                word.fetch_and(!bits, Ordering::SeqCst);
            }
        }
    }

    /// The pages in it.
    fn iter(&self) -> impl Iterator<Item = u64> + use<'_> {
        (0..).step_by(64).zip(&self.0).flat_map(|(first, word)| {
            let word = word.load(Ordering::Acquire);
            (0..64).filter(move |n| word != 0 && word >> n & 1 != 0).map(move |n| first + n)
        })
    }

    /// Adds or removes one.
    pub fn set(&self, page: u64, to: bool) {
        if let Some(word) = self.0.get((page / 64) as usize) {
            let bit = 1 << (page % 64);
            if to {
                word.fetch_or(bit, Ordering::SeqCst);
            } else {
                word.fetch_and(!bit, Ordering::SeqCst);
            }
        }
    }
}

/// The files of RAM.
pub struct Layers {
    /// Anything may be frozen.
    any: AtomicBool,
    /// By guest address.
    frozen: Bits,
    /// For each page, by its place in the files: the number of its file.
    file_of: Box<[AtomicU8]>,
    files: Mutex<Vec<Option<Arc<OwnedFd>>>>,
    /// The number of the file that copies go to.
    own: AtomicU8,
    singles: AtomicUsize,
    singles_max: usize,
}

impl Layers {
    /// `bytes` of RAM in `own`, but what is in `origin`.
    pub fn new(
        bytes: u64,
        own: Option<&Arc<OwnedFd>>,
        origin: Option<&Origin>,
        singles_max: usize,
    ) -> Self {
        let number = |page: usize| origin.and_then(|o| o.of_page.get(page)).copied().unwrap_or(0);
        let files = origin.map(|o| o.files.as_slice()).unwrap_or_default();
        let files: Vec<_> = own.into_iter().chain(files).cloned().map(Some).collect();
        let known = |number: u8| if usize::from(number) < files.len() { number } else { 0 };
        Self {
            any: AtomicBool::new(origin.is_some()),
            frozen: Bits::new(0),
            file_of: (0..(bytes / PAGE) as usize)
                .map(|page| AtomicU8::new(known(number(page))))
                .collect(),
            files: Mutex::new(files),
            own: AtomicU8::new(0),
            singles: AtomicUsize::new(0),
            singles_max,
        }
    }

    fn number(&self, offset: u64) -> Option<u8> {
        self.file_of.get((offset / PAGE) as usize).map(|number| number.load(Ordering::SeqCst))
    }

    fn set_number(&self, offset: u64, number: u8) {
        if let Some(entry) = self.file_of.get((offset / PAGE) as usize) {
            entry.store(number, Ordering::SeqCst);
        }
    }

    fn file(&self, number: u8) -> Option<Arc<OwnedFd>> {
        lock(&self.files).get(usize::from(number))?.clone()
    }
}

/// A mapping of guest memory could not be changed: it cannot go on.
fn lost(what: &str, error: &io::Error) -> ! {
    eprintln!("berth: {what} failed: {error}");
    std::process::abort()
}

impl Ram {
    /// Whether a page may not be written before it is copied.
    #[inline]
    pub fn is_frozen(&self, gpa: u64) -> bool {
        self.layers.any.load(Ordering::Acquire) && self.layers.frozen.get(gpa / PAGE)
    }

    /// Before anything writes there: the pages are this machine's own.
    #[inline]
    pub fn own(&self, gpa: u64, len: u64) {
        if self.layers.any.load(Ordering::Acquire) {
            self.own_slowly(gpa, len);
        }
    }

    #[cold]
    fn own_slowly(&self, gpa: u64, len: u64) {
        let last = gpa.saturating_add(len.max(1) - 1).min(self.span());
        for page in gpa / PAGE..=last / PAGE {
            if self.layers.frozen.get(page) {
                let _guard = lock(&self.mapping);
                // Another one may have done so meanwhile.
                if self.layers.frozen.get(page)
                    && let Err(error) = self.thaw(page * PAGE)
                {
                    lost("copying a page of guest memory that is shared", &error);
                }
            }
        }
    }

    /// Where all of it is now. Nothing may be written as long as that is used.
    pub fn origin(&self) -> Origin {
        let _guard = lock(&self.mapping);
        let mut origin = Origin::default();
        let mut known = [0u8; 256];
        for (number, file) in lock(&self.layers.files).iter().enumerate() {
            if let Some(file) = file {
                origin.files.push(Arc::clone(file));
                known[number] = origin.files.len() as u8;
            }
        }
        let of_page = self.layers.file_of.iter().map(|n| n.load(Ordering::SeqCst));
        origin.of_page = of_page.map(|n| known[usize::from(n)]).collect();
        origin
    }

    /// The files it is in.
    pub fn files(&self) -> Vec<i32> {
        lock(&self.layers.files).iter().flatten().map(|file| file.as_raw_fd()).collect()
    }

    /// The file of a page, and where in it the page is.
    pub fn file_of(&self, gpa: u64) -> Option<(Arc<OwnedFd>, u64)> {
        let offset = self.offset_of(gpa)?;
        Some((self.layers.file(self.layers.number(offset)?)?, offset))
    }

    /// Maps all views, as pages are in files.
    pub(super) fn map_views(&mut self, raw: bool) -> io::Result<()> {
        self.layers.frozen = Bits::new(self.span() / PAGE);
        for gpa in self.pages() {
            let number = self.offset_of(gpa).and_then(|offset| self.layers.number(offset));
            self.layers.frozen.set(gpa / PAGE, number.is_some_and(|number| number != 0));
        }
        let origin = self.layers.any.load(Ordering::Acquire);
        for (gpa, len, _) in self.runs(|gpa| self.file_key(gpa)) {
            let writable = if self.is_frozen(gpa) { READ } else { WRITE };
            if raw || origin {
                self.map_in(&self.raw, gpa, len, writable)?;
            }
            self.map_in(&self.rw, gpa, len, writable)?;
            self.map_in(&self.ro, gpa, len, READ)?;
        }
        Ok(())
    }

    fn pages(&self) -> impl Iterator<Item = u64> + use<'_> {
        self.slots.iter().flat_map(|s| (s.gpa..s.gpa + s.size).step_by(PAGE as usize))
    }

    /// Neighbouring pages for which `key` is the same: address, bytes, that key.
    fn runs<K: PartialEq>(&self, key: impl Fn(u64) -> K) -> Vec<(u64, u64, K)> {
        let mut runs: Vec<(u64, u64, K)> = Vec::new();
        for slot in &self.slots {
            let mut first = true;
            for gpa in (slot.gpa..slot.gpa + slot.size).step_by(PAGE as usize) {
                let this = key(gpa);
                match runs.last_mut() {
                    Some((_, len, last)) if !first && *last == this => *len += PAGE,
                    _ => runs.push((gpa, PAGE, this)),
                }
                first = false;
            }
        }
        runs
    }

    fn file_key(&self, gpa: u64) -> (Option<u8>, bool) {
        let number = self.offset_of(gpa).and_then(|offset| self.layers.number(offset));
        (number, self.is_frozen(gpa))
    }

    /// Maps pages that are in one file into a view.
    fn map_in(&self, view: &sys::Reservation, gpa: u64, len: u64, prot: i32) -> io::Result<()> {
        let (file, offset) = self.file_of(gpa).ok_or(io::ErrorKind::InvalidInput)?;
        view.map_file(gpa as usize, len as usize, prot, file.as_raw_fd(), offset).map(drop)
    }

    /// Copies a frozen page into the file of our own, or all of its region. The caller holds the lock
    /// of mappings.
    fn thaw(&self, gpa: u64) -> io::Result<()> {
        let single = self.layers.singles.load(Ordering::Relaxed) < self.layers.singles_max;
        let slot = self.slots.iter().find(|s| gpa >= s.gpa && gpa - s.gpa < s.size);
        let Some(slot) = slot else { return Ok(()) };
        let (start, end) = match single {
            true => (gpa, gpa + PAGE),
            false => {
                let start = gpa & !(REGION - 1);
                (start.max(slot.gpa), (start + REGION).min(slot.gpa + slot.size))
            }
        };
        self.layers.singles.fetch_add(1, Ordering::Relaxed);
        let number = self.layers.own.load(Ordering::SeqCst);
        let own = self.layers.file(number).ok_or(io::ErrorKind::NotFound)?;
        let own = std::fs::File::from(own.try_clone()?);
        let pages = || (start..end).step_by(PAGE as usize).filter(|&gpa| self.is_frozen(gpa));
        let mut bytes = [0; PAGE as usize];
        for gpa in pages() {
            self.read(gpa, &mut bytes);
            let offset = self.offset_of(gpa).ok_or(io::ErrorKind::InvalidInput)?;
            if bytes.iter().any(|&byte| byte != 0) {
                own.write_all_at(&bytes, offset)?;
            }
            self.layers.set_number(offset, number);
        }
        // Everybody reads the copy before anybody can write to it.
        let key = |gpa| (self.is_frozen(gpa), self.protected.get(gpa / PAGE));
        let mut runs: Vec<(u64, u64, bool)> = Vec::new();
        for gpa in pages() {
            let (_, protected) = key(gpa);
            match runs.last_mut() {
                Some((first, len, last)) if *first + *len == gpa && *last == protected => {
                    *len += PAGE;
                }
                _ => runs.push((gpa, PAGE, protected)),
            }
        }
        for &(gpa, len, _) in &runs {
            self.map_in(&self.ro, gpa, len, READ)?;
            self.map_in(&self.raw, gpa, len, WRITE)?;
        }
        let space = &self.guarded.space;
        let mut writable = Vec::new();
        for gpa in pages() {
            for (at, rw) in self.others(gpa) {
                let (file, offset) = self.file_of(gpa).ok_or(io::ErrorKind::InvalidInput)?;
                let place = (at - space.addr()) as usize;
                space.map_file(place, PAGE as usize, READ, file.as_raw_fd(), offset)?;
                if rw && !self.protected.get(gpa / PAGE) {
                    writable.push(at);
                }
            }
        }
        for &(gpa, len, protected) in &runs {
            self.map_in(&self.rw, gpa, len, if protected { READ } else { WRITE })?;
        }
        for at in writable {
            sys::mprotect(at, PAGE as usize, WRITE)?;
        }
        for gpa in (start..end).step_by(PAGE as usize) {
            self.layers.frozen.set(gpa / PAGE, false);
        }
        Ok(())
    }

    /// Freezes all of it; what is written from here on goes to `new`, a file of zeroes that is as
    /// long as the one before. Nothing writes meanwhile, and no process has RAM mapped afterwards
    /// without looking.
    ///
    /// # Errors
    /// There are too many files, or the system refuses; then the machine can go on, but what was
    /// frozen is of no use.
    pub fn freeze(&self, new: OwnedFd) -> io::Result<Frozen> {
        let _guard = lock(&self.mapping);
        if lock(&self.layers.files).iter().flatten().count() > FILES_MANY {
            self.layers.any.store(true, Ordering::SeqCst);
            self.bring_together()?;
        }
        let number = {
            let mut files = lock(&self.layers.files);
            let free = files.iter().position(Option::is_none).unwrap_or(files.len());
            let number = u8::try_from(free).ok().filter(|_| free < FILES_MAX);
            let number = number.ok_or_else(|| io::Error::other("memory is in too many files"))?;
            if free == files.len() {
                files.push(None);
            }
            files[free] = Some(Arc::new(new));
            number
        };
        let own = self.layers.own.load(Ordering::SeqCst);
        self.layers.any.store(true, Ordering::SeqCst);
        let stays = self.empty_runs(own)?;
        for slot in &self.slots {
            sys::mprotect(self.rw_addr(slot.gpa), slot.size as usize, READ)?;
            // Whoever writes there has looked; tests make sure of that.
            if cfg!(debug_assertions) {
                sys::mprotect(self.raw_addr(slot.gpa), slot.size as usize, READ)?;
            }
        }
        for page in self.covered.iter() {
            for (at, _) in self.others(page * PAGE).filter(|(_, rw)| *rw) {
                sys::mprotect(at, PAGE as usize, READ)?;
            }
        }
        // Beyond the end of slots that makes no difference.
        self.layers.frozen.fill(|_| !0);
        for &(gpa, len) in &stays {
            self.layers.frozen.clear(gpa / PAGE, len / PAGE);
            let first = self.offset_of(gpa).map_or(usize::MAX, |offset| (offset / PAGE) as usize);
            for entry in self.layers.file_of.iter().skip(first).take((len / PAGE) as usize) {
                entry.store(number, Ordering::Release);
            }
            self.map_in(&self.ro, gpa, len, READ)?;
            self.map_in(&self.raw, gpa, len, WRITE)?;
            self.map_in(&self.rw, gpa, len, WRITE)?;
        }
        let mut frozen = Frozen::default();
        let mut known = [0u8; 256];
        for (old, file) in (0..=u8::MAX).zip(lock(&self.layers.files).iter()) {
            if let Some(file) = file.as_ref().filter(|_| old != number) {
                frozen.origin.files.push(Arc::clone(file));
                frozen.numbers.push(old);
                known[usize::from(old)] = frozen.numbers.len() as u8;
            }
        }
        let of_page = self.layers.file_of.iter().map(|n| n.load(Ordering::SeqCst));
        frozen.origin.of_page = of_page.map(|n| known[usize::from(n)]).collect();
        self.layers.own.store(number, Ordering::SeqCst);
        self.layers.singles.store(0, Ordering::SeqCst);
        Ok(frozen)
    }

    /// Runs of pages, address and bytes, whose file is our own and has nothing there, that are worth
    /// mappings of their own.
    fn empty_runs(&self, own: u8) -> io::Result<Vec<(u64, u64)>> {
        let mut runs = Vec::new();
        let Some(file) = self.layers.file(own) else { return Ok(runs) };
        let holes = sys::holes(file.as_raw_fd(), self.layers.file_of.len() as u64 * PAGE)?;
        for (slot, hole) in self.slots.iter().flat_map(|s| holes.iter().map(move |h| (s, h))) {
            let start = hole.start.max(slot.offset).next_multiple_of(PAGE);
            let end = hole.end.min(slot.offset + slot.size);
            let mut run = (0, 0);
            for offset in (start..end).step_by(PAGE as usize) {
                let gpa = offset - slot.offset + slot.gpa;
                let page = gpa / PAGE;
                if self.layers.number(offset) != Some(own)
                    || self.covered.get(page)
                    || self.protected.get(page)
                {
                    continue;
                }
                if run.0 + run.1 != gpa {
                    runs.extend((run.1 > 0).then_some(run));
                    run = (gpa, 0);
                }
                run.1 += PAGE;
            }
            runs.extend((run.1 > 0).then_some(run));
        }
        runs.retain(|(_, len)| *len >= HOLE_PAGES * PAGE);
        Ok(runs)
    }

    /// What was frozen is needed by nobody else: pages may be written where they are, and what they
    /// held before they were copied is given back. vCPUs may run.
    ///
    /// # Errors
    /// The system refuses; then some pages stay frozen.
    pub fn unfreeze(&self, frozen: &Frozen) -> io::Result<()> {
        let _guard = lock(&self.mapping);
        let ours = |number: Option<u8>| number.is_some_and(|n| frozen.numbers.contains(&n));
        let key = |gpa: u64| {
            let (number, is_frozen) = self.file_key(gpa);
            (is_frozen && ours(number), self.protected.get(gpa / PAGE))
        };
        for (gpa, len, (thaws, protected)) in self.runs(key) {
            if !thaws {
                continue;
            }
            if cfg!(debug_assertions) {
                sys::mprotect(self.raw_addr(gpa), len as usize, WRITE)?;
            }
            let pages = || (gpa..gpa + len).step_by(PAGE as usize);
            pages().for_each(|gpa| self.layers.frozen.set(gpa / PAGE, false));
            if protected {
                continue;
            }
            sys::mprotect(self.rw_addr(gpa), len as usize, WRITE)?;
            for gpa in pages().filter(|gpa| self.covered.get(gpa / PAGE)) {
                for (at, _) in self.others(gpa).filter(|(_, rw)| *rw) {
                    sys::mprotect(at, PAGE as usize, WRITE)?;
                }
            }
        }
        self.give_back(frozen)
    }

    /// Frees what files hold in the place of pages that are elsewhere.
    fn give_back(&self, frozen: &Frozen) -> io::Result<()> {
        let mut offset = 0;
        let all: Vec<u8> = self.layers.file_of.iter().map(|n| n.load(Ordering::SeqCst)).collect();
        for run in all.chunk_by(|a, b| a == b) {
            let len = run.len() as u64 * PAGE;
            for &number in frozen.numbers.iter().filter(|number| **number != run[0]) {
                if let Some(file) = self.layers.file(number) {
                    sys::punch_hole(file.as_raw_fd(), offset, len)?;
                }
            }
            offset += len;
        }
        let own = self.layers.own.load(Ordering::SeqCst);
        for &number in frozen.numbers.iter().filter(|n| **n != own && !all.contains(*n)) {
            if let Some(file) = lock(&self.layers.files).get_mut(usize::from(number)) {
                *file = None;
            }
        }
        Ok(())
    }

    /// Copies all that is in other files into our own. The caller holds the lock of mappings; nothing
    /// writes meanwhile.
    fn bring_together(&self) -> io::Result<()> {
        let own = self.layers.own.load(Ordering::SeqCst);
        for (gpa, len, (number, _)) in self.runs(|gpa| self.file_key(gpa)) {
            if number == Some(own) {
                continue;
            }
            for gpa in (gpa..gpa + len).step_by(PAGE as usize) {
                sys::mprotect(self.rw_addr(gpa), PAGE as usize, READ)?;
                for (at, _) in self.others(gpa).filter(|(_, rw)| *rw) {
                    sys::mprotect(at, PAGE as usize, READ)?;
                }
                self.layers.frozen.set(gpa / PAGE, true);
            }
            self.layers.singles.store(self.layers.singles_max, Ordering::SeqCst);
            for gpa in (gpa..gpa + len).step_by(PAGE as usize) {
                if self.is_frozen(gpa) {
                    self.thaw(gpa)?;
                }
            }
        }
        lock(&self.layers.files).iter_mut().zip(0..).for_each(|(file, number)| {
            if number != own {
                *file = None;
            }
        });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Bits;

    #[test]
    fn ranges_are_cleared() {
        for (first, count) in
            [(0, 1), (0, 64), (3, 61), (63, 2), (5, 200), (64, 64), (127, 1), (10, 0)]
        {
            let bits = Bits::new(300);
            bits.fill(|_| !0);
            bits.clear(first, count);
            for page in 0..300 {
                assert_eq!(
                    bits.get(page),
                    !(first..first + count).contains(&page),
                    "{first} {count}"
                );
            }
            assert!(bits.iter().take_while(|page| *page < 300).count() as u64 == 300 - count);
        }
    }
}
