//! Kernels and modules of any shape.
#![no_main]

use std::io::Write;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut kernel = tempfile::NamedTempFile::new().expect("a temporary file");
    kernel.write_all(data).expect("writing a temporary file");
    let ram = berth_vmm::memory::GuestRam::new(32 << 20).expect("32 MiB of memory");
    let module =
        berth_vmm::boot::Module { path: kernel.path().to_owned(), args: String::from("x") };
    let files = berth_vmm::boot::BootFiles {
        kernel: kernel.path(),
        modules: std::slice::from_ref(&module),
        cmdline: "quiet",
    };
    // Whether it loads does not matter; that it does not panic does.
    let _ = berth_vmm::boot::load(&ram, &files);
});
