//! The entropy device: one queue of buffers to fill.

use std::sync::Arc;

use crate::virtio::device::{Context, Device, DeviceConfig, DeviceError, Info};
use crate::virtio::limits::RNG_REQUEST_MAX;
use crate::virtio::rng::fill_random;

const QUEUE_SIZE: u16 = 64;

/// A virtio-rng device.
pub struct Rng {
    config: Arc<DeviceConfig>,
}

impl Rng {
    /// The device; it needs nothing.
    pub fn new() -> Self {
        Self { config: DeviceConfig::new(Vec::new()) }
    }
}

impl Default for Rng {
    fn default() -> Self {
        Self::new()
    }
}

impl Device for Rng {
    fn info(&self) -> Info {
        Info {
            device_type: 4,
            class: 0x00_ff00,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE],
            name: "virtio-rng",
        }
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, _context: &mut Context) -> Result<(), DeviceError> {
        Ok(())
    }

    fn queue_event(&mut self, context: &mut Context, index: usize) -> Result<(), DeviceError> {
        context.serve(index, |queue, memory, chain| {
            let len = chain.writable_len().min(RNG_REQUEST_MAX);
            let mut bytes = vec![0; len as usize];
            fill_random(&mut bytes).map_err(DeviceError::host("reading random bytes"))?;
            chain
                .write(memory, 0, &bytes)
                .map_err(|_| DeviceError::Request("a random buffer that is not there"))?;
            Ok(queue.push(chain.head(), len as u32)?)
        })
    }

    fn stop(&mut self, _context: &mut Context) {}
}
