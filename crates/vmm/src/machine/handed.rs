//! A frozen machine handed from its process to that of a clone, through a Unix socket: what it holds
//! as JSON, and its memory and what was translated of it as open files, which both then share.
//!
//! ```text
//! length of the JSON (8 bytes, little-endian), with the files as SCM_RIGHTS │ JSON
//! ```

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use berth_translator::{Origin, SharedCode, Written};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::state::MachineState;

/// Bytes of JSON at most.
const JSON_MAX: u64 = 64 << 20;
/// Pages of code and its tables at most; most of them have nothing.
const CODE_PAGES_MAX: u64 = 1 << 22;
/// Files at most: what the kernel passes at once (SCM_MAX_FD).
const FILES_MAX: usize = 253;

/// A machine that goes on in another process.
pub struct Handed {
    /// What it holds besides its memory.
    pub state: MachineState,
    /// Where its memory is.
    pub memory: Origin,
    /// What each vCPU has translated, if it is known.
    pub code: Vec<Option<SharedCode>>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Message {
    state: MachineState,
    memory: Pages,
    /// What each vCPU has translated.
    code: Vec<Option<Code>>,
}

/// Where pages are; the files follow those of what is before.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pages {
    files: usize,
    /// The file of each page (0: none, it is zero), and how many pages it is the same for.
    runs: Vec<(u8, u64)>,
    /// Those that are to be copied at once; none from a process that is older than this.
    #[serde(default)]
    ahead: Vec<Range<u64>>,
}

/// What a vCPU has translated.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Code {
    pages: Pages,
    numbers: Vec<u64>,
    guest_pages: Vec<u64>,
}

impl Pages {
    fn of(origin: &Origin, ahead: &[Range<u64>]) -> Self {
        let runs = origin.of_page.chunk_by(|a, b| a == b);
        let runs = runs.filter_map(|run| Some((*run.first()?, run.len() as u64)));
        Self { files: origin.files.len(), runs: runs.collect(), ahead: ahead.to_vec() }
    }

    /// How many there are.
    fn count(&self) -> u64 {
        self.runs.iter().fold(0, |sum, (_, len)| sum.saturating_add(*len))
    }

    /// The next of the files that came are those of these pages.
    fn take(self, files: &mut impl Iterator<Item = Arc<OwnedFd>>) -> io::Result<Origin> {
        let taken: Vec<_> = files.take(self.files).collect();
        if taken.len() != self.files {
            return Err(strange(format!("{} of {} files", taken.len(), self.files)));
        }
        let of_page = of_page(&self.runs, self.count(), &taken)?;
        Ok(Origin { files: taken, of_page, ahead: self.ahead })
    }
}

/// The file of each of so many pages; each file has to have all of them.
fn of_page(runs: &[(u8, u64)], pages: u64, files: &[Arc<OwnedFd>]) -> io::Result<Vec<u8>> {
    for file in files {
        // One that is shorter would end the process when it is read behind its end.
        let len = rustix::fs::fstat(file)?.st_size;
        if u64::try_from(len).unwrap_or(0) / 4096 < pages {
            return Err(strange(format!("a file of {len} bytes for {pages} pages")));
        }
    }
    let mut of_page = Vec::new();
    let room = usize::try_from(pages).unwrap_or(usize::MAX);
    of_page.try_reserve(room).map_err(|_| strange(format!("{pages} pages")))?;
    for &(file, len) in runs {
        if usize::from(file) > files.len() {
            return Err(strange(format!("pages in file {file} of {}", files.len())));
        }
        of_page.extend(std::iter::repeat_n(file, usize::try_from(len).unwrap_or(0)));
    }
    Ok(of_page)
}

fn strange(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

/// Hands it to whoever is at the other end, and says what he will write soon.
///
/// # Errors
/// It is gone, or the system's.
pub fn hand(
    mut to: &UnixStream,
    state: &MachineState,
    memory: &Origin,
    code: &[Option<SharedCode>],
    ahead: &Written,
) -> io::Result<()> {
    let mut files: Vec<_> = memory.files.iter().map(|file| file.as_fd()).collect();
    if files.len() > FILES_MAX {
        return Err(io::Error::other("memory is in too many files"));
    }
    let mut told = Vec::new();
    let ahead_of = ahead.code.iter().map(Vec::as_slice).chain(std::iter::repeat(&[][..]));
    for (code, ahead) in code.iter().zip(ahead_of) {
        // What does not fit is translated anew.
        let fits = |code: &&SharedCode| files.len() + code.pages.files.len() <= FILES_MAX;
        let code = code.as_ref().filter(fits);
        files.extend(code.iter().flat_map(|code| code.pages.files.iter().map(|file| file.as_fd())));
        told.push(code.map(|code| Code {
            pages: Pages::of(&code.pages, ahead),
            numbers: code.numbers.clone(),
            guest_pages: code.guest_pages.clone(),
        }));
    }
    let memory = Pages::of(memory, &ahead.ram);
    let message = Message { state: state.clone(), memory, code: told };
    let json = serde_json::to_vec(&message)?;
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
        let mut files = files.into_iter();
        let pages = message.state.memory_bytes / 4096;
        if message.memory.count() != pages {
            return Err(strange(format!("{} pages instead of {pages}", message.memory.count())));
        }
        let memory = message.memory.take(&mut files)?;
        let mut code = Vec::new();
        for told in message.code {
            let Some(Code { pages, numbers, guest_pages }) = told else {
                code.push(None);
                continue;
            };
            if pages.count() > CODE_PAGES_MAX {
                return Err(strange(format!("{} pages of code", pages.count())));
            }
            let pages = pages.take(&mut files)?;
            code.push(Some(SharedCode { pages, numbers, guest_pages }));
        }
        Ok(Self { state: message.state, memory, code })
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixStream;

    use super::{Handed, Pages};

    fn received(bytes: &[u8]) -> std::io::Result<Handed> {
        let (mut far, near) = UnixStream::pair().unwrap();
        far.write_all(bytes).unwrap();
        drop(far);
        Handed::receive(&near)
    }

    #[test]
    fn rubbish_is_refused() {
        for len in [0u64, 1, 7, 64 << 20, (64 << 20) + 1, u64::MAX] {
            for text in ["", "{", "[]", r#"{"files":1}"#, "\u{1F980}"] {
                let mut bytes = len.to_le_bytes().to_vec();
                bytes.extend(text.as_bytes());
                for cut in 0..=bytes.len() {
                    assert!(received(&bytes[..cut]).is_err());
                }
            }
        }
    }

    #[test]
    fn pages_are_in_files_that_are_there() {
        let taken = |runs: &[(u8, u64)], files| {
            Pages { files, runs: runs.to_vec(), ahead: Vec::new() }.take(&mut std::iter::empty())
        };
        assert!(taken(&[(0, 3), (0, 1)], 0).unwrap().of_page == [0; 4]);
        for (runs, files) in [(&[(0, 3)][..], 1), (&[(1, 4)], 0), (&[(255, 4)], 0)] {
            assert!(taken(runs, files).is_err(), "{runs:?}");
        }
    }
}
