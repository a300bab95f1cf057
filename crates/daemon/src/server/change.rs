//! `PATCH /machines/{name}`.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use berth_api::v1::change::ChangeMachine;
use berth_api::v1::error::ErrorBody;
use berth_api::v1::machine::Machine;

use crate::machines::Machines;
use crate::server::Daemon;
use crate::server::extract::{Body, Failure, MachinePath, Path};
use crate::server::machines::changed;

/// Changes what a machine is made of. One that runs goes on as it is, and is changed when it is
/// started again.
#[utoipa::path(
    patch,
    path = "/machines/{name}",
    params(MachinePath),
    request_body = ChangeMachine,
    responses(
        (status = 200, body = Machine, description = "it is changed"),
        (status = 202, body = Machine, description = "it runs; the next start changes it"),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
pub(super) async fn change(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Body(request): Body<ChangeMachine>,
) -> Result<(StatusCode, Json<Machine>), Failure> {
    let change =
        |machines: Arc<Machines>, entry| async move { machines.change(&entry, request).await };
    let machine = changed(daemon, name, change).await?;
    let status = if machine.state.is_up() { StatusCode::ACCEPTED } else { StatusCode::OK };
    Ok((status, machine))
}
