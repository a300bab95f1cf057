//! Images that machines are made from.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::size::Size;
use crate::v1::error::ApiError;

/// An image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Its name.
    #[schema(example = "debian:bookworm")]
    pub name: String,
    /// The version of its kernel, as `uname -r` tells it.
    pub kernel_version: String,
    /// When it was made: seconds since 1970.
    pub created_unix_s: u64,
    /// Bytes of its root disk, as a guest sees them.
    pub disk_bytes: u64,
    /// Bytes of the host's disk that it takes.
    pub allocated_bytes: u64,
}

/// `POST /images`: an image to be made from the mirror that the daemon's host uses.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct BootstrapImage {
    /// Of which distribution: `debian`.
    #[schema(pattern = "^debian$")]
    pub distribution: String,
    /// Which release of it.
    #[schema(pattern = "^[a-z0-9]+$", example = "bookworm")]
    pub suite: String,
    /// The size of its root disk, 512M at least; 4G when absent. Only what is used is stored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_size: Option<Size>,
    /// Packages beyond those that every image has.
    #[serde(default)]
    pub include: Vec<String>,
    /// What it is called: lower-case letters, digits, `.`, `_` and `-`, with one `:` before the tag, 64
    /// characters at most; `DISTRIBUTION:SUITE` when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Makes it anew if it is there.
    #[serde(default)]
    pub again: bool,
}

/// A line of the answer to `POST /images`. The last one is not `progress`; without it the daemon was
/// lost, and nothing was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum BootstrapLine {
    /// What goes on, for people.
    Progress(String),
    /// It was made.
    Made(Image),
    /// It was there before.
    Existed(Image),
    /// Nothing was made, and why.
    Failed(ApiError),
}
