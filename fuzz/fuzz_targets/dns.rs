//! Messages to the name server of a network.
#![no_main]

use berth_fuzz::view;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = berth_net::dns::answer(data, &view());
    let _ = berth_net::dns::failure(data);
});
