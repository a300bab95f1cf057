//! The balloon device.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::memory::Memory;
use crate::virtio::chain::Chain;
use crate::virtio::device::{Context, Device, DeviceConfig, DeviceError, Info};
use crate::virtio::limits::BALLOON_REQUEST_PAGES_MAX;
use crate::virtio::may_warn;

/// Virtio device type.
pub const DEVICE_TYPE: u16 = 5;
/// Feature bit: the guest may take pages out when it is short of memory.
pub const F_DEFLATE_ON_OOM: u64 = 1 << 2;
/// Feature bit: the guest says which pages it does not use.
pub const F_REPORTING: u64 = 1 << 5;

const QUEUE_SIZE: u16 = 128;
const INFLATE: usize = 0;
/// Without the queues that were not agreed on in between.
const REPORTING: usize = 2;
const PAGE: u64 = 4096;
/// Where in configuration space: pages that the guest should give, and those that it has given.
const WANTED: usize = 0;
const GIVEN: usize = 4;

/// A virtio-balloon device.
pub struct Balloon {
    config: Arc<DeviceConfig>,
    used: Arc<AtomicBool>,
}

/// Asks a guest for memory.
#[derive(Clone)]
pub struct BalloonSwitch {
    config: Arc<DeviceConfig>,
    used: Arc<AtomicBool>,
}

impl BalloonSwitch {
    /// Whether the guest has a driver for its balloon.
    #[must_use]
    pub fn is_used(&self) -> bool {
        self.used.load(Ordering::Acquire)
    }

    /// Asks the guest to have so many bytes in the balloon, less or more than it has now. It does so
    /// as it can.
    pub fn want(&self, bytes: u64) {
        let pages = u32::try_from(bytes / PAGE).unwrap_or(u32::MAX);
        self.config.update(WANTED, &pages.to_le_bytes());
    }

    /// Bytes that the guest should have in the balloon.
    #[must_use]
    pub fn wanted(&self) -> u64 {
        u64::from(self.config.u32_at(WANTED as u64)) * PAGE
    }

    /// Bytes that the guest has in the balloon, as it says.
    #[must_use]
    pub fn given(&self) -> u64 {
        u64::from(self.config.u32_at(GIVEN as u64)) * PAGE
    }
}

impl Balloon {
    /// A balloon with nothing in it.
    #[must_use]
    pub fn new() -> Self {
        // num_pages, actual
        let config = DeviceConfig::with_writable(vec![0; 8], GIVEN..GIVEN + 4);
        Self { config, used: Arc::default() }
    }

    /// What asks for memory.
    #[must_use]
    pub fn switch(&self) -> BalloonSwitch {
        BalloonSwitch { config: Arc::clone(&self.config), used: Arc::clone(&self.used) }
    }
}

impl Default for Balloon {
    fn default() -> Self {
        Self::new()
    }
}

/// Bytes that one chain reports as free at most; Linux has 32 pieces of 4 MiB.
const REPORTED_BYTES_MAX: u64 = 256 << 20;

/// Gives a range back; what the guest says is free is not all of it memory.
fn discard(memory: &Memory, gpa: u64, len: u64) {
    if let Err(error) = memory.discard(gpa, len)
        && may_warn()
    {
        tracing::warn!(%error, "memory of the balloon is not given back to the host");
    }
}

/// The pages that are named in a chain.
fn inflate(memory: &Memory, chain: &Chain) -> Result<(), DeviceError> {
    let count = (chain.readable_len() / 4).min(BALLOON_REQUEST_PAGES_MAX);
    let mut bytes = vec![0; count as usize * 4];
    chain
        .read(memory, 0, &mut bytes)
        .map_err(|_| DeviceError::Request("page numbers that are not there"))?;
    let (numbers, _) = bytes.as_chunks::<4>();
    let mut pages: Vec<u64> =
        numbers.iter().map(|raw| u64::from(u32::from_le_bytes(*raw))).collect();
    pages.sort_unstable();
    pages.dedup();
    for run in pages.chunk_by(|a, b| a + 1 == *b) {
        if let Some(first) = run.first() {
            discard(memory, first * PAGE, run.len() as u64 * PAGE);
        }
    }
    Ok(())
}

impl Device for Balloon {
    fn info(&self) -> Info {
        Info {
            device_type: DEVICE_TYPE,
            class: 0x00_ff00,
            features: F_DEFLATE_ON_OOM | F_REPORTING,
            queue_sizes: vec![QUEUE_SIZE; 3],
            name: "virtio-balloon",
        }
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, _context: &mut Context) -> Result<(), DeviceError> {
        self.used.store(true, Ordering::Release);
        Ok(())
    }

    fn queue_event(&mut self, context: &mut Context, index: usize) -> Result<(), DeviceError> {
        let reports = index == REPORTING && context.negotiated(F_REPORTING);
        context.serve(index, |queue, memory, chain| {
            if index == INFLATE {
                inflate(memory, chain)?;
            }
            if reports {
                let mut left = REPORTED_BYTES_MAX;
                for (gpa, len) in chain.writable() {
                    let len = len.min(left);
                    left -= len;
                    if len > 0 {
                        discard(memory, gpa, len);
                    }
                }
            }
            Ok(queue.push(chain.head(), 0)?)
        })
    }

    fn stop(&mut self, _context: &mut Context) {
        self.used.store(false, Ordering::Release);
        // Pages are the guest's again when it resets the device (5.5.6).
        self.config.put(GIVEN, &[0; 4]);
    }

    fn save(&mut self) -> Vec<u8> {
        let mut saved = vec![0; 8];
        self.config.read(0, &mut saved);
        saved
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), &'static str> {
        // Nothing, if it had failed.
        if !matches!(saved.len(), 0 | 8) {
            return Err("a balloon that has stored something else");
        }
        self.config.put(0, saved);
        Ok(())
    }
}
