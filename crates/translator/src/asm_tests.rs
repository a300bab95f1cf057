//! Every form of [`Asm`], decoded again by iced-x86: the operation, the operands with all registers
//! and displacement sizes, and nothing left over.

use iced_x86::{Code, Decoder, DecoderOptions, Instruction, OpKind, Register};

use super::{Asm, Mem};
use crate::layout::GUEST_RSP;

/// No displacement, the limits of one byte, and what needs four.
const DISPLACEMENTS: [i32; 9] = [0, 1, -1, 127, -128, 128, -129, i32::MAX, i32::MIN];

const RSP: u8 = 4;
const AT: u64 = 0x1_0000_0000;

fn r64(n: u8) -> Register {
    Register::RAX + u32::from(n)
}

fn r32(n: u8) -> Register {
    r64(n).full_register32()
}

fn r16(n: u8) -> Register {
    Register::AX + u32::from(n)
}

fn ymm(n: u8) -> Register {
    Register::YMM0 + u32::from(n)
}

/// A form whose operands are chosen already.
type Chosen<'a> = (Code, &'a dyn Fn(&mut Asm));

/// All that was emitted, which has to be one instruction.
fn only(emit: impl FnOnce(&mut Asm)) -> Instruction {
    let mut a = Asm::default();
    emit(&mut a);
    let mut d = Decoder::with_ip(64, &a.buf, AT, DecoderOptions::NONE);
    let ins = d.decode();
    assert!(!ins.is_invalid(), "{:02x?}", a.buf);
    assert_eq!(ins.len(), a.buf.len(), "{ins}: {:02x?}", a.buf);
    ins
}

/// A memory operand as the decoder sees it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    segment: Register,
    base: Register,
    index: Register,
    scale: u32,
    displacement: u64,
}

fn seen(ins: &Instruction) -> Seen {
    Seen {
        segment: ins.segment_prefix(),
        base: ins.memory_base(),
        index: ins.memory_index(),
        scale: ins.memory_index_scale(),
        displacement: ins.memory_displacement64(),
    }
}

/// Memory operands of every shape, with what the decoder has to see.
fn operands() -> Vec<(Mem, Seen)> {
    let mut all = Vec::new();
    let none = Register::None;
    for d in DISPLACEMENTS {
        let displacement = i64::from(d) as u64;
        let gs = Register::GS;
        all.push((
            Mem::gs(d),
            Seen { segment: gs, base: none, index: none, scale: 1, displacement },
        ));
        for n in 0..16 {
            let base = r64(n);
            let one = Seen { segment: none, base, index: none, scale: 1, displacement };
            all.push((Mem::base(n, d), one));
            if n == RSP {
                // Number 4 without REX.X means no index; R12 is one.
                continue;
            }
            let index = r64(n);
            let eight = Seen { segment: gs, base: none, index, scale: 8, displacement };
            all.push((Mem::gs_index8(n, d), eight));
            for shift in 0..4 {
                let scale = 1 << shift;
                let alone = Seen { segment: none, base: none, index, scale, displacement };
                all.push((Mem::index(n, shift, d), alone));
                for b in 0..16 {
                    let both = Seen { segment: none, base: r64(b), index, scale, displacement };
                    all.push((Mem::base_index(b, n, shift, d), both));
                }
            }
        }
    }
    all
}

/// A form with a memory operand and a register.
type WithMemory = (Code, fn(&mut Asm, u8, &Mem), fn(u8) -> Register);

#[test]
fn a_register_and_memory() {
    let forms: [WithMemory; 4] = [
        (Code::Mov_r64_rm64, |a, r, m| a.load(r, m), r64),
        (Code::Mov_rm64_r64, |a, r, m| a.store(m, r), r64),
        (Code::Lea_r64_m, |a, r, m| a.lea(r, m), r64),
        (Code::Lea_r32_m, |a, r, m| a.lea32(r, m), r32),
    ];
    for (m, want) in operands() {
        for (code, emit, name) in forms {
            for r in 0..16 {
                let ins = only(|a| emit(a, r, &m));
                assert_eq!(ins.code(), code, "{ins}");
                let memory = usize::from(code != Code::Mov_rm64_r64);
                assert_eq!(ins.op_kind(memory as u32), OpKind::Memory, "{ins}");
                assert_eq!(ins.op_register(1 - memory as u32), name(r), "{ins}");
                assert_eq!(seen(&ins), want, "{ins}");
            }
        }
    }
}

#[test]
fn memory_alone() {
    for (m, want) in operands() {
        let forms: [Chosen<'_>; 4] = [
            (Code::Jmp_rm64, &|a| a.jmp_mem(&m)),
            (Code::Push_rm64, &|a| a.push_mem(&m)),
            (Code::Pop_rm64, &|a| a.pop_mem(&m)),
            (Code::Mov_rm64_imm32, &|a| a.store_imm(&m, -0x1234_5678)),
        ];
        for (code, emit) in forms {
            let ins = only(emit);
            assert_eq!(ins.code(), code, "{ins}");
            assert_eq!(seen(&ins), want, "{ins}");
            if code == Code::Mov_rm64_imm32 {
                assert_eq!(ins.immediate(1) as i64, -0x1234_5678);
            }
        }
    }
}

/// The opcodes that others give by their bytes.
#[test]
fn opcodes_of_the_thunks() {
    for (m, want) in operands() {
        for (code, digit) in [(Code::Ldmxcsr_m32, 2), (Code::Stmxcsr_m32, 3)] {
            let ins = only(|a| a.op_mem(false, &[0x0f, 0xae], digit, &m));
            assert_eq!(ins.code(), code, "{ins}");
            assert_eq!(seen(&ins), want, "{ins}");
        }
        let ins = only(|a| {
            a.op_mem(true, &[0x83], 0, &m);
            a.bytes(&[5]);
        });
        assert_eq!((ins.code(), ins.immediate(1)), (Code::Add_rm64_imm8, 5), "{ins}");
        assert_eq!(seen(&ins), want, "{ins}");
    }
}

/// A form with two registers.
type WithTwo = (Code, fn(&mut Asm, u8, u8), fn(u8) -> Register, fn(u8) -> Register);

#[test]
fn two_registers() {
    let forms: [WithTwo; 5] = [
        (Code::Mov_r64_rm64, |a, d, s| a.mov(d, s), r64, r64),
        (Code::Mov_r32_rm32, |a, d, s| a.mov32(d, s), r32, r32),
        (Code::Movzx_r32_rm16, |a, d, s| a.movzx16(d, s), r32, r16),
        (Code::Movsxd_r64_rm32, |a, d, s| a.movsxd(d, s), r64, r32),
        (Code::Movsx_r64_rm16, |a, d, s| a.movsx16(d, s), r64, r16),
    ];
    for (code, emit, to, from) in forms {
        for d in 0..16 {
            for s in 0..16 {
                let ins = only(|a| emit(a, d, s));
                assert_eq!(ins.code(), code, "{ins}");
                assert_eq!((ins.op0_register(), ins.op1_register()), (to(d), from(s)), "{ins}");
            }
        }
    }
}

#[test]
fn one_register() {
    for r in 0..16 {
        let forms: [Chosen<'_>; 3] = [
            (Code::Push_r64, &|a| a.push(r)),
            (Code::Pop_r64, &|a| a.pop(r)),
            (Code::Call_rm64, &|a| a.call_reg(r)),
        ];
        for (code, emit) in forms {
            let ins = only(emit);
            assert_eq!((ins.code(), ins.op0_register()), (code, r64(r)), "{ins}");
        }
    }
    assert_eq!(only(Asm::ret).code(), Code::Retnq);
}

#[test]
fn immediates_by_the_shortest_form() {
    let cases = [
        (0, Code::Mov_r32_imm32),
        (1, Code::Mov_r32_imm32),
        (0x7fff_ffff, Code::Mov_r32_imm32),
        (0xffff_ffff, Code::Mov_r32_imm32),
        (0x1_0000_0000, Code::Mov_r64_imm64),
        (0x1234_5678_9abc_def0, Code::Mov_r64_imm64),
        (u64::MAX, Code::Mov_rm64_imm32),
        (0xffff_ffff_8000_0000, Code::Mov_rm64_imm32),
        (0xffff_ffff_7fff_ffff, Code::Mov_r64_imm64),
        (1 << 63, Code::Mov_r64_imm64),
    ];
    for (imm, code) in cases {
        for r in 0..16 {
            let ins = only(|a| a.mov_imm(r, imm));
            assert_eq!(ins.code(), code, "{ins}");
            assert_eq!(ins.op0_register().full_register(), r64(r), "{ins}");
            assert_eq!(ins.immediate(1), imm, "{ins}");
        }
    }
}

#[test]
fn system() {
    for r in 0..16 {
        let ins = only(|a| a.wrgsbase(r));
        assert_eq!((ins.code(), ins.op0_register()), (Code::Wrgsbase_r64, r64(r)), "{ins}");
        for disp in DISPLACEMENTS {
            let m = Mem::gs(disp);
            let ins = only(|a| a.load32(r, &m));
            assert_eq!(ins.code(), Code::Mov_r32_rm32, "{ins}");
            let ins = only(|a| a.load16(r, &m));
            assert_eq!(ins.code(), Code::Movzx_r32_rm16, "{ins}");
            let ins = only(|a| a.store_imm32(&m, 7));
            assert_eq!((ins.code(), ins.immediate32()), (Code::Mov_rm32_imm32, 7), "{ins}");
            assert_eq!(seen(&ins).displacement, i64::from(disp) as u64, "{ins}");
        }
    }
}

#[test]
fn bmi() {
    for d in 0..16 {
        for s in 0..16 {
            for imm in [0, 8, 56, 63] {
                let ins = only(|a| a.rorx(d, s, imm));
                assert_eq!(ins.code(), Code::VEX_Rorx_r64_rm64_imm8, "{ins}");
                assert_eq!((ins.op0_register(), ins.op1_register()), (r64(d), r64(s)), "{ins}");
                assert_eq!(ins.immediate8(), imm, "{ins}");
            }
            for disp in DISPLACEMENTS {
                let ins = only(|a| a.pdep_gs(d, s, disp));
                assert_eq!(ins.code(), Code::VEX_Pdep_r64_r64_rm64, "{ins}");
                assert_eq!((ins.op0_register(), ins.op1_register()), (r64(d), r64(s)), "{ins}");
                assert_eq!(seen(&ins).displacement, i64::from(disp) as u64, "{ins}");
                let ins = only(|a| a.pext_gs(d, s, disp));
                assert_eq!(ins.code(), Code::VEX_Pext_r64_r64_rm64, "{ins}");
                assert_eq!((ins.op0_register(), ins.op1_register()), (r64(d), r64(s)), "{ins}");
                let displacement = i64::from(disp) as u64;
                let (base, index) = (Register::None, Register::None);
                let want = Seen { segment: Register::GS, base, index, scale: 1, displacement };
                assert_eq!(seen(&ins), want, "{ins}");
            }
            for c in 0..16 {
                let ins = only(|a| a.sarx(d, s, c));
                assert_eq!(ins.code(), Code::VEX_Sarx_r64_rm64_r64, "{ins}");
                let got = (ins.op0_register(), ins.op1_register(), ins.op2_register());
                assert_eq!(got, (r64(d), r64(s), r64(c)), "{ins}");
            }
        }
    }
}

#[test]
fn vectors() {
    for n in 0..16 {
        for disp in DISPLACEMENTS {
            let m = Mem::gs(disp);
            let ins = only(|a| a.load_ymm(n, &m));
            assert_eq!(ins.code(), Code::VEX_Vmovdqu_ymm_ymmm256, "{ins}");
            assert_eq!(ins.op0_register(), ymm(n), "{ins}");
            assert_eq!(ins.memory_displacement64(), i64::from(disp) as u64, "{ins}");
            assert_eq!(ins.segment_prefix(), Register::GS, "{ins}");
            let ins = only(|a| a.store_ymm(&m, n));
            assert_eq!(ins.code(), Code::VEX_Vmovdqu_ymmm256_ymm, "{ins}");
            assert_eq!(ins.op1_register(), ymm(n), "{ins}");
            assert_eq!(ins.memory_displacement64(), i64::from(disp) as u64, "{ins}");
            assert_eq!(ins.segment_prefix(), Register::GS, "{ins}");
        }
    }
}

#[test]
fn the_guests_stack_pointer() {
    for n in DISPLACEMENTS {
        let ins = only(|a| a.add_guest_rsp(n));
        assert_eq!(ins.code(), Code::Lea_r64_m, "{ins}");
        let r = r64(GUEST_RSP);
        assert_eq!((ins.op0_register(), ins.memory_base()), (r, r), "{ins}");
        assert_eq!(ins.memory_displacement64(), i64::from(n) as u64, "{ins}");
    }
}

/// The first instruction of a buffer.
fn first(buf: &[u8]) -> Instruction {
    Decoder::with_ip(64, buf, AT, DecoderOptions::NONE).decode()
}

#[test]
fn jrcxz_reaches_127_bytes() {
    for distance in [0usize, 1, 126, 127, 128, 500] {
        let mut a = Asm::default();
        let s = a.jrcxz();
        a.bytes(&vec![0x90; distance]);
        assert_eq!(a.distance(s), distance);
        let bound = a.bind_short(s);
        assert_eq!(bound, distance <= 127, "{distance}");
        if bound {
            let ins = first(&a.buf);
            assert_eq!(ins.code(), Code::Jrcxz_rel8_64);
            assert_eq!(ins.near_branch_target(), AT + a.pos() as u64);
        }
    }
}

#[test]
fn near_jumps() {
    for distance in [0usize, 1, 127, 128, 70_000] {
        let mut a = Asm::default();
        let n = a.jmp();
        a.bytes(&vec![0x90; distance]);
        a.bind_near(n);
        let ins = first(&a.buf);
        assert_eq!(ins.code(), Code::Jmp_rel32_64);
        assert_eq!(ins.near_branch_target(), AT + a.pos() as u64);
        let back = a.pos();
        a.jmp_to(3);
        let ins =
            Decoder::with_ip(64, &a.buf[back..], AT + back as u64, DecoderOptions::NONE).decode();
        assert_eq!(ins.code(), Code::Jmp_rel32_64);
        assert_eq!(ins.near_branch_target(), AT + 3);
    }
    let codes = [
        Code::Jo_rel32_64,
        Code::Jno_rel32_64,
        Code::Jb_rel32_64,
        Code::Jae_rel32_64,
        Code::Je_rel32_64,
        Code::Jne_rel32_64,
        Code::Jbe_rel32_64,
        Code::Ja_rel32_64,
        Code::Js_rel32_64,
        Code::Jns_rel32_64,
        Code::Jp_rel32_64,
        Code::Jnp_rel32_64,
        Code::Jl_rel32_64,
        Code::Jge_rel32_64,
        Code::Jle_rel32_64,
        Code::Jg_rel32_64,
    ];
    for (cc, code) in codes.into_iter().enumerate() {
        let mut a = Asm::default();
        let n = a.jcc(cc as u8);
        a.bind_near_to(n, 0x1234);
        let ins = first(&a.buf);
        assert_eq!((ins.code(), ins.near_branch_target()), (code, AT + 0x1234));
    }
}

#[test]
fn jumps_to_host_addresses() {
    for (opcode, code) in [(0xe9, Code::Jmp_rel32_64), (0xe8, Code::Call_rel32_64)] {
        for target in [AT - 0x4000_0000, AT, AT + 1, AT + 0x7000_0000] {
            let mut a = Asm::default();
            a.bytes(&[0x90; 7]);
            a.near_abs(opcode, target, AT);
            let ins = Decoder::with_ip(64, &a.buf[7..], AT + 7, DecoderOptions::NONE).decode();
            assert_eq!((ins.code(), ins.near_branch_target()), (code, target));
        }
    }
}
