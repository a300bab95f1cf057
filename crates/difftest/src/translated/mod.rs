//! Runs cases on the translator, in a guest that is set up once and used for all of them.

mod machine;

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use berth_translator::{
    Config, Exit, Frozen, Kicker, Optimizations, RamSlot, Reservation, SetupError, Shared,
    TranslatedVcpu, host_cpuid,
};
use berth_x86::cpuid::{CpuidTable, Topology};
use berth_x86::state::{reg, sreg, vector};
use berth_x86::{CpuState, Platform};

use crate::case::{Backend, Case, Fault, Final, Outcome};
use crate::layout::{IMAGE, PAGE, World, base_image};
use crate::translated::machine::{Frame, RAM, image_at};

/// A case that runs this long is ended.
const CASE_TIME: Duration = Duration::from_secs(2);

/// Why the guest could not be made.
#[derive(Debug, thiserror::Error)]
pub enum TranslatedError {
    /// Guest RAM could not be made.
    #[error("{what} of guest RAM failed")]
    Ram {
        /// The call.
        what: &'static str,
        /// The reason.
        source: std::io::Error,
    },
    /// The translator refused.
    #[error("the translator could not be set up")]
    Translator(#[from] SetupError),
}

/// A machine without devices or interrupts.
struct Bare;

impl Platform for Bare {
    fn mmio_read(&mut self, _gpa: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) {}
    fn port_read(&mut self, _port: u16, _size: u8) -> u32 {
        u32::MAX
    }
    fn port_write(&mut self, _port: u16, _size: u8, _value: u32) {}
    fn read_msr(&mut self, _cpu: &CpuState, _msr: u32) -> Option<u64> {
        None
    }
    fn write_msr(&mut self, _cpu: &CpuState, _msr: u32, _value: u64) -> Option<()> {
        None
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _class: u8) {}
    fn hypercall(&mut self, _number: u64, _args: [u64; 4]) -> u64 {
        u64::MAX
    }
}

/// Guest RAM as this process sees it.
struct Ram {
    mapping: Arc<Reservation>,
    fd: OwnedFd,
}

/// A file of zeroes for RAM.
fn ram_file() -> Result<OwnedFd, TranslatedError> {
    let error = |what| TranslatedError::Ram { what, source: std::io::Error::last_os_error() };
    // SAFETY: a name and flags; the result is a new descriptor or -1.
    let fd = unsafe { libc::memfd_create(c"difftest-ram".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(error("memfd_create"));
    }
    // SAFETY: the descriptor is new and owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: the descriptor is valid.
    if unsafe { libc::ftruncate(fd.as_raw_fd(), RAM as libc::off_t) } != 0 {
        return Err(error("ftruncate"));
    }
    Ok(fd)
}

impl Ram {
    fn new() -> Result<Self, TranslatedError> {
        let error = |source| TranslatedError::Ram { what: "mmap", source };
        let fd = ram_file()?;
        let mapping = Reservation::new(RAM).map_err(error)?;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        mapping.map_file(0, RAM, prot, fd.as_raw_fd(), 0).map_err(error)?;
        Ok(Self { mapping: Arc::new(mapping), fd })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: RAM bytes are mapped for the life of `self`; the guest, which shares them, runs
        // only inside `TranslatedVcpu::run`, when no such borrow is alive.
        unsafe { std::slice::from_raw_parts(self.mapping.addr() as *const u8, RAM) }
    }

    /// The same, to be written where [`Shared::before_access`] was told of that.
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above.
        unsafe { std::slice::from_raw_parts_mut(self.mapping.addr() as *mut u8, RAM) }
    }
}

/// How the translator runs cases.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Way {
    /// Accesses look whether they cross into another page.
    pub looking: bool,
    /// What is done for speed.
    pub optimizations: Optimizations,
    /// It is stopped again and again, as by interrupts.
    pub stopped: bool,
    /// The processor executes what it can by itself.
    pub direct: bool,
    /// Memory is frozen before each case.
    pub frozen: bool,
}

/// The translator.
pub struct TranslatedBackend {
    vcpu: TranslatedVcpu,
    shared: Arc<Shared>,
    ram: Ram,
    base: Vec<u8>,
    /// Twice the number of cases begun, plus one while one runs.
    progress: Arc<AtomicU64>,
    stopped: bool,
    frozen: bool,
    kept: Option<Frozen>,
}

impl TranslatedBackend {
    /// Sets up the guest and a thread that ends cases which run too long.
    ///
    /// # Errors
    /// [`TranslatedError`] when RAM or the translator cannot be made.
    pub fn new(way: Way) -> Result<Self, TranslatedError> {
        let mut config = Config { optimizations: way.optimizations, ..Config::default() };
        config.always_direct = way.direct;
        if way.frozen {
            config.single_copies = 5;
        }
        if way.looking {
            config.guarded_pages = 0;
        }
        let mut ram = Ram::new()?;
        let base = base_image();
        machine::build(ram.bytes_mut());
        for world in World::ALL {
            let at = image_at(world) as usize;
            ram.bytes_mut()[at..at + base.len()].copy_from_slice(&base);
        }
        let slot = RamSlot { gpa: 0, size: RAM as u64, fd: ram.fd.as_fd(), offset: 0 };
        let mapping = Some(Arc::clone(&ram.mapping));
        let shared = Shared::with_mapping(&[slot], mapping, None, config)?;
        let idle = Case {
            mode: crate::case::Mode::Bits64,
            world: World::Low,
            gpr: [0; 16],
            rflags: 0,
            fs_base: 0,
            gs_base: 0,
            xsave: berth_x86::state::XsaveArea::default(),
            patches: Vec::new(),
            code_at: 0,
            code: Vec::new(),
            spans: Vec::new(),
            masked: Vec::new(),
            stop_after: 1,
        };
        let state = machine::initial_state(&idle);
        let topology = Topology { index: 0, count: 1 };
        let cpuid = CpuidTable::new(&host_cpuid(), topology, 1_000_000);
        let vcpu = TranslatedVcpu::new(Arc::clone(&shared), state, cpuid, Box::new(Bare))?;
        let progress = Arc::new(AtomicU64::new(0));
        watch(vcpu.kicker(), &progress);
        Ok(Self {
            vcpu,
            shared,
            ram,
            base,
            progress,
            stopped: way.stopped,
            frozen: way.frozen,
            kept: None,
        })
    }

    /// Freezes RAM, and every other time lets go of what was frozen before.
    fn freeze(&mut self) -> Result<(), TranslatedError> {
        let error = |source| TranslatedError::Ram { what: "freezing it", source };
        if let Some(before) = self.kept.take() {
            self.shared.unfreeze(before).map_err(error)?;
        }
        let kept = self.shared.freeze(ram_file()?).map_err(error)?;
        if self.progress.load(Ordering::Relaxed).is_multiple_of(4) {
            self.kept = Some(kept);
        }
        Ok(())
    }

    fn collect(&mut self, case: &Case, expected: &[u8]) -> Vec<(u32, u64)> {
        let at = image_at(case.world) as usize;
        let image = &self.ram.bytes()[at..at + IMAGE as usize];
        let mut changed = Vec::new();
        let page = PAGE as usize;
        for (p, (is, was)) in image.chunks(page).zip(expected.chunks(page)).enumerate() {
            if is == was {
                continue;
            }
            for (w, (is, was)) in is.chunks_exact(8).zip(was.chunks_exact(8)).enumerate() {
                if is != was {
                    let mut word = [0; 8];
                    word.copy_from_slice(is);
                    changed.push(((p * page + w * 8) as u32, u64::from_le_bytes(word)));
                }
            }
        }
        changed
    }

    /// Puts the base image back, page by page where it differs.
    fn restore(&mut self, world: World) {
        let at = image_at(world) as usize;
        self.shared.before_access(at as u64, u64::from(IMAGE), false);
        for page in (0..IMAGE as usize).step_by(PAGE as usize) {
            let good = &self.base[page..page + PAGE as usize];
            let place = at + page..at + page + PAGE as usize;
            if self.ram.bytes()[place.clone()] != *good {
                self.shared.before_access((at + page) as u64, u64::from(PAGE), true);
                self.ram.bytes_mut()[place].copy_from_slice(good);
                self.shared.ram_written((at + page) as u64, u64::from(PAGE));
            }
        }
    }

    fn outcome(&mut self, exit: Exit, case: &Case, expected: &[u8]) -> Outcome {
        match exit {
            Exit::Kicked => return Outcome::Timeout,
            Exit::Shutdown => return Outcome::Broken("triple fault".to_owned()),
            Exit::Halted => {}
        }
        self.shared.before_access(0, RAM as u64, false);
        let memory = self.collect(case, expected);
        let state = self.vcpu.state();
        let ram = self.ram.bytes();
        let Some(Frame([vector, error, rip, cs, rflags, rsp, ss])) = Frame::read(ram, state) else {
            return Outcome::Broken("halted elsewhere than in an exception stub".to_owned());
        };
        let mut gpr = state.gpr;
        gpr[reg::RSP] = rsp;
        let mut selectors = state.seg.map(|s| s.selector);
        (selectors[sreg::CS], selectors[sreg::SS]) = (cs as u16, ss as u16);
        let vector = vector as u8;
        Outcome::Stopped(Box::new(Final {
            gpr,
            rip,
            rflags,
            selectors,
            fs_base: state.seg[sreg::FS].base,
            gs_base: state.seg[sreg::GS].base,
            fault: Fault {
                vector,
                error: error as u32,
                cr2: if vector == vector::PF { state.cr2 } else { 0 },
            },
            xsave: state.xsave.clone(),
            memory,
        }))
    }
}

impl Backend for TranslatedBackend {
    fn run(&mut self, case: &Case) -> Outcome {
        let mut expected = self.base.clone();
        let at = image_at(case.world) as usize;
        for (offset, data) in case.all_patches() {
            let offset = offset as usize;
            expected[offset..offset + data.len()].copy_from_slice(data);
            let to = at + offset;
            self.shared.before_access(to as u64, data.len() as u64, true);
            self.ram.bytes_mut()[to..to + data.len()].copy_from_slice(data);
            self.shared.ram_written(to as u64, data.len() as u64);
        }
        if self.frozen
            && let Err(error) = self.freeze()
        {
            return Outcome::Broken(format!("memory cannot be frozen: {error}"));
        }
        *self.vcpu.state_mut() = machine::initial_state(case);
        self.progress.fetch_add(1, Ordering::Relaxed);
        self.vcpu.stop_after(if self.stopped { case.stop_after } else { 0 });
        let exit = self.vcpu.run();
        self.progress.fetch_add(1, Ordering::Relaxed);
        let outcome = self.outcome(exit, case, &expected);
        self.restore(case.world);
        outcome
    }
}

/// The translator, made anew after a panic, which becomes the case's outcome.
pub struct GuardedBackend {
    inner: Option<TranslatedBackend>,
    way: Way,
}

impl GuardedBackend {
    /// As [`TranslatedBackend::new`].
    ///
    /// # Errors
    /// As [`TranslatedBackend::new`].
    pub fn new(way: Way) -> Result<Self, TranslatedError> {
        Ok(Self { inner: Some(TranslatedBackend::new(way)?), way })
    }
}

impl Backend for GuardedBackend {
    fn run(&mut self, case: &Case) -> Outcome {
        let mut inner = match self.inner.take().map_or_else(|| TranslatedBackend::new(self.way), Ok)
        {
            Ok(inner) => inner,
            Err(error) => return Outcome::Broken(format!("no translator: {error}")),
        };
        // After a panic the backend is dropped, so that no half-changed state is seen.
        let ran = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            let outcome = inner.run(case);
            (inner, outcome)
        }));
        match ran {
            Ok((inner, outcome)) => {
                self.inner = Some(inner);
                outcome
            }
            Err(payload) => {
                let text = payload
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| payload.downcast_ref::<&str>().copied());
                Outcome::Broken(format!("panic: {}", text.unwrap_or("without a message")))
            }
        }
    }
}

/// Starts the thread that kicks the vCPU out of a case that runs too long. It ends with the
/// backend.
fn watch(kicker: Kicker, progress: &Arc<AtomicU64>) {
    let progress = Arc::downgrade(progress);
    std::thread::spawn(move || {
        let mut last = 0;
        loop {
            std::thread::sleep(CASE_TIME);
            let Some(progress) = progress.upgrade() else { return };
            let now = progress.load(Ordering::Relaxed);
            if now == last && now % 2 == 1 {
                kicker.kick();
            }
            last = now;
        }
    });
}
