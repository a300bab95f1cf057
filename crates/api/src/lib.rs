//! Wire types and routes shared by the Berth programs. Domain types do not live here: a type in this
//! crate is a promise to the other side of a socket.
#![forbid(unsafe_code)]

pub mod agent;
pub mod processors;
pub mod size;
#[cfg(feature = "v1")]
pub mod v1;
#[cfg(feature = "v1")]
pub mod vmm;
