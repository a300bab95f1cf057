//! Guest RAM as the translator maps it.
//!
//! Three views of the same file, each at `base + gpa`:
//!
//! * `raw`: always writable, for what we write ourselves (page walks, helpers) and for devices. Whoever
//!   writes through it reports the write to [`crate::shared::Shared::ram_written`].
//! * `rw`: what generated code writes to, and we read. Pages with translations are write-protected here, so
//!   that a store to translated code traps.
//! * `ro`: read-only, for guest pages that are not writable or not dirty yet.
//!
//! `rw` shows every page; the others show one that was copied when somebody asks for it ([`late`]).
//!
//! Generated code does not look whether an access crosses into another page. That is right when the
//! next guest page lies behind the first one in RAM too. Other pages are reached through *guarded*
//! mappings of single pages, made when first needed and kept, each followed by a page without
//! access: an access across the end traps. Two pages across whose border accesses go again and again
//! get a mapping of both, a *pair*.
//!
//! RAM can be frozen: what it held then stays in a file that nobody writes any more, and a page is
//! copied to another one before it is next written ([`layers`]).
//!
//! All accesses race with other vCPUs and devices by design; they are volatile or atomic.

mod late;
mod layers;
mod touched;

use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use berth_x86::PhysMem;

use crate::code::FastMap;
use crate::ram::late::Late;
use crate::ram::layers::{Bits, Layers};
pub use crate::ram::layers::{Frozen, Origin};
use crate::shared::lock;
use crate::sys::{self, Reservation};
use crate::{Config, RamSlot, SetupError};

/// Page size of the host and of the smallest guest mapping.
pub const PAGE: u64 = 4096;

/// From one guarded page to the next.
const GUARDED_STRIDE: u64 = 2 * PAGE;

struct Slot {
    gpa: u64,
    size: u64,
    /// Where it begins in each file.
    offset: u64,
}

/// The mapped guest RAM.
pub struct Ram {
    slots: Vec<Slot>,
    span: u64,
    raw: Late,
    rw: Reservation,
    ro: Late,
    guarded: Guarded,
    pairs: Mutex<Pairs>,
    layers: Layers,
    /// For each page: it is write-protected in the writable view, since there are translations of it.
    protected: Bits,
    /// For each page: it may have mappings besides the views.
    covered: Bits,
    /// Held by whoever changes mappings or their protection.
    pub(crate) mapping: Mutex<()>,
}

/// Mappings of two pages, each in the place of a guarded page and what follows it.
#[derive(Default)]
struct Pairs {
    /// By the physical addresses of both pages, and whether for writing: its number.
    numbers: FastMap<(u64, u64, bool), u32>,
    /// By physical address: host addresses where the page is mapped, and whether for writing.
    places: FastMap<u64, Vec<(u64, bool)>>,
    /// Numbers of those that were forgotten.
    free: Vec<u32>,
}

/// Pairs may be so many of all guarded mappings.
const PAIRS_PART: usize = 3;

/// Mappings of single pages.
struct Guarded {
    space: Reservation,
    limit: usize,
    used: AtomicUsize,
    /// Numbers of those that were forgotten. None was ever one of a pair: what follows has no access.
    free: Mutex<Vec<u32>>,
    /// For each page of RAM: one more than the number of its guarded mapping, for writing and for
    /// reading only.
    of_page: [Box<[AtomicU32]>; 2],
}

/// How many guarded mappings fit into the system's limit on mappings.
fn guarded_limit() -> usize {
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|s| s.trim().parse::<usize>().ok())
        .unwrap_or(65_530);
    limit / 3
}

impl Ram {
    /// Maps the slots, within the limits of `config`. `raw` has them mapped already, each at its guest address from the beginning.
    ///
    /// # Errors
    /// When address space or a mapping is refused.
    pub fn new(
        slots: &[RamSlot<'_>],
        raw: Option<Arc<Reservation>>,
        origin: Option<&Origin>,
        config: &Config,
    ) -> Result<Self, SetupError> {
        let map_err = |what| move |source| SetupError::Map { what, source };
        let span = slots.iter().map(|s| s.gpa.saturating_add(s.size)).max().unwrap_or(0);
        let reserve = |what| Reservation::new(span as usize + (1 << 21)).map_err(map_err(what));
        let mapped = raw.is_some();
        let raw = raw.map_or_else(|| reserve("guest RAM").map(Arc::new), Ok)?;
        let rw = reserve("guest RAM (writable view)")?;
        let ro = reserve("guest RAM (read-only view)")?;
        let pages = span / PAGE;
        let (raw, ro) = (Late::new(raw, pages), Late::new(Arc::new(ro), pages));
        let own = slots.first().map(|slot| slot.fd.try_clone_to_owned()).transpose();
        let own = own.map_err(map_err("a guest RAM slot"))?.map(Arc::new);
        let end = slots.iter().map(|slot| slot.offset + slot.size).max().unwrap_or(0);
        let layers = Layers::new(end, own.as_ref(), origin, config.single_copies);
        let slots: Vec<_> =
            slots.iter().map(|s| Slot { gpa: s.gpa, size: s.size, offset: s.offset }).collect();
        let limit = guarded_limit().min(config.guarded_pages);
        let space = Reservation::new((limit as u64 * GUARDED_STRIDE + PAGE) as usize)
            .map_err(map_err("guarded pages"))?;
        let of_page = [sys::zeroes(pages as usize), sys::zeroes(pages as usize)];
        let guarded =
            Guarded { space, limit, used: AtomicUsize::new(0), free: Mutex::default(), of_page };
        let mut ram = Self {
            slots,
            span,
            raw,
            rw,
            ro,
            guarded,
            pairs: Mutex::default(),
            layers,
            protected: Bits::new(pages),
            covered: Bits::new(pages),
            mapping: Mutex::new(()),
        };
        ram.map_views(!mapped).map_err(map_err("a guest RAM slot"))?;
        Ok(ram)
    }

    /// One past the highest RAM address.
    pub fn span(&self) -> u64 {
        self.span
    }

    /// Whether all of `len` bytes at `gpa` are RAM of one slot.
    #[inline]
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        self.slots.iter().any(|s| gpa >= s.gpa && len <= s.size && gpa - s.gpa <= s.size - len)
    }

    /// Where a page is in the files.
    fn offset_of(&self, gpa: u64) -> Option<u64> {
        let slot = self.slots.iter().find(|s| gpa >= s.gpa && gpa - s.gpa < s.size)?;
        Some(slot.offset + (gpa - slot.gpa))
    }

    /// Host address of so many bytes of RAM in the writable or the read-only view, for the software TLB.
    #[inline]
    pub fn view_addr(&self, gpa: u64, len: u64, rw: bool) -> u64 {
        if rw {
            return self.rw_addr(gpa);
        }
        self.show_and_keep(&self.ro, gpa, len);
        self.ro_addr(gpa)
    }

    /// Host address of a RAM byte in the view generated code may write to.
    #[inline]
    pub fn rw_addr(&self, gpa: u64) -> u64 {
        self.rw.addr() + gpa
    }

    /// Host address of a RAM byte in the read-only view.
    #[inline]
    fn ro_addr(&self, gpa: u64) -> u64 {
        self.ro.space.addr() + gpa
    }

    /// Host address of a RAM byte in the view that is never protected.
    #[inline]
    fn raw_addr(&self, gpa: u64) -> u64 {
        self.raw.space.addr() + gpa
    }

    /// Before anything but a vCPU's generated code reads in the view that is never protected. A device may go
    /// on reading there until RAM is frozen.
    #[inline]
    pub fn will_read(&self, gpa: u64, len: u64) {
        self.show_and_keep(&self.raw, gpa, len);
    }

    /// Before anything but a vCPU's generated code writes there: the pages are this machine's own.
    #[inline]
    pub fn will_write(&self, gpa: u64, len: u64) {
        self.own(gpa, len);
        self.show(&self.raw, gpa, len);
    }

    /// Protects or unprotects a page of the writable view and its other mappings. The caller holds
    /// the lock of mappings.
    pub fn protect(&self, gpa: u64, writable: bool) -> std::io::Result<()> {
        self.protected.set(gpa / PAGE, !writable);
        if self.is_frozen(gpa) {
            // It is not writable anyway.
            return Ok(());
        }
        let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        sys::mprotect(self.rw_addr(gpa), PAGE as usize, prot)?;
        self.protect_others(gpa, prot)
    }

    /// Makes everything of the writable view writable again, but what is frozen. The caller holds the
    /// lock of mappings.
    pub fn unprotect_all(&self) {
        for gpa in self.slots.iter().flat_map(|s| (s.gpa..s.gpa + s.size).step_by(PAGE as usize)) {
            if self.protected.get(gpa / PAGE) {
                let _ = self.protect(gpa, true);
            }
        }
    }

    /// The mappings of a page besides the views, and whether they are for writing.
    fn others(&self, gpa: u64) -> impl Iterator<Item = (u64, bool)> + use<> {
        let pairs = lock(&self.pairs).places.get(&gpa).cloned().unwrap_or_default();
        let guarded = [true, false].map(|rw| self.guarded_addr(gpa, rw).map(|at| (at, rw)));
        pairs.into_iter().chain(guarded.into_iter().flatten())
    }

    /// Changes what mappings of a page that are for writing, besides the views, allow.
    fn protect_others(&self, gpa: u64, prot: i32) -> std::io::Result<()> {
        let mut others = self.others(gpa).filter(|(_, rw)| *rw);
        others.try_for_each(|(at, _)| sys::mprotect(at, PAGE as usize, prot))
    }

    /// Forgets all mappings besides the views. Nothing leads to them any more; the caller holds the lock of
    /// mappings.
    fn forget_others(&self) -> std::io::Result<()> {
        let mut free = lock(&self.guarded.free);
        for page in self.covered.iter() {
            for table in &self.guarded.of_page {
                let number = table.get(page as usize).map_or(0, |n| n.swap(0, Ordering::AcqRel));
                free.extend(number.checked_sub(1));
            }
        }
        self.covered.clear_all();
        self.forget_pairs();
        // They stay as they are until others take their place. Tests find whoever looks there.
        if cfg!(debug_assertions) {
            for number in 0..self.guarded.used.load(Ordering::Relaxed) as u32 {
                sys::mprotect(self.guarded_at(number), PAGE as usize, libc::PROT_NONE)?;
            }
        }
        Ok(())
    }

    /// The same, and nothing of them stays.
    fn drop_others(&self) -> std::io::Result<()> {
        self.forget_others()?;
        let used = self.guarded.used.load(Ordering::Relaxed);
        self.guarded.space.clear(used * GUARDED_STRIDE as usize + PAGE as usize)?;
        self.guarded.used.store(0, Ordering::Relaxed);
        lock(&self.guarded.free).clear();
        lock(&self.pairs).free.clear();
        Ok(())
    }

    fn guarded_at(&self, n: u32) -> u64 {
        self.guarded.space.addr() + PAGE + u64::from(n) * GUARDED_STRIDE
    }

    /// Host address of the guarded mapping of the page at `gpa`, when there is one.
    pub fn guarded_addr(&self, gpa: u64, rw: bool) -> Option<u64> {
        let table = &self.guarded.of_page[usize::from(!rw)];
        let n = table.get((gpa / PAGE) as usize)?.load(Ordering::Acquire);
        n.checked_sub(1).map(|n| self.guarded_at(n))
    }

    /// Makes a guarded mapping of the page at `gpa`; `None` when there are too many. The caller makes
    /// sure that nobody else does so, and that `writable` stays true as long as it takes.
    pub fn make_guarded(&self, gpa: u64, rw: bool, writable: bool) -> Option<u64> {
        let entry = self.guarded.of_page[usize::from(!rw)].get((gpa / PAGE) as usize)?;
        let number = lock(&self.guarded.free).pop().or_else(|| self.take_number())?;
        let Some(at) = self.map_at(self.guarded_at(number), gpa, rw && writable) else {
            lock(&self.guarded.free).push(number);
            return None;
        };
        entry.store(number + 1, Ordering::Release);
        self.covered.set(gpa / PAGE, true);
        Some(at)
    }

    /// A number for a guarded mapping or a pair that was neither so far. The caller makes sure that nobody else asks.
    fn take_number(&self) -> Option<u32> {
        let n = self.guarded.used.load(Ordering::Relaxed);
        let number = u32::try_from(n).ok().filter(|_| n < self.guarded.limit)?;
        self.guarded.used.store(n + 1, Ordering::Relaxed);
        Some(number)
    }

    /// Maps a page of RAM at a place among the guarded ones.
    fn map_at(&self, at: u64, gpa: u64, writable: bool) -> Option<u64> {
        let (file, offset) = self.file_of(gpa)?;
        let writable = writable && !self.is_frozen(gpa);
        let prot = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let space = &self.guarded.space;
        let at = (at - space.addr()) as usize;
        space.map_file(at, PAGE as usize, prot, file.as_raw_fd(), offset).ok()
    }

    /// Host address of the mapping of two pages one after the other, when there is one.
    pub fn pair_addr(&self, pages: (u64, u64), rw: bool) -> Option<u64> {
        let n = *lock(&self.pairs).numbers.get(&(pages.0, pages.1, rw))?;
        Some(self.guarded_at(n))
    }

    /// Whether there can be pairs at all.
    pub fn has_pairs(&self) -> bool {
        self.guarded.limit >= PAIRS_PART
    }

    /// Whether there can be no more pairs before they are forgotten.
    pub fn pairs_are_full(&self) -> bool {
        lock(&self.pairs).numbers.len() >= self.guarded.limit / PAIRS_PART
    }

    /// Forgets all pairs, so that there is room for others. The caller makes sure that nothing leads
    /// to them any more.
    pub fn forget_pairs(&self) {
        let pairs = &mut *lock(&self.pairs);
        pairs.free.extend(pairs.numbers.drain().map(|(_, number)| number));
        pairs.places.clear();
    }

    /// Makes a mapping of two pages one after the other; `None` when there are too many. The caller
    /// makes sure that nobody else does so, and that `writable` stays true as long as it takes.
    pub fn make_pair(&self, pages: (u64, u64), rw: bool, writable: [bool; 2]) -> Option<u64> {
        if self.pairs_are_full() {
            return None;
        }
        let mut pairs = lock(&self.pairs);
        let number = pairs.free.pop().or_else(|| self.take_number())?;
        let at = self.guarded_at(number);
        let places = [(at, pages.0, writable[0]), (at + PAGE, pages.1, writable[1])];
        for (at, gpa, writable) in places {
            if self.map_at(at, gpa, rw && writable).is_none() {
                pairs.free.push(number);
                return None;
            }
        }
        pairs.numbers.insert((pages.0, pages.1, rw), number);
        for (at, gpa, _) in places {
            pairs.places.entry(gpa).or_default().push((at, rw));
            self.covered.set(gpa / PAGE, true);
        }
        Some(at)
    }

    /// Copies RAM out; the caller has checked [`Ram::contains`].
    #[inline]
    pub fn read(&self, gpa: u64, buf: &mut [u8]) {
        assert!(self.contains(gpa, buf.len() as u64), "caller checks that this is RAM");
        let src = self.rw_addr(gpa) as *const u8;
        // SAFETY: the range is inside a mapped slot (asserted); guest memory may change under us,
        // which is fine for bytes.
        unsafe { ptr::copy_nonoverlapping(src, buf.as_mut_ptr(), buf.len()) }
    }

    /// Copies into RAM; the caller has checked [`Ram::contains`] and reports the write.
    #[inline]
    pub fn write(&self, gpa: u64, data: &[u8]) {
        assert!(self.contains(gpa, data.len() as u64), "caller checks that this is RAM");
        self.will_write(gpa, data.len() as u64);
        let dst = self.raw_addr(gpa) as *mut u8;
        // SAFETY: the range is inside a mapped, writable slot (asserted). Aligned powers of two are
        // written by one store so that other vCPUs never see half of them.
        unsafe {
            match *data {
                [a] => dst.write_volatile(a),
                [a, b] if gpa & 1 == 0 => {
                    dst.cast::<u16>().write_volatile(u16::from_le_bytes([a, b]));
                }
                [a, b, c, d] if gpa & 3 == 0 => {
                    dst.cast::<u32>().write_volatile(u32::from_le_bytes([a, b, c, d]));
                }
                [a, b, c, d, e, f, g, h] if gpa & 7 == 0 => {
                    dst.cast::<u64>().write_volatile(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
                }
                _ => ptr::copy_nonoverlapping(data.as_ptr(), dst, data.len()),
            }
        }
    }

    /// Copies within RAM, `len` bytes, ranges checked by the caller; they may overlap.
    pub fn copy(&self, src: u64, dst: u64, len: u64) {
        assert!(self.contains(src, len) && self.contains(dst, len));
        self.will_read(src, len);
        self.will_write(dst, len);
        // SAFETY: both ranges are inside mapped slots (asserted).
        unsafe {
            ptr::copy(self.raw_addr(src) as *const u8, self.raw_addr(dst) as *mut u8, len as usize);
        }
    }

    /// Fills `len` bytes by a repeated pattern of 1, 2, 4 or 8 bytes.
    pub fn fill(&self, gpa: u64, len: u64, pattern: &[u8]) {
        assert!(self.contains(gpa, len));
        self.will_write(gpa, len);
        let p = self.raw_addr(gpa) as *mut u8;
        // SAFETY: the range is inside a mapped slot (asserted).
        let bytes = unsafe { std::slice::from_raw_parts_mut(p, len as usize) };
        if let [first, rest @ ..] = pattern {
            if rest.iter().all(|b| b == first) {
                bytes.fill(*first);
            } else {
                for chunk in bytes.chunks_exact_mut(pattern.len()) {
                    chunk.copy_from_slice(pattern);
                }
            }
        }
    }

    /// In the view for writing by us if it is to be written, else only loads are allowed.
    #[inline]
    fn atomic64(&self, gpa: u64, write: bool) -> Option<&AtomicU64> {
        if gpa & 7 != 0 || !self.contains(gpa, 8) {
            return None;
        }
        let at = if write { self.raw_addr(gpa) } else { self.rw_addr(gpa) };
        // SAFETY: aligned, inside a mapped slot, lives as long as the mapping; all concurrent
        // accesses are by hardware atomics or plain guest stores (TSO).
        Some(unsafe { AtomicU64::from_ptr(at as *mut u64) })
    }

    #[inline]
    fn atomic32(&self, gpa: u64, write: bool) -> Option<&AtomicU32> {
        if gpa & 3 != 0 || !self.contains(gpa, 4) {
            return None;
        }
        let at = if write { self.raw_addr(gpa) } else { self.rw_addr(gpa) };
        // SAFETY: as in `atomic64`.
        Some(unsafe { AtomicU32::from_ptr(at as *mut u32) })
    }
}

impl PhysMem for Ram {
    #[inline]
    fn read_u64(&self, gpa: u64) -> u64 {
        self.atomic64(gpa, false).map_or(!0, |a| a.load(Ordering::Relaxed))
    }
    #[inline]
    fn read_u32(&self, gpa: u64) -> u32 {
        self.atomic32(gpa, false).map_or(!0, |a| a.load(Ordering::Relaxed))
    }
    fn cas_u64(&self, gpa: u64, old: u64, new: u64) -> bool {
        self.will_write(gpa, 8);
        self.atomic64(gpa, true).is_none_or(|a| {
            a.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        })
    }
    fn cas_u32(&self, gpa: u64, old: u32, new: u32) -> bool {
        self.will_write(gpa, 4);
        self.atomic32(gpa, true).is_none_or(|a| {
            a.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        })
    }
}
