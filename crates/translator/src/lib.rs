//! Dynamic binary translator from x86 guest code to x86-64 host code.

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use berth_x86::{CpuState, Platform};

/// One contiguous piece of guest RAM backed by a file (a memfd or a mapped snapshot).
pub struct RamSlot<'a> {
    /// First guest physical address; a multiple of 4096.
    pub gpa: u64,
    /// Bytes; a multiple of 4096.
    pub size: u64,
    /// The backing file.
    pub fd: BorrowedFd<'a>,
    /// Where the slot begins in the file; a multiple of 4096.
    pub offset: u64,
}

/// Limits and switches of a translator.
#[derive(Clone, Debug)]
pub struct Config {
    /// Bytes of host code kept per vCPU before the oldest is evicted.
    pub code_cache_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        Self { code_cache_bytes: 16 << 20 }
    }
}

/// Why a translator could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The host lacks something the generated code needs.
    #[error("the host processor lacks {0}")]
    Host(&'static str),
    /// A mapping failed.
    #[error("mapping {what} failed")]
    Map {
        /// What was to be mapped.
        what: &'static str,
        /// The operating system's reason.
        source: std::io::Error,
    },
}

/// What all vCPUs of one machine share: the views of guest RAM and the map of pages with
/// translations.
pub struct Shared {}

impl Shared {
    /// Maps guest RAM for translated vCPUs.
    ///
    /// # Errors
    /// [`SetupError`] when the host lacks an instruction or address space.
    pub fn new(_slots: &[RamSlot<'_>], _config: Config) -> Result<Arc<Self>, SetupError> {
        Err(SetupError::Host("a translator"))
    }

    /// Must be called after anything but a vCPU has written guest RAM (device DMA, loaders), before
    /// the guest is told: drops translations made from these bytes. Cheap when there are none.
    pub fn ram_written(&self, _gpa: u64, _len: u64) {}
}

/// Why [`TranslatedVcpu::run`] returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// HLT with nothing to deliver: wait until an interrupt is pending, then run again.
    Halted,
    /// [`Kicker::kick`] was called.
    Kicked,
    /// Triple fault: the machine resets.
    Shutdown,
}

/// Makes a running vCPU notice something; may be called from any thread.
#[derive(Clone)]
pub struct Kicker {}

impl Kicker {
    /// Makes [`TranslatedVcpu::run`] return [`Exit::Kicked`] soon (or at once, when it is not
    /// running now: the next call returns).
    pub fn kick(&self) {}

    /// Tells the vCPU to ask its platform for a pending interrupt at the next block boundary.
    pub fn interrupt(&self) {}
}

/// A virtual processor whose code is translated. Runs on the thread that calls
/// [`TranslatedVcpu::run`].
pub struct TranslatedVcpu {
    state: CpuState,
}

impl TranslatedVcpu {
    /// Makes a vCPU in the given state.
    ///
    /// # Errors
    /// [`SetupError`] when memory for tables or code cannot be mapped.
    pub fn new(
        _shared: Arc<Shared>,
        state: CpuState,
        _platform: Box<dyn Platform>,
    ) -> Result<Self, SetupError> {
        Ok(Self { state })
    }

    /// The architectural state; complete whenever `run` is not active.
    #[must_use]
    pub fn state(&self) -> &CpuState {
        &self.state
    }

    /// Changes the architectural state; all cached address translations are dropped before the next
    /// instruction.
    pub fn state_mut(&mut self) -> &mut CpuState {
        &mut self.state
    }

    /// The platform given at creation.
    #[must_use]
    pub fn platform_mut(&mut self) -> &mut dyn Platform {
        unreachable!("not built yet")
    }

    /// Runs guest code until something outside has to be done.
    pub fn run(&mut self) -> Exit {
        Exit::Shutdown
    }

    /// A handle for other threads.
    #[must_use]
    pub fn kicker(&self) -> Kicker {
        Kicker {}
    }
}
