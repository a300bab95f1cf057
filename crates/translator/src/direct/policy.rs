//! When it pays to leave user code to the processor.
//!
//! Each time the process of an address space begins and stops costs several microseconds, each of its
//! pages some more; so it is for programs that compute. An address space is tried when an interrupt
//! finds it in user code and there were few system calls and exceptions since the last time, and goes
//! on as long as what is won is more than what it costs.

use std::time::{Duration, Instant};

/// When an interrupt last found user code, how often the guest's kernel had been entered, and how many
/// instructions had been translated.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sample(Option<(Instant, u64, u64)>);

impl Sample {
    /// An interrupt found user code, `entries` to the kernel so far: whether they are few, and which
    /// part of the time since the last one it took to translate instructions.
    pub fn since(&mut self, now: Instant, entries: u64, translated: u64) -> (bool, f64) {
        let Some((then, e, t)) = self.0.replace((now, entries, translated)) else {
            return (false, 0.0);
        };
        let time = now.duration_since(then);
        let apart = u32::try_from(entries.wrapping_sub(e)).map_or(u32::MAX, |n| n.max(1));
        let translation = TRANSLATION.as_secs_f64() * translated.wrapping_sub(t) as f64;
        let part = (translation / time.as_secs_f64().max(1e-9)).min(1.0);
        (time / apart >= APART, part)
    }
}

/// How much faster the processor executes user code than translations are, less one; a low guess.
const GAIN: f64 = 1.0;
/// How much more that is for each part of the time that it takes to translate.
const GAIN_TRANSLATION: f64 = 8.0;
/// What is left of that after each window: what is new now will be known later.
const FADING: f64 = 0.997;
/// Time that it takes to translate an instruction.
const TRANSLATION: Duration = Duration::from_nanos(500);
/// Time after which is looked whether it pays.
const WINDOW: Duration = Duration::from_millis(1);
/// Windows in a row that may not pay: at first, when pages have to be mapped, and later.
const PATIENCE: (u32, u32) = (3, 2);
/// Time between two entries to the guest's kernel from which on it is tried.
const APART: Duration = Duration::from_micros(100);
/// Interrupts that have to find it so, one after the other.
const STEADY: u32 = 2;
/// Most interrupts in user code until the next attempt.
const MOST_SKIPPED: u32 = 64;

/// What is known of an address space.
#[derive(Clone, Copy, Debug, Default)]
pub struct Policy {
    /// Number of the address space.
    space: u16,
    active: bool,
    /// It was just tried, and nothing has been executed.
    fresh: bool,
    /// Interrupts that found few entries to the kernel.
    steady: u32,
    /// Part of the time that it takes to translate.
    translation: f64,
    /// Interrupts until the next attempt.
    skip: u32,
    /// How many that were after the last one.
    skipped: u32,
    inside: Duration,
    around: Duration,
    unpaid: u32,
    patience: u32,
}

impl Policy {
    /// Starts anew if the address space is another one.
    pub fn of(&mut self, space: u16) -> &mut Self {
        if self.space != space {
            *self = Self { space, ..Self::default() };
        }
        self
    }

    /// User code is left to the processor.
    pub fn active(&self) -> bool {
        self.active
    }

    /// User code is left to the processor for the first time since it was decided.
    pub fn begins(&mut self) -> bool {
        std::mem::take(&mut self.fresh)
    }

    /// An interrupt came in user code, after `few` entries to the kernel and a part of the time in which
    /// it was translated.
    pub fn sampled(&mut self, (few, translation): (bool, f64)) {
        if !self.active {
            self.translation = f64::midpoint(self.translation, translation);
        }
        self.steady = if few { self.steady.saturating_add(1) } else { 0 };
        if self.active || self.steady < STEADY {
            return;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return;
        }
        (self.active, self.fresh) = (true, true);
        (self.inside, self.around, self.unpaid) = (Duration::ZERO, Duration::ZERO, 0);
        self.patience = PATIENCE.0;
    }

    /// It took so long, including `inside`, in which user code was executed.
    pub fn spent(&mut self, all: Duration, inside: Duration) {
        self.inside += inside;
        self.around += all.saturating_sub(inside);
        if self.inside + self.around < WINDOW {
            return;
        }
        let gain = GAIN + GAIN_TRANSLATION * self.translation;
        self.translation *= FADING;
        if self.inside.mul_f64(gain) > self.around {
            self.unpaid = 0;
            self.skipped = 0;
            self.patience = PATIENCE.1;
        } else {
            self.unpaid += 1;
            if self.unpaid >= self.patience {
                self.give_up();
            }
        }
        (self.inside, self.around) = (Duration::ZERO, Duration::ZERO);
    }

    /// It is of no use for now.
    pub fn give_up(&mut self) {
        self.active = false;
        self.skipped = (self.skipped * 2).clamp(2, MOST_SKIPPED);
        self.skip = self.skipped;
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::{Policy, Sample, WINDOW};

    const FEW: (bool, f64) = (true, 0.0);

    #[test]
    fn programs_that_compute_are_recognized() {
        let mut sample = Sample::default();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        assert_eq!(sample.since(at(0), 0, 0), (false, 0.0));
        assert_eq!(sample.since(at(4), 10, 0), (true, 0.0));
        let (few, translation) = sample.since(at(8), 1000, 4000);
        assert!(!few && (0.49..0.51).contains(&translation));
        assert_eq!(sample.since(at(12), 1000, 104_000), (true, 1.0));
    }

    #[test]
    fn what_pays_goes_on() {
        let mut p = Policy::default();
        p.of(1).sampled(FEW);
        assert!(!p.active());
        p.of(1).sampled(FEW);
        for _ in 0..100 {
            p.of(1).spent(WINDOW, WINDOW.mul_f64(0.9));
            assert!(p.active());
        }
    }

    #[test]
    fn what_is_translated_much_pays_sooner_for_a_while() {
        let mut p = Policy::default();
        for _ in 0..3 {
            p.of(1).sampled((true, 0.5));
        }
        let windows = (0..10_000).take_while(|_| {
            p.of(1).spent(WINDOW, WINDOW.mul_f64(0.3));
            p.active()
        });
        assert!((50..1000).contains(&windows.count()));
    }

    #[test]
    fn what_does_not_is_tried_less_and_less() {
        let mut p = Policy::default();
        let mut last = 0;
        for _ in 0..10 {
            let mut interrupts = 0;
            while !p.active() {
                p.of(1).sampled(FEW);
                interrupts += 1;
            }
            assert!(interrupts >= last);
            last = interrupts;
            for _ in 0..10 {
                p.of(1).spent(WINDOW, WINDOW / 2);
            }
            assert!(!p.active());
        }
        assert_eq!(last, 65);
        // Another program is another matter.
        p.of(2).sampled(FEW);
        p.of(2).sampled((false, 0.0));
        p.of(2).sampled(FEW);
        assert!(!p.active());
        p.of(2).sampled(FEW);
        assert!(p.active());
    }
}
