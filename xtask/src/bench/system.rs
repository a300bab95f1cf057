//! The three places a benchmark runs in, and how each is started: the guests with the same kernel,
//! initramfs, disk, memory, processors and command line.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Result;

use crate::bench::Options;
use crate::bench::files::{self, Files};

/// Where the disk with programs is mounted, on the host and in guests.
const MOUNT_POINT: &str = "/mnt";

/// Where something is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum System {
    /// The host's processor.
    Native,
    /// Our translator.
    Berth,
    /// QEMU's.
    Qemu,
}

impl System {
    /// As it is written in reports.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Native => "native",
            Self::Berth => "berth",
            Self::Qemu => "qemu",
        }
    }
}

/// What is run, in each system.
pub struct Setup {
    /// The systems, in turn.
    pub systems: Vec<System>,
    berth: PathBuf,
    /// The static benchmark program.
    pub program: PathBuf,
    /// What its guests are started with.
    pub files: Files,
    /// Arguments of the benchmark program.
    pub arguments: Vec<String>,
}

impl Setup {
    /// For the micro-benchmarks.
    pub fn micro(berth: &Path, options: &Options) -> Result<Self> {
        let program = files::benchmark_program()?;
        let files = files::for_micro(&program)?;
        Ok(Self::new(berth, options, program, files))
    }

    /// For the programs of Debian.
    pub fn programs(berth: &Path, options: &Options) -> Result<Self> {
        let program = files::benchmark_program()?;
        let files = files::for_programs(&program, berth)?;
        let mut setup = Self::new(berth, options, program, files);
        setup.arguments.extend(["--programs".into(), MOUNT_POINT.into()]);
        Ok(setup)
    }

    fn new(berth: &Path, options: &Options, program: PathBuf, files: Files) -> Self {
        let mut arguments = vec!["--repetitions".into(), options.repetitions.to_string()];
        if !options.only.is_empty() {
            arguments.extend(["--only".into(), options.only.join(",")]);
        }
        if let Some(group) = &options.group {
            arguments.extend(["--group".into(), group.clone()]);
        }
        let qemu = (!options.no_qemu).then_some(System::Qemu);
        let systems = [System::Native, System::Berth].into_iter().chain(qemu).collect();
        Self { systems, berth: berth.to_owned(), program, files, arguments }
    }

    /// The command that runs the benchmarks for so many processors in that system.
    pub fn command(&self, system: System, cpus: usize) -> Command {
        let mut arguments = self.arguments.clone();
        arguments.extend(["--cpus".into(), cpus.to_string()]);
        let words = format!("console=ttyS0 quiet panic=-1 -- {}", arguments.join(" "));
        match system {
            System::Native => native(&self.program, &self.files, &arguments),
            System::Berth => berth(&self.berth, &self.files, cpus, &words),
            System::Qemu => qemu(&self.files, cpus, &words),
        }
    }
}

/// The benchmark program on the host, for programs on the guests' disk, in mounts of its own.
fn native(program: &Path, files: &Files, arguments: &[String]) -> Command {
    let Some(disk) = &files.disk else {
        let mut command = Command::new(program);
        command.args(arguments);
        return command;
    };
    let script = format!("mount -o loop,ro,noload \"$0\" {MOUNT_POINT} && exec \"$@\"");
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]).arg(disk).arg(program).args(arguments);
    command
}

/// A machine of ours.
pub fn berth(program: &Path, files: &Files, cpus: usize, words: &str) -> Command {
    let mut command = Command::new(program);
    command.args(["vm", "run", "--net", "none", "--accel", "translate"]);
    command.args(["--cpus", &cpus.to_string()]);
    command.args(["--memory", &format!("{}M", files.memory_mib), "--append", words]);
    command.arg("--kernel").arg(&files.kernel).arg("--initrd").arg(&files.initrd);
    if let Some(disk) = &files.disk {
        command.arg("--disk").arg(format!("{},ro", disk.display()));
    }
    command
}

/// A machine of QEMU's with its own translator, one thread for each processor.
pub fn qemu(files: &Files, cpus: usize, words: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-accel", "tcg,thread=multi", "-cpu", "max", "-nodefaults", "-no-reboot"]);
    command.args(["-display", "none", "-serial", "stdio"]);
    command.args(["-smp", &cpus.to_string(), "-m", &files.memory_mib.to_string()]);
    command.args(["-append", words]);
    command.arg("-kernel").arg(&files.kernel).arg("-initrd").arg(&files.initrd);
    if let Some(disk) = &files.disk {
        // Machines of ours that have it hold a lock on all of it.
        let options = "format=raw,if=virtio,readonly=on,file.locking=off";
        let drive = format!("file={},{options}", disk.display());
        command.args(["-drive", &drive]);
    }
    command
}
