//! One stream: the host's socket on one side, packets on the other, and the credit between.
//!
//! Towards the guest nothing is buffered: the socket is read when the guest has both a buffer and
//! credit. From the guest at most [`VSOCK_BUFFER`] bytes wait for the socket; that is the credit it
//! was given.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::SyncSender;

use vmm_sys_util::epoll::EventSet;

use crate::virtio::limits::VSOCK_BUFFER;
use crate::virtio::vsock::host::Answer;
use crate::virtio::vsock::packet::{
    Header, Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM,
};

/// The two ports that name a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    pub host_port: u32,
    pub guest_port: u32,
}

/// Who waits for the guest's answer.
pub(super) enum Caller {
    /// The guest asked, nobody waits.
    Guest,
    /// A call of `Vsock::connect`.
    Thread(SyncSender<Answer>),
    /// A client of the socket path.
    Client,
}

/// What a connection has for the guest.
pub(super) enum Output {
    /// A packet (its data is in the buffer given); there may be more.
    Packet(Header),
    /// A last packet; the connection is over.
    Last(Header),
    /// Nothing now.
    Nothing,
}

/// What the guest is to be told, besides data.
#[derive(Default)]
struct Todo {
    request: bool,
    response: bool,
    reset: bool,
    credit_update: bool,
    credit_request: bool,
    shutdown: u32,
}

pub(super) struct Connection {
    pub key: Key,
    pub stream: UnixStream,
    /// Events the poller watches for; `None` when the socket is not watched any more.
    pub interest: Option<EventSet>,
    /// Whether the muxer has it in its list of connections with output.
    pub queued: bool,
    caller: Option<Caller>,
    established: bool,
    todo: Todo,
    /// Bytes from the guest that wait for the socket.
    backlog: VecDeque<u8>,
    guest_buffer: u32,
    guest_forwarded: u32,
    sent: u32,
    received: u32,
    forwarded: u32,
    announced: u32,
    credit_asked: bool,
    /// The socket may have something to read.
    readable: bool,
    host_sends: bool,
    guest_sends: bool,
    guest_receives: bool,
    hung_up: bool,
    told: u32,
    /// The guest has reset it; only the backlog keeps it alive.
    guest_gone: bool,
}

impl Connection {
    fn new(key: Key, stream: UnixStream, caller: Caller) -> Self {
        Self {
            key,
            stream,
            interest: None,
            queued: false,
            caller: Some(caller),
            established: false,
            todo: Todo::default(),
            backlog: VecDeque::new(),
            guest_buffer: 0,
            guest_forwarded: 0,
            sent: 0,
            received: 0,
            forwarded: 0,
            announced: 0,
            credit_asked: false,
            readable: true,
            host_sends: true,
            guest_sends: true,
            guest_receives: true,
            hung_up: false,
            told: 0,
            guest_gone: false,
        }
    }

    /// A connection the host asks for.
    pub fn from_host(key: Key, stream: UnixStream, caller: Caller) -> Self {
        let mut connection = Self::new(key, stream, caller);
        connection.todo.request = true;
        connection
    }

    /// A connection the guest asked for and gets.
    pub fn from_guest(key: Key, stream: UnixStream, request: &Header) -> Self {
        let mut connection = Self::new(key, stream, Caller::Guest);
        connection.established = true;
        connection.todo.response = true;
        connection.update_credit(request);
        connection
    }

    /// The guest took the connection. Tells the caller; `false` if the caller is gone.
    pub fn accept(&mut self) -> bool {
        if self.established {
            return false;
        }
        self.established = true;
        match self.caller.take() {
            Some(Caller::Thread(answer)) => answer.try_send(Answer::Connected).is_ok(),
            Some(Caller::Client) => {
                let line = format!("OK {}\n", self.key.host_port);
                // Nothing was written before, so that the line fits the socket's buffer.
                self.stream.write_all(line.as_bytes()).is_ok()
            }
            Some(Caller::Guest) | None => true,
        }
    }

    /// The guest ended it. Whether the rest of the backlog keeps it alive.
    pub fn reset_by_guest(&mut self) -> bool {
        if let Some(Caller::Thread(answer)) = self.caller.take() {
            let _ = answer.try_send(Answer::Refused);
        }
        self.guest_gone = true;
        self.todo = Todo::default();
        !self.backlog.is_empty()
    }

    /// Whether the guest still knows this connection.
    pub fn guest_gone(&self) -> bool {
        self.guest_gone
    }

    /// Ends it with RST.
    pub fn reset(&mut self) {
        self.todo.reset = true;
    }

    /// Takes over the credit that every packet carries; `true` if sending has become possible.
    pub fn update_credit(&mut self, header: &Header) -> bool {
        let before = self.credit();
        self.guest_buffer = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        let now = self.credit();
        if now > 0 {
            self.credit_asked = false;
            self.todo.credit_request = false;
        }
        before == 0 && now > 0
    }

    /// The guest wants to know its credit.
    pub fn ask_credit_update(&mut self) {
        self.todo.credit_update = true;
    }

    fn credit(&self) -> u32 {
        let under_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_buffer.saturating_sub(under_way)
    }

    /// Data from the guest. `false`: the guest broke the rules or the socket is broken.
    pub fn data(&mut self, data: &[u8]) -> bool {
        let len = data.len() as u32;
        let under_way = self.received.wrapping_sub(self.forwarded);
        if !self.established || !self.guest_sends || under_way + len > VSOCK_BUFFER {
            return false;
        }
        self.received = self.received.wrapping_add(len);
        let mut rest = data;
        if self.backlog.is_empty() {
            match write_some(&mut self.stream, data) {
                Some(written) => {
                    self.forwarded = self.forwarded.wrapping_add(written as u32);
                    rest = data.get(written..).unwrap_or(&[]);
                }
                None => return false,
            }
        }
        self.backlog.extend(rest);
        self.after_write()
    }

    /// The socket takes data again. `false`: it is broken.
    pub fn writable(&mut self) -> bool {
        while !self.backlog.is_empty() {
            let (first, _) = self.backlog.as_slices();
            match write_some(&mut self.stream, first) {
                Some(0) => break,
                Some(written) => {
                    self.backlog.drain(..written);
                    self.forwarded = self.forwarded.wrapping_add(written as u32);
                }
                None => return false,
            }
        }
        self.after_write()
    }

    fn after_write(&mut self) -> bool {
        if self.forwarded.wrapping_sub(self.announced) >= VSOCK_BUFFER / 4 {
            self.todo.credit_update = true;
        }
        if self.backlog.is_empty() {
            // A large burst must not hold its memory for ever.
            self.backlog.shrink_to(4096);
            if !self.guest_sends {
                // Fails only if the other side is gone; then so is the need.
                let _ = self.stream.shutdown(Shutdown::Write);
                if !self.guest_receives {
                    self.todo.reset = true;
                }
            }
        }
        true
    }

    /// The guest shuts down one or both halves.
    pub fn shutdown_by_guest(&mut self, flags: u32) {
        if flags & SHUTDOWN_RECEIVE != 0 {
            self.guest_receives = false;
            self.host_sends = false;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        if flags & SHUTDOWN_SEND != 0 {
            self.guest_sends = false;
        }
        self.after_write();
    }

    /// The socket has data or an end of data.
    pub fn mark_readable(&mut self) {
        self.readable = true;
    }

    /// The other end of the socket was closed.
    pub fn hang_up(&mut self) {
        self.hung_up = true;
        self.readable = true;
        if !self.established {
            self.todo.reset = true;
        } else if !self.host_sends {
            self.todo.shutdown = SHUTDOWN_BOTH;
        }
    }

    /// What the poller is to watch for.
    pub fn wanted(&self) -> EventSet {
        let mut events = EventSet::empty();
        if !self.backlog.is_empty() {
            events |= EventSet::OUT;
        }
        if self.established && self.host_sends && !self.readable && !self.guest_gone {
            events |= EventSet::IN;
        }
        events
    }

    /// Whether `output` may have something to say.
    pub fn has_output(&self) -> bool {
        let todo = &self.todo;
        let control = todo.request || todo.response || todo.reset || todo.credit_update;
        let closing = todo.shutdown & !self.told != 0 || todo.credit_request;
        let data = self.established
            && self.host_sends
            && self.readable
            && !(self.credit() == 0 && self.credit_asked);
        !self.guest_gone && (control || closing || data)
    }

    /// The next packet for the guest, with at most `buffer.len()` bytes of data.
    pub fn output(&mut self, guest_cid: u64, buffer: &mut [u8]) -> Output {
        if self.guest_gone {
            return Output::Nothing;
        }
        if self.todo.reset {
            return Output::Last(self.header(guest_cid, Op::Reset));
        }
        if std::mem::take(&mut self.todo.request) {
            return Output::Packet(self.header(guest_cid, Op::Request));
        }
        if std::mem::take(&mut self.todo.response) {
            return Output::Packet(self.header(guest_cid, Op::Response));
        }
        if std::mem::take(&mut self.todo.credit_update) {
            return Output::Packet(self.header(guest_cid, Op::CreditUpdate));
        }
        if self.established && self.host_sends && self.readable {
            let credit = self.credit() as usize;
            let cap = buffer.len().min(credit);
            if cap == 0 && buffer.is_empty() {
                return Output::Nothing;
            }
            if cap == 0 && !self.credit_asked {
                self.credit_asked = true;
                return Output::Packet(self.header(guest_cid, Op::CreditRequest));
            }
            if let Some(packet) = self.read_data(guest_cid, buffer, cap) {
                return packet;
            }
        }
        let news = self.todo.shutdown & !self.told;
        if news != 0 {
            self.told |= self.todo.shutdown;
            let flags = self.told;
            return Output::Packet(Header { flags, ..self.header(guest_cid, Op::Shutdown) });
        }
        Output::Nothing
    }

    /// Reads from the socket; `None` when that gave no packet.
    fn read_data(&mut self, guest_cid: u64, buffer: &mut [u8], cap: usize) -> Option<Output> {
        let target = buffer.get_mut(..cap).filter(|target| !target.is_empty())?;
        loop {
            match self.stream.read(target) {
                Ok(0) => {
                    self.host_sends = false;
                    self.todo.shutdown |= if self.hung_up { SHUTDOWN_BOTH } else { SHUTDOWN_SEND };
                    return None;
                }
                Ok(count) => {
                    self.sent = self.sent.wrapping_add(count as u32);
                    let len = count as u32;
                    return Some(Output::Packet(Header {
                        len,
                        ..self.header(guest_cid, Op::Data)
                    }));
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.readable = false;
                    return None;
                }
                Err(_) => return Some(Output::Last(self.header(guest_cid, Op::Reset))),
            }
        }
    }

    fn header(&mut self, guest_cid: u64, op: Op) -> Header {
        self.announced = self.forwarded;
        Header {
            src_cid: super::packet::HOST_CID,
            dst_cid: guest_cid,
            src_port: self.key.host_port,
            dst_port: self.key.guest_port,
            kind: TYPE_STREAM,
            op: op as u16,
            buf_alloc: VSOCK_BUFFER,
            fwd_cnt: self.forwarded,
            ..Header::default()
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        if let Some(Caller::Thread(answer)) = self.caller.take()
            && !self.established
        {
            let _ = answer.try_send(Answer::Refused);
        }
    }
}

/// Writes what the socket takes now; `None` if it is broken.
fn write_some(stream: &mut UnixStream, data: &[u8]) -> Option<usize> {
    if data.is_empty() {
        return Some(0);
    }
    loop {
        match stream.write(data) {
            Ok(count) => return Some(count),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Some(0),
            Err(_) => return None,
        }
    }
}
