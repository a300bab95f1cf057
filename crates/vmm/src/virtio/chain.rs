//! A descriptor chain as two byte strings: what the device may read and what it may write.
//!
//! Offsets count through the buffers, whatever the borders of descriptors are, as the
//! specification demands. All buffers were checked to be guest RAM when the chain was built.

use thiserror::Error;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, Permissions};

use crate::memory::Memory;
use crate::virtio::limits::CHAIN_DESCRIPTORS_MAX;

/// What is wrong with a chain, or with an access to one.
#[derive(Debug, Error)]
pub enum ChainError {
    /// A loop, an index outside the table, a broken indirect table, or no descriptor at all.
    #[error("descriptor chain {head} is malformed")]
    Malformed {
        /// First descriptor.
        head: u16,
    },
    /// More descriptors than [`CHAIN_DESCRIPTORS_MAX`].
    #[error("descriptor chain {head} is too long")]
    TooLong {
        /// First descriptor.
        head: u16,
    },
    /// A readable buffer after a writable one.
    #[error("descriptor chain {head} has a readable buffer after a writable one")]
    Order {
        /// First descriptor.
        head: u16,
    },
    /// A buffer that is not guest RAM.
    #[error("descriptor chain {head}: {len:#x} bytes at {address:#x} are not memory")]
    NotMemory {
        /// First descriptor.
        head: u16,
        /// Guest address of the buffer.
        address: u64,
        /// Its length.
        len: u32,
    },
    /// The buffers are too short for the request.
    #[error("descriptor chain {head}: no {len} bytes at offset {offset}")]
    TooShort {
        /// First descriptor.
        head: u16,
        /// Where in the chain.
        offset: u64,
        /// How much was needed.
        len: u64,
    },
}

/// Which of the two byte strings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Written by the driver, read by the device.
    Readable,
    /// Written by the device.
    Writable,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    address: GuestAddress,
    len: u32,
}

/// One request of the driver.
#[derive(Debug)]
pub struct Chain {
    head: u16,
    readable: Vec<Segment>,
    writable: Vec<Segment>,
    readable_len: u64,
    writable_len: u64,
}

impl Chain {
    /// Collects and checks the descriptors that `raw` yields.
    ///
    /// # Errors
    /// The chain breaks a rule of the specification or leaves guest RAM.
    pub(super) fn collect(
        memory: &Memory,
        raw: virtio_queue::DescriptorChain<&Memory>,
    ) -> Result<Self, ChainError> {
        let head = raw.head_index();
        let mut chain =
            Self { head, readable: vec![], writable: vec![], readable_len: 0, writable_len: 0 };
        let mut ended = false;
        for (count, descriptor) in raw.enumerate() {
            if count >= CHAIN_DESCRIPTORS_MAX {
                return Err(ChainError::TooLong { head });
            }
            let (address, len) = (descriptor.addr(), descriptor.len());
            // The iterator just ends where a chain is broken; then its last item wants a successor.
            ended = !descriptor.has_next();
            let writable = descriptor.is_write_only();
            if !writable && !chain.writable.is_empty() {
                return Err(ChainError::Order { head });
            }
            if len == 0 {
                continue;
            }
            let permissions = if writable { Permissions::Write } else { Permissions::Read };
            if !memory.check_range(address, len as usize, permissions) {
                return Err(ChainError::NotMemory { head, address: address.raw_value(), len });
            }
            if writable {
                chain.writable.push(Segment { address, len });
                chain.writable_len += u64::from(len);
            } else {
                chain.readable.push(Segment { address, len });
                chain.readable_len += u64::from(len);
            }
        }
        if ended { Ok(chain) } else { Err(ChainError::Malformed { head }) }
    }

    /// Index of the first descriptor, which names the chain in the used ring.
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes the device may read.
    pub fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Bytes the device may write.
    pub fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// Address and length of what the device may write.
    pub fn writable(&self) -> impl Iterator<Item = (u64, u64)> + use<'_> {
        self.writable.iter().map(|part| (part.address.raw_value(), u64::from(part.len)))
    }

    /// Reads all of `buffer` from `offset` of the readable bytes.
    ///
    /// # Errors
    /// The chain is shorter.
    pub fn read(&self, memory: &Memory, offset: u64, buffer: &mut [u8]) -> Result<(), ChainError> {
        let len = buffer.len() as u64;
        let mut rest = buffer;
        self.for_each(Direction::Readable, offset, len, |address, part| {
            let (now, later) = std::mem::take(&mut rest).split_at_mut_checked(part)?;
            rest = later;
            memory.read_slice(now, address).ok()
        })
    }

    /// Writes all of `data` from `offset` of the writable bytes.
    ///
    /// # Errors
    /// The chain is shorter.
    pub fn write(&self, memory: &Memory, offset: u64, data: &[u8]) -> Result<(), ChainError> {
        let len = data.len() as u64;
        let mut rest = data;
        self.for_each(Direction::Writable, offset, len, |address, part| {
            let (now, later) = rest.split_at_checked(part)?;
            rest = later;
            memory.write_slice(now, address).ok()
        })
    }

    /// Host addresses of `len` bytes from `offset`, appended to `out`. They stay valid as long as
    /// `memory` lives. Whoever writes through them calls [`Chain::mark_written`] afterwards.
    ///
    /// # Errors
    /// The chain is shorter.
    pub fn host_buffers(
        &self,
        memory: &Memory,
        direction: Direction,
        offset: u64,
        len: u64,
        out: &mut Vec<libc::iovec>,
    ) -> Result<(), ChainError> {
        let permissions = match direction {
            Direction::Readable => Permissions::Read,
            Direction::Writable => Permissions::Write,
        };
        self.for_each(direction, offset, len, |address, part| {
            for slice in memory.get_slices(address, part, permissions).ok()? {
                let slice = slice.ok()?;
                let iov_base = slice.ptr_guard_mut().as_ptr().cast();
                out.push(libc::iovec { iov_base, iov_len: slice.len() });
            }
            Some(())
        })
    }

    /// Tells the memory that `len` writable bytes from `offset` were changed through host
    /// addresses. To be called when the data is there and before the chain is given back.
    ///
    /// # Errors
    /// The chain is shorter.
    pub fn mark_written(&self, memory: &Memory, offset: u64, len: u64) -> Result<(), ChainError> {
        self.for_each(Direction::Writable, offset, len, |address, part| {
            for slice in memory.get_slices(address, part, Permissions::Write).ok()? {
                let slice = slice.ok()?;
                slice.bitmap().mark_dirty(0, slice.len());
            }
            Some(())
        })
    }

    fn for_each(
        &self,
        direction: Direction,
        offset: u64,
        len: u64,
        mut visit: impl FnMut(GuestAddress, usize) -> Option<()>,
    ) -> Result<(), ChainError> {
        let too_short = ChainError::TooShort { head: self.head, offset, len };
        let (segments, total) = match direction {
            Direction::Readable => (&self.readable, self.readable_len),
            Direction::Writable => (&self.writable, self.writable_len),
        };
        if offset.checked_add(len).is_none_or(|end| end > total) {
            return Err(too_short);
        }
        let (mut skip, mut left) = (offset, len);
        for segment in segments {
            if left == 0 {
                break;
            }
            let size = u64::from(segment.len);
            if skip >= size {
                skip -= size;
                continue;
            }
            let part = (size - skip).min(left);
            let address = segment.address.checked_add(skip);
            let done = address.and_then(|address| visit(address, part as usize));
            if done.is_none() {
                return Err(too_short);
            }
            left -= part;
            skip = 0;
        }
        Ok(())
    }
}
