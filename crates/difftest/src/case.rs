//! A case (what is run) and its outcome (what is compared).

use berth_x86::state::XsaveArea;

use crate::layout::{CODE, World};

/// Which mode the instructions run in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// 64-bit code.
    Bits64,
    /// 32-bit code under a 64-bit kernel; only in the low world.
    Compat32,
}

/// Selectors as a 64-bit Linux process has them; the guest's GDT is laid out alike.
pub mod selector {
    /// 32-bit user code.
    pub const CODE32: u16 = 0x23;
    /// User data.
    pub const DATA: u16 = 0x2b;
    /// 64-bit user code.
    pub const CODE64: u16 = 0x33;
}

/// Bytes put into the image before the case runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Patch {
    /// Offset in the image (see [`crate::layout`]).
    pub offset: u32,
    /// The bytes.
    pub data: Vec<u8>,
}

/// Where an instruction lies in [`Case::code`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// First byte.
    pub start: u16,
    /// Length.
    pub len: u8,
}

/// A sequence of instructions with all state it starts from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Case {
    /// Decoding mode.
    pub mode: Mode,
    /// Base address.
    pub world: World,
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// Flags; IF and the fixed bit are set by the backends.
    pub rflags: u64,
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
    /// x87, SSE and AVX state in the standard format with XSTATE_BV = 7.
    pub xsave: XsaveArea,
    /// Memory contents that differ from [`crate::layout::base_image`]; the code is separate.
    pub patches: Vec<Patch>,
    /// Where the code begins, as an offset in the code region.
    pub code_at: u32,
    /// The instructions.
    pub code: Vec<u8>,
    /// Boundaries of the instructions.
    pub spans: Vec<Span>,
    /// Pieces of memory (image offset, length) whose contents are not architectural, such as the
    /// x87's last instruction pointer in an FXSAVE image.
    pub masked: Vec<(u32, u32)>,
    /// Host instructions after which a translator that is stopped on the way is stopped first.
    pub stop_after: u32,
}

impl Case {
    /// Linear address of the first instruction.
    #[must_use]
    pub fn entry(&self) -> u64 {
        self.world.base() + u64::from(CODE.offset + self.code_at)
    }

    /// Linear address after the last instruction.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.entry() + self.code.len() as u64
    }

    /// What iced-x86 calls the mode.
    #[must_use]
    pub const fn bitness(&self) -> u32 {
        match self.mode {
            Mode::Bits64 => 64,
            Mode::Compat32 => 32,
        }
    }

    /// All memory changes, the code included, in the order in which they are made.
    pub fn all_patches(&self) -> impl Iterator<Item = (u32, &[u8])> {
        let code = (CODE.image + self.code_at, self.code.as_slice());
        self.patches.iter().map(|p| (p.offset, p.data.as_slice())).chain([code])
    }
}

/// Why a sequence stopped; every sequence ends in an exception.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// Error code; 0 for exceptions without one.
    pub error: u32,
    /// The faulting address for #PF, otherwise 0.
    pub cr2: u64,
}

/// The state when a sequence has stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Final {
    /// General registers in encoding order.
    pub gpr: [u64; 16],
    /// The saved instruction pointer.
    pub rip: u64,
    /// The saved flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS.
    pub selectors: [u16; 6],
    /// Base of FS.
    pub fs_base: u64,
    /// Base of GS.
    pub gs_base: u64,
    /// The exception.
    pub fault: Fault,
    /// x87, SSE and AVX state.
    pub xsave: XsaveArea,
    /// Aligned 8-byte words of the image that changed: (image offset, new value), ascending.
    pub memory: Vec<(u32, u64)>,
}

/// What a backend made of a case.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The sequence ended in an exception.
    Stopped(Box<Final>),
    /// It ran too long and was ended.
    Timeout,
    /// It made a system call, which has no counterpart in the guest.
    SystemCall,
    /// The processor reset (a triple fault), the backend panicked, or it stopped in another way that
    /// no sequence may cause.
    Broken(String),
}

/// Something that runs cases.
pub trait Backend {
    /// Runs one case from its initial state.
    fn run(&mut self, case: &Case) -> Outcome;

    /// Runs several; backends that can do so faster than one by one override this.
    fn run_batch(&mut self, cases: &[Case]) -> Vec<Outcome> {
        cases.iter().map(|case| self.run(case)).collect()
    }
}
