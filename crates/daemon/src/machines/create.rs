//! New machines.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_api::v1::error::{ApiError, ErrorCode};
use berth_api::v1::event::EventKind;
use berth_api::v1::machine::{
    CreateMachine, Disk, DiskFormat, MachineConfig, Net, NewDisk, check_shares,
};
use berth_api::v1::network::{PORTS_MAX, is_network_name};
use berth_api::v1::run::Temporary;
use berth_disk::chain::describe;
use berth_disk::format::Format;
use berth_disk::tools::{self, Backing};
use berth_image::store::{Image, ImageName, Store};
use jiff::Timestamp;
use uuid::Uuid;

use crate::failure::{Result, blocking, chain, conflict, failed, invalid, of_store};
use crate::folder::{self, Folder, VERSION, VmToml, link_or_copy};
use crate::machines::{Entry, Machines, check_name, load, run};

/// Most vCPUs.
const CPUS_MAX: u8 = 16;
/// Least memory: what the machine needs for itself.
const MEMORY_MIN: u64 = 4 << 20;
/// Thousandths of a processor; the kernel counts no less.
const CPU_LIMIT_MIN: u32 = 10;
/// Memory is in whole pages.
const PAGE: u64 = 4096;
/// Disks are in whole sectors.
const SECTOR: u64 = 512;
/// Most disks.
const DISKS_MAX: usize = 16;
/// The image's disk in the machine's folder, which the machine's first disk is based on.
const BASE: &str = "base.raw";

impl Machines {
    /// Creates a machine.
    ///
    /// # Errors
    /// The name is taken, or what was asked for cannot be; then there is nothing of it.
    pub async fn create(self: &Arc<Self>, request: CreateMachine) -> Result<Arc<Entry>> {
        self.create_as(request, None).await
    }

    /// The same; with what is to be noted of one that is removed when it ends.
    pub(super) async fn create_as(
        self: &Arc<Self>,
        mut request: CreateMachine,
        temporary: Option<Temporary>,
    ) -> Result<Arc<Entry>> {
        check_name(&request.name)?;
        check(&request.config)?;
        check_paths(&mut request.config)?;
        if self.all().contains_key(&request.name) {
            return Err(conflict(format!("there is a machine {} already", request.name)));
        }
        self.check_network(&request.config.net).await?;
        let machines = Arc::clone(self);
        // Copying a disk takes its time, where it cannot be linked.
        let entry = blocking(move || machines.make(request, temporary)).await?;
        if let Err(error) = self.join_network(&entry).await {
            let removed = self.remove(&entry, false).await;
            return Err(removed.err().unwrap_or(error));
        }
        self.tell(EventKind::Created, &entry, None);
        Ok(entry)
    }

    fn make(&self, request: CreateMachine, temporary: Option<Temporary>) -> Result<Arc<Entry>> {
        let image = self.image(&request.config)?;
        let mut machine = request.config;
        let mut fills = Vec::new();
        let mut made = 0;
        if let Some(image) = image {
            let file = PathBuf::from(format!("disk{made}.qcow2"));
            made += 1;
            fills.push((BASE.into(), Fill::Link(image.root_disk())));
            fills.push((file.clone(), Fill::Overlay));
            let disk = Disk { file, format: DiskFormat::Qcow2, read_only: false };
            machine.disks.insert(0, disk);
        }
        for new in request.disks {
            machine.disks.push(match new {
                NewDisk::File(disk) => disk,
                NewDisk::Size(size)
                    if size.bytes() == 0 || !size.bytes().is_multiple_of(SECTOR) =>
                {
                    return Err(invalid(format!(
                        "a disk cannot have {size}: it must be a multiple of {SECTOR} bytes"
                    )));
                }
                NewDisk::Size(size) => {
                    let file = PathBuf::from(format!("disk{made}.qcow2"));
                    made += 1;
                    fills.push((file.clone(), Fill::Empty(size.bytes())));
                    // Which snapshots can be taken of.
                    Disk { file, format: DiskFormat::Qcow2, read_only: false }
                }
            });
        }
        check_disks(&machine.disks, &fills)?;
        let config =
            VmToml { version: VERSION, id: Uuid::new_v4(), created: Timestamp::now(), machine };
        let folder = Folder::create(&self.directory, &request.name, &config, |folder| {
            for (file, fill) in &fills {
                fill.make(&folder.file(file))?;
            }
            load::note_place(folder)?;
            if let Some(noted) = &temporary {
                run::note_temporary(folder, noted)?;
            }
            Ok::<_, ApiError>(())
        })?;
        let entry = Entry::new(request.name.clone(), folder, config);
        self.all().insert(request.name, Arc::clone(&entry));
        Ok(entry)
    }

    fn image(&self, config: &MachineConfig) -> Result<Option<Image>> {
        let Some(name) = &config.image else { return Ok(None) };
        let name = ImageName::parse(name).map_err(|error| of_store(&error))?;
        let store = Store::open(&self.root).map_err(|error| of_store(&error))?;
        store.find(&name).map(Some).map_err(|error| {
            let mut failure = of_store(&error);
            if failure.code == ErrorCode::NotFound
                && matches!(name.as_str(), "debian" | "debian:bookworm")
            {
                failure.message.push_str("; make it with `berth image bootstrap debian bookworm`");
            }
            failure
        })
    }
}

/// What a file of a new machine begins as.
enum Fill {
    /// Another name of a disk that is never written, so that it stays when the image is removed.
    Link(PathBuf),
    /// On [`BASE`], with nothing of its own yet.
    Overlay,
    /// Empty, of so many bytes.
    Empty(u64),
}

impl Fill {
    fn make(&self, path: &Path) -> Result<()> {
        match self {
            Self::Link(from) => {
                // Another name of what a symbolic link leads to, which may not be reached later.
                let from = from.canonicalize().map_err(folder::failed("finding", from))?;
                link_or_copy(&from, path).map_err(making(path))?;
            }
            Self::Overlay => {
                let base = Backing { name: BASE.to_owned(), format: Format::Raw };
                tools::create(path, Format::Qcow2, None, Some(&base))
                    .map_err(|error| failed(&error))?;
            }
            Self::Empty(bytes) => {
                tools::create(path, Format::Qcow2, Some(*bytes), None)
                    .map_err(|error| failed(&error))?;
            }
        }
        Ok(())
    }
}

fn making(path: &Path) -> impl FnOnce(io::Error) -> folder::FolderError {
    folder::failed("making the disk", path)
}

/// What can be said before anything is made. The rest is said at the start.
pub(super) fn check(config: &MachineConfig) -> Result<()> {
    if !(1..=CPUS_MAX).contains(&config.cpus) {
        let message = format!("a machine has 1 to {CPUS_MAX} processors, not {}", config.cpus);
        return Err(invalid(message));
    }
    let memory = config.memory.bytes();
    if memory < MEMORY_MIN || !memory.is_multiple_of(PAGE) {
        return Err(invalid(format!(
            "a machine cannot have {} of memory: at least 4M, in multiples of {PAGE} bytes",
            config.memory
        )));
    }
    check_limits(config)?;
    if config.image.is_none() && config.kernel.is_none() {
        return Err(invalid("a machine needs an image or a kernel"));
    }
    if config.image.is_some() && config.kernel.is_some() && config.initrd.is_none() {
        return Err(invalid(
            "a kernel besides an image needs an initrd too: the image's modules fit its own only",
        ));
    }
    if config.kernel.is_none() && config.initrd.is_some() {
        return Err(invalid("an initrd needs a kernel"));
    }
    check_shares(&config.shares, config.image.is_some()).map_err(invalid)?;
    check_ports(config)?;
    check_env(config)
}

fn check_limits(config: &MachineConfig) -> Result<()> {
    if let Some(limit) = config.cpu_limit
        && limit.thousandths() < CPU_LIMIT_MIN
    {
        return Err(invalid(format!("{limit} processors are too few; 0.01 are the least")));
    }
    if let Some(limit) = config.memory_limit
        && limit < config.memory
    {
        return Err(invalid(format!(
            "a limit of {limit} is less than the {} that the guest has; its process needs some more",
            config.memory
        )));
    }
    Ok(())
}

/// What a client names is on the daemon's host.
fn check_paths(config: &mut MachineConfig) -> Result<()> {
    for (file, role) in [(&config.kernel, "a kernel"), (&config.initrd, "an initrd")] {
        if let Some(file) = file
            && !file.is_absolute()
        {
            return Err(invalid(format!("{} as {role} is no absolute path", file.display())));
        }
    }
    for share in &mut config.shares {
        let shown = share.host.display();
        let failed = |error| invalid(format!("cannot share {shown}: {error}"));
        // From now on it is this folder, whatever links lead elsewhere later.
        let real = share.host.canonicalize().map_err(failed)?;
        if !real.metadata().map_err(failed)?.is_dir() {
            let message =
                format!("cannot share {shown}: it is no folder; share the one that it is in");
            return Err(invalid(message));
        }
        share.host = real;
    }
    Ok(())
}

fn check_ports(config: &MachineConfig) -> Result<()> {
    if config.ports.len() > PORTS_MAX {
        let count = config.ports.len();
        return Err(invalid(format!("{count} ports to publish; {PORTS_MAX} are the most")));
    }
    if let Net::Network(name) = &config.net
        && !is_network_name(name)
    {
        return Err(invalid(format!("`{name}` is no name of a network")));
    }
    let Some(first) = config.ports.first() else { return Ok(()) };
    if !matches!(config.net, Net::User | Net::Network(_)) {
        return Err(invalid(format!(
            "publishing {first} needs a network card of `user` or in a network"
        )));
    }
    for (index, port) in config.ports.iter().enumerate() {
        if port.host == 0 || port.guest == 0 {
            return Err(invalid(format!("{port}: ports are 1 to 65535")));
        }
        let others = config.ports.iter().skip(index + 1);
        if let Some(other) = others.into_iter().find(|other| port.collides(other)) {
            return Err(invalid(format!("{port} and {other} would be the same port of the host")));
        }
    }
    Ok(())
}

fn check_env(config: &MachineConfig) -> Result<()> {
    if !config.env.is_empty() && config.image.is_none() {
        return Err(invalid("an environment needs an image, whose agent sets it"));
    }
    for (name, value) in &config.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(invalid(format!("`{name}` is no variable of an environment")));
        }
    }
    Ok(())
}

fn check_disks(disks: &[Disk], made: &[(PathBuf, Fill)]) -> Result<()> {
    if disks.len() > DISKS_MAX {
        return Err(invalid(format!("{} disks; {DISKS_MAX} are the most", disks.len())));
    }
    for disk in disks.iter().filter(|disk| made.iter().all(|(file, _)| *file != disk.file)) {
        let shown = disk.file.display();
        if !disk.file.is_absolute() {
            return Err(invalid(format!("{shown} as a disk is no absolute path")));
        }
        if disk.format == DiskFormat::Qcow2 {
            // What it is based on is looked at, too.
            describe(&disk.file, Format::Qcow2).map_err(|error| invalid(chain(&error)))?;
            continue;
        }
        let meta = disk.file.metadata().map_err(folder::failed("reading", &disk.file))?;
        if !meta.is_file() || meta.len() == 0 || !meta.len().is_multiple_of(SECTOR) {
            return Err(invalid(format!(
                "{shown} is no disk: it must be a file of some sectors of {SECTOR} bytes"
            )));
        }
    }
    Ok(())
}
