//! Changes of what a machine is made of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::size::Size;
use crate::v1::machine::{Accel, Cpu, Net};
use crate::v1::network::Port;

/// `PATCH /machines/{name}`: what is to be otherwise; what is absent stays. It takes effect at the next
/// start.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ChangeMachine {
    /// Virtual processors, 1 to 16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(minimum = 1, maximum = 16)]
    pub cpus: Option<u8>,
    /// Memory, as `512M`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<Size>,
    /// What runs the guest's instructions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<Accel>,
    /// The processor that the guest sees.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Cpu>,
    /// Words added to the kernel command line, instead of those before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// The network card.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub net: Option<Net>,
    /// Ports of the host that lead to the guest, instead of those before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ports: Option<Vec<Port>>,
    /// Whether the guest has port 0xf4, which ends the machine.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub debug_exit: Option<bool>,
    /// Variables of the environment; `null` takes one away, those that are not named stay.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, Option<String>>,
}

impl ChangeMachine {
    /// Whether it asks for nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}
