//! Guest user code executed by the host's processor itself, where that pays.
//!
//! A [`stub::Stub`] is a process whose memory shows a guest address space as the guest's page tables
//! do ([`space::Space`]); the guest's kernel is translated as ever. System calls, page faults and
//! whatever else user code may not do stop the process, and the translator goes on from there: it
//! executes the instruction and raises what is to be raised. What is mapped follows the rules of the
//! software TLB: pages of RAM only, for user code, with the accessed bit, writable only if dirty and
//! without translations, dropped when the guest asks for a flush. See `docs/adr/0016`.

pub mod copy;
pub mod policy;
pub mod scan;
pub mod space;
pub mod stub;

use std::time::Instant;

use berth_x86::state::XsaveArea;

use crate::code::FastMap;
use copy::{Copies, Copy};
use policy::{Policy, Sample};
use space::{Places, Space};

/// What a vCPU has for it.
#[derive(Default)]
pub struct Direct {
    /// For each slot of the software TLB.
    pub spaces: Vec<Option<Box<Space>>>,
    /// The same.
    pub policies: Vec<Policy>,
    /// How often the guest's kernel is entered.
    pub sample: Sample,
    /// The thread that the processes belong to.
    pub thread: i32,
    /// User code is to be executed directly from here on.
    pub armed: bool,
    /// Until then interrupts do not count: user code that waits for its pages is not one that computes.
    pub not_before: Option<Instant>,
    /// Processes that could not be made or went wrong.
    pub failures: u32,
    /// By guest physical address, of pages with the bit of this vCPU in the map of code.
    pub verdicts: FastMap<u64, Verdict>,
    /// CPUID traps in the processes.
    pub cpuid_traps: bool,
    /// Pages are shown to them in pieces.
    pub pieces: bool,
    /// Where copies of pages are.
    pub copies: Option<Copies>,
    /// How often one of them was mapped.
    pub copies_used: u64,
    /// x87, SSE and AVX state as the process has it, and of which slot that is.
    pub floating: Option<(usize, Box<XsaveArea>)>,
}

/// Whether the processor may execute a page.
#[derive(Debug)]
pub struct Verdict {
    /// What it may execute.
    pub may: May,
    /// If the next page has to do with it: its guest physical address, or that it is not there.
    pub next: Option<Option<u64>>,
}

/// What the processor may execute of a page.
#[derive(Debug)]
pub enum May {
    /// Nothing.
    Nothing,
    /// All but the instructions at these offsets.
    But(Places),
    /// What this shows, once it was needed.
    Copy(Option<Box<Copy>>),
}

/// Accesses as data until a page of which there is a copy is translated instead.
pub const MOST_ACCESSES: u32 = 16;

/// Failures until it is not tried any more.
pub const MAX_FAILURES: u32 = 3;
