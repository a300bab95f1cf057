//! `--kernel` without an image: the console on standard output, standard input to the guest, how it
//! ends; and files and guests that are broken or hostile.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::guest::{Debian, ECHO, Ran, berth, multiboot, run, run_within, turn};

fn file(directory: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = directory.join(name);
    fs::write(&path, bytes).unwrap();
    path
}

fn boot(kernel: &Path, options: &[&str], stdin: &[u8]) -> Ran {
    let mut command = berth(&["vm", "run", "--memory", "64M", "--kernel"]);
    command.arg(kernel).args(options);
    run_within(&mut command, stdin, Duration::from_secs(60))
}

fn boot_code(code: &[u8], options: &[&str], stdin: &[u8]) -> Ran {
    let directory = tempfile::tempdir().unwrap();
    let kernel = file(directory.path(), "guest", &multiboot::kernel(code));
    boot(&kernel, options, stdin)
}

#[test]
fn the_debug_exit_value_is_the_status() {
    for value in [0u8, 1, 21, 127] {
        // mov al, VALUE; out 0xf4, al; hlt
        let code = [0xb0, value, 0xe6, 0xf4, 0xf4];
        let ran = boot_code(&code, &["--debug-exit"], b"");
        ran.check(i32::from(value) * 2 + 1);
        assert_eq!((ran.text().as_str(), ran.stderr.as_str()), ("", ""));
    }
}

/// mov al, 21; out 0xf4, al; hlt
const EXITS: [u8; 5] = [0xb0, 21, 0xe6, 0xf4, 0xf4];

#[test]
fn the_translator_says_what_it_did() {
    let directory = tempfile::tempdir().unwrap();
    let list = directory.path().join("blocks");
    let dump = format!("--dump-blocks={}", list.display());
    let ran = boot_code(&EXITS, &["--debug-exit", "--accel", "translate", "--stats", &dump], b"");
    ran.check(43);
    for part in ["vCPU 0\n  blocks     ", " interrupts, ", "1 out"] {
        assert!(ran.stderr.contains(part), "no `{part}` in: {}", ran.stderr);
    }
    let text = fs::read_to_string(&list).unwrap();
    for part in ["32 bits, supervisor\n", "mov al, 15h\n", "out 0F4h, al\n", "call helper\n"] {
        assert!(text.contains(part), "no `{part}` in: {text}");
    }
    let ran = boot_code(&EXITS, &["--debug-exit", "--accel", "translate", "--dump-blocks"], b"");
    ran.check(43);
    assert!(ran.stderr.contains("out 0F4h, al"), "{}", ran.stderr);
    let ran = boot_code(&EXITS, &["--debug-exit", "--dump-blocks=/nonexistent/list"], b"");
    ran.check(1);
    assert!(ran.stderr.contains("/nonexistent/list"), "{}", ran.stderr);
}

#[test]
fn optimizations_are_chosen_by_name() {
    let choose = |list| boot_code(&EXITS, &["--debug-exit", "--translator-opt", list], b"");
    for list in ["none", "no-shared,no-pairs", "none,strings"] {
        choose(list).check(43);
    }
    let ran = choose("fast");
    ran.check(2);
    assert!(ran.stderr.contains("\"fast\"") && ran.stderr.contains("neighbours"), "{}", ran.stderr);
}

#[test]
fn limits_of_the_shell_are_met_or_errors() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = file(directory.path(), "guest", &multiboot::kernel(&EXITS));
    let limited = |limit: &str| {
        let mut command = std::process::Command::new("/bin/sh");
        let script = format!("ulimit {limit} && exec \"$@\"");
        command.args(["-c", script.as_str(), "sh", env!("CARGO_BIN_EXE_berth")]);
        command.args(["vm", "run", "--memory", "64M", "--debug-exit", "--kernel"]).arg(&kernel);
        run(&mut command, b"")
    };
    limited("-S -n 16").check(43);
    // No file may be that large, and guest memory is one.
    let ran = limited("-f 1");
    ran.check(1);
    assert!(ran.stderr.contains("File too large"), "{}", ran.stderr);
}

#[test]
fn standard_input_reaches_the_guest_and_its_console_is_standard_output() {
    let mut stdin = b"HAL".repeat(1000);
    stdin.push(0);
    let ran = boot_code(&ECHO, &["--debug-exit"], &stdin);
    ran.check(3);
    assert!(ran.stdout == b"IBM".repeat(1000), "{:?}", ran.text());
    assert_eq!(ran.stderr, "");
}

#[test]
fn a_triple_fault_is_a_failure_with_one_line() {
    // lidt of an empty table, then int3.
    let code = [0x0f, 0x01, 0x1d, 0, 0, 0x09, 0, 0xcc];
    boot_code(&code, &[], b"").check_failed(&["triple fault"]);
}

#[test]
fn an_endless_guest_is_ended_by_a_signal() {
    for signal in [rustix::process::Signal::TERM, rustix::process::Signal::HUP] {
        let directory = tempfile::tempdir().unwrap();
        // mov dx, 0x3f8; mov al, 'x'; out dx, al; jmp $
        let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfe];
        let kernel = file(directory.path(), "guest", &multiboot::kernel(&code));
        let mut command = berth(&["vm", "run", "--memory", "64M", "--cpus", "2", "--kernel"]);
        let piped = command.arg(kernel).stdin(std::process::Stdio::null());
        let piped = piped.stdout(std::process::Stdio::piped());
        let mut child = crate::guest::Running::start(piped);
        let mut byte = [0];
        std::io::Read::read_exact(&mut child.stdout(), &mut byte).unwrap();
        assert_eq!(&byte, b"x");
        let pid = rustix::process::Pid::from_child(&child.0);
        rustix::process::kill_process(pid, signal).unwrap();
        assert_eq!(child.wait(Duration::from_secs(10)), Some(1));
    }
}

#[test]
fn a_guest_full_of_rubbish_writes_is_contained() {
    let _turn = turn();
    let guest = berth_guests::all().iter().find(|guest| guest.name == "hostile").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let kernel = file(directory.path(), "hostile", guest.elf);
    let ran = boot(&kernel, &["--debug-exit", "--accel", "translate"], b"");
    ran.check(1);
    assert!(ran.text().contains("done: ") && ran.text().contains(" 0 failed"), "{}", ran.text());
}

/// Bytes that look like nothing.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 32) as u8
    })
    .take(len)
    .collect()
}

#[test]
fn random_kernels_are_refused_with_one_line() {
    let directory = tempfile::tempdir().unwrap();
    for (number, len) in [1, 511, 512, 4096, 1 << 20, 9 << 20].into_iter().enumerate() {
        let kernel = file(directory.path(), "noise", &noise(len, number as u64 + 77));
        boot(&kernel, &[], b"").check_failed(&["noise"]);
    }
    let mut head = noise(1 << 16, 5);
    for magic in [&b"\x7fELF\x02\x01\x01"[..], b"\x7fELF\x01\x01\x01"] {
        head[..magic.len()].copy_from_slice(magic);
        let kernel = file(directory.path(), "noise", &head);
        boot(&kernel, &[], b"").check_failed(&["noise"]);
    }
}

#[test]
fn oversized_kernels_are_refused_with_one_line() {
    let directory = tempfile::tempdir().unwrap();
    let guest = berth_guests::all().iter().find(|guest| guest.name == "triple_fault").unwrap();
    // Sparse, with a good head: larger than the machine, and larger than is read at all.
    for len in [65 << 20, 3 << 30] {
        let kernel = file(directory.path(), "large", guest.elf);
        fs::File::options().write(true).open(&kernel).unwrap().set_len(len).unwrap();
        let ran = boot(&kernel, &[], b"");
        // Bytes behind the segments need not fit; a file beyond the limit is not read.
        ran.check(1);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        assert!(len < 1 << 30 || ran.stderr.contains("large"), "{}", ran.stderr);
    }
}

#[test]
fn truncated_multiboot_kernels_fail_in_order() {
    let guest = berth_guests::all().iter().find(|guest| guest.name == "triple_fault").unwrap();
    let directory = tempfile::tempdir().unwrap();
    for part in 1..16 {
        let cut = &guest.elf[..guest.elf.len() * part / 16];
        let kernel = file(directory.path(), "cut", cut);
        let ran = boot(&kernel, &[], b"");
        // Either the loader sees it, or a guest without its end runs into nothing.
        ran.check(1);
        assert_eq!(ran.stderr.lines().count(), 1, "{part}/16: {}", ran.stderr);
    }
}

#[test]
fn truncated_and_damaged_linux_kernels_fail_in_order() {
    let Some(debian) = Debian::take() else { return };
    let whole = fs::read(debian.image.kernel()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    // By the boot protocol; behind it is a signature that nobody needs here.
    let paragraphs = u32::from_le_bytes(whole[0x1f4..0x1f8].try_into().unwrap()) as usize;
    let end = (usize::from(whole[0x1f1]) + 1) * 512 + paragraphs * 16;
    assert!(end <= whole.len(), "{end} > {}", whole.len());
    for cut in [513, 0x260, 5000, end / 4, end - 4096, end - 16] {
        let kernel = file(directory.path(), "cut", &whole[..cut]);
        let options = ["--append", "console=ttyS0"];
        let mut command = berth(&["vm", "run", "--kernel"]);
        command.arg(&kernel).args(options);
        let ran = run_within(&mut command, b"", Duration::from_secs(60));
        ran.check_failed(&["cut"]);
    }
    // Noise where the compressed kernel is: the kernel's own loader stops the machine by its means,
    // which may be to wait for ever; then a signal must still end it.
    let mut damaged = whole;
    let middle = damaged.len() / 2;
    damaged[middle..middle + 4096].copy_from_slice(&noise(4096, 3));
    let kernel = file(directory.path(), "damaged", &damaged);
    let mut command = berth(&["vm", "run", "--append", "console=ttyS0", "--kernel"]);
    let ran = run_within(command.arg(&kernel), b"", Duration::from_secs(10));
    assert!(ran.status.is_none_or(|status| status == 1), "{:?}", ran.status);
    assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
}

#[test]
fn linux_without_a_root_panics_and_that_is_a_failure() {
    let Some(debian) = Debian::take() else { return };
    let mut command = berth(&["vm", "run", "--append", "console=ttyS0", "--kernel"]);
    let ran = run(command.arg(debian.image.kernel()), b"");
    ran.check_failed(&["the guest reset itself"]);
    assert!(ran.text().contains("Unable to mount root fs"), "{}", ran.text());
}

#[test]
fn broken_initrds_are_the_guests_failure() {
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let boot = |initrd: &Path, memory: &str| {
        let mut command = berth(&["vm", "run", "--memory", memory, "--kernel"]);
        command.arg(debian.image.kernel()).arg("--initrd").arg(initrd);
        run(command.args(["--append", "console=ttyS0"]), b"")
    };
    let random = file(directory.path(), "random", &noise(1 << 20, 9));
    boot(&random, "512M").check_failed(&["the guest reset itself"]);
    let made = fs::read_dir(debian.image.initramfs_directory());
    if let Some(Ok(entry)) = made.ok().and_then(|mut entries| entries.next()) {
        let whole = fs::read(entry.path()).unwrap();
        let cut = file(directory.path(), "cut", &whole[..whole.len() / 3]);
        boot(&cut, "512M").check_failed(&["the guest reset itself"]);
    }
    let huge = directory.path().join("huge");
    fs::File::create(&huge).unwrap().set_len(1 << 30).unwrap();
    boot(&huge, "512M").check_failed(&["huge"]);
}

#[test]
fn memory_that_is_too_small_for_linux_is_an_error() {
    let Some(debian) = Debian::take() else { return };
    for memory in ["1M", "4M", "8M", "16M"] {
        let mut command = berth(&["vm", "run", "--memory", memory, "--kernel"]);
        let command = command.arg(debian.image.kernel()).args(["--append", "console=ttyS0"]);
        run_within(command, b"", Duration::from_secs(60)).check_failed(&["memory"]);
    }
}
