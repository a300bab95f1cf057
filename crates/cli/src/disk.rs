//! `berth disk ...`: files of disks, without a machine or the daemon.

use std::io::{self, Write};
use std::path::Path;

use berth_api::size::Size;
use berth_disk::chain::{LayerInfo, describe};
use berth_disk::format::Format;
use berth_disk::qcow2::check::Report;
use berth_disk::tools::{self, Backing};
use serde::Serialize;

use crate::args::disk::{DiskCommand, DiskCreateArgs, DiskFile};
use crate::exit::{CliError, ExitCode};

type Done = Result<ExitCode, CliError>;

/// What `info --json` prints of a disk, or of one below it.
#[derive(Debug, Serialize)]
struct Told<'a> {
    file: &'a Path,
    format: &'static str,
    virtual_bytes: u64,
    allocated_bytes: u64,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    chain: Vec<Told<'a>>,
}

/// What `check --json` prints.
#[derive(Debug, Serialize)]
struct Checked<'a> {
    file: &'a Path,
    sound: bool,
    corruptions: u64,
    leaked_clusters: u64,
    data_clusters: u64,
    findings: &'a [String],
}

/// Does it.
///
/// # Errors
/// [`CliError`].
pub fn run(command: &DiskCommand) -> Done {
    match command {
        DiskCommand::Create(args) => create(args)?,
        DiskCommand::Resize(args) => {
            let format = format(args.format, &args.file);
            tools::resize(&args.file, format, args.size.bytes(), args.shrink)?;
        }
        DiskCommand::Convert(args) => {
            let from = (args.from.as_path(), format(args.from_format, &args.from));
            let to = (args.to.as_path(), format(args.format, &args.to));
            tools::convert(from, to)?;
        }
        DiskCommand::Info(args) => return info(args),
        DiskCommand::Check(args) => return check(args),
    }
    Ok(ExitCode::Success)
}

fn format(asked: Option<Format>, path: &Path) -> Format {
    asked.unwrap_or_else(|| Format::of_name(path))
}

fn create(args: &DiskCreateArgs) -> Result<(), CliError> {
    let size = args.size.map(Size::bytes);
    let backing = match &args.backing {
        Some(path) => Some(Backing {
            name: tools::backing_name(&args.file, path)?,
            format: format(args.backing_format, path),
        }),
        None => None,
    };
    Ok(tools::create(&args.file, format(args.format, &args.file), size, backing.as_ref())?)
}

fn info(args: &DiskFile) -> Done {
    let layers = describe(&args.file, format(args.format, &args.file))?;
    if args.json {
        let mut told = layers.iter().map(told);
        let top = told.next().map(|top| Told { chain: told.collect(), ..top });
        return print_json(&top);
    }
    let mut text = String::new();
    for (number, layer) in layers.iter().enumerate() {
        let LayerInfo { path, format, size, allocated } = layer;
        let what = if number == 0 { "" } else { "based on " };
        text.push_str(&format!(
            "{what}{}: {format}, {} ({size} bytes), {} on the host\n",
            path.display(),
            Size::from(*size),
            Size::from(*allocated),
        ));
    }
    print(&text)
}

fn told(layer: &LayerInfo) -> Told<'_> {
    Told {
        file: &layer.path,
        format: layer.format.as_str(),
        virtual_bytes: layer.size,
        allocated_bytes: layer.allocated,
        chain: Vec::new(),
    }
}

fn check(args: &DiskFile) -> Done {
    let report = tools::check_disk(&args.file, format(args.format, &args.file))?;
    if args.json {
        print_json(&Checked {
            file: &args.file,
            sound: report.is_sound(),
            corruptions: report.corruptions,
            leaked_clusters: report.leaks,
            data_clusters: report.data_clusters,
            findings: &report.findings,
        })?;
    } else {
        print(&check_text(&args.file, &report))?;
    }
    Ok(if report.is_sound() { ExitCode::Success } else { ExitCode::Failure })
}

fn check_text(file: &Path, report: &Report) -> String {
    let mut text = report.findings.iter().map(|line| format!("{line}\n")).collect::<String>();
    let verdict = match (report.corruptions, report.leaks) {
        (0, 0) => "sound".to_owned(),
        (0, leaks) => format!("sound; {leaks} clusters are lost to nothing"),
        (corruptions, _) => format!("damaged in {corruptions} places; try `qemu-img check -r all`"),
    };
    text.push_str(&format!("{}: {verdict}\n", file.display()));
    text
}

fn print(text: &str) -> Done {
    io::stdout().write_all(text.as_bytes()).map_err(CliError::Output)?;
    Ok(ExitCode::Success)
}

fn print_json(value: &impl Serialize) -> Done {
    let text = serde_json::to_string_pretty(value).map_err(CliError::Json)?;
    print(&(text + "\n"))
}
