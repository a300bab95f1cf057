//! Machines and their control groups.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;

use crate::machines::{Entry, Machines};
use crate::vmm::{self, VmmError};

/// How long whoever waits for the end of a machine waits for the end of its group, too.
const REMOVE_TIME: Duration = Duration::from_millis(500);

impl Machines {
    /// Starts the process of a machine in a control group of its own, if the host has that.
    pub(super) async fn start_in_group(
        &self,
        entry: &Arc<Entry>,
        tap: Option<OwnedFd>,
    ) -> Result<(), VmmError> {
        let (groups, id, limits) = (Arc::clone(&self.groups), entry.id, entry.limits());
        let made = tokio::task::spawn_blocking(move || groups.make(id, limits)).await;
        let group = match made.unwrap_or_else(|error| Err(error.to_string())) {
            Ok(group) => Some(group),
            Err(why) if limits.any() => {
                return Err(VmmError::NotStarted(format!(
                    "it has limits, and this host has no control groups for it: {why}"
                )));
            }
            Err(why) => {
                tracing::info!(machine = entry.name(), why, "it gets no control group");
                None
            }
        };
        entry.live().group.clone_from(&group);
        let group = group.map(|group| (group, limits));
        vmm::start(&self.program, &self.root, &entry.folder(), tap, group).await
    }

    /// Removes the group of a machine whose process has ended.
    pub(super) async fn remove_group(&self, entry: &Entry) {
        let Some(group) = entry.live().group.take() else { return };
        let groups = Arc::clone(&self.groups);
        let removed = tokio::task::spawn_blocking(move || groups.remove(&group));
        // It goes on by itself.
        let _ = timeout(REMOVE_TIME, removed).await;
    }

    /// Removes groups of machines that ended while there was no daemon.
    pub(super) async fn sweep_groups(&self) {
        let groups = Arc::clone(&self.groups);
        let used: Vec<_> =
            self.all().values().filter_map(|entry| entry.live().group.clone()).collect();
        let sweep = move || groups.sweep(|group| used.contains(group));
        // It does not panic.
        let _ = tokio::task::spawn_blocking(sweep).await;
    }
}
