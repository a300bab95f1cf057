//! The formats of disks.

use std::fmt;
use std::path::Path;
use std::str::FromStr;

/// What a file of a disk holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// The disk's bytes, one after the other.
    #[default]
    Raw,
    /// An image that maps clusters, QEMU's format of versions 2 and 3.
    Qcow2,
}

impl Format {
    /// Its name, as in a header or a configuration.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format that a name given by a user means: qcow2 if it ends in `.qcow2`, else raw. Only
    /// for command lines; what is stored says its format.
    #[must_use]
    pub fn of_name(path: &Path) -> Self {
        match path.extension() {
            Some(extension) if extension == "qcow2" => Self::Qcow2,
            _ => Self::Raw,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(format!("`{text}` is no format of disks; `raw` and `qcow2` are")),
        }
    }
}
