//! New images.
//!
//! ```text
//! cluster 0 header   1 table of counts   2 first block of counts   then the L1 table
//! ```

use std::io;
use std::sync::Arc;

use crate::format::Format;
use crate::limits::BACKING_NAME_BYTES_MAX;
use crate::qcow2::header::{EXTENSION_BACKING_FORMAT, HeaderError, MAGIC, V3_BYTES};
use crate::qcow2::image::Image;
use crate::storage::{Storage, Unsynced};

/// What a new image is to be.
#[derive(Clone, Debug)]
pub struct NewImage {
    /// Bytes of the disk.
    pub size: u64,
    /// log2 of the size of a cluster.
    pub cluster_bits: u32,
    /// log2 of the bits of a count.
    pub refcount_order: u32,
    /// The name and format of the backing file.
    pub backing: Option<(String, Format)>,
}

impl NewImage {
    /// With clusters of 64 KiB, as QEMU makes them.
    #[must_use]
    pub fn new(size: u64) -> Self {
        Self { size, cluster_bits: 16, refcount_order: 4, backing: None }
    }

    /// Writes the image into an empty file, and waits for the disk once: nobody has the file before.
    ///
    /// # Errors
    /// The size is impossible, or the file cannot be written.
    pub fn write(&self, storage: Box<dyn Storage>) -> Result<(), HeaderError> {
        let storage: Arc<dyn Storage> = storage.into();
        self.write_unsynced(Arc::clone(&storage))?;
        storage.sync().map_err(HeaderError::Write)
    }

    /// Writes the image into an empty file, and leaves it to the caller to wait for the disk.
    ///
    /// # Errors
    /// As [`NewImage::write`].
    pub fn write_unsynced(&self, storage: Arc<dyn Storage>) -> Result<(), HeaderError> {
        let storage = Box::new(Unsynced(storage));
        self.write_start(&*storage).map_err(HeaderError::Write)?;
        // It has no L1 table yet: growing makes one.
        let mut image = Image::open(storage, true, None)?;
        image.resize(self.size).map_err(HeaderError::Write)
    }

    fn write_start(&self, storage: &dyn Storage) -> io::Result<()> {
        let cluster = 1u64 << self.cluster_bits;
        let mut block = vec![0u8; cluster as usize];
        let mut count = |index: usize| {
            let bits = 1usize << self.refcount_order;
            // The lowest bit of the count: the last byte of a wide one.
            let bit = index * bits;
            let byte = if bits < 8 { bit / 8 } else { (bit + bits) / 8 - 1 };
            if let Some(slot) = block.get_mut(byte) {
                *slot |= 1 << if bits < 8 { bit % 8 } else { 0 };
            }
        };
        (0..3).for_each(&mut count);
        storage.write_at(&block, 2 * cluster)?;
        let mut table = vec![0u8; cluster as usize];
        for (byte, new) in table.iter_mut().zip((2 * cluster).to_be_bytes()) {
            *byte = new;
        }
        storage.write_at(&table, cluster)?;
        storage.write_at(&self.header(cluster)?, 0)
    }

    fn header(&self, cluster: u64) -> io::Result<Vec<u8>> {
        let mut extensions = Vec::new();
        if let Some((name, format)) = &self.backing {
            if name.is_empty() || name.len() > BACKING_NAME_BYTES_MAX as usize {
                let text = "the backing file's name is too long for a header";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            let format = format.as_str().as_bytes();
            extensions.extend(EXTENSION_BACKING_FORMAT.to_be_bytes());
            extensions.extend((format.len() as u32).to_be_bytes());
            extensions.extend(format);
            extensions.resize(extensions.len().next_multiple_of(8), 0);
        }
        // The end of the extensions.
        extensions.extend([0; 8]);
        let name = self.backing.as_ref().map_or("", |(name, _)| name.as_str());
        // Behind the compression type and its padding.
        let header_bytes = V3_BYTES + 8;
        let name_at = header_bytes + extensions.len();
        let mut raw = Vec::new();
        raw.extend(MAGIC.to_be_bytes());
        raw.extend(3u32.to_be_bytes());
        raw.extend(if name.is_empty() { 0 } else { name_at as u64 }.to_be_bytes());
        raw.extend((name.len() as u32).to_be_bytes());
        raw.extend(self.cluster_bits.to_be_bytes());
        // Size, encryption, entries and place of the L1 table.
        raw.extend([0; 24]);
        raw.extend(cluster.to_be_bytes());
        raw.extend(1u32.to_be_bytes());
        // Snapshots and their place; features.
        raw.extend([0; 12 + 24]);
        raw.extend(self.refcount_order.to_be_bytes());
        raw.extend((header_bytes as u32).to_be_bytes());
        raw.extend([0; 8]);
        raw.extend(extensions);
        raw.extend(name.as_bytes());
        if raw.len() as u64 > cluster {
            let text = "the header does not fit a cluster of this size";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        raw.resize(cluster as usize, 0);
        Ok(raw)
    }
}
