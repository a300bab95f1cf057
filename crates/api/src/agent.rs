//! The protocol between the host and the agent inside a virtual machine.
//!
//! A connection (vsock port [`limits::AGENT_PORT`]) carries frames both ways:
//!
//! ```text
//!  0        4      5
//!  +--------+------+-----------------+
//!  | length | kind | payload         |     length: u32 little endian, bytes of the payload alone
//!  +--------+------+-----------------+     kind:   u8, see `message`
//! ```
//!
//! Control payloads are JSON, data payloads raw bytes. Both sides send `Hello` first. After that the
//! host may ask any number of `Ping`, `Time` and `Shutdown`; or one `Exec`, which turns the
//! connection into the session of that process until `Exit`:
//!
//! ```text
//!  host                                agent
//!   | -- Hello ------------------------> |
//!   | <------------------------ Hello -- |
//!   | -- Exec -------------------------> |
//!   | <------------- Started | Error -- |
//!   | -- Stdin, StdinEof, Resize, Signal |   Stdin only within the credit left
//!   | <---- Stdout, Stderr, StdinCredit  |
//!   | <------------------------- Exit -- |   last frame; the agent closes
//! ```
//!
//! Back pressure: towards the host the stream itself (the agent stops reading the process's output
//! when the stream is full); towards the guest a credit window of [`limits::STDIN_WINDOW_BYTES`], so
//! that a process that does not read its input delays neither a resize nor a signal.

pub mod client;
pub mod copy;
pub mod frame;
pub mod limits;
pub mod message;
