//! The daemon's HTTP interface, seen from a command. A daemon that is not there is started.

use std::fs::File;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use berth_api::v1::error::{ApiError, ErrorBody};
use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// How long a daemon may take until it answers.
const START_TIME: Duration = Duration::from_secs(15);
const START_POLL: Duration = Duration::from_millis(5);
/// Variables of the environment that a daemon gets.
const KEPT: [&str; 7] = ["PATH", "HOME", "USER", "LANG", "TMPDIR", "TZ", "RUST_BACKTRACE"];
/// Bytes an answer may have that is read as a whole.
const ANSWER_MAX: usize = 64 << 20;

/// Why the daemon could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The daemon refused.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// It cannot be reached.
    #[error("no daemon answers at {}", socket.display())]
    Absent {
        /// Where.
        socket: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// It cannot be started.
    #[error("the daemon could not be started; see {}", log.display())]
    NotStarted {
        /// What it said.
        log: PathBuf,
        /// The system's reason, if there is one.
        source: io::Error,
    },
    /// The address is of a kind that is not known.
    #[error("`{0}` is no address of a daemon; `unix://PATH` is one")]
    Address(String),
    /// The connection broke.
    #[error("the connection to the daemon broke")]
    Broken(#[from] hyper::Error),
    /// The answer is not understood.
    #[error("the daemon's answer is not understood")]
    Strange(#[source] serde_json::Error),
    /// It is not what was asked for.
    #[error("the daemon answered {0}")]
    Status(StatusCode),
    /// The system.
    #[error("{0} failed")]
    System(&'static str, #[source] io::Error),
}

/// Where the daemon of a state directory listens, and whether it may be started there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// The socket.
    pub socket: PathBuf,
    /// It is the one of the state directory.
    pub is_own: bool,
}

impl Address {
    /// As `--host` says, else in a state directory that was given, else where it always is.
    ///
    /// # Errors
    /// [`ClientError::Address`].
    pub fn choose(
        host: Option<&str>,
        given_root: Option<&Path>,
        root: &Path,
    ) -> Result<Self, ClientError> {
        if let Some(host) = host {
            let path = host.strip_prefix("unix://").filter(|path| path.starts_with('/'));
            let path = path.ok_or_else(|| ClientError::Address(host.to_owned()))?;
            return Ok(Self { socket: path.into(), is_own: false });
        }
        let socket = match given_root {
            Some(root) => root.join("berth.sock"),
            None if rustix::process::geteuid().is_root() => "/run/berth/berth.sock".into(),
            None => match std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from) {
                Some(directory) if directory.is_absolute() => directory.join("berth/berth.sock"),
                _ => root.join("berth.sock"),
            },
        };
        // Relative ones are somewhere else for a daemon.
        let socket = std::path::absolute(&socket).unwrap_or(socket);
        Ok(Self { socket, is_own: true })
    }
}

/// A way to the daemon. Each request has a connection of its own.
pub struct Client {
    socket: PathBuf,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// Makes sure that a daemon answers.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn new(address: &Address, root: &Path) -> Result<Self, ClientError> {
        if let Err(error) = UnixStream::connect(&address.socket) {
            let is_absent =
                matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
            if !is_absent || !address.is_own {
                return Err(ClientError::Absent { socket: address.socket.clone(), source: error });
            }
            start_daemon(&address.socket, root)?;
        }
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_io().enable_time().build();
        let runtime = runtime.map_err(|error| ClientError::System("starting to wait", error))?;
        Ok(Self { socket: address.socket.clone(), runtime })
    }

    /// Asks; the answer is JSON, `()` for none.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn call<T: DeserializeOwned>(
        &self,
        method: &Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, ClientError> {
        let body = body.map(serde_json::to_vec).transpose().map_err(ClientError::Strange)?;
        let bytes = self.runtime.block_on(async {
            let response = self.send(method, path, body, None).await?;
            read(response).await
        })?;
        // Nothing is `null`.
        let bytes = if bytes.is_empty() { b"null".as_slice() } else { &bytes };
        serde_json::from_slice(bytes).map_err(ClientError::Strange)
    }

    /// Asks for something and gives what comes of it to `each` as it comes.
    ///
    /// # Errors
    /// [`ClientError`]; or what `each` says.
    pub fn stream<E: From<ClientError>>(
        &self,
        path: &str,
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        self.runtime.block_on(async {
            let mut response = self.send(&Method::GET, path, None, None).await?;
            while let Some(frame) = response.frame().await {
                if let Ok(data) = frame.map_err(ClientError::from)?.into_data() {
                    each(&data)?;
                }
            }
            Ok(())
        })
    }

    /// Asks for a connection that speaks another protocol from then on; with what came already.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn upgrade(
        &self,
        path: &str,
        protocol: &str,
    ) -> Result<(UnixStream, Vec<u8>), ClientError> {
        self.runtime.block_on(async {
            let response = self.send(&Method::GET, path, None, Some(protocol)).await?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                return Err(ClientError::Status(response.status()));
            }
            let upgraded = hyper::upgrade::on(response).await?;
            let parts = upgraded.downcast::<TokioIo<tokio::net::UnixStream>>();
            let system = |error| ClientError::System("taking over the connection", error);
            let parts = parts.map_err(|_| system(io::ErrorKind::Unsupported.into()))?;
            let stream = parts.io.into_inner().into_std().map_err(system)?;
            stream.set_nonblocking(false).map_err(system)?;
            Ok((stream, parts.read_buf.to_vec()))
        })
    }

    async fn send(
        &self,
        method: &Method,
        path: &str,
        body: Option<Vec<u8>>,
        protocol: Option<&str>,
    ) -> Result<Response<Incoming>, ClientError> {
        let absent = |source| ClientError::Absent { socket: self.socket.clone(), source };
        let stream = tokio::net::UnixStream::connect(&self.socket).await.map_err(absent)?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        // Its errors are those of the request.
        self.runtime.spawn(connection.with_upgrades());
        let mut request = Request::builder().method(method).uri(path).header(HOST, "berth");
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some(protocol) = protocol {
            request = request.header(CONNECTION, "upgrade").header(UPGRADE, protocol);
        }
        let body = Full::new(Bytes::from(body.unwrap_or_default()));
        let request = request.body(body);
        let request = request
            .map_err(|error| ClientError::System("making the request", io::Error::other(error)))?;
        let response = sender.send_request(request).await?;
        if response.status().is_client_error() || response.status().is_server_error() {
            let status = response.status();
            let body: Result<ErrorBody, _> = serde_json::from_slice(&read(response).await?);
            return Err(body.map_or(ClientError::Status(status), |body| body.error.into()));
        }
        Ok(response)
    }
}

async fn read(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let limited = http_body_util::Limited::new(response.into_body(), ANSWER_MAX);
    let collected = limited.collect().await.map_err(|error| {
        ClientError::System("reading the daemon's answer", io::Error::other(error))
    })?;
    Ok(collected.to_bytes())
}

/// Starts a daemon that goes on after this program, and waits until it answers.
fn start_daemon(socket: &Path, root: &Path) -> Result<(), ClientError> {
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    let log = root.join("daemon.log");
    let failed = |source| ClientError::NotStarted { log: log.clone(), source };
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(&root).map_err(failed)?;
    let stderr = File::options().create(true).append(true).open(&log).map_err(failed)?;
    // It goes on after whoever started it, and so do his secrets otherwise.
    let kept = std::env::vars_os().filter(|(name, _)| {
        let name = name.to_string_lossy();
        KEPT.contains(&&*name) || ["BERTH_", "XDG_", "LC_"].iter().any(|p| name.starts_with(p))
    });
    let mut child = Command::new(std::env::current_exe().map_err(failed)?)
        .env_clear()
        .envs(kept)
        .arg("--root")
        .arg(&root)
        .args(["daemon", "--detached", "--socket"])
        .arg(socket)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(stderr)
        .spawn()
        .map_err(failed)?;
    let began = Instant::now();
    let mut ended = None;
    loop {
        match UnixStream::connect(socket) {
            Ok(_) => return Ok(()),
            Err(error) if began.elapsed() > START_TIME => return Err(failed(error)),
            Err(_) => {}
        }
        // Another program may have started one at the same time; then ours ends, and it answers soon.
        match (&ended, child.try_wait().map_err(failed)?) {
            (Some(when), _) if Instant::now() > *when => {
                return Err(failed(io::Error::other("it ended at once")));
            }
            (None, Some(_)) => ended = Some(Instant::now() + Duration::from_secs(2)),
            _ => {}
        }
        std::thread::sleep(START_POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_is_where_it_was_said_to_be() {
        let root = Path::new("/r");
        let chosen = |host, given| Address::choose(host, given, root).map(|a| a.socket);
        assert_eq!(chosen(Some("unix:///a/b"), Some(root)).unwrap(), Path::new("/a/b"));
        assert_eq!(chosen(None, Some(root)).unwrap(), Path::new("/r/berth.sock"));
        assert!(chosen(Some("tcp://a:1"), None).is_err());
        assert!(chosen(Some("unix://a"), None).is_err());
    }
}
