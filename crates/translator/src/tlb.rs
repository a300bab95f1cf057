//! The software TLB: flat tables indexed by guest linear page.
//!
//! A table has one `u64` per page of the 48-bit linear address space: what to add to a guest
//! address to get the host address of the byte. It needs no tag, because the index is exact
//! (a non-canonical address differs from the canonical one by a multiple of 2^48, so that the host
//! address comes out non-canonical too and the processor faults). Nor does generated code ask
//! whether there is an entry: an unknown page's addend leads to host pages without access, the
//! access faults, and the signal handler sends it to the slow path. The tables are sparse files,
//! inaccessible until a page of them is first needed, and then filled with such addends; memory is
//! bounded by [`MAX_TABLE_PAGES`].
//!
//! An entry also vouches for the page behind it: either the next guest page lies behind this one in
//! the same host view, with the same rights, or the host page behind has no access. So an access
//! that crosses into the next page needs no check, and accesses at higher addresses up to a page
//! away may use the same addend.
//!
//! Rights are in which table and which RAM view: an entry of a page that may not be written (or is
//! not dirty) points to the read-only view of RAM. Generated code addresses the table through the GS
//! base, so switching tables is one WRGSBASE. A *view* is one arrangement:
//!
//! | view | who runs on it | lower half | upper half |
//! |---|---|---|---|
//! | `User(s)` | CPL 3 in address space slot `s` | user pages of `s` | not mapped (code masks bit 47) |
//! | `KernelUser(s)` | CPL 0..2, SMAP on, AC = 1 | the same as `User(s)` | kernel pages |
//! | `Kernel` | CPL 0..2 otherwise | supervisor's lower half | kernel pages |
//!
//! A slot belongs to one PCID; the least recently used one is given up for another.

use std::collections::HashSet;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::SetupError;
use crate::layout::{AREA_SIZE, Area, JC_SIZE};
use crate::sys::{self, Reservation};

mod dropped;
mod jumps;
mod known;
mod sources;
mod spaces;

pub use dropped::Dropped;
use jumps::JumpCache;
pub use jumps::Source;

/// Bytes of half a table: 2^35 entries.
const HALF: u64 = 1 << 38;
/// Pages of tables that may be accessible before everything is dropped; a page covers 2 MiB of guest
/// address space.
const MAX_TABLE_PAGES: usize = 8192;
/// Entries in a page of a table.
const PAGE_ENTRIES: u64 = 512;
/// Bytes of the host pages without access that unknown addresses lead into the middle of; more than
/// twice the distance of an access from the address that was looked up.
const GUARD_BYTES: usize = 1 << 20;
/// Entries a journal may have before it names pages of the table instead.
const MAX_JOURNAL: usize = 1 << 13;
/// Pages a journal may have before its table is dropped.
const MAX_JOURNAL_PAGES: usize = 1 << 12;
/// Bytes before the table of each view.
const HEAD: usize = AREA_SIZE + JC_SIZE;

/// Which table generated code runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum View {
    /// User mode in a slot.
    User(u8),
    /// Supervisor with access to user pages of a slot.
    KernelUser(u8),
    /// Supervisor.
    Kernel,
}

/// What is entered for a page.
#[derive(Clone, Copy, Debug)]
pub struct Page {
    /// Host address minus guest address.
    pub addend: u64,
    /// CPL 3 may access it.
    pub user: bool,
    /// SMAP is on: supervisor code reaches user pages only through [`View::KernelUser`].
    pub smap: bool,
    /// Kept when the address space changes.
    pub global: bool,
    /// Size of the guest's mapping.
    pub bytes: u64,
}

/// One half table and what was entered into it.
struct Half {
    /// Offset in the file.
    file_offset: u64,
    /// Host address through which we write it.
    at: u64,
    /// Guest address of the first page.
    first: u64,
    /// Host address that pages without an entry lead to.
    guard: u64,
    /// Indexes of entries that may be set, besides those in the pages below.
    journal: Vec<u64>,
    /// Numbers of whole pages of the table that may be set.
    journal_pages: Vec<u64>,
}

/// Empties a list of entries into one of pages of the table.
fn by_pages(entries: &mut Vec<u64>, pages: &mut Vec<u64>) {
    pages.extend(entries.drain(..).map(|i| i / PAGE_ENTRIES));
    pages.sort_unstable();
    pages.dedup();
}

impl Half {
    fn entry(&self, index: u64) -> &AtomicU64 {
        debug_assert!(index < HALF / 8);
        // SAFETY: `at` is the start of a mapped half table that lives as long as the `Tlb`; the
        // index is masked to 35 bits; only this vCPU's thread uses the tables; callers touch only
        // pages that have been opened.
        unsafe { AtomicU64::from_ptr((self.at + (index & (HALF / 8 - 1)) * 8) as *mut u64) }
    }

    /// What stands for "unknown": it leads into pages without access.
    const fn unknown(&self, index: u64) -> u64 {
        self.guard.wrapping_sub(self.first.wrapping_add(index << 12))
    }

    fn set(&mut self, index: u64, value: u64) {
        self.entry(index).store(value, Ordering::Relaxed);
        self.journal.push(index);
        if self.journal.len() >= MAX_JOURNAL {
            by_pages(&mut self.journal, &mut self.journal_pages);
        }
    }

    fn forget(&self, index: u64) {
        self.entry(index).store(self.unknown(index), Ordering::Relaxed);
    }

    fn forget_page(&self, page: u64) {
        for i in page * PAGE_ENTRIES..(page + 1) * PAGE_ENTRIES {
            self.forget(i);
        }
    }

    fn clear(&mut self) {
        for &i in &self.journal {
            self.forget(i);
        }
        for &p in &self.journal_pages {
            self.forget_page(p);
        }
        self.journal.clear();
        self.journal_pages.clear();
    }

    fn long(&self) -> bool {
        self.journal_pages.len() > MAX_JOURNAL_PAGES
    }
}

struct Slot {
    pcid: Option<u16>,
    /// Number of the address space it was last given to.
    space: u16,
    used: u64,
    user: Half,
    user_view: u64,
    kernel_view: u64,
    jc_user: JumpCache,
    /// What a process with a copy of it has to drop, if there is one.
    dropped: Option<Dropped>,
}

/// The tables of one vCPU.
pub struct Tlb {
    fd: OwnedFd,
    space: Reservation,
    _guard: Reservation,
    slots: Vec<Slot>,
    current: usize,
    /// Address spaces so far; it wraps.
    spaces: u16,
    clock: u64,
    kernel_view: u64,
    jc_kernel: JumpCache,
    /// Jump caches are small until so many more entries were made.
    jc_room: Option<usize>,
    /// Views whose jump caches were mapped as a whole while they were small, by number.
    jcs_shown: u64,
    low: Half,
    high: Half,
    /// Entries of `high` that are not global.
    high_local: Vec<u64>,
    /// The same, whole pages of the table.
    high_local_pages: Vec<u64>,
    /// Pages of views that are accessible: number of the page in the view, number of the view.
    open: HashSet<u64>,
    last_open: u64,
    /// 2 MiB regions and 1 GiB regions that were entered from large pages.
    large: HashSet<u64>,
    huge: HashSet<u64>,
    /// The return stack is to be forgotten.
    pub returns_stale: bool,
    /// Translations of kernel addresses that are not global are in jump caches.
    jc_local: bool,
    /// Full flushes because of the limits.
    pub overflows: u64,
    /// Jump caches cleared.
    pub jc_clears: u64,
    /// Times the supervisor's was.
    pub jc_kernel_clears: u64,
}

impl Tlb {
    /// Reserves and maps the tables for `slots` address spaces.
    ///
    /// # Errors
    /// When the host refuses the address space.
    pub fn new(slots: usize) -> Result<Self, SetupError> {
        let map_err = |source| SetupError::Map { what: "TLB tables", source };
        let head = HEAD as u64;
        // File: area, the kernel's jump cache, one for each slot, then the halves.
        let jcs = slots as u64 + 1;
        let halves_at = (AREA_SIZE as u64 + jcs * JC_SIZE as u64).next_multiple_of(1 << 21);
        let halves = slots as u64 + 2;
        let fd = sys::memfd(c"berth-tlb", halves_at + halves * HALF).map_err(map_err)?;
        let per_slot = 2 * head + HALF + 2 * HALF;
        let space =
            Reservation::new((slots as u64 * per_slot + head + 2 * HALF + (4 << 20)) as usize)
                .map_err(map_err)?;
        let guard_space = Reservation::new(GUARD_BYTES).map_err(map_err)?;
        let guard = guard_space.addr() + GUARD_BYTES as u64 / 2;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let raw = fd.as_raw_fd();
        let mut at = 0u64;
        let mut place = |jc: u64, halves: &[u64]| -> std::io::Result<u64> {
            let jc = AREA_SIZE as u64 + jc * JC_SIZE as u64;
            space.map_file(at as usize, JC_SIZE, rw, raw, jc)?;
            space.map_file(at as usize + JC_SIZE, AREA_SIZE, rw, raw, 0)?;
            let base = at + head;
            for (i, h) in halves.iter().enumerate() {
                let off = base + i as u64 * HALF;
                let file = halves_at + h * HALF;
                space.map_file(off as usize, HALF as usize, libc::PROT_NONE, raw, file)?;
            }
            at = base + halves.len() as u64 * HALF;
            Ok(space.addr() + base)
        };
        let (low_no, high_no) = (slots as u64, slots as u64 + 1);
        let kernel_view = place(0, &[low_no, high_no]).map_err(map_err)?;
        let half = |no: u64, at: u64, first: u64| Half {
            file_offset: halves_at + no * HALF,
            at,
            first,
            guard,
            journal: Vec::new(),
            journal_pages: Vec::new(),
        };
        let mut list = Vec::new();
        for s in 0..slots as u64 {
            let user_view = place(s + 1, &[s]).map_err(map_err)?;
            let kernel_user = place(0, &[s, high_no]).map_err(map_err)?;
            list.push(Slot {
                pcid: None,
                space: 0,
                used: 0,
                user: half(s, user_view, 0),
                user_view,
                kernel_view: kernel_user,
                jc_user: JumpCache::default(),
                dropped: None,
            });
        }
        Ok(Self {
            fd,
            space,
            _guard: guard_space,
            slots: list,
            current: 0,
            spaces: 0,
            clock: 0,
            kernel_view,
            jc_kernel: JumpCache::default(),
            jc_room: None,
            jcs_shown: 0,
            low: half(low_no, kernel_view, 0),
            high: half(high_no, kernel_view + HALF, 0xffff_8000_0000_0000),
            high_local: Vec::new(),
            high_local_pages: Vec::new(),
            open: HashSet::new(),
            last_open: !0,
            large: HashSet::new(),
            huge: HashSet::new(),
            returns_stale: true,
            jc_local: false,
            overflows: 0,
            jc_clears: 0,
            jc_kernel_clears: 0,
        })
    }

    /// The area shared by all views.
    pub fn area(&self) -> *mut Area {
        (self.kernel_view - AREA_SIZE as u64) as *mut Area
    }

    /// GS base of a view.
    pub fn base(&self, view: View) -> u64 {
        match view {
            View::Kernel => self.kernel_view,
            View::User(s) => self.slots[usize::from(s)].user_view,
            View::KernelUser(s) => self.slots[usize::from(s)].kernel_view,
        }
    }

    /// Slot of the current address space.
    pub fn current(&self) -> u8 {
        self.current as u8
    }

    /// The addend of a page, if it is known.
    pub fn get(&self, view: View, va: u64) -> Option<u64> {
        let upper = va >> 47 & 1 != 0;
        if !self.is_open(Self::primary(view, va), va) || !self.is_open(view, va) {
            return None;
        }
        let half = match (view, upper) {
            (View::User(_), true) => return None,
            (View::User(s) | View::KernelUser(s), false) => &self.slots[usize::from(s)].user,
            (View::Kernel, false) => &self.low,
            _ => &self.high,
        };
        let index = (va >> 12) & (HALF / 8 - 1);
        let addend = half.entry(index).load(Ordering::Relaxed);
        (addend != half.unknown(index)).then_some(addend)
    }

    /// Enters a translation for the page of `va`.
    pub fn fill(&mut self, view: View, va: u64, page: Page) {
        self.enter(view, va, page, 1);
    }

    /// Enters the same addend for `count` pages from `va` on, which is a multiple of 2 MiB.
    pub fn fill_region(&mut self, view: View, va: u64, page: Page, count: u64) {
        debug_assert!(va & ((PAGE_ENTRIES << 12) - 1) == 0 && count <= PAGE_ENTRIES);
        self.enter(view, va, page, count);
    }

    fn enter(&mut self, view: View, va: u64, page: Page, count: u64) {
        let Page { addend, user, smap, global, bytes } = page;
        let index = (va >> 12) & (HALF / 8 - 1);
        let upper = va >> 47 & 1 != 0;
        let allowed = match (view, upper) {
            (View::Kernel, false) => !(user && smap),
            (View::User(_) | View::KernelUser(_), false) => user,
            (View::Kernel | View::KernelUser(_), true) => !user,
            (View::User(_), true) => false,
        };
        if !allowed || !self.touch(view, va) {
            return;
        }
        let half = match (view, upper) {
            (View::User(s) | View::KernelUser(s), false) => &mut self.slots[usize::from(s)].user,
            (View::Kernel, false) => &mut self.low,
            _ => &mut self.high,
        };
        if count == 1 {
            half.set(index, addend);
        } else {
            for i in index..index + count {
                half.entry(i).store(addend, Ordering::Relaxed);
            }
            half.journal_pages.push(index / PAGE_ENTRIES);
        }
        let mut long = half.long();
        if upper && !global {
            if count == 1 {
                self.high_local.push(index);
            } else {
                self.high_local_pages.push(index / PAGE_ENTRIES);
            }
            if self.high_local.len() >= MAX_JOURNAL {
                by_pages(&mut self.high_local, &mut self.high_local_pages);
            }
            long |= self.high_local_pages.len() > MAX_JOURNAL_PAGES;
        }
        if bytes > 4096 {
            self.reaches_into(va, bytes);
        }
        if long {
            self.overflows += 1;
            self.flush_all();
        }
    }

    /// Number of a view and of the table page in it that a look-up of `va` reads.
    const fn place(view: View, va: u64) -> (u64, u64) {
        let (no, bits) = match view {
            View::Kernel => (0, 48),
            View::User(s) => (1 + 2 * s as u64, 47),
            View::KernelUser(s) => (2 + 2 * s as u64, 48),
        };
        (no, (va & ((1 << bits) - 1)) >> 21)
    }

    /// The view through which we write the half table that `view` shows at `va`.
    fn primary(view: View, va: u64) -> View {
        match view {
            View::KernelUser(s) if va >> 47 & 1 == 0 => View::User(s),
            View::KernelUser(_) => View::Kernel,
            v => v,
        }
    }

    /// Makes the page of the table that a look-up of `va` reads accessible; `false` when that failed
    /// or made everything be dropped.
    pub fn touch(&mut self, view: View, va: u64) -> bool {
        let (no, page) = Self::place(view, va);
        let key = page << 8 | no;
        if key == self.last_open {
            return true;
        }
        if self.open.contains(&key) {
            self.last_open = key;
            return true;
        }
        let primary = Self::primary(view, va);
        if primary != view && !self.touch(primary, va) {
            return false;
        }
        let at = self.base(view) + page * 4096;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        if self.open.len() >= MAX_TABLE_PAGES || sys::mprotect(at, 4096, rw).is_err() {
            self.overflows += 1;
            self.drop_tables();
            return false;
        }
        self.open.insert(key);
        self.last_open = key;
        if primary == view {
            let per_half = HALF / 4096;
            match view {
                View::User(s) => self.slots[usize::from(s)].user.forget_page(page),
                _ if page < per_half => self.low.forget_page(page),
                _ => self.high.forget_page(page - per_half),
            }
        }
        true
    }

    /// Whether the page with the entry of `va` in the half table behind `view` is accessible.
    fn is_open(&self, view: View, va: u64) -> bool {
        let (no, page) = Self::place(view, va);
        self.open.contains(&(page << 8 | no))
    }

    /// What generated code would find for `va`, and whether that is an entry.
    pub fn look_up(&self, view: View, va: u64) -> (u64, bool) {
        let half = match (view, va >> 47 & 1 != 0) {
            // As generated code does for user mode, without bit 47.
            (View::User(s), _) | (View::KernelUser(s), false) => &self.slots[usize::from(s)].user,
            (View::Kernel, false) => &self.low,
            _ => &self.high,
        };
        let index = (va >> 12) & (HALF / 8 - 1);
        let unknown = half.unknown(index);
        if !self.is_open(Self::primary(view, va), va) {
            return (unknown, false);
        }
        let found = half.entry(index).load(Ordering::Relaxed);
        (found, found != unknown)
    }

    fn drop_tables(&mut self) {
        self.flush_all();
        let none = libc::PROT_NONE;
        let mut failed = sys::mprotect(self.kernel_view, 2 * HALF as usize, none).is_err();
        for s in &self.slots {
            failed |= sys::mprotect(s.user_view, HALF as usize, none).is_err();
            failed |= sys::mprotect(s.kernel_view, 2 * HALF as usize, none).is_err();
        }
        let start = self.slots.first().map_or(self.low.file_offset, |s| s.user.file_offset);
        let len = self.high.file_offset + HALF - start;
        failed |= sys::punch_hole(self.fd.as_raw_fd(), start, len).is_err();
        if failed {
            // An accessible page of zeroes would lead anywhere.
            eprintln!("berth: giving back TLB tables failed: {}", std::io::Error::last_os_error());
            std::process::abort();
        }
        self.open.clear();
        self.last_open = !0;
    }

    /// Some entry vouches for a part of the large page of `bytes` bytes at `va`.
    pub fn reaches_into(&mut self, va: u64, bytes: u64) {
        self.large.insert(va >> 21);
        if bytes > 4 << 20 {
            self.huge.insert(va >> 30);
        }
    }

    /// From now on it is kept what is dropped from a slot.
    pub fn watch(&mut self, slot: usize) {
        *self.dropped(slot) = Dropped::default();
    }

    /// What was dropped from a slot since the last time.
    pub fn dropped(&mut self, slot: usize) -> &mut Dropped {
        self.slots[slot].dropped.get_or_insert_default()
    }

    /// Drops one page (of whatever size the guest mapped it with) from all tables.
    pub fn invalidate(&mut self, va: u64) {
        if self.huge.contains(&(va >> 30)) {
            self.flush_all();
            return;
        }
        // The page before may have been entered as one that goes on in this one.
        self.invalidate_one(va.wrapping_sub(4096));
        self.invalidate_one(va);
        for region in [va >> 21, va >> 21 ^ 1] {
            if self.large.remove(&region) {
                let start = region << 21;
                self.invalidate_one(start.wrapping_sub(4096));
                for i in 0..PAGE_ENTRIES {
                    self.forget_one(start + (i << 12));
                }
                self.drop_copies(start, PAGE_ENTRIES << 12);
            }
        }
    }

    fn invalidate_one(&mut self, va: u64) {
        self.forget_one(va);
        self.drop_copies(va & !0xfff, 1 << 12);
    }

    fn drop_copies(&mut self, va: u64, len: u64) {
        for dropped in self.slots.iter_mut().filter_map(|s| s.dropped.as_mut()) {
            dropped.add(va, len);
        }
    }

    fn forget_one(&mut self, va: u64) {
        let index = (va >> 12) & (HALF / 8 - 1);
        if va >> 47 & 1 != 0 {
            if self.is_open(View::Kernel, va) {
                self.high.forget(index);
            }
            return;
        }
        if self.is_open(View::Kernel, va) {
            self.low.forget(index);
        }
        for (i, s) in self.slots.iter().enumerate() {
            if s.pcid.is_some() && self.is_open(View::User(i as u8), va) {
                s.user.forget(index);
            }
        }
    }

    /// Switches to the address space `pcid`, dropping its non-global entries unless `keep`.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        self.clock += 1;
        self.spaces = self.spaces.wrapping_add(1);
        let space = self.spaces;
        let found = self.slots.iter().position(|s| s.pcid == Some(pcid));
        let slot = found.unwrap_or_else(|| {
            (0..self.slots.len()).min_by_key(|&i| self.slots[i].used).unwrap_or(0)
        });
        self.current = slot;
        let clock = self.clock;
        let s = &mut self.slots[slot];
        s.used = clock;
        s.pcid = Some(pcid);
        if !keep || found.is_none() {
            s.space = space;
            self.flush_slot(slot);
        }
        self.flush_kernel_local();
        self.returns_stale = true;
    }

    /// Number of the current address space, or of some that had its PCID.
    pub fn space(&self) -> u16 {
        self.slots.get(self.current).map_or(0, |s| s.space)
    }

    /// Whether the PCID of an address space has been given to another one, or was flushed.
    pub fn is_gone(&self, space: u16) -> bool {
        self.slots.iter().all(|s| s.space != space)
    }

    fn flush_slot(&mut self, slot: usize) {
        self.slots[slot].user.clear();
        if let Some(dropped) = &mut self.slots[slot].dropped {
            dropped.all = true;
        }
        self.clear_jc(View::User(slot as u8));
    }

    /// Drops what belongs to no PCID and is not global. The supervisor's jump cache depends on where
    /// code is, not on the data that was accessed.
    fn flush_kernel_local(&mut self) {
        if std::mem::take(&mut self.jc_local) {
            self.clear_jc(View::Kernel);
        }
        if !self.low.journal.is_empty() || !self.low.journal_pages.is_empty() {
            self.low.clear();
        }
        for i in std::mem::take(&mut self.high_local) {
            self.high.forget(i);
        }
        for p in std::mem::take(&mut self.high_local_pages) {
            self.high.forget_page(p);
        }
    }

    /// Drops the non-global entries of all PCIDs.
    pub fn flush_non_global(&mut self) {
        for i in 0..self.slots.len() {
            self.flush_slot(i);
        }
        self.flush_kernel_local();
    }

    /// Drops the non-global entries of one PCID.
    pub fn flush_pcid(&mut self, pcid: u16) {
        if let Some(i) = self.slots.iter().position(|s| s.pcid == Some(pcid)) {
            self.flush_slot(i);
        }
        self.flush_kernel_local();
    }

    /// Drops everything, global entries included.
    pub fn flush_all(&mut self) {
        self.flush_data();
        self.jc_local = false;
        self.clear_all_jcs();
    }

    /// Drops all host addresses of data; jump caches stay.
    pub fn flush_data(&mut self) {
        for slot in &mut self.slots {
            slot.user.clear();
            if let Some(dropped) = &mut slot.dropped {
                dropped.all = true;
            }
        }
        self.low.clear();
        self.high.clear();
        self.high_local.clear();
        self.high_local_pages.clear();
        self.large.clear();
        self.huge.clear();
    }
}
