//! How files are copied: the agent's own program is started as any other, and reads or writes a tar
//! stream as its standard input or output. So a copy has the flow control of a process, and an agent
//! that does not know it says that there is no such program.
//!
//! ```text
//! berth:agent pack PATH                                 writes PATH as a tar stream
//! berth:agent unpack [--owners] [--extract] PATH        reads one
//! ```
//!
//! Status 0: done; each line of the standard error is about something that was left out. Another status:
//! its last line says why.

/// The agent's own program, as the first word of a command.
pub const PROGRAM: &str = "berth:agent";
/// Writes a file or a folder.
pub const PACK: &str = "pack";
/// Reads what the host's `pack` made, to the destination as `cp -r` has it.
pub const UNPACK: &str = "unpack";
/// Owners and groups as the stream says.
pub const OWNERS: &str = "--owners";
/// Any stream, into a directory that is there.
pub const EXTRACT: &str = "--extract";
