//! Dynamic binary translator from x86 guest code to x86-64 host code.
//!
//! Guest and host have the same instruction set, so most instructions are copied with their
//! registers renamed; see `translate` for how a block comes about, `tlb` for how memory is
//! reached, `vcpu` for what runs when. The crate knows guest RAM as files it maps and everything
//! else as a [`Platform`]; it knows no device, no KVM and starts no thread.
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss,
    reason = "a processor takes numbers apart on every line; widths are explicit"
)]

use std::os::fd::BorrowedFd;
use std::sync::Arc;

use berth_x86::cpuid::{CpuidTable, HostCpuid};
use berth_x86::{CpuState, Platform};

mod ahead;
mod asm;
mod code;
mod direct;
mod dump;
mod ends;
mod exec;
mod features;
mod fpu;
mod fuzz;
mod layout;
mod mem;
mod opt;
mod ram;
mod returns;
mod shared;
mod signal;
mod stats;
mod sys;
mod thunks;
mod tlb;
mod translate;
mod vcpu;
mod world;

pub use ahead::Written;
pub use dump::Dump;
pub use exec::host_tsc;
pub use opt::{Optimizations, UnknownOptimization};
pub use ram::{Frozen, Origin};
pub use shared::Shared;
pub use stats::{Report, Reports, Stats};
pub use sys::Reservation;
pub use vcpu::inherit::{SharedCode, TakenCode};

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
    /// Bytes of host code kept per vCPU; when they are full, those that were not used for the longest
    /// time are dropped.
    pub code_cache_bytes: usize,
    /// Guest address spaces (PCIDs) whose translations are kept per vCPU, 1 to 8. Each reserves
    /// 768 GiB of the host's address space, besides 512 GiB per vCPU.
    pub address_spaces: usize,
    /// Pages that are reached through mappings of their own, because the next guest page is not the
    /// next one in RAM; fewer if the system allows fewer mappings (each costs two). With more such
    /// pages, accesses look whether they cross.
    pub guarded_pages: usize,
    /// Pages of frozen memory that are copied one by one when they are written, each of which may cost
    /// six of the host's mappings; after that, whole regions are.
    pub single_copies: usize,
    /// What is done for speed.
    pub optimizations: Optimizations,
    /// For tests: user code is left to the processor wherever that is possible, whether it pays or
    /// not.
    pub always_direct: bool,
    /// Where each vCPU leaves what it did when it ends; times are taken only if there is one.
    pub reports: Option<Reports>,
    /// Where each translated block is listed.
    pub dump: Option<Dump>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            code_cache_bytes: 16 << 20,
            address_spaces: 6,
            guarded_pages: 20_000,
            single_copies: 2_500,
            optimizations: Optimizations::all(),
            always_direct: false,
            reports: None,
            dump: None,
        }
    }
}

/// Why a translator could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum SetupError {
    /// The host lacks something the generated code needs.
    #[error(
        "the host processor lacks {0}, which the translator needs (any x86-64 processor since 2013 has it)"
    )]
    Host(&'static str),
    /// A mapping failed.
    #[error("mapping {what} failed; is the address space limited (ulimit -v)?")]
    Map {
        /// What was to be mapped.
        what: &'static str,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// More vCPUs than the tables of the process have room for.
    #[error("too many translated vCPUs in one process")]
    TooManyVcpus,
}

/// Checks that the host has what generated code uses.
///
/// # Errors
/// [`SetupError::Host`] names what is missing.
pub fn host_check() -> Result<(), SetupError> {
    let have = [
        ("BMI2", std::is_x86_feature_detected!("bmi2")),
        ("AVX", std::is_x86_feature_detected!("avx")),
    ];
    if let Some((name, _)) = have.iter().find(|(_, h)| !h) {
        return Err(SetupError::Host(name));
    }
    // FSGSBASE has to be allowed by the kernel too; it says so in AT_HWCAP2 bit 1.
    // SAFETY: reads the auxiliary vector.
    if unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 == 0 {
        return Err(SetupError::Host("FSGSBASE"));
    }
    Ok(())
}

/// How well user code can be left to the processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectExecution {
    /// There are pages that can be executed only (protection keys); else pages with much that must not
    /// be executed are translated.
    pub execute_only: bool,
}

/// Checks that user code can be left to the processor: that a process for it can be made.
///
/// # Errors
/// What the system refuses.
pub fn direct_check() -> std::io::Result<DirectExecution> {
    let stub = direct::stub::Stub::new(&[])?;
    Ok(DirectExecution { execute_only: stub.execute_only })
}

/// Makes the tables of the decoder and the encoder, which takes a millisecond, that the first translation
/// would make otherwise.
pub fn warm_up() {
    let mut nop = iced_x86::Instruction::default();
    iced_x86::Decoder::new(64, &[0x90], iced_x86::DecoderOptions::NONE).decode_out(&mut nop);
    // Both always work for this one.
    let _ = iced_x86::Encoder::new(64).encode(&nop, 0);
}

/// What the host's CPUID answers.
#[must_use]
pub fn host_cpuid() -> HostCpuid {
    HostCpuid::from_fn(|leaf, sub| {
        let r = core::arch::x86_64::__cpuid_count(leaf, sub);
        [r.eax, r.ebx, r.ecx, r.edx]
    })
}

/// Translates `bytes` as one page of guest code in a mode of 16, 32 or 64 bits without running it;
/// gives the bytes of host code. For fuzzing the path from the decoder to the emitter.
///
/// # Errors
/// [`SetupError`] when the code cache cannot be mapped.
pub fn translate_only(bytes: &[u8], bits: u8) -> Result<usize, SetupError> {
    fuzz::translate_only(bytes, bits)
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
pub struct Kicker {
    mailbox: Arc<shared::Mailbox>,
}

impl Kicker {
    /// Makes [`TranslatedVcpu::run`] return [`Exit::Kicked`] soon (or at once, when it is not
    /// running now: the next call returns).
    pub fn kick(&self) {
        self.mailbox.poke(&self.mailbox.kick);
    }

    /// Tells the vCPU to ask its platform for a pending interrupt at the next instruction
    /// boundary.
    pub fn interrupt(&self) {
        self.mailbox.poke(&self.mailbox.irq);
    }

    /// Delivers a non-maskable interrupt.
    pub fn nmi(&self) {
        self.mailbox.poke(&self.mailbox.nmi);
    }
}

/// A virtual processor whose code is translated. Runs on the thread that calls
/// [`TranslatedVcpu::run`].
pub struct TranslatedVcpu {
    inner: Box<vcpu::Inner>,
}

// SAFETY: the mappings `Inner` points to have no thread affinity; generated code and the GS base are
// set up on each `run`, on the thread that calls it; `&mut self` makes that one thread at a time.
unsafe impl Send for TranslatedVcpu {}

impl TranslatedVcpu {
    /// Makes a vCPU in the given state.
    ///
    /// # Errors
    /// [`SetupError`] when memory for tables or code cannot be mapped.
    pub fn new(
        shared: Arc<Shared>,
        state: CpuState,
        cpuid: CpuidTable,
        platform: Box<dyn Platform>,
    ) -> Result<Self, SetupError> {
        Self::with_code(shared, state, cpuid, platform, None)
    }

    /// The same with what another vCPU, in this state and with this memory, has translated.
    ///
    /// # Errors
    /// As [`TranslatedVcpu::new`].
    pub fn with_code(
        shared: Arc<Shared>,
        state: CpuState,
        cpuid: CpuidTable,
        platform: Box<dyn Platform>,
        code: Option<TakenCode>,
    ) -> Result<Self, SetupError> {
        Ok(Self { inner: vcpu::Inner::new(shared, state, cpuid, platform, code)? })
    }

    /// Shares what was translated so far with vCPUs in other processes.
    ///
    /// # Errors
    /// The system refuses, or it is too much; this one can go on.
    pub fn share_code(&mut self) -> std::io::Result<SharedCode> {
        self.inner.share_code()
    }

    /// The architectural state; complete whenever `run` is not active.
    #[must_use]
    pub fn state(&self) -> &CpuState {
        self.inner.state_ref()
    }

    /// Changes the architectural state; all cached address translations are dropped before the next
    /// instruction.
    pub fn state_mut(&mut self) -> &mut CpuState {
        self.inner.state_changed = true;
        self.inner.inherited = false;
        self.inner.state()
    }

    /// The platform given at creation.
    #[must_use]
    pub fn platform_mut(&mut self) -> &mut dyn Platform {
        &mut *self.inner.lin.platform
    }

    /// Runs guest code until something outside has to be done.
    pub fn run(&mut self) -> Exit {
        self.inner.run()
    }

    /// Gives the memory of tables back that are filled again as they are needed; for a vCPU that has
    /// nothing to do.
    pub fn rest(&mut self) {
        self.inner.rest();
    }

    /// A handle for other threads.
    #[must_use]
    pub fn kicker(&self) -> Kicker {
        Kicker { mailbox: self.inner.mailbox.clone() }
    }

    /// Makes [`TranslatedVcpu::run`] leave generated code after so many host instructions, then after
    /// one more than that and so on, as it does when something outside is to be done; 0: no more. Slow;
    /// for tests of just that.
    pub fn stop_after(&mut self, host_instructions: u32) {
        self.inner.stop_after = host_instructions;
    }

    /// Counts since creation.
    #[must_use]
    pub fn stats(&self) -> Stats {
        self.inner.report().stats
    }
}
