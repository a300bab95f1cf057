//! A DHCP client (RFC 2131) that knows what a guest needs: ask, take the offer, be told where the
//! router and the name servers are. Leases are not renewed: passt's do not end.
//!
//! It speaks through a packet socket, since servers may answer to the address they are about to
//! give, which the kernel would not accept before it is ours.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::sys;

const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// Where the options begin after the fixed part of a message.
const OPTIONS_AT: usize = 240;
const SERVERS_MAX: usize = 3;

/// What the server gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Our address.
    pub address: Ipv4Addr,
    /// Which part of it is the network.
    pub netmask: Ipv4Addr,
    /// The way out.
    pub router: Option<Ipv4Addr>,
    /// Name servers.
    pub servers: Vec<Ipv4Addr>,
    /// The search domain.
    pub domain: Option<String>,
    /// The largest packet.
    pub mtu: Option<u16>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Discover = 1,
    Offer = 2,
    Request = 3,
    Ack = 5,
}

/// Asks until somebody answers or the waits are used up.
pub fn request(interface: u32, mac: [u8; 6], waits: &[Duration]) -> io::Result<Lease> {
    let socket = sys::packet_socket(interface)?;
    let id =
        u32::from_be_bytes([mac[2], mac[3], mac[4], mac[5]]) ^ std::process::id() ^ 0x6265_7274;
    for &wait in waits {
        let until = Instant::now() + wait;
        sys::broadcast(&socket, interface, &packet(&message(Kind::Discover, id, mac, None)))?;
        let Some(offer) = await_answer(&socket, Kind::Offer, id, mac, until)? else { continue };
        let wanted = Some((offer.lease.address, offer.server));
        sys::broadcast(&socket, interface, &packet(&message(Kind::Request, id, mac, wanted)))?;
        if let Some(ack) = await_answer(&socket, Kind::Ack, id, mac, until)? {
            return Ok(ack.lease);
        }
    }
    Err(io::Error::new(io::ErrorKind::TimedOut, "no DHCP server answered"))
}

/// Parses `52:54:00:12:34:56`.
pub fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let bytes: Option<Vec<u8>> =
        text.split(':').map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes?.try_into().ok()
}

fn await_answer(
    socket: &OwnedFd,
    kind: Kind,
    id: u32,
    mac: [u8; 6],
    until: Instant,
) -> io::Result<Option<Answer>> {
    let mut buffer = [0u8; 2048];
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(None);
        }
        let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)) {
            Ok(0) => return Ok(None),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(errno.into()),
        }
        let read = rustix::io::read(socket, &mut buffer)?;
        let answer = buffer.get(..read).and_then(udp_payload).and_then(|m| parse(m, id, mac));
        if let Some(answer) = answer.filter(|answer| answer.kind == kind) {
            return Ok(Some(answer));
        }
    }
}

fn message(kind: Kind, id: u32, mac: [u8; 6], wanted: Option<(Ipv4Addr, Ipv4Addr)>) -> Vec<u8> {
    let mut bytes = vec![1, 1, 6, 0];
    bytes.extend(id.to_be_bytes());
    bytes.extend([0, 0, 0x80, 0]); // no time passed; answer by broadcast
    bytes.extend([0; 16]); // no addresses yet
    bytes.extend(mac);
    bytes.extend([0; 10 + 64 + 128]);
    bytes.extend(COOKIE);
    bytes.extend([53, 1, kind as u8]);
    if let Some((address, server)) = wanted {
        bytes.extend([50, 4]);
        bytes.extend(address.octets());
        bytes.extend([54, 4]);
        bytes.extend(server.octets());
    }
    // Asked for: netmask, router, name servers, domain, MTU.
    bytes.extend([55, 5, 1, 3, 6, 15, 26, 255]);
    bytes
}

/// Wraps a message into UDP and IPv4, from nobody to everybody.
fn packet(message: &[u8]) -> Vec<u8> {
    let udp_len = (message.len() + 8) as u16;
    let mut header = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255];
    header[2..4].copy_from_slice(&(udp_len + 20).to_be_bytes());
    let sum = checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    header.extend([0, 68, 0, 67]);
    header.extend(udp_len.to_be_bytes());
    header.extend([0, 0]); // IPv4 allows UDP without a checksum
    header.extend(message);
    header
}

fn checksum(header: &[u8]) -> u16 {
    let mut sum: u32 =
        header.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair[1])).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

/// The payload of an IPv4 packet that carries UDP from port 67 to port 68.
fn udp_payload(packet: &[u8]) -> Option<&[u8]> {
    let version = packet.first()?;
    let header_len = usize::from(version & 15) * 4;
    if version >> 4 != 4 || header_len < 20 || *packet.get(9)? != 17 {
        return None;
    }
    // A fragment would continue elsewhere; nobody sends these so small.
    if be16(packet, 6)? & 0x3fff != 0 {
        return None;
    }
    let udp = packet.get(header_len..)?;
    if be16(udp, 0)? != 67 || be16(udp, 2)? != 68 {
        return None;
    }
    udp.get(8..usize::from(be16(udp, 4)?))
}

fn be16(bytes: &[u8], at: usize) -> Option<u16> {
    let pair = bytes.get(at..)?.first_chunk::<2>()?;
    Some(u16::from_be_bytes(*pair))
}

fn address_at(bytes: &[u8], at: usize) -> Option<Ipv4Addr> {
    let four = bytes.get(at..)?.first_chunk::<4>()?;
    Some(Ipv4Addr::from(*four))
}

#[derive(Debug)]
struct Answer {
    kind: Kind,
    server: Ipv4Addr,
    lease: Lease,
}

/// Takes an answer apart; anything not meant for us or damaged is nothing.
fn parse(message: &[u8], id: u32, mac: [u8; 6]) -> Option<Answer> {
    let ours = message.get(4..8)? == id.to_be_bytes() && message.get(28..34)? == mac;
    if *message.first()? != 2 || !ours || message.get(236..OPTIONS_AT)? != COOKIE {
        return None;
    }
    let mut kind = None;
    let mut server = Ipv4Addr::UNSPECIFIED;
    let mut lease = Lease {
        address: address_at(message, 16)?,
        netmask: Ipv4Addr::new(255, 255, 255, 0),
        router: None,
        servers: Vec::new(),
        domain: None,
        mtu: None,
    };
    let mut options = message.get(OPTIONS_AT..)?;
    while let Some((&code, rest)) = options.split_first() {
        options = match code {
            0 => rest,
            255 => break,
            _ => {
                let (&len, rest) = rest.split_first()?;
                let (value, rest) = rest.split_at_checked(usize::from(len))?;
                match code {
                    1 => lease.netmask = address_at(value, 0)?,
                    3 => lease.router = address_at(value, 0),
                    6 => {
                        let addresses =
                            value.chunks_exact(4).filter_map(|four| address_at(four, 0));
                        lease.servers = addresses.take(SERVERS_MAX).collect();
                    }
                    15 => lease.domain = domain(value),
                    26 => lease.mtu = be16(value, 0).filter(|&mtu| mtu >= 576),
                    53 => kind = kind_of(*value.first()?),
                    54 => server = address_at(value, 0)?,
                    _ => {}
                }
                rest
            }
        };
    }
    Some(Answer { kind: kind?, server, lease })
}

fn kind_of(code: u8) -> Option<Kind> {
    match code {
        2 => Some(Kind::Offer),
        5 => Some(Kind::Ack),
        _ => None,
    }
}

/// A domain goes into a file other programs parse: only what host names are made of.
fn domain(value: &[u8]) -> Option<String> {
    let text = std::str::from_utf8(value).ok()?.trim_end_matches('\0');
    let harmless = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
    (!text.is_empty() && text.chars().all(harmless)).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

    fn answer(options: &[u8]) -> Vec<u8> {
        let mut bytes = message(Kind::Discover, 7, MAC, None);
        bytes[0] = 2;
        bytes[16..20].copy_from_slice(&[10, 0, 2, 15]);
        bytes.truncate(OPTIONS_AT);
        bytes.extend(options);
        bytes
    }

    #[test]
    fn an_offer_is_taken_apart() {
        let options = [
            &[53, 1, 2, 0, 54, 4, 10, 0, 2, 2, 1, 4, 255, 255, 0, 0, 3, 4, 10, 0, 2, 2][..],
            &[6, 8, 1, 1, 1, 1, 9, 9, 9, 9, 15, 4, b'l', b'a', b'n', 0, 26, 2, 5, 220, 255],
        ]
        .concat();
        let answer = parse(&answer(&options), 7, MAC).unwrap();
        assert_eq!((answer.kind, answer.server), (Kind::Offer, Ipv4Addr::new(10, 0, 2, 2)));
        assert_eq!(
            answer.lease,
            Lease {
                address: Ipv4Addr::new(10, 0, 2, 15),
                netmask: Ipv4Addr::new(255, 255, 0, 0),
                router: Some(Ipv4Addr::new(10, 0, 2, 2)),
                servers: vec![Ipv4Addr::new(1, 1, 1, 1), Ipv4Addr::new(9, 9, 9, 9)],
                domain: Some("lan".into()),
                mtu: Some(1500),
            }
        );
    }

    #[test]
    fn what_is_not_for_us_or_cut_short_is_nothing() {
        let whole = answer(&[53, 1, 5, 1, 4, 255, 255, 255, 0]);
        assert!(parse(&whole, 7, MAC).is_some());
        assert!(parse(&whole, 8, MAC).is_none());
        assert!(parse(&whole, 7, [0; 6]).is_none());
        for len in 0..whole.len() - 1 {
            // Cut between two options it is still an answer, anywhere else it is none.
            assert_eq!(parse(&whole[..len], 7, MAC).is_some(), len == OPTIONS_AT + 3, "{len}");
        }
    }

    #[test]
    fn packets_carry_a_valid_header() {
        let packet = packet(&message(Kind::Discover, 7, MAC, None));
        assert_eq!(checksum(&packet[..20]), 0);
        let mut back = packet;
        back[20..24].copy_from_slice(&[0, 67, 0, 68]);
        assert_eq!(udp_payload(&back).unwrap(), message(Kind::Discover, 7, MAC, None));
        for len in 0..back.len() {
            assert_eq!(udp_payload(&back[..len]), None);
        }
        assert_eq!(parse_mac("52:54:00:01:02:03"), Some(MAC));
        assert_eq!(parse_mac("52:54:00:01:02"), None);
    }
}
