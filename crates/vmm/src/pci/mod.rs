//! PCI: one root bus with type-0 functions.
//!
//! `root` holds the bus and answers the configuration ports 0xcf8..0xd00, `config` is the 256-byte
//! configuration space of a function, `msix` its message-signalled interrupts. There are no bridges,
//! no I/O BARs and no memory-mapped configuration.
//!
//! Every function has interrupt pin INTA, connected to global interrupt 16 + slot % 4
//! ([`root::intx_gsi`]); ACPI's _PRT must say the same.

pub mod config;
pub mod msix;
pub mod root;
#[cfg(test)]
mod tests;
