//! A virtual machine of KVM: its memory, interrupt controllers and vCPUs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use berth_x86::cpuid::{CpuidEntry, CpuidTable, Topology};
use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQCHIP_IOAPIC,
    KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KvmIrqRouting,
    kvm_clock_data, kvm_cpuid_entry2, kvm_irq_routing_entry, kvm_irqchip, kvm_msi,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Error, Kvm, VmFd};

use crate::bus::Bus;
use crate::chips::ioapic;
use crate::chips::pic::PicPair;
use crate::clock::Clock;
use crate::irq::InterruptSink;
use crate::memory::GuestRam;
use crate::vcpu::kvm::{KvmVcpu, chips};

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
    /// How fast guests' time-stamp counters can count.
    tsc: TscRate,
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
        let kvm = open()?;
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
        let supported = supported(&kvm)?;
        let tsc = tsc_rate(&kvm);
        Ok(Self { vm: Arc::new(vm), supported, tsc, irqchip: false, _ram: ram.clone() })
    }

    /// Adds KVM's interrupt controllers; before the first vCPU.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn add_irqchip(&mut self) -> Result<Arc<KvmChips>, KvmError> {
        self.vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        let routing = KvmIrqRouting::from_entries(&routes())
            .map_err(|_| KvmError::Lacks("room for the interrupt routes"))?;
        self.vm.set_gsi_routing(&routing).map_err(failed("KVM_SET_GSI_ROUTING"))?;
        for chip_id in [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE] {
            self.mask_pic(chip_id)?;
        }
        self.irqchip = true;
        Ok(Arc::new(KvmChips { vm: Arc::clone(&self.vm), lines: AtomicU32::new(0) }))
    }

    /// What of this table, one of this host, KVM provides.
    #[must_use]
    pub fn offered(&self, table: &CpuidTable, topology: Topology) -> CpuidTable {
        offered(table, topology, &self.supported)
    }

    /// Masks an 8259, as the emulated ones are until a guest sets them up: KVM's would interrupt with
    /// vectors of exceptions.
    fn mask_pic(&self, chip_id: u32) -> Result<(), KvmError> {
        let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
        self.vm.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP"))?;
        chip.chip.pic.imr = 0xff;
        self.vm.set_irqchip(&chip).map_err(failed("KVM_SET_IRQCHIP"))
    }

    /// Makes vCPU `index`, whose CPUID is this table, which KVM provides, on the buses for memory and
    /// ports. Its time-stamp counter counts `tsc_khz` ticks in a millisecond if that can be set.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn add_vcpu(
        &self,
        index: u32,
        cpuid: &CpuidTable,
        buses: (Arc<Bus>, Arc<Bus>),
        clock: Arc<dyn Clock>,
        tsc_khz: Option<u32>,
    ) -> Result<KvmVcpu, KvmError> {
        let fd = self.vm.create_vcpu(u64::from(index)).map_err(failed("KVM_CREATE_VCPU"))?;
        fd.set_cpuid2(&kvm_cpuid(cpuid)?).map_err(failed("KVM_SET_CPUID2"))?;
        let scaled = tsc_khz.filter(|&khz| self.scales(khz, &*clock));
        if let Some(khz) = scaled {
            fd.set_tsc_khz(khz).map_err(failed("KVM_SET_TSC_KHZ"))?;
        }
        let hz = scaled.map_or(clock.tsc_hz(), |khz| u64::from(khz) * 1000);
        Ok(KvmVcpu::new(index, fd, buses, self.irqchip, clock, hz))
    }

    /// Whether a time-stamp counter of this rate is made by scaling the host's.
    #[must_use]
    pub fn scales(&self, khz: u32, clock: &dyn Clock) -> bool {
        self.tsc == TscRate::Any && !is_rate_of(khz, clock)
    }
}

/// Whether this is the rate of the host's time-stamp counter, as exactly as that is known.
#[must_use]
pub fn is_rate_of(khz: u32, clock: &dyn Clock) -> bool {
    let here = clock.tsc_hz();
    here.abs_diff(u64::from(khz) * 1000) <= here / 1000
}

/// How fast time-stamp counters of guests can count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TscRate {
    /// As the host's.
    Host,
    /// As is wanted.
    Any,
}

/// What this host's KVM provides to vCPUs.
#[derive(Clone, Debug)]
pub struct KvmProcessor {
    supported: CpuId,
    /// How fast their time-stamp counters can count.
    pub tsc: TscRate,
}

impl KvmProcessor {
    /// Asks for it.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn look() -> Result<Self, KvmError> {
        let kvm = open()?;
        Ok(Self { supported: supported(&kvm)?, tsc: tsc_rate(&kvm) })
    }

    /// What of this table, one of this host, it provides.
    #[must_use]
    pub fn offered(&self, table: &CpuidTable, topology: Topology) -> CpuidTable {
        offered(table, topology, &self.supported)
    }
}

fn open() -> Result<Kvm, KvmError> {
    Kvm::new().map_err(|error| KvmError::Open(std::io::Error::from_raw_os_error(error.errno())))
}

fn supported(kvm: &Kvm) -> Result<CpuId, KvmError> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))
}

fn tsc_rate(kvm: &Kvm) -> TscRate {
    if kvm.check_extension(Cap::TscControl) { TscRate::Any } else { TscRate::Host }
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

/// What of a table KVM provides: features that it does not have are taken out.
fn offered(table: &CpuidTable, topology: Topology, supported: &CpuId) -> CpuidTable {
    let rows = table.entries().iter().map(|entry| {
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
        CpuidEntry { regs: [eax, ebx, ecx, edx], ..*entry }
    });
    CpuidTable::from_rows(rows.collect(), topology)
}

/// A table in KVM's form.
fn kvm_cpuid(table: &CpuidTable) -> Result<CpuId, KvmError> {
    let rows = table.entries().iter().map(|entry| {
        let [eax, ebx, ecx, edx] = entry.regs;
        let flags = if entry.subleaf.is_some() { KVM_CPUID_FLAG_SIGNIFCANT_INDEX } else { 0 };
        let (function, index) = (entry.leaf, entry.subleaf.unwrap_or(0));
        kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] }
    });
    let rows: Vec<_> = rows.collect();
    CpuId::from_entries(&rows).map_err(|_| KvmError::Lacks("room for CPUID"))
}

/// KVM's interrupt controllers, and its clock.
pub struct KvmChips {
    vm: Arc<VmFd>,
    /// Lines that are asserted, which KVM does not tell.
    lines: AtomicU32,
}

impl KvmChips {
    /// What is to be stored of the I/O APIC and of the 8259 pair.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn save(&self) -> Result<(ioapic::Registers, PicPair), KvmError> {
        let lines = self.lines.load(Ordering::SeqCst);
        let get = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            self.vm.get_irqchip(&mut chip).map_err(failed("KVM_GET_IRQCHIP")).map(|()| chip.chip)
        };
        let ioapic = get(KVM_IRQCHIP_IOAPIC)?;
        let pair = [get(KVM_IRQCHIP_PIC_MASTER)?, get(KVM_IRQCHIP_PIC_SLAVE)?];
        // SAFETY: KVM filled this part of the union, as the number of the chip says.
        let ioapic = unsafe { &ioapic.ioapic };
        // SAFETY: as above.
        let pair = pair.map(|chip| unsafe { chip.pic });
        Ok((chips::ioapic_from(ioapic, lines), chips::pic_from(&pair, lines)))
    }

    /// Puts back what was stored, after the local APICs.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn restore(&self, ioapic: &ioapic::Registers, pic: &PicPair) -> Result<(), KvmError> {
        // Everything is masked so far.
        let lines = chips::lines_of(ioapic.lines);
        for gsi in (0..24).filter(|gsi| lines >> gsi & 1 == 1) {
            self.set_line(gsi, true);
        }
        let put = |chip_id, fill: &dyn Fn(&mut kvm_irqchip)| {
            let mut chip = kvm_irqchip { chip_id, ..kvm_irqchip::default() };
            fill(&mut chip);
            self.vm.set_irqchip(&chip).map_err(failed("KVM_SET_IRQCHIP"))
        };
        let [master, slave] = chips::pic_to(pic);
        put(KVM_IRQCHIP_PIC_SLAVE, &|chip| chip.chip.pic = slave)?;
        put(KVM_IRQCHIP_PIC_MASTER, &|chip| chip.chip.pic = master)?;
        put(KVM_IRQCHIP_IOAPIC, &|chip| chip.chip.ioapic = chips::ioapic_to(ioapic))
    }

    /// Nanoseconds of the guest's paravirtual clock.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn clock_ns(&self) -> Result<u64, KvmError> {
        Ok(self.vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?.clock)
    }

    /// Sets that clock.
    ///
    /// # Errors
    /// [`KvmError`].
    pub fn set_clock_ns(&self, clock: u64) -> Result<(), KvmError> {
        let data = kvm_clock_data { clock, ..kvm_clock_data::default() };
        self.vm.set_clock(&data).map_err(failed("KVM_SET_CLOCK"))
    }
}

impl InterruptSink for KvmChips {
    fn set_line(&self, gsi: u32, level: bool) {
        let bit = 1u32.checked_shl(gsi).unwrap_or(0);
        if level {
            self.lines.fetch_or(bit, Ordering::SeqCst);
        } else {
            self.lines.fetch_and(!bit, Ordering::SeqCst);
        }
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
