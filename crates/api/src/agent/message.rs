//! What the frames mean. Kinds below 0x80 go from the host to the agent, the others back.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::frame::{Frame, FrameError};

/// The first message of either side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`super::limits::PROTOCOL_VERSION`] of the sender.
    pub version: u32,
    /// Program and version of the sender, for people.
    pub software: String,
}

/// A terminal's size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub cols: u16,
}

/// A process to be started.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exec {
    /// Program and arguments; the program is looked up in `PATH` when it has no slash.
    pub argv: Vec<String>,
    /// Variables set on top of the agent's few defaults.
    #[serde(default)]
    pub env: Vec<(String, String)>,
    /// The directory to start in; the user's home when absent.
    #[serde(default)]
    pub cwd: Option<String>,
    /// Gives the process a terminal of this size; its output then comes as `Stdout` alone.
    #[serde(default)]
    pub tty: Option<TerminalSize>,
    /// A name or number in the guest's `/etc/passwd`; root when absent.
    #[serde(default)]
    pub user: Option<String>,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Exit {
    /// It returned this status.
    Status(i32),
    /// This signal ended it.
    Signal(i32),
}

/// What a shutdown leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shutdown {
    /// The machine is switched off.
    PowerOff,
    /// The machine starts again.
    Reboot,
}

/// Who a clone is: what it has from the machine it was made of is replaced by this.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identify {
    /// Its host name.
    pub hostname: String,
    /// Its machine id: 32 lower-case hexadecimal digits.
    pub machine_id: String,
    /// The hardware address of its first network card, if it has one.
    pub mac: [u8; 6],
    /// Whether that card gives up its address on the network before this is answered: it is that of another
    /// machine on the same network.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub leave_address: bool,
}

/// Why the agent did not do what was asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For programs.
    pub reason: Reason,
    /// For people: what failed, on what, why.
    pub message: String,
}

/// The kinds of [`Refusal`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// The program, user or directory does not exist in the guest.
    NotFound,
    /// It exists and may not be run.
    NotExecutable,
    /// The other side broke the protocol or speaks another version.
    Protocol,
    /// The guest lacks a resource, or the agent serves as many sessions as it may.
    Resources,
}

/// The guest's clocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    /// Time of day: nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Nanoseconds since the guest's kernel started.
    pub uptime_ns: u64,
}

/// From the host to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    /// First.
    Hello(Hello),
    /// Start a process; the connection becomes its session.
    Exec(Exec),
    /// Bytes for the process's standard input.
    Stdin(Vec<u8>),
    /// The end of its standard input.
    StdinEof,
    /// The terminal has a new size.
    Resize(TerminalSize),
    /// Send this signal to the process (to its terminal's foreground group when it has one).
    Signal(i32),
    /// Answer `Pong`.
    Ping,
    /// Answer with the clocks.
    Time,
    /// Stop the machine in order.
    Shutdown(Shutdown),
    /// Set the time of day to so many nanoseconds since 1970, and answer with the clocks.
    SetTime(u64),
    /// Be another machine, and answer `Identified`.
    Identify(Identify),
    /// Mix these bytes into the random numbers at once, and answer `Pong`: without them a copy would
    /// draw the same ones.
    Reseed(Vec<u8>),
    /// Do all that `Identify` needs without changing anything, and answer `Pong`: what was executed once is
    /// translated, and clones begin with that.
    Rehearse,
    /// Use only so many of the machine's processors, and answer `Cpus`.
    Cpus(u32),
}

/// From the agent to the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToHost {
    /// First.
    Hello(Hello),
    /// The process runs and has this id.
    Started(u32),
    /// Bytes from its standard output or terminal.
    Stdout(Vec<u8>),
    /// Bytes from its standard error.
    Stderr(Vec<u8>),
    /// So many more bytes of standard input may be sent.
    StdinCredit(u32),
    /// The process ended; the last frame of a session.
    Exit(Exit),
    /// The answer to `Ping`, `Reseed` and `Rehearse`.
    Pong,
    /// The answer to `Time`.
    Clocks(Clocks),
    /// The shutdown has begun.
    ShuttingDown,
    /// The answer to `Identify`. An address on the network may come later.
    Identified,
    /// The answer to `Cpus`: so many are used now.
    Cpus(u32),
    /// The request was not carried out.
    Refused(Refusal),
}

/// Why a frame is not a message.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The frame is damaged.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// Nobody sends such a kind in this direction.
    #[error("a frame of unknown kind {0:#x}")]
    UnknownKind(u8),
    /// A control payload is not the JSON it should be.
    #[error("a frame of kind {kind:#x} holds no valid message")]
    Payload {
        /// The frame's kind.
        kind: u8,
        /// What the JSON reader found.
        source: serde_json::Error,
    },
}

mod kind {
    pub(super) const HELLO: u8 = 0x01;
    pub(super) const EXEC: u8 = 0x02;
    pub(super) const STDIN: u8 = 0x03;
    pub(super) const STDIN_EOF: u8 = 0x04;
    pub(super) const RESIZE: u8 = 0x05;
    pub(super) const SIGNAL: u8 = 0x06;
    pub(super) const PING: u8 = 0x07;
    pub(super) const TIME: u8 = 0x08;
    pub(super) const SHUTDOWN: u8 = 0x09;
    pub(super) const SET_TIME: u8 = 0x0a;
    pub(super) const IDENTIFY: u8 = 0x0b;
    pub(super) const RESEED: u8 = 0x0c;
    pub(super) const CPUS: u8 = 0x0d;
    pub(super) const REHEARSE: u8 = 0x0e;
    pub(super) const AGENT_HELLO: u8 = 0x81;
    pub(super) const STARTED: u8 = 0x82;
    pub(super) const STDOUT: u8 = 0x83;
    pub(super) const STDERR: u8 = 0x84;
    pub(super) const STDIN_CREDIT: u8 = 0x85;
    pub(super) const EXIT: u8 = 0x86;
    pub(super) const PONG: u8 = 0x87;
    pub(super) const CLOCKS: u8 = 0x88;
    pub(super) const SHUTTING_DOWN: u8 = 0x89;
    pub(super) const REFUSED: u8 = 0x8a;
    pub(super) const IDENTIFIED: u8 = 0x8b;
    pub(super) const CPUS_USED: u8 = 0x8c;
}

impl ToAgent {
    /// The frame that carries this message.
    ///
    /// # Errors
    /// [`MessageError`] when it is too long for a frame.
    pub fn to_frame(&self) -> Result<Frame, MessageError> {
        match self {
            Self::Hello(hello) => json(kind::HELLO, hello),
            Self::Exec(exec) => json(kind::EXEC, exec),
            Self::Stdin(bytes) => raw(kind::STDIN, bytes),
            Self::StdinEof => raw(kind::STDIN_EOF, &[]),
            Self::Resize(size) => json(kind::RESIZE, size),
            Self::Signal(signal) => json(kind::SIGNAL, signal),
            Self::Ping => raw(kind::PING, &[]),
            Self::Time => raw(kind::TIME, &[]),
            Self::SetTime(ns) => json(kind::SET_TIME, ns),
            Self::Identify(identity) => json(kind::IDENTIFY, identity),
            Self::Reseed(bytes) => raw(kind::RESEED, bytes),
            Self::Rehearse => raw(kind::REHEARSE, &[]),
            Self::Cpus(count) => json(kind::CPUS, count),
            Self::Shutdown(shutdown) => json(kind::SHUTDOWN, shutdown),
        }
    }

    /// The message in a frame.
    ///
    /// # Errors
    /// [`MessageError`] when the frame holds none.
    pub fn from_frame(frame: Frame) -> Result<Self, MessageError> {
        Ok(match frame.kind {
            kind::HELLO => Self::Hello(parse(&frame)?),
            kind::EXEC => Self::Exec(parse(&frame)?),
            kind::STDIN => Self::Stdin(frame.payload),
            kind::STDIN_EOF => Self::StdinEof,
            kind::RESIZE => Self::Resize(parse(&frame)?),
            kind::SIGNAL => Self::Signal(parse(&frame)?),
            kind::PING => Self::Ping,
            kind::TIME => Self::Time,
            kind::SET_TIME => Self::SetTime(parse(&frame)?),
            kind::IDENTIFY => Self::Identify(parse(&frame)?),
            kind::RESEED => Self::Reseed(frame.payload),
            kind::REHEARSE => Self::Rehearse,
            kind::CPUS => Self::Cpus(parse(&frame)?),
            kind::SHUTDOWN => Self::Shutdown(parse(&frame)?),
            other => return Err(MessageError::UnknownKind(other)),
        })
    }
}

impl ToHost {
    /// The frame that carries this message.
    ///
    /// # Errors
    /// [`MessageError`] when it is too long for a frame.
    pub fn to_frame(&self) -> Result<Frame, MessageError> {
        match self {
            Self::Hello(hello) => json(kind::AGENT_HELLO, hello),
            Self::Started(pid) => json(kind::STARTED, pid),
            Self::Stdout(bytes) => raw(kind::STDOUT, bytes),
            Self::Stderr(bytes) => raw(kind::STDERR, bytes),
            Self::StdinCredit(bytes) => json(kind::STDIN_CREDIT, bytes),
            Self::Exit(exit) => json(kind::EXIT, exit),
            Self::Pong => raw(kind::PONG, &[]),
            Self::Clocks(clocks) => json(kind::CLOCKS, clocks),
            Self::ShuttingDown => raw(kind::SHUTTING_DOWN, &[]),
            Self::Identified => raw(kind::IDENTIFIED, &[]),
            Self::Cpus(count) => json(kind::CPUS_USED, count),
            Self::Refused(refusal) => json(kind::REFUSED, refusal),
        }
    }

    /// The message in a frame.
    ///
    /// # Errors
    /// [`MessageError`] when the frame holds none.
    pub fn from_frame(frame: Frame) -> Result<Self, MessageError> {
        Ok(match frame.kind {
            kind::AGENT_HELLO => Self::Hello(parse(&frame)?),
            kind::STARTED => Self::Started(parse(&frame)?),
            kind::STDOUT => Self::Stdout(frame.payload),
            kind::STDERR => Self::Stderr(frame.payload),
            kind::STDIN_CREDIT => Self::StdinCredit(parse(&frame)?),
            kind::EXIT => Self::Exit(parse(&frame)?),
            kind::PONG => Self::Pong,
            kind::CLOCKS => Self::Clocks(parse(&frame)?),
            kind::SHUTTING_DOWN => Self::ShuttingDown,
            kind::IDENTIFIED => Self::Identified,
            kind::CPUS_USED => Self::Cpus(parse(&frame)?),
            kind::REFUSED => Self::Refused(parse(&frame)?),
            other => return Err(MessageError::UnknownKind(other)),
        })
    }
}

fn json(kind: u8, value: &impl Serialize) -> Result<Frame, MessageError> {
    let payload =
        serde_json::to_vec(value).map_err(|source| MessageError::Payload { kind, source })?;
    raw(kind, &payload)
}

fn raw(kind: u8, payload: &[u8]) -> Result<Frame, MessageError> {
    if payload.len() > super::limits::FRAME_PAYLOAD_BYTES_MAX {
        return Err(FrameError::TooLong { kind, len: payload.len() }.into());
    }
    Ok(Frame { kind, payload: payload.to_vec() })
}

fn parse<T: DeserializeOwned>(frame: &Frame) -> Result<T, MessageError> {
    serde_json::from_slice(&frame.payload)
        .map_err(|source| MessageError::Payload { kind: frame.kind, source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_message_survives_its_frame() {
        let exec = Exec {
            argv: vec!["sh".into(), "-c".into(), "é\n".into()],
            env: vec![("A".into(), "b=c".into())],
            cwd: Some("/tmp".into()),
            tty: Some(TerminalSize { rows: 24, cols: 80 }),
            user: Some("nobody".into()),
        };
        let hello = Hello { version: 1, software: "test".into() };
        for message in [
            ToAgent::Hello(hello.clone()),
            ToAgent::Exec(exec),
            ToAgent::Stdin(vec![0, 255]),
            ToAgent::StdinEof,
            ToAgent::Resize(TerminalSize { rows: 1, cols: 2 }),
            ToAgent::Signal(15),
            ToAgent::Ping,
            ToAgent::Time,
            ToAgent::Shutdown(Shutdown::PowerOff),
            ToAgent::SetTime(u64::MAX),
            ToAgent::Reseed(vec![7; 64]),
            ToAgent::Rehearse,
            ToAgent::Cpus(3),
            ToAgent::Identify(Identify {
                hostname: "b".into(),
                machine_id: "0".repeat(32),
                mac: [2, 0, 0, 0, 0, 255],
                leave_address: true,
            }),
        ] {
            assert_eq!(ToAgent::from_frame(message.to_frame().unwrap()).unwrap(), message);
            assert!(ToHost::from_frame(message.to_frame().unwrap()).is_err());
        }
        for message in [
            ToHost::Hello(hello),
            ToHost::Started(7),
            ToHost::Stdout(b"x".to_vec()),
            ToHost::Stderr(vec![]),
            ToHost::StdinCredit(9),
            ToHost::Exit(Exit::Status(3)),
            ToHost::Exit(Exit::Signal(9)),
            ToHost::Pong,
            ToHost::Clocks(Clocks { realtime_ns: u64::MAX, uptime_ns: 0 }),
            ToHost::ShuttingDown,
            ToHost::Identified,
            ToHost::Cpus(3),
            ToHost::Refused(Refusal { reason: Reason::NotFound, message: "no".into() }),
        ] {
            assert_eq!(ToHost::from_frame(message.to_frame().unwrap()).unwrap(), message);
            assert!(ToAgent::from_frame(message.to_frame().unwrap()).is_err());
        }
    }

    #[test]
    fn rubbish_in_a_control_frame_is_an_error() {
        for payload in [&b""[..], b"{", b"[]", b"{\"argv\":1}", b"{\"argv\":[],\"x\":1}", b"\xff"] {
            let frame = Frame { kind: 0x02, payload: payload.to_vec() };
            assert!(matches!(
                ToAgent::from_frame(frame),
                Err(MessageError::Payload { kind: 0x02, .. })
            ));
        }
    }
}
