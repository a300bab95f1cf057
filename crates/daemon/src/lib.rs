//! The daemon: keeps machines in folders, starts and watches a process for each that runs, and
//! answers on a unix socket, and on TCP with certificates on both sides.
//!
//! It links no virtual machine monitor: a machine is a process of its own that goes on when the
//! daemon ends, and is found again by the next one.
#![forbid(unsafe_code)]

pub mod cgroup;
pub mod events;
pub mod failure;
pub mod folder;
pub mod images;
pub mod line;
pub mod log;
pub mod machines;
pub mod server;
pub mod snapshot;
pub mod tls;
pub mod usage;
pub mod vmm;
pub mod zygote;

pub use berth_net::relay;
