#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::time::{Duration, UNIX_EPOCH};

use tar::{Builder, Header};

use super::*;
use crate::pack::pack;

/// A place to unpack in, with something beside it that must stay as it is.
struct Ground {
    directory: tempfile::TempDir,
}

impl Ground {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("in")).unwrap();
        fs::create_dir(directory.path().join("out")).unwrap();
        fs::write(directory.path().join("out/file"), "safe").unwrap();
        fs::set_permissions(directory.path().join("out/file"), fs::Permissions::from_mode(0o600))
            .unwrap();
        Self { directory }
    }

    fn at(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn is_safe(&self) {
        let out: Vec<_> = fs::read_dir(self.at("out")).unwrap().collect();
        assert_eq!(out.len(), 1, "{out:?}");
        let meta = fs::metadata(self.at("out/file")).unwrap();
        assert_eq!((meta.nlink(), meta.mode() & 0o7777), (1, 0o600));
        assert_eq!(fs::read_to_string(self.at("out/file")).unwrap(), "safe");
        assert_eq!(fs::read_dir(self.directory.path()).unwrap().count(), 2);
    }
}

/// An entry with any name, also one that the crate would not write.
fn entry(name: &str, kind: EntryType, link: &str, data: &[u8]) -> Vec<u8> {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(0o4755);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(1);
    header.set_size(data.len() as u64);
    let gnu = header.as_gnu_mut().unwrap();
    gnu.name[..name.len()].copy_from_slice(name.as_bytes());
    gnu.linkname[..link.len()].copy_from_slice(link.as_bytes());
    header.set_cksum();
    let mut bytes = header.as_bytes().to_vec();
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

fn stream(entries: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = entries.concat();
    bytes.extend([0; 1024]);
    bytes
}

fn packed(source: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    pack(&mut bytes, source, &mut |note| panic!("{note:?}")).unwrap();
    bytes
}

#[test]
fn nothing_leaves_the_destination() {
    let file = |name: &str| entry(name, EntryType::Regular, "", b"evil");
    let out = |ground: &Ground| ground.at("out").display().to_string();
    let of = |entries: Vec<Vec<u8>>, part: &str| {
        let ground = Ground::new();
        for all in [false, true] {
            let (bytes, into) = (stream(&entries), ground.at("in"));
            let result = match all {
                true => extract(&bytes[..], &into, Taken::default()),
                false => copy(&bytes[..], &into, Taken::default()),
            };
            let error = result.unwrap_err();
            let source = std::error::Error::source(&error).map(ToString::to_string);
            let text = format!("{error}: {}", source.unwrap_or_default());
            assert!(!all || text.contains(part), "no `{part}` in {text}");
            ground.is_safe();
        }
    };
    of(vec![file("../out/file")], "leads out");
    of(vec![file("a/../../out/file")], "leads out");
    of(vec![file("/tmp/berth-evil")], "absolute");
    of(vec![file("..")], "leads out");
    let outside = out(&Ground::new());
    // Links are made, and not followed: neither as a directory nor as a file.
    let link = |to: &str| entry("a", EntryType::Symlink, to, b"");
    of(vec![link("../out"), file("a/file")], "is no directory");
    of(vec![link(&outside), entry("a/x", EntryType::Directory, "", b"")], "is no directory");
    of(vec![link("."), file("a/a/file")], "is no directory");
    of(vec![entry("a", EntryType::Link, "../out/file", b"")], "leads out");
    of(vec![entry("a", EntryType::Link, "/etc/passwd", b"")], "absolute");
    of(vec![link("../out/file"), entry("b", EntryType::Link, "a", b"")], "no file");
    of(vec![link("../out"), entry("b", EntryType::Link, "a/file", b"")], "is no directory");
    of(vec![entry("a", EntryType::Link, "a", b"")], "itself");
    for kind in [EntryType::Char, EntryType::Block] {
        of(vec![entry("a", kind, "", b"")], "a device");
    }
    of(vec![entry("a", EntryType::Fifo, "", b"")], "a pipe");
    of(vec![entry("a", EntryType::GNUSparse, "", &[0; 512])], "");
    of(vec![entry("a", EntryType::new(b'Z'), "", b"")], "not known");
    of(vec![entry(".", EntryType::Symlink, "x", b"")], "no directory");
    of(vec![link("")], "nowhere");
    // Cut short, and heads that do not end.
    let long = entry("a", EntryType::Regular, "", &[1; 9000]);
    of(vec![long[..2000].to_vec()], "damaged");
    of(vec![entry("x", EntryType::GNULongName, "", &vec![b'a'; 2 << 20])], "too long");
    of(vec![entry("x", EntryType::XHeader, "", &vec![b'a'; 2 << 20])], "too long");
    of(vec![vec![0xff; 512]], "damaged");
}

#[test]
fn a_file_in_the_way_is_replaced_and_not_written_to() {
    let ground = Ground::new();
    symlink(ground.at("out/file"), ground.at("in/link")).unwrap();
    let bytes = stream(&[
        entry("link", EntryType::Regular, "", b"new"),
        entry("other", EntryType::Link, "link", b""),
        entry("other", EntryType::Regular, "", b"third"),
    ]);
    extract(&bytes[..], &ground.at("in"), Taken::default()).unwrap();
    assert_eq!(fs::read_to_string(ground.at("in/link")).unwrap(), "new");
    assert_eq!(fs::read_to_string(ground.at("in/other")).unwrap(), "third");
    let mode = fs::metadata(ground.at("in/link")).unwrap().mode();
    assert_eq!(mode & 0o7777, 0o755, "no program that runs as its owner");
    ground.is_safe();
    let file_over = stream(&[entry("d", EntryType::Regular, "", b"x")]);
    fs::create_dir(ground.at("in/d")).unwrap();
    assert!(extract(&file_over[..], &ground.at("in"), Taken::default()).is_err());
}

#[test]
fn copies_go_where_cp_puts_them() {
    let ground = Ground::new();
    let from = ground.at("in");
    fs::create_dir(from.join("d")).unwrap();
    fs::write(from.join("d/f"), "f").unwrap();
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name);
    let cp = |source: &str, to: &str| {
        let to = PathBuf::from(format!("{}/{to}", place.path().display()));
        copy(
            &packed(&PathBuf::from(format!("{}/{source}", from.display())))[..],
            &to,
            Taken::default(),
        )
    };
    cp("d/f", "file").unwrap();
    assert!(at("file").is_file());
    cp("d/f", "file").unwrap();
    assert!(cp("d/f", "absent/").is_err());
    assert!(cp("d/f", "absent/f").is_err());
    cp("d", "new").unwrap();
    assert!(at("new/f").is_file());
    cp("d", "new").unwrap();
    assert!(at("new/d/f").is_file());
    cp("d/.", "new/d").unwrap();
    assert!(!at("new/d/d").exists());
    cp("d/.", "content").unwrap();
    assert!(at("content/f").is_file());
    cp("d/f", "content/").unwrap();
    assert!(cp("d", "file").is_err());
    assert!(cp("d/.", "file").is_err());
    symlink("file", at("alias")).unwrap();
    fs::write(from.join("d/f"), "changed").unwrap();
    cp("d/f", "alias").unwrap();
    assert_eq!(fs::read_to_string(at("file")).unwrap(), "changed");
    assert!(at("alias").is_symlink());
    let mut none = |_| {};
    assert!(pack(Vec::new(), &from.join("nothing"), &mut none).is_err());
    assert!(pack(Vec::new(), &from.join("d/f/."), &mut none).is_err());
}

#[test]
fn what_files_are_is_kept() {
    let ground = Ground::new();
    let tree = ground.at("in/tree");
    fs::create_dir_all(tree.join("locked")).unwrap();
    let long = "n".repeat(200);
    fs::write(tree.join(&long), "long").unwrap();
    fs::write(tree.join("locked/f"), "f").unwrap();
    fs::hard_link(tree.join("locked/f"), tree.join("second")).unwrap();
    symlink("../anywhere/at/all", tree.join("link")).unwrap();
    let mut content = vec![0u8; 3 << 20];
    content[2 << 20] = 1;
    fs::write(tree.join("holes"), &content).unwrap();
    fs::write(tree.join("empty"), "").unwrap();
    fs::set_permissions(tree.join("second"), fs::Permissions::from_mode(0o640)).unwrap();
    let then = UNIX_EPOCH + Duration::from_secs(1_000_000_000);
    for name in ["locked", "empty"] {
        File::open(tree.join(name)).unwrap().set_modified(then).unwrap();
    }
    fs::set_permissions(tree.join("locked"), fs::Permissions::from_mode(0o555)).unwrap();
    let copied = ground.at("copy");
    copy(&packed(&tree)[..], &copied, Taken { owners: true, set_id: true }).unwrap();
    let meta = |name: &str| fs::symlink_metadata(copied.join(name)).unwrap();
    assert_eq!(fs::read_to_string(copied.join(&long)).unwrap(), "long");
    assert_eq!(meta("locked").mode() & 0o7777, 0o555);
    assert_eq!(meta("locked").mtime(), 1_000_000_000);
    assert_eq!((meta("empty").mtime(), meta("empty").len()), (1_000_000_000, 0));
    assert_eq!((meta("second").mode() & 0o7777, meta("second").nlink()), (0o640, 2));
    assert_eq!(meta("second").ino(), meta("locked/f").ino());
    assert_eq!(fs::read_link(copied.join("link")).unwrap(), Path::new("../anywhere/at/all"));
    assert!(fs::read(copied.join("holes")).unwrap() == content);
    assert!(meta("holes").blocks() * 512 < 1 << 20, "holes stay holes");
    for tree in [&tree, &copied] {
        fs::set_permissions(tree.join("locked"), fs::Permissions::from_mode(0o755)).unwrap();
    }
}

#[test]
fn any_prefix_and_any_flip_is_survived() {
    let ground = Ground::new();
    let mut bytes = Vec::new();
    let mut builder = Builder::new(&mut bytes);
    let mut header = Header::new_gnu();
    header.set_size(5);
    header.set_mode(0o644);
    builder.append_data(&mut header, "d/".to_owned() + &"x".repeat(150), &b"hello"[..]).unwrap();
    builder.finish().unwrap();
    drop(builder);
    for end in (0..bytes.len()).step_by(7) {
        let _ = extract(&bytes[..end], &ground.at("in"), Taken::default());
    }
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 0x5a;
        let _ = extract(&changed[..], &ground.at("in"), Taken::default());
    }
    ground.is_safe();
}
