//! Machines that are kept: how long a guest stands still for a snapshot, how soon it goes on, what clones
//! take, and what the daemon takes; QEMU's `savevm`, `-loadvm` and `migrate` beside them.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::bench::files;
use crate::bench::guest::Running;
use crate::bench::monitor::Monitor;
use crate::bench::results::{Figure, Results, Sample};
use crate::bench::system::{System, qemu};

/// How long a guest has to come to rest.
const REST: Duration = Duration::from_secs(5);
/// Clones at once.
const CLONES: usize = 100;
/// Machines in a list.
const MACHINES: usize = 1000;
/// How long the daemon may take to begin.
const LISTENS_WITHIN: Duration = Duration::from_secs(20);
/// Times that something short is done in a run.
const TIMES: usize = 5;
const IMAGE: &str = "debian:bookworm";

/// Measures all of it.
pub fn measure(berth: &Path, runs: usize, no_qemu: bool, results: &mut Results) -> Result<()> {
    let cloud = Cloud::new(berth)?;
    let (mut small, mut large, mut restored, mut begun) = (vec![], vec![], vec![], vec![]);
    cloud.create("a", "512M")?;
    cloud.create("b", "2G")?;
    cloud.vm(&["start", "a", "b"])?;
    for name in ["a", "b"] {
        cloud.vm(&["exec", name, "--", "true"])?;
    }
    std::thread::sleep(REST);
    let mut own_memory = 0;
    for run in 1..=runs {
        for time in 0..TIMES {
            for (name, pauses) in [("a", &mut small), ("b", &mut large)] {
                let tag = format!("t{run}-{time}");
                cloud.vm(&["snapshot", "--tag", &tag, name])?;
                pauses.push(cloud.pause(name, &tag)?);
                std::thread::sleep(Duration::from_millis(300));
            }
            let clone = format!("c{run}-{time}");
            let began = Instant::now();
            cloud.vm(&["clone", "--running", "a", &clone])?;
            cloud.vm(&["exec", &clone, "--", "true"])?;
            begun.push(began.elapsed().as_secs_f64() * 1e3);
            cloud.vm(&["rm", "--force", &clone])?;
        }
        eprintln!("run {run}: snapshots of machines and running clones");
        own_memory = cloud.memory_kib("a")?;
    }
    let clones: Vec<String> = (1..=CLONES).map(|number| format!("d-{number}")).collect();
    cloud.vm(&["clone", "--running", "--count", &CLONES.to_string(), "a", "d"])?;
    for name in &clones {
        cloud.vm(&["exec", name, "--", "true"])?;
    }
    let mut all = cloud.memory_kib("a")?;
    for name in &clones {
        all += cloud.memory_kib(name)?;
    }
    let daemon_kib = cloud.daemon_kib()?;
    for name in &clones {
        cloud.vm(&["rm", "--force", name])?;
    }
    eprintln!("{CLONES} clones at once");
    for run in 1..=runs {
        for time in 0..TIMES {
            let tag = format!("t{run}-{time}");
            let began = Instant::now();
            cloud.vm(&["restore", "--force", "a", &tag])?;
            let whole = began.elapsed().as_nanos() as f64;
            results.add(System::Berth, "restore", "kept", "", Sample::new(&[whole])?);
            restored.push(cloud.goes_on_after("a")?);
        }
        cloud.vm(&["exec", "a", "--", "true"])?;
        std::thread::sleep(REST);
        let began = Instant::now();
        cloud.vm(&["suspend", "a"])?;
        let whole = began.elapsed().as_nanos() as f64;
        results.add(System::Berth, "suspend", "kept", "", Sample::new(&[whole])?);
        if run < runs {
            cloud.vm(&["resume", "a"])?;
        }
    }
    let stored = cloud.folder("a").join("state/suspended/memory");
    let stored = stored.metadata().with_context(|| stored.display().to_string())?;
    let pause = median(&mut small);
    let sample = Sample::new(&[pause * 1e6])?;
    results.add(System::Berth, "snapshot-pause", "kept", "", sample);
    if !no_qemu {
        for run in 1..=runs {
            measure_qemu(&cloud.directory, results).context("qemu-system-x86_64")?;
            eprintln!("run {run}: savevm, loadvm and migrate in QEMU");
        }
    }
    let listed = cloud.list_time()?;
    let clones_mib = (all.saturating_sub(own_memory)) as f64 / 1024.0;
    let share = (stored.blocks() * 512) as f64 / stored.len() as f64;
    for (title, value, limit) in [
        ("guest stands still for a snapshot, 512 MB, ms", pause, 10.0),
        ("the same, 2 GB, ms", median(&mut large), 10.0),
        ("restore to the first instruction, ms", median(&mut restored), 8.0),
        ("running clone until it answers, ms", median(&mut begun), 50.0),
        ("memory of 100 running clones, MiB", clones_mib, 800.0),
        ("suspended, part of its memory", share, 0.4),
        ("daemon with 100 machines, MiB", daemon_kib as f64 / 1024.0, 40.0),
        ("list of 1000 machines, ms", listed, 50.0),
    ] {
        results.figures.push(Figure { title: title.to_owned(), value, limit });
    }
    Ok(())
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len().saturating_sub(1) / 2).copied().unwrap_or(f64::NAN)
}

/// A state directory with its daemon.
struct Cloud {
    berth: PathBuf,
    directory: PathBuf,
    daemon: Child,
}

impl Cloud {
    fn new(berth: &Path) -> Result<Self> {
        let directory = std::env::temp_dir().join(format!("berth-bench-{}", std::process::id()));
        fs::create_dir_all(&directory)?;
        let images = files::state_directory().join("images");
        std::os::unix::fs::symlink(images, directory.join("images"))?;
        let mut daemon = Command::new(berth);
        let daemon = daemon.arg("--root").arg(&directory).arg("daemon").stderr(Stdio::null());
        let daemon = daemon.spawn().context("the daemon")?;
        let cloud = Self { berth: berth.to_owned(), directory, daemon };
        // A command that comes before it would start another one.
        let socket = cloud.directory.join("berth.sock");
        let began = Instant::now();
        while UnixStream::connect(&socket).is_err() {
            if began.elapsed() > LISTENS_WITHIN {
                bail!("the daemon does not listen at {}", socket.display());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(cloud)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(&self.berth);
        command.env_remove("BERTH_HOST").env_remove("BERTH_ROOT");
        command.arg("--root").arg(&self.directory).arg("vm").args(words);
        command
    }

    fn vm(&self, words: &[&str]) -> Result<String> {
        let ran = self.command(words).stdin(Stdio::null()).output()?;
        if !ran.status.success() {
            bail!("berth vm {}: {}", words.join(" "), String::from_utf8_lossy(&ran.stderr));
        }
        Ok(String::from_utf8_lossy(&ran.stdout).into_owned())
    }

    fn create(&self, name: &str, memory: &str) -> Result<()> {
        let words = ["create", "--memory", memory, "--net", "none", "--accel", "translate"];
        self.vm(&[&words[..], &[name, IMAGE]].concat()).map(drop)
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.directory.join("machines").join(name)
    }

    /// How long the guest stood still for a snapshot, in milliseconds.
    fn pause(&self, name: &str, tag: &str) -> Result<f64> {
        let list: Value = serde_json::from_str(&self.vm(&["snapshots", "--json", name])?)?;
        let found = list.as_array().into_iter().flatten().find(|one| one["tag"] == tag);
        found.and_then(|one| one["pause_ms"].as_f64()).context("no such snapshot")
    }

    /// How long its process took to let the guest go on, in milliseconds.
    fn goes_on_after(&self, name: &str) -> Result<f64> {
        let log = fs::read_to_string(self.folder(name).join("vmm.log"))?;
        let said =
            log.lines().rev().find_map(|line| line.strip_prefix("berth: the guest goes on, "));
        let us = said.and_then(|said| said.split(' ').next()?.parse::<f64>().ok());
        us.map(|us| us / 1e3).context("the log does not say when the guest went on")
    }

    /// What the machine's process has of memory, pages that are shared by their share.
    fn memory_kib(&self, name: &str) -> Result<u64> {
        let machine: Value = serde_json::from_str(&self.vm(&["inspect", name])?)?;
        let machine = machine.get(0).unwrap_or(&machine);
        let pid = machine["pid"].as_u64().with_context(|| format!("{name} does not run"))?;
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
        kib(&text, "Pss:")
    }

    fn daemon_kib(&self) -> Result<u64> {
        kib(&fs::read_to_string(format!("/proc/{}/status", self.daemon.id()))?, "VmRSS:")
    }

    /// The time of `berth vm ls` with many machines, in milliseconds.
    fn list_time(&self) -> Result<f64> {
        let kernel = self.directory.join("kernel");
        fs::write(&kernel, "")?;
        let kernel = kernel.display().to_string();
        for number in 0..MACHINES {
            self.vm(&["create", "--kernel", &kernel, &format!("m{number}")])?;
        }
        let mut times = Vec::new();
        for _ in 0..TIMES {
            let began = Instant::now();
            let lines = self.vm(&["ls"])?.lines().count();
            times.push(began.elapsed().as_secs_f64() * 1e3);
            if lines <= MACHINES {
                bail!("{lines} lines for {MACHINES} machines");
            }
        }
        Ok(median(&mut times))
    }
}

fn kib(text: &str, key: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(key));
    let number = line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse().ok());
    number.with_context(|| format!("no {key}"))
}

impl Drop for Cloud {
    fn drop(&mut self) {
        let running = self.vm(&["ls", "--json"]).ok();
        let list: Option<Value> = running.and_then(|text| serde_json::from_str(&text).ok());
        for machine in list.iter().flat_map(|list| list.as_array()).flatten() {
            if let Some(name) = machine["name"].as_str().filter(|_| machine["pid"].is_u64()) {
                let _ = self.vm(&["kill", name]);
            }
        }
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// The same guest in QEMU, at rest: it stands still as long as `savevm` takes.
fn measure_qemu(directory: &Path, results: &mut Results) -> Result<()> {
    let (disk, socket) = (directory.join("qemu.qcow2"), directory.join("qemu.sock"));
    let stored = directory.join("qemu.state");
    let mut make = Command::new("qemu-img");
    make.args(["create", "-q", "-f", "qcow2"]).arg(&disk).arg("64M");
    if !make.status()?.success() {
        bail!("qemu-img create failed");
    }
    let files = files::for_boot()?;
    let start = |more: &[&str]| -> Result<(Instant, Running, Monitor)> {
        let _ = fs::remove_file(&socket);
        let mut command = qemu(&files, 1, "console=ttyS0 quiet panic=-1");
        command.arg("-drive").arg(format!("file={},format=qcow2,if=virtio", disk.display()));
        command.arg("-qmp").arg(format!("unix:{},server=on,wait=off", socket.display()));
        command.args(more).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let began = Instant::now();
        let running = Running(command.spawn()?);
        let mut monitor = Monitor::connect(&socket)?;
        monitor.wait_running()?;
        Ok((began, running, monitor))
    };
    let mut add = |name: &str, time: Duration| -> Result<()> {
        let sample = Sample::new(&[time.as_nanos() as f64])?;
        results.add(System::Qemu, name, "kept", "", sample);
        Ok(())
    };
    let (_, running, mut monitor) = start(&[])?;
    // It boots slower than ours.
    std::thread::sleep(4 * REST);
    for _ in 0..TIMES {
        let began = Instant::now();
        monitor.command("savevm a")?;
        add("snapshot-pause", began.elapsed())?;
        monitor.command("delvm a")?;
    }
    monitor.command("savevm a")?;
    let began = Instant::now();
    monitor.command("stop")?;
    monitor.migrate(&format!("exec:cat > {}", stored.display()))?;
    add("suspend", began.elapsed())?;
    drop(running);
    for _ in 0..TIMES {
        let (began, running, _) = start(&["-loadvm", "a"])?;
        add("restore", began.elapsed())?;
        drop(running);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read() {
        assert_eq!(kib("Rss:  9 kB\nPss:   12345 kB\n", "Pss:").unwrap(), 12345);
        assert!(kib("Rss: 9 kB", "Pss:").is_err());
        assert!((median(&mut [3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
    }
}
