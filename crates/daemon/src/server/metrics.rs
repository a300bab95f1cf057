//! Metrics for Prometheus: the text format 0.0.4, made when it is asked for.

use std::fmt::{Display, Write};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use berth_api::v1::error::ErrorBody;
use berth_api::v1::machine::{Machine, MachineState};
use berth_api::v1::stats::Stats;

use crate::machines::stats::Counts;
use crate::server::Daemon;
use crate::server::extract::Failure;
use crate::usage;

const STATES: [MachineState; 5] = [
    MachineState::Stopped,
    MachineState::Running,
    MachineState::Paused,
    MachineState::Failed,
    MachineState::Suspended,
];

/// Metrics of the daemon and of each machine, for Prometheus.
#[utoipa::path(get, path = "/metrics", responses(
    (status = 200, body = String, content_type = "text/plain"),
    (status = "5XX", body = ErrorBody),
))]
pub(super) async fn metrics(State(daemon): State<Daemon>) -> Result<Response, Failure> {
    let all = daemon.machines.all_stats().await?;
    let rows: Vec<Row> = all
        .into_iter()
        .map(|(entry, stats)| Row { machine: entry.describe(), counts: entry.counts(), stats })
        .collect();
    let mut text = Text::default();
    of_daemon(&mut text, &daemon, &rows);
    of_machines(&mut text, &rows);
    of_running(&mut text, &rows);
    Ok(([(CONTENT_TYPE, "text/plain; version=0.0.4")], text.0).into_response())
}

/// A machine.
struct Row {
    machine: Machine,
    counts: Counts,
    /// If it runs.
    stats: Option<Stats>,
}

fn of_daemon(text: &mut Text, daemon: &Daemon, rows: &[Row]) {
    text.head("berth_build_info", "gauge", "What runs.");
    text.sample("berth_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1);
    text.head("berth_machines", "gauge", "Machines by what they are doing.");
    for state in STATES {
        let count = rows.iter().filter(|row| row.machine.state == state).count();
        text.sample("berth_machines", &[("state", state.as_str())], count);
    }
    text.head("berth_start_time_seconds", "gauge", "When the daemon started.");
    text.sample("berth_start_time_seconds", &[], daemon.started.as_second());
    let Some((cpu_ms, resident_bytes)) = usage::of_this_process() else { return };
    text.head("process_cpu_seconds_total", "counter", "Processor time of the daemon.");
    text.sample("process_cpu_seconds_total", &[], seconds(cpu_ms));
    text.head("process_resident_memory_bytes", "gauge", "Memory of the daemon.");
    text.sample("process_resident_memory_bytes", &[], resident_bytes);
}

fn of_machines(text: &mut Text, rows: &[Row]) {
    let mut family = |name: &str, kind: &str, help: &str, value: &dyn Fn(&Row) -> u64| {
        text.head(name, kind, help);
        for row in rows {
            text.sample(name, &[("machine", &row.machine.name)], value(row));
        }
    };
    family("berth_machine_cpus", "gauge", "Virtual processors that it is to have.", &|row| {
        row.machine.config.cpus.into()
    });
    family("berth_machine_memory_bytes", "gauge", "Memory that its guest is to have.", &|row| {
        row.machine.config.memory.bytes()
    });
    let help = "Starts since the daemon started.";
    family("berth_machine_starts_total", "counter", help, &|row| row.counts.starts);
    let help = "Starts after the first since the daemon started.";
    family("berth_machine_restarts_total", "counter", help, &|row| {
        row.counts.starts.saturating_sub(1)
    });
    let help = "Ends that were failures, since the daemon started.";
    family("berth_machine_failures_total", "counter", help, &|row| row.counts.failures);
    text.head("berth_machine_info", "gauge", "What it is.");
    for Row { machine, .. } in rows {
        let id = machine.id.to_string();
        let image = machine.config.image.as_deref().unwrap_or_default();
        let labels = [("machine", machine.name.as_str()), ("id", &id), ("image", image)];
        text.sample("berth_machine_info", &labels, 1);
    }
    text.head("berth_machine_state", "gauge", "1 for what it is doing.");
    for Row { machine, .. } in rows {
        for state in STATES {
            let labels = [("machine", machine.name.as_str()), ("state", state.as_str())];
            text.sample("berth_machine_state", &labels, u8::from(machine.state == state));
        }
    }
}

fn of_running(text: &mut Text, rows: &[Row]) {
    let running = || rows.iter().filter_map(|row| row.stats.as_ref());
    let name = "berth_machine_cpu_seconds_total";
    text.head(name, "counter", "Processor time of its processes, from its start on.");
    for stats in running() {
        text.sample(name, &[("machine", &stats.name)], seconds(stats.cpu_ms));
    }
    let name = "berth_machine_vcpu_seconds_total";
    text.head(name, "counter", "Processor time of each virtual processor.");
    for stats in running() {
        for (number, ms) in stats.vcpu_ms.iter().enumerate() {
            let number = number.to_string();
            let labels = [("machine", stats.name.as_str()), ("vcpu", &number)];
            text.sample(name, &labels, seconds(*ms));
        }
    }
    let name = "berth_machine_resident_memory_bytes";
    text.head(name, "gauge", "Memory of the host that it takes, the guest's included.");
    for stats in running() {
        text.sample(name, &[("machine", &stats.name)], stats.resident_bytes);
    }
    let name = "berth_machine_start_time_seconds";
    text.head(name, "gauge", "When it started.");
    for stats in running() {
        text.sample(name, &[("machine", &stats.name)], stats.started.as_second());
    }
    let name = "berth_machine_uptime_seconds";
    text.head(name, "gauge", "For how long it has run.");
    for stats in running() {
        let up = stats.time.duration_since(stats.started).as_secs().max(0);
        text.sample(name, &[("machine", &stats.name)], up);
    }
}

fn seconds(ms: u64) -> String {
    format!("{}.{:03}", ms / 1000, ms % 1000)
}

/// The text format: writing to a string does not fail.
#[derive(Default)]
struct Text(String);

impl Text {
    fn head(&mut self, name: &str, kind: &str, help: &str) {
        let help = help.replace('\\', "\\\\").replace('\n', "\\n");
        let _ = writeln!(self.0, "# HELP {name} {help}");
        let _ = writeln!(self.0, "# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl Display) {
        self.0.push_str(name);
        for (index, (label, value)) in labels.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('\n', "\\n").replace('"', "\\\"");
            let before = if index == 0 { '{' } else { ',' };
            let _ = write!(self.0, "{before}{label}=\"{value}\"");
        }
        if !labels.is_empty() {
            self.0.push('}');
        }
        let _ = writeln!(self.0, " {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_escaped() {
        let mut text = Text::default();
        text.head("a", "gauge", "b\\c\nd");
        text.sample("a", &[("x", "q\"\\\n"), ("y", "}")], 1.5);
        text.sample("a", &[], seconds(61_007));
        let want =
            "# HELP a b\\\\c\\nd\n# TYPE a gauge\na{x=\"q\\\"\\\\\\n\",y=\"}\"} 1.5\na 61.007\n";
        assert_eq!(text.0, want);
    }
}
