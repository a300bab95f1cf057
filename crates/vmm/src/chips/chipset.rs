//! The interrupt controllers together: lines go to the 8259 pair and the I/O APIC, messages to the
//! local APICs.
//!
//! Locks are taken in the order devices, 8259 pair or I/O APIC, local APIC, and never backwards.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::bus::BusDevice;
use crate::chips::ioapic::{self, IoApic};
use crate::chips::lapic::message::ApicBus;
use crate::chips::lapic::{CpuSignals, Effect};
use crate::chips::pic::PicPair;
use crate::irq::InterruptSink;

/// The interrupt controllers of an emulated machine.
pub struct Chipset {
    apics: Arc<ApicBus>,
    ioapic: Mutex<IoApic>,
    pic: Mutex<PicPair>,
    boot_cpu: Arc<dyn CpuSignals>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Chipset {
    /// Around these local APICs; `boot_cpu` is the vCPU that the 8259 pair interrupts.
    #[must_use]
    pub fn new(apics: Arc<ApicBus>, boot_cpu: Arc<dyn CpuSignals>) -> Arc<Self> {
        let ioapic = Mutex::new(IoApic::new(Arc::clone(&apics)));
        Arc::new(Self { apics, ioapic, pic: Mutex::new(PicPair::new()), boot_cpu })
    }

    /// What is to be stored of the I/O APIC and of the 8259 pair.
    #[must_use]
    pub fn save(&self) -> (ioapic::Registers, PicPair) {
        (lock(&self.ioapic).save(), lock(&self.pic).clone())
    }

    /// Puts back what was stored.
    pub fn restore(&self, ioapic: &ioapic::Registers, pic: PicPair) {
        lock(&self.ioapic).restore(ioapic);
        *lock(&self.pic) = pic.sound();
        self.notify_boot_cpu();
    }

    /// The local APICs.
    #[must_use]
    pub fn apics(&self) -> &ApicBus {
        &self.apics
    }

    /// Does what an access to the local APIC `sender` asked for.
    pub fn perform(&self, sender: u32, effect: Effect) {
        match effect {
            Effect::None => {}
            Effect::Send(icr) => self.apics.send(sender, icr),
            Effect::Eoi(vector) => lock(&self.ioapic).end_of_interrupt(vector),
        }
    }

    /// Whether the 8259 pair asks for an interrupt.
    #[must_use]
    pub fn external_pending(&self) -> bool {
        lock(&self.pic).pending()
    }

    /// Acknowledges an interrupt of the 8259 pair, if it asks for one.
    pub fn acknowledge_external(&self) -> Option<u8> {
        let mut pic = lock(&self.pic);
        pic.pending().then(|| pic.acknowledge())
    }

    fn notify_boot_cpu(&self) {
        self.boot_cpu.interrupt();
    }
}

/// Pin of the I/O APIC of a line: the PIT's line 0 is on pin 2, and line 2 is the cascade.
pub(crate) const fn pin_of(gsi: u32) -> Option<u32> {
    match gsi {
        0 => Some(2),
        2 => None,
        gsi => Some(gsi),
    }
}

impl InterruptSink for Chipset {
    fn set_line(&self, gsi: u32, level: bool) {
        if gsi < 16 && lock(&self.pic).set_line(gsi, level) {
            self.notify_boot_cpu();
        }
        if let Some(pin) = pin_of(gsi) {
            lock(&self.ioapic).set_line(pin, level);
        }
    }

    fn signal_msi(&self, address: u64, data: u32) {
        self.apics.deliver_msi(address, data);
    }
}

/// The I/O APIC's registers, for the bus.
pub struct IoApicRegisters(pub Arc<Chipset>);

impl BusDevice for IoApicRegisters {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        lock(&self.0.ioapic).mmio_read(offset, data);
    }
    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        lock(&self.0.ioapic).mmio_write(offset, data);
    }
}

/// The 8259 pair's registers, for the bus.
pub struct PicRegisters(pub Arc<Chipset>);

impl BusDevice for PicRegisters {
    fn read(&mut self, base: u64, offset: u64, data: &mut [u8]) {
        lock(&self.0.pic).read(base, offset, data);
    }
    fn write(&mut self, base: u64, offset: u64, data: &[u8]) {
        let mut pic = lock(&self.0.pic);
        pic.write(base, offset, data);
        let pending = pic.pending();
        drop(pic);
        if pending {
            self.0.notify_boot_cpu();
        }
    }
}
