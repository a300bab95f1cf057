//! Benchmarks: Berth beside QEMU's own translator and the bare processor, in turn, so that whatever
//! else the host does meets all of them. `docs/benchmarks.md` says what is measured and how.

mod boot;
mod files;
mod goals;
mod guest;
mod kept;
mod monitor;
mod plot;
mod report;
mod results;
mod system;

use std::path::PathBuf;

use anyhow::{Result, bail};
use clap::{Parser, ValueEnum};

use crate::bench::results::Results;
use crate::bench::system::Setup;

/// Runs when not told otherwise.
const RUNS_DEFAULT: usize = 3;

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// The time to the init.
    Boot,
    /// Operations of one kind, each in a loop.
    Micro,
    /// Programs of Debian.
    Programs,
    /// Snapshots and clones of machines that are kept, and the daemon.
    Kept,
    /// All of them.
    All,
}

/// Compares Berth, QEMU's TCG and the bare processor.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", no_binary_name = true)]
pub struct Options {
    /// What to measure.
    #[arg(value_enum, default_value = "all")]
    pub what: What,
    /// Runs of each system, in turn [default: 3; 1 with --no-qemu].
    #[arg(long)]
    pub runs: Option<usize>,
    /// Only these rows.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub only: Vec<String>,
    /// Only the rows of this group.
    #[arg(long)]
    pub group: Option<String>,
    /// Without QEMU: quick, for trying out a change.
    #[arg(long)]
    pub no_qemu: bool,
    /// Repetitions of a micro-benchmark in each run, fewer when they are slow.
    #[arg(long, default_value_t = 5)]
    pub repetitions: usize,
    /// The berth to measure [default: the one built here].
    #[arg(long, value_name = "FILE")]
    pub berth: Option<PathBuf>,
    /// Writes all results there.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Draws the results there.
    #[arg(long, value_name = "FILE.svg")]
    pub plot: Option<PathBuf>,
}

/// Measures and reports; whether every result could be had and agreed. Goals that are not met are
/// reported only: the figures depend on the host.
pub fn run(arguments: &[String]) -> Result<bool> {
    let options = match Options::try_parse_from(arguments) {
        Ok(options) => options,
        Err(error) => error.exit(),
    };
    let runs = options.runs.unwrap_or(if options.no_qemu { 1 } else { RUNS_DEFAULT });
    if runs == 0 {
        bail!("at least one run is needed");
    }
    let berth = match &options.berth {
        Some(berth) => berth.clone(),
        None => crate::target().join("release/berth"),
    };
    if !berth.exists() {
        bail!("{} does not exist; run `cargo build --release -p berth-cli`", berth.display());
    }
    let wanted = |what| options.what == what || options.what == What::All;
    let mut results = Results::default();
    if wanted(What::Micro) {
        let setup = Setup::micro(&berth, &options)?;
        guest::measure(&setup, runs, &mut results)?;
    }
    // Their image need not be made for rows that have been measured already.
    let has_all = !options.only.is_empty()
        && options.only.iter().all(|name| results.rows.iter().any(|row| row.name == *name));
    let other_group = options.group.as_ref().is_some_and(|group| group != "programs");
    if wanted(What::Programs) && !has_all && !other_group {
        let setup = Setup::programs(&berth, &options)?;
        guest::measure(&setup, runs, &mut results)?;
    }
    if wanted(What::Boot) && options.only.is_empty() && options.group.is_none() {
        boot::measure(&berth, runs, options.no_qemu, &mut results)?;
    }
    if wanted(What::Kept) && options.only.is_empty() && options.group.is_none() {
        kept::measure(&berth, runs, options.no_qemu, &mut results)?;
    }
    if results.rows.is_empty() && results.faults.is_empty() && results.absent.is_empty() {
        bail!("no such row; docs/benchmarks.md lists them");
    }
    report::print(&results);
    if let Some(path) = &options.json {
        report::write_json(&results, path)?;
    }
    if let Some(path) = &options.plot {
        plot::write(&results, path)?;
    }
    Ok(results.faults.is_empty())
}
