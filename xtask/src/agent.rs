//! Builds the programs that go into guests: static, in a target directory of their own, so that
//! their flags do not make cargo build everything else again.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "agent";

/// Builds the agent, small; returns where the program is.
pub fn build() -> Result<PathBuf> {
    build_static("berth-agent", PROFILE)
}

/// Builds a package's program of the same name; returns where it is.
pub fn build_static(package: &str, profile: &str) -> Result<PathBuf> {
    let directory = crate::target().join("agent");
    let mut flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    flags.push_str(" -C target-feature=+crt-static");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(crate::workspace())
        .env("RUSTFLAGS", flags)
        // With a target of its own the flags stay away from build scripts and macros.
        .args(["build", "--package", package, "--profile", profile, "--target", TRIPLE])
        .arg("--target-dir")
        .arg(&directory)
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("building {package} failed");
    }
    Ok(directory.join(TRIPLE).join(profile).join(package))
}
