//! IRET in all its forms.

use super::{check_target, drop_inner_data, return_code, return_stack, to_64_bit};
use crate::desc::rpl;
use crate::flags::{iret_flags, sensitive};
use crate::platform::LinearMem;
use crate::size::OpSize;
use crate::stack::Stack;
use crate::state::{CodeSize, CpuState, Exception, Segment, flags, reg, sreg};
use crate::task;

/// IRET, IRETD or IRETQ. [`CpuState::rip`] must be the address of the next instruction, which is what
/// a task that ends so goes on with when it is called again.
///
/// NMIs are unmasked even when the instruction then faults (SDM vol. 3, 6.7.1 and 28.2.3). Everything
/// else stays as it was on a fault.
///
/// # Errors
/// #GP, #SS, #NP, #TS, #PF as the manual lists them.
pub fn iret(cpu: &mut CpuState, mem: &mut dyn LinearMem, opsize: OpSize) -> Result<(), Exception> {
    cpu.nmi_masked = 0;
    if cpu.real_segments() {
        sensitive(cpu)?;
        return real(cpu, mem, opsize);
    }
    if cpu.rflags & flags::NT != 0 {
        return if cpu.long_mode() { Err(Exception::gp(0)) } else { task::go_back(cpu, mem) };
    }
    protected(cpu, mem, opsize)
}

fn real(cpu: &mut CpuState, mem: &mut dyn LinearMem, opsize: OpSize) -> Result<(), Exception> {
    let mut stack = Stack::current(cpu, 0);
    let [rip, selector, image] = stack.pop(cpu, mem, opsize.bytes())?;
    if rip > u64::from(cpu.seg[sreg::CS].limit) {
        return Err(Exception::gp(0));
    }
    stack.apply(cpu);
    cpu.rip = rip;
    let cs = &mut cpu.seg[sreg::CS];
    cs.selector = selector as u16;
    cs.base = (selector & 0xffff) << 4;
    cpu.rflags = iret_flags(cpu, image, opsize);
    Ok(())
}

fn protected(cpu: &mut CpuState, mem: &mut dyn LinearMem, opsize: OpSize) -> Result<(), Exception> {
    let from_64_bit = cpu.code_size() == CodeSize::Bits64;
    let mut stack = Stack::current(cpu, 0);
    let [rip, selector, image] = stack.pop(cpu, mem, opsize.bytes())?;
    let wide = opsize != OpSize::Bits16;
    if !cpu.long_mode() && wide && image & flags::VM != 0 && cpu.cpl() == 0 {
        return to_virtual_8086(cpu, mem, rip, selector, image);
    }
    let code = return_code(cpu, mem, selector as u16)?;
    let level = rpl(selector as u16);
    let outer = level > cpu.cpl();
    // 64-bit mode pops SS:RSP whatever the levels.
    let new_stack = if outer || from_64_bit {
        let [rsp, ss] = stack.pop(cpu, mem, opsize.bytes())?;
        Some((rsp, return_stack(cpu, mem, ss as u16, &code)?))
    } else {
        None
    };
    check_target(cpu, &code, rip)?;

    let rflags = iret_flags(cpu, image, opsize);
    match new_stack {
        Some((rsp, ss)) => set_stack(cpu, rsp, ss, to_64_bit(cpu, &code)),
        None => stack.apply(cpu),
    }
    cpu.seg[sreg::CS] = code.segment(level);
    cpu.rip = rip;
    cpu.rflags = rflags;
    if outer {
        drop_inner_data(cpu);
    }
    Ok(())
}

/// The end of an IRETD to virtual-8086 mode, whose frame has the stack and the data segments, too
/// (SDM vol. 2, IRET, RETURN-TO-VIRTUAL-8086-MODE).
fn to_virtual_8086(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    rip: u64,
    cs: u64,
    image: u64,
) -> Result<(), Exception> {
    let mut stack = Stack::current(cpu, 0);
    let [_, _, _, esp, ss, es, ds, fs, gs] = stack.pop(cpu, mem, 4)?;
    if rip > 0xffff {
        return Err(Exception::gp(0));
    }
    let rflags = iret_flags(cpu, image, OpSize::Bits32) | flags::VM;
    for (register, selector) in [
        (sreg::ES, es),
        (sreg::CS, cs),
        (sreg::SS, ss),
        (sreg::DS, ds),
        (sreg::FS, fs),
        (sreg::GS, gs),
    ] {
        cpu.seg[register] = Segment::virtual_8086(selector as u16);
    }
    cpu.gpr[reg::RSP] = esp;
    cpu.rip = rip;
    cpu.rflags = rflags;
    Ok(())
}

/// Loads SS and as much of RSP as the new stack has.
pub(super) fn set_stack(cpu: &mut CpuState, rsp: u64, ss: Segment, to_64_bit: bool) {
    let old = cpu.gpr[reg::RSP];
    cpu.gpr[reg::RSP] = if to_64_bit {
        rsp
    } else if ss.attr & Segment::DB != 0 {
        rsp & 0xffff_ffff
    } else {
        old & !0xffff | rsp & 0xffff
    };
    cpu.seg[sreg::SS] = ss;
}
