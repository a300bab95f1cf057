//! `berth image ...`.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use berth_daemon::folder::Folder;
use berth_image::bootstrap::{self, Outcome, Request};
use berth_image::store::{Image, ImageName, Store};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::args::BootstrapArgs;
use crate::exit::{CliError, ExitCode};
use crate::table;
use berth_api::size::Size;

/// What `--json` prints of an image.
#[derive(Debug, Serialize)]
struct Listed<'a> {
    name: &'a str,
    kernel_version: &'a str,
    created_unix_s: u64,
    disk_bytes: u64,
    allocated_bytes: u64,
}

/// `berth image bootstrap`.
///
/// # Errors
/// [`CliError`].
pub fn bootstrap(root: &Path, args: &BootstrapArgs) -> Result<ExitCode, CliError> {
    let request = Request {
        distribution: args.distribution.clone(),
        suite: args.suite.clone(),
        disk_bytes: args.size.bytes(),
        include: args.include.clone(),
        name: args.name.clone(),
        again: args.again,
    };
    // Before the directory is made: a wrong name leaves nothing behind.
    let name = request.name()?;
    let store = Store::open(root)?;
    let bar = progress_bar(&format!("{}: ", name.as_str()));
    let outcome = bootstrap::bootstrap(&store, &request, &|line| bar.set_message(line.to_owned()));
    bar.finish_and_clear();
    match outcome? {
        Outcome::Made(image) => eprintln!(
            "berth: made {} with kernel {}, {} on disk",
            image.info.name,
            image.info.kernel_version,
            Size::from(image.allocated_bytes())
        ),
        Outcome::Existed(image) => {
            eprintln!("berth: {} is there already; --again makes it anew", image.info.name);
        }
    }
    Ok(ExitCode::Success)
}

/// `berth image ls`.
///
/// # Errors
/// [`CliError`].
pub fn list(root: &Path, json: bool) -> Result<ExitCode, CliError> {
    let images = match root.exists() {
        true => Store::open(root)?.images()?,
        false => Vec::new(),
    };
    if images.is_empty() && !json {
        eprintln!("berth: no images yet; make one with `berth image bootstrap debian bookworm`");
    }
    let text = match json {
        true => as_json(&images)?,
        false => as_table(&images),
    };
    writeln!(io::stdout(), "{text}").map_err(CliError::Output)?;
    Ok(ExitCode::Success)
}

/// `berth image rm`.
///
/// # Errors
/// [`CliError`]; images before the one that failed are gone.
pub fn remove(root: &Path, names: &[String]) -> Result<ExitCode, CliError> {
    let store = Store::open(root)?;
    let lock = store.lock(|| eprintln!("berth: waiting for a bootstrap to finish"))?;
    for name in names {
        let image = store.find(&ImageName::parse(name)?)?;
        if let Some(machine) = booted_by(root, &store, &image) {
            let image = image.info.name;
            return Err(CliError::ImageInUse { image, machine });
        }
        store.remove(&lock, &image)?;
        writeln!(io::stdout(), "{}", image.info.name).map_err(CliError::Output)?;
    }
    Ok(ExitCode::Success)
}

/// The first machine that boots the image's kernel. Its disk it would keep.
fn booted_by(root: &Path, store: &Store, image: &Image) -> Option<String> {
    let entries = std::fs::read_dir(root.join("machines")).ok()?;
    let mut users: Vec<String> = entries
        .flatten()
        .filter(|entry| {
            let config = Folder::at(entry.path()).config().ok();
            let machine = config.map(|config| config.machine).filter(|m| m.kernel.is_none());
            let name = machine.and_then(|machine| ImageName::parse(&machine.image?).ok());
            let found = name.and_then(|name| store.find(&name).ok());
            found.is_some_and(|found| found.info.name == image.info.name)
        })
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    users.sort();
    users.into_iter().next()
}

fn as_json(images: &[Image]) -> Result<String, CliError> {
    let listed: Vec<_> = images
        .iter()
        .map(|image| Listed {
            name: &image.info.name,
            kernel_version: &image.info.kernel_version,
            created_unix_s: image.info.created_unix_s,
            disk_bytes: image.info.disk_bytes,
            allocated_bytes: image.allocated_bytes(),
        })
        .collect();
    serde_json::to_string_pretty(&listed).map_err(CliError::Json)
}

fn as_table(images: &[Image]) -> String {
    let row = |image: &Image| {
        vec![
            image.info.name.clone(),
            image.info.kernel_version.clone(),
            Size::from(image.info.disk_bytes).to_string(),
            Size::from(image.allocated_bytes()).to_string(),
        ]
    };
    table::plain(&["IMAGE", "KERNEL", "DISK", "USED"], images.iter().map(row).collect())
}

/// A line that shows what goes on; nothing when nobody looks.
fn progress_bar(prefix: &str) -> ProgressBar {
    if !io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner().with_prefix(prefix.to_owned());
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {prefix}{wide_msg}") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}
