//! The host's side of the agent protocol over any stream that can be read and written at once (two
//! halves of a vsock connection or of a unix socket). Blocking; the caller brings the threads.

use std::io::{Read, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::frame::{Frame, FrameError};
use super::limits::{DATA_CHUNK_BYTES, PROTOCOL_VERSION, STDIN_WINDOW_BYTES};
use super::message::{
    Clocks, Exec, Exit, Hello, Identify, MessageError, Refusal, Shutdown, TerminalSize, ToAgent,
    ToHost,
};

/// Why talking with the agent failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The agent said no.
    #[error("the agent refused")]
    Refused(#[source] Refusal),
    /// The stream or what came over it is broken.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// The agent speaks another version.
    #[error("the agent speaks protocol version {0}, this program version {PROTOCOL_VERSION}")]
    Version(u32),
    /// The agent closed the connection before it answered.
    #[error("the agent closed the connection while {0} was awaited")]
    Closed(&'static str),
    /// The agent sent something that does not belong here.
    #[error("the agent answered with something else while {0} was awaited")]
    Unexpected(&'static str),
}

impl From<FrameError> for ClientError {
    fn from(error: FrameError) -> Self {
        Self::Message(error.into())
    }
}

/// A connection on which both sides have said hello.
#[derive(Debug)]
pub struct Client<R, W> {
    reader: R,
    writer: W,
    agent: Hello,
}

impl<R: Read, W: Write> Client<R, W> {
    /// Says hello and waits for the agent's.
    ///
    /// # Errors
    /// [`ClientError`] when the stream fails or the versions differ.
    pub fn connect(reader: R, writer: W, software: &str) -> Result<Self, ClientError> {
        let hello = Hello { version: PROTOCOL_VERSION, software: software.to_owned() };
        let agent = Hello { version: PROTOCOL_VERSION, software: String::new() };
        let mut client = Self { reader, writer, agent };
        client.send(&ToAgent::Hello(hello))?;
        match client.receive("hello")? {
            ToHost::Hello(agent) if agent.version == PROTOCOL_VERSION => client.agent = agent,
            ToHost::Hello(agent) => return Err(ClientError::Version(agent.version)),
            _ => return Err(ClientError::Unexpected("hello")),
        }
        Ok(client)
    }

    /// What the agent said about itself.
    #[must_use]
    pub fn agent(&self) -> &Hello {
        &self.agent
    }

    /// Asks whether the agent answers.
    ///
    /// # Errors
    /// [`ClientError`] when it does not.
    pub fn ping(&mut self) -> Result<(), ClientError> {
        self.send(&ToAgent::Ping)?;
        match self.receive("pong")? {
            ToHost::Pong => Ok(()),
            _ => Err(ClientError::Unexpected("pong")),
        }
    }

    /// Asks for the guest's clocks.
    ///
    /// # Errors
    /// [`ClientError`] when they do not come.
    pub fn clocks(&mut self) -> Result<Clocks, ClientError> {
        self.send(&ToAgent::Time)?;
        match self.receive("the time")? {
            ToHost::Clocks(clocks) => Ok(clocks),
            _ => Err(ClientError::Unexpected("the time")),
        }
    }

    /// Sets the guest's time of day to nanoseconds since 1970; gives its clocks from after that.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the guest does not.
    pub fn set_time(&mut self, realtime_ns: u64) -> Result<Clocks, ClientError> {
        self.send(&ToAgent::SetTime(realtime_ns))?;
        match self.receive("the time")? {
            ToHost::Clocks(clocks) => Ok(clocks),
            _ => Err(ClientError::Unexpected("the time")),
        }
    }

    /// Tells a clone who it is.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the guest cannot be that.
    pub fn identify(&mut self, identity: &Identify) -> Result<(), ClientError> {
        self.send(&ToAgent::Identify(identity.clone()))?;
        match self.receive("the identity")? {
            ToHost::Identified => Ok(()),
            _ => Err(ClientError::Unexpected("the identity")),
        }
    }

    /// Mixes bytes into the guest's random numbers.
    ///
    /// # Errors
    /// [`ClientError`] when the agent cannot.
    pub fn reseed(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        self.send(&ToAgent::Reseed(bytes.to_vec()))?;
        match self.receive("new random numbers")? {
            ToHost::Pong => Ok(()),
            _ => Err(ClientError::Unexpected("new random numbers")),
        }
    }

    /// Lets the guest do all that [`Client::identify`] needs, without changing anything.
    ///
    /// # Errors
    /// [`ClientError`] when the agent cannot.
    pub fn rehearse(&mut self) -> Result<(), ClientError> {
        self.send(&ToAgent::Rehearse)?;
        match self.receive("the rehearsal")? {
            ToHost::Pong => Ok(()),
            _ => Err(ClientError::Unexpected("the rehearsal")),
        }
    }

    /// Lets the guest use only so many of its processors; gives how many it uses then.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when it has not so many, or its kernel does not do that.
    pub fn use_cpus(&mut self, count: u32) -> Result<u32, ClientError> {
        self.send(&ToAgent::Cpus(count))?;
        match self.receive("the processors")? {
            ToHost::Cpus(count) => Ok(count),
            _ => Err(ClientError::Unexpected("the processors")),
        }
    }

    /// Asks the guest to stop in order. The machine is not off yet when this returns.
    ///
    /// # Errors
    /// [`ClientError`] when the agent does not agree.
    pub fn shutdown(&mut self, how: Shutdown) -> Result<(), ClientError> {
        self.send(&ToAgent::Shutdown(how))?;
        match self.receive("the shutdown")? {
            ToHost::ShuttingDown => Ok(()),
            _ => Err(ClientError::Unexpected("the shutdown")),
        }
    }

    /// Starts a process; the connection is its session from here on.
    ///
    /// # Errors
    /// [`ClientError::Refused`] when the guest cannot start it.
    pub fn exec(mut self, exec: &Exec) -> Result<Session<R, W>, ClientError> {
        self.send(&ToAgent::Exec(exec.clone()))?;
        match self.receive("the process")? {
            ToHost::Started(pid) => Ok(Session {
                pid,
                reader: self.reader,
                input: Arc::new(Input {
                    writer: Mutex::new(self.writer),
                    credit: Mutex::new(Credit { bytes: STDIN_WINDOW_BYTES, open: true }),
                    changed: Condvar::new(),
                }),
            }),
            _ => Err(ClientError::Unexpected("the process")),
        }
    }

    fn send(&mut self, message: &ToAgent) -> Result<(), ClientError> {
        Ok(message.to_frame()?.write_to(&mut self.writer)?)
    }

    fn receive(&mut self, awaited: &'static str) -> Result<ToHost, ClientError> {
        let frame = Frame::read_from(&mut self.reader)?.ok_or(ClientError::Closed(awaited))?;
        match ToHost::from_frame(frame)? {
            ToHost::Refused(refusal) => Err(ClientError::Refused(refusal)),
            message => Ok(message),
        }
    }
}

/// What a running process does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// It wrote to its standard output or terminal.
    Stdout(Vec<u8>),
    /// It wrote to its standard error.
    Stderr(Vec<u8>),
    /// It ended; nothing comes after this.
    Exit(Exit),
}

/// A process in the guest: read its events here, feed it through [`Session::input`].
#[derive(Debug)]
pub struct Session<R, W> {
    pid: u32,
    reader: R,
    input: Arc<Input<W>>,
}

impl<R: Read, W: Write> Session<R, W> {
    /// The process id inside the guest.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// The way to the process's standard input and terminal; for other threads.
    #[must_use]
    pub fn input(&self) -> Arc<Input<W>> {
        Arc::clone(&self.input)
    }

    /// Waits for the next event.
    ///
    /// # Errors
    /// [`ClientError`] when the session breaks off before the process ended.
    pub fn next_event(&mut self) -> Result<Event, ClientError> {
        let event = self.receive();
        if matches!(event, Err(_) | Ok(Event::Exit(_))) {
            self.input.close();
        }
        event
    }

    fn receive(&mut self) -> Result<Event, ClientError> {
        loop {
            let frame = Frame::read_from(&mut self.reader)?
                .ok_or(ClientError::Closed("the end of the process"))?;
            match ToHost::from_frame(frame)? {
                ToHost::Stdout(bytes) => return Ok(Event::Stdout(bytes)),
                ToHost::Stderr(bytes) => return Ok(Event::Stderr(bytes)),
                ToHost::Exit(exit) => return Ok(Event::Exit(exit)),
                ToHost::StdinCredit(bytes) => self.input.grant(bytes),
                ToHost::Refused(refusal) => return Err(ClientError::Refused(refusal)),
                _ => return Err(ClientError::Unexpected("an event of the process")),
            }
        }
    }
}

#[derive(Debug)]
struct Credit {
    bytes: usize,
    open: bool,
}

/// What goes to a process: its standard input, within the agent's credit, and control.
#[derive(Debug)]
pub struct Input<W> {
    writer: Mutex<W>,
    credit: Mutex<Credit>,
    changed: Condvar,
}

impl<W: Write> Input<W> {
    /// Sends bytes to the standard input; waits for credit. Returns false when the process is gone.
    ///
    /// # Errors
    /// [`ClientError`] when the stream fails.
    pub fn stdin(&self, mut bytes: &[u8]) -> Result<bool, ClientError> {
        while !bytes.is_empty() {
            let Some(granted) = self.take_credit(bytes.len().min(DATA_CHUNK_BYTES)) else {
                return Ok(false);
            };
            let (now, later) = bytes.split_at(granted);
            self.send(&ToAgent::Stdin(now.to_vec()))?;
            bytes = later;
        }
        Ok(true)
    }

    /// Ends the standard input.
    ///
    /// # Errors
    /// [`ClientError`] when the stream fails.
    pub fn stdin_eof(&self) -> Result<(), ClientError> {
        self.send(&ToAgent::StdinEof)
    }

    /// Tells the terminal's new size.
    ///
    /// # Errors
    /// [`ClientError`] when the stream fails.
    pub fn resize(&self, size: TerminalSize) -> Result<(), ClientError> {
        self.send(&ToAgent::Resize(size))
    }

    /// Sends a signal to the process.
    ///
    /// # Errors
    /// [`ClientError`] when the stream fails.
    pub fn signal(&self, signal: i32) -> Result<(), ClientError> {
        self.send(&ToAgent::Signal(signal))
    }

    fn send(&self, message: &ToAgent) -> Result<(), ClientError> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(message.to_frame()?.write_to(&mut *writer)?)
    }

    /// Waits until some of `wanted` may be sent; `None` when the session is over.
    fn take_credit(&self, wanted: usize) -> Option<usize> {
        let mut credit = self.credit();
        while credit.open && credit.bytes == 0 {
            credit = self.changed.wait(credit).unwrap_or_else(PoisonError::into_inner);
        }
        let granted = wanted.min(credit.bytes);
        credit.bytes -= granted;
        credit.open.then_some(granted)
    }
}

impl<W> Input<W> {
    fn credit(&self) -> MutexGuard<'_, Credit> {
        self.credit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grant(&self, bytes: u32) {
        let mut credit = self.credit();
        // An agent that grants more than the window is broken or hostile; it gains nothing by it.
        let bytes = usize::try_from(bytes).unwrap_or(STDIN_WINDOW_BYTES);
        credit.bytes = credit.bytes.saturating_add(bytes).min(STDIN_WINDOW_BYTES);
        self.changed.notify_all();
    }

    fn close(&self) {
        self.credit().open = false;
        self.changed.notify_all();
    }
}
