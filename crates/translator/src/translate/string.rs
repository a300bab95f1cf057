//! String instructions with 64-bit addresses, emitted as the same instructions on host addresses.
//!
//! A run whose elements all begin in one page of the source and in one of the destination needs one
//! look-up for each; longer ones are made run by run in the cold part. The last element may cross
//! into the next page: that lies behind the first or faults (see [`crate::tlb`]).
//!
//! The processor keeps the registers exact when it stops in the middle, for a fault or for a signal;
//! the signal handler then sends it to code that turns them back into the guest's. What is left of
//! the instruction after a fault is a helper's.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::{Cold, Mode, Translation};
use crate::asm::Mem;
use crate::code::StringSite;
use crate::exec::runner;
use crate::layout::{Area, ExitCode, GUEST_RCX, S0, S1, SC, disp, host};

/// Which string instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Movs,
    Cmps,
    Stos,
    Lods,
    Scas,
}

/// A string instruction without its registers, which are always the same.
#[derive(Clone, Copy, Debug)]
pub struct StringOp {
    kind: Kind,
    /// Bytes of an element, as a shift.
    shift: u8,
    /// REP, REPE or REPNE.
    rep: bool,
    /// REPNE.
    not_equal: bool,
}

/// What the cold part of a string instruction needs to know.
#[derive(Clone, Copy)]
pub struct Rest {
    op: StringOp,
    ins: Instruction,
    /// Number of the record.
    site: usize,
    /// Offset of what follows the instruction.
    end: usize,
}

/// Source and destination of a MOVS that are less than a page apart.
#[derive(Clone, Copy)]
pub struct Overlap {
    /// Bytes of an element, as a shift.
    shift: u8,
    /// Number of the record.
    site: usize,
}

/// What host RCX and R14 hold together at the string instruction.
#[derive(Clone, Copy)]
enum Count {
    /// No count.
    None,
    /// RCX has it all.
    Whole,
    /// Their sum.
    Sum,
}

impl StringOp {
    /// The string instruction that `ins` is; INS and OUTS are none here.
    pub fn of(ins: &Instruction) -> Option<Self> {
        use Kind as K;
        let (kind, shift) = match ins.code() {
            Code::Movsb_m8_m8 => (K::Movs, 0),
            Code::Movsw_m16_m16 => (K::Movs, 1),
            Code::Movsd_m32_m32 => (K::Movs, 2),
            Code::Movsq_m64_m64 => (K::Movs, 3),
            Code::Cmpsb_m8_m8 => (K::Cmps, 0),
            Code::Cmpsw_m16_m16 => (K::Cmps, 1),
            Code::Cmpsd_m32_m32 => (K::Cmps, 2),
            Code::Cmpsq_m64_m64 => (K::Cmps, 3),
            Code::Stosb_m8_AL => (K::Stos, 0),
            Code::Stosw_m16_AX => (K::Stos, 1),
            Code::Stosd_m32_EAX => (K::Stos, 2),
            Code::Stosq_m64_RAX => (K::Stos, 3),
            Code::Lodsb_AL_m8 => (K::Lods, 0),
            Code::Lodsw_AX_m16 => (K::Lods, 1),
            Code::Lodsd_EAX_m32 => (K::Lods, 2),
            Code::Lodsq_RAX_m64 => (K::Lods, 3),
            Code::Scasb_AL_m8 => (K::Scas, 0),
            Code::Scasw_AX_m16 => (K::Scas, 1),
            Code::Scasd_EAX_m32 => (K::Scas, 2),
            Code::Scasq_RAX_m64 => (K::Scas, 3),
            _ => return None,
        };
        let not_equal = ins.has_repne_prefix();
        Some(Self { kind, shift, rep: ins.has_rep_prefix() || not_equal, not_equal })
    }

    /// Whether it is emitted, and not left to a helper.
    pub fn emitted(self, ins: &Instruction, mode: Mode) -> bool {
        let addresses = ins
            .op_kinds()
            .all(|k| matches!(k, OpKind::MemorySegRSI | OpKind::MemoryESRDI | OpKind::Register));
        mode.bits == 64
            && !(mode.single || mode.aligned || mode.checked)
            && addresses
            && !(self.source() && matches!(ins.memory_segment(), Register::FS | Register::GS))
            && !(self.rep && self.kind == Kind::Lods)
    }

    /// Reads at RSI.
    fn source(self) -> bool {
        matches!(self.kind, Kind::Movs | Kind::Cmps | Kind::Lods)
    }

    /// Reads or writes at RDI.
    fn destination(self) -> bool {
        self.kind != Kind::Lods
    }

    /// Sets flags.
    fn compares(self) -> bool {
        matches!(self.kind, Kind::Cmps | Kind::Scas)
    }

    /// The host registers with its addresses.
    fn pointers(self) -> impl Iterator<Item = u8> {
        let destination = self.destination().then_some(host::RDI);
        destination.into_iter().chain(self.source().then_some(host::RSI))
    }

    fn encode(self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.shift == 1 {
            bytes.push(0x66);
        }
        if self.rep {
            bytes.push(if self.compares() && self.not_equal { 0xf2 } else { 0xf3 });
        }
        if self.shift == 3 {
            bytes.push(0x48);
        }
        let opcode = match self.kind {
            Kind::Movs => 0xa4,
            Kind::Cmps => 0xa6,
            Kind::Stos => 0xaa,
            Kind::Lods => 0xac,
            Kind::Scas => 0xae,
        };
        bytes.push(opcode | u8::from(self.shift != 0));
        bytes
    }
}

/// Where the flags are kept.
const STRING_FLAGS: Mem = Mem::gs(disp(std::mem::offset_of!(Area, string_flags)));

impl Translation {
    /// A string instruction.
    pub(super) fn string(&mut self, ins: &Instruction, op: StringOp) {
        // Longer than any JRCXZ reaches: none may be pending.
        self.reserve(127);
        let site = self.notes.strings.len();
        let cold = self.cold.len();
        let mut overlap = None;
        if op.rep {
            self.asm.pushfq();
            self.asm.pop(S0);
        }
        let compares = op.rep && op.compares();
        if compares {
            // For a fault, which leaves the flags from before the instruction (SDM vol. 2, REP).
            self.asm.store(&STRING_FLAGS, S0);
        }
        let look = self.asm.pos() as u32;
        if op.rep {
            self.string_fits(op);
            let usual = self.asm.jrcxz();
            let odd = self.asm.jmp();
            self.near.push((odd, cold));
            if op.kind == Kind::Movs {
                overlap = Some(self.asm.pos());
                let jump = self.asm.jmp();
                self.near.push((jump, cold + 1));
            }
            let ok = self.asm.bind_short(usual);
            debug_assert!(ok);
        }
        self.string_look_up(op);
        if let Some(overlap) = overlap {
            self.string_distance();
            let ok = self.asm.jrcxz_to(overlap);
            debug_assert!(ok);
        }
        let begun = self.asm.pos() as u32;
        self.string_to_host(op);
        if op.rep {
            self.asm.mov(SC, GUEST_RCX);
        }
        let at = self.asm.pos() as u32;
        self.asm.bytes(&op.encode());
        self.string_to_guest(op, if op.rep { Count::Whole } else { Count::None });
        let end = self.asm.pos();
        if compares {
            self.asm.store_imm(&STRING_FLAGS, 0);
        }
        self.notes.strings.push(StringSite {
            look,
            begun,
            op: at,
            rip: self.rip_off,
            ..StringSite::default()
        });
        let rest = Rest { op, ins: *ins, site, end };
        self.cold.push(Cold::String(Box::new(rest)));
        if overlap.is_some() {
            self.cold.push(Cold::Overlap(Overlap { shift: op.shift, site }));
        }
    }

    /// GS-relative displacement of the mask that is left of a number of elements, less one, that are
    /// too many for a run.
    fn run_mask(shift: u8) -> i32 {
        disp(std::mem::offset_of!(Area, run_mask) + usize::from(shift) * 8)
    }

    /// [`SC`] is 0 when DF in [`S0`] is clear, and no element of the run begins in another page than
    /// the first one.
    fn string_fits(&mut self, op: StringOp) {
        self.asm.pext_gs(S0, S0, disp(std::mem::offset_of!(Area, df_mask)));
        self.asm.lea(SC, &Mem::base(GUEST_RCX, -1));
        self.asm.pext_gs(SC, SC, Self::run_mask(op.shift));
        self.asm.lea(S0, &Mem::base_index(S0, SC, 0, 0));
        for pointer in op.pointers() {
            self.string_room(op, S1, pointer);
            self.asm.mov(SC, GUEST_RCX);
            self.asm.not(SC);
            self.asm.lea(S1, &Mem::base_index(S1, SC, 0, 2));
            self.asm.pext_gs(S1, S1, Self::run_mask(0));
            self.asm.lea(S0, &Mem::base_index(S0, S1, 0, 0));
        }
        self.asm.mov(SC, S0);
    }

    /// The number of elements behind the first one that begin in the same page.
    fn string_room(&mut self, op: StringOp, dst: u8, pointer: u8) {
        self.asm.mov(dst, pointer);
        self.asm.not(dst);
        let mask = std::mem::offset_of!(Area, slot_mask) + usize::from(op.shift) * 8;
        self.asm.pext_gs(dst, dst, disp(mask));
    }

    /// Puts the number of elements of the next run into [`Area::tmp`]: those that begin in the pages
    /// of the first ones.
    fn string_piece(&mut self, op: StringOp) {
        let mut pointers = op.pointers();
        if let Some(first) = pointers.next() {
            self.string_room(op, S0, first);
        }
        if let Some(second) = pointers.next() {
            self.string_room(op, S1, second);
            self.string_min(S1);
        }
        // What is left, less one, if that is not more than fits in any page.
        self.asm.lea(S1, &Mem::base(GUEST_RCX, -1));
        self.asm.pext_gs(SC, S1, Self::run_mask(0));
        let many = self.asm.jmp_unless_zero();
        self.string_min(S1);
        self.asm.bind_near(many);
        self.asm.lea(S0, &Mem::base(S0, 1));
        self.asm.store(&Mem::gs(disp(std::mem::offset_of!(Area, tmp))), S0);
    }

    /// [`S0`] becomes the lesser of itself and `other`, both less than 4096.
    fn string_min(&mut self, other: u8) {
        self.asm.mov(SC, S0);
        self.asm.not(SC);
        self.asm.lea(SC, &Mem::base_index(SC, other, 0, 1));
        self.asm.pext_gs(SC, SC, Self::run_mask(0));
        let keep = self.asm.jrcxz();
        self.asm.mov(S0, other);
        let ok = self.asm.bind_short(keep);
        debug_assert!(ok);
    }

    /// The addends: of RDI in [`S0`], of RSI in [`S1`].
    fn string_look_up(&mut self, op: StringOp) {
        let mask = disp(std::mem::offset_of!(Area, page_mask) + usize::from(!self.mode.user) * 8);
        if op.destination() {
            self.asm.pext_gs(SC, host::RDI, mask);
            self.asm.load(S0, &Mem::gs_index8(SC, 0));
        }
        if op.source() {
            self.asm.pext_gs(SC, host::RSI, mask);
            self.asm.load(S1, &Mem::gs_index8(SC, 0));
        }
    }

    /// [`SC`] is 0 when RDI is RSI or less than 4096 behind it.
    fn string_distance(&mut self) {
        self.asm.mov(SC, host::RSI);
        self.asm.not(SC);
        self.asm.lea(SC, &Mem::base_index(SC, host::RDI, 0, 1));
        self.asm.pext_gs(SC, SC, Self::run_mask(0));
    }

    /// [`SC`] is 0 when both addends are the same.
    fn string_same_addend(&mut self) {
        self.asm.mov(SC, S0);
        self.asm.not(SC);
        self.asm.lea(SC, &Mem::base_index(SC, S1, 0, 1));
    }

    fn string_to_host(&mut self, op: StringOp) {
        if op.destination() {
            self.asm.lea(host::RDI, &Mem::base_index(host::RDI, S0, 0, 0));
        }
        if op.source() {
            self.asm.lea(host::RSI, &Mem::base_index(host::RSI, S1, 0, 0));
        }
    }

    fn string_to_guest(&mut self, op: StringOp, count: Count) {
        match count {
            Count::None => {}
            Count::Whole => self.asm.mov(GUEST_RCX, SC),
            Count::Sum => self.asm.lea(GUEST_RCX, &Mem::base_index(GUEST_RCX, SC, 0, 0)),
        }
        if op.destination() {
            self.asm.not(S0);
            self.asm.lea(host::RDI, &Mem::base_index(host::RDI, S0, 0, 1));
        }
        if op.source() {
            self.asm.not(S1);
            self.asm.lea(host::RSI, &Mem::base_index(host::RSI, S1, 0, 1));
        }
    }

    /// The cold part: what is not a forward run, long runs, and ways out of the middle.
    pub(super) fn string_rest(&mut self, rest: &Rest) {
        let op = rest.op;
        let mut forward = None;
        if op.rep {
            self.asm.pushfq();
            self.asm.pop(SC);
            self.asm.pext_gs(SC, SC, disp(std::mem::offset_of!(Area, df_mask)));
            forward = Some(self.asm.jrcxz());
        }
        let helper = self.asm.pos();
        self.helper(&rest.ins, runner(&rest.ins));
        self.asm.jmp_to(rest.end);
        self.notes.strings[rest.site].cold = helper as u32;
        if let Some(forward) = forward {
            let ok = self.asm.bind_short(forward);
            debug_assert!(ok);
            self.asm.mov(SC, GUEST_RCX);
            let some = self.asm.jmp_unless_zero();
            self.asm.jmp_to(rest.end);
            self.asm.bind_near(some);
            self.string_runs(rest, helper);
        }
        let count = if op.rep { Count::Whole } else { Count::None };
        self.string_ways_out(op, rest.site, count, helper);
    }

    /// Many runs.
    fn string_runs(&mut self, rest: &Rest, helper: usize) {
        let op = rest.op;
        let look = self.asm.pos();
        self.string_piece(op);
        self.string_look_up(op);
        if op.kind == Kind::Movs {
            self.string_distance();
            let apart = self.asm.jmp_unless_zero();
            self.string_same_addend();
            let same = self.asm.jrcxz();
            self.asm.jmp_to(helper);
            let ok = self.asm.bind_short(same);
            debug_assert!(ok);
            self.asm.bind_near(apart);
        }
        self.asm.load(SC, &Mem::gs(disp(std::mem::offset_of!(Area, tmp))));
        self.asm.not(SC);
        let begun = self.asm.pos();
        self.asm.lea(GUEST_RCX, &Mem::base_index(GUEST_RCX, SC, 0, 1));
        self.asm.not(SC);
        self.string_to_host(op);
        let at = self.asm.pos();
        self.asm.bytes(&op.encode());
        self.string_to_guest(op, Count::Sum);
        // REPE ends with ZF clear, REPNE with ZF set.
        let ended = op.compares().then(|| self.asm.jcc(if op.not_equal { 4 } else { 5 }));
        self.asm.mov(SC, GUEST_RCX);
        let counted = self.asm.jrcxz();
        self.asm.jmp_to(look);
        let ok = self.asm.bind_short(counted);
        debug_assert!(ok);
        if let Some(ended) = ended {
            self.asm.bind_near(ended);
        }
        self.asm.jmp_to(rest.end);
        let site = self.notes.strings.len();
        self.notes.strings.push(StringSite {
            look: look as u32,
            begun: begun as u32,
            op: at as u32,
            cold: helper as u32,
            rip: self.notes.strings[rest.site].rip,
            ..StringSite::default()
        });
        self.string_ways_out(op, site, Count::Sum, helper);
    }

    /// Where the signal handler sends a string instruction that faulted, or that is to be left.
    fn string_ways_out(&mut self, op: StringOp, site: usize, count: Count, helper: usize) {
        self.notes.strings[site].cold_fault = self.asm.pos() as u32;
        self.string_to_guest(op, count);
        self.asm.jmp_to(helper);
        self.notes.strings[site].cold_stop = self.asm.pos() as u32;
        self.string_to_guest(op, count);
        let rip = self.notes.strings[site].rip;
        self.exit_at(self.key.rip.wrapping_add(rip.into()), ExitCode::Interrupt);
    }

    /// The processor copies overlapping strings in order when it sees that they overlap: in one
    /// mapping. In two mappings of the same memory it does not.
    pub(super) fn string_overlap(&mut self, overlap: &Overlap) {
        let StringSite { begun, cold, .. } = self.notes.strings[overlap.site];
        // The distance less the length: not negative?
        self.asm.mov(SC, host::RSI);
        self.asm.not(SC);
        self.asm.lea(SC, &Mem::base_index(SC, host::RDI, 0, 1));
        self.asm.not(SC);
        self.asm.lea(SC, &Mem::base_index(SC, GUEST_RCX, overlap.shift, 0));
        self.asm.not(SC);
        self.asm.pext_gs(SC, SC, Self::run_mask(0));
        let apart = self.asm.jrcxz();
        self.string_same_addend();
        let same = self.asm.jrcxz();
        self.asm.jmp_to(cold as usize);
        let ok = self.asm.bind_short(same) && self.asm.bind_short(apart);
        debug_assert!(ok);
        self.asm.jmp_to(begun as usize);
    }
}
