//! The one place where a machine is started. Everything above it decides what to run
//! ([`RunPlan`]); everything below is the machine's own business.

use crate::exit::ExitCode;
use crate::plan::RunPlan;

/// Why a machine did not run to its end.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// This build has none.
    #[error("cannot run {name}: this build of berth contains no machine")]
    Absent {
        /// The machine's name.
        name: String,
    },
}

/// Starts the machine and stays with it until it ends.
///
/// # Errors
/// [`MachineError`] when it cannot be started or ends other than in order.
pub fn run_machine(plan: &RunPlan) -> Result<ExitCode, MachineError> {
    Err(MachineError::Absent { name: plan.name.clone() })
}
