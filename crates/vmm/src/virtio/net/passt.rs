//! passt: a process that turns the guest's frames into ordinary sockets of the host, without any
//! privilege.
//!
//! The guest gets the host's address by DHCP; what it sends to the gateway's address reaches the
//! host's loopback. passt gets its socket as standard input and ends when that is closed, so it
//! cannot outlive the VM however that ends.

use std::io::{BufRead, BufReader, Read};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::time::{Duration, Instant};

use thiserror::Error;

use crate::virtio::net::forward::{self, Forward, ForwardError};
use crate::virtio::net::stream::Stream;

/// passt's own default, the largest that fits its frames.
const MTU: u16 = 65_520;
/// How long passt may take to end by itself.
const END_TIMEOUT: Duration = Duration::from_millis(500);
const LOG_LINE_MAX: u64 = 1024;

/// Why there is no user-mode network.
#[derive(Debug, Error)]
pub enum PasstError {
    /// No sockets left.
    #[error("cannot create the sockets for passt")]
    Socket(#[source] std::io::Error),
    /// It cannot be started; most often it is not installed.
    #[error("cannot start {program} for the network (Debian package passt)")]
    Start {
        /// What was to be run.
        program: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// A port of the host cannot lead to the guest.
    #[error(transparent)]
    Forward(#[from] ForwardError),
}

/// A passt that ends earlier than this could not begin.
const BEGIN_TIMEOUT: Duration = Duration::from_secs(1);
/// What passt says when all is well.
const AS_ROOT: &str = "Don't run as root";

/// How passt is to be run.
#[derive(Clone, Debug)]
pub struct PasstConfig {
    /// The program.
    pub program: PathBuf,
    /// Ports of the host that lead to the guest.
    pub ports: Vec<Forward>,
}

impl Default for PasstConfig {
    fn default() -> Self {
        Self { program: PathBuf::from("passt"), ports: Vec::new() }
    }
}

/// The running process. Dropping it after its socket waits for its end.
#[derive(Debug)]
pub struct Passt {
    child: Child,
}

impl Passt {
    /// Starts passt; the backend for the network card, with which it ends.
    ///
    /// # Errors
    /// It cannot be started. What it finds wrong later it says on standard error, which goes to the
    /// log, and the guest's link goes down.
    pub fn start(config: &PasstConfig) -> Result<Stream, PasstError> {
        Self::begin(config).map(Begun::connect)
    }

    /// The same, in two steps: the first makes no thread.
    ///
    /// # Errors
    /// As [`Passt::start`].
    pub fn begin(config: &PasstConfig) -> Result<Begun, PasstError> {
        let (near, far) = UnixStream::pair().map_err(PasstError::Socket)?;
        let stream = Stream::new(near, Some(MTU)).map_err(PasstError::Socket)?;
        let mut command = Command::new(&config.program);
        command.args(["--foreground", "--quiet", "--fd", "0"]);
        command.arg("--mtu").arg(MTU.to_string());
        for forward in &config.ports {
            forward.await_free()?;
            command.args(forward.option());
        }
        command.stdin(OwnedFd::from(far)).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .map_err(|source| PasstError::Start { program: config.program.clone(), source })?;
        let mut said = child.stderr.take();
        forward::await_all(&config.ports, &mut child, &mut said)?;
        Ok(Begun { stream: stream.with_process(Self { child }), said })
    }
}

/// A passt whose messages nobody reads yet.
pub struct Begun {
    stream: Stream,
    said: Option<ChildStderr>,
}

impl Begun {
    /// The backend for the network card.
    #[must_use]
    pub fn connect(self) -> Stream {
        if let Some(stderr) = self.said {
            // Without this thread passt could block on a full pipe. It ends with passt.
            let logging = std::thread::Builder::new().name("passt-log".to_owned());
            let spawned = logging.spawn(move || log_lines(stderr));
            if let Err(error) = spawned {
                tracing::warn!(%error, "passt's messages are not logged");
            }
        }
        self.stream
    }
}

/// What is to be said of a passt that ended after such a time, its last words being these: one that
/// ends at once could not begin, for the others their guest has ended.
fn failure(lived: Duration, last: &str) -> Option<String> {
    let failed = lived < BEGIN_TIMEOUT && !last.is_empty() && !last.starts_with(AS_ROOT);
    failed.then(|| {
        format!("the guest has no network: passt ended at once ({last}); `--net none` needs none")
    })
}

fn log_lines(stderr: impl Read) {
    let began = Instant::now();
    let mut last = String::new();
    let mut reader = BufReader::new(stderr);
    let mut line = Vec::new();
    loop {
        line.clear();
        match reader.by_ref().take(LOG_LINE_MAX).read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => {
                if let Some(message) = failure(began.elapsed(), &last) {
                    tracing::warn!("{message}");
                }
                return;
            }
            Ok(_) => {
                let text = String::from_utf8_lossy(&line);
                // Hosts without a syslog daemon make it complain about each message.
                if !text.contains("to syslog") && !text.trim().is_empty() {
                    tracing::info!(message = text.trim_end(), "passt");
                    text.trim().clone_into(&mut last);
                }
            }
        }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        let end = Instant::now() + END_TIMEOUT;
        while Instant::now() < end {
            match self.child.try_wait() {
                Ok(None) => std::thread::sleep(Duration::from_millis(5)),
                Ok(Some(_)) | Err(_) => return,
            }
        }
        // One that may not be ended, since it is another user's by now, is not waited for.
        if self.child.kill().is_ok() {
            let _ = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{BEGIN_TIMEOUT, Duration, failure};

    #[test]
    fn a_passt_that_cannot_begin_is_told_from_one_that_is_done() {
        let said = failure(Duration::ZERO, "Couldn't create user namespace").unwrap();
        assert!(said.contains("no network") && said.contains("user namespace"), "{said}");
        assert_eq!(failure(BEGIN_TIMEOUT, "Couldn't create user namespace"), None);
        assert_eq!(failure(Duration::ZERO, "Don't run as root. Changing to nobody..."), None);
        assert_eq!(failure(Duration::ZERO, ""), None);
    }
}
