//! Power-off and reset: the ACPI sleep and reset registers, and the ways a PC can be reset.
//!
//! | port | what |
//! |---|---|
//! | 0x60, 0x64 | as much of a keyboard controller as a reset needs |
//! | 0x92 | system control port A: bit 0 resets, bit 1 (A20) is always set |
//! | 0x600 | ACPI sleep control: `SLP_TYP << 2 | SLP_EN` |
//! | 0x601 | ACPI sleep status |
//! | 0x602 | ACPI reset register |
//! | 0xcf9 | reset control (the machine sends it here from the PCI ports) |

use std::sync::Arc;

use crate::bus::BusDevice;
use crate::outcome::{Ending, Outcome};

/// First of the ACPI ports.
pub const ACPI_PORT: u64 = 0x600;
/// The sleep control register.
pub const SLEEP_CONTROL: u16 = 0x600;
/// The sleep status register.
pub const SLEEP_STATUS: u16 = 0x601;
/// The reset register.
pub const RESET: u16 = 0x602;
/// What the reset register takes.
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of the power-off state S5.
pub const S5: u8 = 5;
/// Reset control register of PC chipsets.
pub const RESET_CONTROL: u16 = 0xcf9;

/// Where the firmware of a PC begins in real mode, at f000:fff0.
pub const FIRMWARE_START: u64 = 0xf_fff0;
/// Code for [`FIRMWARE_START`] that resets: `mov dx, RESET; mov al, RESET_VALUE; out dx, al; cli; hlt;
/// jmp` to the halt. Linux with hardware-reduced ACPI and without EFI jumps there to restart; it does
/// not try the reset register.
pub const FIRMWARE: [u8; 10] =
    [0xba, RESET as u8, (RESET >> 8) as u8, 0xb0, RESET_VALUE, 0xee, 0xfa, 0xf4, 0xeb, 0xfc];

const SLEEP_ENABLE: u8 = 1 << 5;
const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_COMMAND: u16 = 0x64;
const SYSTEM_CONTROL: u16 = 0x92;

/// The device; it is inserted at each of [`Power::RANGES`].
pub struct Power {
    ending: Arc<Ending>,
    /// The next byte to port 0x60 is the controller's output port (command 0xd1).
    output_port_next: bool,
    reply: Option<u8>,
    reset_control: u8,
}

impl Power {
    /// Ranges of ports: base and length.
    pub const RANGES: [(u64, u64); 4] = [(0x60, 1), (0x64, 1), (0x92, 1), (ACPI_PORT, 3)];

    /// Ends the machine through `ending`.
    #[must_use]
    pub fn new(ending: Arc<Ending>) -> Self {
        Self { ending, output_port_next: false, reply: None, reset_control: 0 }
    }

    fn keyboard_data(&mut self, value: u8) {
        if std::mem::take(&mut self.output_port_next) && value & 1 == 0 {
            self.ending.end(Outcome::Reset);
        }
    }

    fn keyboard_command(&mut self, value: u8) {
        self.output_port_next = value == 0xd1;
        match value {
            // Pulse output lines 0 to 3, low ones: bit 0 is the reset line.
            0xf0..=0xff if value & 1 == 0 => self.ending.end(Outcome::Reset),
            0xaa => self.reply = Some(0x55),
            0x20 => self.reply = Some(0),
            0xd0 => self.reply = Some(3),
            _ => {}
        }
    }
}

impl BusDevice for Power {
    fn read(&mut self, base: u64, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let value = match (base + offset) as u16 {
            KEYBOARD_DATA => self.reply.take().unwrap_or(0),
            // System flag; bit 0 when a byte waits.
            KEYBOARD_COMMAND => 4 | u8::from(self.reply.is_some()),
            SYSTEM_CONTROL => 2,
            RESET_CONTROL => self.reset_control,
            _ => 0,
        };
        if let Some(first) = data.first_mut() {
            *first = value;
        }
    }

    fn write(&mut self, base: u64, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        match (base + offset) as u16 {
            KEYBOARD_DATA => self.keyboard_data(value),
            KEYBOARD_COMMAND => self.keyboard_command(value),
            SYSTEM_CONTROL if value & 1 == 1 => self.ending.end(Outcome::Reset),
            RESET if value == RESET_VALUE => self.ending.end(Outcome::Reset),
            RESET_CONTROL => {
                self.reset_control = value & 0xe;
                if value & 4 != 0 {
                    self.ending.end(Outcome::Reset);
                }
            }
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 => {
                if value >> 2 & 7 == S5 {
                    self.ending.end(Outcome::PoweredOff);
                } else {
                    tracing::warn!(value, "the guest asked for a sleep state that is not there");
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Power;
    use crate::bus::BusDevice;
    use crate::outcome::{Ending, Outcome};
    use std::sync::Arc;

    fn after(writes: &[(u64, u8)]) -> Option<Outcome> {
        let ending = Arc::new(Ending::default());
        let mut power = Power::new(Arc::clone(&ending));
        for &(port, value) in writes {
            power.write(port, 0, &[value]);
        }
        ending.outcome()
    }

    #[test]
    fn the_ways_to_end() {
        assert_eq!(after(&[(0x600, 5 << 2 | 1 << 5)]), Some(Outcome::PoweredOff));
        assert_eq!(after(&[(0x600, 5 << 2)]), None);
        assert_eq!(after(&[(0x600, 3 << 2 | 1 << 5)]), None);
        assert_eq!(after(&[(0x602, 1)]), Some(Outcome::Reset));
        assert_eq!(after(&[(0x64, 0xfe)]), Some(Outcome::Reset));
        assert_eq!(after(&[(0x64, 0xd1), (0x60, 0xfe)]), Some(Outcome::Reset));
        assert_eq!(after(&[(0x64, 0xd1), (0x60, 0xdf)]), None);
        assert_eq!(after(&[(0x60, 0xfe)]), None);
        assert_eq!(after(&[(0x92, 3)]), Some(Outcome::Reset));
        assert_eq!(after(&[(0x92, 2)]), None);
        assert_eq!(after(&[(0xcf9, 2), (0xcf9, 6)]), Some(Outcome::Reset));
    }
}
