//! MSR rules: what is stored, what is refused, what reaches the platform.

use super::{MsrContext, MsrEffect, index, read, write};
use crate::control::Flush;
use crate::cpuid::tests_support::{amd_host, intel_host, table};
use crate::cpuid::{CpuidTable, HostCpuid};
use crate::fake::{Board, long};
use crate::state::{CpuState, Exception, efer, sreg};

const GP: Exception = Exception::gp(0);
const NONCANONICAL: u64 = 1 << 47;

struct Machine {
    cpu: CpuState,
    board: Board,
    table: CpuidTable,
}

impl Machine {
    fn new(host: &HostCpuid) -> Self {
        Self { cpu: long(0), board: Board::default(), table: table(host) }
    }

    fn read(&mut self, msr: u32) -> Result<u64, Exception> {
        let platform = &mut self.board;
        let mut context = MsrContext { platform, table: &self.table, host_tsc: || 1000 };
        read(&self.cpu, &mut context, msr)
    }

    fn write(&mut self, msr: u32, value: u64) -> Result<MsrEffect, Exception> {
        let platform = &mut self.board;
        let mut context = MsrContext { platform, table: &self.table, host_tsc: || 1000 };
        write(&mut self.cpu, &mut context, msr, value)
    }

    /// A refused write changes nothing.
    fn refused(&mut self, msr: u32, value: u64) {
        let before = self.cpu.clone();
        assert_eq!(self.write(msr, value), Err(GP), "{msr:#x} = {value:#x}");
        assert_eq!(self.cpu, before);
    }
}

#[test]
fn plain_registers_hold_what_is_written() {
    for host in [intel_host(), amd_host()] {
        let mut machine = Machine::new(&host);
        for (msr, value) in [
            (index::STAR, u64::MAX),
            (index::LSTAR, 0xffff_8000_0000_1234),
            (index::CSTAR, 0x7fff_ffff_ffff),
            (index::FMASK, 0x4_7700),
            (index::FS_BASE, 0x7f00_0000_1000),
            (index::GS_BASE, 0xffff_8881_0000_0000),
            (index::KERNEL_GS_BASE, 0x1000),
            (index::SYSENTER_CS, 0x10),
            (index::SYSENTER_ESP, 0xffff_fe00_0000_1000),
            (index::SYSENTER_EIP, 0xffff_ffff_8000_0000),
            (index::PAT, 0x0407_0506_0007_0106),
            (index::TSC_AUX, 0xfff),
            (index::MCG_STATUS, 5),
            (index::MTRR_DEF_TYPE, 0xc06),
            (index::MTRR_PHYSBASE0, 0x8000_0006),
            (index::MTRR_PHYSMASK7, 0x3fff_8000_0800),
            (index::MTRR_FIX64K, 0x0606_0606_0606_0606),
            (index::MTRR_FIX16K_A0000, 0),
            (index::MTRR_FIX4K_F8000, 0x0505_0505_0505_0505),
        ] {
            assert_eq!(machine.write(msr, value), Ok(MsrEffect::NONE), "{msr:#x}");
            assert_eq!(machine.read(msr), Ok(value), "{msr:#x}");
        }
        assert_eq!(machine.cpu.seg[sreg::GS].base, 0xffff_8881_0000_0000);
        assert_eq!(machine.cpu.mtrr_var[15], 0x3fff_8000_0800);
        assert_eq!(machine.cpu.mtrr_fixed[10], 0x0505_0505_0505_0505);
    }
}

#[test]
fn invalid_values_are_refused() {
    let mut machine = Machine::new(&intel_host());
    for (msr, value) in [
        (index::LSTAR, NONCANONICAL),
        (index::CSTAR, NONCANONICAL),
        (index::FS_BASE, NONCANONICAL),
        (index::GS_BASE, NONCANONICAL),
        (index::KERNEL_GS_BASE, NONCANONICAL),
        (index::SYSENTER_ESP, NONCANONICAL),
        (index::SYSENTER_EIP, NONCANONICAL),
        (index::PAT, 0x02),
        (index::PAT, 0x0300),
        (index::PAT, 0x08 << 56),
        (index::TSC_AUX, 1 << 32),
        (index::MCG_STATUS, 8),
        (index::MTRR_DEF_TYPE, 2),
        (index::MTRR_DEF_TYPE, 0x100),
        (index::MTRR_DEF_TYPE, 0x1006),
        (index::MTRR_PHYSBASE0, 0x106),
        (index::MTRR_PHYSBASE0, 2),
        (index::MTRR_PHYSBASE0, 1 << 46),
        (index::MTRR_PHYSBASE0 + 1, 0x400),
        (index::MTRR_PHYSBASE0 + 1, 1 << 46),
        (index::MTRR_FIX64K, 3),
        (index::MTRR_FIX4K_C0000, 0x0700),
        (index::MTRRCAP, 0),
        (index::MCG_CAP, 0),
        (index::ARCH_CAPABILITIES, 0),
        (index::FEATURE_CONTROL, 5),
        (index::PLATFORM_INFO, 0),
        (index::SPEC_CTRL, 4),
        (index::PRED_CMD, 2),
        (index::DEBUGCTL, 1 << 6),
        (0x122, 0),
        (0x10b, 1),
        (0xc001_0015, 0),
        (0xdead_beef, 0),
    ] {
        machine.refused(msr, value);
    }
}

#[test]
fn efer_rules() {
    let mut machine = Machine::new(&intel_host());
    let old = machine.cpu.efer;
    for value in [old | 1 << 1, old | 1 << 12, old | 1 << 14, old | 1 << 21, old | 1 << 63] {
        machine.refused(index::EFER, value);
    }
    machine.refused(index::EFER, old & !efer::LME);
    let effect = machine.write(index::EFER, old & !efer::LMA | efer::SCE).unwrap();
    assert_eq!((machine.cpu.efer, effect.flush), (old | efer::SCE, Flush::None), "LMA stays");
    let effect = machine.write(index::EFER, old & !efer::NXE).unwrap();
    assert_eq!(effect.flush, Flush::All);
    machine.cpu.cr0 = 1;
    machine.cpu.efer = 0;
    machine.write(index::EFER, efer::LME | efer::LMA).unwrap();
    assert_eq!(machine.cpu.efer, efer::LME);
    let mut machine = Machine::new(&amd_host());
    machine.write(index::EFER, old | 1 << 21).unwrap();
    assert_eq!(machine.cpu.efer, old | 1 << 21);
}

#[test]
fn time_stamp_counter() {
    let mut machine = Machine::new(&intel_host());
    assert_eq!(machine.read(index::TSC), Ok(1000));
    assert!(machine.write(index::TSC, 400).unwrap().tsc_changed);
    assert_eq!(
        (machine.read(index::TSC), machine.read(index::TSC_ADJUST)),
        (Ok(400), Ok(-600i64 as u64))
    );
    machine.write(index::TSC_ADJUST, 0).unwrap();
    assert_eq!((machine.read(index::TSC), machine.cpu.tsc_offset), (Ok(1000), 0));
    assert!(!machine.write(index::TSC_ADJUST, 0).unwrap().tsc_changed);
}

#[test]
fn misc_enable_keeps_read_only_bits() {
    let mut machine = Machine::new(&intel_host());
    assert_eq!(machine.read(index::MISC_ENABLE), Ok(0x1801));
    machine.write(index::MISC_ENABLE, 1 << 22).unwrap();
    assert_eq!(machine.read(index::MISC_ENABLE), Ok(0x1800 | 1 << 22));
}

#[test]
fn vendor_registers() {
    let mut intel = Machine::new(&intel_host());
    let mut amd = Machine::new(&amd_host());
    let capabilities = intel.read(index::ARCH_CAPABILITIES).unwrap();
    for (name, bit) in [
        ("RDCL_NO", 0),
        ("IBRS_ALL", 1),
        ("SSB_NO", 4),
        ("MDS_NO", 5),
        ("PSCHANGE_MC_NO", 6),
        ("TAA_NO", 8),
        ("ITS_NO", 62),
    ] {
        assert_eq!(capabilities >> bit & 1, 1, "{name}");
    }
    assert_eq!(capabilities >> 7 & 1, 0, "no TSX_CTRL");
    assert_eq!(intel.read(index::FEATURE_CONTROL), Ok(1));
    intel.write(index::SPEC_CTRL, 1).unwrap();
    assert_eq!(intel.read(index::SPEC_CTRL), Ok(1));
    intel.write(index::PRED_CMD, 1).unwrap();
    assert_eq!(intel.read(index::PRED_CMD), Err(GP), "write-only");
    intel.write(index::BIOS_SIGN_ID, 0).unwrap();
    assert_eq!(intel.read(index::BIOS_SIGN_ID), Ok(1 << 32));
    for msr in [index::ARCH_CAPABILITIES, index::SPEC_CTRL, index::FEATURE_CONTROL] {
        assert_eq!(amd.read(msr), Err(GP), "{msr:#x}");
    }
    for msr in [
        index::AMD_SYSCFG,
        index::AMD_HWCR,
        index::AMD_INT_PENDING,
        index::AMD_TSEG_MASK,
        index::AMD_LS_CFG,
        index::AMD_DE_CFG,
    ] {
        assert!(amd.read(msr).is_ok(), "{msr:#x}");
        assert!(amd.write(msr, 0).is_ok(), "{msr:#x}");
        assert_eq!(intel.read(msr), Err(GP), "{msr:#x}");
    }
    assert_eq!(amd.read(index::AMD_DE_CFG), Ok(2), "LFENCE is serializing");
}

#[test]
fn the_rest_is_the_platforms() {
    let mut machine = Machine::new(&intel_host());
    machine.write(0x1b, 0xfee0_0900).unwrap();
    assert_eq!(machine.board.apic_base, 0xfee0_0900);
    assert_eq!(machine.read(0x1b), Ok(0xfee0_0900));
    for msr in [0, 0x802, 0x6e0, 0x4b56_4d01, 0xffff_ffff, 0x210, 0x25a, 0x270] {
        assert_eq!(machine.read(msr), Err(GP), "{msr:#x}");
        machine.refused(msr, 0);
    }
}

#[test]
fn only_at_cpl_0() {
    let mut machine = Machine::new(&intel_host());
    machine.cpu = long(3);
    assert_eq!(machine.read(index::TSC), Err(GP));
    machine.refused(index::STAR, 0);
}
