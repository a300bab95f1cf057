//! Machines that are there as long as somebody runs them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::v1::machine::{Exit, MachineConfig, NewDisk};

/// `POST /run`: a machine that is created, started, and removed when it ends or whoever asked for it has
/// gone. The connection becomes one of lines of JSON: first the `Machine`, at its end an [`Ended`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunMachine {
    /// Its name: letters, digits and `-`, 63 at most; without one, the image's with four digits.
    #[serde(default)]
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$")]
    pub name: Option<String>,
    /// Who gets a shell on its console.
    #[serde(default)]
    pub shell: Shell,
    /// The terminal that its console is shown on.
    #[serde(default)]
    pub terminal: Option<Terminal>,
    /// What it is made of. With an image a copy of the image's disk comes before all other disks.
    #[serde(default)]
    pub config: MachineConfig,
    /// Disks after those of the configuration.
    #[serde(default)]
    pub disks: Vec<NewDisk>,
}

/// Who gets a shell on the console of a guest of an image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Shell {
    /// Whoever attaches, and when it has ended the next.
    #[default]
    Always,
    /// One; the guest powers off when it ends.
    Once,
    /// Nobody.
    Never,
}

/// A terminal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Terminal {
    /// Its kind, as `xterm`.
    #[serde(default)]
    pub term: Option<String>,
    /// Its lines.
    pub rows: u16,
    /// Its columns.
    pub cols: u16,
}

/// What is noted of a machine that is removed when it ends.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Temporary {
    /// Who gets a shell on its console.
    pub shell: Shell,
    /// The terminal that its console is shown on.
    pub terminal: Option<Terminal>,
}

/// The end of a machine that was run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Ended {
    /// How it ended.
    pub exit: Exit,
    /// The last of what the guest printed, 4 KiB at most.
    pub console: String,
}
