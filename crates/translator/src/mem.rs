//! Accesses to guest memory from Rust: the slow path of generated code, and what helpers and the
//! rules of `berth-x86` use.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use berth_x86::paging::{self, Kind, Rights, Walk};
use berth_x86::state::{cr4, flags, sreg};
use berth_x86::{Access, CpuState, Exception, LinearMem, Platform, control};

use crate::ram::PAGE;
use crate::shared::Shared;

/// Memory and machine of one vCPU.
pub struct Lin {
    /// RAM and the map of translated pages.
    pub shared: Arc<Shared>,
    /// This vCPU's number.
    pub index: usize,
    /// What is not RAM.
    pub platform: Box<dyn Platform>,
    /// Pages of translated code that helpers wrote; the vCPU drops its blocks afterwards.
    pub dirty_code: Vec<u64>,
    /// The vCPU is in another task now, and perhaps in another address space.
    pub task_entered: bool,
    /// It asks for this before its first instruction.
    pub task_trap: Option<Exception>,
    /// The platform was called: interrupts may have changed.
    pub platform_called: bool,
    /// Bits for DR6 from data breakpoints that were hit.
    pub watch_hits: u64,
    /// Walks that succeeded, in long mode.
    pub walked: Walked,
}

const WALKED: usize = 128;

/// What accesses of Rust code found in the page tables: a TLB of its own, to be cleared whenever the
/// guest asks for a flush of whatever kind. An entry is for one page and one kind of access with its
/// rights.
pub struct Walked([(u64, u64); WALKED]);

impl Walked {
    /// An empty one.
    pub const fn new() -> Self {
        Self([(0, 0); WALKED])
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        for e in &mut self.0 {
            e.0 = 0;
        }
    }

    /// The tag of an access, which is never 0, and the entry to look at.
    const fn place(va: u64, rights: Rights) -> (u64, usize) {
        let kind = match rights.kind {
            Kind::Read => 1,
            Kind::Write => 2,
            Kind::Fetch => 3,
        };
        let access = kind | (rights.user as u64) << 2 | (rights.smap as u64) << 3;
        (va & !(PAGE - 1) | access, ((va >> 12 ^ kind << 5) as usize) % WALKED)
    }
}

/// One piece of an access within a page.
#[derive(Clone, Copy, Debug, Default)]
pub struct Piece {
    /// Guest physical address.
    pub gpa: u64,
    /// Bytes.
    pub len: usize,
}

/// Where up to two pages' worth of bytes are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Pieces {
    /// First page.
    pub first: Piece,
    /// Second page, `len` 0 when there is none.
    pub second: Piece,
}

/// Non-canonical addresses and what they raise: #SS through SS, else #GP.
pub fn check_canonical(cpu: &CpuState, va: u64, stack: bool) -> Result<(), Exception> {
    if cpu.long_mode() && !paging::canonical(va) {
        return Err(if stack { Exception::ss(0) } else { Exception::gp(0) });
    }
    Ok(())
}

impl Lin {
    /// Translates `len` bytes (at most a page) at a linear address, checking everything first.
    pub fn resolve(
        &mut self,
        cpu: &CpuState,
        va: u64,
        len: usize,
        rights: Rights,
        stack: bool,
    ) -> Result<Pieces, Exception> {
        check_canonical(cpu, va, stack)?;
        check_canonical(cpu, va.wrapping_add(len.max(1) as u64 - 1), stack)?;
        let room = (PAGE - (va & (PAGE - 1))) as usize;
        let gpa = self.translate(cpu, va, rights)?;
        let first = Piece { gpa, len: len.min(room) };
        if len <= room {
            return Ok(Pieces { first, second: Piece::default() });
        }
        let mut next = va.wrapping_add(room as u64);
        if !cpu.long_mode() {
            next &= 0xffff_ffff;
        }
        let gpa = self.translate(cpu, next, rights)?;
        Ok(Pieces { first, second: Piece { gpa, len: len - room } })
    }

    /// The physical address of a byte.
    fn translate(&mut self, cpu: &CpuState, va: u64, rights: Rights) -> Result<u64, Exception> {
        let (tag, at) = Walked::place(va, rights);
        let entry = &mut self.walked.0[at];
        if entry.0 == tag && cpu.long_mode() {
            return Ok(entry.1 | va & (PAGE - 1));
        }
        let w = paging::walk(&self.shared.ram, cpu, va, rights)?;
        if cpu.long_mode() {
            *entry = (tag, w.gpa & !(PAGE - 1));
        }
        Ok(w.gpa)
    }

    /// A walk of one byte for instruction fetches.
    pub fn walk(&self, cpu: &CpuState, va: u64, rights: Rights) -> Result<Walk, Exception> {
        paging::walk(&self.shared.ram, cpu, va, rights)
    }

    /// Reads physical memory or devices.
    pub fn read_phys(&mut self, gpa: u64, buf: &mut [u8]) {
        if self.shared.ram.contains(gpa, buf.len() as u64) {
            self.shared.ram.read(gpa, buf);
        } else {
            self.platform_called = true;
            for (i, chunk) in buf.chunks_mut(8).enumerate() {
                self.platform.mmio_read(gpa + i as u64 * 8, chunk);
            }
        }
    }

    /// Writes physical memory or devices.
    pub fn write_phys(&mut self, gpa: u64, data: &[u8]) {
        if self.shared.ram.contains(gpa, data.len() as u64) {
            self.shared.ram.write(gpa, data);
            self.written(gpa, data.len() as u64);
        } else {
            self.platform_called = true;
            for (i, chunk) in data.chunks(8).enumerate() {
                self.platform.mmio_write(gpa + i as u64 * 8, chunk);
            }
        }
    }

    /// Notices writes to pages with translations.
    pub fn written(&mut self, gpa: u64, len: u64) {
        fence(Ordering::SeqCst);
        for page in gpa / PAGE..=(gpa + len.max(1) - 1) / PAGE {
            if self.shared.has_code(page) {
                self.shared.invalidate_page(page, Some(self.index));
                self.dirty_code.push(page);
            }
        }
    }

    /// Reads resolved bytes.
    pub fn read_pieces(&mut self, p: &Pieces, buf: &mut [u8]) {
        let (a, b) = buf.split_at_mut(p.first.len.min(buf.len()));
        self.read_phys(p.first.gpa, a);
        if !b.is_empty() {
            self.read_phys(p.second.gpa, b);
        }
    }

    /// Writes resolved bytes.
    pub fn write_pieces(&mut self, p: &Pieces, data: &[u8]) {
        let (a, b) = data.split_at(p.first.len.min(data.len()));
        self.write_phys(p.first.gpa, a);
        if !b.is_empty() {
            self.write_phys(p.second.gpa, b);
        }
    }

    /// Records data breakpoints that an access of `len` bytes at `va` hits (SDM vol. 3, 17.2.4).
    pub fn watch(&mut self, cpu: &CpuState, va: u64, len: usize, write: bool) {
        self.watch_for(cpu, va, len, |kind| kind == 3 || kind == 1 && write);
    }

    /// Records I/O breakpoints that an access of `len` bytes to a port hits; there are some with
    /// CR4.DE set only (SDM vol. 3, 17.2.4).
    pub fn watch_port(&mut self, cpu: &CpuState, port: u16, len: usize) {
        if cpu.cr4 & cr4::DE != 0 {
            self.watch_for(cpu, u64::from(port), len, |kind| kind == 2);
        }
    }

    /// Records breakpoints of the kinds (R/W bits of DR7) that an access hits.
    fn watch_for(&mut self, cpu: &CpuState, at: u64, len: usize, kinds: impl Fn(u64) -> bool) {
        if cpu.dr7 & 0xff == 0 {
            return;
        }
        for i in 0..4 {
            let enabled = cpu.dr7 >> (i * 2) & 3 != 0;
            let kind = cpu.dr7 >> (16 + i * 4) & 3;
            let bytes = match cpu.dr7 >> (18 + i * 4) & 3 {
                0 => 1u64,
                1 => 2,
                3 => 4,
                _ => 8,
            };
            if !enabled || !kinds(kind) {
                continue;
            }
            let start = cpu.dr[i] & !(bytes - 1);
            if at < start.wrapping_add(bytes) && start < at.wrapping_add(len as u64) {
                self.watch_hits |= 1 << i;
            }
        }
    }
}

/// Whether DR7 enables any breakpoint on data.
pub fn watching(cpu: &CpuState) -> bool {
    cpu.dr7 & 0xff != 0
        && (0..4)
            .any(|i| cpu.dr7 >> (i * 2) & 3 != 0 && matches!(cpu.dr7 >> (16 + i * 4) & 3, 1 | 3))
}

/// Whether DR7 enables any breakpoint on instructions.
pub fn breaking(cpu: &CpuState) -> bool {
    cpu.dr7 & 0xff != 0
        && (0..4).any(|i| cpu.dr7 >> (i * 2) & 3 != 0 && cpu.dr7 >> (16 + i * 4) & 3 == 0)
}

impl LinearMem for Lin {
    fn enter_task(&mut self, cpu: &mut CpuState, cr3: Option<u64>) -> Result<(), Exception> {
        if let Some(cr3) = cr3 {
            control::load_cr3(cpu, &self.shared.ram, cr3)?;
        }
        self.task_entered = true;
        Ok(())
    }

    fn task_trap(&mut self, trap: Exception) {
        self.task_trap = Some(trap);
    }

    fn read(
        &mut self,
        cpu: &mut CpuState,
        addr: u64,
        buf: &mut [u8],
        access: Access,
    ) -> Result<(), Exception> {
        let p = self.resolve(cpu, addr, buf.len(), Rights::of(cpu, access, Kind::Read), false)?;
        self.read_pieces(&p, buf);
        self.watch(cpu, addr, buf.len(), false);
        Ok(())
    }

    fn write(
        &mut self,
        cpu: &mut CpuState,
        addr: u64,
        data: &[u8],
        access: Access,
    ) -> Result<(), Exception> {
        let p = self.resolve(cpu, addr, data.len(), Rights::of(cpu, access, Kind::Write), false)?;
        self.write_pieces(&p, data);
        self.watch(cpu, addr, data.len(), true);
        Ok(())
    }

    fn probe_write(
        &mut self,
        cpu: &mut CpuState,
        addr: u64,
        len: usize,
        access: Access,
    ) -> Result<(), Exception> {
        self.resolve(cpu, addr, len, Rights::of(cpu, access, Kind::Write), false).map(|_| ())
    }
}

/// Turns an offset in a segment into a linear address, checking rights and limit (SDM vol. 3, 5.3);
/// 64-bit mode knows only the bases of FS and GS.
pub fn linear(
    cpu: &CpuState,
    seg: u8,
    offset: u64,
    len: usize,
    write: bool,
) -> Result<u64, Exception> {
    let index = usize::from(seg);
    let s = &cpu.seg[index.min(5)];
    if cpu.code_size() == berth_x86::state::CodeSize::Bits64 {
        return Ok(if index >= sreg::FS { s.base.wrapping_add(offset) } else { offset });
    }
    let fault = if index == sreg::SS { Exception::ss(0) } else { Exception::gp(0) };
    if !s.present() {
        return Err(Exception::gp(0));
    }
    let code = s.typ() & 8 != 0;
    if cpu.protected() && s.attr & berth_x86::Segment::S != 0 {
        let denied = if code { write || s.typ() & 2 == 0 } else { write && s.typ() & 2 == 0 };
        if denied {
            return Err(fault);
        }
    }
    let offset = offset & 0xffff_ffff;
    let last = offset + len.max(1) as u64 - 1;
    let down = !code && s.typ() & 4 != 0 && cpu.protected();
    let ok = if down {
        let top = if s.attr & berth_x86::Segment::DB != 0 { 0xffff_ffff } else { 0xffff };
        offset > u64::from(s.limit) && last <= top
    } else {
        last <= u64::from(s.limit)
    };
    if !ok {
        return Err(fault);
    }
    Ok((s.base.wrapping_add(offset)) & 0xffff_ffff)
}

/// Whether the alignment of an access is checked (CR0.AM, EFLAGS.AC, CPL 3).
pub fn alignment_checked(cpu: &CpuState) -> bool {
    cpu.cr0 & berth_x86::state::cr0::AM != 0 && cpu.rflags & flags::AC != 0 && cpu.cpl() == 3
}

/// Alignment that an access of `size` bytes needs when alignment is checked (SDM vol. 3, table 6-7);
/// 1 for what is never checked.
pub fn natural_alignment(size: usize) -> u64 {
    match size {
        2 | 4 | 8 => size as u64,
        10 => 8,
        // Images of the x87 environment and state.
        14 | 94 => 2,
        28 | 108 => 4,
        _ => 1,
    }
}
