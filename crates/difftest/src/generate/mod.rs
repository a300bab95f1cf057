//! Makes cases from a seed.
//!
//! A sequence is built instruction by instruction. The builder knows which register contents are
//! certain, so memory operands go where they shall; it keeps flags that the manual leaves undefined
//! from being read by a later instruction (a compare is put between), since they would spread.

mod assemble;
mod catalog;
mod flow;
mod memory;
mod operands;
mod registers;
mod state;
mod templates;

use iced_x86::{Code, Instruction, InstructionInfoFactory, Mnemonic, OpAccess, OpKind, Register};

use berth_x86::state::XsaveArea;

use crate::case::{Case, Mode, Patch};
use crate::compare::conditional_flags;
use crate::generate::assemble::{Item, Label, assemble};
use crate::generate::catalog::{Catalog, Kind};
use crate::generate::registers::{RSP, Registers};
use crate::layout::{CODE, STACK, World};
use crate::rng::Rng;

pub use crate::generate::assemble::is_prefix;

/// Most host instructions before the first stop.
const STOP_AFTER_MAX: u32 = 60;

/// Makes cases.
pub struct Generator {
    catalogs: [Catalog; 2],
    seed: u64,
    options: Options,
}

/// What kinds of cases are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Percent of cases in 32-bit compatibility mode.
    pub compat_percent: u32,
    /// Percent of cases with an instruction made to fault.
    pub fault_percent: u32,
    /// Most instructions asked for in a sequence (helpers such as pointer loads come on top).
    pub instructions: u32,
    /// Cases may set TF or AC through POPF.
    pub trap_flags: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { compat_percent: 12, fault_percent: 25, instructions: 12, trap_flags: true }
    }
}

impl Generator {
    /// A generator for a seed.
    #[must_use]
    pub fn new(seed: u64, options: Options) -> Self {
        let catalogs = [Catalog::new(Mode::Bits64), Catalog::new(Mode::Compat32)];
        Self { catalogs, seed, options }
    }

    /// All encodings generated in a mode.
    pub fn codes(&self, mode: Mode) -> impl Iterator<Item = Code> {
        self.catalogs[mode as usize].all()
    }

    /// Case number `number`; the same for the same seed and options.
    #[must_use]
    pub fn case(&self, number: u64) -> Case {
        let mut rng = Rng::for_case(self.seed, number);
        loop {
            let mode = if rng.percent(self.options.compat_percent) {
                Mode::Compat32
            } else {
                Mode::Bits64
            };
            let catalog = &self.catalogs[mode as usize];
            let builder = Builder::new(mode, catalog, self.options, Rng::new(rng.next_u64()));
            if let Some(case) = builder.build() {
                return case;
            }
        }
    }
}

/// A sequence in the making.
pub(crate) struct Builder<'a> {
    mode: Mode,
    world: World,
    catalog: &'a Catalog,
    options: Options,
    rng: Rng,
    regs: Registers,
    rflags: u64,
    xsave: XsaveArea,
    vectors_used: u32,
    fs_base: Option<u64>,
    gs_base: Option<u64>,
    /// Base, index and scale of the last memory operand.
    registers: Option<(Option<usize>, Option<usize>, u32)>,
    bases: [u64; 2],
    items: Vec<Item>,
    /// For each label, the item it stands before.
    labels: Vec<usize>,
    /// Labels to be placed after so many more items.
    pending: Vec<(Label, u32)>,
    patches: Vec<Patch>,
    /// Image offsets that get the address of a label.
    pointers: Vec<(u32, Label)>,
    masked: Vec<(u32, u32)>,
    /// Flags undefined now.
    undefined: u32,
    fault_wanted: bool,
    no_memory: bool,
    info: InstructionInfoFactory,
}

impl<'a> Builder<'a> {
    fn new(mode: Mode, catalog: &'a Catalog, options: Options, mut rng: Rng) -> Self {
        let world =
            if mode == Mode::Compat32 || rng.percent(50) { World::Low } else { World::High };
        let stack = world.base() + u64::from(STACK.offset);
        let sp = match rng.below(20) {
            0 => stack + u64::from(rng.below(64)),
            1 => stack + u64::from(STACK.len() - rng.below(64)),
            2 => stack + u64::from(rng.below(STACK.len())),
            _ => stack + u64::from(STACK.len() / 2 + 8 * rng.below(64)),
        };
        let bases = state::segment_bases(mode, world, &mut rng);
        let xsave = state::initial_xsave(&mut rng);
        let fault_wanted = rng.percent(options.fault_percent);
        let (fs_base, gs_base) = (Some(bases[0]), Some(bases[1]));
        Self {
            mode,
            world,
            catalog,
            options,
            regs: Registers::new(sp),
            rflags: state::initial_flags(&mut rng),
            xsave,
            vectors_used: 0,
            // In compatibility mode the selectors are null, so FS and GS cannot be used.
            fs_base: fs_base.filter(|_| mode == Mode::Bits64),
            gs_base: gs_base.filter(|_| mode == Mode::Bits64),
            registers: None,
            bases,
            items: Vec::new(),
            labels: Vec::new(),
            pending: Vec::new(),
            patches: Vec::new(),
            pointers: Vec::new(),
            masked: Vec::new(),
            undefined: 0,
            fault_wanted,
            no_memory: false,
            info: InstructionInfoFactory::new(),
            rng,
        }
    }

    fn build(mut self) -> Option<Case> {
        let wanted = 1 + self.rng.below(self.options.instructions);
        let mut tries = 0;
        let mut made = 0;
        while made < wanted && tries < 20 * wanted {
            tries += 1;
            let marks = (self.items.len(), self.labels.len(), self.pointers.len());
            let saved = (self.regs.clone(), self.pending.clone(), self.patches.len());
            let (undefined, masked) = (self.undefined, self.masked.len());
            if self.step().is_some() {
                made += 1;
            } else {
                // What was begun is taken back; choices of initial values made for it too.
                self.items.truncate(marks.0);
                self.labels.truncate(marks.1);
                self.pointers.truncate(marks.2);
                (self.regs, self.pending) = (saved.0, saved.1);
                self.patches.truncate(saved.2);
                self.undefined = undefined;
                self.masked.truncate(masked);
            }
        }
        self.finish()
    }

    fn finish(mut self) -> Option<Case> {
        let end = self.items.len();
        for (Label(l), _) in std::mem::take(&mut self.pending) {
            self.labels[l] = end;
        }
        let code_at = match self.rng.below(10) {
            // Across the page boundary, or up to the end of the code.
            0..=2 => crate::layout::PAGE - self.rng.below(64),
            3 => CODE.len().checked_sub(64 + self.rng.below(256))?,
            _ => self.rng.below(crate::layout::PAGE),
        };
        let entry = self.world.base() + u64::from(CODE.offset + code_at);
        let bitness = if self.mode == Mode::Bits64 { 64 } else { 32 };
        let (code, spans, addresses) = assemble(bitness, entry, &self.items, &self.labels)?;
        // Sometimes the sequence ends exactly where the mapping does.
        if code.is_empty() || code.len() as u32 + code_at > CODE.len() {
            return None;
        }
        for (offset, Label(l)) in std::mem::take(&mut self.pointers) {
            let bytes = if self.mode == Mode::Bits64 { 8 } else { 4 };
            let data = addresses[l].to_le_bytes()[..bytes].to_vec();
            self.patches.push(Patch { offset, data });
        }
        let mut gpr = self.regs.finish(&mut self.rng);
        if self.mode == Mode::Compat32 {
            for (i, value) in gpr.iter_mut().enumerate() {
                *value = if i < 8 { *value & 0xffff_ffff } else { 0 };
            }
        }
        let stop_after = 1 + self.rng.below(STOP_AFTER_MAX);
        let pieces: usize = self.patches.iter().map(|p| p.data.len().div_ceil(64)).sum();
        (pieces + code.len().div_ceil(64) < 60).then_some(Case {
            mode: self.mode,
            world: self.world,
            gpr,
            rflags: self.rflags,
            fs_base: self.bases[0],
            gs_base: self.bases[1],
            xsave: self.xsave,
            patches: self.patches,
            code_at,
            code,
            spans,
            masked: self.masked,
            stop_after,
        })
    }

    /// One instruction, or a template of several.
    fn step(&mut self) -> Option<()> {
        if self.rng.percent(6) {
            return self.template();
        }
        let entry = self.catalog.pick(&mut self.rng);
        match entry.kind {
            Kind::Plain => self.plain(entry.code),
            Kind::Text => self.text(entry.code),
            Kind::Branch => self.branch(entry.code),
            Kind::Privileged if self.fault_wanted => {
                self.fault_wanted = false;
                self.plain(entry.code)
            }
            Kind::Privileged => None,
        }
    }

    fn plain(&mut self, code: Code) -> Option<()> {
        self.prepare_implicit(code);
        let mut ins = self.operands(code)?;
        let stops = matches!(ins.mnemonic(), Mnemonic::Ud1 | Mnemonic::Ud2 | Mnemonic::Hlt)
            || matches!(ins.mnemonic(), Mnemonic::Int | Mnemonic::Int1 | Mnemonic::Int3)
            || matches!(ins.mnemonic(), Mnemonic::Into);
        if stops && !std::mem::take(&mut self.fault_wanted) {
            return None;
        }
        if code.op_code().can_use_lock_prefix() {
            let memory = ins.op0_kind() == OpKind::Memory;
            if memory && self.rng.percent(35) || self.fault_wanted && self.rng.percent(5) {
                ins.set_has_lock_prefix(true);
            }
        }
        let mut item = Item::from(ins);
        self.decorate(&mut item);
        self.emit(item)
    }

    /// Prefixes without meaning, and (when a fault is wanted) prefixes that are refused.
    fn decorate(&mut self, item: &mut Item) {
        let high_byte = (0..item.ins.op_count()).any(|i| {
            matches!(
                item.ins.op_register(i),
                Register::AH | Register::CH | Register::DH | Register::BH
            )
        });
        let memory = (0..item.ins.op_count()).any(|i| item.ins.op_kind(i) != OpKind::Register);
        if !high_byte && self.rng.percent(4) {
            item.rex = true;
        }
        if !memory && self.rng.percent(2) {
            item.prefixes.push(self.rng.pick(&[0x2e, 0x36, 0x3e, 0x26, 0x64, 0x65, 0x67]));
        }
        let vex = item.ins.code().encoding() == iced_x86::EncodingKind::VEX;
        if vex && self.fault_wanted && self.rng.percent(4) {
            item.prefixes.push(self.rng.pick(&[0x66, 0xf2, 0xf3, 0xf0]));
        }
    }

    /// Chooses registers that an instruction uses without naming them.
    fn prepare_implicit(&mut self, code: Code) {
        const RAX: usize = 0;
        const RDX: usize = 2;
        const RBX: usize = 3;
        const RDI: usize = 7;
        match code.mnemonic() {
            Mnemonic::Div | Mnemonic::Idiv if self.regs.free(RDX) && self.rng.percent(75) => {
                let small = u64::from(self.rng.below(3));
                self.regs.choose(RDX, small);
                if self.regs.free(RAX) && self.rng.percent(40) {
                    let small = u64::from(self.rng.below(1 << 15));
                    self.regs.choose(RAX, small);
                }
            }
            Mnemonic::Xlatb => self.point(RBX),
            Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => self.point(RDI),
            _ => {}
        }
    }

    /// Lets a register point into the data, when its initial value is still free.
    fn point(&mut self, reg: usize) {
        if self.regs.free(reg) {
            let target = self.target(memory::Need { size: 16, aligned: false });
            self.regs.choose(reg, target);
        }
    }

    /// Takes an instruction into the sequence and notes what it does to registers and flags.
    fn emit(&mut self, item: Item) -> Option<()> {
        let ins = item.ins;
        // Must be encodable; relative targets do not matter for that.
        let mut probe = item.clone();
        let near = matches!(ins.op0_kind(), OpKind::NearBranch64 | OpKind::NearBranch32);
        probe.branch = near.then_some(Label(0));
        probe.immediate = probe.immediate.map(|_| Label(0));
        probe.memory = probe.memory.map(|(_, d)| (Label(0), d));
        let bitness = if self.mode == Mode::Bits64 { 64 } else { 32 };
        let entry = self.world.base();
        assemble(bitness, entry, &[probe], &[0])?;
        if ins.rflags_read() & self.undefined != 0 {
            self.define_flags();
        }
        self.note_registers(&ins)?;
        if !conditional_flags(&ins) {
            self.undefined &= !(ins.rflags_written() | ins.rflags_cleared() | ins.rflags_set());
        }
        self.undefined |= ins.rflags_undefined();
        let next = self.items.len() + 1;
        self.items.push(item);
        let mut placed = Vec::new();
        for (label, left) in &mut self.pending {
            *left -= 1;
            if *left == 0 {
                placed.push(*label);
            }
        }
        self.pending.retain(|(_, left)| *left > 0);
        for Label(l) in placed {
            self.labels[l] = next;
        }
        Some(())
    }

    /// Makes all arithmetic flags defined, by a compare that goes in front.
    fn define_flags(&mut self) {
        let mut ins = Instruction::default();
        ins.set_code(Code::Cmp_EAX_imm32);
        ins.set_op0_kind(OpKind::Register);
        ins.set_op0_register(Register::EAX);
        ins.set_op1_kind(OpKind::Immediate32);
        ins.set_immediate32(self.rng.next_u64() as u32);
        self.regs.touch(0, &mut self.rng);
        self.items.push(Item::from(ins));
        self.undefined = 0;
    }

    fn note_registers(&mut self, ins: &Instruction) -> Option<()> {
        let info = self.info.info(ins);
        let (mut read, mut written, mut vectors) = (0u16, 0u16, 0u32);
        for used in info.used_registers() {
            let reg = used.register();
            if reg.is_xmm() || reg.is_ymm() {
                vectors |= 1 << reg.number();
                continue;
            }
            if !reg.is_gpr() {
                continue;
            }
            let bit = 1u16 << (reg.full_register() as u32 - Register::RAX as u32);
            match used.access() {
                OpAccess::Read | OpAccess::CondRead => read |= bit,
                OpAccess::None | OpAccess::NoMemAccess => {}
                _ => {
                    read |= bit;
                    written |= bit;
                }
            }
        }
        if written & self.regs.protected != 0 {
            return None;
        }
        self.vectors_used |= vectors;
        let before = self.regs.known(RSP);
        for reg in 0..16 {
            if read & (1 << reg) != 0 {
                self.regs.touch(reg, &mut self.rng);
            }
            if written & (1 << reg) != 0 {
                self.regs.written(reg, None);
            }
        }
        if ins.is_stack_instruction()
            && !matches!(ins.mnemonic(), Mnemonic::Enter | Mnemonic::Leave)
        {
            let after = before.map(|v| v.wrapping_add(ins.stack_pointer_increment() as i64 as u64));
            self.regs.written(RSP, after);
        }
        match ins.mnemonic() {
            Mnemonic::Wrfsbase => self.fs_base = None,
            Mnemonic::Wrgsbase => self.gs_base = None,
            _ => {}
        }
        Some(())
    }

    /// Changes memory before the start.
    fn patch(&mut self, addr: u64, data: Vec<u8>) {
        if let Some(offset) = self.world.image_offset(addr, data.len() as u32) {
            self.patches.push(Patch { offset, data });
        }
    }

    /// Sets the initial contents of a vector register.
    fn set_vector(&mut self, number: usize, lanes: &[u8; 32]) {
        let (low, high) = lanes.split_at(16);
        self.xsave.0[160 + number * 16..176 + number * 16].copy_from_slice(low);
        self.xsave.0[576 + number * 16..592 + number * 16].copy_from_slice(high);
    }

    /// Loads a register with a number: as its initial value if that is free, else by an
    /// instruction.
    fn load(&mut self, reg: usize, value: u64) -> Option<()> {
        if self.regs.free(reg) {
            self.regs.choose(reg, value);
            return Some(());
        }
        if self.regs.known(reg) == Some(value) {
            return Some(());
        }
        let mut ins = Instruction::default();
        ins.set_op0_kind(OpKind::Register);
        if self.mode == Mode::Bits64 {
            ins.set_code(Code::Mov_r64_imm64);
            ins.set_op0_register(memory::GPR64[reg]);
            ins.set_op1_kind(OpKind::Immediate64);
            ins.set_immediate64(value);
        } else {
            ins.set_code(Code::Mov_r32_imm32);
            ins.set_op0_register(memory::GPR32[reg]);
            ins.set_op1_kind(OpKind::Immediate32);
            ins.set_immediate32(value as u32);
        }
        self.emit(Item::from(ins))?;
        self.regs.written(reg, Some(value));
        Some(())
    }
}
