//! Builds every guest, in assembly or C, with the host's C compiler driver (which calls `as` and `ld`).

use std::env;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn main() -> Result<(), Box<dyn Error>> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(env::var("OUT_DIR")?);
    for dir in ["guests", "lib", "build.rs"] {
        println!("cargo::rerun-if-changed={dir}");
    }
    println!("cargo::rerun-if-env-changed=BERTH_GUESTS_CC");
    let cc = env::var("BERTH_GUESTS_CC").unwrap_or_else(|_| "cc".into());
    let mut names = Vec::new();
    for entry in fs::read_dir(root.join("guests"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "S" || e == "c") {
            let name = path.file_stem().and_then(|s| s.to_str()).ok_or("guest name")?.to_owned();
            assemble(&cc, &root.join("lib"), &path, &out.join(format!("{name}.elf")))?;
            names.push(name);
        }
    }
    names.sort();
    let list = names.iter().map(|n| format!("    {n:?},\n")).collect::<String>();
    fs::write(out.join("names.rs"), format!("&[\n{list}]\n"))?;
    Ok(())
}

fn assemble(cc: &str, lib: &Path, source: &Path, target: &Path) -> Result<(), Box<dyn Error>> {
    let output = Command::new(cc)
        // For C: no library, no vector registers, nothing below the stack pointer.
        .args(["-ffreestanding", "-O1", "-mgeneral-regs-only", "-mno-red-zone", "-fno-pic"])
        .args(["-fno-stack-protector", "-fcf-protection=none", "-fno-asynchronous-unwind-tables"])
        .args(["-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noexecstack"])
        .args(["-Wl,-z,max-page-size=4096", "-Wl,--no-warn-rwx-segments"])
        .arg(format!("-Wl,-T,{}", lib.join("link.ld").display()))
        .arg("-I")
        .arg(lib)
        .arg("-o")
        .arg(target)
        .arg(source)
        .arg(lib.join("rt.S"))
        .output()
        .map_err(|e| format!("cannot run {cc} (install gcc and binutils): {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{}: {}", source.display(), String::from_utf8_lossy(&output.stderr)).into())
}
