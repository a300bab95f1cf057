//! The daemon's HTTP interface, seen from a command: on a unix socket, or on TCP with TLS and
//! certificates on both sides. A daemon of this host that is not there is started.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use berth_api::v1::error::{ApiError, ErrorBody};
use berth_api::v1::routes::nothing_at;
use berth_daemon::relay;
use berth_daemon::server::LOCK;
use berth_daemon::tls::{TlsError, TlsFiles};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::{Body, Bytes, Incoming};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, UPGRADE};
use hyper::http::request::Builder;
use hyper::http::uri::Authority;
use hyper::upgrade::Upgraded;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{self, ClientConfig};

/// What the daemon says, in the state directory.
pub const DAEMON_LOG: &str = "daemon.log";
/// How long a daemon may take until it answers.
const START_TIME: Duration = Duration::from_secs(15);
/// Bytes of a socket's path.
const SOCKET_MAX: u64 = 4096;
const START_POLL: Duration = Duration::from_millis(5);
/// Variables of the environment that a daemon gets; the last ones are for making images.
const KEPT: [&str; 9] = [
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "TMPDIR",
    "TZ",
    "RUST_BACKTRACE",
    "APT_CONFIG",
    "SOURCE_DATE_EPOCH",
];
/// Beginnings of the names of others.
const KEPT_BEGIN: [&str; 3] = ["BERTH_", "XDG_", "LC_"];
/// Ends of the names of others, in any case: `http_proxy`, `NO_PROXY`.
const KEPT_END: &str = "_proxy";
/// How long a daemon elsewhere may take until the connection is there.
const CONNECT_TIME: Duration = Duration::from_secs(20);
/// Bytes an answer may have that is read as a whole.
const ANSWER_MAX: usize = 64 << 20;

/// Why the daemon could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The daemon refused.
    #[error(transparent)]
    Api(#[from] ApiError),
    /// It cannot be reached.
    #[error("no daemon answers at {address}")]
    Absent {
        /// Where.
        address: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The certificates cannot be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Who answers is not the daemon that is meant, or speaks no TLS.
    #[error("there is no secure connection to the daemon at {address}")]
    Insecure {
        /// Where.
        address: String,
        /// What is wrong.
        source: io::Error,
    },
    /// It does not take our certificate.
    #[error(
        "the daemon at {address} does not accept this certificate; try a --tls-cert that was signed \
         by its --tls-ca"
    )]
    NotAccepted {
        /// Where.
        address: String,
        /// What it said.
        source: rustls::Error,
    },
    /// Not all of what TCP needs was given.
    #[error(
        "a daemon at {address} needs --tls-ca, --tls-cert and --tls-key, or BERTH_TLS_CA, \
         BERTH_TLS_CERT and BERTH_TLS_KEY; {missing} is missing"
    )]
    NoCertificate {
        /// Where.
        address: String,
        /// What.
        missing: &'static str,
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
    #[error("`{0}` is no address of a daemon; `unix:///PATH` and `tcp://HOST:PORT` are some")]
    Address(String),
    /// The connection broke.
    #[error("the connection to the daemon broke")]
    Broken(#[from] hyper::Error),
    /// The answer ended before its end.
    #[error("the daemon ended before it was done; its `daemon.log` may say why")]
    Unfinished,
    /// The answer is not understood.
    #[error("the daemon's answer is not understood")]
    Strange(#[source] serde_json::Error),
    /// It is not what was asked for.
    #[error("the daemon answered {0}")]
    Status(StatusCode),
    /// It is another version's.
    #[error(
        "the daemon at {address} is of another version, which has nothing at {path}; end it (`pkill -f \
         'berth.* daemon'`, machines go on) and try again: then one of this version is started"
    )]
    Version {
        /// Where it listens.
        address: String,
        /// What it does not know.
        path: String,
    },
    /// The system.
    #[error("{0} failed")]
    System(&'static str, #[source] io::Error),
}

/// What goes to a daemon.
type Sent = UnsyncBoxBody<Bytes, io::Error>;

/// Where a daemon listens, and whether it may be started there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    /// Where.
    pub place: Place,
    /// It is the one of the state directory.
    pub is_own: bool,
}

/// Where a daemon listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// On this socket.
    Unix(PathBuf),
    /// On TCP, at a name or an address and a port.
    Tcp(Authority),
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "{}", path.display()),
            Self::Tcp(authority) => write!(f, "tcp://{authority}"),
        }
    }
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
            let place = parse_host(host).ok_or_else(|| ClientError::Address(host.to_owned()))?;
            return Ok(Self { place, is_own: false });
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
        Ok(Self { place: Place::Unix(socket), is_own: true })
    }
}

fn parse_host(host: &str) -> Option<Place> {
    if let Some(path) = host.strip_prefix("unix://") {
        return path.starts_with('/').then(|| Place::Unix(path.into()));
    }
    let authority: Authority = host.strip_prefix("tcp://")?.parse().ok()?;
    let is_plain = !authority.as_str().contains('@') && !authority.host().is_empty();
    (is_plain && authority.port_u16().is_some()).then_some(Place::Tcp(authority))
}

/// The files of `--tls-ca`, `--tls-cert` and `--tls-key`, as far as they were given.
#[derive(Clone, Debug, Default)]
pub struct TlsGiven {
    /// The certificates of authorities.
    pub ca: Option<PathBuf>,
    /// Our certificate.
    pub cert: Option<PathBuf>,
    /// Its key.
    pub key: Option<PathBuf>,
}

impl TlsGiven {
    /// All of them.
    ///
    /// # Errors
    /// The flag of the first that is missing.
    pub fn all(&self) -> Result<TlsFiles, &'static str> {
        Ok(TlsFiles {
            ca: self.ca.clone().ok_or("--tls-ca")?,
            cert: self.cert.clone().ok_or("--tls-cert")?,
            key: self.key.clone().ok_or("--tls-key")?,
        })
    }
}

/// A way to the daemon. Each request has a connection of its own.
pub struct Client {
    place: Place,
    /// With TCP.
    tls: Option<Arc<ClientConfig>>,
    runtime: Arc<tokio::runtime::Runtime>,
}

impl Client {
    /// Makes sure that a daemon of this host answers.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn new(address: &Address, root: &Path, tls: &TlsGiven) -> Result<Self, ClientError> {
        let mut place = address.place.clone();
        let tls = match &address.place {
            Place::Unix(socket) => {
                if let Err(error) = UnixStream::connect(socket) {
                    let is_absent = matches!(
                        error.kind(),
                        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                    );
                    if !is_absent || !address.is_own {
                        let address = place.to_string();
                        return Err(ClientError::Absent { address, source: error });
                    }
                    place = Place::Unix(match noted_socket(root) {
                        Some(other) => other,
                        None => start_daemon(socket, root)?,
                    });
                }
                None
            }
            Place::Tcp(_) => {
                let files = tls.all().map_err(|missing| ClientError::NoCertificate {
                    address: place.to_string(),
                    missing,
                })?;
                Some(files.client()?)
            }
        };
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_io().enable_time().build();
        let runtime = runtime.map_err(|error| ClientError::System("starting to wait", error))?;
        Ok(Self { place, tls, runtime: Arc::new(runtime) })
    }

    /// Whether the daemon may be on another host.
    #[must_use]
    pub fn is_remote(&self) -> bool {
        matches!(self.place, Place::Tcp(_))
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

    /// Asks for something and gives each line of JSON that comes of it to `each`.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn lines<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        mut each: impl FnMut(T),
    ) -> Result<(), ClientError> {
        let body = serde_json::to_vec(body).map_err(ClientError::Strange)?;
        self.runtime.block_on(async {
            let mut response = self.send(&Method::POST, path, Some(body), None).await?;
            let mut rest = Vec::new();
            while let Some(frame) = response.frame().await {
                let Ok(data) = frame?.into_data() else { continue };
                rest.extend_from_slice(&data);
                while let Some(end) = rest.iter().position(|byte| *byte == b'\n') {
                    let line: Vec<u8> = rest.drain(..=end).collect();
                    each(serde_json::from_slice(&line).map_err(ClientError::Strange)?);
                }
                if rest.len() > ANSWER_MAX {
                    return Err(ClientError::Unfinished);
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
        self.upgrade_by(&Method::GET, path, None::<&()>, protocol)
    }

    /// The same by a request that says more.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn upgrade_by(
        &self,
        method: &Method,
        path: &str,
        body: Option<&impl Serialize>,
        protocol: &str,
    ) -> Result<(UnixStream, Vec<u8>), ClientError> {
        let body = body.map(serde_json::to_vec).transpose().map_err(ClientError::Strange)?;
        self.runtime.block_on(async {
            let response = self.send(method, path, body, Some(protocol)).await?;
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                return Err(ClientError::Status(response.status()));
            }
            let upgraded = hyper::upgrade::on(response).await?;
            let system = |error| ClientError::System("taking over the connection", error);
            match upgraded.downcast::<TokioIo<tokio::net::UnixStream>>() {
                Ok(parts) => {
                    let stream = parts.io.into_inner().into_std().map_err(system)?;
                    stream.set_nonblocking(false).map_err(system)?;
                    Ok((stream, parts.read_buf.to_vec()))
                }
                Err(secured) => Ok((self.relay(secured).map_err(system)?, Vec::new())),
            }
        })
    }

    /// A stream that a thread connects to another one that only this runtime can read.
    fn relay(&self, upgraded: Upgraded) -> io::Result<UnixStream> {
        let (near, far) = UnixStream::pair()?;
        far.set_nonblocking(true)?;
        let runtime = Arc::clone(&self.runtime);
        let relay = move || {
            runtime.block_on(async {
                if let Ok(far) = tokio::net::UnixStream::from_std(far) {
                    relay::both(TokioIo::new(upgraded), far).await;
                }
            })
        };
        // How it ends is for the two ends to notice.
        thread::Builder::new().name("relay".into()).spawn(relay)?;
        Ok(near)
    }

    /// A connection for one request.
    async fn dial(&self) -> Result<SendRequest<Sent>, ClientError> {
        let absent = |source| ClientError::Absent { address: self.place.to_string(), source };
        // Errors of a connection are those of its request.
        match (&self.place, &self.tls) {
            (Place::Tcp(authority), Some(tls)) => {
                let stream = tokio::time::timeout(CONNECT_TIME, self.secured(authority, tls)).await;
                let stream = stream.map_err(|_| absent(io::ErrorKind::TimedOut.into()))??;
                let (sender, connection) = handshake(TokioIo::new(stream)).await?;
                self.runtime.spawn(connection.with_upgrades());
                Ok(sender)
            }
            (Place::Unix(socket), _) => {
                let stream = tokio::net::UnixStream::connect(socket).await.map_err(absent)?;
                let (sender, connection) = handshake(TokioIo::new(stream)).await?;
                self.runtime.spawn(connection.with_upgrades());
                Ok(sender)
            }
            (Place::Tcp(_), None) => Err(absent(io::ErrorKind::Unsupported.into())),
        }
    }

    async fn secured(
        &self,
        authority: &Authority,
        tls: &Arc<ClientConfig>,
    ) -> Result<TlsStream<tokio::net::TcpStream>, ClientError> {
        let absent = |source| ClientError::Absent { address: self.place.to_string(), source };
        let host = authority.host();
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| ClientError::Address(self.place.to_string()))?;
        let port = authority.port_u16().unwrap_or_default();
        let stream = tokio::net::TcpStream::connect((host, port)).await.map_err(absent)?;
        stream.set_nodelay(true).map_err(absent)?;
        let secured = TlsConnector::from(Arc::clone(tls)).connect(name, stream).await;
        secured.map_err(|source| self.of_tls(source))
    }

    fn of_tls(&self, source: io::Error) -> ClientError {
        let address = self.place.to_string();
        match alert(&source) {
            Some(source) => ClientError::NotAccepted { address, source },
            None => ClientError::Insecure { address, source },
        }
    }

    /// Sends a stream; the answer is JSON.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn upload<T: DeserializeOwned>(
        &self,
        path: &str,
        body: impl Body<Data = Bytes, Error = io::Error> + Send + 'static,
    ) -> Result<T, ClientError> {
        let bytes = self.runtime.block_on(async {
            let request = Request::builder().method(Method::POST).uri(path);
            let request = request.header(CONTENT_TYPE, "application/vnd.berth.appliance");
            read(self.send_request(request, body.boxed_unsync()).await?).await
        })?;
        serde_json::from_slice(&bytes).map_err(ClientError::Strange)
    }

    async fn send(
        &self,
        method: &Method,
        path: &str,
        body: Option<Vec<u8>>,
        protocol: Option<&str>,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut request = Request::builder().method(method).uri(path);
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        if let Some(protocol) = protocol {
            request = request.header(CONNECTION, "upgrade").header(UPGRADE, protocol);
        }
        let body = Full::new(Bytes::from(body.unwrap_or_default()));
        self.send_request(request, body.map_err(|never| match never {}).boxed_unsync()).await
    }

    async fn send_request(
        &self,
        request: Builder,
        body: Sent,
    ) -> Result<Response<Incoming>, ClientError> {
        let mut sender = self.dial().await?;
        let host = match &self.place {
            Place::Unix(_) => "berth",
            Place::Tcp(authority) => authority.as_str(),
        };
        let request = request.header(HOST, host).body(body);
        let request = request
            .map_err(|error| ClientError::System("making the request", io::Error::other(error)))?;
        let path = request.uri().path().to_owned();
        // A daemon says what it thinks of our certificate when the handshake is over for us.
        let response = sender.send_request(request).await.map_err(|error| match alert(&error) {
            Some(source) => ClientError::NotAccepted { address: self.place.to_string(), source },
            None => error.into(),
        })?;
        if response.status().is_client_error() || response.status().is_server_error() {
            let status = response.status();
            let body: Result<ErrorBody, _> = serde_json::from_slice(&read(response).await?);
            return Err(match body {
                // Every path that is asked for is one of this version's.
                Ok(ErrorBody { error }) if error.message == nothing_at(&path) => {
                    ClientError::Version { address: self.place.to_string(), path }
                }
                Ok(ErrorBody { error }) => error.into(),
                Err(_) => ClientError::Status(status),
            });
        }
        Ok(response)
    }
}

/// What the other side of TLS complained of, if that is why something failed.
fn alert(error: &(dyn std::error::Error + 'static)) -> Option<rustls::Error> {
    let mut error = Some(error);
    while let Some(this) = error {
        let inner = this.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
        let tls = inner.and_then(|inner| inner.downcast_ref()).or_else(|| this.downcast_ref());
        if let Some(alert @ rustls::Error::AlertReceived(_)) = tls {
            return Some(alert.clone());
        }
        error = this.source();
    }
    None
}

async fn read(response: Response<Incoming>) -> Result<Bytes, ClientError> {
    let limited = http_body_util::Limited::new(response.into_body(), ANSWER_MAX);
    let collected = limited.collect().await.map_err(|error| {
        ClientError::System("reading the daemon's answer", io::Error::other(error))
    })?;
    Ok(collected.to_bytes())
}

/// Where the daemon of a state directory listens that was told to listen elsewhere, if there is one.
fn noted_socket(root: &Path) -> Option<PathBuf> {
    let file = File::open(root.join(LOCK)).ok()?;
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        // Nobody keeps it; what is noted there is of one that has ended.
        return None;
    }
    let mut noted = Vec::new();
    file.take(SOCKET_MAX).read_to_end(&mut noted).ok()?;
    let socket = PathBuf::from(OsString::from_vec(noted));
    UnixStream::connect(&socket).is_ok().then_some(socket)
}

/// Starts a daemon that goes on after this program, and waits until it answers; where it listens.
fn start_daemon(socket: &Path, root: &Path) -> Result<PathBuf, ClientError> {
    let root = std::path::absolute(root).unwrap_or_else(|_| root.to_owned());
    let log = root.join(DAEMON_LOG);
    let failed = |source| ClientError::NotStarted { log: log.clone(), source };
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true).mode(0o700).create(&root).map_err(failed)?;
    let stderr = berth_daemon::log::for_process(&log).map_err(failed)?;
    // It goes on after whoever started it, and so do his secrets otherwise.
    let kept = std::env::vars_os().filter(|(name, _)| {
        let name = name.to_string_lossy();
        KEPT.contains(&&*name)
            || KEPT_BEGIN.iter().any(|begin| name.starts_with(begin))
            || name.to_ascii_lowercase().ends_with(KEPT_END)
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
            Ok(_) => return Ok(socket.to_owned()),
            Err(error) if began.elapsed() > START_TIME => return Err(failed(error)),
            Err(_) => {}
        }
        if ended.is_some()
            && let Some(other) = noted_socket(&root)
        {
            return Ok(other);
        }
        // Another program may have started one at the same time; then ours ends, and it answers soon.
        match (&ended, child.try_wait().map_err(failed)?) {
            (Some(when), _) if Instant::now() > *when => {
                return Err(failed(io::Error::other("it ended at once")));
            }
            (None, Some(_)) => ended = Some(Instant::now() + Duration::from_secs(2)),
            _ => {}
        }
        thread::sleep(START_POLL);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_daemon_of_another_version_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("berth.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut asked = [0; 4096];
                let count = stream.read(&mut asked).unwrap();
                let asked = String::from_utf8_lossy(&asked[..count]).into_owned();
                let Some(path) = asked.split(' ').nth(1) else { continue };
                let error = ApiError {
                    code: berth_api::v1::error::ErrorCode::NotFound,
                    message: nothing_at(path),
                };
                let body = serde_json::to_string(&ErrorBody { error }).unwrap();
                let head = "HTTP/1.1 404 Not Found\r\ncontent-type: application/json\r\n";
                let answer = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
                stream.write_all(answer.as_bytes()).unwrap();
            }
        });
        let address = Address { place: Place::Unix(socket), is_own: false };
        let client = Client::new(&address, dir.path(), &TlsGiven::default()).unwrap();
        let error = client.call::<()>(&Method::GET, "/berth/v1/new", None::<&()>).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("another version") && text.contains("/berth/v1/new"), "{text}");
    }

    #[test]
    fn the_socket_is_where_it_was_said_to_be() {
        let root = Path::new("/r");
        let chosen = |host, given| Address::choose(host, given, root).map(|a| a.place.to_string());
        assert_eq!(chosen(Some("unix:///a/b"), Some(root)).unwrap(), "/a/b");
        assert_eq!(chosen(None, Some(root)).unwrap(), "/r/berth.sock");
        for good in ["tcp://a:1", "tcp://[::1]:65535", "tcp://10.0.0.1:4343"] {
            assert_eq!(chosen(Some(good), None).unwrap(), good);
        }
        for bad in
            ["unix://a", "tcp://a", "tcp://:1", "tcp://a:x", "tcp://u@a:1", "a:1", "tcp://a:1/"]
        {
            assert!(chosen(Some(bad), None).is_err(), "{bad}");
        }
    }
}
