//! Micro-benchmarks with a fixed amount of work each, for a guest or the bare processor.
//!
//! Prints one line for each row, which `cargo xtask bench` reads:
//!
//!     bench: row NAME GROUP CPUS OPS CHECKSUM NANOSECONDS...
//!     bench: missing NAME WHY
//!
//! between two lines `bench: clock NANOSECONDS`, by which the host compares its clock with ours. With
//! `--programs ROOT` the rows are programs of the root file system there. As process 1 of a guest it
//! does the same, for programs with the first disk mounted on ROOT, and switches the machine off.

mod kernel;
mod memory;
mod parallel;
mod programs;
mod row;
mod user;
mod vector;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::programs::{PROGRAMS, Program};
use crate::row::Row;

const ROWS: [&[Row]; 5] = [user::ROWS, vector::ROWS, memory::ROWS, kernel::ROWS, parallel::ROWS];
const REPETITIONS_DEFAULT: usize = 5;
/// However slow the machine: two, so that one of them finds everything in place.
const REPETITIONS_MIN: usize = 2;
/// Programs take longer and vary less.
const PROGRAM_REPETITIONS_MAX: usize = 2;
/// No further repetition of a row that took this long.
const ROW_LIMIT: Duration = Duration::from_millis(1500);

/// What to run.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    only: Vec<String>,
    group: Option<String>,
    cpus: Option<usize>,
    repetitions: usize,
    list: bool,
    /// Programs of the root file system there, instead of the rows built in.
    programs: Option<PathBuf>,
}

/// Something to be measured.
enum Subject {
    Row(&'static Row),
    Program(&'static Program),
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|word| word == "--exit") {
        return ExitCode::from(7);
    }
    let is_init = std::process::id() == 1;
    // Signals mean something else to process 1, so the work is done by a child.
    let status = if is_init { supervise(&arguments) } else { run(&arguments) };
    if is_init {
        power_off();
    }
    status
}

fn run(arguments: &[String]) -> ExitCode {
    match parse(arguments) {
        Ok(options) => {
            let subjects = chosen(&options);
            if options.list {
                for subject in subjects {
                    println!("{} {} {}", subject.name(), subject.group(), subject.cpus());
                }
            } else if let Err(fault) = measure(&options, &subjects) {
                println!("bench: wrong {fault}");
                return ExitCode::FAILURE;
            }
            ExitCode::SUCCESS
        }
        Err(fault) => {
            println!("bench: wrong {fault}");
            ExitCode::from(2)
        }
    }
}

fn parse(arguments: &[String]) -> Result<Options, String> {
    let mut options = Options {
        only: Vec::new(),
        group: None,
        cpus: None,
        repetitions: REPETITIONS_DEFAULT,
        list: false,
        programs: None,
    };
    let mut words = arguments.iter();
    while let Some(word) = words.next() {
        if word == "--list" {
            options.list = true;
            continue;
        }
        let value = words.next().ok_or_else(|| format!("{word} without a value"))?;
        let number = || value.parse::<usize>().map_err(|_| format!("{word} {value}: no number"));
        match word.as_str() {
            "--only" => options.only = value.split(',').map(str::to_owned).collect(),
            "--group" => options.group = Some(value.clone()),
            "--cpus" => options.cpus = Some(number()?),
            "--programs" => options.programs = Some(value.into()),
            "--repetitions" => options.repetitions = number()?.max(1),
            _ => return Err(format!("unknown argument {word}")),
        }
    }
    Ok(options)
}

impl Subject {
    fn name(&self) -> &'static str {
        match self {
            Self::Row(row) => row.name,
            Self::Program(program) => program.name,
        }
    }

    fn group(&self) -> &'static str {
        match self {
            Self::Row(row) => row.group.as_str(),
            Self::Program(_) => "programs",
        }
    }

    fn cpus(&self) -> usize {
        match self {
            Self::Row(row) => row.cpus,
            Self::Program(_) => 1,
        }
    }

    fn ops(&self) -> u64 {
        match self {
            Self::Row(row) => row.ops,
            Self::Program(_) => 1,
        }
    }

    fn measure(&self, repetitions: usize) -> Result<(u64, Vec<Duration>), String> {
        match self {
            Self::Row(row) => {
                let mut work = (row.prepare)(row.ops)?;
                repeat(repetitions, || Ok((work(), None)))
            }
            Self::Program(program) => {
                program.prepare()?;
                repeat(repetitions.min(PROGRAM_REPETITIONS_MAX), || program.run())
            }
        }
    }
}

fn chosen(options: &Options) -> Vec<Subject> {
    let rows = ROWS.iter().copied().flatten().map(Subject::Row);
    let mut subjects: Vec<Subject> = match options.programs {
        Some(_) => PROGRAMS.iter().map(Subject::Program).collect(),
        None => rows.collect(),
    };
    subjects.retain(|subject| {
        options.cpus.is_none_or(|cpus| cpus == subject.cpus())
            && (options.only.is_empty() || options.only.iter().any(|name| name == subject.name()))
            && options.group.as_ref().is_none_or(|group| group == subject.group())
    });
    subjects
}

fn measure(options: &Options, subjects: &[Subject]) -> Result<(), String> {
    if options.cpus == Some(1) {
        parallel::pin(usize::MAX / 2);
    }
    if let Some(root) = &options.programs {
        programs::enter(root)?;
    }
    let start = Instant::now();
    println!("bench: clock 0");
    for subject in subjects {
        let (name, group) = (subject.name(), subject.group());
        match subject.measure(options.repetitions) {
            Ok((checksum, times)) => {
                let times: Vec<String> = times.iter().map(|t| t.as_nanos().to_string()).collect();
                let (cpus, ops, times) = (subject.cpus(), subject.ops(), times.join(" "));
                println!("bench: row {name} {group} {cpus} {ops} {checksum:x} {times}");
            }
            Err(why) => println!("bench: missing {name} {why}"),
        }
    }
    println!("bench: clock {}", start.elapsed().as_nanos());
    Ok(())
}

/// Takes times; work may give one that it measured itself.
fn repeat(
    repetitions: usize,
    mut work: impl FnMut() -> Result<(u64, Option<u64>), String>,
) -> Result<(u64, Vec<Duration>), String> {
    let mut times = Vec::new();
    let mut checksum = None;
    let begin = Instant::now();
    while times.len() < repetitions {
        if times.len() >= REPETITIONS_MIN && begin.elapsed() > ROW_LIMIT {
            break;
        }
        let began = Instant::now();
        let (result, own_ns) = work()?;
        times.push(own_ns.map_or_else(|| began.elapsed(), Duration::from_nanos));
        if *checksum.get_or_insert(result) != result {
            return Err("its repetitions do not agree".into());
        }
    }
    Ok((checksum.unwrap_or_default(), times))
}

/// Runs the benchmarks in a child, as process 1 of a guest.
fn supervise(arguments: &[String]) -> ExitCode {
    for (kind, place) in [(c"devtmpfs", "/dev"), (c"proc", "/proc")] {
        // A kernel that mounted one of them already refuses, which is as good.
        let _ = programs::mount(kind, place.as_ref(), kind, 0);
    }
    let disk = match parse(arguments) {
        Ok(Options { programs: Some(root), .. }) => programs::mount_disk(&root),
        _ => Ok(()),
    };
    if let Err(fault) = disk {
        println!("bench: wrong {fault}");
        return ExitCode::FAILURE;
    }
    let status = std::process::Command::new("/proc/self/exe").args(arguments).status();
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        other => {
            println!("bench: wrong the benchmarks ended with {other:?}");
            ExitCode::FAILURE
        }
    }
}

fn power_off() {
    // SAFETY: there is nothing to be saved in a guest that has no disk.
    unsafe {
        libc::reboot(libc::LINUX_REBOOT_CMD_POWER_OFF);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_select_rows() {
        let parse = |text: &str| {
            let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            parse(&words)
        };
        let options = parse("--only fib,sieve,atomic-2 --cpus 1").unwrap();
        let names = |options| -> Vec<&str> { chosen(options).iter().map(Subject::name).collect() };
        assert_eq!(names(&options), ["sieve", "fib"]);
        assert_eq!(names(&parse("--programs /x --only perl").unwrap()), ["perl"]);
        assert!(parse("--list").unwrap().list);
        assert!(
            parse("--cpus two").is_err() && parse("--what 1").is_err() && parse("--only").is_err()
        );
    }

    #[test]
    fn names_are_words_and_unique() {
        let programs = PROGRAMS.iter().map(|program| program.name);
        let rows = ROWS.iter().copied().flatten().map(|row| row.name);
        let mut names: Vec<&str> = rows.chain(programs).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(names.iter().all(|name| !name.contains(char::is_whitespace)));
    }

    #[test]
    fn a_row_whose_repetitions_disagree_is_not_reported_as_measured() {
        let mut n = 0;
        let mut odd = || {
            n += 1;
            Ok((n, None))
        };
        assert!(repeat(2, &mut odd).is_err());
        assert_eq!(repeat(1, &mut odd).unwrap().0, 3);
        let (_, times) = repeat(3, || Ok((0, Some(5)))).unwrap();
        assert_eq!(times, [Duration::from_nanos(5); 3]);
        assert!(repeat(1, || Err("why".into())).is_err());
    }
}
