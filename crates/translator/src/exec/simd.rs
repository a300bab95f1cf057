//! FXSAVE and XSAVE families, masked moves and gathers.

use berth_x86::Exception;
use berth_x86::paging::{Kind, Rights};
use berth_x86::state::{reg, sreg};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::{Done, Flow};
use crate::fpu;
use crate::mem::check_canonical;
use crate::translate::GuestReg;
use crate::vcpu::Inner;

/// MXCSR bits that may be set.
const MXCSR_MASK: u32 = 0xffff;
/// XCR0 components.
const X87: u64 = 1;
const SSE: u64 = 2;
const AVX: u64 = 4;

pub(super) fn save_restore(v: &mut Inner, ins: &Instruction) -> Done {
    use Mnemonic as M;
    match ins.mnemonic() {
        M::Fxsave | M::Fxsave64 => fxsave(v, ins)?,
        M::Fxrstor | M::Fxrstor64 => fxrstor(v, ins)?,
        M::Xsave | M::Xsave64 => xsave(v, ins, false, false)?,
        M::Xsaveopt | M::Xsaveopt64 => xsave(v, ins, false, true)?,
        M::Xsavec | M::Xsavec64 => xsave(v, ins, true, true)?,
        M::Xrstor | M::Xrstor64 => xrstor(v, ins)?,
        _ => x87_image(v, ins)?,
    }
    Ok(Flow::Next)
}

fn le32(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).map_or(0, |s| u32::from_le_bytes([s[0], s[1], s[2], s[3]]))
}

fn le64(b: &[u8], at: usize) -> u64 {
    u64::from(le32(b, at)) | u64::from(le32(b, at + 4)) << 32
}

/// Number of XMM registers in the current mode.
fn xmm_count(v: &Inner) -> usize {
    if v.area.state.code_size() == berth_x86::state::CodeSize::Bits64 { 16 } else { 8 }
}

fn aligned(v: &Inner, seg: u8, off: u64, by: u64) -> Result<(), Exception> {
    if v.linear(seg, off, 1, false)? & (by - 1) != 0 { Err(Exception::gp(0)) } else { Ok(()) }
}

fn fxsave(v: &mut Inner, ins: &Instruction) -> Result<(), Exception> {
    let (seg, off) = v.address(ins);
    aligned(v, seg, off, 16)?;
    let mut image = fpu::store_x87();
    image.0[24..28].copy_from_slice(&v.area.mxcsr.to_le_bytes());
    image.0[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    // What the instruction does not write stays as it is.
    let n = xmm_count(v);
    let end = fpu::XMM + n * 16;
    for i in 0..n {
        let at = fpu::XMM + i * 16;
        image.0[at..at + 16].copy_from_slice(&v.area.ymm[i][..16]);
    }
    v.write_mem(seg, off, &image.0[..end])
}

fn fxrstor(v: &mut Inner, ins: &Instruction) -> Result<(), Exception> {
    let (seg, off) = v.address(ins);
    aligned(v, seg, off, 16)?;
    let mut image = [0u8; 512];
    v.read_mem(seg, off, &mut image)?;
    let mxcsr = le32(&image, 24);
    if mxcsr & !MXCSR_MASK != 0 {
        return Err(Exception::gp(0));
    }
    v.area.mxcsr = mxcsr;
    load_x87_part(&image);
    for i in 0..xmm_count(v) {
        let at = fpu::XMM + i * 16;
        v.area.ymm[i][..16].copy_from_slice(&image[at..at + 16]);
    }
    Ok(())
}

fn load_x87_part(image: &[u8]) {
    let mut x87 = [0u8; 160];
    if let Some(s) = image.get(..160) {
        x87.copy_from_slice(s);
    }
    fpu::load_x87(&x87);
}

/// Components that differ from their initial state.
fn in_use(v: &Inner, x87: &fpu::Fx) -> u64 {
    let init = fpu::initial_x87();
    let mut bits = 0;
    if x87.0[..24] != init[..24] || x87.0[32..160] != init[32..160] {
        bits |= X87;
    }
    let n = xmm_count(v);
    if v.area.ymm[..n].iter().any(|y| y[..16].iter().any(|&b| b != 0)) {
        bits |= SSE;
    }
    if v.area.ymm[..n].iter().any(|y| y[16..].iter().any(|&b| b != 0)) {
        bits |= AVX;
    }
    bits
}

fn requested(v: &Inner) -> u64 {
    let s = &v.area.state;
    let mask = (s.gpr[reg::RDX] & 0xffff_ffff) << 32 | s.gpr[reg::RAX] & 0xffff_ffff;
    mask & s.xcr0
}

/// XSAVE, XSAVEOPT (`skip` components in their initial state), XSAVEC (SDM vol. 1, 13.7 to 13.10).
fn xsave(v: &mut Inner, ins: &Instruction, compact: bool, skip: bool) -> Result<(), Exception> {
    let (seg, off) = v.address(ins);
    aligned(v, seg, off, 64)?;
    let rfbm = requested(v);
    let size = if rfbm & AVX != 0 { 832 } else { 576 };
    let mut buf = [0u8; 832];
    v.read_mem(seg, off, &mut buf[..size])?;
    let fx = fpu::store_x87();
    let used = in_use(v, &fx);
    let write = if skip { rfbm & used } else { rfbm };
    if write & X87 != 0 {
        buf[..24].copy_from_slice(&fx.0[..24]);
        buf[32..160].copy_from_slice(&fx.0[32..160]);
    }
    let mxcsr = if compact { write & SSE != 0 } else { rfbm & (SSE | AVX) != 0 };
    if mxcsr {
        buf[24..28].copy_from_slice(&v.area.mxcsr.to_le_bytes());
        buf[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
    }
    for i in 0..xmm_count(v) {
        let y = v.area.ymm[i];
        if write & SSE != 0 {
            buf[fpu::XMM + i * 16..][..16].copy_from_slice(&y[..16]);
        }
        if write & AVX != 0 {
            buf[fpu::YMM_HIGH + i * 16..][..16].copy_from_slice(&y[16..]);
        }
    }
    let used = if compact && v.area.mxcsr != 0x1f80 { used | SSE } else { used };
    let bv = if compact { used & rfbm } else { le64(&buf, 512) & !rfbm | used & rfbm };
    buf[512..520].copy_from_slice(&bv.to_le_bytes());
    if compact {
        buf[520..528].copy_from_slice(&(1u64 << 63 | rfbm).to_le_bytes());
        if bv & SSE != 0 {
            buf[24..28].copy_from_slice(&v.area.mxcsr.to_le_bytes());
            buf[28..32].copy_from_slice(&MXCSR_MASK.to_le_bytes());
            for i in 0..xmm_count(v) {
                buf[fpu::XMM + i * 16..][..16].copy_from_slice(&v.area.ymm[i][..16]);
            }
        }
    }
    v.write_mem(seg, off, &buf[..size])
}

/// XRSTOR (SDM vol. 1, 13.8).
fn xrstor(v: &mut Inner, ins: &Instruction) -> Result<(), Exception> {
    let (seg, off) = v.address(ins);
    aligned(v, seg, off, 64)?;
    let rfbm = requested(v);
    let wrong = Exception::gp(0);
    let mut buf = [0u8; 832];
    v.read_mem(seg, off, &mut buf[..576])?;
    let (bv, xcomp) = (le64(&buf, 512), le64(&buf, 520));
    let compact = xcomp >> 63 != 0;
    let xcr0 = v.area.state.xcr0;
    let reserved = if compact { 528..576 } else { 520..536 };
    if buf[reserved].iter().any(|&b| b != 0)
        || bv & !xcr0 != 0
        || (compact && (xcomp & !(1 << 63) & !xcr0 != 0 || bv & !xcomp != 0))
    {
        return Err(wrong);
    }
    let have = if compact { bv & xcomp } else { bv };
    if rfbm & have & AVX != 0 {
        v.read_mem(seg, off, &mut buf)?;
    }
    let mxcsr = le32(&buf, 24);
    let load_mxcsr = if compact { rfbm & have & SSE != 0 } else { rfbm & (SSE | AVX) != 0 };
    if load_mxcsr && mxcsr & !MXCSR_MASK != 0 {
        return Err(wrong);
    }
    if load_mxcsr {
        v.area.mxcsr = mxcsr;
    } else if compact && rfbm & SSE != 0 {
        v.area.mxcsr = 0x1f80;
    }
    if rfbm & X87 != 0 {
        if have & X87 != 0 { load_x87_part(&buf) } else { fpu::load_x87(&fpu::initial_x87()) }
    }
    for i in 0..xmm_count(v) {
        let y = &mut v.area.ymm[i];
        if rfbm & SSE != 0 {
            y[..16].fill(0);
            if have & SSE != 0 {
                y[..16].copy_from_slice(&buf[fpu::XMM + i * 16..][..16]);
            }
        }
        if rfbm & AVX != 0 {
            y[16..].fill(0);
            if have & AVX != 0 {
                y[16..].copy_from_slice(&buf[fpu::YMM_HIGH + i * 16..][..16]);
            }
        }
    }
    if rfbm & AVX != 0 {
        fpu::upper_changed(&mut v.area);
    }
    Ok(())
}

/// FNSTENV, FLDENV, FNSAVE, FRSTOR; the 14- and 94-byte forms are made from the others.
fn x87_image(v: &mut Inner, ins: &Instruction) -> Result<(), Exception> {
    use Mnemonic as M;
    let waits = matches!(ins.mnemonic(), Mnemonic::Fldenv | Mnemonic::Frstor);
    if waits && fpu::pending() {
        return Err(Exception::mf());
    }
    let (seg, off) = v.address(ins);
    let short = matches!(crate::translate::access_size(ins), 14 | 94);
    let m = ins.mnemonic();
    let regs = matches!(m, M::Fnsave | M::Fsave | M::Frstor);
    let size = if short { 14 } else { 28 } + if regs { 80 } else { 0 };
    let store = matches!(m, M::Fnsave | M::Fsave | M::Fnstenv | M::Fstenv);
    let head = if short { 14 } else { 28 };
    if store {
        // Nothing may change if the store faults.
        let va = v.linear(seg, off, size, true)?;
        v.check_aligned(seg, va, size)?;
        let s = &v.area.state;
        let rights = Rights::explicit(s, Kind::Write);
        v.lin.resolve(s, va, size, rights, usize::from(seg) == 2)?;
        let mut image = [0u8; 108];
        if regs {
            image = fpu::save_all();
        } else {
            image[..28].copy_from_slice(&fpu::environment());
        }
        let mut out = [0u8; 108];
        if short {
            for i in 0..3 {
                out[i * 2..i * 2 + 2].copy_from_slice(&image[i * 4..i * 4 + 2]);
            }
        } else {
            out[..28].copy_from_slice(&image[..28]);
        }
        out[head..head + 80].copy_from_slice(&image[28..108]);
        return v.write_mem(seg, off, &out[..size]);
    }
    let mut raw = [0u8; 108];
    v.read_mem(seg, off, &mut raw[..size])?;
    let mut image = [0u8; 108];
    if short {
        for i in 0..3 {
            image[i * 4..i * 4 + 2].copy_from_slice(&raw[i * 2..i * 2 + 2]);
        }
    } else {
        image[..12].copy_from_slice(&raw[..12]);
    }
    image[28..108].copy_from_slice(&raw[head..head + 80]);
    if regs {
        fpu::restore_all(&image);
    } else {
        let mut env = [0u8; 28];
        env.copy_from_slice(&image[..28]);
        fpu::load_environment(&env);
    }
    Ok(())
}

/// Number of a vector register.
fn vector(r: Register) -> usize {
    let base = if r.is_ymm() { Register::YMM0 } else { Register::XMM0 };
    (r as usize).wrapping_sub(base as usize) & 15
}

fn mmx(i: usize) -> [u8; 8] {
    let fx = fpu::store_x87();
    let mut out = [0; 8];
    out.copy_from_slice(&fx.0[32 + i * 16..][..8]);
    out
}

/// MASKMOVQ, MASKMOVDQU, VMASKMOVxx, VPMASKMOVx: element by element; elements that are not selected
/// are not touched and do not fault.
pub(super) fn masked_move(v: &mut Inner, ins: &Instruction) -> Done {
    use Mnemonic as M;
    let m = ins.mnemonic();
    if matches!(m, M::Maskmovq | M::Maskmovdqu | M::Vmaskmovdqu) {
        let (data, mask, n) = if m == M::Maskmovq {
            if fpu::pending() {
                return Err(Exception::mf());
            }
            fpu::enter_mmx();
            let number = |r: Register| (r as usize).wrapping_sub(Register::MM0 as usize) & 7;
            let mut d = [0u8; 16];
            let mut k = [0u8; 16];
            d[..8].copy_from_slice(&mmx(number(ins.op1_register())));
            k[..8].copy_from_slice(&mmx(number(ins.op2_register())));
            (d, k, 8)
        } else {
            let mut d = [0u8; 16];
            let mut k = [0u8; 16];
            d.copy_from_slice(&v.area.ymm[vector(ins.op1_register())][..16]);
            k.copy_from_slice(&v.area.ymm[vector(ins.op2_register())][..16]);
            (d, k, 16)
        };
        let size = match ins.op0_kind() {
            OpKind::MemorySegDI => 2,
            OpKind::MemorySegEDI => 4,
            _ => 8,
        };
        let am = super::operand::mask(size);
        let base = v.area.state.gpr[reg::RDI] & am;
        let wide = v.area.state.code_size() == berth_x86::state::CodeSize::Bits64;
        let seg = match ins.memory_segment() {
            r @ (Register::FS | Register::GS) => crate::translate::sreg_index(r),
            _ if wide => 3,
            r => crate::translate::sreg_index(r),
        };
        // All bytes are checked, as the processors do, even those that are not selected.
        // Alignment to 8 bytes is checked whatever the mask.
        let va = v.linear(seg, base, n, true)?;
        v.check_aligned(seg, va, 8)?;
        let s = &v.area.state;
        let rights = Rights::explicit(s, Kind::Write);
        v.lin.resolve(s, va, n, rights, false)?;
        for i in 0..n {
            if mask[i] & 0x80 != 0 {
                v.write_mem(seg, base.wrapping_add(i as u64) & am, &data[i..=i])?;
            }
        }
        return Ok(Flow::Next);
    }
    let width = if matches!(m, M::Vmaskmovps | M::Vpmaskmovd) { 4 } else { 8 };
    let (seg, off) = v.address(ins);
    let stack = usize::from(seg) == sreg::SS;
    let mask = v.area.ymm[vector(ins.op1_register())];
    let store = ins.op0_kind() == OpKind::Memory;
    let register = if store { ins.op2_register() } else { ins.op0_register() };
    let selected = (0..register.size() / width)
        .filter(|i| mask[i * width + width - 1] & 0x80 != 0)
        .map(|i| i * width);
    // No page is looked at when an element has no canonical address.
    for at in selected.clone() {
        let va = v.linear(seg, off.wrapping_add(at as u64), width, store)?;
        check_canonical(&v.area.state, va, stack)?;
        check_canonical(&v.area.state, va.wrapping_add(width as u64 - 1), stack)?;
    }
    if store {
        let data = v.area.ymm[vector(register)];
        // Nothing is stored when any element faults.
        for at in selected.clone() {
            let va = v.linear(seg, off.wrapping_add(at as u64), width, true)?;
            let s = &v.area.state;
            v.lin.resolve(s, va, width, Rights::explicit(s, Kind::Write), stack)?;
        }
        for at in selected {
            v.write_unaligned(seg, off.wrapping_add(at as u64), &data[at..at + width])?;
        }
    } else {
        let mut out = [0u8; 32];
        for at in selected {
            v.read_unaligned(seg, off.wrapping_add(at as u64), &mut out[at..at + width])?;
        }
        v.area.ymm[vector(register)] = out;
        v.area.upper = 1;
    }
    Ok(Flow::Next)
}

/// AVX2 gathers (SDM vol. 2, VGATHERDPS and company): destination, memory with vector index, mask.
pub(super) fn gather(v: &mut Inner, ins: &Instruction) -> Done {
    use Mnemonic as M;
    let (index_width, width) = match ins.mnemonic() {
        M::Vgatherdps | M::Vpgatherdd => (4, 4),
        M::Vgatherdpd | M::Vpgatherdq => (4, 8),
        M::Vgatherqps | M::Vpgatherqd => (8, 4),
        M::Vgatherqpd | M::Vpgatherqq => (8, 8),
        _ => return Err(Exception::ud()),
    };
    let (d, m) = (vector(ins.op0_register()), vector(ins.op2_register()));
    let x = vector(ins.memory_index());
    if d == m || d == x || m == x {
        return Err(Exception::ud());
    }
    let wide = ins.op0_register().is_ymm() || ins.memory_index().is_ymm();
    let lanes = if wide { 32 } else { 16 } / index_width.max(width);
    let (seg, _) = v.address(ins);
    let base_reg = ins.memory_base();
    let base = GuestReg::of(base_reg).map_or(0, |_| v.reg(base_reg));
    let am = super::operand::mask(if base_reg.is_gpr() { base_reg.size() } else { 8 });
    v.area.upper = 1;
    let index = v.area.ymm[x];
    let scale = u64::from(ins.memory_index_scale());
    // The mask is extended to all ones or zeros first; it tells on a fault what is left to do.
    for i in 0..lanes {
        let on = v.area.ymm[m][i * width + width - 1] & 0x80 != 0;
        v.area.ymm[m][i * width..(i + 1) * width].fill(if on { 0xff } else { 0 });
    }
    for i in 0..lanes {
        if v.area.ymm[m][i * width] == 0 {
            continue;
        }
        let ix = if index_width == 4 {
            i64::from(le32(&index, i * 4) as i32) as u64
        } else {
            le64(&index, i * 8)
        };
        let at =
            base.wrapping_add(ix.wrapping_mul(scale)).wrapping_add(ins.memory_displacement64())
                & am;
        let mut e = [0u8; 8];
        v.read_unaligned(seg, at, &mut e[..width])?;
        v.area.ymm[d][i * width..(i + 1) * width].copy_from_slice(&e[..width]);
        v.area.ymm[m][i * width..(i + 1) * width].fill(0);
    }
    v.area.ymm[m] = [0; 32];
    v.area.ymm[d][lanes * width..].fill(0);
    Ok(Flow::Next)
}
