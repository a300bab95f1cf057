//! A login shell on the console.

use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cmdline::CommandLine;
use crate::reaper::Reaper;
use crate::spawn;
use crate::users;

/// Why there is no shell.
#[derive(Debug, thiserror::Error)]
pub enum ShellError {
    /// The console cannot be opened.
    #[error("opening the console {path} failed")]
    Console {
        /// Its device.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The root file system has none.
    #[error("the root file system has neither /bin/bash nor /bin/sh")]
    NoShell,
    /// It does not start.
    #[error("starting {path} failed")]
    Start {
        /// The shell.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Runs the shell until it exits.
pub fn run(line: &CommandLine, reaper: &Reaper) -> Result<(), ShellError> {
    let path = console();
    let failed = |source| ShellError::Console { path: path.clone(), source };
    let terminal = File::options().read(true).write(true).open(&path).map_err(failed)?;
    if let Some(size) = line.size {
        let terminal = OwnedFd::from(terminal.try_clone().map_err(failed)?);
        spawn::resize(&terminal, size).map_err(failed)?;
    }
    let user = users::find("root").ok_or(ShellError::NoShell)?;
    let shells = [user.shell.as_str(), "/bin/bash", "/bin/sh"];
    let shell = shells.iter().map(Path::new).find(|shell| shell.exists());
    let shell = shell.ok_or(ShellError::NoShell)?;
    let name = shell.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let mut command = Command::new(shell);
    // A leading dash makes any shell a login shell.
    command.arg0(format!("-{name}")).env_clear();
    spawn::set_user_environment(&mut command, &user);
    command.env("TERM", line.term.as_deref().unwrap_or("vt220"));
    command.current_dir(if Path::new(&user.home).is_dir() { user.home.as_str() } else { "/" });
    command
        .stdin(terminal.try_clone().map_err(failed)?)
        .stdout(terminal.try_clone().map_err(failed)?)
        .stderr(terminal);
    spawn::take_terminal(&mut command);
    let started = reaper.spawn(&mut command);
    let (child, _) =
        started.map_err(|source| ShellError::Start { path: shell.to_owned(), source })?;
    child.wait();
    Ok(())
}

/// The device behind `/dev/console`, which itself cannot be a controlling terminal.
fn console() -> PathBuf {
    let active = fs::read_to_string("/sys/class/tty/console/active").unwrap_or_default();
    let name = active.split_ascii_whitespace().last().unwrap_or("ttyS0");
    Path::new("/dev").join(name)
}
