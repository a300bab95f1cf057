//! Accepts the host's connections and gives each a thread.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use berth_api::agent::limits::SESSIONS_MAX;
use rustix::net::{SocketFlags, accept_with};

use crate::power::Power;
use crate::reaper::Reaper;
use crate::session;
use crate::sys;

/// Serves the vsock port from a thread of its own.
pub fn serve_vsock(port: u32, reaper: &Arc<Reaper>, power: &Arc<Power>) -> io::Result<()> {
    let listener = sys::vsock_listen(port)?;
    let (reaper, power) = (Arc::clone(reaper), Arc::clone(power));
    std::thread::Builder::new().spawn(move || {
        let error = accept_all(&listener, &reaper, Some(&power));
        crate::boot::say(&format!("the agent no longer accepts connections: {error}"));
    })?;
    Ok(())
}

/// Serves a unix socket until accepting fails.
pub fn serve_unix(path: &Path, reaper: &Arc<Reaper>) -> io::Result<()> {
    let _ = fs::remove_file(path);
    let listener = OwnedFd::from(UnixListener::bind(path)?);
    Err(accept_all(&listener, reaper, None))
}

fn accept_all(listener: &OwnedFd, reaper: &Arc<Reaper>, power: Option<&Arc<Power>>) -> io::Error {
    let sessions = Arc::new(AtomicUsize::new(0));
    loop {
        let stream = match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(stream) => stream,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::CONNABORTED) => continue,
            Err(errno) => return errno.into(),
        };
        // Over the limit the connection is closed at once; the host sees the end of the stream.
        if sessions.fetch_add(1, Ordering::Relaxed) >= SESSIONS_MAX {
            sessions.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let (reaper, power, count) = (Arc::clone(reaper), power.cloned(), Arc::clone(&sessions));
        let thread = std::thread::Builder::new().spawn(move || {
            // A session that breaks ends its own connection and nothing else.
            let _ = session::serve(stream, &reaper, power.as_deref());
            count.fetch_sub(1, Ordering::Relaxed);
        });
        if thread.is_err() {
            sessions.fetch_sub(1, Ordering::Relaxed);
        }
    }
}
