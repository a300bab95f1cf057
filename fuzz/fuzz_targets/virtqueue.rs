//! Rings and descriptor chains in memory that the guest wrote.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    berth_vmm::virtio::fuzz::virtqueue(data);
});
