//! What the words about the network amount to.

use std::path::Path;

use berth_api::v1::machine as kept;
use berth_api::v1::network::{Port, Protocol};
use berth_vmm::virtio::net::forward::{Forward, Transport};

use crate::args::machine::{MachineArgs, NetArg};
use crate::plan::{NetPlan, PlanError, has_program};

/// The card of a kept machine.
pub(super) fn kept(net: &kept::Net) -> NetArg {
    match net {
        kept::Net::User => NetArg::User,
        kept::Net::Tap(name) => NetArg::Tap(name.clone()),
        kept::Net::Network(name) => NetArg::Network(name.clone()),
        kept::Net::None => NetArg::None,
    }
}

/// The network card, with what it needs on this host looked for.
pub(super) fn plan(
    machine: &MachineArgs,
    has_image: bool,
    is_kept: bool,
) -> Result<NetPlan, PlanError> {
    let ports: Vec<Forward> = machine.publish.iter().map(forward).collect();
    let user = || NetPlan::User(ports.clone());
    let plan = match &machine.net {
        Some(NetArg::None) => NetPlan::Absent,
        Some(NetArg::Tap(name)) if Path::new("/sys/class/net").join(name).exists() => {
            NetPlan::Tap(name.clone())
        }
        Some(NetArg::Tap(name)) => return Err(PlanError::NoInterface(name.clone())),
        Some(NetArg::Network(_)) if is_kept => NetPlan::Handed,
        Some(NetArg::Network(name)) => {
            return Err(PlanError::Usage(format!(
                "--net {name}: only a machine that is kept can be in a network; try `berth vm create \
                 --net {name}`"
            )));
        }
        Some(NetArg::User) if has_program("passt") => user(),
        Some(NetArg::User) => return Err(PlanError::NoPasst),
        None if !has_image && ports.is_empty() => NetPlan::Absent,
        None if has_program("passt") => user(),
        None if !ports.is_empty() => return Err(PlanError::NoPasst),
        None => {
            eprintln!("berth: the guest has no network, since passt is not installed");
            NetPlan::Absent
        }
    };
    check_ports(machine)?;
    Ok(plan)
}

/// Refuses ports that could lead nowhere.
pub(super) fn check_ports(machine: &MachineArgs) -> Result<(), PlanError> {
    let nowhere = matches!(machine.net, Some(NetArg::None | NetArg::Tap(_)));
    match nowhere && !machine.publish.is_empty() {
        true => Err(PlanError::Usage("--publish needs `--net user` or a network".into())),
        false => Ok(()),
    }
}

fn forward(port: &Port) -> Forward {
    Forward {
        address: port.address,
        host: port.host,
        guest: port.guest,
        transport: match port.protocol {
            Protocol::Tcp => Transport::Tcp,
            Protocol::Udp => Transport::Udp,
        },
    }
}
