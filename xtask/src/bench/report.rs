//! The results for people and for programs.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

use crate::bench::goals::judge;
use crate::bench::results::{Results, Row};
use crate::bench::system::System;

const SYSTEMS: [System; 3] = [System::Native, System::Berth, System::Qemu];

/// The table, the goals, and what is wrong.
pub fn print(results: &Results) {
    println!(
        "\n{:<10} {:<18} {:>11} {:>11} {:>11} {:>13} {:>11}",
        "group", "row", "native", "berth", "qemu", "berth/native", "qemu/berth"
    );
    for row in &results.rows {
        let time = |system| row.median(system).map_or("-".into(), duration);
        let ratio = |slow, fast| row.ratio(slow, fast).map_or("-".into(), |r| format!("{r:.2}"));
        println!(
            "{:<10} {:<18} {:>11} {:>11} {:>11} {:>13} {:>11}",
            row.group,
            row.name,
            time(System::Native),
            time(System::Berth),
            time(System::Qemu),
            ratio(System::Berth, System::Native),
            ratio(System::Qemu, System::Berth)
        );
    }
    println!("\n{:<45} {:>7}  {:<18} {:<8} worst row", "goal", "value", "limit", "");
    for verdict in judge(results) {
        let met = match (verdict.goal.as_str(), verdict.is_met) {
            ("-", _) => "",
            (_, true) => "met",
            (_, false) => "NOT MET",
        };
        let worst = verdict.worst.map_or(String::new(), |(name, by)| format!("{name} {by:.2}"));
        println!(
            "{:<45} {:>7.2}  {:<18} {met:<8} {worst}",
            verdict.title, verdict.value, verdict.goal
        );
    }
    println!();
    for system in SYSTEMS {
        let errors = results.clocks.iter().filter(|(s, _)| *s == system);
        if let Some(error) = errors.map(|(_, error)| error.abs()).max_by(f64::total_cmp) {
            println!("clock of {}: within {:.2} % of the host's", system.as_str(), error * 100.0);
        }
    }
    for absent in &results.absent {
        println!("not run: {absent}");
    }
    for fault in &results.faults {
        println!("WRONG: {fault}");
    }
}

/// A time of an operation with three digits.
fn duration(nanoseconds: f64) -> String {
    let units = [(1e9, "s"), (1e6, "ms"), (1e3, "us")];
    let (value, unit) = units
        .iter()
        .find(|(size, _)| nanoseconds >= *size)
        .map_or((nanoseconds, "ns"), |(size, unit)| (nanoseconds / size, unit));
    let digits = match value {
        v if v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        _ => 2,
    };
    format!("{value:.digits$} {unit}")
}

/// Everything, as a file for other programs.
pub fn write_json(results: &Results, path: &Path) -> Result<()> {
    let system = |row: &Row, system| {
        let median = row.median(system)?;
        Some(json!({ "median_ns": median, "fastest_ns": row.fastest(system) }))
    };
    let rows: Vec<_> = results
        .rows
        .iter()
        .map(|row| {
            json!({
                "name": row.name,
                "group": row.group,
                "native": system(row, System::Native),
                "berth": system(row, System::Berth),
                "qemu": system(row, System::Qemu),
            })
        })
        .collect();
    let goals: Vec<_> = judge(results)
        .into_iter()
        .map(|v| json!({ "title": v.title, "value": v.value, "limit": v.goal, "met": v.is_met }))
        .collect();
    let all = json!({
        "rows": rows,
        "goals": goals,
        "not_run": results.absent,
        "wrong": results.faults,
    });
    let text = serde_json::to_string_pretty(&all)?;
    std::fs::write(path, text + "\n").with_context(|| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_have_three_digits() {
        let shown = [0.3604, 12.34, 123.4, 2_500.0, 7.6e5, 2.13e9].map(duration);
        assert_eq!(shown, ["0.36 ns", "12.3 ns", "123 ns", "2.50 us", "760 us", "2.13 s"]);
    }
}
