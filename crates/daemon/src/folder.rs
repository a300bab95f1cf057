//! A machine is a folder. This module reads and writes it, so that at every instant it is as before
//! a change or as after it.
//!
//! Files are written beside their place, synced, renamed over it, and the directory is synced. A
//! folder that is made or removed has a name that begins with a dot until it is complete, or as soon
//! as it is not any more; [`sweep`] removes what a crash left, but imports that can go on
//! ([`unfinished`]). A folder for which nobody waited says so
//! ([`unsettled`]). `docs/formats/machine-folder.md`
//! describes what is inside.

pub mod unfinished;
pub mod unsettled;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_api::v1::machine::{Exit, MachineConfig};
use berth_api::vmm;
use berth_image::disk::copy_sparse;
use jiff::Timestamp;
use rustix::fs::{FlockOperation, OFlags};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use uuid::Uuid;

/// The version of `vm.toml` that is written.
pub const VERSION: u32 = 1;
/// What processors and devices of a stored machine hold, in its directory, and its bytes at most.
pub const MACHINE: &str = "machine.json";
const MACHINE_MAX: u64 = 4 << 20;
/// Its memory.
pub const MEMORY: &str = "memory";
/// The configuration's name.
pub const CONFIG: &str = "vm.toml";
/// Bytes a configuration may have.
const CONFIG_MAX: u64 = 64 << 10;
/// How often a lock that is waited for is tried.
const LOCK_POLL: Duration = Duration::from_millis(10);
/// What a folder is called while it is made, and while it is removed.
const UNFINISHED: [&str; 2] = [".new-", ".gone-"];

/// What `vm.toml` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmToml {
    /// [`VERSION`].
    pub version: u32,
    /// The machine's identity. Its hardware addresses come from it.
    pub id: Uuid,
    /// When it was created, or became a machine of its own.
    pub created: Timestamp,
    /// What it is made of.
    pub machine: MachineConfig,
}

/// The hardware address of a machine's network card: of its identity, so that it stays and no other machine
/// has it.
#[must_use]
pub fn hardware_address(id: Uuid) -> [u8; 6] {
    let hash = Sha256::digest(id.as_bytes());
    let mut bytes = [0; 6];
    bytes.iter_mut().zip(hash).for_each(|(to, from)| *to = from);
    // Locally administered, unicast.
    bytes[0] = bytes[0] & 0xfc | 0x02;
    bytes
}

/// Why a folder is of no use.
#[derive(Debug, thiserror::Error)]
pub enum FolderError {
    /// The system refused something.
    #[error("{action} {path} failed", path = path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// `vm.toml` is not what it should be.
    #[error("{path} cannot be understood: {reason}", path = path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// Somebody works on it, or its machine runs.
    #[error("{path} is in use by another process", path = path.display())]
    Locked {
        /// The folder.
        path: PathBuf,
    },
    /// It is there already.
    #[error("{path} is there already", path = path.display())]
    Exists {
        /// The folder.
        path: PathBuf,
    },
}

/// Makes an error of the system one of a file.
pub fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FolderError {
    let path = path.to_owned();
    move |source| FolderError::File { action, path, source }
}

/// A machine's folder. Nothing is kept open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Folder {
    path: PathBuf,
}

/// The right to change a folder, or to run its machine: nobody else has it meanwhile.
#[derive(Debug)]
pub struct FolderLock {
    _file: File,
}

impl Folder {
    /// The folder at a path, which need not exist.
    #[must_use]
    pub fn at(path: impl Into<PathBuf>) -> Self {
        Self { path: path.into() }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of something in it, or of something elsewhere that is absolute.
    #[must_use]
    pub fn file(&self, name: impl AsRef<Path>) -> PathBuf {
        self.path.join(name)
    }

    /// Makes a folder in a directory: `fill` puts into it what it needs besides `vm.toml`; it is
    /// there, complete, when this returns, or nothing is.
    ///
    /// # Errors
    /// [`FolderError`]; of `fill` too.
    pub fn create<E: From<FolderError>>(
        machines: &Path,
        name: &str,
        config: &VmToml,
        fill: impl FnOnce(&Self) -> Result<(), E>,
    ) -> Result<Self, E> {
        let target = machines.join(name);
        if target.symlink_metadata().is_ok() {
            return Err(FolderError::Exists { path: target }.into());
        }
        let made = Unnamed::make(machines, config, fill)?.name(name)?;
        // It is there; only a crash could undo that.
        warn(sync(machines));
        Ok(made)
    }

    /// Reads `vm.toml`.
    ///
    /// # Errors
    /// [`FolderError::File`], [`FolderError::Config`].
    pub fn config(&self) -> Result<VmToml, FolderError> {
        let path = self.file(CONFIG);
        let text = read_bounded(&path, CONFIG_MAX)?;
        parse_versioned(&path, &text, VERSION)
    }

    /// A suspended machine has the processors and the memory that it was started with, whatever was set
    /// for its next start: what goes on with its memory, or is made of it, has these, too.
    ///
    /// # Errors
    /// Its state cannot be read.
    pub fn as_stored(&self, config: &mut MachineConfig) -> Result<(), FolderError> {
        /// What of it matters here; all of it is checked by the machine's process.
        #[derive(Deserialize)]
        struct Stored {
            memory_bytes: u64,
            cpus: Vec<serde::de::IgnoredAny>,
        }
        let path = self.file(vmm::SUSPENDED).join(MACHINE);
        let text = read_bounded(&path, MACHINE_MAX)?;
        let stored: Stored = serde_json::from_str(&text)
            .map_err(|error| FolderError::Config { path, reason: error.to_string() })?;
        config.memory = stored.memory_bytes.into();
        config.cpus = u8::try_from(stored.cpus.len()).unwrap_or(config.cpus);
        Ok(())
    }

    /// Writes `vm.toml`.
    ///
    /// # Errors
    /// [`FolderError`]; then the old one is still there.
    pub fn write_config(&self, config: &VmToml) -> Result<(), FolderError> {
        let path = self.file(CONFIG);
        replace(&path, to_toml(&path, config)?.as_bytes())
    }

    /// How the machine ended the last time; nothing if it never ran, or did not come to say.
    #[must_use]
    pub fn last_exit(&self) -> Option<Exit> {
        let path = self.file(vmm::EXIT_FILE);
        let text = read_bounded(&path, CONFIG_MAX).ok()?;
        if text.is_empty() {
            // Power was lost soon after a start, which does not wait for this file.
            let time = fs::metadata(&path).and_then(|meta| meta.modified()).ok()?;
            let time = Timestamp::try_from(time).ok()?;
            return Some(Exit {
                time,
                in_order: false,
                reason: vmm::UNFINISHED.to_owned(),
                status: 1,
            });
        }
        serde_json::from_str(&text).ok()
    }

    /// Notes that it runs, that is, how it ended if nobody notes that. Nothing is waited for:
    /// [`Self::sync_last_exit`] does.
    ///
    /// # Errors
    /// [`FolderError::File`].
    pub fn note_start(&self) -> Result<(), FolderError> {
        let exit = Exit {
            time: Timestamp::now(),
            in_order: false,
            reason: vmm::UNFINISHED.to_owned(),
            status: 1,
        };
        put(&self.file(vmm::EXIT_FILE), &serde_json::to_vec(&exit).unwrap_or_default())
    }

    /// Makes what was noted of its end last.
    ///
    /// # Errors
    /// [`FolderError::File`].
    pub fn sync_last_exit(&self) -> Result<(), FolderError> {
        let path = self.file(vmm::EXIT_FILE);
        let synced = File::open(&path).and_then(|file| file.sync_all());
        synced.map_err(failed("syncing", &path))?;
        sync(path.parent().unwrap_or(Path::new("/")))
    }

    /// Notes how it ended, or that it runs again.
    ///
    /// # Errors
    /// [`FolderError::File`].
    pub fn set_last_exit(&self, exit: Option<&Exit>) -> Result<(), FolderError> {
        let path = self.file(vmm::EXIT_FILE);
        match exit {
            Some(exit) => {
                let text = serde_json::to_string(exit).unwrap_or_default();
                replace(&path, text.as_bytes())
            }
            None => remove_file(&path),
        }
    }

    /// Locks it, without waiting. The lock ends with the process that has it.
    ///
    /// # Errors
    /// [`FolderError::Locked`], [`FolderError::File`].
    pub fn lock(&self) -> Result<FolderLock, FolderError> {
        self.lock_named(vmm::LOCK)
    }

    /// The same with another file.
    ///
    /// # Errors
    /// As [`Self::lock`].
    pub fn lock_named(&self, name: &str) -> Result<FolderLock, FolderError> {
        let path = self.file(name);
        let opened = own_file().truncate(false).write(true).open(&path);
        let file = opened.map_err(failed("opening", &path))?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(FolderLock { _file: file }),
            Err(rustix::io::Errno::WOULDBLOCK) => {
                Err(FolderError::Locked { path: self.path.clone() })
            }
            Err(errno) => Err(failed("locking", &path)(errno.into())),
        }
    }

    /// Locks it as soon as whoever has it is gone, for which it waits so long.
    ///
    /// # Errors
    /// As [`Self::lock`].
    pub fn lock_within(&self, patience: Duration) -> Result<FolderLock, FolderError> {
        let began = Instant::now();
        loop {
            match self.lock() {
                Err(FolderError::Locked { .. }) if began.elapsed() < patience => {
                    std::thread::sleep(LOCK_POLL);
                }
                other => return other,
            }
        }
    }

    /// Gives it another name in the same directory.
    ///
    /// # Errors
    /// [`FolderError::Exists`], [`FolderError::File`].
    pub fn rename(&self, name: &str) -> Result<Self, FolderError> {
        let parent = self.path.parent().unwrap_or(Path::new("/"));
        let target = parent.join(name);
        rename_new(&self.path, &target)?;
        warn(sync(parent));
        Ok(Self::at(target))
    }

    /// Removes it with everything in it. One that is only linked to is forgotten: what was made
    /// elsewhere stays there.
    ///
    /// # Errors
    /// [`FolderError::File`]; it may be gone for all but the disk's space.
    pub fn remove(self) -> Result<(), FolderError> {
        let parent = self.path.parent().unwrap_or(Path::new("/")).to_owned();
        let is_link = self.path.symlink_metadata().is_ok_and(|meta| meta.is_symlink());
        if is_link {
            fs::remove_file(&self.path).map_err(failed("removing", &self.path))?;
            return sync(&parent);
        }
        let gone = parent.join(format!("{}{}", UNFINISHED[1], Uuid::new_v4()));
        fs::rename(&self.path, &gone).map_err(failed("removing", &self.path))?;
        sync(&parent)?;
        fs::remove_dir_all(&gone).map_err(failed("removing", &gone))
    }
}

/// A folder that is complete and has no name yet. Dropping it removes it.
#[derive(Debug)]
pub struct Unnamed {
    made: Folder,
    is_named: bool,
}

impl Unnamed {
    /// Makes one, as [`Folder::create`] does.
    ///
    /// # Errors
    /// [`FolderError`]; of `fill` too.
    pub fn make<E: From<FolderError>>(
        machines: &Path,
        config: &VmToml,
        fill: impl FnOnce(&Folder) -> Result<(), E>,
    ) -> Result<Self, E> {
        let unnamed = Self::begin(machines)?;
        fill(&unnamed.made)?;
        unnamed.complete(config)?;
        Ok(unnamed)
    }

    /// Writes what makes it a machine's, when everything else is in it.
    ///
    /// # Errors
    /// [`FolderError`].
    pub fn complete(&self, config: &VmToml) -> Result<(), FolderError> {
        self.made.write_config(config)?;
        sync(&self.made.file("state"))?;
        sync(&self.made.path)
    }

    /// The same without waiting for the disk: it is noted as unsettled in this boot before anything else
    /// is in it, and `fill` need not wait either.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn make_unsettled<E: From<FolderError>>(
        machines: &Path,
        config: &VmToml,
        boot: &str,
        fill: impl FnOnce(&Folder) -> Result<(), E>,
    ) -> Result<Self, E> {
        let unnamed = Self::begin(machines)?;
        let made = &unnamed.made;
        unsettled::note(made, boot)?;
        fill(made)?;
        let path = made.file(CONFIG);
        put(&path, to_toml(&path, config)?.as_bytes())?;
        Ok(unnamed)
    }

    /// Begins one that has its `state` and nothing else.
    ///
    /// # Errors
    /// [`FolderError::File`].
    pub fn begin(machines: &Path) -> Result<Self, FolderError> {
        let path = machines.join(format!("{}{}", UNFINISHED[0], Uuid::new_v4()));
        fs::create_dir(&path).map_err(failed("creating", &path))?;
        let unnamed = Self { made: Folder::at(path), is_named: false };
        let state = unnamed.made.file("state");
        fs::create_dir(&state).map_err(failed("creating", &state))?;
        Ok(unnamed)
    }

    /// One that was left.
    #[must_use]
    pub fn adopt(made: Folder) -> Self {
        Self { made, is_named: false }
    }

    /// What is made.
    #[must_use]
    pub fn folder(&self) -> &Folder {
        &self.made
    }

    /// Gives it a name by which it is found again when it is left.
    ///
    /// # Errors
    /// As [`Self::name`].
    pub fn call(&mut self, name: &str) -> Result<(), FolderError> {
        let target = self.made.path.with_file_name(name);
        rename_new(&self.made.path, &target)?;
        self.made = Folder::at(target);
        Ok(())
    }

    /// Leaves it as it is.
    pub fn leave(mut self) {
        self.is_named = true;
    }

    /// Gives it its name. Whoever does so syncs the directory.
    ///
    /// # Errors
    /// [`FolderError::Exists`], [`FolderError::File`].
    pub fn name(mut self, name: &str) -> Result<Folder, FolderError> {
        let target = self.made.path.with_file_name(name);
        rename_new(&self.made.path, &target)?;
        self.is_named = true;
        Ok(Folder::at(target))
    }
}

impl Drop for Unnamed {
    fn drop(&mut self) {
        if !self.is_named {
            // The next start of the daemon removes what cannot be removed now.
            let _ = self.made.clone().remove();
        }
    }
}

/// Gives a file that is never written another name: that takes no space. On another file system it is
/// copied.
///
/// # Errors
/// The system's.
pub fn link_or_copy(from: &Path, to: &Path) -> io::Result<()> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    let file = File::options().read(true).write(true).create_new(true).open(to)?;
    copy_sparse(&File::open(from)?, &file)?;
    file.sync_all()
}

/// How a file of a folder is opened, and made: for its user alone, not through a link, and without
/// waiting for the reader of a pipe.
#[must_use]
pub fn own_file() -> OpenOptions {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
    let mut options = File::options();
    options.create(true).mode(0o600).custom_flags(flags);
    options
}

/// Removes what a crash left of folders that were being made or removed.
///
/// # Errors
/// [`FolderError::File`] when the directory cannot be read.
pub fn sweep(machines: &Path) -> Result<(), FolderError> {
    for entry in fs::read_dir(machines).map_err(failed("reading", machines))? {
        let entry = entry.map_err(failed("reading", machines))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if UNFINISHED.iter().any(|prefix| name.starts_with(prefix))
            && let Err(error) = fs::remove_dir_all(entry.path())
        {
            tracing::warn!(%error, path = %entry.path().display(), "what is left cannot be removed");
        }
    }
    Ok(())
}

/// Reads TOML that says its version, of which only one is known.
///
/// # Errors
/// [`FolderError::Config`].
pub(crate) fn parse_versioned<T: DeserializeOwned>(
    path: &Path,
    text: &str,
    known: u32,
) -> Result<T, FolderError> {
    let refuse = |reason: String| FolderError::Config { path: path.to_owned(), reason };
    // Of another version more may be different than what is not understood.
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
    }
    let in_text = |error: toml::de::Error| refuse(located(&error, text));
    let version = toml::from_str::<Versioned>(text).map_err(in_text)?.version;
    if version != known {
        return Err(refuse(format!(
            "its version is {version}, and this program knows {known} only"
        )));
    }
    toml::from_str(text).map_err(in_text)
}

/// An error of the reader in one line.
fn located(error: &toml::de::Error, text: &str) -> String {
    let before = error.span().and_then(|span| text.get(..span.start));
    match before {
        Some(before) => {
            let number = before.matches('\n').count();
            let line = text.lines().nth(number).unwrap_or_default().trim();
            format!("line {} (`{line}`): {}", number + 1, error.message())
        }
        None => error.message().to_owned(),
    }
}

/// Renames, but never over something.
fn rename_new(from: &Path, to: &Path) -> Result<(), FolderError> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        Ok(()) => Ok(()),
        Err(rustix::io::Errno::EXIST) => Err(FolderError::Exists { path: to.to_owned() }),
        Err(errno) => Err(failed("renaming", from)(errno.into())),
    }
}

/// What is written as TOML.
pub(crate) fn to_toml(path: &Path, value: &impl Serialize) -> Result<String, FolderError> {
    toml::to_string(value)
        .map_err(|error| FolderError::Config { path: path.to_owned(), reason: error.to_string() })
}

/// Replaces a file as a whole.
///
/// # Errors
/// [`FolderError::File`]; then it is as before.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), FolderError> {
    replace_within(path, bytes)?;
    sync(path.parent().unwrap_or(Path::new("/")))
}

/// The same, but the caller syncs the directory: until then it is as before or as after.
///
/// # Errors
/// As [`replace`].
pub fn replace_within(path: &Path, bytes: &[u8]) -> Result<(), FolderError> {
    write_beside(path, bytes, File::sync_all)
}

/// The same without waiting for the disk at all. For programs it is as before or as after; a loss of
/// power may leave it empty.
///
/// # Errors
/// As [`replace`].
pub fn put(path: &Path, bytes: &[u8]) -> Result<(), FolderError> {
    write_beside(path, bytes, |_| Ok(()))
}

fn write_beside(
    path: &Path,
    bytes: &[u8],
    wait: impl FnOnce(&File) -> io::Result<()>,
) -> Result<(), FolderError> {
    let beside = path.with_added_extension("new");
    let written = (|| {
        let mut file = File::create(&beside)?;
        file.write_all(bytes)?;
        wait(&file)?;
        fs::rename(&beside, path)
    })();
    written.map_err(|error| {
        let _ = fs::remove_file(&beside);
        failed("writing", path)(error)
    })
}

fn warn(result: Result<(), FolderError>) {
    if let Err(error) = result {
        tracing::warn!("a change may not survive a power failure: {error}");
    }
}

/// Makes what was renamed or created in a directory last.
///
/// # Errors
/// [`FolderError::File`].
pub fn sync(directory: &Path) -> Result<(), FolderError> {
    let synced = File::open(directory).and_then(|file| file.sync_all());
    synced.map_err(failed("syncing", directory))
}

/// Reads a small regular file.
///
/// # Errors
/// [`FolderError::File`]; [`FolderError::Config`] if it is something else, or larger.
pub fn read_bounded(path: &Path, max: u64) -> Result<String, FolderError> {
    use std::io::Read;
    // Looked at first: opening a pipe would wait.
    let meta = fs::metadata(path).map_err(failed("reading", path))?;
    if !meta.is_file() || meta.len() > max {
        let reason = format!("it is no regular file of at most {max} bytes");
        return Err(FolderError::Config { path: path.to_owned(), reason });
    }
    let mut text = String::new();
    let file = File::open(path).map_err(failed("reading", path))?;
    file.take(max).read_to_string(&mut text).map_err(failed("reading", path))?;
    Ok(text)
}

/// What is not there need not be removed or renamed.
pub(crate) fn gone_is_well(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Removes a file, if it is there.
pub(crate) fn remove_file(path: &Path) -> Result<(), FolderError> {
    gone_is_well(fs::remove_file(path)).map_err(failed("removing", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn toml() -> VmToml {
        VmToml {
            version: VERSION,
            id: Uuid::new_v4(),
            created: Timestamp::now(),
            machine: MachineConfig { image: Some("debian:bookworm".into()), ..Default::default() },
        }
    }

    fn create(machines: &Path, name: &str) -> Result<Folder, FolderError> {
        Folder::create(machines, name, &toml(), |_| Ok::<_, FolderError>(()))
    }

    fn names(machines: &Path) -> Vec<String> {
        let entries = fs::read_dir(machines).unwrap();
        let mut names: Vec<_> =
            entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let config = toml();
        let folder =
            Folder::create(dir.path(), "a", &config, |_| Ok::<_, FolderError>(())).unwrap();
        assert_eq!(folder.config().unwrap(), config);
        assert_eq!(folder.last_exit(), None);
        let exit = Exit { time: Timestamp::now(), in_order: true, reason: "off".into(), status: 0 };
        folder.set_last_exit(Some(&exit)).unwrap();
        assert_eq!(folder.last_exit(), Some(exit));
        folder.note_start().unwrap();
        folder.sync_last_exit().unwrap();
        assert_eq!(folder.last_exit().unwrap().reason, vmm::UNFINISHED);
        fs::write(folder.file(vmm::EXIT_FILE), "").unwrap();
        assert_eq!(folder.last_exit().unwrap().reason, vmm::UNFINISHED, "lost with the power");
        folder.set_last_exit(None).unwrap();
        folder.set_last_exit(None).unwrap();
        assert_eq!(folder.last_exit(), None);
    }

    #[test]
    fn folders_are_there_as_a_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let folder = create(dir.path(), "a").unwrap();
        assert!(matches!(create(dir.path(), "a"), Err(FolderError::Exists { .. })));
        let fill = |_: &Folder| Err(FolderError::Locked { path: "x".into() });
        assert!(Folder::create(dir.path(), "b", &toml(), fill).is_err());
        assert_eq!(names(dir.path()), ["a"]);
        create(dir.path(), "c").unwrap();
        assert!(matches!(folder.rename("c"), Err(FolderError::Exists { .. })));
        folder.rename("d").unwrap().remove().unwrap();
        assert_eq!(names(dir.path()), ["c"]);
        fs::create_dir(dir.path().join(".new-1")).unwrap();
        fs::create_dir(dir.path().join(".gone-1")).unwrap();
        sweep(dir.path()).unwrap();
        assert_eq!(names(dir.path()), ["c"]);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let folder = create(dir.path(), "a").unwrap();
        let good = fs::read_to_string(folder.file(CONFIG)).unwrap();
        for (from, to, says) in [
            ("cpus = 1", "cpus = 1\nshoes = 2", "shoes"),
            ("cpus = 1", "cpus = \"x\"", "cpus"),
            ("version = 1", "version = 7", "version is 7"),
            ("512M", "512Q", "512Q"),
        ] {
            fs::write(folder.file(CONFIG), good.replacen(from, to, 1)).unwrap();
            let error = folder.config().unwrap_err().to_string();
            assert!(error.contains(says), "{error}");
        }
        fs::write(folder.file(CONFIG), vec![b'#'; 1 << 20]).unwrap();
        assert!(folder.config().is_err());
        fs::remove_file(folder.file(CONFIG)).unwrap();
        assert!(folder.config().is_err());
    }

    #[test]
    fn a_lock_is_for_one() {
        let dir = tempfile::tempdir().unwrap();
        let folder = create(dir.path(), "a").unwrap();
        let lock = folder.lock().unwrap();
        assert!(matches!(folder.lock(), Err(FolderError::Locked { .. })));
        drop(lock);
        folder.lock().unwrap();
    }

    #[test]
    fn hardware_addresses_stay_and_differ() {
        let ids = [Uuid::from_u128(1), Uuid::from_u128(2)];
        assert_eq!(hardware_address(ids[0]), hardware_address(ids[0]));
        assert_ne!(hardware_address(ids[0]), hardware_address(ids[1]));
        assert_eq!(hardware_address(ids[0])[0] & 3, 2);
    }
}
