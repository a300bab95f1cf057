//! Compares two outcomes of a case, leaving out what the manuals leave undefined.
//!
//! Undefined flags come from iced-x86's tables (`rflags_undefined`), which follow the flag tables
//! of the Intel SDM (vol. 1, appendix A) and the AMD APM (vol. 3, appendix F). A flag is ignored at
//! the end of a case when some path to the place where it stopped left it undefined last.
//!
//! Also left out, with the source: the x87's last instruction and operand pointer and opcode
//! (Intel SDM vol. 1, 8.1.8: deprecated, differs by processor), RF in saved flags (vol. 3, 18.3.1.1:
//! by kind of exception), bit P of the error code for addresses of the kernel (Linux sets it to hide
//! its page tables), which of two possible faults is taken, and vector registers and masks of a gather that faulted (vol. 2, VGATHER:
//! elements above the faulting one may or may not be done).

use berth_x86::state::{XsaveArea, flags, vector};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, RflagsBits};

use crate::case::{Case, Final, Mode, Outcome};

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
        let apart = native.fault.cr2.wrapping_sub(other.fault.cr2) as i64;
        let other_page =
            apart != 0 && apart.unsigned_abs() < 512 && at.as_ref().is_some_and(many_accesses);
        // The other page may be there and read-only where this one is missing.
        let present = u32::from(other_page);
        let hidden = hidden_bits(&native.fault) | present;
        let error = |f: &Final| u64::from(f.fault.error & !hidden);
        check("error code", error(native), error(other));
        if !other_page {
            check("cr2", native.fault.cr2, other.fault.cr2);
        }
    }
    check("rip", native.rip, other.rip);
    // When no element was moved, whether RCX, RSI and RDI lose their upper halves differs by
    // processor.
    let narrow = case.mode == Mode::Bits64 && at.as_ref().is_some_and(narrow_string);
    for (i, name) in NAMES.iter().enumerate() {
        let shown = if narrow && matches!(i, 1 | 6 | 7) { 0xffff_ffff } else { u64::MAX };
        check(name, native.gpr[i] & shown, other.gpr[i] & shown);
    }
    let mask = !(undefined_flags(case, native.rip) | flags::RF);
    check("rflags", native.rflags & mask, other.rflags & mask);
    for (i, name) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().enumerate() {
        check(name, visible(native.selectors[i]), visible(other.selectors[i]));
    }
    check("fs base", native.fs_base, other.fs_base);
    check("gs base", native.gs_base, other.gs_base);
    if !stopped_in_gather(case, native) {
        let (mut a, mut b) = (normalize(&native.xsave), normalize(&other.xsave));
        if at.as_ref().is_some_and(|i| i.mnemonic() == iced_x86::Mnemonic::Vcvtps2ph) {
            // The conversion has set its flags when its store faults on some processors.
            (a.0[24], b.0[24]) = (a.0[24] & 0xc0, b.0[24] & 0xc0);
        }
        xsave(&a, &b, &mut found);
    }
    if !(image_elsewhere(case) || at.as_ref().is_some_and(|i| half_stored(i, native))) {
        memory(case, native, other, &mut found);
    }
    found
}

/// Whether an x87 image may lie elsewhere than the generator thought, because a branch skipped the
/// instructions that computed its address: what it holds of the last x87 instruction is not masked
/// then.
fn image_elsewhere(case: &Case) -> bool {
    use iced_x86::FlowControl;
    !case.masked.is_empty()
        && decode(case).iter().any(|i| i.flow_control() == FlowControl::ConditionalBranch)
}

/// A store of ten bytes whose last two fault: some processors have stored the first eight.
fn half_stored(i: &Instruction, native: &Final) -> bool {
    use iced_x86::Code;
    matches!(i.code(), Code::Fbstp_m80bcd | Code::Fstp_m80fp) && native.fault.vector == vector::PF
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

fn memory(case: &Case, native: &Final, other: &Final, found: &mut Vec<Difference>) {
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
        let shown = mask_of(case, at);
        // A masked word may have changed in one backend only.
        let same = match (x, y) {
            (Some(x), Some(y)) => x & shown == y & shown,
            _ => shown != u64::MAX && shown == 0,
        };
        if !same && (shown == u64::MAX || x.is_some() && y.is_some()) {
            let text = |v: Option<u64>| v.map_or("unchanged".to_owned(), |v| format!("{v:#018x}"));
            let linear = case.world.linear(at).unwrap_or_default();
            found.push(difference(format!("memory at {linear:#x}"), text(x), text(y)));
        }
    }
}

/// Which bits of the word at an image offset are compared.
fn mask_of(case: &Case, at: u32) -> u64 {
    let hidden = |byte: u32| case.masked.iter().any(|(o, l)| (*o..*o + *l).contains(&byte));
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

/// Whether the processor may choose between two faults: a string instruction with two bad operands,
/// or an access beyond the end of a 4 GiB segment (Intel SDM vol. 3, 5.3: may or may not fault).
fn either_fault(case: &Case, at: Option<&Instruction>, native: &Final, other: &Final) -> bool {
    let fault = |f: &Final| matches!(f.fault.vector, vector::GP | vector::SS | vector::PF);
    let two = at.is_some_and(|i| {
        i.is_string_instruction() && i.op_kinds().all(|k| k != iced_x86::OpKind::Register)
    });
    let wraps = case.mode == Mode::Compat32
        && native.fault.vector == vector::PF
        && native.fault.cr2 > 0xffff_ffff - 64;
    fault(native) && fault(other) && (two || wraps)
}

/// A string instruction with the 67 prefix in 64-bit mode.
fn narrow_string(i: &Instruction) -> bool {
    use iced_x86::OpKind as K;
    i.is_string_instruction()
        && i.op_kinds().any(|k| matches!(k, K::MemorySegESI | K::MemoryESEDI | K::MemorySegEDI))
}

/// Instructions that access memory in pieces, or only some of it: which address is reported first
/// differs by processor.
fn many_accesses(i: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    matches!(
        i.mnemonic(),
        M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Fldenv
            | M::Fnstenv
            | M::Frstor
            | M::Fnsave
            | M::Fxsave
            | M::Fxsave64
            | M::Fxrstor
            | M::Fxrstor64
    )
}

fn stopped_in_gather(case: &Case, native: &Final) -> bool {
    native.fault.vector != vector::BP
        && decode(case).iter().any(|i| i.ip() == native.rip && i.is_vsib())
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
fn conditional_flags(ins: &Instruction) -> bool {
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
