//! Stores a machine whose vCPUs stand still, and puts one back that was stored: both the same under both
//! processors. What is done only under KVM is in `by_kvm`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use berth_translator::{Frozen, Origin, Shared, SharedCode, Written};
use berth_x86::CpuState;
use berth_x86::cpuid::{CpuidEntry, CpuidTable};

use crate::chips::chipset::Chipset;
use crate::chips::ioapic;
use crate::chips::lapic::Lapic;
use crate::chips::pic::PicPair;
use crate::chips::pit::Pit;
use crate::clock::{Clock, HostClock};
use crate::fit::Fit;
use crate::machine::chips::StoredDevices;
use crate::machine::handed::hand;
use crate::machine::{Board, MachineConfig, Resume};
use crate::memory::{GuestRam, Memory, ram_file};
use crate::pci::root::PciRoot;
use crate::pvclock::{self, PvClock};
use crate::state::{
    MachineState, Moment, Shift, StateError, StoredCpu, VERSION, copy_memory, own_memory,
    stored_memory,
};
use crate::vcpu::kvm::vm::KvmChips;
use crate::vcpu::mailbox::{Mailbox, Standing};
use crate::vcpu::platform::ClockMsrs;
use crate::vcpu::probe::Accel;

/// What stores a machine.
pub struct Storer {
    clock: Arc<dyn Clock>,
    ram: GuestRam,
    mailboxes: Vec<Arc<Mailbox>>,
    processor: Processor,
    pit: Arc<Mutex<Pit>>,
    devices: StoredDevices,
    tsc_khz: u32,
    /// The rows of CPUID of each vCPU.
    cpuid: Vec<Vec<CpuidEntry>>,
}

/// What belongs to one of the processors.
pub(super) enum Processor {
    Translated(Emulated),
    Kvm(Hardware),
}

/// Around translated vCPUs.
pub(super) struct Emulated {
    pub(super) apics: Vec<Arc<Lapic>>,
    pub(super) chipset: Arc<Chipset>,
    pub(super) pvclock: Arc<PvClock>,
    pub(super) msrs: Vec<Arc<ClockMsrs>>,
    pub(super) shared: Arc<Shared>,
}

/// Around those of KVM.
pub(super) struct Hardware {
    pub(super) chips: Arc<KvmChips>,
    /// Time-stamp counters of guests count at another rate than the host's.
    pub(super) scaled: bool,
}

/// A machine as it was at an instant, which has gone on since.
pub struct FrozenMachine {
    /// What it held besides its memory.
    pub state: MachineState,
    memory: FrozenMemory,
    /// What each vCPU has translated, for clones.
    code: Vec<Option<SharedCode>>,
}

enum FrozenMemory {
    /// In layers, from which the machine reads what it has not written since.
    Layers(Frozen, Arc<Shared>),
    /// In a copy.
    Copy(Origin),
}

impl FrozenMachine {
    /// Where its memory is; it is there as long as these files are open, if nobody calls
    /// [`FrozenMachine::release`].
    #[must_use]
    pub fn memory(&self) -> &Origin {
        match &self.memory {
            FrozenMemory::Layers(frozen, _) => &frozen.origin,
            FrozenMemory::Copy(origin) => origin,
        }
    }

    /// Writes it into a directory that is there.
    ///
    /// # Errors
    /// [`StateError::File`]; then the directory is of no use.
    pub fn write(&self, directory: &Path) -> Result<(), StateError> {
        self.state.write(self.memory(), directory)
    }

    /// Hands it to the process of a clone, to be received as [`Handed`](crate::machine::Handed). `ahead`:
    /// what clones before it have written soon ([`Storer::written`]), which this one copies at once.
    ///
    /// # Errors
    /// It is gone, or the system's.
    pub fn hand(&self, to: &UnixStream, ahead: &Written) -> io::Result<()> {
        hand(to, &self.state, self.memory(), &self.code, ahead)
    }

    /// Nobody needs it any more: the machine may write to its memory where it is.
    pub fn release(self) {
        if let FrozenMemory::Layers(frozen, shared) = self.memory
            && let Err(error) = shared.unfreeze(frozen)
        {
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
    pub(super) shift: Shift,
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

/// Reads a machine that is to go on with this configuration, and says by which processor.
///
/// # Errors
/// [`StateError`].
pub(super) fn read(
    config: &MachineConfig,
    resume: &Resume,
) -> Result<(Accel, Box<Resumed>), StateError> {
    let (state, memory, code) = match resume {
        Resume::Stored(directory) => {
            (MachineState::read(directory)?, stored_memory(directory)?, Vec::new())
        }
        Resume::Handed(handed) => {
            (handed.state.clone(), handed.memory.clone(), handed.code.clone())
        }
    };
    let (cpus, memory_bytes) = (config.cpus, config.memory_bytes);
    let accel = Fit { accel: config.accel, cpus, memory_bytes }.check_state(&state)?;
    let shift = state.saved.shift_to(&Moment::now(&HostClock::new()));
    Ok((accel, Box::new(Resumed { state, memory, code, shift })))
}

impl Resumed {
    pub(super) fn cpu(&self, index: u32) -> Option<&StoredCpu> {
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
    pub(super) fn new(
        board: &Board,
        processor: Processor,
        (pit, devices): (Arc<Mutex<Pit>>, StoredDevices),
        tsc_khz: u32,
        tables: &[CpuidTable],
    ) -> Self {
        Self {
            clock: Arc::clone(&board.clock),
            ram: board.ram.clone(),
            mailboxes: board.mailboxes.clone(),
            processor,
            pit,
            devices,
            tsc_khz,
            cpuid: tables.iter().map(|table| table.entries().to_vec()).collect(),
        }
    }

    /// Maps pages of stored memory before the guest reads them: ranges of page numbers by guest physical
    /// address. So many are; none where memory was copied at the start.
    pub fn prefetch(&self, ranges: impl Iterator<Item = Range<u64>>) -> u64 {
        match &self.processor {
            Processor::Translated(emulated) => emulated.shared.prefetch(ranges),
            Processor::Kvm(_) => 0,
        }
    }

    /// Which pages of stored memory have been read, and some beside them; `None` where that is not
    /// known. `pagemap` is `/proc/self/pagemap`.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn touched(&self, pagemap: &File) -> io::Result<Option<Vec<Range<u64>>>> {
        match &self.processor {
            Processor::Translated(emulated) => emulated.shared.touched(pagemap).map(Some),
            Processor::Kvm(_) => Ok(None),
        }
    }

    /// What a clone has written so far of what it shares; `None` where that is not known, as it is once it was
    /// asked for.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn written(&self) -> io::Result<Option<Written>> {
        match &self.processor {
            Processor::Translated(emulated) => emulated.shared.written().map(Some),
            Processor::Kvm(_) => Ok(None),
        }
    }

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
        let memory = match &self.processor {
            Processor::Translated(around) => around.shared.origin(),
            Processor::Kvm(_) => own_memory(&self.ram)?,
        };
        self.capture(&mut parked)?.write(&memory, directory)
    }

    /// Keeps a machine, whose vCPUs stand still, as it is; it can go on before that is written.
    /// `code`: also what its vCPUs have translated, for [`FrozenMachine::hand`].
    ///
    /// Under KVM its memory is copied.
    ///
    /// # Errors
    /// [`StateError`]; the machine can go on.
    pub fn freeze(&self, parked: &mut Parked<'_>, code: bool) -> Result<FrozenMachine, StateError> {
        let state = self.capture(parked)?;
        let share = |mailbox: &Arc<Mailbox>| mailbox.ask(|vcpu| vcpu.share_code()).flatten();
        let code = if code { self.mailboxes.iter().map(share).collect() } else { Vec::new() };
        let memory = match &self.processor {
            Processor::Translated(around) => {
                let new = ram_file(state.memory_bytes).map_err(|(_, error)| error);
                let frozen = new.and_then(|new| around.shared.freeze(new.into()));
                let frozen = frozen.map_err(|error| {
                    StateError::Unsaved(format!("its memory cannot be kept: {error}"))
                })?;
                FrozenMemory::Layers(frozen, Arc::clone(&around.shared))
            }
            Processor::Kvm(_) => FrozenMemory::Copy(copy_memory(&own_memory(&self.ram)?)?),
        };
        Ok(FrozenMachine { state, memory, code })
    }

    /// What a machine that does nothing holds besides its memory.
    ///
    /// # Errors
    /// [`StateError::Unsaved`]: a vCPU does not stand still.
    pub fn capture(&self, parked: &mut Parked<'_>) -> Result<MachineState, StateError> {
        // None of them interrupts meanwhile.
        let (rtc, serial) = (lock(&self.devices.rtc), lock(&self.devices.serial));
        let (events, pit) = (lock(&self.devices.events), lock(&self.pit));
        let pci = parked.0.as_mut().map(|pci| pci.save());
        let standing = self.standing()?;
        let saved = Moment::now(&*self.clock);
        let (core, saved) = match &self.processor {
            Processor::Translated(around) => (around.save(standing, &self.mailboxes), saved),
            Processor::Kvm(around) => (
                around.save(standing, &saved, &self.ram, self.tsc_khz)?,
                around.moment(saved, self.tsc_khz),
            ),
        };
        let mut cpus = core.cpus;
        for (cpu, rows) in cpus.iter_mut().zip(&self.cpuid) {
            cpu.cpuid.clone_from(rows);
        }
        Ok(MachineState {
            version: VERSION,
            saved,
            memory_bytes: self.ram.bytes(),
            tsc_khz: self.tsc_khz,
            cpus,
            pvclock: core.pvclock,
            ioapic: core.ioapic,
            pic: core.pic,
            pit: pit.save(),
            rtc: rtc.save(),
            serial: serial.save(),
            events: events.save(),
            pci,
        })
    }

    /// How the vCPUs are.
    fn standing(&self) -> Result<Vec<Standing>, StateError> {
        let standing = (0..).zip(&self.mailboxes).map(|(index, mailbox): (u32, _)| {
            if let Processor::Kvm(_) = self.processor {
                // Interrupts have reached it since it stood still.
                mailbox.look_again();
            }
            let standing = mailbox.standing();
            standing
                .ok_or_else(|| StateError::Unsaved(format!("vCPU {index} does not stand still")))
        });
        standing.collect()
    }

    /// Puts chips and mailboxes back, before the vCPUs run.
    pub(super) fn restore(&self, resumed: &Resumed) -> Result<(), StateError> {
        let (state, ahead) = (&resumed.state, resumed.shift.clock_ahead_ns);
        let unfit = |why: &str| StateError::Unfit(why.to_owned());
        lock(&self.devices.rtc).restore(state.rtc.clone()).map_err(unfit)?;
        match &self.processor {
            Processor::Translated(around) => around.restore(resumed, &self.mailboxes),
            Processor::Kvm(around) => around.restore(resumed, &self.mailboxes)?,
        }
        lock(&self.pit).restore(state.pit.clone(), ahead).map_err(unfit)?;
        lock(&self.devices.serial).restore(state.serial.clone());
        lock(&self.devices.events).restore(&state.events);
        match (&self.devices.pci, &state.pci) {
            // Last: devices that go on may have interrupts for the guest.
            (Some(pci), Some(stored)) => lock(pci).restore(stored).map_err(StateError::Unfit),
            (None, None) => Ok(()),
            _ => Err(unfit("one of them has a PCI bus")),
        }
    }
}

/// What is stored of vCPUs and interrupt controllers.
pub(super) struct Core {
    pub(super) cpus: Vec<StoredCpu>,
    pub(super) pvclock: pvclock::Stored,
    pub(super) ioapic: ioapic::Registers,
    pub(super) pic: PicPair,
}

impl Emulated {
    fn save(&self, standing: Vec<Standing>, mailboxes: &[Arc<Mailbox>]) -> Core {
        let parts = mailboxes.iter().zip(&self.apics).zip(&self.msrs);
        let cpus = standing.into_iter().zip(parts).map(|(standing, ((mailbox, apic), msrs))| {
            // What came since it stood still.
            let mail = standing.mail.and(mailbox.peek());
            StoredCpu {
                state: standing.state,
                waiting: standing.waiting,
                init: mail.init,
                startup: mail.startup,
                system_time: msrs.system_time.load(Ordering::Relaxed),
                wall_clock: msrs.wall_clock.load(Ordering::Relaxed),
                apic: apic.save(),
                cpuid: Vec::new(),
            }
        });
        let cpus = cpus.collect();
        let (ioapic, pic) = self.chipset.save();
        Core { cpus, pvclock: self.pvclock.save(), ioapic, pic }
    }

    fn restore(&self, resumed: &Resumed, mailboxes: &[Arc<Mailbox>]) {
        let (state, ahead) = (&resumed.state, resumed.shift.clock_ahead_ns);
        self.chipset.restore(&state.ioapic, state.pic.clone());
        let parts = mailboxes.iter().zip(&self.apics).zip(&self.msrs);
        for (((mailbox, apic), msrs), cpu) in parts.zip(&state.cpus) {
            apic.restore(cpu.apic.clone(), ahead);
            msrs.system_time.store(cpu.system_time, Ordering::Relaxed);
            msrs.wall_clock.store(cpu.wall_clock, Ordering::Relaxed);
            mailbox.restore(cpu.init, cpu.startup);
        }
        // KVM may have shown the same time by other numbers.
        self.pvclock.show_again(|index| resumed.cpu_state(index).tsc_offset);
        self.pvclock.stood_still();
    }
}
