//! Whole virtio devices (random numbers, console, vsock, disks) whose driver breaks all rules.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    berth_vmm::virtio::fuzz::devices(data);
});
