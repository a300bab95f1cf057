//! The pair of 8259 interrupt controllers, the second behind input 2 of the first.

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;

const MASTER: u64 = 0x20;
const SLAVE: u64 = 0xa0;
const TRIGGER: u64 = 0x4d0;
const CASCADE: u8 = 2;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Chip {
    /// Requests, in service, masked.
    pub(crate) irr: u8,
    pub(crate) isr: u8,
    pub(crate) imr: u8,
    pub(crate) lines: u8,
    /// Inputs that are level-triggered.
    pub(crate) level: u8,
    pub(crate) base: u8,
    /// The input of lowest priority is this one less one.
    pub(crate) top: u8,
    /// Which initialization word comes next, 0 when done.
    pub(crate) init_step: u8,
    pub(crate) init_4: bool,
    pub(crate) read_isr: bool,
    pub(crate) poll: bool,
    pub(crate) special_mask: bool,
    pub(crate) auto_eoi: bool,
    pub(crate) rotate_auto: bool,
    pub(crate) special_nested: bool,
}

impl Chip {
    fn set_line(&mut self, pin: u8, level: bool) {
        let bit = 1 << pin;
        if self.level & bit != 0 {
            self.irr = if level { self.irr | bit } else { self.irr & !bit };
        } else if level && self.lines & bit == 0 {
            self.irr |= bit;
        } else if !level {
            // A request that was not taken goes with its line.
            self.irr &= !bit;
        }
        self.lines = if level { self.lines | bit } else { self.lines & !bit };
    }

    /// Place of the highest of `bits` in the order of priority, 8 for none.
    fn rank(&self, bits: u8) -> u32 {
        bits.rotate_right(u32::from(self.top)).trailing_zeros().min(8)
    }

    fn pending(&self, cascade: bool) -> Option<u8> {
        let request = self.rank(self.irr & !self.imr);
        if request == 8 {
            return None;
        }
        let mut serving = self.isr;
        if self.special_mask {
            serving &= !self.imr;
        }
        if cascade && self.special_nested {
            serving &= !(1 << CASCADE);
        }
        let busy = self.rank(serving);
        (request < busy).then_some((request as u8 + self.top) & 7)
    }

    fn acknowledge(&mut self, pin: u8) {
        let bit = 1 << pin;
        if self.auto_eoi {
            if self.rotate_auto {
                self.top = (pin + 1) & 7;
            }
        } else {
            self.isr |= bit;
        }
        if self.level & bit == 0 {
            self.irr &= !bit;
        }
    }

    fn command(&mut self, value: u8) {
        if value & 0x10 != 0 {
            *self = Self { level: self.level, lines: self.lines, ..Self::default() };
            self.init_step = 2;
            self.init_4 = value & 1 != 0;
            return;
        }
        if value & 8 != 0 {
            self.poll = value & 4 != 0;
            if value & 2 != 0 {
                self.read_isr = value & 1 != 0;
            }
            if value & 0x40 != 0 {
                self.special_mask = value & 0x20 != 0;
            }
            return;
        }
        let highest =
            ((self.rank(self.isr) as u8) < 8).then(|| (self.rank(self.isr) as u8 + self.top) & 7);
        match value >> 5 {
            0 => self.rotate_auto = false,
            4 => self.rotate_auto = true,
            command @ (1 | 5) => {
                if let Some(pin) = highest {
                    self.isr &= !(1 << pin);
                    if command == 5 {
                        self.top = (pin + 1) & 7;
                    }
                }
            }
            3 => self.isr &= !(1 << (value & 7)),
            6 => self.top = (value + 1) & 7,
            7 => {
                self.isr &= !(1 << (value & 7));
                self.top = (value + 1) & 7;
            }
            _ => {}
        }
    }

    fn data(&mut self, value: u8) {
        match self.init_step {
            2 => {
                self.base = value & 0xf8;
                self.init_step = 3;
            }
            3 => self.init_step = if self.init_4 { 4 } else { 0 },
            4 => {
                self.auto_eoi = value & 2 != 0;
                self.special_nested = value & 0x10 != 0;
                self.init_step = 0;
            }
            _ => self.imr = value,
        }
    }

    fn read_command(&mut self, cascade: bool) -> u8 {
        if std::mem::take(&mut self.poll) {
            return match self.pending(cascade) {
                Some(pin) => {
                    self.acknowledge(pin);
                    0x80 | pin
                }
                None => 0,
            };
        }
        if self.read_isr { self.isr } else { self.irr }
    }
}

/// Both chips.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PicPair {
    pub(crate) master: Chip,
    pub(crate) slave: Chip,
}

impl PicPair {
    /// Ranges of ports: base and length.
    pub const RANGES: [(u64, u64); 3] = [(MASTER, 2), (SLAVE, 2), (TRIGGER, 2)];

    /// Not initialized: nothing is pending until a guest has set it up.
    #[must_use]
    pub fn new() -> Self {
        let mut pair = Self::default();
        pair.master.imr = 0xff;
        pair.slave.imr = 0xff;
        pair
    }

    /// Sets input 0 to 15. Tells whether an interrupt is pending then.
    pub fn set_line(&mut self, irq: u32, level: bool) -> bool {
        match irq {
            0..8 => self.master.set_line(irq as u8, level),
            8..16 => self.slave.set_line(irq as u8 - 8, level),
            _ => {}
        }
        self.update()
    }

    /// With vectors and priorities that can be, whatever was stored.
    #[must_use]
    pub fn sound(mut self) -> Self {
        for chip in [&mut self.master, &mut self.slave] {
            chip.base &= 0xf8;
            chip.top &= 7;
        }
        self
    }

    /// An interrupt that the processor has acknowledged, and then not begun to handle, is requested again.
    pub fn request_again(&mut self, vector: u8) {
        let again = |chip: &mut Chip| {
            let bit = 1 << (vector & 7);
            let is_it = vector & 0xf8 == chip.base && (chip.isr & bit != 0 || chip.auto_eoi);
            if is_it {
                chip.isr &= !bit;
                chip.irr |= bit;
            }
            is_it
        };
        if !again(&mut self.master) && again(&mut self.slave) {
            self.master.isr &= !(1 << CASCADE);
        }
        self.update();
    }

    /// Passes the second chip's output on to the first.
    pub(crate) fn update(&mut self) -> bool {
        let slave = self.slave.pending(false).is_some();
        self.master.set_line(CASCADE, slave);
        self.pending()
    }

    /// Whether the processor is asked for an interrupt.
    #[must_use]
    pub fn pending(&self) -> bool {
        self.master.pending(true).is_some()
    }

    /// The processor acknowledges: the vector (the spurious one, 7, when the request has gone).
    pub fn acknowledge(&mut self) -> u8 {
        let vector = match self.master.pending(true) {
            Some(CASCADE) => {
                self.master.acknowledge(CASCADE);
                let pin = self.slave.pending(false);
                if let Some(pin) = pin {
                    self.slave.acknowledge(pin);
                }
                self.slave.base + pin.unwrap_or(7)
            }
            Some(pin) => {
                self.master.acknowledge(pin);
                self.master.base + pin
            }
            None => self.master.base + 7,
        };
        self.update();
        vector
    }
}

impl BusDevice for PicPair {
    fn read(&mut self, base: u64, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match (base, offset) {
            (MASTER, 0) => self.master.read_command(true),
            (MASTER, _) => self.master.imr,
            (SLAVE, 0) => self.slave.read_command(false),
            (SLAVE, _) => self.slave.imr,
            (_, 0) => self.master.level,
            _ => self.slave.level,
        };
        if let Some(first) = data.first_mut() {
            *first = value;
        }
        self.update();
    }

    fn write(&mut self, base: u64, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match (base, offset) {
            (MASTER, 0) => self.master.command(value),
            (MASTER, _) => self.master.data(value),
            (SLAVE, 0) => self.slave.command(value),
            (SLAVE, _) => self.slave.data(value),
            // The timer, keyboard and cascade, and the clock and FPU, are always edge-triggered.
            (_, 0) => self.master.level = value & 0xf8,
            _ => self.slave.level = value & 0xde,
        }
        self.update();
    }
}

#[cfg(test)]
mod tests {
    use super::PicPair;
    use crate::bus::BusDevice;

    fn set_up() -> PicPair {
        let mut pic = PicPair::new();
        for (base, vector, cascade) in [(0x20, 0x20, 4), (0xa0, 0x28, 2)] {
            pic.write(base, 0, &[0x11]);
            for word in [vector, cascade, 1, 0] {
                pic.write(base, 1, &[word]);
            }
        }
        pic
    }

    fn read(pic: &mut PicPair, base: u64, offset: u64) -> u8 {
        let mut data = [0];
        pic.read(base, offset, &mut data);
        data[0]
    }

    #[test]
    fn nothing_before_it_is_set_up() {
        let mut pic = PicPair::new();
        assert!(!pic.set_line(0, true));
    }

    #[test]
    fn priorities_and_end_of_interrupt() {
        let mut pic = set_up();
        assert!(pic.set_line(4, true));
        assert_eq!(pic.acknowledge(), 0x24);
        assert!(!pic.set_line(5, true), "lower than what is served");
        assert!(pic.set_line(1, true));
        assert_eq!(pic.acknowledge(), 0x21);
        pic.write(0x20, 0, &[0x0b]);
        assert_eq!(read(&mut pic, 0x20, 0), 0x12);
        pic.write(0x20, 0, &[0x20]);
        assert!(!pic.pending());
        pic.write(0x20, 0, &[0x64]);
        assert_eq!(pic.acknowledge(), 0x25);
    }

    #[test]
    fn the_second_chip_goes_through_the_first() {
        let mut pic = set_up();
        assert!(pic.set_line(10, true));
        assert_eq!(pic.acknowledge(), 0x2a);
        assert!(!pic.pending());
        pic.set_line(10, false);
        pic.set_line(10, true);
        assert!(!pic.pending(), "still in service");
        pic.write(0xa0, 0, &[0x20]);
        pic.write(0x20, 0, &[0x20]);
        assert_eq!(pic.acknowledge(), 0x2a);
    }

    #[test]
    fn masks_levels_and_spurious_requests() {
        let mut pic = set_up();
        pic.write(0x20, 1, &[0x10]);
        assert_eq!(read(&mut pic, 0x20, 1), 0x10);
        assert!(!pic.set_line(4, true));
        pic.write(0x20, 1, &[0]);
        assert!(pic.pending());
        assert!(!pic.set_line(4, false), "an edge that was not taken goes");
        assert_eq!(pic.acknowledge(), 0x27, "spurious");
        pic.write(0x4d0, 1, &[0x08]);
        pic.set_line(11, true);
        assert_eq!(pic.acknowledge(), 0x2b);
        pic.write(0xa0, 0, &[0x20]);
        pic.write(0x20, 0, &[0x20]);
        assert_eq!(pic.acknowledge(), 0x2b, "the level is still there");
    }

    #[test]
    fn linux_finds_it_by_its_mask() {
        let mut pic = PicPair::new();
        pic.write(0xa0, 1, &[0xff]);
        pic.write(0x20, 1, &[!(1 << 2)]);
        assert_eq!(read(&mut pic, 0x20, 1), !(1 << 2));
    }

    #[test]
    fn polling_acknowledges() {
        let mut pic = set_up();
        pic.set_line(3, true);
        pic.write(0x20, 0, &[0x0c]);
        assert_eq!(read(&mut pic, 0x20, 0), 0x83);
        assert!(!pic.pending());
    }
}
