//! `berth image ...`: asks the daemon and prints.

use std::io::{self, IsTerminal};
use std::time::Duration;

use berth_api::size::Size;
use berth_api::v1::error::{ApiError, ErrorCode};
use berth_api::v1::image::{BootstrapImage, BootstrapLine, Image};
use berth_api::v1::routes::{self, PREFIX};
use berth_image::store::ImageName;
use hyper::Method;
use indicatif::{ProgressBar, ProgressStyle};

use crate::args::{BootstrapArgs, ImageCommand};
use crate::client::{Client, ClientError};
use crate::exit::{CliError, ExitCode};
use crate::vm::{NOTHING, print, print_list};

type Done = Result<ExitCode, CliError>;

/// Does what a command says.
///
/// # Errors
/// [`CliError`].
pub fn run(client: &Client, command: &ImageCommand) -> Done {
    match command {
        ImageCommand::Bootstrap(args) => bootstrap(client, args),
        ImageCommand::Ls(listing) => list(client, listing.json),
        ImageCommand::Rm(remove) => remove_all(client, &remove.images),
    }
}

fn bootstrap(client: &Client, args: &BootstrapArgs) -> Done {
    let request = BootstrapImage {
        distribution: args.distribution.clone(),
        suite: args.suite.clone(),
        disk_size: Some(args.size),
        include: args.include.clone(),
        name: args.name.clone(),
        again: args.again,
    };
    let usual = || format!("{}:{}", args.distribution, args.suite);
    let bar = progress_bar(&format!("{}: ", args.name.clone().unwrap_or_else(usual)));
    let mut last = None;
    let ended = client.lines(&format!("{PREFIX}/images"), &request, |line| match line {
        BootstrapLine::Progress(line) => bar.set_message(line),
        line => last = Some(line),
    });
    bar.finish_and_clear();
    ended?;
    match last {
        Some(BootstrapLine::Made(image)) => eprintln!(
            "berth: made {} with kernel {}, {} on disk",
            image.name,
            image.kernel_version,
            Size::from(image.allocated_bytes)
        ),
        Some(BootstrapLine::Existed(image)) => {
            eprintln!("berth: {} is there already; --again makes it anew", image.name);
        }
        Some(BootstrapLine::Failed(error)) => return Err(ClientError::from(error).into()),
        Some(BootstrapLine::Progress(_)) | None => return Err(ClientError::Unfinished.into()),
    }
    Ok(ExitCode::Success)
}

fn list(client: &Client, json: bool) -> Done {
    let images: Vec<Image> = client.call(&Method::GET, &format!("{PREFIX}/images"), NOTHING)?;
    if images.is_empty() && !json {
        eprintln!("berth: no images yet; make one with `berth image bootstrap debian bookworm`");
    }
    print_list(&images, json, &["IMAGE", "KERNEL", "DISK", "USED"], |image| {
        vec![
            image.name.clone(),
            image.kernel_version.clone(),
            Size::from(image.disk_bytes).to_string(),
            Size::from(image.allocated_bytes).to_string(),
        ]
    })
}

/// Images before one that cannot be removed are gone.
fn remove_all(client: &Client, names: &[String]) -> Done {
    for name in names {
        // None at all would be another path.
        ImageName::parse(name)?;
        let removed = remove(client, name)?;
        print(&format!("{}\n", removed.name))?;
    }
    Ok(ExitCode::Success)
}

fn remove(client: &Client, name: &str) -> Result<Image, ClientError> {
    let path = routes::image(name);
    match client.call(&Method::DELETE, &path, NOTHING) {
        Err(ClientError::Api(ApiError { code: ErrorCode::Busy, .. })) => {
            eprintln!("berth: waiting for a bootstrap to finish");
            client.call(&Method::DELETE, &format!("{path}?wait=true"), NOTHING)
        }
        answer => answer,
    }
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
