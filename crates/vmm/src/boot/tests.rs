use std::path::{Path, PathBuf};

use berth_x86::state::{CodeSize, reg};
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, BootFiles, KernelKind, Loaded, Module, load};
use crate::memory::GuestRam;

/// A folder of its own for each test, gone when dropped.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("berth-boot-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
    fn file(&self, name: &str, data: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, data).unwrap();
        path
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn put(data: &mut [u8], at: usize, bytes: &[u8]) {
    data[at..at + bytes.len()].copy_from_slice(bytes);
}

fn boot(
    ram: &GuestRam,
    kernel: &Path,
    modules: &[Module],
    cmdline: &str,
) -> Result<Loaded, BootError> {
    load(ram, &BootFiles { kernel, modules, cmdline })
}

fn ram() -> GuestRam {
    GuestRam::new(64 << 20).unwrap()
}

fn at<const N: usize>(ram: &GuestRam, gpa: u64) -> [u8; N] {
    let mut bytes = [0; N];
    ram.memory().read_slice(&mut bytes, GuestAddress(gpa)).unwrap();
    bytes
}

fn u32_of(ram: &GuestRam, gpa: u64) -> u32 {
    u32::from_le_bytes(at(ram, gpa))
}

fn u64_of(ram: &GuestRam, gpa: u64) -> u64 {
    u64::from_le_bytes(at(ram, gpa))
}

fn string(ram: &GuestRam, gpa: u64) -> String {
    let bytes: [u8; 256] = at(ram, gpa);
    let end = bytes.iter().position(|byte| *byte == 0).unwrap();
    String::from_utf8(bytes[..end].to_vec()).unwrap()
}

/// A bzImage with one setup sector and 4 KiB of code.
fn bzimage() -> Vec<u8> {
    let mut data = vec![0; 1024 + 4096];
    put(&mut data, 0x1f1, &[1]);
    put(&mut data, 0x1f4, &(4096u32 / 16).to_le_bytes());
    put(&mut data, 0x1fe, &0xaa55u16.to_le_bytes());
    put(&mut data, 0x200, &[0xeb, 0x6a]);
    put(&mut data, 0x202, b"HdrS");
    put(&mut data, 0x206, &0x20fu16.to_le_bytes());
    put(&mut data, 0x211, &[1]);
    put(&mut data, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut data, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut data, 0x234, &[1]);
    put(&mut data, 0x236, &1u16.to_le_bytes());
    put(&mut data, 0x238, &100u32.to_le_bytes());
    put(&mut data, 0x258, &0x100_0000u64.to_le_bytes());
    put(&mut data, 0x260, &0x10_0000u32.to_le_bytes());
    put(&mut data, 1024, b"code");
    data
}

/// An ELF file with one segment at 1 MiB and, perhaps, a PVH note.
fn elf(wide: bool, entry: u32, code: &[u8], note: bool) -> Vec<u8> {
    let mut data = vec![0; 0x200];
    put(&mut data, 0, b"\x7fELF");
    put(&mut data, 4, &[if wide { 2 } else { 1 }, 1, 1]);
    put(&mut data, 16, &2u16.to_le_bytes());
    put(&mut data, 18, &(if wide { 62u16 } else { 3 }).to_le_bytes());
    put(&mut data, 24, &entry.to_le_bytes());
    let count = 1 + u16::from(note);
    let note_data: Vec<u8> = [4u32, 4, 18].iter().flat_map(|w| w.to_le_bytes()).collect();
    let note_data = [&note_data[..], b"Xen\0", &entry.to_le_bytes()].concat();
    put(&mut data, 0x180, &note_data);
    let segments = [
        (1u32, 0x200u64, 0x10_0000u64, code.len() as u64, code.len() as u64 + 0x1000),
        (4, 0x180, 0, note_data.len() as u64, note_data.len() as u64),
    ];
    if wide {
        put(&mut data, 32, &64u64.to_le_bytes());
        put(&mut data, 54, &56u16.to_le_bytes());
        put(&mut data, 56, &count.to_le_bytes());
        for (index, (kind, offset, address, file, memory)) in segments.into_iter().enumerate() {
            let base = 64 + index * 56;
            put(&mut data, base, &kind.to_le_bytes());
            for (field, value) in
                [(8, offset), (16, address), (24, address), (32, file), (40, memory)]
            {
                put(&mut data, base + field, &value.to_le_bytes());
            }
        }
    } else {
        put(&mut data, 28, &52u32.to_le_bytes());
        put(&mut data, 42, &32u16.to_le_bytes());
        put(&mut data, 44, &count.to_le_bytes());
        for (index, (kind, offset, address, file, memory)) in segments.into_iter().enumerate() {
            let base = 52 + index * 32;
            put(&mut data, base, &kind.to_le_bytes());
            for (field, value) in
                [(4, offset), (8, address), (12, address), (16, file), (20, memory)]
            {
                put(&mut data, base + field, &(value as u32).to_le_bytes());
            }
        }
    }
    data.extend_from_slice(code);
    data
}

/// A Multiboot kernel with load addresses, whose code follows the header.
fn multiboot(flags: u32, code: &[u8]) -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let load = 0x10_0000u32;
    let sum = 0u32.wrapping_sub(magic).wrapping_sub(flags);
    let end = load + 32 + code.len() as u32;
    let header = [magic, flags, sum, load, load, end, end + 0x1000, load + 32];
    let mut data: Vec<u8> = header.iter().flat_map(|word| word.to_le_bytes()).collect();
    data.extend_from_slice(code);
    data
}

#[test]
fn bzimage_by_the_64_bit_protocol() {
    let folder = Folder::new("bz");
    let kernel = folder.file("k", &bzimage());
    let initrd = folder.file("i", &[7; 5000]);
    let modules = [Module { path: initrd, args: String::new() }];
    let ram = ram();
    let loaded = boot(&ram, &kernel, &modules, "console=ttyS0 quiet").unwrap();
    assert_eq!(loaded.kind, KernelKind::BzImage);
    let state = loaded.entry;
    assert_eq!((state.rip, state.gpr[reg::RSI]), (0x100_0200, 0x7000));
    assert_eq!((state.code_size(), state.cpl(), state.rflags), (CodeSize::Bits64, 0, 2));
    assert_eq!(&at::<4>(&ram, 0x100_0000), b"code");
    assert_eq!(string(&ram, u64::from(u32_of(&ram, 0x7228))), "console=ttyS0 quiet");
    let (start, size) = (u32_of(&ram, 0x7218), u32_of(&ram, 0x721c));
    assert_eq!((start % 4096, size), (0, 5000));
    assert!(u64::from(start) + 5000 <= 64 << 20);
    assert_eq!(at::<5000>(&ram, u64::from(start)), [7; 5000]);
    assert_eq!(&at::<4>(&ram, 0x7202), b"HdrS");
    assert_eq!((at::<1>(&ram, 0x7210), at::<1>(&ram, 0x7211)), ([0xff], [0x81]));
    assert_eq!(u64_of(&ram, 0x7070), 0xe_0000);
    assert_eq!(at::<1>(&ram, 0x71e8), [3]);
    assert_eq!((u64_of(&ram, 0x72d0 + 40), u32_of(&ram, 0x72d0 + 56)), (0x10_0000, 1));
    // The page tables map an address to itself.
    let pdpt = u64_of(&ram, state.cr3) & !0xfff;
    let directory = u64_of(&ram, pdpt + 8 * 3) & !0xfff;
    assert_eq!(u64_of(&ram, directory + 8 * 5), 3 << 30 | 5 << 21 | 0x83);
}

#[test]
fn a_small_machine_gets_the_kernel_lower_down() {
    let folder = Folder::new("low");
    let kernel = folder.file("k", &bzimage());
    let ram = GuestRam::new(8 << 20).unwrap();
    assert_eq!(boot(&ram, &kernel, &[], "").unwrap().entry.rip, 0x20_0200);
}

#[test]
fn pvh_finds_its_start_info() {
    let folder = Folder::new("pvh");
    for wide in [false, true] {
        let kernel = folder.file("k", &elf(wide, 0x10_0000, b"code", true));
        let module = folder.file("m", b"module");
        let ram = ram();
        let modules = [Module { path: module, args: "one two".into() }];
        let loaded = boot(&ram, &kernel, &modules, "line").unwrap();
        assert_eq!(loaded.kind, KernelKind::Pvh);
        let state = loaded.entry;
        assert_eq!((state.rip, state.code_size()), (0x10_0000, CodeSize::Bits32));
        let info = state.gpr[reg::RBX];
        assert_eq!((u32_of(&ram, info), u32_of(&ram, info + 12)), (0x336e_c578, 1));
        let list = u64_of(&ram, info + 16);
        assert_eq!((&at::<6>(&ram, u64_of(&ram, list)), u64_of(&ram, list + 8)), (b"module", 6));
        assert_eq!(string(&ram, u64_of(&ram, list + 16)), "one two");
        assert_eq!(string(&ram, u64_of(&ram, info + 24)), "line");
        assert_eq!(u64_of(&ram, info + 32), 0xe_0000);
        let map = u64_of(&ram, info + 40);
        assert_eq!(u32_of(&ram, info + 48), 3);
        assert_eq!((u64_of(&ram, map + 48), u32_of(&ram, map + 64)), (0x10_0000, 1));
    }
}

#[test]
fn vmlinux_without_a_note_is_entered_in_64_bit_mode() {
    let folder = Folder::new("vmlinux");
    let kernel = folder.file("k", &elf(true, 0x10_0002, b"code", false));
    let ram = ram();
    let loaded = boot(&ram, &kernel, &[], "x").unwrap();
    assert_eq!((loaded.kind, loaded.entry.rip), (KernelKind::Vmlinux, 0x10_0002));
    assert_eq!(loaded.entry.gpr[reg::RSI], 0x7000);
    let kernel = folder.file("k", &elf(false, 0x10_0002, b"code", false));
    assert!(matches!(boot(&ram, &kernel, &[], ""), Err(BootError::Unsupported { .. })));
    let kernel = folder.file("k", &elf(true, 0x90_0000, b"code", false));
    assert!(matches!(boot(&ram, &kernel, &[], ""), Err(BootError::Unsupported { .. })));
}

#[test]
fn multiboot_finds_its_information() {
    let folder = Folder::new("mb");
    let kernel = folder.file("k", &multiboot(0x1_0003, b"code"));
    let (first, second) = (folder.file("a", &[1; 5000]), folder.file("b", b"second"));
    let list = format!("{} first args,{}", first.display(), second.display());
    let modules = Module::parse_list(&list);
    assert_eq!(modules.len(), 2);
    let ram = ram();
    let loaded = boot(&ram, &kernel, &modules, "-v").unwrap();
    assert_eq!(loaded.kind, KernelKind::Multiboot);
    let state = loaded.entry;
    assert_eq!((state.rip, state.gpr[reg::RAX]), (0x10_0020, 0x2bad_b002));
    assert_eq!(state.code_size(), CodeSize::Bits32);
    let info = state.gpr[reg::RBX];
    let flags = u32_of(&ram, info);
    assert_eq!(flags & 0x4d, 0x4d, "memory, command line, modules, map");
    assert_eq!((u32_of(&ram, info + 4), u32_of(&ram, info + 8)), (639, 63 << 10));
    let line = string(&ram, u64::from(u32_of(&ram, info + 16)));
    assert!(line.ends_with("/k -v"), "{line}");
    assert_eq!(u32_of(&ram, info + 20), 2);
    let list = u64::from(u32_of(&ram, info + 24));
    let (start, end) = (u64::from(u32_of(&ram, list)), u32_of(&ram, list + 4));
    assert_eq!((start % 4096, u64::from(end) - start), (0, 5000));
    assert!(start >= 0x10_0000 + 36 + 0x1000, "behind the kernel and its bss");
    assert_eq!(at::<5000>(&ram, start), [1; 5000]);
    let args = string(&ram, u64::from(u32_of(&ram, list + 8)));
    assert_eq!(args, format!("{} first args", first.display()));
    let second = u64::from(u32_of(&ram, list + 16));
    assert_eq!(&at::<6>(&ram, second), b"second");
    let (map, len) = (u64::from(u32_of(&ram, info + 48)), u32_of(&ram, info + 44));
    assert_eq!((len, u32_of(&ram, map)), (72, 20));
}

#[test]
fn multiboot_elf_is_loaded_by_its_segments() {
    let folder = Folder::new("mbelf");
    let header = multiboot(3, b"code");
    let kernel = folder.file("k", &elf(false, 0x10_0020, &header, false));
    let ram = ram();
    let loaded = boot(&ram, &kernel, &[], "").unwrap();
    assert_eq!((loaded.kind, loaded.entry.rip), (KernelKind::Multiboot, 0x10_0020));
    assert_eq!(u32_of(&ram, 0x10_0000), 0x1bad_b002);
}

#[test]
fn modules_are_named_as_elsewhere() {
    let module = |path: &str, args: &str| Module { path: path.into(), args: args.into() };
    assert_eq!(Module::parse_list("/a/b"), [module("/a/b", "")]);
    assert_eq!(Module::parse_list("/a x y,/b"), [module("/a", "x y"), module("/b", "")]);
    let folder = Folder::new("comma");
    let odd = folder.file("a,b c", b"");
    assert_eq!(
        Module::parse_list(&odd.to_string_lossy()),
        [Module { path: odd, args: String::new() }]
    );
}

#[test]
fn errors_say_which_file_and_why() {
    let folder = Folder::new("errors");
    let ram = ram();
    let message = |kernel: &Path, modules: &[Module], line: &str| {
        boot(&ram, kernel, modules, line).unwrap_err().to_string()
    };
    let missing = folder.0.join("missing");
    assert!(message(&missing, &[], "").contains("missing"));
    assert!(message(&folder.0, &[], "").contains("regular file"));
    assert!(message(Path::new("/dev/zero"), &[], "").contains("regular file"));
    assert!(message(&folder.file("e", b""), &[], "").contains("empty"));
    assert!(message(&folder.file("g", b"\x1f\x8b\x08"), &[], "").contains("gzip"));
    let kernel = folder.file("k", &bzimage());
    assert!(message(&kernel, &[], &"x".repeat(101)).contains("at most 100"));
    assert!(message(&kernel, &[], "a\0b").contains("zero byte"));
    let module = Module { path: missing, args: String::new() };
    assert!(message(&kernel, &[module], "").contains("the initrd"));
    let big = folder.0.join("big");
    std::fs::File::create(&big).unwrap().set_len(1 << 30).unwrap();
    let module = Module { path: big, args: String::new() };
    assert!(message(&kernel, std::slice::from_ref(&module), "").contains("--memory"));
    let multi = folder.file("mb", &multiboot(0x1_0003, b""));
    assert!(message(&multi, &[module], "").contains("--memory"));
    let wants = folder.file("mb", &multiboot(0x1_0083, b""));
    assert!(message(&wants, &[], "").contains("0x80"));
    let mut huge = bzimage();
    put(&mut huge, 0x260, &0x7000_0000u32.to_le_bytes());
    assert!(message(&folder.file("h", &huge), &[], "").contains("--memory"));
}

/// A sequence of numbers that looks random (xorshift).
fn random(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

#[test]
fn damaged_files_are_errors_or_load_but_never_panic() {
    let folder = Folder::new("fuzz");
    let valid = [
        bzimage(),
        elf(false, 0x10_0000, b"code", true),
        elf(true, 0x10_0000, b"code", true),
        elf(true, 0x10_0000, b"code", false),
        multiboot(0x1_0003, b"code"),
        elf(false, 0x10_0020, &multiboot(3, b"code"), false),
    ];
    let ram = ram();
    let mut seed = 0x2545_f491_4f6c_dd1d;
    let mut failed = 0;
    let mut check = |data: &[u8]| {
        let path = folder.file("k", data);
        failed += usize::from(boot(&ram, &path, &[], "line").is_err());
    };
    for data in &valid {
        for len in (0..data.len()).step_by(7) {
            check(&data[..len]);
        }
        for _ in 0..600 {
            let mut data = data.clone();
            for _ in 0..1 + random(&mut seed) % 4 {
                let at = random(&mut seed) as usize % data.len().min(0x400);
                let bytes = match random(&mut seed) % 3 {
                    0 => [0xff; 8],
                    1 => [0; 8],
                    _ => random(&mut seed).to_le_bytes(),
                };
                let end = (at + 1 + random(&mut seed) as usize % 8).min(data.len());
                let count = end - at;
                data[at..end].copy_from_slice(&bytes[..count]);
            }
            check(&data);
        }
    }
    for len in [1, 100, 0x1000] {
        let bytes: Vec<u8> = (0..len).map(|_| random(&mut seed) as u8).collect();
        check(&bytes);
    }
    assert!(failed > 500, "{failed}");
}
