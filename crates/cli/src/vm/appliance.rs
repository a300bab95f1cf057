//! `berth vm export` and `berth vm import`: streams between the daemon and files.

use std::fs::{self, File};
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::thread;

use berth_api::v1::machine::Machine;
use berth_api::v1::routes::{self, PREFIX};
use berth_appliance::check::Checker;
use berth_appliance::error::ApplianceError;
use berth_appliance::head::Head;
use hyper::Method;
use hyper::body::{Body, Bytes, Frame};
use tokio::sync::mpsc;

use super::{Done, NOTHING, print};
use crate::args::appliance::{ApplianceFormat, ExportArgs, ImportArgs};
use crate::client::{Client, ClientError};
use crate::exit::{CliError, ExitCode};
use crate::vm::ova::{self, Making};
use crate::vm::unfinished::{Came, Wanted};

/// Bytes that are sent at once.
const CHUNK: usize = 256 << 10;
/// Chunks that wait to be sent.
const CHUNKS: usize = 4;

/// `berth vm export`.
///
/// # Errors
/// [`CliError`]; then there is no file.
pub fn export(client: &Client, args: &ExportArgs) -> Done {
    let is_ova = is_ova(args.format, &args.output);
    if is_ova && args.with_state {
        let text = "an OVA cannot hold memory; try without --with-state, or a .berth file";
        return Err(CliError::Usage(text.into()));
    }
    let machine: Machine =
        client.call(&Method::GET, &routes::machine(&args.name, None), NOTHING)?;
    if !machine.config.shares.is_empty() {
        let name = &args.name;
        eprintln!(
            "berth: the folders that {name} shares with its host are not in what is exported"
        );
    }
    let path = routes::machine(&args.name, Some("export"));
    let path = format!("{path}?with_state={}", args.with_state);
    let get = |to: &mut dyn Write, failed: &dyn Fn(io::Error) -> CliError| match is_ova {
        true => fetch_ova(client, &path, to),
        false => fetch(client, &path, to, failed),
    };
    if args.output == Path::new("-") {
        if io::stdout().is_terminal() {
            let text = "an appliance is nothing for a terminal; -o FILE or a pipe takes it";
            return Err(CliError::Usage(text.into()));
        }
        get(&mut io::stdout().lock(), &CliError::Output)?;
        return Ok(ExitCode::Success);
    }
    let mut made = NewFile::make(&args.output, args.force)?;
    let target = made.path.clone();
    get(&mut made.file, &|source| CliError::Make { path: target.clone(), source })?;
    made.keep()?;
    Ok(ExitCode::Success)
}

/// Whether that is no appliance of ours: as was said, or by the name.
fn is_ova(format: Option<ApplianceFormat>, file: &Path) -> bool {
    let by_name = || {
        let extension = file.extension().and_then(|extension| extension.to_str());
        extension.is_some_and(|extension| matches!(extension, "ova" | "ovf"))
    };
    format.map_or_else(by_name, |format| format == ApplianceFormat::Ova)
}

fn fetch_ova(client: &Client, path: &str, to: &mut dyn Write) -> Result<(), CliError> {
    let mut making = Making::start()?;
    let fetched = fetch(client, path, &mut making.to, CliError::Output);
    match fetched {
        Ok(()) => making.finish(to),
        Err(error) => Err(making.failure(error)),
    }
}

/// Writes an appliance as it comes, and makes sure that it is one to its end.
fn fetch(
    client: &Client,
    path: &str,
    to: &mut dyn Write,
    failed: impl Fn(io::Error) -> CliError,
) -> Result<(), CliError> {
    let mut checker = Checker::default();
    client.stream(path, |bytes| {
        checker.push(bytes)?;
        to.write_all(bytes).map_err(&failed)
    })?;
    checker.finish()?;
    to.flush().map_err(&failed)
}

/// A file that has its name when it is complete. What is no regular file is written as it is.
pub(super) struct NewFile {
    path: PathBuf,
    work: Option<PathBuf>,
    pub(super) file: File,
}

impl NewFile {
    pub(super) fn make(path: &Path, replace: bool) -> Result<Self, CliError> {
        let failed = |source| CliError::Make { path: path.to_owned(), source };
        if path.metadata().is_ok_and(|meta| !meta.is_file()) {
            let file = File::options().write(true).open(path).map_err(failed)?;
            return Ok(Self { path: path.to_owned(), file, work: None });
        }
        if path.symlink_metadata().is_ok() && !replace {
            return Err(CliError::Exists { path: path.to_owned() });
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".part-{}", std::process::id()));
        let work = path.with_file_name(name);
        let file = File::options().read(true).write(true).create_new(true).open(&work);
        Ok(Self { path: path.to_owned(), file: file.map_err(failed)?, work: Some(work) })
    }

    pub(super) fn keep(mut self) -> Result<(), CliError> {
        let Some(work) = &self.work else { return Ok(()) };
        let named = self.file.sync_all().and_then(|()| fs::rename(work, &self.path));
        named.map_err(|source| CliError::Make { path: self.path.clone(), source })?;
        self.work = None;
        Ok(())
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Some(work) = &self.work {
            // Nothing is left to do when even this fails.
            let _ = fs::remove_file(work);
        }
    }
}

/// `berth vm import`.
///
/// # Errors
/// [`CliError`]; then there is no machine, unless only its start failed.
pub fn import(client: &Client, args: &ImportArgs) -> Done {
    let from = if args.file == Path::new("-") {
        if io::stdin().is_terminal() {
            return Err(CliError::Usage("an appliance does not come from a terminal".into()));
        }
        Origin::Pipe(Box::new(io::stdin()))
    } else {
        let failed = |source| CliError::File { path: args.file.clone(), source };
        let file = File::open(&args.file).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        if meta.is_dir() {
            return Err(failed(io::ErrorKind::IsADirectory.into()));
        }
        match meta.is_file() {
            true => Origin::File { file, size: meta.len() },
            false => Origin::Pipe(Box::new(file)),
        }
    };
    let machine = match is_ova(args.format, &args.file) {
        true => {
            let (stream, packing) = ova::convert(args, from)?.stream().map_err(CliError::Output)?;
            let sent = send(client, args, "", stream);
            match packing.join() {
                // What was not packed is why it was not taken. It also ends when nobody reads on.
                Ok(Err(error)) if !matches!(error, ApplianceError::Write(_)) => {
                    return Err(error.into());
                }
                _ => sent??,
            }
        }
        false if args.kernel.is_some() || args.initrd.is_some() || args.append.is_some() => {
            let text = "an appliance has its own kernel; --kernel is for an OVA";
            return Err(CliError::Usage(text.into()));
        }
        false => send_appliance(client, args, from)?,
    };
    print(&format!("{}\n", machine.name))?;
    if args.run {
        let path = routes::machine(&machine.name, Some("start"));
        client.call::<Machine>(&Method::POST, &path, NOTHING)?;
    }
    Ok(ExitCode::Success)
}

/// Where an appliance comes from.
enum Origin {
    /// Any byte of it can be had.
    File {
        /// The file.
        file: File,
        /// Its bytes.
        size: u64,
    },
    /// It has to be read as it comes.
    Pipe(Box<dyn Read + Send>),
}

impl Read for Origin {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::File { file, .. } => file.read(buffer),
            Self::Pipe(from) => from.read(buffer),
        }
    }
}

impl Origin {
    /// Goes on at a byte; so many were read.
    fn skip_to(&mut self, at: u64, read: u64) -> io::Result<()> {
        match self {
            Self::File { file, .. } => file.seek(SeekFrom::Start(at)).map(drop),
            // What is too short is noticed by whoever takes the rest.
            Self::Pipe(from) => {
                io::copy(&mut from.take(at.saturating_sub(read)), &mut io::sink()).map(drop)
            }
        }
    }

    fn size(&self) -> Option<u64> {
        match self {
            Self::File { size, .. } => Some(*size),
            Self::Pipe(_) => None,
        }
    }
}

/// Sends an appliance, or the rest of one whose import broke off.
fn send_appliance(
    client: &Client,
    args: &ImportArgs,
    mut from: Origin,
) -> Result<Machine, CliError> {
    let (size, mut begin) = (from.size(), Vec::new());
    let head = Head::read(Seen { from: &mut from, bytes: &mut begin });
    let Ok(head) = head else {
        // The daemon may know more of it, or says what is wrong.
        return Ok(send(client, args, "", io::Cursor::new(begin).chain(from))??);
    };
    let wanted = Wanted { head: head.sum(), without_state: args.without_state };
    // A daemon that cannot say gets all of it.
    let sent = match wanted.find(client).unwrap_or_default() {
        None => send(client, args, "", io::Cursor::new(begin).chain(from))?,
        Some(kept) => {
            let file = args.file.clone();
            let skipped = from.skip_to(kept.at, begin.len() as u64);
            skipped.map_err(|source| CliError::File { path: file, source })?;
            eprintln!(
                "berth: the import of {} broke off at {}, and goes on there",
                kept.name,
                Came { at: kept.at, size }
            );
            send(client, args, &format!("&unfinished={}&at={}", kept.id, kept.at), from)?
        }
    };
    sent.map_err(|error| match error {
        // The daemon says itself what it keeps.
        error @ ClientError::Api(_) => error.into(),
        error => wanted.broke_off(client, &args.file, size, error),
    })
}

/// Notes what is read.
struct Seen<'a, R> {
    from: &'a mut R,
    bytes: &'a mut Vec<u8>,
}

impl<R: Read> Read for Seen<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(buffer)?;
        self.bytes.extend_from_slice(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

fn send(
    client: &Client,
    args: &ImportArgs,
    rest: &str,
    from: impl Read + Send + 'static,
) -> Result<Result<Machine, ClientError>, CliError> {
    let name = args.name.as_ref().map(|name| format!("&name={}", routes::part(name)));
    let name = name.unwrap_or_default();
    let path = format!("{PREFIX}/import?without_state={}{name}{rest}", args.without_state);
    Ok(client.upload(&path, Upload::start(from)?))
}

/// What a thread reads, as a body.
struct Upload(mpsc::Receiver<io::Result<Bytes>>);

impl Upload {
    fn start(mut from: impl Read + Send + 'static) -> Result<Self, CliError> {
        let (to, body) = mpsc::channel(CHUNKS);
        let read = move || {
            let mut chunk = vec![0; CHUNK];
            loop {
                let read = match from.read(&mut chunk) {
                    Ok(0) => return,
                    Ok(count) => Ok(Bytes::copy_from_slice(chunk.get(..count).unwrap_or_default())),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => Err(error),
                };
                let is_over = read.is_err();
                if to.blocking_send(read).is_err() || is_over {
                    return;
                }
            }
        };
        let started = thread::Builder::new().name("upload".into()).spawn(read);
        started.map_err(CliError::Output)?;
        Ok(Self(body))
    }
}

impl Body for Upload {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<io::Result<Frame<Bytes>>>> {
        let polled = self.0.poll_recv(context);
        polled.map(|read| read.map(|bytes| bytes.map(Frame::data)))
    }
}
