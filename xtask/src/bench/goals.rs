//! What each group has to reach.

use crate::bench::results::{Results, Row};
use crate::bench::system::System;

/// The limits of a group of rows.
pub struct Goal {
    /// The group's name in the rows.
    pub group: &'static str,
    /// For people.
    pub title: &'static str,
    /// Whether each row has to meet it, or their geometric mean.
    pub each: bool,
    /// At least so many times as fast as QEMU.
    pub qemu_min: f64,
    /// At most so many times as slow as the bare processor.
    pub native_max: Option<f64>,
}

/// All of them.
pub const GOALS: [Goal; 5] = [
    Goal { group: "user", title: "user code", each: false, qemu_min: 4.0, native_max: Some(2.0) },
    Goal {
        group: "vector",
        title: "vector and floating point",
        each: true,
        qemu_min: 10.0,
        native_max: Some(1.5),
    },
    Goal {
        group: "memory",
        title: "memory and strings",
        each: true,
        qemu_min: 15.0,
        native_max: Some(1.5),
    },
    Goal { group: "kernel", title: "kernel paths", each: false, qemu_min: 2.0, native_max: None },
    Goal {
        group: "programs",
        title: "whole programs",
        each: false,
        qemu_min: 3.5,
        native_max: Some(2.5),
    },
];
/// The boot may take at most this part of QEMU's time.
pub const BOOT_MAX: f64 = 0.7;
/// Two processors must do at least so many times as much as one.
pub const SCALING_MIN: f64 = 1.8;
/// What our process may use beyond guest RAM.
pub const MEMORY_MAX_MIB: f64 = 64.0;

/// What an idle guest may take of a processor.
pub const IDLE_MAX_PERCENT: f64 = 1.0;

/// One limit and what was measured.
pub struct Verdict {
    /// What is limited.
    pub title: String,
    /// The geometric mean, or the only value.
    pub value: f64,
    /// The row farthest from the goal, and how far it is.
    pub worst: Option<(String, f64)>,
    /// The limit.
    pub goal: String,
    /// Whether it holds.
    pub is_met: bool,
}

/// Everything that can be judged by these results.
pub fn judge(results: &Results) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    for goal in &GOALS {
        let rows = || results.rows.iter().filter(|row| row.group == goal.group);
        let faster = ratios(rows(), System::Qemu, System::Berth);
        if let (Some(mean), Some(worst)) = (mean(&faster), lowest(&faster)) {
            let judged = if goal.each { worst.1 } else { mean };
            let kind = if goal.each { "each" } else { "mean" };
            verdicts.push(Verdict {
                title: format!("{}, faster than qemu", goal.title),
                value: mean,
                goal: format!("{kind} at least {}", goal.qemu_min),
                is_met: judged >= goal.qemu_min,
                worst: Some(worst),
            });
        }
        let slower = ratios(rows(), System::Berth, System::Native);
        if let (Some(mean), Some(worst)) = (mean(&slower), highest(&slower)) {
            let judged = if goal.each { worst.1 } else { mean };
            let kind = if goal.each { "each" } else { "mean" };
            verdicts.push(Verdict {
                title: format!("{}, slower than native", goal.title),
                value: mean,
                goal: goal.native_max.map_or("-".into(), |max| format!("{kind} at most {max}")),
                is_met: goal.native_max.is_none_or(|max| judged <= max),
                worst: Some(worst),
            });
        }
    }
    let all = ratios(results.rows.iter(), System::Qemu, System::Berth);
    if let Some((name, value)) = lowest(&all) {
        verdicts.push(Verdict {
            title: "every row, faster than qemu".into(),
            value,
            worst: Some((name, value)),
            goal: "each at least 1".into(),
            is_met: value >= 1.0,
        });
    }
    verdicts.extend(single(results));
    verdicts
}

/// Goals of single rows.
fn single(results: &Results) -> Vec<Verdict> {
    let mut verdicts = Vec::new();
    let find = |name: &str| results.rows.iter().find(|row| row.name == name);
    if let Some(value) = find("boot").and_then(|row| row.ratio(System::Berth, System::Qemu)) {
        verdicts.push(Verdict {
            title: "boot to init, part of qemu's time".into(),
            value,
            worst: None,
            goal: format!("at most {BOOT_MAX}"),
            is_met: value <= BOOT_MAX,
        });
    }
    for system in [System::Native, System::Berth, System::Qemu] {
        let time = |name| find(name).and_then(|row: &Row| row.median(system));
        let (Some(one), Some(two)) = (time("parallel-1"), time("parallel-2")) else { continue };
        let value = one / two;
        let ours = system == System::Berth;
        verdicts.push(Verdict {
            title: format!("two processors against one, {}", system.as_str()),
            value,
            worst: None,
            goal: if ours { format!("at least {SCALING_MIN}") } else { "-".into() },
            is_met: !ours || value >= SCALING_MIN,
        });
    }
    let memory =
        [("at init", results.overhead_kib), ("at most, after any row", results.overhead_peak_kib)];
    for (when, kib) in memory {
        let Some(kib) = kib else { continue };
        let value = kib as f64 / 1024.0;
        verdicts.push(Verdict {
            title: format!("memory beyond guest RAM {when}, MiB"),
            value,
            worst: None,
            goal: format!("under {MEMORY_MAX_MIB}"),
            is_met: value < MEMORY_MAX_MIB,
        });
    }
    verdicts.extend(results.figures.iter().map(|figure| Verdict {
        title: figure.title.clone(),
        value: figure.value,
        worst: None,
        goal: format!("at most {}", figure.limit),
        is_met: figure.value <= figure.limit,
    }));
    verdicts.extend(results.idle_percent.map(|value| Verdict {
        title: "idle guest, % of a processor".into(),
        value,
        worst: None,
        goal: format!("under {IDLE_MAX_PERCENT}"),
        is_met: value < IDLE_MAX_PERCENT,
    }));
    verdicts
}

fn ratios<'a>(
    rows: impl Iterator<Item = &'a Row>,
    slow: System,
    fast: System,
) -> Vec<(String, f64)> {
    rows.filter_map(|row| Some((row.name.clone(), row.ratio(slow, fast)?))).collect()
}

fn mean(ratios: &[(String, f64)]) -> Option<f64> {
    let logarithms: f64 = ratios.iter().map(|(_, ratio)| ratio.ln()).sum();
    (!ratios.is_empty()).then(|| (logarithms / ratios.len() as f64).exp())
}

fn lowest(ratios: &[(String, f64)]) -> Option<(String, f64)> {
    ratios.iter().min_by(|a, b| a.1.total_cmp(&b.1)).cloned()
}

fn highest(ratios: &[(String, f64)]) -> Option<(String, f64)> {
    ratios.iter().max_by(|a, b| a.1.total_cmp(&b.1)).cloned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::results::Sample;

    fn results(rows: &[(&str, &str, [f64; 3])]) -> Results {
        let mut results = Results::default();
        for (name, group, times) in rows {
            for (system, time) in [System::Native, System::Berth, System::Qemu].iter().zip(times) {
                results.add(*system, name, group, "", Sample::new(&[*time]).unwrap());
            }
        }
        results
    }

    #[test]
    fn means_and_single_rows_are_told_apart() {
        // Vector rows count each: a mean of 20 does not excuse the one with 8.
        let measured = results(&[
            ("a", "vector", [1.0, 1.0, 50.0]),
            ("b", "vector", [1.0, 2.0, 16.0]),
            ("c", "user", [1.0, 1.0, 2.0]),
            ("d", "user", [1.0, 2.0, 64.0]),
            ("parallel-1", "scaling", [4.0, 4.0, 4.0]),
            ("parallel-2", "scaling", [2.0, 2.5, 2.0]),
        ]);
        let verdicts = judge(&measured);
        let find = |title: &str| verdicts.iter().find(|v| v.title == title).unwrap();
        let vector = find("vector and floating point, faster than qemu");
        assert!((vector.value - 20.0).abs() < 1e-9 && !vector.is_met);
        assert_eq!(vector.worst, Some(("b".into(), 8.0)));
        assert!(!find("vector and floating point, slower than native").is_met);
        let user = find("user code, faster than qemu");
        assert!((user.value - 8.0).abs() < 1e-9 && user.is_met);
        assert!(find("user code, slower than native").is_met);
        assert!(!find("two processors against one, berth").is_met);
        assert!(!find("every row, faster than qemu").is_met);
    }
}
