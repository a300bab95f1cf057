//! Flat memory and ready-made states for the tests of this crate.

use std::cell::RefCell;
use std::ops::Range;

use crate::platform::{Access, LinearMem, PhysMem, Platform};
use crate::state::{CpuState, Exception, Segment, cr0, cr4, efer, reg, sreg};

/// Memory where linear is physical; accesses to `faulting` raise #PF.
pub(crate) struct Flat {
    bytes: RefCell<Vec<u8>>,
    pub(crate) faulting: Option<Range<u64>>,
    /// System accesses made, in order (address, length).
    pub(crate) system: Vec<(u64, usize)>,
    pub(crate) writes: usize,
    /// There was a task switch.
    pub(crate) task_entered: bool,
    pub(crate) task_trap: Option<Exception>,
    /// Compare-and-swaps that are to fail, after changing the entry to this value.
    pub(crate) races: RefCell<Vec<(u64, u64)>>,
}

pub(crate) const SIZE: usize = 1 << 20;

impl Flat {
    pub(crate) fn new() -> Self {
        Self {
            bytes: RefCell::new(vec![0; SIZE]),
            faulting: None,
            system: Vec::new(),
            writes: 0,
            task_entered: false,
            task_trap: None,
            races: RefCell::new(Vec::new()),
        }
    }

    pub(crate) fn put<const N: usize>(&self, at: u64, bytes: [u8; N]) {
        self.bytes.borrow_mut()[at as usize..at as usize + N].copy_from_slice(&bytes);
    }

    pub(crate) fn put64(&self, at: u64, value: u64) {
        self.put(at, value.to_le_bytes());
    }

    pub(crate) fn get<const N: usize>(&self, at: u64) -> [u8; N] {
        self.bytes.borrow()[at as usize..at as usize + N].try_into().unwrap()
    }

    pub(crate) fn get64(&self, at: u64) -> u64 {
        u64::from_le_bytes(self.get(at))
    }

    pub(crate) fn get32(&self, at: u64) -> u32 {
        u32::from_le_bytes(self.get(at))
    }

    pub(crate) fn get16(&self, at: u64) -> u16 {
        u16::from_le_bytes(self.get(at))
    }

    pub(crate) fn snapshot(&self) -> Vec<u8> {
        self.bytes.borrow().clone()
    }

    fn check(&mut self, at: u64, len: usize, write: bool, access: Access) -> Result<(), Exception> {
        if access == Access::System {
            self.system.push((at, len));
        }
        let code = if write { 2 } else { 0 };
        let end = at.wrapping_add(len as u64);
        let hole = self.faulting.clone().unwrap_or_default();
        if at < hole.end && end > hole.start {
            return Err(Exception::pf(at.max(hole.start), code));
        }
        if at >= SIZE as u64 || end > SIZE as u64 {
            return Err(Exception::pf(at, code));
        }
        Ok(())
    }
}

impl PhysMem for Flat {
    fn read_u64(&self, gpa: u64) -> u64 {
        if gpa as usize + 8 > SIZE { u64::MAX } else { self.get64(gpa) }
    }
    fn read_u32(&self, gpa: u64) -> u32 {
        if gpa as usize + 4 > SIZE { u32::MAX } else { self.get32(gpa) }
    }
    fn cas_u64(&self, gpa: u64, old: u64, new: u64) -> bool {
        if let Some((at, value)) = self.races.borrow_mut().pop() {
            self.put64(at, value);
        }
        let same = self.read_u64(gpa) == old;
        if same {
            self.put64(gpa, new);
        }
        same
    }
    fn cas_u32(&self, gpa: u64, old: u32, new: u32) -> bool {
        if let Some((at, value)) = self.races.borrow_mut().pop() {
            self.put(at, (value as u32).to_le_bytes());
        }
        let same = self.read_u32(gpa) == old;
        if same {
            self.put(gpa, new.to_le_bytes());
        }
        same
    }
}

impl LinearMem for Flat {
    fn enter_task(&mut self, cpu: &mut CpuState, cr3: Option<u64>) -> Result<(), Exception> {
        if let Some(cr3) = cr3 {
            crate::control::load_cr3(cpu, self, cr3)?;
        }
        self.task_entered = true;
        Ok(())
    }
    fn task_trap(&mut self, trap: Exception) {
        self.task_trap = Some(trap);
    }

    fn read(
        &mut self,
        _: &mut CpuState,
        addr: u64,
        buf: &mut [u8],
        access: Access,
    ) -> Result<(), Exception> {
        self.check(addr, buf.len(), false, access)?;
        buf.copy_from_slice(&self.bytes.borrow()[addr as usize..addr as usize + buf.len()]);
        Ok(())
    }
    fn write(
        &mut self,
        _: &mut CpuState,
        addr: u64,
        data: &[u8],
        access: Access,
    ) -> Result<(), Exception> {
        self.check(addr, data.len(), true, access)?;
        self.writes += 1;
        self.bytes.borrow_mut()[addr as usize..addr as usize + data.len()].copy_from_slice(data);
        Ok(())
    }
    fn probe_write(
        &mut self,
        _: &mut CpuState,
        addr: u64,
        len: usize,
        access: Access,
    ) -> Result<(), Exception> {
        self.check(addr, len, true, access)
    }
}

/// A platform that knows MSR 0x1b only.
#[derive(Default)]
pub(crate) struct Board {
    pub(crate) apic_base: u64,
}

impl Platform for Board {
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) {}
    fn port_read(&mut self, _: u16, _: u8) -> u32 {
        u32::MAX
    }
    fn port_write(&mut self, _: u16, _: u8, _: u32) {}
    fn read_msr(&mut self, _: &CpuState, msr: u32) -> Option<u64> {
        (msr == 0x1b).then_some(self.apic_base)
    }
    fn write_msr(&mut self, _: &CpuState, msr: u32, value: u64) -> Option<()> {
        (msr == 0x1b).then(|| self.apic_base = value)
    }
    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        None
    }
    fn interrupt_pending(&mut self) -> bool {
        false
    }
    fn cr8(&mut self) -> u8 {
        0
    }
    fn set_cr8(&mut self, _: u8) {}
    fn hypercall(&mut self, _: u64, _: [u64; 4]) -> u64 {
        0
    }
}

/// Where the tests keep their tables and stacks.
pub(crate) const GDT: u64 = 0x1000;
pub(crate) const IDT: u64 = 0x2000;
pub(crate) const TSS: u64 = 0x4000;
pub(crate) const STACK: u64 = 0x9000;

/// Selectors of the tests' GDT (see [`gdt`]).
pub(crate) mod sel {
    pub(crate) const CODE0: u16 = 0x08;
    pub(crate) const DATA0: u16 = 0x10;
    pub(crate) const CODE3: u16 = 0x18 | 3;
    pub(crate) const DATA3: u16 = 0x20 | 3;
    pub(crate) const TSS: u16 = 0x28;
    /// Compatibility or 32-bit user code in a long-mode GDT; 16-bit code otherwise.
    pub(crate) const OTHER3: u16 = 0x38 | 3;
    pub(crate) const CONFORMING0: u16 = 0x40;
    pub(crate) const ABSENT0: u16 = 0x48;
    pub(crate) const ABSENT_DATA3: u16 = 0x50 | 3;
    pub(crate) const READ_ONLY3: u16 = 0x58 | 3;
    pub(crate) const GATE3: u16 = 0x60 | 3;
    pub(crate) const GATE0: u16 = 0x70;
    pub(crate) const LDT: u16 = 0x80;
    pub(crate) const STACK16_3: u16 = 0x90 | 3;
    pub(crate) const EXECUTE_ONLY3: u16 = 0x98 | 3;
    pub(crate) const BOTH_SIZES0: u16 = 0xa0;
    pub(crate) const DATA1: u16 = 0xa8 | 1;
    pub(crate) const OUTSIDE: u16 = 0x200;
}

/// A flat code or data descriptor with these attribute bytes.
pub(crate) const fn descriptor(attr: u16) -> u64 {
    0x000f_0000_0000_ffff | (attr as u64) << 40
}

/// Both halves of a gate.
pub(crate) const fn gate(selector: u16, offset: u64, typ_dpl_p: u8, low: u8) -> [u64; 2] {
    let raw = offset & 0xffff
        | (selector as u64) << 16
        | (low as u64) << 32
        | (typ_dpl_p as u64) << 40
        | (offset >> 16 & 0xffff) << 48;
    [raw, offset >> 32]
}

/// Writes the tests' GDT for long or legacy mode.
pub(crate) fn gdt(mem: &Flat, long: bool) {
    let (code0, code3, other3) =
        if long { (0xa09b, 0xa0fb, 0xc0fb) } else { (0xc09b, 0xc0fb, 0x80fb) };
    for (selector, attr) in [
        (sel::CODE0, code0),
        (sel::DATA0, 0xc093),
        (sel::CODE3, code3),
        (sel::DATA3, 0xc0f3),
        (sel::OTHER3, other3),
        (sel::CONFORMING0, code0 | 4),
        (sel::ABSENT0, code0 & !0x80),
        (sel::ABSENT_DATA3, 0xc073),
        (sel::READ_ONLY3, 0xc0f1),
        (sel::STACK16_3, 0x80f3),
        (sel::EXECUTE_ONLY3, code3 & !2),
        (sel::BOTH_SIZES0, 0xe09b),
        (sel::DATA1, 0xc0b3),
    ] {
        mem.put64(GDT + u64::from(selector & 0xfff8), descriptor(attr));
    }
    let tss = 0x67 | (TSS & 0xff_ffff) << 16 | 0x89 << 40;
    mem.put64(GDT + u64::from(sel::TSS), tss);
    let ldt = 0x17 | 0x6000 << 16 | 0x82 << 40;
    mem.put64(GDT + u64::from(sel::LDT), ldt);
}

fn base_state() -> CpuState {
    let mut cpu = CpuState::reset(true);
    cpu.gdtr.base = GDT;
    cpu.gdtr.limit = 0xff;
    cpu.idtr.base = IDT;
    cpu.gpr[reg::RSP] = STACK;
    cpu.rip = 0x1234;
    cpu.tr = Segment { base: TSS, limit: 0x67, selector: sel::TSS, attr: 0x8b };
    cpu
}

fn flat_segment(selector: u16, attr: u16) -> Segment {
    Segment { base: 0, limit: u32::MAX, selector, attr }
}

/// Real mode with the vector table at [`IDT`].
pub(crate) fn real() -> CpuState {
    let mut cpu = base_state();
    cpu.idtr.limit = 0x3ff;
    cpu.seg[sreg::CS] = Segment { base: 0x7000, limit: 0xffff, selector: 0x700, attr: 0x9b };
    cpu
}

fn with_level(mut cpu: CpuState, cpl: u8, code: u16) -> CpuState {
    let dpl = u16::from(cpl) << 5;
    let (cs, ss) = if cpl == 3 { (sel::CODE3, sel::DATA3) } else { (sel::CODE0, sel::DATA0) };
    cpu.seg = [flat_segment(ss, 0xc093 | dpl); 6];
    cpu.seg[sreg::CS] = flat_segment(cs & !3 | u16::from(cpl), code | dpl);
    cpu.idtr.limit = 0xfff;
    cpu
}

/// 32-bit protected mode without paging at a privilege level.
pub(crate) fn protected(cpl: u8) -> CpuState {
    let mut cpu = with_level(base_state(), cpl, 0xc09b);
    cpu.cr0 = cr0::PE | cr0::ET;
    cpu
}

/// 64-bit mode at a privilege level.
pub(crate) fn long(cpl: u8) -> CpuState {
    let mut cpu = with_level(base_state(), cpl, 0xa09b);
    cpu.cr0 = cr0::PE | cr0::ET | cr0::PG | cr0::WP;
    cpu.cr4 = cr4::PAE;
    cpu.efer = efer::LME | efer::LMA | efer::NXE;
    cpu
}
