//! What this daemon stored or verified itself, so that a restore does not read all memory again.
//!
//! A file is taken for the same as long as its inode, length and times are. It is remembered in memory
//! only: the next daemon verifies everything once.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use berth_api::v1::machine::MachineConfig;
use uuid::Uuid;

use crate::folder::{FolderError, MACHINE, MEMORY, failed};
use crate::snapshot::SnapshotError;
use crate::snapshot::sums::{self, StateSums};

/// Most snapshots that are remembered.
const KNOWN_MAX: usize = 1024;
/// The times of files are those of a clock that stands still in between: what is written so soon after
/// what was written before may have the same time.
const TICK: Duration = Duration::from_millis(20);

/// States of snapshots, by the snapshots' identities.
#[derive(Debug, Default)]
pub struct Verified(Mutex<HashMap<Uuid, Known>>);

#[derive(Debug)]
struct Known {
    stamps: [Stamp; 2],
    sums: StateSums,
    /// The machine it is known to be fit for, on this host.
    fits: Option<MachineConfig>,
}

/// What changes when a file does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    inode: (u64, u64),
    size: u64,
    modified: (i64, i64),
    /// Changes with the number of its names too.
    changed: (i64, i64),
}

impl Stamp {
    fn is_same_but_for_names(&self, other: &Self) -> bool {
        Self { changed: other.changed, ..*self } == *other
    }
}

/// The stamps of a state's files; nothing if one was written a moment ago.
fn stamps(directory: &Path) -> Result<Option<[Stamp; 2]>, FolderError> {
    let mut is_settled = true;
    let mut stamp = |name: &str| {
        let path = directory.join(name);
        let meta = path.symlink_metadata().map_err(failed("reading", &path))?;
        let age = meta.modified().ok().and_then(|time| SystemTime::now().duration_since(time).ok());
        is_settled &= meta.is_file() && age.is_some_and(|age| age >= TICK);
        Ok(Stamp {
            inode: (meta.dev(), meta.ino()),
            size: meta.len(),
            modified: (meta.mtime(), meta.mtime_nsec()),
            changed: (meta.ctime(), meta.ctime_nsec()),
        })
    };
    let stamps = [stamp(MACHINE)?, stamp(MEMORY)?];
    Ok(is_settled.then_some(stamps))
}

impl Verified {
    fn known(&self) -> MutexGuard<'_, HashMap<Uuid, Known>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, id: Uuid, known: Known) {
        let mut all = self.known();
        if all.len() >= KNOWN_MAX {
            all.clear();
        }
        all.insert(id, known);
    }

    /// The sums of a state that is to be in a snapshot.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn sum(&self, id: Uuid, directory: &Path) -> Result<StateSums, FolderError> {
        let before = stamps(directory)?;
        let sums = sums::of(directory)?;
        if let Some(stamps) = stamps(directory)?.filter(|after| before == Some(*after)) {
            self.remember(id, Known { stamps, sums: sums.clone(), fits: None });
        }
        Ok(sums)
    }

    /// Makes sure that a snapshot's state is what was stored. Says whether that was known.
    ///
    /// # Errors
    /// As [`StateSums::verify`].
    pub fn verify(
        &self,
        id: Uuid,
        sums: &StateSums,
        directory: &Path,
    ) -> Result<bool, SnapshotError> {
        let before = stamps(directory)?;
        let is_same = |known: &Known| Some(known.stamps) == before && known.sums == *sums;
        if self.known().get(&id).is_some_and(is_same) {
            return Ok(true);
        }
        self.known().remove(&id);
        sums.verify(directory)?;
        if let Some(stamps) = stamps(directory)?.filter(|after| before == Some(*after)) {
            self.remember(id, Known { stamps, sums: sums.clone(), fits: None });
        }
        Ok(false)
    }

    /// Takes note that other names of the files were made or removed by this program.
    pub fn renamed(&self, id: Uuid, directory: &Path) {
        let Ok(Some(now)) = stamps(directory) else { return };
        if let Some(known) = self.known().get_mut(&id)
            && known.stamps.iter().zip(&now).all(|(then, now)| then.is_same_but_for_names(now))
        {
            known.stamps = now;
        }
    }

    /// Whether it is known that a machine can go on with it here.
    #[must_use]
    pub fn fits(&self, id: Uuid, machine: &MachineConfig) -> bool {
        self.known().get(&id).is_some_and(|known| known.fits.as_ref() == Some(machine))
    }

    /// Takes note that it can.
    pub fn note_fit(&self, id: Uuid, machine: &MachineConfig) {
        if let Some(known) = self.known().get_mut(&id) {
            known.fits = Some(machine.clone());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, FileTimes};
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_did_not_change_is_read_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path(MACHINE), "{}").unwrap();
        fs::write(path(MEMORY), [7; 4096]).unwrap();
        let (verified, id, machine) =
            (Verified::default(), Uuid::new_v4(), MachineConfig::default());
        let past = SystemTime::now() - Duration::from_secs(10);
        let times = FileTimes::new().set_modified(past);
        let memory = File::options().write(true).open(path(MEMORY)).unwrap();
        // What was written just now may be written again at the same time.
        let sums = verified.sum(id, dir.path()).unwrap();
        assert!(!verified.verify(id, &sums, dir.path()).unwrap());
        for name in [MACHINE, MEMORY] {
            let file = File::options().write(true).open(path(name)).unwrap();
            file.set_times(times).unwrap();
        }
        verified.sum(id, dir.path()).unwrap();
        let is_known = || verified.verify(id, &sums, dir.path());
        assert!(is_known().unwrap());
        assert!(!verified.fits(id, &machine));
        verified.note_fit(id, &machine);
        assert!(verified.fits(id, &machine));
        assert!(!verified.fits(id, &MachineConfig { cpus: 2, ..machine.clone() }));
        // Of another snapshot nothing is known, and these are not its sums.
        let other = StateSums { machine: "other".into(), ..sums.clone() };
        assert!(verified.verify(Uuid::new_v4(), &other, dir.path()).is_err());
        // Names of ours.
        fs::hard_link(path(MEMORY), path("linked")).unwrap();
        verified.renamed(id, dir.path());
        assert!(is_known().unwrap());
        fs::remove_file(path("linked")).unwrap();
        assert!(!is_known().unwrap(), "names of somebody else");
        assert!(!verified.fits(id, &machine), "it is another file for all that is known");
        assert!(is_known().unwrap());
        // Altered, also when its time is put back.
        memory.write_all_at(&[8], 100).unwrap();
        assert!(is_known().is_err());
        memory.write_all_at(&[7], 100).unwrap();
        memory.set_times(times).unwrap();
        assert!(!is_known().unwrap());
        assert!(is_known().unwrap());
        memory.write_all_at(&[8], 100).unwrap();
        memory.set_times(times).unwrap();
        assert!(is_known().is_err());
        memory.write_all_at(&[7], 100).unwrap();
        memory.set_times(times).unwrap();
        assert!(!is_known().unwrap());
        // Cut, replaced, gone.
        memory.set_len(100).unwrap();
        verified.renamed(id, dir.path());
        assert!(is_known().is_err());
        memory.set_len(0).unwrap();
        memory.write_all_at(&[7; 4096], 0).unwrap();
        assert!(!is_known().unwrap());
        fs::copy(path(MEMORY), path("copy")).unwrap();
        fs::rename(path("copy"), path(MEMORY)).unwrap();
        assert!(!is_known().unwrap());
        fs::remove_file(path(MACHINE)).unwrap();
        assert!(is_known().is_err());
    }
}
