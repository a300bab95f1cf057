//! `berth zygote`: a process that becomes those of running clones, by copying itself. They share with it
//! what each would have to read, relocate and make anew.
//!
//! The daemon sends a [`Begin`] for each on the socket that is its standard input, with what is to be the
//! standard input, output and error of the copy, and a pipe on which it says when it knows of it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use berth_api::vmm::{Begin, Begun};
use berth_daemon::zygote::{receive, send};
use berth_vmm::fork::{Fork, fork, show_words};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{WaitId, WaitIdOptions, waitid};

/// Makes copies until nobody asks any more, which gives `None`, or this is one.
///
/// # Errors
/// The socket cannot be read.
pub fn serve() -> io::Result<Option<Begin>> {
    berth_vmm::machine::warm_up();
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let words = ["berth", "zygote"].map(OsStr::new);
    // Without that it shows what it was started with.
    let _ = show_words(&stat, words.into_iter());
    let mut copies: Vec<OwnedFd> = Vec::new();
    loop {
        let socket = rustix::stdio::stdin();
        let mut waited: Vec<_> = copies.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        waited.push(PollFd::from_borrowed_fd(socket, PollFlags::IN));
        match poll(&mut waited, None) {
            Err(rustix::io::Errno::INTR) => continue,
            polled => polled?,
        };
        let ready: Vec<bool> = waited.iter().map(|fd| !fd.revents().is_empty()).collect();
        let (asked, ended) = ready.split_last().map_or((true, &[][..]), |(a, e)| (*a, e));
        let mut ended = ended.iter();
        // They are nobody else's to wait for.
        copies.retain(|copy| !ended.next().is_some_and(|ended| *ended) || !has_ended(copy.as_fd()));
        if !asked {
            continue;
        }
        let Some((begin, given)) = receive::<Begin>(socket)? else { return Ok(None) };
        match copy(&begin, &given) {
            Ok(Some((pid, process))) => {
                let begun = Begun::Pid(pid);
                send(socket, &begun, &[process.as_fd()])?;
                copies.push(process);
            }
            Ok(None) => {
                drop((copies, given));
                let (root, folder) = (begin.root.as_os_str(), begin.folder.as_os_str());
                let [berth, option, vmm] = ["berth", "--root", "vmm"].map(OsStr::new);
                // What such a process would have been started with.
                let _ = show_words(&stat, [berth, option, root, vmm, folder].into_iter());
                return Ok(Some(begin));
            }
            Err(error) => send(socket, &Begun::Failed(error.to_string()), &[])?,
        }
    }
}

/// Waits for a copy that has ended.
fn has_ended(copy: BorrowedFd<'_>) -> bool {
    !matches!(waitid(WaitId::PidFd(copy), WaitIdOptions::EXITED | WaitIdOptions::NOHANG), Ok(None))
}

/// A copy, with its standard input, output and error; `None` in it.
fn copy(begin: &Begin, given: &[OwnedFd]) -> io::Result<Option<(u32, OwnedFd)>> {
    let [stdin, stdout, stderr, go] = given else {
        return Err(io::Error::other(format!("{} descriptors for a process", given.len())));
    };
    match fork()? {
        Fork::Parent(pid, process) => {
            Ok(Some((pid.as_raw_nonzero().get().cast_unsigned(), process)))
        }
        Fork::Child => {
            let placed = rustix::stdio::dup2_stdin(stdin)
                .and_then(|()| rustix::stdio::dup2_stdout(stdout))
                .and_then(|()| rustix::stdio::dup2_stderr(stderr));
            if let Err(error) = placed {
                // Nobody hears it but whoever waits for a greeting.
                eprintln!("berth: the process of {} is not begun: {error}", begin.folder.display());
                std::process::exit(1);
            }
            // The daemon knows of it. If it never does, or is gone, there is nobody to begin it for.
            match rustix::io::retry_on_intr(|| rustix::io::read(go, &mut [0])) {
                Ok(1) => Ok(None),
                _ => std::process::exit(1),
            }
        }
    }
}
