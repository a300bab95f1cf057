//! System instructions.

use berth_x86::control::{self, CrEffect, Flush, Invpcid};
use berth_x86::msr::{self, MsrContext};
use berth_x86::state::{CodeSize, cr4, flags, reg, sreg};
use berth_x86::{Exception, far, flags as rules, paging, ports, syscall};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{Done, Flow};
use crate::translate::sreg_index;
use crate::vcpu::Inner;

/// EBX of CPUID leaf 0 of the vendor whose processors know no SYSCALL in compatibility mode.
const INTEL: u32 = u32::from_le_bytes(*b"Genu");

/// Upper bits of the numbers of IA32_EFER, IA32_STAR, IA32_LSTAR and IA32_FMASK.
const SYSTEM_CALL_MSRS: u32 = 0x00c0_0000;

/// The host's time-stamp counter.
pub fn host_tsc() -> u64 {
    // SAFETY: every x86-64 processor has RDTSC; the host allows it in user mode.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[allow(clippy::too_many_lines, reason = "one match over the mnemonics")]
pub(super) fn execute(v: &mut Inner, ins: &Instruction, next: u64) -> Done {
    use Mnemonic as M;
    match ins.mnemonic() {
        M::Mov => return mov_system(v, ins, next),
        M::Syscall => {
            let s = &v.area.state;
            if s.code_size() != CodeSize::Bits64 && v.cpuid.query(s, 0, 0)[1] == INTEL {
                return Err(Exception::ud());
            }
            syscall::syscall(&mut v.area.state, next)?;
            v.no_step_trap = v.area.state.rflags & flags::TF == 0;
            return Ok(Flow::Jump);
        }
        M::Sysret | M::Sysretq => {
            let wide = ins.mnemonic() == M::Sysretq || ins.code() == iced_x86::Code::Sysretq;
            syscall::sysret(&mut v.area.state, wide)?;
            // A TF it loads traps at once, not after the next instruction.
            v.step_trap = v.area.state.rflags & flags::TF != 0;
            return Ok(Flow::Jump);
        }
        M::Sysenter => {
            syscall::sysenter(&mut v.area.state)?;
            return Ok(Flow::Jump);
        }
        M::Sysexit | M::Sysexitq => {
            let wide = ins.code() == iced_x86::Code::Sysexitq;
            syscall::sysexit(&mut v.area.state, wide)?;
            return Ok(Flow::Jump);
        }
        M::Hlt => {
            control::privileged(&v.area.state)?;
            v.area.state.rip = next;
            v.area.state.halted = 1;
            return Ok(Flow::Jump);
        }
        M::Cli => rules::cli(&mut v.area.state)?,
        M::Sti => {
            rules::sti(&mut v.area.state)?;
            v.area.shadow_rip = next;
        }
        M::Stac | M::Clac => {
            let s = &mut v.area.state;
            if s.cpl() != 0 {
                return Err(Exception::ud());
            }
            if ins.mnemonic() == M::Stac {
                s.rflags |= flags::AC;
            } else {
                s.rflags &= !flags::AC;
            }
        }
        M::Cpuid => {
            let s = &v.area.state;
            let (leaf, sub) = (s.gpr[reg::RAX] as u32, s.gpr[reg::RCX] as u32);
            let [a, b, c, d] = v.cpuid.query(s, leaf, sub);
            let g = &mut v.area.state.gpr;
            (g[reg::RAX], g[reg::RBX], g[reg::RCX], g[reg::RDX]) =
                (u64::from(a), u64::from(b), u64::from(c), u64::from(d));
        }
        M::Rdtsc | M::Rdtscp => {
            let s = &mut v.area.state;
            if s.cr4 & cr4::TSD != 0 && s.cpl() != 0 {
                return Err(Exception::gp(0));
            }
            let t = host_tsc().wrapping_add(s.tsc_offset);
            s.gpr[reg::RAX] = t & 0xffff_ffff;
            s.gpr[reg::RDX] = t >> 32;
            if ins.mnemonic() == M::Rdtscp {
                s.gpr[reg::RCX] = s.tsc_aux & 0xffff_ffff;
            }
        }
        M::Rdpmc => return Err(Exception::gp(0)),
        M::Rdmsr => {
            let mut c = MsrContext { platform: &mut *v.lin.platform, table: &v.cpuid, host_tsc };
            let n = v.area.state.gpr[reg::RCX] as u32;
            let x = msr::read(&v.area.state, &mut c, n)?;
            let g = &mut v.area.state.gpr;
            (g[reg::RAX], g[reg::RDX]) = (x & 0xffff_ffff, x >> 32);
        }
        M::Wrmsr => {
            let g = &v.area.state.gpr;
            let n = g[reg::RCX] as u32;
            let x = g[reg::RAX] & 0xffff_ffff | g[reg::RDX] << 32;
            let mut c = MsrContext { platform: &mut *v.lin.platform, table: &v.cpuid, host_tsc };
            let effect = msr::write(&mut v.area.state, &mut c, n, x)?;
            if n >> 8 == SYSTEM_CALL_MSRS {
                v.close_gates();
            }
            v.lin.platform_called = true;
            v.flush(effect.flush);
        }
        M::Xgetbv => {
            let n = v.area.state.gpr[reg::RCX] as u32;
            let x = control::xgetbv(&v.area.state, n)?;
            let g = &mut v.area.state.gpr;
            (g[reg::RAX], g[reg::RDX]) = (x & 0xffff_ffff, x >> 32);
        }
        M::Xsetbv => {
            let g = &v.area.state.gpr;
            let (n, x) = (g[reg::RCX] as u32, g[reg::RAX] & 0xffff_ffff | g[reg::RDX] << 32);
            let supported = if v.cpuid.features().avx { 7 } else { 3 };
            control::xsetbv(&mut v.area.state, supported, n, x)?;
            v.close_gates();
        }
        M::Clts => {
            control::clts(&mut v.area.state)?;
            v.close_gates();
        }
        M::Lmsw => {
            control::privileged(&v.area.state)?;
            let x = v.get(ins, 0)? as u16;
            let e = control::lmsw(&mut v.area.state, &v.lin.shared.ram, x)?;
            return Ok(v.control_changed(e, next));
        }
        M::Smsw => {
            control::umip(&v.area.state)?;
            let x = v.area.state.cr0;
            v.set(ins, 0, x)?;
        }
        M::Invlpg => {
            control::privileged(&v.area.state)?;
            let (seg, off) = v.address(ins);
            let base = v.area.state.seg[usize::from(seg)].base;
            let wide = v.area.state.code_size() == CodeSize::Bits64;
            let va = match wide {
                true if usize::from(seg) < sreg::FS => off,
                true => base.wrapping_add(off),
                false => base.wrapping_add(off) & 0xffff_ffff,
            };
            v.invalidate(va);
            // The rest of the block may be of a page that is no longer there.
            v.area.state.rip = next;
            return Ok(Flow::Jump);
        }
        M::Invpcid => {
            invpcid(v, ins)?;
            v.area.state.rip = next;
            return Ok(Flow::Jump);
        }
        M::Wbinvd | M::Invd | M::Wbnoinvd => control::privileged(&v.area.state)?,
        M::Swapgs => {
            control::privileged(&v.area.state)?;
            let s = &mut v.area.state;
            std::mem::swap(&mut s.kernel_gs_base, &mut s.seg[sreg::GS].base);
        }
        M::Rdfsbase | M::Rdgsbase | M::Wrfsbase | M::Wrgsbase => fs_gs_base(v, ins)?,
        M::Sgdt | M::Sidt | M::Lgdt | M::Lidt => table_register(v, ins)?,
        M::Sldt | M::Str => {
            if v.area.state.real_segments() {
                return Err(Exception::ud());
            }
            control::umip(&v.area.state)?;
            let s = &v.area.state;
            let x = if ins.mnemonic() == M::Sldt { s.ldtr } else { s.tr }.selector;
            v.set(ins, 0, u64::from(x))?;
        }
        M::Lldt | M::Ltr => {
            if v.area.state.real_segments() {
                return Err(Exception::ud());
            }
            control::privileged(&v.area.state)?;
            let x = v.get(ins, 0)? as u16;
            if ins.mnemonic() == M::Lldt {
                far::lldt(&mut v.area.state, &mut v.lin, x)?;
            } else {
                far::ltr(&mut v.area.state, &mut v.lin, x)?;
            }
        }
        M::Lar | M::Lsl | M::Verr | M::Verw => query(v, ins)?,
        M::Arpl => {
            if v.area.state.real_segments() {
                return Err(Exception::ud());
            }
            let (d, s) = (v.get(ins, 0)?, v.get(ins, 1)?);
            let lower = d & 3 < s & 3;
            if lower {
                v.set(ins, 0, d & !3 | s & 3)?;
            }
            v.zero_flag(lower);
        }
        M::In | M::Out => port(v, ins)?,
        M::Vmcall | M::Vmmcall => {
            let g = v.area.state.gpr;
            let r = if v.area.state.cpl() != 0 {
                (-1i64) as u64
            } else {
                v.lin.platform_called = true;
                v.lin
                    .platform
                    .hypercall(g[reg::RAX], [g[reg::RBX], g[reg::RCX], g[reg::RDX], g[reg::RSI]])
            };
            v.area.state.gpr[reg::RAX] = r;
        }
        M::Serialize | M::Rdsspd | M::Rdsspq => {}
        _ => return Err(Exception::ud()),
    }
    Ok(Flow::Next)
}

impl Inner {
    /// Acts on what a change of control registers asks for.
    fn flush(&mut self, f: Flush) {
        match f {
            Flush::None => {}
            Flush::Pcid(p) => self.flush_pcid(p),
            Flush::NonGlobal => self.flush_non_global(),
            Flush::All => self.flush_everything(),
        }
    }

    fn control_changed(&mut self, e: CrEffect, next: u64) -> Flow {
        if e.mode_changed {
            self.flush_everything();
        } else {
            self.flush(e.flush);
        }
        self.close_gates();
        self.area.state.rip = next;
        Flow::Jump
    }

    fn zero_flag(&mut self, on: bool) {
        let f = &mut self.area.state.rflags;
        *f = if on { *f | flags::ZF } else { *f & !flags::ZF };
    }

    /// A trap: RIP already names the next instruction.
    pub(super) fn trap(&mut self, e: Exception) {
        self.no_step_trap = true;
        self.raise(e);
    }
}

fn register_number(r: Register, first: Register) -> u8 {
    (r as u32).wrapping_sub(first as u32) as u8
}

/// MOV to and from control, debug and segment registers.
fn mov_system(v: &mut Inner, ins: &Instruction, next: u64) -> Done {
    let (dst, src) = (ins.op0_register(), ins.op1_register());
    if dst.is_segment_register() && ins.op0_kind() == OpKind::Register {
        let n = usize::from(sreg_index(dst));
        if n == sreg::CS {
            return Err(Exception::ud());
        }
        let x = v.get(ins, 1)? as u16;
        far::load_segment(&mut v.area.state, &mut v.lin, n, x)?;
        if n == sreg::SS {
            v.shadow(2, next);
        }
        return Ok(Flow::Next);
    }
    if src.is_segment_register() && ins.op1_kind() == OpKind::Register {
        let x = v.get(ins, 1)?;
        v.set(ins, 0, x)?;
        return Ok(Flow::Next);
    }
    if dst.is_cr() {
        control::privileged(&v.area.state)?;
        let x = v.reg(src);
        let ram = &v.lin.shared.ram;
        let s = &mut v.area.state;
        let effect = match register_number(dst, Register::CR0) {
            0 => control::mov_to_cr0(s, ram, x)?,
            2 => {
                s.cr2 = x;
                return Ok(Flow::Next);
            }
            3 => {
                let long_pcid = s.cr4 & cr4::PCIDE != 0;
                let keep = long_pcid && x >> 63 != 0;
                control::mov_to_cr3(s, ram, x)?;
                let pcid = if long_pcid { (x & 0xfff) as u16 } else { 0 };
                v.switch_space(pcid, keep);
                v.area.state.rip = next;
                return Ok(Flow::Jump);
            }
            4 => control::mov_to_cr4(s, ram, x)?,
            8 => {
                if x > 15 {
                    return Err(Exception::gp(0));
                }
                v.lin.platform.set_cr8(x as u8);
                v.lin.platform_called = true;
                return Ok(Flow::Next);
            }
            _ => return Err(Exception::ud()),
        };
        return Ok(v.control_changed(effect, next));
    }
    if src.is_cr() {
        control::privileged(&v.area.state)?;
        let s = &v.area.state;
        let x = match register_number(src, Register::CR0) {
            0 => s.cr0,
            2 => s.cr2,
            3 => s.cr3,
            4 => s.cr4,
            8 => u64::from(v.lin.platform.cr8()),
            _ => return Err(Exception::ud()),
        };
        v.set_reg(dst, x);
        return Ok(Flow::Next);
    }
    if dst.is_dr() {
        let n = register_number(dst, Register::DR0);
        debug_detect(v)?;
        let x = v.reg(src);
        control::mov_to_dr(&mut v.area.state, n, x)?;
        // Pages with data breakpoints must not be in the TLB.
        v.flush_everything();
        v.area.state.rip = next;
        return Ok(Flow::Jump);
    }
    if src.is_dr() {
        debug_detect(v)?;
        let x = control::mov_from_dr(&v.area.state, register_number(src, Register::DR0))?;
        v.set_reg(dst, x);
        return Ok(Flow::Next);
    }
    Err(Exception::ud())
}

/// MOV DR with DR7.GD set raises #DB; whether that or #UD or #GP comes first is in `control`.
fn debug_detect(v: &Inner) -> Result<(), Exception> {
    control::privileged(&v.area.state)
}

fn invpcid(v: &mut Inner, ins: &Instruction) -> Result<(), Exception> {
    control::privileged(&v.area.state)?;
    let kind = v.reg(ins.op0_register());
    let (seg, off) = v.address(ins);
    let mut d = [0u8; 16];
    v.read_mem(seg, off, &mut d)?;
    match Invpcid::decode(&v.area.state, kind, &d)? {
        // More than asked is allowed: the address is dropped for every PCID.
        Invpcid::Address { address, .. } => v.invalidate(address),
        Invpcid::Pcid(p) => v.flush_pcid(p),
        Invpcid::All => v.flush_everything(),
        Invpcid::AllNonGlobal => v.flush_non_global(),
    }
    Ok(())
}

fn fs_gs_base(v: &mut Inner, ins: &Instruction) -> Result<(), Exception> {
    use Mnemonic as M;
    let s = &mut v.area.state;
    if s.cr4 & cr4::FSGSBASE == 0 {
        return Err(Exception::ud());
    }
    let n = if matches!(ins.mnemonic(), M::Rdfsbase | M::Wrfsbase) { sreg::FS } else { sreg::GS };
    if matches!(ins.mnemonic(), M::Rdfsbase | M::Rdgsbase) {
        let x = s.seg[n].base;
        v.set_reg(ins.op0_register(), x);
    } else {
        let x = v.reg(ins.op0_register());
        if !paging::canonical(x) {
            return Err(Exception::gp(0));
        }
        v.area.state.seg[n].base = x;
    }
    Ok(())
}

fn table_register(v: &mut Inner, ins: &Instruction) -> Result<(), Exception> {
    use Mnemonic as M;
    let wide = v.area.state.code_size() == CodeSize::Bits64;
    let n = if wide { 8 } else { 4 };
    let (seg, off) = v.address(ins);
    match ins.mnemonic() {
        M::Sgdt | M::Sidt => {
            control::umip(&v.area.state)?;
            let s = &v.area.state;
            let t = if ins.mnemonic() == M::Sgdt { s.gdtr } else { s.idtr };
            let mut b = [0u8; 10];
            b[..2].copy_from_slice(&(t.limit as u16).to_le_bytes());
            b[2..].copy_from_slice(&t.base.to_le_bytes());
            v.write_mem(seg, off, &b[..2 + n])
        }
        _ => {
            control::privileged(&v.area.state)?;
            let mut b = [0u8; 10];
            v.read_mem(seg, off, &mut b[..2 + n])?;
            let limit = u32::from(u16::from_le_bytes([b[0], b[1]]));
            let mut base = [0u8; 8];
            base.copy_from_slice(&b[2..]);
            let mut base = u64::from_le_bytes(base);
            if !wide && super::opsize(ins) == berth_x86::OpSize::Bits16 {
                base &= 0xff_ffff;
            }
            if wide && !paging::canonical(base) {
                return Err(Exception::gp(0));
            }
            let s = &mut v.area.state;
            let t = if ins.mnemonic() == M::Lgdt { &mut s.gdtr } else { &mut s.idtr };
            (t.base, t.limit) = (base, limit);
            Ok(())
        }
    }
}

fn query(v: &mut Inner, ins: &Instruction) -> Result<(), Exception> {
    use Mnemonic as M;
    if v.area.state.real_segments() {
        return Err(Exception::ud());
    }
    let (s, found);
    match ins.mnemonic() {
        M::Verr | M::Verw => {
            s = v.get(ins, 0)? as u16;
            found = if ins.mnemonic() == M::Verr {
                far::verr(&mut v.area.state, &mut v.lin, s)?
            } else {
                far::verw(&mut v.area.state, &mut v.lin, s)?
            };
        }
        m => {
            // The source is a selector of 16 bits whatever the operand size.
            s = if ins.op1_kind() == OpKind::Memory {
                let (seg, off) = v.address(ins);
                v.read_uint(seg, off, 2)? as u16
            } else {
                v.get(ins, 1)? as u16
            };
            let r = if m == M::Lar {
                far::lar(&mut v.area.state, &mut v.lin, s)?
            } else {
                far::lsl(&mut v.area.state, &mut v.lin, s)?
            };
            if let Some(x) = r {
                v.set_reg(ins.op0_register(), u64::from(x));
            }
            found = r.is_some();
        }
    }
    v.zero_flag(found);
    Ok(())
}

/// Whether the running code may access `size` ports at `port`.
pub(super) fn port_allowed(v: &mut Inner, port: u16, size: usize) -> Result<(), Exception> {
    ports::check(&mut v.area.state, &mut v.lin, port, size as u8)
}

fn port(v: &mut Inner, ins: &Instruction) -> Result<(), Exception> {
    let input = ins.mnemonic() == Mnemonic::In;
    let (data, at) = if input { (0, 1) } else { (1, 0) };
    let port = match ins.op_kind(at) {
        OpKind::Register => v.area.state.gpr[reg::RDX] as u16,
        _ => u16::from(ins.immediate8()),
    };
    let r = ins.op_register(data);
    port_allowed(v, port, r.size())?;
    v.lin.platform_called = true;
    if input {
        let x = v.lin.platform.port_read(port, r.size() as u8);
        v.set_reg(r, u64::from(x));
    } else {
        let x = v.reg(r) as u32;
        v.lin.platform.port_write(port, r.size() as u8, x);
    }
    v.lin.watch_port(&v.area.state, port, r.size());
    Ok(())
}
