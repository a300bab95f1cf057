//! What the host asks of the guest on the kernel command line, as words `berth.KEY=VALUE`.

use std::{fs, io};

use berth_api::agent::limits::AGENT_PORT;
use berth_api::agent::message::TerminalSize;

use crate::environment;

/// The parsed words; all others belong to the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CommandLine {
    /// `berth.root=/dev/vda`: the device of the root file system; the initramfs when absent.
    pub root: Option<String>,
    /// `berth.rw=1`: the root file system is mounted for writing.
    pub writable: bool,
    /// `berth.hostname=`.
    pub hostname: Option<String>,
    /// `berth.shell=1`: a login shell on the console, and power off when it ends; `always`: another
    /// one then.
    pub shell: Shell,
    /// `berth.init=/sbin/init`: the image's own init becomes process 1, and has the console.
    pub init: Option<String>,
    /// `berth.agent=vsock:PORT`.
    pub port: u32,
    /// `berth.term=xterm`: the kind of terminal behind the console.
    pub term: Option<String>,
    /// `berth.size=ROWSxCOLS`: its size.
    pub size: Option<TerminalSize>,
    /// `berth.env=NAME=VALUE`, any number of them: variables of everything that is started.
    pub env: Vec<(String, String)>,
    /// `berth.share=TAG=PATH` or `berth.share=TAG,ro=PATH`, any number of them: folders of the host.
    pub shares: Vec<Share>,
}

/// A folder of the host that is to be mounted before anything is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Share {
    /// Its virtio-fs tag.
    pub tag: String,
    /// Where; an absolute path.
    pub path: String,
    /// Not for writing, which the host refuses anyway.
    pub read_only: bool,
}

impl Share {
    fn parse(value: &str) -> Option<Self> {
        let (tag, path) = value.split_once('=')?;
        let (tag, read_only) = match tag.strip_suffix(",ro") {
            Some(tag) => (tag, true),
            None => (tag, false),
        };
        let path = environment::decode(path)?;
        let good = !tag.is_empty() && path.starts_with('/') && !path.contains('\0');
        good.then(|| Self { tag: tag.to_owned(), path, read_only })
    }
}

/// What is on the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shell {
    /// No shell.
    None,
    /// One, and power off when it ends.
    Once,
    /// One after the other.
    Always,
}

impl CommandLine {
    /// Reads `/proc/cmdline`.
    pub fn read() -> Result<Self, CommandLineError> {
        let text = fs::read("/proc/cmdline").map_err(CommandLineError::Read)?;
        Self::parse(&String::from_utf8_lossy(&text))
    }

    fn parse(text: &str) -> Result<Self, CommandLineError> {
        let mut line = Self {
            root: None,
            writable: false,
            hostname: None,
            shell: Shell::None,
            init: None,
            port: AGENT_PORT,
            term: None,
            size: None,
            env: Vec::new(),
            shares: Vec::new(),
        };
        for word in text.split_ascii_whitespace() {
            let Some((key, value)) = word.strip_prefix("berth.").and_then(|w| w.split_once('='))
            else {
                continue;
            };
            let wrong = || CommandLineError::Word(word.to_owned());
            match key {
                "root" => line.root = Some(value.to_owned()),
                "rw" => line.writable = flag(value).ok_or_else(wrong)?,
                "hostname" => line.hostname = Some(value.to_owned()),
                "shell" => {
                    line.shell = match value {
                        "0" => Shell::None,
                        "1" => Shell::Once,
                        "always" => Shell::Always,
                        _ => return Err(wrong()),
                    }
                }
                "init" => line.init = Some(value.to_owned()),
                "term" => line.term = Some(value.to_owned()),
                "agent" => {
                    let port = value.strip_prefix("vsock:").and_then(|port| port.parse().ok());
                    line.port = port.ok_or_else(wrong)?;
                }
                "size" => {
                    let size = value.split_once('x').and_then(|(rows, cols)| {
                        Some(TerminalSize { rows: rows.parse().ok()?, cols: cols.parse().ok()? })
                    });
                    line.size = Some(size.ok_or_else(wrong)?);
                }
                "env" => line.env.push(environment::parse(value).ok_or_else(wrong)?),
                "share" => line.shares.push(Share::parse(value).ok_or_else(wrong)?),
                _ => return Err(wrong()),
            }
        }
        Ok(line)
    }
}

fn flag(value: &str) -> Option<bool> {
    match value {
        "0" => Some(false),
        "1" => Some(true),
        _ => None,
    }
}

/// Why the command line gives no orders.
#[derive(Debug, thiserror::Error)]
pub enum CommandLineError {
    /// It cannot be read.
    #[error("reading /proc/cmdline failed")]
    Read(#[source] io::Error),
    /// A word of ours that this agent does not know.
    #[error("the kernel command line has `{0}`, which this agent does not understand")]
    Word(String),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_among_the_kernels_own() {
        let line = CommandLine::parse(
            "console=ttyS0 quiet berth.root=/dev/vda berth.rw=1 berth.shell=1 root=/dev/sda \
             berth.hostname=box berth.size=50x120 berth.agent=vsock:7 berth.env=A=b%20c \
             berth.share=share0,ro=/a%20b berth.share=share1=/c\n",
        )
        .unwrap();
        assert_eq!(line.root.as_deref(), Some("/dev/vda"));
        assert!(line.writable);
        assert_eq!(line.shell, Shell::Once);
        assert_eq!(line.hostname.as_deref(), Some("box"));
        assert_eq!(line.size, Some(TerminalSize { rows: 50, cols: 120 }));
        assert_eq!(line.port, 7);
        assert_eq!(line.env, [("A".to_owned(), "b c".to_owned())]);
        assert_eq!(line.init, None);
        let share = |tag: &str, path: &str, read_only| Share {
            tag: tag.to_owned(),
            path: path.to_owned(),
            read_only,
        };
        assert_eq!(line.shares, [share("share0", "/a b", true), share("share1", "/c", false)]);
    }

    #[test]
    fn a_word_that_is_not_understood_is_named() {
        for word in [
            "berth.rw=yes",
            "berth.sparkle=1",
            "berth.shell=yes",
            "berth.agent=tcp:1",
            "berth.size=80",
            "berth.env=A",
            "berth.share=share0",
            "berth.share=share0=relative",
            "berth.share==/a",
        ] {
            let error = CommandLine::parse(&format!("quiet {word} x")).unwrap_err();
            assert!(error.to_string().contains(word), "{error}");
        }
    }
}
