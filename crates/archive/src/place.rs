//! Where something goes that is copied, by what is at its destination: as `cp -r` and `docker cp` do.
//!
//! | what comes | destination is absent | is a directory | is something else |
//! |---|---|---|---|
//! | a file or link | becomes it; not if it ends in `/` | goes into it | replaces it |
//! | a directory | becomes it | goes into it | is refused |
//! | what is in a directory | becomes a directory with it | goes into it | is refused |

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use crate::error::{ArchiveError, failed};

/// What comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coming<'a> {
    /// A file or a link of this name.
    File(&'a OsStr),
    /// A directory of this name.
    Directory(&'a OsStr),
    /// What is in a directory.
    Content,
}

/// Where it goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// A directory that is there.
    pub directory: PathBuf,
    /// What it is called there; nothing for what is in a directory.
    pub name: Option<OsString>,
}

/// Decides; makes the directory in which the content of another one is to be.
///
/// # Errors
/// [`ArchiveError::Destination`] when it does not fit, [`ArchiveError::File`].
pub fn place(destination: &Path, coming: Coming<'_>) -> Result<Place, ArchiveError> {
    let refuse = |reason| Err(ArchiveError::Destination { path: destination.to_owned(), reason });
    let ends_in_slash = destination.as_os_str().as_bytes().ends_with(b"/");
    let there = match fs::metadata(destination) {
        Ok(meta) => Some(meta.is_dir()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(failed("reading", destination)(error)),
    };
    let into = |name: Option<&OsStr>| {
        Ok(Place { directory: destination.to_owned(), name: name.map(OsStr::to_owned) })
    };
    match (coming, there) {
        (Coming::File(name) | Coming::Directory(name), Some(true)) => into(Some(name)),
        (Coming::Content, Some(true)) => into(None),
        (Coming::Directory(_) | Coming::Content, Some(false)) => {
            refuse("is there already and is no directory")
        }
        (Coming::File(_), Some(false)) => {
            // Through a link to what it leads to.
            let real = fs::canonicalize(destination).map_err(failed("finding", destination))?;
            beside(&real)
        }
        (Coming::File(_), None) if ends_in_slash => refuse("is no directory that is there"),
        (Coming::File(_) | Coming::Directory(_), None) => beside(destination),
        (Coming::Content, None) => {
            fs::create_dir(destination).map_err(failed("making", destination))?;
            into(None)
        }
    }
}

fn beside(path: &Path) -> Result<Place, ArchiveError> {
    let Some(name) = path.file_name() else {
        let reason = "has no name at its end";
        return Err(ArchiveError::Destination { path: path.to_owned(), reason });
    };
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
        _ => ".".into(),
    };
    Ok(Place { directory, name: Some(name.to_owned()) })
}
