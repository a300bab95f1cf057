//! Sizes both sides of the agent protocol hold each other to.

/// The protocol's version; a side that meets another one says so and closes.
pub const PROTOCOL_VERSION: u32 = 5;

/// The vsock port on which the agent listens.
pub const AGENT_PORT: u32 = 1024;

/// Bytes of a frame's payload at most; a longer one is an error before any of it is stored.
pub const FRAME_PAYLOAD_BYTES_MAX: usize = 256 << 10;

/// Bytes of standard input or output put into one frame.
pub const DATA_CHUNK_BYTES: usize = 32 << 10;

/// Standard input the host may have under way before the agent grants more.
pub const STDIN_WINDOW_BYTES: usize = 256 << 10;

/// Bytes the agent queues towards the host before it stops reading a process's output.
pub const OUTPUT_QUEUE_BYTES: usize = 128 << 10;

/// Connections the agent serves at once.
pub const SESSIONS_MAX: usize = 64;

const _: () = assert!(DATA_CHUNK_BYTES <= FRAME_PAYLOAD_BYTES_MAX);
const _: () = assert!(DATA_CHUNK_BYTES <= STDIN_WINDOW_BYTES);
