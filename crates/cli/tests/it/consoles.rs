//! The serial port and virtio-console at files and sockets.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::guest::{Debian, ECHO, LIMIT, Running, berth, multiboot, run, run_within};

/// Sends `y` for ever.
const FLOOD: [u8; 9] = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'y', 0xee, 0xeb, 0xfd];

fn kernel(directory: &Path, code: &[u8]) -> String {
    let path = directory.join("guest");
    fs::write(&path, multiboot::kernel(code)).unwrap();
    path.to_str().unwrap().to_owned()
}

fn start(kernel: &str, serial: &str) -> Running {
    let words = ["vm", "run", "--memory", "64M", "--debug-exit", "--serial", serial];
    let mut command = berth(&words);
    let silent = command.args(["--kernel", kernel]).stdin(Stdio::null()).stdout(Stdio::null());
    Running::start(silent)
}

/// Connects as soon as the machine listens.
fn connect(path: &Path) -> UnixStream {
    let began = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(LIMIT)).unwrap();
                return stream;
            }
            Err(error) => assert!(began.elapsed() < LIMIT, "nobody listens: {error}"),
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

fn exchange(stream: &mut UnixStream, sent: &[u8], want: &[u8]) {
    stream.write_all(sent).unwrap();
    let mut got = vec![0; want.len()];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, want);
}

fn socket(directory: &Path) -> (PathBuf, String) {
    let path = directory.join("console");
    let word = format!("socket={}", path.display());
    (path, word)
}

#[test]
fn serial_output_is_appended_to_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let log = directory.path().join("log");
    fs::write(&log, "before ").unwrap();
    // mov dx, 0x3f8; mov al, 'h'; out dx, al; mov al, 'i'; out dx, al; mov al, 0; out 0xf4, al
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'h', 0xee, 0xb0, b'i', 0xee, 0xb0, 0, 0xe6, 0xf4];
    let kernel = kernel(directory.path(), &code);
    let word = format!("file={}", log.display());
    let mut command = berth(&["vm", "run", "--memory", "64M", "--debug-exit", "--serial", &word]);
    let ran = run(command.args(["--kernel", &kernel]), b"nobody reads this");
    ran.check(1);
    assert_eq!((ran.text().as_str(), ran.stderr.as_str()), ("", ""));
    assert_eq!(fs::read_to_string(&log).unwrap(), "before hi");
}

#[test]
fn a_socket_serves_one_client_after_the_other() {
    let directory = tempfile::tempdir().unwrap();
    let (path, word) = socket(directory.path());
    let mut child = start(&kernel(directory.path(), &ECHO), &word);
    let mut first = connect(&path);
    exchange(&mut first, b"HAL", b"IBM");
    // One that only has nothing more to say still hears.
    first.write_all(b"1").unwrap();
    first.shutdown(std::net::Shutdown::Write).unwrap();
    let mut byte = [0];
    first.read_exact(&mut byte).unwrap();
    assert_eq!(&byte, b"2");
    drop(first);
    let mut second = connect(&path);
    exchange(&mut second, b"abc", b"bcd");
    drop(second);
    let mut third = connect(&path);
    third.write_all(&[0]).unwrap();
    assert_eq!(child.wait(LIMIT), Some(3));
    assert!(!path.exists(), "the socket is left behind");
}

#[test]
fn a_guest_goes_on_without_its_client() {
    let directory = tempfile::tempdir().unwrap();
    let (path, word) = socket(directory.path());
    let mut child = start(&kernel(directory.path(), &FLOOD), &word);
    let mut bytes = [0; 4096];
    for _ in 0..3 {
        // Nobody for a while, then somebody who leaves in the middle.
        std::thread::sleep(Duration::from_millis(50));
        let mut stream = connect(&path);
        stream.read_exact(&mut bytes).unwrap();
        assert!(bytes.iter().all(|byte| *byte == b'y'));
    }
    // One that takes nothing is disconnected, so the next one is served.
    let idle = connect(&path);
    let mut next = connect(&path);
    next.read_exact(&mut bytes).unwrap();
    drop(idle);
    // And a signal ends it while a client takes nothing but sends.
    let mut stuck = connect(&path);
    drop(next);
    stuck.write_all(b"input").unwrap();
    std::thread::sleep(Duration::from_millis(300));
    kill_process(Pid::from_child(&child.0), Signal::TERM).unwrap();
    assert_eq!(child.wait(Duration::from_secs(10)), Some(1));
}

#[test]
fn a_socket_left_behind_is_replaced_and_one_in_use_is_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let (path, word) = socket(directory.path());
    let kernel = kernel(directory.path(), &ECHO);
    let mut child = start(&kernel, &word);
    drop(connect(&path));
    let mut command = berth(&["vm", "run", "--memory", "64M", "--serial", &word]);
    let ran = run(command.args(["--kernel", &kernel]), b"");
    ran.check_failed(&["console", "in use"]);
    child.0.kill().unwrap();
    child.0.wait().unwrap();
    assert!(path.exists());
    let mut child = start(&kernel, &word);
    connect(&path).write_all(&[0]).unwrap();
    assert_eq!(child.wait(LIMIT), Some(3));
}

#[test]
fn consoles_that_cannot_be_are_errors() {
    let directory = tempfile::tempdir().unwrap();
    let kernel = kernel(directory.path(), &ECHO);
    let check = |words: &[&str], parts: &[&str]| {
        let mut command = berth(&["vm", "run", "--memory", "64M", "--kernel", &kernel]);
        run_within(command.args(words), b"", Duration::from_secs(20)).check_failed(parts);
    };
    check(&["--serial", "file=/no/such/log"], &["/no/such/log", "No such file"]);
    check(&["--virtio-console", "file=/"], &["directory"]);
    let long = format!("socket=/{}", "x".repeat(200));
    check(&["--serial", &long], &["console"]);
    let pipe = directory.path().join("pipe");
    assert!(Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    let word = format!("file={}", pipe.display());
    check(&["--serial", &word], &["it is a pipe"]);
    let mut command = berth(&["vm", "run", "--kernel", &kernel]);
    let ran = run(command.args(["--serial", "stdio", "--virtio-console", "stdio"]), b"");
    ran.check(2);
    assert!(ran.stderr.contains("not both"), "{}", ran.stderr);
}

#[test]
fn a_full_disk_under_a_console_does_not_stop_the_guest() {
    let directory = tempfile::tempdir().unwrap();
    let mut child = start(&kernel(directory.path(), &FLOOD), "file=/dev/full");
    std::thread::sleep(Duration::from_millis(500));
    assert!(child.0.try_wait().unwrap().is_none(), "it ended");
    kill_process(Pid::from_child(&child.0), Signal::TERM).unwrap();
    assert_eq!(child.wait(Duration::from_secs(10)), Some(1));
}

#[test]
fn debian_prints_its_kernels_messages_through_virtio_console() {
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| format!("file={}", directory.path().join(name).display());
    let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
    let (serial, virtio) = (path("serial"), path("virtio"));
    let options = ["--serial", &serial, "--virtio-console", &virtio];
    let words = [&options[..], &["--append", "console=hvc0 loglevel=7"]].concat();
    let ran = debian.shell(&words, "cat /sys/class/tty/console/active; echo note > /dev/hvc0");
    assert_eq!(ran.check(0).text(), "ttyS0 hvc0\n");
    // The driver is a module: what came before it, the kernel does not give it.
    let virtio = read("virtio");
    for part in ["EXT4-fs (vda): mounted", "note"] {
        assert!(virtio.contains(part), "no `{part}` in: {virtio}");
    }
    assert!(read("serial").contains("Linux version 6."));
}

#[test]
fn input_reaches_debian_through_virtio_console() {
    let Some(debian) = Debian::take() else { return };
    let directory = tempfile::tempdir().unwrap();
    let (path, word) = socket(directory.path());
    let script = "exec < /dev/hvc0 > /dev/hvc0; stty -echo; echo ready; read a b; echo $b $a";
    let mut command = debian.command(&["--virtio-console", &word], &["sh", "-c", script]);
    let mut child = Running::start(command.stdin(Stdio::null()).stdout(Stdio::piped()));
    let mut stream = connect(&path);
    let mut heard = String::new();
    let mut await_text = |stream: &mut UnixStream, text: &str| {
        let mut bytes = [0; 256];
        while !heard.contains(text) {
            let read = stream.read(&mut bytes).unwrap();
            assert_ne!(read, 0, "the console ended: {heard}");
            heard.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
    };
    await_text(&mut stream, "ready");
    stream.write_all(b"one two\n").unwrap();
    await_text(&mut stream, "two one");
    assert_eq!(child.wait(LIMIT), Some(0));
}

#[test]
fn a_shell_on_the_virtio_console() {
    let Some(debian) = Debian::take() else { return };
    let mut command = debian.command(&["--virtio-console", "stdio"], &[]);
    let mut child = Running::start(command.stdin(Stdio::piped()).stdout(Stdio::piped()));
    let (mut keys, mut screen) = (child.stdin(), child.stdout());
    let (mut shown, mut bytes) = (String::new(), [0; 256]);
    // The driver drops what comes before somebody has opened it.
    while !shown.contains("# ") {
        let read = screen.read(&mut bytes).unwrap();
        assert_ne!(read, 0, "the console ended: {shown}");
        shown.push_str(&String::from_utf8_lossy(&bytes[..read]));
    }
    keys.write_all(b"echo $(tty)=$((6 * 7))\nexit\n").unwrap();
    screen.read_to_string(&mut shown).unwrap();
    assert!(shown.contains("/dev/hvc0=42"), "{shown}");
    assert_eq!(child.wait(LIMIT), Some(0));
}
