//! Delivery of exceptions and interrupts (Intel SDM vol. 3, chapter 6; vol. 2, INT n).
//!
//! [`deliver`] pushes the frame and loads CS:RIP; [`deliver_with_escalation`] adds the double-fault
//! rules. [`CpuState::rip`] must be what is to be saved: the faulting instruction for faults, the next
//! one for traps and interrupts; for [`Event::SoftInt`] it is the INT instruction itself, which is
//! what a fault during delivery saves.
//!
//! When [`deliver`] fails, nothing of the delivery has happened: memory is written last, registers
//! after it. CR2 and DR6 belong to the raising of the exception and stay updated; the accessed bit of a
//! descriptor that was looked at may be set.
//!
//! A task gate switches the task ([`crate::task`]): a fault of the new one is an error of the delivery,
//! with the vCPU in the new task.

use crate::desc::{self, is_null, rpl, selector_code, system, wrap};
use crate::paging::canonical;
use crate::platform::{Access, LinearMem};
use crate::stack::Stack;
use crate::state::{CpuState, Exception, Segment, flags, reg, sreg, vector};
use crate::task::{self, Cause};

/// DR6 bits that always read as one.
pub(crate) const DR6_FIXED: u64 = 0xffff_0ff0;
const DR6_BD: u64 = 1 << 13;
const DR7_GD: u64 = 1 << 13;

/// What is to be delivered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A processor exception.
    Exception(Exception),
    /// An external interrupt with this vector.
    Interrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// INT n, INT3 or INTO: the gate's DPL is checked, and `next_rip` is saved.
    SoftInt {
        /// The vector.
        vector: u8,
        /// The address of the next instruction.
        next_rip: u64,
    },
}

/// A fault during the delivery of a double fault: the processor shuts down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("triple fault")]
pub struct TripleFault;

/// Delivers one event.
///
/// # Errors
/// The exception the delivery raises, with EXT set in its error code unless the event was a
/// software interrupt.
pub fn deliver(cpu: &mut CpuState, mem: &mut dyn LinearMem, event: Event) -> Result<(), Exception> {
    let frame = Frame::of(cpu, event);
    raise(cpu, event);
    if !cpu.protected() {
        deliver_real(cpu, mem, &frame)?;
    } else if cpu.long_mode() {
        deliver_long(cpu, mem, &frame)?;
    } else {
        deliver_legacy(cpu, mem, &frame)?;
    }
    cpu.halted = 0;
    cpu.interrupt_shadow = 0;
    if event == Event::Nmi {
        cpu.nmi_masked = 1;
    }
    if matches!(event, Event::Exception(Exception { vector: vector::DB, .. })) {
        cpu.dr7 &= !DR7_GD;
    }
    Ok(())
}

/// Delivers an event, and what its delivery raises, by the rules for double faults (Intel SDM vol. 3,
/// table 6-5).
///
/// # Errors
/// [`TripleFault`] when a double fault cannot be delivered.
pub fn deliver_with_escalation(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    event: Event,
) -> Result<(), TripleFault> {
    let mut event = event;
    loop {
        let Err(second) = deliver(cpu, mem, event) else { return Ok(()) };
        let first = match event {
            Event::Exception(exception) => Class::of(exception.vector),
            _ => Class::Benign,
        };
        event = match (first, Class::of(second.vector)) {
            (Class::DoubleFault, Class::Contributory | Class::PageFault) => {
                return Err(TripleFault);
            }
            (Class::Contributory, Class::Contributory)
            | (Class::PageFault, Class::Contributory | Class::PageFault) => {
                if let Some(address) = second.cr2 {
                    cpu.cr2 = address;
                }
                Event::Exception(Exception {
                    vector: vector::DF,
                    error_code: Some(0),
                    cr2: None,
                    dr6: 0,
                })
            }
            _ => Event::Exception(second),
        };
    }
}

/// Classes of exceptions for the double-fault rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Class {
    Benign,
    Contributory,
    PageFault,
    DoubleFault,
}

impl Class {
    const fn of(vector: u8) -> Self {
        match vector {
            vector::DE | vector::TS | vector::NP | vector::SS | vector::GP => Self::Contributory,
            vector::PF => Self::PageFault,
            vector::DF => Self::DoubleFault,
            _ => Self::Benign,
        }
    }
}

/// What delivery needs to know of an event.
struct Frame {
    vector: u8,
    error_code: Option<u32>,
    software: bool,
    /// The EXT bit of error codes.
    ext: u32,
    rip: u64,
    rflags: u64,
}

impl Frame {
    fn of(cpu: &CpuState, event: Event) -> Self {
        let hard = |vector| Self {
            vector,
            error_code: None,
            software: false,
            ext: 1,
            rip: cpu.rip,
            rflags: cpu.rflags | flags::FIXED,
        };
        match event {
            Event::Interrupt(vector) => hard(vector),
            Event::Nmi => hard(vector::NMI),
            Event::SoftInt { vector, next_rip } => {
                Self { software: true, ext: 0, rip: next_rip, ..hard(vector) }
            }
            Event::Exception(exception) => {
                let frame = hard(exception.vector);
                // Faults save RF set so that an instruction breakpoint does not hit again (SDM vol. 3,
                // 17.3.1.1); traps, aborts and #DB other than general-detect do not.
                let fault = match exception.vector {
                    vector::DB => exception.dr6 & DR6_BD != 0,
                    vector::NMI | vector::BP | vector::OF | vector::DF | vector::MC => false,
                    _ => true,
                };
                let rf = if fault { flags::RF } else { 0 };
                Self { error_code: exception.error_code, rflags: frame.rflags | rf, ..frame }
            }
        }
    }

    /// The error code of a fault that concerns the gate.
    const fn gate_code(&self) -> u32 {
        (self.vector as u32) << 3 | 2 | self.ext
    }

    /// The error code of a fault that concerns a selector.
    const fn code(&self, selector: u16) -> u32 {
        selector_code(selector) | self.ext
    }
}

/// What raising an exception changes before its delivery: CR2 and DR6.
fn raise(cpu: &mut CpuState, event: Event) {
    if let Event::Exception(exception) = event {
        if let Some(address) = exception.cr2 {
            cpu.cr2 = address;
        }
        if exception.vector == vector::DB {
            cpu.dr6 = cpu.dr6 & !0xf | DR6_FIXED | exception.dr6;
        }
    }
}

fn deliver_real(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    frame: &Frame,
) -> Result<(), Exception> {
    let offset = u32::from(frame.vector) * 4;
    if offset + 3 > cpu.idtr.limit {
        return Err(Exception::gp(frame.gate_code()));
    }
    let mut entry = [0; 4];
    let at = wrap(cpu, cpu.idtr.base.wrapping_add(u64::from(offset)));
    mem.read(cpu, at, &mut entry, Access::System)?;
    let [ip0, ip1, cs0, cs1] = entry;
    let selector = u16::from_le_bytes([cs0, cs1]);
    let mut stack = Stack::current(cpu, frame.ext);
    let image = [frame.rflags, u64::from(cpu.seg[sreg::CS].selector), frame.rip];
    stack.push(cpu, mem, &image, 2)?;
    stack.apply(cpu);
    let cs = &mut cpu.seg[sreg::CS];
    cs.selector = selector;
    cs.base = u64::from(selector) << 4;
    cpu.rip = u64::from(u16::from_le_bytes([ip0, ip1]));
    cpu.rflags &= !(flags::IF | flags::TF | flags::AC | flags::RF);
    Ok(())
}

/// A gate of the IDT, after its checks.
struct Gate {
    selector: u16,
    offset: u64,
    interrupt: bool,
    /// Bytes of one pushed value.
    size: usize,
    ist: u8,
    /// It is a task gate, and the selector that of a TSS.
    task: bool,
}

/// Reads and checks the gate of a protected-mode or long-mode IDT.
fn read_gate(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    frame: &Frame,
) -> Result<Gate, Exception> {
    let long = cpu.long_mode();
    let bytes: u32 = if long { 16 } else { 8 };
    let offset = u32::from(frame.vector) * bytes;
    if offset + bytes - 1 > cpu.idtr.limit {
        return Err(Exception::gp(frame.gate_code()));
    }
    let mut entry = [0u8; 16];
    let at = wrap(cpu, cpu.idtr.base.wrapping_add(u64::from(offset)));
    mem.read(cpu, at, &mut entry[..bytes as usize], Access::System)?;
    let both = u128::from_le_bytes(entry);
    let (raw, high) = (both as u64, (both >> 64) as u64);
    let typ = (raw >> 40 & 0x1f) as u8;
    let (interrupt, size) = match (typ, long) {
        (system::INT, true) => (true, 8),
        (system::TRAP, true) => (false, 8),
        (system::INT, false) => (true, 4),
        (system::TRAP, false) => (false, 4),
        (system::INT16, false) => (true, 2),
        (system::TRAP16, false) => (false, 2),
        (system::TASK_GATE, false) => (false, 4),
        _ => return Err(Exception::gp(frame.gate_code())),
    };
    let dpl = (raw >> 45 & 3) as u8;
    if frame.software && dpl < cpu.cpl() {
        return Err(Exception::gp(frame.gate_code()));
    }
    if raw >> 47 & 1 == 0 {
        return Err(Exception::np(frame.gate_code()));
    }
    let offset = desc::gate_offset(raw, high);
    Ok(Gate {
        selector: (raw >> 16) as u16,
        offset: if size == 2 { offset & 0xffff } else { offset },
        interrupt,
        size,
        ist: if long { (raw >> 32 & 7) as u8 } else { 0 },
        task: typ == system::TASK_GATE,
    })
}

/// Reads and checks the code segment of a gate; gives it with the new CPL as RPL.
fn read_target(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    frame: &Frame,
    gate: &Gate,
) -> Result<Segment, Exception> {
    if is_null(gate.selector) {
        return Err(Exception::gp(frame.ext));
    }
    let refuse = Exception::gp(frame.code(gate.selector));
    let mut code = desc::fetch(cpu, mem, gate.selector, refuse)?;
    if !code.is_code() || code.dpl() > cpu.cpl() {
        return Err(refuse);
    }
    if cpu.long_mode() && (!code.is_long() || code.is_big()) {
        return Err(refuse);
    }
    if !code.present() {
        return Err(Exception::np(frame.code(gate.selector)));
    }
    code.set_accessed(cpu, mem)?;
    let cpl = if code.is_conforming() { cpu.cpl() } else { code.dpl() };
    Ok(code.segment(cpl))
}

/// Clears the flags a gate clears.
const fn gate_flags(rflags: u64, gate: &Gate) -> u64 {
    let clear = flags::TF | flags::NT | flags::RF | flags::VM;
    rflags & !clear & !(if gate.interrupt { flags::IF } else { 0 })
}

fn deliver_long(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    frame: &Frame,
) -> Result<(), Exception> {
    let gate = read_gate(cpu, mem, frame)?;
    let cs = read_target(cpu, mem, frame, &gate)?;
    let old_cpl = cpu.cpl();
    let cpl = rpl(cs.selector);
    if !canonical(gate.offset) {
        return Err(Exception::gp(frame.ext));
    }
    let rsp = if gate.ist != 0 {
        read_tss_u64(cpu, mem, 0x1c + u64::from(gate.ist) * 8, frame.ext)?
    } else if cpl < old_cpl {
        read_tss_u64(cpu, mem, 4 + u64::from(cpl) * 8, frame.ext)?
    } else {
        cpu.gpr[reg::RSP]
    };
    let access = if cpl == old_cpl { Access::Current } else { Access::System };
    let mut stack = Stack::flat(rsp & !0xf, access, frame.ext);
    let image = [
        u64::from(cpu.seg[sreg::SS].selector),
        cpu.gpr[reg::RSP],
        frame.rflags,
        u64::from(cpu.seg[sreg::CS].selector),
        frame.rip,
        u64::from(frame.error_code.unwrap_or(0)),
    ];
    let slots = if frame.error_code.is_some() { 6 } else { 5 };
    stack.push(cpu, mem, image.get(..slots).unwrap_or(&image), 8)?;
    stack.apply(cpu);
    if cpl < old_cpl {
        cpu.seg[sreg::SS] = null_stack(cpl);
    }
    cpu.seg[sreg::CS] = cs;
    cpu.rip = gate.offset;
    cpu.rflags = gate_flags(cpu.rflags, &gate);
    Ok(())
}

/// SS after a change to an inner level in long mode: null, its DPL still telling the CPL.
pub(crate) const fn null_stack(cpl: u8) -> Segment {
    Segment { base: 0, limit: 0, selector: cpl as u16, attr: (cpl as u16) << 5 }
}

fn deliver_legacy(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    frame: &Frame,
) -> Result<(), Exception> {
    let gate = read_gate(cpu, mem, frame)?;
    if gate.task {
        let cause = Cause::Interrupt { ext: frame.ext, error_code: frame.error_code };
        return task::switch(cpu, mem, gate.selector, cause, frame.rip, frame.rflags);
    }
    let cs = read_target(cpu, mem, frame, &gate)?;
    let cpl = rpl(cs.selector);
    let inner = cpl < cpu.cpl();
    let from_virtual = cpu.virtual_8086();
    if from_virtual && cpl != 0 {
        return Err(Exception::gp(frame.code(gate.selector)));
    }
    let code = u64::from(frame.error_code.unwrap_or(0));
    let pushed_code = usize::from(frame.error_code.is_some());
    let selector = |n: usize| u64::from(cpu.seg[n].selector);
    let image = [
        selector(sreg::GS),
        selector(sreg::FS),
        selector(sreg::DS),
        selector(sreg::ES),
        selector(sreg::SS),
        cpu.gpr[reg::RSP],
        frame.rflags,
        selector(sreg::CS),
        frame.rip,
        code,
    ];
    let (first, new_ss, mut stack) = if inner {
        let (ss, sp) = inner_stack(cpu, mem, cpl, frame.ext)?;
        let first = if from_virtual { 0 } else { 4 };
        (first, ss, Stack::inner(ss, sp, selector_code(ss.selector) | frame.ext))
    } else {
        (6, cpu.seg[sreg::SS], Stack::current(cpu, frame.ext))
    };
    if gate.offset > u64::from(cs.limit) {
        return Err(Exception::gp(frame.ext));
    }
    let image = image.get(first..9 + pushed_code).unwrap_or(&image);
    stack.push(cpu, mem, image, gate.size)?;
    cpu.seg[sreg::SS] = new_ss;
    stack.apply(cpu);
    cpu.seg[sreg::CS] = cs;
    if from_virtual {
        for n in [sreg::ES, sreg::DS, sreg::FS, sreg::GS] {
            cpu.seg[n] = Segment::default();
        }
    }
    cpu.rip = gate.offset;
    cpu.rflags = gate_flags(cpu.rflags, &gate);
    Ok(())
}

/// Reads a 64-bit stack pointer from the TSS of long mode.
pub(crate) fn read_tss_u64(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    offset: u64,
    ext: u32,
) -> Result<u64, Exception> {
    let mut bytes = [0; 8];
    read_tss(cpu, mem, offset, &mut bytes, ext)?;
    Ok(u64::from_le_bytes(bytes))
}

fn read_tss(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    offset: u64,
    bytes: &mut [u8],
    ext: u32,
) -> Result<(), Exception> {
    if offset + bytes.len() as u64 - 1 > u64::from(cpu.tr.limit) || !cpu.tr.present() {
        return Err(Exception::ts(selector_code(cpu.tr.selector) | ext));
    }
    let at = wrap(cpu, cpu.tr.base.wrapping_add(offset));
    mem.read(cpu, at, bytes, Access::System)
}

/// Reads and checks the stack of an inner level from a 16-bit or 32-bit TSS (SDM vol. 2, INT n,
/// INTER-PRIVILEGE-LEVEL-INTERRUPT).
pub(crate) fn inner_stack(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    cpl: u8,
    ext: u32,
) -> Result<(Segment, u64), Exception> {
    let level = u64::from(cpl);
    let wide = cpu.tr.typ() & 8 != 0;
    let mut bytes = [0; 6];
    let (selector, sp) = if wide {
        read_tss(cpu, mem, level * 8 + 4, &mut bytes, ext)?;
        let [a, b, c, d, e, f] = bytes;
        (u16::from_le_bytes([e, f]), u64::from(u32::from_le_bytes([a, b, c, d])))
    } else {
        read_tss(cpu, mem, level * 4 + 2, &mut bytes[..4], ext)?;
        let [a, b, c, d, ..] = bytes;
        (u16::from_le_bytes([c, d]), u64::from(u16::from_le_bytes([a, b])))
    };
    let refuse = Exception::ts(selector_code(selector) | ext);
    if is_null(selector) {
        return Err(Exception::ts(ext));
    }
    let mut stack = desc::fetch(cpu, mem, selector, refuse)?;
    if rpl(selector) != cpl || stack.dpl() != cpl || !stack.is_writable_data() {
        return Err(refuse);
    }
    if !stack.present() {
        return Err(Exception::ss(selector_code(selector) | ext));
    }
    stack.set_accessed(cpu, mem)?;
    Ok((stack.segment(cpl), sp))
}

#[cfg(test)]
#[path = "event_tests.rs"]
mod tests;
