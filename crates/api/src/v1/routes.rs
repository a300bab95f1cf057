//! Paths, and the names of protocols that connections are upgraded to.

/// Everything begins with this.
pub const PREFIX: &str = "/berth/v1";
/// A connection becomes a stream of the agent's protocol.
pub const UPGRADE_AGENT: &str = "berth-agent";
/// A connection becomes a console: bytes in both directions.
pub const UPGRADE_CONSOLE: &str = "berth-console";

/// The path of a machine, or of something it has or does: `start`, `logs`.
#[must_use]
pub fn machine(name: &str, what: Option<&str>) -> String {
    match what {
        Some(what) => format!("{PREFIX}/machines/{name}/{what}"),
        None => format!("{PREFIX}/machines/{name}"),
    }
}
