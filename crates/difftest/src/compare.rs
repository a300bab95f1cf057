//! Compares two outcomes of a case, leaving out what the manuals leave undefined.
//!
//! Undefined flags come from iced-x86's tables (`rflags_undefined`), which follow the flag tables
//! of the Intel SDM (vol. 1, appendix A) and the AMD APM (vol. 3, appendix F). A flag is ignored at
//! the end of a case when some path to the place where it stopped left it undefined last.
//!
//! Also left out, with the source: the x87's last instruction and operand pointer and opcode
//! (Intel SDM vol. 1, 8.1.8: deprecated, differs by processor), RF in saved flags (vol. 3, 18.3.1.1:
//! by kind of exception), bit P of the error code for addresses of the kernel (Linux sets it to hide
//! its page tables), which of two possible faults is taken where an instruction accesses memory in
//! several places or pieces, the destination and mask of a gather that faulted (vol. 2, VGATHER:
//! elements above the faulting one may or may not be done), the first eight bytes of a ten-byte store
//! whose last two fault, and cases in which a REP MOVS or REP STOS writes over itself.

use std::sync::OnceLock;

use berth_x86::state::{XsaveArea, flags, vector};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, RflagsBits};

use crate::case::{Case, Final, Mode, Outcome};
use crate::layout::base_image;

/// One difference, as a line for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// What differs.
    pub what: String,
    /// Its value natively.
    pub native: String,
    /// Its value in the other backend.
    pub other: String,
}

/// All differences between the native outcome and another; empty when they agree.
#[must_use]
pub fn compare(case: &Case, native: &Outcome, other: &Outcome) -> Vec<Difference> {
    match (native, other) {
        // No counterpart in the guest, or no defined end: nothing can be said.
        (Outcome::SystemCall | Outcome::Timeout, _) => Vec::new(),
        (Outcome::Stopped(a), Outcome::Stopped(b)) if strays(a, b) => Vec::new(),
        (Outcome::Stopped(a), Outcome::Stopped(b)) if string_over_itself(case, [a, b]) => {
            Vec::new()
        }
        (Outcome::Stopped(a), Outcome::Stopped(b)) => finals(case, a, b),
        (a, b) if a == b => Vec::new(),
        (a, b) => vec![difference("end of the case", describe(a), describe(b))],
    }
}

fn describe(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Stopped(f) => format!("exception {} at {:#x}", f.fault.vector, f.rip),
        Outcome::Timeout => "still running".to_owned(),
        Outcome::SystemCall => "system call".to_owned(),
        Outcome::Broken(why) => why.clone(),
    }
}

fn difference(what: impl Into<String>, native: String, other: String) -> Difference {
    Difference { what: what.into(), native, other }
}

/// Names of the general registers.
pub const NAMES: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
    "r14", "r15",
];

fn finals(case: &Case, native: &Final, other: &Final) -> Vec<Difference> {
    let mut found = Vec::new();
    let at = decode(case).into_iter().find(|i| i.ip() == native.rip);
    let mut check = |what: &str, a: u64, b: u64| {
        if a != b {
            found.push(difference(what, format!("{a:#018x}"), format!("{b:#018x}")));
        }
    };
    if !either_fault(case, at.as_ref(), native, other) {
        check("exception", u64::from(native.fault.vector), u64::from(other.fault.vector));
        let [x, y] = [native.fault.cr2, other.fault.cr2];
        let either = x != y && at.as_ref().is_some_and(|i| either_piece(i, native, other));
        // The other page may be there and read-only where this one is missing.
        let present = u32::from(either && x >> 12 != y >> 12);
        let hidden = hidden_bits(&native.fault) | present;
        let error = |f: &Final| u64::from(f.fault.error & !hidden);
        check("error code", error(native), error(other));
        if !either {
            check("cr2", x, y);
        }
    }
    check("rip", native.rip, other.rip);
    for (i, name) in NAMES.iter().enumerate() {
        check(name, native.gpr[i], other.gpr[i]);
    }
    let mask = !(undefined_flags(case, native.rip) | flags::RF);
    check("rflags", native.rflags & mask, other.rflags & mask);
    for (i, name) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().enumerate() {
        check(name, visible(native.selectors[i]), visible(other.selectors[i]));
    }
    check("fs base", native.fs_base, other.fs_base);
    check("gs base", native.gs_base, other.gs_base);
    let (mut a, mut b) = (normalize(&native.xsave), normalize(&other.xsave));
    if let Some(gather) = at.as_ref().filter(|i| i.is_vsib() && native.fault.vector != vector::BP) {
        hide_gather(gather, [&mut a, &mut b]);
    }
    xsave(&a, &b, &mut found);
    let half = at.as_ref().and_then(|i| half_stored(i, case, native));
    memory(case, native, other, half, &mut found);
    found
}

/// Whether the other backend faulted at an address where the native process has memory of its own
/// (its program, libraries, stack), which a random address may hit.
fn strays(native: &Final, other: &Final) -> bool {
    let own = 0x5000_0000_0000..0x7fff_ffff_f000;
    let page_fault = other.fault.vector == vector::PF && own.contains(&other.fault.cr2);
    let same = (native.rip, native.fault) == (other.rip, other.fault);
    page_fault && !same
}

/// Whether a REP MOVS or REP STOS has changed its own bytes. How many iterations the processor has
/// begun when it takes notice differs (Intel SDM vol. 3, 12.6: what is modified is compared with
/// what was fetched already; vol. 1, 7.3.9.3: fast strings work in groups of iterations); the
/// translator looks after each.
fn string_over_itself(case: &Case, finals: [&Final; 2]) -> bool {
    use iced_x86::Mnemonic as M;
    let moves = |i: &Instruction| {
        i.has_rep_prefix()
            && matches!(
                i.mnemonic(),
                M::Movsb
                    | M::Movsw
                    | M::Movsd
                    | M::Movsq
                    | M::Stosb
                    | M::Stosw
                    | M::Stosd
                    | M::Stosq
            )
    };
    let strings: Vec<Instruction> = decode(case).into_iter().filter(moves).collect();
    if strings.is_empty() {
        return false;
    }
    let changed = |at: u32| {
        let shift = at % 8 * 8;
        let was = original(case, at & !7) >> shift & 0xff;
        let now = |f: &Final| f.memory.iter().find(|w| w.0 == at & !7).map(|w| w.1 >> shift & 0xff);
        finals.iter().any(|f| now(f).is_some_and(|b| b != was))
    };
    strings.iter().any(|i| {
        let start = case.world.image_offset(i.ip(), i.len() as u32);
        start.is_some_and(|s| (s..s + i.len() as u32).any(changed))
    })
}

/// The word at an aligned image offset before the case runs.
fn original(case: &Case, at: u32) -> u64 {
    static IMAGE: OnceLock<Vec<u8>> = OnceLock::new();
    let image = IMAGE.get_or_init(base_image);
    let mut word = [0; 8];
    for (byte, place) in word.iter_mut().zip(at..) {
        *byte = image.get(place as usize).copied().unwrap_or_default();
        for (offset, data) in case.all_patches() {
            let patched = place.checked_sub(offset).and_then(|i| data.get(i as usize));
            *byte = patched.copied().unwrap_or(*byte);
        }
    }
    u64::from_le_bytes(word)
}

/// Image offset of a store of ten bytes whose last two fault: some processors have stored the first
/// eight.
fn half_stored(i: &Instruction, case: &Case, native: &Final) -> Option<u32> {
    use iced_x86::Code;
    let store = matches!(i.code(), Code::Fbstp_m80bcd | Code::Fstp_m80fp);
    let at = operand(i, native).filter(|_| store && native.fault.vector == vector::PF)?;
    case.world.image_offset(at, 8)
}

/// Address of the memory operand of the instruction that faulted.
fn operand(i: &Instruction, end: &Final) -> Option<u64> {
    use iced_x86::{OpKind as K, Register as R};
    let memory = i.op_kinds().position(|k| {
        matches!(k, K::Memory | K::MemorySegDI | K::MemorySegEDI | K::MemorySegRDI)
    })?;
    i.virtual_address(memory as u32, 0, |r, _, _| match r {
        R::FS => Some(end.fs_base),
        R::GS => Some(end.gs_base),
        _ if r.is_segment_register() => Some(0),
        _ if r.is_gpr() => {
            let full = end.gpr.get((r.full_register() as usize).wrapping_sub(R::RAX as usize))?;
            Some(if r.size() == 4 { full & 0xffff_ffff } else { *full })
        }
        _ => None,
    })
}

/// Whether both faults are reported by an instruction that accesses its operand in pieces (masked
/// moves, x87 and FXSAVE images), for bytes of that operand: which piece comes first differs by
/// processor.
fn either_piece(i: &Instruction, native: &Final, other: &Final) -> bool {
    let (Some(size), Some(at)) = (pieces(i), operand(i, native)) else { return false };
    let inside = |f: &Final| match f.fault.vector {
        vector::PF => f.fault.cr2.wrapping_sub(at) < size,
        // Some piece has no canonical address.
        vector::GP | vector::SS => at < 1 << 47 && at + size > 1 << 47,
        _ => false,
    };
    inside(native) && inside(other)
}

/// Bytes of an operand that is accessed in pieces, or only in part.
fn pieces(i: &Instruction) -> Option<u64> {
    use iced_x86::{MemorySize as S, Mnemonic as M};
    match i.mnemonic() {
        M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu => Some(16),
        M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq => Some(32),
        M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64 => Some(512),
        M::Fldenv | M::Fnstenv | M::Frstor | M::Fnsave => Some(match i.memory_size() {
            S::FpuEnv14 => 14,
            S::FpuEnv28 => 28,
            S::FpuState94 => 94,
            _ => 108,
        }),
        _ => None,
    }
}

/// Destination and mask of a gather that faulted.
fn hide_gather(gather: &Instruction, areas: [&mut XsaveArea; 2]) {
    for area in areas {
        for register in [gather.op0_register(), gather.op2_register()] {
            let n = register.number();
            area.0[160 + n * 16..176 + n * 16].fill(0);
            area.0[576 + n * 16..592 + n * 16].fill(0);
        }
    }
}

/// A selector as far as it can be compared: the kernel's IRET to the signal handler makes 0 of any
/// null selector (1, 2, 3) on Intel processors.
fn visible(selector: u16) -> u64 {
    if selector < 4 { 0 } else { u64::from(selector) }
}

/// Brings an XSAVE area into one form: components in their initial state are filled in, what is not
/// compared is zero.
#[must_use]
pub fn normalize(area: &XsaveArea) -> XsaveArea {
    let mut area = area.clone();
    let bytes = &mut area.0;
    let present = bytes[512];
    if present & 1 == 0 {
        bytes[..24].fill(0);
        bytes[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        bytes[32..160].fill(0);
    }
    if present & 2 == 0 {
        bytes[160..416].fill(0);
    }
    if present & 4 == 0 {
        bytes[576..].fill(0);
    }
    // Last opcode, instruction pointer, operand pointer; MXCSR_MASK; unused bytes; the header.
    bytes[5..24].fill(0);
    bytes[28..32].fill(0);
    for st in bytes[32..160].chunks_exact_mut(16) {
        st[10..].fill(0);
    }
    bytes[416..576].fill(0);
    area
}

/// Compares normalized areas.
fn xsave(a: &XsaveArea, b: &XsaveArea, found: &mut Vec<Difference>) {
    let mut check = |what: String, range: std::ops::Range<usize>| {
        let (x, y) = (&a.0[range.clone()], &b.0[range]);
        if x != y {
            found.push(difference(what, hex(x), hex(y)));
        }
    };
    check("x87 control word".to_owned(), 0..2);
    check("x87 status word".to_owned(), 2..4);
    check("x87 tags".to_owned(), 4..5);
    check("mxcsr".to_owned(), 24..28);
    for i in 0..8 {
        check(format!("st{i}"), 32 + i * 16..42 + i * 16);
    }
    for i in 0..16 {
        check(format!("xmm{i}"), 160 + i * 16..176 + i * 16);
        check(format!("ymm{i} upper half"), 576 + i * 16..592 + i * 16);
    }
}

/// Bytes as one little-endian number.
fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold(String::from("0x"), |text, b| text + &format!("{b:02x}"))
}

/// Compares what was written; `half`: eight bytes that may have been stored before a fault.
fn memory(
    case: &Case,
    native: &Final,
    other: &Final,
    half: Option<u32>,
    found: &mut Vec<Difference>,
) {
    let (mut a, mut b) = (native.memory.iter().peekable(), other.memory.iter().peekable());
    loop {
        let at = match (a.peek(), b.peek()) {
            (None, None) => return,
            (Some(x), None) => x.0,
            (None, Some(y)) => y.0,
            (Some(x), Some(y)) => x.0.min(y.0),
        };
        let x = a.next_if(|w| w.0 == at).map(|w| w.1);
        let y = b.next_if(|w| w.0 == at).map(|w| w.1);
        let shown = mask_of(case, half, at);
        // A word may have changed in one backend only.
        let [now_x, now_y] = [x, y].map(|w| w.unwrap_or_else(|| original(case, at)));
        if now_x & shown != now_y & shown {
            let text = |v: Option<u64>| v.map_or("unchanged".to_owned(), |v| format!("{v:#018x}"));
            let linear = case.world.linear(at).unwrap_or_default();
            found.push(difference(format!("memory at {linear:#x}"), text(x), text(y)));
        }
    }
}

/// Which bits of the word at an image offset are compared.
fn mask_of(case: &Case, half: Option<u32>, at: u32) -> u64 {
    let masked = || case.masked.iter().copied().chain(half.map(|o| (o, 8)));
    let hidden = |byte: u32| masked().any(|(o, l)| (o..o + l).contains(&byte));
    (0..8).filter(|i| !hidden(at + i)).fold(0, |mask, i| mask | 0xff << (8 * i))
}

/// The instructions of a case as decoded before it runs.
#[must_use]
pub fn decode(case: &Case) -> Vec<Instruction> {
    case.spans
        .iter()
        .map(|span| {
            let start = usize::from(span.start);
            let bytes = case.code.get(start..start + usize::from(span.len)).unwrap_or_default();
            let ip = case.entry() + u64::from(span.start);
            Decoder::with_ip(case.bitness(), bytes, ip, DecoderOptions::NONE).decode()
        })
        .collect()
}

/// Bits of the error code that Linux changed: it reports every fault above user addresses as a
/// protection fault.
fn hidden_bits(fault: &crate::case::Fault) -> u32 {
    u32::from(fault.vector == vector::PF && fault.cr2 >= 0x7fff_ffff_f000)
}

/// Whether the processor may choose between two faults: an instruction that accesses memory in more
/// than one place, both of them bad (Intel SDM vol. 3, 6.9: the order of faults within a class, and
/// all faults of memory operands are in one, differs by processor), or an access beyond the end of a
/// 4 GiB segment (vol. 3, 5.3: may or may not fault).
fn either_fault(case: &Case, at: Option<&Instruction>, native: &Final, other: &Final) -> bool {
    let fault =
        |f: &Final| matches!(f.fault.vector, vector::GP | vector::SS | vector::PF | vector::AC);
    if !fault(native) || !fault(other) {
        return false;
    }
    let near_end = |address: u64| address.wrapping_add(64) & 0xffff_ffff < 128;
    let page = |f: &Final| f.fault.vector == vector::PF && near_end(f.fault.cr2);
    let memory = at.and_then(|i| operand(i, native)).is_some_and(near_end);
    let wraps = case.mode == Mode::Compat32 && (page(native) || page(other) || memory);
    let pieces = native.fault.vector != other.fault.vector
        && at.is_some_and(|i| either_piece(i, native, other));
    at.is_some_and(two_places) || wraps || pieces
}

/// Whether an instruction accesses memory in two places that have nothing to do with each other.
fn two_places(i: &Instruction) -> bool {
    use iced_x86::{Mnemonic as M, OpKind as K};
    let memory = i.op_kinds().any(|k| k == K::Memory);
    i.is_string_instruction() && i.op_kinds().all(|k| k != K::Register)
        || memory && matches!(i.mnemonic(), M::Push | M::Pop | M::Call)
        || i.mnemonic() == M::Enter
}

/// Flags that some path from the start to `rip` leaves undefined.
fn undefined_flags(case: &Case, rip: u64) -> u64 {
    let instructions = decode(case);
    let count = instructions.len();
    let index_of = |ip: u64| instructions.iter().position(|i| i.ip() == ip);
    let mut before = vec![0u32; count + 1];
    // Every round can only add flags, of which there are six.
    loop {
        let old = before.clone();
        for (i, ins) in instructions.iter().enumerate() {
            let defined = ins.rflags_written() | ins.rflags_cleared() | ins.rflags_set();
            // A repeated or shifting instruction may leave flags as they were; a flag that is
            // written on every path is what counts, so those keep what was undefined.
            let certain = if conditional_flags(ins) { 0 } else { defined };
            let after = (before[i] & !certain) | ins.rflags_undefined();
            let mut flow = |to: usize| before[to.min(count)] |= after;
            match ins.flow_control() {
                FlowControl::UnconditionalBranch => {
                    flow(index_of(ins.near_branch_target()).unwrap_or(count));
                }
                FlowControl::ConditionalBranch | FlowControl::Call => {
                    flow(i + 1);
                    flow(index_of(ins.near_branch_target()).unwrap_or(count));
                }
                FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return => {
                    (0..=count).for_each(&mut flow);
                }
                _ => flow(i + 1),
            }
        }
        if before == old {
            break;
        }
    }
    // A trap (single step, INT3) reports the place after; an unknown place may follow anything.
    let bits = match index_of(rip) {
        Some(i) => before[i],
        None if rip == case.end() || rip == case.end() + 1 => before[count],
        None => before.iter().fold(0, |all, b| all | b),
    };
    to_rflags(bits)
}

/// Whether the instruction may leave flags unchanged that it usually writes.
pub(crate) fn conditional_flags(ins: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    ins.has_rep_prefix()
        || ins.has_repne_prefix()
        || matches!(
            ins.mnemonic(),
            M::Rol
                | M::Ror
                | M::Rcl
                | M::Rcr
                | M::Shl
                | M::Sal
                | M::Shr
                | M::Sar
                | M::Shld
                | M::Shrd
        )
}

fn to_rflags(bits: u32) -> u64 {
    [
        (RflagsBits::OF, flags::OF),
        (RflagsBits::SF, flags::SF),
        (RflagsBits::ZF, flags::ZF),
        (RflagsBits::AF, flags::AF),
        (RflagsBits::CF, flags::CF),
        (RflagsBits::PF, flags::PF),
    ]
    .iter()
    .filter(|(iced, _)| bits & iced != 0)
    .fold(0, |all, (_, flag)| all | flag)
}

#[cfg(test)]
#[path = "compare_tests.rs"]
mod tests;
