//! Far JMP, CALL and RET, with call gates.

use super::iret::set_stack;
use super::{bad_size, check_target, drop_inner_data, return_code, return_stack, to_64_bit};
use crate::desc::{self, Descriptor, is_null, rpl, selector_code, system};
use crate::event::{inner_stack, null_stack, read_tss_u64};
use crate::platform::{Access, LinearMem};
use crate::size::OpSize;
use crate::stack::Stack;
use crate::state::{CodeSize, CpuState, Exception, sreg};
use crate::task::{self, Cause};

/// Far JMP to `selector:offset`, through a call gate or to another task when the selector names one.
/// [`CpuState::rip`] must be the address of the next instruction.
///
/// # Errors
/// #GP, #NP, #PF as the manual lists them.
pub fn far_jump(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
    offset: u64,
    opsize: OpSize,
) -> Result<(), Exception> {
    let offset = opsize.cut(offset);
    if cpu.real_segments() {
        return jump_real(cpu, selector, offset);
    }
    match target(cpu, mem, selector)? {
        Target::Code(mut code) => {
            check_target(cpu, &code, offset)?;
            enter(cpu, mem, &mut code, offset, cpu.cpl())
        }
        Target::Task(tss) => task::switch(cpu, mem, tss, Cause::Jump, cpu.rip, cpu.rflags),
        Target::Gate(gate) => {
            let mut code = gate_code(cpu, mem, &gate)?;
            let same = if code.is_conforming() {
                code.dpl() <= cpu.cpl()
            } else {
                code.dpl() == cpu.cpl()
            };
            if !same {
                return Err(Exception::gp(code.code()));
            }
            if !code.present() {
                return Err(Exception::np(code.code()));
            }
            let rip = gate_rip(&gate);
            check_target(cpu, &code, rip)?;
            enter(cpu, mem, &mut code, rip, cpu.cpl())
        }
    }
}

/// Far CALL to `selector:offset`; `next_rip` is what is pushed.
///
/// # Errors
/// #GP, #NP, #SS, #TS, #PF as the manual lists them.
pub fn far_call(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
    offset: u64,
    opsize: OpSize,
    next_rip: u64,
) -> Result<(), Exception> {
    let offset = opsize.cut(offset);
    let back = [u64::from(cpu.seg[sreg::CS].selector), next_rip];
    if cpu.real_segments() {
        if offset > u64::from(cpu.seg[sreg::CS].limit) {
            return Err(Exception::gp(0));
        }
        let mut stack = Stack::current(cpu, 0);
        stack.push(cpu, mem, &back, opsize.bytes())?;
        stack.apply(cpu);
        return jump_real(cpu, selector, offset);
    }
    match target(cpu, mem, selector)? {
        Target::Code(mut code) => {
            check_target(cpu, &code, offset)?;
            call_same(cpu, mem, &mut code, offset, &back, opsize.bytes())
        }
        Target::Task(tss) => task::switch(cpu, mem, tss, Cause::Call, next_rip, cpu.rflags),
        Target::Gate(gate) => {
            let mut code = gate_code(cpu, mem, &gate)?;
            if code.dpl() > cpu.cpl() {
                return Err(Exception::gp(code.code()));
            }
            if !code.present() {
                return Err(Exception::np(code.code()));
            }
            if !code.is_conforming() && code.dpl() < cpu.cpl() {
                return call_inner(cpu, mem, &gate, &mut code, &back);
            }
            let rip = gate_rip(&gate);
            check_target(cpu, &code, rip)?;
            call_same(cpu, mem, &mut code, rip, &back, gate_size(cpu, &gate))
        }
    }
}

/// Far RET that also releases `pop_bytes` of parameters.
///
/// # Errors
/// #GP, #NP, #SS, #PF as the manual lists them.
pub fn far_ret(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    opsize: OpSize,
    pop_bytes: u16,
) -> Result<(), Exception> {
    let mut stack = Stack::current(cpu, 0);
    let [rip, selector] = stack.pop(cpu, mem, opsize.bytes())?;
    if cpu.real_segments() {
        if rip > u64::from(cpu.seg[sreg::CS].limit) {
            return Err(Exception::gp(0));
        }
        stack.skip(u64::from(pop_bytes));
        stack.apply(cpu);
        return jump_real(cpu, selector as u16, rip);
    }
    let code = return_code(cpu, mem, selector as u16)?;
    let level = rpl(selector as u16);
    stack.skip(u64::from(pop_bytes));
    if level == cpu.cpl() {
        check_target(cpu, &code, rip)?;
        stack.apply(cpu);
        cpu.seg[sreg::CS] = code.segment(level);
        cpu.rip = rip;
        return Ok(());
    }
    let [rsp, ss] = stack.pop(cpu, mem, opsize.bytes())?;
    let ss = return_stack(cpu, mem, ss as u16, &code)?;
    check_target(cpu, &code, rip)?;
    set_stack(cpu, rsp, ss, to_64_bit(cpu, &code));
    cpu.seg[sreg::CS] = code.segment(level);
    cpu.rip = rip;
    let mut outer = Stack::current(cpu, 0);
    outer.skip(u64::from(pop_bytes));
    outer.apply(cpu);
    drop_inner_data(cpu);
    Ok(())
}

fn jump_real(cpu: &mut CpuState, selector: u16, offset: u64) -> Result<(), Exception> {
    let cs = &mut cpu.seg[sreg::CS];
    if offset > u64::from(cs.limit) {
        return Err(Exception::gp(0));
    }
    cs.selector = selector;
    cs.base = u64::from(selector) << 4;
    cpu.rip = offset;
    Ok(())
}

/// What a selector of a far JMP or CALL names.
enum Target {
    /// A present code segment that may be entered directly.
    Code(Descriptor),
    /// A present call gate that may be used.
    Gate(Descriptor),
    /// A TSS, or one that a task gate names.
    Task(u16),
}

fn target(cpu: &mut CpuState, mem: &mut dyn LinearMem, selector: u16) -> Result<Target, Exception> {
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let refuse = Exception::gp(selector_code(selector));
    let mut found = desc::fetch(cpu, mem, selector, refuse)?;
    let cpl = cpu.cpl();
    if found.is_code() {
        let allowed = if found.is_conforming() {
            found.dpl() <= cpl
        } else {
            rpl(selector) <= cpl && found.dpl() == cpl
        };
        if !allowed || bad_size(cpu, &found) {
            return Err(refuse);
        }
        if !found.present() {
            return Err(Exception::np(found.code()));
        }
        return Ok(Target::Code(found));
    }
    let task = [system::TSS, system::TSS16, system::TASK_GATE].contains(&found.typ());
    if found.is_system() && task && !cpu.long_mode() {
        if found.dpl() < cpl || found.dpl() < rpl(selector) {
            return Err(refuse);
        }
        if found.typ() != system::TASK_GATE {
            return Ok(Target::Task(selector));
        }
        if !found.present() {
            return Err(Exception::np(found.code()));
        }
        return Ok(Target::Task(found.gate_selector()));
    }
    let gate = found.is_system()
        && (found.typ() == system::CALL || (found.typ() == system::CALL16 && !cpu.long_mode()));
    if !gate || found.dpl() < cpl || found.dpl() < rpl(selector) {
        return Err(refuse);
    }
    if !found.present() {
        return Err(Exception::np(found.code()));
    }
    if !desc::complete(cpu, mem, &mut found)? {
        return Err(refuse);
    }
    Ok(Target::Gate(found))
}

/// Reads the code segment of a call gate; its DPL and presence are still to be checked.
fn gate_code(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    gate: &Descriptor,
) -> Result<Descriptor, Exception> {
    let selector = gate.gate_selector();
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let refuse = Exception::gp(selector_code(selector));
    let code = desc::fetch(cpu, mem, selector, refuse)?;
    let wrong_size = cpu.long_mode() && (!code.is_long() || code.is_big());
    if !code.is_code() || wrong_size { Err(refuse) } else { Ok(code) }
}

const fn gate_rip(gate: &Descriptor) -> u64 {
    let offset = gate.gate_offset();
    if gate.typ() == system::CALL16 { offset & 0xffff } else { offset }
}

const fn gate_size(cpu: &CpuState, gate: &Descriptor) -> usize {
    if cpu.long_mode() {
        8
    } else if gate.typ() == system::CALL16 {
        2
    } else {
        4
    }
}

/// Loads CS:RIP with the given CPL as RPL.
fn enter(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    code: &mut Descriptor,
    rip: u64,
    cpl: u8,
) -> Result<(), Exception> {
    code.set_accessed(cpu, mem)?;
    cpu.seg[sreg::CS] = code.segment(cpl);
    cpu.rip = rip;
    Ok(())
}

fn call_same(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    code: &mut Descriptor,
    rip: u64,
    back: &[u64; 2],
    size: usize,
) -> Result<(), Exception> {
    code.set_accessed(cpu, mem)?;
    let mut stack = Stack::current(cpu, 0);
    stack.push(cpu, mem, back, size)?;
    stack.apply(cpu);
    enter(cpu, mem, code, rip, cpu.cpl())
}

/// A call through a gate to an inner level: stack from the TSS, parameters copied.
fn call_inner(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    gate: &Descriptor,
    code: &mut Descriptor,
    back: &[u64; 2],
) -> Result<(), Exception> {
    let cpl = code.dpl();
    let rip = gate_rip(gate);
    let size = gate_size(cpu, gate);
    let (ss, mut stack) = if cpu.long_mode() {
        let rsp = read_tss_u64(cpu, mem, 4 + u64::from(cpl) * 8, 0)?;
        (null_stack(cpl), Stack::flat(rsp, Access::System, 0))
    } else {
        let (ss, sp) = inner_stack(cpu, mem, cpl, 0)?;
        (ss, Stack::inner(ss, sp, selector_code(ss.selector)))
    };
    check_target(cpu, code, rip)?;
    code.set_accessed(cpu, mem)?;

    let count = if cpu.long_mode() { 0 } else { (gate.raw >> 32 & 0x1f) as usize };
    let mut slots = [0; 35];
    slots[0] = u64::from(cpu.seg[sreg::SS].selector);
    slots[1] = match cpu.code_size() {
        CodeSize::Bits64 => cpu.gpr[crate::state::reg::RSP],
        _ => cpu.gpr[crate::state::reg::RSP] & 0xffff_ffff,
    };
    let mut old = Stack::current(cpu, 0);
    let parameters = &mut slots[2..2 + count];
    old.pop_into(cpu, mem, parameters, size)?;
    // The first popped is the last pushed.
    parameters.reverse();
    slots[2 + count..4 + count].copy_from_slice(back);
    stack.push(cpu, mem, &slots[..4 + count], size)?;

    cpu.seg[sreg::SS] = ss;
    stack.apply(cpu);
    cpu.seg[sreg::CS] = code.segment(cpl);
    cpu.rip = rip;
    Ok(())
}
