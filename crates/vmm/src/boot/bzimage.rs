//! Linux bzImage by the 64-bit boot protocol: the real-mode part is skipped, the compressed kernel
//! is put where it wants to be and entered 0x200 bytes after its start.

use crate::boot::bytes::{u16_at, u32_at, u64_at};
use crate::boot::layout::HIGH_START;
use crate::boot::linux::{HEADER, Plan, finish};
use crate::boot::{BootError, KernelKind, Loaded, Loader};

const FORMAT: &str = "bzImage";
/// Version 2.12 brought the flags for the 64-bit entry (Linux 3.8).
const VERSION_MIN: u16 = 0x20c;
const KERNEL_64: u16 = 1;
const ENTRY_64: u64 = 0x200;
/// Bytes that tell a bzImage.
pub const HEAD_BYTES: usize = 0x206;

/// Whether a file is a bzImage, by the signatures of its boot sector and its setup header, which lie
/// in the first [`HEAD_BYTES`] bytes.
pub fn is_bzimage(data: &[u8]) -> bool {
    u16_at(data, 0x1fe) == Some(0xaa55) && data.get(0x202..0x206) == Some(b"HdrS")
}

/// Loads the image.
pub(super) fn load(loader: &Loader<'_>, data: &[u8]) -> Result<Loaded, BootError> {
    let cut = || loader.broken(FORMAT, "its setup header is cut off");
    let version = u16_at(data, 0x206).ok_or_else(cut)?;
    let xloadflags = u16_at(data, 0x236).ok_or_else(cut)?;
    if version < VERSION_MIN || xloadflags & KERNEL_64 == 0 {
        let why = format!(
            "it has no 64-bit entry (boot protocol {}.{}); take a 64-bit kernel from Linux 3.8 on",
            version >> 8,
            version & 0xff
        );
        return Err(loader.unsupported(FORMAT, why));
    }
    let sectors = match data.get(0x1f1).copied().ok_or_else(cut)? {
        0 => 4,
        sectors => usize::from(sectors),
    };
    let syssize = u64::from(u32_at(data, 0x1f4).ok_or_else(cut)?) * 16;
    let initrd_last = u64::from(u32_at(data, 0x22c).ok_or_else(cut)?);
    let alignment = u64::from(u32_at(data, 0x230).ok_or_else(cut)?);
    let relocatable = data.get(0x234).copied().ok_or_else(cut)? != 0;
    let cmdline_max = u32_at(data, 0x238).ok_or_else(cut)?;
    let preferred = u64_at(data, 0x258).ok_or_else(cut)?;
    let init_size = u64::from(u32_at(data, 0x260).ok_or_else(cut)?);
    // The header ends where the jump over it leads.
    let header_end = 0x202 + usize::from(data.get(0x201).copied().ok_or_else(cut)?);
    let header = data.get(HEADER..header_end).ok_or_else(cut)?;

    let start = (sectors + 1) * 512;
    let code = data.get(start..).filter(|code| code.len() as u64 > ENTRY_64).ok_or_else(|| {
        let len = data.len();
        loader.broken(FORMAT, format!("its code begins at {start}, but the file has {len} bytes"))
    })?;
    // `syssize` counts in 16 bytes and need not be exact by less than that; a signed image may
    // have more behind it.
    if (code.len() as u64) + 16 <= syssize {
        let why = format!("it says it has {syssize} bytes of code, but only {} follow", code.len());
        return Err(loader.broken(FORMAT, why));
    }
    let need = init_size.max(code.len() as u64);
    let at = place(loader, preferred, alignment, relocatable, need)?;
    loader.put_kernel(at, code)?;
    let plan = Plan {
        header,
        kernel_end: at + need,
        initrd_last: if initrd_last == 0 { 0x37ff_ffff } else { initrd_last },
        cmdline_max: usize::try_from(cmdline_max).unwrap_or(usize::MAX).saturating_add(1),
        entry: at + ENTRY_64,
    };
    Ok(Loaded { kind: KernelKind::BzImage, entry: finish(loader, &plan)? })
}

/// Where the kernel prefers to be, or as low as it may when that does not fit.
fn place(
    loader: &Loader<'_>,
    preferred: u64,
    alignment: u64,
    relocatable: bool,
    need: u64,
) -> Result<u64, BootError> {
    if preferred >= HIGH_START && loader.check_kernel_range(preferred, need).is_ok() {
        return Ok(preferred);
    }
    if !relocatable {
        loader.check_kernel_range(preferred, need)?;
        let why = format!("it must be loaded at {preferred:#x}, below the first MiB's end");
        return Err(loader.unsupported(FORMAT, why));
    }
    if !alignment.is_power_of_two() || alignment > 1 << 30 {
        return Err(loader.broken(FORMAT, format!("its alignment is {alignment:#x}")));
    }
    let lowest = HIGH_START.next_multiple_of(alignment);
    loader.check_kernel_range(lowest, need)?;
    Ok(lowest)
}
