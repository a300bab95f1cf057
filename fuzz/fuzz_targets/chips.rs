//! Interrupt controllers, timers, serial port, clock and power ports under any accesses.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    berth_vmm::chips::fuzz::chips(data);
});
