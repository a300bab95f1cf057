//! Which instructions the advertised CPUID promises.

use berth_x86::cpuid::Features;
use iced_x86::{CpuidFeature, DecoderOptions, Instruction, Mnemonic};

/// A table by iced's feature numbers.
pub struct Allowed {
    table: Vec<bool>,
    decoder: u32,
}

impl Allowed {
    /// The instructions of a processor with these features.
    #[allow(clippy::too_many_lines, reason = "a list of features")]
    pub fn new(f: &Features) -> Self {
        use CpuidFeature as C;
        let mut t = vec![false; 512];
        let mut set = |list: &[C], on: bool| {
            for c in list {
                if let Some(e) = t.get_mut(*c as usize) {
                    *e = on;
                }
            }
        };
        set(
            &[
                C::INTEL8086,
                C::INTEL8086_ONLY,
                C::INTEL186,
                C::INTEL286,
                C::INTEL386,
                C::INTEL486,
                C::X64,
                C::FPU,
                C::FPU287,
                C::FPU387,
                C::CMOV,
                C::CX8,
                C::CMPXCHG16B,
                C::MMX,
                C::SSE,
                C::SSE2,
                C::SSE3,
                C::SSSE3,
                C::SSE4_1,
                C::SSE4_2,
                C::POPCNT,
                C::FXSR,
                C::SEP,
                C::SYSCALL,
                C::MSR,
                C::TSC,
                C::PAUSE,
                C::CLFSH,
                C::MULTIBYTENOP,
                C::PREFETCHW,
                C::SMAP,
                C::CPUID,
                C::CET_IBT,
                C::VMX,
                C::SVM,
            ],
            true,
        );
        set(&[C::RDPMC], true);
        set(&[C::AVX], f.avx);
        set(&[C::AVX2], f.avx2);
        set(&[C::BMI1], f.bmi1);
        set(&[C::BMI2], f.bmi2);
        set(&[C::FMA], f.fma);
        set(&[C::F16C], f.f16c);
        set(&[C::LZCNT], f.lzcnt);
        set(&[C::MOVBE], f.movbe);
        set(&[C::AES], f.aes);
        set(&[C::PCLMULQDQ], f.pclmul);
        set(&[C::SHA], f.sha);
        set(&[C::RDRAND], f.rdrand);
        set(&[C::RDSEED], f.rdseed);
        set(&[C::ADX], f.adx);
        set(&[C::CLFLUSHOPT], f.clflushopt);
        set(&[C::CLWB], f.clwb);
        set(&[C::XSAVE], f.xsave);
        set(&[C::XSAVEOPT], f.xsaveopt);
        set(&[C::XSAVEC], f.xsavec);
        set(&[C::FSGSBASE], f.fsgsbase);
        set(&[C::RDTSCP], f.rdtscp);
        set(&[C::INVPCID], f.invpcid);
        // Without these extensions their prefix means nothing (SDM vol. 2, TZCNT and LZCNT).
        let bsf = if f.bmi1 { DecoderOptions::NONE } else { DecoderOptions::NO_MPFX_0FBC };
        let bsr = if f.lzcnt { DecoderOptions::NONE } else { DecoderOptions::NO_MPFX_0FBD };
        Self { table: t, decoder: bsf | bsr }
    }

    /// Options for decoding instructions of such a processor.
    pub fn decoder_options(&self) -> u32 {
        self.decoder
    }

    /// Whether all extensions an instruction belongs to are advertised.
    pub fn instruction(&self, ins: &Instruction) -> bool {
        // The only instructions of VMX and SVM that are not #UD are the hypercalls.
        if ins.cpuid_features().iter().any(|f| matches!(f, CpuidFeature::VMX | CpuidFeature::SVM)) {
            return matches!(ins.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall);
        }
        // Without CET these are hint no-ops.
        if matches!(ins.mnemonic(), Mnemonic::Rdsspd | Mnemonic::Rdsspq) {
            return true;
        }
        ins.cpuid_features().iter().all(|f| self.table.get(*f as usize).copied().unwrap_or(false))
    }
}

#[cfg(test)]
mod tests {
    use super::Allowed;
    use berth_x86::cpuid::Features;
    use iced_x86::{Decoder, Mnemonic};

    #[test]
    fn a_prefix_that_means_nothing_is_none() {
        for (bytes, with, without) in [
            ([0xf3, 0x0f, 0xbc, 0xc1], Mnemonic::Tzcnt, Mnemonic::Bsf),
            ([0xf3, 0x0f, 0xbd, 0xc1], Mnemonic::Lzcnt, Mnemonic::Bsr),
        ] {
            let most = Features { bmi1: true, lzcnt: true, ..Features::default() };
            for (features, wanted) in [(most, with), (Features::default(), without)] {
                let allowed = Allowed::new(&features);
                let ins = Decoder::new(64, &bytes, allowed.decoder_options()).decode();
                assert!(ins.mnemonic() == wanted && allowed.instruction(&ins), "{wanted:?}");
            }
        }
    }
}
