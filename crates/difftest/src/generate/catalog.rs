//! Which instructions are generated: every encoding iced-x86 knows that user code may run on a
//! processor with the advertised features, minus what has no comparable result.

use iced_x86::{Code, CpuidFeature, EncodingKind, FlowControl, Mnemonic};

use crate::case::Mode;
use crate::rng::Rng;

/// How an instruction is generated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Operands by their kinds.
    Plain,
    /// A string instruction: RSI, RDI and RCX are prepared.
    Text,
    /// A near branch, call or return.
    Branch,
    /// Always faults in user mode.
    Privileged,
}

/// An instruction that can be generated.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    /// The encoding.
    pub code: Code,
    /// How.
    pub kind: Kind,
}

/// The instructions of one mode, in groups so that the common ones come up often although vector
/// instructions are many.
pub struct Catalog {
    groups: [Vec<Entry>; GROUPS],
}

const GROUPS: usize = 7;
/// Integer, MMX/SSE, AVX/FMA, x87, string, branch, privileged.
const WEIGHTS: [u32; GROUPS] = [42, 20, 17, 10, 4, 6, 1];

/// Whether the host has a feature and the guest advertises it.
fn supported(feature: CpuidFeature) -> bool {
    use std::arch::is_x86_feature_detected as has;
    match feature {
        CpuidFeature::INTEL8086
        | CpuidFeature::INTEL186
        | CpuidFeature::INTEL286
        | CpuidFeature::INTEL386
        | CpuidFeature::INTEL486
        | CpuidFeature::X64
        | CpuidFeature::CMOV
        | CpuidFeature::CX8
        | CpuidFeature::FPU
        | CpuidFeature::FPU287
        | CpuidFeature::FPU387
        | CpuidFeature::FXSR
        | CpuidFeature::MMX
        | CpuidFeature::SSE
        | CpuidFeature::SSE2
        | CpuidFeature::CLFSH
        | CpuidFeature::MULTIBYTENOP
        | CpuidFeature::PAUSE
        | CpuidFeature::PREFETCHW
        | CpuidFeature::FSGSBASE
        | CpuidFeature::MSR => true,
        CpuidFeature::SSE3 => has!("sse3"),
        CpuidFeature::SSSE3 => has!("ssse3"),
        CpuidFeature::SSE4_1 => has!("sse4.1"),
        CpuidFeature::SSE4_2 => has!("sse4.2"),
        CpuidFeature::CMPXCHG16B => has!("cmpxchg16b"),
        CpuidFeature::ADX => has!("adx"),
        CpuidFeature::AES => has!("aes"),
        CpuidFeature::AVX => has!("avx"),
        CpuidFeature::AVX2 => has!("avx2"),
        CpuidFeature::FMA => has!("fma"),
        CpuidFeature::F16C => has!("f16c"),
        CpuidFeature::BMI1 => has!("bmi1"),
        CpuidFeature::BMI2 => has!("bmi2"),
        CpuidFeature::LZCNT => has!("lzcnt"),
        CpuidFeature::MOVBE => has!("movbe"),
        CpuidFeature::PCLMULQDQ => has!("pclmulqdq"),
        CpuidFeature::POPCNT => has!("popcnt"),
        CpuidFeature::SHA => has!("sha"),
        _ => false,
    }
}

/// Left out, with the reason.
fn excluded(mnemonic: Mnemonic) -> bool {
    matches!(
        mnemonic,
        // Different on every run, or by processor model.
        Mnemonic::Rdtsc | Mnemonic::Rdtscp | Mnemonic::Rdpmc | Mnemonic::Cpuid | Mnemonic::Rdpid
        // System calls: the kernel behind them is not the same.
        | Mnemonic::Syscall | Mnemonic::Sysenter | Mnemonic::Sysexit | Mnemonic::Sysret
        | Mnemonic::Sysexitq | Mnemonic::Sysretq
        // Linux emulates these for user programs (UMIP), or they show the kernel's descriptor table.
        | Mnemonic::Sgdt | Mnemonic::Sidt | Mnemonic::Sldt | Mnemonic::Str | Mnemonic::Smsw
        | Mnemonic::Lar | Mnemonic::Lsl | Mnemonic::Verr | Mnemonic::Verw
        // Far pointers: made by a template where they have a known target.
        | Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs
        | Mnemonic::Iret | Mnemonic::Iretd | Mnemonic::Iretq | Mnemonic::Retf
        // Save images hold the last x87 instruction and the state in use; made by templates.
        | Mnemonic::Fnstenv | Mnemonic::Fstenv | Mnemonic::Fnsave | Mnemonic::Fsave
        | Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64
        // Undocumented, or without a meaning on today's processors.
        | Mnemonic::Loadall | Mnemonic::Umov | Mnemonic::Ibts
        | Mnemonic::Xbts | Mnemonic::Jmpe | Mnemonic::Ud0
        // Fault as user instructions but by conditions the harness does not model.
        | Mnemonic::Rsm | Mnemonic::Invd
    )
}

/// A push of a segment register in 32-bit code writes two bytes or four (Intel SDM, PUSH); a pop
/// likewise reads two bytes or all.
fn by_processor(code: Code) -> bool {
    matches!(
        code,
        Code::Pushd_ES
            | Code::Pushd_CS
            | Code::Pushd_SS
            | Code::Pushd_DS
            | Code::Pushd_FS
            | Code::Pushd_GS
            | Code::Popq_FS
            | Code::Popq_GS
            | Code::Popd_ES
            | Code::Popd_SS
            | Code::Popd_DS
            | Code::Popd_FS
            | Code::Popd_GS
    )
}

impl Catalog {
    /// The instructions for a mode.
    #[must_use]
    pub fn new(mode: Mode) -> Self {
        let mut groups: [Vec<Entry>; GROUPS] = std::array::from_fn(|_| Vec::new());
        for code in Code::values() {
            if let Some((group, kind)) = classify(code, mode) {
                groups[group].push(Entry { code, kind });
            }
        }
        Self { groups }
    }

    /// One instruction.
    pub fn pick(&self, rng: &mut Rng) -> Entry {
        loop {
            let mut roll = rng.below(WEIGHTS.iter().sum());
            for (group, weight) in self.groups.iter().zip(WEIGHTS) {
                if roll < weight {
                    if let Some(last) = group.len().checked_sub(1) {
                        return group[rng.below(last as u32 + 1) as usize];
                    }
                    break;
                }
                roll -= weight;
            }
        }
    }

    /// All instructions.
    pub fn all(&self) -> impl Iterator<Item = Code> {
        self.groups.iter().flatten().map(|e| e.code)
    }
}

fn classify(code: Code, mode: Mode) -> Option<(usize, Kind)> {
    let info = code.op_code();
    let available = match mode {
        Mode::Bits64 => info.mode64() && info.long_mode(),
        Mode::Compat32 => info.mode32() && info.compatibility_mode(),
    };
    let vex = code.encoding() == EncodingKind::VEX;
    let legacy = code.encoding() == EncodingKind::Legacy;
    let features = code.cpuid_features();
    if !info.is_instruction() && !info.fwait()
        || !available
        || !(vex || legacy)
        || info.fwait()
        || excluded(code.mnemonic())
        || !features.iter().all(|f| supported(*f))
        || (mode == Mode::Bits64 && !info.intel_decoder64())
        || (mode == Mode::Compat32 && !info.intel_decoder32())
        || info.is_reserved_nop()
        || by_processor(code)
    {
        return None;
    }
    // Far transfers are templates; near branches with a 66 prefix differ between vendors.
    if code.is_jmp_far()
        || code.is_call_far()
        || code.is_jmp_far_indirect()
        || code.is_call_far_indirect()
    {
        return None;
    }
    if code.is_privileged() || info.must_be_cpl0() || info.is_input_output() {
        return Some((6, Kind::Privileged));
    }
    if code.is_string_instruction() {
        return Some((4, Kind::Text));
    }
    match code.flow_control() {
        FlowControl::Next | FlowControl::Interrupt | FlowControl::Exception => {}
        // In compatibility mode they cut EIP to 16 bits.
        _ if info.operand_size() == 16 => return None,
        _ => return Some((5, Kind::Branch)),
    }
    let group = match features[0] {
        _ if vex && matches!(features[0], CpuidFeature::BMI1 | CpuidFeature::BMI2) => 0,
        _ if vex => 2,
        CpuidFeature::FPU | CpuidFeature::FPU287 | CpuidFeature::FPU387 => 3,
        CpuidFeature::MMX
        | CpuidFeature::SSE
        | CpuidFeature::SSE2
        | CpuidFeature::SSE3
        | CpuidFeature::SSSE3
        | CpuidFeature::SSE4_1
        | CpuidFeature::SSE4_2
        | CpuidFeature::AES
        | CpuidFeature::PCLMULQDQ
        | CpuidFeature::SHA => 1,
        _ => 0,
    };
    Some((group, Kind::Plain))
}
