//! As much of ELF as loading a kernel needs: header, loadable segments, and the note that names the
//! PVH entry.

use crate::boot::bytes::{slice_at, u16_at, u32_at, u64_at};

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// Owner and type of the note with the 32-bit physical entry.
const XEN_OWNER: &[u8] = b"Xen\0";
const XEN_PHYS32_ENTRY: u32 = 18;

/// A segment to be loaded.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) file_offset: u64,
    pub(super) file_size: u64,
    pub(super) virtual_address: u64,
    pub(super) physical_address: u64,
    pub(super) memory_size: u64,
}

/// A parsed file.
#[derive(Clone, Debug)]
pub(super) struct Elf {
    pub(super) wide: bool,
    pub(super) entry: u64,
    pub(super) segments: Vec<Segment>,
    pub(super) pvh_entry: Option<u32>,
}

/// Whether the file says that it is ELF.
pub(super) fn is(data: &[u8]) -> bool {
    data.starts_with(b"\x7fELF")
}

/// Parses the headers. All segments lie within the file.
pub(super) fn parse(data: &[u8]) -> Result<Elf, String> {
    let wide = match data.get(4) {
        Some(1) => false,
        Some(2) => true,
        _ => return Err("its class is neither 32 nor 64 bits".into()),
    };
    if data.get(5) != Some(&1) {
        return Err("it is not little-endian".into());
    }
    let short = || "its header is cut off".to_owned();
    let machine = u16_at(data, 18).ok_or_else(short)?;
    if !matches!((wide, machine), (false, 3) | (true, 62)) {
        return Err(format!("it is for machine type {machine}, not x86"));
    }
    let word = |at: usize| -> Option<u64> {
        if wide { u64_at(data, at) } else { u32_at(data, at).map(u64::from) }
    };
    let (entry, table, size_at) = if wide { (24, 32, 54) } else { (24, 28, 42) };
    let entry = word(entry).ok_or_else(short)?;
    let table = word(table).ok_or_else(short)?;
    let size = u16_at(data, size_at).ok_or_else(short)?;
    let count = u16_at(data, size_at + 2).ok_or_else(short)?;
    let least: u16 = if wide { 56 } else { 32 };
    if size < least {
        return Err(format!("its program headers have {size} bytes each"));
    }
    let mut elf = Elf { wide, entry, segments: Vec::new(), pvh_entry: None };
    for index in 0..u64::from(count) {
        let header = table
            .checked_add(index * u64::from(size))
            .and_then(|at| slice_at(data, at, u64::from(least)))
            .ok_or("its program headers are not all in the file")?;
        let (kind, segment) = program_header(header, wide).ok_or_else(short)?;
        if kind != PT_LOAD && kind != PT_NOTE {
            continue;
        }
        let bytes = slice_at(data, segment.file_offset, segment.file_size).ok_or_else(|| {
            format!(
                "segment {index} ({} bytes at {:#x}) is not all in the file",
                segment.file_size, segment.file_offset
            )
        })?;
        if kind == PT_NOTE {
            elf.pvh_entry = elf.pvh_entry.or_else(|| find_entry_note(bytes));
        } else if segment.memory_size < segment.file_size {
            return Err(format!("segment {index} is longer in the file than in memory"));
        } else if segment.memory_size > 0 {
            elf.segments.push(segment);
        }
    }
    if elf.segments.is_empty() {
        return Err("it has nothing to load".into());
    }
    Ok(elf)
}

fn program_header(header: &[u8], wide: bool) -> Option<(u32, Segment)> {
    let kind = u32_at(header, 0)?;
    let segment = if wide {
        Segment {
            file_offset: u64_at(header, 8)?,
            virtual_address: u64_at(header, 16)?,
            physical_address: u64_at(header, 24)?,
            file_size: u64_at(header, 32)?,
            memory_size: u64_at(header, 40)?,
        }
    } else {
        let word = |at| u32_at(header, at).map(u64::from);
        Segment {
            file_offset: word(4)?,
            virtual_address: word(8)?,
            physical_address: word(12)?,
            file_size: word(16)?,
            memory_size: word(20)?,
        }
    };
    Some((kind, segment))
}

/// Looks through notes: name size, description size, type, then both, each padded to 4 bytes.
fn find_entry_note(mut notes: &[u8]) -> Option<u32> {
    loop {
        let name_size = u32_at(notes, 0)?;
        let size = u32_at(notes, 4)?;
        let kind = u32_at(notes, 8)?;
        let padded = u64::from(name_size).next_multiple_of(4);
        let name = slice_at(notes, 12, u64::from(name_size))?;
        let description = slice_at(notes, 12 + padded, u64::from(size))?;
        if name == XEN_OWNER && kind == XEN_PHYS32_ENTRY {
            return u32_at(description, 0);
        }
        let next = 12 + padded + u64::from(size).next_multiple_of(4);
        notes = notes.get(usize::try_from(next).ok()?..)?;
    }
}
