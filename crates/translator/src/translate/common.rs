//! The instructions that most code consists of: moves, sums, comparisons of general registers,
//! immediates and memory. What the translator wants to know of them is said here, since asking the
//! decoder's tables for each takes longer than all the rest.

use iced_x86::{Instruction, Mnemonic, OpAccess, OpKind};

use super::regs::GuestReg;
use crate::layout::mapped;

/// How the first operand of a common instruction is accessed; the others are read, and no other
/// register is. `None`: it is not one of them.
pub fn first_access(ins: &Instruction) -> Option<OpAccess> {
    use Mnemonic as M;
    let access = match ins.mnemonic() {
        M::Mov | M::Movzx | M::Movsx | M::Movsxd | M::Lea => OpAccess::Write,
        // What was in it does not matter then.
        M::Sub | M::Xor if is_twice_one_register(ins) => OpAccess::Write,
        M::Add | M::Sub | M::And | M::Or | M::Xor => OpAccess::ReadWrite,
        M::Inc | M::Dec | M::Neg | M::Not => OpAccess::ReadWrite,
        M::Cmp | M::Test => OpAccess::Read,
        M::Shl | M::Shr | M::Sar if ins.op1_kind() == OpKind::Immediate8 => OpAccess::ReadWrite,
        _ => return None,
    };
    let is_common = |i| match ins.op_kind(i) {
        OpKind::Register => ins.op_register(i).is_gpr(),
        OpKind::Memory => !ins.is_vsib(),
        OpKind::Immediate8
        | OpKind::Immediate16
        | OpKind::Immediate32
        | OpKind::Immediate64
        | OpKind::Immediate8to16
        | OpKind::Immediate8to32
        | OpKind::Immediate8to64
        | OpKind::Immediate32to64 => true,
        _ => false,
    };
    (0..ins.op_count()).all(is_common).then_some(access)
}

fn is_twice_one_register(ins: &Instruction) -> bool {
    ins.op0_kind() == OpKind::Register
        && ins.op1_kind() == OpKind::Register
        && ins.op0_register() == ins.op1_register()
}

/// The general registers, a bit each, that a common instruction writes; `access` is what
/// [`first_access`] gave.
pub fn written(ins: &Instruction, access: OpAccess) -> u16 {
    if access == OpAccess::Read || ins.op0_kind() != OpKind::Register {
        return 0;
    }
    GuestReg::of(ins.op0_register()).map_or(0, |g| 1 << g.n)
}

/// Whether a common instruction of 64-bit code is the same for the host: its registers are the
/// guest's, and it has no memory operand.
pub fn is_same(ins: &Instruction) -> bool {
    (0..ins.op_count()).all(|i| match ins.op_kind(i) {
        OpKind::Register => {
            let register = ins.op_register(i);
            GuestReg::of(register).is_some_and(|g| !g.high && mapped(g.n) == Some(g.n))
        }
        OpKind::Memory => false,
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use iced_x86::{
        Code, Decoder, DecoderOptions, InstructionInfoFactory, OpAccess, OpKind, Register,
    };

    use super::*;
    use crate::translate::{Class, Mode, Unit, classify, unit};

    /// All encodings of one and two opcode bytes with several operand bytes agree with the tables.
    #[test]
    fn common_instructions_are_what_the_tables_say() {
        let mut infos = InstructionInfoFactory::new();
        let (mut common, mut same) = (0, 0);
        let operands = [0xc0u8, 0xd8, 0xe1, 0x4b, 0x84, 0x05, 0xff, 0xf4, 0x1e, 0x33];
        let prefixes: [&[u8]; 7] = [&[], &[0x48], &[0x66], &[0x4d], &[0xf0], &[0x41], &[0x40]];
        for prefix in prefixes {
            for opcode in 0..512u16 {
                for modrm in operands {
                    let mut bytes = prefix.to_vec();
                    if opcode > 255 {
                        bytes.push(0x0f);
                    }
                    bytes.extend([opcode as u8, modrm, 0x24, 0x81, 1, 2, 3, 4, 5, 6]);
                    let ins = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
                    if ins.is_invalid() {
                        continue;
                    }
                    let Some(access) = first_access(&ins) else {
                        continue;
                    };
                    common += 1;
                    let info = infos.info(&ins);
                    let lea = ins.code() == Code::Lea_r64_m;
                    assert_eq!(info.op0_access(), access, "{ins}");
                    for i in 1..ins.op_count() {
                        let other = info.op_access(i);
                        let none = matches!(other, OpAccess::None | OpAccess::NoMemAccess);
                        assert!(other == OpAccess::Read || none, "{ins}: {other:?}");
                        assert!(!lea || none);
                    }
                    let mut mask = 0;
                    for used in info.used_registers() {
                        let reads = matches!(used.access(), OpAccess::Read | OpAccess::CondRead);
                        if !reads && let Some(g) = GuestReg::of(used.register()) {
                            mask |= 1 << g.n;
                        }
                    }
                    assert_eq!(written(&ins, access), mask, "{ins}");
                    let mode = Mode::flat(64, true);
                    assert_eq!(classify(&ins, mode, true), Class::Plain, "{ins}");
                    assert_eq!(unit(&ins), Unit::None, "{ins}");
                    same += u32::from(is_same(&ins));
                    let reg = |i| (ins.op_kind(i) == OpKind::Register).then(|| ins.op_register(i));
                    if (0..ins.op_count()).any(|i| reg(i).is_some_and(|r| r == Register::R10)) {
                        assert!(!is_same(&ins));
                    }
                }
            }
        }
        assert!(common > 3000 && same > 500, "{common} {same}");
    }
}
