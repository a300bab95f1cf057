//! The states in which kernels are entered.

use berth_x86::state::{cr0, cr4, efer, flags, reg, sreg};
use berth_x86::{CpuState, Segment, TableReg};

use crate::boot::layout::{GDT, PAGE_TABLES};
use crate::boot::{BootError, Loader};
use crate::vcpu::reset;

/// Code and data of the Linux 64-bit protocol are selectors 0x10 and 0x18; the 32-bit protocols
/// leave selectors open and use the same.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

const fn flat(selector: u16, typ: u16, attr: u16) -> Segment {
    Segment {
        base: 0,
        limit: !0,
        selector,
        attr: typ | Segment::S | Segment::P | Segment::G | attr,
    }
}

/// The 8 bytes of a flat segment's descriptor.
const fn descriptor(segment: Segment) -> u64 {
    let limit = segment.limit as u64 >> 12;
    (segment.attr as u64) << 40 | (limit >> 16) << 48 | limit & 0xffff
}

fn common(code: Segment) -> CpuState {
    let data = flat(DATA, 3, Segment::DB);
    let mut state = reset::power_up();
    state.gpr = [0; 16];
    state.seg = [data; 6];
    state.seg[sreg::CS] = code;
    let (typ, p) = (0xb, Segment::P);
    state.tr = Segment { base: 0, limit: 0x67, selector: TASK, attr: typ | p };
    state.ldtr = Segment { base: 0, limit: 0, selector: 0, attr: 0 };
    state.gdtr = TableReg { base: GDT, limit: 5 * 8 - 1, pad: 0 };
    state.idtr = TableReg { base: 0, limit: 0, pad: 0 };
    state.rflags = flags::FIXED;
    state.cr0 = cr0::PE | cr0::ET | cr0::NE;
    state
}

fn put_descriptors(loader: &Loader<'_>, code: Segment) -> Result<(), BootError> {
    let task = 0x0000_8b00_0000_0067_u64;
    let table = [0, 0, descriptor(code), descriptor(flat(DATA, 3, Segment::DB)), task];
    for (index, entry) in table.into_iter().enumerate() {
        loader.put(GDT + 8 * index as u64, &u64::to_le_bytes(entry))?;
    }
    Ok(())
}

/// 32-bit protected mode without paging, flat segments, interrupts off.
pub(super) fn protected_mode(loader: &Loader<'_>, entry: u32) -> Result<CpuState, BootError> {
    let code = flat(CODE, 0xb, Segment::DB);
    put_descriptors(loader, code)?;
    let mut state = common(code);
    state.rip = u64::from(entry);
    Ok(state)
}

/// 64-bit mode with the first 4 GiB mapped one to one by 2 MiB pages, RSI given.
pub(super) fn long_mode(loader: &Loader<'_>, entry: u64, rsi: u64) -> Result<CpuState, BootError> {
    let code = flat(CODE, 0xb, Segment::L);
    put_descriptors(loader, code)?;
    put_page_tables(loader)?;
    let mut state = common(code);
    state.rip = entry;
    state.gpr[reg::RSI] = rsi;
    state.cr0 |= cr0::PG | cr0::WP;
    state.cr3 = PAGE_TABLES;
    state.cr4 = cr4::PAE;
    state.efer = efer::LME | efer::LMA;
    Ok(state)
}

fn put_page_tables(loader: &Loader<'_>) -> Result<(), BootError> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let pointers = PAGE_TABLES + 0x1000;
    loader.put(PAGE_TABLES, &(pointers | PRESENT_WRITABLE).to_le_bytes())?;
    for gib in 0..4 {
        let directory = PAGE_TABLES + 0x2000 + gib * 0x1000;
        loader.put(pointers + gib * 8, &(directory | PRESENT_WRITABLE).to_le_bytes())?;
        let page: Vec<u8> = (0..512)
            .flat_map(|page| (gib << 30 | page << 21 | LARGE | PRESENT_WRITABLE).to_le_bytes())
            .collect();
        loader.put(directory, &page)?;
    }
    Ok(())
}
