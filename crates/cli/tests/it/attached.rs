//! What is attached to a Debian guest: data disks and the network. And a host disk that is full.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use crate::guest::{Debian, LIMIT, Running, berth, run};
use crate::kept::Started;

const DISK_BYTES: u64 = 64 << 20;

fn data_disk(directory: &Path) -> String {
    let path = directory.join("data.raw");
    File::create(&path).unwrap().set_len(DISK_BYTES).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn written_data_is_there_at_the_next_boot() {
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let disk = data_disk(directory.path());
    let script = "set -e; mkfs.ext4 -q /dev/vdb; mount /dev/vdb /mnt; seq 500000 > /mnt/numbers; \
                  sync /mnt/numbers; umount /mnt; blockdev --getsize64 /dev/vdb";
    let ran = debian.shell(&["--disk", &disk], script);
    assert_eq!(ran.check(0).text().trim(), DISK_BYTES.to_string());
    let script = "set -e; mount -o ro /dev/vdb /mnt; sha256sum < /mnt/numbers";
    let ran = debian.shell(&["--disk", &disk, "--cpus", "2"], script);
    // sha256sum of `seq 500000` on any machine.
    let host = Command::new("sh").args(["-c", "seq 500000 | sha256sum"]).output().unwrap();
    assert_eq!(ran.check(0).stdout, host.stdout);
}

#[test]
fn power_off_does_not_lose_what_was_not_yet_written() {
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let disk = data_disk(directory.path());
    let script = "mkfs.ext4 -q /dev/vdb && mount /dev/vdb /mnt && echo kept > /mnt/file";
    debian.shell(&["--disk", &disk], script).check(0);
    let ran = debian.shell(&["--disk", &disk], "mount /dev/vdb /mnt && cat /mnt/file");
    assert_eq!(ran.check(0).text(), "kept\n");
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let disk = data_disk(directory.path());
    File::options().write(true).open(&disk).unwrap().write_all_at(b"untouched", 4096).unwrap();
    let script = "blockdev --getro /dev/vdb; dd if=/dev/vdb bs=4096 skip=1 count=1 2>/dev/null | head -c 9; \
                  echo; dd if=/dev/zero of=/dev/vdb bs=4096 count=16 oflag=direct 2>/dev/null && echo written";
    let ran = debian.shell(&["--disk", &format!("{disk},ro")], script);
    assert_eq!(ran.check(1).text(), "1\nuntouched\n");
    let mut back = [0; 9];
    File::open(&disk).unwrap().read_exact_at(&mut back, 4096).unwrap();
    assert_eq!(&back, b"untouched");
}

#[test]
fn a_writable_disk_is_for_one_machine() {
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let disk = data_disk(directory.path());
    let mut command = debian.command(&["--disk", &disk], &["sh", "-c", "echo up; cat"]);
    let mut first = Running::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let mut said = BufReader::new(first.stdout());
    let mut line = String::new();
    said.read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    debian.shell(&["--disk", &disk], "true").check_failed(&["data.raw"]);
    // Nor may a reader see what changes under it.
    debian.shell(&["--disk", &format!("{disk},ro")], "true").check_failed(&["data.raw"]);
    drop(first.stdin());
    assert_eq!(first.wait(LIMIT), Some(0));
    let ro = format!("{disk},ro");
    let mut command = debian.command(&["--disk", &ro], &["sh", "-c", "echo up; cat"]);
    let mut first = Running::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    line.clear();
    BufReader::new(first.stdout()).read_line(&mut line).unwrap();
    debian.shell(&["--disk", &ro], "true").check(0);
}

#[test]
fn several_disks_keep_their_order() {
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let mut options = Vec::new();
    for size_mib in [1, 2, 3, 4] {
        let path = directory.path().join(format!("{size_mib}.raw"));
        File::create(&path).unwrap().set_len(size_mib << 20).unwrap();
        options.push("--disk".to_owned());
        options.push(path.to_str().unwrap().to_owned());
    }
    let options: Vec<&str> = options.iter().map(String::as_str).collect();
    let script = "for d in b c d e; do blockdev --getsize64 /dev/vd$d; done";
    let ran = debian.shell(&options, script);
    assert_eq!(ran.check(0).text(), "1048576\n2097152\n3145728\n4194304\n");
}

#[test]
fn a_disk_full_of_rubbish_does_no_harm() {
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let disk = data_disk(directory.path());
    let rubbish: Vec<u8> =
        (0..4u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    File::options().write(true).open(&disk).unwrap().write_all_at(&rubbish, 0).unwrap();
    let script = "mount /dev/vdb /mnt 2>/dev/null; echo $?; head -c 4194304 /dev/vdb | sha256sum";
    let ran = debian.shell(&["--disk", &disk], script);
    let text = ran.check(0).text();
    assert!(text.starts_with("32\n"), "{text}");
    // As the root disk: the guest says so and resets.
    let words = ["--append", "berth.root=/dev/vdb", "--disk", &disk];
    let ran = debian.shell(&words, "true");
    ran.check(1);
    assert!(ran.stderr.contains("mounting /dev/vdb"), "{}", ran.stderr);
}

#[test]
fn a_server_on_the_hosts_loopback_is_reached_through_passt() {
    let Some(debian) = Debian::take() else { return };
    if Command::new("passt").arg("--version").output().is_err() {
        return println!("skipped: passt is not installed");
    }
    // passt confines itself in one; within chroot(2) there are none.
    if !Command::new("unshare").args(["--user", "true"]).status().is_ok_and(|s| s.success()) {
        return println!("skipped: no user namespaces here, which passt needs");
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let answer: Vec<u8> = (0..3_000_000u32).map(|i| (i * 31 % 251) as u8).collect();
    let to_send = answer.clone();
    let server = thread::spawn(move || {
        let (stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        (&stream).write_all(&to_send).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        (&stream).read_to_end(&mut rest).unwrap();
        line
    });
    let script = format!(
        "gw=$(ip -4 route show default | cut -d' ' -f3); exec 3<>/dev/tcp/$gw/{port} || exit 9; \
         echo hello from $(hostname) >&3; cat <&3"
    );
    let mut command = debian.command(&["--name", "talker"], &["bash", "-c", &script]);
    let ran = run(&mut command, b"");
    ran.check(0);
    assert!(ran.stdout == answer, "{} bytes came instead of {}", ran.stdout.len(), answer.len());
    assert_eq!(server.join().unwrap(), "hello from talker\n");
}

#[test]
fn a_full_disk_is_said_and_leaves_nothing_half_done() {
    let Some(debian) = Debian::take() else { return };
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: only root can mount a small file system");
    }
    let directory = tempfile::tempdir().unwrap();
    let mounted = Small::mount(directory.path());
    let Some(_mounted) = mounted else { return println!("skipped: tmpfs cannot be mounted here") };
    let root = directory.path().to_str().unwrap();
    let _daemon = Started::at(directory.path().join("berth.sock"));
    // A bootstrap that runs out of space.
    let ran =
        run(berth(&["image", "bootstrap", "debian", "bookworm"]).env("BERTH_ROOT", root), b"");
    ran.check(1);
    let text = ran.stderr.to_lowercase();
    assert!(text.contains("space"), "{}", ran.stderr);
    let left = |place: &str| fs::read_dir(directory.path().join(place)).unwrap().count();
    assert_eq!((left("images"), left("tmp")), (0, 0), "{}", ran.stderr);
    // A machine whose copy of the root disk does not fit.
    let image = directory.path().join("images/debian@bookworm");
    fs::create_dir_all(image.join("kernel")).unwrap();
    let original = debian.image.root_disk();
    let links = [("root.ext4", original.clone()), ("kernel/vmlinuz", debian.image.kernel())];
    for (name, target) in links {
        std::os::unix::fs::symlink(target, image.join(name)).unwrap();
    }
    std::os::unix::fs::symlink(debian.image.modules(), image.join("kernel/modules")).unwrap();
    fs::copy(original.with_file_name("image.json"), image.join("image.json")).unwrap();
    let ran = run(berth(&["vm", "run", "debian", "--", "true"]).env("BERTH_ROOT", root), b"");
    ran.check_failed(&["No space left"]);
    assert_eq!((left("tmp"), left("machines")), (0, 0));
}

#[test]
fn a_host_disk_that_fills_up_is_an_error_in_the_guest() {
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let mounted = Small::mount(directory.path());
    let Some(_mounted) = mounted else { return println!("skipped: tmpfs cannot be mounted here") };
    // Larger than what is under it.
    let disk = data_disk(directory.path());
    let script = "dd if=/dev/zero of=/dev/vdb bs=1M count=64 oflag=direct 2>&1 | grep -c 'Input/output error'; \
                  dd if=/dev/vdb bs=1M count=1 2>/dev/null | wc -c; echo alive";
    let ran = debian.shell(&["--disk", &disk], script);
    assert_eq!(ran.check(0).text(), "1\n1048576\nalive\n");
}

#[test]
fn discarded_blocks_are_given_back_to_the_host() {
    use std::os::unix::fs::MetadataExt;
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let disk = data_disk(directory.path());
    File::options().write(true).open(&disk).unwrap().write_all_at(&[7; 8 << 20], 0).unwrap();
    let script = "set -e; blkdiscard -l 4194304 /dev/vdb; blkdiscard -z -o 4194304 -l 1048576 /dev/vdb; \
                  head -c 5242880 /dev/vdb | tr -d '\\0' | wc -c; \
                  tail -c +5242881 /dev/vdb | head -c 4 | od -An -tx1";
    let ran = debian.shell(&["--disk", &disk], script);
    assert_eq!(ran.check(0).text(), "0\n 07 07 07 07\n");
    assert!(fs::metadata(&disk).unwrap().blocks() * 512 <= 5 << 20, "nothing was given back");
}

#[test]
fn a_huge_disk_has_its_size() {
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let disk = directory.path().join("huge.raw");
    File::create(&disk).unwrap().set_len(1 << 40).unwrap();
    let script = "blockdev --getsize64 /dev/vdb; tail -c 4 /dev/vdb | wc -c";
    let ran = debian.shell(&["--disk", disk.to_str().unwrap()], script);
    assert_eq!(ran.check(0).text(), "1099511627776\n4\n");
}

/// A tap interface that goes with the test.
struct TapInterface(String);

impl TapInterface {
    fn make(address: &str) -> Option<Self> {
        let name = format!("berth{}", std::process::id());
        let ip = |words: &[&str]| {
            let status = Command::new("ip").args(words).stderr(Stdio::null()).status();
            status.is_ok_and(|status| status.success())
        };
        let made = ip(&["tuntap", "add", &name, "mode", "tap"]).then(|| Self(name.clone()))?;
        (ip(&["addr", "add", address, "dev", &name]) && ip(&["link", "set", &name, "up"]))
            .then_some(made)
    }
}

impl Drop for TapInterface {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "del", &self.0]).status();
    }
}

#[test]
fn a_server_on_the_host_is_reached_through_a_tap_interface() {
    let Some(debian) = Debian::take() else { return };
    let Some(tap) = TapInterface::make("198.51.100.1/24") else {
        return println!("skipped: no tap interfaces here (no privileges, or no /dev/net/tun)");
    };
    let listener = TcpListener::bind("198.51.100.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = thread::spawn(move || {
        let (stream, peer) = listener.accept().unwrap();
        (&stream).write_all(b"through the tap\n").unwrap();
        peer.ip().to_string()
    });
    let script = format!(
        "i=$(ls /sys/class/net | grep -v lo); ip addr add 198.51.100.2/24 dev $i; ip link set $i up; \
         cat < /dev/tcp/198.51.100.1/{port}"
    );
    let net = format!("tap={}", tap.0);
    let mut command = debian.command(&["--net", &net], &["bash", "-c", &script]);
    let ran = run(&mut command, b"");
    assert_eq!(ran.check(0).text(), "through the tap\n");
    assert_eq!(server.join().unwrap(), "198.51.100.2");
}

/// A file system of 24 MiB.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(at: &'a Path) -> Option<Self> {
        let mut command = Command::new("mount");
        command.args(["-t", "tmpfs", "-o", "size=24m", "tmpfs"]).arg(at);
        command.stderr(Stdio::null()).status().ok()?.success().then_some(Self(at))
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(self.0).status();
    }
}
