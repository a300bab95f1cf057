//! A published port where the rules do not reach: the host's loopback, and IPv6. The sockets also keep
//! the port, so that no other program takes it and wonders why nobody comes.

use std::collections::HashMap;
use std::io::{self, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::error::{NetError, Result};
use crate::limits::{
    DATAGRAM_BYTES_MAX, PROXY_CONNECT_TIME, PROXY_CONNECTIONS_MAX, PROXY_UDP_IDLE_TIME,
};
use crate::port::{Port, Transport};
use crate::relay;

/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;
/// Between tries when a socket fails, as one does without descriptors.
const PAUSE: Duration = Duration::from_millis(100);

/// Listens for published ports until it is dropped, which ends connections too.
#[derive(Debug)]
pub(crate) struct Proxy {
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// Takes all of these ports, which lead to an address then, or none of them.
    ///
    /// # Errors
    /// [`NetError::Taken`], [`NetError::Publish`].
    pub(crate) fn start(ports: &[Port], to: Ipv4Addr) -> Result<Self> {
        let mut tasks = JoinSet::new();
        for port in ports {
            let guest = SocketAddr::new(IpAddr::V4(to), port.guest);
            for address in addresses(port) {
                let at = SocketAddr::new(address, port.host);
                match (listen(at, port.transport), port.address) {
                    (Ok(Listener::Tcp(listener)), _) => {
                        drop(tasks.spawn(serve_tcp(listener, guest)))
                    }
                    (Ok(Listener::Udp(socket)), _) => drop(tasks.spawn(serve_udp(socket, guest))),
                    (Err(source), _) if source.kind() == ErrorKind::AddrInUse => {
                        return Err(NetError::Taken { port: port.clone() });
                    }
                    // A host without IPv6.
                    (Err(_), None) if address.is_ipv6() => {}
                    (Err(source), _) => {
                        return Err(NetError::Publish { port: port.clone(), source });
                    }
                }
            }
        }
        Ok(Self { _tasks: tasks })
    }
}

/// Where to listen.
fn addresses(port: &Port) -> Vec<IpAddr> {
    match port.address {
        Some(address) => vec![address],
        None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
    }
}

enum Listener {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

fn listen(at: SocketAddr, transport: Transport) -> io::Result<Listener> {
    let (kind, protocol) = match transport {
        Transport::Tcp => (Type::STREAM, Protocol::TCP),
        Transport::Udp => (Type::DGRAM, Protocol::UDP),
    };
    let socket = Socket::new(Domain::for_address(at), kind, Some(protocol))?;
    if at.is_ipv6() {
        // IPv4 has a socket of its own.
        socket.set_only_v6(true)?;
    }
    if transport == Transport::Tcp {
        // Connections that have just ended do not keep it.
        socket.set_reuse_address(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&at.into())?;
    Ok(match transport {
        Transport::Tcp => {
            socket.listen(BACKLOG)?;
            Listener::Tcp(TcpListener::from_std(socket.into())?)
        }
        Transport::Udp => Listener::Udp(UdpSocket::from_std(socket.into())?),
    })
}

async fn serve_tcp(listener: TcpListener, guest: SocketAddr) {
    let free = Arc::new(Semaphore::new(PROXY_CONNECTIONS_MAX));
    // They end with this.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(permit) = Arc::clone(&free).acquire_owned().await else { return };
        let Ok((client, _)) = listener.accept().await else {
            sleep(PAUSE).await;
            continue;
        };
        connections.spawn(async move {
            if let Ok(Ok(server)) = timeout(PROXY_CONNECT_TIME, TcpStream::connect(guest)).await {
                relay::both(client, server).await;
            }
            drop(permit);
        });
    }
}

/// Sockets towards the guest, one for each peer.
type Peers = Arc<Mutex<HashMap<SocketAddr, Arc<UdpSocket>>>>;

async fn serve_udp(socket: UdpSocket, guest: SocketAddr) {
    let socket = Arc::new(socket);
    let peers = Peers::default();
    let mut answers = JoinSet::new();
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    let known =
        |from: &SocketAddr| peers.lock().unwrap_or_else(PoisonError::into_inner).get(from).cloned();
    loop {
        while answers.try_join_next().is_some() {}
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else {
            sleep(PAUSE).await;
            continue;
        };
        let towards = match known(&from) {
            Some(towards) => towards,
            None if answers.len() >= PROXY_CONNECTIONS_MAX => continue,
            None => {
                let Ok(made) = towards(guest).await else { continue };
                let made = Arc::new(made);
                let mut all = peers.lock().unwrap_or_else(PoisonError::into_inner);
                all.insert(from, Arc::clone(&made));
                let (back, peers) = (Arc::clone(&socket), Arc::clone(&peers));
                answers.spawn(answer(Arc::clone(&made), back, from, peers));
                made
            }
        };
        // Datagrams may be lost.
        let _ = towards.send(buffer.get(..len).unwrap_or(&[])).await;
    }
}

async fn towards(guest: SocketAddr) -> io::Result<UdpSocket> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    socket.connect(guest).await?;
    Ok(socket)
}

/// Sends back what a guest answers to one peer, until both are silent.
async fn answer(
    from_guest: Arc<UdpSocket>,
    socket: Arc<UdpSocket>,
    peer: SocketAddr,
    peers: Peers,
) {
    let mut buffer = vec![0; DATAGRAM_BYTES_MAX];
    while let Ok(Ok(len)) = timeout(PROXY_UDP_IDLE_TIME, from_guest.recv(&mut buffer)).await {
        let _ = socket.send_to(buffer.get(..len).unwrap_or(&[]), peer).await;
    }
    peers.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    fn port(host: u16, guest: u16, transport: Transport) -> Port {
        Port { address: Some(Ipv4Addr::LOCALHOST.into()), host, guest, transport }
    }

    async fn free_port() -> u16 {
        TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
    }

    #[tokio::test]
    async fn streams_go_through_and_end_with_the_proxy() {
        let guest = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = free_port().await;
        let ports = [port(host, guest.local_addr().unwrap().port(), Transport::Tcp)];
        let proxy = Proxy::start(&ports, Ipv4Addr::LOCALHOST).unwrap();
        let again = Proxy::start(&ports, Ipv4Addr::LOCALHOST).unwrap_err();
        assert!(matches!(again, NetError::Taken { .. }), "{again}");
        let mut client = TcpStream::connect(("127.0.0.1", host)).await.unwrap();
        let (mut server, _) = guest.accept().await.unwrap();
        client.write_all(b"ping").await.unwrap();
        let mut got = [0; 4];
        server.read_exact(&mut got).await.unwrap();
        server.write_all(b"pong").await.unwrap();
        client.read_exact(&mut got).await.unwrap();
        assert_eq!(&got, b"pong");
        drop(proxy);
        assert!(matches!(client.read(&mut got).await, Ok(0) | Err(_)));
        // The tasks have ended by then, or do so now.
        let began = std::time::Instant::now();
        while Proxy::start(&ports, Ipv4Addr::LOCALHOST).is_err() {
            assert!(began.elapsed() < Duration::from_secs(10));
            sleep(Duration::from_millis(5)).await;
        }
    }

    #[tokio::test]
    async fn datagrams_come_back_to_who_asked() {
        let guest = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let free = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let host = free.local_addr().unwrap().port();
        drop(free);
        let ports = [port(host, guest.local_addr().unwrap().port(), Transport::Udp)];
        let _proxy = Proxy::start(&ports, Ipv4Addr::LOCALHOST).unwrap();
        let mut buffer = [0; 16];
        for text in [b"one", b"two"] {
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            client.connect(("127.0.0.1", host)).await.unwrap();
            client.send(text).await.unwrap();
            let (len, from) = guest.recv_from(&mut buffer).await.unwrap();
            guest.send_to(&buffer[..len], from).await.unwrap();
            let len = client.recv(&mut buffer).await.unwrap();
            assert_eq!(&buffer[..len], text);
        }
    }
}
