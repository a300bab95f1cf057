//! Ports of the host that passt listens at for the guest.
//!
//! passt goes on when it gets only some of what it was asked for (the IPv6 half of a port whose IPv4
//! half is another program's), so each port is tried before. Then it is waited for until it listens.

use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket};
use std::process::{Child, ChildStderr};
use std::time::{Duration, Instant};

use thiserror::Error;

/// How long passt may take until it listens.
const LISTEN_TIME: Duration = Duration::from_secs(5);
/// How long a port may be in use before that is an error.
const FREE_TIME: Duration = Duration::from_secs(1);
const FREE_POLL: Duration = Duration::from_millis(20);
const LISTEN_POLL: Duration = Duration::from_millis(2);
/// Bytes of what it says that are read.
const SAID_MAX: u64 = 4096;
/// In the kernel's lists of sockets: `TCP_LISTEN`, and `TCP_CLOSE` of UDP sockets that are bound.
const LISTENS: &str = "0A";
const BOUND: &str = "07";

/// TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Forward {
    /// The host's address; all of them when absent.
    pub address: Option<IpAddr>,
    /// The host's port; not 0.
    pub host: u16,
    /// The guest's port; not 0.
    pub guest: u16,
    /// Which protocol's.
    pub transport: Transport,
}

/// Why a port is not published.
#[derive(Debug, Error)]
pub enum ForwardError {
    /// Another program has it.
    #[error("cannot publish {port}: the port is in use on this host; choose another one")]
    Taken {
        /// Which.
        port: Forward,
    },
    /// Ports below 1024.
    #[error(
        "cannot publish {port}: that needs root, or a smaller \
         net.ipv4.ip_unprivileged_port_start; try a port of 1024 or more"
    )]
    Forbidden {
        /// Which.
        port: Forward,
    },
    /// No such address, for example.
    #[error("cannot publish {port}")]
    Other {
        /// Which.
        port: Forward,
        /// The system's reason.
        source: io::Error,
    },
    /// passt ended, or does not listen.
    #[error("passt does not publish the ports: {0}")]
    Passt(String),
}

impl fmt::Display for Forward {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.transport {
            Transport::Tcp => "tcp",
            Transport::Udp => "udp",
        };
        match self.address {
            Some(address) => write!(f, "{}", SocketAddr::new(address, self.host))?,
            None => write!(f, "{}", self.host)?,
        }
        write!(f, "/{transport}")
    }
}

impl Forward {
    /// In passt's notation.
    pub(super) fn option(&self) -> [String; 2] {
        let name = match self.transport {
            Transport::Tcp => "--tcp-ports",
            Transport::Udp => "--udp-ports",
        };
        let address = match self.address {
            Some(address) => format!("{address}/"),
            None => String::new(),
        };
        [name.to_owned(), format!("{address}{}:{}", self.host, self.guest)]
    }

    /// Takes the port and gives it back.
    pub(super) fn check_free(&self) -> Result<(), ForwardError> {
        let v4 = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        self.try_at(self.address.unwrap_or(v4))?;
        if self.address.is_some() {
            return Ok(());
        }
        match self.try_at(IpAddr::V6(Ipv6Addr::UNSPECIFIED)) {
            // A host without IPv6.
            Err(ForwardError::Other { .. }) => Ok(()),
            other => other,
        }
    }

    /// The same, with patience for the passt of a machine that has just been ended.
    pub(super) fn await_free(&self) -> Result<(), ForwardError> {
        let began = Instant::now();
        loop {
            match self.check_free() {
                Err(ForwardError::Taken { .. }) if began.elapsed() < FREE_TIME => {
                    std::thread::sleep(FREE_POLL);
                }
                other => return other,
            }
        }
    }

    fn try_at(&self, address: IpAddr) -> Result<(), ForwardError> {
        let at = SocketAddr::new(address, self.host);
        let tried = match self.transport {
            Transport::Tcp => TcpListener::bind(at).map(drop),
            Transport::Udp => UdpSocket::bind(at).map(drop),
        };
        let port = self.clone();
        tried.map_err(|source| match source.kind() {
            ErrorKind::AddrInUse => ForwardError::Taken { port },
            ErrorKind::PermissionDenied => ForwardError::Forbidden { port },
            _ => ForwardError::Other { port, source },
        })
    }

    /// Whether somebody listens there now.
    fn is_served(&self) -> io::Result<bool> {
        let (files, state) = match self.transport {
            Transport::Tcp => (["/proc/self/net/tcp", "/proc/self/net/tcp6"], LISTENS),
            Transport::Udp => (["/proc/self/net/udp", "/proc/self/net/udp6"], BOUND),
        };
        for file in files {
            match fs::read_to_string(file) {
                Ok(text) if lists(&text, self.host, state) => return Ok(true),
                Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(false)
    }
}

/// Whether a port in a state is in a list of sockets (proc_pid_net(5)): the number, the local address and
/// port, the remote ones, the state.
fn lists(text: &str, port: u16, state: &str) -> bool {
    let wanted = format!("{port:04X}");
    text.lines().skip(1).any(|line| {
        let mut words = line.split_whitespace().skip(1);
        let local = words.next().and_then(|local| local.rsplit_once(':'));
        local.is_some_and(|(_, port)| port == wanted) && words.nth(1) == Some(state)
    })
}

/// Waits until all of them are listened at.
pub(super) fn await_all(
    ports: &[Forward],
    child: &mut Child,
    said: &mut Option<ChildStderr>,
) -> Result<(), ForwardError> {
    let began = Instant::now();
    for port in ports {
        loop {
            let failed = |source| ForwardError::Other { port: port.clone(), source };
            // Looked at in this order: one that ended has not listened since.
            let ended = child.try_wait().map_err(failed)?.is_some();
            if ended {
                let mut text = Vec::new();
                if let Some(said) = said.take() {
                    // What cannot be read is not told.
                    let _ = said.take(SAID_MAX).read_to_end(&mut text);
                }
                return Err(ForwardError::Passt(last_line(&text)));
            }
            if port.is_served().map_err(failed)? {
                break;
            }
            if began.elapsed() > LISTEN_TIME {
                let _ = child.kill().and_then(|()| child.wait());
                let why = format!("it does not listen at {port}");
                return Err(ForwardError::Passt(why));
            }
            std::thread::sleep(LISTEN_POLL);
        }
    }
    Ok(())
}

fn last_line(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    let line = text.lines().rfind(|line| !line.trim().is_empty() && !line.contains("to syslog"));
    line.unwrap_or("it ended at once").chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn forward(address: Option<&str>, host: u16, transport: Transport) -> Forward {
        let address = address.map(|address| address.parse().unwrap());
        Forward { address, host, guest: 80, transport }
    }

    #[test]
    fn passts_notation() {
        let check = |address, transport, expected: [&str; 2]| {
            assert_eq!(forward(address, 8080, transport).option(), expected);
        };
        check(None, Transport::Tcp, ["--tcp-ports", "8080:80"]);
        check(Some("0.0.0.0"), Transport::Tcp, ["--tcp-ports", "0.0.0.0/8080:80"]);
        check(Some("127.0.0.1"), Transport::Udp, ["--udp-ports", "127.0.0.1/8080:80"]);
        check(Some("::1"), Transport::Tcp, ["--tcp-ports", "::1/8080:80"]);
    }

    #[test]
    fn a_port_that_is_taken_is_told() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        for address in [None, Some("127.0.0.1"), Some("0.0.0.0")] {
            let error = forward(address, port, Transport::Tcp).check_free().unwrap_err();
            assert!(matches!(error, ForwardError::Taken { .. }), "{error}");
            assert!(error.to_string().contains(&port.to_string()), "{error}");
        }
        let own = forward(Some("127.0.0.1"), port, Transport::Tcp);
        assert!(own.is_served().unwrap());
        drop(taken);
        assert!(own.check_free().is_ok());
        let elsewhere = forward(Some("203.0.113.9"), port, Transport::Tcp);
        assert!(matches!(elsewhere.check_free(), Err(ForwardError::Other { .. })));
    }

    #[test]
    fn the_kernels_list() {
        let text = "  sl  local_address rem_address   st tx_queue\n   0: 0100007F:1F90 00000000:0000 \
                    0A 0:0\n   1: 0100007F:1F91 00000000:0000 01 0:0\n   broken\n";
        assert!(lists(text, 8080, LISTENS));
        assert!(!lists(text, 8081, LISTENS) && !lists(text, 80, LISTENS));
    }
}
