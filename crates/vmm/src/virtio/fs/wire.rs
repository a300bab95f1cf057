//! FUSE messages (linux/fuse.h): little-endian fields without gaps.
//!
//! ```text
//! request: len u32, opcode u32, unique u64, node u64, uid u32, gid u32, pid u32, reserved u32; arguments
//! answer:  len u32, error i32 (0 or a negated errno), unique u64; results
//! ```

use std::ffi::CStr;

use rustix::fs::Statx;
use rustix::io::Errno;

/// Bytes before a request's arguments.
pub(super) const REQUEST_HEADER: usize = 40;
/// Bytes before an answer's results.
pub(super) const ANSWER_HEADER: usize = 16;
/// Bytes of the fixed arguments of a read or a write.
pub(super) const TRANSFER_ARGUMENTS: usize = 40;
/// The number of the shared folder itself.
pub(super) const ROOT: u64 = 1;
/// Seconds for which the guest may believe what it was told of a file.
pub(super) const VALID_SECONDS: u64 = 1;

/// The protocol that is spoken.
pub(super) const MAJOR: u32 = 7;
/// What is offered; guests may know less, down to [`MINOR_MIN`].
pub(super) const MINOR: u32 = 31;
/// Older ones have shorter messages.
pub(super) const MINOR_MIN: u32 = 27;

/// Features of the protocol that are used where the guest knows them.
pub(super) mod init {
    /// Reads of one file at the same time.
    pub const ASYNC_READ: u32 = 1;
    /// Writes of more than a page.
    pub const BIG_WRITES: u32 = 1 << 5;
    /// Cached pages go when a file's time or size is another.
    pub const AUTO_INVAL_DATA: u32 = 1 << 12;
    /// Folders are read with what their entries are.
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    /// The guest guesses when that is worth it.
    pub const READDIRPLUS_AUTO: u32 = 1 << 14;
    /// Direct I/O of one file at the same time.
    pub const ASYNC_DIO: u32 = 1 << 15;
    /// Lookups in one folder at the same time.
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    /// `max_pages` is in the answer.
    pub const MAX_PAGES: u32 = 1 << 22;
    /// All of them.
    pub const WANTED: u32 = ASYNC_READ
        | BIG_WRITES
        | AUTO_INVAL_DATA
        | DO_READDIRPLUS
        | READDIRPLUS_AUTO
        | ASYNC_DIO
        | PARALLEL_DIROPS
        | MAX_PAGES;
}

/// What a request asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opcode {
    Lookup,
    Forget,
    GetAttr,
    SetAttr,
    ReadLink,
    Symlink,
    MkNod,
    MkDir,
    Unlink,
    RmDir,
    Rename,
    Link,
    Open,
    Read,
    Write,
    StatFs,
    Release,
    Fsync,
    Init,
    OpenDir,
    ReadDir,
    ReleaseDir,
    FsyncDir,
    Create,
    Destroy,
    BatchForget,
    Fallocate,
    ReadDirPlus,
    Rename2,
    Lseek,
    CopyFileRange,
    SyncFs,
}

impl Opcode {
    /// None: not served, and the guest is told so (ENOSYS), upon which it does not ask again. Among
    /// these are extended attributes, which would cost a request for each write, locks, which are
    /// the guest's own then, and flush at each close.
    pub fn parse(number: u32) -> Option<Self> {
        Some(match number {
            1 => Self::Lookup,
            2 => Self::Forget,
            3 => Self::GetAttr,
            4 => Self::SetAttr,
            5 => Self::ReadLink,
            6 => Self::Symlink,
            8 => Self::MkNod,
            9 => Self::MkDir,
            10 => Self::Unlink,
            11 => Self::RmDir,
            12 => Self::Rename,
            13 => Self::Link,
            14 => Self::Open,
            15 => Self::Read,
            16 => Self::Write,
            17 => Self::StatFs,
            18 => Self::Release,
            20 => Self::Fsync,
            26 => Self::Init,
            27 => Self::OpenDir,
            28 => Self::ReadDir,
            29 => Self::ReleaseDir,
            30 => Self::FsyncDir,
            35 => Self::Create,
            38 => Self::Destroy,
            42 => Self::BatchForget,
            43 => Self::Fallocate,
            44 => Self::ReadDirPlus,
            45 => Self::Rename2,
            46 => Self::Lseek,
            47 => Self::CopyFileRange,
            50 => Self::SyncFs,
            _ => return None,
        })
    }

    /// Whether it changes something below the folder whatever its arguments are.
    pub fn writes(self) -> bool {
        matches!(
            self,
            Self::SetAttr
                | Self::Symlink
                | Self::MkNod
                | Self::MkDir
                | Self::Unlink
                | Self::RmDir
                | Self::Rename
                | Self::Rename2
                | Self::Link
                | Self::Write
                | Self::Create
                | Self::Fallocate
                | Self::CopyFileRange
        )
    }
}

/// The beginning of a request.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    /// Bytes of the whole request.
    pub len: u32,
    /// Read by [`Opcode::parse`].
    pub opcode: u32,
    /// What the answer is told apart by.
    pub unique: u64,
    /// The file that it is about.
    pub node: u64,
    /// Who asks.
    pub user: User,
}

/// Who asks, in numbers of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

impl Header {
    pub fn parse(bytes: &[u8; REQUEST_HEADER]) -> Result<Self, Errno> {
        let mut args = Arguments(bytes);
        Ok(Self {
            len: args.u32()?,
            opcode: args.u32()?,
            unique: args.u64()?,
            node: args.u64()?,
            user: User { uid: args.u32()?, gid: args.u32()? },
        })
    }
}

/// The rest of a request's arguments. What is not there is EINVAL.
#[derive(Clone, Copy, Debug)]
pub(super) struct Arguments<'a>(pub &'a [u8]);

impl<'a> Arguments<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], Errno> {
        let (first, rest) = self.0.split_first_chunk().ok_or(Errno::INVAL)?;
        self.0 = rest;
        Ok(*first)
    }

    pub fn u32(&mut self) -> Result<u32, Errno> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    pub fn u64(&mut self) -> Result<u64, Errno> {
        Ok(u64::from_le_bytes(self.take()?))
    }

    /// Bytes that end in a zero, such as the target of a link.
    pub fn text(&mut self) -> Result<&'a CStr, Errno> {
        let text = CStr::from_bytes_until_nul(self.0).map_err(|_| Errno::INVAL)?;
        self.0 = self.0.get(text.count_bytes() + 1..).ok_or(Errno::INVAL)?;
        Ok(text)
    }

    /// The name of something in a folder: one step downwards, never up, away or nowhere.
    pub fn name(&mut self) -> Result<&'a CStr, Errno> {
        let name = self.text()?;
        match name.to_bytes() {
            b"" | b"." | b".." => Err(Errno::INVAL),
            bytes if bytes.contains(&b'/') => Err(Errno::INVAL),
            bytes if bytes.len() > libc::FILENAME_MAX as usize => Err(Errno::NAMETOOLONG),
            _ => Ok(name),
        }
    }
}

/// An answer's results.
#[derive(Debug, Default)]
pub(super) struct Results(pub Vec<u8>);

impl Results {
    pub fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }

    pub fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    pub fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    /// `fuse_entry_out`: a file and what it is. Number 0 is no file.
    pub fn entry(&mut self, node: u64, stat: Option<&Statx>) {
        self.u64(node);
        self.u64(0);
        self.u64(VALID_SECONDS);
        self.u64(VALID_SECONDS);
        self.u64(0);
        match stat {
            Some(stat) => self.attributes(stat),
            None => self.0.extend([0; 88]),
        }
    }

    /// `fuse_attr_out`.
    pub fn attributes_valid(&mut self, stat: &Statx) {
        self.u64(VALID_SECONDS);
        self.u64(0);
        self.attributes(stat);
    }

    /// `fuse_open_out`.
    pub fn opened(&mut self, handle: u64) {
        self.u64(handle);
        self.u64(0);
    }

    fn attributes(&mut self, stat: &Statx) {
        self.u64(stat.stx_ino);
        self.u64(stat.stx_size);
        self.u64(stat.stx_blocks);
        let times = [&stat.stx_atime, &stat.stx_mtime, &stat.stx_ctime];
        times.iter().for_each(|time| self.u64(time.tv_sec.cast_unsigned()));
        times.iter().for_each(|time| self.u32(time.tv_nsec));
        self.u32(u32::from(stat.stx_mode));
        self.u32(stat.stx_nlink);
        self.u32(stat.stx_uid);
        self.u32(stat.stx_gid);
        let (major, minor) = (stat.stx_rdev_major, stat.stx_rdev_minor);
        // new_encode_dev of Linux.
        self.u32(minor & 0xff | (major & 0xfff) << 8 | (minor & !0xff) << 12);
        self.u32(stat.stx_blksize);
        self.u32(0);
    }

    /// `fuse_dirent`, padded; with a file before it in a `fuse_direntplus`.
    pub fn folder_entry(&mut self, ino: u64, next: u64, kind: u32, name: &CStr) {
        self.u64(ino);
        self.u64(next);
        self.u32(name.count_bytes() as u32);
        self.u32(kind);
        self.0.extend(name.to_bytes());
        self.0.resize(self.0.len().next_multiple_of(8), 0);
    }
}

/// Bytes of a `fuse_dirent` with that name.
pub(super) fn folder_entry_len(name: &CStr) -> usize {
    (24 + name.count_bytes()).next_multiple_of(8)
}

/// Bytes of a `fuse_entry_out`.
pub(super) const ENTRY_LEN: usize = 128;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_step_down() {
        let name = |bytes: &[u8]| Arguments(bytes).name().map(CStr::to_bytes).map(<[u8]>::to_vec);
        assert_eq!(name(b"a b\0rest"), Ok(b"a b".to_vec()));
        assert_eq!(name(b"..a\0"), Ok(b"..a".to_vec()));
        for bad in [&b""[..], b"\0", b".\0", b"..\0", b"/\0", b"a/b\0", b"/etc\0", b"no end"] {
            assert_eq!(name(bad), Err(Errno::INVAL), "{bad:?}");
        }
        assert_eq!(name(&[vec![b'x'; 5000], vec![0]].concat()), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn two_names_follow_each_other() {
        let mut args = Arguments(b"old\0new\0");
        assert_eq!((args.name(), args.name()), (Ok(c"old"), Ok(c"new")));
        assert!(args.name().is_err() && args.u32().is_err());
    }

    #[test]
    fn entries_have_the_sizes_of_the_protocol() {
        let stat = rustix::fs::statx(
            rustix::fs::CWD,
            ".",
            rustix::fs::AtFlags::empty(),
            rustix::fs::StatxFlags::BASIC_STATS,
        );
        let mut results = Results::default();
        results.entry(1, Some(&stat.unwrap()));
        assert_eq!(results.0.len(), ENTRY_LEN);
        results.entry(0, None);
        assert_eq!(results.0.len(), 2 * ENTRY_LEN);
        let before = results.0.len();
        results.folder_entry(1, 2, 4, c"nine char");
        assert_eq!(results.0.len() - before, folder_entry_len(c"nine char"));
    }
}
