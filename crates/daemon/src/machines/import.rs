//! Machines out of appliances. Nothing of one is there before all of it has come and is what was packed;
//! what came of one whose stream broke off is kept for a while, unseen, so that it can go on.

mod files;
#[cfg(test)]
mod tests;
mod unpacking;

use std::fs;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use berth_api::v1::error::{ApiError, ErrorCode};
use berth_api::v1::event::EventKind;
use berth_api::v1::import::UnfinishedImport;
use berth_api::v1::machine::{Disk, DiskFormat, MachineConfig, Net};
use berth_api::vmm::{IDENTITY, SUSPENDED};
use berth_appliance::head::Head;
use berth_appliance::manifest::{Manifest, Role};
use jiff::Timestamp;
use tokio::runtime::Handle;
use uuid::Uuid;

use crate::failure::{Result, blocking, conflict, error, of_appliance};
use crate::folder::unfinished::{self, Note};
use crate::folder::{self, Folder, FolderError, VERSION, VmToml};
use crate::machines::create::check;
use crate::machines::import::files::name_of;
use crate::machines::import::unpacking::{CHECKPOINT_BYTES, Unpacking, Wanted, head_of};
use crate::machines::{Entry, Machines, check_name, load, of_vmm};
use crate::snapshot::restore::note_copy;
use crate::vmm;

/// What is to be made of an appliance.
#[derive(Clone, Debug, Default)]
pub struct Import {
    /// The machine's name, if it is not to have the appliance's.
    pub name: Option<String>,
    /// Its disks only, though memory is there.
    pub without_state: bool,
    /// The stream is the rest of one that broke off.
    pub rest: Option<Rest>,
}

/// The rest of an appliance whose import broke off.
#[derive(Clone, Copy, Debug)]
pub struct Rest {
    /// Which import.
    pub id: Uuid,
    /// The byte with which it begins.
    pub at: u64,
}

impl Machines {
    /// Makes a machine of an appliance. It does not run yet; one with memory is suspended.
    ///
    /// # Errors
    /// The appliance is damaged, cannot go on here, or its name is taken; then there is nothing of it. When
    /// the stream breaks off, what came is kept, if that was enough.
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
        let mut unpacking = match request.rest {
            Some(rest) => self.resume_import(from, request, rest)?,
            None => self.begin_import(from, request)?,
        };
        let (manifest, with_state) = (unpacking.manifest().clone(), unpacking.with_state());
        let machine = config(&manifest);
        let fits = |state: &Path| {
            let fits = handle.block_on(vmm::check(&self.program, &machine, state));
            fits.map_err(|error| cannot_go_on(&error))
        };
        if let Err(stopped) = unpacking.run(&fits) {
            return Err(unpacking.stop(stopped));
        }
        let (unnamed, name, lock) = unpacking.into_folder();
        let folder = unnamed.folder();
        if with_state {
            note_copy(&folder.file(SUSPENDED))?;
            folder::sync(&folder.file(SUSPENDED))?;
        }
        folder::replace(&folder.file(IDENTITY), format!("{}\n", manifest.name).as_bytes())?;
        load::note_place(folder)?;
        let toml =
            VmToml { version: VERSION, id: Uuid::new_v4(), created: Timestamp::now(), machine };
        unnamed.complete(&toml)?;
        let mut all = self.all();
        if all.contains_key(&name) {
            return Err(taken(&name));
        }
        let folder = unnamed.name(&name)?;
        // It is there; only a crash could undo that.
        if let Err(error) = folder::sync(&self.directory) {
            tracing::warn!(%error, "an imported machine may not survive a power failure");
        }
        unfinished::forget(&folder);
        drop(lock);
        let entry = Entry::new(name.clone(), folder, toml);
        all.insert(name, Arc::clone(&entry));
        drop(all);
        Ok((entry, manifest.name))
    }

    /// Whether a machine can be made of this, as far as its manifest says.
    fn check_import(&self, manifest: &Manifest, wanted: &Wanted) -> Result<()> {
        check_name(&wanted.name)?;
        if self.all().contains_key(&wanted.name) {
            return Err(taken(&wanted.name));
        }
        if wanted.with_state(manifest)
            && matches!(manifest.machine.net, Net::Tap(_) | Net::Network(_))
        {
            return Err(conflict(
                "the network card in its memory was on an interface of its host, and can do what one \
                 here cannot; --without-state takes its disks only",
            ));
        }
        check(&config(manifest))
    }

    fn begin_import<R: Read>(&self, mut from: R, request: &Import) -> Result<Unpacking<R>> {
        let head = Head::read(&mut from).map_err(|error| of_appliance(&error))?;
        let name = request.name.clone().unwrap_or_else(|| head.manifest().name.clone());
        let wanted = Wanted { name, without_state: request.without_state };
        self.check_import(head.manifest(), &wanted)?;
        unfinished::sweep(&self.directory, Timestamp::now())?;
        Unpacking::begin(&self.directory, head, from, wanted, CHECKPOINT_BYTES)
    }

    /// Goes on with an import that broke off. It stays for another time if this one does not fit it.
    fn resume_import<R: Read>(
        &self,
        from: R,
        request: &Import,
        rest: Rest,
    ) -> Result<Unpacking<R>> {
        let folder = self.unfinished_folder(rest.id)?;
        let lock = folder.lock_within(load::SETTLE)?;
        let of_kept = |error: ApiError| {
            let message = format!(
                "what is kept of the import {} cannot be used, so that it has to begin anew: {}",
                rest.id, error.message
            );
            ApiError { message, ..error }
        };
        let read = Note::read(&folder).map_err(ApiError::from);
        let (mut note, head) = match read.and_then(|note| Ok((note, head_of(&folder)?))) {
            Ok(read) => read,
            Err(error) => {
                folder.remove()?;
                return Err(of_kept(error));
            }
        };
        if note.checkpoint.at != rest.at || note.without_state != request.without_state {
            return Err(conflict(format!(
                "the import {} goes on at byte {}{}, and not as was asked for",
                rest.id,
                note.checkpoint.at,
                if note.without_state { " without state" } else { "" }
            )));
        }
        // Otherwise it has the name that it was to have when it was begun.
        note.name = request.name.clone().unwrap_or(note.name);
        self.check_import(head.manifest(), &Wanted::of(&note))?;
        let resumed = Unpacking::resume(folder, lock, &note, head, from, CHECKPOINT_BYTES);
        resumed.map_err(of_kept)
    }

    fn unfinished_folder(&self, id: Uuid) -> Result<Folder> {
        let folder = Folder::at(self.directory.join(unfinished::name(id)));
        match folder.path().is_dir() {
            true => Ok(folder),
            false => {
                let message = format!("there is no import {id} that broke off");
                Err(error(ErrorCode::NotFound, message))
            }
        }
    }

    /// Imports that broke off and can go on, the last one first.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub async fn unfinished_imports(self: &Arc<Self>) -> Result<Vec<UnfinishedImport>> {
        let machines = Arc::clone(self);
        blocking(move || {
            let all = unfinished::all(&machines.directory)?;
            let described = all.iter().filter_map(|(id, folder)| describe(*id, folder).ok());
            let mut described: Vec<_> = described.collect();
            described.sort_by_key(|import| std::cmp::Reverse(import.time));
            Ok(described)
        })
        .await
    }

    /// Removes what is kept of an import that broke off.
    ///
    /// # Errors
    /// There is none, or it goes on.
    pub async fn abandon_import(self: &Arc<Self>, id: Uuid) -> Result<()> {
        let folder = self.unfinished_folder(id)?;
        blocking(move || {
            let _lock = match folder.lock_within(load::SETTLE) {
                Err(FolderError::Locked { .. }) => {
                    return Err(conflict(format!("the import {id} goes on; it has to end first")));
                }
                lock => lock?,
            };
            Ok(folder.remove()?)
        })
        .await
    }
}

fn taken(name: &str) -> ApiError {
    conflict(format!("there is a machine {name} already; try --name"))
}

fn describe(id: Uuid, folder: &Folder) -> Result<UnfinishedImport> {
    let (note, head) = (Note::read(folder)?, head_of(folder)?);
    Ok(UnfinishedImport {
        id,
        appliance: head.manifest().id,
        head: head.sum(),
        name: note.name,
        without_state: note.without_state,
        at: note.checkpoint.at,
        disk_bytes: disk_bytes(folder.path()),
        time: note.time,
        in_use: matches!(folder.lock(), Err(FolderError::Locked { .. })),
    })
}

/// What a folder takes on the disk, as far as it can be looked at.
fn disk_bytes(directory: &Path) -> u64 {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let bytes = entries.map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => disk_bytes(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    });
    bytes.sum()
}

fn cannot_go_on(error: &vmm::VmmError) -> ApiError {
    let mut error = of_vmm("the appliance", error);
    error.code = ErrorCode::Conflict;
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
