//! Loading a guest: finds out what the kernel file is, puts it into memory with what its boot
//! protocol wants, and gives the state in which the first vCPU starts.
//!
//! Files may be hostile: every length is checked against the file and against guest memory.

mod bytes;
mod bzimage;
mod elf;
mod entry;
mod error;
mod layout;
mod linux;
mod multiboot;
mod pvh;

#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use berth_x86::CpuState;
use vm_memory::{Bytes, GuestAddress};

pub use crate::boot::bzimage::{HEAD_BYTES, is_bzimage};
pub use crate::boot::error::BootError;
pub use crate::boot::layout::{
    ACPI_TABLES, GENERATION_ID, HIGH_START, MapRange, RangeKind, memory_map,
};
use crate::chips::power;
use crate::limits::{CMDLINE_BYTES_MAX, KERNEL_BYTES_MAX};
use crate::memory::GuestRam;

/// A file handed to the kernel: the initrd, or a Multiboot or PVH module with its own string.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Module {
    /// The file.
    pub path: PathBuf,
    /// What the kernel is told about it.
    pub args: String,
}

impl Module {
    /// The modules that a `--initrd` value names: one file, or `file args,file args` as other
    /// machines have it. A value that is the name of a file is that file, commas and all.
    #[must_use]
    pub fn parse_list(value: &str) -> Vec<Self> {
        if Path::new(value).exists() || !value.contains([',', ' ']) {
            return vec![Self { path: value.into(), args: String::new() }];
        }
        let parts = value.split(',').filter(|part| !part.is_empty());
        parts
            .map(|part| {
                let (path, args) = part.split_once(' ').unwrap_or((part, ""));
                Self { path: path.into(), args: args.into() }
            })
            .collect()
    }
}

/// What to boot.
#[derive(Clone, Debug)]
pub struct BootFiles<'a> {
    /// The kernel.
    pub kernel: &'a Path,
    /// The initrd (one) or modules.
    pub modules: &'a [Module],
    /// The command line.
    pub cmdline: &'a str,
}

/// The boot protocol that a kernel was loaded by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelKind {
    /// Linux bzImage at its 64-bit entry.
    BzImage,
    /// Linux vmlinux at its 64-bit entry.
    Vmlinux,
    /// ELF with a PVH entry.
    Pvh,
    /// Multiboot 1.
    Multiboot,
}

/// A loaded guest.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// By which protocol.
    pub kind: KernelKind,
    /// State of the first vCPU.
    pub entry: CpuState,
}

/// Loads the kernel and its modules. ACPI tables, if there are, begin with their RSDP at
/// [`ACPI_TABLES`].
///
/// # Errors
/// [`BootError`] says which file, what is wrong with it and what to try.
pub fn load(ram: &GuestRam, files: &BootFiles<'_>) -> Result<Loaded, BootError> {
    let data = read_kernel(files.kernel)?;
    if files.cmdline.contains('\0') {
        return Err(BootError::CmdlineZero);
    }
    let loader = Loader { ram, files };
    if is_bzimage(&data) {
        return bzimage::load(&loader, &data);
    }
    if let Some(header) = multiboot::find(&data) {
        return multiboot::load(&loader, &data, &header);
    }
    if !elf::is(&data) {
        return Err(BootError::UnknownFormat { path: files.kernel.into(), found: describe(&data) });
    }
    let elf = elf::parse(&data).map_err(|why| loader.broken("an ELF kernel", why))?;
    match elf.pvh_entry {
        Some(entry) => pvh::load(&loader, &data, &elf, entry),
        None => linux::load_vmlinux(&loader, &data, &elf),
    }
}

/// Where processors of old start, and where a kernel jumps that wants the BIOS to start the machine
/// anew. Linux does so by default when ACPI is hardware-reduced and there is no EFI.
pub const BIOS_ENTRY: u64 = 0xf_fff0;

/// Puts all the firmware there is into memory: code at [`BIOS_ENTRY`] that resets the machine.
///
/// # Errors
/// [`BootError::Memory`].
pub fn put_firmware(ram: &GuestRam) -> Result<(), BootError> {
    let [low, high] = power::RESET.to_le_bytes();
    // mov dx, RESET; mov al, RESET_VALUE; out dx, al; then hlt for good.
    let code = [0xba, low, high, 0xb0, power::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd];
    let written = ram.memory().write_slice(&code, GuestAddress(BIOS_ENTRY));
    written.map_err(|_| BootError::Memory { at: BIOS_ENTRY })
}

/// Puts bytes of code into memory, for probes and tests.
///
/// # Errors
/// A sentence that says so.
pub(crate) fn put_code(ram: &GuestRam, at: u64, code: &[u8]) -> Result<(), String> {
    let written = ram.memory().write_slice(code, GuestAddress(at));
    written.map_err(|error| format!("the guest does not fit into memory: {error}"))
}

/// A vCPU in 64-bit mode at `entry`, with the descriptor and page tables it needs.
///
/// # Errors
/// A sentence that says why they do not fit.
pub(crate) fn long_mode_entry(ram: &GuestRam, entry: u64) -> Result<CpuState, String> {
    let files = BootFiles { kernel: Path::new(""), modules: &[], cmdline: "" };
    let loader = Loader { ram, files: &files };
    entry::long_mode(&loader, entry, 0).map_err(|error| error.to_string())
}

fn read_kernel(path: &Path) -> Result<Vec<u8>, BootError> {
    let fail = |source| BootError::Read { what: "the kernel", path: path.into(), source };
    let file = File::open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if !metadata.is_file() || metadata.len() > KERNEL_BYTES_MAX {
        return Err(BootError::NotAFile { path: path.into() });
    }
    let mut data = Vec::with_capacity(metadata.len() as usize);
    file.take(KERNEL_BYTES_MAX).read_to_end(&mut data).map_err(fail)?;
    Ok(data)
}

/// What a file that is no kernel seems to be.
fn describe(data: &[u8]) -> String {
    match data {
        [] => "it is empty".into(),
        [0x1f, 0x8b, ..] => "it is a gzip file; unpack it first".into(),
        [b'!', b'<', b'a', b'r', b'c', ..] => "it is an ar archive, perhaps a package".into(),
        [0x30, 0x37, 0x30, 0x37, 0x30, ..] => "it is a cpio archive, perhaps an initrd".into(),
        [b'M', b'Z', ..] => "it is an EFI program without a Linux header".into(),
        [b'#', b'!', ..] => "it is a script".into(),
        data => {
            let head: Vec<_> = data.iter().take(4).map(|byte| format!("{byte:02x}")).collect();
            format!("it begins with the bytes {}", head.join(" "))
        }
    }
}

/// Half-open range of guest addresses that is taken.
#[derive(Clone, Copy, Debug)]
struct Taken {
    start: u64,
    end: u64,
}

/// What all loaders share.
struct Loader<'a> {
    ram: &'a GuestRam,
    files: &'a BootFiles<'a>,
}

impl Loader<'_> {
    fn broken(&self, format: &'static str, why: impl Into<String>) -> BootError {
        BootError::Broken { path: self.files.kernel.into(), format, why: why.into() }
    }

    fn unsupported(&self, format: &'static str, why: impl Into<String>) -> BootError {
        BootError::Unsupported { path: self.files.kernel.into(), format, why: why.into() }
    }

    /// Writes boot data.
    fn put(&self, at: u64, bytes: &[u8]) -> Result<(), BootError> {
        let memory = self.ram.memory();
        memory.write_slice(bytes, GuestAddress(at)).map_err(|_| BootError::Memory { at })
    }

    /// Checks that the kernel may have `len` bytes of the RAM below 4 GiB at `at`.
    fn check_kernel_range(&self, at: u64, len: u64) -> Result<(), BootError> {
        let end = self.ram.low_bytes();
        if at.checked_add(len).is_none_or(|last| last > end) {
            let path = self.files.kernel.into();
            return Err(BootError::NoRoom { what: "the kernel", path, need: len, at, end });
        }
        Ok(())
    }

    /// Copies a piece of the kernel into RAM.
    fn put_kernel(&self, at: u64, bytes: &[u8]) -> Result<(), BootError> {
        self.check_kernel_range(at, bytes.len() as u64)?;
        self.put(at, bytes)
    }

    /// Writes the command line with its final zero at `at`; `limit` is what the kernel takes.
    fn put_cmdline(&self, at: u64, limit: usize) -> Result<(), BootError> {
        let line = self.files.cmdline.as_bytes();
        if line.len() >= CMDLINE_BYTES_MAX.min(limit) {
            return Err(BootError::CmdlineTooLong { len: line.len(), limit });
        }
        self.put(at, line)?;
        self.put(at + line.len() as u64, &[0])
    }

    /// Reads a module to the highest page-aligned place that ends at or below `end` and begins at or
    /// above `floor`.
    fn put_module_high(
        &self,
        what: &'static str,
        module: &Module,
        floor: u64,
        end: u64,
    ) -> Result<Taken, BootError> {
        let (mut file, len) = open_module(what, &module.path)?;
        let end = end.min(self.ram.low_bytes());
        let start = end.checked_sub(len).map(|start| start & !0xfff);
        let Some(start) = start.filter(|&start| start >= floor) else {
            let path = module.path.clone();
            return Err(BootError::NoRoom { what, path, need: len, at: floor, end });
        };
        let memory = self.ram.memory();
        memory.read_exact_volatile_from(GuestAddress(start), &mut file, len as usize).map_err(
            |e| BootError::Read {
                what,
                path: module.path.clone(),
                source: std::io::Error::other(e.to_string()),
            },
        )?;
        Ok(Taken { start, end: start + len })
    }
}

fn open_module(what: &'static str, path: &Path) -> Result<(File, u64), BootError> {
    let fail = |source| BootError::Read { what, path: path.into(), source };
    let file = File::open(path).map_err(fail)?;
    let metadata = file.metadata().map_err(fail)?;
    if !metadata.is_file() {
        return Err(fail(std::io::Error::other("it is not a regular file")));
    }
    Ok((file, metadata.len()))
}
