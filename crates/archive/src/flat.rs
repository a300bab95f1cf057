//! Files side by side in a tar stream, as an OVA has them.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use tar::{Builder, EntryType, Header};

use crate::error::{ArchiveError, failed};

/// Writes files in this order, each under a name of its own, and the end of the stream.
///
/// # Errors
/// A file cannot be read, or the stream not be written.
pub fn flat(to: impl Write, files: &[(String, PathBuf)]) -> Result<(), ArchiveError> {
    let mut builder = Builder::new(to);
    for (name, path) in files {
        let file = File::open(path).map_err(failed("opening", path))?;
        let size = file.metadata().map_err(failed("reading", path))?.len();
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0o644);
        header.set_size(size);
        let added = builder.append_data(&mut header, Path::new(name), file);
        added.map_err(ArchiveError::Output)?;
    }
    builder.into_inner().and_then(|mut to| to.flush()).map_err(ArchiveError::Output)
}
