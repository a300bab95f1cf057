//! Paths, and the names of protocols that connections are upgraded to.

/// Everything begins with this.
pub const PREFIX: &str = "/berth/v1";
/// A connection becomes a stream of the agent's protocol.
pub const UPGRADE_AGENT: &str = "berth-agent";
/// A connection becomes a console: bytes in both directions.
pub const UPGRADE_CONSOLE: &str = "berth-console";
/// A connection becomes lines of JSON about a machine that is run.
pub const UPGRADE_RUN: &str = "berth-run";

/// The path of an image.
#[must_use]
pub fn image(name: &str) -> String {
    format!("{PREFIX}/images/{}", part(name))
}

/// What is answered to whoever asks for a path that there is not.
#[must_use]
pub fn nothing_at(path: &str) -> String {
    format!("there is nothing at {path}")
}

/// The path of a network.
#[must_use]
pub fn network(name: &str) -> String {
    format!("{PREFIX}/networks/{}", part(name))
}

/// The path of a snapshot of a machine.
#[must_use]
pub fn snapshot(name: &str, tag: &str) -> String {
    format!("{}/{}", machine(name, Some("snapshots")), part(tag))
}

/// A word as it can be in a path or a query: what cannot be in a name is written with `%`.
#[must_use]
pub fn part(name: &str) -> String {
    let byte = |byte| match byte {
        b'-' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => char::from(byte).to_string(),
        byte => format!("%{byte:02X}"),
    };
    name.bytes().map(byte).collect()
}

/// The path of a machine, or of something it has or does: `start`, `logs`. What cannot be in a name is
/// written with `%`, so that it stays one.
#[must_use]
pub fn machine(name: &str, what: Option<&str>) -> String {
    let name = part(name);
    match what {
        Some(what) => format!("{PREFIX}/machines/{name}/{what}"),
        None => format!("{PREFIX}/machines/{name}"),
    }
}
