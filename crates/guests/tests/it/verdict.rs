//! Compares what a guest printed with the table.

use berth_guests::{Expect, Guest, Line, Report};

/// Who ran the guest.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// Must pass everything.
    Berth,
    /// May fail the checks listed as deviations.
    Qemu,
}

/// What is wrong with a run; empty when nothing is.
pub fn judge(
    guest: &Guest,
    processor: Processor,
    status: Option<i32>,
    stdout: &str,
    stderr: &str,
) -> Vec<String> {
    match guest.expect {
        Expect::Checks(count) => judge_checks(guest, processor, status, stdout, stderr, count),
        Expect::Reset(text) => {
            let mut problems = Vec::new();
            if !stdout.contains(text) {
                problems.push(format!("did not print {text:?} before the reset: {stderr}"));
            }
            if stdout.contains("FAIL") {
                problems.push("did not reset".into());
            }
            let want = if processor == Processor::Qemu { 0 } else { 1 };
            if status != Some(want) {
                problems.push(format!("exit status {status:?} instead of {want}: {stderr}"));
            }
            if processor == Processor::Berth && stderr.lines().count() != 1 {
                problems.push(format!("stderr is not one line: {stderr:?}"));
            }
            problems
        }
    }
}

fn judge_checks(
    guest: &Guest,
    processor: Processor,
    status: Option<i32>,
    stdout: &str,
    stderr: &str,
    count: usize,
) -> Vec<String> {
    let mut report = Report::parse(stdout);
    let lost_at = guest.qemu_lost_at.filter(|_| processor == Processor::Qemu);
    if let Some(lost_at) = lost_at {
        let at = report.lines.iter().position(
            |line| matches!(line, Line::Ok(name) | Line::Fail(name, _) if name == lost_at),
        );
        report.lines.truncate(at.unwrap_or(report.lines.len()));
    }
    let mut problems = Vec::new();
    let mut failures = 0;
    for (name, detail) in report.failures() {
        failures += 1;
        let known = guest.qemu_differs.iter().find(|d| d.check == name);
        match known {
            Some(deviation) if processor == Processor::Qemu => {
                println!("  qemu differs: {name}: {detail} ({})", deviation.manual);
            }
            _ => problems.push(format!("{name}: {detail}")),
        }
    }
    if lost_at.is_some() {
        return problems;
    }
    if !report.done {
        problems.push(format!("did not come to its end; status {status:?}, stderr {stderr:?}"));
    } else if report.lines.len() != count {
        problems.push(format!("made {} checks instead of {count}", report.lines.len()));
    }
    let want = (failures.min(100) << 1) | 1;
    if status != Some(want) {
        problems.push(format!("exit status {status:?} instead of {want}"));
    }
    problems
}
