//! What files are: attributes, and what is left on the file system.

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
use rustix::io::Errno;

use crate::virtio::fs::handles::Kind;
use crate::virtio::fs::nodes::stat;
use crate::virtio::fs::server::{Answer, Reply, Request, Server};
use crate::virtio::fs::sys;
use crate::virtio::fs::wire::{Arguments, Results};

/// `fuse_getattr_in`: the handle is of use.
const GETATTR_HANDLE: u32 = 1;

/// What of `fuse_setattr_in` is to be set.
mod set {
    pub const MODE: u32 = 1;
    pub const UID: u32 = 1 << 1;
    pub const GID: u32 = 1 << 2;
    pub const SIZE: u32 = 1 << 3;
    pub const ATIME: u32 = 1 << 4;
    pub const MTIME: u32 = 1 << 5;
    pub const HANDLE: u32 = 1 << 6;
    pub const ATIME_NOW: u32 = 1 << 7;
    pub const MTIME_NOW: u32 = 1 << 8;
}

/// `fuse_setattr_in`.
struct Wanted {
    valid: u32,
    handle: u64,
    size: u64,
    atime: Timespec,
    mtime: Timespec,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Wanted {
    fn parse(args: &mut Arguments<'_>) -> Result<Self, Errno> {
        let (valid, _) = (args.u32()?, args.u32()?);
        let (handle, size, _) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime, mtime, _) = (args.u64()?, args.u64()?, args.u64()?);
        let (atime_ns, mtime_ns, _) = (args.u32()?, args.u32()?, args.u32()?);
        let (mode, _) = (args.u32()?, args.u32()?);
        let (uid, gid, _) = (args.u32()?, args.u32()?, args.u32()?);
        let time = |seconds: u64, ns: u32, given, now| match valid {
            _ if valid & now != 0 => Timespec { tv_sec: 0, tv_nsec: UTIME_NOW },
            _ if valid & given != 0 && ns < 1_000_000_000 => {
                Timespec { tv_sec: seconds.cast_signed(), tv_nsec: i64::from(ns) }
            }
            _ => Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        };
        Ok(Self {
            valid,
            handle,
            size,
            atime: time(atime, atime_ns, set::ATIME, set::ATIME_NOW),
            mtime: time(mtime, mtime_ns, set::MTIME, set::MTIME_NOW),
            mode,
            uid,
            gid,
        })
    }

    fn has(&self, what: u32) -> bool {
        self.valid & what != 0
    }
}

impl Server {
    pub(super) fn get_attributes(&mut self, mut request: Request<'_>) -> Answer {
        let args = &mut request.args;
        let (flags, _, handle) = (args.u32()?, args.u32()?, args.u64()?);
        let of_handle = match flags & GETATTR_HANDLE {
            0 => None,
            _ => self.handles.get(Kind::File, handle).ok(),
        };
        let stat = match of_handle {
            Some(file) => stat(file)?,
            None => stat(self.nodes.get(request.node)?)?,
        };
        let mut results = Results::default();
        results.attributes_valid(&stat);
        Ok(Reply::Results(results))
    }

    pub(super) fn set_attributes(&mut self, mut request: Request<'_>) -> Answer {
        let wanted = Wanted::parse(&mut request.args)?;
        let file = self.nodes.get(request.node)?;
        // First: it takes set-user-id away, which a mode may give back.
        if wanted.has(set::UID | set::GID) {
            let uid = wanted.has(set::UID).then_some(wanted.uid);
            let gid = wanted.has(set::GID).then_some(wanted.gid);
            let (uid, gid) = sys::owner(uid, gid);
            let changed = rustix::fs::chownat(&file, c"", uid, gid, AtFlags::EMPTY_PATH);
            // Numbers that the user namespace of a machine without privileges does not have.
            changed.map_err(|errno| if errno == Errno::INVAL { Errno::PERM } else { errno })?;
        }
        if wanted.has(set::MODE) {
            let (folder, name) = self.nodes.by_name(file.as_fd());
            let mode = Mode::from_raw_mode(wanted.mode & 0o7777);
            rustix::fs::chmodat(folder, name, mode, AtFlags::empty())?;
        }
        if wanted.has(set::SIZE) {
            self.set_size(request.node, file.as_fd(), &wanted)?;
        }
        if wanted.has(set::ATIME | set::MTIME | set::ATIME_NOW | set::MTIME_NOW) {
            let times = Timestamps { last_access: wanted.atime, last_modification: wanted.mtime };
            rustix::fs::utimensat(&file, c"", &times, AtFlags::EMPTY_PATH)?;
        }
        let mut results = Results::default();
        results.attributes_valid(&stat(&file)?);
        Ok(Reply::Results(results))
    }

    fn set_size(&self, node: u64, file: BorrowedFd<'_>, wanted: &Wanted) -> Result<(), Errno> {
        if wanted.has(set::HANDLE)
            && let Ok(open) = self.handles.get(Kind::File, wanted.handle)
        {
            return rustix::fs::ftruncate(open, wanted.size);
        }
        if self.nodes.kind(node)? != FileType::RegularFile {
            return Err(Errno::INVAL);
        }
        let open = self.nodes.reopen(file, OFlags::WRONLY)?;
        rustix::fs::ftruncate(open, wanted.size)
    }

    pub(super) fn stat_fs(&mut self, request: Request<'_>) -> Answer {
        let stat = rustix::fs::fstatfs(self.nodes.get(request.node)?)?;
        let mut results = Results::default();
        for count in [stat.f_blocks, stat.f_bfree, stat.f_bavail, stat.f_files, stat.f_ffree] {
            results.u64(count);
        }
        for size in [stat.f_bsize, stat.f_namelen, stat.f_frsize] {
            results.u32(u32::try_from(size).unwrap_or(u32::MAX));
        }
        results.0.resize(80, 0);
        Ok(Reply::Results(results))
    }
}
