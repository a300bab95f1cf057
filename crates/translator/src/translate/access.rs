//! Memory operands, and instructions that are emitted as they are.

use std::ops::Range;

use arrayvec::ArrayVec;
use iced_x86::{
    Code, Instruction, InstructionInfoOptions, MemorySize, Mnemonic, OpAccess, OpKind, Register,
};

use berth_x86::CpuState;
use berth_x86::state::sreg;

use super::decode::{Unit, unit};
use super::regs::{GuestReg, host_reg};
use super::string::StringOp;
use super::{Cold, Ends, Translation};
use crate::asm::Mem;
use crate::code::{Is, Place, Site, Through};
use crate::layout::{
    Area, GUEST_RCX, GUEST_RSP, MAX_ACCESS_SHIFT, S0, S1, SC, TMP, disp, gpr_disp, host, mapped,
    state_disp,
};

/// An access whose address is in a register and whose look-up has been emitted.
#[derive(Clone, Copy, Debug)]
pub struct Access {
    pub(super) site: usize,
    /// The register with the guest address.
    pub ea: u8,
    /// To be added to it; the host address is the sum plus [`SC`].
    pub disp: i32,
}

/// Operands of an instruction.
const OPERANDS_MAX: usize = 5;
/// Scratch registers to be stored, and the guest registers they are.
type Temps = ArrayVec<(u8, GuestReg), OPERANDS_MAX>;

/// What PUSH stores.
#[derive(Clone, Copy)]
enum Pushed {
    Register(u8),
    Immediate(i32),
    /// What lies in [`Area::tmp`].
    Kept,
}

/// What is to be done with the bytes.
#[derive(Clone, Copy, Debug)]
pub struct Want {
    /// Bytes.
    pub size: usize,
    /// They are read.
    pub read: bool,
    /// They are written.
    pub write: bool,
}

/// Alignment an instruction demands of its memory operand (SDM vol. 2, 2.4): legacy SSE with 16
/// bytes but for the unaligned moves and string comparisons; of VEX only the aligned moves.
fn alignment(ins: &Instruction, unit: Unit) -> u8 {
    use Mnemonic as M;
    let m = ins.mnemonic();
    if m == M::Cmpxchg16b {
        return 16;
    }
    let size = access_size(ins);
    if unit == Unit::None {
        return 1;
    }
    if unit == Unit::Avx {
        let aligned = matches!(
            m,
            M::Vmovaps
                | M::Vmovapd
                | M::Vmovdqa
                | M::Vmovntps
                | M::Vmovntpd
                | M::Vmovntdq
                | M::Vmovntdqa
        );
        return if aligned { size as u8 } else { 1 };
    }
    let sse = (0..ins.op_count())
        .any(|i| ins.op_kind(i) == OpKind::Register && ins.op_register(i).is_xmm())
        || matches!(m, M::Cvtpd2pi | M::Cvttpd2pi);
    let free = matches!(
        m,
        M::Movups
            | M::Movupd
            | M::Movdqu
            | M::Lddqu
            | M::Pcmpestri
            | M::Pcmpestri64
            | M::Pcmpestrm
            | M::Pcmpestrm64
            | M::Pcmpistri
            | M::Pcmpistrm
    );
    if sse && size == 16 && !free { 16 } else { 1 }
}

/// Segment register of the memory operand. In 64-bit mode the old segment overrides mean nothing.
pub fn segment_of(ins: &Instruction, bits: u8) -> u8 {
    let seg = ins.memory_segment();
    if bits != 64 || matches!(seg, Register::FS | Register::GS) {
        return sreg_index(seg);
    }
    let stack = matches!(ins.memory_base().full_register(), Register::RSP | Register::RBP);
    if stack { 2 } else { 3 }
}

/// Number of a segment register, as in [`sreg`].
pub fn sreg_index(r: Register) -> u8 {
    match r {
        Register::ES => 0,
        Register::CS => 1,
        Register::SS => 2,
        Register::FS => 4,
        Register::GS => 5,
        _ => 3,
    }
}

impl Translation {
    /// Loads guest register `n` into `dst`.
    pub(super) fn load_guest(&mut self, dst: u8, n: u8) {
        match mapped(n) {
            Some(h) if h == dst => {}
            Some(h) => self.asm.mov(dst, h),
            None => self.asm.load(dst, &Mem::gs(gpr_disp(n))),
        }
    }

    /// Puts the offset of a memory operand (without segment base) into a register: its own, when it
    /// is a plain mapped base, else [`S0`]. May use [`S1`].
    pub(super) fn offset_of(&mut self, ins: &Instruction, may_alias: bool) -> u8 {
        let base = GuestReg::of(ins.memory_base()).filter(|g| g.size == 8);
        let plain = ins.memory_index() == Register::None && ins.memory_displacement64() == 0;
        if may_alias
            && plain
            && let Some(h) = base.and_then(|g| mapped(g.n))
        {
            return h;
        }
        self.offset_into(ins, S0, 8);
        S0
    }

    /// Puts the lowest `bytes` (4 or 8) bytes of the offset of a memory operand into `dst`. May use
    /// [`S0`] and [`S1`].
    fn offset_into(&mut self, ins: &Instruction, dst: u8, bytes: usize) {
        let base = ins.memory_base();
        let displ = ins.memory_displacement64();
        let cut = |v: u64| if bytes == 4 { v & 0xffff_ffff } else { v };
        if base == Register::RIP || base == Register::EIP {
            self.movable &= bytes == 8 && base == Register::RIP;
            self.load_address(dst, cut(displ), false);
            return;
        }
        let addr_size = match (base, ins.memory_index()) {
            (Register::None, Register::None) => ins.memory_displ_size() as usize,
            (Register::None, i) => i.size(),
            (b, _) => b.size(),
        };
        let base = GuestReg::of(base);
        let index = GuestReg::of(ins.memory_index());
        let shift = ins.memory_index_scale().trailing_zeros() as u8;
        let d = displ as i32;
        let from = match (base, index) {
            (None, None) => {
                let v = match addr_size {
                    2 => displ & 0xffff,
                    4 if self.mode.bits != 64 => displ & 0xffff_ffff,
                    _ => displ,
                };
                self.asm.mov_imm(dst, cut(v));
                return;
            }
            (Some(b), None) => Mem::base(self.guest_or_scratch(b.n, S0), d),
            (None, Some(i)) => Mem::index(self.guest_or_scratch(i.n, S0), shift, d),
            (Some(b), Some(i)) => {
                let hb = self.guest_or_scratch(b.n, S0);
                let hi = self.guest_or_scratch(i.n, if hb == S0 { S1 } else { S0 });
                Mem::base_index(hb, hi, shift, d)
            }
        };
        match addr_size.min(bytes) {
            8 => self.asm.lea(dst, &from),
            4 => self.asm.lea32(dst, &from),
            _ => {
                self.asm.lea32(dst, &from);
                self.asm.movzx16(dst, dst);
            }
        }
    }

    pub(super) fn guest_or_scratch(&mut self, n: u8, scratch: u8) -> u8 {
        mapped(n).unwrap_or_else(|| {
            self.asm.load(scratch, &Mem::gs(gpr_disp(n)));
            scratch
        })
    }

    /// Emits address and look-up of the memory operand of `ins`.
    pub(super) fn operand(&mut self, ins: &Instruction, want: Want) -> Access {
        if let Some(access) = self.shared_operand(ins, want) {
            return access;
        }
        self.reserve(40);
        let start = self.asm.pos();
        let seg = segment_of(ins, self.mode.bits);
        let segmented = self.segmented(seg);
        let mut ea = self.offset_of(ins, true);
        if self.mode.bits == 64 && usize::from(seg) >= sreg::FS {
            let base = state_disp(
                std::mem::offset_of!(CpuState, seg)
                    + usize::from(seg) * size_of::<berth_x86::Segment>()
                    + std::mem::offset_of!(berth_x86::Segment, base),
            );
            self.asm.load(S1, &Mem::gs(base));
            self.asm.lea(S0, &Mem::base_index(ea, S1, 0, 0));
            ea = S0;
        }
        let code = start..self.asm.pos();
        self.look_up(ea, want, seg, segmented, code)
    }

    /// Whether accesses through a segment register need its base and limit.
    pub(super) fn segmented(&self, seg: u8) -> bool {
        self.mode.bits != 64 && (!self.mode.flat || usize::from(seg) >= sreg::FS)
    }

    /// Emits the look-up of the linear address in `ea`.
    pub(super) fn look_up(
        &mut self,
        ea: u8,
        want: Want,
        seg: u8,
        segmented: bool,
        ea_code: Range<usize>,
    ) -> Access {
        self.reserve(48);
        self.held = None;
        let cold = self.cold.len();
        let look = self.asm.pos() as u16;
        let mut looked = None;
        let mut lazy = true;
        let shift = want.size.next_power_of_two().trailing_zeros() as usize;
        if segmented || self.mode.aligned || shift > MAX_ACCESS_SHIFT {
            let jump = self.asm.jmp();
            self.near.push((jump, cold));
            lazy = false;
        } else {
            if shift > 0 && (self.mode.checked || self.ends == Ends::Cross) {
                // In the last slot of the page? Then it may cross.
                let slot = std::mem::offset_of!(Area, slot_mask) + shift * 8;
                self.asm.pext_gs(SC, ea, disp(slot));
                self.asm.lea(SC, &Mem::base(SC, -((4096 >> shift) - 1)));
                let s = self.asm.jrcxz();
                let go_on = self.asm.pos();
                self.pending.push((s, cold));
                looked = Some(go_on);
            }
            let mask = std::mem::offset_of!(Area, page_mask) + usize::from(!self.mode.user) * 8;
            self.asm.pext_gs(SC, ea, disp(mask));
            self.asm.load(SC, &Mem::gs_index8(SC, 0));
        }
        let op = self.asm.pos() as u16;
        let place = Place::Register { ea, start: ea_code.start as u16, len: ea_code.len() as u8 };
        let mut site = self.site_of(want, seg, place);
        (site.look, site.op) = (look, op);
        site.is.set(Is::SEGMENTED, segmented);
        let site = self.site(site);
        if let Some(go_on) = looked {
            // Before the slow path, to which it jumps forwards.
            let last = want.size as i32 - 1;
            self.cold.push(Cold::Look { site, ea, last, go_on, mem: cold + 1 });
        }
        if looked.is_some() || !lazy {
            self.cold.push(Cold::Mem { site });
        }
        Access { site, ea, disp: 0 }
    }

    /// What is known of an access of the current instruction before it is emitted.
    pub(super) fn site_of(&self, want: Want, seg: u8, place: Place) -> Site {
        let mut is = Is::SIMPLE;
        is.set(Is::READ, want.read);
        is.set(Is::WRITE, want.write);
        is.set(Is::X87, self.x87);
        is.set(Is::MMX, self.mmx);
        is.set(Is::CONVERTS, self.converts);
        Site::new(place, want.size, is, seg, self.align)
    }

    /// Says that everything that belongs to the access has been emitted.
    pub(super) fn end_access(&mut self, a: Access) {
        self.notes.sites[a.site].op_end = self.asm.pos() as u16;
        self.reserve(0);
    }

    /// An instruction of the "plain" class.
    pub(super) fn plain(&mut self, ins: &Instruction, common: Option<OpAccess>) {
        if common.is_some() && ins.mnemonic() != Mnemonic::Lea {
            let mut ins = *ins;
            normalize(&mut ins);
            return self.renamed(&ins, common);
        }
        if let Some(op) = StringOp::of(ins) {
            self.close_windows();
            return self.string(ins, op);
        }
        match ins.mnemonic() {
            Mnemonic::Push => return self.push(ins),
            Mnemonic::Pop => return self.pop(ins),
            Mnemonic::Leave => return self.leave(),
            Mnemonic::Lea => return self.lea_instruction(ins),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
                if ins.op0_kind() == OpKind::Memory && ins.op1_kind() == OpKind::Register =>
            {
                return self.bit_string(ins);
            }
            _ => {}
        }
        let mut ins = *ins;
        normalize(&mut ins);
        let unit = unit(&ins);
        self.align = alignment(&ins, unit);
        self.x87 = matches!(unit, Unit::X87 | Unit::Mmx)
            && !matches!(ins.mnemonic(), Mnemonic::Fnstcw | Mnemonic::Fnstsw);
        self.mmx = unit == Unit::Mmx;
        self.converts = matches!(ins.mnemonic(), Mnemonic::Vcvtph2ps | Mnemonic::Vcvtps2ph);
        self.renamed(&ins, None);
        self.align = 1;
        self.x87 = false;
        self.mmx = false;
        self.converts = false;
    }

    /// How each operand is accessed.
    fn accesses(&mut self, ins: &Instruction, common: Option<OpAccess>) -> [OpAccess; 5] {
        const OPERANDS: u32 =
            InstructionInfoOptions::NO_REGISTER_USAGE | InstructionInfoOptions::NO_MEMORY_USAGE;
        if let Some(first) = common {
            return [first, OpAccess::Read, OpAccess::Read, OpAccess::None, OpAccess::None];
        }
        let info = self.infos.info_options(ins, OPERANDS);
        std::array::from_fn(|i| {
            if (i as u32) < ins.op_count() { info.op_access(i as u32) } else { OpAccess::None }
        })
    }

    /// Re-encodes an instruction with its registers renamed and its memory operand looked up.
    fn renamed(&mut self, ins: &Instruction, common: Option<OpAccess>) {
        let mut out = *ins;
        let access = self.accesses(ins, common);
        let mem = (0..ins.op_count()).find(|&i| ins.op_kind(i) == OpKind::Memory);
        let rcx_pair = matches!(ins.mnemonic(), Mnemonic::Cmpxchg8b | Mnemonic::Cmpxchg16b);
        let writes_ecx = matches!(
            ins.mnemonic(),
            Mnemonic::Pcmpestri
                | Mnemonic::Pcmpestri64
                | Mnemonic::Pcmpistri
                | Mnemonic::Vpcmpestri
                | Mnemonic::Vpcmpestri64
                | Mnemonic::Vpcmpistri
        );
        let mut plan = Plan::default();
        plan.free(S1);
        if mem.is_none() {
            plan.free(S0);
        }
        for i in 0..ins.op_count() {
            if ins.op_kind(i) != OpKind::Register {
                continue;
            }
            let Some(g) = GuestReg::of(ins.op_register(i)) else { continue };
            if is_fixed_cl(ins, i) {
                plan.cl = true;
            } else if let Some(r) = g.direct() {
                out.set_op_register(i, r);
            } else {
                plan.wanted.push((i, g, access[i as usize]));
            }
        }
        let absolute = mem.is_some() && (plan.cl || rcx_pair || plan.wanted.len() > 1);
        if !plan.cl && !rcx_pair && (mem.is_none() || absolute) {
            plan.free(SC);
        }
        let a = mem.map(|_| {
            let size = access_size(ins);
            let acc = mem.map_or(OpAccess::None, |m| access[m as usize]);
            let write = matches!(
                acc,
                OpAccess::Write
                    | OpAccess::CondWrite
                    | OpAccess::ReadWrite
                    | OpAccess::ReadCondWrite
            );
            let read = !matches!(acc, OpAccess::Write);
            self.operand(ins, Want { size, read, write })
        });
        if let Some(a) = a {
            if absolute {
                self.notes.sites[a.site].is.remove(Is::SIMPLE);
                self.asm.lea(S0, &Mem::base_index(a.ea, SC, 0, a.disp));
                set_memory(&mut out, S0, None, 0);
            } else {
                set_memory(&mut out, a.ea, Some(SC), a.disp);
            }
        }
        let stores = self.load_temps(&mut out, &mut plan);
        if plan.cl || rcx_pair || writes_ecx || plan.took_sc {
            self.held = None;
        }
        if plan.cl || rcx_pair {
            self.asm.mov(SC, GUEST_RCX);
        }
        self.reserve_if_unlooked(a);
        self.encode(&out);
        self.store_temps(&stores);
        if writes_ecx {
            self.asm.mov32(GUEST_RCX, SC);
        }
        if let Some(a) = a {
            self.end_access(a);
        }
    }

    /// Without an access there is nothing that may not be split by an island.
    fn reserve_if_unlooked(&mut self, a: Option<Access>) {
        if a.is_none() {
            self.reserve(0);
        }
    }

    fn load_temps(&mut self, out: &mut Instruction, plan: &mut Plan) -> Temps {
        let mut stores = Temps::new();
        let mut seen = ArrayVec::<(u8, bool, u8), OPERANDS_MAX>::new();
        for (i, g, acc) in std::mem::take(&mut plan.wanted) {
            let known = seen.iter().find(|s| s.0 == g.n && s.1 == g.high).map(|s| s.2);
            let t = known.or_else(|| plan.take()).expect("an instruction names at most three");
            let reads = !matches!(acc, OpAccess::Write) || g.size < 4;
            if known.is_none() && (reads || self.read_elsewhere(out, g.n)) {
                if g.high {
                    let h = mapped(g.n).expect("AH, CH, DH and BH are parts of mapped registers");
                    self.asm.rorx(t, h, 8);
                } else {
                    self.load_guest(t, g.n);
                }
            }
            seen.push((g.n, g.high, t));
            out.set_op_register(i, host_reg(t, g.size));
            if !matches!(acc, OpAccess::Read | OpAccess::CondRead | OpAccess::None)
                && !stores.iter().any(|&(s, _)| s == t)
            {
                stores.push((t, g));
            }
        }
        stores
    }

    /// Conservative: whether another operand may name the same register.
    fn read_elsewhere(&self, out: &Instruction, n: u8) -> bool {
        (0..out.op_count())
            .filter(|&i| {
                out.op_kind(i) == OpKind::Register
                    && GuestReg::of(out.op_register(i)).is_some_and(|g| g.n == n)
            })
            .count()
            > 1
    }

    fn store_temps(&mut self, stores: &[(u8, GuestReg)]) {
        for &(t, g) in stores {
            if g.high {
                let h = mapped(g.n).expect("AH, CH, DH and BH are parts of mapped registers");
                self.asm.rorx(h, h, 8);
                // mov h8, t8 with a REX prefix, so that the low bytes are meant.
                let rex = 0x40 | ((h >> 3) << 2) | (t >> 3);
                self.asm.bytes(&[rex, 0x8a, 0xc0 | ((h & 7) << 3) | (t & 7)]);
                self.asm.rorx(h, h, 56);
            } else {
                self.asm.store(&Mem::gs(gpr_disp(g.n)), t);
            }
        }
    }

    fn lea_instruction(&mut self, ins: &Instruction) {
        let Some(g) = GuestReg::of(ins.op0_register()) else { return };
        if let Some(h) = mapped(g.n)
            && g.size >= 4
        {
            self.offset_into(ins, h, g.size);
            return;
        }
        let r = self.offset_of(ins, true);
        let Some(h) = mapped(g.n) else {
            let m = Mem::gs(gpr_disp(g.n));
            match g.size {
                8 => self.asm.store(&m, r),
                4 => {
                    self.asm.mov32(S0, r);
                    self.asm.store(&m, S0);
                }
                _ => {
                    self.asm.buf.push(0x66);
                    self.asm.op_mem(false, &[0x89], r, &m);
                }
            }
            return;
        };
        self.asm.buf.push(0x66);
        self.asm.op_reg(false, &[0x8b], h, r);
    }

    /// BT, BTS, BTR, BTC with a memory operand and a register: a bit string of any length.
    fn bit_string(&mut self, ins: &Instruction) {
        self.reserve(70);
        let Some(index) = GuestReg::of(ins.op1_register()) else { return };
        let size = index.size;
        let seg = segment_of(ins, self.mode.bits);
        let segmented = self.segmented(seg);
        let start = self.asm.pos();
        let wide = |r: Register| if r == Register::None { 0 } else { r.size() };
        let addr = match wide(ins.memory_base()).max(wide(ins.memory_index())) {
            0 => ins.memory_displ_size() as usize,
            n => n,
        };
        let ea = self.offset_of(ins, false);
        debug_assert_eq!(ea, S0);
        self.load_guest(S1, index.n);
        match size {
            4 => self.asm.movsxd(S1, S1),
            2 => self.asm.movsx16(S1, S1),
            _ => {}
        }
        let shift = size.trailing_zeros() as u8;
        self.asm.mov_imm(SC, u64::from(shift) + 3);
        self.asm.sarx(SC, S1, SC);
        self.asm.lea(S0, &Mem::base_index(S0, SC, shift, 0));
        match addr {
            2 => self.asm.movzx16(S0, S0),
            8 if self.mode.bits == 64 => {}
            _ => self.asm.mov32(S0, S0),
        }
        if self.mode.bits == 64 && usize::from(seg) >= sreg::FS {
            let base = std::mem::offset_of!(CpuState, seg)
                + usize::from(seg) * size_of::<berth_x86::Segment>()
                + std::mem::offset_of!(berth_x86::Segment, base);
            self.asm.load(SC, &Mem::gs(state_disp(base)));
            self.asm.lea(S0, &Mem::base_index(S0, SC, 0, 0));
        }
        let mask = std::mem::offset_of!(Area, bit_mask) + usize::from(shift) * 8;
        self.asm.pext_gs(S1, S1, disp(mask));
        let code = start..self.asm.pos();
        let write = ins.mnemonic() != Mnemonic::Bt;
        let a = self.look_up(S0, Want { size, read: true, write }, seg, segmented, code);
        let mut out = *ins;
        set_memory(&mut out, S0, Some(SC), 0);
        out.set_op1_register(host_reg(S1, size));
        self.encode(&out);
        self.end_access(a);
    }

    fn push(&mut self, ins: &Instruction) {
        let value = match ins.op0_kind() {
            OpKind::Register => match GuestReg::of(ins.op0_register()) {
                Some(g) => Pushed::Register(g.n),
                None => return,
            },
            OpKind::Memory => {
                let a = self.operand(ins, Want { size: 8, read: true, write: false });
                self.asm.load(S0, &Mem::base_index(a.ea, SC, 0, a.disp));
                self.end_access(a);
                self.asm.store(&Mem::gs(TMP), S0);
                Pushed::Kept
            }
            _ => Pushed::Immediate(ins.immediate(0) as i32),
        };
        let want = Want { size: 8, read: false, write: true };
        if let Some(a) = self.shared(Through::base(4), -8, want, 2) {
            self.store_pushed(value, &Mem::base_index(GUEST_RSP, SC, 0, -8));
            self.asm.add_guest_rsp(-8);
            self.end_access(a);
            return;
        }
        let start = self.asm.pos();
        self.asm.lea(S0, &Mem::base(GUEST_RSP, -8));
        let code = start..self.asm.pos();
        let a = self.look_up(S0, want, 2, false, code);
        self.store_pushed(value, &Mem::base_index(S0, SC, 0, 0));
        self.asm.mov(GUEST_RSP, S0);
        self.end_access(a);
    }

    fn store_pushed(&mut self, value: Pushed, to: &Mem) {
        let src = match value {
            Pushed::Immediate(value) => return self.asm.store_imm(to, value),
            Pushed::Register(n) => self.guest_or_scratch(n, S1),
            Pushed::Kept => {
                self.asm.load(S1, &Mem::gs(TMP));
                S1
            }
        };
        self.asm.store(to, src);
    }

    fn pop(&mut self, ins: &Instruction) {
        let Some(g) = GuestReg::of(ins.op0_register()) else { return };
        let want = Want { size: 8, read: true, write: false };
        let a = self
            .shared(Through::base(4), 0, want, 2)
            .unwrap_or_else(|| self.look_up(GUEST_RSP, want, 2, false, 0..0));
        let from = Mem::base_index(GUEST_RSP, SC, 0, 0);
        match mapped(g.n) {
            Some(GUEST_RSP) => self.asm.load(GUEST_RSP, &from),
            Some(h) => {
                self.asm.load(h, &from);
                self.asm.add_guest_rsp(8);
            }
            None => {
                self.asm.load(S1, &from);
                self.asm.store(&Mem::gs(gpr_disp(g.n)), S1);
                self.asm.add_guest_rsp(8);
            }
        }
        self.end_access(a);
    }

    fn leave(&mut self) {
        let want = Want { size: 8, read: true, write: false };
        let a = self
            .shared(Through::base(5), 0, want, 2)
            .unwrap_or_else(|| self.look_up(host::RBP, want, 2, false, 0..0));
        self.asm.load(S1, &Mem::base_index(host::RBP, SC, 0, 0));
        self.asm.lea(GUEST_RSP, &Mem::base(host::RBP, 8));
        self.asm.mov(host::RBP, S1);
        self.end_access(a);
    }
}

/// Temporaries of one instruction.
#[derive(Default)]
struct Plan {
    pool: ArrayVec<u8, 3>,
    wanted: ArrayVec<(u32, GuestReg, OpAccess), OPERANDS_MAX>,
    cl: bool,
    took_sc: bool,
}

impl Plan {
    fn free(&mut self, r: u8) {
        self.pool.push(r);
    }
    fn take(&mut self) -> Option<u8> {
        let r = self.pool.pop_at(0)?;
        self.took_sc |= r == SC;
        Some(r)
    }
}

/// Whether operand `i` is the CL of a shift or rotate, which has no other register form.
fn is_fixed_cl(ins: &Instruction, i: u32) -> bool {
    ins.op_register(i) == Register::CL
        && i + 1 == ins.op_count()
        && matches!(
            ins.mnemonic(),
            Mnemonic::Rol
                | Mnemonic::Ror
                | Mnemonic::Rcl
                | Mnemonic::Rcr
                | Mnemonic::Shl
                | Mnemonic::Sal
                | Mnemonic::Shr
                | Mnemonic::Sar
                | Mnemonic::Shld
                | Mnemonic::Shrd
        )
}

/// Replaces the memory operand by `[base + index + disp]`.
fn set_memory(out: &mut Instruction, base: u8, index: Option<u8>, disp: i32) {
    out.set_memory_base(host_reg(base, 8));
    out.set_memory_index(index.map_or(Register::None, |i| host_reg(i, 8)));
    out.set_memory_index_scale(1);
    out.set_memory_displacement64(i64::from(disp) as u64);
    out.set_memory_displ_size(match i8::try_from(disp) {
        Ok(0) => u32::from(base & 7 == 5),
        Ok(_) => 1,
        Err(_) => 8,
    });
    out.set_segment_prefix(Register::None);
}

/// Bytes a memory operand covers.
pub fn access_size(ins: &Instruction) -> usize {
    match ins.memory_size() {
        MemorySize::FpuEnv14 => 14,
        MemorySize::FpuEnv28 => 28,
        MemorySize::FpuState94 => 94,
        MemorySize::FpuState108 => 108,
        m => m.size().max(1),
    }
}

/// Turns forms that 64-bit code lacks into ones it has.
fn normalize(ins: &mut Instruction) {
    let code = match ins.code() {
        Code::Inc_r16 => Code::Inc_rm16,
        Code::Inc_r32 => Code::Inc_rm32,
        Code::Dec_r16 => Code::Dec_rm16,
        Code::Dec_r32 => Code::Dec_rm32,
        Code::Mov_AL_moffs8 => Code::Mov_r8_rm8,
        Code::Mov_AX_moffs16 => Code::Mov_r16_rm16,
        Code::Mov_EAX_moffs32 => Code::Mov_r32_rm32,
        Code::Mov_RAX_moffs64 => Code::Mov_r64_rm64,
        Code::Mov_moffs8_AL => Code::Mov_rm8_r8,
        Code::Mov_moffs16_AX => Code::Mov_rm16_r16,
        Code::Mov_moffs32_EAX => Code::Mov_rm32_r32,
        Code::Mov_moffs64_RAX => Code::Mov_rm64_r64,
        // 82 is the same as 80, but not in 64-bit mode.
        Code::Add_rm8_imm8_82 => Code::Add_rm8_imm8,
        Code::Or_rm8_imm8_82 => Code::Or_rm8_imm8,
        Code::Adc_rm8_imm8_82 => Code::Adc_rm8_imm8,
        Code::Sbb_rm8_imm8_82 => Code::Sbb_rm8_imm8,
        Code::And_rm8_imm8_82 => Code::And_rm8_imm8,
        Code::Sub_rm8_imm8_82 => Code::Sub_rm8_imm8,
        Code::Xor_rm8_imm8_82 => Code::Xor_rm8_imm8,
        Code::Cmp_rm8_imm8_82 => Code::Cmp_rm8_imm8,
        c => c,
    };
    ins.set_code(code);
    // Hints for lock elision and branches have no meaning here.
    ins.set_has_xacquire_prefix(false);
    ins.set_has_xrelease_prefix(false);
}
