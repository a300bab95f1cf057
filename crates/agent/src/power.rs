//! The end of the guest: in order, or at once when the agent itself has failed.

use std::convert::Infallible;
use std::ffi::CString;
use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount_remount, unmount};
use rustix::system::{RebootCommand, reboot};

use crate::boot::say;
use crate::reaper::Reaper;
use crate::sys;

/// How long processes have between SIGTERM and SIGKILL.
const TERMINATE_GRACE: Duration = Duration::from_secs(3);
/// How long an init of the image's own may take before we switch off ourselves.
const FOREIGN_INIT_GRACE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(5);

/// The right to switch the machine off.
pub struct Power {
    reaper: Arc<Reaper>,
    is_init: bool,
    /// Locked by the first who ends the machine, and never given back.
    ending: Mutex<()>,
}

impl Power {
    /// For the process that may end the machine.
    pub fn new(reaper: Arc<Reaper>) -> Self {
        Self { reaper, is_init: std::process::id() == 1, ending: Mutex::default() }
    }

    /// Ends all processes, writes everything out, switches off.
    pub fn off(&self) -> ! {
        // systemd: SIGRTMIN+4 powers off, SIGRTMIN+5 reboots.
        self.end(RebootCommand::PowerOff, 4)
    }

    /// The same, and starts again.
    pub fn reboot(&self) -> ! {
        self.end(RebootCommand::Restart, 5)
    }

    fn end(&self, command: RebootCommand, init_signal: i32) -> ! {
        // The button and the host may both want it.
        let _first = self.ending.lock();
        if self.is_init {
            self.end_processes();
        } else {
            let _ = sys::kill(1, sys::real_time_signal(init_signal));
            std::thread::sleep(FOREIGN_INIT_GRACE);
        }
        rustix::fs::sync();
        unmount_all();
        finally(command)
    }

    fn end_processes(&self) {
        for signal in [libc::SIGTERM, libc::SIGKILL] {
            // Nobody to send it to is the usual case.
            let _ = sys::kill(-1, signal);
            let _ = sys::kill(-1, libc::SIGCONT);
            let began = Instant::now();
            while began.elapsed() < TERMINATE_GRACE {
                if self.reaper.has_no_children() {
                    return;
                }
                std::thread::sleep(POLL);
            }
        }
    }
}

/// Gives the place of process 1 to the image's own init; returns in the agent, which goes on as its
/// child. Must be called before any thread is started.
pub fn hand_over(program: &str) -> io::Result<()> {
    if sys::fork()? {
        rustix::process::setsid()?;
        return Ok(());
    }
    let error = match exec(program) {
        Ok(never) => match never {},
        Err(error) => error,
    };
    Err(io::Error::new(error.kind(), format!("starting the init {program}: {error}")))
}

fn exec(program: &str) -> io::Result<Infallible> {
    use std::os::unix::process::CommandExt;
    Err(std::process::Command::new(program).exec())
}

/// Resets the machine when the main thread of process 1 panics; the host sees that as a failure.
pub fn reset_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        say(&format!("agent: {panic}"));
        // A session that panics closes its own connection only.
        if std::thread::current().name() == Some("main") {
            reset();
        }
    }));
}

/// Resets at once.
pub fn reset() -> ! {
    rustix::fs::sync();
    finally(RebootCommand::Restart)
}

fn finally(command: RebootCommand) -> ! {
    if let Err(errno) = reboot(command) {
        say(&format!("cannot end the machine: {errno}"));
    }
    loop {
        std::thread::park();
    }
}

/// Unmounts file systems on devices, the latest first, and makes the root read-only.
fn unmount_all() {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let on_devices = mounts.lines().rev().filter(|line| line.starts_with("/dev/"));
    for place in on_devices.filter_map(|line| line.split(' ').nth(1)).filter(|&on| on != "/") {
        if let Err(errno) = unmount(place, UnmountFlags::empty()) {
            say(&format!("unmounting {place}: {errno}"));
        }
    }
    // A ramfs root refuses, and has nothing to lose.
    let _ = mount_remount("/", MountFlags::RDONLY, CString::default().as_c_str());
}
