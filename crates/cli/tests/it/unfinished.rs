//! Imports that break off in the middle: the client is killed, or the daemon, or the stream ends; and go on.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::appliances::{elsewhere, noise};
use crate::guest::{LIMIT, Ran, Running, SUM, run};
use crate::kept::Cloud;

/// Bytes of the disk that do not compress: more than one checkpoint.
const NOISE: usize = 72 << 20;
/// Where a stream is cut, between checkpoints.
const CUT: usize = 50 << 20;
/// A checkpoint is made each time so many bytes have come.
const CHECKPOINT: u64 = 32 << 20;

/// An appliance that takes a while, and the host it is from.
fn packed(with_state: bool) -> (Cloud, PathBuf) {
    let here = Cloud::new();
    let kernel = here.kernel("a.elf", &SUM);
    here.ok(&format!("vm create --memory 64M --debug-exit --disk 80M --kernel {kernel} a"));
    here.fill_disk("a", "disk0.qcow2", &noise(NOISE), 1 << 20);
    let file = here.root().join("a.berth");
    let flag = if with_state { "--with-state" } else { "" };
    if with_state {
        here.ok("vm start a");
        here.console("a").exchange(&[5], &[5]);
    }
    here.ok(&format!("vm export {flag} -o {} a", file.display()));
    if with_state {
        here.ok("vm kill a");
    }
    (here, file)
}

fn imports(cloud: &Cloud) -> Vec<Value> {
    let list: Value = serde_json::from_str(&cloud.ok("vm imports --json")).unwrap();
    list.as_array().unwrap().clone()
}

/// The only import that is kept, when nobody has it any more.
fn kept(cloud: &Cloud) -> Value {
    let began = Instant::now();
    loop {
        let found = imports(cloud);
        if let [one] = found.as_slice()
            && one["in_use"] == false
        {
            return one.clone();
        }
        assert!(began.elapsed() < LIMIT, "{found:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn at(import: &Value) -> u64 {
    import["at"].as_u64().unwrap()
}

/// An import that has got so many bytes of a file and waits for more.
fn begin(cloud: &Cloud, words: &str, file: &Path, bytes: usize) -> (Running, impl Write) {
    let mut command = cloud.command(words);
    let mut running = Running::start(command.stdin(Stdio::piped()).stderr(Stdio::piped()));
    let mut stdin = running.stdin();
    stdin.write_all(&fs::read(file).unwrap()[..bytes]).unwrap();
    (running, stdin)
}

fn wait_for_checkpoint(cloud: &Cloud) {
    let began = Instant::now();
    while !cloud.machines().iter().any(|name| name.starts_with(".import-")) {
        assert!(began.elapsed() < LIMIT, "nothing is kept");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn an_import_whose_client_is_killed_goes_on() {
    let ((here, file), there) = (packed(false), elsewhere());
    let (client, stdin) = begin(&there, "vm import -", &file, CUT);
    wait_for_checkpoint(&there);
    assert_eq!(there.names(), [""; 0], "it is no machine");
    // Dropping it kills it.
    drop(client);
    drop(stdin);
    let import = kept(&there);
    assert!(at(&import) > CHECKPOINT && at(&import) <= CUT as u64, "{import}");
    assert!(import["disk_bytes"].as_u64().unwrap() > CHECKPOINT, "{import}");
    assert_eq!(import["name"], "a");
    assert!(there.ok("vm imports").contains(import["id"].as_str().unwrap()));
    // Only what is missing is read: the rest of the file is another now.
    let rest = here.root().join("rest.berth");
    fs::copy(&file, &rest).unwrap();
    let zeroes = vec![0; at(&import) as usize - 8192];
    File::options().write(true).open(&rest).unwrap().write_all_at(&zeroes, 8192).unwrap();
    // The name comes last.
    let ran = there.run(&format!("vm import --run --name b {}", rest.display()));
    assert_eq!(ran.check(0).text(), "b\n");
    assert!(ran.stderr.contains("the import of a broke off at 4"), "{}", ran.stderr);
    assert!(ran.stderr.contains("M of 72") && ran.stderr.contains("goes on"), "{}", ran.stderr);
    there.console("b").exchange(&[3], &[3]);
    there.ok("vm kill b");
    assert!(here.disk("a", "disk0.qcow2") == there.disk("b", "disk0.qcow2"));
    let disk = there.root().join("machines/b/disk0.qcow2");
    there.run(&format!("disk check {}", disk.display())).check(0);
    assert_eq!(there.machines(), ["b"]);
    assert!(!there.root().join("machines/b/state/import").exists());
}

#[test]
fn an_import_whose_daemon_is_killed_goes_on() {
    let ((here, file), there) = (packed(true), elsewhere());
    let (mut client, stdin) = begin(&there, "vm import -", &file, CUT);
    wait_for_checkpoint(&there);
    there.kill_daemon();
    drop(stdin);
    assert_eq!(client.wait(LIMIT), Some(1));
    let mut said = String::new();
    client.0.stderr.take().unwrap().read_to_string(&mut said).unwrap();
    assert!(said.contains("the import broke off; `berth vm import -` goes on"), "{said}");
    // The next daemon knows how far it came.
    let import = kept(&there);
    assert!(at(&import) >= CHECKPOINT && at(&import) <= CUT as u64, "{import}");
    assert_eq!(there.names(), [""; 0]);
    // From a pipe, what is known is left out.
    let ran = run(&mut there.command("vm import -"), &fs::read(&file).unwrap());
    ran.check(0);
    assert!(ran.stderr.contains("the import of a broke off at 3"), "{}", ran.stderr);
    assert!(here.disk("a", "disk0.qcow2") == there.disk("a", "disk0.qcow2"));
    assert_eq!(there.state("a"), "suspended");
    there.ok("vm start a");
    there.console("a").exchange(&[2], &[7]);
    assert_eq!(there.machines(), ["a"]);
}

/// A way to a daemon on which each connection is cut when so many bytes went to it.
struct Way {
    socket: PathBuf,
    /// Bytes that went over it.
    sent: Arc<AtomicU64>,
}

impl Way {
    fn make(to: &Cloud, name: &str, limit: u64) -> Self {
        let (socket, daemon) = (to.root().join(name), to.root().join("berth.sock"));
        let (listener, sent) = (UnixListener::bind(&socket).unwrap(), Arc::new(AtomicU64::new(0)));
        let counted = Arc::clone(&sent);
        std::thread::spawn(move || {
            for near in listener.incoming() {
                let (near, far) = (near.unwrap(), UnixStream::connect(&daemon).unwrap());
                let back = (far.try_clone().unwrap(), near.try_clone().unwrap());
                let sent = Arc::clone(&counted);
                std::thread::spawn(move || {
                    let went = std::io::copy(&mut (&near).take(limit), &mut &far);
                    let went = went.unwrap_or(limit);
                    sent.fetch_add(went, Ordering::SeqCst);
                    // The end of what is said, or of all.
                    let how = if went < limit { Shutdown::Write } else { Shutdown::Both };
                    let _ = (far.shutdown(how), near.shutdown(Shutdown::Read));
                });
                std::thread::spawn(move || {
                    let (mut from, mut to) = back;
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Both);
                });
            }
        });
        Self { socket, sent }
    }

    fn import(&self, cloud: &Cloud, file: &Path) -> Ran {
        let mut command = cloud.command(&format!("vm import {}", file.display()));
        let ran = run(command.env("BERTH_HOST", format!("unix://{}", self.socket.display())), b"");
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        ran
    }
}

#[test]
fn only_what_is_missing_is_sent_again() {
    let ((here, file), there) = (packed(false), elsewhere());
    there.ok("vm ls");
    let ran = Way::make(&there, "cut.sock", CUT as u64).import(&there, &file);
    ran.check_failed(&["the import of a broke off at 4", "M of 72", "goes on there", "a.berth"]);
    let import = kept(&there);
    let way = Way::make(&there, "whole.sock", u64::MAX);
    way.import(&there, &file).check(0);
    assert!(here.disk("a", "disk0.qcow2") == there.disk("a", "disk0.qcow2"));
    let rest = fs::metadata(&file).unwrap().len() - at(&import);
    let began = Instant::now();
    while way.sent.load(Ordering::SeqCst) < rest {
        assert!(began.elapsed() < LIMIT, "not all of it went there");
        std::thread::sleep(Duration::from_millis(5));
    }
    let sent = way.sent.load(Ordering::SeqCst);
    // Requests and the marks between pieces of a body come on top.
    assert!((rest..rest + 65_536).contains(&sent), "{sent} bytes for {rest}");
}

/// Asks as any program can; gives the status and the body.
fn post(cloud: &Cloud, path: &str, body: &[u8]) -> (u16, String) {
    let mut stream = UnixStream::connect(cloud.root().join("berth.sock")).unwrap();
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: berth\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).unwrap();
    stream.write_all(body).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let status = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (status, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

#[test]
fn only_the_right_rest_is_taken() {
    let ((here, file), there) = (packed(false), elsewhere());
    let whole = fs::read(&file).unwrap();
    let cut = here.root().join("cut.berth");
    fs::write(&cut, &whole[..CUT]).unwrap();
    there.fails(
        &format!("vm import {}", cut.display()),
        &["ends too early", "the import of a is kept", "goes on at 4"],
    );
    let import = kept(&there);
    let (id, from) = (import["id"].as_str().unwrap(), at(&import));
    let path = |id: &str, at: u64| format!("/berth/v1/import?unfinished={id}&at={at}");
    assert_eq!(post(&there, &path(id, from - 1), b"").0, 409);
    assert_eq!(post(&there, &path("00000000-0000-4000-8000-000000000000", from), b"").0, 404);
    assert_eq!(post(&there, "/berth/v1/import?at=5", b"").0, 400);
    // With other options it is another machine.
    let other = format!("{}&without_state=true", path(id, from));
    assert_eq!(post(&there, &other, b"").0, 409);
    let altered = here.root().join("altered.berth");
    let mut bytes = whole.clone();
    bytes[CUT + (10 << 20)] ^= 1;
    fs::write(&altered, &bytes).unwrap();
    let ran = there.run(&format!("vm import {}", altered.display()));
    ran.check(1);
    assert!(ran.stderr.contains("damaged at"), "{}", ran.stderr);
    assert_eq!(there.names(), [""; 0]);
    assert_eq!(there.machines().len(), 1);
    let import = kept(&there);
    let (status, made) = post(&there, &path(id, at(&import)), &whole[at(&import) as usize..]);
    assert_eq!(status, 201, "{made}");
    assert!(here.disk("a", "disk0.qcow2") == there.disk("a", "disk0.qcow2"));
    assert_eq!(there.machines(), ["a"]);
}

#[test]
fn what_is_kept_can_be_removed_and_need_not_be_good() {
    let ((here, file), there) = (packed(false), elsewhere());
    let cut = here.root().join("cut.berth");
    fs::write(&cut, &fs::read(&file).unwrap()[..CUT]).unwrap();
    let broken = format!("vm import {}", cut.display());
    there.fails(&broken, &["is kept"]);
    let id = kept(&there)["id"].as_str().unwrap().to_owned();
    assert_eq!(there.ok(&format!("vm import-rm {id}")), format!("{id}\n"));
    there.fails(&format!("vm import-rm {id}"), &[&id, "no import"]);
    there.fails("vm import-rm x/y", &[]);
    assert!(there.machines().is_empty());
    // A checkpoint that is none: the next import begins anew, and says nothing of it.
    there.fails(&broken, &["is kept"]);
    let name = there.machines().remove(0);
    let folder = there.root().join("machines").join(name);
    fs::write(folder.join("state/import/checkpoint"), "rubbish\n{").unwrap();
    assert!(imports(&there).is_empty());
    there.ok(&format!("vm import {}", file.display()));
    assert_eq!(there.machines(), ["a"], "it is removed");
    assert!(here.disk("a", "disk0.qcow2") == there.disk("a", "disk0.qcow2"));
    // A folder that is damaged is found when it is to go on.
    there.ok("vm rm a");
    there.fails(&broken, &["is kept"]);
    let name = there.machines().remove(0);
    let folder = there.root().join("machines").join(name);
    fs::remove_file(folder.join("disk0.qcow2")).unwrap();
    let ran = there.run(&format!("vm import {}", file.display()));
    ran.check(1);
    assert!(ran.stderr.contains("begin anew"), "{}", ran.stderr);
    assert!(there.machines().is_empty());
    // And a daemon that starts removes what is of no use.
    there.fails(&broken, &["is kept"]);
    let name = there.machines().remove(0);
    fs::remove_dir_all(there.root().join("machines").join(name).join("state")).unwrap();
    there.kill_daemon();
    there.ok("vm ls");
    assert!(there.machines().is_empty());
}
