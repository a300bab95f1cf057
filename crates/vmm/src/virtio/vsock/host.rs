//! What other threads of this process do with the guest's streams.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::virtio::limits::VSOCK_CALLS_MAX;

/// Why there is no stream.
#[derive(Debug, Error)]
pub enum VsockError {
    /// Nothing listens on the port in the guest, or the guest was reset.
    #[error("the guest refused a connection to vsock port {port}")]
    Refused {
        /// The port.
        port: u32,
    },
    /// No answer in time: the guest has no driver yet, or is stuck.
    #[error("the guest did not answer a connection to vsock port {port} in {timeout:?}")]
    TimedOut {
        /// The port.
        port: u32,
        /// How long it was waited.
        timeout: Duration,
    },
    /// Too many connections or calls at once.
    #[error("too many vsock connections; none to port {port}")]
    TooMany {
        /// The port.
        port: u32,
    },
    /// The device is gone.
    #[error("the vsock device is gone")]
    Gone,
    /// Someone listens on that port already.
    #[error("vsock port {port} has a listener already")]
    PortTaken {
        /// The port.
        port: u32,
    },
    /// The host refused a socket or event.
    #[error("cannot {operation}")]
    Host {
        /// What was attempted.
        operation: &'static str,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The socket path cannot be listened on.
    #[error("cannot listen on {path}")]
    Listen {
        /// The path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// How the device answers a call.
pub(super) enum Answer {
    Connected,
    Refused,
    TooMany,
}

/// A connection that the host asks for.
pub(super) struct Call {
    pub port: u32,
    pub stream: UnixStream,
    pub answer: SyncSender<Answer>,
    pub deadline: Instant,
}

pub(super) struct Shared {
    calls: Mutex<VecDeque<Call>>,
    listeners: Mutex<HashMap<u32, Sender<UnixStream>>>,
    gone: AtomicBool,
    pub wake: EventFd,
}

impl Shared {
    pub fn new() -> Result<Arc<Self>, VsockError> {
        let wake = EventFd::new(EFD_NONBLOCK)
            .map_err(|source| VsockError::Host { operation: "create an event", source })?;
        Ok(Arc::new(Self {
            calls: Mutex::default(),
            listeners: Mutex::default(),
            gone: AtomicBool::new(false),
            wake,
        }))
    }

    fn calls(&self) -> MutexGuard<'_, VecDeque<Call>> {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn push_call(&self, call: Call) {
        self.calls().push_back(call);
    }

    pub fn register(&self, port: u32, listener: Sender<UnixStream>) {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).insert(port, listener);
    }

    /// The next call that still has someone waiting.
    pub fn next_call(&self) -> Option<Call> {
        let now = Instant::now();
        let mut calls = self.calls();
        loop {
            let call = calls.pop_front()?;
            if call.deadline > now {
                return Some(call);
            }
        }
    }

    /// Hands a stream to the listener of a port; gives it back if there is none.
    pub fn deliver(&self, port: u32, stream: UnixStream) -> Result<(), UnixStream> {
        let mut listeners = self.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(listener) = listeners.get(&port) else { return Err(stream) };
        listener.send(stream).map_err(|refused| {
            // The receiver was dropped; the port is free again.
            listeners.remove(&port);
            refused.0
        })
    }

    pub fn has_listener(&self, port: u32) -> bool {
        self.listeners.lock().unwrap_or_else(PoisonError::into_inner).contains_key(&port)
    }

    pub fn close(&self) {
        self.gone.store(true, Ordering::SeqCst);
        self.calls().clear();
    }
}

/// Opens streams to the guest and accepts the guest's. Clones share the device.
#[derive(Clone)]
pub struct Vsock {
    pub(super) shared: Arc<Shared>,
}

impl Vsock {
    /// Connects to a port in the guest, waiting at most `timeout` for the answer. A guest that has
    /// not loaded its driver yet does not answer; one where nothing listens refuses at once.
    ///
    /// # Errors
    /// Refused, no answer, or no sockets left.
    pub fn connect(&self, port: u32, timeout: Duration) -> Result<UnixStream, VsockError> {
        if self.shared.gone.load(Ordering::SeqCst) {
            return Err(VsockError::Gone);
        }
        let host = |operation| move |source| VsockError::Host { operation, source };
        let (near, far) = UnixStream::pair().map_err(host("create a pair of sockets"))?;
        far.set_nonblocking(true).map_err(host("prepare a socket"))?;
        let (answer, answered) = sync_channel(1);
        let deadline = Instant::now() + timeout;
        {
            let mut calls = self.shared.calls();
            if calls.len() >= VSOCK_CALLS_MAX {
                let now = Instant::now();
                calls.retain(|call| call.deadline > now);
            }
            if calls.len() >= VSOCK_CALLS_MAX {
                return Err(VsockError::TooMany { port });
            }
            calls.push_back(Call { port, stream: far, answer, deadline });
        }
        self.shared.wake.write(1).map_err(host("wake the vsock device"))?;
        match answered.recv_timeout(timeout) {
            Ok(Answer::Connected) => Ok(near),
            Ok(Answer::Refused) => Err(VsockError::Refused { port }),
            Ok(Answer::TooMany) => Err(VsockError::TooMany { port }),
            Err(RecvTimeoutError::Timeout) => Err(VsockError::TimedOut { port, timeout }),
            Err(RecvTimeoutError::Disconnected) => Err(VsockError::Gone),
        }
    }

    /// Accepts the guest's connections to a port of the host. Dropping the receiver ends that.
    ///
    /// # Errors
    /// The port has a listener.
    pub fn listen(&self, port: u32) -> Result<Receiver<UnixStream>, VsockError> {
        let mut listeners = self.shared.listeners.lock().unwrap_or_else(PoisonError::into_inner);
        if listeners.contains_key(&port) {
            return Err(VsockError::PortTaken { port });
        }
        let (sender, receiver) = channel();
        listeners.insert(port, sender);
        Ok(receiver)
    }

    /// Ends listening on a port.
    pub fn unlisten(&self, port: u32) {
        self.shared.listeners.lock().unwrap_or_else(PoisonError::into_inner).remove(&port);
    }
}
