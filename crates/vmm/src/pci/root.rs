//! The root bus: slots, the configuration ports and the mapping of BARs.
//!
//! Register the root on the port bus as 8 bytes from [`CONFIG_PORTS`]. Locks are taken in the order
//! root, function, the function's interrupts; a memory-mapped access starts at the function. The bus
//! for memory-mapped I/O is changed with no function locked.

use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::bus::{Bus, BusDevice};
use crate::irq::InterruptSink;
use crate::pci::config::{BAR_COUNT, ConfigSpace, Identity, PciError};
use crate::virtio::transport_pci::StoredVirtio;

/// First port of the configuration mechanism; eight ports belong to it.
pub const CONFIG_PORTS: u64 = 0xcf8;
/// First address of the window for BARs.
pub const MMIO_WINDOW_START: u64 = 0xc000_0000;
/// First address after the window for BARs.
pub const MMIO_WINDOW_END: u64 = 0xfeb0_0000;
/// Slots of the bus, the host bridge being slot 0.
pub const SLOT_COUNT: usize = 32;

const ADDRESS_ENABLE: u32 = 1 << 31;

/// The global interrupt that pin INTA of `slot` is connected to: 16 + slot % 4.
pub fn intx_gsi(slot: u8) -> u32 {
    16 + u32::from(slot % 4)
}

/// A function as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredFunction {
    /// Configuration space, by double words.
    pub config: Vec<u32>,
    /// What a virtio device holds besides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub virtio: Option<StoredVirtio>,
}

/// The bus as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredPci {
    /// The address port.
    pub address: u32,
    /// By slot, the host bridge first.
    pub slots: Vec<StoredFunction>,
}

/// A device on the bus.
pub trait PciFunction: Send {
    /// Its configuration space.
    fn config(&mut self) -> &mut ConfigSpace;
    /// Tells the function where it was plugged in, before software can reach it.
    fn plugged(&mut self, slot: u8);
    /// Software reads configuration space; never beyond its end, at most 4 bytes.
    fn read_config(&mut self, offset: usize, data: &mut [u8]) {
        self.config().read(offset, data);
    }
    /// Software writes configuration space; never beyond its end, at most 4 bytes.
    fn write_config(&mut self, offset: usize, data: &[u8]) {
        self.config().write(offset, data);
    }
    /// Software reads from a BAR.
    fn read_bar(&mut self, bar: usize, offset: u64, data: &mut [u8]);
    /// Software writes to a BAR.
    fn write_bar(&mut self, bar: usize, offset: u64, data: &[u8]);
    /// Asks it to do nothing any more, without waiting.
    fn request_park(&mut self) {}
    /// Waits until it does nothing, neither to memory nor by interrupts.
    fn wait_parked(&mut self) {}
    /// Lets it go on.
    fn unpark(&mut self) {}
    /// What it holds besides configuration space; it is parked.
    fn save(&mut self) -> Option<StoredVirtio> {
        None
    }
    /// Puts that back, with configuration space as it is stored. Software has not used the function.
    ///
    /// # Errors
    /// It is not of this function.
    fn restore(&mut self, stored: &StoredFunction) -> Result<(), &'static str> {
        match stored.virtio {
            None => self.config().restore(&stored.config),
            Some(_) => Err("a device in the place of another one"),
        }
    }
}

struct Slot {
    function: Arc<Mutex<dyn PciFunction>>,
    mapped: [Option<(u64, u64)>; BAR_COUNT],
}

/// The bus with its host bridge in slot 0.
pub struct PciRoot {
    mmio: Arc<Bus>,
    sink: Arc<dyn InterruptSink>,
    address: u32,
    slots: Vec<Slot>,
    next_bar: u64,
}

impl PciRoot {
    /// An empty bus; BARs appear on `mmio`, functions interrupt through `sink`.
    pub fn new(mmio: Arc<Bus>, sink: Arc<dyn InterruptSink>) -> Self {
        let bridge: Arc<Mutex<dyn PciFunction>> = Arc::new(Mutex::new(HostBridge::new()));
        let slots = vec![Slot { function: bridge, mapped: [None; BAR_COUNT] }];
        Self { mmio, sink, address: 0, slots, next_bar: MMIO_WINDOW_START }
    }

    /// Where functions of this bus send interrupts.
    pub fn sink(&self) -> Arc<dyn InterruptSink> {
        Arc::clone(&self.sink)
    }

    /// Plugs a function in and gives its BARs addresses, as firmware would (memory decoding stays
    /// off until software enables it). Returns the slot.
    ///
    /// # Errors
    /// No slot or no address space left.
    pub fn add(&mut self, function: Arc<Mutex<dyn PciFunction>>) -> Result<u8, PciError> {
        let slot = u8::try_from(self.slots.len()).ok().filter(|s| usize::from(*s) < SLOT_COUNT);
        let slot = slot.ok_or(PciError::NoSlot(SLOT_COUNT))?;
        {
            let mut inner = function.lock().unwrap_or_else(PoisonError::into_inner);
            inner.plugged(slot);
            for index in 0..BAR_COUNT {
                let Some((_, size)) = inner.config().bar(index) else { continue };
                let address = self.allocate(size)?;
                inner.config().set_bar(index, address);
            }
        }
        self.slots.push(Slot { function, mapped: [None; BAR_COUNT] });
        self.remap(slot);
        Ok(slot)
    }

    fn each(&self, mut act: impl FnMut(&mut dyn PciFunction)) {
        for slot in &self.slots {
            act(&mut *slot.function.lock().unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Makes all devices finish what they have begun, and do nothing until [`PciRoot::unpark`].
    pub fn park(&mut self) {
        // All at once: each of them may have to wait for its disk.
        self.each(|function| function.request_park());
        self.each(|function| function.wait_parked());
    }

    /// Lets devices go on.
    pub fn unpark(&mut self) {
        self.each(|function| function.unpark());
    }

    /// What is stored of the bus, whose devices are parked.
    pub fn save(&mut self) -> StoredPci {
        let mut slots = Vec::new();
        self.each(|function| {
            let config = function.config().save();
            slots.push(StoredFunction { config, virtio: function.save() });
        });
        StoredPci { address: self.address, slots }
    }

    /// Puts back what was stored of a bus with the same devices, and lets these go on.
    ///
    /// # Errors
    /// The slot, and what is wrong with it.
    pub fn restore(&mut self, stored: &StoredPci) -> Result<(), String> {
        let (now, then) = (self.slots.len(), stored.slots.len());
        if now != then {
            return Err(format!("it has {then} PCI devices, and the machine {now}"));
        }
        self.address = stored.address & 0x80ff_fffc;
        for (slot, stored) in (0..).zip(&stored.slots) {
            let function = self.function(slot);
            if let Some(function) = function {
                let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
                function.restore(stored).map_err(|why| format!("PCI slot {slot}: {why}"))?;
            }
            self.remap(slot);
        }
        Ok(())
    }

    fn allocate(&mut self, size: u64) -> Result<u32, PciError> {
        let full = PciError::NoBarSpace(size);
        let start = self.next_bar.next_multiple_of(size.max(0x1000));
        let end = start.checked_add(size).filter(|end| *end <= MMIO_WINDOW_END);
        self.next_bar = end.ok_or(PciError::NoBarSpace(size))?;
        u32::try_from(start).map_err(|_| full)
    }

    /// The slot and register that the address port points at, for `len` bytes at data port `port`.
    fn target(&self, port: u64, len: usize) -> Option<(u8, usize)> {
        if self.address & ADDRESS_ENABLE == 0 {
            return None;
        }
        let [register, device, bus, _] = self.address.to_le_bytes();
        let (slot, function) = (device >> 3, device & 7);
        let fits = port.checked_add(len as u64).is_some_and(|end| end <= 4);
        let present = usize::from(slot) < self.slots.len();
        if bus != 0 || function != 0 || !fits || !present {
            return None;
        }
        Some((slot, usize::from(register & 0xfc) + usize::try_from(port).ok()?))
    }

    fn function(&self, slot: u8) -> Option<Arc<Mutex<dyn PciFunction>>> {
        self.slots.get(usize::from(slot)).map(|slot| Arc::clone(&slot.function))
    }

    /// Makes the memory bus agree with the BARs of a slot. A BAR outside the window, or where
    /// another device already is, answers nowhere.
    fn remap(&mut self, slot: u8) {
        let Some(entry) = self.slots.get_mut(usize::from(slot)) else { return };
        let wanted = {
            let mut function = entry.function.lock().unwrap_or_else(PoisonError::into_inner);
            function.config().decoded_bars()
        };
        for (index, (mapped, wanted)) in entry.mapped.iter_mut().zip(wanted).enumerate() {
            let wanted = wanted.filter(|(base, size)| {
                *base >= MMIO_WINDOW_START
                    && base.checked_add(*size).is_some_and(|end| end <= MMIO_WINDOW_END)
            });
            if *mapped == wanted {
                continue;
            }
            if let Some((base, _)) = mapped.take() {
                // Only this method maps and unmaps, so the range is there.
                let _ = self.mmio.remove(base);
            }
            if let Some((base, size)) = wanted {
                let window = BarWindow { function: Arc::clone(&entry.function), bar: index };
                let inserted = self.mmio.insert(base, size, Arc::new(Mutex::new(window)));
                *mapped = inserted.is_ok().then_some((base, size));
            }
        }
    }
}

impl BusDevice for PciRoot {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if offset < 4 {
            let address = self.address.to_le_bytes();
            for (byte, value) in data.iter_mut().zip(address.iter().skip(offset as usize)) {
                *byte = *value;
            }
            return;
        }
        let Some((slot, register)) = self.target(offset - 4, data.len()) else { return };
        if let Some(function) = self.function(slot) {
            let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
            function.read_config(register, data);
        }
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        if offset < 4 {
            // The address port takes whole double words; smaller writes are for other chips.
            if let (0, Ok(raw)) = (offset, <[u8; 4]>::try_from(data)) {
                self.address = u32::from_le_bytes(raw) & 0x80ff_fffc;
            }
            return;
        }
        let Some((slot, register)) = self.target(offset - 4, data.len()) else { return };
        if let Some(function) = self.function(slot) {
            {
                let mut function = function.lock().unwrap_or_else(PoisonError::into_inner);
                function.write_config(register, data);
            }
            self.remap(slot);
        }
    }
}

impl Drop for PciRoot {
    fn drop(&mut self) {
        for (base, _) in self.slots.iter().flat_map(|slot| slot.mapped.iter().flatten()) {
            let _ = self.mmio.remove(*base);
        }
    }
}

/// One BAR of one function, as a device of the memory bus.
struct BarWindow {
    function: Arc<Mutex<dyn PciFunction>>,
    bar: usize,
}

impl BusDevice for BarWindow {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        function.read_bar(self.bar, offset, data);
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        let mut function = self.function.lock().unwrap_or_else(PoisonError::into_inner);
        function.write_bar(self.bar, offset, data);
    }
}

/// Slot 0: there only to be found.
struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    fn new() -> Self {
        // The generic host bridge of Red Hat's identifier space: no quirks are tied to it.
        let identity =
            Identity { vendor: 0x1b36, device: 0x0008, class: 0x06_0000, ..Identity::default() };
        Self { config: ConfigSpace::new(&identity, false) }
    }
}

impl PciFunction for HostBridge {
    fn config(&mut self) -> &mut ConfigSpace {
        &mut self.config
    }
    fn plugged(&mut self, _slot: u8) {}
    fn read_bar(&mut self, _bar: usize, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn write_bar(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}
}
