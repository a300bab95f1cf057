//! Process 1 inherits every orphan, so one thread collects all children and hands the statuses of
//! those we started to whoever waits for them.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use berth_api::agent::message::Exit;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::process::{WaitId, WaitIdOptions, WaitOptions, WaitStatus, wait, waitid};

/// A child of ours: its id, and its end when that has come.
pub struct Child {
    /// Process id.
    pub pid: i32,
    end: Arc<End>,
}

struct End {
    exit: Mutex<Option<Exit>>,
    /// Readable once `exit` is set.
    event: OwnedFd,
}

impl Child {
    /// How it ended, if it has.
    pub fn exit(&self) -> Option<Exit> {
        *lock(&self.end.exit)
    }

    /// Becomes readable when it ends.
    pub fn event(&self) -> BorrowedFd<'_> {
        self.end.event.as_fd()
    }

    /// Blocks until it ends.
    pub fn wait(&self) -> Exit {
        loop {
            if let Some(exit) = self.exit() {
                return exit;
            }
            let mut count = [0u8; 8];
            // Blocks until the reaper writes; an interruption comes round again.
            let _ = rustix::io::read(&self.end.event, &mut count);
        }
    }
}

/// The collector.
pub struct Reaper {
    /// Held while a child is started or collected, so that a status never finds nobody waiting, and
    /// so that nothing is collected that `Command::spawn` waits for itself.
    waiting: Mutex<HashMap<i32, Arc<End>>>,
    started: Condvar,
}

impl Reaper {
    /// Starts the thread.
    pub fn start() -> Arc<Self> {
        let reaper = Arc::new(Self { waiting: Mutex::default(), started: Condvar::new() });
        let collector = Arc::clone(&reaper);
        std::thread::spawn(move || collector.collect());
        reaper
    }

    /// Starts a program whose end will be known.
    pub fn spawn(&self, command: &mut Command) -> io::Result<(Child, std::process::Child)> {
        let end =
            Arc::new(End { exit: Mutex::new(None), event: eventfd(0, EventfdFlags::CLOEXEC)? });
        let mut waiting = lock(&self.waiting);
        let process = command.spawn()?;
        // Linux process ids are below 2^22.
        let pid = i32::try_from(process.id()).unwrap_or(i32::MAX);
        waiting.insert(pid, Arc::clone(&end));
        self.started.notify_all();
        Ok((Child { pid, end }, process))
    }

    /// Whether this process has no children at all, not even adopted ones.
    pub fn has_no_children(&self) -> bool {
        let _waiting = lock(&self.waiting);
        let look = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        matches!(waitid(WaitId::All, look), Err(Errno::CHILD))
    }

    fn collect(&self) {
        loop {
            // Without the lock: wait until somebody has ended, but leave them.
            match waitid(WaitId::All, WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
                Ok(_) => self.collect_ended(),
                Err(Errno::CHILD) => self.wait_for_a_start(),
                Err(_) => {}
            }
        }
    }

    fn collect_ended(&self) {
        let mut waiting = lock(&self.waiting);
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            if let Some(end) = waiting.remove(&pid.as_raw_nonzero().get()) {
                *lock(&end.exit) = Some(exit_of(status));
                let _ = rustix::io::write(&end.event, &1u64.to_ne_bytes());
            }
        }
    }

    /// No child exists: none can appear but through [`Self::spawn`], since orphans descend from
    /// children.
    fn wait_for_a_start(&self) {
        let waiting = lock(&self.waiting);
        let none = |waiting: &mut HashMap<i32, Arc<End>>| waiting.is_empty();
        drop(self.started.wait_while(waiting, none).unwrap_or_else(PoisonError::into_inner));
    }
}

fn exit_of(status: WaitStatus) -> Exit {
    match status.terminating_signal() {
        Some(signal) => Exit::Signal(signal),
        None => Exit::Status(status.exit_status().unwrap_or(255)),
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    // One test: the reaper collects every child of the process it runs in.
    #[test]
    fn ends_are_told_and_a_missing_program_harms_nothing() {
        let reaper = Reaper::start();
        for round in 0..20 {
            assert!(reaper.spawn(&mut Command::new("/no/such/program")).is_err());
            let (child, _) = reaper
                .spawn(Command::new("/bin/sh").args(["-c", &format!("exit {round}")]))
                .unwrap();
            assert_eq!(child.wait(), Exit::Status(round));
        }
        let (child, _) = reaper.spawn(Command::new("/bin/sh").args(["-c", "kill -9 $$"])).unwrap();
        assert_eq!(child.wait(), Exit::Signal(9));
        assert!(reaper.has_no_children());
    }
}
