//! What `nft` itself says of the rules. It only checks them: nothing of the host is changed.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write;
use std::net::Ipv4Addr;
use std::process::{Command, Stdio};

use berth_net::port::{Port, Transport};
use berth_net::rules::{Net, commands, removal};

#[test]
fn nft_takes_the_rules() {
    let port = |address: Option<&str>, transport| Port {
        address: address.map(|address| address.parse().unwrap()),
        host: 8080,
        guest: 80,
        transport,
    };
    let to = Ipv4Addr::new(10, 89, 0, 2);
    let nets = [
        Net {
            bridge: "bt0".into(),
            subnet: "10.89.0.0/24".parse().unwrap(),
            internal: false,
            published: vec![
                (port(None, Transport::Tcp), to),
                (port(Some("192.0.2.2"), Transport::Udp), to),
                (port(Some("::1"), Transport::Tcp), to),
            ],
        },
        Net {
            bridge: "bt1".into(),
            subnet: "10.89.1.0/24".parse().unwrap(),
            internal: true,
            published: Vec::new(),
        },
    ];
    for commands in [commands("berth-test", &nets), removal("berth-test")] {
        let mut command = Command::new("nft");
        command.args(["-c", "-j", "-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped());
        let Ok(mut child) = command.stdout(Stdio::null()).spawn() else {
            return println!("skipped: nft is not installed");
        };
        let mut input = child.stdin.take().unwrap();
        input.write_all(commands.to_string().as_bytes()).unwrap();
        drop(input);
        let ran = child.wait_with_output().unwrap();
        let said = String::from_utf8_lossy(&ran.stderr);
        if said.contains("not permitted") {
            return println!("skipped: nft needs root");
        }
        assert!(ran.status.success(), "{said}\n{commands:#}");
    }
}
