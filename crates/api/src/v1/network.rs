//! Networks, and ports of the host that lead into guests.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::str::FromStr;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Most characters of a network's name; it is the domain of the names in it too.
pub const NETWORK_NAME_MAX: usize = 63;
/// Most ports of one machine.
pub const PORTS_MAX: usize = 256;

/// Whether this can be a network's name: letters in lower case, digits and `-`, which is neither first
/// nor last; `user`, `none` and `host` mean something else.
#[must_use]
pub fn is_network_name(text: &str) -> bool {
    let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let taken = ["user", "none", "host"].contains(&text);
    let edges = text.starts_with('-') || text.ends_with('-');
    !text.is_empty() && text.len() <= NETWORK_NAME_MAX && text.chars().all(good) && !edges && !taken
}

/// What a port belongs to.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// TCP.
    #[default]
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// The word for people and for JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A port of the host that leads to one of a guest. As text: `[HOSTIP:]HOSTPORT:GUESTPORT[/tcp|udp]`,
/// an IPv6 address in brackets.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Port {
    /// The address of the host; all of them, IPv4 and IPv6, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub address: Option<IpAddr>,
    /// The host's port, 1 to 65535.
    #[schema(minimum = 1)]
    pub host: u16,
    /// The guest's port, 1 to 65535.
    #[schema(minimum = 1)]
    pub guest: u16,
    /// TCP when absent.
    #[serde(default)]
    pub protocol: Protocol,
}

impl Port {
    /// Whether both cannot be published at the same time.
    #[must_use]
    pub fn collides(&self, other: &Self) -> bool {
        let any = |address: Option<IpAddr>| address.is_none_or(|address| address.is_unspecified());
        self.protocol == other.protocol
            && self.host == other.host
            && (any(self.address) || any(other.address) || self.address == other.address)
    }

    /// The host's side, as `0.0.0.0:8080`.
    #[must_use]
    pub fn host_side(&self) -> String {
        match self.address {
            Some(IpAddr::V6(address)) => format!("[{address}]:{}", self.host),
            Some(IpAddr::V4(address)) => format!("{address}:{}", self.host),
            None => format!("*:{}", self.host),
        }
    }
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(IpAddr::V6(address)) => write!(f, "[{address}]:")?,
            Some(IpAddr::V4(address)) => write!(f, "{address}:")?,
            None => {}
        }
        write!(f, "{}:{}/{}", self.host, self.guest, self.protocol.as_str())
    }
}

impl FromStr for Port {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let not = || {
            format!(
                "`{text}` is no port to publish; [HOSTIP:]HOSTPORT:GUESTPORT[/tcp|udp] is, as in \
                 8080:80 or 127.0.0.1:5353:53/udp or [::1]:8080:80"
            )
        };
        let (ports, protocol) = match text.rsplit_once('/') {
            None => (text, Protocol::Tcp),
            Some((ports, "tcp")) => (ports, Protocol::Tcp),
            Some((ports, "udp")) => (ports, Protocol::Udp),
            Some(_) => return Err(not()),
        };
        let (rest, guest) = ports.rsplit_once(':').ok_or_else(not)?;
        let (address, host) = match rest.rsplit_once(':') {
            None => (None, rest),
            Some((address, host)) => {
                let v6 = address.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
                let parsed = match v6 {
                    Some(v6) => v6.parse().map(IpAddr::V6).ok(),
                    None => address.parse().map(IpAddr::V4).ok(),
                };
                (Some(parsed.ok_or_else(not)?), host)
            }
        };
        let port = |text: &str| text.parse::<u16>().ok().filter(|port| *port > 0);
        let (host, guest) = (port(host).ok_or_else(not)?, port(guest).ok_or_else(not)?);
        Ok(Self { address, host, guest, protocol })
    }
}

/// `POST /networks`: a network to be created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateNetwork {
    /// Its name: letters in lower case, digits and `-`, 63 at most. Names in it end in it.
    #[schema(pattern = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    pub name: String,
    /// Its addresses, as `10.1.2.0/24`; ones that nothing of the host uses when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subnet: Option<String>,
    /// Guests reach each other and nothing else.
    #[serde(default)]
    pub internal: bool,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Its addresses.
    #[schema(example = "10.89.0.0/24")]
    pub subnet: String,
    /// The host's address in it.
    #[schema(value_type = String)]
    pub gateway: Ipv4Addr,
    /// Guests reach each other and nothing else.
    pub internal: bool,
    /// The host's bridge.
    pub bridge: String,
    /// When it was created.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
    /// What is in it, by name.
    pub members: Vec<Member>,
}

/// Something in a network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Member {
    /// Its name, which resolves to its address in the network.
    pub name: String,
    /// Its address, which stays.
    #[schema(value_type = String)]
    pub address: Ipv4Addr,
    /// Its hardware address.
    pub mac: String,
    /// Ports of the host that lead to it now.
    pub ports: Vec<Port>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_read_and_written() {
        for (text, shown, host_side) in [
            ("8080:80", "8080:80/tcp", "*:8080"),
            ("53:5353/udp", "53:5353/udp", "*:53"),
            ("127.0.0.1:1:65535/tcp", "127.0.0.1:1:65535/tcp", "127.0.0.1:1"),
            ("[::1]:8080:80", "[::1]:8080:80/tcp", "[::1]:8080"),
        ] {
            let port: Port = text.parse().unwrap();
            assert_eq!((port.to_string(), port.host_side()), (shown.into(), host_side.into()));
            assert_eq!(shown.parse::<Port>().unwrap(), port);
        }
        for bad in
            ["", "80", "0:80", "80:0", "80:65536", "a:80", "::1:80:80", "host:80:80", "80:80/sctp"]
        {
            assert!(bad.parse::<Port>().is_err(), "{bad}");
        }
    }

    #[test]
    fn ports_collide_where_one_would_hide_the_other() {
        let check = |a: &str, b: &str, expected: bool| {
            let (a, b): (Port, Port) = (a.parse().unwrap(), b.parse().unwrap());
            assert_eq!((a.collides(&b), b.collides(&a)), (expected, expected), "{a} {b}");
        };
        check("80:1", "80:2", true);
        check("80:1", "80:1/udp", false);
        check("127.0.0.1:80:1", "80:1", true);
        check("127.0.0.1:80:1", "127.0.0.2:80:1", false);
        check("0.0.0.0:80:1", "127.0.0.2:80:1", true);
    }

    #[test]
    fn network_names_are_domains() {
        for good in ["a", "lab-1", "10"] {
            assert!(is_network_name(good), "{good}");
        }
        for bad in ["", "-a", "a-", "A", "a.b", "user", "none", "host", &"x".repeat(64)] {
            assert!(!is_network_name(bad), "{bad}");
        }
    }
}
