//! What a guest that runs uses of what its machine has: fewer processors, less memory. What it was
//! started with is the most.

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use berth_api::size::Size;
use berth_api::v1::machine::MachineState;
use berth_api::vmm::RESIZE_TIME;

use crate::command;
use crate::vmm::control::{Agent, Control};

const POLL: Duration = Duration::from_millis(5);

impl Control {
    /// Lets the guest use only so many of its processors.
    pub(super) fn use_cpus(self: &Arc<Self>, count: u8) -> Result<(), String> {
        let status = self.status();
        if count > status.cpus {
            return Err(format!("it was started with {}", status.cpus));
        }
        if status.state != MachineState::Running {
            return Err("its guest stands still, and cannot be asked".into());
        }
        let asked = command::use_cpus(&mut Agent(Arc::clone(self)), RESIZE_TIME, u32::from(count));
        match asked {
            Ok(_) => Ok(()),
            Err(error) => Err(berth_daemon::failure::chain(&error)),
        }
    }

    /// Leaves the guest only so much of its memory: the balloon has the rest.
    pub(super) fn set_memory(&self, bytes: u64) -> Result<(), String> {
        let status = self.status();
        let all = status.memory_bytes;
        let Some(rest) = all.checked_sub(bytes) else {
            return Err(format!("it was started with {}", Size::from(all)));
        };
        let Some(balloon) = self.ends.balloon.get().filter(|balloon| balloon.is_used()) else {
            if rest == 0 {
                return Ok(());
            }
            return Err("its guest has no driver for a balloon".into());
        };
        balloon.want(rest);
        if status.state != MachineState::Running {
            return Err("its guest stands still, and gives memory when it goes on".into());
        }
        let began = Instant::now();
        while balloon.given() != balloon.wanted() {
            if self.ending.outcome().is_some() || began.elapsed() > RESIZE_TIME {
                let has = Size::from(all.saturating_sub(balloon.given()));
                return Err(format!("its guest has {has} so far, and goes on with that as it can"));
            }
            thread::sleep(POLL);
        }
        Ok(())
    }
}
