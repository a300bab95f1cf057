//! Connections over TCP, with TLS and certificates on both sides.
//!
//! Whoever has no certificate gets nothing but a handshake, which has a limited time; so many of them
//! are under way at most, and fewer from one address, so that one who dawdles keeps nobody out.

use std::collections::HashMap;
use std::future::pending;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::serve::Listener;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::server::TlsStream;

use crate::failure::chain;

/// How long a handshake may take.
const HANDSHAKE_TIME: Duration = Duration::from_secs(5);
/// Handshakes at once.
const HANDSHAKES_MAX: usize = 64;
/// Of these, from one address.
const HANDSHAKES_EACH_MAX: usize = 16;
/// Connections at once of those who have a certificate.
const CONNECTIONS_MAX: usize = 512;
/// How long, and how much, is read from one who was refused, so that he can read why.
const DRAIN_TIME: Duration = Duration::from_secs(1);
const DRAIN_BYTES: u64 = 64 << 10;
/// After a failure of the system, as when there are no descriptors left.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Between two lines in the log about those who were refused.
const REPORT_PAUSE: Duration = Duration::from_secs(1);
/// After so long without a sign of life a connection is asked for one.
const KEEPALIVE: Duration = Duration::from_secs(60);

const _: () = assert!(HANDSHAKES_EACH_MAX < HANDSHAKES_MAX);

/// Gives connections whose handshake is done.
pub(super) struct TlsListener {
    address: SocketAddr,
    ready: mpsc::Receiver<(Connection, SocketAddr)>,
    accepting: JoinHandle<()>,
}

impl TlsListener {
    /// Listens at `ADDRESS:PORT`.
    ///
    /// # Errors
    /// The system's.
    pub(super) async fn bind(address: &str, config: Arc<ServerConfig>) -> io::Result<Self> {
        let listener = TcpListener::bind(address).await?;
        let address = listener.local_addr()?;
        let (to, ready) = mpsc::channel(1);
        let accepting = tokio::spawn(accept_all(listener, config, to));
        Ok(Self { address, ready, accepting })
    }

    /// Where it listens.
    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for TlsListener {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl Listener for TlsListener {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        match self.ready.recv().await {
            Some(accepted) => accepted,
            // It is aborted with this.
            None => pending().await,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.address)
    }
}

async fn accept_all(
    listener: TcpListener,
    config: Arc<ServerConfig>,
    to: mpsc::Sender<(Connection, SocketAddr)>,
) {
    let acceptor = TlsAcceptor::from(config);
    let waiting = Arc::new(Waiting::default());
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                waiting.report(&format!("a connection was not accepted: {error}"));
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let Some(place) = Waiting::enter(&waiting, peer.ip()) else {
            waiting.report(&format!("{peer} was not let in: too many handshakes are under way"));
            continue;
        };
        let (acceptor, to) = (acceptor.clone(), to.clone());
        let connections = Arc::clone(&connections);
        tokio::spawn(async move {
            let waiting = Arc::clone(&place.waiting);
            let Some(stream) = shake_hands(stream, peer, &acceptor, &waiting).await else { return };
            drop(place);
            match connections.try_acquire_owned() {
                // Nobody takes it when the daemon ends.
                Ok(permit) => drop(to.send((Connection { stream, _permit: permit }, peer)).await),
                Err(_) => waiting.report(&format!(
                    "{peer} was not let in: {CONNECTIONS_MAX} connections are open"
                )),
            }
        });
    }
}

async fn shake_hands(
    stream: TcpStream,
    peer: SocketAddr,
    acceptor: &TlsAcceptor,
    waiting: &Waiting,
) -> Option<TlsStream<TcpStream>> {
    // Without these it is slower, and a peer that is gone is noticed later.
    let _ = stream.set_nodelay(true);
    let _ = sockopt::set_socket_keepalive(&stream, true);
    let _ = sockopt::set_tcp_keepidle(&stream, KEEPALIVE);
    match timeout(HANDSHAKE_TIME, acceptor.accept(stream).into_fallible()).await {
        Ok(Ok(stream)) => Some(stream),
        Ok(Err((error, mut stream))) => {
            waiting.report(&format!("{peer} was not let in: {}", chain(&error)));
            // Closing with something unread would take the reason away from the other side.
            let drain = async {
                let _ = stream.shutdown().await;
                let _ =
                    tokio::io::copy(&mut stream.take(DRAIN_BYTES), &mut tokio::io::sink()).await;
            };
            let _ = timeout(DRAIN_TIME, drain).await;
            None
        }
        Err(_) => {
            let seconds = HANDSHAKE_TIME.as_secs();
            waiting.report(&format!("{peer} was not let in: no handshake within {seconds} s"));
            None
        }
    }
}

/// Handshakes under way, and what is said of those that fail.
#[derive(Default)]
struct Waiting {
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    all: usize,
    /// At most as many as there are handshakes.
    each: HashMap<IpAddr, usize>,
    /// When something was said, and what has not been said since.
    said: Option<Instant>,
    unsaid: u64,
}

/// A handshake under way.
struct Place {
    waiting: Arc<Waiting>,
    peer: IpAddr,
}

impl Waiting {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enter(waiting: &Arc<Self>, peer: IpAddr) -> Option<Place> {
        let mut inner = waiting.inner();
        let each = inner.each.get(&peer).copied().unwrap_or(0);
        if inner.all >= HANDSHAKES_MAX || each >= HANDSHAKES_EACH_MAX {
            return None;
        }
        inner.all += 1;
        inner.each.insert(peer, each + 1);
        drop(inner);
        Some(Place { waiting: Arc::clone(waiting), peer })
    }

    /// Says it in the log, unless something was said just now.
    fn report(&self, text: &str) {
        let mut inner = self.inner();
        if inner.said.is_some_and(|said| said.elapsed() < REPORT_PAUSE) {
            inner.unsaid += 1;
            return;
        }
        inner.said = Some(Instant::now());
        let unsaid = std::mem::take(&mut inner.unsaid);
        drop(inner);
        tracing::warn!(unsaid, "{text}");
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inner = self.waiting.inner();
        inner.all -= 1;
        match inner.each.get_mut(&self.peer) {
            Some(count) if *count > 1 => *count -= 1,
            _ => drop(inner.each.remove(&self.peer)),
        }
    }
}

/// A connection of somebody who has a certificate.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    _permit: OwnedSemaphorePermit,
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffers: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(context, buffers)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_does_not_take_all_places() {
        let waiting = Arc::new(Waiting::default());
        let enter = |last| Waiting::enter(&waiting, IpAddr::from([10, 0, 0, last]));
        let mut places: Vec<_> = (0..HANDSHAKES_EACH_MAX).map(|_| enter(1).unwrap()).collect();
        assert!(enter(1).is_none());
        for last in 2.. {
            let Some(place) = enter(last) else { break };
            places.push(place);
        }
        assert_eq!(places.len(), HANDSHAKES_MAX);
        places.clear();
        assert!(waiting.inner().each.is_empty() && waiting.inner().all == 0);
        assert!(enter(1).is_some());
    }
}
