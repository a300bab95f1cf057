//! Machines in networks: they join when they are made, get an interface when they are started, and leave
//! when they are removed. What networks are is `berth_net`'s to know.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use berth_api::v1::error::{ApiError, ErrorCode};
use berth_api::v1::machine::{Net, is_name};
use berth_api::v1::network::{self as wire, CreateNetwork, Member, Network, is_network_name};
use berth_net::error::NetError;
use berth_net::networks::{Description, Joining};
use berth_net::port::{Port, Transport};
use berth_net::store::mac_text;

use crate::failure::{Result, chain, invalid};
use crate::folder::hardware_address;
use crate::machines::{Entry, Machines};

/// An error of a network.
pub(super) fn of_net(error: &NetError) -> ApiError {
    let code = match error {
        NetError::Absent(_) => ErrorCode::NotFound,
        NetError::Exists(_) | NetError::InUse { .. } | NetError::Full { .. } => ErrorCode::Conflict,
        NetError::Taken { .. } => ErrorCode::Conflict,
        NetError::Invalid(_) => ErrorCode::Invalid,
        _ => ErrorCode::Failed,
    };
    ApiError { code, message: chain(error) }
}

fn port(port: &wire::Port) -> Port {
    Port {
        address: port.address,
        host: port.host,
        guest: port.guest,
        transport: match port.protocol {
            wire::Protocol::Tcp => Transport::Tcp,
            wire::Protocol::Udp => Transport::Udp,
        },
    }
}

fn wire_port(port: &Port) -> wire::Port {
    wire::Port {
        address: port.address,
        host: port.host,
        guest: port.guest,
        protocol: match port.transport {
            Transport::Tcp => wire::Protocol::Tcp,
            Transport::Udp => wire::Protocol::Udp,
        },
    }
}

fn described(description: Description) -> Network {
    let Description { network, bridge, ports } = description;
    let members = network.members.into_iter().map(|member| Member {
        ports: ports
            .get(&member.id)
            .map(|ports| ports.iter().map(wire_port).collect())
            .unwrap_or_default(),
        name: member.name,
        address: member.address,
        mac: mac_text(member.mac),
    });
    Network {
        name: network.name,
        subnet: network.subnet.to_string(),
        gateway: network.subnet.gateway(),
        internal: network.internal,
        bridge,
        created: network.created,
        members: members.collect(),
    }
}

/// What a machine is in a network.
fn joining(entry: &Entry, network: &str) -> Joining {
    Joining {
        network: network.to_owned(),
        id: entry.id(),
        name: entry.name(),
        mac: hardware_address(entry.id()),
    }
}

impl Machines {
    /// All networks, by name.
    pub async fn networks(&self) -> Vec<Network> {
        self.networks.list().await.into_iter().map(described).collect()
    }

    /// A network.
    ///
    /// # Errors
    /// There is none.
    pub async fn network(&self, name: &str) -> Result<Network> {
        self.networks.find(name).await.map(described).map_err(|error| of_net(&error))
    }

    /// Creates a network.
    ///
    /// # Errors
    /// The name or the subnet is taken, or the host refuses something; then there is nothing of it.
    pub async fn create_network(&self, request: CreateNetwork) -> Result<Network> {
        let CreateNetwork { name, subnet, internal } = request;
        if !is_network_name(&name) {
            return Err(invalid(format!(
                "`{name}` is no name of a network: 1 to {} letters in lower case, digits and `-`, neither \
                 first nor last; not `user`, `none` or `host`",
                wire::NETWORK_NAME_MAX
            )));
        }
        let subnet =
            subnet.map(|subnet| subnet.parse()).transpose().map_err(|why: String| invalid(why))?;
        let made = self.networks.create(&name, subnet, internal).await;
        made.map(described).map_err(|error| of_net(&error))
    }

    /// Removes a network.
    ///
    /// # Errors
    /// There is none, a machine is in it, or the host refuses something.
    pub async fn remove_network(&self, name: &str) -> Result<()> {
        self.networks.remove(name).await.map_err(|error| of_net(&error))
    }

    /// Refuses a network that is not there.
    pub(super) async fn check_network(&self, net: &Net) -> Result<()> {
        match net {
            Net::Network(name) => self.network(name).await.map(|_| ()),
            _ => Ok(()),
        }
    }

    /// Gives a machine that does not run an address in the network it is to be in, and in no other.
    pub(super) async fn join_network(&self, entry: &Entry) -> Result<()> {
        let net = entry.live().config.machine.net.clone();
        let Net::Network(name) = net else {
            self.leave_network(entry).await;
            return Ok(());
        };
        let joined = self.networks.join(&joining(entry, &name)).await;
        entry.live().address = Some(joined.map_err(|error| of_net(&error))?);
        Ok(())
    }

    /// The same for several.
    pub(super) async fn join_all(&self, entries: &[Arc<Entry>]) -> Result<()> {
        for entry in entries {
            self.join_network(entry).await?;
        }
        Ok(())
    }

    /// A machine is in no network any more.
    pub(super) async fn leave_network(&self, entry: &Entry) {
        entry.live().address = None;
        if let Err(error) = self.networks.leave(entry.id()).await {
            tracing::error!(machine = entry.name(), error = chain(&error), "its address is kept");
        }
    }

    /// A machine has another name by now.
    pub(super) async fn renamed_in_network(&self, entry: &Entry, name: &str) {
        if let Err(error) = self.networks.rename(entry.id(), name).await {
            tracing::error!(
                machine = name,
                error = chain(&error),
                "its name in its network is as before"
            );
        }
    }

    /// The interface of a machine that is about to start, if it is in a network.
    pub(super) async fn plug(&self, entry: &Entry) -> Result<Option<OwnedFd>> {
        self.join_network(entry).await?;
        let machine = entry.live().config.machine.clone();
        let Net::Network(name) = machine.net else { return Ok(None) };
        let ports: Vec<_> = machine.ports.iter().map(port).collect();
        let plugged = self.networks.plug(&joining(entry, &name), &ports).await;
        plugged.map(Some).map_err(|error| {
            let mut error = of_net(&error);
            error.message = format!("{} cannot be started: {}", entry.name(), error.message);
            error
        })
    }

    /// A machine runs: one that this daemon has started, or has found.
    pub(super) async fn found_in(&self, entry: &Entry, net: &Net, ports: &[wire::Port]) {
        let Net::Network(name) = net else { return };
        let joining = joining(entry, name);
        let ports: Vec<_> = ports.iter().map(port).collect();
        match self.networks.found(&joining, &ports).await {
            Ok(address) => entry.live().address = Some(address),
            Err(error) => {
                let error = chain(&error);
                tracing::error!(
                    machine = entry.name(),
                    error,
                    "its network is not as it should be"
                );
            }
        }
    }

    /// A machine has ended, or was not started. What it is in from now on its `vm.toml` says.
    pub(super) async fn unplug(&self, entry: &Entry) {
        if let Err(error) = self.networks.down(entry.id()).await {
            tracing::error!(
                machine = entry.name(),
                error = chain(&error),
                "its ports are published on"
            );
        }
        if let Err(error) = self.join_network(entry).await {
            tracing::warn!(machine = entry.name(), error = error.message, "it has no address");
        }
    }

    /// Whether there is a folder that is not known as a machine.
    fn has_unknown(&self) -> bool {
        let all = self.all();
        let entries = std::fs::read_dir(&self.directory).into_iter().flatten().flatten();
        let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.any(|name| is_name(&name) && !all.contains_key(&name))
    }

    /// Takes machines out of networks that are not there any more, or elsewhere; and the others in.
    pub(super) async fn settle_networks(&self) {
        let entries: Vec<_> = self.all().values().cloned().collect();
        let mut members = BTreeMap::new();
        for entry in &entries {
            let live = entry.live();
            let running = live.run.as_ref().map(|run| run.status.net.clone());
            if let Net::Network(name) = running.unwrap_or(live.config.machine.net.clone()) {
                members.insert(entry.id(), name);
            }
        }
        // A folder that was not understood may be that of a machine that runs.
        let kept = match self.has_unknown() {
            true => Ok(()),
            false => self.networks.keep_only(&members).await,
        };
        if let Err(error) = kept {
            tracing::error!(error = chain(&error), "addresses of machines that are gone are kept");
        }
        for entry in entries.iter().filter(|entry| members.contains_key(&entry.id())) {
            let running = entry.live().run.as_ref().map(|run| run.status.clone());
            if let Some(status) = running {
                // It is looked for on a task of its own, too; requests see it as it is.
                self.found_in(entry, &status.net, &status.ports).await;
            } else if let Err(error) = self.join_network(entry).await {
                tracing::error!(machine = entry.name(), error = error.message, "it has no address");
            }
        }
    }
}
