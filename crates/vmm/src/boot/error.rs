//! Why a guest could not be loaded.

use std::io;
use std::path::PathBuf;

use crate::limits::{CMDLINE_BYTES_MAX, KERNEL_BYTES_MAX};

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file could not be read.
    #[error("cannot read {what} {}", path.display())]
    Read {
        /// "the kernel", "the initrd" or "the module".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// The reason.
        source: io::Error,
    },
    /// A file is none that could be a kernel.
    #[error("the kernel {} is not a regular file of at most {} MiB", path.display(), KERNEL_BYTES_MAX >> 20)]
    NotAFile {
        /// The file.
        path: PathBuf,
    },
    /// No loader knows the format.
    #[error(
        "{} is no kernel that Berth can boot ({found}); it takes a Linux bzImage (vmlinuz), a \
         vmlinux or PVH ELF file, or a Multiboot 1 kernel", path.display()
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// What was found instead.
        found: String,
    },
    /// The format is known but the file breaks its rules.
    #[error("{} looks like a {format}, but {why}; the file may be damaged or incomplete", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// The format.
        format: &'static str,
        /// What is wrong.
        why: String,
    },
    /// The file is right but asks for what Berth does not have.
    #[error("{} is a {format} that cannot be booted here: {why}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// The format.
        format: &'static str,
        /// What it asks for.
        why: String,
    },
    /// It does not fit into guest memory.
    #[error(
        "{what} {} needs {need} bytes of guest memory at {at:#x}, but memory ends at {end:#x}; \
         give the machine more with --memory", path.display()
    )]
    NoRoom {
        /// "the kernel", "the initrd" or "the module".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Bytes.
        need: u64,
        /// Where they would go, or begin to be free.
        at: u64,
        /// The end of what there is.
        end: u64,
    },
    /// The command line is too long.
    #[error("the kernel command line has {len} bytes; at most {max} are possible for this kernel", max = CMDLINE_BYTES_MAX.min(*limit) - 1)]
    CmdlineTooLong {
        /// Its bytes.
        len: usize,
        /// What the kernel itself takes.
        limit: usize,
    },
    /// The command line has a zero byte.
    #[error("the kernel command line contains a zero byte")]
    CmdlineZero,
    /// More modules than the boot protocol's list has room for.
    #[error("{count} modules are more than the {max} that can be passed", max = crate::limits::MODULES_MAX)]
    TooManyModules {
        /// How many there were.
        count: usize,
    },
    /// Boot data could not be written; guest memory is smaller than anything that boots.
    #[error("boot data could not be written to guest memory at {at:#x}")]
    Memory {
        /// Where.
        at: u64,
    },
}
