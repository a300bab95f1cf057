//! What the process of a clone is handed. The files that come with it are left out, so that nothing that
//! names one is taken.
#![no_main]

use std::io::Write;
use std::os::unix::net::UnixStream;

use berth_vmm::machine::Handed;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let (mut far, near) = UnixStream::pair().expect("a socket");
    // As it is, and behind a length that is right.
    let (as_it_is, data) = data.split_first().map_or((true, data), |(b, rest)| (b & 1 == 0, rest));
    let data = data.get(..64 << 10).unwrap_or(data);
    if !as_it_is {
        far.write_all(&(data.len() as u64).to_le_bytes()).expect("room");
    }
    far.write_all(data).expect("room");
    drop(far);
    if let Ok(handed) = Handed::receive(&near) {
        assert!(handed.memory.files.is_empty());
    }
});
