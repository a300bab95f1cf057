//! Appliances: streams that machines are packed into and unpacked from.

use std::io::{self, Read, Write};
use std::time::Duration;

use axum::Json;
use axum::body::{BodyDataStream, Bytes};
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use berth_api::v1::error::ErrorBody;
use berth_api::v1::import::UnfinishedImport;
use berth_api::v1::machine::Machine;
use futures_util::StreamExt;
use serde::Deserialize;
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use utoipa::IntoParams;
use uuid::Uuid;

use crate::failure::{chain, invalid};
use crate::machines::import::{Import, Rest};
use crate::server::Daemon;
use crate::server::extract::{Failure, ImportPath, MachinePath, Path, Query};
use crate::server::machines::{Answer, whole};
use crate::server::stream::body_of;

/// Bytes that are sent at once.
const CHUNK: usize = 256 << 10;
/// Chunks kept for a reader that is slow.
const CHUNKS: usize = 4;
/// How long what is not read any more may still come: whoever sends it hears then why it was refused.
const DRAIN_TIME: Duration = Duration::from_secs(10);
const TYPE: [(HeaderName, &str); 1] = [(CONTENT_TYPE, "application/vnd.berth.appliance")];

/// What of a machine is packed.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ExportQuery {
    /// Its memory too, so that it goes on where it was.
    #[serde(default)]
    with_state: bool,
}

/// Packs a machine into an appliance, which is sent as it is made. One that runs goes on. A stream that
/// ends before its end was not packed as a whole.
#[utoipa::path(
    get,
    path = "/machines/{name}/export",
    params(MachinePath, ExportQuery),
    responses(
        (status = 200, body = String, content_type = "application/vnd.berth.appliance"),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
pub(super) async fn export(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Query(query): Query<ExportQuery>,
) -> Result<Response, Failure> {
    let machine = name.clone();
    let export = whole(async move {
        let entry = daemon.machines.find(&machine).await?;
        daemon.machines.export(&entry, query.with_state).await
    });
    let export = export.await?;
    let (to, from) = mpsc::channel::<io::Result<Bytes>>(CHUNKS);
    tokio::task::spawn_blocking(move || {
        let sink = io::BufWriter::with_capacity(CHUNK, Sink(to.clone()));
        if let Err(error) = export.write(sink) {
            let error = chain(&error);
            tracing::error!(machine = name, error, "the export failed");
            // Whoever has gone is told nothing.
            let _ = to.blocking_send(Err(io::Error::other(error)));
        }
    });
    Ok((TYPE, body_of(from)).into_response())
}

/// The client, as something to write to.
struct Sink(mpsc::Sender<io::Result<Bytes>>);

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let sent = self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes)));
        sent.map_err(|_| io::Error::from(io::ErrorKind::BrokenPipe))?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// What is made of an appliance.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ImportQuery {
    /// The machine's name; without one, the appliance's.
    name: Option<String>,
    /// The disks only, though memory is there.
    #[serde(default)]
    without_state: bool,
    /// An import that broke off: the body is the rest of its appliance.
    unfinished: Option<Uuid>,
    /// The byte of the appliance with which that begins, as `/imports` says.
    at: Option<u64>,
}

/// Makes a machine of an appliance, the body. It does not run yet; one with memory is suspended. When the
/// body breaks off, what came is kept for some days, if it is much; `/imports` says how far that is.
#[utoipa::path(
    post,
    path = "/import",
    params(ImportQuery),
    request_body(content = String, content_type = "application/vnd.berth.appliance"),
    responses(
        (status = 201, body = Machine),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
pub(super) async fn import(
    State(daemon): State<Daemon>,
    Query(query): Query<ImportQuery>,
    request: Request,
) -> Answer<(StatusCode, Json<Machine>)> {
    let of_another = match (query.unfinished, query.at) {
        (Some(id), Some(at)) => Some(Rest { id, at }),
        (None, None) => None,
        _ => return Err(invalid("unfinished and at are needed together, or neither").into()),
    };
    let request_body = request.into_body().into_data_stream();
    let (back, rest) = tokio::sync::oneshot::channel();
    let from = Incoming {
        stream: Some(request_body),
        rest: Bytes::new(),
        handle: Handle::current(),
        back: Some(back),
    };
    let wanted = Import { name: query.name, without_state: query.without_state, rest: of_another };
    let made = whole(async move { daemon.machines.import(from, wanted).await }).await;
    if made.is_err()
        && let Ok(mut rest) = rest.await
    {
        let drained = async { while let Some(Ok(_)) = rest.next().await {} };
        let _ = tokio::time::timeout(DRAIN_TIME, drained).await;
    }
    Ok((StatusCode::CREATED, Json(made?.describe())))
}

/// Imports that broke off and can go on, the last one first.
#[utoipa::path(get, path = "/imports", responses(
    (status = 200, body = Vec<UnfinishedImport>),
    (status = "5XX", body = ErrorBody),
))]
pub(super) async fn unfinished(
    State(daemon): State<Daemon>,
) -> Answer<Json<Vec<UnfinishedImport>>> {
    Ok(Json(daemon.machines.unfinished_imports().await?))
}

/// Removes what is kept of an import that broke off.
#[utoipa::path(
    delete,
    path = "/imports/{id}",
    params(ImportPath),
    responses(
        (status = 204),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
pub(super) async fn abandon(
    State(daemon): State<Daemon>,
    Path(id): Path<Uuid>,
) -> Answer<StatusCode> {
    whole(async move { daemon.machines.abandon_import(id).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// A body that a thread reads, which gives it back when it has read enough.
struct Incoming {
    stream: Option<BodyDataStream>,
    rest: Bytes,
    handle: Handle,
    back: Option<tokio::sync::oneshot::Sender<BodyDataStream>>,
}

impl Read for Incoming {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Some(stream) = &mut self.stream else { return Ok(0) };
        while self.rest.is_empty() {
            match self.handle.block_on(stream.next()) {
                Some(Ok(bytes)) => self.rest = bytes,
                Some(Err(error)) => return Err(io::Error::other(error)),
                None => return Ok(0),
            }
        }
        let count = self.rest.len().min(buffer.len());
        let part = self.rest.split_to(count);
        if let Some(to) = buffer.get_mut(..count) {
            to.copy_from_slice(&part);
        }
        Ok(count)
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if let (Some(stream), Some(back)) = (self.stream.take(), self.back.take()) {
            // Nobody may want it.
            let _ = back.send(stream);
        }
    }
}
