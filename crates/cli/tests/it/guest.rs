//! What the tests with whole guests share: the program with a limit on its time, the Debian image
//! (made when missing), small Multiboot guests, and a lock that lets one heavy test run at a time.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use berth_cli::client::{Address, Place};
use berth_image::store::{Image, ImageName, Store};
use rustix::fs::{FlockOperation, flock};

use crate::kept::{Cloud, Started};

/// No run of a guest may take longer; the slowest hosts of CI are far below.
pub const LIMIT: Duration = Duration::from_secs(240);

/// Code that sends each byte back with one added; a zero byte ends the machine with status 3.
pub const ECHO: [u8; 32] = [
    0x66, 0xba, 0xfd, 0x03, // again: mov dx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf7, // jz again
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0x84, 0xc0, // test al, al
    0x74, 0x05, // jz end
    0xfe, 0xc0, // inc al
    0xee, // out dx, al
    0xeb, 0xe9, // jmp again
    0xb0, 0x01, 0xe6, 0xf4, // end: mov al, 1; out 0xf4, al
    0xf4, 0xf4, 0xf4, 0xf4, 0xf4, // hlt
];

/// Code that sends for each byte the sum of all so far, which it keeps in memory; a zero byte ends the
/// machine with status 3.
pub const SUM: [u8; 37] = [
    0x66, 0xba, 0xfd, 0x03, // again: mov dx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf7, // jz again
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0x84, 0xc0, // test al, al
    0x74, 0x0e, // jz end
    0x00, 0x05, 0x00, 0x00, 0x30, 0x00, // add [0x300000], al
    0xa0, 0x00, 0x00, 0x30, 0x00, // mov al, [0x300000]
    0xee, // out dx, al
    0xeb, 0xe0, // jmp again
    0xb0, 0x01, 0xe6, 0xf4, // end: mov al, 1; out 0xf4, al
    0xf4, // hlt
];

/// How the program ended.
#[derive(Debug)]
pub struct Ran {
    /// Its exit status; `None` when it was ended because its time was over.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
}

impl Ran {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// The program ended with this status, in time and without a panic.
    pub fn check(&self, status: i32) -> &Self {
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
        let tail: String = self.text().lines().rev().take(5).collect::<Vec<_>>().join(" <- ");
        assert_eq!(self.status, Some(status), "stdout ends: {tail}\nstderr: {}", self.stderr);
        self
    }

    /// It failed with status 1 and one line on standard error that holds all of `parts`.
    pub fn check_failed(&self, parts: &[&str]) {
        self.check(1);
        assert_eq!(self.stderr.lines().count(), 1, "not one line: {}", self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "no `{part}` in: {}", self.stderr);
        }
    }
}

/// The program under test with these arguments.
pub fn berth(arguments: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new(env!("CARGO_BIN_EXE_berth"));
    command.args(arguments);
    command
}

/// Runs it to its end with this standard input.
pub fn run(command: &mut std::process::Command, stdin: &[u8]) -> Ran {
    run_within(command, stdin, LIMIT)
}

/// Runs it for at most `limit`.
pub fn run_within(command: &mut std::process::Command, stdin: &[u8], limit: Duration) -> Ran {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Running::start(piped);
    let mut to = child.stdin();
    let input = stdin.to_vec();
    // It may end without reading.
    let writer = std::thread::spawn(move || drop(to.write_all(&input)));
    let stdout = collect(child.stdout());
    let stderr = collect(child.0.stderr.take().unwrap());
    let status = child.wait(limit);
    drop(child);
    writer.join().unwrap();
    let stderr = String::from_utf8_lossy(&stderr.join().unwrap()).into_owned();
    Ran { status, stdout: stdout.join().unwrap(), stderr }
}

fn collect(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // What came before an error still tells how far it got.
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

/// A small generator with a fixed seed (Knuth's MMIX).
pub struct Random(pub u64);

impl Random {
    /// Less than `n`, or 0.
    pub fn below(&mut self, n: usize) -> usize {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n.max(1)
    }

    /// Any of them.
    pub fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }
}

/// A program that is ended when the test leaves, however it leaves.
pub struct Running(pub Child);

impl Running {
    /// Starts it.
    pub fn start(command: &mut std::process::Command) -> Self {
        Self(command.spawn().unwrap())
    }

    /// Its standard input, once.
    pub fn stdin(&mut self) -> ChildStdin {
        self.0.stdin.take().unwrap()
    }

    /// Its standard output, once.
    pub fn stdout(&mut self) -> ChildStdout {
        self.0.stdout.take().unwrap()
    }

    /// Waits for its end; `None` when it takes longer or a signal ended it.
    pub fn wait(&mut self, limit: Duration) -> Option<i32> {
        let began = Instant::now();
        while began.elapsed() < limit {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        None
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Held while a test uses the processors for long; tests of other processes wait too.
pub fn turn() -> File {
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("one-guest-at-a-time");
    let file = File::options().write(true).create(true).truncate(false).open(path).unwrap();
    flock(&file, FlockOperation::LockExclusive).unwrap();
    file
}

/// The Debian image, and the right to run guests from it.
pub struct Debian {
    /// Ended before somebody else has his turn.
    _daemon: Started,
    _turn: File,
    /// The image in the store that the program uses by itself.
    pub image: Image,
}

impl Debian {
    /// Waits for its turn; makes the image when there is none. `None`, with the reason printed, when
    /// this host cannot make one (`BERTH_E2E=required` turns that into a failure).
    pub fn take() -> Option<Self> {
        static WHY_NOT: OnceLock<Option<String>> = OnceLock::new();
        let turn = turn();
        let daemon = Started::at(socket());
        let why_not = WHY_NOT.get_or_init(|| prepare().err());
        match why_not {
            None => Some(Self { _daemon: daemon, _turn: turn, image: image().unwrap() }),
            Some(why) => {
                let required = std::env::var("BERTH_E2E").is_ok_and(|value| value == "required");
                assert!(!required, "no Debian guest: {why}");
                println!("skipped: {why}");
                None
            }
        }
    }

    /// The directory of the images.
    pub fn images(&self) -> PathBuf {
        std::env::var_os("BERTH_ROOT").map_or_else(state, PathBuf::from).join("images")
    }

    /// Shows the images to the daemon of another state directory.
    pub fn lend_to(&self, root: &Path) {
        std::os::unix::fs::symlink(self.images(), root.join("images")).unwrap();
    }

    /// A state directory of its own with these images.
    pub fn cloud(&self) -> Cloud {
        let cloud = Cloud::new();
        self.lend_to(cloud.root());
        cloud
    }

    /// `berth vm run OPTIONS debian:bookworm -- COMMAND`.
    pub fn command(&self, options: &[&str], command: &[&str]) -> std::process::Command {
        let mut words = vec!["vm", "run"];
        words.extend(options);
        words.push("debian:bookworm");
        if !command.is_empty() {
            words.push("--");
            words.extend(command);
        }
        berth(&words)
    }

    /// Runs a shell script in a guest, with the script's standard input empty.
    pub fn shell(&self, options: &[&str], script: &str) -> Ran {
        run(&mut self.command(options, &["sh", "-c", script]), b"")
    }
}

fn state() -> PathBuf {
    berth_cli::state::directory(None).unwrap()
}

/// Where the daemon of that directory listens.
fn socket() -> PathBuf {
    let given = std::env::var_os("BERTH_ROOT").map(PathBuf::from);
    match Address::choose(None, given.as_deref(), &state()).unwrap().place {
        Place::Unix(socket) => socket,
        place @ Place::Tcp(_) => panic!("{place} is elsewhere"),
    }
}

fn image() -> Result<Image, String> {
    let root = std::env::var_os("BERTH_ROOT").map_or_else(state, PathBuf::from);
    let store = Store::open(&root).map_err(|error| error.to_string())?;
    let name = ImageName::parse("debian:bookworm").unwrap();
    store.find(&name).map_err(|error| error.to_string())
}

fn prepare() -> Result<(), String> {
    let agent = Path::new(env!("CARGO_BIN_EXE_berth"))
        .ancestors()
        .nth(2)
        .unwrap()
        .join("agent/x86_64-unknown-linux-gnu/agent/berth-agent");
    if !agent.exists() && std::env::var_os("BERTH_AGENT").is_none() {
        return Err(format!("{} is missing; run `cargo xtask agent`", agent.display()));
    }
    if image().is_ok() {
        return Ok(());
    }
    let ran = run_within(
        &mut berth(&["image", "bootstrap", "debian", "bookworm"]),
        b"",
        Duration::from_secs(1200),
    );
    match ran.status {
        Some(0) => Ok(()),
        status => Err(format!("`berth image bootstrap` ended with {status:?}: {}", ran.stderr)),
    }
}

/// A Multiboot kernel for 32-bit code that begins at 1 MiB + [`multiboot::CODE_OFFSET`].
pub mod multiboot {
    const LOAD: u32 = 0x10_0000;
    const HEADERS: u32 = 52 + 32;
    /// Where the code begins in the file and from [`LOAD`].
    pub const CODE_OFFSET: u32 = HEADERS + 12;
    const MAGIC: u32 = 0x1bad_b002;

    /// An ELF file that runs `code` in 32-bit protected mode without paging.
    pub fn kernel(code: &[u8]) -> Vec<u8> {
        let mut file = b"\x7fELF\x01\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
        let size = CODE_OFFSET + u32::try_from(code.len()).unwrap();
        let half = |file: &mut Vec<u8>, value: u16| file.extend(value.to_le_bytes());
        let word = |file: &mut Vec<u8>, value: u32| file.extend(value.to_le_bytes());
        // Executable, 386, version, entry, program headers at 52, no sections, no flags.
        half(&mut file, 2);
        half(&mut file, 3);
        for value in [1, LOAD + CODE_OFFSET, 52, 0, 0] {
            word(&mut file, value);
        }
        for value in [52, 32, 1, 0, 0, 0] {
            half(&mut file, value);
        }
        for value in [1, 0, LOAD, LOAD, size, size, 7, 0x1000] {
            word(&mut file, value);
        }
        for value in [MAGIC, 0, MAGIC.wrapping_neg()] {
            word(&mut file, value);
        }
        file.extend(code);
        file
    }
}
