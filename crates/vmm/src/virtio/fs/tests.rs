//! A shared folder through its registers and rings, as a guest's driver uses it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use tempfile::TempDir;

use crate::virtio::fs::device::{Folder, FolderShare, ShareError};
use crate::virtio::fs::fuzz_requests;
use crate::virtio::fs::wire::{ANSWER_HEADER, ENTRY_LEN, ROOT};
use crate::virtio::testing::{Guest, Part};

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const READLINK: u32 = 5;
const SYMLINK: u32 = 6;
const MKNOD: u32 = 8;
const MKDIR: u32 = 9;
const UNLINK: u32 = 10;
const RENAME: u32 = 12;
const LINK: u32 = 13;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const GETXATTR: u32 = 22;
const INIT: u32 = 26;
const OPENDIR: u32 = 27;
const READDIR: u32 = 28;
const CREATE: u32 = 35;
const BATCH_FORGET: u32 = 42;
const FALLOCATE: u32 = 43;
const READDIRPLUS: u32 = 44;
const RENAME2: u32 = 45;
const LSEEK: u32 = 46;
const COPY_FILE_RANGE: u32 = 47;

const URGENT: usize = 0;
const REQUESTS: usize = 1;
const RDWR: u32 = libc::O_RDWR as u32;
const ME: (u32, u32) = (0, 0);

/// Fields of a message.
#[derive(Default)]
struct Fields(Vec<u8>);

impl Fields {
    fn u32s(mut self, values: &[u32]) -> Self {
        values.iter().for_each(|value| self.0.extend(value.to_le_bytes()));
        self
    }

    fn u64s(mut self, values: &[u64]) -> Self {
        values.iter().for_each(|value| self.0.extend(value.to_le_bytes()));
        self
    }

    fn name(mut self, name: &str) -> Self {
        self.0.extend(name.as_bytes());
        self.0.push(0);
        self
    }
}

fn fields() -> Fields {
    Fields::default()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// A guest with a shared folder.
struct Driver {
    guest: Guest,
    user: (u32, u32),
    unique: u64,
}

impl Driver {
    fn new(folder: &Path, read_only: bool) -> Self {
        let share = FolderShare { path: folder.to_owned(), tag: "share0".into(), read_only };
        let mut guest = Guest::new(Folder::new(&share, 256).unwrap());
        guest.start(0, 0);
        let mut driver = Self { guest, user: ME, unique: 0 };
        let init = fields().u32s(&[7, 38, 1 << 20, u32::MAX]);
        let answer = driver.ask(INIT, 0, init, 64).unwrap();
        assert_eq!((u32_at(&answer, 0), u32_at(&answer, 4)), (7, 31));
        // max_write.
        assert_eq!(u32_at(&answer, 20), 1 << 20);
        driver
    }

    fn header(&mut self, opcode: u32, node: u64, len: usize) -> Vec<u8> {
        self.unique += 1;
        let header = fields().u32s(&[40 + len as u32, opcode]).u64s(&[self.unique, node]);
        header.u32s(&[self.user.0, self.user.1, 1, 0]).0
    }

    /// Sends a request with room for so many bytes of results; gives these, or the error.
    fn ask(&mut self, opcode: u32, node: u64, args: Fields, room: u32) -> Result<Vec<u8>, i32> {
        let header = self.header(opcode, node, args.0.len());
        let indirect = self.unique.is_multiple_of(2);
        let mut parts = vec![Part::Out(&header), Part::In(16)];
        if !args.0.is_empty() {
            parts.insert(1, Part::Out(&args.0));
        }
        if room > 0 {
            parts.push(Part::In(room));
        }
        let (used, data) = self.guest.request(REQUESTS, &parts, indirect);
        assert_eq!(u32_at(&data, 0), used, "the length in the header is the used one");
        assert_eq!(u64_at(&data, 8), self.unique);
        let error = u32_at(&data, 4).cast_signed();
        match error {
            0 => Ok(data[ANSWER_HEADER..used as usize].to_vec()),
            _ => {
                assert_eq!(used as usize, ANSWER_HEADER);
                Err(-error)
            }
        }
    }

    fn look_up(&mut self, folder: u64, name: &str) -> Result<u64, i32> {
        let entry = self.ask(LOOKUP, folder, fields().name(name), ENTRY_LEN as u32)?;
        Ok(u64_at(&entry, 0))
    }

    fn open(&mut self, node: u64, flags: u32) -> Result<u64, i32> {
        Ok(u64_at(&self.ask(OPEN, node, fields().u32s(&[flags, 0]), 16)?, 0))
    }

    fn create(&mut self, folder: u64, name: &str, mode: u32) -> Result<(u64, u64), i32> {
        let args = fields().u32s(&[RDWR, mode, 0, 0]).name(name);
        let answer = self.ask(CREATE, folder, args, 144)?;
        Ok((u64_at(&answer, 0), u64_at(&answer, ENTRY_LEN)))
    }

    fn read(&mut self, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        let args = fields().u64s(&[handle, offset]).u32s(&[size, 0]).u64s(&[0, 0]);
        self.ask(READ, 0, args, size)
    }

    fn write(&mut self, handle: u64, offset: u64, data: &[u8], flags: u32) -> Result<u32, i32> {
        let args = fields().u64s(&[handle, offset]).u32s(&[data.len() as u32, 0]);
        let mut args = args.u64s(&[0]).u32s(&[flags, 0]);
        args.0.extend(data);
        Ok(u32_at(&self.ask(WRITE, 0, args, 8)?, 0))
    }

    fn list(&mut self, folder: u64, plus: bool, room: u32) -> Result<Vec<String>, i32> {
        let handle = u64_at(&self.ask(OPENDIR, folder, fields().u32s(&[0, 0]), 16)?, 0);
        let (mut names, mut offset) = (Vec::new(), 0);
        loop {
            let args = fields().u64s(&[handle, offset]).u32s(&[room, 0]).u64s(&[0, 0]);
            let opcode = if plus { READDIRPLUS } else { READDIR };
            let bytes = self.ask(opcode, folder, args, room)?;
            if bytes.is_empty() {
                break;
            }
            let mut at = 0;
            while at < bytes.len() {
                let entry = at + if plus { ENTRY_LEN } else { 0 };
                offset = u64_at(&bytes, entry + 8);
                let len = u32_at(&bytes, entry + 16) as usize;
                let name = String::from_utf8(bytes[entry + 24..entry + 24 + len].to_vec());
                names.push(name.unwrap());
                at = (entry + 24 + len).next_multiple_of(8);
            }
        }
        self.ask(RELEASE, folder, fields().u64s(&[handle, 0, 0]), 0)?;
        names.retain(|name| name != "." && name != "..");
        names.sort();
        Ok(names)
    }
}

fn share() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn the_tag_is_in_the_configuration() {
    let dir = share();
    let driver = Driver::new(dir.path(), false);
    let tag: Vec<_> = (0..8).map(|at| driver.guest.device_config(at, 1) as u8).collect();
    assert_eq!(tag, b"share0\0\0");
    assert_eq!(driver.guest.device_config(36, 4), 1);
    assert_eq!(driver.guest.device_config(40, 4), 0);
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let dir = share();
    fs::write(dir.path().join("file"), "").unwrap();
    for name in ["nowhere", "file"] {
        let path = dir.path().join(name);
        let share = FolderShare { path: path.clone(), tag: "a".into(), read_only: false };
        let error = Folder::new(&share, 256).err().unwrap().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
    let tagged = |tag: &str| {
        let share = FolderShare { path: dir.path().into(), tag: tag.into(), read_only: false };
        Folder::new(&share, 256).err()
    };
    assert!(tagged(&"x".repeat(36)).is_none());
    assert!(matches!(tagged(&"x".repeat(37)), Some(ShareError::Tag(_))));
    assert!(matches!(tagged(""), Some(ShareError::Tag(_))));
    let share = FolderShare { path: dir.path().into(), tag: "a".into(), read_only: false };
    assert!(matches!(Folder::new(&share, 20), Err(ShareError::Files { left: 20, .. })));
}

#[test]
fn files_are_made_written_and_read() {
    let dir = share();
    let mut driver = Driver::new(dir.path(), false);
    let (node, handle) = driver.create(ROOT, "ä file", 0o666).unwrap();
    let path = dir.path().join("ä file");
    // As the guest says, whatever this process' umask is.
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o666);
    let data: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(driver.write(handle, 5, &data, 0), Ok(300_000));
    assert_eq!(fs::read(&path).unwrap()[5..], data);
    assert_eq!(driver.read(handle, 5, 300_000), Ok(data.clone()));
    assert_eq!(driver.read(handle, 300_000, 1000), Ok(data[299_995..].to_vec()));
    assert_eq!(driver.read(handle, 1 << 40, 1000), Ok(vec![]));
    assert_eq!(driver.read(handle, u64::MAX, 1000), Err(libc::EINVAL));
    assert_eq!(driver.write(handle, 0, b"end", libc::O_APPEND as u32), Ok(3));
    assert_eq!(fs::read(&path).unwrap().len(), 300_008);
    let attributes = driver.ask(GETATTR, node, fields().u32s(&[0, 0]).u64s(&[0]), 104).unwrap();
    assert_eq!(u64_at(&attributes, 24), 300_008);
    assert!(driver.ask(RELEASE, node, fields().u64s(&[handle, 0, 0]), 0).is_ok());
    assert_eq!(driver.read(handle, 0, 10), Err(libc::EBADF));
}

#[test]
fn what_is_written_to_memory_is_told_of() {
    let dir = share();
    fs::write(dir.path().join("code"), [0x90; 4096]).unwrap();
    let mut driver = Driver::new(dir.path(), true);
    let node = driver.look_up(ROOT, "code").unwrap();
    let handle = driver.open(node, 0).unwrap();
    let seen = std::sync::Arc::new(std::sync::Mutex::new((0, 0)));
    let (before, after) = (std::sync::Arc::clone(&seen), std::sync::Arc::clone(&seen));
    let set = driver.guest.ram.before_access_hook().set(Box::new(move |_, len, write| {
        before.lock().unwrap().0 += u64::from(write && len >= 4000);
    }));
    assert!(set.is_ok());
    let set = driver.guest.ram.write_hook().set(Box::new(move |_, len| {
        after.lock().unwrap().1 += u64::from(len >= 4000);
    }));
    assert!(set.is_ok());
    *seen.lock().unwrap() = (0, 0);
    assert_eq!(driver.read(handle, 0, 4096), Ok(vec![0x90; 4096]));
    let (before, after) = *seen.lock().unwrap();
    assert!(
        before >= 2 && after >= 2,
        "the driver's own clearing, and the device: {before} {after}"
    );
}

#[test]
fn names_change_and_go() {
    let dir = share();
    let mut driver = Driver::new(dir.path(), false);
    let made = driver.ask(MKDIR, ROOT, fields().u32s(&[0o777, 0]).name("sub"), 128).unwrap();
    let sub = u64_at(&made, 0);
    assert_eq!(fs::metadata(dir.path().join("sub")).unwrap().permissions().mode() & 0o777, 0o777);
    let (file, _) = driver.create(sub, "a", 0o600).unwrap();
    assert!(driver.ask(LINK, ROOT, fields().u64s(&[file]).name("hard"), 128).is_ok());
    assert_eq!(fs::metadata(dir.path().join("hard")).unwrap().nlink(), 2);
    let rename = |to: u64| fields().u64s(&[to]).name("a").name("b");
    assert!(driver.ask(RENAME, sub, rename(ROOT), 0).is_ok());
    assert!(dir.path().join("b").exists() && !dir.path().join("sub/a").exists());
    let exclusive = fields().u64s(&[ROOT]).u32s(&[1, 0]).name("b").name("hard");
    assert_eq!(driver.ask(RENAME2, ROOT, exclusive, 0), Err(libc::EEXIST));
    let whiteout = fields().u64s(&[ROOT]).u32s(&[4, 0]).name("b").name("c");
    assert_eq!(driver.ask(RENAME2, ROOT, whiteout, 0), Err(libc::EINVAL));
    assert!(driver.ask(UNLINK, ROOT, fields().name("b"), 0).is_ok());
    assert_eq!(driver.look_up(ROOT, "b"), Err(libc::ENOENT));
    // A device, which only the guest's own would be.
    let device = fields().u32s(&[libc::S_IFCHR | 0o666, 0x103, 0, 0]).name("null");
    assert_eq!(driver.ask(MKNOD, ROOT, device, 128), Err(libc::EPERM));
    let pipe = fields().u32s(&[libc::S_IFIFO | 0o666, 0, 0, 0]).name("pipe");
    let pipe = u64_at(&driver.ask(MKNOD, ROOT, pipe, 128).unwrap(), 0);
    assert_eq!(driver.open(pipe, 0), Err(libc::ENXIO));
}

#[test]
fn attributes_are_set() {
    let dir = share();
    let mut driver = Driver::new(dir.path(), false);
    let (node, handle) = driver.create(ROOT, "a", 0o600).unwrap();
    let path = dir.path().join("a");
    let set = |valid: u32, handle: u64, size: u64, mode: u32| {
        fields().u32s(&[valid, 0]).u64s(&[handle, size, 0, 1_000_000, 2_000_000, 0]).u32s(&[
            5,
            6,
            0,
            mode,
            0,
            u32::MAX,
            u32::MAX,
            0,
        ])
    };
    assert!(driver.ask(SETATTR, node, set(1, 0, 0, 0o4751), 104).is_ok());
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o4751);
    assert!(driver.ask(SETATTR, node, set(8, 0, 1234, 0), 104).is_ok());
    assert_eq!(fs::metadata(&path).unwrap().len(), 1234);
    assert!(driver.ask(SETATTR, node, set(8 | 64, handle, 99, 0), 104).is_ok());
    assert!(driver.ask(SETATTR, node, set(16 | 32, 0, 0, 0), 104).is_ok());
    let meta = fs::metadata(&path).unwrap();
    assert_eq!(
        (meta.len(), meta.atime(), meta.mtime(), meta.mtime_nsec()),
        (99, 1_000_000, 2_000_000, 6)
    );
    // Nobody is no owner.
    assert!(driver.ask(SETATTR, node, set(2 | 4, 0, 0, 0), 104).is_ok());
    assert_eq!(fs::metadata(&path).unwrap().uid(), meta.uid());
    let stat = driver.ask(STATFS, ROOT, fields(), 80).unwrap();
    assert!(stat.len() == 80 && u64_at(&stat, 0) > 0);
}

#[test]
fn links_are_handed_over_and_never_followed() {
    let dir = share();
    let outside = share();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    let out = outside.path().to_str().unwrap();
    symlink(outside.path().join("secret"), dir.path().join("to-secret")).unwrap();
    symlink(outside.path(), dir.path().join("to-folder")).unwrap();
    let mut driver = Driver::new(dir.path(), false);
    let link = driver.look_up(ROOT, "to-secret").unwrap();
    let target = driver.ask(READLINK, link, fields(), 4096).unwrap();
    assert_eq!(target, format!("{out}/secret").into_bytes());
    assert_eq!(driver.open(link, 0), Err(libc::ENXIO));
    let truncate = fields().u32s(&[8, 0]).u64s(&[0; 6]).u32s(&[0; 8]);
    assert_eq!(driver.ask(SETATTR, link, truncate, 104), Err(libc::EINVAL));
    let chmod = fields().u32s(&[1, 0]).u64s(&[0; 6]).u32s(&[0, 0, 0, 0o777, 0, 0, 0, 0]);
    assert_eq!(driver.ask(SETATTR, link, chmod, 104), Err(libc::EOPNOTSUPP));
    let folder = driver.look_up(ROOT, "to-folder").unwrap();
    assert_eq!(driver.look_up(folder, "secret"), Err(libc::ENOTDIR));
    assert_eq!(driver.create(folder, "new", 0o600), Err(libc::ENOTDIR));
    assert_eq!(driver.list(folder, false, 4096), Err(libc::ENOTDIR));
    // A name that is a link: the link, or nothing.
    assert_eq!(driver.create(ROOT, "to-secret", 0o600), Err(libc::ENXIO));
    for name in ["..", ".", "", "../x", "/etc/passwd", "to-folder/secret"] {
        assert_eq!(driver.look_up(ROOT, name), Err(libc::EINVAL), "{name}");
        assert_eq!(driver.create(ROOT, name, 0o600), Err(libc::EINVAL), "{name}");
        let rename = fields().u64s(&[ROOT]).name("to-secret").name(name);
        assert_eq!(driver.ask(RENAME, ROOT, rename, 0), Err(libc::EINVAL), "{name}");
    }
    // One of the guest's own leads wherever it wants, in the guest.
    let made = fields().name("mine").name("/");
    let mine = u64_at(&driver.ask(SYMLINK, ROOT, made, 128).unwrap(), 0);
    assert_eq!(driver.look_up(mine, "etc"), Err(libc::ENOTDIR));
    assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    assert_eq!(fs::read(outside.path().join("secret")).unwrap(), b"secret");
}

#[test]
fn what_is_read_only_is_so_here() {
    let dir = share();
    fs::write(dir.path().join("a"), "a").unwrap();
    let mut driver = Driver::new(dir.path(), true);
    let node = driver.look_up(ROOT, "a").unwrap();
    let handle = driver.open(node, 0).unwrap();
    assert_eq!(driver.read(handle, 0, 10), Ok(b"a".to_vec()));
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_TRUNC] {
        assert_eq!(driver.open(node, flags as u32), Err(libc::EROFS));
    }
    assert_eq!(driver.create(ROOT, "b", 0o600), Err(libc::EROFS));
    assert_eq!(driver.write(handle, 0, b"x", 0), Err(libc::EROFS));
    let name = || fields().name("a");
    assert_eq!(driver.ask(UNLINK, ROOT, name(), 0), Err(libc::EROFS));
    assert_eq!(driver.ask(MKDIR, ROOT, fields().u32s(&[0, 0]).name("d"), 128), Err(libc::EROFS));
    let allocate = fields().u64s(&[handle, 0, 100]).u32s(&[0, 0]);
    assert_eq!(driver.ask(FALLOCATE, node, allocate, 0), Err(libc::EROFS));
    let touch = fields().u32s(&[16, 0]).u64s(&[0; 6]).u32s(&[0; 8]);
    assert_eq!(driver.ask(SETATTR, node, touch, 104), Err(libc::EROFS));
    assert_eq!(fs::read(dir.path().join("a")).unwrap(), b"a");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn folders_are_listed_in_pieces() {
    let dir = share();
    let mut wanted: Vec<_> =
        (0..500).map(|i| format!("file {i:03} {}", "x".repeat(i % 40))).collect();
    wanted.iter().for_each(|name| fs::write(dir.path().join(name), "").unwrap());
    wanted.sort();
    let mut driver = Driver::new(dir.path(), false);
    for (plus, room) in [(false, 4096), (false, 100_000), (true, 4096), (true, 700)] {
        assert_eq!(driver.list(ROOT, plus, room).unwrap(), wanted, "{plus} {room}");
    }
}

#[test]
fn ranges_are_copied_and_holes_found() {
    let dir = share();
    let mut driver = Driver::new(dir.path(), false);
    let (a, from) = driver.create(ROOT, "a", 0o600).unwrap();
    let (b, to) = driver.create(ROOT, "b", 0o600).unwrap();
    driver.write(from, 1 << 20, &[9; 8192], 0).unwrap();
    let copy = fields().u64s(&[from, 1 << 20, b, to, 100, u64::MAX, 0]);
    assert_eq!(u64_at(&driver.ask(COPY_FILE_RANGE, a, copy, 8).unwrap(), 0), 8192);
    assert_eq!(fs::read(dir.path().join("b")).unwrap()[100..], [9; 8192]);
    let seek = fields().u64s(&[from, 0]).u32s(&[libc::SEEK_DATA as u32, 0]);
    assert_eq!(u64_at(&driver.ask(LSEEK, a, seek, 8).unwrap(), 0), 1 << 20);
    let seek = fields().u64s(&[from, 0]).u32s(&[libc::SEEK_END as u32, 0]);
    assert_eq!(driver.ask(LSEEK, a, seek, 8), Err(libc::EINVAL));
    let allocate = fields().u64s(&[to, 0, 1 << 16]).u32s(&[0, 0]);
    assert!(driver.ask(FALLOCATE, b, allocate, 0).is_ok());
    assert_eq!(fs::metadata(dir.path().join("b")).unwrap().len(), 1 << 16);
}

#[test]
fn what_is_forgotten_is_not_known_any_more() {
    let dir = share();
    fs::write(dir.path().join("a"), "a").unwrap();
    fs::write(dir.path().join("b"), "b").unwrap();
    let mut driver = Driver::new(dir.path(), false);
    let (a, b) = (driver.look_up(ROOT, "a").unwrap(), driver.look_up(ROOT, "b").unwrap());
    assert_eq!(driver.look_up(ROOT, "a"), Ok(a));
    let forget = [driver.header(FORGET, a, 8), fields().u64s(&[2]).0].concat();
    // Nobody waits for an answer.
    assert_eq!(driver.guest.request(URGENT, &[Part::Out(&forget)], false).0, 0);
    assert_eq!(driver.open(a, 0), Err(libc::ESTALE));
    let body = fields().u32s(&[1000, 0]).u64s(&[b, 1, 77, 1]).0;
    let forget = [driver.header(BATCH_FORGET, 0, body.len()), body].concat();
    assert_eq!(driver.guest.request(URGENT, &[Part::Out(&forget)], false).0, 0);
    assert_eq!(driver.open(b, 0), Err(libc::ESTALE));
    // A driver that begins anew knows nothing.
    let a = driver.look_up(ROOT, "a").unwrap();
    let handle = driver.open(a, 0).unwrap();
    driver.guest.start(0, 0);
    assert_eq!(driver.read(handle, 0, 1), Err(libc::EBADF));
    assert_eq!(driver.open(a, 0), Err(libc::ESTALE));
}

#[test]
fn broken_requests_are_refused() {
    let dir = share();
    let mut driver = Driver::new(dir.path(), false);
    assert_eq!(driver.ask(9999, ROOT, fields(), 0), Err(libc::ENOSYS));
    assert_eq!(
        driver.ask(GETXATTR, ROOT, fields().u64s(&[0]).name("user.a"), 0),
        Err(libc::ENOSYS)
    );
    assert_eq!(driver.ask(LOOKUP, ROOT, fields(), 128), Err(libc::EINVAL));
    assert_eq!(driver.ask(OPEN, 77, fields().u32s(&[0, 0]), 16), Err(libc::ESTALE));
    assert_eq!(driver.ask(INIT, 0, fields().u32s(&[7, 8, 0, 0]), 64), Err(libc::EPROTO));
    let (_, handle) = driver.create(ROOT, "a", 0o600).unwrap();
    // More than there is in the chain, and more than is possible.
    let args = fields().u64s(&[handle, 0]).u32s(&[5000, 0]).u64s(&[0, 0]);
    assert_eq!(driver.ask(WRITE, 0, args, 8), Err(libc::EINVAL));
    let args = fields().u64s(&[handle, 0]).u32s(&[u32::MAX, 0]).u64s(&[0, 0]);
    assert_eq!(driver.ask(WRITE, 0, args, 8), Err(libc::EINVAL));
    // A length that is not the chain's.
    let mut header = driver.header(LOOKUP, ROOT, 1 << 20);
    header.extend(b"a\0");
    let (used, data) = driver.guest.request(REQUESTS, &[Part::Out(&header), Part::In(200)], false);
    assert_eq!((used, u32_at(&data, 4).cast_signed()), (16, -libc::EINVAL));
    // No room for an answer.
    let header = driver.header(STATFS, ROOT, 0);
    assert_eq!(driver.guest.request(REQUESTS, &[Part::Out(&header), Part::In(8)], false).0, 0);
    assert_eq!(driver.guest.status(), 0xf);
    driver.guest.add(REQUESTS, &[Part::Out(&[1, 2, 3])], false);
    driver.guest.kick(REQUESTS);
    driver.guest.wait_needs_reset();
}

#[test]
fn files_belong_to_who_makes_them() {
    if !rustix::process::geteuid().is_root() {
        return println!("skipped: only root makes files that are others'");
    }
    let dir = share();
    let mut driver = Driver::new(dir.path(), false);
    driver.user = (4242, 4343);
    // Others may not write here: the guest has checked that its user may, by whatever group.
    driver.create(ROOT, "a", 0o640).unwrap();
    driver.ask(MKDIR, ROOT, fields().u32s(&[0o755, 0]).name("d"), 128).unwrap();
    driver.ask(SYMLINK, ROOT, fields().name("l").name("x"), 128).unwrap();
    for name in ["a", "d", "l"] {
        let meta = fs::symlink_metadata(dir.path().join(name)).unwrap();
        assert_eq!((meta.uid(), meta.gid()), (4242, 4343), "{name}");
    }
    driver.user = ME;
    driver.create(ROOT, "mine", 0o600).unwrap();
    assert_eq!(fs::metadata(dir.path().join("mine")).unwrap().uid(), 0);
}

#[test]
fn arbitrary_requests_do_no_harm() {
    // Look "file" up, open it, write to it.
    let mut sensible = vec![0, 1, 1, 20, 5];
    sensible.extend(b"file\0");
    sensible.extend([14, 2, 20, 8, 2, 0, 0, 0, 0, 0, 0, 0]);
    sensible.extend([16, 2, 20, 24]);
    sensible.extend([1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(fuzz_requests(&sensible), 3);
    sensible[0] = 1;
    assert_eq!(fuzz_requests(&sensible), 1, "a folder that is read-only");
    let mut state = 0x1234_5678_u32;
    for round in 0..200 {
        let bytes: Vec<u8> = (0..600)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8 & if round % 2 == 0 { 0x3f } else { 0xff }
            })
            .collect();
        fuzz_requests(&bytes);
    }
}
