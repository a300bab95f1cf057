//! Runs the benchmark program in each system and reads what it prints.

use std::io::{BufRead, BufReader, IsTerminal};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::bench::boot::overhead_kib;
use crate::bench::results::{Results, Sample};
use crate::bench::system::{Setup, System};

/// The longest a system may take for all rows.
const RUN_LIMIT: Duration = Duration::from_secs(900);

/// Measures everything `runs` times in each system, in turn.
pub fn measure(setup: &Setup, runs: usize, results: &mut Results) -> Result<()> {
    let cpus = processors(setup)?;
    if cpus.is_empty() {
        return Ok(());
    }
    for run in 1..=runs {
        for &system in &setup.systems {
            let began = Instant::now();
            for &count in &cpus {
                let mut peak = None;
                let memory = |pid| {
                    if system == System::Berth && count == 1 {
                        peak = peak.max(overhead_kib(pid));
                    }
                };
                let output = listen(setup.command(system, count), RUN_LIMIT, memory)
                    .with_context(|| system.as_str())?;
                results.overhead_peak_kib = results.overhead_peak_kib.max(peak);
                read(system, &output, results)
                    .with_context(|| format!("{}, {count} processors", system.as_str()))?;
            }
            eprintln!("run {run}: {} in {:.1} s", system.as_str(), began.elapsed().as_secs_f64());
        }
    }
    Ok(())
}

/// The processor counts that the chosen rows ask for; none when no row is chosen.
fn processors(setup: &Setup) -> Result<Vec<usize>> {
    let output = Command::new(&setup.program)
        .args(&setup.arguments)
        .arg("--list")
        .output()
        .with_context(|| setup.program.display().to_string())?;
    let mut counts = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let cpus = line.split(' ').nth(2).and_then(|word| word.parse().ok());
        counts.push(cpus.with_context(|| format!("not a list of rows: {line}"))?);
    }
    counts.sort_unstable();
    counts.dedup();
    Ok(counts)
}

/// A line and when it was read.
struct Heard {
    text: String,
    at: Instant,
}

/// All lines that begin with `bench: `; after each, `look` is told the number of the process.
fn listen(mut command: Command, limit: Duration, mut look: impl FnMut(u32)) -> Result<Vec<Heard>> {
    let child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn()?;
    let mut running = Running(child);
    let stdout = running.0.stdout.take().context("no standard output")?;
    let (said, heard) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            if said.send(Heard { text, at: Instant::now() }).is_err() {
                return;
            }
        }
    });
    let began = Instant::now();
    let (mut lines, mut other) = (Vec::new(), String::new());
    loop {
        let left = limit.saturating_sub(began.elapsed());
        match heard.recv_timeout(left) {
            Ok(line) => match line.text.strip_prefix("bench: ") {
                Some(text) => {
                    look(running.0.id());
                    show(text);
                    lines.push(Heard { text: text.to_owned(), at: line.at });
                }
                None => other = other + &line.text + "\n",
            },
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
            Err(mpsc::RecvTimeoutError::Timeout) => {
                bail!("not done after {} s; it said:\n{other}", limit.as_secs())
            }
        }
    }
    running.0.wait()?;
    let clocks = lines.iter().filter(|line| line.text.starts_with("clock ")).count();
    if clocks != 2 {
        let last = lines.last().map_or("nothing", |line| &line.text);
        bail!("ended before all was done, last: {last}\n{other}");
    }
    Ok(lines)
}

/// Says on a terminal how far it is.
fn show(line: &str) {
    if let (true, Some(name)) = (std::io::stderr().is_terminal(), line.split(' ').nth(1)) {
        eprint!("\r{name:<20}\r");
    }
}

fn read(system: System, lines: &[Heard], results: &mut Results) -> Result<()> {
    let mut clock = None;
    for line in lines {
        let words: Vec<&str> = line.text.split(' ').collect();
        match words.as_slice() {
            ["row", name, group, _cpus, ops, checksum, times @ ..] => {
                let ops: u64 = ops.parse().context("the count of operations")?;
                let nanoseconds = times.iter().map(|time| time.parse());
                let mut nanoseconds: Vec<u64> =
                    nanoseconds.collect::<Result<_, _>>().context("a time")?;
                nanoseconds.sort_unstable();
                let per_op: Vec<f64> = nanoseconds.iter().map(|&t| t as f64 / ops as f64).collect();
                results.add(system, name, group, checksum, Sample::new(&per_op)?);
            }
            ["missing", name, "its", why @ ..] => {
                results.faults.push(format!(
                    "{name} in {}: its {}",
                    system.as_str(),
                    why.join(" ")
                ));
            }
            ["missing", name, why @ ..] => results.missing(system, name, &why.join(" ")),
            ["clock", nanoseconds] => {
                let now: u64 = nanoseconds.parse().context("a clock")?;
                match clock {
                    None => clock = Some(line.at),
                    Some(first) => results.clock(system, now, line.at - first),
                }
            }
            _ => bail!("it said: {}", line.text),
        }
    }
    Ok(())
}

/// Ends the process however we leave.
#[derive(Debug)]
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn what_is_printed_becomes_results() {
        let script = "echo noise; began=$(date +%s%N); printf 'bench: clock 0\\r\\n'; sleep 0.1
             echo 'bench: row a user 1 10 ff 300 100 200'; echo 'bench: missing b no such thing'
             echo \"bench: clock $(($(date +%s%N) - began))\"";
        let mut results = Results::default();
        let lines = listen(shell(script), RUN_LIMIT, |_| ()).unwrap();
        read(System::Berth, &lines, &mut results).unwrap();
        let row = &results.rows[0];
        assert_eq!((row.name.as_str(), row.group.as_str()), ("a", "user"));
        assert_eq!(row.median(System::Berth), Some(20.0));
        assert_eq!(row.median(System::Qemu), None);
        assert!(results.faults.is_empty(), "{:?}", results.faults);
        assert_eq!(results.absent.len(), 1);
        assert!(
            listen(shell("echo 'bench: clock 0'; echo oops"), RUN_LIMIT, |_| ())
                .is_err_and(|error| error.to_string().contains("oops"))
        );
        assert!(listen(shell("sleep 10"), Duration::from_millis(50), |_| ()).is_err());
    }
}
