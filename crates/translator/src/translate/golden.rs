//! Small blocks and the host code made of them, pinned in the text files of `golden/`.
//!
//! `BERTH_GOLDEN=write cargo test -p berth-translator golden` writes the files anew; the change is
//! then to be read like any other. No address of the host is in them: places in the block are
//! offsets, fixed pieces and fields of the area have names.

use std::fmt::Write;
use std::path::Path;

use iced_x86::{Decoder, DecoderOptions};

use super::{Ahead, Ends, Mode, Translation};
use crate::Optimizations;
use crate::code::{BlockKey, CodeCache};
use crate::dump::{Names, list};
use crate::thunks::{Then, Thunks};

/// Where the guest's code is.
const RIP: u64 = 0x40_1000;

/// A block: name of its file, mode, guest bytes.
struct Golden {
    name: &'static str,
    mode: Mode,
    code: &'static [u8],
}

const USER64: Mode = Mode::flat(64, true);
const KERNEL64: Mode = Mode::flat(64, false);

const BLOCKS: &[Golden] = &[
    // add eax, [rdi + rcx*4 + 8]; mov [rsp + 16], rax; jne to the start
    Golden {
        name: "load_store_branch",
        mode: USER64,
        code: b"\x03\x44\x8f\x08\x48\x89\x44\x24\x10\x75\xf5",
    },
    // mov [rsp + 16], rax, where accesses look for crossings themselves
    Golden {
        name: "checked",
        mode: Mode { checked: true, ..USER64 },
        code: b"\x48\x89\x44\x24\x10",
    },
    // mov eax, [rdi + rcx*4 + 8]; add [rdi + rcx*4], eax; add rcx, 2; mov edx, [rdi + rcx*4 - 8];
    // mov r8, [r10 + r11]; mov [r10 + r11 + 8], r8
    Golden {
        name: "shared_index",
        mode: USER64,
        code: b"\x8b\x44\x8f\x08\x01\x04\x8f\x48\x83\xc1\x02\x8b\x54\x8f\xf8\x4f\x8b\x04\x1a\x4f\x89\x44\x1a\x08",
    },
    // mov rax, [rdi + 0x1008]; mov rbx, [rdi + 0x10]: the second is near the base, the first is not
    Golden {
        name: "shared_far",
        mode: USER64,
        code: b"\x48\x8b\x87\x08\x10\x00\x00\x48\x8b\x5f\x10",
    },
    // push rbx; pop r10; ret
    Golden { name: "stack", mode: USER64, code: b"\x53\x41\x5a\xc3" },
    // call to another page
    Golden { name: "call", mode: KERNEL64, code: b"\xe8\x00\x10\x00\x00" },
    // add [rip + 0x2000], eax; movzx ecx, word [rip + 0x1000]; call behind it
    Golden {
        name: "rip_relative",
        mode: USER64,
        code: b"\x01\x05\x00\x20\x00\x00\x0f\xb7\x0d\x00\x10\x00\x00\xe8\x00\x00\x00\x00",
    },
    // jmp rax
    Golden { name: "indirect", mode: USER64, code: b"\xff\xe0" },
    // add r10, r11; xchg r15, r14; mov al, r14b; mov ah, r10b is not encodable, mov cl, ah is
    Golden {
        name: "registers_in_memory",
        mode: USER64,
        code: b"\x4d\x01\xda\x4d\x87\xf7\x44\x88\xf0\x88\xe1",
    },
    // shl rax, cl; shr dword ptr [rdi], cl
    Golden { name: "shift_by_cl", mode: USER64, code: b"\x48\xd3\xe0\xd3\x2f" },
    // lock cmpxchg [rsi], rcx; lock cmpxchg16b [rdi]
    Golden { name: "locked", mode: KERNEL64, code: b"\xf0\x48\x0f\xb1\x0e\xf0\x48\x0f\xc7\x0f" },
    // bts [rdi], eax
    Golden { name: "bit_string", mode: USER64, code: b"\x0f\xab\x07" },
    // movaps xmm0, [rsi]; pcmpeqd xmm0, xmm1; vaddps ymm0, ymm0, [r11]
    Golden {
        name: "vectors",
        mode: USER64,
        code: b"\x0f\x28\x06\x66\x0f\x76\xc1\xc4\xc1\x7c\x58\x03",
    },
    // rep movsb
    Golden { name: "rep_movs", mode: USER64, code: b"\xf3\xa4" },
    // repne scasb; lodsq
    Golden { name: "repne_scas_lods", mode: USER64, code: b"\xf2\xae\x48\xad" },
    // fld qword ptr [rdi]; fstp dword ptr [rsi]
    Golden { name: "x87", mode: USER64, code: b"\xdd\x07\xd9\x1e" },
    // mov rax, fs:[0x28]; cpuid; inc eax
    Golden {
        name: "segment_and_helper",
        mode: USER64,
        code: b"\x64\x48\x8b\x04\x25\x28\x00\x00\x00\x0f\xa2\xff\xc0",
    },
    // syscall
    Golden { name: "syscall", mode: USER64, code: b"\x0f\x05" },
    // sysretq
    Golden { name: "sysret", mode: KERNEL64, code: b"\x48\x0f\x07" },
    // push eax; mov eax, [esp + 4]; inc eax
    Golden { name: "protected_32", mode: Mode::flat(32, false), code: b"\x50\x8b\x44\x24\x04\x40" },
    // mov ax, [bx + si]; loop to the start
    Golden {
        name: "real_16",
        mode: Mode { flat: false, fpu: false, sse: false, avx: false, ..Mode::flat(16, false) },
        code: b"\x8b\x00\xe2\xfc",
    },
    // cli; sti; stac; clac; swapgs
    Golden {
        name: "system_flags",
        mode: KERNEL64,
        code: b"\xfa\xfb\x0f\x01\xcb\x0f\x01\xca\x0f\x01\xf8",
    },
    // pushfq; popfq
    Golden { name: "system_stack", mode: KERNEL64, code: b"\x9c\x9d" },
    // mov r10, cr3; mov cr2, rax; mov ebx, ds; clflush [rdi]
    Golden {
        name: "system_registers",
        mode: KERNEL64,
        code: b"\x41\x0f\x20\xda\x0f\x22\xd0\x8c\xdb\x0f\xae\x3f",
    },
    // rdtsc; rdtscp; rdfsbase r10d; wrgsbase rax; xgetbv
    Golden {
        name: "system_user",
        mode: USER64,
        code: b"\x0f\x31\x0f\x01\xf9\xf3\x41\x0f\xae\xc2\xf3\x48\x0f\xae\xd8\x0f\x01\xd0",
    },
];

extern "C" fn never(_: u64, _: u64, _: u64) -> Then {
    Then::Exit
}

/// Translates the block at `rip` but for its cold parts. `ends`: where its accesses are.
fn body(t: &mut Translation, golden: &Golden, rip: u64, ends: Ends) {
    let bits = u32::from(golden.mode.bits);
    for ins in &mut Decoder::with_ip(bits, golden.code, rip, DecoderOptions::NONE) {
        assert!(!ins.is_invalid(), "{}: {ins:?}", golden.name);
        let bytes = &golden.code[(ins.ip() - rip) as usize..];
        t.ahead.push(Ahead::new(ins, bytes, golden.mode, ends, Optimizations::all(), |_| true));
    }
    let (count, ended) = t.all();
    assert_eq!(count, t.ahead.len(), "{}", golden.name);
    if !ended {
        t.continue_at(rip + golden.code.len() as u64);
    }
}

fn all_ways() -> impl Iterator<Item = (&'static Golden, Ends)> {
    BLOCKS.iter().flat_map(|b| [Ends::Seldom, Ends::Apart, Ends::Cross].map(|ends| (b, ends)))
}

/// The block as text.
fn listing(golden: &Golden) -> String {
    let mut cache = CodeCache::new(4 << 20).unwrap();
    let thunks = Thunks::new(&mut cache, [never; 4]);
    let Mode { bits, user, .. } = golden.mode;
    let rip = if bits == 16 { RIP & 0xffff } else { RIP };
    let key = BlockKey { rip, gpa: RIP, mode: golden.mode.pack() };
    let mut t = Translation::new(thunks, Optimizations::all());
    t.begin(&cache, key, golden.mode);
    // Body and cold parts in one piece, whatever the size of the cache.
    t.cold_start = None;
    body(&mut t, golden, rip, Ends::Seldom);
    let at = cache.next_host();
    let made = t.finish();
    let code = [made.code, made.cold].concat();
    let sites = made.notes.sites.len() as u64;
    let mut text = format!("guest, {bits} bits, {}\n", if user { "user" } else { "supervisor" });
    list(&mut text, bits, golden.code, rip, rip, None);
    text.push_str("host\n");
    let len = code.len() as u64;
    list(&mut text, 64, &code, at, 0, Some(Names { thunks, at, len, apart: (0, 0) }));
    cache.push_block(&made, 0, true);
    for number in 0..sites {
        let site = *cache.site(number).unwrap();
        if cache.slow(number).is_none() {
            let slow = cache.next_cold();
            let (code, _) = t.stub(&cache, cache.body_at(at).unwrap(), number, site);
            writeln!(text, "slow path of access {number}").unwrap();
            let names = Names { thunks, at, len, apart: (slow, code.len() as u64) };
            list(&mut text, 64, code, slow, 0, Some(names));
        }
    }
    text
}

#[test]
fn golden() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/translate/golden");
    let write = std::env::var("BERTH_GOLDEN").as_deref() == Ok("write");
    let mut wrong = Vec::new();
    for golden in BLOCKS {
        let path = dir.join(golden.name).with_extension("txt");
        let now = listing(golden);
        if write {
            std::fs::write(&path, now).unwrap();
            continue;
        }
        let then = std::fs::read_to_string(&path).unwrap_or_default();
        if now != then {
            println!("{}: was\n{then}is\n{now}", path.display());
            wrong.push(golden.name);
        }
    }
    let hint = "BERTH_GOLDEN=write cargo test -p berth-translator golden";
    assert!(wrong.is_empty(), "other host code than in {wrong:?}; if it is meant: {hint}");
}

/// What is pinned does not depend on where the code happens to lie.
#[test]
fn golden_listings_have_names_for_all_places() {
    for golden in BLOCKS {
        let text = listing(golden);
        assert!(!text.contains("elsewhere"), "{text}");
        for operand in text.split("gs:[").skip(1).filter_map(|rest| rest.split(']').next()) {
            assert!(!operand.contains("FFFF"), "{}: {operand}", golden.name);
        }
    }
}

/// So is one at the same guest address, made when the segment of a block is about to be dropped.
#[test]
fn rescued_blocks_are_like_translations() {
    for (golden, ends) in all_ways() {
        let mut cache = CodeCache::new(4 << 20).unwrap();
        let mut t = Translation::new(Thunks::new(&mut cache, [never; 4]), Optimizations::all());
        let rip = if golden.mode.bits == 16 { RIP & 0xffff } else { RIP };
        let key = BlockKey { rip, gpa: RIP, mode: golden.mode.pack() };
        t.begin(&cache, key, golden.mode);
        body(&mut t, golden, rip, ends);
        let id = cache.push_block(&t.finish(), 0, true);
        assert!(cache.rescued(id).is_none(), "{}: not yet", golden.name);
        while cache.find(&key) == Some(id) && cache.drops < 100 {
            cache.advance();
            assert!(cache.rescued(id).is_none(), "{}: not yet", golden.name);
            cache.leave();
            if let Some(copy) = cache.rescued(id) {
                t.begin(&cache, key, golden.mode);
                body(&mut t, golden, rip, ends);
                copy.check(&t.finish());
                let other = cache.push_block(&copy.made(), 0, true);
                assert_eq!(cache.find(&key), Some(other));
            }
        }
        // Once rescued, and dropped with the segment that it was rescued to.
        assert!(cache.drops < 100, "{}", golden.name);
        for _ in 0..5 {
            cache.advance();
        }
        assert_eq!(cache.find(&key), None, "{}", golden.name);
    }
}

/// A guest can map the same code at any number of addresses.
#[test]
fn blocks_of_the_same_code_are_bounded() {
    let golden = &BLOCKS[0];
    let mut cache = CodeCache::new(4 << 20).unwrap();
    let mut t = Translation::new(Thunks::new(&mut cache, [never; 4]), Optimizations::all());
    let key = |n: u64| BlockKey { rip: RIP + (n << 12), gpa: RIP, mode: golden.mode.pack() };
    let mut push = |cache: &mut CodeCache, n| {
        t.begin(cache, key(n), golden.mode);
        body(&mut t, golden, key(n).rip, Ends::Seldom);
        cache.push_block(&t.finish(), 0, true)
    };
    for n in 0..300 {
        let id = push(&mut cache, n);
        assert_eq!(cache.find(&key(n)), Some(id));
    }
    let found = |cache: &CodeCache| (0..400).filter(|&n| cache.find(&key(n)).is_some()).count();
    assert_eq!(found(&cache), 64);
    // Those in other segments stay when this one is dropped.
    cache.advance();
    push(&mut cache, 300);
    for _ in 0..4 {
        cache.advance();
    }
    assert_eq!(found(&cache), 1);
    cache.advance();
    assert_eq!(found(&cache), 0);
}

/// A copy is what the translator would make at the other address.
#[test]
fn copies_are_like_translations() {
    let mut copied = 0;
    for (golden, ends) in all_ways() {
        let mut cache = CodeCache::new(4 << 20).unwrap();
        let mut t = Translation::new(Thunks::new(&mut cache, [never; 4]), Optimizations::all());
        let mode = golden.mode.pack();
        let keys = [0x7f12_3456_7000, 0x5555_5555_4000].map(|base| BlockKey {
            rip: base | RIP & 0xfff,
            gpa: RIP,
            mode,
        });
        t.begin(&cache, keys[0], golden.mode);
        body(&mut t, golden, keys[0].rip, ends);
        cache.push_block(&t.finish(), 0, true);
        let mut check = |cache: &CodeCache, key: &BlockKey| {
            let Some(copy) = cache.moved(key) else { return false };
            t.begin(cache, *key, golden.mode);
            body(&mut t, golden, key.rip, ends);
            copy.check(&t.finish());
            true
        };
        if !check(&cache, &keys[1]) {
            assert!(cache.moved_in_place(&keys[1], 1, |_| true, &mut Vec::new()).is_none());
            continue;
        }
        copied += 1;
        // What was put right where it is can be copied like a translation.
        let mut went = Vec::new();
        assert!(cache.moved_in_place(&keys[1], 1, |space| space == 7, &mut went).is_none());
        let id = cache.moved_in_place(&keys[1], 1, |space| space == 0, &mut went).unwrap();
        assert_eq!((cache.find(&keys[1]), went[0].from), (Some(id), keys[0].rip));
        assert!(cache.find(&keys[0]).is_none());
        assert!(check(&cache, &keys[0]));
    }
    assert!(copied > 10, "{copied}");
}

/// What is linked within a page stays so when the page is found at another address.
#[test]
fn a_page_moves_as_a_whole() {
    // mov rax, [rip]; jmp to the second block; call in another page; and one that stays.
    let jumps =
        Golden { name: "jumps", mode: USER64, code: b"\x48\x8b\x05\x00\x00\x00\x00\xeb\x37" };
    let second = &BLOCKS[0];
    let mut cache = CodeCache::new(4 << 20).unwrap();
    let mut t = Translation::new(Thunks::new(&mut cache, [never; 4]), Optimizations::all());
    let (old, new, other) = (0x7f12_3456_7000, 0x5555_5555_4000, 0x7f00_0000_0000);
    let key =
        |base, offset| BlockKey { rip: base + offset, gpa: RIP + offset, mode: USER64.pack() };
    let mut push = |cache: &mut CodeCache, golden, key: BlockKey, space| {
        t.begin(cache, key, USER64);
        body(&mut t, golden, key.rip, Ends::Seldom);
        let links = cache.counts().links;
        (cache.push_block(&t.finish(), space, true), links)
    };
    let (a, a_links) = push(&mut cache, &jumps, key(old, 0), 1);
    let (b, b_links) = push(&mut cache, second, key(old, 0x40), 1);
    let (c, _) = push(&mut cache, second, key(old, 0x80), 2);
    let (_, d_links) = push(&mut cache, second, key(old, 0xc0), 2);
    let (e, _) = push(&mut cache, second, key(other, 0x40), 1);
    assert_eq!(cache.target_of(a_links), Some(old + 0x40));
    cache.connect(a_links, b, false);
    cache.connect(b_links, b, false);
    // From a block that moves to one that does not, had it this target.
    cache.connect(b_links + 1, c, false);
    cache.connect(d_links, a, false);
    let leads_to = |cache: &CodeCache, link: u32| {
        let at =
            cache.host(cache.source_of(link).unwrap()) + u64::from(cache.link(link).unwrap().patch);
        let (block, bytes) = cache.body_at(at - 1).unwrap();
        let end = (at - cache.host(block)) as usize;
        let field: [u8; 4] = bytes[end - 4..end].try_into().unwrap();
        at.wrapping_add_signed(i32::from_le_bytes(field).into())
    };
    let host = |cache: &CodeCache, id| cache.host_of(id).unwrap();
    let mut went = Vec::new();
    assert_eq!(cache.moved_in_place(&key(new, 0), 3, |space| space == 1, &mut went), Some(a));
    let mut from: Vec<_> = went.iter().map(|w| (w.from, w.to)).collect();
    from.sort_unstable();
    assert_eq!(from, [(old, new), (old + 0x40, new + 0x40)]);
    let found = |offset, base| cache.find(&key(base, offset));
    assert_eq!((found(0, new), found(0x40, new)), (Some(a), Some(b)));
    assert_eq!((found(0, old), found(0x80, old), found(0x40, other)), (None, Some(c), Some(e)));
    assert_eq!(leads_to(&cache, a_links), host(&cache, b));
    assert_eq!(leads_to(&cache, b_links), host(&cache, b));
    for wrong in [b_links + 1, d_links] {
        assert!(![host(&cache, a), host(&cache, c)].contains(&leads_to(&cache, wrong)));
    }
}
