//! The state of a vCPU after power-up.

use berth_x86::CpuState;

/// MTRRs on, everything write-back, as firmware would leave them: caching is the host's affair.
const MTRR_DEF_TYPE: u64 = 1 << 11 | 6;

/// After power-up and what firmware does to every processor.
#[must_use]
pub fn power_up() -> CpuState {
    let mut state = CpuState::reset(true);
    state.mtrr_def_type = MTRR_DEF_TYPE;
    state
}
