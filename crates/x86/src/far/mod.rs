//! Segment loading and far control transfers (Intel SDM vol. 3, chapter 5; vol. 2, the pages of MOV,
//! LDS, JMP, CALL, RET and IRET).
//!
//! Every function leaves the vCPU as it was when it fails: all reads and checks come first, memory is
//! written in one piece, registers last. (The accessed bit of a descriptor that was looked at may be
//! set, as on a processor.)
//!
//! A transfer that switches the task ([`crate::task`]) has failed when it gives an error, but may be in
//! the new task then.

mod iret;
mod segment;
mod transfer;

pub use iret::iret;
pub use segment::{lar, lldt, load_segment, lsl, ltr, verr, verw};
pub use transfer::{far_call, far_jump, far_ret};

use crate::desc::{self, Descriptor, is_null, rpl};
use crate::paging::canonical;
use crate::platform::LinearMem;
use crate::state::{CpuState, Exception, Segment, sreg};

/// Reads and checks the code segment a RET or IRET goes back to; no target address check.
fn return_code(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
) -> Result<Descriptor, Exception> {
    if is_null(selector) {
        return Err(Exception::gp(0));
    }
    let refuse = Exception::gp(desc::selector_code(selector));
    let mut code = desc::fetch(cpu, mem, selector, refuse)?;
    let level = rpl(selector);
    let dpl_fits = if code.is_conforming() { code.dpl() <= level } else { code.dpl() == level };
    if !code.is_code() || level < cpu.cpl() || !dpl_fits || bad_size(cpu, &code) {
        return Err(refuse);
    }
    if !code.present() {
        return Err(Exception::np(code.code()));
    }
    code.set_accessed(cpu, mem)?;
    Ok(code)
}

/// Whether a code descriptor has L and D set together in long mode.
const fn bad_size(cpu: &CpuState, code: &Descriptor) -> bool {
    cpu.long_mode() && code.is_long() && code.is_big()
}

/// Reads and checks the stack segment a RET or IRET goes back to with code segment `code` at
/// level `level`.
fn return_stack(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
    to: &Descriptor,
) -> Result<Segment, Exception> {
    let level = rpl(to.selector);
    let refuse = Exception::gp(desc::selector_code(selector));
    if is_null(selector) {
        let allowed = to_64_bit(cpu, to) && level != 3 && rpl(selector) == level;
        let null = Segment { base: 0, limit: 0, selector, attr: u16::from(level) << 5 };
        return if allowed { Ok(null) } else { Err(Exception::gp(0)) };
    }
    let mut stack = desc::fetch(cpu, mem, selector, refuse)?;
    if rpl(selector) != level || stack.dpl() != level || !stack.is_writable_data() {
        return Err(refuse);
    }
    if !stack.present() {
        return Err(Exception::ss(stack.code()));
    }
    stack.set_accessed(cpu, mem)?;
    Ok(stack.segment(level))
}

/// Whether a code segment is 64-bit.
const fn to_64_bit(cpu: &CpuState, code: &Descriptor) -> bool {
    cpu.long_mode() && code.is_long()
}

/// Checks a target address in its code segment: limit, or canonical in 64-bit mode.
const fn check_target(cpu: &CpuState, code: &Descriptor, rip: u64) -> Result<(), Exception> {
    let inside = if to_64_bit(cpu, code) { canonical(rip) } else { rip <= code.limit() as u64 };
    if inside { Ok(()) } else { Err(Exception::gp(0)) }
}

/// After a return to an outer level: data segments that level may not use become unusable. The
/// bases stay, as FS and GS with a null selector keep theirs.
fn drop_inner_data(cpu: &mut CpuState) {
    let cpl = cpu.cpl();
    for index in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
        let segment = &mut cpu.seg[index];
        let conforming_code = segment.typ() & 0b1100 == 0b1100;
        if segment.present() && segment.dpl() < cpl && !conforming_code {
            segment.selector = 0;
            segment.attr &= !Segment::P;
        }
    }
}

#[cfg(test)]
mod tests;
