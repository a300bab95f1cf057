//! How devices raise interrupts.
//!
//! Devices know only [`InterruptSink`]; behind it is either the emulated interrupt controllers
//! (`chips::Chipset`) or those of KVM.

/// Where devices send their interrupts.
pub trait InterruptSink: Send + Sync {
    /// Edge or level pin of the I/O APIC
    fn set_line(&self, gsi: u32, level: bool);
    /// A message-signalled interrupt
    fn signal_msi(&self, address: u64, data: u32);
}
