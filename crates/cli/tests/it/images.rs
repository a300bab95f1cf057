//! Images: listed, made and removed by the daemon. Most are made with a program in the place of
//! mmdebstrap, which takes as long as a test wants.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::guest::{LIMIT, Ran, Running, run};
use crate::kept::{Cloud, wait_until_gone};
use crate::remote::Remote;

/// Puts an image into the store that has all but a system.
pub(crate) fn put_image(root: &Path, name: &str) -> PathBuf {
    let image = root.join("images").join(name.replace(':', "@"));
    fs::create_dir_all(image.join("kernel/modules")).unwrap();
    fs::write(image.join("kernel/vmlinuz"), "kernel").unwrap();
    fs::write(image.join("root.ext4"), [0; 4096]).unwrap();
    let info = serde_json::json!({
        "format": 1,
        "name": name,
        "kernel_version": "6.1.0-test",
        "created_unix_s": 1,
        "disk_bytes": 4096,
        "sources": [],
    });
    fs::write(image.join("image.json"), info.to_string()).unwrap();
    image
}

/// A daemon that finds `script` as mmdebstrap.
pub(crate) struct Maker {
    pub(crate) cloud: Cloud,
}

/// What the real one does for those who are not root.
const HELPER: &str = "#!/bin/sh\nif [ \"$1\" = --unshare-helper ]; then shift; exec \"$@\"; fi\n";

impl Maker {
    pub(crate) fn new(script: &str) -> Self {
        let cloud = Cloud::new();
        let bin = cloud.root().join("bin");
        fs::create_dir(&bin).unwrap();
        let program = bin.join("mmdebstrap");
        fs::write(&program, format!("{HELPER}{script}")).unwrap();
        fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Self { cloud }
    }

    /// Goes on until it is ended, with a process that writes into `mark`.
    fn endless() -> Self {
        let maker = Self::new("");
        let mark = maker.mark();
        let program = maker.cloud.root().join("bin/mmdebstrap");
        let script = format!(
            "{HELPER}trap 'kill $!; exit' TERM\nmkdir \"$TMPDIR/half\"; echo 'I: half done' >&2\n\
             sh -c 'while :; do echo >> {mark}; sleep 0.02; done' &\nwait\n",
            mark = mark.display()
        );
        fs::write(program, script).unwrap();
        maker
    }

    fn mark(&self) -> PathBuf {
        self.cloud.root().join("mark")
    }

    pub(crate) fn command(&self, words: &str) -> Command {
        let mut command = self.cloud.command(words);
        command.env("PATH", self.path());
        command
    }

    /// Where its daemon finds programs.
    pub(crate) fn path(&self) -> String {
        let path = std::env::var("PATH").unwrap();
        format!("{}:{path}", self.cloud.root().join("bin").display())
    }

    fn run(&self, words: &str) -> Ran {
        run(&mut self.command(words), b"")
    }

    /// A bootstrap that is under way.
    fn begin(&self) -> Running {
        let mut command = self.command("image bootstrap debian bookworm");
        let running = Running::start(command.stdin(Stdio::null()).stderr(Stdio::piped()));
        let began = Instant::now();
        while !self.mark().exists() {
            assert!(began.elapsed() < LIMIT, "nothing begins");
            std::thread::sleep(Duration::from_millis(5));
        }
        running
    }

    /// There is nothing of an image, and nobody works at one.
    fn nothing_is_left(&self) {
        let began = Instant::now();
        let left = |place: &str| {
            let entries = fs::read_dir(self.cloud.root().join(place)).unwrap();
            entries.map(|entry| entry.unwrap().file_name()).collect::<Vec<_>>()
        };
        while !left("tmp").is_empty() {
            assert!(began.elapsed() < LIMIT, "{:?}", left("tmp"));
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(left("images").is_empty(), "{:?}", left("images"));
        self.nobody_works();
    }

    fn nobody_works(&self) {
        let written = fs::metadata(self.mark()).unwrap().len();
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(fs::metadata(self.mark()).unwrap().len(), written);
        fs::remove_file(self.mark()).unwrap();
    }

    /// Asks for an image as other programs do; gives what comes.
    fn ask(&self) -> BufReader<UnixStream> {
        let mut stream = UnixStream::connect(self.cloud.root().join("berth.sock")).unwrap();
        let body = r#"{"distribution":"debian","suite":"bookworm"}"#;
        let request = format!(
            "POST /berth/v1/images HTTP/1.1\r\nHost: berth\r\nContent-Type: application/json\r\n\
             Content-Length: {}\r\n\r\n{body}",
            body.len()
        );
        stream.write_all(request.as_bytes()).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        BufReader::new(stream)
    }
}

/// Reads lines until one has this in it.
fn read_until(from: &mut impl BufRead, part: &str) {
    let mut all = String::new();
    while !all.contains(part) {
        assert!(from.read_line(&mut all).unwrap() > 0, "no `{part}` in: {all}");
    }
}

fn said(running: &mut Running) -> String {
    let mut text = String::new();
    running.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
    text
}

#[test]
fn an_empty_store_lists_as_nothing() {
    let cloud = Cloud::new();
    assert_eq!(cloud.ok("image ls --json"), "[]\n");
    let ran = cloud.run("image ls");
    ran.check(0);
    assert!(ran.stdout.starts_with(b"IMAGE") && ran.stderr.contains("berth image bootstrap"));
}

/// A second bootstrap makes nothing: there is nothing here that it could be made with.
#[test]
fn an_image_is_listed_not_made_again_and_removed() {
    let cloud = Cloud::new();
    let image = put_image(cloud.root(), "debian:bookworm");
    let other = put_image(cloud.root(), "lab");
    let listed = cloud.ok("image ls");
    assert!(listed.contains("debian:bookworm") && listed.contains("6.1.0-test"), "{listed}");
    let listed: Value = serde_json::from_str(&cloud.ok("image ls --json")).unwrap();
    let first = &listed[0];
    assert!(first["allocated_bytes"].as_u64().unwrap() >= 4096, "{listed}");
    for (key, value) in [
        ("name", Value::from("debian:bookworm")),
        ("kernel_version", "6.1.0-test".into()),
        ("created_unix_s", 1.into()),
        ("disk_bytes", 4096.into()),
    ] {
        assert_eq!(first[key], value, "{listed}");
    }
    assert_eq!(first.as_object().unwrap().len(), 5, "{listed}");
    let again = run(cloud.command("image bootstrap debian bookworm").env("PATH", "/none"), b"");
    again.check(0);
    let said = again.stderr;
    assert!(said.contains("is there already") && said.contains("--again"), "{said}");
    assert_eq!(fs::read(image.join("root.ext4")).unwrap(), [0; 4096]);
    // By a part of its name; those before one that is not there are gone.
    let ran = cloud.run("image rm debian nothing lab");
    ran.check(1);
    assert_eq!(ran.text(), "debian:bookworm\n");
    assert!(ran.stderr.contains("there is no image nothing; the store"), "{}", ran.stderr);
    assert!(!image.exists() && other.exists());
    assert_eq!(cloud.ok("image rm lab"), "lab\n");
    cloud.fails("image rm debian", &["debian", "none"]);
}

#[test]
fn a_wrong_request_makes_nothing() {
    let cloud = Cloud::new();
    for (words, parts) in [
        ("image bootstrap fedora 41", ["fedora", "debian"]),
        ("image bootstrap debian ../x", ["../x", "bookworm"]),
        ("image bootstrap --name ../x debian bookworm", ["`../x`", "no image name"]),
        ("image bootstrap --include A debian bookworm", ["`A`", "no package name"]),
        ("image bootstrap --size 1M debian bookworm", ["1 MiB", "512 MiB"]),
        ("image rm ../x", ["`../x`", "no image name"]),
        ("image rm debian", ["no image debian", "none"]),
    ] {
        cloud.fails(words, &parts);
    }
    let ran = run(cloud.command("image rm").arg(""), b"");
    ran.check_failed(&["``", "no image name"]);
    assert!(
        !cloud.root().join("tmp").exists()
            || fs::read_dir(cloud.root().join("tmp")).unwrap().count() == 0
    );
}

#[test]
fn an_image_that_a_machine_boots_stays() {
    let cloud = Cloud::new();
    let image = put_image(cloud.root(), "debian:bookworm");
    put_image(cloud.root(), "lab:1");
    cloud.ok("vm create --net none box debian");
    cloud.ok("vm create --net none a-box lab:1");
    let kernel = cloud.kernel("own.elf", &[0xf4]);
    cloud.ok(&format!("vm create --net none --kernel {kernel} --initrd {kernel} own lab"));
    cloud.fails(
        "image rm debian:bookworm",
        &["debian:bookworm is what the machine box boots", "`berth vm rm box`"],
    );
    cloud.fails("image rm lab", &["lab:1", "berth vm rm a-box"]);
    cloud.ok("vm rename box other");
    cloud.fails("image rm debian", &["debian:bookworm", "berth vm rm other"]);
    assert!(image.exists());
    cloud.ok("vm rm other");
    assert_eq!(cloud.ok("image rm debian"), "debian:bookworm\n");
    cloud.ok("vm rm a-box");
    assert_eq!(cloud.ok("image rm lab"), "lab:1\n");
}

/// What it runs with: a usual umask, though the daemon's files are its own, and proxies.
#[test]
fn a_bootstrap_that_fails_says_why() {
    let maker =
        Maker::new("echo \"E: umask $(umask), $http_proxy, $NO_PROXY, $SECRET.\" >&2\nexit 25\n");
    let mut command = maker.command("image bootstrap debian bookworm");
    command.env("http_proxy", "http://proxy:1").env("NO_PROXY", "here").env("SECRET", "secret");
    let ran = run(&mut command, b"");
    ran.check(1);
    let expected =
        "berth: mmdebstrap failed (exit status: 25):\nE: umask 0022, http://proxy:1, here, .";
    assert!(ran.stderr.starts_with(expected), "{}", ran.stderr);
    assert_eq!(fs::read_dir(maker.cloud.root().join("tmp")).unwrap().count(), 0);
    maker.cloud.ok("image ls --json");
}

/// All but the system in it is as with the real one.
#[test]
fn an_image_is_made_with_files_for_all_users() {
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: only root makes images without a user namespace");
    }
    let maker = Maker::new(
        "set -e\nfor last; do before=$target target=$last; done\n\
         cat > \"$TMPDIR/sources\"; mkdir -p \"$before/etc/new\"; echo x > \"$before/etc/new/file\"\n\
         mkdir -p \"$TMPDIR/p/DEBIAN\" \"$TMPDIR/p/boot\" \"$TMPDIR/p/lib/modules/6.1-test\" \"$TMPDIR/berth-kernel\"\n\
         printf 'Package: k\\nVersion: 1\\nArchitecture: all\\nMaintainer: m\\nDescription: d\\n' \
         > \"$TMPDIR/p/DEBIAN/control\"\n\
         echo k > \"$TMPDIR/p/boot/vmlinuz-6.1-test\"; echo m | xz > \"$TMPDIR/p/lib/modules/6.1-test/m.ko.xz\"\n\
         dpkg-deb -b \"$TMPDIR/p\" \"$TMPDIR/berth-kernel/k.deb\" >&2\n",
    );
    let ran = maker.run("image bootstrap --size 512M --name lab:1 debian bookworm");
    ran.check(0);
    assert!(ran.stderr.starts_with("berth: made lab:1 with kernel 6.1-test, "), "{}", ran.stderr);
    assert!(ran.stdout.is_empty());
    let listed: Value = serde_json::from_str(&maker.cloud.ok("image ls --json")).unwrap();
    assert_eq!(
        (&listed[0]["name"], &listed[0]["disk_bytes"]),
        (&"lab:1".into(), &(512 << 20).into())
    );
    let image = maker.cloud.root().join("images/lab@1");
    assert_eq!(fs::read(image.join("kernel/modules/m.ko")).unwrap(), b"m\n");
    for (file, mode) in [("/etc/new", "0755"), ("/etc/new/file", "0644")] {
        let mut look = Command::new("debugfs");
        look.args(["-R", &format!("stat {file}")]).arg(image.join("root.ext4"));
        let ran = run(&mut look, b"");
        assert!(ran.text().contains(&format!("Mode:  {mode}")), "{} {}", ran.text(), ran.stderr);
    }
    assert_eq!(fs::read_dir(maker.cloud.root().join("tmp")).unwrap().count(), 0);
}

#[test]
fn a_bootstrap_ends_with_whoever_wanted_it() {
    let maker = Maker::endless();
    for signal in [Signal::KILL, Signal::INT] {
        let mut first = maker.begin();
        // The daemon has time for others.
        let began = Instant::now();
        maker.cloud.ok("vm ls");
        assert_eq!(maker.cloud.ok("image ls --json"), "[]\n");
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        kill_process(Pid::from_child(&first.0), signal).unwrap();
        first.wait(LIMIT);
        maker.nothing_is_left();
    }
}

#[test]
fn a_second_bootstrap_and_a_removal_wait() {
    let maker = Maker::endless();
    let first = maker.begin();
    put_image(maker.cloud.root(), "lab");
    let mut second = maker.ask();
    read_until(&mut second, "waiting for another bootstrap to finish");
    let removal = || {
        let mut command = maker.command("image rm lab");
        let mut running = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        let mut stderr = BufReader::new(running.0.stderr.take().unwrap());
        read_until(&mut stderr, "berth: waiting for a bootstrap to finish\n");
        running
    };
    // Who has given up waiting has removed nothing.
    drop(removal());
    let mut removed = removal();
    drop(second);
    assert!(maker.cloud.ok("image ls").contains("lab"));
    drop(first);
    assert_eq!(removed.wait(LIMIT), Some(0));
    maker.nothing_is_left();
    // The one that waited is not begun.
    std::thread::sleep(Duration::from_millis(300));
    assert!(!maker.mark().exists());
}

#[test]
fn a_bootstrap_ends_with_the_daemon() {
    let maker = Maker::endless();
    let mut client = maker.begin();
    let pid = maker.cloud.daemon_pid().unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    assert_eq!(client.wait(LIMIT), Some(1));
    let why = said(&mut client);
    assert_eq!(why, "berth: the daemon was ended before debian:bookworm was made; try again\n");
    wait_until_gone(pid);
    maker.nothing_is_left();
    let mut client = maker.begin();
    maker.cloud.kill_daemon();
    assert_eq!(client.wait(LIMIT), Some(1));
    assert!(said(&mut client).contains("daemon"));
    maker.nobody_works();
    // What it left is swept by the next one.
    let mut client = maker.begin();
    kill_process(Pid::from_child(&client.0), Signal::KILL).unwrap();
    client.wait(LIMIT);
    maker.nothing_is_left();
}

#[test]
fn images_of_another_host() {
    let remote = Remote::new();
    put_image(remote.cloud.root(), "debian:bookworm");
    assert!(remote.ok("image ls").contains("debian:bookworm"));
    let ran = remote.run("image bootstrap debian bookworm");
    ran.check(0);
    assert!(ran.stderr.contains("debian:bookworm is there already"), "{}", ran.stderr);
    remote.run("image bootstrap fedora 41").check_failed(&["fedora", "debian"]);
    assert_eq!(remote.ok("image rm debian"), "debian:bookworm\n");
    remote.run("image rm debian").check_failed(&["no image debian"]);
}
