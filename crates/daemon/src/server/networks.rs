//! `/networks`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use berth_api::v1::error::ErrorBody;
use berth_api::v1::network::{CreateNetwork, Network};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::server::Daemon;
use crate::server::extract::{Body, NetworkPath, Path};
use crate::server::machines::{Answer, whole};

pub(super) fn router() -> OpenApiRouter<Daemon> {
    OpenApiRouter::new().routes(routes!(list, create)).routes(routes!(inspect, remove))
}

/// All networks, by name.
#[utoipa::path(get, path = "/networks", responses((status = 200, body = Vec<Network>)))]
async fn list(State(daemon): State<Daemon>) -> Json<Vec<Network>> {
    Json(daemon.machines.networks().await)
}

/// Creates a network, which needs root.
#[utoipa::path(post, path = "/networks", request_body = CreateNetwork, responses(
    (status = 201, body = Network),
    (status = "4XX", body = ErrorBody),
    (status = "5XX", body = ErrorBody),
))]
async fn create(
    State(daemon): State<Daemon>,
    Body(request): Body<CreateNetwork>,
) -> Answer<(StatusCode, Json<Network>)> {
    let made = whole(async move { daemon.machines.create_network(request).await }).await?;
    Ok((StatusCode::CREATED, Json(made)))
}

/// A network, with who is in it.
#[utoipa::path(get, path = "/networks/{name}", params(NetworkPath), responses(
    (status = 200, body = Network),
    (status = "4XX", body = ErrorBody),
))]
async fn inspect(State(daemon): State<Daemon>, Path(name): Path<String>) -> Answer<Json<Network>> {
    Ok(Json(daemon.machines.network(&name).await?))
}

/// Removes a network that nothing is in.
#[utoipa::path(
    delete,
    path = "/networks/{name}",
    params(NetworkPath),
    responses(
        (status = 204),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn remove(State(daemon): State<Daemon>, Path(name): Path<String>) -> Answer<StatusCode> {
    whole(async move { daemon.machines.remove_network(&name).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}
