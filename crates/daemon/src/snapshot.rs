//! Snapshots in a machine's folder: what they are made of, and what state a folder is in when a crash
//! came in between.
//!
//! `docs/formats/snapshots.md` describes them. A snapshot is a directory that is there as a whole, by its
//! rename, or not at all. [`sums`] makes sure that it is still what was stored, [`verified`] that this
//! is not done in vain, [`layers`] knows which
//! layers of disks are needed, [`restore`] puts a machine back.

pub mod layers;
pub mod restore;
pub mod sums;
pub mod verified;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use berth_api::v1::machine::{Disk, DiskFormat, MachineConfig};
use berth_api::v1::snapshot::is_tag;
use berth_disk::error::DiskError;
use berth_disk::layers::{is_layer_name, layer_name};
use jiff::Timestamp;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::folder::{self, Folder, FolderError, FolderLock, failed, read_bounded};
use crate::snapshot::sums::StateSums;

/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// Where a machine's snapshots are.
pub const DIRECTORY: &str = "snapshots";
/// What a snapshot is.
pub const DESCRIPTION: &str = "snapshot.toml";
/// Memory and processors, in a snapshot.
pub const STATE: &str = "state";
/// From which snapshots the machine descends.
const CURRENT: &str = "snapshots/current.toml";
/// Most snapshots of a machine.
pub const SNAPSHOTS_MAX: usize = 1024;
/// Bytes a description may have.
const TOML_MAX: u64 = 256 << 10;
const UNFINISHED: &str = ".new-";
const GONE: &str = ".gone-";

/// Why something cannot be done with a snapshot.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The folder.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// There is none.
    #[error("there is no snapshot {tag}")]
    Absent {
        /// Its tag.
        tag: String,
    },
    /// A disk of a kind that cannot be frozen.
    #[error("the disk {file} cannot be in a snapshot: {reason}", file = file.display())]
    Unfit {
        /// The disk.
        file: PathBuf,
        /// Why, and what to try.
        reason: String,
    },
    /// It is not what was stored.
    #[error("{path} is not what was stored: {reason}; the snapshot cannot be used", path = path.display())]
    Altered {
        /// The file.
        path: PathBuf,
        /// What is different.
        reason: String,
    },
    /// There are too many.
    #[error("there are {SNAPSHOTS_MAX} snapshots already; `berth vm snapshot-rm` removes some")]
    Many,
}

/// What `snapshot.toml` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotToml {
    /// [`VERSION`].
    pub version: u32,
    /// Its identity.
    pub id: Uuid,
    /// Its name, and that of its directory.
    pub tag: String,
    /// When it was taken.
    pub created: Timestamp,
    /// From which snapshots the machine descended, the nearest first. Some may be gone.
    #[serde(default)]
    pub ancestors: Vec<Uuid>,
    /// How long the guest stood still, in microseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// What the machine was made of.
    pub machine: MachineConfig,
    /// For each of its disks where what it held is; absent for one that is not written.
    #[serde(default, rename = "layer", skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<FrozenDisk>,
    /// Memory and processors, if they are in it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state: Option<StateSums>,
}

/// A disk in a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FrozenDisk {
    /// Which disk, by its number.
    pub disk: usize,
    /// The layer, in the machine's folder.
    pub file: String,
}

impl SnapshotToml {
    /// The layers, each with the file of its disk.
    pub fn disks(&self) -> impl Iterator<Item = (&Path, &str)> {
        self.layers.iter().filter_map(|layer| {
            let disk = self.machine.disks.get(layer.disk)?;
            Some((disk.file.as_path(), layer.file.as_str()))
        })
    }

    /// What it says must fit together: it may have been altered.
    fn check(&self) -> Result<(), String> {
        for layer in &self.layers {
            let disk = self.machine.disks.get(layer.disk);
            let disk = disk.ok_or_else(|| format!("there is no disk {}", layer.disk))?;
            if !is_layer_name(&layer.file) || !is_plain(&disk.file) || disk.read_only {
                return Err(format!("disk {} cannot have the layer {}", layer.disk, layer.file));
            }
        }
        let frozen = |index| self.layers.iter().filter(|layer| layer.disk == index).count();
        for (index, disk) in self.machine.disks.iter().enumerate() {
            if frozen(index) != usize::from(!disk.read_only) {
                return Err(format!("disk {index} has {} layers", frozen(index)));
            }
        }
        Ok(())
    }
}

/// A name of a file in the folder itself.
pub(crate) fn is_plain(file: &Path) -> bool {
    let mut parts = file.components();
    matches!((parts.next(), parts.next()), (Some(std::path::Component::Normal(_)), None))
}

/// A name for the layer of each disk that is written.
///
/// # Errors
/// [`SnapshotError::Unfit`] names the first disk that cannot be frozen.
pub fn new_layers(config: &MachineConfig) -> Result<Vec<Option<String>>, SnapshotError> {
    let name = |disk: &Disk| {
        let unfit = |reason: &str| {
            let (file, reason) = (disk.file.clone(), reason.to_owned());
            Err(SnapshotError::Unfit { file, reason })
        };
        match disk.format {
            _ if disk.read_only => Ok(None),
            _ if !is_plain(&disk.file) => unfit(
                "it is not in the machine's folder; `berth disk convert` copies it there as a qcow2 \
                 disk, which `vm.toml` can name, or it can be read-only",
            ),
            DiskFormat::Raw => {
                unfit("it is raw and in use; stop the machine, and take the first snapshot then")
            }
            DiskFormat::Qcow2 => Ok(Some(layer_name(&Uuid::new_v4().to_string()))),
        }
    };
    config.disks.iter().map(name).collect()
}

fn directory(folder: &Folder) -> PathBuf {
    folder.file(DIRECTORY)
}

/// All snapshots, the oldest first. What cannot be understood is given as its error.
///
/// # Errors
/// The directory cannot be read.
pub fn all(folder: &Folder) -> Result<Vec<Result<SnapshotToml, SnapshotError>>, SnapshotError> {
    let directory = directory(folder);
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed("reading", &directory)(error).into()),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed("reading", &directory))?;
        let name = entry.file_name();
        let is_directory = entry.file_type().is_ok_and(|kind| kind.is_dir());
        if let Some(tag) = name.to_str().filter(|name| is_directory && is_tag(name)) {
            found.push(find(folder, tag));
        }
    }
    found.sort_by_key(|one| one.as_ref().map_or(Timestamp::MIN, |one| one.created));
    Ok(found)
}

/// The snapshot of that tag.
///
/// # Errors
/// There is none, or what it says is not understood.
pub fn find(folder: &Folder, tag: &str) -> Result<SnapshotToml, SnapshotError> {
    let path = directory(folder).join(tag);
    if !is_tag(tag) || !path.is_dir() {
        return Err(SnapshotError::Absent { tag: tag.to_owned() });
    }
    let toml: SnapshotToml = read_toml(&path.join(DESCRIPTION), VERSION)?;
    let consistent = match toml.tag == tag {
        true => toml.check(),
        false => Err(format!("it is of {}", toml.tag)),
    };
    let path = path.join(DESCRIPTION);
    consistent.map_err(|reason| SnapshotError::Altered { path, reason })?;
    Ok(toml)
}

/// Where the memory of a snapshot is.
#[must_use]
pub fn state_of(folder: &Folder, tag: &str) -> PathBuf {
    directory(folder).join(tag).join(STATE)
}

/// Reads a file of ours that has a version.
pub(crate) fn read_toml<T: serde::de::DeserializeOwned>(
    path: &Path,
    version: u32,
) -> Result<T, FolderError> {
    let text = read_bounded(path, TOML_MAX)?;
    folder::parse_versioned(path, &text, version)
}

pub(crate) fn write_toml(path: &Path, value: &impl Serialize) -> Result<(), FolderError> {
    folder::replace(path, folder::to_toml(path, value)?.as_bytes())
}

/// What [`CURRENT`] says.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Current {
    version: u32,
    ancestors: Vec<Uuid>,
}

/// From which snapshots a machine descends, the nearest first. Some may be gone, or never have been
/// completed.
///
/// # Errors
/// It cannot be read.
pub fn ancestors(folder: &Folder) -> Result<Vec<Uuid>, FolderError> {
    let path = folder.file(CURRENT);
    match path.symlink_metadata() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        _ => read_toml::<Current>(&path, VERSION).map(|current| current.ancestors),
    }
}

/// Notes from which snapshots it descends. The caller syncs [`DIRECTORY`] and the folder.
///
/// # Errors
/// [`FolderError::File`].
pub fn set_ancestors(folder: &Folder, ancestors: Vec<Uuid>) -> Result<(), FolderError> {
    make_directory(folder)?;
    let path = folder.file(CURRENT);
    let text = folder::to_toml(&path, &Current { version: VERSION, ancestors })?;
    folder::replace_within(&path, text.as_bytes())
}

fn make_directory(folder: &Folder) -> Result<(), FolderError> {
    let directory = directory(folder);
    match fs::create_dir(&directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(failed("creating", &directory)(error))
        }
        _ => Ok(()),
    }
}

/// A snapshot that is being taken. Unless it is published, nothing of it stays.
#[derive(Debug)]
pub struct Draft {
    folder: Folder,
    name: String,
    is_published: bool,
}

impl Draft {
    /// Begins one, with a directory for the machine's state or without.
    ///
    /// # Errors
    /// [`FolderError::File`].
    pub fn begin(folder: &Folder, with_state: bool) -> Result<Self, FolderError> {
        make_directory(folder)?;
        let name = format!("{DIRECTORY}/{UNFINISHED}{}", Uuid::new_v4());
        let draft = Self { folder: folder.clone(), name, is_published: false };
        let path = draft.path();
        fs::create_dir(&path).map_err(failed("creating", &path))?;
        if with_state {
            let state = draft.state();
            fs::create_dir(&state).map_err(failed("creating", &state))?;
        }
        Ok(draft)
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.file(&self.name)
    }

    /// Where the machine's state is to be.
    #[must_use]
    pub fn state(&self) -> PathBuf {
        self.path().join(STATE)
    }

    /// The same, relative to the folder.
    #[must_use]
    pub fn state_name(&self) -> String {
        format!("{}/{STATE}", self.name)
    }

    /// Makes it the snapshot that the description says, from which the machine descends then.
    ///
    /// # Errors
    /// There is one of that tag, or the system's; then there is nothing of it.
    pub fn publish(mut self, toml: &SnapshotToml) -> Result<(), SnapshotError> {
        let path = self.path();
        write_toml(&path.join(DESCRIPTION), toml)?;
        // Before it is there: whoever is not there is passed over.
        let mut ancestors = vec![toml.id];
        ancestors.extend(&toml.ancestors);
        set_ancestors(&self.folder, ancestors)?;
        let target = directory(&self.folder).join(&toml.tag);
        match renameat_with(CWD, &path, CWD, &target, RenameFlags::NOREPLACE) {
            Ok(()) => {}
            Err(rustix::io::Errno::EXIST) => {
                return Err(FolderError::Exists { path: target }.into());
            }
            Err(errno) => return Err(failed("renaming", &path)(errno.into()).into()),
        }
        self.is_published = true;
        folder::sync(&directory(&self.folder))?;
        // Of the directory itself, which may be new.
        folder::sync(self.folder.path())?;
        // Of a machine that runs nobody else takes one at the same time: others were left behind.
        if let Err(error) = sweep_drafts(&self.folder) {
            tracing::warn!(%error, "what was left behind cannot be removed");
        }
        Ok(())
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if !self.is_published {
            // What stays is removed when the machine is started the next time.
            let _ = fs::remove_dir_all(self.path());
        }
    }
}

/// Removes a snapshot, also one that is not understood, and the layers that nothing needs any more.
///
/// # Errors
/// There is none, or the system's; with its first step it is gone.
pub fn remove(folder: &Folder, tag: &str) -> Result<(), SnapshotError> {
    let path = directory(folder).join(tag);
    if !is_tag(tag) || !path.is_dir() {
        return Err(SnapshotError::Absent { tag: tag.to_owned() });
    }
    let needed = find(folder, tag).and_then(|toml| layers::of_snapshot(folder, &toml));
    let gone = directory(folder).join(format!("{GONE}{}", Uuid::new_v4()));
    fs::rename(&path, &gone).map_err(failed("removing", &path))?;
    folder::sync(&directory(folder))?;
    fs::remove_dir_all(&gone).map_err(failed("removing", &gone))?;
    match needed {
        Ok(needed) => layers::remove_unneeded(folder, |name| needed.contains(name)),
        // They are found again when the machine is started the next time.
        Err(error) => {
            tracing::warn!(error = &error as &dyn std::error::Error, "layers are kept");
            Ok(())
        }
    }
}

/// Puts a folder that nobody else has in order: ends a restore that was begun, and removes what a crash
/// left. Whoever locks a folder to use its disks begins with this.
///
/// # Errors
/// A restore cannot be ended; the machine must not run before it is.
pub fn settle(folder: &Folder, _lock: &FolderLock) -> Result<(), SnapshotError> {
    restore::finish(folder)?;
    let swept = sweep(folder);
    if let Err(error) = swept {
        tracing::warn!(error = &error as &dyn std::error::Error, "what is left cannot be removed");
    }
    Ok(())
}

fn sweep(folder: &Folder) -> Result<(), SnapshotError> {
    sweep_drafts(folder)?;
    restore::sweep(folder)?;
    layers::remove_unneeded(folder, |_| true)
}

/// Removes snapshots that are neither complete nor there any more.
fn sweep_drafts(folder: &Folder) -> Result<(), FolderError> {
    let directory = directory(folder);
    if let Ok(entries) = fs::read_dir(&directory) {
        for entry in entries {
            let entry = entry.map_err(failed("reading", &directory))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with(UNFINISHED) || name.starts_with(GONE) {
                fs::remove_dir_all(entry.path()).map_err(failed("removing", &entry.path()))?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
