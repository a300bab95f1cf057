//! Stack instructions, near transfers outside 64-bit mode, far transfers, software interrupts.

use berth_x86::state::{flags, reg, sreg};
use berth_x86::{Exception, far, flags as rules, paging};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::{Done, Flow, opsize};
use crate::exec::operand::mask;
use crate::translate::sreg_index;
use crate::vcpu::{Inner, wrap};

/// Width of what a stack instruction moves.
fn width(ins: &Instruction) -> usize {
    let n = ins.stack_pointer_increment().unsigned_abs() as usize;
    match ins.mnemonic() {
        Mnemonic::Push | Mnemonic::Pop => n,
        _ => opsize(ins).bytes(),
    }
}

#[allow(clippy::too_many_lines, reason = "one match over the mnemonics")]
pub(super) fn execute(v: &mut Inner, ins: &Instruction, next: u64) -> Done {
    use Mnemonic as M;
    match ins.mnemonic() {
        M::Push => {
            let value = v.get(ins, 0)?;
            v.push(value, width(ins))?;
        }
        M::Pop => return pop(v, ins, next),
        M::Pusha | M::Pushad => {
            let n = if ins.mnemonic() == M::Pusha { 2 } else { 4 };
            let sp = v.area.state.gpr[reg::RSP];
            for i in 0..8 {
                let value = v.area.state.gpr[i];
                let value = if i == reg::RSP { sp } else { value };
                if let Err(e) = v.push(value & mask(n), n) {
                    v.area.state.gpr[reg::RSP] = sp;
                    return Err(e);
                }
            }
        }
        M::Popa | M::Popad => {
            let n = if ins.mnemonic() == M::Popa { 2 } else { 4 };
            let mut values = [0u64; 8];
            let sp = v.area.state.gpr[reg::RSP];
            let mut fault = None;
            let mut first = 0;
            for i in (0..8).rev() {
                match v.pop(n) {
                    Ok(x) => values[i] = x,
                    Err(e) => {
                        v.area.state.gpr[reg::RSP] = sp;
                        fault = Some(e);
                        first = i + 1;
                        break;
                    }
                }
            }
            // As the processors do: what was popped before a fault has been loaded.
            for (i, x) in values.iter().enumerate().skip(first) {
                if i != reg::RSP {
                    let g = &mut v.area.state.gpr[i];
                    *g = if n == 2 { *g & !0xffff | x } else { *x };
                }
            }
            if let Some(e) = fault {
                return Err(e);
            }
        }
        M::Pushf | M::Pushfd | M::Pushfq => {
            rules::sensitive(&v.area.state)?;
            let size = opsize(ins);
            let image = rules::pushf_image(&v.area.state, size);
            v.push(image, size.bytes())?;
        }
        M::Popf | M::Popfd | M::Popfq => {
            rules::sensitive(&v.area.state)?;
            let size = opsize(ins);
            let image = v.pop(size.bytes())?;
            v.area.state.rflags = rules::merge_flags(&v.area.state, image, size);
        }
        M::Enter => enter(v, ins)?,
        M::Leave => {
            let w = v.stack_width();
            let size = opsize(ins).bytes();
            let frame = v.area.state.gpr[reg::RBP] & mask(w);
            let value = v.read_uint(sreg::SS as u8, frame, size)?;
            v.set_sp(frame.wrapping_add(size as u64));
            let bp = &mut v.area.state.gpr[reg::RBP];
            *bp = if size == 2 { *bp & !0xffff | value } else { value };
        }
        M::Call if ins.is_call_near() || ins.is_call_near_indirect() => {
            let size = opsize(ins).bytes();
            let target = if ins.is_call_near() { ins.near_branch_target() } else { v.get(ins, 0)? };
            let target = target & mask(size);
            near_target(v, target)?;
            v.push(next & mask(size), size)?;
            v.area.state.rip = target;
            return Ok(Flow::Jump);
        }
        M::Jmp if ins.is_jmp_near_indirect() => {
            let target = v.get(ins, 0)?;
            near_target(v, target)?;
            v.area.state.rip = target;
            return Ok(Flow::Jump);
        }
        M::Ret => {
            let size = opsize(ins).bytes();
            let sp = v.area.state.gpr[reg::RSP];
            let target = v.pop(size)?;
            if let Err(e) = near_target(v, target) {
                v.area.state.gpr[reg::RSP] = sp;
                return Err(e);
            }
            let extra = if ins.op_count() > 0 { u64::from(ins.immediate16()) } else { 0 };
            let sp = v.sp();
            v.set_sp(sp.wrapping_add(extra));
            v.area.state.rip = target;
            return Ok(Flow::Jump);
        }
        M::Jmp => {
            let (sel, off, size) = v.far_operand(ins)?;
            v.area.state.rip = next;
            far::far_jump(&mut v.area.state, &mut v.lin, sel, off, size)?;
            return Ok(Flow::Jump);
        }
        M::Call => {
            let (sel, off, size) = v.far_operand(ins)?;
            far::far_call(&mut v.area.state, &mut v.lin, sel, off, size, next)?;
            return Ok(Flow::Jump);
        }
        M::Retf => {
            let extra = if ins.op_count() > 0 { ins.immediate16() } else { 0 };
            far::far_ret(&mut v.area.state, &mut v.lin, opsize(ins), extra)?;
            return Ok(Flow::Jump);
        }
        M::Iret | M::Iretd | M::Iretq => {
            v.area.state.rip = next;
            far::iret(&mut v.area.state, &mut v.lin, opsize(ins))?;
            return Ok(Flow::Jump);
        }
        M::Int => {
            rules::sensitive(&v.area.state)?;
            return v.software_interrupt(ins.immediate8(), next);
        }
        M::Int3 => return v.software_interrupt(3, next),
        M::Into => {
            if v.area.state.rflags & flags::OF != 0 {
                return v.software_interrupt(4, next);
            }
            // The class ends the block.
            v.area.state.rip = next;
            return Ok(Flow::Jump);
        }
        // INT1: a trap, not subject to the gate's DPL.
        _ => {
            v.area.state.rip = next;
            v.trap(Exception::db(0));
            return Ok(Flow::Jump);
        }
    }
    Ok(Flow::Next)
}

/// A near transfer's target has to lie in the code segment.
fn near_target(v: &Inner, target: u64) -> Result<(), Exception> {
    let s = &v.area.state;
    let ok = if s.code_size() == berth_x86::state::CodeSize::Bits64 {
        paging::canonical(target)
    } else {
        target <= u64::from(s.seg[sreg::CS].limit)
    };
    if ok { Ok(()) } else { Err(Exception::gp(0)) }
}

fn pop(v: &mut Inner, ins: &Instruction, next: u64) -> Done {
    let size = width(ins);
    let sp = v.area.state.gpr[reg::RSP];
    let value = v.pop(size)?;
    if ins.op0_kind() == OpKind::Register && ins.op0_register().is_segment_register() {
        let n = usize::from(sreg_index(ins.op0_register()));
        if let Err(e) = far::load_segment(&mut v.area.state, &mut v.lin, n, value as u16) {
            v.area.state.gpr[reg::RSP] = sp;
            return Err(e);
        }
        if n == sreg::SS {
            v.shadow(2, next);
        }
        return Ok(Flow::Next);
    }
    // A memory operand with RSP as base sees the RSP after the pop.
    if let Err(e) = v.set(ins, 0, value) {
        v.area.state.gpr[reg::RSP] = sp;
        return Err(e);
    }
    Ok(Flow::Next)
}

/// ENTER (SDM vol. 2).
fn enter(v: &mut Inner, ins: &Instruction) -> Result<(), Exception> {
    let size = opsize(ins).bytes();
    let alloc = u64::from(ins.immediate16());
    let level = ins.immediate8_2nd() & 31;
    let w = v.stack_width();
    let (sp, bp) = (v.area.state.gpr[reg::RSP], v.area.state.gpr[reg::RBP]);
    let result = (|| {
        v.push(bp & mask(size), size)?;
        let frame = v.sp();
        if level > 0 {
            let mut from = bp & mask(w);
            for _ in 1..level {
                from = from.wrapping_sub(size as u64) & mask(w);
                let x = v.read_uint(sreg::SS as u8, from, size)?;
                v.push(x, size)?;
            }
            v.push(frame & mask(size), size)?;
        }
        let new = v.sp().wrapping_sub(alloc) & mask(w);
        // The new top must be writable, and aligned when that is checked.
        let va = v.linear(sreg::SS as u8, new, size, true)?;
        v.check_aligned(sreg::SS as u8, va, size)?;
        let s = &v.area.state;
        let rights = paging::Rights::explicit(s, paging::Kind::Write);
        v.lin.resolve(s, va, size, rights, true)?;
        v.set_sp(new);
        Ok(frame)
    })();
    match result {
        Ok(frame) => {
            let b = &mut v.area.state.gpr[reg::RBP];
            *b = match size {
                2 => *b & !0xffff | frame & 0xffff,
                4 => wrap(frame, 32),
                _ => frame,
            };
            Ok(())
        }
        Err(e) => {
            v.area.state.gpr[reg::RSP] = sp;
            Err(e)
        }
    }
}
