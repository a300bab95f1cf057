//! Ports of the host that lead to members.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Transport {
    /// As rules and people say it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

/// A port of the host that leads to a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The host's address; all of them when absent.
    pub address: Option<IpAddr>,
    /// The host's port; not 0.
    pub host: u16,
    /// The member's port; not 0.
    pub guest: u16,
    /// Which protocol's.
    pub transport: Transport,
}

impl fmt::Display for Port {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write!(f, "{}", SocketAddr::new(address, self.host))?,
            None => write!(f, "{}", self.host)?,
        }
        write!(f, "/{}", self.transport.as_str())
    }
}
