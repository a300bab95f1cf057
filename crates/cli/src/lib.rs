//! The `berth` program: parse, check, call, print. What is done lives in the crates below; here are
//! the words of the command line (`args`), what they amount to (`plan`), the one place where a
//! machine is started (`machine`), and the printing.
#![forbid(unsafe_code)]

pub mod args;
pub mod client;
pub mod command;
pub mod copy;
pub mod disk;
pub mod doctor;
pub mod exit;
pub mod images;
pub mod keeper;
pub mod machine;
pub mod network;
pub mod plan;
pub mod state;
pub mod table;
pub mod terminal;
pub mod top;
pub mod vm;
pub mod vmm;

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use berth_daemon::log::Stderr;
use berth_vmm::clock::HostClock;
use clap::{CommandFactory, Parser};

use crate::args::{Args, Command, LogFormat, VmCommand};
use crate::client::{Address, Client, Place, TlsGiven};
use crate::exit::{CliError, ExitCode};

/// Runs the program on its real arguments.
#[must_use]
pub fn main() -> std::process::ExitCode {
    let args = Args::parse();
    // Each copy of a zygote has a log of its own.
    if !matches!(args.command, Command::Zygote { .. }) {
        log_to_stderr(&args);
    }
    meet_limits();
    match run(args) {
        Ok(code) => code.into(),
        Err(error) if error.is_broken_pipe() => ExitCode::Success.into(),
        Err(error) => {
            // Nothing is left to do when even this cannot be written.
            let _ = writeln!(io::stderr(), "berth: {}", error.chain());
            error.exit_code().into()
        }
    }
}

/// As many open files as we may have: a machine needs about 40, and some shells allow fewer at first.
/// Files that would grow beyond the limit are errors where they are written, as on a full disk, and
/// not the end of a program that has changed the terminal.
fn meet_limits() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    // Then it stays as it is, and what fails says so.
    let _ = setrlimit(Resource::Nofile, files);
    let never = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, never);
}

/// Errors of the machine go to standard error, of the daemon all it does; `BERTH_LOG` chooses others
/// (`BERTH_LOG=debug`). The logs of daemons and of machines' processes are limited.
fn log_to_stderr(args: &Args) {
    match &args.command {
        Command::Daemon(daemon) => {
            let root = state::directory(args.root.as_deref()).ok();
            begin_log("info", daemon.log_format, root.map(|root| root.join(client::DAEMON_LOG)));
        }
        Command::Vmm { folder, .. } => log_of_vmm(folder),
        _ => begin_log("error", LogFormat::Text, None),
    }
}

fn log_of_vmm(folder: &Path) {
    begin_log("error", LogFormat::Text, Some(folder.join(berth_daemon::vmm::LOG)));
}

fn begin_log(usual: &str, format: LogFormat, log: Option<PathBuf>) {
    let filter = tracing_subscriber::EnvFilter::try_from_env("BERTH_LOG")
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new(usual));
    let stderr = log.map_or_else(Stderr::plain, |log| Stderr::new(&log));
    let logging = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(Mutex::new(stderr));
    match format {
        LogFormat::Text => logging.init(),
        LogFormat::Json => logging.json().init(),
    }
}

/// Commands about kept machines.
fn kept(client: &Client, command: &VmCommand) -> Result<ExitCode, CliError> {
    match command {
        // It may need no daemon.
        VmCommand::Run(_) => Ok(ExitCode::Usage),
        VmCommand::Create(create) => vm::create(client, create),
        VmCommand::Adopt(adopt) => vm::adopt(client, adopt),
        VmCommand::Start(names) => vm::act(client, &names.names, "start"),
        VmCommand::Stop(stop) => vm::stop(client, stop, "stop"),
        VmCommand::Kill(names) => vm::act(client, &names.names, "kill"),
        VmCommand::Restart(stop) => vm::stop(client, stop, "restart"),
        VmCommand::Pause(names) => vm::act(client, &names.names, "pause"),
        VmCommand::Unpause(names) => vm::act(client, &names.names, "unpause"),
        VmCommand::Suspend(names) => vm::act(client, &names.names, "suspend"),
        VmCommand::Resume(names) => vm::act(client, &names.names, "resume"),
        VmCommand::Rm(remove) => vm::remove(client, remove),
        VmCommand::Ls(list) => vm::list(client, list.json),
        VmCommand::Inspect(names) => vm::inspect(client, &names.names),
        VmCommand::Logs(logs) => vm::logs(client, logs),
        VmCommand::Console(console) => vm::console(client, console),
        VmCommand::Exec(exec) => vm::exec(client, exec),
        VmCommand::Port(port) => vm::ports::list(client, port),
        VmCommand::Snapshot(snapshot) => vm::snapshots::take(client, snapshot),
        VmCommand::Snapshots(list) => vm::snapshots::list(client, list),
        VmCommand::Restore(restore) => vm::snapshots::restore(client, restore),
        VmCommand::SnapshotRm(remove) => vm::snapshots::remove(client, remove),
        VmCommand::Clone(clone) => vm::snapshots::clone(client, clone),
        VmCommand::Export(export) => vm::appliance::export(client, export),
        VmCommand::Import(import) => vm::appliance::import(client, import),
        VmCommand::Imports(list) => vm::unfinished::list(client, list.json),
        VmCommand::ImportRm(remove) => vm::unfinished::remove(client, remove),
        VmCommand::Cp(paths) => copy::run(client, paths),
        VmCommand::Top(top) => top::run(client, top),
        VmCommand::Set(set) => vm::set(client, set),
        VmCommand::Rename(rename) => vm::rename(client, rename),
    }
}

fn run(args: Args) -> Result<ExitCode, CliError> {
    let root = || state::directory(args.root.as_deref());
    let address = || -> Result<Address, CliError> {
        Ok(Address::choose(args.host.as_deref(), args.root.as_deref(), &root()?)?)
    };
    let tls = TlsGiven { ca: args.tls_ca, cert: args.tls_cert, key: args.tls_key };
    let client = || -> Result<Client, CliError> { Ok(Client::new(&address()?, &root()?, &tls)?) };
    match args.command {
        Command::Vm(VmCommand::Run(run)) if run.is_by_the_daemon() => {
            // Before there is a daemon.
            plan::check_run(&run)?;
            vm::run::run(&client()?, &run)
        }
        Command::Vm(VmCommand::Run(run)) => {
            if let Place::Tcp(_) = address()?.place {
                let text = "what has a kernel of its own, or options of its process, runs on this host; \
                            leave out --host or BERTH_HOST";
                return Err(CliError::Usage(text.into()));
            }
            let plan = plan::RunPlan::new(&run, &root()?)?;
            Ok(machine::run_machine(&plan)?)
        }
        Command::Vm(command) => kept(&client()?, &command),
        Command::Network(command) => network::run(&client()?, &command),
        Command::Events => vm::events(&client()?),
        Command::Daemon(daemon) => {
            let place = daemon.socket.map_or_else(|| Ok(address()?.place), |s| Ok(Place::Unix(s)));
            let place: Result<Place, CliError> = place;
            keeper::run(&root()?, place?, daemon.listen.as_deref(), &tls, daemon.detached)
        }
        Command::Vmm { tsc_hz, group, folder } => {
            tsc_hz.into_iter().for_each(HostClock::expect);
            Ok(vmm::run(&root()?, &folder, &group))
        }
        Command::Zygote { .. } => {
            let Some(begin) = vmm::zygote::serve().map_err(CliError::Output)? else {
                return Ok(ExitCode::Success);
            };
            log_of_vmm(&begin.folder);
            begin.tsc_hz.into_iter().for_each(HostClock::expect);
            Ok(vmm::run(&begin.root, &begin.folder, &begin.groups))
        }
        Command::CheckState(check) => Ok(vmm::check(&check)),
        Command::Image(command) => images::run(&client()?, &command),
        Command::Disk(command) => disk::run(&command),
        Command::Doctor(doctor) => doctor::run(&root()?, doctor.json),
        Command::Completions { shell } => {
            let mut text = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "berth", &mut text);
            io::stdout().write_all(&text).map_err(CliError::Output)?;
            Ok(ExitCode::Success)
        }
    }
}
