//! The image of a disk in use, which a new overlay can take the place of.
//!
//! Jobs that read or write hold the image meanwhile, so that a freeze falls between them: what was
//! written before is in the layer, what comes afterwards in the overlay. What is frozen is written out
//! later, at the latest before the next flush is said to be done.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use berth_disk::error::DiskError;
use berth_disk::layers::{Next, sync_names};
use berth_disk::qcow2::image::Image;

/// An image that can be frozen while it is used.
#[derive(Debug)]
pub struct LiveImage {
    path: PathBuf,
    current: RwLock<Arc<Image>>,
    /// Below the current one, and not written out yet; the lowest first. Held for moments only: a guest
    /// stands still for one that is added.
    frozen: Mutex<Vec<Arc<Image>>>,
    /// Held while they are written out.
    settling: Mutex<()>,
}

impl LiveImage {
    /// The image of the disk at that path.
    #[must_use]
    pub fn new(path: &Path, image: Image) -> Self {
        Self {
            path: path.to_owned(),
            current: RwLock::new(Arc::new(image)),
            frozen: Mutex::default(),
            settling: Mutex::default(),
        }
    }

    /// Does something with the image, which stays the disk meanwhile.
    pub fn with<T>(&self, act: impl FnOnce(&Image) -> T) -> T {
        act(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn current(&self) -> Arc<Image> {
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn frozen(&self) -> MutexGuard<'_, Vec<Arc<Image>>> {
        self.frozen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes out all that was written before, whatever was frozen since.
    ///
    /// # Errors
    /// As [`Image::flush`].
    pub fn flush(&self) -> io::Result<()> {
        // A freeze does not wait for the disk: the image is not held.
        let image = self.current();
        self.settle()?;
        image.flush()
    }

    /// Writes everything out at the end of its use. It can be used afterwards.
    ///
    /// # Errors
    /// As [`Image::close`].
    pub fn close(&self) -> io::Result<()> {
        self.settle()?;
        self.current().close()
    }

    /// Gets what was frozen into the files, where others can read it then. That it survives a loss of
    /// power is left to [`LiveImage::settle`], which comes before anything above is promised.
    ///
    /// # Errors
    /// The system's; then it is tried again the next time.
    pub fn write_out(&self) -> io::Result<()> {
        let frozen = self.frozen().clone();
        frozen.iter().try_for_each(|image| image.write_out())
    }

    /// Writes out what was frozen. Whoever comes meanwhile waits for the same.
    ///
    /// # Errors
    /// The system's; then it is tried again the next time.
    pub fn settle(&self) -> io::Result<()> {
        let _settling = self.settling.lock().unwrap_or_else(PoisonError::into_inner);
        let settled = self.frozen().clone();
        if settled.is_empty() {
            return Ok(());
        }
        for image in &settled {
            image.freeze()?;
        }
        // What is above may be promised from here on, so its name has to stay.
        sync_names(&self.path).map_err(|error| match error {
            DiskError::File { source, .. } => source,
            other => io::Error::other(other),
        })?;
        // Others were only added behind these.
        self.frozen().drain(..settled.len());
        Ok(())
    }
}

impl Drop for LiveImage {
    fn drop(&mut self) {
        // What fails here was not flushed by whoever wrote it.
        let _ = self.settle();
    }
}

/// What freezes a disk that a machine uses.
#[derive(Clone, Debug)]
pub struct DiskSwitch(pub(super) Arc<LiveImage>);

/// A disk that is ready to be frozen.
#[derive(Debug)]
pub struct Prepared {
    live: Arc<LiveImage>,
    next: Next,
}

impl DiskSwitch {
    /// Makes the overlay that is to be the disk, and writes out what is in memory, so that little is
    /// left for later. `layer` is the name of what the disk holds from the freeze on.
    ///
    /// # Errors
    /// The overlay cannot be made; the disk is as before.
    pub fn prepare(&self, layer: &str) -> Result<Prepared, DiskError> {
        let live = &self.0;
        let written = live.current().hand_over();
        written.map_err(|source| DiskError::File {
            operation: "writing out",
            path: live.path.clone(),
            source,
        })?;
        let next = Next::prepare(&live.path, layer, live.current())?;
        Ok(Prepared { live: Arc::clone(live), next })
    }

    /// Gets what was frozen into the file, so that others may read it.
    ///
    /// # Errors
    /// The system's.
    pub fn write_out(&self) -> io::Result<()> {
        self.0.write_out()
    }

    /// Writes out what was frozen: after this the layer is in the file also after a loss of power.
    ///
    /// # Errors
    /// The system's. The disk fails then at its next flush.
    pub fn settle(&self) -> io::Result<()> {
        self.0.settle()
    }
}

impl Prepared {
    /// Freezes the disk at this instant. Nothing is waited for but jobs that are being done.
    ///
    /// # Errors
    /// The system's; the disk is as before.
    pub fn freeze(self) -> Result<(), DiskError> {
        let Self { live, next } = self;
        let mut current = live.current.write().unwrap_or_else(PoisonError::into_inner);
        let overlay = next.exchange()?;
        let below = std::mem::replace(&mut *current, Arc::new(overlay));
        live.frozen().push(below);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use berth_disk::chain::{Access, open_image};
    use berth_disk::format::Format;
    use berth_disk::layers::layer_name;
    use berth_disk::tools::create;

    use super::*;

    /// Each layer has all that was written before it, and nothing of what came after it.
    #[test]
    fn a_layer_is_an_instant_of_a_disk_that_is_written() {
        const SECTORS: u64 = 4096;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk0.qcow2");
        create(&path, Format::Qcow2, Some(SECTORS * 512), None).unwrap();
        let live = LiveImage::new(&path, open_image(&path, Access::Write).unwrap());
        let switch = DiskSwitch(Arc::new(live));
        let over = AtomicBool::new(false);
        let layers = std::thread::scope(|scope| {
            let writer = scope.spawn(|| {
                let mut written = 0;
                while written < SECTORS && !over.load(Ordering::SeqCst) {
                    switch.0.with(|image| image.write(written * 512, &[1; 512])).unwrap();
                    written += 1;
                    if written % 64 == 0 {
                        switch.0.flush().unwrap();
                    }
                }
                written
            });
            let mut layers = Vec::new();
            for i in 0..5 {
                let name = layer_name(&format!("00000000-0000-4000-8000-{i:012}"));
                switch.prepare(&name).unwrap().freeze().unwrap();
                match i % 3 {
                    0 => switch.settle().unwrap(),
                    1 => switch.write_out().unwrap(),
                    _ => {}
                }
                layers.push(dir.path().join(name));
            }
            over.store(true, Ordering::SeqCst);
            layers.push(path.clone());
            (layers, writer.join().unwrap())
        });
        let (layers, written) = layers;
        assert_eq!(Arc::strong_count(&switch.0), 1);
        drop(switch);
        let mut before = 0;
        for (index, layer) in layers.iter().enumerate() {
            let image = open_image(layer, Access::Read).unwrap();
            let has = |sector: u64| {
                let mut byte = [0];
                image.read(sector * 512, &mut byte).unwrap();
                byte == [1]
            };
            let count = (0..SECTORS).take_while(|sector| has(*sector)).count() as u64;
            assert!((count..SECTORS).all(|sector| !has(sector)), "a gap in layer {index}");
            assert!(count >= before, "layer {index} has {count} after {before}");
            before = count;
        }
        assert_eq!(before, written, "the disk has everything");
    }
}
