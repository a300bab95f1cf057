//! A virtual machine of KVM: its memory, interrupt controllers and vCPUs.

use std::sync::Arc;

use berth_x86::cpuid::CpuidTable;
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    KvmIrqRouting, kvm_cpuid_entry2, kvm_irq_routing_entry, kvm_irqchip, kvm_msi, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Error, Kvm, VmFd};

use crate::bus::Bus;
use crate::irq::InterruptSink;
use crate::memory::GuestRam;
use crate::vcpu::kvm::KvmVcpu;

/// Pages that KVM needs for real mode on old Intel processors; below the BIOS, above the APICs.
const TSS_ADDRESS: usize = 0xfffb_d000;
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// Why KVM has no machine for us.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// The device cannot be opened.
    #[error("/dev/kvm cannot be opened")]
    Open(#[source] std::io::Error),
    /// Something is missing.
    #[error("this KVM lacks {0}")]
    Lacks(&'static str),
    /// A call failed.
    #[error("{operation} failed")]
    Call {
        /// Which.
        operation: &'static str,
        /// The reason.
        source: std::io::Error,
    },
}

fn failed(operation: &'static str) -> impl Fn(Error) -> KvmError {
    move |error| KvmError::Call {
        operation,
        source: std::io::Error::from_raw_os_error(error.errno()),
    }
}

/// The machine.
pub struct KvmVm {
    vm: Arc<VmFd>,
    /// What KVM could tell guests.
    supported: CpuId,
    irqchip: bool,
    /// Guest memory stays mapped as long as KVM uses it.
    _ram: GuestRam,
}

impl KvmVm {
    /// A machine with this memory, without interrupt controllers.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn new(ram: &GuestRam) -> Result<Self, KvmError> {
        let kvm = Kvm::new()
            .map_err(|error| KvmError::Open(std::io::Error::from_raw_os_error(error.errno())))?;
        if kvm.get_api_version() != 12 {
            return Err(KvmError::Lacks("version 12 of its interface"));
        }
        for (cap, name) in [
            (Cap::UserMemory, "user memory"),
            (Cap::ExtCpuid, "CPUID control"),
            (Cap::ImmediateExit, "immediate exit"),
            (Cap::Xsave, "XSAVE state"),
        ] {
            if !kvm.check_extension(cap) {
                return Err(KvmError::Lacks(name));
            }
        }
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        vm.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        vm.set_identity_map_address(IDENTITY_MAP_ADDRESS)
            .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        for (slot, piece) in ram.pieces().iter().enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: piece.gpa,
                memory_size: piece.size,
                userspace_addr: piece.host_address,
            };
            // SAFETY: the range is one mapping of guest memory, which `_ram` keeps; slots do not
            // overlap.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self { vm: Arc::new(vm), supported, irqchip: false, _ram: ram.clone() })
    }

    /// Adds KVM's interrupt controllers and PIT; before the first vCPU.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn add_irqchip(&mut self) -> Result<Arc<dyn InterruptSink>, KvmError> {
        self.vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..kvm_pit_config::default() };
        self.vm.create_pit2(pit).map_err(failed("KVM_CREATE_PIT2"))?;
        let routing = KvmIrqRouting::from_entries(&routes())
            .map_err(|_| KvmError::Lacks("room for the interrupt routes"))?;
        self.vm.set_gsi_routing(&routing).map_err(failed("KVM_SET_GSI_ROUTING"))?;
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            self.mask_pic(chip_id)?;
        }
        self.irqchip = true;
        Ok(Arc::new(KvmInterrupts { vm: Arc::clone(&self.vm) }))
    }

    /// Masks an 8259, as the emulated ones are until a guest sets them up: KVM's would interrupt with
    /// vectors of exceptions.
    fn mask_pic(&self, chip_id: u32) -> Result<(), KvmError> {
        let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
        self.vm.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP"))?;
        chip.chip.pic.imr = 0xff;
        self.vm.set_irqchip(&chip).map_err(failed("KVM_SET_IRQCHIP"))
    }

    /// Makes vCPU `index`, whose CPUID is this table as far as KVM has it.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn add_vcpu(
        &self,
        index: u32,
        cpuid: &CpuidTable,
        mmio: Arc<Bus>,
        ports: Arc<Bus>,
    ) -> Result<KvmVcpu, KvmError> {
        let fd = self.vm.create_vcpu(u64::from(index)).map_err(failed("KVM_CREATE_VCPU"))?;
        let cpuid = kvm_cpuid(cpuid, &self.supported)?;
        fd.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        Ok(KvmVcpu::new(index, fd, mmio, ports, self.irqchip))
    }
}

/// The same wiring as that of the emulated chips: line 0 on pin 2, line 2 is the cascade.
fn routes() -> Vec<kvm_irq_routing_entry> {
    let mut routes = Vec::new();
    let mut add = |gsi: u32, chip: u32, pin: u32| {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..kvm_irq_routing_entry::default()
        };
        entry.u.irqchip.irqchip = chip;
        entry.u.irqchip.pin = pin;
        routes.push(entry);
    };
    for gsi in 0..24 {
        match gsi {
            2 => continue,
            0..8 => add(gsi, KVM_IRQCHIP_PIC_MASTER, gsi),
            8..16 => add(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8),
            _ => {}
        }
        add(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi });
    }
    routes
}

/// Our table in KVM's form: features that this KVM does not have are taken out.
fn kvm_cpuid(table: &CpuidTable, supported: &CpuId) -> Result<CpuId, KvmError> {
    let rows: Vec<_> = table
        .entries()
        .iter()
        .map(|entry| {
            let (function, index) = (entry.leaf, entry.subleaf.unwrap_or(0));
            let [mut eax, mut ebx, mut ecx, mut edx] = entry.regs;
            let found = supported.as_slice().iter();
            let found = found.copied().find(|row| row.function == function && row.index == index);
            let kvm = found.unwrap_or_default();
            match (function, index) {
                // x2APIC, TSC deadline and the hypervisor bit are not among what KVM reports.
                (1, _) => {
                    ecx &= kvm.ecx | 1 << 21 | 1 << 24 | 1 << 31;
                    edx &= kvm.edx | 1 << 28;
                }
                (7, 0) => (ebx, ecx, edx) = (ebx & kvm.ebx, ecx & kvm.ecx, edx & kvm.edx),
                (7 | 0xd, 1) | (0x4000_0001, _) => eax &= kvm.eax,
                (0xd, 0) => eax &= kvm.eax,
                (0x8000_0001, _) => (ecx, edx) = (ecx & kvm.ecx, edx & kvm.edx),
                (0x8000_0007, _) => edx &= kvm.edx | 1 << 8,
                (0x8000_0008, _) => ebx &= kvm.ebx,
                _ => {}
            }
            let flags = if entry.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
            kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
        })
        .collect();
    CpuId::from_entries(&rows).map_err(|_| KvmError::Lacks("room for CPUID"))
}

struct KvmInterrupts {
    vm: Arc<VmFd>,
}

impl InterruptSink for KvmInterrupts {
    fn set_line(&self, gsi: u32, level: bool) {
        if let Err(error) = self.vm.set_irq_line(gsi, level) {
            tracing::error!(gsi, %error, "KVM_IRQ_LINE failed");
        }
    }

    fn signal_msi(&self, address: u64, data: u32) {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..kvm_msi::default()
        };
        if let Err(error) = self.vm.signal_msi(msi) {
            tracing::error!(address, data, %error, "KVM_SIGNAL_MSI failed");
        }
    }
}
