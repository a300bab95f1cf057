//! Which files disks are made of, and which layers nothing needs any more.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use berth_api::v1::machine::DiskFormat;
use berth_disk::chain::describe;
use berth_disk::format::Format;
use berth_disk::layers::is_layer_name;

use crate::folder::{self, Folder, failed};
use crate::snapshot::{self, SnapshotError, SnapshotToml, is_plain};

/// A disk's format as the crate `disk` has it.
#[must_use]
pub fn format(format: DiskFormat) -> Format {
    match format {
        DiskFormat::Raw => Format::Raw,
        DiskFormat::Qcow2 => Format::Qcow2,
    }
}

/// The files in a folder that a disk is made of, by their names, from the top. Files elsewhere that an
/// image names by an absolute path are left out: they are the same for every folder.
///
/// # Errors
/// The disk is damaged, or needs what is not there.
pub fn files(folder: &Folder, file: &Path, format: Format) -> Result<Vec<String>, SnapshotError> {
    let mut names = Vec::new();
    for layer in describe(&folder.file(file), format)? {
        let here = layer.path.strip_prefix(folder.path()).ok();
        match here.filter(|rest| is_plain(rest)).and_then(Path::to_str) {
            Some(name) => names.push(name.to_owned()),
            None if here.is_none() && !layer.path.starts_with(folder.path()) => {}
            None => {
                let reason = "it is based on a file in another directory, by a relative name";
                let file = PathBuf::from(file);
                return Err(SnapshotError::Unfit { file, reason: reason.to_owned() });
            }
        }
    }
    Ok(names)
}

/// The files that a snapshot's disks are made of.
///
/// # Errors
/// As [`files`].
pub fn of_snapshot(
    folder: &Folder,
    toml: &SnapshotToml,
) -> Result<BTreeSet<String>, SnapshotError> {
    let mut needed = BTreeSet::new();
    for (_, layer) in toml.disks() {
        needed.extend(files(folder, Path::new(layer), Format::Qcow2)?);
    }
    Ok(needed)
}

/// Removes layers among `candidates` that neither the machine nor a snapshot needs. If it cannot be said
/// what they need, all stay.
///
/// # Errors
/// What a disk or a snapshot needs is not known, or the system's.
pub fn remove_unneeded(
    folder: &Folder,
    candidates: impl Fn(&str) -> bool,
) -> Result<(), SnapshotError> {
    let mut found = Vec::new();
    let reading = || failed("reading", folder.path());
    for entry in fs::read_dir(folder.path()).map_err(reading())? {
        let name = entry.map_err(reading())?.file_name();
        let name = name.to_str().filter(|name| is_layer_name(name) && candidates(name));
        found.extend(name.map(str::to_owned));
    }
    if found.is_empty() {
        return Ok(());
    }
    let mut needed = BTreeSet::new();
    for disk in folder.config()?.machine.disks {
        if disk.format == DiskFormat::Qcow2 && is_plain(&disk.file) {
            needed.extend(files(folder, &disk.file, Format::Qcow2)?);
        }
    }
    for toml in snapshot::all(folder)? {
        needed.extend(of_snapshot(folder, &toml?)?);
    }
    found.retain(|name| !needed.contains(name));
    for name in &found {
        let path = folder.file(name);
        fs::remove_file(&path).map_err(failed("removing", &path))?;
    }
    if !found.is_empty() {
        folder::sync(folder.path())?;
    }
    Ok(())
}
