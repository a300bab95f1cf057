//! Accesses to the PCI configuration ports and to the registers of virtio devices.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    berth_vmm::virtio::fuzz::pci_config(data);
});
