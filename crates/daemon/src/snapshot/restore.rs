//! A machine becomes what a snapshot holds.
//!
//! Several files change: disks, `vm.toml`, the state to go on with. What they are to be is made first,
//! under other names; then a journal that says so; then each gets its name. From the journal on, the
//! machine is as after the restore: whoever locks the folder next ends it. Each step can be done twice.
//!
//! ```text
//! next-U.qcow2, state/.restoring/       nothing has changed; a crash leaves what is swept away
//! state/restore.toml                    ── the restore is done ──
//! disk0.qcow2 ◄─ next-U.qcow2           state/suspended ◄─ state/.restoring
//! vm.toml, snapshots/current.toml       then the journal is removed
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use berth_api::v1::machine::MachineConfig;
use berth_api::vmm::{RENEW, SUSPENDED};
use berth_disk::format::Format;
use berth_disk::tools::{self, Backing};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::folder::{self, Folder, FolderError, FolderLock, failed, gone_is_well};
use crate::snapshot::{
    self, SnapshotError, SnapshotToml, VERSION, is_plain, read_toml, state_of, write_toml,
};

const JOURNAL: &str = "state/restore.toml";
const RESTORING: &str = "state/.restoring";
const PREFIX: &str = "next-";

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Journal {
    version: u32,
    /// From which snapshots the machine descends then.
    pub(super) ancestors: Vec<Uuid>,
    /// Whether there is a state to go on with.
    has_state: bool,
    pub(super) machine: MachineConfig,
    #[serde(default, rename = "disk")]
    pub(super) disks: Vec<NewDisk>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct NewDisk {
    pub(super) file: PathBuf,
    pub(super) from: String,
}

fn is_next(name: &str) -> bool {
    name.starts_with(PREFIX) && name.ends_with(".qcow2") && is_plain(Path::new(name))
}

/// Makes a machine that does not run what a snapshot holds.
///
/// # Errors
/// The snapshot's disks cannot be used, or the system's. Before the journal is written all is as before;
/// after that the restore is ended by whoever uses the machine next.
pub fn restore(
    folder: &Folder,
    toml: &SnapshotToml,
    lock: &FolderLock,
) -> Result<(), SnapshotError> {
    snapshot::settle(folder, lock)?;
    let journal = prepare(folder, toml).inspect_err(|_| {
        // The next one removes what cannot be removed now.
        let _ = sweep(folder);
    })?;
    write_toml(&folder.file(JOURNAL), &journal)?;
    finish(folder)
}

pub(super) fn prepare(folder: &Folder, toml: &SnapshotToml) -> Result<Journal, SnapshotError> {
    let mut disks = Vec::new();
    for (file, layer) in toml.disks() {
        let from = format!("{PREFIX}{}.qcow2", Uuid::new_v4());
        let backing = Backing { name: layer.to_owned(), format: Format::Qcow2 };
        tools::create(&folder.file(&from), Format::Qcow2, None, Some(&backing))?;
        disks.push(NewDisk { file: file.to_owned(), from });
    }
    if toml.state.is_some() {
        link_state(&state_of(folder, &toml.tag), &folder.file(RESTORING))?;
        note_copy(&folder.file(RESTORING))?;
        folder::sync(&folder.file(RESTORING))?;
    }
    // The directory `state` is synced with the journal.
    folder::sync(folder.path())?;
    let mut ancestors = vec![toml.id];
    ancestors.extend(&toml.ancestors);
    Ok(Journal {
        version: VERSION,
        ancestors,
        has_state: toml.state.is_some(),
        machine: toml.machine.clone(),
        disks,
    })
}

/// Gives the files of a stored machine, which nobody writes, names in another directory as well, which
/// is made. On another file system they are copied. The caller syncs the directory.
///
/// # Errors
/// [`FolderError::File`].
pub fn link_state(from: &Path, to: &Path) -> Result<(), FolderError> {
    fs::create_dir(to).map_err(failed("creating", to))?;
    for entry in fs::read_dir(from).map_err(failed("reading", from))? {
        let entry = entry.map_err(failed("reading", from))?;
        let name = to.join(entry.file_name());
        folder::link_or_copy(&entry.path(), &name).map_err(failed("making", &name))?;
    }
    Ok(())
}

/// Notes that a state is not only of the machine that goes on with it.
///
/// # Errors
/// [`FolderError::File`].
pub fn note_copy(state: &Path) -> Result<(), FolderError> {
    let path = state.join(RENEW);
    fs::write(&path, "").map_err(failed("writing", &path))
}

/// Ends a restore that was begun.
///
/// # Errors
/// The journal is not understood, or the system's. It is ended the next time.
pub(super) fn finish(folder: &Folder) -> Result<(), SnapshotError> {
    let path = folder.file(JOURNAL);
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        _ => {}
    }
    let journal: Journal = read_toml(&path, VERSION)?;
    for disk in &journal.disks {
        if !is_next(&disk.from) || !is_plain(&disk.file) {
            let reason = format!("{} cannot become {}", disk.from, disk.file.display());
            return Err(SnapshotError::Altered { path, reason });
        }
        rename_if_there(&folder.file(&disk.from), &folder.file(&disk.file))?;
    }
    let (made, suspended) = (folder.file(RESTORING), folder.file(SUSPENDED));
    // What is not there any more has its place already.
    if made.is_dir() || !journal.has_state {
        remove_all(&suspended)?;
        rename_if_there(&made, &suspended)?;
    }
    let mut config = folder.config()?;
    config.machine = journal.machine;
    let vm_toml = folder.file(folder::CONFIG);
    folder::replace_within(&vm_toml, folder::to_toml(&vm_toml, &config)?.as_bytes())?;
    snapshot::set_ancestors(folder, journal.ancestors)?;
    folder::sync(&folder.file(snapshot::DIRECTORY))?;
    folder::sync(&folder.file("state"))?;
    folder::sync(folder.path())?;
    fs::remove_file(&path).map_err(failed("removing", &path))?;
    folder::sync(&folder.file("state"))?;
    Ok(())
}

fn rename_if_there(from: &Path, to: &Path) -> Result<(), FolderError> {
    gone_is_well(fs::rename(from, to)).map_err(failed("renaming", from))
}

fn remove_all(path: &Path) -> Result<(), FolderError> {
    gone_is_well(fs::remove_dir_all(path)).map_err(failed("removing", path))
}

/// Removes what a restore left that was not begun.
pub(super) fn sweep(folder: &Folder) -> Result<(), FolderError> {
    remove_all(&folder.file(RESTORING))?;
    let reading = || failed("reading", folder.path());
    for entry in fs::read_dir(folder.path()).map_err(reading())? {
        let name = entry.map_err(reading())?.file_name();
        if let Some(name) = name.to_str().filter(|name| is_next(name)) {
            let path = folder.file(name);
            fs::remove_file(&path).map_err(failed("removing", &path))?;
        }
    }
    Ok(())
}
