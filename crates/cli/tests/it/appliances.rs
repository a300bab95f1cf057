//! Machines packed into one file and started from it, with small guests that keep something in memory.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use berth_disk::chain::{Access, open_image};
use serde_json::Value;

use crate::guest::{LIMIT, Running, SUM, run};
use crate::kept::Cloud;

/// Another host, as far as a state directory is one.
pub(crate) fn elsewhere() -> Cloud {
    Cloud::new()
}

/// Bytes that do not compress, and are the same each time.
pub(crate) fn noise(len: usize) -> Vec<u8> {
    let mut state = 1_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..len).map(|_| next()).collect()
}

impl Cloud {
    /// What the guest sees of a disk.
    pub(crate) fn disk(&self, name: &str, file: &str) -> Vec<u8> {
        let path = self.root().join("machines").join(name).join(file);
        let image = open_image(&path, Access::Look).unwrap();
        let mut bytes = vec![0; image.size() as usize];
        image.read(0, &mut bytes).unwrap();
        bytes
    }

    pub(crate) fn fill_disk(&self, name: &str, file: &str, bytes: &[u8], at: u64) {
        let path = self.root().join("machines").join(name).join(file);
        let image = open_image(&path, Access::Write).unwrap();
        image.write(at, bytes).unwrap();
        image.close().unwrap();
    }

    /// A machine that sums up, with two disks.
    fn create_packed(&self, name: &str) {
        let kernel = self.kernel(&format!("{name}.elf"), &SUM);
        let words = "--memory 64M --debug-exit --cpus 2 --append x=1 --disk 8M --disk 1M";
        self.ok(&format!("vm create {words} --kernel {kernel} {name}"));
        let noise = noise(600_000);
        self.fill_disk(name, "disk0.qcow2", &noise, 1 << 20);
        self.fill_disk(name, "disk0.qcow2", &noise, 4 << 20);
        self.fill_disk(name, "disk1.qcow2", &noise[..512], 512);
    }

    pub(crate) fn machines(&self) -> Vec<String> {
        let entries = fs::read_dir(self.root().join("machines")).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

#[test]
fn a_machine_is_packed_and_starts_elsewhere() {
    let (here, there) = (Cloud::new(), elsewhere());
    here.create_packed("a");
    let file = here.root().join("a.berth");
    let shown = file.display();
    assert_eq!(here.ok(&format!("vm export -o {shown} a")), "");
    let packed = fs::metadata(&file).unwrap().len();
    assert!(packed < 800_000, "the same twice, and zeroes, take no space: {packed}");
    here.fails(&format!("vm export -o {shown} a"), &["a.berth", "--force"]);
    here.ok(&format!("vm export --force -o {shown} a"));

    assert_eq!(there.ok(&format!("vm import --run {shown}")), "a\n");
    there.wait_for("a", "running");
    there.console("a").exchange(&[3], &[3]);
    there.ok("vm kill a");
    for disk in ["disk0.qcow2", "disk1.qcow2"] {
        assert!(here.disk("a", disk) == there.disk("a", disk), "{disk}");
        let path = there.root().join("machines/a").join(disk);
        there.ok(&format!("disk check {}", path.display()));
    }
    let (one, two) = (here.inspect("a"), there.inspect("a"));
    assert_ne!(one["id"], two["id"]);
    for key in ["cpus", "memory", "append", "debug_exit", "net"] {
        assert_eq!(one["config"][key], two["config"][key], "{key}");
    }
    assert_eq!(two["config"]["kernel"], "kernel");
    // What came out of an appliance is a machine as any other.
    there.fails(&format!("vm import {shown}"), &["a machine a already", "--name"]);
    there.ok(&format!("vm import --name b {shown}"));
    there.ok("vm set --append y=2 b");
    there.ok("vm clone b c");
    there.ok("vm export -o /dev/null --force c");
    there.ok("vm start c");
    there.console("c").exchange(&[4], &[4]);
    there.ok("vm rm --force a b c");
    assert!(there.machines().is_empty());
}

#[test]
fn a_machine_that_runs_goes_on_elsewhere() {
    let (here, there) = (Cloud::new(), elsewhere());
    here.create_packed("a");
    let file = here.root().join("a.berth").display().to_string();
    here.fails(&format!("vm export --with-state -o {file} a"), &["a is stopped", "--with-state"]);
    here.ok("vm start a");
    here.console("a").exchange(&[5], &[5]);
    here.ok(&format!("vm export --with-state -o {file} a"));
    // It goes on, and what it does now is not in it.
    here.console("a").exchange(&[1], &[6]);
    assert_eq!(there.ok(&format!("vm import {file}")), "a\n");
    assert_eq!(there.state("a"), "suspended");
    there.ok("vm start a");
    there.console("a").exchange(&[2], &[7]);
    assert!(here.disk("a", "disk1.qcow2") == there.disk("a", "disk1.qcow2"));
    there.ok(&format!("vm import --name fresh --without-state --run {file}"));
    there.console("fresh").exchange(&[2], &[2]);
    // Suspended, as it is.
    here.ok("vm suspend a");
    here.ok(&format!("vm export --force --with-state -o {file} a"));
    there.ok(&format!("vm import --name again --run {file}"));
    there.console("again").exchange(&[1], &[7]);
    assert_eq!(here.state("a"), "suspended");
    here.ok(&format!("vm export --force -o {file} a"));
    there.ok(&format!("vm import --name disks {file}"));
    assert_eq!(there.state("disks"), "stopped");
    let left = fs::read_dir(here.root().join("machines/a/snapshots")).unwrap().count();
    assert_eq!(left, 0, "nothing of the export stays");
}

#[test]
fn streams_need_no_files() {
    let (here, there) = (Cloud::new(), elsewhere());
    here.create_packed("a");
    let mut from = here.command("vm export -o - a");
    let mut from = Running::start(from.stdout(Stdio::piped()));
    let mut to = there.command("vm import --name b -");
    let to = to.stdin(Stdio::from(from.stdout())).output().unwrap();
    assert!(to.status.success(), "{}", String::from_utf8_lossy(&to.stderr));
    assert_eq!(from.wait(LIMIT), Some(0));
    assert!(here.disk("a", "disk0.qcow2") == there.disk("b", "disk0.qcow2"));
    // A stream that ends too early is nothing.
    let packed = run(&mut here.command("vm export -o - a"), b"").check(0).stdout.clone();
    let cut = run(&mut there.command("vm import --name c -"), &packed[..packed.len() / 2]);
    cut.check_failed(&["ends too early"]);
    assert_eq!(there.machines(), ["b"]);
}

/// Each is refused with its reason, and nothing of it stays.
#[test]
fn what_is_damaged_is_refused() {
    let cloud = Cloud::new();
    cloud.create_packed("a");
    let file = cloud.root().join("a.berth");
    cloud.ok(&format!("vm export -o {} a", file.display()));
    let packed = fs::read(&file).unwrap();
    let bad = cloud.root().join("bad.berth");
    let fails = |bytes: &[u8], parts: &[&str]| {
        fs::write(&bad, bytes).unwrap();
        cloud.fails(&format!("vm import --name b {}", bad.display()), parts);
        assert_eq!(cloud.machines(), ["a"]);
    };
    for part in [0, 5, 11, 13, 100, packed.len() / 3, packed.len() - 1] {
        fails(&packed[..part], &[]);
    }
    for at in (12..packed.len()).step_by(packed.len() / 12) {
        let mut altered = packed.clone();
        altered[at] ^= 0x40;
        fails(&altered, &[]);
    }
    let mut longer = packed.clone();
    longer.push(b'x');
    fails(&longer, &["follows the end"]);
    fails(b"hello", &["no appliance"]);
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = packed.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
        let mut altered = packed.clone();
        altered[at..at + from.len()].copy_from_slice(to.as_bytes());
        altered
    };
    fails(&replaced("\"size\":8388608", "\"size\":9999999"), &["9999999"]);
    fails(&replaced("\"size\":8388608", "\"size\":-388608"), &["cannot be used"]);
    fails(&replaced("\"cpus\":2", "\"cpus\":0"), &["1 to 16"]);
    fails(&replaced("\"name\":\"a\"", "\"name\":\"/\""), &["name"]);
    cloud.fails("vm import /no/such", &["/no/such", "No such"]);
    cloud.fails("vm import --name ../x /dev/null", &[]);
    cloud.fails("vm export -o /no/such/file a", &["/no/such/file"]);
    cloud.fails("vm export -o - b", &["no machine b"]);
    // A daemon that is killed meanwhile leaves nothing either.
    let mut cut = cloud.command("vm import --name b -");
    let mut cut = Running::start(cut.stdin(Stdio::piped()).stderr(Stdio::null()));
    let mut stdin = cut.stdin();
    std::io::Write::write_all(&mut stdin, &packed[..packed.len() / 2]).unwrap();
    let unfinished = || cloud.machines().iter().any(|name| name.starts_with(".new-"));
    let began = std::time::Instant::now();
    while !unfinished() {
        assert!(began.elapsed() < LIMIT, "nothing was begun");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    cloud.kill_daemon();
    drop(stdin);
    assert_eq!(cut.wait(LIMIT), Some(1));
    cloud.ok("vm ls");
    assert_eq!(cloud.machines(), ["a"]);
}

/// A processor that no host has.
#[test]
fn memory_goes_on_only_where_the_processor_fits() {
    let cloud = Cloud::new();
    cloud.create_packed("a");
    cloud.ok("vm start a");
    cloud.console("a").exchange(&[5], &[5]);
    cloud.ok("vm suspend a");
    let state = cloud.root().join("machines/a/state/suspended/machine.json");
    let mut json: Value = serde_json::from_str(&fs::read_to_string(&state).unwrap()).unwrap();
    let register = &mut json["cpus"][0]["cpuid"][0]["regs"][1];
    *register = (register.as_u64().unwrap() ^ 1).into();
    fs::write(&state, json.to_string()).unwrap();
    let file = cloud.root().join("a.berth").display().to_string();
    cloud.ok(&format!("vm export --with-state -o {file} a"));
    let import = format!("vm import --name b {file}");
    cloud.fails(&import, &["cannot go on here", "--without-state"]);
    assert_eq!(cloud.machines(), ["a"]);
    cloud.ok(&format!("vm import --name b --run --without-state {file}"));
    cloud.console("b").exchange(&[1], &[1]);
}

fn has_converter() -> bool {
    let found = std::process::Command::new("qemu-img").arg("--version").output().is_ok();
    if !found {
        eprintln!("left out: qemu-img is not installed");
    }
    found
}

#[test]
fn an_ova_goes_there_and_back() {
    if !has_converter() {
        return;
    }
    let (here, there) = (Cloud::new(), elsewhere());
    here.create_packed("a");
    let file = here.root().join("a.ova");
    here.ok(&format!("vm export -o {} a", file.display()));
    let listed = std::process::Command::new("tar").arg("-tf").arg(&file).output().unwrap();
    let listed = String::from_utf8(listed.stdout).unwrap();
    let names: Vec<_> = listed.lines().collect();
    assert_eq!(names, ["a.ovf", "a.mf", "a-kernel", "a-disk0.vmdk", "a-disk1.vmdk"]);
    there.ok(&format!("vm import --name b --run {}", file.display()));
    there.console("b").exchange(&[3], &[3]);
    there.ok("vm kill b");
    for disk in ["disk0.qcow2", "disk1.qcow2"] {
        assert!(here.disk("a", disk) == there.disk("b", disk), "{disk}");
    }
    assert_eq!(there.inspect("b")["config"]["append"], "x=1");
    let words = format!("vm export --with-state --force -o {} a", file.display());
    let ran = here.run(&words);
    ran.check(2);
    assert!(ran.stderr.contains("cannot hold memory"), "{}", ran.stderr);
}

/// As VirtualBox writes one, with a disk that QEMU made; `@...@` are what is wrong in some.
fn foreign_ova(cloud: &Cloud, change: &dyn Fn(&Path)) -> String {
    let folder = cloud.root().join("ova");
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir(&folder).unwrap();
    let raw = cloud.root().join("box.raw");
    let mut bytes = noise(1 << 20);
    bytes.resize(8 << 20, 0);
    fs::write(&raw, bytes).unwrap();
    let mut convert = std::process::Command::new("qemu-img");
    convert.args(["convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]);
    let converted = convert.arg(&raw).arg(folder.join("box.vmdk")).status().unwrap();
    assert!(converted.success());
    fs::write(folder.join("box.ovf"), OVF).unwrap();
    change(&folder);
    let file = cloud.root().join("box.ova").display().to_string();
    let mut tar = std::process::Command::new("tar");
    let packed = tar.arg("-C").arg(&folder).args(["-P", "-cf", &file, "."]).status().unwrap();
    assert!(packed.success());
    file
}

const OVF: &str = r#"<?xml version="1.0"?>
<Envelope xmlns="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="r"
    xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1">
  <References><File ovf:id="f" ovf:href="box.vmdk"/></References>
  <DiskSection><Info>Disks</Info>
    <Disk ovf:diskId="d" ovf:fileRef="f" ovf:capacity="8388608" ovf:format="x/vmdk.html"/>
  </DiskSection>
  <VirtualSystem ovf:id="box"><VirtualHardwareSection>
    <Item><rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>64</rasd:VirtualQuantity></Item>
    <Item><rasd:HostResource>/disk/d</rasd:HostResource><rasd:ResourceType>17</rasd:ResourceType></Item>
  </VirtualHardwareSection></VirtualSystem>
</Envelope>"#;

#[test]
fn an_ova_of_others_needs_a_kernel() {
    if !has_converter() {
        return;
    }
    let cloud = Cloud::new();
    let kernel = cloud.kernel("k.elf", &SUM);
    let file = foreign_ova(&cloud, &|_| {});
    cloud.fails(&format!("vm import {file}"), &["no kernel", "--kernel"]);
    cloud.ok(&format!("vm import --kernel {kernel} --append a=1 --run {file}"));
    cloud.console("box").exchange(&[3], &[3]);
    cloud.ok("vm kill box");
    assert!(cloud.disk("box", "disk0.qcow2") == fs::read(cloud.root().join("box.raw")).unwrap());
    let fails = |parts: &[&str], change: &dyn Fn(&Path)| {
        let file = foreign_ova(&cloud, change);
        cloud.fails(&format!("vm import --name bad --kernel {kernel} {file}"), parts);
        assert_eq!(cloud.machines(), ["box"]);
    };
    let ovf = |folder: &Path, from: &str, to: &str| {
        assert!(OVF.contains(from));
        fs::write(folder.join("box.ovf"), OVF.replace(from, to)).unwrap();
    };
    fails(&["8388608", "9437184"], &|folder| ovf(folder, "8388608", "9437184"));
    fails(&["not beside it"], &|folder| ovf(folder, "box.vmdk", "../box.raw"));
    fails(&["not beside it"], &|folder| ovf(folder, "box.vmdk", "/etc/shadow"));
    fails(&["is missing"], &|folder| ovf(folder, "box.vmdk", "other.vmdk"));
    fails(&["checksum"], &|folder| {
        fs::write(folder.join("box.mf"), "SHA1(box.ovf)= 00\nSHA1(box.vmdk)= 00\n").unwrap();
    });
    fails(&["box.vmdk", "is no file"], &|folder| {
        fs::remove_file(folder.join("box.vmdk")).unwrap();
        std::os::unix::fs::symlink("/etc/shadow", folder.join("box.vmdk")).unwrap();
    });
    fails(&["holds its disk itself"], &|folder| {
        let text = "# Disk DescriptorFile\nRW 16384 FLAT \"/etc/shadow\" 0\n";
        fs::write(folder.join("box.vmdk"), text).unwrap();
    });
    fails(&["a pipe"], &|folder| {
        let made = std::process::Command::new("mkfifo").arg(folder.join("p")).status();
        assert!(made.unwrap().success());
    });
    fails(&["second description"], &|folder| fs::write(folder.join("b.ovf"), OVF).unwrap());
    fails(&["based on another file"], &|folder| {
        ovf(folder, "x/vmdk.html", "qcow2");
        fs::remove_file(folder.join("box.vmdk")).unwrap();
        let mut create = std::process::Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-u", "-b", "/etc/shadow", "-F", "raw"]);
        assert!(create.arg(folder.join("box.vmdk")).arg("8M").status().unwrap().success());
    });
}

/// Where there is no space left, there is one error and nothing else.
#[test]
fn a_full_disk_leaves_nothing() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("left out: only root can mount");
        return;
    }
    let (here, there) = (Cloud::new(), elsewhere());
    here.create_packed("a");
    here.fill_disk("a", "disk0.qcow2", &noise(7 << 20), 0);
    let file = here.root().join("a.berth").display().to_string();
    here.ok(&format!("vm export -o {file} a"));
    there.ok("vm ls");
    let small = there.root().join("machines");
    let Some(_small) = Mounted::tmpfs(&small) else { return };
    there.fails(&format!("vm import {file}"), &["No space left"]);
    assert!(there.machines().is_empty());
    let target = small.join("a.berth").display().to_string();
    here.fails(&format!("vm export -o {target} a"), &["a.berth", "No space left"]);
    assert!(there.machines().is_empty(), "nothing unfinished stays");
}

struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn tmpfs(at: &'a Path) -> Option<Self> {
        let mut mount = std::process::Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", "size=4m", "none"]).arg(at).status();
        let mounted = mount.is_ok_and(|status| status.success());
        if !mounted {
            eprintln!("left out: nothing can be mounted here");
        }
        mounted.then_some(Self(at))
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0).status();
    }
}
