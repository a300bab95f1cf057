//! The daemon or a machine's process is killed while something is being done: it is done or it is not,
//! and nothing else is lost.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::process::Stdio;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::guest::{ECHO, LIMIT, Random, Running};
use crate::kept::{Cloud, pid, wait_until_gone};

/// Machines at once.
const MACHINES_MAX: usize = 6;
/// Snapshots of one machine.
const SNAPSHOTS_MAX: usize = 4;
/// The longest time until something is killed: what is done takes that long, more or less.
const MOMENT_MAX_US: usize = 120_000;

/// What is known of a machine.
#[derive(Debug, Clone, PartialEq)]
struct Known {
    id: String,
    snapshots: BTreeSet<String>,
}

fn rounds() -> usize {
    std::env::var("BERTH_ROUNDS").map_or(25, |rounds| rounds.parse().unwrap())
}

fn look(cloud: &Cloud) -> BTreeMap<String, Known> {
    let list: Value = serde_json::from_str(&cloud.ok("vm ls --json")).unwrap();
    let mut known = BTreeMap::new();
    for machine in list.as_array().unwrap() {
        let name = machine["name"].as_str().unwrap().to_owned();
        let snapshots: Value =
            serde_json::from_str(&cloud.ok(&format!("vm snapshots --json {name}"))).unwrap();
        let tags = snapshots.as_array().unwrap().iter();
        let snapshots = tags.map(|one| one["tag"].as_str().unwrap().to_owned()).collect();
        let id = cloud.inspect(&name)["id"].as_str().unwrap().to_owned();
        known.insert(name, Known { id, snapshots });
    }
    known
}

/// A command, and what may be there when it was done, given what was there before.
struct Act {
    words: String,
    about: String,
    after: BTreeMap<String, Known>,
    /// A machine of this name is new: its id is not known.
    makes: Option<String>,
}

fn choose(
    random: &mut Random,
    round: usize,
    before: &BTreeMap<String, Known>,
    kernel: &str,
) -> Act {
    let names: Vec<&String> = before.keys().collect();
    let name = (*random.one_of(&names)).clone();
    let mut after = before.clone();
    let machine = after.get_mut(&name).unwrap();
    let new = format!("m{round}");
    let mut makes = None;
    let words = match random.below(10) {
        0 if names.len() < MACHINES_MAX => {
            makes = Some(new.clone());
            format!("vm create --memory 64M --debug-exit --kernel {kernel} --disk 1M {new}")
        }
        1 if names.len() < MACHINES_MAX => {
            makes = Some(new.clone());
            format!("vm clone {name} {new}")
        }
        2 if names.len() < MACHINES_MAX => {
            makes = Some(new.clone());
            format!("vm clone --running {name} {new}")
        }
        3 if names.len() > 2 => {
            after.remove(&name);
            format!("vm rm --force {name}")
        }
        4 => {
            let moved = after.remove(&name).unwrap();
            after.insert(new.clone(), moved);
            format!("vm rename {name} {new}")
        }
        5 if machine.snapshots.len() < SNAPSHOTS_MAX => {
            machine.snapshots.insert(new.clone());
            format!("vm snapshot --tag {new} {name}")
        }
        6 if !machine.snapshots.is_empty() => {
            let tags: Vec<String> = machine.snapshots.iter().cloned().collect();
            let tag = random.one_of(&tags);
            machine.snapshots.remove(tag);
            format!("vm snapshot-rm {name} {tag}")
        }
        7 if !machine.snapshots.is_empty() => {
            let tags: Vec<String> = machine.snapshots.iter().cloned().collect();
            format!("vm restore --force {name} {}", random.one_of(&tags))
        }
        8 => format!("vm suspend {name}"),
        _ => format!("vm restart --time 0 {name}"),
    };
    Act { words, about: name, after, makes }
}

/// Processes of machines of this state directory.
fn processes(cloud: &Cloud) -> BTreeSet<i32> {
    let root = cloud.root().as_os_str().as_encoded_bytes();
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let (Some(number), Ok(line)) = (number, fs::read(entry.path().join("cmdline"))) else {
            continue;
        };
        let mut words = line.split(|byte| *byte == 0);
        let is_ours = words.clone().any(|word| word == root);
        if is_ours && words.any(|word| word == b"vmm") {
            found.insert(number);
        }
    }
    found
}

#[test]
fn whatever_is_killed_nothing_is_lost() {
    let cloud = Cloud::new();
    let kernel = cloud.kernel("echo.elf", &ECHO);
    for name in ["a", "b"] {
        let words = "vm create --memory 64M --debug-exit --disk 1M --kernel";
        cloud.ok(&format!("{words} {kernel} {name}"));
        cloud.ok(&format!("vm start {name}"));
        cloud.ok(&format!("vm pause {name}"));
    }
    let mut random = Random(20_261_122);
    let mut known = look(&cloud);
    let (mut done, mut undone) = (0, 0);
    for round in 0..rounds() {
        let act = choose(&mut random, round, &known, &kernel);
        let says = format!("round {round}: {}, before {known:?}", act.words);
        // The daemon, the machine's own process, or both at once.
        let mut victims: Vec<Pid> = Vec::new();
        let which = random.below(4);
        if which != 0 {
            victims.extend(cloud.daemon_pid());
        }
        let machine = cloud.inspect(&act.about);
        if which < 2 && machine["pid"].is_u64() {
            victims.push(pid(&machine));
        }
        let mut command = cloud.command(&act.words);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut doing = Running::start(&mut command);
        std::thread::sleep(Duration::from_micros(random.below(MOMENT_MAX_US) as u64));
        for victim in &victims {
            // It may have ended by itself.
            let _ = kill_process(*victim, Signal::KILL);
        }
        victims.into_iter().for_each(wait_until_gone);
        let status = doing.wait(LIMIT);

        let now = look(&cloud);
        let mut expected = act.after.clone();
        if let Some(made) = act.makes.as_ref().filter(|made| now.contains_key(*made)) {
            let made_id = &now[made].id;
            assert!(known.values().all(|other| other.id != *made_id), "{says}: {now:?}");
            expected.insert(made.clone(), now[made].clone());
        }
        let is_done = now == expected;
        assert!(is_done || now == known, "{says}, now {now:?}");
        if status == Some(0) {
            let made = act.makes.as_ref().is_none_or(|made| now.contains_key(made));
            assert!(is_done && made, "{says} was said to be done, now {now:?}");
        }
        (done, undone) = if now == known { (done, undone + 1) } else { (done + 1, undone) };
        known = now;
        // Whatever became of the one it was about, it works; so does what was made.
        for name in [act.about, format!("m{round}")].iter().filter(|name| known.contains_key(*name))
        {
            let ran = cloud.run(&format!("vm restart --time 0 {name}"));
            assert_eq!(ran.status, Some(0), "{says}: {name}: {}", ran.stderr);
            cloud.console(name).exchange(b"a", b"b");
            // These guests never rest, and there are several.
            cloud.ok(&format!("vm pause {name}"));
        }
    }
    println!("{done} things were done, {undone} were not");
    // All that is there is known, and each snapshot can be gone back to.
    cloud.kill_daemon();
    assert_eq!(look(&cloud), known);
    let folders: BTreeSet<String> = fs::read_dir(cloud.root().join("machines"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(folders, known.keys().cloned().collect());
    for (name, machine) in &known {
        for tag in &machine.snapshots {
            cloud.ok(&format!("vm restore --force {name} {tag}"));
            if cloud.state(name) == "running" {
                cloud.console(name).exchange(b"c", b"d");
            }
        }
        cloud.ok(&format!("vm restart --time 0 {name}"));
        cloud.ok(&format!("vm pause {name}"));
    }
    let expected: BTreeSet<i32> =
        known.keys().map(|name| pid(&cloud.inspect(name)).as_raw_nonzero().get()).collect();
    assert_eq!(processes(&cloud), expected);
}
