//! What happens to machines, as a stream of JSON lines.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// What.
    pub kind: EventKind,
    /// To which machine, by its name at that time.
    pub machine: String,
    /// Its identity.
    #[schema(value_type = String, format = Uuid)]
    pub id: uuid::Uuid,
    /// How it ended, or what it was called before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

/// The kinds of events.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum EventKind {
    /// A machine was created.
    Created,
    /// A folder became a machine.
    Adopted,
    /// It runs.
    Started,
    /// Its vCPUs stand still.
    Paused,
    /// They go on.
    Unpaused,
    /// It was stored and ended; it goes on when it is started.
    Suspended,
    /// A snapshot of it was taken; the detail is its tag.
    Snapshotted,
    /// It is as in a snapshot again; the detail is its tag.
    Restored,
    /// A snapshot of it was removed; the detail is its tag.
    SnapshotRemoved,
    /// It was made as a clone; the detail is the name of the machine it was made of.
    Cloned,
    /// It came out of an appliance; the detail is what the machine was called there.
    Imported,
    /// It ended in order: powered off or stopped.
    Stopped,
    /// It ended otherwise; the detail says how.
    Failed,
    /// Its configuration was changed.
    Changed,
    /// It has another name; the detail is the one before.
    Renamed,
    /// It is gone.
    Removed,
}
