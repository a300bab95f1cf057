//! A command in the guest, through the agent: its streams become ours.
//!
//! Three threads: this one moves output, one moves standard input (and is left behind, blocked in
//! `read`, when the command ends first), one waits for signals.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use berth_api::agent::client::{Client, ClientError, Event, Input, Session};
use berth_api::agent::message::{Exec, Exit, Identify, Reason, Shutdown};
use berth_vmm::console::EscapeFilter;
use rustix::termios::Termios;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGWINCH};
use signal_hook::iterator::Signals;

use crate::exit::ExitCode;
use crate::terminal::{self, RawTerminal};

/// How long a guest may take from its start until its agent answers.
pub const AGENT_WAIT: Duration = Duration::from_secs(120);
const DIAL_POLL: Duration = Duration::from_millis(10);
/// How late a guest's clock may be.
const CLOCK_ERROR: Duration = Duration::from_millis(3);
/// How often it is set on a host that is busy.
const SET_TIME_TRIES: usize = 50;
const STDIN_CHUNK_BYTES: usize = 16 << 10;

/// Why the command did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The guest does not answer.
    #[error("the guest's agent did not answer within {} seconds", patience.as_secs())]
    NoAnswer {
        /// How long it was waited for.
        patience: Duration,
        /// The last reason.
        source: ClientError,
    },
    /// The machine ended first.
    #[error(
        "the guest ended before its agent answered; it may need more --memory, and --append loglevel=7 with --serial file=PATH shows its kernel's messages"
    )]
    GuestEnded,
    /// The guest refused, or the connection broke.
    #[error(transparent)]
    Agent(#[from] ClientError),
    /// Our own output.
    #[error("writing the command's output failed")]
    Output(#[source] io::Error),
    /// Our terminal.
    #[error("setting up the terminal failed")]
    Terminal(#[source] io::Error),
    /// Signals.
    #[error("waiting for signals failed")]
    Signals(#[source] io::Error),
    /// Random numbers for the guest.
    #[error("there are no random numbers")]
    Random(#[source] io::Error),
}

impl CommandError {
    /// Whether the guest said no before anything ran.
    #[must_use]
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Agent(ClientError::Refused(_)))
    }

    /// As shells have it: 127 for a command that does not exist, 126 for one that cannot run.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        let Self::Agent(ClientError::Refused(refusal)) = self else { return ExitCode::Failure };
        match refusal.reason {
            Reason::NotFound => ExitCode::NotFound,
            Reason::NotExecutable => ExitCode::NotExecutable,
            _ => ExitCode::Failure,
        }
    }
}

/// A way to the agent of a guest that may still be starting.
pub trait Dial {
    /// Connects to the agent's port.
    ///
    /// # Errors
    /// Any, while the guest is not ready; it is tried again.
    fn dial(&mut self) -> io::Result<UnixStream>;

    /// Whether the guest still runs.
    fn is_alive(&mut self) -> bool;
}

/// Runs the command with this process's own streams; returns the status to exit with.
///
/// # Errors
/// [`CommandError`].
pub fn run(dial: &mut dyn Dial, exec: &Exec) -> Result<ExitCode, CommandError> {
    run_in(connect(dial, AGENT_WAIT)?, exec)
}

/// The same as the first command of a guest, whose clock is set before.
///
/// # Errors
/// [`CommandError`].
pub fn run_first(dial: &mut dyn Dial, exec: &Exec) -> Result<ExitCode, CommandError> {
    let mut client = connect(dial, AGENT_WAIT)?;
    set_time(&mut client)?;
    run_in(client, exec)
}

/// Sets the clock of a guest as soon as its agent answers, for which it has so long, and tells it who
/// it is if it is a clone. Linux takes the time from the real-time clock, which counts seconds.
///
/// # Errors
/// [`CommandError`].
pub fn begin(
    dial: &mut dyn Dial,
    patience: Duration,
    identity: Option<&Identify>,
    is_copy: bool,
) -> Result<(), CommandError> {
    let mut client = connect(dial, patience)?;
    if is_copy {
        // First: what is random from here on is not the other one's.
        reseed(&mut client)?;
    }
    set_time(&mut client)?;
    match identity {
        Some(identity) => Ok(client.identify(identity)?),
        None => Ok(()),
    }
}

/// Lets a guest that has booted do what its clones will have to do first, to no effect.
///
/// # Errors
/// [`CommandError`].
pub fn rehearse(dial: &mut dyn Dial, patience: Duration) -> Result<(), CommandError> {
    let mut client = connect(dial, patience)?;
    reseed(&mut client)?;
    Ok(client.rehearse()?)
}

fn reseed(client: &mut Client<UnixStream, UnixStream>) -> Result<(), CommandError> {
    let mut seed = [0; 64];
    berth_vmm::virtio::rng::fill_random(&mut seed).map_err(CommandError::Random)?;
    Ok(client.reseed(&seed)?)
}

/// Sets the clock until it was done fast enough: it is late by the time the request takes.
fn set_time(client: &mut Client<UnixStream, UnixStream>) -> Result<(), ClientError> {
    // The first answer of an agent takes longer.
    client.ping()?;
    for _ in 0..SET_TIME_TRIES {
        let began = Instant::now();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        client.set_time(u64::try_from(now.as_nanos()).unwrap_or(u64::MAX))?;
        if began.elapsed() <= CLOCK_ERROR {
            break;
        }
    }
    Ok(())
}

fn run_in(client: Client<UnixStream, UnixStream>, exec: &Exec) -> Result<ExitCode, CommandError> {
    let session = client.exec(exec)?;
    let raw = match exec.tty {
        Some(_) => Some(RawTerminal::enter().map_err(CommandError::Terminal)?),
        None => None,
    };
    watch_signals(&session, raw.as_ref())?;
    let keys = Keys {
        stdin: io::stdin(),
        before: raw.as_ref().map(RawTerminal::before),
        filter: EscapeFilter::default(),
    };
    let exit = pump(session, keys, &mut io::stdout(), &mut io::stderr());
    drop(raw);
    exit.map(exit_code)
}

/// Asks the guest to power off, which may take so long until its agent answers; it does so after this
/// returns.
///
/// # Errors
/// [`CommandError`] when the agent cannot be asked.
pub fn shut_down(dial: &mut dyn Dial, patience: Duration) -> Result<(), CommandError> {
    Ok(connect(dial, patience)?.shutdown(Shutdown::PowerOff)?)
}

/// Lets the guest use only so many of its processors; its agent has so long to answer.
///
/// # Errors
/// [`CommandError`] when it does not.
pub fn use_cpus(dial: &mut dyn Dial, patience: Duration, count: u32) -> Result<u32, CommandError> {
    Ok(connect(dial, patience)?.use_cpus(count)?)
}

/// Connects as soon as the agent listens, for which it has so long.
///
/// # Errors
/// [`CommandError`].
pub fn connect(
    dial: &mut dyn Dial,
    patience: Duration,
) -> Result<Client<UnixStream, UnixStream>, CommandError> {
    let began = Instant::now();
    loop {
        let error = match try_connect(dial) {
            Ok(client) => return Ok(client),
            Err(error @ ClientError::Version(_)) => return Err(error.into()),
            Err(error) => error,
        };
        if !dial.is_alive() {
            return Err(CommandError::GuestEnded);
        }
        if began.elapsed() > patience {
            return Err(CommandError::NoAnswer { patience, source: error });
        }
        thread::sleep(DIAL_POLL);
    }
}

fn try_connect(dial: &mut dyn Dial) -> Result<Client<UnixStream, UnixStream>, ClientError> {
    use berth_api::agent::frame::FrameError;
    let stream = dial.dial().map_err(FrameError::Stream)?;
    let writer = stream.try_clone().map_err(FrameError::Stream)?;
    Client::connect(stream, writer, concat!("berth ", env!("CARGO_PKG_VERSION")))
}

fn pump<R: Read, W: Write + Send + 'static>(
    mut session: Session<R, W>,
    stdin: impl Read + Send + 'static,
    stdout: &mut impl Write,
    stderr: &mut impl Write,
) -> Result<Exit, CommandError> {
    let input = session.input();
    thread::spawn(move || feed(stdin, &input));
    let write = |bytes: &[u8], to: &mut dyn Write| {
        to.write_all(bytes).and_then(|()| to.flush()).map_err(CommandError::Output)
    };
    loop {
        match session.next_event()? {
            Event::Stdout(bytes) => write(&bytes, stdout)?,
            Event::Stderr(bytes) => write(&bytes, stderr)?,
            Event::Exit(exit) => return Ok(exit),
        }
    }
}

/// Status after the escape, as after SIGINT.
const ESCAPED: i32 = 128 + SIGINT;

/// Ends the program, and with it the machine, which is part of this process.
fn end(before: Option<&Termios>, status: i32) -> ! {
    if let Some(before) = before {
        terminal::restore(before);
    }
    std::process::exit(status)
}

/// Standard input; on a terminal that is raw, Ctrl-] then `.` ends the machine.
struct Keys<R> {
    stdin: R,
    before: Option<Termios>,
    filter: EscapeFilter,
}

impl<R: Read> Read for Keys<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(before) = &self.before else { return self.stdin.read(buffer) };
        loop {
            // A kept Ctrl-] may come on top of what is read.
            let room = buffer.len().saturating_sub(1);
            let count = self.stdin.read(&mut buffer[..room])?;
            let (data, ended) = self.filter.pass(&buffer[..count]);
            if ended {
                end(Some(before), ESCAPED);
            }
            if count == 0 || !data.is_empty() {
                buffer[..data.len()].copy_from_slice(&data);
                return Ok(data.len());
            }
        }
    }
}

/// Moves standard input until it or the session ends; either is for the other thread to report.
fn feed<W: Write>(mut stdin: impl Read, input: &Arc<Input<W>>) {
    let mut buffer = vec![0u8; STDIN_CHUNK_BYTES];
    loop {
        match stdin.read(&mut buffer) {
            Ok(0) => break,
            Ok(read) => match input.stdin(buffer.get(..read).unwrap_or_default()) {
                Ok(true) => {}
                Ok(false) | Err(_) => return,
            },
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    let _ = input.stdin_eof();
}

fn watch_signals(
    session: &Session<UnixStream, UnixStream>,
    raw: Option<&RawTerminal>,
) -> Result<(), CommandError> {
    let mut signals =
        Signals::new([SIGWINCH, SIGINT, SIGTERM, SIGHUP]).map_err(CommandError::Signals)?;
    let (input, before) = (session.input(), raw.map(RawTerminal::before));
    thread::spawn(move || {
        for signal in &mut signals {
            if signal != SIGWINCH {
                end(before.as_ref(), 128 + signal);
            }
            if let (Some(size), Some(_)) = (terminal::size(), &before) {
                let _ = input.resize(size);
            }
        }
    });
    Ok(())
}

fn exit_code(exit: Exit) -> ExitCode {
    match exit {
        Exit::Status(0) => ExitCode::Success,
        Exit::Status(status) => ExitCode::Guest(u8::try_from(status & 0xff).unwrap_or(u8::MAX)),
        Exit::Signal(signal) => {
            ExitCode::Guest(u8::try_from(128 + (signal & 0x7f)).unwrap_or(u8::MAX))
        }
    }
}

#[cfg(test)]
mod tests {
    use berth_api::agent::frame::Frame;
    use berth_api::agent::limits::PROTOCOL_VERSION;
    use berth_api::agent::message::{Hello, ToAgent, ToHost};

    use super::*;

    /// Refuses a few times, then connects to a thread that plays an agent.
    struct Guest {
        refusals: u32,
        alive: bool,
    }

    impl Dial for Guest {
        fn dial(&mut self) -> io::Result<UnixStream> {
            if self.refusals > 0 {
                self.refusals -= 1;
                return Err(io::ErrorKind::ConnectionRefused.into());
            }
            let (ours, theirs) = UnixStream::pair()?;
            thread::spawn(move || play_agent(theirs));
            Ok(ours)
        }

        fn is_alive(&mut self) -> bool {
            self.alive
        }
    }

    fn send(stream: &mut UnixStream, message: &ToHost) {
        message.to_frame().unwrap().write_to(stream).unwrap();
    }

    /// Answers a hello, then echoes standard input to both outputs and exits with its length.
    fn play_agent(mut stream: UnixStream) {
        let mut echoed = 0;
        while let Some(frame) = Frame::read_from(&mut stream).unwrap() {
            match ToAgent::from_frame(frame).unwrap() {
                ToAgent::Hello(_) => {
                    let hello = Hello { version: PROTOCOL_VERSION, software: "fake".into() };
                    send(&mut stream, &ToHost::Hello(hello));
                }
                ToAgent::Exec(_) => send(&mut stream, &ToHost::Started(2)),
                ToAgent::Stdin(bytes) => {
                    echoed += bytes.len();
                    send(&mut stream, &ToHost::StdinCredit(bytes.len() as u32));
                    send(&mut stream, &ToHost::Stderr(b"e".to_vec()));
                    send(&mut stream, &ToHost::Stdout(bytes));
                }
                ToAgent::StdinEof => {
                    send(&mut stream, &ToHost::Exit(Exit::Status(echoed as i32)));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn streams_and_status_pass_through_once_the_agent_listens() {
        let mut guest = Guest { refusals: 3, alive: true };
        let session = connect(&mut guest, AGENT_WAIT).unwrap().exec(&Exec::default()).unwrap();
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let sent: Vec<u8> = (0..700_000u32).map(|i| (i % 251) as u8).collect();
        let exit = pump(session, io::Cursor::new(sent.clone()), &mut out, &mut err).unwrap();
        assert!(out == sent && err.len() > 1);
        assert_eq!(exit, Exit::Status(700_000));
        assert_eq!(exit_code(Exit::Status(3)), ExitCode::Guest(3));
        assert_eq!(exit_code(Exit::Signal(9)), ExitCode::Guest(137));
    }

    #[test]
    fn a_guest_that_ends_is_not_waited_for() {
        let mut guest = Guest { refusals: 1000, alive: false };
        assert!(matches!(connect(&mut guest, AGENT_WAIT), Err(CommandError::GuestEnded)));
    }
}
