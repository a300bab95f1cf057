//! What clones write soon: each tells it the process of the machine that it is a clone of, which tells
//! those that come later.

use std::io::{self, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use berth_api::vmm::Wrote;
use berth_vmm::machine::{Storer, Written};

/// When a clone tells: it has been told who it is by then, and done what it was made for first.
const TELL_AFTER: Duration = Duration::from_millis(500);
/// A clone that tells before has not done much yet.
pub(super) const LIVED: Duration = Duration::from_millis(80);
/// How long after it was handed over it is waited for.
pub(super) const HEAR_TIME: Duration = Duration::from_secs(5);
/// Ranges that are told at most, so that they fit into a line.
const RANGES_MAX: usize = 1000;

/// As many of them as there is room for.
fn cut(Written { mut ram, mut code }: Written) -> Wrote {
    let mut room = RANGES_MAX;
    for ranges in std::iter::once(&mut ram).chain(&mut code) {
        ranges.truncate(room);
        room -= ranges.len();
    }
    Wrote { ram, code }
}

/// Tells it, a while from now, or when the machine ends before.
pub(super) struct Teller {
    storer: Arc<Storer>,
    origin: Mutex<Option<UnixStream>>,
}

impl Teller {
    /// One who tells the process at the other end.
    pub(super) fn start(storer: Arc<Storer>, origin: UnixStream) -> Arc<Self> {
        let teller = Arc::new(Self { storer, origin: Mutex::new(Some(origin)) });
        let later = Arc::clone(&teller);
        let thread = thread::Builder::new().name("wrote".into());
        // Without it those that come later take longer.
        let _ = thread.spawn(move || {
            thread::sleep(TELL_AFTER);
            later.tell();
        });
        teller
    }

    /// Tells it now, if it was not told before.
    pub(super) fn tell(&self) {
        let origin = self.origin.lock().unwrap_or_else(PoisonError::into_inner).take();
        let told = origin.map_or(Ok(()), |origin| tell(&self.storer, &origin));
        if let Err(error) = told {
            eprintln!("berth: what this clone wrote is not told: {error}");
        }
    }
}

fn tell(storer: &Storer, mut origin: &UnixStream) -> io::Result<()> {
    let Some(written) = storer.written()? else { return Ok(()) };
    let mut line = serde_json::to_vec(&cut(written))?;
    line.push(b'\n');
    match origin.write_all(&line) {
        // It has ended, or does not wait any more.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        told => told,
    }
}

/// What a clone told, in a line.
///
/// # Errors
/// It is not that.
pub(super) fn heard(line: &[u8]) -> io::Result<Written> {
    let Wrote { ram, code } = serde_json::from_slice(line)?;
    Ok(Written { ram, code })
}

#[cfg(test)]
mod tests {
    use berth_api::vmm::LINE_MAX;

    use super::*;

    #[test]
    fn what_is_told_is_heard() {
        let ranges = |count: usize| (0..count as u64).map(|n| 1 << 40 | n..1 << 41).collect();
        let all = |ram, code| Written { ram: ranges(ram), code: vec![ranges(code), ranges(1)] };
        let line = serde_json::to_vec(&cut(all(RANGES_MAX - 9, 19))).unwrap();
        assert!((line.len() as u64) < LINE_MAX, "{}", line.len());
        let told = Written { ram: ranges(RANGES_MAX - 9), code: vec![ranges(9), Vec::new()] };
        assert_eq!(heard(&line).unwrap(), told);
        let line = serde_json::to_vec(&cut(all(RANGES_MAX + 9, 1))).unwrap();
        let told = Written { ram: ranges(RANGES_MAX), code: vec![Vec::new(); 2] };
        assert_eq!(heard(&line).unwrap(), told);
        for cut in 0..line.len() {
            assert!(heard(&line[..cut]).is_err());
        }
    }
}
