//! Runs every guest: under QEMU TCG (the second opinion, with `BERTH_GUESTS_ORACLE=qemu`), and under
//! Berth's own processors.
//!
//! * `BERTH_BIN`: the `berth` program; otherwise the one beside the test program, if it has `vm run`.
//! * `BERTH_GUESTS_ONLY`: run only guests whose name contains this.

mod bus_lock;
mod run;
mod verdict;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use berth_guests::{Guest, Need, all};

use crate::run::{Outcome, run};
use crate::verdict::{Processor, judge};

#[test]
fn under_qemu() {
    if std::env::var("BERTH_GUESTS_ORACLE").as_deref() != Ok("qemu") {
        println!("skipped: BERTH_GUESTS_ORACLE is not \"qemu\"");
        return;
    }
    run_all(Processor::Qemu, |guest, cpus| {
        if let Some(lack) = guest.qemu_skips {
            return Err(format!("QEMU TCG lacks {lack}"));
        }
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args([
                "-accel",
                "tcg",
                "-cpu",
                "max,vendor=GenuineIntel",
                "-m",
                "64",
                "-nodefaults",
                "-display",
                "none",
            ])
            .args(["-monitor", "none", "-serial", "stdio", "-no-reboot", "-smp"])
            .arg(cpus.to_string())
            .args(["-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", guest.path]);
        Ok(command)
    });
}

#[test]
fn translated() {
    let Some(berth) = berth() else { return };
    run_all(Processor::Berth, |guest, cpus| {
        if guest.needs.contains(&Need::BusLocks) && !bus_lock::finish(cpus) {
            return Err(format!(
                "a locked addition across cache lines does not end on this host beside {cpus} threads"
            ));
        }
        Ok(vm_run(&berth, "translate", guest, cpus))
    });
}

#[test]
fn under_kvm() {
    let Some(berth) = berth() else { return };
    if !Path::new("/dev/kvm").exists() {
        println!("skipped: no /dev/kvm");
        return;
    }
    let hardware = std::fs::read_to_string("/proc/cpuinfo")
        .is_ok_and(|s| s.split_ascii_whitespace().any(|w| w == "vmx" || w == "svm"));
    run_all(Processor::Berth, |guest, cpus| {
        if !hardware && !guest.kvm_here() {
            return Err(format!("KVM without hardware under it cannot: {:?}", guest.needs));
        }
        Ok(vm_run(&berth, "kvm", guest, cpus))
    });
}

fn vm_run(berth: &Path, accel: &str, guest: &Guest, cpus: u32) -> Command {
    let mut command = Command::new(berth);
    command
        .args(["vm", "run", "--accel", accel, "--memory", "64M", "--net", "none", "--debug-exit"])
        .args(["--cpus", &cpus.to_string(), "--kernel", guest.path]);
    command
}

/// The program under test, or `None` (with the reason printed) when there is none yet.
fn berth() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("BERTH_BIN") {
        return Some(path.into());
    }
    let exe = std::env::current_exe().expect("a test program has a path");
    let path = exe.ancestors().nth(2).expect("target/PROFILE/deps/it").join("berth");
    let usable = Command::new(&path)
        .args(["vm", "run", "--help"])
        .stdin(Stdio::null())
        .output()
        .is_ok_and(|o| o.status.success() && !o.stdout.is_empty());
    if usable {
        return Some(path);
    }
    println!("skipped: {} is not there or has no `vm run` (set BERTH_BIN)", path.display());
    None
}

/// Whether this processor goes astray in this guest by what it is known to do.
fn lost(guest: &Guest, processor: Processor) -> bool {
    processor == Processor::Qemu && guest.qemu_lost_at.is_some()
}

fn limit(guest: &Guest, processor: Processor) -> Duration {
    if lost(guest, processor) { Duration::from_secs(5) } else { guest.timeout }
}

/// Runs each guest with each number of vCPUs and fails with all differences together.
fn run_all(processor: Processor, command: impl Fn(&Guest, u32) -> Result<Command, String>) {
    let only = std::env::var("BERTH_GUESTS_ONLY").unwrap_or_default();
    let mut problems = Vec::new();
    for guest in all().iter().filter(|g| g.name.contains(&only)) {
        for &cpus in guest.cpus {
            let title = format!("{} ({cpus} vCPU)", guest.name);
            let outcome = match command(guest, cpus) {
                Ok(command) => run(command, limit(guest, processor)),
                Err(reason) => {
                    println!("{title}: skipped: {reason}");
                    continue;
                }
            };
            let found = match outcome {
                Outcome::Ended { status, stdout, stderr } => {
                    judge(guest, processor, status, &stdout, &stderr)
                }
                Outcome::Hung { stdout } if lost(guest, processor) => {
                    judge(guest, processor, None, &stdout, "")
                }
                Outcome::Hung { stdout } => {
                    vec![format!("hung; last line: {:?}", stdout.lines().last().unwrap_or(""))]
                }
                Outcome::NotStarted(error) => vec![format!("not started: {error}")],
            };
            println!("{title}: {}", if found.is_empty() { "ok" } else { "FAILED" });
            problems.extend(found.into_iter().map(|p| format!("{title}: {p}")));
        }
    }
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}
