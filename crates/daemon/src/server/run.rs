//! Machines that are there as long as the connection by which they were asked for.

use std::io;
use std::sync::Arc;

use axum::extract::{FromRequest, Request, State};
use axum::response::Response;
use berth_api::v1::error::ErrorBody;
use berth_api::v1::machine::Machine;
use berth_api::v1::routes::UPGRADE_RUN;
use berth_api::v1::run::RunMachine;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::machines::{Entry, Machines};
use crate::server::Daemon;
use crate::server::extract::{Body, Failure};
use crate::server::machines::whole;
use crate::server::stream::{asks_for, json_line, switching};

/// Creates a machine and starts it. Upgrade to `berth-run`: lines of JSON, first a `Machine`, and when it
/// has ended an `Ended`; then it is removed, and before if the connection ends.
#[utoipa::path(post, path = "/run", request_body = RunMachine, responses(
    (status = 101, description = "lines of JSON"),
    (status = "4XX", body = ErrorBody),
    (status = "5XX", body = ErrorBody),
))]
pub(super) async fn run(
    State(daemon): State<Daemon>,
    mut request: Request,
) -> Result<Response, Failure> {
    asks_for(request.headers(), UPGRADE_RUN)?;
    let upgraded = hyper::upgrade::on(&mut request);
    let Body(asked) = Body::<RunMachine>::from_request(request, &daemon).await?;
    let begun = async move {
        let entry = daemon.machines.run(asked).await?;
        tokio::spawn(stay(daemon.machines, entry, upgraded));
        Ok(())
    };
    whole(begun).await?;
    Ok(switching(UPGRADE_RUN))
}

/// Stays with a machine until it has ended, or whoever asked for it has gone.
async fn stay(machines: Arc<Machines>, entry: Arc<Entry>, upgraded: OnUpgrade) {
    let Ok(client) = upgraded.await else {
        machines.until_over(&entry, std::future::ready(())).await;
        return;
    };
    let (mut from, mut to) = tokio::io::split(TokioIo::new(client));
    let machine: Machine = entry.describe();
    let told = tell(&mut to, &machine).await;
    let gone = async {
        let mut nothing = [0; 64];
        while told.is_ok() && matches!(from.read(&mut nothing).await, Ok(count) if count > 0) {}
    };
    if let Some(ended) = machines.until_over(&entry, gone).await {
        // It may have gone meanwhile.
        let _ = tell(&mut to, &ended).await;
    }
}

async fn tell(to: &mut (impl AsyncWrite + Unpin), what: &impl Serialize) -> io::Result<()> {
    to.write_all(&json_line(what)).await?;
    to.flush().await
}
