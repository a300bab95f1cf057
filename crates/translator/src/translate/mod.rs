//! From guest instructions to a block of host code.
//!
//! A block is a run of guest instructions in one page (the last one may cross into the next) up to
//! a jump or return, or to something a helper must do with control flow; it goes on behind calls
//! and the first conditional branches. Most instructions are emitted as
//! they are with registers renamed; a memory operand becomes an address in a register, a look-up in
//! the software TLB that leaves the flags alone, and the same instruction on the host address:
//!
//! ```text
//!     lea   r10, [guest address]
//!     pext  rcx, r10, gs:[page mask]      page number
//!     mov   rcx, gs:[rcx*8]               host address - guest address
//!     op    ..., [r10 + rcx]
//! ```
//!
//! What cannot be reached this way faults: an unknown page, a store to a page that may not be
//! written, a crossing into a page that lies elsewhere (see [`crate::tlb`]). The signal handler goes
//! on in the block's cold part, which calls the slow path with the address in R10 and the number of
//! the access in RCX. Accesses through the same base register may share a look-up (see `share`).
//!
//! Guest flags are host flags throughout: nothing added here changes them. Nothing of the guest's
//! changes before the first access of an instruction, so that a signal there can go back to the
//! instruction's start.

pub(crate) mod access;
mod branch;
pub(crate) mod common;
pub(crate) mod decode;
pub mod gate;
pub(crate) mod regs;
mod share;
mod string;
mod system;

use std::sync::atomic::{AtomicU32, Ordering};

use iced_x86::{Encoder, Instruction, InstructionInfoFactory, OpAccess, Register};

use crate::Optimizations;
use crate::asm::{Asm, Mem, Near, Short};
use crate::code::{
    Block, BlockKey, CodeCache, Counts, Fix, Helped, Made, Notes, Place, Site, Slow,
};
use crate::exec::{Run, runner};
use crate::layout::{Area, ExitCode, S0, S1, SC, disp, jump_cache_entry};
use crate::thunks::{Thunks, through_jump_cache};

pub use access::{access_size, segment_of, sreg_index};
pub use branch::goes_on;
pub use decode::{Class, Unit, classify, unit};
pub use regs::GuestReg;

/// Bytes of the longest instruction.
pub const LONGEST: usize = 15;
/// Most guest instructions of a block.
pub const MAX_INSNS: usize = 48;
/// Most bytes of host code of a block: enough for [`MAX_INSNS`] of the longest translations.
pub const MAX_BLOCK_BYTES: usize = 32 << 10;

/// What a translation depends on besides the code bytes; packed into [`BlockKey::mode`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mode {
    /// 16, 32 or 64.
    pub bits: u8,
    /// CPL 3.
    pub user: bool,
    /// CS, DS, ES, SS start at 0 and reach to 4 GiB (always in 64-bit mode).
    pub flat: bool,
    /// x87 and MMX may be used (CR0.EM and TS clear).
    pub fpu: bool,
    /// SSE may be used.
    pub sse: bool,
    /// AVX may be used.
    pub avx: bool,
    /// One instruction per block, then back to the dispatcher.
    pub single: bool,
    /// Alignment is checked (CR0.AM, EFLAGS.AC, CPL 3): every access takes the slow path.
    pub aligned: bool,
    /// Accesses look whether they may cross into another page.
    pub checked: bool,
    /// CPL 0.
    pub ring0: bool,
    /// RDTSC is refused (CR4.TSD, CPL above 0).
    pub tsd: bool,
    /// RDFSBASE and its like are allowed (CR4.FSGSBASE).
    pub fsgsbase: bool,
    /// Real or virtual-8086 mode.
    pub real: bool,
}

impl Mode {
    /// Of a processor that was reset, before anything is known of its state.
    pub const RESET: Self = Self {
        flat: false,
        fpu: false,
        sse: false,
        avx: false,
        fsgsbase: false,
        real: true,
        ..Self::flat(16, false)
    };

    /// Flat segments, all units usable, nothing watched.
    pub const fn flat(bits: u8, user: bool) -> Self {
        Self {
            bits,
            user,
            flat: true,
            fpu: true,
            sse: true,
            avx: true,
            single: false,
            aligned: false,
            checked: false,
            ring0: !user,
            tsd: false,
            fsgsbase: true,
            real: false,
        }
    }

    /// The bits of a packed one.
    pub const fn bits_of(packed: u32) -> u8 {
        packed as u8
    }

    /// The packed form.
    #[must_use]
    pub fn pack(self) -> u32 {
        u32::from(self.bits)
            | u32::from(self.user) << 8
            | u32::from(self.flat) << 9
            | u32::from(self.fpu) << 10
            | u32::from(self.sse) << 11
            | u32::from(self.avx) << 12
            | u32::from(self.single) << 13
            | u32::from(self.aligned) << 14
            | u32::from(self.checked) << 15
            | u32::from(self.ring0) << 16
            | u32::from(self.tsd) << 17
            | u32::from(self.fsgsbase) << 18
            | u32::from(self.real) << 19
    }
}

/// Code at the end of the cold part of `cache` that goes on at `target` by way of the jump cache.
pub fn detour(t: &mut Translation, cache: &CodeCache, target: u64) -> Vec<u8> {
    let key = BlockKey { rip: target, gpa: 0, mode: 0 };
    let mode = Mode::flat(64, false);
    t.begin(cache, key, mode);
    t.at = cache.next_cold();
    t.cold_start = None;
    t.far(target, None);
    let made = t.finish();
    [made.code, made.cold].concat()
}

/// What is known of an instruction's accesses at the ends of pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Ends {
    /// They are seldom there.
    #[default]
    Seldom,
    /// They often lie in the page behind the one of a shared look-up, so they have their own.
    Apart,
    /// They often cross into another page, so they look whether they do.
    Cross,
}

/// An instruction of a block, with what is known of it.
#[derive(Clone, Copy, Debug)]
pub struct Ahead {
    /// The instruction.
    pub ins: Instruction,
    /// Its bytes, and others behind.
    pub bytes: [u8; LONGEST],
    /// How it is translated.
    pub class: Class,
    /// Where its accesses are.
    pub ends: Ends,
    /// How a common instruction accesses its first operand (see [`common`]).
    common: Option<OpAccess>,
    /// It is the same for the host.
    same: bool,
    /// The general registers that it writes, once that is known.
    written: Option<u16>,
    /// What it accesses, once that is known.
    access: Option<Option<share::Reached>>,
}

impl Ahead {
    /// An instruction that was decoded from the first of `bytes`; `allowed` says whether one is
    /// advertised.
    pub fn new(
        ins: Instruction,
        bytes: &[u8],
        mode: Mode,
        ends: Ends,
        optimizations: Optimizations,
        allowed: impl Fn(&Instruction) -> bool,
    ) -> Self {
        let mut own = [0; LONGEST];
        let len = bytes.len().min(LONGEST);
        own[..len].copy_from_slice(&bytes[..len]);
        let common = common::first_access(&ins);
        let class = match common {
            Some(_) => Class::Plain,
            None => match classify(&ins, mode, allowed(&ins)) {
                Class::System if !optimizations.contains(Optimizations::SYSTEM) => Class::Helper,
                Class::Plain
                    if ins.is_string_instruction()
                        && !optimizations.contains(Optimizations::STRINGS) =>
                {
                    Class::Helper
                }
                class => class,
            },
        };
        let same = common.is_some()
            && mode.bits == 64
            && optimizations.contains(Optimizations::SAME)
            && common::is_same(&ins);
        let written = common.map(|access| common::written(&ins, access));
        Self { ins, bytes: own, class, ends, common, same, written, access: None }
    }
}

/// Something emitted behind the block's body.
enum Cold {
    /// Slow path of an access that always, or often, takes it.
    Mem { site: usize },
    /// An access that may cross into another page: goes on if that page follows in the host, too.
    Look {
        site: usize,
        ea: u8,
        /// Offset of the last byte.
        last: i32,
        /// Where the body looks up the address.
        go_on: usize,
        /// The slow path, among the cold parts.
        mem: usize,
    },
    /// A helper after all; goes on at an offset in the body.
    Helper { number: u64, back: usize },
    /// Rare ways of a string instruction.
    String(Box<string::Rest>),
    /// Source and destination of a MOVS closer than a page.
    Overlap(string::Overlap),
    /// Back to the dispatcher.
    Interrupt { rip: u64 },
    /// Unlinked direct jump.
    Link { link: usize },
    /// Indirect jump, with its number, that missed the jump cache; the target is in [`S0`].
    Miss { branch: u32 },
    /// A jump to the address in [`S0`] by the jump cache.
    Jump { branch: u32 },
    /// Direct jump to another page, whose mapping may change: by the jump cache.
    Far { target: u64, branch: Option<u32> },
}

/// The translation of one block in the making.
pub struct Translation {
    asm: Asm,
    /// The body, while the cold parts are emitted.
    body: Asm,
    /// Host address of the first byte.
    at: u64,
    /// Offset of the cold parts, which lie elsewhere; `None`: right behind the body.
    cold_start: Option<usize>,
    thunks: Thunks,
    optimizations: Optimizations,
    encoder: Encoder,
    infos: InstructionInfoFactory,
    /// Mode of the block.
    mode: Mode,
    key: BlockKey,
    /// Physical address of the second page, when the last instruction crosses into one.
    pub second_page: Option<u64>,
    /// Numbers of the first of each kind of note.
    base: Counts,
    notes: Notes,
    /// Where the last guest instruction begins: host offset, offset from the block's RIP.
    begun: (usize, u16),
    /// Guest instructions so far.
    count: usize,
    /// What depends on where the block is, in the guest and in the cache: the offset behind it.
    fixups: Vec<(u32, Fix)>,
    /// All of it is in there.
    movable: bool,
    cold: Vec<Cold>,
    /// JRCXZs to cold parts, oldest first: (jump, cold number).
    pending: Vec<(Short, usize)>,
    /// Offset of the current guest instruction from the block's RIP.
    rip_off: u16,
    /// Alignment the current instruction demands of its operand.
    align: u8,
    /// The current instruction belongs to x87 or MMX.
    x87: bool,
    /// The current instruction belongs to MMX.
    mmx: bool,
    /// The current instruction is VCVTPH2PS or VCVTPS2PH.
    converts: bool,
    /// Instructions of the block.
    pub ahead: Vec<Ahead>,
    /// Number of the current one.
    index: usize,
    /// Addends kept for several accesses.
    windows: Vec<share::Window>,
    /// The window whose addend is in [`SC`].
    held: Option<usize>,
    /// Of the current instruction.
    pub ends: Ends,
    /// What the current branch took from RSP.
    rsp_taken: i32,
    /// Link jumps to be bound to their stubs: (jump, cold number).
    near: Vec<(Near, usize)>,
}

impl Translation {
    /// Makes an idle one; blocks are made one after the other with the same, which saves
    /// allocations.
    pub fn new(thunks: Thunks, optimizations: Optimizations) -> Self {
        Self {
            asm: Asm::default(),
            body: Asm::default(),
            at: 0,
            cold_start: None,
            thunks,
            optimizations,
            encoder: Encoder::new(64),
            infos: InstructionInfoFactory::new(),
            mode: Mode::flat(64, false),
            key: BlockKey { rip: 0, gpa: 0, mode: 0 },
            second_page: None,
            base: Counts::default(),
            notes: Notes::default(),
            begun: (0, 0),
            count: 0,
            fixups: Vec::new(),
            movable: false,
            cold: Vec::new(),
            pending: Vec::new(),
            rip_off: 0,
            align: 1,
            x87: false,
            mmx: false,
            converts: false,
            ends: Ends::Seldom,
            ahead: Vec::new(),
            index: 0,
            windows: Vec::new(),
            held: None,
            rsp_taken: 0,
            near: Vec::new(),
        }
    }

    /// Begins a block that will be put at the end of `cache`.
    pub fn begin(&mut self, cache: &CodeCache, key: BlockKey, mode: Mode) {
        self.asm.restart(0);
        self.at = cache.next_host();
        self.cold_start = Some((cache.next_cold() - cache.next_host()) as usize);
        self.mode = mode;
        self.base = cache.counts();
        self.key = key;
        self.second_page = None;
        self.notes.clear();
        self.begun = (0, 0);
        self.count = 0;
        self.fixups.clear();
        // Code at fixed addresses is never met elsewhere.
        self.movable = mode.user && mode.bits == 64 && !mode.single;
        self.cold.clear();
        self.pending.clear();
        self.near.clear();
        self.rsp_taken = 0;
        self.ahead.clear();
        self.index = 0;
        self.close_windows();
    }

    /// Translates the instructions in [`Translation::ahead`]; gives how many were, and whether the
    /// block ends with the last of them.
    pub fn all(&mut self) -> (usize, bool) {
        let mut ended = false;
        while !ended
            && self.len() < MAX_BLOCK_BYTES / 3
            && let Some(&Ahead { ins, class, ends, .. }) = self.ahead.get(self.index)
        {
            self.ends = ends;
            ended = self.instruction(&ins, class);
            self.index += 1;
        }
        (self.index, ended)
    }

    /// Translates one instruction; tells whether the block ends with it.
    pub fn instruction(&mut self, ins: &Instruction, class: Class) -> bool {
        self.rip_off = ins.ip().wrapping_sub(self.key.rip) as u16;
        self.reserve(0);
        let (host, guest) = std::mem::replace(&mut self.begun, (self.asm.pos(), self.rip_off));
        self.notes.begin_instruction(self.begun.0 - host, self.begun.1 - guest);
        self.count += 1;
        let jcc = ins.is_jcc_short_or_near();
        let windows_stay = matches!(class, Class::Nothing | Class::Plain);
        if !(windows_stay || class == Class::Branch) {
            self.close_windows();
        }
        match class {
            Class::Nothing => false,
            Class::Plain => {
                let ahead = self.ahead.get(self.index);
                match ahead.filter(|ahead| ahead.same) {
                    Some(ahead) => self.asm.bytes(&ahead.bytes[..ins.len().min(LONGEST)]),
                    None => self.plain(ins, ahead.and_then(|ahead| ahead.common)),
                }
                self.track(ins);
                false
            }
            Class::Branch => {
                let ended = self.branch(ins);
                if !jcc {
                    self.close_windows();
                }
                ended
            }
            Class::System => {
                self.system(ins);
                self.close_windows();
                false
            }
            Class::Gate => {
                self.gate(ins);
                true
            }
            Class::Helper => {
                self.helper(ins, runner(ins));
                false
            }
            Class::HelperEnds | Class::Refused => {
                let run = if class == Class::Refused { Run::Execute } else { runner(ins) };
                self.helper(ins, run);
                // Most of these never come back; VMCALL and WAIT do.
                self.exit_at(ins.next_ip(), ExitCode::Interrupt);
                true
            }
        }
    }

    /// Ends a block that was cut: goes on at `rip`.
    pub fn continue_at(&mut self, rip: u64) {
        self.jump_to(rip);
    }

    /// Host bytes so far.
    pub fn len(&self) -> usize {
        self.asm.pos()
    }

    /// Emits the cold parts; the block is complete then.
    pub fn finish(&mut self) -> Made<'_> {
        self.islands();
        let start = self.cold_start.unwrap_or(self.asm.pos());
        std::mem::swap(&mut self.body, &mut self.asm);
        self.asm.restart(start);
        let mut done = 0;
        while done < self.cold.len() {
            self.cold_part(done);
            done += 1;
        }
        for (list, kind) in [
            (&self.body.absolute, Fix::Absolute),
            (&self.asm.absolute, Fix::Absolute),
            (&self.body.across, Fix::Across),
            (&self.asm.across, Fix::Across),
        ] {
            self.fixups.extend(list.iter().map(|&at| (at, kind)));
        }
        // What is made to be executed once is never copied.
        if !self.mode.single {
            let body = self.body.buf.len() as u32;
            for (at, _) in &mut self.fixups {
                *at = if *at > start as u32 { *at - start as u32 + body } else { *at };
            }
            self.notes.fix_all(&mut self.fixups);
        }
        Made {
            key: self.key,
            second_page: self.second_page,
            target: true,
            // Those behind the block's end count too: look-ups are shared with regard to them.
            ends: {
                let count = |ends| self.ahead.iter().filter(|i| i.ends == ends).count() as u8;
                (count(Ends::Apart), count(Ends::Cross))
            },
            movable: self.movable,
            code: &self.body.buf,
            cold: &self.asm.buf,
            notes: &self.notes,
        }
    }

    /// Notes that what was emitted last ends with something that moves with the block.
    fn note(&mut self, kind: Fix) {
        self.fixups.push((self.asm.pos() as u32, kind));
    }

    /// Loads a guest address that follows from the block's, or with `not` its complement.
    fn load_address(&mut self, dst: u8, address: u64, not: bool) {
        let start = self.asm.pos();
        self.asm.mov_imm(dst, if not { !address } else { address });
        // Only the long form holds any address.
        self.movable &= self.asm.pos() - start == 10;
        self.note(if not { Fix::NotAddress } else { Fix::Address });
    }

    #[allow(clippy::too_many_lines, reason = "one match over the kinds")]
    fn cold_part(&mut self, n: usize) {
        let pos = self.asm.pos();
        for i in (0..self.near.len()).rev() {
            if self.near[i].1 == n {
                let (jump, _) = self.near.swap_remove(i);
                let asm = if self.body.holds(jump) { &mut self.body } else { &mut self.asm };
                asm.bind_near_to(jump, pos);
            }
        }
        match &self.cold[n] {
            Cold::Helper { number, back } => {
                let (number, back) = (*number, *back);
                self.call_helper(number);
                self.asm.jmp_to(back);
            }
            Cold::String(rest) => {
                let rest = **rest;
                self.string_rest(&rest);
            }
            Cold::Overlap(overlap) => {
                let overlap = *overlap;
                self.string_overlap(&overlap);
            }
            Cold::Interrupt { rip } => {
                let rip = *rip;
                self.exit_at(rip, ExitCode::Interrupt);
            }
            Cold::Link { link } => {
                let link = *link;
                self.notes.links[link].stub = self.asm.buf.len() as u16;
                let number = self.base.links + link as u32;
                self.asm.mov_imm(SC, u64::from(number));
                self.note(Fix::Link);
                self.asm.near_abs(0xe9, self.thunks.exit(ExitCode::Link), self.at);
            }
            Cold::Look { site, ea, last, go_on, mem } => {
                let (site, ea, last, go_on, mem) = (*site, *ea, *last, *go_on, *mem);
                let mask =
                    disp(std::mem::offset_of!(Area, page_mask) + usize::from(!self.mode.user) * 8);
                let saved = Mem::gs(disp(std::mem::offset_of!(Area, look_s1)));
                self.asm.store(&saved, S1);
                self.asm.pext_gs(S1, ea, mask);
                self.asm.load(S1, &Mem::gs_index8(S1, 0));
                self.asm.not(S1);
                self.asm.lea(SC, &Mem::base(ea, last));
                self.asm.pext_gs(SC, SC, mask);
                self.asm.load(SC, &Mem::gs_index8(SC, 0));
                self.asm.lea(SC, &Mem::base_index(SC, S1, 0, 1));
                self.asm.load(S1, &saved);
                let same = self.asm.jrcxz();
                // The look-ups may fault; the handler goes on here.
                let end = self.asm.pos();
                let other = self.asm.jmp();
                self.near.push((other, mem));
                let ok = self.asm.bind_short(same);
                debug_assert!(ok);
                self.asm.jmp_to(go_on);
                let fix = self.asm.pos();
                self.asm.load(S1, &saved);
                let other = self.asm.jmp();
                self.near.push((other, mem));
                self.slow(site).cross = [pos as u32, end as u32, fix as u32];
            }
            Cold::Jump { branch } => {
                let branch = *branch;
                through_jump_cache(&mut self.asm);
                self.miss(branch);
            }
            Cold::Miss { branch } => {
                let branch = *branch;
                self.miss(branch);
            }
            Cold::Far { target, branch } => {
                let (target, branch) = (*target, *branch);
                self.far(target, branch);
            }
            Cold::Mem { site } => {
                let site = *site;
                self.slow_path(site);
            }
        }
    }

    /// The slow path of an access.
    fn slow_path(&mut self, site: usize) {
        match self.notes.sites[site].place {
            Place::Register { ea, start, len } => {
                let cold = self.asm.pos();
                self.repeat(start, start + u16::from(len));
                if ea != S0 {
                    self.asm.mov(S0, ea);
                }
                self.slow(site).cold = cold as u32;
                self.call_slow(site);
                let s = self.notes.sites[site];
                self.asm.jmp_to(usize::from(s.op));
                if s.writes() {
                    self.repeat(s.op, s.op_end);
                    self.call_commit(site);
                    self.asm.jmp_to(usize::from(s.op_end));
                }
                self.slow(site).cold_end = self.asm.pos() as u32;
            }
            Place::Shared { through, d } => self.cold_shared(site, through, d),
        }
    }

    /// What is noted of the slow path of an access.
    pub(super) fn slow(&mut self, site: usize) -> &mut Slow {
        self.notes.slow.entry(site as u32).or_default()
    }

    /// Emits the code of the body between two offsets once more.
    pub(super) fn repeat(&mut self, start: u16, end: u16) {
        let by = (self.asm.pos() as u32).wrapping_sub(u32::from(start));
        self.asm.bytes(&self.body.buf[usize::from(start)..usize::from(end)]);
        let within = u32::from(start) + 1..=u32::from(end);
        for n in 0..self.fixups.len() {
            let (at, kind) = self.fixups[n];
            if within.contains(&at) {
                self.fixups.push((at.wrapping_add(by), kind));
            }
        }
    }

    /// Makes the slow path of access `number`, `site`, of a block whose code is `body`; it will be at
    /// the end of the cold part of `cache`.
    pub fn stub(
        &mut self,
        cache: &CodeCache,
        (block, body): (&Block, &[u8]),
        number: u64,
        site: Site,
    ) -> (&[u8], Slow) {
        self.at = cache.host(block);
        self.body.restart(0);
        self.body.bytes(body);
        self.asm.restart(cache.next_cold().wrapping_sub(self.at) as usize);
        self.notes.clear();
        self.notes.sites.push(site);
        // It is never copied.
        self.fixups.clear();
        self.base.sites = number as u32;
        self.slow_path(0);
        let slow = *self.slow(0);
        (&self.asm.buf, slow)
    }

    /// Calls the slow path of an access whose address is in [`S0`].
    fn call_slow(&mut self, site: usize) {
        self.asm.mov_imm(SC, u64::from(self.base.sites) + site as u64);
        self.note(Fix::Site);
        self.asm.near_abs(0xe8, self.thunks.mem, self.at);
        self.slow(site).ret = self.asm.pos() as u32;
    }

    /// Calls what writes a store from the bounce buffer.
    fn call_commit(&mut self, site: usize) {
        self.asm.near_abs(0xe8, self.thunks.commit, self.at);
        self.slow(site).commit_ret = self.asm.pos() as u32;
    }

    /// Leaves because the target in [`S0`] of branch number `branch` is not in the jump cache.
    fn miss(&mut self, branch: u32) {
        self.asm.mov_imm(SC, u64::from(branch));
        self.note(Fix::Branch);
        self.asm.near_abs(0xe9, self.thunks.exit(ExitCode::Indirect), self.at);
    }

    /// A direct jump by the jump cache; with a number, if it faults at its target.
    fn far(&mut self, target: u64, branch: Option<u32>) {
        self.load_address(S0, target, false);
        let (tag, to) = jump_cache_entry(target);
        self.asm.load(SC, &Mem::gs(tag));
        self.note(Fix::Entry);
        self.asm.lea(SC, &Mem::base_index(SC, S0, 0, 0));
        let hit = self.asm.jrcxz();
        match branch {
            Some(branch) => self.miss(branch),
            None => self.asm.near_abs(0xe9, self.thunks.miss, self.at),
        }
        let ok = self.asm.bind_short(hit);
        debug_assert!(ok);
        self.asm.jmp_mem(&Mem::gs(to));
        self.note(Fix::Entry);
    }

    /// Sets RIP and leaves.
    fn exit_at(&mut self, rip: u64, code: ExitCode) {
        self.load_address(S0, rip, false);
        self.asm.store(&Mem::gs(disp(std::mem::offset_of!(Area, exit_rip))), S0);
        self.asm.near_abs(0xe9, self.thunks.exit(code), self.at);
    }

    /// Calls the helper that executes `ins` on the state.
    fn helper(&mut self, ins: &Instruction, run: Run) {
        // Its sum is cut to 32 bits.
        self.movable &= ins.memory_base() != Register::EIP;
        let number = self.next_helper();
        self.call_helper(number);
        self.notes.helpers.push(Helped { ins: *ins, run });
    }

    /// Number of the next instruction for a helper.
    fn next_helper(&self) -> u64 {
        u64::from(self.base.helpers) + self.notes.helpers.len() as u64
    }

    fn call_helper(&mut self, number: u64) {
        self.asm.mov_imm(SC, number);
        self.note(Fix::Helper);
        self.asm.near_abs(0xe8, self.thunks.helper, self.at);
    }

    /// Makes sure that pending JRCXZs still reach their islands after `bytes` more bytes.
    fn reserve(&mut self, bytes: usize) {
        /// Bytes emitted at most between two calls (beyond those announced).
        const STEP: usize = 48;
        let Some(&(oldest, _)) = self.pending.first() else { return };
        if self.asm.distance(oldest) + bytes + STEP + 5 > 127 {
            let over = self.asm.jmp();
            self.islands();
            self.asm.bind_near(over);
        }
    }

    fn islands(&mut self) {
        for (short, cold) in std::mem::take(&mut self.pending) {
            let ok = self.asm.bind_short(short);
            assert!(ok, "reserve() keeps islands in reach");
            let jump = self.asm.jmp();
            self.near.push((jump, cold));
        }
    }

    /// Encodes an instruction that has only host registers left.
    fn encode(&mut self, ins: &Instruction) {
        let start = self.asm.pos();
        self.encoder.set_buffer(std::mem::take(&mut self.asm.buf));
        let result = self.encoder.encode(ins, 0);
        self.asm.buf = self.encoder.take_buffer();
        if let Err(e) = result {
            // UD2, here and in a copy for the bounce buffer: the guest sees #UD.
            self.asm.buf.truncate(start);
            self.asm.bytes(&[0x0f, 0x0b]);
            let rip = self.key.rip.wrapping_add(u64::from(self.rip_off));
            report_unencodable(ins, rip, &e.to_string());
        }
    }

    fn site(&mut self, site: Site) -> usize {
        self.notes.sites.push(site);
        self.notes.sites.len() - 1
    }
}

/// Says, a few times per process, that an instruction was let through that cannot be emitted.
fn report_unencodable(ins: &Instruction, rip: u64, why: &str) {
    /// Messages at most.
    const LIMIT: u32 = 8;
    static SAID: AtomicU32 = AtomicU32::new(0);
    if SAID.fetch_add(1, Ordering::Relaxed) < LIMIT {
        eprintln!(
            "berth: the translator cannot emit `{ins}` at {rip:#x}: {why}; the guest gets #UD"
        );
    }
}

#[cfg(test)]
mod golden;
