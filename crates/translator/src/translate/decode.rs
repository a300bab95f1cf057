//! Which instructions are emitted, and which are left to helpers.

use iced_x86::{Code, CpuidFeature, EncodingKind, FlowControl, Instruction, Mnemonic, OpKind};

use super::Mode;
use super::string::StringOp;

/// How an instruction is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// No effect.
    Nothing,
    /// Emitted.
    Plain,
    /// A system instruction, emitted (see [`super::system`]).
    System,
    /// SYSCALL or SYSRET, emitted; the block ends.
    Gate,
    /// A near branch, emitted.
    Branch,
    /// A helper executes it and the block goes on.
    Helper,
    /// A helper executes it; the block ends.
    HelperEnds,
    /// No instruction of this processor: a helper finds out what it raises; the block ends.
    Refused,
}

/// What an instruction needs of the floating-point units.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// Nothing.
    None,
    /// x87.
    X87,
    /// MMX registers.
    Mmx,
    /// XMM registers.
    Sse,
    /// VEX-encoded vector instructions.
    Avx,
}

/// Which unit an instruction belongs to.
pub fn unit(ins: &Instruction) -> Unit {
    let mut kind = Unit::None;
    for i in 0..ins.op_count() {
        if ins.op_kind(i) == OpKind::Register {
            let r = ins.op_register(i);
            if r.is_xmm() || r.is_ymm() {
                return if ins.code().encoding() == EncodingKind::VEX {
                    Unit::Avx
                } else {
                    Unit::Sse
                };
            }
            if r.is_mm() {
                kind = Unit::Mmx;
            }
            if r.is_st() {
                kind = Unit::X87;
            }
        }
    }
    if kind != Unit::None {
        return kind;
    }
    match ins.mnemonic() {
        Mnemonic::Ldmxcsr | Mnemonic::Stmxcsr => return Unit::Sse,
        Mnemonic::Vldmxcsr | Mnemonic::Vstmxcsr | Mnemonic::Vzeroall | Mnemonic::Vzeroupper => {
            return Unit::Avx;
        }
        Mnemonic::Emms => return Unit::Mmx,
        _ => {}
    }
    if ins.cpuid_features().iter().any(|f| is_x87(*f)) { Unit::X87 } else { Unit::None }
}

fn is_x87(f: CpuidFeature) -> bool {
    matches!(
        f,
        CpuidFeature::FPU
            | CpuidFeature::FPU287
            | CpuidFeature::FPU287XL_ONLY
            | CpuidFeature::FPU387
            | CpuidFeature::FPU387SL_ONLY
    )
}

/// How to translate `ins`; `allowed` says whether its extensions are advertised.
pub fn classify(ins: &Instruction, mode: Mode, allowed: bool) -> Class {
    if ins.is_invalid() || !allowed || mode.real && ins.code().encoding() == EncodingKind::VEX {
        return Class::Refused;
    }
    if !(mode.fpu && mode.sse && mode.avx) {
        let ok = match unit(ins) {
            Unit::None => ins.mnemonic() != Mnemonic::Wait || mode.fpu,
            Unit::X87 | Unit::Mmx => mode.fpu,
            Unit::Sse => mode.sse,
            Unit::Avx => mode.avx,
        };
        if !ok {
            return Class::Refused;
        }
    }
    match ins.flow_control() {
        FlowControl::Next => {}
        FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch
            if ins.is_jmp_short_or_near() || ins.is_jcc_short_or_near() || is_loop(ins) =>
        {
            return Class::Branch;
        }
        FlowControl::IndirectBranch if ins.is_jmp_near_indirect() && mode.bits == 64 => {
            return Class::Branch;
        }
        FlowControl::Call if ins.is_call_near() && mode.bits == 64 => return Class::Branch,
        FlowControl::IndirectCall if ins.is_call_near_indirect() && mode.bits == 64 => {
            return Class::Branch;
        }
        FlowControl::Return if is_near_ret(ins) && mode.bits == 64 => return Class::Branch,
        _ if super::gate::emitted(ins, mode) => return Class::Gate,
        _ => return Class::HelperEnds,
    }
    if super::system::emitted(ins, mode) {
        return Class::System;
    }
    if needs_helper(ins, mode) {
        return Class::Helper;
    }
    if is_nothing(ins) { Class::Nothing } else { Class::Plain }
}

/// LOOP, LOOPE, LOOPNE, JCXZ and company.
pub fn is_loop(ins: &Instruction) -> bool {
    ins.is_loop() || ins.is_loopcc() || ins.is_jcx_short()
}

fn is_near_ret(ins: &Instruction) -> bool {
    matches!(ins.code(), Code::Retnq | Code::Retnq_imm16)
}

#[allow(clippy::too_many_lines, reason = "a list of mnemonics")]
fn needs_helper(ins: &Instruction, mode: Mode) -> bool {
    use Mnemonic as M;
    if StringOp::of(ins).is_some_and(|op| op.emitted(ins, mode)) {
        return false;
    }
    if ins.is_privileged()
        || ins.is_string_instruction()
        || ins.is_save_restore_instruction()
        || may_load_segment(ins)
    {
        return true;
    }
    for i in 0..ins.op_count() {
        let k = ins.op_kind(i);
        if k == OpKind::Register && ins.op_register(i).is_segment_register() {
            return true;
        }
        if k == OpKind::Memory && ins.is_vsib() {
            return true;
        }
    }
    let m = ins.mnemonic();
    if ins.is_stack_instruction() {
        // Emitted: 64-bit PUSH, POP of registers, LEAVE.
        return !(mode.bits == 64
            && matches!(
                ins.code(),
                Code::Push_r64
                    | Code::Push_rm64
                    | Code::Pushq_imm8
                    | Code::Pushq_imm32
                    | Code::Pop_r64
                    | Code::Pop_rm64
                    | Code::Leaveq
            )
            && (ins.code() != Code::Pop_rm64 || ins.op0_kind() != OpKind::Memory));
    }
    if mode.bits != 64 && matches!(m, M::Vzeroall | M::Vzeroupper) {
        // They leave alone the registers that only 64-bit mode has.
        return true;
    }
    matches!(
        m,
        M::Cli
            | M::Pushf
            | M::Pushfd
            | M::Pushfq
            | M::Xlatb
            | M::Rdtsc
            | M::Rdtscp
            | M::Rdpid
            | M::Rdpmc
            | M::Xgetbv
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Arpl
            | M::Rdfsbase
            | M::Rdgsbase
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Bound
            | M::Aaa
            | M::Aad
            | M::Aam
            | M::Aas
            | M::Daa
            | M::Das
            | M::Salc
            | M::Maskmovq
            | M::Maskmovdqu
            | M::Vmaskmovdqu
            | M::Vmaskmovps
            | M::Vmaskmovpd
            | M::Vpmaskmovd
            | M::Vpmaskmovq
            | M::Fnstenv
            | M::Fstenv
            | M::Fldenv
            | M::Fnsave
            | M::Fsave
            | M::Frstor
            | M::Clflush
            | M::Clflushopt
            | M::Clwb
            | M::Monitor
            | M::Mwait
            | M::Serialize
            | M::Vmcall
            | M::Vmmcall
            | M::Stac
            | M::Clac
            | M::Sti
            | M::Popf
            | M::Popfd
            | M::Popfq
            | M::Cpuid
            | M::Swapgs
            | M::In
            | M::Out
            | M::Xsetbv
            | M::Invpcid
            | M::Invlpg
    )
}

fn may_load_segment(ins: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(ins.mnemonic(), M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss)
}

fn is_nothing(ins: &Instruction) -> bool {
    use Mnemonic as M;
    matches!(
        ins.mnemonic(),
        M::Nop
            | M::Rdsspd
            | M::Rdsspq
            | M::Endbr64
            | M::Endbr32
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Cldemote
            | M::Reservednop
    )
}
