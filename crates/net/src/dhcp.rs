//! DHCP (RFC 2131) for the members of a network, and nobody else: each has its address anyway, and this
//! says it. Nothing is remembered between messages, so that a server that was away goes on as before.

use std::net::Ipv4Addr;

use dhcproto::v4::{
    Decodable, Decoder, DhcpOption, Encodable, Encoder, HType, Message, MessageType, Opcode,
    OptionCode,
};

use crate::view::{Host, View};

/// Where the cookie that makes BOOTP's message DHCP's is, and what it is.
const COOKIE_AT: usize = 236;
const COOKIE: [u8; 4] = [99, 130, 83, 99];
/// The least size of a BOOTP message (RFC 1542, 2.1), which some clients insist on.
const BYTES_MIN: usize = 300;
/// Seconds for which an address is given; a member has it longer, but asks again at half of the time.
const LEASE_SECONDS: u32 = 24 * 3600;

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The message.
    pub bytes: Vec<u8>,
    /// The address it goes to, on port 68.
    pub to: Ipv4Addr,
}

/// Answers a message; nothing if it is none, or is not for this server.
#[must_use]
pub fn answer(bytes: &[u8], view: &View) -> Option<Answer> {
    if bytes.get(COOKIE_AT..)?.first_chunk::<4>()? != &COOKIE {
        return None;
    }
    let request = Message::decode(&mut Decoder::new(bytes)).ok()?;
    let plain = request.opcode() == Opcode::BootRequest
        && request.htype() == HType::Eth
        && request.hlen() == 6
        && request.giaddr().is_unspecified();
    if !plain {
        return None;
    }
    // The length of what it has was claimed by whoever sent it.
    let mac = request.chaddr().first_chunk::<6>()?;
    let host = view.hosts.iter().find(|host| host.mac == *mac)?;
    let gateway = view.subnet.gateway();
    if let Some(DhcpOption::ServerIdentifier(server)) =
        request.opts().get(OptionCode::ServerIdentifier)
        && *server != gateway
    {
        return None;
    }
    let kind = match request.opts().msg_type()? {
        MessageType::Discover => MessageType::Offer,
        MessageType::Request if wanted(&request)? == host.address => MessageType::Ack,
        MessageType::Request => MessageType::Nak,
        MessageType::Inform => MessageType::Ack,
        _ => return None,
    };
    let informs = request.opts().has_msg_type(MessageType::Inform);
    let to = match kind {
        MessageType::Nak => Ipv4Addr::BROADCAST,
        // Whoever has the address already can be reached by it; others cannot.
        _ if request.ciaddr() == host.address => host.address,
        _ => Ipv4Addr::BROADCAST,
    };
    let reply = reply(&request, kind, host, view, informs);
    let mut bytes = Vec::with_capacity(BYTES_MIN);
    reply.encode(&mut Encoder::new(&mut bytes)).ok()?;
    if bytes.len() < BYTES_MIN {
        bytes.resize(BYTES_MIN, 0);
    }
    Some(Answer { bytes, to })
}

/// The address that a client asks to have, or has.
fn wanted(request: &Message) -> Option<Ipv4Addr> {
    match request.opts().get(OptionCode::RequestedIpAddress) {
        Some(DhcpOption::RequestedIpAddress(address)) => Some(*address),
        _ => Some(request.ciaddr()).filter(|address| !address.is_unspecified()),
    }
}

fn reply(request: &Message, kind: MessageType, host: &Host, view: &View, informs: bool) -> Message {
    let subnet = view.subnet;
    let mut reply = Message::default();
    reply.set_opcode(Opcode::BootReply);
    reply.set_htype(HType::Eth);
    reply.set_xid(request.xid());
    reply.set_flags(request.flags());
    reply.set_chaddr(&host.mac);
    let options = reply.opts_mut();
    options.insert(DhcpOption::MessageType(kind));
    options.insert(DhcpOption::ServerIdentifier(subnet.gateway()));
    if kind == MessageType::Nak {
        return reply;
    }
    options.insert(DhcpOption::SubnetMask(subnet.netmask()));
    options.insert(DhcpOption::BroadcastAddr(subnet.broadcast()));
    options.insert(DhcpOption::DomainNameServer(vec![subnet.gateway()]));
    options.insert(DhcpOption::DomainName(view.network.clone()));
    if !view.internal {
        options.insert(DhcpOption::Router(vec![subnet.gateway()]));
    }
    if !informs {
        options.insert(DhcpOption::AddressLeaseTime(LEASE_SECONDS));
        options.insert(DhcpOption::Renewal(LEASE_SECONDS / 2));
        options.insert(DhcpOption::Rebinding(LEASE_SECONDS / 8 * 7));
        reply.set_yiaddr(host.address);
    }
    reply.set_ciaddr(request.ciaddr());
    reply
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];
    const OWN: Ipv4Addr = Ipv4Addr::new(10, 89, 0, 5);

    fn view() -> View {
        View {
            network: "lab".into(),
            subnet: "10.89.0.0/24".parse().unwrap(),
            internal: false,
            hosts: vec![Host { name: "web".into(), mac: MAC, address: OWN, is_up: true }],
        }
    }

    fn request(kind: MessageType, mac: &[u8], more: Vec<DhcpOption>) -> Vec<u8> {
        let zero = Ipv4Addr::UNSPECIFIED;
        let mut message = Message::new_with_id(7, zero, zero, zero, zero, mac);
        message.opts_mut().insert(DhcpOption::MessageType(kind));
        for option in more {
            message.opts_mut().insert(option);
        }
        let mut bytes = Vec::new();
        message.encode(&mut Encoder::new(&mut bytes)).unwrap();
        bytes
    }

    fn decoded(answer: &Answer) -> Message {
        Message::decode(&mut Decoder::new(&answer.bytes)).unwrap()
    }

    #[test]
    fn a_member_gets_its_address() {
        let offer = answer(&request(MessageType::Discover, &MAC, vec![]), &view()).unwrap();
        assert_eq!(offer.to, Ipv4Addr::BROADCAST);
        assert!(offer.bytes.len() >= BYTES_MIN);
        let offer = decoded(&offer);
        assert_eq!(offer.opts().msg_type(), Some(MessageType::Offer));
        assert_eq!((offer.yiaddr(), offer.xid()), (OWN, 7));
        let gateway = Ipv4Addr::new(10, 89, 0, 1);
        let get = |code| offer.opts().get(code).cloned();
        assert_eq!(get(OptionCode::Router), Some(DhcpOption::Router(vec![gateway])));
        assert_eq!(
            get(OptionCode::DomainNameServer),
            Some(DhcpOption::DomainNameServer(vec![gateway]))
        );
        let wanted =
            vec![DhcpOption::RequestedIpAddress(OWN), DhcpOption::ServerIdentifier(gateway)];
        let ack = answer(&request(MessageType::Request, &MAC, wanted), &view()).unwrap();
        assert_eq!(decoded(&ack).opts().msg_type(), Some(MessageType::Ack));
    }

    #[test]
    fn another_address_is_refused() {
        let other = DhcpOption::RequestedIpAddress(Ipv4Addr::new(10, 89, 0, 6));
        let nak = answer(&request(MessageType::Request, &MAC, vec![other]), &view()).unwrap();
        let nak = decoded(&nak);
        assert_eq!(nak.opts().msg_type(), Some(MessageType::Nak));
        assert!(nak.yiaddr().is_unspecified());
    }

    #[test]
    fn strangers_and_other_servers_get_no_answer() {
        let none = |bytes: &[u8]| assert_eq!(answer(bytes, &view()), None);
        none(&request(MessageType::Discover, &[2, 0, 0, 0, 0, 8], vec![]));
        none(&request(MessageType::Release, &MAC, vec![]));
        let other = DhcpOption::ServerIdentifier(Ipv4Addr::new(10, 89, 0, 3));
        none(&request(MessageType::Request, &MAC, vec![other]));
        none(b"");
    }

    #[test]
    fn an_internal_network_has_no_way_out() {
        let view = View { internal: true, ..view() };
        let offer = answer(&request(MessageType::Discover, &MAC, vec![]), &view).unwrap();
        assert_eq!(decoded(&offer).opts().get(OptionCode::Router), None);
    }

    #[test]
    fn damaged_messages_do_no_harm() {
        let whole = request(MessageType::Discover, &MAC, vec![]);
        for len in 0..whole.len() {
            let _ = answer(&whole[..len], &view());
        }
        for at in 0..whole.len() {
            for value in [0, 1, 6, 16, 17, 127, 255] {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let _ = answer(&bytes, &view());
            }
        }
    }
}
