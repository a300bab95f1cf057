//! The timer of a local APIC: one-shot, periodic, and by TSC deadline.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::chips::lapic::page::Around;
use crate::clock::{Clock, scale};
use crate::timer::Alarm;

/// Nanoseconds of one tick before the divider: a bus of 1 GHz, as under KVM.
const TICK_NS: u64 = 1;
/// Shortest period, so that a guest cannot keep a host processor busy with its timer.
const PERIOD_NS_MIN: u64 = 100_000;

#[derive(Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Mode {
    #[default]
    OneShot,
    Periodic,
    Deadline,
}

/// State of the timer. Times are those of the clock.
#[derive(Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Timer {
    #[serde(skip)]
    alarm: Option<Arc<dyn Alarm>>,
    mode: Mode,
    initial: u32,
    divide: u32,
    /// When the running count began.
    started_ns: u64,
    /// When it expires; `None` when stopped.
    expires_ns: Option<u64>,
    deadline_tsc: u64,
}

/// A timer as its registers show it.
pub(super) struct Remainder {
    pub(super) initial: u32,
    pub(super) divide: u32,
    pub(super) current: u32,
    pub(super) deadline_tsc: u64,
}

impl Mode {
    fn of(entry: u32) -> Self {
        match entry >> 17 & 3 {
            0 => Self::OneShot,
            1 => Self::Periodic,
            _ => Self::Deadline,
        }
    }
}

impl Timer {
    /// A timer whose registers are these, with its entry of the local vector table.
    pub(super) fn from_remainder(registers: &Remainder, entry: u32, around: &Around) -> Self {
        let Remainder { initial, divide, current, deadline_tsc } = *registers;
        let mut timer =
            Self { mode: Mode::of(entry), initial, divide: divide & 0xb, ..Self::default() };
        let now = around.now_ns;
        timer.started_ns = now;
        if timer.mode == Mode::Deadline {
            timer.deadline_tsc = deadline_tsc;
            if deadline_tsc != 0 {
                let ticks = deadline_tsc.saturating_sub(around.tsc);
                let ns = scale(ticks, 1_000_000_000, around.tsc_hz);
                timer.expires_ns = Some(now.saturating_add(ns));
            }
        } else if initial != 0 && (current != 0 || timer.mode == Mode::Periodic || around.ran) {
            let left = u64::from(current.min(initial)) * timer.count_ns();
            let gone = timer.span_ns().saturating_sub(left);
            timer.started_ns = now.saturating_sub(gone);
            timer.expires_ns = Some(now.saturating_add(left));
        }
        timer
    }

    /// Its registers. A count that has ended is none, since KVM would let it end once more; one whose
    /// end was not noticed yet ends at once.
    pub(super) fn remainder(&self, now_ns: u64) -> Remainder {
        let counts = self.is_running() && self.mode != Mode::Deadline;
        Remainder {
            initial: if counts { self.initial } else { 0 },
            divide: self.divide,
            current: if counts { self.current(now_ns).max(1) } else { 0 },
            deadline_tsc: self.deadline_tsc,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.expires_ns.is_some()
    }

    #[cfg(test)]
    pub(super) fn expires_at(&self) -> Option<u64> {
        self.expires_ns
    }

    pub(super) fn set_alarm(&mut self, alarm: Arc<dyn Alarm>) {
        self.alarm = Some(alarm);
    }

    /// Goes on after it was stored, with the alarm of another one; `ahead_ns` is how far the clock was
    /// set forward.
    pub(super) fn go_on(&mut self, other: Self, ahead_ns: i64, now_ns: u64) {
        self.alarm = other.alarm;
        self.started_ns = self.started_ns.saturating_add_signed(ahead_ns);
        if let Some(expires) = self.expires_ns {
            self.arm(expires.saturating_add_signed(ahead_ns), now_ns);
        }
    }

    /// Mode bits 17 and 18 of the local vector table's entry. A change between deadline mode and the
    /// others stops the timer.
    pub(super) fn set_mode(&mut self, entry: u32) {
        let mode = Mode::of(entry);
        if (mode == Mode::Deadline) != (self.mode == Mode::Deadline) {
            self.stop();
        }
        self.mode = mode;
    }

    pub(super) fn stop(&mut self) {
        self.initial = 0;
        self.deadline_tsc = 0;
        self.disarm();
    }

    fn disarm(&mut self) {
        if self.expires_ns.take().is_some()
            && let Some(alarm) = &self.alarm
        {
            alarm.clear();
        }
    }

    fn arm(&mut self, expires_ns: u64, now_ns: u64) {
        self.expires_ns = Some(expires_ns);
        if let Some(alarm) = &self.alarm {
            alarm.set(expires_ns.saturating_sub(now_ns));
        }
    }

    pub(super) fn initial(&self) -> u32 {
        self.initial
    }

    pub(super) fn divide(&self) -> u32 {
        self.divide
    }

    /// Nanoseconds of one count: the divider is 2, 4 ... 128, 1.
    fn count_ns(&self) -> u64 {
        let bits = self.divide & 3 | self.divide >> 1 & 4;
        TICK_NS << ((bits + 1) & 7)
    }

    fn span_ns(&self) -> u64 {
        let span = u64::from(self.initial) * self.count_ns();
        if self.mode == Mode::Periodic { span.max(PERIOD_NS_MIN) } else { span }
    }

    pub(super) fn set_initial(&mut self, count: u32, now_ns: u64) {
        if self.mode == Mode::Deadline {
            return;
        }
        self.initial = count;
        if count == 0 {
            return self.disarm();
        }
        self.started_ns = now_ns;
        self.arm(now_ns + self.span_ns(), now_ns);
    }

    pub(super) fn set_divide(&mut self, value: u32, now_ns: u64) {
        let left = self.current(now_ns);
        self.divide = value & 0xb;
        if self.expires_ns.is_some() && self.mode != Mode::Deadline {
            // The rest of the count goes on at the new speed.
            let gone = u64::from(self.initial - left.min(self.initial)) * self.count_ns();
            self.started_ns = now_ns.saturating_sub(gone);
            self.arm(now_ns + u64::from(left) * self.count_ns(), now_ns);
        }
    }

    pub(super) fn current(&self, now_ns: u64) -> u32 {
        match self.expires_ns {
            Some(expires) if self.mode != Mode::Deadline => {
                let left = expires.saturating_sub(now_ns).div_ceil(self.count_ns());
                u32::try_from(left).unwrap_or(u32::MAX).min(self.initial)
            }
            _ => 0,
        }
    }

    pub(super) fn deadline_tsc(&self) -> u64 {
        self.deadline_tsc
    }

    pub(super) fn set_deadline(&mut self, value: u64, tsc_offset: u64, clock: &dyn Clock) {
        if self.mode != Mode::Deadline {
            return;
        }
        self.deadline_tsc = value;
        if value == 0 {
            return self.disarm();
        }
        let now_ns = clock.now_ns();
        let ticks = value.saturating_sub(clock.tsc().wrapping_add(tsc_offset));
        if ticks == 0 {
            // The caller lets it expire at once; no need to arm.
            self.expires_ns = Some(now_ns);
            return;
        }
        // Rounded up: never before the deadline.
        let ns = scale(ticks, 1_000_000_000, clock.tsc_hz()).saturating_add(1);
        self.arm(now_ns.saturating_add(ns), now_ns);
    }

    /// Tells whether the timer has expired by now, and sets the next period.
    pub(super) fn expire(&mut self, now_ns: u64) -> bool {
        let Some(expires) = self.expires_ns else { return false };
        if now_ns < expires {
            return false;
        }
        self.expires_ns = None;
        self.deadline_tsc = 0;
        if self.mode == Mode::Periodic && self.initial != 0 {
            // Periods that were missed altogether are skipped.
            let span = self.span_ns();
            let missed = (now_ns - expires) / span;
            self.started_ns = expires + missed * span;
            self.arm(self.started_ns + span, now_ns);
        }
        true
    }
}
