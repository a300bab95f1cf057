//! Configurations of machines, which are copied from elsewhere and edited by hand.
#![no_main]

use std::sync::OnceLock;

use berth_daemon::folder::Folder;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static DIRECTORY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let directory = DIRECTORY.get_or_init(|| tempfile::tempdir().expect("a directory"));
    let folder = Folder::at(directory.path());
    std::fs::write(folder.file("vm.toml"), data).expect("room");
    if let Err(error) = folder.config() {
        assert!(!error.to_string().is_empty());
    }
});
