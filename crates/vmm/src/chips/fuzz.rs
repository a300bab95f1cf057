//! Entry point for fuzzing the chips: any accesses at any time, with two local APICs that answer
//! interrupts in between. It must return, whatever the bytes are.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::bus::BusDevice;
use crate::chips::chipset::{Chipset, IoApicRegisters, PicRegisters};
use crate::chips::events::{self, Event, EventRegister};
use crate::chips::lapic::message::ApicBus;
use crate::chips::lapic::{CpuSignals, Lapic, MSR_X2APIC};
use crate::chips::pic::PicPair;
use crate::chips::pit::Pit;
use crate::chips::power::Power;
use crate::chips::rtc::Rtc;
use crate::chips::serial::{ByteSink, Serial};
use crate::clock::Clock;
use crate::irq::InterruptSink;
use crate::outcome::Ending;
use crate::timer::Alarm;

/// Moves only by what the input says.
#[derive(Default)]
struct InputClock(AtomicU64);

impl Clock for InputClock {
    fn now_ns(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
    fn tsc(&self) -> u64 {
        self.now_ns().wrapping_mul(2)
    }
    fn tsc_hz(&self) -> u64 {
        2_000_000_000
    }
    fn wall(&self) -> Duration {
        Duration::from_nanos(self.now_ns())
    }
}

/// A vCPU, a console and an alarm that do nothing.
struct Deaf;

impl CpuSignals for Deaf {
    fn interrupt(&self) {}
    fn nmi(&self) {}
    fn init(&self) {}
    fn startup(&self, _vector: u8) {}
}

impl ByteSink for Deaf {
    fn put(&mut self, _byte: u8) {}
}

impl Alarm for Deaf {
    fn set(&self, _after_ns: u64) {}
    fn clear(&self) {}
}

struct Board {
    clock: Arc<InputClock>,
    apics: Vec<Arc<Lapic>>,
    chipset: Arc<Chipset>,
    pit: Pit,
    serial: Arc<Mutex<Serial>>,
    ending: Arc<Ending>,
    /// Port devices with their first port and the number of ports.
    ports: Vec<(u64, u64, Box<dyn BusDevice>)>,
}

impl Board {
    fn new() -> Self {
        let clock = Arc::new(InputClock::default());
        let shared = || Arc::clone(&clock) as Arc<dyn Clock>;
        let apics: Vec<_> =
            (0..2).map(|id| Lapic::new(id, id == 0, shared(), Arc::new(Deaf))).collect();
        for apic in &apics {
            apic.set_alarm(Arc::new(Deaf));
        }
        let chipset = Chipset::new(Arc::new(ApicBus::new(apics.clone())), Arc::new(Deaf));
        let interrupts = || Arc::clone(&chipset) as Arc<dyn InterruptSink>;
        let mut pit = Pit::new(shared(), interrupts());
        pit.set_alarm(Arc::new(Deaf));
        let serial = Arc::new(Mutex::new(Serial::new(interrupts(), 4, Box::new(Deaf))));
        let ending = Arc::new(Ending::default());
        let mut ports: Vec<(u64, u64, Box<dyn BusDevice>)> = Vec::new();
        for (base, len) in Power::RANGES {
            ports.push((base, len, Box::new(Power::new(Arc::clone(&ending)))));
        }
        for (base, len) in PicPair::RANGES {
            ports.push((base, len, Box::new(PicRegisters(Arc::clone(&chipset)))));
        }
        let mut events = EventRegister::new(interrupts());
        events.raise(Event::PowerButton);
        ports.push((events::PORT, events::LEN, Box::new(events)));
        ports.push((0x70, 2, Box::new(Rtc::new(shared(), 64 << 20, 0))));
        ports.push((0, 0x100, Box::new(IoApicRegisters(Arc::clone(&chipset)))));
        Self { clock, apics, chipset, pit, serial, ending, ports }
    }

    /// Time passes and alarms go off, also those that nobody set.
    fn pass(&mut self, ns: u64) {
        self.clock.0.fetch_add(ns, Ordering::Relaxed);
        self.pit.expired();
        for apic in &self.apics {
            apic.timer_expired();
        }
    }

    fn apic(&self, which: u8, offset: u64, data: &mut [u8], value: u64) {
        let Some(apic) = self.apics.get(usize::from(which & 1)) else { return };
        let msr = MSR_X2APIC + (offset as u32 >> 4);
        match which >> 1 & 7 {
            0 => apic.mmio_read(offset, data),
            1 | 2 => self.chipset.perform(apic.id(), apic.mmio_write(offset, data)),
            3 => drop(apic.read_msr(msr)),
            4 => {
                if let Some(effect) = apic.write_msr(msr, value) {
                    self.chipset.perform(apic.id(), effect);
                }
            }
            5 => drop(apic.set_base(value)),
            6 => apic.set_tsc_deadline(value, value.rotate_left(7)),
            _ => apic.set_task_priority_class(which >> 4),
        }
    }

    /// What vCPUs do with interrupts.
    fn take_interrupts(&self) {
        for apic in &self.apics {
            if apic.accepts_external() {
                let _ = self.chipset.acknowledge_external();
            }
            let before = apic.priority();
            if let Some(vector) = apic.acknowledge() {
                assert!(vector >> 4 > before >> 4, "{vector:#x} over {before:#x}");
            }
        }
    }
}

/// Accesses of eleven bytes each: kind, place, size, value.
pub fn chips(data: &[u8]) {
    let mut board = Board::new();
    for action in data.chunks_exact(11) {
        let &[what, place, size, ref value @ ..] = action else { continue };
        let number = u64::from_le_bytes(value.try_into().unwrap_or_default());
        let mut buffer = number.to_le_bytes();
        let part = buffer.get_mut(..1 << (size & 3)).unwrap_or(&mut []);
        let serial = Arc::clone(&board.serial);
        let mut serial = serial.lock().unwrap_or_else(PoisonError::into_inner);
        match what & 15 {
            // At most 18 minutes each, so that the clock does not reach the end of its 584 years.
            0 => board.pass(number >> (24 + size % 40)),
            1 | 2 => board.apic(what >> 4 | size << 4, u64::from(place) << 4, part, number),
            3 => board.apic(size, u64::from(place) << 4 | u64::from(what >> 4), part, number),
            4 => board.pit.read(0x40, u64::from(place & 3), part),
            5 => board.pit.write(0x40, u64::from(place & 3), part),
            6 => board.pit.write(0x61, 0, part),
            7 => serial.read(0x3f8, u64::from(place & 7), part),
            8 => serial.write(0x3f8, u64::from(place & 7), part),
            9 => drop(serial.receive(value)),
            10 => board.chipset.set_line(u32::from(place), size & 1 != 0),
            11 => board.chipset.signal_msi(0xfee0_0000 ^ number >> 32, number as u32),
            12 => board.take_interrupts(),
            kind => {
                let count = board.ports.len().max(1);
                let Some(port) = board.ports.get_mut(usize::from(what >> 4) % count) else {
                    continue;
                };
                let (base, len, device) = port;
                let offset = u64::from(place) % *len;
                match kind {
                    13 => device.read(*base, offset, part),
                    _ => device.write(*base, offset, part),
                }
            }
        }
    }
    // However it ended, or not.
    let _ = board.ending.outcome();
}

#[cfg(test)]
mod tests {
    use super::chips;

    #[test]
    fn rubbish_accesses_are_survived() {
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        for _ in 0..300 {
            let bytes: Vec<u8> = std::iter::repeat_with(|| {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                (x >> 24) as u8
            })
            .take(11 * 200)
            .collect();
            chips(&bytes);
        }
    }
}
