//! Differential processor test.
//!
//! Generated instruction sequences run on the host processor, in a child process, and on the
//! translator; registers, flags, memory, x87, SSE and AVX state and the exception at the end must
//! agree. The host processor is the oracle: nothing here says what an instruction does.
//!
//! A case is its seed and number. A difference is made smaller (instructions become NOPs, registers
//! and memory simple) and printed with everything needed to see it.

pub mod case;
pub mod compare;
pub mod generate;
pub mod layout;
pub mod native;
pub mod report;
pub mod rng;
pub mod run;
pub mod shrink;
pub mod translated;
pub mod traps;
pub mod values;
pub mod wrong;
