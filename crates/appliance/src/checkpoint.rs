//! How far a stream was read, so that another reader goes on there: a few numbers, and the chunks that may
//! be there again. Whoever keeps them keeps what was unpacked, too.
//!
//! A chunk is kept as 44 bytes: BLAKE3 of it (32), the number of its file (u32) and its place in that
//! (u64), little endian.

use std::collections::VecDeque;

use blake3::Hash;
use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::error::ApplianceError;
use crate::limits::{CHUNK_BYTES, WINDOW_CHUNKS};
use crate::manifest::Manifest;
use crate::wire::HASH_BYTES;

/// Bytes in which a chunk is kept.
pub const KNOWN_BYTES: usize = HASH_BYTES + 12;

/// Between two records.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Checkpoint {
    /// Bytes of the stream before.
    pub at: u64,
    /// Chunks among them, but those that are there again.
    pub chunks: u64,
    /// The number of the file that comes; how many there are when all have come.
    pub file: u64,
    /// Bytes of it that are there.
    pub done: u64,
    /// The checksum of all records before.
    #[serde(serialize_with = "to_hex", deserialize_with = "from_hex")]
    pub chain: Hash,
}

fn to_hex<S: Serializer>(hash: &Hash, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&hash.to_hex())
}

fn from_hex<'de, D: Deserializer<'de>>(from: D) -> Result<Hash, D::Error> {
    Hash::from_hex(String::deserialize(from)?).map_err(D::Error::custom)
}

impl Checkpoint {
    /// How many of the chunks have to be known: these are the last ones.
    #[must_use]
    pub fn known(&self) -> u64 {
        self.chunks.min(WINDOW_CHUNKS as u64)
    }

    /// Whether a stream with this manifest can have come so far.
    pub(crate) fn check(&self, manifest: &Manifest) -> Result<usize, ApplianceError> {
        // A chunk takes more than a byte, and no stream is longer than a file can be.
        if self.at > i64::MAX as u64 || self.chunks > self.at {
            return Err(ApplianceError::Kept { what: "no stream is so long" });
        }
        let wrong = Err(ApplianceError::Kept { what: "it does not fit the manifest" });
        let Ok(file) = usize::try_from(self.file) else { return wrong };
        let fits = match manifest.files.get(file) {
            Some(entry) => self.done < entry.size && self.done.is_multiple_of(CHUNK_BYTES),
            None => file == manifest.files.len() && self.done == 0,
        };
        if fits { Ok(file) } else { wrong }
    }
}

/// A chunk that may be referred to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    pub hash: Hash,
    pub file: usize,
    pub at: u64,
}

impl Known {
    pub(crate) fn to_bytes(self) -> [u8; KNOWN_BYTES] {
        let mut bytes = [0; KNOWN_BYTES];
        let parts = [
            self.hash.as_bytes().as_slice(),
            &(self.file as u32).to_le_bytes(),
            &self.at.to_le_bytes(),
        ];
        bytes.iter_mut().zip(parts.concat()).for_each(|(to, from)| *to = from);
        bytes
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let (hash, rest) = bytes.split_first_chunk::<HASH_BYTES>()?;
        let (file, at) = rest.split_first_chunk::<4>()?;
        let at = u64::from_le_bytes(*at.first_chunk()?);
        Some(Self { hash: (*hash).into(), file: u32::from_le_bytes(*file) as usize, at })
    }

    /// Those that were kept at a checkpoint, if they can have come before it.
    pub(crate) fn read_all(
        bytes: &[u8],
        manifest: &Manifest,
        checkpoint: &Checkpoint,
    ) -> Result<VecDeque<Self>, ApplianceError> {
        let wrong = |what| Err(ApplianceError::Kept { what });
        if bytes.len() as u64 != checkpoint.known() * KNOWN_BYTES as u64 {
            return wrong("its chunks are not as many as it says");
        }
        let mut all = VecDeque::with_capacity(bytes.len() / KNOWN_BYTES);
        let mut before = None;
        for bytes in bytes.chunks_exact(KNOWN_BYTES) {
            let Some(known) = Self::parse(bytes) else { return wrong("a chunk of it") };
            let size = manifest.files.get(known.file).map_or(0, |file| file.size);
            let place = (known.file as u64, known.at);
            let is_possible = known.at < size
                && known.at.is_multiple_of(CHUNK_BYTES)
                && before < Some(place)
                && place < (checkpoint.file, checkpoint.done);
            if !is_possible {
                return wrong("a chunk of it is where none can be");
            }
            before = Some(place);
            all.push_back(known);
        }
        Ok(all)
    }
}
