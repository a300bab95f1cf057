//! Requests of a guest to a shared folder, which must not change anything beside it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    berth_vmm::virtio::fuzz::fs_requests(data);
});
