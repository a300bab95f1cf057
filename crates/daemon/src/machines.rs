//! The machines there are, and what can be done with them.
//!
//! ```text
//!             start                 pause
//! stopped ───────────► running ◄──────────────► paused
//!   ▲  ▲                  │        unpause         │
//!   │  └── powers off, stop, kill ─────────────────┤
//!   │ start                                        │
//! failed ◄──── reset, panic, process lost ─────────┤
//!                                                  │
//! suspended ◄───── suspend ────────────────────────┘
//!     └──────────► running, by start or resume
//! ```
//!
//! A snapshot can be taken in each state; restoring one gives a machine that is stopped, or runs on from
//! it. Removing and adopting need a machine without a process; renaming does not. One operation at a time
//! changes a machine; those that only look wait for none.

mod change;
mod clone;
mod create;
mod export;
mod groups;
pub mod import;
mod load;
mod network;
mod run;
mod snapshots;
pub mod stats;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use berth_api::v1::error::{ApiError, ErrorCode};
use berth_api::v1::event::EventKind;
use berth_api::v1::machine::{Exit, Machine, MachineState, is_name};
use berth_api::vmm::{Answer, Request, SUSPENDED, Status, UNFINISHED};
use berth_net::networks::Networks;
use jiff::Timestamp;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;
use tokio::sync::watch;
use tokio::time::timeout;
use uuid::Uuid;

use crate::cgroup::{Group, Groups, Limits};
use crate::events::Events;
use crate::failure::{Result, blocking, chain, conflict, error, invalid};
use crate::folder::{Folder, VmToml};
use crate::machines::stats::Counts;
use crate::snapshot::verified::Verified;
use crate::vmm::{self, Program, VmmError};

/// How long a guest may take to power off by its button before its agent is asked too.
const BUTTON_TIME: Duration = Duration::from_secs(5);
/// How long storing a machine may take.
const SUSPEND_TIME: Duration = Duration::from_secs(600);
/// How long a killed machine may take to be gone.
const KILL_TIME: Duration = Duration::from_secs(10);

/// Everything about machines.
pub struct Machines {
    /// The directory of their folders.
    directory: PathBuf,
    /// The state directory.
    root: PathBuf,
    /// The program that is the process of a machine.
    program: Program,
    /// Which boot of the host this is.
    boot: String,
    /// Snapshots that need not be read again.
    verified: Arc<Verified>,
    events: Events,
    /// The networks they can be in.
    networks: Networks,
    /// Their control groups.
    groups: Arc<Groups>,
    all: Mutex<BTreeMap<String, Arc<Entry>>>,
}

/// What was found when the process of a machine was looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Sought {
    /// It runs, and is attended to.
    Found,
    /// There is none.
    None,
    /// Somebody has the folder, and does not answer.
    Unclear,
}

/// One machine.
pub struct Entry {
    id: Uuid,
    /// Held by whoever changes it.
    changing: tokio::sync::Mutex<()>,
    live: Mutex<Live>,
}

/// What changes.
struct Live {
    name: String,
    folder: Folder,
    config: VmToml,
    run: Option<Run>,
    last_exit: Option<Exit>,
    counts: Counts,
    /// In the network it is in.
    address: Option<Ipv4Addr>,
    /// Of its process.
    group: Option<Group>,
    /// It is removed when it ends.
    temporary: bool,
}

/// A process of a machine.
struct Run {
    status: Status,
    /// For signals: the process that listens, whatever it says.
    process: Option<Arc<OwnedFd>>,
    paused: bool,
    /// Becomes true when the process has ended.
    ended: watch::Receiver<bool>,
}

impl Entry {
    fn new(name: String, folder: Folder, config: VmToml) -> Arc<Self> {
        let last_exit = folder.last_exit();
        let temporary = run::is_temporary(&folder);
        Arc::new(Self {
            id: config.id,
            changing: tokio::sync::Mutex::default(),
            live: Mutex::new(Live {
                name,
                folder,
                config,
                run: None,
                last_exit,
                counts: Counts::default(),
                address: None,
                group: None,
                temporary,
            }),
        })
    }

    fn id(&self) -> Uuid {
        self.id
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Where it is now.
    pub fn folder(&self) -> Folder {
        self.live().folder.clone()
    }

    fn name(&self) -> String {
        self.live().name.clone()
    }

    fn state(&self) -> MachineState {
        self.live().state()
    }

    /// What becomes true when the process has ended, if there is one.
    fn ended(&self) -> Option<watch::Receiver<bool>> {
        self.live().run.as_ref().map(|run| run.ended.clone())
    }

    fn limits(&self) -> Limits {
        Limits::of(&self.live().config.machine)
    }

    /// What is told of it.
    #[must_use]
    pub fn describe(&self) -> Machine {
        let live = self.live();
        Machine {
            name: live.name.clone(),
            id: self.id,
            state: live.state(),
            created: live.config.created,
            started: live.run.as_ref().map(|run| run.status.started),
            pid: live.run.as_ref().map(|run| run.status.pid),
            last_exit: live.last_exit.clone().filter(|_| live.run.is_none()),
            folder: live.folder.path().display().to_string(),
            address: live.address,
            temporary: live.temporary,
            control_group: live.group.iter().flat_map(Group::directories).map(shown).collect(),
            config: live.config.machine.clone(),
        }
    }
}

impl Live {
    fn state(&self) -> MachineState {
        match (&self.run, &self.last_exit) {
            (Some(run), _) if run.paused => MachineState::Paused,
            (Some(_), _) => MachineState::Running,
            _ if self.folder.file(SUSPENDED).is_dir() => MachineState::Suspended,
            (None, Some(exit)) if !exit.in_order => MachineState::Failed,
            (None, _) => MachineState::Stopped,
        }
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// An error of a machine's process.
fn of_vmm(name: &str, error: &VmmError) -> ApiError {
    let code = match error {
        VmmError::Refused(_) => ErrorCode::Conflict,
        _ => ErrorCode::Failed,
    };
    ApiError { code, message: format!("{name}: {}", chain(error)) }
}

impl Machines {
    /// What is told of machines.
    #[must_use]
    pub fn events(&self) -> &Events {
        &self.events
    }

    /// The state directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Entry>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether this machine is one of them.
    fn has(&self, entry: &Entry) -> bool {
        self.all().values().any(|other| other.id == entry.id)
    }

    /// All of them by name.
    #[must_use]
    pub fn list(&self) -> Vec<Machine> {
        let entries: Vec<_> = self.all().values().cloned().collect();
        entries.iter().map(|entry| entry.describe()).collect()
    }

    /// The machine of that name; one whose folder could not be understood before is looked at again.
    ///
    /// # Errors
    /// There is none.
    pub async fn find(self: &Arc<Self>, name: &str) -> Result<Arc<Entry>> {
        let found = self.all().get(name).cloned();
        match found {
            Some(entry) => Ok(entry),
            None => self.load_one(name).await,
        }
    }

    fn tell(&self, kind: EventKind, entry: &Entry, detail: Option<String>) {
        self.events.tell(kind, &entry.name(), entry.id, detail);
    }

    /// Starts a machine.
    ///
    /// # Errors
    /// It runs already, or cannot be started.
    pub async fn start(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<()> {
        let _changing = entry.changing.lock().await;
        self.start_now(entry).await
    }

    async fn start_now(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<()> {
        let (name, folder) = (entry.name(), entry.folder());
        if entry.state().is_up() {
            return Err(conflict(format!("{name} runs already")));
        }
        // One that was lost from sight, because it did not answer.
        if self.find_process(entry).await == Sought::Found {
            return Err(conflict(format!("{name} runs already")));
        }
        // What somebody wrote into it since.
        let config = folder.config()?;
        if config.id != entry.id {
            return Err(conflict(format!("the folder of {name} is another machine's now")));
        }
        entry.live().config = config;
        let tap = self.plug(entry).await?;
        let started = self.start_in_group(entry, tap).await;
        if started.is_err() {
            self.unplug(entry).await;
            self.remove_group(entry).await;
            // It says there what is told here.
            entry.live().last_exit = folder.last_exit();
        }
        started.map_err(|error| of_vmm(&format!("{name} cannot be started"), &error))?;
        let sought = self.find_process(entry).await;
        if sought == Sought::Unclear {
            self.unplug(entry).await;
            // It is not ended: it may have begun to go on from memory that is nowhere else. Its group
            // stays for when it is found.
            let message = format!("{name} was started, and its process does not answer");
            return Err(error(ErrorCode::Failed, message));
        }
        entry.live().counts.starts += 1;
        self.tell(EventKind::Started, entry, None);
        if sought == Sought::None {
            // Its guest ran, and has ended since.
            self.over(entry).await;
        }
        Ok(())
    }

    /// Takes a process into account until it ends.
    fn attend(self: &Arc<Self>, entry: &Arc<Entry>, mut stream: UnixStream, status: Status) {
        let (over, ended) = watch::channel(false);
        let paused = status.state == MachineState::Paused;
        let peer = stream.peer_cred().ok().and_then(|peer| peer.pid()).and_then(Pid::from_raw);
        let process = peer.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()).map(Arc::new);
        let (net, ports) = (status.net.clone(), status.ports.clone());
        let mut live = entry.live();
        if live.run.is_some() {
            // Found twice at the same time.
            return;
        }
        if live.group.is_none() {
            live.group = self.groups.of_process(entry.id, status.pid);
        }
        live.run = Some(Run { status, process, paused, ended });
        drop(live);
        let (machines, entry) = (Arc::clone(self), Arc::clone(entry));
        tokio::spawn(async move {
            machines.found_in(&entry, &net, &ports).await;
            // Nothing comes but the end.
            let mut nothing = [0; 64];
            while matches!(stream.read(&mut nothing).await, Ok(count) if count > 0) {}
            machines.over(&entry).await;
            let _ = over.send(true);
        });
    }

    /// Takes into account that the process of a machine has ended.
    async fn over(&self, entry: &Entry) {
        self.unplug(entry).await;
        self.remove_group(entry).await;
        let folder = entry.folder();
        // What is there while it runs is what is to be said of a process that was lost.
        let said = folder.last_exit().filter(|exit| exit.reason != UNFINISHED);
        let exit = said.unwrap_or_else(lost);
        let kind = match (exit.in_order, folder.file(SUSPENDED).is_dir()) {
            (_, true) => EventKind::Suspended,
            (true, _) => EventKind::Stopped,
            (false, _) => EventKind::Failed,
        };
        let reason = exit.reason.clone();
        let mut live = entry.live();
        live.run = None;
        live.last_exit = Some(exit);
        live.counts.failures += u64::from(kind == EventKind::Failed);
        drop(live);
        self.tell(kind, entry, Some(reason));
    }

    /// Presses the machine's power button, asks the guest's agent if that does nothing, and ends the
    /// machine after that time.
    ///
    /// # Errors
    /// It does not run, or cannot be ended.
    pub async fn stop(&self, entry: &Entry, patience: Duration) -> Result<()> {
        let _changing = entry.changing.lock().await;
        self.stop_now(entry, patience).await
    }

    async fn stop_now(&self, entry: &Entry, patience: Duration) -> Result<()> {
        let (name, folder) = (entry.name(), entry.folder());
        let Some(mut ended) = entry.ended() else {
            return Err(conflict(format!("{name} does not run")));
        };
        if entry.state() == MachineState::Paused
            && let Err(error) = self.set_paused(entry, false).await
        {
            tracing::warn!(machine = name, %error, "it does not go on, and is ended");
            return self.kill_now(entry).await;
        }
        let over = ended.clone();
        let stopping = async {
            let noticed = vmm::ask(&folder, &Request::PowerButton).await;
            match &noticed {
                Ok(()) => {
                    let time = BUTTON_TIME.min(patience / 4);
                    if matches!(timeout(time, ended.wait_for(|over| *over)).await, Ok(Ok(_))) {
                        return true;
                    }
                    tracing::info!(machine = name, "the power button does not end it soon");
                }
                // It has no driver for that, or not yet.
                Err(error) => {
                    tracing::info!(machine = name, error = chain(error), "no power button");
                }
            }
            // As long as it starts, its agent does not answer.
            let seconds = patience.as_secs_f64();
            let asked = vmm::ask_within(&folder, &Request::PowerOff { seconds }, patience).await;
            if let Err(error) = &asked {
                tracing::warn!(machine = name, error = chain(error), "not asked to power off");
            }
            // Whoever knows of neither is ended now.
            (noticed.is_ok() || asked.is_ok()) && ended.wait_for(|over| *over).await.is_ok()
        };
        if !patience.is_zero() && timeout(patience, stopping).await.unwrap_or(false) {
            return Ok(());
        }
        if *over.borrow() {
            return Ok(());
        }
        self.kill_now(entry).await
    }

    /// Ends a machine at once.
    ///
    /// # Errors
    /// It does not run, or cannot be ended.
    pub async fn kill(&self, entry: &Entry) -> Result<()> {
        // Not behind a stop that waits for the guest: this is what one does when that takes too long.
        self.kill_now(entry).await
    }

    async fn kill_now(&self, entry: &Entry) -> Result<()> {
        let name = entry.name();
        let Some(mut ended) = entry.ended() else {
            return Err(conflict(format!("{name} does not run")));
        };
        let asked = vmm::ask(&entry.folder(), &Request::Kill).await;
        if asked.is_ok() && timeout(KILL_TIME, ended.wait_for(|over| *over)).await.is_ok() {
            return Ok(());
        }
        let process = entry.live().run.as_ref().and_then(|run| run.process.clone());
        if let Some(process) = process.filter(|_| !*ended.borrow()) {
            tracing::warn!(machine = name, "killed by a signal, since it does not answer");
            // It may have ended just now.
            let _ = pidfd_send_signal(&process, Signal::KILL);
        }
        match timeout(KILL_TIME, ended.wait_for(|over| *over)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(error(ErrorCode::Failed, format!("{name} does not end"))),
        }
    }

    /// Stores a machine and ends it.
    ///
    /// # Errors
    /// It does not run, or cannot be stored; then it goes on as before.
    pub async fn suspend(&self, entry: &Entry) -> Result<()> {
        let _changing = entry.changing.lock().await;
        let name = entry.name();
        let Some(mut ended) = entry.ended() else {
            return Err(conflict(format!("{name} does not run")));
        };
        // Processes that are older do not say.
        let run = entry.live().run.as_ref().map(|run| run.status.clone());
        if entry.live().temporary {
            return Err(conflict(format!(
                "{name} is removed when it ends, as machines of `berth vm run` are: it cannot be suspended"
            )));
        }
        let has = run.filter(|status| status.cpus != 0).map(|status| status.net);
        if has.is_some_and(|net| net != entry.describe().config.net) {
            return Err(conflict(format!(
                "{name} is to have another network card at its next start, and one that is suspended goes on \
                 with the one it has; set that again with --net, or restart it"
            )));
        }
        let stored = vmm::ask_within(&entry.folder(), &Request::Suspend, SUSPEND_TIME).await;
        stored.map_err(|error| of_vmm(&name, &error))?;
        match timeout(KILL_TIME, ended.wait_for(|over| *over)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(error(ErrorCode::Failed, format!("{name} does not end"))),
        }
    }

    /// Starts a machine that is suspended.
    ///
    /// # Errors
    /// It is not.
    pub async fn resume(self: &Arc<Self>, entry: &Arc<Entry>) -> Result<()> {
        let _changing = entry.changing.lock().await;
        if entry.state() != MachineState::Suspended {
            return Err(conflict(format!("{} is not suspended", entry.name())));
        }
        self.start_now(entry).await
    }

    /// Stops a machine as [`Self::stop`] if it runs, and starts it.
    ///
    /// # Errors
    /// Of either.
    pub async fn restart(self: &Arc<Self>, entry: &Arc<Entry>, patience: Duration) -> Result<()> {
        let _changing = entry.changing.lock().await;
        if entry.state().is_up() {
            self.stop_now(entry, patience).await?;
        }
        self.start_now(entry).await
    }

    /// Makes the vCPUs of a machine stand still, or go on.
    ///
    /// # Errors
    /// It does not run, or does so already.
    pub async fn pause(&self, entry: &Entry, pause: bool) -> Result<()> {
        let _changing = entry.changing.lock().await;
        let name = entry.name();
        match (entry.state(), pause) {
            (MachineState::Running, true) | (MachineState::Paused, false) => {}
            (MachineState::Paused, true) => {
                return Err(conflict(format!("{name} is paused already")));
            }
            (MachineState::Running, false) => {
                return Err(conflict(format!("{name} is not paused")));
            }
            _ => return Err(conflict(format!("{name} does not run"))),
        }
        self.set_paused(entry, pause).await
    }

    async fn set_paused(&self, entry: &Entry, pause: bool) -> Result<()> {
        let request = if pause { Request::Pause } else { Request::Unpause };
        let done = vmm::ask(&entry.folder(), &request).await;
        if done.is_err()
            && let Ok((_, Answer::Status(status))) =
                vmm::open(&entry.folder(), &Request::Status).await
            && let Some(run) = &mut entry.live().run
        {
            run.paused = status.state == MachineState::Paused;
        }
        done.map_err(|error| of_vmm(&entry.name(), &error))?;
        if let Some(run) = &mut entry.live().run {
            run.paused = pause;
        }
        let kind = if pause { EventKind::Paused } else { EventKind::Unpaused };
        self.tell(kind, entry, None);
        Ok(())
    }

    /// A connection to something of a machine that runs: its console, its agent.
    ///
    /// # Errors
    /// It does not run.
    pub async fn connect(&self, entry: &Entry, request: &Request) -> Result<UnixStream> {
        let name = entry.name();
        if !entry.state().is_up() {
            return Err(conflict(format!(
                "{name} does not run; `berth vm start {name}` starts it"
            )));
        }
        match vmm::open(&entry.folder(), request).await {
            Ok((stream, Answer::Done)) => Ok(stream),
            Ok((_, other)) => Err(of_vmm(&name, &VmmError::Strange(format!("{other:?}")))),
            Err(error) => Err(of_vmm(&name, &error)),
        }
    }

    /// Gives a machine another name.
    ///
    /// # Errors
    /// The name is taken, or none.
    pub async fn rename(&self, entry: &Arc<Entry>, name: &str) -> Result<()> {
        check_name(name)?;
        let _changing = entry.changing.lock().await;
        let before = self.rename_now(entry, name)?;
        self.renamed_in_network(entry, name).await;
        self.tell(EventKind::Renamed, entry, Some(before));
        Ok(())
    }

    /// Gives it the name; what it was called before.
    fn rename_now(&self, entry: &Arc<Entry>, name: &str) -> Result<String> {
        let before = entry.name();
        let mut all = self.all();
        if all.contains_key(name) {
            return Err(conflict(format!("there is a machine {name} already")));
        }
        let folder = entry.folder().rename(name)?;
        let mut live = entry.live();
        (live.folder, live.name) = (folder, name.to_owned());
        drop(live);
        all.remove(&before);
        all.insert(name.to_owned(), Arc::clone(entry));
        Ok(before)
    }

    /// Removes a machine with all its files; `force` ends one that runs.
    ///
    /// # Errors
    /// It runs, or something else uses its folder.
    pub async fn remove(&self, entry: &Entry, force: bool) -> Result<()> {
        let _changing = entry.changing.lock().await;
        let name = entry.name();
        if !self.has(entry) {
            // Its name may be another's by now.
            return Err(error(ErrorCode::NotFound, format!("there is no machine {name} any more")));
        }
        if entry.state().is_up() {
            if !force {
                return Err(conflict(format!(
                    "{name} runs; stop it first, or remove it with --force"
                )));
            }
            match self.kill_now(entry).await {
                // It may have ended by itself.
                Err(error) if entry.state().is_up() => return Err(error),
                _ => {}
            }
        }
        let folder = entry.folder();
        let removed = blocking(move || {
            let _lock = folder.lock_within(load::SETTLE)?;
            Ok(folder.remove()?)
        });
        // With its first step it is gone: what a failure leaves is removed by the next daemon.
        let result = removed.await;
        if result.is_ok() || !entry.folder().path().exists() {
            self.all().remove(&name);
            self.leave_network(entry).await;
            self.tell(EventKind::Removed, entry, None);
        }
        result
    }
}

/// The end of a machine whose process did not say how it ended.
fn lost() -> Exit {
    Exit { time: Timestamp::now(), in_order: false, reason: UNFINISHED.to_owned(), status: 1 }
}

/// Refuses what cannot be a name.
fn check_name(name: &str) -> Result<()> {
    if is_name(name) {
        return Ok(());
    }
    Err(invalid(format!(
        "`{name}` is no machine name: 1 to {} letters, digits and `-`, not first",
        berth_api::v1::machine::NAME_MAX
    )))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use berth_api::v1::machine::{Accel, CreateMachine, MachineConfig, Net};
    use berth_api::vmm::Greeting;

    use super::*;

    #[tokio::test]
    async fn a_guest_that_ends_at_once_was_started() {
        let root = tempfile::tempdir().unwrap();
        let greeting = Greeting::Started(Status {
            state: MachineState::Running,
            pid: 1,
            started: Timestamp::now(),
            accel: "translate".into(),
            cpus: 1,
            memory_bytes: 1 << 20,
            net: Net::None,
            ports: Vec::new(),
        });
        let path = root.path().join("ends");
        let greeting = serde_json::to_string(&greeting).unwrap();
        std::fs::write(&path, format!("#!/bin/sh\necho '{greeting}'\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o700)).unwrap();
        let program =
            Program { path: path.clone(), tsc_hz: Arc::default(), zygote: Arc::default() };
        let events = Events::default();
        let machines = Machines::load(root.path(), program, events).await.unwrap();
        let config = MachineConfig {
            kernel: Some(path),
            net: Net::None,
            accel: Accel::Translate,
            ..MachineConfig::default()
        };
        let request = CreateMachine { name: "short".into(), config, disks: Vec::new() };
        let entry = machines.create(request).await.unwrap();
        for starts in 1..4 {
            machines.start(&entry).await.unwrap();
            assert_eq!(entry.state(), MachineState::Failed);
            assert_eq!(entry.live().counts.starts, starts);
            assert_eq!(entry.live().counts.failures, starts);
            assert_eq!(entry.live().group, None);
        }
    }
}
