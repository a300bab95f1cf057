//! Messages to the DHCP server of a network, as they are and as those of a member.
#![no_main]

use berth_fuzz::view;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let view = view();
    let _ = berth_net::dhcp::answer(data, &view);
    // What is behind the hardware address, the kind and the cookie is reached this way.
    let mut message = data.to_vec();
    message.resize(message.len().max(240), 0);
    message[..4].copy_from_slice(&[1, 1, 6, 0]);
    message[24..28].fill(0);
    message[28..34].copy_from_slice(&view.hosts[0].mac);
    message[236..240].copy_from_slice(&[99, 130, 83, 99]);
    let _ = berth_net::dhcp::answer(&message, &view);
});
