//! Machines that are stored by one processor and go on by another.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_translator::Written;
use berth_vmm::console::SerialConfig;
use berth_vmm::machine::{Baseline, Handed, Machine, MachineConfig, Resume, RunningMachine};
use berth_vmm::outcome::Outcome;
use berth_vmm::vcpu::probe::AccelChoice;
use serde_json::Value;

use crate::events::{expect, kernel_or_skip, listener};
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
    let machine = Machine::start(config).unwrap_or_else(|error| panic!("{}", chain(&error)));
    config.serial = SerialConfig::Stdio;
    near.set_read_timeout(Some(TIME_LIMIT)).unwrap();
    (machine, near)
}

fn chain(error: &dyn std::error::Error) -> String {
    let cause = error.source().map(|cause| format!(": {}", chain(cause)));
    format!("{error}{}", cause.unwrap_or_default())
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
        # Both timers have to tick for a letter.
        test ebp, ebp
        jz 2b
        cmp dword ptr [0x6014], 0
        je 2b
        xor ebp, ebp
        fxsave [0x7200]
        cmp dword ptr [0x72d4], 0x12345678
        jne fail
        cmp dword ptr [0x7224], 0xc90fdaa2
        jne fail
        mov dword ptr [0x72d4], 0
        mov dword ptr [0x7224], 0
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
    check_letters(&letters(), 1);
}

/// The second processor is in real mode and halted, with interrupts on; the first one asks it for a letter
/// with each interrupt of its own timer, by its deadline, and waits for it.
fn two() -> String {
    format!(
        "{}{MULTIBOOT}
        gate 0x40, tick
        load_table
        mov esi, offset real
        mov edi, 0x9000
        mov ecx, offset real_end - real
        rep movsb
        mov dword ptr [0x6000], 0
        mov dword ptr [0x6004], 0
        mov ebx, 0xfee00000
        mov dword ptr [ebx + 0xf0], 0x1ff
        mov dword ptr [ebx + 0x310], 0x1000000
        mov dword ptr [ebx + 0x300], 0x4500
        mov dword ptr [ebx + 0x300], 0x4609
    2:  pause
        cmp dword ptr [0x6000], 1
        jb 2b
        mov dword ptr [ebx + 0x320], 0x40040
    3:  xor ebp, ebp
        rdtsc
        add eax, 20000000
        adc edx, 0
        mov ecx, 0x6e0
        wrmsr
    4:  sti
        hlt
        test ebp, ebp
        jz 4b
        mov esi, [0x6004]
        mov dword ptr [ebx + 0x310], 0x1000000
        mov dword ptr [ebx + 0x300], 0x4050
    5:  pause
        cmp esi, [0x6004]
        je 5b
        mov eax, [0x6004]
        add eax, 'a' - 1
        call putc
        cmp dword ptr [0x6004], 26
        jne 3b
        mov al, 26; out 0xf4, al
        hlt
    tick:
        inc ebp
        mov dword ptr [ebx + 0xb0], 0
        finish
        .code16
    real:
        xor ax, ax
        mov ds, ax
        mov ss, ax
        mov sp, 0x5000
        mov word ptr [0x50 * 4], offset asked - real + 0x9000
        mov word ptr [0x50 * 4 + 2], 0
        # Unreal mode is not needed: its APIC is asked by x2APIC, after the first has started it.
        mov ecx, 0x1b
        rdmsr
        or eax, 0x400
        wrmsr
        mov ecx, 0x80f
        xor edx, edx
        mov eax, 0x1ff
        wrmsr
        lock inc dword ptr [0x6000]
    6:  sti
        hlt
        jmp 6b
    asked:
        inc dword ptr [0x6004]
        mov ecx, 0x80b
        xor eax, eax
        xor edx, edx
        wrmsr
        iret
    real_end:
        .code32",
        GATES.replace("\\mask", "0xff")
    )
}

/// Lets a guest that prints letters go on by one processor and the other.
fn check_letters(guest: &str, cpus: u32) {
    for (from, to) in ways() {
        let folder = Folder::new();
        let mut config = config(&folder, guest);
        config.cpus = cpus;
        let mut text = String::new();
        let mut stored: Option<PathBuf> = None;
        for (accel, wanted) in [(from, 'c'), (to, 'h'), (from, 'm'), (to, 'r')] {
            config.accel = accel;
            config.resume = stored.map(Resume::Stored);
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

#[test]
fn several_processors_go_there_and_back() {
    check_letters(&two(), 2);
}

/// A level-triggered line of the I/O APIC, asserted while the guest stands still.
#[test]
fn an_interrupt_that_waits_is_stored_with_the_machine() {
    for (from, to) in ways() {
        let folder = Folder::new();
        let mut config = config(&folder, &listener());
        config.accel = from;
        let (machine, mut stream) = start(&mut config);
        read_until(&mut stream, &mut String::new(), Some('r'));
        machine.pauser().pause();
        machine.power_button().press();
        let stored = folder.0.join("stored");
        std::fs::create_dir(&stored).unwrap();
        machine.storer().store(&stored).unwrap();
        // It can go on, too.
        machine.pauser().unpause();
        read_until(&mut stream, &mut String::new(), Some('1'));
        drop((machine, stream));
        config.accel = to;
        config.resume = Some(Resume::Stored(stored));
        for (renew, told) in [(false, '1'), (true, '3')] {
            config.renew_generation = renew;
            let (machine, mut stream) = start(&mut config);
            read_until(&mut stream, &mut String::new(), Some(told));
            // The line has fallen.
            machine.generation().renew().unwrap();
            read_until(&mut stream, &mut String::new(), Some('2'));
        }
    }
}

/// A machine that goes on while what it was is written, or handed to another one.
#[test]
fn a_frozen_machine_is_another_one() {
    for (from, to) in ways() {
        let folder = Folder::new();
        let mut config = config(&folder, &letters());
        config.accel = from;
        let (machine, mut stream) = start(&mut config);
        let mut text = String::new();
        read_until(&mut stream, &mut text, Some('c'));
        machine.pauser().pause();
        let storer = machine.storer();
        let frozen = storer.freeze(&mut storer.park(), true).unwrap();
        machine.pauser().unpause();
        read_until(&mut stream, &mut text, Some('e'));
        let (ours, theirs) = UnixStream::pair().unwrap();
        let received = std::thread::spawn(move || Handed::receive(&theirs).unwrap());
        frozen.hand(&ours, &Written::default()).unwrap();
        config.accel = to;
        config.resume = Some(Resume::Handed(Arc::new(received.join().unwrap())));
        let (copy, mut copied) = start(&mut config);
        for (machine, stream) in [(machine, &mut stream), (copy, &mut copied)] {
            assert_eq!(machine.wait(), Outcome::DebugExit(26), "{from:?} {to:?}");
            read_until(stream, &mut text, None);
        }
        drop(frozen);
        // From what was printed by when it was frozen on.
        let (first, second) = text.split_at(26);
        assert!(first == LETTERS && LETTERS.ends_with(second) && second.len() > 20, "{text}");
    }
}

/// Alters what is stored in a directory.
fn alter(stored: &Path, change: impl Fn(&mut Value)) {
    let path = stored.join("machine.json");
    let mut value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
}

/// The rows of CPUID of the first vCPU that are of this leaf.
fn rows(value: &mut Value, leaf: u32) -> Vec<&mut Value> {
    let rows = value["cpus"][0]["cpuid"].as_array_mut().unwrap();
    rows.iter_mut().filter(|row| row["leaf"] == leaf).collect()
}

fn put(value: &mut Value, leaf: u32, register: usize, change: impl Fn(u64) -> u64) {
    for row in rows(value, leaf) {
        let old = row["regs"][register].as_u64().unwrap();
        row["regs"][register] = change(old).into();
    }
}

#[test]
fn what_the_host_lacks_is_named_before_anything_starts() {
    for accel in processors() {
        let folder = Folder::new();
        let mut config = config(&folder, &letters());
        config.accel = accel;
        let (machine, stream) = start(&mut config);
        let stored = folder.0.join("stored");
        store(machine, stream, &stored, &mut String::new());
        let sound = std::fs::read(stored.join("machine.json")).unwrap();
        config.resume = Some(Resume::Stored(stored.clone()));
        config.serial = SerialConfig::Null;
        let altered = |change: &dyn Fn(&mut Value)| {
            std::fs::write(stored.join("machine.json"), &sound).unwrap();
            alter(&stored, change);
            Machine::start(&config).map(drop).map_err(|error| chain(&error))
        };
        // Another model, by another name, with less; at home in another boot.
        let other = altered(&|value| {
            put(value, 1, 0, |eax| eax ^ 0x10);
            put(value, 1, 3, |edx| edx & !(1 << 12));
            put(value, 0x8000_0002, 0, |_| 0x2065_6854);
            value["saved"]["boot_id"] = "another".into();
        });
        assert_eq!(other, Ok(()), "{accel:?}");
        let lacks = |what: &str, found: Result<(), String>| {
            let why = found.unwrap_err();
            assert!(why.contains(what), "{accel:?}: {why}");
        };
        lacks("lacks avx512f", altered(&|value| put(value, 7, 1, |ebx| ebx | 1 << 16)));
        lacks("lacks a processor of", altered(&|value| put(value, 0, 1, |ebx| ebx ^ 0x1d1a_1006)));
        lacks(
            "lacks physical addresses of 60 bits",
            altered(&|value| put(value, 0x8000_0008, 0, |_| 48 << 8 | 60)),
        );
        lacks("rows of CPUID", altered(&|value| put(value, 0x4000_0010, 0, |khz| khz + 1)));
        let faster = altered(&|value| {
            put(value, 0x4000_0010, 0, |khz| khz * 3 / 2);
            let khz = value["tsc_khz"].as_u64().unwrap() * 3 / 2;
            value["tsc_khz"] = khz.into();
            value["saved"]["boot_id"] = "another".into();
        });
        // Hardware can scale it.
        if accel == AccelChoice::Translate || faster.is_err() {
            lacks("time-stamp counter", faster);
        }
    }
}

/// Not every KVM has all that the host has.
#[test]
fn a_machine_with_the_hosts_processor_goes_on_where_that_is() {
    for (from, to) in ways() {
        let folder = Folder::new();
        let mut config = config(&folder, &letters());
        (config.cpu, config.accel) = (None, from);
        let (machine, mut stream) = start(&mut config);
        let mut text = String::new();
        read_until(&mut stream, &mut text, Some('c'));
        let stored = folder.0.join("stored");
        store(machine, stream, &stored, &mut text);
        config.accel = to;
        config.resume = Some(Resume::Stored(stored));
        config.serial = SerialConfig::Null;
        match Machine::start(&config).map(RunningMachine::wait) {
            Ok(outcome) => assert_eq!(outcome, Outcome::DebugExit(26), "{from:?} {to:?}"),
            Err(error) => {
                let why = chain(&error);
                assert!(why.contains("the processor of this host lacks "), "{why}");
                assert!(from != to && to == AccelChoice::Kvm, "{from:?} {to:?}: {why}");
            }
        }
    }
}

#[test]
fn levels_that_a_processor_lacks_are_refused() {
    for accel in processors() {
        for level in Baseline::ALL {
            let folder = Folder::new();
            let mut config = config(&folder, &letters());
            (config.accel, config.cpu) = (accel, Some(level));
            config.serial = SerialConfig::Null;
            match Machine::start(&config).map(RunningMachine::wait) {
                Ok(outcome) => assert_eq!(outcome, Outcome::DebugExit(26), "{accel:?} {level:?}"),
                Err(error) => {
                    let why = chain(&error);
                    assert!(why.contains(level.name()) && why.contains(" lacks "), "{why}");
                    assert!(level > Baseline::V1, "{why}");
                }
            }
        }
    }
}

/// KVM without hardware cannot run it, but holds all that it consists of.
#[test]
fn linux_goes_through_kvm() {
    let Some(kernel) = kernel_or_skip() else { return };
    if !processors().contains(&AccelChoice::Kvm) {
        return;
    }
    let folder = Folder::new();
    let mut config = MachineConfig::new(kernel);
    (config.cpus, config.memory_bytes) = (2, 256 << 20);
    config.accel = AccelChoice::Translate;
    config.cpu = Some(Baseline::V1);
    config.cmdline = "console=ttyS0 root=/dev/vda rootdelay=3 panic=-1".into();
    let (machine, mut stream) = start(&mut config);
    expect(&mut stream, "Waiting 3 sec before mounting root device");
    let mut stored = folder.0.join("translated");
    store(machine, stream, &stored, &mut String::new());
    for round in 0..2 {
        config.accel = AccelChoice::Kvm;
        config.paused = true;
        config.resume = Some(Resume::Stored(stored));
        let (machine, stream) = start(&mut config);
        stored = folder.0.join(format!("kvm-{round}"));
        store(machine, stream, &stored, &mut String::new());
    }
    config.accel = AccelChoice::Translate;
    config.paused = false;
    config.resume = Some(Resume::Stored(stored));
    let (machine, mut stream) = start(&mut config);
    // Its delay ends, there is no such device, and it restarts.
    expect(&mut stream, "VFS: Unable to mount root fs");
    assert_eq!(machine.wait(), Outcome::Reset);
}
