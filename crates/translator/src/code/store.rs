//! The memory of a code cache: code, and the tables that belong to it.
//!
//! It is one file, in whose first part code is executed, and read, through a second mapping (never both
//! writable and executable). It can be shared with the caches of clones: what it holds then stays as it is.
//! Whoever wants to write a page of code copies that into a file of its own first. Code is written through
//! a mapping that shows nothing but this file, all of it: what is shared of it is to be seen in the other
//! one only. Tables have one mapping, so that the kernel copies their pages; they come into a file when
//! they are shared.
//!
//! ```text
//!   share                 write
//!   ─────► pages shared ─────────► code: a copy, in the own file
//!                       ─────────► tables: a copy, in no file
//! ```

use std::io;
use std::marker::PhantomData;
use std::ops::{Deref, Range};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use crate::ahead::Copies;
use crate::ram::Origin;
use crate::sys::{self, Reservation};

/// Bytes of a page.
const PAGE: usize = 4096;
/// Pages that are copied one by one; each may cost two of the host's mappings.
const SINGLES_MAX: usize = 2000;
/// Files at most when it is shared.
const FILES_MAX: usize = 32;
/// Pieces at most then, each of which costs a mapping.
const PIECES_MAX: usize = 4000;

const WRITE: i32 = libc::PROT_READ | libc::PROT_WRITE;
const EXECUTE: i32 = libc::PROT_READ | libc::PROT_EXEC;

/// The memory of a cache.
pub struct Store {
    rw: Reservation,
    rx: Reservation,
    /// Bytes that are executed, from the beginning.
    code: usize,
    size: usize,
    /// The last one is this cache's own.
    files: Vec<Arc<OwnedFd>>,
    /// The number of the file of each page.
    file_of: Vec<u8>,
    singles: usize,
    /// For each page behind the code: it was written since its file is shared, and is not there.
    written: Vec<bool>,
    /// What was copied of what it began with, if it did.
    copies: Option<Arc<Copies>>,
}

fn lost(error: &io::Error) -> ! {
    eprintln!("berth: copying a page of the code cache failed: {error}");
    std::process::abort()
}

impl Store {
    /// `size` bytes, of which the first `code` can be executed, all zero but what is in `begin`. Pages
    /// from the beginning to `fresh` are new in any case.
    ///
    /// # Errors
    /// When the host refuses the mappings, or `begin` is of another size.
    pub fn new(code: usize, size: usize, begin: Option<(&Origin, usize)>) -> io::Result<Self> {
        let own = Arc::new(sys::memfd(c"berth-code", size as u64)?);
        let (rw, rx) = (Reservation::new(size)?, Reservation::new(code)?);
        let mut store = Self {
            rw,
            rx,
            code,
            size,
            files: vec![own],
            file_of: vec![0; size / PAGE],
            singles: 0,
            written: vec![false; size / PAGE],
            copies: None,
        };
        if let Some((pages, fresh)) = begin {
            if pages.of_page.len() != store.file_of.len() {
                return Err(io::ErrorKind::InvalidInput.into());
            }
            let own = store.files.remove(0);
            store.files.clone_from(&pages.files);
            store.files.push(own);
            let last = store.own_number();
            let known = pages.of_page.iter().enumerate();
            let of = known.map(|(page, &n)| match n {
                _ if page < fresh / PAGE => last,
                0 => last,
                n => (n - 1).min(last),
            });
            store.file_of = of.collect();
            if let Some(own) = store.files.last() {
                let (files, of_page) = (&store.files, &mut store.file_of);
                // What is behind the code is copied by the kernel.
                let of_page = of_page.get_mut(..code / PAGE).unwrap_or_default();
                let file = |number: u8| Some(Arc::clone(files.get(usize::from(number))?));
                let copies = Copies::begin(own, last, of_page, file, &pages.ahead);
                store.copies = Some(Arc::new(copies));
            }
        }
        store.map_own()?;
        store.map(0..size)?;
        Ok(store)
    }

    /// Maps our own file for writing code.
    fn map_own(&self) -> io::Result<()> {
        let own = self.files.last().ok_or(io::ErrorKind::NotFound)?;
        self.rw.map_file(0, self.code, WRITE, own.as_raw_fd(), 0).map(drop)
    }

    /// What was copied of what it began with, if it did.
    pub fn copies(&self) -> Option<Arc<Copies>> {
        self.copies.clone()
    }

    /// Host address of the executable mapping.
    pub fn rx(&self) -> u64 {
        self.rx.addr()
    }

    /// Host address of the mapping for writing, and for reading what is behind the code.
    fn rw(&self) -> u64 {
        self.rw.addr()
    }

    fn own_number(&self) -> u8 {
        (self.files.len() - 1) as u8
    }

    /// Maps a range of whole pages, each from its file.
    fn map(&self, range: Range<usize>) -> io::Result<()> {
        let own = self.own_number();
        let mut at = range.start;
        while at < range.end {
            let Some(&number) = self.file_of.get(at / PAGE) else { break };
            let is_code = at < self.code;
            let end = if is_code { range.end.min(self.code) } else { range.end };
            let rest = self.file_of.get(at / PAGE..end / PAGE).unwrap_or_default();
            let pages = rest.iter().take_while(|&&n| n == number).count();
            let file = self.files.get(usize::from(number)).ok_or(io::ErrorKind::NotFound)?;
            let (raw, len) = (file.as_raw_fd(), pages * PAGE);
            if is_code {
                self.rx.map_file(at, len, EXECUTE, raw, at as u64)?;
            } else {
                let kind = if number == own { libc::MAP_SHARED } else { libc::MAP_PRIVATE };
                self.rw.map(at..at + len, WRITE, kind, raw, at as u64)?;
            }
            at += len;
        }
        Ok(())
    }

    /// Before a range is written.
    #[inline]
    fn own(&mut self, place: usize, len: usize) {
        if self.files.len() > 1 {
            self.own_slowly(place, len);
        }
    }

    fn own_slowly(&mut self, place: usize, len: usize) {
        let own = self.own_number();
        for page in place / PAGE..(place + len).div_ceil(PAGE) {
            // There may be too many mappings for one more.
            if self.file_of.get(page).is_some_and(|&n| n != own) && self.copy(page).is_err() {
                self.bring_together_or_end();
                return;
            }
        }
    }

    fn copy(&mut self, page: usize) -> io::Result<()> {
        if page >= self.code / PAGE {
            self.written[page] = true;
            return Ok(());
        }
        if self.singles >= SINGLES_MAX {
            return self.bring_together();
        }
        self.singles += 1;
        let own = self.own_number();
        self.copy_out(page)?;
        self.file_of[page] = own;
        if let Some(copies) = &self.copies {
            copies.note(page as u64);
        }
        self.map(page * PAGE..(page + 1) * PAGE)
    }

    /// Writes a page into the own file.
    fn copy_out(&self, page: usize) -> io::Result<()> {
        let Some(own) = self.files.last() else { return Ok(()) };
        let bytes = self.bytes(page * PAGE, PAGE).unwrap_or_default();
        sys::write_at(own.as_raw_fd(), bytes, (page * PAGE) as u64)
    }

    /// Copies all that is shared, whatever was begun and not finished before.
    fn bring_together_or_end(&mut self) {
        if let Err(error) = self.bring_together() {
            lost(&error);
        }
    }

    /// Copies all that is shared.
    fn bring_together(&mut self) -> io::Result<()> {
        let own = self.own_number();
        for page in 0..self.file_of.len() {
            if self.file_of[page] != own {
                self.copy_out(page)?;
            }
        }
        self.file_of.fill(0);
        self.written.fill(false);
        self.files.drain(..usize::from(own));
        self.singles = 0;
        self.map_own()?;
        self.map(0..self.size)
    }

    /// Writes pages that are in no file into our own. They stay mapped as they are.
    fn write_out(&mut self) -> io::Result<()> {
        let own = self.own_number();
        for page in 0..self.written.len() {
            if self.written[page] {
                self.copy_out(page)?;
                self.file_of[page] = own;
                self.written[page] = false;
            }
        }
        Ok(())
    }

    /// Copies what is in the file that has the fewest pages, which is not needed any more then.
    fn leave_smallest(&mut self) -> io::Result<()> {
        let mut counts = vec![0; self.files.len()];
        for &n in &self.file_of {
            if let Some(count) = counts.get_mut(usize::from(n)) {
                *count += 1;
            }
        }
        let own = self.own_number();
        let smallest = (0..own).min_by_key(|&n| counts.get(usize::from(n)).copied());
        let Some(smallest) = smallest else { return Ok(()) };
        for page in 0..self.file_of.len() {
            if self.file_of[page] == smallest {
                self.copy_out(page)?;
                self.file_of[page] = own;
            }
        }
        self.files.remove(usize::from(smallest));
        for n in &mut self.file_of {
            *n -= u8::from(*n > smallest);
        }
        self.map(0..self.size)
    }

    /// Shares what is in `live`, places that are in order; the rest is forgotten.
    ///
    /// # Errors
    /// The system refuses; the cache can go on.
    pub fn share(&mut self, live: &[Range<usize>]) -> io::Result<Origin> {
        self.try_to_share(live).inspect_err(|_| self.bring_together_or_end())
    }

    fn try_to_share(&mut self, live: &[Range<usize>]) -> io::Result<Origin> {
        self.write_out()?;
        if self.file_of.chunk_by(|a, b| a == b).count() > PIECES_MAX {
            self.bring_together()?;
        }
        while self.files.len() > FILES_MAX {
            self.leave_smallest()?;
        }
        let new = Arc::new(sys::memfd(c"berth-code", self.size as u64)?);
        let mut of_page = vec![0; self.file_of.len()];
        for range in live {
            for page in range.start / PAGE..range.end.div_ceil(PAGE) {
                if let (Some(of), Some(&n)) = (of_page.get_mut(page), self.file_of.get(page)) {
                    *of = n + 1;
                }
            }
        }
        let files = self.files.clone();
        self.files.push(new);
        self.map_own()?;
        let own = self.own_number();
        let mut at = 0;
        for run in of_page.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
            let (first, len) = (at / PAGE, run.len() * PAGE);
            if run.first() == Some(&0) {
                // What is forgotten is in the new file.
                self.file_of[first..first + run.len()].fill(own);
                self.map(at..at + len)?;
            } else {
                // Code stays mapped as it is.
                self.map_last(self.code.clamp(at, at + len)..at + len, own - 1)?;
            }
            at += len;
        }
        self.singles = 0;
        Ok(Origin { files, of_page, ahead: Vec::new() })
    }

    /// Maps those pages of a range of tables that are in one of the files; the others stay as they are.
    fn map_last(&self, range: Range<usize>, number: u8) -> io::Result<()> {
        let pages = self.file_of.get(range.start / PAGE..range.end / PAGE).unwrap_or_default();
        let mut at = range.start;
        for run in pages.chunk_by(|a, b| (*a == number) == (*b == number)) {
            let end = at + run.len() * PAGE;
            if run.first() == Some(&number) {
                self.map(at..end)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Writes bytes; the range must be inside.
    pub fn write(&mut self, place: usize, bytes: &[u8]) {
        assert!(place <= self.size && bytes.len() <= self.size - place, "inside the cache");
        self.own(place, bytes.len());
        let to = (self.rw() as usize + place) as *mut u8;
        // SAFETY: the range is inside our writable mapping (asserted), and its pages are our own;
        // the executing alias is used only by this thread, which is here and not in generated code.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    /// What is there.
    pub fn bytes(&self, place: usize, len: usize) -> Option<&[u8]> {
        if place > self.size || len > self.size - place {
            return None;
        }
        let is_code = place < self.code;
        if is_code && len > self.code - place {
            return None;
        }
        let from = (if is_code { self.rx() } else { self.rw() } as usize + place) as *const u8;
        // SAFETY: inside the mapping, which is readable, lives as long as we do, and is written by
        // this thread only, in methods that borrow us mutably.
        Some(unsafe { std::slice::from_raw_parts(from, len) })
    }
}

/// Values that are the same in each process of one program.
///
/// # Safety
/// No pointers.
pub unsafe trait Plain: Copy {}

// SAFETY: integers.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: as above.
unsafe impl Plain for u64 {}
// SAFETY: of such values.
unsafe impl<T: Plain, U: Plain> Plain for (T, U) {}

/// A list in a [`Store`].
pub struct Stream<T> {
    /// Where in the store.
    place: usize,
    at: *mut T,
    len: usize,
    max: usize,
    of: PhantomData<T>,
}

// SAFETY: the memory it points to belongs to the store that lives beside it, and has no thread
// affinity.
unsafe impl<T: Send> Send for Stream<T> {}

impl<T> Default for Stream<T> {
    fn default() -> Self {
        Self { place: 0, at: std::ptr::dangling_mut(), len: 0, max: 0, of: PhantomData }
    }
}

impl<T: Plain> Deref for Stream<T> {
    type Target = [T];
    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: so many values were written there, or are zeroes, in the mapping of the store,
        // which lives as long; they change only in methods that borrow us mutably.
        unsafe { std::slice::from_raw_parts(self.at, self.len) }
    }
}

impl<T: Plain> Stream<T> {
    /// An empty list of at most `max` values at the place `next`, which moves on behind it. It is of
    /// no use before [`Stream::connect`].
    pub fn new(next: &mut usize, max: usize) -> Self {
        let place = *next;
        *next = (place + max * size_of::<T>()).next_multiple_of(PAGE);
        Self { place, max, ..Self::default() }
    }

    /// Says where its store is.
    pub fn connect(&mut self, store: &Store) {
        assert!(self.place + self.max * size_of::<T>() <= store.size, "inside the store");
        self.at = (store.rw() as usize + self.place) as *mut T;
    }

    /// Whether so many more fit.
    pub const fn has_room(&self, more: usize) -> bool {
        self.len + more <= self.max
    }

    /// Where in the store its values are.
    pub fn live(&self) -> Range<usize> {
        self.place..self.place + self.len * size_of::<T>()
    }

    /// Sets how many there are; false if that is too many.
    pub fn set_len(&mut self, len: usize) -> bool {
        let fits = len <= self.max;
        self.len = if fits { len } else { 0 };
        fits
    }

    /// Forgets all of it.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Forgets what is behind the first `len`.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Appends a value; the caller has looked for room.
    pub fn push(&mut self, store: &mut Store, value: T) {
        self.extend(store, &[value]);
    }

    /// Appends values; the caller has looked for room.
    pub fn extend(&mut self, store: &mut Store, values: &[T]) {
        assert!(self.has_room(values.len()), "room in a table of the code cache");
        let place = self.place + self.len * size_of::<T>();
        store.own(place, size_of_val(values));
        // SAFETY: inside the part of the store that is ours (asserted), writable now.
        unsafe {
            let to = self.at.add(self.len);
            std::ptr::copy_nonoverlapping(values.as_ptr(), to, values.len());
        }
        self.len += values.len();
    }

    /// A value that is to be changed.
    pub fn edit(&mut self, store: &mut Store, index: usize) -> Option<&mut T> {
        self.edit_all(store, index..index + 1)?.first_mut()
    }

    /// Values that are to be changed.
    pub fn edit_all(&mut self, store: &mut Store, range: Range<usize>) -> Option<&mut [T]> {
        if range.start > range.end || range.end > self.len {
            return None;
        }
        let place = self.place + range.start * size_of::<T>();
        store.own(place, range.len() * size_of::<T>());
        // SAFETY: values that are there, writable now; borrowed from us mutably.
        Some(unsafe { std::slice::from_raw_parts_mut(self.at.add(range.start), range.len()) })
    }

    /// Sets a value, if it is another one.
    pub fn set(&mut self, store: &mut Store, index: usize, value: T)
    where
        T: PartialEq,
    {
        if self.get(index).is_some_and(|now| *now != value)
            && let Some(place) = self.edit(store, index)
        {
            *place = value;
        }
    }
}
