//! Where boot data lies in guest memory, and the memory map that guests are told.
//!
//! ```text
//! 0x0500   descriptor table
//! 0x6000   PVH start info, module list, memory map
//! 0x7000   Linux boot parameters (zero page)
//! 0x9000   page tables of the 64-bit entry: 1 + 1 + 4 pages, the first 4 GiB one to one
//! 0x20000  command line
//! 0x90000  Multiboot information, memory map, module list, strings
//! 0x9fc00  reserved: extended BIOS data area
//! 0xdf010  reserved: the generation id, 16 bytes, where no search for option ROMs looks
//! 0xe0000  reserved: ACPI tables, the RSDP first
//! 0xffff0  reserved: the entry of a BIOS, which resets the machine
//! ```

use crate::memory::{GuestRam, HIGH_RAM_START};

pub(super) const GDT: u64 = 0x500;
pub(super) const PVH_INFO: u64 = 0x6000;
pub(super) const ZERO_PAGE: u64 = 0x7000;
pub(super) const PAGE_TABLES: u64 = 0x9000;
pub(super) const CMDLINE: u64 = 0x2_0000;
pub(super) const MULTIBOOT_INFO: u64 = 0x9_0000;
/// End of the RAM below the BIOS area.
pub(super) const LOW_END: u64 = 0x9_fc00;
/// The generation id (`crate::generation`).
pub const GENERATION_ID: u64 = 0xd_f010;
/// The ACPI tables; the RSDP is the first.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// RAM goes on here.
pub const HIGH_START: u64 = 0x10_0000;

/// What a piece of the memory map is, by the numbers of E820, PVH and Multiboot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum RangeKind {
    /// Free RAM.
    Ram = 1,
    /// Not to be used.
    Reserved = 2,
}

/// A piece of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRange {
    /// First address.
    pub start: u64,
    /// Bytes.
    pub len: u64,
    /// What it is.
    pub kind: RangeKind,
}

/// The memory map, by rising address.
#[must_use]
pub fn memory_map(ram: &GuestRam) -> Vec<MapRange> {
    let range = |start, end, kind| MapRange { start, len: end - start, kind };
    let mut map = vec![
        range(0, LOW_END, RangeKind::Ram),
        range(LOW_END, HIGH_START, RangeKind::Reserved),
        range(HIGH_START, ram.low_bytes(), RangeKind::Ram),
    ];
    if ram.high_bytes() > 0 {
        map.push(range(HIGH_RAM_START, HIGH_RAM_START + ram.high_bytes(), RangeKind::Ram));
    }
    map
}
