//! `berth check-state DIR`: whether a machine that was stored can go on here. The daemon asks before it
//! replaces anything by it.

use berth_vmm::fit::Fit;

use crate::args::snapshots::CheckStateArgs;
use crate::exit::ExitCode;
use crate::machine::accel_choice;

/// Says why not on standard error.
#[must_use]
pub fn check(args: &CheckStateArgs) -> ExitCode {
    let fit = Fit {
        accel: accel_choice(args.accel),
        cpus: u32::from(args.cpus),
        memory_bytes: args.memory.bytes(),
    };
    match fit.check(&args.directory) {
        Ok(_) => ExitCode::Success,
        Err(error) => {
            eprintln!("berth: {}", berth_daemon::failure::chain(&error));
            ExitCode::Failure
        }
    }
}
