//! An appliance that becomes a folder, with checkpoints: when its stream breaks off, what came is kept
//! and another one goes on there.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use berth_api::size::Size;
use berth_api::v1::error::ApiError;
use berth_api::vmm::SUSPENDED;
use berth_appliance::checkpoint::KNOWN_BYTES;
use berth_appliance::error::ApplianceError;
use berth_appliance::head::Head;
use berth_appliance::manifest::{Manifest, Role};
use berth_appliance::read::Reader;
use jiff::Timestamp;
use uuid::Uuid;

use crate::failure::{Result, failed, of_appliance};
use crate::folder::unfinished::{self, Note};
use crate::folder::{self, Folder, FolderError, FolderLock, Unnamed};
use crate::machines::import::files::Files;

/// Bytes of the stream from one checkpoint to the next: so much comes again when the daemon is killed.
/// Each waits for the disk: 1 GiB that does not compress came from a local file in 4.0 to 4.6 s, and
/// without checkpoints in 3.2 to 3.3 s; most networks are slower than either.
pub(super) const CHECKPOINT_BYTES: u64 = 32 << 20;

/// What a checkpoint says besides where it is.
#[derive(Clone, Debug)]
pub(super) struct Wanted {
    pub(super) name: String,
    pub(super) without_state: bool,
}

impl Wanted {
    /// What was wanted of an import that broke off.
    pub(super) fn of(note: &Note) -> Self {
        Self { name: note.name.clone(), without_state: note.without_state }
    }

    /// Whether memory is taken too.
    pub(super) fn with_state(&self, manifest: &Manifest) -> bool {
        manifest.has_state() && !self.without_state
    }
}

/// Why a stream is not read on.
#[derive(Debug)]
pub(super) enum Stopped {
    /// By what came, or did not.
    Appliance(ApplianceError),
    /// By anything else.
    Other(ApiError),
}

impl From<ApplianceError> for Stopped {
    fn from(error: ApplianceError) -> Self {
        Self::Appliance(error)
    }
}

impl From<ApiError> for Stopped {
    fn from(error: ApiError) -> Self {
        Self::Other(error)
    }
}

/// An appliance that is being unpacked. Files are closed before the folder is given free.
pub(super) struct Unpacking<R: Read> {
    reader: Reader<R>,
    manifest: Manifest,
    files: Files,
    known: File,
    /// Chunks that are in it.
    noted: u64,
    wanted: Wanted,
    /// Bytes from one checkpoint to the next.
    every: u64,
    /// Where the last checkpoint is.
    saved: Option<u64>,
    is_resumed: bool,
    unnamed: Unnamed,
    lock: FolderLock,
}

impl<R: Read> Unpacking<R> {
    /// Begins with one whose manifest has come.
    pub(super) fn begin(
        machines: &Path,
        head: Head,
        from: R,
        wanted: Wanted,
        every: u64,
    ) -> Result<Self> {
        let unnamed = Unnamed::begin(machines)?;
        let folder = unnamed.folder();
        let lock = folder.lock()?;
        let directory = folder.file(unfinished::DIRECTORY);
        fs::create_dir(&directory).map_err(folder::failed("creating", &directory))?;
        let path = folder.file(unfinished::HEAD);
        let written = folder::own_file().write(true).create_new(true).open(&path);
        let written = written.and_then(|mut file| {
            file.write_all(head.bytes())?;
            file.sync_all()
        });
        written.map_err(folder::failed("writing", &path))?;
        let path = folder.file(unfinished::KNOWN);
        let known = folder::own_file().write(true).create_new(true).open(&path);
        let known = known.map_err(folder::failed("creating", &path))?;
        let manifest = head.manifest().clone();
        let files = Files::make(folder, &manifest, wanted.with_state(&manifest))?;
        let reader = Reader::after(head, from).map_err(|error| of_appliance(&error))?;
        let (noted, saved, is_resumed) = (0, None, false);
        Ok(Self {
            reader,
            manifest,
            files,
            known,
            noted,
            wanted,
            every,
            saved,
            is_resumed,
            unnamed,
            lock,
        })
    }

    /// Goes on with one that broke off, whose folder is locked. When that cannot be, it is removed.
    pub(super) fn resume(
        folder: Folder,
        lock: FolderLock,
        note: &Note,
        head: Head,
        from: R,
        every: u64,
    ) -> Result<Self> {
        let unnamed = Unnamed::adopt(folder);
        let folder = unnamed.folder();
        let manifest = head.manifest().clone();
        let (checkpoint, wanted) = (note.checkpoint, Wanted::of(note));
        let path = folder.file(unfinished::KNOWN);
        let known = folder::own_file().create(false).read(true).write(true).open(&path);
        let known = known.map_err(folder::failed("opening", &path))?;
        let bytes = KNOWN_BYTES as u64;
        let mut last = vec![0; (checkpoint.known() * bytes) as usize];
        let first = (checkpoint.chunks - checkpoint.known()).saturating_mul(bytes);
        let read = known.read_exact_at(&mut last, first);
        read.map_err(folder::failed("reading", &path))?;
        let reader = Reader::resume(head, from, &checkpoint, &last);
        let reader = reader.map_err(|error| of_appliance(&error))?;
        let with_state = wanted.with_state(&manifest);
        let files = Files::reopen(folder, &manifest, with_state, &checkpoint)?;
        Ok(Self {
            reader,
            manifest,
            files,
            known,
            noted: checkpoint.chunks,
            wanted,
            every,
            saved: Some(checkpoint.at),
            is_resumed: true,
            unnamed,
            lock,
        })
    }

    /// What the appliance says it is.
    pub(super) fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Whether memory is taken too.
    pub(super) fn with_state(&self) -> bool {
        self.wanted.with_state(&self.manifest)
    }

    /// Unpacks all that is still to come. `fits` says of the state of processors and devices whether it can
    /// go on here, as soon as it is there.
    pub(super) fn run(
        &mut self,
        fits: &dyn Fn(&Path) -> Result<()>,
    ) -> std::result::Result<(), Stopped> {
        let role = |index: u64| self.manifest.files.get(index as usize).map(|file| file.role);
        let (mut at, with_state) = (self.reader.checkpoint(), self.with_state());
        if with_state && at.file > 0 && role(0) == Some(Role::State) {
            // This program may be another one than at that time.
            fits(&self.unnamed.folder().file(SUSPENDED))?;
        }
        let mut next = at.at + self.every;
        while let Some(role) = self.manifest.files.get(at.file as usize).map(|file| file.role) {
            let is_complete = self.reader.part(&mut self.files.places(), next)?;
            if is_complete {
                self.files.finish(self.unnamed.folder(), at.file as usize)?;
                if role == Role::State && with_state {
                    fits(&self.unnamed.folder().file(SUSPENDED))?;
                }
            }
            at = self.reader.checkpoint();
            if at.at >= next {
                self.save()?;
                next = at.at + self.every;
            }
        }
        Ok(self.reader.finish()?)
    }

    /// Makes all that came last, and notes how far that is.
    fn save(&mut self) -> Result<()> {
        let checkpoint = self.reader.checkpoint();
        let folder = self.unnamed.folder();
        self.files.sync(folder, checkpoint.file as usize)?;
        let (first, known) = self.reader.known_from(self.noted);
        let known: Vec<u8> = known.flatten().collect();
        let written = self.known.write_all_at(&known, first * KNOWN_BYTES as u64);
        let written = written.and_then(|()| self.known.sync_all());
        written.map_err(folder::failed("writing", &folder.file(unfinished::KNOWN)))?;
        if self.with_state() {
            folder::sync(&folder.file(SUSPENDED))?;
        }
        folder::sync(&folder.file("state"))?;
        folder::sync(folder.path())?;
        let Wanted { name, without_state } = self.wanted.clone();
        Note::new(name, without_state, checkpoint).write(folder)?;
        self.noted = checkpoint.chunks;
        if self.saved.is_none() {
            self.unnamed.call(&unfinished::name(Uuid::new_v4()))?;
        }
        self.saved = Some(checkpoint.at);
        let parent = self.unnamed.folder().path().parent().unwrap_or(Path::new("/"));
        if let Err(error) = folder::sync(parent) {
            tracing::warn!(%error, "what is kept of an import may not survive a power failure");
        }
        Ok(())
    }

    /// What becomes of it when its stream was not read to the end: one that broke off is kept if it came far
    /// enough; one that went on and is wrong from there on stays where the last checkpoint is. Anything else
    /// is removed, also what does not fit: nobody knows then which part is wrong.
    pub(super) fn stop(mut self, stopped: Stopped) -> ApiError {
        let is_kept = match &stopped {
            Stopped::Appliance(ApplianceError::Read(_) | ApplianceError::Truncated { .. }) => {
                let is_worth_it = self.reader.checkpoint().at >= self.every;
                if is_worth_it && let Err(error) = self.save() {
                    tracing::warn!(error = error.message, "an import that broke off is not kept");
                }
                self.saved.is_some()
            }
            Stopped::Appliance(
                ApplianceError::Damaged { .. } | ApplianceError::Trailing { .. },
            ) => self.is_resumed,
            _ => false,
        };
        let mut error = match stopped {
            Stopped::Appliance(error) => of_appliance(&error),
            Stopped::Other(error) => error,
        };
        if let Some(at) = self.saved.filter(|_| is_kept) {
            let (name, at) = (&self.wanted.name, Size::from(at));
            tracing::warn!(
                machine = name,
                "the import broke off at {at}, and is kept: {}",
                error.message
            );
            error.message.push_str(&format!(
                "; the import of {name} is kept as far as it came, and `berth vm import FILE` goes on \
                 at {at}"
            ));
            let machines = self.unnamed.folder().path().parent().map(Path::to_owned);
            let Self { files, unnamed, lock, .. } = self;
            drop(files);
            unnamed.leave();
            drop(lock);
            let swept = machines.map(|machines| unfinished::sweep(&machines, Timestamp::now()));
            if let Some(Err(error)) = swept {
                tracing::warn!(%error, "old imports are not looked for");
            }
        }
        error
    }

    /// The folder, when all has come, and the machine's name. Nobody else has it as long as it is locked.
    pub(super) fn into_folder(self) -> (Unnamed, String, FolderLock) {
        (self.unnamed, self.wanted.name, self.lock)
    }
}

/// Finds out what an import that broke off was of.
pub(super) fn head_of(folder: &Folder) -> Result<Head> {
    let path = folder.file(unfinished::HEAD);
    let opened = folder::own_file().create(false).read(true).open(&path);
    let file = opened.map_err(folder::failed("opening", &path))?;
    let head = Head::read(file);
    Ok(head.map_err(|error| {
        let reason = failed(&error).message;
        FolderError::Config { path, reason }
    })?)
}
