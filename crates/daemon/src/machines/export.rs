//! Machines packed into appliances: one that runs as it is at one instant, others as they are.

use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_api::v1::machine::{MachineConfig, MachineState};
use berth_api::vmm::SUSPENDED;
use berth_appliance::error::ApplianceError;
use berth_appliance::manifest::{FileEntry, Manifest, Role};
use berth_appliance::write::{Source, Writer};
use berth_disk::chain::{Access, Layer, open};
use berth_disk::format::Format;
use berth_image::store::{ImageName, Store};
use berth_image::{agent, initramfs};
use jiff::Timestamp;
use uuid::Uuid;

use crate::failure::{Result, blocking, conflict, failed, of_store};
use crate::folder::{self, Folder, FolderLock};
use crate::machines::snapshots::{Memory, Taken};
use crate::machines::{Entry, Machines, load};
use crate::snapshot::{self, Draft, layers};

/// A machine that is ready to be packed: all of its files are open.
pub struct Export {
    manifest: Manifest,
    /// For each file of the manifest.
    sources: Vec<Layer>,
    /// Of a machine at rest: it is not started meanwhile.
    _lock: Option<FolderLock>,
    /// Of one that runs.
    _draft: Option<Draft>,
}

impl Export {
    /// What is packed.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Packs it.
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub fn write(self, to: impl Write) -> std::result::Result<(), ApplianceError> {
        let mut writer = Writer::new(to, self.manifest)?;
        for layer in &self.sources {
            writer.file(&Packed(layer))?;
        }
        writer.finish().map(drop)
    }
}

/// What a guest sees of a disk, or a file.
struct Packed<'a>(&'a Layer);

impl Source for Packed<'_> {
    fn extent(&self, at: u64, len: u64) -> io::Result<(bool, u64)> {
        self.0.extent(at, len)
    }

    fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_padded(at, buffer)
    }
}

/// What is known of a machine that is packed.
struct Frozen {
    machine: MachineConfig,
    /// Each disk's file.
    disks: Vec<(PathBuf, Format)>,
    /// Where the memory is.
    state: Option<PathBuf>,
    lock: Option<FolderLock>,
    draft: Option<Draft>,
}

impl Machines {
    /// Gets a machine ready to be packed. One that runs is frozen for a moment and goes on; another one
    /// is not started until the export is over.
    ///
    /// # Errors
    /// It has no memory that could be packed, or a file of it cannot be read.
    pub async fn export(self: &Arc<Self>, entry: &Arc<Entry>, with_state: bool) -> Result<Export> {
        let _changing = entry.changing.lock().await;
        let (name, folder, state) = (entry.name(), entry.folder(), entry.state());
        if with_state && !state.is_up() && state != MachineState::Suspended {
            return Err(conflict(format!(
                "{name} is {}, so that there is no memory to pack; try without --with-state",
                state.as_str()
            )));
        }
        let frozen = match state.is_up() {
            true => {
                let memory = if with_state { Memory::Stored } else { Memory::Without };
                let Taken { draft, toml, .. } = self.take(entry, memory).await?;
                let state = with_state.then(|| draft.state());
                let layer = |index| toml.layers.iter().find(|layer| layer.disk == index);
                let disks = toml.machine.disks.iter().enumerate();
                let disks = disks.map(|(index, disk)| match layer(index) {
                    Some(layer) => (folder.file(&layer.file), Format::Qcow2),
                    None => (folder.file(&disk.file), layers::format(disk.format)),
                });
                let disks = disks.collect();
                Frozen { machine: toml.machine, disks, state, lock: None, draft: Some(draft) }
            }
            false => {
                let folder = folder.clone();
                blocking(move || at_rest(&folder, with_state)).await?
            }
        };
        let machines = Arc::clone(self);
        blocking(move || machines.open_all(name, &folder, frozen)).await
    }

    fn open_all(&self, name: String, folder: &Folder, frozen: Frozen) -> Result<Export> {
        let mut opened = Opened::default();
        if let Some(state) = &frozen.state {
            opened.file(Role::State, &state.join(folder::MACHINE), "")?;
        }
        let (kernel, modules) = self.boot_files(folder, &frozen.machine)?;
        opened.file(Role::Kernel, &kernel, "")?;
        for (path, words) in modules {
            opened.file(Role::Initrd, &path, &words)?;
        }
        for ((path, format), disk) in frozen.disks.iter().zip(&frozen.machine.disks) {
            let layer = open(path, *format, Access::Read).map_err(|error| failed(&error))?;
            let mut file = FileEntry::new(Role::Disk, layer.size());
            file.read_only = disk.read_only;
            opened.files.push(file);
            opened.sources.push(layer);
        }
        if let Some(state) = &frozen.state {
            opened.file(Role::Memory, &state.join(folder::MEMORY), "")?;
        }
        // Folders of this host are none of the machine's own.
        let machine = MachineConfig {
            kernel: None,
            initrd: None,
            disks: Vec::new(),
            shares: Vec::new(),
            ..frozen.machine
        };
        let manifest = Manifest {
            id: Uuid::new_v4(),
            name,
            created: Timestamp::now(),
            software: concat!("berth ", env!("CARGO_PKG_VERSION")).to_owned(),
            machine,
            files: opened.files,
        };
        manifest.check().map_err(|error| failed(&error))?;
        let Frozen { lock, draft, .. } = frozen;
        Ok(Export { manifest, sources: opened.sources, _lock: lock, _draft: draft })
    }

    /// What it boots: its own kernel, or that of its image with an initramfs.
    fn boot_files(
        &self,
        folder: &Folder,
        machine: &MachineConfig,
    ) -> Result<(PathBuf, Vec<(PathBuf, String)>)> {
        if let Some(kernel) = &machine.kernel {
            let list = machine.initrd.as_deref();
            let modules = list.map(|list| modules(folder, list)).unwrap_or_default();
            return Ok((folder.file(kernel), modules));
        }
        let name = machine.image.as_deref().unwrap_or_default();
        let image = ImageName::parse(name)
            .and_then(|name| Store::open(&self.root)?.find(&name))
            .map_err(|error| of_store(&error))?;
        let agent = agent::find().map_err(|error| failed(&error))?;
        let initrd = initramfs::for_image(&image, &agent).map_err(|error| failed(&error))?;
        Ok((image.kernel(), vec![(initrd, String::new())]))
    }
}

#[derive(Default)]
struct Opened {
    files: Vec<FileEntry>,
    sources: Vec<Layer>,
}

impl Opened {
    fn file(&mut self, role: Role, path: &Path, words: &str) -> Result<()> {
        let meta = path.metadata().map_err(folder::failed("reading", path))?;
        if !meta.is_file() {
            return Err(conflict(format!("{} as {role} is no regular file", path.display())));
        }
        let file = File::open(path).map_err(folder::failed("opening", path))?;
        let size = meta.len();
        let words = words.to_owned();
        self.files.push(FileEntry { words, ..FileEntry::new(role, size) });
        self.sources.push(Layer::Raw { storage: Box::new(file), size });
        Ok(())
    }
}

/// A machine without a process.
fn at_rest(folder: &Folder, with_state: bool) -> Result<Frozen> {
    let lock = folder.lock_within(load::SETTLE)?;
    snapshot::settle(folder, &lock)?;
    let mut machine = folder.config()?.machine;
    if with_state {
        folder.as_stored(&mut machine)?;
    }
    let file = |disk: &berth_api::v1::machine::Disk| {
        (folder.file(&disk.file), layers::format(disk.format))
    };
    let disks = machine.disks.iter().map(file).collect();
    let state = with_state.then(|| folder.file(SUSPENDED));
    Ok(Frozen { machine, disks, state, lock: Some(lock), draft: None })
}

/// The files of `initrd`, one or several with words of their own, as a machine's process reads it.
fn modules(folder: &Folder, list: &Path) -> Vec<(PathBuf, String)> {
    let text = list.to_string_lossy();
    if folder.file(list).exists() || !text.contains([',', ' ']) {
        return vec![(folder.file(list), String::new())];
    }
    let parts = text.split(',').filter(|part| !part.is_empty());
    let module = |part: &str| {
        let (path, words) = part.split_once(' ').unwrap_or((part, ""));
        (folder.file(path), words.to_owned())
    };
    parts.map(module).collect()
}

/// The names of files in the folder itself that a machine boots.
pub(super) fn own_boot_files(machine: &MachineConfig) -> Vec<PathBuf> {
    let nowhere = Folder::at("");
    let modules = machine.initrd.as_deref().map(|list| modules(&nowhere, list));
    let modules = modules.unwrap_or_default().into_iter().map(|(path, _)| path);
    let files = machine.kernel.clone().into_iter().chain(modules);
    files.filter(|path| snapshot::is_plain(path)).collect()
}
