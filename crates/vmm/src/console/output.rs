//! From the guest to the target: a bounded queue and who writes what is in it.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::chips::serial::ByteSink;
use crate::limits::CONSOLE_OUTPUT_BYTES_MAX;

/// How long output is collected before it is written.
const GATHER_TIME: Duration = Duration::from_micros(500);

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    /// From then on nobody waits for room any more.
    limit: Option<Instant>,
    closed: bool,
    /// The writer has nothing more to write.
    done: bool,
}

/// The bounded queue between guest and writer.
#[derive(Default)]
pub(super) struct Output {
    queue: Mutex<Queue>,
    filled: Condvar,
    drained: Condvar,
}

impl Output {
    /// Waits while there is no room, unless the console ends: then what has no room is lost.
    pub(super) fn put(&self, mut data: &[u8]) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        while !data.is_empty() {
            queue = self.wait_for_room(queue);
            let room = CONSOLE_OUTPUT_BYTES_MAX.saturating_sub(queue.bytes.len());
            let (now, later) = data.split_at(room.min(data.len()));
            if now.is_empty() {
                return;
            }
            if queue.bytes.is_empty() {
                self.filled.notify_one();
            }
            queue.bytes.extend(now);
            data = later;
        }
    }

    fn wait_for_room<'a>(&'a self, mut queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        while queue.bytes.len() >= CONSOLE_OUTPUT_BYTES_MAX && !queue.closed {
            let Some(limit) = queue.limit else {
                queue = self.drained.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = limit.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.drained.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        queue
    }

    /// Writes until the queue is closed and empty. A target that fails loses what follows.
    pub(super) fn write_to(&self, target: &mut dyn Write) {
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

    /// Whoever waits for room waits no longer than until `limit`.
    pub(super) fn end_by(&self, limit: Instant) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).limit = Some(limit);
        self.drained.notify_all();
    }

    /// No more output comes; waits until `limit` for the writer.
    pub(super) fn close(&self, limit: Instant) {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.closed = true;
        self.filled.notify_all();
        self.drained.notify_all();
        while !queue.done {
            let left = limit.saturating_duration_since(Instant::now());
            if left.is_zero() {
                tracing::warn!("console output could not be written in time");
                return;
            }
            let waited = self.drained.wait_timeout(queue, left);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// The serial port's end of the output.
pub struct OutputSink(pub(super) Arc<Output>);

impl ByteSink for OutputSink {
    fn put(&mut self, byte: u8) {
        self.0.put(&[byte]);
    }
}

/// Who is connected to a console's socket.
pub(super) type Client = Arc<Mutex<Option<Arc<UnixStream>>>>;

/// Writes to whoever is connected, or to nobody. A client that takes nothing within the write limit
/// of its socket is disconnected, so that a guest is not stopped by it for ever.
pub(super) struct ClientWriter(pub(super) Client);

impl Write for ClientWriter {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let client = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let Some(stream) = client else { return Ok(data.len()) };
        if (&*stream).write_all(data).is_err() {
            let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            if current.as_ref().is_some_and(|now| Arc::ptr_eq(now, &stream)) {
                *current = None;
            }
            // Wakes its reader; it may have gone by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
        Ok(data.len())
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::{Client, ClientWriter, Output};
    use crate::limits::CONSOLE_OUTPUT_BYTES_MAX;
    use std::io::Write;
    use std::os::unix::net::UnixStream;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    #[test]
    fn a_full_queue_blocks_until_it_is_closed() {
        let output = Arc::new(Output::default());
        let guest = Arc::clone(&output);
        let thread =
            std::thread::spawn(move || guest.put(&vec![0; CONSOLE_OUTPUT_BYTES_MAX * 2 + 1]));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!thread.is_finished());
        output.close(Instant::now());
        thread.join().unwrap();
    }

    #[test]
    fn a_limit_ends_the_waiting_without_closing() {
        let output = Arc::new(Output::default());
        let guest = Arc::clone(&output);
        let thread = std::thread::spawn(move || guest.put(&vec![0; CONSOLE_OUTPUT_BYTES_MAX + 1]));
        output.end_by(Instant::now() + Duration::from_millis(50));
        thread.join().unwrap();
    }

    #[test]
    fn a_client_that_takes_nothing_is_disconnected() {
        let (near, far) = UnixStream::pair().unwrap();
        near.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
        let client = Client::default();
        *client.lock().unwrap() = Some(Arc::new(near));
        let mut writer = ClientWriter(Arc::clone(&client));
        for _ in 0..1000 {
            writer.write_all(&[b'x'; 4096]).unwrap();
        }
        assert!(client.lock().unwrap().is_none());
        drop(far);
    }
}
