//! Folders of imports that broke off, and go on when their appliance comes again.
//!
//! ```text
//! .new-U/             an import that came less far than is worth keeping
//! ── all that came is synced; state/import/checkpoint; rename; sync ──
//! .import-U/          one that can go on at its checkpoint, or does
//!     lock            held by whoever goes on
//!     state/import/   head, known, checkpoint and what is not wanted of the appliance
//! ── all has come; rename; state/import is removed ──
//! NAME/               the machine
//! ```
//!
//! Before the checkpoint everything is on the disk; what is in the files behind it is of no use, and is cleared by
//! whoever goes on. A checkpoint that cannot be understood is none, and its folder is removed.

use std::fs;
use std::path::Path;
use std::time::Duration;

use berth_api::v1::machine::is_name;
use berth_appliance::checkpoint::Checkpoint;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::folder::{Folder, FolderError, failed, gone_is_well, read_bounded, replace};

/// What is kept besides the machine's files. Those are not in it.
pub const DIRECTORY: &str = "state/import";
/// The beginning of the appliance, as it came.
pub const HEAD: &str = "state/import/head";
/// Chunks that may be there again, in the order of their numbers.
pub const KNOWN: &str = "state/import/known";
/// What processors and devices held, which is not wanted; chunks of it may be there again.
pub const STATE: &str = "state/import/state";
/// How far it came.
const CHECKPOINT: &str = "state/import/checkpoint";
/// Bytes it may have.
const CHECKPOINT_MAX: u64 = 16 << 10;
/// The version that is written.
const VERSION: u32 = 1;
/// What the name of such a folder begins with.
const PREFIX: &str = ".import-";
/// Most of them that nobody goes on with.
const KEPT_MAX: usize = 8;
/// How long they are kept.
pub const AGE_MAX: Duration = Duration::from_secs(7 * 24 * 3600);

/// How far an import came, and what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Note {
    version: u32,
    /// What the machine was to be called.
    pub name: String,
    /// Its memory is not wanted, if there is one.
    pub without_state: bool,
    /// When that was.
    pub time: Timestamp,
    /// Where the stream goes on.
    pub checkpoint: Checkpoint,
}

impl Note {
    /// One of this moment.
    #[must_use]
    pub fn new(name: String, without_state: bool, checkpoint: Checkpoint) -> Self {
        Self { version: VERSION, name, without_state, time: Timestamp::now(), checkpoint }
    }

    /// Writes it, so that it survives a loss of power, in place of an earlier one.
    ///
    /// # Errors
    /// [`FolderError::File`]; then the earlier one is there.
    pub fn write(&self, folder: &Folder) -> Result<(), FolderError> {
        let text = serde_json::to_string(self).unwrap_or_default();
        let sum = blake3::hash(text.as_bytes()).to_hex();
        replace(&folder.file(CHECKPOINT), format!("{sum}\n{text}").as_bytes())
    }

    /// Reads it.
    ///
    /// # Errors
    /// [`FolderError`]; it is not as it was written.
    pub fn read(folder: &Folder) -> Result<Self, FolderError> {
        let path = folder.file(CHECKPOINT);
        let text = read_bounded(&path, CHECKPOINT_MAX)?;
        let refused = |reason| FolderError::Config { path: path.clone(), reason };
        let (sum, text) = text.split_once('\n').unwrap_or_default();
        if blake3::hash(text.as_bytes()).to_hex().as_str() != sum {
            return Err(refused("its checksum is another".into()));
        }
        let note: Self = serde_json::from_str(text).map_err(|error| refused(error.to_string()))?;
        match note.version {
            VERSION => Ok(note),
            other => Err(refused(format!("its version is {other}"))),
        }
    }
}

/// The name of a folder.
#[must_use]
pub fn name(id: Uuid) -> String {
    format!("{PREFIX}{id}")
}

/// All folders, also those that are of no use.
///
/// # Errors
/// The directory cannot be read.
pub fn all(machines: &Path) -> Result<Vec<(Uuid, Folder)>, FolderError> {
    let mut all = Vec::new();
    for entry in fs::read_dir(machines).map_err(failed("reading", machines))? {
        let entry = entry.map_err(failed("reading", machines))?;
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        if let Some(id) = id.and_then(|id| id.parse().ok()) {
            all.push((id, Folder::at(entry.path())));
        }
    }
    Ok(all)
}

/// Removes folders that cannot go on or were kept for too long, and the oldest if there are too many.
/// Those that somebody goes on with stay.
///
/// # Errors
/// The directory cannot be read.
pub fn sweep(machines: &Path, now: Timestamp) -> Result<(), FolderError> {
    let mut kept = Vec::new();
    for (_, folder) in all(machines)? {
        let Ok(lock) = folder.lock() else { continue };
        match Note::read(&folder) {
            Err(error) => remove(folder, &error.to_string()),
            // A clock that was set back makes nothing old.
            Ok(note)
                if Duration::try_from(now.duration_since(note.time))
                    .is_ok_and(|age| age > AGE_MAX) =>
            {
                remove(folder, "it was kept for too long");
            }
            Ok(note) => kept.push((note.time, folder, lock)),
        }
    }
    kept.sort_by_key(|(time, ..)| std::cmp::Reverse(*time));
    for (_, folder, _lock) in kept.into_iter().skip(KEPT_MAX) {
        remove(folder, "there are too many");
    }
    Ok(())
}

fn remove(folder: Folder, why: &str) {
    let path = folder.path().display().to_string();
    tracing::warn!(path, "what was kept of an import is removed: {why}");
    if let Err(error) = folder.remove() {
        tracing::error!(path, error = &error as &dyn std::error::Error, "is left");
    }
}

/// Removes what is not needed any more from a folder that is a machine.
pub fn forget(folder: &Folder) {
    let path = folder.file(DIRECTORY);
    if let Err(error) = gone_is_well(fs::remove_dir_all(&path)) {
        tracing::warn!(%error, path = %path.display(), "what is left cannot be removed");
    }
}

/// The same with all machines, of which a crash may have left some so.
///
/// # Errors
/// The directory cannot be read.
pub fn forget_all(machines: &Path) -> Result<(), FolderError> {
    for entry in fs::read_dir(machines).map_err(failed("reading", machines))? {
        let entry = entry.map_err(failed("reading", machines))?;
        if entry.file_name().to_str().is_some_and(is_name) {
            forget(&Folder::at(entry.path()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(at: u64) -> Note {
        let chain = blake3::hash(b"x");
        let checkpoint = Checkpoint { at, chunks: 7, file: 2, done: 131_072, chain };
        Note::new("web".into(), true, checkpoint)
    }

    fn make(machines: &Path, note: &Note) -> Folder {
        let folder = Folder::at(machines.join(name(Uuid::new_v4())));
        fs::create_dir_all(folder.file(DIRECTORY)).unwrap();
        note.write(&folder).unwrap();
        folder
    }

    #[test]
    fn a_checkpoint_is_as_it_was_written_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let folder = make(dir.path(), &note(1 << 30));
        assert_eq!(
            Note::read(&folder).unwrap(),
            Note { time: Note::read(&folder).unwrap().time, ..note(1 << 30) }
        );
        let good = fs::read(folder.file(CHECKPOINT)).unwrap();
        for at in 0..good.len() {
            fs::write(folder.file(CHECKPOINT), &good[..at]).unwrap();
            Note::read(&folder).unwrap_err();
            let mut altered = good.clone();
            altered[at] ^= 4;
            fs::write(folder.file(CHECKPOINT), altered).unwrap();
            Note::read(&folder).unwrap_err();
        }
        // Right, but of another program.
        for text in [r#"{"version":2}"#, "null", ""] {
            let sum = blake3::hash(text.as_bytes()).to_hex();
            fs::write(folder.file(CHECKPOINT), format!("{sum}\n{text}")).unwrap();
            Note::read(&folder).unwrap_err();
        }
        fs::write(folder.file(CHECKPOINT), vec![b'a'; 1 << 20]).unwrap();
        Note::read(&folder).unwrap_err();
        sweep(dir.path(), Timestamp::now()).unwrap();
        assert!(!folder.path().exists(), "it begins anew");
    }

    #[test]
    fn what_is_kept_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let now = Timestamp::now();
        let ago = |hours: i64| now - jiff::SignedDuration::from_hours(hours);
        let folders: Vec<_> =
            (0..12).map(|hours| make(dir.path(), &Note { time: ago(hours), ..note(1) })).collect();
        let old = make(dir.path(), &Note { time: ago(24 * 7 + 1), ..note(1) });
        let busy = make(dir.path(), &Note { time: ago(24 * 8), ..note(1) });
        let lock = busy.lock().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        fs::create_dir(dir.path().join(".import-x")).unwrap();
        sweep(dir.path(), now).unwrap();
        let is_there = |folder: &Folder| folder.path().exists();
        assert!(folders[..KEPT_MAX].iter().all(is_there), "the newest");
        assert!(!folders[KEPT_MAX..].iter().any(is_there) && !is_there(&old));
        assert!(is_there(&busy), "somebody goes on with it");
        drop(lock);
        sweep(dir.path(), now).unwrap();
        assert!(!is_there(&busy));
        assert!(dir.path().join("a").exists());
    }

    #[test]
    fn a_machine_keeps_nothing_of_its_import() {
        let dir = tempfile::tempdir().unwrap();
        let folder = make(dir.path(), &note(1));
        let folder = folder.rename("a").unwrap();
        fs::write(folder.file("kernel"), "k").unwrap();
        forget_all(dir.path()).unwrap();
        assert!(!folder.file(DIRECTORY).exists() && folder.file("kernel").exists());
    }
}
