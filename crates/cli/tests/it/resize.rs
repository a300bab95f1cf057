//! Machines that run and are changed: memory, processors.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::guest::{Debian, LIMIT, Ran, run};
use crate::kept::{Cloud, get};

fn shell(cloud: &Cloud, name: &str, script: &str) -> String {
    let ran = run(cloud.command("vm").args(["exec", name, "sh", "-c", script]), b"");
    ran.check(0);
    ran.text().trim().to_owned()
}

/// MiB of the host's memory that a machine has.
fn resident(cloud: &Cloud) -> u64 {
    let text = get(&cloud.root().join("berth.sock"), "/berth/v1/stats").unwrap();
    let stats: Value = serde_json::from_str(&text).unwrap();
    stats[0]["resident_bytes"].as_u64().unwrap() >> 20
}

/// MiB that the guest says are free, or there. What is in a balloon from which it can take counts as there.
fn meminfo(cloud: &Cloud, key: &str) -> u64 {
    let text = shell(cloud, "box", &format!("grep ^{key}: /proc/meminfo"));
    let kib: u64 = text.split_whitespace().nth(1).unwrap().parse().unwrap();
    kib >> 10
}

/// What a command says when it does what it should, in part later.
fn says(ran: &Ran, parts: &[&str]) {
    ran.check(0);
    assert!(parts.iter().all(|part| ran.stderr.contains(part)), "{parts:?}: {}", ran.stderr);
}

fn wait_until(what: &str, mut check: impl FnMut() -> bool) {
    let began = Instant::now();
    while !check() {
        assert!(began.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn memory_of_a_guest_that_runs_is_taken_and_given() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    cloud.ok("vm create --net none --accel translate --memory 512M box debian:bookworm");
    cloud.ok("vm start box");
    // All of it was used once, and is full of what is not zero.
    let fill = "mkdir -p /m && mount -t tmpfs -o size=90% none /m && \
                tr '\\0' x < /dev/zero | head -c 300M > /m/x && cksum < /m/x";
    let sum = shell(&cloud, "box", fill);
    let full = resident(&cloud);
    assert!(full > 300, "{full}");
    // More than the guest can give: what it uses it keeps.
    says(&cloud.run("vm set --memory 64M box"), &["memory of box", "so far", "vm restart box"]);
    assert_eq!(shell(&cloud, "box", "cksum < /m/x"), sum);
    cloud.ok("vm set --memory 512M box");
    // What is free is the host's by and by without anybody asking.
    shell(&cloud, "box", "rm /m/x; echo 3 > /proc/sys/vm/drop_caches");
    wait_until("nothing that is free is given back", || resident(&cloud) + 200 < full);
    // Now it can be asked for most of it.
    cloud.ok("vm set --memory 192M box");
    let left = meminfo(&cloud, "MemFree");
    assert!(left < 180, "{left}");
    assert_eq!(cloud.inspect("box")["config"]["memory"], "192M");
    // Stored and gone on with it is as it was, with all that it was started with.
    cloud.ok("vm suspend box");
    cloud.ok("vm start box");
    let left = meminfo(&cloud, "MemFree");
    assert!(left < 180, "{left}");
    cloud.ok("vm set --memory 400M box");
    wait_until("it does not get its memory back", || meminfo(&cloud, "MemFree") > 200);
    assert_eq!(shell(&cloud, "box", &format!("{fill} | cat"))[..], sum[..]);
    // More than there was at its start is for the next one.
    says(&cloud.run("vm set --memory 640M box"), &["memory of box", "started with 512M"]);
    cloud.ok("vm restart box");
    assert!(meminfo(&cloud, "MemTotal") > 560);
}

#[test]
fn processors_of_a_guest_that_runs_come_and_go() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    cloud.ok("vm create --net none --accel translate --cpus 4 box debian:bookworm");
    cloud.ok("vm start box");
    let used = || shell(&cloud, "box", "nproc");
    assert_eq!(used(), "4");
    for count in ["1", "3", "2", "4", "2"] {
        cloud.ok(&format!("vm set --cpus {count} box"));
        assert_eq!(used(), count);
        // All of them work.
        shell(&cloud, "box", "for i in 1 2 3 4; do sha256sum /bin/bash & done; wait");
    }
    says(
        &cloud.run("vm set --cpus 5 --append quiet box"),
        &["cpus of box: it was started with 4", "append of box", "vm restart box"],
    );
    assert_eq!(used(), "2");
    // One that goes on has those that it had.
    cloud.ok("vm suspend box");
    cloud.ok("vm start box");
    assert_eq!(used(), "2");
    cloud.ok("vm set --cpus 4 box");
    assert_eq!(used(), "4");
    cloud.ok("vm pause box");
    says(&cloud.run("vm set --cpus 1 box"), &["cpus of box", "stands still"]);
    cloud.ok("vm unpause box");
    assert_eq!(used(), "4");
    cloud.ok("vm restart box");
    assert_eq!(used(), "1");
}
