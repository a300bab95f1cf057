//! One translated vCPU: finding and making blocks, entering them, and what happens when they are
//! left.
//!
//! ```text
//!            ┌───────────────────────────── dispatch ◄──────────────────────────┐
//!            │ events: mail, kick, pending exception, NMI, interrupt            │
//!            ▼                                                                  │
//!   find or translate block ──► enter generated code ──► exit: link, indirect, ─┘
//!                                   │        ▲           interrupt, helper, fault
//!                                   ▼        │
//!                         slow access / helper (Rust, on the thread's stack)
//! ```
//!
//! A helper whose instruction went elsewhere goes straight on in generated code when the jump cache
//! knows the target. A signal makes generated code leave for the dispatcher between two guest
//! instructions.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use berth_x86::cpuid::CpuidTable;
use berth_x86::event::{self, Event};
use berth_x86::paging::{self, Kind, Rights, Walk};
use berth_x86::state::{CodeSize, cr0, cr4, flags, sreg, vector};
use berth_x86::{CpuState, Exception, Segment};
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, Instruction, Mnemonic};

use crate::code::{
    Block, BlockId, BlockKey, CodeCache, GoesOn, Helped, Is, Made, Moved, Place, Site, Slow, Went,
};
use crate::direct::Direct;
use crate::ends::PageEnds;
use crate::exec::Flow;
use crate::features::Allowed;
use crate::fpu;
use crate::layout::{Area, ExitCode, FLAG_MASKS, Gate, MAX_ACCESS_SHIFT, S0, mapped};
use crate::mem::{self, Lin, Pieces, Walked};
use crate::ram::PAGE;
use crate::returns::Returns;
use crate::shared::{
    ALL_DATA, ALL_MAPPINGS, ALL_PAGES, ALL_SPACES, Mailbox, Shared, UNMIRROR, lock,
};
use crate::signal::Stop;
use crate::stats::{Report, Stats};
use crate::thunks::{Then, Thunks};
use crate::tlb::{Page, Source, Tlb, View};
use crate::translate::gate::CLEARED;
use crate::translate::{
    Ahead, Class, Ends, LONGEST, MAX_BLOCK_BYTES, MAX_INSNS, Mode, Translation, detour, goes_on,
};
use crate::{Exit, Optimizations, SetupError, signal};

mod direct;
pub mod inherit;
mod mirror;

use inherit::{Around, TakenCode};

/// The area of a vCPU, owned by it.
pub struct AreaPtr(*mut Area);

impl Deref for AreaPtr {
    type Target = Area;
    fn deref(&self) -> &Area {
        // SAFETY: points to the mapped area of the TLB that lives in the same `Inner`; generated
        // code, the only other user, runs on this thread and not while a reference is held.
        unsafe { &*self.0 }
    }
}

impl DerefMut for AreaPtr {
    fn deref_mut(&mut self) -> &mut Area {
        // SAFETY: as above.
        unsafe { &mut *self.0 }
    }
}

/// Instructions after which a block ends where another one begins that something jumps to.
const JOINS_AFTER: usize = 4;
/// The part of a code cache that a vCPU with nothing to do keeps free.
const SHARE_OF_CLONES: usize = 32;
/// More than the slow path of an access has.
const STUB_BYTES: usize = 1024;
/// Bytes of guest code that are read at first for a block.
const USUAL_BYTES: usize = 256;
/// An instruction translation of the fetch side: a page that code was found in.
#[derive(Clone, Copy)]
struct FetchEntry {
    page: u64,
    user: bool,
    gpa: u64,
    source: Source,
}

impl FetchEntry {
    const NONE: Self =
        Self { page: !0, user: false, gpa: 0, source: Source { global: false, large: false } };
}

const FETCH_ENTRIES: usize = 512;
/// Pages that are looked at when one of them is needed.
const AROUND: usize = 16;

/// These pages.
fn around(page: u64) -> impl Iterator<Item = u64> {
    (page & !(AROUND as u64 * PAGE - 1)..).step_by(PAGE as usize).take(AROUND)
}

/// Everything of a translated vCPU; at a fixed address, because generated code knows it.
pub struct Inner {
    pub(crate) area: AreaPtr,
    pub(crate) tlb: Tlb,
    pub(crate) code: CodeCache,
    thunks: Thunks,
    translation: Translation,
    returns: Returns,
    pub(crate) lin: Lin,
    pub(crate) mailbox: Arc<Mailbox>,
    pub(crate) cpuid: CpuidTable,
    pub(crate) allowed: Allowed,
    fetch: Vec<FetchEntry>,
    view: View,
    view_modes: Vec<(View, u32)>,
    /// Mode of the block that runs.
    mode: Mode,
    /// To be delivered before the next instruction.
    pending: Option<Exception>,
    /// The next instruction runs alone and unregistered (it writes to its own page, or hits a
    /// breakpoint).
    once: bool,
    /// A block made for `once` or single-step is running.
    in_single: bool,
    /// What `run` is to return.
    pub(crate) exit: Option<Exit>,
    /// Between the read and the write of a bounced read-modify-write: the other vCPUs stand still.
    in_split: bool,
    /// Bounced store to be committed.
    bounced: Pieces,
    /// Room for guest code that is decoded.
    code_bytes: Vec<u8>,
    /// The mode of the code that SYSRET goes to in generated code.
    sysret_mode: u32,
    /// The addend that leads the last bounced access to the bounce buffer.
    bounced_sc: u64,
    /// The bounced store is x87's: an unmasked exception suppresses it.
    bounced_x87: bool,
    /// A store that faults, tried on the bounce buffer because its own exception comes first.
    trial: Option<Box<Trial>>,
    /// Address of the instruction whose access raised the last page fault, and of that access.
    page_fault: (u64, u64),
    /// Blocks look for accesses that cross into another page: there are too many pages to guard.
    checked: bool,
    /// Accesses at the ends of pages.
    ends: PageEnds,
    /// Room for blocks of a page.
    found: Vec<(u64, u64)>,
    /// Room for what was moved.
    went: Vec<Went>,
    /// `checked` is to be set before the next block.
    check_from_now_on: bool,
    /// Pairs are to be forgotten before the next block.
    pairs_are_due: bool,
    /// Set by whoever changed the state from outside.
    pub(crate) state_changed: bool,
    /// What was translated, and the address spaces, are those of another vCPU in the same state.
    pub(crate) inherited: bool,
    /// An event whose delivery suppresses the single-step trap of the instruction that caused it.
    pub(crate) no_step_trap: bool,
    /// The instruction that ran traps although TF was clear before it.
    pub(crate) step_trap: bool,
    /// For tests: generated code is left after so many host instructions, then after one more and so
    /// on, as if by a stop signal; 0: never.
    pub(crate) stop_after: u32,
    /// Host instructions until then; 0: not begun.
    steps_left: u32,
    pub(crate) stats: Stats,
    /// Instructions executed by helpers, by the number of the mnemonic.
    pub(crate) helper_counts: Vec<u64>,
    /// Times are taken.
    timing: bool,
    optimizations: Optimizations,
    /// User code that the processor executes itself.
    direct: Direct,
}

extern "C" fn mem_helper(owner: u64, ret: u64, ea: u64) -> Then {
    // SAFETY: generated code passes the `owner` of its area: the `Inner` that entered it on this
    // thread, to which no reference is live while generated code runs.
    let inner = unsafe { &mut *(owner as *mut Inner) };
    let then = inner.timed(|stats| &mut stats.slow, |inner| inner.slow_access(ret, ea));
    inner.back(then)
}

extern "C" fn first_helper(owner: u64, _ret: u64, s0: u64) -> Then {
    // SAFETY: as in `mem_helper`.
    let inner = unsafe { &mut *(owner as *mut Inner) };
    let then = inner.timed(|stats| &mut stats.slow, |inner| inner.first_access(s0));
    inner.back(then)
}

extern "C" fn commit_helper(owner: u64, ret: u64, _ea: u64) -> Then {
    // SAFETY: as in `mem_helper`.
    let inner = unsafe { &mut *(owner as *mut Inner) };
    let then = inner.commit(ret);
    inner.back(then)
}

extern "C" fn instr_helper(owner: u64, ret: u64, _ea: u64) -> Then {
    // SAFETY: as in `mem_helper`.
    let inner = unsafe { &mut *(owner as *mut Inner) };
    let then = inner.timed(|stats| &mut stats.helping, |inner| inner.helper(ret));
    inner.back(then)
}

/// Where a thread with a signal at `pc` goes on; called by the signal handler.
///
/// # Safety
/// `owner` is the vCPU whose generated code was interrupted on this thread.
pub unsafe fn signal_target(owner: u64, pc: u64, sig: i32) -> u64 {
    // SAFETY: by the caller; generated code was running, so no reference is live.
    let inner = unsafe { &*(owner as *const Inner) };
    if sig == libc::SIGSEGV || sig == libc::SIGBUS {
        match inner.code.fault_target(pc) {
            Some(GoesOn::At(host)) => return host,
            Some(GoesOn::First) => return inner.thunks.first,
            None => {}
        }
    }
    inner.thunks.exit(ExitCode::Fault)
}

/// Whether an access at `address` is a push to a full return stack; called by the signal handler.
///
/// # Safety
/// As for [`signal_target`].
pub unsafe fn return_stack_full(owner: u64, address: u64) -> bool {
    // SAFETY: by the caller.
    unsafe { &*(owner as *const Inner) }.returns.is_full_at(address)
}

/// How a thread that was interrupted at `pc` leaves generated code; called by the signal handler.
///
/// `sc` is what [`crate::layout::SC`] holds there.
///
/// # Safety
/// `owner` is the vCPU whose generated code was interrupted on this thread.
pub unsafe fn stop_target(owner: u64, pc: u64, sc: u64, stepped: bool) -> Stop {
    // SAFETY: by the caller; generated code was running, so no reference is live.
    let inner = unsafe { &mut *(owner as *mut Inner) };
    if inner.thunks.contain(pc) {
        return match inner.thunks.tail_of(pc) {
            // The flags have been loaded: on to the end of the guest's instruction.
            Some(_) if stepped => Stop::Step,
            Some(tail) => Stop::Go(tail, Some(inner.area.host_rsp)),
            None if pc >= inner.thunks.unexpected => Stop::Step,
            None => Stop::Later,
        };
    }
    if inner.in_single {
        return Stop::Later;
    }
    if stepped && inner.steps_left > 1 {
        inner.steps_left -= 1;
        return Stop::Step;
    }
    inner.steps_left = 0;
    // What was read for an access, from a device perhaps, is not read twice.
    match inner.code.restart_at(pc, sc == inner.bounced_sc) {
        Some(rip) => {
            inner.area.exit_rip = wrap(rip, inner.mode.bits);
            // An access that was on its way to the slow path is made again.
            inner.area.fault_trap = 0;
            Stop::Go(inner.thunks.exit(ExitCode::Interrupt), None)
        }
        None => match inner.code.string_stop(pc) {
            Some(leave) => Stop::Go(leave, None),
            None => Stop::Step,
        },
    }
}

/// The cache of a new vCPU, with what another one has shared if that is of use.
fn cache_for(
    shared: &Shared,
    taken: Option<TakenCode>,
) -> Result<(CodeCache, Thunks, Option<Around>), SetupError> {
    let helpers = [mem_helper, first_helper, commit_helper, instr_helper];
    if let Some(TakenCode { mut code, around }) = taken {
        let thunks = Thunks::new(&mut code, helpers);
        if thunks.len() == around.thunks {
            return Ok((code, thunks, Some(around)));
        }
    }
    let mut code = CodeCache::new(shared.config.code_cache_bytes)?;
    let thunks = Thunks::new(&mut code, helpers);
    Ok((code, thunks, None))
}

impl Inner {
    /// Makes a vCPU.
    pub fn new(
        shared: Arc<Shared>,
        state: CpuState,
        cpuid: CpuidTable,
        platform: Box<dyn berth_x86::Platform>,
        taken: Option<TakenCode>,
    ) -> Result<Box<Self>, SetupError> {
        let (index, mailbox) = shared.join()?;
        let timing = shared.config.reports.is_some();
        let optimizations = shared.config.optimizations;
        let address_spaces = shared.config.address_spaces;
        let mut tlb = Tlb::new(shared.config.address_spaces)?;
        tlb.init_jcs();
        let (code, thunks, around) = cache_for(&shared, taken)?;
        let returns = Returns::new(thunks.unexpected)
            .map_err(|source| SetupError::Map { what: "the return stack", source })?;
        if !signal::register(code.range()) {
            return Err(SetupError::TooManyVcpus);
        }
        let mut area = AreaPtr(tlb.area());
        area.state = state;
        area.page_mask = [0x0000_7fff_ffff_f000, 0x0000_ffff_ffff_f000];
        for shift in 0..=MAX_ACCESS_SHIFT {
            area.slot_mask[shift] = 0xfff & !((1 << shift) - 1);
        }
        area.bit_mask = [7, 15, 31, 63];
        area.flag_mask = FLAG_MASKS;
        area.shadow_rip = !0;
        area.irq = 1;
        area.df_mask = flags::DF;
        area.run_mask = [!0xfff, !0x7ff, !0x3ff, !0x1ff];
        area.return_top = returns.top();
        area.return_sp = returns.top();
        area.user_return_sp = returns.top();
        area.barrier = thunks.barrier;
        area.syscall.closed = 1;
        area.sysret.closed = 1;
        area.host_mxcsr = 0x1f80;
        let allowed = Allowed::new(cpuid.features());
        let mut inner = Box::new(Self {
            area,
            tlb,
            code,
            thunks,
            translation: Translation::new(thunks, optimizations),
            returns,
            lin: Lin {
                shared,
                index,
                platform,
                dirty_code: Vec::new(),
                task_entered: false,
                task_trap: None,
                platform_called: false,
                watch_hits: 0,
                walked: Walked::new(),
            },
            mailbox,
            cpuid,
            allowed,
            fetch: vec![FetchEntry::NONE; FETCH_ENTRIES],
            view: View::Kernel,
            view_modes: Vec::new(),
            mode: Mode::RESET,
            pending: None,
            once: false,
            in_single: false,
            exit: None,
            in_split: false,
            bounced: Pieces::default(),
            code_bytes: Vec::new(),
            sysret_mode: 0,
            bounced_sc: 0,
            bounced_x87: false,
            trial: None,
            page_fault: (!0, 0),
            checked: false,
            check_from_now_on: false,
            pairs_are_due: false,
            ends: PageEnds::default(),
            found: Vec::new(),
            went: Vec::new(),
            state_changed: true,
            inherited: false,
            no_step_trap: false,
            step_trap: false,
            stop_after: 0,
            steps_left: 0,
            stats: Stats::default(),
            helper_counts: vec![0; Mnemonic::values().len()],
            timing,
            optimizations,
            direct: Direct::default(),
        });
        if let Some(around) = around {
            inner.adopt(&around);
        }
        inner.direct.spaces.resize_with(address_spaces, || None);
        inner.direct.policies.resize_with(address_spaces, Default::default);
        let owner = &raw mut *inner as u64;
        inner.area.owner = owner;
        let run = &raw mut inner.area.run as u64;
        inner.mailbox.set_run_word(run);
        Ok(inner)
    }

    /// The architectural state.
    pub fn state(&mut self) -> &mut CpuState {
        &mut self.area.state
    }

    /// What was done so far.
    pub fn report(&self) -> Report {
        let counts = Mnemonic::values().zip(&self.helper_counts);
        let mut helpers: Vec<_> = counts
            .filter(|(_, n)| **n != 0)
            .map(|(m, n)| (format!("{m:?}").to_lowercase(), *n))
            .collect();
        helpers.sort_by_key(|(_, n)| std::cmp::Reverse(*n));
        let stats = Stats {
            jump_cache_clears: self.tlb.jc_clears,
            kernel_jump_cache_clears: self.tlb.jc_kernel_clears,
            ..self.stats
        };
        Report { vcpu: self.lin.index, stats, helpers }
    }

    /// The architectural state, read only.
    pub fn state_ref(&self) -> &CpuState {
        &self.area.state
    }

    // ---- between generated code and Rust ----

    /// Does something, and adds the time it takes to one of the times in [`Stats`].
    fn timed<T>(
        &mut self,
        total: impl FnOnce(&mut Stats) -> &mut Duration,
        work: impl FnOnce(&mut Self) -> T,
    ) -> T {
        let began = self.timing.then(Instant::now);
        let result = work(self);
        if let Some(began) = began {
            *total(&mut self.stats) += began.elapsed();
        }
        result
    }

    /// Before Rust returns to its thunk.
    fn back(&mut self, then: Then) -> Then {
        if then != Then::Exit && std::mem::take(&mut self.tlb.returns_stale) {
            self.returns.forget(&mut self.area, true);
        }
        if then != Then::Exit {
            self.step_on();
        }
        then
    }

    /// Lets generated code run in single steps when it is to be left after a number of them.
    fn step_on(&mut self) {
        if self.stop_after == 0 {
            return;
        }
        if self.steps_left == 0 {
            self.steps_left = self.stop_after;
            self.stop_after += 1;
        }
        self.area.stepping = 1;
        self.area.host_flags |= flags::TF;
    }

    fn sync_in(&mut self) {
        let before = std::mem::take(&mut self.area.string_flags);
        let host = if before == 0 { self.area.host_flags } else { before };
        let host = host & (flags::ARITH | flags::DF);
        let f = &mut self.area.state.rflags;
        *f = *f & !(flags::ARITH | flags::DF) | host | flags::FIXED;
        // SYSCALL, SYSRET, STAC and CLAC in generated code change them.
        self.view = self.wanted_view();
        if std::mem::take(&mut self.area.crossed) != 0 {
            self.mode = self.mode_of_state();
        }
    }

    fn sync_out(&mut self) {
        self.area.host_flags = self.area.state.rflags & (flags::ARITH | flags::DF) | 0x202;
    }

    fn wanted_view(&self) -> View {
        let s = &self.area.state;
        let slot = self.tlb.current();
        if s.cpl() == 3 {
            View::User(slot)
        } else if s.paging() && s.cr4 & cr4::SMAP != 0 && s.rflags & flags::AC != 0 {
            View::KernelUser(slot)
        } else {
            View::Kernel
        }
    }

    /// Puts the GS base to the view the state asks for.
    fn update_view(&mut self) {
        let view = self.wanted_view();
        if matches!(view, View::User(_)) != matches!(self.view, View::User(_)) {
            self.tlb.returns_stale = true;
        }
        self.view = view;
        let base = self.tlb.base(self.view);
        let smap = self.area.state.paging() && self.area.state.cr4 & cr4::SMAP != 0;
        let open = if smap { View::KernelUser(self.tlb.current()) } else { View::Kernel };
        self.area.kernel_base = [self.tlb.base(View::Kernel), self.tlb.base(open)];
        // SAFETY: the host has RDGSBASE and WRGSBASE (checked at set-up); nothing else on this thread
        // uses GS, and the address is a mapped view.
        unsafe {
            let now: u64;
            std::arch::asm!("rdgsbase {}", out(reg) now, options(nomem, nostack));
            if now != base {
                std::arch::asm!("wrgsbase {}", in(reg) base, options(nomem, nostack));
            }
        }
    }

    fn mode_of_state(&self) -> Mode {
        let s = &self.area.state;
        let bits = match s.code_size() {
            CodeSize::Bits16 => 16,
            CodeSize::Bits32 => 32,
            CodeSize::Bits64 => 64,
        };
        let flat_seg = |i: usize| {
            let g: &Segment = &s.seg[i];
            g.base == 0
                && g.limit == u32::MAX
                && g.present()
                && (g.typ() & 4 == 0 || g.typ() & 8 != 0)
        };
        let writable = |i: usize| s.seg[i].typ() & 0xa == 2;
        let flat = bits == 64
            || (s.protected()
                && flat_seg(sreg::CS)
                && [sreg::DS, sreg::ES, sreg::SS].iter().all(|&i| flat_seg(i) && writable(i)));
        let fpu = s.cr0 & (cr0::EM | cr0::TS) == 0;
        let sse = fpu && s.cr4 & cr4::OSFXSR != 0;
        let avx = s.cr0 & cr0::TS == 0 && s.cr4 & cr4::OSXSAVE != 0 && s.xcr0 & 6 == 6;
        Mode {
            bits,
            user: s.cpl() == 3,
            flat,
            fpu,
            sse,
            avx: avx && !s.real_segments(),
            single: s.rflags & flags::TF != 0 || mem::breaking(s),
            aligned: mem::alignment_checked(s),
            checked: self.checked,
            ring0: s.cpl() == 0,
            tsd: s.cpl() != 0 && s.cr4 & cr4::TSD != 0,
            fsgsbase: s.cr4 & cr4::FSGSBASE != 0,
            real: s.real_segments(),
        }
    }

    // ---- the dispatcher ----

    /// Runs guest code until something outside has to be done.
    pub fn run(&mut self) -> Exit {
        if let Err(e) = signal::prepare_thread() {
            eprintln!("berth: setting up a signal stack failed: {e}");
            return Exit::Shutdown;
        }
        let inherited = std::mem::take(&mut self.inherited);
        if std::mem::take(&mut self.state_changed) {
            if !inherited {
                self.flush_everything();
            }
            let pcid = self.current_pcid();
            self.tlb.switch(pcid, inherited);
        }
        // Whoever woke us may not have poked the mailbox.
        self.area.irq = 1;
        self.direct.armed |= self.lin.shared.config.always_direct;
        fpu::load(&mut self.area);
        self.mailbox.set_thread(signal::this_thread());
        let shared = self.lin.shared.clone();
        let running = shared.world.enter();
        let exit = loop {
            if let Some(exit) = self.dispatch() {
                break exit;
            }
        };
        drop(running);
        self.mailbox.set_thread(0);
        fpu::save(&mut self.area);
        exit
    }

    fn current_pcid(&self) -> u16 {
        let s = &self.area.state;
        if s.cr4 & cr4::PCIDE != 0 { (s.cr3 & 0xfff) as u16 } else { 0 }
    }

    /// One round: events, then a block.
    fn dispatch(&mut self) -> Option<Exit> {
        self.area.run = 1;
        std::sync::atomic::fence(Ordering::SeqCst);
        // An instruction that faulted on the bounce buffer has no commit.
        self.end_split();
        if self.lin.shared.world.stopped() {
            self.lin.shared.world.park();
        }
        if let Some(e) = self.exit.take() {
            return Some(e);
        }
        if std::mem::take(&mut self.check_from_now_on) && !self.checked {
            self.checked = true;
            self.stats.guard_overflows += 1;
            self.close_gates();
            self.drop_all_code();
        }
        if std::mem::take(&mut self.pairs_are_due) {
            let index = self.lin.index;
            self.lin.shared.forget_pairs(index);
            self.flush_everything();
            self.stats.pair_overflows += 1;
        }
        if self.mailbox.any()
            && let Some(exit) = self.open_mail()
        {
            return Some(exit);
        }
        match self.events() {
            Step::Go => {}
            Step::Again => return None,
            Step::Leave(e) => return Some(e),
        }
        if self.direct.armed && self.go_direct() {
            return None;
        }
        self.step()
    }

    /// Takes what others left.
    fn open_mail(&mut self) -> Option<Exit> {
        self.take_mail();
        if self.mailbox.nmi.swap(false, Ordering::SeqCst) {
            self.area.state.nmi_pending = 1;
        }
        if self.mailbox.irq.swap(false, Ordering::SeqCst) {
            self.area.irq = 1;
        }
        self.mailbox.kick.swap(false, Ordering::SeqCst).then_some(Exit::Kicked)
    }

    /// Does what others left to be done about code and mappings.
    fn take_mail(&mut self) {
        if self.mailbox.mail.swap(false, Ordering::SeqCst) {
            let pages = std::mem::take(&mut *lock(&self.mailbox.inbox));
            for p in pages {
                match p {
                    ALL_PAGES => self.drop_all_code(),
                    ALL_MAPPINGS => self.flush_everything(),
                    ALL_SPACES => self.end_spaces(),
                    ALL_DATA => self.tlb.flush_data(),
                    _ if p & UNMIRROR != 0 => self.drop_mirrors(p & !UNMIRROR),
                    _ => self.drop_page(p),
                }
            }
        }
    }

    /// Delivers what is due before the next instruction (priorities: SDM vol. 3, 6.9).
    fn events(&mut self) -> Step {
        if let Some(e) = self.pending.take() {
            return self.deliver(Event::Exception(e));
        }
        let shadow = self.area.state.interrupt_shadow != 0;
        if shadow && self.area.state.rip != self.area.shadow_rip {
            self.area.state.interrupt_shadow = 0;
        }
        let shadow = self.area.state.interrupt_shadow != 0;
        if self.area.state.nmi_pending != 0 && self.area.state.nmi_masked == 0 {
            if shadow {
                self.once = true;
                return Step::Go;
            }
            self.area.state.nmi_pending = 0;
            return self.deliver(Event::Nmi);
        }
        if self.area.irq != 0 {
            if !self.lin.platform.interrupt_pending() {
                self.area.irq = 0;
            } else if self.area.state.rflags & flags::IF != 0 {
                if shadow {
                    self.once = true;
                    return Step::Go;
                }
                if let Some(v) = self.lin.platform.acknowledge_interrupt() {
                    self.sampled();
                    return self.deliver(Event::Interrupt(v));
                }
                self.area.irq = 0;
            }
        }
        if self.area.state.halted != 0 {
            return Step::Leave(Exit::Halted);
        }
        Step::Go
    }

    fn deliver(&mut self, ev: Event) -> Step {
        self.stats.events += 1;
        self.area.state.halted = 0;
        self.area.state.interrupt_shadow = 0;
        let r = event::deliver_with_escalation(&mut self.area.state, &mut self.lin, ev);
        self.after_rust();
        match r {
            Ok(()) => Step::Again,
            Err(_) => Step::Leave(Exit::Shutdown),
        }
    }

    /// Queues an exception of the instruction at the current RIP.
    pub(crate) fn raise(&mut self, e: Exception) {
        self.pending = Some(e);
    }

    /// Looks after side effects of Rust code that touched memory or devices; tells whether the
    /// running block must not go on.
    fn after_rust(&mut self) -> bool {
        let mut stop = false;
        if !self.lin.dirty_code.is_empty() {
            for p in std::mem::take(&mut self.lin.dirty_code) {
                self.drop_page(p);
            }
            stop = true;
        }
        if std::mem::take(&mut self.lin.platform_called) {
            self.area.irq = 1;
        }
        if std::mem::take(&mut self.lin.task_entered) {
            self.switch_space(0, false);
            stop = true;
        }
        if let Some(trap) = self.lin.task_trap.take() {
            self.raise(trap);
            stop = true;
        }
        stop
    }

    /// Runs a block (or one instruction, when something asks for it).
    fn step(&mut self) -> Option<Exit> {
        let once = std::mem::take(&mut self.once);
        let mut mode = self.mode_of_state();
        let tf = self.area.state.rflags & flags::TF != 0;
        if mode.single && self.breakpoint() {
            return None;
        }
        mode.single |= once;
        self.mode = mode;
        self.in_single = mode.single;
        self.update_view();
        let id = match self.find(mode, false) {
            Ok(id) => id,
            Err(e) => {
                self.raise(e);
                return None;
            }
        };
        let host = self.code.host_of(id).unwrap_or(0);
        let rip = self.area.state.rip;
        if !mode.single
            && (mode.bits == 64 || mode.flat)
            && self.tlb.jc_find(self.view, rip) != Some(host)
        {
            self.enter_jump(id, rip, host);
        }
        let before = (self.area.state.rflags & flags::RF, self.area.state.interrupt_shadow);
        self.area.state.rflags &= !flags::RF;
        self.no_step_trap = false;
        self.enter(host);
        if self.in_single && self.area.exit_code == ExitCode::NotBegun as u64 {
            self.area.state.rflags |= before.0;
            self.area.state.interrupt_shadow = before.1;
            return None;
        }
        if once && self.area.state.rip == rip && self.area.shadow_rip == rip {
            // It jumped to itself; once is all that the shadow holds for.
            self.area.state.interrupt_shadow = 0;
        }
        // MOV SS and POP SS hold off traps until after the next instruction (SDM vol. 3, 6.8.3).
        if self.pending.is_none() && self.stack_shadow() {
            return None;
        }
        let tf = std::mem::take(&mut self.step_trap) || tf;
        if self.pending.is_none() && (tf || self.lin.watch_hits != 0) {
            let step = if tf && !self.no_step_trap { 1 << 14 } else { 0 };
            let dr6 = std::mem::take(&mut self.lin.watch_hits) | step;
            if dr6 != 0 {
                self.area.state.interrupt_shadow &= if step != 0 { 1 } else { 3 };
                self.raise(Exception::db(dr6));
            }
        } else {
            self.lin.watch_hits = 0;
        }
        None
    }

    /// Whether the last instruction loaded SS.
    fn stack_shadow(&self) -> bool {
        self.area.state.interrupt_shadow & 2 != 0 && self.area.state.rip == self.area.shadow_rip
    }

    /// Raises #DB when an instruction breakpoint is set at RIP and RF does not suppress it.
    fn breakpoint(&mut self) -> bool {
        let s = &self.area.state;
        if s.rflags & flags::RF != 0 || !mem::breaking(s) || self.stack_shadow() {
            return false;
        }
        let at = if s.code_size() == CodeSize::Bits64 {
            s.rip
        } else {
            s.seg[sreg::CS].base.wrapping_add(s.rip) & 0xffff_ffff
        };
        let hits = (0..4)
            .filter(|&i| {
                s.dr7 >> (i * 2) & 3 != 0 && s.dr7 >> (16 + i * 4) & 3 == 0 && s.dr[i] == at
            })
            .fold(0u64, |m, i| m | 1 << i);
        if hits != 0 {
            self.raise(Exception::db(hits));
        }
        hits != 0
    }

    /// Enters generated code at `host` and handles exits that need nothing but another block.
    fn enter(&mut self, host: u64) {
        let mut host = host;
        for _ in 0..1 << 16 {
            if std::mem::take(&mut self.tlb.returns_stale) {
                self.returns.forget(&mut self.area, false);
            }
            self.sync_out();
            self.step_on();
            self.area.enter_pc = host;
            self.area.exit_rip = self.area.state.rip;
            let enter = self.thunks.enter;
            self.stats.entries += 1;
            // SAFETY: `enter` is generated code that follows the C convention for callee-saved
            // registers and the stack; caller-saved and vector registers are declared clobbered by
            // the "C" ABI. GS points to the view; `enter_pc` is a block of our cache.
            unsafe {
                let f: extern "C" fn() = std::mem::transmute(enter);
                f();
            }
            // A helper that asked to leave has brought the flags up to date itself.
            if self.area.exit_code != ExitCode::Helper as u64 {
                self.sync_in();
            }
            match self.next_block() {
                Some(next) => host = next,
                None => return,
            }
        }
    }

    /// After an exit: the block to go on with at once, if that is all there is to do.
    fn next_block(&mut self) -> Option<u64> {
        let code = self.area.exit_code;
        if code == ExitCode::Helper as u64 || code == ExitCode::NotBegun as u64 {
            self.stats.helper_exits += 1;
            return None;
        }
        if code == ExitCode::Fault as u64 {
            self.stats.fault_exits += 1;
            self.fault();
            return None;
        }
        let link = (code == ExitCode::Link as u64)
            .then(|| u32::try_from(self.area.exit_arg).unwrap_or(u32::MAX));
        let rip = match link {
            Some(n) => self.code.target_of(n).unwrap_or(0),
            None => self.area.exit_rip,
        };
        self.area.state.rip = rip;
        let branch = if code == ExitCode::Return as u64 {
            self.code.branch(self.area.return_number)
        } else if code == ExitCode::Indirect as u64 {
            self.code.branch(self.area.exit_arg)
        } else {
            None
        };
        if let Some((at, taken)) = branch
            && mem::check_canonical(&self.area.state, rip, false).is_err()
        {
            // The branch itself faults: undo what it did to the stack pointer.
            self.area.state.rip = at;
            let undo = i64::from(taken) as u64;
            let sp = &mut self.area.state.gpr[berth_x86::state::reg::RSP];
            *sp = sp.wrapping_add(undo);
            self.raise(Exception::gp(0));
            return None;
        }
        if code == ExitCode::Interrupt as u64 || self.area.run == 0 || self.mode.single {
            self.stats.interrupt_exits += 1;
            return None;
        }
        let stats = &mut self.stats;
        let count = match code {
            _ if link.is_some() => &mut stats.link_exits,
            _ if code == ExitCode::Return as u64 => &mut stats.return_exits,
            _ => &mut stats.indirect_exits,
        };
        *count += 1;
        let drops = self.code.drops;
        let id = match self.find(self.mode, true) {
            Ok(id) => id,
            Err(e) => {
                self.raise(e);
                return None;
            }
        };
        let host = self.code.host_of(id)?;
        let split = self.code.second_page(id).is_some();
        if let Some(n) = link {
            if drops == self.code.drops {
                if split { self.detour(n, rip) } else { self.connect(n, id, rip) }
            }
        } else if self.mode.bits == 64 || self.mode.flat {
            self.enter_jump(id, rip, host);
        }
        Some(host)
    }

    /// Lets a link to a block that crosses into another page go through the jump cache, because
    /// that page's mapping may change.
    fn detour(&mut self, n: u32, target: u64) {
        if self.mode.bits == 64 || self.mode.flat {
            let code = detour(&mut self.translation, &self.code, target);
            self.code.connect_to(n, &code);
        }
    }

    fn connect(&mut self, n: u32, id: BlockId, target: u64) {
        let Some(link) = self.code.link(n) else { return };
        if link.linkable {
            // The mapping may have changed since the source was entered.
            let page = |b: &Block| b.gpa() >> 12;
            let source = self.code.source_of(n).map(page);
            if source.is_some() && source == self.code.block(id).map(page) {
                self.code.connect(n, id, false);
            }
        } else if !self.mode.user
            && self.mode.bits == 64
            && target >> 63 != 0
            && self.source(target).global
        {
            self.code.connect(n, id, true);
        }
    }

    /// The mapping of the last fetch from the page of `rip`.
    fn source(&self, rip: u64) -> Source {
        let e = self.fetch[(rip >> 12) as usize % FETCH_ENTRIES];
        if e.page == rip >> 12 { e.source } else { Source { global: false, large: true } }
    }

    /// Where the mapping of a block's code is from, which may be on two pages.
    fn source_of(&self, id: BlockId, rip: u64) -> Source {
        let first = self.source(rip);
        if self.code.second_page(id).is_none() {
            return first;
        }
        let second = self.source(rip.wrapping_add(PAGE));
        Source { global: first.global && second.global, large: first.large || second.large }
    }

    /// Enters a block in the jump cache, and with the first of a page what else is known of it: code
    /// that was of use before the jump cache was cleared will be again.
    fn enter_jump(&mut self, id: BlockId, rip: u64, host: u64) {
        let source = self.source_of(id, rip);
        if self.optimizations.contains(Optimizations::PAGES) && self.tlb.jc_is_new(self.view, rip) {
            let mut found = std::mem::take(&mut self.found);
            self.code.page_of(id, self.tlb.space(), &mut found);
            for (rip, host) in &found {
                self.tlb.jc_insert(self.view, *rip, *host, source);
            }
            self.found = found;
        }
        self.tlb.jc_insert(self.view, rip, host, source);
    }

    // ---- finding and making blocks ----

    fn linear_rip(&self) -> Result<u64, Exception> {
        let s = &self.area.state;
        if s.code_size() == CodeSize::Bits64 {
            mem::check_canonical(s, s.rip, false)?;
            return Ok(s.rip);
        }
        let cs = &s.seg[sreg::CS];
        if s.rip > u64::from(cs.limit) {
            return Err(Exception::gp(0));
        }
        Ok(cs.base.wrapping_add(s.rip) & 0xffff_ffff)
    }

    /// Physical page of an instruction fetch.
    fn fetch_page(&mut self, va: u64) -> Result<u64, Exception> {
        let user = self.area.state.cpl() == 3;
        let slot = (va >> 12) as usize % FETCH_ENTRIES;
        let e = self.fetch[slot];
        if e.page == va >> 12 && e.user == user {
            return Ok(e.gpa);
        }
        let rights = Rights::explicit(&self.area.state, Kind::Fetch);
        let w = self.lin.walk(&self.area.state, va, rights)?;
        let gpa = w.gpa & !(PAGE - 1);
        let source = Source { global: w.global, large: w.page_bytes != PAGE };
        self.fetch[slot] = FetchEntry { page: va >> 12, user, gpa, source };
        Ok(gpa)
    }

    /// The view by which modes are remembered: supervisor code goes from view to view by itself.
    fn mode_view(&self) -> View {
        if matches!(self.view, View::User(_)) { self.view } else { View::Kernel }
    }

    /// The block for the current RIP, made if need be. `target`: a jump leads there.
    fn find(&mut self, mode: Mode, target: bool) -> Result<BlockId, Exception> {
        let va = self.linear_rip()?;
        let gpa = self.fetch_page(va)? | (va & (PAGE - 1));
        let key = BlockKey { rip: self.area.state.rip, gpa, mode: mode.pack() };
        let packed = key.mode;
        let view = self.mode_view();
        match self.view_modes.iter_mut().find(|(v, _)| *v == view) {
            Some((_, m)) if *m == packed => {}
            Some((_, m)) => {
                if !mode.single {
                    *m = packed;
                    self.tlb.clear_all_jcs();
                    self.close_gates();
                }
            }
            None => self.view_modes.push((view, packed)),
        }
        if !mode.single
            && let Some(id) = self.code.find(&key)
        {
            let second = self.code.second_page(id);
            match second {
                None => {
                    self.stats.found += 1;
                    self.code.found(id, self.tlb.space(), target);
                    return self.kept(id, key, va, mode);
                }
                Some(p) => {
                    let next = (va & !(PAGE - 1)).wrapping_add(PAGE);
                    if self.fetch_page(next)? == p {
                        return Ok(id);
                    }
                    self.code.invalidate_page(p >> 12);
                    self.tlb.clear_all_jcs();
                }
            }
        }
        self.make_room();
        if self.optimizations.contains(Optimizations::COPIES)
            && let Some(id) = self.brought_here(key, va, mode)?
        {
            return Ok(id);
        }
        self.timed(|stats| &mut stats.translation, |inner| inner.translate(key, va, mode, target))
    }

    fn translate(
        &mut self,
        key: BlockKey,
        va: u64,
        mode: Mode,
        target: bool,
    ) -> Result<BlockId, Exception> {
        let bytes = self.compose(key, va, mode)?;
        let made = Made { target, ..self.translation.finish() };
        self.stats.blocks += 1;
        self.stats.host_bytes += (made.code.len() + made.cold.len()) as u64;
        if let Some(dump) = &self.lin.shared.config.dump {
            let start = (key.gpa & (PAGE - 1)) as usize;
            let guest = self.code_bytes.get(start..start + bytes).unwrap_or_default();
            let hosts = (self.code.next_host(), self.code.next_cold());
            dump.block(mode, guest, &made, hosts, self.thunks);
        }
        Ok(self.code.push_block(&made, self.tlb.space(), !mode.single))
    }

    /// A block made of one for the same code at another guest address.
    fn brought_here(
        &mut self,
        key: BlockKey,
        va: u64,
        mode: Mode,
    ) -> Result<Option<BlockId>, Exception> {
        let space = self.tlb.space();
        let gone = |space| self.tlb.is_gone(space);
        let mut went = std::mem::take(&mut self.went);
        let moved = self.code.moved_in_place(&key, space, gone, &mut went);
        if moved.is_some() {
            let source = self.source(key.rip);
            for block in &went {
                self.tlb.jc_forget(block.from);
                // What was of use in the last program may be in this one.
                if block.target {
                    self.tlb.jc_insert(self.view, block.to, block.host, source);
                }
            }
        }
        self.stats.moved_in_place += went.len() as u64;
        self.went = went;
        if let Some(id) = moved {
            self.tlb.returns_stale = true;
            if cfg!(debug_assertions)
                && let Some(copy) = self.code.as_new(id)
            {
                self.check_copy(&copy, key, va, mode)?;
            }
            return Ok(Some(id));
        }
        if let Some(moved) = self.code.moved(&key) {
            self.check_copy(&moved, key, va, mode)?;
            self.stats.moved += 1;
            return Ok(Some(self.code.push_block(&moved.made(), space, true)));
        }
        Ok(None)
    }

    /// A block that was found, or a copy if its segment is about to be dropped.
    fn kept(
        &mut self,
        id: BlockId,
        key: BlockKey,
        va: u64,
        mode: Mode,
    ) -> Result<BlockId, Exception> {
        // No copy is made of what would be dropped to make room for it.
        if !self.code.fits(MAX_BLOCK_BYTES) {
            return Ok(id);
        }
        let Some(moved) = self.code.rescued(id) else { return Ok(id) };
        self.check_copy(&moved, key, va, mode)?;
        self.tlb.jc_forget(key.rip);
        self.stats.rescued += 1;
        Ok(self.code.push_block(&moved.made(), self.tlb.space(), true))
    }

    /// In debug builds: a copy has to be what would be translated.
    fn check_copy(
        &mut self,
        moved: &Moved,
        key: BlockKey,
        va: u64,
        mode: Mode,
    ) -> Result<(), Exception> {
        if cfg!(debug_assertions) {
            self.compose(key, va, mode)?;
            moved.check(&self.translation.finish());
        }
        Ok(())
    }

    /// Makes sure that a block fits into the cache.
    fn make_room(&mut self) {
        if !self.code.fits(MAX_BLOCK_BYTES) {
            self.lose(true);
        } else if self.code.is_to_leave() {
            self.lose(false);
        }
    }

    /// Drops the oldest code, or makes it ready to be dropped.
    fn lose(&mut self, now: bool) {
        if now {
            self.code.advance();
            self.stats.cache_drops += 1;
        } else {
            self.code.leave();
        }
        self.tlb.clear_all_jcs();
    }

    /// Makes sure that there is room for what a clone translates: each would have to drop the same code,
    /// and copy most of the pages that lead there.
    fn make_room_for_clones(&mut self) {
        for _ in 0..2 {
            if self.code.room_before_loss() < self.code.size() / SHARE_OF_CLONES {
                self.lose(self.code.is_leaving());
            }
        }
    }

    /// Translates a block but for its cold parts; gives the bytes of its guest code, which are in
    /// `code_bytes`.
    #[allow(clippy::too_many_lines, reason = "one loop over the instructions of a block")]
    fn compose(&mut self, key: BlockKey, va: u64, mode: Mode) -> Result<usize, Exception> {
        let page = key.gpa & !(PAGE - 1);
        let start = (key.gpa & (PAGE - 1)) as usize;
        if !mode.single {
            self.mark_code(page >> 12);
        }
        let mut bytes = std::mem::take(&mut self.code_bytes);
        bytes.resize(PAGE as usize + 16, 0);
        let mut avail = PAGE as usize;
        // Most blocks are short.
        let mut have = avail.min(start + USUAL_BYTES);
        self.lin.read_phys(key.gpa, &mut bytes[start..have]);
        let mut second_page = None;
        let options = self.allowed.decoder_options();
        self.translation.begin(&self.code, key, mode);
        let mut at = start;
        let mut count = 0;
        let mut end_rip = key.rip;
        let max = if mode.single { 1 } else { MAX_INSNS };
        let joins = !mode.single && self.optimizations.contains(Optimizations::JOINS);
        let ends_early = |bytes: &[u8]| {
            let mut d = Decoder::new(u32::from(mode.bits), bytes, options);
            d.decode().is_invalid() && d.last_error() == DecoderError::NoMoreBytes
        };
        if avail - at < LONGEST && ends_early(&bytes[at..avail]) {
            // The first instruction of the block crosses into the next page.
            let next = (va & !(PAGE - 1)).wrapping_add(PAGE);
            let gpa = self.fetch_page(next)?;
            if !mode.single {
                self.mark_code(gpa >> 12);
                // The first page may have changed before its mark was seen by all.
                self.lin.read_phys(page, &mut bytes[..PAGE as usize]);
            }
            avail = PAGE as usize + 15;
            self.lin.read_phys(gpa, &mut bytes[PAGE as usize..avail]);
            second_page = Some(gpa);
        }
        let mut d = Decoder::with_ip(u32::from(mode.bits), &bytes[at..avail], end_rip, options);
        while count < max && at < PAGE as usize {
            if have < PAGE as usize && at + LONGEST > have {
                self.lin.read_phys(page + have as u64, &mut bytes[have..PAGE as usize]);
                have = PAGE as usize;
                d = Decoder::with_ip(u32::from(mode.bits), &bytes[at..avail], end_rip, options);
            }
            d.set_ip(end_rip);
            let mut ins = d.decode();
            if ins.is_invalid()
                && d.last_error() == DecoderError::NoMoreBytes
                && second_page.is_none()
                && count > 0
            {
                break;
            }
            if matches!(ins.mnemonic(), Mnemonic::Bsf | Mnemonic::Bsr) {
                // It would be another instruction where the host has that.
                ins.set_has_rep_prefix(false);
            }
            if ins.is_invalid() {
                // The helper raises #UD at this address, or #GP for more than 15 bytes.
                let long = too_long(&bytes[at..avail], mode.bits);
                let mut bad = Instruction::default();
                bad.set_len(if long { LONGEST } else { 1 });
                bad.set_ip(end_rip);
                ins = bad;
            }
            let ends = self.ends.of(instruction_gpa(&key, end_rip));
            let rest = bytes.get(at..).unwrap_or_default();
            let allowed = |ins: &Instruction| self.allowed.instruction(ins);
            let ahead = Ahead::new(ins, rest, mode, ends, self.optimizations, allowed);
            let class = ahead.class;
            self.translation.ahead.push(ahead);
            at += ins.len();
            end_rip = wrap(end_rip.wrapping_add(ins.len() as u64), mode.bits);
            count += 1;
            if second_page.is_some() || ends_block(&ins, class, mode, count) {
                break;
            }
            // What there is a block of need not be translated again.
            let rest = BlockKey { rip: end_rip, gpa: page + at as u64, mode: key.mode };
            if joins && count >= JOINS_AFTER && self.code.has_target(&rest) {
                break;
            }
        }
        self.code_bytes = bytes;
        let (count, ended) = self.translation.all();
        if !ended {
            // As far as was translated.
            if let Some(ahead) = self.translation.ahead.get(count) {
                end_rip = ahead.ins.ip();
            }
            self.translation.continue_at(end_rip);
        }
        self.translation.second_page = second_page.filter(|_| at > PAGE as usize);
        self.stats.guest_instructions += count as u64;
        Ok(end_rip.wrapping_sub(key.rip) as usize)
    }

    // ---- dropping things ----

    fn drop_page(&mut self, page: u64) {
        self.stats.page_drops += 1;
        self.code_changed(page);
        if self.code.invalidate_page(page) {
            self.tlb.clear_all_jcs();
        }
    }

    fn drop_all_code(&mut self) {
        self.all_code_changed();
        self.code.flush();
        self.tlb.clear_all_jcs();
        self.stats.cache_drops += 1;
    }

    fn clear_fetch(&mut self) {
        self.lin.walked.clear();
        for e in &mut self.fetch {
            e.page = !0;
        }
    }

    /// Drops every cached translation of addresses.
    pub(crate) fn flush_everything(&mut self) {
        self.close_gates();
        self.tlb.flush_all();
        self.clear_fetch();
        self.code.disconnect_far();
        self.tlb.clear_all_jcs();
    }

    /// Gives the memory of tables back that are filled again as they are needed; for a vCPU that has
    /// nothing to do.
    pub fn rest(&mut self) {
        self.make_room_for_clones();
        self.tlb.give_back();
    }

    /// Drops cached translations that are not global.
    pub(crate) fn flush_non_global(&mut self) {
        self.tlb.flush_non_global();
        self.clear_fetch();
    }

    /// MOV CR3.
    pub(crate) fn switch_space(&mut self, pcid: u16, keep: bool) {
        self.stats.space_switches += 1;
        self.tlb.switch(pcid, keep);
        self.clear_fetch();
        let view = View::User(self.tlb.current());
        if self.view_modes.contains(&(view, self.sysret_mode)) && !self.direct_wanted() {
            self.area.sysret.base = self.tlb.base(view);
        } else {
            self.area.sysret.closed = 1;
        }
    }

    /// After SYSCALL or SYSRET was executed and generated code goes on behind it: lets generated code
    /// do the same.
    fn open_gate(&mut self, code: Code) {
        if !self.optimizations.contains(Optimizations::GATES) {
            return;
        }
        let s = &self.area.state;
        let (cs, ss) = (s.seg[sreg::CS], s.seg[sreg::SS]);
        let gate = Gate { closed: 0, cs, ss, base: self.tlb.base(self.view) };
        if code == Code::Syscall && self.view == View::Kernel {
            if s.sfmask & CLEARED == CLEARED {
                self.area.syscall_keep = !(s.sfmask | flags::RF | flags::VM) | flags::FIXED;
                self.area.syscall = gate;
            }
        } else if code == Code::Sysretq
            && self.mode.bits == 64
            && !self.mode.aligned
            && !self.direct_wanted()
        {
            self.sysret_mode = self.mode.pack();
            self.area.sysret = gate;
        }
    }

    /// What SYSCALL or SYSRET follow from has changed.
    pub(crate) fn close_gates(&mut self) {
        self.area.syscall.closed = 1;
        self.area.sysret.closed = 1;
    }

    /// Drops the entries of one PCID.
    pub(crate) fn flush_pcid(&mut self, pcid: u16) {
        self.tlb.flush_pcid(pcid);
        self.clear_fetch();
    }

    /// INVLPG.
    pub(crate) fn invalidate(&mut self, va: u64) {
        self.tlb.invalidate(va);
        self.lin.walked.clear();
        for e in &mut self.fetch {
            // A large page covers more than the entry named by `va`.
            if e.page == va >> 12 || e.source.large && e.page >> 18 == va >> 30 {
                e.page = !0;
            }
        }
        self.tlb.jc_invalidate(va);
        self.tlb.returns_stale = true;
        if va >> 63 != 0 {
            self.code.disconnect_far_to(va);
        }
    }

    // ---- accesses ----

    /// The slow path of an access; see [`crate::translate`].
    fn slow_access(&mut self, ret: u64, ea: u64) -> Then {
        self.sync_in();
        let number = self.area.sc;
        self.make_access(number, ret, ea, true)
    }

    /// An access that faulted and has no slow path so far. Most only miss their page in the TLB and
    /// are then made where they are.
    fn first_access(&mut self, s0: u64) -> Then {
        self.sync_in();
        let pc = self.area.fault_pc;
        let found = self.code.site_at(pc);
        let found = found.and_then(|n| Some((n, *self.code.site(n)?, self.code.accessing(n, pc)?)));
        let Some((number, site, (rip, first))) = found else {
            bug("a slow access from an unknown place", pc);
        };
        if !self.code.fits(if first { MAX_BLOCK_BYTES } else { STUB_BYTES }) {
            // Nothing has been done of the instruction.
            self.area.fault_trap = 0;
            self.make_room();
            self.area.state.rip = wrap(rip, self.mode.bits);
            let code = if self.in_single { ExitCode::NotBegun } else { ExitCode::Helper };
            self.area.exit_code = code as u64;
            return Then::Exit;
        }
        let gpr = |n: u8| self.area.state.gpr[usize::from(n & 15)];
        let ea = match site.place {
            _ if !site.is.contains(Is::SIMPLE) => {
                let slow = self.stub_of(number, pc);
                return self.go_on_at(pc, slow.cold);
            }
            Place::Shared { through, d } => {
                let index = through.index().map_or(0, |(index, shift)| gpr(index) << shift);
                gpr(through.base).wrapping_add(index).wrapping_add(i64::from(d) as u64)
            }
            Place::Register { ea: S0, .. } => s0,
            Place::Register { ea, .. } => {
                gpr((0..16).find(|&g| mapped(g) == Some(ea)).unwrap_or(0))
            }
        };
        self.make_access(number, pc, ea, false)
    }

    /// The access `number`, which is at `pc`, with its slow path.
    fn stub_of(&mut self, number: u64, pc: u64) -> Slow {
        if let Some(slow) = self.code.slow(number) {
            return *slow;
        }
        let (Some(&site), Some(body)) = (self.code.site(number), self.code.body_at(pc)) else {
            bug("a slow access from an unknown place", pc);
        };
        let (code, slow) = self.translation.stub(&self.code, body, number, site);
        self.code.push_stub(number, pc, slow, code);
        slow
    }

    /// Lets the thunk return to an offset in the block that `pc` belongs to.
    fn go_on_at(&mut self, pc: u64, offset: u32) -> Then {
        let Some(block) = self.code.block_at(pc) else { bug("outside any block", pc) };
        self.returns.return_to(&self.area, self.code.at(block, offset));
        Then::Go
    }

    /// Makes access `number`, whose code is at `pc`, or finds out how it can be made. `in_stub`: its
    /// slow path waits for an answer; otherwise there may be none.
    fn make_access(&mut self, number: u64, pc: u64, ea: u64, in_stub: bool) -> Then {
        self.stats.slow_accesses += 1;
        let trap = std::mem::take(&mut self.area.fault_trap);
        self.stats.signals += u64::from(trap != 0);
        let (Some(&site), Some((rip, _))) =
            (self.code.site(number), self.code.accessing(number, pc))
        else {
            bug("a slow access from an unknown place", pc);
        };
        let rip = wrap(rip, self.mode.bits);
        if !site.is.contains(Is::SEGMENTED) && self.crosses(&site, ea, trap) {
            self.stats.crossed += 1;
            let last = ea.wrapping_add(u64::from(site.size) - 1);
            let within = (ea ^ last) & !(PAGE - 1) == 0;
            let ends = if within { Ends::Apart } else { Ends::Cross };
            let paired = self.pair_up(ea.wrapping_sub(site.above()));
            self.crossed(rip, pc, ends, paired);
        }
        let access = self.access(&site, ea, trap);
        match access {
            Ok(Outcome::Bounce) => self.stats.bounced += 1,
            Err(_) => self.stats.guest_faults += 1,
            _ => {}
        }
        if let Some(window) = site.window()
            && let Some(kept) = self.area.windows.get_mut(window)
        {
            *kept = self.tlb.look_up(self.view, ea.wrapping_sub(site.above())).0;
        }
        match access {
            Ok(Outcome::Direct(host)) => {
                self.area.sc = host.wrapping_sub(ea);
                if in_stub {
                    return Then::Go;
                }
                let looked_up = ea.wrapping_sub(site.above());
                // Its part of the table may not have been opened for this view.
                self.tlb.touch(self.view, looked_up);
                if self.tlb.look_up(self.view, looked_up) == (self.area.sc, true) {
                    return self.go_on_at(pc, site.start());
                }
                let ret = self.stub_of(number, pc).ret;
                self.go_on_at(pc, ret)
            }
            Ok(Outcome::Bounce) => {
                self.bounced_sc = (&raw const self.area.bounce as u64).wrapping_sub(ea);
                self.area.sc = self.bounced_sc;
                self.bounced_x87 = site.is.contains(Is::X87);
                if !in_stub {
                    let ret = self.stub_of(number, pc).ret;
                    self.go_on_at(pc, ret);
                }
                if site.writes() { Then::Bounce } else { Then::Go }
            }
            Ok(Outcome::Alone) => {
                self.once = true;
                self.area.state.rip = rip;
                self.area.exit_code = ExitCode::Helper as u64;
                Then::Exit
            }
            Err(fault) if self.own_exception_first(&site) => {
                let x87 = site.is.contains(Is::X87).then(fpu::store_x87);
                self.trial = Some(Box::new(Trial { fault, rip, x87 }));
                self.area.sc = (&raw const self.area.bounce as u64).wrapping_sub(ea);
                if !in_stub {
                    let ret = self.stub_of(number, pc).ret;
                    self.go_on_at(pc, ret);
                }
                Then::Bounce
            }
            Err(e) => {
                self.area.state.rip = rip;
                // A pending x87 exception comes before any fault of the operand.
                let waits = site.is.contains(Is::X87) && fpu::pending();
                if site.is.contains(Is::MMX | Is::WRITE) && !waits {
                    fpu::clear_top();
                }
                if e.vector == vector::PF && !waits {
                    self.page_fault = (rip, ea);
                }
                self.raise_and_resume(if waits { Exception::mf() } else { e })
            }
        }
    }

    /// Whether a store may raise, or be suppressed by, an exception of its own computation.
    fn own_exception_first(&self, site: &Site) -> bool {
        let x87 = site.is.contains(Is::X87) && !site.is.contains(Is::MMX);
        let raises = x87 && fpu::unmasked() && !fpu::pending();
        site.writes() && (raises || site.is.contains(Is::CONVERTS))
    }

    fn access(&mut self, site: &Site, ea: u64, trap: u64) -> Result<Outcome, Exception> {
        let size = usize::from(site.size);
        let stack = usize::from(site.seg()) == sreg::SS;
        let segmented = site.is.contains(Is::SEGMENTED);
        let va = if segmented {
            mem::linear(&self.area.state, site.seg(), ea, size, site.writes())?
        } else {
            ea
        };
        if va & (site.align() - 1) != 0 {
            return Err(Exception::gp(0));
        }
        mem::check_canonical(&self.area.state, va, stack)?;
        let looked_up = paging::canonical(ea.wrapping_sub(site.above()));
        if trap == 13 && looked_up && !(self.mode.user && va >> 47 != 0) {
            // Canonical, and yet the host's processor objects: the operand's alignment.
            return Err(Exception::gp(0));
        }
        let checked = self.mode.aligned;
        if checked
            && !site.is.contains(Is::CONVERTS)
            && va & (mem::natural_alignment(size) - 1) != 0
        {
            return Err(Exception::ac());
        }
        let kind = if site.writes() { Kind::Write } else { Kind::Read };
        let rights = Rights::explicit(&self.area.state, kind);
        let watching = mem::watching(&self.area.state);
        let off = va & (PAGE - 1);
        if off + size as u64 <= PAGE {
            let w = self.lin.walk(&self.area.state, va, rights)?;
            if self.lin.shared.ram.contains(w.gpa, size as u64) {
                if watching && let Some(o) = self.watched(va, size, site.writes()) {
                    return Ok(o);
                }
                if site.writes() {
                    self.lin.shared.ram.own(w.gpa, 1);
                }
                if site.writes()
                    && self.lin.shared.has_code(w.gpa >> 12)
                    && self.store_to_code(w.gpa >> 12)
                {
                    return Ok(Outcome::Alone);
                }
                if segmented
                    || watching
                    || checked
                    || !self.lin.shared.ram.contains(w.gpa & !(PAGE - 1), PAGE)
                {
                    return Ok(Outcome::Direct(self.slow_addr(w.gpa)));
                }
                self.stats.entered += 1;
                return Ok(Outcome::Direct(self.fill(va, &w, site.writes())));
            }
        }
        let p = self.lin.resolve(&self.area.state, va, size, rights, stack)?;
        if watching && let Some(o) = self.watched(va, size, site.writes()) {
            return Ok(o);
        }
        if let Some(host) = self.in_one_piece(&p) {
            let mut alone = false;
            if site.writes() {
                for page in [p.first.gpa >> 12, p.second.gpa >> 12] {
                    self.lin.shared.ram.own(page * PAGE, 1);
                    alone |= self.lin.shared.has_code(page) && self.store_to_code(page);
                }
            }
            return Ok(if alone { Outcome::Alone } else { Outcome::Direct(host) });
        }
        let mut buf = [0u8; crate::layout::BOUNCE_SIZE];
        if site.reads() && site.writes() && p.second.len != 0 {
            // The host cannot do this atomically: nobody else may run from here to the write.
            self.lin.shared.stop_others(self.lin.index);
            self.in_split = true;
        }
        if site.reads() {
            self.lin.read_pieces(&p, &mut buf[..size]);
        }
        self.area.bounce.0[..size].copy_from_slice(&buf[..size]);
        self.bounced = p;
        self.after_rust();
        if self.interrupt_due() {
            self.area.run = 0;
        }
        Ok(Outcome::Bounce)
    }

    /// The host address where two pieces of RAM follow each other.
    fn in_one_piece(&self, p: &Pieces) -> Option<u64> {
        let ram = &self.lin.shared.ram;
        let (first, second) = (p.first.gpa, p.second.gpa);
        if p.second.len == 0 {
            return None;
        }
        if second == first + p.first.len as u64 {
            let whole = ram.contains(first, (p.first.len + p.second.len) as u64);
            return whole.then(|| self.slow_addr(first));
        }
        let at = ram.pair_addr((first & !(PAGE - 1), second), true)?;
        Some(at + (first & (PAGE - 1)))
    }

    /// Whether an access trapped, or was found to need the slow path, because it reaches into another
    /// page than the one that was looked up, and not just one that is unknown so far.
    fn crosses(&self, site: &Site, ea: u64, trap: u64) -> bool {
        let looked_up = ea.wrapping_sub(site.above());
        let last = ea.wrapping_add(u64::from(site.size) - 1);
        if site.above() == 0 {
            return (ea ^ last) & !(PAGE - 1) != 0;
        }
        trap != 0 && (looked_up ^ last) & !(PAGE - 1) != 0 && self.tlb.look_up(self.view, last).1
    }

    /// An access went beyond the end of a page. Instructions that do so often are translated in another
    /// way; not if it is between pages that have a mapping of both now.
    fn crossed(&mut self, rip: u64, pc: u64, wanted: Ends, paired: bool) {
        let Some(key) = self.code.key_at(pc) else { return };
        // Instructions in the second page of a block are rare and stay as they are.
        if self.ends.crossed(instruction_gpa(&key, rip), wanted, paired) {
            self.code.retire_at(pc);
            // Returns into the block may stay: it is slow, not wrong.
            self.tlb.jc_forget(key.rip);
            self.stats.crossings += 1;
        }
    }

    /// An access went from the page at `va` into the next. If that was so before, and it makes no
    /// difference to the guest, the page is reached where the next one follows; whether that is so.
    fn pair_up(&mut self, va: u64) -> bool {
        let page = va & !(PAGE - 1);
        if self.checked
            || mem::watching(&self.area.state)
            || !self.area.state.paging()
            || !self.lin.shared.ram.has_pairs()
            || !self.optimizations.contains(Optimizations::PAIRS)
        {
            return false;
        }
        let Some(w) = paging::peek(&self.lin.shared.ram, &self.area.state, page) else {
            return false;
        };
        let Some(next) = self.next_page(page, &w) else { return false };
        let pages = (w.gpa & !(PAGE - 1), next);
        if pages.1 == pages.0 + PAGE || !self.lin.shared.ram.contains(pages.0, PAGE) {
            return false;
        }
        let rw = w.writable && w.dirty;
        if self.lin.shared.ram.pair_addr(pages, rw).is_none() {
            if !self.ends.again(pages) {
                return false;
            }
            if self.lin.shared.ram.pairs_are_full() {
                // Between instructions, since a block holds addends.
                self.pairs_are_due = true;
                self.area.run = 0;
                return false;
            }
            self.stats.pairs += 1;
        }
        let Some(at) = self.lin.shared.pair(pages, rw) else { return false };
        let entry = self.entry(page, at, &w);
        self.tlb.fill(self.view, page, entry);
        true
    }

    /// With breakpoints on data: whether the access has to be made alone, so that the trap comes
    /// right after it.
    fn watched(&mut self, va: u64, size: usize, write: bool) -> Option<Outcome> {
        let before = self.lin.watch_hits;
        self.lin.watch(&self.area.state, va, size, write);
        if self.lin.watch_hits != before && !self.in_single {
            self.lin.watch_hits = before;
            return Some(Outcome::Alone);
        }
        None
    }

    /// Drops translations of a page that is about to be written; whether the running block is gone.
    fn store_to_code(&mut self, page: u64) -> bool {
        self.stats.code_stores += 1;
        self.lin.shared.invalidate_page(page, Some(self.lin.index));
        self.drop_page(page);
        !self.in_single
    }

    /// Host address for an access past the TLB. Stores go where a page with translations is protected,
    /// since another vCPU may have made one of the page a moment ago.
    fn slow_addr(&self, gpa: u64) -> u64 {
        self.lin.shared.ram.rw_addr(gpa)
    }

    /// Enters a walked page into the TLB; the host address of `va`.
    fn fill(&mut self, va: u64, w: &Walk, write: bool) -> u64 {
        const REGION: u64 = 2 << 20;
        let rw = w.writable && w.dirty;
        if write && !rw {
            // A supervisor's write to a read-only page (CR0.WP = 0).
            return self.slow_addr(w.gpa);
        }
        let (start, from) = (va & !(REGION - 1), w.gpa & !(REGION - 1));
        if w.page_bytes >= REGION && self.lin.shared.ram.contains(from, REGION) {
            // The last page goes on in another mapping, which may lie elsewhere.
            let host = self.lin.shared.ram.view_addr(from, REGION + PAGE, rw);
            let whole = start & (w.page_bytes - 1) != w.page_bytes - REGION
                && self.lin.shared.ram.contains(from, REGION + PAGE);
            let count = if whole { REGION / PAGE } else { REGION / PAGE - 1 };
            let entry = self.entry(start, host, w);
            self.tlb.fill_region(self.view, start, entry, count);
            if va - start < count * PAGE {
                return host + (va - start);
            }
        }
        let page = va & !(PAGE - 1);
        let Some(host) = self.host_page(page, w) else {
            return self.slow_addr(w.gpa);
        };
        let entry = self.entry(page, host, w);
        self.tlb.fill(self.view, va, entry);
        let neighbours = self.optimizations.contains(Optimizations::NEIGHBOURS);
        if neighbours && w.page_bytes == PAGE && self.area.state.paging() {
            self.fill_around(page);
        }
        host + (va & (PAGE - 1))
    }

    /// The guest comes back from a page fault and will make the access again: enters the page, which
    /// saves a signal.
    fn fill_after_fault(&mut self) {
        let va = self.page_fault.1;
        self.page_fault.0 = !0;
        if mem::watching(&self.area.state)
            || !self.optimizations.contains(Optimizations::NEIGHBOURS)
        {
            return;
        }
        let Some(w) = paging::peek(&self.lin.shared.ram, &self.area.state, va) else { return };
        if self.lin.shared.ram.contains(w.gpa & !(PAGE - 1), PAGE) {
            self.stats.entered_ahead += 1;
            self.fill(va, &w, false);
        }
    }

    /// Enters the page of `va` for emitted string instructions, unless it is known.
    pub(crate) fn enter_string_page(&mut self, va: u64, write: bool) {
        let kind = if write { Kind::Write } else { Kind::Read };
        let Mode { bits, single, aligned, .. } = self.mode;
        if bits != 64 || single || aligned || mem::watching(&self.area.state) {
            return;
        }
        let known = self.tlb.get(self.view, va);
        if known.is_some() && !write {
            return;
        }
        let rights = Rights::explicit(&self.area.state, kind);
        let Ok(w) = self.lin.walk(&self.area.state, va, rights) else { return };
        let page = w.gpa & !(PAGE - 1);
        let rw = w.writable && w.dirty;
        if !self.lin.shared.ram.contains(page, PAGE)
            || write && (!rw || self.lin.shared.has_code(page >> 12))
        {
            return;
        }
        if write {
            self.lin.shared.ram.own(page, 1);
        }
        if let Some(addend) = known {
            let host = addend.wrapping_add(va & !(PAGE - 1));
            let plain = self.lin.shared.ram.rw_addr(page);
            if host == plain || self.lin.shared.ram.guarded_addr(page, true) == Some(host) {
                return;
            }
        }
        self.fill(va, &w, write);
    }

    fn entry(&self, va: u64, host: u64, w: &Walk) -> Page {
        let s = &self.area.state;
        Page {
            addend: host.wrapping_sub(va),
            user: w.readable_user,
            smap: s.paging() && s.cr4 & cr4::SMAP != 0,
            global: w.global,
            bytes: if s.paging() { w.page_bytes } else { PAGE },
        }
    }

    /// Where generated code is to reach a page: where the next guest page follows, if it does, else
    /// where nothing follows. `None` when there is no room for another such mapping; the vCPU
    /// goes over to code that looks for crossings.
    fn host_page(&mut self, page: u64, w: &Walk) -> Option<u64> {
        let gpa = w.gpa & !(PAGE - 1);
        let rw = w.writable && w.dirty;
        if let Some(at) = self.with_next(page, w) {
            return Some(at);
        }
        let at = self.lin.shared.guarded(gpa, rw);
        if at.is_none() {
            self.check_from_now_on = true;
            self.area.run = 0;
        }
        at
    }

    /// Where generated code can reach a page and behind it the next one, if there is such a place.
    fn with_next(&mut self, page: u64, w: &Walk) -> Option<u64> {
        let gpa = w.gpa & !(PAGE - 1);
        let rw = w.writable && w.dirty;
        let next = if self.checked { None } else { Some(self.next_page(page, w)?) };
        let ram = &self.lin.shared.ram;
        match next {
            Some(next) if next != gpa + PAGE || !ram.contains(gpa, 2 * PAGE) => {
                ram.pair_addr((gpa, next), rw)
            }
            _ => Some(ram.view_addr(gpa, 2 * PAGE, rw)),
        }
    }

    /// The physical address of the guest page behind `page`, if it is RAM with the same rights.
    fn next_page(&mut self, page: u64, w: &Walk) -> Option<u64> {
        let next = page.wrapping_add(PAGE);
        if next & 0xffff_ffff == 0 || !paging::canonical(next) {
            return None;
        }
        let rw = w.writable && w.dirty;
        let n = paging::peek(&self.lin.shared.ram, &self.area.state, next)?;
        let goes_on = self.lin.shared.ram.contains(n.gpa, PAGE)
            && (!rw || n.writable && n.dirty)
            && n.readable_user == w.readable_user
            && n.global == w.global;
        if !goes_on {
            return None;
        }
        if n.page_bytes > PAGE {
            self.tlb.reaches_into(next, n.page_bytes);
        }
        Some(n.gpa & !(PAGE - 1))
    }

    /// Enters neighbours that need no mapping to be made: a fault is dearer than looking.
    fn fill_around(&mut self, page: u64) {
        for va in around(page) {
            if va == page {
                continue;
            }
            let Some(w) = paging::peek(&self.lin.shared.ram, &self.area.state, va) else {
                continue;
            };
            let rw = w.writable && w.dirty;
            if w.page_bytes != PAGE || !self.lin.shared.ram.contains(w.gpa, PAGE) {
                continue;
            }
            let host = self.with_next(va, &w);
            if let Some(host) = host.or_else(|| self.lin.shared.ram.guarded_addr(w.gpa, rw)) {
                let entry = self.entry(va, host, &w);
                self.tlb.fill(self.view, va, entry);
                self.stats.entered_ahead += 1;
            }
        }
    }

    /// Writes what a store left in the bounce buffer.
    fn commit(&mut self, ret: u64) -> Then {
        self.sync_in();
        if let Some(trial) = self.trial.take() {
            if let Some(x87) = &trial.x87 {
                if fpu::suppressed() {
                    return Then::Go;
                }
                fpu::reload_x87(x87);
            }
            self.area.state.rip = trial.rip;
            self.raise(trial.fault);
            self.area.exit_code = ExitCode::Helper as u64;
            return Then::Exit;
        }
        if self.bounced_x87 && fpu::suppressed() {
            return Then::Go;
        }
        let p = self.bounced;
        let len = p.first.len + p.second.len;
        let mut buf = [0u8; crate::layout::BOUNCE_SIZE];
        buf[..len].copy_from_slice(&self.area.bounce.0[..len]);
        self.lin.write_pieces(&p, &buf[..len]);
        self.end_split();
        let stop = self.after_rust();
        if stop || self.area.run == 0 || self.interrupt_due() {
            if !self.in_single
                && let Some(rip) = self.code.end_of_store(ret)
            {
                self.area.state.rip = wrap(rip, self.mode.bits);
                self.area.exit_code = ExitCode::Helper as u64;
                return Then::Exit;
            }
            self.area.run = 0;
        }
        Then::Go
    }

    /// Whether an interrupt would be taken now.
    fn interrupt_due(&mut self) -> bool {
        if self.area.irq == 0 || self.area.state.rflags & flags::IF == 0 {
            return false;
        }
        self.area.irq = u64::from(self.lin.platform.interrupt_pending());
        self.area.irq != 0
    }

    /// Lets the other vCPUs run again after a bounced read-modify-write.
    fn end_split(&mut self) {
        if std::mem::take(&mut self.in_split) {
            self.lin.shared.world.resume();
        }
    }

    // ---- instructions in Rust ----

    fn helper(&mut self, ret: u64) -> Then {
        self.sync_in();
        self.stats.helpers += 1;
        // A string instruction that faulted: its pages are entered.
        let trap = std::mem::take(&mut self.area.fault_trap);
        self.stats.signals += u64::from(trap != 0);
        let Some(&Helped { ins, run }) = self.code.helper(self.area.sc) else {
            bug("a helper called from an unknown place", ret)
        };
        if let Some(n) = self.helper_counts.get_mut(ins.mnemonic() as usize) {
            *n += 1;
        }
        self.area.exit_code = ExitCode::Helper as u64;
        self.area.state.rip = ins.ip();
        let next = wrap(ins.next_ip(), self.mode.bits);
        let result = run.run(self, &ins, next);
        let in_task = self.lin.task_entered;
        let stop = self.after_rust();
        match result {
            Ok(Flow::Next) => {
                self.area.state.rip = next;
                let due = self.interrupt_due();
                if stop
                    || due
                    || self.in_single
                    || self.area.run == 0
                    || self.lin.watch_hits != 0
                    || self.mode_of_state() != self.mode
                {
                    return Then::Exit;
                }
                self.update_view();
                self.sync_out();
                Then::Go
            }
            Ok(Flow::Jump) if stop => Then::Exit,
            Ok(Flow::Jump) => {
                let then = self.resume();
                if then == Then::Go {
                    self.open_gate(ins.code());
                }
                then
            }
            Err(e) => {
                // A fault of a new task is one of its own first instruction.
                if !in_task {
                    self.area.state.rip = ins.ip();
                }
                self.raise_and_resume(e)
            }
        }
    }

    /// Delivers an exception of the instruction at RIP and goes on in its handler.
    fn raise_and_resume(&mut self, e: Exception) -> Then {
        self.area.exit_code = ExitCode::Helper as u64;
        if self.in_single || self.lin.watch_hits != 0 {
            self.raise(e);
            return Then::Exit;
        }
        match self.deliver(Event::Exception(e)) {
            Step::Leave(exit) => {
                self.exit = Some(exit);
                Then::Exit
            }
            Step::Go | Step::Again => self.resume(),
        }
    }

    /// Lets a thunk return to the translation of what is at RIP now, when it is in the jump cache and
    /// nothing else has to be done before; otherwise the dispatcher sees to it.
    fn resume(&mut self) -> Then {
        if self.area.state.cpl() == 3 && self.direct_wanted() {
            self.direct.armed = true;
            return Then::Exit;
        }
        let s = &self.area.state;
        if !self.optimizations.contains(Optimizations::RESUME)
            || self.pending.is_some()
            || self.exit.is_some()
            || self.in_single
            || self.step_trap
            || self.lin.watch_hits != 0
            || self.area.run == 0
            || s.halted != 0
            || s.nmi_pending != 0
            || self.interrupt_due()
        {
            return Then::Exit;
        }
        let mode = self.mode_of_state();
        if mode.single || !(mode.bits == 64 || mode.flat) {
            return Then::Exit;
        }
        self.update_view();
        if self.area.state.rip == self.page_fault.0 {
            self.fill_after_fault();
        }
        if !self.view_modes.contains(&(self.mode_view(), mode.pack())) {
            return Then::Exit;
        }
        let Some(host) = self.tlb.jc_find(self.view, self.area.state.rip) else {
            return Then::Exit;
        };
        self.stats.resumed += 1;
        self.mode = mode;
        self.area.state.rflags &= !flags::RF;
        self.no_step_trap = false;
        self.returns.return_to(&self.area, host);
        self.sync_out();
        Then::Go
    }

    /// A signal that is no memory access: an arithmetic fault of the guest's instruction.
    fn fault(&mut self) {
        let pc = self.area.fault_pc;
        let signal = self.area.fault_signal as i32;
        let trap = std::mem::take(&mut self.area.fault_trap);
        // A tried store raised its own exception.
        self.trial = None;
        let rip = self.code.rip_at(pc);
        let Some(rip) = rip else { bug("a fault outside any block", pc) };
        self.area.state.rip = wrap(rip, self.mode.bits);
        let e = match (signal, trap) {
            (_, 0) => Exception::de(),
            (libc::SIGFPE, 16) => Exception::mf(),
            (libc::SIGFPE, 19) if self.area.state.cr4 & cr4::OSXMMEXCPT != 0 => Exception::xm(),
            (libc::SIGFPE, 19) | (libc::SIGILL, _) => Exception::ud(),
            (_, 4) => Exception::other(vector::OF),
            (_, 13) => Exception::gp(0),
            _ => {
                let (at, code) = self.code.around(pc);
                let address = self.area.fault_address;
                bug(
                    &format!(
                        "signal {signal}, trap {trap} at address {address:#x}, which no guest \
                         instruction can raise; rip {rip:#x}, code from {at:#x}: {code:02x?}"
                    ),
                    pc,
                )
            }
        };
        self.raise(e);
    }
}

/// A faulting store that is made to the bounce buffer. If that raises no exception of its own and
/// suppresses nothing, the fault is raised.
struct Trial {
    fault: Exception,
    rip: u64,
    /// x87 state from before, for stores that pop.
    x87: Option<fpu::Fx>,
}

/// What is to be done in one round of the dispatcher.
enum Step {
    Go,
    Again,
    Leave(Exit),
}

/// Where an access goes.
enum Outcome {
    /// To this host address.
    Direct(u64),
    /// To the bounce buffer.
    Bounce,
    /// The instruction has to run alone.
    Alone,
}

/// Whether no block goes on behind an instruction, its `count`th.
fn ends_block(ins: &Instruction, class: Class, mode: Mode, count: usize) -> bool {
    match class {
        Class::Gate | Class::HelperEnds | Class::Refused => true,
        Class::Branch if ins.is_jcc_short_or_near() => !goes_on(mode, count),
        Class::Branch => !(ins.is_call_near() || ins.is_call_near_indirect()),
        _ => false,
    }
}

/// Physical address of an instruction of a block.
const fn instruction_gpa(key: &BlockKey, rip: u64) -> u64 {
    key.gpa.wrapping_add(rip.wrapping_sub(key.rip))
}

/// Cuts an instruction pointer to the size of the mode.
pub fn wrap(rip: u64, bits: u8) -> u64 {
    match bits {
        64 => rip,
        32 => rip & 0xffff_ffff,
        _ => rip & 0xffff,
    }
}

/// Whether bytes that cannot be decoded are an instruction of more than 15 bytes: one that could be
/// with fewer of its prefixes.
fn too_long(bytes: &[u8], bits: u8) -> bool {
    for k in 1..=LONGEST {
        let prefix = bytes.get(k - 1).is_some_and(|b| {
            matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
        });
        if !prefix {
            return false;
        }
        let mut d =
            Decoder::new(u32::from(bits), bytes.get(k..).unwrap_or(&[]), DecoderOptions::NONE);
        let ins = d.decode();
        // Bytes that end at the end of the page do not make it long.
        let cut = ins.is_invalid() && d.last_error() == DecoderError::NoMoreBytes;
        if cut && bytes.len() >= LONGEST || !ins.is_invalid() && k + ins.len() > LONGEST {
            return true;
        }
    }
    true
}

/// An error of the translator itself: the state of the machine cannot be trusted any more.
fn bug(what: &str, pc: u64) -> ! {
    eprintln!("berth: translator bug: {what} (host pc {pc:#x})");
    std::process::abort()
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(reports) = &self.lin.shared.config.reports {
            reports.add(self.report());
        }
        self.mailbox.set_run_word(0);
        signal::unregister(self.code.range());
    }
}
