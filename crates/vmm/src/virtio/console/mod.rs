//! virtio-console: one port, connected to a stream socket of the host.

pub mod device;
#[cfg(test)]
mod tests;
