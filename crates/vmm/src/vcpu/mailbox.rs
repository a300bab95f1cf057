//! What other threads want from a vCPU: interrupts, INIT, start-up, NMI, pause, stop. A halted vCPU
//! sleeps here, and one that is paused stands still here.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::time::Duration;

use berth_x86::CpuState;

use crate::chips::lapic::CpuSignals;
use crate::vcpu::{Inside, Vcpu, VcpuHandle};

/// What has been asked for since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Mail {
    /// The vCPU ends.
    pub stop: bool,
    /// It stands still until further notice.
    pub pause: bool,
    /// INIT was received.
    pub init: bool,
    /// A start-up message was received (after INIT, when that is set too).
    pub startup: Option<u8>,
}

impl Mail {
    /// With what came after it.
    #[must_use]
    pub fn and(self, later: Self) -> Self {
        let startup = if later.init { later.startup } else { self.startup.or(later.startup) };
        Self { startup, init: self.init || later.init, ..later }
    }
}

/// Something to be done on a vCPU's thread while the vCPU stands still.
pub type Errand = Box<dyn FnOnce(&mut dyn Vcpu) + Send>;

#[derive(Default)]
struct State {
    mail: Mail,
    /// Something happened that a halted vCPU has to look at.
    woken: bool,
    asleep: bool,
    /// It stands still, or has ended.
    still: bool,
    ended: bool,
    /// It is to look once more how it is, while it stands still.
    again: bool,
    /// How it is while it stands still.
    standing: Option<Standing>,
    /// What it is to do meanwhile.
    errand: Option<Errand>,
}

impl State {
    const fn is_awake(&self) -> bool {
        self.woken || self.mail.stop
    }

    const fn wake_up(&mut self) {
        (self.asleep, self.woken) = (false, false);
    }
}

/// A vCPU that stands still.
#[derive(Clone)]
pub struct Standing {
    /// Its registers.
    pub state: CpuState,
    /// What is inside of it besides.
    pub inside: Option<Inside>,
    /// It waits for a start-up message.
    pub waiting: bool,
    /// What was asked for and not yet done.
    pub mail: Mail,
}

/// The mailbox of one vCPU.
#[derive(Default)]
pub struct Mailbox {
    state: Mutex<State>,
    wake: Condvar,
    stood: Condvar,
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

    /// Makes the vCPU stand still; [`Self::wait_until_still`] says when it does.
    pub fn pause(&self) {
        self.post(|mail| mail.pause = true);
    }

    /// Lets it go on.
    pub fn unpause(&self) {
        self.lock().mail.pause = false;
        self.wake.notify_one();
    }

    /// Waits until the vCPU stands still after [`Self::pause`], or has ended.
    pub fn wait_until_still(&self) {
        let state = self.lock();
        let wait = self.stood.wait_while(state, |state| !state.still && state.mail.pause);
        drop(wait.unwrap_or_else(PoisonError::into_inner));
    }

    /// How the vCPU is, if it stands still and said so.
    pub fn standing(&self) -> Option<Standing> {
        self.lock().standing.clone()
    }

    /// On the vCPU's thread: stands still as long as it is asked to; others may look how it is. What
    /// is given is to be done at once, before it stands still again.
    #[must_use]
    pub fn stand_still(&self, standing: Option<Standing>) -> Option<Errand> {
        let mut state = self.lock();
        state.standing = standing;
        state.still = true;
        state.asleep = true;
        self.stood.notify_all();
        while state.mail.pause
            && !state.mail.stop
            && state.errand.is_none()
            && !std::mem::take(&mut state.again)
        {
            state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.asleep = false;
        let errand = state.errand.take();
        if errand.is_none() {
            state.still = false;
            state.standing = None;
        }
        errand
    }

    /// Has something done on the thread of the vCPU, which stands still before and after; `None` if it
    /// does not.
    pub fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut dyn Vcpu) -> T + Send + 'static,
    ) -> Option<T> {
        let (tell, told) = mpsc::channel();
        let mut state = self.lock();
        state.standing.as_ref()?;
        // The other end is there as long as we wait.
        state.errand = Some(Box::new(move |vcpu| drop(tell.send(what(vcpu)))));
        drop(state);
        self.wake.notify_one();
        // A vCPU that ends drops what it was to do.
        told.recv().ok()
    }

    /// On the vCPU's thread, as it ends: nobody waits for it any more.
    pub fn ended(&self) {
        let mut state = self.lock();
        (state.still, state.ended) = (true, true);
        state.standing = None;
        state.errand = None;
        drop(state);
        self.stood.notify_all();
    }

    /// Makes a vCPU that stands still look once more how it is: its interrupt controller, which may be
    /// inside of it, does not stand still.
    pub fn look_again(&self) {
        let mut state = self.lock();
        if state.still && !state.ended {
            (state.still, state.again, state.standing) = (false, true, None);
            drop(state);
            self.wake.notify_one();
            self.wait_until_still();
        }
    }

    /// What is asked for, which stays.
    pub fn peek(&self) -> Mail {
        self.lock().mail
    }

    /// Puts in what was asked for when the machine was stored.
    pub fn restore(&self, init: bool, startup: Option<u8>) {
        let mut state = self.lock();
        (state.mail.init, state.mail.startup) = (init, startup);
    }

    /// Takes what was asked for; `stop` and `pause` stay.
    pub fn take(&self) -> Mail {
        let mut state = self.lock();
        let Mail { stop, pause, .. } = state.mail;
        std::mem::replace(&mut state.mail, Mail { stop, pause, ..Mail::default() })
    }

    /// Sleeps until something happens, or returns at once when it has since the last call.
    pub fn wait(&self) {
        let awake = self.wake.wait_while(self.asleep(), |state| !state.is_awake());
        awake.unwrap_or_else(PoisonError::into_inner).wake_up();
    }

    fn asleep(&self) -> MutexGuard<'_, State> {
        let mut state = self.lock();
        state.asleep = true;
        state
    }

    /// The same for so long at most; whether something happened.
    pub fn wait_for(&self, time: Duration) -> bool {
        let awake = self.wake.wait_timeout_while(self.asleep(), time, |state| !state.is_awake());
        let (mut state, _) = awake.unwrap_or_else(PoisonError::into_inner);
        let happened = state.is_awake();
        state.wake_up();
        happened
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
        assert!(mailbox.wait_for(Duration::ZERO));
        assert!(!mailbox.wait_for(Duration::from_millis(1)));
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

    #[test]
    fn who_is_paused_stands_still_until_it_goes_on() {
        let mailbox = Arc::new(Mailbox::default());
        let vcpu = Arc::clone(&mailbox);
        let thread = std::thread::spawn(move || {
            let mut stood = 0;
            loop {
                let mail = vcpu.take();
                if mail.stop {
                    vcpu.ended();
                    return stood;
                }
                if mail.pause {
                    assert!(vcpu.stand_still(None).is_none());
                    stood += 1;
                } else {
                    vcpu.wait();
                }
            }
        });
        for _ in 0..2 {
            mailbox.pause();
            mailbox.wait_until_still();
            mailbox.look_again();
            mailbox.look_again();
            mailbox.interrupt();
            mailbox.unpause();
            // One that was not paused is not waited for.
            mailbox.wait_until_still();
        }
        mailbox.pause();
        mailbox.wait_until_still();
        mailbox.stop();
        assert!(thread.join().unwrap() >= 5);
        mailbox.pause();
        mailbox.wait_until_still();
        mailbox.look_again();
    }

    #[test]
    fn mail_that_came_later_counts() {
        let init = Mail { init: true, startup: Some(1), ..Mail::default() };
        let startup = Mail { startup: Some(2), ..Mail::default() };
        assert_eq!(startup.and(init), init);
        assert_eq!(init.and(startup).startup, Some(1));
        assert!(init.and(startup).init);
    }
}
