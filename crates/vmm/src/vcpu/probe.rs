//! Finds out which processor to use: not whether `/dev/kvm` exists, but whether it runs guests with
//! the hardware's help.
//!
//! There are hosts whose KVM opens, makes machines and runs them, but without virtualization in the
//! processor: it interprets guest kernel code, hundreds of times slower than the translator, and
//! fails on instructions that every kernel uses.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use berth_x86::cpuid::{CpuidTable, Topology};

use crate::boot;
use crate::bus::{Bus, BusDevice};
use crate::clock::HostClock;
use crate::limits::MEMORY_BYTES_MIN;
use crate::memory::GuestRam;
use crate::vcpu::kvm::vm::KvmVm;
use crate::vcpu::{Vcpu, VcpuExit, reset};

/// What `--accel` asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AccelChoice {
    /// KVM when it works with the hardware's help, otherwise the translator.
    #[default]
    Auto,
    /// The translator.
    Translate,
    /// KVM, whatever the probe says.
    Kvm,
}

impl AccelChoice {
    /// The processor that this asks for on this host.
    #[must_use]
    pub fn resolve(self) -> Accel {
        match self {
            Self::Auto => probe().chosen,
            Self::Translate => Accel::Translate,
            Self::Kvm => Accel::Kvm,
        }
    }
}

impl std::str::FromStr for AccelChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "translate" => Ok(Self::Translate),
            "kvm" => Ok(Self::Kvm),
            other => Err(format!("no processor is called {other}; there are auto, translate, kvm")),
        }
    }
}

/// The processor that is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accel {
    /// The translator.
    Translate,
    /// KVM.
    Kvm,
}

impl std::fmt::Display for Accel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Translate => "translate",
            Self::Kvm => "kvm",
        })
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub what: &'static str,
    /// Whether it is as KVM needs it.
    pub good: bool,
    /// What was found and what that means.
    pub detail: String,
}

/// What was found and chosen, for `berth doctor`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProbeReport {
    /// In the order of looking; the first that is not good ends the search.
    pub findings: Vec<Finding>,
    /// What `auto` takes.
    pub chosen: Accel,
    /// Why.
    pub reason: String,
}

/// How long a guest of a few instructions may take.
const TIME_LIMIT: Duration = Duration::from_secs(2);
const PROBE_PORT: u64 = 0xf4;
const PROBE_VALUE: u8 = 0x2a;
/// mov al, 0x2a; out 0xf4, al; hlt
const REAL_MODE_GUEST: [u8; 5] = [0xb0, PROBE_VALUE, 0xe6, 0xf4, 0xf4];
/// As above after "lock cmpxchg16b [rsi]" on zeroed memory, which must find what it compares with.
const LONG_MODE_GUEST: [u8; 27] = [
    0x31,
    0xc0, // xor eax, eax
    0x31,
    0xd2, // xor edx, edx
    0x31,
    0xdb, // xor ebx, ebx
    0x8d,
    0x4b,
    0x01, // lea ecx, [rbx + 1]
    0xbe,
    0x00,
    0x00,
    0x12,
    0x00, // mov esi, 0x120000
    0xf0,
    0x48,
    0x0f,
    0xc7,
    0x0e, // lock cmpxchg16b [rsi]
    0x75,
    0x04, // jnz to the hlt
    0xb0,
    PROBE_VALUE,
    0xe6,
    0xf4, // mov al, 0x2a; out 0xf4, al
    0xf4, // hlt
    0x90, // filler
];

/// Remembers the byte that the guest wrote.
#[derive(Default)]
struct Witness(Option<u8>);

impl BusDevice for Witness {
    fn read(&mut self, _base: u64, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn write(&mut self, _base: u64, _offset: u64, data: &[u8]) {
        self.0 = data.first().copied();
    }
}

/// Looks at the host.
#[must_use]
pub fn probe() -> ProbeReport {
    let mut findings = Vec::new();
    let mut look = |what, result: Result<String, String>| {
        let good = result.is_ok();
        let detail = result.unwrap_or_else(|why| why);
        findings.push(Finding { what, good, detail });
        good
    };
    let usable = look("processor", hardware())
        && look("/dev/kvm", device())
        && look("small guest", run_real_mode())
        && look("kernel instructions", run_long_mode());
    if usable {
        let reason = "KVM works with the processor's virtualization".into();
        return ProbeReport { findings, chosen: Accel::Kvm, reason };
    }
    let last = findings.last().map_or(String::new(), |finding| finding.detail.clone());
    ProbeReport { findings, chosen: Accel::Translate, reason: last }
}

/// Whether KVM runs a small guest at all, with or without hardware: enough for tests.
///
/// # Errors
/// Why not.
pub fn kvm_runs_small_guests() -> Result<(), String> {
    device()?;
    run_real_mode().map(drop)
}

fn hardware() -> Result<String, String> {
    let info = std::fs::read_to_string("/proc/cpuinfo")
        .map_err(|error| format!("/proc/cpuinfo cannot be read: {error}"))?;
    let flags = info.lines().find_map(|line| line.strip_prefix("flags")).unwrap_or_default();
    for (flag, name) in [("vmx", "VT-x (vmx)"), ("svm", "AMD-V (svm)")] {
        if flags.split_whitespace().any(|word| word == flag) {
            return Ok(format!("has {name}"));
        }
    }
    Err("the processor shows neither vmx nor svm: no hardware virtualization here, so that KVM, \
         even where it opens, would only interpret guest kernels slowly"
        .into())
}

fn device() -> Result<String, String> {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Ok("can be opened".into()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err("/dev/kvm does not exist: the kernel has no KVM, or its module is not loaded"
                .into())
        }
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Err(
            "/dev/kvm may not be opened: add yourself to the group kvm, or ask who runs this host"
                .into(),
        ),
        Err(error) => Err(format!("/dev/kvm cannot be opened: {error}")),
    }
}

fn run_real_mode() -> Result<String, String> {
    run_guest(|vcpu, ram| {
        let mut state = reset::power_up();
        state.rip = 0x1000;
        let cs = &mut state.seg[berth_x86::state::sreg::CS];
        (cs.selector, cs.base) = (0, 0);
        boot::put_code(ram, 0x1000, &REAL_MODE_GUEST)?;
        vcpu.set_state(&state).map_err(chain)
    })?;
    Ok("a real-mode guest ran".into())
}

fn run_long_mode() -> Result<String, String> {
    run_guest(|vcpu, ram| {
        boot::put_code(ram, 0x10_0000, &LONG_MODE_GUEST)?;
        let state = boot::long_mode_entry(ram, 0x10_0000)?;
        vcpu.set_state(&state).map_err(chain)
    })
    .map_err(|why| {
        format!("KVM runs small guests but fails on cmpxchg16b, which kernels use ({why})")
    })?;
    Ok("a 64-bit guest with cmpxchg16b ran".into())
}

/// An error with its causes.
fn chain(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text = format!("{text}: {error}");
        source = error.source();
    }
    text
}

/// Makes a machine, lets `prepare` put a guest into it, and wants to see its value at the port.
fn run_guest(
    prepare: impl FnOnce(&mut dyn Vcpu, &GuestRam) -> Result<(), String>,
) -> Result<(), String> {
    let ram = GuestRam::new(MEMORY_BYTES_MIN).map_err(chain)?;
    let vm = KvmVm::new(&ram).map_err(chain)?;
    let witness = Arc::new(Mutex::new(Witness::default()));
    let ports = Arc::new(Bus::new());
    ports.insert(PROBE_PORT, 1, witness.clone()).map_err(chain)?;
    let topology = Topology { index: 0, count: 1 };
    let cpuid = CpuidTable::new(&berth_translator::host_cpuid(), topology, 1_000_000);
    let (cpuid, clock) = (vm.offered(&cpuid, topology), Arc::new(HostClock::new()));
    let buses = (Arc::new(Bus::new()), ports);
    let mut vcpu = vm.add_vcpu(0, &cpuid, buses, clock, None).map_err(chain)?;
    prepare(&mut vcpu, &ram)?;
    let handle = vcpu.handle();
    let (done, ended) = std::sync::mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if ended.recv_timeout(TIME_LIMIT).is_err() {
            handle.kick();
        }
    });
    let exit = vcpu.run();
    // The watchdog may have gone already.
    let _ = done.send(());
    let _ = watchdog.join();
    match exit.map_err(chain)? {
        VcpuExit::Halted => {}
        VcpuExit::Kicked => return Err(format!("it did not end within {TIME_LIMIT:?}")),
        VcpuExit::Shutdown => return Err("it ended with a triple fault".into()),
    }
    let value = witness.lock().unwrap_or_else(PoisonError::into_inner).0;
    match value {
        Some(PROBE_VALUE) => Ok(()),
        other => Err(format!("it wrote {other:?} instead of {PROBE_VALUE}")),
    }
}

#[cfg(test)]
mod tests {
    use super::{Accel, AccelChoice, probe};

    #[test]
    fn the_choice_follows_from_the_findings() {
        let report = probe();
        println!("{report:#?}");
        let all_good = report.findings.iter().all(|finding| finding.good);
        assert_eq!(report.chosen == Accel::Kvm, all_good && report.findings.len() == 4);
        assert!(!report.reason.is_empty());
        let bad = report.findings.iter().filter(|finding| !finding.good).count();
        assert!(bad <= 1, "the first one ends the search");
    }

    #[test]
    fn choices_by_name() {
        assert_eq!("kvm".parse(), Ok(AccelChoice::Kvm));
        assert!("hvf".parse::<AccelChoice>().is_err());
    }
}
