//! A 16550A serial port.
//!
//! Output goes to a [`ByteSink`] and is always accepted. Input waits in a queue until the guest is
//! ready for it: before the guest has touched the modem control register, or while it asserts RTS.
//! Clearing the receive FIFO clears nothing, because the bytes are still with the sender; so nothing
//! that was typed before a driver came up is lost.

use std::collections::VecDeque;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::irq::InterruptSink;
use crate::limits::CONSOLE_INPUT_BYTES_MAX;

/// Ports of COM1.
pub const COM1: u64 = 0x3f8;
/// Interrupt line of COM1.
pub const COM1_GSI: u32 = 4;
/// Number of ports.
pub const LEN: u64 = 8;

const IER_RECEIVED: u8 = 1;
const IER_SENT: u8 = 2;
const FCR_FIFO: u8 = 1;
const LCR_DIVISOR: u8 = 0x80;
const MCR_RTS: u8 = 2;
const MCR_LOOP: u8 = 0x10;
const LSR_DATA: u8 = 1;
const LSR_SENT: u8 = 0x60;
/// Carrier, data set ready, clear to send.
const MSR_READY: u8 = 0xb0;

/// Takes what a guest sends.
pub trait ByteSink: Send {
    /// Takes one byte; may wait for room.
    fn put(&mut self, byte: u8);
}

/// The port.
pub struct Serial {
    interrupts: Arc<dyn InterruptSink>,
    gsi: u32,
    output: Box<dyn ByteSink>,
    input: VecDeque<u8>,
    /// Called when the guest has read from a full queue.
    on_room: Option<Box<dyn Fn() + Send>>,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    mcr_written: bool,
    scratch: u8,
    divisor: u16,
    /// The "transmitter is empty" interrupt is due.
    sent: bool,
    line: bool,
}

/// All of it, as it is stored; what was sent is in the console's log.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    input: VecDeque<u8>,
    ier: u8,
    fcr: u8,
    lcr: u8,
    mcr: u8,
    mcr_written: bool,
    scratch: u8,
    divisor: u16,
    sent: bool,
    line: bool,
}

impl Serial {
    /// What is to be stored.
    #[must_use]
    pub fn save(&self) -> Registers {
        let &Self { ier, fcr, lcr, mcr, mcr_written, scratch, divisor, sent, line, .. } = self;
        let input = self.input.clone();
        Registers { input, ier, fcr, lcr, mcr, mcr_written, scratch, divisor, sent, line }
    }

    /// Puts back what was stored; its line is as the interrupt controllers have it. Input that came
    /// since stays behind what was there.
    pub fn restore(&mut self, saved: Registers) {
        let Registers { mut input, ier, fcr, lcr, mcr, mcr_written, scratch, divisor, sent, line } =
            saved;
        input.truncate(CONSOLE_INPUT_BYTES_MAX);
        input.extend(self.input.drain(..));
        self.input = input;
        (self.ier, self.fcr, self.lcr, self.mcr) = (ier, fcr, lcr, mcr);
        (self.mcr_written, self.scratch, self.divisor) = (mcr_written, scratch, divisor);
        (self.sent, self.line) = (sent, line);
        self.update();
    }

    /// A port on interrupt line `gsi` that sends to `output`.
    #[must_use]
    pub fn new(interrupts: Arc<dyn InterruptSink>, gsi: u32, output: Box<dyn ByteSink>) -> Self {
        Self {
            interrupts,
            gsi,
            output,
            input: VecDeque::new(),
            on_room: None,
            ier: 0,
            fcr: 0,
            lcr: 3,
            mcr: 0,
            mcr_written: false,
            scratch: 0,
            divisor: 12,
            sent: false,
            line: false,
        }
    }

    /// Sets what is called when there is room for input again.
    pub fn set_on_room(&mut self, on_room: impl Fn() + Send + 'static) {
        self.on_room = Some(Box::new(on_room));
    }

    /// Queues input for the guest, as much as there is room for; tells how much that was.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let room = CONSOLE_INPUT_BYTES_MAX.saturating_sub(self.input.len());
        let taken = bytes.len().min(room);
        self.input.extend(bytes.iter().take(taken));
        self.update();
        taken
    }

    fn ready(&self) -> bool {
        self.mcr & MCR_LOOP == 0 && (!self.mcr_written || self.mcr & MCR_RTS != 0)
    }

    fn data_waits(&self) -> bool {
        self.ready() && !self.input.is_empty()
    }

    /// The interrupt of highest priority, as in IIR.
    fn identification(&self) -> u8 {
        if self.ier & IER_RECEIVED != 0 && self.data_waits() {
            4
        } else if self.ier & IER_SENT != 0 && self.sent {
            2
        } else {
            1
        }
    }

    fn update(&mut self) {
        let line = self.identification() != 1;
        if line != self.line {
            self.line = line;
            self.interrupts.set_line(self.gsi, line);
        }
    }

    fn take_input(&mut self) -> u8 {
        if !self.data_waits() {
            return 0;
        }
        let full = self.input.len() >= CONSOLE_INPUT_BYTES_MAX;
        let byte = self.input.pop_front().unwrap_or(0);
        // Room for a good piece at once, not byte by byte.
        let now = self.input.len();
        if (full || now == CONSOLE_INPUT_BYTES_MAX / 2 || now == 0)
            && let Some(on_room) = &self.on_room
        {
            on_room();
        }
        byte
    }

    fn send(&mut self, byte: u8) {
        // The line falls for a moment, since an I/O APIC pin waits for its rise.
        self.sent = false;
        self.update();
        if self.mcr & MCR_LOOP == 0 {
            self.output.put(byte);
        }
        self.sent = true;
    }

    fn modem_status(&self) -> u8 {
        if self.mcr & MCR_LOOP == 0 {
            return MSR_READY;
        }
        // In loopback the outputs come back: RTS as CTS, DTR as DSR, OUT1 as RI, OUT2 as DCD.
        (self.mcr & 2) << 3 | (self.mcr & 1) << 5 | (self.mcr & 4) << 4 | (self.mcr & 8) << 4
    }

    fn read_register(&mut self, offset: u64) -> u8 {
        let divisor = self.lcr & LCR_DIVISOR != 0;
        match offset {
            0 if divisor => self.divisor as u8,
            0 => self.take_input(),
            1 if divisor => (self.divisor >> 8) as u8,
            1 => self.ier,
            2 => {
                let identification = self.identification();
                if identification == 2 {
                    self.sent = false;
                }
                identification | if self.fcr & FCR_FIFO != 0 { 0xc0 } else { 0 }
            }
            3 => self.lcr,
            4 => self.mcr,
            5 => LSR_SENT | if self.data_waits() { LSR_DATA } else { 0 },
            6 => self.modem_status(),
            _ => self.scratch,
        }
    }

    fn write_register(&mut self, offset: u64, value: u8) {
        let divisor = self.lcr & LCR_DIVISOR != 0;
        match offset {
            0 if divisor => self.divisor = self.divisor & 0xff00 | u16::from(value),
            0 => self.send(value),
            1 if divisor => self.divisor = self.divisor & 0xff | u16::from(value) << 8,
            1 => {
                // The transmitter is always empty, so allowing its interrupt raises it.
                if value & !self.ier & IER_SENT != 0 {
                    self.sent = true;
                }
                self.ier = value & 0xf;
            }
            2 => self.fcr = value & 0xc9,
            3 => self.lcr = value,
            4 => {
                self.mcr = value & 0x1f;
                self.mcr_written = true;
            }
            7 => self.scratch = value,
            _ => {}
        }
    }
}

impl BusDevice for Serial {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(first) = data.first_mut() {
            *first = self.read_register(offset);
        }
        self.update();
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        if let Some(&value) = data.first() {
            self.write_register(offset, value);
            self.update();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{ByteSink, Serial};
    use crate::bus::BusDevice;
    use crate::irq::InterruptSink;
    use crate::limits::CONSOLE_INPUT_BYTES_MAX;
    use std::sync::{Arc, Mutex};

    #[derive(Default)]
    struct Lines(Mutex<Vec<bool>>);
    impl InterruptSink for Lines {
        fn set_line(&self, gsi: u32, level: bool) {
            assert_eq!(gsi, 4);
            self.0.lock().unwrap().push(level);
        }
        fn signal_msi(&self, _address: u64, _data: u32) {}
    }

    #[derive(Clone, Default)]
    struct Sent(Arc<Mutex<Vec<u8>>>);
    impl ByteSink for Sent {
        fn put(&mut self, byte: u8) {
            self.0.lock().unwrap().push(byte);
        }
    }

    fn port() -> (Serial, Arc<Lines>, Sent) {
        let (lines, sent) = (Arc::new(Lines::default()), Sent::default());
        (Serial::new(lines.clone(), 4, Box::new(sent.clone())), lines, sent)
    }

    fn read(serial: &mut Serial, offset: u64) -> u8 {
        let mut data = [0];
        serial.read(0x3f8, offset, &mut data);
        data[0]
    }

    fn lines(lines: &Lines) -> Vec<bool> {
        std::mem::take(&mut *lines.0.lock().unwrap())
    }

    #[test]
    fn output_and_its_interrupt() {
        let (mut serial, line, sent) = port();
        serial.write(0x3f8, 0, b"a");
        assert_eq!(lines(&line), [true; 0], "not allowed yet");
        serial.write(0x3f8, 1, &[2]);
        assert_eq!(lines(&line), [true]);
        assert_eq!(read(&mut serial, 2), 2);
        assert_eq!(lines(&line), [false]);
        serial.write(0x3f8, 0, b"b");
        assert_eq!(lines(&line), [true]);
        serial.write(0x3f8, 0, b"c");
        assert_eq!(lines(&line), [false, true], "an edge for each byte");
        assert_eq!(*sent.0.lock().unwrap(), b"abc");
    }

    #[test]
    fn input_and_its_interrupt() {
        let (mut serial, line, _) = port();
        assert_eq!(serial.receive(b"xy"), 2);
        assert_eq!(read(&mut serial, 5), 0x61);
        serial.write(0x3f8, 1, &[1]);
        assert_eq!(lines(&line), [true]);
        assert_eq!(read(&mut serial, 2), 4);
        assert_eq!((read(&mut serial, 0), read(&mut serial, 0)), (b'x', b'y'));
        assert_eq!(lines(&line), [false]);
        assert_eq!(read(&mut serial, 5), 0x60);
        assert_eq!(read(&mut serial, 0), 0);
    }

    #[test]
    fn input_waits_for_the_driver_to_be_ready() {
        let (mut serial, _, _) = port();
        serial.receive(b"root\n");
        serial.write(0x3f8, 4, &[0x1a]);
        assert_eq!(read(&mut serial, 6) & 0xf0, 0x90, "loopback as Linux tests it");
        serial.write(0x3f8, 4, &[0]);
        serial.write(0x3f8, 2, &[7]);
        assert_eq!(read(&mut serial, 0), 0, "drivers read to clear the port");
        assert_eq!(read(&mut serial, 5), 0x60);
        serial.write(0x3f8, 4, &[0x0b]);
        let got: Vec<u8> = (0..5).map(|_| read(&mut serial, 0)).collect();
        assert_eq!(got, b"root\n");
    }

    #[test]
    fn a_full_queue_takes_no_more_until_read() {
        let (mut serial, _, _) = port();
        let calls = Arc::new(Mutex::new(0));
        let counter = calls.clone();
        serial.set_on_room(move || *counter.lock().unwrap() += 1);
        assert_eq!(serial.receive(&vec![1; 1 << 20]), CONSOLE_INPUT_BYTES_MAX);
        assert_eq!(serial.receive(&[1]), 0);
        read(&mut serial, 0);
        assert_eq!(*calls.lock().unwrap(), 1);
        assert_eq!(serial.receive(&[1, 2]), 1);
    }

    #[test]
    fn registers_as_a_16550a() {
        let (mut serial, _, _) = port();
        serial.write(0x3f8, 2, &[1]);
        assert_eq!(read(&mut serial, 2), 0xc1);
        serial.write(0x3f8, 7, &[0x5a]);
        assert_eq!(read(&mut serial, 7), 0x5a);
        serial.write(0x3f8, 3, &[0x83]);
        serial.write(0x3f8, 0, &[1]);
        serial.write(0x3f8, 1, &[2]);
        assert_eq!((read(&mut serial, 0), read(&mut serial, 1)), (1, 2));
        serial.write(0x3f8, 3, &[3]);
        assert_eq!(read(&mut serial, 1), 0);
        assert_eq!(read(&mut serial, 6), 0xb0);
    }
}
