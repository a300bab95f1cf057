//! Memory that a machine needs first when it goes on from a snapshot: the first that does so notes which
//! pages it has read, and for those that come later they are read ahead.
//!
//! The note is a file beside the stored memory, empty at first, that all directories with that memory have
//! by hard links. It is a hint: one that is not understood is left alone, and a wrong one costs time.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use berth_vmm::machine::Storer;
use berth_vmm::state::WORKING_SET;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

/// When what has been read is noted.
const NOTE_AFTER: Duration = Duration::from_secs(1);
const VERSION: u32 = 1;
/// Ranges of a note.
const RANGES_MAX: usize = 64 << 10;
/// Bytes of a note.
const NOTE_MAX: u64 = 2 << 20;
const PAGE: u64 = 4096;

#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Note {
    version: u32,
    /// First page and how many, by guest physical address.
    pages: Vec<(u64, u64)>,
}

impl Note {
    /// What a file says, if it can be of a machine with so much memory.
    fn parse(text: &[u8]) -> Option<Self> {
        let note: Self = serde_json::from_slice(text).ok()?;
        (note.version == VERSION && note.pages.len() <= RANGES_MAX).then_some(note)
    }

    fn ranges(&self) -> impl Iterator<Item = Range<u64>> {
        self.pages.iter().map(|&(first, count)| first..first.saturating_add(count))
    }
}

/// What is to be done about the memory of a machine that goes on.
pub(super) struct Ahead {
    file: File,
    pagemap: File,
    note: Option<Note>,
}

impl Ahead {
    /// Looks into the directory of a stored machine; `None` if there is nothing to do.
    pub(super) fn open(stored: &Path) -> Option<Self> {
        let file = File::options().read(true).write(true).open(stored.join(WORKING_SET)).ok()?;
        let meta = file.metadata().ok()?;
        if !meta.is_file() || meta.len() > NOTE_MAX {
            return None;
        }
        let mut text = Vec::new();
        (&file).take(NOTE_MAX).read_to_end(&mut text).ok()?;
        let note = Note::parse(&text);
        // Memory that nobody will go on from again needs none.
        if note.is_none() && (!text.is_empty() || meta.nlink() < 2) {
            return None;
        }
        // Before the process is confined.
        let pagemap = File::open("/proc/self/pagemap").ok()?;
        Some(Self { file, pagemap, note })
    }

    /// Does it while the guest goes on.
    pub(super) fn begin(self, storer: Arc<Storer>) {
        let thread = thread::Builder::new().name("ahead".into());
        // Without a thread the guest reads for itself.
        let _ = thread.spawn(move || match &self.note {
            Some(note) => {
                let pages = storer.prefetch(note.ranges());
                eprintln!("berth: {} KiB of its memory were read ahead", pages * PAGE / 1024);
            }
            None => {
                thread::sleep(NOTE_AFTER);
                if let Err(error) = self.note(&storer) {
                    eprintln!("berth: what was read of its memory is not noted: {error}");
                }
            }
        });
    }

    fn note(&self, storer: &Storer) -> io::Result<()> {
        let Some(touched) = storer.touched(&self.pagemap)? else { return Ok(()) };
        let pages = touched.iter().map(|range| (range.start, range.end - range.start));
        let note = Note { version: VERSION, pages: pages.take(RANGES_MAX).collect() };
        // Of clones that go on at the same time one notes it.
        if flock(&self.file, FlockOperation::NonBlockingLockExclusive).is_err()
            || self.file.metadata()?.len() != 0
        {
            return Ok(());
        }
        self.file.write_all_at(&serde_json::to_vec(&note)?, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::{Ahead, Note, VERSION, WORKING_SET};

    #[test]
    fn only_what_is_understood_is_a_hint() {
        let note = Note { version: VERSION, pages: vec![(1, 2), (u64::MAX, 9)] };
        let text = serde_json::to_vec(&note).unwrap();
        assert_eq!(Note::parse(&text), Some(note));
        for cut in 0..text.len() {
            assert_eq!(Note::parse(&text[..cut]), None);
        }
        assert_eq!(Note::parse(br#"{"version":2,"pages":[]}"#), None);
    }

    #[test]
    fn what_is_there_once_is_not_noted() {
        let dir = tempfile::tempdir().unwrap();
        assert!(Ahead::open(dir.path()).is_none());
        let file = dir.path().join(WORKING_SET);
        std::fs::write(&file, "").unwrap();
        assert!(Ahead::open(dir.path()).is_none());
        std::fs::hard_link(&file, dir.path().join("other")).unwrap();
        assert!(Ahead::open(dir.path()).unwrap().note.is_none());
        std::fs::write(&file, "{").unwrap();
        assert!(Ahead::open(dir.path()).is_none());
        std::fs::write(&file, r#"{"version":1,"pages":[]}"#).unwrap();
        assert!(Ahead::open(dir.path()).unwrap().note.is_some());
    }
}
