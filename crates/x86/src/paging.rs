//! Translation of linear addresses (Intel SDM vol. 3, chapter 5; AMD APM vol. 2, chapter 5).
//!
//! [`walk`] is what a TLB miss costs: no paging, 32-bit two-level paging with 4 MiB pages and PSE-36,
//! PAE paging from the loaded PDPTEs, and 4-level paging with 2 MiB and 1 GiB pages. It sets accessed
//! and dirty bits and reports what a TLB entry may hold. It caches nothing.
//!
//! Accessed bits are set on the entries of a walk only when the access is permitted, dirty only by
//! permitted writes (the manual allows both choices for accessed bits). The bits are set by
//! compare-and-swap; when an entry changed meanwhile, the walk starts again from the root.

use crate::platform::{Access, PhysMem};
use crate::state::{CpuState, Exception, cr0, cr4, efer, flags};

/// Physical address bits of the guest: address bits from here up to bit 51 are reserved in
/// page-table entries and in CR3.
pub const PHYS_BITS: u32 = 46;

/// How often a walk starts again because an entry changed. After that the entries are used without
/// setting bits: only tables in memory that drops writes get there.
const RETRIES_MAX: u32 = 64;

const P: u64 = 1 << 0;
const RW: u64 = 1 << 1;
const US: u64 = 1 << 2;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const G: u64 = 1 << 8;
const NX: u64 = 1 << 63;
const ADDRESS: u64 = ((1 << PHYS_BITS) - 1) & !0xfff;
/// Reserved in every 8-byte entry: address bits the processor does not have.
const RESERVED_ADDRESS: u64 = ((1 << 52) - 1) & !((1 << PHYS_BITS) - 1);
/// Reserved in PAE entries, ignored in 4-level paging.
const RESERVED_PAE: u64 = 0x7ff << 52;

/// Bits of a page-fault error code (Intel SDM vol. 3, 5.7).
pub mod pf {
    /// The page was present: a rights violation or a reserved bit.
    pub const P: u32 = 1 << 0;
    /// The access was a write.
    pub const W: u32 = 1 << 1;
    /// The access was made with user rights.
    pub const U: u32 = 1 << 2;
    /// A reserved bit was set in an entry.
    pub const RSVD: u32 = 1 << 3;
    /// The access was an instruction fetch (reported only with NX or SMEP on).
    pub const ID: u32 = 1 << 4;
}

/// What an access does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Reads data.
    Read,
    /// Writes data (or reads to write).
    Write,
    /// Fetches an instruction.
    Fetch,
}

/// Everything about an access that its permission depends on, apart from the control registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rights {
    /// What it does.
    pub kind: Kind,
    /// A user-mode access (an explicit access at CPL 3).
    pub user: bool,
    /// SMAP forbids this access to touch user pages. Never set together with `user`; has no effect
    /// on fetches.
    pub smap: bool,
}

impl Rights {
    /// An explicit access of the running code: user at CPL 3; at CPL 0 to 2 under SMAP unless
    /// EFLAGS.AC is set.
    #[must_use]
    #[inline]
    pub const fn explicit(cpu: &CpuState, kind: Kind) -> Self {
        let user = cpu.cpl() == 3;
        let smap = !user && cpu.cr4 & cr4::SMAP != 0 && cpu.rflags & flags::AC == 0;
        Self { kind, user, smap }
    }

    /// An implicit access to a system structure: supervisor at any CPL, under SMAP whatever
    /// EFLAGS.AC says.
    #[must_use]
    #[inline]
    pub const fn system(cpu: &CpuState, kind: Kind) -> Self {
        Self { kind, user: false, smap: cpu.cr4 & cr4::SMAP != 0 }
    }

    /// The rights of a [`crate::LinearMem`] access.
    #[must_use]
    #[inline]
    pub const fn of(cpu: &CpuState, access: Access, kind: Kind) -> Self {
        match access {
            Access::Current => Self::explicit(cpu, kind),
            Access::System => Self::system(cpu, kind),
        }
    }

    /// The error code of a page fault of this access, without the P and RSVD bits.
    const fn code(self, cpu: &CpuState) -> u32 {
        let mut code = 0;
        if self.user {
            code |= pf::U;
        }
        match self.kind {
            Kind::Read => {}
            Kind::Write => code |= pf::W,
            Kind::Fetch => {
                let nx = cpu.cr4 & cr4::PAE != 0 && cpu.efer & efer::NXE != 0;
                if nx || cpu.cr4 & cr4::SMEP != 0 {
                    code |= pf::ID;
                }
            }
        }
        code
    }

    /// Whether a page with these combined rights may be accessed.
    const fn permitted(self, cpu: &CpuState, us: bool, rw: bool, nx: bool) -> bool {
        if self.user {
            us && match self.kind {
                Kind::Read => true,
                Kind::Write => rw,
                Kind::Fetch => !nx,
            }
        } else {
            match self.kind {
                Kind::Read => !(us && self.smap),
                Kind::Write => !(us && self.smap) && (rw || cpu.cr0 & cr0::WP == 0),
                Kind::Fetch => !(nx || us && cpu.cr4 & cr4::SMEP != 0),
            }
        }
    }
}

/// The result of a walk: where the byte is and what the mapping allows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Walk {
    /// Guest physical address of the exact byte.
    pub gpa: u64,
    /// Size of the guest's mapping: 4 KiB, 2 MiB, 4 MiB or 1 GiB (4 KiB with paging off).
    pub page_bytes: u64,
    /// User accesses are allowed at all levels.
    pub readable_user: bool,
    /// Writes are allowed at all levels.
    pub writable: bool,
    /// Fetches are forbidden at some level.
    pub nx: bool,
    /// The leaf is global and CR4.PGE is set.
    pub global: bool,
    /// The leaf's dirty bit is set after this walk.
    pub dirty: bool,
}

/// Whether bits 63 to 47 of a linear address are all the same.
#[must_use]
#[inline]
pub const fn canonical(va: u64) -> bool {
    ((va << 16) as i64 >> 16) as u64 == va
}

/// Translates `va` for an access, setting accessed and dirty bits.
///
/// Outside long mode only the low 32 bits of `va` count. In long mode the caller has checked that
/// `va` is canonical.
///
/// # Errors
/// #PF with its error code and CR2.
#[inline]
pub fn walk<M: PhysMem + ?Sized>(
    mem: &M,
    cpu: &CpuState,
    va: u64,
    rights: Rights,
) -> Result<Walk, Exception> {
    if cpu.long_mode() {
        let root = cpu.cr3 & ADDRESS;
        return walk_wide(mem, cpu, va, rights, Tree { root, levels: 4, reserved: 0 });
    }
    let va = va & 0xffff_ffff;
    if !cpu.paging() {
        return Ok(Walk {
            gpa: va,
            page_bytes: 1 << 12,
            readable_user: true,
            writable: true,
            nx: false,
            global: false,
            dirty: true,
        });
    }
    if cpu.cr4 & cr4::PAE == 0 {
        return walk_32(mem, cpu, va, rights);
    }
    let pdpte = cpu.pdpte[(va >> 30) as usize & 3];
    if pdpte & P == 0 {
        return Err(Exception::pf(va, rights.code(cpu)));
    }
    let root = pdpte & ADDRESS;
    walk_wide(mem, cpu, va, rights, Tree { root, levels: 2, reserved: RESERVED_PAE })
}

/// Translates `va` without any effect: what a TLB could hold of it already. `None` when an entry is
/// absent, malformed or not accessed yet, so that a walk would fault or write. Knows 4-level paging
/// and no paging; `None` in other modes.
#[must_use]
pub fn peek<M: PhysMem + ?Sized>(mem: &M, cpu: &CpuState, va: u64) -> Option<Walk> {
    if !cpu.paging() {
        return walk(mem, cpu, va, Rights { kind: Kind::Read, user: false, smap: false }).ok();
    }
    if !cpu.long_mode() || !canonical(va) {
        return None;
    }
    let mut reserved = RESERVED_ADDRESS;
    if cpu.efer & efer::NXE == 0 {
        reserved |= NX;
    }
    let (mut table, mut all, mut any) = (cpu.cr3 & ADDRESS, RW | US, 0);
    for level in (1..=4u32).rev() {
        let shift = 3 + 9 * level;
        let entry = mem.read_u64(table + ((va >> shift) & 0x1ff) * 8);
        let large = level > 1 && level < 4 && entry & PS != 0;
        let offset = (1 << shift) - 1;
        let bad = match (level, large) {
            (4, _) => reserved | PS,
            (_, true) => reserved | offset & !0x1fff,
            _ => reserved,
        };
        if entry & (P | A) != P | A || entry & bad != 0 {
            return None;
        }
        all &= entry;
        any |= entry;
        if large || level == 1 {
            return Some(Walk {
                gpa: (entry & ADDRESS & !offset) | (va & offset),
                page_bytes: 1 << shift,
                readable_user: all & US != 0,
                writable: all & RW != 0,
                nx: any & NX != 0,
                global: entry & G != 0 && cpu.cr4 & cr4::PGE != 0,
                dirty: entry & D != 0,
            });
        }
        table = entry & ADDRESS;
    }
    None
}

/// Where a walk of 8-byte entries begins.
struct Tree {
    root: u64,
    levels: u32,
    reserved: u64,
}

fn walk_wide<M: PhysMem + ?Sized>(
    mem: &M,
    cpu: &CpuState,
    va: u64,
    rights: Rights,
    tree: Tree,
) -> Result<Walk, Exception> {
    let mut reserved = RESERVED_ADDRESS | tree.reserved;
    if cpu.efer & efer::NXE == 0 {
        reserved |= NX;
    }
    let mut attempt = 0;
    loop {
        let mut path = [(0u64, 0u64); 4];
        let mut depth = 0;
        let mut table = tree.root;
        let mut level = tree.levels;
        let mut all = RW | US;
        let mut any = 0;
        let shift = loop {
            let shift = 3 + 9 * level;
            let at = table + ((va >> shift) & 0x1ff) * 8;
            let entry = mem.read_u64(at);
            if entry & P == 0 {
                return Err(Exception::pf(va, rights.code(cpu)));
            }
            let large = level > 1 && level < 4 && entry & PS != 0;
            let mut bad = reserved;
            if level == 4 {
                bad |= PS;
            } else if large {
                bad |= ((1 << shift) - 1) & !0x1fff;
            }
            if entry & bad != 0 {
                return Err(Exception::pf(va, rights.code(cpu) | pf::P | pf::RSVD));
            }
            all &= entry;
            any |= entry;
            path[depth & 3] = (at, entry);
            depth += 1;
            if large || level == 1 {
                break shift;
            }
            table = entry & ADDRESS;
            level -= 1;
        };
        let (us, rw, nx) = (all & US != 0, all & RW != 0, any & NX != 0);
        if !rights.permitted(cpu, us, rw, nx) {
            return Err(Exception::pf(va, rights.code(cpu) | pf::P));
        }
        let write = rights.kind == Kind::Write;
        let leaf = depth - 1;
        let mut raced = false;
        for (i, &(at, entry)) in path.iter().enumerate().take(depth) {
            let want = entry | A | if i == leaf && write { D } else { 0 };
            if want != entry && !mem.cas_u64(at, entry, want) {
                raced = true;
                break;
            }
        }
        if raced && attempt < RETRIES_MAX {
            attempt += 1;
            continue;
        }
        let entry = path[leaf & 3].1;
        let offset = (1 << shift) - 1;
        return Ok(Walk {
            gpa: (entry & ADDRESS & !offset) | (va & offset),
            page_bytes: 1 << shift,
            readable_user: us,
            writable: rw,
            nx,
            global: entry & G != 0 && cpu.cr4 & cr4::PGE != 0,
            dirty: write || entry & D != 0,
        });
    }
}

fn walk_32<M: PhysMem + ?Sized>(
    mem: &M,
    cpu: &CpuState,
    va: u64,
    rights: Rights,
) -> Result<Walk, Exception> {
    let write = rights.kind == Kind::Write;
    let absent = || Exception::pf(va, rights.code(cpu));
    let mut attempt = 0;
    loop {
        let pde_at = (cpu.cr3 & 0xffff_f000) + (va >> 22) * 4;
        let pde = mem.read_u32(pde_at);
        if u64::from(pde) & P == 0 {
            return Err(absent());
        }
        let large = u64::from(pde) & PS != 0 && cpu.cr4 & cr4::PSE != 0;
        let (leaf_at, leaf, all) = if large {
            if pde & (1 << 21) != 0 {
                return Err(Exception::pf(va, rights.code(cpu) | pf::P | pf::RSVD));
            }
            (pde_at, pde, u64::from(pde))
        } else {
            let at = u64::from(pde & 0xffff_f000) + ((va >> 12) & 0x3ff) * 4;
            let pte = mem.read_u32(at);
            if u64::from(pte) & P == 0 {
                return Err(absent());
            }
            (at, pte, u64::from(pde & pte))
        };
        let (us, rw) = (all & US != 0, all & RW != 0);
        if !rights.permitted(cpu, us, rw, false) {
            return Err(Exception::pf(va, rights.code(cpu) | pf::P));
        }
        let mut done = true;
        if !large && pde & A as u32 == 0 {
            done = mem.cas_u32(pde_at, pde, pde | A as u32);
        }
        let want = leaf | (A as u32) | if write { D as u32 } else { 0 };
        if done && want != leaf {
            done = mem.cas_u32(leaf_at, leaf, want);
        }
        if !done && attempt < RETRIES_MAX {
            attempt += 1;
            continue;
        }
        let leaf64 = u64::from(leaf);
        let (gpa, page_bytes) = if large {
            // PSE-36: bits 20 to 13 of the entry are bits 39 to 32 of the address.
            let high = (leaf64 >> 13 & 0xff) << 32;
            (high | (leaf64 & 0xffc0_0000) | (va & 0x3f_ffff), 1 << 22)
        } else {
            ((leaf64 & 0xffff_f000) | (va & 0xfff), 1 << 12)
        };
        return Ok(Walk {
            gpa,
            page_bytes,
            readable_user: us,
            writable: rw,
            nx: false,
            global: leaf64 & G != 0 && cpu.cr4 & cr4::PGE != 0,
            dirty: write || leaf64 & D != 0,
        });
    }
}

/// Reads the four PDPTEs that CR3 points to, for a MOV to CR0, CR3 or CR4 with PAE paging outside
/// long mode (Intel SDM vol. 3, 5.4.1).
///
/// # Errors
/// #GP(0) when a present entry has a reserved bit set.
pub fn load_pdptes<M: PhysMem + ?Sized>(mem: &M, cpu: &CpuState) -> Result<[u64; 4], Exception> {
    const RESERVED: u64 = 0b1_1110_0110 | !((1 << PHYS_BITS) - 1);
    let base = cpu.cr3 & 0xffff_ffe0;
    let mut entries = [0; 4];
    for (i, entry) in (0u64..).zip(entries.iter_mut()) {
        *entry = mem.read_u64(base + i * 8);
        if *entry & P != 0 && *entry & RESERVED != 0 {
            return Err(Exception::gp(0));
        }
    }
    Ok(entries)
}

#[cfg(test)]
#[path = "paging_tests.rs"]
mod tests;
