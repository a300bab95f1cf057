//! What a guest is told of its machine: the power button, a new generation.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use berth_vmm::console::SerialConfig;
use berth_vmm::machine::{Machine, MachineConfig, Resume, RunningMachine};
use berth_vmm::outcome::Outcome;
use berth_vmm::vcpu::probe::AccelChoice;

use crate::guests::{GATES, MULTIBOOT};
use crate::run::{Folder, Format, assemble, processors};

/// A guest that takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(60);

fn start(config: &mut MachineConfig) -> (RunningMachine, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    config.serial = SerialConfig::Stream(Arc::new(far));
    let machine = Machine::start(config).unwrap();
    near.set_read_timeout(Some(TIME_LIMIT)).unwrap();
    (machine, near)
}

/// Reads what a guest prints until there is this in it.
pub fn expect(stream: &mut UnixStream, wanted: &str) -> String {
    let began = Instant::now();
    let mut text = String::new();
    while !text.contains(wanted) {
        let mut bytes = [0; 4096];
        let count = stream.read(&mut bytes).unwrap_or(0);
        let in_time = count > 0 && began.elapsed() < TIME_LIMIT;
        assert!(in_time, "no `{wanted}` in: {text}");
        text.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    text
}

/// Line 20 through the I/O APIC, level-triggered; each interrupt prints the register as a
/// digit.
pub fn listener() -> String {
    format!(
        "{}{MULTIBOOT}
        gate 0x40, happened
        load_table
        init_pic
        mov ebx, 0xfee00000
        mov dword ptr [ebx + 0xf0], 0x1ff
        mov ecx, 0xfec00000
        mov dword ptr [ecx], 0x39
        mov dword ptr [ecx + 0x10], 0
        mov dword ptr [ecx], 0x38
        mov dword ptr [ecx + 0x10], 0x8040
        mov al, 'r'
        call putc
    2:  sti
        hlt
        cli
        jmp 2b
    happened:
        push eax
        mov dx, 0x604
        in al, dx
        add al, '0'
        call putc
        mov dword ptr [ebx + 0xb0], 0
        pop eax
        finish",
        GATES.replace("\\mask", "0xff")
    )
}

#[test]
fn a_guest_hears_of_its_button_and_its_generation() {
    for accel in processors() {
        let folder = Folder::new();
        let mut config = MachineConfig::new(assemble(&folder, &listener(), Format::Elf32));
        config.accel = accel;
        config.memory_bytes = 32 << 20;
        let (machine, mut stream) = start(&mut config);
        let (button, generation) = (machine.power_button(), machine.generation());
        expect(&mut stream, "r");
        button.press();
        expect(&mut stream, "1");
        assert!(button.is_noticed_within(TIME_LIMIT), "{accel:?}");
        let before = generation.id().unwrap();
        generation.renew().unwrap();
        expect(&mut stream, "2");
        assert_ne!(generation.id().unwrap(), before);
        // Again, as the line has fallen in between.
        button.press();
        expect(&mut stream, "1");
        machine.stop();
        assert_eq!(machine.wait(), Outcome::Stopped);
    }
}

#[test]
fn a_stored_machine_goes_on_as_the_same_or_as_another() {
    let folder = Folder::new();
    let mut config = MachineConfig::new(assemble(&folder, &listener(), Format::Elf32));
    config.accel = AccelChoice::Translate;
    config.memory_bytes = 32 << 20;
    let (machine, mut stream) = start(&mut config);
    expect(&mut stream, "r");
    let id = machine.generation().id().unwrap();
    machine.pauser().pause();
    // What the guest was not told of yet is stored with it.
    machine.power_button().press();
    let stored = folder.0.join("stored");
    std::fs::create_dir(&stored).unwrap();
    machine.storer().store(&stored).unwrap();
    drop((machine, stream));
    config.resume = Some(Resume::Stored(stored));
    for (renew, told) in [(false, "1"), (true, "3")] {
        config.renew_generation = renew;
        let (machine, mut stream) = start(&mut config);
        expect(&mut stream, told);
        assert_eq!(machine.generation().id().unwrap() != id, renew);
    }
}

/// A kernel with a driver for generation ids, which Debian's for clouds has not: the other one of
/// this Debian, taken out of its package once.
fn kernel() -> Result<PathBuf, String> {
    if let Some(path) = std::env::var_os("BERTH_VMGENID_KERNEL") {
        return Ok(path.into());
    }
    let directory = Path::new(env!("CARGO_TARGET_TMPDIR")).join("vmgenid-kernel");
    let kept = directory.join("vmlinuz");
    if kept.exists() {
        return Ok(kept);
    }
    std::fs::create_dir_all(&directory).map_err(|error| error.to_string())?;
    let script = r#"
        set -e
        package=$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[^ ]*\)$/\1/p' | head -1)
        test -n "$package"
        apt-get download "$package"
        dpkg-deb --fsys-tarfile "$package"_*.deb | tar -x --wildcards './boot/vmlinuz-*'
        rm "$package"_*.deb
        mv boot/vmlinuz-* vmlinuz
    "#;
    let ran = Command::new("sh").args(["-c", script]).current_dir(&directory).output();
    match ran {
        Ok(ran) if ran.status.success() => Ok(kept),
        Ok(ran) => Err(String::from_utf8_lossy(&ran.stderr).trim().to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// That kernel; says why there is none.
pub fn kernel_or_skip() -> Option<PathBuf> {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    kernel()
        .inspect_err(|why| {
            let required = std::env::var("BERTH_E2E").is_ok_and(|value| value == "required");
            assert!(!required, "no kernel: {why}");
            println!("skipped: no kernel with a driver for generation ids: {why}");
        })
        .ok()
}

/// Linux, waiting for a root disk that never comes: the driver is all that matters.
#[test]
fn linux_mixes_a_new_generation_into_its_random_numbers() {
    let Some(kernel) = kernel_or_skip() else { return };
    let mut config = MachineConfig::new(kernel);
    config.accel = AccelChoice::Translate;
    config.memory_bytes = 256 << 20;
    config.cmdline = "console=ttyS0 root=/dev/vda rootwait panic=-1".into();
    let (machine, mut stream) = start(&mut config);
    expect(&mut stream, "Waiting for root device");
    let generation = machine.generation();
    let mut ids = vec![generation.id().unwrap()];
    for _ in 0..2 {
        generation.renew().unwrap();
        expect(&mut stream, "crng reseeded due to virtual machine fork");
        ids.push(generation.id().unwrap());
    }
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), 3, "every generation has an id of its own");
    machine.stop();
    assert_eq!(machine.wait(), Outcome::Stopped);
}
