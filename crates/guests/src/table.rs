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
                "vol. 2, appendix A, group 1A and 11: undefined; TCG ignores the reg field",
            ),
            differs(
                "ud: 8f /1",
                "vol. 2, appendix A, group 1A and 11: undefined; TCG ignores the reg field",
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
                "mov ss null with RPL 3 at CPL 0",
                "vol. 2, MOV: null in SS needs RPL = CPL; TCG does not check",
            ),
            differs("ltr null", "vol. 2, LTR: #GP(0) for null; TCG accepts it"),
            differs(
                "jmp to a non-canonical rip",
                "vol. 2, JMP, CALL, RET: #GP at the transfer; TCG faults at the target (as AMD)",
            ),
            differs(
                "call to a non-canonical rip",
                "vol. 2, JMP, CALL, RET: #GP at the transfer; TCG faults at the target (as AMD)",
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
                "vol. 2, JMP, CALL, RET: #GP at the transfer; TCG faults at the target (as AMD)",
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
                "cpl 3: sysexit",
                "vol. 2, SYSEXIT: #GP at CPL 3; TCG of this model raises #UD",
            ),
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
        qemu_differs: &[
            differs(
                "pd: not present, rmw is a write",
                "vol. 3, 4.7: W/R for read-modify-write (checked on a processor); TCG reports the read",
            ),
            differs(
                "xchg is a write",
                "vol. 3, 4.7: W/R for read-modify-write (checked on a processor); TCG reports the read",
            ),
            differs(
                "cmpxchg is a write",
                "vol. 3, 4.7: W/R for read-modify-write (checked on a processor); TCG reports the read",
            ),
            differs(
                "lock inc is a write",
                "vol. 3, 4.7: W/R for read-modify-write (checked on a processor); TCG reports the read",
            ),
            differs(
                "bts m is a write",
                "vol. 3, 4.7: W/R for read-modify-write (checked on a processor); TCG reports the read",
            ),
            differs(
                "reserved bit 51 in a PTE",
                "vol. 3, 4.7: P is set when RSVD is; TCG clears it",
            ),
            differs(
                "reserved bit 51, write",
                "vol. 3, 4.7: W/R for read-modify-write (checked on a processor); TCG reports the read",
            ),
            differs(
                "reserved bit 13 in a 2 MiB entry",
                "vol. 3, 4.7: P is set when RSVD is; TCG clears it",
            ),
            differs("PS in a PML4 entry", "vol. 3, 4.7: P is set when RSVD is; TCG clears it"),
            differs(
                "reserved bit and no write right",
                "vol. 3, 4.7: W/R for read-modify-write (checked on a processor); TCG reports the read",
            ),
            differs("XD set with NXE clear", "vol. 3, 4.7: P is set when RSVD is; TCG clears it"),
        ],
        ..guest!("exc_page_fault", [1], Expect::Checks(101), [Need::FullEmulation])
    },
    Guest {
        qemu_differs: &[differs(
            "sti",
            "vol. 3, 6.8.1: STI delays maskable interrupts only; TCG also delays the trap",
        )],
        ..guest!("exc_db_step", [1], Expect::Checks(34), [Need::FullEmulation])
    },
    guest!("triple_fault", [1], Expect::Reset("now a triple fault"), []),
];
