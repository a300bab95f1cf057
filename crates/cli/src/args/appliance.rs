//! The words of `berth vm export` and `berth vm import`.

use std::path::PathBuf;

use clap::ValueEnum;

const EXPORT_EXAMPLES: &str = "\
Examples:
  berth vm export web -o web.berth
  berth vm export --with-state -o - web | ssh HOST berth vm import --run -
  berth vm export -o web.ova web";

const IMPORT_EXAMPLES: &str = "\
Examples:
  berth vm import --run web.berth
  berth vm import --name web2 --without-state web.berth
  berth vm import --kernel vmlinuz --initrd initrd --append 'root=/dev/vda1 console=ttyS0' box.ova";

/// What a machine is packed as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ApplianceFormat {
    /// Berth's own: all of it, as a stream
    Berth,
    /// A tar file with an OVF description and VMDK disks, without memory; needs qemu-img
    Ova,
}

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
    /// `berth`, or `ova` for other programs [default: as the file's name says]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<ApplianceFormat>,
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
    /// What the file is [default: an OVA if its name ends in .ova or .ovf, else `berth`]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<ApplianceFormat>,
    /// What to boot from an OVA that other programs made: Berth has no firmware that could boot its disk
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk that goes with it
    #[arg(long, value_name = "FILE", requires = "kernel")]
    pub initrd: Option<PathBuf>,
    /// Words of its command line
    #[arg(long, value_name = "WORDS", requires = "kernel")]
    pub append: Option<String>,
    /// The file; `-` reads standard input. When its import broke off, only what did not come is sent
    pub file: PathBuf,
}

/// `berth vm import-rm`.
#[derive(Clone, Debug, clap::Args)]
pub struct ImportRmArgs {
    /// Which, as `berth vm imports` lists them
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<String>,
}
