//! PVH: an ELF file with a note that names a 32-bit entry, which finds a start-info structure in EBX
//! (Xen's public/arch-x86/hvm/start_info.h).

use berth_x86::state::reg;

use crate::boot::bytes::slice_at;
use crate::boot::elf::Elf;
use crate::boot::layout::{ACPI_TABLES, CMDLINE, HIGH_START, PVH_INFO, memory_map};
use crate::boot::{BootError, KernelKind, Loaded, Loader, entry};
use crate::limits::{CMDLINE_BYTES_MAX, MODULES_MAX};

const MAGIC: u32 = 0x336e_c578;
const INFO_SIZE: u64 = 56;
const ENTRY_SIZE: u64 = 32 - 8;
const MODULE_SIZE: u64 = 32;
/// The start info is followed by the memory map (entries of 24 bytes), then the modules.
const MAP: u64 = PVH_INFO + 0x40;
const MODULES: u64 = PVH_INFO + 0x200;

const _: () = assert!(MODULES + MODULES_MAX as u64 * MODULE_SIZE <= PVH_INFO + 0x1000);
const _: () = assert!(PVH_INFO + INFO_SIZE <= MAP && MAP + 16 * ENTRY_SIZE <= MODULES);

/// Loads the segments of an ELF file at their physical addresses; gives where they end.
pub(super) fn put_segments(loader: &Loader<'_>, data: &[u8], elf: &Elf) -> Result<u64, BootError> {
    let mut end = 0;
    for segment in &elf.segments {
        let (at, size) = (segment.physical_address, segment.memory_size);
        loader.check_kernel_range(at, size)?;
        if at < HIGH_START {
            let why = format!("it has a segment at {at:#x}; the first MiB holds boot data");
            return Err(loader.unsupported("ELF kernel", why));
        }
        let bytes = slice_at(data, segment.file_offset, segment.file_size)
            .ok_or_else(|| loader.broken("ELF kernel", "a segment is not all in the file"))?;
        // What follows in memory is zero already.
        loader.put_kernel(at, bytes)?;
        end = end.max(at + size);
    }
    Ok(end)
}

/// Loads the file and its modules.
pub(super) fn load(
    loader: &Loader<'_>,
    data: &[u8],
    elf: &Elf,
    entry: u32,
) -> Result<Loaded, BootError> {
    let kernel_end = put_segments(loader, data, elf)?;
    let modules = loader.files.modules;
    if modules.len() > MODULES_MAX {
        return Err(BootError::TooManyModules { count: modules.len() });
    }
    let mut end = loader.ram.low_bytes();
    let mut strings = CMDLINE + CMDLINE_BYTES_MAX as u64;
    for (index, module) in modules.iter().enumerate() {
        let taken = loader.put_module_high("the module", module, kernel_end, end)?;
        end = taken.start;
        let len = module.args.len();
        if len >= CMDLINE_BYTES_MAX {
            return Err(BootError::CmdlineTooLong { len, limit: CMDLINE_BYTES_MAX });
        }
        loader.put(strings, module.args.as_bytes())?;
        loader.put(strings + len as u64, &[0])?;
        let fields = [taken.start, taken.end - taken.start, strings, 0];
        let bytes: Vec<u8> = fields.into_iter().flat_map(u64::to_le_bytes).collect();
        loader.put(MODULES + index as u64 * MODULE_SIZE, &bytes)?;
        strings += len as u64 + 1;
    }
    loader.put_cmdline(CMDLINE, CMDLINE_BYTES_MAX)?;
    let map = memory_map(loader.ram);
    for (index, range) in map.iter().enumerate() {
        let at = MAP + index as u64 * ENTRY_SIZE;
        loader.put(at, &range.start.to_le_bytes())?;
        loader.put(at + 8, &range.len.to_le_bytes())?;
        loader.put(at + 16, &u64::from(range.kind as u32).to_le_bytes())?;
    }
    let mut info = Vec::with_capacity(INFO_SIZE as usize);
    // Version 1 has the memory map.
    for word in [MAGIC, 1, 0, modules.len() as u32] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    let module_list = if modules.is_empty() { 0 } else { MODULES };
    for word in [module_list, CMDLINE, ACPI_TABLES, MAP, map.len() as u64] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    loader.put(PVH_INFO, &info)?;
    let mut state = entry::protected_mode(loader, entry)?;
    state.gpr[reg::RBX] = PVH_INFO;
    Ok(Loaded { kind: KernelKind::Pvh, entry: state })
}
