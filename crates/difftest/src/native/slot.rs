//! What parent and child exchange: one shared mapping with a header and [`SLOTS`] cases.
//!
//! The child must not allocate, so everything has a fixed size here.

use std::sync::atomic::AtomicU32;

use berth_x86::state::XsaveArea;

use crate::case::{Case, Fault, Final, Mode, Outcome};
use crate::layout::IMAGE;

/// Cases in one batch.
pub const SLOTS: usize = 64;
/// Pieces of memory a case may change.
pub const PATCHES: usize = 64;
/// Bytes of one piece.
pub const PATCH_BYTES: usize = 64;
/// Words of the image.
pub const WORDS: usize = IMAGE as usize / 8;

/// State of the exchange.
#[repr(C)]
pub struct Header {
    /// Number of batches ordered; the child sleeps on it.
    pub ordered: AtomicU32,
    /// Number of batches done; the parent sleeps on it.
    pub done: AtomicU32,
    /// First case of the batch to run.
    pub first: AtomicU32,
    /// Number of cases in the batch.
    pub count: AtomicU32,
    /// The case being run.
    pub current: AtomicU32,
}

/// A piece of memory to change.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct PatchSlot {
    pub offset: u32,
    pub len: u32,
    pub data: [u8; PATCH_BYTES],
}

/// Registers to load; the trampoline knows the offsets.
#[repr(C, align(64))]
pub struct Input {
    pub xsave: XsaveArea,
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    /// Selector for DS and ES.
    pub data_selector: u64,
    /// Selector of CS.
    pub code_selector: u64,
    pub world: u32,
    pub patch_count: u32,
    pub patches: [PatchSlot; PATCHES],
}

/// How a case ended.
#[repr(C, align(64))]
pub struct Output {
    pub xsave: XsaveArea,
    pub gpr: [u64; 16],
    pub rip: u64,
    pub rflags: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub cr2: u64,
    pub error: u64,
    pub vector: u32,
    pub signal: u32,
    pub selectors: [u16; 6],
    pub changed: u32,
    pub words: [(u32, u64); WORDS],
}

/// One case.
#[repr(C, align(64))]
pub struct Slot {
    pub input: Input,
    pub output: Output,
}

/// The whole mapping.
#[repr(C, align(4096))]
pub struct Exchange {
    pub header: Header,
    pub slots: [Slot; SLOTS],
}

/// The case needs more patches than a slot holds.
#[derive(Debug, thiserror::Error)]
#[error("the case changes more than {PATCHES} pieces of {PATCH_BYTES} bytes of memory")]
pub struct TooManyPatches;

impl Input {
    /// Fills the slot from a case.
    pub fn load(&mut self, case: &Case) -> Result<(), TooManyPatches> {
        self.xsave.clone_from(&case.xsave);
        self.gpr = case.gpr;
        self.rip = case.entry();
        self.rflags = case.rflags | 0x202;
        self.fs_base = case.fs_base;
        self.gs_base = case.gs_base;
        (self.data_selector, self.code_selector) = match case.mode {
            Mode::Bits64 => (0, u64::from(crate::case::selector::CODE64)),
            Mode::Compat32 => {
                (u64::from(crate::case::selector::DATA), u64::from(crate::case::selector::CODE32))
            }
        };
        self.world = case.world.index() as u32;
        self.patch_count = 0;
        for (offset, data) in case.all_patches() {
            for (i, piece) in data.chunks(PATCH_BYTES).enumerate() {
                let slot = self.patches.get_mut(self.patch_count as usize).ok_or(TooManyPatches)?;
                slot.offset = offset + (i * PATCH_BYTES) as u32;
                slot.len = piece.len() as u32;
                slot.data[..piece.len()].copy_from_slice(piece);
                self.patch_count += 1;
            }
        }
        Ok(())
    }
}

impl Output {
    /// The outcome the slot describes.
    pub fn outcome(&self) -> Outcome {
        if self.signal == libc::SIGSYS as u32 {
            return Outcome::SystemCall;
        }
        let vector = self.vector as u8;
        let page_fault = vector == berth_x86::state::vector::PF;
        let count = (self.changed as usize).min(WORDS);
        Outcome::Stopped(Box::new(Final {
            gpr: self.gpr,
            rip: self.rip,
            rflags: self.rflags,
            selectors: self.selectors,
            fs_base: self.fs_base,
            gs_base: self.gs_base,
            fault: Fault {
                vector,
                error: self.error as u32,
                cr2: if page_fault { self.cr2 } else { 0 },
            },
            xsave: self.xsave.clone(),
            memory: self.words[..count].to_vec(),
        }))
    }
}
