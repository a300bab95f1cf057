//! Arbitrary requests to a server of a real folder, for fuzzing: nothing panics, and nothing beside the
//! folder changes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress};

use crate::memory::Memory;
use crate::virtio::chain::Chain;
use crate::virtio::fs::server::Server;
use crate::virtio::fs::wire::REQUEST_HEADER;
use crate::virtio::fuzz::{NoSink, memory};
use crate::virtio::interrupt::Interrupter;
use crate::virtio::queue::{QueueConfig, Virtqueue};

const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x1100;
const USED: u64 = 0x1200;
const READABLE: u64 = 0x10_0000;
const WRITABLE: u64 = 0x20_0000;
const REQUESTS_MAX: usize = 64;
const CANARY: &[u8] = b"nothing changes this";
/// Few, so that files are closed and opened again.
const FILES_MAX: usize = 8;
const WRITE: u32 = 16;
const FALLOCATE: u32 = 43;

/// A folder to be shared, beside something that is not, in memory where possible.
struct Site {
    site: PathBuf,
}

impl Site {
    fn new() -> Option<Self> {
        let places = [PathBuf::from("/dev/shm"), std::env::temp_dir()];
        let thread = std::thread::current().id();
        let name = format!("berth-fuzz-{}-{thread:?}", std::process::id());
        let site = places.iter().find(|place| place.is_dir())?.join(name);
        let made = Self { site };
        // Of a process that had this number before.
        let _ = fs::remove_dir_all(&made.site);
        fs::create_dir_all(made.share().join("folder/deeper")).ok()?;
        fs::write(made.canary(), CANARY).ok()?;
        fs::write(made.share().join("file"), [7; 5000]).ok()?;
        fs::write(made.share().join("folder/a"), "a").ok()?;
        std::os::unix::fs::symlink("../canary", made.share().join("link")).ok()?;
        std::os::unix::fs::symlink("/", made.share().join("folder/root")).ok()?;
        Some(made)
    }

    fn share(&self) -> PathBuf {
        self.site.join("share")
    }

    fn canary(&self) -> PathBuf {
        self.site.join("canary")
    }

    fn is_untouched(&self) -> bool {
        let mut names: Vec<_> = fs::read_dir(&self.site)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        names.sort();
        names == ["canary", "share"]
            && fs::read(self.canary()).is_ok_and(|bytes| bytes == CANARY)
            && is_single(&self.canary())
    }
}

fn is_single(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| std::os::unix::fs::MetadataExt::nlink(&meta) == 1)
}

impl Drop for Site {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.site);
    }
}

/// Requests, each: what it asks for, of which file, how much room there is for an answer, bytes of
/// arguments, arguments. Returns how many were answered without an error.
///
/// # Panics
/// When something beside the folder changes: what the fuzzer looks for.
pub fn requests(data: &[u8]) -> usize {
    let Some((settings, mut rest)) = data.split_first() else { return 0 };
    let (Some(memory), Some(site)) = (memory(&[]), Site::new()) else { return 0 };
    let read_only = settings & 1 != 0;
    let before = fs::read(site.share().join("file")).unwrap_or_default();
    let root = Server::open_root(&site.share());
    let server = root.and_then(|root| Server::new(root, read_only, FILES_MAX));
    let Ok(mut server) = server else { return 0 };
    let mut good = 0;
    for unique in 0..REQUESTS_MAX as u64 {
        let Some(([opcode, node, room, len], after)) = rest.split_first_chunk::<4>() else { break };
        let (arguments, after) = after.split_at(after.len().min(usize::from(*len)));
        rest = after;
        let opcode = u32::from(*opcode);
        let request = request(opcode, u64::from(*node % 16), unique, arguments);
        let chain = chain(&memory, &request, u32::from(*room) * 64);
        let Some(chain) = chain else { break };
        let answered = server.handle(&memory, &chain).unwrap_or_default();
        let mut error = [0; 4];
        // Inside the memory.
        let _ = memory.read_slice(&mut error, GuestAddress(WRITABLE + 4));
        good += usize::from(answered > 0 && error == [0; 4]);
    }
    drop(server);
    assert!(site.is_untouched(), "something beside the shared folder has changed");
    if read_only {
        let now = fs::read(site.share().join("file")).unwrap_or_default();
        assert!(now == before, "a file of a folder that is read-only has changed");
    }
    good
}

fn request(opcode: u32, node: u64, unique: u64, arguments: &[u8]) -> Vec<u8> {
    let mut arguments = arguments.to_vec();
    if opcode == FALLOCATE
        && let Some(len) = arguments.get_mut(16 + 3..24)
    {
        // Not all of the host's memory.
        len.fill(0);
    }
    if opcode == WRITE {
        arguments.resize(arguments.len().max(200), 0x55);
    }
    let mut request = ((REQUEST_HEADER + arguments.len()) as u32).to_le_bytes().to_vec();
    request.extend(opcode.to_le_bytes());
    request.extend(unique.to_le_bytes());
    request.extend(node.to_le_bytes());
    // Two of the guest's users.
    request.extend((unique as u32 % 2 * 1000).to_le_bytes());
    request.resize(REQUEST_HEADER, 0);
    request.extend(arguments);
    request
}

/// A chain of a request and so much room for its answer.
fn chain(memory: &Arc<Memory>, request: &[u8], room: u32) -> Option<Chain> {
    memory.write_slice(request, GuestAddress(READABLE)).ok()?;
    let descriptor = |address: u64, len: u32, flags: u16, next: u16| {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    };
    let more = u16::from(room > 0);
    let mut table = descriptor(READABLE, request.len() as u32, more, 1);
    table.extend(descriptor(WRITABLE, room, 2, 0));
    memory.write_slice(&table, GuestAddress(DESCRIPTORS)).ok()?;
    memory.write_slice(&[0, 0, 1, 0, 0, 0], GuestAddress(AVAILABLE)).ok()?;
    memory.write_slice(&[0xff; 16], GuestAddress(WRITABLE)).ok()?;
    let config = QueueConfig {
        size: 2,
        descriptors: DESCRIPTORS,
        available: AVAILABLE,
        used: USED,
        enabled: true,
    };
    let interrupts = Arc::new(Interrupter::new(1, Arc::new(NoSink)));
    let queue = Virtqueue::new(0, 2, &config, false, Arc::clone(memory), interrupts);
    queue.ok()?.pop().ok()?
}
