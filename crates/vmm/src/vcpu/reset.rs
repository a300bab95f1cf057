//! The states of a vCPU after power-up, INIT and a start-up message (Intel SDM vol. 3, table 10-1).

use berth_x86::state::{XsaveArea, cr0, efer, flags, reg, sreg};
use berth_x86::{CpuState, Segment, TableReg};

/// Family 6, in RDX after reset; CPUID has the details.
const SIGNATURE: u64 = 0x600;
/// PAT after power-up: WB, WT, UC-, UC, twice.
const PAT: u64 = 0x0007_0406_0007_0406;
/// Fast strings are on; branch trace and precise event sampling are not there.
const MISC_ENABLE: u64 = 1 | 1 << 11 | 1 << 12;
/// MTRRs on, everything write-back: caching is the host's affair.
const MTRR_DEF_TYPE: u64 = 1 << 11 | 6;

const fn real_mode(selector: u16, base: u64, typ: u16) -> Segment {
    Segment { base, limit: 0xffff, selector, attr: typ | Segment::S | Segment::P }
}

/// After power-up, as firmware would leave the MTRRs.
#[must_use]
pub fn power_up() -> CpuState {
    let table = TableReg { base: 0, limit: 0xffff, pad: 0 };
    let system = |typ| Segment { base: 0, limit: 0xffff, selector: 0, attr: typ | Segment::P };
    let mut state = CpuState {
        gpr: [0; 16],
        rip: 0xfff0,
        rflags: flags::FIXED,
        seg: [real_mode(0, 0, 3); 6],
        ldtr: system(2),
        tr: system(0xb),
        gdtr: table,
        idtr: table,
        cr0: cr0::CD | cr0::NW | cr0::ET,
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
        pat: PAT,
        tsc_aux: 0,
        tsc_offset: 0,
        tsc_adjust: 0,
        misc_enable: MISC_ENABLE,
        spec_ctrl: 0,
        dr: [0; 4],
        dr6: 0xffff_0ff0,
        dr7: 0x400,
        pdpte: [0; 4],
        interrupt_shadow: 0,
        nmi_masked: 0,
        nmi_pending: 0,
        halted: 0,
        mtrr_def_type: MTRR_DEF_TYPE,
        mtrr_var: [0; 16],
        mtrr_fixed: [0; 11],
        mcg_status: 0,
        xsave: XsaveArea::default(),
    };
    state.seg[sreg::CS] = real_mode(0xf000, 0xffff_0000, 0xb);
    state.gpr[reg::RDX] = SIGNATURE;
    state
}

/// After INIT: registers as after power-up, but clocks, FPU, caches' MTRRs and most MSRs stay.
pub fn init(state: &mut CpuState) {
    let fresh = power_up();
    // Caching bits of CR0 stay, too.
    let cache = state.cr0 & (cr0::CD | cr0::NW);
    *state = CpuState {
        gpr: fresh.gpr,
        rip: fresh.rip,
        rflags: fresh.rflags,
        seg: fresh.seg,
        ldtr: fresh.ldtr,
        tr: fresh.tr,
        gdtr: fresh.gdtr,
        idtr: fresh.idtr,
        cr0: cr0::ET | cache,
        cr2: 0,
        cr3: 0,
        cr4: 0,
        efer: state.efer & !(efer::LMA | efer::LME | efer::SCE | efer::NXE),
        dr: fresh.dr,
        dr6: fresh.dr6,
        dr7: fresh.dr7,
        pdpte: fresh.pdpte,
        interrupt_shadow: 0,
        nmi_masked: 0,
        nmi_pending: 0,
        halted: 0,
        ..state.clone()
    };
}

/// After a start-up message with this vector, on top of [`init`].
pub fn startup(state: &mut CpuState, vector: u8) {
    state.seg[sreg::CS] = real_mode(u16::from(vector) << 8, u64::from(vector) << 12, 0xb);
    state.rip = 0;
}

#[cfg(test)]
mod tests {
    use super::{init, power_up, startup};
    use berth_x86::state::{CodeSize, sreg};

    #[test]
    fn init_keeps_what_the_manual_says() {
        let mut state = power_up();
        (state.tsc_offset, state.pat, state.cr4, state.efer, state.halted) = (5, 7, 0x20, 0x500, 1);
        state.xsave.0[0] = 1;
        init(&mut state);
        assert_eq!((state.tsc_offset, state.pat, state.xsave.0[0]), (5, 7, 1));
        assert_eq!((state.cr4, state.efer, state.halted, state.rip), (0, 0, 0, 0xfff0));
        startup(&mut state, 0x99);
        assert_eq!((state.seg[sreg::CS].base, state.seg[sreg::CS].selector), (0x99000, 0x9900));
        assert_eq!((state.rip, state.code_size(), state.cpl()), (0, CodeSize::Bits16, 0));
    }
}
