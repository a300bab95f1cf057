//! Appliances of any shape: a whole stream, and what follows a manifest that is right. Nothing is written
//! outside of a file, and what is taken as complete is so for whoever only looks at it going by, too.
#![no_main]

use std::collections::BTreeMap;
use std::io;

use berth_appliance::check::Checker;
use berth_appliance::manifest::{FileEntry, Manifest, Role};
use berth_appliance::read::{Place, Reader};
use berth_appliance::write::Writer;
use libfuzzer_sys::fuzz_target;

/// A file that is as large as it says, and takes what was written of it.
struct Sparse {
    size: u64,
    pieces: BTreeMap<u64, Vec<u8>>,
}

impl Place for Sparse {
    fn write_at(&mut self, at: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(at + bytes.len() as u64 <= self.size, "written outside of the file");
        self.pieces.insert(at, bytes.to_vec());
        Ok(())
    }

    fn read_at(&mut self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        assert!(at + buffer.len() as u64 <= self.size, "read outside of the file");
        let piece = self.pieces.get(&at).expect("it was written there");
        buffer.copy_from_slice(&piece[..buffer.len()]);
        Ok(())
    }
}

fn unpack(stream: &[u8]) -> bool {
    let Ok(mut reader) = Reader::new(stream) else { return false };
    let sizes = reader.manifest().files.iter().map(|file| file.size);
    let mut files: Vec<_> =
        sizes.map(|size| Sparse { size, pieces: BTreeMap::new() }).collect();
    let mut places: Vec<_> = files.iter_mut().map(|file| file as &mut dyn Place).collect();
    for _ in 0..places.len() {
        if reader.file(&mut places).is_err() {
            return false;
        }
    }
    reader.finish().is_ok()
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
    follows.extend(data);
    for stream in [data, &follows] {
        if unpack(stream) {
            let mut checker = Checker::default();
            stream.chunks(7).try_for_each(|part| checker.push(part)).expect("it is whole");
            checker.finish().expect("it is whole");
        }
    }
});
