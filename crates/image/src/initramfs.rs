//! Puts the initramfs together: the agent as `/init`, and the modules in loading order. Not
//! compressed: the guest would spend longer unpacking it than the host saves reading it.

use std::fs;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use crate::agent::Agent;
use crate::cpio::{Archive, TooLarge};
use crate::modules::{Modules, ModulesError, OPTIONAL, REQUIRED};
use crate::store::{Image, StoreError, failed};

/// Changes whenever the same input gives another archive.
const LAYOUT: &str = "4";

/// Why there is no initramfs.
#[derive(Debug, thiserror::Error)]
pub enum InitramfsError {
    /// The modules.
    #[error(transparent)]
    Modules(#[from] ModulesError),
    /// The archive.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The initramfs of an image with this agent; made when it does not exist yet.
///
/// # Errors
/// [`InitramfsError`].
pub fn for_image(image: &Image, agent: &Agent) -> Result<PathBuf, InitramfsError> {
    let directory = image.initramfs_directory();
    let mut hash = Sha256::new();
    for part in [LAYOUT.as_bytes(), image.info.kernel_version.as_bytes(), &agent.bytes] {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    let key: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let path = directory.join(format!("{key}.cpio"));
    if path.exists() {
        return Ok(path);
    }
    let bytes = assemble(&image.modules(), &agent.bytes)?;
    fs::create_dir_all(&directory).map_err(failed("creating", &directory))?;
    // Those of earlier agents; one that is in use has been read into its machine already.
    for old in fs::read_dir(&directory).into_iter().flatten().flatten() {
        let _ = fs::remove_file(old.path());
    }
    let unfinished = directory.join(format!(".{key}.{}", std::process::id()));
    fs::write(&unfinished, &bytes).map_err(failed("writing", &unfinished))?;
    fs::rename(&unfinished, &path).map_err(failed("publishing", &path))?;
    Ok(path)
}

/// The archive's bytes.
///
/// # Errors
/// [`InitramfsError`].
pub fn assemble(modules: &Path, agent: &[u8]) -> Result<Vec<u8>, InitramfsError> {
    let order = Modules::open(modules)?.load_order(&REQUIRED, &OPTIONAL)?;
    let mut archive = Archive::default();
    for directory in ["dev", "proc", "sys", "newroot", "modules"] {
        archive.directory(directory)?;
    }
    archive.device("dev/console", 0o600, (5, 1))?;
    archive.file("init", 0o755, agent)?;
    let mut list = String::new();
    for path in order {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let bytes = fs::read(&path).map_err(failed("reading", &path))?;
        archive.file(&format!("modules/{name}"), 0o644, &bytes)?;
        list.push_str(&name);
        list.push('\n');
    }
    archive.file("modules/order", 0o644, list.as_bytes())?;
    Ok(archive.finish())
}
