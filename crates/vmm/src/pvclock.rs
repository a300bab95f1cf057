//! KVM's paravirtual clock: a page in guest memory says how to get nanoseconds from the time-stamp
//! counter (Linux: Documentation/virt/kvm/x86/msr.rst, arch/x86/include/asm/pvclock-abi.h).
//!
//! All vCPUs are given one origin and one rate, which never change, so the clock is stable between
//! them and the guest reads it without further checks.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::clock::{Clock, scale};
use crate::memory::Memory;

/// MSR_KVM_WALL_CLOCK and MSR_KVM_SYSTEM_TIME, old and new numbers.
pub const MSR_WALL_CLOCK_OLD: u32 = 0x11;
/// See [`MSR_WALL_CLOCK_OLD`].
pub const MSR_SYSTEM_TIME_OLD: u32 = 0x12;
/// See [`MSR_WALL_CLOCK_OLD`].
pub const MSR_WALL_CLOCK: u32 = 0x4b56_4d00;
/// See [`MSR_WALL_CLOCK_OLD`].
pub const MSR_SYSTEM_TIME: u32 = 0x4b56_4d01;

const ENABLED: u64 = 1;
/// The flag that says that vCPUs agree.
const STABLE: u8 = 1;
/// The flag that says that the guest stood still, so that its watchdogs do not take that for a fault
/// of its own. The guest clears it (PVCLOCK_GUEST_STOPPED).
const STOOD_STILL: u8 = 2;
/// Where the flags are in a vCPU's page.
const FLAGS: u64 = 29;

/// The clock of a machine.
pub struct PvClock {
    clock: Arc<dyn Clock>,
    memory: Memory,
    origin_tsc: u64,
    wall_at_origin: Duration,
    multiplier: u32,
    shift: i8,
    /// Where the guest wants the time of each vCPU that asked for it.
    pages: Mutex<BTreeMap<u32, u64>>,
}

/// How ticks of `hz` become nanoseconds: `(ticks << shift) * multiplier >> 32`, with a negative
/// shift to the right.
fn rate(hz: u64) -> (u32, i8) {
    // ns per tick, with the shift that makes the multiplier fill 32 bits.
    let hz = u128::from(hz.max(1));
    let mut shift = 0i8;
    let scaled = |shift: i8| {
        let ns = 1_000_000_000u128 << 32;
        if shift >= 0 { ns / (hz << shift) } else { (ns << -shift) / hz }
    };
    while scaled(shift) >= 1 << 32 && shift < 31 {
        shift += 1;
    }
    while scaled(shift) < 1 << 31 && shift > -31 {
        shift -= 1;
    }
    (u32::try_from(scaled(shift)).unwrap_or(u32::MAX), shift)
}

/// A clock as it is stored.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stored {
    origin_tsc: u64,
    wall_at_origin_ns: u64,
    multiplier: u32,
    shift: i8,
    pages: BTreeMap<u32, u64>,
}

impl Stored {
    /// A clock that KVM keeps, which shows `clock_ns` when the host's counter is `tsc`, which counts `hz`
    /// ticks in a second, and the time of day is `wall`.
    #[must_use]
    pub fn of_kvm(
        clock_ns: u64,
        (tsc, hz): (u64, u64),
        wall: Duration,
        pages: BTreeMap<u32, u64>,
    ) -> Self {
        let (multiplier, shift) = rate(hz);
        let zero = u64::try_from(wall.as_nanos()).unwrap_or(u64::MAX).saturating_sub(clock_ns);
        let origin_tsc = tsc.wrapping_sub(scale(clock_ns, hz, 1_000_000_000));
        Self { origin_tsc, wall_at_origin_ns: zero, multiplier, shift, pages }
    }

    /// Nanoseconds that it shows when the host's counter is `tsc`, if that was set back by `back` since.
    #[must_use]
    pub fn shows(&self, tsc: u64, back: u64) -> u64 {
        let ticks = tsc.wrapping_add(back).wrapping_sub(self.origin_tsc);
        nanoseconds(ticks, self.multiplier, self.shift.clamp(-31, 31))
    }
}

/// The page that a value of MSR_KVM_SYSTEM_TIME names.
#[must_use]
pub fn page_of(system_time: u64) -> Option<u64> {
    (system_time & ENABLED != 0).then_some(system_time & !ENABLED)
}

impl PvClock {
    /// What is to be stored.
    #[must_use]
    pub fn save(&self) -> Stored {
        Stored {
            origin_tsc: self.origin_tsc,
            wall_at_origin_ns: u64::try_from(self.wall_at_origin.as_nanos()).unwrap_or(u64::MAX),
            multiplier: self.multiplier,
            shift: self.shift,
            pages: self.pages.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        }
    }

    /// One that was stored, and goes on. `back` is how far the host's counter was set back since.
    #[must_use]
    pub fn restored(clock: Arc<dyn Clock>, memory: Memory, stored: &Stored, back: u64) -> Self {
        Self {
            clock,
            memory,
            origin_tsc: stored.origin_tsc.wrapping_sub(back),
            wall_at_origin: Duration::from_nanos(stored.wall_at_origin_ns),
            multiplier: stored.multiplier,
            shift: stored.shift.clamp(-31, 31),
            pages: Mutex::new(stored.pages.clone()),
        }
    }

    /// Starts at zero now.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, memory: Memory) -> Self {
        let (multiplier, shift) = rate(clock.tsc_hz());
        let (origin_tsc, wall_at_origin) = (clock.tsc(), clock.wall());
        let pages = Mutex::default();
        Self { clock, memory, origin_tsc, wall_at_origin, multiplier, shift, pages }
    }

    /// The guest wrote a system-time MSR on vCPU `cpu`, whose counter is `tsc_offset` from the host's.
    pub fn set_system_time(&self, cpu: u32, value: u64, tsc_offset: u64) {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if value & ENABLED == 0 {
            pages.remove(&cpu);
            return;
        }
        pages.insert(cpu, value & !ENABLED);
        drop(pages);
        self.show(value & !ENABLED, tsc_offset);
    }

    /// Shows the time again where the guest has it: it may have been another clock so far.
    pub fn show_again(&self, tsc_offsets: impl Fn(u32) -> u64) {
        let pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner).clone();
        for (cpu, page) in pages {
            self.show(page, tsc_offsets(cpu));
        }
    }

    fn show(&self, page: u64, tsc_offset: u64) {
        let at = GuestAddress(page);
        let version: u32 = self.memory.read_obj(at).unwrap_or(0);
        let version = (version | 1).wrapping_add(1);
        let mut page = [0; 32];
        page[0..4].copy_from_slice(&version.to_le_bytes());
        let origin = self.origin_tsc.wrapping_add(tsc_offset);
        page[8..16].copy_from_slice(&origin.to_le_bytes());
        page[24..28].copy_from_slice(&self.multiplier.to_le_bytes());
        page[28] = self.shift as u8;
        page[FLAGS as usize] = STABLE;
        self.put(at, &page);
    }

    /// Tells the guest, whose vCPUs are about to go on, that they stood still. Time went on.
    pub fn stood_still(&self) {
        for page in self.pages.lock().unwrap_or_else(PoisonError::into_inner).values() {
            let Some(at) = page.checked_add(FLAGS).map(GuestAddress) else { continue };
            let flags: u8 = self.memory.read_obj(at).unwrap_or(STABLE);
            self.put(at, &[flags | STOOD_STILL]);
        }
    }

    /// The guest wrote a wall-clock MSR: the time at which the system time was zero.
    pub fn set_wall_clock(&self, value: u64) {
        let at = GuestAddress(value);
        let version: u32 = self.memory.read_obj(at).unwrap_or(0);
        let version = (version | 1).wrapping_add(1);
        // By the wall clock of now: it may have been set since the start.
        let now = self.clock.wall();
        let zero = now.checked_sub(self.elapsed()).unwrap_or(self.wall_at_origin);
        let mut data = [0; 12];
        data[0..4].copy_from_slice(&version.to_le_bytes());
        data[4..8].copy_from_slice(&(zero.as_secs() as u32).to_le_bytes());
        data[8..12].copy_from_slice(&zero.subsec_nanos().to_le_bytes());
        self.put(at, &data);
    }

    fn elapsed(&self) -> Duration {
        let ticks = self.clock.tsc().wrapping_sub(self.origin_tsc);
        Duration::from_nanos(nanoseconds(ticks, self.multiplier, self.shift))
    }

    fn put(&self, at: GuestAddress, bytes: &[u8]) {
        // A guest that names an address without memory gets no clock.
        if self.memory.write_slice(bytes, at).is_err() {
            tracing::warn!(address = at.0, "the guest's clock page is not in memory");
        }
    }
}

/// What the guest computes.
fn nanoseconds(ticks: u64, multiplier: u32, shift: i8) -> u64 {
    let ticks = if shift >= 0 { ticks << shift } else { ticks >> -shift };
    ((u128::from(ticks) * u128::from(multiplier)) >> 32) as u64
}

#[cfg(test)]
mod tests {
    use super::{PvClock, nanoseconds, rate};
    use crate::clock::Clock;
    use crate::clock::fake::FakeClock;
    use crate::memory::GuestRam;
    use std::sync::Arc;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn rates_are_exact_to_a_part_in_a_billion() {
        for hz in [1_000_000, 999_999_999, 1_000_000_000, 2_500_000_000, 5_123_456_789] {
            let (multiplier, shift) = rate(hz);
            assert!(multiplier >= 1 << 31, "{hz}: full precision");
            let hour = nanoseconds(hz * 3600, multiplier, shift);
            assert!(hour.abs_diff(3_600_000_000_000) < 4000, "{hz}: {hour}");
        }
        assert_eq!(rate(1_000_000_000), (1 << 31, 1));
    }

    #[test]
    fn the_pages_have_the_documented_layout() {
        let ram = GuestRam::new(16 << 20).unwrap();
        let clock = Arc::new(FakeClock::default());
        clock.pass(1000);
        let pvclock = PvClock::new(clock.clone(), ram.memory().clone());
        clock.pass(5_000_000_000);
        pvclock.set_system_time(0, 0x5001, 100);
        let page: [u8; 32] = ram.memory().read_obj(GuestAddress(0x5000)).unwrap();
        assert_eq!(page[0..4], [2, 0, 0, 0], "an even version");
        assert_eq!(page[8..16], 2100u64.to_le_bytes());
        assert_eq!(page[16..24], [0; 8]);
        assert_eq!((page[28] as i8, page[29]), (0, 1));
        pvclock.stood_still();
        assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x501d)).unwrap(), 3);
        pvclock.set_wall_clock(0x6000);
        let wall: [u32; 3] = ram.memory().read_obj(GuestAddress(0x6000)).unwrap();
        let zero = FakeClock::default().wall();
        assert_eq!(wall, [2, zero.as_secs() as u32, zero.subsec_nanos() + 1000]);
        // One of KVM that shows the same is the same.
        let stored = pvclock.save();
        let (shown, now) = (stored.shows(clock.tsc(), 0), (clock.tsc(), clock.tsc_hz()));
        assert_eq!(shown, 5_000_000_000);
        assert_eq!(super::Stored::of_kvm(shown, now, clock.wall(), stored.pages.clone()), stored);
        ram.memory().write_slice(&[0; 32], GuestAddress(0x5000)).unwrap();
        pvclock.show_again(|_| 100);
        let again: [u8; 32] = ram.memory().read_obj(GuestAddress(0x5000)).unwrap();
        assert_eq!((&again[4..29], again[29]), (&page[4..29], 1));
        pvclock.set_system_time(1, !0, 0);
        pvclock.set_wall_clock(!0);
    }
}
