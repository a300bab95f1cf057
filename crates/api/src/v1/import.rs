//! Imports that broke off.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

/// An import that broke off and can go on: `POST /import?unfinished=ID&at=AT` takes the appliance from
/// its byte AT on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UnfinishedImport {
    /// What it is called here.
    pub id: Uuid,
    /// The appliance.
    pub appliance: Uuid,
    /// BLAKE3, in hexadecimal, over the beginning of the appliance with its manifest: one that has another
    /// cannot go on here.
    pub head: String,
    /// What the machine was to be called.
    pub name: String,
    /// Its memory was left out.
    pub without_state: bool,
    /// Bytes of the appliance that have come.
    pub at: u64,
    /// Bytes that they take on the disk.
    pub disk_bytes: u64,
    /// When the last of them came.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// It goes on at this moment.
    pub in_use: bool,
}
