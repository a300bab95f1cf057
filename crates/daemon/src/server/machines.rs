//! `/machines`.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use berth_api::v1::error::{ApiError, ErrorBody};
use berth_api::v1::machine::{AdoptMachine, CreateMachine, Machine, RenameMachine};
use berth_api::v1::snapshot::{CloneMachine, RestoreSnapshot, Snapshot, TakeSnapshot};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::failure::{failed, invalid};
use crate::machines::{Entry, Machines};
use crate::server::extract::{Body, Failure, MachinePath, Path, Query, TagPath};
use crate::server::{Daemon, appliance, change, run, stats, stream};

pub(super) type Answer<T> = Result<T, Failure>;

/// How long a guest has to power off, unless the request says otherwise.
const PATIENCE: f64 = 30.0;
/// The most it may say, in seconds.
const PATIENCE_MAX: f64 = 86_400.0;

pub(super) fn router() -> OpenApiRouter<Daemon> {
    OpenApiRouter::new()
        .routes(routes!(list, create))
        .routes(routes!(adopt))
        .routes(routes!(run::run))
        .routes(routes!(appliance::import))
        .routes(routes!(appliance::unfinished))
        .routes(routes!(appliance::abandon))
        .routes(routes!(appliance::export))
        .routes(routes!(inspect, remove, change::change))
        .routes(routes!(start))
        .routes(routes!(stop))
        .routes(routes!(kill))
        .routes(routes!(restart))
        .routes(routes!(pause))
        .routes(routes!(unpause))
        .routes(routes!(suspend))
        .routes(routes!(resume))
        .routes(routes!(rename))
        .routes(routes!(snapshots, take_snapshot))
        .routes(routes!(remove_snapshot))
        .routes(routes!(restore))
        .routes(routes!(clone_machine))
        .routes(routes!(stats::all_stats))
        .routes(routes!(stats::stats))
        .routes(routes!(stream::logs))
        .routes(routes!(stream::console))
        .routes(routes!(stream::agent))
}

/// Does it whether or not whoever asked for it stays: what is begun is ended.
pub(super) async fn whole<T: Send + 'static>(
    work: impl Future<Output = Result<T, ApiError>> + Send + 'static,
) -> Answer<T> {
    match tokio::spawn(work).await {
        Ok(result) => Ok(result?),
        Err(error) => Err(failed(&error).into()),
    }
}

/// Changes a machine as a whole; gives how it is then.
pub(super) async fn changed<F: Future<Output = Result<(), ApiError>> + Send>(
    daemon: Daemon,
    name: String,
    change: impl FnOnce(Arc<Machines>, Arc<Entry>) -> F + Send + 'static,
) -> Answer<Json<Machine>> {
    let machine = whole(async move {
        let entry = daemon.machines.find(&name).await?;
        change(daemon.machines, Arc::clone(&entry)).await?;
        Ok(entry.describe())
    });
    Ok(Json(machine.await?))
}

/// How long to wait for a guest.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Patience {
    /// Seconds the guest has to power off before it is ended; 30 when absent.
    #[param(minimum = 0, maximum = 86400)]
    timeout: Option<f64>,
}

impl Patience {
    fn duration(&self) -> Answer<Duration> {
        let seconds = self.timeout.unwrap_or(PATIENCE);
        if !(0.0..=PATIENCE_MAX).contains(&seconds) {
            let message = format!("timeout={seconds}: 0 to {PATIENCE_MAX} seconds are possible");
            return Err(invalid(message).into());
        }
        Ok(Duration::from_secs_f64(seconds))
    }
}

/// Whether a machine that runs is removed too.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct Force {
    /// Ends a machine that runs.
    #[serde(default)]
    force: bool,
}

/// All machines, by name.
#[utoipa::path(get, path = "/machines", responses((status = 200, body = Vec<Machine>)))]
async fn list(State(daemon): State<Daemon>) -> Json<Vec<Machine>> {
    Json(daemon.machines.list())
}

/// Creates a machine. It does not run yet.
#[utoipa::path(post, path = "/machines", request_body = CreateMachine, responses(
    (status = 201, body = Machine),
    (status = "4XX", body = ErrorBody),
    (status = "5XX", body = ErrorBody),
))]
async fn create(
    State(daemon): State<Daemon>,
    Body(request): Body<CreateMachine>,
) -> Answer<(StatusCode, Json<Machine>)> {
    let entry = whole(async move { daemon.machines.create(request).await }).await?;
    Ok((StatusCode::CREATED, Json(entry.describe())))
}

/// Makes a folder, a copy of a machine's for example, a machine of its own.
#[utoipa::path(post, path = "/adopt", request_body = AdoptMachine, responses(
    (status = 201, body = Machine),
    (status = "4XX", body = ErrorBody),
    (status = "5XX", body = ErrorBody),
))]
async fn adopt(
    State(daemon): State<Daemon>,
    Body(request): Body<AdoptMachine>,
) -> Answer<(StatusCode, Json<Machine>)> {
    let entry = whole(async move { daemon.machines.adopt(request).await }).await?;
    Ok((StatusCode::CREATED, Json(entry.describe())))
}

/// A machine.
#[utoipa::path(get, path = "/machines/{name}", params(MachinePath), responses(
    (status = 200, body = Machine),
    (status = "4XX", body = ErrorBody),
))]
async fn inspect(State(daemon): State<Daemon>, Path(name): Path<String>) -> Answer<Json<Machine>> {
    Ok(Json(daemon.machines.find(&name).await?.describe()))
}

/// Removes a machine with all its files.
#[utoipa::path(
    delete,
    path = "/machines/{name}",
    params(MachinePath, Force),
    responses(
        (status = 204),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn remove(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Query(query): Query<Force>,
) -> Answer<StatusCode> {
    let removed = whole(async move {
        let entry = daemon.machines.find(&name).await?;
        daemon.machines.remove(&entry, query.force).await
    });
    removed.await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Starts a machine; answers when its guest runs.
#[utoipa::path(
    post,
    path = "/machines/{name}/start",
    params(MachinePath),
    responses(
        (status = 200, body = Machine),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn start(State(daemon): State<Daemon>, Path(name): Path<String>) -> Answer<Json<Machine>> {
    changed(daemon, name, move |machines, entry| async move { machines.start(&entry).await }).await
}

/// Presses the power button, asks the guest's agent if that does nothing, and ends the machine if it
/// does not power off in time.
#[utoipa::path(
    post,
    path = "/machines/{name}/stop",
    params(MachinePath, Patience),
    responses(
        (status = 200, body = Machine),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn stop(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Query(query): Query<Patience>,
) -> Answer<Json<Machine>> {
    let patience = query.duration()?;
    changed(
        daemon,
        name,
        move |machines, entry| async move { machines.stop(&entry, patience).await },
    )
    .await
}

/// Ends a machine at once.
#[utoipa::path(
    post,
    path = "/machines/{name}/kill",
    params(MachinePath),
    responses(
        (status = 200, body = Machine),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn kill(State(daemon): State<Daemon>, Path(name): Path<String>) -> Answer<Json<Machine>> {
    changed(daemon, name, move |machines, entry| async move { machines.kill(&entry).await }).await
}

/// Stops a machine if it runs, and starts it.
#[utoipa::path(
    post,
    path = "/machines/{name}/restart",
    params(MachinePath, Patience),
    responses(
        (status = 200, body = Machine),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn restart(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Query(query): Query<Patience>,
) -> Answer<Json<Machine>> {
    let patience = query.duration()?;
    changed(
        daemon,
        name,
        move |machines, entry| async move { machines.restart(&entry, patience).await },
    )
    .await
}

/// Lets the vCPUs of a machine stand still.
#[utoipa::path(
    post,
    path = "/machines/{name}/pause",
    params(MachinePath),
    responses(
        (status = 200, body = Machine),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn pause(State(daemon): State<Daemon>, Path(name): Path<String>) -> Answer<Json<Machine>> {
    changed(daemon, name, move |machines, entry| async move { machines.pause(&entry, true).await })
        .await
}

/// Lets them go on.
#[utoipa::path(
    post,
    path = "/machines/{name}/unpause",
    params(MachinePath),
    responses(
        (status = 200, body = Machine),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn unpause(State(daemon): State<Daemon>, Path(name): Path<String>) -> Answer<Json<Machine>> {
    changed(daemon, name, move |machines, entry| async move { machines.pause(&entry, false).await })
        .await
}

/// Gives a machine another name.
#[utoipa::path(
    post,
    path = "/machines/{name}/rename",
    params(MachinePath),
    request_body = RenameMachine,
    responses(
        (status = 200, body = Machine),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn rename(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Body(request): Body<RenameMachine>,
) -> Answer<Json<Machine>> {
    changed(daemon, name, move |machines, entry| async move {
        machines.rename(&entry, &request.name).await
    })
    .await
}

/// Stores a machine on the disk and ends it.
#[utoipa::path(
    post,
    path = "/machines/{name}/suspend",
    params(MachinePath),
    responses(
        (status = 200, body = Machine),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn suspend(State(daemon): State<Daemon>, Path(name): Path<String>) -> Answer<Json<Machine>> {
    changed(daemon, name, move |machines, entry| async move { machines.suspend(&entry).await })
        .await
}

/// Lets a machine go on that is suspended.
#[utoipa::path(
    post,
    path = "/machines/{name}/resume",
    params(MachinePath),
    responses(
        (status = 200, body = Machine),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn resume(State(daemon): State<Daemon>, Path(name): Path<String>) -> Answer<Json<Machine>> {
    changed(daemon, name, move |machines, entry| async move { machines.resume(&entry).await }).await
}

/// The snapshots of a machine, the oldest first.
#[utoipa::path(
    get,
    path = "/machines/{name}/snapshots",
    params(MachinePath),
    responses(
        (status = 200, body = Vec<Snapshot>),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn snapshots(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
) -> Answer<Json<Vec<Snapshot>>> {
    let entry = daemon.machines.find(&name).await?;
    Ok(Json(daemon.machines.snapshots(&entry).await?))
}

/// Takes a snapshot of a machine in whatever state; one that runs goes on.
#[utoipa::path(
    post,
    path = "/machines/{name}/snapshots",
    params(MachinePath),
    request_body = TakeSnapshot,
    responses(
        (status = 201, body = Snapshot),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn take_snapshot(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Body(request): Body<TakeSnapshot>,
) -> Answer<(StatusCode, Json<Snapshot>)> {
    let taken = whole(async move {
        let entry = daemon.machines.find(&name).await?;
        daemon.machines.snapshot(&entry, request).await
    });
    Ok((StatusCode::CREATED, Json(taken.await?)))
}

/// Removes a snapshot.
#[utoipa::path(
    delete,
    path = "/machines/{name}/snapshots/{tag}",
    params(MachinePath, TagPath),
    responses(
        (status = 204),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn remove_snapshot(
    State(daemon): State<Daemon>,
    Path((name, tag)): Path<(String, String)>,
) -> Answer<StatusCode> {
    let removed = whole(async move {
        let entry = daemon.machines.find(&name).await?;
        daemon.machines.remove_snapshot(&entry, tag).await
    });
    removed.await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes a machine what a snapshot holds; it goes on from there, or is stopped if only disks are in it.
#[utoipa::path(
    post,
    path = "/machines/{name}/restore",
    params(MachinePath),
    request_body = RestoreSnapshot,
    responses(
        (status = 200, body = Machine),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn restore(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Body(request): Body<RestoreSnapshot>,
) -> Answer<Json<Machine>> {
    changed(
        daemon,
        name,
        move |machines, entry| async move { machines.restore(&entry, request).await },
    )
    .await
}

/// Makes machines that begin as this one is, or as a snapshot of it.
#[utoipa::path(
    post,
    path = "/machines/{name}/clone",
    params(MachinePath),
    request_body = CloneMachine,
    responses(
        (status = 201, body = Vec<Machine>),
        (status = "4XX", body = ErrorBody),
        (status = "5XX", body = ErrorBody),
    )
)]
async fn clone_machine(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Body(request): Body<CloneMachine>,
) -> Answer<(StatusCode, Json<Vec<Machine>>)> {
    let made = whole(async move {
        let entry = daemon.machines.find(&name).await?;
        daemon.machines.clone_machine(&entry, request).await
    });
    let made = made.await?;
    Ok((StatusCode::CREATED, Json(made.iter().map(|entry| entry.describe()).collect())))
}
