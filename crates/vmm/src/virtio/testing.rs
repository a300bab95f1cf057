//! A fake guest: memory, a PCI bus driven through its ports, and a virtio driver for one device.
//!
//! Tests talk to devices only through registers and rings, as a guest does.

use std::collections::HashMap;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::bus::{Bus, BusDevice};
use crate::irq::InterruptSink;
use crate::memory::{GuestRam, Memory};
use crate::pci::root::{CONFIG_PORTS, PciRoot, StoredPci};
use crate::virtio::device::{COMMON_FEATURES, Device};
use crate::virtio::transport_pci::attach;

pub(crate) const MEMORY_SIZE: u64 = 32 << 20;
/// Rings of queue N start here plus N times 64 KiB.
const RINGS: u64 = 0x10_0000;
/// Buffers are taken from here on.
const BUFFERS: u64 = 0x40_0000;
const WAIT: Duration = Duration::from_secs(20);

pub(crate) fn ram() -> (GuestRam, Arc<Memory>) {
    let ram = GuestRam::new(MEMORY_SIZE).unwrap();
    let memory = Arc::new(ram.memory().clone());
    (ram, memory)
}

/// Records interrupts.
#[derive(Default)]
pub(crate) struct Sink {
    state: Mutex<SinkState>,
    changed: Condvar,
}

#[derive(Default)]
struct SinkState {
    messages: Vec<(u64, u32)>,
    lines: HashMap<u32, bool>,
}

impl Sink {
    pub fn messages(&self) -> Vec<(u64, u32)> {
        self.state.lock().unwrap().messages.clone()
    }

    pub fn line(&self, gsi: u32) -> bool {
        self.state.lock().unwrap().lines.get(&gsi).copied().unwrap_or(false)
    }

    /// Waits until `check` holds, looking again after each interrupt and now and then.
    pub fn wait_until(&self, what: &str, mut check: impl FnMut() -> bool) {
        let end = Instant::now() + WAIT;
        loop {
            if check() {
                return;
            }
            assert!(Instant::now() < end, "timed out waiting for {what}");
            let state = self.state.lock().unwrap();
            drop(self.changed.wait_timeout(state, Duration::from_millis(2)).unwrap());
        }
    }
}

impl InterruptSink for Sink {
    fn set_line(&self, gsi: u32, level: bool) {
        self.state.lock().unwrap().lines.insert(gsi, level);
        self.changed.notify_all();
    }
    fn signal_msi(&self, address: u64, data: u32) {
        self.state.lock().unwrap().messages.push((address, data));
        self.changed.notify_all();
    }
}

/// A buffer of a request.
pub(crate) enum Part<'a> {
    /// The device reads this.
    Out(&'a [u8]),
    /// The device writes that many bytes.
    In(u32),
}

struct Ring {
    size: u16,
    avail: u16,
    used: u16,
    free: Vec<u16>,
    chains: HashMap<u16, Offered>,
}

struct Offered {
    descriptors: Vec<u16>,
    /// Address and length of what the device writes.
    writable: Vec<(u64, u32)>,
}

/// A machine with one virtio device, and its driver.
pub(crate) struct Guest {
    pub ram: GuestRam,
    pub memory: Arc<Memory>,
    pub sink: Arc<Sink>,
    pub mmio: Arc<Bus>,
    pub root: PciRoot,
    pub bar: u64,
    pub slot: u8,
    rings: Vec<Ring>,
    next_buffer: u64,
}

impl Guest {
    pub fn new(device: impl Device) -> Self {
        let (ram, memory) = ram();
        let sink = Arc::new(Sink::default());
        let mmio = Arc::new(Bus::new());
        let mut root = PciRoot::new(Arc::clone(&mmio), Arc::clone(&sink) as _);
        let slot = attach(&mut root, Arc::clone(&memory), Box::new(device)).unwrap();
        let mut guest = Self {
            ram,
            memory,
            sink,
            mmio,
            root,
            bar: 0,
            slot,
            rings: Vec::new(),
            next_buffer: BUFFERS,
        };
        guest.bar = u64::from(guest.config_read(0x10, 4) & !0xf);
        guest.config_write(0x04, 2, 0x6);
        guest
    }

    /// The machine with its bus stored and put back with another device, of the same kind. The old
    /// device is dropped before `make` makes the new one.
    pub fn moved<D: Device>(mut self, make: impl FnOnce() -> D) -> Self {
        let stored = self.stored();
        self.root = PciRoot::new(Arc::clone(&self.mmio), Arc::clone(&self.sink) as _);
        attach(&mut self.root, Arc::clone(&self.memory), Box::new(make())).unwrap();
        self.root.restore(&stored).unwrap();
        self
    }

    /// The bus as it is stored, through its text; its devices stay parked.
    pub fn stored(&mut self) -> StoredPci {
        self.root.park();
        let text = serde_json::to_string(&self.root.save()).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    // ---- PCI

    pub fn config_read(&mut self, register: u8, len: usize) -> u32 {
        self.config_read_at(self.slot, register, len)
    }

    pub fn config_read_at(&mut self, slot: u8, register: u8, len: usize) -> u32 {
        let address = 1 << 31 | u32::from(slot) << 11 | u32::from(register & !3);
        self.root.write(CONFIG_PORTS, 0, &address.to_le_bytes());
        let mut raw = [0; 4];
        self.root.read(CONFIG_PORTS, 4 + u64::from(register & 3), &mut raw[..len]);
        u32::from_le_bytes(raw)
    }

    pub fn config_write(&mut self, register: u8, len: usize, value: u32) {
        let address = 1 << 31 | u32::from(self.slot) << 11 | u32::from(register & !3);
        self.root.write(CONFIG_PORTS, 0, &address.to_le_bytes());
        let raw = value.to_le_bytes();
        self.root.write(CONFIG_PORTS, 4 + u64::from(register & 3), &raw[..len]);
    }

    /// Where a capability is; for vendor capabilities also of which kind.
    pub fn capability(&mut self, id: u8, kind: Option<u8>) -> Option<u8> {
        let mut at = self.config_read(0x34, 1) as u8;
        for _ in 0..48 {
            if at == 0 {
                break;
            }
            let found = self.config_read(at, 1) as u8 == id;
            if found && kind.is_none_or(|kind| self.config_read(at + 3, 1) as u8 == kind) {
                return Some(at);
            }
            at = self.config_read(at + 1, 1) as u8;
        }
        None
    }

    pub fn bar_read(&self, offset: u64, len: usize) -> u64 {
        let mut raw = [0; 8];
        self.mmio.read(self.bar + offset, &mut raw[..len]);
        u64::from_le_bytes(raw)
    }

    pub fn bar_write(&self, offset: u64, len: usize, value: u64) {
        self.mmio.write(self.bar + offset, &value.to_le_bytes()[..len]);
    }

    // ---- driver

    pub fn status(&self) -> u8 {
        self.bar_read(20, 1) as u8
    }

    pub fn device_features(&self) -> u64 {
        let mut features = 0;
        for half in 0..2 {
            self.bar_write(0, 4, half);
            features |= self.bar_read(4, 4) << (32 * half);
        }
        features
    }

    /// Resets, negotiates `features` and the common ones (without those in `without`), sets all
    /// queues up and says DRIVER_OK. Queue N has MSI-X vector N.
    pub fn start(&mut self, features: u64, without: u64) {
        self.reset();
        self.bar_write(20, 1, 1);
        self.bar_write(20, 1, 3);
        let features = (features | COMMON_FEATURES) & !without;
        for half in 0..2 {
            self.bar_write(8, 4, half);
            self.bar_write(12, 4, features >> (32 * half) & 0xffff_ffff);
        }
        self.bar_write(20, 1, 0xb);
        assert_eq!(self.status() & 8, 8, "features were refused");
        let count = self.bar_read(18, 2);
        self.enable_msix(count as u32 + 1);
        self.rings.clear();
        for queue in 0..count {
            self.bar_write(22, 2, queue);
            let size = self.bar_read(24, 2) as u16;
            let base = RINGS + queue * 0x1_0000;
            self.memory.write_slice(&vec![0; 0x1_0000], GuestAddress(base)).unwrap();
            self.bar_write(26, 2, queue);
            assert_eq!(self.bar_read(26, 2), queue);
            self.bar_write(32, 4, base);
            self.bar_write(36, 4, 0);
            self.bar_write(40, 8, base + 0x8000);
            self.bar_write(48, 8, base + 0xc000);
            self.bar_write(28, 2, 1);
            self.rings.push(Ring {
                size,
                avail: 0,
                used: 0,
                free: (0..size).rev().collect(),
                chains: HashMap::new(),
            });
        }
        self.bar_write(16, 2, count);
        self.next_buffer = BUFFERS;
        self.bar_write(20, 1, 0xf);
        assert_eq!(self.status(), 0xf);
    }

    pub fn reset(&mut self) {
        self.bar_write(20, 1, 0);
        let sink = Arc::clone(&self.sink);
        sink.wait_until("reset", || self.status() == 0);
    }

    /// Vector N sends data 0x40 + N to 0xfee00000, unmasked.
    pub fn enable_msix(&mut self, vectors: u32) {
        for vector in 0..u64::from(vectors) {
            let entry = 0x4000 + vector * 16;
            self.bar_write(entry, 8, 0xfee0_0000);
            self.bar_write(entry + 8, 4, 0x40 + vector);
            self.bar_write(entry + 12, 4, 0);
        }
        let at = self.capability(0x11, None).unwrap();
        self.config_write(at + 2, 2, 0x8000);
    }

    fn buffer(&mut self, len: u32) -> u64 {
        let at = self.next_buffer;
        let next = (at + u64::from(len)).next_multiple_of(64);
        if next > MEMORY_SIZE {
            self.next_buffer = BUFFERS;
            return self.buffer(len);
        }
        self.next_buffer = next;
        at
    }

    fn ring_base(queue: usize) -> u64 {
        RINGS + queue as u64 * 0x1_0000
    }

    pub fn write_descriptor(&self, at: u64, address: u64, len: u32, flags: u16, next: u16) {
        let memory = &self.memory;
        memory.write_obj(address, GuestAddress(at)).unwrap();
        memory.write_obj(len, GuestAddress(at + 8)).unwrap();
        memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
        memory.write_obj(next, GuestAddress(at + 14)).unwrap();
    }

    /// Where descriptor `index` of a queue is.
    pub fn descriptor_address(queue: usize, index: u16) -> u64 {
        Self::ring_base(queue) + u64::from(index) * 16
    }

    /// Offers a head without looking at what it names.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let base = Self::ring_base(queue) + 0x8000;
        let slot = u64::from(ring.avail % ring.size);
        self.memory.write_obj(head, GuestAddress(base + 4 + slot * 2)).unwrap();
        ring.avail = ring.avail.wrapping_add(1);
        let order = std::sync::atomic::Ordering::SeqCst;
        self.memory.store(ring.avail, GuestAddress(base + 2), order).unwrap();
        // used_event: an interrupt for the very next used buffer.
        let event = GuestAddress(base + 4 + u64::from(ring.size) * 2);
        self.memory.store(ring.used, event, order).unwrap();
    }

    /// Offers a request, as a direct or an indirect chain; returns its head.
    pub fn add(&mut self, queue: usize, parts: &[Part<'_>], indirect: bool) -> u16 {
        let head = self.prepare(queue, parts, indirect);
        self.offer(queue, head);
        head
    }

    /// Writes a request's chain, which the device sees when its head is offered.
    pub fn prepare(&mut self, queue: usize, parts: &[Part<'_>], indirect: bool) -> u16 {
        let mut buffers = Vec::new();
        for part in parts {
            let (len, flags) = match part {
                Part::Out(data) => (data.len() as u32, 0),
                Part::In(len) => (*len, 2),
            };
            let address = self.buffer(len);
            match part {
                Part::Out(data) => self.memory.write_slice(data, GuestAddress(address)).unwrap(),
                Part::In(len) => {
                    let zeroes = vec![0xcc; *len as usize];
                    self.memory.write_slice(&zeroes, GuestAddress(address)).unwrap();
                }
            }
            buffers.push((address, len, flags));
        }
        let table = indirect.then(|| self.buffer(16 * parts.len() as u32));
        let wanted = if indirect { 1 } else { parts.len() };
        let ring = &mut self.rings[queue];
        let indexes: Vec<u16> = (0..wanted).map(|_| ring.free.pop().unwrap()).collect();
        let head = indexes[0];
        let inside = buffers.iter().filter(|(_, _, flags)| *flags == 2);
        let writable = inside.map(|(address, len, _)| (*address, *len)).collect();
        ring.chains.insert(head, Offered { descriptors: indexes.clone(), writable });
        let last = buffers.len() - 1;
        for (i, (address, len, flags)) in buffers.iter().enumerate() {
            let flags = if i < last { flags | 1 } else { *flags };
            let (at, next) = match table {
                Some(table) => (table + i as u64 * 16, i as u16 + 1),
                None => {
                    let next = indexes.get(i + 1).copied().unwrap_or(0);
                    (Self::descriptor_address(queue, indexes[i]), next)
                }
            };
            self.write_descriptor(at, *address, *len, flags, next);
        }
        if let Some(table) = table {
            let at = Self::descriptor_address(queue, head);
            self.write_descriptor(at, table, 16 * buffers.len() as u32, 4, 0);
        }
        head
    }

    pub fn kick(&self, queue: usize) {
        self.bar_write(0x3000 + 4 * queue as u64, 2, queue as u64);
    }

    /// The next used chain: head, the used length, and the bytes of its writable part.
    pub fn poll_used(&mut self, queue: usize) -> Option<(u16, u32, Vec<u8>)> {
        let base = Self::ring_base(queue) + 0xc000;
        let order = std::sync::atomic::Ordering::SeqCst;
        let index: u16 = self.memory.load(GuestAddress(base + 2), order).unwrap();
        let ring = &mut self.rings[queue];
        if index == ring.used {
            return None;
        }
        let entry = base + 4 + u64::from(ring.used % ring.size) * 8;
        let head: u32 = self.memory.read_obj(GuestAddress(entry)).unwrap();
        let len: u32 = self.memory.read_obj(GuestAddress(entry + 4)).unwrap();
        ring.used = ring.used.wrapping_add(1);
        let event = Self::ring_base(queue) + 0x8000 + 4 + u64::from(ring.size) * 2;
        self.memory.store(ring.used, GuestAddress(event), order).unwrap();
        let offered = ring.chains.remove(&(head as u16)).expect("an unknown chain");
        ring.free.extend(offered.descriptors);
        let mut data = Vec::new();
        for (address, size) in offered.writable {
            let mut part = vec![0; size as usize];
            self.memory.read_slice(&mut part, GuestAddress(address)).unwrap();
            data.extend(part);
        }
        Some((head as u16, len, data))
    }

    /// Waits for the next used chain.
    pub fn used(&mut self, queue: usize) -> (u16, u32, Vec<u8>) {
        let sink = Arc::clone(&self.sink);
        let mut result = None;
        sink.wait_until("a used buffer", || {
            result = self.poll_used(queue);
            result.is_some()
        });
        result.unwrap()
    }

    /// One request from start to end.
    pub fn request(&mut self, queue: usize, parts: &[Part<'_>], indirect: bool) -> (u32, Vec<u8>) {
        let head = self.add(queue, parts, indirect);
        self.kick(queue);
        let (done, len, data) = self.used(queue);
        assert_eq!(done, head);
        (len, data)
    }

    pub fn wait_needs_reset(&self) {
        self.sink.wait_until("DEVICE_NEEDS_RESET", || self.status() & 0x40 != 0);
    }

    /// Device-specific configuration.
    pub fn device_config(&self, offset: u64, len: usize) -> u64 {
        self.bar_read(0x2000 + offset, len)
    }
}
