//! A worker: runs a range of cases and prints what it finds.
//!
//! Lines on stdout for the supervisor: `at N` before a batch, `stats ...`, `codes ...`, `end`;
//! everything else is a report to be shown.

use std::io::Write;

use anyhow::{Context, bail};
use berth_difftest::case::{Backend, Case, Outcome};
use berth_difftest::compare::compare;
use berth_difftest::generate::Generator;
use berth_difftest::native::NativeBackend;
use berth_difftest::report;
use berth_difftest::run::{Stats, minimize, run, signature};
use berth_difftest::shrink::shrink;
use berth_difftest::translated::{GuardedBackend, Way};
use berth_difftest::wrong::{Mistake, WrongBackend};

use crate::Arguments;

/// Makes the backend to be tested.
fn backend(name: &str) -> anyhow::Result<Box<dyn Backend>> {
    let (name, optimizations) = name.split_once(':').unwrap_or((name, "all"));
    Ok(match name {
        "translated" | "stopped" | "looking" | "looking-stopped" | "direct" | "frozen"
        | "frozen-direct" => {
            let (looking, stopped) = (name.contains("looking"), name.contains("stopped"));
            let (direct, frozen) = (name.contains("direct"), name.contains("frozen"));
            let way =
                Way { looking, stopped, direct, frozen, optimizations: optimizations.parse()? };
            Box::new(GuardedBackend::new(way).context("setting up the translator")?)
        }
        "native" => Box::new(NativeBackend::new()?),
        "wrong" => {
            Box::new(WrongBackend { native: NativeBackend::new()?, mistake: Mistake::Carry })
        }
        other => bail!("no backend named {other}: see difftest --help"),
    })
}

/// Cases between two `at` lines.
const BATCH: u64 = 256;

/// Runs the range given; whether everything agreed.
pub fn main(arguments: &Arguments) -> anyhow::Result<bool> {
    let generator = Generator::new(arguments.seed, arguments.options);
    // The native child is forked first, while this process has one thread.
    let mut native = NativeBackend::new()?;
    if arguments.isolate {
        return isolated(arguments, &generator, &mut native);
    }
    let mut other = backend(&arguments.against)?;
    // A panic is a finding; its message is in the report.
    std::panic::set_hook(Box::new(|_| {}));
    let end = arguments.from + arguments.cases;
    let mut total = Stats::default();
    let mut start = arguments.from;
    let mut seen = std::collections::BTreeSet::new();
    while start < end && (seen.len() as u64) < arguments.failures {
        println!("at {start}");
        let range = start..end.min(start + BATCH);
        let stats = run(&generator, range, &mut native, &mut *other, |finding, native, other| {
            let (case, differences) = if arguments.shrink {
                minimize(&finding.case, native, other)
            } else {
                (finding.case, finding.differences)
            };
            // The same again is only counted.
            if seen.insert(signature(&case, &differences)) {
                print!("{}", report::report(arguments.seed, finding.number, &case, &differences));
            }
            (seen.len() as u64) < arguments.failures
        });
        total.add(&stats);
        start += BATCH;
    }
    let vectors: Vec<String> = total.vectors.iter().map(u64::to_string).collect();
    println!(
        "stats {} {} {} {}",
        total.compared,
        total.skipped,
        total.different,
        vectors.join(" ")
    );
    let codes: Vec<String> = total.codes.iter().map(|(m, c)| format!("{m}:{c}")).collect();
    println!("codes {}", codes.join(" "));
    println!("end");
    Ok(total.different == 0)
}

/// Runs the table of known traps; whether the backend gives every answer.
pub fn known(arguments: &Arguments) -> anyhow::Result<bool> {
    let mut backend = backend(&arguments.against)?;
    let mut good = true;
    for trap in berth_difftest::traps::all().context("assembling the table")? {
        let wrong = match backend.run(&trap.case) {
            Outcome::Stopped(end) => trap.check(&end),
            other => vec![format!("{}: {}", trap.name, report::outcome(&other).trim_end())],
        };
        good &= wrong.is_empty();
        for line in wrong {
            println!("{line}");
        }
    }
    Ok(good)
}

/// Runs one case and shows everything.
pub fn single(arguments: &Arguments, number: u64) -> anyhow::Result<bool> {
    let generator = Generator::new(arguments.seed, arguments.options);
    let case = generator.case(number);
    let mut native = NativeBackend::new()?;
    let outcome = native.run(&case);
    print!("{}before:\n{}", report::disassembly(&case), report::state(&case));
    print!("natively: {}", report::outcome(&outcome));
    std::io::stdout().flush()?;
    let mut other = backend(&arguments.against)?;
    let got = other.run(&case);
    print!("{}: {}", arguments.against, report::outcome(&got));
    let differences = compare(&case, &outcome, &got);
    if differences.is_empty() {
        println!("no difference");
        return Ok(true);
    }
    if arguments.shrink {
        let (small, differences) = minimize(&case, &mut native, &mut *other);
        print!("{}", report::report(arguments.seed, number, &small, &differences));
    } else {
        print!("{}", report::report(arguments.seed, number, &case, &differences));
    }
    Ok(false)
}

/// Looks for the cases of the range that end the process, each in a process of its own, and shrinks
/// them the same way.
fn isolated(
    arguments: &Arguments,
    generator: &Generator,
    native: &mut NativeBackend,
) -> anyhow::Result<bool> {
    let mut found = 0;
    for number in arguments.from..arguments.from + arguments.cases {
        let case = generator.case(number);
        let Some(how) = death(&arguments.against, &case)? else { continue };
        let small = if arguments.shrink {
            shrink(&case, |c| matches!(death(&arguments.against, c), Ok(Some(_))))
        } else {
            case
        };
        let seed = arguments.seed;
        println!("crash: {how}: difftest --seed {seed} --case {number}");
        print!("{}before:\n{}", report::disassembly(&small), report::state(&small));
        print!("natively: {}", report::outcome(&native.run(&small)));
        found += 1;
        if found >= arguments.failures {
            break;
        }
    }
    println!("end");
    Ok(found == 0)
}

/// Runs a case in a forked process; how that ended, unless normally.
fn death(name: &str, case: &Case) -> anyhow::Result<Option<String>> {
    std::io::stdout().flush()?;
    // SAFETY: this process has one thread (a worker that isolates makes no backend of its own), so
    // the child may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(std::io::Error::last_os_error()).context("fork"),
        0 => {
            let code = backend(name).map_or(2, |mut b| {
                b.run(case);
                0
            });
            // SAFETY: ends the child without running the parent's exit handlers.
            unsafe { libc::_exit(code) }
        }
        pid => {
            let mut status = 0;
            // SAFETY: `pid` is our child.
            unsafe { libc::waitpid(pid, &raw mut status, 0) };
            Ok(if libc::WIFSIGNALED(status) {
                Some(format!("killed by signal {}", libc::WTERMSIG(status)))
            } else if libc::WEXITSTATUS(status) != 0 {
                Some(format!("exit status {}", libc::WEXITSTATUS(status)))
            } else {
                None
            })
        }
    }
}
