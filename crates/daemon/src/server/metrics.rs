//! `/metrics` for Prometheus.

use std::fmt::Write;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use berth_api::v1::machine::MachineState;

use crate::server::Daemon;

/// The text format 0.0.4: few gauges, made on the spot.
pub(super) async fn metrics(State(daemon): State<Daemon>) -> impl IntoResponse {
    let machines = daemon.machines.list();
    let mut text = String::new();
    let states = [
        MachineState::Stopped,
        MachineState::Running,
        MachineState::Paused,
        MachineState::Failed,
        MachineState::Suspended,
    ];
    text.push_str("# HELP berth_machines Machines by what they are doing.\n");
    text.push_str("# TYPE berth_machines gauge\n");
    for state in states {
        let count = machines.iter().filter(|machine| machine.state == state).count();
        // Writing to a string does not fail.
        let _ = writeln!(text, "berth_machines{{state=\"{}\"}} {count}", state.as_str());
    }
    text.push_str("# HELP berth_start_time_seconds When the daemon started.\n");
    text.push_str("# TYPE berth_start_time_seconds gauge\n");
    let _ = writeln!(text, "berth_start_time_seconds {}", daemon.started.as_second());
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}
