//! Streams through the device, with a small vsock driver in the fake guest.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::virtio::testing::{Guest, Part};
use crate::virtio::vsock::device::{VsockConfig, VsockDevice};
use crate::virtio::vsock::host::{Vsock, VsockError};
use crate::virtio::vsock::packet::{
    HEADER_SIZE, HOST_CID, Header, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND, TYPE_STREAM,
};

const WAIT: Duration = Duration::from_secs(20);
const RX_BUFFERS: usize = 32;
const RX_SIZE: u32 = 4096 + HEADER_SIZE as u32;
const GUEST_BUFFER: u32 = 64 * 1024;

/// A driver that answers nothing by itself.
struct Driver {
    guest: Guest,
    arrived: VecDeque<(Header, Vec<u8>)>,
}

impl Driver {
    fn new(config: &VsockConfig) -> (Self, Vsock) {
        let (device, vsock) = VsockDevice::new(config).unwrap();
        let mut driver = Self { guest: Guest::new(device), arrived: VecDeque::new() };
        driver.start();
        (driver, vsock)
    }

    fn start(&mut self) {
        self.guest.start(0, 0);
        for _ in 0..RX_BUFFERS {
            self.guest.add(0, &[Part::In(RX_SIZE)], false);
        }
        self.guest.kick(0);
    }

    fn send(&mut self, header: &Header, data: &[u8]) {
        let raw = Header { len: data.len() as u32, ..*header }.encode();
        while self.guest.poll_used(1).is_some() {}
        if data.is_empty() {
            self.guest.add(1, &[Part::Out(&raw)], false);
        } else {
            self.guest.add(1, &[Part::Out(&raw), Part::Out(data)], false);
        }
        self.guest.kick(1);
        // A transmit buffer always comes back.
        self.guest.used(1);
    }

    /// The next packet that has arrived, if any; its buffer is offered again.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        if let Some((_, len, raw)) = self.guest.poll_used(0) {
            let header = Header::parse(raw[..HEADER_SIZE].try_into().unwrap());
            assert_eq!(len, HEADER_SIZE as u32 + header.len);
            self.guest.add(0, &[Part::In(RX_SIZE)], false);
            self.guest.kick(0);
            let data = raw[HEADER_SIZE..len as usize].to_vec();
            self.arrived.push_back((header, data));
        }
        self.arrived.pop_front()
    }

    fn next(&mut self) -> (Header, Vec<u8>) {
        let sink = Arc::clone(&self.guest.sink);
        let mut packet = None;
        sink.wait_until("a vsock packet", || {
            packet = self.poll();
            packet.is_some()
        });
        packet.unwrap()
    }

    fn expect(&mut self, op: Op) -> (Header, Vec<u8>) {
        let (header, data) = self.next();
        assert_eq!(Op::from_raw(header.op), Some(op), "{header:?}");
        assert_eq!((header.src_cid, header.dst_cid, header.kind), (2, 3, TYPE_STREAM));
        (header, data)
    }

    fn expect_nothing(&mut self) {
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(self.poll(), None);
    }
}

fn packet(guest_port: u32, host_port: u32, op: Op) -> Header {
    Header {
        src_cid: 3,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        kind: TYPE_STREAM,
        op: op as u16,
        buf_alloc: GUEST_BUFFER,
        ..Header::default()
    }
}

/// Connects from the host to guest port 10; returns the host's stream and the host's port.
fn connected(driver: &mut Driver, vsock: &Vsock) -> (UnixStream, u32) {
    let handle = vsock.clone();
    let caller = std::thread::spawn(move || handle.connect(10, WAIT));
    let (request, _) = driver.expect(Op::Request);
    assert_eq!(request.dst_port, 10);
    driver.send(&packet(10, request.src_port, Op::Response), &[]);
    (caller.join().unwrap().unwrap(), request.src_port)
}

fn path(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("berth-{}-{name}.sock", std::process::id()))
}

#[test]
fn the_host_connects_and_both_sides_talk_and_close() {
    let (mut driver, vsock) = Driver::new(&VsockConfig::default());
    assert_eq!(driver.guest.device_config(0, 8), 3);
    let (mut stream, port) = connected(&mut driver, &vsock);
    stream.write_all(b"hello").unwrap();
    assert_eq!(driver.expect(Op::Data).1, b"hello");
    driver.send(&packet(10, port, Op::Data), b"world");
    let mut data = [0; 5];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"world");
    // The host closes its half; the guest may still send.
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(driver.expect(Op::Shutdown).0.flags, SHUTDOWN_SEND);
    driver.send(&packet(10, port, Op::Data), b"more");
    let mut rest = vec![0; 4];
    stream.read_exact(&mut rest).unwrap();
    assert_eq!(rest, b"more");
    let closing = Header { flags: SHUTDOWN_BOTH, ..packet(10, port, Op::Shutdown) };
    driver.send(&closing, &[]);
    driver.expect(Op::Reset);
    assert_eq!(stream.read(&mut data).unwrap(), 0);
}

#[test]
fn the_host_closing_everything_is_told() {
    let (mut driver, vsock) = Driver::new(&VsockConfig::default());
    let (mut stream, port) = connected(&mut driver, &vsock);
    stream.write_all(b"last words").unwrap();
    drop(stream);
    assert_eq!(driver.expect(Op::Data).1, b"last words");
    // The end of the data may be seen a moment before the hang-up; then it is told in two steps.
    let mut flags = driver.expect(Op::Shutdown).0.flags;
    if flags == SHUTDOWN_SEND {
        flags = driver.expect(Op::Shutdown).0.flags;
    }
    assert_eq!(flags, SHUTDOWN_BOTH);
    driver.send(&packet(10, port, Op::Reset), &[]);
    driver.expect_nothing();
}

#[test]
fn refused_and_unanswered_connections() {
    let (mut driver, vsock) = Driver::new(&VsockConfig::default());
    let handle = vsock.clone();
    let caller = std::thread::spawn(move || handle.connect(77, WAIT));
    let (request, _) = driver.expect(Op::Request);
    driver.send(&packet(77, request.src_port, Op::Reset), &[]);
    assert!(matches!(caller.join().unwrap(), Err(VsockError::Refused { port: 77 })));

    let silent = vsock.connect(78, Duration::from_millis(20));
    assert!(matches!(silent, Err(VsockError::TimedOut { port: 78, .. })));
    // The guest hears of both the request and its end.
    driver.expect(Op::Request);
    driver.expect(Op::Reset);

    drop(driver);
    assert!(matches!(vsock.connect(79, WAIT), Err(VsockError::Gone)));
}

#[test]
fn a_call_waits_for_the_driver() {
    let (device, vsock) = VsockDevice::new(&VsockConfig::default()).unwrap();
    let mut driver = Driver { guest: Guest::new(device), arrived: VecDeque::new() };
    let caller = std::thread::spawn(move || vsock.connect(10, WAIT));
    std::thread::sleep(Duration::from_millis(20));
    driver.start();
    let (request, _) = driver.expect(Op::Request);
    driver.send(&packet(10, request.src_port, Op::Response), &[]);
    assert!(caller.join().unwrap().is_ok());
}

#[test]
fn the_guest_connects_to_a_registered_listener() {
    let (mut driver, vsock) = Driver::new(&VsockConfig::default());
    driver.send(&packet(500, 99, Op::Request), &[]);
    driver.expect(Op::Reset);

    let streams = vsock.listen(99).unwrap();
    assert!(matches!(vsock.listen(99), Err(VsockError::PortTaken { port: 99 })));
    driver.send(&packet(500, 99, Op::Request), &[]);
    driver.expect(Op::Response);
    let mut stream = streams.recv_timeout(WAIT).unwrap();
    driver.send(&packet(500, 99, Op::Data), b"ping");
    let mut data = [0; 4];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"ping");
    stream.write_all(b"pong").unwrap();
    assert_eq!(driver.expect(Op::Data).1, b"pong");
    // A second request with the same ports ends the connection.
    driver.send(&packet(500, 99, Op::Request), &[]);
    driver.expect(Op::Reset);
    assert_eq!(stream.read(&mut data).unwrap(), 0);
    drop(streams);
    driver.send(&packet(501, 99, Op::Request), &[]);
    driver.expect(Op::Reset);
    assert!(vsock.listen(99).is_ok());
}

#[test]
fn sockets_beside_the_process() {
    let path = path("vsock");
    let config = VsockConfig { path: Some(path.clone()), ..VsockConfig::default() };
    let (mut driver, _vsock) = Driver::new(&config);
    // Host to guest by the line protocol.
    let mut client = UnixStream::connect(&path).unwrap();
    client.write_all(b"CONNECT 10\nearly").unwrap();
    let (request, _) = driver.expect(Op::Request);
    assert_eq!(request.dst_port, 10);
    driver.send(&packet(10, request.src_port, Op::Response), &[]);
    assert_eq!(driver.expect(Op::Data).1, b"early");
    let expected = format!("OK {}\n", request.src_port);
    let mut line = vec![0; expected.len()];
    client.read_exact(&mut line).unwrap();
    assert_eq!(line, expected.as_bytes());
    driver.send(&packet(10, request.src_port, Op::Data), b"late");
    let mut data = [0; 4];
    client.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"late");
    // Nonsense is closed.
    for nonsense in [&b"HELLO\n"[..], b"CONNECT x\n", &[b'A'; 100]] {
        let mut client = UnixStream::connect(&path).unwrap();
        client.write_all(nonsense).unwrap();
        let end = client.read(&mut data);
        assert!(
            matches!(&end, Ok(0)) || end.is_err_and(|e| e.kind() == ErrorKind::ConnectionReset)
        );
    }
    // Guest to host.
    let mut name = path.clone().into_os_string();
    name.push("_1234");
    let listener = UnixListener::bind(&name).unwrap();
    driver.send(&packet(600, 1234, Op::Request), &[]);
    driver.expect(Op::Response);
    let (mut accepted, _) = listener.accept().unwrap();
    driver.send(&packet(600, 1234, Op::Data), b"data");
    accepted.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"data");
    std::fs::remove_file(&name).unwrap();
    drop(driver);
    assert!(!path.exists());
}

#[test]
fn no_data_without_credit() {
    let (mut driver, vsock) = Driver::new(&VsockConfig::default());
    let (mut stream, port) = connected(&mut driver, &vsock);
    stream.set_nonblocking(true).unwrap();
    let mut sent = 0;
    let block = [7; 8192];
    let mut got = 0;
    // Everything the guest's buffer takes, then a question instead of more.
    let asked = loop {
        if let Ok(count) = stream.write(&block) {
            sent += count;
        }
        let (header, data) = driver.next();
        got += data.len() as u32;
        if header.op == Op::CreditRequest as u16 {
            break header;
        }
    };
    assert_eq!(got, GUEST_BUFFER);
    assert!(sent > got as usize);
    driver.expect_nothing();
    let update = Header { fwd_cnt: 1000, ..packet(10, asked.src_port, Op::CreditUpdate) };
    driver.send(&update, &[]);
    assert_eq!(driver.expect(Op::Data).1.len(), 1000);
    assert_eq!(port, asked.src_port);
}

#[test]
fn a_guest_that_ignores_its_credit_is_cut_off() {
    let (mut driver, vsock) = Driver::new(&VsockConfig::default());
    let (stream, port) = connected(&mut driver, &vsock);
    // Nobody reads the stream; at some time the credit is used up.
    let block = [1; 32 * 1024];
    let mut ended = false;
    for _ in 0..100 {
        driver.send(&packet(10, port, Op::Data), &block);
        while let Some((header, _)) = driver.poll() {
            ended |= header.op == Op::Reset as u16;
        }
        if ended {
            break;
        }
    }
    assert!(ended);
    drop(stream);
}

/// Echoes 10 MB: the host writes and reads at the same time, the guest sends back what it gets and
/// obeys the credit it is given.
#[test]
fn echoes_ten_megabytes() {
    const TOTAL: usize = 10 << 20;
    let (mut driver, vsock) = Driver::new(&VsockConfig::default());
    let (stream, port) = connected(&mut driver, &vsock);
    let mut writer = stream.try_clone().unwrap();
    let byte = |i: usize| (i * 31 + (i >> 8)) as u8;
    let writing = std::thread::spawn(move || {
        let data: Vec<u8> = (0..TOTAL).map(byte).collect();
        writer.write_all(&data).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut reader = stream;
    let reading = std::thread::spawn(move || {
        let mut data = Vec::new();
        reader.read_to_end(&mut data).unwrap();
        data
    });
    let mut queue: VecDeque<u8> = VecDeque::new();
    let (mut received, mut sent) = (0u32, 0u32);
    let (mut host_buffer, mut host_forwarded) = (256 * 1024, 0u32);
    let mut closing = false;
    let sink = Arc::clone(&driver.guest.sink);
    while !(closing && queue.is_empty()) {
        let mut packets = Vec::new();
        sink.wait_until("progress of the echo", || {
            packets.extend(driver.poll());
            !packets.is_empty() || (!queue.is_empty() && host_buffer > sent - host_forwarded)
        });
        for (header, data) in packets {
            (host_buffer, host_forwarded) = (header.buf_alloc, header.fwd_cnt);
            received += data.len() as u32;
            queue.extend(data);
            closing |= header.op == Op::Shutdown as u16;
            assert_ne!(header.op, Op::Reset as u16);
        }
        let credit = host_buffer - (sent - host_forwarded);
        let part = queue.len().min(credit as usize).min(16 * 1024);
        if part > 0 {
            let data: Vec<u8> = queue.drain(..part).collect();
            sent += part as u32;
            let header = packet(10, port, Op::Data);
            driver.send(&Header { fwd_cnt: received - queue.len() as u32, ..header }, &data);
        }
        if received.is_multiple_of(GUEST_BUFFER) || part == 0 {
            let header = packet(10, port, Op::CreditUpdate);
            driver.send(&Header { fwd_cnt: received - queue.len() as u32, ..header }, &[]);
        }
    }
    let end = Header { flags: SHUTDOWN_BOTH, ..packet(10, port, Op::Shutdown) };
    driver.send(&end, &[]);
    writing.join().unwrap();
    let data = reading.join().unwrap();
    assert_eq!(data.len(), TOTAL);
    assert!(data.iter().enumerate().all(|(i, value)| *value == byte(i)));
}

#[test]
fn packets_for_nobody_and_broken_ones() {
    let (mut driver, vsock) = Driver::new(&VsockConfig::default());
    driver.send(&packet(1, 2, Op::Data), b"x");
    driver.expect(Op::Reset);
    driver.send(&packet(1, 2, Op::Reset), &[]);
    driver.send(&Header { dst_cid: 9, ..packet(1, 2, Op::Data) }, &[]);
    driver.send(&Header { src_cid: 9, ..packet(1, 2, Op::Data) }, &[]);
    // A length that the chain does not have.
    let raw = Header { len: 4000, ..packet(1, 2, Op::Data) }.encode();
    driver.guest.request(1, &[Part::Out(&raw)], false);
    driver.guest.request(1, &[Part::Out(&raw[..20])], false);
    driver.expect_nothing();
    let (mut stream, port) = connected(&mut driver, &vsock);
    driver.send(&Header { op: 99, ..packet(10, port, Op::Data) }, &[]);
    driver.expect(Op::Reset);
    assert_eq!(stream.read(&mut [0; 4]).unwrap(), 0);
}

#[test]
fn a_reset_of_the_device_ends_all_streams() {
    let (mut driver, vsock) = Driver::new(&VsockConfig::default());
    let (mut stream, _) = connected(&mut driver, &vsock);
    driver.start();
    assert_eq!(stream.read(&mut [0; 4]).unwrap(), 0);
    let (mut stream, port) = connected(&mut driver, &vsock);
    driver.send(&packet(10, port, Op::Data), b"again");
    let mut data = [0; 5];
    stream.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"again");
}
