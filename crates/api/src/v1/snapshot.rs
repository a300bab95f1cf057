//! Snapshots and clones of machines.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// Most characters of a tag.
pub const TAG_MAX: usize = 63;
/// Most clones that are made at once.
pub const CLONES_MAX: u32 = 256;

/// Whether this can be a snapshot's tag: letters, digits, `.`, `_` and `-`, of which the first is a
/// letter or digit.
#[must_use]
pub fn is_tag(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    let first = text.chars().next().is_some_and(|c| c.is_ascii_alphanumeric());
    first && text.len() <= TAG_MAX && text.chars().all(good)
}

/// `POST /machines/{name}/snapshots`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TakeSnapshot {
    /// What it is called; the time, when absent.
    #[serde(default)]
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    pub tag: Option<String>,
    /// Only the disks, also of a machine that runs: as if its power had failed then.
    #[serde(default)]
    pub disk_only: bool,
}

/// A snapshot of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Snapshot {
    /// What it is called; no other one of the machine is.
    pub tag: String,
    /// Its identity.
    #[schema(value_type = String, format = Uuid)]
    pub id: Uuid,
    /// When it was taken.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
    /// The tag of the one that the machine descended from then; of one before that if it was removed.
    pub parent: Option<String>,
    /// The machine descends from this one now.
    pub current: bool,
    /// It holds memory and processors too, and a machine that is restored goes on.
    pub memory: bool,
    /// How long the guest stood still for it, in milliseconds; nothing if it did not run.
    pub pause_ms: Option<f64>,
}

/// `POST /machines/{name}/restore`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RestoreSnapshot {
    /// Which snapshot.
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    pub tag: String,
    /// Also a machine that runs or is suspended, which is lost.
    #[serde(default)]
    pub force: bool,
}

/// `POST /machines/{name}/clone`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneMachine {
    /// The clone's name; with a count what their names begin with.
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$")]
    pub name: String,
    /// So many, called NAME-1, NAME-2 and so on: all of them or none.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 256)]
    pub count: Option<u32>,
    /// They go on where the machine is, or the snapshot; else they are made as stopped machines.
    #[serde(default)]
    pub running: bool,
    /// Of this snapshot; when absent, of the machine as it is now.
    #[serde(default)]
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    pub tag: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_names_of_directories() {
        for good in ["a", "1.2_b-C", &"x".repeat(63)] {
            assert!(is_tag(good), "{good}");
        }
        for bad in ["", ".", "..", ".new-1", "-a", "a/b", "a b", "é", &"x".repeat(64)] {
            assert!(!is_tag(bad), "{bad}");
        }
    }
}
