//! DNS (RFC 1035) for the members of a network: names of those that run are answered here, names that can
//! only be of this network are refused here, others are for the host's name servers.

use std::net::Ipv4Addr;

use hickory_proto::op::{Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, PTR};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};

use crate::view::{Host, View};

/// Seconds for which an answer may be kept: a machine that is started anew has the same address, but its
/// name can become another's.
const TTL_SECONDS: u32 = 5;
/// Behind the labels of an address's reverse name.
const REVERSE: &str = ".in-addr.arpa.";

/// What is to be done with a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// This is the answer.
    Answer(Vec<u8>),
    /// The host's name servers may know.
    Forward,
    /// Nothing: it is no question.
    Ignore,
}

/// What a name is in a network.
enum Known {
    Address(Ipv4Addr),
    Pointer(Name),
    /// A name of this network that nobody has.
    Nobody,
    /// Not this network's to say.
    Elsewhere,
}

/// Answers a message.
#[must_use]
pub fn answer(bytes: &[u8], view: &View) -> Reply {
    let Ok(request) = Message::from_vec(bytes) else { return Reply::Ignore };
    let head = &request.metadata;
    if head.message_type != MessageType::Query {
        return Reply::Ignore;
    }
    if head.op_code != OpCode::Query {
        return encoded(&plain(&request, ResponseCode::NotImp));
    }
    let [query] = request.queries.as_slice() else {
        return encoded(&plain(&request, ResponseCode::FormErr));
    };
    let known = match query.query_class() {
        DNSClass::IN => look(query.name(), view),
        _ => Known::Elsewhere,
    };
    let data = match known {
        Known::Elsewhere if view.internal => {
            return encoded(&plain(&request, ResponseCode::Refused));
        }
        Known::Elsewhere => return Reply::Forward,
        Known::Nobody => return encoded(&own(&request, query, ResponseCode::NXDomain, None)),
        Known::Address(address) => (RecordType::A, RData::A(A(address))),
        Known::Pointer(name) => (RecordType::PTR, RData::PTR(PTR(name))),
    };
    let (kind, data) = data;
    let asked = query.query_type();
    // There is such a name, perhaps with nothing of that type.
    let data = (asked == kind || asked == RecordType::ANY).then_some(data);
    encoded(&own(&request, query, ResponseCode::NoError, data))
}

/// Says that it cannot be answered now.
#[must_use]
pub fn failure(bytes: &[u8]) -> Option<Vec<u8>> {
    let request = Message::from_vec(bytes).ok()?;
    plain(&request, ResponseCode::ServFail).to_vec().ok()
}

fn look(name: &Name, view: &View) -> Known {
    let text = name.to_lowercase().to_ascii();
    if let Some(reversed) = text.strip_suffix(REVERSE) {
        return look_back(reversed, view);
    }
    let text = text.strip_suffix('.').unwrap_or(&text);
    let own = match text.strip_suffix(view.network.as_str()) {
        // The network itself is a name without an address.
        Some("") => return Known::Nobody,
        Some(rest) => rest.strip_suffix('.'),
        None => None,
    };
    if let Some(label) = own {
        // A network may have the name of a domain that others know.
        let is_member = view.hosts.iter().any(|host| host.name.eq_ignore_ascii_case(label));
        return if is_member { find(label, view) } else { Known::Elsewhere };
    }
    match text.contains('.') || text.is_empty() {
        true => Known::Elsewhere,
        // A single label is nobody's outside.
        false => find(text, view),
    }
}

fn up(view: &View) -> impl Iterator<Item = &Host> {
    view.hosts.iter().filter(|host| host.is_up)
}

fn find(label: &str, view: &View) -> Known {
    match up(view).find(|host| host.name.eq_ignore_ascii_case(label)) {
        Some(host) => Known::Address(host.address),
        None => Known::Nobody,
    }
}

/// `2.0.89.10` is 10.89.0.2.
fn look_back(reversed: &str, view: &View) -> Known {
    let Ok(address) = reversed.parse::<Ipv4Addr>() else { return Known::Elsewhere };
    let [a, b, c, d] = address.octets();
    let address = Ipv4Addr::new(d, c, b, a);
    if !view.subnet.contains(address) {
        return Known::Elsewhere;
    }
    let host = up(view).find(|host| host.address == address);
    let name = host.and_then(|host| {
        Name::from_ascii(format!("{}.{}.", host.name.to_ascii_lowercase(), view.network)).ok()
    });
    name.map_or(Known::Nobody, Known::Pointer)
}

fn plain(request: &Message, code: ResponseCode) -> Message {
    let head = &request.metadata;
    let mut reply = Message::response(head.id, head.op_code);
    reply.metadata.recursion_desired = head.recursion_desired;
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = code;
    reply.add_queries(request.queries.iter().cloned());
    reply
}

fn own(request: &Message, query: &Query, code: ResponseCode, data: Option<RData>) -> Message {
    let mut reply = plain(request, code);
    reply.metadata.authoritative = true;
    if let Some(data) = data {
        reply.add_answer(Record::from_rdata(query.name().clone(), TTL_SECONDS, data));
    }
    reply
}

fn encoded(reply: &Message) -> Reply {
    reply.to_vec().map_or(Reply::Ignore, Reply::Answer)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> View {
        let host = |name: &str, last, is_up| Host {
            name: name.into(),
            mac: [2, 0, 0, 0, 0, last],
            address: Ipv4Addr::new(10, 89, 0, last),
            is_up,
        };
        View {
            network: "lab".into(),
            subnet: "10.89.0.0/24".parse().unwrap(),
            internal: false,
            hosts: vec![host("Web", 2, true), host("db", 3, false)],
        }
    }

    fn ask(name: &str, kind: RecordType) -> Vec<u8> {
        let mut message = Message::query();
        message.metadata.recursion_desired = true;
        message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
        message.to_vec().unwrap()
    }

    fn answered(name: &str, kind: RecordType) -> Message {
        match answer(&ask(name, kind), &view()) {
            Reply::Answer(bytes) => Message::from_vec(&bytes).unwrap(),
            other => panic!("{name}: {other:?}"),
        }
    }

    #[test]
    fn members_that_run_have_names() {
        for name in ["web.", "WEB.", "web.lab.", "web.LAB."] {
            let reply = answered(name, RecordType::A);
            assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
            assert_eq!(reply.answers[0].data, RData::A(A(Ipv4Addr::new(10, 89, 0, 2))));
        }
        let reply = answered("web.lab.", RecordType::AAAA);
        assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
        assert!(reply.answers.is_empty());
        let reply = answered("2.0.89.10.in-addr.arpa.", RecordType::PTR);
        assert_eq!(reply.answers[0].data, RData::PTR(PTR(Name::from_ascii("web.lab.").unwrap())));
    }

    #[test]
    fn names_of_nobody_go_nowhere() {
        for name in ["db.", "db.lab.", "other.", "lab.", "3.0.89.10.in-addr.arpa."] {
            let reply = answered(name, RecordType::A);
            assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain, "{name}");
        }
    }

    #[test]
    fn other_names_are_asked_for_outside_unless_nothing_leads_there() {
        for name in [
            "example.org.",
            "weblab.org.",
            "xlab.",
            "a.b.lab.",
            "other.lab.",
            "9.9.9.9.in-addr.arpa.",
            ".",
        ] {
            let expected = name == "xlab.";
            let reply = answer(&ask(name, RecordType::A), &view());
            assert_eq!(reply != Reply::Forward, expected, "{name}");
        }
        let internal = View { internal: true, ..view() };
        let Reply::Answer(bytes) = answer(&ask("example.org.", RecordType::A), &internal) else {
            panic!();
        };
        let reply = Message::from_vec(&bytes).unwrap();
        assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
    }

    #[test]
    fn damaged_messages_do_no_harm() {
        let whole = ask("web.lab.", RecordType::A);
        for len in 0..whole.len() {
            let _ = answer(&whole[..len], &view());
        }
        for at in 0..whole.len() {
            for value in 0..=255 {
                let mut bytes = whole.clone();
                bytes[at] = value;
                let _ = answer(&bytes, &view());
                let _ = failure(&bytes);
            }
        }
        let mut answered = whole;
        answered[2] |= 0x80;
        assert_eq!(answer(&answered, &view()), Reply::Ignore);
    }
}
