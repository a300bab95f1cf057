//! Changes of what a machine is made of.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::processors::Processors;
use crate::size::Size;
use crate::v1::machine::{Accel, Cpu, Machine, Net};
use crate::v1::network::Port;

/// `PATCH /machines/{name}`: what is to be otherwise; what is absent stays. A machine that runs is changed
/// at once where that is possible (limits; processors and memory, within what it was started with), and else when
/// it is started again.
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
    /// Processor time that its process may have at most; 0: no limit any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_limit: Option<Processors>,
    /// Memory that its process may have at most; 0: no limit any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<Size>,
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

/// What became of a [`ChangeMachine`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChangedMachine {
    /// The machine.
    #[serde(flatten)]
    pub machine: Machine,
    /// What is not so yet, but will be when it is started again. Nothing for one that does not run.
    #[serde(default)]
    pub later: Vec<Later>,
}

/// Something of a machine that runs that could not be changed at once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Later {
    /// What: the name of a field of [`ChangeMachine`].
    pub what: String,
    /// Why not at once, for people.
    pub why: String,
}
