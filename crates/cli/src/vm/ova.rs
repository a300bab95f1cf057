//! OVAs: what other programs for virtual machines pack and take. They become appliances before they are
//! sent to the daemon, and are made of appliances that come from it; all of that is done here, with what
//! the user may read and write.
//!
//! An OVA from elsewhere is not trusted: its tar stream is taken apart by `berth_archive`, names in its
//! description stay beside it, its checksums are compared, and a disk is refused that is based on another
//! file. `qemu-img` converts VMDK, told to open no other file.

use std::fs::{self, File};
use std::io::{self, BufWriter, PipeWriter, Read, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};

use berth_api::size::Size;
use berth_api::v1::machine::{MachineConfig, Net};
use berth_appliance::error::ApplianceError;
use berth_appliance::limits::{CHUNK_BYTES, OVF_BYTES_MAX, SUMS_BYTES_MAX};
use berth_appliance::manifest::{FileEntry, Manifest, Role};
use berth_appliance::ovf::{self, Described, DescribedDisk, OvaFile, OvfError, sums};
use berth_appliance::read::{Place, Reader};
use berth_appliance::write::{Source, Writer};
use berth_archive::error::ArchiveError;
use berth_archive::flat::flat;
use berth_archive::unpack::{Taken, extract};
use berth_disk::chain::{Access, Layer, open};
use berth_disk::error::DiskError;
use berth_disk::format::Format;
use berth_disk::qcow2::header::Header;
use jiff::Timestamp;
use uuid::Uuid;

use crate::args::appliance::ImportArgs;
use crate::exit::CliError;

const SECTOR: u64 = 512;
/// Pieces that are left out where they are zero.
const PIECE_BYTES: usize = 4096;
/// Bytes of what a program says when it fails.
const SAID_MAX: usize = 2048;

/// Why an OVA cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum OvaError {
    /// Its tar stream.
    #[error(transparent)]
    Archive(#[from] ArchiveError),
    /// Its description.
    #[error(transparent)]
    Ovf(#[from] OvfError),
    /// A disk in it.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Something in it.
    #[error("{file} in the OVA {reason}")]
    Bad {
        /// Which file.
        file: String,
        /// What is wrong with it.
        reason: String,
    },
    /// There is nothing to boot.
    #[error(
        "the OVA has no kernel, and Berth has no firmware that would boot from its disk; try --kernel \
         FILE --initrd FILE --append 'root=/dev/vda1 console=ttyS0'"
    )]
    NoKernel,
    /// The program that converts disks is missing.
    #[error("qemu-img, which converts VMDK, is not installed; the package qemu-utils has it")]
    NoConverter,
    /// It failed.
    #[error("qemu-img cannot convert {file}: {said}")]
    Converter {
        /// Which file.
        file: String,
        /// What it said.
        said: String,
    },
    /// The system refused something.
    #[error("{action} {} failed", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> OvaError {
    let path = path.to_owned();
    move |source| OvaError::File { action, path, source }
}

fn bad<T>(file: &str, reason: impl Into<String>) -> Result<T, OvaError> {
    Err(OvaError::Bad { file: file.to_owned(), reason: reason.into() })
}

/// A directory for work, which is removed.
struct Work(PathBuf);

impl Work {
    fn make() -> Result<Self, OvaError> {
        let path = std::env::temp_dir().join(format!("berth-ova-{}", Uuid::new_v4()));
        let made = fs::DirBuilder::new().mode(0o700).create(&path);
        made.map_err(failed("making", &path))?;
        Ok(Self(path))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // Nothing is left to do when even this fails.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// What an OVA becomes.
pub(super) struct Converted {
    manifest: Manifest,
    sources: Vec<Layer>,
    _work: Work,
}

impl Converted {
    /// The appliance, as a stream that a thread writes.
    pub(super) fn stream(
        self,
    ) -> io::Result<(impl Read + Send, JoinHandle<Result<(), ApplianceError>>)> {
        let (from, to) = io::pipe()?;
        let write = move || {
            let mut writer = Writer::new(BufWriter::new(to), self.manifest)?;
            for source in &self.sources {
                writer.file(&Packed(source))?;
            }
            writer.finish().map(drop)
        };
        Ok((from, thread::Builder::new().name("pack".into()).spawn(write)?))
    }
}

struct Packed<'a>(&'a Layer);

impl Source for Packed<'_> {
    fn extent(&self, at: u64, len: u64) -> io::Result<(bool, u64)> {
        self.0.extent(at, len)
    }

    fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_padded(at, buffer)
    }
}

/// Takes an OVA, or with `.ovf` a description and the files beside it, apart.
///
/// # Errors
/// [`OvaError`].
pub(super) fn convert(args: &ImportArgs, from: impl Read) -> Result<Converted, OvaError> {
    let work = Work::make()?;
    let is_alone = args.file.extension().is_some_and(|extension| extension == "ovf");
    let (directory, description) = if is_alone {
        let parent = args.file.parent().filter(|parent| !parent.as_os_str().is_empty());
        let name = args.file.file_name().unwrap_or_default().to_string_lossy().into_owned();
        (parent.unwrap_or(Path::new(".")).to_owned(), name)
    } else {
        let directory = work.file("ova");
        fs::create_dir(&directory).map_err(failed("making", &directory))?;
        extract(from, &directory, Taken::default())?;
        let name = find_description(&directory)?;
        (directory, name)
    };
    let path = directory.join(&description);
    let text = read_text(&path, &description, OVF_BYTES_MAX)?;
    let described = ovf::read(&text)?;
    verify(&directory, &description, &described)?;
    let (manifest, mut sources) = boot(args, &directory, &described)?;
    for (index, disk) in described.disks.iter().enumerate() {
        sources.push(open_disk(&directory, &work, disk, index)?);
    }
    Ok(Converted { manifest, sources, _work: work })
}

/// The one description in a directory that has regular files only.
fn find_description(directory: &Path) -> Result<String, OvaError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed("reading", directory))? {
        let entry = entry.map_err(failed("reading", directory))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !entry.file_type().is_ok_and(|kind| kind.is_file()) {
            return bad(&name, "is no file, which an OVA has only");
        }
        if name.ends_with(".ovf") {
            found.push(name);
        }
    }
    match found.as_slice() {
        [one] => Ok(one.clone()),
        [] => bad("nothing", "is a description (.ovf)"),
        [_, other, ..] => bad(other, "is a second description"),
    }
}

/// A file beside the description. Links are not followed.
fn beside(directory: &Path, name: &str) -> Result<(PathBuf, u64), OvaError> {
    let path = directory.join(name);
    match path.symlink_metadata() {
        Ok(meta) if meta.is_file() => Ok((path, meta.len())),
        Ok(_) => bad(name, "is no file"),
        Err(error) if error.kind() == io::ErrorKind::NotFound => bad(name, "is missing"),
        Err(error) => Err(failed("reading", &path)(error)),
    }
}

fn read_text(path: &Path, name: &str, most: u64) -> Result<String, OvaError> {
    let file = File::open(path).map_err(failed("opening", path))?;
    let mut bytes = Vec::new();
    file.take(most + 1).read_to_end(&mut bytes).map_err(failed("reading", path))?;
    if bytes.len() as u64 > most {
        return bad(name, format!("has more than {most} bytes"));
    }
    String::from_utf8(bytes).or_else(|_| bad(name, "is no text"))
}

/// Compares the checksums, if there are some; then all that is used must have one.
fn verify(directory: &Path, description: &str, described: &Described) -> Result<(), OvaError> {
    let list = Path::new(description).with_extension("mf").display().to_string();
    if directory.join(&list).symlink_metadata().is_err() {
        return Ok(());
    }
    let (path, _) = beside(directory, &list)?;
    let all = sums::read(&read_text(&path, &list, SUMS_BYTES_MAX)?)?;
    let own = described.own.iter().flat_map(|(_, names)| names.iter());
    let disks = described.disks.iter().filter_map(|disk| disk.file.as_ref());
    for name in own.chain(disks).map(String::as_str).chain([description]) {
        let Some(sum) = all.iter().find(|sum| sum.name == name) else {
            return bad(name, format!("has no checksum in {list}"));
        };
        let (path, _) = beside(directory, name)?;
        let file = File::open(&path).map_err(failed("opening", &path))?;
        if sum.algorithm.sum(file).map_err(failed("reading", &path))? != sum.hex {
            return bad(name, format!("is not what it was: its checksum is not that in {list}"));
        }
    }
    Ok(())
}

/// The manifest, and the files that are booted.
fn boot(
    args: &ImportArgs,
    directory: &Path,
    described: &Described,
) -> Result<(Manifest, Vec<Layer>), OvaError> {
    let mut files = Vec::new();
    let mut sources = Vec::new();
    let mut add = |entry: FileEntry, path: &Path| -> Result<(), OvaError> {
        let layer = open(path, Format::Raw, Access::Look)?;
        files.push(FileEntry { size: layer.size(), ..entry });
        sources.push(layer);
        Ok(())
    };
    let mut read_only = Vec::new();
    let mut manifest = match (&args.kernel, &described.own) {
        (None, None) => return Err(OvaError::NoKernel),
        (None, Some((manifest, names))) => {
            let entries = manifest.files.iter().filter(|file| ovf::is_boot(file.role));
            for (entry, name) in entries.zip(names) {
                add(entry.clone(), &beside(directory, name)?.0)?;
            }
            let disks = manifest.files.iter().filter(|file| file.role == Role::Disk);
            read_only.extend(disks.map(|disk| disk.read_only));
            manifest.clone()
        }
        (Some(kernel), _) => {
            add(FileEntry::new(Role::Kernel, 0), kernel)?;
            if let Some(initrd) = &args.initrd {
                add(FileEntry::new(Role::Initrd, 0), initrd)?;
            }
            foreign(args, described)
        }
    };
    for (index, disk) in described.disks.iter().enumerate() {
        let read_only = read_only.get(index).copied().unwrap_or_default();
        files.push(FileEntry { read_only, ..FileEntry::new(Role::Disk, disk.bytes) });
    }
    manifest.id = Uuid::new_v4();
    manifest.files = files;
    if let Err(error) = manifest.check() {
        return Err(OvfError(error.to_string()).into());
    }
    Ok((manifest, sources))
}

/// A machine that another program packed.
fn foreign(args: &ImportArgs, described: &Described) -> Manifest {
    let machine = MachineConfig {
        append: args.append.clone().unwrap_or_default(),
        // The daemon says how many there may be.
        cpus: u8::try_from(described.cpus).unwrap_or(u8::MAX),
        memory: Size::from(described.memory_bytes),
        net: if described.has_net { Net::User } else { Net::None },
        ..MachineConfig::default()
    };
    Manifest {
        id: Uuid::new_v4(),
        name: ovf::name_of(&described.name),
        created: Timestamp::now(),
        software: "OVF".to_owned(),
        machine,
        files: Vec::new(),
    }
}

/// What a disk of an OVA holds.
enum Held {
    Raw,
    Qcow2,
    Vmdk,
}

fn held(disk: &DescribedDisk, name: &str) -> Result<Held, OvaError> {
    let format = disk.format.to_ascii_lowercase();
    let extension = Path::new(name).extension().unwrap_or_default().to_ascii_lowercase();
    if format.contains("vmdk") {
        return Ok(Held::Vmdk);
    }
    if format.contains("qcow") {
        return Ok(Held::Qcow2);
    }
    match extension.to_str() {
        Some("vmdk") => Ok(Held::Vmdk),
        Some("qcow2") => Ok(Held::Qcow2),
        Some("raw" | "img") => Ok(Held::Raw),
        _ => bad(name, format!("has the format `{format}`, and VMDK, qcow2 and raw are known")),
    }
}

fn open_disk(
    directory: &Path,
    work: &Work,
    disk: &DescribedDisk,
    index: usize,
) -> Result<Layer, OvaError> {
    let raw = work.file(&format!("disk{index}.raw"));
    let Some(name) = &disk.file else {
        let file = File::create_new(&raw).map_err(failed("making", &raw))?;
        file.set_len(disk.bytes).map_err(failed("making", &raw))?;
        return Ok(open(&raw, Format::Raw, Access::Read)?);
    };
    let (path, bytes) = beside(directory, name)?;
    let (path, format, holds) = match held(disk, name)? {
        Held::Raw => (path, Format::Raw, bytes),
        Held::Qcow2 => {
            let file = File::open(&path).map_err(failed("opening", &path))?;
            let header = Header::read(&file)
                .or_else(|error| bad(name, format!("is no qcow2 disk: {error}")))?;
            if header.backing.is_some() {
                return bad(name, "is based on another file");
            }
            (path, Format::Qcow2, header.size)
        }
        Held::Vmdk => {
            let holds = vmdk_bytes(&path, name)?;
            check_size(name, disk.bytes, holds)?;
            from_vmdk(&path, &raw, name)?;
            (raw, Format::Raw, holds)
        }
    };
    check_size(name, disk.bytes, holds)?;
    Ok(open(&path, format, Access::Read)?)
}

fn check_size(name: &str, said: u64, holds: u64) -> Result<(), OvaError> {
    match said == holds {
        true => Ok(()),
        false => bad(name, format!("is a disk of {holds} bytes, and is said to have {said}")),
    }
}

/// The size of a VMDK that holds its disk itself. One that is a text, or whose header leads to a text, can
/// name any files of this host.
fn vmdk_bytes(path: &Path, name: &str) -> Result<u64, OvaError> {
    let file = File::open(path).map_err(failed("opening", path))?;
    let mut head = [0; 20];
    let read = file.read_exact_at(&mut head, 0);
    let capacity = head.last_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
    if read.is_err() || !head.starts_with(b"KDMV") || capacity == 0 {
        return bad(name, "is no VMDK that holds its disk itself");
    }
    Ok(capacity.saturating_mul(SECTOR))
}

fn from_vmdk(from: &Path, to: &Path, name: &str) -> Result<(), OvaError> {
    // Nothing but this file is opened, whatever it says that it is based on.
    let source = serde_json::json!({
        "driver": "vmdk",
        "file": { "driver": "file", "filename": from.to_string_lossy() },
        "backing": null,
    });
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-O", "raw", &format!("json:{source}")]).arg(to);
    ran(command, name)
}

fn to_vmdk(from: &Path, to: &Path, name: &str) -> Result<(), OvaError> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]);
    command.arg(from).arg(to);
    ran(command, name)
}

fn ran(mut command: Command, name: &str) -> Result<(), OvaError> {
    let output = command.stdin(Stdio::null()).output().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => OvaError::NoConverter,
        _ => failed("starting", Path::new("qemu-img"))(error),
    })?;
    if output.status.success() {
        return Ok(());
    }
    let said = output.stderr.get(..SAID_MAX).unwrap_or(&output.stderr);
    let said = String::from_utf8_lossy(said).trim().replace('\n', "; ");
    Err(OvaError::Converter { file: name.to_owned(), said })
}

/// An appliance that comes, unpacked by a thread, and becomes an OVA.
pub(super) struct Making {
    work: Work,
    thread: JoinHandle<Result<Manifest, CliError>>,
    pub(super) to: PipeWriter,
}

impl Making {
    /// Begins; what is written to `to` is unpacked.
    pub(super) fn start() -> Result<Self, CliError> {
        let work = Work::make()?;
        let pipe = |source| CliError::Ova(failed("making", Path::new("a pipe"))(source));
        let (from, to) = io::pipe().map_err(pipe)?;
        let directory = work.0.clone();
        let unpack = move || unpack(from, &directory);
        let thread = thread::Builder::new().name("unpack".into()).spawn(unpack).map_err(pipe)?;
        Ok(Self { work, thread, to })
    }

    /// Why it went wrong, if it did so here and not where the stream comes from.
    pub(super) fn failure(self, other: CliError) -> CliError {
        drop(self.to);
        match self.thread.join() {
            Ok(Err(CliError::Appliance(ApplianceError::Truncated { .. }))) | Ok(Ok(_)) => other,
            Ok(Err(error)) => error,
            Err(_) => other,
        }
    }

    /// Writes the OVA, when all has come.
    pub(super) fn finish(self, to: impl Write) -> Result<(), CliError> {
        drop(self.to);
        let ended = || CliError::Output(io::Error::other("a thread ended"));
        let manifest = self.thread.join().map_err(|_| ended())??;
        Ok(pack(&self.work, &manifest, to)?)
    }
}

/// What a file of an appliance is called in an OVA.
fn name_in(manifest: &Manifest, index: usize) -> String {
    let name = &manifest.name;
    let role = manifest.files.get(index).map(|file| file.role);
    let before = manifest.files.iter().take(index).filter(|file| Some(file.role) == role);
    let number = before.count();
    match role {
        Some(Role::Disk) => format!("{name}-disk{number}"),
        Some(Role::Initrd) => format!("{name}-initrd{number}"),
        _ => format!("{name}-kernel"),
    }
}

fn unpack(from: impl Read, directory: &Path) -> Result<Manifest, CliError> {
    let mut reader = Reader::new(from)?;
    let manifest = reader.manifest().clone();
    let mut files = Vec::new();
    for (index, entry) in manifest.files.iter().enumerate() {
        let path = directory.join(name_in(&manifest, index));
        let mut options = File::options();
        let file = options.read(true).write(true).create_new(true).open(&path);
        let file = file.and_then(|file| file.set_len(entry.size).map(|()| file));
        files.push(Unpacked(file.map_err(failed("making", &path))?));
    }
    let mut places: Vec<_> = files.iter_mut().map(|file| file as &mut dyn Place).collect();
    for _ in 0..places.len() {
        reader.file(&mut places)?;
    }
    reader.finish()?;
    Ok(manifest)
}

struct Unpacked(File);

impl Place for Unpacked {
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let pieces = bytes.chunks(PIECE_BYTES).zip((at..).step_by(PIECE_BYTES));
        for (piece, at) in pieces.filter(|(piece, _)| piece.iter().any(|byte| *byte != 0)) {
            self.0.write_all_at(piece, at)?;
        }
        Ok(())
    }

    fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read_exact_at(buffer, at)
    }
}

fn pack(work: &Work, manifest: &Manifest, to: impl Write) -> Result<(), OvaError> {
    let mut files = Vec::new();
    for (index, entry) in manifest.files.iter().enumerate() {
        let mut name = name_in(manifest, index);
        if entry.role == Role::Disk {
            let raw = work.file(&name);
            name.push_str(".vmdk");
            to_vmdk(&raw, &work.file(&name), &name)?;
            fs::remove_file(&raw).map_err(failed("removing", &raw))?;
        }
        let path = work.file(&name);
        let size = path.metadata().map_err(failed("reading", &path))?.len();
        files.push(OvaFile { name, size });
    }
    let (description, list) = (format!("{}.ovf", manifest.name), format!("{}.mf", manifest.name));
    let write = |name: &str, text: &str| {
        let path = work.file(name);
        fs::write(&path, text).map_err(failed("writing", &path))
    };
    write(&description, &ovf::write(manifest, &files)?)?;
    let mut names = vec![description];
    names.extend(files.into_iter().map(|file| file.name));
    let mut lines = String::new();
    for name in &names {
        let path = work.file(name);
        let file = File::open(&path).map_err(failed("opening", &path))?;
        let sum = sums::Algorithm::Sha256.sum(file).map_err(failed("reading", &path))?;
        lines.push_str(&sums::line(name, &sum));
    }
    write(&list, &lines)?;
    // The description is first, and its list second.
    names.insert(1, list);
    let named = |name: String| (name.clone(), work.file(&name));
    let all: Vec<_> = names.into_iter().map(named).collect();
    flat(BufWriter::with_capacity(CHUNK_BYTES as usize, to), &all)?;
    Ok(())
}
