//! Where a console's input goes in the guest, and the pump for the output of one that is a stream.

use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::chips::serial::Serial;
use crate::console::input::{Woken, wait_for, wait_readable};
use crate::console::output::Output;

/// The guest's side of the input.
pub(super) trait Port: Send {
    /// Gives `data` to the guest, waiting while it has no room. False: `stop` was signalled first, or
    /// the guest's side is gone.
    fn feed(&self, data: &[u8], stop: &EventFd) -> bool;
}

/// The serial port.
pub(super) struct SerialPort {
    serial: Arc<Mutex<Serial>>,
    room: Option<Arc<EventFd>>,
}

impl SerialPort {
    pub(super) fn new(serial: &Arc<Mutex<Serial>>) -> Self {
        let room = EventFd::new(EFD_NONBLOCK).ok().map(Arc::new);
        if let Some(room) = &room {
            let signal = Arc::clone(room);
            let mut port = serial.lock().unwrap_or_else(PoisonError::into_inner);
            port.set_on_room(move || {
                // A counter that is full has been signalled.
                let _ = signal.write(1);
            });
        }
        Self { serial: Arc::clone(serial), room }
    }
}

impl Port for SerialPort {
    fn feed(&self, mut data: &[u8], stop: &EventFd) -> bool {
        loop {
            let mut port = self.serial.lock().unwrap_or_else(PoisonError::into_inner);
            let taken = port.receive(data);
            drop(port);
            data = data.get(taken..).unwrap_or_default();
            if data.is_empty() {
                return true;
            }
            let Some(room) = &self.room else { return false };
            if wait_readable(room.as_raw_fd(), stop) == Woken::Stop {
                return false;
            }
            // Only resets the counter.
            let _ = room.read();
        }
    }
}

/// A device at the other end of a stream that does not block.
pub(super) struct StreamPort(pub(super) Arc<UnixStream>);

impl Port for StreamPort {
    fn feed(&self, mut data: &[u8], stop: &EventFd) -> bool {
        while !data.is_empty() {
            match (&*self.0).write(data) {
                Ok(count) => data = data.get(count..).unwrap_or_default(),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if wait_for(self.0.as_raw_fd(), libc::POLLOUT, stop) == Woken::Stop {
                        return false;
                    }
                }
                Err(_) => return false,
            }
        }
        true
    }
}

/// Moves what the device writes into `output`. When `stop` is signalled, what has arrived until then
/// is moved too.
pub(super) fn pump(mut stream: &UnixStream, output: &Output, stop: &EventFd) {
    let mut buffer = [0; 4096];
    let mut stopping = false;
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => output.put(buffer.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock && !stopping => {
                stopping = wait_readable(stream.as_raw_fd(), stop) == Woken::Stop;
            }
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Port, StreamPort, pump};
    use crate::console::output::Output;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    #[derive(Clone, Default)]
    struct Collected(Arc<Mutex<Vec<u8>>>);

    impl Write for Collected {
        fn write(&mut self, data: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().extend(data);
            Ok(data.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_was_written_before_the_stop_arrives() {
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let stop = EventFd::new(EFD_NONBLOCK).unwrap();
        far.write_all(&[7; 50_000]).unwrap();
        stop.write(1).unwrap();
        let output = Arc::new(Output::default());
        pump(&near, &output, &stop);
        let (writer, collected) = (Arc::clone(&output), Collected::default());
        let mut target = collected.clone();
        let thread = std::thread::spawn(move || writer.write_to(&mut target));
        output.close(Instant::now() + Duration::from_secs(5));
        thread.join().unwrap();
        assert!(*collected.0.lock().unwrap() == [7; 50_000]);
    }

    #[test]
    fn input_waits_for_the_device_until_it_is_stopped() {
        let (near, mut far) = UnixStream::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        let stop = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let port = StreamPort(Arc::new(near));
        assert!(port.feed(b"abc", &stop));
        let mut three = [0; 3];
        far.read_exact(&mut three).unwrap();
        assert_eq!(&three, b"abc");
        let signal = Arc::clone(&stop);
        let thread = std::thread::spawn(move || port.feed(&vec![0; 16 << 20], &signal));
        std::thread::sleep(Duration::from_millis(30));
        assert!(!thread.is_finished());
        stop.write(1).unwrap();
        assert!(!thread.join().unwrap());
    }
}
