//! The machine: puts memory, chips, devices, a guest and vCPUs together, runs them, and says how it
//! ended.
//!
//! ```text
//! start ──► vCPU threads run ──► Ending has an outcome ──► all vCPUs stop ──► wait returns it
//!                │                       ▲
//!                └── device, vCPU error, escape, stop()
//! ```
//!
//! A reset ends the machine too: whoever started it decides whether to start it again.

mod by_kvm;
mod chips;
mod handed;
mod stored;
mod threads;

use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::thread::{JoinHandle, ScopedJoinHandle};
use std::time::Instant;

use berth_translator::{Origin, SharedCode, TakenCode};
pub use berth_translator::{Written, warm_up};
use berth_x86::CpuState;
pub use berth_x86::cpuid::baseline::Baseline;
use berth_x86::cpuid::baseline::PHYSICAL_BITS;
use berth_x86::cpuid::{CpuidTable, Topology};

use crate::acpi;
use crate::boot::{self, BootFiles, Module};
use crate::bus::{Bus, SharedDevice};
use crate::chips::chipset::Chipset;
use crate::chips::events::{Events, PowerButton};
use crate::chips::lapic::message::ApicBus;
use crate::chips::lapic::{CpuSignals, Lapic};
use crate::clock::{Clock, HostClock};
use crate::console::{Console, Consoles, SerialConfig};
use crate::error::MachineError;
use crate::generation::{self, Generation};
use crate::irq::InterruptSink;
use crate::limits::CPUS_MAX;
pub use crate::machine::handed::Handed;
use crate::machine::stored::{Emulated, Hardware, Processor, Resumed};
pub use crate::machine::stored::{FrozenMachine, Parked, Storer};
use crate::machine::threads::Runner;
use crate::memory::{GuestRam, Memory};
use crate::outcome::{Ending, Outcome};
use crate::pci::root::PciRoot;
use crate::pvclock::PvClock;
use crate::timer::TimerThread;
use crate::vcpu::kvm::vm::KvmVm;
use crate::vcpu::mailbox::Mailbox;
use crate::vcpu::platform::{ClockMsrs, Surroundings, VcpuPlatform};
use crate::vcpu::probe::{Accel, AccelChoice};
use crate::vcpu::translated::{self, Translated};
use crate::vcpu::{Vcpu, reset};

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// Number of vCPUs.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory_bytes: u64,
    /// Which processor.
    pub accel: AccelChoice,
    /// The kernel.
    pub kernel: PathBuf,
    /// The initrd or the modules; see [`Module::parse_list`].
    pub modules: Vec<Module>,
    /// The kernel command line.
    pub cmdline: String,
    /// Where the serial port leads.
    pub serial: SerialConfig,
    /// Whether there is a debug-exit port.
    pub debug_exit: bool,
    /// What CPUID tells of the processor; without, what the host has and guests can use.
    pub cpu: Option<Baseline>,
    /// Its vCPUs stand still at first; see [`RunningMachine::pauser`].
    pub paused: bool,
    /// Limits of the translator.
    pub translator: berth_translator::Config,
    /// A machine that goes on, instead of booting.
    pub resume: Option<Resume>,
    /// With [`Self::resume`]: it is a copy, or goes back to an earlier time, and is told so by a new
    /// generation id before it runs.
    pub renew_generation: bool,
}

/// Where a machine is that goes on.
#[derive(Clone)]
pub enum Resume {
    /// In this directory, in which it was stored.
    Stored(PathBuf),
    /// Handed over by another process.
    Handed(Arc<Handed>),
}

impl std::fmt::Debug for Resume {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stored(path) => f.debug_tuple("Stored").field(path).finish(),
            Self::Handed(_) => f.debug_tuple("Handed").finish(),
        }
    }
}

impl MachineConfig {
    /// One vCPU, 512 MiB, the serial port on standard input and output.
    #[must_use]
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            cpus: 1,
            memory_bytes: 512 << 20,
            accel: AccelChoice::Auto,
            kernel: kernel.into(),
            modules: Vec::new(),
            cmdline: String::new(),
            serial: SerialConfig::Stdio,
            debug_exit: false,
            cpu: None,
            paused: false,
            translator: berth_translator::Config::default(),
            resume: None,
            renew_generation: false,
        }
    }
}

/// What devices on the PCI bus are given.
#[derive(Clone)]
pub struct DeviceContext {
    /// Guest memory.
    pub memory: Memory,
    /// Where BARs in memory go.
    pub mmio: Arc<Bus>,
    /// Where BARs in port space go.
    pub ports: Arc<Bus>,
    /// Where interrupts go.
    pub interrupts: Arc<dyn InterruptSink>,
    /// Addresses for 32-bit BARs.
    pub window_32: std::ops::Range<u64>,
    /// Addresses for 64-bit BARs.
    pub window_64: std::ops::Range<u64>,
    /// Ends the machine.
    pub ending: Arc<Ending>,
    /// Consoles of devices, which end with the machine.
    pub consoles: Consoles,
    /// Where the guest is told of what happens to the machine.
    pub events: Events,
    /// Virtio types of the devices of a machine that goes on.
    pub goes_on_with: Option<Vec<u16>>,
}

/// Makes the devices of the PCI bus; gives what answers at ports 0xcf8 to 0xcff.
pub type AttachPci = Box<
    dyn FnOnce(
        &DeviceContext,
    ) -> Result<Arc<Mutex<PciRoot>>, Box<dyn std::error::Error + Send + Sync>>,
>;

/// Starts machines.
pub struct Machine;

/// A machine that runs. Dropping it stops it.
pub struct RunningMachine {
    ending: Arc<Ending>,
    accel: Accel,
    threads: Vec<JoinHandle<()>>,
    console: Console,
    pauser: Pauser,
    storer: Arc<Storer>,
    started: Instant,
    /// Devices and timers live as long as the machine.
    _timers: TimerThread,
    context: DeviceContext,
}

/// Makes the vCPUs of a machine stand still and go on. Devices and timers do not stand still; what
/// they have for the guest waits.
#[derive(Clone)]
pub struct Pauser {
    mailboxes: Arc<[Arc<Mailbox>]>,
    /// Unless that is inside the vCPUs.
    clock: Option<Arc<PvClock>>,
}

impl Pauser {
    /// Returns when all of them stand still, or have ended.
    pub fn pause(&self) {
        self.mailboxes.iter().for_each(|mailbox| mailbox.pause());
        self.mailboxes.iter().for_each(|mailbox| mailbox.wait_until_still());
    }

    /// They go on.
    pub fn unpause(&self) {
        if let Some(clock) = &self.clock {
            clock.stood_still();
        }
        self.mailboxes.iter().for_each(|mailbox| mailbox.unpause());
    }
}

/// A vCPU and its local APIC, unless that is inside; whether it waits for a start-up message.
type Seat = (Box<dyn Vcpu>, Option<Arc<Lapic>>, bool);

/// What is there before the first vCPU.
struct Board {
    ram: GuestRam,
    clock: Arc<dyn Clock>,
    timers: TimerThread,
    ending: Arc<Ending>,
    mmio: Arc<Bus>,
    ports: Arc<Bus>,
    mailboxes: Vec<Arc<Mailbox>>,
}

impl Machine {
    /// Starts a machine without a PCI bus.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn start(config: &MachineConfig) -> Result<RunningMachine, MachineError> {
        Self::start_with(config, None)
    }

    /// Starts a machine whose PCI devices `attach` makes.
    ///
    /// # Errors
    /// [`MachineError`].
    pub fn start_with(
        config: &MachineConfig,
        attach: Option<AttachPci>,
    ) -> Result<RunningMachine, MachineError> {
        if config.cpus == 0 || config.cpus > CPUS_MAX {
            return Err(MachineError::Cpus(config.cpus));
        }
        let ram = GuestRam::new(config.memory_bytes)?;
        if let Some(resume) = &config.resume {
            let (accel, state) = stored::read(config, resume)?;
            let begin = Begin::Stored(state);
            tracing::info!(cpus = config.cpus, %accel, "a stored machine goes on");
            return start_by(accel, config, Board::new(ram, config.cpus)?, &begin, attach);
        }
        let accel = config.accel.resolve();
        check_addresses(config, &ram)?;
        let files = BootFiles {
            kernel: &config.kernel,
            modules: &config.modules,
            cmdline: &config.cmdline,
        };
        let loaded = boot::load(&ram, &files)?;
        boot::put_firmware(&ram)?;
        generation::install(ram.memory())?;
        acpi::install(
            &ram,
            &acpi::Machine {
                apic_ids: (0..config.cpus).collect(),
                pci_window_64: ram.pci_window_64(),
                ecam: None,
                serial: true,
            },
        )?;
        tracing::info!(kind = ?loaded.kind, %accel, cpus = config.cpus, "starting a machine");
        let board = Board::new(ram, config.cpus)?;
        let begin = Begin::Entry(Box::new(loaded.entry));
        start_by(accel, config, board, &begin, attach)
    }
}

fn start_by(
    accel: Accel,
    config: &MachineConfig,
    board: Board,
    begin: &Begin,
    attach: Option<AttachPci>,
) -> Result<RunningMachine, MachineError> {
    match accel {
        Accel::Translate => start_translated(config, board, begin, attach),
        Accel::Kvm => start_kvm(config, board, begin, attach),
    }
}

/// Whether all addresses are within those of the machine's processor.
fn check_addresses(config: &MachineConfig, ram: &GuestRam) -> Result<(), MachineError> {
    match config.cpu {
        Some(cpu) if ram.pci_window_64().end > 1 << PHYSICAL_BITS => {
            let lack = "addresses for so much memory".into();
            Err(MachineError::Processor { cpu: cpu.name(), lack })
        }
        _ => Ok(()),
    }
}

impl Board {
    fn new(ram: GuestRam, cpus: u32) -> Result<Self, MachineError> {
        Ok(Self {
            ram,
            clock: Arc::new(HostClock::new()),
            timers: TimerThread::start()?,
            ending: Arc::new(Ending::default()),
            mmio: Arc::new(Bus::new()),
            ports: Arc::new(Bus::new()),
            mailboxes: (0..cpus).map(|_| Arc::new(Mailbox::default())).collect(),
        })
    }
}

/// How the vCPUs begin.
enum Begin {
    /// The first at the guest's entry, the others after power-up, waiting for a start-up message.
    Entry(Box<CpuState>),
    /// As they were stored.
    Stored(Box<Resumed>),
}

impl Begin {
    fn state(&self, index: u32) -> CpuState {
        match self {
            Self::Entry(entry) if index == 0 => CpuState::clone(entry),
            Self::Entry(_) => reset::power_up(),
            Self::Stored(resumed) => resumed.cpu_state(index),
        }
    }

    fn is_waiting(&self, index: u32) -> bool {
        match self {
            Self::Entry(_) => index != 0,
            Self::Stored(resumed) => resumed.is_waiting(index),
        }
    }

    fn tsc_khz(&self, clock: &dyn Clock) -> u32 {
        match self {
            Self::Entry(_) => u32::try_from(clock.tsc_hz() / 1000).unwrap_or(u32::MAX),
            Self::Stored(resumed) => resumed.state.tsc_khz,
        }
    }

    /// What vCPU `index` had translated.
    fn code(&self, index: u32) -> Option<&SharedCode> {
        match self {
            Self::Entry(_) => None,
            Self::Stored(resumed) => resumed.code.get(index as usize)?.as_ref(),
        }
    }

    /// The devices of one that goes on.
    fn devices(&self) -> Option<Vec<u16>> {
        match self {
            Self::Entry(_) => None,
            Self::Stored(resumed) => Some(resumed.state.device_types()),
        }
    }

    /// Where memory is, if it is not new.
    fn origin(&self) -> Option<&Origin> {
        match self {
            Self::Entry(_) => None,
            Self::Stored(resumed) => Some(&resumed.memory),
        }
    }
}

/// What CPUID tells the vCPUs, the same under both processors, of which `offered` says what they offer to a
/// table of this host.
fn cpuid_tables(
    config: &MachineConfig,
    begin: &Begin,
    khz: u32,
    offered: impl Fn(CpuidTable, Topology) -> CpuidTable,
) -> Result<Vec<CpuidTable>, MachineError> {
    let host = berth_translator::host_cpuid();
    let count = config.cpus;
    let table = |index| {
        let topology = Topology { index, count };
        let here = || offered(CpuidTable::new(&host, topology, khz), topology);
        match (begin, config.cpu) {
            // It was found to fit before.
            (Begin::Stored(resumed), _) => Ok(resumed.state.cpuid(index)),
            (Begin::Entry(_), None) => Ok(here()),
            (Begin::Entry(_), Some(cpu)) => {
                let table = cpu.table(host.vendor(), topology, khz);
                match here().lack(table.entries()) {
                    None => Ok(table),
                    Some(lack) => Err(MachineError::Processor { cpu: cpu.name(), lack }),
                }
            }
        }
    };
    (0..count).map(table).collect()
}

fn start_translated(
    config: &MachineConfig,
    board: Board,
    begin: &Begin,
    attach: Option<AttachPci>,
) -> Result<RunningMachine, MachineError> {
    // Meanwhile. Without a thread the first translation does it.
    let thread = std::thread::Builder::new().name("warm-up".into());
    let _ = thread.spawn(warm_up);
    let apics = board.mailboxes.iter().zip(0..).map(|(mailbox, id)| {
        let signals = Arc::clone(mailbox) as Arc<dyn CpuSignals>;
        Lapic::new(id, id == 0, Arc::clone(&board.clock), signals)
    });
    let apics: Vec<_> = apics.collect();
    for apic in &apics {
        let expired = Arc::downgrade(apic);
        let alarm = board.timers.add(move || {
            if let Some(apic) = expired.upgrade() {
                apic.timer_expired();
            }
        })?;
        apic.set_alarm(alarm);
    }
    let Some(boot_cpu) = board.mailboxes.first().cloned() else {
        return Err(MachineError::Cpus(0));
    };
    let chipset = Chipset::new(Arc::new(ApicBus::new(apics.clone())), boot_cpu);
    chips::add_interrupt_chips(&board, &chipset)?;
    let interrupts = Arc::clone(&chipset) as Arc<dyn InterruptSink>;
    let pit = chips::add_pit(&board, &interrupts)?;
    let share = || translated::share(&board.ram, begin.origin(), config.translator.clone());
    let code = |index| TakenCode::new(&config.translator, begin.code(index)?);
    let code = || (0..config.cpus).map(code).collect::<Vec<_>>();
    let devices = || chips::add_devices(config, &board, &interrupts, attach, begin.devices());
    // Each takes milliseconds in a clone, and none needs the others.
    let (shared, code, devices) = match begin {
        Begin::Entry(_) => (share(), code(), devices()),
        Begin::Stored(_) => at_once(share, code, devices)?,
    };
    let shared = shared.map_err(MachineError::Translator)?;
    let (context, console, devices) = devices?;
    let (clock, memory) = (Arc::clone(&board.clock), board.ram.memory().clone());
    let pvclock = Arc::new(match begin {
        Begin::Entry(_) => PvClock::new(clock, memory),
        Begin::Stored(resumed) => resumed.pvclock(clock, memory),
    });
    let around = Surroundings {
        chipset,
        mmio: Arc::clone(&board.mmio),
        ports: Arc::clone(&board.ports),
        pvclock: Arc::clone(&pvclock),
    };
    let tsc_khz = begin.tsc_khz(&*board.clock);
    let tables = cpuid_tables(config, begin, tsc_khz, |table, _| table)?;
    let msrs: Vec<Arc<ClockMsrs>> = apics.iter().map(|_| Arc::default()).collect();
    let processor = Processor::Translated(Emulated {
        apics: apics.clone(),
        chipset: Arc::clone(&around.chipset),
        pvclock: Arc::clone(&pvclock),
        msrs: msrs.clone(),
        shared: Arc::clone(&shared),
    });
    let storer = Storer::new(&board, processor, (pit, devices), tsc_khz, &tables);
    let mut vcpus: Vec<Seat> = Vec::new();
    let tables = (0..).zip(tables).zip(code);
    for (((index, table), code), (apic, msrs)) in tables.zip(apics.iter().zip(msrs)) {
        let platform = VcpuPlatform::new(around.clone(), Arc::clone(apic));
        let platform = Box::new(platform.with_msrs(msrs));
        let state = begin.state(index);
        let vcpu = Translated::new(index, Arc::clone(&shared), state, table, platform, code)?;
        vcpus.push((Box::new(vcpu), Some(Arc::clone(apic)), begin.is_waiting(index)));
    }
    let running = (context, console, Some(pvclock));
    finish(config, board, begin, Accel::Translate, vcpus, storer, running)
}

/// Does three things at once, the last one on this thread.
fn at_once<A: Send, B: Send, C>(
    first: impl FnOnce() -> A + Send,
    second: impl FnOnce() -> B + Send,
    third: impl FnOnce() -> C,
) -> Result<(A, B, C), MachineError> {
    fn joined<T>(thread: ScopedJoinHandle<'_, T>) -> T {
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
    std::thread::scope(|scope| {
        let thread = || std::thread::Builder::new().name("begin".into());
        let first = thread().spawn_scoped(scope, first).map_err(MachineError::Begin)?;
        let second = thread().spawn_scoped(scope, second).map_err(MachineError::Begin)?;
        let third = third();
        Ok((joined(first), joined(second), third))
    })
}

fn start_kvm(
    config: &MachineConfig,
    board: Board,
    begin: &Begin,
    attach: Option<AttachPci>,
) -> Result<RunningMachine, MachineError> {
    let mut vm = KvmVm::new(&board.ram)?;
    let inside = vm.add_irqchip()?;
    let interrupts = Arc::clone(&inside) as Arc<dyn InterruptSink>;
    let pit = chips::add_pit(&board, &interrupts)?;
    let (context, console, devices) =
        chips::add_devices(config, &board, &interrupts, attach, begin.devices())?;
    let tsc_khz = begin.tsc_khz(&*board.clock);
    let offered = |table: CpuidTable, topology| vm.offered(&table, topology);
    let tables = cpuid_tables(config, begin, tsc_khz, offered)?;
    if let Begin::Stored(resumed) = begin {
        resumed.begin_kvm(&board, &inside)?;
    }
    let mut vcpus: Vec<Seat> = Vec::new();
    for (index, table) in (0..).zip(&tables) {
        let buses = (Arc::clone(&board.mmio), Arc::clone(&board.ports));
        let wanted = matches!(begin, Begin::Stored(_)).then_some(tsc_khz);
        let mut vcpu = vm.add_vcpu(index, table, buses, Arc::clone(&board.clock), wanted)?;
        match begin {
            Begin::Entry(entry) if index == 0 => vcpu.set_state(entry)?,
            // Others wait for INIT and start-up inside KVM.
            Begin::Entry(_) => {}
            Begin::Stored(resumed) => resumed.begin_kvm_cpu(index, &mut vcpu, &*board.clock)?,
        }
        // Waiting for a start-up message happens inside.
        vcpus.push((Box::new(vcpu), None, false));
    }
    let scaled = vm.scales(tsc_khz, &*board.clock) && matches!(begin, Begin::Stored(_));
    let processor = Processor::Kvm(Hardware { chips: inside, scaled });
    let storer = Storer::new(&board, processor, (pit, devices), tsc_khz, &tables);
    finish(config, board, begin, Accel::Kvm, vcpus, storer, (context, console, None))
}

/// Puts back what was stored of chips and devices, and starts the threads.
fn finish(
    config: &MachineConfig,
    board: Board,
    begin: &Begin,
    accel: Accel,
    vcpus: Vec<Seat>,
    storer: Storer,
    (context, console, clock): (DeviceContext, Console, Option<Arc<PvClock>>),
) -> Result<RunningMachine, MachineError> {
    if let Begin::Stored(resumed) = begin {
        // Devices write to memory from here on: whatever was translated of it is marked by now.
        storer.restore(resumed)?;
        // A copy, or one that goes back to an earlier time, is told so.
        if config.renew_generation {
            Generation::new(context.memory.clone(), Arc::clone(&context.events)).renew()?;
        }
    }
    for ((vcpu, ..), mailbox) in vcpus.iter().zip(&board.mailboxes) {
        if config.paused {
            mailbox.pause();
        }
        mailbox.connect(vcpu.handle());
        // What is pending in a machine that goes on.
        mailbox.interrupt();
    }
    let mailboxes = board.mailboxes.clone();
    board.ending.set_on_end(move || {
        for mailbox in &mailboxes {
            mailbox.stop();
        }
    });
    let mut machine = RunningMachine {
        ending: Arc::clone(&board.ending),
        accel,
        threads: Vec::new(),
        console,
        pauser: Pauser { mailboxes: board.mailboxes.clone().into(), clock },
        storer: Arc::new(storer),
        started: Instant::now(),
        _timers: board.timers,
        context,
    };
    let vcpus = vcpus.into_iter().zip(board.mailboxes).zip(0..);
    for (((vcpu, apic, waiting), mailbox), index) in vcpus {
        let ending = Arc::clone(&board.ending);
        let runner = Runner { index, vcpu, apic, mailbox, ending, waiting };
        // On an error, dropping the machine stops those that run.
        machine.threads.push(runner.spawn()?);
    }
    machine.started = Instant::now();
    Ok(machine)
}

impl RunningMachine {
    /// The processor it runs on.
    #[must_use]
    pub fn accel(&self) -> Accel {
        self.accel
    }

    /// When its vCPUs began to run.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// What makes its vCPUs stand still, for servers.
    #[must_use]
    pub fn pauser(&self) -> Pauser {
        self.pauser.clone()
    }

    /// Its power button, for servers.
    #[must_use]
    pub fn power_button(&self) -> PowerButton {
        PowerButton::new(Arc::clone(&self.context.events))
    }

    /// Its generation id, for whoever has restored or copied it.
    #[must_use]
    pub fn generation(&self) -> Generation {
        Generation::new(self.context.memory.clone(), Arc::clone(&self.context.events))
    }

    /// What stores it.
    #[must_use]
    pub fn storer(&self) -> Arc<Storer> {
        Arc::clone(&self.storer)
    }

    /// What ends the machine from elsewhere, for signal handlers and servers.
    #[must_use]
    pub fn ending(&self) -> Arc<Ending> {
        Arc::clone(&self.ending)
    }

    /// Waits for the end; output is written and the terminal restored when it returns.
    #[must_use]
    pub fn wait(mut self) -> Outcome {
        let outcome = self.ending.wait();
        self.shut_down();
        outcome
    }

    /// Stops it from outside.
    pub fn stop(&self) {
        self.ending.end(Outcome::Stopped);
    }

    fn shut_down(&mut self) {
        // A vCPU may wait for room in the console's queue, so the console ends first.
        self.console.finish();
        self.context.consoles.finish();
        for thread in self.threads.drain(..) {
            // A panic in it has been made the outcome.
            let _ = thread.join();
        }
    }
}

impl Drop for RunningMachine {
    fn drop(&mut self) {
        self.stop();
        self.shut_down();
    }
}

/// Puts a device on a bus.
fn insert<T: crate::bus::BusDevice + 'static>(
    bus: &Bus,
    ranges: &[(u64, u64)],
    device: &Arc<Mutex<T>>,
) -> Result<(), MachineError> {
    for &(base, len) in ranges {
        bus.insert(base, len, Arc::clone(device) as SharedDevice)?;
    }
    Ok(())
}
