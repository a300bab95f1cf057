//! Open files: what is in them.

use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, FileType, Mode, OFlags, ResolveFlags, SeekFrom};
use rustix::io::Errno;

use crate::virtio::fs::handles::Kind;
use crate::virtio::fs::server::{Answer, Reply, Request, Server, done};
use crate::virtio::fs::sys::{self, ActingAs};
use crate::virtio::fs::wire::{ANSWER_HEADER, REQUEST_HEADER, Results, TRANSFER_ARGUMENTS};
use crate::virtio::limits::{FS_COPY_MAX, FS_TRANSFER_MAX};

/// `fuse_write_in`: pages of the guest's cache, wherever the file's end is.
const WRITE_CACHE: u32 = 1;
/// `fuse_fsync_in`: the data only.
const FSYNC_DATA: u32 = 1;

/// What the guest opens a file for. Everything else that it may ask for is its own affair: appending
/// is said with each write, and reading past the host's cache would take aligned memory.
fn open_flags(flags: u32, read_only: bool) -> Result<OFlags, Errno> {
    let flags = OFlags::from_bits_retain(flags);
    let access = flags & OFlags::ACCMODE;
    if access == OFlags::ACCMODE {
        return Err(Errno::INVAL);
    }
    if read_only && (access != OFlags::RDONLY || flags.contains(OFlags::TRUNC)) {
        return Err(Errno::ROFS);
    }
    Ok(access | flags & (OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC))
}

impl Server {
    pub(super) fn open(&mut self, mut request: Request<'_>) -> Answer {
        let flags = open_flags(request.args.u32()?, self.read_only)?;
        let mut results = Results::default();
        results.opened(self.open_node(request.node, flags)?);
        Ok(Reply::Results(results))
    }

    fn open_node(&mut self, node: u64, flags: OFlags) -> Result<u64, Errno> {
        self.handles.check_room()?;
        let file = self.nodes.get(node)?;
        match self.nodes.kind(node)? {
            FileType::RegularFile => {}
            FileType::Directory => return Err(Errno::ISDIR),
            // Those are the guest's own, though they have a name on the host.
            _ => return Err(Errno::NXIO),
        }
        let open = self.nodes.reopen(file.as_fd(), flags)?;
        self.opened(Kind::File, node, open)
    }

    /// The handle of a node that was opened.
    pub(super) fn opened(&mut self, kind: Kind, node: u64, open: OwnedFd) -> Result<u64, Errno> {
        let handle = self.handles.add(kind, node, open)?;
        self.nodes.pin(node);
        Ok(handle)
    }

    pub(super) fn create(&mut self, mut request: Request<'_>) -> Answer {
        let args = &mut request.args;
        let (asked, mode, _umask, _) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let name = args.name()?;
        let flags = open_flags(asked, self.read_only)?;
        self.handles.check_room()?;
        let folder = self.nodes.get(request.node)?;
        let made = {
            let _acting = ActingAs::user(request.user)?;
            let new = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let mode = Mode::from_raw_mode(mode & 0o7777);
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
            rustix::fs::openat2(&*folder, name, flags | new, mode, resolve)
        };
        let made = match made {
            Ok(file) => Some(file),
            // Somebody was faster; what it is decides whether it can be opened.
            Err(Errno::EXIST) if asked & OFlags::EXCL.bits() == 0 => None,
            Err(errno) => return Err(errno),
        };
        let (node, stat) = self.nodes.look_up(folder.as_fd(), name)?;
        let handle = match made {
            Some(file) => self.opened(Kind::File, node, file),
            None => self.open_node(node, flags),
        };
        // If it cannot be opened the guest is not told of it.
        let handle = handle.inspect_err(|_| self.nodes.forget(node, 1))?;
        let mut results = Results::default();
        results.entry(node, Some(&stat));
        results.opened(handle);
        Ok(Reply::Results(results))
    }

    pub(super) fn release(&mut self, mut request: Request<'_>) -> Answer {
        let node = self.handles.close(request.args.u64()?)?;
        self.nodes.unpin(node);
        done()
    }

    pub(super) fn read(&mut self, mut request: Request<'_>) -> Answer {
        let args = &mut request.args;
        let (handle, offset, size) = (args.u64()?, args.u64()?, args.u32()?);
        let file = self.handles.get(Kind::File, handle)?;
        let len = u64::from(size.min(FS_TRANSFER_MAX)).min(request.room);
        let (start, chain) = (ANSWER_HEADER as u64, (request.memory, request.chain));
        sys::read(file, offset, chain, start, len).map(Reply::Placed)
    }

    pub(super) fn write(&mut self, mut request: Request<'_>) -> Answer {
        let args = &mut request.args;
        let (handle, offset, size, how) = (args.u64()?, args.u64()?, args.u32()?, args.u32()?);
        let (_owner, flags, _) = (args.u64()?, args.u32()?, args.u32()?);
        let file = self.handles.get(Kind::File, handle)?;
        if size > FS_TRANSFER_MAX {
            return Err(Errno::INVAL);
        }
        let append = flags & OFlags::APPEND.bits() != 0 && how & WRITE_CACHE == 0;
        let start = (REQUEST_HEADER + TRANSFER_ARGUMENTS) as u64;
        let chain = (request.memory, request.chain);
        let written = sys::write(file, offset, append, chain, start, size.into())?;
        let mut results = Results::default();
        results.u64(written);
        Ok(Reply::Results(results))
    }

    pub(super) fn sync(&mut self, mut request: Request<'_>, is_folder: bool) -> Answer {
        let (handle, flags) = (request.args.u64()?, request.args.u32()?);
        let kind = if is_folder { Kind::Folder } else { Kind::File };
        let file = self.handles.get(kind, handle)?;
        if flags & FSYNC_DATA == 0 {
            rustix::fs::fsync(file)
        } else {
            rustix::fs::fdatasync(file)
        }?;
        done()
    }

    pub(super) fn sync_fs(&mut self) -> Answer {
        if !self.read_only {
            let folder = OFlags::RDONLY | OFlags::DIRECTORY;
            rustix::fs::syncfs(self.nodes.reopen(self.nodes.root(), folder)?)?;
        }
        done()
    }

    pub(super) fn allocate(&mut self, mut request: Request<'_>) -> Answer {
        let args = &mut request.args;
        let (handle, offset, len, mode) = (args.u64()?, args.u64()?, args.u64()?, args.u32()?);
        let mode = FallocateFlags::from_bits(mode).ok_or(Errno::OPNOTSUPP)?;
        rustix::fs::fallocate(self.handles.get(Kind::File, handle)?, mode, offset, len)?;
        done()
    }

    /// Where data or a hole is; the guest knows all else itself.
    pub(super) fn seek(&mut self, mut request: Request<'_>) -> Answer {
        let args = &mut request.args;
        let (handle, offset, whence) = (args.u64()?, args.u64()?, args.u32()?);
        let file = self.handles.get(Kind::File, handle)?;
        let place = match whence.cast_signed() {
            libc::SEEK_DATA => SeekFrom::Data(offset),
            libc::SEEK_HOLE => SeekFrom::Hole(offset),
            _ => return Err(Errno::INVAL),
        };
        let mut results = Results::default();
        results.u64(rustix::fs::seek(file, place)?);
        Ok(Reply::Results(results))
    }

    /// Copies on the host, as much at a time as does not hold others up.
    pub(super) fn copy_range(&mut self, mut request: Request<'_>) -> Answer {
        let args = &mut request.args;
        let (from, mut from_at, _node) = (args.u64()?, args.u64()?, args.u64()?);
        let (to, mut to_at) = (args.u64()?, args.u64()?);
        let (len, flags) = (args.u64()?, args.u64()?);
        if flags != 0 {
            return Err(Errno::INVAL);
        }
        let from = self.handles.get(Kind::File, from)?;
        let to = self.handles.get(Kind::File, to)?;
        let len = len.min(FS_COPY_MAX) as usize;
        let (from_at, to_at) = (Some(&mut from_at), Some(&mut to_at));
        let copied = rustix::fs::copy_file_range(from, from_at, to, to_at, len)?;
        let mut results = Results::default();
        results.u64(copied as u64);
        Ok(Reply::Results(results))
    }
}
