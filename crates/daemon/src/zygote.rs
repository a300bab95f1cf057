//! The process that becomes those of running clones, seen from the daemon, and the messages between both:
//! JSON in one packet, with descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use berth_api::vmm::{Begin, Begun};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::process::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of a message.
const MESSAGE_MAX: usize = 64 << 10;
/// Descriptors with it.
const DESCRIPTORS_MAX: usize = 3;
/// How long a copy may take.
const COPY_TIME: Duration = Duration::from_secs(5);
/// Bytes of a word among its arguments in whose place each copy shows its own.
const ROOM: usize = 1024;

/// Sends a message.
///
/// # Errors
/// The other end is gone, or the system's.
pub fn send(
    to: BorrowedFd<'_>,
    message: &impl Serialize,
    given: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let json = serde_json::to_vec(message)?;
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    let fits = given.is_empty() || rights.push(SendAncillaryMessage::ScmRights(given));
    if !fits || json.len() > MESSAGE_MAX {
        return Err(io::Error::other("a message that is too long"));
    }
    sendmsg(to, &[IoSlice::new(&json)], &mut rights, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a message; `None` if the other end is gone.
///
/// # Errors
/// It is not that, or the system's.
pub fn receive<T: DeserializeOwned>(from: BorrowedFd<'_>) -> io::Result<Option<(T, Vec<OwnedFd>)>> {
    let mut json = vec![0; MESSAGE_MAX];
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(from, &mut [IoSliceMut::new(&mut json)], &mut rights, flags)?.bytes;
    let mut given = Vec::new();
    for message in rights.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            given.extend(received);
        }
    }
    let json = json.get(..got).unwrap_or_default();
    if json.is_empty() {
        return Ok(None);
    }
    Ok(Some((serde_json::from_slice(json)?, given)))
}

/// The process, if there is one.
#[derive(Debug, Default)]
pub struct Zygote(Mutex<Option<Running>>);

#[derive(Debug)]
struct Running {
    socket: OwnedFd,
    process: Child,
}

impl Running {
    fn start(program: &Path, root: &Path) -> io::Result<Self> {
        let (socket, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        for timeout in [Timeout::Recv, Timeout::Send] {
            set_socket_timeout(&socket, timeout, Some(COPY_TIME))?;
        }
        let process = Command::new(program)
            .arg("--root")
            .arg(root)
            .args(["zygote", &"_".repeat(ROOM)])
            // As for each process of a machine.
            .env("MALLOC_ARENA_MAX", "2")
            .stdin(theirs)
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self { socket, process })
    }

    fn copy(&self, begin: &Begin, given: &[BorrowedFd<'_>]) -> io::Result<(Pid, OwnedFd)> {
        send(self.socket.as_fd(), begin, given)?;
        let answer = receive(self.socket.as_fd())?.ok_or(io::ErrorKind::UnexpectedEof)?;
        match answer {
            (Begun::Pid(pid), mut given) => {
                let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
                pid.zip(given.pop()).ok_or_else(|| io::ErrorKind::InvalidData.into())
            }
            (Begun::Failed(why), _) => Err(io::Error::other(why)),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Its copies go on.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Zygote {
    /// Starts the process if there is none, so that it is ready when it is needed.
    pub fn prepare(&self, program: &Path, root: &Path) {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if running.is_none() {
            match Running::start(program, root) {
                Ok(started) => *running = Some(started),
                Err(error) => tracing::warn!(%error, "clones get processes of their own"),
            }
        }
    }

    /// Makes a copy of it the process of a machine, with these descriptors as its standard input, output
    /// and error.
    ///
    /// # Errors
    /// There is none, or it cannot; then there is none any more.
    pub fn copy(&self, begin: &Begin, given: [BorrowedFd<'_>; 3]) -> io::Result<(Pid, OwnedFd)> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let copied = running.as_ref().ok_or(io::ErrorKind::NotFound)?.copy(begin, &given);
        if copied.is_err() {
            *running = None;
        }
        copied
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_carry_descriptors() {
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        let null = std::fs::File::open("/dev/null").unwrap();
        let begin = Begin {
            root: "/r".into(),
            folder: "/r/machines/a".into(),
            groups: vec!["/g".into()],
            tsc_hz: Some(7),
        };
        send(ours.as_fd(), &begin, &[null.as_fd(); 3]).unwrap();
        let (got, given) = receive::<Begin>(theirs.as_fd()).unwrap().unwrap();
        assert_eq!((got, given.len()), (begin, 3));
        rustix::io::write(&ours, b"{").unwrap();
        receive::<Begin>(theirs.as_fd()).unwrap_err();
        assert!(send(ours.as_fd(), &"x".repeat(MESSAGE_MAX), &[]).is_err());
        drop(ours);
        assert!(receive::<Begin>(theirs.as_fd()).unwrap().is_none());
    }

    #[test]
    fn what_does_not_answer_is_no_zygote() {
        let zygote = Zygote::default();
        let null = std::fs::File::open("/dev/null").unwrap();
        let begin =
            Begin { root: "/r".into(), folder: "/f".into(), groups: Vec::new(), tsc_hz: None };
        let copy = || zygote.copy(&begin, [null.as_fd(); 3]).unwrap_err().kind();
        assert_eq!(copy(), io::ErrorKind::NotFound);
        zygote.prepare(Path::new("/nonexistent"), Path::new("/r"));
        assert_eq!(copy(), io::ErrorKind::NotFound);
        zygote.prepare(Path::new("/bin/true"), Path::new("/r"));
        copy();
        assert_eq!(copy(), io::ErrorKind::NotFound, "it was ended");
    }
}
