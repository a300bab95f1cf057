//! Unpacking, without trust: every length is checked before anything is allocated, every chunk before it
//! is written, and only the end of the stream says that it was all.

use std::cmp::Ordering;
use std::collections::VecDeque;
use std::io::{self, Read};

use zstd::bulk::Decompressor;

use crate::checkpoint::{Checkpoint, KNOWN_BYTES, Known};
use crate::error::{ApplianceError, refused};
use crate::head::Head;
use crate::limits::{CHUNK_BYTES, WINDOW_CHUNKS};
use crate::manifest::{FileEntry, Manifest};
use crate::wire::{Chain, HASH_BYTES, HEAD_BYTES, Kind};

/// Where a file goes. What is not written reads as zeroes.
pub trait Place {
    /// Writes all of it.
    ///
    /// # Errors
    /// The system's.
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()>;

    /// Reads back what was written.
    ///
    /// # Errors
    /// The system's.
    fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Whether the file is kept at all. Only what no later file can refer to may be left out: the memory.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// A stream whose manifest has been read.
pub struct Reader<R: Read> {
    from: R,
    manifest: Manifest,
    /// Bytes that were read.
    at: u64,
    chain: Chain,
    /// Chunks so far, of which these are the last.
    chunks: u64,
    known: VecDeque<Known>,
    /// The file that comes, and what of it is there.
    file: usize,
    done: u64,
    body: Vec<u8>,
    chunk: Vec<u8>,
    packer: Decompressor<'static>,
}

impl<R: Read> Reader<R> {
    /// Reads the beginning of a stream.
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub fn new(mut from: R) -> Result<Self, ApplianceError> {
        let head = Head::read(&mut from)?;
        Self::after(head, from)
    }

    /// Goes on behind the beginning of a stream.
    ///
    /// # Errors
    /// [`ApplianceError::Read`].
    pub fn after(head: Head, from: R) -> Result<Self, ApplianceError> {
        let (at, chain) = (head.bytes().len() as u64, head.chain);
        Ok(Self {
            from,
            manifest: head.into_manifest(),
            at,
            chain,
            chunks: 0,
            known: VecDeque::new(),
            file: 0,
            done: 0,
            body: Vec::new(),
            chunk: Vec::new(),
            packer: Decompressor::new().map_err(ApplianceError::Read)?,
        })
    }

    /// Goes on at a checkpoint of another reader, with the last [`Checkpoint::known`] chunks that it told
    /// then. Nothing that it wrote later may be in the places.
    ///
    /// # Errors
    /// [`ApplianceError::Kept`], [`ApplianceError::Read`].
    pub fn resume(
        head: Head,
        from: R,
        checkpoint: &Checkpoint,
        known: &[u8],
    ) -> Result<Self, ApplianceError> {
        if checkpoint.at < head.bytes().len() as u64 {
            return Err(ApplianceError::Kept { what: "it is before the end of the manifest" });
        }
        let file = checkpoint.check(head.manifest())?;
        let known = Known::read_all(known, head.manifest(), checkpoint)?;
        Ok(Self {
            at: checkpoint.at,
            chain: Chain(checkpoint.chain),
            chunks: checkpoint.chunks,
            known,
            file,
            done: checkpoint.done,
            ..Self::after(head, from)?
        })
    }

    /// Where it is: between two records, at the beginning, after each part and when a stream broke off
    /// ([`ApplianceError::Read`], [`ApplianceError::Truncated`]). After other errors it is of no use.
    #[must_use]
    pub fn checkpoint(&self) -> Checkpoint {
        let (at, chunks, chain) = (self.at, self.chunks, self.chain.0);
        Checkpoint { at, chunks, file: self.file as u64, done: self.done, chain }
    }

    /// The chunks from this number on, as far as they may be there again, each as it is to be kept; and the
    /// number of the first of them.
    pub fn known_from(&self, number: u64) -> (u64, impl Iterator<Item = [u8; KNOWN_BYTES]>) {
        let oldest = self.chunks - self.known.len() as u64;
        let first = number.clamp(oldest, self.chunks);
        let known = self.known.iter().skip((first - oldest) as usize);
        (first, known.map(|known| known.to_bytes()))
    }

    /// What it says of itself.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Unpacks the next file, or the rest of it. There is a place for each file of the manifest, the same
    /// ones each time.
    ///
    /// # Errors
    /// [`ApplianceError`]; what was written is of no use then, unless the stream broke off and goes on
    /// at the [`Reader::checkpoint`].
    pub fn file(&mut self, places: &mut [&mut dyn Place]) -> Result<(), ApplianceError> {
        self.part(places, u64::MAX).map(drop)
    }

    /// The same until so many bytes of the stream were read; says whether the file is complete.
    ///
    /// # Errors
    /// As [`Reader::file`].
    pub fn part(
        &mut self,
        places: &mut [&mut dyn Place],
        until: u64,
    ) -> Result<bool, ApplianceError> {
        if places.len() != self.manifest.files.len() {
            return Err(refused("not every file has a place"));
        }
        let Some(entry) = self.manifest.files.get(self.file).cloned() else {
            return Err(refused("there is no other file"));
        };
        let (file, mut body) = (self.file, std::mem::take(&mut self.body));
        while self.file == file && self.at < until {
            let begin = self.at;
            let unfit = |what| Err(ApplianceError::Unfit { at: begin, what });
            let kind = self.record(&mut body)?.0;
            match kind {
                Kind::Manifest => return unfit("a second manifest"),
                Kind::End => return unfit("it ends before its files do"),
                kind => self.content(kind, &body, &entry, places, begin)?,
            }
        }
        self.body = body;
        Ok(self.file != file)
    }

    /// Reads the end of the stream, after all files. Only when this has returned is anything known to be
    /// complete.
    ///
    /// # Errors
    /// [`ApplianceError`]; what was written is of no use then.
    pub fn finish(&mut self) -> Result<(), ApplianceError> {
        let (begin, chain) = (self.at, self.chain);
        let unfit = |what| Err(ApplianceError::Unfit { at: begin, what });
        if self.file != self.manifest.files.len() {
            return Err(refused("not all of its files were unpacked"));
        }
        let mut body = std::mem::take(&mut self.body);
        let (kind, before) = self.record(&mut body)?;
        if kind != Kind::End {
            return unfit("more than its files have");
        }
        let (chunks, sum) = split(&body);
        if chunks != self.chunks || sum != before.0.as_bytes() {
            return unfit("the checksum of all of it is another");
        }
        match (Stream { from: &mut self.from, at: self.at }).fill(&mut [0]) {
            Err(ApplianceError::Truncated { .. }) => Ok(()),
            Ok(()) => Err(ApplianceError::Trailing { at: self.at }),
            Err(error) => {
                // Who goes on later needs the end once more.
                (self.at, self.chain) = (begin, chain);
                Err(error)
            }
        }
    }

    /// The next record, with the checksum of those before it.
    fn record(&mut self, body: &mut Vec<u8>) -> Result<(Kind, Chain), ApplianceError> {
        let mut stream = Stream { from: &mut self.from, at: self.at };
        let (kind, head) = stream.record(body)?;
        self.at = stream.at;
        let before = self.chain;
        self.chain.add(&head, body);
        Ok((kind, before))
    }

    /// A part of a file.
    fn content(
        &mut self,
        kind: Kind,
        body: &[u8],
        entry: &FileEntry,
        places: &mut [&mut dyn Place],
        begin: u64,
    ) -> Result<(), ApplianceError> {
        let damaged = |what| ApplianceError::Damaged { at: begin, what };
        let unfit = |what| ApplianceError::Unfit { at: begin, what };
        let left = entry.size - self.done;
        let len = left.min(CHUNK_BYTES);
        let mut chunk = std::mem::take(&mut self.chunk);
        // A fixed size, whatever the stream says.
        chunk.resize(len as usize, 0);
        let count = match kind {
            Kind::Zero => {
                let (count, _) = split(body);
                if count == 0 || count > left || (count < left && count % CHUNK_BYTES != 0) {
                    return Err(unfit("zeroes that do not fit into the file"));
                }
                count
            }
            Kind::Same => {
                let (number, _) = split(body);
                let first = self.chunks - self.known.len() as u64;
                let index = number.checked_sub(first).and_then(|index| usize::try_from(index).ok());
                let known = index.and_then(|index| self.known.get(index)).copied();
                let known = known.ok_or_else(|| unfit("a chunk that is not there again"))?;
                let was = self.manifest.files.get(known.file).map_or(0, |file| file.size);
                match (was - known.at).min(CHUNK_BYTES).cmp(&len) {
                    Ordering::Less => return Err(unfit("a chunk that is too short again")),
                    Ordering::Greater => {
                        return Err(unfit("a chunk that is of another length again"));
                    }
                    Ordering::Equal => {}
                }
                let is_wanted = places.get(self.file).is_some_and(|place| place.is_wanted());
                if let Some(from) = places.get_mut(known.file).filter(|_| is_wanted) {
                    from.read_at(known.at, &mut chunk).map_err(|source| placing(entry, source))?;
                    if blake3::hash(&chunk) != known.hash {
                        let what = "a chunk that was written is not read back";
                        return Err(placing(entry, io::Error::other(what)));
                    }
                }
                len
            }
            _ => {
                let (hash, bytes) = body.split_at_checked(HASH_BYTES).unwrap_or_default();
                if kind == Kind::Plain {
                    if bytes.len() != chunk.len() {
                        return Err(unfit("a chunk of another length"));
                    }
                    chunk.copy_from_slice(bytes);
                } else {
                    let unpacked = self.packer.decompress_to_buffer(bytes, chunk.as_mut_slice());
                    let what = "a chunk that cannot be decompressed";
                    match unpacked {
                        Ok(count) if count == chunk.len() => {}
                        Err(_) if len == CHUNK_BYTES => return Err(damaged(what)),
                        // It would be another one's, perhaps.
                        _ => return Err(unfit(what)),
                    }
                }
                let found = blake3::hash(&chunk);
                if found.as_bytes().as_slice() != hash {
                    return Err(damaged("the checksum of a chunk is another"));
                }
                if self.known.len() == WINDOW_CHUNKS {
                    self.known.pop_front();
                }
                self.known.push_back(Known { hash: found, file: self.file, at: self.done });
                self.chunks += 1;
                len
            }
        };
        if kind != Kind::Zero
            && let Some(place) = places.get_mut(self.file).filter(|place| place.is_wanted())
        {
            place.write_at(self.done, &chunk).map_err(|source| placing(entry, source))?;
        }
        self.chunk = chunk;
        self.done += count;
        if self.done == entry.size {
            (self.file, self.done) = (self.file + 1, 0);
        }
        Ok(())
    }
}

fn placing(entry: &FileEntry, source: io::Error) -> ApplianceError {
    ApplianceError::Place { file: entry.role.to_string(), source }
}

/// A number and what follows it, of a record whose length was checked.
fn split(body: &[u8]) -> (u64, &[u8]) {
    match body.split_first_chunk() {
        Some((number, rest)) => (u64::from_le_bytes(*number), rest),
        None => (0, &[]),
    }
}

/// Bytes in records.
pub(crate) struct Stream<R> {
    pub(crate) from: R,
    pub(crate) at: u64,
}

impl<R: Read> Stream<R> {
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) -> Result<(), ApplianceError> {
        let mut rest = buffer;
        while !rest.is_empty() {
            match self.from.read(rest) {
                Ok(0) => return Err(ApplianceError::Truncated { at: self.at }),
                Ok(count) => {
                    self.at += count as u64;
                    rest = rest.get_mut(count..).unwrap_or_default();
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(ApplianceError::Read(error)),
            }
        }
        Ok(())
    }

    pub(crate) fn record(
        &mut self,
        body: &mut Vec<u8>,
    ) -> Result<(Kind, [u8; HEAD_BYTES]), ApplianceError> {
        let begin = self.at;
        let mut head = [0; HEAD_BYTES];
        self.fill(&mut head)?;
        let (kind, len) = Kind::parse(head, begin)?;
        body.resize(len, 0);
        self.fill(body)?;
        Ok((kind, head))
    }
}
