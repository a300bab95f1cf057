//! `berth vm ...` of kept machines: asks the daemon and prints.

pub mod appliance;
pub mod ova;
pub mod ports;
pub mod run;
pub mod snapshots;
pub mod unfinished;

use std::io::{self, IsTerminal, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use berth_api::agent::message::Exec;
use berth_api::v1::change::{ChangeMachine, ChangedMachine, Later};
use berth_api::v1::machine::{
    self as api, AdoptMachine, CreateMachine, Machine, MachineConfig, NewDisk, RenameMachine,
};
use berth_api::v1::routes::{self, PREFIX, UPGRADE_AGENT, UPGRADE_CONSOLE};
use berth_disk::format::Format;
use berth_vmm::console::EscapeFilter;
use hyper::Method;
use jiff::{SpanRound, Timestamp, Unit};

use crate::args::machine::{Accel, MachineArgs, NetArg, SetArgs, ShareArg, Variable};
use crate::args::{
    AdoptArgs, ConsoleArgs, CreateArgs, DiskArg, ExecArgs, KeptDisk, LogsArgs, RenameArgs, RmArgs,
    StopArgs,
};
use crate::client::{Client, ClientError};
use crate::command::{self, CommandError, Dial};
use crate::exit::{CliError, ExitCode};
use crate::plan::{PlanError, has_program};
use crate::table;
use crate::terminal::{self, RawTerminal};

/// What is shown of a console's past to somebody who attaches.
const BACKLOG: u32 = 2048;
/// Bytes moved at once.
const CHUNK: usize = 16 << 10;
/// A request without a body.
pub(crate) const NOTHING: Option<&()> = None;

type Done = Result<ExitCode, CliError>;

/// `berth vm create`.
///
/// # Errors
/// [`CliError`].
pub fn create(client: &Client, args: &CreateArgs) -> Done {
    let disk = |disk: &KeptDisk| match disk {
        KeptDisk::Size(size) => Ok(NewDisk::Size(*size)),
        KeptDisk::File(disk) => given_disk(disk),
    };
    let request = CreateMachine {
        name: args.name.clone(),
        config: MachineConfig {
            cpu_limit: args.cpu_limit,
            memory_limit: args.memory_limit,
            ..made_of(client, &args.machine, args.image.as_deref())?
        },
        disks: args.disks.iter().map(disk).collect::<Result<_, _>>()?,
    };
    let path = format!("{PREFIX}/machines");
    let made: Machine = client.call(&Method::POST, &path, Some(&request))?;
    print(&format!("{}\n", made.name))
}

fn absolute(path: &Path) -> Result<PathBuf, CliError> {
    std::path::absolute(path).map_err(CliError::Output)
}

/// A disk that is there.
fn given_disk(disk: &DiskArg) -> Result<NewDisk, CliError> {
    let format = match disk.format {
        Format::Raw => api::DiskFormat::Raw,
        Format::Qcow2 => api::DiskFormat::Qcow2,
    };
    let (file, read_only) = (absolute(&disk.path)?, disk.read_only);
    Ok(NewDisk::File(api::Disk { file, format, read_only }))
}

/// What a machine is made of, but for its disks and limits.
fn made_of(
    client: &Client,
    machine: &MachineArgs,
    image: Option<&str>,
) -> Result<MachineConfig, CliError> {
    let net = match (&machine.net, image) {
        (Some(net), _) => net_of(net),
        (None, None) if machine.publish.is_empty() => api::Net::None,
        // What is on the daemon's host is not known from elsewhere: a start says it.
        _ if client.is_remote() || has_program("passt") => api::Net::User,
        _ if !machine.publish.is_empty() => return Err(PlanError::NoPasst.into()),
        _ => {
            eprintln!("berth: the guest gets no network, since passt is not installed");
            api::Net::None
        }
    };
    let share = |share: &ShareArg| {
        let (guest, read_only) = (share.guest.clone(), share.read_only);
        Ok(api::Share { host: absolute(&share.host)?, guest, read_only })
    };
    Ok(MachineConfig {
        image: image.map(str::to_owned),
        kernel: machine.kernel.as_deref().map(absolute).transpose()?,
        initrd: machine.initrd.as_deref().map(absolute).transpose()?,
        append: machine.append.clone(),
        cpus: machine.cpus,
        memory: machine.memory,
        accel: accel_of(machine.accel),
        cpu: machine.cpu,
        debug_exit: machine.debug_exit,
        env: machine.env.iter().cloned().map(Variable::into_pair).collect(),
        net,
        ports: machine.publish.clone(),
        shares: machine.shares.iter().map(share).collect::<Result<_, CliError>>()?,
        ..MachineConfig::default()
    })
}

fn net_of(net: &NetArg) -> api::Net {
    match net {
        NetArg::User => api::Net::User,
        NetArg::Tap(name) => api::Net::Tap(name.clone()),
        NetArg::Network(name) => api::Net::Network(name.clone()),
        NetArg::None => api::Net::None,
    }
}

fn accel_of(accel: Accel) -> api::Accel {
    match accel {
        Accel::Auto => api::Accel::Auto,
        Accel::Translate => api::Accel::Translate,
        Accel::Kvm => api::Accel::Kvm,
    }
}

/// `berth vm set`.
///
/// # Errors
/// [`CliError`].
pub fn set(client: &Client, args: &SetArgs) -> Done {
    let set = args.env.iter().cloned().map(Variable::into_pair);
    let unset = args.unset_env.iter().map(|name| (name.clone(), None));
    let change = ChangeMachine {
        cpus: args.cpus,
        memory: args.memory,
        cpu_limit: args.cpu_limit,
        memory_limit: args.memory_limit,
        accel: args.accel.map(accel_of),
        cpu: args.cpu,
        append: args.append.clone(),
        net: args.net.as_ref().map(net_of),
        ports: (args.publish_none || !args.publish.is_empty()).then(|| args.publish.clone()),
        debug_exit: args.debug_exit,
        env: unset.chain(set.map(|(name, value)| (name, Some(value)))).collect(),
    };
    if change.is_empty() {
        let text = "nothing is to be changed; `berth vm set --help` lists what can be";
        return Err(CliError::Usage(text.into()));
    }
    let path = routes::machine(&args.name, None);
    let ChangedMachine { machine, later } = client.call(&Method::PATCH, &path, Some(&change))?;
    let name = &machine.name;
    for Later { what, why } in &later {
        eprintln!("berth: {what} of {name}: {why}");
    }
    if !later.is_empty() {
        eprintln!(
            "berth: in that {name} runs as it is until it is started again (`berth vm restart {name}`)"
        );
    }
    print(&format!("{}\n", machine.name))
}

/// `berth vm adopt`.
///
/// # Errors
/// [`CliError`].
pub fn adopt(client: &Client, args: &AdoptArgs) -> Done {
    let folder = std::path::absolute(&args.folder).map_err(CliError::Output)?;
    let request = AdoptMachine { folder, name: args.name.clone() };
    let path = format!("{PREFIX}/adopt");
    let made: Machine = client.call(&Method::POST, &path, Some(&request))?;
    print(&format!("{}\n", made.name))
}

/// Asks for the same of each machine; goes on after one for which it cannot be done.
pub(crate) fn each(names: &[String], mut act: impl FnMut(&str) -> Result<(), ClientError>) -> Done {
    let mut code = ExitCode::Success;
    for name in names {
        match act(name) {
            Ok(()) => print(&format!("{name}\n")).map(|_| ())?,
            Err(error @ ClientError::Api(_)) if names.len() > 1 => {
                eprintln!("berth: {error}");
                code = ExitCode::Failure;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(code)
}

/// `start`, `kill`, `pause` and others that have no options.
///
/// # Errors
/// [`CliError`].
pub fn act(client: &Client, names: &[String], what: &str) -> Done {
    each(names, |name| {
        client.call::<Machine>(&Method::POST, &routes::machine(name, Some(what)), NOTHING)?;
        Ok(())
    })
}

/// `berth vm stop` and `berth vm restart`.
///
/// # Errors
/// [`CliError`].
pub fn stop(client: &Client, args: &StopArgs, what: &str) -> Done {
    each(&args.names, |name| {
        let path = routes::machine(name, Some(what));
        let path = format!("{path}?timeout={}", args.time);
        client.call::<Machine>(&Method::POST, &path, NOTHING)?;
        Ok(())
    })
}

/// `berth vm rm`.
///
/// # Errors
/// [`CliError`].
pub fn remove(client: &Client, args: &RmArgs) -> Done {
    each(&args.names, |name| {
        let path = format!("{}?force={}", routes::machine(name, None), args.force);
        client.call::<()>(&Method::DELETE, &path, NOTHING)
    })
}

/// `berth vm rename`.
///
/// # Errors
/// [`CliError`].
pub fn rename(client: &Client, args: &RenameArgs) -> Done {
    let request = RenameMachine { name: args.new.clone() };
    let path = routes::machine(&args.name, Some("rename"));
    client.call::<Machine>(&Method::POST, &path, Some(&request))?;
    Ok(ExitCode::Success)
}

/// `berth vm ls`.
///
/// # Errors
/// [`CliError`].
pub fn list(client: &Client, json: bool) -> Done {
    let machines: Vec<Machine> =
        client.call(&Method::GET, &format!("{PREFIX}/machines"), NOTHING)?;
    let now = Timestamp::now();
    print_list(&machines, json, &["NAME", "STATE", "CPUS", "MEMORY", "IMAGE", "UP"], |machine| {
        vec![
            machine.name.clone(),
            machine.state.as_str().to_owned(),
            machine.config.cpus.to_string(),
            machine.config.memory.to_string(),
            machine.config.image.clone().unwrap_or_else(|| "-".into()),
            machine.started.map_or_else(|| "-".into(), |started| span(started, now)),
        ]
    })
}

/// A time since then, for people.
pub(crate) fn span(from: Timestamp, to: Timestamp) -> String {
    let whole = SpanRound::new().smallest(Unit::Second).largest(Unit::Hour);
    match (to - from).round(whole) {
        Ok(span) => format!("{span:#}"),
        Err(_) => "-".into(),
    }
}

/// `berth vm inspect`.
///
/// # Errors
/// [`CliError`].
pub fn inspect(client: &Client, names: &[String]) -> Done {
    let machines: Result<Vec<Machine>, _> = names
        .iter()
        .map(|name| client.call(&Method::GET, &routes::machine(name, None), NOTHING))
        .collect();
    print_json(&machines?)
}

/// `berth vm logs`.
///
/// # Errors
/// [`CliError`].
pub fn logs(client: &Client, args: &LogsArgs) -> Done {
    let source = if args.vmm { "vmm" } else { "console" };
    let mut path = routes::machine(&args.name, Some("logs"));
    path.push_str(&format!("?source={source}&follow={}", args.follow));
    if let Some(lines) = args.tail {
        path.push_str(&format!("&tail={lines}"));
    }
    let mut out = io::stdout().lock();
    client.stream(&path, |bytes| {
        out.write_all(bytes).and_then(|()| out.flush()).map_err(CliError::Output)
    })?;
    Ok(ExitCode::Success)
}

/// `berth events`.
///
/// # Errors
/// [`CliError`].
pub fn events(client: &Client) -> Done {
    let mut out = io::stdout().lock();
    client.stream(&format!("{PREFIX}/events"), |bytes| {
        out.write_all(bytes).and_then(|()| out.flush()).map_err(CliError::Output)
    })?;
    Ok(ExitCode::Success)
}

/// The way to the agent of a kept machine.
pub(crate) struct Kept<'a> {
    client: &'a Client,
    name: &'a str,
    /// Why it cannot be reached at all.
    refused: Option<ClientError>,
}

impl<'a> Kept<'a> {
    pub(crate) fn new(client: &'a Client, name: &'a str) -> Self {
        Self { client, name, refused: None }
    }

    /// What an error on the way means: why the daemon refused, if it did.
    pub(crate) fn explain(self, error: CommandError) -> CliError {
        match (error, self.refused) {
            (CommandError::GuestEnded, Some(why)) => why.into(),
            (error, _) => error.into(),
        }
    }
}

/// Refuses what needs a machine that runs.
pub(crate) fn check_running(client: &Client, name: &str) -> Result<(), CliError> {
    let machine: Machine = client.call(&Method::GET, &routes::machine(name, None), NOTHING)?;
    if machine.state == api::MachineState::Running {
        return Ok(());
    }
    Err(CliError::NotRunning { name: name.to_owned(), state: machine.state.as_str() })
}

impl Dial for Kept<'_> {
    fn dial(&mut self) -> io::Result<UnixStream> {
        let path = routes::machine(self.name, Some("agent"));
        match self.client.upgrade(&path, UPGRADE_AGENT) {
            // The agent says nothing before it is asked.
            Ok((stream, _)) => Ok(stream),
            Err(error) => {
                let text = error.to_string();
                self.refused = Some(error);
                Err(io::Error::other(text))
            }
        }
    }

    fn is_alive(&mut self) -> bool {
        let path = routes::machine(self.name, None);
        let machine = self.client.call::<Machine>(&Method::GET, &path, NOTHING);
        machine.is_ok_and(|machine| machine.state == api::MachineState::Running)
    }
}

/// `berth vm exec`.
///
/// # Errors
/// [`CliError`].
pub fn exec(client: &Client, args: &ExecArgs) -> Done {
    let mut exec = Exec {
        argv: args.command.clone(),
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        ..Exec::default()
    };
    if !args.no_tty {
        terminal::give(&mut exec);
    }
    exec.env.extend(args.env.iter().cloned().map(Variable::into_pair));
    check_running(client, &args.name)?;
    let mut dial = Kept::new(client, &args.name);
    let result = command::run(&mut dial, &exec);
    result.map_err(|error| dial.explain(error))
}

/// `berth vm console`.
///
/// # Errors
/// [`CliError`].
pub fn console(client: &Client, args: &ConsoleArgs) -> Done {
    let path = routes::machine(&args.name, Some("console"));
    let path = format!("{path}?backlog={BACKLOG}");
    let (stream, before) = client.upgrade(&path, UPGRADE_CONSOLE)?;
    if io::stdin().is_terminal() {
        eprintln!("berth: the console of {}; Ctrl-] then `.` leaves it", args.name);
    }
    show_console(stream, &before, &Arc::default())?;
    Ok(ExitCode::Success)
}

/// Connects standard input and output to a console, until it ends or is left.
fn show_console(
    mut from: UnixStream,
    before: &[u8],
    left: &Arc<AtomicBool>,
) -> Result<(), CliError> {
    let raw = io::stdin().is_terminal().then(RawTerminal::enter);
    let raw = raw.transpose().map_err(CliError::Output)?;
    let typed = from.try_clone().map_err(CliError::Output)?;
    let (escape, left) = (raw.is_some(), Arc::clone(left));
    thread::spawn(move || type_in(&typed, escape, &left));
    let mut out = io::stdout().lock();
    let mut show = |bytes: &[u8]| out.write_all(bytes).and_then(|()| out.flush());
    let mut shown = show(before);
    let mut chunk = vec![0; CHUNK];
    while shown.is_ok() {
        match from.read(&mut chunk) {
            Ok(0) => break,
            Ok(count) => shown = show(chunk.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    drop(raw);
    shown.map_err(CliError::Output)
}

/// Moves standard input to the guest, until the escape; its end leaves the output alone.
fn type_in(mut to: &UnixStream, escape: bool, left: &AtomicBool) {
    let mut filter = EscapeFilter::default();
    let mut chunk = vec![0; CHUNK];
    loop {
        let count = match io::stdin().read(&mut chunk) {
            Ok(0) => return,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let bytes = chunk.get(..count).unwrap_or_default();
        let (bytes, leave) = if escape { filter.pass(bytes) } else { (bytes.to_vec(), false) };
        if to.write_all(&bytes).is_err() {
            return;
        }
        if leave {
            left.store(true, Ordering::SeqCst);
            let _ = to.shutdown(Shutdown::Both);
            return;
        }
    }
}

/// Prints what there is, as JSON or as a table of these columns.
pub(crate) fn print_list<T: serde::Serialize>(
    all: &[T],
    json: bool,
    columns: &[&str],
    row: impl Fn(&T) -> Vec<String>,
) -> Done {
    if json {
        return print_json(&all);
    }
    print(&(table::plain(columns, all.iter().map(row).collect()) + "\n"))
}

pub(crate) fn print(text: &str) -> Done {
    io::stdout().write_all(text.as_bytes()).map_err(CliError::Output)?;
    Ok(ExitCode::Success)
}

pub(crate) fn print_json(value: &impl serde::Serialize) -> Done {
    let text = serde_json::to_string_pretty(value).map_err(CliError::Json)?;
    print(&(text + "\n"))
}
