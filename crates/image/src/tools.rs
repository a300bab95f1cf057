//! The programs that make an image: found, run, ended.
//!
//! What is started ends with us, however we end: the kernel ends the child, and where PID namespaces
//! can be made the child is the first process of one, so that its own children go with it. Otherwise
//! they would go on writing into a directory that the next bootstrap removes. [`Stop`] ends it before.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, geteuid, kill_process_group, waitid};

use crate::bootstrap::BootstrapError;

/// Lines of a failed program's output that an error shows.
const ERROR_LINES: usize = 8;
/// Whoever asks for an image may keep what it makes from others; what is in an image is for all users
/// of the guest.
const OPEN_UMASK: &str = "umask 022; exec \"$@\"";

/// Ends what is being made, from another thread.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<Mutex<Stopping>>);

#[derive(Debug, Default)]
struct Stopping {
    stopped: bool,
    /// The process group of the program that runs, which is there until it is waited for.
    group: Option<Pid>,
}

impl Stop {
    /// Ends the program that runs, and lets no other one start.
    pub fn stop(&self) {
        let mut stopping = self.lock();
        stopping.stopped = true;
        end(stopping.group);
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    fn lock(&self) -> MutexGuard<'_, Stopping> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on it ends this one.
    fn attach(&self, child: &Child) {
        let mut stopping = self.lock();
        stopping.group = Some(Pid::from_child(child));
        if stopping.stopped {
            end(stopping.group);
        }
    }

    fn detach(&self) {
        self.lock().group = None;
    }
}

fn end(group: Option<Pid>) {
    if let Some(group) = group {
        // It may have ended by itself.
        let _ = kill_process_group(group, Signal::KILL);
    }
}

/// A program that is to be run.
#[derive(Debug)]
pub(crate) struct Tool {
    name: &'static str,
    command: Command,
    input: Option<String>,
    hint: &'static str,
}

impl Tool {
    pub(crate) fn new(name: &'static str) -> Self {
        Self::behind(name, Command::new("sh"), &["-c", OPEN_UMASK, "sh"])
    }

    /// One that ends when we do, with all that it started if the kernel lets us see to it.
    pub(crate) fn bound(name: &'static str) -> Self {
        const NAMESPACE: [&str; 5] = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"];
        let [unshare, options @ ..] = NAMESPACE;
        let namespaces = geteuid().is_root()
            && found(unshare)
                .args(options)
                .arg("true")
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .status()
                .is_ok_and(|status| status.success());
        // mmdebstrap may ignore TERM while it waits, and then ends later, by itself.
        let (signal, inside) =
            if namespaces { ("KILL", NAMESPACE.as_slice()) } else { ("TERM", [].as_slice()) };
        let words = [&["--pdeathsig", signal], inside, &["sh", "-c", OPEN_UMASK, "sh"]].concat();
        Self::behind(name, found("setpriv"), &words)
    }

    fn behind(name: &'static str, mut command: Command, words: &[&str]) -> Self {
        command.args(words).arg(find_program(name).unwrap_or_else(|| name.into()));
        command.env("LC_ALL", "C.UTF-8");
        // What it tells its whole group is not for us.
        command.process_group(0);
        Self { name, command, input: None, hint: "" }
    }

    pub(crate) fn arg(&mut self, arg: impl AsRef<OsStr>) -> &mut Self {
        self.command.arg(arg);
        self
    }

    pub(crate) fn args(&mut self, args: impl IntoIterator<Item: AsRef<OsStr>>) -> &mut Self {
        self.command.args(args);
        self
    }

    pub(crate) fn env(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.command.env(name, value);
        self
    }

    /// What it reads.
    pub(crate) fn input(&mut self, text: String) -> &mut Self {
        self.input = Some(text);
        self
    }

    /// What to try when it fails.
    pub(crate) fn hint(&mut self, hint: &'static str) -> &mut Self {
        self.hint = hint;
        self
    }

    fn start(&mut self) -> Result<Child, BootstrapError> {
        let stdin = if self.input.is_some() { Stdio::piped() } else { Stdio::null() };
        self.command.stdin(stdin).stdout(Stdio::null()).stderr(Stdio::piped());
        self.command.spawn().map_err(|source| self.failed_start(source))
    }

    fn failed_start(&self, source: io::Error) -> BootstrapError {
        BootstrapError::Start { program: self.name.to_owned(), source }
    }

    /// Runs it; what it says goes line by line to `heard`, and its end into the error if it fails.
    pub(crate) fn run(&mut self, stop: &Stop, heard: &dyn Fn(&str)) -> Result<(), BootstrapError> {
        if stop.is_stopped() {
            return Err(BootstrapError::Stopped);
        }
        let mut child = self.start()?;
        stop.attach(&child);
        if let (Some(mut stdin), Some(input)) = (child.stdin.take(), &self.input) {
            // A program that ends without reading says why itself.
            let _ = stdin.write_all(input.as_bytes());
        }
        let last = listen(&mut child, heard);
        // Until it is waited for the number of its group is nobody else's.
        let ended = waitid(
            WaitId::Pid(Pid::from_child(&child)),
            WaitIdOptions::EXITED | WaitIdOptions::NOWAIT,
        );
        stop.detach();
        ended.map_err(|errno| self.failed_start(errno.into()))?;
        let status = child.wait().map_err(|source| self.failed_start(source))?;
        if stop.is_stopped() {
            return Err(BootstrapError::Stopped);
        }
        let last = last.map_err(|source| self.failed_start(source))?;
        if status.success() {
            return Ok(());
        }
        Err(BootstrapError::Tool {
            program: self.name.to_owned(),
            status: status.to_string(),
            output: Vec::from(last).join("\n"),
            hint: self.hint,
        })
    }
}

/// Its last lines, when all have come.
fn listen(child: &mut Child, heard: &dyn Fn(&str)) -> io::Result<VecDeque<String>> {
    let mut last = VecDeque::new();
    for line in child.stderr.take().into_iter().flat_map(|all| BufReader::new(all).split(b'\n')) {
        let line = String::from_utf8_lossy(&line?).trim_end().to_owned();
        heard(&line);
        if last.len() == ERROR_LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
    Ok(last)
}

/// A program that says something on its standard output.
pub(crate) fn found(name: &str) -> Command {
    Command::new(find_program(name).unwrap_or_else(|| name.into()))
}

/// All that making an image needs is installed.
pub(crate) fn require_tools() -> Result<(), BootstrapError> {
    for (program, package) in [
        ("mmdebstrap", "mmdebstrap"),
        ("mke2fs", "e2fsprogs"),
        ("dpkg-deb", "dpkg"),
        ("setpriv", "util-linux"),
        ("unshare", "util-linux"),
    ] {
        if find_program(program).is_none() {
            return Err(BootstrapError::NoTool { program, package });
        }
    }
    Ok(())
}

/// Finds a program in `PATH` or where only root's `PATH` looks.
fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/local/sbin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(more).map(|place| place.join(name)).find(|p| p.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    use std::fs;
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_failed_program_is_reported_with_its_last_words() {
        let mut tool = Tool::new("sh");
        tool.args(["-c", "for i in 1 2 3 4 5 6 7 8 9 10; do echo line $i >&2; done; exit 3"]);
        let error = tool.hint(" HINT").run(&Stop::default(), &|_| {}).unwrap_err().to_string();
        assert!(error.starts_with("sh failed (exit status: 3):\nline 3\n"), "{error}");
        assert!(error.ends_with("line 10 HINT"), "{error}");
    }

    #[test]
    fn what_programs_make_is_for_all() {
        for mut tool in [Tool::new("sh"), Tool::bound("sh")] {
            let said = Mutex::new(Vec::new());
            tool.args(["-c", "umask >&2; cat >&2"]).input("input".into());
            tool.run(&Stop::default(), &|line| said.lock().unwrap().push(line.to_owned())).unwrap();
            assert_eq!(said.into_inner().unwrap(), ["0022", "input"]);
        }
    }

    /// Writes on and on, and so does what it started.
    fn writer(mark: &Path) -> Tool {
        let mut tool = Tool::bound("sh");
        let script = "trap 'kill $!; exit' TERM; \
                      sh -c 'while :; do echo >> \"$1\"; sleep 0.02; done' sh \"$1\" & wait";
        tool.args(["-c", script, "sh"]).arg(mark);
        tool
    }

    fn wait_for(mark: &Path) {
        while !mark.exists() {
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn nobody_writes(mark: &Path) {
        thread::sleep(Duration::from_millis(300));
        let written = fs::metadata(mark).unwrap().size();
        thread::sleep(Duration::from_millis(300));
        assert_eq!(fs::metadata(mark).unwrap().size(), written);
    }

    #[test]
    fn a_bound_program_ends_with_its_children_when_we_do() {
        let directory = tempfile::tempdir().unwrap();
        let mark = directory.path().join("mark");
        let mut tool = writer(&mark);
        // The kernel takes the end of the thread that started it for ours.
        let started = thread::spawn(move || {
            let child = tool.start().unwrap();
            wait_for(&mark);
            (child, mark)
        });
        let (mut child, mark) = started.join().unwrap();
        child.wait().unwrap();
        nobody_writes(&mark);
    }

    #[test]
    fn a_program_is_stopped_with_its_children() {
        let directory = tempfile::tempdir().unwrap();
        let mark = directory.path().join("mark");
        let (stop, mut tool) = (Stop::default(), writer(&mark));
        let stopped = stop.clone();
        let runs = thread::spawn(move || (tool.run(&stopped, &|_| {}), tool));
        wait_for(&mark);
        stop.stop();
        let (result, mut tool) = runs.join().unwrap();
        assert!(matches!(result, Err(BootstrapError::Stopped)), "{result:?}");
        nobody_writes(&mark);
        assert!(matches!(tool.run(&stop, &|_| {}), Err(BootstrapError::Stopped)));
    }
}
