//! virtio-balloon (virtio 1.2, section 5.5): the guest gives memory to the host and gets it back.
//!
//! ```text
//! host ── num_pages ──► driver ── inflate queue: page numbers ──► given back to the host
//!                         │
//!                         ├── deflate queue: page numbers ──► nothing: the pages are there when touched
//!                         └── reporting queue: ranges that are free ──► given back, too
//! ```
//!
//! The guest may take pages out when it is short of memory (`F_DEFLATE_ON_OOM`). Free page reporting
//! gives back what the guest freed and has not used again for some seconds, without being asked.

pub mod device;
#[cfg(test)]
mod tests;
