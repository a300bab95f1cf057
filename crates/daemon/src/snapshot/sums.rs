//! Checksums of a stored machine: whatever of it was cut or altered is found before anything starts.
//!
//! Memory is taken in blocks of 1 MiB; blocks of zeroes are left out, so that the sum does not depend on
//! where the file has holes. Each other block goes in behind its number.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use berth_disk::storage::Storage;
use serde::{Deserialize, Serialize};

use crate::folder::{FolderError, MACHINE, MEMORY, failed};
use crate::snapshot::SnapshotError;

/// Bytes of what the vCPUs and devices hold.
const MACHINE_MAX: u64 = 64 << 20;
const BLOCK: usize = 1 << 20;

/// What a stored machine must be, in hexadecimal BLAKE3.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateSums {
    /// Of the bytes of `machine.json`.
    pub machine: String,
    /// Of the blocks of `memory` that are not zero.
    pub memory: String,
    /// Its length.
    pub memory_bytes: u64,
}

fn open(path: &Path) -> Result<File, FolderError> {
    // Looked at first: opening a pipe would wait.
    let meta = path.symlink_metadata().map_err(failed("reading", path))?;
    if !meta.is_file() {
        let reason = "it is no regular file".to_owned();
        return Err(FolderError::Config { path: path.to_owned(), reason });
    }
    File::open(path).map_err(failed("opening", path))
}

/// The sums of what is in a directory.
///
/// # Errors
/// It cannot be read.
pub fn of(directory: &Path) -> Result<StateSums, FolderError> {
    let path = directory.join(MACHINE);
    let file = open(&path)?;
    let mut hasher = blake3::Hasher::new();
    let mut block = vec![0; BLOCK];
    let mut whole = file.take(MACHINE_MAX);
    loop {
        match whole.read(&mut block) {
            Ok(0) => break,
            Ok(count) => drop(hasher.update(block.get(..count).unwrap_or_default())),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("reading", &path)(error)),
        }
    }
    let machine = hasher.finalize().to_hex().to_string();
    let path = directory.join(MEMORY);
    let file = open(&path)?;
    let (memory, memory_bytes) = of_memory(&file, &mut block).map_err(failed("reading", &path))?;
    Ok(StateSums { machine, memory, memory_bytes })
}

fn of_memory(file: &File, block: &mut [u8]) -> io::Result<(String, u64)> {
    let len = file.metadata()?.len();
    let mut hasher = blake3::Hasher::new();
    let mut at = 0;
    while at < len {
        let hole = file.hole(at);
        if hole >= BLOCK as u64 {
            // The block in which data begins is read whole.
            at += hole / BLOCK as u64 * BLOCK as u64;
            continue;
        }
        let count = (len - at).min(BLOCK as u64) as usize;
        let part = block.get_mut(..count).unwrap_or_default();
        file.read_exact_at(part, at)?;
        if part.iter().any(|byte| *byte != 0) {
            hasher.update(&(at / BLOCK as u64).to_le_bytes());
            hasher.update(part);
        }
        at += count as u64;
    }
    Ok((hasher.finalize().to_hex().to_string(), len))
}

impl StateSums {
    /// Whether what is in a directory is what was stored.
    ///
    /// # Errors
    /// [`SnapshotError::Altered`] says which file is not.
    pub fn verify(&self, directory: &Path) -> Result<(), SnapshotError> {
        let found = of(directory)?;
        let altered = |name: &str, reason: String| {
            Err(SnapshotError::Altered { path: PathBuf::from(directory).join(name), reason })
        };
        if found.machine != self.machine {
            return altered(MACHINE, "its checksum is another".to_owned());
        }
        if found.memory_bytes != self.memory_bytes {
            let (now, then) = (found.memory_bytes, self.memory_bytes);
            return altered(MEMORY, format!("it has {now} bytes, and had {then}"));
        }
        if found.memory != self.memory {
            return altered(MEMORY, "its checksum is another".to_owned());
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_altered_is_found() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(MACHINE), "{}").unwrap();
        let memory = File::options();
        let mut memory = memory.clone();
        let memory = memory.read(true).write(true).create(true).truncate(false);
        let memory = memory.open(dir.path().join(MEMORY)).unwrap();
        memory.set_len(10 << 20).unwrap();
        memory.write_all_at(b"x", 3 << 20).unwrap();
        memory.write_all_at(b"y", (10 << 20) - 1).unwrap();
        let sums = of(dir.path()).unwrap();
        sums.verify(dir.path()).unwrap();
        // Zeroes or a hole: the same.
        memory.write_all_at(&[0; 4096], 5 << 20).unwrap();
        sums.verify(dir.path()).unwrap();
        let altered = |part: &str| {
            let error = sums.verify(dir.path()).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        };
        for (at, old) in [(3 << 20, b'x'), (5 << 20, 0), ((10 << 20) - 1, b'y')] {
            memory.write_all_at(b"z", at).unwrap();
            altered("memory");
            memory.write_all_at(&[old], at).unwrap();
        }
        // The same bytes elsewhere.
        memory.write_all_at(&[0], 3 << 20).unwrap();
        memory.write_all_at(b"x", 4 << 20).unwrap();
        altered("memory");
        memory.write_all_at(&[0], 4 << 20).unwrap();
        memory.write_all_at(b"x", 3 << 20).unwrap();
        sums.verify(dir.path()).unwrap();
        memory.set_len(9 << 20).unwrap();
        altered("bytes");
        memory.set_len(10 << 20).unwrap();
        memory.write_all_at(b"y", (10 << 20) - 1).unwrap();
        sums.verify(dir.path()).unwrap();
        std::fs::write(dir.path().join(MACHINE), "{ }").unwrap();
        altered("machine.json");
        std::fs::remove_file(dir.path().join(MACHINE)).unwrap();
        altered("machine.json");
    }
}
