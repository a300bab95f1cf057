//! Which chip is where.

use std::sync::{Arc, Mutex, PoisonError};

use crate::bus::{BusDevice, SharedDevice};
use crate::chips::chipset::{Chipset, IoApicRegisters, PicRegisters};
use crate::chips::debug_exit::{self, DebugExit};
use crate::chips::events::{self, EventRegister, Events};
use crate::chips::pic::PicPair;
use crate::chips::pit::Pit;
use crate::chips::power::{Power, RESET_CONTROL};
use crate::chips::rtc::{self, Rtc};
use crate::chips::serial::{self, Serial};
use crate::console::{Console, Consoles};
use crate::error::MachineError;
use crate::irq::InterruptSink;
use crate::machine::{AttachPci, Board, DeviceContext, MachineConfig, insert};
use crate::memory::{IOAPIC_BASE, PCI_WINDOW_32};
use crate::pci::root::PciRoot;

const PCI_PORTS: (u64, u64) = (0xcf8, 8);

/// The interrupt controllers, which KVM has inside.
pub(super) fn add_interrupt_chips(
    board: &Board,
    chipset: &Arc<Chipset>,
) -> Result<(), MachineError> {
    let ioapic = Arc::new(Mutex::new(IoApicRegisters(Arc::clone(chipset))));
    insert(&board.mmio, &[(IOAPIC_BASE, 0x1000)], &ioapic)?;
    let pic = Arc::new(Mutex::new(PicRegisters(Arc::clone(chipset))));
    insert(&board.ports, &PicPair::RANGES, &pic)
}

/// The PIT. KVM has one, too, but does not tell all of it, and forgets how far it has counted when it is
/// put back.
pub(super) fn add_pit(
    board: &Board,
    interrupts: &Arc<dyn InterruptSink>,
) -> Result<Arc<Mutex<Pit>>, MachineError> {
    let pit = Arc::new(Mutex::new(Pit::new(Arc::clone(&board.clock), Arc::clone(interrupts))));
    let expired = Arc::downgrade(&pit);
    let alarm = board.timers.add(move || {
        if let Some(pit) = expired.upgrade() {
            pit.lock().unwrap_or_else(PoisonError::into_inner).expired();
        }
    })?;
    pit.lock().unwrap_or_else(PoisonError::into_inner).set_alarm(alarm);
    insert(&board.ports, &Pit::RANGES, &pit)?;
    Ok(pit)
}

/// What of the devices is stored with the machine.
pub(super) struct StoredDevices {
    pub(super) rtc: Arc<Mutex<Rtc>>,
    pub(super) serial: Arc<Mutex<Serial>>,
    pub(super) pci: Option<Arc<Mutex<PciRoot>>>,
    pub(super) events: Events,
}

/// Serial port, clock, power, events, debug exit and the PCI bus.
pub(super) fn add_devices(
    config: &MachineConfig,
    board: &Board,
    interrupts: &Arc<dyn InterruptSink>,
    attach: Option<AttachPci>,
    goes_on_with: Option<Vec<u16>>,
) -> Result<(DeviceContext, Console, StoredDevices), MachineError> {
    let (ram, ports) = (&board.ram, &board.ports);
    let power = Arc::new(Mutex::new(Power::new(Arc::clone(&board.ending))));
    insert(ports, &Power::RANGES, &power)?;
    let events = Arc::new(Mutex::new(EventRegister::new(Arc::clone(interrupts))));
    insert(ports, &[(events::PORT, events::LEN)], &events)?;
    let clock = Rtc::new(Arc::clone(&board.clock), ram.low_bytes(), ram.high_bytes());
    let clock = Arc::new(Mutex::new(clock));
    insert(ports, &[(rtc::PORT, rtc::LEN)], &clock)?;
    if config.debug_exit {
        let exit = Arc::new(Mutex::new(DebugExit::new(Arc::clone(&board.ending))));
        insert(ports, &[(debug_exit::PORT, debug_exit::LEN)], &exit)?;
    }
    let context = DeviceContext {
        memory: ram.memory().clone(),
        mmio: Arc::clone(&board.mmio),
        ports: Arc::clone(ports),
        interrupts: Arc::clone(interrupts),
        window_32: PCI_WINDOW_32,
        window_64: ram.pci_window_64(),
        ending: Arc::clone(&board.ending),
        consoles: Consoles::default(),
        events: Arc::clone(&events),
        goes_on_with,
    };
    // The PCI root bus: whatever `attach` gives answers at the configuration ports.
    let pci = attach.map(|attach| attach(&context)).transpose().map_err(MachineError::Device)?;
    let stored = pci.clone();
    let pci = pci.map(|pci| pci as SharedDevice);
    insert(ports, &[PCI_PORTS], &Arc::new(Mutex::new(PciPorts { pci, power })))?;

    let mut console = Console::open(&config.serial)?;
    let port = Serial::new(Arc::clone(interrupts), serial::COM1_GSI, console.sink());
    let port = Arc::new(Mutex::new(port));
    insert(ports, &[(serial::COM1, serial::LEN)], &port)?;
    console.start_input(&port, &board.ending)?;
    let stored = StoredDevices { rtc: clock, serial: port, events, pci: stored };
    Ok((context, console, stored))
}

/// Ports 0xcf8 to 0xcff: PCI configuration, and the reset control register in a byte of it.
struct PciPorts {
    pci: Option<SharedDevice>,
    power: Arc<Mutex<Power>>,
}

const RESET_OFFSET: u64 = RESET_CONTROL as u64 - PCI_PORTS.0;

impl BusDevice for PciPorts {
    fn read(&mut self, base: u64, offset: u64, data: &mut [u8]) {
        if offset == RESET_OFFSET && data.len() == 1 {
            let mut power = self.power.lock().unwrap_or_else(PoisonError::into_inner);
            return power.read(base, offset, data);
        }
        match &self.pci {
            Some(pci) => {
                pci.lock().unwrap_or_else(PoisonError::into_inner).read(base, offset, data);
            }
            None => data.fill(0xff),
        }
    }

    fn write(&mut self, base: u64, offset: u64, data: &[u8]) {
        if offset == RESET_OFFSET && data.len() == 1 {
            let mut power = self.power.lock().unwrap_or_else(PoisonError::into_inner);
            return power.write(base, offset, data);
        }
        if let Some(pci) = &self.pci {
            pci.lock().unwrap_or_else(PoisonError::into_inner).write(base, offset, data);
        }
    }
}
