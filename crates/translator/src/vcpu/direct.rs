//! User code left to the processor: on the way there and back.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use berth_x86::paging::{self, Walk};
use berth_x86::state::{CodeSize, cr0, cr4, efer, flags, reg, sreg};
use berth_x86::{Exception, OpSize, far};

use super::{AreaPtr, Inner};
use crate::direct::MAX_FAILURES;
use crate::direct::copy::Copies;
use crate::direct::space::{Mapped, Space};
use crate::direct::stub::{END, Regs, Stopped};
use crate::ram::PAGE;
use crate::translate::LONGEST;
use crate::{Optimizations, fpu, signal};

/// Flags that user code may change, as far as it matters here.
const OF_USER: u64 = flags::ARITH | flags::DF | flags::TF | flags::NT | flags::AC | flags::ID;
/// Time in user code after which it may be executed on any processor.
const LONG: Duration = Duration::from_micros(500);

/// What is to be done after user code stopped.
enum Next {
    /// The dispatcher looks what there is to do.
    Dispatch,
    /// The translator executes one instruction, then it may go on.
    Once,
    /// The translator goes on until the next return to user code.
    Leave,
}

impl Inner {
    /// An interrupt is delivered.
    pub(super) fn sampled(&mut self) {
        if self.direct.not_before.is_some_and(|then| Instant::now() < then) {
            return;
        }
        if self.area.state.cpl() == 3 && self.direct_possible() {
            let entries = self.area.syscalls + self.stats.events;
            let translated = self.stats.guest_instructions;
            let since = self.direct.sample.since(Instant::now(), entries, translated);
            self.policy().sampled(since);
        }
    }

    /// User code of this address space is left to the processor.
    pub(super) fn direct_wanted(&mut self) -> bool {
        self.direct_usable() && (self.lin.shared.config.always_direct || self.policy().active())
    }

    fn direct_usable(&self) -> bool {
        self.optimizations.contains(Optimizations::DIRECT) && self.direct.failures < MAX_FAILURES
    }

    fn policy(&mut self) -> &mut crate::direct::policy::Policy {
        let (slot, space) = (usize::from(self.tlb.current()), self.tlb.space());
        self.direct.policies[slot].of(space)
    }

    /// Whether the processor would do the same as the guest's in the present state of the guest.
    fn direct_possible(&self) -> bool {
        const CR0: u64 = cr0::PE | cr0::PG | cr0::WP;
        const CR4: u64 = cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE;
        const EFER: u64 = efer::LMA | efer::NXE | efer::SCE;
        let s = &self.area.state;
        let must_not = flags::TF | flags::IOPL | flags::VM | flags::VIF | flags::VIP | flags::AC;
        self.direct_usable()
            && self.stop_after == 0
            && s.cpl() == 3
            && s.code_size() == CodeSize::Bits64
            && s.rflags & must_not == 0
            && s.rflags & flags::IF != 0
            && s.interrupt_shadow == 0
            && s.cr0 & CR0 == CR0
            && s.cr0 & (cr0::EM | cr0::TS) == 0
            && s.cr4 & CR4 == CR4
            && s.cr4 & cr4::TSD == 0
            && s.efer & EFER == EFER
            && s.xcr0 == 7
            && s.dr7 & 0xff == 0
            && s.tsc_offset == 0
            // The system takes no others.
            && [sreg::FS, sreg::GS].iter().all(|&i| s.seg[i].base < END)
            && [sreg::DS, sreg::ES, sreg::FS, sreg::GS].iter().all(|&i| s.seg[i].selector == 0)
    }

    /// Leaves user code to the processor, if that is possible; tells whether it did so and the
    /// dispatcher has to look again.
    pub(super) fn go_direct(&mut self) -> bool {
        if !self.direct_possible() {
            self.direct.armed = false;
            if self.area.state.cpl() == 3 {
                self.policy().give_up();
            }
            return false;
        }
        let slot = usize::from(self.tlb.current());
        let began = Instant::now();
        let mut inside = (Duration::ZERO, 0);
        // Not in its place as long as it is used.
        let space = self.space(slot);
        let Some(mut space) = space else {
            self.direct.armed = false;
            return false;
        };
        let edge = space.stub.edge;
        let next = self.user_code(&mut space, slot, &mut inside);
        self.stats.direct += inside.0;
        self.stats.direct_runs += u64::from(inside.1);
        let next = match next {
            Ok(next) => {
                self.direct.spaces[slot] = Some(space);
                next
            }
            Err(error) => {
                // With the process goes what it had mapped; there may be another one later.
                self.direct_failed(1, &error);
                fpu::load(&mut self.area);
                Next::Leave
            }
        };
        let all = began.elapsed();
        self.stats.direct_all += all;
        self.policy().spent(all, inside.0.saturating_sub(edge * inside.1));
        self.tlb.returns_stale = true;
        self.area.sysret.closed = 1;
        match next {
            Next::Dispatch => true,
            Next::Once => {
                self.once = true;
                false
            }
            Next::Leave => {
                self.direct.armed = false;
                false
            }
        }
    }

    /// The process of a slot, taken from its place.
    fn space(&mut self, slot: usize) -> Option<Box<Space>> {
        let thread = signal::this_thread();
        if self.direct.thread != thread {
            // Processes belong to the thread that made them.
            self.direct.spaces.iter_mut().for_each(|s| *s = None);
            self.direct.floating = None;
            self.direct.thread = thread;
        }
        if let Some(space) = self.direct.spaces.get_mut(slot)?.take() {
            return Some(space);
        }
        match self.new_space() {
            Ok(space) => {
                self.tlb.watch(slot);
                self.direct.floating = None;
                self.direct.cpuid_traps = space.stub.cpuid_traps;
                self.direct.pieces =
                    space.stub.execute_only && self.optimizations.contains(Optimizations::PIECES);
                Some(Box::new(space))
            }
            Err(error) => {
                self.direct_failed(MAX_FAILURES, &error);
                None
            }
        }
    }

    /// Ends all processes: they may have RAM mapped where it is not any more.
    pub(super) fn end_spaces(&mut self) {
        self.direct.spaces.iter_mut().for_each(|space| *space = None);
        self.direct.floating = None;
    }

    fn new_space(&mut self) -> std::io::Result<Space> {
        let mut files = self.lin.shared.ram.files();
        if self.direct.copies.is_none() {
            self.direct.copies = Some(Copies::new()?);
        }
        files.extend(self.direct.copies.as_ref().map(Copies::fd));
        Space::new(&files)
    }

    fn direct_failed(&mut self, failures: u32, error: &std::io::Error) {
        self.direct.failures += failures;
        self.direct.floating = None;
        if self.timing {
            eprintln!("berth: direct execution failed: {error}");
        }
    }

    /// Makes the process ready to go on where the guest is; `None` if the guest has something where the
    /// process has pages of ours, or other selectors.
    fn hand_over(&mut self, space: &mut Space, slot: usize) -> std::io::Result<Option<Regs>> {
        fpu::save(&mut self.area);
        let (s, initial) = (&self.area.state, space.stub.initial());
        if u64::from(s.seg[sreg::CS].selector) != initial.cs
            || u64::from(s.seg[sreg::SS].selector) != initial.ss
        {
            return Ok(None);
        }
        for page in [space.stub.base(), space.stub.base() + PAGE] {
            if paging::peek(&self.lin.shared.ram, &self.area.state, page).is_some() {
                // The guest has something there, too.
                return Ok(None);
            }
        }
        space.drop_pages(self.tlb.dropped(slot))?;
        if self.policy().begins() {
            self.map_known(space, slot)?;
        }
        self.hand_over_vectors(space, slot)?;
        if self.area.state.rip == self.page_fault.0 {
            // The guest has just seen to it.
            self.page_fault.0 = !0;
            let address = self.page_fault.1;
            let mapped = space.get(address & !(PAGE - 1)).is_some();
            self.map_for(space, slot, address, mapped, false)?;
        }
        space.stub.set_stubborn(self.area.state.rflags)?;
        let regs = self.registers(space);
        space.stub.set_registers(&regs)?;
        Ok(Some(regs))
    }

    /// Executes user code until there is something that it cannot do. After an error the state is as
    /// user code left it, and the process is of no use.
    fn user_code(
        &mut self,
        space: &mut Space,
        slot: usize,
        inside: &mut (Duration, u32),
    ) -> std::io::Result<Next> {
        let Some(mut regs) = self.hand_over(space, slot)? else {
            fpu::load(&mut self.area);
            return Ok(Next::Leave);
        };
        let mut last = (0, 0);
        let mut failure = None;
        let next = loop {
            signal::tell_instead(space.stub.pid());
            std::sync::atomic::fence(Ordering::SeqCst);
            if self.area.run() == 0 {
                signal::tell_instead(0);
                break Next::Dispatch;
            }
            let began = Instant::now();
            let stopped = space.stub.run();
            let time = began.elapsed();
            space.stub.stay_near(time < LONG);
            inside.0 += time;
            inside.1 += 1;
            signal::tell_instead(0);
            let after = stopped.and_then(|stopped| Ok((stopped, space.stub.registers()?)));
            let stopped = match after {
                Ok((stopped, after)) => {
                    regs = after;
                    // Faults set it, and it would hold off the next breakpoint.
                    regs.eflags &= !flags::RF;
                    stopped
                }
                Err(error) => lost(&error),
            };
            match self.after(space, slot, stopped, &mut regs, &mut last) {
                Ok(None) => {}
                Ok(Some(next)) => break next,
                Err(error) => {
                    failure = Some(error);
                    break Next::Leave;
                }
            }
        };
        if let Err(error) = self.take_back(space, slot, &regs) {
            lost(&error)
        }
        failure.map_or(Ok(next), Err)
    }

    /// What is to be done after user code stopped with these registers, if it does not go on at once.
    ///
    /// # Errors
    /// The process is of no use any more.
    fn after(
        &mut self,
        space: &mut Space,
        slot: usize,
        stopped: Stopped,
        regs: &mut Regs,
        last: &mut (u64, u64),
    ) -> std::io::Result<Option<Next>> {
        Ok(Some(match stopped {
            Stopped::Told if self.area.run() == 0 || self.mailbox.any() => Next::Dispatch,
            Stopped::Told => return Ok(None),
            Stopped::Syscall => {
                self.stats.direct_calls += 1;
                // The number is there; RAX has an error for tracers that do nothing.
                regs.rax = regs.orig_rax;
                regs.rip = regs.rip.wrapping_sub(2);
                Next::Leave
            }
            // Such bases cannot be set again.
            Stopped::Access { .. } | Stopped::Other
                if regs.fs_base >= END || regs.gs_base >= END =>
            {
                Next::Leave
            }
            Stopped::Vsyscall { at } => {
                // RAX is lost; it gets the result.
                regs.rip = at;
                regs.rsp = regs.rsp.wrapping_sub(8);
                Next::Leave
            }
            Stopped::Access { address, mapped } => {
                return self.refused(space, slot, regs, (address, mapped), last);
            }
            Stopped::Step => {
                self.raise(Exception::db(1 << 14));
                Next::Dispatch
            }
            Stopped::Trap => {
                let before = regs.rip.wrapping_sub(1);
                let two = [before.wrapping_sub(1), before].map(|at| self.user_byte(at));
                let long = two == [Some(0xcd), Some(3)];
                regs.rip = if long { before.wrapping_sub(1) } else { before };
                Next::Once
            }
            Stopped::Other if self.reach(space, slot, regs)? => return Ok(None),
            Stopped::Other => Next::Once,
        }))
    }

    /// An access was refused: what is to be done, if user code does not go on at once.
    ///
    /// # Errors
    /// The process is of no use any more.
    fn refused(
        &mut self,
        space: &mut Space,
        slot: usize,
        regs: &Regs,
        (address, mapped): (u64, bool),
        last: &mut (u64, u64),
    ) -> std::io::Result<Option<Next>> {
        self.stats.direct_faults += 1;
        let copy = space.get(address & !(PAGE - 1)).is_some_and(Mapped::is_copy);
        let fetch = address.wrapping_sub(regs.rip) < LONGEST as u64 && !copy;
        let again = *last == (regs.rip, address);
        *last = (regs.rip, address);
        if again || !self.map_for(space, slot, address, mapped, fetch)? {
            return Ok(Some(if fetch { Next::Leave } else { Next::Once }));
        }
        if !(fetch && self.reach(space, slot, regs)?) {
            space.stub.set_registers(regs)?;
        }
        Ok(None)
    }

    /// A byte of user memory.
    fn user_byte(&self, va: u64) -> Option<u8> {
        let gpa = self.ram_at(va)?.gpa;
        let mut byte = [0];
        self.lin.shared.ram.read(gpa, &mut byte);
        Some(byte[0])
    }

    /// What the guest has at an address, if it is RAM.
    pub(super) fn ram_at(&self, va: u64) -> Option<Walk> {
        let w = paging::peek(&self.lin.shared.ram, &self.area.state, va)?;
        self.lin.shared.ram.contains(w.gpa & !(PAGE - 1), PAGE).then_some(w)
    }

    /// x87, SSE and AVX state for the process, which has been saved.
    fn hand_over_vectors(&mut self, space: &mut Space, slot: usize) -> std::io::Result<()> {
        let now = &self.area.state.xsave;
        if self.direct.floating.as_ref().is_some_and(|(of, f)| *of == slot && **f == *now) {
            return Ok(());
        }
        self.direct.floating = Some((slot, Box::new(now.clone())));
        space.stub.set_xsave(&now.0)
    }

    /// General registers for the process.
    fn registers(&self, space: &Space) -> Regs {
        let s = &self.area.state;
        let g = |i: usize| s.gpr[i];
        Regs {
            rax: g(reg::RAX),
            rcx: g(reg::RCX),
            rdx: g(reg::RDX),
            rbx: g(reg::RBX),
            rsp: g(reg::RSP),
            rbp: g(reg::RBP),
            rsi: g(reg::RSI),
            rdi: g(reg::RDI),
            r8: g(8),
            r9: g(9),
            r10: g(10),
            r11: g(11),
            r12: g(12),
            r13: g(13),
            r14: g(14),
            r15: g(15),
            rip: s.rip,
            eflags: s.rflags & OF_USER | flags::FIXED | flags::IF,
            fs_base: s.seg[sreg::FS].base,
            gs_base: s.seg[sreg::GS].base,
            orig_rax: u64::MAX,
            ..*space.stub.initial()
        }
    }

    /// Takes the state from the process.
    fn take_back(&mut self, space: &mut Space, slot: usize, regs: &Regs) -> std::io::Result<()> {
        let r = regs;
        let initial = *space.stub.initial();
        let s = &mut self.area.state;
        s.gpr = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ];
        s.rip = r.rip;
        s.rflags = s.rflags & !(OF_USER | flags::RF) | r.eflags & OF_USER;
        s.seg[sreg::FS].base = r.fs_base;
        s.seg[sreg::GS].base = r.gs_base;
        let unchanged = space.stub.xsave(&mut s.xsave.0)?;
        fpu::load(&mut self.area);
        // As it comes out when it is saved next.
        fpu::save(&mut self.area);
        let now = || (slot, Box::new(self.area.state.xsave.clone()));
        self.direct.floating = unchanged.then(now);
        fpu::load(&mut self.area);
        self.take_selectors(r, &initial);
        Ok(())
    }

    /// Loads what user code has loaded into segment registers, where the host has the same descriptors
    /// as Linux in the guest. What the guest does not have is left as it was.
    fn take_selectors(&mut self, r: &Regs, initial: &Regs) {
        let (state, lin) = (&mut self.area.state, &mut self.lin);
        if r.cs != initial.cs {
            let _ = far::far_jump(state, lin, r.cs as u16, r.rip, OpSize::Bits64);
        }
        let others = [
            (sreg::SS, r.ss, initial.ss),
            (sreg::DS, r.ds, initial.ds),
            (sreg::ES, r.es, initial.es),
            (sreg::FS, r.fs, initial.fs),
            (sreg::GS, r.gs, initial.gs),
        ];
        for (register, now, before) in others {
            if now != before {
                let base = state.seg[register].base;
                let loaded = far::load_segment(state, lin, register, now as u16).is_ok();
                // A base that was loaded afterwards by WRFSBASE or WRGSBASE.
                if loaded && matches!(register, sreg::FS | sreg::GS) {
                    state.seg[register].base = base;
                }
            }
        }
    }
}

/// The process was killed, and with it the state of user code.
fn lost(error: &std::io::Error) -> ! {
    eprintln!("berth: the process that executed the guest's user code was lost: {error}");
    std::process::abort()
}

impl AreaPtr {
    /// [`crate::layout::Area::run`] as others may have changed it.
    pub(super) fn run(&self) -> u64 {
        // SAFETY: an aligned word of the area, which is mapped as long as the vCPU lives; others
        // swap it atomically.
        unsafe { std::ptr::addr_of!((*self.0).run).read_volatile() }
    }
}
