//! Processors that are the same on every host: the levels of the x86-64 ABI, and what all processors of a
//! level have besides.
//!
//! A machine with one of them can go on on any host of the level whose processor is of the same vendor.
//! Nothing is promised of the host's immunity to anything, so that guests keep their mitigations.

use super::{CpuidTable, HostCpuid, Topology, Vendor, bits, vendor};

/// A level of the x86-64 ABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Baseline {
    /// SSE2: every x86-64 processor.
    V1,
    /// SSE4.2, POPCNT, CMPXCHG16B, LAHF, and RDTSCP.
    V2,
    /// AVX2, BMI, FMA, F16C, LZCNT, MOVBE, and AES, PCLMULQDQ, RDRAND, FSGSBASE, SMEP, pages of 1 GiB.
    V3,
}

/// Bits of physical addresses, which even small processors have.
pub const PHYSICAL_BITS: u32 = 39;

/// EBX, ECX, EDX of leaf 0.
const INTEL: [u32; 3] = [0x756e_6547, 0x6c65_746e, 0x4965_6e69];
const AMD: [u32; 3] = [0x6874_7541, 0x444d_4163, 0x6974_6e65];

/// What of a register may be there, by level; of others all.
type Mask = (u32, usize, [u32; 3]);

impl Baseline {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::V1, Self::V2, Self::V3];

    /// The name, as the ABI has it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V1 => "x86-64",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
        }
    }

    /// What CPUID tells a vCPU of a machine with this baseline, by a host of this vendor.
    #[must_use]
    pub fn table(self, of: Vendor, topology: Topology, tsc_khz: u32) -> CpuidTable {
        let mut table = CpuidTable::new(&self.processor(of), topology, tsc_khz);
        for (leaf, register, levels) in masks() {
            let mask = levels[self as usize];
            for entry in table.entries.iter_mut().filter(|entry| entry.leaf == leaf) {
                entry.regs[register] &= mask;
            }
        }
        CpuidTable::from_rows(table.entries, topology)
    }

    /// A processor that has everything of the level.
    fn processor(self, of: Vendor) -> HostCpuid {
        let amd = of == Vendor::Amd;
        let [b, c, d] = if amd { AMD } else { INTEL };
        // Of the first family of the level, as far as the vendor had one.
        let signature = match (of, self) {
            (Vendor::Intel, Self::V1 | Self::V2) => 0x0001_06a3,
            (Vendor::Intel, Self::V3) => 0x0003_06c4,
            (Vendor::Amd, Self::V1 | Self::V2) => 0x0060_0f12,
            (Vendor::Amd, Self::V3) => 0x0080_0f12,
        };
        let mut name = [0; 48];
        let text = format!("Berth {}", self.name());
        for (to, from) in name.iter_mut().zip(text.bytes()) {
            *to = from;
        }
        let word = |at: usize| {
            let byte = |n| name.get(at + n).copied().unwrap_or(0);
            u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)])
        };
        HostCpuid {
            leaf0: [0x20, b, c, d],
            leaf1: [signature, 0, !0, !0],
            // Caches: see leaf 4.
            leaf2: [0x00ff_ff01, 0, 0, 0],
            caches: [
                [0x0000_0121, 0x01c0_003f, 0x3f, 0],
                [0x0000_0122, 0x01c0_003f, 0x3f, 0],
                [0x0000_0143, 0x01c0_003f, 0x1ff, 0],
                [0x0000_0163, 0x03c0_003f, 0x1fff, 0],
            ],
            leaf7: [0, !0, !0, !0],
            xsave0: if self == Self::V3 { [7, 0, 0, 0] } else { [0; 4] },
            xsave1: [1, 0, 0, 0],
            ext1: [signature, 0, !0, !0],
            brand: [0, 16, 32].map(|at| [word(at), word(at + 4), word(at + 8), word(at + 12)]),
            // Caches again: 32 KiB, 256 KiB and 8 MiB.
            ext5: [0, 0, 0x2008_0140, 0x2008_0140],
            ext6: [0, 0, 0x0100_6040, if amd { 0x0040_9040 } else { 0 }],
            ext8: [48 << 8 | PHYSICAL_BITS, 0, 0, 0],
        }
    }
}

fn masks() -> [Mask; 12] {
    // x2APIC, TSC deadline, hypervisor.
    let v1 = bits(&[21, 24, 31]);
    // SSE3, SSSE3, CMPXCHG16B, SSE4.1, SSE4.2, POPCNT.
    let v2 = v1 | bits(&[0, 9, 13, 19, 20, 23]);
    // PCLMULQDQ, FMA, MOVBE, AES, XSAVE, AVX, F16C, RDRAND.
    let v3 = v2 | bits(&[1, 12, 22, 25, 26, 28, 29, 30]);
    // TSC_ADJUST; FSGSBASE, BMI1, AVX2, SMEP, BMI2.
    let (adjust, level_7) = (bits(&[1]), bits(&[0, 1, 3, 5, 7, 8]));
    // AMD: CMP_LEGACY, TOPOEXT; LAHF; LZCNT.
    let (e1, e2, e3) = (bits(&[1, 22]), bits(&[0, 1, 22]), bits(&[0, 1, 5, 22]));
    // SYSCALL, NX, long mode, and what AMD repeats of leaf 1; RDTSCP; pages of 1 GiB.
    let d1 = bits(&[11, 20, 29]) | 0x0183_f3ff;
    let (d2, d3) = (d1 | bits(&[27]), d1 | bits(&[26, 27]));
    let nothing = [0; 3];
    [
        (1, 2, [v1, v2, v3]),
        (7, 1, [adjust, adjust, level_7]),
        (7, 2, nothing),
        (7, 3, nothing),
        (0x8000_0001, 2, [e1, e2, e3]),
        (0x8000_0001, 3, [d1, d2, d3]),
        (0x8000_0008, 1, nothing),
        (0x8000_0021, 0, nothing),
        (0x8000_0021, 1, nothing),
        (0x8000_0021, 2, nothing),
        (0x8000_0021, 3, nothing),
        (0x8000_0007, 3, [1 << 8; 3]),
    ]
}

impl HostCpuid {
    /// Who made it.
    #[must_use]
    pub const fn vendor(&self) -> Vendor {
        vendor(self.leaf0)
    }
}

impl std::str::FromStr for Baseline {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|baseline| baseline.name() == text).ok_or_else(|| match text {
            "x86-64-v4" => {
                "the translator has no AVX-512, so that there is no x86-64-v4".to_owned()
            }
            _ => format!(
                "no processor is called {text}; there are host, x86-64, x86-64-v2, x86-64-v3"
            ),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{AMD, Baseline, INTEL, PHYSICAL_BITS};
    use crate::cpuid::tests_support::{amd_host, intel_host};
    use crate::cpuid::{CpuidTable, Topology, Vendor};

    const TOPOLOGY: Topology = Topology { index: 1, count: 2 };

    #[test]
    fn levels_are_on_hosts_that_have_all_and_on_each_other() {
        for (host, vendor) in [(intel_host(), Vendor::Intel), (amd_host(), Vendor::Amd)] {
            let most = CpuidTable::new(&host, TOPOLOGY, 2_000_000);
            let tables = Baseline::ALL.map(|level| level.table(vendor, TOPOLOGY, 2_000_000));
            for (n, table) in tables.iter().enumerate() {
                assert_eq!(most.lack(table.entries()), None);
                for (m, higher) in tables.iter().enumerate() {
                    assert_eq!(table.lack(higher.entries()).is_some(), m > n);
                }
                assert_eq!(table.vendor(), vendor);
                assert_eq!(table.find(0x8000_0008, 0)[0] & 0xff, PHYSICAL_BITS);
            }
        }
        assert_ne!(AMD, INTEL);
    }

    #[test]
    fn levels_have_what_the_abi_says_and_no_more() {
        let table = |level: Baseline| level.table(Vendor::Intel, TOPOLOGY, 2_000_000);
        let [v1, v2, v3] = Baseline::ALL.map(table);
        assert!(!v2.features().avx && !v2.features().xsave && !v1.features().rdtscp);
        let f = v3.features();
        assert!(f.avx2 && f.bmi1 && f.bmi2 && f.fma && f.f16c && f.lzcnt && f.movbe && f.xsave);
        assert!(!f.sha && !f.adx && !f.clwb && !f.rdseed && !f.invpcid && !f.xsavec);
        assert_eq!([v1, v2, v3].map(|table| table.xcr0_supported()), [0, 0, 7]);
    }

    #[test]
    fn names() {
        for level in Baseline::ALL {
            assert_eq!(level.name().parse(), Ok(level));
        }
        assert!("x86-64-v4".parse::<Baseline>().unwrap_err().contains("AVX-512"));
        assert!("qemu64".parse::<Baseline>().unwrap_err().contains("x86-64-v3"));
    }
}
