//! Folders of machines for which nobody has waited until they would survive a loss of power.
//!
//! ```text
//! .new-U/state/unsettled-BOOT     the first thing in a folder; then whatever it needs, not synced
//! NAME/state/unsettled-BOOT       it has its name, and may be used
//! ── all files and directories synced, and the directory of machines ──
//! NAME/state/                     settled
//! ```
//!
//! What happens to names gets to the disk in order on ext4, XFS and btrfs. So a folder that has its name
//! after a loss of power has the entry too, unless it was settled; of another boot, the entry says that
//! anything in the folder may be incomplete, and the folder is removed. If only the daemon ended, the
//! folder is whole, and settled by the next one.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;

use berth_api::v1::machine::is_name;
use berth_api::vmm::ORIGIN;
use rustix::fs::{Mode, OFlags};

use crate::folder::{Folder, FolderError, failed, gone_is_well, own_file, sync};

/// What the name of the entry begins with, before the boot in which it was made.
const PREFIX: &str = "unsettled-";
/// Where the kernel says which boot this is.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Which boot of the host this is.
///
/// # Errors
/// [`FolderError::File`].
pub fn boot_id() -> Result<String, FolderError> {
    let path = Path::new(BOOT_ID);
    let text = fs::read_to_string(path).map_err(failed("reading", path))?;
    Ok(text.trim().to_owned())
}

/// Notes that nobody has waited for anything in a folder.
///
/// # Errors
/// [`FolderError::File`].
pub fn note(folder: &Folder, boot: &str) -> Result<(), FolderError> {
    let path = folder.file(format!("state/{PREFIX}{boot}"));
    own_file().write(true).open(&path).map(drop).map_err(failed("creating", &path))
}

/// The boots of the entries in a folder: nothing if it is settled.
///
/// # Errors
/// [`FolderError::File`].
pub fn boots(folder: &Folder) -> Result<Vec<String>, FolderError> {
    let state = folder.file("state");
    let entries = match fs::read_dir(&state) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(failed("reading", &state))?,
    };
    let mut boots = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed("reading", &state))?.file_name();
        boots.extend(name.to_str().and_then(|name| name.strip_prefix(PREFIX)).map(str::to_owned));
    }
    Ok(boots)
}

/// Waits until a folder would survive a loss of power, and says so in it. `before` are directories in
/// which something was renamed that it depends on.
///
/// # Errors
/// [`FolderError::File`]; then it stays unsettled.
pub fn settle(folder: &Folder, before: &[&Path]) -> Result<(), FolderError> {
    let folder = Held::open(folder)?;
    sync_tree(folder.0.path())?;
    before.iter().try_for_each(|directory| sync(directory))?;
    folder.remove_entries()
}

/// The same with everything on its file system, for a folder of which it is not known what it depends
/// on. One that is settled already is left alone.
///
/// # Errors
/// As [`settle`].
pub fn settle_with_all(folder: &Folder) -> Result<(), FolderError> {
    if boots(folder)?.is_empty() {
        return Ok(());
    }
    let folder = Held::open(folder)?;
    let synced = rustix::fs::syncfs(&folder.1);
    synced.map_err(|errno| failed("syncing", folder.0.path())(errno.into()))?;
    folder.remove_entries()
}

/// A folder that may be renamed meanwhile.
struct Held(Folder, File);

impl Held {
    fn open(folder: &Folder) -> Result<Self, FolderError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let opened = rustix::fs::open(folder.path(), flags, Mode::empty());
        let opened = opened.map_err(|errno| failed("opening", folder.path())(errno.into()))?;
        let path = format!("/proc/self/fd/{}", opened.as_raw_fd());
        Ok(Self(Folder::at(path), opened.into()))
    }

    fn remove_entries(&self) -> Result<(), FolderError> {
        for boot in boots(&self.0)? {
            let path = self.0.file(format!("state/{PREFIX}{boot}"));
            gone_is_well(fs::remove_file(&path)).map_err(failed("removing", &path))?;
        }
        sync(&self.0.file("state"))
    }
}

/// Syncs what is in a directory, and then it. What is removed meanwhile needs no sync.
fn sync_tree(directory: &Path) -> Result<(), FolderError> {
    for entry in fs::read_dir(directory).map_err(failed("reading", directory))? {
        let entry = entry.map_err(failed("reading", directory))?;
        let path = entry.path();
        let Ok(kind) = entry.file_type() else { continue };
        let synced = if kind.is_dir() {
            sync_tree(&path)
        } else if kind.is_file() {
            let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let opened = rustix::fs::open(&path, flags, Mode::empty()).map(File::from);
            let synced = opened.map_err(io::Error::from).and_then(|file| file.sync_all());
            synced.map_err(failed("syncing", &path))
        } else {
            Ok(())
        };
        match synced {
            Err(FolderError::File { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
            synced => synced?,
        }
    }
    sync(directory)
}

/// Looks through machines for folders that are not settled, when nobody makes any. Removes those that
/// power was lost for, and clones of this boot that never began and cannot any more; returns the others,
/// which are to be settled.
///
/// # Errors
/// The directory cannot be read.
pub fn sweep(machines: &Path, boot: &str) -> Result<Vec<Folder>, FolderError> {
    let mut whole = Vec::new();
    for entry in fs::read_dir(machines).map_err(failed("reading", machines))? {
        let name = entry.map_err(failed("reading", machines))?.file_name();
        let Some(name) = name.to_str().filter(|name| is_name(name)) else { continue };
        let folder = Folder::at(machines.join(name));
        // One that cannot be looked at is reported by whoever reads it.
        let boots = boots(&folder).unwrap_or_default();
        if boots.is_empty() {
            continue;
        }
        let why = match boots.iter().all(|one| one == boot) {
            false => "the power was lost while this machine was being made",
            true if folder.file(ORIGIN).exists() => "the daemon ended before this clone began",
            true => {
                whole.push(folder);
                continue;
            }
        };
        // Whoever has it is about to begin with it, or uses it.
        let Ok(_lock) = folder.lock() else {
            whole.push(folder);
            continue;
        };
        tracing::warn!(machine = name, "removed: {why}");
        if let Err(error) = folder.remove() {
            tracing::error!(machine = name, error = &error as &dyn std::error::Error, "is left");
        }
    }
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use jiff::Timestamp;
    use uuid::Uuid;

    use super::*;
    use crate::folder::{Unnamed, VERSION, VmToml, put};

    const BOOT: &str = "this-boot";

    fn make(machines: &Path, name: &str, boot: &str) -> Folder {
        let config = VmToml {
            version: VERSION,
            id: Uuid::new_v4(),
            created: Timestamp::now(),
            machine: Default::default(),
        };
        let unnamed = Unnamed::make_unsettled(machines, &config, boot, |folder| {
            assert_eq!(boots(folder)?, [boot], "it is the first thing");
            fs::create_dir(folder.file("snapshots")).unwrap();
            put(&folder.file("snapshots/current.toml"), b"")
        });
        unnamed.unwrap().name(name).unwrap()
    }

    fn swept(machines: &Path) -> Vec<String> {
        let whole = sweep(machines, BOOT).unwrap();
        let name =
            |folder: &Folder| folder.path().file_name().unwrap().to_str().unwrap().to_owned();
        let mut names: Vec<_> = whole.iter().map(name).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_settled_stays() {
        let dir = tempfile::tempdir().unwrap();
        let folder = make(dir.path(), "a", "another-boot");
        std::os::unix::fs::symlink("/nowhere", folder.file("link")).unwrap();
        settle(&folder, &[dir.path()]).unwrap();
        assert_eq!(boots(&folder).unwrap(), [""; 0]);
        let folder = make(dir.path(), "b", BOOT);
        settle_with_all(&folder).unwrap();
        settle_with_all(&folder).unwrap();
        assert_eq!(swept(dir.path()), [""; 0]);
        for name in ["a", "b"] {
            Folder::at(dir.path().join(name)).config().unwrap();
        }
        // What cannot be settled stays as it is.
        let folder = make(dir.path(), "c", BOOT);
        assert!(settle(&folder, &[Path::new("/nowhere")]).is_err());
        assert_eq!(boots(&folder).unwrap(), [BOOT]);
        assert!(settle(&Folder::at("/nowhere"), &[]).is_err());
    }

    #[test]
    fn after_a_loss_of_power_nothing_of_it_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let lost = make(dir.path(), "lost", "another-boot");
        fs::write(lost.file("vm.toml"), "").unwrap();
        // Also one that went through two of them.
        let twice = make(dir.path(), "twice", BOOT);
        note(&twice, "another-boot").unwrap();
        assert_eq!(swept(dir.path()), [""; 0]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        // A link to one that is elsewhere is removed, and that is not.
        let elsewhere = tempfile::tempdir().unwrap();
        let other = make(elsewhere.path(), "other", "another-boot");
        std::os::unix::fs::symlink(other.path(), dir.path().join("other")).unwrap();
        assert_eq!(swept(dir.path()), [""; 0]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        other.config().unwrap();
    }

    #[test]
    fn when_only_the_daemon_ended_it_is_whole() {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path(), "made", BOOT);
        let running = make(dir.path(), "running", BOOT);
        let beginning = make(dir.path(), "beginning", BOOT);
        let locks = [running.lock().unwrap(), beginning.lock().unwrap()];
        // Whoever has the lock takes what is kept for it.
        put(&beginning.file(ORIGIN), b"{}").unwrap();
        let never = make(dir.path(), "never", BOOT);
        put(&never.file(ORIGIN), b"{}").unwrap();
        assert_eq!(swept(dir.path()), ["beginning", "made", "running"]);
        assert!(!never.path().exists(), "nobody keeps its memory any more");
        drop(locks);
        for name in ["beginning", "made", "running"] {
            settle_with_all(&Folder::at(dir.path().join(name))).unwrap();
        }
        assert_eq!(swept(dir.path()), [""; 0]);
        running.config().unwrap();
    }

    #[test]
    fn the_kernel_says_which_boot_it_is() {
        assert_eq!(boot_id().unwrap().len(), 36);
        assert_eq!(boot_id().unwrap(), boot_id().unwrap());
    }
}
