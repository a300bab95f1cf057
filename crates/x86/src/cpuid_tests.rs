//! CPUID sanity: what is advertised, what never is, topology, dynamic bits.

use super::tests_support::{amd_host, answers, intel_host, table};
use super::{CpuidTable, HostCpuid, Topology, Vendor};
use crate::fake::{long, protected};
use crate::state::cr4;

fn with_topology(host: &HostCpuid, index: u32, count: u32) -> CpuidTable {
    CpuidTable::new(host, Topology { index, count }, 2_500_000)
}

#[test]
fn vendors() {
    let cpu = long(0);
    let intel = table(&intel_host());
    assert_eq!(intel.vendor(), Vendor::Intel);
    assert_eq!(intel.query(&cpu, 0, 0), [0x1f, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]);
    assert_eq!(intel.query(&cpu, 0x8000_0000, 0)[0], 0x8000_0008);
    let amd = table(&amd_host());
    assert_eq!(amd.vendor(), Vendor::Amd);
    assert_eq!(
        amd.query(&cpu, 0x8000_0000, 0),
        [0x8000_0021, 0x6874_7541, 0x444d_4163, 0x6974_6e65]
    );
}

#[test]
fn baseline_is_always_there() {
    // A host that reports nothing at all.
    let bare = HostCpuid::from_fn(|leaf, _| match leaf {
        0 => [7, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
        0x8000_0000 => [0x8000_0008, 0, 0, 0],
        _ => [0; 4],
    });
    let table = table(&bare);
    let cpu = long(0);
    let [_, _, ecx, edx] = table.query(&cpu, 1, 0);
    for (name, bit) in [
        ("SSE3", 0),
        ("SSSE3", 9),
        ("CX16", 13),
        ("PCID", 17),
        ("SSE4.1", 19),
        ("SSE4.2", 20),
        ("x2APIC", 21),
        ("POPCNT", 23),
        ("TSC deadline", 24),
        ("hypervisor", 31),
    ] {
        assert_eq!(ecx >> bit & 1, 1, "{name}");
    }
    for bit in [0, 3, 4, 5, 6, 8, 9, 11, 13, 15, 16, 23, 24, 25, 26] {
        assert_eq!(edx >> bit & 1, 1, "leaf 1 EDX bit {bit}");
    }
    let ext = table.query(&cpu, 0x8000_0001, 0);
    assert_eq!(ext[2] & 1, 1, "LAHF");
    for bit in [11, 20, 26, 27, 29] {
        assert_eq!(ext[3] >> bit & 1, 1, "0x80000001 EDX bit {bit}");
    }
    // What the host does not have is not there.
    for bit in [1, 12, 22, 25, 26, 27, 28, 29, 30] {
        assert_eq!(ecx >> bit & 1, 0, "leaf 1 ECX bit {bit}");
    }
    let f = table.features();
    assert!(!f.avx && !f.avx2 && !f.xsave && !f.sha && !f.lzcnt && f.fsgsbase && f.umip);
    assert_eq!((table.xcr0_supported(), table.query(&cpu, 0xd, 0)), (0, [0; 4]));
    let [_, ebx, _, _] = table.query(&cpu, 7, 0);
    assert_eq!(ebx, 1 | 1 << 1 | 1 << 7 | 1 << 10 | 1 << 20);
}

#[test]
fn never_advertised() {
    let cpu = long(0);
    for host in [answers(0x756e_6547, [u32::MAX; 4]), answers(0x6874_7541, [u32::MAX; 4])] {
        let table = table(&host);
        let [_, _, ecx, edx] = table.query(&cpu, 1, 0);
        for (name, bit) in [("MONITOR", 3), ("VMX", 5), ("SMX", 6), ("EST", 7), ("PDCM", 15)] {
            assert_eq!(ecx >> bit & 1, 0, "{name}");
        }
        assert_eq!(edx >> 1 & 1, 0, "VME");
        let [max, ebx, ecx, edx] = table.query(&cpu, 7, 0);
        assert_eq!(max, 0);
        for (name, bit) in [("HLE", 4), ("RTM", 11), ("MPX", 14), ("AVX512F", 16), ("PT", 25)] {
            assert_eq!(ebx >> bit & 1, 0, "{name}");
        }
        assert_eq!(ebx & (1 << 17 | 1 << 21 | 1 << 26 | 1 << 28 | 1 << 30 | 1 << 31), 0, "AVX-512");
        assert_eq!(ecx, 1 << 2, "of leaf 7 ECX only UMIP: no PKU, CET, VAES, LA57");
        assert_eq!(edx & !(1 << 4 | 1 << 26 | 1 << 27 | 1 << 29), 0);
        let svm = table.query(&cpu, 0x8000_0001, 0)[2];
        assert_eq!(svm >> 2 & 1, 0, "SVM");
        let [features, ..] = table.query(&cpu, 0xd, 1);
        assert_eq!(features & !3, 0, "no XGETBV1, XSAVES");
        for leaf in [5, 0xa, 0x12, 0x14, 0x15, 0x16, 0x18, 0x4000_0002, 0xc000_0000, u32::MAX] {
            assert_eq!(table.query(&cpu, leaf, 0), [0; 4], "{leaf:#x}");
        }
        assert_eq!(table.query(&cpu, 7, 1), [0; 4]);
    }
}

#[test]
fn extensions_follow_the_host() {
    // Leaf, register, bit of the host; the same bit of the guest.
    for (leaf, register, bit) in [
        (1, 2, 1),
        (1, 2, 12),
        (1, 2, 22),
        (1, 2, 25),
        (1, 2, 29),
        (1, 2, 30),
        (7, 1, 3),
        (7, 1, 5),
        (7, 1, 8),
        (7, 1, 9),
        (7, 1, 18),
        (7, 1, 19),
        (7, 1, 29),
        (7, 3, 4),
        (0x8000_0001, 2, 5),
    ] {
        for on in [false, true] {
            let host = HostCpuid::from_fn(|l, sub| {
                let mut regs = full(l, sub);
                if l == leaf && !on {
                    regs[register] &= !(1 << bit);
                }
                regs
            });
            let regs = table(&host).query(&long(0), leaf, 0);
            assert_eq!(regs[register] >> bit & 1 == 1, on, "{leaf:#x} {register} {bit}");
        }
    }
}

fn full(leaf: u32, _: u32) -> [u32; 4] {
    match leaf {
        0 => [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
        0x8000_0000 => [0x8000_0008, 0, 0, 0],
        0xd => [7, 832, 832, 0],
        _ => [u32::MAX; 4],
    }
}

#[test]
fn avx_needs_xcr0_on_the_host() {
    let host =
        HostCpuid::from_fn(|leaf, sub| if leaf == 0xd { [3, 0, 0, 0] } else { full(leaf, sub) });
    let f = *table(&host).features();
    assert!(f.xsave && !f.avx && !f.avx2 && !f.fma);
    assert_eq!(table(&host).xcr0_supported(), 3);
}

#[test]
fn bits_that_depend_on_state() {
    let table = table(&intel_host());
    let mut cpu = long(0);
    assert_eq!(table.query(&cpu, 1, 0)[2] >> 27 & 1, 0);
    cpu.cr4 |= cr4::OSXSAVE;
    assert_eq!(table.query(&cpu, 1, 0)[2] >> 27 & 1, 1, "OSXSAVE");
    for (xcr0, size) in [(1, 576), (3, 576), (7, 832)] {
        cpu.xcr0 = xcr0;
        assert_eq!(table.query(&cpu, 0xd, 0), [7, size, 832, 0]);
        assert_eq!(table.query(&cpu, 0xd, 1)[1], size);
    }
    assert_eq!(table.query(&cpu, 0xd, 2), [256, 576, 0, 0]);
    assert_eq!(table.query(&cpu, 0xd, 3), [0; 4]);
    assert_eq!(table.query(&protected(0), 0x8000_0001, 0)[3] >> 11 & 1, 0, "SYSCALL, 64-bit only");
}

#[test]
fn topology() {
    for (count, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (8, 3), (16, 4)] {
        for index in [0, count - 1] {
            let cpu = long(0);
            let intel = with_topology(&intel_host(), index, count);
            let [_, ebx, _, edx] = intel.query(&cpu, 1, 0);
            assert_eq!((ebx >> 24, ebx >> 16 & 0xff, ebx >> 8 & 0xff), (index, count, 8));
            assert_eq!(edx >> 28 & 1 == 1, count > 1, "HTT");
            for leaf in [0xb, 0x1f] {
                assert_eq!(intel.query(&cpu, leaf, 0), [0, 1, 0x100, index]);
                assert_eq!(intel.query(&cpu, leaf, 1), [bits, count, 0x201, index]);
                assert_eq!(intel.query(&cpu, leaf, 2), [0, 0, 2, index]);
                assert_eq!(intel.query(&cpu, leaf, 7), [0, 0, 7, index]);
            }
            let package = (1 << bits) - 1;
            for (sub, sharing) in [(0, 0), (2, 0), (3, package)] {
                let [eax, ..] = intel.query(&cpu, 4, sub);
                assert_eq!((eax >> 14 & 0xfff, eax >> 26), (sharing, package), "cache {sub}");
            }
            assert_eq!(intel.query(&cpu, 4, 4), [0; 4]);
            let amd = with_topology(&amd_host(), index, count);
            assert_eq!(amd.query(&cpu, 0x8000_0008, 0)[2], bits << 12 | (count - 1));
            assert_eq!(amd.query(&cpu, 0x8000_001e, 0), [index, index, 0, 0]);
            assert_eq!(amd.query(&cpu, 0x8000_001d, 3)[0] >> 14, package);
            assert_eq!(amd.query(&cpu, 0x1f, 0), [0; 4]);
        }
    }
}

#[test]
fn hypervisor_leaves() {
    let table = table(&intel_host());
    let cpu = long(3);
    let [max, b, c, d] = table.query(&cpu, 0x4000_0000, 0);
    let name = [b, c, d].map(u32::to_le_bytes).concat();
    assert_eq!((max, name.as_slice()), (0x4000_0010, b"KVMKVMKVM\0\0\0".as_slice()));
    assert_eq!(table.query(&cpu, 0x4000_0001, 0), [0x0100_000b, 0, 0, 0]);
    assert_eq!(table.query(&cpu, 0x4000_0010, 0), [2_500_000, 1_000_000, 0, 0]);
}

#[test]
fn address_sizes() {
    for (host_bits, expected) in [(39, 39), (46, 46), (52, 46), (0, 36)] {
        let host = HostCpuid::from_fn(|leaf, sub| match leaf {
            0x8000_0008 => [0x3000 | host_bits, 0, 0, 0],
            _ => full(leaf, sub),
        });
        let [eax, ..] = table(&host).query(&long(0), 0x8000_0008, 0);
        assert_eq!(eax, 48 << 8 | expected);
    }
}

#[test]
fn mitigations_are_not_asked_for() {
    let cpu = long(0);
    let [.., edx] = table(&intel_host()).query(&cpu, 7, 0);
    assert_eq!(edx >> 26 & 0xb, 0xb, "IBRS, STIBP and ARCH_CAPABILITIES");
    let amd = table(&amd_host());
    assert_eq!(amd.query(&cpu, 7, 0)[3] >> 26 & 0xb, 0);
    assert_eq!(amd.query(&cpu, 0x8000_0008, 0)[1], 1 << 26 | 1 << 29, "SSB_NO, BTC_NO");
    assert_eq!(amd.query(&cpu, 0x8000_0021, 0)[0] >> 8 & 1, 1, "automatic IBRS");
}

#[test]
fn leaves_beyond_the_hosts_maximum_are_not_asked_for() {
    HostCpuid::from_fn(|leaf, _| match leaf {
        0 => [1, 0x6874_7541, 0, 0],
        0x8000_0000 => [0x8000_0001, 0, 0, 0],
        1 | 0x8000_0001 => [0; 4],
        other => unreachable!("leaf {other:#x}"),
    });
}

#[test]
fn rows_answer_as_queries_do() {
    let table = with_topology(&intel_host(), 1, 4);
    let mut cpu = long(0);
    cpu.xcr0 = 7;
    assert!(table.entries().len() > 20);
    for entry in table.entries() {
        let found = table.query(&cpu, entry.leaf, entry.subleaf.unwrap_or(9));
        assert_eq!(found, entry.regs, "{:#x} {:?}", entry.leaf, entry.subleaf);
    }
    assert_eq!(table.signature(), table.query(&cpu, 1, 0)[0]);
}
