//! Small guests in 64-bit mode with identity page tables.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod clones;
mod direct;

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::sync::Arc;

use berth_translator::{
    Config, Exit, Frozen, RamSlot, Reservation, Shared, TranslatedVcpu, host_cpuid,
};
use berth_x86::cpuid::{CpuidTable, Topology};
use berth_x86::state::{Segment, cr0, cr4, efer};
use berth_x86::{CpuState, Platform};

/// One register, everywhere, that counts how often it is read; then it wants an interrupt.
#[derive(Default)]
struct Counter {
    reads: u32,
    interrupt: bool,
}

impl Platform for Counter {
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) {
        self.reads += 1;
        self.interrupt = true;
        data.copy_from_slice(&self.reads.to_le_bytes()[..data.len()]);
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) {}
    fn port_read(&mut self, _: u16, _: u8) -> u32 {
        !0
    }
    fn port_write(&mut self, _: u16, _: u8, _: u32) {}
    fn read_msr(&mut self, _: &CpuState, _: u32) -> Option<u64> {
        None
    }
    fn write_msr(&mut self, _: &CpuState, _: u32, _: u64) -> Option<()> {
        None
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        std::mem::take(&mut self.interrupt).then_some(VECTOR)
    }
    fn interrupt_pending(&mut self) -> bool {
        self.interrupt
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _: u8) {}
    fn hypercall(&mut self, _: u64, _: [u64; 4]) -> u64 {
        0
    }
}

const VECTOR: u8 = 0x20;
const RAM: u64 = 16 << 20;
const CODE: u64 = 0x10_0000;

fn memfd() -> OwnedFd {
    // SAFETY: plain system calls; the descriptor is owned by nobody else.
    unsafe {
        let fd = libc::memfd_create(c"ram".as_ptr(), 0);
        assert!(fd >= 0);
        assert_eq!(libc::ftruncate(fd, RAM as i64), 0);
        OwnedFd::from_raw_fd(fd)
    }
}

fn put(fd: &OwnedFd, at: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt;
    let f = std::fs::File::from(fd.try_clone().unwrap());
    f.write_all_at(bytes, at).unwrap();
}

fn get(fd: &OwnedFd, at: u64, n: usize) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let f = std::fs::File::from(fd.try_clone().unwrap());
    let mut b = vec![0; n];
    f.read_exact_at(&mut b, at).unwrap();
    b
}

/// Runs `code` at [`CODE`] until it halts; gives the vCPU and the RAM. Interrupts go to
/// [`CODE`] + 0x100.
fn run(code: &[u8]) -> (TranslatedVcpu, OwnedFd) {
    run_with(code, Config::default())
}

fn run_with(code: &[u8], config: Config) -> (TranslatedVcpu, OwnedFd) {
    let (s, fd) = guest(code);
    (until_halted(&fd, s, config), fd)
}

/// A vCPU at `code`, which is at [`CODE`], and RAM.
fn guest(code: &[u8]) -> (CpuState, OwnedFd) {
    let fd = memfd();
    let handler = CODE + 0x100;
    let gate = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    put(&fd, 0x3000 + u64::from(VECTOR) * 16, &gate.to_le_bytes());
    put(&fd, 0x4008, &0x00af_9b00_0000_ffffu64.to_le_bytes());
    put(&fd, 0x4010, &0x00cf_9300_0000_ffffu64.to_le_bytes());
    put(&fd, 0x1000, &0x2003u64.to_le_bytes());
    put(&fd, 0x2000, &0x83u64.to_le_bytes());
    put(&fd, CODE, code);
    let mut s = CpuState::reset(true);
    s.cr0 = cr0::PE | cr0::PG | cr0::NE | cr0::ET | cr0::WP | cr0::MP;
    s.cr3 = 0x1000;
    s.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::PGE;
    s.xcr0 = 7;
    s.efer = efer::LME | efer::LMA | efer::SCE | efer::NXE;
    let data = Segment { base: 0, limit: !0, selector: 16, attr: 0xc093 };
    s.seg = [data; 6];
    s.seg[1] = Segment { base: 0, limit: !0, selector: 8, attr: 0xa09b };
    s.idtr.base = 0x3000;
    s.idtr.limit = 0xfff;
    s.gdtr.base = 0x4000;
    s.gdtr.limit = 0x17;
    s.rip = CODE;
    s.gpr[4] = 0x20_0000;
    s.rflags = 2;
    (s, fd)
}

/// A vCPU that began with `s` and has halted.
fn until_halted(ram: &OwnedFd, s: CpuState, config: Config) -> TranslatedVcpu {
    let slots = [RamSlot { gpa: 0, size: RAM, fd: ram.as_fd(), offset: 0 }];
    let shared = Shared::new(&slots, config).unwrap();
    let cpuid = CpuidTable::new(&host_cpuid(), Topology { index: 0, count: 1 }, 1_000_000);
    let mut v = TranslatedVcpu::new(shared, s, cpuid, Box::<Counter>::default()).unwrap();
    assert_eq!(v.run(), Exit::Halted);
    v
}

#[test]
fn arithmetic_and_halt() {
    // mov eax, 5; add rax, 7; hlt
    let (v, _) = run(&[0xb8, 5, 0, 0, 0, 0x48, 0x83, 0xc0, 7, 0xf4]);
    assert_eq!(v.state().gpr[0], 12);
    assert_eq!(v.state().rip, CODE + 10);
}

#[test]
fn selectors_are_read() {
    // mov rax, 1111111111111111h; mov r15, rax; mov rbx, rax; mov ax, ds; mov r15w, cs; mov ebx, ss; hlt
    let (v, _) = run(&[
        0x48, 0xb8, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x49, 0x89, 0xc7, 0x48, 0x89,
        0xc3, 0x66, 0x8c, 0xd8, 0x66, 0x41, 0x8c, 0xcf, 0x8c, 0xd3, 0xf4,
    ]);
    let gpr = v.state().gpr;
    assert_eq!([gpr[0], gpr[15], gpr[3]], [0x1111_1111_1111_0010, 0x1111_1111_1111_0008, 0x10]);
}

#[test]
fn loop_with_stores() {
    // mov edi, 0x300000; mov ecx, 1000; L: mov [rdi], rcx; add rdi, 8; dec rcx; jnz L; hlt
    let (v, fd) = run(&[
        0xbf, 0, 0, 0x30, 0, 0xb9, 0xe8, 3, 0, 0, 0x48, 0x89, 0x0f, 0x48, 0x83, 0xc7, 8, 0x48,
        0xff, 0xc9, 0x75, 0xf4, 0xf4,
    ]);
    assert_eq!(v.state().gpr[1], 0);
    assert_eq!(v.state().gpr[7], 0x30_0000 + 8000);
    assert_eq!(get(&fd, 0x30_0000, 8), 1000u64.to_le_bytes());
    assert_eq!(get(&fd, 0x30_0000 + 7992, 8), 1u64.to_le_bytes());
}

#[test]
fn call_push_pop_and_spilled_registers() {
    // mov r10d, 3; mov r15d, 4; push r10; push r15; call f; hlt; f: mov r14, [rsp+8];
    // add r14, [rsp+16]; add r14, r10; ret
    let (v, _) = run(&[
        0x41, 0xba, 3, 0, 0, 0, 0x41, 0xbf, 4, 0, 0, 0, 0x41, 0x52, 0x41, 0x57, 0xe8, 1, 0, 0, 0,
        0xf4, 0x4c, 0x8b, 0x74, 0x24, 8, 0x4c, 0x03, 0x74, 0x24, 16, 0x4d, 0x01, 0xd6, 0xc3,
    ]);
    assert_eq!(v.state().gpr[14], 10);
    assert_eq!(v.state().gpr[4], 0x20_0000 - 16);
}

/// An interrupt that comes with the read waits for the end of the instruction: beginning it again
/// would read twice.
#[test]
fn devices_are_read_once() {
    // mov ebx, 0x2000000; sti; nop; mov eax, [rbx + rcx]; hlt
    let mut code = vec![0xbb, 0, 0, 0, 2, 0xfb, 0x90, 0x8b, 0x04, 0x0b, 0xf4];
    code.resize(0x101, 0xf4);
    let (v, _) = run(&code);
    assert_eq!(v.state().gpr[0], 1, "what was read");
    assert_eq!(v.state().rip, CODE + 0x101, "in the handler");
}

/// More code than the cache holds, twice.
#[test]
fn a_full_cache_is_emptied() {
    const BLOCKS: usize = 100_000;
    // mov ebx, 2; then BLOCKS times: L: inc eax; jmp to the next; then: dec ebx; jnz L; hlt
    let mut code = vec![0xbb, 2, 0, 0, 0, 0x90, 0x90, 0x90];
    for _ in 0..BLOCKS {
        code.extend([0xff, 0xc0, 0xeb, 4, 0xf4, 0xf4, 0xf4, 0xf4]);
    }
    let back = -(BLOCKS as i32 * 8 + 8);
    code.extend([0xff, 0xcb, 0x0f, 0x85]);
    code.extend(back.to_le_bytes());
    code.push(0xf4);
    let (v, _) = run_with(&code, Config { code_cache_bytes: 4 << 20, ..Config::default() });
    assert_eq!(v.state().gpr[0], 2 * BLOCKS as u64);
    assert!(v.stats().cache_drops >= 2, "{:?}", v.stats());
}

/// Code goes on behind HLT by an indirect jump, and stores: what finds both was given back.
#[test]
fn a_vcpu_that_rested_goes_on() {
    // mov edi, 0x300000; lea rsi, [rip]; (L:) inc dword ptr [rdi]; hlt; jmp rsi
    let code = [0xbf, 0, 0, 0x30, 0, 0x48, 0x8d, 0x35, 0, 0, 0, 0, 0xff, 0x07, 0xf4, 0xff, 0xe6];
    let (mut v, fd) = run(&code);
    for round in 2..200u32 {
        v.state_mut().halted = 0;
        if round % 3 != 0 {
            v.rest();
        }
        assert_eq!(v.run(), Exit::Halted);
        assert_eq!(get(&fd, 0x30_0000, 4), round.to_le_bytes());
    }
}

/// Who holds what was frozen finds it so, whatever was frozen and let go of since.
#[test]
fn what_is_frozen_stays_as_long_as_it_is_held() {
    use std::os::fd::AsRawFd;
    const AT: u64 = 0x30_0000;
    let fd = memfd();
    let mapping = Arc::new(Reservation::new(RAM as usize).unwrap());
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    mapping.map_file(0, RAM as usize, prot, fd.as_raw_fd(), 0).unwrap();
    let slots = [RamSlot { gpa: 0, size: RAM, fd: fd.as_fd(), offset: 0 }];
    let raw = Some(Arc::clone(&mapping));
    let shared = Shared::with_mapping(&slots, raw, None, Config::default()).unwrap();
    let write = |at: u64, byte: u8| {
        shared.before_access(at, 1, true);
        // SAFETY: inside the mapping, which is writable there since that was said.
        unsafe { ((mapping.addr() + at) as *mut u8).write_volatile(byte) };
        shared.ram_written(at, 1);
    };
    let held = |frozen: &Frozen, at: u64| {
        let number = usize::from(frozen.origin.of_page[(at / 4096) as usize]);
        number.checked_sub(1).map_or(0, |file| get(&frozen.origin.files[file], at, 1)[0])
    };
    write(AT, 1);
    write(AT + 4096, 1);
    let first = shared.freeze(memfd()).unwrap();
    write(AT, 2);
    let second = shared.freeze(memfd()).unwrap();
    write(AT, 3);
    assert_eq!([held(&first, AT), held(&second, AT)], [1, 2]);
    shared.unfreeze(second).unwrap();
    write(AT, 4);
    write(AT + 4096, 4);
    assert_eq!([held(&first, AT), held(&first, AT + 4096)], [1, 1]);
    let third = shared.freeze(memfd()).unwrap();
    shared.unfreeze(first).unwrap();
    write(AT + 4096, 5);
    assert_eq!([held(&third, AT), held(&third, AT + 4096)], [4, 4]);
    // One that nobody lets go of, as what clones have, through more files than are kept apart.
    for round in 0..200 {
        write(AT, round);
        drop(shared.freeze(memfd()).unwrap());
    }
    assert_eq!([held(&third, AT), held(&third, AT + 4096)], [4, 4]);
    shared.unfreeze(third).unwrap();
    let last = shared.freeze(memfd()).unwrap();
    assert_eq!([held(&last, AT), held(&last, AT + 4096)], [199, 5]);
}

/// What is given back is zero for this machine, whatever it is in, and stays for whoever else has it.
#[test]
fn what_is_given_back_is_zero_unless_somebody_else_has_it() {
    use std::os::fd::AsRawFd;
    const AT: u64 = 0x30_0000;
    let fd = memfd();
    let mapping = Arc::new(Reservation::new(RAM as usize).unwrap());
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    mapping.map_file(0, RAM as usize, prot, fd.as_raw_fd(), 0).unwrap();
    let slots = [RamSlot { gpa: 0, size: RAM, fd: fd.as_fd(), offset: 0 }];
    let raw = Some(Arc::clone(&mapping));
    let shared = Shared::with_mapping(&slots, raw, None, Config::default()).unwrap();
    let write = |at: u64, byte: u8| {
        shared.before_access(at, 1, true);
        // SAFETY: inside the mapping, which is writable there since that was said.
        unsafe { ((mapping.addr() + at) as *mut u8).write_volatile(byte) };
        shared.ram_written(at, 1);
    };
    let read = |at: u64| {
        shared.before_access(at, 1, false);
        // SAFETY: inside the mapping, which is readable.
        unsafe { ((mapping.addr() + at) as *const u8).read_volatile() }
    };
    let held = |frozen: &Frozen, at: u64| {
        let number = usize::from(frozen.origin.of_page[(at / 4096) as usize]);
        number.checked_sub(1).map_or(0, |file| get(&frozen.origin.files[file], at, 1)[0])
    };
    let pages = [AT, AT + 4096, AT + 8192];
    for at in pages {
        write(at, 1);
    }
    // Whole pages only, and what is no memory is none.
    assert_eq!(shared.discard(AT + 4096, 8191).unwrap(), 4096);
    assert_eq!(pages.map(read), [1, 0, 1]);
    assert_eq!(shared.discard(RAM - 4096, u64::MAX).unwrap(), 4096);
    assert_eq!(shared.discard(1 << 50, 4096).unwrap(), 0);
    let frozen = shared.freeze(memfd()).unwrap();
    write(AT, 2);
    // One is this machine's own by now, the others are not.
    assert_eq!(shared.discard(AT, 3 * 4096).unwrap(), 4096);
    assert_eq!(pages.map(read), [0, 0, 1]);
    assert_eq!(pages.map(|at| held(&frozen, at)), [1, 0, 1]);
    write(AT + 8192, 3);
    write(AT, 4);
    assert_eq!(pages.map(|at| held(&frozen, at)), [1, 0, 1]);
    // Nobody needs it any more: what was copied is in one file, what was not in the other.
    shared.unfreeze(frozen).unwrap();
    write(AT + 4096, 5);
    assert_eq!(pages.map(read), [4, 5, 3]);
    assert!(shared.discard(AT, 3 * 4096).unwrap() >= 2 * 4096);
    assert_eq!(pages.map(read), [0, 0, 0]);
    let last = shared.freeze(memfd()).unwrap();
    assert_eq!(pages.map(|at| held(&last, at)), [0, 0, 0]);
}

/// Translations of a page that is given back are not executed any more.
#[test]
fn code_that_is_given_back_is_gone() {
    // mov eax, 7; hlt
    let (s, fd) = guest(&[0xb8, 7, 0, 0, 0, 0xf4]);
    let slots = [RamSlot { gpa: 0, size: RAM, fd: fd.as_fd(), offset: 0 }];
    let shared = Shared::new(&slots, Config::default()).unwrap();
    let cpuid = CpuidTable::new(&host_cpuid(), Topology { index: 0, count: 1 }, 1_000_000);
    let platform = Box::<Counter>::default();
    let mut vcpu = TranslatedVcpu::new(Arc::clone(&shared), s, cpuid, platform).unwrap();
    assert_eq!((vcpu.run(), vcpu.state().gpr[0]), (Exit::Halted, 7));
    shared.discard(CODE & !4095, 4096).unwrap();
    // Nobody is told of this.
    put(&fd, CODE, &[0xb8, 9, 0, 0, 0, 0xf4]);
    let state = vcpu.state_mut();
    (state.rip, state.halted) = (CODE, 0);
    assert_eq!((vcpu.run(), vcpu.state().gpr[0]), (Exit::Halted, 9));
}
