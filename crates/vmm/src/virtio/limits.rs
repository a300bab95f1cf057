//! Named limits of the virtio devices.

use std::time::Duration;

/// Descriptors in one chain, indirect ones included.
pub const CHAIN_DESCRIPTORS_MAX: usize = 1024;
/// Queues of one device.
pub const QUEUES_MAX: usize = 8;
/// Chains taken from one queue before the worker looks at its other events.
pub const CHAINS_PER_EVENT: usize = 256;

/// Warnings about broken drivers that a process logs; the guest could cause any number.
pub const GUEST_WARNINGS_MAX: u32 = 32;

/// Requests of one disk that are under way at the same time.
pub const BLOCK_REQUESTS_MAX: usize = 256;
/// Threads per disk where the kernel refuses io_uring, and for disks that are not raw.
pub const BLOCK_THREADS: usize = 4;
/// How long an image that was written to is idle before it is written out without a flush.
pub const BLOCK_IDLE_FLUSH: Duration = Duration::from_secs(1);
/// Bytes of a request that are on their way between an image and the guest's memory.
pub const BLOCK_BOUNCE_BYTES: usize = 512 * 1024;
/// Sectors of one discard or write-zeroes request (16 MiB).
pub const BLOCK_DISCARD_SECTORS_MAX: u32 = 32 * 1024;

/// Largest Ethernet frame passed in either direction.
pub const NET_FRAME_MAX: usize = 65_536;
/// Bytes towards a stream backend that wait for its socket before the guest's queue is left alone.
pub const NET_TRANSMIT_BACKLOG: usize = 512 * 1024;
/// Bytes read from a stream backend at a time.
pub const NET_RECEIVE_BUFFER: usize = 512 * 1024;

/// Random bytes for one request.
pub const RNG_REQUEST_MAX: u64 = 64 * 1024;

/// Pages that one request puts into the balloon; what is beyond stays the guest's.
pub const BALLOON_REQUEST_PAGES_MAX: u64 = 16 * 1024;

/// Bytes of guest output that wait for the console's reader.
pub const CONSOLE_BACKLOG: usize = 64 * 1024;

/// Open vsock connections, pending ones included.
pub const VSOCK_CONNECTIONS_MAX: usize = 1024;
/// Bytes the guest may have under way on one vsock connection.
pub const VSOCK_BUFFER: u32 = 256 * 1024;
/// Payload of one vsock packet to the guest.
pub const VSOCK_PACKET_MAX: u32 = 64 * 1024;
/// Resets for unknown connections that wait for a buffer of the guest; more are dropped.
pub const VSOCK_RESETS_MAX: usize = 256;
/// Host connections that have not said `CONNECT <port>` yet.
pub const VSOCK_HANDSHAKES_MAX: usize = 64;
/// Bytes of the `CONNECT <port>` line.
pub const VSOCK_HANDSHAKE_LINE: usize = 32;
/// Calls of `connect` that wait for the device to take them.
pub const VSOCK_CALLS_MAX: usize = 256;

/// Bytes of one read or write of a file in a shared folder.
pub const FS_TRANSFER_MAX: u32 = 1 << 20;
/// Bytes of a request's arguments: two names, or a name and the target of a link.
pub const FS_ARGUMENTS_MAX: usize = 8 << 10;
/// Files forgotten by one request.
pub const FS_FORGETS_MAX: usize = 4096;
/// Bytes of entries of a folder in one answer.
pub const FS_FOLDER_BYTES_MAX: usize = 64 << 10;
/// Bytes that one request copies on the host.
pub const FS_COPY_MAX: u64 = 16 << 20;
/// Files of a shared folder that the guest may know at the same time.
pub const FS_NODES_MAX: usize = 1 << 20;
/// Bytes of the path of one that is not open.
pub const FS_PATH_BYTES_MAX: usize = 1024;
/// Bytes of the paths of all of them.
pub const FS_PATHS_BYTES_MAX: usize = 64 << 20;
/// Descriptors for one shared folder, where the system gives so many: a third for files that the
/// guest has open, the rest for those that it knows.
pub const FS_FILES_MAX: u64 = 32 << 10;
/// Descriptors for one shared folder at least.
pub const FS_FILES_MIN: u64 = 128;
/// Descriptors left for everything else in the process.
pub const FS_FILES_RESERVED: u64 = 512;

const _: () = assert!(VSOCK_PACKET_MAX <= VSOCK_BUFFER);
const _: () = assert!(BLOCK_REQUESTS_MAX <= u16::MAX as usize);
const _: () = assert!(NET_FRAME_MAX + 4 <= NET_RECEIVE_BUFFER);
const _: () = assert!(FS_TRANSFER_MAX as usize / 4096 + 4 <= CHAIN_DESCRIPTORS_MAX);
