//! What the vCPUs of a machine share: RAM, the map of pages with translations, and mailboxes.
//!
//! Each vCPU has a code cache of its own. A page from which any vCPU has translated is
//! write-protected in the writable view of RAM; the first store to it traps, and
//! [`Shared::invalidate_page`] tells the vCPUs concerned to drop their blocks before the page
//! becomes writable again. A vCPU reads code bytes only after the page is protected and its bit
//! set; whoever writes by another way looks for the bits only after the bytes are there. So one of
//! the two always notices.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::ahead::{Copies, Written};
use crate::ram::{Frozen, Origin, PAGE, Ram};
use crate::sys::{self, Reservation};
use crate::world::World;
use crate::{Config, RamSlot, SetupError, signal};

/// Most vCPUs of a machine.
pub const MAX_VCPUS: usize = 16;

/// Inbox entry: drop every block.
pub const ALL_PAGES: u64 = u64::MAX;
/// In an inbox: no code, but everything in the software TLB.
pub const ALL_MAPPINGS: u64 = u64::MAX - 1;

/// In an inbox: all processes for direct execution are to end.
pub const ALL_SPACES: u64 = u64::MAX - 2;

/// In an inbox: host addresses of data in the software TLB, no code.
pub const ALL_DATA: u64 = u64::MAX - 3;

/// In an inbox, with the number of a page: processes for direct execution are to drop it.
pub const UNMIRROR: u64 = 1 << 62;

/// What others leave for a vCPU.
pub struct Mailbox {
    /// Address of [`crate::layout::Area::run`], 0 once the vCPU is gone, and the thread that runs the
    /// vCPU at the moment, 0 for none.
    run: Mutex<(u64, i32)>,
    /// Guest pages whose blocks are to be dropped.
    pub inbox: Mutex<Vec<u64>>,
    /// `inbox` is not empty.
    pub mail: AtomicBool,
    /// Leave `run`.
    pub kick: AtomicBool,
    /// Ask the platform for interrupts.
    pub irq: AtomicBool,
    /// An NMI arrived.
    pub nmi: AtomicBool,
}

/// Locks a mutex; a panic elsewhere does not make its data wrong here.
pub fn lock<T: ?Sized>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Mailbox {
    /// Sets `flag` and makes the vCPU leave generated code at the next instruction boundary.
    pub fn poke(&self, flag: &AtomicBool) {
        flag.store(true, Ordering::SeqCst);
        self.interrupt();
    }

    /// Makes the vCPU come to its dispatcher at the next instruction boundary: by a signal, if it is in
    /// generated code.
    pub fn interrupt(&self) {
        let run = lock(&self.run);
        let (word, thread) = *run;
        if word == 0 {
            return;
        }
        // SAFETY: the address is that of the `run` word of a live vCPU: it is zeroed under this lock
        // before the area is unmapped. Concurrent accesses are aligned 8-byte ones.
        let ran = unsafe { AtomicU64::from_ptr(word as *mut u64) }.swap(0, Ordering::SeqCst);
        // Whoever zeroed it before has sent a signal; and our own code looks by itself.
        if ran != 0 && thread != 0 {
            signal::stop(thread);
        }
    }

    /// Whether anything waits.
    pub fn any(&self) -> bool {
        self.mail.load(Ordering::SeqCst)
            || self.kick.load(Ordering::SeqCst)
            || self.irq.load(Ordering::SeqCst)
            || self.nmi.load(Ordering::SeqCst)
    }

    /// Says where the `run` word is (0: gone).
    pub fn set_run_word(&self, addr: u64) {
        lock(&self.run).0 = addr;
    }

    /// Says which thread runs the vCPU (0: none).
    pub fn set_thread(&self, thread: i32) {
        lock(&self.run).1 = thread;
    }
}

/// What all vCPUs of one machine share.
pub struct Shared {
    /// Guest RAM.
    pub(crate) ram: Ram,
    /// Limits.
    pub(crate) config: Config,
    /// For each page of RAM: the vCPUs that have blocks made from it.
    code: Box<[AtomicU16]>,
    /// For each page of RAM: the vCPUs that may have processes which can write to it.
    mirrors: Box<[AtomicU16]>,
    /// Which vCPUs run.
    pub(crate) world: World,
    boxes: Mutex<Vec<Arc<Mailbox>>>,
    /// What vCPUs have copied of the translations that they began with, by their numbers.
    copies: Mutex<BTreeMap<usize, Arc<Copies>>>,
}

impl Shared {
    /// Maps guest RAM for translated vCPUs.
    ///
    /// # Errors
    /// [`SetupError`] when the host lacks an instruction or address space.
    pub fn new(slots: &[RamSlot<'_>], config: Config) -> Result<Arc<Self>, SetupError> {
        Self::with_mapping(slots, None, None, config)
    }

    /// The same for RAM that is mapped already, writable, in `raw`, each slot at its guest address from
    /// the beginning. Slots are in one file. Pages that `origin` names are there so far, and not
    /// in the slots' file: they are mapped anew here.
    ///
    /// # Errors
    /// As [`Shared::new`].
    pub fn with_mapping(
        slots: &[RamSlot<'_>],
        raw: Option<Arc<Reservation>>,
        origin: Option<&Origin>,
        config: Config,
    ) -> Result<Arc<Self>, SetupError> {
        crate::host_check()?;
        let ram = Ram::new(slots, raw, origin, &config)?;
        let pages = (ram.span() / PAGE) as usize;
        Ok(Arc::new(Self {
            ram,
            config,
            code: sys::zeroes(pages),
            mirrors: sys::zeroes(pages),
            world: World::default(),
            boxes: Mutex::new(Vec::new()),
            copies: Mutex::default(),
        }))
    }

    /// Adds a vCPU; gives its number and mailbox.
    pub(crate) fn join(&self) -> Result<(usize, Arc<Mailbox>), SetupError> {
        let mut boxes = lock(&self.boxes);
        if boxes.len() >= MAX_VCPUS {
            return Err(SetupError::TooManyVcpus);
        }
        let m = Arc::new(Mailbox {
            run: Mutex::new((0, 0)),
            inbox: Mutex::new(Vec::new()),
            mail: AtomicBool::new(false),
            kick: AtomicBool::new(false),
            irq: AtomicBool::new(false),
            nmi: AtomicBool::new(false),
        });
        boxes.push(m.clone());
        Ok((boxes.len() - 1, m))
    }

    /// Must be called after anything but a vCPU has written guest RAM (device DMA, loaders), before
    /// the guest is told: drops translations made from these bytes. Cheap when there are none.
    pub fn ram_written(&self, gpa: u64, len: u64) {
        fence(Ordering::SeqCst);
        let last = gpa.saturating_add(len.max(1) - 1) / PAGE;
        for page in gpa / PAGE..=last.min(self.code.len() as u64) {
            if self.has_code(page) {
                self.invalidate_page(page, None);
            }
        }
    }

    /// Must be called before anything but a vCPU reads or writes guest RAM where it was given it mapped:
    /// then it shows what there is, and pages that are shared and will be written become the machine's own.
    #[inline]
    pub fn before_access(&self, gpa: u64, len: u64, write: bool) {
        if write { self.ram.will_write(gpa, len) } else { self.ram.will_read(gpa, len) }
    }

    /// Freezes what RAM holds; from here on `new`, a file of zeroes as long as that of the slots, takes
    /// what is written. No vCPU is in `run` meanwhile, and nothing else writes RAM.
    ///
    /// # Errors
    /// The system refuses, or RAM is in too many files; the machine can go on.
    pub fn freeze(&self, new: OwnedFd) -> io::Result<Frozen> {
        self.leave_mail(!0, ALL_SPACES);
        // Mappings besides the views are forgotten.
        self.leave_mail(!0, ALL_DATA);
        self.ram.freeze(new)
    }

    /// Maps frozen pages of ranges of page numbers before anybody reads them; how many that are. vCPUs may
    /// run.
    pub fn prefetch(&self, ranges: impl Iterator<Item = Range<u64>>) -> u64 {
        self.ram.prefetch(ranges)
    }

    /// Numbers of frozen pages that have been read, and of some beside them. `pagemap` is
    /// `/proc/self/pagemap`, which may have been opened before.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn touched(&self, pagemap: &File) -> io::Result<Vec<Range<u64>>> {
        self.ram.touched(pagemap)
    }

    /// Records what a vCPU has copied of the translations that it began with.
    pub(crate) fn note_copies(&self, index: usize, copies: Arc<Copies>) {
        lock(&self.copies).insert(index, copies);
    }

    /// What a machine that began with what others share has written of it. vCPUs may run.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn written(&self) -> io::Result<Written> {
        let ram = self.ram.written()?;
        let copies = lock(&self.copies).clone();
        let cpus = copies.last_key_value().map_or(0, |(last, _)| last + 1);
        let of = |index| copies.get(&index).map_or(Ok(Vec::new()), |copies| copies.written());
        Ok(Written { ram, code: (0..cpus).map(of).collect::<io::Result<_>>()? })
    }

    /// Where RAM is now. Nothing may write it as long as that is used.
    pub fn origin(&self) -> Origin {
        self.ram.origin()
    }

    /// What was frozen is not needed any more. Without this its files stay as they are. vCPUs may run.
    ///
    /// # Errors
    /// The system refuses; some pages stay frozen then, which does no harm.
    pub fn unfreeze(&self, frozen: Frozen) -> io::Result<()> {
        self.ram.unfreeze(frozen)
    }

    /// Gives memory of whole pages within a range, which the guest does not need, back to the host. It
    /// is zero from here on, but for pages that somebody else has, too: they stay as they are. Says how
    /// many bytes were given back. vCPUs may run.
    ///
    /// # Errors
    /// The system refuses; then some pages stay as they are.
    pub fn discard(&self, gpa: u64, len: u64) -> io::Result<u64> {
        let given = self.ram.discard(gpa, len);
        self.ram_written(gpa, len);
        given
    }

    /// Whether any vCPU has blocks made from a page.
    #[inline]
    pub(crate) fn has_code(&self, page: u64) -> bool {
        self.code.get(page as usize).is_some_and(|c| c.load(Ordering::SeqCst) != 0)
    }

    /// Stops all vCPUs but number `index`, which runs, until [`World::resume`].
    pub(crate) fn stop_others(&self, index: usize) {
        self.world.stop(|| {
            for (i, m) in lock(&self.boxes).iter().enumerate() {
                if i != index {
                    m.interrupt();
                }
            }
        });
    }

    /// Records that vCPU `index` is about to read a page in order to translate it.
    pub(crate) fn mark_code(&self, page: u64, index: usize) {
        let Some(c) = self.code.get(page as usize) else { return };
        let bit = 1u16 << index;
        if c.load(Ordering::SeqCst) & bit != 0 {
            return;
        }
        let guard = lock(&self.ram.mapping);
        if c.fetch_or(bit, Ordering::SeqCst) == 0 && self.ram.protect(page * PAGE, false).is_err() {
            // Out of mappings: the host has a limit on their number. Start over.
            self.drop_all();
            c.fetch_or(bit, Ordering::SeqCst);
            if self.ram.protect(page * PAGE, false).is_err() {
                tracing_free_abort("write-protecting translated guest code failed");
            }
        }
        drop(guard);
        fence(Ordering::SeqCst);
    }

    /// The pages that vCPU `index` has blocks made from.
    pub(crate) fn pages_with_code(&self, index: usize) -> Vec<u64> {
        let bit = 1u16 << index;
        let pages = (0..).zip(&self.code);
        pages.filter(|(_, c)| c.load(Ordering::SeqCst) & bit != 0).map(|(page, _)| page).collect()
    }

    /// Records that vCPU `index`, which has not run, has blocks made from these pages; false if that
    /// cannot be.
    pub(crate) fn adopt_code(&self, pages: &[u64], index: usize) -> bool {
        let bit = 1u16 << index;
        let _guard = lock(&self.ram.mapping);
        pages.iter().all(|&page| {
            let Some(c) = self.code.get(page as usize) else { return false };
            let done = c.fetch_or(bit, Ordering::SeqCst) != 0
                || self.ram.protect(page * PAGE, false).is_ok();
            if !done {
                c.fetch_and(!bit, Ordering::SeqCst);
            }
            done
        })
    }

    /// Whether a process of vCPU `index` may map a page for writing; it is remembered.
    pub(crate) fn may_mirror(&self, page: u64, index: usize) -> bool {
        let bit = 1u16 << index;
        let Some(mirrors) = self.mirrors.get(page as usize) else { return false };
        let _guard = lock(&self.ram.mapping);
        if self.has_code(page) {
            return false;
        }
        mirrors.fetch_or(bit, Ordering::SeqCst);
        true
    }

    /// The vCPUs whose processes may have a page mapped for writing.
    pub(crate) fn mirrors(&self, page: u64) -> u16 {
        self.mirrors.get(page as usize).map_or(0, |m| m.load(Ordering::SeqCst))
    }

    /// No process has a page of code mapped for writing, which was marked for vCPU `index`.
    pub(crate) fn no_mirrors(&self, page: u64, index: usize) {
        let at = page as usize;
        let (Some(code), Some(mirrors)) = (self.code.get(at), self.mirrors.get(at)) else { return };
        let _guard = lock(&self.ram.mapping);
        // Else somebody has written to it, and others may map it again.
        if code.load(Ordering::SeqCst) & 1 << index != 0 {
            mirrors.store(0, Ordering::SeqCst);
        }
    }

    /// Leaves the same for several vCPUs.
    pub(crate) fn leave_mail(&self, vcpus: u16, mail: u64) {
        for (i, m) in lock(&self.boxes).iter().enumerate() {
            if vcpus & 1 << i != 0 {
                lock(&m.inbox).push(mail);
                m.poke(&m.mail);
            }
        }
    }

    /// Host address of a guarded mapping (see [`crate::ram`]) of the page at `gpa`, made if need be;
    /// `None` when there are too many already.
    pub(crate) fn guarded(&self, gpa: u64, rw: bool) -> Option<u64> {
        let find = || self.ram.guarded_addr(gpa, rw);
        self.find_or_map(find, || self.ram.make_guarded(gpa, rw, !self.has_code(gpa / PAGE)))
    }

    /// What `find` gives, else what `make` maps. Translations of pages come and go under the lock that
    /// is held then, and with them the pages' protection.
    fn find_or_map(
        &self,
        find: impl Fn() -> Option<u64>,
        make: impl FnOnce() -> Option<u64>,
    ) -> Option<u64> {
        find().or_else(|| {
            let _guard = lock(&self.ram.mapping);
            find().or_else(make)
        })
    }

    /// Host address of a mapping of two pages one after the other, made if need be; `None` when there
    /// are too many already.
    pub(crate) fn pair(&self, pages: (u64, u64), rw: bool) -> Option<u64> {
        self.find_or_map(
            || self.ram.pair_addr(pages, rw),
            || {
                let writable = [pages.0, pages.1].map(|gpa| !self.has_code(gpa / PAGE));
                self.ram.make_pair(pages, rw, writable)
            },
        )
    }

    /// Makes room for other pairs, for vCPU `index`, which runs and forgets all mappings itself.
    pub(crate) fn forget_pairs(&self, index: usize) {
        self.stop_others(index);
        // Another vCPU may have done so a moment ago.
        if self.ram.pairs_are_full() {
            let _guard = lock(&self.ram.mapping);
            for (i, m) in lock(&self.boxes).iter().enumerate() {
                let mut inbox = lock(&m.inbox);
                if i != index && !inbox.contains(&ALL_MAPPINGS) {
                    inbox.push(ALL_MAPPINGS);
                    drop(inbox);
                    m.poke(&m.mail);
                }
            }
            self.ram.forget_pairs();
        }
        self.world.resume();
    }

    fn drop_all(&self) {
        for c in &self.code {
            c.store(0, Ordering::SeqCst);
        }
        self.leave_mail(!0, ALL_PAGES);
        self.ram.unprotect_all();
    }

    /// Tells all vCPUs with blocks from a page (but `except`, which does so itself) to drop them,
    /// and makes the page writable.
    pub(crate) fn invalidate_page(&self, page: u64, except: Option<usize>) {
        let Some(c) = self.code.get(page as usize) else { return };
        let _guard = lock(&self.ram.mapping);
        let mask = c.swap(0, Ordering::SeqCst);
        if mask == 0 {
            return;
        }
        self.leave_mail(mask & !except.map_or(0, |i| 1 << i), page);
        if self.ram.protect(page * PAGE, true).is_err() {
            self.drop_all();
        }
    }
}

fn tracing_free_abort(what: &str) -> ! {
    eprintln!("berth: {what}: {}", io::Error::last_os_error());
    std::process::abort()
}
