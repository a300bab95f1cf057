//! Named limits of the machine.

/// Least guest memory: enough for a small kernel above 1 MiB.
pub const MEMORY_BYTES_MIN: u64 = 4 << 20;
/// Most vCPUs of a machine.
pub const CPUS_MAX: u32 = 16;
/// Bytes of console output kept while the terminal, file or socket does not take them; then the
/// guest waits.
pub const CONSOLE_OUTPUT_BYTES_MAX: usize = 64 << 10;
/// Bytes of console input kept for the guest; then the source is not read.
pub const CONSOLE_INPUT_BYTES_MAX: usize = 4 << 10;
/// Bytes of the kernel command line with its final zero, as Linux has it (COMMAND_LINE_SIZE).
pub const CMDLINE_BYTES_MAX: usize = 2048;
/// Largest kernel file that is read.
pub const KERNEL_BYTES_MAX: u64 = 1 << 30;
/// Most Multiboot or PVH modules.
pub const MODULES_MAX: usize = 64;

const _: () = assert!(MEMORY_BYTES_MIN.is_multiple_of(4096));
const _: () = assert!(CPUS_MAX < 255, "the I/O APIC takes the next id, 255 is the broadcast");
