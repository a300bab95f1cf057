//! Starts a process of a session: user, environment, directory, pipes or a terminal.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use berth_api::agent::copy;
use berth_api::agent::message::{Exec, Reason, Refusal, TerminalSize};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::environment;
use crate::reaper::{Child, Reaper};
use crate::sys;
use crate::users::{self, User};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// A started process and the near ends of its streams.
pub struct Started {
    /// The process.
    pub child: Child,
    /// Writes to its standard input; `None` once ended.
    pub stdin: Option<OwnedFd>,
    /// Reads its standard output, or its terminal (then the same as `stdin`).
    pub stdout: Option<OwnedFd>,
    /// Reads its standard error; none with a terminal.
    pub stderr: Option<OwnedFd>,
    /// Whether the streams are a terminal.
    pub tty: bool,
}

/// Starts what the host asked for.
pub fn start(exec: &Exec, reaper: &Reaper) -> Result<Started, Refusal> {
    let program = exec.argv.first().ok_or_else(|| Refusal {
        reason: Reason::Protocol,
        message: "no program was named".into(),
    })?;
    let wanted = exec.user.as_deref().unwrap_or("root");
    let user = users::find(wanted).ok_or_else(|| Refusal {
        reason: Reason::NotFound,
        message: format!("the guest has no user {wanted}"),
    })?;
    let mut command = command_for(exec, program, &user)?;
    let failed = |error: io::Error| refusal_of(program, &error);
    match exec.tty {
        Some(size) => start_on_terminal(&mut command, size, reaper).map_err(failed),
        None => start_on_pipes(&mut command, reaper).map_err(failed),
    }
}

/// The program with the user's environment; not started yet. `argv[0]` counts as the program.
fn command_for(exec: &Exec, program: &str, user: &User) -> Result<Command, Refusal> {
    // The magic link leads to the program also when its file has no name any more.
    let file = if program == copy::PROGRAM { "/proc/self/exe" } else { program };
    let mut command = Command::new(file);
    command.args(exec.argv.iter().skip(1)).env_clear();
    set_user_environment(&mut command, user);
    if exec.tty.is_some() {
        command.env("TERM", "xterm-256color");
    }
    for (name, value) in &exec.env {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(Refusal {
                reason: Reason::Protocol,
                message: format!("`{name}` is no name for an environment variable"),
            });
        }
        command.env(name, value);
    }
    let directory = match &exec.cwd {
        Some(directory) if Path::new(directory).is_dir() => directory.as_str(),
        Some(directory) => {
            return Err(Refusal {
                reason: Reason::NotFound,
                message: format!("the guest has no directory {directory}"),
            });
        }
        None if Path::new(&user.home).is_dir() => user.home.as_str(),
        None => "/",
    };
    command.current_dir(directory);
    become_user(&mut command, user);
    Ok(command)
}

/// Sets the variables every login has, and those that the host set for all.
pub fn set_user_environment(command: &mut Command, user: &User) {
    command
        .env("PATH", PATH)
        .env("HOME", &user.home)
        .env("USER", &user.name)
        .env("LOGNAME", &user.name)
        .env("SHELL", &user.shell)
        .envs(environment::variables().iter().map(|(name, value)| (name, value)));
}

/// Makes the started program the leader of a session whose terminal is its standard input.
pub fn take_terminal(command: &mut Command) {
    // SAFETY: between fork and exec only two system calls are made; nothing is allocated or locked.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
            Ok(())
        });
    }
}

fn become_user(command: &mut Command, user: &User) {
    // SAFETY: between fork and exec only system calls are made.
    unsafe {
        command.pre_exec(|| {
            sys::default_signals();
            Ok(())
        });
    }
    // What serves tests on the host without root stays what it is.
    if rustix::process::getuid().as_raw() == user.uid && user.uid != 0 {
        return;
    }
    if !rustix::process::getuid().is_root() {
        return;
    }
    let groups: Vec<_> = user.groups.iter().copied().map(rustix::process::Gid::from_raw).collect();
    let (uid, gid) = (user.uid, user.gid);
    // SAFETY: between fork and exec only system calls are made; the groups were allocated before.
    unsafe {
        command.pre_exec(move || {
            rustix::thread::set_thread_groups(&groups)?;
            rustix::thread::set_thread_gid(rustix::process::Gid::from_raw(gid))?;
            rustix::thread::set_thread_uid(rustix::process::Uid::from_raw(uid))?;
            Ok(())
        });
    }
}

fn start_on_pipes(command: &mut Command, reaper: &Reaper) -> io::Result<Started> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // SAFETY: between fork and exec one system call is made; nothing is allocated or locked.
    unsafe {
        command.pre_exec(|| {
            rustix::process::setsid()?;
            Ok(())
        });
    }
    let (child, process) = reaper.spawn(command)?;
    Ok(Started {
        child,
        stdin: process.stdin.map(OwnedFd::from),
        stdout: process.stdout.map(OwnedFd::from),
        stderr: process.stderr.map(OwnedFd::from),
        tty: false,
    })
}

fn start_on_terminal(
    command: &mut Command,
    size: TerminalSize,
    reaper: &Reaper,
) -> io::Result<Started> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let near = openpt(flags)?;
    unlockpt(&near)?;
    resize(&near, size)?;
    let far = ioctl_tiocgptpeer(&near, flags)?;
    command.stdin(far.try_clone()?).stdout(far.try_clone()?).stderr(far);
    take_terminal(command);
    let (child, _process) = reaper.spawn(command)?;
    // The far end must not stay open here, or the terminal never ends.
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let stdin = near.try_clone()?;
    Ok(Started { child, stdin: Some(stdin), stdout: Some(near), stderr: None, tty: true })
}

/// Gives a terminal its size.
pub fn resize(terminal: &OwnedFd, size: TerminalSize) -> io::Result<()> {
    let size = Winsize { ws_row: size.rows, ws_col: size.cols, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(tcsetwinsize(terminal, size)?)
}

fn refusal_of(program: &str, error: &io::Error) -> Refusal {
    let reason = match error.kind() {
        io::ErrorKind::NotFound => Reason::NotFound,
        io::ErrorKind::PermissionDenied => Reason::NotExecutable,
        _ if error.raw_os_error() == Some(libc::ENOEXEC) => Reason::NotExecutable,
        io::ErrorKind::InvalidInput => Reason::Protocol,
        _ => Reason::Resources,
    };
    Refusal { reason, message: format!("cannot run {program} in the guest: {error}") }
}
