//! virtio-fs: folders of the host in the guest (virtio 1.2, section 5.11).
//!
//! The guest's kernel speaks FUSE (linux/fuse.h, 7.27 or later) over two queues; every request is
//! carried out on the host and answered before the next is taken.
//!
//! * `device`: queues, and the thread's own umask.
//! * `wire`: the messages.
//! * `server`: from a message to its answer; `entries`, `attributes` and `content` do the work.
//! * `nodes`: the files the guest knows, by descriptors that were opened without following links.
//! * `handles`: the files it has open.
//! * `sys`: system calls that need unsafe code.
//!
//! A guest is hostile. It names files by numbers that it was given, and by single names in a folder
//! that it was given: no `/`, no `..`, and links are handed to it, not followed. So whatever it asks
//! for is below the shared folder, which it cannot leave. What it can make the host keep is bounded
//! ([`limits`](crate::virtio::limits)), and a share that is read-only is so here, whatever it mounts.

mod attributes;
mod content;
pub mod device;
mod entries;
mod fuzz;
mod handles;
mod nodes;
mod server;
mod sys;
#[cfg(test)]
mod tests;
mod wire;

pub use fuzz::requests as fuzz_requests;
