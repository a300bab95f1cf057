//! `/images`.

use std::io;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use berth_api::v1::error::ErrorBody;
use berth_api::v1::image::{BootstrapImage, BootstrapLine, Image};
use futures_util::stream;
use serde::Deserialize;
use tokio::sync::mpsc;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::images::{LINES, checked};
use crate::server::Daemon;
use crate::server::extract::{Body, Failure, ImagePath, Path, Query};
use crate::server::machines::Answer;
use crate::server::stream::{JSON_LINES, json_line};

pub(super) fn router() -> OpenApiRouter<Daemon> {
    OpenApiRouter::new().routes(routes!(list, bootstrap)).routes(routes!(remove))
}

/// All images, by name.
#[utoipa::path(get, path = "/images", responses(
    (status = 200, body = Vec<Image>),
    (status = "5XX", body = ErrorBody),
))]
async fn list(State(daemon): State<Daemon>) -> Answer<Json<Vec<Image>>> {
    Ok(Json(daemon.images.list().await?))
}

/// Makes an image, which takes minutes: a `BootstrapLine` as a line of JSON each, the last of which is
/// the result. One who closes the connection before ends it, and nothing is made.
#[utoipa::path(post, path = "/images", request_body = BootstrapImage, responses(
    (status = 200, body = BootstrapLine, content_type = "application/jsonl"),
    (status = "4XX", body = ErrorBody),
))]
async fn bootstrap(
    State(daemon): State<Daemon>,
    Body(request): Body<BootstrapImage>,
) -> Result<Response, Failure> {
    let request = checked(request)?;
    let (to, from) = mpsc::channel(LINES);
    tokio::spawn(async move { daemon.images.bootstrap(request, to).await });
    let lines = stream::unfold(from, |mut from| async {
        let line = from.recv().await?;
        Some((Ok::<_, io::Error>(json_line(&line)), from))
    });
    Ok((JSON_LINES, axum::body::Body::from_stream(lines)).into_response())
}

/// Whether an image that is made meanwhile is waited for.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Wait {
    /// Waits while another image is made or removed, which is an error else.
    #[serde(default)]
    wait: bool,
}

/// Removes an image that no machine boots, and tells which one it was. Disks that are based on it stay.
#[utoipa::path(
    delete,
    path = "/images/{name}",
    params(ImagePath, Wait),
    responses(
        (status = 200, body = Image),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn remove(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Query(query): Query<Wait>,
) -> Answer<Json<Image>> {
    Ok(Json(daemon.images.remove(&name, query.wait).await?))
}
