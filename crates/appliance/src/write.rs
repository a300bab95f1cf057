//! Packing: the files of a machine into a stream.
//!
//! A chunk that is zero is not stored, and one that was there is referred to. The others are compressed,
//! unless that makes them larger.

use std::collections::{HashMap, VecDeque};
use std::io::{self, Write};

use blake3::Hash;
use zstd::bulk::Compressor;

use crate::error::{ApplianceError, refused};
use crate::limits::{CHUNK_BYTES, MANIFEST_BYTES_MAX, WINDOW_CHUNKS};
use crate::manifest::Manifest;
use crate::wire::{Chain, Kind, VERSION, opening};

/// How hard it is tried to make chunks small: more takes much longer for a few percent.
const LEVEL: i32 = 3;

/// A file that is packed.
pub trait Source {
    /// Whether bytes from there on are known to be zero, and for how many of `len` this holds: 1 at
    /// least.
    ///
    /// # Errors
    /// The system's.
    fn extent(&self, at: u64, len: u64) -> io::Result<(bool, u64)>;

    /// Reads all that is asked for.
    ///
    /// # Errors
    /// The system's, or the file is shorter than it was said to be.
    fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<()>;
}

/// A stream that is being written.
pub struct Writer<W: Write> {
    to: W,
    manifest: Manifest,
    /// How many of its files are written.
    written: usize,
    chain: Chain,
    /// Chunks that were written, and the number of each of the last.
    chunks: u64,
    known: HashMap<Hash, u64>,
    order: VecDeque<Hash>,
    packer: Compressor<'static>,
    packed: Vec<u8>,
}

impl<W: Write> Writer<W> {
    /// Begins a stream.
    ///
    /// # Errors
    /// [`ApplianceError::Manifest`], [`ApplianceError::Write`].
    pub fn new(mut to: W, manifest: Manifest) -> Result<Self, ApplianceError> {
        manifest.check()?;
        let text = serde_json::to_vec(&manifest).map_err(|error| refused(error.to_string()))?;
        if text.len() > MANIFEST_BYTES_MAX as usize {
            return Err(refused("its configuration is too long"));
        }
        to.write_all(&opening(VERSION)).map_err(ApplianceError::Write)?;
        let mut writer = Self {
            to,
            manifest,
            written: 0,
            chain: Chain::new(),
            chunks: 0,
            known: HashMap::new(),
            order: VecDeque::new(),
            packer: Compressor::new(LEVEL).map_err(ApplianceError::Write)?,
            packed: Vec::new(),
        };
        writer.record(Kind::Manifest, &[&text])?;
        Ok(writer)
    }

    fn record(&mut self, kind: Kind, parts: &[&[u8]]) -> Result<(), ApplianceError> {
        let body = parts.concat();
        let head = kind.head(body.len());
        self.chain.add(&head, &body);
        let written = self.to.write_all(&head).and_then(|()| self.to.write_all(&body));
        written.map_err(ApplianceError::Write)
    }

    /// Packs the next file of the manifest.
    ///
    /// # Errors
    /// There is none, or [`ApplianceError::Source`], [`ApplianceError::Write`].
    pub fn file(&mut self, source: &dyn Source) -> Result<(), ApplianceError> {
        let entry = self.manifest.files.get(self.written);
        let entry = entry.ok_or_else(|| refused("it has a file more than it says"))?;
        let (size, file) = (entry.size, entry.role.to_string());
        let failed = |source| ApplianceError::Source { file: file.clone(), source };
        let mut buffer = vec![0; CHUNK_BYTES as usize];
        let (mut at, mut zero) = (0, 0);
        while at < size {
            let left = size - at;
            let (is_zero, run) = source.extent(at, left).map_err(failed)?;
            // In whole chunks, or to the end.
            let whole = if run >= left { left } else { run / CHUNK_BYTES * CHUNK_BYTES };
            if is_zero && whole > 0 {
                (at, zero) = (at + whole, zero + whole);
                continue;
            }
            let count = left.min(CHUNK_BYTES);
            let chunk = buffer.get_mut(..count as usize).unwrap_or_default();
            source.read_at(at, chunk).map_err(failed)?;
            at += count;
            if chunk.iter().all(|byte| *byte == 0) {
                zero += count;
                continue;
            }
            self.zeroes(&mut zero)?;
            self.chunk(chunk)?;
        }
        self.zeroes(&mut zero)?;
        self.written += 1;
        Ok(())
    }

    fn zeroes(&mut self, count: &mut u64) -> Result<(), ApplianceError> {
        match std::mem::take(count) {
            0 => Ok(()),
            count => self.record(Kind::Zero, &[&count.to_le_bytes()]),
        }
    }

    fn chunk(&mut self, chunk: &[u8]) -> Result<(), ApplianceError> {
        let hash = blake3::hash(chunk);
        if let Some(number) = self.known.get(&hash) {
            let number = number.to_le_bytes();
            return self.record(Kind::Same, &[&number]);
        }
        self.known.insert(hash, self.chunks);
        self.order.push_back(hash);
        self.chunks += 1;
        if self.order.len() > WINDOW_CHUNKS
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        let mut packed = std::mem::take(&mut self.packed);
        packed.resize(chunk.len(), 0);
        // It does not fit where it would not be smaller.
        let made = self.packer.compress_to_buffer(chunk, packed.as_mut_slice());
        let written = match made.ok().and_then(|len| packed.get(..len)) {
            Some(small) if small.len() < chunk.len() => {
                self.record(Kind::Packed, &[hash.as_bytes(), small])
            }
            _ => self.record(Kind::Plain, &[hash.as_bytes(), chunk]),
        };
        self.packed = packed;
        written
    }

    /// Ends the stream, which has all files.
    ///
    /// # Errors
    /// A file is missing, or [`ApplianceError::Write`].
    pub fn finish(mut self) -> Result<W, ApplianceError> {
        if self.written != self.manifest.files.len() {
            return Err(refused("it has fewer files than it says"));
        }
        let (chunks, chain) = (self.chunks.to_le_bytes(), self.chain.0);
        self.record(Kind::End, &[&chunks, chain.as_bytes()])?;
        self.to.flush().map_err(ApplianceError::Write)?;
        Ok(self.to)
    }
}
