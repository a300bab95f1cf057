//! Runs a range of cases against a backend.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use iced_x86::Code;

use crate::case::{Backend, Case, Mode, Outcome};
use crate::compare::{Difference, compare, decode};
use crate::generate::Generator;
use crate::shrink::shrink;

/// Counts of a run.
#[derive(Clone, Debug, Default)]
pub struct Stats {
    /// Cases run and compared.
    pub compared: u64,
    /// Cases without a counterpart (system calls) or an end.
    pub skipped: u64,
    /// Cases that ended by an exception other than the end mark, by vector.
    pub vectors: [u64; 32],
    /// Cases that differed.
    pub different: u64,
    /// Encodings that were in a case, with the mode.
    pub codes: BTreeSet<(u8, u32)>,
}

impl Stats {
    /// Adds another run's counts.
    pub fn add(&mut self, other: &Self) {
        self.compared += other.compared;
        self.skipped += other.skipped;
        self.different += other.different;
        for (to, from) in self.vectors.iter_mut().zip(other.vectors) {
            *to += from;
        }
        self.codes.extend(&other.codes);
    }

    /// Encodings the generator has for a mode and did not use.
    #[must_use]
    pub fn missing(&self, generator: &Generator, mode: Mode) -> Vec<Code> {
        generator.codes(mode).filter(|c| !self.codes.contains(&(mode as u8, *c as u32))).collect()
    }

    fn count(&mut self, case: &Case, native: &Outcome) {
        match native {
            Outcome::Stopped(end) => {
                self.compared += 1;
                if let Some(n) = self.vectors.get_mut(usize::from(end.fault.vector)) {
                    *n += 1;
                }
            }
            _ => self.skipped += 1,
        }
        for ins in decode(case) {
            self.codes.insert((case.mode as u8, ins.code() as u32));
        }
    }
}

/// A difference that was found.
pub struct Finding {
    /// Number of the case.
    pub number: u64,
    /// The case as generated.
    pub case: Case,
    /// What differs.
    pub differences: Vec<Difference>,
}

/// Runs cases `numbers` on both; hands every difference to `found`, which says whether to go on.
pub fn run(
    generator: &Generator,
    numbers: std::ops::Range<u64>,
    native: &mut dyn Backend,
    other: &mut dyn Backend,
    mut found: impl FnMut(Finding, &mut dyn Backend, &mut dyn Backend) -> bool,
) -> Stats {
    const BATCH: u64 = 64;
    let mut stats = Stats::default();
    let mut start = numbers.start;
    while start < numbers.end {
        let end = numbers.end.min(start + BATCH);
        let cases: Vec<Case> = (start..end).map(|n| generator.case(n)).collect();
        let natively = native.run_batch(&cases);
        let others = other.run_batch(&cases);
        for ((number, case), (a, b)) in (start..end).zip(cases).zip(natively.iter().zip(&others)) {
            stats.count(&case, a);
            let mut differences = compare(&case, a, b);
            if !differences.is_empty() {
                // An interrupt of the host in the middle of a case makes 0 of null selectors that
                // are not (Intel SDM vol. 2, IRET); the case may store them.
                let again = native.run(&case);
                if again != *a {
                    differences = compare(&case, &again, b);
                }
            }
            // One that does not end does so each time. On a busy host, and where bus locks trap, others
            // may need more than one attempt.
            let mut attempts = ATTEMPTS;
            while *b == Outcome::Timeout && !differences.is_empty() && attempts > 0 {
                differences = compare(&case, a, &other.run(&case));
                attempts -= 1;
            }
            if differences.is_empty() {
                continue;
            }
            stats.different += 1;
            if !found(Finding { number, case, differences }, native, other) {
                return stats;
            }
        }
        start = end;
    }
    stats
}

/// How often a case that took too long is run again.
const ATTEMPTS: u32 = 3;
/// Shrinking one case ends after this time.
const SHRINK_TIME: Duration = Duration::from_secs(20);

/// What makes a difference the same as another: what differs and the instructions left.
#[must_use]
pub fn signature(case: &Case, differences: &[Difference]) -> String {
    let mut text = differences.first().map(|d| kind(d).0).unwrap_or_default();
    for (span, ins) in case.spans.iter().zip(decode(case)) {
        let start = usize::from(span.start);
        let bytes = case.code.get(start..start + usize::from(span.len)).unwrap_or_default();
        if bytes.iter().any(|b| *b != 0x90) {
            text.push_str(&format!(" {:?}", ins.mnemonic()));
        }
    }
    text
}

/// Makes a finding smaller; returns the small case and its differences. What differed first goes
/// on to differ, so that the small case shows the same fault and not another.
pub fn minimize(
    case: &Case,
    native: &mut dyn Backend,
    other: &mut dyn Backend,
) -> (Case, Vec<Difference>) {
    let mut differ = |c: &Case| compare(c, &native.run(c), &other.run(c));
    let first = differ(case).first().map(kind);
    // Cases that never end cost seconds each.
    let deadline = Instant::now() + SHRINK_TIME;
    let small = shrink(case, |c| {
        if Instant::now() > deadline {
            return false;
        }
        let now = differ(c).first().map(kind);
        now.is_some() && now == first
    });
    let differences = differ(&small);
    (small, differences)
}

/// What differs: the thing, and for the exception which instead of which.
fn kind(difference: &Difference) -> (String, Option<(String, String)>) {
    let what = difference.what.split(' ').next().unwrap_or_default().to_owned();
    let exception = what == "exception";
    let values = exception.then(|| (difference.native.clone(), difference.other.clone()));
    (what, values)
}
