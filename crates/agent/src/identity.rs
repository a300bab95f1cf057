//! A clone becomes a machine of its own: host name, machine id, hardware address.
//!
//! What is in files is changed where it is there; on a root that cannot be written, the machine id is laid
//! over its file. The keys of an ssh server stay: who connects has to decide about those.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_api::agent::message::Identify;
use rustix::fs::OFlags;
use rustix::mount::mount_bind;

use crate::boot::say;
use crate::network;

/// How long what was changed may wait before it is written to the disk.
const SYNC_AFTER: Duration = Duration::from_secs(1);
/// Most characters of a host name (Linux).
const HOSTNAME_MAX: usize = 64;

/// Makes this guest the machine that is named. The network card gets its address at once; an IP address
/// is asked for on another thread.
///
/// # Errors
/// What could not be changed; the rest was.
pub fn assume(identity: &Identify) -> Result<(), String> {
    check(identity)?;
    let mut failed = Vec::new();
    let mut note = |what: &str, result: io::Result<()>| {
        if let Err(error) = result {
            failed.push(format!("{what}: {error}"));
        }
    };
    let named = rustix::system::sethostname(identity.hostname.as_bytes());
    note("the host name", named.map_err(Into::into));
    let root = Path::new("/");
    note("the machine id", write_machine_id(root, &identity.machine_id));
    if let Err(error) = replace_if_there(&root.join("etc/hostname"), &identity.hostname) {
        // The kernel knows it; it is told again at each start.
        say(&format!("/etc/hostname keeps another name: {error}"));
    }
    note("the network card", network::become_another(identity.mac, identity.leave_address));
    // Nobody waits for the disk: after a power loss soon it is told again. What the clone was made for
    // comes first.
    std::thread::spawn(|| {
        std::thread::sleep(SYNC_AFTER);
        rustix::fs::sync();
    });
    match failed.is_empty() {
        true => Ok(()),
        false => Err(failed.join("; ")),
    }
}

/// Does what [`assume`] does, to no effect: the host name and the hardware address stay what they are,
/// and a file that nobody reads is replaced. A clone does it sooner then, since what its original has executed is
/// translated.
pub fn rehearse() {
    let name = rustix::system::uname();
    let _ = rustix::system::sethostname(name.nodename().to_bytes());
    let aside = Path::new("/var/tmp/berth-rehearsal");
    // Only a file that was not there.
    if File::create_new(aside).is_ok() {
        let _ = replace_if_there(aside, "rehearsal");
        let _ = fs::remove_file(aside);
    }
    let _ = network::stay_the_same();
}

/// These go into files that other programs read.
fn check(identity: &Identify) -> Result<(), String> {
    let name = &identity.hostname;
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if name.is_empty() || name.len() > HOSTNAME_MAX || !name.chars().all(good) {
        return Err(format!("`{}` is no host name", name.escape_default()));
    }
    let id = &identity.machine_id;
    let hex = |c: char| matches!(c, '0'..='9' | 'a'..='f');
    if id.len() != 32 || !id.chars().all(hex) {
        return Err(format!("`{}` is no machine id", id.escape_default()));
    }
    if identity.mac[0] & 1 != 0 || identity.mac == [0; 6] {
        return Err(format!("{:x?} is no address of a network card", identity.mac));
    }
    Ok(())
}

/// Where systemd has it, and D-Bus, unless one is a link to another.
fn write_machine_id(root: &Path, id: &str) -> io::Result<()> {
    let lay_over = |path: PathBuf| -> io::Result<()> {
        match replace_if_there(&path, id) {
            Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => {
                let aside = root.join("run/berth-machine-id");
                fs::write(&aside, format!("{id}\n"))?;
                Ok(mount_bind(&aside, &path)?)
            }
            result => result,
        }
    };
    lay_over(root.join("etc/machine-id"))?;
    lay_over(root.join("run/machine-id"))?;
    lay_over(root.join("var/lib/dbus/machine-id"))
}

/// Replaces what a file holds. A link leads to a file that is changed by itself. It is written in its
/// place, which costs a clone a third of the time of a new file and its renaming: what has the length of what
/// was there is there or not, and of another length is told again at each start.
fn replace_if_there(path: &Path, line: &str) -> io::Result<()> {
    let Ok(meta) = path.symlink_metadata() else { return Ok(()) };
    if !meta.is_file() {
        return Ok(());
    }
    let flags = OFlags::NOFOLLOW.bits().cast_signed();
    let file = File::options().write(true).custom_flags(flags).open(path)?;
    let line = format!("{line}\n");
    file.write_all_at(line.as_bytes(), 0)?;
    match meta.len() == line.len() as u64 {
        true => Ok(()),
        false => file.set_len(line.len() as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identify {
        Identify {
            hostname: "b-1".into(),
            machine_id: "0a".repeat(16),
            mac: [2, 0, 0, 0, 0, 1],
            leave_address: false,
        }
    }

    #[test]
    fn only_what_can_be_is_taken() {
        assert_eq!(check(&identity()), Ok(()));
        for bad in ["", "a b", "a\nb", "a/b", &"x".repeat(65)] {
            assert!(check(&Identify { hostname: bad.into(), ..identity() }).is_err(), "{bad}");
        }
        for bad in ["", "0a", &"0A".repeat(16), &"g".repeat(32), &"0".repeat(33)] {
            assert!(check(&Identify { machine_id: bad.into(), ..identity() }).is_err(), "{bad}");
        }
        assert!(check(&Identify { mac: [1, 0, 0, 0, 0, 1], ..identity() }).is_err());
        assert!(check(&Identify { mac: [0; 6], ..identity() }).is_err());
    }

    #[test]
    fn files_that_are_there_get_the_id() {
        let root = std::env::temp_dir().join(format!("berth-identity-{}", std::process::id()));
        fs::create_dir_all(root.join("etc")).unwrap();
        fs::create_dir_all(root.join("var/lib/dbus")).unwrap();
        fs::write(root.join("etc/machine-id"), "old\n").unwrap();
        std::os::unix::fs::symlink("/nowhere", root.join("var/lib/dbus/machine-id")).unwrap();
        let id = identity().machine_id;
        write_machine_id(&root, &id).unwrap();
        assert_eq!(fs::read_to_string(root.join("etc/machine-id")).unwrap(), format!("{id}\n"));
        assert_eq!(fs::read_dir(root.join("etc")).unwrap().count(), 1);
        assert!(!root.join("run").exists(), "what was not there is not made");
        let link = root.join("var/lib/dbus/machine-id").symlink_metadata().unwrap();
        assert!(link.is_symlink(), "a link stays one");
        fs::remove_dir_all(&root).unwrap();
    }
}
