//! How requests fail.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// The body of every answer with a status of 400 and above.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// What went wrong.
    pub error: ApiError,
}

/// An error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// For programs.
    pub code: ErrorCode,
    /// For people: what failed, on what, why, and what to try.
    pub message: String,
}

/// The kinds of errors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// 400: the request is not understood, or what it asks for does not fit together.
    Invalid,
    /// 404: no such machine, image or path.
    NotFound,
    /// 409: it exists already, or its state does not allow that.
    Conflict,
    /// 409: something else has to end first; it can be asked for again.
    Busy,
    /// 500: the host refused something.
    Failed,
    /// 501: this is not there yet.
    Unsupported,
}

impl ErrorCode {
    /// The HTTP status that goes with it.
    #[must_use]
    pub fn status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::NotFound => 404,
            Self::Conflict | Self::Busy => 409,
            Self::Failed => 500,
            Self::Unsupported => 501,
        }
    }
}
