//! The host's side of the serial port: the terminal, a file or a socket.
//!
//! Output goes through a bounded queue to a thread, so that the guest waits for a slow terminal only
//! when the queue is full. Input is read only as fast as the guest takes it, so none is lost.

mod input;
mod terminal;

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::chips::serial::{ByteSink, Serial};
use crate::limits::CONSOLE_OUTPUT_BYTES_MAX;
use crate::outcome::Ending;

pub use crate::console::terminal::{RawTerminal, SignalWatch};

/// Where the serial port leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialConfig {
    /// Standard input and output; a terminal is made raw, with an escape (Ctrl-] then `.`).
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// A Unix socket that takes one client after the other; output without one is dropped.
    Socket(PathBuf),
    /// Nowhere.
    Null,
}

/// Why a console could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file or socket could not be opened.
    #[error("cannot open {} for the serial console", path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The system refused something else.
    #[error("{operation} for the serial console failed")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// The reason.
        source: io::Error,
    },
}

/// How long output may take to be written when the machine has ended.
const FLUSH_TIME: Duration = Duration::from_secs(2);
/// How long output is collected before it is written.
const GATHER_TIME: Duration = Duration::from_micros(500);

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    closed: bool,
    /// The writer has nothing more to write.
    done: bool,
}

/// The bounded queue between guest and writer.
#[derive(Default)]
struct Output {
    queue: Mutex<Queue>,
    filled: Condvar,
    drained: Condvar,
}

impl Output {
    fn put(&self, byte: u8) {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let mut queue = self
            .drained
            .wait_while(queue, |queue| {
                queue.bytes.len() >= CONSOLE_OUTPUT_BYTES_MAX && !queue.closed
            })
            .unwrap_or_else(PoisonError::into_inner);
        if queue.bytes.len() < CONSOLE_OUTPUT_BYTES_MAX {
            queue.bytes.push_back(byte);
            if queue.bytes.len() == 1 {
                self.filled.notify_one();
            }
        }
    }

    /// Writes until the queue is closed and empty. A target that fails loses what follows.
    fn write_to(&self, target: &mut dyn Write) {
        let mut failed = false;
        loop {
            let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            let queue = self
                .filled
                .wait_while(queue, |queue| queue.bytes.is_empty() && !queue.closed)
                .unwrap_or_else(PoisonError::into_inner);
            let gather = !queue.closed;
            drop(queue);
            if gather {
                std::thread::sleep(GATHER_TIME);
            }
            let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
            let bytes = std::mem::take(&mut queue.bytes);
            self.drained.notify_all();
            if bytes.is_empty() && queue.closed {
                queue.done = true;
                self.drained.notify_all();
                return;
            }
            drop(queue);
            let (first, second) = bytes.as_slices();
            if !failed {
                let written = target.write_all(first).and_then(|()| target.write_all(second));
                if let Err(error) = written.and_then(|()| target.flush()) {
                    tracing::warn!(%error, "console output is lost from here on");
                    failed = true;
                }
            }
        }
    }

    fn close(&self, limit: Duration) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.closed = true;
        self.filled.notify_all();
        self.drained.notify_all();
        let end = Instant::now() + limit;
        while !queue.done {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!("console output could not be written in time");
                return;
            }
            let waited = self.drained.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The guest's end of the output.
pub struct OutputSink(Arc<Output>);

impl ByteSink for OutputSink {
    fn put(&mut self, byte: u8) {
        self.0.put(byte);
    }
}

/// A console that is being set up: the output exists, the input has no port yet.
pub struct Console {
    config: SerialConfig,
    output: Arc<Output>,
    client: Arc<Mutex<Option<UnixStream>>>,
    listener: Option<UnixListener>,
    stop: Arc<EventFd>,
    terminal: Option<RawTerminal>,
    threads: Vec<JoinHandle<()>>,
}

/// Writes to whoever is connected, or to nobody.
struct ClientWriter(Arc<Mutex<Option<UnixStream>>>);

impl Write for ClientWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let client = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let stream = client.as_ref().map(UnixStream::try_clone).transpose()?;
        drop(client);
        if let Some(mut stream) = stream {
            // The client may go at any time.
            if stream.write_all(data).is_err() {
                *self.0.lock().unwrap_or_else(PoisonError::into_inner) = None;
            }
        }
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Console {
    /// Opens the target and starts to write.
    ///
    /// # Errors
    /// [`ConsoleError`] says what could not be opened.
    pub fn open(config: &SerialConfig) -> Result<Self, ConsoleError> {
        let host = |operation| move |source| ConsoleError::Host { operation, source };
        let client = Arc::new(Mutex::new(None));
        let mut listener = None;
        let mut target: Box<dyn Write + Send> = match config {
            SerialConfig::Stdio => Box::new(io::stdout()),
            SerialConfig::File(path) => Box::new(open_file(path)?),
            SerialConfig::Socket(path) => {
                let fail = |source| ConsoleError::Open { path: path.clone(), source };
                listener = Some(UnixListener::bind(path).map_err(fail)?);
                Box::new(ClientWriter(Arc::clone(&client)))
            }
            SerialConfig::Null => Box::new(io::sink()),
        };
        let stop = EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?;
        let output = Arc::new(Output::default());
        let writer = Arc::clone(&output);
        let thread = std::thread::Builder::new()
            .name("console-out".into())
            .spawn(move || writer.write_to(&mut *target))
            .map_err(host("starting a thread"))?;
        // The writer may hang in a target that takes nothing; it is not waited for.
        drop(thread);
        Ok(Self {
            config: config.clone(),
            output,
            client,
            listener,
            stop: Arc::new(stop),
            terminal: None,
            threads: Vec::new(),
        })
    }

    /// The sink for the serial port.
    #[must_use]
    pub fn sink(&self) -> Box<dyn ByteSink> {
        Box::new(OutputSink(Arc::clone(&self.output)))
    }

    /// Starts to read for the port. The escape ends the machine through `ending`.
    ///
    /// # Errors
    /// [`ConsoleError`] when the terminal or a thread is not to be had.
    pub fn start_input(
        &mut self,
        serial: &Arc<Mutex<Serial>>,
        ending: &Arc<Ending>,
    ) -> Result<(), ConsoleError> {
        let host = |operation| move |source| ConsoleError::Host { operation, source };
        let feeder = input::Feeder::new(serial, Arc::clone(&self.stop));
        let ending = Arc::clone(ending);
        let builder = std::thread::Builder::new().name("console-in".into());
        let thread = match (&self.config, self.listener.take()) {
            (SerialConfig::Stdio, _) => {
                self.terminal = RawTerminal::enter().map_err(host("setting up the terminal"))?;
                let escape = self.terminal.is_some();
                builder.spawn(move || feeder.read_stdin(escape, &ending))
            }
            (SerialConfig::Socket(_), Some(listener)) => {
                let client = Arc::clone(&self.client);
                builder.spawn(move || feeder.serve(&listener, &client))
            }
            _ => return Ok(()),
        };
        self.threads.push(thread.map_err(host("starting a thread"))?);
        Ok(())
    }

    /// Writes what is left, stops reading and restores the terminal.
    pub fn finish(&mut self) {
        if self.stop.write(1).is_ok() {
            for thread in self.threads.drain(..) {
                // A thread that panicked has reported itself.
                let _ = thread.join();
            }
        }
        self.output.close(FLUSH_TIME);
        self.terminal = None;
        if let SerialConfig::Socket(path) = &self.config {
            // It may have been removed by others.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        self.finish();
    }
}

fn open_file(path: &PathBuf) -> Result<File, ConsoleError> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.map_err(|source| ConsoleError::Open { path: path.clone(), source })
}

#[cfg(test)]
mod tests {
    use super::{Console, Output, SerialConfig};
    use crate::limits::CONSOLE_OUTPUT_BYTES_MAX;
    use std::sync::Arc;
    use std::time::Duration;

    #[test]
    fn output_reaches_the_file_whole_and_in_order() {
        let dir = std::env::temp_dir().join(format!("berth-console-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let path = dir.join("log");
        let mut console = Console::open(&SerialConfig::File(path.clone())).unwrap();
        let mut sink = console.sink();
        let want: Vec<u8> = (0..200_000u32).map(|i| (i * 7 / 3) as u8).collect();
        for &byte in &want {
            sink.put(byte);
        }
        console.finish();
        assert_eq!(std::fs::read(&path).unwrap(), want);
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_full_queue_blocks_until_it_is_closed() {
        let output = Arc::new(Output::default());
        let guest = Arc::clone(&output);
        let thread = std::thread::spawn(move || {
            for _ in 0..=CONSOLE_OUTPUT_BYTES_MAX {
                guest.put(0);
            }
        });
        std::thread::sleep(Duration::from_millis(50));
        assert!(!thread.is_finished());
        output.close(Duration::ZERO);
        thread.join().unwrap();
    }
}
