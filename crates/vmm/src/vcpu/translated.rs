//! The translated vCPU behind the common interface.

use std::os::fd::AsFd;
use std::sync::Arc;

use berth_translator::{
    Config, Exit, Kicker, Origin, RamSlot, SetupError, Shared, SharedCode, TakenCode,
    TranslatedVcpu,
};
use berth_x86::cpuid::CpuidTable;
use berth_x86::{CpuState, Platform};

pub use berth_translator::{Dump, Optimizations, Reports, UnknownOptimization};

use crate::memory::GuestRam;
use crate::vcpu::{Capabilities, Vcpu, VcpuError, VcpuExit, VcpuHandle};

/// Gives the translator the machine's RAM, and lets it know of writes that do not come from vCPUs.
///
/// `origin` is where pages of it are so far, if they are not in its own file.
///
/// # Errors
/// [`SetupError`] when the host cannot do it.
pub fn share(
    ram: &GuestRam,
    origin: Option<&Origin>,
    config: Config,
) -> Result<Arc<Shared>, SetupError> {
    let pieces = ram.pieces().iter();
    let slots: Vec<_> = pieces
        .map(|piece| RamSlot {
            gpa: piece.gpa,
            size: piece.size,
            fd: ram.file().as_fd(),
            offset: piece.offset,
        })
        .collect();
    let mapping = Some(Arc::clone(ram.mapping()));
    let shared = Shared::with_mapping(&slots, mapping, origin, config)?;
    let told = Arc::clone(&shared);
    let hook = Box::new(move |gpa, len| told.ram_written(gpa, len));
    let asked = Arc::clone(&shared);
    let before = Box::new(move |gpa, len, write| asked.before_access(gpa, len, write));
    let giver = Arc::clone(&shared);
    let discard = Box::new(move |gpa, len| giver.discard(gpa, len));
    if ram.write_hook().set(hook).is_err()
        || ram.before_access_hook().set(before).is_err()
        || !ram.set_discard(discard)
    {
        tracing::error!("guest memory belongs to two translators");
    }
    Ok(shared)
}

/// Whether the translator can run on this host.
///
/// # Errors
/// [`SetupError::Host`] names what is missing.
pub fn host_check() -> Result<(), SetupError> {
    berth_translator::host_check()
}

/// Whether the processor can execute user code of translated guests itself.
///
/// # Errors
/// What the system refuses.
pub fn direct_check() -> std::io::Result<berth_translator::DirectExecution> {
    berth_translator::direct_check()
}

/// A vCPU whose code is translated.
pub struct Translated {
    vcpu: TranslatedVcpu,
}

impl Translated {
    /// Makes vCPU `index`, perhaps with what another one in this state has translated.
    ///
    /// # Errors
    /// [`VcpuError::Translator`].
    pub fn new(
        index: u32,
        shared: Arc<Shared>,
        state: CpuState,
        cpuid: CpuidTable,
        platform: Box<dyn Platform>,
        code: Option<TakenCode>,
    ) -> Result<Self, VcpuError> {
        let vcpu = TranslatedVcpu::with_code(shared, state, cpuid, platform, code)
            .map_err(|source| VcpuError::Translator { index, source })?;
        Ok(Self { vcpu })
    }
}

struct Handle(Kicker);

impl VcpuHandle for Handle {
    fn kick(&self) {
        self.0.kick();
    }
    fn interrupt(&self) {
        self.0.interrupt();
    }
    fn nmi(&self) {
        self.0.nmi();
    }
}

impl Vcpu for Translated {
    fn run(&mut self) -> Result<VcpuExit, VcpuError> {
        Ok(match self.vcpu.run() {
            Exit::Halted => VcpuExit::Halted,
            Exit::Kicked => VcpuExit::Kicked,
            Exit::Shutdown => VcpuExit::Shutdown,
        })
    }

    fn state(&mut self) -> Result<CpuState, VcpuError> {
        Ok(self.vcpu.state().clone())
    }

    fn set_state(&mut self, state: &CpuState) -> Result<(), VcpuError> {
        *self.vcpu.state_mut() = state.clone();
        Ok(())
    }

    fn rest(&mut self) {
        self.vcpu.rest();
    }

    fn share_code(&mut self) -> Option<SharedCode> {
        match self.vcpu.share_code() {
            Ok(code) => Some(code),
            Err(error) => {
                tracing::warn!(%error, "clones will translate anew");
                None
            }
        }
    }

    fn capabilities(&self) -> Capabilities {
        Capabilities { name: "translate", irqchip_inside: false }
    }

    fn handle(&self) -> Arc<dyn VcpuHandle> {
        Arc::new(Handle(self.vcpu.kicker()))
    }
}
