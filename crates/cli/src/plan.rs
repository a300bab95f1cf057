//! From the words of `berth vm run` to everything a machine needs, checked: files are there, sizes
//! are possible, the image's throwaway disk and initramfs are made.

mod network;
mod own;
mod share;
mod words;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_api::agent::message::Exec;
use berth_api::size::Size;
use berth_api::v1::machine::{self as kept, Cpu, MachineConfig};
use berth_api::v1::run::{Shell, Temporary};
use berth_disk::chain::describe;
use berth_disk::error::DiskError;
use berth_disk::format::Format;
use berth_image::agent::{self, NoAgent};
use berth_image::disk::ThrowawayDisk;
use berth_image::initramfs::{self, InitramfsError};
use berth_image::store::{Image, ImageName, Store, StoreError};
use berth_vmm::boot::{self, Module};
use berth_vmm::limits::MEMORY_BYTES_MIN;
use berth_vmm::vcpu::translated::Optimizations;
use berth_vmm::virtio::fs::device::FolderShare;
use berth_vmm::virtio::net::forward::Forward;

use crate::args::machine::{Accel, MachineArgs, Variable};
use crate::args::{ConsoleArg, DiskArg, RunArgs};
use crate::terminal;

const PAGE_BYTES: u64 = 4096;
const SECTOR_BYTES: u64 = 512;
/// A Linux host name.
const NAME_BYTES_MAX: usize = 63;
/// What Linux takes as its command line on x86.
const COMMAND_LINE_BYTES_MAX: usize = 2047;

/// Everything a machine needs to run.
#[derive(Debug)]
pub struct RunPlan {
    /// For messages and as host name.
    pub name: String,
    /// Virtual processors, 1 to 16.
    pub cpus: u8,
    /// Memory; whole pages.
    pub memory_bytes: u64,
    /// Bytes of translated code kept for each processor, unless it is the default.
    pub code_cache_bytes: Option<usize>,
    /// Leave user code to the processor wherever that is possible.
    pub always_direct: bool,
    /// What the translator does for speed.
    pub optimizations: Optimizations,
    /// Whether what the translator did is to be shown at the end.
    pub stats: bool,
    /// Where translated blocks are listed; `-` is standard error.
    pub dump_blocks: Option<PathBuf>,
    /// What runs the guest's instructions.
    pub accel: Accel,
    /// The processor that the guest sees.
    pub cpu: Cpu,
    /// The kernel file, of any kind the machine boots.
    pub kernel: PathBuf,
    /// The initial RAM disk or first Multiboot module.
    pub initrd: Option<PathBuf>,
    /// The whole kernel command line.
    pub command_line: String,
    /// The disks in the order the guest sees them.
    pub disks: Vec<DiskPlan>,
    /// Folders of the host.
    pub shares: Vec<FolderShare>,
    /// The network card.
    pub net: NetPlan,
    /// Whether port 0xf4 ends the machine.
    pub debug_exit: bool,
    /// Where the serial console goes.
    pub console: Console,
    /// Where the virtio console goes; none: the guest has none.
    pub virtio_console: Option<Console>,
    /// A command to run through the agent; the machine is shut down when it ends.
    pub command: Option<Exec>,
    /// Keeps the copy of the image's root disk, which is among `disks`, alive.
    pub throwaway: Option<ThrowawayDisk>,
}

/// One disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlan {
    /// The file; the length of a raw one is a multiple of 512.
    pub path: PathBuf,
    /// What it holds.
    pub format: Format,
    /// The guest may not write.
    pub read_only: bool,
}

/// The network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NetPlan {
    /// None.
    Absent,
    /// Connected to a passt process of its own, which listens at these ports.
    User(Vec<Forward>),
    /// On a tap interface.
    Tap(String),
    /// On a tap interface in a network of the daemon's, which hands it over.
    Handed,
}

/// Where a console goes.
#[derive(Debug)]
pub enum Console {
    /// To standard input and output; raw when they are a terminal.
    Stdio,
    /// To the end of this file. No input.
    File(PathBuf),
    /// To whoever connects to this Unix socket.
    Socket(PathBuf),
    /// To whoever has the other end of it.
    Stream(Arc<UnixStream>),
    /// Nowhere.
    Nowhere,
    /// Into this file without a name; its end is shown when the guest fails. No input.
    Capture(File),
}

/// Why a machine cannot be run as asked.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The words contradict each other.
    #[error("{0}")]
    Usage(String),
    /// A file cannot be used.
    #[error("cannot use {path} as {role}")]
    File {
        /// What for.
        role: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is not what it should be.
    #[error("cannot use {path} as {role}: {reason}")]
    Unfit {
        /// What for.
        role: &'static str,
        /// Which.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// A device could not get its thread or its files later on, and the guest would wait for it.
    #[error(
        "a machine with these devices needs up to {needed} open files, and the limit is {limit}; \
         raise it (`ulimit -n {needed}`, or LimitNOFILE= of a service)"
    )]
    OpenFiles {
        /// What it needs at most.
        needed: u64,
        /// What is allowed.
        limit: u64,
    },
    /// So much code is not kept.
    #[error("cannot keep {asked} of translated code: it can be 4M to 512M")]
    CodeCache {
        /// What was asked for.
        asked: Size,
    },
    /// The memory is impossible.
    #[error("cannot give the guest {asked} of memory: {reason}")]
    Memory {
        /// What was asked for.
        asked: Size,
        /// Why not.
        reason: String,
    },
    /// An image, or what it is based on.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A tap interface is missing.
    #[error("there is no network interface {0}; make it with `ip tuntap add {0} mode tap`")]
    NoInterface(String),
    /// passt is missing.
    #[error("the user-mode network needs passt; try `apt-get install passt`, or --net none")]
    NoPasst,
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The image is not there yet, and the way to make it is known.
    #[error("there is no image {0}; make it with `berth image bootstrap debian bookworm`")]
    NoImage(String),
    /// The initramfs.
    #[error(transparent)]
    Initramfs(#[from] InitramfsError),
    /// The agent.
    #[error(transparent)]
    NoAgent(#[from] NoAgent),
}

impl RunPlan {
    /// Checks what was asked for and makes what it needs.
    ///
    /// # Errors
    /// [`PlanError`]; nothing is left behind.
    pub fn new(args: &RunArgs, state: &Path) -> Result<Self, PlanError> {
        let shell = if args.command.is_empty() { Shell::Once } else { Shell::Never };
        let shown = Temporary { shell, terminal: terminal::described() };
        let (mut plan, image) = Self::base(args, state, &shown, false, true)?;
        if let Some((image, store)) = &image {
            let disk = ThrowawayDisk::copy_of(&image.root_disk(), store)?;
            plan.disks
                .insert(0, DiskPlan { path: disk.path(), format: Format::Raw, read_only: false });
            plan.throwaway = Some(disk);
        }
        plan.command = first_command(args);
        plan.virtio_console = match &args.virtio_console {
            None | Some(ConsoleArg::None) => None,
            Some(asked) => Some(console(asked)?),
        };
        plan.console = match (&args.serial, &image) {
            (Some(asked), _) => console(asked)?,
            (None, Some((_, store))) if plan.command.is_some() => {
                Console::Capture(unnamed_file(store)?)
            }
            (None, _) if matches!(plan.virtio_console, Some(Console::Stdio)) => Console::Nowhere,
            (None, _) => Console::Stdio,
        };
        Ok(plan)
    }

    /// What kept machines and others have in common: no root disk of an image, no console yet.
    fn base(
        args: &RunArgs,
        state: &Path,
        shown: &Temporary,
        is_kept: bool,
        boots: bool,
    ) -> Result<(Self, FromImage), PlanError> {
        let name = machine_name(args)?;
        check_memory(args.machine.memory, host_memory_bytes())?;
        let open_files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        check_open_files(u64::from(args.machine.cpus) + args.disks.len() as u64, open_files)?;
        let shares = share::checked(&args.machine.shares, args.image.is_some(), is_kept)?;
        check_combination(args)?;
        let disks = user_disks(args)?;
        let net = network::plan(&args.machine, args.image.is_some(), is_kept)?;
        let files = match &args.image {
            _ if !boots => Boot { kernel: PathBuf::new(), initrd: None, image: None },
            None => Boot { kernel: given_kernel(args)?, initrd: given_initrd(args)?, image: None },
            // One that has its own needs no image any more.
            Some(_) if is_kept && args.machine.kernel.is_some() => {
                Boot { kernel: given_kernel(args)?, initrd: given_initrd(args)?, image: None }
            }
            Some(image) => image_boot(args, image, state)?,
        };
        let plan = Self {
            command_line: command_line(args, &name, shown)?,
            shares,
            name,
            cpus: args.machine.cpus,
            memory_bytes: args.machine.memory.bytes(),
            code_cache_bytes: args.code_cache.map(check_code_cache).transpose()?,
            always_direct: args.always_direct,
            optimizations: args.translator_opt.unwrap_or_default(),
            stats: args.stats,
            dump_blocks: args.dump_blocks.clone(),
            accel: args.machine.accel,
            cpu: args.machine.cpu,
            kernel: files.kernel,
            initrd: files.initrd,
            disks,
            net,
            debug_exit: args.machine.debug_exit,
            console: Console::Nowhere,
            virtio_console: None,
            command: None,
            throwaway: None,
        };
        Ok((plan, files.image))
    }

    /// What a kept machine needs, whose disks are in its folder. `console` is its serial port. One that
    /// does not boot, since it goes on, needs no kernel. `shown` says what its guest does with its console.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn kept(
        config: &MachineConfig,
        name: &str,
        folder: &Path,
        state: &Path,
        console: Console,
        shown: &Temporary,
        boots: bool,
    ) -> Result<Self, PlanError> {
        let machine = MachineArgs {
            cpus: config.cpus,
            memory: config.memory,
            accel: match config.accel {
                kept::Accel::Auto => Accel::Auto,
                kept::Accel::Translate => Accel::Translate,
                kept::Accel::Kvm => Accel::Kvm,
            },
            cpu: config.cpu,
            kernel: config.kernel.as_ref().map(|kernel| folder.join(kernel)),
            initrd: config.initrd.as_deref().map(|list| own::modules_in(folder, list)),
            append: config.append.clone(),
            net: Some(network::kept(&config.net)),
            publish: config.ports.clone(),
            debug_exit: config.debug_exit,
            env: config
                .env
                .iter()
                .map(|(name, value)| Variable { name: name.clone(), value: value.clone() })
                .collect(),
            shares: config.shares.iter().map(share::kept).collect(),
        };
        let disk = |disk: &kept::Disk| DiskArg {
            path: folder.join(&disk.file),
            format: match disk.format {
                kept::DiskFormat::Raw => Format::Raw,
                kept::DiskFormat::Qcow2 => Format::Qcow2,
            },
            read_only: disk.read_only,
        };
        let args = RunArgs {
            name: Some(name.to_owned()),
            machine,
            disks: config.disks.iter().map(disk).collect(),
            image: config.image.clone(),
            ..RunArgs::default()
        };
        let (plan, _) = Self::base(&args, state, shown, true, boots)?;
        Ok(Self { console, ..plan })
    }
}

/// Where the kernel comes from.
type FromImage = Option<(Image, Store)>;

struct Boot {
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    image: FromImage,
}

fn image_boot(args: &RunArgs, name: &str, state: &Path) -> Result<Boot, PlanError> {
    let name = ImageName::parse(name)?;
    let store = Store::open(state)?;
    let image = store.find(&name).map_err(|error| match (error, name.as_str()) {
        (StoreError::NoImage { .. }, "debian" | "debian:bookworm") => {
            PlanError::NoImage(name.as_str().to_owned())
        }
        (error, _) => error.into(),
    })?;
    let (kernel, initrd) = match &args.machine.kernel {
        Some(_) => (given_kernel(args)?, given_initrd(args)?),
        None => (image.kernel(), Some(initramfs::for_image(&image, &agent::find()?)?)),
    };
    Ok(Boot { kernel, initrd, image: Some((image, store)) })
}

/// Looks whether the words fit together, for a machine that the daemon runs.
pub(crate) fn check_run(args: &RunArgs) -> Result<(), PlanError> {
    machine_name(args)?;
    if let Some(image) = &args.image {
        ImageName::parse(image)?;
    }
    network::check_ports(&args.machine)?;
    check_combination(args)
}

fn machine_name(args: &RunArgs) -> Result<String, PlanError> {
    let Some(name) = &args.name else {
        let image = args.image.as_deref().unwrap_or("berth");
        return Ok(image.split(':').next().unwrap_or_default().replace(['.', '_'], "-"));
    };
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-';
    if name.is_empty() || name.len() > NAME_BYTES_MAX || !name.chars().all(good) {
        return Err(PlanError::Usage(format!(
            "`{name}` is no machine name: 1 to {NAME_BYTES_MAX} letters, digits and `-`"
        )));
    }
    Ok(name.clone())
}

fn check_combination(args: &RunArgs) -> Result<(), PlanError> {
    let usage = |text: &str| Err(PlanError::Usage(text.to_owned()));
    if args.image.is_none() && !args.command.is_empty() {
        return usage("a command needs an image, whose agent runs it; `-- CMD` goes after IMAGE");
    }
    if args.image.is_some() && args.machine.kernel.is_some() && args.machine.initrd.is_none() {
        return usage(
            "--kernel with an image needs --initrd too: the image's modules fit its own kernel only",
        );
    }
    let on_stdio = [&args.serial, &args.virtio_console];
    match on_stdio.iter().filter(|asked| ***asked == Some(ConsoleArg::Stdio)).count() {
        0 => Ok(()),
        1 if args.command.is_empty() => Ok(()),
        1 => usage("with -- CMD standard input and output belong to the command, not to a console"),
        _ => usage("one console can have standard input and output, not both"),
    }
}

/// Opening happens when the machine starts; what would hang or destroy is found here.
fn console(asked: &ConsoleArg) -> Result<Console, PlanError> {
    Ok(match asked {
        ConsoleArg::Stdio => Console::Stdio,
        ConsoleArg::None => Console::Nowhere,
        ConsoleArg::Socket(path) => {
            // Listening would only say that the address is in use.
            if fs::symlink_metadata(path).is_ok_and(|meta| !meta.file_type().is_socket()) {
                return Err(PlanError::Unfit {
                    role: "a console's socket",
                    path: path.clone(),
                    reason: "it exists and is no socket; try another path".to_owned(),
                });
            }
            Console::Socket(path.clone())
        }
        ConsoleArg::File(path) => {
            // Opening it would wait for a reader.
            if fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo()) {
                return Err(PlanError::Unfit {
                    role: "a console",
                    path: path.clone(),
                    reason: "it is a pipe; try socket=PATH".to_owned(),
                });
            }
            Console::File(path.clone())
        }
    })
}

/// Open files of a machine without disks and vCPUs, with much to spare.
const FILES_BASE: u64 = 64;
/// Open files for each disk or vCPU.
const FILES_EACH: u64 = 8;

fn check_open_files(parts: u64, limit: Option<u64>) -> Result<(), PlanError> {
    let needed = FILES_BASE + FILES_EACH * parts;
    match limit {
        Some(limit) if limit < needed => Err(PlanError::OpenFiles { needed, limit }),
        _ => Ok(()),
    }
}

fn check_code_cache(asked: Size) -> Result<usize, PlanError> {
    let bytes = usize::try_from(asked.bytes()).ok();
    let bytes = bytes.filter(|bytes| (4 << 20..=512 << 20).contains(bytes));
    bytes.ok_or(PlanError::CodeCache { asked })
}

fn check_memory(asked: Size, host_bytes: Option<u64>) -> Result<(), PlanError> {
    let refuse = |reason: String| Err(PlanError::Memory { asked, reason });
    if asked.bytes() < MEMORY_BYTES_MIN {
        return refuse(format!("the least is {}", Size::from(MEMORY_BYTES_MIN)));
    }
    if !asked.bytes().is_multiple_of(PAGE_BYTES) {
        return refuse(format!("it must be a multiple of {PAGE_BYTES} bytes"));
    }
    match host_bytes {
        Some(host) if asked.bytes() > host => refuse(format!("this host has {}", Size::from(host))),
        _ => Ok(()),
    }
}

fn host_memory_bytes() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

fn given_kernel(args: &RunArgs) -> Result<PathBuf, PlanError> {
    let Some(path) = &args.machine.kernel else {
        return Err(PlanError::Usage("an image or --kernel is needed".into()));
    };
    check_file(path, "a kernel", false).map(|_| path.clone())
}

fn given_initrd(args: &RunArgs) -> Result<Option<PathBuf>, PlanError> {
    let Some(list) = &args.machine.initrd else { return Ok(None) };
    for module in Module::parse_list(&list.to_string_lossy()) {
        check_file(&module.path, "an initrd", false)?;
    }
    Ok(Some(list.clone()))
}

fn holds_bzimage(path: &Path) -> bool {
    let mut head = [0; boot::HEAD_BYTES];
    let read = File::open(path).and_then(|mut file| file.read_exact(&mut head));
    read.is_ok() && boot::is_bzimage(&head)
}

/// Opens a file the way the machine will, to say now what would fail then. Returns its length.
fn check_file(path: &Path, role: &'static str, writable: bool) -> Result<u64, PlanError> {
    let failed = |source| PlanError::File { role, path: path.to_owned(), source };
    // Looked at first: opening a pipe would wait.
    let meta = fs::metadata(path).map_err(failed)?;
    if !meta.is_file() {
        let reason = "it is not a regular file".to_owned();
        return Err(PlanError::Unfit { role, path: path.to_owned(), reason });
    }
    File::options().read(true).write(writable).open(path).map_err(failed)?;
    if meta.len() == 0 {
        let reason = "it is empty".to_owned();
        return Err(PlanError::Unfit { role, path: path.to_owned(), reason });
    }
    Ok(meta.len())
}

fn user_disks(args: &RunArgs) -> Result<Vec<DiskPlan>, PlanError> {
    let role = "a disk";
    let mut disks: Vec<DiskPlan> = Vec::new();
    let mut writable: Vec<PathBuf> = Vec::new();
    for disk in &args.disks {
        let unfit = |reason: &str| PlanError::Unfit {
            role,
            path: disk.path.clone(),
            reason: reason.to_owned(),
        };
        let len = check_file(&disk.path, role, !disk.read_only)?;
        if disk.format == Format::Qcow2 {
            // With what is below it.
            let layers = describe(&disk.path, disk.format)?;
            if layers.first().is_none_or(|top| top.size < SECTOR_BYTES) {
                return Err(unfit("it is empty"));
            }
        } else if !len.is_multiple_of(SECTOR_BYTES) {
            return Err(unfit(&format!("its length, {len}, is not a multiple of {SECTOR_BYTES}")));
        }
        let real = fs::canonicalize(&disk.path).map_err(|source| PlanError::File {
            role,
            path: disk.path.clone(),
            source,
        })?;
        if !disk.read_only && writable.contains(&real) {
            return Err(unfit("it is given twice for writing"));
        }
        writable.push(real);
        let (path, format) = (disk.path.clone(), disk.format);
        disks.push(DiskPlan { path, format, read_only: disk.read_only });
    }
    Ok(disks)
}

/// Whether a program is in `PATH`.
#[must_use]
pub fn has_program(name: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).any(|directory| directory.join(name).is_file())
}

/// The command that a guest is run for.
pub(crate) fn first_command(args: &RunArgs) -> Option<Exec> {
    if args.command.is_empty() {
        return None;
    }
    let mut exec = Exec { argv: args.command.clone(), ..Exec::default() };
    terminal::give(&mut exec);
    Some(exec)
}

fn command_line(args: &RunArgs, name: &str, shown: &Temporary) -> Result<String, PlanError> {
    let mut words = Vec::new();
    if args.image.is_some() {
        words.push("console=ttyS0 quiet panic=-1 berth.root=/dev/vda berth.rw=1".to_owned());
        if args.virtio_console == Some(ConsoleArg::Stdio) {
            // The last one is /dev/console, as soon as its driver is loaded.
            words.push("console=hvc0".to_owned());
        }
        words.push(format!("berth.hostname={name}"));
        match shown.shell {
            Shell::Never => {}
            Shell::Once => {
                words.push("berth.shell=1".to_owned());
                words.extend(shown.terminal.iter().flat_map(words::terminal));
            }
            Shell::Always => words.push("berth.shell=always".to_owned()),
        }
        words.extend(args.machine.env.iter().map(words::variable));
        words.extend(args.machine.shares.iter().enumerate().map(words::share));
    }
    let panic_said = args.machine.append.split_whitespace().any(|word| word.starts_with("panic="));
    if args.image.is_none()
        && !panic_said
        && args.machine.kernel.as_deref().is_some_and(holds_bzimage)
    {
        // Else a kernel that has panicked waits forever.
        words.push("panic=-1".to_owned());
    }
    if !args.machine.append.is_empty() {
        words.push(args.machine.append.clone());
    }
    let line = words.join(" ");
    if line.len() > COMMAND_LINE_BYTES_MAX || line.contains('\0') {
        return Err(PlanError::Usage(format!(
            "the kernel command line has {} bytes with all --append, --env and --share; Linux takes \
             {COMMAND_LINE_BYTES_MAX}",
            line.len()
        )));
    }
    Ok(line)
}

fn unnamed_file(store: &Store) -> Result<File, PlanError> {
    let path = store.temporary().join(format!("console-{}", std::process::id()));
    let failed = |source| PlanError::File { role: "the console's log", path: path.clone(), source };
    let options = File::options().read(true).write(true).create(true).truncate(true).open(&path);
    let file = options.map_err(failed)?;
    fs::remove_file(&path).map_err(failed)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::args::{Args, Command, VmCommand};

    fn shown(shell: Shell) -> Temporary {
        Temporary { shell, terminal: None }
    }

    fn run_args(line: &str) -> RunArgs {
        let words = format!("berth vm run {line}");
        let args = Args::try_parse_from(words.split_whitespace()).unwrap();
        let Command::Vm(VmCommand::Run(run)) = args.command else { panic!() };
        *run
    }

    #[test]
    fn each_module_of_a_list_is_looked_at() {
        let directory = tempfile::tempdir().unwrap();
        let file = |name: &str| directory.path().join(name).display().to_string();
        fs::write(file("kernel"), b"k").unwrap();
        fs::write(file("a"), b"a").unwrap();
        fs::write(file("b"), b"b").unwrap();
        let check = |list: String| {
            let mut args = run_args("--kernel k --initrd i");
            args.machine.initrd = Some(list.into());
            given_initrd(&args)
        };
        assert!(check(format!("{} one two,{}", file("a"), file("b"))).is_ok());
        let error = check(format!("{},{}", file("a"), file("missing"))).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
    }

    #[test]
    fn a_panic_ends_linux_unless_told_otherwise() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel");
        let mut head = vec![0; 0x1fe];
        head.extend(b"\x55\xaa\0\0HdrS and more");
        let line = |append: &str, content: &[u8]| {
            fs::write(&kernel, content).unwrap();
            let mut args = run_args("--kernel k");
            args.machine.kernel = Some(kernel.clone());
            args.machine.append = append.to_owned();
            command_line(&args, "box", &shown(Shell::Once)).unwrap()
        };
        assert_eq!(line("quiet", &head), "panic=-1 quiet");
        assert_eq!(line("panic=5", &head), "panic=5");
        assert_eq!(line("quiet", b"\x7fELF"), "quiet");
    }

    #[test]
    fn a_bare_kernel_needs_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel");
        fs::write(&kernel, "k").unwrap();
        let line = format!("--kernel {} --append console=ttyS0", kernel.display());
        let state = directory.path().join("state");
        let plan = RunPlan::new(&run_args(&line), &state).unwrap();
        assert_eq!((plan.command_line.as_str(), plan.cpus), ("console=ttyS0", 1));
        assert_eq!((plan.net, plan.disks.len(), plan.name.as_str()), (NetPlan::Absent, 0, "berth"));
        assert!(!state.exists(), "nothing is stored for it");
    }

    #[test]
    fn an_images_command_line_carries_what_the_agent_wants() {
        let line =
            command_line(&run_args("--append extra=1 debian"), "box", &shown(Shell::Once)).unwrap();
        assert!(line.contains("berth.hostname=box berth.shell=1"), "{line}");
        assert!(line.ends_with(" extra=1"), "{line}");
        let line = command_line(&run_args("debian -- true"), "box", &shown(Shell::Never)).unwrap();
        assert!(!line.contains("berth.shell"), "{line}");
        let line =
            command_line(&run_args("--virtio-console stdio debian"), "box", &shown(Shell::Once))
                .unwrap();
        assert!(line.contains("console=hvc0"), "{line}");
        let long = "x".repeat(3000);
        assert!(
            command_line(&run_args(&format!("--append {long} debian")), "box", &shown(Shell::Once))
                .is_err()
        );
    }

    #[test]
    fn one_console_at_most_is_standard_input_and_output() {
        let directory = tempfile::tempdir().unwrap();
        let kernel = directory.path().join("kernel");
        fs::write(&kernel, "k").unwrap();
        let plan = |words: &str| {
            let line = format!("--kernel {} {words}", kernel.display());
            RunPlan::new(&run_args(&line), directory.path())
        };
        let bare = plan("").unwrap();
        assert!(matches!((bare.console, bare.virtio_console), (Console::Stdio, None)));
        let none = plan("--virtio-console none --serial none").unwrap();
        assert!(matches!((none.console, none.virtio_console), (Console::Nowhere, None)));
        let moved = plan("--virtio-console stdio").unwrap();
        let both = (moved.console, moved.virtio_console);
        assert!(matches!(both, (Console::Nowhere, Some(Console::Stdio))), "{both:?}");
        let beside = plan("--virtio-console socket=s").unwrap();
        let both = (beside.console, beside.virtio_console);
        assert!(matches!(both, (Console::Stdio, Some(Console::Socket(_)))), "{both:?}");
        assert!(plan("--virtio-console stdio --serial stdio").is_err());
        let mut command = run_args("--serial stdio debian -- true");
        assert!(check_combination(&command).is_err());
        command.serial = Some(ConsoleArg::File("log".into()));
        assert!(check_combination(&command).is_ok());
    }

    #[test]
    fn variables_are_words_of_the_command_line() {
        let args = run_args("-e A=b/c -e É=1 debian");
        let mut line = command_line(&args, "box", &shown(Shell::Always)).unwrap();
        assert!(line.ends_with(" berth.env=A=b/c berth.env=%c3%89=1"), "{line}");
        let mut spaced = args;
        spaced.machine.env[0].value = "x \"y\"\n%".into();
        line = command_line(&spaced, "box", &shown(Shell::Never)).unwrap();
        assert!(line.contains(" berth.env=A=x%20%22y%22%0a%25 "), "{line}");
    }

    #[test]
    fn few_open_files_are_refused_before_anything_starts() {
        assert!(check_open_files(1, None).is_ok());
        assert!(check_open_files(1, Some(1024)).is_ok());
        let error = check_open_files(4, Some(32)).unwrap_err().to_string();
        assert!(error.contains("ulimit -n 96") && error.contains("is 32"), "{error}");
    }

    #[test]
    fn the_code_cache_has_bounds() {
        let check = |text: &str| check_code_cache(text.parse().unwrap());
        assert_eq!(check("4M").unwrap(), 4 << 20);
        assert_eq!(check("512M").unwrap(), 512 << 20);
        assert!(check("4095K").is_err_and(|error| error.to_string().contains("4M to 512M")));
        assert!(check("1G").is_err());
    }

    #[test]
    fn memory_has_bounds() {
        let check = |text: &str| check_memory(text.parse().unwrap(), Some(8 << 30));
        assert!(check("512M").is_ok() && check("4M").is_ok() && check("8G").is_ok());
        for bad in ["0", "512K", "3M", "5000001", "9G"] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }
}
