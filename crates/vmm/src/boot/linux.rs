//! What both Linux formats share: the boot parameters ("zero page"), the initrd and the 64-bit
//! entry (Documentation/arch/x86/boot.rst and zero-page.rst).

use berth_x86::CpuState;

use crate::boot::bytes::u32_at;
use crate::boot::elf::Elf;
use crate::boot::layout::{ACPI_TABLES, CMDLINE, HIGH_START, ZERO_PAGE, memory_map};
use crate::boot::{BootError, KernelKind, Loaded, Loader, entry};

/// Offsets in the boot parameters.
const ACPI_RSDP: usize = 0x070;
const E820_COUNT: usize = 0x1e8;
pub(super) const HEADER: usize = 0x1f1;
const HEADER_END: usize = 0x290;
const TYPE_OF_LOADER: usize = 0x210;
const LOADFLAGS: usize = 0x211;
const RAMDISK_IMAGE: usize = 0x218;
const RAMDISK_SIZE: usize = 0x21c;
const HEAP_END: usize = 0x224;
const CMDLINE_POINTER: usize = 0x228;
const E820_TABLE: usize = 0x2d0;

/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
const CAN_USE_HEAP: u8 = 0x80;

/// What a kernel image says about itself.
pub(super) struct Plan<'a> {
    /// The setup header out of the file (from offset 0x1f1), empty for a plain ELF file.
    pub(super) header: &'a [u8],
    /// End of the memory the kernel needs for itself.
    pub(super) kernel_end: u64,
    /// Highest last address of an initrd.
    pub(super) initrd_last: u64,
    /// Bytes of a command line with its zero.
    pub(super) cmdline_max: usize,
    /// The 64-bit entry.
    pub(super) entry: u64,
}

fn set(page: &mut [u8; 4096], at: usize, bytes: &[u8]) {
    for (to, from) in page.iter_mut().skip(at).zip(bytes) {
        *to = *from;
    }
}

/// Loads the initrd, writes command line and boot parameters, and gives the entry state.
pub(super) fn finish(loader: &Loader<'_>, plan: &Plan<'_>) -> Result<CpuState, BootError> {
    let mut page = [0; 4096];
    let room = HEADER_END - HEADER;
    set(&mut page, HEADER, plan.header.get(..room).unwrap_or(plan.header));
    let mut put = |at, bytes: &[u8]| set(&mut page, at, bytes);
    match loader.files.modules {
        [] => {}
        [initrd] => {
            let end = plan.initrd_last.saturating_add(1);
            let taken = loader.put_module_high("the initrd", initrd, plan.kernel_end, end)?;
            put(RAMDISK_IMAGE, &(taken.start as u32).to_le_bytes());
            put(RAMDISK_SIZE, &((taken.end - taken.start) as u32).to_le_bytes());
        }
        _ => {
            let why = "it takes one initrd, not several modules";
            return Err(loader.unsupported("Linux kernel", why));
        }
    }
    loader.put_cmdline(CMDLINE, plan.cmdline_max)?;
    put(CMDLINE_POINTER, &(CMDLINE as u32).to_le_bytes());
    put(TYPE_OF_LOADER, &[LOADER_UNDEFINED]);
    put(HEAP_END, &0xfe00u16.to_le_bytes());
    put(ACPI_RSDP, &ACPI_TABLES.to_le_bytes());
    let map = memory_map(loader.ram);
    put(E820_COUNT, &[map.len() as u8]);
    for (index, range) in map.iter().enumerate() {
        let at = E820_TABLE + index * 20;
        put(at, &range.start.to_le_bytes());
        put(at + 8, &range.len.to_le_bytes());
        put(at + 16, &(range.kind as u32).to_le_bytes());
    }
    page[LOADFLAGS] |= CAN_USE_HEAP;
    loader.put(ZERO_PAGE, &page)?;
    entry::long_mode(loader, plan.entry, ZERO_PAGE)
}

/// Loads a vmlinux ELF file without a PVH note: the entry is that of the 64-bit protocol.
pub(super) fn load_vmlinux(
    loader: &Loader<'_>,
    data: &[u8],
    elf: &Elf,
) -> Result<Loaded, BootError> {
    if !elf.wide {
        let why = "a 32-bit ELF file needs a PVH note or a Multiboot header, and it has neither";
        return Err(loader.unsupported("ELF kernel", why));
    }
    let kernel_end = super::pvh::put_segments(loader, data, elf)?;
    // The entry is a physical address in Linux; other kernels may give a virtual one.
    let inside = |s: &&super::elf::Segment| {
        elf.entry.checked_sub(s.physical_address).is_some_and(|at| at < s.memory_size)
    };
    if !elf.segments.iter().any(|segment| inside(&segment)) {
        let why = format!("its entry {:#x} is in none of its segments", elf.entry);
        return Err(loader.unsupported("ELF kernel", why));
    }
    // The kernel looks for the signature and the version only in images; give it the newest.
    let mut header = [0; HEADER_END - HEADER];
    let mut put = |at: usize, bytes: &[u8]| {
        for (to, from) in header.iter_mut().skip(at - HEADER).zip(bytes) {
            *to = *from;
        }
    };
    put(0x1fe, &0xaa55u16.to_le_bytes());
    put(0x202, b"HdrS");
    put(0x206, &0x20fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x230, &0x20_0000u32.to_le_bytes());
    debug_assert_eq!(u32_at(&header, 0x230 - HEADER), Some(0x20_0000));
    let plan = Plan {
        header: &header,
        kernel_end: kernel_end.max(HIGH_START),
        initrd_last: 0x7fff_ffff,
        cmdline_max: 2048,
        entry: elf.entry,
    };
    Ok(Loaded { kind: KernelKind::Vmlinux, entry: finish(loader, &plan)? })
}
