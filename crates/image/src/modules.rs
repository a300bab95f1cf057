//! Which kernel modules a machine needs, and in which order they must be loaded: read out of the
//! modules themselves (`depends=` and `softdep=pre:` in their `.modinfo`), so that no `depmod` has to
//! have run.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use object::{Object, ObjectSection};

/// What Berth's machine cannot do without.
pub const REQUIRED: [&str; 4] = ["virtio_pci", "virtio_blk", "ext4", "vmw_vsock_virtio_transport"];
/// What it also has when the kernel has it.
pub const OPTIONAL: [&str; 9] = [
    "crc32c_generic",
    "crc32c_intel",
    "virtio_net",
    "virtio_rng",
    "virtio_console",
    "virtiofs",
    "virtio_balloon",
    // The power button, and what makes a file of its key.
    "button",
    "evdev",
];

/// Chains of dependencies are short; a longer one is a circle or an attack.
const DEPTH_MAX: usize = 32;

/// Why the modules could not be put in order.
#[derive(Debug, thiserror::Error)]
pub enum ModulesError {
    /// A file or directory cannot be read.
    #[error("reading {path} failed")]
    Read {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is no kernel module.
    #[error("{path} is no kernel module")]
    NotAModule {
        /// Which.
        path: PathBuf,
        /// What the ELF reader found.
        source: object::Error,
    },
    /// The kernel does not have it.
    #[error("the kernel in {directory} has no {name}, neither built in nor as a module")]
    Missing {
        /// Its name.
        name: String,
        /// The modules' directory.
        directory: PathBuf,
    },
    /// The dependencies go round in a circle.
    #[error("the dependencies of the module {0} have no end")]
    Circle(String),
}

/// The modules of one kernel.
#[derive(Debug)]
pub struct Modules {
    directory: PathBuf,
    files: BTreeMap<String, PathBuf>,
    builtin: BTreeSet<String>,
}

impl Modules {
    /// Looks through a directory of modules.
    ///
    /// # Errors
    /// [`ModulesError::Read`].
    pub fn open(directory: &Path) -> Result<Self, ModulesError> {
        let mut files = BTreeMap::new();
        list(directory, &mut files)?;
        let path = directory.join("modules.builtin");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(ModulesError::Read { path, source }),
        };
        let builtin = text.lines().filter_map(|line| module_name(Path::new(line))).collect();
        Ok(Self { directory: directory.to_owned(), files, builtin })
    }

    /// The files to load for `required` and what exists of `optional`, dependencies first.
    ///
    /// # Errors
    /// [`ModulesError`].
    pub fn load_order(
        &self,
        required: &[&str],
        optional: &[&str],
    ) -> Result<Vec<PathBuf>, ModulesError> {
        let mut order = Order { seen: BTreeSet::new(), paths: Vec::new() };
        for name in required {
            self.add(&normal(name), &mut order, 0)?;
        }
        for name in optional.iter().map(|name| normal(name)) {
            if self.files.contains_key(&name) {
                self.add(&name, &mut order, 0)?;
            }
        }
        Ok(order.paths)
    }

    fn add(&self, name: &str, order: &mut Order, depth: usize) -> Result<(), ModulesError> {
        if order.seen.contains(name) || self.builtin.contains(name) {
            return Ok(());
        }
        if depth > DEPTH_MAX {
            return Err(ModulesError::Circle(name.to_owned()));
        }
        let path = self.files.get(name).ok_or_else(|| ModulesError::Missing {
            name: name.to_owned(),
            directory: self.directory.clone(),
        })?;
        let needs = read_needs(path)?;
        for needed in &needs.hard {
            self.add(needed, order, depth + 1)?;
        }
        // Soft dependencies are often algorithm names with no module of that name.
        for wished in needs.soft.iter().filter(|name| self.files.contains_key(*name)) {
            self.add(wished, order, depth + 1)?;
        }
        if order.seen.insert(name.to_owned()) {
            order.paths.push(path.clone());
        }
        Ok(())
    }
}

struct Order {
    seen: BTreeSet<String>,
    paths: Vec<PathBuf>,
}

struct Needs {
    hard: Vec<String>,
    soft: Vec<String>,
}

fn read_needs(path: &Path) -> Result<Needs, ModulesError> {
    let bytes =
        fs::read(path).map_err(|source| ModulesError::Read { path: path.to_owned(), source })?;
    let wrong = |source| ModulesError::NotAModule { path: path.to_owned(), source };
    let elf = object::File::parse(bytes.as_slice()).map_err(wrong)?;
    let info = match elf.section_by_name(".modinfo") {
        Some(section) => section.data().map_err(wrong)?,
        None => &[],
    };
    Ok(parse_needs(info))
}

fn parse_needs(info: &[u8]) -> Needs {
    let mut needs = Needs { hard: Vec::new(), soft: Vec::new() };
    for field in info.split(|&byte| byte == 0).map(String::from_utf8_lossy) {
        if let Some(names) = field.strip_prefix("depends=") {
            needs.hard.extend(names.split(',').filter(|name| !name.is_empty()).map(normal));
        } else if let Some(rule) = field.strip_prefix("softdep=") {
            let before = rule.split("post:").next().unwrap_or_default();
            let names = before.split("pre:").nth(1).unwrap_or_default();
            needs.soft.extend(names.split_ascii_whitespace().map(normal));
        }
    }
    needs
}

fn list(directory: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<(), ModulesError> {
    let failed = |source| ModulesError::Read { path: directory.to_owned(), source };
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let path = entry.path();
        if entry.file_type().map_err(failed)?.is_dir() {
            list(&path, files)?;
        } else if let Some(name) = module_name(&path) {
            files.insert(name, path);
        }
    }
    Ok(())
}

/// `kernel/fs/ext4/ext4.ko` is the module `ext4`.
fn module_name(path: &Path) -> Option<String> {
    let stem = path.file_name()?.to_str()?.strip_suffix(".ko")?;
    Some(normal(stem))
}

/// The kernel takes `-` and `_` in module names for the same.
fn normal(name: &str) -> String {
    name.trim().replace('-', "_")
}

#[cfg(test)]
mod tests {
    use object::write::Object as Writer;
    use object::{Architecture, BinaryFormat, Endianness, SectionKind};

    use super::*;

    fn module(directory: &Path, name: &str, info: &str) {
        let mut elf = Writer::new(BinaryFormat::Elf, Architecture::X86_64, Endianness::Little);
        let section = elf.add_section(vec![], b".modinfo".to_vec(), SectionKind::ReadOnlyData);
        elf.append_section_data(section, info.as_bytes(), 1);
        fs::create_dir_all(directory.join("kernel")).unwrap();
        fs::write(directory.join("kernel").join(name), elf.write().unwrap()).unwrap();
    }

    fn names(paths: &[PathBuf]) -> Vec<String> {
        paths.iter().filter_map(|path| module_name(path)).collect()
    }

    #[test]
    fn dependencies_come_first_and_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        module(
            path,
            "ext4.ko",
            "depends=jbd2,mbcache,crc16\0softdep=pre: crc32c fast-crc post: x\0",
        );
        module(path, "jbd2.ko", "license=GPL\0depends=\0");
        module(path, "mbcache.ko", "depends=\0");
        module(path, "fast-crc.ko", "depends=jbd2\0");
        module(path, "loop-a.ko", "depends=loop_b\0");
        module(path, "loop-b.ko", "depends=loop-a\0");
        fs::write(path.join("modules.builtin"), "kernel/lib/crc16.ko\n").unwrap();
        fs::write(path.join("kernel/junk.ko"), "no ELF").unwrap();
        let modules = Modules::open(path).unwrap();
        let order = modules.load_order(&["ext4", "mbcache"], &["virtio-net", "jbd2"]).unwrap();
        assert_eq!(names(&order), ["jbd2", "mbcache", "fast_crc", "ext4"]);
        assert!(matches!(modules.load_order(&["nope"], &[]), Err(ModulesError::Missing { .. })));
        assert!(matches!(modules.load_order(&["loop-a"], &[]), Err(ModulesError::Circle(_))));
        assert!(matches!(modules.load_order(&["junk"], &[]), Err(ModulesError::NotAModule { .. })));
    }
}
