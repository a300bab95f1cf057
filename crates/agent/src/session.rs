//! One connection of the host: hello, requests, and the process it may start. One thread, one poll
//! loop, and nothing that grows without a limit: the process's output is read only while the queue
//! towards the host is short, and its input only as far as credit was granted.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use berth_api::agent::frame::{Decoder, FrameError};
use berth_api::agent::limits::{
    DATA_CHUNK_BYTES, OUTPUT_QUEUE_BYTES, PROTOCOL_VERSION, STDIN_WINDOW_BYTES,
};
use berth_api::agent::message::{
    Clocks, Exec, Hello, Identify, MessageError, Reason, Refusal, Shutdown, ToAgent, ToHost,
};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::time::{ClockId, Timespec, clock_gettime, clock_settime};

use crate::cpus;
use crate::identity;
use crate::power::Power;
use crate::reaper::Reaper;
use crate::spawn::{self, Started};
use crate::sys;

/// Credit is given back in steps of at least this, so that it does not double the traffic.
const CREDIT_STEP_BYTES: usize = 32 << 10;

/// Why a session ended early.
#[derive(Debug, thiserror::Error)]
enum SessionError {
    #[error("the host's connection failed")]
    Stream(#[source] io::Error),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("the host broke the protocol: {0}")]
    Protocol(&'static str),
    #[error("the host speaks protocol version {0}, this agent version {PROTOCOL_VERSION}")]
    Version(u32),
}

impl From<Errno> for SessionError {
    fn from(errno: Errno) -> Self {
        Self::Stream(errno.into())
    }
}

impl From<FrameError> for SessionError {
    fn from(error: FrameError) -> Self {
        Self::Message(error.into())
    }
}

/// Serves one connection until it ends.
pub fn serve(stream: OwnedFd, reaper: &Arc<Reaper>, power: Option<&Power>) -> io::Result<()> {
    set_nonblocking(&stream)?;
    let mut session = Session {
        stream,
        decoder: Decoder::default(),
        output: Vec::new(),
        greeted: false,
        process: None,
        over: false,
        shutdown: None,
        reaper: Arc::clone(reaper),
        can_shut_down: power.is_some(),
    };
    if let Err(error) = session.run() {
        session.say_why(&error);
    }
    session.leave_process();
    if let (Some(how), Some(power)) = (session.shutdown, power) {
        match how {
            Shutdown::PowerOff => power.off(),
            Shutdown::Reboot => power.reboot(),
        }
    }
    Ok(())
}

struct Session {
    stream: OwnedFd,
    decoder: Decoder,
    /// Encoded frames not written yet.
    output: Vec<u8>,
    greeted: bool,
    process: Option<Process>,
    /// Write what is queued, then end.
    over: bool,
    shutdown: Option<Shutdown>,
    reaper: Arc<Reaper>,
    can_shut_down: bool,
}

struct Process {
    streams: Started,
    /// Input from the host that the process has not taken; at most the window.
    backlog: VecDeque<u8>,
    /// The host has ended the input; closed once the backlog is written.
    eof: bool,
    /// Bytes taken off the window and not given back yet.
    owed: usize,
}

impl Session {
    fn run(&mut self) -> Result<(), SessionError> {
        loop {
            if self.over && self.output.is_empty() {
                return Ok(());
            }
            let ready = self.wait()?;
            if ready.stream_writable {
                self.write_output()?;
            }
            if ready.stream_readable && !self.read_stream()? {
                return Ok(());
            }
            self.serve_process(&ready)?;
        }
    }

    fn wait(&self) -> Result<Ready, SessionError> {
        let room = self.output.len() < OUTPUT_QUEUE_BYTES;
        let mut interest = PollFlags::empty();
        // A host that does not read its answers gets no more of them.
        if room {
            interest |= PollFlags::IN;
        }
        if !self.output.is_empty() {
            interest |= PollFlags::OUT;
        }
        let mut fds = vec![PollFd::new(&self.stream, interest)];
        let mut names = vec![Source::Stream];
        if let Some(process) = self.process.as_ref().filter(|_| !self.over) {
            let event = process.streams.child.event();
            if room {
                fds.push(PollFd::from_borrowed_fd(event, PollFlags::IN));
                names.push(Source::End);
                for (fd, name) in [
                    (process.streams.stdout.as_ref(), Source::Stdout),
                    (process.streams.stderr.as_ref(), Source::Stderr),
                ] {
                    if let Some(fd) = fd {
                        fds.push(PollFd::new(fd, PollFlags::IN));
                        names.push(name);
                    }
                }
            }
            if let Some(fd) = process.streams.stdin.as_ref().filter(|_| !process.backlog.is_empty())
            {
                fds.push(PollFd::new(fd, PollFlags::OUT));
                names.push(Source::Stdin);
            }
        }
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        let mut ready = Ready::default();
        for (fd, name) in fds.iter().zip(names) {
            let events = fd.revents();
            if events.is_empty() {
                continue;
            }
            match name {
                Source::Stream => {
                    let broken = events.intersects(PollFlags::ERR | PollFlags::NVAL);
                    ready.stream_writable = events.contains(PollFlags::OUT);
                    ready.stream_readable =
                        events.intersects(PollFlags::IN | PollFlags::HUP) || broken;
                }
                Source::End => ready.ended = true,
                Source::Stdout => ready.stdout = true,
                Source::Stderr => ready.stderr = true,
                Source::Stdin => ready.stdin = true,
            }
        }
        Ok(ready)
    }

    /// Reads what the host sent; false when it has closed.
    fn read_stream(&mut self) -> Result<bool, SessionError> {
        let mut buffer = [0u8; 16 << 10];
        let read = match rustix::io::read(&self.stream, &mut buffer) {
            Ok(0) => return Ok(false),
            Ok(read) => read,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(true),
            Err(Errno::CONNRESET | Errno::PIPE) => return Ok(false),
            Err(errno) => return Err(errno.into()),
        };
        self.decoder.push(buffer.get(..read).unwrap_or_default());
        while let Some(frame) = self.decoder.next_frame()? {
            self.handle(ToAgent::from_frame(frame)?)?;
        }
        Ok(true)
    }

    fn handle(&mut self, message: ToAgent) -> Result<(), SessionError> {
        if self.over {
            return Ok(());
        }
        match message {
            ToAgent::Hello(_) if self.greeted => Err(SessionError::Protocol("a second hello")),
            ToAgent::Hello(hello) => self.greet(&hello),
            _ if !self.greeted => Err(SessionError::Protocol("a request before the hello")),
            ToAgent::Shutdown(_)
            | ToAgent::SetTime(_)
            | ToAgent::Identify(_)
            | ToAgent::Rehearse
            | ToAgent::Cpus(_)
                if !self.can_shut_down =>
            {
                self.refuse(NO_MACHINE)
            }
            ToAgent::Ping => self.send(&ToHost::Pong),
            ToAgent::Time => self.send(&ToHost::Clocks(clocks())),
            ToAgent::Shutdown(how) => self.begin_shutdown(how),
            ToAgent::SetTime(ns) => self.set_time(ns),
            ToAgent::Identify(identity) => self.identify(&identity),
            ToAgent::Reseed(bytes) => match sys::reseed(&bytes) {
                Ok(()) => self.send(&ToHost::Pong),
                Err(error) => self.refuse(&format!("new random numbers: {error}")),
            },
            ToAgent::Rehearse => {
                identity::rehearse();
                self.send(&ToHost::Pong)
            }
            ToAgent::Cpus(count) => self.use_cpus(count),
            ToAgent::Exec(exec) => self.start(&exec),
            other => self.handle_input(other),
        }
    }

    fn greet(&mut self, hello: &Hello) -> Result<(), SessionError> {
        let software = concat!("berth-agent ", env!("CARGO_PKG_VERSION")).to_owned();
        self.send(&ToHost::Hello(Hello { version: PROTOCOL_VERSION, software }))?;
        if hello.version != PROTOCOL_VERSION {
            return Err(SessionError::Version(hello.version));
        }
        self.greeted = true;
        Ok(())
    }

    fn refuse(&mut self, message: &str) -> Result<(), SessionError> {
        let reason = Reason::Resources;
        self.send(&ToHost::Refused(Refusal { reason, message: message.into() }))
    }

    fn set_time(&mut self, ns: u64) -> Result<(), SessionError> {
        const SECOND: u64 = 1_000_000_000;
        // Less than 2^35 seconds and 10^9 nanoseconds.
        let time = Timespec { tv_sec: (ns / SECOND) as i64, tv_nsec: (ns % SECOND) as i64 };
        match clock_settime(ClockId::Realtime, time) {
            Ok(()) => self.send(&ToHost::Clocks(clocks())),
            Err(error) => self.refuse(&format!("setting the clock failed: {error}")),
        }
    }

    fn identify(&mut self, identity: &Identify) -> Result<(), SessionError> {
        match identity::assume(identity) {
            Ok(()) => self.send(&ToHost::Identified),
            Err(why) => self.refuse(&format!("the guest is not all that it should be: {why}")),
        }
    }

    fn use_cpus(&mut self, count: u32) -> Result<(), SessionError> {
        match cpus::use_first(count) {
            Ok(used) => self.send(&ToHost::Cpus(used)),
            Err(why) => self.refuse(&why),
        }
    }

    fn begin_shutdown(&mut self, how: Shutdown) -> Result<(), SessionError> {
        self.shutdown = Some(how);
        self.over = true;
        self.send(&ToHost::ShuttingDown)
    }

    fn start(&mut self, exec: &Exec) -> Result<(), SessionError> {
        if self.process.is_some() {
            return Err(SessionError::Protocol("a second process in one session"));
        }
        match spawn::start(exec, &self.reaper) {
            Ok(streams) => {
                for fd in [&streams.stdin, &streams.stdout, &streams.stderr].into_iter().flatten() {
                    set_nonblocking(fd).map_err(SessionError::Stream)?;
                }
                let pid = streams.child.pid.cast_unsigned();
                let backlog = VecDeque::new();
                self.process = Some(Process { streams, backlog, eof: false, owed: 0 });
                self.send(&ToHost::Started(pid))
            }
            Err(refusal) => {
                self.over = true;
                self.send(&ToHost::Refused(refusal))
            }
        }
    }

    fn handle_input(&mut self, message: ToAgent) -> Result<(), SessionError> {
        let Some(process) = self.process.as_mut() else {
            return Err(SessionError::Protocol("input without a process"));
        };
        match message {
            ToAgent::Stdin(_) | ToAgent::StdinEof if process.eof => {
                return Err(SessionError::Protocol("input after its end"));
            }
            ToAgent::Stdin(bytes) => process.take_input(&bytes)?,
            ToAgent::StdinEof => process.end_input(),
            ToAgent::Resize(size) => {
                if let Some(terminal) =
                    process.streams.stdout.as_ref().filter(|_| process.streams.tty)
                {
                    // A terminal that has gone has no size; its end is under way.
                    let _ = spawn::resize(terminal, size);
                }
            }
            ToAgent::Signal(signal) => process.signal(signal),
            _ => return Err(SessionError::Protocol("a message out of place")),
        }
        self.give_credit()
    }

    fn serve_process(&mut self, ready: &Ready) -> Result<(), SessionError> {
        if self.over {
            return Ok(());
        }
        let Some(process) = self.process.as_mut() else { return Ok(()) };
        if ready.stdin {
            process.write_input();
        }
        // What the process wrote before it ended comes before the news of its end; what its own
        // children write later is not waited for.
        let mut messages = Vec::new();
        if ready.stdout || ready.ended {
            messages.extend(read_some(&mut process.streams.stdout).map(ToHost::Stdout));
        }
        if ready.stderr || ready.ended {
            messages.extend(read_some(&mut process.streams.stderr).map(ToHost::Stderr));
        }
        let quiet = messages.is_empty();
        let exit = process.streams.child.exit().filter(|_| ready.ended && quiet);
        for message in messages {
            self.send(&message)?;
        }
        self.give_credit()?;
        if let Some(exit) = exit {
            self.over = true;
            self.send(&ToHost::Exit(exit))?;
        }
        Ok(())
    }

    fn give_credit(&mut self) -> Result<(), SessionError> {
        let Some(process) = self.process.as_mut() else { return Ok(()) };
        let free = process.owed - process.backlog.len();
        if free < CREDIT_STEP_BYTES {
            return Ok(());
        }
        process.owed -= free;
        // At most the window, which fits.
        let bytes = u32::try_from(free).unwrap_or(u32::MAX);
        self.send(&ToHost::StdinCredit(bytes))
    }

    fn send(&mut self, message: &ToHost) -> Result<(), SessionError> {
        self.output.extend_from_slice(&message.to_frame()?.encode()?);
        self.write_output()
    }

    fn write_output(&mut self) -> Result<(), SessionError> {
        while !self.output.is_empty() {
            match rustix::io::write(&self.stream, &self.output) {
                Ok(written) => drop(self.output.drain(..written)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Tells the host why the connection ends, as far as it still listens.
    fn say_why(&mut self, error: &SessionError) {
        if matches!(error, SessionError::Stream(_)) {
            return;
        }
        let refusal = Refusal { reason: Reason::Protocol, message: error.to_string() };
        let _ = self.send(&ToHost::Refused(refusal));
    }

    /// The host has gone: its process loses its terminal or streams, and is told.
    fn leave_process(&mut self) {
        if let Some(process) = self.process.take()
            && process.streams.child.exit().is_none()
        {
            let _ = sys::kill(-process.streams.child.pid, libc::SIGHUP);
            let _ = sys::kill(-process.streams.child.pid, libc::SIGCONT);
        }
    }
}

impl Process {
    fn take_input(&mut self, bytes: &[u8]) -> Result<(), SessionError> {
        self.owed += bytes.len();
        if self.owed > STDIN_WINDOW_BYTES {
            return Err(SessionError::Protocol("more input than was granted"));
        }
        // A process that has closed its input gets none, and the host goes on.
        if self.streams.stdin.is_some() {
            self.backlog.extend(bytes);
        }
        self.write_input();
        Ok(())
    }

    fn end_input(&mut self) {
        self.eof = true;
        self.write_input();
    }

    fn write_input(&mut self) {
        while let Some(stdin) = self.streams.stdin.as_ref() {
            let (bytes, _) = self.backlog.as_slices();
            if bytes.is_empty() {
                break;
            }
            match rustix::io::write(stdin, bytes) {
                Ok(written) => drop(self.backlog.drain(..written)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return,
                Err(_) => {
                    self.backlog.clear();
                    self.streams.stdin = None;
                }
            }
        }
        if self.eof
            && self.backlog.is_empty()
            && let Some(stdin) = self.streams.stdin.take().filter(|_| self.streams.tty)
        {
            // A terminal ends its input with a character, not by closing.
            let _ = rustix::io::write(&stdin, &[4]);
        }
    }

    fn signal(&self, signal: i32) {
        if self.streams.child.exit().is_some() || !(1..=64).contains(&signal) {
            return;
        }
        let foreground = self.streams.stdout.as_ref().filter(|_| self.streams.tty);
        let group = foreground.and_then(|terminal| rustix::termios::tcgetpgrp(terminal).ok());
        let target = group.map_or(self.streams.child.pid, |group| -group.as_raw_nonzero().get());
        // It may have ended just now; its exit is on the way.
        let _ = sys::kill(target, signal);
    }
}

enum Source {
    Stream,
    End,
    Stdout,
    Stderr,
    Stdin,
}

#[derive(Default)]
struct Ready {
    stream_readable: bool,
    stream_writable: bool,
    ended: bool,
    stdout: bool,
    stderr: bool,
    stdin: bool,
}

/// Reads one chunk; forgets the stream when it has ended.
fn read_some(fd: &mut Option<OwnedFd>) -> Option<Vec<u8>> {
    let mut buffer = vec![0u8; DATA_CHUNK_BYTES];
    match rustix::io::read(fd.as_ref()?.as_fd(), &mut buffer) {
        Ok(0) => *fd = None,
        Ok(read) => {
            buffer.truncate(read);
            return Some(buffer);
        }
        Err(Errno::AGAIN | Errno::INTR) => {}
        // EIO: the last holder of the terminal's far end has gone.
        Err(_) => *fd = None,
    }
    None
}

fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(fd)?;
    Ok(rustix::fs::fcntl_setfl(fd, flags | rustix::fs::OFlags::NONBLOCK)?)
}

/// Said to whoever wants a machine's power or clock where there is no machine.
const NO_MACHINE: &str = "this agent is not the init of a machine";

fn clocks() -> Clocks {
    let nanoseconds = |clock| {
        let now = clock_gettime(clock);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        seconds
            .saturating_mul(1_000_000_000)
            .saturating_add(u64::try_from(now.tv_nsec).unwrap_or(0))
    };
    Clocks {
        realtime_ns: nanoseconds(ClockId::Realtime),
        uptime_ns: nanoseconds(ClockId::Boottime),
    }
}
