//! Prints a case with everything needed to see and repeat it.

use std::fmt::Write;

use iced_x86::{Formatter, IntelFormatter};

use crate::case::{Case, Mode, Outcome};
use crate::compare::{Difference, NAMES, decode};

/// The instructions with addresses and bytes.
#[must_use]
pub fn disassembly(case: &Case) -> String {
    let mut text = String::new();
    let mut formatter = IntelFormatter::new();
    for (span, ins) in case.spans.iter().zip(decode(case)) {
        let start = usize::from(span.start);
        let bytes = case.code.get(start..start + usize::from(span.len)).unwrap_or_default();
        if bytes.iter().all(|b| *b == 0x90) {
            continue;
        }
        let mut line = String::new();
        formatter.format(&ins, &mut line);
        let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
        let _ = writeln!(text, "  {:#x}  {hex:<30}  {line}", ins.ip());
    }
    text
}

/// The state before the first instruction.
#[must_use]
pub fn state(case: &Case) -> String {
    let mut text = String::new();
    for (row, values) in case.gpr.chunks(4).enumerate() {
        for (i, value) in values.iter().enumerate() {
            let _ = write!(text, "  {:>3}={value:#018x}", NAMES[row * 4 + i]);
        }
        text.push('\n');
    }
    let x = &case.xsave.0;
    let mxcsr = u32::from_le_bytes([x[24], x[25], x[26], x[27]]);
    let _ = writeln!(
        text,
        "  rflags={:#x} fs={:#x} gs={:#x} fcw={:#x} fsw={:#x} tags={:#04x} mxcsr={mxcsr:#x}",
        case.rflags,
        case.fs_base,
        case.gs_base,
        u16::from_le_bytes([x[0], x[1]]),
        u16::from_le_bytes([x[2], x[3]]),
        x[4],
    );
    let hex = |bytes: &[u8]| bytes.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
    for i in 0..8 {
        let st = &x[32 + i * 16..42 + i * 16];
        if st.iter().any(|b| *b != 0) {
            let _ = writeln!(text, "  st{i}={}", hex(st));
        }
    }
    for i in 0..16 {
        let (low, high) = (&x[160 + i * 16..176 + i * 16], &x[576 + i * 16..592 + i * 16]);
        if low.iter().chain(high).any(|b| *b != 0) {
            let _ = writeln!(text, "  ymm{i}={}_{}", hex(high), hex(low));
        }
    }
    for patch in &case.patches {
        let linear = case.world.linear(patch.offset).unwrap_or_default();
        let bytes: String = patch.data.iter().map(|b| format!("{b:02x}")).collect();
        let _ = writeln!(text, "  memory {linear:#x}: {bytes}");
    }
    text
}

/// The report of a difference.
#[must_use]
pub fn report(seed: u64, number: u64, case: &Case, differences: &[Difference]) -> String {
    let mode = match case.mode {
        Mode::Bits64 => "64-bit",
        Mode::Compat32 => "32-bit compatibility mode",
    };
    let mut text = format!("difference: difftest --seed {seed} --case {number}   ({mode})\n");
    text.push_str(&disassembly(case));
    text.push_str("before:\n");
    text.push_str(&state(case));
    text.push_str("differences (native, other):\n");
    for d in differences {
        let _ = writeln!(text, "  {:<22} {}  {}", d.what, d.native, d.other);
    }
    text
}

/// An outcome in short.
#[must_use]
pub fn outcome(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Stopped(f) => {
            let mut text = format!(
                "exception {} error {:#x} cr2 {:#x} at {:#x} rflags {:#x}\n",
                f.fault.vector, f.fault.error, f.fault.cr2, f.rip, f.rflags
            );
            for (row, values) in f.gpr.chunks(4).enumerate() {
                for (i, value) in values.iter().enumerate() {
                    let _ = write!(text, "  {:>3}={value:#018x}", NAMES[row * 4 + i]);
                }
                text.push('\n');
            }
            text
        }
        other => format!("{other:?}\n"),
    }
}
