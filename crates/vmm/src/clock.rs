//! Host time: the monotonic clock, the time-stamp counter and how fast it counts.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// Time as chips see it; a trait so that tests can let it pass.
pub trait Clock: Send + Sync {
    /// Nanoseconds of a clock that never steps; its zero is anywhere, the same for all processes of one
    /// boot of the host.
    fn now_ns(&self) -> u64;
    /// The host's time-stamp counter.
    fn tsc(&self) -> u64;
    /// Ticks of [`Clock::tsc`] in a second.
    fn tsc_hz(&self) -> u64;
    /// Time since 1970 (UTC).
    fn wall(&self) -> Duration;
}

/// The clocks of the host.
pub struct HostClock {
    tsc_hz: u64,
}

/// The frequency of the time-stamp counter, once it is known.
static HZ: OnceLock<u64> = OnceLock::new();

impl HostClock {
    /// Finds the frequency of the time-stamp counter (once for the process; at most 25 ms).
    #[must_use]
    pub fn new() -> Self {
        Self { tsc_hz: *HZ.get_or_init(tsc_frequency) }
    }

    /// Tells what the frequency was a while ago, before anybody asks for it. It is looked at (for 1 ms)
    /// whether that still holds: a host that is a guest itself may have moved.
    pub fn expect(tsc_hz: u64) {
        let measured = measure_tsc_hz(Duration::from_millis(1));
        if frequency_by_cpuid().is_none() && tsc_hz.abs_diff(measured) < measured / 1000 {
            // Told twice, the first one holds.
            let _ = HZ.set(tsc_hz);
        }
    }
}

impl Default for HostClock {
    fn default() -> Self {
        Self::new()
    }
}

impl Clock for HostClock {
    fn now_ns(&self) -> u64 {
        let now = clock_gettime(ClockId::Monotonic);
        // It counts from the boot.
        now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
    }

    fn tsc(&self) -> u64 {
        rdtsc()
    }

    fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    fn wall(&self) -> Duration {
        SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
    }
}

fn rdtsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor and only writes registers.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// By CPUID 0x15 (crystal and ratio), by a hypervisor's 0x4000_0010 (kHz), or measured.
fn tsc_frequency() -> u64 {
    let exact = frequency_by_cpuid();
    let measured = measure_tsc_hz(Duration::from_millis(20));
    // A leaf that is far from what the counter does is a leaf not to trust.
    match exact {
        Some(hz) if hz.abs_diff(measured) < measured / 100 => hz,
        _ => measured,
    }
}

fn frequency_by_cpuid() -> Option<u64> {
    use std::arch::x86_64::__cpuid;
    let max = __cpuid(0).eax;
    if max >= 0x15 {
        let leaf = __cpuid(0x15);
        if leaf.eax != 0 && leaf.ebx != 0 && leaf.ecx != 0 {
            return Some(u64::from(leaf.ecx) * u64::from(leaf.ebx) / u64::from(leaf.eax));
        }
    }
    let hypervisor = __cpuid(1).ecx >> 31 & 1 == 1;
    if hypervisor && (0x4000_0010..0x4001_0000).contains(&__cpuid(0x4000_0000).eax) {
        let khz = __cpuid(0x4000_0010).eax;
        if khz != 0 {
            return Some(u64::from(khz) * 1000);
        }
    }
    None
}

/// Counts ticks over `span` of the monotonic clock. Each end is the best of several readings, so
/// that being scheduled away between the two clocks does not show.
#[must_use]
pub fn measure_tsc_hz(span: Duration) -> u64 {
    let sample = || {
        let mut best = (u64::MAX, Instant::now(), 0);
        for _ in 0..16 {
            let before = rdtsc();
            let now = Instant::now();
            let after = rdtsc();
            let width = after.wrapping_sub(before);
            if width < best.0 {
                best = (width, now, before.wrapping_add(width / 2));
            }
        }
        (best.1, best.2)
    };
    let (start, first) = sample();
    std::thread::sleep(span);
    let (end, last) = sample();
    let ns = end.duration_since(start).as_nanos().max(1);
    let ticks = u128::from(last.wrapping_sub(first));
    u64::try_from(ticks * 1_000_000_000 / ns).unwrap_or(u64::MAX).max(1)
}

/// `a * b / c` without losing the high bits.
#[must_use]
pub fn scale(a: u64, b: u64, c: u64) -> u64 {
    u64::try_from(u128::from(a) * u128::from(b) / u128::from(c.max(1))).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod fake {
    //! A clock that tests move.

    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    /// Stands still until moved; the time-stamp counter runs at 2 GHz.
    #[derive(Default)]
    pub(crate) struct FakeClock(AtomicU64);

    impl FakeClock {
        pub(crate) fn pass(&self, ns: u64) {
            self.0.fetch_add(ns, Ordering::SeqCst);
        }
    }

    impl super::Clock for FakeClock {
        fn now_ns(&self) -> u64 {
            self.0.load(Ordering::SeqCst)
        }
        fn tsc(&self) -> u64 {
            self.now_ns() * 2
        }
        fn tsc_hz(&self) -> u64 {
            2_000_000_000
        }
        fn wall(&self) -> Duration {
            // 2026-02-28 23:59:58 UTC
            Duration::from_secs(1_772_323_198) + Duration::from_nanos(self.now_ns())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Clock, HostClock, measure_tsc_hz, scale};
    use std::time::Duration;

    #[test]
    fn the_frequency_agrees_with_the_monotonic_clock() {
        let clock = HostClock::new();
        let again = measure_tsc_hz(Duration::from_millis(60));
        let hz = clock.tsc_hz();
        assert!(hz.abs_diff(again) < hz / 50, "{hz} and then {again}");
    }

    #[test]
    fn scaling_keeps_high_bits() {
        assert_eq!(scale(u64::MAX, 2, 4), u64::MAX / 2);
        assert_eq!(scale(10, 1, 0), 10);
        assert_eq!(scale(u64::MAX, 2, 1), u64::MAX);
    }
}
