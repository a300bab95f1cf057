//! `difftest`: the differential processor test from the command line.
//!
//! The program runs itself as workers (`--worker`), so that a backend that crashes takes one worker
//! with it; the case is then found by running the batch again with each case in a process of its
//! own.

mod supervise;
mod worker;

use std::process::ExitCode;

use anyhow::{Context, bail};

const HELP: &str = "\
Run generated instruction sequences on the host processor and on the translator, and compare.

difftest [--cases N] [--seed N] [--jobs N] [--against B]
difftest --seed N --case K          run one case, print it, shrink it if it differs
difftest --traps                        run the table of cases with known answers

  --cases N       number of cases (default 100000)
  --from N        number of the first case (default 0)
  --seed N        seed of the generator (default 1)
  --case K        run only case K
  --jobs N        worker processes (default: one per processor)
  --against B     what to compare the host processor with (default translated):
                    translated       the translator
                    stopped          the same, stopped again and again on the way
                    looking          the same with accesses that look whether they cross pages
                    looking-stopped  both
                    direct           the translator, with the processor executing user code itself
                    frozen           the translator, with memory that is copied when it is written
                    frozen-direct    both of these
                    translated:none,shared
                                     with the optimizations of this list (as of
                                     berth vm run --translator-opt); so for the others
                    native           the host processor
                    wrong            the same with a mistake in its flags
  --failures N    stop a worker after so many distinct differences (default 5)
  --compat N      percent of cases in 32-bit compatibility mode (default 12)
  --faults N      percent of cases made to fault (default 25)
  --length N      most instructions in a sequence (default 12)
  --no-trap-flags never set TF or AC
  --no-shrink     print differing cases as they are
  --coverage      list the encodings that were never generated

Exit status: 0 no difference, 1 differences, 2 the test could not run.
";

/// What the command line says.
#[derive(Clone, Debug)]
struct Arguments {
    cases: u64,
    from: u64,
    seed: u64,
    case: Option<u64>,
    jobs: u64,
    against: String,
    failures: u64,
    options: berth_difftest::generate::Options,
    shrink: bool,
    coverage: bool,
    worker: bool,
    isolate: bool,
    traps: bool,
}

fn parse() -> anyhow::Result<Arguments> {
    let jobs = std::thread::available_parallelism().map_or(1, |n| n.get() as u64);
    let mut parsed = Arguments {
        cases: 100_000,
        from: 0,
        seed: 1,
        case: None,
        jobs,
        against: "translated".to_owned(),
        failures: 5,
        options: berth_difftest::generate::Options::default(),
        shrink: true,
        coverage: false,
        worker: false,
        isolate: false,
        traps: false,
    };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        let mut number = || -> anyhow::Result<u64> {
            let value = words.next().with_context(|| format!("{word} needs a number"))?;
            value.parse().with_context(|| format!("{word} {value}: not a number"))
        };
        match word.as_str() {
            "--cases" => parsed.cases = number()?,
            "--from" => parsed.from = number()?,
            "--seed" => parsed.seed = number()?,
            "--case" => parsed.case = Some(number()?),
            "--jobs" => parsed.jobs = number()?.max(1),
            "--failures" => parsed.failures = number()?,
            "--compat" => parsed.options.compat_percent = number()?.min(100) as u32,
            "--faults" => parsed.options.fault_percent = number()?.min(100) as u32,
            "--length" => parsed.options.instructions = number()?.clamp(1, 16) as u32,
            "--against" => parsed.against = words.next().context("--against needs a backend")?,
            "--no-trap-flags" => parsed.options.trap_flags = false,
            "--no-shrink" => parsed.shrink = false,
            "--coverage" => parsed.coverage = true,
            "--worker" => parsed.worker = true,
            "--traps" => parsed.traps = true,
            "--isolate" => parsed.isolate = true,
            "--help" | "-h" => {
                print!("{HELP}");
                std::process::exit(0);
            }
            other => bail!("unknown argument {other}; see difftest --help"),
        }
    }
    Ok(parsed)
}

fn main() -> ExitCode {
    let result = parse().and_then(|arguments| {
        if arguments.worker {
            worker::main(&arguments)
        } else if arguments.traps {
            worker::known(&arguments)
        } else if let Some(case) = arguments.case {
            worker::single(&arguments, case)
        } else {
            supervise::main(&arguments)
        }
    });
    match result {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("difftest: {error:#}");
            ExitCode::from(2)
        }
    }
}
