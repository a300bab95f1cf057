//! Guests that write rubbish into every device, into configuration space, ports and MSRs. The program
//! must stay alive, in bounds and under control, whatever they do.

use std::fs::{self, File};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::guest::{Ran, Running, berth, turn};

const MARK: &[u8] = b"berth-rubbish-1\0";
const GUEST_KIB: u64 = 64 << 10;
/// What the program may have beyond the guest's memory.
const OVERHEAD_KIB: u64 = 96 << 10;

/// How much a guest may destroy.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    /// It spares itself and the machine's end, and says at its end whether each device still works.
    Careful,
    /// It spares nothing.
    Wild,
}

/// The guest with other settings; where they are is described in its source.
fn guest(seed: u64, manner: Manner, rounds: u32) -> Vec<u8> {
    let guest = berth_guests::all().iter().find(|guest| guest.name == "rubbish").unwrap();
    let mut elf = guest.elf.to_vec();
    let at = elf.windows(MARK.len()).position(|bytes| bytes == MARK).unwrap() + MARK.len();
    elf[at..at + 8].copy_from_slice(&seed.to_le_bytes());
    elf[at + 8..at + 12].copy_from_slice(&u32::from(manner == Manner::Wild).to_le_bytes());
    elf[at + 12..at + 16].copy_from_slice(&rounds.to_le_bytes());
    elf
}

fn has_passt() -> bool {
    std::process::Command::new("passt").arg("--version").output().is_ok()
}

/// The most memory it had so far.
fn peak_kib(child: &Running) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", child.0.id())).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}

/// Runs it with every device there is. One that runs longer than `patience` is ended by a signal,
/// which must be enough.
fn run(directory: &Path, elf: &[u8], options: &[&str], patience: Duration) -> (Ran, bool) {
    let path = |name: &str| directory.join(name).to_str().unwrap().to_owned();
    for name in ["a", "b"] {
        File::create(path(name)).unwrap().set_len(1 << 20).unwrap();
    }
    fs::write(path("guest"), elf).unwrap();
    let (writable, read_only) = (path("a"), format!("{},ro", path("b")));
    let console = format!("file={}", path("console"));
    let mut command = berth(&["vm", "run", "--memory", "64M", "--kernel", &path("guest")]);
    command.args(["--disk", &writable, "--disk", &read_only, "--virtio-console", &console]);
    command.args(["--net", if has_passt() { "user" } else { "none" }]).args(options);
    let files = ["out", "err"].map(|name| File::create(path(name)).unwrap());
    let [out, err] = files;
    let mut child = Running::start(command.stdin(Stdio::null()).stdout(out).stderr(err));
    let (began, mut peak, mut signalled) = (Instant::now(), 0, false);
    let status = loop {
        peak = peak.max(peak_kib(&child));
        if let Some(status) = child.0.try_wait().unwrap() {
            break status;
        }
        if began.elapsed() > patience && !signalled {
            signalled = true;
            kill_process(Pid::from_child(&child.0), Signal::TERM).unwrap();
        }
        assert!(began.elapsed() < patience + Duration::from_secs(15), "SIGTERM does not end it");
        std::thread::sleep(Duration::from_millis(10));
    };
    assert!(peak < GUEST_KIB + OVERHEAD_KIB, "{peak} KiB");
    let stdout = fs::read(path("out")).unwrap();
    let stderr = fs::read_to_string(path("err")).unwrap();
    (Ran { status: status.code(), stdout, stderr }, signalled)
}

fn check_careful(accel: &str, seeds: std::ops::Range<u64>, rounds: u32, patience: Duration) {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    for seed in seeds {
        let elf = guest(seed, Manner::Careful, rounds);
        let options = ["--debug-exit", "--accel", accel];
        let (ran, signalled) = run(directory.path(), &elf, &options, patience);
        assert!(!signalled, "{accel}, seed {seed}: too long; {}", ran.text());
        ran.check(1);
        assert!(ran.text().contains("done: 6 ok, 0 failed"), "seed {seed}: {}", ran.text());
    }
}

/// Any end will do but a panic, a death by a signal that nobody sent, or none at all.
fn check_wild(accel: &str, seeds: std::ops::Range<u64>, patience: Duration) {
    let _turn = turn();
    let directory = tempfile::tempdir().unwrap();
    for seed in seeds {
        let elf = guest(seed, Manner::Wild, 4);
        let (ran, signalled) = run(directory.path(), &elf, &["--accel", accel], patience);
        let (status, said) = (ran.status, &ran.stderr);
        assert!(matches!(status, Some(0 | 1)), "{accel}, seed {seed}: {status:?}: {said}");
        assert!(!said.contains("panicked"), "{accel}, seed {seed}: {said}");
        assert_eq!(said.contains("was stopped"), signalled, "{accel}, seed {seed}: {said}");
    }
}

#[test]
fn devices_work_after_rubbish_translated() {
    check_careful("translate", 1..41, 4, Duration::from_secs(60));
}

#[test]
fn a_guest_that_spares_nothing_is_contained_translated() {
    check_wild("translate", 1000..1024, Duration::from_secs(1));
}

#[test]
fn devices_work_after_rubbish_under_kvm() {
    if Path::new("/dev/kvm").exists() {
        // Where KVM emulates kernels in software this takes seconds.
        check_careful("kvm", 1..3, 1, Duration::from_secs(120));
    } else {
        println!("skipped: no /dev/kvm");
    }
}

#[test]
fn a_guest_that_spares_nothing_is_contained_under_kvm() {
    if Path::new("/dev/kvm").exists() {
        check_wild("kvm", 1000..1004, Duration::from_secs(3));
    } else {
        println!("skipped: no /dev/kvm");
    }
}
