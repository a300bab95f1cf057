//! Appliances of any shape: a whole stream, and what follows a manifest that is right. Nothing is written
//! outside of a file, and what is taken as complete is so for whoever only looks at it going by, and for
//! readers each of which takes one record and leaves a checkpoint to the next. Any checkpoint may be there.
#![no_main]

use std::collections::BTreeMap;
use std::io;

use berth_appliance::check::Checker;
use berth_appliance::checkpoint::{Checkpoint, KNOWN_BYTES};
use berth_appliance::head::Head;
use berth_appliance::manifest::{FileEntry, Manifest, Role};
use berth_appliance::read::{Place, Reader};
use berth_appliance::write::Writer;
use libfuzzer_sys::fuzz_target;

/// A file that is as large as it says, and takes what was written of it.
struct Sparse {
    size: u64,
    pieces: BTreeMap<u64, Vec<u8>>,
    /// What was there before is not known.
    is_kept: bool,
}

impl Place for Sparse {
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(at + bytes.len() as u64 <= self.size, "written outside of the file");
        self.pieces.insert(at, bytes.to_vec());
        Ok(())
    }

    fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        assert!(at + buffer.len() as u64 <= self.size, "read outside of the file");
        match self.pieces.get(&at) {
            Some(piece) => buffer.copy_from_slice(&piece[..buffer.len()]),
            None => assert!(self.is_kept, "it was written there"),
        }
        Ok(())
    }
}

type Pieces = Vec<BTreeMap<u64, Vec<u8>>>;

fn sparse(manifest: &Manifest, is_kept: bool) -> Vec<Sparse> {
    let sizes = manifest.files.iter().map(|file| file.size);
    sizes.map(|size| Sparse { size, pieces: BTreeMap::new(), is_kept }).collect()
}

fn unpack(stream: &[u8]) -> Option<Pieces> {
    let mut reader = Reader::new(stream).ok()?;
    let mut files = sparse(reader.manifest(), false);
    let mut places: Vec<_> = files.iter_mut().map(|file| file as &mut dyn Place).collect();
    for _ in 0..places.len() {
        reader.file(&mut places).ok()?;
    }
    reader.finish().ok()?;
    Some(files.into_iter().map(|file| file.pieces).collect())
}

/// The same with a reader for each record.
fn unpack_in_parts(stream: &[u8]) -> Option<Pieces> {
    let head = Head::read(stream).ok()?;
    let mut files = sparse(head.manifest(), false);
    let mut places: Vec<_> = files.iter_mut().map(|file| file as &mut dyn Place).collect();
    let mut reader = Reader::new(stream).ok()?;
    loop {
        let checkpoint = reader.checkpoint();
        let known: Vec<u8> = reader.known_from(0).1.flatten().collect();
        let rest = &stream[checkpoint.at as usize..];
        reader = Reader::resume(head.clone(), rest, &checkpoint, &known).expect("it was there");
        if checkpoint.file == places.len() as u64 {
            reader.finish().ok()?;
            return Some(files.into_iter().map(|file| file.pieces).collect());
        }
        reader.part(&mut places, checkpoint.at + 1).ok()?;
    }
}

/// Goes on at any checkpoint.
fn resume(head: &[u8], data: &[u8]) {
    let head = Head::read(head).expect("the manifest is right");
    let Some((numbers, rest)) = data.split_first_chunk::<32>() else { return };
    let number = |index: usize| {
        u64::from_le_bytes(numbers[index * 8..][..8].try_into().expect("eight bytes"))
    };
    let (at, chunks, file, done) = (number(0), number(1), number(2), number(3));
    let chain = *numbers;
    let checkpoint = Checkpoint { at, chunks, file, done, chain: chain.into() };
    let known = usize::try_from(checkpoint.known()).unwrap_or_default() * KNOWN_BYTES;
    let (known, rest) = rest.split_at(known.min(rest.len()));
    let mut files = sparse(head.manifest(), true);
    let mut places: Vec<_> = files.iter_mut().map(|file| file as &mut dyn Place).collect();
    let Ok(mut reader) = Reader::resume(head, rest, &checkpoint, known) else { return };
    while reader.file(&mut places).is_ok() {}
    let _ = reader.finish();
}

fn manifest() -> Manifest {
    let text = r#"{"id":"00000000-0000-0000-0000-000000000001","name":"a","created":
        "2026-01-01T00:00:00Z","software":"","machine":{},"files":[]}"#;
    let mut manifest: Manifest = serde_json::from_str(text).expect("a manifest");
    manifest.files = vec![
        FileEntry::new(Role::Kernel, 3),
        FileEntry::new(Role::Disk, 300 << 10),
        FileEntry::new(Role::Disk, 1 << 40),
    ];
    manifest
}

fuzz_target!(|data: &[u8]| {
    let mut follows = Vec::new();
    drop(Writer::new(&mut follows, manifest()).expect("the manifest is right"));
    resume(&follows, data);
    follows.extend(data);
    for stream in [data, &follows] {
        let unpacked = unpack(stream);
        assert!(unpacked == unpack_in_parts(stream));
        if unpacked.is_some() {
            let mut checker = Checker::default();
            stream.chunks(7).try_for_each(|part| checker.push(part)).expect("it is whole");
            checker.finish().expect("it is whole");
        }
    }
});
