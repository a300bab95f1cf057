//! User code that is left to the processor does what the translator does.

use std::os::fd::OwnedFd;

use berth_translator::{Config, Optimizations, TranslatedVcpu};
use berth_x86::CpuState;
use berth_x86::state::{Segment, cr0, cr4, efer, reg, sreg};

use crate::{get, memfd, put, until_halted};

/// Handlers of all vectors, 16 bytes apart: HLT.
const HANDLERS: u64 = 0x8000;
const TEXT_VA: u64 = 0x40_2000;
const TEXT: u64 = 0x20_2000;
const STACK_VA: u64 = 0x40_4000;
const STACK: u64 = 0x20_4000;
const NX: u64 = 1 << 63;
/// Present, for user code, accessed; and writable, dirty.
const READ: u64 = 0x25;
const WRITE: u64 = 0x67;
const ENTRY: u64 = 0xf_ffff_ffff_f000;

/// The page is one of 2 MiB.
const LARGE: u64 = 0x80;

/// Linear and physical address, and flags.
type Page = (u64, u64, u64);

struct Ran {
    vcpu: TranslatedVcpu,
    ram: OwnedFd,
    vector: u64,
}

fn word(ram: &OwnedFd, at: u64) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&get(ram, at, 8));
    u64::from_le_bytes(bytes)
}

/// Page tables at 0x1000 on: the first 2 MiB for the kernel, and `pages`.
fn page_tables(ram: &OwnedFd, pages: &[Page]) {
    let mut free = 0x1_0000;
    for &(va, pa, flags) in pages {
        let mut table = 0x1000;
        let (levels, leaf) =
            if flags & LARGE != 0 { (&[39, 30][..], 21) } else { (&[39, 30, 21][..], 12) };
        for level in levels {
            let at = table + (va >> level & 511) * 8;
            if word(ram, at) == 0 {
                put(ram, at, &(free | WRITE).to_le_bytes());
                free += 0x1000;
            }
            table = word(ram, at) & ENTRY;
        }
        put(ram, table + (va >> leaf & 511) * 8, &(pa | flags).to_le_bytes());
    }
    let directory = word(ram, word(ram, 0x1000) & ENTRY) & ENTRY;
    put(ram, directory, &0xe3u64.to_le_bytes());
}

/// Runs user code until it is interrupted by something.
fn user(
    config: Config,
    pages: &[Page],
    bytes: &[(u64, &[u8])],
    set: impl FnOnce(&mut CpuState),
) -> Ran {
    let ram = memfd();
    for vector in 0..256u64 {
        let handler = HANDLERS + vector * 16;
        put(&ram, handler, &[0xf4]);
        let kind = if matches!(vector, 3 | 4) { 0xee00u64 } else { 0x8e00 };
        let gate = handler & 0xffff | 8 << 16 | kind << 32 | (handler >> 16 & 0xffff) << 48;
        put(&ram, 0x3000 + vector * 16, &gate.to_le_bytes());
    }
    let descriptors = [
        (1, 0x00af_9b00_0000_ffff_u64),
        (2, 0x00cf_9300_0000_ffff),
        (5, 0x00cf_f300_0000_ffff),
        (6, 0x00af_fb00_0000_ffff),
    ];
    for (i, descriptor) in descriptors {
        put(&ram, 0x4000 + i * 8, &descriptor.to_le_bytes());
    }
    put(&ram, 0x5004, &0x7f00u64.to_le_bytes());
    let usual = [(STACK_VA, STACK, WRITE | NX), (TEXT_VA, TEXT, READ)];
    page_tables(&ram, &[&usual, pages].concat());
    for (at, bytes) in bytes {
        put(&ram, *at, bytes);
    }
    let mut s = CpuState::reset(true);
    s.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET | cr0::WP | cr0::MP;
    s.cr3 = 0x1000;
    s.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::PGE | cr4::FSGSBASE;
    s.xcr0 = 7;
    s.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    s.seg = [Segment::default(); 6];
    s.seg[sreg::CS] = Segment { base: 0, limit: !0, selector: 0x33, attr: 0xa0fb };
    s.seg[sreg::SS] = Segment { base: 0, limit: !0, selector: 0x2b, attr: 0xc0f3 };
    s.tr = Segment { base: 0x5000, limit: 0x67, selector: 0x40, attr: 0x8b };
    (s.idtr.base, s.idtr.limit) = (0x3000, 0xfff);
    (s.gdtr.base, s.gdtr.limit) = (0x4000, 0x3f);
    s.rip = TEXT_VA;
    s.gpr[reg::RSP] = STACK_VA + 0x800;
    s.rflags = 0x202;
    set(&mut s);
    let vcpu = until_halted(&ram, s, config);
    let vector = (vcpu.state().rip - HANDLERS) / 16;
    Ran { vcpu, ram, vector }
}

/// Who executes user code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    Translator,
    Processor,
    /// And pages are shown to it as a whole or not at all.
    ProcessorByPages,
}

impl By {
    fn config(self) -> Config {
        let pages = if self == Self::ProcessorByPages {
            Optimizations::PIECES
        } else {
            Optimizations::empty()
        };
        Config {
            always_direct: self != Self::Translator,
            optimizations: Optimizations::all() - pages,
            ..Config::default()
        }
    }
}

/// Runs user code in each way.
fn each(
    pages: &[Page],
    bytes: &[(u64, &[u8])],
    set: impl Fn(&mut CpuState),
    check: impl Fn(By, &Ran),
) {
    if let Err(error) = berth_translator::direct_check() {
        return println!("skipped: no process can be traced here: {error}");
    }
    for by in [By::Translator, By::Processor, By::ProcessorByPages] {
        check(by, &user(by.config(), pages, bytes, &set));
    }
}

/// The same by the translator and by the processor, which did execute something if `runs`.
fn both(
    runs: bool,
    pages: &[Page],
    bytes: &[(u64, &[u8])],
    set: impl Fn(&mut CpuState),
    check: impl Fn(&Ran),
) {
    each(pages, bytes, set, |by, ran| {
        let stats = ran.vcpu.stats();
        assert_eq!(stats.direct_runs > 0, runs && by != By::Translator, "{by:?}: {stats:?}");
        check(ran);
    });
}

#[test]
fn privileged_instructions_and_traps_are_the_guests() {
    let cases: [(&[u8], u64, u64); 6] = [
        (&[0xf4], 13, 0),             // hlt
        (&[0xcc], 3, 1),              // int3
        (&[0xcd, 3], 3, 2),           // int 3
        (&[0xcd, 4], 4, 2),           // int 4
        (&[0x0f, 0x0b], 6, 0),        // ud2
        (&[0x48, 0x8b, 0x07], 14, 0), // mov rax, [rdi]
    ];
    for (code, vector, offset) in cases {
        // Not at the beginning of the page, where too little is known to look for INT.
        let set = |s: &mut CpuState| {
            s.gpr[reg::RDI] = 0x1234_5678_9000;
            s.rip = TEXT_VA + 0x80;
        };
        both(true, &[], &[(TEXT, &[0x90; 0x80]), (TEXT + 0x80, code)], set, |ran| {
            assert_eq!(ran.vector, vector, "{code:02x?}");
            // RIP is below the error code and above, below SS and RSP.
            let sp = ran.vcpu.state().gpr[reg::RSP];
            let rip = word(&ran.ram, sp + if matches!(vector, 13 | 14) { 8 } else { 0 });
            assert_eq!(rip, TEXT_VA + 0x80 + offset, "{code:02x?}");
        });
    }
}

/// Whether the host has them or not.
#[test]
fn instructions_that_are_not_advertised_are_undefined() {
    let cases: [&[u8]; 6] = [
        &[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1], // vaddps zmm0, zmm0, zmm1
        &[0x62, 0xf1, 0xfe, 0x28, 0x6f, 0x06], // vmovdqu64 ymm0, [rsi]
        &[0xc5, 0xf8, 0x92, 0xc8],             // kmovw k1, eax
        &[0xc4, 0xe2, 0x75, 0xdc, 0xc2],       // vaesenc ymm0, ymm1, ymm2
        &[0x66, 0x0f, 0x38, 0xcf, 0xc1],       // gf2p8mulb xmm0, xmm1
        &[0x0f, 0x01, 0xee],                   // rdpkru
    ];
    for code in cases {
        let set = |s: &mut CpuState| s.gpr[reg::RSI] = STACK_VA;
        // Behind other code: add rax, rcx.
        let code = [[0x48, 0x01, 0xc8].repeat(30), code.to_vec()].concat();
        both(true, &[], &[(TEXT, &code)], set, |ran| {
            assert_eq!(ran.vector, 6, "{code:02x?}");
        });
    }
}

#[test]
fn what_is_executable_is_not_written_unnoticed() {
    // The same page, writable at 0x400000 and executable at 0x401000. call it; write RDTSCP; RET there
    // through the other address; call it again; hlt
    let code = [0xe8, 0xfb, 0xef, 0xff, 0xff, 0x89, 0x37, 0xe8, 0xf4, 0xef, 0xff, 0xff, 0xf4];
    let pages = [(0x40_0000, 0x20_1000, WRITE | NX), (0x40_1000, 0x20_1000, READ)];
    let bytes: [(u64, &[u8]); 2] = [(TEXT, &code), (0x20_1000, &[0x90, 0x90, 0x90, 0xc3])];
    let set = |s: &mut CpuState| {
        s.gpr[reg::RDI] = 0x40_0000;
        s.gpr[reg::RSI] = 0xc3f9_010f;
        s.tsc_aux = 0x1234;
    };
    both(true, &pages, &bytes, set, |ran| {
        assert_eq!((ran.vector, ran.vcpu.state().gpr[reg::RCX]), (13, 0x1234));
    });
}

#[test]
fn bases_that_the_host_refuses_are_translated() {
    // fnstcw [rsp]; movzx eax, word [rsp]; hlt
    let code = [0xd9, 0x3c, 0x24, 0x0f, 0xb7, 0x04, 0x24, 0xf4];
    for (base, runs) in [(0xffff_8000_0000_0000, false), (0x7fff_ffff_e000, true)] {
        let set = |s: &mut CpuState| {
            s.seg[sreg::GS].base = base;
            s.xsave.0[..2].copy_from_slice(&[0x7f, 2]);
            s.xsave.0[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
            s.xsave.0[512] = 7;
        };
        both(runs, &[], &[(TEXT, &code)], set, |ran| {
            assert_eq!(ran.vcpu.state().gpr[reg::RAX], 0x27f);
            assert_eq!(ran.vcpu.state().seg[sreg::GS].base, base);
        });
    }
}

#[test]
fn the_whole_of_user_memory_is_the_guests() {
    // mov rax, [rdi]; mov [rsi], rax; hlt
    let code = [0x48, 0x8b, 0x07, 0x48, 0x89, 0x06, 0xf4];
    for at in [0x20_0000, 0x2000_0000_0000, 0x7fff_ffff_b000, 0x7fff_ffff_e000, 0x7fff_ffff_f000] {
        let pages = [(at, 0x20_6000, WRITE | NX), (0x5000_0000, 0x20_7000, WRITE | NX)];
        let bytes: [(u64, &[u8]); 2] = [(TEXT, &code), (0x20_6000, &[0x11; 8])];
        let set = |s: &mut CpuState| {
            s.gpr[reg::RDI] = at;
            s.gpr[reg::RSI] = 0x5000_0000;
        };
        both(true, &pages, &bytes, set, |ran| {
            assert_eq!(ran.vector, 13);
            assert_eq!(word(&ran.ram, 0x20_7000), 0x1111_1111_1111_1111, "{at:#x}");
        });
    }
}

#[test]
fn large_pages_are_mapped_at_once() {
    // mov [rdi], rax; mov [rdi + 1ff000h], rax; mov rbx, [rdi + 123000h]; hlt
    let code = [
        0x48, 0x89, 0x07, 0x48, 0x89, 0x87, 0x00, 0xf0, 0x1f, 0x00, 0x48, 0x8b, 0x9f, 0x00, 0x30,
        0x12, 0x00, 0xf4,
    ];
    let pages = [(0x5000_0000, 0x80_0000, WRITE | NX | LARGE)];
    let bytes: [(u64, &[u8]); 2] = [(TEXT, &code), (0x92_3000, &[0x22; 8])];
    let set = |s: &mut CpuState| {
        s.gpr[reg::RDI] = 0x5000_0000;
        s.gpr[reg::RAX] = 0x1111;
    };
    both(true, &pages, &bytes, set, |ran| {
        let words = [0x80_0000, 0x9f_f000].map(|at| word(&ran.ram, at));
        assert_eq!((ran.vector, words), (13, [0x1111; 2]));
        assert_eq!(ran.vcpu.state().gpr[reg::RBX], 0x2222_2222_2222_2222);
        let stats = ran.vcpu.stats();
        assert!(stats.direct_runs == 0 || stats.direct_pages >= 512 && stats.direct_faults <= 3);
    });
}

#[test]
fn what_is_not_dirty_becomes_so() {
    // mov [rdi], rax; hlt
    let code = [0x48, 0x89, 0x07, 0xf4];
    let pages = [(0x5000_0000, 0x20_7000, (WRITE | NX) & !0x60)];
    let set = |s: &mut CpuState| s.gpr[reg::RDI] = 0x5000_0000;
    both(true, &pages, &[(TEXT, &code)], set, |ran| {
        let mut table = 0x1000;
        for level in [39, 30, 21] {
            table = word(&ran.ram, table + (0x5000_0000u64 >> level & 511) * 8) & ENTRY;
        }
        assert_eq!(word(&ran.ram, table) & 0x60, 0x60);
    });
}

/// vaddps zmm0, zmm0, zmm1
const ZMM: [u8; 6] = [0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1];

/// More of these than the processor has breakpoints, behind other code.
fn many_zmm() -> Vec<u8> {
    [vec![0x90; 40], ZMM.repeat(6)].concat()
}

/// The same in each way, and code in a copy of a page was shown where it can be.
fn both_by_copy(
    pages: &[Page],
    bytes: &[(u64, &[u8])],
    set: impl Fn(&mut CpuState),
    check: impl Fn(&Ran),
) {
    let copies = berth_translator::direct_check().is_ok_and(|direct| direct.execute_only);
    if !copies {
        println!("skipped: the processor here has no pages that can be executed only");
    }
    each(pages, bytes, set, |by, ran| {
        let stats = ran.vcpu.stats();
        assert_eq!(stats.direct_shown > 0, by == By::Processor && copies, "{by:?}: {stats:?}");
        check(ran);
    });
}

#[test]
fn pages_with_much_that_must_not_be_executed_are_shown_in_pieces() {
    // mov ecx, 5; L: call F; loop L; hlt, or what must not be executed; F: inc rax; lock, or not: add
    // [rsp], 0; ret
    let code = |end: &[u8]| {
        let mut code = vec![0xb9, 5, 0, 0, 0, 0xe8, 0xf6, 0, 0, 0, 0xe2, 0xf9];
        code.extend(end);
        code.resize(0x100, 0x90);
        code.extend([0x48, 0xff, 0xc0, 0xeb, 1, 0xf0, 0x83, 4, 0x24, 0, 0xc3]);
        [code, many_zmm()].concat()
    };
    for (end, vector) in [(&[0xf4][..], 13), (&ZMM, 6)] {
        both_by_copy(
            &[],
            &[(TEXT, &code(end))],
            |_| {},
            |ran| {
                let state = ran.vcpu.state();
                assert_eq!((ran.vector, state.gpr[reg::RAX], state.gpr[reg::RCX]), (vector, 5, 0));
            },
        );
    }
}

#[test]
fn data_in_such_pages_is_the_guests() {
    // mov ecx, 40; L: add rax, [rip + 0x1000 - ...]; loop L; hlt; it reads what must not be executed.
    let mut code = vec![0xb9, 40, 0, 0, 0, 0x48, 0x03, 0x05, 0xf4, 0, 0, 0, 0xe2, 0xf7, 0xf4];
    code.resize(0x100, 0x90);
    code.extend(ZMM.repeat(6));
    let word = u64::from_le_bytes([0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1, 0x62, 0xf1]);
    both_by_copy(
        &[],
        &[(TEXT, &code)],
        |_| {},
        |ran| {
            let state = ran.vcpu.state();
            assert_eq!((ran.vector, state.gpr[reg::RAX]), (13, word.wrapping_mul(40)));
        },
    );
}

#[test]
fn instructions_cross_into_copies_of_pages() {
    // mov eax, 12345678h and hlt, on both sides of the end of the first page; one or both of them have
    // much that must not be executed.
    let next = TEXT + 0x1000;
    let zmm = many_zmm();
    for first in [false, true] {
        for mapped in [false, true] {
            // jmp to the next page and back first, so that it is mapped, or not.
            let jump = [0xe9, 0xfb, 0x0f, 0, 0];
            let back = [0xe9, 0xf9, 0xfe, 0xff, 0xff];
            let mut bytes: Vec<(u64, &[u8])> =
                vec![(next - 2, &[0xb8, 0x78, 0x56, 0x34, 0x12, 0xf4]), (next + 0x200, &zmm)];
            if first {
                bytes.push((TEXT + 0x200, &zmm));
            }
            bytes.extend([(TEXT + 0x100, &jump[..]), (next + 0x100, &back)]);
            let set = |s: &mut CpuState| {
                s.rip = if mapped { TEXT_VA + 0x100 } else { TEXT_VA + 0xffe };
            };
            both_by_copy(&[(TEXT_VA + 0x1000, next, READ)], &bytes, set, |ran| {
                assert_eq!((ran.vector, ran.vcpu.state().gpr[reg::RAX]), (13, 0x1234_5678));
            });
        }
    }
}

#[test]
fn copies_of_pages_that_change_are_forgotten() {
    // call 0x401000; write MOV AL, 7 there through 0x400000; call it again; hlt
    let code = [0xe8, 0xfb, 0xef, 0xff, 0xff, 0x66, 0x89, 0x37, 0xe8, 0xf3, 0xef, 0xff, 0xff, 0xf4];
    let pages = [(0x40_0000, 0x20_1000, WRITE | NX), (0x40_1000, 0x20_1000, READ)];
    let zmm = many_zmm();
    let bytes: [(u64, &[u8]); 3] =
        [(TEXT, &code), (0x20_1000, &[0xb0, 3, 0xc3]), (0x20_1100, &zmm)];
    let set = |s: &mut CpuState| {
        s.gpr[reg::RDI] = 0x40_0000;
        s.gpr[reg::RSI] = 0x07b0;
    };
    both_by_copy(&pages, &bytes, set, |ran| {
        assert_eq!((ran.vector, ran.vcpu.state().gpr[reg::RAX]), (13, 7));
    });
}

#[test]
fn pages_are_executed_with_whatever_is_behind_them() {
    // call 600ffeh; mov rbx, rax; call 700ffeh; mov rcx, rax; call 600ffeh; hlt. At both there is the same
    // page, which ends in the middle of MOV EAX.
    let code = [
        0xe8, 0xf9, 0xef, 0x1f, 0x00, 0x48, 0x89, 0xc3, 0xe8, 0xf1, 0xef, 0x2f, 0x00, 0x48, 0x89,
        0xc1, 0xe8, 0xe9, 0xef, 0x1f, 0x00, 0xf4,
    ];
    let pages = [
        (0x60_0000, 0x30_0000, READ),
        (0x60_1000, 0x30_1000, READ),
        (0x70_0000, 0x30_0000, READ),
        (0x70_1000, 0x30_8000, READ),
    ];
    let zmm = many_zmm();
    for also_behind in [false, true] {
        let mut bytes: Vec<(u64, &[u8])> = vec![
            (TEXT, &code),
            (0x30_0200, &zmm),
            (0x30_0ffe, &[0xb8, 0x78]),
            (0x30_1000, &[0x56, 0x34, 0x12, 0xc3]),
            (0x30_8000, &[0, 0, 0, 0xc3]),
        ];
        if also_behind {
            bytes.extend([(0x30_1200, &zmm[..]), (0x30_8200, &zmm)]);
        }
        both_by_copy(
            &pages,
            &bytes,
            |_| {},
            |ran| {
                let gpr = ran.vcpu.state().gpr;
                let values = [gpr[reg::RBX], gpr[reg::RCX], gpr[reg::RAX]];
                assert_eq!((ran.vector, values), (13, [0x1234_5678, 0x78, 0x1234_5678]));
            },
        );
    }
}
