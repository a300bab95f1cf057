//! Whether the host lets locked accesses across cache lines finish beside threads that spin. Some that
//! trap bus locks do not: the thread stays at the instruction for good, in any program.

use std::arch::asm;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Additions of the first thread, and of the others, which spin afterwards.
const ADDITIONS: [u32; 2] = [5000, 500];
/// Healthy hosts take less than two seconds, also where each addition is trapped.
const TIME_LIMIT: Duration = Duration::from_secs(15);

#[repr(align(64))]
struct Lines([u8; 128]);

/// Tries it with so many threads.
pub fn finish(threads: u32) -> bool {
    let (done, over) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicBool::new(false)));
    // Threads may outlive this.
    let lines: &'static mut Lines = Box::leak(Box::new(Lines([0; 128])));
    let at = lines.0.as_mut_ptr() as usize + 60;
    for thread in 0..threads {
        let (done, over) = (Arc::clone(&done), Arc::clone(&over));
        std::thread::spawn(move || {
            for _ in 0..ADDITIONS[usize::from(thread > 0)] {
                // SAFETY: eight bytes inside of the lines, which are never freed and used by nothing else.
                unsafe { asm!("lock add qword ptr [{at}], 1", at = in(reg) at) };
                if over.load(Ordering::Relaxed) {
                    return;
                }
            }
            done.fetch_add(1, Ordering::SeqCst);
            while done.load(Ordering::Relaxed) < threads && !over.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
    }
    let began = Instant::now();
    while done.load(Ordering::SeqCst) < threads && began.elapsed() < TIME_LIMIT {
        std::thread::sleep(Duration::from_millis(10));
    }
    over.store(true, Ordering::SeqCst);
    done.load(Ordering::SeqCst) == threads
}
