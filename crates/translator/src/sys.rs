//! The system calls behind the translator's mappings.

use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;

/// A reserved range of host addresses, given back on drop. Pieces are mapped over it.
pub struct Reservation {
    at: u64,
    len: usize,
}

// SAFETY: a range of addresses has no thread affinity.
unsafe impl Send for Reservation {}
// SAFETY: as above; all methods are system calls.
unsafe impl Sync for Reservation {}

fn check(p: *mut libc::c_void) -> io::Result<u64> {
    if p == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(p as u64) }
}

impl Reservation {
    /// Reserves `len` bytes without access.
    pub fn new(len: usize) -> io::Result<Self> {
        // SAFETY: a fresh mapping at an address of the kernel's choice.
        let p = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len,
                libc::PROT_NONE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        Ok(Self { at: check(p)?, len })
    }

    /// First address.
    pub fn addr(&self) -> u64 {
        self.at
    }

    /// Maps a piece of a file over part of the range.
    pub fn map_file(
        &self,
        at: usize,
        len: usize,
        prot: i32,
        fd: i32,
        offset: u64,
    ) -> io::Result<u64> {
        self.map(at..at.saturating_add(len), prot, libc::MAP_SHARED, fd, offset)
    }

    /// Nothing is mapped in so many bytes from the beginning any more.
    pub fn clear(&self, len: usize) -> io::Result<()> {
        let kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        self.map(0..len, libc::PROT_NONE, kind, -1, 0).map(drop)
    }

    /// The same as [`Self::map_file`], also by `MAP_PRIVATE`: what is written is not in the file, of which nobody writes that piece
    /// any more.
    pub(crate) fn map(
        &self,
        range: Range<usize>,
        prot: i32,
        kind: i32,
        fd: i32,
        offset: u64,
    ) -> io::Result<u64> {
        if range.start > range.end || range.end > self.len {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: the target lies inside our own reservation, which nothing else uses.
        let p = unsafe {
            libc::mmap(
                (self.at as usize + range.start) as *mut libc::c_void,
                range.len(),
                prot,
                kind | libc::MAP_FIXED | libc::MAP_NORESERVE,
                fd,
                offset as libc::off_t,
            )
        };
        check(p)
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the range is ours; owners drop the reservation after everything that points in.
        unsafe { libc::munmap(self.at as *mut libc::c_void, self.len) };
    }
}

/// Changes the protection of mapped pages of ours.
pub fn mprotect(at: u64, len: usize, prot: i32) -> io::Result<()> {
    // SAFETY: callers pass pages of their own mappings; access rights only.
    if unsafe { libc::mprotect(at as *mut libc::c_void, len, prot) } == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Maps pages of ours that have a file, as reading them would; those that are not in memory are read.
pub fn populate(at: u64, len: usize) -> io::Result<()> {
    for advice in [libc::MADV_WILLNEED, libc::MADV_POPULATE_READ] {
        // SAFETY: callers pass pages of their own mappings; what they hold does not change.
        if unsafe { libc::madvise(at as *mut libc::c_void, len, advice) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// A new anonymous file of `len` bytes (sparse).
pub fn memfd(name: &std::ffi::CStr, len: u64) -> io::Result<OwnedFd> {
    // SAFETY: plain system call with a valid string.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: just created, owned by nobody else.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: plain system call.
    if unsafe { libc::ftruncate(fd.as_raw_fd(), len as libc::off_t) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd)
}

/// Writes all bytes at a place in a file.
pub fn write_at(fd: i32, bytes: &[u8], offset: u64) -> io::Result<()> {
    transfer(bytes.len(), io::ErrorKind::WriteZero, |done| {
        let rest = bytes.get(done..).unwrap_or_default();
        let offset = (offset + done as u64) as libc::off_t;
        // SAFETY: plain system call with a valid slice.
        unsafe { libc::pwrite(fd, rest.as_ptr().cast(), rest.len(), offset) }
    })
}

/// Reads as many bytes as there is room for from a place in a file.
pub fn read_at(fd: i32, bytes: &mut [u8], offset: u64) -> io::Result<()> {
    transfer(bytes.len(), io::ErrorKind::UnexpectedEof, |done| {
        let rest = bytes.get_mut(done..).unwrap_or_default();
        let offset = (offset + done as u64) as libc::off_t;
        // SAFETY: plain system call with a valid, writable slice.
        unsafe { libc::pread(fd, rest.as_mut_ptr().cast(), rest.len(), offset) }
    })
}

/// Calls `part` with how much is done until `len` bytes are; one that does none of them is an `end`.
fn transfer(
    len: usize,
    end: io::ErrorKind,
    mut part: impl FnMut(usize) -> isize,
) -> io::Result<()> {
    let mut done = 0;
    while done < len {
        match usize::try_from(part(done)) {
            Ok(0) => return Err(end.into()),
            Ok(count) => done += count,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err(error),
            },
        }
    }
    Ok(())
}

/// Frees the pages of a range of a sparse file; they read as zero afterwards.
pub fn punch_hole(fd: i32, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: plain system call.
    let r = unsafe {
        libc::fallocate(
            fd,
            libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE,
            offset as libc::off_t,
            len as libc::off_t,
        )
    };
    if r == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Where a file of `len` bytes has no data.
pub fn holes(fd: i32, len: u64) -> io::Result<Vec<Range<u64>>> {
    let mut holes = Vec::new();
    let mut at = 0;
    while at < len {
        // SAFETY: plain system call.
        let data = unsafe { libc::lseek(fd, at as libc::off_t, libc::SEEK_DATA) };
        let data = match u64::try_from(data) {
            Ok(data) => data.min(len),
            Err(_) => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ENXIO) => len,
                error => return Err(error),
            },
        };
        if data > at {
            holes.push(at..data);
        }
        // SAFETY: plain system call.
        let hole = unsafe { libc::lseek(fd, data as libc::off_t, libc::SEEK_HOLE) };
        at = match u64::try_from(hole) {
            Ok(hole) if data < len => hole,
            _ => len,
        };
    }
    Ok(holes)
}

/// The build ID of the running program (the note NT_GNU_BUILD_ID of its linker), if it has one.
pub fn build_id() -> Option<[u64; 3]> {
    static ID: std::sync::OnceLock<Option<[u64; 3]>> = std::sync::OnceLock::new();

    unsafe extern "C" fn look(
        info: *mut libc::dl_phdr_info,
        _size: usize,
        found: *mut libc::c_void,
    ) -> i32 {
        const PT_NOTE: u32 = 4;
        // SAFETY: the C library gives a valid description of a loaded object, and what `build_id` gave
        // it.
        let (info, found) = unsafe { (&*info, &mut *found.cast::<Option<[u64; 3]>>()) };
        // SAFETY: so many program headers are there.
        let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
        for header in headers.iter().filter(|header| header.p_type == PT_NOTE) {
            let at = (info.dlpi_addr + header.p_vaddr) as *const u8;
            // SAFETY: a segment that is loaded, and stays so.
            let notes = unsafe { std::slice::from_raw_parts(at, header.p_memsz as usize) };
            *found = found.or_else(|| id_in(notes));
        }
        // The first object is the program; no other is looked at.
        1
    }

    *ID.get_or_init(|| {
        let mut found: Option<[u64; 3]> = None;
        // SAFETY: the callback gets the pointer to what outlives the call.
        unsafe { libc::dl_iterate_phdr(Some(look), (&raw mut found).cast()) };
        found
    })
}

/// The build ID among ELF notes (System V ABI, "Note Section").
fn id_in(mut notes: &[u8]) -> Option<[u64; 3]> {
    const NT_GNU_BUILD_ID: u32 = 3;
    let word =
        |bytes: &[u8], at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
    loop {
        let name_len = word(notes, 0)? as usize;
        let (len, kind) = (word(notes, 4)? as usize, word(notes, 8)?);
        let begin = 12 + name_len.next_multiple_of(4);
        let bytes = notes.get(begin..begin.checked_add(len)?)?;
        if kind == NT_GNU_BUILD_ID && notes.get(12..16) == Some(b"GNU\0") {
            let mut id = [0; 3];
            for (number, part) in id.iter_mut().zip(bytes.chunks(8)) {
                *number = part.iter().fold(0, |id, &byte| id << 8 | u64::from(byte));
            }
            return Some(id);
        }
        notes = notes.get(begin + len.next_multiple_of(4)..)?;
    }
}

/// Integers that are atomic and may be zero.
///
/// # Safety
/// All bytes zero is a value of the type.
pub unsafe trait Zero {}

// SAFETY: atomics have the representation of their integer.
unsafe impl Zero for std::sync::atomic::AtomicU8 {}
// SAFETY: as above.
unsafe impl Zero for std::sync::atomic::AtomicU16 {}
// SAFETY: as above.
unsafe impl Zero for std::sync::atomic::AtomicU32 {}
// SAFETY: as above.
unsafe impl Zero for std::sync::atomic::AtomicU64 {}

/// A table of zeroes that takes no memory where it is not used.
pub fn zeroes<T: Zero>(len: usize) -> Box<[T]> {
    // SAFETY: zeroes are values of the type.
    unsafe { Box::new_zeroed_slice(len).assume_init() }
}
