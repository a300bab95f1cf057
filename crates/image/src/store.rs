//! The store under the state directory:
//!
//! ```text
//! lock                           held while an image is made or removed
//! images/debian@bookworm/        one directory for each image, complete or absent
//!     image.json                 what it is, format 1 (see `ImageInfo`)
//!     root.ext4                  the root disk, raw and sparse; never written after it is made, since
//!                                machines are based on it
//!     kernel/vmlinuz
//!     kernel/modules/            *.ko, uncompressed, and modules.builtin
//!     initramfs/KEY.cpio         made when first needed
//! tmp/                           unfinished work; swept under the lock
//! ```
//!
//! An image is made in `tmp`, written out, and renamed into place, so a reader never sees half.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::mounts::remove_tree;

/// The format of `image.json` this program writes and reads.
pub const IMAGE_FORMAT: u32 = 1;
/// A name is part of a path and of a table.
const NAME_BYTES_MAX: usize = 64;

/// Why the store could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A file operation failed.
    #[error("{operation} {path} failed")]
    File {
        /// What was done.
        operation: &'static str,
        /// To what.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The image is not there.
    #[error("there is no image {name}; the store {store} has {known}")]
    NoImage {
        /// The name asked for.
        name: String,
        /// The store's directory.
        store: PathBuf,
        /// The names that exist.
        known: String,
    },
    /// The name could not be one.
    #[error(
        "`{0}` is no image name: lower-case letters, digits, `.`, `_`, `-`, and one `:` before the tag"
    )]
    BadName(String),
    /// The description of an image is damaged or from another version.
    #[error("{path} does not describe an image this version understands")]
    Damaged {
        /// Its `image.json`.
        path: PathBuf,
        /// What the JSON reader found, when it found something.
        source: Option<serde_json::Error>,
    },
}

/// What `image.json` says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageInfo {
    /// [`IMAGE_FORMAT`].
    pub format: u32,
    /// For example `debian:bookworm`.
    pub name: String,
    /// The kernel's version as `uname -r` tells it.
    pub kernel_version: String,
    /// Seconds since 1970.
    pub created_unix_s: u64,
    /// The size of the root disk as the guest sees it.
    pub disk_bytes: u64,
    /// The package sources it was made from, one line each.
    pub sources: Vec<String>,
}

/// An image in the store.
#[derive(Clone, Debug)]
pub struct Image {
    /// What it is.
    pub info: ImageInfo,
    directory: PathBuf,
}

impl Image {
    /// The root disk; not to be written.
    #[must_use]
    pub fn root_disk(&self) -> PathBuf {
        self.directory.join("root.ext4")
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.directory.join("kernel/vmlinuz")
    }

    /// The kernel's modules.
    #[must_use]
    pub fn modules(&self) -> PathBuf {
        self.directory.join("kernel/modules")
    }

    /// Where its initramfs files are kept.
    #[must_use]
    pub fn initramfs_directory(&self) -> PathBuf {
        self.directory.join("initramfs")
    }

    /// Bytes it really takes on the host's disk.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        allocated(&self.directory)
    }
}

/// A name that may be part of a path: `debian`, `debian:bookworm`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ImageName(String);

impl ImageName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`StoreError::BadName`].
    pub fn parse(text: &str) -> Result<Self, StoreError> {
        let part_is_good = |part: &str| {
            part.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
                && part.chars().all(|c| {
                    c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '_' | '-')
                })
        };
        let mut parts = text.splitn(2, ':');
        if text.len() <= NAME_BYTES_MAX && parts.all(part_is_good) {
            Ok(Self(text.to_owned()))
        } else {
            Err(StoreError::BadName(text.to_owned()))
        }
    }

    /// The name as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    fn directory_name(&self) -> String {
        self.0.replace(':', "@")
    }
}

/// The store.
#[derive(Clone, Debug)]
pub struct Store {
    root: PathBuf,
}

/// Held by whoever changes the store; released when dropped.
#[derive(Debug)]
pub struct StoreLock {
    _file: File,
}

impl Store {
    /// Opens a store, making its directories.
    ///
    /// # Errors
    /// [`StoreError::File`] when they cannot be made.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for directory in ["images", "tmp"] {
            let path = root.join(directory);
            fs::create_dir_all(&path).map_err(failed("creating", &path))?;
        }
        Ok(Self { root: root.to_owned() })
    }

    /// The state directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Where unfinished work goes; on the same file system as the images.
    #[must_use]
    pub fn temporary(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// The right to change the store; nothing when somebody else has it.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn try_lock(&self) -> Result<Option<StoreLock>, StoreError> {
        let path = self.root.join("lock");
        let file = File::options().write(true).create(true).truncate(false).open(&path);
        let file = file.map_err(failed("opening", &path))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(StoreLock { _file: file })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(failed("locking", &path)(errno.into())),
        }
    }

    /// All images, by name.
    ///
    /// # Errors
    /// [`StoreError`] when the store cannot be read or an image's description is damaged.
    pub fn images(&self) -> Result<Vec<Image>, StoreError> {
        let path = self.root.join("images");
        let mut images = Vec::new();
        for entry in fs::read_dir(&path).map_err(failed("reading", &path))? {
            let directory = entry.map_err(failed("reading", &path))?.path();
            images.push(load(directory)?);
        }
        images.sort_by(|a: &Image, b| a.info.name.cmp(&b.info.name));
        Ok(images)
    }

    /// Finds an image by its full name, or the newest of a distribution by its first part.
    ///
    /// # Errors
    /// [`StoreError::NoImage`] when there is none.
    pub fn find(&self, name: &ImageName) -> Result<Image, StoreError> {
        let images = self.images()?;
        pick(&images, name).cloned().ok_or_else(|| {
            let known: Vec<_> = images.iter().map(|image| image.info.name.as_str()).collect();
            StoreError::NoImage {
                name: name.0.clone(),
                store: self.root.clone(),
                known: if known.is_empty() { "none".into() } else { known.join(", ") },
            }
        })
    }

    /// Puts a finished directory into its place, on the disk before it can be seen.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn publish(
        &self,
        _lock: &StoreLock,
        finished: &Path,
        info: &ImageInfo,
    ) -> Result<Image, StoreError> {
        let name = ImageName::parse(&info.name)?;
        let description = finished.join("image.json");
        let text = serde_json::to_vec_pretty(info).map_err(|error| StoreError::Damaged {
            path: description.clone(),
            source: Some(error),
        })?;
        File::create(&description)
            .and_then(|mut file| file.write_all(&text))
            .map_err(failed("writing", &description))?;
        // One call for the hundreds of module files, instead of an fsync for each.
        let opened = File::open(finished).map_err(failed("opening", finished))?;
        rustix::fs::syncfs(&opened).map_err(|e| failed("writing out", finished)(e.into()))?;
        let place = self.root.join("images").join(name.directory_name());
        if place.exists() {
            let old = self.temporary().join(format!("replaced-{}", std::process::id()));
            fs::rename(&place, &old).map_err(failed("replacing", &place))?;
            fs::remove_dir_all(&old).map_err(failed("removing", &old))?;
        }
        fs::rename(finished, &place).map_err(failed("publishing", &place))?;
        let parent = self.root.join("images");
        File::open(&parent)
            .and_then(|parent| parent.sync_all())
            .map_err(failed("writing out", &parent))?;
        load(place)
    }

    /// Removes an image. Machines have its disk under names of their own and are not disturbed.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn remove(&self, _lock: &StoreLock, image: &Image) -> Result<(), StoreError> {
        // Renamed first: an interrupted removal leaves no half image behind.
        let aside = self.temporary().join(format!("removed-{}", uuid::Uuid::new_v4()));
        fs::rename(&image.directory, &aside).map_err(failed("removing", &image.directory))?;
        fs::remove_dir_all(&aside).map_err(failed("removing", &aside))
    }

    /// Removes what interrupted work left behind.
    ///
    /// # Errors
    /// [`StoreError::File`].
    pub fn sweep(&self, _lock: &StoreLock) -> Result<(), StoreError> {
        let path = self.temporary();
        for entry in fs::read_dir(&path).map_err(failed("reading", &path))? {
            let entry = entry.map_err(failed("reading", &path))?.path();
            if entry.is_dir() {
                remove_tree(&entry).map_err(failed("removing", &entry))?;
            }
        }
        Ok(())
    }
}

/// The image that a name stands for: of exactly that name, or the newest of a distribution.
#[must_use]
pub fn pick<'a>(images: &'a [Image], name: &ImageName) -> Option<&'a Image> {
    let exact = images.iter().find(|image| image.info.name == name.0);
    let newest = || {
        let same = images.iter().filter(|image| {
            image.info.name.strip_prefix(&name.0).is_some_and(|rest| rest.starts_with(':'))
        });
        same.max_by_key(|image| image.info.created_unix_s)
    };
    exact.or_else(newest)
}

/// The error of a file operation, for `map_err`.
pub(crate) fn failed(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::File { operation, path, source }
}

fn load(directory: PathBuf) -> Result<Image, StoreError> {
    let path = directory.join("image.json");
    let text = fs::read(&path).map_err(failed("reading", &path))?;
    match serde_json::from_slice::<ImageInfo>(&text) {
        Ok(info) if info.format == IMAGE_FORMAT && ImageName::parse(&info.name).is_ok() => {
            Ok(Image { info, directory })
        }
        Ok(_) => Err(StoreError::Damaged { path, source: None }),
        Err(error) => Err(StoreError::Damaged { path, source: Some(error) }),
    }
}

fn allocated(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(meta) = fs::symlink_metadata(path) else { return 0 };
    let below = fs::read_dir(path).into_iter().flatten().flatten();
    meta.blocks() * 512 + below.map(|entry| allocated(&entry.path())).sum::<u64>()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, created_unix_s: u64) -> ImageInfo {
        ImageInfo {
            format: IMAGE_FORMAT,
            name: name.into(),
            kernel_version: "6.1".into(),
            created_unix_s,
            disk_bytes: 1,
            sources: vec![],
        }
    }

    fn publish(store: &Store, info: &ImageInfo) -> Image {
        let lock = store.try_lock().unwrap().unwrap();
        let work = store.temporary().join("work");
        fs::create_dir_all(&work).unwrap();
        fs::write(work.join("root.ext4"), info.name.as_bytes()).unwrap();
        store.publish(&lock, &work, info).unwrap()
    }

    #[test]
    fn names_stay_inside_the_store() {
        for good in ["debian", "debian:bookworm", "a.b_c-1:2.0"] {
            assert!(ImageName::parse(good).is_ok(), "{good}");
        }
        for bad in
            ["", ":", "a:", "../x", "a/b", "A", "a:b:c", ".x", "a b", "a:..", &"a".repeat(65)]
        {
            assert!(ImageName::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn images_are_published_found_replaced_and_removed() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        publish(&store, &info("debian:bookworm", 1));
        publish(&store, &info("debian:trixie", 2));
        publish(&store, &info("debian:bookworm", 1));
        let name = |text| ImageName::parse(text).unwrap();
        assert_eq!(store.find(&name("debian")).unwrap().info.name, "debian:trixie");
        let image = store.find(&name("debian:bookworm")).unwrap();
        assert_eq!(fs::read(image.root_disk()).unwrap(), b"debian:bookworm");
        let missing = store.find(&name("deb")).unwrap_err().to_string();
        assert!(missing.contains("debian:bookworm, debian:trixie"), "{missing}");
        let lock = store.try_lock().unwrap().unwrap();
        store.remove(&lock, &image).unwrap();
        assert_eq!(store.images().unwrap().len(), 1);
        fs::create_dir(store.temporary().join("left")).unwrap();
        store.sweep(&lock).unwrap();
        assert_eq!(fs::read_dir(store.temporary()).unwrap().count(), 0);
    }

    #[test]
    fn the_lock_is_for_one() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let lock = store.try_lock().unwrap().unwrap();
        assert!(store.try_lock().unwrap().is_none());
        drop(lock);
        assert!(store.try_lock().unwrap().is_some());
    }

    #[test]
    fn a_damaged_description_is_an_error_that_names_it() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let image = publish(&store, &info("debian:bookworm", 1));
        let path = image.root_disk().with_file_name("image.json");
        for text in ["", "{}", "{\"format\":2}", &"[".repeat(10_000)] {
            fs::write(&path, text).unwrap();
            assert!(store.images().unwrap_err().to_string().contains("image.json"));
        }
    }
}
