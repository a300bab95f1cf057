//! Assembles guests and runs them.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use berth_vmm::console::SerialConfig;
use berth_vmm::machine::{Machine, MachineConfig};
use berth_vmm::outcome::Outcome;
use berth_vmm::vcpu::probe::{AccelChoice, kvm_runs_small_guests};

/// A guest that takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(15);

/// A folder of its own, gone when dropped.
pub struct Folder(pub PathBuf);

impl Folder {
    pub fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::SeqCst);
        let name = format!("berth-vmm-it-{}-{number}", std::process::id());
        let path = std::env::temp_dir().join(name);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// How a guest's text becomes a file.
#[derive(Clone, Copy)]
pub enum Format {
    /// A 32-bit ELF file at 1 MiB.
    Elf32,
    /// Bytes at address 0 of the text.
    Flat64,
}

fn tool(program: &str, args: &[&str], folder: &Path) {
    let out = Command::new(program).args(args).current_dir(folder).output().unwrap();
    let message = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{program}: {message}");
}

/// Assembles (Intel syntax) and links.
pub fn assemble(folder: &Folder, text: &str, format: Format) -> PathBuf {
    let path = &folder.0;
    std::fs::write(path.join("g.s"), format!(".intel_syntax noprefix\n{text}\n")).unwrap();
    match format {
        Format::Elf32 => {
            tool("as", &["--32", "-o", "g.o", "g.s"], path);
            let link = [
                "-m",
                "elf_i386",
                "-Ttext=0x100000",
                "-z",
                "max-page-size=4096",
                "-N",
                "--section-start=.note.pvh=0x108000",
            ];
            tool("ld", &[&link[..], &["-e", "start", "-o", "g", "g.o"]].concat(), path);
        }
        Format::Flat64 => {
            tool("as", &["--64", "-o", "g.o", "g.s"], path);
            tool("objcopy", &["-O", "binary", "-j", ".text", "g.o", "g"], path);
        }
    }
    path.join("g")
}

/// The processors to test with; says which are left out and why.
pub fn processors() -> Vec<AccelChoice> {
    let mut list = vec![AccelChoice::Translate];
    match kvm_runs_small_guests() {
        Ok(()) => list.push(AccelChoice::Kvm),
        Err(why) => println!("skipped under KVM: {why}"),
    }
    list
}

/// Runs a machine to its end; gives what it sent over the serial port.
fn run(mut config: MachineConfig, folder: &Folder) -> (Outcome, String) {
    let log = folder.0.join("serial");
    let _ = std::fs::remove_file(&log);
    config.serial = SerialConfig::File(log.clone());
    let machine = Machine::start(&config).unwrap();
    let ending = machine.ending();
    let (done, ended) = mpsc::channel::<()>();
    let watchdog = std::thread::spawn(move || {
        if ended.recv_timeout(TIME_LIMIT) == Err(mpsc::RecvTimeoutError::Timeout) {
            ending.end(Outcome::Failed("the guest hangs".into()));
        }
    });
    let outcome = machine.wait();
    drop(done);
    watchdog.join().unwrap();
    (outcome, String::from_utf8_lossy(&std::fs::read(&log).unwrap()).into_owned())
}

/// Runs a guest under every processor.
pub fn check(
    text: &str,
    format: Format,
    prepare: impl Fn(&mut MachineConfig),
    wanted: (Outcome, &str),
) {
    for accel in processors() {
        let folder = Folder::new();
        let kernel = assemble(&folder, text, format);
        let mut config = MachineConfig::new(kernel);
        config.accel = accel;
        config.memory_bytes = 32 << 20;
        config.debug_exit = true;
        prepare(&mut config);
        let (outcome, serial) = run(config, &folder);
        assert_eq!((outcome, serial.as_str()), (wanted.0.clone(), wanted.1), "{accel:?}");
    }
}
