//! Disks as tools see them: against `qemu-img` where it is installed, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use berth_disk::chain::{Access, describe, open, open_image};
use berth_disk::error::DiskError;
use berth_disk::format::Format;
use berth_disk::limits::CHAIN_LAYERS_MAX;
use berth_disk::qcow2::header::HeaderError;
use berth_disk::tools::{Backing, backing_name, check_disk, convert, create, resize};

const MIB: u64 = 1 << 20;

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Runs `qemu-img`, which must succeed.
    fn qemu(&self, words: &str) -> String {
        let mut command = Command::new("qemu-img");
        let output = command.args(words.split(' ')).current_dir(&self.directory).output().unwrap();
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        assert!(output.status.success(), "qemu-img {words}: {text}");
        text
    }

    fn qemu_is_there() -> bool {
        let there = Command::new("qemu-img").arg("--version").output().is_ok();
        if !there {
            println!("skipped: no qemu-img here");
        }
        there
    }

    /// A raw file with data in some places.
    fn raw(&self, name: &str, size: u64) -> Vec<u8> {
        let mut data = vec![0; size as usize];
        let mut value = 7u32;
        for chunk in data.chunks_mut(30_011).step_by(3) {
            for byte in chunk {
                value = value.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                *byte = (value >> 24) as u8 & 0x3f;
            }
        }
        fs::write(self.path(name), &data).unwrap();
        data
    }
}

fn read_all(path: &Path) -> Vec<u8> {
    let disk = open(path, Format::of_name(path), Access::Read).unwrap();
    let mut data = vec![0; disk.size() as usize];
    disk.read_padded(0, &mut data).unwrap();
    data
}

#[test]
fn what_qemu_made_is_read() {
    if !Place::qemu_is_there() {
        return;
    }
    let place = Place::new();
    let data = place.raw("a.raw", 9 * MIB + 512 * 3);
    for options in [
        "compat=0.10",
        "compat=1.1",
        "cluster_size=512",
        "cluster_size=2M",
        "cluster_size=4k,refcount_bits=1",
        "refcount_bits=64",
        "lazy_refcounts=on",
        "preallocation=metadata",
    ] {
        let words = format!("convert -f raw -O qcow2 -o {options} a.raw a.qcow2");
        place.qemu(&words);
        assert!(read_all(&place.path("a.qcow2")) == data, "{options}");
        let report = check_disk(&place.path("a.qcow2"), Format::Qcow2).unwrap();
        assert_eq!((report.corruptions, report.leaks), (0, 0), "{options}: {:?}", report.findings);
        // And is written in a way that QEMU understands.
        let image = open_image(&place.path("a.qcow2"), Access::Write).unwrap();
        image.write(MIB - 100, &vec![9; MIB as usize]).unwrap();
        image.write_zeroes(4 * MIB + 3, 2 * MIB, true).unwrap();
        image.discard(7 * MIB, MIB).unwrap();
        drop(image);
        place.qemu("check -f qcow2 a.qcow2");
        let mine = read_all(&place.path("a.qcow2"));
        place.qemu("convert -f qcow2 -O raw a.qcow2 back.raw");
        assert!(fs::read(place.path("back.raw")).unwrap() == mine, "{options}");
        assert!(mine[MIB as usize..][..1000] == [9; 1000], "{options}");
    }
}

#[test]
fn compressed_clusters_are_read_and_replaced() {
    if !Place::qemu_is_there() {
        return;
    }
    let place = Place::new();
    let mut data = place.raw("a.raw", 5 * MIB);
    for size in ["64k", "512", "2M"] {
        let words = format!("convert -c -f raw -O qcow2 -o cluster_size={size} a.raw a.qcow2");
        place.qemu(&words);
        assert!(read_all(&place.path("a.qcow2")) == data, "{size}");
        let image = open_image(&place.path("a.qcow2"), Access::Write).unwrap();
        image.write(1000, &[1; 200_000]).unwrap();
        image.discard(2 * MIB, 2 * MIB).unwrap();
        drop(image);
        place.qemu("check -f qcow2 a.qcow2");
        let mut expected = data.clone();
        expected[1000..201_000].fill(1);
        expected[2 * MIB as usize..4 * MIB as usize].fill(0);
        assert!(read_all(&place.path("a.qcow2")) == expected, "{size}");
    }
    data.truncate(0);
    place.qemu("create -f qcow2 -o compression_type=zstd z.qcow2 1M");
    let error = describe(&place.path("z.qcow2"), Format::Qcow2).unwrap_err();
    assert!(matches!(error, DiskError::Image { source: HeaderError::Unsupported(_), .. }));
}

#[test]
fn chains_are_followed_from_their_directory() {
    if !Place::qemu_is_there() {
        return;
    }
    let place = Place::new();
    fs::create_dir(place.path("sub")).unwrap();
    let mut expected = place.raw("sub/base.raw", 3 * MIB);
    place.qemu("create -f qcow2 -b base.raw -F raw sub/one.qcow2");
    place.qemu("create -f qcow2 -o compat=0.10 -b sub/one.qcow2 -F qcow2 two.qcow2 4M");
    let top = place.path("top.qcow2");
    let below = Backing { name: "two.qcow2".into(), format: Format::Qcow2 };
    create(&top, Format::Qcow2, None, Some(&below)).unwrap();
    expected.resize(4 * MIB as usize, 0);
    assert!(read_all(&top) == expected);
    let image = open_image(&top, Access::Write).unwrap();
    image.write(MIB + 5, b"from the top").unwrap();
    image.write_zeroes(2 * MIB, 300_000, false).unwrap();
    expected[MIB as usize + 5..][..12].copy_from_slice(b"from the top");
    expected[2 * MIB as usize..][..300_000].fill(0);
    // Nobody writes what is below.
    for name in ["two.qcow2", "sub/one.qcow2"] {
        let error = open_image(&place.path(name), Access::Write).unwrap_err();
        assert!(matches!(error, DiskError::Locked { .. }), "{error}");
    }
    let base = open(&place.path("sub/base.raw"), Format::Raw, Access::Write).unwrap_err();
    assert!(matches!(base, DiskError::Locked { .. }), "{base}");
    assert!(matches!(open_image(&top, Access::Read).unwrap_err(), DiskError::Locked { .. }));
    drop(image);
    place.qemu("check -f qcow2 top.qcow2");
    assert!(place.qemu("info --backing-chain top.qcow2").contains("base.raw"));
    place.qemu("convert -f qcow2 -O raw top.qcow2 top.raw");
    assert!(fs::read(place.path("top.raw")).unwrap() == expected);
    let layers = describe(&top, Format::Qcow2).unwrap();
    let names: Vec<_> = layers.iter().map(|layer| layer.path.file_name().unwrap()).collect();
    assert_eq!(names, ["top.qcow2", "two.qcow2", "one.qcow2", "base.raw"]);
    assert_eq!(layers[0].size, 4 * MIB);
}

/// Readers get along with QEMU's, writers with nobody.
#[test]
fn qemu_and_we_see_each_others_locks() {
    if !Place::qemu_is_there() {
        return;
    }
    let place = Place::new();
    place.raw("base.raw", MIB);
    let base = place.path("base.raw");
    place.qemu("create -f qcow2 -b base.raw -F raw over.qcow2");
    let qemu_io = |words: &[&str]| {
        let mut command = Command::new("qemu-io");
        command.args(words).current_dir(&place.directory).stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let is_refused = |words: &[&str]| {
        let output = qemu_io(words).wait_with_output().unwrap();
        String::from_utf8_lossy(&output.stderr).contains("lock")
    };
    let reads = ["-r", "-f", "raw", "-c", "read 0 512", "base.raw"];
    let writes = ["-f", "raw", "-c", "write 0 512", "base.raw"];
    let reader = open(&base, Format::Raw, Access::Read).unwrap();
    let second = open(&base, Format::Raw, Access::Read).unwrap();
    place.qemu("check -f qcow2 over.qcow2");
    place.qemu("compare -f qcow2 -F raw over.qcow2 base.raw");
    assert!(!is_refused(&reads) && is_refused(&writes), "while we read");
    drop((reader, second));
    let writer = open(&base, Format::Raw, Access::Write).unwrap();
    assert!(is_refused(&reads) && is_refused(&writes), "while we write");
    drop(writer);
    for (words, reads) in [(["-r", "-f", "raw"].as_slice(), true), (&["-f", "raw"], false)] {
        let mut qemu = qemu_io(&[words, &["-c", "sleep 60000", "base.raw"]].concat());
        let locked = || open(&base, Format::Raw, Access::Write).is_err();
        let began = Instant::now();
        while !locked() && began.elapsed() < Duration::from_secs(10) {
            sleep(Duration::from_millis(10));
        }
        let read = open(&base, Format::Raw, Access::Read);
        let written = open(&base, Format::Raw, Access::Write);
        qemu.kill().unwrap();
        qemu.wait().unwrap();
        assert!(matches!(written, Err(DiskError::Locked { .. })), "{written:?}");
        assert_eq!(read.is_ok(), reads, "{read:?}");
    }
}

#[test]
fn guesses_loops_and_strange_names_are_refused() {
    let place = Place::new();
    let path = |name: &str| place.path(name);
    let backing = |name: &str| Some(Backing { name: name.to_owned(), format: Format::Qcow2 });
    create(&path("a.qcow2"), Format::Qcow2, Some(MIB), None).unwrap();
    create(&path("b.qcow2"), Format::Qcow2, Some(MIB), backing("a.qcow2").as_ref()).unwrap();
    fs::remove_file(path("a.qcow2")).unwrap();
    fs::copy(path("b.qcow2"), path("a.qcow2")).unwrap();
    let error = open_image(&path("a.qcow2"), Access::Read).unwrap_err();
    assert!(matches!(error, DiskError::Loop { .. }), "{error}");
    assert!(matches!(describe(&path("a.qcow2"), Format::Qcow2), Err(DiskError::Loop { .. })));
    // One layer too many.
    let last = format!("{}.qcow2", CHAIN_LAYERS_MAX - 1);
    create(&path("0.qcow2"), Format::Qcow2, Some(MIB), None).unwrap();
    for number in 1..CHAIN_LAYERS_MAX {
        let name = backing(&format!("{}.qcow2", number - 1));
        create(&path(&format!("{number}.qcow2")), Format::Qcow2, None, name.as_ref()).unwrap();
    }
    assert!(open_image(&path(&last), Access::Write).is_ok());
    fs::rename(path("0.qcow2"), path("zero.qcow2")).unwrap();
    create(&path("0.qcow2"), Format::Qcow2, Some(MIB), backing("zero.qcow2").as_ref()).unwrap();
    let error = open_image(&path(&last), Access::Write).unwrap_err();
    assert!(matches!(error, DiskError::Deep { .. }), "{error}");
    for name in ["json:{}", "nbd://host/x", "file:a", "/no/such"] {
        assert!(create(&path("c"), Format::Qcow2, None, backing(name).as_ref()).is_err(), "{name}");
        assert!(!path("c").exists());
    }
    // A header that does not say the format, as an older QEMU wrote it.
    let mut raw = fs::read(path("b.qcow2")).unwrap();
    let at = raw.windows(4).position(|four| four == 0xe279_2acau32.to_be_bytes()).unwrap();
    raw[at..at + 4].copy_from_slice(&0x1234_5678u32.to_be_bytes());
    fs::write(path("b.qcow2"), raw).unwrap();
    let error = open_image(&path("b.qcow2"), Access::Read).unwrap_err();
    assert!(matches!(error, DiskError::NoBackingFormat { .. }), "{error}");
    // What a guest could have written into its raw disk stays what it is.
    fs::copy(path("zero.qcow2"), path("guest.raw")).unwrap();
    let layers = describe(&path("guest.raw"), Format::Raw).unwrap();
    assert_eq!((layers.len(), layers[0].format), (1, Format::Raw));
}

#[test]
fn disks_are_made_resized_and_converted() {
    let place = Place::new();
    let data = place.raw("a.raw", 3 * MIB + 512);
    let path = |name: &str| place.path(name);
    convert((&path("a.raw"), Format::Raw), (&path("a.qcow2"), Format::Qcow2)).unwrap();
    assert!(read_all(&path("a.qcow2")) == data);
    let error = convert((&path("a.raw"), Format::Raw), (&path("a.qcow2"), Format::Qcow2));
    assert!(matches!(error, Err(DiskError::Exists { .. })));
    let refuse = resize(&path("a.qcow2"), Format::Qcow2, MIB, false).unwrap_err().to_string();
    assert!(refuse.contains("--shrink"), "{refuse}");
    resize(&path("a.qcow2"), Format::Qcow2, 2 * MIB + 512, true).unwrap();
    // What was cut off does not come back, whichever size comes next.
    for size in [2 * MIB + 1024, 40 << 30, 3 * MIB] {
        resize(&path("a.qcow2"), Format::Qcow2, size, true).unwrap();
    }
    let mut expected = data.clone();
    expected[2 * MIB as usize + 512..].fill(0);
    expected.truncate(3 * MIB as usize);
    assert!(read_all(&path("a.qcow2")) == expected);
    let report = check_disk(&path("a.qcow2"), Format::Qcow2).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
    convert((&path("a.qcow2"), Format::Qcow2), (&path("b.raw"), Format::Raw)).unwrap();
    assert!(fs::read(path("b.raw")).unwrap() == expected);
    // Holes stay holes, without being read.
    let sparse = File::create(path("big.raw")).unwrap();
    sparse.set_len(1 << 40).unwrap();
    sparse.write_all_at(b"x", 1 << 39).unwrap();
    convert((&path("big.raw"), Format::Raw), (&path("big.qcow2"), Format::Qcow2)).unwrap();
    convert((&path("big.qcow2"), Format::Qcow2), (&path("big2.raw"), Format::Raw)).unwrap();
    let meta = fs::metadata(path("big2.raw")).unwrap();
    assert_eq!(meta.len(), 1 << 40);
    assert!(meta.blocks() * 512 < MIB && fs::metadata(path("big.qcow2")).unwrap().blocks() < 4096);
    // An overlay smaller than what is below it does not show more of it when it grows.
    let below = Backing { name: "a.raw".into(), format: Format::Raw };
    create(&path("o.qcow2"), Format::Qcow2, Some(MIB), Some(&below)).unwrap();
    resize(&path("o.qcow2"), Format::Qcow2, 3 * MIB, false).unwrap();
    let mut expected = data.clone();
    expected[MIB as usize..].fill(0);
    expected.truncate(3 * MIB as usize);
    assert!(read_all(&path("o.qcow2")) == expected);
    fs::create_dir(path("sub")).unwrap();
    assert_eq!(backing_name(&path("x.qcow2"), &path("a.raw")).unwrap(), "a.raw");
    let name = backing_name(&path("sub/x.qcow2"), &path("a.raw")).unwrap();
    assert!(name.starts_with('/') && name.ends_with("/a.raw"));
    if Place::qemu_is_there() {
        place.qemu("check -f qcow2 a.qcow2");
        place.qemu("check -f qcow2 o.qcow2");
        let compared = place.qemu("compare -f raw -F qcow2 big.raw big.qcow2");
        assert!(compared.contains("identical"), "{compared}");
    }
}

/// More tables of mappings than are kept in memory.
#[test]
fn large_disks_need_little_memory() {
    let place = Place::new();
    let path = place.path("a.qcow2");
    create(&path, Format::Qcow2, Some(1 << 40), None).unwrap();
    let image = open_image(&path, Access::Write).unwrap();
    let at = |number: u64| (number << 29) + number * 4096;
    for number in 0..700u64 {
        image.write(at(number), &number.to_be_bytes()).unwrap();
    }
    for number in (0..700u64).rev() {
        let mut found = [0; 8];
        image.read(at(number), &mut found).unwrap();
        assert_eq!(u64::from_be_bytes(found), number);
        if number % 3 == 0 {
            image.discard(number << 29, MIB * 8).unwrap();
        }
    }
    drop(image);
    let report = check_disk(&path, Format::Qcow2).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{:?}", report.findings);
    assert!(fs::metadata(&path).unwrap().blocks() * 512 < 100 * MIB);
    if Place::qemu_is_there() {
        place.qemu("check -f qcow2 a.qcow2");
    }
}

#[test]
fn damage_is_found() {
    let place = Place::new();
    let path = place.path("a.qcow2");
    create(&path, Format::Qcow2, Some(64 * MIB), None).unwrap();
    open_image(&path, Access::Write).unwrap().write(0, &[1; 300_000]).unwrap();
    let sound = fs::read(&path).unwrap();
    let report = |data: &[u8]| {
        fs::write(&path, data).unwrap();
        check_disk(&path, Format::Qcow2).unwrap()
    };
    assert_eq!(report(&sound).data_clusters, 5);
    let block = 2 * 65536;
    let mut data = sound.clone();
    data[block + 2 * 5 + 1] = 0;
    assert!(report(&data).corruptions > 0);
    data[block + 2 * 5 + 1] = 1;
    data[block + 2 * 20_000 + 1] = 0;
    assert!(report(&data).is_sound());
    data.extend([0; 65536 * 2]);
    data[block + 2 * 11 + 1] = 1;
    let found = report(&data);
    assert_eq!((found.is_sound(), found.leaks), (true, 1), "{:?}", found.findings);
    if Place::qemu_is_there() {
        let status = Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(&path).output();
        assert_eq!(status.unwrap().status.code(), Some(3));
    }
    assert!(matches!(check_disk(&path, Format::Raw), Err(DiskError::NoSuch { .. })));
}
