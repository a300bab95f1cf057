//! The chips of the machine: interrupt controllers, timers, serial port, clock, power.

pub mod chipset;
pub mod debug_exit;
pub mod events;
pub mod fuzz;
pub mod ioapic;
pub mod lapic;
pub mod pic;
pub mod pit;
pub mod power;
pub mod rtc;
pub mod serial;
