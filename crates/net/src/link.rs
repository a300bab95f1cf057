//! Interfaces, addresses and routes, by netlink (rtnetlink(7)).

use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::AddressAttribute;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};
use rtnetlink::{Error, Handle, LinkBridge, LinkUnspec, RouteMessageBuilder};

use uuid::Uuid;

use crate::error::{NetError, Result};
use crate::subnet::Subnet;

/// Error numbers, as messages have them.
const NLA_EPERM: i32 = -1;
const NLA_ENODEV: i32 = -19;
const NLA_EEXIST: i32 = -17;

/// A connection to the kernel.
#[derive(Clone, Debug)]
pub(crate) struct Links {
    handle: Handle,
}

fn failed(action: &'static str, on: &str) -> impl FnOnce(Error) -> NetError {
    let on = on.to_owned();
    move |source| match code(&source) {
        NLA_EPERM => NetError::Privilege("changing interfaces of the host"),
        _ => NetError::Link { action, on, source },
    }
}

/// The kernel's error number, negative; 0 for other errors.
fn code(error: &Error) -> i32 {
    match error {
        Error::NetlinkError(message) => message.raw_code(),
        _ => 0,
    }
}

fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}

fn is_bridge(link: &LinkMessage) -> bool {
    link.attributes.iter().any(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => infos.contains(&LinkInfo::Kind(InfoKind::Bridge)),
        _ => false,
    })
}

impl Links {
    /// Connects; needs a runtime of tokio.
    pub(crate) fn open() -> Result<Self> {
        let opened = rtnetlink::new_connection();
        let (connection, handle, _) = opened.map_err(|source| NetError::File {
            action: "opening",
            path: "a netlink socket".into(),
            source,
        })?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    async fn find(&self, interface: &str) -> Result<Option<u32>> {
        let mut found = self.handle.link().get().match_name(interface.to_owned()).execute();
        match found.try_next().await {
            Ok(link) => Ok(link.map(|link| link.header.index)),
            Err(error) if code(&error) == NLA_ENODEV => Ok(None),
            Err(error) => Err(failed("finding", interface)(error)),
        }
    }

    async fn index(&self, interface: &str) -> Result<u32> {
        let found = self.find(interface).await?;
        found.ok_or_else(|| NetError::Gone(interface.to_owned()))
    }

    /// The bridges whose names begin so.
    pub(crate) async fn bridges(&self, prefix: &str) -> Result<Vec<String>> {
        let all: Vec<_> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(failed("listing", "interfaces"))?;
        let bridges = all.iter().filter(|link| is_bridge(link)).filter_map(name);
        Ok(bridges.filter(|name| name.starts_with(prefix)).map(str::to_owned).collect())
    }

    /// Makes a bridge if there is none of that name; whether it did. Its hardware address is made of `id`:
    /// otherwise it would be the least of its ports', and change with them.
    pub(crate) async fn make_bridge(&self, bridge: &str, id: Uuid) -> Result<bool> {
        if self.find(bridge).await?.is_some() {
            return Ok(false);
        }
        let mut address = vec![0x02];
        address.extend(id.as_bytes().iter().take(5));
        let new = LinkBridge::new(bridge).address(address).build();
        let made = self.handle.link().add(new).execute().await;
        made.map_err(failed("making the bridge", bridge))?;
        Ok(true)
    }

    /// Gives an interface its address and turns it on.
    pub(crate) async fn set_up(
        &self,
        interface: &str,
        address: Ipv4Addr,
        net: Subnet,
    ) -> Result<()> {
        let index = self.index(interface).await?;
        let mut add = self.handle.address().add(index, IpAddr::V4(address), net.prefix());
        let message = add.message_mut();
        message.attributes.push(AddressAttribute::Broadcast(net.broadcast()));
        match add.execute().await {
            Err(error) if code(&error) != NLA_EEXIST => {
                return Err(failed("giving an address to", interface)(error));
            }
            _ => {}
        }
        let up = LinkUnspec::new_with_index(index).up().build();
        let turned = self.handle.link().change(up).execute().await;
        turned.map_err(failed("turning on", interface))
    }

    /// Puts an interface into a bridge and turns it on. One that is not there is none that has to be.
    pub(crate) async fn put_into(&self, interface: &str, bridge: &str) -> Result<()> {
        let Some(index) = self.find(interface).await? else { return Ok(()) };
        let into = self.index(bridge).await?;
        let change = LinkUnspec::new_with_index(index).controller(into).up().build();
        let put = self.handle.link().change(change).execute().await;
        put.map_err(failed("putting into its bridge", interface))
    }

    /// Removes an interface, if it is there.
    pub(crate) async fn remove(&self, interface: &str) -> Result<()> {
        let Some(index) = self.find(interface).await? else { return Ok(()) };
        match self.handle.link().del(index).execute().await {
            Err(error) if code(&error) != NLA_ENODEV => Err(failed("removing", interface)(error)),
            _ => Ok(()),
        }
    }

    /// The IPv4 subnets that the host knows a way to, but the way to everything.
    pub(crate) async fn routes(&self) -> Result<Vec<Subnet>> {
        let all = RouteMessageBuilder::<Ipv4Addr>::new().build();
        let routes: Vec<_> = self
            .handle
            .route()
            .get(all)
            .execute()
            .try_collect()
            .await
            .map_err(failed("listing", "routes"))?;
        let mut subnets = Vec::new();
        for route in routes {
            let prefix = route.header.destination_prefix_length;
            for attribute in &route.attributes {
                if let RouteAttribute::Destination(RouteAddress::Inet(address)) = attribute
                    && route.header.address_family == AddressFamily::Inet
                    && prefix > 0
                {
                    subnets.push(Subnet::around(*address, prefix));
                }
            }
        }
        Ok(subnets)
    }
}
