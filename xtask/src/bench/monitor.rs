//! QEMU's monitor, by its machine protocol (QMP).

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

/// How long QEMU may take to listen, and for an answer.
const PATIENCE: Duration = Duration::from_secs(120);

/// A connection to it.
pub struct Monitor {
    from: BufReader<UnixStream>,
    to: UnixStream,
}

impl Monitor {
    /// Connects to a QEMU that has just been started.
    pub fn connect(path: &Path) -> Result<Self> {
        let began = Instant::now();
        let to = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) if began.elapsed() > PATIENCE => {
                    return Err(error).context("QEMU's monitor");
                }
                Err(_) => std::thread::sleep(Duration::from_micros(500)),
            }
        };
        to.set_read_timeout(Some(PATIENCE))?;
        let mut monitor = Self { from: BufReader::new(to.try_clone()?), to };
        monitor.message()?;
        monitor.ask(&json!({ "execute": "qmp_capabilities" }))?;
        Ok(monitor)
    }

    fn message(&mut self) -> Result<Value> {
        let mut line = String::new();
        if self.from.read_line(&mut line)? == 0 {
            bail!("QEMU closed its monitor");
        }
        Ok(serde_json::from_str(&line)?)
    }

    /// Asks, and gives what is returned.
    pub fn ask(&mut self, request: &Value) -> Result<Value> {
        writeln!(self.to, "{request}")?;
        loop {
            let answer = self.message()?;
            if let Some(value) = answer.get("return") {
                return Ok(value.clone());
            }
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {request}: {error}");
            }
        }
    }

    /// A command for people; an answer is a complaint.
    pub fn command(&mut self, line: &str) -> Result<()> {
        let said = self.ask(&json!({
            "execute": "human-monitor-command",
            "arguments": { "command-line": line },
        }))?;
        match said.as_str().map(str::trim) {
            None | Some("") => Ok(()),
            Some(complaint) => bail!("QEMU on {line}: {complaint}"),
        }
    }

    /// Moves its guest, which stands still, to a place; returns when all of it is there.
    pub fn migrate(&mut self, to: &str) -> Result<()> {
        let began = Instant::now();
        self.ask(&json!({ "execute": "migrate", "arguments": { "uri": to } }))?;
        loop {
            let status = self.ask(&json!({ "execute": "query-migrate" }))?["status"].clone();
            match status.as_str() {
                Some("completed") => return Ok(()),
                Some("failed" | "cancelled") => bail!("QEMU's migration {status}"),
                _ if began.elapsed() > PATIENCE => bail!("QEMU's migration does not end"),
                _ => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    /// Waits until its guest runs.
    pub fn wait_running(&mut self) -> Result<()> {
        let began = Instant::now();
        while self.ask(&json!({ "execute": "query-status" }))?["status"] != "running" {
            if began.elapsed() > PATIENCE {
                bail!("QEMU's guest does not run");
            }
        }
        Ok(())
    }
}
