//! Guest memory and the map of guest physical addresses.
//!
//! ```text
//! 0x0000_0000  RAM, at most 3 GiB (the BIOS area 0xa0000..0x100000 is RAM too, reserved in maps)
//! 0xc000_0000  32-bit PCI memory window
//! 0xfec0_0000  I/O APIC
//! 0xfee0_0000  local APICs
//! 0x1_0000_0000  the rest of RAM, then the 64-bit PCI memory window
//! ```
//!
//! RAM is a memfd, the pieces one after the other, so that the translator, KVM and device processes
//! can map the same pages. Whatever reads or writes RAM through [`Memory`] tells the translator by itself,
//! before, since pages may be mapped late or be shared and have to be copied first, and after it wrote,
//! since there may be translations of them: [`CodeBitmap`] takes the place of a dirty bitmap and calls a
//! hook with the guest address.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, OnceLock};

use berth_translator::Reservation;
use rustix::fs::FallocateFlags;
use vm_memory::bitmap::{BS, Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::guest_memory::GuestMemorySliceIterator;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend, GuestMemoryError, GuestMemoryMmap,
    GuestMemoryRegion, GuestRegionMmap, Permissions,
};

use crate::limits::MEMORY_BYTES_MIN;

/// First address of the hole below 4 GiB: RAM ends here or before.
pub const HOLE_START: u64 = 0xc000_0000;
/// The 32-bit PCI memory window.
pub const PCI_WINDOW_32: std::ops::Range<u64> = HOLE_START..0xfec0_0000;
/// Registers of the I/O APIC.
pub const IOAPIC_BASE: u64 = 0xfec0_0000;
/// Registers of the local APICs.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// RAM that does not fit below [`HOLE_START`] begins here.
pub const HIGH_RAM_START: u64 = 1 << 32;
/// Bytes of the 64-bit PCI memory window, which begins at [`GuestRam::pci_window_64`].
pub const PCI_WINDOW_64_SIZE: u64 = 64 << 30;

/// Guest RAM as loaders and devices see it.
#[derive(Clone)]
pub struct Memory {
    map: GuestMemoryMmap<CodeBitmap>,
    before: AccessHook,
    backing: Arc<Backing>,
    /// The regions lie in it.
    _mapping: Arc<Reservation>,
}

impl GuestMemory for Memory {
    type PhysicalMemory = GuestMemoryMmap<CodeBitmap>;
    type Bitmap = CodeBitmap;

    fn check_range(&self, address: GuestAddress, count: usize, access: Permissions) -> bool {
        GuestMemory::check_range(&self.map, address, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        address: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, CodeBitmap>>, GuestMemoryError> {
        if let Some(hook) = self.before.get() {
            let write = matches!(access, Permissions::Write | Permissions::ReadWrite);
            hook(address.0, count as u64, write);
        }
        GuestMemory::get_slices(&self.map, address, count, access)
    }
}

/// Gives a range of guest memory back to the host.
pub type DiscardHook = Box<dyn Fn(u64, u64) -> io::Result<u64> + Send + Sync>;

/// What guest memory is made of.
struct Backing {
    file: Arc<File>,
    pieces: Vec<RamPiece>,
    /// Whoever else knows of its pages does it instead.
    discard: OnceLock<DiscardHook>,
}

impl Memory {
    /// Gives memory of whole pages within a range back to the host; the guest does not need what is in
    /// it. What it finds there afterwards is zero, or as before. Says how many bytes were given back.
    ///
    /// # Errors
    /// The system refuses; then some pages stay as they are.
    pub fn discard(&self, gpa: u64, len: u64) -> io::Result<u64> {
        const PAGE: u64 = 4096;
        if let Some(discard) = self.backing.discard.get() {
            return discard(gpa, len);
        }
        let mut given = 0;
        for piece in &self.backing.pieces {
            let start = gpa.max(piece.gpa).next_multiple_of(PAGE);
            let end = gpa.saturating_add(len).min(piece.gpa + piece.size) & !(PAGE - 1);
            let len = end.saturating_sub(start);
            if len > 0 {
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                let offset = piece.offset + (start - piece.gpa);
                rustix::fs::fallocate(&self.backing.file, how, offset, len)?;
                given += len;
            }
        }
        Ok(given)
    }
}

/// Called with guest address and length before anything but a vCPU reads RAM, or writes it if that is true.
pub type AccessHook = Arc<OnceLock<Box<dyn Fn(u64, u64, bool) + Send + Sync>>>;

/// Called with guest address and length after a write to RAM by anything but a vCPU.
pub type WriteHook = Arc<OnceLock<Box<dyn Fn(u64, u64) + Send + Sync>>>;

/// Passes writes on to a [`WriteHook`] (a "dirty bitmap" that stores nothing).
#[derive(Clone, Default)]
pub struct CodeBitmap {
    base: u64,
    hook: WriteHook,
}

/// A part of a [`CodeBitmap`].
#[derive(Clone, Copy)]
pub struct CodeBitmapSlice<'a> {
    base: u64,
    hook: &'a WriteHook,
}

fn wrote(hook: &WriteHook, gpa: u64, len: usize) {
    if let Some(hook) = hook.get() {
        hook(gpa, len as u64);
    }
}

impl std::fmt::Debug for CodeBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CodeBitmap({:#x})", self.base)
    }
}

impl std::fmt::Debug for CodeBitmapSlice<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "CodeBitmapSlice({:#x})", self.base)
    }
}

impl<'a> WithBitmapSlice<'a> for CodeBitmap {
    type S = CodeBitmapSlice<'a>;
}

impl Bitmap for CodeBitmap {
    fn mark_dirty(&self, offset: usize, len: usize) {
        wrote(&self.hook, self.base + offset as u64, len);
    }
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
    fn slice_at(&self, offset: usize) -> CodeBitmapSlice<'_> {
        CodeBitmapSlice { base: self.base + offset as u64, hook: &self.hook }
    }
}

impl<'a> WithBitmapSlice<'a> for CodeBitmapSlice<'_> {
    type S = Self;
}

impl BitmapSlice for CodeBitmapSlice<'_> {}

impl Bitmap for CodeBitmapSlice<'_> {
    fn mark_dirty(&self, offset: usize, len: usize) {
        wrote(self.hook, self.base + offset as u64, len);
    }
    fn dirty_at(&self, _offset: usize) -> bool {
        false
    }
    fn slice_at(&self, offset: usize) -> Self {
        Self { base: self.base + offset as u64, hook: self.hook }
    }
}

/// Why guest memory could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// Smaller than anything that boots.
    #[error(
        "{bytes} bytes of guest memory are too few: a machine needs at least {} MiB; \
         give more with --memory", MEMORY_BYTES_MIN >> 20
    )]
    TooSmall {
        /// What was asked for.
        bytes: u64,
    },
    /// More than the host has.
    #[error(
        "{} MiB of guest memory are more than this host has ({} MiB with swap, {from}); \
         give less with --memory", bytes >> 20, host >> 20
    )]
    TooBig {
        /// What was asked for.
        bytes: u64,
        /// What the host has.
        host: u64,
        /// Where that number is from.
        from: &'static str,
    },
    /// Not a whole number of pages.
    #[error("{bytes} bytes of guest memory are not a multiple of 4096; use a suffix as in 512M")]
    Unaligned {
        /// What was asked for.
        bytes: u64,
    },
    /// The operating system refused.
    #[error("{operation} for {bytes} bytes of guest memory at {gpa:#x} failed")]
    Host {
        /// What was tried.
        operation: &'static str,
        /// Guest address of the piece.
        gpa: u64,
        /// Bytes of the piece.
        bytes: u64,
        /// The reason.
        source: io::Error,
    },
    /// The pieces could not be put together.
    #[error("the map of guest memory could not be made: {0}")]
    Map(String),
}

/// The RAM of one machine.
#[derive(Clone)]
pub struct GuestRam {
    memory: Memory,
    file: Arc<File>,
    pieces: Vec<RamPiece>,
    before: AccessHook,
    hook: WriteHook,
    mapping: Arc<Reservation>,
}

/// One contiguous piece of RAM.
#[derive(Clone)]
pub struct RamPiece {
    /// First guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Where it begins in the memfd.
    pub offset: u64,
    /// Where this process has it mapped.
    pub host_address: u64,
}

impl GuestRam {
    /// Makes `bytes` of zeroed RAM.
    ///
    /// # Errors
    /// [`MemoryError`], when the size cannot be or the host refuses.
    pub fn new(bytes: u64) -> Result<Self, MemoryError> {
        if bytes < MEMORY_BYTES_MIN {
            return Err(MemoryError::TooSmall { bytes });
        }
        if !bytes.is_multiple_of(4096) {
            return Err(MemoryError::Unaligned { bytes });
        }
        let (host, from) = host_memory();
        if bytes > host {
            return Err(MemoryError::TooBig { bytes, host, from });
        }
        let hook = WriteHook::default();
        let before = AccessHook::default();
        let low = bytes.min(HOLE_START);
        let mut ranges = vec![(0, low, 0)];
        if bytes > low {
            ranges.push((HIGH_RAM_START, bytes - low, low));
        }
        let fail = |operation, source| MemoryError::Host { operation, gpa: 0, bytes, source };
        let span = ranges.iter().map(|(gpa, size, _)| gpa + size).max().unwrap_or(0);
        let mapping = Reservation::new(span as usize).map_err(|e| fail("mmap", e))?;
        let mapping = Arc::new(mapping);
        let file = Arc::new(ram_file(bytes).map_err(|(op, e)| fail(op, e))?);
        let mut regions = Vec::new();
        let mut pieces = Vec::new();
        for (gpa, size, offset) in ranges {
            let fail =
                |operation, source| MemoryError::Host { operation, gpa, bytes: size, source };
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            let at = mapping
                .map_file(gpa as usize, size as usize, prot, file.as_raw_fd(), offset)
                .map_err(|e| fail("mmap", e))?;
            let bitmap = CodeBitmap { base: gpa, hook: Arc::clone(&hook) };
            let builder = MmapRegionBuilder::new_with_bitmap(size as usize, bitmap)
                .with_mmap_prot(prot)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE);
            // SAFETY: the range was mapped just now, and stays so as long as `Memory` keeps the
            // reservation; parts of it are at most replaced by mappings that can be read.
            let region = unsafe { builder.with_raw_mmap_pointer(at as *mut u8) }
                .build()
                .map_err(|e| fail("mmap", io::Error::other(e)))?;
            pieces.push(RamPiece { gpa, size, offset, host_address: at });
            let region = GuestRegionMmap::new(region, GuestAddress(gpa))
                .ok_or_else(|| MemoryError::Map(format!("the piece at {gpa:#x} is too long")))?;
            regions.push(region);
        }
        let map =
            GuestMemoryMmap::from_regions(regions).map_err(|e| MemoryError::Map(e.to_string()))?;
        let backing =
            Backing { file: Arc::clone(&file), pieces: pieces.clone(), discard: OnceLock::new() };
        let memory = Memory {
            map,
            before: Arc::clone(&before),
            backing: Arc::new(backing),
            _mapping: Arc::clone(&mapping),
        };
        Ok(Self { memory, file, pieces, before, hook, mapping })
    }

    /// The memfd that holds all of it.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Where all of it is mapped, at its guest addresses from the beginning.
    #[must_use]
    pub fn mapping(&self) -> &Arc<Reservation> {
        &self.mapping
    }

    /// Bytes of it.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.pieces.iter().map(|piece| piece.size).sum()
    }

    /// The memory for loaders and devices.
    #[must_use]
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// The pieces, by rising address.
    #[must_use]
    pub fn pieces(&self) -> &[RamPiece] {
        &self.pieces
    }

    /// Where to put the function to be told of accesses before they are made; it can be set once.
    #[must_use]
    pub fn before_access_hook(&self) -> &AccessHook {
        &self.before
    }

    /// Where to put the function to be told of writes that were made; it can be set once.
    #[must_use]
    pub fn write_hook(&self) -> &WriteHook {
        &self.hook
    }

    /// Lets a function give memory back to the host, instead of doing so by the file alone; says
    /// whether there was none before.
    pub fn set_discard(&self, discard: DiscardHook) -> bool {
        self.memory.backing.discard.set(discard).is_ok()
    }

    /// Bytes of RAM below the hole.
    #[must_use]
    pub fn low_bytes(&self) -> u64 {
        self.pieces.first().map_or(0, |piece| piece.size)
    }

    /// Bytes of RAM from 4 GiB.
    #[must_use]
    pub fn high_bytes(&self) -> u64 {
        self.pieces.get(1).map_or(0, |piece| piece.size)
    }

    /// The 64-bit PCI memory window: the first multiple of 1 GiB above all RAM.
    #[must_use]
    pub fn pci_window_64(&self) -> std::ops::Range<u64> {
        let start = (HIGH_RAM_START + self.high_bytes()).next_multiple_of(1 << 30);
        start..start + PCI_WINDOW_64_SIZE
    }
}

/// The last guest address that is RAM.
#[must_use]
pub fn last_address(memory: &Memory) -> u64 {
    memory.map.iter().map(|region| region.last_addr().0).max().unwrap_or(0)
}

/// A file of zeroes for so many bytes of RAM.
///
/// # Errors
/// What the system refuses, and why.
pub fn ram_file(size: u64) -> Result<File, (&'static str, io::Error)> {
    // SAFETY: the name is a constant C string; the call has no other memory effects.
    let fd = unsafe {
        libc::memfd_create(c"berth-ram".as_ptr(), libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING)
    };
    if fd < 0 {
        return Err(("memfd_create", io::Error::last_os_error()));
    }
    // SAFETY: `fd` was just made and belongs to nobody else.
    let file = unsafe { File::from_raw_fd(fd) };
    file.set_len(size).map_err(|e| ("ftruncate", e))?;
    // A shrunk file would turn accesses into SIGBUS.
    let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
    // SAFETY: F_ADD_SEALS takes an int; the file is open.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
        return Err(("sealing the memfd", io::Error::last_os_error()));
    }
    Ok(file)
}

/// Memory that a guest could ever get here: RAM and swap of the host, or less by the control group.
fn host_memory() -> (u64, &'static str) {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = |key: &str| {
        let line = info.lines().find_map(|line| line.strip_prefix(key));
        line.and_then(|rest| rest.trim().strip_suffix("kB")?.trim().parse::<u64>().ok())
    };
    let host = match kib("MemTotal:") {
        Some(total) => (total + kib("SwapTotal:").unwrap_or(0)) << 10,
        None => u64::MAX,
    };
    match cgroup_limit() {
        Some(limit) if limit < host => (limit, "by memory.max of the control group"),
        _ => (host, "by /proc/meminfo"),
    }
}

fn cgroup_limit() -> Option<u64> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    let mut folder = std::path::Path::new("/sys/fs/cgroup").join(path);
    let mut least = None;
    while folder.starts_with("/sys/fs/cgroup") {
        let max = std::fs::read_to_string(folder.join("memory.max")).unwrap_or_default();
        if let Ok(max) = max.trim().parse::<u64>() {
            least = Some(least.map_or(max, |least: u64| least.min(max)));
        }
        folder.pop();
    }
    least
}

#[cfg(test)]
mod tests {
    use super::{GuestRam, MemoryError, host_memory};
    use std::sync::{Arc, Mutex};
    use vm_memory::{Bytes, GuestAddress, GuestMemory};

    #[test]
    fn writes_are_reported_with_their_guest_address() {
        let ram = GuestRam::new(16 << 20).unwrap();
        ram.memory().write_slice(&[1], GuestAddress(0)).unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&seen);
        let hook = Box::new(move |gpa, len| log.lock().unwrap().push((gpa, len)));
        assert!(ram.write_hook().set(hook).is_ok());
        ram.memory().write_slice(&[1, 2, 3], GuestAddress(0x1234)).unwrap();
        ram.memory().write_obj(7u32, GuestAddress(0x5000)).unwrap();
        let write = vm_memory::Permissions::Write;
        let mut slices = ram.memory().get_slices(GuestAddress(0x7000), 64, write).unwrap();
        slices.next().unwrap().unwrap().write_slice(&[5; 8], 16).unwrap();
        ram.memory().read_obj::<u64>(GuestAddress(0)).unwrap();
        assert_eq!(*seen.lock().unwrap(), [(0x1234, 3), (0x5000, 4), (0x7010, 8)]);
    }

    #[test]
    fn sizes_that_cannot_be_are_refused() {
        assert!(matches!(GuestRam::new(0), Err(MemoryError::TooSmall { .. })));
        assert!(matches!(GuestRam::new((64 << 20) + 1), Err(MemoryError::Unaligned { .. })));
        assert!(matches!(GuestRam::new(1 << 62), Err(MemoryError::TooBig { .. })));
        let (host, _) = host_memory();
        assert!(host > 64 << 20 && host < 1 << 60, "{host}");
    }

    #[test]
    fn big_memory_leaves_the_hole_free() {
        // Pages are given on first use, so this costs nothing.
        let Ok(ram) = GuestRam::new(4 << 30) else { return println!("skipped: a small host") };
        assert_eq!((ram.low_bytes(), ram.high_bytes()), (3 << 30, 1 << 30));
        assert_eq!(ram.pci_window_64().start, 5 << 30);
        ram.memory().write_obj(1u8, GuestAddress((5 << 30) - 1)).unwrap();
        assert!(ram.memory().write_obj(1u8, GuestAddress(3 << 30)).is_err());
        assert!(ram.memory().write_obj(1u8, GuestAddress(5 << 30)).is_err());
    }
}
