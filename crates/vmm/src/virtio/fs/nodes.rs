//! The files that the guest knows: those below the shared folder that it was told a number of, and
//! has not forgotten.
//!
//! ```text
//! number ──► Open: an O_PATH descriptor of the file itself, wherever it is moved
//!              │ too many are open, and this one was not used lately
//!              ▼
//!            Closed: its path below the folder ──► opened again when it is next needed, and only if
//!                                                  it is the same file; else ESTALE, and the guest
//!                                                  looks it up anew
//! ```
//!
//! A file that the guest has open is not closed here, and folders are the last: a path finds nothing any
//! more when a folder above it was renamed, and whoever works in it would not look it up anew.
//!
//! A file is opened by one name in an open folder, or by such a path beneath the shared one; links
//! are never followed in either.

use std::collections::{HashMap, VecDeque};
use std::ffi::CStr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags};
use rustix::io::Errno;

use crate::virtio::fs::wire::ROOT;
use crate::virtio::limits::{FS_NODES_MAX, FS_PATH_BYTES_MAX, FS_PATHS_BYTES_MAX};

/// What is wanted of statx; the last two tell files apart.
const WANTED: StatxFlags =
    StatxFlags::BASIC_STATS.union(StatxFlags::BTIME).union(StatxFlags::MNT_ID);
const DELETED: &[u8] = b" (deleted)";
/// How many files are looked at, which may turn out to have to stay open, until there is said to be no
/// room. The next time goes on behind them.
const CLOSE_ATTEMPTS_MAX: usize = 256;

/// What a file is.
pub(super) fn stat(file: impl AsFd) -> Result<Statx, Errno> {
    rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, WANTED)
}

/// Which file it is. The time it was made tells it from an earlier one with the same number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Identity {
    device: (u32, u32),
    inode: u64,
    mount: u64,
    born: (i64, u32),
    kind: u32,
}

impl Identity {
    fn of(stat: &Statx) -> Self {
        Self {
            device: (stat.stx_dev_major, stat.stx_dev_minor),
            inode: stat.stx_ino,
            mount: stat.stx_mnt_id,
            born: (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
            kind: u32::from(stat.stx_mode) & libc::S_IFMT,
        }
    }
}

enum Place {
    Open(Arc<OwnedFd>),
    Closed(Box<[u8]>),
}

struct Node {
    identity: Identity,
    place: Place,
    /// How often the guest was told of it, less what it has forgotten.
    lookups: u64,
    /// Since it was last considered for being closed.
    used: bool,
    /// How often the guest has it open.
    pins: u32,
}

/// The files that the guest knows.
pub(super) struct Nodes {
    root: Arc<OwnedFd>,
    nodes: HashMap<u64, Node>,
    numbers: HashMap<Identity, u64>,
    next: u64,
    /// Numbers of open ones, and of some that are gone; the next to consider is first.
    clock: VecDeque<u64>,
    open: usize,
    open_max: usize,
    path_bytes: usize,
    /// `/proc/self/fd`, by which descriptors that only name a file get to its content.
    descriptors: OwnedFd,
}

impl Nodes {
    /// Of a shared folder, which was opened with O_PATH. At most `open_max` descriptors are kept.
    pub fn new(root: OwnedFd, open_max: usize) -> Result<Self, Errno> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let descriptors = rustix::fs::open("/proc/self/fd", flags, Mode::empty())?;
        let mut nodes = Self {
            root: Arc::new(root),
            nodes: HashMap::new(),
            numbers: HashMap::new(),
            next: ROOT + 1,
            clock: VecDeque::new(),
            open: 0,
            open_max,
            path_bytes: 0,
            descriptors,
        };
        nodes.forget_all()?;
        Ok(nodes)
    }

    /// The shared folder.
    pub fn root(&self) -> BorrowedFd<'_> {
        self.root.as_fd()
    }

    /// Forgets all but the shared folder.
    pub fn forget_all(&mut self) -> Result<(), Errno> {
        let identity = Identity::of(&stat(&self.root)?);
        self.nodes.clear();
        self.numbers.clear();
        self.clock.clear();
        (self.open, self.path_bytes) = (0, 0);
        let place = Place::Open(Arc::clone(&self.root));
        self.nodes.insert(ROOT, Node { identity, place, lookups: 1, used: true, pins: 0 });
        self.numbers.insert(identity, ROOT);
        Ok(())
    }

    /// A descriptor of a file that the guest knows: it names the file and gives no access to it.
    pub fn get(&mut self, number: u64) -> Result<Arc<OwnedFd>, Errno> {
        let node = self.nodes.get_mut(&number).ok_or(Errno::STALE)?;
        node.used = true;
        let path = match &node.place {
            Place::Open(file) => return Ok(Arc::clone(file)),
            Place::Closed(path) => path,
        };
        let file = open_beneath(&self.root, &**path).map_err(|errno| match errno {
            Errno::NFILE | Errno::MFILE | Errno::NOMEM => errno,
            // Whatever is wrong with the path, the file is not gone: the guest looks it up anew.
            _ => Errno::STALE,
        })?;
        if Identity::of(&stat(&file)?) != node.identity {
            return Err(Errno::STALE);
        }
        self.opened(number, file)
    }

    /// The guest has opened a file.
    pub fn pin(&mut self, number: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.pins = node.pins.saturating_add(1);
        }
    }

    /// It has closed it.
    pub fn unpin(&mut self, number: u64) {
        if let Some(node) = self.nodes.get_mut(&number) {
            node.pins = node.pins.saturating_sub(1);
        }
    }

    /// The kind of a file that the guest knows.
    pub fn kind(&self, number: u64) -> Result<FileType, Errno> {
        let node = self.nodes.get(&number).ok_or(Errno::STALE)?;
        Ok(FileType::from_raw_mode(node.identity.kind))
    }

    /// Looks a name up in a folder, for a guest that is told of it.
    pub fn look_up(&mut self, folder: BorrowedFd<'_>, name: &CStr) -> Result<(u64, Statx), Errno> {
        let file = open_beneath(folder, name)?;
        let stat = stat(&file)?;
        Ok((self.tell(file, &stat)?, stat))
    }

    /// The number of a file, which the guest is told of.
    fn tell(&mut self, file: OwnedFd, stat: &Statx) -> Result<u64, Errno> {
        let identity = Identity::of(stat);
        if let Some(&number) = self.numbers.get(&identity) {
            let node = self.nodes.get_mut(&number).ok_or(Errno::STALE)?;
            node.lookups = node.lookups.saturating_add(1);
            node.used = true;
            if matches!(node.place, Place::Closed(_)) {
                // It may be elsewhere by now. That there is no room for it is found out when it is
                // needed.
                let _ = self.opened(number, file);
            }
            return Ok(number);
        }
        if self.nodes.len() >= FS_NODES_MAX {
            return Err(Errno::NFILE);
        }
        self.make_room()?;
        let number = self.next;
        self.next += 1;
        let place = Place::Open(Arc::new(file));
        self.nodes.insert(number, Node { identity, place, lookups: 1, used: false, pins: 0 });
        self.numbers.insert(identity, number);
        self.clock.push_back(number);
        self.open += 1;
        Ok(number)
    }

    /// The guest has forgotten that it was told of a file so often.
    pub fn forget(&mut self, number: u64, count: u64) {
        let Some(node) = self.nodes.get_mut(&number).filter(|_| number != ROOT) else { return };
        node.lookups = node.lookups.saturating_sub(count);
        if node.lookups > 0 {
            return;
        }
        if let Some(node) = self.nodes.remove(&number) {
            self.numbers.remove(&node.identity);
            match node.place {
                Place::Open(_) => self.open -= 1,
                Place::Closed(path) => self.path_bytes -= path.len(),
            }
        }
        // What is gone is still in the clock.
        if self.clock.len() > 2 * self.open_max {
            let nodes = &self.nodes;
            self.clock.retain(|number| nodes.get(number).is_some_and(Node::is_open));
        }
    }

    /// Opens the content of a file that a descriptor names. Whoever asks has looked at its kind: only
    /// files and folders are opened, since others do things when they are.
    pub fn reopen(&self, file: BorrowedFd<'_>, flags: OFlags) -> Result<OwnedFd, Errno> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
        rustix::fs::openat(&self.descriptors, name_of(file), flags, Mode::empty())
    }

    /// What [`Self::reopen`] opens by, for calls that take names: `AtFlags::SYMLINK_FOLLOW` leads to
    /// the file itself, even where that is a link.
    pub fn by_name(&self, file: BorrowedFd<'_>) -> (BorrowedFd<'_>, String) {
        (self.descriptors.as_fd(), name_of(file))
    }

    fn opened(&mut self, number: u64, file: OwnedFd) -> Result<Arc<OwnedFd>, Errno> {
        self.make_room()?;
        let node = self.nodes.get_mut(&number).ok_or(Errno::STALE)?;
        let file = Arc::new(file);
        let before = std::mem::replace(&mut node.place, Place::Open(Arc::clone(&file)));
        if let Place::Closed(path) = before {
            self.path_bytes -= path.len();
            self.open += 1;
            self.clock.push_back(number);
        }
        Ok(file)
    }

    /// Closes what was not used lately until there is room for one more.
    fn make_room(&mut self) -> Result<(), Errno> {
        // Three times around: the first may only find what was used, the second only folders.
        let around = self.clock.len();
        let mut left = 3 * around;
        let mut attempts = CLOSE_ATTEMPTS_MAX;
        while self.open >= self.open_max {
            if left == 0 || attempts == 0 {
                return Err(Errno::NFILE);
            }
            left -= 1;
            let Some(number) = self.clock.pop_front() else { return Err(Errno::NFILE) };
            let Some(node) = self.nodes.get_mut(&number) else { continue };
            let Place::Open(file) = &node.place else { continue };
            let is_late = node.identity.kind == libc::S_IFDIR && left >= around;
            let stays = std::mem::take(&mut node.used) || node.pins > 0 || is_late;
            attempts -= usize::from(!stays);
            let path = if stays { None } else { path_below(&self.root, file) };
            match path.filter(|path| self.path_bytes + path.len() <= FS_PATHS_BYTES_MAX) {
                Some(path) => {
                    self.path_bytes += path.len();
                    self.open -= 1;
                    node.place = Place::Closed(path);
                }
                None => self.clock.push_back(number),
            }
        }
        Ok(())
    }
}

impl Node {
    fn is_open(&self) -> bool {
        matches!(self.place, Place::Open(_))
    }
}

fn name_of(file: BorrowedFd<'_>) -> String {
    file.as_raw_fd().to_string()
}

/// Names something below a folder: what is in no way above or beside it, and links are themselves.
fn open_beneath(folder: impl AsFd, path: impl rustix::path::Arg) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(folder, path, flags, Mode::empty(), resolve)
}

/// Where a file is below a folder now; none: nowhere, or too deep to be remembered.
fn path_below(root: &OwnedFd, file: &OwnedFd) -> Option<Box<[u8]>> {
    let link = |fd: &OwnedFd| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd())).ok();
    let (root, path) = (link(root)?, link(file)?);
    let path: &Path = path.strip_prefix(&root).ok()?;
    let bytes = path.as_os_str().as_bytes();
    // One that is really called so stays open, too.
    let fits = !bytes.is_empty() && bytes.len() <= FS_PATH_BYTES_MAX && !bytes.ends_with(DELETED);
    fits.then(|| bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(open_max: usize) -> (tempfile::TempDir, Nodes) {
        let dir = tempfile::tempdir().unwrap();
        let root = rustix::fs::open(dir.path(), OFlags::PATH | OFlags::DIRECTORY, Mode::empty());
        let nodes = Nodes::new(root.unwrap(), open_max).unwrap();
        (dir, nodes)
    }

    fn look_up(nodes: &mut Nodes, folder: u64, name: &CStr) -> Result<u64, Errno> {
        let folder = nodes.get(folder)?;
        nodes.look_up(folder.as_fd(), name).map(|(number, _)| number)
    }

    #[test]
    fn one_file_has_one_number_until_it_is_forgotten() {
        let (dir, mut nodes) = share(100);
        std::fs::write(dir.path().join("a"), "a").unwrap();
        std::fs::hard_link(dir.path().join("a"), dir.path().join("b")).unwrap();
        let a = look_up(&mut nodes, ROOT, c"a").unwrap();
        assert_eq!(look_up(&mut nodes, ROOT, c"b").unwrap(), a);
        nodes.forget(a, 1);
        assert!(nodes.get(a).is_ok());
        nodes.forget(a, u64::MAX);
        assert_eq!(nodes.get(a).unwrap_err(), Errno::STALE);
        assert_ne!(look_up(&mut nodes, ROOT, c"a").unwrap(), a);
        nodes.forget(ROOT, u64::MAX);
        assert!(nodes.get(ROOT).is_ok());
        nodes.forget(12345, 1);
    }

    #[test]
    fn few_are_open_and_all_are_reached() {
        const COUNT: usize = 200;
        let (dir, mut nodes) = share(8);
        let deep = dir.path().join("deep");
        std::fs::create_dir(&deep).unwrap();
        let folder = look_up(&mut nodes, ROOT, c"deep").unwrap();
        let mut numbers = Vec::new();
        for i in 0..COUNT {
            std::fs::write(deep.join(i.to_string()), vec![0; i]).unwrap();
            let name = std::ffi::CString::new(i.to_string()).unwrap();
            numbers.push(look_up(&mut nodes, folder, &name).unwrap());
            assert!(nodes.open <= 8, "{}", nodes.open);
        }
        assert!(nodes.path_bytes > 0);
        for (i, number) in numbers.iter().enumerate() {
            let file = nodes.get(*number).unwrap();
            assert_eq!(stat(&file).unwrap().stx_size, i as u64);
        }
        numbers.iter().for_each(|number| nodes.forget(*number, 1));
        nodes.forget(folder, 1);
        assert_eq!((nodes.nodes.len(), nodes.open, nodes.path_bytes), (1, 0, 0));
        assert_eq!(nodes.numbers.len(), 1);
    }

    #[test]
    fn what_is_open_and_folders_are_closed_last() {
        let (dir, mut nodes) = share(3);
        let path = |name: &str| dir.path().join(name);
        std::fs::create_dir(path("d")).unwrap();
        ["a", "b", "c", "e"].iter().for_each(|name| std::fs::write(path(name), name).unwrap());
        let d = look_up(&mut nodes, ROOT, c"d").unwrap();
        let a = look_up(&mut nodes, ROOT, c"a").unwrap();
        nodes.pin(a);
        let b = look_up(&mut nodes, ROOT, c"b").unwrap();
        look_up(&mut nodes, ROOT, c"c").unwrap();
        let is_open = |nodes: &Nodes, number| nodes.nodes[&number].is_open();
        assert_eq!([d, a, b].map(|number| is_open(&nodes, number)), [true, true, false]);
        let c = look_up(&mut nodes, ROOT, c"c").unwrap();
        nodes.pin(c);
        look_up(&mut nodes, ROOT, c"e").unwrap();
        assert_eq!([d, a, c].map(|number| is_open(&nodes, number)), [false, true, true]);
        nodes.unpin(a);
        nodes.get(d).unwrap();
    }

    #[test]
    fn what_was_closed_and_is_another_file_by_now_is_stale() {
        let (dir, mut nodes) = share(1);
        let path = |name: &str| dir.path().join(name);
        for name in ["a", "b", "c"] {
            std::fs::write(path(name), name).unwrap();
        }
        let a = look_up(&mut nodes, ROOT, c"a").unwrap();
        look_up(&mut nodes, ROOT, c"b").unwrap();
        std::fs::rename(path("c"), path("a")).unwrap();
        assert_eq!(nodes.get(a).unwrap_err(), Errno::STALE);
        std::fs::remove_file(path("a")).unwrap();
        assert_eq!(nodes.get(a).unwrap_err(), Errno::STALE);
        std::os::unix::fs::symlink("/etc/passwd", path("a")).unwrap();
        assert_eq!(nodes.get(a).unwrap_err(), Errno::STALE);
    }

    #[test]
    fn a_file_without_a_name_is_not_closed() {
        let (dir, mut nodes) = share(1);
        std::fs::write(dir.path().join("a"), "a").unwrap();
        std::fs::write(dir.path().join("b"), "b").unwrap();
        let a = look_up(&mut nodes, ROOT, c"a").unwrap();
        std::fs::remove_file(dir.path().join("a")).unwrap();
        assert_eq!(look_up(&mut nodes, ROOT, c"b").unwrap_err(), Errno::NFILE);
        assert!(nodes.get(a).is_ok());
        nodes.forget(a, 1);
        assert!(look_up(&mut nodes, ROOT, c"b").is_ok());
    }

    #[test]
    fn links_are_not_followed() {
        let (dir, mut nodes) = share(100);
        std::os::unix::fs::symlink("/", dir.path().join("root")).unwrap();
        let link = look_up(&mut nodes, ROOT, c"root").unwrap();
        assert_eq!(nodes.kind(link).unwrap(), FileType::Symlink);
        assert_eq!(look_up(&mut nodes, link, c"etc").unwrap_err(), Errno::NOTDIR);
        assert!(look_up(&mut nodes, ROOT, c"root/etc").is_err());
        assert!(look_up(&mut nodes, ROOT, c"..").is_err());
        assert!(look_up(&mut nodes, ROOT, c"/etc").is_err());
    }
}
