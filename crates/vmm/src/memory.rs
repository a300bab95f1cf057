//! Guest physical memory.

use vm_memory::bitmap::AtomicBitmap;

/// Remembers which bytes of a region were written by devices.
pub type CodeBitmap = AtomicBitmap;

/// Guest physical memory; every write through its accessors is marked in the bitmap.
pub type Memory = vm_memory::GuestMemoryMmap<CodeBitmap>;
