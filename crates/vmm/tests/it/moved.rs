//! Machines that are stored by one processor and go on by another.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_vmm::console::SerialConfig;
use berth_vmm::machine::{Machine, MachineConfig, Resume, RunningMachine};
use berth_vmm::outcome::Outcome;
use berth_vmm::vcpu::probe::AccelChoice;
use berth_x86::cpuid::baseline::Baseline;

use crate::guests::{GATES, MULTIBOOT};
use crate::run::{Folder, Format, assemble, processors};

/// A guest that takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(20);

/// From which processor to which: all that this host has.
fn ways() -> Vec<(AccelChoice, AccelChoice)> {
    let all = processors();
    all.iter().flat_map(|&from| all.iter().map(move |&to| (from, to))).collect()
}

fn start(config: &mut MachineConfig) -> (RunningMachine, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    config.serial = SerialConfig::Stream(Arc::new(far));
    let machine = Machine::start(config).unwrap();
    config.serial = SerialConfig::Stdio;
    near.set_read_timeout(Some(TIME_LIMIT)).unwrap();
    (machine, near)
}

/// Reads what a guest prints until this is in it, or to its end.
fn read_until(stream: &mut UnixStream, text: &mut String, wanted: Option<char>) {
    let began = Instant::now();
    while wanted.is_none_or(|wanted| !text.contains(wanted)) {
        assert!(began.elapsed() < TIME_LIMIT, "no {wanted:?} in: {text}");
        let mut bytes = [0; 64];
        match stream.read(&mut bytes).unwrap_or_else(|error| panic!("{error} after {text}")) {
            0 => return,
            count => text.push_str(&String::from_utf8_lossy(&bytes[..count])),
        }
    }
}

/// Stores a machine, ends it, and gives the rest of what it printed.
fn store(machine: RunningMachine, mut stream: UnixStream, into: &Path, text: &mut String) {
    machine.pauser().pause();
    std::fs::create_dir(into).unwrap();
    machine.storer().store(into).unwrap();
    drop(machine);
    read_until(&mut stream, text, None);
}

fn config(folder: &Folder, text: &str) -> MachineConfig {
    let mut config = MachineConfig::new(assemble(folder, text, Format::Elf32));
    config.memory_bytes = 32 << 20;
    config.debug_exit = true;
    // What every processor has.
    config.cpu = Some(Baseline::V1);
    config
}

/// Prints a letter with each interrupt of the APIC's timer, looks at its registers, the x87 and SSE ones,
/// its counter and the ticks of the PIT, and ends after the last letter.
fn letters() -> String {
    format!(
        "{}{MULTIBOOT}
        gate 0x20, beat
        gate 0x40, tick
        load_table
        init_pic
        mov al, 0x34; out 0x43, al
        mov al, 0xa9; out 0x40, al
        mov al, 0x24; out 0x40, al
        mov ebx, 0xfee00000
        mov dword ptr [ebx + 0xf0], 0x1ff
        mov dword ptr [ebx + 0x350], 0x700
        mov dword ptr [ebx + 0x3e0], 11
        mov dword ptr [ebx + 0x320], 0x20040
        mov dword ptr [ebx + 0x380], 20000000
        mov eax, cr4
        or eax, 0x200
        mov cr4, eax
        # By these, as KVM without hardware has few others: ST(0) and XMM3.
        fxsave [0x7000]
        mov dword ptr [0x7024], 0xc90fdaa2
        mov dword ptr [0x7028], 0x4000
        mov dword ptr [0x70d4], 0x12345678
        fxrstor [0x7000]
        mov dword ptr [0x6010], 'a'
        mov dword ptr [0x6014], 0
        mov dword ptr [0x6018], 0
        mov dword ptr [0x601c], 0
        mov esi, 0x5a5a5a5a
        mov edi, 0xa5a5a5a5
        xor ebp, ebp
    2:  sti
        hlt
        cmp esi, 0x5a5a5a5a
        jne fail
        cmp edi, 0xa5a5a5a5
        jne fail
        rdtsc
        cmp edx, [0x601c]
        jb fail
        ja 3f
        cmp eax, [0x6018]
        jb fail
    3:  mov [0x6018], eax
        mov [0x601c], edx
        test ebp, ebp
        jz 2b
        xor ebp, ebp
        fxsave [0x7200]
        cmp dword ptr [0x72d4], 0x12345678
        jne fail
        cmp dword ptr [0x7224], 0xc90fdaa2
        jne fail
        mov dword ptr [0x72d4], 0
        mov dword ptr [0x7224], 0
        # The PIT's are twice as many.
        cmp dword ptr [0x6014], 0
        je fail
        mov dword ptr [0x6014], 0
        mov eax, [0x6010]
        call putc
        inc dword ptr [0x6010]
        cmp dword ptr [0x6010], 'z' + 1
        jne 2b
        mov al, 26; out 0xf4, al
        hlt
    beat:
        inc dword ptr [0x6014]
        mov al, 0x20; out 0x20, al
        finish
    tick:
        inc ebp
        mov dword ptr [ebx + 0xb0], 0
        finish",
        GATES.replace("\\mask", "0xfe")
    )
}

const LETTERS: &str = "abcdefghijklmnopqrstuvwxyz";

#[test]
fn a_guest_goes_there_and_back_and_notices_nothing() {
    for (from, to) in ways() {
        let folder = Folder::new();
        let mut config = config(&folder, &letters());
        let mut text = String::new();
        let mut stored: Option<PathBuf> = None;
        for (accel, wanted) in [(from, 'c'), (to, 'h'), (from, 'm'), (to, 'r')] {
            config.accel = accel;
            config.resume = stored.map(Resume::Stored);
            println!("{accel:?} after {text}");
            let (machine, mut stream) = start(&mut config);
            read_until(&mut stream, &mut text, Some(wanted));
            let into = folder.0.join(format!("stored-{wanted}"));
            store(machine, stream, &into, &mut text);
            assert!(LETTERS.starts_with(&text), "{from:?} {to:?}: {text}");
            stored = Some(into);
        }
        config.accel = from;
        config.resume = stored.map(Resume::Stored);
        let (machine, mut stream) = start(&mut config);
        let outcome = machine.wait();
        read_until(&mut stream, &mut text, None);
        assert_eq!((outcome, text.as_str()), (Outcome::DebugExit(26), LETTERS), "{from:?} {to:?}");
    }
}
