//! What can go wrong with networks.

use std::io;
use std::path::PathBuf;

use crate::port::Port;

/// Why something was not done with a network.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The system refused something about a file.
    #[error("{action} {path} failed", path = path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A network's file is not what it should be.
    #[error("{path} cannot be understood: {reason}", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// What was asked for cannot be.
    #[error("{0}")]
    Invalid(String),
    /// There is none.
    #[error("there is no network {0}; `berth network ls` lists them")]
    Absent(String),
    /// There is one already.
    #[error("there is a network {0} already")]
    Exists(String),
    /// It has members.
    #[error("the network {name} is in use by {members}")]
    InUse {
        /// Which.
        name: String,
        /// By whom, for people.
        members: String,
    },
    /// No address is left.
    #[error("the network {name} has no address left in {subnet}")]
    Full {
        /// Which.
        name: String,
        /// Its addresses.
        subnet: String,
    },
    /// This process may not.
    #[error("{0} needs root (CAP_NET_ADMIN); `--net user` with --publish needs no privileges")]
    Privilege(&'static str),
    /// The kernel refused a change of interfaces.
    #[error("{action} {on} failed")]
    Link {
        /// What was tried.
        action: &'static str,
        /// On which interface.
        on: String,
        /// The kernel's reason.
        source: rtnetlink::Error,
    },
    /// An interface that has just been made is not there.
    #[error("the interface {0} is gone; something else removed it")]
    Gone(String),
    /// The tap driver.
    #[error("{action} of tap interface {name} failed")]
    Tap {
        /// What was tried.
        action: &'static str,
        /// Which.
        name: String,
        /// The kernel's reason.
        source: io::Error,
    },
    /// `nft` cannot be run.
    #[error("cannot run nft for the rules of networks (Debian package nftables)")]
    NoNft(#[source] io::Error),
    /// `nft` refused the rules.
    #[error("nft does not take the rules of the networks: {0}")]
    Rules(String),
    /// A server of a network cannot listen.
    #[error(
        "the network {network} has no {what} server at {at}; does another program have the port?"
    )]
    Listen {
        /// Which network.
        network: String,
        /// `DHCP` or `DNS`.
        what: &'static str,
        /// Where.
        at: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A port is another program's.
    #[error("cannot publish {port}: the port is in use on this host; choose another one")]
    Taken {
        /// Which.
        port: Port,
    },
    /// A port cannot be had.
    #[error("cannot publish {port}")]
    Publish {
        /// Which.
        port: Port,
        /// The system's reason.
        source: io::Error,
    },
}

/// What operations give.
pub type Result<T> = std::result::Result<T, NetError>;

/// Makes an error of the system one of a file.
pub(crate) fn file(
    action: &'static str,
    path: &std::path::Path,
) -> impl FnOnce(io::Error) -> NetError {
    let path = path.to_owned();
    move |source| NetError::File { action, path, source }
}
