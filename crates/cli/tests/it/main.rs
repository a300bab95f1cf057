//! The `berth` program as scripts see it: status, standard output, standard error.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod appliances;
mod attached;
mod conformance;
mod consoles;
mod copy;
mod debian;
mod frozen;
mod groups;
mod guest;
mod kept;
mod kernels;
mod killed;
mod networks;
mod remote;
mod resize;
mod rubbish;
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
    check("vm run --net wifi debian", &["wifi", "berth vm create"]);
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
    check("vm run debian", &["debian", "berth image bootstrap debian bookworm"]);
    check("vm run other", &["other"]);
    check("vm run ../../etc", &["../../etc", "no image name"]);
    check("image rm debian", &["debian", "none"]);
    check("image bootstrap fedora 41", &["fedora", "debian"]);
    check("image bootstrap debian ../x", &["../x"]);
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
fn an_empty_store_lists_as_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("state");
    let output = berth(&root).args(["image", "ls", "--json"]).assert().success();
    let value: serde_json::Value = serde_json::from_slice(&output.get_output().stdout).unwrap();
    assert_eq!(value, serde_json::json!([]));
    let output = berth(&root).args(["image", "ls"]).assert().success();
    assert!(output.get_output().stdout.starts_with(b"IMAGE"));
    assert!(!root.exists(), "looking makes nothing");
}

/// A second bootstrap makes nothing: there is nothing here that it could be made with.
#[test]
fn an_image_is_listed_not_made_again_and_removed() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let image = root.join("images/debian@bookworm");
    fs::create_dir_all(image.join("kernel/modules")).unwrap();
    fs::write(image.join("kernel/vmlinuz"), "kernel").unwrap();
    fs::write(image.join("root.ext4"), "disk").unwrap();
    let info = serde_json::json!({
        "format": 1,
        "name": "debian:bookworm",
        "kernel_version": "6.1.0-test",
        "created_unix_s": 1,
        "disk_bytes": 4096,
        "sources": [],
    });
    fs::write(image.join("image.json"), info.to_string()).unwrap();
    let text = |output: &[u8]| String::from_utf8_lossy(output).into_owned();
    let listed = || {
        let output = berth(root).args(["image", "ls"]).assert().success();
        text(&output.get_output().stdout)
    };
    assert!(listed().contains("debian:bookworm") && listed().contains("6.1.0-test"));
    let again = berth(root)
        .env("PATH", "/nonexistent")
        .args(["image", "bootstrap", "debian", "bookworm"])
        .assert()
        .success();
    let said = text(&again.get_output().stderr);
    assert!(said.contains("is there already") && said.contains("--again"), "{said}");
    assert_eq!(fs::read(image.join("root.ext4")).unwrap(), b"disk");
    berth(root).args(["image", "rm", "debian"]).assert().success();
    assert!(!listed().contains("debian") && !image.exists());
    let gone = berth(root).args(["image", "rm", "debian"]).assert().failure();
    assert!(text(&gone.get_output().stderr).contains("debian"));
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

#[test]
fn an_agent_that_cannot_run_in_the_guest_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path();
    let image = root.join("images/debian@bookworm");
    fs::create_dir_all(image.join("kernel/modules")).unwrap();
    fs::write(image.join("root.ext4"), [0; 512]).unwrap();
    fs::write(image.join("kernel/vmlinuz"), "k").unwrap();
    let info = r#"{"format":1,"name":"debian:bookworm","kernel_version":"6","created_unix_s":1,
                   "disk_bytes":512,"sources":[]}"#;
    fs::write(image.join("image.json"), info).unwrap();
    let run = |agent: &str| {
        let output = berth(root).env("BERTH_AGENT", agent).args(["vm", "run", "debian"]).output();
        String::from_utf8(output.unwrap().stderr).unwrap()
    };
    assert!(run("/bin/sh").contains("shared libraries"));
    assert!(run("/no/agent").contains("/no/agent"));
}
