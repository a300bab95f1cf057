//! `berth vm top`: what machines use, again and again.

use std::collections::BTreeMap;
use std::io::{self, IsTerminal, Write};
use std::thread;
use std::time::Duration;

use berth_api::size::Size;
use berth_api::v1::machine::MachineState;
use berth_api::v1::routes::{self, PREFIX};
use berth_api::v1::stats::Stats;
use hyper::Method;
use serde::Serialize;

use crate::args::TopArgs;
use crate::client::{Client, ClientError};
use crate::exit::{CliError, ExitCode};
use crate::table;
use crate::vm::{NOTHING, span};

/// Over what the first rates are taken.
const FIRST: Duration = Duration::from_millis(500);
/// Least time between two looks.
const INTERVAL_MIN: Duration = Duration::from_millis(100);
/// Puts the cursor to the upper left and clears what is behind it.
const CLEAR: &str = "\x1b[H\x1b[J";

/// What a machine uses, with rates.
#[derive(Serialize)]
struct Shown<'a> {
    #[serde(flatten)]
    stats: &'a Stats,
    /// Of one processor of the host, in percent.
    cpu_percent: f64,
    vcpu_percent: Vec<f64>,
}

/// `berth vm top`.
///
/// # Errors
/// [`CliError`].
pub fn run(client: &Client, args: &TopArgs) -> Result<ExitCode, CliError> {
    let interval = Duration::try_from_secs_f64(args.interval).ok();
    let Some(interval) = interval.filter(|interval| *interval >= INTERVAL_MIN) else {
        return Err(CliError::Usage(format!(
            "--interval {} is no time to wait: 0.1 seconds are the least",
            args.interval
        )));
    };
    let mut before = look(client, &args.names, true)?;
    thread::sleep(interval.min(FIRST));
    let clears = !args.no_stream && !args.json && io::stdout().is_terminal();
    loop {
        let now = look(client, &args.names, false)?;
        let shown: Vec<_> = now.iter().map(|now| shown(&before, now)).collect();
        let mut text = if args.json { lines(&shown)? } else { text(&shown) };
        if clears {
            text.insert_str(0, CLEAR);
        }
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes()).and_then(|()| out.flush()).map_err(CliError::Output)?;
        if args.no_stream || (now.is_empty() && !args.names.is_empty()) {
            return Ok(ExitCode::Success);
        }
        before = now;
        thread::sleep(interval);
    }
}

/// All that run, or those that were named; at first each of these must run.
fn look(client: &Client, names: &[String], all: bool) -> Result<Vec<Stats>, ClientError> {
    if names.is_empty() {
        return client.call(&Method::GET, &format!("{PREFIX}/stats"), NOTHING);
    }
    let mut stats = Vec::new();
    for name in names {
        match client.call(&Method::GET, &routes::machine(name, Some("stats")), NOTHING) {
            Err(ClientError::Api(_)) if !all => {}
            other => stats.push(other?),
        }
    }
    Ok(stats)
}

fn shown<'a>(before: &[Stats], now: &'a Stats) -> Shown<'a> {
    let runs: BTreeMap<_, _> = before.iter().map(|stats| ((stats.id, stats.pid), stats)).collect();
    // One that has started since has used all of it since.
    let before = runs.get(&(now.id, now.pid));
    let since = before.map_or(now.started, |before| before.time);
    let passed_ms = now.time.duration_since(since).as_millis().max(1);
    let percent = |now: u64, before: Option<u64>| {
        let used = now.saturating_sub(before.unwrap_or(0));
        (used as f64 * 1000.0 / passed_ms as f64).round() / 10.0
    };
    let vcpu = |(number, ms): (usize, &u64)| {
        percent(*ms, before.and_then(|before| before.vcpu_ms.get(number)).copied())
    };
    Shown {
        stats: now,
        cpu_percent: percent(now.cpu_ms, before.map(|before| before.cpu_ms)),
        vcpu_percent: now.vcpu_ms.iter().enumerate().map(vcpu).collect(),
    }
}

fn lines(shown: &[Shown<'_>]) -> Result<String, CliError> {
    let mut text = String::new();
    for shown in shown {
        text.push_str(&serde_json::to_string(shown).map_err(CliError::Json)?);
        text.push('\n');
    }
    Ok(text)
}

fn text(shown: &[Shown<'_>]) -> String {
    let rows = shown.iter().map(|shown| {
        let stats = shown.stats;
        let vcpus: Vec<_> = shown.vcpu_percent.iter().map(|cpu| format!("{cpu:.0}")).collect();
        let paused = if stats.state == MachineState::Paused { " (paused)" } else { "" };
        vec![
            format!("{}{paused}", stats.name),
            format!("{:.1}", shown.cpu_percent),
            vcpus.join(" "),
            mebibytes(stats.resident_bytes),
            Size::from(stats.memory_bytes).to_string(),
            stats.pid.to_string(),
            span(stats.started, stats.time),
        ]
    });
    let header = ["NAME", "CPU %", "VCPU %", "MEMORY", "GUEST", "PID", "UP"];
    table::plain(&header, rows.collect()) + "\n"
}

fn mebibytes(bytes: u64) -> String {
    const MIB: f64 = 1_048_576.0;
    format!("{:.1}M", bytes as f64 / MIB)
}

#[cfg(test)]
mod tests {
    use berth_api::v1::machine::MachineState;

    use super::*;

    #[test]
    fn rates_are_differences() {
        let stats = |time: &str, cpu_ms: u64, vcpu_ms: &[u64]| Stats {
            name: "a".into(),
            id: uuid::Uuid::nil(),
            time: time.parse().unwrap(),
            state: MachineState::Running,
            started: "2026-01-01T00:00:00Z".parse().unwrap(),
            pid: 1,
            cpu_ms,
            vcpu_ms: vcpu_ms.to_vec(),
            resident_bytes: 3 << 20,
            memory_bytes: 64 << 20,
        };
        let before = stats("2026-01-01T00:01:00Z", 10_000, &[4000]);
        let now = stats("2026-01-01T00:01:02Z", 13_000, &[5000, 2000]);
        let rates = shown(&[before], &now);
        assert_eq!((rates.cpu_percent, rates.vcpu_percent.clone()), (150.0, vec![50.0, 100.0]));
        let table = text(&[rates]);
        assert!(table.contains("150.0") && table.contains("50 100"), "{table}");
        assert!(table.contains("3.0M") && table.contains("64M") && table.contains("2s"), "{table}");
        // One that was not there before, since its start.
        assert_eq!(shown(&[], &now).cpu_percent, 21.0);
        let text = lines(&[shown(&[], &now)]).unwrap();
        assert!(text.contains("\"cpu_percent\":21.0,"), "{text}");
    }
}
