//! The host's side of the serial port and of virtio-console: the terminal, a file or a socket.
//!
//! Output goes through a bounded queue to a thread, so that the guest waits for a slow terminal only
//! when the queue is full. Input is read only as fast as the guest takes it, so none is lost.
//!
//! ```text
//! serial port ───────────────► Output ─► writer thread ─► standard output, file, client
//! virtio-console ─► stream ─► pump ─┘
//! serial port ◄──────────────┐
//! virtio-console ◄─ stream ◄─┴ port ◄─── reader thread ◄─ standard input, client
//! ```

mod input;
mod output;
mod port;
mod terminal;

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::chips::serial::{ByteSink, Serial};
use crate::console::output::{Client, ClientWriter, Output};
use crate::console::port::{Port, SerialPort, StreamPort};
use crate::outcome::Ending;

pub use crate::console::input::EscapeFilter;
pub use crate::console::output::OutputSink;
pub use crate::console::terminal::{RawTerminal, SignalWatch};

/// Where a console leads: the serial port, or virtio-console.
#[derive(Clone, Debug)]
pub enum SerialConfig {
    /// Standard input and output; a terminal is made raw, with an escape (Ctrl-] then `.`).
    Stdio,
    /// Output to a file, no input.
    File(PathBuf),
    /// A Unix socket that takes one client after the other; output without one is dropped. A client
    /// that reads nothing holds the guest up, but for a limited time; then it is disconnected.
    Socket(PathBuf),
    /// A stream whose other end somebody has who always takes what is printed.
    Stream(Arc<UnixStream>),
    /// Nowhere.
    Null,
}

/// Why a console could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file or socket could not be opened.
    #[error("cannot open {} for a console", path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// The system refused something else.
    #[error("{operation} for a console failed")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// The reason.
        source: io::Error,
    },
}

/// How long output may take to be written when the machine has ended.
const FLUSH_TIME: Duration = Duration::from_secs(2);

/// How long a client of a console's socket may take nothing.
const CLIENT_WRITE_TIME: Duration = Duration::from_secs(5);

/// A console that is being set up: the output exists, the input has no port yet.
pub struct Console {
    config: SerialConfig,
    output: Arc<Output>,
    client: Client,
    listener: Option<UnixListener>,
    stop: Arc<EventFd>,
    terminal: Option<RawTerminal>,
    threads: Vec<JoinHandle<()>>,
    finished: bool,
}

/// The consoles of a machine's devices, which end with it.
#[derive(Clone, Default)]
pub struct Consoles(Arc<Mutex<Vec<Console>>>);

impl Consoles {
    /// Keeps a console until the machine ends.
    pub fn add(&self, console: Console) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(console);
    }

    /// Finishes all of them.
    pub fn finish(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

impl Console {
    /// Opens the target and starts to write.
    ///
    /// # Errors
    /// [`ConsoleError`] says what could not be opened.
    pub fn open(config: &SerialConfig) -> Result<Self, ConsoleError> {
        let client = Client::default();
        let mut listener = None;
        let mut target: Box<dyn Write + Send> = match config {
            SerialConfig::Stdio => Box::new(io::stdout()),
            SerialConfig::File(path) => Box::new(open_file(path)?),
            SerialConfig::Socket(path) => {
                listener = Some(listen(path)?);
                Box::new(ClientWriter(Arc::clone(&client)))
            }
            SerialConfig::Stream(stream) => {
                Box::new(stream.try_clone().map_err(host("setting up a stream"))?)
            }
            SerialConfig::Null => Box::new(io::sink()),
        };
        let stop = EventFd::new(EFD_NONBLOCK).map_err(host("eventfd"))?;
        let output = Arc::new(Output::default());
        let writer = Arc::clone(&output);
        // The writer may hang in a target that takes nothing; it is not waited for.
        let _ = spawn("console-out", move || writer.write_to(&mut *target))?;
        Ok(Self {
            config: config.clone(),
            output,
            client,
            listener,
            stop: Arc::new(stop),
            terminal: None,
            threads: Vec::new(),
            finished: false,
        })
    }

    /// The sink for the serial port.
    #[must_use]
    pub fn sink(&self) -> Box<dyn ByteSink> {
        Box::new(OutputSink(Arc::clone(&self.output)))
    }

    /// Starts to read for the serial port. The escape ends the machine through `ending`.
    ///
    /// # Errors
    /// [`ConsoleError`] when the terminal or a thread is not to be had.
    pub fn start_input(
        &mut self,
        serial: &Arc<Mutex<Serial>>,
        ending: &Arc<Ending>,
    ) -> Result<(), ConsoleError> {
        self.read_for(Box::new(SerialPort::new(serial)), ending)
    }

    /// Connects the target with a device that has the other end of `stream`, in both directions.
    ///
    /// # Errors
    /// [`ConsoleError`] when the terminal or a thread is not to be had.
    pub fn connect(
        &mut self,
        stream: UnixStream,
        ending: &Arc<Ending>,
    ) -> Result<(), ConsoleError> {
        stream.set_nonblocking(true).map_err(host("setting up a stream"))?;
        let stream = Arc::new(stream);
        let (from, output) = (Arc::clone(&stream), Arc::clone(&self.output));
        let stop = Arc::clone(&self.stop);
        self.threads.push(spawn("console-pump", move || port::pump(&from, &output, &stop))?);
        self.read_for(Box::new(StreamPort(stream)), ending)
    }

    fn read_for(&mut self, port: Box<dyn Port>, ending: &Arc<Ending>) -> Result<(), ConsoleError> {
        let feeder = input::Feeder::new(port, Arc::clone(&self.stop));
        let ending = Arc::clone(ending);
        let thread = match (&self.config, self.listener.take()) {
            (SerialConfig::Stdio, _) => {
                self.terminal = RawTerminal::enter().map_err(host("setting up the terminal"))?;
                let escape = self.terminal.is_some();
                spawn("console-in", move || feeder.read_stdin(escape, &ending))
            }
            (SerialConfig::Socket(_), Some(listener)) => {
                let client = Arc::clone(&self.client);
                spawn("console-in", move || feeder.serve(&listener, &client))
            }
            (SerialConfig::Stream(stream), _) => {
                let stream = Arc::clone(stream);
                spawn("console-in", move || feeder.read_stream(&stream))
            }
            _ => return Ok(()),
        };
        self.threads.push(thread?);
        Ok(())
    }

    /// Writes what is left, stops reading and restores the terminal.
    pub fn finish(&mut self) {
        if std::mem::replace(&mut self.finished, true) {
            return;
        }
        let limit = Instant::now() + FLUSH_TIME;
        // First of all, whoever waits for room must not do so for ever: a reader of ours may wait
        // for a lock that a vCPU holds while it waits.
        self.output.end_by(limit);
        if self.stop.write(1).is_ok() {
            for thread in self.threads.drain(..) {
                // A thread that panicked has reported itself.
                let _ = thread.join();
            }
        }
        self.output.close(limit);
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

fn host(operation: &'static str) -> impl FnOnce(io::Error) -> ConsoleError {
    move |source| ConsoleError::Host { operation, source }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, ConsoleError> {
    let thread = std::thread::Builder::new().name(name.into()).spawn(body);
    thread.map_err(host("starting a thread"))
}

fn open_file(path: &Path) -> Result<File, ConsoleError> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.map_err(|source| ConsoleError::Open { path: path.to_owned(), source })
}

/// Listens at `path`. A socket that a machine which was killed left there is replaced.
fn listen(path: &Path) -> Result<UnixListener, ConsoleError> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket());
    if is_socket
        && UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
    {
        // Binding says what is wrong if it cannot be removed.
        let _ = std::fs::remove_file(path);
    }
    let listener = UnixListener::bind(path);
    listener.map_err(|source| ConsoleError::Open { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::{Console, SerialConfig, listen};

    #[test]
    fn output_reaches_the_file_whole_and_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut console = Console::open(&SerialConfig::File(path.clone())).unwrap();
        let mut sink = console.sink();
        let want: Vec<u8> = (0..200_000u32).map(|i| (i * 7 / 3) as u8).collect();
        for &byte in &want {
            sink.put(byte);
        }
        console.finish();
        assert_eq!(std::fs::read(&path).unwrap(), want);
    }

    #[test]
    fn a_socket_that_was_left_behind_is_replaced_and_one_in_use_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console");
        drop(listen(&path).unwrap());
        let listener = listen(&path).unwrap();
        assert!(listen(&path).is_err());
        drop(listener);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "data").unwrap();
        assert!(listen(&path).is_err());
        assert_eq!(std::fs::read(&path).unwrap(), b"data");
    }
}
