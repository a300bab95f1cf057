//! One virtual machine: memory, buses, chips, boot, vCPUs, and the machine that holds them.
//!
//! Threads and epoll, no asynchronous runtime. `vcpu` is the only module that knows that there are
//! two kinds of processors; `chips`, `boot` and devices know none.

pub mod acpi;
pub mod boot;
pub mod bus;
pub mod chips;
pub mod clock;
pub mod confine;
pub mod console;
pub mod devices;
pub mod error;
pub mod fit;
pub mod fork;
pub mod generation;
pub mod irq;
pub mod limits;
pub mod machine;
pub mod memory;
pub mod outcome;
pub mod pci;
pub mod pvclock;
pub mod state;
pub mod timer;
pub mod vcpu;
pub mod virtio;
