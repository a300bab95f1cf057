//! `berth vm cp`: files and folders between this host and a guest, as tar streams through its agent.
//!
//! What comes from a guest is not trusted: [`berth_archive::unpack`] takes it apart.

use std::io::{self, BufWriter, IsTerminal, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread;

use berth_api::agent::client::{self, Event, Input, Session};
use berth_api::agent::copy::{EXTRACT, OWNERS, PACK, PROGRAM, UNPACK};
use berth_api::agent::limits::DATA_CHUNK_BYTES;
use berth_api::agent::message::{Exec, Exit, Reason};
use berth_api::v1::machine::is_name;
use berth_archive::error::ArchiveError;
use berth_archive::pack::pack;
use berth_archive::unpack::{self, Taken};

use crate::args::CopyArgs;
use crate::client::Client;
use crate::command::{self, AGENT_WAIT, CommandError};
use crate::exit::{CliError, ExitCode};
use crate::vm::{Kept, check_running};

/// Bytes of what a guest says about a copy.
const SAID_MAX: usize = 64 << 10;

/// Why nothing, or not all, was copied.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// This host.
    #[error(transparent)]
    Here(#[from] ArchiveError),
    /// The guest.
    #[error("{name}: {said}")]
    There {
        /// The machine.
        name: String,
        /// What it said.
        said: String,
    },
    /// The agent does not know how to.
    #[error(
        "the agent in {name} is too old for copies; `berth vm restart {name}` gives it a new one"
    )]
    Old {
        /// The machine.
        name: String,
    },
    /// The connection.
    #[error("the connection to the agent in {name} broke")]
    Broken {
        /// The machine.
        name: String,
        /// Why.
        source: client::ClientError,
    },
    /// Our own stream.
    #[error("moving the stream of files failed")]
    Stream(#[source] io::Error),
}

/// One end of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
enum End {
    /// A file of a guest, by its absolute path there.
    Guest { name: String, path: String },
    /// A file of this host.
    Host(PathBuf),
    /// Standard input or output.
    Stream,
}

impl End {
    /// `NAME:PATH`, unless it begins as a path of this host does.
    fn parse(word: &str) -> Self {
        if word == "-" {
            return Self::Stream;
        }
        match word.split_once(':') {
            Some((name, path)) if is_name(name) => {
                let slash = if path.starts_with('/') { "" } else { "/" };
                Self::Guest { name: name.to_owned(), path: format!("{slash}{path}") }
            }
            _ => Self::Host(word.into()),
        }
    }
}

/// `berth vm cp`.
///
/// # Errors
/// [`CliError`].
pub fn run(client: &Client, args: &CopyArgs) -> Result<ExitCode, CliError> {
    match (End::parse(&args.from), End::parse(&args.to)) {
        (End::Guest { .. }, End::Guest { .. }) => Err(CliError::Usage(
            "files are copied between this host and a guest; copy to this host first".into(),
        )),
        (End::Guest { name, path }, to) => {
            if to == End::Stream && io::stdout().is_terminal() {
                return Err(CliError::Usage("a tar stream is nothing for a terminal".into()));
            }
            let words = vec![PROGRAM.into(), PACK.into(), path];
            let session = open(client, &name, words)?;
            Ok(from_guest(session, name, &to, args.archive)?)
        }
        (from, End::Guest { name, path }) => {
            let mut words = vec![PROGRAM.into(), UNPACK.into()];
            words.extend(args.archive.then(|| OWNERS.to_owned()));
            words.extend((from == End::Stream).then(|| EXTRACT.to_owned()));
            words.push(path);
            if let End::Host(path) = &from {
                // Said before anything is asked of the guest.
                let there = std::fs::symlink_metadata(path);
                there.map_err(|source| CliError::File { path: path.clone(), source })?;
            }
            let session = open(client, &name, words)?;
            Ok(to_guest(session, name, from)?)
        }
        _ => Err(CliError::Usage(
            "one of the two must be in a guest, as NAME:PATH; `berth vm cp web:/etc/hosts .`"
                .into(),
        )),
    }
}

type Open = Session<UnixStream, UnixStream>;

fn open(client: &Client, name: &str, argv: Vec<String>) -> Result<Open, CliError> {
    check_running(client, name)?;
    let mut dial = Kept::new(client, name);
    let agent = command::connect(&mut dial, AGENT_WAIT).map_err(|error| dial.explain(error))?;
    agent.exec(&Exec { argv, ..Exec::default() }).map_err(|error| match error {
        client::ClientError::Refused(refusal) if refusal.reason == Reason::NotFound => {
            CopyError::Old { name: name.to_owned() }.into()
        }
        error => CliError::Command(CommandError::Agent(error)),
    })
}

/// What the guest says of a copy, within limits.
#[derive(Default)]
struct Said(Vec<u8>);

impl Said {
    fn push(&mut self, bytes: &[u8]) {
        let room = SAID_MAX.saturating_sub(self.0.len());
        self.0.extend(bytes.iter().take(room));
    }

    /// Prints it, or makes its last line the error.
    fn judge(self, name: &str, exit: Exit) -> Result<(), CopyError> {
        let text = String::from_utf8_lossy(&self.0);
        let clean = |line: &str| -> String { line.chars().filter(|c| !c.is_control()).collect() };
        let mut lines: Vec<String> = text.lines().map(clean).collect();
        let error = match exit {
            Exit::Status(0) => None,
            Exit::Status(status) => {
                Some(lines.pop().unwrap_or_else(|| format!("it failed with status {status}")))
            }
            Exit::Signal(signal) => Some(format!("it was ended by signal {signal}")),
        };
        for line in lines {
            // Nothing is left to do when even this cannot be written.
            let _ = writeln!(io::stderr(), "berth: {name}: {line}");
        }
        match error {
            Some(said) => Err(CopyError::There { name: name.to_owned(), said }),
            None => Ok(()),
        }
    }
}

/// The standard output of a process in a guest.
struct Output {
    session: Open,
    rest: io::Cursor<Vec<u8>>,
    said: Said,
    exit: Option<Exit>,
    broken: Option<client::ClientError>,
}

impl Read for Output {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let count = self.rest.read(buffer)?;
            if count > 0 || buffer.is_empty() || self.exit.is_some() {
                return Ok(count);
            }
            match self.session.next_event() {
                Ok(Event::Stdout(bytes)) => self.rest = io::Cursor::new(bytes),
                Ok(Event::Stderr(bytes)) => self.said.push(&bytes),
                Ok(Event::Exit(exit)) => self.exit = Some(exit),
                Err(error) => {
                    let text = error.to_string();
                    self.broken = Some(error);
                    return Err(io::Error::other(text));
                }
            }
        }
    }
}

fn from_guest(session: Open, name: String, to: &End, archive: bool) -> Result<ExitCode, CopyError> {
    let rest = io::Cursor::new(Vec::new());
    let mut from = Output { session, rest, said: Said::default(), exit: None, broken: None };
    let taken = Taken { owners: archive, set_id: archive };
    let copied = match to {
        End::Host(path) => unpack::copy(&mut from, path, taken).map_err(CopyError::Here),
        _ => io::copy(&mut from, &mut io::stdout()).map(drop).map_err(CopyError::Stream),
    };
    if copied.is_ok() {
        // What comes behind the end of the stream is nothing to us, but how the process ended is.
        let _ = io::copy(&mut (&mut from).take(SAID_MAX as u64), &mut io::sink());
    }
    match (from.broken, from.exit) {
        (Some(source), _) => Err(CopyError::Broken { name, source }),
        // The guest knows better why its stream ended early.
        (None, Some(exit)) => from.said.judge(&name, exit).and(copied),
        (None, None) => copied,
    }?;
    Ok(ExitCode::Success)
}

/// The standard input of a process in a guest.
struct Sink(Arc<Input<UnixStream>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.0.stdin(bytes) {
            Ok(true) => Ok(bytes.len()),
            Ok(false) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(error) => Err(io::Error::other(error)),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn to_guest(mut session: Open, name: String, from: End) -> Result<ExitCode, CopyError> {
    let input = session.input();
    let sender = thread::spawn(move || send(&input, from));
    let mut said = Said::default();
    let exit = loop {
        match session.next_event() {
            Ok(Event::Stdout(_)) => {}
            Ok(Event::Stderr(bytes)) => said.push(&bytes),
            Ok(Event::Exit(exit)) => break Ok(exit),
            Err(source) => break Err(CopyError::Broken { name: name.clone(), source }),
        }
    };
    // A guest that ended before its time says why; it may still be waited for at standard input.
    let failed = !matches!(exit, Ok(Exit::Status(0)));
    let sent = if failed && !sender.is_finished() { None } else { sender.join().ok() };
    match (exit, sent) {
        // What could not be read here is why the rest did not come.
        (_, Some(Err(error @ CopyError::Here(ArchiveError::File { .. })))) => Err(error),
        (exit, _) => said.judge(&name, exit?),
    }?;
    Ok(ExitCode::Success)
}

/// Sends it to its end; one that fails has none, and the session is given up.
fn send(input: &Arc<Input<UnixStream>>, from: End) -> Result<(), CopyError> {
    let mut to = BufWriter::with_capacity(DATA_CHUNK_BYTES, Sink(Arc::clone(input)));
    let sent = match from {
        End::Host(path) => pack(&mut to, &path, &mut |note| {
            // Nothing is left to do when even this cannot be written.
            let _ = writeln!(io::stderr(), "berth: {} {}", note.path.display(), note.what);
        })
        .map_err(CopyError::Here),
        _ => io::copy(&mut io::stdin(), &mut to).map(drop).map_err(CopyError::Stream),
    };
    let flushed = to.flush().map_err(CopyError::Stream);
    if sent.is_err() {
        // The guest would take what came for all of it.
        let _ = input.signal(signal_hook::consts::SIGKILL);
    }
    // It may have ended by itself.
    let _ = input.stdin_eof();
    sent.and(flushed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_told_apart() {
        let guest = |name: &str, path: &str| End::Guest { name: name.into(), path: path.into() };
        assert_eq!(End::parse("web:/etc/hosts"), guest("web", "/etc/hosts"));
        assert_eq!(End::parse("web:etc/."), guest("web", "/etc/."));
        assert_eq!(End::parse("web:a:b"), guest("web", "/a:b"));
        assert_eq!(End::parse("-"), End::Stream);
        for host in [".", "/a:b", "./a:b", "a", "../web:x", "a.b:c", ":x"] {
            assert_eq!(End::parse(host), End::Host(host.into()));
        }
    }
}
