//! From a request to its answer.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

use crate::memory::Memory;
use crate::virtio::chain::Chain;
use crate::virtio::device::DeviceError;
use crate::virtio::fs::handles::Handles;
use crate::virtio::fs::nodes::Nodes;
use crate::virtio::fs::wire::{
    ANSWER_HEADER, Arguments, Header, MAJOR, MINOR, MINOR_MIN, Opcode, REQUEST_HEADER, Results,
    TRANSFER_ARGUMENTS, User, init,
};
use crate::virtio::limits::{
    FS_ARGUMENTS_MAX, FS_FOLDER_BYTES_MAX, FS_FORGETS_MAX, FS_TRANSFER_MAX,
};

/// A request that is being carried out.
#[derive(Clone, Copy)]
pub(super) struct Request<'a> {
    /// The file that it is about.
    pub node: u64,
    /// Who asks.
    pub user: User,
    /// What is left of its arguments; of a write without the data.
    pub args: Arguments<'a>,
    /// Bytes of results that there is room for.
    pub room: u64,
    /// Where the data of reads and writes is.
    pub chain: &'a Chain,
    /// Guest memory.
    pub memory: &'a Memory,
}

/// What is answered.
pub(super) enum Reply {
    /// Nothing at all: nobody waits.
    Nothing,
    /// This.
    Results(Results),
    /// So many bytes, which are where results go already.
    Placed(u64),
}

/// What is answered to a request, or why it was refused.
pub(super) type Answer = Result<Reply, Errno>;

/// An answer without results.
pub(super) fn done() -> Answer {
    Ok(Reply::Results(Results::default()))
}

/// A shared folder, and what the guest knows of it.
pub(super) struct Server {
    pub(super) nodes: Nodes,
    pub(super) handles: Handles,
    pub(super) read_only: bool,
    /// Entries of a folder that is being read.
    pub(super) entries: Vec<MaybeUninit<u8>>,
}

impl Server {
    /// Serves a folder that was opened with O_PATH, with at most `files_max` descriptors.
    pub fn new(root: OwnedFd, read_only: bool, files_max: usize) -> Result<Self, Errno> {
        // What is open takes two: so a third is left for files that are only known.
        let third = (files_max / 3).max(1);
        Ok(Self {
            nodes: Nodes::new(root, 2 * third)?,
            handles: Handles::new(third),
            read_only,
            entries: vec![MaybeUninit::uninit(); FS_FOLDER_BYTES_MAX],
        })
    }

    /// Carries a request out and writes its answer; gives the bytes of the answer.
    ///
    /// # Errors
    /// The request has no header, and the guest's driver does not know what it does.
    pub fn handle(&mut self, memory: &Memory, chain: &Chain) -> Result<u32, DeviceError> {
        let mut bytes = [0; REQUEST_HEADER];
        let read = chain.read(memory, 0, &mut bytes);
        let header = read.ok().and_then(|()| Header::parse(&bytes).ok());
        let header = header.ok_or(DeviceError::Request("a FUSE request without a header"))?;
        let answer = self.carry_out(&header, memory, chain);
        let (error, results) = match answer {
            Ok(Reply::Nothing) => return Ok(0),
            Ok(Reply::Results(results)) => (0, Ok(results.0)),
            Ok(Reply::Placed(len)) => (0, Err(len)),
            Err(errno) => (-errno.raw_os_error(), Ok(Vec::new())),
        };
        let len = match &results {
            Ok(bytes) => bytes.len() as u64,
            Err(placed) => *placed,
        };
        let len = ANSWER_HEADER as u64 + len;
        let mut answer = Results::default();
        answer.u32(u32::try_from(len).unwrap_or(u32::MAX));
        answer.u32(error.cast_unsigned());
        answer.u64(header.unique);
        answer.0.extend(results.unwrap_or_default());
        // A guest that left no room for an answer gets none.
        let written = chain.write(memory, 0, &answer.0).map_or(0, |()| len);
        Ok(u32::try_from(written).unwrap_or(u32::MAX))
    }

    fn carry_out(&mut self, header: &Header, memory: &Memory, chain: &Chain) -> Answer {
        let opcode = Opcode::parse(header.opcode).ok_or(Errno::NOSYS)?;
        let len = u64::from(header.len).checked_sub(REQUEST_HEADER as u64).ok_or(Errno::INVAL)?;
        if u64::from(header.len) > chain.readable_len() {
            return Err(Errno::INVAL);
        }
        let most = match opcode {
            Opcode::Write => TRANSFER_ARGUMENTS,
            Opcode::BatchForget => 8 + 16 * FS_FORGETS_MAX,
            _ => FS_ARGUMENTS_MAX,
        };
        let mut arguments = vec![0; len.min(most as u64) as usize];
        chain.read(memory, REQUEST_HEADER as u64, &mut arguments).map_err(|_| Errno::INVAL)?;
        if self.read_only && opcode.writes() {
            return Err(Errno::ROFS);
        }
        let request = Request {
            node: header.node,
            user: header.user,
            args: Arguments(&arguments),
            room: chain.writable_len().saturating_sub(ANSWER_HEADER as u64),
            chain,
            memory,
        };
        self.dispatch(opcode, request)
    }

    fn dispatch(&mut self, opcode: Opcode, request: Request<'_>) -> Answer {
        match opcode {
            Opcode::Init => self.init(request),
            Opcode::Destroy => {
                self.forget_all();
                done()
            }
            Opcode::Forget => self.forget(request),
            Opcode::BatchForget => self.batch_forget(request),
            Opcode::Lookup => self.look_up(request),
            Opcode::GetAttr => self.get_attributes(request),
            Opcode::SetAttr => self.set_attributes(request),
            Opcode::StatFs => self.stat_fs(request),
            Opcode::ReadLink => self.read_link(request),
            Opcode::Symlink => self.symlink(request),
            Opcode::MkNod => self.make_node(request),
            Opcode::MkDir => self.make_folder(request),
            Opcode::Unlink => self.unlink(request, false),
            Opcode::RmDir => self.unlink(request, true),
            Opcode::Rename => self.rename(request, false),
            Opcode::Rename2 => self.rename(request, true),
            Opcode::Link => self.link(request),
            Opcode::Create => self.create(request),
            Opcode::Open => self.open(request),
            Opcode::OpenDir => self.open_folder(request),
            Opcode::Release | Opcode::ReleaseDir => self.release(request),
            Opcode::Read => self.read(request),
            Opcode::Write => self.write(request),
            Opcode::Fsync | Opcode::FsyncDir => self.sync(request, opcode == Opcode::FsyncDir),
            Opcode::SyncFs => self.sync_fs(),
            Opcode::Fallocate => self.allocate(request),
            Opcode::Lseek => self.seek(request),
            Opcode::CopyFileRange => self.copy_range(request),
            Opcode::ReadDir => self.read_folder(request, false),
            Opcode::ReadDirPlus => self.read_folder(request, true),
        }
    }

    fn init(&mut self, mut request: Request<'_>) -> Answer {
        let args = &mut request.args;
        let (major, minor, read_ahead, wanted) =
            (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        if major < MAJOR || major == MAJOR && minor < MINOR_MIN {
            return Err(Errno::PROTO);
        }
        // A guest that begins knows nothing yet.
        self.forget_all();
        let mut results = Results::default();
        results.u32(MAJOR);
        results.u32(MINOR);
        // A later protocol is answered by this one only, and asked for again (linux/fuse.h).
        if major > MAJOR {
            results.0.resize(64, 0);
            return Ok(Reply::Results(results));
        }
        results.u32(read_ahead.min(FS_TRANSFER_MAX));
        results.u32(wanted & init::WANTED);
        // Requests in the background, and from when on there are many: the guest's own.
        results.u16(0);
        results.u16(0);
        results.u32(FS_TRANSFER_MAX);
        // Times are in nanoseconds.
        results.u32(1);
        results.u16((FS_TRANSFER_MAX / 4096) as u16);
        results.0.resize(64, 0);
        Ok(Reply::Results(results))
    }

    /// As before the guest's driver began. What it has open is closed.
    pub fn forget_all(&mut self) {
        self.handles.close_all();
        // Fails only where the folder itself cannot be looked at; then the old root stays.
        let _ = self.nodes.forget_all();
    }

    fn forget(&mut self, mut request: Request<'_>) -> Answer {
        // Nobody waits for an answer, whatever it would be.
        if let Ok(count) = request.args.u64() {
            self.nodes.forget(request.node, count);
        }
        Ok(Reply::Nothing)
    }

    fn batch_forget(&mut self, mut request: Request<'_>) -> Answer {
        let args = &mut request.args;
        let (count, _) = (args.u32().unwrap_or(0), args.u32());
        for _ in 0..count {
            // Not more than there are, whatever the count is.
            let (Ok(node), Ok(lookups)) = (args.u64(), args.u64()) else { break };
            self.nodes.forget(node, lookups);
        }
        Ok(Reply::Nothing)
    }

    /// Opens a shared folder: only to be named, so that nothing depends on its permissions yet. No link
    /// leads there: a guest that has a folder above it could have planted one.
    pub fn open_root(path: &std::path::Path) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        rustix::fs::openat2(rustix::fs::CWD, path, flags, Mode::empty(), resolve)
    }
}
