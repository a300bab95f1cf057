//! Answers the daemon on the socket in the machine's folder.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use berth_api::agent::message::Identify;
use berth_api::v1::machine::{MachineConfig, MachineState, Net};
use berth_api::vmm::{Answer, Frozen, IDENTITY, Request, SUSPENDED, Status};
use berth_daemon::folder::Folder;
use berth_daemon::line;
use berth_vmm::chips::events::PowerButton;
use berth_vmm::devices::HostEnds;
use berth_vmm::machine::{FrozenMachine, Pauser, RunningMachine, Storer, Written};
use berth_vmm::outcome::{Ending, Outcome};

use crate::command::{self, AGENT_WAIT, Dial};
use crate::machine::connect_agent;
use crate::vmm::disks::{Disks, FrozenDisks};
use crate::vmm::hub::Hub;
use crate::vmm::wrote::{HEAR_TIME, LIVED, heard};
use crate::vmm::{Kept, socket};

/// How long somebody who connects may take for his request, or for taking the answer.
const REQUEST_TIME: Duration = Duration::from_secs(5);
/// When a guest has booted, most likely.
const REHEARSE_AFTER: Duration = Duration::from_secs(3);
/// When what a clone's guest was told is on its disk.
const IDENTITY_TIME: Duration = Duration::from_secs(5);
/// How long an agent may take for an answer.
const AGENT_TIME: Duration = Duration::from_secs(5);
/// How long who wants to speak with an agent waits for whoever sets the guest's clock, before he has to ask
/// again.
const CLOCK_TIME: Duration = Duration::from_secs(1);
/// How long a guest may take to notice that its power button was pressed. One with a driver takes
/// milliseconds.
const BUTTON_TIME: Duration = Duration::from_secs(1);
/// Where a machine is stored while that is not complete.
const UNFINISHED: &str = "state/.suspending";
/// Connections at once to the console and to the agent. Others are never refused.
const CONNECTIONS_MAX: usize = 128;

/// Whether the guest's clock was set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Clock {
    Unset,
    /// Somebody is about to.
    Setting,
    Set,
}

/// Says how setting the clock went, however it ends.
struct Done<'a> {
    control: &'a Control,
    clock: Clock,
}

impl Drop for Done<'_> {
    fn drop(&mut self) {
        *self.control.clock.lock().unwrap_or_else(PoisonError::into_inner) = self.clock;
        self.control.clock_changed.notify_all();
    }
}

/// What the connections share.
pub(super) struct Control {
    pub(super) ends: HostEnds,
    pub(super) ending: Arc<Ending>,
    pauser: Pauser,
    button: PowerButton,
    hub: Arc<Hub>,
    storer: Arc<Storer>,
    folder: Folder,
    /// What the machine was started with.
    config: MachineConfig,
    identity: Identify,
    /// It is not the only one that goes on from where it began.
    is_copy: bool,
    status: Mutex<Status>,
    kept: Mutex<KeptMachine>,
    /// What a clone wrote soon.
    wrote: Mutex<Written>,
    clock: Mutex<Clock>,
    /// It was set, or could not be.
    clock_changed: Condvar,
    connections: AtomicUsize,
}

impl Control {
    /// Listens in the folder.
    ///
    /// # Errors
    /// It cannot.
    pub(super) fn start(
        kept: Kept<'_>,
        machine: &RunningMachine,
        ends: HostEnds,
        hub: Arc<Hub>,
        status: Status,
    ) -> io::Result<()> {
        let folder = kept.folder;
        let path = socket(folder);
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600))?;
        let control = Arc::new(Self {
            ends,
            ending: machine.ending(),
            pauser: machine.pauser(),
            button: machine.power_button(),
            hub,
            storer: machine.storer(),
            folder: folder.clone(),
            config: MachineConfig {
                cpus: status.cpus,
                memory: status.memory_bytes.into(),
                ..kept.toml.machine.clone()
            },
            identity: Identify {
                hostname: kept.name.to_owned(),
                machine_id: kept.toml.id.simple().to_string(),
                mac: kept.mac.0,
                leave_address: matches!(kept.toml.machine.net, Net::Network(_)),
            },
            is_copy: kept.is_copy,
            status: Mutex::new(status),
            kept: Mutex::default(),
            wrote: Mutex::default(),
            clock: Mutex::new(Clock::Unset),
            clock_changed: Condvar::new(),
            connections: AtomicUsize::new(0),
        });
        let first = Arc::clone(&control);
        let thread = thread::Builder::new().name("clock".into());
        thread.spawn(move || first.set_clock(AGENT_WAIT, AGENT_WAIT))?;
        let thread = thread::Builder::new().name("control".into());
        thread.spawn(move || control.listen(&listener))?;
        Ok(())
    }

    fn listen(self: &Arc<Self>, listener: &UnixListener) {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Out of descriptors, most likely.
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            let control = Arc::clone(self);
            let thread = thread::Builder::new().name("control-client".into());
            // What goes wrong on a connection, or that there is no thread for it, is for its other end.
            let _ = thread.spawn(move || control.serve(&stream));
        }
    }

    fn serve(self: &Arc<Self>, stream: &UnixStream) -> io::Result<()> {
        stream.set_read_timeout(Some(REQUEST_TIME))?;
        stream.set_write_timeout(Some(REQUEST_TIME))?;
        let request = match line::read(stream) {
            Ok(line) => serde_json::from_slice(&line).map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        match request {
            Ok(request @ (Request::Agent | Request::Console { .. })) => {
                let others = self.connections.fetch_add(1, Ordering::SeqCst);
                let served = if others < CONNECTIONS_MAX {
                    self.carry_out(&request, stream)
                } else {
                    let why = format!("{CONNECTIONS_MAX} connections are the most");
                    answer(stream, &Answer::Refused(why))
                };
                self.connections.fetch_sub(1, Ordering::SeqCst);
                served
            }
            Ok(request) => self.carry_out(&request, stream),
            Err(why) => answer(stream, &Answer::Refused(format!("not understood: {why}"))),
        }
    }

    fn carry_out(self: &Arc<Self>, request: &Request, stream: &UnixStream) -> io::Result<()> {
        let refuse = |why: String| answer(stream, &Answer::Refused(why));
        match request {
            Request::Status => answer(stream, &Answer::Status(self.status())),
            Request::Watch => {
                answer(stream, &Answer::Status(self.status()))?;
                stream.set_read_timeout(None)?;
                // Until the other end goes; ours goes with the process.
                let _ = (&*stream).read(&mut [0; 1]);
                Ok(())
            }
            Request::Pause => {
                self.pause(true);
                answer(stream, &Answer::Done)
            }
            Request::Unpause => {
                self.pause(false);
                answer(stream, &Answer::Done)
            }
            Request::Suspend => match self.suspend() {
                Ok(()) => {
                    let done = answer(stream, &Answer::Done);
                    self.ending.end(Outcome::Suspended);
                    done
                }
                Err(why) => refuse(why),
            },
            Request::Snapshot { into, keep } => match self.snapshot(into.as_deref(), *keep) {
                Ok(frozen) => answer(stream, &Answer::Snapshot(frozen)),
                Err(why) => refuse(why),
            },
            Request::Take { kept } => self.hand(*kept, stream),
            Request::Release { kept } => {
                self.release(*kept);
                answer(stream, &Answer::Done)
            }
            Request::PowerButton => {
                self.button.press();
                match self.button.is_noticed_within(BUTTON_TIME) {
                    true => answer(stream, &Answer::Done),
                    false => refuse("the guest takes no notice of its power button".into()),
                }
            }
            Request::PowerOff { seconds } => match self.power_off(*seconds) {
                Ok(()) => answer(stream, &Answer::Done),
                Err(why) => refuse(why),
            },
            Request::Cpus { count } => match self.use_cpus(*count) {
                Ok(()) => answer(stream, &Answer::Done),
                Err(why) => refuse(why),
            },
            Request::Memory { bytes } => match self.set_memory(*bytes) {
                Ok(()) => answer(stream, &Answer::Done),
                Err(why) => refuse(why),
            },
            Request::Kill => {
                let done = answer(stream, &Answer::Done);
                self.ending.end(Outcome::Stopped);
                done
            }
            Request::Agent => {
                // Nobody is before the clock. What could not be told when it began is told now.
                if !self.set_clock(AGENT_TIME, CLOCK_TIME) {
                    return refuse("the guest's agent does not answer yet".into());
                }
                match self.agent() {
                    Ok(agent) => {
                        answer(stream, &Answer::Done)?;
                        relay(stream, &agent)
                    }
                    Err(error) => refuse(format!("the guest's agent does not answer: {error}")),
                }
            }
            Request::Console { backlog } => {
                let attached = match self.hub.attach(*backlog) {
                    Ok(attached) => attached,
                    Err(error) => return refuse(error.to_string()),
                };
                answer(stream, &Answer::Done)?;
                stream.set_read_timeout(None)?;
                stream.set_write_timeout(None)?;
                attached.serve(stream)
            }
        }
    }

    pub(super) fn status(&self) -> Status {
        self.status.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn pause(&self, pause: bool) {
        // Held meanwhile: two requests do not get in each other's way.
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        if pause {
            self.pauser.pause();
            status.state = MachineState::Paused;
        } else {
            self.pauser.unpause();
            status.state = MachineState::Running;
        }
    }

    /// Whether memory of this machine is of use to another process.
    fn check_storable(&self) -> Result<(), String> {
        if self.config.shares.is_empty() {
            return Ok(());
        }
        Err("a guest with shared folders has files of the host open, which cannot be stored with its \
             memory; stop it first, or take a snapshot with --disk-only, or clone without --running"
            .into())
    }

    /// Stores the machine, which then stands still; if that fails, it is as before.
    fn suspend(&self) -> Result<(), String> {
        self.check_storable()?;
        let status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        self.pauser.pause();
        let stored = store(&self.storer, &self.folder);
        if stored.is_err() && status.state == MachineState::Running {
            self.pauser.unpause();
        }
        stored.map_err(|error| berth_daemon::failure::chain(&*error))
    }

    /// Freezes the disks and the machine, at one instant, and stores or keeps it.
    fn snapshot(&self, into: Option<&str>, keep: bool) -> Result<Frozen, String> {
        if into.is_some() || keep {
            self.check_storable()?;
        }
        let storer = (into.is_some() || keep).then_some(&self.storer);
        // One at a time, and the machine is neither paused nor continued meanwhile.
        let status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        let disks = Disks::prepare(&self.config, &self.ends)?;
        let is_running = status.state == MachineState::Running;
        let began = Instant::now();
        self.pauser.pause();
        let frozen = self.freeze(storer, disks, keep);
        if is_running {
            self.pauser.unpause();
        }
        let pause_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
        let (disks, machine) = frozen?;
        let stored = match (&machine, into) {
            (Some(machine), Some(into)) => machine.write(&self.folder.file(into)),
            _ => Ok(()),
        };
        let kept = self.keep(machine, keep);
        stored.map_err(|error| berth_daemon::failure::chain(&error))?;
        match keep {
            // Clones read the layers, and settle them.
            true => disks.write_out()?,
            false => disks.settle()?,
        }
        eprintln!("berth: a snapshot was taken; the guest stood still for {pause_us} us");
        Ok(Frozen {
            pause_us: if is_running { pause_us } else { 0 },
            config: self.config.clone(),
            layers: disks.layers,
            kept,
        })
    }

    /// While the vCPUs stand still: what devices have begun is done, then disks and memory are frozen.
    fn freeze(
        &self,
        storer: Option<&Arc<Storer>>,
        disks: Disks,
        keep: bool,
    ) -> Result<(FrozenDisks, Option<FrozenMachine>), String> {
        let mut parked = storer.map(|storer| (storer, storer.park()));
        let disks = disks.freeze()?;
        let machine =
            parked.as_mut().map(|(storer, parked)| storer.freeze(parked, keep)).transpose();
        let machine = machine.map_err(|error| berth_daemon::failure::chain(&error))?;
        Ok((disks, machine))
    }

    /// Keeps a machine for others, instead of the one before, or lets go of it.
    fn keep(&self, machine: Option<FrozenMachine>, keep: bool) -> Option<u64> {
        let machine = machine?;
        if !keep {
            machine.release();
            return None;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let number = kept.number + 1;
        let before = std::mem::replace(
            &mut *kept,
            KeptMachine { number, machine: Some(machine), taken: false },
        );
        before.drop();
        Some(number)
    }

    fn hand(&self, number: u64, stream: &UnixStream) -> io::Result<()> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = kept.number == number;
        let KeptMachine { machine, taken, .. } = &mut *kept;
        let Some(machine) = machine.as_ref().filter(|_| is_it) else {
            return answer(stream, &Answer::Refused("it is not kept any more".into()));
        };
        answer(stream, &Answer::Done)?;
        // From here on it may be shared.
        *taken = true;
        let ahead = self.wrote.lock().unwrap_or_else(PoisonError::into_inner).clone();
        machine.hand(stream, &ahead)?;
        drop(kept);
        let began = Instant::now();
        stream.set_read_timeout(Some(HEAR_TIME))?;
        // Whoever says nothing is no clone of ours, or was ended.
        if let Ok(told) = line::read(stream).and_then(|line| heard(&line)) {
            let mut wrote = self.wrote.lock().unwrap_or_else(PoisonError::into_inner);
            // One that ended at once has not written all that others will.
            if began.elapsed() >= LIVED || wrote.ram.is_empty() {
                *wrote = told;
            }
        }
        Ok(())
    }

    fn release(&self, number: u64) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.number == number {
            std::mem::replace(&mut *kept, KeptMachine { number, ..KeptMachine::default() }).drop();
        }
    }

    fn agent(&self) -> io::Result<UnixStream> {
        connect_agent(&self.ends)
    }

    /// Sets the guest's clock, once, and tells a clone who it is, before anybody else speaks with its
    /// agent. One that has no agent keeps the time that it began with. False if somebody else is still about
    /// to after so long a wait.
    fn set_clock(self: &Arc<Self>, patience: Duration, wait: Duration) -> bool {
        let clock = self.clock.lock().unwrap_or_else(PoisonError::into_inner);
        let setting = |clock: &mut Clock| *clock == Clock::Setting;
        let waited = self.clock_changed.wait_timeout_while(clock, wait, setting);
        let mut clock = waited.unwrap_or_else(PoisonError::into_inner).0;
        if *clock != Clock::Unset {
            return *clock == Clock::Set;
        }
        *clock = Clock::Setting;
        drop(clock);
        let mut done = Done { control: self, clock: Clock::Unset };
        if self.begin(patience) {
            done.clock = Clock::Set;
        }
        true
    }

    /// Sets the guest's clock, and tells it who it is.
    fn begin(self: &Arc<Self>, patience: Duration) -> bool {
        let marker = self.folder.file(IDENTITY);
        let is_clone = marker.exists();
        let identity = is_clone.then_some(&self.identity);
        let agent = &mut Agent(Arc::clone(self));
        let set = match command::begin(agent, patience, identity, self.is_copy) {
            Ok(()) => {
                self.ends.net_held.store(false, Ordering::Release);
                true
            }
            Err(error) => {
                if is_clone {
                    let error = berth_daemon::failure::chain(&error);
                    eprintln!("berth: the guest does not know yet that it is a clone: {error}");
                }
                false
            }
        };
        if set && !is_clone && !self.is_copy {
            let control = Arc::clone(self);
            let thread = thread::Builder::new().name("rehearsal".into());
            // Without it clones take longer.
            let _ = thread.spawn(move || {
                thread::sleep(REHEARSE_AFTER);
                let _ = command::rehearse(&mut Agent(control), AGENT_TIME);
            });
        }
        if set && is_clone {
            let thread = thread::Builder::new().name("identity".into());
            // Without it the guest is told again at the next start, which does no harm.
            let _ = thread.spawn(move || {
                thread::sleep(IDENTITY_TIME);
                if let Err(error) = std::fs::remove_file(&marker) {
                    eprintln!("berth: {} cannot be removed: {error}", marker.display());
                }
            });
        }
        set
    }

    fn power_off(self: &Arc<Self>, seconds: f64) -> Result<(), String> {
        let patience = Duration::try_from_secs_f64(seconds).map_err(|error| error.to_string())?;
        let asked = command::shut_down(&mut Agent(Arc::clone(self)), patience);
        asked.map_err(|error| {
            format!("the guest's agent cannot be asked: {}", berth_daemon::failure::chain(&error))
        })
    }
}

/// A machine as it was, for clones.
#[derive(Default)]
struct KeptMachine {
    number: u64,
    machine: Option<FrozenMachine>,
    /// A clone has it.
    taken: bool,
}

impl KeptMachine {
    fn drop(self) {
        if let Some(machine) = self.machine.filter(|_| !self.taken) {
            machine.release();
        }
    }
}

/// Stores a machine that stands still, as a whole or not at all.
fn store(storer: &Storer, folder: &Folder) -> Result<(), Box<dyn std::error::Error>> {
    let (made, target) = (folder.file(UNFINISHED), folder.file(SUSPENDED));
    let store = || -> Result<(), Box<dyn std::error::Error>> {
        match std::fs::remove_dir_all(&made) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        std::fs::create_dir(&made)?;
        storer.store(&made)?;
        std::fs::rename(&made, &target)?;
        berth_daemon::folder::sync(&folder.file("state"))?;
        Ok(())
    };
    store().inspect_err(|_| {
        // The next one removes what cannot be removed now.
        let _ = std::fs::remove_dir_all(&made);
    })
}

/// The way to the agent.
pub(super) struct Agent(pub(super) Arc<Control>);

impl Dial for Agent {
    fn dial(&mut self) -> io::Result<UnixStream> {
        let stream = self.0.agent()?;
        // One that accepts and says nothing holds nobody up.
        stream.set_read_timeout(Some(AGENT_TIME))?;
        stream.set_write_timeout(Some(AGENT_TIME))?;
        Ok(stream)
    }

    fn is_alive(&mut self) -> bool {
        self.0.ending.outcome().is_none()
    }
}

fn answer(mut stream: &UnixStream, answer: &Answer) -> io::Result<()> {
    let mut line = serde_json::to_vec(answer)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Moves bytes both ways until both directions have ended.
fn relay(client: &UnixStream, guest: &UnixStream) -> io::Result<()> {
    client.set_read_timeout(None)?;
    client.set_write_timeout(None)?;
    let (mut from, mut to) = (client.try_clone()?, guest.try_clone()?);
    let thread = thread::Builder::new().name("agent-relay".into());
    let other = thread.spawn(move || {
        let _ = io::copy(&mut from, &mut to);
        let _ = to.shutdown(Shutdown::Write);
        // What is not read when it is closed would reset the connection, and what the guest said last
        // would be lost with it.
        let _ = io::copy(&mut from, &mut io::sink());
    })?;
    let _ = io::copy(&mut &*guest, &mut &*client);
    // Whoever is there closes it then.
    let _ = client.shutdown(Shutdown::Write);
    let _ = other.join();
    Ok(())
}
