//! Why a machine could not be started.

use crate::acpi::AcpiError;
use crate::boot::BootError;
use crate::bus::BusError;
use crate::console::ConsoleError;
use crate::generation::GenerationError;
use crate::limits::CPUS_MAX;
use crate::memory::MemoryError;
use crate::state::StateError;
use crate::timer::TimerError;
use crate::vcpu::VcpuError;
use crate::vcpu::kvm::vm::KvmError;

/// Why a machine could not be started.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A number of vCPUs that cannot be.
    #[error("a machine has 1 to {CPUS_MAX} processors, not {0}; see --cpus")]
    Cpus(u32),
    /// The processor that was chosen cannot be had here.
    #[error("no processor {cpu} here: the processor of this host lacks {lack}; see --cpu")]
    Processor {
        /// Its name.
        cpu: &'static str,
        /// The first thing that is missing.
        lack: String,
    },
    /// Memory.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The generation id.
    #[error(transparent)]
    Generation(#[from] GenerationError),
    /// Two devices at one address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// Serial console.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// Timers.
    #[error(transparent)]
    Timer(#[from] TimerError),
    /// A vCPU.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// A machine that was stored cannot go on.
    #[error(transparent)]
    State(#[from] StateError),
    /// KVM was asked for and cannot be had.
    #[error("no machine by KVM; try --accel translate")]
    Kvm(#[from] KvmError),
    /// The translator cannot run here.
    #[error("no machine by the translator")]
    Translator(#[source] berth_translator::SetupError),
    /// A device could not be made.
    #[error("a device of the machine could not be made")]
    Device(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A thread could not be started.
    #[error("the thread of vCPU {index} could not be started")]
    Thread {
        /// Which vCPU.
        index: u32,
        /// The reason.
        source: std::io::Error,
    },
    /// A thread that helps to put a stored machine together could not be started.
    #[error("a thread to put the machine together could not be started")]
    Begin(#[source] std::io::Error),
}
