//! The smallest guest that can run a case: page tables, descriptor tables and a stub for every
//! vector, all in one megabyte of RAM.
//!
//! Exceptions arrive in ring 0 on an own stack; the stub pushes a zero where the processor pushes no
//! error code, then the vector, and halts. The user's registers are still in place then.
//!
//! ```text
//! physical            linear
//! 0x01000  PML4       -
//! 0x02000  tables     -
//! 0x20000  GDT        SYSTEM + 0x20000
//! 0x21000  IDT        SYSTEM + 0x21000
//! 0x22000  TSS        SYSTEM + 0x22000
//! 0x23000  stubs      SYSTEM + 0x23000
//! 0x24000  stack      SYSTEM + 0x24000 (two pages)
//! 0x40000  low world  as `layout` says
//! 0x60000  high world as `layout` says
//! ```

use berth_x86::CpuState;
use berth_x86::state::{Segment, TableReg, cr0, cr4, efer, flags, reg, sreg};

use crate::case::{Case, Mode, selector};
use crate::layout::{Region, Rights, World};

/// Bytes of guest RAM.
pub const RAM: usize = 1 << 20;
/// Linear address of physical address 0 for the tables.
const SYSTEM: u64 = 0xffff_ffff_8000_0000;
const PML4: u64 = 0x1000;
const GDT: u64 = 0x20000;
const IDT: u64 = 0x21000;
const TSS: u64 = 0x22000;
const STUBS: u64 = 0x23000;
/// Bytes of a stub.
const STUB: u64 = 16;
/// End of the stack of ring 0.
const STACK_TOP: u64 = 0x26000;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const NO_EXECUTE: u64 = 1 << 63;

/// Physical address of a world's image.
pub const fn image_at(world: World) -> u64 {
    match world {
        World::Low => 0x40000,
        World::High => 0x60000,
    }
}

/// Writes to RAM while it is being set up; addresses are this module's own constants.
struct Builder<'a> {
    ram: &'a mut [u8],
    next_table: u64,
}

impl Builder<'_> {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        let at = at as usize;
        self.ram[at..at + bytes.len()].copy_from_slice(bytes);
    }

    fn entry(&self, at: u64) -> u64 {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&self.ram[at as usize..at as usize + 8]);
        u64::from_le_bytes(bytes)
    }

    /// Maps one page in four levels of tables.
    fn map(&mut self, linear: u64, physical: u64, rights: u64) {
        let mut table = PML4;
        for level in (1..4).rev() {
            let at = table + ((linear >> (12 + 9 * level)) & 0x1ff) * 8;
            let mut entry = self.entry(at);
            if entry & PRESENT == 0 {
                entry = self.next_table | PRESENT | WRITE | USER;
                self.next_table += 0x1000;
                self.put(at, &entry.to_le_bytes());
            }
            table = entry & 0x000f_ffff_ffff_f000;
        }
        let at = table + ((linear >> 12) & 0x1ff) * 8;
        self.put(at, &(physical | PRESENT | rights).to_le_bytes());
    }

    fn tables(&mut self) {
        for page in (GDT..STACK_TOP).step_by(0x1000) {
            self.map(SYSTEM + page, page, WRITE);
        }
        for world in World::ALL {
            for region in Region::ALL {
                let rights = match region.rights {
                    Rights::All => WRITE,
                    Rights::Write => WRITE | NO_EXECUTE,
                    Rights::Read => NO_EXECUTE,
                };
                for page in 0..u64::from(region.pages) {
                    let linear = world.base() + u64::from(region.offset) + page * 0x1000;
                    let physical = image_at(world) + u64::from(region.image) + page * 0x1000;
                    self.map(linear, physical, USER | rights);
                }
            }
        }
    }

    fn descriptors(&mut self) {
        // The user's part of Linux's table, so that selectors mean the same.
        let gdt: [u64; 7] = [
            0,
            0x00cf_9b00_0000_ffff,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
        ];
        for (i, entry) in (0u64..).zip(gdt) {
            self.put(GDT + i * 8, &entry.to_le_bytes());
        }
        // Its number of the processor: read-only data that user code may load (the limit says which).
        self.put(GDT + 0x78, &0x0040_f500_0000_0000u64.to_le_bytes());
        let base = SYSTEM + TSS;
        let low = 0x67 | (base & 0xff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56;
        self.put(GDT + 0x40, &low.to_le_bytes());
        self.put(GDT + 0x48, &(base >> 32).to_le_bytes());
        // RSP0, and an I/O permission map beyond the limit.
        self.put(TSS + 4, &(SYSTEM + STACK_TOP).to_le_bytes());
        self.put(TSS + 0x66, &0x68u16.to_le_bytes());
    }

    fn vectors(&mut self) {
        for vector in 0..256u64 {
            let stub = STUBS + vector * STUB;
            let has_error = matches!(vector, 8 | 10..=14 | 17);
            let mut code = Vec::new();
            if !has_error {
                code.extend([0x6a, 0]);
            }
            code.push(0x68);
            code.extend((vector as u32).to_le_bytes());
            code.push(0xf4);
            self.put(stub, &code);
            let to = SYSTEM + stub;
            // #BP and #OF may be raised by INT from user mode, as under Linux.
            let kind: u64 = if matches!(vector, 3 | 4) { 0xee } else { 0x8e };
            let low = to & 0xffff | 0x10 << 16 | kind << 40 | (to >> 16 & 0xffff) << 48;
            self.put(IDT + vector * 16, &low.to_le_bytes());
            self.put(IDT + vector * 16 + 8, &(to >> 32).to_le_bytes());
        }
    }
}

/// Fills RAM except for the worlds' images.
pub fn build(ram: &mut [u8]) {
    let mut builder = Builder { ram, next_table: 0x2000 };
    builder.tables();
    builder.descriptors();
    builder.vectors();
}

const fn segment(selector: u16, attr: u16) -> Segment {
    Segment { base: 0, limit: 0xffff_ffff, selector, attr: attr | Segment::S | Segment::P }
}

/// The state in which a case starts.
pub fn initial_state(case: &Case) -> CpuState {
    let user = 3 << 5;
    let data = segment(selector::DATA, 3 | user | Segment::DB | Segment::G);
    let null = Segment::default();
    let (code, other) = match case.mode {
        Mode::Bits64 => (segment(selector::CODE64, 0xb | user | Segment::L | Segment::G), null),
        Mode::Compat32 => (segment(selector::CODE32, 0xb | user | Segment::DB | Segment::G), data),
    };
    let mut seg = [other; 6];
    seg[sreg::CS] = code;
    seg[sreg::SS] = data;
    seg[sreg::FS] = Segment { base: case.fs_base, ..null };
    seg[sreg::GS] = Segment { base: case.gs_base, ..null };
    let mut state = blank();
    state.gpr = case.gpr;
    state.rip = case.entry();
    state.rflags = case.rflags | flags::IF | flags::FIXED;
    state.seg = seg;
    state.tr = Segment { base: SYSTEM + TSS, limit: 0x67, selector: 0x40, attr: 0xb | Segment::P };
    state.gdtr = TableReg { base: SYSTEM + GDT, limit: 0x7f, pad: 0 };
    state.idtr = TableReg { base: SYSTEM + IDT, limit: 0xfff, pad: 0 };
    state.cr0 = cr0::PE | cr0::MP | cr0::ET | cr0::NE | cr0::WP | cr0::AM | cr0::PG;
    state.cr3 = PML4;
    state.cr4 = cr4::PAE | cr4::OSFXSR | cr4::OSXMMEXCPT | cr4::OSXSAVE | cr4::FSGSBASE | cr4::UMIP;
    state.xcr0 = 7;
    state.efer = efer::LME | efer::LMA | efer::NXE | efer::SCE;
    state.xsave = case.xsave.clone();
    state
}

/// A state with nothing set.
fn blank() -> CpuState {
    CpuState {
        gpr: [0; 16],
        rip: 0,
        rflags: flags::FIXED,
        seg: [Segment::default(); 6],
        ldtr: Segment::default(),
        tr: Segment::default(),
        gdtr: TableReg::default(),
        idtr: TableReg::default(),
        cr0: 0,
        cr2: 0,
        cr3: 0,
        cr4: 0,
        xcr0: 1,
        efer: 0,
        star: 0,
        lstar: 0,
        cstar: 0,
        sfmask: 0,
        kernel_gs_base: 0,
        sysenter_cs: 0,
        sysenter_esp: 0,
        sysenter_eip: 0,
        pat: 0x0007_0406_0007_0406,
        tsc_aux: 0,
        tsc_offset: 0,
        tsc_adjust: 0,
        misc_enable: 1,
        spec_ctrl: 0,
        dr: [0; 4],
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        pdpte: [0; 4],
        interrupt_shadow: 0,
        nmi_masked: 0,
        nmi_pending: 0,
        halted: 0,
        mtrr_def_type: 0,
        mtrr_var: [0; 16],
        mtrr_fixed: [0; 11],
        mcg_status: 0,
        xsave: berth_x86::state::XsaveArea::default(),
    }
}

/// What a stub left on the stack: vector, error code, RIP, CS, RFLAGS, RSP, SS.
pub struct Frame(pub [u64; 7]);

impl Frame {
    /// Reads it; `None` when the guest did not halt in a stub.
    pub fn read(ram: &[u8], state: &CpuState) -> Option<Self> {
        let stubs = SYSTEM + STUBS..SYSTEM + STUBS + 256 * STUB;
        let top = SYSTEM + STACK_TOP;
        if !stubs.contains(&state.rip) || state.gpr[reg::RSP] != top - 7 * 8 {
            return None;
        }
        let mut words = [0; 7];
        let at = (STACK_TOP - 7 * 8) as usize;
        for (word, bytes) in words.iter_mut().zip(ram.get(at..)?.chunks_exact(8)) {
            *word = u64::from_le_bytes(bytes.try_into().ok()?);
        }
        Some(Self(words))
    }
}
