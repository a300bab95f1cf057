//! Fuzz targets, one after the other, with cargo-fuzz.
//!
//! A nightly toolchain gives the address sanitizer; without one the stable compiler does, with less to
//! notice. What is found stays in `fuzz/artifacts`, what leads to new code in `fuzz/corpus`.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

/// How long each target runs unless said otherwise.
pub const SECONDS_DEFAULT: u32 = 180;
/// Inputs longer than this only cost time.
const INPUT_BYTES_MAX: u32 = 8192;
/// An input that takes so long is a hang.
const INPUT_SECONDS_MAX: u32 = 20;

/// Runs `only`, or all targets when it is empty.
pub fn run(workspace: &Path, only: &str, seconds: u32) -> Result<()> {
    let installed = succeeds(Command::new("cargo").args(["fuzz", "--version"]));
    ensure!(installed, "cargo-fuzz is missing; try `cargo install cargo-fuzz`");
    let directory = workspace.join("fuzz");
    let targets: Vec<String> =
        targets(&directory)?.into_iter().filter(|t| only.is_empty() || t == only).collect();
    ensure!(!targets.is_empty(), "there is no fuzz target {only}");
    let nightly = succeeds(Command::new("cargo").args(["+nightly", "--version"]));
    for target in &targets {
        println!("fuzz: {target} for {seconds} s");
        let corpus = directory.join("corpus").join(target);
        std::fs::create_dir_all(&corpus).context("making the corpus directory")?;
        let mut command = Command::new("cargo");
        if nightly {
            command.arg("+nightly");
        } else {
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        command.args(["fuzz", "run"]).current_dir(&directory);
        if !nightly {
            command.args(["--sanitizer", "none"]);
        }
        command.arg(target).arg("--").args([
            format!("-max_total_time={seconds}"),
            format!("-max_len={INPUT_BYTES_MAX}"),
            format!("-timeout={INPUT_SECONDS_MAX}"),
            "-rss_limit_mb=4096".to_owned(),
        ]);
        let status = command.status().context("running cargo fuzz")?;
        if !status.success() {
            bail!("the target {target} found something; see above and fuzz/artifacts/{target}");
        }
    }
    println!("fuzz: {} targets, nothing found", targets.len());
    Ok(())
}

fn targets(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in directory.join("fuzz_targets").read_dir().context("listing the fuzz targets")? {
        let path = entry?.path();
        if let (Some("rs"), Some(name)) = (
            path.extension().and_then(|extension| extension.to_str()),
            path.file_stem().and_then(|stem| stem.to_str()),
        ) {
            names.push(name.to_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn succeeds(command: &mut Command) -> bool {
    let status = command.stdout(Stdio::null()).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::targets;

    #[test]
    fn every_target_is_declared_and_described() {
        let workspace = crate::workspace();
        let names = targets(&workspace.join("fuzz")).unwrap();
        let manifest = std::fs::read_to_string(workspace.join("fuzz/Cargo.toml")).unwrap();
        let page = std::fs::read_to_string(workspace.join("docs/fuzzing.md")).unwrap();
        assert!(names.len() >= 8, "{names:?}");
        for name in names {
            assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not declared");
            assert!(page.contains(&format!("`{name}`")), "{name} is not described");
        }
    }
}
