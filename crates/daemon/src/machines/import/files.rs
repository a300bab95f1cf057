//! The files of a machine that comes out of an appliance.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use berth_api::vmm::SUSPENDED;
use berth_appliance::checkpoint::Checkpoint;
use berth_appliance::manifest::{FileEntry, Manifest, Role};
use berth_appliance::read::Place;
use berth_disk::chain::{Access, open_image};
use berth_disk::format::Format;
use berth_disk::qcow2::image::Image;
use berth_disk::tools;

use crate::failure::{Result, failed};
use crate::folder::{self, Folder, unfinished};

/// Pieces that are left out where they are zero.
const PIECE_BYTES: usize = 4096;

/// What a file is called in the folder.
pub(super) fn name_of(manifest: &Manifest, index: usize) -> String {
    let role =
        |file: &&FileEntry| Some(file.role) == manifest.files.get(index).map(|file| file.role);
    let number = manifest.files.iter().take(index).filter(role).count();
    match manifest.files.get(index).map(|file| file.role) {
        Some(Role::Disk) => format!("disk{number}.qcow2"),
        Some(Role::Initrd) => format!("initrd{number}"),
        Some(Role::State) => format!("{SUSPENDED}/{}", folder::MACHINE),
        Some(Role::Memory) => format!("{SUSPENDED}/{}", folder::MEMORY),
        Some(Role::Kernel) | None => "kernel".to_owned(),
    }
}

/// A file of the new machine.
enum Target {
    /// A disk.
    Disk(Box<Image>),
    /// Anything else.
    File(File),
    /// Memory that is not wanted.
    Nothing,
}

impl Place for Target {
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let mut at = at;
        for piece in bytes.chunks(PIECE_BYTES) {
            if piece.iter().any(|byte| *byte != 0) {
                match self {
                    Self::Disk(image) => image.write(at, piece)?,
                    Self::File(file) => file.write_all_at(piece, at)?,
                    Self::Nothing => {}
                }
            }
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Disk(image) => image.read(at, buffer),
            Self::File(file) => file.read_exact_at(buffer, at),
            Self::Nothing => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn is_wanted(&self) -> bool {
        !matches!(self, Self::Nothing)
    }
}

impl Target {
    /// Waits until all that was written would survive a loss of power.
    fn sync(&self) -> io::Result<()> {
        match self {
            Self::Disk(image) => image.flush(),
            Self::File(file) => file.sync_all(),
            Self::Nothing => Ok(()),
        }
    }

    /// Makes everything from there on zero.
    fn clear(&self, from: u64, size: u64) -> io::Result<()> {
        match self {
            Self::Disk(image) => {
                let mut at = from;
                while at < size {
                    let (is_zero, run) = image.extent(at, size - at)?;
                    if !is_zero {
                        image.write_zeroes(at, run, true)?;
                    }
                    at += run;
                }
                Ok(())
            }
            Self::File(file) => file.set_len(from).and_then(|()| file.set_len(size)),
            Self::Nothing => Ok(()),
        }
    }

    fn size(&self) -> io::Result<Option<u64>> {
        match self {
            Self::Disk(image) => Ok(Some(image.size())),
            Self::File(file) => file.metadata().map(|meta| Some(meta.len())),
            Self::Nothing => Ok(None),
        }
    }
}

/// All files of the new machine, with what each is called.
pub(super) struct Files {
    all: Vec<(String, Target)>,
}

impl Files {
    /// Makes them.
    pub(super) fn make(folder: &Folder, manifest: &Manifest, with_state: bool) -> Result<Self> {
        if with_state {
            let state = folder.file(SUSPENDED);
            fs::create_dir(&state).map_err(folder::failed("creating", &state))?;
        }
        let mut all = Vec::new();
        for index in 0..manifest.files.len() {
            all.push(make(folder, manifest, index, with_state)?);
        }
        Ok(Self { all })
    }

    /// Opens those of an import that broke off, and makes them what they were at its checkpoint.
    pub(super) fn reopen(
        folder: &Folder,
        manifest: &Manifest,
        with_state: bool,
        checkpoint: &Checkpoint,
    ) -> Result<Self> {
        let mut all = Vec::new();
        for (index, entry) in manifest.files.iter().enumerate() {
            let name = place_of(manifest, index, with_state);
            let path = folder.file(&name);
            let is_there = (index as u64) < checkpoint.file;
            let comes = index as u64 == checkpoint.file && checkpoint.done > 0;
            if entry.role == Role::Memory && !with_state {
                all.push((name, Target::Nothing));
                continue;
            }
            if !is_there && !comes {
                folder::remove_file(&path)?;
                all.push(make(folder, manifest, index, with_state)?);
                continue;
            }
            let target = open(&path, entry.role, comes)?;
            let size = target.size().map_err(folder::failed("reading", &path))?;
            if size != Some(entry.size) {
                let reason = format!("it does not have {} bytes", entry.size);
                return Err(folder::FolderError::Config { path, reason }.into());
            }
            if comes {
                let cleared = target.clear(checkpoint.done, entry.size);
                cleared.map_err(folder::failed("writing", &path))?;
            }
            all.push((name, target));
        }
        Ok(Self { all })
    }

    pub(super) fn places(&mut self) -> Vec<&mut dyn Place> {
        self.all.iter_mut().map(|(_, target)| target as &mut dyn Place).collect()
    }

    /// Makes last what was written of a file.
    pub(super) fn sync(&self, folder: &Folder, index: usize) -> Result<()> {
        let Some((name, target)) = self.all.get(index) else { return Ok(()) };
        Ok(target.sync().map_err(folder::failed("writing", &folder.file(name)))?)
    }

    /// The same with one that is complete.
    pub(super) fn finish(&self, folder: &Folder, index: usize) -> Result<()> {
        self.sync(folder, index)?;
        let Some((name, Target::Disk(image))) = self.all.get(index) else { return Ok(()) };
        Ok(image.close().map_err(folder::failed("writing", &folder.file(name)))?)
    }
}

/// Where a file is put, wanted or not.
fn place_of(manifest: &Manifest, index: usize, with_state: bool) -> String {
    match manifest.files.get(index).map(|file| file.role) {
        Some(Role::State) if !with_state => unfinished::STATE.to_owned(),
        _ => name_of(manifest, index),
    }
}

fn make(
    folder: &Folder,
    manifest: &Manifest,
    index: usize,
    with_state: bool,
) -> Result<(String, Target)> {
    let name = place_of(manifest, index, with_state);
    let path = folder.file(&name);
    let target = match manifest.files.get(index) {
        Some(FileEntry { role: Role::Memory, .. }) if !with_state => Target::Nothing,
        Some(FileEntry { role: Role::Disk, size, .. }) => make_disk(&path, *size)?,
        Some(entry) => make_file(&path, entry.size)?,
        None => Target::Nothing,
    };
    Ok((name, target))
}

fn make_disk(path: &Path, size: u64) -> Result<Target> {
    let made = tools::create(path, Format::Qcow2, Some(size), None);
    made.map_err(|error| failed(&error))?;
    open(path, Role::Disk, true)
}

fn make_file(path: &Path, size: u64) -> Result<Target> {
    let file = folder::own_file().read(true).write(true).create_new(true).open(path);
    let file = file.map_err(folder::failed("creating", path))?;
    file.set_len(size).map_err(folder::failed("writing", path))?;
    Ok(Target::File(file))
}

fn open(path: &Path, role: Role, for_writing: bool) -> Result<Target> {
    if role == Role::Disk {
        let access = if for_writing { Access::Write } else { Access::Read };
        let image = open_image(path, access).map_err(|error| failed(&error))?;
        return Ok(Target::Disk(Box::new(image)));
    }
    let file = folder::own_file().create(false).read(true).write(for_writing).open(path);
    Ok(Target::File(file.map_err(folder::failed("opening", path))?))
}
