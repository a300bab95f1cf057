//! `PATCH /machines/{name}`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use berth_api::v1::change::{ChangeMachine, ChangedMachine};
use berth_api::v1::error::ErrorBody;

use crate::server::Daemon;
use crate::server::extract::{Body, Failure, MachinePath, Path};
use crate::server::machines::whole;

/// Changes what a machine is made of. One that runs is changed at once as far as possible, and in the
/// rest when it is started again.
#[utoipa::path(
    patch,
    path = "/machines/{name}",
    params(MachinePath),
    request_body = ChangeMachine,
    responses(
        (status = 200, body = ChangedMachine, description = "it is changed"),
        (status = 202, body = ChangedMachine, description = "it runs; the next start changes the rest"),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
pub(super) async fn change(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Body(request): Body<ChangeMachine>,
) -> Result<(StatusCode, Json<ChangedMachine>), Failure> {
    let changed = whole(async move {
        let entry = daemon.machines.find(&name).await?;
        let later = daemon.machines.change(&entry, request).await?;
        Ok(ChangedMachine { machine: entry.describe(), later })
    });
    let changed = changed.await?;
    let status = if changed.later.is_empty() { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(changed)))
}
