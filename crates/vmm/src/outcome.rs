//! How a machine ends, and who says so.

use std::sync::{Condvar, Mutex, OnceLock, PoisonError};
use std::time::Duration;

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest powered off.
    PoweredOff,
    /// The guest asked for a reset.
    Reset,
    /// A vCPU met a fault it could not deliver, not even as a double fault.
    TripleFault,
    /// The guest wrote this to the debug-exit port.
    DebugExit(u8),
    /// Stopped from outside.
    Stopped,
    /// Stored, to go on later.
    Suspended,
    /// The host could not go on with it.
    Failed(String),
}

impl Outcome {
    /// The exit status of a program that ran just this machine. The debug-exit port gives
    /// `value << 1 | 1`, as other machines do, so that it is never zero.
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::PoweredOff | Self::Suspended => 0,
            Self::DebugExit(value) => value << 1 | 1,
            Self::Reset | Self::TripleFault | Self::Stopped | Self::Failed(_) => 1,
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::PoweredOff => write!(f, "the guest powered off"),
            Self::Reset => write!(f, "the guest reset itself"),
            Self::TripleFault => write!(f, "the guest stopped with a triple fault"),
            Self::DebugExit(value) => write!(f, "the guest wrote {value} to the debug-exit port"),
            Self::Stopped => write!(f, "the machine was stopped"),
            Self::Suspended => write!(f, "the machine was suspended"),
            Self::Failed(why) => write!(f, "the machine failed: {why}"),
        }
    }
}

/// The place where the first [`Outcome`] is written; later ones are dropped.
#[derive(Default)]
pub struct Ending {
    first: Mutex<Option<Outcome>>,
    changed: Condvar,
    on_end: OnceLock<Box<dyn Fn() + Send + Sync>>,
}

impl Ending {
    /// Ends the machine. Only notifies: vCPUs stop a moment later.
    pub fn end(&self, outcome: Outcome) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_some() {
            return;
        }
        *first = Some(outcome);
        drop(first);
        self.changed.notify_all();
        if let Some(on_end) = self.on_end.get() {
            on_end();
        }
    }

    /// Sets what is called once on the end (on the thread that ends the machine, at once if it has
    /// ended already).
    pub fn set_on_end(&self, on_end: impl Fn() + Send + Sync + 'static) {
        let fresh = self.on_end.set(Box::new(on_end)).is_ok();
        if fresh
            && self.outcome().is_some()
            && let Some(on_end) = self.on_end.get()
        {
            on_end();
        }
    }

    /// The outcome, when there is one.
    #[must_use]
    pub fn outcome(&self) -> Option<Outcome> {
        self.first.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for the end.
    #[must_use]
    pub fn wait(&self) -> Outcome {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(outcome) = &*first {
                return outcome.clone();
            }
            first = self.changed.wait(first).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits for the end, at most so long.
    #[must_use]
    pub fn wait_timeout(&self, limit: Duration) -> Option<Outcome> {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let (first, _) = self
            .changed
            .wait_timeout_while(first, limit, |first| first.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        first.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::{Ending, Outcome};

    #[test]
    fn the_first_outcome_counts() {
        let ending = Ending::default();
        assert_eq!(ending.outcome(), None);
        ending.end(Outcome::DebugExit(3));
        ending.end(Outcome::Stopped);
        assert_eq!(ending.wait(), Outcome::DebugExit(3));
        assert_eq!(ending.wait().exit_status(), 7);
    }
}
