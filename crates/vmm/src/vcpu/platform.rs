//! The machine around a translated vCPU: its local APIC, the buses, and the MSRs that belong to
//! them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use berth_x86::{CpuState, Platform};

use crate::bus::Bus;
use crate::chips::chipset::Chipset;
use crate::chips::lapic::{Lapic, MSR_APIC_BASE, MSR_TSC_DEADLINE, MSR_X2APIC};
use crate::pvclock::{
    MSR_SYSTEM_TIME, MSR_SYSTEM_TIME_OLD, MSR_WALL_CLOCK, MSR_WALL_CLOCK_OLD, PvClock,
};

const MSR_X2APIC_LAST: u32 = MSR_X2APIC + 0xff;
/// "No such hypercall" (-KVM_ENOSYS).
const HYPERCALL_UNKNOWN: u64 = -1000i64 as u64;

/// What all vCPUs of a machine share.
#[derive(Clone)]
pub struct Surroundings {
    /// Interrupt controllers.
    pub chipset: Arc<Chipset>,
    /// Memory-mapped devices.
    pub mmio: Arc<Bus>,
    /// Port devices.
    pub ports: Arc<Bus>,
    /// The paravirtual clock.
    pub pvclock: Arc<PvClock>,
}

/// The platform of one vCPU.
pub struct VcpuPlatform {
    around: Surroundings,
    apic: Arc<Lapic>,
    msrs: Arc<ClockMsrs>,
}

/// The MSRs of the paravirtual clock of a vCPU.
#[derive(Debug, Default)]
pub struct ClockMsrs {
    /// MSR_KVM_SYSTEM_TIME.
    pub system_time: AtomicU64,
    /// MSR_KVM_WALL_CLOCK.
    pub wall_clock: AtomicU64,
}

impl VcpuPlatform {
    /// For the vCPU with this local APIC.
    #[must_use]
    pub fn new(around: Surroundings, apic: Arc<Lapic>) -> Self {
        Self { around, apic, msrs: Arc::default() }
    }

    /// With these MSRs, which others can look at.
    #[must_use]
    pub fn with_msrs(self, msrs: Arc<ClockMsrs>) -> Self {
        Self { msrs, ..self }
    }
}

impl Platform for VcpuPlatform {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) {
        match self.apic.mmio_offset(gpa) {
            Some(offset) => self.apic.mmio_read(offset, data),
            None => {
                self.around.mmio.read(gpa, data);
            }
        }
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) {
        match self.apic.mmio_offset(gpa) {
            Some(offset) => {
                let effect = self.apic.mmio_write(offset, data);
                self.around.chipset.perform(self.apic.id(), effect);
            }
            None => {
                self.around.mmio.write(gpa, data);
            }
        }
    }

    fn port_read(&mut self, port: u16, size: u8) -> u32 {
        let mut bytes = [0; 4];
        if let Some(data) = bytes.get_mut(..usize::from(size)) {
            self.around.ports.read(u64::from(port), data);
        }
        u32::from_le_bytes(bytes)
    }

    fn port_write(&mut self, port: u16, size: u8, value: u32) {
        if let Some(data) = value.to_le_bytes().get(..usize::from(size)) {
            self.around.ports.write(u64::from(port), data);
        }
    }

    fn read_msr(&mut self, _cpu: &CpuState, msr: u32) -> Option<u64> {
        match msr {
            MSR_APIC_BASE => Some(self.apic.base()),
            MSR_TSC_DEADLINE => Some(self.apic.tsc_deadline()),
            MSR_X2APIC..=MSR_X2APIC_LAST => self.apic.read_msr(msr),
            MSR_SYSTEM_TIME | MSR_SYSTEM_TIME_OLD => {
                Some(self.msrs.system_time.load(Ordering::Relaxed))
            }
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_OLD => {
                Some(self.msrs.wall_clock.load(Ordering::Relaxed))
            }
            _ => None,
        }
    }

    fn write_msr(&mut self, cpu: &CpuState, msr: u32, value: u64) -> Option<()> {
        match msr {
            MSR_APIC_BASE => self.apic.set_base(value)?,
            MSR_TSC_DEADLINE => self.apic.set_tsc_deadline(value, cpu.tsc_offset),
            MSR_X2APIC..=MSR_X2APIC_LAST => {
                let effect = self.apic.write_msr(msr, value)?;
                self.around.chipset.perform(self.apic.id(), effect);
            }
            MSR_SYSTEM_TIME | MSR_SYSTEM_TIME_OLD => {
                self.msrs.system_time.store(value, Ordering::Relaxed);
                self.around.pvclock.set_system_time(self.apic.id(), value, cpu.tsc_offset);
            }
            MSR_WALL_CLOCK | MSR_WALL_CLOCK_OLD => {
                self.msrs.wall_clock.store(value, Ordering::Relaxed);
                self.around.pvclock.set_wall_clock(value);
            }
            _ => return None,
        }
        Some(())
    }

    fn acknowledge_interrupt(&mut self) -> Option<u8> {
        self.apic.acknowledge().or_else(|| {
            let external = self.apic.accepts_external();
            external.then(|| self.around.chipset.acknowledge_external()).flatten()
        })
    }

    fn interrupt_pending(&mut self) -> bool {
        self.apic.pending()
            || self.apic.accepts_external() && self.around.chipset.external_pending()
    }

    fn cr8(&mut self) -> u8 {
        self.apic.task_priority_class()
    }

    fn set_cr8(&mut self, class: u8) {
        self.apic.set_task_priority_class(class);
    }

    fn hypercall(&mut self, _number: u64, _args: [u64; 4]) -> u64 {
        HYPERCALL_UNKNOWN
    }
}
