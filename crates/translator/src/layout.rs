//! Register assignment and the per-vCPU area that generated code addresses through the GS base.
//!
//! ```text
//!   -AREA_SIZE-JC_SIZE  the jump cache of this view
//!   -AREA_SIZE          [`Area`], the same pages in every view
//!   gs base ──►  0      soft TLB: one u64 per guest linear page (index = linear address bits
//!                       12..=47), the value to add to a guest address to get the host address;
//!                       for unknown pages the sum has no access (see `tlb`)
//! ```
//!
//! Guest registers live in host registers of the same number while generated code runs, except:
//! host RSP is the return stack (see `returns`), RCX (wanted by JRCXZ), R10 and R11 are scratch;
//! guest RCX lives in R14, guest RSP in R15, and guest R10, R11, R14 and R15 stay in
//! [`Area::state`].

use berth_x86::state::flags;
use berth_x86::{CpuState, Segment};

/// Host register numbers.
pub mod host {
    pub const RAX: u8 = 0;
    pub const RCX: u8 = 1;
    pub const RDX: u8 = 2;
    pub const RBX: u8 = 3;
    pub const RSP: u8 = 4;
    pub const RBP: u8 = 5;
    pub const RSI: u8 = 6;
    pub const RDI: u8 = 7;
    pub const R12: u8 = 12;
    pub const R13: u8 = 13;
    pub const R14: u8 = 14;
    pub const R15: u8 = 15;
}

/// First scratch register: the effective address of a memory operand.
pub const S0: u8 = 10;
/// Second scratch register.
pub const S1: u8 = 11;
/// Third scratch register, the one JRCXZ tests.
pub const SC: u8 = host::RCX;
/// Where the guest's RSP lives.
pub const GUEST_RSP: u8 = host::R15;
/// Where the guest's RCX lives.
pub const GUEST_RCX: u8 = host::R14;

/// The host register that holds a guest register, or `None` when it stays in memory.
#[must_use]
pub const fn mapped(guest: u8) -> Option<u8> {
    match guest {
        1 => Some(GUEST_RCX),
        4 => Some(GUEST_RSP),
        10 | 11 | 14 | 15 => None,
        r => Some(r),
    }
}

/// Bytes of [`Area`] (and of its mapping), a multiple of the page size.
pub const AREA_SIZE: usize = 16 << 10;
/// Entries of a jump cache: indexed by the lowest bits of the guest address, all of them, since
/// what is hot lies close together.
pub const JC_ENTRIES: usize = 1 << 16;
/// Bytes of a jump cache; an entry is the negated guest address and the host address.
pub const JC_SIZE: usize = JC_ENTRIES * 16;
/// Largest power-of-two access that the inline path handles, as a shift.
pub const MAX_ACCESS_SHIFT: usize = 10;

/// Windows of a block.
pub const WINDOWS: usize = 16;

/// Bytes of the bounce buffer: the largest single access (an XSAVE area) fits.
pub const BOUNCE_SIZE: usize = 2048;

/// Masks for PEXT and PDEP that take flags words apart: [`Area::flag_mask`].
pub const FLAG_MASKS: [u64; 5] = [
    flags::IF,
    !flags::IF,
    !flags::AC,
    flags::ARITH | flags::DF,
    // What PUSHF stores of the rest.
    flags::FIXED
        | flags::TF
        | flags::IF
        | flags::IOPL
        | flags::NT
        | flags::AC
        | flags::VIF
        | flags::VIP
        | flags::ID,
];

/// Index in [`FLAG_MASKS`].
#[derive(Clone, Copy, Debug)]
pub enum FlagMask {
    /// IF.
    If,
    /// All but IF.
    NotIf,
    /// All but AC.
    NotAc,
    /// What host RFLAGS hold.
    Host,
    /// What PUSHF stores of what the state holds.
    Rest,
}

/// Why generated code returned to the dispatcher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum ExitCode {
    /// A direct jump that is not linked yet; [`SC`] is the number of the link, and goes to
    /// [`Area::exit_arg`].
    Link = 1,
    /// A jump missed the jump cache; the target is in [`S0`] and goes to [`Area::exit_rip`], the
    /// number of the branch, or an unknown one, is in [`SC`] and goes to [`Area::exit_arg`].
    Indirect = 2,
    /// A stop signal came, or the block has nothing to go on with; RIP is in [`Area::exit_rip`].
    Interrupt = 3,
    /// A helper asked for it; everything is in the state.
    Helper = 4,
    /// A host signal at [`Area::fault_pc`].
    Fault = 5,
    /// A return went to where no call is known and missed the jump cache; the target is in
    /// [`S0`], too, the number of the return in [`Area::return_number`].
    Return = 6,
    /// [`Area::run`] was zero on the way in: nothing has been executed.
    NotBegun = 7,
}

/// What generated code and helpers share. Addressed relative to GS; see the module.
#[repr(C, align(4096))]
pub struct Area {
    /// The architectural state. While generated code runs: the mapped general registers, the
    /// arithmetic flags and DF are in host registers, RIP is implied by the host's.
    pub state: CpuState,
    /// YMM registers while not in generated code.
    pub ymm: [[u8; 32]; 16],
    /// Whether upper halves of YMM registers are to be loaded on the way into generated code; they are
    /// zero if not.
    pub upper: u64,
    /// MXCSR of the guest while not in generated code.
    pub mxcsr: u32,
    /// MXCSR for our own code.
    pub host_mxcsr: u32,
    /// Zero when the vCPU has to leave generated code at the next instruction boundary. Looked at on
    /// the way into generated code; whoever zeroes it from outside sends a signal, too.
    pub run: u64,
    /// Stack pointer of generated code in a thunk that calls Rust; it points to the return address.
    pub thunk_sp: u64,
    /// The signal handler steps to the next instruction boundary.
    pub stepping: u64,
    /// Host stack pointer at entry.
    pub host_rsp: u64,
    /// Stack pointer of generated code: the return stack (see [`crate::returns`]).
    pub return_sp: u64,
    /// The return stack's pointer when it is empty.
    pub return_top: u64,
    /// [`crate::thunks::Thunks::barrier`].
    pub barrier: u64,
    /// Where user code's part of the return stack ended at the last SYSCALL.
    pub user_return_sp: u64,
    /// What SYSCALL leaves of RFLAGS.
    pub syscall_keep: u64,
    /// How SYSCALL goes to the kernel.
    pub syscall: Gate,
    /// How SYSRET goes to user code.
    pub sysret: Gate,
    /// Times that generated code executed SYSCALL.
    pub syscalls: u64,
    /// Generated code went from user code to the kernel or back since this was cleared.
    pub crossed: u64,
    /// Number of the last return instruction.
    pub return_number: u64,
    /// The `vcpu::Inner` that owns this area.
    pub owner: u64,
    /// Scratch registers at a call of a thunk.
    pub s0: u64,
    /// Second scratch register at a call of a thunk.
    pub s1: u64,
    /// Third scratch register at a call of a thunk.
    pub sc: u64,
    /// Why generated code was left ([`ExitCode`]).
    pub exit_code: u64,
    /// Argument of the exit.
    pub exit_arg: u64,
    /// RIP of the exit.
    pub exit_rip: u64,
    /// Host PC of a signal.
    pub fault_pc: u64,
    /// Signal number.
    pub fault_signal: u64,
    /// Address of an access that could not be made.
    pub fault_address: u64,
    /// x86 trap number of a signal.
    pub fault_trap: u64,
    /// PEXT masks that find the page index for user code, supervisor code.
    pub page_mask: [u64; 2],
    /// PEXT masks that select the offset within a page in units of `1 << shift` bytes.
    pub slot_mask: [u64; MAX_ACCESS_SHIFT + 1],
    /// PEXT masks of a bit index within 1, 2, 4, 8 bytes.
    pub bit_mask: [u64; 4],
    /// Addends of the windows of the block that runs (see `translate::share`).
    pub windows: [u64; WINDOWS],
    /// The second scratch register while cold code needs it.
    pub look_s1: u64,
    /// PEXT and PDEP masks of flags ([`FLAG_MASKS`]).
    pub flag_mask: [u64; FLAG_MASKS.len()],
    /// The platform may have an interrupt.
    pub irq: u64,
    /// RIP for which `interrupt_shadow` holds.
    pub shadow_rip: u64,
    /// GS bases of supervisor code with AC clear, set.
    pub kernel_base: [u64; 2],
    /// PEXT mask of DF in RFLAGS.
    pub df_mask: u64,
    /// PEXT masks of what is too much for a run of string elements of 1, 2, 4, 8 bytes within 4096
    /// bytes, in a number of elements less one.
    pub run_mask: [u64; 4],
    /// While a long REP CMPS or REP SCAS is under way: RFLAGS from before it; else 0. Whoever leaves
    /// it in the middle finds these flags (SDM vol. 2, REP).
    pub string_flags: u64,
    /// A value that has to survive a second access of the same instruction.
    pub tmp: u64,
    /// Where to enter generated code.
    pub enter_pc: u64,
    /// RFLAGS as the host has them: arithmetic flags and DF of the guest.
    pub host_flags: u64,
    /// Where accesses go that cannot go to memory directly.
    pub bounce: Bounce,
}

/// What SYSCALL or SYSRET loads; see `translate::gate`.
#[repr(C)]
pub struct Gate {
    /// Not zero: the helper has to execute the instruction.
    pub closed: u64,
    /// CS.
    pub cs: Segment,
    /// SS.
    pub ss: Segment,
    /// GS base: the view.
    pub base: u64,
}

/// The bounce buffer.
#[repr(C, align(64))]
pub struct Bounce(pub [u8; BOUNCE_SIZE]);

const _: () = assert!(size_of::<Area>() <= AREA_SIZE);

/// GS-relative displacement of a field of [`Area`] at `offset`.
#[must_use]
#[allow(
    clippy::cast_possible_wrap,
    clippy::cast_possible_truncation,
    reason = "AREA_SIZE is small"
)]
pub const fn disp(offset: usize) -> i32 {
    offset as i32 - AREA_SIZE as i32
}

/// GS-relative displacement of the state field at `offset` of [`CpuState`].
#[must_use]
pub const fn state_disp(offset: usize) -> i32 {
    disp(std::mem::offset_of!(Area, state) + offset)
}

/// GS-relative displacement of [`Area::tmp`].
pub const TMP: i32 = disp(std::mem::offset_of!(Area, tmp));

/// GS-relative displacement of a guest general register's slot.
#[must_use]
pub const fn gpr_disp(guest: u8) -> i32 {
    state_disp(std::mem::offset_of!(CpuState, gpr) + guest as usize * 8)
}

/// GS-relative displacement of the jump cache's negated guest addresses, 16 bytes apart.
pub const JC_TAGS: i32 = -((AREA_SIZE + JC_SIZE) as i32);
/// GS-relative displacement of the jump cache's host addresses.
pub const JC_TARGETS: i32 = JC_TAGS + 8;

/// Bytes of an entry of the jump cache.
const JC_ENTRY: i32 = 16;

/// GS-relative displacements of the entry of a guest address in the jump cache: its tag, its target.
pub const fn jump_cache_entry(rip: u64) -> (i32, i32) {
    let at = (rip & 0xffff) as i32 * JC_ENTRY;
    (JC_TAGS + at, JC_TARGETS + at)
}

/// What becomes of such a displacement when the guest address moves by `delta`.
pub const fn jump_cache_moved(entry: i32, delta: u64) -> i32 {
    let offset = entry - JC_TAGS;
    let index = (offset / JC_ENTRY) as u64;
    let moved = index.wrapping_add(delta) & 0xffff;
    JC_TAGS + moved as i32 * JC_ENTRY + offset % JC_ENTRY
}
