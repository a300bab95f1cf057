//! Multiboot 1 (Multiboot specification 0.6.96): a header in the first 8 KiB, loaded by its own
//! addresses or as ELF, entered in 32-bit protected mode with an information structure in EBX.

use berth_x86::state::reg;

use crate::boot::bytes::{slice_at, u32_at};
use crate::boot::layout::{HIGH_START, LOW_END, MULTIBOOT_INFO, memory_map};
use crate::boot::{BootError, KernelKind, Loaded, Loader, elf, entry};
use crate::limits::{CMDLINE_BYTES_MAX, MODULES_MAX};

const FORMAT: &str = "Multiboot kernel";
const HEADER_MAGIC: u32 = 0x1bad_b002;
const LOADER_MAGIC: u64 = 0x2bad_b002;
const SEARCH_BYTES: usize = 8192;
/// Header flags: modules on page boundaries, memory information wanted, video mode wanted, load
/// addresses given. Low ones with unknown numbers must not be ignored.
const FLAG_VIDEO: u32 = 1 << 2;
const FLAG_ADDRESSES: u32 = 1 << 16;
const FLAGS_KNOWN: u32 = 0xffff_0000 | 3;

/// Information flags: memory sizes, command line, modules, memory map, loader name.
const INFO_FLAGS: u32 = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 6 | 1 << 9;
const INFO_SIZE: u64 = 120;
const MAP: u64 = MULTIBOOT_INFO + 0x100;
const MODULES: u64 = MULTIBOOT_INFO + 0x400;
const STRINGS: u64 = MULTIBOOT_INFO + 0x1000;
const STRINGS_END: u64 = LOW_END;
const LOADER_NAME: &str = "Berth";

const _: () = assert!(MULTIBOOT_INFO + INFO_SIZE <= MAP);
const _: () = assert!(MODULES + MODULES_MAX as u64 * 16 <= STRINGS);

/// A header that was found.
pub(super) struct Header {
    offset: u64,
    flags: u32,
}

/// Looks for a header: aligned, with a magic number and a checksum.
pub(super) fn find(data: &[u8]) -> Option<Header> {
    (0..SEARCH_BYTES.min(data.len())).step_by(4).find_map(|at| {
        let flags = u32_at(data, at + 4)?;
        let sum = HEADER_MAGIC.wrapping_add(flags).wrapping_add(u32_at(data, at + 8)?);
        let found = u32_at(data, at)? == HEADER_MAGIC && sum == 0;
        found.then_some(Header { offset: at as u64, flags })
    })
}

/// Loads the kernel and its modules.
pub(super) fn load(loader: &Loader<'_>, data: &[u8], header: &Header) -> Result<Loaded, BootError> {
    let unknown = header.flags & !FLAGS_KNOWN & !FLAG_VIDEO;
    if unknown != 0 {
        let why = format!("it requires features {unknown:#x}, which version 0.6.96 does not have");
        return Err(loader.unsupported(FORMAT, why));
    }
    if header.flags & FLAG_VIDEO != 0 {
        // Wanted, but a kernel has to look at what it got.
        tracing::info!("the Multiboot kernel asks for a video mode; there is no display");
    }
    let (entry, end) = if header.flags & FLAG_ADDRESSES != 0 {
        load_by_addresses(loader, data, header)?
    } else {
        load_elf(loader, data)?
    };
    put_info(loader, end)?;
    let mut state = entry::protected_mode(loader, entry)?;
    state.gpr[reg::RAX] = LOADER_MAGIC;
    state.gpr[reg::RBX] = MULTIBOOT_INFO;
    Ok(Loaded { kind: KernelKind::Multiboot, entry: state })
}

/// Copies a piece, unless it would lie where boot data goes.
fn put(loader: &Loader<'_>, at: u64, bytes: &[u8], memory_size: u64) -> Result<u64, BootError> {
    loader.check_kernel_range(at, memory_size)?;
    let end = at + memory_size;
    if at < HIGH_START && end > MULTIBOOT_INFO || at < 0x1000 {
        let why = format!("it wants to be at {at:#x}..{end:#x}, where boot data and the BIOS are");
        return Err(loader.unsupported(FORMAT, why));
    }
    loader.put_kernel(at, bytes)?;
    Ok(end)
}

fn load_by_addresses(
    loader: &Loader<'_>,
    data: &[u8],
    header: &Header,
) -> Result<(u32, u64), BootError> {
    let field = |index: u64| {
        let at = usize::try_from(header.offset + 12 + 4 * index).ok()?;
        u32_at(data, at).map(u64::from)
    };
    let fields = (|| Some((field(0)?, field(1)?, field(2)?, field(3)?, field(4)?)))();
    let Some((header_at, load_at, load_end, bss_end, entry)) = fields else {
        return Err(loader.broken(FORMAT, "its header is cut off"));
    };
    let start = header_at
        .checked_sub(load_at)
        .and_then(|before| header.offset.checked_sub(before))
        .ok_or_else(|| {
            let why = format!("its header at {header_at:#x} cannot follow code at {load_at:#x}");
            loader.broken(FORMAT, why)
        })?;
    let available = (data.len() as u64).saturating_sub(start);
    let size = match load_end {
        0 => available,
        end => end.checked_sub(load_at).ok_or_else(|| {
            loader.broken(FORMAT, format!("it ends at {end:#x}, before its start at {load_at:#x}"))
        })?,
    };
    let bytes = slice_at(data, start, size).ok_or_else(|| {
        let why = format!("it says it has {size} bytes, but only {available} follow");
        loader.broken(FORMAT, why)
    })?;
    let memory_size = match bss_end {
        0 => size,
        end => end.saturating_sub(load_at).max(size),
    };
    let end = put(loader, load_at, bytes, memory_size)?;
    Ok((entry as u32, end))
}

fn load_elf(loader: &Loader<'_>, data: &[u8]) -> Result<(u32, u64), BootError> {
    if !elf::is(data) {
        let why = "it gives no load addresses and is not ELF";
        return Err(loader.broken(FORMAT, why));
    }
    let elf = elf::parse(data).map_err(|why| loader.broken(FORMAT, why))?;
    let mut end = 0;
    let mut entry = elf.entry;
    for segment in &elf.segments {
        let bytes = slice_at(data, segment.file_offset, segment.file_size)
            .ok_or_else(|| loader.broken(FORMAT, "a segment is not all in the file"))?;
        end = end.max(put(loader, segment.physical_address, bytes, segment.memory_size)?);
        // An entry by virtual address is meant at the segment's physical one.
        let within = elf.entry.checked_sub(segment.virtual_address);
        if let Some(within) = within.filter(|&at| at < segment.memory_size) {
            entry = segment.physical_address + within;
        }
    }
    let entry = u32::try_from(entry)
        .map_err(|_| loader.unsupported(FORMAT, format!("its entry {entry:#x} is above 4 GiB")))?;
    Ok((entry, end))
}

/// Writes the information structure; modules go above `kernel_end`.
fn put_info(loader: &Loader<'_>, kernel_end: u64) -> Result<(), BootError> {
    let modules = loader.files.modules;
    if modules.len() > MODULES_MAX {
        return Err(BootError::TooManyModules { count: modules.len() });
    }
    let mut strings = Strings { loader, at: STRINGS };
    // Right behind the kernel, one after the other: small machines' kernels look there.
    let mut next = kernel_end.max(HIGH_START).next_multiple_of(4096);
    for (index, module) in modules.iter().enumerate() {
        let (_, len) = super::open_module("the module", &module.path)?;
        let end = next.saturating_add(len.next_multiple_of(4096));
        let taken = loader.put_module_high("the module", module, next, end)?;
        let path = module.path.to_string_lossy();
        let line = match module.args.as_str() {
            "" => path.into_owned(),
            args => format!("{path} {args}"),
        };
        let fields = [taken.start as u32, taken.end as u32, strings.put(&line)?, 0];
        let bytes: Vec<u8> = fields.into_iter().flat_map(u32::to_le_bytes).collect();
        loader.put(MODULES + index as u64 * 16, &bytes)?;
        next = end;
    }
    // By custom the command line begins with the kernel's name.
    let line = format!("{} {}", loader.files.kernel.display(), loader.files.cmdline);
    let line = strings.put(line.trim_end())?;
    let name = strings.put(LOADER_NAME)?;
    let map = memory_map(loader.ram);
    for (index, range) in map.iter().enumerate() {
        let at = MAP + index as u64 * 24;
        // The size does not count itself.
        loader.put(at, &20u32.to_le_bytes())?;
        loader.put(at + 4, &range.start.to_le_bytes())?;
        loader.put(at + 12, &range.len.to_le_bytes())?;
        loader.put(at + 20, &(range.kind as u32).to_le_bytes())?;
    }
    let mut info = [0u32; INFO_SIZE as usize / 4];
    info[0] = INFO_FLAGS;
    info[1] = (LOW_END >> 10) as u32;
    info[2] = (loader.ram.low_bytes().saturating_sub(HIGH_START) >> 10) as u32;
    info[4] = line;
    info[5] = modules.len() as u32;
    info[6] = MODULES as u32;
    info[11] = map.len() as u32 * 24;
    info[12] = MAP as u32;
    info[16] = name;
    let bytes: Vec<u8> = info.into_iter().flat_map(u32::to_le_bytes).collect();
    loader.put(MULTIBOOT_INFO, &bytes)
}

/// Zero-ended strings, one after the other.
struct Strings<'a> {
    loader: &'a Loader<'a>,
    at: u64,
}

impl Strings<'_> {
    fn put(&mut self, text: &str) -> Result<u32, BootError> {
        let len = text.len();
        let at = self.at;
        let next = at + len as u64 + 1;
        if len >= 2 * CMDLINE_BYTES_MAX || next > STRINGS_END {
            return Err(BootError::CmdlineTooLong { len, limit: CMDLINE_BYTES_MAX });
        }
        self.loader.put(at, text.as_bytes())?;
        self.loader.put(at + len as u64, &[0])?;
        self.at = next;
        Ok(at as u32)
    }
}
