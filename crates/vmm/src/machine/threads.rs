//! The thread of a vCPU.
//!
//! ```text
//!            INIT                 start-up
//! running ─────────► waiting ───────────────► running
//!    │  ▲ interrupt, NMI                      (a vCPU that is not the first begins as waiting)
//!    ▼  │
//!   halted             stop, from any state ──► the thread ends
//! ```
//!
//! Under KVM all of this but "stop" happens inside KVM. Between any two steps a vCPU may be paused.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::chips::lapic::Lapic;
use crate::confine::{self, Kind};
use crate::error::MachineError;
use crate::outcome::{Ending, Outcome};
use crate::vcpu::mailbox::{Mailbox, Standing};
use crate::vcpu::{Vcpu, VcpuError, VcpuExit};

/// A vCPU rests that has been halted for so long...
const HALTED_TIME: Duration = Duration::from_millis(250);
/// ...and has worked for so long since it last rested.
const WORK_TIME: Duration = Duration::from_millis(10);

/// All that a vCPU's thread needs.
pub(super) struct Runner {
    pub(super) index: u32,
    pub(super) vcpu: Box<dyn Vcpu>,
    /// The local APIC, unless it is inside the vCPU.
    pub(super) apic: Option<Arc<Lapic>>,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) ending: Arc<Ending>,
    /// It waits for a start-up message.
    pub(super) waiting: bool,
}

/// Ends the machine when its thread panics, and tells whoever waits for the vCPU that it is gone.
struct PanicGuard(Arc<Ending>, u32, Arc<Mailbox>);

impl Drop for PanicGuard {
    fn drop(&mut self) {
        self.2.ended();
        if std::thread::panicking() {
            self.0.end(Outcome::Failed(format!("the thread of vCPU {} panicked", self.1)));
        }
    }
}

impl Runner {
    /// Starts the thread.
    pub(super) fn spawn(self) -> Result<JoinHandle<()>, MachineError> {
        let index = self.index;
        let thread = std::thread::Builder::new().name(format!("vcpu{index}"));
        thread.spawn(move || self.run()).map_err(|source| MachineError::Thread { index, source })
    }

    fn run(mut self) {
        let _guard = PanicGuard(Arc::clone(&self.ending), self.index, Arc::clone(&self.mailbox));
        // Sleeps of this thread are waits for timer interrupts: no slack.
        // SAFETY: PR_SET_TIMERSLACK takes one integer and has no memory effects.
        unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1, 0, 0, 0) };
        confine::enter(Kind::Vcpu);
        if let Err(error) = self.serve() {
            self.ending.end(Outcome::Failed(with_causes(&error)));
        }
    }

    fn serve(&mut self) -> Result<(), VcpuError> {
        let mut waiting = self.waiting;
        let mut worked = Duration::ZERO;
        loop {
            let mut mail = self.mailbox.take();
            while mail.pause && !mail.stop {
                // Without its state it cannot be stored, but it can stand still.
                let standing = self.vcpu.inside().and_then(|inside| {
                    Ok(Standing { state: self.vcpu.state()?, inside, waiting, mail })
                });
                let standing = standing.inspect_err(|error| {
                    tracing::warn!(index = self.index, why = with_causes(error), "no state");
                });
                if let Some(errand) = self.mailbox.stand_still(standing.ok()) {
                    errand(&mut *self.vcpu);
                    continue;
                }
                self.vcpu.stood_still();
                mail = mail.and(self.mailbox.take());
            }
            if mail.stop {
                return Ok(());
            }
            if mail.init {
                if self.index == 0 {
                    // The boot processor would start at the reset vector, where firmware would be.
                    self.ending.end(Outcome::Reset);
                    continue;
                }
                self.init()?;
                waiting = true;
            }
            if waiting {
                let Some(vector) = mail.startup else {
                    self.mailbox.wait();
                    continue;
                };
                let mut state = self.vcpu.state()?;
                state.sipi(vector);
                self.vcpu.set_state(&state)?;
                waiting = false;
            }
            let began = Instant::now();
            let exit = self.vcpu.run()?;
            worked += began.elapsed();
            match exit {
                VcpuExit::Halted if worked < WORK_TIME => self.mailbox.wait(),
                VcpuExit::Halted if self.mailbox.wait_for(HALTED_TIME) => {}
                VcpuExit::Halted => {
                    self.vcpu.rest();
                    give_back_free_memory();
                    worked = Duration::ZERO;
                    self.mailbox.wait();
                }
                VcpuExit::Kicked => {}
                VcpuExit::Shutdown => self.ending.end(Outcome::TripleFault),
            }
        }
    }

    fn init(&mut self) -> Result<(), VcpuError> {
        let mut state = self.vcpu.state()?;
        state.init(false);
        if let Some(apic) = &self.apic {
            apic.reset();
        }
        self.vcpu.set_state(&state)
    }
}

/// Gives what the heap has free to the system: a start needs more than what comes after it.
fn give_back_free_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes a number of bytes to keep, and may be called by any thread at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// An error with its causes, for an outcome.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
