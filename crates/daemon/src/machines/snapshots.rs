//! Snapshots of machines: taken, listed, restored, removed.

use std::path::PathBuf;
use std::sync::Arc;

use berth_api::v1::error::{ApiError, ErrorCode};
use berth_api::v1::event::EventKind;
use berth_api::v1::machine::{DiskFormat, MachineConfig, MachineState};
use berth_api::v1::snapshot::{RestoreSnapshot, Snapshot, TAG_MAX, TakeSnapshot, is_tag};
use berth_api::vmm::SUSPENDED;
use berth_disk::format::Format;
use berth_disk::tools::{self, Backing};
use jiff::Timestamp;
use uuid::Uuid;

use crate::failure::{Result, blocking, conflict, error, invalid};
use crate::folder::{Folder, VmToml};
use crate::machines::{Entry, Machines, SUSPEND_TIME, load, of_vmm};
use crate::snapshot::restore::{link_state, restore};
use crate::snapshot::{
    self, Draft, FrozenDisk, SNAPSHOTS_MAX, SnapshotError, SnapshotToml, VERSION, is_plain,
};
use crate::vmm;

/// What is to be done with a machine's memory when it is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Memory {
    /// Nothing: only the disks are wanted.
    Without,
    /// It is stored.
    Stored,
    /// It stays in its process, unless there is none.
    Kept,
}

/// A machine that was frozen.
pub(super) struct Taken {
    /// Where it is.
    pub(super) draft: Draft,
    /// What it is.
    pub(super) toml: SnapshotToml,
    /// The number under which its process keeps it.
    pub(super) kept: Option<u64>,
}

impl Machines {
    /// Takes a snapshot of a machine in whatever state.
    ///
    /// # Errors
    /// The tag is taken, or something of the machine cannot be stored; it goes on in each case.
    pub async fn snapshot(&self, entry: &Entry, request: TakeSnapshot) -> Result<Snapshot> {
        let tag = request
            .tag
            .unwrap_or_else(|| Timestamp::now().strftime("%Y-%m-%dT%H-%M-%SZ").to_string());
        if !is_tag(&tag) {
            return Err(invalid(format!(
                "`{tag}` is no tag: 1 to {TAG_MAX} letters, digits, `.`, `_` and `-`, of which the \
                 first is a letter or digit"
            )));
        }
        let _changing = entry.changing.lock().await;
        let (name, folder) = (entry.name(), entry.folder());
        if folder.file(snapshot::DIRECTORY).join(&tag).symlink_metadata().is_ok() {
            return Err(conflict(format!("{name} has a snapshot {tag} already")));
        }
        let memory = if request.disk_only { Memory::Without } else { Memory::Stored };
        let Taken { draft, mut toml, .. } = self.take(entry, memory).await?;
        toml.tag.clone_from(&tag);
        let taken = blocking(move || {
            if snapshot::all(&folder)?.len() >= SNAPSHOTS_MAX {
                return Err(SnapshotError::Many.into());
            }
            draft.publish(&toml)?;
            Ok(described(&folder, &[toml])?)
        });
        let taken = taken.await?.pop();
        self.tell(EventKind::Snapshotted, entry, Some(tag));
        taken.ok_or_else(|| error(ErrorCode::Failed, "the snapshot is gone"))
    }

    /// Freezes a machine as it is now. Nothing of it is named yet.
    pub(super) async fn take(&self, entry: &Entry, memory: Memory) -> Result<Taken> {
        let (name, folder) = (entry.name(), entry.folder());
        let is_up = entry.state().is_up();
        let keep = is_up && memory == Memory::Kept;
        let with_memory = memory != Memory::Without && !keep;
        let with_state = with_memory && (is_up || entry.state() == MachineState::Suspended);
        let mut kept = None;
        let (draft, frozen) = if is_up {
            let begun = folder.clone();
            let draft = blocking(move || Ok(Draft::begin(&begun, with_state)?)).await?;
            let into = with_state.then(|| draft.state_name());
            let frozen = vmm::freeze(&folder, into, keep, SUSPEND_TIME).await;
            let frozen = frozen.map_err(|error| of_vmm(&name, &error))?;
            kept = frozen.kept;
            let pause_us = frozen.pause_us;
            tracing::info!(machine = name, pause_us, "frozen");
            (draft, (frozen.config, frozen.layers, Some(pause_us)))
        } else {
            let begun = folder.clone();
            let (draft, config, layers) =
                blocking(move || Ok(freeze_at_rest(&begun, with_state)?)).await?;
            entry.live().config.machine.clone_from(&config);
            (draft, (config, layers, None))
        };
        let (machine, layers, pause_us) = frozen;
        let verified = Arc::clone(&self.verified);
        blocking(move || {
            let id = Uuid::new_v4();
            let state = with_state.then(|| verified.sum(id, &draft.state())).transpose()?;
            let there: Vec<_> = snapshot::all(&folder)?.into_iter().flatten().collect();
            let mut ancestors = snapshot::ancestors(&folder)?;
            // Those that are gone do not come back.
            ancestors.retain(|id| there.iter().any(|one| one.id == *id));
            let layers = layers.into_iter().enumerate();
            let layers = layers.filter_map(|(disk, file)| Some(FrozenDisk { disk, file: file? }));
            let toml = SnapshotToml {
                version: VERSION,
                id,
                tag: String::new(),
                created: Timestamp::now(),
                ancestors,
                pause_us: pause_us.filter(|_| is_up),
                machine,
                layers: layers.collect(),
                state,
            };
            Ok(Taken { draft, toml, kept })
        })
        .await
    }

    /// The snapshots of a machine, the oldest first. Those that are damaged are left out.
    ///
    /// # Errors
    /// They cannot be read.
    pub async fn snapshots(&self, entry: &Entry) -> Result<Vec<Snapshot>> {
        let (name, folder) = (entry.name(), entry.folder());
        blocking(move || {
            let mut sound = Vec::new();
            for one in snapshot::all(&folder)? {
                match one {
                    Ok(toml) => sound.push(toml),
                    Err(error) => {
                        let error = crate::failure::chain(&error);
                        tracing::error!(machine = name, error, "a snapshot is left out");
                    }
                }
            }
            Ok(described(&folder, &sound)?)
        })
        .await
    }

    /// Makes a machine what a snapshot holds. It goes on from there, or is stopped if only disks are in
    /// it.
    ///
    /// # Errors
    /// There is none, it was altered, cannot go on here, or the machine is in use; then nothing changes.
    pub async fn restore(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        request: RestoreSnapshot,
    ) -> Result<()> {
        let _changing = entry.changing.lock().await;
        let (name, folder) = (entry.name(), entry.folder());
        let (state, tag) = (entry.state(), request.tag);
        let toml = self.verified(&folder, &tag, true).await?;
        if (state.is_up() || state == MachineState::Suspended) && !request.force {
            return Err(conflict(format!(
                "{name} is {}, which would be lost; `berth vm snapshot {name}` keeps it, and --force \
                 restores {tag} all the same",
                state.as_str()
            )));
        }
        self.check_network(&toml.machine.net).await?;
        if entry.state().is_up() {
            self.kill_now(entry).await?;
        }
        let (has_state, id) = (toml.state.is_some(), toml.id);
        let stored = snapshot::state_of(&folder, &tag);
        let config: VmToml = blocking(move || {
            let lock = folder.lock_within(load::SETTLE)?;
            restore(&folder, &toml, &lock)?;
            // How it ended does not matter any more.
            folder.set_last_exit(None)?;
            Ok(folder.config()?)
        })
        .await?;
        {
            let mut live = entry.live();
            (live.config, live.last_exit) = (config, None);
        }
        self.tell(EventKind::Restored, entry, Some(tag));
        // It may have been in another network.
        let started = match has_state {
            true => self.start_now(entry).await,
            false => self.join_network(entry).await,
        };
        // The machine had its files by other names.
        self.verified.renamed(id, &stored);
        started
    }

    /// A snapshot that is what was stored, and, with its memory, can go on here.
    pub(super) async fn verified(
        &self,
        folder: &Folder,
        tag: &str,
        with_memory: bool,
    ) -> Result<SnapshotToml> {
        let (looked, looked_tag) = (folder.clone(), tag.to_owned());
        let verified = Arc::clone(&self.verified);
        let toml = blocking(move || {
            let toml = snapshot::find(&looked, &looked_tag)?;
            snapshot::layers::of_snapshot(&looked, &toml)?;
            if let Some(sums) = toml.state.as_ref().filter(|_| with_memory) {
                verified.verify(toml.id, sums, &snapshot::state_of(&looked, &looked_tag))?;
            }
            Ok(toml)
        })
        .await?;
        let is_needed = toml.state.is_some() && with_memory;
        if is_needed && !self.verified.fits(toml.id, &toml.machine) {
            let state = snapshot::state_of(folder, tag);
            let fits = vmm::check(&self.program, &toml.machine, &state).await;
            fits.map_err(|error| of_vmm(&format!("the snapshot {tag}"), &error))?;
            self.verified.note_fit(toml.id, &toml.machine);
        }
        Ok(toml)
    }

    /// Removes a snapshot, and what only it needs.
    ///
    /// # Errors
    /// There is none, or it cannot be removed.
    pub async fn remove_snapshot(&self, entry: &Entry, tag: String) -> Result<()> {
        let _changing = entry.changing.lock().await;
        let (folder, removed) = (entry.folder(), tag.clone());
        blocking(move || {
            // Nobody has it unless it runs.
            if let Ok(lock) = folder.lock() {
                snapshot::settle(&folder, &lock)?;
            }
            Ok(snapshot::remove(&folder, &removed)?)
        })
        .await?;
        self.tell(EventKind::SnapshotRemoved, entry, Some(tag));
        Ok(())
    }
}

/// What is told of snapshots.
fn described(
    folder: &Folder,
    shown: &[SnapshotToml],
) -> std::result::Result<Vec<Snapshot>, SnapshotError> {
    let all: Vec<_> = snapshot::all(folder)?.into_iter().flatten().collect();
    // The nearest that is still there.
    let nearest = |ids: &[Uuid]| ids.iter().find_map(|id| all.iter().find(|one| one.id == *id));
    let current = nearest(&snapshot::ancestors(folder)?).map(|one| one.id);
    let describe = |toml: &SnapshotToml| Snapshot {
        tag: toml.tag.clone(),
        id: toml.id,
        created: toml.created,
        parent: nearest(&toml.ancestors).map(|one| one.tag.clone()),
        current: current == Some(toml.id),
        memory: toml.state.is_some(),
        pause_ms: toml.pause_us.map(|us| us as f64 / 1000.0),
    };
    Ok(shown.iter().map(describe).collect())
}

type AtRest = (Draft, MachineConfig, Vec<Option<String>>);

/// Freezes a machine that has no process.
fn freeze_at_rest(folder: &Folder, with_state: bool) -> std::result::Result<AtRest, SnapshotError> {
    let lock = folder.lock_within(load::SETTLE)?;
    snapshot::settle(folder, &lock)?;
    let mut config = with_overlays(folder)?;
    if with_state {
        folder.as_stored(&mut config)?;
    }
    let layers = snapshot::new_layers(&config)?;
    let draft = Draft::begin(folder, false)?;
    for (disk, layer) in config.disks.iter().zip(&layers) {
        if let Some(layer) = layer {
            berth_disk::layers::freeze(&folder.file(&disk.file), layer)?;
        }
    }
    if with_state {
        link_state(&folder.file(SUSPENDED), &draft.state())?;
        crate::folder::sync(&draft.state())?;
    }
    Ok((draft, config, layers))
}

/// Gives raw disks in a folder, which older versions made, overlays that can be frozen.
fn with_overlays(folder: &Folder) -> std::result::Result<MachineConfig, SnapshotError> {
    let mut config = folder.config()?;
    let before = config.clone();
    for disk in &mut config.machine.disks {
        if disk.format != DiskFormat::Raw || disk.read_only || !is_plain(&disk.file) {
            continue;
        }
        let Some(name) = disk.file.to_str().map(str::to_owned) else { continue };
        let wanted = disk.file.with_extension("qcow2");
        let overlay = match folder.file(&wanted).exists() {
            // Perhaps of a time when this came no further.
            true => PathBuf::from(format!("disk-{}.qcow2", Uuid::new_v4())),
            false => wanted,
        };
        let backing = Backing { name, format: Format::Raw };
        tools::create(&folder.file(&overlay), Format::Qcow2, None, Some(&backing))?;
        (disk.file, disk.format) = (overlay, DiskFormat::Qcow2);
    }
    if config != before {
        crate::folder::sync(folder.path())?;
        folder.write_config(&config)?;
    }
    Ok(config.machine)
}

/// A request that cannot be met since there is no memory to go on with.
pub(super) fn nothing_to_go_on(what: &str) -> ApiError {
    conflict(format!("{what}, so that there is nothing to go on with; try without --running"))
}
