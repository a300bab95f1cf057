//! The words of the command line. Help, completions and checks all come from here.

pub mod appliance;
pub mod disk;
pub mod machine;
pub mod network;
pub mod snapshots;

use std::path::PathBuf;

use berth_disk::format::Format;
use berth_vmm::vcpu::translated::Optimizations;
use clap::{Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

use berth_api::processors::Processors;
use berth_api::size::Size;

use crate::args::appliance::{ExportArgs, ImportArgs, ImportRmArgs};
use crate::args::disk::DiskCommand;
use crate::args::machine::{MachineArgs, SetArgs, Variable};
use crate::args::network::{NetworkCommand, PortArgs};
use crate::args::snapshots::{
    CheckStateArgs, CloneArgs, RestoreArgs, SnapshotArgs, SnapshotRmArgs, SnapshotsArgs,
};

const EXAMPLES: &str = "\
Examples:
  berth image bootstrap debian bookworm     make a Debian image, once
  berth vm run debian                       a shell in a new machine
  berth vm run debian -- uname -a           one command, its output and status
  berth vm run --cpus 4 --memory 2G debian  a larger one
  berth vm run --kernel bzImage --initrd initrd --append 'console=ttyS0'
  berth doctor                              what this host can do";

const RUN_EXAMPLES: &str = "\
Exit status: 0 when the guest powers off; 1 when it resets, fails or is stopped; 2 when the command
line is wrong; with --debug-exit twice the value written plus one; with -- CMD the status of that
command, as in shells: 127 when the guest has no such command, 126 when it cannot run it, 128 plus
the signal's number when a signal ended it.

Ctrl-] then `.` stops the machine of a shell or a console.

Examples:
  berth vm run debian
  berth vm run debian -- cat /etc/os-release
  berth vm run --disk data.raw --disk tools.raw,ro debian
  berth vm run --serial file=console.log debian -- make test
  berth vm run --serial socket=/tmp/console --kernel bzImage --append console=ttyS0
  berth vm run --virtio-console stdio debian
  berth vm run --net none --kernel vmlinux --append 'console=ttyS0 quiet'";

const CREATE_EXAMPLES: &str = "\
Examples:
  berth vm create web debian
  berth vm create --cpus 2 --memory 2G --disk 10G db debian
  berth vm start web && berth vm exec web uname -a";

const DAEMON_EXAMPLES: &str = "\
Examples:
  berth daemon
  berth daemon --listen tcp://0.0.0.0:4343 --tls-ca ca.pem --tls-cert host.pem --tls-key host.key
  berth --host tcp://HOST:4343 --tls-ca ca.pem --tls-cert me.pem --tls-key me.key vm ls";

const COPY_EXAMPLES: &str = "\
As `cp -r` and `docker cp`: a directory goes into one that is there and becomes one that is not; with /.
behind it, what is in it goes there. Modes, times and links are kept. A path of this host that looks like
NAME:PATH is written ./NAME:PATH.

Examples:
  berth vm cp notes.txt web:/root/
  berth vm cp web:/var/log/. logs
  berth vm cp -a src web:/srv
  tar -c data | berth vm cp - web:/srv
  berth vm cp web:/etc - | tar -t";

const BOOTSTRAP_EXAMPLES: &str = "\
Examples:
  berth image bootstrap debian bookworm
  berth image bootstrap --name lab --include gcc,libc6-dev,python3 debian bookworm";

/// Virtual machines and containers, with or without hardware virtualization
#[derive(Debug, Parser)]
#[command(name = "berth", version, after_help = EXAMPLES, max_term_width = 100)]
pub struct Args {
    /// Where images and machines are kept [default: /var/lib/berth for root, else
    /// $XDG_DATA_HOME/berth]
    #[arg(long, global = true, env = "BERTH_ROOT", value_name = "DIR", hide_env_values = true)]
    pub root: Option<PathBuf>,
    /// Where the daemon listens: `unix://PATH` or `tcp://HOST:PORT` [default: with --root `berth.sock` in
    /// it; else /run/berth/berth.sock for root, $XDG_RUNTIME_DIR/berth/berth.sock for others]. If there
    /// is no daemon at the default place, one is started there
    #[arg(long, global = true, env = "BERTH_HOST", value_name = "ADDRESS", hide_env_values = true)]
    pub host: Option<String>,
    /// With tcp://: the authorities that the other side's certificate must come from, as PEM
    #[arg(long, global = true, env = "BERTH_TLS_CA", value_name = "FILE", hide_env_values = true)]
    pub tls_ca: Option<PathBuf>,
    /// With tcp://: this side's certificate, as PEM
    #[arg(
        long,
        global = true,
        env = "BERTH_TLS_CERT",
        value_name = "FILE",
        hide_env_values = true
    )]
    pub tls_cert: Option<PathBuf>,
    /// With tcp://: its private key, as PEM
    #[arg(long, global = true, env = "BERTH_TLS_KEY", value_name = "FILE", hide_env_values = true)]
    pub tls_key: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The program's commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Virtual machines
    #[command(subcommand)]
    Vm(VmCommand),
    /// Networks that kept machines can be in
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Images machines are started from
    #[command(subcommand)]
    Image(ImageCommand),
    /// Disks that no machine uses at the moment
    #[command(subcommand)]
    Disk(DiskCommand),
    /// Keep machines: what commands ask when they are about kept machines. It is started by the first
    /// that needs it
    Daemon(DaemonArgs),
    /// Print what happens to machines, as lines of JSON
    Events,
    /// What this host can do, and what Berth will use
    Doctor(Listing),
    /// The process of a kept machine
    #[command(hide = true)]
    Vmm {
        /// What the time-stamp counter's frequency is known to be, in Hz
        #[arg(long)]
        tsc_hz: Option<u64>,
        /// A control group to be in
        #[arg(long)]
        group: Vec<PathBuf>,
        /// The machine's folder
        folder: PathBuf,
    },
    /// What becomes the processes of running clones
    #[command(hide = true)]
    Zygote {
        /// Room for the arguments that these show
        room: String,
    },
    /// Whether a machine that was stored can go on here
    #[command(hide = true)]
    CheckState(CheckStateArgs),
    /// Print a completion script
    Completions {
        /// The shell it is for
        shell: Shell,
    },
}

/// Commands for machines.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Start a machine and stay with it until it ends
    Run(Box<RunArgs>),
    /// Make a machine that is kept; `start` starts it
    Create(Box<CreateArgs>),
    /// Make a folder, a copy of a machine's for example, a machine of its own
    Adopt(AdoptArgs),
    /// Start machines
    Start(Names),
    /// Power guests off, or end them if they do not
    ///
    /// Presses the power button of each machine (ACPI). A guest that does not power off soon, in a
    /// quarter of the time and at most five seconds, is asked through Berth's agent, if it has one. When
    /// the time is over, the machine is ended.
    Stop(StopArgs),
    /// End machines at once
    Kill(Names),
    /// Stop machines and start them again
    Restart(StopArgs),
    /// Let the processors of machines stand still
    Pause(Names),
    /// Let them go on
    Unpause(Names),
    /// Store machines on the disk and end them; `start` or `resume` lets them go on
    Suspend(Names),
    /// Let machines go on that are suspended
    Resume(Names),
    /// Keep what a machine is now, memory and disks; it goes on
    Snapshot(SnapshotArgs),
    /// Show the snapshots of a machine; `*` is the one it descends from
    Snapshots(SnapshotsArgs),
    /// Make a machine what a snapshot holds: it goes on from there, or is stopped if only disks are in it
    Restore(RestoreArgs),
    /// Remove snapshots of a machine
    #[command(visible_alias = "snapshot-delete")]
    SnapshotRm(SnapshotRmArgs),
    /// Make machines that begin as another one is; what is not changed is there once
    Clone(CloneArgs),
    /// Pack a machine into one file, with disks and kernel; `import` starts it elsewhere
    Export(ExportArgs),
    /// Make a machine of such a file, or of an OVA
    Import(ImportArgs),
    /// List imports that broke off; another `import` of the same file goes on with one
    Imports(Listing),
    /// Remove what is kept of imports that broke off
    ImportRm(ImportRmArgs),
    /// Remove machines with all their files
    Rm(RmArgs),
    /// List the machines
    #[command(visible_alias = "list")]
    Ls(Listing),
    /// Print all that is known of machines, as JSON
    Inspect(Names),
    /// Print what a guest wrote on its console
    Logs(LogsArgs),
    /// Attach to a guest's console; Ctrl-] then `.` leaves it
    Console(ConsoleArgs),
    /// Run a command in a guest
    Exec(ExecArgs),
    /// List the ports of this host that lead to a guest
    Port(PortArgs),
    /// Copy files and folders between this host and a guest
    Cp(CopyArgs),
    /// Print what machines use of this host, again and again
    Top(TopArgs),
    /// Change what a machine is made of: at once where that is possible, else from its next start on
    Set(Box<SetArgs>),
    /// Give a machine another name
    Rename(RenameArgs),
}

/// Commands that do the same to several machines.
#[derive(Clone, Debug, clap::Args)]
pub struct Names {
    /// The machines' names
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// `berth daemon`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = DAEMON_EXAMPLES)]
pub struct DaemonArgs {
    /// Where to listen [default: as --host]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Listen on TCP too, for clients whose certificate comes from --tls-ca; needs --tls-cert and
    /// --tls-key too. Whoever has such a certificate can do all that the daemon's user can
    #[arg(long, value_name = "tcp://ADDRESS:PORT")]
    pub listen: Option<String>,
    /// How it says what it does, on standard error
    #[arg(
        long,
        value_enum,
        env = "BERTH_LOG_FORMAT",
        value_name = "FORMAT",
        default_value_t = LogFormat::Text,
        hide_env_values = true
    )]
    pub log_format: LogFormat,
    /// In a session of its own
    #[arg(long, hide = true)]
    pub detached: bool,
}

/// How a program says what it does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// Lines for people
    #[default]
    Text,
    /// Lines of JSON
    Json,
}

/// `berth vm create`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = CREATE_EXAMPLES)]
pub struct CreateArgs {
    /// What it is made of.
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Another disk: an empty one of this size in the machine's folder, or a file that stays where it
    /// is; with `,ro` it is not written. It is raw unless its name ends in `.qcow2` or
    /// `,format=qcow2` says so. May be repeated
    #[arg(long = "disk", value_name = "SIZE|FILE[,ro][,format=F]")]
    pub disks: Vec<KeptDisk>,
    /// Processor time that the machine may have at most, as 1.5 for that of one and a half processors
    #[arg(long, value_name = "N")]
    pub cpu_limit: Option<Processors>,
    /// Memory that the machine's process may have at most: its guest's and about 100M. Beyond that it is
    /// killed
    #[arg(long, value_name = "SIZE")]
    pub memory_limit: Option<Size>,
    /// The machine's name, also its host name
    #[arg(value_name = "NAME")]
    pub name: String,
    /// The image it begins as, for example `debian` or `debian:bookworm`
    #[arg(required_unless_present = "kernel")]
    pub image: Option<String>,
}

/// `berth vm adopt`.
#[derive(Clone, Debug, clap::Args)]
pub struct AdoptArgs {
    /// The machine's name [default: the folder's]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// The folder; one that is not among the others stays where it is
    #[arg(value_name = "DIR")]
    pub folder: PathBuf,
}

/// `berth vm stop`, `berth vm restart`.
#[derive(Clone, Debug, clap::Args)]
pub struct StopArgs {
    /// Seconds a guest has to power off
    #[arg(long, short, value_name = "SECONDS", default_value_t = 30)]
    pub time: u32,
    /// The machines' names
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// `berth vm rm`.
#[derive(Clone, Debug, clap::Args)]
pub struct RmArgs {
    /// End those that run
    #[arg(long, short)]
    pub force: bool,
    /// The machines' names
    #[arg(required = true, value_name = "NAME")]
    pub names: Vec<String>,
}

/// `berth vm logs`.
#[derive(Clone, Debug, clap::Args)]
pub struct LogsArgs {
    /// And what comes, until the machine ends
    #[arg(long, short)]
    pub follow: bool,
    /// Only so many of the last lines
    #[arg(long, short = 'n', value_name = "LINES")]
    pub tail: Option<usize>,
    /// What the machine's process says instead of the guest
    #[arg(long)]
    pub vmm: bool,
    /// The machine's name
    pub name: String,
}

/// `berth vm console`.
#[derive(Clone, Debug, clap::Args)]
pub struct ConsoleArgs {
    /// The machine's name
    pub name: String,
}

/// `berth vm exec`.
#[derive(Clone, Debug, clap::Args)]
pub struct ExecArgs {
    /// A variable of the command's environment. May be repeated
    #[arg(long, short, value_name = "NAME=VALUE")]
    pub env: Vec<Variable>,
    /// The directory to run it in [default: the user's home]
    #[arg(long, short, value_name = "DIR")]
    pub workdir: Option<String>,
    /// The user to run it as [default: root]
    #[arg(long, short, value_name = "USER")]
    pub user: Option<String>,
    /// No terminal for it, even if this is one
    #[arg(long, short = 'T')]
    pub no_tty: bool,
    /// The machine's name
    pub name: String,
    /// The command
    #[arg(
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "CMD"
    )]
    pub command: Vec<String>,
}

/// `berth vm cp`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = COPY_EXAMPLES)]
pub struct CopyArgs {
    /// Keep owners and groups, and programs that run as their owner; else what is copied to a guest is
    /// root's, and what is copied from one is yours. Only root can give files away here
    #[arg(long, short)]
    pub archive: bool,
    /// What to copy: `NAME:PATH` in a guest, `PATH` on this host, or `-` for a tar stream
    #[arg(value_name = "FROM")]
    pub from: String,
    /// Where to: the same; a tar stream goes into a directory that is there
    #[arg(value_name = "TO")]
    pub to: String,
}

/// `berth vm top`.
#[derive(Clone, Debug, clap::Args)]
pub struct TopArgs {
    /// Once, and not again and again
    #[arg(long)]
    pub no_stream: bool,
    /// Print lines of JSON
    #[arg(long)]
    pub json: bool,
    /// Seconds between two looks, 0.1 at least
    #[arg(long, short, value_name = "SECONDS", default_value_t = 2.0)]
    pub interval: f64,
    /// The machines' names [default: all that run]
    #[arg(value_name = "NAME")]
    pub names: Vec<String>,
}

/// `berth vm rename`.
#[derive(Clone, Debug, clap::Args)]
pub struct RenameArgs {
    /// What it is called
    pub name: String,
    /// What it is to be called
    pub new: String,
}

/// Commands for images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Make an image from the Debian mirror this host uses
    Bootstrap(BootstrapArgs),
    /// List the images
    #[command(visible_alias = "list")]
    Ls(Listing),
    /// Remove images
    Rm(RemoveArgs),
}

/// `berth vm run`.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunArgs {
    /// The machine's name, also its host name [default: the image's]
    #[arg(long, value_name = "N")]
    pub name: Option<String>,
    /// What it is made of.
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Translated code kept for each processor, 4M to 512M; what is noted of it takes as much again.
    /// More is faster for guests that run much different code, as compilers do [default: 16M]
    #[arg(long, value_name = "SIZE")]
    pub code_cache: Option<Size>,
    /// What the translator does for speed, to find a mistake in it: names with commas between, with
    /// `no-` before those to be left out; after `none` only those named. A wrong name lists all
    #[arg(long, value_name = "LIST")]
    pub translator_opt: Option<Optimizations>,
    /// Leave user code to the processor wherever that is possible, whether it pays or not: for tests
    #[arg(long, hide = true)]
    pub always_direct: bool,
    /// Says at the end what the translator did: blocks, exits, misses of the software TLB, times
    #[arg(long)]
    pub stats: bool,
    /// Lists each translated block and the host code made of it in FILE, or on standard error (many
    /// megabytes for a Linux guest)
    #[arg(long, value_name = "FILE", num_args = 0..=1, require_equals = true, default_missing_value = "-")]
    pub dump_blocks: Option<PathBuf>,
    /// A disk; with `,ro` it is not written. It is raw unless its name ends in `.qcow2` or
    /// `,format=qcow2` says so. May be repeated
    #[arg(long = "disk", value_name = "FILE[,ro][,format=F]")]
    pub disks: Vec<DiskArg>,
    /// Where the serial port leads: `stdio`, `file=PATH` (output only, appended), `socket=PATH` (a
    /// Unix socket, one client after the other) or `none` [default: stdio; none with
    /// --virtio-console stdio; with -- CMD it is kept and shown if the guest fails]
    #[arg(long, value_name = "CONSOLE")]
    pub serial: Option<ConsoleArg>,
    /// Gives the guest a virtio console that leads there: as --serial. Linux calls it hvc0; where its
    /// driver is a module, as in Debian, earlier messages are on the serial port only [default: none]
    #[arg(long, value_name = "CONSOLE")]
    pub virtio_console: Option<ConsoleArg>,
    /// The image to start, for example `debian` or `debian:bookworm`
    #[arg(required_unless_present = "kernel")]
    pub image: Option<String>,
    /// A command to run in the guest instead of a shell
    #[arg(last = true, value_name = "CMD")]
    pub command: Vec<String>,
}

impl RunArgs {
    /// Whether the daemon runs it. What has a kernel of its own needs none, and options about the process
    /// or its streams are of one that is this one.
    #[must_use]
    pub fn is_by_the_daemon(&self) -> bool {
        self.image.is_some()
            && self.machine.kernel.is_none()
            && self.code_cache.is_none()
            && self.translator_opt.is_none()
            && !self.always_direct
            && !self.stats
            && self.dump_blocks.is_none()
            && self.serial.is_none()
            && self.virtio_console.is_none()
    }
}

/// `berth image bootstrap`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = BOOTSTRAP_EXAMPLES)]
pub struct BootstrapArgs {
    /// The distribution; `debian` is known
    pub distribution: String,
    /// Its suite, for example `bookworm`
    pub suite: String,
    /// The root disk's size as the guest sees it
    #[arg(long, value_name = "SIZE", default_value = "4G")]
    pub size: Size,
    /// More packages to install into it. May be repeated
    #[arg(long, value_name = "PKG,...", value_delimiter = ',')]
    pub include: Vec<String>,
    /// What to call the image [default: DISTRIBUTION:SUITE]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Make it again even if it is there
    #[arg(long)]
    pub again: bool,
}

/// `berth image rm`.
#[derive(Clone, Debug, clap::Args)]
pub struct RemoveArgs {
    /// The images' names
    #[arg(required = true, value_name = "IMAGE")]
    pub images: Vec<String>,
}

/// Commands that list something.
#[derive(Clone, Copy, Debug, clap::Args)]
pub struct Listing {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// `FILE[,ro][,format=F]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskArg {
    /// The file.
    pub path: PathBuf,
    /// What it holds.
    pub format: Format,
    /// Not to be written.
    pub read_only: bool,
}

impl std::str::FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (mut name, mut read_only, mut format) = (text, false, None);
        loop {
            if let Some(rest) = name.strip_suffix(",ro") {
                (name, read_only) = (rest, true);
            } else if let Some((rest, asked)) = name.rsplit_once(",format=") {
                (name, format) = (rest, Some(asked.parse()?));
            } else {
                break;
            }
        }
        if name.is_empty() {
            return Err("a disk needs a file: FILE, FILE,ro or FILE,format=qcow2".into());
        }
        let path = PathBuf::from(name);
        let format = format.unwrap_or_else(|| Format::of_name(&path));
        Ok(Self { path, format, read_only })
    }
}

/// `SIZE` or `FILE[,ro][,format=F]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeptDisk {
    /// A new one.
    Size(Size),
    /// One that is there.
    File(DiskArg),
}

impl std::str::FromStr for KeptDisk {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // A file that is called like a size is `./10G`.
        match text.parse() {
            Ok(size) => Ok(Self::Size(size)),
            Err(_) => text.parse().map(Self::File),
        }
    }
}

/// Where a console leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleArg {
    /// Standard input and output.
    Stdio,
    /// Output to this file.
    File(PathBuf),
    /// To whoever connects to this Unix socket.
    Socket(PathBuf),
    /// Nowhere.
    None,
}

impl std::str::FromStr for ConsoleArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            None if text == "stdio" => Ok(Self::Stdio),
            None if text == "none" => Ok(Self::None),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            Some(("socket", path)) if !path.is_empty() => Ok(Self::Socket(path.into())),
            _ => Err("expected `stdio`, `file=PATH`, `socket=PATH` or `none`".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::args::machine::{Accel, NetArg};

    #[test]
    fn the_description_is_consistent() {
        Args::command().debug_assert();
    }

    #[test]
    fn the_commands_scripts_rely_on_parse() {
        let line = "berth vm run --name n --cpus 4 --memory 1G --accel translate --kernel k \
                    --initrd i --append -x --disk a,ro --disk b --net tap=t0 --debug-exit \
                    img -- uname -a";
        let args = Args::try_parse_from(line.split_whitespace()).unwrap();
        let Command::Vm(VmCommand::Run(run)) = args.command else { panic!() };
        let machine = &run.machine;
        let shape = (machine.cpus, machine.memory.bytes(), machine.accel);
        assert_eq!(shape, (4, 1 << 30, Accel::Translate));
        let disk = |path: &str, format, read_only| DiskArg { path: path.into(), format, read_only };
        assert_eq!(run.disks[0], disk("a", Format::Raw, true));
        assert_eq!(run.disks[1], disk("b", Format::Raw, false));
        let of = |text: &str| text.parse::<DiskArg>().unwrap();
        assert_eq!(of("a.qcow2"), disk("a.qcow2", Format::Qcow2, false));
        assert_eq!(of("a.qcow2,format=raw,ro"), disk("a.qcow2", Format::Raw, true));
        assert_eq!(of("a,ro,format=qcow2"), disk("a", Format::Qcow2, true));
        assert!("a,format=vmdk".parse::<DiskArg>().is_err());
        assert_eq!(run.machine.net, Some(NetArg::Tap("t0".into())));
        assert_eq!((run.image.as_deref(), run.command.len()), (Some("img"), 2));
        for good in [
            "berth vm run --kernel k",
            "berth vm run debian",
            "berth image ls --json",
            "berth image bootstrap debian bookworm",
            "berth image bootstrap --name lab --include gcc,perl --include less debian bookworm",
            "berth image rm a b",
            "berth disk create a.qcow2 1G",
            "berth disk create --backing b a.qcow2",
            "berth disk resize --shrink a 1G",
            "berth disk convert --format raw a b",
            "berth disk check --json a",
            "berth doctor --json",
            "berth vm create --disk 10G --disk ./10G,ro --net none web debian",
            "berth vm exec web ls -l /",
            "berth vm exec -u nobody -e A=B web -- sh -c true",
            "berth vm stop -t 5 a b",
            "berth vm create -e A=b --env C= web debian",
            "berth vm run -e A=b debian -- env",
            "berth vm set --cpus 2 --memory 1G --net none --debug-exit false -e A=b --unset-env C web",
            "berth vm cp -a a web:/b",
            "berth vm cp web:/b -",
            "berth vm top",
            "berth vm top --no-stream --json -i 0.5 a b",
            "berth daemon --log-format json",
            "berth --host unix:///x vm ls --json",
            "berth vm logs -f -n 5 a",
            "berth vm snapshot --tag t web",
            "berth vm snapshot --disk-only web",
            "berth vm snapshots --json web",
            "berth vm restore --force web t",
            "berth vm snapshot-rm web t u",
            "berth vm clone --count 3 --running --tag t web new",
            "berth daemon",
            "berth daemon --listen tcp://[::]:0 --tls-ca a --tls-cert b --tls-key c",
            "berth vm ls --host tcp://a:1 --tls-ca a --tls-cert b --tls-key c",
            "berth completions bash",
            "berth --root /x image ls",
            "berth vm run --serial none --virtio-console stdio debian",
            "berth vm run --serial socket=/a=b --virtio-console file=c debian",
        ] {
            assert!(Args::try_parse_from(good.split_whitespace()).is_ok(), "{good}");
        }
        for bad in [
            "berth vm run",
            "berth vm run --cpus 0 x",
            "berth vm run --cpus 17 x",
            "berth vm run --memory 5Q x",
            "berth vm run --net wi_fi x",
            "berth vm run --net tap= x",
            "berth vm run --initrd i x",
            "berth vm run --disk ,ro x",
            "berth image rm",
            "berth disk create a",
            "berth disk create --format vdi a 1G",
            "berth vm create web",
            "berth vm create -e A web debian",
            "berth vm create --kernel k -e A=b web",
            "berth vm set --cpus 17 web",
            "berth vm cp a",
            "berth daemon --log-format xml",
            "berth vm exec web",
            "berth vm rm",
            "berth vm restore web",
            "berth vm snapshot-rm web",
            "berth vm clone web",
            "berth vm clone --count 0 web new",
            "berth vm clone --count 257 web new",
            "berth vm run --serial file debian",
            "berth vm run --serial file= debian",
            "berth vm run --virtio-console pty debian",
        ] {
            assert!(Args::try_parse_from(bad.split_whitespace()).is_err(), "{bad}");
        }
    }
}
