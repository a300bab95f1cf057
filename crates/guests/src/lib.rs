//! Small guests in assembly that check the processor and the machine, with what they must print.
//!
//! Each guest is a static 64-bit ELF file with a Multiboot 1 header and a PVH note; it needs 32 MiB
//! of memory, the serial port, the debug-exit port (0xf4), and, where its topic is interrupts, the
//! local APIC, the I/O APIC and the PIT. It prints one line per check:
//!
//! ```text
//! ok NAME
//! FAIL NAME: got X want Y
//! skip NAME (why)
//! done: N ok, M failed
//! ```
//!
//! and then writes the number of failures to the debug-exit port (exit status `M << 1 | 1`).
//! [`Report`] reads that. Running guests is the business of `tests/it`.
#![forbid(unsafe_code)]

mod catalog;
mod report;
mod table;

pub use catalog::{Deviation, Expect, Guest, Need, all};
pub use report::{Line, Report};
