//! The HTTP interface on a unix socket, and on TCP with TLS where that is asked for.
//!
//! The OpenAPI document is made from the handlers and served at `/berth/v1/openapi.json`.

#[allow(unused_qualifications, reason = "the attribute of a handler names its parameters so")]
mod appliance;
#[allow(unused_qualifications, reason = "the attribute of a handler names its parameters so")]
mod change;
mod extract;
#[allow(unused_qualifications, reason = "the attribute of a handler names its parameters so")]
mod images;
#[allow(unused_qualifications, reason = "the attribute of a handler names its parameters so")]
mod machines;
mod metrics;
#[allow(unused_qualifications, reason = "the attribute of a handler names its parameters so")]
mod networks;
#[allow(unused_qualifications, reason = "the attribute of a handler names its parameters so")]
mod run;
#[allow(unused_qualifications, reason = "the attribute of a handler names its parameters so")]
mod stats;
#[allow(unused_qualifications, reason = "the attribute of a handler names its parameters so")]
mod stream;
mod tcp;

use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use berth_api::v1::error::{ErrorBody, ErrorCode};
use berth_api::v1::info::Info;
use berth_api::v1::routes::{PREFIX, nothing_at};
use berth_api::v1::run::Ended;
use jiff::Timestamp;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::events::Events;
use crate::failure::error;
use crate::folder::{Folder, FolderError, FolderLock};
use crate::images::Images;
use crate::machines::Machines;
use crate::server::tcp::TlsListener;
use crate::tls::{TlsError, TlsFiles};
use crate::vmm::Program;

/// Locked by the daemon of a state directory, which writes into it where it listens; the store of images
/// has another lock.
pub const LOCK: &str = "daemon.lock";
/// How long a daemon that was killed may have it.
const LOCK_TIME: Duration = Duration::from_secs(2);
const LOCK_POLL: Duration = Duration::from_millis(10);
/// How long requests have to end when the daemon is told to.
const GRACE: Duration = Duration::from_secs(2);

/// What the daemon is told when it starts.
#[derive(Clone, Debug)]
pub struct Config {
    /// The state directory.
    pub root: PathBuf,
    /// Where it listens.
    pub socket: PathBuf,
    /// The program that is the process of a machine.
    pub program: Program,
    /// Where it listens besides.
    pub tcp: Option<Tcp>,
}

/// TCP with TLS, for whoever has a certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tcp {
    /// `ADDRESS:PORT`; port 0 takes one that is free.
    pub address: String,
    /// The daemon's certificate, and who signs those of clients.
    pub tls: TlsFiles,
}

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Another one has the state directory.
    #[error("another daemon keeps {} already", root.display())]
    Running {
        /// The state directory.
        root: PathBuf,
    },
    /// The state directory cannot be used.
    #[error("{0}")]
    State(String),
    /// The socket.
    #[error("cannot listen at {}", path.display())]
    Listen {
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The address.
    #[error("cannot listen at tcp://{address}")]
    ListenTcp {
        /// Which.
        address: String,
        /// The system's reason.
        source: io::Error,
    },
    /// The certificates.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Answering.
    #[error("serving failed")]
    Serve(#[source] io::Error),
}

/// What handlers need.
#[derive(Clone)]
struct Daemon {
    machines: Arc<Machines>,
    images: Arc<Images>,
    started: Timestamp,
    addresses: Arc<[String]>,
}

/// The document's head.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "Berth",
        description = "Machines: created, started, frozen, copied. On a unix socket, and on TCP with \
                       TLS and certificates on both sides.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(ErrorBody, Ended))
)]
struct Document;

/// Keeps the machines of a state directory until `over` says so. Machines that run go on.
///
/// # Errors
/// [`DaemonError`].
pub async fn serve(
    config: &Config,
    over: impl Future<Output = ()> + Send + 'static,
) -> Result<(), DaemonError> {
    // What is wrong there is said before anything else is done.
    let tls = config.tcp.as_ref().map(|tcp| tcp.tls.server()).transpose()?;
    let _lock = lock(&config.root).await?;
    let tcp = match (&config.tcp, tls) {
        (Some(Tcp { address, .. }), Some(tls)) => {
            let failed = |source| DaemonError::ListenTcp { address: address.clone(), source };
            Some(TlsListener::bind(address, tls).await.map_err(failed)?)
        }
        _ => None,
    };
    let listener = listen(&config.socket)?;
    // For those who look elsewhere: without it they are told that there is one.
    let said = std::fs::write(config.root.join(LOCK), config.socket.as_os_str().as_bytes());
    if let Err(error) = said {
        tracing::warn!(%error, "where this daemon listens is not noted");
    }
    let bound = inode(&config.socket);
    let machines = Machines::load(&config.root, config.program.clone(), Events::default())
        .await
        .map_err(|error| DaemonError::State(error.message))?;
    let mut addresses = vec![format!("unix://{}", config.socket.display())];
    addresses.extend(tcp.as_ref().map(|tcp| format!("tcp://{}", tcp.address())));
    tracing::info!(addresses = addresses.join(" "), "listening");
    let (tell, told) = watch::channel(false);
    let images = Arc::new(Images::new(&config.root, Arc::clone(&machines), told));
    let (started, addresses) = (Timestamp::now(), addresses.into());
    let app = router(Daemon { machines, images, started, addresses });
    let result = answer(listener, tcp, app, over, tell).await;
    // Others do not find a socket at which nobody listens; one that is another's by now stays.
    if inode(&config.socket) == bound {
        let _ = std::fs::remove_file(&config.socket);
    }
    result.map_err(DaemonError::Serve)
}

async fn answer(
    listener: UnixListener,
    tcp: Option<TlsListener>,
    app: Router,
    over: impl Future<Output = ()> + Send + 'static,
    tell: watch::Sender<bool>,
) -> io::Result<()> {
    let is_over = || {
        let mut told = tell.subscribe();
        // The other end is there until the end.
        async move { drop(told.wait_for(|over| *over).await) }
    };
    let local = axum::serve(listener, app.clone()).with_graceful_shutdown(is_over());
    let remote = async {
        match tcp {
            Some(tcp) => axum::serve(tcp, app).with_graceful_shutdown(is_over()).await,
            None => Ok(()),
        }
    };
    // Streams do not end by themselves: those that are left when it is over are cut off soon.
    tokio::select! {
        result = async { tokio::try_join!(local, remote) } => result.map(|_| ()),
        () = async {
            over.await;
            tell.send_replace(true);
            tokio::time::sleep(GRACE).await;
        } => Ok(()),
    }
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    let meta = path.symlink_metadata().ok()?;
    Some((meta.dev(), meta.ino()))
}

/// One daemon for a state directory. One that was killed may have it for a moment longer.
async fn lock(root: &Path) -> Result<FolderLock, DaemonError> {
    let mut builder = std::fs::DirBuilder::new();
    let made = builder.recursive(true).mode(0o700).create(root);
    made.map_err(|error| DaemonError::State(format!("{}: {error}", root.display())))?;
    let began = Instant::now();
    loop {
        match Folder::at(root).lock_named(LOCK) {
            Ok(lock) => {
                // Of one that has ended.
                let _ = std::fs::write(root.join(LOCK), "");
                return Ok(lock);
            }
            Err(FolderError::Locked { .. }) if began.elapsed() < LOCK_TIME => {
                tokio::time::sleep(LOCK_POLL).await;
            }
            Err(FolderError::Locked { .. }) => {
                return Err(DaemonError::Running { root: root.to_owned() });
            }
            Err(error) => return Err(DaemonError::State(crate::failure::chain(&error))),
        }
    }
}

/// Listens for this user only. A socket that a daemon left which was killed is replaced: nobody else
/// has the lock.
fn listen(path: &Path) -> Result<UnixListener, DaemonError> {
    let failed = |source| DaemonError::Listen { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(parent).map_err(failed)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(failed(io::ErrorKind::AddrInUse.into()));
    }
    let is_socket = path.symlink_metadata().is_ok_and(|meta| {
        use std::os::unix::fs::FileTypeExt;
        meta.file_type().is_socket()
    });
    if is_socket {
        std::fs::remove_file(path).map_err(failed)?;
    }
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

fn router(daemon: Daemon) -> Router {
    let (router, document) = OpenApiRouter::with_openapi(Document::openapi())
        .nest(
            PREFIX,
            OpenApiRouter::new()
                .routes(routes!(info))
                .routes(routes!(metrics::metrics))
                .routes(routes!(stream::events))
                .merge(images::router())
                .merge(machines::router())
                .merge(networks::router()),
        )
        .split_for_parts();
    let document = Arc::new(document);
    router
        .route(
            &format!("{PREFIX}/openapi.json"),
            get(move || async move { Json((*document).clone()) }),
        )
        .route("/metrics", get(metrics::metrics))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .with_state(daemon)
}

async fn no_route(uri: axum::http::Uri) -> Response {
    failure(error(ErrorCode::NotFound, nothing_at(uri.path())))
}

async fn no_method(method: axum::http::Method, uri: axum::http::Uri) -> Response {
    let message = format!("{} does not take {method}", uri.path());
    let mut response = failure(error(ErrorCode::Invalid, message));
    *response.status_mut() = axum::http::StatusCode::METHOD_NOT_ALLOWED;
    response
}

/// An error as an answer.
fn failure(error: berth_api::v1::error::ApiError) -> Response {
    let status = axum::http::StatusCode::from_u16(error.code.status()).unwrap_or_default();
    (status, Json(ErrorBody { error })).into_response()
}

/// The daemon itself.
#[utoipa::path(get, path = "/info", responses((status = 200, body = Info)))]
async fn info(State(daemon): State<Daemon>) -> Json<Info> {
    let machines = daemon.machines.list();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Json(Info {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        root: daemon.machines.root().display().to_string(),
        started: daemon.started,
        addresses: daemon.addresses.to_vec(),
        machines: count(machines.len()),
        running: count(machines.iter().filter(|machine| machine.state.is_up()).count()),
    })
}

/// Whether anybody listens there.
pub async fn answers(socket: &Path) -> bool {
    UnixStream::connect(socket).await.is_ok()
}
