//! One virtual machine.

pub mod bus;
pub mod irq;
pub mod limits;
pub mod memory;
