//! Project chores: `cargo xtask`; its usage lists them.

mod agent;
mod bench;
mod fuzz;
mod stress;
mod tidy;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};

const USAGE: &str = "\
cargo xtask agent              build the guest's agent, statically linked
cargo xtask tidy               check the rules no compiler checks
cargo xtask bench [--help]     berth beside QEMU and the bare processor
cargo xtask stress [NAME]      programs that use the whole processor, in Debian guests
cargo xtask boots [COUNT]      boot Debian so many times in a row
cargo xtask fuzz [TARGET] [--seconds N]   fuzz targets, each for so long (needs cargo-fuzz)";

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["agent"] => {
            let path = agent::build()?;
            println!("{}", path.display());
        }
        ["tidy"] => {
            let faults = tidy::check(&workspace())?;
            for fault in &faults {
                eprintln!("{fault}");
            }
            if !faults.is_empty() {
                return Ok(ExitCode::FAILURE);
            }
        }
        ["bench", ..] => {
            if !bench::run(arguments.get(1..).unwrap_or_default())? {
                return Ok(ExitCode::FAILURE);
            }
        }
        ["stress"] => stress::run("")?,
        ["stress", only] => stress::run(only)?,
        ["boots"] => stress::boots(stress::BOOTS_DEFAULT)?,
        ["boots", count] => stress::boots(count.parse().context("COUNT is a number")?)?,
        ["fuzz"] => fuzz::run(&workspace(), "", fuzz::SECONDS_DEFAULT)?,
        ["fuzz", "--seconds", seconds] => fuzz::run(&workspace(), "", number(seconds)?)?,
        ["fuzz", target] => fuzz::run(&workspace(), target, fuzz::SECONDS_DEFAULT)?,
        ["fuzz", target, "--seconds", seconds] => {
            fuzz::run(&workspace(), target, number(seconds)?)?;
        }
        _ => {
            eprintln!("{USAGE}");
            return Ok(ExitCode::from(2));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn number(word: &str) -> Result<u32> {
    word.parse().context("--seconds takes a number")
}

/// The repository's root.
fn workspace() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_owned()
}

/// Where cargo puts what it builds.
fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(directory) => workspace().join(directory),
        None => workspace().join("target"),
    }
}
