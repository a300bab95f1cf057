//! The first cluster of an image: its header, extensions, and the name of its backing file.
//!
//! ```text
//! 0 magic u32   4 version u32        8 backing name offset u64   16 its length u32
//! 20 cluster bits u32                24 size u64                 32 encryption u32
//! 36 L1 entries u32                  40 L1 offset u64            48 count table offset u64
//! 56 its clusters u32                60 snapshots u32            64 snapshot table offset u64
//! version 3:
//! 72 incompatible features u64       80 compatible features u64  88 autoclear features u64
//! 96 log2 of the bits of a count u32 100 header length u32       104 compression u8
//! then extensions (type u32, length u32, data, to a multiple of 8), then the backing file's name
//! ```
//!
//! Numbers are big-endian.

use std::io;

use crate::limits::{
    BACKING_NAME_BYTES_MAX, CLUSTER_BITS, L1_BYTES_MAX, REFTABLE_BYTES_MAX, SNAPSHOTS_MAX,
};
use crate::storage::Storage;

/// The first four bytes.
pub const MAGIC: u32 = 0x5146_49fb;
/// Bytes of the header of version 2.
pub(super) const V2_BYTES: usize = 72;
/// Bytes of the header that is written.
pub(super) const V3_BYTES: usize = 104;
/// The extension that names the backing file's format.
pub(super) const EXTENSION_BACKING_FORMAT: u32 = 0xe279_2aca;
/// Where the size is; behind it are the encryption, the L1 table's entries and offset.
pub(super) const SIZE_AT: u64 = 24;
/// Where the place of the table of counts is, followed by its clusters.
pub(super) const REFTABLE_AT: u64 = 48;
/// Where the autoclear features are.
pub(super) const AUTOCLEAR_AT: u64 = 88;

const INCOMPATIBLE_DIRTY: u64 = 1;
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
/// The rest of the incompatible features that have a name.
const UNSUPPORTED: [(u64, &str); 3] = [
    (1 << 2, "an external data file"),
    (1 << 3, "compression other than deflate"),
    (1 << 4, "extended L2 entries (subclusters)"),
];

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// It cannot be read.
    #[error("reading it failed")]
    Read(#[source] io::Error),
    /// It cannot be written.
    #[error("writing it failed")]
    Write(#[source] io::Error),
    /// It is something else.
    #[error("it does not begin as one")]
    NotQcow2,
    /// A version nobody knows.
    #[error("its version is {0}; 2 and 3 are known")]
    Version(u32),
    /// It uses what is not supported.
    #[error("it uses {0}, which is not supported; try `qemu-img convert`")]
    Unsupported(String),
    /// Its last user did not close it, and its counts are not to be relied upon.
    #[error("it was not closed by its last user; try `qemu-img check -r all`")]
    Dirty,
    /// Somebody found it to be damaged.
    #[error("it is marked as corrupt; try `qemu-img check -r all`")]
    Corrupt,
    /// A field has an impossible value.
    #[error("it is damaged: {0}")]
    Damaged(&'static str),
}

/// The backing file as the header names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// The name; relative to the image's directory.
    pub name: String,
    /// Its format, if the header says it.
    pub format: Option<String>,
}

/// What a header says, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// log2 of the size of a cluster.
    pub cluster_bits: u32,
    /// Bytes of the disk as the guest sees it.
    pub size: u64,
    /// Entries of the L1 table.
    pub l1_entries: u32,
    /// Where the L1 table is.
    pub l1_offset: u64,
    /// Where the table of blocks of counts is.
    pub reftable_offset: u64,
    /// Its length.
    pub reftable_clusters: u32,
    /// log2 of the bits of a count.
    pub refcount_order: u32,
    /// Internal snapshots.
    pub snapshots: u32,
    /// Where their table is.
    pub snapshots_offset: u64,
    /// Features that whoever writes has to clear.
    pub autoclear: u64,
    /// The last user did not close it.
    pub dirty: bool,
    /// Somebody found damage.
    pub corrupt: bool,
    /// What is below it.
    pub backing: Option<BackingName>,
}

/// Big-endian numbers at places of a buffer; zero beyond its end.
pub(super) fn be32(bytes: &[u8], at: usize) -> u32 {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk::<4>());
    found.map_or(0, |raw| u32::from_be_bytes(*raw))
}

pub(super) fn be64(bytes: &[u8], at: usize) -> u64 {
    let found = bytes.get(at..).and_then(|rest| rest.first_chunk::<8>());
    found.map_or(0, |raw| u64::from_be_bytes(*raw))
}

impl Header {
    /// Reads and checks the header of an image.
    ///
    /// # Errors
    /// It is none, it is damaged, or it needs what is not supported.
    pub fn read(storage: &dyn Storage) -> Result<Self, HeaderError> {
        let mut start = [0; V3_BYTES + 8];
        let count = storage.read_at(&mut start, 0).map_err(HeaderError::Read)?;
        if count < V2_BYTES || be32(&start, 0) != MAGIC {
            return Err(HeaderError::NotQcow2);
        }
        let version = be32(&start, 4);
        if !matches!(version, 2 | 3) {
            return Err(HeaderError::Version(version));
        }
        let cluster_bits = be32(&start, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(HeaderError::Damaged("the size of its clusters"));
        }
        let mut cluster = vec![0; 1 << cluster_bits];
        let count = storage.read_at(&mut cluster, 0).map_err(HeaderError::Read)?;
        cluster.truncate(count);
        let mut header = Self {
            version,
            cluster_bits,
            size: be64(&start, 24),
            l1_entries: be32(&start, 36),
            l1_offset: be64(&start, 40),
            reftable_offset: be64(&start, 48),
            reftable_clusters: be32(&start, 56),
            refcount_order: if version == 2 { 4 } else { be32(&start, 96) },
            snapshots: be32(&start, 60),
            snapshots_offset: be64(&start, 64),
            autoclear: if version == 2 { 0 } else { be64(&start, 88) },
            dirty: false,
            corrupt: false,
            backing: None,
        };
        if be32(&start, 32) != 0 {
            return Err(HeaderError::Unsupported("encryption".into()));
        }
        if version == 3 {
            header.take_features(be64(&start, 72))?;
        }
        header.check_places()?;
        let header_bytes = if version == 2 { V2_BYTES } else { be32(&start, 100) as usize };
        if header_bytes < V2_BYTES || (version == 3 && header_bytes < V3_BYTES) {
            return Err(HeaderError::Damaged("the length of its header"));
        }
        header.backing = backing(&cluster, header_bytes, be64(&start, 8), be32(&start, 16))?;
        Ok(header)
    }

    fn take_features(&mut self, incompatible: u64) -> Result<(), HeaderError> {
        self.dirty = incompatible & INCOMPATIBLE_DIRTY != 0;
        self.corrupt = incompatible & INCOMPATIBLE_CORRUPT != 0;
        for (bit, name) in UNSUPPORTED {
            if incompatible & bit != 0 {
                return Err(HeaderError::Unsupported(name.into()));
            }
        }
        let named = INCOMPATIBLE_DIRTY | INCOMPATIBLE_CORRUPT;
        match incompatible & !named {
            0 => Ok(()),
            other => Err(HeaderError::Unsupported(format!("features {other:#x}"))),
        }
    }

    fn check_places(&self) -> Result<(), HeaderError> {
        let damaged = |what| Err(HeaderError::Damaged(what));
        if self.refcount_order > 6 {
            return damaged("the width of its counts");
        }
        let l1_bytes = u64::from(self.l1_entries) * 8;
        if l1_bytes > L1_BYTES_MAX || self.l1_needed(self.size) > u64::from(self.l1_entries) {
            return damaged("the size of its L1 table");
        }
        if self.l1_entries > 0 && !self.is_place(self.l1_offset, l1_bytes) {
            return damaged("the place of its L1 table");
        }
        let reftable_bytes = u64::from(self.reftable_clusters) << self.cluster_bits;
        if reftable_bytes > REFTABLE_BYTES_MAX.max(self.cluster_bytes()) {
            return damaged("the size of its table of counts");
        }
        if !self.is_place(self.reftable_offset, reftable_bytes) || self.reftable_clusters == 0 {
            return damaged("the place of its table of counts");
        }
        if self.snapshots > SNAPSHOTS_MAX {
            return damaged("the number of its snapshots");
        }
        Ok(())
    }

    /// Bytes of a cluster.
    #[must_use]
    pub fn cluster_bytes(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Entries of an L2 table.
    #[must_use]
    pub fn l2_entries(&self) -> u64 {
        self.cluster_bytes() / 8
    }

    /// L1 entries that a disk of this size needs.
    #[must_use]
    pub fn l1_needed(&self, size: u64) -> u64 {
        size.div_ceil(self.cluster_bytes()).div_ceil(self.l2_entries())
    }

    /// Whether a table can be there: aligned, not in the header, not beyond all files.
    #[must_use]
    pub fn is_place(&self, offset: u64, bytes: u64) -> bool {
        offset.is_multiple_of(self.cluster_bytes())
            && offset >= self.cluster_bytes()
            && offset.checked_add(bytes).is_some_and(|end| end <= 1 << 56)
    }
}

/// The backing file's name and format, if there is one.
fn backing(
    cluster: &[u8],
    header_bytes: usize,
    offset: u64,
    len: u32,
) -> Result<Option<BackingName>, HeaderError> {
    let format = backing_format(cluster, header_bytes, offset)?;
    if offset == 0 || len == 0 {
        return Ok(None);
    }
    if len > BACKING_NAME_BYTES_MAX {
        return Err(HeaderError::Damaged("the length of its backing file's name"));
    }
    let name = usize::try_from(offset).ok().and_then(|at| cluster.get(at..)?.get(..len as usize));
    let name = name.ok_or(HeaderError::Damaged("the place of its backing file's name"))?;
    let name = str::from_utf8(name).ok().filter(|name| !name.contains('\0'));
    let name = name.ok_or(HeaderError::Damaged("its backing file's name"))?;
    Ok(Some(BackingName { name: name.to_owned(), format }))
}

/// Looks through the extensions, which end with one of type 0, at the backing file's name, or with
/// the cluster.
fn backing_format(
    cluster: &[u8],
    header_bytes: usize,
    name_offset: u64,
) -> Result<Option<String>, HeaderError> {
    let damaged = || HeaderError::Damaged("its header extensions");
    let end = usize::try_from(name_offset).unwrap_or(usize::MAX);
    let end = if end == 0 { cluster.len() } else { end.min(cluster.len()) };
    let mut at = header_bytes;
    let mut format = None;
    while at.checked_add(8).ok_or_else(damaged)? <= end {
        let (kind, len) = (be32(cluster, at), be32(cluster, at + 4) as usize);
        if kind == 0 {
            break;
        }
        let data = cluster.get(at + 8..end).and_then(|rest| rest.get(..len)).ok_or_else(damaged)?;
        if kind == EXTENSION_BACKING_FORMAT {
            format = Some(String::from_utf8(data.to_vec()).map_err(|_| damaged())?);
        }
        at += 8 + len.next_multiple_of(8);
    }
    Ok(format)
}
