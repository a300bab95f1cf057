//! The sockets of a network's servers: DHCP on its bridge, DNS on its gateway's address.

use std::fs::File;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::Arc;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::dhcp;
use crate::dns::{self, Reply};
use crate::error::{NetError, Result};
use crate::limits::{
    DHCP_BYTES_MAX, DNS_CONNECTIONS_MAX, DNS_FORWARDS_MAX, DNS_IDLE_TIME, DNS_UDP_BYTES_MAX,
    DNS_UPSTREAM_TIME, DNS_UPSTREAMS_MAX, RESOLV_CONF_BYTES_MAX,
};
use crate::view::Shared;

const DHCP_SERVER: u16 = 67;
const DHCP_CLIENT: u16 = 68;
const DNS: u16 = 53;
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Between tries when a socket fails, as one does whose interface is gone.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

/// Servers that answer until this is dropped.
#[derive(Debug)]
pub(crate) struct Servers {
    _tasks: JoinSet<()>,
}

impl Servers {
    /// Begins to answer.
    ///
    /// # Errors
    /// [`NetError::Listen`].
    pub(crate) async fn start(network: &str, bridge: &str, view: &Shared) -> Result<Self> {
        let gateway = view.look(|view| view.subnet.gateway());
        let failed = |what, at: String| {
            move |source| NetError::Listen { network: network.to_owned(), what, at, source }
        };
        let dhcp =
            dhcp_socket(bridge).map_err(failed("DHCP", format!("{bridge}:{DHCP_SERVER}")))?;
        let at = SocketAddr::new(IpAddr::V4(gateway), DNS);
        let udp = UdpSocket::bind(at).await.map_err(failed("DNS", at.to_string()))?;
        let tcp = TcpListener::bind(at).await.map_err(failed("DNS", at.to_string()))?;
        let forwards = Arc::new(Semaphore::new(DNS_FORWARDS_MAX));
        let mut tasks = JoinSet::new();
        tasks.spawn(serve_dhcp(dhcp, view.clone()));
        tasks.spawn(serve_udp(Arc::new(udp), view.clone(), Arc::clone(&forwards)));
        tasks.spawn(serve_tcp(tcp, view.clone(), forwards));
        Ok(Self { _tasks: tasks })
    }
}

/// What comes over the bridge, and nothing else.
fn dhcp_socket(bridge: &str) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_address(true)?;
    socket.bind_device(Some(bridge.as_bytes()))?;
    socket.set_broadcast(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, DHCP_SERVER).into())?;
    UdpSocket::from_std(socket.into())
}

async fn serve_dhcp(socket: UdpSocket, view: Shared) {
    let mut buffer = vec![0; DHCP_BYTES_MAX];
    loop {
        let Ok((len, _)) = socket.recv_from(&mut buffer).await else {
            sleep(PAUSE).await;
            continue;
        };
        let bytes = buffer.get(..len).unwrap_or(&[]);
        if let Some(answer) = view.look(|view| dhcp::answer(bytes, view)) {
            // One that is lost is asked for again.
            let _ = socket.send_to(&answer.bytes, (answer.to, DHCP_CLIENT)).await;
        }
    }
}

/// Whether somebody is of the network, or the host itself.
fn is_own(view: &Shared, from: SocketAddr) -> bool {
    match from.ip() {
        IpAddr::V4(address) => view.look(|view| view.subnet.contains(address)),
        IpAddr::V6(_) => false,
    }
}

async fn serve_udp(socket: Arc<UdpSocket>, view: Shared, forwards: Arc<Semaphore>) {
    let mut buffer = vec![0; DNS_UDP_BYTES_MAX];
    loop {
        let Ok((len, from)) = socket.recv_from(&mut buffer).await else {
            sleep(PAUSE).await;
            continue;
        };
        if !is_own(&view, from) {
            continue;
        }
        let bytes = buffer.get(..len).unwrap_or(&[]);
        match view.look(|view| dns::answer(bytes, view)) {
            Reply::Ignore => {}
            Reply::Answer(answer) => drop(socket.send_to(&answer, from).await),
            Reply::Forward => {
                // Whoever asks for too much at once asks again.
                let Ok(permit) = Arc::clone(&forwards).try_acquire_owned() else { continue };
                let (socket, question) = (Arc::clone(&socket), bytes.to_vec());
                tokio::spawn(async move {
                    let answer = match forward_udp(&question).await {
                        Some(answer) => Some(answer),
                        None => dns::failure(&question),
                    };
                    if let Some(answer) = answer {
                        let _ = socket.send_to(&answer, from).await;
                    }
                    drop(permit);
                });
            }
        }
    }
}

async fn serve_tcp(listener: TcpListener, view: Shared, forwards: Arc<Semaphore>) {
    let connections = Arc::new(Semaphore::new(DNS_CONNECTIONS_MAX));
    loop {
        let Ok((stream, from)) = listener.accept().await else {
            sleep(PAUSE).await;
            continue;
        };
        let Ok(permit) = Arc::clone(&connections).try_acquire_owned() else { continue };
        if !is_own(&view, from) {
            continue;
        }
        let (view, forwards) = (view.clone(), Arc::clone(&forwards));
        tokio::spawn(async move {
            // It ends when the client goes, is silent or says what is no message.
            let _ = serve_stream(stream, view, forwards).await;
            drop(permit);
        });
    }
}

async fn serve_stream(
    mut stream: TcpStream,
    view: Shared,
    forwards: Arc<Semaphore>,
) -> io::Result<()> {
    loop {
        let question = timeout(DNS_IDLE_TIME, read_message(&mut stream)).await??;
        let answer = match view.look(|view| dns::answer(&question, view)) {
            Reply::Ignore => return Ok(()),
            Reply::Answer(answer) => Some(answer),
            Reply::Forward => match forwards.try_acquire() {
                Ok(_permit) => forward_tcp(&question).await.or_else(|| dns::failure(&question)),
                Err(_) => dns::failure(&question),
            },
        };
        let Some(answer) = answer else { return Ok(()) };
        timeout(DNS_IDLE_TIME, write_message(&mut stream, &answer)).await??;
    }
}

/// A message after its length (RFC 1035, 4.2.2).
async fn read_message(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let len = stream.read_u16().await?;
    let mut message = vec![0; usize::from(len)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

async fn write_message(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let len = u16::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidData)?;
    let mut bytes = len.to_be_bytes().to_vec();
    bytes.extend(message);
    stream.write_all(&bytes).await
}

/// The host's name servers now.
fn upstreams() -> Vec<SocketAddr> {
    let mut text = Vec::new();
    let read = File::open(RESOLV_CONF)
        .and_then(|file| file.take(RESOLV_CONF_BYTES_MAX).read_to_end(&mut text));
    if read.is_err() {
        return Vec::new();
    }
    let (config, _) = resolv_conf::Config::parse_with_errors(&text);
    let servers = config.nameservers.into_iter().take(DNS_UPSTREAMS_MAX);
    servers.map(|server| SocketAddr::new(server.into(), DNS)).collect()
}

async fn forward_udp(question: &[u8]) -> Option<Vec<u8>> {
    for server in upstreams() {
        let asked = timeout(DNS_UPSTREAM_TIME, ask_udp(server, question)).await;
        if let Ok(Ok(answer)) = asked {
            return Some(answer);
        }
    }
    None
}

/// From a port of its own, so that its answer is hard to guess.
async fn ask_udp(server: SocketAddr, question: &[u8]) -> io::Result<Vec<u8>> {
    let own = match server {
        SocketAddr::V4(_) => "0.0.0.0:0",
        SocketAddr::V6(_) => "[::]:0",
    };
    let socket = UdpSocket::bind(own).await?;
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; DNS_UDP_BYTES_MAX];
    loop {
        let len = socket.recv(&mut buffer).await?;
        let answer = buffer.get(..len).unwrap_or(&[]);
        // The first two bytes are the question's.
        if answer.len() > 2 && answer.get(..2) == question.get(..2) {
            return Ok(answer.to_vec());
        }
    }
}

async fn forward_tcp(question: &[u8]) -> Option<Vec<u8>> {
    for server in upstreams() {
        let ask = async {
            let mut stream = TcpStream::connect(server).await?;
            write_message(&mut stream, question).await?;
            read_message(&mut stream).await
        };
        if let Ok(Ok(answer)) = timeout(DNS_UPSTREAM_TIME, ask).await {
            return Some(answer);
        }
    }
    None
}
