//! Removing directories that programs may have mounted something into.
//!
//! `mmdebstrap` mounts the host's `/sys` and `/dev/shm` into the root it makes. When it is killed they
//! may stay, and whoever then removes the directory removes what is in them.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::mount::{UnmountFlags, unmount};

/// Removes a directory with all it has, but nothing of what is mounted in it, which is unmounted.
///
/// # Errors
/// When something cannot be unmounted, which leaves all as it was, or removed.
pub fn remove_tree(directory: &Path) -> io::Result<()> {
    let real = fs::canonicalize(directory)?;
    // The last mounted first.
    for place in mounts_below(&real)?.iter().rev() {
        unmount(place, UnmountFlags::NOFOLLOW)?;
    }
    if let Some(place) = mounts_below(&real)?.first() {
        return Err(io::Error::other(format!("{} is still mounted", place.display())));
    }
    fs::remove_dir_all(directory)
}

fn mounts_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read("/proc/self/mountinfo")?;
    let places = table.split(|&b| b == b'\n').filter_map(place_of);
    Ok(places.filter(|place| place.starts_with(directory)).collect())
}

/// The mount point in a line of `mountinfo`: its fifth word (proc(5)).
fn place_of(line: &[u8]) -> Option<PathBuf> {
    let word = line.split(|&b| b == b' ').nth(4)?;
    Some(PathBuf::from(OsString::from_vec(unescaped(word))))
}

/// Blanks and the like are written as a backslash and three octal digits.
fn unescaped(word: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [first, after @ ..] = rest {
        rest = after;
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) =
            (first, after)
        {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            out.push(*first);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_read_with_their_escapes() {
        let line = br"70 27 0:42 / /a/b\040c\134/proc ro,relatime - proc proc ro";
        assert_eq!(place_of(line).unwrap(), Path::new(r"/a/b c\/proc"));
        assert_eq!(place_of(b""), None);
    }

    #[test]
    fn what_is_mounted_in_a_directory_is_not_removed_with_it() {
        let directory = tempfile::tempdir().unwrap();
        let (precious, work) = (directory.path().join("precious"), directory.path().join("work"));
        let place = work.join("a b/sys");
        fs::create_dir_all(&place).unwrap();
        fs::create_dir(&precious).unwrap();
        fs::write(precious.join("file"), "kept").unwrap();
        if rustix::mount::mount_bind(&precious, &place).is_err() {
            println!("nothing can be mounted here: only the removal is tested");
        }
        remove_tree(&work).unwrap();
        assert!(!work.exists());
        assert_eq!(fs::read(precious.join("file")).unwrap(), b"kept");
    }
}
