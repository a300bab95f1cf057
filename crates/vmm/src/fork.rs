//! A process that copies itself: whoever needs many that are alike makes one, and lets it make the others,
//! which share with it what it has read and made so far.

use std::ffi::OsStr;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Who goes on.
#[derive(Debug)]
pub enum Fork {
    /// The copy.
    Child,
    /// Whoever was copied: the number of the copy, and a descriptor of it.
    Parent(Pid, OwnedFd),
}

/// Copies this process, which has one thread.
///
/// # Errors
/// It has others, or the system's.
pub fn fork() -> io::Result<Fork> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with several threads is not copied"));
    }
    // SAFETY: there is no other thread, which could hold a lock that the copy waits for.
    let pid = unsafe { libc::fork() };
    match pid {
        0 => Ok(Fork::Child),
        pid => {
            let pid = Pid::from_raw(pid).filter(|_| pid > 0);
            let pid = pid.ok_or_else(io::Error::last_os_error)?;
            // It has not been waited for, so this is that one.
            match pidfd_open(pid, PidfdFlags::empty()) {
                Ok(process) => Ok(Fork::Parent(pid, process)),
                Err(error) => {
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                    let _ =
                        rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
                    Err(error.into())
                }
            }
        }
    }
}

/// Shows others these words as the arguments of this process, as far as there is room where its real ones
/// are. `stat` is `/proc/self/stat`.
///
/// # Errors
/// It is not that.
pub fn show_words<'a>(stat: &str, words: impl Iterator<Item = &'a OsStr>) -> io::Result<()> {
    let (begin, end) = place_of_words(stat).ok_or(io::ErrorKind::InvalidData)?;
    let mut shown = Vec::new();
    for word in words {
        shown.extend(word.as_bytes());
        shown.push(0);
    }
    shown.resize(end - begin, 0);
    // What would be cut off ends here, too.
    if let Some(last) = shown.last_mut() {
        *last = 0;
    }
    // SAFETY: the kernel says that the arguments are there, in memory that is writable and used by nobody:
    // the standard library has copied them, or reads them only in `args`, which is not called any more,
    // and would find strings that end here, too.
    unsafe { std::ptr::copy_nonoverlapping(shown.as_ptr(), begin as *mut u8, shown.len()) };
    Ok(())
}

/// Fields 48 and 49 (Linux, proc_pid_stat(5)): where the arguments begin and end.
fn place_of_words(stat: &str) -> Option<(usize, usize)> {
    // The second one is a name in parentheses, in which there may be anything.
    let rest = stat.get(stat.rfind(')')? + 1..)?;
    let mut fields = rest.split_ascii_whitespace().skip(48 - 3);
    let mut next = || fields.next()?.parse::<usize>().ok();
    let (begin, end) = (next()?, next()?);
    (begin != 0 && begin < end && end - begin < 1 << 20).then_some((begin, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_with_threads_is_not_copied() {
        let (end, wait) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || wait.recv());
        let error = fork().unwrap_err();
        assert!(error.to_string().contains("several threads"), "{error}");
        drop(end);
        assert!(other.join().unwrap().is_err());
    }

    #[test]
    fn the_place_of_words_is_where_the_kernel_says() {
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
        let (begin, end) = place_of_words(&stat).unwrap();
        let shown = std::fs::read("/proc/self/cmdline").unwrap();
        assert_eq!(end - begin, shown.len());
        for wrong in ["", ")", "1 (a) S 1 2", "1 (a) b) S"] {
            assert_eq!(place_of_words(wrong), None);
        }
    }
}
