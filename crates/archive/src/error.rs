//! Why something was not packed or unpacked.

use std::io;
use std::path::{Path, PathBuf};

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The system refused something.
    #[error("{action} {} failed", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The stream ended too early, or is none.
    #[error("the stream of files is damaged")]
    Damaged(#[source] io::Error),
    /// It holds nothing.
    #[error("the stream of files is empty")]
    Empty,
    /// It holds something that is not taken.
    #[error("the stream has {name:?}, {reason}")]
    Entry {
        /// Its name in the stream.
        name: String,
        /// Why not.
        reason: &'static str,
    },
    /// The destination does not fit.
    #[error("{} {reason}", path.display())]
    Destination {
        /// Which.
        path: PathBuf,
        /// Why not.
        reason: &'static str,
    },
    /// Whoever takes the stream has gone.
    #[error("the stream of files cannot be written")]
    Output(#[source] io::Error),
}

/// Makes an error of the system one of a file.
pub(crate) fn failed<E: Into<io::Error>>(
    action: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> ArchiveError {
    let path = path.to_owned();
    move |error| ArchiveError::File { action, path, source: error.into() }
}
