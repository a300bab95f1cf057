//! Imports that break off, are killed, go on with what is right and with what is not.

use std::fs;
use std::io;
use std::path::Path;

use berth_api::v1::error::ApiError;
use berth_api::v1::machine::MachineConfig;
use berth_appliance::head::Head;
use berth_appliance::limits::CHUNK_BYTES;
use berth_appliance::manifest::{FileEntry, Manifest, Role};
use berth_appliance::write::{Source, Writer};
use berth_disk::chain::{Access, open_image};
use jiff::Timestamp;
use uuid::Uuid;

use crate::failure::Result;
use crate::folder::unfinished::{self, Note};
use crate::folder::{self, Folder};
use crate::machines::import::unpacking::{Unpacking, Wanted, head_of};

const CHUNK: usize = CHUNK_BYTES as usize;
/// Some checkpoints in each disk.
const EVERY: u64 = 300_000;

struct Bytes<'a>(&'a [u8]);

impl Source for Bytes<'_> {
    fn extent(&self, _: u64, len: u64) -> io::Result<(bool, u64)> {
        Ok((false, len))
    }

    fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self.0[at as usize..at as usize + buffer.len()]);
        Ok(())
    }
}

/// Bytes that do not compress.
fn noise(chunks: usize, seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; chunks * CHUNK];
    blake3::Hasher::new().update(&[seed]).finalize_xof().fill(&mut bytes);
    bytes
}

/// Disks with holes, and with chunks that were in the one before.
fn files() -> Vec<(Role, Vec<u8>)> {
    let (one, zero) = (noise(6, 1), vec![0; 3 * CHUNK]);
    let first = [one.as_slice(), &zero, &noise(7, 2), &zero, &[7; 512]].concat();
    let second = [zero.as_slice(), &noise(5, 3), &one, &zero].concat();
    vec![(Role::Kernel, noise(4, 4)), (Role::Disk, first), (Role::Disk, second)]
}

fn pack() -> Vec<u8> {
    let files = files();
    let entries = files.iter().map(|(role, bytes)| FileEntry::new(*role, bytes.len() as u64));
    let manifest = Manifest {
        id: Uuid::from_u128(1),
        name: "web".into(),
        created: Timestamp::UNIX_EPOCH,
        software: "test".into(),
        machine: MachineConfig::default(),
        files: entries.collect(),
    };
    let mut writer = Writer::new(Vec::new(), manifest).unwrap();
    for (_, bytes) in &files {
        writer.file(&Bytes(bytes)).unwrap();
    }
    writer.finish().unwrap()
}

fn begin<'a>(machines: &Path, stream: &'a [u8]) -> Unpacking<&'a [u8]> {
    let mut from = stream;
    let head = Head::read(&mut from).unwrap();
    let wanted = Wanted { name: "web".into(), without_state: false };
    Unpacking::begin(machines, head, from, wanted, EVERY).unwrap()
}

/// Where the one that is kept goes on.
fn kept(machines: &Path) -> (Folder, Note) {
    let all = unfinished::all(machines).unwrap();
    assert_eq!((all.len(), names(machines).len()), (1, 1));
    let folder = all[0].1.clone();
    let note = Note::read(&folder).unwrap();
    (folder, note)
}

fn resume<'a>(machines: &Path, stream: &'a [u8]) -> Result<Unpacking<&'a [u8]>> {
    let (folder, note) = kept(machines);
    let (lock, head) = (folder.lock()?, head_of(&folder)?);
    let rest = &stream[note.checkpoint.at as usize..];
    Unpacking::resume(folder, lock, &note, head, rest, EVERY)
}

fn run(mut unpacking: Unpacking<&[u8]>) -> std::result::Result<Folder, ApiError> {
    match unpacking.run(&|_| Ok(())) {
        Ok(()) => Ok(unpacking.into_folder().0.name("web")?),
        Err(stopped) => Err(unpacking.stop(stopped)),
    }
}

/// As if the daemon had been killed there: what was written after the last checkpoint stays.
fn kill(mut unpacking: Unpacking<&[u8]>) {
    assert!(unpacking.run(&|_| Ok(())).is_err(), "it is cut");
    unpacking.into_folder().0.leave();
}

fn names(machines: &Path) -> Vec<String> {
    let entries = fs::read_dir(machines).unwrap();
    entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn content(folder: &Folder) -> Vec<Vec<u8>> {
    let disk = |name: &str| {
        let image = open_image(&folder.file(name), Access::Look).unwrap();
        let mut bytes = vec![0; image.size() as usize];
        image.read(0, &mut bytes).unwrap();
        bytes
    };
    vec![fs::read(folder.file("kernel")).unwrap(), disk("disk0.qcow2"), disk("disk1.qcow2")]
}

fn check(folder: &Folder) {
    let expected: Vec<_> = files().into_iter().map(|(_, bytes)| bytes).collect();
    assert!(content(folder) == expected);
}

#[test]
fn what_broke_off_goes_on() {
    let stream = pack();
    for cut in (EVERY as usize + 140_000..stream.len()).step_by(201_000) {
        let dir = tempfile::tempdir().unwrap();
        let error = run(begin(dir.path(), &stream[..cut])).unwrap_err().message;
        assert!(error.contains("ends too early") && error.contains("web is kept"), "{error}");
        let at = kept(dir.path()).1.checkpoint.at as usize;
        assert!(at <= cut && cut - at < CHUNK + 64, "all that came but a part of a record");
        // Cut once more, a bit later.
        let more = (cut + 150_000).min(stream.len() - 1);
        run(resume(dir.path(), &stream[..more]).unwrap()).unwrap_err();
        assert!(kept(dir.path()).1.checkpoint.at as usize >= at);
        check(&run(resume(dir.path(), &stream).unwrap()).unwrap());
        assert_eq!(names(dir.path()), ["web"]);
    }
}

#[test]
fn what_was_killed_goes_on_at_its_checkpoint() {
    let stream = pack();
    for cut in (EVERY as usize + 200_000..stream.len()).step_by(257_000) {
        let dir = tempfile::tempdir().unwrap();
        kill(begin(dir.path(), &stream[..cut]));
        let note = kept(dir.path()).1;
        // Nothing that came later is left, which others might take for zeroes.
        resume(dir.path(), &stream).unwrap().into_folder().0.leave();
        let (folder, same) = kept(dir.path());
        assert_eq!(same, note);
        for (index, file) in content(&folder).iter().enumerate() {
            let from = match (index as u64).cmp(&note.checkpoint.file) {
                std::cmp::Ordering::Less => continue,
                std::cmp::Ordering::Equal => note.checkpoint.done as usize,
                std::cmp::Ordering::Greater => 0,
            };
            assert!(file[from..].iter().all(|byte| *byte == 0), "cut at {cut}: file {index}");
        }
        let more = (cut + 400_000).min(stream.len() - 1);
        kill(resume(dir.path(), &stream[..more]).unwrap());
        check(&run(resume(dir.path(), &stream).unwrap()).unwrap());
    }
}

#[test]
fn what_came_less_far_or_is_wrong_is_removed() {
    let stream = pack();
    let dir = tempfile::tempdir().unwrap();
    let refused = |stream: &[u8]| {
        let error = run(begin(dir.path(), stream)).unwrap_err().message;
        assert_eq!(names(dir.path()), [""; 0], "{error}");
        assert!(!error.contains("kept"), "{error}");
    };
    refused(&stream[..EVERY as usize - 1]);
    let mut altered = stream.clone();
    altered[2_000_000] ^= 1;
    refused(&altered);
    let mut wrong = stream.clone();
    *wrong.last_mut().unwrap() ^= 1;
    refused(&wrong);
    refused(&[stream.as_slice(), b"x"].concat());
}

/// A rest that is wrong by itself leaves what is kept, one that does not fit it does not: either may be
/// wrong then.
#[test]
fn a_rest_that_is_wrong_is_refused() {
    let stream = pack();
    let dir = tempfile::tempdir().unwrap();
    let cut = &stream[..1_500_000];
    run(begin(dir.path(), cut)).unwrap_err();
    let mut altered = stream.clone();
    altered[1_600_000] ^= 1;
    let error = run(resume(dir.path(), &altered).unwrap()).unwrap_err().message;
    assert!(error.contains("damaged") && error.contains("web is kept"), "{error}");
    let longer = [stream.as_slice(), b"x"].concat();
    let error = run(resume(dir.path(), &longer).unwrap()).unwrap_err().message;
    assert!(error.contains("follows the end") && error.contains("web is kept"), "{error}");
    check(&run(resume(dir.path(), &stream).unwrap()).unwrap());
    fs::remove_dir_all(dir.path().join("web")).unwrap();
    // Another appliance's end.
    run(begin(dir.path(), cut)).unwrap_err();
    let mut wrong = stream.clone();
    *wrong.last_mut().unwrap() ^= 1;
    let error = run(resume(dir.path(), &wrong).unwrap()).unwrap_err().message;
    assert!(error.contains("checksum of all") && !error.contains("kept"), "{error}");
    assert_eq!(names(dir.path()), [""; 0]);
}

#[test]
fn what_is_kept_and_damaged_is_removed() {
    let stream = pack();
    let check = |part: &str, damage: &dyn Fn(&Folder)| {
        let dir = tempfile::tempdir().unwrap();
        // In the second disk.
        let error = run(begin(dir.path(), &stream[..2_600_000])).unwrap_err();
        let (folder, note) = kept(dir.path());
        assert_eq!(note.checkpoint.file, 2, "{}", error.message);
        damage(&folder);
        let resumed = resume(dir.path(), &stream).and_then(run);
        let error = resumed.unwrap_err().message;
        assert!(error.contains(part), "{error}");
        assert_eq!(names(dir.path()), [""; 0], "{error}");
    };
    check("kernel", &|folder| fs::write(folder.file("kernel"), b"short").unwrap());
    check("disk0.qcow2", &|folder| fs::remove_file(folder.file("disk0.qcow2")).unwrap());
    check("disk1.qcow2", &|folder| fs::write(folder.file("disk1.qcow2"), b"x").unwrap());
    check("known", &|folder| fs::write(folder.file(unfinished::KNOWN), b"x").unwrap());
    check("where none can be", &|folder| {
        let path = folder.file(unfinished::KNOWN);
        let len = fs::metadata(&path).unwrap().len();
        fs::write(&path, vec![0xa5; len as usize]).unwrap();
    });
    // The rest has chunks of it again.
    check("is not read back", &|folder| {
        let image = open_image(&folder.file("disk0.qcow2"), Access::Write).unwrap();
        image.write(5 * CHUNK_BYTES, b"x").unwrap();
        image.close().unwrap();
    });
}

#[test]
fn one_import_goes_on_at_a_time() {
    let stream = pack();
    let dir = tempfile::tempdir().unwrap();
    run(begin(dir.path(), &stream[..1_000_000])).unwrap_err();
    let first = resume(dir.path(), &stream).unwrap();
    let error = resume(dir.path(), &stream).err().unwrap().message;
    assert!(error.contains("in use"), "{error}");
    unfinished::sweep(dir.path(), Timestamp::now()).unwrap();
    folder::sweep(dir.path()).unwrap();
    check(&run(first).unwrap());
}
