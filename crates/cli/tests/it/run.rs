//! `berth vm run` of an image, by the daemon.

use std::fs;
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::guest::{Debian, LIMIT, Running, run};
use crate::kept::Cloud;

fn machines(cloud: &Cloud) -> Vec<Value> {
    let list: Value = serde_json::from_str(&cloud.ok("vm ls --json")).unwrap();
    list.as_array().unwrap().clone()
}

/// Waits until there are so many.
fn await_machines(cloud: &Cloud, count: usize) -> Vec<Value> {
    let began = Instant::now();
    loop {
        let list = machines(cloud);
        if list.len() == count {
            return list;
        }
        assert!(began.elapsed() < LIMIT, "{list:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Runs a machine whose command says `up` and waits; by then it does.
fn waiting(cloud: &Cloud, name: &str) -> Running {
    let mut command = cloud.command(&format!("vm run --net none --name {name} debian -- sh -c"));
    command.arg("echo up; cat").stdin(Stdio::piped());
    let mut running = Running::start(command.stdout(Stdio::piped()));
    let mut out = running.stdout();
    let mut text = [0; 3];
    std::io::Read::read_exact(&mut out, &mut text).unwrap();
    assert_eq!(&text, b"up\n");
    running.0.stdout = Some(out);
    running
}

fn folders(cloud: &Cloud) -> usize {
    fs::read_dir(cloud.root().join("machines")).unwrap().count()
}

#[test]
fn a_machine_that_is_run_is_one_of_the_daemons_until_it_ends() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    let mut running = waiting(&cloud, "box");
    let list = machines(&cloud);
    assert_eq!(list.len(), 1, "{list:?}");
    assert_eq!((&list[0]["name"], &list[0]["temporary"]), (&"box".into(), &true.into()));
    assert_eq!(cloud.ok("vm exec box hostname"), "box\n");
    cloud.fails("vm suspend box", &["box", "removed when it ends"]);
    cloud.fails("vm run --name box debian -- true", &["box", "already"]);
    // A clone is one to be kept.
    cloud.ok("vm clone box copy");
    let copy: Value = serde_json::from_str(&cloud.ok("vm inspect copy")).unwrap();
    assert_eq!(copy[0]["temporary"], false);
    drop(running.stdin());
    assert_eq!(running.wait(LIMIT), Some(0));
    let list = await_machines(&cloud, 1);
    assert_eq!(list[0]["name"], "copy");
    cloud.ok("vm rm copy");
    assert_eq!(folders(&cloud), 0);
    // Without a name it gets one of its image.
    let ran = run(&mut cloud.command("vm run --net none debian -- hostname"), b"");
    assert!(ran.check(0).text().starts_with("debian-"), "{}", ran.text());
    let mut status = cloud.command("vm run --net none debian -- sh -c");
    run(status.arg("exit 7"), b"").check(7);
    assert_eq!(folders(&cloud), 0);
}

#[test]
fn who_runs_a_machine_may_be_killed() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    let running = waiting(&cloud, "box");
    kill_process(Pid::from_child(&running.0), Signal::KILL).unwrap();
    await_machines(&cloud, 0);
    assert_eq!(folders(&cloud), 0);
}

#[test]
fn a_machine_that_is_run_outlives_the_daemon_and_ends_with_its_guest() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    let mut running = waiting(&cloud, "box");
    let stderr = running.0.stderr.take();
    assert!(stderr.is_none());
    cloud.kill_daemon();
    assert_eq!(running.wait(LIMIT), Some(1));
    assert_eq!(cloud.ok("vm exec box echo still"), "still\n");
    cloud.ok("vm kill box");
    await_machines(&cloud, 0);
    // One that ended while there was no daemon.
    let running = waiting(&cloud, "other");
    let pid = machines(&cloud)[0]["pid"].as_i64().unwrap();
    cloud.kill_daemon();
    drop(running);
    kill_process(Pid::from_raw(i32::try_from(pid).unwrap()).unwrap(), Signal::KILL).unwrap();
    await_machines(&cloud, 0);
    assert_eq!(folders(&cloud), 0);
}

#[test]
fn what_cannot_be_run_leaves_nothing() {
    let cloud = Cloud::new();
    cloud.fails("vm run debian -- true", &["debian", "berth image bootstrap debian bookworm"]);
    cloud.fails("vm run other -- true", &["other"]);
    cloud.fails("vm run --net wifi debian -- true", &["wifi", "network"]);
    let root = cloud.root().join("machines");
    assert_eq!(fs::read_dir(root).unwrap().count(), 0);
}

/// The agent is looked for by the daemon, in its environment.
#[test]
fn an_agent_that_cannot_run_in_the_guest_is_refused() {
    for (agent, part) in [("/bin/sh", "shared libraries"), ("/no/agent", "/no/agent")] {
        let cloud = Cloud::new();
        let image = cloud.root().join("images/debian@bookworm");
        fs::create_dir_all(image.join("kernel/modules")).unwrap();
        fs::write(image.join("root.ext4"), [0; 512]).unwrap();
        fs::write(image.join("kernel/vmlinuz"), "k").unwrap();
        let info = r#"{"format":1,"name":"debian:bookworm","kernel_version":"6","created_unix_s":1,
                       "disk_bytes":512,"sources":[]}"#;
        fs::write(image.join("image.json"), info).unwrap();
        let ran = run(cloud.command("vm run --net none debian").env("BERTH_AGENT", agent), b"");
        ran.check_failed(&[part]);
        assert_eq!(folders(&cloud), 0);
    }
}

/// A state directory has one daemon, also for those who look for it elsewhere.
#[test]
fn a_daemon_is_found_wherever_it_listens() {
    let cloud = Cloud::new();
    let elsewhere = cloud.root().join("elsewhere.sock");
    let words = format!("daemon --socket {}", elsewhere.display());
    let mut daemon =
        Running::start(cloud.command(&words).stdout(Stdio::null()).stderr(Stdio::null()));
    let began = Instant::now();
    while std::os::unix::net::UnixStream::connect(&elsewhere).is_err() {
        assert!(began.elapsed() < LIMIT);
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(cloud.ok("vm ls --json"), "[]\n");
    assert!(!cloud.root().join("berth.sock").exists(), "no other was started");
    kill_process(Pid::from_child(&daemon.0), Signal::KILL).unwrap();
    daemon.wait(LIMIT);
    // What it noted is not believed any more.
    assert_eq!(cloud.ok("vm ls --json"), "[]\n");
    assert!(cloud.root().join("berth.sock").exists());
}
