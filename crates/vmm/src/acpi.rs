//! ACPI tables: RSDP, XSDT, FADT (hardware-reduced), MADT, DSDT, and MCFG when there is one.
//!
//! Hardware-reduced ACPI has no SCI, no power-management timer and no PM1 registers; power-off goes
//! through the sleep control register and reset through the reset register of `chips::power`. The power
//! button and the generation id are devices of the DSDT, notified by its generic event device
//! (`chips::events`).

use std::ops::Range;

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, And, Device, EISAName, Field, FieldAccessType, FieldEntry,
    FieldLockRule, FieldUpdateRule, IO, If, Interrupt, Local, Method, Name, Notify, ONE, OpRegion,
    OpRegionSpace, Package, Path, ResourceTemplate, Scope, Store, ZERO,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use vm_memory::{Bytes, GuestAddress};

use crate::boot::{ACPI_TABLES, BIOS_ENTRY, GENERATION_ID};
use crate::chips::events::{self, Event};
use crate::chips::{power, rtc, serial};
use crate::memory::{GuestRam, IOAPIC_BASE, LAPIC_BASE, PCI_WINDOW_32};

const OEM: [u8; 6] = *b"BERTH ";
const TABLE: [u8; 8] = *b"BERTHVM ";
/// FADT boot flags: legacy devices on the board, no VGA. No keyboard controller is promised.
const BOOT_FLAGS: u16 = 1 << 0 | 1 << 2;

/// What the tables tell of the machine.
#[derive(Clone, Debug)]
pub struct Machine {
    /// Local APIC ids, one for each vCPU.
    pub apic_ids: Vec<u32>,
    /// The 64-bit PCI memory window.
    pub pci_window_64: Range<u64>,
    /// Memory-mapped PCI configuration space of bus 0, if there is one.
    pub ecam: Option<u64>,
    /// Whether there is a serial port.
    pub serial: bool,
}

/// Why the tables could not be put into memory.
#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables ({len} bytes) do not fit at {ACPI_TABLES:#x}")]
pub struct AcpiError {
    len: usize,
}

/// Puts all tables into memory, the RSDP first, at [`ACPI_TABLES`].
///
/// # Errors
/// [`AcpiError`] when they do not fit below the BIOS entry.
pub fn install(ram: &GuestRam, machine: &Machine) -> Result<(), AcpiError> {
    let tables = build(machine);
    let fits = ACPI_TABLES + tables.len() as u64 <= BIOS_ENTRY;
    let written = fits && ram.memory().write_slice(&tables, GuestAddress(ACPI_TABLES)).is_ok();
    if written { Ok(()) } else { Err(AcpiError { len: tables.len() }) }
}

/// The tables as one piece of memory for [`ACPI_TABLES`].
fn build(machine: &Machine) -> Vec<u8> {
    let mut blob = vec![0; Rsdp::len().next_multiple_of(16)];
    let mut place = |table: Vec<u8>| {
        let at = ACPI_TABLES + blob.len() as u64;
        blob.extend_from_slice(&table);
        blob.resize(blob.len().next_multiple_of(16), 0);
        at
    };
    let dsdt = place(dsdt(machine));
    let mut entries = vec![place(fadt(dsdt)), place(madt(machine))];
    if let Some(base) = machine.ecam {
        let mut mcfg = MCFG::new(OEM, TABLE, 1);
        mcfg.add_ecam(base, 0, 0, 0);
        entries.push(place(bytes(&mcfg)));
    }
    let mut xsdt = XSDT::new(OEM, TABLE, 1);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = place(bytes(&xsdt));
    for (to, from) in blob.iter_mut().zip(bytes(&Rsdp::new(OEM, xsdt))) {
        *to = from;
    }
    blob
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn port(port: u16) -> GAS {
    GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port))
}

fn fadt(dsdt: u64) -> Vec<u8> {
    let mut fadt = FADTBuilder::new(OEM, TABLE, 1)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Neither button is a fixed feature.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = port(power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(power::SLEEP_STATUS);
    fadt.century = rtc::CENTURY;
    fadt.iapc_boot_arch = BOOT_FLAGS.into();
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"Berth\0\0\0").into();
    bytes(&fadt.finalize())
}

fn madt(machine: &Machine) -> Vec<u8> {
    let mut madt = Sdt::new(*b"APIC", 36, 5, OEM, TABLE, 1);
    madt.append(LAPIC_BASE as u32);
    // There is a pair of 8259 controllers.
    madt.append(1u32);
    for (uid, &id) in machine.apic_ids.iter().enumerate() {
        match u8::try_from(id) {
            Ok(id) if id < 255 => {
                madt.append_slice(&[0, 8, uid as u8, id]);
                madt.append(1u32);
            }
            _ => {
                madt.append_slice(&[9, 16, 0, 0]);
                madt.append(id);
                madt.append(1u32);
                madt.append(uid as u32);
            }
        }
    }
    madt.append_slice(&[1, 12, 0, 0]);
    madt.append(IOAPIC_BASE as u32);
    madt.append(0u32);
    // Interrupt source override: the timer's line 0 is on pin 2, as the bus has it.
    madt.append_slice(&[2, 10, 0, 0]);
    madt.append(2u32);
    madt.append(0u16);
    // Local NMI: none is wired, but LINT1 is where it would be, on all processors.
    madt.append_slice(&[4, 6, 0xff, 0, 0, 1]);
    madt.as_slice().to_vec()
}

fn dsdt(machine: &Machine) -> Vec<u8> {
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM, TABLE, 1);
    let s5 = Name::new("_S5_".into(), &Package::new(vec![&power::S5, &ZERO, &ZERO, &ZERO]));
    dsdt.append_slice(&bytes(&s5));
    dsdt.append_slice(&bytes(&PciRoot(machine)));
    dsdt.append_slice(&bytes(&RtcDevice));
    dsdt.append_slice(&bytes(&EventDevices));
    if machine.serial {
        dsdt.append_slice(&bytes(&SerialDevice));
    }
    dsdt.as_slice().to_vec()
}

struct PciRoot<'a>(&'a Machine);

impl Aml for PciRoot<'_> {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let not = AddressSpaceCacheable::NotCacheable;
        let buses = AddressSpace::new_bus_number(0u16, 0u16);
        let registers = IO::new(0xcf8, 0xcf8, 1, 8);
        let ports_low = AddressSpace::new_io(0u16, 0xcf7, None);
        let ports_high = AddressSpace::new_io(0xd00u16, 0xffff, None);
        let Range { start, end } = PCI_WINDOW_32;
        let low = AddressSpace::new_memory(not, true, start as u32, (end - 1) as u32, None);
        let not = AddressSpaceCacheable::NotCacheable;
        let Range { start, end } = self.0.pci_window_64.clone();
        let high = AddressSpace::new_memory(not, true, start, end - 1, None);
        let resources =
            ResourceTemplate::new(vec![&buses, &registers, &ports_low, &ports_high, &low, &high]);
        let hid = if self.0.ecam.is_some() { "PNP0A08" } else { "PNP0A03" };
        scope(sink, "PCI0", hid, &ZERO, &resources);
        // Pin A of each slot (ACPI 6.5, 6.2.13): address, pin, no link device, interrupt.
        let rows: Vec<[u32; 4]> = (1..32u8)
            .map(|slot| [u32::from(slot) << 16 | 0xffff, 0, 0, crate::pci::root::intx_gsi(slot)])
            .collect();
        let routes: Vec<Package<'_>> = rows
            .iter()
            .map(|row| Package::new(row.iter().map(|n| n as &dyn Aml).collect()))
            .collect();
        let table = Package::new(routes.iter().map(|route| route as &dyn Aml).collect());
        let routing = Name::new("_PRT".into(), &table);
        Scope::new(Path::new("\\_SB_.PCI0"), vec![&routing]).to_aml_bytes(sink);
    }
}

struct RtcDevice;

impl Aml for RtcDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ports = IO::new(rtc::PORT as u16, rtc::PORT as u16, 1, rtc::LEN as u8);
        scope(sink, "RTC_", "PNP0B00", &ZERO, &ResourceTemplate::new(vec![&ports]));
    }
}

struct SerialDevice;

impl Aml for SerialDevice {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let ports = IO::new(serial::COM1 as u16, serial::COM1 as u16, 1, serial::LEN as u8);
        let line = Interrupt::new(true, true, false, false, serial::COM1_GSI);
        scope(sink, "COM1", "PNP0501", &ONE, &ResourceTemplate::new(vec![&ports, &line]));
    }
}

/// The power button, the generation id, and the event device that notifies them.
struct EventDevices;

/// The names of the notified devices, under `\_SB`.
const POWER_BUTTON: &str = "PWRB";
const GENERATION: &str = "VGEN";
/// Values that devices are notified with: a button was pressed; the generation has changed.
const NOTIFIED: u8 = 0x80;

impl Aml for EventDevices {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        let hid = Name::new("_HID".into(), &EISAName::new("PNP0C0C"));
        let uid = Name::new("_UID".into(), &ZERO);
        let button = Device::new(Path::new(POWER_BUTTON), vec![&hid, &uid]);

        // Drivers go by the _CID, which is from Microsoft's specification, as ADDR is.
        let hid = Name::new("_HID".into(), &"BRTH0001");
        let cid = Name::new("_CID".into(), &"VM_Gen_Counter");
        let ddn = Name::new("_DDN".into(), &"VM_Gen_Counter");
        let (low, high) = (GENERATION_ID as u32, (GENERATION_ID >> 32) as u32);
        let place = Name::new("ADDR".into(), &Package::new(vec![&low, &high]));
        let generation = Device::new(Path::new(GENERATION), vec![&hid, &uid, &cid, &ddn, &place]);
        Scope::new(Path::new("\\_SB_"), vec![&button, &generation]).to_aml_bytes(sink);

        let hid = Name::new("_HID".into(), &"ACPI0013");
        let line = Interrupt::new(true, false, false, false, events::GSI);
        let crs = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&line]));
        let (at, len) = (events::PORT as u16, events::LEN as u8);
        let ports = OpRegion::new("EVRG".into(), OpRegionSpace::SystemIO, &at, &len);
        let field = Field::new(
            "EVRG".into(),
            FieldAccessType::Byte,
            FieldLockRule::NoLock,
            FieldUpdateRule::Preserve,
            vec![FieldEntry::Named(*b"EVNT", 8)],
        );
        // One read for all of them, since it clears the register.
        let (read, register) = (Local(0), Path::new("EVNT"));
        let take = Store::new(&read, &register);
        let (pressed, renewed) = (Event::PowerButton as u8, Event::Generation as u8);
        let (pressed, renewed) =
            (And::new(&ZERO, &read, &pressed), And::new(&ZERO, &read, &renewed));
        let (button, generation) = (Path::new(POWER_BUTTON), Path::new(GENERATION));
        let tell_button = Notify::new(&button, &NOTIFIED);
        let tell_generation = Notify::new(&generation, &NOTIFIED);
        let if_pressed = If::new(&pressed, vec![&tell_button]);
        let if_renewed = If::new(&renewed, vec![&tell_generation]);
        let method = Method::new("_EVT".into(), 1, true, vec![&take, &if_pressed, &if_renewed]);
        let device =
            Device::new(Path::new("GED_"), vec![&hid, &uid, &crs, &ports, &field, &method]);
        Scope::new(Path::new("\\_SB_"), vec![&device]).to_aml_bytes(sink);
    }
}

/// A device under `\_SB` with its id, number and resources.
fn scope(sink: &mut dyn AmlSink, name: &str, hid: &str, uid: &dyn Aml, crs: &ResourceTemplate<'_>) {
    let hid = Name::new("_HID".into(), &EISAName::new(hid));
    let uid = Name::new("_UID".into(), uid);
    let crs = Name::new("_CRS".into(), crs);
    let device = Device::new(Path::new(name), vec![&hid, &uid, &crs]);
    Scope::new(Path::new("\\_SB_"), vec![&device]).to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::{Machine, build};
    use crate::boot::{ACPI_TABLES, GENERATION_ID};

    fn u32_at(data: &[u8], at: usize) -> usize {
        u32::from_le_bytes(data[at..at + 4].try_into().unwrap()) as usize
    }
    fn u64_at(data: &[u8], at: usize) -> usize {
        u64::from_le_bytes(data[at..at + 8].try_into().unwrap()) as usize
    }
    fn sum(data: &[u8]) -> u8 {
        data.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }
    fn table(blob: &[u8], at: usize) -> &[u8] {
        let at = at - ACPI_TABLES as usize;
        &blob[at..at + u32_at(blob, at + 4)]
    }

    fn machine(cpus: u32) -> Machine {
        let apic_ids = (0..cpus).collect();
        Machine { apic_ids, pci_window_64: 1 << 32..1 << 36, ecam: Some(0xb000_0000), serial: true }
    }

    #[test]
    fn tables_are_linked_and_their_sums_are_zero() {
        let blob = build(&machine(16));
        assert_eq!(&blob[..8], b"RSD PTR ");
        assert_eq!((sum(&blob[..20]), sum(&blob[..36])), (0, 0));
        let xsdt = table(&blob, u64_at(&blob, 24));
        assert_eq!((&xsdt[..4], sum(xsdt)), (&b"XSDT"[..], 0));
        let mut names = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let found = table(&blob, u64_at(entry, 0));
            assert_eq!(sum(found), 0, "{:?}", &found[..4]);
            names.push(found[..4].to_vec());
            if &found[..4] == b"FACP" {
                let dsdt = table(&blob, u64_at(found, 140));
                assert_eq!((&dsdt[..4], sum(dsdt)), (&b"DSDT"[..], 0));
                assert_eq!(u32_at(found, 112) >> 20 & 1, 1, "hardware-reduced");
            }
        }
        assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
        assert!(blob.len() < 0x2_0000);
    }

    /// The DSDT's bytes of code.
    fn dsdt(blob: &[u8]) -> &[u8] {
        let xsdt = table(blob, u64_at(blob, 24));
        let fadt = table(blob, u64_at(xsdt, 36));
        &table(blob, u64_at(fadt, 140))[36..]
    }

    /// The content of the package whose length is encoded at `at` (ACPI 6.5, 20.2.4).
    fn package(code: &[u8], at: usize) -> &[u8] {
        let more = usize::from(code[at] >> 6);
        let first = usize::from(code[at] & if more == 0 { 0x3f } else { 0xf });
        let rest = code[at + 1..at + 1 + more].iter().rev();
        let high = rest.fold(0, |high, &byte| high << 8 | usize::from(byte));
        &code[at + 1 + more..at + (high << 4 | first)]
    }

    /// The device of this name under `\\_SB`, without its name.
    fn device<'a>(code: &'a [u8], name: &str) -> &'a [u8] {
        let mut rest = code;
        while let Some(&op) = rest.first() {
            // Names with a package or a buffer (`_S5_`), scopes, which hold devices.
            let at = if op == 0x08 { 6 } else { 1 };
            let content = package(rest, at);
            let mut inside = content.strip_prefix(b"\\_SB_".as_slice()).unwrap_or_default();
            while inside.starts_with(&[0x5b, 0x82]) {
                let device = package(inside, 2);
                if let Some(found) = device.strip_prefix(name.as_bytes()) {
                    return found;
                }
                inside = &inside[2 + len_of(inside, 2)..];
            }
            rest = &rest[at + len_of(rest, at)..];
        }
        panic!("no device {name}")
    }

    /// Bytes of the package whose length is encoded at `at`, with the length itself.
    fn len_of(code: &[u8], at: usize) -> usize {
        package(code, at).len() + 1 + usize::from(code[at] >> 6)
    }

    fn holds(code: &[u8], bytes: &[u8]) -> bool {
        code.windows(bytes.len()).any(|window| window == bytes)
    }

    #[test]
    fn the_event_device_notifies_button_and_generation() {
        let blob = build(&machine(2));
        let code = dsdt(&blob);
        // PNP0C0C, compressed.
        assert!(holds(device(code, "PWRB"), b"\x08_HID\x0c\x41\xd0\x0c\x0c"));
        let generation = device(code, "VGEN");
        for id in [b"_CID\x0dVM_Gen_Counter\0", b"_DDN\x0dVM_Gen_Counter\0"] {
            assert!(holds(generation, id));
        }
        let place = GENERATION_ID.to_le_bytes();
        let place = [b"ADDR\x12\x08\x02\x0c", &place[..4], b"\0"].concat();
        assert!(holds(generation, &place), "{generation:x?}");
        let events = device(code, "GED_");
        assert!(holds(events, b"_HID\x0dACPI0013\0"));
        // A consumer of line 20, level-triggered, active high, its own.
        assert!(holds(events, &[0x89, 6, 0, 0x01, 1, 20, 0, 0, 0]), "{events:x?}");
        // System I/O, one byte at 0x604.
        assert!(holds(events, b"\x5b\x80EVRG\x01\x0b\x04\x06\x01"), "{events:x?}");
        let method = [
            b"_EVT\x09".as_slice(),
            b"\x70EVNT\x60",
            b"\xa0\x0c\x7b\x60\x01\0\x86PWRB\x0a\x80",
            b"\xa0\x0d\x7b\x60\x0a\x02\0\x86VGEN\x0a\x80",
        ];
        assert!(events.ends_with(&method.concat()), "{events:x?}");
    }

    #[test]
    fn the_madt_lists_every_processor() {
        for cpus in [1, 4, 300] {
            let blob = build(&machine(cpus));
            let xsdt = table(&blob, u64_at(&blob, 24));
            let madt = table(&blob, u64_at(xsdt, 44));
            let (mut at, mut seen, mut pins) = (44, 0, 0);
            while at < madt.len() {
                match madt[at] {
                    0 | 9 => seen += 1,
                    1 => pins += 1,
                    _ => {}
                }
                at += usize::from(madt[at + 1]);
            }
            assert_eq!((at, seen, pins), (madt.len(), cpus, 1));
        }
    }
}
