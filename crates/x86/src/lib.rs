//! The guest x86-64 processor as data.
//!
//! This crate holds what the manuals say and nothing that runs guest code: the architectural state,
//! the CPUID and MSR model, page-walk rules, exceptions and their delivery, segment loading and far
//! control transfers. Both processors of Berth (the translator and KVM) keep their architectural
//! state in [`CpuState`]. Rules are written against three small traits ([`PhysMem`], [`LinearMem`],
//! [`Platform`]) so that they can be tested without a machine. There is no unsafe code here.
#![forbid(unsafe_code)]

pub mod control;
pub mod cpuid;
mod desc;
pub mod event;
#[cfg(test)]
mod fake;
pub mod far;
pub mod flags;
pub mod msr;
pub mod paging;
pub mod platform;
pub mod ports;
#[cfg(test)]
mod random_tests;
mod reset;
mod size;
mod stack;
pub mod state;
pub mod syscall;
mod task;

pub use platform::{Access, LinearMem, PhysMem, Platform};
pub use size::OpSize;
pub use state::{CpuState, Exception, Segment, TableReg};
