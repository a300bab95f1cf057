//! Whether a processor can be what rows of CPUID say, which may be those of another one.
//!
//! What a guest may use has to be there: extensions, sizes, the vendor. What only describes a
//! processor (its model, name and caches) is answered by whoever runs the guest, and may be any.

use super::{CpuidEntry, CpuidTable, XSAVE_AVX, XSAVE_SSE};

/// EAX, EBX, ECX, EDX.
const REGISTERS: [&str; 4] = ["EAX", "EBX", "ECX", "EDX"];

/// Leaves that only describe.
const DESCRIBING: [u32; 14] = [
    0,
    2,
    4,
    0xb,
    0x1f,
    super::KVM_LEAF_MAX,
    0x8000_0000,
    0x8000_0002,
    0x8000_0003,
    0x8000_0004,
    0x8000_0005,
    0x8000_0006,
    0x8000_001d,
    0x8000_001e,
];

/// A register that is a set of features, and those of them that everybody provides: what depends on the
/// number of vCPUs, and the APIC's.
const SETS: [(u32, u32, usize, u32); 18] = [
    (1, 0, 2, 1 << 21 | 1 << 24 | 1 << 27 | 1 << 31),
    (1, 0, 3, 1 << 28),
    (6, 0, 0, 1 << 2),
    (6, 0, 1, 0),
    (6, 0, 2, 0),
    (7, 0, 1, 0),
    (7, 0, 2, 0),
    (7, 0, 3, 0),
    (0xd, 0, 0, 0),
    (0xd, 0, 3, 0),
    (0xd, 1, 0, 0),
    (0x4000_0001, 0, 0, 0),
    (0x8000_0001, 0, 2, 1 << 1 | 1 << 22),
    (0x8000_0001, 0, 3, 0),
    (0x8000_0007, 0, 3, 1 << 8),
    (0x8000_0008, 0, 1, 0),
    (0x8000_0021, 0, 0, 0),
    (0x8000_0021, 0, 2, 0),
];

/// Bits of a register of a leaf, and their names.
type Names = (u32, usize, &'static [(u32, &'static str)]);

/// As Linux has them in /proc/cpuinfo.
const NAMES: [Names; 6] = [
    (
        1,
        2,
        &[
            (0, "sse3"),
            (1, "pclmulqdq"),
            (9, "ssse3"),
            (12, "fma"),
            (13, "cx16"),
            (17, "pcid"),
            (19, "sse4_1"),
            (20, "sse4_2"),
            (22, "movbe"),
            (23, "popcnt"),
            (25, "aes"),
            (26, "xsave"),
            (28, "avx"),
            (29, "f16c"),
            (30, "rdrand"),
        ],
    ),
    (
        7,
        1,
        &[
            (0, "fsgsbase"),
            (1, "tsc_adjust"),
            (3, "bmi1"),
            (5, "avx2"),
            (6, "fdp_excptn_only"),
            (7, "smep"),
            (8, "bmi2"),
            (9, "erms"),
            (10, "invpcid"),
            (13, "zero_fcs_fds"),
            (16, "avx512f"),
            (18, "rdseed"),
            (19, "adx"),
            (20, "smap"),
            (23, "clflushopt"),
            (24, "clwb"),
            (29, "sha_ni"),
        ],
    ),
    (7, 2, &[(2, "umip")]),
    (7, 3, &[(4, "fsrm"), (26, "ibrs"), (27, "stibp"), (29, "arch_capabilities")]),
    (0x8000_0001, 2, &[(0, "lahf_lm"), (5, "abm"), (8, "3dnowprefetch")]),
    (0x8000_0001, 3, &[(11, "syscall"), (20, "nx"), (26, "pdpe1gb"), (27, "rdtscp"), (29, "lm")]),
];

fn name(leaf: u32, subleaf: u32, register: usize, bit: u32) -> String {
    let known = NAMES.iter().find(|set| (set.0, set.1) == (leaf, register));
    let known = known.and_then(|set| set.2.iter().find(|named| named.0 == bit));
    match (known, leaf, subleaf, bit) {
        (Some((_, name)), ..) => (*name).to_owned(),
        (None, 0xd, 1, 0) => "xsaveopt".to_owned(),
        (None, 0xd, 1, 1) => "xsavec".to_owned(),
        _ => format!("bit {bit} of {} of CPUID leaf {leaf:#x}", REGISTERS[register & 3]),
    }
}

/// The vendor's name: EBX, EDX, ECX of leaf 0.
fn vendor_name([_, b, c, d]: [u32; 4]) -> String {
    let bytes = [b, d, c].map(u32::to_le_bytes).concat();
    let name = String::from_utf8_lossy(&bytes);
    name.chars().filter(char::is_ascii_graphic).collect()
}

/// Vendors of which there are processors by other names.
fn family(leaf0: [u32; 4]) -> String {
    match vendor_name(leaf0) {
        name if name == "HygonGenuine" => "AuthenticAMD".to_owned(),
        name => name,
    }
}

impl CpuidTable {
    /// What a guest with these rows may use and a processor with this table lacks; the first of it.
    #[must_use]
    pub fn lack(&self, rows: &[CpuidEntry]) -> Option<String> {
        let find = |leaf| rows.iter().find(|row| row.leaf == leaf).map_or([0; 4], |row| row.regs);
        if family(find(0)) != family(self.find(0, 0)) {
            return Some(format!("a processor of {}", vendor_name(find(0))));
        }
        if find(0x4000_0000)[1..] != self.find(0x4000_0000, 0)[1..] {
            return Some("what CPUID leaf 0x40000000 tells of".to_owned());
        }
        rows.iter().find_map(|row| self.lack_of(row))
    }

    fn lack_of(&self, row: &CpuidEntry) -> Option<String> {
        let subleaf = row.subleaf.unwrap_or(0);
        let mut rest = row.regs;
        for &(leaf, sub, register, everywhere) in &SETS {
            if (leaf, sub) != (row.leaf, subleaf) {
                continue;
            }
            let missing = row.regs[register] & !everywhere & !self.find(leaf, sub)[register];
            if missing != 0 {
                return Some(name(leaf, sub, register, missing.trailing_zeros()));
            }
            rest[register] = 0;
        }
        match (row.leaf, subleaf) {
            // The model, and how many of them there are.
            (1, _) => rest = [0; 4],
            // How many subleaves there are.
            (7, 0) => rest[0] = 0,
            // Sizes for what XCR0 may have.
            (0xd, 0) => {
                let fits = |size: u32| size <= XSAVE_AVX;
                if fits(rest[1]) && fits(rest[2]) {
                    rest = [0; 4];
                }
            }
            (0xd, 1) if rest[1] <= XSAVE_AVX => rest[1] = 0,
            (0xd, 2) if rest == [XSAVE_AVX - XSAVE_SSE, XSAVE_SSE, 0, 0] => rest = [0; 4],
            (0x4000_0000, _) => rest = [0; 4],
            // AMD: the model again.
            (0x8000_0001, _) => (rest[0], rest[1]) = (0, 0),
            (0x8000_0008, _) => {
                let here = self.find(0x8000_0008, 0)[0];
                for (shift, what) in [(0, "physical"), (8, "linear")] {
                    let [theirs, ours] = [rest[0], here].map(|bits| bits >> shift & 0xff);
                    if theirs > ours {
                        return Some(format!("{what} addresses of {theirs} bits"));
                    }
                }
                // And of numbers of processors.
                (rest[0], rest[2]) = (0, 0);
            }
            (leaf, _) if DESCRIBING.contains(&leaf) => rest = [0; 4],
            _ => {}
        }
        (rest != [0; 4]).then(|| format!("what CPUID leaf {:#x} tells of", row.leaf))
    }
}

#[cfg(test)]
mod tests {
    use crate::cpuid::tests_support::{amd_host, answers, intel_host};
    use crate::cpuid::{CpuidEntry, CpuidTable, Topology};

    fn table(host: &crate::cpuid::HostCpuid, count: u32) -> CpuidTable {
        CpuidTable::new(host, Topology { index: 0, count }, 2_500_000)
    }

    #[test]
    fn a_processor_can_be_itself_and_less() {
        for host in [intel_host(), amd_host()] {
            let most = table(&host, 1);
            assert_eq!(most.lack(table(&host, 4).entries()), None);
            let vendor = host.leaf0[1];
            let least = table(&answers(vendor, [0; 4]), 2);
            assert_eq!(most.lack(least.entries()), None);
            assert!(least.lack(most.entries()).is_some());
        }
    }

    #[test]
    fn what_is_missing_has_a_name() {
        let host = intel_host();
        let most = table(&host, 1);
        let mut less = host.clone();
        less.leaf7[1] &= !(1 << 5);
        assert_eq!(table(&less, 1).lack(most.entries()).as_deref(), Some("avx2"));
        let mut less = host.clone();
        less.ext8[0] = 36;
        let lack = table(&less, 1).lack(most.entries()).unwrap();
        assert!(lack.starts_with("physical addresses of "), "{lack}");
        let lack = most.lack(table(&amd_host(), 1).entries());
        assert_eq!(lack.as_deref(), Some("a processor of AuthenticAMD"));
        let mut other = most.entries().to_vec();
        other[0].regs[1] ^= 1;
        assert_eq!(most.lack(&other).as_deref(), Some("a processor of FenuineIntel"));
        let amd = table(&amd_host(), 1);
        let mut hygon = amd.entries().to_vec();
        let name = [0x6f67_7948, 0x656e_6975, 0x6e65_476e];
        hygon[0].regs[1..].copy_from_slice(&name);
        assert_eq!(amd.lack(&hygon), None);
    }

    #[test]
    fn what_nobody_offers_is_refused() {
        let most = table(&intel_host(), 1);
        let with = |leaf, subleaf, regs| {
            let mut rows = most.entries().to_vec();
            rows.retain(|row| (row.leaf, row.subleaf) != (leaf, subleaf));
            rows.push(CpuidEntry { leaf, subleaf, regs });
            most.lack(&rows)
        };
        assert_eq!(with(7, Some(0), [0, 1 << 16, 0, 0]).as_deref(), Some("avx512f"));
        assert!(with(0x14, None, [1, 0, 0, 0]).is_some());
        assert!(with(0xd, Some(5), [64, 0x440, 0, 0]).is_some());
        assert!(with(0xd, Some(1), [0, 576, 1, 0]).is_some());
        assert!(with(0x4000_0000, None, [0; 4]).is_some());
        assert_eq!(with(0x16, None, [0; 4]), None);
    }
}
