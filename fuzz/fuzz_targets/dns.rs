//! Messages to the name server of a network.
#![no_main]

use berth_net::view::{Host, View};

fn view() -> View {
    View {
        network: "lab".into(),
        subnet: "10.89.0.0/24".parse().expect("a subnet"),
        internal: false,
        hosts: vec![Host {
            name: "web".into(),
            mac: [2, 0, 0, 0, 0, 9],
            address: [10, 89, 0, 5].into(),
            is_up: true,
        }],
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let _ = berth_net::dns::answer(data, &view());
    let _ = berth_net::dns::failure(data);
});
