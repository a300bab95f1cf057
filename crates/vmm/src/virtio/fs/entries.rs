//! Folders: looking up, making, removing, renaming and listing what is in them.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawDir, RenameFlags, SeekFrom};
use rustix::io::Errno;

use crate::virtio::fs::handles::Kind;
use crate::virtio::fs::server::{Answer, Reply, Request, Server, done};
use crate::virtio::fs::sys::ActingAs;
use crate::virtio::fs::wire::{ENTRY_LEN, Results, User, folder_entry_len};
use crate::virtio::limits::FS_FOLDER_BYTES_MAX;

impl Server {
    pub(super) fn look_up(&mut self, mut request: Request<'_>) -> Answer {
        let name = request.args.name()?;
        let folder = self.nodes.get(request.node)?;
        self.tell(&folder, name)
    }

    /// Answers with an entry of a folder.
    fn tell(&mut self, folder: &Arc<OwnedFd>, name: &CStr) -> Answer {
        let (number, stat) = self.nodes.look_up(folder.as_fd(), name)?;
        let mut results = Results::default();
        results.entry(number, Some(&stat));
        Ok(Reply::Results(results))
    }

    /// Makes something as the guest's user would, who owns it then, and answers with it.
    fn make(
        &mut self,
        (node, user): (u64, User),
        name: &CStr,
        make: impl FnOnce(&OwnedFd) -> Result<(), Errno>,
    ) -> Answer {
        let folder = self.nodes.get(node)?;
        {
            let _acting = ActingAs::user(user)?;
            make(&folder)?;
        }
        self.tell(&folder, name)
    }

    pub(super) fn make_folder(&mut self, mut request: Request<'_>) -> Answer {
        let args = &mut request.args;
        // The guest has applied the umask already.
        let (mode, _umask) = (args.u32()?, args.u32()?);
        let name = args.name()?;
        let mode = Mode::from_raw_mode(mode & 0o7777);
        self.make((request.node, request.user), name, |folder| {
            rustix::fs::mkdirat(folder, name, mode)
        })
    }

    pub(super) fn make_node(&mut self, mut request: Request<'_>) -> Answer {
        let args = &mut request.args;
        let (mode, _device, _umask, _) = (args.u32()?, args.u32()?, args.u32()?, args.u32()?);
        let name = args.name()?;
        let kind = FileType::from_raw_mode(mode);
        if !matches!(kind, FileType::RegularFile | FileType::Fifo | FileType::Socket) {
            // A device would be one of the host for whoever opens it there.
            return Err(Errno::PERM);
        }
        let mode = Mode::from_raw_mode(mode & 0o7777);
        self.make((request.node, request.user), name, |folder| {
            rustix::fs::mknodat(folder, name, kind, mode, 0)
        })
    }

    pub(super) fn symlink(&mut self, mut request: Request<'_>) -> Answer {
        let name = request.args.name()?;
        // Whatever it is: it is followed in the guest.
        let target = request.args.text()?;
        self.make((request.node, request.user), name, |folder| {
            rustix::fs::symlinkat(target, folder, name)
        })
    }

    pub(super) fn link(&mut self, mut request: Request<'_>) -> Answer {
        let file = request.args.u64()?;
        let name = request.args.name()?;
        let (file, folder) = (self.nodes.get(file)?, self.nodes.get(request.node)?);
        let (from, by) = self.nodes.by_name(file.as_fd());
        rustix::fs::linkat(from, by, &folder, name, AtFlags::SYMLINK_FOLLOW)?;
        self.tell(&folder, name)
    }

    pub(super) fn read_link(&mut self, request: Request<'_>) -> Answer {
        let link = self.nodes.get(request.node)?;
        if self.nodes.kind(request.node)? != FileType::Symlink {
            return Err(Errno::INVAL);
        }
        let target = rustix::fs::readlinkat(&link, c"", Vec::new())?;
        Ok(Reply::Results(Results(target.into_bytes())))
    }

    pub(super) fn unlink(&mut self, mut request: Request<'_>, is_folder: bool) -> Answer {
        let name = request.args.name()?;
        let folder = self.nodes.get(request.node)?;
        let flags = if is_folder { AtFlags::REMOVEDIR } else { AtFlags::empty() };
        rustix::fs::unlinkat(&folder, name, flags)?;
        done()
    }

    pub(super) fn rename(&mut self, mut request: Request<'_>, has_flags: bool) -> Answer {
        let args = &mut request.args;
        let to = args.u64()?;
        let flags = if has_flags { (args.u32()?, args.u32()?).0 } else { 0 };
        let (old, new) = (args.name()?, args.name()?);
        let flags = RenameFlags::from_bits(flags).ok_or(Errno::INVAL)?;
        if flags.contains(RenameFlags::WHITEOUT) {
            // It would leave a device.
            return Err(Errno::INVAL);
        }
        let (from, to) = (self.nodes.get(request.node)?, self.nodes.get(to)?);
        rustix::fs::renameat_with(&from, old, &to, new, flags)?;
        done()
    }

    pub(super) fn open_folder(&mut self, request: Request<'_>) -> Answer {
        self.handles.check_room()?;
        let folder = self.nodes.get(request.node)?;
        if self.nodes.kind(request.node)? != FileType::Directory {
            return Err(Errno::NOTDIR);
        }
        let open = self.nodes.reopen(folder.as_fd(), OFlags::RDONLY | OFlags::DIRECTORY)?;
        let mut results = Results::default();
        results.opened(self.opened(Kind::Folder, request.node, open)?);
        Ok(Reply::Results(results))
    }

    /// `plus`: with what the entries are, of which the guest is told then.
    pub(super) fn read_folder(&mut self, mut request: Request<'_>, plus: bool) -> Answer {
        let args = &mut request.args;
        let (handle, offset, size) = (args.u64()?, args.u64()?, args.u32()?);
        let room = request.room.min(u64::from(size)).min(FS_FOLDER_BYTES_MAX as u64) as usize;
        let known = if plus { Some(self.nodes.get(request.node)?) } else { None };
        let folder = self.handles.get(Kind::Folder, handle)?;
        rustix::fs::seek(folder, SeekFrom::Start(offset))?;
        let mut results = Results::default();
        // More than fits is read again by the next request.
        let part = self.entries.get_mut(..room.max(512)).ok_or(Errno::INVAL)?;
        let mut entries = RawDir::new(folder, part);
        let mut is_full = false;
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(_) if !results.0.is_empty() => break,
                Err(errno) => return Err(errno),
            };
            let name = entry.file_name();
            let len = folder_entry_len(name) + if plus { ENTRY_LEN } else { 0 };
            if results.0.len() + len > room {
                break;
            }
            if let Some(known) = &known {
                // One that is gone, or not to be had, has no number.
                let found = match name == c"." || name == c".." || is_full {
                    true => None,
                    false => match self.nodes.look_up(known.as_fd(), name) {
                        Ok(found) => Some(found),
                        Err(errno) => {
                            // Each would look for room in vain again.
                            is_full = matches!(errno, Errno::NFILE | Errno::MFILE);
                            None
                        }
                    },
                };
                results.entry(found.map_or(0, |(number, _)| number), found.as_ref().map(|f| &f.1));
            }
            let kind = match entry.file_type() {
                // 0 is DT_UNKNOWN: whoever wants to know asks for the attributes.
                FileType::Unknown => 0,
                kind => kind.as_raw_mode() >> 12,
            };
            results.folder_entry(entry.ino(), entry.next_entry_cookie(), kind, name);
            if results.0.len() + folder_entry_len(c"") > room || entries.is_buffer_empty() {
                break;
            }
        }
        Ok(Reply::Results(results))
    }
}
