//! virtio-net: Ethernet frames between the guest and a backend.
//!
//! `backend` is what the device needs of the outside; `stream` a socket with framed packets and
//! `passt` the process at its other end, for networks without privileges, and `forward` the host's ports
//! that it gives to the guest; `tap` an interface of the
//! host. `device` is the card: one pair of queues, mergeable receive buffers.

pub mod backend;
pub mod device;
pub mod forward;
pub mod passt;
pub mod stream;
pub mod tap;
#[cfg(test)]
mod tests;
