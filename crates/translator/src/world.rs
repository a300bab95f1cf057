//! Stopping every other vCPU of a machine, for what the host cannot do atomically: a
//! read-modify-write of bytes in two pages that are not neighbours in RAM.
//!
//! A vCPU counts as running from the start of [`crate::TranslatedVcpu::run`] to its end; one that
//! sleeps in HLT or is not run at all does not. Whoever wants the world for itself stops counting,
//! waits for its turn, makes the others leave generated code, and goes on when nobody runs. The
//! others come to [`World::park`] in the dispatcher, between two guest instructions and with no lock
//! held, and wait there.
//!
//! ```text
//!              enter                         stop: ticket drawn
//!   outside ─────────► running ─────────────────────────────────► queued
//!      ▲  ◄─────────    │   ▲                                        │ its ticket's turn, nobody
//!           leave       │   │ resume                                 │ waits to enter, nobody runs
//!                  park │   └──────────────── alone ◄────────────────┘
//!                       ▼
//!                    waiting (until nobody is alone)
//! ```
//!
//! There is no deadlock: a queued vCPU does not count as running, so two that want the world do not
//! wait for each other. Nobody starves: tickets are served in order, and between two of them all that
//! wait to run get in.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::shared::lock;

/// Who runs, and who is alone.
#[derive(Default)]
pub struct World {
    gate: Mutex<Gate>,
    changed: Condvar,
    /// As `Gate::taken`, for a look without the lock.
    stopped: AtomicBool,
}

#[derive(Default)]
struct Gate {
    /// vCPUs in `run`.
    running: usize,
    /// vCPUs that wait to be running.
    waiting: usize,
    /// Somebody is alone, or waits for the last one to stop.
    taken: bool,
    next_ticket: u64,
    served: u64,
}

/// A vCPU that counts as running.
pub struct Running<'a>(&'a World);

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl World {
    /// A vCPU begins to run; waits while another one is alone.
    pub fn enter(&self) -> Running<'_> {
        self.join();
        Running(self)
    }

    /// Whether running vCPUs shall come to [`World::park`].
    pub fn stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// A running vCPU stands still until nobody is alone.
    pub fn park(&self) {
        self.leave();
        self.join();
    }

    /// A running vCPU becomes the only one; `ask` makes the others leave generated code.
    pub fn stop(&self, ask: impl FnOnce()) {
        let mut gate = lock(&self.gate);
        gate.running -= 1;
        let ticket = gate.next_ticket;
        gate.next_ticket += 1;
        self.changed.notify_all();
        while gate.taken || gate.waiting > 0 || gate.served != ticket {
            gate = self.wait(gate);
        }
        gate.taken = true;
        self.stopped.store(true, Ordering::SeqCst);
        drop(gate);
        ask();
        let mut gate = lock(&self.gate);
        while gate.running > 0 {
            gate = self.wait(gate);
        }
    }

    /// Ends what [`World::stop`] began.
    pub fn resume(&self) {
        let mut gate = lock(&self.gate);
        gate.taken = false;
        gate.served += 1;
        gate.running += 1;
        self.stopped.store(false, Ordering::SeqCst);
        self.changed.notify_all();
    }

    fn join(&self) {
        let mut gate = lock(&self.gate);
        if gate.taken {
            gate.waiting += 1;
            while gate.taken {
                gate = self.wait(gate);
            }
            gate.waiting -= 1;
        }
        gate.running += 1;
        self.changed.notify_all();
    }

    fn leave(&self) {
        lock(&self.gate).running -= 1;
        self.changed.notify_all();
    }

    fn wait<'a>(&self, gate: MutexGuard<'a, Gate>) -> MutexGuard<'a, Gate> {
        self.changed.wait(gate).unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::World;

    /// Threads that count in two steps which only being alone makes one, among threads that come
    /// and go and park.
    #[test]
    fn what_is_done_alone_is_atomic() {
        const THREADS: u64 = 6;
        const ROUNDS: u64 = 500;
        let world = World::default();
        let count = AtomicU64::new(0);
        std::thread::scope(|s| {
            for t in 0..THREADS {
                let (world, count) = (&world, &count);
                s.spawn(move || {
                    for _ in 0..ROUNDS {
                        let _running = world.enter();
                        if t % 2 == 0 {
                            world.stop(|| {});
                        } else if world.stopped() {
                            world.park();
                        }
                        if t % 2 == 0 {
                            let seen = count.load(Ordering::Relaxed);
                            std::thread::yield_now();
                            count.store(seen + 1, Ordering::Relaxed);
                            world.resume();
                        } else {
                            count.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        assert_eq!(count.into_inner(), THREADS * ROUNDS);
    }

    /// One that stops the world in a loop does not keep the others out.
    #[test]
    fn nobody_starves() {
        let world = World::default();
        let turns = AtomicU64::new(0);
        std::thread::scope(|s| {
            for _ in 0..2 {
                s.spawn(|| {
                    let _running = world.enter();
                    while turns.load(Ordering::Relaxed) < 200 {
                        world.stop(|| {});
                        world.resume();
                    }
                });
            }
            s.spawn(|| {
                let _running = world.enter();
                for _ in 0..200 {
                    while !world.stopped() {
                        std::hint::spin_loop();
                    }
                    world.park();
                    turns.fetch_add(1, Ordering::Relaxed);
                }
            });
        });
        assert_eq!(turns.into_inner(), 200);
    }
}
