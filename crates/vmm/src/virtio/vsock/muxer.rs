//! All connections of one guest: finds the one a packet belongs to, and the next packet to send.
//!
//! After every change of a connection `settle` makes the poller's events and the list of
//! connections with output agree with its state. That list and the resets for unknown connections
//! are all the output there is; both are bounded, so packets from the guest are never held back.

use std::collections::{HashMap, VecDeque};
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use vmm_sys_util::epoll::EventSet;

use crate::virtio::device::Poller;
use crate::virtio::limits::{
    VSOCK_CONNECTIONS_MAX, VSOCK_HANDSHAKE_LINE, VSOCK_HANDSHAKES_MAX, VSOCK_RESETS_MAX,
};
use crate::virtio::vsock::connection::{Caller, Connection, Key, Output};
use crate::virtio::vsock::host::{Answer, Call, Shared};
use crate::virtio::vsock::packet::{HOST_CID, Header, Op, TYPE_STREAM};

/// Token of the event that announces calls.
pub(super) const TOKEN_WAKE: u64 = 0;
/// Token of the listening socket.
pub(super) const TOKEN_LISTENER: u64 = 1;
const TOKEN_HANDSHAKES: u64 = 1 << 30;
const TOKEN_CONNECTIONS: u64 = 1 << 31;
const ID_MASK: u32 = (1 << 30) - 1;
/// Host ports of connections to the guest start here, away from what programs listen on.
const FIRST_HOST_PORT: u32 = 1 << 30;

/// Pause after a client could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// A client of the socket path that has not named its port yet.
struct Handshake {
    stream: UnixStream,
    line: Vec<u8>,
}

pub(super) struct Muxer {
    guest_cid: u64,
    path: Option<PathBuf>,
    shared: Arc<Shared>,
    connections: HashMap<u32, Connection>,
    keys: HashMap<Key, u32>,
    ready: VecDeque<u32>,
    resets: VecDeque<Header>,
    handshakes: HashMap<u32, Handshake>,
    next_id: u32,
    next_port: u32,
}

impl Muxer {
    pub fn new(guest_cid: u64, path: Option<PathBuf>, shared: Arc<Shared>) -> Self {
        Self {
            guest_cid,
            path,
            shared,
            connections: HashMap::new(),
            keys: HashMap::new(),
            ready: VecDeque::new(),
            resets: VecDeque::new(),
            handshakes: HashMap::new(),
            next_id: 0,
            next_port: FIRST_HOST_PORT,
        }
    }

    /// Ends everything, without a word to the guest.
    pub fn clear(&mut self) {
        self.connections.clear();
        self.keys.clear();
        self.ready.clear();
        self.resets.clear();
        self.handshakes.clear();
    }

    // ---- from the guest

    /// A packet of the guest; `data` is its payload.
    pub fn receive(&mut self, poller: &Poller, header: &Header, data: &[u8]) {
        if header.src_cid != self.guest_cid || header.dst_cid != HOST_CID {
            return;
        }
        let key = Key { host_port: header.dst_port, guest_port: header.src_port };
        let op = Op::from_raw(header.op).filter(|_| header.kind == TYPE_STREAM);
        match (op, self.keys.get(&key).copied()) {
            (Some(Op::Reset), None) => {}
            (Some(Op::Request), None) => self.open_from_guest(poller, key, header),
            (Some(op), Some(id)) => self.receive_known(poller, id, op, header, data),
            (None, Some(id)) => {
                self.end_with_reset(id);
                self.settle(poller, id);
            }
            (_, None) => self.refuse(header),
        }
    }

    fn receive_known(&mut self, poller: &Poller, id: u32, op: Op, header: &Header, data: &[u8]) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.guest_gone() {
            if op == Op::Request {
                self.refuse(header);
            }
            return;
        }
        connection.update_credit(header);
        let fine = match op {
            Op::Reset => {
                if !connection.reset_by_guest() {
                    self.remove(poller, id);
                    return;
                }
                true
            }
            Op::Response => connection.accept(),
            Op::Shutdown => {
                connection.shutdown_by_guest(header.flags);
                true
            }
            Op::Data => connection.data(data),
            Op::CreditUpdate => true,
            Op::CreditRequest => {
                connection.ask_credit_update();
                true
            }
            Op::Request => false,
        };
        if !fine {
            connection.reset();
        }
        self.settle(poller, id);
    }

    fn open_from_guest(&mut self, poller: &Poller, key: Key, header: &Header) {
        if self.connections.len() >= VSOCK_CONNECTIONS_MAX {
            self.refuse(header);
            return;
        }
        let Some(stream) = self.find_listener(key.host_port) else {
            self.refuse(header);
            return;
        };
        let connection = Connection::from_guest(key, stream, header);
        self.insert(poller, connection);
    }

    /// A socket to whoever listens on a port of the host.
    fn find_listener(&self, port: u32) -> Option<UnixStream> {
        if self.shared.has_listener(port) {
            let (near, far) = UnixStream::pair().ok()?;
            far.set_nonblocking(true).ok()?;
            if self.shared.deliver(port, near).is_ok() {
                return Some(far);
            }
        }
        let mut name = self.path.as_ref()?.clone().into_os_string();
        name.push(format!("_{port}"));
        connect_nonblocking(Path::new(&name)).ok()
    }

    /// Answers a packet for no connection with RST.
    fn refuse(&mut self, header: &Header) {
        if self.resets.len() < VSOCK_RESETS_MAX {
            self.resets.push_back(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: header.dst_port,
                dst_port: header.src_port,
                kind: header.kind,
                op: Op::Reset as u16,
                ..Header::default()
            });
        }
    }

    // ---- to the guest

    /// Whether there may be a packet for the guest.
    pub fn has_output(&self) -> bool {
        !self.resets.is_empty() || !self.ready.is_empty()
    }

    /// The next packet for the guest, with at most `buffer.len()` bytes of data.
    pub fn output(&mut self, poller: &Poller, buffer: &mut [u8]) -> Option<Header> {
        if let Some(reset) = self.resets.pop_front() {
            return Some(reset);
        }
        while let Some(id) = self.ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            connection.queued = false;
            match connection.output(self.guest_cid, buffer) {
                Output::Packet(header) => {
                    self.settle(poller, id);
                    return Some(header);
                }
                Output::Last(header) => {
                    self.remove(poller, id);
                    return Some(header);
                }
                Output::Nothing => self.watch(poller, id),
            }
        }
        None
    }

    // ---- from the host

    /// Takes the calls that wait.
    pub fn take_calls(&mut self, poller: &Poller) {
        // Nothing to read only means that these calls were taken before.
        let _ = self.shared.wake.read();
        while let Some(call) = self.shared.next_call() {
            let Call { port, stream, answer, .. } = call;
            let Some(key) = self.free_key(port) else {
                // Fails only if the caller has given up.
                let _ = answer.try_send(Answer::TooMany);
                continue;
            };
            self.insert(poller, Connection::from_host(key, stream, Caller::Thread(answer)));
        }
    }

    fn free_key(&mut self, guest_port: u32) -> Option<Key> {
        if self.connections.len() >= VSOCK_CONNECTIONS_MAX {
            return None;
        }
        // More tries than connections: one of them must be free.
        for _ in 0..=VSOCK_CONNECTIONS_MAX {
            let host_port = self.next_port;
            self.next_port =
                host_port.checked_add(1).unwrap_or(FIRST_HOST_PORT).max(FIRST_HOST_PORT);
            let key = Key { host_port, guest_port };
            if !self.keys.contains_key(&key) {
                return Some(key);
            }
        }
        None
    }

    /// Takes the clients that wait at the socket path.
    pub fn take_clients(&mut self, poller: &Poller, listener: &UnixListener) {
        for _ in 0..VSOCK_HANDSHAKES_MAX {
            let stream = match listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(_) => {
                    // Out of descriptors, most likely: the client still waits, and the poller
                    // would call again at once.
                    std::thread::sleep(ACCEPT_PAUSE);
                    return;
                }
            };
            // A client too many is closed at once.
            if self.handshakes.len() >= VSOCK_HANDSHAKES_MAX
                || stream.set_nonblocking(true).is_err()
            {
                continue;
            }
            let id = self.fresh_id();
            let token = TOKEN_HANDSHAKES | u64::from(id);
            if poller.add(stream.as_raw_fd(), token, EventSet::IN).is_ok() {
                self.handshakes.insert(id, Handshake { stream, line: Vec::new() });
            }
        }
    }

    /// A socket registered by the muxer is ready.
    pub fn socket_event(&mut self, poller: &Poller, token: u64, events: EventSet) {
        let id = (token as u32) & ID_MASK;
        if token & TOKEN_CONNECTIONS != 0 {
            self.connection_event(poller, id, events);
        } else if token & TOKEN_HANDSHAKES != 0 {
            self.handshake_event(poller, id);
        }
    }

    fn connection_event(&mut self, poller: &Poller, id: u32, events: EventSet) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if events.contains(EventSet::OUT) && !connection.writable() {
            if connection.guest_gone() {
                self.remove(poller, id);
                return;
            }
            connection.reset();
        }
        if events.contains(EventSet::IN) {
            connection.mark_readable();
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.hang_up();
            // A hang-up is reported again and again, wanted or not.
            poller.remove(connection.stream.as_raw_fd());
            connection.interest = None;
            if connection.guest_gone() {
                self.remove(poller, id);
                return;
            }
        }
        self.settle(poller, id);
    }

    fn handshake_event(&mut self, poller: &Poller, id: u32) {
        let Some(handshake) = self.handshakes.get_mut(&id) else { return };
        let port = loop {
            // Byte by byte: what follows the line belongs to the guest.
            let mut byte = [0];
            match handshake.stream.read(&mut byte) {
                Ok(1) if byte[0] == b'\n' => break parse_connect(&handshake.line),
                Ok(1) if handshake.line.len() < VSOCK_HANDSHAKE_LINE => {
                    handshake.line.push(byte[0]);
                }
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Ok(_) | Err(_) => break None,
            }
        };
        let Some(Handshake { stream, .. }) = self.handshakes.remove(&id) else { return };
        poller.remove(stream.as_raw_fd());
        let key = port.and_then(|port| self.free_key(port));
        if let Some(key) = key {
            self.insert(poller, Connection::from_host(key, stream, Caller::Client));
        }
    }

    // ---- bookkeeping

    fn fresh_id(&mut self) -> u32 {
        // There are far fewer connections and handshakes than numbers.
        loop {
            self.next_id = self.next_id.wrapping_add(1) & ID_MASK;
            let id = self.next_id;
            if !self.connections.contains_key(&id) && !self.handshakes.contains_key(&id) {
                return id;
            }
        }
    }

    fn insert(&mut self, poller: &Poller, mut connection: Connection) {
        let id = self.fresh_id();
        let token = TOKEN_CONNECTIONS | u64::from(id);
        let events = connection.wanted();
        match poller.add(connection.stream.as_raw_fd(), token, events) {
            Ok(()) => connection.interest = Some(events),
            Err(_) => connection.reset(),
        }
        self.keys.insert(connection.key, id);
        self.connections.insert(id, connection);
        self.settle(poller, id);
    }

    fn end_with_reset(&mut self, id: u32) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.reset();
        }
    }

    fn settle(&mut self, poller: &Poller, id: u32) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        if connection.guest_gone() && !connection.wanted().contains(EventSet::OUT) {
            self.remove(poller, id);
            return;
        }
        if connection.has_output() && !connection.queued {
            connection.queued = true;
            self.ready.push_back(id);
        }
        self.watch(poller, id);
    }

    fn watch(&mut self, poller: &Poller, id: u32) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let wanted = connection.wanted();
        if connection.interest.is_some_and(|interest| interest != wanted) {
            let token = TOKEN_CONNECTIONS | u64::from(id);
            if poller.modify(connection.stream.as_raw_fd(), token, wanted).is_ok() {
                connection.interest = Some(wanted);
            }
        }
    }

    fn remove(&mut self, poller: &Poller, id: u32) {
        if let Some(connection) = self.connections.remove(&id) {
            poller.remove(connection.stream.as_raw_fd());
            self.keys.remove(&connection.key);
        }
    }
}

/// The port of a line `CONNECT <port>`.
fn parse_connect(line: &[u8]) -> Option<u32> {
    let line = std::str::from_utf8(line).ok()?;
    line.trim_end_matches('\r').strip_prefix("CONNECT ")?.trim().parse().ok()
}

/// Connects without waiting: a listener whose backlog is full must not stop the device.
fn connect_nonblocking(path: &Path) -> std::io::Result<UnixStream> {
    let bytes = path.as_os_str().as_bytes();
    // SAFETY: sockaddr_un is plain data, for which zeroes are a valid value.
    let mut address: libc::sockaddr_un = unsafe { std::mem::zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    // One byte stays zero, as the terminator.
    if bytes.len() >= address.sun_path.len() || bytes.contains(&0) {
        return Err(std::io::ErrorKind::InvalidInput.into());
    }
    for (target, byte) in address.sun_path.iter_mut().zip(bytes) {
        *target = *byte as libc::c_char;
    }
    let kind = libc::SOCK_STREAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
    // SAFETY: no memory is passed.
    let raw = unsafe { libc::socket(libc::AF_UNIX, kind, 0) };
    if raw < 0 {
        return Err(std::io::Error::last_os_error());
    }
    // SAFETY: the descriptor was just made and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(raw) };
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the address is a live sockaddr_un of the length given, its path terminated.
    let result = unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), len) };
    if result != 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(UnixStream::from(socket))
}
