//! Micro-benchmarks with a fixed amount of work each, for a guest or the bare processor.
//!
//! Prints one line for each row, which `cargo xtask bench` reads:
//!
//!     bench: row NAME GROUP CPUS OPS CHECKSUM NANOSECONDS...
//!     bench: missing NAME WHY
//!
//! between two lines `bench: clock NANOSECONDS`, by which the host compares its clock with ours. As
//! process 1 of a guest it does the same and switches the machine off.

mod kernel;
mod memory;
mod parallel;
mod row;
mod user;
mod vector;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use crate::row::Row;

const ROWS: [&[Row]; 5] = [user::ROWS, vector::ROWS, memory::ROWS, kernel::ROWS, parallel::ROWS];
const REPETITIONS_DEFAULT: usize = 5;
/// However slow the machine: two, so that one of them finds everything in place.
const REPETITIONS_MIN: usize = 2;
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
            let rows = ROWS.iter().copied().flatten().filter(|row| is_chosen(row, &options));
            if options.list {
                for row in rows {
                    println!("{} {} {} {}", row.name, row.group.as_str(), row.cpus, row.ops);
                }
            } else {
                measure(&options, rows);
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
            "--repetitions" => options.repetitions = number()?.max(1),
            _ => return Err(format!("unknown argument {word}")),
        }
    }
    Ok(options)
}

fn is_chosen(row: &Row, options: &Options) -> bool {
    options.cpus.is_none_or(|cpus| cpus == row.cpus)
        && (options.only.is_empty() || options.only.iter().any(|name| name == row.name))
        && options.group.as_ref().is_none_or(|group| group == row.group.as_str())
}

fn measure<'a>(options: &Options, rows: impl Iterator<Item = &'a Row>) {
    if options.cpus == Some(1) {
        parallel::pin(usize::MAX / 2);
    }
    let start = Instant::now();
    println!("bench: clock 0");
    for row in rows {
        match measure_row(row, options.repetitions) {
            Ok((checksum, times)) => {
                let times: Vec<String> = times.iter().map(|t| t.as_nanos().to_string()).collect();
                println!(
                    "bench: row {} {} {} {} {checksum:x} {}",
                    row.name,
                    row.group.as_str(),
                    row.cpus,
                    row.ops,
                    times.join(" ")
                );
            }
            Err(why) => println!("bench: missing {} {why}", row.name),
        }
    }
    println!("bench: clock {}", start.elapsed().as_nanos());
}

fn measure_row(row: &Row, repetitions: usize) -> Result<(u64, Vec<Duration>), String> {
    let mut work = (row.prepare)(row.ops)?;
    let mut times = Vec::new();
    let mut checksum = None;
    while times.len() < repetitions {
        if times.len() >= REPETITIONS_MIN && times.iter().sum::<Duration>() > ROW_LIMIT {
            break;
        }
        let began = Instant::now();
        let result = work();
        times.push(began.elapsed());
        if *checksum.get_or_insert(result) != result {
            return Err("its repetitions do not agree".into());
        }
    }
    Ok((checksum.unwrap_or_default(), times))
}

/// Runs the benchmarks in a child, as process 1 of a guest.
fn supervise(arguments: &[String]) -> ExitCode {
    let mounts: [(&std::ffi::CStr, &std::ffi::CStr); 2] =
        [(c"devtmpfs", c"/dev"), (c"proc", c"/proc")];
    for (kind, place) in mounts {
        // SAFETY: all are strings; these file systems take no data. A kernel that mounted one of
        // them already says so, which is as good.
        unsafe {
            libc::mount(kind.as_ptr(), place.as_ptr(), kind.as_ptr(), 0, std::ptr::null());
        }
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
        let all = ROWS.iter().copied().flatten();
        let chosen: Vec<&str> =
            all.filter(|row| is_chosen(row, &options)).map(|row| row.name).collect();
        assert_eq!(chosen, ["sieve", "fib"]);
        assert!(parse("--list").unwrap().list);
        assert!(
            parse("--cpus two").is_err() && parse("--what 1").is_err() && parse("--only").is_err()
        );
    }

    #[test]
    fn names_are_words_and_unique() {
        let mut names: Vec<&str> = ROWS.iter().copied().flatten().map(|row| row.name).collect();
        let count = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), count);
        assert!(names.iter().all(|name| !name.contains(char::is_whitespace)));
    }

    #[test]
    fn a_row_whose_repetitions_disagree_is_not_reported_as_measured() {
        let row = row::row("odd", row::Group::User, 1, |_| {
            let mut n = 0;
            Ok(Box::new(move || {
                n += 1;
                n
            }))
        });
        assert!(measure_row(&row, 2).is_err());
        assert_eq!(measure_row(&row, 1).unwrap().0, 1);
    }
}
