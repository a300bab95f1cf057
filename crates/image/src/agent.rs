//! Finds the agent's program, which goes into every initramfs. It must be linked statically; the one
//! a plain `cargo build` leaves beside `berth` is not and is passed over.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use object::read::elf::{FileHeader, ProgramHeader};
use object::{Endianness, elf};

/// The agent's program.
#[derive(Debug)]
pub struct Agent {
    /// Where it was found.
    pub path: PathBuf,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// There is none that can be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "no static berth-agent was found ({}); build it with `cargo xtask agent`, or name it in \
     BERTH_AGENT",
    tried.join("; ")
)]
pub struct NoAgent {
    /// Each place with the reason why it would not do.
    pub tried: Vec<String>,
}

/// Looks where `BERTH_AGENT` says, or else beside the running program, in an installation's
/// `lib/berth`, and in the build tree.
///
/// # Errors
/// [`NoAgent`] with all places tried.
pub fn find() -> Result<Agent, NoAgent> {
    let places = match std::env::var_os("BERTH_AGENT") {
        Some(path) => vec![PathBuf::from(path)],
        None => std::env::current_exe().map(|exe| places_near(&exe)).unwrap_or_default(),
    };
    let mut tried = Vec::new();
    for path in places {
        match usable(&path) {
            Ok(bytes) => return Ok(Agent { path, bytes }),
            Err(reason) => tried.push(format!("{}: {reason}", path.display())),
        }
    }
    Err(NoAgent { tried })
}

fn places_near(program: &Path) -> Vec<PathBuf> {
    let Some(directory) = program.parent() else { return Vec::new() };
    [
        "berth-agent",
        "../lib/berth/berth-agent",
        "../agent/x86_64-unknown-linux-gnu/agent/berth-agent",
    ]
    .iter()
    .map(|place| directory.join(place))
    .collect()
}

fn usable(path: &Path) -> Result<Vec<u8>, String> {
    let bytes = fs::read(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => "does not exist".to_owned(),
        _ => error.to_string(),
    })?;
    match is_static(&bytes) {
        Ok(true) => Ok(bytes),
        Ok(false) => Err("needs shared libraries, which an initramfs has not".into()),
        Err(error) => Err(format!("is no x86-64 program: {error}")),
    }
}

fn is_static(bytes: &[u8]) -> Result<bool, object::Error> {
    let header = elf::FileHeader64::<Endianness>::parse(bytes)?;
    let endian = header.endian()?;
    let segments = header.program_headers(endian, bytes)?;
    Ok(segments.iter().all(|segment| segment.p_type(endian) != elf::PT_INTERP))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_with_an_interpreter_is_passed_over() {
        let shell = fs::read("/bin/sh").unwrap();
        assert!(!is_static(&shell).unwrap());
        assert!(usable(Path::new("/bin/sh")).unwrap_err().contains("shared libraries"));
        assert!(usable(Path::new("/etc/passwd")).unwrap_err().contains("no x86-64 program"));
        assert!(usable(Path::new("/no/such/file")).unwrap_err().contains("does not exist"));
        for len in 0..200 {
            // Cut short it is an error or, with no segment left to read, an answer; never a panic.
            let _ = is_static(&shell[..len]);
        }
    }
}
