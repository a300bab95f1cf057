//! What guests are started with: kernels from images, an initramfs with the benchmark program.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use berth_image::agent;
use berth_image::cpio::Archive;
use berth_image::initramfs;
use berth_image::store::{Image, ImageName, Store};

/// The image whose kernel runs the micro-benchmarks, and that is booted.
const IMAGE: &str = "debian:bookworm";

/// The image with programs, and what it has beyond the usual.
const PROGRAMS_IMAGE: &str = "debian-bench";
const PACKAGES: &str = "openssl,python3,gcc,libc6-dev,xz-utils,perl,sqlite3";

/// The same for all machines.
pub struct Files {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initial file system.
    pub initrd: PathBuf,
    /// A disk, attached read-only.
    pub disk: Option<PathBuf>,
    /// Guest memory.
    pub memory_mib: u64,
}

/// Builds the benchmark program; returns where it is.
pub fn benchmark_program() -> Result<PathBuf> {
    crate::agent::build_static("berth-bench-guest", "release")
}

/// The benchmark program as the only one in the guest.
pub fn for_micro(program: &Path) -> Result<Files> {
    let image = image(IMAGE)?;
    let bytes = fs::read(program).with_context(|| program.display().to_string())?;
    let mut archive = Archive::default();
    for directory in ["dev", "proc"] {
        archive.directory(directory)?;
    }
    archive.device("dev/console", 0o600, (5, 1))?;
    archive.file("init", 0o755, &bytes)?;
    let initrd = write_initrd("micro", &archive.finish())?;
    Ok(Files { kernel: image.kernel(), initrd, disk: None, memory_mib: 512 })
}

/// The benchmark program as init, with the modules for the disk of an image that has the programs;
/// the image is made when there is none.
pub fn for_programs(program: &Path, berth: &Path) -> Result<Files> {
    let image = match image(PROGRAMS_IMAGE) {
        Ok(image) => image,
        Err(_) => {
            let status = Command::new(berth)
                .args(["image", "bootstrap", "--name", PROGRAMS_IMAGE, "--include", PACKAGES])
                .args(["debian", "bookworm"])
                .status()?;
            if !status.success() {
                bail!("the image {PROGRAMS_IMAGE} could not be made");
            }
            image(PROGRAMS_IMAGE)?
        }
    };
    let bytes = fs::read(program).with_context(|| program.display().to_string())?;
    let initrd = write_initrd("programs", &initramfs::assemble(&image.modules(), &bytes)?)?;
    let disk = Some(image.root_disk());
    Ok(Files { kernel: image.kernel(), initrd, disk, memory_mib: 1024 })
}

/// What `berth vm run` boots an image with.
pub fn for_boot() -> Result<Files> {
    let image = image(IMAGE)?;
    if std::env::var_os("BERTH_AGENT").is_none() {
        // The search begins beside the running program, which for xtask is not where berth is.
        let built = crate::target().join("agent/x86_64-unknown-linux-gnu/agent/berth-agent");
        if !built.exists() {
            bail!("{} does not exist; run `cargo xtask agent`", built.display());
        }
    }
    let initrd = initramfs::for_image(&image, &agent::find()?)?;
    let disk = Some(image.root_disk());
    Ok(Files { kernel: image.kernel(), initrd, disk, memory_mib: 512 })
}

/// Where images are.
pub fn state_directory() -> PathBuf {
    std::env::var_os("BERTH_ROOT").map_or_else(|| PathBuf::from("/var/lib/berth"), PathBuf::from)
}

fn image(name: &str) -> Result<Image> {
    let root = state_directory();
    Ok(Store::open(&root)?.find(&ImageName::parse(name)?)?)
}

fn write_initrd(name: &str, bytes: &[u8]) -> Result<PathBuf> {
    let directory = crate::target().join("bench");
    fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    let path = directory.join(format!("{name}.cpio"));
    fs::write(&path, bytes).with_context(|| path.display().to_string())?;
    Ok(path)
}
