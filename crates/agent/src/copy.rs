//! Files to and from the host: this program once more, started for a session like any other.

use std::ffi::OsString;
use std::io::{self, BufReader, BufWriter, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use berth_api::agent::copy::{EXTRACT, OWNERS, PACK, UNPACK};
use berth_api::agent::limits::DATA_CHUNK_BYTES;
use berth_archive::error::ArchiveError;
use berth_archive::pack::pack;
use berth_archive::unpack::{Taken, copy, extract};

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Task {
    /// Write this as a stream.
    Pack(PathBuf),
    /// Read a stream to here.
    Unpack {
        /// The destination.
        to: PathBuf,
        /// Owners as the stream says.
        owners: bool,
        /// Whatever is in the stream, into a directory.
        extract: bool,
    },
}

impl Task {
    /// The task that the words of the command line say, if any.
    pub fn parse(words: &[OsString]) -> Option<Self> {
        let (first, rest) = words.split_first()?;
        let (path, flags) = rest.split_last()?;
        if first == PACK && flags.is_empty() {
            return Some(Self::Pack(path.into()));
        }
        let has = |flag: &str| flags.iter().any(|word| word == flag);
        let known = flags.iter().all(|word| word == OWNERS || word == EXTRACT);
        let task = Self::Unpack { to: path.into(), owners: has(OWNERS), extract: has(EXTRACT) };
        (first == UNPACK && known).then_some(task)
    }

    /// Does it; what went wrong is the last line on standard error.
    pub fn run(&self) -> ExitCode {
        match self.carry_out() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let source = std::error::Error::source(&error);
                let cause = source.map(|source| format!(": {source}")).unwrap_or_default();
                // Whoever would read it may have gone.
                let _ = writeln!(io::stderr(), "{}{}", plain(&error.to_string()), plain(&cause));
                ExitCode::FAILURE
            }
        }
    }

    fn carry_out(&self) -> Result<(), ArchiveError> {
        match self {
            Self::Pack(path) => {
                let to = BufWriter::with_capacity(DATA_CHUNK_BYTES, io::stdout().lock());
                pack(to, path, &mut |note| {
                    let shown = note.path.display().to_string();
                    // As above.
                    let _ = writeln!(io::stderr(), "{} {}", plain(&shown), note.what);
                })
            }
            Self::Unpack { to, owners, extract: all } => {
                let taken = Taken { owners: *owners, set_id: true };
                let from = BufReader::with_capacity(DATA_CHUNK_BYTES, io::stdin().lock());
                if *all { extract(from, to, taken) } else { copy(from, to, taken) }
            }
        }
    }
}

/// In one line.
fn plain(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '?' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_are_read_from_words() {
        let parse = |words: &str| {
            let words: Vec<OsString> = words.split(' ').map(OsString::from).collect();
            Task::parse(&words)
        };
        assert_eq!(parse("pack /a"), Some(Task::Pack("/a".into())));
        let to = || PathBuf::from("/a");
        assert_eq!(
            parse("unpack --owners /a"),
            Some(Task::Unpack { to: to(), owners: true, extract: false })
        );
        assert_eq!(
            parse("unpack --extract /a"),
            Some(Task::Unpack { to: to(), owners: false, extract: true })
        );
        for other in ["pack", "pack -x /a", "unpack --all /a", "--serve-unix /a", ""] {
            assert_eq!(parse(other), None, "{other}");
        }
    }
}
