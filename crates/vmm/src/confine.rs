//! What threads of a machine may ask of the kernel (seccomp): each kind only what it needs. Anything else
//! fails with EPERM.
//!
//! Nothing is confined before [`prepare`], which the process of a kept machine calls; whoever uses this
//! crate otherwise may have threads that need more.

use std::collections::BTreeMap;
use std::io;
use std::sync::OnceLock;

use rustix::thread::UnshareFlags;
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// Kinds of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Serves a device: reads what the guest wrote into rings, and moves bytes.
    Device,
    /// Serves a shared folder, besides what devices do.
    Files,
    /// Runs guest code; starts and traces the processes that execute user code for it.
    Vcpu,
}

/// Why threads cannot be confined.
#[derive(Debug, thiserror::Error)]
#[error("threads cannot be confined by seccomp")]
pub struct ConfineError(#[source] Box<dyn std::error::Error + Send + Sync>);

/// What each of them needs: memory, waiting, its own end, and what it is given to read and write.
const COMMON: &[i64] = &[
    libc::SYS_brk,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_clone,
    libc::SYS_clone3,
    libc::SYS_close,
    libc::SYS_dup,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_futex,
    libc::SYS_getcpu,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_ioctl,
    libc::SYS_lseek,
    libc::SYS_madvise,
    libc::SYS_mmap,
    libc::SYS_mprotect,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_nanosleep,
    libc::SYS_newfstatat,
    libc::SYS_openat,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_prctl,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_read,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_seccomp,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_statx,
    libc::SYS_tgkill,
    libc::SYS_timerfd_settime,
    libc::SYS_write,
];

const DEVICE: &[i64] = &[
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_fallocate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_ftruncate,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_io_uring_setup,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_readv,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    libc::SYS_socket,
    libc::SYS_socketpair,
    libc::SYS_wait4,
    libc::SYS_writev,
];

/// Besides what devices need: files by descriptors and names below them, and other users' for root.
const FILES: &[i64] = &[
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_copy_file_range,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchownat,
    libc::SYS_fstatfs,
    libc::SYS_getdents64,
    libc::SYS_geteuid,
    libc::SYS_linkat,
    libc::SYS_mkdirat,
    libc::SYS_mknodat,
    libc::SYS_openat2,
    libc::SYS_readlink,
    libc::SYS_readlinkat,
    libc::SYS_renameat2,
    libc::SYS_setfsgid,
    libc::SYS_setfsuid,
    libc::SYS_symlinkat,
    libc::SYS_syncfs,
    libc::SYS_umask,
    libc::SYS_unlinkat,
    libc::SYS_unshare,
    libc::SYS_utimensat,
];

/// Besides what devices need, whose threads it starts.
const VCPU: &[i64] = &[
    libc::SYS_arch_prctl,
    libc::SYS_close_range,
    libc::SYS_dup2,
    libc::SYS_dup3,
    libc::SYS_execveat,
    libc::SYS_kill,
    libc::SYS_memfd_create,
    libc::SYS_personality,
    libc::SYS_pidfd_open,
    libc::SYS_pkey_alloc,
    libc::SYS_pkey_free,
    libc::SYS_pkey_mprotect,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_ptrace,
    libc::SYS_rt_sigqueueinfo,
    libc::SYS_sched_setaffinity,
    libc::SYS_setpgid,
    libc::SYS_setsid,
    libc::SYS_vfork,
    libc::SYS_waitid,
];

struct Filters {
    device: BpfProgram,
    files: BpfProgram,
    vcpu: BpfProgram,
}

static FILTERS: OnceLock<Filters> = OnceLock::new();

fn filter(more: &[i64]) -> Result<BpfProgram, seccompiler::BackendError> {
    let rules: BTreeMap<i64, Vec<_>> =
        COMMON.iter().chain(more).map(|&number| (number, Vec::new())).collect();
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
}

/// Threads that are started from here on are confined. Children cannot gain privileges any more. Without
/// `shares` no folder is shared, and nobody needs what [`Kind::Files`] does.
///
/// # Errors
/// The kernel does not do that; then nothing is confined.
pub fn prepare(shares: bool) -> Result<(), ConfineError> {
    let build = || {
        // A vCPU's thread starts those of devices, which inherit what it is refused.
        let files = [DEVICE, if shares { FILES } else { &[] }].concat();
        let vcpu = filter(&[VCPU, &files].concat())?;
        Ok::<_, seccompiler::BackendError>((filter(DEVICE)?, filter(&files)?, vcpu))
    };
    let (device, files, vcpu) = build().map_err(|error| ConfineError(error.into()))?;
    // Whether it can be done is found out on a thread that ends.
    let trial = device.clone();
    let tried = std::thread::spawn(move || seccompiler::apply_filter(&trial)).join();
    match tried {
        Ok(Ok(())) => {}
        Ok(Err(error)) => return Err(ConfineError(error.into())),
        Err(_) => return Err(ConfineError("a thread panicked".into())),
    }
    // A second call changes nothing.
    let _ = FILTERS.set(Filters { device, files, vcpu });
    Ok(())
}

/// Confines this thread, if [`prepare`] was called.
///
/// # Panics
/// The kernel refuses what it allowed before: the thread must not go on.
pub(crate) fn enter(kind: Kind) {
    let Some(filters) = FILTERS.get() else { return };
    let filter = match kind {
        Kind::Device => &filters.device,
        Kind::Files => &filters.files,
        Kind::Vcpu => &filters.vcpu,
    };
    seccompiler::apply_filter(filter).expect("a filter that was installed before");
}

/// Takes this process, which has one thread, into namespaces without network and System V objects, in a
/// user namespace in which it is who it was: its user's files are its own, and there is nothing else that it
/// may do to the host. Root can keep its rights.
///
/// # Errors
/// The kernel does not allow that; it may be in a part of them.
pub fn leave_network(root_stays: bool) -> io::Result<()> {
    let wanted = UnshareFlags::NEWNET | UnshareFlags::NEWIPC;
    let (uid, gid) = (rustix::process::geteuid(), rustix::process::getegid());
    if uid.is_root() && root_stays {
        // SAFETY: neither memory nor the table of files is unshared.
        return Ok(unsafe { rustix::thread::unshare_unsafe(wanted) }?);
    }
    // SAFETY: as above.
    unsafe { rustix::thread::unshare_unsafe(wanted | UnshareFlags::NEWUSER) }?;
    let (uid, gid) = (uid.as_raw(), gid.as_raw());
    std::fs::write("/proc/self/setgroups", "deny")?;
    std::fs::write("/proc/self/uid_map", format!("{uid} {uid} 1"))?;
    std::fs::write("/proc/self/gid_map", format!("{gid} {gid} 1"))
}

#[cfg(test)]
mod tests {
    use super::{DEVICE, filter};

    #[test]
    fn a_confined_thread_is_refused_what_it_does_not_need() {
        let filter = filter(DEVICE).unwrap();
        let confined = std::thread::spawn(move || {
            seccompiler::apply_filter(&filter).unwrap();
            let file = std::fs::File::open("/proc/self/stat").unwrap();
            assert!(file.metadata().is_ok());
            // SAFETY: a string that ends; it is refused.
            let refused = unsafe { libc::chroot(c"/".as_ptr()) };
            assert_eq!(refused, -1);
            std::io::Error::last_os_error().raw_os_error()
        });
        assert_eq!(confined.join().unwrap(), Some(libc::EPERM));
        // Only that thread was.
        assert!(std::env::current_dir().is_ok());
    }
}
