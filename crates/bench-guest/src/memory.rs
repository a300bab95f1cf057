//! Memory blocks and strings: the C library's own functions, which choose SSE or AVX by what the
//! processor says it has, and the string instructions.

use std::arch::asm;
use std::hint::black_box;

use crate::row::{Group, Row, Work, row};

const LARGE: usize = 64 << 10;
const PAGE: usize = 4 << 10;

/// The rows of this module.
pub const ROWS: &[Row] = &[
    row("memcpy-64k", Group::Memory, 20_000, memcpy_64k),
    row("memcpy-100", Group::Memory, 10_000_000, memcpy_100),
    row("memset-64k", Group::Memory, 40_000, memset_64k),
    row("rep-movs-4k", Group::Memory, 600_000, rep_movs_4k),
    row("rep-movs-32", Group::Memory, 3_000_000, rep_movs_32),
    row("rep-stos-4k", Group::Memory, 800_000, rep_stos_4k),
    row("repne-scas-1k", Group::Memory, 80_000, repne_scas_1k),
    row("strlen-1000", Group::Memory, 3_000_000, strlen_1000),
    row("memchr-4k", Group::Memory, 1_000_000, memchr_4k),
];

fn text(len: usize) -> Vec<u8> {
    (0..len).map(|i| b'a' + (i % 25) as u8).collect()
}

fn copy(len: usize, ops: u64) -> Result<Work, String> {
    let mut from = text(len + 64);
    let mut to = vec![0_u8; len + 64];
    Ok(Box::new(move || {
        let mut sum = 0_u64;
        for i in 0..ops {
            // Every alignment there is.
            let (a, b) = (((i * 5) & 31) as usize, ((i * 3) & 31) as usize);
            from[a] = i as u8;
            black_box(&mut to[b..b + len]).copy_from_slice(black_box(&from[a..a + len]));
            sum = sum.wrapping_add(u64::from(to[b]) + u64::from(to[b + len - 1]));
        }
        sum
    }))
}

fn memcpy_64k(ops: u64) -> Result<Work, String> {
    copy(LARGE, ops)
}

fn memcpy_100(ops: u64) -> Result<Work, String> {
    copy(100, ops)
}

fn memset_64k(ops: u64) -> Result<Work, String> {
    let mut to = vec![0_u8; LARGE];
    Ok(Box::new(move || {
        let mut sum = 0_u64;
        for i in 0..ops {
            black_box(&mut to[..]).fill(i as u8);
            sum = sum.wrapping_add(u64::from(black_box(&to)[LARGE - 1]));
        }
        sum
    }))
}

fn rep_movs(len: usize, ops: u64) -> Result<Work, String> {
    let mut from = text(len);
    let mut to = vec![0_u8; len];
    Ok(Box::new(move || {
        let mut sum = 0_u64;
        for i in 0..ops {
            from[len - 1] = i as u8;
            // SAFETY: both have `len` bytes; the ABI leaves the direction flag clear.
            unsafe {
                asm!("rep movsb", inout("rcx") len => _, inout("rsi") from.as_ptr() => _,
                     inout("rdi") to.as_mut_ptr() => _, options(nostack, preserves_flags));
            }
            sum = sum.wrapping_add(u64::from(to[len - 1]));
        }
        sum
    }))
}

fn rep_movs_4k(ops: u64) -> Result<Work, String> {
    rep_movs(PAGE, ops)
}

fn rep_movs_32(ops: u64) -> Result<Work, String> {
    rep_movs(32, ops)
}

fn rep_stos_4k(ops: u64) -> Result<Work, String> {
    let mut to = vec![0_u64; PAGE / 8];
    Ok(Box::new(move || {
        let mut sum = 0_u64;
        for i in 0..ops {
            // SAFETY: the buffer has as many quadwords; the direction flag is clear.
            unsafe {
                asm!("rep stosq", inout("rcx") PAGE / 8 => _, in("rax") i,
                     inout("rdi") to.as_mut_ptr() => _, options(nostack, preserves_flags));
            }
            sum = sum.wrapping_add(to[PAGE / 8 - 1]);
        }
        sum
    }))
}

fn repne_scas_1k(ops: u64) -> Result<Work, String> {
    let mut bytes = text(1024);
    Ok(Box::new(move || {
        let mut sum = 0_u64;
        for i in 0..ops {
            let at = 1000 + (i & 15) as usize;
            bytes[at] = 0;
            let left: usize;
            // SAFETY: it stops within the buffer, at a zero or its end; the direction flag is clear.
            unsafe {
                asm!("repne scasb", inout("rcx") bytes.len() => left, in("al") 0_u8,
                     inout("rdi") bytes.as_ptr() => _, options(nostack, readonly));
            }
            bytes[at] = b'a';
            sum = sum.wrapping_add(left as u64);
        }
        sum
    }))
}

fn strlen_1000(ops: u64) -> Result<Work, String> {
    let mut bytes = text(1024);
    Ok(Box::new(move || {
        let mut sum = 0_u64;
        for i in 0..ops {
            let at = 1000 + (i & 15) as usize;
            bytes[at] = 0;
            // SAFETY: there is a zero before the end.
            sum =
                sum.wrapping_add(unsafe { libc::strlen(black_box(bytes.as_ptr()).cast()) } as u64);
            bytes[at] = b'a';
        }
        sum
    }))
}

fn memchr_4k(ops: u64) -> Result<Work, String> {
    let mut bytes = text(PAGE);
    Ok(Box::new(move || {
        let mut sum = 0_u64;
        for i in 0..ops {
            let at = PAGE - 1 - (i & 63) as usize;
            bytes[at] = b'#';
            let start: *const libc::c_void = black_box(bytes.as_ptr()).cast();
            // SAFETY: the buffer has that many bytes.
            let found = unsafe { libc::memchr(start, libc::c_int::from(b'#'), PAGE) };
            sum = sum.wrapping_add((found.addr() - start.addr()) as u64);
            bytes[at] = b'a';
        }
        sum
    }))
}
