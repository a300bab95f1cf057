//! Processes of running clones: copies of one, which may be killed, too; and what they tell each other.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use berth_api::vmm::{Answer, LINE_MAX, Request};
use rustix::process::{Pid, Signal, kill_process};

use crate::guest::{ECHO, LIMIT};
use crate::kept::{Cloud, pid, wait_until_gone};

/// The process that a process is a child of.
fn parent(of: Pid) -> Option<Pid> {
    let stat = fs::read_to_string(format!("/proc/{}/stat", of.as_raw_pid())).ok()?;
    let rest = stat.get(stat.rfind(')')? + 2..)?;
    Pid::from_raw(rest.split(' ').nth(1)?.parse().ok()?)
}

fn words(of: Pid) -> Vec<String> {
    let line = fs::read(format!("/proc/{}/cmdline", of.as_raw_pid())).unwrap_or_default();
    let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into());
    words.filter(|word: &String| !word.is_empty()).collect()
}

fn wait_until_ended(process: Pid) {
    let began = Instant::now();
    // A zombie has no words.
    while !words(process).is_empty() {
        assert!(began.elapsed() < LIMIT, "{:?} stays", words(process));
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// It answers, and is like all others.
fn check(cloud: &Cloud, name: &str) -> Pid {
    cloud.console(name).exchange(b"m", b"n");
    let process = pid(&cloud.inspect(name));
    let folder = cloud.root().join("machines").join(name);
    let words = words(process);
    assert!(words.contains(&"vmm".to_owned()), "{words:?}");
    assert_eq!(words.last().unwrap(), folder.to_str().unwrap());
    process
}

#[test]
fn clones_are_copies_of_one_process() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    cloud.ok("vm start a");
    cloud.ok("vm clone --running a b");
    cloud.ok("vm clone --running --count 3 a c");
    let zygote = parent(check(&cloud, "b")).unwrap();
    assert_eq!(words(zygote), ["berth", "zygote"]);
    assert_eq!(parent(zygote), cloud.daemon_pid());
    for name in ["c-1", "c-2", "c-3"] {
        assert_eq!(parent(check(&cloud, name)), Some(zygote));
    }
    // They are waited for.
    let ended = check(&cloud, "c-1");
    cloud.ok("vm kill c-1");
    wait_until_gone(ended);
    // Started anew, one is like any other machine.
    cloud.ok("vm start c-1");
    assert_eq!(parent(check(&cloud, "c-1")), cloud.daemon_pid());

    // Those that there are need it no more, and the next one gets a process of its own.
    kill_process(zygote, Signal::KILL).unwrap();
    wait_until_ended(zygote);
    cloud.ok("vm clone --running a d");
    assert_eq!(parent(check(&cloud, "d")), cloud.daemon_pid());
    check(&cloud, "b");
    cloud.ok("vm clone --running b e");
    let zygote = parent(check(&cloud, "e")).unwrap();
    assert_eq!(words(zygote), ["berth", "zygote"]);

    // It ends with its daemon; its copies do not.
    cloud.kill_daemon();
    wait_until_ended(zygote);
    for name in ["a", "b", "c-2", "c-3", "d", "e"] {
        check(&cloud, name);
    }
    cloud.ok("vm clone --running e f");
    check(&cloud, "f");
}

#[test]
fn whatever_is_told_of_what_was_written_is_a_hint() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    cloud.ok("vm start a");
    cloud.console("a").exchange(b"1", b"2");
    cloud.ok("vm clone --running a b");
    let range = |start: u64, end: u64| format!("{{\"start\":{start},\"end\":{end}}}");
    let (all, turned, last) =
        (range(0, u64::MAX), range(u64::MAX, 0), range(u64::MAX - 1, u64::MAX));
    let one = range(1, 2);
    let more = format!("{one},").repeat(LINE_MAX as usize / 8);
    let long = format!("{{\"ram\":[{more}{one}],\"code\":[]}}\n");
    let far = format!("{{\"ram\":[{all},{turned},{last}],\"code\":[[{all},{turned}],[]]}}\n");
    for told in ["", "\n", "{\n", "{\"ram\":1}\n", "[]\n", &long, &far] {
        let socket = cloud.root().join("machines/a/state/vmm.sock");
        let freeze = Request::Snapshot { into: None, keep: true };
        let kept = match ask(&socket, &freeze).1 {
            Answer::Snapshot(frozen) => frozen.kept.unwrap(),
            other => panic!("{other:?}"),
        };
        let (mut stream, answer) = ask(&socket, &Request::Take { kept });
        assert_eq!(answer, Answer::Done);
        // Some of what is handed over.
        stream.read_exact(&mut [0; 100]).unwrap();
        // It need not listen to all of it.
        let _ = stream.write_all(told.as_bytes());
        drop(stream);
        ask(&socket, &Request::Release { kept });
        cloud.ok("vm clone --running a c");
        check(&cloud, "c");
        cloud.ok("vm rm --force c");
    }
    check(&cloud, "a");
    check(&cloud, "b");
}

fn ask(socket: &Path, request: &Request) -> (UnixStream, Answer) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let mut line = serde_json::to_vec(request).unwrap();
    line.push(b'\n');
    stream.write_all(&line).unwrap();
    let mut answer = Vec::new();
    while answer.last() != Some(&b'\n') {
        let mut byte = [0];
        stream.read_exact(&mut byte).unwrap();
        answer.extend(byte);
    }
    (stream, serde_json::from_slice(&answer).unwrap())
}
