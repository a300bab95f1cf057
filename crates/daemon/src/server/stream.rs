//! What does not end by itself: events, logs, consoles, connections to agents.

use std::io::{self, SeekFrom};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{Request, State};
use axum::http::header::{CONNECTION, CONTENT_TYPE, UPGRADE};
use axum::http::{HeaderMap, HeaderName, StatusCode};
use axum::response::{IntoResponse, Response};
use berth_api::v1::error::ErrorBody;
use berth_api::v1::event::Event;
use berth_api::v1::routes::{UPGRADE_AGENT, UPGRADE_CONSOLE};
use berth_api::vmm;
use berth_net::relay;
use futures_util::stream;
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::net::UnixStream;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use utoipa::{IntoParams, ToSchema};

use crate::failure::invalid;
use crate::log::BEFORE;
use crate::machines::Entry;
use crate::server::Daemon;
use crate::server::extract::{Failure, MachinePath, Path, Query};

/// How often a log that is followed is looked at.
const POLL: Duration = Duration::from_millis(100);
/// Bytes of a log that are read at once.
const CHUNK: usize = 64 << 10;
/// Chunks kept for a reader that is slow.
const CHUNKS: usize = 4;
pub(super) const JSON_LINES: [(HeaderName, &str); 1] = [(CONTENT_TYPE, "application/jsonl")];
const BYTES: [(HeaderName, &str); 1] = [(CONTENT_TYPE, "application/octet-stream")];

/// What happens from now on: an `Event` as a line of JSON each. One who is too slow to read is
/// disconnected.
#[utoipa::path(get, path = "/events", responses(
    (status = 200, body = Event, content_type = "application/jsonl"),
))]
pub(super) async fn events(State(daemon): State<Daemon>) -> Response {
    let heard = stream::unfold(daemon.machines.events().listen(), |mut from| async {
        let event = match from.recv().await {
            Ok(event) => event,
            Err(RecvError::Lagged(missed)) => {
                let error = format!("{missed} events were missed");
                return Some((Err(io::Error::other(error)), from));
            }
            Err(RecvError::Closed) => return None,
        };
        Some((Ok(json_line(&event)), from))
    });
    (JSON_LINES, Body::from_stream(heard)).into_response()
}

/// Something as a line of JSON.
pub(super) fn json_line(what: &impl Serialize) -> Bytes {
    let mut line = serde_json::to_vec(what).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

/// Which log, and how much of it.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Logs {
    /// What the guest printed, or what its process did.
    #[serde(default)]
    #[param(inline)]
    source: Source,
    /// Only so many of the last lines.
    tail: Option<usize>,
    /// And what comes, until the machine ends.
    #[serde(default)]
    follow: bool,
}

/// The logs of a machine.
#[derive(Clone, Copy, Debug, Default, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum Source {
    /// The guest's console.
    #[default]
    Console,
    /// Its process.
    Vmm,
}

/// What a machine printed.
#[utoipa::path(
    get,
    path = "/machines/{name}/logs",
    params(MachinePath, Logs),
    responses(
        (status = 200, body = String, content_type = "application/octet-stream"),
        (status = "4XX", body = ErrorBody),
    )
)]
pub(super) async fn logs(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Query(query): Query<Logs>,
) -> Result<Response, Failure> {
    let entry = daemon.machines.find(&name).await?;
    let file = match query.source {
        Source::Console => crate::vmm::CONSOLE,
        Source::Vmm => crate::vmm::LOG,
    };
    let (to, from) = mpsc::channel::<io::Result<Bytes>>(CHUNKS);
    tokio::spawn(async move {
        if let Err(error) = send_log(&entry, file, query.tail, query.follow, &to).await {
            // Whoever has gone is told nothing.
            let _ = to.send(Err(error)).await;
        }
    });
    Ok((BYTES, body_of(from)).into_response())
}

/// A body of what comes through a channel; an error cuts it off.
pub(super) fn body_of(from: mpsc::Receiver<io::Result<Bytes>>) -> Body {
    Body::from_stream(stream::unfold(from, |mut from| async {
        let chunk = from.recv().await?;
        Some((chunk, from))
    }))
}

async fn send_log(
    entry: &Arc<Entry>,
    file: &'static str,
    tail: Option<usize>,
    follow: bool,
    to: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    let path = entry.folder().file(file);
    let before = read_if_there(path.with_added_extension(BEFORE)).await?;
    let mut open = match File::open(&path).await {
        Ok(file) => Some(file),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let mut text = before;
    if let Some(file) = &mut open {
        file.read_to_end(&mut text).await?;
    }
    let from = tail.map_or(0, |lines| last_lines(&text, lines));
    for chunk in text.get(from..).unwrap_or_default().chunks(CHUNK) {
        if to.send(Ok(Bytes::copy_from_slice(chunk))).await.is_err() {
            return Ok(());
        }
    }
    drop(text);
    if follow { send_what_comes(entry, file, open, to).await } else { Ok(()) }
}

async fn send_what_comes(
    entry: &Entry,
    file: &'static str,
    mut open: Option<File>,
    to: &mpsc::Sender<io::Result<Bytes>>,
) -> io::Result<()> {
    loop {
        // First, so that what comes last is not missed.
        let is_up = entry.describe().state.is_up();
        let mut got = 0;
        if let Some(file) = &mut open {
            let mut chunk = vec![0; CHUNK];
            got = file.read(&mut chunk).await?;
            chunk.truncate(got);
            if got > 0 && to.send(Ok(chunk.into())).await.is_err() {
                return Ok(());
            }
        }
        if got > 0 {
            continue;
        }
        if to.is_closed() || !is_up {
            return Ok(());
        }
        // It may have been renamed.
        open = reopened(open, &entry.folder().file(file)).await?;
        tokio::time::sleep(POLL).await;
    }
}

/// The file that has this name by now, if it is another one.
async fn reopened(open: Option<File>, path: &std::path::Path) -> io::Result<Option<File>> {
    let Ok(now) = tokio::fs::metadata(path).await else { return Ok(open) };
    let Some(mut file) = open else { return File::open(path).await.map(Some) };
    let meta = file.metadata().await?;
    if (meta.dev(), meta.ino()) != (now.dev(), now.ino()) {
        return File::open(path).await.map(Some);
    }
    if file.stream_position().await? > meta.len() {
        // Somebody truncated it.
        file.seek(SeekFrom::Start(0)).await?;
    }
    Ok(Some(file))
}

async fn read_if_there(path: PathBuf) -> io::Result<Vec<u8>> {
    match tokio::fs::read(path).await {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

/// Where the last lines begin.
fn last_lines(text: &[u8], lines: usize) -> usize {
    if lines == 0 {
        return text.len();
    }
    let end = text.len() - usize::from(text.ends_with(b"\n"));
    let ends = text.iter().take(end).enumerate().rev().filter(|(_, byte)| **byte == b'\n');
    ends.map(|(at, _)| at + 1).nth(lines - 1).unwrap_or(0)
}

/// Connects to the console: what the guest prints, and what is typed. Upgrade to `berth-console`.
#[utoipa::path(
    get,
    path = "/machines/{name}/console",
    params(
        MachinePath,
        ("backlog" = Option<u32>, Query, description = "so many of the last bytes first"),
    ),
    responses(
        (status = 101, description = "bytes in both directions"),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
pub(super) async fn console(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Query(query): Query<Backlog>,
    request: Request,
) -> Result<Response, Failure> {
    asks_for(request.headers(), UPGRADE_CONSOLE)?;
    let entry = daemon.machines.find(&name).await?;
    let backlog = query.backlog.unwrap_or(0);
    let stream = daemon.machines.connect(&entry, &vmm::Request::Console { backlog }).await?;
    Ok(upgrade(request, UPGRADE_CONSOLE, stream))
}

/// How much of the console's past.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Backlog {
    backlog: Option<u32>,
}

/// Connects to the agent in the guest. Upgrade to `berth-agent`; the protocol is that of the agent.
#[utoipa::path(
    get,
    path = "/machines/{name}/agent",
    params(MachinePath),
    responses(
        (status = 101, description = "the agent's protocol"),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
pub(super) async fn agent(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Failure> {
    asks_for(request.headers(), UPGRADE_AGENT)?;
    let entry = daemon.machines.find(&name).await?;
    let stream = daemon.machines.connect(&entry, &vmm::Request::Agent).await?;
    Ok(upgrade(request, UPGRADE_AGENT, stream))
}

pub(super) fn asks_for(headers: &HeaderMap, protocol: &str) -> Result<(), Failure> {
    let asked = headers.get(UPGRADE).and_then(|value| value.to_str().ok());
    match asked {
        Some(asked) if asked.eq_ignore_ascii_case(protocol) => Ok(()),
        _ => {
            let message = format!("this needs an upgrade of the connection to {protocol}");
            Err(invalid(message).into())
        }
    }
}

/// From here on the connection is that stream.
fn upgrade(mut request: Request, protocol: &'static str, stream: UnixStream) -> Response {
    let upgraded = hyper::upgrade::on(&mut request);
    tokio::spawn(async move {
        match upgraded.await {
            Ok(client) => relay::both(TokioIo::new(client), stream).await,
            Err(error) => tracing::warn!(%error, protocol, "a connection was not upgraded"),
        }
    });
    switching(protocol)
}

/// The answer after which a connection speaks another protocol.
pub(super) fn switching(protocol: &'static str) -> Response {
    let headers = [(CONNECTION, "upgrade"), (UPGRADE, protocol)];
    (StatusCode::SWITCHING_PROTOCOLS, headers).into_response()
}

#[cfg(test)]
mod tests {
    use super::last_lines;

    #[test]
    fn the_last_lines_are_found() {
        let text = b"a\nb\nc\n";
        for (lines, tail) in
            [(0, ""), (1, "c\n"), (2, "b\nc\n"), (3, "a\nb\nc\n"), (9, "a\nb\nc\n")]
        {
            assert_eq!(&text[last_lines(text, lines)..], tail.as_bytes(), "{lines}");
        }
        assert_eq!(last_lines(b"a\nb", 1), 2);
        assert_eq!(last_lines(b"", 3), 0);
    }
}
