//! Loads of segment registers, LDTR and TR, and the queries VERR, VERW, LAR and LSL.

use crate::desc::{self, Descriptor, is_null, rpl, selector_code, system};
use crate::paging::canonical;
use crate::platform::LinearMem;
use crate::state::{CodeSize, CpuState, Exception, Segment, sreg};

/// Loads ES, SS, DS, FS or GS by MOV, POP or LDS and the like. The interrupt shadow of SS is the
/// caller's.
///
/// # Errors
/// #GP, #SS, #NP with the selector; #UD for CS.
pub fn load_segment(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    register: usize,
    selector: u16,
) -> Result<(), Exception> {
    if register == sreg::CS || register > sreg::GS {
        return Err(Exception::ud());
    }
    if cpu.real_segments() {
        let segment = &mut cpu.seg[register];
        segment.selector = selector;
        segment.base = u64::from(selector) << 4;
        return Ok(());
    }
    let loaded = if register == sreg::SS {
        stack_segment(cpu, mem, selector)?
    } else {
        data_segment(cpu, mem, selector)?
    };
    cpu.seg[register] = loaded;
    Ok(())
}

fn stack_segment(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
) -> Result<Segment, Exception> {
    let cpl = cpu.cpl();
    if is_null(selector) {
        if cpu.code_size() == CodeSize::Bits64 && cpl != 3 && rpl(selector) == cpl {
            return Ok(Segment { base: 0, limit: 0, selector, attr: u16::from(cpl) << 5 });
        }
        return Err(Exception::gp(0));
    }
    let refuse = Exception::gp(selector_code(selector));
    let mut stack = desc::fetch(cpu, mem, selector, refuse)?;
    if rpl(selector) != cpl || stack.dpl() != cpl || !stack.is_writable_data() {
        return Err(refuse);
    }
    if !stack.present() {
        return Err(Exception::ss(stack.code()));
    }
    stack.set_accessed(cpu, mem)?;
    Ok(stack.segment(cpl))
}

fn data_segment(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
) -> Result<Segment, Exception> {
    if is_null(selector) {
        return Ok(Segment { base: 0, limit: 0, selector, attr: 0 });
    }
    let refuse = Exception::gp(selector_code(selector));
    let mut data = desc::fetch(cpu, mem, selector, refuse)?;
    if !data.is_readable() || !reachable(cpu, &data) {
        return Err(refuse);
    }
    if !data.present() {
        return Err(Exception::np(data.code()));
    }
    data.set_accessed(cpu, mem)?;
    Ok(data.segment(rpl(selector)))
}

/// Whether CPL and RPL allow a code or data descriptor as data; conforming code is open to all.
const fn reachable(cpu: &CpuState, descriptor: &Descriptor) -> bool {
    let conforming = descriptor.is_code() && descriptor.is_conforming();
    conforming || (descriptor.dpl() >= cpu.cpl() && descriptor.dpl() >= rpl(descriptor.selector))
}

/// LLDT.
///
/// # Errors
/// #UD in real and virtual-8086 mode; #GP(0) when CPL is not 0; #GP or #NP with the selector.
pub fn lldt(cpu: &mut CpuState, mem: &mut dyn LinearMem, selector: u16) -> Result<(), Exception> {
    privileged(cpu)?;
    if is_null(selector) {
        cpu.ldtr = Segment { selector, ..Segment::default() };
        return Ok(());
    }
    let descriptor = system_descriptor(cpu, mem, selector, &[system::LDT])?;
    cpu.ldtr = descriptor.segment(rpl(selector));
    Ok(())
}

/// LTR; marks the TSS busy.
///
/// # Errors
/// #UD in real and virtual-8086 mode; #GP(0) when CPL is not 0 or the selector is null; #GP or #NP with the
/// selector.
pub fn ltr(cpu: &mut CpuState, mem: &mut dyn LinearMem, selector: u16) -> Result<(), Exception> {
    privileged(cpu)?;
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let types: &[u8] = if cpu.long_mode() { &[system::TSS] } else { &[system::TSS16, system::TSS] };
    let mut descriptor = system_descriptor(cpu, mem, selector, types)?;
    descriptor.set_type_bits(cpu, mem, 2)?;
    cpu.tr = descriptor.segment(rpl(selector));
    Ok(())
}

fn privileged(cpu: &CpuState) -> Result<(), Exception> {
    if cpu.real_segments() {
        return Err(Exception::ud());
    }
    if cpu.cpl() != 0 {
        return Err(Exception::gp(0));
    }
    Ok(())
}

/// Reads a present system descriptor of the GDT with one of these types.
fn system_descriptor(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
    types: &[u8],
) -> Result<Descriptor, Exception> {
    let refuse = Exception::gp(selector_code(selector));
    if selector & 4 != 0 {
        return Err(refuse);
    }
    let mut descriptor = desc::fetch(cpu, mem, selector, refuse)?;
    if !descriptor.is_system() || !types.contains(&descriptor.typ()) {
        return Err(refuse);
    }
    if !descriptor.present() {
        return Err(Exception::np(descriptor.code()));
    }
    if !desc::complete(cpu, mem, &mut descriptor)? || !canonical(descriptor.base()) {
        return Err(refuse);
    }
    Ok(descriptor)
}

/// VERR: whether the segment can be read at the current level (what ZF becomes).
///
/// # Errors
/// #UD in real and virtual-8086 mode; faults of reading the descriptor table.
pub fn verr(cpu: &mut CpuState, mem: &mut dyn LinearMem, selector: u16) -> Result<bool, Exception> {
    let found = query(cpu, mem, selector)?;
    Ok(found.is_some_and(|d| d.is_readable() && reachable(cpu, &d)))
}

/// VERW: whether the segment can be written at the current level (what ZF becomes).
///
/// # Errors
/// #UD in real and virtual-8086 mode; faults of reading the descriptor table.
pub fn verw(cpu: &mut CpuState, mem: &mut dyn LinearMem, selector: u16) -> Result<bool, Exception> {
    let found = query(cpu, mem, selector)?;
    Ok(found.is_some_and(|d| d.is_writable_data() && reachable(cpu, &d)))
}

/// LAR: the access rights (cut to 16 bits by the caller for a 16-bit operand), or `None` for ZF = 0.
///
/// # Errors
/// #UD in real and virtual-8086 mode; faults of reading the descriptor table.
pub fn lar(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
) -> Result<Option<u32>, Exception> {
    let long = cpu.long_mode();
    let valid = |typ| match typ {
        system::LDT | system::TSS | system::TSS_BUSY | system::CALL => true,
        system::TSS16 | system::TSS16_BUSY | system::CALL16 | system::TASK_GATE => !long,
        _ => false,
    };
    let found = query(cpu, mem, selector)?.filter(|d| visible(cpu, d, valid));
    Ok(found.map(|d| (d.raw >> 32) as u32 & 0x00f0_ff00))
}

/// LSL: the limit in bytes, or `None` for ZF = 0.
///
/// # Errors
/// #UD in real and virtual-8086 mode; faults of reading the descriptor table.
pub fn lsl(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
) -> Result<Option<u32>, Exception> {
    let long = cpu.long_mode();
    let valid = |typ| match typ {
        system::LDT | system::TSS | system::TSS_BUSY => true,
        system::TSS16 | system::TSS16_BUSY => !long,
        _ => false,
    };
    let found = query(cpu, mem, selector)?.filter(|d| visible(cpu, d, valid));
    Ok(found.map(|d| d.limit()))
}

fn query(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
) -> Result<Option<Descriptor>, Exception> {
    if cpu.real_segments() {
        return Err(Exception::ud());
    }
    if is_null(selector) {
        return Ok(None);
    }
    let Some(mut descriptor) = desc::lookup(cpu, mem, selector)? else { return Ok(None) };
    if descriptor.is_system() && !desc::complete(cpu, mem, &mut descriptor)? {
        return Ok(None);
    }
    Ok(Some(descriptor))
}

fn visible(cpu: &CpuState, descriptor: &Descriptor, valid: impl Fn(u8) -> bool) -> bool {
    (!descriptor.is_system() || valid(descriptor.typ())) && reachable(cpu, descriptor)
}
