//! Crashes at every point, with what was not waited for lost or torn; damaged images.

use std::io;
use std::process::Command;
use std::sync::{Arc, Mutex};

use crate::chain::Layer;
use crate::qcow2::check::check;
use crate::qcow2::create::NewImage;
use crate::qcow2::image::Image;
use crate::storage::Storage;

const SECTOR: usize = 512;

/// A generator of numbers that does the same each time.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

#[derive(Clone, Debug)]
enum Event {
    Write(u64, Vec<u8>),
    Punch(u64, u64),
    Sync,
}

fn apply(data: &mut Vec<u8>, event: &Event) {
    match event {
        Event::Write(offset, bytes) => {
            let end = *offset as usize + bytes.len();
            data.resize(data.len().max(end), 0);
            data[*offset as usize..end].copy_from_slice(bytes);
        }
        // Any content is allowed; this one would be noticed.
        Event::Punch(offset, len) => {
            let end = data.len().min((*offset + *len) as usize);
            data[(*offset as usize).min(end)..end].fill(0xee);
        }
        Event::Sync => {}
    }
}

/// A file in memory that remembers what was done to it.
#[derive(Clone, Debug, Default)]
struct Recorder {
    data: Arc<Mutex<Vec<u8>>>,
    log: Arc<Mutex<Vec<Event>>>,
    /// Fail each write from here on.
    full: Arc<Mutex<bool>>,
}

impl Recorder {
    fn of(data: Vec<u8>) -> Self {
        Self { data: Arc::new(Mutex::new(data)), ..Self::default() }
    }

    fn note(&self, event: Event) {
        apply(&mut self.data.lock().unwrap(), &event);
        self.log.lock().unwrap().push(event);
    }

    fn position(&self) -> usize {
        self.log.lock().unwrap().len()
    }
}

impl Storage for Recorder {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let data = self.data.lock().unwrap();
        let rest = usize::try_from(offset).ok().and_then(|at| data.get(at..)).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        if *self.full.lock().unwrap() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if offset > 1 << 30 {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.note(Event::Write(offset, bytes.to_vec()));
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.note(Event::Sync);
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.note(Event::Punch(offset, len));
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.data.lock().unwrap().len() as u64)
    }
}

fn backing(sectors: u64) -> Option<Box<Layer>> {
    let data = (0..sectors).flat_map(|sector| sector_of(sector | 1 << 40)).collect::<Vec<_>>();
    let size = data.len() as u64;
    Some(Box::new(Layer::Raw { storage: Box::new(Recorder::of(data)), size }))
}

fn sector_of(value: u64) -> Vec<u8> {
    value.to_le_bytes().repeat(SECTOR / 8)
}

/// What a disk should hold, and could have held at each point of the log.
struct Model {
    values: Vec<u64>,
    /// After each flush: the log's length and the values.
    flushed: Vec<(usize, Vec<u64>)>,
    /// Each change: the log's length before it, the sector, its value.
    changes: Vec<(usize, usize, u64)>,
}

impl Model {
    fn set(&mut self, at: usize, sector: usize, value: u64) {
        self.values[sector] = value;
        self.changes.push((at, sector, value));
    }

    /// Compares an image after a crash at a point of the log.
    fn compare(&self, image: &Image, position: usize, shown: &str) {
        let (since, values) = self.flushed.iter().rfind(|(at, _)| *at <= position).unwrap();
        let mut disk = vec![0; values.len() * SECTOR];
        image.read(0, &mut disk).unwrap();
        for (sector, bytes) in disk.chunks(SECTOR).enumerate() {
            if bytes == sector_of(values[sector]) {
                continue;
            }
            let mut later = self
                .changes
                .iter()
                .filter(|(at, changed, _)| *changed == sector && *at >= *since && *at <= position);
            assert!(
                later.any(|(_, _, value)| bytes == sector_of(*value)),
                "{shown}: sector {sector} begins with {:x?} instead of {:x}",
                &bytes[..8],
                values[sector],
            );
        }
    }
}

struct Case {
    cluster_bits: u32,
    refcount_order: u32,
    sectors: u64,
    below: Option<u64>,
    version: u32,
    operations: usize,
}

impl Case {
    fn backing(&self) -> Option<Box<Layer>> {
        self.below.and_then(backing)
    }

    fn create(&self) -> Vec<u8> {
        let file = Recorder::default();
        let new = NewImage {
            size: self.sectors * SECTOR as u64,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            backing: None,
        };
        new.write(Box::new(file.clone())).unwrap();
        let mut data = file.data.lock().unwrap().clone();
        if self.version == 2 {
            data[7] = 2;
        }
        data
    }

    /// Does random things to an image; returns what was written to its file.
    fn run(&self, seed: u64) -> (Vec<u8>, Vec<Event>, Model) {
        let start = self.create();
        let file = Recorder::of(start.clone());
        let image = Image::open(Box::new(file.clone()), true, self.backing()).unwrap();
        let below = self.below.unwrap_or_default();
        let values = (0..self.sectors).map(|s| if s < below { s | 1 << 40 } else { 0 });
        let values: Vec<u64> = values.collect();
        let mut model =
            Model { values: values.clone(), flushed: vec![(0, values)], changes: vec![] };
        let mut random = Random(seed | 1);
        let in_cluster = (1 << self.cluster_bits) / SECTOR as u64;
        for number in 1..=self.operations as u64 {
            let at = file.position();
            let first = random.below(self.sectors);
            let count = 1 + random.below((4 * in_cluster).min(self.sectors - first));
            let offset = first * SECTOR as u64;
            match random.below(10) {
                0..=4 => {
                    let data = (first..first + count).flat_map(|s| sector_of(number << 20 | s));
                    image.write(offset, &data.collect::<Vec<_>>()).unwrap();
                    for sector in first..first + count {
                        model.set(at, sector as usize, number << 20 | sector);
                    }
                }
                5 | 6 => {
                    image.discard(offset, count * SECTOR as u64).unwrap();
                    let mut end = first + count;
                    if end < self.sectors {
                        end = end / in_cluster * in_cluster;
                    }
                    for sector in first.next_multiple_of(in_cluster)..end {
                        model.set(at, sector as usize, 0);
                    }
                }
                7 | 8 => {
                    let unmap = random.below(2) == 0;
                    image.write_zeroes(offset, count * SECTOR as u64, unmap).unwrap();
                    for sector in first..first + count {
                        model.set(at, sector as usize, 0);
                    }
                }
                _ => {
                    image.flush().unwrap();
                    model.flushed.push((file.position(), model.values.clone()));
                }
            }
            if number % 16 == 0 {
                let mut disk = vec![0; self.sectors as usize * SECTOR];
                image.read(0, &mut disk).unwrap();
                let expected: Vec<u8> = model.values.iter().copied().flat_map(sector_of).collect();
                assert!(disk == expected, "seed {seed}: wrong after operation {number}");
            }
        }
        drop(image);
        model.flushed.push((file.position(), model.values.clone()));
        let log = file.log.lock().unwrap().clone();
        (start, log, model)
    }

    fn verify(&self, data: Vec<u8>, model: &Model, position: usize, shown: &str) {
        let report = check(&Recorder::of(data.clone())).unwrap();
        assert!(report.is_sound(), "{shown}: {:?}", report.findings);
        let image = Image::open(Box::new(Recorder::of(data)), true, self.backing());
        let image = image.unwrap_or_else(|error| panic!("{shown}: {error:?}"));
        model.compare(&image, position, shown);
    }
}

const CASES: [Case; 5] = [
    Case {
        cluster_bits: 9,
        refcount_order: 6,
        sectors: 8000,
        below: None,
        version: 3,
        operations: 400,
    },
    Case {
        cluster_bits: 9,
        refcount_order: 4,
        sectors: 3001,
        below: Some(1000),
        version: 3,
        operations: 300,
    },
    Case {
        cluster_bits: 12,
        refcount_order: 0,
        sectors: 4096,
        below: None,
        version: 3,
        operations: 300,
    },
    Case {
        cluster_bits: 16,
        refcount_order: 4,
        sectors: 8192,
        below: Some(4000),
        version: 3,
        operations: 150,
    },
    Case {
        cluster_bits: 12,
        refcount_order: 4,
        sectors: 2000,
        below: Some(500),
        version: 2,
        operations: 150,
    },
];

/// What is left when everything up to a point of the log is there, and of what was not waited for
/// only some: whole, in part, or not at all.
fn after_loss(start: &[u8], log: &[Event], random: &mut Random) -> Vec<u8> {
    let waited = log.iter().rposition(|event| matches!(event, Event::Sync)).unwrap_or(0);
    let mut data = start.to_vec();
    log[..waited].iter().for_each(|event| apply(&mut data, event));
    let mut rest: Vec<Event> = log[waited..].to_vec();
    // Some of the last writes may come before the first.
    for i in (1..rest.len()).rev() {
        if random.below(3) == 0 {
            rest.swap(i, random.below(i as u64 + 1) as usize);
        }
    }
    for event in &mut rest {
        match (random.below(4), event) {
            (0, _) => {}
            (1, Event::Write(offset, bytes)) => {
                let kept = random.below(bytes.len() as u64 / SECTOR as u64 + 1) as usize * SECTOR;
                let kept = Event::Write(*offset, bytes[..kept].to_vec());
                apply(&mut data, &kept);
            }
            (_, event) => apply(&mut data, event),
        }
    }
    data
}

fn qemu_check(data: &[u8], shown: &str) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("crashed.qcow2");
    std::fs::write(&path, data).unwrap();
    let run = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output();
    let Ok(output) = run else { return false };
    // 3 is for leaks alone.
    assert!(
        matches!(output.status.code(), Some(0 | 3)),
        "{shown}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    true
}

/// A write may overtake another that no wait separates it from.
#[test]
fn crashes_leave_consistent_images_with_what_was_flushed() {
    let mut by_qemu = 0;
    for (number, case) in CASES.iter().enumerate() {
        for seed in 1..=3 {
            let (start, log, model) = case.run(seed * 7919);
            let mut data = start.clone();
            let mut random = Random(seed);
            for position in 0..=log.len() {
                let shown =
                    format!("case {number}, seed {seed}, write {position} of {}", log.len());
                let last = position == log.len();
                if position % 7 == 0 || last {
                    case.verify(data.clone(), &model, position, &shown);
                }
                if position % 5 == 0 {
                    let lost = after_loss(&start, &log[..position], &mut random);
                    case.verify(lost.clone(), &model, position, &format!("{shown}, with losses"));
                    if position % 125 == 0 && qemu_check(&lost, &shown) {
                        by_qemu += 1;
                    }
                }
                if (position % 151 == 0 || last) && qemu_check(&data, &shown) {
                    by_qemu += 1;
                }
                if let Some(event) = log.get(position) {
                    apply(&mut data, event);
                }
            }
        }
    }
    match by_qemu {
        0 => println!("skipped: no qemu-img to check crashed images with"),
        count => println!("qemu-img found {count} crashed images consistent"),
    }
}

#[test]
fn growing_survives_crashes_too() {
    let case = &CASES[0];
    let start = case.create();
    let file = Recorder::of(start.clone());
    let mut image = Image::open(Box::new(file.clone()), true, None).unwrap();
    image.write(0, &sector_of(5)).unwrap();
    image.flush().unwrap();
    let flushed = file.position();
    for factor in [2, 9, 40] {
        image.resize(case.sectors * SECTOR as u64 * factor).unwrap();
        image.write(image.size() - 512, &sector_of(factor)).unwrap();
    }
    drop(image);
    let log = file.log.lock().unwrap().clone();
    let mut random = Random(3);
    for position in flushed..=log.len() {
        let data = after_loss(&start, &log[..position], &mut random);
        let report = check(&Recorder::of(data.clone())).unwrap();
        assert!(report.is_sound(), "write {position}: {:?}", report.findings);
        let image = Image::open(Box::new(Recorder::of(data)), true, None).unwrap();
        let mut sector = vec![0; SECTOR];
        image.read(0, &mut sector).unwrap();
        assert_eq!(sector, sector_of(5), "write {position}");
    }
}

#[test]
fn a_full_host_loses_nothing_that_was_there() {
    let case = &CASES[1];
    let file = Recorder::of(case.create());
    let image = Image::open(Box::new(file.clone()), true, case.backing()).unwrap();
    image.write(0, &sector_of(1)).unwrap();
    image.flush().unwrap();
    *file.full.lock().unwrap() = true;
    assert!(image.write(100 * 512, &sector_of(2)).is_err());
    assert!(image.write(0, &sector_of(2)).is_err());
    *file.full.lock().unwrap() = false;
    image.write(200 * 512, &sector_of(3)).unwrap();
    *file.full.lock().unwrap() = true;
    assert!(image.flush().is_err());
    *file.full.lock().unwrap() = false;
    // It is tried again.
    image.flush().unwrap();
    drop(image);
    let data = file.data.lock().unwrap().clone();
    assert!(check(&Recorder::of(data.clone())).unwrap().is_sound());
    let image = Image::open(Box::new(Recorder::of(data)), false, case.backing()).unwrap();
    for (at, value) in [(0, 1), (100, 100 | 1 << 40), (200, 3)] {
        let mut sector = vec![0; SECTOR];
        image.read(at * 512, &mut sector).unwrap();
        assert_eq!(sector, sector_of(value));
    }
    assert!(image.write(0, &sector_of(9)).is_err());
    assert!(image.read(image.size() - 512, &mut [0; 1024]).is_err());
}

/// Damages an image in one place after the other, and uses it.
#[test]
fn damaged_images_are_errors_not_panics() {
    let case = &CASES[1];
    let (mut start, log, _) = case.run(77);
    log.iter().for_each(|event| apply(&mut start, event));
    let mut random = Random(5);
    for round in 0..6000 {
        let mut data = start.clone();
        // Mostly the header and the tables behind it.
        for _ in 0..1 + random.below(4) {
            let end = if random.below(3) == 0 { data.len() as u64 } else { 4096 };
            let at = random.below(end / 4) as usize * 4;
            let value = match random.below(4) {
                0 => 0,
                1 => u32::MAX,
                2 => random.next() as u32,
                _ => 1 << random.below(32),
            };
            data[at..at + 4].copy_from_slice(&value.to_be_bytes());
        }
        if round % 10 == 0 {
            data.truncate(random.below(start.len() as u64) as usize);
        }
        use_all(data, case.backing());
    }
}

/// Reads and writes a bit of whatever this is.
fn use_all(data: Vec<u8>, backing: Option<Box<Layer>>) {
    // Whatever it says, it is said in time.
    let _ = check(&Recorder::of(data.clone()));
    let Ok(image) = Image::open(Box::new(Recorder::of(data)), true, backing) else { return };
    let mut buffer = vec![0; 4096];
    for step in 0..8 {
        let Some(end) = image.size().checked_sub(4096) else { return };
        let at = (end / 8 * step) & !511;
        let _ = image.read(at, &mut buffer);
        let _ = image.extent(at, 4096);
        let _ = image.write(at, &buffer);
        let _ = image.discard(at, 4096);
        let _ = image.write_zeroes(at, 4096, step % 2 == 0);
    }
    let _ = image.flush();
}

#[test]
fn threads_do_not_get_into_each_others_way() {
    let case = &CASES[2];
    let file = Recorder::of(case.create());
    let image = Arc::new(Image::open(Box::new(file.clone()), true, None).unwrap());
    let threads: Vec<_> = (0..4u64)
        .map(|number| {
            let image = Arc::clone(&image);
            // Sectors of one cluster belong to different threads.
            std::thread::spawn(move || {
                let mut random = Random(number + 1);
                let mut values = vec![0; 256];
                for round in 1..1500 {
                    let slot = random.below(256);
                    let at = (slot * 4 + number) * 512;
                    let mut found = vec![0; SECTOR];
                    image.read(at, &mut found).unwrap();
                    assert_eq!(found, sector_of(values[slot as usize]));
                    match random.below(20) {
                        0 => image.flush().unwrap(),
                        1..=4 => {
                            image.write_zeroes(at, 512, true).unwrap();
                            values[slot as usize] = 0;
                        }
                        _ => {
                            image.write(at, &sector_of(round << 8 | number)).unwrap();
                            values[slot as usize] = round << 8 | number;
                        }
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    drop(image);
    let data = file.data.lock().unwrap().clone();
    let report = check(&Recorder::of(data)).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
}

/// One of two files, whose changes are in one order.
#[derive(Clone, Debug)]
struct Ordered {
    file: Recorder,
    is_overlay: bool,
    order: Arc<Mutex<Vec<bool>>>,
}

impl Storage for Ordered {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.order.lock().unwrap().push(self.is_overlay);
        self.file.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.order.lock().unwrap().push(self.is_overlay);
        self.file.sync()
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.order.lock().unwrap().push(self.is_overlay);
        self.file.punch(offset, len)
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
}

/// An image is frozen below an overlay while it holds what is not flushed; the power fails at any point
/// after that, with what was not waited for lost in either file, and with the names as before or after
/// unless they were waited for. What was flushed is there.
#[test]
fn a_disk_that_was_frozen_survives_crashes() {
    let case = &CASES[1];
    for seed in 1..=6u64 {
        let order = Arc::new(Mutex::new(Vec::new()));
        let (below, above) = (case.create(), case.create());
        let file = |data: &[u8], is_overlay| Ordered {
            file: Recorder::of(data.to_vec()),
            is_overlay,
            order: Arc::clone(&order),
        };
        let (lower, upper) = (file(&below, false), file(&above, true));
        let old = Image::open(Box::new(lower.clone()), true, case.backing()).unwrap();
        let old = Arc::new(old);
        let mut new: Option<Image> = None;
        let base = case.below.unwrap();
        let values = (0..case.sectors).map(|s| if s < base { s | 1 << 40 } else { 0 });
        let values: Vec<u64> = values.collect();
        let mut model =
            Model { values: values.clone(), flushed: vec![(0, values)], changes: vec![] };
        let (mut frozen_at, mut named_at) = (usize::MAX, usize::MAX);
        let mut random = Random(seed);
        let position = || order.lock().unwrap().len();
        for number in 1..=160u64 {
            if number == 80 {
                let layer = Some(Box::new(Layer::Qcow2(Arc::clone(&old))));
                new = Some(Image::open(Box::new(upper.clone()), true, layer).unwrap());
                frozen_at = position();
            }
            if number == 90 && seed % 2 == 0 {
                // A clone reads it from here on.
                old.write_out().unwrap();
            }
            let image = new.as_ref().unwrap_or(&old);
            let at = position();
            let first = random.below(case.sectors);
            let count = 1 + random.below(4.min(case.sectors - first));
            if random.below(12) > 0 {
                let data = (first..first + count).flat_map(|s| sector_of(number << 20 | s));
                image.write(first * SECTOR as u64, &data.collect::<Vec<_>>()).unwrap();
                for sector in first..first + count {
                    model.set(at, sector as usize, number << 20 | sector);
                }
                continue;
            }
            if new.is_some() && named_at == usize::MAX {
                old.freeze().unwrap();
                // Here the directory is synced.
                named_at = position();
            }
            image.flush().unwrap();
            model.flushed.push((position(), model.values.clone()));
        }
        assert!(named_at < usize::MAX, "seed {seed}: nothing was flushed");
        let order = order.lock().unwrap().clone();
        let logs = [&lower, &upper].map(|ordered| ordered.file.log.lock().unwrap().clone());
        for position in frozen_at..=order.len() {
            let overs = order[..position].iter().filter(|is_overlay| **is_overlay).count();
            let lower = after_loss(&below, &logs[0][..position - overs], &mut random);
            let upper = after_loss(&above, &logs[1][..overs], &mut random);
            let shown = format!("seed {seed}, {position} of {}", order.len());
            for data in [&lower, &upper] {
                let report = check(&Recorder::of(data.clone())).unwrap();
                assert!(report.is_sound(), "{shown}: {:?}", report.findings);
            }
            let is_renamed = position >= named_at || random.below(2) == 0;
            let image =
                Image::open(Box::new(Recorder::of(lower)), !is_renamed, case.backing()).unwrap();
            if is_renamed {
                let layer = Some(Box::new(Layer::Qcow2(Arc::new(image))));
                let image = Image::open(Box::new(Recorder::of(upper)), true, layer).unwrap();
                model.compare(&image, position, &shown);
            } else {
                model.compare(&image, position, &shown);
            }
        }
    }
}
