//! From what went wrong to what the other side is told.

use std::error::Error;

use berth_api::v1::error::{ApiError, ErrorCode};
use berth_appliance::error::ApplianceError;
use berth_image::bootstrap::BootstrapError;
use berth_image::store::StoreError;

use crate::folder::FolderError;
use crate::snapshot::SnapshotError;

/// What an operation gives.
pub type Result<T> = std::result::Result<T, ApiError>;

/// Does what waits for files, on a thread for that.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|error| failed(&error))?
}

/// An error with a message.
pub fn error(code: ErrorCode, message: impl Into<String>) -> ApiError {
    ApiError { code, message: message.into() }
}

/// A request that makes no sense.
pub fn invalid(message: impl Into<String>) -> ApiError {
    error(ErrorCode::Invalid, message)
}

/// A state that does not allow what was asked for.
pub fn conflict(message: impl Into<String>) -> ApiError {
    error(ErrorCode::Conflict, message)
}

/// The host's refusal, with all causes.
pub fn failed(source: &dyn Error) -> ApiError {
    error(ErrorCode::Failed, chain(source))
}

/// An error and what caused it.
#[must_use]
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

impl From<FolderError> for ApiError {
    fn from(error: FolderError) -> Self {
        let code = match error {
            FolderError::Locked { .. } | FolderError::Exists { .. } => ErrorCode::Conflict,
            FolderError::File { .. } | FolderError::Config { .. } => ErrorCode::Failed,
        };
        Self { code, message: chain(&error) }
    }
}

impl From<SnapshotError> for ApiError {
    fn from(error: SnapshotError) -> Self {
        let code = match &error {
            SnapshotError::Folder(_) | SnapshotError::Disk(_) | SnapshotError::Altered { .. } => {
                ErrorCode::Failed
            }
            SnapshotError::Absent { .. } => ErrorCode::NotFound,
            SnapshotError::Unfit { .. } | SnapshotError::Many => ErrorCode::Conflict,
        };
        match error {
            SnapshotError::Folder(error) => error.into(),
            error => Self { code, message: chain(&error) },
        }
    }
}

/// An error of an appliance that is packed or unpacked.
pub fn of_appliance(error: &ApplianceError) -> ApiError {
    let code = match error {
        ApplianceError::Write(_) | ApplianceError::Source { .. } | ApplianceError::Place { .. } => {
            ErrorCode::Failed
        }
        _ => ErrorCode::Invalid,
    };
    ApiError { code, message: chain(error) }
}

/// An error of an image that is made.
pub fn of_bootstrap(error: &BootstrapError) -> ApiError {
    let code = match error {
        BootstrapError::Store(error) => return of_store(error),
        BootstrapError::Distribution(_)
        | BootstrapError::Suite(_)
        | BootstrapError::Package(_)
        | BootstrapError::DiskSize(_) => ErrorCode::Invalid,
        _ => ErrorCode::Failed,
    };
    ApiError { code, message: chain(error) }
}

/// An error of the store of images.
pub fn of_store(error: &StoreError) -> ApiError {
    let code = match error {
        StoreError::NoImage { .. } => ErrorCode::NotFound,
        StoreError::BadName { .. } => ErrorCode::Invalid,
        _ => ErrorCode::Failed,
    };
    ApiError { code, message: chain(error) }
}
