//! The process that becomes those of running clones, seen from the daemon, and the messages between both:
//! JSON in one packet, with descriptors.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use berth_api::vmm::{Begin, Begun};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes of a message.
const MESSAGE_MAX: usize = 64 << 10;
/// Descriptors with it.
const DESCRIPTORS_MAX: usize = 4;
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
    loop {
        match sendmsg(to, &[IoSlice::new(&json)], &mut rights, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(_) => return Ok(()),
        }
    }
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
    let got = loop {
        match recvmsg(from, &mut [IoSliceMut::new(&mut json)], &mut rights, flags) {
            Err(Errno::INTR) => {}
            got => break got?.bytes,
        }
    };
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
    /// The folder of the machine whose clones it becomes: those of others have addresses of their own.
    of: PathBuf,
    /// The file it was started from.
    file: Option<(u64, i64, i64)>,
}

/// Which file a program is.
fn file(program: &Path) -> Option<(u64, i64, i64)> {
    let meta = std::fs::metadata(program).ok()?;
    Some((meta.ino(), meta.mtime(), meta.mtime_nsec()))
}

impl Running {
    fn start(program: &Path, root: &Path, of: &Path) -> io::Result<Self> {
        let file = file(program);
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
        Ok(Self { socket, process, of: of.to_owned(), file })
    }

    fn copy(&self, begin: &Begin, given: [BorrowedFd<'_>; 3]) -> io::Result<(Pid, OwnedFd)> {
        let [stdin, stdout, stderr] = given;
        // It does nothing before it is known here, and ends if it never is.
        let (wait, go) = pipe_with(PipeFlags::CLOEXEC)?;
        send(self.socket.as_fd(), begin, &[stdin, stdout, stderr, wait.as_fd()])?;
        drop(wait);
        let answer = receive(self.socket.as_fd())?.ok_or(io::ErrorKind::UnexpectedEof)?;
        match answer {
            (Begun::Pid(pid), mut given) => {
                let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
                let known = pid.zip(given.pop()).ok_or(io::ErrorKind::InvalidData)?;
                rustix::io::retry_on_intr(|| rustix::io::write(&go, b"!"))?;
                Ok(known)
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
    /// Starts the process for clones of the machine with this folder, if there is none, so that it is ready
    /// when it is needed. That of another machine ends.
    pub fn prepare(&self, program: &Path, root: &Path, of: &Path) {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = |running: &Running| running.of == of && running.file == file(program);
        if !running.as_ref().is_some_and(fits) {
            *running = None;
            match Running::start(program, root, of) {
                Ok(started) => *running = Some(started),
                Err(error) => tracing::warn!(%error, "clones get processes of their own"),
            }
        }
    }

    /// Makes a copy of it the process of a clone of the machine with the folder `of`, with these descriptors as
    /// its standard input, output and error.
    ///
    /// # Errors
    /// There is none for that machine, or it cannot; then there is none any more.
    pub fn copy(
        &self,
        begin: &Begin,
        of: &Path,
        given: [BorrowedFd<'_>; 3],
    ) -> io::Result<(Pid, OwnedFd)> {
        let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let its = running.as_ref().filter(|running| running.of == of);
        let copied = its.ok_or(io::ErrorKind::NotFound)?.copy(begin, given);
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
        let (root, of) = (Path::new("/r"), Path::new("/a"));
        let copy = || zygote.copy(&begin, of, [null.as_fd(); 3]).unwrap_err().kind();
        assert_eq!(copy(), io::ErrorKind::NotFound);
        zygote.prepare(Path::new("/nonexistent"), root, of);
        assert_eq!(copy(), io::ErrorKind::NotFound);
        zygote.prepare(Path::new("/bin/true"), root, Path::new("/b"));
        assert_eq!(copy(), io::ErrorKind::NotFound, "it is another one's");
        zygote.prepare(Path::new("/bin/true"), root, of);
        copy();
        assert_eq!(copy(), io::ErrorKind::NotFound, "it was ended");
    }
}
