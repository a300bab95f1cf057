//! Builds the agent as it goes into guests: static, small, in a target directory of its own, so that
//! its flags do not make cargo build everything else again.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const PROFILE: &str = "agent";

/// Builds; returns where the program is.
pub fn build() -> Result<PathBuf> {
    let directory = crate::target().join("agent");
    let mut flags = std::env::var("RUSTFLAGS").unwrap_or_default();
    flags.push_str(" -C target-feature=+crt-static");
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(crate::workspace())
        .env("RUSTFLAGS", flags)
        // With a target of its own the flags stay away from build scripts and macros.
        .args(["build", "--package", "berth-agent", "--profile", PROFILE, "--target", TRIPLE])
        .arg("--target-dir")
        .arg(&directory)
        .status()
        .context("starting cargo")?;
    if !status.success() {
        bail!("building the agent failed");
    }
    Ok(directory.join(TRIPLE).join(PROFILE).join("berth-agent"))
}
