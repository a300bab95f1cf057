//! The boot benchmark: the same kernel, initramfs, disk, memory and command line in `berth vm run` and
//! in QEMU's own translator, in turn.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bench::files;
use crate::bench::guest::Running;
use crate::bench::results::{Results, Sample};
use crate::bench::system::{System, berth, qemu};

/// What the init in the initramfs prints first.
const MARKER: &str = "berth: init";
const BOOT_LIMIT: Duration = Duration::from_secs(120);
const COMMAND_LINE: &str = "console=ttyS0 quiet panic=-1";
/// How long a guest has to come to rest, and how long it is watched then.
const REST: Duration = Duration::from_secs(3);
const IDLE: Duration = Duration::from_secs(10);

/// Boots each `runs` times.
pub fn measure(program: &Path, runs: usize, no_qemu: bool, results: &mut Results) -> Result<()> {
    let files = files::for_boot()?;
    let mut overhead = Vec::new();
    for run in 1..=runs {
        let mut times = Vec::new();
        let ours = berth(program, &files, 1, COMMAND_LINE);
        let (time, mut running) = time_to_marker(ours).context("berth")?;
        overhead.extend(overhead_kib(running.0.id()));
        if run == runs {
            results.idle_percent = Some(idle_percent(&mut running)?);
        }
        drop(running);
        times.push((System::Berth, time));
        if !no_qemu {
            let theirs = qemu(&files, 1, COMMAND_LINE);
            let (time, _) = time_to_marker(theirs).context("qemu-system-x86_64")?;
            times.push((System::Qemu, time));
        }
        for (system, time) in times {
            eprintln!("run {run}: boot in {}, {:.3} s", system.as_str(), time.as_secs_f64());
            results.add(system, "boot", "boot", "", Sample::new(&[time.as_nanos() as f64])?);
        }
    }
    overhead.sort_unstable();
    results.overhead_kib = overhead.get(overhead.len() / 2).copied();
    Ok(())
}

/// How much of a processor a guest takes that has nothing to do.
fn idle_percent(running: &mut Running) -> Result<f64> {
    std::thread::sleep(REST);
    let (began, before) = (Instant::now(), processor_time(running.0.id())?);
    std::thread::sleep(IDLE);
    let used = processor_time(running.0.id())?.saturating_sub(before);
    if let Some(status) = running.0.try_wait()? {
        bail!("an idle guest ended: {status}");
    }
    Ok(used.as_secs_f64() / began.elapsed().as_secs_f64() * 100.0)
}

/// What all threads of a process have used so far.
fn processor_time(pid: u32) -> Result<Duration> {
    let mut total = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        // Nanoseconds on a processor come first.
        let text = std::fs::read_to_string(task?.path().join("schedstat"))?;
        let word = text.split(' ').next().and_then(|word| word.parse::<u64>().ok());
        total += word.with_context(|| format!("not scheduling statistics: {text}"))?;
    }
    Ok(Duration::from_nanos(total))
}

/// The time from the start of the process to the marker, and the process, which goes on.
fn time_to_marker(mut command: Command) -> Result<(Duration, Running)> {
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
        Ok(Ok(time)) => Ok((time, running)),
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

/// Resident memory of a process without its guest's RAM, each page counted once: what is mapped
/// twice (generated code) is counted by its proportional share.
pub fn overhead_kib(pid: u32) -> Option<u64> {
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
    }
}
