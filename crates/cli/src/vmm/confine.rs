//! The process of a kept machine has no network and no rights over the host, sees of the file system what it
//! was handed, and is refused the calls that no part of it needs.
//!
//! What the host does not allow (older kernels, containers without namespaces) is said in the log, and
//! the machine runs without it.

use std::collections::BTreeMap;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use berth_api::vmm::SUSPENDED;
use berth_daemon::folder::Folder;
use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, Scope,
};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

use berth_vmm::boot::Module;
use berth_vmm::confine::{leave_network, prepare};

use crate::plan::RunPlan;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What no machine reads or writes, and parts of the system it has to look at.
const READABLE: [&str; 4] = ["/proc", "/sys", "/dev/urandom", "/etc/localtime"];
const WRITABLE: [&str; 3] = ["/dev/kvm", "/dev/net/tun", "/dev/null"];

/// Calls that nothing of a machine needs, on whatever thread.
const REFUSED: &[i64] = &[
    libc::SYS_acct,
    libc::SYS_add_key,
    libc::SYS_adjtimex,
    libc::SYS_bpf,
    libc::SYS_chroot,
    libc::SYS_clock_settime,
    libc::SYS_delete_module,
    libc::SYS_finit_module,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fsopen,
    libc::SYS_init_module,
    libc::SYS_ioperm,
    libc::SYS_iopl,
    libc::SYS_kexec_file_load,
    libc::SYS_kexec_load,
    libc::SYS_keyctl,
    libc::SYS_mount,
    libc::SYS_mount_setattr,
    libc::SYS_move_mount,
    libc::SYS_name_to_handle_at,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_perf_event_open,
    libc::SYS_pivot_root,
    libc::SYS_quotactl,
    libc::SYS_reboot,
    libc::SYS_request_key,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_setns,
    libc::SYS_settimeofday,
    libc::SYS_swapoff,
    libc::SYS_swapon,
    libc::SYS_syslog,
    libc::SYS_umount2,
    libc::SYS_userfaultfd,
    libc::SYS_vhangup,
];

/// Confines this process, which has one thread. `outside` is not in the folder and used all the same.
pub(super) fn confine(folder: &Folder, root: &Path, plan: &RunPlan) {
    let steps: [(&str, Result<(), Failure>); 4] = [
        ("a network namespace of its own", leave(folder, plan)),
        ("the view of the file system", restrict_files(folder, root, plan)),
        ("the calls of all threads", refuse_calls()),
        ("the calls of each kind of thread", prepare(!plan.shares.is_empty()).map_err(Into::into)),
    ];
    for (what, result) in steps {
        if let Err(error) = result {
            let error = berth_daemon::failure::chain(&*error);
            eprintln!("berth: this host does not confine {what}: {error}");
        }
    }
}

/// Leaves the network, and with it the rights of root that the machine does not need.
fn leave(folder: &Folder, plan: &RunPlan) -> Result<(), Failure> {
    if rustix::process::geteuid().is_root() {
        let Err(why) = needs_no_rights(folder, plan) else {
            match leave_network(false) {
                Ok(()) => return Ok(()),
                Err(error) => eprintln!("berth: root keeps its rights here: {error}"),
            }
            return Ok(leave_network(true)?);
        };
        eprintln!("berth: the machine's process keeps the rights of root: {why}");
    }
    Ok(leave_network(true)?)
}

/// Whether root without rights over other users' files can do all that the machine needs; else why not.
fn needs_no_rights(folder: &Folder, plan: &RunPlan) -> Result<(), String> {
    if !plan.shares.is_empty() {
        return Err("it shares folders, in which files may be anybody's".into());
    }
    let not_roots = |path: &Path| format!("{} is not root's", path.display());
    let may = |path: &Path, wanted| match owner_may(path, wanted) {
        true => Ok(()),
        false => Err(not_roots(path)),
    };
    let inside = ["state", SUSPENDED, "snapshots"].map(|name| folder.file(name));
    let inside = inside.iter().filter(|path| path.exists()).map(PathBuf::as_path);
    for directory in std::iter::once(folder.path()).chain(inside) {
        may(directory, ALL)?;
        let entries = std::fs::read_dir(directory).map_err(|error| error.to_string())?;
        let mut files =
            entries.flatten().filter(|entry| entry.file_type().is_ok_and(|t| t.is_file()));
        // The way to them is the directory's.
        let other = files.find(|entry| !entry.metadata().is_ok_and(|meta| allows(&meta, READ)));
        if let Some(other) = other {
            return Err(not_roots(&other.path()));
        }
    }
    // Its clones come to it by its name.
    let real = std::fs::canonicalize(folder.path()).map_err(|error| error.to_string())?;
    may(&real, ALL)?;
    // One that goes on has none.
    let list = plan.initrd.as_deref().map(Path::to_string_lossy);
    let modules = list.map(|list| Module::parse_list(&list)).unwrap_or_default();
    let modules = modules.iter().map(|module| &module.path);
    for path in std::iter::once(&plan.kernel).chain(modules).filter(|path| path.exists()) {
        may(path, READ)?;
    }
    for disk in &plan.disks {
        let layers = berth_disk::chain::describe(&disk.path, disk.format);
        let layers = layers.map_err(|error| berth_daemon::failure::chain(&error))?;
        for layer in layers {
            let writes = layer.path == disk.path && !disk.read_only;
            may(&layer.path, if writes { READ | WRITE } else { READ })?;
        }
    }
    match Path::new("/dev/kvm") {
        kvm if kvm.exists() => may(kvm, READ | WRITE),
        _ => Ok(()),
    }
}

/// Bits of a mode.
const READ: u32 = 4;
const WRITE: u32 = 2;
const SEARCH: u32 = 1;
const ALL: u32 = READ | WRITE | SEARCH;

/// Whether its mode allows user 0 all of that.
fn allows(meta: &Metadata, wanted: u32) -> bool {
    let shift = if meta.uid() == 0 { 6 } else { 0 };
    meta.mode() >> shift & wanted == wanted
}

/// Whether user 0 may do that with a file by its mode, and those of the directories that lead to it, alone.
fn owner_may(path: &Path, wanted: u32) -> bool {
    let may = |path: &Path, wanted| std::fs::metadata(path).is_ok_and(|meta| allows(&meta, wanted));
    let reaches = |path: &Path| {
        path.ancestors().skip(1).all(|path| path.as_os_str().is_empty() || may(path, SEARCH))
    };
    // Where a link leads has directories of its own.
    let real = std::fs::canonicalize(path);
    may(path, wanted) && reaches(path) && real.is_ok_and(|real| real == path || reaches(&real))
}

/// Landlock: the folder, the disks and shared folders that are elsewhere, and kernels and images to read.
fn restrict_files(folder: &Folder, root: &Path, plan: &RunPlan) -> Result<(), Failure> {
    let abi = ABI::V5;
    let (all, read) = (AccessFs::from_all(abi), AccessFs::from_read(abi));
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::BestEffort);
    let ruleset = ruleset.handle_access(all)?.scope(Scope::Signal)?;
    let mut ruleset = ruleset.create()?;
    let mut allow = |path: &Path, access| -> Result<(), Failure> {
        if let Ok(opened) = PathFd::new(path) {
            let access = if path.is_dir() { access } else { access & AccessFs::from_file(abi) };
            let created = &mut ruleset;
            created.add_rule(PathBeneath::new(opened, access))?;
        }
        Ok(())
    };
    allow(folder.path(), all)?;
    for path in READABLE {
        allow(Path::new(path), read)?;
    }
    for path in WRITABLE {
        allow(Path::new(path), all)?;
    }
    let mut readable: Vec<PathBuf> = vec![root.join("images"), plan.kernel.clone()];
    readable.extend(plan.initrd.clone());
    for path in readable {
        allow(&path, read)?;
    }
    for disk in &plan.disks {
        allow(&disk.path, if disk.read_only { read } else { all })?;
    }
    let writes =
        all & !(AccessFs::Execute | AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::IoctlDev);
    let reads = AccessFs::ReadFile | AccessFs::ReadDir;
    for share in &plan.shares {
        allow(&share.path, if share.read_only { reads } else { writes })?;
    }
    ruleset.restrict_self()?;
    Ok(())
}

/// Seccomp for the whole process: sockets are Unix ones, and what is in [`REFUSED`] fails.
fn refuse_calls() -> Result<(), Failure> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        REFUSED.iter().map(|&number| (number, Vec::new())).collect();
    let unix = libc::AF_UNIX as u64;
    let other = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Ne, unix)?;
    rules.insert(libc::SYS_socket, vec![SeccompRule::new(vec![other])?]);
    // The thread of a shared folder has a umask of its own; nothing else gets other namespaces.
    let files = libc::CLONE_FS as u64;
    let other = SeccompCondition::new(0, SeccompCmpArgLen::Qword, SeccompCmpOp::Ne, files)?;
    rules.insert(libc::SYS_unshare, vec![SeccompRule::new(vec![other])?]);
    let refuse = SeccompAction::Errno(libc::EPERM as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::x86_64)?;
    let program: BpfProgram = filter.try_into()?;
    rustix::thread::set_no_new_privs(true)?;
    seccompiler::apply_filter(&program)?;
    Ok(())
}
