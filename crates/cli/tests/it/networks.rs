//! Published ports, and networks of the daemon's. These need root, and run in a network namespace of
//! their own, so that nothing of the host is changed.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::guest::{Debian, LIMIT, Running, run};
use crate::kept::Cloud;

/// Says a line back on port 80, with who asked.
const SERVER: &str = "perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(LocalPort => 80, Listen => \
                      9, ReuseAddr => 1) or die; while ($c = $s->accept) { $l = <$c>; print $c \
                      $c->peerhost . \" said $l\"; close $c }' >/dev/null 2>&1 &";
/// The host's address towards the outside, and the outside's.
const HERE: &str = "198.51.100.1";
const THERE: &str = "198.51.100.2";

/// A daemon in a network namespace, which leads to another one.
struct Lab {
    cloud: Cloud,
    outside: Running,
    _debian: Debian,
}

/// Runs a program of the host; gives what it printed.
fn tool(words: &str) -> String {
    let mut words = words.split_whitespace();
    let ran = Command::new(words.next().unwrap()).args(words).output().unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    String::from_utf8(ran.stdout).unwrap()
}

fn has(program: &str) -> bool {
    berth_cli::plan::has_program(program)
}

/// All of the network namespace that a network could leave something in.
fn traces() -> [String; 4] {
    let names = |text: String| -> String {
        let lines = text.lines().map(|line| line.split_whitespace().nth(1).unwrap_or_default());
        lines.collect::<Vec<_>>().join(" ")
    };
    [
        names(tool("ip -o link")),
        tool("ip route"),
        tool("nft list ruleset"),
        std::fs::read_to_string("/proc/sys/net/ipv4/ip_forward").unwrap(),
    ]
}

/// Says a line there and gives the answer.
fn say(to: impl Into<SocketAddr>) -> String {
    let mut stream = TcpStream::connect_timeout(&to.into(), Duration::from_secs(10)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"hello\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

impl Lab {
    fn new() -> Option<Self> {
        let debian = Debian::take()?;
        let cloud = debian.cloud();
        let outside = Running::start(Command::new("unshare").args(["--net", "sleep", "3600"]));
        let pid = outside.0.id();
        let own = std::fs::read_link("/proc/thread-self/ns/net").unwrap();
        let began = Instant::now();
        while std::fs::read_link(format!("/proc/{pid}/ns/net")).unwrap() == own {
            assert!(began.elapsed() < LIMIT);
            std::thread::sleep(Duration::from_millis(2));
        }
        tool("ip link set lo up");
        tool(&format!("ip link add here type veth peer name there netns {pid}"));
        tool(&format!("ip addr add {HERE}/24 dev here"));
        tool("ip link set here up");
        let lab = Self { cloud, outside, _debian: debian };
        lab.there(&format!("ip addr add {THERE}/24 dev there"));
        lab.there("ip link set there up");
        // So that what comes from networks and what is let into them are the rules' business alone.
        lab.there(&format!("ip route add default via {HERE}"));
        Some(lab)
    }

    fn enter(&self, words: &[&str]) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["-t", &self.outside.0.id().to_string(), "-n", "timeout", "10"]).args(words);
        command
    }

    /// Runs a program outside; gives what it printed, whether it succeeded or not.
    fn there(&self, words: &str) -> String {
        let words: Vec<_> = words.split_whitespace().collect();
        String::from_utf8(self.enter(&words).output().unwrap().stdout).unwrap()
    }

    /// Says a line to an address from outside.
    fn say_from_there(&self, to: &str, port: u16) -> String {
        let script = format!("exec 3<>/dev/tcp/{to}/{port} && echo hello >&3 && cat <&3");
        let ran = self.enter(&["bash", "-c", &script]).output().unwrap();
        String::from_utf8(ran.stdout).unwrap()
    }

    /// Runs a script in a guest; gives what it printed and whether it succeeded.
    fn sh(&self, name: &str, script: &str) -> (bool, String) {
        let words = ["vm", "exec", name, "--", "timeout", "10", "sh", "-c", script];
        let ran = run(self.cloud.command("").args(words), b"");
        (ran.status == Some(0), ran.text())
    }

    /// What a guest says to an address or a name, if anybody answers.
    fn say_from(&self, name: &str, to: &str, port: u16) -> String {
        let script = format!(
            "perl -MIO::Socket::INET -e '$c = IO::Socket::INET->new(PeerAddr => \"{to}:{port}\", Timeout => \
             3) or exit 1; print $c \"hello\\n\"; print <$c>'"
        );
        self.sh(name, &script).1
    }

    fn start(&self, name: &str, options: &str) -> String {
        let cloud = &self.cloud;
        cloud.ok(&format!("vm create --memory 256M {options} {name} debian:bookworm"));
        cloud.ok(&format!("vm start {name}"));
        let began = Instant::now();
        while !self
            .sh(name, "ip -4 addr show dev eth0 | grep -q inet && test -s /etc/resolv.conf")
            .0
        {
            assert!(began.elapsed() < LIMIT, "{name} gets no address");
            std::thread::sleep(Duration::from_millis(100));
        }
        cloud.inspect(name)["address"].as_str().unwrap_or_default().to_owned()
    }

    fn network(&self, name: &str) -> Value {
        let text = self.cloud.ok(&format!("network inspect {name}"));
        serde_json::from_str::<Value>(&text).unwrap()[0].clone()
    }
}

/// Runs a test on a thread in a network namespace of its own, or says why not.
fn apart(test: fn()) {
    let missing = ["ip", "nft", "unshare", "nsenter"].into_iter().find(|program| !has(program));
    if let Some(program) = missing {
        return println!("skipped: {program} is missing");
    }
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: bridges need root");
    }
    let thread = std::thread::spawn(move || match berth_vmm::confine::leave_network(true) {
        Ok(()) => test(),
        Err(error) => println!("skipped: no network namespace: {error}"),
    });
    thread.join().unwrap();
}

#[test]
fn ports_lead_into_a_guest_through_passt() {
    let Some(debian) = Debian::take() else { return };
    if !has("passt") {
        return println!("skipped: passt is not installed");
    }
    let cloud = debian.cloud();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    cloud.ok(&format!("vm create -p 127.0.0.1:{port}:80 box debian:bookworm"));
    assert_eq!(cloud.ok("vm port box"), format!("80/tcp -> 127.0.0.1:{port}\n"));
    assert_eq!(cloud.inspect("box")["config"]["port"][0]["guest"], 80);
    cloud.fails("vm start box", &["127.0.0.1", &port.to_string(), "in use"]);
    drop(taken);
    cloud.ok("vm start box");
    let started = run(cloud.command("vm exec box -- setsid sh -c").arg(SERVER), b"");
    started.check(0);
    let began = Instant::now();
    loop {
        // passt accepts before the guest does.
        let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        stream.write_all(b"hello\n").unwrap();
        let mut text = String::new();
        if stream.read_to_string(&mut text).is_ok() && text.ends_with("said hello\n") {
            break;
        }
        assert!(began.elapsed() < LIMIT, "{text}");
    }
    cloud.fails(&format!("vm create --net none -p {port}:80 x debian:bookworm"), &["network card"]);
    cloud.fails("vm create -p 1:1 -p 127.0.0.1:1:2 x debian:bookworm", &["same port"]);
    cloud.fails("vm create --net lab x debian:bookworm", &["no network lab"]);
    cloud.ok("vm kill box");
    // The port goes with the machine, if not in the same moment.
    cloud.ok("vm start box");
    cloud.ok("vm kill box");
    cloud.ok("vm set --publish-none box");
    assert_eq!(cloud.ok("vm port box"), "");
}

#[test]
fn machines_in_networks() {
    apart(|| {
        let Some(lab) = Lab::new() else { return };
        let before = traces();
        lab.cloud.ok("network create lab");
        lab.cloud.ok("network create --subnet 10.77.0.0/24 other");
        lab.cloud.fails("network create --subnet 10.77.0.0/16 x", &["10.77.0.0/24", "overlaps"]);
        let a = lab.start("a", "--net lab -p 8080:80");
        lab.start("b", "--net lab");
        let c = lab.start("c", "--net other");
        assert_eq!(c, "10.77.0.2");
        let server = format!("setsid sh -c '{}'", SERVER.replace('\'', "'\\''"));
        let ready = "until ss -tln | grep -q ':80 '; do sleep 0.1; done";
        assert!(lab.sh("a", &format!("{server}; {ready}")).0);
        names_resolve(&lab, &a);
        networks_are_apart(&lab, &a);
        ports_are_published(&lab, &a);
        a_running_clone_is_a_member_of_its_own(&lab, &a);
        a_daemon_is_killed(&lab, &a);
        lab.cloud.fails("network rm lab", &["in use by a, b"]);
        lab.cloud.ok("vm rename a web");
        assert!(lab.sh("b", "getent hosts web").1.starts_with(&a));
        assert!(!lab.sh("b", "getent hosts a").0);
        lab.cloud.ok("vm kill web");
        assert!(!lab.sh("b", "getent hosts web").0, "it does not run");
        lab.cloud.ok("vm start web");
        assert_eq!(lab.cloud.inspect("web")["address"], a.as_str());
        lab.cloud.ok("vm rm --force web b c");
        lab.cloud.ok("network rm lab other");
        assert_eq!(traces(), before);
    });
}

fn names_resolve(lab: &Lab, a: &str) {
    for name in ["a", "a.lab"] {
        let (_, found) = lab.sh("b", &format!("getent ahostsv4 {name}"));
        assert!(found.starts_with(a), "{name}: {found}");
        let answer = lab.say_from("b", name, 80);
        assert!(answer.ends_with("said hello\n"), "{name}: {answer}");
    }
    let members = &lab.network("lab")["members"];
    assert_eq!((&members[0]["name"], &members[0]["address"]), (&"a".into(), &a.into()));
}

fn a_running_clone_is_a_member_of_its_own(lab: &Lab, a: &str) {
    let cloud = &lab.cloud;
    cloud.ok("vm clone --running b twin");
    let address = |name: &str| cloud.inspect(name)["address"].as_str().unwrap().to_owned();
    let (own, twin) = (address("b"), address("twin"));
    assert!(own != twin && twin != a, "{own} {twin}");
    let has = |name: &str, address: &str| {
        let (_, text) = lab.sh(name, "ip -4 -o addr show dev eth0");
        text.contains(&format!("inet {address}/"))
    };
    // It may have none yet, but never the other's.
    let began = Instant::now();
    while !has("twin", &twin) {
        assert!(!has("twin", &own));
        assert!(began.elapsed() < LIMIT, "the clone gets no address");
    }
    assert!(has("b", &own));
    for name in ["twin", "b"] {
        assert!(lab.say_from(name, "a", 80).ends_with("said hello\n"), "{name}");
    }
    assert!(lab.sh("a", "getent hosts twin").1.starts_with(&twin));
    let mac = |name: &str| lab.sh(name, "cat /sys/class/net/eth0/address").1.trim().to_owned();
    let seen = |address: &str| lab.sh("a", &format!("ip neigh show {address}")).1;
    assert!(mac("b") != mac("twin"));
    assert!(seen(&own).contains(&mac("b")), "{}", seen(&own));
    assert!(seen(&twin).contains(&mac("twin")), "{}", seen(&twin));
    cloud.ok("vm rm --force twin");
}

fn networks_are_apart(lab: &Lab, a: &str) {
    assert!(!lab.sh("c", "getent hosts a").0 && !lab.sh("c", "getent hosts a.lab").0);
    assert_eq!(lab.say_from("c", a, 80), "");
    let gateway = lab.network("lab")["gateway"].as_str().unwrap().to_owned();
    // The name server of another network is out of reach, too.
    assert_eq!(lab.say_from("c", &gateway, 53), "");
    assert_eq!(lab.say_from_there(a, 80), "", "only what is published is let in");
}

fn ports_are_published(lab: &Lab, a: &str) {
    let answer = lab.say_from_there(HERE, 8080);
    assert_eq!(answer, format!("{THERE} said hello\n"), "who asks is seen");
    let here: SocketAddr = format!("{HERE}:8080").parse().unwrap();
    assert!(say(here).ends_with("said hello\n"));
    assert!(say(([127, 0, 0, 1], 8080)).ends_with("said hello\n"));
    assert!(say((Ipv6Addr::LOCALHOST, 8080)).ends_with("said hello\n"));
    // A guest of another network sees the host, and what is published there.
    assert!(lab.say_from("c", HERE, 8080).ends_with("said hello\n"));
    assert!(lab.say_from("b", HERE, 8080).ends_with("said hello\n"));
    let second = "vm create --net lab -p 8080:80 d debian:bookworm";
    lab.cloud.ok(second);
    lab.cloud.fails("vm start d", &["8080", "in use"]);
    lab.cloud.ok("vm rm d");
    // What leaves has the host's address.
    let script = "use IO::Socket::INET; $s = IO::Socket::INET->new(LocalPort => 9000, Listen => 9, \
                  ReuseAddr => 1) or die; $| = 1; print \"ready\\n\"; $c = $s->accept; <$c>; print $c \
                  $c->peerhost";
    let mut server = lab.enter(&["perl", "-e", script]);
    let mut server = Running::start(server.stdout(Stdio::piped()));
    let mut ready = [0; 6];
    server.stdout().read_exact(&mut ready).unwrap();
    assert_eq!(lab.say_from("a", THERE, 9000), HERE);
    assert_eq!(lab.network("lab")["members"][0]["address"], a);
}

fn a_daemon_is_killed(lab: &Lab, a: &str) {
    lab.cloud.kill_daemon();
    // Nobody has started another one yet.
    assert!(lab.say_from_there(HERE, 8080).ends_with("said hello\n"));
    tool(&format!("nft delete table inet {}", table()));
    // The next command brings all that is missing.
    assert_eq!(lab.cloud.inspect("a")["address"], a);
    let began = Instant::now();
    while !lab.say_from_there(HERE, 8080).ends_with("said hello\n") {
        assert!(began.elapsed() < LIMIT);
    }
    assert!(say(([127, 0, 0, 1], 8080)).ends_with("said hello\n"));
    names_resolve(lab, a);
    assert_eq!(lab.say_from("c", a, 80), "");
}

/// The table of the daemon's rules.
fn table() -> String {
    let list: Value = serde_json::from_str(&tool("nft -j list tables")).unwrap();
    let mut tables = list["nftables"].as_array().unwrap().iter().filter_map(|object| {
        object["table"]["name"].as_str().filter(|name| name.starts_with("berth-"))
    });
    tables.next().unwrap().to_owned()
}
