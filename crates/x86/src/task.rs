//! Hardware task switches (Intel SDM vol. 3, chapter 7): far transfers to a TSS or a task gate,
//! interrupts through a task gate, and IRET from a nested task. Not in long mode.
//!
//! Until the new task's registers are loaded a fault leaves everything as it was. What is wrong with
//! the new task's own segments is found afterwards and is a fault of the new task: the vCPU is in
//! it then, with [`CpuState::rip`] at its first instruction.

use crate::desc::{self, Descriptor, is_null, rpl, selector_code, system, wrap};
use crate::platform::{Access, LinearMem};
use crate::stack::Stack;
use crate::state::{CpuState, Exception, Segment, cr0, flags, sreg};

/// Flags that exist.
const FLAGS: u64 = 0x3f_7fd5;
/// DR7: the local enables, which a switch clears.
const DR7_LOCAL: u64 = 0x155;
/// DR6: a task switch to a TSS with its T bit set.
const DR6_BT: u64 = 1 << 15;

/// What switches the task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cause {
    /// JMP.
    Jump,
    /// CALL.
    Call,
    /// An interrupt or exception through a task gate: the EXT bit and what is pushed.
    Interrupt { ext: u32, error_code: Option<u32> },
    /// IRET with NT set.
    Return,
}

/// Offsets in a TSS (SDM vol. 3, figures 7-2 and 7-10).
struct Layout {
    /// Bytes of a general register.
    size: usize,
    bytes: usize,
    ip: u64,
    flags: u64,
    registers: u64,
    segments: u64,
    /// Segment registers it has: ES, CS, SS, DS and perhaps FS, GS.
    segment_count: usize,
    ldt: u64,
}

const WIDE: Layout = Layout {
    size: 4,
    bytes: 104,
    ip: 0x20,
    flags: 0x24,
    registers: 0x28,
    segments: 0x48,
    segment_count: 6,
    ldt: 0x60,
};
const NARROW: Layout = Layout {
    size: 2,
    bytes: 44,
    ip: 0x0e,
    flags: 0x10,
    registers: 0x12,
    segments: 0x22,
    segment_count: 4,
    ldt: 0x2a,
};

impl Layout {
    const fn of(typ: u8) -> &'static Self {
        if typ & 8 != 0 { &WIDE } else { &NARROW }
    }
}

/// Offset of the page directory's address in a 32-bit TSS.
const CR3: usize = 0x1c;
/// Offset of the T bit in a 32-bit TSS.
const TRAP: usize = 0x64;

/// A TSS that has been read.
struct Image<'a> {
    layout: &'a Layout,
    bytes: [u8; 104],
}

impl Image<'_> {
    fn get(&self, at: u64, size: usize) -> u64 {
        let mut wide = [0; 8];
        let at = at as usize;
        if let Some(bytes) = self.bytes.get(at..at + size) {
            wide[..size].copy_from_slice(bytes);
        }
        u64::from_le_bytes(wide)
    }

    fn selector(&self, at: u64) -> u16 {
        self.get(at, 2) as u16
    }
}

/// Switches to the task of a TSS; `rip` and `rflags` are what the old task goes on with.
///
/// # Errors
/// #GP, #TS, #NP, #PF as the manual lists them (table 7-1).
pub(crate) fn switch(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
    cause: Cause,
    rip: u64,
    rflags: u64,
) -> Result<(), Exception> {
    let ext = if let Cause::Interrupt { ext, .. } = cause { ext } else { 0 };
    let code = selector_code(selector) | ext;
    let returning = cause == Cause::Return;
    let refuse = if returning { Exception::ts(code) } else { Exception::gp(code) };
    if is_null(selector) || selector & 4 != 0 {
        return Err(refuse);
    }
    let mut tss = desc::fetch(cpu, mem, selector, refuse)?;
    let types = if returning {
        [system::TSS_BUSY, system::TSS16_BUSY]
    } else {
        [system::TSS, system::TSS16]
    };
    if !tss.is_system() || !types.contains(&tss.typ()) {
        return Err(refuse);
    }
    if !tss.present() {
        return Err(Exception::np(code));
    }
    let layout = Layout::of(tss.typ());
    if (tss.limit() as usize) < layout.bytes - 1 {
        return Err(Exception::ts(code));
    }
    let mut new = Image { layout, bytes: [0; 104] };
    mem.read(cpu, tss.base(), &mut new.bytes[..layout.bytes], Access::System)?;
    let links = matches!(cause, Cause::Call | Cause::Interrupt { .. });
    if links {
        mem.probe_write(cpu, tss.base(), 2, Access::System)?;
    }
    let kept = if returning { rflags & !flags::NT } else { rflags };
    save(cpu, mem, rip, kept, ext)?;
    // Page faults on the descriptors would have shown when they were read.
    if !links {
        set_busy(cpu, mem, cpu.tr.selector, false)?;
    }
    if links {
        mem.write(cpu, tss.base(), &cpu.tr.selector.to_le_bytes(), Access::System)?;
    }
    if !returning {
        tss.set_type_bits(cpu, mem, 2)?;
    }
    enter(cpu, mem, &tss, &new, links)?;
    load_segments(cpu, mem, &new, ext)?;
    if let Cause::Interrupt { error_code: Some(error), .. } = cause {
        let mut stack = Stack::current(cpu, ext);
        stack.push(cpu, mem, &[u64::from(error)], layout.size)?;
        stack.apply(cpu);
    }
    if layout.size == 4 && new.bytes[TRAP] & 1 != 0 {
        mem.task_trap(Exception::db(DR6_BT));
    }
    Ok(())
}

/// IRET with NT set: back to the task that the link of the current TSS names.
pub(crate) fn go_back(cpu: &mut CpuState, mem: &mut dyn LinearMem) -> Result<(), Exception> {
    let mut link = [0; 2];
    mem.read(cpu, cpu.tr.base, &mut link, Access::System)?;
    let (rip, rflags) = (cpu.rip, cpu.rflags);
    switch(cpu, mem, u16::from_le_bytes(link), Cause::Return, rip, rflags)
}

/// Writes the registers into the current TSS.
fn save(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    rip: u64,
    rflags: u64,
    ext: u32,
) -> Result<(), Exception> {
    let layout = Layout::of(cpu.tr.typ());
    let base = cpu.tr.base;
    let end = layout.segments + (layout.segment_count * layout.size) as u64;
    let code = selector_code(cpu.tr.selector) | ext;
    if !cpu.tr.present() || end > u64::from(cpu.tr.limit) + 1 {
        return Err(Exception::ts(code));
    }
    let at = |offset| wrap(cpu, base.wrapping_add(offset));
    let (first, segments) = (at(layout.ip), layout.segments);
    let mut image = [0; 40];
    let values = [rip, rflags | flags::FIXED].into_iter().chain(cpu.gpr[..8].iter().copied());
    for (field, value) in image.chunks_exact_mut(layout.size).zip(values) {
        field.copy_from_slice(&value.to_le_bytes()[..layout.size]);
    }
    mem.probe_write(cpu, first, (end - layout.ip) as usize, Access::System)?;
    mem.write(cpu, first, &image[..10 * layout.size], Access::System)?;
    for n in 0..layout.segment_count {
        let at = wrap(cpu, base.wrapping_add(segments + (n * layout.size) as u64));
        let selector = cpu.seg[n].selector.to_le_bytes();
        mem.write(cpu, at, &selector, Access::System)?;
    }
    Ok(())
}

/// Sets or clears the busy bit of the descriptor of a TSS.
fn set_busy(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    selector: u16,
    busy: bool,
) -> Result<(), Exception> {
    let at = wrap(cpu, cpu.gdtr.base.wrapping_add(u64::from(selector & !7) + 5));
    let mut byte = [0];
    mem.read(cpu, at, &mut byte, Access::System)?;
    let byte = if busy { byte[0] | 2 } else { byte[0] & !2 };
    mem.write(cpu, at, &[byte], Access::System)
}

/// Loads everything but the segments' descriptors: from here on the vCPU is in the new task.
fn enter(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    tss: &Descriptor,
    new: &Image<'_>,
    nested: bool,
) -> Result<(), Exception> {
    let layout = new.layout;
    let wide = layout.size == 4;
    let cr3 = (wide && cpu.paging()).then(|| new.get(CR3 as u64, 4));
    mem.enter_task(cpu, cr3)?;
    cpu.tr = tss.segment(rpl(tss.selector));
    cpu.cr0 |= cr0::TS;
    cpu.dr7 &= !DR7_LOCAL;
    let nt = if nested { flags::NT } else { 0 };
    let valid = if wide { FLAGS } else { FLAGS & 0xffff };
    cpu.rflags = new.get(layout.flags, layout.size) & valid | flags::FIXED | nt;
    cpu.rip = new.get(layout.ip, layout.size);
    for n in 0..8 {
        let value = new.get(layout.registers + (n * layout.size) as u64, layout.size);
        cpu.gpr[n] = if wide { value } else { value | 0xffff_0000 };
    }
    let selector = |n: usize| new.selector(layout.segments + (n * layout.size) as u64);
    let level = if cpu.virtual_8086() { 3 } else { u16::from(rpl(selector(sreg::CS))) };
    for n in 0..6 {
        let selector = if n < layout.segment_count { selector(n) } else { 0 };
        // Until its descriptor is there, it cannot be used; the CPL is that of CS already.
        cpu.seg[n] = Segment { base: 0, limit: 0, selector, attr: level << 5 };
    }
    cpu.ldtr = Segment { selector: new.selector(layout.ldt), ..Segment::default() };
    Ok(())
}

/// Loads and checks the segments of the task the vCPU is in.
fn load_segments(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    new: &Image<'_>,
    ext: u32,
) -> Result<(), Exception> {
    let ldt = cpu.ldtr.selector;
    let code = |selector: u16| selector_code(selector) | ext;
    if !is_null(ldt) {
        let refuse = Exception::ts(code(ldt));
        if ldt & 4 != 0 {
            return Err(refuse);
        }
        let table = desc::fetch(cpu, mem, ldt, refuse)?;
        if !table.is_system() || table.typ() != system::LDT || !table.present() {
            return Err(refuse);
        }
        cpu.ldtr = table.segment(rpl(ldt));
    }
    if cpu.virtual_8086() {
        for n in 0..6 {
            cpu.seg[n] = Segment::virtual_8086(cpu.seg[n].selector);
        }
    } else {
        for n in [sreg::CS, sreg::SS, sreg::DS, sreg::ES, sreg::FS, sreg::GS] {
            if n < new.layout.segment_count {
                load_segment(cpu, mem, n, ext)?;
            }
        }
    }
    let inside = cpu.rip <= u64::from(cpu.seg[sreg::CS].limit);
    if inside { Ok(()) } else { Err(Exception::gp(ext)) }
}

fn load_segment(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    n: usize,
    ext: u32,
) -> Result<(), Exception> {
    let selector = cpu.seg[n].selector;
    let data = !matches!(n, sreg::CS | sreg::SS);
    if is_null(selector) {
        if data {
            cpu.seg[n].attr = 0;
            return Ok(());
        }
        return Err(Exception::ts(ext));
    }
    let code = selector_code(selector) | ext;
    let refuse = Exception::ts(code);
    let mut found = desc::fetch(cpu, mem, selector, refuse)?;
    let (level, cpl) = (rpl(selector), cpu.cpl());
    let fits = match n {
        sreg::CS if found.is_conforming() => found.is_code() && found.dpl() <= level,
        sreg::CS => found.is_code() && found.dpl() == level,
        sreg::SS => found.is_writable_data() && found.dpl() == cpl && level == cpl,
        _ if found.is_code() && found.is_conforming() => found.is_readable(),
        _ => found.is_readable() && found.dpl() >= cpl && found.dpl() >= level,
    };
    if !fits {
        return Err(refuse);
    }
    if !found.present() {
        return Err(if n == sreg::SS { Exception::ss(code) } else { Exception::np(code) });
    }
    found.set_accessed(cpu, mem)?;
    cpu.seg[n] = found.segment(level);
    Ok(())
}

#[cfg(test)]
#[path = "task_tests.rs"]
mod tests;
