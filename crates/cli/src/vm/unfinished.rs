//! Imports that broke off: what the daemon keeps of them, and how one goes on.

use std::fmt;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use berth_api::size::Size;
use berth_api::v1::import::UnfinishedImport;
use berth_api::v1::routes::{self, PREFIX};
use hyper::Method;
use jiff::Timestamp;

use super::{Done, NOTHING, each, print_list, span};
use crate::args::appliance::ImportRmArgs;
use crate::client::{Client, ClientError};
use crate::exit::CliError;

/// How long an import that has just broken off may take until the daemon has noticed and kept it.
const PATIENCE: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(50);

/// An import whose connection broke.
#[derive(Debug, thiserror::Error)]
pub enum BrokeOff {
    /// What came is kept.
    #[error("the import of {name} broke off at {came}; `berth vm import {}` goes on there", file.display())]
    At {
        /// The machine.
        name: String,
        /// How far it came.
        came: Came,
        /// Of what.
        file: PathBuf,
        /// How it broke.
        source: ClientError,
    },
    /// The daemon cannot say how far it came.
    #[error("the import broke off; `berth vm import {}` goes on with what is kept of it", file.display())]
    Somewhere {
        /// Of what.
        file: PathBuf,
        /// How it broke.
        source: ClientError,
    },
}

fn all(client: &Client) -> Result<Vec<UnfinishedImport>, ClientError> {
    client.call(&Method::GET, &format!("{PREFIX}/imports"), NOTHING)
}

/// `berth vm imports`.
///
/// # Errors
/// [`CliError`].
pub fn list(client: &Client, json: bool) -> Done {
    let imports = all(client)?;
    let now = Timestamp::now();
    print_list(&imports, json, &["ID", "NAME", "CAME", "DISK", "BROKE OFF"], |import| {
        vec![
            import.id.to_string(),
            import.name.clone(),
            Size::from(import.at).to_string(),
            Size::from(import.disk_bytes).to_string(),
            if import.in_use { "goes on".to_owned() } else { span(import.time, now) },
        ]
    })
}

/// `berth vm import-rm`.
///
/// # Errors
/// [`CliError`].
pub fn remove(client: &Client, args: &ImportRmArgs) -> Done {
    each(&args.ids, |id| {
        client.call::<()>(
            &Method::DELETE,
            &format!("{PREFIX}/imports/{}", routes::part(id)),
            NOTHING,
        )
    })
}

/// The import that could go on.
pub(super) struct Wanted {
    /// The checksum of the appliance's beginning.
    pub(super) head: String,
    /// Its memory is to be left out.
    pub(super) without_state: bool,
}

impl Wanted {
    /// The one that came furthest and that nobody goes on with.
    ///
    /// # Errors
    /// The daemon does not say.
    pub(super) fn find(&self, client: &Client) -> Result<Option<UnfinishedImport>, ClientError> {
        let began = Instant::now();
        loop {
            let fits = |import: &UnfinishedImport| {
                import.head == self.head && import.without_state == self.without_state
            };
            let fitting: Vec<_> = all(client)?.into_iter().filter(fits).collect();
            let is_busy = !fitting.is_empty();
            let free = fitting.into_iter().filter(|import| !import.in_use);
            match free.max_by_key(|import| import.at) {
                None if is_busy && began.elapsed() < PATIENCE => thread::sleep(POLL),
                found => return Ok(found),
            }
        }
    }

    /// What to say when the connection broke.
    pub(super) fn broke_off(
        &self,
        client: &Client,
        file: &Path,
        size: Option<u64>,
        source: ClientError,
    ) -> CliError {
        match self.find(client) {
            Ok(None) => source.into(),
            Ok(Some(kept)) => {
                let (name, came) = (kept.name, Came { at: kept.at, size });
                Box::new(BrokeOff::At { name, came, file: file.to_owned(), source }).into()
            }
            Err(_) => Box::new(BrokeOff::Somewhere { file: file.to_owned(), source }).into(),
        }
    }
}

/// How far an import came, for people.
#[derive(Debug)]
pub struct Came {
    /// Bytes that have come.
    pub(super) at: u64,
    /// All of them, if that is known.
    pub(super) size: Option<u64>,
}

impl fmt::Display for Came {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Size::from(self.at))?;
        self.size.map_or(Ok(()), |size| write!(f, " of {}", Size::from(size)))
    }
}
