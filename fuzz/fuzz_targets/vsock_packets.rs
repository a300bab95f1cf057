//! Vsock packets from the guest, with a host that connects, sends and closes in between.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    berth_vmm::virtio::fuzz::vsock_packets(data);
});
