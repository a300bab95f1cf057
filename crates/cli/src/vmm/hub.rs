//! The console of a kept machine: what the guest prints goes into the log and to whoever is attached;
//! what they type goes to the guest.
//!
//! The guest never waits for somebody who is attached: one who does not read loses the connection
//! once so much is waiting for him.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use berth_daemon::folder::Folder;
use berth_daemon::log::Log;

/// Bytes that are moved at once.
const CHUNK: usize = 16 << 10;
/// Chunks that wait for somebody who is attached.
const CHUNKS_MAX: usize = 64;
/// How long the guest may take for what is typed.
const TYPE_TIME: Duration = Duration::from_millis(500);
/// Who can be attached at once.
const ATTACHED_MAX: usize = 32;

/// The hub.
pub struct Hub {
    guest: UnixStream,
    inner: Mutex<Inner>,
    reader: Mutex<Option<JoinHandle<()>>>,
}

struct Inner {
    record: Record,
    attached: Vec<(u64, SyncSender<Arc<[u8]>>)>,
    next: u64,
}

/// The console's log; what cannot be written of it is said once.
struct Record {
    log: Log,
    failed: bool,
}

impl Record {
    fn write(&mut self, bytes: &[u8]) {
        match self.log.write(bytes) {
            Ok(()) => self.failed = false,
            // A full disk does not stop the guest. Said once.
            Err(error) if !std::mem::replace(&mut self.failed, true) => {
                eprintln!("berth: the console's log cannot be written: {error}");
            }
            Err(_) => {}
        }
    }
}

impl Hub {
    /// Begins to read what the guest prints.
    ///
    /// # Errors
    /// The log cannot be opened, or there is no thread.
    pub fn start(guest: UnixStream, folder: &Folder) -> io::Result<Arc<Self>> {
        let record =
            Record { log: Log::open(folder.file(berth_daemon::vmm::CONSOLE))?, failed: false };
        let from = guest.try_clone()?;
        guest.set_write_timeout(Some(TYPE_TIME))?;
        let inner = Mutex::new(Inner { record, attached: Vec::new(), next: 0 });
        let hub = Arc::new(Self { guest, inner, reader: Mutex::default() });
        let reading = Arc::clone(&hub);
        let thread = thread::Builder::new().name("console-hub".into());
        let thread = thread.spawn(move || reading.read(from))?;
        *hub.reader.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(hub)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self, mut from: UnixStream) {
        let mut chunk = vec![0; CHUNK];
        loop {
            let count = match from.read(&mut chunk) {
                Ok(0) => return,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            let bytes: Arc<[u8]> = chunk.get(..count).unwrap_or_default().into();
            let mut inner = self.inner();
            inner.record.write(&bytes);
            // Who is gone or too slow is not attached any more.
            inner.attached.retain(|(_, to)| to.try_send(Arc::clone(&bytes)).is_ok());
        }
    }

    /// What is printed from now on is kept for somebody, after so many of the last bytes.
    ///
    /// # Errors
    /// There are too many, or the log cannot be read.
    pub fn attach(&self, backlog: u32) -> io::Result<Attached<'_>> {
        let (sender, printed) = mpsc::sync_channel::<Arc<[u8]>>(CHUNKS_MAX);
        let mut inner = self.inner();
        if inner.attached.len() >= ATTACHED_MAX {
            return Err(io::Error::other(format!("{ATTACHED_MAX} are attached already")));
        }
        let past = inner.record.log.tail(u64::from(backlog))?;
        let id = inner.next;
        inner.next += 1;
        inner.attached.push((id, sender));
        Ok(Attached { hub: self, id, past, printed })
    }

    fn type_in(&self, mut client: &UnixStream) {
        let mut chunk = vec![0; CHUNK];
        loop {
            match client.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => {
                    let bytes = chunk.get(..count).unwrap_or_default();
                    if !self.give(bytes) {
                        break;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
    }

    /// Gives the guest what was typed. What it does not take in time is lost, as on a line that nobody
    /// reads; so whoever typed it can leave.
    fn give(&self, mut bytes: &[u8]) -> bool {
        while !bytes.is_empty() {
            match (&self.guest).write(bytes) {
                Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return error.kind() == io::ErrorKind::WouldBlock,
            }
        }
        true
    }

    /// Once the machine has ended: what it printed last is written.
    pub fn finish(&self) {
        let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner).take();
        let _ = self.guest.shutdown(Shutdown::Write);
        if let Some(reader) = reader {
            // The machine has closed its end.
            let _ = reader.join();
        }
        self.inner().attached.clear();
    }
}

/// Somebody for whom output is kept.
pub struct Attached<'a> {
    hub: &'a Hub,
    id: u64,
    past: Vec<u8>,
    printed: Receiver<Arc<[u8]>>,
}

impl Attached<'_> {
    /// Moves bytes both ways until the client or the machine goes.
    ///
    /// # Errors
    /// There is no thread.
    pub fn serve(self, client: &UnixStream) -> io::Result<()> {
        let mut to = client.try_clone()?;
        let writer = thread::Builder::new().name("console-client".into());
        let past = [Arc::from(self.past)];
        let printed = self.printed;
        let writer = writer.spawn(move || {
            for bytes in past.into_iter().chain(printed) {
                if to.write_all(&bytes).is_err() {
                    break;
                }
            }
            // Wakes up whoever reads from it.
            let _ = to.shutdown(Shutdown::Both);
        })?;
        self.hub.type_in(client);
        // Nothing more is kept for it, which ends the writer.
        self.hub.inner().attached.retain(|(id, _)| *id != self.id);
        let _ = writer.join();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn hub() -> (tempfile::TempDir, UnixStream, Arc<Hub>) {
        let dir = tempfile::tempdir().unwrap();
        let (guest, near) = UnixStream::pair().unwrap();
        let hub = Hub::start(near, &Folder::at(dir.path())).unwrap();
        (dir, guest, hub)
    }

    fn read(mut from: &UnixStream, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        from.read_exact(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn several_read_and_type() {
        let (dir, mut guest, hub) = hub();
        guest.write_all(b"before").unwrap();
        let log = dir.path().join("console.log");
        while fs::read(&log).unwrap() != b"before" {
            thread::yield_now();
        }
        let attach = |backlog| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (hub, (told, attached)) = (Arc::clone(&hub), mpsc::channel());
            thread::spawn(move || {
                let there = hub.attach(backlog).unwrap();
                told.send(()).unwrap();
                there.serve(&theirs).unwrap();
            });
            attached.recv().unwrap();
            ours
        };
        let (one, two) = (attach(3), attach(0));
        guest.write_all(b"after").unwrap();
        assert_eq!(read(&one, 8), b"oreafter");
        assert_eq!(read(&two, 5), b"after");
        (&one).write_all(b"typed").unwrap();
        assert_eq!(read(&guest, 5), b"typed");
        drop(one);
        (&two).write_all(b"more").unwrap();
        assert_eq!(read(&guest, 4), b"more");
        drop(guest);
        hub.finish();
        assert_eq!(fs::read(&log).unwrap(), b"beforeafter");
        // Whoever is attached is told that it is over.
        assert_eq!((&two).read(&mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn who_does_not_read_does_not_hold_up_the_guest() {
        let (_dir, mut guest, hub) = hub();
        let attached = hub.attach(0).unwrap();
        guest.write_all(&vec![b'x'; 8 << 20]).unwrap();
        drop(guest);
        hub.finish();
        let got: usize = attached.printed.iter().map(|bytes| bytes.len()).sum();
        assert!(got < 8 << 20, "{got}");
    }
}
