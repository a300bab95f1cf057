//! Guest RAM as the translator maps it.
//!
//! Three views of the same files, each at `base + gpa`:
//!
//! * `raw`: always writable, for our own accesses (page walks, helpers). Whoever writes through it
//!   reports the write to [`crate::shared::Shared::ram_written`].
//! * `rw`: what generated code writes to. Pages with translations are write-protected here, so that
//!   a store to translated code traps.
//! * `ro`: read-only, for guest pages that are not writable or not dirty yet.
//!
//! All accesses race with other vCPUs and devices by design; they are volatile or atomic.

use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use berth_x86::PhysMem;

use crate::sys::{self, Reservation};
use crate::{RamSlot, SetupError};

/// Page size of the host and of the smallest guest mapping.
pub const PAGE: u64 = 4096;

/// The mapped guest RAM.
pub struct Ram {
    slots: Vec<(u64, u64)>,
    span: u64,
    raw: Reservation,
    rw: Reservation,
    ro: Reservation,
}

impl Ram {
    /// Maps the slots.
    ///
    /// # Errors
    /// When address space or a mapping is refused.
    pub fn new(slots: &[RamSlot<'_>]) -> Result<Self, SetupError> {
        let span = slots.iter().map(|s| s.gpa.saturating_add(s.size)).max().unwrap_or(0);
        let reserve = |what| {
            Reservation::new(span as usize + (1 << 21))
                .map_err(|source| SetupError::Map { what, source })
        };
        let raw = reserve("guest RAM")?;
        let rw = reserve("guest RAM (writable view)")?;
        let ro = reserve("guest RAM (read-only view)")?;
        let mut list = Vec::new();
        for s in slots {
            for (view, prot) in [
                (&raw, libc::PROT_READ | libc::PROT_WRITE),
                (&rw, libc::PROT_READ | libc::PROT_WRITE),
                (&ro, libc::PROT_READ),
            ] {
                view.map_file(s.gpa as usize, s.size as usize, prot, s.fd.as_raw_fd(), s.offset)
                    .map_err(|source| SetupError::Map { what: "a guest RAM slot", source })?;
            }
            list.push((s.gpa, s.size));
        }
        Ok(Self { slots: list, span, raw, rw, ro })
    }

    /// One past the highest RAM address.
    pub fn span(&self) -> u64 {
        self.span
    }

    /// Whether all of `len` bytes at `gpa` are RAM of one slot.
    #[inline]
    pub fn contains(&self, gpa: u64, len: u64) -> bool {
        self.slots
            .iter()
            .any(|&(base, size)| gpa >= base && len <= size && gpa - base <= size - len)
    }

    /// Host address of a RAM byte in the view generated code may write to.
    #[inline]
    pub fn rw_addr(&self, gpa: u64) -> u64 {
        self.rw.addr() + gpa
    }

    /// Host address of a RAM byte in the read-only view.
    #[inline]
    pub fn ro_addr(&self, gpa: u64) -> u64 {
        self.ro.addr() + gpa
    }

    /// Host address of a RAM byte in the view that is never protected.
    #[inline]
    pub fn raw_addr(&self, gpa: u64) -> u64 {
        self.raw.addr() + gpa
    }

    /// Protects or unprotects a page of the writable view.
    pub fn protect(&self, gpa: u64, len: u64, writable: bool) -> std::io::Result<()> {
        let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        sys::mprotect(self.rw_addr(gpa), len as usize, prot)
    }

    /// Makes the whole writable view writable again.
    pub fn unprotect_all(&self) {
        for &(gpa, size) in &self.slots {
            let _ = self.protect(gpa, size, true);
        }
    }

    /// Copies RAM out; the caller has checked [`Ram::contains`].
    #[inline]
    pub fn read(&self, gpa: u64, buf: &mut [u8]) {
        assert!(self.contains(gpa, buf.len() as u64), "caller checks that this is RAM");
        let src = self.raw_addr(gpa) as *const u8;
        // SAFETY: the range is inside a mapped slot (asserted); guest memory may change under us,
        // which is fine for bytes.
        unsafe { ptr::copy_nonoverlapping(src, buf.as_mut_ptr(), buf.len()) }
    }

    /// Copies into RAM; the caller has checked [`Ram::contains`] and reports the write.
    #[inline]
    pub fn write(&self, gpa: u64, data: &[u8]) {
        assert!(self.contains(gpa, data.len() as u64), "caller checks that this is RAM");
        let dst = self.raw_addr(gpa) as *mut u8;
        // SAFETY: the range is inside a mapped, writable slot (asserted). Aligned powers of two are
        // written by one store so that other vCPUs never see half of them.
        unsafe {
            match *data {
                [a] => dst.write_volatile(a),
                [a, b] if gpa & 1 == 0 => {
                    dst.cast::<u16>().write_volatile(u16::from_le_bytes([a, b]));
                }
                [a, b, c, d] if gpa & 3 == 0 => {
                    dst.cast::<u32>().write_volatile(u32::from_le_bytes([a, b, c, d]));
                }
                [a, b, c, d, e, f, g, h] if gpa & 7 == 0 => {
                    dst.cast::<u64>().write_volatile(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
                }
                _ => ptr::copy_nonoverlapping(data.as_ptr(), dst, data.len()),
            }
        }
    }

    /// Copies within RAM, `len` bytes, ranges checked by the caller; they may overlap.
    pub fn copy(&self, src: u64, dst: u64, len: u64) {
        assert!(self.contains(src, len) && self.contains(dst, len));
        // SAFETY: both ranges are inside mapped slots (asserted).
        unsafe {
            ptr::copy(self.raw_addr(src) as *const u8, self.raw_addr(dst) as *mut u8, len as usize);
        }
    }

    /// Fills `len` bytes by a repeated pattern of 1, 2, 4 or 8 bytes.
    pub fn fill(&self, gpa: u64, len: u64, pattern: &[u8]) {
        assert!(self.contains(gpa, len));
        let p = self.raw_addr(gpa) as *mut u8;
        // SAFETY: the range is inside a mapped slot (asserted).
        let bytes = unsafe { std::slice::from_raw_parts_mut(p, len as usize) };
        if let [first, rest @ ..] = pattern {
            if rest.iter().all(|b| b == first) {
                bytes.fill(*first);
            } else {
                for chunk in bytes.chunks_exact_mut(pattern.len()) {
                    chunk.copy_from_slice(pattern);
                }
            }
        }
    }

    #[inline]
    fn atomic64(&self, gpa: u64) -> Option<&AtomicU64> {
        if gpa & 7 != 0 || !self.contains(gpa, 8) {
            return None;
        }
        // SAFETY: aligned, inside a mapped slot, lives as long as the mapping; all concurrent
        // accesses are by hardware atomics or plain guest stores (TSO).
        Some(unsafe { AtomicU64::from_ptr(self.raw_addr(gpa) as *mut u64) })
    }

    #[inline]
    fn atomic32(&self, gpa: u64) -> Option<&AtomicU32> {
        if gpa & 3 != 0 || !self.contains(gpa, 4) {
            return None;
        }
        // SAFETY: as in `atomic64`.
        Some(unsafe { AtomicU32::from_ptr(self.raw_addr(gpa) as *mut u32) })
    }
}

impl PhysMem for Ram {
    #[inline]
    fn read_u64(&self, gpa: u64) -> u64 {
        self.atomic64(gpa).map_or(!0, |a| a.load(Ordering::Relaxed))
    }
    #[inline]
    fn read_u32(&self, gpa: u64) -> u32 {
        self.atomic32(gpa).map_or(!0, |a| a.load(Ordering::Relaxed))
    }
    fn cas_u64(&self, gpa: u64, old: u64, new: u64) -> bool {
        self.atomic64(gpa).is_none_or(|a| {
            a.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        })
    }
    fn cas_u32(&self, gpa: u64, old: u32, new: u32) -> bool {
        self.atomic32(gpa).is_none_or(|a| {
            a.compare_exchange(old, new, Ordering::SeqCst, Ordering::Relaxed).is_ok()
        })
    }
}
