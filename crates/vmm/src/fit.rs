//! Whether a machine that was stored can go on on this host, found out without starting anything.

use std::path::Path;

use berth_x86::CpuState;
use berth_x86::cpuid::CpuidTable;
use berth_x86::state::XSAVE_SIZE;

use crate::clock::HostClock;
use crate::state::{MachineState, Moment, StateError};
use crate::vcpu::kvm::vm::{KvmProcessor, TscRate};
use crate::vcpu::probe::{Accel, AccelChoice};

/// What it would go on with.
#[derive(Clone, Copy, Debug)]
pub struct Fit {
    /// Which processor.
    pub accel: AccelChoice,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory_bytes: u64,
}

impl Fit {
    /// Looks at what is stored in a directory.
    ///
    /// # Errors
    /// [`StateError`] says why it cannot go on.
    pub fn check(self, directory: &Path) -> Result<Accel, StateError> {
        self.check_state(&MachineState::read(directory)?)
    }

    /// Looks at what was read. Where the processor may be any, and the one that is taken for a machine that
    /// boots cannot go on with it, the translator may.
    ///
    /// # Errors
    /// [`StateError`] says why it cannot go on.
    pub(crate) fn check_state(self, state: &MachineState) -> Result<Accel, StateError> {
        let (cpus, bytes) = (state.cpus.len(), state.memory_bytes);
        if cpus != self.cpus as usize || bytes != self.memory_bytes {
            return Err(StateError::Unfit(format!(
                "it has {cpus} processors and {bytes} bytes of memory, and the machine {} and {}",
                self.cpus, self.memory_bytes
            )));
        }
        state.cpus.iter().try_for_each(|cpu| check_extended(&cpu.state))?;
        let wanted = self.accel.resolve();
        let found = check_by(wanted, state);
        match (self.accel, wanted, found) {
            (AccelChoice::Auto, Accel::Kvm, Err(error)) => {
                check_by(Accel::Translate, state)?;
                tracing::info!(%error, "the translator goes on with what KVM cannot");
                Ok(Accel::Translate)
            }
            (_, _, found) => found.map(|()| wanted),
        }
    }
}

/// Whether one of the processors can go on with it here.
fn check_by(accel: Accel, state: &MachineState) -> Result<(), StateError> {
    let host = berth_translator::host_cpuid();
    let table = |topology| CpuidTable::new(&host, topology, state.tsc_khz);
    let here = Moment::now(&HostClock::new());
    match accel {
        Accel::Translate => {
            state.check_processor(table)?;
            state.check_tsc(&here, false)
        }
        Accel::Kvm => {
            let kvm = KvmProcessor::look()
                .map_err(|error| StateError::Unfit(format!("KVM cannot be used: {error}")))?;
            state.check_processor(|topology| kvm.offered(&table(topology), topology))?;
            state.check_tsc(&here, kvm.tsc == TscRate::Any)
        }
    }
}

/// What the host would refuse to load: reserved bits of MXCSR and of the header of the XSAVE area
/// (SDM vol. 1, 13.8.2 and 13.4.2).
fn check_extended(cpu: &CpuState) -> Result<(), StateError> {
    let area = &cpu.xsave.0;
    let mxcsr_high = area.get(26..28) == Some(&[0, 0]);
    let header = area.get(512..576).unwrap_or_default();
    let header_sound = header.first().is_some_and(|bits| bits & !7 == 0)
        && header.iter().skip(1).all(|&byte| byte == 0);
    let sound = XSAVE_SIZE == area.len() && mxcsr_high && header_sound;
    match sound && matches!(cpu.xcr0, 1 | 3 | 7) {
        true => Ok(()),
        false => Err(StateError::Unfit("its extended registers cannot be".into())),
    }
}
