//! What several targets need.

use berth_net::view::{Host, View};

/// A network with a member.
#[must_use]
pub fn view() -> View {
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
