//! Machines that are there as long as somebody runs them.
//!
//! Such a machine is marked by a file, so that a daemon that comes later removes it too: at its start, or
//! when it ends.

use std::sync::Arc;
use std::time::Duration;

use berth_api::v1::error::{ApiError, ErrorCode};
use berth_api::v1::machine::{CreateMachine, NAME_MAX};
use berth_api::v1::run::{Ended, RunMachine, Temporary};
use berth_api::vmm::TEMPORARY;
use uuid::Uuid;

use crate::failure::{Result, chain};
use crate::folder::{self, Folder, FolderError};
use crate::log;
use crate::machines::{Entry, Machines, lost};
use crate::vmm::CONSOLE;

/// Bytes of its console that are told at its end.
const CONSOLE_TAIL: u64 = 4096;
/// How often another name is tried.
const NAMES: usize = 20;
/// How soon what could not be removed is tried again.
const AGAIN: Duration = Duration::from_secs(1);

pub(super) fn is_temporary(folder: &Folder) -> bool {
    folder.file(TEMPORARY).exists()
}

pub(super) fn note_temporary(
    folder: &Folder,
    noted: &Temporary,
) -> std::result::Result<(), FolderError> {
    let text = serde_json::to_vec(noted).unwrap_or_default();
    folder::replace(&folder.file(TEMPORARY), &text)
}

/// It is one as others from now on.
pub(super) fn note_kept(folder: &Folder) -> std::result::Result<(), FolderError> {
    folder::remove_file(&folder.file(TEMPORARY))
}

/// A name for a machine of an image, which nobody is likely to have.
fn some_name(image: Option<&str>) -> String {
    let image = image.and_then(|image| image.split([':', '/']).next()).unwrap_or_default();
    let word = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let word: String = image.chars().map(word).take(NAME_MAX - 5).collect();
    let word = word.trim_start_matches('-');
    let word = if word.is_empty() { "berth" } else { word };
    format!("{word}-{:04x}", Uuid::new_v4().as_u128() & 0xffff)
}

impl Machines {
    /// Creates a machine that is removed when it ends, and starts it.
    ///
    /// # Errors
    /// Of either; then there is nothing of it.
    pub async fn run(self: &Arc<Self>, request: RunMachine) -> Result<Arc<Entry>> {
        let RunMachine { name, shell, terminal, config, disks } = request;
        let noted = Temporary { shell, terminal };
        let mut tries = 0;
        let entry = loop {
            tries += 1;
            let tried = name.clone().unwrap_or_else(|| some_name(config.image.as_deref()));
            let (config, disks) = (config.clone(), disks.clone());
            let request = CreateMachine { name: tried.clone(), config, disks };
            match self.create_as(request, Some(noted.clone())).await {
                Err(ApiError { code: ErrorCode::Conflict, .. })
                    if name.is_none() && tries < NAMES && self.all().contains_key(&tried) => {}
                made => break made?,
            }
        };
        match self.start(&entry).await {
            Ok(()) => Ok(entry),
            Err(error) => {
                if self.remove(&entry, true).await.is_err() {
                    // A process that does not answer has it.
                    let machines = Arc::clone(self);
                    tokio::spawn(async move {
                        machines.until_over(&entry, std::future::ready(())).await;
                    });
                }
                Err(error)
            }
        }
    }

    /// Waits until a machine that is temporary has ended for good, or whoever runs it has gone, which ends
    /// it; then removes it. How it ended, in the first case.
    pub async fn until_over(
        self: &Arc<Self>,
        entry: &Arc<Entry>,
        gone: impl Future<Output = ()> + Send,
    ) -> Option<Ended> {
        tokio::pin!(gone);
        let mut left = false;
        let mut tries = 0;
        while self.has(entry) {
            if let Some(mut ended) = entry.ended().filter(|_| !left) {
                let over = async { ended.wait_for(|over| *over).await.is_ok() };
                tokio::select! {
                    _ = over => {}
                    () = &mut gone => left = true,
                }
                // It may be started anew, or go on from a snapshot.
                drop(entry.changing.lock().await);
                continue;
            }
            let how = how_it_ended(entry);
            match self.remove(entry, left).await {
                Ok(()) => return (!left).then_some(how),
                Err(_) if !self.has(entry) => return (!left).then_some(how),
                // Somebody else has it, or it was started meanwhile.
                Err(error) => {
                    if tries == 0 {
                        let (machine, error) = (entry.name(), chain(&error));
                        tracing::warn!(machine, error, "it is over and is removed later");
                    }
                    tries += 1;
                    tokio::time::sleep(AGAIN).await;
                }
            }
        }
        (!left).then(|| how_it_ended(entry))
    }

    /// Removes those of an earlier daemon that have ended, and the others when they do.
    pub(super) fn end_temporary(self: &Arc<Self>) {
        let entries: Vec<_> = self.all().values().cloned().collect();
        entries.into_iter().for_each(|entry| self.end_if_temporary(entry));
    }

    /// Removes a machine when it has ended, if it is temporary and nobody stays with it.
    pub(super) fn end_if_temporary(self: &Arc<Self>, entry: Arc<Entry>) {
        if entry.live().temporary {
            let machines = Arc::clone(self);
            tokio::spawn(async move {
                // Whoever ran it has lost sight of it.
                machines.until_over(&entry, std::future::pending()).await;
            });
        }
    }
}

fn how_it_ended(entry: &Entry) -> Ended {
    let exit = entry.live().last_exit.clone().unwrap_or_else(lost);
    let tail = log::tail(&entry.folder().file(CONSOLE), CONSOLE_TAIL).unwrap_or_default();
    let mut console = String::from_utf8_lossy(&tail).into_owned();
    // What is no text takes three bytes for one.
    let end = console.floor_char_boundary(CONSOLE_TAIL as usize);
    console.truncate(end);
    Ended { exit, console }
}

#[cfg(test)]
mod tests {
    use berth_api::v1::machine::is_name;

    use super::some_name;

    #[test]
    fn any_image_makes_a_name() {
        for image in ["debian:bookworm", "a.b_c", ":", "registry/debian", "-x", &"y".repeat(90)] {
            let name = some_name(Some(image));
            assert!(is_name(&name), "{name}");
        }
        assert!(some_name(Some("debian:bookworm")).starts_with("debian-"));
        assert!(some_name(None).starts_with("berth-"));
    }
}
