//! Unpacking, without trust: every length is checked before anything is allocated, every chunk before it
//! is written, and only the end of the stream says that it was all.

use std::collections::VecDeque;
use std::io::{self, Read};

use blake3::Hash;
use zstd::bulk::Decompressor;

use crate::error::{ApplianceError, refused};
use crate::limits::{CHUNK_BYTES, WINDOW_CHUNKS};
use crate::manifest::{FileEntry, Manifest};
use crate::wire::{Chain, HASH_BYTES, HEAD_BYTES, Kind, MAGIC, VERSION};

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

/// A chunk that may be referred to.
#[derive(Clone, Copy, Debug)]
struct Known {
    hash: Hash,
    file: usize,
    at: u64,
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
    pub fn new(from: R) -> Result<Self, ApplianceError> {
        let packer = Decompressor::new().map_err(ApplianceError::Read)?;
        let mut stream = Stream { from, at: 0 };
        let mut magic = [0; MAGIC.len()];
        let read = stream.fill(&mut magic);
        match read {
            Err(ApplianceError::Truncated { .. }) => return Err(ApplianceError::Other),
            result => result?,
        }
        if magic != MAGIC {
            return Err(ApplianceError::Other);
        }
        let mut version = [0; 4];
        stream.fill(&mut version)?;
        match u32::from_le_bytes(version) {
            VERSION => {}
            found => return Err(ApplianceError::Version { found, known: VERSION }),
        }
        let (begin, mut chain, mut body) = (stream.at, Chain::new(), Vec::new());
        let (kind, head) = stream.record(&mut body)?;
        if kind != Kind::Manifest {
            let what = "the first record is no manifest";
            return Err(ApplianceError::Damaged { at: begin, what });
        }
        chain.add(&head, &body);
        let manifest: Manifest =
            serde_json::from_slice(&body).map_err(|error| refused(error.to_string()))?;
        manifest.check()?;
        Ok(Self {
            at: stream.at,
            from: stream.from,
            manifest,
            chain,
            chunks: 0,
            known: VecDeque::new(),
            file: 0,
            done: 0,
            body,
            chunk: Vec::new(),
            packer,
        })
    }

    /// What it says of itself.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Unpacks the next file. There is a place for each file of the manifest, the same ones each time.
    ///
    /// # Errors
    /// [`ApplianceError`]; what was written is of no use then.
    pub fn file(&mut self, places: &mut [&mut dyn Place]) -> Result<(), ApplianceError> {
        if places.len() != self.manifest.files.len() {
            return Err(refused("not every file has a place"));
        }
        let Some(entry) = self.manifest.files.get(self.file).cloned() else {
            return Err(refused("there is no other file"));
        };
        let (file, mut body) = (self.file, std::mem::take(&mut self.body));
        while self.file == file {
            let begin = self.at;
            let damaged = |what| Err(ApplianceError::Damaged { at: begin, what });
            let kind = self.record(&mut body)?.0;
            match kind {
                Kind::Manifest => return damaged("a second manifest"),
                Kind::End => return damaged("it ends before its files do"),
                kind => self.content(kind, &body, &entry, places, begin)?,
            }
        }
        self.body = body;
        Ok(())
    }

    /// Reads the end of the stream, after all files. Only when this has returned is anything known to be
    /// complete.
    ///
    /// # Errors
    /// [`ApplianceError`]; what was written is of no use then.
    pub fn finish(mut self) -> Result<(), ApplianceError> {
        let begin = self.at;
        let damaged = |what| Err(ApplianceError::Damaged { at: begin, what });
        if self.file != self.manifest.files.len() {
            return Err(refused("not all of its files were unpacked"));
        }
        let mut body = std::mem::take(&mut self.body);
        let (kind, before) = self.record(&mut body)?;
        if kind != Kind::End {
            return damaged("more than its files have");
        }
        let (chunks, sum) = split(&body);
        if chunks != self.chunks || sum != before.0.as_bytes() {
            return damaged("the checksum of all of it is another");
        }
        match (Stream { from: &mut self.from, at: self.at }).fill(&mut [0]) {
            Err(ApplianceError::Truncated { .. }) => Ok(()),
            Ok(()) => Err(ApplianceError::Trailing { at: self.at }),
            Err(error) => Err(error),
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
        let left = entry.size - self.done;
        let len = left.min(CHUNK_BYTES);
        let mut chunk = std::mem::take(&mut self.chunk);
        // A fixed size, whatever the stream says.
        chunk.resize(len as usize, 0);
        let count = match kind {
            Kind::Zero => {
                let (count, _) = split(body);
                if count == 0 || count > left || (count < left && count % CHUNK_BYTES != 0) {
                    return Err(damaged("zeroes that do not fit into the file"));
                }
                count
            }
            Kind::Same => {
                let (number, _) = split(body);
                let first = self.chunks - self.known.len() as u64;
                let index = number.checked_sub(first).and_then(|index| usize::try_from(index).ok());
                let known = index.and_then(|index| self.known.get(index)).copied();
                let known = known.ok_or_else(|| damaged("a chunk that is not there again"))?;
                let was = self.manifest.files.get(known.file).map_or(0, |file| file.size);
                if was - known.at < len {
                    return Err(damaged("a chunk that is too short again"));
                }
                let is_wanted = places.get(self.file).is_some_and(|place| place.is_wanted());
                if let Some(from) = places.get_mut(known.file).filter(|_| is_wanted) {
                    from.read_at(known.at, &mut chunk).map_err(|source| placing(entry, source))?;
                    if blake3::hash(&chunk) != known.hash {
                        return Err(damaged("a chunk that is of another length again"));
                    }
                }
                len
            }
            _ => {
                let (hash, bytes) = body.split_at_checked(HASH_BYTES).unwrap_or_default();
                if kind == Kind::Plain {
                    if bytes.len() != chunk.len() {
                        return Err(damaged("a chunk of another length"));
                    }
                    chunk.copy_from_slice(bytes);
                } else {
                    let unpacked = self.packer.decompress_to_buffer(bytes, chunk.as_mut_slice());
                    if unpacked.ok() != Some(len as usize) {
                        return Err(damaged("a chunk that cannot be decompressed"));
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

struct Stream<R> {
    from: R,
    at: u64,
}

impl<R: Read> Stream<R> {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), ApplianceError> {
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

    fn record(&mut self, body: &mut Vec<u8>) -> Result<(Kind, [u8; HEAD_BYTES]), ApplianceError> {
        let begin = self.at;
        let mut head = [0; HEAD_BYTES];
        self.fill(&mut head)?;
        let (kind, len) = Kind::parse(head, begin)?;
        body.resize(len, 0);
        self.fill(body)?;
        Ok((kind, head))
    }
}
