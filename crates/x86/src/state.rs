//! Architectural state of one vCPU.
//!
//! [`CpuState`] is `repr(C)`: translated code addresses its fields by offset. It is the live state of
//! the translated processor and the exchange format with KVM; snapshots serialize it field by field
//! (never as raw memory).

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Index of a general register in [`CpuState::gpr`] (the hardware encoding).
pub mod reg {
    #![allow(missing_docs, reason = "the names are the register names")]
    pub const RAX: usize = 0;
    pub const RCX: usize = 1;
    pub const RDX: usize = 2;
    pub const RBX: usize = 3;
    pub const RSP: usize = 4;
    pub const RBP: usize = 5;
    pub const RSI: usize = 6;
    pub const RDI: usize = 7;
}

/// Index of a segment register in [`CpuState::seg`] (the hardware encoding).
pub mod sreg {
    #![allow(missing_docs, reason = "the names are the register names")]
    pub const ES: usize = 0;
    pub const CS: usize = 1;
    pub const SS: usize = 2;
    pub const DS: usize = 3;
    pub const FS: usize = 4;
    pub const GS: usize = 5;
}

/// Bits of RFLAGS (Intel SDM vol. 1, 3.4.3).
pub mod flags {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const CF: u64 = 1 << 0;
    /// Always one.
    pub const FIXED: u64 = 1 << 1;
    pub const PF: u64 = 1 << 2;
    pub const AF: u64 = 1 << 4;
    pub const ZF: u64 = 1 << 6;
    pub const SF: u64 = 1 << 7;
    pub const TF: u64 = 1 << 8;
    pub const IF: u64 = 1 << 9;
    pub const DF: u64 = 1 << 10;
    pub const OF: u64 = 1 << 11;
    pub const IOPL: u64 = 3 << 12;
    pub const IOPL_SHIFT: u32 = 12;
    pub const NT: u64 = 1 << 14;
    pub const RF: u64 = 1 << 16;
    pub const VM: u64 = 1 << 17;
    pub const AC: u64 = 1 << 18;
    pub const VIF: u64 = 1 << 19;
    pub const VIP: u64 = 1 << 20;
    pub const ID: u64 = 1 << 21;
    /// The six arithmetic flags.
    pub const ARITH: u64 = CF | PF | AF | ZF | SF | OF;
}

/// Bits of CR0 (Intel SDM vol. 3, 2.5).
pub mod cr0 {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const PE: u64 = 1 << 0;
    pub const MP: u64 = 1 << 1;
    pub const EM: u64 = 1 << 2;
    pub const TS: u64 = 1 << 3;
    pub const ET: u64 = 1 << 4;
    pub const NE: u64 = 1 << 5;
    pub const WP: u64 = 1 << 16;
    pub const AM: u64 = 1 << 18;
    pub const NW: u64 = 1 << 29;
    pub const CD: u64 = 1 << 30;
    pub const PG: u64 = 1 << 31;
}

/// Bits of CR4 (Intel SDM vol. 3, 2.5).
pub mod cr4 {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const VME: u64 = 1 << 0;
    pub const PVI: u64 = 1 << 1;
    pub const TSD: u64 = 1 << 2;
    pub const DE: u64 = 1 << 3;
    pub const PSE: u64 = 1 << 4;
    pub const PAE: u64 = 1 << 5;
    pub const MCE: u64 = 1 << 6;
    pub const PGE: u64 = 1 << 7;
    pub const PCE: u64 = 1 << 8;
    pub const OSFXSR: u64 = 1 << 9;
    pub const OSXMMEXCPT: u64 = 1 << 10;
    pub const UMIP: u64 = 1 << 11;
    pub const FSGSBASE: u64 = 1 << 16;
    pub const PCIDE: u64 = 1 << 17;
    pub const OSXSAVE: u64 = 1 << 18;
    pub const SMEP: u64 = 1 << 20;
    pub const SMAP: u64 = 1 << 21;
}

/// Bits of IA32_EFER.
pub mod efer {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const SCE: u64 = 1 << 0;
    pub const LME: u64 = 1 << 8;
    pub const LMA: u64 = 1 << 10;
    pub const NXE: u64 = 1 << 11;
}

/// A segment register with its hidden part, or TR or LDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Segment {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes (granularity already applied), inclusive.
    pub limit: u32,
    /// Visible selector.
    pub selector: u16,
    /// Attributes as in bits 8..=23 of the descriptor's second dword: type (0..=3), S (4), DPL
    /// (5..=6), P (7), 8..=11 unused, AVL (12), L (13), D/B (14), G (15). P = 0: unusable.
    pub attr: u16,
}

impl Segment {
    /// Bit of [`Segment::attr`]: code or data segment (not system).
    pub const S: u16 = 1 << 4;
    /// Bit of [`Segment::attr`]: present.
    pub const P: u16 = 1 << 7;
    /// Bit of [`Segment::attr`]: 64-bit code.
    pub const L: u16 = 1 << 13;
    /// Bit of [`Segment::attr`]: 32-bit default size / stack size.
    pub const DB: u16 = 1 << 14;
    /// Bit of [`Segment::attr`]: limit counted in 4 KiB pages in the descriptor.
    pub const G: u16 = 1 << 15;

    /// A segment of virtual-8086 mode (SDM vol. 3, 21.2.1).
    #[must_use]
    pub const fn virtual_8086(selector: u16) -> Self {
        Self { base: (selector as u64) << 4, limit: 0xffff, selector, attr: 0xf3 }
    }

    /// The descriptor privilege level, 0 to 3.
    #[must_use]
    pub const fn dpl(&self) -> u8 {
        ((self.attr >> 5) & 3) as u8
    }

    /// The type field, 0 to 15.
    #[must_use]
    pub const fn typ(&self) -> u8 {
        (self.attr & 0xf) as u8
    }

    /// Whether the register may be used for accesses.
    #[must_use]
    pub const fn present(&self) -> bool {
        self.attr & Self::P != 0
    }
}

/// GDTR or IDTR.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableReg {
    /// Linear base address.
    pub base: u64,
    /// Limit in bytes, inclusive.
    pub limit: u32,
    /// Keeps the layout explicit; always zero.
    #[serde(skip)]
    pub pad: u32,
}

/// Bytes kept for x87, SSE and AVX state: the standard (non-compacted) XSAVE format for
/// `XCR0 = 7`: 512 legacy + 64 header + 256 upper halves of YMM.
pub const XSAVE_SIZE: usize = 832;

/// The XSAVE area of a vCPU; XSTATE_BV in its header says which parts are not in their initial state.
#[repr(C, align(64))]
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct XsaveArea(pub [u8; XSAVE_SIZE]);

impl Default for XsaveArea {
    /// The state after reset: FCW = 0x37f, MXCSR = 0x1f80, everything else zero, XSTATE_BV = 7.
    fn default() -> Self {
        let mut area = [0; XSAVE_SIZE];
        area[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
        area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        area[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
        area[512] = 7;
        Self(area)
    }
}

/// As hexadecimal digits.
impl Serialize for XsaveArea {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let digits: String = self.0.iter().map(|byte| format!("{byte:02x}")).collect();
        serializer.serialize_str(&digits)
    }
}

impl<'de> Deserialize<'de> for XsaveArea {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let digits = String::deserialize(deserializer)?;
        let mut area = Self([0; XSAVE_SIZE]);
        let pair = |at: usize| u8::from_str_radix(digits.get(2 * at..2 * at + 2)?, 16).ok();
        let whole = digits.len() == 2 * XSAVE_SIZE;
        for (at, byte) in area.0.iter_mut().enumerate() {
            *byte = pair(at).filter(|_| whole).ok_or_else(|| {
                D::Error::custom(format!("no area of {XSAVE_SIZE} bytes in hexadecimal"))
            })?;
        }
        Ok(area)
    }
}

/// An exception to be delivered to the guest (Intel SDM vol. 3, 6.15).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector, 0 to 31.
    pub vector: u8,
    /// The error code, for the vectors that push one.
    pub error_code: Option<u32>,
    /// The faulting linear address; only for #PF.
    pub cr2: Option<u64>,
    /// Bits to be set in DR6; only for #DB.
    pub dr6: u64,
}

/// Exception vectors.
pub mod vector {
    #![allow(missing_docs, reason = "the names are the manual's")]
    pub const DE: u8 = 0;
    pub const DB: u8 = 1;
    pub const NMI: u8 = 2;
    pub const BP: u8 = 3;
    pub const OF: u8 = 4;
    pub const BR: u8 = 5;
    pub const UD: u8 = 6;
    pub const NM: u8 = 7;
    pub const DF: u8 = 8;
    pub const TS: u8 = 10;
    pub const NP: u8 = 11;
    pub const SS: u8 = 12;
    pub const GP: u8 = 13;
    pub const PF: u8 = 14;
    pub const MF: u8 = 16;
    pub const AC: u8 = 17;
    pub const MC: u8 = 18;
    pub const XM: u8 = 19;
}

impl Exception {
    const fn bare(vector: u8) -> Self {
        Self { vector, error_code: None, cr2: None, dr6: 0 }
    }
    const fn code(vector: u8, error_code: u32) -> Self {
        Self { vector, error_code: Some(error_code), cr2: None, dr6: 0 }
    }
    /// Invalid opcode.
    #[must_use]
    pub const fn ud() -> Self {
        Self::bare(vector::UD)
    }
    /// Divide error.
    #[must_use]
    pub const fn de() -> Self {
        Self::bare(vector::DE)
    }
    /// Device not available.
    #[must_use]
    pub const fn nm() -> Self {
        Self::bare(vector::NM)
    }
    /// x87 floating-point error.
    #[must_use]
    pub const fn mf() -> Self {
        Self::bare(vector::MF)
    }
    /// SIMD floating-point error.
    #[must_use]
    pub const fn xm() -> Self {
        Self::bare(vector::XM)
    }
    /// General protection with an error code (a selector, or 0).
    #[must_use]
    pub const fn gp(error_code: u32) -> Self {
        Self::code(vector::GP, error_code)
    }
    /// Stack fault.
    #[must_use]
    pub const fn ss(error_code: u32) -> Self {
        Self::code(vector::SS, error_code)
    }
    /// Segment not present.
    #[must_use]
    pub const fn np(error_code: u32) -> Self {
        Self::code(vector::NP, error_code)
    }
    /// Invalid TSS.
    #[must_use]
    pub const fn ts(error_code: u32) -> Self {
        Self::code(vector::TS, error_code)
    }
    /// Alignment check.
    #[must_use]
    pub const fn ac() -> Self {
        Self::code(vector::AC, 0)
    }
    /// Page fault at linear address `cr2`.
    #[must_use]
    pub const fn pf(cr2: u64, error_code: u32) -> Self {
        Self { vector: vector::PF, error_code: Some(error_code), cr2: Some(cr2), dr6: 0 }
    }
    /// Debug exception; `dr6` holds the bits to be set.
    #[must_use]
    pub const fn db(dr6: u64) -> Self {
        Self { vector: vector::DB, error_code: None, cr2: None, dr6 }
    }
    /// Any other exception without an error code (#BP, #OF, #BR).
    #[must_use]
    pub const fn other(vector: u8) -> Self {
        Self::bare(vector)
    }
}

/// The architectural state of one vCPU.
///
/// RFLAGS is complete (arithmetic flags included) whenever translated code is not running.
#[repr(C)]
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CpuState {
    /// General registers in encoding order (see [`reg`]).
    pub gpr: [u64; 16],
    /// Instruction pointer.
    pub rip: u64,
    /// Flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS (see [`sreg`]).
    pub seg: [Segment; 6],
    /// Local descriptor table register.
    pub ldtr: Segment,
    /// Task register.
    pub tr: Segment,
    /// Global descriptor table register.
    pub gdtr: TableReg,
    /// Interrupt descriptor table register.
    pub idtr: TableReg,
    /// Control register 0.
    pub cr0: u64,
    /// Control register 2.
    pub cr2: u64,
    /// Control register 3.
    pub cr3: u64,
    /// Control register 4.
    pub cr4: u64,
    /// Extended control register 0.
    pub xcr0: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub sfmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_SYSENTER_CS.
    pub sysenter_cs: u64,
    /// IA32_SYSENTER_ESP.
    pub sysenter_esp: u64,
    /// IA32_SYSENTER_EIP.
    pub sysenter_eip: u64,
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// What is added to the host's time-stamp counter to get the guest's.
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// IA32_SPEC_CTRL.
    pub spec_ctrl: u64,
    /// Debug address registers 0 to 3.
    pub dr: [u64; 4],
    /// Debug status.
    pub dr6: u64,
    /// Debug control.
    pub dr7: u64,
    /// PAE page-directory-pointer entries as loaded by MOV CR3 (used with PAE outside long mode).
    pub pdpte: [u64; 4],
    /// Interrupts are inhibited for one instruction (after STI or a load of SS): bit 0 by STI, bit 1
    /// by MOV/POP SS.
    pub interrupt_shadow: u32,
    /// An NMI is being handled (until IRET).
    pub nmi_masked: u32,
    /// An NMI waits to be delivered.
    pub nmi_pending: u32,
    /// HLT was executed; cleared by the next interrupt.
    pub halted: u32,
    /// MTRR default type register (IA32_MTRR_DEF_TYPE).
    pub mtrr_def_type: u64,
    /// Variable-range MTRRs, base and mask alternating.
    pub mtrr_var: [u64; 16],
    /// Fixed-range MTRRs: 64K, 16K_80000, 16K_A0000, 4K_C0000 ... 4K_F8000.
    pub mtrr_fixed: [u64; 11],
    /// Machine-check global status (IA32_MCG_STATUS).
    pub mcg_status: u64,
    /// x87, SSE and AVX state.
    pub xsave: XsaveArea,
}

/// Which rules of instruction decoding and addressing are in force.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CodeSize {
    /// 16-bit default operand and address size (real mode or a 16-bit code segment).
    Bits16,
    /// 32-bit default operand and address size.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

impl CpuState {
    /// Current privilege level, 0 to 3: the DPL of SS in protected mode, 0 in real mode.
    #[must_use]
    pub const fn cpl(&self) -> u8 {
        if self.cr0 & cr0::PE == 0 { 0 } else { self.seg[sreg::SS].dpl() }
    }

    /// I/O privilege level, 0 to 3.
    #[must_use]
    pub const fn iopl(&self) -> u8 {
        ((self.rflags & flags::IOPL) >> flags::IOPL_SHIFT) as u8
    }

    /// Whether the processor is in protected mode (long mode included).
    #[must_use]
    pub const fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0
    }

    /// Whether the processor is in virtual-8086 mode.
    #[must_use]
    pub const fn virtual_8086(&self) -> bool {
        self.protected() && !self.long_mode() && self.rflags & flags::VM != 0
    }

    /// Whether selectors are numbers of paragraphs: in real and in virtual-8086 mode.
    #[must_use]
    pub const fn real_segments(&self) -> bool {
        !self.protected() || self.virtual_8086()
    }

    /// Whether paging is on.
    #[must_use]
    pub const fn paging(&self) -> bool {
        self.cr0 & cr0::PG != 0
    }

    /// Whether long mode is active (64-bit or compatibility mode).
    #[must_use]
    pub const fn long_mode(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// Decoding mode by CS.
    #[must_use]
    pub const fn code_size(&self) -> CodeSize {
        let attr = self.seg[sreg::CS].attr;
        if self.long_mode() && attr & Segment::L != 0 {
            CodeSize::Bits64
        } else if attr & Segment::DB != 0 {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        }
    }
}
