//! The 8254 timer, with the system control port B (0x61) that gates and shows its channel 2.
//!
//! Counts are not kept but computed from the time a channel was started.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::clock::{Clock, scale};
use crate::irq::InterruptSink;
use crate::timer::Alarm;

const HZ: u64 = 1_193_182;
const NS: u64 = 1_000_000_000;
/// The shortest time between two interrupts, so that a guest cannot keep the host busy.
const PERIOD_NS_MIN: u64 = 100_000;
const PORT_B: u64 = 0x61;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Access {
    Low,
    High,
    Both,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Channel {
    mode: u8,
    bcd: bool,
    access: Access,
    reload: u32,
    /// Low byte of a two-byte write under way.
    low: Option<u8>,
    /// The next byte read of a two-byte value is the high one.
    read_high: bool,
    latched: Option<u16>,
    latched_status: Option<u8>,
    gate: bool,
    /// A count was written since the mode was.
    loaded: bool,
    started_ns: u64,
    /// Ticks counted when the gate closed.
    paused: Option<u64>,
}

impl Channel {
    fn new(gate: bool) -> Self {
        Self {
            mode: 3,
            bcd: false,
            access: Access::Both,
            reload: 0x1_0000,
            low: None,
            read_high: false,
            latched: None,
            latched_status: None,
            gate,
            loaded: false,
            started_ns: 0,
            paused: None,
        }
    }

    fn periodic(&self) -> bool {
        matches!(self.mode, 2 | 3)
    }

    fn ticks(&self, now_ns: u64) -> u64 {
        self.paused.unwrap_or_else(|| scale(now_ns.saturating_sub(self.started_ns), HZ, NS))
    }

    fn count(&self, now_ns: u64) -> u16 {
        let (ticks, reload) = (self.ticks(now_ns), u64::from(self.reload));
        let value = match self.mode {
            _ if !self.loaded => 0,
            2 => reload - ticks % reload,
            3 => (reload - (2 * ticks) % reload) & !1,
            _ => reload.wrapping_sub(ticks),
        } as u16;
        if self.bcd { to_bcd(value) } else { value }
    }

    fn output(&self, now_ns: u64) -> bool {
        let (ticks, reload) = (self.ticks(now_ns), u64::from(self.reload));
        match self.mode {
            0 | 1 => self.loaded && ticks >= reload,
            2 => ticks % reload != reload - 1,
            3 => ticks % reload < reload.div_ceil(2),
            _ => ticks != reload,
        }
    }

    fn status(&self, now_ns: u64) -> u8 {
        let access = match self.access {
            Access::Low => 1,
            Access::High => 2,
            Access::Both => 3,
        };
        u8::from(self.output(now_ns)) << 7
            | u8::from(!self.loaded) << 6
            | access << 4
            | self.mode << 1
            | u8::from(self.bcd)
    }

    fn set_mode(&mut self, control: u8) {
        self.access = match control >> 4 & 3 {
            1 => Access::Low,
            2 => Access::High,
            _ => Access::Both,
        };
        let mode = control >> 1 & 7;
        self.mode = if mode > 5 { mode - 4 } else { mode };
        self.bcd = control & 1 != 0;
        self.low = None;
        self.read_high = false;
        self.latched = None;
        self.latched_status = None;
        self.loaded = false;
        self.paused = None;
    }

    fn load(&mut self, value: u16, now_ns: u64) {
        let value = if self.bcd { from_bcd(value) } else { u32::from(value) };
        let full = if self.bcd { 10_000 } else { 0x1_0000 };
        self.reload = if value == 0 { full } else { value };
        self.loaded = true;
        self.started_ns = now_ns;
        self.paused = (!self.gate).then_some(0);
    }

    /// Tells whether the channel was started anew.
    fn write(&mut self, value: u8, now_ns: u64) -> bool {
        let value = match (self.access, self.low) {
            (Access::Low, _) => u16::from(value),
            (Access::High, _) => u16::from(value) << 8,
            (Access::Both, None) => {
                self.low = Some(value);
                return false;
            }
            (Access::Both, Some(low)) => u16::from(value) << 8 | u16::from(low),
        };
        self.low = None;
        self.load(value, now_ns);
        true
    }

    fn read(&mut self, now_ns: u64) -> u8 {
        if let Some(status) = self.latched_status.take() {
            return status;
        }
        let [low, high] = self.latched.unwrap_or_else(|| self.count(now_ns)).to_le_bytes();
        let (byte, last) = match self.access {
            Access::Low => (low, true),
            Access::High => (high, true),
            Access::Both if self.read_high => (high, true),
            Access::Both => (low, false),
        };
        self.read_high = !last;
        if last {
            self.latched = None;
        }
        byte
    }

    fn set_gate(&mut self, gate: bool, now_ns: u64) {
        if gate == self.gate {
            return;
        }
        self.gate = gate;
        match (gate, self.mode) {
            // The gate starts these anew.
            (true, 1 | 2 | 3 | 5) => {
                self.started_ns = now_ns;
                self.paused = None;
            }
            (true, _) => {
                let ticks = self.paused.take().unwrap_or(0);
                self.started_ns = now_ns.saturating_sub(scale(ticks, NS, HZ));
            }
            (false, 1 | 5) => {}
            (false, _) => self.paused = Some(self.ticks(now_ns)),
        }
    }
}

fn to_bcd(value: u16) -> u16 {
    (value / 1000 % 10) << 12 | (value / 100 % 10) << 8 | (value / 10 % 10) << 4 | (value % 10)
}

fn from_bcd(value: u16) -> u32 {
    [12, 8, 4, 0].iter().fold(0, |sum, shift| sum * 10 + u32::from(value >> shift & 0xf))
}

/// The chip.
pub struct Pit {
    clock: Arc<dyn Clock>,
    interrupts: Arc<dyn InterruptSink>,
    alarm: Option<Arc<dyn Alarm>>,
    channels: [Channel; 3],
    /// When channel 0 next raises its line.
    due_ns: Option<u64>,
    speaker: u8,
}

/// All of it, as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    channels: [Channel; 3],
    due_ns: Option<u64>,
    speaker: u8,
}

impl Pit {
    /// What is to be stored.
    #[must_use]
    pub fn save(&self) -> Registers {
        Registers { channels: self.channels.clone(), due_ns: self.due_ns, speaker: self.speaker }
    }

    /// Puts back what was stored, when the clock has been set forward by `ahead_ns` since.
    ///
    /// # Errors
    /// What cannot be.
    pub fn restore(&mut self, saved: Registers, ahead_ns: i64) -> Result<(), &'static str> {
        let sound = |c: &Channel| c.mode <= 5 && (1..=0x1_0000).contains(&c.reload);
        if !saved.channels.iter().all(sound) {
            return Err("a channel of the PIT counts from what it cannot");
        }
        (self.channels, self.speaker) = (saved.channels, saved.speaker);
        for channel in &mut self.channels {
            channel.started_ns = channel.started_ns.saturating_add_signed(ahead_ns);
        }
        self.disarm();
        if let Some(due) = saved.due_ns {
            self.arm(due.saturating_add_signed(ahead_ns), self.clock.now_ns());
        }
        Ok(())
    }

    /// Ranges of ports: base and length.
    pub const RANGES: [(u64, u64); 2] = [(0x40, 4), (PORT_B, 1)];

    /// Stopped.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, interrupts: Arc<dyn InterruptSink>) -> Self {
        let channels = [Channel::new(true), Channel::new(true), Channel::new(false)];
        Self { clock, interrupts, alarm: None, channels, due_ns: None, speaker: 0 }
    }

    /// Connects the timer; it expires into [`Pit::expired`].
    pub fn set_alarm(&mut self, alarm: Arc<dyn Alarm>) {
        self.alarm = Some(alarm);
    }

    /// The alarm went off (perhaps for a time that is no longer set).
    pub fn expired(&mut self) {
        let now = self.clock.now_ns();
        let Some(due) = self.due_ns.filter(|&due| due <= now) else { return };
        self.interrupts.set_line(0, false);
        self.interrupts.set_line(0, true);
        self.due_ns = None;
        let channel = &self.channels[0];
        if channel.periodic() {
            let period = scale(u64::from(channel.reload), NS, HZ).max(PERIOD_NS_MIN);
            let missed = (now - due) / period;
            self.arm(due + (missed + 1) * period, now);
        }
    }

    fn arm(&mut self, due_ns: u64, now_ns: u64) {
        self.due_ns = Some(due_ns);
        if let Some(alarm) = &self.alarm {
            alarm.set(due_ns.saturating_sub(now_ns));
        }
    }

    fn disarm(&mut self) {
        if self.due_ns.take().is_some()
            && let Some(alarm) = &self.alarm
        {
            alarm.clear();
        }
    }

    /// Channel 0 was given a mode or a count.
    fn restart(&mut self, started: bool) {
        let now = self.clock.now_ns();
        // Only mode 0 holds its line low until it expires.
        let low = self.channels[0].mode == 0;
        self.interrupts.set_line(0, !low);
        if started && matches!(self.channels[0].mode, 0 | 2 | 3 | 4) {
            let span = scale(u64::from(self.channels[0].reload), NS, HZ) + 1;
            self.arm(now + span, now);
        } else {
            self.disarm();
        }
    }

    fn control(&mut self, value: u8) {
        let now = self.clock.now_ns();
        let index = usize::from(value >> 6);
        if index == 3 {
            for (index, channel) in self.channels.iter_mut().enumerate() {
                if value >> (index + 1) & 1 == 0 {
                    continue;
                }
                if value & 0x20 == 0 && channel.latched.is_none() {
                    channel.latched = Some(channel.count(now));
                }
                if value & 0x10 == 0 && channel.latched_status.is_none() {
                    channel.latched_status = Some(channel.status(now));
                }
            }
            return;
        }
        let Some(channel) = self.channels.get_mut(index) else { return };
        if value & 0x30 == 0 {
            if channel.latched.is_none() {
                channel.latched = Some(channel.count(now));
            }
            return;
        }
        channel.set_mode(value);
        if index == 0 {
            self.restart(false);
        }
    }
}

impl BusDevice for Pit {
    fn read(&mut self, base: u64, offset: u64, data: &mut [u8]) {
        let now = self.clock.now_ns();
        let value = if base == PORT_B {
            // Bit 4 is the memory refresh of old, which some loops count.
            let refresh = u8::from(now / 15_085 % 2 == 1) << 4;
            self.speaker | refresh | u8::from(self.channels[2].output(now)) << 5
        } else {
            self.channels.get_mut(offset as usize).map_or(0xff, |channel| channel.read(now))
        };
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = value;
        }
    }

    fn write(&mut self, base: u64, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        let now = self.clock.now_ns();
        if base == PORT_B {
            self.speaker = value & 3;
            return self.channels[2].set_gate(value & 1 != 0, now);
        }
        match self.channels.get_mut(offset as usize) {
            Some(channel) => {
                let started = channel.write(value, now);
                if offset == 0 && started {
                    self.restart(true);
                }
            }
            None => self.control(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Pit;
    use crate::bus::BusDevice;
    use crate::clock::fake::FakeClock;
    use crate::irq::InterruptSink;
    use std::sync::{Arc, Mutex};

    #[derive(Default)]
    struct Lines(Mutex<Vec<bool>>);
    impl InterruptSink for Lines {
        fn set_line(&self, gsi: u32, level: bool) {
            assert_eq!(gsi, 0);
            self.0.lock().unwrap().push(level);
        }
        fn signal_msi(&self, _address: u64, _data: u32) {}
    }

    fn pit() -> (Pit, Arc<FakeClock>, Arc<Lines>) {
        let (clock, lines) = (Arc::new(FakeClock::default()), Arc::new(Lines::default()));
        (Pit::new(clock.clone(), lines.clone()), clock, lines)
    }

    fn read(pit: &mut Pit, port: u64) -> u8 {
        let mut data = [0];
        let (base, offset) = if port == 0x61 { (0x61, 0) } else { (0x40, port - 0x40) };
        pit.read(base, offset, &mut data);
        data[0]
    }

    fn write(pit: &mut Pit, port: u64, value: u8) {
        let (base, offset) = if port == 0x61 { (0x61, 0) } else { (0x40, port - 0x40) };
        pit.write(base, offset, &[value]);
    }

    /// Edges since the last call.
    fn edges(lines: &Lines) -> usize {
        let lines = std::mem::take(&mut *lines.0.lock().unwrap());
        lines.windows(2).filter(|pair| !pair[0] && pair[1]).count()
    }

    #[test]
    fn channel_2_measures_time_as_linux_does() {
        let (mut pit, clock, _) = pit();
        write(&mut pit, 0x61, 1);
        write(&mut pit, 0x43, 0xb0);
        write(&mut pit, 0x42, 0xff);
        assert_eq!(read(&mut pit, 0x61) & 0x20, 0);
        write(&mut pit, 0x42, 0x2e);
        // 0x2eff ticks are 10.083 ms.
        clock.pass(10_080_000);
        assert_eq!(read(&mut pit, 0x61) & 0x20, 0);
        clock.pass(10_000);
        assert_eq!(read(&mut pit, 0x61) & 0x20, 0x20);
    }

    #[test]
    fn the_gate_of_channel_2_stops_the_count() {
        let (mut pit, clock, _) = pit();
        write(&mut pit, 0x43, 0xb0);
        write(&mut pit, 0x42, 0x00);
        write(&mut pit, 0x42, 0x10);
        clock.pass(100_000_000);
        assert_eq!(read(&mut pit, 0x61) & 0x20, 0, "the gate is closed");
        write(&mut pit, 0x61, 1);
        clock.pass(1_000_000);
        write(&mut pit, 0x61, 0);
        let before = [read(&mut pit, 0x42), read(&mut pit, 0x42)];
        clock.pass(1_000_000);
        assert_eq!([read(&mut pit, 0x42), read(&mut pit, 0x42)], before);
        assert_eq!(u16::from_le_bytes(before), 0x1000 - 1193);
    }

    #[test]
    fn channel_0_ticks_and_missed_ticks_are_one() {
        let (mut pit, clock, lines) = pit();
        write(&mut pit, 0x43, 0x34);
        write(&mut pit, 0x40, 0xa9);
        write(&mut pit, 0x40, 0x04);
        edges(&lines);
        clock.pass(500_000);
        pit.expired();
        assert_eq!(edges(&lines), 0);
        for _ in 0..3 {
            clock.pass(1_000_000);
            pit.expired();
            assert_eq!(edges(&lines), 1);
        }
        clock.pass(10_000_000);
        pit.expired();
        pit.expired();
        assert_eq!(edges(&lines), 1);
    }

    #[test]
    fn mode_0_fires_once() {
        let (mut pit, clock, lines) = pit();
        write(&mut pit, 0x43, 0x30);
        write(&mut pit, 0x40, 0xa9);
        write(&mut pit, 0x40, 0x04);
        clock.pass(1_100_000);
        pit.expired();
        assert_eq!(edges(&lines), 1);
        clock.pass(10_000_000);
        pit.expired();
        assert_eq!(edges(&lines), 0);
    }

    #[test]
    fn latches_and_read_back() {
        let (mut pit, clock, _) = pit();
        write(&mut pit, 0x43, 0x34);
        write(&mut pit, 0x40, 0x00);
        write(&mut pit, 0x40, 0x80);
        clock.pass(1_000_000);
        write(&mut pit, 0x43, 0x00);
        clock.pass(1_000_000);
        let latched = [read(&mut pit, 0x40), read(&mut pit, 0x40)];
        assert_eq!(u16::from_le_bytes(latched), 0x8000 - 1193);
        write(&mut pit, 0x43, 0xe2);
        assert_eq!(read(&mut pit, 0x40), 0xb4, "output high, loaded, both bytes, mode 2");
        let now = [read(&mut pit, 0x40), read(&mut pit, 0x40)];
        assert_eq!(u16::from_le_bytes(now), 0x8000 - 2386);
    }

    #[test]
    fn decimal_counts() {
        let (mut pit, clock, _) = pit();
        write(&mut pit, 0x43, 0x35);
        write(&mut pit, 0x40, 0x00);
        write(&mut pit, 0x40, 0x20);
        clock.pass(1_000_000);
        assert_eq!([read(&mut pit, 0x40), read(&mut pit, 0x40)], [0x07, 0x08]);
    }
}
