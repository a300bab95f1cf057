//! String instructions. Registers are exact after every iteration, so that a fault or an interrupt
//! in the middle resumes where it left off; long runs of MOVS and STOS go page by page.

use berth_x86::Exception;
use berth_x86::state::{flags, reg, sreg};
use iced_x86::{Instruction, Mnemonic, OpKind};

use super::system::port_allowed;
use super::{Done, Flow};
use crate::exec::operand::mask;
use crate::ram::PAGE;
use crate::translate::sreg_index;
use crate::vcpu::Inner;
use berth_x86::paging::{Kind, Rights};

/// Iterations between two looks for interrupts.
const BATCH: u64 = 256;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Op {
    Movs,
    Stos,
    Lods,
    Scas,
    Cmps,
    Ins,
    Outs,
}

struct Plan {
    op: Op,
    size: usize,
    /// Mask of the address size.
    mask: u64,
    seg: u8,
    rep: bool,
    /// Stop when ZF is not this.
    until: Option<bool>,
}

fn plan(ins: &Instruction) -> Option<Plan> {
    use Mnemonic as M;
    let (op, size) = match ins.mnemonic() {
        M::Movsb => (Op::Movs, 1),
        M::Movsw => (Op::Movs, 2),
        M::Movsd => (Op::Movs, 4),
        M::Movsq => (Op::Movs, 8),
        M::Stosb => (Op::Stos, 1),
        M::Stosw => (Op::Stos, 2),
        M::Stosd => (Op::Stos, 4),
        M::Stosq => (Op::Stos, 8),
        M::Lodsb => (Op::Lods, 1),
        M::Lodsw => (Op::Lods, 2),
        M::Lodsd => (Op::Lods, 4),
        M::Lodsq => (Op::Lods, 8),
        M::Scasb => (Op::Scas, 1),
        M::Scasw => (Op::Scas, 2),
        M::Scasd => (Op::Scas, 4),
        M::Scasq => (Op::Scas, 8),
        M::Cmpsb => (Op::Cmps, 1),
        M::Cmpsw => (Op::Cmps, 2),
        M::Cmpsd => (Op::Cmps, 4),
        M::Cmpsq => (Op::Cmps, 8),
        M::Insb => (Op::Ins, 1),
        M::Insw => (Op::Ins, 2),
        M::Insd => (Op::Ins, 4),
        M::Outsb => (Op::Outs, 1),
        M::Outsw => (Op::Outs, 2),
        M::Outsd => (Op::Outs, 4),
        _ => return None,
    };
    let bytes = ins.op_kinds().find_map(|k| match k {
        OpKind::MemorySegSI | OpKind::MemorySegDI | OpKind::MemoryESDI => Some(2),
        OpKind::MemorySegESI | OpKind::MemorySegEDI | OpKind::MemoryESEDI => Some(4),
        OpKind::MemorySegRSI | OpKind::MemorySegRDI | OpKind::MemoryESRDI => Some(8),
        _ => None,
    })?;
    let compares = matches!(op, Op::Scas | Op::Cmps);
    let rep = ins.has_rep_prefix() || ins.has_repne_prefix();
    Some(Plan {
        op,
        size,
        mask: mask(bytes),
        seg: if matches!(op, Op::Movs | Op::Lods | Op::Cmps | Op::Outs) {
            sreg_index(ins.memory_segment())
        } else {
            sreg::DS as u8
        },
        rep,
        until: (compares && rep).then(|| !ins.has_repne_prefix()),
    })
}

/// Writes a register in the width of the address size.
fn put(v: &mut Inner, r: usize, m: u64, value: u64) {
    let g = &mut v.area.state.gpr[r];
    *g = if m == 0xffff { *g & !m | value & m } else { value & m };
}

pub(super) fn execute(v: &mut Inner, ins: &Instruction) -> Done {
    let Some(p) = plan(ins) else { return Err(Exception::ud()) };
    if matches!(p.op, Op::Ins | Op::Outs) {
        let port = v.area.state.gpr[reg::RDX] as u16;
        port_allowed(v, port, p.size)?;
    }
    if !p.rep {
        first(v, &p)?;
        return Ok(Flow::Next);
    }
    let mut steps = 0;
    if matches!(p.op, Op::Stos | Op::Movs) && p.mask == u64::from(u32::MAX) {
        // What the processors do, even when nothing is stored.
        let di = v.area.state.gpr[reg::RDI];
        put(v, reg::RDI, p.mask, di);
        if p.op == Op::Movs {
            let si = v.area.state.gpr[reg::RSI];
            put(v, reg::RSI, p.mask, si);
        }
    }
    let before = v.area.state.rflags;
    loop {
        let count = v.area.state.gpr[reg::RCX] & p.mask;
        // With 32-bit addresses the upper half is cleared even when the first iteration faults.
        put(v, reg::RCX, p.mask, count);
        if count == 0 {
            return Ok(Flow::Next);
        }
        let done = match p.op {
            Op::Movs | Op::Stos => bulk(v, &p, count),
            _ => 0,
        };
        let done = if done == 0 {
            let result = if steps == 0 { first(v, &p) } else { one(v, &p) };
            if let Err(e) = result {
                // SDM vol. 2, REP: a fault restores EFLAGS to what they were before CMPS or SCAS.
                v.area.state.rflags = before;
                return Err(e);
            }
            1
        } else {
            done
        };
        put(v, reg::RCX, p.mask, count - done);
        if let Some(zf) = p.until
            && (v.area.state.rflags & flags::ZF != 0) != zf
        {
            return Ok(Flow::Next);
        }
        steps += 1;
        let more = count != done;
        // A trap flag, a breakpoint or an interrupt comes between iterations.
        let single = v.area.state.rflags & flags::TF != 0 || v.lin.watch_hits != 0;
        let look = steps % BATCH == 0 || done > 1 || v.area.run == 0;
        if more && (single || look && v.area.run == 0 || v.wrote_code()) {
            if p.until.is_some() {
                // Stopped between iterations, the flags are those from before, as after a fault.
                v.area.state.rflags = before;
            }
            return Ok(Flow::Jump);
        }
    }
}

/// The first iteration. Emitted code that meets these pages again is to know them.
fn first(v: &mut Inner, p: &Plan) -> Result<(), Exception> {
    let (si, di) = (v.area.state.gpr[reg::RSI], v.area.state.gpr[reg::RDI]);
    one(v, p)?;
    if p.mask == u64::MAX && usize::from(p.seg) < sreg::FS {
        if matches!(p.op, Op::Movs | Op::Lods | Op::Cmps) {
            v.enter_string_page(si, false);
        }
        if matches!(p.op, Op::Movs | Op::Stos | Op::Scas | Op::Cmps) {
            v.enter_string_page(di, matches!(p.op, Op::Movs | Op::Stos));
        }
    }
    Ok(())
}

/// One iteration; registers but RCX are advanced.
fn one(v: &mut Inner, p: &Plan) -> Result<(), Exception> {
    let step = if v.area.state.rflags & flags::DF != 0 {
        (p.size as u64).wrapping_neg()
    } else {
        p.size as u64
    };
    let si = v.area.state.gpr[reg::RSI] & p.mask;
    let di = v.area.state.gpr[reg::RDI] & p.mask;
    let es = sreg::ES as u8;
    let (mut moves_si, mut moves_di) = (false, false);
    match p.op {
        Op::Movs => {
            let x = v.read_uint(p.seg, si, p.size)?;
            v.write_uint(es, di, p.size, x)?;
            (moves_si, moves_di) = (true, true);
        }
        Op::Stos => {
            let x = v.area.state.gpr[reg::RAX];
            v.write_uint(es, di, p.size, x)?;
            moves_di = true;
        }
        Op::Lods => {
            let x = v.read_uint(p.seg, si, p.size)?;
            let g = &mut v.area.state.gpr[reg::RAX];
            *g = match p.size {
                1 => *g & !0xff | x,
                2 => *g & !0xffff | x,
                _ => x,
            };
            moves_si = true;
        }
        Op::Scas => {
            let x = v.read_uint(es, di, p.size)?;
            let a = v.area.state.gpr[reg::RAX] & mask(p.size);
            compare(v, a, x, p.size);
            moves_di = true;
        }
        Op::Cmps => {
            let a = v.read_uint(p.seg, si, p.size)?;
            let b = v.read_uint(es, di, p.size)?;
            compare(v, a, b, p.size);
            (moves_si, moves_di) = (true, true);
        }
        Op::Ins => {
            let va = v.linear(es, di, p.size, true)?;
            let s = &v.area.state;
            let rights = Rights::explicit(s, Kind::Write);
            v.lin.resolve(s, va, p.size, rights, false)?;
            let port = v.area.state.gpr[reg::RDX] as u16;
            v.lin.platform_called = true;
            let x = v.lin.platform.port_read(port, p.size as u8);
            v.lin.watch_port(&v.area.state, port, p.size);
            v.write_uint(es, di, p.size, u64::from(x))?;
            moves_di = true;
        }
        Op::Outs => {
            let x = v.read_uint(p.seg, si, p.size)?;
            let port = v.area.state.gpr[reg::RDX] as u16;
            v.lin.platform_called = true;
            v.lin.platform.port_write(port, p.size as u8, x as u32);
            v.lin.watch_port(&v.area.state, port, p.size);
            moves_si = true;
        }
    }
    if moves_si {
        put(v, reg::RSI, p.mask, si.wrapping_add(step));
    }
    if moves_di {
        put(v, reg::RDI, p.mask, di.wrapping_add(step));
    }
    Ok(())
}

/// Flags of `a - b`.
fn compare(v: &mut Inner, a: u64, b: u64, size: usize) {
    let m = mask(size);
    let top = 1u64 << (size * 8 - 1);
    let r = a.wrapping_sub(b) & m;
    let mut f = v.area.state.rflags & !flags::ARITH;
    let mut put = |bit, on| {
        if on {
            f |= bit;
        }
    };
    put(flags::CF, a < b);
    put(flags::ZF, r == 0);
    put(flags::SF, r & top != 0);
    put(flags::OF, (a ^ b) & (a ^ r) & top != 0);
    put(flags::AF, (a ^ b ^ r) & 0x10 != 0);
    put(flags::PF, (r as u8).count_ones().is_multiple_of(2));
    v.area.state.rflags = f;
}

/// As many iterations of MOVS or STOS as lie in one page of source and destination RAM;
/// 0 when they have to be done one by one.
fn bulk(v: &mut Inner, p: &Plan, count: u64) -> u64 {
    let s = &v.area.state;
    let down = s.rflags & flags::DF != 0;
    if s.rflags & flags::TF != 0
        || down && (p.mask != u64::MAX || usize::from(p.seg) >= sreg::FS)
        || crate::mem::watching(s)
        || crate::mem::alignment_checked(s)
    {
        return 0;
    }
    let size = p.size as u64;
    let di = s.gpr[reg::RDI] & p.mask;
    let si = s.gpr[reg::RSI] & p.mask;
    let es = sreg::ES as u8;
    // Faults are raised by single iterations, in the right order.
    let Ok(to) = v.linear(es, di, p.size, true) else { return 0 };
    let from = if p.op == Op::Movs {
        let Ok(from) = v.linear(p.seg, si, p.size, false) else { return 0 };
        from
    } else {
        0
    };
    // Elements from one on that lie in its page.
    let room = |a: u64| {
        let offset = a & (PAGE - 1);
        match down {
            false => (PAGE - offset) / size,
            true if offset + size <= PAGE => offset / size + 1,
            true => 0,
        }
    };
    let reach = |a: u64| if down { u64::MAX } else { (p.mask - a) / size };
    let mut n = count.min(room(to)).min(reach(di));
    if p.op == Op::Movs {
        n = n.min(room(from)).min(reach(si));
    }
    if n < 2 {
        return 0;
    }
    // From here on the lowest addresses.
    let back = if down { (n - 1) * size } else { 0 };
    let (to, from) = (to.wrapping_sub(back), from.wrapping_sub(back));
    let len = (n * size) as usize;
    // Segment limits are checked for the whole run.
    if !down
        && (v.linear(es, di, len, true).is_err()
            || (p.op == Op::Movs && v.linear(p.seg, si, len, false).is_err()))
    {
        return 0;
    }
    let s = &v.area.state;
    let src = if p.op == Op::Movs {
        let rights = Rights::explicit(s, Kind::Read);
        let Ok(r) = v.lin.resolve(s, from, len, rights, usize::from(p.seg) == sreg::SS) else {
            return 0;
        };
        Some(r.first.gpa)
    } else {
        None
    };
    let rights = Rights::explicit(s, Kind::Write);
    let Ok(dst) = v.lin.resolve(s, to, len, rights, false) else { return 0 };
    let dst = dst.first.gpa;
    let len = len as u64;
    let ram = &v.lin.shared.ram;
    if !ram.contains(dst, len) || src.is_some_and(|a| !ram.contains(a, len)) {
        return 0;
    }
    // Over translated code, perhaps this very instruction: each iteration is looked at.
    if v.lin.shared.has_code(dst / PAGE) {
        return 0;
    }
    match src {
        // Each element is read after the one before it was written, which shows.
        Some(a) if !down && dst > a && dst < a + len => return 0,
        Some(a) if down && dst < a && a < dst + len => return 0,
        Some(a) => ram.copy(a, dst, len),
        None => {
            let x = s.gpr[reg::RAX].to_le_bytes();
            ram.fill(dst, len, &x[..p.size]);
        }
    }
    v.lin.written(dst, len);
    if p.mask == u64::MAX && usize::from(p.seg) < sreg::FS {
        v.enter_string_page(to, true);
        if p.op == Op::Movs {
            v.enter_string_page(from, false);
        }
    }
    let step = if down { len.wrapping_neg() } else { len };
    put(v, reg::RDI, p.mask, di.wrapping_add(step));
    if p.op == Op::Movs {
        put(v, reg::RSI, p.mask, si.wrapping_add(step));
    }
    n
}

impl Inner {
    fn wrote_code(&self) -> bool {
        !self.lin.dirty_code.is_empty()
    }
}
