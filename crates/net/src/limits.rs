//! How much of everything there may be.

use std::time::Duration;

/// Networks of one state directory.
pub const NETWORKS_MAX: usize = 256;
/// Members of one network.
pub const MEMBERS_MAX: usize = 4096;
/// Bytes of a network's file: each member takes about 150.
pub const FILE_BYTES_MAX: u64 = 1 << 20;
/// Bytes of a DHCP message that are read; larger ones than an Ethernet frame are none.
pub const DHCP_BYTES_MAX: usize = 1500;
/// Bytes of a DNS message over UDP (RFC 6891 suggests 4096).
pub const DNS_UDP_BYTES_MAX: usize = 4096;
/// Questions of one network that are forwarded at the same time; more are not answered.
pub const DNS_FORWARDS_MAX: usize = 256;
/// TCP connections of one network to its name server.
pub const DNS_CONNECTIONS_MAX: usize = 64;
/// How long a name server of the host may take before the next is asked.
pub const DNS_UPSTREAM_TIME: Duration = Duration::from_secs(2);
/// Name servers of the host that are asked.
pub const DNS_UPSTREAMS_MAX: usize = 3;
/// How long a TCP connection to the name server may be silent.
pub const DNS_IDLE_TIME: Duration = Duration::from_secs(10);
/// Bytes of the host's `resolv.conf`.
pub const RESOLV_CONF_BYTES_MAX: u64 = 64 << 10;
/// Connections at the same time through one published port.
pub const PROXY_CONNECTIONS_MAX: usize = 1024;
/// How long a guest may take to accept one.
pub const PROXY_CONNECT_TIME: Duration = Duration::from_secs(10);
/// How long the peer of a UDP port is remembered after its last datagram.
pub const PROXY_UDP_IDLE_TIME: Duration = Duration::from_secs(60);
/// Bytes of a datagram.
pub const DATAGRAM_BYTES_MAX: usize = 65_535;
/// How long `nft` may take.
pub const NFT_TIME: Duration = Duration::from_secs(30);

const _: () = assert!(MEMBERS_MAX as u64 * 160 <= FILE_BYTES_MAX);
