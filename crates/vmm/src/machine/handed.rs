//! A frozen machine handed from its process to that of a clone, through a Unix socket: what it holds
//! as JSON, and its memory as open files, which both then share.
//!
//! ```text
//! length of the JSON (8 bytes, little-endian), with the files as SCM_RIGHTS │ JSON
//! ```

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use berth_translator::Origin;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::state::MachineState;

/// Bytes of JSON at most.
const JSON_MAX: u64 = 64 << 20;
/// Files at most: what the kernel passes at once (SCM_MAX_FD).
const FILES_MAX: usize = 253;

/// A machine that goes on in another process.
pub struct Handed {
    /// What it holds besides its memory.
    pub state: MachineState,
    /// Where its memory is.
    pub memory: Origin,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    state: MachineState,
    files: usize,
    /// The file of each page (0: none, it is zero), and how many pages it is the same for.
    runs: Vec<(u8, u64)>,
}

/// Hands it to whoever is at the other end.
///
/// # Errors
/// It is gone, or the system's.
pub fn hand(mut to: &UnixStream, state: &MachineState, memory: &Origin) -> io::Result<()> {
    let runs = memory.of_page.chunk_by(|a, b| a == b);
    let runs = runs.filter_map(|run| Some((*run.first()?, run.len() as u64))).collect();
    if memory.files.len() > FILES_MAX {
        return Err(io::Error::other("memory is in too many files"));
    }
    let message = Message { state: state.clone(), files: memory.files.len(), runs };
    let json = serde_json::to_vec(&message)?;
    let files: Vec<_> = memory.files.iter().map(|file| file.as_fd()).collect();
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if !files.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(&files)) {
        return Err(io::Error::other("memory is in too many files"));
    }
    let length = (json.len() as u64).to_le_bytes();
    let sent = sendmsg(to, &[IoSlice::new(&length)], &mut rights, SendFlags::NOSIGNAL)?;
    to.write_all(length.get(sent..).unwrap_or_default())?;
    to.write_all(&json)
}

impl Handed {
    /// Receives what [`hand`] sends.
    ///
    /// # Errors
    /// It is not that, or the system's.
    pub fn receive(mut from: &UnixStream) -> io::Result<Self> {
        let strange = |what: String| io::Error::new(io::ErrorKind::InvalidData, what);
        let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FILES_MAX))];
        let mut rights = RecvAncillaryBuffer::new(&mut space);
        let mut length = [0; 8];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(from, &mut [IoSliceMut::new(&mut length)], &mut rights, flags)?.bytes;
        let mut files: Vec<Arc<OwnedFd>> = Vec::new();
        for message in rights.drain() {
            if let RecvAncillaryMessage::ScmRights(received) = message {
                files.extend(received.map(Arc::new));
            }
        }
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        from.read_exact(length.get_mut(got..).unwrap_or_default())?;
        let length = u64::from_le_bytes(length);
        if length > JSON_MAX {
            return Err(strange(format!("{length} bytes of JSON")));
        }
        let mut json = Vec::new();
        from.take(length).read_to_end(&mut json)?;
        let message: Message = serde_json::from_slice(&json)?;
        let bytes = message.state.memory_bytes;
        let pages: u64 = message.runs.iter().fold(0, |sum, (_, len)| sum.saturating_add(*len));
        if message.files != files.len() || pages != bytes / 4096 {
            return Err(strange(format!("{} files, {pages} pages", files.len())));
        }
        for file in &files {
            // One that is shorter would end the process when it is read behind its end.
            let len = rustix::fs::fstat(file)?.st_size;
            if u64::try_from(len).unwrap_or(0) < bytes {
                return Err(strange(format!("a file of {len} bytes for memory of {bytes}")));
            }
        }
        let mut of_page = Vec::with_capacity(usize::try_from(pages).unwrap_or(0));
        for (file, len) in message.runs {
            if usize::from(file) > files.len() {
                return Err(strange(format!("pages in file {file} of {}", files.len())));
            }
            of_page.extend(std::iter::repeat_n(file, usize::try_from(len).unwrap_or(0)));
        }
        Ok(Self { state: message.state, memory: Origin { files, of_page } })
    }
}
