//! The software TLB: flat tables indexed by guest linear page.
//!
//! A table has one `u64` per page of the 48-bit linear address space: what to add to a guest
//! address to get the host address of the byte, or 0. It needs no tag, because the index is exact
//! (a non-canonical address differs from the canonical one by a multiple of 2^48, so that the host
//! address comes out non-canonical too and the processor faults). The tables are sparse files mapped
//! without reservation; memory is used only for the parts touched, and bounded by
//! [`MAX_TABLE_PAGES`].
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
use crate::layout::{AREA_SIZE, Area, JC_ENTRIES, JC_MASK, JC_SIZE};
use crate::sys::{self, Reservation};

/// Bytes of half a table: 2^35 entries.
const HALF: u64 = 1 << 38;
/// Pages of tables that may be populated before everything is dropped; a page covers 2 MiB of guest
/// address space.
const MAX_TABLE_PAGES: usize = 4096;
/// Entries a journal may have before its table is dropped.
const MAX_JOURNAL: usize = 1 << 17;
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
    /// Indexes of entries that may be non-zero.
    journal: Vec<u64>,
}

impl Half {
    fn entry(&self, index: u64) -> &AtomicU64 {
        debug_assert!(index < HALF / 8);
        // SAFETY: `at` is the start of a mapped half table that lives as long as the `Tlb`; the
        // index is masked to 35 bits by the callers; only this vCPU's thread uses the tables.
        unsafe { AtomicU64::from_ptr((self.at + (index & (HALF / 8 - 1)) * 8) as *mut u64) }
    }

    fn set(&mut self, index: u64, value: u64) {
        self.entry(index).store(value, Ordering::Relaxed);
        self.journal.push(index);
    }

    fn clear(&mut self) {
        let journal = std::mem::take(&mut self.journal);
        for &i in &journal {
            self.entry(i).store(0, Ordering::Relaxed);
        }
        self.journal = journal;
        self.journal.clear();
    }
}

struct Slot {
    pcid: Option<u16>,
    used: u64,
    user: Half,
    user_view: u64,
    kernel_view: u64,
    jc_user: bool,
    jc_kernel: bool,
}

/// The tables of one vCPU.
pub struct Tlb {
    fd: OwnedFd,
    _space: Reservation,
    slots: Vec<Slot>,
    current: usize,
    clock: u64,
    kernel_view: u64,
    jc_kernel: bool,
    low: Half,
    high: Half,
    /// Entries of `high` that are not global.
    high_local: Vec<u64>,
    touched: HashSet<u64>,
    last_touched: u64,
    /// 2 MiB regions and 1 GiB regions that were entered from large pages.
    large: HashSet<u64>,
    huge: HashSet<u64>,
    /// Full flushes because of the limits.
    pub overflows: u64,
    /// Jump caches cleared.
    pub jc_clears: u64,
}

impl Tlb {
    /// Reserves and maps the tables for `slots` address spaces.
    ///
    /// # Errors
    /// When the host refuses the address space.
    pub fn new(slots: usize) -> Result<Self, SetupError> {
        let map_err = |source| SetupError::Map { what: "TLB tables", source };
        let head = HEAD as u64;
        // File: area, a jump cache per view, then the halves.
        let views = slots as u64 * 2 + 1;
        let halves_at = (AREA_SIZE as u64 + views * JC_SIZE as u64).next_multiple_of(1 << 21);
        let halves = slots as u64 + 2;
        let fd = sys::memfd(c"berth-tlb", halves_at + halves * HALF).map_err(map_err)?;
        let per_slot = 2 * head + HALF + 2 * HALF;
        let space =
            Reservation::new((slots as u64 * per_slot + head + 2 * HALF + (4 << 20)) as usize)
                .map_err(map_err)?;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let raw = fd.as_raw_fd();
        let mut at = 0u64;
        let mut view_no = 0u64;
        let mut place = |halves: &[u64]| -> std::io::Result<u64> {
            let jc = AREA_SIZE as u64 + view_no * JC_SIZE as u64;
            view_no += 1;
            space.map_file(at as usize, JC_SIZE, rw, raw, jc)?;
            space.map_file(at as usize + JC_SIZE, AREA_SIZE, rw, raw, 0)?;
            let base = at + head;
            for (i, h) in halves.iter().enumerate() {
                let off = base + i as u64 * HALF;
                space.map_file(off as usize, HALF as usize, rw, raw, halves_at + h * HALF)?;
            }
            at = base + halves.len() as u64 * HALF;
            Ok(space.addr() + base)
        };
        let (low_no, high_no) = (slots as u64, slots as u64 + 1);
        let kernel_view = place(&[low_no, high_no]).map_err(map_err)?;
        let half =
            |no: u64, at: u64| Half { file_offset: halves_at + no * HALF, at, journal: Vec::new() };
        let mut list = Vec::new();
        for s in 0..slots as u64 {
            let user_view = place(&[s]).map_err(map_err)?;
            let kernel_user = place(&[s, high_no]).map_err(map_err)?;
            list.push(Slot {
                pcid: None,
                used: 0,
                user: half(s, user_view),
                user_view,
                kernel_view: kernel_user,
                jc_user: false,
                jc_kernel: false,
            });
        }
        Ok(Self {
            fd,
            _space: space,
            slots: list,
            current: 0,
            clock: 0,
            kernel_view,
            jc_kernel: false,
            low: half(low_no, kernel_view),
            high: half(high_no, kernel_view + HALF),
            high_local: Vec::new(),
            touched: HashSet::new(),
            last_touched: !0,
            large: HashSet::new(),
            huge: HashSet::new(),
            overflows: 0,
            jc_clears: 0,
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

    /// Enters a translation for the page of `va`.
    pub fn fill(&mut self, view: View, va: u64, page: Page) {
        let Page { addend, user, smap, global, bytes } = page;
        let index = (va >> 12) & (HALF / 8 - 1);
        let upper = va >> 47 & 1 != 0;
        if !self.touch(view, va) {
            return;
        }
        match (view, upper) {
            (View::Kernel, false) if !(user && smap) => self.low.set(index, addend),
            (View::User(s) | View::KernelUser(s), false) if user => {
                self.slots[usize::from(s)].user.set(index, addend);
            }
            (View::Kernel | View::KernelUser(_), true) if !user || !smap => {
                if user {
                    return;
                }
                self.high.set(index, addend);
                if !global {
                    self.high_local.push(index);
                }
            }
            _ => return,
        }
        if bytes > 4096 {
            self.large.insert(va >> 21);
            if bytes > 4 << 20 {
                self.huge.insert(va >> 30);
            }
        }
        if self.low.journal.len() > MAX_JOURNAL
            || self.high.journal.len() > MAX_JOURNAL
            || self.slots.iter().any(|s| s.user.journal.len() > MAX_JOURNAL)
        {
            self.overflows += 1;
            self.flush_all();
        }
    }

    /// Counts the page of a table that a look-up of `va` populates; `false` when that made
    /// everything be dropped.
    pub fn touch(&mut self, view: View, va: u64) -> bool {
        let tag = match view {
            View::Kernel => 0xff,
            View::User(s) | View::KernelUser(s) => {
                if va >> 47 & 1 != 0 {
                    0xff
                } else {
                    u64::from(s)
                }
            }
        };
        let key = ((va >> 21) & ((1 << 27) - 1)) << 8 | tag;
        if key == self.last_touched {
            return true;
        }
        self.last_touched = key;
        self.touched.insert(key);
        if self.touched.len() > MAX_TABLE_PAGES {
            self.overflows += 1;
            self.drop_tables();
            return false;
        }
        true
    }

    fn drop_tables(&mut self) {
        self.flush_all();
        let start = self.slots.first().map_or(self.low.file_offset, |s| s.user.file_offset);
        let len = self.high.file_offset + HALF - start;
        if sys::punch_hole(self.fd.as_raw_fd(), start, len).is_err() {
            // The entries are zero all the same; only memory is kept.
            self.overflows += 1;
        }
        self.touched.clear();
        self.last_touched = !0;
    }

    /// Drops one page (of whatever size the guest mapped it with) from all tables.
    pub fn invalidate(&mut self, va: u64) {
        if self.huge.contains(&(va >> 30)) {
            self.flush_all();
            return;
        }
        let count = if self.large.remove(&(va >> 21)) { 512 } else { 1 };
        let first = if count == 1 { va >> 12 } else { va >> 21 << 9 };
        let index = first & (HALF / 8 - 1);
        for i in index..index + count {
            if va >> 47 & 1 != 0 {
                self.high.entry(i).store(0, Ordering::Relaxed);
            } else {
                self.low.entry(i).store(0, Ordering::Relaxed);
                for s in &self.slots {
                    if s.pcid.is_some() {
                        s.user.entry(i).store(0, Ordering::Relaxed);
                    }
                }
            }
        }
        self.touch(View::Kernel, va);
    }

    /// Switches to the address space `pcid`, dropping its non-global entries unless `keep`.
    pub fn switch(&mut self, pcid: u16, keep: bool) {
        self.clock += 1;
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
            self.flush_slot(slot);
        }
        self.flush_kernel_local();
    }

    fn flush_slot(&mut self, slot: usize) {
        self.slots[slot].user.clear();
        self.clear_jc(View::User(slot as u8));
        self.clear_jc(View::KernelUser(slot as u8));
    }

    /// Drops what belongs to no PCID and is not global.
    fn flush_kernel_local(&mut self) {
        if !self.low.journal.is_empty() {
            self.low.clear();
            self.clear_jc(View::Kernel);
        }
        if !self.high_local.is_empty() {
            for i in std::mem::take(&mut self.high_local) {
                self.high.entry(i).store(0, Ordering::Relaxed);
            }
            self.clear_kernel_jcs();
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
        self.flush_non_global();
        self.high.clear();
        self.clear_kernel_jcs();
        self.large.clear();
        self.huge.clear();
    }

    fn clear_kernel_jcs(&mut self) {
        self.clear_jc(View::Kernel);
        for i in 0..self.slots.len() {
            self.clear_jc(View::KernelUser(i as u8));
        }
    }

    /// Clears the jump caches of all views.
    pub fn clear_all_jcs(&mut self) {
        self.clear_kernel_jcs();
        for i in 0..self.slots.len() {
            self.clear_jc(View::User(i as u8));
        }
    }

    fn jc_flag(&mut self, view: View) -> &mut bool {
        match view {
            View::Kernel => &mut self.jc_kernel,
            View::User(s) => &mut self.slots[usize::from(s)].jc_user,
            View::KernelUser(s) => &mut self.slots[usize::from(s)].jc_kernel,
        }
    }

    fn jc_ptr(&self, view: View) -> *mut u64 {
        (self.base(view) - HEAD as u64) as *mut u64
    }

    fn clear_jc(&mut self, view: View) {
        if !std::mem::take(self.jc_flag(view)) {
            return;
        }
        self.jc_clears += 1;
        let p = self.jc_ptr(view);
        // SAFETY: the jump cache of a view is `JC_ENTRIES` tags followed by as many targets, mapped
        // as long as we live and used by this thread only.
        unsafe {
            for i in 0..JC_ENTRIES {
                p.add(i).write(Self::empty_tag(i));
            }
        }
    }

    /// A tag that matches no address whose index is `i`, canonical or not: address 0 has index 0, and
    /// address 8 has index 1.
    const fn empty_tag(i: usize) -> u64 {
        if i == 0 { 8u64.wrapping_neg() } else { 0 }
    }

    /// Writes the empty tag into every jump cache; once, at creation.
    pub fn init_jcs(&mut self) {
        self.jc_kernel = true;
        for s in &mut self.slots {
            s.jc_user = true;
            s.jc_kernel = true;
        }
        self.clear_all_jcs();
    }

    /// Remembers where the translation of `rip` begins, for indirect jumps on a view.
    pub fn jc_insert(&mut self, view: View, rip: u64, host: u64) {
        *self.jc_flag(view) = true;
        let p = self.jc_ptr(view);
        let i = (rip & JC_MASK) as usize >> JC_MASK.trailing_zeros();
        // SAFETY: as in `clear_jc`; the index is masked.
        unsafe {
            p.add(i).write(rip.wrapping_neg());
            p.add(JC_ENTRIES + i).write(host);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{JC_ENTRIES, JC_MASK, Tlb};

    /// A jump to 0xc000_0000_0000_0000 once matched the tag of empty entries and went to host
    /// address 0.
    #[test]
    fn empty_entries_match_no_address() {
        for i in 0..JC_ENTRIES {
            let rip = Tlb::empty_tag(i).wrapping_neg();
            assert_ne!((rip & JC_MASK) as usize >> JC_MASK.trailing_zeros(), i);
        }
    }
}
