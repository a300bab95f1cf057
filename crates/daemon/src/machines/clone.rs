//! Clones: machines of their own that begin as another one is, or as a snapshot of it.
//!
//! A clone has its own overlays, and every file below them by another name for the same bytes, so that
//! each folder is complete by itself. All clones that were asked for come to be, or none: those of a
//! daemon that was killed in between are removed by the next one.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_api::v1::event::EventKind;
use berth_api::v1::machine::{Disk, MachineConfig, Net};
use berth_api::v1::snapshot::{CLONES_MAX, CloneMachine};
use berth_api::vmm::{IDENTITY, ORIGIN, Origin, Request, SUSPENDED};
use berth_disk::format::Format;
use berth_disk::tools::{self, Backing};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;
use uuid::Uuid;

use crate::failure::{Result, blocking, chain, conflict, failed, invalid};
use crate::folder::{self, Folder, Unnamed, VERSION, VmToml, link_or_copy, unsettled};
use crate::machines::snapshots::{Memory, Taken, nothing_to_go_on};
use crate::machines::{Entry, Machines, check_name, export, load};
use crate::snapshot::restore::{link_state, note_copy};
use crate::snapshot::{self, SnapshotToml, is_plain, layers};
use crate::vmm;

/// Clones that are being made: removed with the last of them. Behind it are the boot and a random UUID,
/// or that alone in journals of older versions.
const JOURNAL: &str = ".clones-";
/// Clones that are started at once.
const STARTS_MAX: usize = 8;
/// How long clones may do what they were made for before the host's disk is kept busy with them.
const SETTLE_AFTER: Duration = Duration::from_millis(300);
/// The version of a journal.
const JOURNAL_VERSION: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Journal {
    version: u32,
    clones: Vec<Named>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Named {
    name: String,
    id: Uuid,
}

/// Where the memory is that clones go on with.
enum Memories {
    /// Stored in this directory.
    Stored(PathBuf),
    /// Kept by the process of the machine.
    Kept(Origin),
}

/// What clones are made of.
struct Source {
    folder: Folder,
    toml: SnapshotToml,
    /// Memory and processors they go on with.
    memory: Option<Memories>,
    /// The name of the machine.
    name: String,
}

impl Machines {
    /// Makes clones of a machine, and lets them go on if that was asked for.
    ///
    /// # Errors
    /// Something of the machine cannot be shared, a name is taken, or one does not start; then there is
    /// none of them.
    pub async fn clone_machine(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        request: CloneMachine,
    ) -> Result<Vec<Arc<Entry>>> {
        let names = names(&request)?;
        for name in &names {
            check_name(name)?;
            if self.all().contains_key(name) {
                return Err(conflict(format!("there is a machine {name} already")));
            }
        }
        if request.running {
            // It is ready when it is needed.
            let (program, root) = (self.program.clone(), self.root.clone());
            let of = entry.folder().path().to_owned();
            tokio::task::spawn_blocking(move || program.zygote.prepare(&program.path, &root, &of));
        }
        let changing = entry.changing.lock().await;
        let (name, folder) = (entry.name(), entry.folder());
        let of_now;
        let (toml, memory) = match &request.tag {
            Some(tag) => {
                let toml = self.verified(&folder, tag, request.running).await?;
                if request.running && toml.state.is_none() {
                    return Err(nothing_to_go_on(&format!("the snapshot {tag} has no memory")));
                }
                (toml, Memories::Stored(snapshot::state_of(&folder, tag)))
            }
            None => {
                let wanted = if request.running { Memory::Kept } else { Memory::Without };
                let Taken { draft, toml, kept } = self.take(entry, wanted).await?;
                if request.running && toml.state.is_none() && kept.is_none() {
                    let state = entry.state().as_str();
                    return Err(nothing_to_go_on(&format!("{name} is {state}")));
                }
                let state = draft.state();
                // Until the clones have what is in it.
                of_now = draft;
                match kept {
                    Some(kept) => {
                        (toml, Memories::Kept(Origin { folder: folder.path().into(), kept }))
                    }
                    None => {
                        if request.running {
                            let state = &of_now.state();
                            let fits = vmm::check(&self.program, &toml.machine, state).await;
                            fits.map_err(|error| crate::machines::of_vmm(&name, &error))?;
                        }
                        (toml, Memories::Stored(state))
                    }
                }
            }
        };
        let memory = request.running.then_some(memory);
        let kept = match &memory {
            Some(Memories::Kept(origin)) => Some(origin.kept),
            _ => None,
        };
        let id = toml.id;
        let made = self.make_and_start(entry, &request, toml, memory, names).await;
        if let Some(tag) = &request.tag {
            // Clones had its files by other names.
            self.verified.renamed(id, &snapshot::state_of(&folder, tag));
        }
        if let Ok(clones) = &made {
            self.settle_later(entry, clones);
        }
        if let Some(kept) = kept {
            // Those that share it have it; nobody waits for this.
            let source = Arc::clone(entry);
            tokio::spawn(async move {
                let released = vmm::ask(&source.folder(), &Request::Release { kept }).await;
                if let Err(error) = released {
                    tracing::info!(machine = name, error = chain(&error), "its memory is kept");
                }
            });
        }
        drop(changing);
        made
    }

    async fn make_and_start(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        request: &CloneMachine,
        toml: SnapshotToml,
        memory: Option<Memories>,
        names: Vec<String>,
    ) -> Result<Vec<Arc<Entry>>> {
        let (name, folder) = (entry.name(), entry.folder());
        check_network(&toml.machine, request.running)?;
        let (machines, source) = (Arc::clone(self), Source { folder, toml, memory, name });
        let made = blocking(move || machines.make_clones(&source, &names)).await?;
        for (clone, _) in &made {
            self.tell(EventKind::Cloned, clone, Some(entry.name()));
        }
        let clones: Vec<_> = made.into_iter().map(|(clone, _)| clone).collect();
        let mut ready = self.join_all(&clones).await;
        if ready.is_ok() && request.running {
            ready = self.start_all(&clones).await;
        }
        if let Err(error) = ready {
            for clone in &clones {
                if let Err(error) = self.remove(clone, true).await {
                    tracing::error!(error = error.message, "a clone is left");
                }
            }
            return Err(error);
        }
        Ok(clones)
    }

    /// Starts them, some at once. After an error no other is begun, and all that were have been ended or
    /// run when this returns.
    async fn start_all(self: &Arc<Self>, clones: &[Arc<Entry>]) -> Result<()> {
        let mut waiting = clones.iter().cloned();
        let mut starting = JoinSet::new();
        let mut result = Ok(());
        loop {
            while result.is_ok()
                && starting.len() < STARTS_MAX
                && let Some(clone) = waiting.next()
            {
                let machines = Arc::clone(self);
                starting.spawn(async move { machines.start(&clone).await });
            }
            let Some(started) = starting.join_next().await else { return result };
            let started = started.map_err(|error| failed(&error)).flatten();
            result = result.and(started);
        }
    }

    /// Waits until clones would survive a loss of power, when whoever asked for them has his answer.
    fn settle_later(self: &Arc<Self>, source: &Arc<Entry>, clones: &[Arc<Entry>]) {
        let (machines, source, clones) = (Arc::clone(self), Arc::clone(source), clones.to_vec());
        // A daemon that ends in order waits for it.
        tokio::task::spawn_blocking(move || {
            // What they were made for comes first.
            std::thread::sleep(SETTLE_AFTER);
            machines.settle(&source, &clones);
        });
    }

    fn settle(&self, source: &Entry, clones: &[Arc<Entry>]) {
        for clone in clones {
            if !self.has(clone) {
                continue;
            }
            let (folder, source) = (clone.folder(), source.folder());
            // The layers that it shares have their names there, and a journal was here.
            let settled = unsettled::settle(&folder, &[source.path(), &self.directory]);
            // What is gone needs it no more; what was renamed just now is found by its new name.
            let settled = settled.or_else(|error| match clone.folder().path().exists() {
                true => unsettled::settle_with_all(&clone.folder()),
                false if !folder.path().exists() => Ok(()),
                false => Err(error),
            });
            if let Err(error) = settled {
                let error = &error as &dyn std::error::Error;
                tracing::error!(machine = clone.name(), error, "a loss of power removes it");
            }
        }
    }

    /// Makes all of the folders, then names them.
    fn make_clones(&self, source: &Source, names: &[String]) -> Result<Vec<(Arc<Entry>, Uuid)>> {
        let mut made = Vec::new();
        for name in names {
            let config = VmToml {
                version: VERSION,
                id: Uuid::new_v4(),
                created: Timestamp::now(),
                // A port of the host leads to one machine.
                machine: MachineConfig { ports: Vec::new(), ..source.toml.machine.clone() },
            };
            let (machines, boot) = (&self.directory, &self.boot);
            let unnamed =
                Unnamed::make_unsettled(machines, &config, boot, |folder| source.fill(folder))?;
            made.push((name, unnamed, config));
        }
        let journal = format!("{JOURNAL}{}.{}", self.boot, Uuid::new_v4());
        let journal = self.directory.join(journal);
        let clones = made
            .iter()
            .map(|(name, _, config)| Named { name: name.to_string(), id: config.id })
            .collect();
        let text = folder::to_toml(&journal, &Journal { version: JOURNAL_VERSION, clones })?;
        folder::put(&journal, text.as_bytes())?;
        let named = self.name_all(made);
        match &named {
            // With this they are there; not after a loss of power before they are settled.
            Ok(_) => fs::remove_file(&journal).map_err(folder::failed("removing", &journal))?,
            Err(_) => undo(&self.directory, &journal),
        }
        let mut all = self.all();
        let mut entries = Vec::new();
        for (name, folder, config) in named? {
            let id = config.id;
            let entry = Entry::new(name.clone(), folder, config);
            all.insert(name, Arc::clone(&entry));
            entries.push((entry, id));
        }
        Ok(entries)
    }

    fn name_all(
        &self,
        made: Vec<(&String, Unnamed, VmToml)>,
    ) -> Result<Vec<(String, Folder, VmToml)>> {
        let mut named = Vec::new();
        for (name, unnamed, config) in made {
            named.push((name.clone(), unnamed.name(name)?, config));
        }
        Ok(named)
    }
}

/// The names of the clones.
fn names(request: &CloneMachine) -> Result<Vec<String>> {
    match request.count {
        None => Ok(vec![request.name.clone()]),
        Some(count) if (1..=CLONES_MAX).contains(&count) => {
            Ok((1..=count).map(|number| format!("{}-{number}", request.name)).collect())
        }
        Some(count) => {
            Err(invalid(format!("{count} clones: 1 to {CLONES_MAX} can be made at once")))
        }
    }
}

fn check_network(config: &MachineConfig, running: bool) -> Result<()> {
    match &config.net {
        Net::Tap(name) if running => Err(conflict(format!(
            "the network card is connected to the interface {name}, which one machine can have; try \
             without --running, and give each clone its own in its vm.toml"
        ))),
        // It has to be told that it has another address, and has nobody who could.
        Net::Network(name) if running && config.image.is_none() => Err(conflict(format!(
            "the network card is in the network {name}, and a guest that is not of an image has the \
             original's address in a clone: try without --running"
        ))),
        _ => Ok(()),
    }
}

impl Source {
    /// Puts everything into a clone's folder but its `vm.toml`. Nothing waits for the disk.
    fn fill(&self, clone: &Folder) -> Result<()> {
        for disk in self.toml.machine.disks.iter().filter(|disk| disk.read_only) {
            self.share(clone, disk)?;
        }
        // An imported machine has its kernel in its folder.
        for name in export::own_boot_files(&self.toml.machine) {
            let (from, to) = (self.folder.file(&name), clone.file(&name));
            link_or_copy(&from, &to).map_err(folder::failed("linking", &to))?;
        }
        for (file, layer) in self.toml.disks() {
            self.link(clone, Path::new(layer), Format::Qcow2)?;
            let backing = Backing { name: layer.to_owned(), format: Format::Qcow2 };
            tools::create_unsynced(&clone.file(file), Format::Qcow2, None, Some(&backing))
                .map_err(|error| failed(&error))?;
        }
        match &self.memory {
            Some(Memories::Stored(state)) => {
                link_state(state, &clone.file(SUSPENDED))?;
                note_copy(&clone.file(SUSPENDED))?;
            }
            Some(Memories::Kept(origin)) => {
                let origin = serde_json::to_vec(origin).map_err(|error| failed(&error))?;
                folder::put(&clone.file(ORIGIN), &origin)?;
            }
            None => {}
        }
        folder::put(&clone.file(IDENTITY), format!("{}\n", self.name).as_bytes())?;
        load::put_place(clone)?;
        Ok(())
    }

    /// A disk that is only read.
    fn share(&self, clone: &Folder, disk: &Disk) -> Result<()> {
        match is_plain(&disk.file) {
            true => self.link(clone, &disk.file, layers::format(disk.format)),
            false if disk.file.is_absolute() => Ok(()),
            false => {
                let file = disk.file.display();
                Err(conflict(format!(
                    "the disk {file} is in another directory, by a relative name"
                )))
            }
        }
    }

    /// A disk's file and those below it.
    fn link(&self, clone: &Folder, file: &Path, format: Format) -> Result<()> {
        for name in layers::files(&self.folder, file, format)? {
            let to = clone.file(&name);
            // Several disks may be on one file.
            if !to.exists() {
                let linked = link_or_copy(&self.folder.file(&name), &to);
                linked.map_err(folder::failed("linking", &to))?;
            }
        }
        Ok(())
    }
}

/// Removes the clones of a journal, and it.
fn undo(machines: &Path, journal: &Path) {
    let removed = (|| -> Result<()> {
        let read: Journal = snapshot::read_toml(journal, JOURNAL_VERSION)?;
        for Named { name, id } in read.clones {
            let folder = Folder::at(machines.join(&name));
            let is_it = check_name(&name).is_ok()
                && folder.path().is_dir()
                && folder.config().is_ok_and(|config| config.id == id);
            if is_it {
                folder.remove()?;
            }
        }
        fs::remove_file(journal).map_err(folder::failed("removing", journal))?;
        Ok(())
    })();
    if let Err(error) = removed {
        tracing::error!(path = %journal.display(), error = error.message, "clones are left");
    }
}

/// Removes the clones that a daemon began to make and did not come to end. Those of another boot are
/// unsettled, and removed as such: their journal may have been lost with the power.
pub(super) fn sweep(machines: &Path, boot: &str) -> std::result::Result<(), folder::FolderError> {
    for entry in fs::read_dir(machines).map_err(folder::failed("reading", machines))? {
        let entry = entry.map_err(folder::failed("reading", machines))?;
        let name = entry.file_name();
        let Some(rest) = name.to_str().and_then(|name| name.strip_prefix(JOURNAL)) else {
            continue;
        };
        match rest.split_once('.') {
            Some((of, _)) if of != boot => {
                let path = entry.path();
                fs::remove_file(&path).map_err(folder::failed("removing", &path))?;
            }
            _ => undo(machines, &entry.path()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOOT: &str = "this-boot";

    fn make(machines: &Path, name: &str) -> Named {
        let id = Uuid::new_v4();
        let config = VmToml {
            version: VERSION,
            id,
            created: Timestamp::now(),
            machine: MachineConfig::default(),
        };
        let fill = |_: &Folder| Ok::<_, folder::FolderError>(());
        Unnamed::make_unsettled(machines, &config, BOOT, fill).unwrap().name(name).unwrap();
        Named { name: name.to_owned(), id }
    }

    #[test]
    fn clones_that_are_not_all_named_are_removed() {
        for (journal, text, left) in [
            (".clones-this-boot.1", None, 1),
            (".clones-00000000-0000-4000-8000-000000000001", None, 1),
            // Lost with the power: these clones were never settled, which is another's to find.
            (".clones-another-boot.1", None, 3),
            (".clones-another-boot.2", Some(""), 3),
        ] {
            let dir = tempfile::tempdir().unwrap();
            make(dir.path(), "other");
            let clones = vec![make(dir.path(), "a"), make(dir.path(), "b")];
            let path = dir.path().join(journal);
            let written = Journal { version: JOURNAL_VERSION, clones };
            let written = folder::to_toml(&path, &written).unwrap();
            fs::write(&path, text.unwrap_or(&written)).unwrap();
            sweep(dir.path(), BOOT).unwrap();
            assert!(!path.exists(), "{journal}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), left, "{journal}");
        }
    }
}
