//! Snapshots, restore and clones of kept machines, with small guests that keep something in memory.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use berth_disk::chain::{Access, open_image};
use berth_vmm::vcpu::probe::kvm_runs_small_guests;
use rustix::process::{Signal, kill_process};
use serde_json::Value;

use crate::guest::{Debian, LIMIT, Running, SUM, run};
use crate::kept::{Cloud, get, pid};

impl Cloud {
    /// A machine that sums up, with a disk.
    fn create_sum(&self, name: &str) {
        let kernel = self.kernel(&format!("{name}.elf"), &SUM);
        self.ok(&format!("vm create --memory 64M --debug-exit --disk 1M --kernel {kernel} {name}"));
    }

    /// One that runs and has been given this to add, which is its sum.
    fn start_sum(&self, name: &str, first: u8) {
        self.create_sum(name);
        self.ok(&format!("vm start {name}"));
        self.add(name, first, first);
    }

    fn folder(&self, name: &str) -> PathBuf {
        self.root().join("machines").join(name)
    }

    fn write_disk(&self, name: &str, byte: u8) {
        let image = open_image(&self.folder(name).join("disk0.qcow2"), Access::Write).unwrap();
        image.write(0, &[byte; 512]).unwrap();
    }

    fn read_disk(&self, name: &str) -> u8 {
        let image = open_image(&self.folder(name).join("disk0.qcow2"), Access::Look).unwrap();
        let mut byte = [0];
        image.read(0, &mut byte).unwrap();
        byte[0]
    }

    fn layers(&self, name: &str) -> usize {
        let entries = fs::read_dir(self.folder(name)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.starts_with("layer-")).count()
    }

    fn snapshots(&self, name: &str) -> Vec<Value> {
        serde_json::from_str(&self.ok(&format!("vm snapshots --json {name}"))).unwrap()
    }

    fn tags(&self, name: &str) -> Vec<String> {
        let all = self.snapshots(name);
        all.iter().map(|one| one["tag"].as_str().unwrap().to_owned()).collect()
    }

    /// Adds to the sum of a machine.
    fn add(&self, name: &str, byte: u8, sum: u8) {
        // Not what a console shows: that begins with what was printed before.
        let printed = || fs::read(self.folder(name).join("console.log")).unwrap_or_default();
        let before = printed().len();
        let mut console = self.console(name);
        console.to.write_all(&[byte]).unwrap();
        let began = Instant::now();
        while printed().len() == before {
            assert!(began.elapsed() < LIMIT, "{name} prints nothing");
            std::thread::sleep(Duration::from_millis(2));
        }
        assert_eq!(printed().last(), Some(&sum), "{name}");
    }
}

/// What the first that goes on from a snapshot reads is read ahead for those that come later.
#[test]
fn memory_is_read_ahead_as_it_was_read_before() {
    let cloud = Cloud::new();
    cloud.start_sum("a", 3);
    cloud.ok("vm snapshot --tag one a");
    let folder = cloud.root().join("machines/a");
    let ahead = |name: &str| {
        let log = cloud.root().join("machines").join(name).join("vmm.log");
        fs::read_to_string(log).unwrap().matches(" were read ahead").count()
    };
    cloud.ok("vm restore --force a one");
    cloud.add("a", 1, 4);
    let mut notes = vec![folder.join("snapshots")];
    let began = Instant::now();
    let note = loop {
        let Some(path) = notes.pop() else {
            assert!(began.elapsed() < LIMIT, "nothing is noted");
            std::thread::sleep(Duration::from_millis(50));
            notes.push(folder.join("snapshots"));
            continue;
        };
        if path.is_dir() {
            notes.extend(fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
        } else if path.ends_with("working-set") && path.metadata().unwrap().len() > 0 {
            break path;
        }
    };
    assert_eq!(ahead("a"), 0);
    cloud.ok("vm restore --force a one");
    cloud.add("a", 1, 4);
    cloud.ok("vm clone --running --tag one a b");
    cloud.add("b", 1, 4);
    assert_eq!((ahead("a"), ahead("b")), (1, 1));
    // It is a hint, no part of what must be as it was.
    fs::write(note, "?").unwrap();
    cloud.ok("vm restore --force a one");
    cloud.add("a", 1, 4);
    assert_eq!(ahead("a"), 1);
}

#[test]
fn a_machine_goes_on_from_any_of_its_snapshots() {
    let cloud = Cloud::new();
    cloud.create_sum("a");
    cloud.write_disk("a", 1);
    cloud.ok("vm start a");
    cloud.add("a", 3, 3);
    let before = pid(&cloud.inspect("a"));
    assert_eq!(cloud.ok("vm snapshot --tag one a"), "one\n");
    assert_eq!(pid(&cloud.inspect("a")), before, "it goes on in the same process");
    cloud.add("a", 4, 7);
    cloud.ok("vm pause a");
    cloud.ok("vm snapshot --tag two a");
    assert_eq!(cloud.state("a"), "paused", "it stands still as before");
    cloud.ok("vm unpause a");
    cloud.add("a", 5, 12);
    let all = cloud.snapshots("a");
    assert_eq!((&all[0]["tag"], &all[0]["parent"]), (&"one".into(), &Value::Null), "{all:?}");
    assert_eq!((&all[1]["tag"], &all[1]["parent"]), (&"two".into(), &"one".into()), "{all:?}");
    assert_eq!((&all[0]["current"], &all[1]["current"]), (&false.into(), &true.into()));
    assert_eq!(all[0]["memory"], true);
    println!("the guest stood still for {} ms", all[0]["pause_ms"]);
    cloud.fails("vm snapshot --tag one a", &["a snapshot one already"]);
    cloud.fails("vm snapshot --tag ../x a", &["no tag"]);
    cloud.fails("vm restore a three", &["no snapshot three"]);
    cloud.fails("vm restore a one", &["a is running", "--force"]);

    cloud.ok("vm restore --force a one");
    assert_eq!(cloud.state("a"), "running");
    cloud.add("a", 1, 4);
    // A second branch.
    cloud.ok("vm snapshot --tag three a");
    let tree = cloud.ok("vm snapshots a");
    let shown: Vec<_> = tree.lines().map(|line| line.split("  20").next().unwrap()).collect();
    assert!(shown[1].trim_end() == "one" && shown[2].trim_end() == "  two", "{tree}");
    assert!(shown[3].trim_end() == "  three *", "{tree}");
    cloud.ok("vm restore --force a two");
    cloud.add("a", 1, 8);

    // With the daemon gone in between, and from a machine that is stopped.
    cloud.ok("vm kill a");
    cloud.write_disk("a", 2);
    cloud.kill_daemon();
    cloud.ok("vm restore a one");
    cloud.add("a", 1, 4);
    assert_eq!(cloud.read_disk("a"), 1);
    // Whoever descended from what is removed descends from what that did.
    assert_eq!(cloud.ok("vm snapshot-rm a one"), "one\n");
    cloud.fails("vm restore a one", &["no snapshot one"]);
    let all = cloud.snapshots("a");
    assert_eq!((&all[0]["tag"], &all[0]["parent"]), (&"two".into(), &Value::Null), "{all:?}");
    cloud.ok("vm restore -f a three");
    cloud.add("a", 1, 5);
    cloud.ok("vm snapshot-rm a two three");
    assert_eq!(cloud.snapshots("a"), [Value::Null; 0]);
    // What is left is what the disk is on.
    cloud.ok("vm kill a");
    let info: Value = serde_json::from_str(
        &cloud.ok(&format!("disk info --json {}/disk0.qcow2", cloud.folder("a").display())),
    )
    .unwrap();
    assert_eq!(cloud.layers("a"), info["chain"].as_array().unwrap().len(), "{info}");
    cloud.ok("vm start a");
    cloud.add("a", 1, 1);
}

#[test]
fn disks_alone_are_a_snapshot_too() {
    let cloud = Cloud::new();
    cloud.create_sum("a");
    // As older versions made them: raw.
    let toml = cloud.folder("a").join("vm.toml");
    let text = fs::read_to_string(&toml).unwrap();
    let raw = text.replace("disk0.qcow2", "disk0.raw").replace("format = \"qcow2\"\n", "");
    fs::write(&toml, raw).unwrap();
    fs::remove_file(cloud.folder("a").join("disk0.qcow2")).unwrap();
    fs::write(cloud.folder("a").join("disk0.raw"), vec![7; 1 << 20]).unwrap();
    cloud.ok("vm start a");
    cloud.fails("vm snapshot --tag one a", &["disk0.raw", "raw", "stop the machine"]);
    cloud.ok("vm kill a");
    cloud.ok("vm snapshot --tag one a");
    assert!(fs::read_to_string(&toml).unwrap().contains("disk0.qcow2"));
    assert_eq!(cloud.snapshots("a")[0]["memory"], false);
    assert_eq!(cloud.read_disk("a"), 7);
    cloud.write_disk("a", 8);
    cloud.ok("vm start a");
    cloud.add("a", 1, 1);
    cloud.ok("vm snapshot --disk-only --tag two a");
    cloud.add("a", 1, 2);
    cloud.ok("vm kill a");
    cloud.write_disk("a", 9);
    cloud.ok("vm restore a one");
    assert_eq!((cloud.state("a").as_str(), cloud.read_disk("a")), ("stopped", 7));
    cloud.ok("vm restore a two");
    assert_eq!((cloud.state("a").as_str(), cloud.read_disk("a")), ("stopped", 8));
    // Of another size, too.
    let disk = cloud.folder("a").join("disk0.qcow2").display().to_string();
    cloud.ok(&format!("disk resize {disk} 2M"));
    cloud.ok("vm snapshot --tag large a");
    let size = || {
        let info = cloud.ok(&format!("disk info --json {disk}"));
        serde_json::from_str::<Value>(&info).unwrap()["virtual_bytes"].as_u64().unwrap()
    };
    cloud.ok("vm restore a one");
    assert_eq!((size(), cloud.read_disk("a")), (1 << 20, 7));
    cloud.ok("vm restore a large");
    assert_eq!((size(), cloud.read_disk("a")), (2 << 20, 8));
    // A disk that is not the machine's cannot be in it, unless nobody writes it.
    let file = cloud.root().join("given.raw");
    fs::write(&file, vec![0; 512]).unwrap();
    let kernel = cloud.kernel("b.elf", &SUM);
    for (name, mode) in [("b", ""), ("c", ",ro")] {
        let disk = format!("{}{mode}", file.display());
        cloud.ok(&format!("vm create --memory 64M --kernel {kernel} --disk {disk} {name}"));
    }
    cloud.fails("vm snapshot --tag x b", &["given.raw", "not in the machine's folder", "convert"]);
    cloud.fails("vm clone b d", &["given.raw"]);
    assert_eq!(cloud.snapshots("b"), [Value::Null; 0]);
    cloud.ok("vm snapshot --tag x c");
    cloud.ok("vm clone c d");
    // What is kept about what a machine was made of comes back with it.
    cloud.ok("vm snapshot --tag three a");
    fs::write(&toml, fs::read_to_string(&toml).unwrap().replace("64M", "32M")).unwrap();
    cloud.ok("vm restore a three");
    assert_eq!(cloud.inspect("a")["config"]["memory"], "64M");
}

#[test]
fn what_is_suspended_has_snapshots_and_clones() {
    let cloud = Cloud::new();
    cloud.start_sum("a", 5);
    cloud.ok("vm suspend a");
    cloud.ok("vm snapshot --tag one a");
    assert_eq!(
        (cloud.state("a").as_str(), &cloud.snapshots("a")[0]["memory"]),
        ("suspended", &true.into())
    );
    cloud.ok("vm clone --running a b");
    cloud.add("b", 1, 6);
    cloud.ok("vm resume a");
    cloud.add("a", 2, 7);
    cloud.ok("vm suspend a");
    cloud.fails("vm restore a one", &["a is suspended", "--force"]);
    cloud.ok("vm restore --force a one");
    cloud.add("a", 1, 6);
    cloud.ok("vm kill a");
    cloud.fails("vm clone --running a c", &["a is stopped", "without --running"]);
    cloud.ok("vm clone --running --tag one a c");
    cloud.add("c", 3, 8);
}

/// What is set while a machine runs is for its next start; its memory is of the one before.
#[test]
fn what_is_set_for_the_next_start_is_no_part_of_memory() {
    let cloud = Cloud::new();
    cloud.start_sum("a", 3);
    cloud.run("vm set --memory 32M --cpus 2 a").check(0);
    cloud.ok("vm suspend a");
    cloud.ok("vm snapshot --tag one a");
    let file = cloud.root().join("a.berth");
    cloud.ok(&format!("vm export --with-state -o {} a", file.display()));
    cloud.ok("vm clone --running a b");
    cloud.ok("vm resume a");
    cloud.add("a", 4, 7);
    cloud.add("b", 5, 8);
    cloud.ok("vm restore --force a one");
    cloud.add("a", 1, 4);
    cloud.ok(&format!("vm import --name c {}", file.display()));
    cloud.ok("vm start c");
    cloud.add("c", 2, 5);
    cloud.run("vm set --net user c").check(0);
    cloud.fails("vm suspend c", &["another network card", "--net"]);
    cloud.run("vm set --net none c").check(0);
    cloud.ok("vm suspend c");
    cloud.ok("vm rm -f a b c");
}

#[test]
fn a_machine_goes_on_by_another_processor() {
    if let Err(why) = kvm_runs_small_guests() {
        return println!("skipped: no KVM: {why}");
    }
    let cloud = Cloud::new();
    let kernel = cloud.kernel("a.elf", &SUM);
    let options = "--accel translate --cpu x86-64 --memory 64M --debug-exit --disk 1M";
    cloud.ok(&format!("vm create {options} --kernel {kernel} a"));
    assert_eq!(cloud.inspect("a")["config"]["cpu"], "x86-64");
    cloud.ok("vm start a");
    cloud.add("a", 3, 3);
    let to = |accel: &str| {
        cloud.ok("vm suspend a");
        cloud.fails("vm set --cpu host a", &["a is suspended", "processor"]);
        cloud.ok(&format!("vm set --accel {accel} a"));
        cloud.ok("vm resume a");
    };
    to("kvm");
    cloud.add("a", 4, 7);
    cloud.ok("vm snapshot --tag one a");
    cloud.add("a", 5, 12);
    cloud.ok("vm clone --running a b");
    cloud.add("b", 1, 13);
    to("translate");
    cloud.add("a", 1, 13);
    cloud.ok("vm snapshot --tag two a");
    // Each with the processor that it had.
    cloud.ok("vm restore --force a one");
    assert_eq!(cloud.inspect("a")["config"]["accel"], "kvm");
    cloud.add("a", 1, 8);
    cloud.ok("vm restore --force a two");
    cloud.add("a", 1, 14);
    cloud.ok("vm clone --running --tag one a c");
    cloud.add("c", 2, 9);
    cloud.ok("vm kill a b c");
}

#[test]
fn what_was_altered_is_refused_before_anything_ends() {
    let cloud = Cloud::new();
    cloud.start_sum("a", 3);
    cloud.ok("vm snapshot --tag one a");
    let before = pid(&cloud.inspect("a"));
    let path = cloud.folder("a").join("snapshots/one");
    let refused = |parts: &[&str]| {
        cloud.fails("vm restore --force a one", parts);
        cloud.fails("vm clone --running --tag one a b", parts);
        assert_eq!(pid(&cloud.inspect("a")), before);
        assert_eq!(cloud.names(), ["a"]);
    };
    let memory = fs::File::options().write(true).open(path.join("state/memory")).unwrap();
    memory.write_all_at(&[4], 0x30_0000).unwrap();
    refused(&["memory", "not what was stored"]);
    memory.write_all_at(&[3], 0x30_0000).unwrap();
    memory.set_len(63 << 20).unwrap();
    refused(&["memory", "bytes"]);
    memory.set_len(64 << 20).unwrap();
    let altered = |file: &str, from: &str, to: &str, parts: &[&str]| {
        let good = fs::read_to_string(path.join(file)).unwrap();
        let bad = good.replacen(from, to, 1);
        assert_ne!(good, bad, "{file}: no {from}");
        fs::write(path.join(file), bad).unwrap();
        refused(parts);
        fs::write(path.join(file), good).unwrap();
    };
    altered("state/machine.json", "\"waiting\":false", "\"waiting\":true", &["machine.json"]);
    altered("snapshot.toml", "version = 1", "version = 2", &["snapshot.toml", "version is 2"]);
    altered("snapshot.toml", "tag = \"one\"", "tag = \"two\"", &["snapshot.toml"]);
    altered("snapshot.toml", "layer-", "/etc/layer-", &["snapshot.toml", "layer-"]);
    altered("snapshot.toml", "file = \"layer-", "file = \"../layer-", &["snapshot.toml"]);
    altered("snapshot.toml", "disk = 0", "disk = 9", &["snapshot.toml", "no disk 9"]);
    let sums = fs::read_to_string(path.join("snapshot.toml")).unwrap();
    let layer = sums.split('"').find(|part| part.starts_with("layer-")).unwrap();
    let layer = cloud.folder("a").join(layer);
    let good = fs::read(&layer).unwrap();
    let file = fs::File::options().write(true).open(&layer).unwrap();
    file.write_all_at(b"NOPE", 0).unwrap();
    refused(&["layer-", "does not begin as one"]);
    file.write_all_at(&good[..4], 0).unwrap();
    cloud.ok("vm snapshot --tag two a");
    for _ in 0..2 {
        cloud.ok("vm restore --force a one");
        cloud.add("a", 1, 4);
    }
    // Also one that was good a moment ago.
    let before = pid(&cloud.inspect("a"));
    memory.write_all_at(&[4], 0x30_0000).unwrap();
    cloud.fails("vm restore --force a one", &["memory", "not what was stored"]);
    assert_eq!(pid(&cloud.inspect("a")), before);
    memory.write_all_at(&[3], 0x30_0000).unwrap();
    cloud.ok("vm restore --force a one");
    cloud.add("a", 1, 4);
    // One that is not understood can still be removed.
    fs::write(path.join("snapshot.toml"), "rubbish").unwrap();
    assert_eq!(cloud.tags("a"), ["two"]);
    cloud.ok("vm snapshot-rm a one");
    cloud.add("a", 1, 5);
}

#[test]
fn clones_go_on_by_themselves() {
    let cloud = Cloud::new();
    cloud.create_sum("a");
    cloud.write_disk("a", 1);
    cloud.ok("vm start a");
    cloud.add("a", 10, 10);
    assert_eq!(cloud.ok("vm clone --running --count 3 a b"), "b-1\nb-2\nb-3\n");
    let clones = ["b-1", "b-2", "b-3"];
    for (name, add) in clones.iter().zip(1..) {
        assert_eq!(cloud.state(name), "running");
        cloud.add(name, add, 10 + add);
    }
    cloud.add("a", 5, 15);
    assert_eq!(cloud.snapshots("a"), [Value::Null; 0], "nothing is named");
    let mut ids: Vec<_> = ["a", "b-1", "b-2", "b-3"]
        .iter()
        .map(|name| cloud.inspect(name)["id"].as_str().unwrap().to_owned())
        .collect();
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 4);
    for name in ["a", "b-1", "b-2", "b-3"] {
        cloud.ok(&format!("vm kill {name}"));
    }
    // Each writes its own disk, on bytes that are there once, and needs no other folder.
    for (name, byte) in clones.iter().zip(20..) {
        assert_eq!(cloud.read_disk(name), 1);
        cloud.write_disk(name, byte);
    }
    assert_eq!(cloud.read_disk("a"), 1);
    let layer = fs::read_dir(cloud.folder("a")).unwrap().map(|entry| entry.unwrap());
    let mut layers = layer.filter(|entry| entry.file_name().to_string_lossy().contains("layer-"));
    assert_eq!(layers.next().unwrap().metadata().unwrap().nlink(), 4);
    cloud.ok("vm rm a");
    for (name, byte) in clones.iter().zip(20..) {
        assert_eq!(cloud.read_disk(name), byte);
    }
    // Without memory, and of a clone.
    cloud.ok("vm clone b-1 c");
    assert_eq!((cloud.state("c").as_str(), cloud.read_disk("c")), ("stopped", 20));
    cloud.ok("vm rename c d");
    let outside = cloud.root().join("outside");
    fs::write(&outside, [0; 512]).unwrap();
    let toml = cloud.folder("d").join("vm.toml");
    let config = fs::read_to_string(&toml).unwrap();
    let disk = format!("[[machine.disk]]\nfile = {outside:?}\nread_only = true\n");
    fs::write(&toml, format!("{config}\n{disk}")).unwrap();
    cloud.ok("vm start d");
    cloud.add("d", 1, 1);
    cloud.ok("vm clone d e");
    assert_eq!(cloud.state("e"), "stopped");
    // All or none.
    cloud.fails("vm clone --count 3 b-1 b", &["a machine b-1 already"]);
    cloud.fails("vm clone nobody f", &["no machine nobody"]);
    cloud.fails("vm clone d x/y", &["no machine name"]);
    let before = cloud.names();
    fs::create_dir(cloud.folder("f-2")).unwrap();
    cloud.fails("vm clone --count 3 --running d f", &["f-2", "there already"]);
    fs::remove_dir(cloud.folder("f-2")).unwrap();
    assert_eq!(cloud.names(), before);
    fs::remove_file(&outside).unwrap();
    cloud.fails("vm clone --count 2 --running d f", &["cannot be started", "outside"]);
    assert_eq!(cloud.names(), before, "those that cannot start are not left");
    cloud.kill_daemon();
    assert_eq!(cloud.names(), before);
    let hidden = fs::read_dir(cloud.root().join("machines")).unwrap();
    let hidden = hidden
        .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().starts_with('.'));
    assert_eq!(hidden.count(), 0);
}

/// The daemon or the machine is killed while a snapshot is taken: it is there and can be used, or nothing
/// of it is.
#[test]
fn a_snapshot_is_there_as_a_whole_or_not_at_all() {
    let cloud = Cloud::new();
    cloud.create_sum("a");
    cloud.write_disk("a", 1);
    cloud.ok("vm start a");
    cloud.add("a", 3, 3);
    let post = |path: &str, body: &str| {
        let mut stream = UnixStream::connect(cloud.root().join("berth.sock")).unwrap();
        let len = body.len();
        let head = format!(
            "POST /berth/v1/machines/a/{path} HTTP/1.1\r\nHost: berth\r\n\
             Content-Type: application/json\r\nContent-Length: {len}\r\n\r\n{body}"
        );
        stream.write_all(head.as_bytes()).unwrap();
        stream
    };
    for round in 0..24u64 {
        let tag = format!("t{round}");
        let asked = post("snapshots", &format!("{{\"tag\":\"{tag}\"}}"));
        std::thread::sleep(Duration::from_millis(round * 3 / 2));
        let kills_machine = round % 3 == 2;
        if kills_machine {
            kill_process(pid(&cloud.inspect("a")), Signal::KILL).unwrap();
            cloud.wait_for("a", "failed");
        } else {
            cloud.kill_daemon();
        }
        drop(asked);
        if cloud.tags("a").contains(&tag) {
            cloud.ok(&format!("vm restore --force a {tag}"));
            cloud.add("a", 0xff, 2);
            cloud.add("a", 1, 3);
            cloud.ok(&format!("vm snapshot-rm a {tag}"));
        } else if kills_machine {
            cloud.ok("vm start a");
            cloud.add("a", 3, 3);
        } else {
            // It goes on as if nothing had been.
            cloud.add("a", 0xff, 2);
            cloud.add("a", 1, 3);
        }
    }
    cloud.ok("vm kill a");
    assert_eq!(cloud.read_disk("a"), 1);
    cloud.ok("vm snapshot --tag last a");
    // Of what was begun nothing is left when nobody has the folder.
    cloud.ok("vm start a");
    let names = fs::read_dir(cloud.folder("a").join("snapshots")).unwrap();
    let mut names: Vec<_> =
        names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["current.toml", "last"]);

    // The same with restores and clones.
    cloud.add("a", 9, 9);
    cloud.ok("vm snapshot --tag nine a");
    for round in 0..16u64 {
        let asked = post("restore", "{\"tag\":\"nine\",\"force\":true}");
        std::thread::sleep(Duration::from_millis(round * 4));
        cloud.kill_daemon();
        drop(asked);
        // It ran, was ended, or goes on from the snapshot.
        let state = cloud.state("a");
        assert!(["running", "stopped", "suspended", "failed"].contains(&&*state), "{state}");
        cloud.run("vm start a");
        cloud.ok("vm restore --force a nine");
        cloud.add("a", 1, 10);
    }
    for round in 0..12u64 {
        let asked = post("clone", "{\"name\":\"c\",\"count\":3}");
        std::thread::sleep(Duration::from_millis(round * 4));
        cloud.kill_daemon();
        drop(asked);
        let clones = cloud.names().len() - 1;
        assert!(clones == 0 || clones == 3, "{clones} clones");
        for number in 1..=clones {
            cloud.ok(&format!("vm rm c-{number}"));
        }
    }
    cloud.add("a", 1, 11);
}

#[test]
fn the_interface_describes_snapshots() {
    let cloud = Cloud::new();
    cloud.create_sum("a");
    let document = get(&cloud.root().join("berth.sock"), "/berth/v1/openapi.json").unwrap();
    let document: Value = serde_json::from_str(&document).unwrap();
    for (path, method) in [
        ("snapshots", "get"),
        ("snapshots", "post"),
        ("snapshots/{tag}", "delete"),
        ("restore", "post"),
        ("clone", "post"),
    ] {
        let path = format!("/berth/v1/machines/{{name}}/{path}");
        assert!(document["paths"][&path][method].is_object(), "{method} {path}");
    }
    // A tag is made of the time.
    let tag = cloud.ok("vm snapshot a");
    assert_eq!(cloud.tags("a"), [tag.trim()]);
}

/// A guest that writes its disk is frozen with its power on, and its clone is somebody else.
#[test]
fn debian_is_frozen_and_cloned() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    cloud.ok("vm create --disk 64M box debian:bookworm");
    cloud.ok("vm start box");
    let shell = |name: &str, script: &str| {
        let ran = run(cloud.command("vm").args(["exec", name, "sh", "-c", script]), b"");
        ran.check(0);
        ran.text()
    };
    shell(
        "box",
        "echo one > /etc/kept; tr -d - < /proc/sys/kernel/random/uuid > /etc/machine-id; sync",
    );
    let id = shell("box", "cat /etc/machine-id");
    let address = shell("box", "cat /sys/class/net/eth0/address");
    // While it writes and waits for the disk, all the time.
    let script = "i=0; while [ $i -lt 400 ]; do i=$((i+1)); echo $i > /n; sync /n; \
                  dd if=/dev/zero of=/dev/vdb bs=64k count=8 conv=fsync 2>/dev/null; done; echo $i";
    let mut writing = cloud.command("vm");
    let writing = writing.args(["exec", "box", "sh", "-c", script]);
    let mut writing = Running::start(writing.stdout(Stdio::piped()));
    for number in 0..6 {
        std::thread::sleep(Duration::from_millis(300));
        cloud.ok(&format!("vm snapshot --disk-only --tag t{number} box"));
    }
    for one in cloud.snapshots("box") {
        println!("the guest stood still for {} ms", one["pause_ms"]);
    }
    assert_eq!(writing.wait(LIMIT), Some(0), "it did not notice");
    assert_eq!(shell("box", "cat /n; dmesg | grep -ci 'i/o error'; true"), "400\n0\n");
    shell("box", "echo two > /etc/kept; sync");

    // Of what it is, a clone has everything but who it is.
    cloud.ok("vm clone box twin");
    cloud.ok("vm start twin");
    assert_eq!(shell("twin", "hostname; cat /etc/hostname /etc/kept"), "twin\ntwin\ntwo\n");
    let twin = cloud.inspect("twin")["id"].as_str().unwrap().replace('-', "");
    assert_eq!(shell("twin", "cat /etc/machine-id"), format!("{twin}\n"));
    assert_ne!(shell("twin", "cat /sys/class/net/eth0/address"), address);
    let told = Instant::now();
    while cloud.folder("twin").join("state/identity").exists() {
        assert!(told.elapsed() < LIMIT, "it is told once");
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(shell("box", "hostname; cat /etc/machine-id"), format!("box\n{id}"));
    cloud.ok("vm kill twin");

    // Each snapshot is a disk that its file system can use, with a number that is not less than before.
    let mut before = 0;
    for number in 0..6 {
        cloud.ok(&format!("vm restore --force box t{number}"));
        assert_eq!(cloud.state("box"), "stopped");
        cloud.ok("vm start box");
        let found = shell("box", "cat /etc/kept /n");
        let (kept, n) = found.split_once('\n').unwrap();
        let n: u32 = n.trim().parse().unwrap();
        assert_eq!(kept, "one");
        assert!(n >= before && n <= 400, "{n} after {before}");
        before = n;
        println!("t{number} has {n}");
    }
    cloud.ok("vm kill box");
    let disk = cloud.folder("box").join("disk0.qcow2");
    cloud.ok(&format!("disk check {}", disk.display()));
}
