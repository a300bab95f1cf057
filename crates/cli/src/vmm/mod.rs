//! `berth vmm DIR`: the process of one kept machine. The daemon starts it, and finds it again by the
//! socket in the machine's folder; it needs no daemon to go on.
//!
//! ```text
//! daemon ──► state/vmm.sock ──► control: pause, power off, kill, agent, console
//!                                   │
//! console.log ◄── hub ◄──► serial port of the machine
//! ```
//!
//! Everything in the folder is reached through a descriptor of it, so that it may be renamed.

mod ahead;
mod check;
mod confine;
mod control;
mod disks;
mod hub;
mod resize;
mod wrote;
pub mod zygote;

pub use check::check;

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use berth_api::v1::machine::{Exit, MachineState};
use berth_api::v1::run::Temporary;
use berth_api::vmm::{
    Answer, Greeting, IDENTITY, ORIGIN, Origin, RENEW, Request, SUSPENDED, Status, TEMPORARY,
};
use berth_daemon::folder::{Folder, FolderLock, VmToml, hardware_address};
use berth_vmm::console::SignalWatch;
use berth_vmm::devices::HostEnds;
use berth_vmm::machine::{Handed, Machine, Resume, RunningMachine};
use berth_vmm::outcome::{Ending, Outcome};
use berth_vmm::virtio::net::device::Mac;
use jiff::Timestamp;
use rustix::fs::{Mode, OFlags};

use crate::exit::ExitCode;
use crate::machine::{Told, config, devices};
use crate::plan::{Console, NetPlan, RunPlan};
use crate::vmm::ahead::Ahead;
use crate::vmm::control::Control;
use crate::vmm::hub::Hub;
use crate::vmm::wrote::Teller;

/// How long the process of an earlier run may take to be gone.
const LOCK_TIME: Duration = Duration::from_secs(3);

/// Runs the machine of a folder to its end.
#[must_use]
pub fn run(root: &Path, path: &Path, groups: &[PathBuf]) -> ExitCode {
    let began = Instant::now();
    // A session of its own: nobody's terminal ends it. What it writes is its user's alone.
    let _ = rustix::process::setsid();
    rustix::process::umask(Mode::RWXG | Mode::RWXO);
    // With limits it is in them before it uses anything.
    let joined = groups.iter().try_for_each(|group| {
        berth_daemon::cgroup::join(group, std::process::id())
            .map_err(|error| format!("{}: {error}", group.display()).into())
    });
    match joined.and_then(|()| start(root, path)) {
        Ok(run) => {
            if run.goes_on {
                let us = run.begun.machine.started().saturating_duration_since(began).as_micros();
                eprintln!("berth: the guest goes on, {us} us after its process began");
            }
            run.finish()
        }
        Err(error) => {
            let why = berth_daemon::failure::chain(&*error);
            eprintln!("berth: {why}");
            greet(&Greeting::Failed(why));
            ExitCode::Failure
        }
    }
}

/// Says to the daemon, if it is still there, how the start went.
fn greet(greeting: &Greeting) {
    let mut line = serde_json::to_vec(greeting).unwrap_or_default();
    line.push(b'\n');
    // A daemon that is gone finds out otherwise.
    let _ = io::stdout().write_all(&line).and_then(|()| io::stdout().flush());
}

/// What a machine went on from, until it is removed.
const RESUMED: &str = "state/.resumed";
/// Bytes that say how a machine that is removed at its end is shown.
const TEMPORARY_MAX: u64 = 16 << 10;
/// Bytes that say where a clone begins.
const ORIGIN_MAX: u64 = 16 << 10;
/// How long the process of another machine may take to hand it over.
const TAKE_TIME: Duration = Duration::from_secs(10);

/// A machine that runs, with what has to live as long.
struct Run {
    begun: Begun,
    folder: Folder,
    /// It did not boot.
    goes_on: bool,
    _lock: FolderLock,
}

/// What was begun of it.
struct Begun {
    machine: RunningMachine,
    plan: RunPlan,
    told: Told,
    hub: Arc<Hub>,
    /// Of a running clone.
    teller: Option<Arc<Teller>>,
}

/// What a machine is that is kept.
struct Kept<'a> {
    folder: &'a Folder,
    toml: &'a VmToml,
    name: &'a str,
    /// Of its network card.
    mac: Mac,
    /// It is not the only one that goes on from where it began.
    is_copy: bool,
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

fn start(root: &Path, path: &Path) -> Result<Run, Failure> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(path, flags, Mode::empty())
        .map_err(|errno| format!("cannot open {}: {errno}", path.display()))?;
    let folder = Folder::at(format!("/proc/self/fd/{}", directory.as_raw_fd()));
    // It is there as long as the process.
    std::mem::forget(directory);
    let lock =
        folder.lock_within(LOCK_TIME).map_err(|_| format!("{} is in use", path.display()))?;
    // A restore that was begun is ended before anything is read.
    berth_daemon::snapshot::settle(&folder, &lock)?;
    let toml = folder.config()?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    folder.note_start()?;
    let goes_on = folder.file(ORIGIN).exists() || folder.file(SUSPENDED).is_dir();
    let begun = begin(root, &folder, &toml, &name, goes_on);
    let begun = begun.map(|begun| Run { begun, folder: folder.clone(), goes_on, _lock: lock });
    if let Err(error) = &begun {
        folder.set_last_exit(Some(&Exit {
            time: Timestamp::now(),
            in_order: false,
            reason: format!("not started: {}", berth_daemon::failure::chain(&**error)),
            status: 1,
        }))?;
    } else {
        // The guest does not wait for it. Without a thread it lasts by and by.
        let thread = std::thread::Builder::new().name("note".into());
        let _ = thread.spawn(move || {
            let synced = folder.sync_last_exit();
            // Not before nobody can find it by its old name, even after a loss of power.
            if synced.is_ok() {
                let _ = std::fs::remove_dir_all(folder.file(RESUMED));
            }
        });
    }
    begun
}

fn begin(
    root: &Path,
    folder: &Folder,
    toml: &VmToml,
    name: &str,
    goes_on: bool,
) -> Result<Begun, Failure> {
    let (near, far) = UnixStream::pair()?;
    let console = Console::Stream(Arc::new(far));
    let mut machine = toml.machine.clone();
    let (suspended, origin) = (folder.file(SUSPENDED), folder.file(ORIGIN));
    if suspended.is_dir() && !origin.exists() {
        // What is damaged is told when all of it is read.
        let _ = folder.as_stored(&mut machine);
    }
    let shown = match berth_daemon::folder::read_bounded(&folder.file(TEMPORARY), TEMPORARY_MAX) {
        Ok(text) => serde_json::from_str(&text)?,
        Err(_) => Temporary::default(),
    };
    let plan = RunPlan::kept(&machine, name, folder.path(), root, console, &shown, !goes_on)?;
    let mut parts = devices(&plan);
    parts.mac = Some(Mac(hardware_address(toml.id)));
    parts.balloon = true;
    // What needs the host's network is made before it is left.
    parts.connect()?;
    // What is in another machine's folder, too.
    let handed = origin.exists().then(|| take(folder)).transpose()?;
    let ahead = handed.is_none().then(|| Ahead::open(&suspended)).flatten();
    confine::confine(folder, root, &plan);
    // Before any thread exists, so that all of them leave the signals to the watcher.
    let over: Arc<OnceLock<Arc<Ending>>> = Arc::default();
    let ending = Arc::clone(&over);
    let asked = Arc::new(AtomicBool::new(false));
    let told = Arc::clone(&asked);
    SignalWatch::start(move |_| {
        told.store(true, Ordering::SeqCst);
        if let Some(ending) = ending.get() {
            ending.end(Outcome::Stopped);
        }
    })?;
    let ends = HostEnds::default();
    // Until its guest knows that it is another one.
    let held = goes_on && plan.net == NetPlan::Handed && folder.file(IDENTITY).exists();
    ends.net_held.store(held, Ordering::Release);
    let told = Told::new(&plan)?;
    let hub = Hub::start(near, folder)?;
    let mut config = config(&plan, &told);
    let mut origin_process = None;
    if let Some((handed, stream)) = handed {
        origin_process = Some(stream);
        config.resume = Some(Resume::Handed(Arc::new(handed)));
        config.renew_generation = true;
    } else if suspended.is_dir() {
        config.renew_generation = suspended.join(RENEW).exists();
        config.resume = Some(Resume::Stored(suspended.clone()));
    }
    let machine = Machine::start_with(&config, Some(parts.into_attach(&ends)))?;
    // From here on it is not what would go on.
    match config.resume {
        Some(Resume::Stored(_)) => {
            let aside = folder.file(RESUMED);
            // Of a process that was killed before it was removed.
            let _ = std::fs::remove_dir_all(&aside);
            std::fs::rename(&suspended, &aside)?;
        }
        Some(Resume::Handed(_)) => std::fs::remove_file(&origin)?,
        None => {}
    }
    if let Some(ahead) = ahead {
        ahead.begin(machine.storer());
    }
    let teller = origin_process.map(|stream| Teller::start(machine.storer(), stream));
    // Set once.
    let _ = over.set(machine.ending());
    if asked.load(Ordering::SeqCst) {
        machine.ending().end(Outcome::Stopped);
    }
    let status = Status {
        state: MachineState::Running,
        pid: std::process::id(),
        started: Timestamp::now(),
        accel: machine.accel().to_string(),
        cpus: plan.cpus,
        memory_bytes: plan.memory_bytes,
        net: toml.machine.net.clone(),
        ports: toml.machine.ports.clone(),
    };
    let kept = Kept {
        folder,
        toml,
        name,
        mac: Mac(hardware_address(toml.id)),
        is_copy: config.renew_generation,
    };
    Control::start(kept, &machine, ends, Arc::clone(&hub), status.clone())?;
    greet(&Greeting::Started(status));
    Ok(Begun { machine, plan, told, hub, teller })
}

/// Takes what the process of another machine keeps for this one, which is a clone of it.
fn take(folder: &Folder) -> Result<(Handed, UnixStream), Failure> {
    let text = berth_daemon::folder::read_bounded(&folder.file(ORIGIN), ORIGIN_MAX)?;
    let origin: Origin = serde_json::from_str(&text)?;
    let taken = (|| -> Result<_, Failure> {
        let stream = connect(&Folder::at(origin.folder))?;
        stream.set_read_timeout(Some(TAKE_TIME))?;
        let mut line = serde_json::to_vec(&Request::Take { kept: origin.kept })?;
        line.push(b'\n');
        (&stream).write_all(&line)?;
        match serde_json::from_slice(&berth_daemon::line::read(&stream)?)? {
            Answer::Done => Ok((Handed::receive(&stream)?, stream)),
            Answer::Refused(why) => Err(why.into()),
            other => Err(format!("a strange answer: {other:?}").into()),
        }
    })();
    taken.map_err(|error| {
        let why = "it is a clone that was never begun, and the machine that it is a clone of does not \
                   keep its memory any more";
        format!("{why} ({error}); `berth vm rm` removes it").into()
    })
}

/// Connects to the process of a machine. Its path may be longer than that of a socket can be.
fn connect(folder: &Folder) -> io::Result<UnixStream> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let held = rustix::fs::open(folder.path(), flags, Mode::empty())?;
    UnixStream::connect(socket(&Folder::at(format!("/proc/self/fd/{}", held.as_raw_fd()))))
}

impl Run {
    /// Waits for the end of the guest and notes it.
    fn finish(self) -> ExitCode {
        let Begun { machine, plan, told, hub, teller } = self.begun;
        let outcome = machine.wait();
        if let Some(teller) = teller {
            teller.tell();
        }
        // With it goes the machine's end of the console.
        drop(plan);
        hub.finish();
        let in_order = matches!(
            outcome,
            Outcome::PoweredOff | Outcome::Stopped | Outcome::Suspended | Outcome::DebugExit(_)
        );
        let exit = Exit {
            time: Timestamp::now(),
            in_order,
            reason: outcome.to_string(),
            status: outcome.exit_status(),
        };
        let noted = self.folder.set_last_exit(Some(&exit));
        if let Err(error) = noted {
            eprintln!("berth: the end of the machine cannot be noted: {error}");
        }
        if let Err(error) = told.finish() {
            eprintln!("berth: {error}");
        }
        eprintln!("berth: {outcome}");
        ExitCode::Success
    }
}

/// Where the machine's process listens.
fn socket(folder: &Folder) -> PathBuf {
    folder.file(berth_api::vmm::SOCKET)
}
