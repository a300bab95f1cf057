//! The process for direct execution, without a guest.

use std::os::fd::AsRawFd;

use super::{CALL_AT, Change, Regs, STUBBORN, Stopped, Stub, tell};
use crate::sys;

const CODE: u64 = 0x40_0000;
const DATA: u64 = 0x7fff_1234_5000;

/// A stub with `code` and a page of data.
fn stub(code: &[u8]) -> (Stub, std::fs::File) {
    use std::os::unix::fs::FileExt;
    let ram = std::fs::File::from(sys::memfd(c"ram", 1 << 20).unwrap());
    ram.write_all_at(code, 0).unwrap();
    let mut stub = Stub::new(&[ram.as_raw_fd()]).unwrap();
    let fd = ram.as_raw_fd();
    let rx = libc::PROT_READ | libc::PROT_EXEC;
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    stub.change(&[
        Change::Map { at: CODE, len: 4096, prot: rx, fd, offset: 0 },
        Change::Map { at: DATA, len: 4096, prot: rw, fd, offset: 8192 },
    ])
    .unwrap();
    let regs = Regs { rip: CODE, rdi: DATA, rsi: 7, orig_rax: u64::MAX, ..*stub.initial() };
    stub.set_registers(&regs).unwrap();
    (stub, ram)
}

#[test]
fn guest_code_runs_until_a_system_call() {
    use std::os::unix::fs::FileExt;
    // mov [rdi], rsi; mov eax, 39; syscall
    let (stub, ram) = stub(&[0x48, 0x89, 0x37, 0xb8, 39, 0, 0, 0, 0x0f, 0x05]);
    assert_eq!(stub.run().unwrap(), Stopped::Syscall);
    let regs = stub.registers().unwrap();
    assert_eq!((regs.rip, regs.rcx), (CODE + 10, CODE + 10));
    let mut word = [0; 8];
    ram.read_exact_at(&mut word, 8192).unwrap();
    assert_eq!(word, 7u64.to_le_bytes());
}

#[test]
fn accesses_are_told_apart() {
    // mov [rdi], rsi to nothing
    let (stub, _ram) = stub(&[0x48, 0x89, 0x37]);
    let at = |rdi| {
        let regs = Regs { rip: CODE, rdi, orig_rax: u64::MAX, ..*stub.initial() };
        stub.set_registers(&regs).unwrap();
        stub.run().unwrap()
    };
    assert_eq!(at(0x5000), Stopped::Access { address: 0x5000, mapped: false });
    assert_eq!(at(CODE), Stopped::Access { address: CODE, mapped: true });
    assert_eq!(at(1 << 63), Stopped::Other);
}

#[test]
fn it_stops_when_told() {
    // jmp $
    let (stub, _ram) = stub(&[0xeb, 0xfe]);
    tell(stub.pid());
    assert_eq!(stub.run().unwrap(), Stopped::Told);
    assert_eq!(stub.registers().unwrap().rip, CODE);
}

#[test]
fn vector_registers_go_both_ways() {
    // vaddpd ymm0, ymm1, ymm1; syscall
    let (mut stub, _ram) = stub(&[0xc5, 0xf5, 0x58, 0xc1, 0x0f, 0x05]);
    let mut area = vec![0; 832];
    area[0] = 0x7f;
    area[1] = 3;
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area[512] = 7;
    for at in [176, 184, 592, 600] {
        area[at..at + 8].copy_from_slice(&1.5f64.to_le_bytes());
    }
    stub.set_xsave(&area).unwrap();
    assert_eq!(stub.run().unwrap(), Stopped::Syscall);
    stub.xsave(&mut area).unwrap();
    for at in [160, 168, 576, 584] {
        assert_eq!(area[at..at + 8], 3.0f64.to_le_bytes());
    }
}

#[test]
fn cpuid_and_privileged_instructions_stop() {
    let (stub, _ram) = stub(&[0x0f, 0xa2, 0xfa, 0xcc]);
    if stub.cpuid_traps {
        assert_eq!(stub.run().unwrap(), Stopped::Other);
    }
    let at = |offset| {
        let regs = Regs { rip: CODE + offset, orig_rax: u64::MAX, ..*stub.initial() };
        stub.set_registers(&regs).unwrap();
        stub.run().unwrap()
    };
    assert_eq!(at(2), Stopped::Other);
    assert_eq!(at(3), Stopped::Trap);
    assert_eq!(stub.registers().unwrap().rip, CODE + 4);
}

/// Guest code that jumps to our instructions changes no mappings.
#[test]
fn our_instructions_are_of_no_use_to_the_guest() {
    let (stub, _ram) = stub(&[0xeb, 0xfe]);
    let regs = Regs {
        rip: stub.base() + CALL_AT,
        rax: libc::SYS_munmap as u64,
        rdi: CODE,
        rsi: 4096,
        orig_rax: u64::MAX,
        ..*stub.initial()
    };
    stub.set_registers(&regs).unwrap();
    assert_eq!(stub.run().unwrap(), Stopped::Syscall);
    let regs = Regs { rip: CODE, orig_rax: u64::MAX, ..*stub.initial() };
    stub.set_registers(&regs).unwrap();
    tell(stub.pid());
    assert_eq!(stub.run().unwrap(), Stopped::Told);
    assert_eq!(stub.registers().unwrap().rip, CODE);
}

#[test]
fn it_stops_before_what_is_not_to_be_executed() {
    // nop; xgetbv; nop; xgetbv; syscall
    let code = [0x90, 0x0f, 1, 0xd0, 0x90, 0x0f, 1, 0xd0, 0x0f, 5];
    let (stub, _ram) = stub(&code);
    stub.stop_at(&[CODE + 1, CODE + 5]).unwrap();
    let mut regs = Regs { rip: CODE, orig_rax: u64::MAX, ..*stub.initial() };
    for at in [CODE + 1, CODE + 5] {
        stub.set_registers(&regs).unwrap();
        assert_eq!(stub.run().unwrap(), Stopped::Other);
        regs = stub.registers().unwrap();
        assert_eq!(regs.rip, at);
        regs.rip += 3;
    }
    stub.stop_at(&[]).unwrap();
    stub.set_registers(&Regs { rip: CODE, rcx: 0, ..regs }).unwrap();
    assert_eq!(stub.run().unwrap(), Stopped::Syscall);
}

#[test]
fn all_flags_can_be_set() {
    // jmp $
    let (mut stub, _ram) = stub(&[0xeb, 0xfe]);
    let before = stub.registers().unwrap();
    for flags in [STUBBORN, 0, 0, STUBBORN] {
        stub.set_stubborn(flags).unwrap();
        stub.set_registers(&Regs { orig_rax: u64::MAX, ..before }).unwrap();
        tell(stub.pid());
        assert_eq!(stub.run().unwrap(), Stopped::Told);
        let now = stub.registers().unwrap();
        assert_eq!((now.rip, now.eflags & STUBBORN), (CODE, flags));
    }
}

#[test]
fn what_is_executed_only_cannot_be_read() {
    // mov rax, [rdi]; syscall
    let (mut stub, ram) = stub(&[0x48, 0x8b, 0x07, 0x0f, 5]);
    if !stub.execute_only {
        return println!("skipped: the processor here has no pages that can be executed only");
    }
    let fd = ram.as_raw_fd();
    let prot = libc::PROT_EXEC;
    stub.change(&[Change::Map { at: CODE, len: 4096, prot, fd, offset: 0 }]).unwrap();
    let mut area = vec![0; 832];
    area[512] = 7;
    for set in [false, true] {
        if set {
            stub.set_xsave(&area).unwrap();
        }
        for (rdi, stopped) in
            [(CODE, Stopped::Access { address: CODE, mapped: true }), (DATA, Stopped::Syscall)]
        {
            let regs = Regs { rip: CODE, rdi, orig_rax: u64::MAX, ..*stub.initial() };
            stub.set_registers(&regs).unwrap();
            assert_eq!(stub.run().unwrap(), stopped);
        }
    }
}
