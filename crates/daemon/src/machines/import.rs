//! Machines out of appliances. Nothing of one is there before all of it has come and is what was packed.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_api::v1::event::EventKind;
use berth_api::v1::machine::{Disk, DiskFormat, MachineConfig, Net};
use berth_api::vmm::{IDENTITY, SUSPENDED};
use berth_appliance::manifest::{FileEntry, Manifest, Role};
use berth_appliance::read::{Place, Reader};
use berth_disk::chain::{Access, open_image};
use berth_disk::format::Format;
use berth_disk::qcow2::image::Image;
use berth_disk::tools;
use jiff::Timestamp;
use tokio::runtime::Handle;
use uuid::Uuid;

use crate::failure::{Result, conflict, failed, of_appliance};
use crate::folder::{self, Folder, Unnamed, VERSION, VmToml};
use crate::machines::create::check;
use crate::machines::snapshots::blocking;
use crate::machines::{Entry, Machines, check_name, load, of_vmm};
use crate::snapshot::restore::note_copy;
use crate::vmm;

/// Pieces that are left out where they are zero.
const PIECE_BYTES: usize = 4096;

/// What is to be made of an appliance.
#[derive(Clone, Debug, Default)]
pub struct Import {
    /// The machine's name, if it is not to have the appliance's.
    pub name: Option<String>,
    /// Its disks only, though memory is there.
    pub without_state: bool,
}

impl Machines {
    /// Makes a machine of an appliance. It does not run yet; one with memory is suspended.
    ///
    /// # Errors
    /// The appliance is damaged, cannot go on here, or its name is taken; then there is nothing of it.
    pub async fn import(
        self: &Arc<Self>,
        from: impl Read + Send + 'static,
        request: Import,
    ) -> Result<Arc<Entry>> {
        let (machines, handle) = (Arc::clone(self), Handle::current());
        let made = blocking(move || machines.import_now(from, &request, &handle)).await;
        let (entry, was) = made?;
        self.tell(EventKind::Imported, &entry, Some(was));
        Ok(entry)
    }

    fn import_now(
        &self,
        from: impl Read,
        request: &Import,
        handle: &Handle,
    ) -> Result<(Arc<Entry>, String)> {
        let mut reader = Reader::new(from).map_err(|error| of_appliance(&error))?;
        let manifest = reader.manifest().clone();
        let name = request.name.as_ref().unwrap_or(&manifest.name);
        check_name(name)?;
        if self.all().contains_key(name) {
            return Err(conflict(format!("there is a machine {name} already; try --name")));
        }
        let with_state = manifest.has_state() && !request.without_state;
        if with_state && matches!(manifest.machine.net, Net::Tap(_) | Net::Network(_)) {
            return Err(conflict(
                "the network card in its memory was on an interface of its host, and can do what one \
                 here cannot; --without-state takes its disks only",
            ));
        }
        let machine = config(&manifest);
        check(&machine)?;
        let id = Uuid::new_v4();
        let toml = VmToml { version: VERSION, id, created: Timestamp::now(), machine };
        let unnamed = Unnamed::make(&self.directory, &toml, |folder| {
            let mut files = Files::make(folder, &manifest, with_state)?;
            for (index, entry) in manifest.files.iter().enumerate() {
                reader.file(&mut files.places()).map_err(|error| of_appliance(&error))?;
                files.finish(index)?;
                if entry.role == Role::State && with_state {
                    let state = folder.file(SUSPENDED);
                    let fits = handle.block_on(vmm::check(&self.program, &toml.machine, &state));
                    fits.map_err(|error| cannot_go_on(&error))?;
                }
            }
            reader.finish().map_err(|error| of_appliance(&error))?;
            if with_state {
                note_copy(&folder.file(SUSPENDED))?;
                folder::sync(&folder.file(SUSPENDED))?;
            }
            folder::replace(&folder.file(IDENTITY), format!("{}\n", manifest.name).as_bytes())?;
            load::note_place(folder)?;
            Ok::<_, berth_api::v1::error::ApiError>(())
        })?;
        let mut all = self.all();
        if all.contains_key(name) {
            return Err(conflict(format!("there is a machine {name} already; try --name")));
        }
        let folder = unnamed.name(name)?;
        // It is there; only a crash could undo that.
        if let Err(error) = folder::sync(&self.directory) {
            tracing::warn!(%error, "an imported machine may not survive a power failure");
        }
        let entry = Entry::new(name.clone(), folder, toml);
        all.insert(name.clone(), Arc::clone(&entry));
        drop(all);
        Ok((entry, manifest.name))
    }
}

fn cannot_go_on(error: &vmm::VmmError) -> berth_api::v1::error::ApiError {
    let mut error = of_vmm("the appliance", error);
    error.code = berth_api::v1::error::ErrorCode::Conflict;
    error.message.push_str("; --without-state takes its disks only");
    error
}

/// What the machine is made of here. An appliance names no files, and no interfaces, networks
/// and ports of this host.
fn config(manifest: &Manifest) -> MachineConfig {
    let mut machine = manifest.machine.clone();
    if matches!(machine.net, Net::Tap(_) | Net::Network(_)) {
        // A card stays a card.
        machine.net = Net::User;
    }
    machine.ports.clear();
    machine.kernel = Some("kernel".into());
    let mut modules = Vec::new();
    for (index, file) in manifest.files.iter().enumerate() {
        match file.role {
            Role::Initrd if file.words.is_empty() => modules.push(name_of(manifest, index)),
            Role::Initrd => modules.push(format!("{} {}", name_of(manifest, index), file.words)),
            Role::Disk => machine.disks.push(Disk {
                file: name_of(manifest, index).into(),
                format: DiskFormat::Qcow2,
                read_only: file.read_only,
            }),
            _ => {}
        }
    }
    machine.initrd = (!modules.is_empty()).then(|| modules.join(",").into());
    machine
}

/// What a file is called in the folder.
fn name_of(manifest: &Manifest, index: usize) -> String {
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
    /// Kept as long as the stream is read, since others may refer to it.
    Bytes(Vec<u8>),
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
                    Self::Bytes(all) => {
                        let end = at as usize + piece.len();
                        if let Some(part) = all.get_mut(at as usize..end) {
                            part.copy_from_slice(piece);
                        }
                    }
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
            Self::Bytes(all) => {
                let part = all.get(at as usize..at as usize + buffer.len());
                buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
                Ok(())
            }
            Self::Nothing => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    fn is_wanted(&self) -> bool {
        !matches!(self, Self::Nothing)
    }
}

/// All files of the new machine.
struct Files {
    all: Vec<(PathBuf, Target)>,
}

impl Files {
    fn make(folder: &Folder, manifest: &Manifest, with_state: bool) -> Result<Self> {
        if with_state {
            let state = folder.file(SUSPENDED);
            fs::create_dir(&state).map_err(folder::failed("creating", &state))?;
        }
        let mut all = Vec::new();
        for (index, entry) in manifest.files.iter().enumerate() {
            let path = folder.file(name_of(manifest, index));
            let target = match entry.role {
                Role::State if !with_state => Target::Bytes(vec![0; entry.size as usize]),
                Role::Memory if !with_state => Target::Nothing,
                Role::Disk => make_disk(&path, entry.size)?,
                _ => make_file(&path, entry.size)?,
            };
            all.push((path, target));
        }
        Ok(Self { all })
    }

    fn places(&mut self) -> Vec<&mut dyn Place> {
        self.all.iter_mut().map(|(_, target)| target as &mut dyn Place).collect()
    }

    /// Makes a file last that is complete.
    fn finish(&self, index: usize) -> Result<()> {
        let Some((path, target)) = self.all.get(index) else { return Ok(()) };
        let done = match target {
            Target::Disk(image) => image.close(),
            Target::File(file) => file.sync_all(),
            Target::Bytes(_) | Target::Nothing => Ok(()),
        };
        Ok(done.map_err(folder::failed("writing", path))?)
    }
}

fn make_disk(path: &Path, size: u64) -> Result<Target> {
    let made = tools::create(path, Format::Qcow2, Some(size), None);
    made.map_err(|error| failed(&error))?;
    let image = open_image(path, Access::Write).map_err(|error| failed(&error))?;
    Ok(Target::Disk(Box::new(image)))
}

fn make_file(path: &Path, size: u64) -> Result<Target> {
    let file = folder::own_file().read(true).write(true).create_new(true).open(path);
    let file = file.map_err(folder::failed("creating", path))?;
    file.set_len(size).map_err(folder::failed("writing", path))?;
    Ok(Target::File(file))
}
