//! The images there are: listed, made, removed. The store is `berth_image`'s; what takes long is done
//! on threads for that.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use berth_api::v1::error::{ApiError, ErrorCode};
use berth_api::v1::image::{self as api, BootstrapImage, BootstrapLine};
use berth_image::bootstrap::{self, BootstrapError, DISK_BYTES_DEFAULT, Outcome, Request};
use berth_image::store::{self, Image, ImageName, Store, StoreLock};
use berth_image::tools::Stop;
use tokio::sync::{mpsc, watch};

use crate::failure::{Result, blocking, conflict, error, of_bootstrap, of_store};
use crate::machines::Machines;

/// How often a store that somebody else changes is looked at.
const LOCK_POLL: Duration = Duration::from_millis(50);
/// Lines of progress kept for a client that is slow; it misses those that come then.
pub(crate) const LINES: usize = 64;

/// Everything about images.
pub(crate) struct Images {
    /// The state directory.
    root: PathBuf,
    /// Whose kernels they may be.
    machines: Arc<Machines>,
    /// Becomes true when the daemon ends.
    over: watch::Receiver<bool>,
}

impl Images {
    pub(crate) fn new(root: &Path, machines: Arc<Machines>, over: watch::Receiver<bool>) -> Self {
        Self { root: root.to_owned(), machines, over }
    }

    /// All of them, by name.
    ///
    /// # Errors
    /// The store cannot be read.
    pub(crate) async fn list(&self) -> Result<Vec<api::Image>> {
        let root = self.root.clone();
        blocking(move || {
            let images = Store::open(&root).and_then(|store| store.images());
            let images = images.map_err(|error| of_store(&error))?;
            Ok(images.iter().map(describe).collect())
        })
        .await
    }

    /// Removes an image; one that is made at the same time is waited for, or is an error.
    ///
    /// # Errors
    /// There is none, or a machine boots it.
    pub(crate) async fn remove(&self, name: &str, waits: bool) -> Result<api::Image> {
        let name = ImageName::parse(name).map_err(|error| of_store(&error))?;
        loop {
            let (root, machines) = (self.root.clone(), Arc::clone(&self.machines));
            let wanted = name.clone();
            let removed = blocking(move || remove_now(&root, &machines, &wanted)).await?;
            if let Some(image) = removed {
                tracing::info!(image = image.name, "removed");
                return Ok(image);
            }
            if !waits {
                let message = "an image is being made or removed; try again when that is done";
                return Err(error(ErrorCode::Busy, message));
            }
            tokio::select! {
                () = tokio::time::sleep(LOCK_POLL) => {}
                () = self.ended() => {
                    let name = name.as_str();
                    return Err(self.too_late(&format!("{name} was removed")));
                }
            }
        }
    }

    async fn ended(&self) {
        // The other end is gone when all is over.
        let _ = self.over.clone().wait_for(|over| *over).await;
    }

    fn too_late(&self, what: &str) -> ApiError {
        error(ErrorCode::Failed, format!("the daemon was ended before {what}; try again"))
    }

    /// Makes an image and tells `to` of it, the result last. Who does not listen any more does not want
    /// it any more, and the store is as before; so it is when the daemon ends.
    pub(crate) async fn bootstrap(&self, request: Request, to: mpsc::Sender<BootstrapLine>) {
        let shown = shown(&request);
        let stop = Stop::default();
        let mut work = std::pin::pin!(self.make(request, stop.clone(), to.clone()));
        let result = tokio::select! {
            result = &mut work => result,
            () = to.closed() => {
                stop.stop();
                work.await
            }
            () = self.ended() => {
                stop.stop();
                work.await.map_err(|_| self.too_late(&format!("{shown} was made")))
            }
        };
        let line = match result {
            Ok(line) => line,
            Err(error) => {
                tracing::warn!(image = shown, error = error.message, "not made");
                BootstrapLine::Failed(error)
            }
        };
        // It may have gone.
        let _ = to.send(line).await;
    }

    async fn make(
        &self,
        request: Request,
        stop: Stop,
        to: mpsc::Sender<BootstrapLine>,
    ) -> Result<BootstrapLine> {
        let lock = self.lock(&stop, &to).await.map_err(|error| of_bootstrap(&error))?;
        let root = self.root.clone();
        let made = move || {
            let store = Store::open(&root)?;
            let progress = |line: &str| {
                let _ = to.try_send(BootstrapLine::Progress(line.to_owned()));
            };
            bootstrap::bootstrap(&store, &lock, &request, &stop, &progress)
        };
        let outcome = blocking(move || made().map_err(|error| of_bootstrap(&error))).await?;
        Ok(match outcome {
            Outcome::Made(image) => {
                tracing::info!(image = image.info.name, "made");
                BootstrapLine::Made(describe(&image))
            }
            Outcome::Existed(image) => BootstrapLine::Existed(describe(&image)),
        })
    }

    /// Waits for the right to change the store.
    async fn lock(
        &self,
        stop: &Stop,
        to: &mpsc::Sender<BootstrapLine>,
    ) -> std::result::Result<StoreLock, BootstrapError> {
        let store = Store::open(&self.root)?;
        let mut waits = false;
        while !stop.is_stopped() {
            if let Some(lock) = store.try_lock()? {
                return Ok(lock);
            }
            if !waits {
                let line = "waiting for another bootstrap to finish";
                let _ = to.try_send(BootstrapLine::Progress(line.to_owned()));
            }
            waits = true;
            tokio::time::sleep(LOCK_POLL).await;
        }
        Err(BootstrapError::Stopped)
    }
}

/// What is asked for, checked: nothing is made for a request that makes no sense.
///
/// # Errors
/// It makes none.
pub(crate) fn checked(wanted: BootstrapImage) -> Result<Request> {
    let request = Request {
        distribution: wanted.distribution,
        suite: wanted.suite,
        disk_bytes: wanted.disk_size.map_or(DISK_BYTES_DEFAULT, |size| size.bytes()),
        include: wanted.include,
        name: wanted.name,
        again: wanted.again,
    };
    request.name().map_err(|error| of_bootstrap(&error))?;
    Ok(request)
}

fn shown(request: &Request) -> String {
    request.name().map(|name| name.as_str().to_owned()).unwrap_or_default()
}

/// Nothing when somebody else changes the store.
fn remove_now(root: &Path, machines: &Machines, name: &ImageName) -> Result<Option<api::Image>> {
    let of_store = |error| of_store(&error);
    let store = Store::open(root).map_err(of_store)?;
    let Some(lock) = store.try_lock().map_err(of_store)? else { return Ok(None) };
    let image = store.find(name).map_err(of_store)?;
    let images = store.images().map_err(of_store)?;
    if let Some(machine) = booted_by(machines, &images, &image) {
        return Err(conflict(format!(
            "{} is what the machine {machine} boots; remove that first: `berth vm rm {machine}`",
            image.info.name
        )));
    }
    let described = describe(&image);
    store.remove(&lock, &image).map_err(of_store)?;
    Ok(Some(described))
}

/// The first machine that boots the image's kernel. Its disk it would keep.
fn booted_by(machines: &Machines, images: &[Image], image: &Image) -> Option<String> {
    let boots = |name: &str| {
        let name = ImageName::parse(name).ok()?;
        Some(store::pick(images, &name)?.info.name == image.info.name)
    };
    let mut all = machines.list().into_iter();
    let user = all.find(|machine| {
        let config = &machine.config;
        config.kernel.is_none() && config.image.as_deref().and_then(boots).unwrap_or(false)
    });
    Some(user?.name)
}

fn describe(image: &Image) -> api::Image {
    api::Image {
        name: image.info.name.clone(),
        kernel_version: image.info.kernel_version.clone(),
        created_unix_s: image.info.created_unix_s,
        disk_bytes: image.info.disk_bytes,
        allocated_bytes: image.allocated_bytes(),
    }
}
