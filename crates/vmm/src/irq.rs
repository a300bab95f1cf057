//! How devices raise interrupts, without knowing the interrupt controllers.

/// The interrupt controllers of the machine as a device sees them.
pub trait InterruptSink: Send + Sync {
    /// Sets the level of a global interrupt line.
    fn set_line(&self, gsi: u32, level: bool);
    /// Sends a message-signalled interrupt.
    fn signal_msi(&self, address: u64, data: u32);
}
