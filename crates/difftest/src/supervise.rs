//! Starts the workers, shows their reports, adds up their counts.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::time::Instant;

use anyhow::Context;
use berth_difftest::case::Mode;
use berth_difftest::generate::Generator;
use berth_difftest::run::Stats;

use crate::Arguments;

/// A line of a worker, or its end.
enum Event {
    Line(u64, String),
    End(u64),
}

/// One worker's share.
struct Worker {
    child: Child,
    /// Start of the batch it is in.
    at: u64,
    end: u64,
    finished: bool,
    failures: u64,
}

/// Runs all cases; whether everything agreed.
pub fn main(arguments: &Arguments) -> anyhow::Result<bool> {
    let begin = Instant::now();
    let (sender, events) = channel();
    let mut workers = Vec::new();
    let share = arguments.cases.div_ceil(arguments.jobs).max(1);
    for index in 0..arguments.jobs {
        let from = arguments.from + index * share;
        let end = (from + share).min(arguments.from + arguments.cases);
        if from < end {
            let id = workers.len() as u64;
            workers.push(start(arguments, id, from..end, false, &sender)?);
        }
    }
    let mut total = Stats::default();
    let mut agreed = true;
    let mut open = workers.len();
    let mut shown = Instant::now();
    while open > 0 {
        match events.recv().context("all workers are gone")? {
            Event::Line(id, line) => {
                let worker = &mut workers[id as usize];
                take_line(&line, worker, &mut total);
                if shown.elapsed().as_secs() >= 10 {
                    shown = Instant::now();
                    let left: u64 = workers.iter().map(|w| w.end - w.at.min(w.end)).sum();
                    eprintln!("difftest: {} of {}", arguments.cases - left, arguments.cases);
                }
            }
            Event::End(id) => {
                let worker = &mut workers[id as usize];
                let status = worker.child.wait().context("waiting for a worker")?;
                if status.code() == Some(2) {
                    anyhow::bail!("a worker could not run");
                }
                agreed &= status.success();
                if worker.finished {
                    open -= 1;
                    continue;
                }
                // It died in a batch: find the case, then go on behind the batch.
                eprintln!("difftest: a worker died ({status}) in the batch at {}", worker.at);
                let (at, end) = (worker.at, worker.end);
                worker.failures += 1;
                let next = (at + 256).min(end);
                find_crash(arguments, at..next)?;
                if next < end && worker.failures < arguments.failures {
                    let failures = worker.failures;
                    workers[id as usize] = start(arguments, id, next..end, false, &sender)?;
                    workers[id as usize].failures = failures;
                } else {
                    open -= 1;
                }
            }
        }
    }
    summary(arguments, &total, begin.elapsed().as_secs_f64());
    Ok(agreed && total.different == 0)
}

fn start(
    arguments: &Arguments,
    id: u64,
    range: std::ops::Range<u64>,
    isolate: bool,
    sender: &Sender<Event>,
) -> anyhow::Result<Worker> {
    let mut command = command(arguments, &range)?;
    if isolate {
        command.arg("--isolate");
    }
    let mut child = command.stdout(Stdio::piped()).spawn().context("starting a worker")?;
    let out = child.stdout.take().context("a worker without stdout")?;
    let sender = sender.clone();
    std::thread::spawn(move || {
        for line in BufReader::new(out).lines().map_while(Result::ok) {
            if sender.send(Event::Line(id, line)).is_err() {
                return;
            }
        }
        // The receiver is gone only when the program ends.
        let _ = sender.send(Event::End(id));
    });
    Ok(Worker { child, at: range.start, end: range.end, finished: false, failures: 0 })
}

fn command(arguments: &Arguments, range: &std::ops::Range<u64>) -> anyhow::Result<Command> {
    let program = std::env::current_exe().context("finding the program's own file")?;
    let mut command = Command::new(program);
    let number = |n: u64| n.to_string();
    command.args(["--worker", "--against", &arguments.against]);
    command.args(["--seed", &number(arguments.seed), "--from", &number(range.start)]);
    command.args(["--cases", &number(range.end - range.start)]);
    command.args(["--failures", &number(arguments.failures)]);
    command.args(["--compat", &number(u64::from(arguments.options.compat_percent))]);
    command.args(["--faults", &number(u64::from(arguments.options.fault_percent))]);
    command.args(["--length", &number(u64::from(arguments.options.instructions))]);
    if !arguments.options.trap_flags {
        command.arg("--no-trap-flags");
    }
    if !arguments.shrink {
        command.arg("--no-shrink");
    }
    Ok(command)
}

/// Runs the batch again with each case in a process of its own; the reports go to stdout.
fn find_crash(arguments: &Arguments, range: std::ops::Range<u64>) -> anyhow::Result<()> {
    let mut command = command(arguments, &range)?;
    let status = command.arg("--isolate").status().context("starting a worker")?;
    if status.success() {
        println!(
            "crash: not repeated by single cases of seed {} from {} to {}",
            arguments.seed, range.start, range.end
        );
    }
    Ok(())
}

fn take_line(line: &str, worker: &mut Worker, total: &mut Stats) {
    let mut words = line.split(' ');
    match words.next() {
        Some("at") => {
            worker.at = words.next().and_then(|w| w.parse().ok()).unwrap_or(worker.at);
        }
        Some("stats") => {
            let mut numbers = words.filter_map(|w| w.parse::<u64>().ok());
            let mut next = || numbers.next().unwrap_or(0);
            total.compared += next();
            total.skipped += next();
            total.different += next();
            for vector in &mut total.vectors {
                *vector += next();
            }
        }
        Some("codes") => {
            let pairs = words.filter_map(|w| {
                let (mode, code) = w.split_once(':')?;
                Some((mode.parse().ok()?, code.parse().ok()?))
            });
            total.codes.extend(pairs);
        }
        Some("end") => {
            worker.finished = true;
            worker.at = worker.end;
        }
        _ => println!("{line}"),
    }
}

fn summary(arguments: &Arguments, total: &Stats, seconds: f64) {
    let all = total.compared + total.skipped;
    println!(
        "{all} cases in {seconds:.1} s ({:.0}/s): {} compared, {} skipped, {} different",
        all as f64 / seconds,
        total.compared,
        total.skipped,
        total.different
    );
    let ends: Vec<String> = total
        .vectors
        .iter()
        .enumerate()
        .filter(|(_, n)| **n > 0)
        .map(|(v, n)| format!("{v}: {n}"))
        .collect();
    println!("ended by exception {}", ends.join(", "));
    let generator = Generator::new(arguments.seed, arguments.options);
    for mode in [Mode::Bits64, Mode::Compat32] {
        let missing = total.missing(&generator, mode);
        let known = generator.codes(mode).count();
        println!("{mode:?}: {} of {known} encodings generated", known - missing.len());
        if arguments.coverage {
            for code in missing {
                println!("  never: {code:?}  {}", code.op_code().instruction_string());
            }
        }
    }
}
