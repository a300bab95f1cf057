//! Round trips, and streams that were cut, altered or made to be wrong.

use std::io;

use berth_api::size::Size;
use berth_api::v1::machine::{MachineConfig, Share};
use jiff::Timestamp;
use uuid::Uuid;

use crate::checkpoint::{Checkpoint, KNOWN_BYTES};
use crate::error::ApplianceError;
use crate::head::Head;
use crate::limits::CHUNK_BYTES;
use crate::manifest::{FileEntry, Manifest, Role};
use crate::read::{Place, Reader};
use crate::wire::{Chain, HEAD_BYTES, Kind, VERSION, opening};
use crate::write::{Source, Writer};

const CHUNK: usize = CHUNK_BYTES as usize;

impl Source for Vec<u8> {
    fn extent(&self, at: u64, len: u64) -> io::Result<(bool, u64)> {
        // Zeroes in pieces of 4 KiB, as file systems know them.
        let end = (at + len).min(self.len() as u64);
        let run = (at / 4096 * 4096 + 4096).min(end) - at;
        let part = &self[at as usize..(at + run) as usize];
        Ok((part.iter().all(|byte| *byte == 0), run))
    }

    fn read_at(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self[at as usize..at as usize + buffer.len()]);
        Ok(())
    }
}

#[derive(Default)]
struct Memory {
    bytes: Vec<u8>,
    writes: usize,
}

impl Place for Memory {
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        let end = at as usize + bytes.len();
        self.bytes.resize(self.bytes.len().max(end), 0);
        self.bytes[at as usize..end].copy_from_slice(bytes);
        self.writes += 1;
        Ok(())
    }

    fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        buffer.copy_from_slice(&self.bytes[at as usize..at as usize + buffer.len()]);
        Ok(())
    }
}

fn manifest(files: Vec<FileEntry>) -> Manifest {
    Manifest {
        id: Uuid::from_u128(1),
        name: "web".into(),
        created: Timestamp::UNIX_EPOCH,
        software: "test".into(),
        machine: MachineConfig { memory: Size::from(8 << 20), ..MachineConfig::default() },
        files,
    }
}

/// Bytes that do not compress.
fn noise(len: usize, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut bytes);
    bytes
}

fn files() -> Vec<(Role, Vec<u8>)> {
    let mut disk = vec![0; 40 * CHUNK + 1024];
    disk[3 * CHUNK..5 * CHUNK].copy_from_slice(&noise(2 * CHUNK, 2));
    disk[7 * CHUNK + 5] = 1;
    disk[40 * CHUNK + 1023] = 9;
    let mut memory = vec![0; 8 << 20];
    memory[CHUNK..3 * CHUNK].copy_from_slice(&noise(2 * CHUNK, 2));
    vec![
        (Role::State, b"{}".to_vec()),
        (Role::Kernel, b"kernel".to_vec()),
        (Role::Initrd, vec![7; CHUNK + 1]),
        (Role::Disk, disk),
        (Role::Disk, vec![0; CHUNK]),
        (Role::Memory, memory),
    ]
}

fn pack(files: &[(Role, Vec<u8>)]) -> Vec<u8> {
    let entries = files.iter().map(|(role, bytes)| FileEntry::new(*role, bytes.len() as u64));
    let mut writer = Writer::new(Vec::new(), manifest(entries.collect())).unwrap();
    for (_, bytes) in files {
        writer.file(bytes).unwrap();
    }
    writer.finish().unwrap()
}

fn unpack(stream: &[u8]) -> Result<Vec<Memory>, ApplianceError> {
    let mut reader = Reader::new(stream)?;
    let mut places: Vec<_> = reader.manifest().files.iter().map(|_| Memory::default()).collect();
    let mut refs: Vec<&mut dyn Place> = places.iter_mut().map(|p| p as &mut dyn Place).collect();
    for _ in 0..refs.len() {
        reader.file(&mut refs)?;
    }
    reader.finish()?;
    Ok(places)
}

#[test]
fn what_is_packed_is_unpacked() {
    let files = files();
    let stream = pack(&files);
    // The noise is there once, and zeroes not at all.
    assert!(stream.len() < 3 * CHUNK, "{}", stream.len());
    for ((role, bytes), place) in files.iter().zip(unpack(&stream).unwrap()) {
        let mut found = place.bytes;
        found.resize(bytes.len(), 0);
        assert!(found == *bytes, "{role}");
        assert!(place.writes <= 5, "{role}: zeroes are not written");
    }
    assert_eq!(Reader::new(stream.as_slice()).unwrap().manifest().name, "web");
}

#[test]
fn whatever_is_cut_or_altered_is_found() {
    let stream = pack(&files());
    let step = |at: usize| if at < 2000 || at + 300 > stream.len() { 1 } else { 997 };
    let mut at = 0;
    while at < stream.len() {
        assert!(unpack(&stream[..at]).is_err(), "cut at {at}");
        let mut altered = stream.clone();
        altered[at] ^= 1 << (at % 8);
        assert!(unpack(&altered).is_err(), "altered at {at}");
        at += step(at);
    }
    let mut longer = stream.clone();
    longer.push(0);
    assert!(matches!(unpack(&longer), Err(ApplianceError::Trailing { .. })));
}

/// A stream whose checksums are right, whatever its records say.
fn forge(manifest: &[u8], records: &[(Kind, Vec<u8>)]) -> Vec<u8> {
    let mut stream = opening(VERSION).to_vec();
    let mut chain = Chain::new();
    let mut add = |kind: Kind, body: &[u8], stream: &mut Vec<u8>| {
        let before = chain;
        let head: [u8; HEAD_BYTES] = kind.head(body.len());
        chain.add(&head, body);
        stream.extend(head);
        stream.extend(body);
        before
    };
    add(Kind::Manifest, manifest, &mut stream);
    let mut chunks = 0_u64;
    for (kind, body) in records {
        chunks += u64::from(matches!(kind, Kind::Plain | Kind::Packed));
        add(*kind, body, &mut stream);
    }
    let sum = add(Kind::Zero, &[], &mut Vec::new()).0;
    let body = [chunks.to_le_bytes().as_slice(), sum.as_bytes()].concat();
    stream.extend(Kind::End.head(body.len()));
    stream.extend(body);
    stream
}

fn plain(bytes: &[u8]) -> (Kind, Vec<u8>) {
    (Kind::Plain, [blake3::hash(bytes).as_bytes().as_slice(), bytes].concat())
}

fn number(kind: Kind, number: u64) -> (Kind, Vec<u8>) {
    (kind, number.to_le_bytes().to_vec())
}

fn two() -> Vec<u8> {
    let disk = 3 * CHUNK_BYTES + 512;
    let files = vec![FileEntry::new(Role::Kernel, 4), FileEntry::new(Role::Disk, disk)];
    serde_json::to_vec(&manifest(files)).unwrap()
}

#[test]
fn lies_about_lengths_are_refused() {
    let check = |records: &[(Kind, Vec<u8>)], part: &str| {
        let found = unpack(&forge(&two(), records));
        match (found, part) {
            (Ok(_), "") => {}
            (Ok(_), _) => panic!("`{part}` was taken"),
            (Err(error), part) => {
                let text = error.to_string();
                assert!(!part.is_empty() && text.contains(part), "{text}");
            }
        }
    };
    let (kernel, noise) = (plain(b"kern"), noise(CHUNK, 1));
    let (chunk, zero) = (plain(&noise), |count| number(Kind::Zero, count));
    let same = |count| number(Kind::Same, count);
    let end = 3 * CHUNK_BYTES + 512;
    check(&[kernel.clone(), zero(end)], "");
    check(&[kernel.clone(), chunk.clone(), same(1), zero(end - 2 * CHUNK_BYTES)], "");
    check(&[kernel.clone(), zero(end), zero(1)], "more than its files have");
    check(&[kernel.clone(), zero(end + 1)], "zeroes that do not fit");
    check(&[kernel.clone(), zero(u64::MAX)], "zeroes that do not fit");
    check(&[kernel.clone(), zero(0), zero(end)], "zeroes that do not fit");
    check(&[kernel.clone(), zero(512)], "zeroes that do not fit");
    check(&[kernel.clone(), zero(CHUNK_BYTES)], "ends before its files");
    check(&[kernel.clone(), plain(&noise[1..])], "another length");
    check(&[plain(b"kernel")], "another length");
    check(&[kernel.clone(), same(1)], "not there again");
    check(&[kernel.clone(), same(u64::MAX)], "not there again");
    // Longer here than there, and the other way round.
    check(&[kernel.clone(), same(0)], "too short again");
    let last = [kernel.clone(), chunk.clone(), zero(2 * CHUNK_BYTES), same(1)];
    check(&last, "another length again");
    let wrong = (Kind::Plain, [[0; 32].as_slice(), b"kern"].concat());
    check(&[wrong], "checksum of a chunk");
    let manifest = (Kind::Manifest, two());
    check(&[kernel.clone(), manifest], "a second manifest");
    // Less, more and something else than the file has.
    for bytes in [vec![1; CHUNK - 1], vec![1; 9 << 20], Vec::new()] {
        let packed = zstd::bulk::compress(&bytes, 3).unwrap();
        let body = [blake3::hash(&bytes).as_bytes().as_slice(), &packed].concat();
        check(&[kernel.clone(), (Kind::Packed, body)], "cannot be decompressed");
    }
}

#[test]
fn impossible_manifests_are_refused() {
    let check = |change: &dyn Fn(&mut Manifest), part: &str| {
        let files = files();
        let entries = files.iter().map(|(role, bytes)| FileEntry::new(*role, bytes.len() as u64));
        let mut said = manifest(entries.collect());
        change(&mut said);
        let text = serde_json::to_vec(&said).unwrap();
        let error = unpack(&forge(&text, &[])).err().unwrap().to_string();
        assert!(error.contains(part), "{part}: {error}");
    };
    check(&|_| {}, "ends before its files");
    check(&|m| m.files[3].size = u64::MAX, "cannot have 18446744073709551615");
    check(&|m| m.files[3].size = 513, "512 must divide");
    check(&|m| m.files[1].size = 0, "cannot have 0 bytes");
    check(&|m| m.files[5].size = 4 << 20, "its memory has");
    check(&|m| m.files.swap(0, 2), "not in order");
    check(&|m| m.files.insert(1, FileEntry::new(Role::Kernel, 1)), "2 times");
    check(&|m| drop(m.files.remove(1)), "no kernel");
    check(&|m| drop(m.files.remove(5)), "not both");
    check(&|m| m.files = vec![FileEntry::new(Role::Disk, 512); 17], "17 times");
    check(&|m| m.files[2].words = "a,b".into(), "words");
    check(&|m| m.files[3].words = "a".into(), "words");
    check(&|m| m.files[2].read_only = true, "read-only");
    check(&|m| m.name = "../x".into(), "name");
    check(&|m| m.machine.kernel = Some("/etc/shadow".into()), "files of a host");
    let share = Share { host: "/".into(), guest: "/host".into(), read_only: false };
    check(&|m| m.machine.shares.push(share.clone()), "files of a host");
    let text = String::from_utf8(two()).unwrap();
    let unknown = text.replacen('{', "{\"path\":\"/etc\",", 1);
    assert!(unpack(&forge(unknown.as_bytes(), &[])).is_err());
    let negative = text.replace("\"size\":4", "\"size\":-4");
    assert!(unpack(&forge(negative.as_bytes(), &[])).is_err());
}

#[test]
fn other_files_are_told_apart() {
    for other in [b"".as_slice(), b"PK\x03\x04", b"hello, this is some text"] {
        assert!(matches!(unpack(other), Err(ApplianceError::Other)));
    }
    let mut later = pack(&files());
    later[8] = 2;
    assert!(matches!(unpack(&later), Err(ApplianceError::Version { found: 2, .. })));
    // A record that claims to be huge is refused by its head.
    let mut huge = opening(VERSION).to_vec();
    huge.extend([1, 0xff, 0xff, 0xff, 0xff]);
    assert!(matches!(unpack(&huge), Err(ApplianceError::Damaged { .. })));
}

/// A reader that broke off: where, and what it knew.
fn kept<R: io::Read>(reader: &Reader<R>) -> (Checkpoint, Vec<u8>) {
    let checkpoint = reader.checkpoint();
    let (first, known) = reader.known_from(0);
    assert_eq!(first, checkpoint.chunks - checkpoint.known());
    (checkpoint, known.flatten().collect())
}

/// Wherever a stream is cut, another reader goes on at the last record before and comes to the same.
#[test]
fn a_stream_that_broke_off_goes_on_at_each_record() {
    let stream = pack(&files());
    let whole = unpack(&stream).unwrap();
    let head = Head::read(stream.as_slice()).unwrap();
    let mut ends = vec![head.bytes().len()];
    while let Some(len) = stream[*ends.last().unwrap()..].get(1..5) {
        let len = u32::from_le_bytes(len.try_into().unwrap()) as usize;
        ends.push(ends.last().unwrap() + HEAD_BYTES + len);
    }
    assert_eq!(ends.pop(), Some(stream.len()));
    assert!(ends.len() > 15, "{}", ends.len());
    for end in ends {
        // At the end of a record and in the middle of the next one.
        for cut in [end, end + 3] {
            let mut reader = Reader::new(&stream[..cut]).unwrap();
            let mut places: Vec<_> = whole.iter().map(|_| Memory::default()).collect();
            let mut refs: Vec<_> = places.iter_mut().map(|p| p as &mut dyn Place).collect();
            let broke = (0..refs.len()).try_for_each(|_| reader.file(&mut refs));
            let broke = broke.and_then(|()| reader.finish()).unwrap_err();
            assert!(matches!(broke, ApplianceError::Truncated { .. }), "{broke}");
            let (checkpoint, known) = kept(&reader);
            assert_eq!(checkpoint.at as usize, end);
            let text = serde_json::to_string(&checkpoint).unwrap();
            assert_eq!(serde_json::from_str::<Checkpoint>(&text).unwrap(), checkpoint);
            let rest = &stream[end..];
            let mut reader = Reader::resume(head.clone(), rest, &checkpoint, &known).unwrap();
            for _ in checkpoint.file..refs.len() as u64 {
                reader.file(&mut refs).unwrap();
            }
            reader.finish().unwrap();
            for (found, expected) in places.iter().zip(&whole) {
                assert!(found.bytes == expected.bytes, "cut at {cut}");
            }
        }
    }
}

/// Parts of any length are the same as the whole, and only new chunks have to be noted after each.
#[test]
fn parts_are_as_the_whole() {
    let stream = pack(&files());
    let mut reader = Reader::new(stream.as_slice()).unwrap();
    let mut places: Vec<_> = files().iter().map(|_| Memory::default()).collect();
    let mut refs: Vec<_> = places.iter_mut().map(|p| p as &mut dyn Place).collect();
    let (mut noted, mut count) = (Vec::new(), 0);
    while reader.checkpoint().file < refs.len() as u64 {
        let until = reader.checkpoint().at + 1;
        reader.part(&mut refs, until).unwrap();
        let (first, known) = reader.known_from(count);
        assert_eq!(first, count);
        noted.extend(known.flatten());
        count = reader.checkpoint().chunks;
    }
    assert_eq!(noted, kept(&reader).1);
    reader.finish().unwrap();
    let whole = unpack(&stream).unwrap();
    assert!(places.iter().zip(&whole).all(|(found, expected)| found.bytes == expected.bytes));
}

#[test]
fn a_checkpoint_that_cannot_be_is_refused() {
    let stream = pack(&files());
    let head = Head::read(stream.as_slice()).unwrap();
    let mut reader = Reader::new(stream.as_slice()).unwrap();
    let mut places: Vec<_> = files().iter().map(|_| Memory::default()).collect();
    let mut refs: Vec<_> = places.iter_mut().map(|p| p as &mut dyn Place).collect();
    for _ in 0..4 {
        reader.file(&mut refs).unwrap();
    }
    let (good, known) = kept(&reader);
    let resume = |checkpoint: Checkpoint, known: &[u8]| {
        Reader::resume(head.clone(), stream.as_slice(), &checkpoint, known).map(drop)
    };
    resume(good, &known).unwrap();
    let wrong = [
        Checkpoint { at: 20, ..good },
        // Found by fuzzing: no record could end behind it.
        Checkpoint { at: u64::MAX, ..good },
        Checkpoint { file: 7, ..good },
        Checkpoint { file: u64::MAX, ..good },
        Checkpoint { file: 6, done: 1, ..good },
        Checkpoint { done: CHUNK_BYTES, ..good },
        Checkpoint { done: 1, ..good },
        Checkpoint { chunks: good.chunks + 1, ..good },
        Checkpoint { chunks: u64::MAX, ..good },
        Checkpoint { file: 3, ..good },
    ];
    for wrong in wrong {
        let error = resume(wrong, &known).unwrap_err();
        assert!(matches!(error, ApplianceError::Kept { .. }), "{wrong:?}: {error}");
    }
    assert!(resume(good, &known[1..]).is_err());
    // Places that are of no file, in no chunk, not in order, or still to come.
    let last = known.len() - KNOWN_BYTES;
    for (at, byte) in [(32, 9), (36, 1), (last + 32, 0), (last + 32, 4), (last + 43, 1)] {
        let mut known = known.clone();
        known[at] = byte;
        assert!(resume(good, &known).is_err(), "{at}");
    }
}

/// What was unpacked is not what it was when the stream goes on: nobody takes it for right.
#[test]
fn what_was_kept_and_altered_is_not_taken() {
    let stream = pack(&files());
    let head = Head::read(stream.as_slice()).unwrap();
    let mut reader = Reader::new(stream.as_slice()).unwrap();
    let mut places: Vec<_> = files().iter().map(|_| Memory::default()).collect();
    let mut refs: Vec<_> = places.iter_mut().map(|p| p as &mut dyn Place).collect();
    for _ in 0..5 {
        reader.file(&mut refs).unwrap();
    }
    let (checkpoint, known) = kept(&reader);
    let rest = &stream[checkpoint.at as usize..];
    // The memory has these again.
    places[3].bytes[3 * CHUNK + 1] ^= 1;
    let mut refs: Vec<_> = places.iter_mut().map(|p| p as &mut dyn Place).collect();
    let mut reader = Reader::resume(head.clone(), rest, &checkpoint, &known).unwrap();
    let error = reader.file(&mut refs).unwrap_err();
    assert!(matches!(error, ApplianceError::Place { .. }), "{error}");
    // Another checksum before is found at the end.
    let other = Checkpoint { chain: blake3::hash(b"x"), ..checkpoint };
    places[3].bytes[3 * CHUNK + 1] ^= 1;
    let mut refs: Vec<_> = places.iter_mut().map(|p| p as &mut dyn Place).collect();
    let mut reader = Reader::resume(head, rest, &other, &known).unwrap();
    reader.file(&mut refs).unwrap();
    assert!(matches!(reader.finish().unwrap_err(), ApplianceError::Unfit { .. }));
}
