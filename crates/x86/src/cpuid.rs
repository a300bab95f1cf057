//! The CPUID model: what the guest's processor says it is (Intel SDM vol. 2, CPUID; AMD APM vol. 3,
//! appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst).
//!
//! The table is built from the host's answers, because guest instructions run on the host: an
//! extension is advertised only when the host has it. What Rust code provides (paging features,
//! MSRs, FSGSBASE, the local APIC) is advertised always. x86-64-v2 is taken for granted.
//!
//! Not advertised, whatever the host has: AVX-512, AMX, MPX, PKU, CET, TSX, XSAVES, XGETBV1, LA57,
//! VMX, SVM, performance monitoring, MONITOR, virtual-8086 extensions.
//!
//! Mitigations: guest code cannot reach the host processor's own page-table, L1 or store-buffer
//! behaviour across guest privilege levels by the ways Meltdown, L1TF or MDS need (guest addresses
//! are translated in software), so the table says that these are absent and kernels leave page-table
//! isolation off.

pub mod baseline;
mod needs;

use serde::{Deserialize, Serialize};

use crate::state::{CodeSize, CpuState, cr4};

/// Who made the host's processor, and so the guest's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel (and whatever else is not AMD).
    Intel,
    /// AuthenticAMD or HygonGenuine.
    Amd,
}

/// The answers of the host's CPUID that the table is made from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostCpuid {
    leaf0: [u32; 4],
    leaf1: [u32; 4],
    leaf2: [u32; 4],
    /// Deterministic cache parameters: leaf 4 (Intel) or 0x8000001d (AMD).
    caches: [[u32; 4]; 4],
    leaf7: [u32; 4],
    xsave0: [u32; 4],
    xsave1: [u32; 4],
    ext1: [u32; 4],
    brand: [[u32; 4]; 3],
    ext5: [u32; 4],
    ext6: [u32; 4],
    ext8: [u32; 4],
}

impl HostCpuid {
    /// Asks `cpuid(leaf, subleaf)`, which answers EAX, EBX, ECX, EDX, for every leaf needed. Leaves
    /// beyond the maxima the host reports are not asked for.
    pub fn from_fn(cpuid: impl Fn(u32, u32) -> [u32; 4]) -> Self {
        let [max, ..] = cpuid(0, 0);
        let [max_ext, ..] = cpuid(0x8000_0000, 0);
        let ask = |leaf: u32, sub: u32| {
            let last = if leaf < 0x8000_0000 { max } else { max_ext };
            if leaf <= last { cpuid(leaf, sub) } else { [0; 4] }
        };
        let leaf0 = ask(0, 0);
        let cache_leaf = if vendor(leaf0) == Vendor::Amd { 0x8000_001d } else { 4 };
        Self {
            leaf0,
            leaf1: ask(1, 0),
            leaf2: ask(2, 0),
            caches: [0, 1, 2, 3].map(|sub| ask(cache_leaf, sub)),
            leaf7: ask(7, 0),
            xsave0: ask(0xd, 0),
            xsave1: ask(0xd, 1),
            ext1: ask(0x8000_0001, 0),
            brand: [0x8000_0002, 0x8000_0003, 0x8000_0004].map(|leaf| ask(leaf, 0)),
            ext5: ask(0x8000_0005, 0),
            ext6: ask(0x8000_0006, 0),
            ext8: ask(0x8000_0008, 0),
        }
    }
}

const fn vendor(leaf0: [u32; 4]) -> Vendor {
    // "Auth" of AuthenticAMD, "Hygo" of HygonGenuine.
    match leaf0[1] {
        0x6874_7541 | 0x6f67_7948 => Vendor::Amd,
        _ => Vendor::Intel,
    }
}

/// Instruction-set extensions beyond x86-64-v2 (SSE4.2, POPCNT, CMPXCHG16B, LAHF) and whether they
/// are advertised. An instruction of one that is not raises #UD.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the manual's")]
#[allow(clippy::struct_excessive_bools, reason = "a set of independent switches")]
pub struct Features {
    pub avx: bool,
    pub avx2: bool,
    pub bmi1: bool,
    pub bmi2: bool,
    pub fma: bool,
    pub f16c: bool,
    pub lzcnt: bool,
    pub movbe: bool,
    pub aes: bool,
    pub pclmul: bool,
    pub sha: bool,
    pub rdrand: bool,
    pub rdseed: bool,
    pub adx: bool,
    pub erms: bool,
    pub fsrm: bool,
    pub clflushopt: bool,
    pub clwb: bool,
    /// PREFETCHW.
    pub prefetchw: bool,
    pub xsave: bool,
    pub xsaveopt: bool,
    pub xsavec: bool,
    /// Always: provided in software.
    pub fsgsbase: bool,
    /// Always: provided in software.
    pub rdtscp: bool,
    /// Always: provided in software.
    pub invpcid: bool,
    /// Always: provided in software.
    pub umip: bool,
}

impl Features {
    fn of(host: &HostCpuid) -> Self {
        let ecx1 = |bit: u32| host.leaf1[2] >> bit & 1 != 0;
        let ebx7 = |bit: u32| host.leaf7[1] >> bit & 1 != 0;
        let xsave = ecx1(26) && host.xsave0[0] & 3 == 3;
        let avx = xsave && ecx1(28) && host.xsave0[0] & 7 == 7;
        Self {
            avx,
            avx2: avx && ebx7(5),
            bmi1: avx && ebx7(3),
            bmi2: avx && ebx7(8),
            fma: avx && ecx1(12),
            f16c: avx && ecx1(29),
            lzcnt: host.ext1[2] >> 5 & 1 != 0,
            movbe: ecx1(22),
            aes: ecx1(25),
            pclmul: ecx1(1),
            sha: ebx7(29),
            rdrand: ecx1(30),
            rdseed: ebx7(18),
            adx: ebx7(19),
            erms: ebx7(9),
            fsrm: host.leaf7[3] >> 4 & 1 != 0,
            clflushopt: ebx7(23),
            clwb: ebx7(24),
            prefetchw: host.ext1[2] >> 8 & 1 != 0,
            xsave,
            xsaveopt: xsave && host.xsave1[0] & 1 != 0,
            xsavec: xsave && host.xsave1[0] & 2 != 0,
            fsgsbase: true,
            rdtscp: true,
            invpcid: true,
            umip: true,
        }
    }
}

/// Which vCPU of how many a table is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    /// This vCPU's number, which is its APIC id.
    pub index: u32,
    /// How many vCPUs the machine has, 1 to 16 (more is allowed up to 255): cores of one package.
    pub count: u32,
}

impl Topology {
    /// Bits of the APIC id that tell the cores apart.
    const fn core_bits(self) -> u32 {
        self.count.next_power_of_two().trailing_zeros()
    }
}

/// One row of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuidEntry {
    /// EAX of the query.
    pub leaf: u32,
    /// ECX of the query, for leaves where it matters.
    pub subleaf: Option<u32>,
    /// EAX, EBX, ECX, EDX of the answer, before what depends on the vCPU's state.
    pub regs: [u32; 4],
}

/// What CPUID answers on one vCPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CpuidTable {
    vendor: Vendor,
    features: Features,
    topology: Topology,
    entries: Vec<CpuidEntry>,
}

/// The largest leaf of the hypervisor range.
const KVM_LEAF_MAX: u32 = 0x4000_0010;
/// KVM paravirtual features: CLOCKSOURCE, NOP_IO_DELAY, CLOCKSOURCE2, CLOCKSOURCE_STABLE.
const KVM_FEATURES: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 24;
/// Frequency of the local APIC's timer in kHz (1 GHz, as KVM's).
const APIC_KHZ: u32 = 1_000_000;
/// Size of an XSAVE area with x87 and SSE state, and with AVX too.
const XSAVE_SSE: u32 = 576;
const XSAVE_AVX: u32 = 832;

impl CpuidTable {
    /// Makes the table for one vCPU; `tsc_khz` is the guest's time-stamp counter frequency.
    #[must_use]
    pub fn new(host: &HostCpuid, topology: Topology, tsc_khz: u32) -> Self {
        let mut table = Self {
            vendor: vendor(host.leaf0),
            features: Features::of(host),
            topology,
            entries: Vec::new(),
        };
        table.add_basic(host);
        table.add_topology();
        table.add_xsave();
        table.add_kvm(tsc_khz);
        table.add_extended(host);
        table
    }

    /// A table with these rows, which may be those of another processor; see [`Self::lack`].
    #[must_use]
    pub fn from_rows(rows: Vec<CpuidEntry>, topology: Topology) -> Self {
        let told = |leaf: u32, subleaf: u32| {
            let matches = |row: &&CpuidEntry| {
                row.leaf == leaf && row.subleaf.is_none_or(|told| told == subleaf)
            };
            rows.iter().find(matches).map_or([0; 4], |row| row.regs)
        };
        let processor = HostCpuid::from_fn(told);
        let (leaf7, ext1) = (processor.leaf7, processor.ext1);
        let features = Features {
            fsgsbase: leaf7[1] & 1 != 0,
            rdtscp: ext1[3] >> 27 & 1 != 0,
            invpcid: leaf7[1] >> 10 & 1 != 0,
            umip: leaf7[2] >> 2 & 1 != 0,
            ..Features::of(&processor)
        };
        Self { vendor: vendor(processor.leaf0), features, topology, entries: rows }
    }

    /// The vendor the guest sees.
    #[must_use]
    pub const fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// The advertised extensions.
    #[must_use]
    pub const fn features(&self) -> &Features {
        &self.features
    }

    /// The bits XCR0 may have: x87, SSE and perhaps AVX; zero without XSAVE.
    #[must_use]
    pub const fn xcr0_supported(&self) -> u64 {
        match (self.features.xsave, self.features.avx) {
            (false, _) => 0,
            (true, false) => 3,
            (true, true) => 7,
        }
    }

    /// Family, model and stepping: leaf 1 EAX, which is also EDX after reset.
    #[must_use]
    pub fn signature(&self) -> u32 {
        self.find(1, 0)[0]
    }

    /// The rows, for a hypervisor that answers CPUID by itself.
    #[must_use]
    pub fn entries(&self) -> &[CpuidEntry] {
        &self.entries
    }

    /// What CPUID answers (EAX, EBX, ECX, EDX) in this state. Leaves that do not exist are zeros.
    #[must_use]
    pub fn query(&self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        let mut regs = self.find(leaf, subleaf);
        match (leaf, subleaf) {
            (1, _) if cpu.cr4 & cr4::OSXSAVE != 0 => regs[2] |= 1 << 27,
            // The size for what XCR0 and IA32_XSS (always 0) enable.
            (0xd, 0 | 1) if self.features.xsave => {
                regs[1] = if cpu.xcr0 & 4 != 0 { XSAVE_AVX } else { XSAVE_SSE };
            }
            // The level asked for comes back even for levels that do not exist.
            (0xb | 0x1f, _) if subleaf > 1 && self.exists(leaf) => {
                regs = [0, 0, subleaf & 0xff, self.topology.index];
            }
            // Intel reports SYSCALL only in 64-bit mode.
            (0x8000_0001, _)
                if self.vendor == Vendor::Intel && cpu.code_size() != CodeSize::Bits64 =>
            {
                regs[3] &= !(1 << 11);
            }
            _ => {}
        }
        regs
    }

    fn exists(&self, leaf: u32) -> bool {
        self.entries.iter().any(|entry| entry.leaf == leaf)
    }

    fn find(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.entries
            .iter()
            .find(|entry| entry.leaf == leaf && entry.subleaf.is_none_or(|sub| sub == subleaf))
            .map_or([0; 4], |entry| entry.regs)
    }

    fn add(&mut self, leaf: u32, regs: [u32; 4]) {
        self.entries.push(CpuidEntry { leaf, subleaf: None, regs });
    }

    fn add_sub(&mut self, leaf: u32, subleaf: u32, regs: [u32; 4]) {
        self.entries.push(CpuidEntry { leaf, subleaf: Some(subleaf), regs });
    }

    fn add_basic(&mut self, host: &HostCpuid) {
        let intel = self.vendor == Vendor::Intel;
        let [_, b, c, d] = host.leaf0;
        self.add(0, [if intel { 0x1f } else { 0xd }, b, c, d]);
        let Topology { index, count } = self.topology;
        let ebx = index << 24 | (count & 0xff) << 16 | 8 << 8;
        self.add(1, [host.leaf1[0], ebx, self.leaf1_ecx(), self.leaf1_edx()]);
        if intel {
            // Not the number of iterations to ask, which is 1 on every processor of this century.
            let [a, b, c, d] = host.leaf2;
            self.add(2, [if a == 0 { 1 } else { a }, b, c, d]);
            for (sub, regs) in (0..).zip(self.caches(host)) {
                self.add_sub(4, sub, regs);
            }
        }
        // The APIC timer keeps running in every state (ARAT).
        self.add(6, [1 << 2, 0, 0, 0]);
        self.add_sub(7, 0, self.leaf7(host));
    }

    fn leaf1_ecx(&self) -> u32 {
        let f = &self.features;
        // SSE3, SSSE3, CMPXCHG16B, PCID, SSE4.1, SSE4.2, x2APIC, POPCNT, TSC deadline, hypervisor.
        let always = bits(&[0, 9, 13, 17, 19, 20, 21, 23, 24, 31]);
        always
            | switches(&[
                (1, f.pclmul),
                (12, f.fma),
                (22, f.movbe),
                (25, f.aes),
                (26, f.xsave),
                (28, f.avx),
                (29, f.f16c),
                (30, f.rdrand),
            ])
    }

    fn leaf1_edx(&self) -> u32 {
        // FPU, DE, PSE, TSC, MSR, PAE, MCE, CX8, APIC, SEP, MTRR, PGE, MCA, CMOV, PAT, PSE36, CLFSH, MMX,
        // FXSR, SSE, SSE2, SS; HTT with several cores.
        let always =
            bits(&[0, 2, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 15, 16, 17, 19, 23, 24, 25, 26, 27]);
        always | switches(&[(28, self.topology.count > 1)])
    }

    fn leaf7(&self, host: &HostCpuid) -> [u32; 4] {
        let f = &self.features;
        // x87 instructions run on the host, which updates FDP only on exceptions (6) or stores zero for
        // FCS and FDS (13).
        let x87 = host.leaf7[1] & bits(&[6, 13]);
        // FSGSBASE, TSC_ADJUST, SMEP, INVPCID, SMAP.
        let ebx = bits(&[0, 1, 7, 10, 20])
            | x87
            | switches(&[
                (3, f.bmi1),
                (5, f.avx2),
                (8, f.bmi2),
                (9, f.erms),
                (18, f.rdseed),
                (19, f.adx),
                (23, f.clflushopt),
                (24, f.clwb),
                (29, f.sha),
            ]);
        let ecx = switches(&[(2, f.umip)]);
        // Intel: IBRS and IBPB (26), STIBP (27), ARCH_CAPABILITIES (29).
        let intel = if self.vendor == Vendor::Intel { bits(&[26, 27, 29]) } else { 0 };
        let edx = intel | switches(&[(4, f.fsrm)]);
        [0, ebx, ecx, edx]
    }

    /// The host's caches: levels 1 and 2 belong to a core, level 3 to the package.
    fn caches(&self, host: &HostCpuid) -> [[u32; 4]; 4] {
        let package = (1 << self.topology.core_bits()) - 1;
        host.caches.map(|[a, b, c, d]| {
            if a & 0x1f == 0 {
                return [0; 4];
            }
            let sharing = if a >> 5 & 7 >= 3 { package } else { 0 };
            let cores = if self.vendor == Vendor::Intel { package << 26 } else { 0 };
            [a & 0x3fff | (sharing & 0xfff) << 14 | cores, b, c, d]
        })
    }

    fn add_topology(&mut self) {
        let Topology { index, count } = self.topology;
        let shift = self.topology.core_bits();
        let leaves: &[u32] = if self.vendor == Vendor::Intel { &[0xb, 0x1f] } else { &[0xb] };
        for &leaf in leaves {
            self.add_sub(leaf, 0, [0, 1, 1 << 8, index]);
            self.add_sub(leaf, 1, [shift, count, 2 << 8 | 1, index]);
            self.add_sub(leaf, 2, [0, 0, 2, index]);
        }
    }

    fn add_xsave(&mut self) {
        let f = self.features;
        if !f.xsave {
            return;
        }
        let size = if f.avx { XSAVE_AVX } else { XSAVE_SSE };
        self.add_sub(0xd, 0, [self.xcr0_supported() as u32, size, size, 0]);
        self.add_sub(0xd, 1, [switches(&[(0, f.xsaveopt), (1, f.xsavec)]), size, 0, 0]);
        if f.avx {
            self.add_sub(0xd, 2, [XSAVE_AVX - XSAVE_SSE, XSAVE_SSE, 0, 0]);
        }
    }

    fn add_kvm(&mut self, tsc_khz: u32) {
        // "KVMKVMKVM\0\0\0".
        self.add(0x4000_0000, [KVM_LEAF_MAX, 0x4b4d_564b, 0x564b_4d56, 0x4d]);
        self.add(0x4000_0001, [KVM_FEATURES, 0, 0, 0]);
        self.add(KVM_LEAF_MAX, [tsc_khz, APIC_KHZ, 0, 0]);
    }

    fn add_extended(&mut self, host: &HostCpuid) {
        let f = self.features;
        let amd = self.vendor == Vendor::Amd;
        let Topology { index, count } = self.topology;
        let [_, b, c, d] = host.leaf0;
        if amd {
            self.add(0x8000_0000, [0x8000_0021, b, c, d]);
        } else {
            self.add(0x8000_0000, [0x8000_0008, 0, 0, 0]);
        }
        // LAHF; AMD: CMP_LEGACY, CR8 by LOCK MOV CR0, TOPOEXT.
        let ecx = bits(&[0])
            | switches(&[(1, amd && count > 1), (5, f.lzcnt), (8, f.prefetchw), (22, amd)]);
        // SYSCALL, NX, 1 GiB pages, RDTSCP, long mode; AMD repeats leaf 1.
        let mut edx = bits(&[11, 20, 26, 27, 29]);
        if amd {
            edx |= self.leaf1_edx() & 0x0183_f3ff;
        }
        let (a1, b1) = if amd { (host.ext1[0], host.ext1[1]) } else { (0, 0) };
        self.add(0x8000_0001, [a1, b1, ecx, edx]);
        for (leaf, regs) in (0x8000_0002..).zip(host.brand) {
            self.add(leaf, regs);
        }
        if amd {
            self.add(0x8000_0005, host.ext5);
        }
        self.add(0x8000_0006, host.ext6);
        // The time-stamp counter runs at one rate in every state.
        self.add(0x8000_0007, [0, 0, 0, 1 << 8]);
        let shift = self.topology.core_bits();
        // AMD: SSB_NO (26), BTC_NO (29).
        let (b8, c8) =
            if amd { (bits(&[26, 29]), shift << 12 | count.saturating_sub(1)) } else { (0, 0) };
        self.add(0x8000_0008, [48 << 8 | physical_bits(host), b8, c8, 0]);
        if amd {
            for (sub, regs) in (0..).zip(self.caches(host)) {
                self.add_sub(0x8000_001d, sub, regs);
            }
            self.add(0x8000_001e, [index, index, 0, 0]);
            // No nested data breakpoints (0), LFENCE serializes (2), null selectors clear the base (6),
            // automatic IBRS (8), SRSO_NO (29); TSA_SQ_NO and TSA_L1_NO in ECX.
            self.add(0x8000_0021, [bits(&[0, 2, 6, 8, 29]), 0, bits(&[1, 2]), 0]);
        }
    }
}

/// Physical address bits: the walker's, or the host's when it has fewer.
fn physical_bits(host: &HostCpuid) -> u32 {
    match host.ext8[0] & 0xff {
        0 => 36,
        bits => bits.min(crate::paging::PHYS_BITS),
    }
}

fn bits(numbers: &[u32]) -> u32 {
    numbers.iter().fold(0, |all, bit| all | 1 << bit)
}

fn switches(list: &[(u32, bool)]) -> u32 {
    list.iter().fold(0, |all, &(bit, on)| all | u32::from(on) << bit)
}

/// Hosts for tests, here and in other modules.
#[cfg(test)]
pub(crate) mod tests_support {
    use super::{CpuidTable, HostCpuid, Topology};

    /// A host with the maxima and vendor (EBX of leaf 0) given and the same answer everywhere else,
    /// but for caches of levels 1, 1, 2, 3.
    pub(crate) fn answers(vendor: u32, other: [u32; 4]) -> HostCpuid {
        let rest = if vendor == 0x6874_7541 {
            [0x444d_4163, 0x6974_6e65]
        } else {
            [0x6c65_746e, 0x4965_6e69]
        };
        HostCpuid::from_fn(|leaf, sub| match leaf {
            0 => [0x20, vendor, rest[0], rest[1]],
            0x8000_0000 => [0x8000_0021, vendor, rest[0], rest[1]],
            4 | 0x8000_001d => match sub {
                0 => [0xfc00_c121, 0x01c0_003f, 0x3f, 0],
                1 => [0xfc00_c122, 0x01c0_003f, 0x3f, 0],
                2 => [0xfc00_c143, 0x03c0_003f, 0x3ff, 0],
                3 => [0xfc0f_c163, 0x0280_003f, 0xbfff, 4],
                _ => [0; 4],
            },
            _ => other,
        })
    }

    pub(crate) fn intel_host() -> HostCpuid {
        answers(0x756e_6547, [u32::MAX; 4])
    }

    pub(crate) fn amd_host() -> HostCpuid {
        answers(0x6874_7541, [u32::MAX; 4])
    }

    pub(crate) fn table(host: &HostCpuid) -> CpuidTable {
        CpuidTable::new(host, Topology { index: 0, count: 1 }, 2_500_000)
    }
}

#[cfg(test)]
#[path = "cpuid_tests.rs"]
mod tests;
