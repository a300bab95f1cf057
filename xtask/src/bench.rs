//! The boot benchmark: the same kernel, initramfs, disk, memory and command line in `berth vm run` and
//! in QEMU's own translator, in turn, so that whatever else the host does meets both.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use berth_image::agent;
use berth_image::initramfs;
use berth_image::store::{ImageName, Store};

/// Boots of each when not told otherwise.
pub const RUNS_DEFAULT: usize = 5;
/// What the init in the initramfs prints first.
const MARKER: &str = "berth: init";
const BOOT_LIMIT: Duration = Duration::from_secs(120);
/// What the machine must reach, as a multiple of QEMU's time.
const RATIO_GOAL: f64 = 1.5;
/// What the process may use beyond guest RAM, in MiB.
const MEMORY_GOAL_MIB: u64 = 64;
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1";
const MEMORY_MIB: &str = "512";

struct Files {
    kernel: PathBuf,
    initrd: PathBuf,
    disk: PathBuf,
}

/// Boots each `runs` times and prints the medians and their ratio.
pub fn boot(runs: usize) -> Result<()> {
    if runs == 0 {
        bail!("at least one run is needed");
    }
    let files = files()?;
    let berth = crate::target().join("release/berth");
    let (mut ours, mut theirs, mut overhead) = (Vec::new(), Vec::new(), Vec::new());
    for run in 1..=runs {
        let (our_time, memory) = time_to_marker(berth_command(&berth, &files)).context("berth")?;
        let (their_time, _) = time_to_marker(qemu_command(&files)).context("qemu-system-x86_64")?;
        overhead.extend(memory);
        println!(
            "run {run}: berth {:.3} s, qemu {:.3} s",
            our_time.as_secs_f64(),
            their_time.as_secs_f64()
        );
        ours.push(our_time);
        theirs.push(their_time);
    }
    let (our_median, their_median) = (median(&mut ours), median(&mut theirs));
    let ratio = our_median.as_secs_f64() / their_median.as_secs_f64();
    println!("\nboot to init    median    fastest   slowest");
    for (name, times) in [("berth", &ours), ("qemu (tcg)", &theirs)] {
        let seconds = |at: usize| times.get(at).map_or(0.0, Duration::as_secs_f64);
        println!(
            "{name:<14} {:>6.3} s  {:>6.3} s  {:>6.3} s",
            seconds(times.len() / 2),
            seconds(0),
            seconds(times.len() - 1)
        );
    }
    println!("ratio          {ratio:.2} (goal: at most {RATIO_GOAL})");
    overhead.sort_unstable();
    if let Some(kib) = overhead.get(overhead.len() / 2) {
        println!(
            "\nmemory of berth beyond guest RAM at that moment: {:.1} MiB (goal: under {MEMORY_GOAL_MIB})",
            *kib as f64 / 1024.0
        );
    }
    Ok(())
}

fn files() -> Result<Files> {
    let root = match std::env::var_os("BERTH_ROOT") {
        Some(root) => PathBuf::from(root),
        None => PathBuf::from("/var/lib/berth"),
    };
    let store = Store::open(&root)?;
    let image = store.find(&ImageName::parse("debian:bookworm")?)?;
    if std::env::var_os("BERTH_AGENT").is_none() {
        // The search begins beside the running program, which for xtask is not where berth is.
        let built = crate::target().join("agent/x86_64-unknown-linux-gnu/agent/berth-agent");
        if !built.exists() {
            bail!("{} does not exist; run `cargo xtask agent`", built.display());
        }
    }
    let initrd = initramfs::for_image(&image, &agent::find()?)?;
    Ok(Files { kernel: image.kernel(), initrd, disk: image.root_disk() })
}

fn berth_command(berth: &Path, files: &Files) -> Command {
    let mut command = Command::new(berth);
    command
        .args(["vm", "run", "--net", "none", "--cpus", "1", "--accel", "translate"])
        .args(["--memory", &format!("{MEMORY_MIB}M"), "--append", COMMAND_LINE])
        .arg("--kernel")
        .arg(&files.kernel)
        .arg("--initrd")
        .arg(&files.initrd)
        .arg("--disk")
        .arg(format!("{},ro", files.disk.display()));
    command
}

fn qemu_command(files: &Files) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args([
            "-accel",
            "tcg",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
            "-serial",
            "stdio",
        ])
        .args(["-smp", "1", "-m", MEMORY_MIB, "-append", COMMAND_LINE])
        .arg("-kernel")
        .arg(&files.kernel)
        .arg("-initrd")
        .arg(&files.initrd)
        .arg("-drive")
        .arg(format!("file={},format=raw,if=virtio,readonly=on", files.disk.display()));
    command
}

/// The time from the start of the process to the marker; the process is ended then.
fn time_to_marker(mut command: Command) -> Result<(Duration, Option<u64>)> {
    let began = Instant::now();
    let child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut running = Running(child);
    let stdout = running.0.stdout.take().context("no standard output")?;
    let (said, heard) = mpsc::channel();
    std::thread::spawn(move || {
        let mut last = String::new();
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            last = String::from_utf8_lossy(&line).into_owned();
            if last.contains(MARKER) {
                let _ = said.send(Ok(began.elapsed()));
                return;
            }
        }
        let _ = said.send(Err(last));
    });
    match heard.recv_timeout(BOOT_LIMIT) {
        Ok(Ok(time)) => Ok((time, overhead_kib(running.0.id()))),
        Ok(Err(last)) => {
            let mut complaint = String::new();
            if let Some(mut stderr) = running.0.stderr.take() {
                std::io::Read::read_to_string(&mut stderr, &mut complaint)?;
            }
            bail!("ended before init; last said: {last}\n{complaint}")
        }
        Err(_) => bail!("no init after {} s", BOOT_LIMIT.as_secs()),
    }
}

/// Ends the process however we leave.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Resident memory of a process without its guest's RAM, each page counted once: what is mapped
/// twice (generated code) is counted by its proportional share.
fn overhead_kib(pid: u32) -> Option<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let (mut total, mut guest) = (0, false);
    for line in maps.lines() {
        if let Some(rest) = line.strip_prefix("Pss:") {
            let kib: u64 = rest.trim().strip_suffix(" kB")?.trim().parse().ok()?;
            total += if guest { 0 } else { kib };
        } else if line.split_whitespace().next().is_some_and(|word| word.contains('-')) {
            guest = line.contains("berth-ram");
        }
    }
    Some(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_marker_is_awaited_and_its_absence_reported() {
        let shell = |script: &str| {
            let mut command = Command::new("/bin/sh");
            command.args(["-c", script]);
            command
        };
        let time = time_to_marker(shell("sleep 0.05; echo 'berth: init'; sleep 100")).unwrap();
        assert!(
            time.0 >= Duration::from_millis(50) && time.0 < Duration::from_secs(50),
            "{time:?}"
        );
        let error = time_to_marker(shell("echo hello; echo oops >&2")).unwrap_err().to_string();
        assert!(error.contains("hello") && error.contains("oops"), "{error}");
        assert_eq!(median(&mut [5, 1, 3].map(Duration::from_secs)), Duration::from_secs(3));
    }
}
