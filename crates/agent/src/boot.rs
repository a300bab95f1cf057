//! From the kernel's hand-over to a mounted root: interfaces, modules, root device, switch.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Dir, FileType};
use rustix::mount::{MountFlags, mount, mount_move};

use crate::cmdline::Share;

/// How long the root device may take to appear after the modules are loaded.
const ROOT_DEVICE_WAIT: Duration = Duration::from_secs(10);
const ROOT_DEVICE_POLL: Duration = Duration::from_millis(2);
const NEW_ROOT: &str = "/newroot";
const MODULE_LIST: &str = "/modules/order";
/// A guest without shared folders starts sooner without these.
const SHARE_MODULES: [&str; 2] = ["fuse.ko", "virtiofs.ko"];
/// And without this one where there is no such device.
const BALLOON_MODULE: &str = "virtio_balloon.ko";
/// A file for each virtio device has its type.
const VIRTIO_DEVICES: &str = "/sys/bus/virtio/devices";
const BALLOON_TYPE: &str = "0x0005";

/// Why the guest could not be brought up.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file system could not be mounted.
    #[error("mounting {what} on {on} failed")]
    Mount {
        /// Device or kind.
        what: String,
        /// Where.
        on: String,
        /// Why.
        source: io::Error,
    },
    /// A module of the initramfs could not be loaded.
    #[error("loading the module {path} failed")]
    Module {
        /// Its file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The disk is not there.
    #[error("no device {0} appeared; is the root disk attached?")]
    NoRootDevice(String),
    /// The move into the root file system failed.
    #[error("moving into the root file system failed at {step}")]
    Switch {
        /// Which part of it.
        step: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// Writes a line for people on the console. The host's boot benchmark waits for the one that says
/// `init`.
pub fn say(text: &str) {
    let line = format!("berth: {text}\n");
    let console = File::options().write(true).open("/dev/console");
    let written = console.and_then(|mut console| console.write_all(line.as_bytes()));
    if written.is_err() {
        eprint!("{line}");
    }
}

/// Mounts what the rest needs to see the kernel: `/dev`, `/proc`, `/sys`.
pub fn mount_kernel_interfaces() -> Result<(), BootError> {
    let plain = MountFlags::NOSUID | MountFlags::NOEXEC;
    mount_new("devtmpfs", "/dev", MountFlags::NOSUID, "mode=0755")?;
    mount_new("proc", "/proc", plain | MountFlags::NODEV, "")?;
    mount_new("sysfs", "/sys", plain | MountFlags::NODEV, "")
}

/// Loads the modules the host put into the initramfs, in the order it computed; those for shared
/// folders only where there are some, and likewise that for a balloon.
pub fn load_modules(shares: bool) -> Result<(), BootError> {
    let order = match fs::read_to_string(MODULE_LIST) {
        Ok(order) => order,
        // A kernel with everything built in has no list.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(BootError::Module { path: MODULE_LIST.into(), source }),
    };
    let wanted = |name: &&str| !name.is_empty() && (shares || !SHARE_MODULES.contains(name));
    for name in order.lines().filter(wanted) {
        // The bus is there by now.
        if name == BALLOON_MODULE && !has_balloon() {
            continue;
        }
        let path = Path::new("/modules").join(name);
        let loaded = File::open(&path)
            .and_then(|file| Ok(rustix::system::finit_module(&file, c"", 0)?))
            .or_else(|error| match error.raw_os_error() {
                // EEXIST: loaded already; ENODEV: the driver found no device and wants none.
                Some(libc::EEXIST | libc::ENODEV) => Ok(()),
                _ => Err(error),
            });
        loaded.map_err(|source| BootError::Module { path, source })?;
    }
    Ok(())
}

fn has_balloon() -> bool {
    let devices = fs::read_dir(VIRTIO_DEVICES).into_iter().flatten().flatten();
    let types = devices.filter_map(|device| fs::read_to_string(device.path().join("device")).ok());
    types.into_iter().any(|text| text.trim() == BALLOON_TYPE)
}

/// Mounts the root disk and makes it `/`; the initramfs is emptied.
pub fn enter_root(device: &str, writable: bool) -> Result<(), BootError> {
    let began = Instant::now();
    while !Path::new(device).exists() {
        if began.elapsed() > ROOT_DEVICE_WAIT {
            return Err(BootError::NoRootDevice(device.to_owned()));
        }
        std::thread::sleep(ROOT_DEVICE_POLL);
    }
    let failed = |what: &str, on: &str| {
        let (what, on) = (what.to_owned(), on.to_owned());
        move |source: io::Error| BootError::Mount { what, on, source }
    };
    fs::create_dir_all(NEW_ROOT).map_err(failed("a directory", NEW_ROOT))?;
    let flags = if writable { MountFlags::empty() } else { MountFlags::RDONLY };
    mount(device, NEW_ROOT, "ext4", flags, None)
        .map_err(|errno| failed(device, NEW_ROOT)(errno.into()))?;
    for from in ["/dev", "/proc", "/sys"] {
        let to = format!("{NEW_ROOT}{from}");
        if !Path::new(&to).is_dir() {
            fs::create_dir(&to).map_err(failed("a directory", &to))?;
        }
        mount_move(from, &to).map_err(|errno| failed(from, &to)(errno.into()))?;
    }
    switch_root()
}

fn switch_root() -> Result<(), BootError> {
    let failed = |step| move |source| BootError::Switch { step, source };
    let failed_os =
        |step| move |errno: rustix::io::Errno| BootError::Switch { step, source: errno.into() };
    let old_root = File::open("/").map_err(failed("opening the initramfs"))?;
    std::env::set_current_dir(NEW_ROOT).map_err(failed("entering it"))?;
    // The initramfs lives in memory; what stays in it is lost to the guest. Its own file keeps
    // running: an open program outlives its name.
    let device =
        rustix::fs::fstat(&old_root).map_err(failed_os("looking at the initramfs"))?.st_dev;
    remove_all(&old_root, device).map_err(failed_os("emptying the initramfs"))?;
    mount_move(".", "/").map_err(failed_os("moving the mount"))?;
    rustix::process::chroot(".").map_err(failed_os("chroot"))?;
    std::env::set_current_dir("/").map_err(failed("entering /"))
}

/// Removes everything below `directory` that is on the same file system.
fn remove_all(directory: &File, device: u64) -> rustix::io::Result<()> {
    use rustix::fs::{AtFlags, Mode, OFlags, openat, statat, unlinkat};
    for entry in Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        let stat = statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        if stat.st_dev != device {
            continue;
        }
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let below = openat(directory, name, flags, Mode::empty())?;
            remove_all(&File::from(below), device)?;
            // The mount point of the new root stays busy; that is fine.
            let _ = unlinkat(directory, name, AtFlags::REMOVEDIR);
        } else {
            unlinkat(directory, name, AtFlags::empty())?;
        }
    }
    Ok(())
}

/// Mounts what programs expect beyond the kernel's own interfaces. A root file system that lacks
/// one of the places is left as it is: not every image wants them all.
pub fn finish_mounts(root_is_writable: bool) {
    let plain = MountFlags::NOSUID | MountFlags::NODEV;
    let mut wanted = vec![
        (
            "devpts",
            "/dev/pts",
            MountFlags::NOSUID | MountFlags::NOEXEC,
            "mode=0620,gid=5,ptmxmode=0666",
        ),
        ("tmpfs", "/dev/shm", plain, "mode=1777"),
        ("tmpfs", "/run", plain, "mode=0755"),
        ("cgroup2", "/sys/fs/cgroup", plain | MountFlags::NOEXEC, ""),
    ];
    if !root_is_writable {
        wanted.push(("tmpfs", "/tmp", plain, "mode=1777"));
    }
    for (kind, on, flags, options) in wanted {
        if let Err(error) = mount_new(kind, on, flags, options) {
            let cause = std::error::Error::source(&error).map(ToString::to_string);
            say(&format!("{error}: {}", cause.unwrap_or_default()));
        }
    }
    for (link, target) in [
        ("/dev/fd", "/proc/self/fd"),
        ("/dev/stdin", "/proc/self/fd/0"),
        ("/dev/stdout", "/proc/self/fd/1"),
        ("/dev/stderr", "/proc/self/fd/2"),
    ] {
        let _ = std::os::unix::fs::symlink(target, link);
    }
}

/// Mounts the folders of the host. A guest that lacks one does not start: what runs in it could write
/// to the wrong place.
pub fn mount_shares(shares: &[Share]) -> Result<(), BootError> {
    for share in shares {
        let (tag, path) = (share.tag.as_str(), share.path.as_str());
        let failed = |source: io::Error| BootError::Mount {
            what: format!("the shared folder {tag}"),
            on: path.to_owned(),
            source,
        };
        fs::create_dir_all(path).map_err(failed)?;
        let flags = if share.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
        mount(tag, path, "virtiofs", flags, None).map_err(|errno| failed(errno.into()))?;
    }
    Ok(())
}

/// Sets the host name; a name the kernel refuses is said and left.
pub fn set_hostname(name: &str) {
    if let Err(error) = rustix::system::sethostname(name.as_bytes()) {
        say(&format!("cannot set the host name to {name}: {error}"));
    }
}

fn mount_new(kind: &str, on: &str, flags: MountFlags, options: &str) -> Result<(), BootError> {
    // Where the directory cannot be made the mount says why.
    let _ = fs::create_dir_all(on);
    let options = CString::new(options).unwrap_or_default();
    mount(kind, on, kind, flags, Some(options.as_c_str())).map_err(|errno| BootError::Mount {
        what: kind.to_owned(),
        on: on.to_owned(),
        source: errno.into(),
    })
}
