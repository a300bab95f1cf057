//! Whole devices with their threads against a driver that sets them up and then breaks all rules.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::bus::{Bus, BusDevice};
use crate::memory::Memory;
use crate::pci::root::{CONFIG_PORTS, MMIO_WINDOW_START, PciRoot};
use crate::virtio::balloon::device::Balloon;
use crate::virtio::block::device::Block;
use crate::virtio::block::disk::DiskConfig;
use crate::virtio::console::device::Console;
use crate::virtio::device::{COMMON_FEATURES, Device};
use crate::virtio::fuzz::{NoSink, memory};
use crate::virtio::rng::device::Rng;
use crate::virtio::transport_pci::attach;
use crate::virtio::vsock::device::{VsockConfig, VsockDevice};

/// A reset that takes longer is a hang.
const RESET_TIME: Duration = Duration::from_secs(10);
const DISK_BYTES: u64 = 64 << 10;

/// What must outlive the device.
struct Host {
    console: Option<UnixStream>,
    _vsock: Option<crate::virtio::vsock::host::Vsock>,
}

fn device(kind: u8) -> Option<(Box<dyn Device>, Host)> {
    let mut host = Host { console: None, _vsock: None };
    let device: Box<dyn Device> = match kind % 6 {
        0 => Box::new(Rng::new()),
        1 => {
            let (near, far) = UnixStream::pair().ok()?;
            near.set_nonblocking(true).ok()?;
            host.console = Some(near);
            Box::new(Console::new(far).ok()?)
        }
        2 => {
            let (device, vsock) =
                VsockDevice::new(&VsockConfig { guest_cid: 3, path: None }).ok()?;
            host._vsock = Some(vsock);
            Box::new(device)
        }
        5 => Box::new(Balloon::new()),
        kind => {
            // A file without a name, so that nothing is left behind.
            let file = unnamed_file()?;
            let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
            let config = DiskConfig {
                path: path.into(),
                read_only: kind == 4,
                serial: "fuzz".into(),
                ..DiskConfig::default()
            };
            Box::new(Block::new(&config).ok()?)
        }
    };
    Some((device, host))
}

fn unnamed_file() -> Option<std::fs::File> {
    use std::os::fd::FromRawFd;
    // SAFETY: the name is a C string, and the flags are valid.
    let fd = unsafe { libc::memfd_create(c"fuzz".as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return None;
    }
    // SAFETY: the descriptor is new and belongs to nobody else.
    let file = unsafe { std::fs::File::from_raw_fd(fd) };
    file.set_len(DISK_BYTES).ok()?;
    Some(file)
}

struct Driver {
    mmio: Arc<Bus>,
    memory: Arc<Memory>,
    _root: PciRoot,
}

impl Driver {
    fn put(&self, offset: u64, len: usize, value: u64) {
        let bytes = value.to_le_bytes();
        self.mmio.write(MMIO_WINDOW_START + offset, bytes.get(..len).unwrap_or(&[]));
    }

    fn status(&self) -> u8 {
        let mut byte = [0];
        self.mmio.read(MMIO_WINDOW_START + 20, &mut byte);
        byte[0]
    }

    /// Sets queues up where the input is, and says DRIVER_OK.
    fn start(&self, features: u64, layout: u8, size: u16) {
        for status in [1, 3] {
            self.put(20, 1, status);
        }
        for half in 0..2 {
            self.put(8, 4, half);
            self.put(12, 4, (features | COMMON_FEATURES & !(1 << 29)) >> (32 * half) & 0xffff_ffff);
        }
        self.put(20, 1, 0xb);
        for queue in 0..3u64 {
            self.put(22, 2, queue);
            self.put(24, 2, u64::from(size));
            let base = (queue + 1) * 0x1000 + u64::from(layout & 7) * 16;
            self.put(32, 8, base);
            self.put(40, 8, base + 0x800 + u64::from(layout >> 3 & 7) * 2);
            self.put(48, 8, base + 0xc00);
            self.put(28, 2, 1);
        }
        self.put(20, 1, 0xf);
    }

    /// # Panics
    /// When the device does not come to rest: what the fuzzer looks for.
    fn reset(&self) {
        self.put(20, 1, 0);
        let end = Instant::now() + RESET_TIME;
        while self.status() != 0 {
            assert!(Instant::now() < end, "the device did not reset");
            std::thread::yield_now();
        }
    }
}

/// One device, chosen by the first byte, with rings and buffers from the input, which it may find in
/// any order.
pub fn devices(data: &[u8]) {
    let Some(([kind, layout, size, features, turns], rest)) = data.split_first_chunk::<5>() else {
        return;
    };
    let (Some(memory), Some((device, mut host))) = (memory(rest), device(*kind)) else { return };
    let mmio = Arc::new(Bus::new());
    let mut root = PciRoot::new(Arc::clone(&mmio), Arc::new(NoSink));
    if attach(&mut root, Arc::clone(&memory), device).is_err() {
        return;
    }
    // Slot 1: memory decoding and bus mastering.
    root.write(CONFIG_PORTS, 0, &(1u32 << 31 | 1 << 11 | 4).to_le_bytes());
    root.write(CONFIG_PORTS, 4, &[6, 0]);
    let driver = Driver { mmio, memory, _root: root };
    for turn in 0..turns % 4 + 1 {
        driver.start(u64::from(*features) | u64::from(*features) << 8, *layout, 1 << (size & 7));
        for (step, bytes) in rest.chunks(16).take(32).enumerate() {
            let &[what, place, value, ..] = bytes else { break };
            match what & 7 {
                0..=3 => driver.put(0x3000 + 4 * u64::from(what & 3), 2, u64::from(what & 3)),
                // The rings change under the device.
                4 | 5 => {
                    let at = GuestAddress(u64::from(place) * 64 + step as u64);
                    // Inside the arena.
                    let _ = driver.memory.write_slice(bytes, at);
                }
                6 => driver.put(u64::from(place) * 4, 1 << (value & 3), u64::from(value) << 5),
                _ => {
                    if let Some(console) = &mut host.console {
                        // Neither has to find anybody.
                        let _ = console.write(bytes);
                        let _ = console.read(&mut [0; 256]);
                    }
                }
            }
        }
        driver.reset();
        if turn == 1 {
            host.console = None;
        }
    }
}
