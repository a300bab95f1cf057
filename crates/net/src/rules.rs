//! What is to be in nftables, as data: one table of ours, replaced as a whole. Nothing of anybody else's
//! is read or written.
//!
//! ```text
//! guard        prerouting, raw   a member's packets come from its network's addresses
//! prerouting   nat               published ports, for who comes from outside
//! output       nat               published ports, for the host itself; 127.0.0.0/8 is the proxy's
//! input        filter            members do not reach gateways of other networks; of an internal one they
//!                                reach DHCP, DNS and ping
//! forward      filter            what is new goes out of networks, or to published ports, not into them
//! postrouting  nat               what leaves a network has an address of the host
//! ```
//!
//! A packet that another table drops is dropped, whatever is here: hosts that forward nothing by default
//! (Docker sets that) need a rule of theirs for the bridges.

use std::net::{IpAddr, Ipv4Addr};

use serde_json::{Value, json};

use crate::port::Port;
use crate::subnet::Subnet;

const FAMILY: &str = "inet";
/// Priorities (nft(8)): before connection tracking, before and after routing, filtering.
const RAW: i32 = -300;
const DSTNAT: i32 = -100;
const FILTER: i32 = 0;
const SRCNAT: i32 = 100;

/// A network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Net {
    /// Its interface.
    pub bridge: String,
    /// Its addresses.
    pub subnet: Subnet,
    /// Nothing leads out of it or into it.
    pub internal: bool,
    /// Ports of the host that lead to members.
    pub published: Vec<(Port, Ipv4Addr)>,
}

/// The commands that remove our table, if it is there.
#[must_use]
pub fn removal(table: &str) -> Value {
    json!({ "nftables": replaced(table) })
}

/// The commands that make our table this, whatever it was.
#[must_use]
pub fn commands(table: &str, nets: &[Net]) -> Value {
    let mut all = replaced(table);
    all.push(json!({ "add": { "table": { "family": FAMILY, "name": table } } }));
    let chain = |name: &str, kind: &str, hook: &str, priority: i32| {
        json!({ "add": { "chain": {
            "family": FAMILY, "table": table, "name": name, "type": kind, "hook": hook,
            "prio": priority, "policy": "accept",
        } } })
    };
    all.push(chain("guard", "filter", "prerouting", RAW));
    all.push(chain("prerouting", "nat", "prerouting", DSTNAT));
    all.push(chain("output", "nat", "output", DSTNAT));
    all.push(chain("input", "filter", "input", FILTER));
    all.push(chain("forward", "filter", "forward", FILTER));
    all.push(chain("postrouting", "nat", "postrouting", SRCNAT));
    let mut add = |chain: &str, rules: Vec<Value>| {
        all.extend(rules.into_iter().map(|expr| {
            json!({ "add": { "rule": {
                "family": FAMILY, "table": table, "chain": chain, "expr": expr,
            } } })
        }));
    };
    add("guard", nets.iter().map(guard).collect());
    for chain in ["prerouting", "output"] {
        let published = nets.iter().flat_map(|net| &net.published);
        add(chain, published.filter_map(|(port, to)| publish(port, *to)).collect());
    }
    add("input", nets.iter().flat_map(|net| input(net, nets)).collect());
    add("forward", forward(nets));
    add("postrouting", nets.iter().flat_map(postrouting).collect());
    json!({ "nftables": all })
}

/// Adding what may be there makes removing it possible in any case.
fn replaced(table: &str) -> Vec<Value> {
    let table = json!({ "table": { "family": FAMILY, "name": table } });
    vec![json!({ "add": table }), json!({ "delete": table })]
}

fn test(left: Value, op: &str, right: Value) -> Value {
    json!({ "match": { "left": left, "op": op, "right": right } })
}

fn meta(key: &str, op: &str, name: &str) -> Value {
    test(json!({ "meta": { "key": key } }), op, json!(name))
}

fn ip(field: &str, op: &str, right: Value) -> Value {
    test(json!({ "payload": { "protocol": "ip", "field": field } }), op, right)
}

fn prefix(subnet: Subnet) -> Value {
    json!({ "prefix": { "addr": subnet.first().to_string(), "len": subnet.prefix() } })
}

fn connection(key: &str, right: Value) -> Value {
    test(json!({ "ct": { "key": key } }), "in", right)
}

fn destination_port(protocol: &str, right: Value) -> Value {
    test(json!({ "payload": { "protocol": protocol, "field": "dport" } }), "==", right)
}

fn drop() -> Value {
    json!({ "drop": null })
}

fn accept() -> Value {
    json!({ "accept": null })
}

/// Nobody has an address yet who asks for one by DHCP.
fn guard(net: &Net) -> Value {
    json!([
        meta("iifname", "==", &net.bridge),
        ip("saddr", "!=", prefix(net.subnet)),
        ip("saddr", "!=", json!("0.0.0.0")),
        drop(),
    ])
}

/// Nothing where the proxy does all: IPv6, and addresses of the loopback.
fn publish(port: &Port, to: Ipv4Addr) -> Option<Value> {
    let address = match port.address {
        None => None,
        Some(IpAddr::V4(address)) if address.is_unspecified() => None,
        Some(IpAddr::V4(address)) if !address.is_loopback() => Some(address),
        Some(_) => return None,
    };
    let at = match address {
        Some(address) => ip("daddr", "==", json!(address.to_string())),
        None => ip("daddr", "!=", json!({ "prefix": { "addr": "127.0.0.0", "len": 8 } })),
    };
    Some(json!([
        test(json!({ "fib": { "result": "type", "flags": ["daddr"] } }), "==", json!("local")),
        at,
        destination_port(port.transport.as_str(), json!(port.host)),
        { "dnat": { "family": "ip", "addr": to.to_string(), "port": port.guest } },
    ]))
}

fn input(net: &Net, all: &[Net]) -> Vec<Value> {
    let from = || meta("iifname", "==", &net.bridge);
    let mut rules = Vec::new();
    let others = all.iter().filter(|other| other.bridge != net.bridge);
    let others: Vec<_> = others.map(|other| other.subnet.gateway().to_string()).collect();
    if !others.is_empty() {
        rules.push(json!([from(), ip("daddr", "==", json!({ "set": others })), drop()]));
    }
    if net.internal {
        // Other addresses of the host may have servers that ask outside.
        let own = || ip("daddr", "==", json!(net.subnet.gateway().to_string()));
        let asked = |to: Value, protocol, port: u16| {
            json!([from(), to, destination_port(protocol, json!(port)), accept()])
        };
        let all = ip("daddr", "==", json!("255.255.255.255"));
        rules.push(json!([
            from(),
            connection("state", json!(["established", "related"])),
            accept()
        ]));
        rules.push(asked(own(), "udp", 53));
        rules.push(asked(own(), "tcp", 53));
        rules.push(asked(own(), "udp", 67));
        rules.push(asked(all, "udp", 67));
        rules.push(json!([from(), own(), ip("protocol", "==", json!("icmp")), accept()]));
        rules.push(json!([from(), drop()]));
    }
    rules
}

fn forward(nets: &[Net]) -> Vec<Value> {
    let mut rules = Vec::new();
    for net in nets {
        // Where the kernel hands bridged packets to IP's rules.
        let within = [meta("iifname", "==", &net.bridge), meta("oifname", "==", &net.bridge)];
        rules.push(json!([within[0], within[1], accept()]));
    }
    for net in nets.iter().filter(|net| net.internal) {
        for key in ["iifname", "oifname"] {
            rules.push(json!([meta(key, "==", &net.bridge), drop()]));
        }
    }
    for net in nets.iter().filter(|net| !net.internal) {
        let to = || meta("oifname", "==", &net.bridge);
        rules.push(json!([to(), connection("state", json!(["established", "related"])), accept()]));
        rules.push(json!([to(), connection("status", json!("dnat")), accept()]));
        rules.push(json!([to(), drop()]));
    }
    rules
}

fn postrouting(net: &Net) -> Vec<Value> {
    if net.internal {
        return Vec::new();
    }
    let from = || ip("saddr", "==", prefix(net.subnet));
    vec![
        json!([from(), meta("oifname", "!=", &net.bridge), { "masquerade": null }]),
        // A member that uses a published port of another one, which would answer it directly.
        json!([
            from(),
            ip("daddr", "==", prefix(net.subnet)),
            connection("status", json!("dnat")),
            { "masquerade": null },
        ]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::port::Transport;

    fn net(name: &str, subnet: &str) -> Net {
        let subnet = subnet.parse().unwrap();
        Net { bridge: name.into(), subnet, internal: false, published: Vec::new() }
    }

    fn port(address: Option<&str>) -> Port {
        let address = address.map(|address| address.parse().unwrap());
        Port { address, host: 8080, guest: 80, transport: Transport::Tcp }
    }

    /// The expressions of a chain's rules, each as text.
    fn rules(commands: &Value, chain: &str) -> Vec<String> {
        let all = commands["nftables"].as_array().unwrap().iter();
        all.map(|command| &command["add"]["rule"])
            .filter(|rule| rule["chain"] == chain)
            .map(|rule| rule["expr"].to_string())
            .collect()
    }

    #[test]
    fn only_our_table_is_named() {
        let mut one = net("bt0", "10.89.0.0/24");
        one.published.push((port(None), Ipv4Addr::new(10, 89, 0, 2)));
        for commands in [commands("berth-x", &[one]), removal("berth-x")] {
            for command in commands["nftables"].as_array().unwrap() {
                let (verb, object) = command.as_object().unwrap().iter().next().unwrap();
                let (kind, object) = object.as_object().unwrap().iter().next().unwrap();
                let named = if kind == "table" { &object["name"] } else { &object["table"] };
                assert_eq!((named, &object["family"]), (&json!("berth-x"), &json!("inet")));
                assert!(verb == "add" || (verb == "delete" && kind == "table"), "{command}");
            }
        }
    }

    #[test]
    fn published_ports_are_rules_but_on_loopback_and_ipv6() {
        let mut one = net("bt0", "10.89.0.0/24");
        let addresses = [None, Some("0.0.0.0"), Some("192.0.2.2"), Some("127.0.0.1"), Some("::1")];
        let to = Ipv4Addr::new(10, 89, 0, 2);
        one.published = addresses.iter().map(|address| (port(*address), to)).collect();
        let commands = commands("t", &[one]);
        for chain in ["prerouting", "output"] {
            let rules = rules(&commands, chain);
            assert_eq!(rules.len(), 3, "{rules:?}");
            assert!(rules[2].contains("192.0.2.2") && rules[2].contains("10.89.0.2"));
        }
    }

    #[test]
    fn networks_are_apart() {
        let mut nets = [net("bt0", "10.89.0.0/24"), net("bt1", "10.89.1.0/24")];
        nets[1].internal = true;
        let commands = commands("t", &nets);
        let input = rules(&commands, "input");
        assert!(input[0].contains("bt0") && input[0].contains("10.89.1.1"), "{input:?}");
        assert!(input.last().unwrap().contains("drop"));
        let forward = rules(&commands, "forward");
        let last = forward.last().unwrap();
        assert!(last.contains("bt0") && last.contains("drop"), "{last}");
        // Nothing of an internal network leaves by another address.
        assert!(rules(&commands, "postrouting").iter().all(|rule| !rule.contains("bt1")));
        assert_eq!(rules(&commands, "guard").len(), 2);
    }
}
