//! Look-ups shared by accesses with the same base register and index.
//!
//! An entry of the TLB vouches for the page behind its own (see [`crate::tlb`]). So an addend found
//! for the lowest of several addresses `base + index * scale + displacement` serves all of them that
//! lie less than a page above, as long as the registers keep their values or change by known amounts. When an access
//! has no such *window* yet, the instructions that follow in the block are searched for more accesses
//! with the same base; if there are any, one look-up is made at the lowest address, and its addend kept in
//! the area (and in [`SC`] while nothing else needs that).
//!
//! The slow path of a shared access looks the window's addend up anew: it may have entered the page, and
//! the look-up itself may have been what faulted.
//!
//! A wrong guess costs time only: an access whose page is another one than the window's, and does not
//! follow it in the host, faults and takes the slow path. Instructions that do so often look up
//! for themselves from then on.

use iced_x86::{Instruction, InstructionInfoOptions, Mnemonic, OpAccess, OpKind, Register};

use super::access::{Access, Want, access_size, segment_of};
use super::decode::Class;
use super::regs::GuestReg;
use super::{Ahead, Ends, Translation};
use crate::Optimizations;
use crate::asm::Mem;
use crate::code::{Place, Through};
use crate::layout::{Area, GUEST_RSP, MAX_ACCESS_SHIFT, S0, S1, SC, WINDOWS, disp, mapped};

/// Number of RSP.
const RSP: u8 = 4;
/// Number of RBP.
const RBP: u8 = 5;
/// Bytes above the looked-up address that a window covers.
const REACH: i64 = 4096;
/// Displacements up to here are looked up by their base register's value.
const NEAR: i64 = 127;
/// The place of addends that are used once.
const ALONE: usize = WINDOWS - 1;
/// Instructions searched for further accesses.
const AHEAD: usize = 24;

/// An addend that is kept.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    /// No registers: nothing is known of them any more.
    through: Option<Through>,
    /// What to add to the registers' present values to get the address that was looked up.
    start: i64,
    /// Number of its place in the area.
    slot: usize,
}

/// An access that a window can serve.
#[derive(Clone, Copy, Debug)]
pub struct Reached {
    through: Through,
    /// Displacement.
    d: i64,
    /// Bytes.
    size: i64,
}

/// What an instruction does to a register.
enum Effect {
    Nothing,
    Adds(i64),
    Unknown,
}

/// GS-relative operand of a window's addend.
fn kept(slot: usize) -> Mem {
    Mem::gs(disp(std::mem::offset_of!(Area, windows) + slot * 8))
}

impl Translation {
    /// Forgets all windows.
    pub(super) fn close_windows(&mut self) {
        self.windows.clear();
        self.held = None;
    }

    /// The registers and displacement of a memory operand that a window can serve.
    fn plain_operand(&self, ins: &Instruction) -> Option<(Through, i64)> {
        let whole = |r: Register| GuestReg::of(r).filter(|g| g.size == 8).map(|g| g.n);
        let base = whole(ins.memory_base())?;
        if segment_of(ins, 64) >= 4 {
            return None;
        }
        let through = match ins.memory_index() {
            Register::None => Through::base(base),
            index => Through::indexed(
                base,
                whole(index)?,
                ins.memory_index_scale().trailing_zeros() as u8,
            ),
        };
        Some((through, ins.memory_displacement64() as i64))
    }

    /// A shared look-up for the memory operand of an instruction, if there is or can be one.
    pub(super) fn shared_operand(&mut self, ins: &Instruction, want: Want) -> Option<Access> {
        if self.mode.bits != 64 {
            return None;
        }
        let (through, d) = self.plain_operand(ins)?;
        self.shared(through, d, want, segment_of(ins, 64))
    }

    /// A shared look-up for the access at the sum of the registers and `d`.
    pub(super) fn shared(
        &mut self,
        through: Through,
        d: i64,
        want: Want,
        seg: u8,
    ) -> Option<Access> {
        let m = self.mode;
        let wanted = self.optimizations.contains(Optimizations::SHARED);
        let ends = self.ends != Ends::Seldom;
        if m.bits != 64 || m.single || m.aligned || m.checked || ends || !wanted {
            return None;
        }
        let disp32 = i32::try_from(d).ok()?;
        if want.size > 1 << MAX_ACCESS_SHIFT {
            return None;
        }
        let covers = |w: &Window| {
            w.through == Some(through) && d >= w.start && d + want.size as i64 - w.start <= REACH
        };
        let known = self.windows.iter().copied().find(covers);
        let window = match known {
            Some(w) => w,
            None => {
                let slot = self.windows.len();
                // A base register itself is looked up without computing anything.
                let by_base = |d| through.index().is_none() && (0..=NEAR).contains(&d);
                match self.lowest(through, d, want.size as i64) {
                    Some(low) if slot < ALONE => {
                        let near = by_base(low) && d + want.size as i64 <= REACH;
                        let start = if near { 0 } else { low };
                        i32::try_from(start).ok()?;
                        Window { through: Some(through), start, slot }
                    }
                    None if d != 0 && by_base(d) && mapped(through.base).is_some() => {
                        Window { through: None, start: 0, slot: ALONE }
                    }
                    _ => return None,
                }
            }
        };
        // Further up, nothing is vouched for.
        let above = u16::try_from(d - window.start).ok()?;
        if i64::from(above) + want.size as i64 > REACH {
            return None;
        }
        self.reserve(72);
        let look = self.asm.pos() as u16;
        // Where the address is that the instruction adds `left` to.
        let (reg, left) = match (through.index(), mapped(through.base)) {
            (None, Some(base)) => (base, disp32),
            (None, None) => {
                self.load_guest(S0, through.base);
                (S0, disp32)
            }
            (Some(_), _) => {
                self.sum(through, disp32);
                (S0, 0)
            }
        };
        if known.is_none() {
            let below = window.start - d + i64::from(left);
            let at = if below == 0 {
                reg
            } else {
                self.asm.lea(S1, &Mem::base(reg, below as i32));
                S1
            };
            let mask = std::mem::offset_of!(Area, page_mask) + usize::from(!m.user) * 8;
            self.asm.pext_gs(SC, at, disp(mask));
            self.asm.load(SC, &Mem::gs_index8(SC, 0));
            if window.slot != ALONE {
                self.asm.store(&kept(window.slot), SC);
                self.windows.push(window);
            }
        } else if self.held != Some(window.slot) {
            self.asm.load(SC, &kept(window.slot));
        }
        self.held = (window.slot != ALONE).then_some(window.slot);
        let op = self.asm.pos() as u16;
        let place = Place::Shared { through, d: disp32 };
        let mut site = self.site_of(want, seg, place);
        (site.look, site.op) = (look, op);
        site.share(window.slot, above);
        let site = self.site(site);
        Some(Access { site, ea: reg, disp: left })
    }

    /// Puts the sum of registers and a displacement into [`S0`]; may use [`S1`].
    fn sum(&mut self, through: Through, d: i32) {
        let base = self.guest_or_scratch(through.base, S0);
        let from = match through.index() {
            None => Mem::base(base, d),
            Some((index, shift)) => {
                let index = self.guest_or_scratch(index, if base == S0 { S1 } else { S0 });
                Mem::base_index(base, index, shift, d)
            }
        };
        self.asm.lea(S0, &from);
    }

    /// The slow path of a shared access: the instruction is executed out of line, and the window's
    /// addend loaded again.
    pub(super) fn cold_shared(&mut self, site: usize, through: Through, d: i32) {
        let slot = self.notes.sites[site].window().unwrap_or(0);
        self.slow(site).cold = self.asm.pos() as u32;
        self.sum(through, d);
        self.call_slow(site);
        let direct = self.asm.jmp();
        let s = self.notes.sites[site];
        // As the body has it.
        let address = |t: &mut Self| match (through.index(), mapped(through.base)) {
            (Some(_), _) => t.sum(through, d),
            (None, None) => t.load_guest(S0, through.base),
            (None, Some(_)) => {}
        };
        if s.writes() {
            address(self);
            self.repeat(s.op, s.op_end);
            self.call_commit(site);
            self.asm.load(SC, &kept(slot));
            self.asm.jmp_to(usize::from(s.op_end));
        }
        self.asm.bind_near(direct);
        self.slow(site).direct = self.asm.pos() as u32;
        address(self);
        self.repeat(s.op, s.op_end);
        self.asm.load(SC, &kept(slot));
        self.asm.jmp_to(usize::from(s.op_end));
        self.slow(site).cold_end = self.asm.pos() as u32;
    }

    /// The lowest displacement of the accesses from the current instruction on that one window can
    /// serve, in terms of the registers' present values; `None` when there is only the current one.
    fn lowest(&mut self, through: Through, d: i64, size: i64) -> Option<i64> {
        // Behind a call, a return or a system instruction nothing is left of a window.
        let Ahead { ins, class, .. } = self.ahead.get(self.index)?;
        if !matches!(class, Class::Nothing | Class::Plain) && !ins.is_jcc_short_or_near() {
            return None;
        }
        let (mut low, mut high, mut more) = (d, d + size, false);
        let mut added = 0i64;
        for n in self.index..self.index + AHEAD {
            let Some(&Ahead { ref ins, class, ends, .. }) = self.ahead.get(n) else { break };
            if n > self.index {
                let goes_on = match class {
                    Class::Nothing => true,
                    Class::Plain => !ins.is_string_instruction(),
                    Class::Branch => ins.is_jcc_short_or_near() || stack_access(ins).is_some(),
                    _ => false,
                };
                if !goes_on {
                    break;
                }
                let jumps = class == Class::Branch && !ins.is_jcc_short_or_near();
                if ends == Ends::Seldom
                    && let Some(other) = self.access_of(n)
                    && other.through == through
                {
                    let at = other.d + added;
                    let (l, h) = (low.min(at), high.max(at + other.size));
                    if h - l > REACH {
                        break;
                    }
                    (low, high, more) = (l, h, true);
                }
                if jumps {
                    break;
                }
            }
            let written = self.writes(n);
            let Some(Ahead { ins, .. }) = self.ahead.get(n) else { break };
            match effect_on(ins, written, through) {
                Effect::Nothing => {}
                Effect::Adds(by) => added += by,
                Effect::Unknown => break,
            }
        }
        more.then_some(low)
    }

    /// What instruction `n` of the block accesses, if a window can serve that.
    fn access_of(&mut self, n: usize) -> Option<Reached> {
        let ahead = self.ahead.get(n)?;
        if let Some(known) = ahead.access {
            return known;
        }
        let access = self.find_access(&ahead.ins);
        if let Some(ahead) = self.ahead.get_mut(n) {
            ahead.access = Some(access);
        }
        access
    }

    fn find_access(&self, ins: &Instruction) -> Option<Reached> {
        if let Some((n, d)) = stack_access(ins) {
            return Some(Reached { through: Through::base(n), d, size: 8 });
        }
        if ins.mnemonic() == Mnemonic::Lea || !ins.op_kinds().any(|k| k == OpKind::Memory) {
            return None;
        }
        let (through, d) = self.plain_operand(ins)?;
        Some(Reached { through, d, size: access_size(ins) as i64 })
    }

    /// Keeps the windows right after an instruction.
    pub(super) fn track(&mut self, ins: &Instruction) {
        if self.windows.is_empty() {
            return;
        }
        let written = self.writes(self.index);
        for w in &mut self.windows {
            let Some(through) = w.through else { continue };
            match effect_on(ins, written, through) {
                Effect::Nothing => {}
                Effect::Adds(by) => w.start -= by,
                // The place in the area stays taken.
                Effect::Unknown => w.through = None,
            }
        }
    }

    /// General registers, a bit each, that instruction `n` of the block writes.
    fn writes(&mut self, n: usize) -> u16 {
        // What ends the search need not be known.
        let Some(&Ahead { ref ins, class: Class::Plain, written, .. }) = self.ahead.get(n) else {
            return 0;
        };
        if let Some(known) = written {
            return known;
        }
        let info = self.infos.info_options(ins, InstructionInfoOptions::NO_MEMORY_USAGE);
        let mut written = 0;
        for used in info.used_registers() {
            let reads =
                matches!(used.access(), OpAccess::Read | OpAccess::CondRead | OpAccess::None);
            if !reads && let Some(g) = GuestReg::of(used.register()) {
                written |= 1 << g.n;
            }
        }
        if let Some(ahead) = self.ahead.get_mut(n) {
            ahead.written = Some(written);
        }
        written
    }
}

/// What an instruction that writes the registers `written` does to their sum.
fn effect_on(ins: &Instruction, written: u16, through: Through) -> Effect {
    let base = effect(ins, written, through.base);
    let Some((index, shift)) = through.index() else { return base };
    match (base, effect(ins, written, index)) {
        (Effect::Nothing, Effect::Nothing) => Effect::Nothing,
        (Effect::Nothing, Effect::Adds(by)) => Effect::Adds(by << shift),
        (Effect::Adds(by), Effect::Nothing) => Effect::Adds(by),
        // One register twice, or two written by one instruction.
        _ => Effect::Unknown,
    }
}

/// What an instruction that writes the registers `written` does to `base`.
fn effect(ins: &Instruction, written: u16, base: u8) -> Effect {
    if written & 1 << base == 0 {
        return Effect::Nothing;
    }
    let is_base = |r: Register| GuestReg::of(r).is_some_and(|g| g.n == base);
    let whole = |r: Register| GuestReg::of(r).is_some_and(|g| g.n == base && g.size == 8);
    match ins.mnemonic() {
        Mnemonic::Push if base == RSP && stack_access(ins).is_some() => {
            return Effect::Adds(-8);
        }
        Mnemonic::Pop if base == RSP && stack_access(ins).is_some() => {
            return if is_base(ins.op0_register()) { Effect::Unknown } else { Effect::Adds(8) };
        }
        Mnemonic::Add | Mnemonic::Sub
            if ins.op0_kind() == OpKind::Register
                && whole(ins.op0_register())
                && ins.op1_kind() != OpKind::Register
                && ins.op1_kind() != OpKind::Memory =>
        {
            let by = ins.immediate(1) as i64;
            let by = if ins.mnemonic() == Mnemonic::Sub { -by } else { by };
            return if by.abs() < REACH { Effect::Adds(by) } else { Effect::Unknown };
        }
        Mnemonic::Lea
            if whole(ins.op0_register())
                && whole(ins.memory_base())
                && ins.memory_index() == Register::None =>
        {
            let by = ins.memory_displacement64() as i64;
            return if by.abs() < REACH { Effect::Adds(by) } else { Effect::Unknown };
        }
        _ => {}
    }
    Effect::Unknown
}

/// Base register and displacement of the access that emitted stack instructions make by the way.
pub(super) fn stack_access(ins: &Instruction) -> Option<(u8, i64)> {
    debug_assert!(mapped(RSP) == Some(GUEST_RSP));
    if ins.op_kinds().any(|k| k == OpKind::Memory) {
        return None;
    }
    match ins.mnemonic() {
        Mnemonic::Push | Mnemonic::Call => Some((RSP, -8)),
        Mnemonic::Pop | Mnemonic::Ret => Some((RSP, 0)),
        Mnemonic::Leave => Some((RBP, 0)),
        _ => None,
    }
}
