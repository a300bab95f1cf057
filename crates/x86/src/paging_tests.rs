//! Page-walk tests: every level's bits, rights, reserved bits, accessed and dirty bits, races.

use super::{A, D, G, Kind, NX, P, PS, RW, Rights, US, Walk, canonical, load_pdptes, walk};
use crate::fake::{Flat, long, protected};
use crate::platform::Access;
use crate::state::{CpuState, Exception, cr0, cr4, efer, flags};

const PML4: u64 = 0x1_0000;
const PDPT: u64 = 0x1_1000;
const PD: u64 = 0x1_2000;
const PT: u64 = 0x1_3000;
const VA: u64 = 0xffff_8123_4567_8abc;
const FRAME: u64 = 0xabc_d000;
const ALL: u64 = P | RW | US;

fn index(level: u32) -> u64 {
    (VA >> (3 + 9 * level) & 0x1ff) * 8
}

/// Four levels down to `FRAME`, with rights `ALL`.
fn tables() -> (CpuState, Flat) {
    let mem = Flat::new();
    mem.put64(PML4 + index(4), PDPT | ALL);
    mem.put64(PDPT + index(3), PD | ALL);
    mem.put64(PD + index(2), PT | ALL);
    mem.put64(PT + index(1), FRAME | ALL);
    let mut cpu = long(0);
    cpu.cr3 = PML4 | 0x18;
    (cpu, mem)
}

fn user(kind: Kind) -> Rights {
    Rights { kind, user: true, smap: false }
}

fn supervisor(kind: Kind) -> Rights {
    Rights { kind, user: false, smap: false }
}

fn code(result: Result<Walk, Exception>) -> u32 {
    let exception = result.unwrap_err();
    assert_eq!((exception.vector, exception.cr2.is_some()), (14, true));
    exception.error_code.unwrap()
}

#[test]
fn canonical_addresses() {
    for (va, expected) in [
        (0, true),
        (0x7fff_ffff_ffff, true),
        (0x8000_0000_0000, false),
        (0xffff_7fff_ffff_ffff, false),
        (0xffff_8000_0000_0000, true),
        (u64::MAX, true),
    ] {
        assert_eq!(canonical(va), expected, "{va:#x}");
    }
}

#[test]
fn no_paging_is_identity() {
    let found = walk(&Flat::new(), &protected(3), 0x1_8765_4321, user(Kind::Write)).unwrap();
    assert_eq!(found.gpa, 0x8765_4321);
    assert!(found.writable && found.readable_user && found.dirty && !found.nx && !found.global);
    assert_eq!(found.page_bytes, 4096);
}

#[test]
fn four_levels_small_page() {
    let (cpu, mem) = tables();
    let found = walk(&mem, &cpu, VA, user(Kind::Read)).unwrap();
    assert_eq!(found.gpa, FRAME | 0xabc);
    assert_eq!(found.page_bytes, 4096);
    assert!(!found.dirty && found.writable && found.readable_user && !found.nx);
    for (table, level) in [(PML4, 4), (PDPT, 3), (PD, 2), (PT, 1)] {
        assert_eq!(mem.get64(table + index(level)) & (A | D), A, "level {level}");
    }
    let found = walk(&mem, &cpu, VA, user(Kind::Write)).unwrap();
    assert!(found.dirty);
    assert_eq!(mem.get64(PT + index(1)) & (A | D), A | D);
    assert_eq!(mem.get64(PD + index(2)) & D, 0, "only the leaf gets D");
    assert!(walk(&mem, &cpu, VA, user(Kind::Read)).unwrap().dirty, "D stays");
}

#[test]
fn large_pages() {
    let (cpu, mem) = tables();
    mem.put64(PD + index(2), 0x4000_0000 | ALL | PS | 1 << 12);
    let found = walk(&mem, &cpu, VA, user(Kind::Write)).unwrap();
    assert_eq!((found.gpa, found.page_bytes), (0x4000_0000 | VA & 0x1f_ffff, 1 << 21));
    assert_eq!(mem.get64(PD + index(2)) & (A | D), A | D);
    mem.put64(PDPT + index(3), 0x1_4000_0000 | ALL | PS);
    let found = walk(&mem, &cpu, VA, user(Kind::Read)).unwrap();
    assert_eq!((found.gpa, found.page_bytes), (0x1_4000_0000 | VA & 0x3fff_ffff, 1 << 30));
}

#[test]
fn absent_at_each_level() {
    for (table, level) in [(PML4, 4), (PDPT, 3), (PD, 2), (PT, 1)] {
        let (cpu, mem) = tables();
        mem.put64(table + index(level), ALL & !P);
        let before = mem.snapshot();
        for (rights, expected) in [
            (supervisor(Kind::Read), 0),
            (supervisor(Kind::Write), 2),
            (user(Kind::Read), 4),
            (user(Kind::Write), 6),
            (user(Kind::Fetch), 0x14),
        ] {
            assert_eq!(code(walk(&mem, &cpu, VA, rights)), expected, "level {level}");
        }
        assert_eq!(walk(&mem, &cpu, VA, user(Kind::Read)).unwrap_err().cr2, Some(VA));
        assert_eq!(mem.snapshot(), before, "a fault sets no bits");
    }
}

#[test]
fn rights_combine_over_levels() {
    for (table, level) in [(PML4, 4), (PDPT, 3), (PD, 2), (PT, 1)] {
        let (mut cpu, mem) = tables();
        let at = table + index(level);
        let entry = mem.get64(at);
        mem.put64(at, entry & !US);
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Read))), 5);
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Write))), 7);
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Fetch))), 0x15);
        assert!(!walk(&mem, &cpu, VA, supervisor(Kind::Write)).unwrap().readable_user);

        mem.put64(at, entry & !RW);
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Write))), 7);
        assert_eq!(code(walk(&mem, &cpu, VA, supervisor(Kind::Write))), 3);
        assert!(!walk(&mem, &cpu, VA, user(Kind::Read)).unwrap().writable);
        cpu.cr0 &= !cr0::WP;
        assert!(walk(&mem, &cpu, VA, supervisor(Kind::Write)).unwrap().dirty);
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Write))), 7, "WP is for supervisors");

        mem.put64(at, entry | NX);
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Fetch))), 0x15);
        assert_eq!(code(walk(&mem, &cpu, VA, supervisor(Kind::Fetch))), 0x11);
        assert!(walk(&mem, &cpu, VA, user(Kind::Write)).unwrap().nx);
    }
}

#[test]
fn reserved_bits() {
    // Level, bit, whether the entry is made large first.
    for (table, level, bit, large) in [
        (PML4, 4, 7, false),
        (PML4, 4, 46, false),
        (PDPT, 3, 51, false),
        (PDPT, 3, 13, true),
        (PDPT, 3, 29, true),
        (PD, 2, 13, true),
        (PD, 2, 20, true),
        (PD, 2, 46, true),
        (PT, 1, 46, false),
        (PT, 1, 50, false),
    ] {
        let (cpu, mem) = tables();
        let at = table + index(level);
        let entry = if large { ALL | PS } else { mem.get64(at) };
        mem.put64(at, entry);
        assert!(walk(&mem, &cpu, VA, user(Kind::Read)).is_ok(), "level {level} bit {bit}");
        mem.put64(at, entry | 1 << bit);
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Read))), 0xd, "level {level} bit {bit}");
        assert_eq!(code(walk(&mem, &cpu, VA, supervisor(Kind::Write))), 0xb);
    }
    let (cpu, mem) = tables();
    for bit in 52..=62 {
        mem.put64(PT + index(1), FRAME | ALL | 1 << bit);
        assert_eq!(walk(&mem, &cpu, VA, user(Kind::Read)).unwrap().gpa, FRAME | 0xabc, "{bit}");
    }
}

#[test]
fn nx_is_reserved_without_nxe_and_fetches_are_not_reported() {
    let (mut cpu, mem) = tables();
    cpu.efer &= !efer::NXE;
    mem.put64(PT + index(1), FRAME | ALL | NX);
    assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Read))), 0xd);
    mem.put64(PT + index(1), 0);
    assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Fetch))), 4, "no I/D without NXE and SMEP");
    cpu.cr4 |= cr4::SMEP;
    assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Fetch))), 0x14);
}

#[test]
fn smep_and_smap() {
    let (mut cpu, mem) = tables();
    assert!(walk(&mem, &cpu, VA, supervisor(Kind::Fetch)).is_ok());
    cpu.cr4 |= cr4::SMEP | cr4::SMAP;
    assert_eq!(code(walk(&mem, &cpu, VA, supervisor(Kind::Fetch))), 0x11);
    assert!(walk(&mem, &cpu, VA, user(Kind::Fetch)).is_ok());
    for (ac, access, refused) in [
        (false, Access::Current, true),
        (true, Access::Current, false),
        (false, Access::System, true),
        (true, Access::System, true),
    ] {
        cpu.rflags = if ac { flags::AC } else { 0 };
        let read = walk(&mem, &cpu, VA, Rights::of(&cpu, access, Kind::Read));
        let write = walk(&mem, &cpu, VA, Rights::of(&cpu, access, Kind::Write));
        if refused {
            assert_eq!((code(read), code(write)), (1, 3), "ac {ac} {access:?}");
        } else {
            assert!(read.is_ok() && write.is_ok(), "ac {ac} {access:?}");
        }
    }
    cpu.rflags = 0;
    mem.put64(PT + index(1), FRAME | (ALL & !US));
    let rights = Rights::explicit(&cpu, Kind::Write);
    assert!(walk(&mem, &cpu, VA, rights).is_ok(), "supervisor pages are not concerned");
}

#[test]
fn rights_follow_cpl() {
    for cpl in 0..=3 {
        let mut cpu = protected(cpl);
        cpu.cr4 |= cr4::SMAP;
        let rights = Rights::explicit(&cpu, Kind::Read);
        assert_eq!((rights.user, rights.smap), (cpl == 3, cpl != 3));
        let rights = Rights::system(&cpu, Kind::Read);
        assert_eq!((rights.user, rights.smap), (false, true));
    }
}

#[test]
fn global_needs_pge() {
    let (mut cpu, mem) = tables();
    mem.put64(PT + index(1), FRAME | ALL | G);
    assert!(!walk(&mem, &cpu, VA, user(Kind::Read)).unwrap().global);
    cpu.cr4 |= cr4::PGE;
    assert!(walk(&mem, &cpu, VA, user(Kind::Read)).unwrap().global);
    mem.put64(PT + index(1), FRAME | ALL);
    mem.put64(PD + index(2), PT | ALL | G);
    assert!(!walk(&mem, &cpu, VA, user(Kind::Read)).unwrap().global, "only the leaf counts");
}

#[test]
fn a_changed_entry_starts_the_walk_again() {
    let (cpu, mem) = tables();
    // While the accessed bit of the first entry is being set, the leaf's table is replaced.
    mem.put64(0x1_4000 + index(1), 0x5000 | ALL);
    mem.put64(PML4 + index(4), PDPT | ALL | A);
    mem.put64(PDPT + index(3), PD | ALL | A);
    mem.races.borrow_mut().push((PD + index(2), 0x1_4000 | ALL));
    assert_eq!(walk(&mem, &cpu, VA, user(Kind::Write)).unwrap().gpa, 0x5abc);
    assert_eq!(mem.get64(PT + index(1)) & (A | D), 0, "the old leaf was not touched");
    // The page goes away during the walk.
    let (cpu, mem) = tables();
    mem.races.borrow_mut().push((PML4 + index(4), 0));
    assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Write))), 6);
}

mod legacy {
    use super::super::pf;
    use super::{
        A, ALL, CpuState, D, Exception, Flat, G, Kind, NX, P, PS, RW, US, code, cr0, cr4, efer,
        load_pdptes, protected, supervisor, user, walk,
    };

    const DIR: u64 = 0x2_0000;
    const TABLE: u64 = 0x2_1000;
    const VA: u64 = 0xc123_4567;

    fn tables() -> (CpuState, Flat) {
        let mem = Flat::new();
        mem.put(DIR + (VA >> 22) * 4, ((TABLE | ALL) as u32).to_le_bytes());
        mem.put(TABLE + (VA >> 12 & 0x3ff) * 4, ((0xabcd_e000 | ALL) as u32).to_le_bytes());
        let mut cpu = protected(0);
        cpu.cr0 |= cr0::PG | cr0::WP;
        cpu.cr3 = DIR | 0x18;
        (cpu, mem)
    }

    #[test]
    fn two_levels() {
        let (cpu, mem) = tables();
        let found = walk(&mem, &cpu, VA | 1 << 32, user(Kind::Write)).unwrap();
        assert_eq!((found.gpa, found.page_bytes, found.dirty), (0xabcd_e567, 4096, true));
        assert_eq!(u64::from(mem.get32(DIR + (VA >> 22) * 4)) & (A | D), A);
        assert_eq!(u64::from(mem.get32(TABLE + (VA >> 12 & 0x3ff) * 4)) & (A | D), A | D);
        mem.put(TABLE + (VA >> 12 & 0x3ff) * 4, (P as u32).to_le_bytes());
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Read))), 5);
        assert_eq!(code(walk(&mem, &cpu, VA, supervisor(Kind::Write))), 3);
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Fetch))), 5, "no NX, no SMEP: no I/D");
        mem.put(DIR + (VA >> 22) * 4, [0; 4]);
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Write))), pf::W | pf::U);
    }

    #[test]
    fn four_mebibyte_pages() {
        let (mut cpu, mem) = tables();
        let at = DIR + (VA >> 22) * 4;
        mem.put(at, ((0x8040_0000 | ALL | PS | G | 0x5 << 13) as u32).to_le_bytes());
        cpu.cr4 = cr4::PSE | cr4::PGE;
        let found = walk(&mem, &cpu, VA, user(Kind::Write)).unwrap();
        assert_eq!((found.gpa, found.page_bytes), (0x5_8040_0000 | VA & 0x3f_ffff, 1 << 22));
        assert!(found.global);
        assert_eq!(u64::from(mem.get32(at)) & (A | D), A | D);
        mem.put(at, ((0x8060_0000 | ALL | PS) as u32).to_le_bytes());
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Read))), pf::P | pf::U | pf::RSVD);
        // Without PSE the same bit means nothing and the entry points to a table.
        let (cpu, mem) = tables();
        mem.put(at, ((TABLE | ALL | PS) as u32).to_le_bytes());
        assert_eq!(walk(&mem, &cpu, VA, user(Kind::Read)).unwrap().gpa, 0xabcd_e567);
    }

    fn pae() -> (CpuState, Flat) {
        let mem = Flat::new();
        let mut cpu = protected(0);
        cpu.cr0 |= cr0::PG | cr0::WP;
        cpu.cr4 = cr4::PAE;
        cpu.efer = efer::NXE;
        cpu.pdpte[3] = 0x2_2000 | P;
        mem.put64(0x2_2000 + (VA >> 21 & 0x1ff) * 8, 0x2_3000 | ALL);
        mem.put64(0x2_3000 + (VA >> 12 & 0x1ff) * 8, 0xf_abcd_e000 | ALL);
        (cpu, mem)
    }

    #[test]
    fn pae_walk() {
        let (mut cpu, mem) = pae();
        let found = walk(&mem, &cpu, VA, user(Kind::Write)).unwrap();
        assert_eq!((found.gpa, found.page_bytes), (0xf_abcd_e567, 4096));
        let at = 0x2_3000 + (VA >> 12 & 0x1ff) * 8;
        for bit in [52, 62, 46] {
            mem.put64(at, ALL | 1 << bit);
            assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Read))), 0xd, "bit {bit}");
        }
        mem.put64(at, ALL | NX);
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Fetch))), 0x15);
        mem.put64(0x2_2000 + (VA >> 21 & 0x1ff) * 8, 0x4020_0000 | ALL | PS);
        let found = walk(&mem, &cpu, VA, user(Kind::Read)).unwrap();
        assert_eq!((found.gpa, found.page_bytes), (0x4020_0000 | VA & 0x1f_ffff, 1 << 21));
        cpu.pdpte[3] = 0;
        assert_eq!(code(walk(&mem, &cpu, VA, user(Kind::Write))), 6);
    }

    #[test]
    fn pdptes_are_checked_when_loaded() {
        let mem = Flat::new();
        let mut cpu = protected(0);
        cpu.cr3 = 0x3_0020;
        for (entry, good) in [
            (0x5000 | P, true),
            (0x5000 | P | 0x18, true),
            (0x5000 | P | 0xe00, true),
            (0x5000 | P | RW, false),
            (0x5000 | P | US, false),
            (0x5000 | P | A, false),
            (0x5000 | P | G, false),
            (P | 1 << 46, false),
            (P | NX, false),
            (RW | NX, true),
        ] {
            mem.put64(0x3_0020 + 8, entry);
            let loaded = load_pdptes(&mem, &cpu);
            let expected = if good { Ok([0, entry, 0, 0]) } else { Err(Exception::gp(0)) };
            assert_eq!(loaded, expected, "{entry:#x}");
        }
    }
}
