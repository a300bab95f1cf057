//! What other threads want from a vCPU: interrupts, INIT, start-up, NMI, stop. A halted vCPU sleeps
//! here.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};

use crate::chips::lapic::CpuSignals;
use crate::vcpu::VcpuHandle;

/// What has been asked for since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mail {
    /// The vCPU ends.
    pub stop: bool,
    /// INIT was received.
    pub init: bool,
    /// A start-up message was received (after INIT, when that is set too).
    pub startup: Option<u8>,
}

#[derive(Default)]
struct State {
    mail: Mail,
    /// Something happened that a halted vCPU has to look at.
    woken: bool,
    asleep: bool,
}

/// The mailbox of one vCPU.
#[derive(Default)]
pub struct Mailbox {
    state: Mutex<State>,
    wake: Condvar,
    handle: OnceLock<Arc<dyn VcpuHandle>>,
}

impl Mailbox {
    /// Connects the vCPU; mail from before is noticed at its first look.
    pub fn connect(&self, handle: Arc<dyn VcpuHandle>) {
        if self.handle.set(handle).is_err() {
            tracing::error!("a vCPU was connected twice");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn post(&self, change: impl FnOnce(&mut Mail)) {
        let mut state = self.lock();
        change(&mut state.mail);
        state.woken = true;
        let asleep = state.asleep;
        drop(state);
        if asleep {
            self.wake.notify_one();
        } else if let Some(handle) = self.handle.get() {
            handle.kick();
        }
    }

    /// Ends the vCPU.
    pub fn stop(&self) {
        self.post(|mail| mail.stop = true);
    }

    /// Takes what was asked for; `stop` stays.
    pub fn take(&self) -> Mail {
        let mut state = self.lock();
        let stop = state.mail.stop;
        std::mem::replace(&mut state.mail, Mail { stop, ..Mail::default() })
    }

    /// Sleeps until something happens, or returns at once when it has since the last call.
    pub fn wait(&self) {
        let mut state = self.lock();
        state.asleep = true;
        while !state.woken && !state.mail.stop {
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.asleep = false;
        state.woken = false;
    }
}

impl CpuSignals for Mailbox {
    fn interrupt(&self) {
        let mut state = self.lock();
        state.woken = true;
        let asleep = state.asleep;
        drop(state);
        // Also when it sleeps: it asks for interrupts only when it was told of one.
        if let Some(handle) = self.handle.get() {
            handle.interrupt();
        }
        if asleep {
            self.wake.notify_one();
        }
    }

    fn nmi(&self) {
        if let Some(handle) = self.handle.get() {
            handle.nmi();
        }
        self.interrupt();
    }

    fn init(&self) {
        self.post(|mail| {
            mail.init = true;
            mail.startup = None;
        });
    }

    fn startup(&self, vector: u8) {
        self.post(|mail| mail.startup = mail.startup.or(Some(vector)));
    }
}

#[cfg(test)]
mod tests {
    use super::{Mail, Mailbox};
    use crate::chips::lapic::CpuSignals;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn a_sleeper_wakes_and_earlier_interrupts_are_not_lost() {
        let mailbox = Arc::new(Mailbox::default());
        mailbox.interrupt();
        mailbox.wait();
        let waker = Arc::clone(&mailbox);
        let thread = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            waker.startup(7);
            waker.startup(8);
        });
        mailbox.wait();
        thread.join().unwrap();
        assert_eq!(mailbox.take(), Mail { startup: Some(7), ..Mail::default() });
        assert_eq!(mailbox.take(), Mail::default());
        mailbox.stop();
        mailbox.wait();
        assert!(mailbox.take().stop && mailbox.take().stop);
    }
}
