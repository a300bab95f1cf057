//! Instructions executed by Rust code on the architectural state: everything privileged, far
//! control transfers, port I/O, strings and system instructions where they are not emitted, and what
//! is too rare to emit.

mod operand;
mod simd;
mod stack;
mod string;
mod system;

pub use system::host_tsc;

use berth_x86::state::{cr0, cr4, flags};
use berth_x86::{Exception, far};
use berth_x86::{OpSize, event};
use iced_x86::{Code, EncodingKind, Instruction, Mnemonic, OpKind};

use crate::fpu;
use crate::translate::{LONGEST, Unit, access_size, sreg_index, unit};
use crate::vcpu::Inner;

/// What comes after an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// The next instruction in order.
    Next,
    /// RIP has been set.
    Jump,
}

type Done = Result<Flow, Exception>;

/// How an instruction is executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Run {
    /// At once: nothing can forbid it.
    Perform,
    /// After a look whether it, and what it uses, is there.
    Execute,
}

impl Run {
    /// Executes `ins`; see [`execute`].
    pub fn run(self, v: &mut Inner, ins: &Instruction, next: u64) -> Done {
        match self {
            Self::Perform => perform(v, ins, next),
            Self::Execute => execute(v, ins, next),
        }
    }
}

/// What executes `ins`, which is valid and belongs to the extensions that are advertised.
pub fn runner(ins: &Instruction) -> Run {
    let plain = unit(ins) == Unit::None
        && !ins.is_save_restore_instruction()
        && ins.mnemonic() != Mnemonic::Wait;
    if plain { Run::Perform } else { Run::Execute }
}

/// Executes `ins`; RIP is its address, `next` the one after it.
///
/// # Errors
/// The exception it raises; the state is as before it (strings: as after the last full iteration).
pub fn execute(v: &mut Inner, ins: &Instruction, next: u64) -> Done {
    if ins.is_invalid() && ins.len() == LONGEST {
        return Err(Exception::gp(0));
    }
    // Where LDS and LES are, there is no VEX prefix (SDM vol. 2, 2.3.5).
    let vex = ins.code().encoding() == EncodingKind::VEX && v.area.state.real_segments();
    if ins.is_invalid() || vex || !v.allowed.instruction(ins) {
        return Err(Exception::ud());
    }
    unit_available(v, ins)?;
    perform(v, ins, next)
}

/// Executes an instruction that needs none of the checks of [`execute`].
#[allow(clippy::too_many_lines, reason = "one match over the mnemonics")]
fn perform(v: &mut Inner, ins: &Instruction, next: u64) -> Done {
    use Mnemonic as M;
    let m = ins.mnemonic();
    if ins.is_string_instruction() {
        return string::execute(v, ins);
    }
    match m {
        M::Push
        | M::Pop
        | M::Pusha
        | M::Pushad
        | M::Popa
        | M::Popad
        | M::Pushf
        | M::Pushfd
        | M::Pushfq
        | M::Popf
        | M::Popfd
        | M::Popfq
        | M::Enter
        | M::Leave
        | M::Call
        | M::Ret
        | M::Jmp
        | M::Retf
        | M::Iret
        | M::Iretd
        | M::Iretq
        | M::Int
        | M::Int3
        | M::Int1
        | M::Into => stack::execute(v, ins, next),
        M::Xlatb => {
            let size = match ins.op0_kind() {
                OpKind::Memory => ins.memory_base().size(),
                _ => 8,
            };
            let a =
                v.area.state.gpr[3].wrapping_add(v.area.state.gpr[0] & 0xff) & operand::mask(size);
            let seg = sreg_index(ins.memory_segment());
            let b = v.read_uint(seg, a, 1)?;
            v.set_reg(iced_x86::Register::AL, b);
            Ok(Flow::Next)
        }
        M::Bound => bound(v, ins),
        M::Aaa | M::Aas | M::Aad | M::Aam | M::Daa | M::Das | M::Salc => decimal(v, ins),
        M::Wait if fpu::pending() => Err(Exception::mf()),
        M::Wait => Ok(Flow::Next),
        M::Clflush | M::Clflushopt | M::Clwb => {
            let (seg, off) = v.address(ins);
            v.read_uint(seg, off, 1)?;
            Ok(Flow::Next)
        }
        M::Fxsave
        | M::Fxsave64
        | M::Fxrstor
        | M::Fxrstor64
        | M::Xsave
        | M::Xsave64
        | M::Xsaveopt
        | M::Xsaveopt64
        | M::Xsavec
        | M::Xsavec64
        | M::Xrstor
        | M::Xrstor64
        | M::Fnstenv
        | M::Fstenv
        | M::Fldenv
        | M::Fnsave
        | M::Fsave
        | M::Frstor => simd::save_restore(v, ins),
        M::Maskmovq
        | M::Maskmovdqu
        | M::Vmaskmovdqu
        | M::Vmaskmovps
        | M::Vmaskmovpd
        | M::Vpmaskmovd
        | M::Vpmaskmovq => simd::masked_move(v, ins),
        M::Vzeroall | M::Vzeroupper => {
            let from = if m == M::Vzeroall { 0 } else { 16 };
            for y in &mut v.area.ymm[..8] {
                y[from..].fill(0);
            }
            Ok(Flow::Next)
        }
        M::Lds | M::Les | M::Lfs | M::Lgs | M::Lss => load_far_pointer(v, ins, next),
        _ if ins.is_vsib() => simd::gather(v, ins),
        _ => system::execute(v, ins, next),
    }
}

/// #NM and #UD of the floating-point units (SDM vol. 3, 2.5 and table 14-1).
fn unit_available(v: &Inner, ins: &Instruction) -> Result<(), Exception> {
    let s = &v.area.state;
    let (em, ts) = (s.cr0 & cr0::EM != 0, s.cr0 & cr0::TS != 0);
    if ins.mnemonic() == Mnemonic::Wait {
        return if ts && s.cr0 & cr0::MP != 0 { Err(Exception::nm()) } else { Ok(()) };
    }
    let save = matches!(
        ins.mnemonic(),
        Mnemonic::Fxsave | Mnemonic::Fxsave64 | Mnemonic::Fxrstor | Mnemonic::Fxrstor64
    );
    match if save { Unit::X87 } else { unit(ins) } {
        Unit::None if ins.is_save_restore_instruction() => {
            if s.cr4 & cr4::OSXSAVE == 0 {
                Err(Exception::ud())
            } else if ts {
                Err(Exception::nm())
            } else {
                Ok(())
            }
        }
        Unit::None => Ok(()),
        Unit::X87 if em || ts => Err(Exception::nm()),
        Unit::Mmx | Unit::Sse if em => Err(Exception::ud()),
        Unit::Sse if s.cr4 & cr4::OSFXSR == 0 => Err(Exception::ud()),
        Unit::Avx if s.cr4 & cr4::OSXSAVE == 0 || s.xcr0 & 6 != 6 || s.real_segments() => {
            Err(Exception::ud())
        }
        _ if ts => Err(Exception::nm()),
        _ => Ok(()),
    }
}

/// Operand size of an instruction of the stack, of a far transfer, of LGDT or LIDT, by its opcode. (The
/// decoder's library has a table of all, which takes 5 ms to make and a megabyte.)
fn opsize(ins: &Instruction) -> OpSize {
    use Code as C;
    match ins.code() {
        C::Pushfw
        | C::Popfw
        | C::Enterw_imm16_imm8
        | C::Leavew
        | C::Call_rel16
        | C::Call_rm16
        | C::Call_ptr1616
        | C::Call_m1616
        | C::Jmp_ptr1616
        | C::Jmp_m1616
        | C::Retnw
        | C::Retnw_imm16
        | C::Retfw
        | C::Retfw_imm16
        | C::Iretw
        | C::Lgdt_m1632_16
        | C::Lidt_m1632_16 => OpSize::Bits16,
        C::Pushfq
        | C::Popfq
        | C::Enterq_imm16_imm8
        | C::Leaveq
        | C::Call_rel32_64
        | C::Call_rm64
        | C::Call_m1664
        | C::Jmp_m1664
        | C::Retnq
        | C::Retnq_imm16
        | C::Retfq
        | C::Retfq_imm16
        | C::Iretq => OpSize::Bits64,
        _ => OpSize::Bits32,
    }
}

/// LDS, LES, LFS, LGS, LSS.
fn load_far_pointer(v: &mut Inner, ins: &Instruction, next: u64) -> Done {
    let size = ins.op0_register().size();
    let (seg, off) = v.address(ins);
    let mut b = [0u8; 10];
    v.read_mem(seg, off, &mut b[..size + 2])?;
    let selector = u16::from_le_bytes([b[size], b[size + 1]]);
    let mut value = [0u8; 8];
    value[..size].copy_from_slice(&b[..size]);
    let n = match ins.mnemonic() {
        Mnemonic::Les => 0,
        Mnemonic::Lss => 2,
        Mnemonic::Lds => 3,
        Mnemonic::Lfs => 4,
        _ => 5,
    };
    far::load_segment(&mut v.area.state, &mut v.lin, n, selector)?;
    v.set_reg(ins.op0_register(), u64::from_le_bytes(value));
    if n == 2 {
        v.shadow(2, next);
    }
    Ok(Flow::Next)
}

fn bound(v: &mut Inner, ins: &Instruction) -> Done {
    let size = ins.op0_register().size();
    let (seg, off) = v.address(ins);
    let sx = |x: u64| if size == 2 { i64::from(x as i16) } else { i64::from(x as i32) };
    let i = sx(v.reg(ins.op0_register()));
    // The lower bound is judged before the upper one is read.
    let low = v.read_uint(seg, off, size)?;
    if i < sx(low) {
        return Err(Exception::other(berth_x86::state::vector::BR));
    }
    let high = v.read_uint(seg, off.wrapping_add(size as u64) & operand::mask(4), size)?;
    if i > sx(high) {
        return Err(Exception::other(berth_x86::state::vector::BR));
    }
    Ok(Flow::Next)
}

/// Decimal adjustments (SDM vol. 2); only outside 64-bit mode.
fn decimal(v: &mut Inner, ins: &Instruction) -> Done {
    use Mnemonic as M;
    let s = &mut v.area.state;
    let ax = s.gpr[0] as u16;
    let (mut al, mut ah) = (ax as u8, (ax >> 8) as u8);
    let (af, cf) = (s.rflags & flags::AF != 0, s.rflags & flags::CF != 0);
    let imm = if ins.op_count() > 0 { ins.immediate8() } else { 10 };
    let mut f = s.rflags;
    let mut put = |bit: u64, on: bool| f = if on { f | bit } else { f & !bit };
    let mut result = true;
    match ins.mnemonic() {
        M::Daa | M::Das => {
            let (old, mut carry) = (al, false);
            let add = ins.mnemonic() == M::Daa;
            let adjust = |x: u8, d: u8| if add { x.wrapping_add(d) } else { x.wrapping_sub(d) };
            let low = old & 0xf > 9 || af;
            if low {
                carry = cf || if add { old > 0xf9 } else { old < 6 };
                al = adjust(al, 6);
            }
            if old > 0x99 || cf {
                al = adjust(al, 0x60);
                carry = true;
            }
            put(flags::AF, low);
            put(flags::CF, carry);
        }
        M::Aaa | M::Aas => {
            let adjust = al & 0xf > 9 || af;
            if adjust {
                let x = u16::from_le_bytes([al, ah]);
                let x = if ins.mnemonic() == M::Aaa {
                    x.wrapping_add(0x106)
                } else {
                    x.wrapping_sub(6).wrapping_sub(0x100)
                };
                [al, ah] = x.to_le_bytes();
            }
            al &= 0xf;
            put(flags::AF, adjust);
            put(flags::CF, adjust);
            result = false;
        }
        M::Aam => {
            if imm == 0 {
                return Err(Exception::de());
            }
            ah = al / imm;
            al %= imm;
        }
        M::Aad => {
            al = al.wrapping_add(ah.wrapping_mul(imm));
            ah = 0;
        }
        _ => {
            al = if cf { 0xff } else { 0 };
            result = false;
        }
    }
    if result {
        put(flags::ZF, al == 0);
        put(flags::SF, al & 0x80 != 0);
        put(flags::PF, al.count_ones().is_multiple_of(2));
    }
    s.rflags = f;
    s.gpr[0] = s.gpr[0] & !0xffff | u64::from(u16::from_le_bytes([al, ah]));
    Ok(Flow::Next)
}

impl Inner {
    /// Interrupts stay inhibited until after the instruction at `next`.
    fn shadow(&mut self, bit: u32, next: u64) {
        self.area.state.interrupt_shadow |= bit;
        self.area.shadow_rip = next;
    }

    /// Delivers a software interrupt.
    fn software_interrupt(&mut self, vector: u8, next: u64) -> Done {
        let ev = event::Event::SoftInt { vector, next_rip: next };
        self.no_step_trap = true;
        if event::deliver_with_escalation(&mut self.area.state, &mut self.lin, ev).is_err() {
            self.exit = Some(crate::Exit::Shutdown);
        }
        Ok(Flow::Jump)
    }

    fn far_operand(&mut self, ins: &Instruction) -> Result<(u16, u64, OpSize), Exception> {
        let size = opsize(ins);
        if ins.op0_kind() == OpKind::Memory {
            let (seg, off) = self.address(ins);
            let n = access_size(ins);
            let mut b = [0u8; 10];
            self.read_mem(seg, off, &mut b[..n.min(10)])?;
            let k = n.saturating_sub(2).min(8);
            let mut o = [0u8; 8];
            o[..k].copy_from_slice(&b[..k]);
            return Ok((u16::from_le_bytes([b[k], b[k + 1]]), u64::from_le_bytes(o), size));
        }
        let offset = match ins.op0_kind() {
            OpKind::FarBranch16 => u64::from(ins.far_branch16()),
            _ => u64::from(ins.far_branch32()),
        };
        Ok((ins.far_branch_selector(), offset, size))
    }
}

#[cfg(test)]
mod tests {
    use iced_x86::{Code, Instruction, Mnemonic as M};

    use super::opsize;

    #[test]
    fn operand_sizes_are_those_of_the_opcodes() {
        let mut seen = 0;
        for code in Code::values() {
            let op_code = code.op_code();
            let asked = match code.mnemonic() {
                M::Pushf | M::Pushfd | M::Pushfq | M::Popf | M::Popfd | M::Popfq => true,
                M::Enter | M::Leave | M::Call | M::Ret | M::Retf | M::Lgdt | M::Lidt => true,
                M::Iret | M::Iretd | M::Iretq => true,
                M::Jmp => code.is_jmp_far() || code.is_jmp_far_indirect(),
                _ => false,
            };
            if !asked {
                continue;
            }
            seen += 1;
            let mut ins = Instruction::default();
            ins.set_code(code);
            let size = match op_code.operand_size() {
                16 => 2,
                64 => 8,
                _ => 4,
            };
            assert_eq!(opsize(&ins).bytes(), size, "{code:?}");
        }
        assert!(seen > 40, "{seen}");
    }
}
