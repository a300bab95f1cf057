//! Stores a translated machine whose vCPUs stand still, and puts one back that was stored.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use berth_translator::{Frozen, Origin, Shared, SharedCode};
use berth_x86::CpuState;
use berth_x86::cpuid::{CpuidTable, Topology};

use crate::chips::chipset::Chipset;
use crate::chips::lapic::Lapic;
use crate::chips::pit::Pit;
use crate::clock::{Clock, HostClock};
use crate::fit::Fit;
use crate::machine::chips::StoredDevices;
use crate::machine::handed::hand;
use crate::machine::{MachineConfig, Resume};
use crate::memory::{GuestRam, Memory, ram_file};
use crate::pci::root::PciRoot;
use crate::pvclock::PvClock;
use crate::state::{MachineState, Moment, Shift, StateError, StoredCpu, VERSION, stored_memory};
use crate::vcpu::mailbox::Mailbox;
use crate::vcpu::platform::ClockMsrs;

/// What stores a machine.
pub struct Storer {
    pub(super) clock: Arc<dyn Clock>,
    pub(super) ram: GuestRam,
    pub(super) mailboxes: Vec<Arc<Mailbox>>,
    pub(super) apics: Vec<Arc<Lapic>>,
    pub(super) chipset: Arc<Chipset>,
    pub(super) pit: Arc<Mutex<Pit>>,
    pub(super) devices: StoredDevices,
    pub(super) pvclock: Arc<PvClock>,
    pub(super) msrs: Vec<Arc<ClockMsrs>>,
    pub(super) tsc_khz: u32,
    pub(super) shared: Arc<Shared>,
}

/// A machine as it was at an instant, which has gone on since.
pub struct FrozenMachine {
    /// What it held besides its memory.
    pub state: MachineState,
    frozen: Frozen,
    /// What each vCPU has translated, for clones.
    code: Vec<Option<SharedCode>>,
    shared: Arc<Shared>,
}

impl FrozenMachine {
    /// Where its memory is; it is there as long as these files are open, if nobody calls
    /// [`FrozenMachine::release`].
    #[must_use]
    pub fn memory(&self) -> &Origin {
        &self.frozen.origin
    }

    /// Writes it into a directory that is there.
    ///
    /// # Errors
    /// [`StateError::File`]; then the directory is of no use.
    pub fn write(&self, directory: &Path) -> Result<(), StateError> {
        self.state.write(self.memory(), directory)
    }

    /// Hands it to the process of a clone, to be received as [`Handed`](crate::machine::Handed).
    ///
    /// # Errors
    /// It is gone, or the system's.
    pub fn hand(&self, to: &UnixStream) -> io::Result<()> {
        hand(to, &self.state, self.memory(), &self.code)
    }

    /// Nobody needs it any more: the machine may write to its memory where it is.
    pub fn release(self) {
        if let Err(error) = self.shared.unfreeze(self.frozen) {
            // It is copied when it is written, as before.
            tracing::warn!(%error, "memory of the machine stays write-protected");
        }
    }
}

/// A machine that was stored, and how far its counters are to be set.
pub(super) struct Resumed {
    pub(super) state: MachineState,
    pub(super) memory: Origin,
    /// What each vCPU had translated, if that is known.
    pub(super) code: Vec<Option<SharedCode>>,
    shift: Shift,
}

/// The devices of a machine, which do nothing as long as this is there.
pub struct Parked<'a>(Option<MutexGuard<'a, PciRoot>>);

impl Drop for Parked<'_> {
    fn drop(&mut self) {
        if let Some(pci) = &mut self.0 {
            pci.unpark();
        }
    }
}

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Reads a machine that is to go on with this configuration.
///
/// # Errors
/// [`StateError`].
pub(super) fn read(config: &MachineConfig, resume: &Resume) -> Result<Box<Resumed>, StateError> {
    let (state, memory, code) = match resume {
        Resume::Stored(directory) => {
            (MachineState::read(directory)?, stored_memory(directory)?, Vec::new())
        }
        Resume::Handed(handed) => {
            (handed.state.clone(), handed.memory.clone(), handed.code.clone())
        }
    };
    let (cpus, memory_bytes) = (config.cpus, config.memory_bytes);
    Fit { accel: config.accel, cpus, memory_bytes }.check_state(&state)?;
    let shift = state.saved.shift_to(&Moment::now(&HostClock::new()));
    Ok(Box::new(Resumed { state, memory, code, shift }))
}

impl Resumed {
    fn cpu(&self, index: u32) -> Option<&StoredCpu> {
        self.state.cpus.get(index as usize)
    }

    pub(super) fn cpu_state(&self, index: u32) -> CpuState {
        let mut state =
            self.cpu(index).map(|cpu| cpu.state.clone()).unwrap_or_else(|| CpuState::reset(false));
        state.tsc_offset = state.tsc_offset.wrapping_add(self.shift.tsc_back);
        state
    }

    pub(super) fn is_waiting(&self, index: u32) -> bool {
        self.cpu(index).is_some_and(|cpu| cpu.waiting)
    }

    pub(super) fn pvclock(&self, clock: Arc<dyn Clock>, memory: Memory) -> PvClock {
        PvClock::restored(clock, memory, &self.state.pvclock, self.shift.tsc_back)
    }
}

impl Storer {
    /// Makes the devices of a machine whose vCPUs stand still do nothing, too, until what is
    /// returned is dropped.
    #[must_use]
    pub fn park(&self) -> Parked<'_> {
        let mut pci = self.devices.pci.as_ref().map(|pci| lock(pci));
        if let Some(pci) = &mut pci {
            pci.park();
        }
        Parked(pci)
    }

    /// Stores the machine, whose vCPUs stand still, in a directory that is there.
    ///
    /// # Errors
    /// [`StateError`]; then the directory is of no use.
    pub fn store(&self, directory: &Path) -> Result<(), StateError> {
        let mut parked = self.park();
        self.capture(&mut parked)?.write(&self.shared.origin(), directory)
    }

    /// Keeps a machine, whose vCPUs stand still, as it is; it can go on before that is written.
    /// `code`: also what its vCPUs have translated, for [`FrozenMachine::hand`].
    ///
    /// # Errors
    /// [`StateError`]; the machine can go on.
    pub fn freeze(&self, parked: &mut Parked<'_>, code: bool) -> Result<FrozenMachine, StateError> {
        let state = self.capture(parked)?;
        let share = |mailbox: &Arc<Mailbox>| mailbox.ask(|vcpu| vcpu.share_code()).flatten();
        let code = if code { self.mailboxes.iter().map(share).collect() } else { Vec::new() };
        let new = ram_file(state.memory_bytes);
        let frozen = new
            .map_err(|(_, error)| error)
            .and_then(|new| self.shared.freeze(new.into()))
            .map_err(|error| StateError::Unsaved(format!("its memory cannot be kept: {error}")))?;
        Ok(FrozenMachine { state, frozen, code, shared: Arc::clone(&self.shared) })
    }

    /// What a machine that does nothing holds besides its memory.
    ///
    /// # Errors
    /// [`StateError::Unsaved`]: a vCPU does not stand still.
    pub fn capture(&self, parked: &mut Parked<'_>) -> Result<MachineState, StateError> {
        let count = self.mailboxes.len() as u32;
        let host = berth_translator::host_cpuid();
        let mut cpus = Vec::new();
        let parts = self.mailboxes.iter().zip(&self.apics).zip(&self.msrs);
        for (index, ((mailbox, apic), msrs)) in (0..).zip(parts) {
            let standing = mailbox
                .standing()
                .ok_or_else(|| StateError::Unsaved(format!("vCPU {index} does not stand still")))?;
            // What came since it stood still.
            let mail = standing.mail.and(mailbox.peek());
            let topology = Topology { index, count };
            cpus.push(StoredCpu {
                state: standing.state,
                waiting: standing.waiting,
                init: mail.init,
                startup: mail.startup,
                system_time: msrs.system_time.load(Ordering::Relaxed),
                wall_clock: msrs.wall_clock.load(Ordering::Relaxed),
                apic: apic.save(),
                cpuid: CpuidTable::new(&host, topology, self.tsc_khz).entries().to_vec(),
            });
        }
        let (ioapic, pic) = self.chipset.save();
        Ok(MachineState {
            version: VERSION,
            saved: Moment::now(&*self.clock),
            memory_bytes: self.ram.bytes(),
            tsc_khz: self.tsc_khz,
            cpus,
            pvclock: self.pvclock.save(),
            ioapic,
            pic,
            pit: lock(&self.pit).save(),
            rtc: lock(&self.devices.rtc).save(),
            serial: lock(&self.devices.serial).save(),
            events: lock(&self.devices.events).save(),
            pci: parked.0.as_mut().map(|pci| pci.save()),
        })
    }

    /// Puts chips and mailboxes back, before the vCPUs run.
    pub(super) fn restore(&self, resumed: &Resumed) -> Result<(), StateError> {
        let (state, ahead) = (&resumed.state, resumed.shift.clock_ahead_ns);
        let unfit = |why: &str| StateError::Unfit(why.to_owned());
        lock(&self.devices.rtc).restore(state.rtc.clone()).map_err(unfit)?;
        self.chipset.restore(&state.ioapic, state.pic.clone());
        lock(&self.pit).restore(state.pit.clone(), ahead).map_err(unfit)?;
        let parts = self.mailboxes.iter().zip(&self.apics).zip(&self.msrs);
        for (((mailbox, apic), msrs), cpu) in parts.zip(&state.cpus) {
            apic.restore(cpu.apic.clone(), ahead);
            msrs.system_time.store(cpu.system_time, Ordering::Relaxed);
            msrs.wall_clock.store(cpu.wall_clock, Ordering::Relaxed);
            mailbox.restore(cpu.init, cpu.startup);
        }
        lock(&self.devices.serial).restore(state.serial.clone());
        lock(&self.devices.events).restore(&state.events);
        self.pvclock.stood_still();
        match (&self.devices.pci, &state.pci) {
            // Last: devices that go on may have interrupts for the guest.
            (Some(pci), Some(stored)) => lock(pci).restore(stored).map_err(StateError::Unfit),
            (None, None) => Ok(()),
            _ => Err(unfit("one of them has a PCI bus")),
        }
    }
}
