//! `berth doctor`: what was found on this host, what it means, and what Berth will use.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use berth_daemon::cgroup::Groups;
use berth_image::agent;
use berth_image::store::Store;
use berth_vmm::vcpu::probe::{Accel, probe};
use serde::Serialize;

use crate::exit::{CliError, ExitCode};
use crate::plan::has_program;
use crate::table;

/// How a finding is meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Grade {
    Good,
    /// Works without, with less.
    Notice,
    /// Something Berth needs is not there.
    Missing,
}

#[derive(Clone, Debug, Serialize)]
struct Finding {
    about: &'static str,
    grade: Grade,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

/// Looks and prints.
///
/// # Errors
/// [`CliError::Output`] when it cannot be printed.
pub fn run(root: &Path, json: bool) -> Result<ExitCode, CliError> {
    let findings = vec![
        processor(&fs::read_to_string("/proc/cpuinfo").unwrap_or_default()),
        translator(),
        direct(),
        kvm(),
        program("passt", "passt", "network for guests without privileges"),
        program("nft", "nftables", "networks of machines, which root can have"),
        program("mmdebstrap", "mmdebstrap", "making images"),
        program("mke2fs", "e2fsprogs", "making images"),
        agent_program(),
        images(root),
        groups(root),
    ];
    let text = match json {
        true => serde_json::to_string_pretty(&findings).map_err(CliError::Json)?,
        false => as_table(&findings),
    };
    writeln!(io::stdout(), "{text}").map_err(CliError::Output)?;
    let missing = findings.iter().any(|finding| finding.grade == Grade::Missing);
    Ok(if missing { ExitCode::Failure } else { ExitCode::Success })
}

fn as_table(findings: &[Finding]) -> String {
    let row = |finding: &Finding| {
        let mark = match finding.grade {
            Grade::Good => "ok",
            Grade::Notice => "note",
            Grade::Missing => "missing",
        };
        let advice = finding.advice.iter().map(|advice| format!("; {advice}"));
        let text = std::iter::once(finding.found.clone()).chain(advice).collect();
        vec![mark.to_owned(), finding.about.to_owned(), text]
    };
    table::plain(&[], findings.iter().map(row).collect())
}

fn flags(cpuinfo: &str) -> impl Iterator<Item = &str> {
    let line = cpuinfo.lines().find(|line| line.starts_with("flags"));
    line.and_then(|line| line.split_once(':')).map_or("", |(_, flags)| flags).split_whitespace()
}

fn processor(cpuinfo: &str) -> Finding {
    let model = cpuinfo.lines().find(|line| line.starts_with("model name"));
    let model = model.and_then(|line| line.split_once(':')).map_or("unknown", |(_, name)| name);
    let count = cpuinfo.lines().filter(|line| line.starts_with("processor")).count();
    let v2 = ["cx16", "lahf_lm", "popcnt", "pni", "sse4_1", "sse4_2", "ssse3"];
    let lacks: Vec<_> = v2.iter().filter(|flag| !flags(cpuinfo).any(|f| f == **flag)).collect();
    let found = format!("{} x{count}", model.trim());
    if lacks.is_empty() {
        return Finding { about: "processor", grade: Grade::Good, found, advice: None };
    }
    let advice = Some(format!("guests need x86-64-v2, and this lacks {lacks:?}"));
    Finding { about: "processor", grade: Grade::Missing, found, advice }
}

/// What the machine's own probe found about KVM, and what `--accel auto` takes.
fn kvm() -> Finding {
    let report = probe();
    let found: Vec<_> =
        report.findings.iter().map(|f| format!("{}: {}", f.what, f.detail)).collect();
    let advice = format!("`--accel auto` takes {}", report.chosen);
    let grade = if report.chosen == Accel::Kvm { Grade::Good } else { Grade::Notice };
    Finding { about: "kvm", grade, found: found.join("; "), advice: Some(advice) }
}

/// Whether the translator's generated code can run here.
fn translator() -> Finding {
    let found = berth_vmm::vcpu::translated::host_check()
        .map(|()| "the processor has BMI2, AVX and FSGSBASE")
        .map_err(|error| error.to_string());
    usable("translator", found, "machines need KVM here")
}

/// Whether programs in translated guests can be executed by the processor itself.
fn direct() -> Finding {
    let found = berth_vmm::vcpu::translated::direct_check()
        .map(|direct| match direct.execute_only {
            true => "programs that compute run on the processor itself",
            false => {
                "programs that compute run on the processor itself, but for pages with much code for \
                 processors that guests do not have: this one has no protection keys"
            }
        })
        .map_err(|error| format!("a process cannot be traced here: {error}"));
    let advice = "all code is translated; allow ptrace for programs to be faster";
    usable("direct execution", found, advice)
}

/// What Berth uses if it is there.
fn usable(about: &'static str, found: Result<&str, String>, advice: &str) -> Finding {
    let (grade, found, advice) = match found {
        Ok(found) => (Grade::Good, found.to_owned(), None),
        Err(found) => (Grade::Notice, found, Some(advice.to_owned())),
    };
    Finding { about, grade, found, advice }
}

fn program(name: &'static str, package: &str, purpose: &str) -> Finding {
    if has_program(name) {
        let found = format!("installed, for {purpose}");
        return Finding { about: name, grade: Grade::Good, found, advice: None };
    }
    let found = format!("not installed; needed for {purpose}");
    let advice = Some(format!("try `apt-get install {package}`"));
    Finding { about: name, grade: Grade::Notice, found, advice }
}

fn agent_program() -> Finding {
    match agent::find() {
        Ok(agent) => Finding {
            about: "agent",
            grade: Grade::Good,
            found: agent.path.display().to_string(),
            advice: None,
        },
        Err(error) => Finding {
            about: "agent",
            grade: Grade::Missing,
            found: error.to_string(),
            advice: None,
        },
    }
}

/// Whether machines get control groups, and where.
fn groups(root: &Path) -> Finding {
    let about = "control groups";
    match Groups::find(root).check() {
        Ok(places) => {
            let places: Vec<_> = places.iter().map(|path| path.display().to_string()).collect();
            let found = format!("machines are in {}", places.join(" and "));
            Finding { about, grade: Grade::Good, found, advice: None }
        }
        Err(found) => {
            let advice = "machines run without, and cannot have --cpu-limit and --memory-limit";
            Finding { about, grade: Grade::Notice, found, advice: Some(advice.into()) }
        }
    }
}

fn images(root: &Path) -> Finding {
    let about = "images";
    if !root.exists() {
        let found = format!("none; {} does not exist yet", root.display());
        let advice = Some("try `berth image bootstrap debian bookworm`".to_owned());
        return Finding { about, grade: Grade::Notice, found, advice };
    }
    match Store::open(root).and_then(|store| store.images()) {
        Ok(images) => {
            let found = format!("{} in {}", images.len(), root.display());
            Finding { about, grade: Grade::Good, found, advice: None }
        }
        Err(error) => {
            Finding { about, grade: Grade::Missing, found: error.to_string(), advice: None }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_is_judged_by_its_flags() {
        let good =
            "processor : 0\nmodel name : X\nflags : cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3\n";
        let finding = processor(good);
        assert_eq!((finding.grade, finding.found.as_str()), (Grade::Good, "X x1"));
        let poor = processor(&good.replace("popcnt", ""));
        assert_eq!(poor.grade, Grade::Missing);
        assert!(poor.advice.unwrap().contains("popcnt"));
    }
}
