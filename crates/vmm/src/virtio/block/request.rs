//! What the driver asks a disk for, read from a chain and checked.
//!
//! ```text
//! readable: type u32, reserved u32, sector u64, data to write or segments to discard
//! writable: data to read, then one status byte
//! ```

use crate::memory::Memory;
use crate::virtio::block::disk::SECTOR_SIZE;
use crate::virtio::chain::Chain;
use crate::virtio::limits::BLOCK_DISCARD_SECTORS_MAX;

/// Status byte: done.
pub(super) const STATUS_OK: u8 = 0;
/// Status byte: failed.
pub(super) const STATUS_IOERR: u8 = 1;
/// Status byte: not known.
pub(super) const STATUS_UNSUPPORTED: u8 = 2;

/// Bytes of the request header.
pub(super) const HEADER_SIZE: u64 = 16;
/// Length of the identifier.
pub(super) const ID_SIZE: usize = 20;

const TYPE_IN: u32 = 0;
const TYPE_OUT: u32 = 1;
const TYPE_FLUSH: u32 = 4;
const TYPE_GET_ID: u32 = 8;
const TYPE_DISCARD: u32 = 11;
const TYPE_WRITE_ZEROES: u32 = 13;
const SEGMENT_SIZE: u64 = 16;
const FLAG_UNMAP: u32 = 1;

/// A request whose range was checked against the disk. Offsets and lengths are in bytes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Request {
    Read { offset: u64, len: u64 },
    Write { offset: u64, len: u64 },
    Flush,
    GetId,
    Discard { offset: u64, len: u64 },
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

/// Parses a request. `Err` is the status to answer with; `None` means there is no room for a status.
pub(super) fn parse(
    chain: &Chain,
    memory: &Memory,
    sectors: u64,
    read_only: bool,
) -> Option<Result<Request, u8>> {
    let data_in = chain.writable_len().checked_sub(1)?;
    let mut header = [0; HEADER_SIZE as usize];
    if chain.read(memory, 0, &mut header).is_err() {
        return Some(Err(STATUS_IOERR));
    }
    let data_out = chain.readable_len() - HEADER_SIZE;
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let kind = u32::from_le_bytes([a, b, c, d]);
    let sector = u64::from_le_bytes(sector);
    let writes = matches!(kind, TYPE_OUT | TYPE_DISCARD | TYPE_WRITE_ZEROES);
    if writes && read_only {
        return Some(Err(STATUS_IOERR));
    }
    Some(match kind {
        TYPE_IN => {
            range(sector, data_in, sectors).map(|offset| Request::Read { offset, len: data_in })
        }
        TYPE_OUT => {
            range(sector, data_out, sectors).map(|offset| Request::Write { offset, len: data_out })
        }
        TYPE_FLUSH => Ok(Request::Flush),
        TYPE_GET_ID if data_in >= ID_SIZE as u64 => Ok(Request::GetId),
        TYPE_GET_ID => Err(STATUS_IOERR),
        TYPE_DISCARD | TYPE_WRITE_ZEROES => parse_segment(chain, memory, kind, data_out, sectors),
        _ => Err(STATUS_UNSUPPORTED),
    })
}

/// One segment only, as the configuration says.
fn parse_segment(
    chain: &Chain,
    memory: &Memory,
    kind: u32,
    data_out: u64,
    sectors: u64,
) -> Result<Request, u8> {
    let mut segment = [0; SEGMENT_SIZE as usize];
    if data_out != SEGMENT_SIZE || chain.read(memory, HEADER_SIZE, &mut segment).is_err() {
        return Err(STATUS_IOERR);
    }
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, f0, f1, f2, f3] = segment;
    let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let count = u32::from_le_bytes([n0, n1, n2, n3]);
    let flags = u32::from_le_bytes([f0, f1, f2, f3]);
    if count > BLOCK_DISCARD_SECTORS_MAX {
        return Err(STATUS_IOERR);
    }
    let len = u64::from(count) * SECTOR_SIZE;
    let offset = range(sector, len, sectors)?;
    match (kind, flags) {
        (TYPE_DISCARD, 0) => Ok(Request::Discard { offset, len }),
        (TYPE_WRITE_ZEROES, 0 | FLAG_UNMAP) => {
            Ok(Request::WriteZeroes { offset, len, unmap: flags == FLAG_UNMAP })
        }
        // Discard must not carry the unmap flag; other flags are reserved.
        _ => Err(STATUS_UNSUPPORTED),
    }
}

/// Byte offset of a range of whole sectors inside the disk.
fn range(sector: u64, len: u64, sectors: u64) -> Result<u64, u8> {
    if !len.is_multiple_of(SECTOR_SIZE) {
        return Err(STATUS_IOERR);
    }
    let end = sector.checked_add(len / SECTOR_SIZE).filter(|end| *end <= sectors);
    end.map(|_| sector * SECTOR_SIZE).ok_or(STATUS_IOERR)
}
