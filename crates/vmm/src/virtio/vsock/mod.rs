//! virtio-vsock: streams between the host and programs in the guest, without the host's kernel.
//!
//! ```text
//!  Vsock::connect(port) ──socketpair──┐
//!  <path>: "CONNECT <port>\n" ────────┤  muxer: one Connection per stream ◄──rx/tx queues──► guest
//!  <path>_<port>, Vsock::listen ◄─────┘
//! ```
//!
//! `packet` is the header, `connection` one stream with its credit, `muxer` all of them, `host` the
//! side that other threads of this process use, `device` the queues.
//!
//! Life of a connection:
//!
//! ```text
//!  host asks:  Requested ──RESPONSE──► Open ──both sides shut down, data drained──► RST, gone
//!                  └─RST, host gave up─► gone
//!  guest asks: (listener found) ─────► Open          (none found: RST)
//! ```
//!
//! A half shut down by one side stays usable in the other direction. The socket or packets being
//! wrong in any way ends the connection with RST.

mod connection;
pub mod device;
mod fuzz;
pub mod host;
mod muxer;
mod packet;
#[cfg(test)]
mod tests;

pub use fuzz::packets as fuzz_packets;
