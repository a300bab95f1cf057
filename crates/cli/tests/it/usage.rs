//! What machines use, what is counted of them, what they are changed to, and logs that do not grow.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::guest::{ECHO, LIMIT, Running};
use crate::kept::{Cloud, get};

/// Computes forever: jmp to itself.
const SPIN: [u8; 2] = [0xeb, 0xfe];

#[test]
fn what_machines_use_is_shown() {
    let cloud = Cloud::new();
    cloud.create("busy", &SPIN);
    cloud.create("idle", &ECHO);
    cloud.fails("vm top --no-stream busy", &["busy does not run"]);
    cloud.fails("vm top nobody", &["no machine nobody"]);
    assert_eq!(cloud.ok("vm top --no-stream").lines().count(), 1);
    cloud.ok("vm start busy idle");
    let table = cloud.ok("vm top --no-stream");
    let line = |name: &str| table.lines().find(|line| line.starts_with(name)).unwrap().to_owned();
    let field = |name: &str, field: usize| -> f64 {
        line(name).split_whitespace().nth(field).unwrap().parse().unwrap()
    };
    assert!(table.starts_with("NAME"), "{table}");
    assert!(field("busy", 1) > 20.0 && field("busy", 2) > 20.0, "{table}");
    assert!(line("busy").contains("64M"), "{table}");
    let json = cloud.ok("vm top --no-stream --json busy");
    let shown: Value = serde_json::from_str(&json).unwrap();
    assert_eq!((&shown["name"], &shown["memory_bytes"]), (&"busy".into(), &(64 << 20).into()));
    let resident = shown["resident_bytes"].as_u64().unwrap();
    assert!((1 << 20..200 << 20).contains(&resident), "{resident}");
    assert_eq!(shown["vcpu_percent"].as_array().unwrap().len(), 1);
    // Until the machines that were named are gone.
    cloud.ok("vm pause idle");
    let mut top = cloud.command("vm top -i 0.1 idle");
    let mut top = Running::start(top.stdin(Stdio::null()).stdout(Stdio::piped()));
    let mut from = top.stdout();
    let mut byte = [0];
    let mut text = String::new();
    while text.matches("(paused)").count() < 3 {
        from.read_exact(&mut byte).unwrap();
        text.push(char::from(byte[0]));
    }
    cloud.ok("vm kill idle");
    assert_eq!(top.wait(LIMIT), Some(0));
    cloud.ok("vm pause busy");
    let before = stats(&cloud);
    std::thread::sleep(Duration::from_millis(300));
    let after = stats(&cloud);
    assert_eq!((&after["state"], &after["vcpu_ms"]), (&"paused".into(), &before["vcpu_ms"]));
}

fn stats(cloud: &Cloud) -> Value {
    let text = get(&cloud.root().join("berth.sock"), "/berth/v1/machines/busy/stats").unwrap();
    serde_json::from_str(&text).unwrap()
}

#[test]
fn stats_are_streamed_until_the_end() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    cloud.ok("vm start a");
    let ask = |path: &str| {
        let mut stream = UnixStream::connect(cloud.root().join("berth.sock")).unwrap();
        let head = "HTTP/1.1\r\nHost: berth\r\nConnection: close\r\n\r\n";
        stream.write_all(format!("GET {path} {head}").as_bytes()).unwrap();
        stream
    };
    let mut stream = ask("/berth/v1/machines/a/stats?stream=true&interval=0.1");
    let mut text = String::new();
    let mut byte = [0];
    while text.matches("\"cpu_ms\"").count() < 3 {
        stream.read_exact(&mut byte).unwrap();
        text.push(char::from(byte[0]));
    }
    cloud.ok("vm kill a");
    stream.read_to_string(&mut text).unwrap();
    assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    let mut answer = String::new();
    ask("/berth/v1/machines/a/stats?interval=0").read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400") && answer.contains("0.1 to 3600"), "{answer}");
}

#[test]
fn metrics_are_for_each_machine() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    cloud.create("b", &ECHO);
    cloud.ok("vm start a");
    cloud.ok("vm restart --time 0 a");
    cloud.ok("vm start b");
    let process = cloud.inspect("b")["pid"].as_u64().unwrap();
    let process = rustix::process::Pid::from_raw(i32::try_from(process).unwrap()).unwrap();
    kill_process(process, Signal::KILL).unwrap();
    cloud.wait_for("b", "failed");
    let text = get(&cloud.root().join("berth.sock"), "/berth/v1/metrics").unwrap();
    for line in [
        "berth_machine_state{machine=\"a\",state=\"running\"} 1",
        "berth_machine_state{machine=\"a\",state=\"stopped\"} 0",
        "berth_machine_state{machine=\"b\",state=\"failed\"} 1",
        "berth_machine_starts_total{machine=\"a\"} 2",
        "berth_machine_restarts_total{machine=\"a\"} 1",
        "berth_machine_failures_total{machine=\"b\"} 1",
        "berth_machine_memory_bytes{machine=\"b\"} 67108864",
        "berth_machines{state=\"running\"} 1",
    ] {
        assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
    }
    for name in [
        "berth_machine_cpu_seconds_total{machine=\"a\"}",
        "berth_machine_vcpu_seconds_total{machine=\"a\",vcpu=\"0\"}",
        "berth_machine_resident_memory_bytes{machine=\"a\"}",
        "berth_machine_start_time_seconds{machine=\"a\"}",
        "berth_machine_uptime_seconds{machine=\"a\"}",
        "process_cpu_seconds_total",
    ] {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        let value: f64 = line.rsplit(' ').next().unwrap().parse().unwrap();
        assert!(value >= 0.0, "{line}");
    }
    assert!(!text.contains("cpu_seconds_total{machine=\"b\"}"), "{text}");
    // Each family is described once, before its samples.
    let mut described = Vec::new();
    for line in text.lines() {
        let name = line.trim_start_matches("# TYPE ").split([' ', '{']).next().unwrap().to_owned();
        match line.split(' ').nth(1) {
            Some("TYPE") => described.push(name),
            Some("HELP") => {}
            _ => assert_eq!(described.last(), Some(&name), "{line}"),
        }
    }
    let count = described.len();
    described.sort();
    described.dedup();
    assert_eq!(described.len(), count);
}

#[test]
fn machines_are_changed_from_the_next_start_on() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    assert_eq!(cloud.ok("vm set --cpus 2 --memory 96M --append quiet a"), "a\n");
    let config = cloud.inspect("a")["config"].clone();
    assert_eq!((&config["cpus"], &config["append"]), (&2.into(), &"quiet".into()));
    cloud.ok("vm start a");
    let memory = || {
        let text = get(&cloud.root().join("berth.sock"), "/berth/v1/stats").unwrap();
        serde_json::from_str::<Value>(&text).unwrap()[0]["memory_bytes"].as_u64().unwrap() >> 20
    };
    assert_eq!(memory(), 96);
    // One that runs goes on as it is.
    let ran = cloud.run("vm set --memory 64M --cpus 1 a");
    ran.check(0);
    assert!(ran.stderr.contains("until it is started again"), "{}", ran.stderr);
    assert_eq!(memory(), 96);
    cloud.kill_daemon();
    assert_eq!(cloud.inspect("a")["config"]["memory"], "64M");
    assert_eq!(memory(), 96, "a daemon that comes later knows it too");
    cloud.ok("vm restart --time 0 a");
    assert_eq!(memory(), 64);
    // What is stored is not changed.
    cloud.ok("vm suspend a");
    cloud.fails("vm set --cpus 3 a", &["a is suspended", "processors"]);
    cloud.fails("vm set --memory 1G a", &["a is suspended", "memory"]);
    cloud.ok("vm set --append debug a");
    cloud.ok("vm start a");
    cloud.ok("vm kill a");
    cloud.fails("vm set --memory 1K a", &["1K of memory"]);
    cloud.fails("vm set --env A=b a", &["needs an image"]);
    cloud.fails("vm set --cpus 2 nobody", &["no machine nobody"]);
    let ran = cloud.run("vm set a");
    ran.check(2);
    assert!(ran.stderr.contains("nothing is to be changed"), "{}", ran.stderr);
    // What somebody wrote into it meanwhile is kept, or said.
    let toml = cloud.root().join("machines/a/vm.toml");
    let good = fs::read_to_string(&toml).unwrap();
    fs::write(&toml, good.replace("cpus = 1", "cpus = 4")).unwrap();
    cloud.ok("vm set --memory 80M a");
    let text = fs::read_to_string(&toml).unwrap();
    assert!(text.contains("cpus = 4") && text.contains("80M") && text.contains("debug"), "{text}");
    fs::write(&toml, "rubbish").unwrap();
    cloud.fails("vm set --cpus 1 a", &["vm.toml", "line 1"]);
    fs::write(&toml, good).unwrap();
}

#[test]
fn logs_do_not_grow_without_limit() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    let (daemon_log, folder) = (cloud.root().join("daemon.log"), cloud.root().join("machines/a"));
    let len = |path: &std::path::Path| fs::metadata(path).map_or(0, |meta| meta.len());
    // As if they had said much already.
    let fill = |path: &std::path::Path| {
        let file = fs::File::options().append(true).create(true).open(path).unwrap();
        (&file).write_all(&vec![b'\n'; 5 << 20]).unwrap();
    };
    fill(&daemon_log);
    fill(&folder.join("vmm.log"));
    cloud.ok("vm start a");
    assert!(len(&daemon_log) < 1 << 20 && len(&cloud.root().join("daemon.log.1")) > 5 << 20);
    assert!(len(&folder.join("vmm.log")) < 1 << 20 && len(&folder.join("vmm.log.1")) == 5 << 20);
    // It goes on in the new one, and so does the next.
    cloud.ok("vm kill a");
    let began = Instant::now();
    while !fs::read_to_string(&daemon_log).unwrap().contains("Stopped") {
        assert!(began.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(10));
    }
    fill(&daemon_log);
    cloud.kill_daemon();
    cloud.ok("vm ls");
    assert!(len(&daemon_log) < 1 << 20);
}

#[test]
fn a_daemon_says_what_it_does_as_json() {
    let cloud = Cloud::new();
    let mut command = cloud.command("daemon --log-format json");
    let mut daemon = Running::start(command.stdin(Stdio::null()).stderr(Stdio::piped()));
    let socket = cloud.root().join("berth.sock");
    let began = Instant::now();
    while get(&socket, "/berth/v1/info").is_none() {
        assert!(began.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(10));
    }
    cloud.create("a", &ECHO);
    cloud.ok("vm rm a");
    let pid = rustix::process::Pid::from_child(&daemon.0);
    kill_process(pid, Signal::TERM).unwrap();
    let mut text = String::new();
    daemon.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["fields"]["message"], "listening", "{text}");
    let created = lines.iter().find(|line| line["fields"]["kind"] == "Created").unwrap();
    assert_eq!((&created["fields"]["machine"], &created["level"]), (&"a".into(), &"INFO".into()));
    assert!(!text.contains('\x1b'), "{text}");
}
