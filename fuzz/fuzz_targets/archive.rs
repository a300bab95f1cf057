//! Tar streams of any shape: whatever they say, files appear in the destination only.
#![no_main]

use std::fs;

use berth_archive::unpack::{Taken, copy, extract};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let ground = tempfile::tempdir().expect("a directory for the test");
    let (inside, beside) = (ground.path().join("in"), ground.path().join("file"));
    fs::create_dir(&inside).expect("a directory in it");
    fs::write(&beside, "safe").expect("a file in it");
    // What fails is not of interest.
    let _ = extract(data, &inside, Taken::default());
    let _ = copy(data, &inside, Taken::default());
    assert_eq!(fs::read(&beside).expect("the file is there"), b"safe");
    assert_eq!(fs::read_dir(ground.path()).expect("the directory is there").count(), 2);
});
