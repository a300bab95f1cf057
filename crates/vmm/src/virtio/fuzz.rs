//! Entry points for fuzzing the boundaries to the guest; also driven by ordinary tests.
//!
//! Each takes any bytes and must return: no panic, no endless loop.

use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::bus::{Bus, BusDevice};
use crate::irq::InterruptSink;
use crate::memory::{GuestRam, Memory};
use crate::pci::root::{CONFIG_PORTS, MMIO_WINDOW_START, PciRoot};
use crate::virtio::chain::Direction;
use crate::virtio::interrupt::Interrupter;
use crate::virtio::queue::{QueueConfig, Virtqueue};
use crate::virtio::rng::device::Rng;
use crate::virtio::transport_pci::attach;

pub use crate::virtio::fs::fuzz_requests as fs_requests;
pub use crate::virtio::fuzz_devices::devices;
pub use crate::virtio::vsock::fuzz_packets as vsock_packets;

const MEMORY_SIZE: u64 = 4 << 20;
/// Inputs are laid out in this much memory, which is cleared first.
const ARENA: usize = 16 * 1024;
const CHAINS_MAX: usize = 64;

pub(super) struct NoSink;

impl InterruptSink for NoSink {
    fn set_line(&self, _gsi: u32, _level: bool) {}
    fn signal_msi(&self, _address: u64, _data: u32) {}
}

thread_local! {
    static RAM: Option<Arc<Memory>> =
        GuestRam::new(MEMORY_SIZE).ok().map(|ram| Arc::new(ram.memory().clone()));
}

/// Memory whose first [`ARENA`] bytes are `data`, then zeroes.
pub(super) fn memory(data: &[u8]) -> Option<Arc<Memory>> {
    let memory = RAM.with(Clone::clone)?;
    let mut arena = vec![0; ARENA];
    for (byte, new) in arena.iter_mut().zip(data) {
        *byte = *new;
    }
    memory.write_slice(&arena, GuestAddress(0)).ok()?;
    Some(memory)
}

/// A queue set up and filled by the input: four bytes of settings, then memory. Returns how many
/// chains were good, so that a test can tell that the input led somewhere.
pub fn virtqueue(data: &[u8]) -> usize {
    let Some(([size, layout, flags, accesses], rest)) = data.split_first_chunk::<4>() else {
        return 0;
    };
    let Some(memory) = memory(rest) else { return 0 };
    let interrupts = Arc::new(Interrupter::new(1, Arc::new(NoSink)));
    // Mostly possible layouts, some of them overlapping or outside.
    let at = |shift: u8| u64::from(layout >> shift & 3) * 0x600 + 0x10;
    let config = QueueConfig {
        size: 1 << (size & 7),
        descriptors: at(0),
        available: at(2) + 0x400,
        used: at(4) + if *flags & 0x80 == 0 { 0x800 } else { MEMORY_SIZE },
        enabled: true,
    };
    let event_idx = flags & 1 != 0;
    let queue = Virtqueue::new(0, 128, &config, event_idx, Arc::clone(&memory), interrupts);
    let Ok(mut queue) = queue else { return 0 };
    let mut taken = 0;
    let mut buffer = vec![0; usize::from(*accesses) * 4];
    for _ in 0..CHAINS_MAX {
        let Ok(Some(chain)) = queue.pop() else { break };
        taken += 1;
        let offset = u64::from(*accesses);
        let _ = chain.read(&memory, offset, &mut buffer);
        let _ = chain.write(&memory, offset, &buffer);
        let mut list = Vec::new();
        let len = chain.writable_len().saturating_sub(offset);
        let whole = chain.host_buffers(&memory, Direction::Writable, offset, len, &mut list);
        if whole.is_ok() {
            assert_eq!(list.iter().map(|part| part.iov_len as u64).sum::<u64>(), len);
        }
        let _ = chain.mark_written(&memory, offset, len);
        if flags & 2 != 0 && queue.push_together(&[(chain.head(), 1), (chain.head(), 2)]).is_err() {
            break;
        }
        if queue.push(chain.head(), 4).is_err() || queue.signal().is_err() {
            break;
        }
        let _ = queue.disable_notification();
        let _ = queue.enable_notification();
    }
    taken
}

/// Accesses to configuration ports and to the window of BARs: eight bytes each.
pub fn pci_config(data: &[u8]) {
    let Some(memory) = memory(&[]) else { return };
    let mmio = Arc::new(Bus::new());
    let mut root = PciRoot::new(Arc::clone(&mmio), Arc::new(NoSink));
    for _ in 0..2 {
        if attach(&mut root, Arc::clone(&memory), Box::new(Rng::new())).is_err() {
            return;
        }
    }
    for action in data.chunks_exact(8) {
        let &[what, place, low, high, ref value @ ..] = action else { continue };
        let len = 1 << (what >> 3 & 3);
        let mut buffer = [0; 8];
        for (byte, new) in buffer.iter_mut().zip(value.iter().cycle()) {
            *byte = *new;
        }
        let part = buffer.get_mut(..len).unwrap_or(&mut []);
        // Common configuration is where most of the state is.
        let offset = u64::from(place) * 16 + u64::from(low & 0x3f) + u64::from(high & 0xf) * 0x1000;
        match what & 7 {
            0 => root.read(CONFIG_PORTS, u64::from(place & 7), part),
            1 => root.write(CONFIG_PORTS, u64::from(place & 7), part),
            2 | 3 => {
                let address = 1u32 << 31 | u32::from(place & 3) << 11 | u32::from(low & 0xfc);
                root.write(CONFIG_PORTS, 0, &address.to_le_bytes());
                let data_port = 4 + u64::from(low & 3);
                if what & 1 == 0 {
                    root.read(CONFIG_PORTS, data_port, part);
                } else {
                    root.write(CONFIG_PORTS, data_port, part);
                }
            }
            4 => drop(mmio.read(MMIO_WINDOW_START + u64::from(low & 0x3f), part)),
            5 => drop(mmio.write(MMIO_WINDOW_START + u64::from(low & 0x3f), part)),
            6 => drop(mmio.read(MMIO_WINDOW_START + offset, part)),
            _ => drop(mmio.write(MMIO_WINDOW_START + offset, part)),
        }
    }
}
