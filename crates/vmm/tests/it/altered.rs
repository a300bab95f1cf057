//! Stored machines that somebody altered: they are refused, or they run as machines whose guest is mad.

use std::fs;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use berth_vmm::console::SerialConfig;
use berth_vmm::devices::{Devices, DiskFile, HostEnds};
use berth_vmm::machine::{Baseline, Machine, MachineConfig, Resume};
use berth_vmm::outcome::Outcome;
use berth_vmm::vcpu::probe::AccelChoice;
use serde_json::Value;

use crate::events::{expect, listener};
use crate::run::{Folder, Format, assemble, processors};

/// One that takes longer hangs.
const TIME_LIMIT: Duration = Duration::from_secs(30);
/// How long one runs.
const RUN_TIME: Duration = Duration::from_millis(3);
/// Altered machines; more with BERTH_ROUNDS.
const ROUNDS: usize = 400;

/// xorshift64*, from a fixed seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: usize) -> usize {
        (self.next() >> 33) as usize % n.max(1)
    }
}

/// Where the leaves of a document are, as JSON pointers (RFC 6901).
fn leaves(at: &str, value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Array(list) => {
            found.push(at.to_owned());
            for (index, value) in list.iter().enumerate() {
                leaves(&format!("{at}/{index}"), value, found);
            }
        }
        Value::Object(map) => {
            for (key, value) in map {
                leaves(
                    &format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")),
                    value,
                    found,
                );
            }
        }
        _ => found.push(at.to_owned()),
    }
}

fn alter(value: &mut Value, random: &mut Random) {
    const EDGES: [u64; 14] = [
        0,
        1,
        2,
        7,
        255,
        256,
        0xffff,
        1 << 16,
        1 << 31,
        u32::MAX as u64,
        1 << 32,
        1 << 52,
        1 << 63,
        u64::MAX,
    ];
    match value {
        Value::Null => *value = 0.into(),
        Value::Bool(on) => *on = !*on,
        Value::Number(number) => {
            let old = number.as_u64().unwrap_or(0);
            *value = match random.below(4) {
                0 => EDGES[random.below(EDGES.len())].into(),
                1 => (old ^ 1 << random.below(64)).into(),
                2 => old.wrapping_add(random.next() % 5).wrapping_sub(2).into(),
                _ => (random.next() >> random.below(64)).into(),
            };
        }
        Value::String(text) => {
            let at = random.below(text.len());
            let mut bytes = text.clone().into_bytes();
            if let Some(byte) = bytes.get_mut(at).filter(|byte| byte.is_ascii()) {
                *byte = b"0123456789abcdefAZ+/="[random.below(21)];
            }
            *text = String::from_utf8_lossy(&bytes).into_owned();
        }
        Value::Array(list) => match random.below(3) {
            0 => drop(list.pop()),
            1 => list.extend(list.first().cloned()),
            _ => list.reverse(),
        },
        Value::Object(_) => {}
    }
}

#[test]
fn altered_machines_harm_themselves_only() {
    check_altered(AccelChoice::Translate);
}

#[test]
fn altered_machines_harm_themselves_only_under_kvm() {
    match processors().contains(&AccelChoice::Kvm) {
        true => check_altered(AccelChoice::Kvm),
        false => println!("skipped: no KVM"),
    }
}

fn check_altered(accel: AccelChoice) {
    let panics = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&panics);
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        counted.fetch_add(1, Ordering::SeqCst);
        before(info);
    }));
    let folder = Folder::new();
    let disk = folder.0.join("disk");
    fs::write(&disk, vec![0; 1 << 20]).unwrap();
    let mut config = MachineConfig::new(assemble(&folder, &listener(), Format::Elf32));
    config.memory_bytes = 32 << 20;
    // Both processors have it, so that what is refused is what was altered.
    config.cpu = Some(Baseline::V1);
    config.accel = accel;
    let start = |config: &mut MachineConfig| {
        let (near, far) = UnixStream::pair().unwrap();
        config.serial = SerialConfig::Stream(Arc::new(far));
        let format = berth_disk::format::Format::Raw;
        let devices = Devices {
            disks: vec![DiskFile { path: disk.clone(), format, read_only: false }],
            vsock_cid: Some(3),
            console: Some(SerialConfig::Stream(Arc::new(UnixStream::pair().unwrap().0))),
            balloon: true,
            ..Devices::default()
        };
        Machine::start_with(config, Some(devices.into_attach(&HostEnds::default())))
            .map(|machine| (machine, near))
    };
    let (machine, mut stream) = start(&mut config).unwrap();
    expect(&mut stream, "r");
    machine.pauser().pause();
    let stored = folder.0.join("stored");
    fs::create_dir(&stored).unwrap();
    machine.storer().store(&stored).unwrap();
    drop((machine, stream));
    let sound: Value =
        serde_json::from_slice(&fs::read(stored.join("machine.json")).unwrap()).unwrap();
    let mut all = Vec::new();
    leaves("", &sound, &mut all);
    // Half of them in what is small: most of it are tables of bytes.
    let few: Vec<String> = all
        .iter()
        .filter(|at| !at.contains("cpuid") && at.matches('/').count() < 6)
        .cloned()
        .collect();
    config.resume = Some(Resume::Stored(stored.clone()));
    let mut random = Random(0x2026_1122);
    let (mut refused, mut ran) = (0, 0);
    let rounds = std::env::var("BERTH_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().unwrap());
    for round in 0..rounds {
        let mut altered = sound.clone();
        let mut places = Vec::new();
        for _ in 0..=random.below(3) {
            let list = if random.below(2) == 0 { &few } else { &all };
            let at = &list[random.below(list.len())];
            if let Some(value) = altered.pointer_mut(at) {
                alter(value, &mut random);
                places.push(format!("{at} = {value:.60}"));
            }
        }
        fs::write(stored.join("machine.json"), altered.to_string()).unwrap();
        let machine = match start(&mut config) {
            Ok((machine, _stream)) => machine,
            Err(error) => {
                assert!(!error.to_string().is_empty());
                refused += 1;
                continue;
            }
        };
        ran += 1;
        std::thread::sleep(RUN_TIME);
        machine.stop();
        let (done, ended) = mpsc::channel();
        std::thread::spawn(move || done.send(machine.wait()));
        let outcome = ended.recv_timeout(TIME_LIMIT);
        let outcome = outcome.unwrap_or_else(|_| panic!("round {round} does not end: {places:?}"));
        let failed = matches!(&outcome, Outcome::Failed(why) if why.contains("panicked"));
        let panics = panics.load(Ordering::SeqCst);
        assert!(!failed && panics == 0, "round {round}: {outcome:?} {panics} {places:?}");
    }
    println!("{accel:?}: {refused} were refused, {ran} ran");
    assert!(refused > rounds / 20 && ran > rounds / 20, "{refused} were refused, {ran} ran");
}
