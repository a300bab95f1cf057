//! Machines that are there when the daemon starts, and folders that become machines.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use berth_api::v1::error::ErrorCode;
use berth_api::v1::event::EventKind;
use berth_api::v1::machine::{AdoptMachine, is_name};
use berth_api::vmm as socket;
use berth_net::networks::Networks;
use jiff::Timestamp;
use uuid::Uuid;

use crate::cgroup::Groups;
use crate::events::Events;
use crate::failure::{Result, chain, conflict, error, invalid};
use crate::folder::{self, Folder, FolderError, unfinished, unsettled};
use crate::machines::{Entry, Machines, Sought, check_name, clone, network, run};
use crate::snapshot;
use crate::vmm::{self, Program, VmmError};

/// How long a process that has just ended may keep its lock, and one that starts needs until it
/// listens.
pub(super) const SETTLE: Duration = Duration::from_secs(2);
const POLL: Duration = Duration::from_millis(20);
/// How often a process that does not answer is looked for.
const SEEK: Duration = Duration::from_secs(1);
/// Bytes that may say so.
const PLACE_MAX: u64 = 64;
/// Where a folder was when it became a machine: a copy is somewhere else.
const PLACE: &str = "state/place";

/// The inode of a folder. Devices have other numbers after the next boot.
fn place(path: &Path) -> std::result::Result<String, FolderError> {
    let meta = fs::metadata(path).map_err(folder::failed("reading", path))?;
    Ok(format!("{}\n", meta.ino()))
}

/// Notes where a folder is.
pub(super) fn note_place(folder: &Folder) -> std::result::Result<(), FolderError> {
    folder::replace(&folder.file(PLACE), place(folder.path())?.as_bytes())
}

/// The same without waiting for the disk.
pub(super) fn put_place(folder: &Folder) -> std::result::Result<(), FolderError> {
    folder::put(&folder.file(PLACE), place(folder.path())?.as_bytes())
}

/// Whether it is where it became a machine.
fn is_in_place(folder: &Folder) -> bool {
    let noted = folder::read_bounded(&folder.file(PLACE), PLACE_MAX);
    noted.is_ok_and(|noted| place(folder.path()).is_ok_and(|now| now == noted))
}

/// Ends what was begun with a folder that nobody has, which may change its configuration.
fn settled(name: &str, folder: &Folder) -> Option<folder::VmToml> {
    let lock = folder.lock().ok()?;
    match snapshot::settle(folder, &lock) {
        Ok(()) => folder.config().ok(),
        Err(error) => {
            // A start says so too.
            tracing::error!(machine = name, error = &error as &dyn std::error::Error, "unsettled");
            None
        }
    }
}

/// Settles what an earlier daemon did not come to.
fn settle_later(whole: Vec<Folder>) {
    tokio::task::spawn_blocking(move || {
        for folder in whole {
            if let Err(error) = unsettled::settle_with_all(&folder) {
                let (path, error) = (folder.path().display(), &error as &dyn std::error::Error);
                tracing::error!(%path, error, "a loss of power removes it");
            }
        }
    });
}

impl Machines {
    /// Looks what machines there are, and finds the processes of those that run. `program` is
    /// started for each that is to run.
    ///
    /// # Errors
    /// The state directory cannot be used.
    pub async fn load(root: &Path, program: Program, events: Events) -> Result<Arc<Self>> {
        let directory = root.join("machines");
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&directory).map_err(folder::failed("creating", &directory))?;
        let boot = unsettled::boot_id()?;
        folder::sweep(&directory)?;
        unfinished::sweep(&directory, Timestamp::now())?;
        unfinished::forget_all(&directory)?;
        clone::sweep(&directory, &boot)?;
        let whole = unsettled::sweep(&directory, &boot)?;
        settle_later(whole);
        let networks = Networks::open(root).await.map_err(|error| network::of_net(&error))?;
        let machines = Arc::new(Self {
            networks,
            groups: Arc::new(Groups::find(root)),
            root: root.to_owned(),
            program,
            boot,
            verified: Arc::default(),
            events,
            all: Mutex::default(),
            directory,
        });
        let mut found = machines.read_all()?;
        // Originals before copies.
        found.sort_by_key(|(_, folder, _)| !is_in_place(folder));
        let mut known: BTreeMap<Uuid, String> = BTreeMap::new();
        for (name, folder, config) in found {
            if let Some(original) = known.get(&config.id) {
                let path = folder.path().display();
                tracing::warn!(
                    "{path} is a copy of {original}; `berth vm adopt {path}` makes it a machine"
                );
                continue;
            }
            known.insert(config.id, name.clone());
            machines.all().insert(name.clone(), machines.enter(name, folder, config));
        }
        let entries: Vec<_> = machines.all().values().cloned().collect();
        let found: Vec<_> = entries.into_iter().map(|entry| machines.clone().seek(entry)).collect();
        // Those that do not answer by then are looked for on.
        let all = async {
            for task in found {
                // It does not panic.
                let _ = task.await;
            }
        };
        let _ = tokio::time::timeout(SETTLE, all).await;
        machines.end_temporary();
        machines.settle_networks().await;
        machines.sweep_groups().await;
        Ok(machines)
    }

    /// A machine of which the folder is there.
    fn enter(&self, name: String, folder: Folder, config: folder::VmToml) -> Arc<Entry> {
        let state = folder.file("state");
        let ready = match fs::create_dir(&state) {
            Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
                Err(folder::failed("creating", &state)(error))
            }
            _ if is_in_place(&folder) => Ok(()),
            _ => note_place(&folder),
        };
        let config = settled(&name, &folder).unwrap_or(config);
        if let Err(error) = ready {
            // It can be looked at, and a start says what is wrong.
            tracing::error!("{name}: {error}");
        }
        Entry::new(name, folder, config)
    }

    /// Looks for the process of a machine as long as somebody has its folder and does not answer.
    fn seek(self: Arc<Self>, entry: Arc<Entry>) -> tokio::task::JoinHandle<()> {
        tokio::spawn(async move {
            while self.find_process(&entry).await != Sought::Found && !entry.state().is_up() {
                match entry.folder().lock() {
                    Err(FolderError::Locked { .. }) => tokio::time::sleep(SEEK).await,
                    _ => return,
                }
            }
        })
    }

    /// A machine that was not there, or not understood, when the daemon started.
    pub(super) async fn load_one(self: &Arc<Self>, name: &str) -> Result<Arc<Entry>> {
        let entry = self.enter_one(name)?;
        self.end_if_temporary(Arc::clone(&entry));
        // Its process, if there is one, is found soon.
        let seeking = Arc::clone(self).seek(Arc::clone(&entry));
        let _ = tokio::time::timeout(SETTLE, seeking).await;
        Ok(entry)
    }

    fn enter_one(&self, name: &str) -> Result<Arc<Entry>> {
        let absent = |message| Err(error(ErrorCode::NotFound, message));
        let folder = Folder::at(self.directory.join(name));
        if !is_name(name) || !folder.path().is_dir() {
            return absent(format!("there is no machine {name}"));
        }
        let config = folder.config()?;
        if unsettled::boots(&folder)?.iter().any(|boot| *boot != self.boot) {
            // Somebody put it there as it is. Those of this boot are clones that are being made.
            unsettled::settle_with_all(&folder)?;
        }
        let mut all = self.all();
        if let Some(other) = all.values().find(|entry| entry.id() == config.id) {
            let path = folder.path().display();
            return absent(format!(
                "{path} is a copy of {}; `berth vm adopt {path}` makes it a machine",
                other.name()
            ));
        }
        let made = self.enter(name.to_owned(), folder, config);
        Ok(Arc::clone(all.entry(name.to_owned()).or_insert(made)))
    }

    /// All folders that can be understood; the others are reported.
    fn read_all(&self) -> Result<Vec<(String, Folder, folder::VmToml)>> {
        let mut found = Vec::new();
        let entries = fs::read_dir(&self.directory);
        let mut names = Vec::new();
        for entry in entries.map_err(folder::failed("reading", &self.directory))? {
            let entry = entry.map_err(folder::failed("reading", &self.directory))?;
            names.extend(entry.file_name().into_string());
        }
        names.sort();
        for name in names.into_iter().filter(|name| is_name(name)) {
            let folder = Folder::at(self.directory.join(&name));
            match folder.config() {
                Ok(config) => found.push((name, folder, config)),
                Err(error) => tracing::error!("{name} is left out: {error}"),
            }
        }
        Ok(found)
    }

    /// Finds the process of a machine, if one runs.
    pub(super) async fn find_process(self: &Arc<Self>, entry: &Arc<Entry>) -> Sought {
        let (name, folder) = (entry.name(), entry.folder());
        let began = Instant::now();
        loop {
            match vmm::watch(&folder).await {
                Ok((stream, status)) => {
                    tracing::info!(machine = name, pid = status.pid, "found running");
                    self.attend(entry, stream, status);
                    return Sought::Found;
                }
                // One that is about to start holds the lock and does not listen yet.
                Err(VmmError::Absent(_)) => match folder.lock() {
                    Err(FolderError::Locked { .. }) if began.elapsed() < SETTLE => {
                        tokio::time::sleep(POLL).await;
                    }
                    Err(error) => {
                        tracing::error!(machine = name, %error, "its process is not found");
                        return Sought::Unclear;
                    }
                    Ok(_lock) => return Sought::None,
                },
                Err(error) => {
                    tracing::error!(machine = name, %error, "its process is not understood");
                    return Sought::Unclear;
                }
            }
        }
    }

    /// Makes a folder a machine of its own, with an identity of its own.
    ///
    /// # Errors
    /// It is a machine already, is in use, or its `vm.toml` is not understood.
    pub async fn adopt(&self, request: AdoptMachine) -> Result<Arc<Entry>> {
        let path = request.folder;
        if !path.is_absolute() {
            return Err(invalid(format!("{} is no absolute path", path.display())));
        }
        // What is wrong with the folder is wrong with the request.
        let wrong = |error: FolderError| invalid(chain(&error));
        let path = fs::canonicalize(&path).map_err(folder::failed("finding", &path));
        let path = path.map_err(wrong)?;
        let own = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let name = request.name.unwrap_or_else(|| own.to_owned());
        check_name(&name)?;
        let home = fs::canonicalize(&self.directory);
        let home = home.map_err(folder::failed("finding", &self.directory))?;
        let is_here = path.parent() == Some(&home);
        let folder = Folder::at(&path);
        // Nothing is made in a folder that is no machine.
        folder.config().map_err(wrong)?;
        let lock = folder.lock()?;
        snapshot::settle(&folder, &lock)?;
        unsettled::settle_with_all(&folder)?;
        let mut config = folder.config()?;
        let mut all = self.all();
        for entry in all.values() {
            let theirs = entry.folder();
            if fs::canonicalize(theirs.path()).is_ok_and(|theirs| theirs == path) {
                let message = format!("{} is the machine {} already", path.display(), entry.name());
                return Err(conflict(message));
            }
        }
        if all.contains_key(&name) {
            return Err(conflict(format!("there is a machine {name} already; try --name")));
        }
        (config.id, config.created) = (Uuid::new_v4(), Timestamp::now());
        // Its place first: whatever fails then, the folder is what it was.
        let target = self.directory.join(&name);
        let folder = match is_here {
            true if own == name => folder,
            true => folder.rename(&name)?,
            false => {
                let link = std::os::unix::fs::symlink(&path, &target);
                link.map_err(folder::failed("linking", &target))?;
                Folder::at(target)
            }
        };
        let adopted = (|| {
            // What was left of the original's run.
            let _ = fs::remove_file(folder.file(socket::SOCKET));
            run::note_kept(&folder)?;
            folder.set_last_exit(None)?;
            note_place(&folder)?;
            folder.write_config(&config)?;
            folder::sync(&self.directory)
        })();
        if let Err(error) = adopted {
            if !is_here {
                let _ = fs::remove_file(folder.path());
            }
            return Err(error.into());
        }
        let entry = Entry::new(name.clone(), folder, config);
        all.insert(name, Arc::clone(&entry));
        drop(all);
        self.tell(EventKind::Adopted, &entry, None);
        Ok(entry)
    }
}
