//! Kept machines: the daemon, their folders, their life. Small guests do; Debian where an agent is
//! needed.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process, test_kill_process};
use serde_json::Value;

use crate::guest::{Debian, ECHO, LIMIT, Ran, Random, Running, berth, multiboot, run};

/// Ends with a triple fault: lidt of nothing, int3.
const TRIPLE_FAULT: [u8; 11] = [
    0x0f, 0x01, 0x1d, 0, 0, 0, 0, // lidt [0]
    0xcc, 0xf4, 0xeb, 0xfd,
];

/// A state directory with a daemon of its own, which ends with it.
pub(crate) struct Cloud {
    directory: tempfile::TempDir,
}

impl Cloud {
    pub(crate) fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub(crate) fn root(&self) -> &Path {
        self.directory.path()
    }

    pub(crate) fn command(&self, words: &str) -> std::process::Command {
        let mut command = berth(&[]);
        command.args(words.split_whitespace());
        command.env("BERTH_ROOT", self.root()).env_remove("BERTH_HOST");
        command
    }

    pub(crate) fn run(&self, words: &str) -> Ran {
        run(&mut self.command(words), b"")
    }

    /// Runs what must succeed; gives its output.
    pub(crate) fn ok(&self, words: &str) -> String {
        let ran = self.run(words);
        ran.check(0);
        assert_eq!(ran.stderr, "", "{words}");
        ran.text()
    }

    pub(crate) fn fails(&self, words: &str, parts: &[&str]) {
        let ran = self.run(words);
        assert_eq!(ran.stdout, b"", "{words}");
        ran.check_failed(parts);
    }

    /// A small guest's kernel file.
    pub(crate) fn kernel(&self, name: &str, code: &[u8]) -> String {
        let path = self.root().join(name);
        fs::write(&path, multiboot::kernel(code)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub(crate) fn create(&self, name: &str, code: &[u8]) {
        let kernel = self.kernel(&format!("{name}.elf"), code);
        self.ok(&format!("vm create --memory 64M --debug-exit --kernel {kernel} {name}"));
    }

    pub(crate) fn inspect(&self, name: &str) -> Value {
        let text = self.ok(&format!("vm inspect {name}"));
        serde_json::from_str::<Value>(&text).unwrap()[0].clone()
    }

    pub(crate) fn state(&self, name: &str) -> String {
        self.inspect(name)["state"].as_str().unwrap().to_owned()
    }

    pub(crate) fn wait_for(&self, name: &str, state: &str) -> Value {
        let began = Instant::now();
        loop {
            let now = self.inspect(name);
            if now["state"] == state {
                return now;
            }
            assert!(began.elapsed() < LIMIT, "{name} does not become {state}: {now}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    pub(crate) fn names(&self) -> Vec<String> {
        let list: Value = serde_json::from_str(&self.ok("vm ls --json")).unwrap();
        let names = list.as_array().unwrap().iter();
        names.map(|machine| machine["name"].as_str().unwrap().to_owned()).collect()
    }

    pub(crate) fn console(&self, name: &str) -> Console {
        let mut command = self.command(&format!("vm console {name}"));
        let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut running = Running::start(piped);
        let (to, from) = (running.stdin(), running.stdout());
        Console { running, to, from }
    }

    pub(crate) fn daemon_pid(&self) -> Option<Pid> {
        pid_at(&self.root().join("berth.sock"))
    }

    /// Kills the daemon as the system does when it is short of memory.
    pub(crate) fn kill_daemon(&self) {
        let pid = self.daemon_pid().expect("a daemon");
        kill_process(pid, Signal::KILL).unwrap();
        let began = Instant::now();
        while self.daemon_pid().is_some() {
            assert!(began.elapsed() < LIMIT);
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        let list = run(&mut self.command("vm ls --json"), b"");
        let list: Value = serde_json::from_slice(&list.stdout).unwrap_or_default();
        for machine in list.as_array().into_iter().flatten() {
            let name = machine["name"].as_str().unwrap_or_default();
            run(&mut self.command(&format!("vm rm --force {name}")), b"");
        }
        if let Some(pid) = self.daemon_pid() {
            let _ = kill_process(pid, Signal::TERM);
        }
    }
}

/// The daemon at a socket, if there was none before: it ends when this is dropped.
pub(crate) struct Started(Option<PathBuf>);

impl Started {
    pub(crate) fn at(socket: PathBuf) -> Self {
        Self(UnixStream::connect(&socket).is_err().then_some(socket))
    }
}

impl Drop for Started {
    fn drop(&mut self) {
        if let Some(pid) = self.0.as_deref().and_then(pid_at) {
            let _ = kill_process(pid, Signal::TERM);
            wait_until_gone(pid);
        }
    }
}

/// The daemon that answers there.
fn pid_at(socket: &Path) -> Option<Pid> {
    let info: Value = serde_json::from_str(&get(socket, "/berth/v1/info")?).unwrap();
    Pid::from_raw(i32::try_from(info["pid"].as_u64().unwrap()).unwrap())
}

/// A console that is attached.
pub(crate) struct Console {
    pub(crate) running: Running,
    pub(crate) to: std::process::ChildStdin,
    from: std::process::ChildStdout,
}

impl Console {
    pub(crate) fn exchange(&mut self, sent: &[u8], want: &[u8]) {
        self.to.write_all(sent).unwrap();
        self.expect(want);
    }

    /// Reads until that comes; what was printed before comes first.
    pub(crate) fn expect(&mut self, want: &[u8]) {
        let mut got = Vec::new();
        while !got.ends_with(want) {
            let mut byte = [0];
            let read = self.from.read_exact(&mut byte);
            read.unwrap_or_else(|e| panic!("no {want:?} after {got:?}: {e}"));
            got.extend(byte);
        }
    }
}

/// The body of what a daemon answers.
pub(crate) fn get(socket: &Path, path: &str) -> Option<String> {
    let mut stream = UnixStream::connect(socket).ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: berth\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    Some(body.to_owned())
}

pub fn pid(machine: &Value) -> Pid {
    Pid::from_raw(i32::try_from(machine["pid"].as_u64().unwrap()).unwrap()).unwrap()
}

pub fn wait_until_gone(pid: Pid) {
    let began = Instant::now();
    while test_kill_process(pid).is_ok() {
        assert!(began.elapsed() < LIMIT, "{pid:?} does not end");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_machine_lives_and_ends_in_each_way() {
    let cloud = Cloud::new();
    cloud.create("echo", &ECHO);
    assert_eq!(cloud.state("echo"), "stopped");
    assert_eq!(cloud.ok("vm start echo"), "echo\n");
    let first = cloud.inspect("echo");
    assert_eq!(first["state"], "running");
    test_kill_process(pid(&first)).unwrap();
    let table = cloud.ok("vm ls");
    assert!(table.starts_with("NAME") && table.contains("running"), "{table}");

    let mut console = cloud.console("echo");
    console.exchange(b"abc", b"bcd");
    cloud.ok("vm pause echo");
    assert_eq!(cloud.state("echo"), "paused");
    console.to.write_all(b"x").unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(cloud.ok("vm logs echo"), "bcd", "a guest that is paused prints nothing");
    cloud.ok("vm unpause echo");
    console.expect(b"y");

    // Zero ends it with a status.
    console.to.write_all(&[0]).unwrap();
    let ended = cloud.wait_for("echo", "stopped");
    assert_eq!(ended["last_exit"]["status"], 3, "{ended}");
    assert_eq!(ended["last_exit"]["in_order"], true, "{ended}");
    assert_eq!(console.running.wait(LIMIT), Some(0), "who is attached is told of the end");
    wait_until_gone(pid(&first));

    cloud.ok("vm start echo");
    cloud.ok("vm kill echo");
    assert_eq!(cloud.state("echo"), "stopped");
    // Nobody in it can be asked to power off: it is ended.
    cloud.ok("vm start echo");
    cloud.ok("vm stop --time 1 echo");
    assert_eq!(cloud.state("echo"), "stopped");
    cloud.ok("vm restart echo");
    assert_eq!(cloud.state("echo"), "running");
    cloud.ok("vm rename echo other");
    assert_eq!(cloud.names(), ["other"]);
    cloud.console("other").exchange(b"1", b"2");

    cloud.create("faulty", &TRIPLE_FAULT);
    cloud.ok("vm start faulty");
    let failed = cloud.wait_for("faulty", "failed");
    assert!(failed["last_exit"]["reason"].as_str().unwrap().contains("triple fault"), "{failed}");
    cloud.ok("vm rm faulty");
    cloud.ok("vm rm --force other");
    assert_eq!(cloud.names(), [""; 0]);
    assert_eq!(fs::read_dir(cloud.root().join("machines")).unwrap().count(), 0);
}

#[test]
fn what_cannot_be_is_refused_in_one_line() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    let kernel = cloud.root().join("a.elf").display().to_string();
    let create = |words: &str| format!("vm create --kernel {kernel} {words}");
    cloud.fails(&create("a"), &["a machine a already"]);
    cloud.fails(&create("x/y"), &["x/y", "no machine name"]);
    cloud.fails(&create("--memory 1M b"), &["1M of memory"]);
    cloud.fails(&create("--disk 1000 b"), &["multiple of 512"]);
    cloud.fails(&create("--disk /nonexistent b"), &["/nonexistent", "No such file"]);
    cloud.fails("vm create b nosuchimage", &["nosuchimage"]);
    assert_eq!(cloud.names(), ["a"], "nothing is left of what was refused");
    for word in ["start", "stop", "kill", "restart", "pause", "unpause", "rm", "inspect", "console"]
    {
        cloud.fails(&format!("vm {word} nobody"), &["no machine nobody"]);
    }
    for word in ["stop", "kill", "pause", "unpause", "console"] {
        cloud.fails(&format!("vm {word} a"), &["a does not run"]);
    }
    cloud.fails("vm exec a true", &["a is stopped", "berth vm start a"]);
    cloud.ok("vm start a");
    cloud.fails("vm start a", &["runs already"]);
    cloud.fails("vm unpause a", &["not paused"]);
    cloud.fails("vm rm a", &["a runs", "--force"]);
    cloud.fails("vm rename a a", &["a machine a already"]);
    cloud.fails("vm adopt /nonexistent", &["/nonexistent"]);
    let folder = cloud.root().join("machines/a").display().to_string();
    cloud.fails(&format!("vm adopt --name b {folder}"), &["in use"]);
    cloud.ok("vm pause a");
    cloud.fails("vm pause a", &["paused already"]);
    cloud.ok("vm kill a");
    // What is wrong in it is said when it is started, and can be mended.
    let toml = cloud.root().join("machines/a/vm.toml");
    let good = fs::read_to_string(&toml).unwrap();
    fs::write(&toml, good.replace("cpus = 1", "cpus = 1\nwheels = 4")).unwrap();
    cloud.fails("vm start a", &["vm.toml", "wheels"]);
    fs::write(&toml, good.replace("a.elf", "b.elf")).unwrap();
    cloud.fails("vm start a", &["b.elf"]);
    assert_eq!(cloud.state("a"), "failed");
    fs::write(&toml, good).unwrap();
    cloud.ok("vm start a");
    let other = run(cloud.command("vm ls").env("BERTH_HOST", "unix:///nonexistent/socket"), b"");
    other.check_failed(&["/nonexistent/socket"]);
    let other = run(cloud.command("vm ls").env("BERTH_HOST", "tcp://a"), b"");
    other.check_failed(&["tcp://a", "tcp://HOST:PORT"]);
}

#[test]
fn machines_outlive_their_daemon() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    cloud.create("b", &ECHO);
    cloud.create("c", &ECHO);
    for name in ["a", "b", "c"] {
        cloud.ok(&format!("vm start {name}"));
    }
    cloud.ok("vm pause b");
    let before = ["a", "b", "c"].map(|name| cloud.inspect(name));
    cloud.kill_daemon();
    kill_process(pid(&before[2]), Signal::KILL).unwrap();
    wait_until_gone(pid(&before[2]));
    // The next command starts another one.
    let after = ["a", "b", "c"].map(|name| cloud.inspect(name));
    assert_eq!(after[0], before[0]);
    assert_eq!(after[1], before[1]);
    assert_eq!(after[2]["state"], "failed");
    assert!(after[2]["last_exit"]["reason"].as_str().unwrap().contains("killed"), "{}", after[2]);
    cloud.console("a").exchange(b"a", b"b");
    cloud.ok("vm unpause b");
    cloud.console("b").exchange(b"a", b"b");

    // While there is a daemon, it notices at once.
    kill_process(pid(&after[0]), Signal::KILL).unwrap();
    let lost = cloud.wait_for("a", "failed");
    assert!(lost["last_exit"]["reason"].as_str().unwrap().contains("killed"), "{lost}");
    cloud.ok("vm start a");
    cloud.console("a").exchange(b"a", b"b");

    // One that ends in order leaves its machines too.
    let pid = cloud.daemon_pid().unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    wait_until_gone(pid);
    assert!(!cloud.root().join("berth.sock").exists());
    assert_eq!(cloud.state("a"), "running");
}

#[test]
fn what_is_suspended_goes_on() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    cloud.ok("vm start a");
    let mut console = cloud.console("a");
    console.exchange(b"ab", b"bc");
    cloud.ok("vm suspend a");
    assert_eq!(cloud.state("a"), "suspended");
    assert_eq!(console.running.wait(LIMIT), Some(0));
    cloud.fails("vm suspend a", &["a does not run"]);
    cloud.kill_daemon();
    assert_eq!(cloud.state("a"), "suspended");
    let stored = cloud.root().join("machines/a/state/suspended");
    let memory = fs::metadata(stored.join("memory")).unwrap();
    assert_eq!(memory.len(), 64 << 20);
    let blocks = std::os::unix::fs::MetadataExt::blocks(&memory);
    assert!(blocks * 512 < 1 << 20, "{blocks} blocks for an empty memory");

    // What was altered or cut is refused, and is still there.
    let machine = fs::read_to_string(stored.join("machine.json")).unwrap();
    let refused = |text: &str, part: &str| {
        fs::write(stored.join("machine.json"), text).unwrap();
        cloud.fails("vm start a", &["cannot be started", part]);
        assert_eq!(cloud.state("a"), "suspended");
    };
    refused(&machine[..machine.len() / 2], "EOF");
    refused(&machine.replacen("\"version\":1", "\"version\":9", 1), "version is 9");
    refused(&machine.replacen("\"waiting\"", "\"wondering\"", 1), "wondering");
    refused(&machine.replacen("\"memory_bytes\":67108864", "\"memory_bytes\":4096", 1), "memory");
    refused(&machine.replacen("\"mode\":3", "\"mode\":9", 1), "PIT");
    refused(&machine.replacen("\"leaf\":1,", "\"leaf\":77,", 1), "CPUID leaf 0x4d ");
    fs::write(stored.join("machine.json"), &machine).unwrap();

    cloud.ok("vm resume a");
    assert!(!stored.exists(), "it goes on once");
    cloud.console("a").exchange(b"cd", b"de");
    cloud.fails("vm resume a", &["not suspended"]);
    // Also one that is paused, and one that another start finds.
    cloud.ok("vm pause a");
    cloud.ok("vm suspend a");
    cloud.ok("vm start a");
    cloud.console("a").exchange(b"ef", b"fg");
}

#[test]
fn whoever_asked_may_go() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    let socket = cloud.root().join("berth.sock");
    let ask_and_go = |method: &str, path: &str, wait_ms| {
        let mut stream = UnixStream::connect(&socket).unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: berth\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(wait_ms));
    };
    // It is done, or it is not begun; what is then asked for finds it so.
    for wait_ms in [0, 1, 2, 5, 20, 50] {
        ask_and_go("POST", "/berth/v1/machines/a/start", wait_ms);
        cloud.run("vm start a");
        assert_eq!(cloud.state("a"), "running");
        ask_and_go("POST", "/berth/v1/machines/a/pause", wait_ms);
        cloud.run("vm pause a");
        assert_eq!(cloud.state("a"), "paused");
        cloud.ok("vm unpause a");
        cloud.console("a").exchange(b"a", b"b");
        ask_and_go("POST", "/berth/v1/machines/a/kill", wait_ms);
        cloud.run("vm kill a");
        cloud.wait_for("a", "stopped");
    }
    ask_and_go("DELETE", "/berth/v1/machines/a?force=false", 5);
    cloud.run("vm rm a");
    assert_eq!(cloud.names(), [""; 0]);
    cloud.create("a", &ECHO);

    // Nor does whoever listens keep the daemon from ending.
    let mut events = UnixStream::connect(&socket).unwrap();
    events.write_all(b"GET /berth/v1/events HTTP/1.1\r\nHost: berth\r\n\r\n").unwrap();
    events.read_exact(&mut [0; 16]).unwrap();
    let pid = cloud.daemon_pid().unwrap();
    kill_process(pid, Signal::TERM).unwrap();
    wait_until_gone(pid);
    assert_eq!(cloud.names(), ["a"]);
}

#[test]
fn a_process_that_does_not_answer_is_not_forgotten() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    cloud.create("b", &ECHO);
    cloud.ok("vm start a");
    let process = pid(&cloud.inspect("a"));
    kill_process(process, Signal::STOP).unwrap();
    cloud.kill_daemon();
    // Others are there at once, and it is when it answers.
    assert_eq!(cloud.state("b"), "stopped");
    kill_process(process, Signal::CONT).unwrap();
    cloud.wait_for("a", "running");
    // One that never answers is ended all the same.
    kill_process(process, Signal::STOP).unwrap();
    cloud.ok("vm kill a");
    wait_until_gone(process);
    // A configuration that is damaged while there is no daemon is found again once it is mended.
    let toml = cloud.root().join("machines/b/vm.toml");
    let good = fs::read_to_string(&toml).unwrap();
    fs::write(&toml, "rubbish").unwrap();
    cloud.kill_daemon();
    assert_eq!(cloud.names(), ["a"]);
    cloud.fails("vm start b", &["vm.toml", "line 1"]);
    fs::write(&toml, good).unwrap();
    cloud.ok("vm start b");
    cloud.console("b").exchange(b"a", b"b");
}

#[test]
fn consoles_that_are_left_leave_nothing() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    cloud.ok("vm start a");
    let process = pid(&cloud.inspect("a")).as_raw_nonzero();
    let threads = || fs::read_dir(format!("/proc/{process}/task")).unwrap().count();
    cloud.console("a").exchange(b"a", b"b");
    let before = threads();
    cloud.ok("vm pause a");
    let request = b"GET /berth/v1/machines/a/console HTTP/1.1\r\nHost: berth\r\n\
                    Connection: upgrade\r\nUpgrade: berth-console\r\n\r\n";
    for _ in 0..40 {
        let mut stream = UnixStream::connect(cloud.root().join("berth.sock")).unwrap();
        stream.write_all(request).unwrap();
        let mut head = [0; 12];
        stream.read_exact(&mut head).unwrap();
        // Or too many are there, until the first ones have gone.
        assert!([*b"HTTP/1.1 101", *b"HTTP/1.1 409"].contains(&head), "{head:?}");
        // More than a guest that stands still takes.
        stream.set_write_timeout(Some(Duration::from_millis(20))).unwrap();
        let _ = stream.write_all(&vec![b'x'; 64 << 10]);
    }
    let began = Instant::now();
    while threads() > before + 2 {
        assert!(began.elapsed() < LIMIT, "{} threads, {before} before", threads());
        std::thread::sleep(Duration::from_millis(20));
    }
    cloud.ok("vm unpause a");
    cloud.console("a").exchange(b"1234", b"2345");
}

/// What a machine may be asked for in each state, and what becomes of it.
fn model(state: &str, word: &str) -> Option<&'static str> {
    match (state, word) {
        ("stopped" | "failed" | "suspended", "start") => Some("running"),
        ("suspended", "resume") => Some("running"),
        ("running" | "paused", "suspend") => Some("suspended"),
        ("running" | "paused", "kill" | "stop --time 0") => Some("stopped"),
        (_, "restart --time 0") => Some("running"),
        ("running", "pause") => Some("paused"),
        ("paused", "unpause") => Some("running"),
        _ => None,
    }
}

#[test]
fn any_order_of_commands_does_what_the_model_says() {
    const WORDS: [&str; 10] = [
        "start",
        "suspend",
        "resume",
        "kill",
        "stop --time 0",
        "restart --time 0",
        "pause",
        "unpause",
        "SIGKILL",
        "daemon",
    ];
    let cloud = Cloud::new();
    let mut states = BTreeMap::new();
    for name in ["a", "b"] {
        cloud.create(name, &ECHO);
        states.insert(name, "stopped");
    }
    let mut random = Random(20_261_122);
    for step in 0..120 {
        let name = ["a", "b"][random.below(2)];
        let word = WORDS[random.below(WORDS.len())];
        let before = states[name];
        let says = format!("step {step}: {word} {name}, which is {before}");
        match word {
            "daemon" if random.below(4) == 0 => cloud.kill_daemon(),
            "daemon" => continue,
            "SIGKILL" if !matches!(before, "running" | "paused") => continue,
            "SIGKILL" => {
                kill_process(pid(&cloud.inspect(name)), Signal::KILL).unwrap();
                cloud.wait_for(name, "failed");
                states.insert(name, "failed");
            }
            _ => {
                let ran = cloud.run(&format!("vm {word} {name}"));
                let expected = model(before, word);
                assert_eq!(ran.status, Some(i32::from(expected.is_none())), "{says}: {ran:?}");
                states.insert(name, expected.unwrap_or(before));
            }
        }
        for (name, state) in &states {
            assert_eq!(cloud.state(name), *state, "{says}");
        }
    }
    for name in ["a", "b"] {
        cloud.ok(&format!("vm restart --time 0 {name}"));
        cloud.console(name).exchange(b"k", b"l");
    }
}

#[test]
fn a_copied_folder_becomes_a_machine_of_its_own() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    let machines = cloud.root().join("machines");
    let copy = |from: &Path, to: &Path| {
        let status = std::process::Command::new("cp").arg("-a").arg(from).arg(to).status();
        assert!(status.unwrap().success());
    };
    copy(&machines.join("a"), &machines.join("b"));
    let elsewhere = cloud.root().join("elsewhere");
    copy(&machines.join("a"), &elsewhere);
    // A daemon that finds both knows which is the original.
    cloud.kill_daemon();
    assert_eq!(cloud.names(), ["a"]);
    cloud.fails("vm start b", &["a copy of a", "vm adopt"]);
    let folder = |path: &PathBuf| path.display().to_string();
    assert_eq!(cloud.ok(&format!("vm adopt {}", folder(&machines.join("b")))), "b\n");
    assert_eq!(cloud.ok(&format!("vm adopt --name c {}", folder(&elsewhere))), "c\n");
    cloud.fails(&format!("vm adopt --name d {}", folder(&elsewhere)), &["is the machine c"]);
    let ids = ["a", "b", "c"].map(|name| cloud.inspect(name)["id"].clone());
    assert!(ids[0] != ids[1] && ids[0] != ids[2] && ids[1] != ids[2], "{ids:?}");
    for name in ["a", "b", "c"] {
        cloud.ok(&format!("vm start {name}"));
        cloud.console(name).exchange(b"a", b"b");
    }
    cloud.kill_daemon();
    assert_eq!(cloud.names(), ["a", "b", "c"]);
    assert_eq!(["a", "b", "c"].map(|name| cloud.inspect(name)["id"].clone()), ids);
    // One from elsewhere is forgotten, not removed.
    cloud.ok("vm rm --force c");
    assert!(elsewhere.join("vm.toml").exists());
    // One that was moved is still itself.
    cloud.ok("vm kill a b");
    copy(&machines.join("b"), &cloud.root().join("backup"));
    cloud.ok("vm rm b");
    fs::rename(cloud.root().join("backup"), machines.join("b")).unwrap();
    cloud.kill_daemon();
    assert_eq!(cloud.inspect("b")["id"], ids[1]);
}

#[test]
fn several_watch_a_console_and_one_leaves_by_the_escape() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    cloud.ok("vm start a");
    let (mut one, mut two) = (cloud.console("a"), cloud.console("a"));
    one.exchange(b"a", b"b");
    two.expect(b"b");
    two.exchange(b"c", b"d");
    one.expect(b"d");
    drop(two);
    one.exchange(b"e", b"f");
    // What it printed before is shown to who comes later.
    let mut three = cloud.console("a");
    three.expect(b"bdf");
    assert_eq!(cloud.ok("vm logs a"), "bdf");
    let mut follow = cloud.command("vm logs --follow --tail 0 a");
    let mut follow = Running::start(follow.stdin(Stdio::null()).stdout(Stdio::piped()));
    let mut followed = follow.stdout();
    // It does not see what came before it looked.
    std::thread::sleep(Duration::from_millis(300));
    three.exchange(b"g", b"h");
    let mut byte = [0];
    followed.read_exact(&mut byte).unwrap();
    assert_eq!(byte, *b"h");
    cloud.ok("vm kill a");
    assert_eq!(follow.wait(LIMIT), Some(0), "a log ends with its machine");
}

#[test]
fn the_interface_describes_itself() {
    let cloud = Cloud::new();
    cloud.create("a", &ECHO);
    let mut events = cloud.command("events");
    let mut events = Running::start(events.stdin(Stdio::null()).stdout(Stdio::piped()));
    let mut heard = events.stdout();
    std::thread::sleep(Duration::from_millis(300));
    let socket = cloud.root().join("berth.sock");
    let document = get(&socket, "/berth/v1/openapi.json").unwrap();
    let document: Value = serde_json::from_str(&document).unwrap();
    let paths = document["paths"].as_object().unwrap();
    for (path, method) in [
        ("/berth/v1/machines", "get"),
        ("/berth/v1/machines", "post"),
        ("/berth/v1/machines/{name}", "delete"),
        ("/berth/v1/machines/{name}/start", "post"),
        ("/berth/v1/machines/{name}/console", "get"),
        ("/berth/v1/events", "get"),
    ] {
        assert!(paths[path][method].is_object(), "{method} {path}");
    }
    let metrics = get(&socket, "/metrics").unwrap();
    assert!(metrics.contains("berth_machines{state=\"stopped\"} 1"), "{metrics}");
    cloud.ok("vm start a");
    cloud.ok("vm kill a");
    let mut text = String::new();
    let mut byte = [0];
    while text.lines().count() < 2 || !text.ends_with('\n') {
        heard.read_exact(&mut byte).unwrap();
        text.push(char::from(byte[0]));
    }
    let kinds: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap()["kind"].clone())
        .collect();
    assert_eq!(kinds, ["started", "stopped"]);
}

#[test]
fn debian_is_kept() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    cloud.ok("vm create --disk 8M box debian:bookworm");
    cloud.ok("vm start box");
    assert_eq!(cloud.ok("vm exec box hostname"), "box\n");
    let vm = |words: &[&str]| {
        let ran = run(cloud.command("vm").args(words), b"");
        ran.check(0);
        ran.text()
    };
    let script = "echo $A > /etc/kept; lsblk -bdno SIZE /dev/vdb";
    assert_eq!(vm(&["exec", "-e", "A=kept", "box", "sh", "-c", script]), "8388608\n");
    let address = cloud.ok("vm exec box cat /sys/class/net/eth0/address");
    vm(&["exec", "box", "sh", "-c", "echo hello > /dev/ttyS0"]);
    // Its serial port may have it still.
    let began = Instant::now();
    while !cloud.ok("vm logs box").contains("hello") {
        assert!(began.elapsed() < LIMIT, "nothing is printed");
    }
    assert_eq!(cloud.run("vm exec box sh -c false").status, Some(1));
    // Time goes on while it stands still, and no watchdog complains.
    cloud.ok("vm pause box");
    std::thread::sleep(Duration::from_secs(1));
    cloud.fails("vm exec box true", &["box is paused"]);
    cloud.ok("vm unpause box");
    let clock = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let before = clock();
    let inside: f64 = cloud.ok("vm exec box date +%s.%N").trim().parse().unwrap();
    let range = before.as_secs_f64() - 0.01..clock().as_secs_f64() + 0.01;
    assert!(range.contains(&inside), "{inside} is not in {range:?}");
    // A shell on the console, and another one after it.
    let mut console = cloud.console("box");
    console.exchange(b"\nexit\n", b"logout");
    console.expect(b"# ");
    console.exchange(b"echo con$((1+1))sole\n", b"con2sole");
    cloud.ok("vm stop box");
    let ended = cloud.inspect("box");
    assert_eq!(ended["last_exit"]["reason"], "the guest powered off", "{ended}");
    // By the button: the agent was not asked.
    let printed = cloud.ok("vm logs box");
    assert!(printed.contains("berth: the power button was pressed"), "{printed}");
    cloud.ok("vm start box");
    assert_eq!(cloud.ok("vm exec box cat /etc/kept"), "kept\n");
    assert_eq!(cloud.ok("vm exec box cat /sys/class/net/eth0/address"), address);
}

/// An overlay on a second name of the image's disk, whatever ends the machine.
#[test]
fn the_root_disk_is_an_overlay() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    cloud.ok("vm create --net none box debian:bookworm");
    let folder = cloud.root().join("machines/box");
    let (base, disk) = (folder.join("base.raw"), folder.join("disk0.qcow2"));
    let image = fs::metadata(debian.image.root_disk()).unwrap();
    assert_eq!(fs::metadata(&base).unwrap().len(), image.len());
    let config = fs::read_to_string(folder.join("vm.toml")).unwrap();
    assert!(config.contains("format = \"qcow2\""), "{config}");
    let shown = disk.display();
    let allocated = || -> u64 {
        let info: Value =
            serde_json::from_str(&cloud.ok(&format!("disk info --json {shown}"))).unwrap();
        assert_eq!(info["virtual_bytes"], image.len());
        assert_eq!(info["chain"][0]["file"], base.to_str().unwrap());
        info["allocated_bytes"].as_u64().unwrap()
    };
    assert!(allocated() < 1 << 20, "a new machine takes no space");
    // Nothing is lost if this does remove it: the store is a copy of names.
    let names = cloud.root().join("names/debian@bookworm");
    fs::create_dir_all(&names).unwrap();
    let description = debian.images().join("debian@bookworm/image.json");
    fs::copy(description, names.join("image.json")).unwrap();
    fs::remove_file(cloud.root().join("images")).unwrap();
    fs::rename(cloud.root().join("names"), cloud.root().join("images")).unwrap();
    cloud.fails("image rm debian", &["debian:bookworm", "box", "berth vm rm box"]);
    fs::remove_dir_all(cloud.root().join("images")).unwrap();
    debian.lend_to(cloud.root());
    cloud.ok("vm start box");
    for words in ["check", "resize"] {
        let size = if words == "resize" { " 8G" } else { "" };
        cloud.fails(&format!("disk {words} {shown}{size}"), &["disk0.qcow2", "in use"]);
    }
    let write = "echo flushed > /etc/kept; dd if=/dev/urandom of=/x bs=1M count=30; sync";
    let shell = |script: &str| {
        let ran = run(cloud.command("vm").args(["exec", "box", "sh", "-c", script]), b"");
        ran.check(0);
        ran.text()
    };
    shell(write);
    let sum = shell("sha256sum /x");
    assert!(allocated() > 30 << 20);
    // What is in the folder is all there is of it: the process ends without a word.
    kill_process(pid(&cloud.inspect("box")), Signal::KILL).unwrap();
    cloud.wait_for("box", "failed");
    let check = || -> Value {
        let ran = cloud.run(&format!("disk check --json {shown}"));
        ran.check(0);
        serde_json::from_str(&ran.text()).unwrap()
    };
    assert_eq!(check()["corruptions"], 0);
    cloud.ok("vm start box");
    assert_eq!(shell("cat /etc/kept; sha256sum /x"), format!("flushed\n{sum}"));
    // Space that the guest does not need any more is the host's again.
    let before = allocated();
    shell("rm /x; sync; fstrim /");
    cloud.ok("vm stop box");
    assert!(allocated() + (25 << 20) < before, "{} after {before}", allocated());
    let found = check();
    assert_eq!((&found["corruptions"], &found["sound"]), (&0.into(), &true.into()));
    match std::process::Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&disk).output()
    {
        Err(error) => println!("skipped: no qemu-img here: {error}"),
        // 3 is for leaks alone.
        Ok(output) => assert!(matches!(output.status.code(), Some(0 | 3)), "{output:?}"),
    }
    cloud.ok("vm start box");
    assert_eq!(cloud.ok("vm exec box cat /etc/kept"), "flushed\n");
    cloud.ok("vm kill box");
    assert_eq!(check()["corruptions"], 0);
}
