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
//! Each page copied alone may cost two mappings of the host's in each view, whose number is limited; after [`Config::single_copies`](crate::Config) whole regions are copied, which then are one mapping again.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::{PAGE, Ram};
use crate::ahead::Copies;
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

pub(super) const READ: i32 = libc::PROT_READ;
pub(super) const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Where pages of RAM are that somebody else shares.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// The files. Nobody writes to them or makes them shorter.
    pub files: Vec<Arc<OwnedFd>>,
    /// For each page of RAM, in the order of the files: 0 if it is zero, else one more than the index
    /// of the file that has it.
    pub of_page: Vec<u8>,
    /// Pages that whoever goes on from here copies at once, since he will write them soon.
    pub ahead: Vec<Range<u64>>,
}

/// What RAM held when it was frozen. Unless it is given to [`Ram::unfreeze`], its files stay as they are.
#[derive(Debug, Default)]
pub struct Frozen {
    /// Where it is.
    pub origin: Origin,
    /// The numbers of these files here.
    numbers: Vec<u8>,
}

/// A file of RAM.
struct Layer {
    file: Arc<OwnedFd>,
    /// Who needs what it holds: each [`Frozen`] that is in it, and whoever else it came from.
    holders: usize,
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

    /// Removes all of them.
    pub fn clear_all(&self) {
        self.0.iter().for_each(|word| word.store(0, Ordering::SeqCst));
    }

    /// Adds all of them.
    fn fill(&self) {
        self.0.iter().for_each(|word| word.store(!0, Ordering::SeqCst));
    }

    /// Removes `count` pages from the first on.
    pub fn clear(&self, first: u64, count: u64) {
        for (word, bits) in self.words(first, count) {
            word.fetch_and(!bits, Ordering::SeqCst);
        }
    }

    /// Adds `count` pages from the first on.
    pub fn add(&self, first: u64, count: u64) {
        for (word, bits) in self.words(first, count) {
            word.fetch_or(bits, Ordering::SeqCst);
        }
    }

    /// Where `count` pages from the first on are.
    fn words(&self, first: u64, count: u64) -> impl Iterator<Item = (&AtomicU64, u64)> {
        let end = first + count;
        let words = if count == 0 { 0..0 } else { first / 64..end.div_ceil(64) };
        words.filter_map(move |word| {
            let (from, to) =
                (first.max(word * 64) - word * 64, end.min(word * 64 + 64) - word * 64);
            let bits = (!0u64 >> (64 - (to - from))) << from;
            Some((self.0.get(word as usize)?, bits))
        })
    }

    /// The first page of a range that is in it.
    fn first_of(&self, pages: Range<u64>) -> Option<u64> {
        let count = pages.end.saturating_sub(pages.start);
        let mut words = self.words(pages.start, count).zip(pages.start / 64..);
        words.find_map(|((word, bits), number)| {
            let set = word.load(Ordering::Acquire) & bits;
            (set != 0).then(|| number * 64 + u64::from(set.trailing_zeros()))
        })
    }

    /// The pages in it.
    pub fn iter(&self) -> impl Iterator<Item = u64> + use<'_> {
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
    files: Mutex<Vec<Option<Layer>>>,
    /// The number of the file that copies go to.
    own: AtomicU8,
    singles: AtomicUsize,
    singles_max: usize,
    /// What was copied of what this machine began with, if it did.
    copies: Option<Copies>,
}

impl Layers {
    /// `bytes` of RAM in `own`, but what is in `origin`.
    pub fn new(
        bytes: u64,
        own: Option<&Arc<OwnedFd>>,
        origin: Option<&Origin>,
        singles_max: usize,
    ) -> Self {
        let files = origin.map(|o| o.files.as_slice()).unwrap_or_default();
        let files: Vec<_> = own.into_iter().chain(files).map(Arc::clone).collect();
        let known = |number: u8| if usize::from(number) < files.len() { number } else { 0 };
        let mut of_page = vec![0; (bytes / PAGE) as usize];
        let given = origin.map(|o| o.of_page.as_slice()).unwrap_or_default();
        for (to, &from) in of_page.iter_mut().zip(given) {
            *to = known(from);
        }
        let copies = origin.zip(own).map(|(origin, own)| {
            let file = |number: u8| Some(Arc::clone(files.get(usize::from(number))?));
            Copies::begin(own, 0, &mut of_page, file, &origin.ahead)
        });
        let files = files.into_iter().zip(0..);
        let layer = |(file, number)| Some(Layer { file, holders: usize::from(number != 0) });
        let files = files.map(layer).collect();
        Self {
            any: AtomicBool::new(origin.is_some()),
            frozen: Bits::new(0),
            file_of: of_page.into_iter().map(AtomicU8::new).collect(),
            files: Mutex::new(files),
            own: AtomicU8::new(0),
            singles: AtomicUsize::new(0),
            singles_max,
            copies,
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
        lock(&self.files).get(usize::from(number))?.as_ref().map(|layer| Arc::clone(&layer.file))
    }
}

/// A mapping of guest memory could not be changed: it cannot go on.
pub(super) fn lost(what: &str, error: &io::Error) -> ! {
    eprintln!("berth: {what} failed: {error}");
    std::process::abort()
}

/// Calls `map` with address, bytes and file of neighbouring pages, from an address on.
fn for_runs(
    mut gpa: u64,
    files: &[u8],
    mut map: impl FnMut(u64, u64, u8) -> io::Result<()>,
) -> io::Result<()> {
    for run in files.chunk_by(|a, b| a == b) {
        let len = run.len() as u64 * PAGE;
        map(gpa, len, run.first().copied().unwrap_or(0))?;
        gpa += len;
    }
    Ok(())
}

impl Ram {
    /// Whether anything was ever frozen here, or began so.
    #[inline]
    pub(super) fn has_layers(&self) -> bool {
        self.layers.any.load(Ordering::Acquire)
    }

    /// Whether a page may not be written before it is copied.
    #[inline]
    pub fn is_frozen(&self, gpa: u64) -> bool {
        self.has_layers() && self.layers.frozen.get(gpa / PAGE)
    }

    /// Before a vCPU's code writes there: the pages are this machine's own.
    #[inline]
    pub fn own(&self, gpa: u64, len: u64) {
        if self.has_layers() {
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

    /// Pages that were written since it began with what others share, if it did.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn written(&self) -> io::Result<Vec<Range<u64>>> {
        self.layers.copies.as_ref().map_or(Ok(Vec::new()), Copies::written)
    }

    /// Where all of it is now. Nothing may be written as long as that is used.
    pub fn origin(&self) -> Origin {
        let _guard = lock(&self.mapping);
        let mut origin = Origin::default();
        let mut known = [0u8; 256];
        for (number, layer) in lock(&self.layers.files).iter().enumerate() {
            if let Some(layer) = layer {
                origin.files.push(Arc::clone(&layer.file));
                known[number] = origin.files.len() as u8;
            }
        }
        let of_page = self.layers.file_of.iter().map(|n| n.load(Ordering::SeqCst));
        origin.of_page = of_page.map(|n| known[usize::from(n)]).collect();
        origin
    }

    /// The files it is in.
    pub fn files(&self) -> Vec<i32> {
        lock(&self.layers.files).iter().flatten().map(|layer| layer.file.as_raw_fd()).collect()
    }

    /// The file of a page, and where in it the page is.
    pub fn file_of(&self, gpa: u64) -> Option<(Arc<OwnedFd>, u64)> {
        let offset = self.offset_of(gpa)?;
        Some((self.layers.file(self.layers.number(offset)?)?, offset))
    }

    /// Maps all views, as pages are in files.
    pub(super) fn map_views(&mut self, raw: bool) -> io::Result<()> {
        self.layers.frozen = Bits::new(self.span() / PAGE);
        let raw = raw || self.has_layers();
        for slot in &self.slots {
            let first = (slot.offset / PAGE) as usize;
            let pages = self.layers.file_of.get(first..first + (slot.size / PAGE) as usize);
            let pages = pages.ok_or(io::ErrorKind::InvalidInput)?;
            let pages: Vec<u8> = pages.iter().map(|n| n.load(Ordering::Relaxed)).collect();
            // A guest that goes on waits for this: by runs, not by pages.
            for_runs(slot.gpa, &pages, |gpa, len, file| {
                if file != 0 {
                    self.layers.frozen.add(gpa / PAGE, len / PAGE);
                }
                self.map_in(&self.rw, gpa, len, if file == 0 { WRITE } else { READ })
            })?;
            let shown = Self::shown_at_first(&pages, |late| {
                for view in [&self.raw, &self.ro] {
                    view.pages.add(slot.gpa / PAGE + late.start as u64, late.len() as u64);
                }
            });
            for_runs(slot.gpa, &shown, |gpa, len, file| {
                if raw {
                    let rights = if file == 0 { WRITE } else { READ };
                    self.map_in(&self.raw.space, gpa, len, rights)?;
                }
                self.map_in(&self.ro.space, gpa, len, READ)
            })?;
        }
        Ok(())
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

    pub(super) fn file_key(&self, gpa: u64) -> (Option<u8>, bool) {
        let number = self.offset_of(gpa).and_then(|offset| self.layers.number(offset));
        (number, self.is_frozen(gpa))
    }

    /// Whether a page is in the file that copies go to.
    pub(super) fn is_in_own(&self, gpa: u64) -> bool {
        let number = self.offset_of(gpa).and_then(|offset| self.layers.number(offset));
        number == Some(self.layers.own.load(Ordering::SeqCst))
    }

    /// Maps pages that are in one file into a view.
    pub(super) fn map_in(
        &self,
        view: &sys::Reservation,
        gpa: u64,
        len: u64,
        prot: i32,
    ) -> io::Result<()> {
        let (file, offset) = self.file_of(gpa).ok_or(io::ErrorKind::InvalidInput)?;
        view.map_file(gpa as usize, len as usize, prot, file.as_raw_fd(), offset).map(drop)
    }

    /// Copies a frozen page into the file of our own, or all of its region. The caller holds the lock
    /// of mappings.
    fn thaw(&self, gpa: u64) -> io::Result<()> {
        let single = self.layers.singles.load(Ordering::Relaxed) < self.layers.singles_max;
        let slot = self.slots.iter().find(|s| gpa >= s.gpa && gpa - s.gpa < s.size);
        let Some(slot) = slot else { return Ok(()) };
        let len = if single { PAGE } else { REGION };
        let start = gpa & !(len - 1);
        let (start, end) = (start.max(slot.gpa), (start + len).min(slot.gpa + slot.size));
        self.layers.singles.fetch_add(1, Ordering::Relaxed);
        let number = self.layers.own.load(Ordering::SeqCst);
        let own = self.layers.file(number).ok_or(io::ErrorKind::NotFound)?;
        let pages = || (start..end).step_by(PAGE as usize).filter(|&gpa| self.is_frozen(gpa));
        let mut bytes = [0; PAGE as usize];
        for gpa in pages() {
            self.read(gpa, &mut bytes);
            let offset = self.offset_of(gpa).ok_or(io::ErrorKind::InvalidInput)?;
            if bytes.iter().any(|&byte| byte != 0) {
                sys::write_at(own.as_raw_fd(), &bytes, offset)?;
            }
            self.layers.set_number(offset, number);
            if let Some(copies) = &self.layers.copies {
                copies.note(offset / PAGE);
            }
        }
        // Everybody reads the copy before anybody can write to it.
        let mut runs: Vec<(u64, u64, bool)> = Vec::new();
        for gpa in pages() {
            let protected = self.protected.get(gpa / PAGE);
            match runs.last_mut() {
                Some((first, len, last)) if *first + *len == gpa && *last == protected => {
                    *len += PAGE;
                }
                _ => runs.push((gpa, PAGE, protected)),
            }
        }
        for &(gpa, len, _) in &runs {
            self.moved(&self.ro, gpa, len)?;
            self.moved(&self.raw, gpa, len)?;
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
        self.layers.frozen.clear(start / PAGE, (end - start) / PAGE);
        Ok(())
    }

    /// Freezes all of it; what is written from here on goes to `new`, a file of zeroes that is as
    /// long as the one before. Nothing writes meanwhile, no process has RAM mapped afterwards without
    /// looking, and no vCPU uses what its software TLB knows of data.
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
            files[free] = Some(Layer { file: Arc::new(new), holders: 0 });
            number
        };
        let own = self.layers.own.load(Ordering::SeqCst);
        self.layers.any.store(true, Ordering::SeqCst);
        let stays = self.empty_runs(own)?;
        // Before anything is write-protected: what is, and is not frozen, would trap for ever. Beyond
        // the end of slots it makes no difference.
        self.layers.frozen.fill();
        for slot in &self.slots {
            sys::mprotect(self.rw_addr(slot.gpa), slot.size as usize, READ)?;
            // Whoever writes there has looked; tests make sure of that.
            if cfg!(debug_assertions) {
                sys::mprotect(self.raw_addr(slot.gpa), slot.size as usize, READ)?;
            }
        }
        self.forget_others()?;
        // vCPUs have forgotten what they knew, and devices have finished.
        self.ro.kept.clear_all();
        self.raw.kept.clear_all();
        for &(gpa, len) in &stays {
            let first = self.offset_of(gpa).map_or(usize::MAX, |offset| (offset / PAGE) as usize);
            for entry in self.layers.file_of.iter().skip(first).take((len / PAGE) as usize) {
                entry.store(number, Ordering::Release);
            }
            for (view, rights) in [(&self.ro, READ), (&self.raw, WRITE)] {
                self.map_in(&view.space, gpa, len, rights)?;
                view.pages.clear(gpa / PAGE, len / PAGE);
            }
            self.map_in(&self.rw, gpa, len, WRITE)?;
            self.layers.frozen.clear(gpa / PAGE, len / PAGE);
        }
        let mut frozen = Frozen::default();
        let mut known = [0u8; 256];
        for (old, layer) in (0..=u8::MAX).zip(lock(&self.layers.files).iter_mut()) {
            if let Some(layer) = layer.as_mut().filter(|_| old != number) {
                layer.holders += 1;
                frozen.origin.files.push(Arc::clone(&layer.file));
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
            let pages =
                (start / PAGE) as usize..(hole.end.min(slot.offset + slot.size) / PAGE) as usize;
            let mut gpa = start.wrapping_sub(slot.offset).wrapping_add(slot.gpa);
            let numbers = self.layers.file_of.get(pages).unwrap_or_default();
            // The guest waits for this, and most of its memory is holes.
            let is_own = |number: &AtomicU8| number.load(Ordering::Relaxed) == own;
            for run in numbers.chunk_by(|a, b| is_own(a) == is_own(b)) {
                let (mut page, end) = (gpa / PAGE, gpa / PAGE + run.len() as u64);
                gpa += run.len() as u64 * PAGE;
                while page < end && run.first().is_some_and(is_own) {
                    let next = self.protected.first_of(page..end).unwrap_or(end);
                    if next - page >= HOLE_PAGES {
                        runs.push((page * PAGE, (next - page) * PAGE));
                    }
                    page = next + 1;
                }
            }
        }
        Ok(runs)
    }

    /// What was frozen is not needed any more. Where nobody else needs a file either, pages may be
    /// written where they are, and what they held before they were copied is given back. vCPUs may run.
    ///
    /// # Errors
    /// The system refuses; then some pages stay frozen.
    pub fn unfreeze(&self, frozen: Frozen) -> io::Result<()> {
        let _guard = lock(&self.mapping);
        let free = self.let_go(&frozen);
        let key = |gpa: u64| {
            let (number, is_frozen) = self.file_key(gpa);
            let thaws = is_frozen && number.is_some_and(|number| free.contains(&number));
            (thaws, self.protected.get(gpa / PAGE))
        };
        for (gpa, len, (thaws, protected)) in self.runs(key) {
            if !thaws {
                continue;
            }
            if cfg!(debug_assertions) {
                for gpa in (gpa..gpa + len).step_by(PAGE as usize) {
                    if !self.raw.pages.get(gpa / PAGE) {
                        sys::mprotect(self.raw_addr(gpa), PAGE as usize, WRITE)?;
                    }
                }
            }
            if !protected {
                sys::mprotect(self.rw_addr(gpa), len as usize, WRITE)?;
                for gpa in (gpa..gpa + len).step_by(PAGE as usize) {
                    if self.covered.get(gpa / PAGE) {
                        self.protect_others(gpa, WRITE)?;
                    }
                }
            }
            // Last: who finds it frozen waits, who does not writes.
            self.layers.frozen.clear(gpa / PAGE, len / PAGE);
        }
        self.give_back(&free)
    }

    /// The numbers of those files that nobody needs any more when this is gone.
    fn let_go(&self, frozen: &Frozen) -> Vec<u8> {
        let mut files = lock(&self.layers.files);
        let mut free = Vec::new();
        for (&number, file) in frozen.numbers.iter().zip(&frozen.origin.files) {
            let layer = files.get_mut(usize::from(number)).and_then(Option::as_mut);
            // Its number may be another file's by now.
            if let Some(layer) = layer.filter(|layer| Arc::ptr_eq(&layer.file, file)) {
                layer.holders -= 1;
                free.extend((layer.holders == 0).then_some(number));
            }
        }
        free
    }

    /// Gives memory of whole pages within a range back to the host: they are zero from here on. Pages
    /// that are frozen stay as they are, for whoever else has them. Says how many bytes were given back.
    ///
    /// # Errors
    /// The system refuses; then some pages stay as they are.
    pub fn discard(&self, gpa: u64, len: u64) -> io::Result<u64> {
        let _guard = lock(&self.mapping);
        let end = gpa.saturating_add(len).min(self.span());
        let mut runs: Vec<(u8, u64, u64)> = Vec::new();
        for gpa in (gpa.next_multiple_of(PAGE)..end).step_by(PAGE as usize) {
            if end - gpa < PAGE || self.is_frozen(gpa) {
                continue;
            }
            let Some(offset) = self.offset_of(gpa) else { continue };
            let Some(number) = self.layers.number(offset) else { continue };
            match runs.last_mut() {
                Some((last, first, len)) if *last == number && *first + *len == offset => {
                    *len += PAGE;
                }
                _ => runs.push((number, offset, PAGE)),
            }
        }
        let mut given = 0;
        for (number, offset, len) in runs {
            if let Some(file) = self.layers.file(number) {
                // All mappings are of the file: what is in it is what everybody sees.
                sys::punch_hole(file.as_raw_fd(), offset, len)?;
                given += len;
            }
        }
        Ok(given)
    }

    /// Frees what files of our own hold in the place of pages that are elsewhere.
    fn give_back(&self, free: &[u8]) -> io::Result<()> {
        let mut offset = 0;
        let all: Vec<u8> = self.layers.file_of.iter().map(|n| n.load(Ordering::SeqCst)).collect();
        for run in all.chunk_by(|a, b| a == b) {
            let len = run.len() as u64 * PAGE;
            for &number in free.iter().filter(|number| **number != run[0]) {
                if let Some(file) = self.layers.file(number) {
                    sys::punch_hole(file.as_raw_fd(), offset, len)?;
                }
            }
            offset += len;
        }
        let own = self.layers.own.load(Ordering::SeqCst);
        for &number in free.iter().filter(|n| **n != own && !all.contains(*n)) {
            if let Some(layer) = lock(&self.layers.files).get_mut(usize::from(number)) {
                *layer = None;
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
                self.layers.frozen.set(gpa / PAGE, true);
                sys::mprotect(self.rw_addr(gpa), PAGE as usize, READ)?;
                self.protect_others(gpa, READ)?;
            }
            self.layers.singles.store(self.layers.singles_max, Ordering::SeqCst);
            for gpa in (gpa..gpa + len).step_by(PAGE as usize) {
                if self.is_frozen(gpa) {
                    self.thaw(gpa)?;
                }
            }
        }
        // Nor are they mapped where nobody looked since.
        self.drop_others()?;
        for slot in &self.slots {
            for (view, rights) in [(&self.ro, READ), (&self.raw, WRITE)] {
                self.map_in(&view.space, slot.gpa, slot.size, rights)?;
                view.pages.clear(slot.gpa / PAGE, slot.size / PAGE);
            }
        }
        // Others who have them keep them open.
        lock(&self.layers.files).iter_mut().zip(0..).for_each(|(layer, number)| {
            if number != own {
                *layer = None;
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
            bits.fill();
            bits.clear(first, count);
            for page in 0..300 {
                assert_eq!(
                    bits.get(page),
                    !(first..first + count).contains(&page),
                    "{first} {count}"
                );
            }
            assert!(bits.iter().take_while(|page| *page < 300).count() as u64 == 300 - count);
            assert_eq!(bits.first_of(first..first + count), None);
            let end = first + count;
            let behind = bits.first_of(first..300);
            assert_eq!(behind, (end < 300).then_some(end));
        }
    }
}
