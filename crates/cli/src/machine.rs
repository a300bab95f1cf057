//! The one place where a machine is started. Everything above it decides what to run
//! ([`RunPlan`]); everything below is the machine's own business.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use berth_api::v1::machine::Cpu;
use berth_vmm::boot::Module;
use berth_vmm::console::{SerialConfig, SignalWatch};
use berth_vmm::devices::{Devices, DiskFile, HostEnds, NetConfig};
use berth_vmm::machine::{Baseline, Machine, MachineConfig, RunningMachine};
use berth_vmm::outcome::{Ending, Outcome};
use berth_vmm::vcpu::probe::AccelChoice;
use berth_vmm::vcpu::translated::{Dump, Reports};
use berth_vmm::virtio::console::device::ConsoleSize;
use signal_hook::consts::SIGWINCH;
use signal_hook::iterator::Signals;

use crate::args::machine::Accel;
use crate::command::{self, AGENT_WAIT, CommandError, Dial};
use crate::exit::ExitCode;
use crate::plan::{Console, NetPlan, RunPlan};
use crate::terminal;

/// The guest's vsock address; each machine is its own network of two.
const GUEST_CID: u32 = 3;
/// The port the agent listens on.
const AGENT_PORT: u32 = 1024;
/// How long a guest may take to power off once it was asked.
pub(crate) const POWER_OFF_WAIT: Duration = Duration::from_secs(30);
/// How much of a captured console is shown when the guest failed.
const CONSOLE_TAIL_BYTES: u64 = 4096;
/// What the agent says when it starts; no complaint.
const AGENT_GREETING: &str = "berth: init";

/// Why a machine did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// It could not be started.
    #[error("cannot start the machine {name}")]
    Start {
        /// The machine's name.
        name: String,
        /// Why.
        source: berth_vmm::error::MachineError,
    },
    /// Translated blocks cannot be listed.
    #[error("listing translated blocks in {path} failed", path = path.display())]
    Dump {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// Signals cannot be watched.
    #[error("waiting for signals failed")]
    Signals(#[source] io::Error),
    /// It ended in a way that is no success.
    #[error("{name}: {outcome}{console}")]
    Ended {
        /// The machine's name.
        name: String,
        /// How.
        outcome: Outcome,
        /// The end of its console, when nobody saw it.
        console: String,
    },
    /// The guest has no such command, or cannot run it: its console has nothing to add.
    #[error(transparent)]
    Refused(CommandError),
    /// The guest's command.
    #[error("the command in the guest did not finish{console}")]
    Command {
        /// Why it did not run.
        source: CommandError,
        /// The end of the console.
        console: String,
    },
}

impl MachineError {
    /// The status to exit with.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Command { source, .. } | Self::Refused(source) => source.exit_code(),
            _ => ExitCode::Failure,
        }
    }
}

struct Guest {
    ends: HostEnds,
    ending: Arc<Ending>,
}

impl Dial for Guest {
    fn dial(&mut self) -> io::Result<UnixStream> {
        let stream = connect_agent(&self.ends)?;
        // A guest that is gone says nothing more: whoever waits for it must be woken.
        let (ending, watched) = (Arc::clone(&self.ending), stream.try_clone()?);
        std::thread::Builder::new().name("agent-watch".into()).spawn(move || {
            let _ = ending.wait();
            // It may be closed already.
            let _ = watched.shutdown(Shutdown::Both);
        })?;
        Ok(stream)
    }

    fn is_alive(&mut self) -> bool {
        self.ending.outcome().is_none()
    }
}

/// Connects to the agent's port of a guest.
///
/// # Errors
/// Nobody listens there.
pub fn connect_agent(ends: &HostEnds) -> io::Result<UnixStream> {
    let Some(vsock) = ends.vsock.get() else {
        return Err(io::ErrorKind::NotConnected.into());
    };
    vsock.connect(AGENT_PORT, Duration::from_millis(100)).map_err(io::Error::other)
}

/// What is to be told of the translator's work.
pub(crate) struct Told {
    reports: Option<Reports>,
    dump: Option<(PathBuf, Dump)>,
}

impl Told {
    pub(crate) fn new(plan: &RunPlan) -> Result<Self, MachineError> {
        let open = |path: &PathBuf| {
            if path.as_os_str() == "-" {
                return Ok(Dump::new(io::stderr()));
            }
            let file = File::create(path);
            let dump = file.map(|file| Dump::new(io::BufWriter::new(file)));
            dump.map_err(|source| MachineError::Dump { path: path.clone(), source })
        };
        let dump = plan.dump_blocks.as_ref();
        let dump = dump.map(|path| Ok((path.clone(), open(path)?))).transpose()?;
        Ok(Self { reports: plan.stats.then(Reports::default), dump })
    }

    /// Once all vCPUs have ended.
    pub(crate) fn finish(self) -> Result<(), MachineError> {
        if let Some(reports) = self.reports {
            let all = reports.take();
            if all.is_empty() {
                eprintln!("berth: no statistics: the translator did not run");
            }
            for report in all {
                eprintln!("{report}");
            }
        }
        match self.dump {
            Some((path, dump)) => {
                dump.flush().map_err(|source| MachineError::Dump { path, source })
            }
            None => Ok(()),
        }
    }
}

pub(crate) fn config(plan: &RunPlan, told: &Told) -> MachineConfig {
    let mut c = MachineConfig::new(&plan.kernel);
    c.translator.optimizations = plan.optimizations;
    c.translator.reports.clone_from(&told.reports);
    c.translator.dump = told.dump.as_ref().map(|(_, dump)| dump.clone());
    c.cpus = u32::from(plan.cpus);
    c.memory_bytes = plan.memory_bytes;
    c.translator.always_direct = plan.always_direct;
    if let Some(bytes) = plan.code_cache_bytes {
        c.translator.code_cache_bytes = bytes;
    }
    c.accel = accel_choice(plan.accel);
    c.cpu = baseline(plan.cpu);
    if let Some(initrd) = &plan.initrd {
        c.modules = Module::parse_list(&initrd.to_string_lossy());
    }
    c.cmdline.clone_from(&plan.command_line);
    c.debug_exit = plan.debug_exit;
    c.serial = console(&plan.console);
    c
}

fn baseline(cpu: Cpu) -> Option<Baseline> {
    match cpu {
        Cpu::Host => None,
        Cpu::V1 => Some(Baseline::V1),
        Cpu::V2 => Some(Baseline::V2),
        Cpu::V3 => Some(Baseline::V3),
    }
}

pub(crate) fn accel_choice(accel: Accel) -> AccelChoice {
    match accel {
        Accel::Auto => AccelChoice::Auto,
        Accel::Translate => AccelChoice::Translate,
        Accel::Kvm => AccelChoice::Kvm,
    }
}

fn console(plan: &Console) -> SerialConfig {
    match plan {
        Console::Stdio => SerialConfig::Stdio,
        Console::File(path) => SerialConfig::File(path.clone()),
        Console::Socket(path) => SerialConfig::Socket(path.clone()),
        Console::Stream(stream) => SerialConfig::Stream(Arc::clone(stream)),
        Console::Nowhere => SerialConfig::Null,
        Console::Capture(file) => {
            SerialConfig::File(PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())))
        }
    }
}

pub(crate) fn devices(plan: &RunPlan) -> Devices {
    Devices {
        disks: plan
            .disks
            .iter()
            .map(|d| DiskFile { path: d.path.clone(), format: d.format, read_only: d.read_only })
            .collect(),
        shares: plan.shares.clone(),
        net: match &plan.net {
            NetPlan::Absent => NetConfig::None,
            NetPlan::User(ports) => NetConfig::User(ports.clone()),
            NetPlan::Tap(name) => NetConfig::Tap(name.clone()),
            NetPlan::Handed => NetConfig::Handed,
        },
        mac: None,
        link: Default::default(),
        vsock_cid: Some(GUEST_CID),
        console: plan.virtio_console.as_ref().map(console),
        // Nobody could ask one that is not kept.
        balloon: false,
    }
}

/// Starts the machine and stays with it until it ends.
///
/// # Errors
/// [`MachineError`] when it cannot be started or ends other than in order.
pub fn run_machine(plan: &RunPlan) -> Result<ExitCode, MachineError> {
    // Before any thread exists, so that all of them leave the signals to the watcher. A command in
    // the guest gets them itself.
    let over: Arc<std::sync::OnceLock<Arc<Ending>>> = Arc::default();
    let asked = Arc::new(AtomicBool::new(false));
    if plan.command.is_none() {
        let (over, asked) = (Arc::clone(&over), Arc::clone(&asked));
        SignalWatch::start(move |_| {
            asked.store(true, Ordering::SeqCst);
            if let Some(ending) = over.get() {
                ending.end(Outcome::Stopped);
            }
        })
        .map_err(MachineError::Signals)?;
    }
    let ends = HostEnds::default();
    let attach = devices(plan).into_attach(&ends);
    let told = Told::new(plan)?;
    let machine = Machine::start_with(&config(plan, &told), Some(attach))
        .map_err(|source| MachineError::Start { name: plan.name.clone(), source })?;
    let ending = machine.ending();
    if let (Some(Console::Stdio), Some(size)) = (&plan.virtio_console, ends.console.get()) {
        follow_terminal_size(size.clone()).map_err(MachineError::Signals)?;
    }
    // Set once. The guest runs already; a signal from before had nothing to end.
    let _ = over.set(Arc::clone(&ending));
    if asked.load(Ordering::SeqCst) {
        ending.end(Outcome::Stopped);
    }
    let status = match &plan.command {
        None => ended(plan, machine.wait()),
        Some(exec) => {
            let mut guest = Guest { ends, ending };
            let result = command::run_first(&mut guest, exec);
            let status = result.map_err(|source| match source.is_refusal() {
                true => MachineError::Refused(source),
                false => MachineError::Command { source, console: console_tail(plan) },
            });
            power_off(&mut guest, machine);
            status
        }
    };
    let finished = told.finish();
    let status = status?;
    finished.map(|()| status)
}

/// Tells the guest the size of the terminal, now and whenever it changes.
fn follow_terminal_size(console: ConsoleSize) -> io::Result<()> {
    let tell = move || {
        if let Some(size) = terminal::size() {
            console.set(size.cols, size.rows);
        }
    };
    let mut changes = Signals::new([SIGWINCH])?;
    tell();
    std::thread::Builder::new().name("terminal-size".into()).spawn(move || {
        for _ in &mut changes {
            tell();
        }
    })?;
    Ok(())
}

/// Lets the guest write what it has to, within a limit.
fn power_off(guest: &mut Guest, machine: RunningMachine) {
    if guest.is_alive() && command::shut_down(guest, AGENT_WAIT).is_ok() {
        let began = Instant::now();
        while guest.is_alive() && began.elapsed() < POWER_OFF_WAIT {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    machine.stop();
    // How it ended does not matter any more.
    let _ = machine.wait();
}

fn ended(plan: &RunPlan, outcome: Outcome) -> Result<ExitCode, MachineError> {
    match outcome {
        Outcome::PoweredOff => Ok(ExitCode::Success),
        Outcome::DebugExit(_) => Ok(ExitCode::Guest(outcome.exit_status())),
        outcome => Err(MachineError::Ended {
            name: plan.name.clone(),
            outcome,
            console: console_tail(plan),
        }),
    }
}

/// What says most of a console nobody has seen: a complaint, or its last line.
fn console_tail(plan: &RunPlan) -> String {
    let Console::Capture(file) = &plan.console else { return String::new() };
    let mut text = Vec::new();
    let read = (|| -> io::Result<()> {
        let mut file = file.try_clone()?;
        let end = file.seek(SeekFrom::End(0))?;
        file.seek(SeekFrom::Start(end.saturating_sub(CONSOLE_TAIL_BYTES)))?;
        file.read_to_end(&mut text).map(|_| ())
    })();
    match read {
        Ok(()) => complaint(&String::from_utf8_lossy(&text)),
        Err(_) => String::new(),
    }
}

/// What says most of the end of a console, for the end of a message.
pub(crate) fn complaint(text: &str) -> String {
    let lines = || text.lines().map(str::trim).filter(|line| !line.is_empty());
    // What the agent or the kernel complained of says more than the restart that follows.
    let complaint =
        lines().rfind(|line| line.starts_with("berth: ") || line.contains("Kernel panic"));
    let last = complaint.filter(|line| *line != AGENT_GREETING).or_else(|| lines().next_back());
    match last {
        Some(line) => {
            let line: String = line.chars().filter(|c| !c.is_control()).collect();
            format!("; its console said: {line}")
        }
        None => String::new(),
    }
}
