//! What clones write soon: each tells it the process of the machine that it is a clone of, which tells
//! those that come later.

use std::io::{self, Write};
use std::ops::Range;
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
const RANGES_MAX: usize = 2000;

fn to_told(ranges: &[Range<u64>], room: &mut usize) -> Vec<(u64, u64)> {
    let ranges = ranges.get(..ranges.len().min(*room)).unwrap_or_default();
    *room -= ranges.len();
    ranges.iter().map(|range| (range.start, range.end - range.start)).collect()
}

fn from_told(ranges: &[(u64, u64)]) -> Vec<Range<u64>> {
    ranges.iter().map(|&(first, count)| first..first.saturating_add(count)).collect()
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
    let mut room = RANGES_MAX;
    let ram = to_told(&written.ram, &mut room);
    let code = written.code.iter().map(|ranges| to_told(ranges, &mut room)).collect();
    let mut line = serde_json::to_vec(&Wrote { ram, code })?;
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
    let told: Wrote = serde_json::from_slice(line)?;
    let code = told.code.iter().map(|ranges| from_told(ranges)).collect();
    Ok(Written { ram: from_told(&told.ram), code })
}

#[cfg(test)]
mod tests {
    use berth_api::vmm::LINE_MAX;

    use super::*;

    #[test]
    fn what_is_told_is_heard() {
        let mut room = RANGES_MAX;
        let ranges: Vec<_> = (0..RANGES_MAX as u64 + 9).map(|n| 1 << 40 | n..1 << 41).collect();
        let told = Wrote { ram: to_told(&ranges, &mut room), code: vec![Vec::new()] };
        assert_eq!(room, 0);
        assert_eq!(to_told(&ranges, &mut room), []);
        let line = serde_json::to_vec(&told).unwrap();
        assert!((line.len() as u64) < LINE_MAX, "{}", line.len());
        assert_eq!(heard(&line).unwrap().ram, ranges[..RANGES_MAX]);
        for cut in 0..line.len() {
            assert!(heard(&line[..cut]).is_err());
        }
        let all = heard(br#"{"ram":[[5,18446744073709551615]],"code":[]}"#).unwrap().ram;
        assert_eq!(all.first(), Some(&(5..u64::MAX)));
    }
}
