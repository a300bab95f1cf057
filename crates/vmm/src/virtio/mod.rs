//! Virtio 1.x devices over PCI.
//!
//! * `device`: what a device is, and what it has while the guest uses it.
//! * `transport_pci`: the registers the guest sees; one PCI function per device.
//! * `worker`: the thread of a device, between DRIVER_OK and reset.
//! * `queue`, `chain`: split virtqueues with every address and length checked.
//! * `interrupt`: MSI-X or the interrupt pin, and the status the worker can change.
//! * `block`, `net`, `rng`, `console`, `vsock`, `fs`, `balloon`: the devices.
//!
//! Everything in guest memory is hostile. A malformed ring or chain stops the device and sets
//! DEVICE_NEEDS_RESET; nothing the guest writes makes this module panic, loop without end or touch
//! memory that is not guest RAM.

pub mod balloon;
pub mod block;
pub mod chain;
pub mod console;
pub mod device;
pub mod fs;
pub mod fuzz;
mod fuzz_devices;
pub mod interrupt;
pub mod limits;
pub mod net;
pub mod queue;
pub mod rng;
pub mod transport_pci;
pub mod vsock;
mod worker;

use std::sync::atomic::{AtomicU32, Ordering};

/// Whether one more warning that the guest can cause may be logged.
fn may_warn() -> bool {
    static WARNINGS: AtomicU32 = AtomicU32::new(0);
    WARNINGS
        .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
            (count < limits::GUEST_WARNINGS_MAX).then_some(count + 1)
        })
        .is_ok()
}

#[cfg(test)]
mod moved;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;
