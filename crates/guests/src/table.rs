//! The guests. The texts beside a check name the manual's section and what QEMU TCG 7.2 does instead.

use std::time::Duration;

use crate::catalog::{Deviation, Expect, Guest, Need};

macro_rules! guest {
    ($name:literal, $cpus:expr, $expect:expr, $needs:expr) => {
        Guest {
            name: $name,
            elf: include_bytes!(concat!(env!("OUT_DIR"), "/", $name, ".elf")),
            path: concat!(env!("OUT_DIR"), "/", $name, ".elf"),
            cpus: &$cpus,
            expect: $expect,
            needs: &$needs,
            qemu_differs: &[],
            qemu_lost_at: None,
            qemu_skips: None,
            timeout: Duration::from_secs(120),
        }
    };
}

const fn differs(check: &'static str, manual: &'static str) -> Deviation {
    Deviation { check, manual }
}

pub(crate) const GUESTS: &[Guest] = &[
    Guest {
        qemu_differs: &[
            differs("db: int1", "vol. 2, INT1: #DB; TCG raises #UD"),
            differs(
                "ud: lock mov r,r",
                "vol. 2, LOCK: #UD on instructions without a locked form; TCG ignores the prefix",
            ),
            differs(
                "ud: lock mov m,r",
                "vol. 2, LOCK: #UD on instructions without a locked form; TCG ignores the prefix",
            ),
            differs(
                "ud: lock shl m,1",
                "vol. 2, LOCK: #UD on instructions without a locked form; TCG ignores the prefix",
            ),
            differs(
                "ud: lock bt m,imm",
                "vol. 2, LOCK: #UD on instructions without a locked form; TCG ignores the prefix",
            ),
            differs(
                "ud: lock test m,r",
                "vol. 2, LOCK: #UD on instructions without a locked form; TCG ignores the prefix",
            ),
            differs(
                "ud: c6 /1",
                "vol. 2, appendix A, groups 1A and 11: undefined; TCG ignores the reg field",
            ),
            differs(
                "ud: 8f /1",
                "vol. 2, appendix A, groups 1A and 11: undefined; TCG ignores the reg field",
            ),
            differs(
                "np: gate of #UD not present",
                "vol. 3, 6.13: the index is the vector; TCG uses twice that and no EXT",
            ),
            differs(
                "np: int 0x90, gate not present",
                "vol. 3, 6.13: the index is the vector; TCG uses twice that and no EXT",
            ),
            differs(
                "gp: int 0x90, not a gate",
                "vol. 3, 6.13: the index is the vector; TCG uses twice that and no EXT",
            ),
            differs(
                "gp: int beyond the IDT limit",
                "vol. 3, 6.13: the index is the vector; TCG uses twice that and no EXT",
            ),
        ],
        ..guest!("exc_basic", [1], Expect::Checks(97), [Need::FullEmulation, Need::Int3])
    },
    Guest {
        qemu_differs: &[
            differs(
                "mov cr0: NW without CD",
                "vol. 2, MOV CRn: #GP for reserved bits and NW without CD; TCG ignores them",
            ),
            differs(
                "mov cr0: bit 32",
                "vol. 2, MOV CRn: #GP for reserved bits and NW without CD; TCG ignores them",
            ),
        ],
        qemu_lost_at: Some("mov cr3: reserved bit 52"),
        ..guest!("exc_control_regs", [1], Expect::Checks(15), [Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[differs(
            "sti",
            "vol. 3, 6.8.1: STI delays maskable interrupts only; TCG also delays the trap",
        )],
        ..guest!("exc_db_step", [1], Expect::Checks(34), [Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[
            differs(
                "ts: emms",
                "vol. 2, EMMS: #NM, #UD, #MF as other MMX instructions; TCG does not check",
            ),
            differs(
                "em: emms",
                "vol. 2, EMMS: #NM, #UD, #MF as other MMX instructions; TCG does not check",
            ),
            differs(
                "mf: fld1 after 1/0",
                "vol. 1, 8.7: waiting instructions report the error; TCG only at FWAIT",
            ),
            differs(
                "mf: emms",
                "vol. 2, EMMS: #NM, #UD, #MF as other MMX instructions; TCG does not check",
            ),
            differs("xm: divss by 0", "vol. 1, 11.5: TCG has no unmasked SSE exceptions"),
            differs("xm: target unchanged", "vol. 1, 11.5: TCG has no unmasked SSE exceptions"),
            differs("xm: without OSXMMEXCPT", "vol. 1, 11.5: TCG has no unmasked SSE exceptions"),
            differs("ac: dword at 1", "vol. 3, 6.15, interrupt 17: TCG has no alignment checks"),
            differs("ac: dword at 2", "vol. 3, 6.15, interrupt 17: TCG has no alignment checks"),
            differs("ac: word at 1", "vol. 3, 6.15, interrupt 17: TCG has no alignment checks"),
            differs("ac: qword at 4", "vol. 3, 6.15, interrupt 17: TCG has no alignment checks"),
            differs("ac: lock inc at 2", "vol. 3, 6.15, interrupt 17: TCG has no alignment checks"),
            differs("ac: fld m64 at 4", "vol. 3, 6.15, interrupt 17: TCG has no alignment checks"),
        ],
        ..guest!("exc_fpu_align", [1], Expect::Checks(42), [Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[
            differs(
                "mov ss null with RPL 3 at CPL 0",
                "vol. 2, MOV: null in SS needs RPL = CPL; TCG does not check",
            ),
            differs("ltr null", "vol. 2, LTR: #GP(0) for null; TCG accepts it"),
            differs(
                "jmp to a non-canonical rip",
                "vol. 2, JMP, CALL, RET, IRET, SYSRET, SYSEXIT: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
            differs(
                "call to a non-canonical rip",
                "vol. 2, JMP, CALL, RET, IRET, SYSRET, SYSEXIT: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
            differs(
                "load that reaches into the hole",
                "vol. 3, 6.15 and vol. 1, 3.3.7.1: TCG does not check as the manual says",
            ),
            differs(
                "load via rbp non-canonical",
                "vol. 3, 6.15 and vol. 1, 3.3.7.1: TCG does not check as the manual says",
            ),
            differs(
                "store via rbp + index non-canonical",
                "vol. 3, 6.15 and vol. 1, 3.3.7.1: TCG does not check as the manual says",
            ),
            differs(
                "leave non-canonical",
                "vol. 3, 6.15 and vol. 1, 3.3.7.1: TCG does not check as the manual says",
            ),
            differs(
                "push non-canonical",
                "vol. 3, 6.15 and vol. 1, 3.3.7.1: TCG does not check as the manual says",
            ),
            differs(
                "call with rsp non-canonical",
                "vol. 3, 6.15 and vol. 1, 3.3.7.1: TCG does not check as the manual says",
            ),
            differs(
                "ret non-canonical rsp",
                "vol. 3, 6.15 and vol. 1, 3.3.7.1: TCG does not check as the manual says",
            ),
            differs(
                "ret to a non-canonical rip",
                "vol. 2, JMP, CALL, RET, IRET, SYSRET, SYSEXIT: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
            differs("mov cr8: bit 8", "vol. 2, MOV CRn: reserved bits raise #GP; TCG ignores them"),
            differs(
                "rdmsr unknown",
                "vol. 2, RDMSR and WRMSR: #GP for unknown MSRs and reserved values; TCG ignores them",
            ),
            differs(
                "wrmsr unknown",
                "vol. 2, RDMSR and WRMSR: #GP for unknown MSRs and reserved values; TCG ignores them",
            ),
            differs(
                "wrmsr LSTAR non-canonical",
                "vol. 2, RDMSR and WRMSR: #GP for unknown MSRs and reserved values; TCG ignores them",
            ),
            differs(
                "wrmsr GS_BASE non-canonical",
                "vol. 2, RDMSR and WRMSR: #GP for unknown MSRs and reserved values; TCG ignores them",
            ),
            differs(
                "wrmsr KERNEL_GS_BASE non-canonical",
                "vol. 2, RDMSR and WRMSR: #GP for unknown MSRs and reserved values; TCG ignores them",
            ),
            differs(
                "wrmsr SYSENTER_EIP non-canonical",
                "vol. 2, RDMSR and WRMSR: #GP for unknown MSRs and reserved values; TCG ignores them",
            ),
            differs(
                "wrmsr EFER reserved bit",
                "vol. 2, RDMSR and WRMSR: #GP for unknown MSRs and reserved values; TCG ignores them",
            ),
            differs(
                "wrmsr EFER clearing LME with paging",
                "vol. 2, RDMSR and WRMSR: #GP for unknown MSRs and reserved values; TCG ignores them",
            ),
            differs(
                "wrmsr PAT type 2",
                "vol. 2, RDMSR and WRMSR: #GP for unknown MSRs and reserved values; TCG ignores them",
            ),
            differs("ldmxcsr reserved bit", "vol. 2, LDMXCSR: #GP; TCG ignores reserved bits"),
            differs(
                "cpl 3: int through a DPL 0 gate",
                "vol. 3, 6.13: the index is the vector; TCG uses twice that and no EXT",
            ),
            differs("cpl 3: int1 ignores gate DPL", "vol. 2, INT1: #DB; TCG raises #UD"),
            differs("cpl 3: #UD with rsp0 non-canonical", "vol. 2, INT n: #SS(EXT); TCG pushes 0"),
        ],
        ..guest!("exc_gp_np", [1], Expect::Checks(108), [Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[
            differs(
                "pd: not present, rmw is a write",
                "vol. 3, 4.7: W/R for read-modify-write (as processors do); TCG reports the read",
            ),
            differs(
                "xchg is a write",
                "vol. 3, 4.7: W/R for read-modify-write (as processors do); TCG reports the read",
            ),
            differs(
                "cmpxchg is a write",
                "vol. 3, 4.7: W/R for read-modify-write (as processors do); TCG reports the read",
            ),
            differs(
                "lock inc is a write",
                "vol. 3, 4.7: W/R for read-modify-write (as processors do); TCG reports the read",
            ),
            differs(
                "bts m is a write",
                "vol. 3, 4.7: W/R for read-modify-write (as processors do); TCG reports the read",
            ),
            differs(
                "reserved bit 51 in a PTE",
                "vol. 3, 4.7: P is set when RSVD is; TCG clears it",
            ),
            differs("reserved bit 51, write", "vol. 3, 4.7: P is set when RSVD is; TCG clears it"),
            differs(
                "reserved bit 13 in a 2 MiB entry",
                "vol. 3, 4.7: P is set when RSVD is; TCG clears it",
            ),
            differs("PS in a PML4 entry", "vol. 3, 4.7: P is set when RSVD is; TCG clears it"),
            differs(
                "reserved bit and no write right",
                "vol. 3, 4.7: P is set when RSVD is; TCG clears it",
            ),
            differs("XD set with NXE clear", "vol. 3, 4.7: P is set when RSVD is; TCG clears it"),
        ],
        ..guest!("exc_page_fault", [1], Expect::Checks(101), [Need::FullEmulation])
    },
    guest!("triple_fault", [1], Expect::Reset("now a triple fault"), []),
    Guest {
        qemu_differs: &[
            differs(
                "SMAP: implicit access with AC set: vector",
                "vol. 3, 4.6: AC does not help implicit accesses; TCG lets it at CPL 0",
            ),
            differs(
                "SMAP: implicit access with AC set: error code",
                "vol. 3, 4.6: AC does not help implicit accesses; TCG lets it at CPL 0",
            ),
        ],
        ..guest!("paging_bits", [1], Expect::Checks(55), [Need::FullEmulation])
    },
    guest!("paging_tlb", [1], Expect::Checks(48), []),
    Guest {
        qemu_skips: Some("the error code of read-modify-write accesses, in each of these checks"),
        ..guest!("paging_random", [1], Expect::Checks(4), [Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[
            differs(
                "add m crossing",
                "vol. 3, 4.7: W/R for read-modify-write (as processors do); TCG reports the read",
            ),
            differs(
                "movups: nothing written",
                "vol. 3, 6.5: a faulting instruction can be restarted; TCG writes the first half",
            ),
            differs(
                "repe cmpsb: flags",
                "vol. 2, REP: a fault restores the flags from before; TCG leaves the last iteration's",
            ),
            differs(
                "repe cmpsd: flags",
                "vol. 2, REP: a fault restores the flags from before; TCG leaves the last iteration's",
            ),
        ],
        ..guest!("paging_cross", [1], Expect::Checks(80), [Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[
            differs(
                "cpl 3, iopl 0: cli: rflags",
                "vol. 3, 17.3.1.1: faults save RF = 1; TCG saves 0",
            ),
            differs(
                "cpl 3, iopl 0: sti: rflags",
                "vol. 3, 17.3.1.1: faults save RF = 1; TCG saves 0",
            ),
            differs(
                "cpl 3, iopl 1: cli: rflags",
                "vol. 3, 17.3.1.1: faults save RF = 1; TCG saves 0",
            ),
            differs(
                "cpl 3, iopl 2: sti: rflags",
                "vol. 3, 17.3.1.1: faults save RF = 1; TCG saves 0",
            ),
            differs(
                "fault: RF set in the saved flags",
                "vol. 3, 17.3.1.1: faults save RF = 1; TCG saves 0",
            ),
        ],
        ..guest!("priv_flags", [1], Expect::Checks(48), [Need::FullEmulation])
    },
    guest!("priv_io", [1], Expect::Checks(21), [Need::FullEmulation]),
    Guest {
        qemu_differs: &[
            differs(
                "syscall: rflags masked",
                "vol. 2, SYSCALL: RFLAGS AND NOT IA32_FMASK; TCG clears the arithmetic flags too",
            ),
            differs(
                "sysretq: ends in the program",
                "vol. 2, SYSRET: RFLAGS is R11 AND 3C7FD7H; TCG loads VM",
            ),
            differs(
                "sysretq: RF and VM are not loaded",
                "vol. 2, SYSRET: RFLAGS is R11 AND 3C7FD7H; TCG loads VM",
            ),
            differs(
                "sysretq: non-canonical rcx",
                "vol. 2, JMP, CALL, RET, IRET, SYSRET, SYSEXIT: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
            differs(
                "sysretq: non-canonical rcx after many",
                "vol. 2, JMP, CALL, RET, IRET, SYSRET, SYSEXIT: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
            differs(
                "syscall with less masked: rflags",
                "vol. 2, SYSCALL: RFLAGS AND NOT IA32_FMASK; TCG clears the arithmetic flags too",
            ),
            differs(
                "sysretq: that fault is at CPL 0",
                "vol. 2, JMP, CALL, RET, IRET, SYSRET, SYSEXIT: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
            differs(
                "sysexitq to a non-canonical rip",
                "vol. 2, JMP, CALL, RET, IRET, SYSRET, SYSEXIT: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
            differs(
                "sysexitq with a non-canonical rsp",
                "vol. 3, 6.15 and vol. 1, 3.3.7.1: TCG does not check as the manual says",
            ),
            differs(
                "syscall in compatibility mode",
                "vol. 2, SYSCALL: #UD outside 64-bit mode; TCG goes to CSTAR (as AMD)",
            ),
            differs(
                "wrfsbase non-canonical",
                "vol. 3, 6.15 and vol. 1, 3.3.7.1: TCG does not check as the manual says",
            ),
            differs(
                "cpl 0: rdpmc of a counter that does not exist",
                "vol. 2, RDPMC: #GP(0); TCG raises #UD",
            ),
        ],
        ..guest!("priv_syscall", [1], Expect::Checks(80), [Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[
            differs(
                "iretq to CPL 3, ss not present",
                "vol. 2, IRET: #SS(selector); TCG raises #NP",
            ),
            differs(
                "iretq, rip non-canonical",
                "vol. 2, JMP, CALL, RET, IRET, SYSRET, SYSEXIT: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
            differs(
                "iretq, rip non-canonical: rsp",
                "vol. 2, JMP, CALL, RET, IRET, SYSRET, SYSEXIT: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
            differs(
                "iretq to CPL 3, rip non-canonical",
                "vol. 2, JMP, CALL, RET, IRET, SYSRET, SYSEXIT: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
            differs(
                "iretq to CPL 3, rip non-canonical: rsp",
                "vol. 2, JMP, CALL, RET, IRET, SYSRET, SYSEXIT: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
        ],
        ..guest!("priv_gates", [1], Expect::Checks(122), [Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[
            differs(
                "unaligned address: low bits ignored",
                "vol. 3, 17.2.5: low address bits are ignored by length; TCG uses them",
            ),
            differs(
                "unaligned address: low bits ignored: rip",
                "vol. 3, 17.2.5: low address bits are ignored by length; TCG uses them",
            ),
            differs(
                "unaligned address: low bits ignored: once",
                "vol. 3, 17.2.5: low address bits are ignored by length; TCG uses them",
            ),
            differs(
                "two watchpoints by one store",
                "vol. 3, 17.3.1.2: all matching B bits are set; TCG sets one",
            ),
            differs(
                "exec: no RF in the saved flags",
                "vol. 3, 17.3.1.1: faults save RF = 1; TCG saves 0",
            ),
            differs(
                "exec: rep instruction hits once",
                "vol. 3, 17.3.1.1: RF stays set until the instruction is done; TCG breaks on each iteration",
            ),
            differs(
                "exec: held back by mov ss",
                "vol. 3, 6.8.3: MOV SS holds #DB back; TCG does not",
            ),
            differs("gd: mov to dr0", "vol. 3, 17.2.4: general detect; TCG does not have it"),
            differs("gd: BD", "vol. 3, 17.2.4: general detect; TCG does not have it"),
            differs(
                "gd: cleared on entry to the handler",
                "vol. 3, 17.2.4: general detect; TCG does not have it",
            ),
            differs("gd: mov from dr6", "vol. 3, 17.2.4: general detect; TCG does not have it"),
        ],
        ..guest!("debug_regs", [1], Expect::Checks(102), [Need::FullEmulation])
    },
    guest!("smc", [1], Expect::Checks(26), [Need::FullEmulation, Need::Speed]),
    Guest {
        qemu_differs: &[differs(
            "code changed elsewhere: new after the protocol",
            "vol. 3, 8.1.3: TCG can keep a translation made between its invalidation and the store",
        )],
        // 8,000 locked additions across lines and pages: where the host traps bus locks, each may take it
        // milliseconds, of which it gives one program few.
        timeout: Duration::from_secs(900),
        ..guest!("smp", [2, 4], Expect::Checks(34), [Need::Cmpxchg16b, Need::Speed, Need::BusLocks])
    },
    guest!("timers", [1], Expect::Checks(52), [Need::Speed]),
    Guest {
        qemu_differs: &[
            differs(
                "limit: byte behind",
                "vol. 3, 5.3 and 5.5: segment limits and types; TCG does not check them",
            ),
            differs(
                "limit: dword over it",
                "vol. 3, 5.3 and 5.5: segment limits and types; TCG does not check them",
            ),
            differs(
                "expand-down: below",
                "vol. 3, 5.3 and 5.5: segment limits and types; TCG does not check them",
            ),
            differs(
                "null selector",
                "vol. 3, 5.3 and 5.5: segment limits and types; TCG does not check them",
            ),
            differs(
                "write through a code selector",
                "vol. 3, 5.3 and 5.5: segment limits and types; TCG does not check them",
            ),
            differs(
                "write through cs",
                "vol. 3, 5.3 and 5.5: segment limits and types; TCG does not check them",
            ),
            differs(
                "stack segment limit by ebp",
                "vol. 3, 5.3 and 5.5: segment limits and types; TCG does not check them",
            ),
            differs(
                "PAE: mov cr3 with a reserved PDPTE bit",
                "vol. 3, 4.4.1: PDPTEs are checked and loaded by MOV CR3; TCG reads them in each walk",
            ),
            differs(
                "PAE: PDPTE in memory cleared, registers not reloaded",
                "vol. 3, 4.4.1: PDPTEs are checked and loaded by MOV CR3; TCG reads them in each walk",
            ),
            differs(
                "real: word at offset 0xffff faults",
                "vol. 3, 5.3 and 5.5: segment limits and types; TCG does not check them",
            ),
        ],
        ..guest!("modes", [1], Expect::Checks(52), [Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[
            differs("xsave: CR0.TS", "vol. 1, 13.7: #NM with CR0.TS; TCG saves"),
            differs("xrstor: CR0.TS", "vol. 1, 13.8: #NM with CR0.TS; TCG restores"),
        ],
        ..guest!("xsave", [1], Expect::Checks(26), [Need::Xsave, Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[differs(
            "a task without its data segment: saved eip",
            "vol. 3, 7.3: a fault of loading segments is one of the new task; TCG saves the old EIP",
        )],
        ..guest!("tasks", [1], Expect::Checks(28), [Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[
            differs("a word at 0xffff", "vol. 3, 5.3: segment limits; TCG does not check them"),
            differs(
                "a word at 0xffff: saved EIP",
                "vol. 3, 5.3: segment limits; TCG does not check them",
            ),
            differs(
                "iretd to beyond 64 KiB",
                "vol. 2, IRET: the new EIP has to be within the limit; TCG cuts it",
            ),
            differs(
                "iretd to beyond 64 KiB: saved EIP",
                "vol. 2, IRET: the new EIP has to be within the limit; TCG cuts it",
            ),
        ],
        ..guest!("vm86", [1], Expect::Checks(85), [Need::FullEmulation])
    },
    Guest {
        qemu_skips: Some("the devices it is about"),
        ..guest!("rubbish", [1], Expect::Checks(6), [])
    },
    Guest {
        qemu_skips: Some("word reads of the serial port (it aborts)"),
        ..guest!("hostile", [1], Expect::Checks(11), [Need::Speed, Need::FullEmulation])
    },
];
