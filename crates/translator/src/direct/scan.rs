//! Which pages of code the host's processor may execute in place of the guest's.

use iced_x86::{Code, Decoder, DecoderOptions, EncodingKind, Instruction, Mnemonic};

use crate::ram::PAGE;
use crate::translate::LONGEST;

/// An instruction that the host's processor must not execute.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Offset in the page of the first of the bytes before its opcode that may be prefixes of it.
    pub first: u16,
    /// Offset of its opcode.
    pub opcode: u16,
}

/// What [`look`] finds.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// Instructions, in ascending order.
    pub places: Vec<Place>,
    /// There is one that could begin at the end and go on in the next page.
    pub at_end: bool,
}

/// How far before suspicious bytes decoding begins, and at how many addresses in turn. From most of
/// them it comes upon the right beginnings of instructions within a few.
const BEFORE: usize = 40;
const STARTS: usize = 8;
/// Places in a page at which that is done; more are believed to be what they look like.
const MOST_LOOKED: usize = 64;
/// Finds in a page of code, which `code` begins with, the instructions that give another answer on the
/// host than in the guest, and do not trap, or whose trap tells too little: XGETBV, RDTSCP, RDPID,
/// XSAVE, XSAVEC, XSAVEOPT, XRSTOR, LAR and LSL of registers, SYSENTER, RDPKRU and WRPKRU, INT with 4 or
/// 80h; CPUID unless it traps; AVX-512, VAES, VPCLMULQDQ and GFNI, which no guest has (SDM vol. 2).
///
/// The bytes of most of these count wherever they stand: nobody knows where instructions begin. Of the
/// others, which programs hardly ever contain and tables in their code more often (LAR, LSL, SYSENTER,
/// INT, AVX-512), those count to which decoding comes from almost all addresses a bit before.
pub fn look(code: &[u8], cpuid_traps: bool) -> Found {
    let mut found = Found::default();
    let mut at = 0;
    let mut looked = 0;
    let marks = |b: &u8| matches!(b, 0x0f | 0xcd | 0x62 | 0xc4 | 0xc5);
    while let Some(next) = code.get(at..).and_then(|rest| rest.iter().position(marks)) {
        at += next;
        if at >= PAGE as usize {
            break;
        }
        let rest = code.get(at..).unwrap_or_default();
        if let [0x0f | 0xcd | 0x62 | 0xc4 | 0xc5]
        | [0x0f, 0x01 | 0x02 | 0x03 | 0xae | 0xc7 | 0x38 | 0x3a]
        | [0x62 | 0xc4 | 0xc5, _]
        | [0xc4, _, _] = rest
        {
            found.at_end = true;
            break;
        }
        let before = code.get(..at).unwrap_or_default();
        let prefixes = before.iter().rev().take_while(|&&b| is_prefix(b)).count();
        let prefixes = before.get(at - prefixes..).unwrap_or_default();
        let certain = match rest {
            [0x0f, 0x01, modrm, ..] => matches!(modrm, 0xd0 | 0xf9 | 0xee | 0xef),
            [0x0f, 0xa2, ..] => !cpuid_traps,
            [0x0f, 0x38, 0xcf, ..] | [0x0f, 0x3a, 0xce | 0xcf, ..] => true,
            [0xc4, map, form, opcode, ..] => vex_unknown(*map, *form, *opcode),
            [0x0f, 0xae, modrm, ..] => *modrm < 0xc0 && matches!(modrm >> 3 & 7, 4..=6),
            // The prefix may be in the page before.
            [0x0f, 0xc7, modrm, ..] if *modrm >= 0xf8 => {
                prefixes.contains(&0xf3) || prefixes.len() == at
            }
            [0x0f, 0xc7, modrm, ..] => *modrm < 0xc0 && modrm >> 3 & 7 == 4,
            _ => false,
        };
        let possible = match rest {
            [0x0f, 0x02 | 0x03, modrm, ..] => *modrm >= 0xc0,
            [0x0f, 0x34, ..] | [0xcd, 0x04 | 0x80, ..] => true,
            // EVEX: bits that are always so (SDM vol. 2, 2.7.1).
            [0x62, p0, p1, ..] => p0 & 8 == 0 && p0 & 7 != 0 && p1 & 4 != 0,
            [0xc5, _, opcode, ..] => of_masks(1, *opcode),
            [0xc4, map, _, opcode, ..] => of_masks(map & 0x1f, *opcode),
            _ => false,
        };
        if possible && at + LONGEST > code.len() {
            // Not all of it is known.
            found.at_end = true;
            break;
        }
        looked += usize::from(possible);
        if certain || possible && (looked > MOST_LOOKED || is_there(code, at)) {
            let first = (at - prefixes.len()) as u16;
            found.places.push(Place { first, opcode: at as u16 });
        }
        at += 1;
    }
    found
}

/// Whether what follows a three-byte VEX prefix is of VAES, VPCLMULQDQ or GFNI (SDM vol. 2, 2.3.5).
const fn vex_unknown(map: u8, form: u8, opcode: u8) -> bool {
    let (prefix_66, long) = (form & 3 == 1, form & 4 != 0);
    prefix_66
        && match map & 0x1f {
            2 => opcode == 0xcf || long && matches!(opcode, 0xdc..=0xdf),
            3 => matches!(opcode, 0xce | 0xcf) || long && opcode == 0x44,
            _ => false,
        }
}

/// Whether an opcode with a VEX prefix is of opmask registers.
const fn of_masks(map: u8, opcode: u8) -> bool {
    match map {
        1 => matches!(opcode, 0x41..=0x4b | 0x90..=0x93 | 0x98 | 0x99),
        3 => matches!(opcode, 0x30..=0x33),
        _ => false,
    }
}

/// Whether a byte can be a prefix in 64-bit code.
#[must_use]
pub const fn is_prefix(byte: u8) -> bool {
    matches!(byte, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
}

/// Whether decoding from before comes to such an instruction at the bytes at `at`.
fn is_there(code: &[u8], at: usize) -> bool {
    let first = at.saturating_sub(BEFORE);
    let starts = first..(first + STARTS).min(at + 1);
    let all = starts.len();
    let hits = starts.filter(|&start| reaches(code, start, at)).count();
    hits > 0 && hits + 1 >= all
}

fn reaches(code: &[u8], start: usize, at: usize) -> bool {
    let bytes = code.get(start..).unwrap_or_default();
    let mut decoder = Decoder::new(64, bytes, DecoderOptions::NONE);
    let mut ins = Instruction::default();
    while decoder.can_decode() && start + decoder.position() <= at {
        let begins = decoder.position();
        decoder.decode_out(&mut ins);
        if ins.is_invalid() {
            // On with the next byte: data, perhaps.
            if decoder.set_position(begins + 1).is_err() {
                return false;
            }
        } else if start + decoder.position() > at {
            return answers_differ(&ins);
        }
    }
    false
}

/// Whether an instruction is one of those that bytes alone do not tell.
pub fn answers_differ(ins: &Instruction) -> bool {
    use Mnemonic as M;
    match ins.mnemonic() {
        _ if ins.code().encoding() == EncodingKind::EVEX => true,
        _ if (0..ins.op_count()).any(|i| ins.op_register(i).is_k()) => true,
        M::Lar | M::Lsl | M::Sysenter => true,
        M::Int => ins.code() == Code::Int_imm8 && matches!(ins.immediate8(), 0x04 | 0x80),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{Found, Place, is_prefix, look};

    fn nothing() -> Found {
        Found::default()
    }

    fn something(at: u16) -> Found {
        Found { places: vec![Place { first: at, opcode: at }], at_end: false }
    }

    /// A page of code in the middle of usual code.
    fn found(at: usize, code: &[u8]) -> Found {
        look(&page(at, code)[..4096], true)
    }

    fn page(at: usize, code: &[u8]) -> Vec<u8> {
        // mov rax, [rsp + 16]; add rax, rcx; test eax, eax
        const USUAL: [u8; 10] = [0x48, 0x8b, 0x44, 0x24, 0x10, 0x48, 0x01, 0xc8, 0x85, 0xc0];
        let mut page: Vec<u8> = USUAL.into_iter().cycle().take(at / 10 * 10).collect();
        page.resize(at, 0x90);
        page.extend(code);
        page.extend(USUAL.into_iter().cycle().take(4200));
        page
    }

    #[test]
    fn instructions_are_found() {
        for code in [
            &[0x0f, 0x01, 0xd0][..],               // xgetbv
            &[0x0f, 0x01, 0xf9],                   // rdtscp
            &[0x0f, 0x01, 0xef],                   // wrpkru
            &[0x0f, 0x03, 0xc1],                   // lsl eax, ecx
            &[0x0f, 0x34],                         // sysenter
            &[0x0f, 0xae, 0x20],                   // xsave [rax]
            &[0x0f, 0xae, 0x2f],                   // xrstor [rdi]
            &[0x48, 0x0f, 0xc7, 0x64, 0x24, 0x40], // xsavec64 [rsp + 64]
            &[0xf3, 0x0f, 0xc7, 0xf8],             // rdpid rax
            &[0x62, 0xf1, 0x7c, 0x48, 0x58, 0xc1], // vaddps zmm0, zmm0, zmm1
            &[0xc5, 0xf8, 0x92, 0xc8],             // kmovw k1, eax
            &[0xc4, 0xe1, 0xfb, 0x92, 0xc8],       // kmovq k1, rax
            &[0xc4, 0xe3, 0xf9, 0x32, 0xc9, 0x02], // kshiftlw k1, k1, 2
            &[0x66, 0x0f, 0x38, 0xcf, 0xc1],       // gf2p8mulb xmm0, xmm1
            &[0xc4, 0xe2, 0x75, 0xdc, 0xc2],       // vaesenc ymm0, ymm1, ymm2
            &[0xc4, 0xe3, 0x75, 0x44, 0xc2, 0x11], // vpclmulqdq ymm0, ymm1, ymm2, 17
            &[0xcd, 0x04],                         // int 4
            &[0xcd, 0x80],                         // int 80h
        ] {
            // The second one begins with its prefix, or does not.
            let prefixes = u16::from(is_prefix(code[0]));
            for at in [0, 1, 16, 2000, 2003, 4096 - code.len(), 4095] {
                if at == 4095 && prefixes > 0 {
                    // Its opcode is the next page's matter.
                    continue;
                }
                let place = Place { first: at as u16, opcode: at as u16 + prefixes };
                let expected = Found { places: vec![place], at_end: false };
                let mut page = page(at, code);
                if at > 4000 {
                    // Perhaps not all of it is seen without the next page.
                    let first = look(&page[..4096], true);
                    assert!(first.at_end || first == expected, "{code:x?} at {at}");
                }
                page.truncate(4096 + 16);
                assert_eq!(look(&page, true), expected, "{code:x?} at {at}");
            }
        }
        let many = found(100, &[0x0f, 0x01, 0xd0].repeat(5)).places;
        assert!(many.iter().map(|p| p.opcode).eq((100..115).step_by(3)));
    }

    #[test]
    fn other_instructions_are_not() {
        for code in [
            &[0x0f, 0xae, 0xf0][..],                     // mfence
            &[0x0f, 0xae, 0xe8],                         // lfence
            &[0x0f, 0xc7, 0xf0],                         // rdrand eax
            &[0x49, 0x0f, 0xc7, 0xfa],                   // rdseed r10
            &[0x0f, 0x01, 0x07],                         // sgdt [rdi]
            &[0xf0, 0x0f, 0xc7, 0x0f],                   // lock cmpxchg8b [rdi]
            &[0x83, 0xe0, 0x0f, 0x01, 0xc8],             // and eax, 15; add eax, ecx
            &[0xb8, 0x0f, 0x00, 0x00, 0x00],             // mov eax, 15
            &[0xe8, 0x0f, 0x34, 0xe6, 0xff],             // call, to somewhere
            &[0x48, 0x8d, 0x3d, 0x0f, 0xc7, 0x1e, 0x00], // lea rdi, [rip + 1ec70fh]
            &[0x0f, 0xa2],                               // cpuid, which traps
            &[0x0f, 0x05],                               // syscall
            &[0x0f, 0x31],                               // rdtsc
            &[0xc4, 0xe2, 0x71, 0xdc, 0xc2],             // vaesenc xmm0, xmm1, xmm2
            &[0xc5, 0xf5, 0x58, 0xc2],                   // vaddpd ymm0, ymm1, ymm2
            &[0x48, 0x89, 0xc5, 0x48, 0x98],             // mov rbp, rax; cdqe
        ] {
            assert_eq!(found(2000, code), nothing(), "{code:x?}");
        }
    }

    #[test]
    fn the_end_of_a_page_is_looked_at_with_the_next_one() {
        let at_end = Found { at_end: true, ..Found::default() };
        assert_eq!(found(4095, &[0x0f]), at_end);
        assert_eq!(found(4094, &[0x0f, 0xc7]), at_end);
        assert_eq!(found(4094, &[0x0f, 0x05]), nothing());
        let mut both = vec![0x90; 4096 + 16];
        both[4095..4098].copy_from_slice(&[0x0f, 0x01, 0xf9]);
        assert_eq!(look(&both, true), something(4095));
        both[4097] = 0xc8;
        assert_eq!(look(&both, true), nothing());
        // What begins in the next page is its own matter.
        both[4095] = 0x90;
        both[4096..4099].copy_from_slice(&[0x0f, 0x01, 0xf9]);
        assert_eq!(look(&both, true), nothing());
    }
}
