//! What a disk holds at an instant is frozen by giving its file another name, below a new overlay.
//!
//! ```text
//! before   disk0.qcow2 ── data                        layer-U.qcow2 ── an empty overlay on
//!                      └──── exchanged, at once ────┘                  `layer-U.qcow2`
//! after    disk0.qcow2 ── the overlay on it           layer-U.qcow2 ── data, never written again
//! ```
//!
//! The overlay names what it is based on by its own first name, which is that of the data afterwards.
//! A disk reads the same before and after, so that a crash at any point does no harm; before the
//! exchange a crash leaves an overlay that nobody uses.
//!
//! The open image of the data goes on below the overlay with what it has in memory. It is written out
//! when there is time ([`Image::freeze`]), before the first flush of the overlay is said to be done:
//! until then the guest was promised nothing that a loss of power could take.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{CWD, RenameFlags, renameat_with};

use crate::chain::{Access, Layer, open_file, open_image};
use crate::error::{DiskError, failed};
use crate::format::Format;
use crate::limits::CHAIN_LAYERS_MAX;
use crate::qcow2::create::NewImage;
use crate::qcow2::image::Image;
use crate::tools::{new_file, refused};

const PREFIX: &str = "layer-";
const SUFFIX: &str = ".qcow2";

/// The name of the layer with this identity, which is a UUID.
#[must_use]
pub fn layer_name(id: &str) -> String {
    format!("{PREFIX}{id}{SUFFIX}")
}

/// Whether a file of this name is a layer: only such files are ever removed by themselves.
#[must_use]
pub fn is_layer_name(name: &str) -> bool {
    let id = name.strip_prefix(PREFIX).and_then(|rest| rest.strip_suffix(SUFFIX));
    let good = |c: char| c.is_ascii_hexdigit() || c == '-';
    id.is_some_and(|id| id.len() == 36 && id.chars().all(good))
}

/// An overlay that is ready to take the name of the disk it is made for. Dropping it removes it.
#[derive(Debug)]
pub struct Next {
    active: PathBuf,
    file: Unused,
    image: Image,
}

/// A file that goes away unless it is used.
#[derive(Debug)]
struct Unused(PathBuf);

impl Drop for Unused {
    fn drop(&mut self) {
        // One that stays is a layer that nobody refers to.
        let _ = fs::remove_file(&self.0);
    }
}

impl Next {
    /// Makes an overlay beside a disk, called `name`, on the disk's open image. What it holds would
    /// survive a loss of power when this returns, and nothing has changed for the disk. Its name is
    /// left to [`sync_names`] after the exchange, before which the name does not matter.
    ///
    /// # Errors
    /// The disk has too many layers already, or the file cannot be written; then it is not there.
    pub fn prepare(active: &Path, name: &str, below: Arc<Image>) -> Result<Self, DiskError> {
        // One more for the overlay.
        if below.depth() >= CHAIN_LAYERS_MAX {
            return Err(DiskError::Deep { path: active.to_owned() });
        }
        let path = active.with_file_name(name);
        let storage = new_file(&path)?;
        let file = Unused(path.clone());
        let backing = Some((name.to_owned(), Format::Qcow2));
        let new = NewImage { backing, ..NewImage::new(below.size()) };
        new.write(Box::new(storage)).map_err(refused(&path))?;
        let storage = open_file(&path, Access::Write)?;
        let below = Some(Box::new(Layer::Qcow2(below)));
        let image = Image::open(Box::new(storage), true, below).map_err(refused(&path))?;
        Ok(Self { active: active.to_owned(), file, image })
    }

    /// Exchanges the names, without waiting for the disk: what was the disk is a layer now, and this
    /// image is the disk.
    ///
    /// # Errors
    /// The system's; then all is as before.
    pub fn exchange(self) -> Result<Image, DiskError> {
        let Self { active, file, image } = self;
        let exchanged = renameat_with(CWD, &active, CWD, &file.0, RenameFlags::EXCHANGE);
        exchanged.map_err(|errno| failed("freezing", &active)(errno.into()))?;
        std::mem::forget(file);
        Ok(image)
    }
}

/// Makes sure that the names in a file's directory survive a loss of power.
///
/// # Errors
/// The system's.
pub fn sync_names(path: &Path) -> Result<(), DiskError> {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let synced = File::open(directory).and_then(|file| file.sync_all());
    synced.map_err(failed("syncing", directory))
}

/// Freezes what a disk holds that nobody uses: it is the layer `name` beside it then, and the disk an
/// overlay on that.
///
/// # Errors
/// The disk is in use, damaged or of another format; then it is as before.
pub fn freeze(active: &Path, name: &str) -> Result<(), DiskError> {
    let below = Arc::new(open_image(active, Access::Write)?);
    let next = Next::prepare(active, name, Arc::clone(&below))?;
    below.freeze().map_err(failed("freezing", active))?;
    drop(next.exchange()?);
    sync_names(active)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tools::{self, Backing};

    const NAME: &str = "layer-00000000-0000-4000-8000-000000000001.qcow2";

    fn read(path: &Path, at: u64) -> u8 {
        let mut byte = [0];
        open_image(path, Access::Read).unwrap().read(at, &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn only_layers_are_called_so() {
        assert!(is_layer_name(NAME));
        assert_eq!(layer_name("00000000-0000-4000-8000-000000000001"), NAME);
        for bad in
            ["layer-.qcow2", "disk0.qcow2", "layer-/../../../../../../../../etc/passwd12345.qcow2"]
        {
            assert!(!is_layer_name(bad), "{bad}");
        }
    }

    #[test]
    fn a_disk_reads_the_same_and_its_layer_stays() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk0.qcow2");
        tools::create(&disk, Format::Qcow2, Some(1 << 20), None).unwrap();
        let write = |at: u64, byte: u8| {
            let image = open_image(&disk, Access::Write).unwrap();
            image.write(at, &[byte]).unwrap();
        };
        write(0, 1);
        write(70_000, 1);
        freeze(&disk, NAME).unwrap();
        let layer = dir.path().join(NAME);
        assert_eq!((read(&disk, 0), read(&disk, 70_000), read(&layer, 0)), (1, 1, 1));
        write(0, 2);
        assert_eq!((read(&disk, 0), read(&disk, 70_000), read(&layer, 0)), (2, 1, 1));
        // Another disk on the same layer.
        let other = dir.path().join("other.qcow2");
        let backing = Backing { name: NAME.into(), format: Format::Qcow2 };
        tools::create(&other, Format::Qcow2, None, Some(&backing)).unwrap();
        let (one, two) = (open_image(&disk, Access::Write), open_image(&other, Access::Write));
        let (one, two) = (one.unwrap(), two.unwrap());
        two.write(0, &[3]).unwrap();
        let mut byte = [0];
        one.read(0, &mut byte).unwrap();
        assert_eq!(byte, [2]);
        assert!(open_image(&layer, Access::Write).is_err(), "nobody writes what others read");
        // The name is taken, or the disk in use: nothing changes.
        assert!(matches!(freeze(&disk, NAME), Err(DiskError::Locked { .. })));
        drop(one);
        assert!(matches!(freeze(&disk, NAME), Err(DiskError::Exists { .. })));
        assert_eq!(read(&disk, 0), 2);
    }

    #[test]
    fn an_open_disk_goes_on_above_what_it_held() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk0.qcow2");
        tools::create(&disk, Format::Qcow2, Some(1 << 20), None).unwrap();
        let old = Arc::new(open_image(&disk, Access::Write).unwrap());
        old.write(0, &[1; 512]).unwrap();
        drop(Next::prepare(&disk, NAME, Arc::clone(&old)).unwrap());
        assert!(!dir.path().join(NAME).exists(), "what is not used goes away");
        let next = Next::prepare(&disk, NAME, Arc::clone(&old)).unwrap();
        old.write(512, &[2; 512]).unwrap();
        let new = next.exchange().unwrap();
        // What the file does not hold yet is seen above it, and what is written above does not
        // change it.
        let mut bytes = [0; 1024];
        new.write(0, &[3; 512]).unwrap();
        new.read(0, &mut bytes).unwrap();
        assert_eq!((bytes[0], bytes[1023]), (3, 2));
        assert!(open_image(&dir.path().join(NAME), Access::Read).is_err(), "not yet");
        old.freeze().unwrap();
        assert!(old.write(0, &[4]).is_err(), "it is never written again");
        assert_eq!(read(&dir.path().join(NAME), 0), 1);
        new.flush().unwrap();
        drop((old, new));
        assert_eq!((read(&disk, 0), read(&disk, 512)), (3, 2));
    }

    #[test]
    fn there_is_an_end_of_layers() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("disk0.qcow2");
        tools::create(&disk, Format::Qcow2, Some(1 << 20), None).unwrap();
        let name = |i: usize| layer_name(&format!("00000000-0000-4000-8000-{i:012}"));
        for i in 1..CHAIN_LAYERS_MAX {
            freeze(&disk, &name(i)).unwrap();
        }
        assert!(matches!(freeze(&disk, &name(99)), Err(DiskError::Deep { .. })));
        assert_eq!(read(&disk, 0), 0, "the longest chain can be used");
    }
}
