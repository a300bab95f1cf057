//! What machines use, and how often they started.

use std::sync::Arc;

use berth_api::v1::error::ErrorCode;
use berth_api::v1::stats::Stats;
use jiff::Timestamp;

use crate::failure::{Result, conflict, error, failed};
use crate::machines::{Entry, Machines};
use crate::usage;

/// What is counted of a machine since the daemon started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Starts.
    pub starts: u64,
    /// Ends that were failures.
    pub failures: u64,
}

impl Entry {
    /// What is counted of it.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.live().counts
    }

    /// What it uses now; may wait for the kernel. `None` when it does not run.
    #[must_use]
    pub fn stats(&self) -> Option<Stats> {
        let live = self.live();
        let (name, status) = (live.name.clone(), live.run.as_ref()?.status.clone());
        let (state, configured) = (live.state(), live.config.machine.clone());
        drop(live);
        let usage = usage::of_machine(status.pid)?;
        let mut vcpu_ms = usage.vcpu_ms;
        // An older process does not say what it has.
        let (cpus, memory_bytes) = match status.cpus {
            0 => (configured.cpus, configured.memory.bytes()),
            cpus => (cpus, status.memory_bytes),
        };
        vcpu_ms.resize(usize::from(cpus), 0);
        Some(Stats {
            name,
            id: self.id,
            time: Timestamp::now(),
            state,
            started: status.started,
            pid: status.pid,
            cpu_ms: usage.cpu_ms,
            vcpu_ms,
            resident_bytes: usage.resident_bytes,
            memory_bytes,
        })
    }
}

impl Machines {
    /// What a machine uses.
    ///
    /// # Errors
    /// It does not run.
    pub async fn stats(entry: &Arc<Entry>) -> Result<Stats> {
        let looked = Arc::clone(entry);
        let stats = tokio::task::spawn_blocking(move || looked.stats()).await;
        stats.map_err(|error| failed(&error))?.ok_or_else(|| {
            let name = entry.name();
            conflict(format!("{name} does not run; `berth vm start {name}` starts it"))
        })
    }

    /// What all machines that run use, and what is counted of all, by name.
    ///
    /// # Errors
    /// The host's.
    pub async fn all_stats(&self) -> Result<Vec<(Arc<Entry>, Option<Stats>)>> {
        let entries: Vec<_> = self.all().values().cloned().collect();
        let look =
            move || entries.into_iter().map(|entry| (Arc::clone(&entry), entry.stats())).collect();
        let looked = tokio::task::spawn_blocking(look).await;
        looked.map_err(|wrong| error(ErrorCode::Failed, wrong.to_string()))
    }
}
