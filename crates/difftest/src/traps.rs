//! Cases with known answers for what other translators got wrong: the bare processor shows that the
//! answers are right, then any backend has to give them.

use berth_x86::state::{XsaveArea, flags, reg, vector};
use iced_x86::IcedError;
use iced_x86::code_asm::{
    CodeAssembler, ah, al, byte_ptr, cl, cx, dword_ptr, eax, ebx, ecx, edx, fword_ptr, ptr,
    qword_ptr, r8, rax, rbx, rcx, rdi, rdx, rsi, rsp, xmm0,
};

use crate::case::{Case, Final, Mode, Patch, Span, selector};
use crate::layout::{CODE, CONST, DATA, HOLE, STACK, World};

/// A case and what must come out.
pub struct Trap {
    /// What it is about.
    pub name: &'static str,
    /// The case.
    pub case: Case,
    /// The exception that ends it.
    pub vector: u8,
    /// Its error code.
    pub error: u32,
    /// Where, as an offset from the first instruction.
    pub rip: u64,
    /// CR2, for #PF.
    pub cr2: u64,
    /// Registers (number, value).
    pub gpr: Vec<(usize, u64)>,
    /// Flags (mask, value).
    pub flags: (u64, u64),
    /// Words of memory (address, value).
    pub memory: Vec<(u64, u64)>,
}

const BASE: u64 = World::Low.base();
/// The data region.
const D: u64 = BASE + DATA.offset as u64;
/// The stack pointer of all cases.
const SP: u64 = BASE + STACK.offset as u64 + 0x1000;

fn case() -> Case {
    let mut gpr = [0; 16];
    gpr[reg::RSP] = SP;
    Case {
        mode: Mode::Bits64,
        world: World::Low,
        gpr,
        rflags: 0,
        fs_base: 0,
        gs_base: 0,
        xsave: XsaveArea::default(),
        patches: Vec::new(),
        code_at: 0x100,
        code: Vec::new(),
        spans: Vec::new(),
        masked: Vec::new(),
        stop_after: 1,
    }
}

/// Entry of a case whose code begins at the usual place.
const ENTRY: u64 = BASE + CODE.offset as u64 + 0x100;

impl Trap {
    /// Assembles; the end mark behind the code is what is expected to stop it.
    fn new(
        name: &'static str,
        write: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<Self, IcedError> {
        Self::at(name, 0x100, write)
    }

    fn at(
        name: &'static str,
        code_at: u32,
        write: impl Fn(&mut CodeAssembler) -> Result<(), IcedError>,
    ) -> Result<Self, IcedError> {
        let mut case = case();
        case.code_at = code_at;
        let mut assembler = CodeAssembler::new(64)?;
        write(&mut assembler)?;
        case.code = assembler.assemble(case.entry())?;
        case.spans = vec![Span { start: 0, len: case.code.len() as u8 }];
        let end = case.code.len() as u64 + 1;
        Ok(Self {
            name,
            case,
            vector: vector::BP,
            error: 0,
            rip: end,
            cr2: 0,
            gpr: Vec::new(),
            flags: (0, 0),
            memory: Vec::new(),
        })
    }

    fn reg(mut self, number: usize, value: u64) -> Self {
        self.gpr.push((number, value));
        self
    }

    fn word(mut self, addr: u64, value: u64) -> Self {
        self.memory.push((addr, value));
        self
    }

    fn with(mut self, number: usize, value: u64) -> Self {
        self.case.gpr[number] = value;
        self
    }

    fn data(mut self, addr: u64, bytes: &[u8]) -> Self {
        if let Some(offset) = World::Low.image_offset(addr, bytes.len() as u32) {
            self.case.patches.push(Patch { offset, data: bytes.to_vec() });
        }
        self
    }

    fn stops(mut self, vector: u8, error: u32, rip: u64) -> Self {
        (self.vector, self.error, self.rip) = (vector, error, rip);
        self
    }

    fn faults(mut self, cr2: u64, error: u32, rip: u64) -> Self {
        self.cr2 = cr2;
        self.stops(vector::PF, error, rip)
    }

    fn flag(mut self, mask: u64, value: u64) -> Self {
        self.flags = (mask, value);
        self
    }

    /// What is not as expected.
    #[must_use]
    pub fn check(&self, end: &Final) -> Vec<String> {
        let mut wrong = Vec::new();
        let mut check = |what: String, expected: u64, got: u64| {
            if expected != got {
                wrong.push(format!("{}: {what}: expected {expected:#x}, got {got:#x}", self.name));
            }
        };
        check("exception".to_owned(), u64::from(self.vector), u64::from(end.fault.vector));
        check("error code".to_owned(), u64::from(self.error), u64::from(end.fault.error));
        check("cr2".to_owned(), self.cr2, end.fault.cr2);
        check("rip".to_owned(), self.case.entry().wrapping_add(self.rip), end.rip);
        for (number, value) in &self.gpr {
            check(crate::compare::NAMES[*number].to_owned(), *value, end.gpr[*number]);
        }
        check("flags".to_owned(), self.flags.1, end.rflags & self.flags.0);
        for (addr, value) in &self.memory {
            let at = World::Low.image_offset(*addr, 8);
            let got = end.memory.iter().find(|(o, _)| Some(*o) == at).map(|w| w.1);
            check(format!("memory {addr:#x}"), *value, got.unwrap_or_default());
        }
        wrong
    }
}

/// All of them.
///
/// # Errors
/// When a table entry cannot be assembled (a mistake in this file).
pub fn all() -> Result<Vec<Trap>, IcedError> {
    let mut traps = control()?;
    traps.extend(memory()?);
    traps.extend(flag_cases()?);
    traps.extend(faults()?);
    Ok(traps)
}

fn control() -> Result<Vec<Trap>, IcedError> {
    let user = u64::from(selector::CODE64);
    Ok(vec![
        // Blink lost flags over CALL and RET.
        Trap::new("flags live over CALL and RET", |a| {
            let mut f = a.create_label();
            let mut over = a.create_label();
            a.stc()?;
            a.call(f)?;
            a.setc(al)?;
            a.jmp(over)?;
            a.set_label(&mut f)?;
            a.setc(ah)?;
            a.ret()?;
            a.set_label(&mut over)?;
            a.nop()
        })?
        .reg(reg::RAX, 0x101)
        .flag(flags::CF, flags::CF),
        Trap::new("RET leaves by a return address that was replaced", |a| {
            let mut f = a.create_label();
            let mut other = a.create_label();
            a.call(f)?;
            a.mov(eax, 1)?;
            a.ud2()?;
            a.set_label(&mut f)?;
            a.lea(rbx, ptr(other))?;
            a.mov(qword_ptr(rsp), rbx)?;
            a.ret()?;
            a.set_label(&mut other)?;
            a.mov(eax, 2)
        })?
        .reg(reg::RAX, 2)
        .reg(reg::RSP, SP),
        Trap::new("CALL through RSP reads the target before it pushes", |a| {
            let mut to = a.create_label();
            a.lea(rax, ptr(to))?;
            a.push(rax)?;
            a.call(qword_ptr(rsp))?;
            a.ud2()?;
            a.set_label(&mut to)?;
            a.nop()
        })?
        .reg(reg::RSP, SP - 16),
        Trap::new("IRETQ within user mode", |a| {
            let mut to = a.create_label();
            a.lea(rbx, ptr(to))?;
            a.push(i32::from(selector::DATA))?;
            a.push((D + 0x800) as i32)?;
            a.push(0xad7)?;
            a.push(user as i32)?;
            a.push(rbx)?;
            a.iretq()?;
            a.ud2()?;
            a.set_label(&mut to)?;
            a.nop()
        })?
        .reg(reg::RSP, D + 0x800)
        .flag(0xfd7, 0xad7),
        Trap::new("user mode goes to 32-bit code and back", |a| {
            // inc eax, which is a REX prefix in 64-bit mode; then jmp far cs:[D + 8], since DS is
            // null.
            let mut narrow = a.create_label();
            let mut back = a.create_label();
            a.mov(eax, -1)?;
            a.lea(rbx, ptr(narrow))?;
            a.mov(dword_ptr(D), ebx)?;
            a.mov(dword_ptr(D + 4), i32::from(selector::CODE32))?;
            a.lea(rbx, ptr(back))?;
            a.mov(dword_ptr(D + 8), ebx)?;
            a.mov(dword_ptr(D + 12), user as i32)?;
            a.jmp(fword_ptr(D))?;
            a.set_label(&mut narrow)?;
            a.db(&[0x40, 0x2e, 0xff, 0x2d])?;
            a.db(&((D + 8) as u32).to_le_bytes())?;
            a.set_label(&mut back)?;
            a.add(rax, 5)
        })?
        .reg(reg::RAX, 5),
        Trap::new("JECXZ and LOOP with the 67 prefix use ECX", |a| {
            let mut over = a.create_label();
            a.mov(rcx, 0x1_0000_0000u64)?;
            a.db(&[0x67, 0xe3, 0x02])?;
            a.ud2()?;
            a.mov(rcx, 0xffff_ffff_0000_0001u64)?;
            a.db(&[0x67, 0xe2, 0x02])?;
            a.jmp(over)?;
            a.ud2()?;
            a.set_label(&mut over)?;
            a.nop()
        })?
        .reg(reg::RCX, 0),
    ])
}

fn memory() -> Result<Vec<Trap>, IcedError> {
    let hole = BASE + u64::from(HOLE);
    Ok(vec![
        Trap::new("a store changes the next instruction", |a| {
            let mut next = a.create_label();
            a.lea(rbx, ptr(next))?;
            a.mov(byte_ptr(rbx + 1), 0x7f)?;
            a.set_label(&mut next)?;
            a.mov(eax, 1)
        })?
        .reg(reg::RAX, 0x7f),
        Trap::new("a loop changes an instruction it has run already", |a| {
            let mut top = a.create_label();
            a.mov(ecx, 3)?;
            a.lea(rbx, ptr(top))?;
            a.set_label(&mut top)?;
            // add rax, 0x10
            a.db(&[0x48, 0x83, 0xc0, 0x10])?;
            a.inc(byte_ptr(rbx + 3))?;
            a.dec(ecx)?;
            a.jne(top)
        })?
        .reg(reg::RAX, 0x33),
        Trap::new("REP MOVSB stops where the page ends", |a| a.rep().movsb())?
            .with(reg::RSI, D + 0x100)
            .with(reg::RDI, hole - 0x23)
            .with(reg::RCX, 0x100)
            .faults(hole, 6, 0)
            .reg(reg::RCX, 0x100 - 0x23)
            .reg(reg::RSI, D + 0x123)
            .reg(reg::RDI, hole),
        Trap::new("REP STOSQ downwards stops where the page begins", |a| {
            a.std()?;
            a.rep().stosq()
        })?
        .with(reg::RDI, D + 16)
        .with(reg::RCX, 8)
        .faults(D - 8, 6, 1)
        .reg(reg::RCX, 5)
        .reg(reg::RDI, D - 8),
        Trap::new("REP CMPSB with RCX = 0 leaves the flags", |a| {
            a.stc()?;
            a.repe().cmpsb()
        })?
        .with(reg::RSI, 8)
        .flag(flags::CF | flags::ZF, flags::CF),
        Trap::new("LOCK ADD across a page boundary", |a| a.lock().add(dword_ptr(D + 0xffe), 1))?
            .data(D + 0xff8, &[0, 0, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0])
            .word(D + 0x1000, 0x100),
        Trap::new("a store across into a hole changes nothing", |a| {
            a.mov(qword_ptr(hole - 3), rax)
        })?
        .faults(hole, 6, 0),
        Trap::new("CMPXCHG that fails still needs a writable page", |a| {
            a.cmpxchg(qword_ptr(BASE + u64::from(CONST.offset)), rbx)
        })?
        .with(reg::RAX, 0x1234_5678_9abc_def0)
        .faults(BASE + u64::from(CONST.offset), 7, 0),
        Trap::new("BT with a register reaches beyond its operand", |a| a.bts(dword_ptr(rbx), ecx))?
            .with(reg::RBX, D + 0x200)
            .with(reg::RCX, 0x43)
            .data(D + 0x208, &[0; 8])
            .word(D + 0x208, 8),
        Trap::new("PUSH RSP pushes the old value", |a| {
            a.push(rsp)?;
            a.pop(rax)
        })?
        .reg(reg::RAX, SP),
        Trap::new("POP [RSP] computes the address after the pop", |a| {
            a.push(0x77)?;
            a.pop(qword_ptr(rsp + 8))
        })?
        .word(SP + 8, 0x77),
        Trap::new("CMOV that does not move still clears the upper half", |a| {
            a.test(ebx, ebx)?;
            a.cmovne(eax, ecx)
        })?
        .with(reg::RAX, u64::MAX)
        .reg(reg::RAX, 0xffff_ffff),
        Trap::new("CMOV that does not move still reads", |a| {
            a.test(ebx, ebx)?;
            a.cmovne(eax, dword_ptr(hole))
        })?
        .faults(hole, 4, 2),
        Trap::new("67-prefixed strings wrap and clear the upper halves", |a| {
            a.db(&[0x67, 0xf3, 0xa4])
        })?
        .with(reg::RSI, D | 0xaaaa_0000_0000_0000)
        .with(reg::RDI, (D + 0x800) | 0xbbbb_0000_0000_0000)
        .with(reg::RCX, 0xcccc_0000_0000_0004)
        .reg(reg::RCX, 0)
        .reg(reg::RSI, D + 4)
        .reg(reg::RDI, D + 0x804),
    ])
}

fn flag_cases() -> Result<Vec<Trap>, IcedError> {
    Ok(vec![
        Trap::new("a shift by zero leaves the flags", |a| {
            a.mov(ecx, 0x40)?;
            a.stc()?;
            a.shl(rax, cl)
        })?
        .flag(flags::CF | flags::ZF, flags::CF),
        Trap::new("INC keeps CF", |a| {
            a.stc()?;
            a.inc(al)
        })?
        .with(reg::RAX, 0xff)
        .flag(flags::CF | flags::ZF | flags::AF, flags::CF | flags::ZF | flags::AF),
        Trap::new("POPF ignores IF and IOPL in user mode", |a| {
            a.push(0x3046)?;
            a.popfq()?;
            a.pushfq()?;
            a.pop(rax)
        })?
        .reg(reg::RAX, 0x246),
        Trap::new("ADC chain through LEA, MOV, LOOP-free flow", |a| {
            a.add(rax, -1)?;
            a.lea(rsi, ptr(rsi + rdi * 8 + 9))?;
            a.mov(qword_ptr(D), rsi)?;
            a.adc(rdx, 0)?;
            a.adc(rbx, -1)
        })?
        .with(reg::RAX, 1)
        .with(reg::RDX, u64::MAX)
        .reg(reg::RDX, 0)
        .reg(reg::RBX, 0),
        Trap::new("TF set by POPF stops after the next instruction", |a| {
            a.push(0x146)?;
            a.popfq()?;
            a.mov(eax, 7)?;
            a.mov(ebx, 7)
        })?
        .stops(vector::DB, 0, 11)
        .reg(reg::RAX, 7)
        .reg(reg::RBX, 0)
        .flag(flags::ARITH | flags::TF, 0x144),
        Trap::new("MOV SS holds off the single-step trap", |a| {
            a.mov(edx, i32::from(selector::DATA))?;
            a.push(0x146)?;
            a.popfq()?;
            a.db(&[0x8e, 0xd2])?;
            a.mov(eax, 7)?;
            a.mov(ebx, 7)
        })?
        .stops(vector::DB, 0, 18)
        .reg(reg::RAX, 7)
        .reg(reg::RBX, 0),
    ])
}

fn faults() -> Result<Vec<Trap>, IcedError> {
    let end_of_code = BASE + u64::from(CODE.offset + CODE.len());
    let mut control = Trap::new("an x87 exception waits for the next x87 instruction", |a| {
        a.fldz()?;
        a.fld1()?;
        a.fdivrp(iced_x86::code_asm::st1, iced_x86::code_asm::st0)?;
        a.mov(eax, 5)?;
        a.fnop()
    })?
    .stops(vector::MF, 0, 11)
    .reg(reg::RAX, 5);
    control.case.xsave.0[0..2].copy_from_slice(&0x37bu16.to_le_bytes());
    Ok(vec![
        control,
        Trap::at("an instruction whose second page is missing", CODE.len() - 4, |a| {
            a.db(&[0x48, 0xb8, 1, 2])
        })?
        .faults(end_of_code, 0x14, 0),
        Trap::new("a jump into data that may not be executed", |a| {
            a.mov(rax, D + 0x10)?;
            a.jmp(rax)
        })?
        .faults(D + 0x10, 0x15, D + 0x10 - ENTRY),
        Trap::new("PUSH onto a missing page leaves RSP", |a| {
            a.mov(rsp, BASE + u64::from(STACK.offset))?;
            a.push(rax)
        })?
        .faults(BASE + u64::from(STACK.offset) - 8, 6, 10)
        .reg(reg::RSP, BASE + u64::from(STACK.offset)),
        Trap::new("a non-canonical stack is #SS", |a| a.pop(rax))?
            .with(reg::RSP, 0x8000_0000_0000_0000)
            .stops(vector::SS, 0, 0),
        Trap::new("a non-canonical address is #GP", |a| a.mov(rax, qword_ptr(rbx)))?
            .with(reg::RBX, 0x8000_0000_0000_0000)
            .stops(vector::GP, 0, 0),
        Trap::new("a misaligned MOVAPS is #GP before any #PF", |a| {
            a.movaps(xmm0, iced_x86::code_asm::xmmword_ptr(rbx))
        })?
        .with(reg::RBX, BASE + u64::from(HOLE) + 8)
        .stops(vector::GP, 0, 0),
        Trap::new("DIV by zero leaves everything", |a| a.div(cx))?
            .with(reg::RAX, 0x1234_5678)
            .stops(vector::DE, 0, 0)
            .reg(reg::RAX, 0x1234_5678),
        Trap::new("LDMXCSR with a reserved bit", |a| a.ldmxcsr(dword_ptr(D)))?
            .data(D, &[0x80, 0x1f, 1, 0])
            .stops(vector::GP, 0, 0),
        Trap::new("FXRSTOR with a reserved bit of MXCSR", |a| a.fxrstor(ptr(D)))?
            .data(D, &[0; 28])
            .data(D + 24, &[0, 0, 1, 0])
            .stops(vector::GP, 0, 0),
        Trap::new("LOCK on a register", |a| a.db(&[0xf0, 0x48, 0xff, 0xc0]))?.stops(
            vector::UD,
            0,
            0,
        ),
        Trap::at("LOCK on a register, up to the end of a page", 0xffa, |a| {
            a.db(&[0xf0, 0x66, 0x81, 0xe3, 0x7c, 0x30])
        })?
        .stops(vector::UD, 0, 0),
        Trap::new("INT of a gate for the kernel", |a| a.int(0x20))?.stops(
            vector::GP,
            0x20 * 8 + 2,
            0,
        ),
        Trap::new("a privileged instruction", |a| a.hlt())?.stops(vector::GP, 0, 0),
        Trap::new("INT3 reports the next instruction", |a| {
            a.mov(r8, rdx)?;
            a.int3()?;
            a.ud2()
        })?
        .stops(vector::BP, 0, 4),
    ])
}
