//! The words of `berth vm export` and `berth vm import`.

use std::path::PathBuf;

const EXPORT_EXAMPLES: &str = "\
Examples:
  berth vm export web -o web.berth
  berth vm export --with-state -o - web | ssh HOST berth vm import --run -";

const IMPORT_EXAMPLES: &str = "\
Examples:
  berth vm import --run web.berth
  berth vm import --name web2 --without-state web.berth";

/// `berth vm export`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = EXPORT_EXAMPLES)]
pub struct ExportArgs {
    /// The file to be made; `-` writes to standard output
    #[arg(long, short, value_name = "FILE")]
    pub output: PathBuf,
    /// Its memory too, so that it goes on where it was; only of a machine that runs or is suspended
    #[arg(long)]
    pub with_state: bool,
    /// Replace a file that is there
    #[arg(long, short)]
    pub force: bool,
    /// The machine's name
    pub name: String,
}

/// `berth vm import`.
#[derive(Clone, Debug, clap::Args)]
#[command(after_help = IMPORT_EXAMPLES)]
pub struct ImportArgs {
    /// What to call the machine [default: as it was called]
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,
    /// Start it
    #[arg(long)]
    pub run: bool,
    /// Leave the memory out, if there is one: the machine begins with its disks
    #[arg(long)]
    pub without_state: bool,
    /// The file; `-` reads standard input
    pub file: PathBuf,
}
