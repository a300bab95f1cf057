//! The terminal: raw while the guest has it, and as it was when the program is gone, whatever ended
//! it.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::guest::{Debian, LIMIT, Running, berth, multiboot, run};
use crate::images::Maker;

/// Both ends of a terminal; what the program writes is collected.
struct Terminal {
    keys: File,
    program_side: File,
    shown: std::sync::Arc<std::sync::Mutex<Vec<u8>>>,
}

impl Terminal {
    fn open() -> Self {
        let keys = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&keys).unwrap();
        unlockpt(&keys).unwrap();
        let name = ptsname(&keys, Vec::new()).unwrap();
        let flags = rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY;
        let side = rustix::fs::open(name, flags, rustix::fs::Mode::empty()).unwrap();
        let size = Winsize { ws_row: 33, ws_col: 99, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&side, size).unwrap();
        let keys = File::from(keys);
        let shown = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
        let (mut from, into) = (keys.try_clone().unwrap(), std::sync::Arc::clone(&shown));
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                into.lock().unwrap().extend(&buffer[..read]);
            }
        });
        Self { keys, program_side: File::from(side), shown }
    }

    fn start(&self, mut command: Command) -> Running {
        let side = || Stdio::from(OwnedFd::from(self.program_side.try_clone().unwrap()));
        Running::start(command.env("TERM", "xterm").stdin(side()).stdout(side()).stderr(side()))
    }

    fn shown(&self) -> String {
        String::from_utf8_lossy(&self.shown.lock().unwrap()).into_owned()
    }

    fn await_text(&self, text: &str) {
        let began = Instant::now();
        while !self.shown().contains(text) {
            assert!(began.elapsed() < LIMIT, "no `{text}` in: {}", self.shown());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.program_side).unwrap().local_modes;
        !modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
    }

    /// All the settings, in a form that can be compared.
    fn settings(&self) -> String {
        format!("{:?}", tcgetattr(&self.program_side).unwrap())
    }
}

/// A kernel that prints `x` and then runs for ever.
fn endless(directory: &std::path::Path) -> Command {
    let kernel = directory.join("endless");
    let code = [0x66, 0xba, 0xf8, 0x03, 0xb0, b'x', 0xee, 0xeb, 0xfe];
    std::fs::write(&kernel, multiboot::kernel(&code)).unwrap();
    let mut command = berth(&["vm", "run", "--memory", "64M", "--kernel"]);
    command.arg(kernel);
    command
}

#[test]
fn signals_leave_the_terminal_as_it_was() {
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let directory = tempfile::tempdir().unwrap();
        let terminal = Terminal::open();
        let before = terminal.settings();
        let mut child = terminal.start(endless(directory.path()));
        terminal.await_text("x");
        assert!(terminal.is_raw(), "{}", terminal.settings());
        kill_process(Pid::from_child(&child.0), signal).unwrap();
        assert_eq!(child.wait(Duration::from_secs(10)), Some(1), "{signal:?}");
        assert_eq!(terminal.settings(), before, "{signal:?}");
    }
}

#[test]
fn the_escape_ends_the_machine() {
    let directory = tempfile::tempdir().unwrap();
    let mut terminal = Terminal::open();
    let before = terminal.settings();
    let mut child = terminal.start(endless(directory.path()));
    terminal.await_text("x");
    // Ctrl-C is the guest's.
    terminal.keys.write_all(&[3]).unwrap();
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.0.try_wait().unwrap().is_none(), "Ctrl-C ended the machine");
    terminal.keys.write_all(&[0x1d, b'.']).unwrap();
    assert!(child.wait(Duration::from_secs(10)).is_some(), "{}", terminal.shown());
    assert_eq!(terminal.settings(), before);
}

#[test]
fn the_escape_ends_a_command() {
    let Some(debian) = Debian::take() else { return };
    let mut terminal = Terminal::open();
    let before = terminal.settings();
    let mut child = terminal.start(debian.command(&[], &["sh", "-c", "echo re''ady; sleep 1000"]));
    terminal.await_text("ready");
    // One for the guest, whose terminal shows it; then the escape in two pieces.
    terminal.keys.write_all(&[0x1d, 0x1d]).unwrap();
    terminal.await_text("^]");
    terminal.keys.write_all(&[0x1d]).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    terminal.keys.write_all(b".").unwrap();
    assert_eq!(child.wait(Duration::from_secs(10)), Some(130), "{}", terminal.shown());
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_shell_on_the_terminal_knows_its_size_and_ends_in_order() {
    let Some(debian) = Debian::take() else { return };
    let mut terminal = Terminal::open();
    let before = terminal.settings();
    let mut child = terminal.start(debian.command(&[], &[]));
    terminal.await_text("# ");
    assert!(terminal.is_raw());
    terminal.keys.write_all(b"echo $(stty size) $TERM $(tty); sleep 100\r").unwrap();
    terminal.await_text("33 99 xterm /dev/ttyS0");
    // Ctrl-C ends the guest's program, not the machine.
    std::thread::sleep(Duration::from_millis(500));
    terminal.keys.write_all(&[3]).unwrap();
    terminal.keys.write_all(b"echo still $((40 + 2))\r").unwrap();
    terminal.await_text("still 42");
    terminal.keys.write_all(b"exit\r").unwrap();
    assert_eq!(child.wait(LIMIT), Some(0), "{}", terminal.shown());
    assert_eq!(terminal.settings(), before);
}

#[test]
fn a_command_on_the_terminal_has_one_too() {
    let Some(debian) = Debian::take() else { return };
    for (end, status) in [(None, 5), (Some(Signal::TERM), 128 + 15), (Some(Signal::HUP), 128 + 1)] {
        let mut terminal = Terminal::open();
        let before = terminal.settings();
        let script = "stty size; tty; echo ready; read line; echo got $line; exit 5";
        let mut child = terminal.start(debian.command(&[], &["sh", "-c", script]));
        terminal.await_text("ready");
        assert!(terminal.shown().contains("33 99") && terminal.is_raw(), "{}", terminal.shown());
        match end {
            None => terminal.keys.write_all(b"keys\r").unwrap(),
            Some(signal) => kill_process(Pid::from_child(&child.0), signal).unwrap(),
        }
        assert_eq!(child.wait(LIMIT), Some(status), "{}", terminal.shown());
        assert_eq!(end.is_none(), terminal.shown().contains("got keys"), "{}", terminal.shown());
        assert_eq!(terminal.settings(), before);
    }
}

#[test]
fn a_virtio_console_follows_the_terminals_size() {
    let Some(debian) = Debian::take() else { return };
    let mut terminal = Terminal::open();
    let before = terminal.settings();
    let mut child = terminal.start(debian.command(&["--virtio-console", "stdio"], &[]));
    terminal.await_text("# ");
    assert!(terminal.is_raw());
    terminal.keys.write_all(b"echo $(stty size) $(tty)\r").unwrap();
    terminal.await_text("33 99 /dev/hvc0");
    let size = Winsize { ws_row: 44, ws_col: 111, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&terminal.program_side, size).unwrap();
    // It is nobody's controlling terminal here, so that the kernel tells nobody.
    kill_process(Pid::from_child(&child.0), Signal::WINCH).unwrap();
    let loop_until =
        b"until [ \"$(stty size)\" = '44 111' ]; do sleep 0.1; done; echo now $((40 + 4))\r";
    terminal.keys.write_all(loop_until).unwrap();
    terminal.await_text("now 44");
    terminal.keys.write_all(b"exit\r").unwrap();
    assert_eq!(child.wait(LIMIT), Some(0), "{}", terminal.shown());
    assert_eq!(terminal.settings(), before);
}

/// With a maker of root images that takes its time and then fails.
#[test]
fn progress_is_shown_on_a_terminal_only() {
    let maker = Maker::new("sleep 1.5\necho 'E: nothing there' >&2\nexit 25\n");
    let bootstrap = || maker.command("image bootstrap debian bookworm");
    let terminal = Terminal::open();
    let mut running = terminal.start(bootstrap());
    terminal.await_text("0s debian:bookworm: ");
    assert_eq!(running.wait(LIMIT), Some(1));
    // What a process writes last may be read after its end.
    terminal.await_text("nothing there");
    let output = bootstrap().output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("nothing there"), "{said}");
    assert!(!said.contains("\u{1b}") && !said.contains("0s debian"), "{said}");
}

/// What `make run` does last, on a terminal (a shell) and without one (a command and its time).
#[test]
fn make_run_gives_a_shell_on_a_terminal_and_else_runs_a_command() {
    let Some(_debian) = Debian::take() else { return };
    let main_job = || {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../../scripts/run-guest");
        let mut command = Command::new("sh");
        command.arg(script).arg(env!("CARGO_BIN_EXE_berth"));
        command
    };
    let mut terminal = Terminal::open();
    let mut child = terminal.start(main_job());
    terminal.await_text("# ");
    terminal.keys.write_all(b"echo $(uname -s) on $(tty); exit\r").unwrap();
    terminal.await_text("Linux on /dev/ttyS0");
    assert_eq!(child.wait(LIMIT), Some(0), "{}", terminal.shown());
    let ran = run(&mut main_job(), b"");
    assert_eq!(ran.status, Some(0), "{}", ran.stderr);
    let said = ran.text();
    for part in ["Linux 6.1", "Debian GNU/Linux 12", "start, command and power-off: ", "kvm"] {
        assert!(said.contains(part), "no `{part}` in: {said}");
    }
}
