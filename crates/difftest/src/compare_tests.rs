//! What the comparison hides, and that it hides no more than that.

use berth_x86::state::{XsaveArea, vector};

use super::{Difference, compare, original};
use crate::case::{Case, Fault, Final, Mode, Outcome, Span};
use crate::layout::{CODE, DATA, PAGE, World};

/// A case of one instruction at the start of the code.
fn one(code: &[u8]) -> Case {
    let mut xsave = XsaveArea::default();
    xsave.0[512] = 7;
    Case {
        mode: Mode::Bits64,
        world: World::Low,
        gpr: [0; 16],
        rflags: 0,
        fs_base: 0,
        gs_base: 0,
        xsave,
        patches: Vec::new(),
        code_at: 0,
        code: code.to_vec(),
        spans: vec![Span { start: 0, len: code.len() as u8 }],
        masked: Vec::new(),
        stop_after: 1,
    }
}

/// The case stopped at its instruction by an exception.
fn stopped(case: &Case, vector: u8, cr2: u64) -> Final {
    Final {
        gpr: case.gpr,
        rip: case.entry(),
        rflags: 0,
        selectors: [0; 6],
        fs_base: 0,
        gs_base: 0,
        fault: Fault { vector, error: 4 * u32::from(vector == vector::PF), cr2 },
        xsave: case.xsave.clone(),
        memory: Vec::new(),
    }
}

fn differ(case: &Case, native: &Final, other: &Final) -> Vec<String> {
    let stopped = |f: &Final| Outcome::Stopped(Box::new(f.clone()));
    compare(case, &stopped(native), &stopped(other))
        .into_iter()
        .map(|Difference { what, .. }| what)
        .collect()
}

const PF: u8 = vector::PF;
const GP: u8 = vector::GP;

#[test]
fn of_a_gather_destination_and_mask_are_hidden() {
    // vgatherdps xmm1, [rax + xmm2*4], xmm3
    let case = one(b"\xc4\xe2\x61\x92\x0c\x90");
    let native = stopped(&case, PF, 0x1000);
    for (register, seen) in [(0, true), (1, false), (2, true), (3, false), (4, true)] {
        for at in [160, 576] {
            let mut other = native.clone();
            other.xsave.0[at + 16 * register] = 1;
            let found = differ(&case, &native, &other);
            assert_eq!(!found.is_empty(), seen, "{register}: {found:?}");
        }
    }
}

#[test]
fn of_a_ten_byte_store_the_first_eight_bytes_are_hidden() {
    // fstp tbyte ptr [rax], across the end of the data
    let mut case = one(b"\xdb\x38");
    let target = case.world.base() + u64::from(DATA.offset + DATA.len() - 8);
    case.gpr[0] = target;
    let native = stopped(&case, PF, target + 8);
    let word = case.world.image_offset(target, 8).unwrap();
    for (at, seen) in [(word, false), (word - 8, true)] {
        let mut other = native.clone();
        other.memory.push((at, !original(&case, at)));
        assert_eq!(!differ(&case, &native, &other).is_empty(), seen);
    }
    // Without a fault nothing is hidden.
    let mut ended = native.clone();
    ended.fault.vector = vector::BP;
    let mut other = ended.clone();
    other.memory.push((word, !original(&case, word)));
    assert!(!differ(&case, &ended, &other).is_empty());
}

#[test]
fn of_a_masked_word_changed_once_the_rest_is_compared() {
    let mut case = one(b"\x90");
    let word = DATA.image + 64;
    case.masked.push((word + 2, 3));
    let native = stopped(&case, vector::BP, 0);
    for byte in 0..8 {
        let mut other = native.clone();
        other.memory.push((word, original(&case, word) ^ 0xff << (8 * byte)));
        let seen = !(2..5).contains(&byte);
        assert_eq!(!differ(&case, &native, &other).is_empty(), seen, "byte {byte}");
    }
}

#[test]
fn pieces_of_an_operand_may_be_reported_in_any_order() {
    // maskmovdqu xmm0, xmm1
    let mut case = one(b"\x66\x0f\xf7\xc1");
    let target = case.world.base() + 0x4_0000;
    case.gpr[7] = target;
    let native = stopped(&case, PF, target + 8);
    for (cr2, seen) in [(target, false), (target + 15, false), (target + 16, true), (0, true)] {
        let found = differ(&case, &native, &stopped(&case, PF, cr2));
        assert_eq!(!found.is_empty(), seen, "{cr2:#x}: {found:?}");
    }
    // The error code says whether the page is there; that differs only if the pages do.
    let mut other = stopped(&case, PF, target);
    other.fault.error |= 1;
    assert_eq!(differ(&case, &native, &other), ["error code"]);
    let at = target + u64::from(PAGE) - 8;
    case.gpr[7] = at;
    let native = stopped(&case, PF, at + 8);
    let mut other = stopped(&case, PF, at);
    other.fault.error |= 1;
    assert!(differ(&case, &native, &other).is_empty());
}

#[test]
fn which_exception_counts_unless_there_are_two_places() {
    // mov eax, [rbx]; movsd; pop qword ptr [rbx]
    for (code, seen) in [(&b"\x8b\x03"[..], true), (b"\xa5", false), (b"\x8f\x03", false)] {
        let case = one(code);
        let found = differ(&case, &stopped(&case, PF, 0x1000), &stopped(&case, GP, 0));
        assert_eq!(!found.is_empty(), seen, "{found:?}");
    }
}

#[test]
fn an_image_beyond_the_canonical_addresses_faults_either_way() {
    // frstor [rax]
    let mut case = one(b"\xdd\x20");
    for (at, seen) in [((1 << 47) - 14, false), ((1 << 47) - 108, true)] {
        case.gpr[0] = at;
        let found = differ(&case, &stopped(&case, PF, at), &stopped(&case, GP, 0));
        assert_eq!(!found.is_empty(), seen, "{found:?}");
    }
}

#[test]
fn strings_over_themselves_are_left_out_and_others_are_not() {
    for (code, seen) in [(&b"\xf3\xa4"[..], false), (b"\x90\x90", true)] {
        let case = one(code);
        let mut native = stopped(&case, vector::BP, 0);
        native.memory.push((CODE.image, 0));
        let mut other = native.clone();
        other.gpr[1] = 7;
        assert_eq!(!differ(&case, &native, &other).is_empty(), seen);
        // Its bytes as before: the string went elsewhere.
        native.memory.clear();
        other.memory.clear();
        assert!(!differ(&case, &native, &other).is_empty());
    }
}

#[test]
fn addresses_of_the_native_process_say_nothing() {
    let case = one(b"\x8b\x03");
    let native = stopped(&case, vector::BP, 0);
    for (cr2, seen) in [(0x7f00_0000_0000, false), (0x4000_0000, true), (0x7fff_ffff_fff0, true)] {
        let found = differ(&case, &native, &stopped(&case, PF, cr2));
        assert_eq!(!found.is_empty(), seen, "{cr2:#x}");
    }
}
