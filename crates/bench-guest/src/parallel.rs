//! Rows for two processors: contention on one word, and work that needs no talk.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use crate::row::{Group, Row, Work};
use crate::user::sieve_once;

const SIEVE_LIMIT: usize = 1 << 18;

/// The rows of this module.
pub const ROWS: &[Row] = &[
    Row { name: "atomic-2", group: Group::User, cpus: 2, ops: 4_000_000, prepare: atomic },
    Row { name: "parallel-1", group: Group::Scaling, cpus: 2, ops: 240, prepare: parallel_1 },
    Row { name: "parallel-2", group: Group::Scaling, cpus: 2, ops: 240, prepare: parallel_2 },
];

/// Puts the calling thread onto one of the processors it may use.
pub fn pin(number: usize) {
    // SAFETY: the sets are plain bits, zero is a valid one, and each call gets its size.
    unsafe {
        let mut allowed: libc::cpu_set_t = std::mem::zeroed();
        libc::sched_getaffinity(0, size_of_val(&allowed), &mut allowed);
        let cpus: Vec<usize> =
            (0..libc::CPU_SETSIZE as usize).filter(|&cpu| libc::CPU_ISSET(cpu, &allowed)).collect();
        if let Some(&cpu) = cpus.get(number % cpus.len().max(1)) {
            let mut one: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(cpu, &mut one);
            libc::sched_setaffinity(0, size_of_val(&one), &one);
        }
    }
}

fn atomic(ops: u64) -> Result<Work, String> {
    Ok(Box::new(move || {
        let counter = AtomicU64::new(0);
        thread::scope(|scope| {
            for number in 0..2 {
                let counter = &counter;
                scope.spawn(move || {
                    pin(number);
                    for _ in 0..ops / 2 {
                        counter.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        counter.into_inner()
    }))
}

fn sieves(rounds: u64) -> u64 {
    let mut composite = vec![false; SIEVE_LIMIT];
    (0..rounds).map(|_| sieve_once(black_box(&mut composite))).sum()
}

fn parallel_1(ops: u64) -> Result<Work, String> {
    Ok(Box::new(move || thread::scope(|scope| scope.spawn(|| sieves(ops)).join().unwrap_or(0))))
}

fn parallel_2(ops: u64) -> Result<Work, String> {
    Ok(Box::new(move || {
        thread::scope(|scope| {
            let halves = [0, 1].map(|number| {
                scope.spawn(move || {
                    pin(number);
                    sieves(ops / 2)
                })
            });
            halves.map(|half| half.join().unwrap_or(0)).iter().sum()
        })
    }))
}
