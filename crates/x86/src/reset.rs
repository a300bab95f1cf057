//! The state after power-on, INIT and a startup IPI (Intel SDM vol. 3, table 10-1 and 10.4.4).

use crate::state::{CpuState, Segment, TableReg, XsaveArea, cr0, flags, reg, sreg};

const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// IA32_MISC_ENABLE: fast strings; branch trace store and PEBS unavailable.
const MISC_ENABLE_RESET: u64 = 1 | 1 << 11 | 1 << 12;
const DR6_RESET: u64 = 0xffff_0ff0;
const DR7_RESET: u64 = 0x400;
/// EDX after reset when the caller does not set leaf 1's signature: a P6.
const SIGNATURE: u64 = 0x600;

/// A data segment of real mode.
const DATA: Segment = Segment { base: 0, limit: 0xffff, selector: 0, attr: 0x93 };
const TABLE: TableReg = TableReg { base: 0, limit: 0xffff, pad: 0 };

impl CpuState {
    /// The state after power-on or RESET. The bootstrap processor (`bsp`) is ready to run at the reset
    /// vector; another one has [`CpuState::halted`] set and waits for [`CpuState::sipi`] (an
    /// interrupt must not wake it; that is for the machine to see to).
    #[must_use]
    pub fn reset(bsp: bool) -> Self {
        let mut cpu = Self {
            gpr: [0; 16],
            rip: 0,
            rflags: 0,
            seg: [DATA; 6],
            ldtr: Segment::default(),
            tr: Segment::default(),
            gdtr: TABLE,
            idtr: TABLE,
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
            pat: PAT_RESET,
            tsc_aux: 0,
            tsc_offset: 0,
            tsc_adjust: 0,
            misc_enable: MISC_ENABLE_RESET,
            spec_ctrl: 0,
            dr: [0; 4],
            dr6: 0,
            dr7: 0,
            pdpte: [0; 4],
            interrupt_shadow: 0,
            nmi_masked: 0,
            nmi_pending: 0,
            halted: 0,
            mtrr_def_type: 0,
            mtrr_var: [0; 16],
            mtrr_fixed: [0; 11],
            mcg_status: 0,
            xsave: XsaveArea::default(),
        };
        cpu.init(bsp);
        cpu
    }

    /// The changes an INIT makes: general, segment, control and debug registers as after power-on;
    /// CR0.CD and NW, MSRs, MTRRs, the time-stamp counter, XCR0 and x87, SSE and AVX state stay.
    pub fn init(&mut self, bsp: bool) {
        self.gpr = [0; 16];
        self.gpr[reg::RDX] = SIGNATURE;
        self.rip = 0xfff0;
        self.rflags = flags::FIXED;
        self.seg = [DATA; 6];
        self.seg[sreg::CS] =
            Segment { base: 0xffff_0000, limit: 0xffff, selector: 0xf000, attr: 0x9b };
        self.ldtr = Segment { base: 0, limit: 0xffff, selector: 0, attr: 0x82 };
        self.tr = Segment { base: 0, limit: 0xffff, selector: 0, attr: 0x8b };
        self.gdtr = TABLE;
        self.idtr = TABLE;
        self.cr0 = self.cr0 & (cr0::CD | cr0::NW) | cr0::ET;
        self.cr2 = 0;
        self.cr3 = 0;
        self.cr4 = 0;
        self.efer = 0;
        self.kernel_gs_base = 0;
        self.dr = [0; 4];
        self.dr6 = DR6_RESET;
        self.dr7 = DR7_RESET;
        self.pdpte = [0; 4];
        self.interrupt_shadow = 0;
        self.nmi_masked = 0;
        self.nmi_pending = 0;
        self.halted = u32::from(!bsp);
    }

    /// Starts a processor that waits after INIT: real mode at `vector << 12`.
    pub fn sipi(&mut self, vector: u8) {
        let cs = &mut self.seg[sreg::CS];
        cs.selector = u16::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        self.rip = 0;
        self.halted = 0;
    }
}

#[cfg(test)]
mod tests {
    use crate::state::{CodeSize, CpuState, cr0, reg, sreg};

    #[test]
    fn power_on() {
        let cpu = CpuState::reset(true);
        assert_eq!(cpu.seg[sreg::CS].base + cpu.rip, 0xffff_fff0);
        assert_eq!((cpu.cr0, cpu.rflags), (0x6000_0010, 2));
        assert_eq!((cpu.dr6, cpu.dr7), (0xffff_0ff0, 0x400));
        assert_eq!((cpu.cpl(), cpu.code_size()), (0, CodeSize::Bits16));
        assert_eq!(cpu.halted, 0);
        assert_eq!(CpuState::reset(false).halted, 1);
    }

    #[test]
    fn init_keeps_msrs_and_cache_bits() {
        let mut cpu = CpuState::reset(true);
        cpu.cr0 = cr0::PE | cr0::PG | cr0::CD;
        cpu.efer = 0xd00;
        cpu.pat = 5;
        cpu.tsc_offset = 77;
        cpu.gpr[reg::RSP] = 1;
        cpu.xsave.0[0] = 9;
        cpu.init(false);
        assert_eq!(cpu.cr0, cr0::CD | cr0::ET);
        assert_eq!((cpu.efer, cpu.pat, cpu.tsc_offset, cpu.xsave.0[0]), (0, 5, 77, 9));
        assert_eq!((cpu.gpr[reg::RSP], cpu.halted), (0, 1));
    }

    #[test]
    fn startup_ipi() {
        let mut cpu = CpuState::reset(false);
        cpu.sipi(0x9a);
        let cs = cpu.seg[sreg::CS];
        assert_eq!((cs.selector, cs.base, cpu.rip, cpu.halted), (0x9a00, 0x9a000, 0, 0));
    }
}
