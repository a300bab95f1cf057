//! Brings up the loopback and asks for an address on the first network card.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use rustix::mount::mount_bind;

use crate::boot::say;
use crate::dhcp::{self, Lease};
use crate::sys;

const CARD: &str = "eth0";
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// The waits between requests; the last answer is the network's silence.
const RETRIES: [Duration; 5] = [
    Duration::from_millis(300),
    Duration::from_millis(700),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
];

/// Starts bringing up the network; the address may come after this returns.
pub fn bring_up() {
    if let Err(error) = sys::link_up("lo") {
        say(&format!("the loopback stays down: {error}"));
    }
    if !Path::new("/sys/class/net").join(CARD).exists() {
        return;
    }
    let started = std::thread::Builder::new().spawn(|| {
        if let Err(error) = configure() {
            say(&format!("{CARD} has no address: {error}"));
        }
    });
    if let Err(error) = started {
        say(&format!("{CARD} stays down: {error}"));
    }
}

/// Gives the card another hardware address, and asks for an address on the network with it, which may
/// come after this returns; the one that it has stays until then, or goes at once. A card that is what it
/// should be stays so.
///
/// # Errors
/// The card refuses it.
pub fn become_another(mac: [u8; 6], leave_address: bool) -> io::Result<()> {
    if !Path::new("/sys/class/net").join(CARD).exists() || hardware_address()? == mac {
        return Ok(());
    }
    if leave_address {
        sys::clear_address(CARD)?;
    }
    if sys::set_hardware_address(CARD, mac).is_err() {
        // Some cards keep their address while they are up. Virtio's need not be emptied and filled
        // again.
        sys::link_down(CARD)?;
        let changed = sys::set_hardware_address(CARD, mac);
        sys::link_up(CARD)?;
        changed?;
    }
    std::thread::Builder::new().spawn(|| {
        if let Err(error) = configure() {
            say(&format!("{CARD} has no new address: {error}"));
        }
    })?;
    Ok(())
}

/// Gives the card the address that it has.
///
/// # Errors
/// There is no card, or it refuses.
pub fn stay_the_same() -> io::Result<()> {
    sys::set_hardware_address(CARD, hardware_address()?)
}

fn hardware_address() -> io::Result<[u8; 6]> {
    let mac = fs::read_to_string(Path::new("/sys/class/net").join(CARD).join("address"))?;
    Ok(dhcp::parse_mac(mac.trim()).ok_or(io::ErrorKind::InvalidData)?)
}

fn configure() -> io::Result<()> {
    sys::link_up(CARD)?;
    let directory = Path::new("/sys/class/net").join(CARD);
    let mac = hardware_address()?;
    let index = fs::read_to_string(directory.join("ifindex"))?;
    let index = index.trim().parse().map_err(|_| io::ErrorKind::InvalidData)?;
    let lease = dhcp::request(index, mac, &RETRIES)?;
    sys::set_address(CARD, lease.address, lease.netmask)?;
    if let Some(mtu) = lease.mtu {
        sys::set_mtu(CARD, mtu)?;
    }
    if let Some(router) = lease.router {
        sys::set_default_route(router)?;
    }
    write_resolv_conf(&lease);
    Ok(())
}

fn write_resolv_conf(lease: &Lease) {
    let mut text = String::new();
    if let Some(domain) = &lease.domain {
        text.push_str(&format!("search {domain}\n"));
    }
    for server in &lease.servers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if text.is_empty() {
        return;
    }
    // Over a link into a service that does not run here.
    if fs::symlink_metadata(RESOLV_CONF).is_ok_and(|meta| meta.is_symlink()) {
        let _ = fs::remove_file(RESOLV_CONF);
    }
    if fs::write(RESOLV_CONF, &text).is_ok() {
        return;
    }
    let aside = "/run/resolv.conf";
    let laid_over = fs::write(aside, &text).is_ok() && mount_bind(aside, RESOLV_CONF).is_ok();
    if !laid_over {
        say("the name servers could not be written to /etc/resolv.conf");
    }
}
