//! Guest images: where they are kept, how one is made from a Debian mirror, and what a machine is
//! started with: a throwaway root disk, a kernel, an initramfs with the agent.
//!
//! Plain threads and files; no network of its own (`mmdebstrap` and `apt` do that).
#![forbid(unsafe_code)]

pub mod agent;
pub mod bootstrap;
pub mod cpio;
pub mod disk;
pub mod initramfs;
pub mod modules;
mod mounts;
pub mod sources;
pub mod store;
pub mod tools;
