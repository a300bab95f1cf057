//! Makes an image from a Debian mirror: `mmdebstrap` fills the root, `mke2fs` makes a disk of it
//! without mounting, and the distribution's cloud kernel is unpacked beside it, never installed.
//!
//! Root works in a directory; any other user in mmdebstrap's user namespace, where the files belong
//! to subordinate ids and only a second step inside the namespace can read them all.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;

use crate::disk::copy_sparse;
use crate::mounts::remove_tree;
use crate::sources;
use crate::store::{
    IMAGE_FORMAT, Image, ImageInfo, ImageName, Store, StoreError, StoreLock, failed,
};
use crate::tools::{Stop, Tool, found, require_tools};

/// The size of a root disk unless asked otherwise; sparse, so only what is used is stored.
pub const DISK_BYTES_DEFAULT: u64 = 4 << 30;
/// Below this a Debian does not fit, which would show only at the end.
const DISK_BYTES_MIN: u64 = 512 << 20;
/// What a small Debian lacks that people miss within a minute.
const PACKAGES: &str = "ca-certificates,iproute2,iputils-ping,less,nano,procps";
/// The package whose dependency is the newest cloud kernel.
const KERNEL_META_PACKAGE: &str = "linux-image-cloud-amd64";

/// Why an image could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BootstrapError {
    /// Nothing but Debian is known.
    #[error("cannot bootstrap {0}; only `debian` is known")]
    Distribution(String),
    /// Not a suite's name.
    #[error("`{0}` is no suite; try `bookworm`")]
    Suite(String),
    /// Not a package's name.
    #[error("`{0}` is no package name")]
    Package(String),
    /// Nothing fits on such a disk.
    #[error("a root disk of {} MiB is too small for Debian; the least is {} MiB", .0 >> 20, DISK_BYTES_MIN >> 20)]
    DiskSize(u64),
    /// A program is not installed.
    #[error("{program} is not installed; try `apt-get install {package}`")]
    NoTool {
        /// The program.
        program: &'static str,
        /// Its package.
        package: &'static str,
    },
    /// A program did not start.
    #[error("starting {program} failed")]
    Start {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// A program failed.
    #[error("{program} failed ({status}):\n{output}{hint}")]
    Tool {
        /// The program.
        program: String,
        /// Its exit status.
        status: String,
        /// The end of what it said.
        output: String,
        /// What to try.
        hint: &'static str,
    },
    /// The kernel package holds something unexpected.
    #[error("the kernel package has no {0}")]
    KernelPackage(&'static str),
    /// Somebody stopped it.
    #[error("the making of the image was stopped; nothing was made")]
    Stopped,
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is to be made.
#[derive(Clone, Debug)]
pub struct Request {
    /// `debian`.
    pub distribution: String,
    /// `bookworm`.
    pub suite: String,
    /// The disk's size as the guest sees it.
    pub disk_bytes: u64,
    /// Packages beyond those every image has.
    pub include: Vec<String>,
    /// What to call the image; `DISTRIBUTION:SUITE` unless given.
    pub name: Option<String>,
    /// Make it again even if it is there.
    pub again: bool,
}

impl Request {
    /// The image's name.
    ///
    /// # Errors
    /// [`BootstrapError`] when the distribution, the suite, a package, the size or the name cannot
    /// be.
    pub fn name(&self) -> Result<ImageName, BootstrapError> {
        if self.distribution != "debian" {
            return Err(BootstrapError::Distribution(self.distribution.clone()));
        }
        let plain = self.suite.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
        if self.suite.is_empty() || !plain {
            return Err(BootstrapError::Suite(self.suite.clone()));
        }
        if let Some(bad) = self.include.iter().find(|package| !is_package(package)) {
            return Err(BootstrapError::Package(bad.clone()));
        }
        if self.disk_bytes < DISK_BYTES_MIN {
            return Err(BootstrapError::DiskSize(self.disk_bytes));
        }
        Ok(match &self.name {
            Some(name) => ImageName::parse(name)?,
            None => ImageName::parse(&format!("{}:{}", self.distribution, self.suite))?,
        })
    }
}

/// Debian policy, 5.6.1: lower case letters, digits, plus, minus and full stops, and no option.
fn is_package(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '+' | '-' | '.'))
}

/// What came of it.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It was made now.
    Made(Image),
    /// It was there before.
    Existed(Image),
}

/// Makes an image. `progress` is told what happens, a line at a time.
///
/// # Errors
/// [`BootstrapError`]; the store is then as it was.
pub fn bootstrap(
    store: &Store,
    lock: &StoreLock,
    request: &Request,
    stop: &Stop,
    progress: &dyn Fn(&str),
) -> Result<Outcome, BootstrapError> {
    let name = request.name()?;
    store.sweep(lock)?;
    if !request.again
        && let Ok(image) = store.find(&name)
    {
        return Ok(Outcome::Existed(image));
    }
    require_tools()?;
    let work = Workspace::new(store)?;
    let sources = sources::for_suite(&request.suite);
    let disk = make_root(&work, request, &sources, stop, progress)?;
    progress("unpacking the kernel");
    let finished = work.directory.join("image");
    let kernel_version = unpack_kernel(&work, &finished, stop)?;
    place_disk(&disk, &finished.join("root.ext4"))?;
    progress("writing out");
    let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let info = ImageInfo {
        format: IMAGE_FORMAT,
        name: name.as_str().to_owned(),
        kernel_version,
        created_unix_s: created.as_secs(),
        disk_bytes: request.disk_bytes,
        sources,
    };
    if stop.is_stopped() {
        return Err(BootstrapError::Stopped);
    }
    Ok(Outcome::Made(store.publish(lock, &finished, &info)?))
}

/// The directory of the work under way.
struct Workspace {
    /// In the store; removed when this is dropped.
    directory: PathBuf,
    /// Where the root is built: the same for root. Elsewhere for others, since the user namespace
    /// cannot look into a private home directory.
    root_area: PathBuf,
    is_root: bool,
}

impl Workspace {
    fn new(store: &Store) -> Result<Self, BootstrapError> {
        let directory = store.temporary().join(format!("bootstrap-{}", Uuid::new_v4()));
        fs::create_dir_all(&directory).map_err(failed("creating", &directory))?;
        let is_root = rustix::process::geteuid().is_root();
        let root_area = if is_root {
            directory.clone()
        } else {
            let area = std::env::temp_dir().join(format!("berth-bootstrap-{}", Uuid::new_v4()));
            fs::create_dir(&area).map_err(failed("creating", &area))?;
            // The namespace's root is another user to us, and writes here.
            fs::set_permissions(&area, fs::Permissions::from_mode(0o777))
                .map_err(failed("opening up", &area))?;
            area
        };
        Ok(Self { directory, root_area, is_root })
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // What cannot be removed now is swept by the next bootstrap.
        let _ = remove_tree(&self.directory);
        if !self.is_root {
            // The files belong to the namespace's users; only inside it can they be removed.
            let mut remove = Tool::new("mmdebstrap");
            remove.args(["--unshare-helper", "find"]).arg(&self.root_area);
            remove.args(["-xdev", "-mindepth", "1", "-delete"]);
            let _ = remove.run(&Stop::default(), &|_| {});
            let _ = fs::remove_dir_all(&self.root_area);
        }
    }
}

/// Builds the root file system and the disk of it; the kernel's package falls off into
/// `WORK/berth-kernel`.
fn make_root(
    work: &Workspace,
    request: &Request,
    sources: &[String],
    stop: &Stop,
    progress: &dyn Fn(&str),
) -> Result<PathBuf, BootstrapError> {
    let fetch_kernel = format!(
        "set -eu; mkdir \"$1/berth-kernel\"; cd \"$1/berth-kernel\"; \
         export APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\"; \
         kernel=$(apt-cache depends {KERNEL_META_PACKAGE} | sed -n 's/^ *Depends: //p' | head -n 1); \
         apt-get -qq -o APT::Sandbox::User=root download \"$kernel\""
    );
    let tidy_up = format!(
        "set -eu; rm -rf \"$1/berth-kernel\"; echo {} > \"$1/etc/hostname\"; \
         printf '127.0.0.1 localhost\\n::1 localhost ip6-localhost\\n' > \"$1/etc/hosts\"; \
         : > \"$1/etc/machine-id\"; rm -f \"$1/etc/resolv.conf\"",
        request.distribution
    );
    let packages: Vec<&str> =
        [PACKAGES].into_iter().chain(request.include.iter().map(String::as_str)).collect();
    let area = work.root_area.display();
    let mut make = Tool::bound("mmdebstrap");
    // What it leaves there when it is killed goes with the rest.
    make.env("TMPDIR", &work.root_area);
    let (mode, format, target) =
        if work.is_root { ("root", "directory", "root") } else { ("unshare", "tar", "root.tar") };
    make.args(["--variant=minbase", "--architectures=amd64"])
        .arg(format!("--mode={mode}"))
        .arg(format!("--format={format}"))
        .arg(format!("--include={}", packages.join(",")))
        .args(["--aptopt=Acquire::Languages \"none\"", "--dpkgopt=force-unsafe-io"])
        .args(proxy_options())
        .arg(format!("--customize-hook={fetch_kernel}"))
        .arg(format!("--customize-hook=copy-out /berth-kernel {area}"))
        .arg(format!("--customize-hook={tidy_up}"))
        .arg(&request.suite)
        .arg(work.root_area.join(target))
        .arg("-")
        .input(sources.join("\n") + "\n");
    if !work.is_root {
        make.hint(
            "\nwithout root this needs user namespaces and subordinate ids (/etc/subuid, package uidmap)",
        );
    }
    make.run(stop, &|line| progress(line.strip_prefix("I: ").unwrap_or(line)))?;
    progress("making the root disk");
    make_disk(work, request.disk_bytes, stop)
}

fn make_disk(work: &Workspace, disk_bytes: u64, stop: &Stop) -> Result<PathBuf, BootstrapError> {
    let disk = work.root_area.join("root.ext4");
    let kib = format!("{}k", disk_bytes / 1024);
    // Everything is initialized now, so that no guest spends its first seconds on it.
    let options = [
        "-q",
        "-F",
        "-t",
        "ext4",
        "-L",
        "root",
        "-m",
        "0",
        "-J",
        "size=32",
        "-E",
        "lazy_itable_init=0,lazy_journal_init=0",
    ];
    if work.is_root {
        let mut make = Tool::bound("mke2fs");
        make.args(options).arg("-d").arg(work.root_area.join("root")).arg(&disk).arg(kib);
        make.run(stop, &|_| {})?;
    } else {
        // A user namespace cannot make device nodes, and a guest has its own over these.
        let script = "set -eu; cd \"$1\"; shift; mkdir root; \
                      tar -C root --exclude='./dev/*' -xf root.tar; \
                      mke2fs \"$@\"; chmod 0644 root.ext4";
        let mut make = Tool::bound("mmdebstrap");
        make.args(["--unshare-helper", "sh", "-c", script, "sh"])
            .arg(&work.root_area)
            .args(options)
            .args(["-d", "root", "root.ext4"])
            .arg(kib);
        make.run(stop, &|_| {})?;
    }
    Ok(disk)
}

/// Moves the disk into the image; across file systems and owners by copying.
fn place_disk(disk: &Path, place: &Path) -> Result<(), BootstrapError> {
    let same_owner = {
        use std::os::unix::fs::MetadataExt;
        fs::metadata(disk).is_ok_and(|meta| meta.uid() == rustix::process::geteuid().as_raw())
    };
    if same_owner && fs::rename(disk, place).is_ok() {
        return Ok(());
    }
    let from = File::open(disk).map_err(failed("opening", disk))?;
    let to = File::create_new(place).map_err(failed("creating", place))?;
    Ok(copy_sparse(&from, &to).map_err(failed("copying", disk))?)
}

/// Takes kernel and modules out of the package; returns the kernel's version.
fn unpack_kernel(work: &Workspace, finished: &Path, stop: &Stop) -> Result<String, BootstrapError> {
    let packages = work.root_area.join("berth-kernel");
    let package = first_file(&packages, |name| name.ends_with(".deb"))
        .ok_or(BootstrapError::KernelPackage("file; was it downloaded?"))?;
    let tree = work.directory.join("kernel-package");
    Tool::bound("dpkg-deb").arg("-x").arg(package).arg(&tree).run(stop, &|_| {})?;
    let kernel = first_file(&tree.join("boot"), |name| name.starts_with("vmlinuz-"))
        .ok_or(BootstrapError::KernelPackage("/boot/vmlinuz"))?;
    let file_name = kernel.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let version = file_name.trim_start_matches("vmlinuz-").to_owned();
    let places = ["lib/modules", "usr/lib/modules"].map(|place| tree.join(place).join(&version));
    let modules = places
        .iter()
        .find(|place| place.is_dir())
        .ok_or(BootstrapError::KernelPackage("directory of modules"))?;
    let target = finished.join("kernel");
    fs::create_dir_all(&target).map_err(failed("creating", &target))?;
    let vmlinuz = target.join("vmlinuz");
    fs::rename(&kernel, &vmlinuz).map_err(failed("moving", &kernel))?;
    let stored = target.join("modules");
    fs::rename(modules, &stored).map_err(failed("moving", modules))?;
    decompress_modules(&stored, stop)?;
    Ok(version)
}

/// Newer Debian packages their modules compressed; the guest should not have to unpack them at
/// every start.
fn decompress_modules(directory: &Path, stop: &Stop) -> Result<(), BootstrapError> {
    const BATCH: usize = 200;
    let mut compressed = Vec::new();
    collect_compressed(directory, &mut compressed)?;
    for (extension, program) in [("xz", "xz"), ("zst", "zstd"), ("gz", "gzip")] {
        let of_kind: Vec<_> = compressed
            .iter()
            .filter(|path| path.extension().is_some_and(|e| e == extension))
            .collect();
        for batch in of_kind.chunks(BATCH) {
            let mut unpack = Tool::bound(program);
            unpack.arg("-d");
            if program == "zstd" {
                unpack.args(["-q", "--rm"]);
            }
            unpack.args(batch).run(stop, &|_| {})?;
        }
    }
    Ok(())
}

fn collect_compressed(directory: &Path, found: &mut Vec<PathBuf>) -> Result<(), BootstrapError> {
    for entry in fs::read_dir(directory).map_err(failed("reading", directory))? {
        let path = entry.map_err(failed("reading", directory))?.path();
        if path.is_dir() && !path.is_symlink() {
            collect_compressed(&path, found)?;
        } else if path.to_string_lossy().contains(".ko.") {
            found.push(path);
        }
    }
    Ok(())
}

fn first_file(directory: &Path, wanted: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let entries = fs::read_dir(directory).ok()?.flatten();
    entries
        .map(|entry| entry.path())
        .find(|path| path.file_name().and_then(OsStr::to_str).is_some_and(&wanted))
}

/// The host's proxy for apt, which mmdebstrap's own configuration does not know.
fn proxy_options() -> Vec<String> {
    let mut options = Vec::new();
    for key in ["Acquire::http::Proxy", "Acquire::https::Proxy"] {
        let dump = found("apt-config").args(["dump", "--format", "%v%n", key]).output();
        let text = dump.map(|output| output.stdout).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        if let Some(proxy) = text.lines().next().filter(|proxy| !proxy.is_empty()) {
            options.push(format!("--aptopt={key} \"{proxy}\""));
        }
    }
    options
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(distribution: &str, suite: &str) -> Request {
        let (distribution, suite) = (distribution.into(), suite.into());
        let disk_bytes = DISK_BYTES_DEFAULT;
        Request { distribution, suite, disk_bytes, include: Vec::new(), name: None, again: false }
    }

    #[test]
    fn only_debian_suites_are_accepted() {
        assert_eq!(request("debian", "bookworm").name().unwrap().as_str(), "debian:bookworm");
        for (distribution, suite) in
            [("fedora", "41"), ("debian", ""), ("debian", "../x"), ("debian", "a b")]
        {
            assert!(request(distribution, suite).name().is_err(), "{distribution} {suite}");
        }
    }

    #[test]
    fn packages_and_names_are_checked() {
        let with = |name: Option<&str>, package: &str| Request {
            include: vec!["gcc".into(), package.into()],
            name: name.map(str::to_owned),
            ..request("debian", "bookworm")
        };
        assert_eq!(with(Some("lab"), "libstdc++-12-dev").name().unwrap().as_str(), "lab");
        assert_eq!(with(None, "python3.11").name().unwrap().as_str(), "debian:bookworm");
        assert!(with(Some("../lab"), "gcc").name().is_err());
        for bad in ["", "-o", "a b", "a,b", "A", "$(x)", "./a.deb"] {
            assert!(with(None, bad).name().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_disk_too_small_is_refused_before_work_begins() {
        let small = Request { disk_bytes: 10 << 20, ..request("debian", "bookworm") };
        let error = small.name().unwrap_err().to_string();
        assert!(error.contains("10 MiB") && error.contains("512 MiB"), "{error}");
    }

    #[test]
    fn compressed_modules_are_unpacked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a/b");
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("x.ko"), "module").unwrap();
        assert!(found("gzip").arg(path.join("x.ko")).status().unwrap().success());
        assert!(!path.join("x.ko").exists());
        decompress_modules(directory.path(), &Stop::default()).unwrap();
        assert_eq!(fs::read(path.join("x.ko")).unwrap(), b"module");
    }
}
