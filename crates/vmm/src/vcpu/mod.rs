//! Virtual processors: one small interface with two implementations.

pub mod kvm;
pub mod mailbox;
pub mod platform;
pub mod probe;
pub mod reset;
pub mod translated;

use std::sync::Arc;

use berth_translator::SharedCode;
use berth_x86::CpuState;

use crate::chips::lapic;

/// Why [`Vcpu::run`] came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VcpuExit {
    /// HLT with nothing to deliver.
    Halted,
    /// [`VcpuHandle::kick`] was called.
    Kicked,
    /// Triple fault.
    Shutdown,
}

/// What a kind of vCPU does by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capabilities {
    /// Its name, as in `--accel`.
    pub name: &'static str,
    /// The interrupt controllers are inside: INIT, start-up and HLT never come out of it.
    pub irqchip_inside: bool,
}

/// What is inside of a vCPU besides its registers, if it has its interrupt controller inside.
#[derive(Clone)]
pub struct Inside {
    /// Its local APIC.
    pub apic: lapic::Registers,
    /// It waits for a start-up message.
    pub waiting: bool,
    /// It has received this one.
    pub startup: Option<u8>,
    /// MSR_KVM_SYSTEM_TIME.
    pub system_time: u64,
    /// MSR_KVM_WALL_CLOCK.
    pub wall_clock: u64,
    /// The interrupt that it has acknowledged, and not begun to handle.
    pub acknowledged: Option<u8>,
}

/// Why a vCPU could not be made or cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The translator could not be set up.
    #[error("the translated vCPU {index} could not be set up")]
    Translator {
        /// Which vCPU.
        index: u32,
        /// The reason.
        source: berth_translator::SetupError,
    },
    /// A call of KVM failed.
    #[error("{operation} failed for vCPU {index} of KVM")]
    Kvm {
        /// What was tried.
        operation: &'static str,
        /// Which vCPU.
        index: u32,
        /// The reason.
        source: std::io::Error,
    },
    /// KVM cannot run the guest's code.
    #[error("KVM could not go on with vCPU {index} at {rip:#x}: {why}; try --accel translate")]
    KvmGaveUp {
        /// Which vCPU.
        index: u32,
        /// Where.
        rip: u64,
        /// What KVM said.
        why: String,
    },
}

/// Reaches a vCPU from other threads.
pub trait VcpuHandle: Send + Sync {
    /// Makes [`Vcpu::run`] return [`VcpuExit::Kicked`] soon, or at once at its next call.
    fn kick(&self);
    /// There may be an interrupt to take.
    fn interrupt(&self);
    /// A non-maskable interrupt came.
    fn nmi(&self);
}

/// A virtual processor. All methods are called on one thread.
pub trait Vcpu: Send {
    /// Runs the guest until something outside has to be done.
    ///
    /// # Errors
    /// [`VcpuError`] when it cannot go on.
    fn run(&mut self) -> Result<VcpuExit, VcpuError>;
    /// The architectural state.
    ///
    /// # Errors
    /// [`VcpuError`] when it cannot be had.
    fn state(&mut self) -> Result<CpuState, VcpuError>;
    /// Replaces the architectural state.
    ///
    /// # Errors
    /// [`VcpuError`] when it cannot be set.
    fn set_state(&mut self, state: &CpuState) -> Result<(), VcpuError>;
    /// What is inside of it besides, if it is one that has that. To be asked before [`Self::state`].
    ///
    /// # Errors
    /// [`VcpuError`] when it cannot be had.
    fn inside(&mut self) -> Result<Option<Inside>, VcpuError> {
        Ok(None)
    }
    /// It has nothing to do for a while, and gives back memory that it can do without.
    fn rest(&mut self) {}
    /// It stood still and is about to go on.
    fn stood_still(&mut self) {}
    /// What it has translated, for the vCPUs of clones; `None` if there is nothing, or it cannot be
    /// shared.
    fn share_code(&mut self) -> Option<SharedCode> {
        None
    }
    /// What it does by itself.
    fn capabilities(&self) -> Capabilities;
    /// A handle for other threads.
    fn handle(&self) -> Arc<dyn VcpuHandle>;
}
