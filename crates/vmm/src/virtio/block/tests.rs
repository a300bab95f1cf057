//! The disk as a guest uses it.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use berth_disk::error::DiskError as OpenError;
use berth_disk::format::Format;
use berth_disk::tools::{Backing, convert};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

use crate::virtio::block::device::{Block, F_DISCARD, F_FLUSH, F_RO, F_WRITE_ZEROES};
use crate::virtio::block::disk::{Contents, Disk, DiskConfig, DiskError};
use crate::virtio::block::stall::Stall;
use crate::virtio::testing::{Guest, Part};

const SECTORS: usize = 4096;

struct TestDisk {
    path: PathBuf,
}

impl TestDisk {
    /// A file in which every sector holds its number.
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("berth-{}-{name}.img", std::process::id()));
        let mut file = File::create(&path).unwrap();
        for sector in 0..SECTORS as u32 {
            file.write_all(&sector_data(sector)).unwrap();
        }
        Self { path }
    }

    fn config(&self) -> DiskConfig {
        DiskConfig {
            path: self.path.clone(),
            serial: "disk-of-the-test-with-a-long-name".to_owned(),
            ..DiskConfig::default()
        }
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut file = File::open(&self.path).unwrap();
        file.seek(SeekFrom::Start(offset)).unwrap();
        let mut data = vec![0; len];
        file.read_exact(&mut data).unwrap();
        data
    }
}

impl Drop for TestDisk {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

fn sector_data(sector: u32) -> Vec<u8> {
    sector.to_le_bytes().repeat(128)
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    let mut raw = kind.to_le_bytes().to_vec();
    raw.extend([0; 4]);
    raw.extend(sector.to_le_bytes());
    raw
}

fn segment(sector: u64, count: u32, flags: u32) -> Vec<u8> {
    let mut raw = sector.to_le_bytes().to_vec();
    raw.extend(count.to_le_bytes());
    raw.extend(flags.to_le_bytes());
    raw
}

/// A request whose data goes to the disk; returns the status.
fn send(guest: &mut Guest, kind: u32, sector: u64, data: &[u8]) -> u8 {
    let header = header(kind, sector);
    let parts = [Part::Out(&header), Part::Out(data), Part::In(1)];
    let parts = if data.is_empty() { &[Part::Out(&header), Part::In(1)][..] } else { &parts[..] };
    guest.request(0, parts, false).1[0]
}

/// A read; returns data and status.
fn fetch(guest: &mut Guest, sector: u64, len: u32, indirect: bool) -> (u32, Vec<u8>, u8) {
    let header = header(0, sector);
    let parts = [Part::Out(&header), Part::In(len), Part::In(1)];
    let (used, mut data) = guest.request(0, &parts, indirect);
    let status = data.pop().unwrap();
    (used, data, status)
}

/// Runs a test with io_uring (where it works) and with threads.
fn with_both(name: &str, test: impl Fn(&TestDisk, &mut Guest)) {
    for no_io_uring in [false, true] {
        let disk = TestDisk::new(&format!("{name}-{no_io_uring}"));
        let config = DiskConfig { no_io_uring, ..disk.config() };
        let mut guest = Guest::new(Block::new(&config).unwrap());
        guest.start(F_FLUSH | F_DISCARD | F_WRITE_ZEROES, 0);
        test(&disk, &mut guest);
    }
}

#[test]
fn shows_its_configuration() {
    with_both("config", |_, guest| {
        assert_eq!(guest.device_config(0, 8), SECTORS as u64);
        assert_eq!(guest.device_config(20, 4), 512);
        assert_eq!(guest.device_features() & F_RO, 0);
        let header = header(8, 0);
        let (_, data) = guest.request(0, &[Part::Out(&header), Part::In(20), Part::In(1)], false);
        assert_eq!(&data[..20], b"disk-of-the-test-wit");
        assert_eq!(data[20], 0);
    });
}

#[test]
fn reads_and_marks_what_it_wrote_to_memory() {
    with_both("read", |_, guest| {
        let (used, data, status) = fetch(guest, 7, 8192, false);
        assert_eq!((used, status), (8193, 0));
        for (i, sector) in data.chunks(512).enumerate() {
            assert_eq!(sector, sector_data(7 + i as u32));
        }
        let (_, data, status) = fetch(guest, 100, 512, true);
        assert_eq!((data, status), (sector_data(100), 0));
    });
}

#[test]
fn marks_the_pages_it_reads_into() {
    with_both("mark", |_, guest| {
        let header = header(0, 1);
        guest.add(0, &[Part::Out(&header), Part::In(16384), Part::In(1)], false);
        let marked = Arc::new(Mutex::new(Vec::new()));
        let log = Arc::clone(&marked);
        let hook = Box::new(move |address, len| log.lock().unwrap().push((address, len)));
        assert!(guest.ram.write_hook().set(hook).is_ok());
        guest.kick(0);
        guest.used(0);
        let marked = marked.lock().unwrap();
        // Buffers start at 4 MiB: the header, the data, the status. The data is marked before the
        // used index (2 bytes after the used ring's start) makes it the driver's.
        let data = marked.iter().position(|range| *range == (0x40_0040, 16384)).unwrap();
        let index = marked.iter().position(|range| *range == (0x10_c002, 2)).unwrap();
        assert!(data < index);
        assert!(marked.contains(&(0x40_4040, 1)));
    });
}

#[test]
fn writes_are_there_and_partial_descriptors_work() {
    with_both("write", |disk, guest| {
        let data: Vec<u8> = (0..16384u32).map(|i| (i * 7) as u8).collect();
        let header = header(1, 50);
        // Header and data cut at odd places.
        let parts = [
            Part::Out(&header[..5]),
            Part::Out(&header[5..]),
            Part::Out(&data[..1]),
            Part::Out(&data[1..9999]),
            Part::Out(&data[9999..]),
            Part::In(1),
        ];
        for indirect in [false, true] {
            let (used, status) = guest.request(0, &parts, indirect);
            assert_eq!((used, status[0]), (1, 0));
        }
        assert_eq!(disk.read(50 * 512, data.len()), data);
        assert_eq!(send(guest, 4, 0, &[]), 0);
    });
}

#[test]
fn many_requests_at_once() {
    with_both("many", |_, guest| {
        let headers: Vec<_> = (0..200).map(|i| header(0, i * 3)).collect();
        let mut expected = std::collections::HashMap::new();
        for round in 0..20 {
            for (i, header) in headers.iter().enumerate().take(80) {
                let head = guest.add(0, &[Part::Out(header), Part::In(512), Part::In(1)], false);
                expected.insert(head, i as u32 * 3);
                if (i + round) % 7 == 0 {
                    guest.kick(0);
                }
            }
            guest.kick(0);
            for _ in 0..80 {
                let (head, len, data) = guest.used(0);
                let sector = expected.remove(&head).unwrap();
                assert_eq!((len, data[512]), (513, 0));
                assert_eq!(data[..512], sector_data(sector));
            }
        }
        let vectors = guest.sink.messages();
        assert!(vectors.iter().all(|message| *message == (0xfee0_0000, 0x40)));
    });
}

#[test]
fn refuses_what_is_outside_or_unknown() {
    with_both("range", |_, guest| {
        let end = SECTORS as u64;
        assert_eq!(fetch(guest, end - 1, 1024, false).2, 1);
        assert_eq!(fetch(guest, end, 512, false).2, 1);
        assert_eq!(fetch(guest, u64::MAX, 512, false).2, 1);
        assert_eq!(fetch(guest, u64::MAX / 512, 512, false).2, 1);
        assert_eq!(fetch(guest, 0, 100, false).2, 1);
        assert_eq!(fetch(guest, end - 1, 512, false).2, 0);
        assert_eq!(send(guest, 1, end, &[1; 512]), 1);
        assert_eq!(send(guest, 77, 0, &[]), 2);
        assert_eq!(send(guest, 11, 0, &segment(end, 8, 0)), 1);
        assert_eq!(send(guest, 11, 0, &segment(0, u32::MAX, 0)), 1);
        assert_eq!(send(guest, 11, 0, &segment(0, 8, 0xf0)), 2);
        assert_eq!(send(guest, 13, 0, &[1; 15]), 1);
        assert_eq!(guest.status(), 0xf);
    });
}

#[test]
fn discards_and_writes_zeroes() {
    with_both("zero", |disk, guest| {
        assert_eq!(send(guest, 13, 0, &segment(16, 16, 0)), 0);
        assert_eq!(send(guest, 13, 0, &segment(64, 1000, 1)), 0);
        assert_eq!(send(guest, 11, 0, &segment(2048, 64, 0)), 0);
        assert_eq!(disk.read(16 * 512, 16 * 512), vec![0; 16 * 512]);
        assert_eq!(disk.read(64 * 512, 1000 * 512), vec![0; 1000 * 512]);
        assert_eq!(disk.read(15 * 512, 512), sector_data(15));
        assert_eq!(disk.read(32 * 512, 512), sector_data(32));
        assert_eq!(std::fs::metadata(&disk.path).unwrap().len(), SECTORS as u64 * 512);
    });
}

#[test]
fn read_only_disks_are_not_written() {
    let disk = TestDisk::new("ro");
    let config = DiskConfig { read_only: true, ..disk.config() };
    let mut guest = Guest::new(Block::new(&config).unwrap());
    assert_eq!(guest.device_features() & F_RO, F_RO);
    guest.start(F_RO | F_FLUSH, 0);
    assert_eq!(send(&mut guest, 1, 0, &[1; 512]), 1);
    assert_eq!(fetch(&mut guest, 3, 512, false).1, sector_data(3));
    assert_eq!(disk.read(0, 512), sector_data(0));
    // Another reader may share it, a writer may not.
    let shared = Block::new(&config).unwrap();
    assert!(matches!(Block::new(&disk.config()), Err(DiskError::Open(OpenError::Locked { .. }))));
    drop(shared);
}

#[test]
fn a_writable_disk_belongs_to_one() {
    let disk = TestDisk::new("lock");
    let first = Block::new(&disk.config()).unwrap();
    assert!(matches!(Block::new(&disk.config()), Err(DiskError::Open(OpenError::Locked { .. }))));
    drop(first);
    assert!(Block::new(&disk.config()).is_ok());
}

#[test]
fn unusable_files_are_named() {
    let missing = DiskConfig { path: "/nonexistent/disk".into(), ..DiskConfig::default() };
    assert!(matches!(Block::new(&missing), Err(DiskError::Open(OpenError::File { .. }))));
    let directory = DiskConfig { path: "/tmp".into(), read_only: true, ..DiskConfig::default() };
    assert!(matches!(Block::new(&directory), Err(DiskError::Open(OpenError::Kind { .. }))));
}

#[test]
fn a_shrunk_file_is_an_error_to_the_guest() {
    with_both("shrunk", |disk, guest| {
        File::options().write(true).open(&disk.path).unwrap().set_len(1000 * 512).unwrap();
        assert_eq!(fetch(guest, 999, 1024, false).2, 1);
        assert_eq!(fetch(guest, 999, 512, false).2, 0);
    });
}

#[test]
fn broken_chains_stop_the_device_until_reset() {
    with_both("broken", |_, guest| {
        let at = Guest::descriptor_address(0, 0);
        // A loop.
        guest.write_descriptor(at, 0x40_0000, 16, 1, 0);
        guest.offer(0, 0);
        guest.kick(0);
        guest.wait_needs_reset();
        let bad: [(u64, u32, u16, u16); 6] = [
            (0x40_0000, 16, 1, 9999),          // next outside the table
            (0xffff_ffff_ffff_fff0, 64, 2, 0), // wraps
            (0x7fff_0000_0000, 16, 0, 0),      // not memory
            (0x40_0000, 17, 4, 0),             // odd indirect table
            (0xdead_0000_0000, 32, 4, 0),      // indirect table outside memory
            (0x40_0000, 16, 0, 0),             // no status byte
        ];
        for (address, len, flags, next) in bad {
            guest.start(F_FLUSH, 0);
            guest.write_descriptor(at, address, len, flags, next);
            guest.offer(0, 0);
            guest.kick(0);
            guest.wait_needs_reset();
        }
        guest.start(F_FLUSH, 0);
        guest.offer(0, 40_000);
        guest.kick(0);
        guest.wait_needs_reset();
        // After a reset it works as before.
        guest.start(F_FLUSH, 0);
        assert_eq!(fetch(guest, 5, 512, false).1, sector_data(5));
    });
}

#[test]
fn reset_with_requests_under_way() {
    with_both("reset", |_, guest| {
        let header = header(0, 0);
        for _ in 0..20 {
            for _ in 0..60 {
                guest.add(0, &[Part::Out(&header), Part::In(65536), Part::In(1)], true);
            }
            guest.kick(0);
            guest.start(F_FLUSH, 0);
        }
        assert_eq!(fetch(guest, 5, 512, false).1, sector_data(5));
    });
}

/// What a vCPU does while the disk answers a request: more requests, registers, another device.
#[test]
fn a_vcpu_does_not_wait_for_the_disk() {
    with_both("stall", |_, guest| stall(guest));
    let directory = tempfile::tempdir().unwrap();
    let (disk, path) = (TestDisk::new("stall-image"), directory.path().join("disk.qcow2"));
    convert((&disk.path, Format::Raw), (&path, Format::Qcow2)).unwrap();
    let config = DiskConfig { path, format: Format::Qcow2, ..DiskConfig::default() };
    let mut guest = Guest::new(Block::new(&config).unwrap());
    guest.start(F_FLUSH, 0);
    stall(&mut guest);
}

fn stall(guest: &mut Guest) {
    let header = header(0, 7);
    // Not offered yet: a device that has just started looks at its rings without being told.
    let head = guest.prepare(0, &[Part::Out(&header), Part::In(8192), Part::In(1)], false);
    // Whole pages of that buffer, which begins at 0x40_0040.
    let memory = Arc::clone(&guest.memory);
    let mut pages = memory.get_slices(GuestAddress(0x40_1000), 4096, Permissions::Write).unwrap();
    let page = pages.next().unwrap().unwrap();
    let stall = match Stall::new(page.ptr_guard_mut().as_ptr(), 4096) {
        Ok(stall) => stall,
        Err(error) => return println!("skipped: no userfaultfd here: {error}"),
    };
    let (touched, stalled) = mpsc::channel();
    let (ended, over) = mpsc::channel();
    let keeper = std::thread::spawn(move || {
        stall.wait();
        touched.send(()).unwrap();
        // As long as a test may take; a vCPU that waits would wait for this.
        let waited = over.recv_timeout(Duration::from_secs(20)).is_err();
        drop(stall);
        waited
    });
    guest.offer(0, head);
    guest.kick(0);
    stalled.recv().unwrap();
    for _ in 0..100 {
        guest.kick(0);
        assert_eq!(guest.status(), 0xf);
        assert_eq!(guest.device_config(0, 8), SECTORS as u64);
    }
    assert!(guest.poll_used(0).is_none(), "the request was not to end");
    ended.send(()).unwrap();
    assert!(!keeper.join().unwrap(), "a register was answered only after the disk");
    let (done, len, data) = guest.used(0);
    assert_eq!((done, len, data[8192]), (head, 8193, 0));
    assert_eq!(data[..512], sector_data(7));
}

/// Sends random requests to a disk that is an overlay, and compares it with what QEMU makes of it.
#[test]
fn an_image_holds_what_qemu_sees() {
    let directory = tempfile::tempdir().unwrap();
    let below = Backing { name: "base.raw".to_owned(), format: Format::Raw };
    let base: Vec<u8> = (0..SECTORS as u32 / 2).flat_map(sector_data).collect();
    std::fs::write(directory.path().join("base.raw"), base).unwrap();
    let path = directory.path().join("disk.qcow2");
    let size = SECTORS as u64 * 512;
    berth_disk::tools::create(&path, Format::Qcow2, Some(size), Some(&below)).unwrap();
    let config = DiskConfig { path: path.clone(), format: Format::Qcow2, ..DiskConfig::default() };
    let mut guest = Guest::new(Block::new(&config).unwrap());
    assert_eq!(guest.device_config(44, 4), 128);
    let mut model: Vec<u32> = (0..SECTORS as u32).collect();
    model[SECTORS / 2..].fill(0);
    let mut state = 12_345u64;
    let mut random = |end: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 33) % end
    };
    for round in 0..400u32 {
        if round % 100 == 0 {
            // With and without a driver that flushes.
            let flush = if round == 200 { 0 } else { F_FLUSH };
            guest.start(flush | F_DISCARD | F_WRITE_ZEROES, 0);
        }
        let first = random(SECTORS as u64 - 300);
        let count = 1 + random(if round % 3 == 0 { 300 } else { 9 });
        let range = first as usize..(first + count) as usize;
        match random(12) {
            0 => assert_eq!(send(&mut guest, 4, 0, &[]), 0),
            1 | 2 => {
                assert_eq!(send(&mut guest, 11, 0, &segment(first, count as u32, 0)), 0);
                let whole = range.start.next_multiple_of(128)..range.end / 128 * 128;
                whole.for_each(|sector| model[sector] = 0);
            }
            3 | 4 => {
                let unmap = random(2) as u32;
                assert_eq!(send(&mut guest, 13, 0, &segment(first, count as u32, unmap)), 0);
                model[range].fill(0);
            }
            5..=7 => {
                let (_, data, status) = fetch(&mut guest, first, count as u32 * 512, true);
                let expected: Vec<u8> =
                    range.flat_map(|sector| sector_data(model[sector])).collect();
                assert!(status == 0 && data == expected, "round {round}");
            }
            _ => {
                let value = 1_000_000 + round;
                let data = sector_data(value).repeat(count as usize);
                assert_eq!(send(&mut guest, 1, first, &data), 0);
                model[range].fill(value);
            }
        }
    }
    assert!(matches!(Block::new(&config), Err(DiskError::Open(OpenError::Locked { .. }))));
    // What is below is for readers only as long.
    let base = DiskConfig { path: directory.path().join("base.raw"), ..DiskConfig::default() };
    assert!(matches!(Block::new(&base), Err(DiskError::Open(OpenError::Locked { .. }))));
    assert!(Block::new(&DiskConfig { read_only: true, ..base }).is_ok());
    drop(guest);
    let report = berth_disk::tools::check_disk(&path, Format::Qcow2).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
    let image = path.display().to_string();
    let raw = directory.path().join("seen.raw");
    let Some(check) = qemu_img(&["check", "-f", "qcow2", &image]) else { return };
    assert!(check.contains("No errors were found"), "{check}");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &image, &raw.display().to_string()]);
    let expected: Vec<u8> = model.iter().copied().flat_map(sector_data).collect();
    assert!(std::fs::read(raw).unwrap() == expected, "QEMU sees another disk");
}

fn qemu_img(arguments: &[&str]) -> Option<String> {
    match std::process::Command::new("qemu-img").args(arguments).output() {
        Ok(output) => {
            let text =
                String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
            Some(text)
        }
        Err(error) => {
            println!("skipped: no qemu-img here: {error}");
            None
        }
    }
}

#[test]
fn a_full_disk_is_an_error_to_the_guest() {
    for no_io_uring in [false, true] {
        let file = File::options().read(true).write(true).open("/dev/full").unwrap();
        let serial = String::new();
        let contents = Contents::Raw(Arc::new(file));
        let disk = Disk { contents, sectors: SECTORS as u64, read_only: false, serial };
        let mut guest = Guest::new(Block::with_disk(disk, no_io_uring));
        guest.start(F_FLUSH, 0);
        assert_eq!(send(&mut guest, 1, 0, &[1; 4096]), 1);
        // Reading /dev/full gives zeroes: the device still works.
        assert_eq!(fetch(&mut guest, 0, 512, false), (513, vec![0; 512], 0));
    }
}
