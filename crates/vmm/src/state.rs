//! A machine as it is stored: what its vCPUs and chips hold, and its memory.
//!
//! The format is described in `docs/formats/machine-state.md`. Nothing in it is trusted: it may have
//! been altered, and what cannot be is refused before anything runs.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use berth_translator::Origin;
use berth_x86::cpuid::{CpuidEntry, CpuidTable};
use berth_x86::{CpuState, cpuid};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::chips::{events, ioapic, lapic, pic, pit, rtc, serial};
use crate::clock::{Clock, scale};
use crate::limits::CPUS_MAX;
use crate::memory::{GuestRam, MemoryError, ram_file};
use crate::pci::root::StoredPci;
use crate::pvclock;

/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;
/// What the vCPUs and chips hold, as JSON.
pub const MACHINE: &str = "machine.json";
/// Memory, from guest address 0 on, without the hole below 4 GiB; a sparse file.
pub const MEMORY: &str = "memory";
/// Beside them: which pages were read first when the machine went on; empty until it is known.
pub const WORKING_SET: &str = "working-set";
/// Bytes `machine.json` may have.
const MACHINE_MAX: u64 = 4 << 20;
/// Bytes of memory that are moved at once.
const CHUNK: usize = 1 << 20;
const PAGE: usize = 4096;
/// The leaf of CPUID that tells the rate of the time-stamp counter.
const TSC_LEAF: u32 = 0x4000_0010;
/// Rows of CPUID of a vCPU: what KVM takes.
const ROWS_MAX: usize = 80;

/// Why a machine could not be stored, or one that was stored cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The system refused something.
    #[error("{action} {} failed", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// It is not understood.
    #[error("{} is not the state of a machine: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It is another machine's, or cannot run here.
    #[error("this state cannot go on here: {0}")]
    Unfit(String),
    /// Something in the machine cannot be stored yet.
    #[error("the machine cannot be stored: {0}")]
    Unsaved(String),
    /// Memory for it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

fn failed<'a>(action: &'static str, path: &'a Path) -> impl Fn(io::Error) -> StateError + 'a {
    move |source| StateError::File { action, path: path.to_owned(), source }
}

/// The time at which a machine was stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moment {
    /// The host's time-stamp counter.
    pub tsc: u64,
    /// How fast it counts, in Hz.
    pub tsc_hz: u64,
    /// The clock of chips.
    pub now_ns: u64,
    /// Nanoseconds since 1970.
    pub wall_ns: u64,
    /// Of which boot of which host the counters are.
    pub boot_id: String,
}

impl Moment {
    /// Now, on this host.
    #[must_use]
    pub fn now(clock: &dyn Clock) -> Self {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id");
        Self {
            tsc: clock.tsc(),
            tsc_hz: clock.tsc_hz(),
            now_ns: clock.now_ns(),
            wall_ns: u64::try_from(clock.wall().as_nanos()).unwrap_or(u64::MAX),
            boot_id: boot_id.unwrap_or_default().trim().to_owned(),
        }
    }

    /// Whether both are of one boot of one host.
    fn is_of_boot(&self, other: &Self) -> bool {
        self.boot_id == other.boot_id && !other.boot_id.is_empty()
    }

    /// How far counters have to be set for a machine that was stored at this moment, so that for it
    /// just the time has passed that did pass.
    #[must_use]
    pub fn shift_to(&self, now: &Self) -> Shift {
        if self.is_of_boot(now) && now.tsc >= self.tsc {
            return Shift::default();
        }
        let passed_ns = now.wall_ns.saturating_sub(self.wall_ns);
        let ticks = scale(passed_ns, self.tsc_hz, 1_000_000_000);
        let clock = i128::from(now.now_ns) - i128::from(passed_ns) - i128::from(self.now_ns);
        Shift {
            tsc_back: self.tsc.wrapping_add(ticks).wrapping_sub(now.tsc),
            clock_ahead_ns: clock.clamp(i64::MIN.into(), i64::MAX.into()) as i64,
        }
    }
}

/// What is added to a guest's counters when it goes on elsewhere.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shift {
    /// How far the host's time-stamp counter is behind the one from before; added to offsets.
    pub tsc_back: u64,
    /// How far the clock of chips is ahead of the one from before.
    pub clock_ahead_ns: i64,
}

/// A machine without its memory.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineState {
    /// [`VERSION`].
    pub version: u32,
    /// When it was stored.
    pub saved: Moment,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Ticks of the guest's time-stamp counter in a millisecond, as CPUID tells them.
    pub tsc_khz: u32,
    /// Its vCPUs.
    pub cpus: Vec<StoredCpu>,
    /// The paravirtual clock.
    pub pvclock: pvclock::Stored,
    /// The I/O APIC.
    pub ioapic: ioapic::Registers,
    /// The 8259 pair.
    pub pic: pic::PicPair,
    /// The 8254.
    pub pit: pit::Registers,
    /// The real-time clock.
    pub rtc: rtc::Registers,
    /// The serial port.
    pub serial: serial::Registers,
    /// The PCI bus, if there is one, with its devices.
    pub pci: Option<StoredPci>,
    /// Events that the guest has not been told of; none in states from before there were any.
    #[serde(default)]
    pub events: events::Registers,
}

/// A vCPU.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredCpu {
    /// Its registers.
    pub state: CpuState,
    /// It waits for a start-up message.
    pub waiting: bool,
    /// It has received INIT, and not looked yet.
    pub init: bool,
    /// And this start-up message.
    pub startup: Option<u8>,
    /// MSR_KVM_SYSTEM_TIME.
    pub system_time: u64,
    /// MSR_KVM_WALL_CLOCK.
    pub wall_clock: u64,
    /// Its local APIC.
    pub apic: lapic::Registers,
    /// What CPUID tells it.
    pub cpuid: Vec<CpuidEntry>,
}

impl MachineState {
    /// Virtio types of its devices.
    #[must_use]
    pub fn device_types(&self) -> Vec<u16> {
        let slots = self.pci.iter().flat_map(|pci| &pci.slots);
        slots.filter_map(|slot| Some(slot.virtio.as_ref()?.device_type)).collect()
    }

    /// Reads a machine from the directory in which it was stored.
    ///
    /// # Errors
    /// [`StateError::File`], [`StateError::Damaged`].
    pub fn read(directory: &Path) -> Result<Self, StateError> {
        let path = directory.join(MACHINE);
        let damaged = |reason: String| StateError::Damaged { path: path.clone(), reason };
        let file = File::open(&path).map_err(failed("opening", &path))?;
        let mut text = Vec::new();
        file.take(MACHINE_MAX + 1).read_to_end(&mut text).map_err(failed("reading", &path))?;
        if text.len() as u64 > MACHINE_MAX {
            return Err(damaged(format!("it has more than {MACHINE_MAX} bytes")));
        }
        // Of another version more may be different than what is not understood.
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let versioned = serde_json::from_slice::<Versioned>(&text);
        let version = versioned.map_err(|error| damaged(error.to_string()))?.version;
        if version != VERSION {
            return Err(damaged(format!(
                "its version is {version}, and this program knows {VERSION} only"
            )));
        }
        let state: Self =
            serde_json::from_slice(&text).map_err(|error| damaged(error.to_string()))?;
        if state.cpus.is_empty() || state.cpus.len() > CPUS_MAX as usize {
            return Err(damaged(format!("{} processors", state.cpus.len())));
        }
        let path = directory.join(MEMORY);
        let len = path.metadata().map_err(failed("reading", &path))?.len();
        if len != state.memory_bytes {
            let reason = format!("it has {len} bytes, and the machine {}", state.memory_bytes);
            return Err(StateError::Damaged { path, reason });
        }
        Ok(state)
    }

    /// Writes it into a directory that is there, with the memory, and syncs both.
    ///
    /// # Errors
    /// [`StateError::File`]; then the directory is of no use.
    pub fn write(&self, memory: &Origin, directory: &Path) -> Result<(), StateError> {
        let path = directory.join(MEMORY);
        let write = || {
            let file = File::create(&path)?;
            save_memory(memory, &file)?;
            file.sync_all()
        };
        write().map_err(failed("writing", &path))?;
        let path = directory.join(MACHINE);
        let write = || {
            let file = File::create(&path)?;
            serde_json::to_writer(io::BufWriter::new(&file), self)?;
            file.sync_all()
        };
        write().map_err(failed("writing", &path))?;
        let path = directory.join(WORKING_SET);
        File::create(&path).map_err(failed("creating", &path))?;
        let synced = File::open(directory).and_then(|file| file.sync_all());
        synced.map_err(failed("syncing", directory))
    }

    /// What CPUID tells a vCPU.
    #[must_use]
    pub fn cpuid(&self, index: u32) -> CpuidTable {
        let rows = self.cpus.get(index as usize).map(|cpu| cpu.cpuid.clone()).unwrap_or_default();
        let count = self.cpus.len() as u32;
        CpuidTable::from_rows(rows, cpuid::Topology { index, count })
    }

    /// Whether a processor can run it, of which `offered` is what it offers to guests that come with
    /// nothing.
    ///
    /// # Errors
    /// [`StateError::Unfit`] says what it lacks.
    pub fn check_processor(
        &self,
        offered: impl Fn(cpuid::Topology) -> CpuidTable,
    ) -> Result<(), StateError> {
        let count = self.cpus.len() as u32;
        for (index, cpu) in (0..).zip(&self.cpus) {
            let told = cpu.cpuid.iter().find(|row| row.leaf == TSC_LEAF).map(|row| row.regs[0]);
            if told.is_some_and(|khz| khz != self.tsc_khz) || cpu.cpuid.len() > ROWS_MAX {
                return Err(StateError::Unfit("its rows of CPUID cannot be".into()));
            }
            if let Some(lack) = offered(cpuid::Topology { index, count }).lack(&cpu.cpuid) {
                return Err(StateError::Unfit(format!(
                    "the processor of this host lacks {lack}, which the machine may use"
                )));
            }
        }
        Ok(())
    }

    /// Whether its time-stamp counter can go on, if `sets_rate` says that its rate can be set.
    ///
    /// # Errors
    /// [`StateError::Unfit`].
    pub fn check_tsc(&self, here: &Moment, sets_rate: bool) -> Result<(), StateError> {
        let hz = u64::from(self.tsc_khz) * 1000;
        let same = hz.abs_diff(here.tsc_hz) <= here.tsc_hz / 1000;
        if same || sets_rate && hz != 0 || self.saved.is_of_boot(here) {
            return Ok(());
        }
        Err(StateError::Unfit(format!(
            "its time-stamp counter counts {} ticks in a millisecond, and that of this host, whose rate \
             cannot be set, {}",
            self.tsc_khz,
            here.tsc_hz / 1000
        )))
    }
}

/// Pages without data that are not looked for in the file of a state.
const GAP_PAGES: u64 = 64;

/// Writes all of memory that is not zero.
fn save_memory(memory: &Origin, to: &File) -> io::Result<()> {
    let mut chunk = vec![0; CHUNK];
    let mut at = 0;
    for run in memory.of_page.chunk_by(|a, b| a == b) {
        let end = at + (run.len() * PAGE) as u64;
        let number = run.first().copied().unwrap_or(0);
        if let Some(file) = memory.files.get(usize::from(number).wrapping_sub(1)) {
            let file = File::from(file.try_clone()?);
            for data in data_of(&file, at..end)? {
                save_data(&file, data, &mut chunk, to)?;
            }
        }
        at = end;
    }
    to.set_len(at)
}

fn save_data(from: &File, data: Range<u64>, chunk: &mut [u8], to: &File) -> io::Result<()> {
    let mut at = data.start;
    while at < data.end {
        let count = chunk.len().min((data.end - at) as usize);
        let bytes = chunk.get_mut(..count).unwrap_or_default();
        from.read_exact_at(bytes, at)?;
        // Pages that are not zero, as many as there are behind each other.
        let pages: Vec<_> = bytes.chunks(PAGE).collect();
        let mut n = 0;
        for run in pages.chunk_by(|a, b| is_zero(a) == is_zero(b)) {
            let (first, last) = (n * PAGE, ((n + run.len()) * PAGE).min(count));
            if !run.first().is_some_and(|page| is_zero(page)) {
                to.write_all_at(bytes.get(first..last).unwrap_or_default(), at + first as u64)?;
            }
            n += run.len();
        }
        at += count as u64;
    }
    Ok(())
}

fn is_zero(page: &[u8]) -> bool {
    page.iter().all(|&byte| byte == 0)
}

/// Where memory is that was stored: pages are read when they are first needed.
///
/// # Errors
/// [`StateError::File`].
pub fn stored_memory(directory: &Path) -> Result<Origin, StateError> {
    let path = directory.join(MEMORY);
    let look = || {
        let file = File::open(&path)?;
        let len = file.metadata()?.len();
        let mut of_page = vec![0; (len / PAGE as u64) as usize];
        let mut end = 0;
        for data in data_of(&file, 0..len)? {
            let (first, last) = (data.start / PAGE as u64, data.end.div_ceil(PAGE as u64));
            // A few pages of zeroes are cheaper than two more mappings.
            let first = if first < end + GAP_PAGES { end } else { first };
            of_page.get_mut(first as usize..last as usize).unwrap_or_default().fill(1);
            end = last;
        }
        Ok(Origin { files: vec![Arc::new(file.into())], of_page, ahead: Vec::new() })
    };
    look().map_err(failed("reading", &path))
}

/// Fills memory, which is zero, with what was stored.
///
/// # Errors
/// [`StateError::Unfit`]: it cannot be read.
pub fn fill_memory(ram: &GuestRam, memory: &Origin) -> Result<(), StateError> {
    save_memory(memory, ram.file())
        .map_err(|error| StateError::Unfit(format!("its memory cannot be read: {error}")))
}

/// Where memory is that is in its own file.
///
/// # Errors
/// [`StateError::Unsaved`]: the file cannot be opened once more.
pub fn own_memory(ram: &GuestRam) -> Result<Origin, StateError> {
    let pages = (ram.bytes() / PAGE as u64) as usize;
    let file = ram.file().try_clone();
    let file = file.map_err(|error| StateError::Unsaved(format!("its memory: {error}")))?;
    let files = vec![Arc::new(file.into())];
    Ok(Origin { files, of_page: vec![1; pages], ahead: Vec::new() })
}

/// A copy of memory, in a file of its own.
///
/// # Errors
/// [`StateError::Unsaved`]: there is no room.
pub fn copy_memory(memory: &Origin) -> Result<Origin, StateError> {
    let bytes = (memory.of_page.len() * PAGE) as u64;
    let copy = || {
        let file = ram_file(bytes).map_err(|(_, error)| error)?;
        save_memory(memory, &file)?;
        let files = vec![Arc::new(file.into())];
        Ok(Origin { files, of_page: vec![1; memory.of_page.len()], ahead: Vec::new() })
    };
    copy().map_err(|error: io::Error| {
        StateError::Unsaved(format!("its memory cannot be copied: {error}"))
    })
}

/// Where a sparse file has data within a range, in whole pages.
fn data_of(file: &File, within: Range<u64>) -> io::Result<Vec<Range<u64>>> {
    let mut pieces = Vec::new();
    let mut at = within.start;
    while at < within.end {
        let data = match rustix::fs::seek(file, SeekFrom::Data(at)) {
            Ok(data) => data & !(PAGE as u64 - 1),
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(errno.into()),
        };
        if data >= within.end {
            break;
        }
        let hole = rustix::fs::seek(file, SeekFrom::Hole(at.max(data)))?.min(within.end);
        let hole = hole.next_multiple_of(PAGE as u64).min(within.end);
        pieces.push(data.max(within.start)..hole);
        at = hole;
    }
    Ok(pieces)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn memory_is_stored_without_zeroes() {
        let dir = tempfile::tempdir().unwrap();
        let ram = GuestRam::new(16 << 20).unwrap();
        let put = |at, bytes: &[u8]| ram.memory().write_slice(bytes, GuestAddress(at)).unwrap();
        put(5 << 20, b"here");
        put(0x1f_fffe, b"across");
        put((16 << 20) - 1, b"!");
        put(8 << 20, &vec![0; 1 << 20]);
        let file = File::create(dir.path().join(MEMORY)).unwrap();
        let origin = own_memory(&ram).unwrap();
        save_memory(&origin, &file).unwrap();
        let meta = file.metadata().unwrap();
        assert_eq!(meta.len(), 16 << 20);
        let blocks = std::os::unix::fs::MetadataExt::blocks(&meta);
        assert!(blocks * 512 < 1 << 20, "{blocks}");
        let other = GuestRam::new(16 << 20).unwrap();
        let copy = copy_memory(&stored_memory(dir.path()).unwrap()).unwrap();
        fill_memory(&other, &copy).unwrap();
        let mut bytes = [vec![0; 16 << 20], vec![0; 16 << 20]];
        ram.memory().read_slice(&mut bytes[0], GuestAddress(0)).unwrap();
        other.memory().read_slice(&mut bytes[1], GuestAddress(0)).unwrap();
        assert!(bytes[0] == bytes[1]);
    }

    #[test]
    fn time_goes_on_wherever_it_goes_on() {
        let at = |tsc, now_ns, wall_ns, boot: &str| Moment {
            tsc,
            tsc_hz: 2_000_000_000,
            now_ns,
            wall_ns,
            boot_id: boot.into(),
        };
        let saved = at(1000, 500, 10_000, "a");
        assert_eq!(saved.shift_to(&at(5000, 900, 10_400, "a")), Shift::default());
        // 400 ns and 800 ticks later, on a host that counts from elsewhere.
        let shift = saved.shift_to(&at(50, 100, 10_400, "b"));
        assert_eq!(50u64.wrapping_add(shift.tsc_back), 1800);
        assert_eq!(100 - shift.clock_ahead_ns, 900);
    }
}
