//! What machines use: once, or again and again.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use berth_api::v1::error::ErrorBody;
use berth_api::v1::stats::Stats;
use futures_util::stream;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::failure::invalid;
use crate::machines::Machines;
use crate::server::Daemon;
use crate::server::extract::{Failure, MachinePath, Path, Query};
use crate::server::stream::JSON_LINES;

/// Seconds between two lines, unless the request says otherwise.
const INTERVAL: f64 = 1.0;
/// What it may say.
const INTERVALS: std::ops::RangeInclusive<f64> = 0.1..=3600.0;

/// Once, or how often.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct Often {
    /// Again and again, as lines of JSON, until the machine ends.
    #[serde(default)]
    stream: bool,
    /// Seconds between two; 1 when absent.
    #[param(minimum = 0.1, maximum = 3600)]
    interval: Option<f64>,
}

/// What all machines that run use, by name.
#[utoipa::path(get, path = "/stats", responses(
    (status = 200, body = Vec<Stats>),
    (status = "5XX", body = ErrorBody),
))]
pub(super) async fn all_stats(State(daemon): State<Daemon>) -> Result<Json<Vec<Stats>>, Failure> {
    let all = daemon.machines.all_stats().await?;
    Ok(Json(all.into_iter().filter_map(|(_, stats)| stats).collect()))
}

/// What a machine that runs uses. Rates are the differences of two answers.
#[utoipa::path(
    get,
    path = "/machines/{name}/stats",
    params(MachinePath, Often),
    responses(
        (status = 200, body = Stats, description = "with `stream` a line of JSON each"),
        (status = "4XX", body = ErrorBody),
    )
)]
pub(super) async fn stats(
    State(daemon): State<Daemon>,
    Path(name): Path<String>,
    Query(query): Query<Often>,
) -> Result<Response, Failure> {
    let seconds = query.interval.unwrap_or(INTERVAL);
    if !INTERVALS.contains(&seconds) {
        let (least, most) = (INTERVALS.start(), INTERVALS.end());
        let message = format!("interval={seconds}: {least} to {most} seconds are possible");
        return Err(invalid(message).into());
    }
    let entry = daemon.machines.find(&name).await?;
    let first = Machines::stats(&entry).await?;
    if !query.stream {
        return Ok(Json(first).into_response());
    }
    let pause = Duration::from_secs_f64(seconds);
    let lines = stream::unfold(Some(first), move |first| {
        let entry = Arc::clone(&entry);
        async move {
            let stats = match first {
                Some(first) => first,
                None => {
                    tokio::time::sleep(pause).await;
                    // It has ended.
                    Machines::stats(&entry).await.ok()?
                }
            };
            let mut line = serde_json::to_vec(&stats).unwrap_or_default();
            line.push(b'\n');
            Some((Ok::<_, io::Error>(Bytes::from(line)), None))
        }
    });
    Ok((JSON_LINES, Body::from_stream(lines)).into_response())
}
