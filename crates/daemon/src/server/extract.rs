//! Bodies and queries whose errors look like all others.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts};
use axum::response::{IntoResponse, Response};
use berth_api::v1::error::ApiError;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::failure::invalid;

/// An error as a handler gives it.
pub struct Failure(pub ApiError);

impl From<ApiError> for Failure {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

impl From<JsonRejection> for Failure {
    fn from(rejection: JsonRejection) -> Self {
        Self(invalid(rejection.body_text()))
    }
}

impl From<QueryRejection> for Failure {
    fn from(rejection: QueryRejection) -> Self {
        Self(invalid(rejection.body_text()))
    }
}

impl From<PathRejection> for Failure {
    fn from(rejection: PathRejection) -> Self {
        Self(invalid(rejection.body_text()))
    }
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        super::failure(self.0)
    }
}

/// A body of JSON.
#[derive(FromRequest)]
#[from_request(via(Json), rejection(Failure))]
pub struct Body<T>(pub T);

/// A query.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Failure))]
pub struct Query<T>(pub T);

/// What a path names.
#[derive(FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Failure))]
pub struct Path<T>(pub T);

/// Which machine.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "a description; handlers take the name alone")]
pub struct MachinePath {
    /// The machine's name.
    #[param(pattern = r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$")]
    name: String,
}

/// Which network.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "a description; handlers take the name alone")]
pub struct NetworkPath {
    /// The network's name.
    #[param(pattern = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$")]
    name: String,
}

/// Which image.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "a description; handlers take the name alone")]
pub struct ImagePath {
    /// The image's name; without its tag, the newest one of that distribution.
    #[param(pattern = r"^[a-z0-9][a-z0-9._-]*(:[a-z0-9][a-z0-9._-]*)?$")]
    name: String,
}

/// Which import that broke off.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "a description; handlers take the id alone")]
pub struct ImportPath {
    /// The import's id.
    id: uuid::Uuid,
}

/// Which of its snapshots.
#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Path)]
#[expect(dead_code, reason = "a description; handlers take both names at once")]
pub struct TagPath {
    /// The snapshot's tag.
    #[param(pattern = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$")]
    tag: String,
}
