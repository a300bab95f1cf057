//! The process of a machine, seen from the daemon: it is started here, and spoken with on the socket
//! in the machine's folder.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use berth_api::v1::machine::{Accel, MachineConfig};
use berth_api::vmm::{
    Answer, Begin, Frozen, Greeting, LINE_MAX, ORIGIN, Origin, Request, SOCKET, Status,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::pipe::Receiver;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::cgroup::{Group, Limits};
use crate::folder::{Folder, read_bounded};
use crate::line;
use crate::zygote::Zygote;

/// How long the process of a machine may take for an answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);
/// How long it may take until the guest runs; the initramfs may have to be made first.
const START_TIME: Duration = Duration::from_secs(120);
/// What the guest printed, in its folder.
pub const CONSOLE: &str = "console.log";
/// The log of the process, in the folder.
pub const LOG: &str = "vmm.log";
/// How much of the log is shown when the process says nothing itself.
const LOG_TAIL: u64 = 2048;

/// What is started for each machine.
#[derive(Clone, Debug)]
pub struct Program {
    /// Its file.
    pub path: PathBuf,
    /// How fast the host's time-stamp counter counts, in Hz, as soon as that is known. Machines that
    /// are told start 20 ms sooner.
    pub tsc_hz: Arc<OnceLock<u64>>,
    /// What becomes the processes of running clones.
    pub zygote: Arc<Zygote>,
}

/// A process that was started.
enum Started {
    /// Ours to wait for.
    Child(Child),
    /// Another one's.
    Copy(OwnedFd),
}

impl Started {
    fn kill(&mut self) {
        // It has ended, if that fails.
        match self {
            Self::Child(child) => drop(child.start_kill()),
            Self::Copy(process) => drop(pidfd_send_signal(process, Signal::KILL)),
        }
    }

    /// Another descriptor of one that is another one's to wait for.
    fn watch(&self) -> Option<OwnedFd> {
        match self {
            Self::Child(_) => None,
            Self::Copy(process) => process.try_clone().ok(),
        }
    }

    async fn wait(self) {
        if let Self::Child(mut child) = self {
            let _ = child.wait().await;
        }
    }
}

/// Why a process cannot be spoken with.
#[derive(Debug, thiserror::Error)]
pub enum VmmError {
    /// Nobody listens: there is no process.
    #[error("the machine's process does not answer")]
    Absent(#[source] io::Error),
    /// It took too long.
    #[error("the machine's process did not answer within {} s", .0.as_secs())]
    Late(Duration),
    /// It said something that is not an answer.
    #[error("the machine's process answered what is not understood: {0}")]
    Strange(String),
    /// It did not do what was asked.
    #[error("{0}")]
    Refused(String),
    /// It could not be started.
    #[error("{0}")]
    NotStarted(String),
}

/// Where the process of a machine listens.
async fn connect(folder: &Folder) -> io::Result<UnixStream> {
    let direct = folder.file(SOCKET);
    // Longer paths do not fit into an address; through the directory they do.
    let (_held, path): (Option<OwnedFd>, PathBuf) = if direct.as_os_str().len() < 100 {
        (None, direct)
    } else {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let held = rustix::fs::open(folder.path(), flags, Mode::empty())?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", held.as_raw_fd());
        (Some(held), path.into())
    };
    UnixStream::connect(path).await
}

/// Reads what a process says when it has begun.
async fn greeting(from: &mut Receiver) -> Result<Greeting, VmmError> {
    let mut line = Vec::new();
    let mut from = BufReader::new(from.take(LINE_MAX));
    from.read_until(b'\n', &mut line).await.map_err(VmmError::Absent)?;
    if line.last() != Some(&b'\n') {
        return Err(VmmError::Absent(io::ErrorKind::UnexpectedEof.into()));
    }
    serde_json::from_slice(&line).map_err(|error| VmmError::Strange(error.to_string()))
}

/// Connects, asks and reads the answer; what comes after it is the caller's.
///
/// # Errors
/// [`VmmError`].
pub async fn open(folder: &Folder, request: &Request) -> Result<(UnixStream, Answer), VmmError> {
    open_within(folder, request, ANSWER_TIME).await
}

async fn open_within(
    folder: &Folder,
    request: &Request,
    patience: Duration,
) -> Result<(UnixStream, Answer), VmmError> {
    let work = async {
        let mut stream = connect(folder).await.map_err(VmmError::Absent)?;
        let mut line = serde_json::to_vec(request).unwrap_or_default();
        line.push(b'\n');
        stream.write_all(&line).await.map_err(VmmError::Absent)?;
        let line = line::read_soon(&stream).await.map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => VmmError::Strange(error.to_string()),
            _ => VmmError::Absent(error),
        })?;
        match serde_json::from_slice(&line) {
            Err(error) => Err(VmmError::Strange(error.to_string())),
            Ok(Answer::Refused(why)) => Err(VmmError::Refused(why)),
            Ok(answer) => Ok((stream, answer)),
        }
    };
    timeout(patience, work).await.map_err(|_| VmmError::Late(patience))?
}

/// Asks for something that is done when it is answered.
///
/// # Errors
/// [`VmmError`].
pub async fn ask(folder: &Folder, request: &Request) -> Result<(), VmmError> {
    open(folder, request).await.map(|_| ())
}

/// Asks for something that takes its time.
///
/// # Errors
/// [`VmmError`].
pub async fn ask_within(
    folder: &Folder,
    request: &Request,
    patience: Duration,
) -> Result<(), VmmError> {
    open_within(folder, request, patience).await.map(|_| ())
}

/// Freezes the disks of a machine, and stores it in a directory of its folder or keeps it in its
/// process, unless only the disks are wanted.
///
/// # Errors
/// [`VmmError`].
pub async fn freeze(
    folder: &Folder,
    into: Option<String>,
    keep: bool,
    patience: Duration,
) -> Result<Frozen, VmmError> {
    match open_within(folder, &Request::Snapshot { into, keep }, patience).await? {
        (_, Answer::Snapshot(frozen)) => Ok(frozen),
        (_, other) => Err(VmmError::Strange(format!("{other:?}"))),
    }
}

/// Whether a machine that was stored can go on here. Nothing is started but a process that looks.
///
/// # Errors
/// [`VmmError::NotStarted`] with the reason why not.
pub async fn check(
    program: &Program,
    config: &MachineConfig,
    state: &Path,
) -> Result<(), VmmError> {
    let not = |error: &dyn std::fmt::Display| VmmError::NotStarted(error.to_string());
    let accel = match config.accel {
        Accel::Auto => "auto",
        Accel::Translate => "translate",
        Accel::Kvm => "kvm",
    };
    let (cpus, bytes) = (config.cpus, config.memory.bytes());
    let mut command = Command::new(&program.path);
    command.args(["check-state", "--accel", accel, "--cpus", &cpus.to_string()]);
    command.args(["--memory", &bytes.to_string()]).arg(state);
    let ran = command.stdin(Stdio::null()).kill_on_drop(true).output();
    let ran = timeout(START_TIME, ran).await.map_err(|_| VmmError::Late(START_TIME))?;
    let ran = ran.map_err(|error| not(&error))?;
    let said = String::from_utf8_lossy(&ran.stderr);
    match ran.status.success() {
        true => Ok(()),
        false => Err(not(&said.trim().trim_start_matches("berth: "))),
    }
}

/// Finds the process of a machine; the stream ends when it ends.
///
/// # Errors
/// [`VmmError`]; [`VmmError::Absent`] when there is none.
pub async fn watch(folder: &Folder) -> Result<(UnixStream, Status), VmmError> {
    match open(folder, &Request::Watch).await? {
        (stream, Answer::Status(status)) => Ok((stream, status)),
        (_, other) => Err(VmmError::Strange(format!("{other:?}"))),
    }
}

/// Starts the process of a machine, and hands it the tap interface of its network card if that is in a
/// network; returns once the guest runs. It is put into its group: meanwhile, or before it does anything
/// if there are limits.
///
/// # Errors
/// [`VmmError::NotStarted`] with the reason it gave.
pub async fn start(
    program: &Program,
    root: &Path,
    folder: &Folder,
    tap: Option<OwnedFd>,
    group: Option<(Group, Limits)>,
) -> Result<(), VmmError> {
    let not = |what: &str, error: &dyn std::fmt::Display| {
        VmmError::NotStarted(format!("{what}: {error}"))
    };
    let path = folder.file(LOG);
    let log =
        crate::log::for_process(&path).map_err(|error| not(&path.display().to_string(), &error))?;
    let stdin = match tap {
        Some(tap) => tap,
        None => File::open("/dev/null").map_err(|error| not("/dev/null", &error))?.into(),
    };
    let (group, limits) = group.unzip();
    let joins = limits.is_some_and(Limits::any);
    let joined = group.iter().filter(|_| joins).flat_map(Group::directories);
    let begin = Begin {
        root: root.to_owned(),
        folder: folder.path().to_owned(),
        groups: joined.map(PathBuf::from).collect(),
        tsc_hz: program.tsc_hz.get().copied(),
    };
    let pipe = pipe_with(PipeFlags::CLOEXEC).map_err(Into::into);
    let (greetings, stdout) = pipe.map_err(|error: io::Error| not("a pipe", &error))?;
    let greetings = Receiver::from_owned_fd(greetings);
    let mut greetings = greetings.map_err(|error| not("a pipe", &error))?;
    let started = begin_process(program, begin, [stdin, stdout, log.into()], folder).await;
    let (pid, mut process) =
        started.map_err(|error| not(&program.path.display().to_string(), &error))?;
    // It is this process until it has been waited for.
    let join = pid.zip(group.filter(|_| !joins)).map(|(pid, group)| {
        let ended = process.watch();
        tokio::task::spawn_blocking(move || {
            // Others may have waited for it.
            if ended.is_some_and(|process| has_ended(&process)) {
                return;
            }
            if let Err(error) = group.join(pid) {
                tracing::warn!(pid, %error, "a machine's process is not in its control group");
            }
        })
    });
    let greeting = timeout(START_TIME, greeting(&mut greetings)).await;
    if !matches!(greeting, Ok(Ok(_))) {
        // Nobody would look after it.
        process.kill();
    }
    // The child is not ended with its handle; whoever waits for it here keeps it from becoming a
    // zombie.
    tokio::spawn(async move {
        if let Some(join) = join {
            // It does not panic.
            let _ = join.await;
        }
        process.wait().await;
    });
    match greeting {
        Ok(Ok(Greeting::Started(_))) => Ok(()),
        Ok(Ok(Greeting::Failed(why))) => Err(VmmError::NotStarted(why)),
        Ok(Err(VmmError::Absent(_))) => Err(VmmError::NotStarted(format!(
            "its process ended at once; {} ends with: {}",
            path.display(),
            tail(&path)
        ))),
        Ok(Err(error)) => Err(error),
        Err(_) => Err(VmmError::NotStarted(format!(
            "its guest did not run within {} s; see {}",
            START_TIME.as_secs(),
            path.display()
        ))),
    }
}

/// The folder of the machine whose memory this one goes on with.
fn origin_of(folder: &Folder) -> Option<PathBuf> {
    let text = read_bounded(&folder.file(ORIGIN), LINE_MAX).ok()?;
    serde_json::from_str::<Origin>(&text).ok().map(|origin| origin.folder)
}

/// Starts the process of a machine, with what is its standard input, output and error. One that goes on with
/// the memory of another one is a copy of a process that is there, if that can be; others, which have
/// nothing to do with each other, begin with addresses of their own.
async fn begin_process(
    program: &Program,
    begin: Begin,
    given: [OwnedFd; 3],
    folder: &Folder,
) -> io::Result<(Option<u32>, Started)> {
    let mut given = given;
    if let Some(of) = origin_of(folder) {
        let (zygote, asked) = (Arc::clone(&program.zygote), begin.clone());
        let copying = tokio::task::spawn_blocking(move || {
            let [stdin, stdout, stderr] = &given;
            let copied = zygote.copy(&asked, &of, [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()]);
            (copied, given)
        });
        let (copied, back) = copying.await.map_err(io::Error::other)?;
        match copied {
            Ok((pid, process)) => {
                return Ok((Some(pid.as_raw_pid().cast_unsigned()), Started::Copy(process)));
            }
            Err(error) => tracing::warn!(%error, "a clone gets a process of its own"),
        }
        given = back;
    }
    let [stdin, stdout, stderr] = given;
    let known = begin.tsc_hz.map(|hz| format!("--tsc-hz={hz}"));
    let groups = begin.groups.iter().flat_map(|group| [OsStr::new("--group"), group.as_os_str()]);
    let child = Command::new(&program.path)
        .arg("--root")
        .arg(&begin.root)
        .arg("vmm")
        .args(known)
        .args(groups)
        .arg(&begin.folder)
        // Its threads ask for little memory; a heap for each would take more than that.
        .env("MALLOC_ARENA_MAX", "2")
        .stdin(stdin)
        .stdout(stdout)
        .stderr(stderr)
        .spawn()?;
    Ok((child.id(), Started::Child(child)))
}

/// Whether a process has ended (pidfd_open(2): then its descriptor can be read).
fn has_ended(process: &OwnedFd) -> bool {
    let mut polled = [PollFd::new(process, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    poll(&mut polled, Some(&now)).is_ok_and(|count| count > 0)
}

/// The end of a log, as one line.
fn tail(path: &Path) -> String {
    match crate::log::tail(path, LOG_TAIL) {
        Ok(text) => match String::from_utf8_lossy(&text).lines().next_back() {
            Some(line) => line.chars().filter(|c| !c.is_control()).collect(),
            None => "nothing".into(),
        },
        Err(error) => error.to_string(),
    }
}
