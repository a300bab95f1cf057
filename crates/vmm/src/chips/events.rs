//! The generic event device (ACPI 6.5, 5.6.9): how a guest is told that something has happened to the
//! machine, where there is no fixed hardware for that.
//!
//! | port | what |
//! |---|---|
//! | 0x604 | what has happened since the last read, which clears it: bit 0, the power button was pressed; bit 1, there is a new generation id |
//!
//! The interrupt line is up as long as there is something to read, so that nothing is lost before
//! the guest has a driver. The method `_EVT` of the DSDT (`acpi`) reads the port and notifies the
//! devices that are meant.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::irq::InterruptSink;

/// The port.
pub const PORT: u64 = 0x604;
/// Number of ports.
pub const LEN: u64 = 1;
/// Interrupt line, level-triggered. Those from 16 to 19 are PCI's.
pub const GSI: u32 = 20;

/// How often a guest is looked after that has an event to read.
const POLL: Duration = Duration::from_millis(5);

/// What has happened; the value is the bit in the register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Event {
    /// The power button was pressed.
    PowerButton = 1 << 0,
    /// The generation id is another one.
    Generation = 1 << 1,
}

const KNOWN: u8 = Event::PowerButton as u8 | Event::Generation as u8;

/// The register.
pub struct EventRegister {
    interrupts: Arc<dyn InterruptSink>,
    pending: u8,
}

/// The register as the port bus and whoever raises events have it.
pub type Events = Arc<Mutex<EventRegister>>;

/// All of it, as it is stored.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    pending: u8,
}

impl EventRegister {
    /// With nothing to read; interrupts on line [`GSI`].
    #[must_use]
    pub fn new(interrupts: Arc<dyn InterruptSink>) -> Self {
        Self { interrupts, pending: 0 }
    }

    /// What is to be stored.
    #[must_use]
    pub fn save(&self) -> Registers {
        Registers { pending: self.pending }
    }

    /// Puts back what was stored, beside what has happened since; after the interrupt controllers.
    pub fn restore(&mut self, saved: &Registers) {
        self.pending |= saved.pending & KNOWN;
        self.update();
    }

    /// Something has happened.
    pub fn raise(&mut self, event: Event) {
        self.pending |= event as u8;
        self.update();
    }

    /// Whether the guest has not read that yet.
    #[must_use]
    pub fn is_pending(&self, event: Event) -> bool {
        self.pending & event as u8 != 0
    }

    fn update(&self) {
        self.interrupts.set_line(GSI, self.pending != 0);
    }
}

impl BusDevice for EventRegister {
    fn read(&mut self, _base: u64, _offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = std::mem::take(&mut self.pending);
            self.update();
        }
    }

    fn write(&mut self, _base: u64, _offset: u64, _data: &[u8]) {}
}

/// The register, locked. Nobody leaves it half changed.
pub fn lock(events: &Events) -> MutexGuard<'_, EventRegister> {
    events.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The power button of a machine, for servers.
#[derive(Clone)]
pub struct PowerButton {
    events: Events,
}

impl PowerButton {
    /// Of the machine with this register.
    #[must_use]
    pub fn new(events: Events) -> Self {
        Self { events }
    }

    /// Presses it. What the guest does then is up to the guest; most power off, if they have a driver
    /// for it.
    pub fn press(&self) {
        lock(&self.events).raise(Event::PowerButton);
    }

    /// Waits until the guest's firmware interpreter has taken notice, for at most `limit`; whether it
    /// has. One that has may still have nobody who cares.
    #[must_use]
    pub fn is_noticed_within(&self, limit: Duration) -> bool {
        let began = Instant::now();
        loop {
            if !lock(&self.events).is_pending(Event::PowerButton) {
                return true;
            }
            if began.elapsed() >= limit {
                return false;
            }
            std::thread::sleep(POLL);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Event, EventRegister, Events, GSI, KNOWN, PORT, PowerButton, Registers, lock};
    use crate::bus::BusDevice;
    use crate::irq::InterruptSink;
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    #[derive(Default)]
    struct Line(Mutex<Vec<bool>>);

    impl InterruptSink for Line {
        fn set_line(&self, gsi: u32, level: bool) {
            assert_eq!(gsi, GSI);
            self.0.lock().unwrap().push(level);
        }
        fn signal_msi(&self, _address: u64, _data: u32) {}
    }

    impl Line {
        fn taken(&self) -> Vec<bool> {
            std::mem::take(&mut *self.0.lock().unwrap())
        }
    }

    fn register() -> (Events, Arc<Line>) {
        let line = Arc::new(Line::default());
        (Arc::new(Mutex::new(EventRegister::new(line.clone()))), line)
    }

    fn read(events: &Events) -> u8 {
        let mut data = [0xff];
        lock(events).read(PORT, 0, &mut data);
        data[0]
    }

    #[test]
    fn events_are_read_once_and_hold_the_line() {
        let (events, line) = register();
        assert_eq!((read(&events), line.taken()), (0, vec![false]));
        lock(&events).raise(Event::PowerButton);
        lock(&events).raise(Event::Generation);
        lock(&events).write(PORT, 0, &[0xff]);
        assert_eq!(line.taken(), [true, true], "writes change nothing");
        assert_eq!((read(&events), line.taken()), (3, vec![false]));
        assert_eq!(read(&events), 0);
        // Wider than the register, and not at all.
        lock(&events).raise(Event::Generation);
        let mut wide = [0xff; 4];
        lock(&events).read(PORT, 0, &mut []);
        lock(&events).read(PORT, 0, &mut wide);
        assert_eq!(wide, [2, 0, 0, 0]);
    }

    #[test]
    fn a_button_knows_whether_it_was_noticed() {
        let (events, _) = register();
        let button = PowerButton::new(Arc::clone(&events));
        button.press();
        assert!(!button.is_noticed_within(Duration::ZERO));
        assert_eq!(read(&events), 1);
        assert!(button.is_noticed_within(Duration::ZERO));
    }

    #[test]
    fn what_was_not_read_is_stored() {
        let (events, _) = register();
        lock(&events).raise(Event::PowerButton);
        let saved = lock(&events).save();
        let (events, line) = register();
        lock(&events).raise(Event::Generation);
        lock(&events).restore(&saved);
        assert_eq!(line.taken(), [true, true]);
        assert_eq!(read(&events), 3);
        // One that was altered.
        lock(&events).restore(&Registers { pending: 0xff });
        assert_eq!(read(&events), KNOWN);
    }
}
