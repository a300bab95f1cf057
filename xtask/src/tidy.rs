//! Rules no compiler checks: the map names what exists, files stay readable, crates keep to their
//! side of the thread and runtime boundaries, every dependency has its reason.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Lines a source file may have.
const LINES_MAX: usize = 800;
/// Files over the limit, each with its reason.
const LONG_FILES: [(&str, &str); 1] =
    [("crates/translator/src/vcpu.rs", "FIXME: to be split by role; it grew while it was written")];
/// Crates that may depend on tokio.
const TOKIO_CRATES: [&str; 3] = ["cli", "daemon", "net"];
/// Crates that may start threads; the others are driven by their callers.
const THREAD_CRATES: [&str; 5] = ["agent", "bench-guest", "cli", "difftest", "vmm"];
/// First words of paths that a document means as paths in this repository.
const ROOTS: [&str; 5] = ["crates/", "xtask/", "docs/", "scripts/", ".ci/"];

/// Checks the repository at `root`; returns what is wrong, a line each.
pub fn check(root: &Path) -> Result<Vec<String>> {
    let mut faults = Vec::new();
    let crates = crate_names(root)?;
    check_map(root, &crates, &mut faults)?;
    check_sources(root, &crates, &mut faults)?;
    check_manifests(root, &crates, &mut faults)?;
    Ok(faults)
}

fn crate_names(root: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root.join("crates")).context("reading crates")? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn check_map(root: &Path, crates: &[String], faults: &mut Vec<String>) -> Result<()> {
    let name = "ARCHITECTURE.md";
    let text = fs::read_to_string(root.join(name)).context(name)?;
    for path in named_paths(&text) {
        if !root.join(&path).exists() {
            faults.push(format!("{name} names {path}, which does not exist"));
        }
    }
    for krate in crates {
        if !text.contains(&format!("`crates/{krate}`")) {
            faults.push(format!("{name} does not list `crates/{krate}`"));
        }
    }
    Ok(())
}

/// What stands between backticks and looks like a path of ours.
fn named_paths(text: &str) -> Vec<String> {
    let quoted = text.split('`').skip(1).step_by(2);
    let ours = quoted.filter(|word| ROOTS.iter().any(|root| word.starts_with(root)));
    ours.filter(|word| !word.contains([' ', '*', '<'])).map(str::to_owned).collect()
}

fn check_sources(root: &Path, crates: &[String], faults: &mut Vec<String>) -> Result<()> {
    let mut directories: Vec<PathBuf> =
        crates.iter().map(|krate| root.join("crates").join(krate)).collect();
    directories.push(root.join("xtask"));
    for directory in directories {
        let krate = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut files = Vec::new();
        rust_files(&directory, &mut files)?;
        for file in files {
            let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
            let name = file.strip_prefix(root).unwrap_or(&file).display().to_string();
            check_source(&name, &krate, &text, faults);
        }
    }
    Ok(())
}

fn check_source(name: &str, krate: &str, text: &str, faults: &mut Vec<String>) {
    let lines = text.lines().count();
    let excused = LONG_FILES.iter().any(|(file, _)| *file == name);
    if lines > LINES_MAX && !excused {
        faults.push(format!("{name} has {lines} lines; {LINES_MAX} are the limit"));
    }
    if lines <= LINES_MAX && excused {
        faults.push(format!("{name} is excused for its length and is not long"));
    }
    // A module's `tests.rs` is described by the module.
    if !text.starts_with("//!") && !name.ends_with("/tests.rs") {
        faults.push(format!("{name} does not begin by saying what it is (`//!`)"));
    }
    // The words are put together here so that this file does not accuse itself.
    for word in ["todo", "unimplemented"] {
        if text.contains(&format!("{word}!(")) {
            faults.push(format!("{name} uses {word}!"));
        }
    }
    let is_test = name.contains("/tests/") || name.ends_with("/tests.rs");
    let product = text.split("#[cfg(test)]").next().unwrap_or_default();
    let may_use_threads = is_test || krate == "xtask" || THREAD_CRATES.contains(&krate);
    if !may_use_threads
        && (product.contains("thread::spawn") || product.contains("thread::Builder"))
    {
        faults.push(format!("{name} starts threads; only {THREAD_CRATES:?} may"));
    }
}

fn rust_files(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            rust_files(&path, files)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    Ok(())
}

fn check_manifests(root: &Path, crates: &[String], faults: &mut Vec<String>) -> Result<()> {
    let name = "docs/dependencies.md";
    let text = fs::read_to_string(root.join(name)).context(name)?;
    let explained = explained_dependencies(&text);
    let mut used = BTreeSet::new();
    let mut manifests: Vec<PathBuf> =
        crates.iter().map(|krate| root.join("crates").join(krate).join("Cargo.toml")).collect();
    manifests.push(root.join("xtask/Cargo.toml"));
    for manifest in manifests {
        let shown = manifest.strip_prefix(root).unwrap_or(&manifest).display().to_string();
        let table: toml::Table = fs::read_to_string(&manifest)?.parse().context(shown.clone())?;
        for dependency in dependencies(&table) {
            let krate = shown.trim_start_matches("crates/").trim_end_matches("/Cargo.toml");
            if dependency == "tokio" && !TOKIO_CRATES.contains(&krate) {
                faults.push(format!("{shown} depends on tokio; only {TOKIO_CRATES:?} may"));
            }
            if !dependency.starts_with("berth-") {
                used.insert(dependency);
            }
        }
    }
    for dependency in used.difference(&explained) {
        faults.push(format!("{name} gives no reason for {dependency}"));
    }
    Ok(())
}

fn dependencies(manifest: &toml::Table) -> Vec<String> {
    ["dependencies", "dev-dependencies", "build-dependencies"]
        .iter()
        .filter_map(|section| manifest.get(*section)?.as_table())
        .flat_map(|table| table.keys().cloned())
        .collect()
}

/// The names in the first column of the table; a row may explain several.
fn explained_dependencies(text: &str) -> BTreeSet<String> {
    let rows = text.lines().filter_map(|line| line.strip_prefix('|')?.split('|').next());
    rows.flat_map(|names| names.split(',')).map(|name| name.trim().to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_repository_is_tidy() {
        let faults = check(&crate::workspace()).unwrap();
        assert!(faults.is_empty(), "{}", faults.join("\n"));
    }

    #[test]
    fn tests_named_in_the_coverage_exist() {
        let root = crate::workspace();
        let page = fs::read_to_string(root.join("docs/coverage.md")).unwrap();
        let mut files = Vec::new();
        for directory in ["crates", "xtask"] {
            rust_files(&root.join(directory), &mut files).unwrap();
        }
        let sources: String = files.iter().map(|f| fs::read_to_string(f).unwrap()).collect();
        let is_test = |word: &&str| {
            word.contains('_') && word.chars().all(|c| matches!(c, 'a'..='z' | '0'..='9' | '_'))
        };
        let names: Vec<&str> = page.split('`').skip(1).step_by(2).filter(is_test).collect();
        assert!(names.len() > 80, "only {} names", names.len());
        for name in names {
            assert!(sources.contains(&format!("fn {name}()")), "there is no test {name}");
        }
    }

    #[test]
    fn each_rule_finds_its_fault() {
        let mut faults = Vec::new();
        let long = format!("//! x\n{}", "//\n".repeat(LINES_MAX));
        check_source("crates/a/src/long.rs", "a", &long, &mut faults);
        check_source("crates/a/src/b.rs", "a", "use x;\n", &mut faults);
        check_source("crates/a/src/c.rs", "a", "//! x\nstd::thread::spawn(f);\n", &mut faults);
        check_source("crates/a/src/d.rs", "a", &format!("//! x\n{}!()", "todo"), &mut faults);
        assert_eq!(faults.len(), 4, "{faults:?}");
        check_source("crates/a/tests/it/c.rs", "a", "//! x\nthread::spawn(f);\n", &mut faults);
        check_source("crates/vmm/src/c.rs", "vmm", "//! x\nthread::spawn(f);\n", &mut faults);
        assert_eq!(faults.len(), 4, "{faults:?}");
        assert_eq!(
            named_paths("see `crates/a` and `cargo x` in `docs/b.md`"),
            ["crates/a", "docs/b.md"]
        );
        let explained = explained_dependencies("| crate | why |\n|---|---|\n| a, b | c |\n");
        assert!(explained.contains("a") && explained.contains("b") && !explained.contains("c"));
        let manifest = "[dependencies]\na.workspace = true\n[dev-dependencies]\nb = \"1\"\n";
        assert_eq!(dependencies(&manifest.parse().unwrap()), ["a", "b"]);
    }
}
