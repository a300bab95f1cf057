//! The `berth` program as scripts see it: status, standard output, standard error.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod appliances;
mod attached;
mod clones;
mod conformance;
mod consoles;
mod copy;
mod debian;
mod frozen;
mod groups;
mod guest;
mod images;
mod kept;
mod kernels;
mod killed;
mod networks;
mod remote;
mod resize;
mod rubbish;
mod run;
mod shares;
mod snapshots;
mod terminal;
mod unfinished;
mod usage;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use assert_cmd::Command;

fn berth(root: &Path) -> Command {
    let mut command = Command::cargo_bin("berth").unwrap();
    command.env("BERTH_ROOT", root).env("XDG_DATA_HOME", root.join("data"));
    command
}

/// Runs `berth` with arguments that must fail: one line on standard error that holds all of `parts`.
fn check_fails(root: &Path, line: &str, status: i32, parts: &[&str]) {
    let assert = berth(root).args(line.split_whitespace()).assert().code(status);
    let output = assert.get_output();
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    assert!(output.stdout.is_empty(), "{line}: standard output is for data");
    for part in parts {
        assert!(text.contains(part), "{line}: no `{part}` in: {text}");
    }
    if status == 1 {
        assert_eq!(text.lines().count(), 1, "{line}: {text}");
    }
    assert!(!text.contains("panicked"), "{text}");
}

#[test]
fn help_has_examples_and_every_command() {
    let directory = tempfile::tempdir().unwrap();
    let output = berth(directory.path()).arg("--help").assert().success();
    let text = String::from_utf8(output.get_output().stdout.clone()).unwrap();
    for part in ["berth vm run debian -- uname -a", "image", "doctor", "completions", "--root"] {
        assert!(text.contains(part), "{part}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let output = berth(directory.path()).args(["completions", shell]).assert().success();
        assert!(output.get_output().stdout.len() > 1000);
    }
}

#[test]
fn wrong_words_are_usage_errors() {
    let directory = tempfile::tempdir().unwrap();
    let check = |line, parts: &[&str]| check_fails(directory.path(), line, 2, parts);
    check("vm run", &["IMAGE"]);
    check("vm run --cpus 17 debian", &["17", "--cpus"]);
    check("vm run --memory lots debian", &["lots", "no size"]);
    check("vm run --net wi_fi debian", &["wi_fi", "tap=INTERFACE"]);
    check("vm run --publish 80 debian", &["`80`", "8080:80"]);
    check("vm run --publish 8080:80 --net none debian", &["--publish", "user"]);
    check("vm run --accel hope debian", &["hope", "translate"]);
    check("vm run --name a_b debian", &["a_b", "no machine name"]);
    check("vm run --kernel k -- true", &["a command needs an image"]);
    check("vm run --kernel k debian", &["--initrd"]);
}

#[test]
fn what_is_missing_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("state");
    let check = |line: &str, parts: &[&str]| check_fails(&root, line, 1, parts);
    let kernel = directory.path().join("kernel");
    fs::write(&kernel, "k").unwrap();
    let odd = directory.path().join("odd.raw");
    fs::write(&odd, "123").unwrap();
    let empty = directory.path().join("empty.raw");
    fs::write(&empty, "").unwrap();
    let disk = directory.path().join("disk.raw");
    fs::write(&disk, [0; 512]).unwrap();
    let alias = directory.path().join("alias.raw");
    symlink(&disk, &alias).unwrap();
    let with = |words: String| format!("vm run --kernel {} {words}", kernel.display());
    check("vm run --kernel /no/kernel", &["/no/kernel", "a kernel", "No such file"]);
    check("vm run --kernel /", &["not a regular file"]);
    check(&with("--initrd /no/initrd".into()), &["/no/initrd", "an initrd"]);
    check(&with("--disk /no/disk".into()), &["/no/disk", "a disk"]);
    check(&with(format!("--disk {}", odd.display())), &["odd.raw", "multiple of 512"]);
    check(&with(format!("--disk {}", empty.display())), &["empty.raw", "empty"]);
    let twice = format!("--disk {} --disk {}", disk.display(), alias.display());
    check(&with(twice), &["alias.raw", "twice"]);
    check(&with("--net tap=nosuch0".into()), &["nosuch0", "ip tuntap"]);
    check(&with("--memory 900T".into()), &["900T", "this host has"]);
    check(&with("--memory 4K".into()), &["4K", "the least is 4M"]);
    check("vm run ../../etc", &["../../etc", "no image name"]);
}

#[test]
fn disks_without_a_machine() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let at = |name: &str| root.join(name).display().to_string();
    let run = |line: String, status: i32| {
        let assert = berth(root).args(line.split_whitespace()).assert().code(status);
        let output = assert.get_output();
        assert!(output.stderr.is_empty(), "{line}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout.clone()).unwrap()
    };
    let (raw, top) = (at("base.raw"), at("top.qcow2"));
    assert_eq!(run(format!("disk create {raw} 3M"), 0), "");
    fs::write(&raw, vec![7; 3 << 20]).unwrap();
    run(format!("disk create --backing {raw} {top}"), 0);
    let text = run(format!("disk info {top}"), 0);
    assert!(text.contains("top.qcow2: qcow2, 3M (3145728 bytes)"), "{text}");
    assert!(text.contains("based on ") && text.contains("base.raw: raw, 3M"), "{text}");
    run(format!("disk resize {top} 5M"), 0);
    run(format!("disk convert {top} {}", at("all.raw")), 0);
    let mut expected = vec![7; 3 << 20];
    expected.resize(5 << 20, 0);
    assert!(fs::read(at("all.raw")).unwrap() == expected);
    assert!(run(format!("disk check {top}"), 0).ends_with("top.qcow2: sound\n"));
    let check = |line: String, parts: &[&str]| check_fails(root, &line, 1, parts);
    check(format!("disk create {top} 1M"), &["top.qcow2", "exists already"]);
    check(format!("disk create {} 1000", at("odd.raw")), &["odd.raw", "multiple of 512"]);
    check(format!("disk create --backing {} {}", at("no"), at("x.qcow2")), &["no", "No such"]);
    check(format!("disk create --backing {raw} {}", at("x.raw")), &["x.raw", "no backing file"]);
    check(format!("disk resize {top} 1M"), &["top.qcow2", "--shrink"]);
    check(format!("disk info {}", at("none.qcow2")), &["none.qcow2", "No such"]);
    check(format!("disk info --format qcow2 {raw}"), &["base.raw", "does not begin as one"]);
    check(format!("disk check {raw}"), &["base.raw", "raw"]);
    check(format!("disk convert {top} {raw}"), &["base.raw", "exists already"]);
    // The count of the header's cluster, in the first block of counts.
    let mut damaged = fs::read(&top).unwrap();
    damaged[2 * 65536 + 1] = 0;
    fs::write(&top, damaged).unwrap();
    let text = run(format!("disk check --json {top}"), 1);
    let found: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!((&found["sound"], &found["corruptions"]), (&false.into(), &1.into()));
    // Nothing was left of what failed.
    let mut names: Vec<_> = fs::read_dir(root).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["all.raw", "base.raw", "top.qcow2"]);
}

#[test]
fn doctor_prints_json_that_programs_can_read() {
    let directory = tempfile::tempdir().unwrap();
    let output = berth(directory.path()).args(["doctor", "--json"]).output().unwrap();
    let findings: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let about: Vec<_> =
        findings.as_array().unwrap().iter().map(|f| f["about"].as_str().unwrap()).collect();
    assert!(about.contains(&"kvm") && about.contains(&"processor"), "{about:?}");
}
