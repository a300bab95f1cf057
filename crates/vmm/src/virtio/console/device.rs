//! The console: what arrives on the socket goes to the guest, what the guest prints to the socket.
//!
//! Input is read only when the guest has buffers. Output waits in a bounded backlog; when the
//! reader is slower than that, the guest's buffers stay where they are. When the reader is gone,
//! output is dropped.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use crate::virtio::device::{Context, Device, DeviceConfig, DeviceError, Info};
use crate::virtio::limits::{CHAINS_PER_EVENT, CONSOLE_BACKLOG};

/// Feature: columns and rows are in the configuration.
pub const F_SIZE: u64 = 1 << 0;

const QUEUE_SIZE: u16 = 64;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const TOKEN_STREAM: u64 = 0;
const READ_MAX: u64 = 4096;

/// A virtio-console device.
pub struct Console {
    config: Arc<DeviceConfig>,
    stream: UnixStream,
    backlog: Vec<u8>,
    interest: EventSet,
    /// The socket has nothing to read, or its end was reached.
    starved: bool,
    input_ended: bool,
    output_ended: bool,
    hung_up: bool,
}

/// Changes the size of the console's terminal.
#[derive(Clone)]
pub struct ConsoleSize {
    config: Arc<DeviceConfig>,
}

impl ConsoleSize {
    /// Tells the guest about a new size.
    pub fn set(&self, columns: u16, rows: u16) {
        let mut raw = columns.to_le_bytes().to_vec();
        raw.extend(rows.to_le_bytes());
        self.config.update(0, &raw);
    }
}

impl Console {
    /// A console connected to `stream`.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn new(stream: UnixStream) -> std::io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self {
            // columns, rows, number of ports, emergency write
            config: DeviceConfig::new(vec![80, 0, 25, 0, 1, 0, 0, 0, 0, 0, 0, 0]),
            stream,
            backlog: Vec::new(),
            interest: EventSet::empty(),
            starved: false,
            input_ended: false,
            output_ended: false,
            hung_up: false,
        })
    }

    /// A handle for the terminal's size.
    pub fn size(&self) -> ConsoleSize {
        ConsoleSize { config: Arc::clone(&self.config) }
    }

    fn input(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.starved = false;
        let Some(queue) = context.queue(RECEIVE) else {
            self.starved = true;
            return Ok(());
        };
        let memory = Arc::clone(queue.memory());
        let mut budget = CHAINS_PER_EVENT;
        while !self.input_ended && budget > 0 {
            budget -= 1;
            queue.disable_notification()?;
            let chain = match queue.pop()? {
                Some(chain) => chain,
                None if queue.enable_notification()? => continue,
                None => {
                    self.starved = true;
                    break;
                }
            };
            let mut bytes = vec![0; chain.writable_len().min(READ_MAX) as usize];
            match self.stream.read(&mut bytes) {
                // An empty buffer of the guest reads nothing, which is no end.
                Ok(0) if !bytes.is_empty() => self.input_ended = true,
                Ok(count) => {
                    let read = bytes.get(..count).unwrap_or(&[]);
                    chain
                        .write(&memory, 0, read)
                        .map_err(|_| DeviceError::Request("a console buffer that is not there"))?;
                    queue.push(chain.head(), count as u32)?;
                    continue;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    queue.undo_pop();
                    break;
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.input_ended = true,
            }
            queue.undo_pop();
        }
        queue.signal()?;
        if budget == 0 {
            context.revisit(RECEIVE);
        }
        Ok(())
    }

    fn output(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let Some(queue) = context.queue(TRANSMIT) else { return Ok(()) };
        let memory = Arc::clone(queue.memory());
        let mut budget = CHAINS_PER_EVENT;
        queue.disable_notification()?;
        let more = loop {
            self.flush();
            if self.backlog.len() >= CONSOLE_BACKLOG {
                // The socket's becoming writable comes back here.
                break false;
            }
            if budget == 0 {
                break true;
            }
            budget -= 1;
            let chain = match queue.pop()? {
                Some(chain) => chain,
                None if queue.enable_notification()? => continue,
                None => break false,
            };
            // What is beyond the limit of one write is cut: no driver prints that much at once.
            let len = chain.readable_len().min(CONSOLE_BACKLOG as u64) as usize;
            let start = self.backlog.len();
            self.backlog.resize(start + len, 0);
            let target = self.backlog.get_mut(start..).unwrap_or(&mut []);
            chain
                .read(&memory, 0, target)
                .map_err(|_| DeviceError::Request("a console buffer that is not there"))?;
            queue.push(chain.head(), 0)?;
        };
        queue.signal()?;
        if more {
            context.revisit(TRANSMIT);
        }
        Ok(())
    }

    fn flush(&mut self) {
        while !self.backlog.is_empty() && !self.output_ended {
            match self.stream.write(&self.backlog) {
                Ok(count) => drop(self.backlog.drain(..count)),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(_) => self.output_ended = true,
            }
        }
        if self.output_ended {
            self.backlog.clear();
        }
    }

    fn watch(&mut self, context: &Context) -> Result<(), DeviceError> {
        let mut wanted = EventSet::empty();
        if !self.starved && !self.input_ended {
            wanted |= EventSet::IN;
        }
        if !self.backlog.is_empty() {
            wanted |= EventSet::OUT;
        }
        if wanted != self.interest && !self.hung_up {
            context
                .poller
                .modify(self.stream.as_raw_fd(), TOKEN_STREAM, wanted)
                .map_err(DeviceError::host("watching the console"))?;
            self.interest = wanted;
        }
        Ok(())
    }
}

impl Device for Console {
    fn info(&self) -> Info {
        Info {
            device_type: 3,
            class: 0x07_8000,
            features: F_SIZE,
            queue_sizes: vec![QUEUE_SIZE; 2],
            name: "virtio-console",
        }
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.starved = false;
        self.interest = EventSet::IN;
        if self.hung_up {
            return Ok(());
        }
        context
            .poller
            .add(self.stream.as_raw_fd(), TOKEN_STREAM, self.interest)
            .map_err(DeviceError::host("watching the console"))
    }

    fn queue_event(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        if queue == TRANSMIT {
            self.output(context)?;
        } else {
            self.input(context)?;
        }
        self.watch(context)
    }

    fn fd_event(
        &mut self,
        context: &mut Context,
        _token: u64,
        events: EventSet,
    ) -> Result<(), DeviceError> {
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            // Reported again and again; what is left to read comes with the guest's buffers.
            self.hung_up = true;
            self.output_ended = true;
            context.poller.remove(self.stream.as_raw_fd());
        }
        if events.contains(EventSet::OUT) || self.output_ended {
            self.output(context)?;
        }
        self.input(context)?;
        self.watch(context)
    }

    fn save(&mut self) -> Vec<u8> {
        self.flush();
        self.backlog.clone()
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), &'static str> {
        // One write of the guest may be on top of a backlog that was not full.
        if saved.len() > 2 * CONSOLE_BACKLOG {
            return Err("a console with more output than can wait");
        }
        self.backlog = saved.to_vec();
        Ok(())
    }

    fn stop(&mut self, context: &mut Context) {
        context.poller.remove(self.stream.as_raw_fd());
    }
}
