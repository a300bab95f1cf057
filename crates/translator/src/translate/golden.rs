//! Small blocks and the host code made of them, pinned in the text files of `golden/`.
//!
//! `BERTH_GOLDEN=write cargo test -p berth-translator golden` writes the files anew; the change is
//! then to be read like any other. No address of the host is in them: places in the block are
//! offsets, fixed pieces and fields of the area have names.

use std::fmt::Write;
use std::mem::offset_of;
use std::path::Path;

use berth_x86::{CpuState, Segment};
use iced_x86::{
    Decoder, DecoderOptions, Formatter, Instruction, IntelFormatter, Register, SymbolResolver,
    SymbolResult,
};

use super::{Mode, Translation, classify};
use crate::code::{BlockKey, CodeCache};
use crate::layout::{
    Area, ExitCode, FLAG_MASKS, Gate, JC_TAGS, JC_TARGETS, disp, gpr_disp, state_disp,
};
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

/// Names of what host code refers to.
struct Names {
    thunks: Thunks,
    at: u64,
    len: u64,
    /// Address and length of a slow path that is made later.
    slow: (u64, u64),
}

impl Names {
    fn place(&self, address: u64) -> String {
        if let Some(offset) = address.checked_sub(self.at).filter(|o| *o <= self.len) {
            return format!("+{offset:x}");
        }
        if let Some(offset) = address.checked_sub(self.slow.0).filter(|o| *o <= self.slow.1) {
            return format!("slow path +{offset:x}");
        }
        let t = &self.thunks;
        let exits = [
            (ExitCode::Link, "exit_link"),
            (ExitCode::Indirect, "exit_indirect"),
            (ExitCode::Interrupt, "exit_interrupt"),
            (ExitCode::Helper, "exit_helper"),
            (ExitCode::Fault, "exit_fault"),
            (ExitCode::Return, "exit_return"),
        ];
        let calls = [
            (t.mem, "mem"),
            (t.commit, "commit"),
            (t.helper, "helper"),
            (t.miss, "miss"),
            (t.unmatched, "unmatched"),
        ];
        let mut all = exits.map(|(code, name)| (t.exit(code), name)).into_iter().chain(calls);
        all.find(|(a, _)| *a == address).map_or("elsewhere".into(), |(_, name)| name.into())
    }

    /// What is at a displacement from the GS base.
    fn field(displacement: i32) -> Option<String> {
        for n in 0..16u8 {
            if displacement == gpr_disp(n) {
                return Some(format!("guest_{:?}", Register::RAX + u32::from(n)).to_lowercase());
            }
        }
        for (n, name) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().enumerate() {
            let base = offset_of!(CpuState, seg) + n * size_of::<Segment>();
            if displacement == state_disp(base + offset_of!(Segment, base)) {
                return Some(format!("guest_{name}_base"));
            }
            if displacement == state_disp(base + 8) {
                return Some(format!("guest_{name}_rest"));
            }
            if displacement == state_disp(base + offset_of!(Segment, selector)) {
                return Some(format!("guest_{name}_selector"));
            }
        }
        let words = [
            (offset_of!(Area, page_mask), 2, "page_mask"),
            (offset_of!(Area, slot_mask), crate::layout::MAX_ACCESS_SHIFT + 1, "slot_mask"),
            (offset_of!(Area, bit_mask), 4, "bit_mask"),
            (offset_of!(Area, windows), crate::layout::WINDOWS, "window"),
            (offset_of!(Area, flag_mask), FLAG_MASKS.len(), "flag_mask"),
            (offset_of!(Area, kernel_base), 2, "kernel_base"),
            (offset_of!(Area, run_mask), 4, "run_mask"),
            (offset_of!(Area, syscall), size_of::<Gate>() / 8, "syscall"),
            (offset_of!(Area, sysret), size_of::<Gate>() / 8, "sysret"),
        ];
        for (offset, count, name) in words {
            for i in 0..count {
                if displacement == disp(offset + i * 8) {
                    return Some(format!("{name}_{i}"));
                }
            }
        }
        let single = [
            (disp(offset_of!(Area, run)), "run"),
            (disp(offset_of!(Area, exit_arg)), "exit_arg"),
            (disp(offset_of!(Area, exit_rip)), "exit_rip"),
            (disp(offset_of!(Area, look_s1)), "look_s1"),
            (disp(offset_of!(Area, return_number)), "return_number"),
            (disp(offset_of!(Area, tmp)), "tmp"),
            (disp(offset_of!(Area, irq)), "irq"),
            (disp(offset_of!(Area, shadow_rip)), "shadow_rip"),
            (state_disp(offset_of!(CpuState, rflags)), "rflags"),
            (state_disp(offset_of!(CpuState, interrupt_shadow)), "interrupt_shadow"),
            (state_disp(offset_of!(CpuState, kernel_gs_base)), "kernel_gs_base"),
            (disp(offset_of!(Area, syscall_keep)), "syscall_keep"),
            (disp(offset_of!(Area, user_return_sp)), "user_return_sp"),
            (disp(offset_of!(Area, crossed)), "crossed"),
            (disp(offset_of!(Area, barrier)), "barrier"),
            (state_disp(offset_of!(CpuState, lstar)), "lstar"),
            (state_disp(offset_of!(CpuState, tsc_offset)), "tsc_offset"),
            (state_disp(offset_of!(CpuState, tsc_aux)), "tsc_aux"),
            (state_disp(offset_of!(CpuState, xcr0)), "xcr0"),
            (state_disp(offset_of!(CpuState, xcr0) + 4), "xcr0_high"),
            (state_disp(offset_of!(CpuState, cr2)), "cr2"),
            (state_disp(offset_of!(CpuState, cr3)), "cr3"),
            (disp(offset_of!(Area, df_mask)), "df_mask"),
            (disp(offset_of!(Area, string_flags)), "string_flags"),
            (JC_TAGS, "jump_cache_tags"),
            (JC_TARGETS, "jump_cache_targets"),
        ];
        let entry = || {
            let offset = displacement.checked_sub(JC_TAGS).filter(|o| (0..16 << 16).contains(o))?;
            let part = if offset % 16 == 0 { "tag" } else { "target" };
            Some(format!("jump_cache_{part}_{:x}", offset / 16))
        };
        let named = single.iter().find(|(d, _)| *d == displacement);
        named.map(|(_, name)| (*name).into()).or_else(entry)
    }
}

impl SymbolResolver for Names {
    fn symbol(
        &mut self,
        ins: &Instruction,
        _: u32,
        operand: Option<u32>,
        address: u64,
        _: u32,
    ) -> Option<SymbolResult<'_>> {
        let kind = operand.map(|n| ins.op_kind(n));
        if kind == Some(iced_x86::OpKind::NearBranch64) {
            return Some(SymbolResult::with_string(address, self.place(address)));
        }
        let gs = kind == Some(iced_x86::OpKind::Memory) && ins.segment_prefix() == Register::GS;
        let name = Self::field(address as i32).filter(|_| gs)?;
        Some(SymbolResult::with_string(address, name))
    }
}

fn list(text: &mut String, bits: u8, code: &[u8], at: u64, shown: u64, names: Option<Names>) {
    let resolver = names.map(|n| Box::new(n) as Box<dyn SymbolResolver>);
    let mut formatter = IntelFormatter::with_options(resolver, None);
    let options = formatter.options_mut();
    options.set_space_after_operand_separator(true);
    options.set_branch_leading_zeros(false);
    options.set_show_symbol_address(false);
    for ins in &mut Decoder::with_ip(u32::from(bits), code, at, DecoderOptions::NONE) {
        let mut line = String::new();
        formatter.format(&ins, &mut line);
        writeln!(text, "{:6x}  {line}", ins.ip() - at + shown).unwrap();
    }
}

/// Translates the block at `rip` but for its cold parts. `looks`: its accesses look whether they
/// cross into another page.
fn body(t: &mut Translation, golden: &Golden, rip: u64, looks: bool) {
    let bits = u32::from(golden.mode.bits);
    for ins in &mut Decoder::with_ip(bits, golden.code, rip, DecoderOptions::NONE) {
        assert!(!ins.is_invalid(), "{}: {ins:?}", golden.name);
        t.ahead.push((ins, classify(&ins, golden.mode, true), looks));
    }
    let (count, ended) = t.all();
    assert_eq!(count, t.ahead.len(), "{}", golden.name);
    if !ended {
        t.continue_at(rip + golden.code.len() as u64);
    }
}

/// The block as text.
fn listing(golden: &Golden) -> String {
    let mut cache = CodeCache::new(4 << 20).unwrap();
    let thunks = Thunks::new(&mut cache, [never; 4]);
    let Mode { bits, user, .. } = golden.mode;
    let rip = if bits == 16 { RIP & 0xffff } else { RIP };
    let key = BlockKey { rip, gpa: RIP, mode: golden.mode.pack() };
    let mut t = Translation::new(thunks);
    t.begin(&cache, key, golden.mode);
    // Body and cold parts in one piece, whatever the size of the cache.
    t.cold_start = None;
    body(&mut t, golden, rip, false);
    let at = cache.next_host();
    let made = t.finish();
    let code = [made.code, made.cold].concat();
    let sites = made.notes.sites.len() as u64;
    let mut text = format!("guest, {bits} bits, {}\n", if user { "user" } else { "supervisor" });
    list(&mut text, bits, golden.code, rip, rip, None);
    text.push_str("host\n");
    let len = code.len() as u64;
    list(&mut text, 64, &code, at, 0, Some(Names { thunks, at, len, slow: (0, 0) }));
    cache.push_block(&made, 0, true);
    for number in 0..sites {
        let site = *cache.site(number).unwrap();
        if cache.slow(number).is_none() {
            let slow = cache.next_cold();
            let (code, _) = t.stub(&cache, cache.body_at(at).unwrap(), number, site);
            writeln!(text, "slow path of access {number}").unwrap();
            let names = Names { thunks, at, len, slow: (slow, code.len() as u64) };
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
    for (golden, looks) in BLOCKS.iter().flat_map(|b| [(b, false), (b, true)]) {
        let mut cache = CodeCache::new(4 << 20).unwrap();
        let mut t = Translation::new(Thunks::new(&mut cache, [never; 4]));
        let rip = if golden.mode.bits == 16 { RIP & 0xffff } else { RIP };
        let key = BlockKey { rip, gpa: RIP, mode: golden.mode.pack() };
        t.begin(&cache, key, golden.mode);
        body(&mut t, golden, rip, looks);
        let id = cache.push_block(&t.finish(), 0, true);
        assert!(cache.rescued(id).is_none(), "{}: not yet", golden.name);
        while cache.find(&key) == Some(id) && cache.drops < 100 {
            cache.advance();
            if let Some(copy) = cache.rescued(id) {
                t.begin(&cache, key, golden.mode);
                body(&mut t, golden, rip, looks);
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
    let mut t = Translation::new(Thunks::new(&mut cache, [never; 4]));
    let key = |n: u64| BlockKey { rip: RIP + (n << 12), gpa: RIP, mode: golden.mode.pack() };
    let mut push = |cache: &mut CodeCache, n| {
        t.begin(cache, key(n), golden.mode);
        body(&mut t, golden, key(n).rip, false);
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
    for (golden, looks) in BLOCKS.iter().flat_map(|b| [(b, false), (b, true)]) {
        let mut cache = CodeCache::new(4 << 20).unwrap();
        let mut t = Translation::new(Thunks::new(&mut cache, [never; 4]));
        let mode = golden.mode.pack();
        let keys = [0x7f12_3456_7000, 0x5555_5555_4000].map(|base| BlockKey {
            rip: base | RIP & 0xfff,
            gpa: RIP,
            mode,
        });
        t.begin(&cache, keys[0], golden.mode);
        body(&mut t, golden, keys[0].rip, looks);
        cache.push_block(&t.finish(), 0, true);
        let mut check = |cache: &CodeCache, key: &BlockKey| {
            let Some(copy) = cache.moved(key) else { return false };
            t.begin(cache, *key, golden.mode);
            body(&mut t, golden, key.rip, looks);
            copy.check(&t.finish());
            true
        };
        if !check(&cache, &keys[1]) {
            assert!(cache.moved_in_place(&keys[1], 1, |_| true).is_none());
            continue;
        }
        copied += 1;
        // What was put right where it is can be copied like a translation.
        assert!(cache.moved_in_place(&keys[1], 1, |space| space == 7).is_none());
        let (id, before) = cache.moved_in_place(&keys[1], 1, |space| space == 0).unwrap();
        assert_eq!((cache.find(&keys[1]), before), (Some(id), keys[0].rip));
        assert!(cache.find(&keys[0]).is_none());
        assert!(check(&cache, &keys[0]));
    }
    assert!(copied > 10, "{copied}");
}
