//! What was measured, and what is wrong with it.

use std::time::Duration;

use anyhow::{Result, bail};

use crate::bench::system::System;

/// How far the guest's clock may be from the host's, as a part of the time.
const CLOCK_TOLERANCE: f64 = 0.02;
/// What is added to that for the way through the console.
const CLOCK_SLACK: Duration = Duration::from_millis(50);

/// One run of a row: its repetitions, in nanoseconds for an operation.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// The fastest repetition.
    pub fastest: f64,
    /// The one in the middle, the faster of two.
    pub median: f64,
}

impl Sample {
    /// From sorted times.
    pub fn new(sorted: &[f64]) -> Result<Self> {
        match (sorted.first(), sorted.get(sorted.len().saturating_sub(1) / 2)) {
            (Some(&fastest), Some(&median)) => Ok(Self { fastest, median }),
            _ => bail!("a row without times"),
        }
    }
}

/// A row in all systems.
#[derive(Debug)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Whose goals it has to meet.
    pub group: String,
    /// What its work amounted to.
    checksum: String,
    /// One for each run of each system.
    pub samples: Vec<(System, Sample)>,
}

impl Row {
    /// The median over the runs, in nanoseconds for an operation.
    pub fn median(&self, system: System) -> Option<f64> {
        let mut times: Vec<f64> = self.of(system).map(|sample| sample.median).collect();
        times.sort_by(f64::total_cmp);
        times.get(times.len().saturating_sub(1) / 2).copied()
    }

    /// The fastest of all repetitions.
    pub fn fastest(&self, system: System) -> Option<f64> {
        self.of(system).map(|sample| sample.fastest).min_by(f64::total_cmp)
    }

    /// How many times as long one takes as the other.
    pub fn ratio(&self, slow: System, fast: System) -> Option<f64> {
        Some(self.median(slow)? / self.median(fast)?)
    }

    fn of(&self, system: System) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(move |(s, _)| *s == system).map(|(_, sample)| sample)
    }
}

/// A figure with a limit that is no time of a row.
#[derive(Debug)]
pub struct Figure {
    /// What it is, with its unit.
    pub title: String,
    /// The median over the runs.
    pub value: f64,
    /// The most it may be.
    pub limit: f64,
}

/// Everything.
#[derive(Debug, Default)]
pub struct Results {
    /// Figures with limits of their own.
    pub figures: Vec<Figure>,
    /// In the order they were measured.
    pub rows: Vec<Row>,
    /// What could not run somewhere, and why.
    pub absent: Vec<String>,
    /// What makes results doubtful.
    pub faults: Vec<String>,
    /// Of each run: the guest's clock against the host's.
    pub clocks: Vec<(System, f64)>,
    /// Memory of our process beyond guest RAM once the guest's init runs.
    pub overhead_kib: Option<u64>,
    /// How much of a processor our process takes while its guest has nothing to do.
    pub idle_percent: Option<f64>,
    /// The most of it after any of the rows on one processor.
    pub overhead_peak_kib: Option<u64>,
}

impl Results {
    /// A run of a row.
    pub fn add(&mut self, system: System, name: &str, group: &str, checksum: &str, sample: Sample) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.name == name) {
            if row.checksum != checksum {
                let fault = format!(
                    "{name}: {} computes {checksum}, {} {}",
                    system.as_str(),
                    row.samples.first().map_or("nobody", |(first, _)| first.as_str()),
                    row.checksum
                );
                self.faults.push(fault);
            }
            row.samples.push((system, sample));
            return;
        }
        self.rows.push(Row {
            name: name.to_owned(),
            group: group.to_owned(),
            checksum: checksum.to_owned(),
            samples: vec![(system, sample)],
        });
    }

    /// A row that could not run.
    pub fn missing(&mut self, system: System, name: &str, why: &str) {
        let absent = format!("{name} in {}: {why}", system.as_str());
        if !self.absent.contains(&absent) {
            self.absent.push(absent);
        }
    }

    /// What the clock inside said of a time that the host measured too.
    pub fn clock(&mut self, system: System, inside_ns: u64, outside: Duration) {
        let inside = Duration::from_nanos(inside_ns);
        let error = inside.as_secs_f64() / outside.as_secs_f64() - 1.0;
        let far = inside.abs_diff(outside).saturating_sub(CLOCK_SLACK);
        if far.as_secs_f64() > outside.as_secs_f64() * CLOCK_TOLERANCE {
            let fault = format!(
                "the clock in {} said {:.3} s of what took {:.3} s",
                system.as_str(),
                inside.as_secs_f64(),
                outside.as_secs_f64()
            );
            self.faults.push(fault);
        }
        self.clocks.push((system, error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians_and_ratios() {
        let mut results = Results::default();
        for (system, times) in [(System::Berth, [3.0, 1.0, 2.0]), (System::Qemu, [40.0, 6.0, 8.0])]
        {
            for time in times {
                let sample = Sample::new(&[time, time + 0.5]).unwrap();
                results.add(system, "a", "user", "1", sample);
            }
        }
        let row = &results.rows[0];
        assert_eq!(row.median(System::Berth), Some(2.0));
        assert_eq!(row.fastest(System::Qemu), Some(6.0));
        assert_eq!(row.ratio(System::Qemu, System::Berth), Some(4.0));
        assert_eq!(row.ratio(System::Berth, System::Native), None);
        assert!(Sample::new(&[]).is_err());
    }

    #[test]
    fn what_does_not_agree_is_a_fault() {
        let mut results = Results::default();
        let sample = Sample::new(&[1.0]).unwrap();
        results.add(System::Native, "a", "user", "1f", sample);
        results.add(System::Berth, "a", "user", "1f", sample);
        assert!(results.faults.is_empty());
        results.add(System::Qemu, "a", "user", "2f", sample);
        assert!(results.faults[0].contains("qemu computes 2f, native 1f"), "{:?}", results.faults);
        results.clock(System::Berth, 1_000_000_000, Duration::from_millis(1010));
        assert_eq!(results.faults.len(), 1);
        results.clock(System::Berth, 1_000_000_000, Duration::from_millis(1200));
        assert_eq!(results.faults.len(), 2);
    }
}
