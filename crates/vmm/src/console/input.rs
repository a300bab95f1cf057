//! Reading for the guest: standard input with its escape, and socket clients.

use std::io::{self, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::console::CLIENT_WRITE_TIME;
use crate::console::output::Client;
use crate::console::port::Port;
use crate::outcome::{Ending, Outcome};

/// Ctrl-]
const ESCAPE: u8 = 0x1d;

/// Gives input to a port, and waits while it has no room.
pub(super) struct Feeder {
    port: Box<dyn Port>,
    stop: Arc<EventFd>,
}

/// What woke a wait.
#[derive(PartialEq, Eq)]
pub(super) enum Woken {
    Ready,
    Stop,
}

/// Waits until `fd` can be read (or its other side has gone) or `stop` is signalled.
pub(super) fn wait_readable(fd: RawFd, stop: &EventFd) -> Woken {
    wait_for(fd, libc::POLLIN, stop)
}

/// Waits until one of `events` (or an error, or the end) happens on `fd` or `stop` is signalled.
pub(super) fn wait_for(fd: RawFd, events: libc::c_short, stop: &EventFd) -> Woken {
    loop {
        let poll = |fd, events| libc::pollfd { fd, events, revents: 0 };
        let mut fds = [poll(fd, events), poll(stop.as_raw_fd(), libc::POLLIN)];
        // SAFETY: two valid pollfds are passed with the count 2.
        let count = unsafe { libc::poll(fds.as_mut_ptr(), 2, -1) };
        let interrupted = io::Error::last_os_error().kind() == io::ErrorKind::Interrupted;
        if count < 0 && interrupted {
            continue;
        }
        if count < 0 || fds[1].revents != 0 {
            return Woken::Stop;
        }
        if fds[0].revents != 0 {
            return Woken::Ready;
        }
    }
}

impl Feeder {
    pub(super) fn new(port: Box<dyn Port>, stop: Arc<EventFd>) -> Self {
        Self { port, stop }
    }

    /// Reads standard input to its end.
    pub(super) fn read_stdin(&self, escape: bool, ending: &Ending) {
        let mut filter = EscapeFilter::default();
        let mut buffer = [0; 1024];
        let stdin = io::stdin();
        while wait_readable(stdin.as_raw_fd(), &self.stop) == Woken::Ready {
            let count = match read_fd(stdin.as_raw_fd(), &mut buffer) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return tracing::info!(%error, "console input ends"),
            };
            let data = buffer.get(..count).unwrap_or_default();
            let (data, ended) = if escape { filter.pass(data) } else { (data.to_vec(), false) };
            if ended {
                return ending.end(Outcome::Stopped);
            }
            if !self.port.feed(&data, &self.stop) {
                return;
            }
        }
    }

    /// Serves one client after the other.
    pub(super) fn serve(&self, listener: &UnixListener, current: &Client) {
        while wait_readable(listener.as_raw_fd(), &self.stop) == Woken::Ready {
            let stream = listener.accept().and_then(|(stream, _)| {
                stream.set_write_timeout(Some(CLIENT_WRITE_TIME))?;
                Ok(Arc::new(stream))
            });
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    tracing::warn!(%error, "a console client could not connect");
                    continue;
                }
            };
            let set = |client| *current.lock().unwrap_or_else(PoisonError::into_inner) = client;
            set(Some(Arc::clone(&stream)));
            let goes_on = self.read_client(&stream);
            set(None);
            if !goes_on {
                return;
            }
        }
    }

    /// Reads a stream until its other end is gone.
    pub(super) fn read_stream(&self, stream: &UnixStream) {
        self.read_client(stream);
    }

    /// Until the client is gone. One that only has nothing more to say still listens.
    fn read_client(&self, mut stream: &UnixStream) -> bool {
        let mut buffer = [0; 1024];
        while wait_readable(stream.as_raw_fd(), &self.stop) == Woken::Ready {
            match stream.read(&mut buffer) {
                // Without events to wait for, poll still reports a hang-up.
                Ok(0) => return wait_for(stream.as_raw_fd(), 0, &self.stop) == Woken::Ready,
                Ok(count) => {
                    let data = buffer.get(..count).unwrap_or_default();
                    if !self.port.feed(data, &self.stop) {
                        return false;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return true,
            }
        }
        false
    }
}

/// Reads without the buffer of [`io::stdin`], which would hide bytes from poll.
fn read_fd(fd: RawFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the pointer and length are those of one live buffer.
    let count = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    usize::try_from(count).map_err(|_| io::Error::last_os_error())
}

/// Finds Ctrl-] followed by `.`; Ctrl-] twice is one for the guest.
#[derive(Default)]
pub struct EscapeFilter {
    escaped: bool,
}

impl EscapeFilter {
    /// What is for the guest, and whether the escape came.
    pub fn pass(&mut self, data: &[u8]) -> (Vec<u8>, bool) {
        let mut out = Vec::with_capacity(data.len() + 1);
        for &byte in data {
            match (std::mem::take(&mut self.escaped), byte) {
                (true, b'.') => return (out, true),
                (true, ESCAPE) => out.push(ESCAPE),
                (true, byte) => out.extend_from_slice(&[ESCAPE, byte]),
                (false, ESCAPE) => self.escaped = true,
                (false, byte) => out.push(byte),
            }
        }
        (out, false)
    }
}

#[cfg(test)]
mod tests {
    use super::EscapeFilter;

    fn check(pieces: &[&[u8]], want: &[u8], ended: bool) {
        let mut filter = EscapeFilter::default();
        let mut got = Vec::new();
        for piece in pieces {
            let (data, end) = filter.pass(piece);
            got.extend(data);
            if end {
                assert!(ended);
                assert_eq!(got, want);
                return;
            }
        }
        assert_eq!((&got[..], false), (want, ended));
    }

    #[test]
    fn the_escape_is_found_also_between_reads() {
        check(&[b"ls\r"], b"ls\r", false);
        check(&[b"a\x1d."], b"a", true);
        check(&[b"a\x1d", b".b"], b"a", true);
        check(&[b"\x1d\x1d."], b"\x1d.", false);
        check(&[b"\x1dx"], b"\x1dx", false);
        check(&[b"."], b".", false);
    }
}
