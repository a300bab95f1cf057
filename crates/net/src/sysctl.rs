//! The few settings of the host's network stack that networks need.
//!
//! IPv4 forwarding is the host's as a whole. Whether we turned it on is noted in the directory of the
//! networks, with the boot it was in, so that it can be turned off with the last of them.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use crate::error::{Result, file};
use crate::store::replace;

const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";
const BOOT: &str = "/proc/sys/kernel/random/boot_id";
const NOTE: &str = ".forwarding";

/// Turns forwarding on.
pub(crate) fn forward(networks: &Path) -> Result<()> {
    let now = read(Path::new(FORWARD)).map_err(file("reading", Path::new(FORWARD)))?;
    if now != "0" {
        return Ok(());
    }
    let boot = read(Path::new(BOOT)).map_err(file("reading", Path::new(BOOT)))?;
    replace(&note(networks), boot.as_bytes())?;
    write(Path::new(FORWARD), "1")
}

/// Turns it off if it was turned on here, in this boot.
pub(crate) fn forward_no_more(networks: &Path) -> Result<()> {
    let noted = match read(&note(networks)) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        noted => noted.map_err(file("reading", &note(networks)))?,
    };
    if read(Path::new(BOOT)).is_ok_and(|boot| boot == noted) {
        write(Path::new(FORWARD), "0")?;
    }
    fs::remove_file(note(networks)).map_err(file("removing", &note(networks)))
}

/// The host has no IPv6 on that interface: what comes over it could reach services of the host that
/// the rules for IPv4 do not let it reach.
pub(crate) fn without_ipv6(interface: &str) -> Result<()> {
    let path = PathBuf::from(format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6"));
    match path.exists() {
        true => write(&path, "1"),
        // A kernel without IPv6.
        false => Ok(()),
    }
}

fn note(networks: &Path) -> PathBuf {
    networks.join(NOTE)
}

fn read(path: &Path) -> io::Result<String> {
    Ok(fs::read_to_string(path)?.trim().to_owned())
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value).map_err(file("writing", path))
}
