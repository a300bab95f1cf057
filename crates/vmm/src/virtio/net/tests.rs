//! The network card as the guest uses it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Command;

use crate::virtio::net::device::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_HOST_TSO4, F_MAC, F_MRG_RXBUF, F_MTU, F_STATUS, Mac, Net,
};
use crate::virtio::net::passt::{Passt, PasstConfig, PasstError};
use crate::virtio::net::stream::Stream;
use crate::virtio::net::tap::{Tap, TapError};
use crate::virtio::testing::{Guest, Part};

const MAC: Mac = Mac([2, 0, 0, 0, 0, 9]);
const FEATURES: u64 = F_MAC | F_STATUS | F_MTU;

fn start(features: u64) -> (Guest, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    let mut guest = Guest::new(Net::new(Stream::new(far, Some(65_520)).unwrap(), MAC));
    guest.start(features, 0);
    (guest, near)
}

fn send_frame(socket: &mut UnixStream, frame: &[u8]) {
    let mut raw = (frame.len() as u32).to_be_bytes().to_vec();
    raw.extend(frame);
    socket.write_all(&raw).unwrap();
}

fn read_frame(socket: &mut UnixStream) -> Vec<u8> {
    let mut len = [0; 4];
    socket.read_exact(&mut len).unwrap();
    let mut frame = vec![0; u32::from_be_bytes(len) as usize];
    socket.read_exact(&mut frame).unwrap();
    frame
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i as u8).wrapping_mul(13).wrapping_add(seed)).collect()
}

#[test]
fn shows_its_configuration() {
    let (guest, _socket) = start(FEATURES);
    assert_eq!(guest.device_config(0, 6), 0x0900_0000_0002);
    assert_eq!(guest.device_config(6, 2), 1);
    assert_eq!(guest.device_config(10, 2), 65_520);
    let random = Mac::random().unwrap();
    assert_eq!(random.0[0] & 3, 2);
    assert_ne!(random, Mac::random().unwrap());
}

#[test]
fn sends_and_receives_in_order() {
    let (mut guest, mut socket) = start(FEATURES);
    for _ in 0..64 {
        guest.add(0, &[Part::In(12), Part::In(1600)], false);
    }
    guest.kick(0);
    for round in 0..10u8 {
        for i in 0..30u8 {
            let frame = pattern(60 + usize::from(i) * 40, round ^ i);
            guest.add(1, &[Part::Out(&[0; 12]), Part::Out(&frame)], i % 2 == 0);
            send_frame(&mut socket, &frame);
        }
        guest.kick(1);
        for i in 0..30u8 {
            let frame = pattern(60 + usize::from(i) * 40, round ^ i);
            assert_eq!(read_frame(&mut socket), frame);
            let (_, len, data) = guest.used(0);
            assert_eq!(len as usize, 12 + frame.len());
            assert_eq!(data[..10], [0; 10]);
            assert_eq!(data[10..12], [1, 0]);
            assert_eq!(data[12..len as usize], frame);
            guest.used(1);
            guest.add(0, &[Part::In(12), Part::In(1600)], false);
        }
        guest.kick(0);
    }
}

#[test]
fn a_large_frame_fills_several_buffers() {
    let (mut guest, mut socket) = start(FEATURES | F_MRG_RXBUF);
    let frame = pattern(65_000, 3);
    send_frame(&mut socket, &frame);
    // Too few buffers: the frame waits until there are enough.
    for _ in 0..10 {
        guest.add(0, &[Part::In(1536)], false);
    }
    guest.kick(0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert!(guest.poll_used(0).is_none());
    for _ in 0..60 {
        guest.add(0, &[Part::In(1536)], false);
    }
    guest.kick(0);
    let (_, len, first) = guest.used(0);
    assert_eq!(len, 1536);
    let count = u16::from_le_bytes([first[10], first[11]]);
    assert_eq!(usize::from(count), (65_000 + 12usize).div_ceil(1536));
    let mut got = first[12..].to_vec();
    for _ in 1..count {
        // All of them are there at once.
        let (_, len, data) = guest.poll_used(0).unwrap();
        got.extend(&data[..len as usize]);
    }
    assert_eq!(got, frame);
    send_frame(&mut socket, b"small frame");
    assert_eq!(guest.used(0).2[12..23], *b"small frame");
}

#[test]
fn frames_that_do_not_fit_are_dropped() {
    let (mut guest, mut socket) = start(FEATURES);
    guest.add(0, &[Part::In(200)], false);
    guest.kick(0);
    send_frame(&mut socket, &pattern(500, 0));
    send_frame(&mut socket, &pattern(100, 1));
    let (_, len, data) = guest.used(0);
    assert_eq!((len, &data[12..112]), (112, &pattern(100, 1)[..]));
    // Without even a header, and too long: given back, not sent.
    guest.request(1, &[Part::Out(&[0; 5])], false);
    guest.request(1, &[Part::Out(&[0; 12])], false);
    guest.request(1, &[Part::Out(&vec![0; 100_000])], false);
    guest.request(1, &[Part::Out(&[0; 12]), Part::Out(b"good")], false);
    assert_eq!(read_frame(&mut socket), b"good");
}

#[test]
fn a_slow_backend_holds_the_guest_back_and_loses_nothing() {
    let (mut guest, mut socket) = start(FEATURES);
    let frame = pattern(60_000, 5);
    let reader = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        (0..500).all(|_| read_frame(&mut socket) == pattern(60_000, 5))
    });
    let mut pending = 0;
    for _ in 0..500 {
        guest.add(1, &[Part::Out(&[0; 12]), Part::Out(&frame)], false);
        guest.kick(1);
        pending += 1;
        if pending == 100 {
            guest.used(1);
            pending -= 1;
        }
    }
    for _ in 0..pending {
        guest.used(1);
    }
    assert!(reader.join().unwrap());
}

#[test]
fn a_dead_backend_takes_the_link_down() {
    let (mut guest, socket) = start(FEATURES);
    guest.add(0, &[Part::In(1600)], false);
    guest.kick(0);
    drop(socket);
    let sink = std::sync::Arc::clone(&guest.sink);
    sink.wait_until("the link to go down", || guest.device_config(6, 2) == 0);
    guest.request(1, &[Part::Out(&[0; 12]), Part::Out(b"lost")], false);
    assert_eq!(guest.status(), 0xf);
    // A peer that breaks the framing is as good as dead.
    let (mut guest, mut socket) = start(FEATURES);
    guest.add(0, &[Part::In(1600)], false);
    guest.kick(0);
    socket.write_all(&[0xff; 64]).unwrap();
    let sink = std::sync::Arc::clone(&guest.sink);
    sink.wait_until("the link to go down", || guest.device_config(6, 2) == 0);
}

#[test]
fn each_card_has_an_address_of_its_own() {
    let all: std::collections::HashSet<_> = (0..1000).map(|_| Mac::random().unwrap().0).collect();
    assert_eq!(all.len(), 1000);
    // Locally administered, for one station (IEEE 802, 8.2).
    assert!(all.iter().all(|mac| mac[0] & 3 == 2));
}

#[test]
fn passt_answers_dhcp() {
    // passt confines itself in one; within chroot(2) there are none.
    if !Command::new("unshare").args(["--user", "true"]).status().is_ok_and(|s| s.success()) {
        return println!("skipped: no user namespaces here, which passt needs");
    }
    let stream = match Passt::start(&PasstConfig::default()) {
        Ok(started) => started,
        Err(PasstError::Start { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return println!("skipped: passt is not installed");
        }
        Err(error) => panic!("{error}"),
    };
    let mut guest = Guest::new(Net::new(stream, MAC));
    guest.start(FEATURES | F_MRG_RXBUF, 0);
    for _ in 0..64 {
        guest.add(0, &[Part::In(2048)], false);
    }
    guest.kick(0);
    guest.request(1, &[Part::Out(&[0; 12]), Part::Out(&dhcp_discover())], false);
    let sink = std::sync::Arc::clone(&guest.sink);
    let mut offered = false;
    sink.wait_until("a DHCP offer", || {
        while let Some((_, _, data)) = guest.poll_used(0) {
            let frame = &data[12..];
            // UDP to port 68, a reply with our transaction.
            offered |= frame[23] == 17 && frame[36..38] == [0, 68] && frame[46..50] == *b"dhcp";
        }
        offered
    });
    // passt ends when its socket is closed; dropping waits for that.
    let started = std::time::Instant::now();
    drop(guest);
    assert!(started.elapsed() < std::time::Duration::from_millis(450));
}

fn dhcp_discover() -> Vec<u8> {
    let mut bootp = vec![1, 1, 6, 0];
    bootp.extend(b"dhcp");
    bootp.resize(28, 0);
    bootp.extend(MAC.0);
    bootp.resize(236, 0);
    bootp.extend([0x63, 0x82, 0x53, 0x63, 53, 1, 1, 255]);
    bootp.resize(300, 0);
    let mut frame = vec![0xff; 6];
    frame.extend(MAC.0);
    frame.extend([8, 0]);
    let total = (28 + bootp.len()) as u16;
    let mut ip = vec![0x45, 0];
    ip.extend(total.to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    let mut sum: u32 =
        ip.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    ip[10..12].copy_from_slice(&(!(sum as u16)).to_be_bytes());
    frame.extend(ip);
    frame.extend([0, 68, 0, 67]);
    frame.extend((total - 20).to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(bootp);
    frame
}

#[test]
fn a_missing_program_is_named() {
    let config = PasstConfig { program: "/nonexistent/passt".into(), ..PasstConfig::default() };
    let error = Passt::start(&config).map(drop).unwrap_err();
    assert!(error.to_string().contains("/nonexistent/passt"));
}

/// With the right to make interfaces: a frame of the guest appears on the host's interface, one of
/// the host in the guest.
#[test]
fn a_tap_interface_carries_frames() {
    let name = format!("berth{}", std::process::id() % 100_000);
    let tap = match Tap::open(&name) {
        Ok(tap) => tap,
        Err(error) => return println!("no tap interfaces here ({error}): nothing to test"),
    };
    let up = Command::new("ip")
        .args(["link", "set", &name, "up", "address", "02:00:00:00:00:01"])
        .status();
    if !up.is_ok_and(|status| status.success()) {
        return println!("the interface cannot be switched on: nothing to test");
    }
    let mut guest = Guest::new(Net::new(tap, MAC));
    let offered = guest.device_features();
    assert_eq!(offered & (F_CSUM | F_HOST_TSO4), F_CSUM | F_HOST_TSO4);
    guest.start(F_MAC | F_STATUS | F_MRG_RXBUF | F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4, 0);
    for _ in 0..64 {
        guest.add(0, &[Part::In(2048)], false);
    }
    guest.kick(0);
    // The interface being switched on makes the host's kernel send frames (IPv6 discovery) where
    // IPv6 is on; the guest's own frame is counted by the interface.
    let frame = [&[0xff; 6][..], &MAC.0, &[0x88, 0xb5], &[7; 50]].concat();
    guest.request(1, &[Part::Out(&[0; 12]), Part::Out(&frame)], false);
    let counter = format!("/sys/class/net/{name}/statistics/rx_packets");
    let sink = std::sync::Arc::clone(&guest.sink);
    sink.wait_until("the frame on the interface", || {
        std::fs::read_to_string(&counter).is_ok_and(|count| count.trim() == "1")
    });
    // An address on the interface makes pings leave as ARP requests to the guest.
    let ip = |arguments: &[&str]| Command::new("ip").args(arguments).status();
    ip(&["address", "add", "198.18.77.1/30", "dev", &name]).unwrap();
    let socket = std::net::UdpSocket::bind("198.18.77.1:0").unwrap();
    socket.send_to(b"x", "198.18.77.2:9").unwrap();
    let mut asked = false;
    sink.wait_until("an ARP request", || {
        while let Some((_, len, data)) = guest.poll_used(0) {
            let frame = &data[12..len as usize];
            asked |= frame[12..14] == [8, 6] && frame[38..42] == [198, 18, 77, 2];
        }
        asked
    });
}

#[test]
fn impossible_interfaces_are_refused() {
    for name in ["", "a-name-that-is-far-too-long", "a/b"] {
        let refused = Tap::open(name).map(drop).unwrap_err();
        assert!(matches!(refused, TapError::Name { .. } | TapError::Open(_)), "{name}");
    }
}
