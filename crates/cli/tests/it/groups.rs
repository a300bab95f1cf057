//! Control groups of machines.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};

use crate::guest::{ECHO, LIMIT};
use crate::kept::{Cloud, pid, wait_until_gone};

/// A loop without an end.
const BUSY: [u8; 2] = [0xeb, 0xfe];

/// Whether machines here have any.
fn has_groups(cloud: &Cloud) -> bool {
    let text = cloud.run("doctor").text();
    let line = text.lines().find(|line| line.contains("control groups")).unwrap();
    let has = line.contains("machines are in");
    if !has {
        println!("skipped: {line}");
    }
    has
}

fn groups(cloud: &Cloud, name: &str) -> Vec<PathBuf> {
    let machine = cloud.inspect(name);
    let groups = machine["control_group"].as_array().unwrap().iter();
    groups.map(|group| group.as_str().unwrap().into()).collect()
}

fn is_in(group: &Path, pid: &str) -> bool {
    let members = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
    members.lines().any(|line| line == pid)
}

/// What a limit is, by what either version calls it.
fn limit(groups: &[PathBuf], names: [&str; 2]) -> String {
    let files = groups.iter().flat_map(|group| names.map(|name| group.join(name)));
    files.into_iter().find_map(|path| fs::read_to_string(path).ok()).unwrap().trim().to_owned()
}

fn cpu(groups: &[PathBuf]) -> String {
    limit(groups, ["cpu.max", "cpu.cfs_quota_us"])
}

fn memory(groups: &[PathBuf]) -> String {
    limit(groups, ["memory.max", "memory.limit_in_bytes"])
}

fn wait_until(what: &str, mut check: impl FnMut() -> bool) {
    let began = Instant::now();
    while !check() {
        assert!(began.elapsed() < LIMIT, "{what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn none_is_left(groups: &[PathBuf], cloud: &Cloud) {
    wait_until("a group is left", || {
        !groups.iter().any(|group| group.exists()) && !cloud.root().join("groups").exists()
    });
}

#[test]
fn each_machine_has_a_group_as_long_as_it_runs() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    if !has_groups(&cloud) {
        return;
    }
    assert!(groups(&cloud, "a").is_empty());
    let start = || {
        cloud.ok("vm start a");
        let machine = cloud.inspect("a");
        let (has, process) = (groups(&cloud, "a"), pid(&machine));
        assert!(!has.is_empty());
        let number = process.as_raw_nonzero().to_string();
        wait_until("it is in no group", || has.iter().all(|group| is_in(group, &number)));
        (has, process)
    };
    let (has, _) = start();
    cloud.ok("vm kill a");
    none_is_left(&has, &cloud);
    assert!(groups(&cloud, "a").is_empty());
    // Whatever ends it.
    let (has, process) = start();
    kill_process(process, Signal::KILL).unwrap();
    none_is_left(&has, &cloud);
    // A daemon that comes later knows it, and removes it.
    let (has, _) = start();
    cloud.kill_daemon();
    assert_eq!(groups(&cloud, "a"), has);
    cloud.ok("vm kill a");
    none_is_left(&has, &cloud);
    // Even if it was not there at the end.
    let (has, process) = start();
    cloud.kill_daemon();
    kill_process(process, Signal::KILL).unwrap();
    wait_until_gone(process);
    assert!(has.iter().all(|group| group.exists()));
    cloud.ok("vm ls");
    none_is_left(&has, &cloud);
}

#[test]
fn limits_hold_from_the_start_and_are_changed_at_once() {
    let cloud = Cloud::new();
    let kernel = cloud.kernel("busy.elf", &BUSY);
    let create = |words: &str| format!("vm create --kernel {kernel} --memory 64M {words}");
    cloud.fails(&create("--memory-limit 32M a"), &["32M", "64M"]);
    cloud.fails(&create("--cpu-limit 0.001 a"), &["0.001", "0.01"]);
    assert_eq!(cloud.run(&create("--cpu-limit many a")).status, Some(2));
    cloud.ok(&create("--cpu-limit 0.25 --memory-limit 512M a"));
    let toml = fs::read_to_string(cloud.root().join("machines/a/vm.toml")).unwrap();
    assert!(
        toml.contains("cpu_limit = 0.25") && toml.contains("memory_limit = \"512M\""),
        "{toml}"
    );
    if !has_groups(&cloud) {
        cloud.fails("vm start a", &["limits", "control groups"]);
        return;
    }
    cloud.ok("vm start a");
    let has = groups(&cloud, "a");
    assert!(cpu(&has).starts_with("25000"), "{}", cpu(&has));
    assert_eq!(memory(&has), (512u64 << 20).to_string());
    // It does hold.
    let process = pid(&cloud.inspect("a")).as_raw_nonzero();
    let used = || {
        let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        let ticks = |n: usize| fields[n].parse::<u64>().unwrap();
        // Hundredths of a second.
        (ticks(11) + ticks(12)) as f64 / 100.0
    };
    let rate = || {
        let (before, began) = (used(), Instant::now());
        std::thread::sleep(Duration::from_secs(2));
        (used() - before) / began.elapsed().as_secs_f64()
    };
    std::thread::sleep(Duration::from_millis(300));
    let slow = rate();
    assert!(slow < 0.4, "{slow}");
    cloud.ok("vm set --cpu-limit none --memory-limit 1G a");
    assert!(cpu(&has).starts_with("max") || cpu(&has) == "-1", "{}", cpu(&has));
    assert_eq!(memory(&has), (1u64 << 30).to_string());
    let fast = rate();
    println!("{slow} of a processor with a limit of 0.25, {fast} without");
    assert!(fast > slow, "{fast}, {slow} before");
    cloud.ok("vm set --memory-limit none --cpu-limit 2 a");
    assert!(cpu(&has).starts_with("200000"), "{}", cpu(&has));
    let config = &cloud.inspect("a")["config"];
    assert!(config["memory_limit"].is_null() && config["cpu_limit"] == 2.0, "{config}");
    cloud.ok("vm kill a");
    none_is_left(&has, &cloud);
}

/// What root's processes may do to the host those of machines may not, unless they need it.
#[test]
fn machines_of_root_have_no_rights_over_the_host() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: this is not root");
        return;
    }
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    let shared = tempfile::tempdir().unwrap();
    let kernel = cloud.root().join("a.elf");
    let (kernel, shared) = (kernel.display(), shared.path().display());
    cloud.ok(&format!("vm create --kernel {kernel} --memory 64M --share {shared}:tag b"));
    let disk = cloud.root().join("disk.raw");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    fs::set_permissions(&disk, std::os::unix::fs::PermissionsExt::from_mode(0o600)).unwrap();
    std::os::unix::fs::chown(&disk, Some(65_534), Some(65_534)).unwrap();
    let disk = disk.display();
    cloud.ok(&format!("vm create --kernel {kernel} --memory 64M --disk {disk} c"));
    let own = fs::read_to_string("/proc/self/uid_map").unwrap();
    for (name, confined) in [("a", true), ("b", false), ("c", false)] {
        cloud.ok(&format!("vm start {name}"));
        let process = pid(&cloud.inspect(name)).as_raw_nonzero();
        let map = fs::read_to_string(format!("/proc/{process}/uid_map")).unwrap();
        let log =
            fs::read_to_string(cloud.root().join(format!("machines/{name}/vmm.log"))).unwrap();
        if confined && log.contains("root keeps its rights here") {
            println!("skipped: {log}");
            return;
        }
        let fields: Vec<_> = map.split_whitespace().collect();
        assert_eq!(fields == ["0", "0", "1"], confined, "{name}: {map}, here {own}");
        assert_eq!(log.contains("keeps the rights of root"), !confined, "{log}");
    }
    // It is stored, and goes on, and others go on with it.
    cloud.console("a").exchange(b"a", b"b");
    cloud.ok("vm suspend a");
    cloud.ok("vm start a");
    cloud.ok("vm clone --running a d");
    cloud.ok("vm snapshot --tag t a");
    for name in ["a", "d"] {
        cloud.console(name).exchange(b"b", b"c");
    }
}

/// A user without rights, to whom nothing was given.
#[test]
fn machines_run_without_groups_where_there_are_none() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can be somebody else");
        return;
    }
    let cloud = Cloud::new();
    let nobody = |words: &str| {
        let program = cloud.command("");
        let mut command = std::process::Command::new("setpriv");
        command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
        command.arg(program.get_program()).args(words.split_whitespace());
        command.env("BERTH_ROOT", cloud.root()).stdin(Stdio::null());
        command.output()
    };
    std::os::unix::fs::chown(cloud.root(), Some(65_534), Some(65_534)).unwrap();
    let Ok(ran) = nobody("doctor") else {
        println!("skipped: no setpriv here");
        return;
    };
    let text = String::from_utf8_lossy(&ran.stdout).into_owned();
    let Some(line) = text.lines().find(|line| line.contains("control groups")) else {
        println!(
            "skipped: others cannot run the program: {}",
            String::from_utf8_lossy(&ran.stderr)
        );
        return;
    };
    assert!(line.contains("machines run without"), "{line}");
    let kernel = cloud.kernel("echo.elf", &ECHO);
    for words in [
        &format!("vm create --kernel {kernel} --memory 64M --net none a"),
        "vm start a",
        "vm set --cpu-limit 1 a",
        "vm kill a",
    ] {
        let ran = nobody(words).unwrap();
        let said = String::from_utf8_lossy(&ran.stderr).into_owned();
        assert!(ran.status.success(), "{words}: {said}");
        assert_eq!(said.contains("without a control group"), words.contains("limit"), "{said}");
    }
    let ran = nobody("vm start a").unwrap();
    let said = String::from_utf8_lossy(&ran.stderr).into_owned();
    assert!(!ran.status.success() && said.contains("it has limits"), "{said}");
}
