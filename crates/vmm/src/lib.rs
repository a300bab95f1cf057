//! One virtual machine.

pub mod bus;
pub mod irq;
pub mod limits;
pub mod memory;
pub mod pci;
pub mod virtio;
