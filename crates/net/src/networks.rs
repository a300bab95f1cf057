//! The networks there are, and what is done with them. One operation at a time.
//!
//! ```text
//!            join                 plug: tap in the bridge, ports
//! stranger ────────► member, down ─────────────────────────────► member, up
//!     ▲                │  ▲                                        │
//!     └──── leave ─────┘  └──────────── down: its tap is gone ◄────┘
//! ```
//!
//! A member keeps its address from `join` to `leave`, which its network's file has. Who is up is not stored:
//! whoever keeps members says it again to a new daemon, by `found`. Whatever is on the host is brought to
//! what is to be: what is missing is made, what is of this state directory and not wanted is removed.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use tokio::sync::Mutex;
use tokio::time::sleep;
use uuid::Uuid;

use crate::error::{NetError, Result};
use crate::limits::{MEMBERS_MAX, NETWORKS_MAX};
use crate::link::Links;
use crate::name::RootId;
use crate::port::Port;
use crate::proxy::Proxy;
use crate::rules::{self, Net};
use crate::serve::Servers;
use crate::store::{Member, Network, Store, is_label};
use crate::subnet::Subnet;
use crate::view::{Host, Mac, Shared, View};
use crate::{nft, sysctl, tap};

/// How long the tap interface of a member that has just gone down may still be there.
const TAP_TIME: Duration = Duration::from_secs(3);
const TAP_POLL: Duration = Duration::from_millis(10);

/// All networks of a state directory.
#[derive(Debug)]
pub struct Networks {
    root: RootId,
    store: Store,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    all: BTreeMap<String, Live>,
    /// Each file of a network was understood; bridges of others may belong to one that was not.
    is_whole: bool,
    links: Option<Links>,
}

#[derive(Debug)]
struct Live {
    file: Network,
    bridge: String,
    view: Shared,
    servers: Option<Servers>,
    up: BTreeMap<Uuid, Up>,
}

/// A member that is up.
#[derive(Debug)]
struct Up {
    ports: Vec<Port>,
    _proxy: Option<Proxy>,
}

/// Who is to be a member.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Joining {
    /// In which network.
    pub network: String,
    /// Its identity.
    pub id: Uuid,
    /// Its name: a single label.
    pub name: String,
    /// Its hardware address.
    pub mac: Mac,
}

/// What there is of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    /// As it is kept.
    pub network: Network,
    /// Its bridge.
    pub bridge: String,
    /// The ports of the host that lead to members now.
    pub ports: BTreeMap<Uuid, Vec<Port>>,
}

impl Live {
    fn new(root: &RootId, file: Network) -> Self {
        let view = Shared::new(view(&file, &BTreeMap::new()));
        let bridge = root.bridge(file.id);
        Self { file, bridge, view, servers: None, up: BTreeMap::new() }
    }

    fn show(&self) {
        self.view.set(view(&self.file, &self.up));
    }

    fn address(&self, id: Uuid) -> Option<Ipv4Addr> {
        self.file.members.iter().find(|member| member.id == id).map(|member| member.address)
    }

    fn net(&self) -> Net {
        let mut published = Vec::new();
        for (id, up) in &self.up {
            if let Some(address) = self.address(*id) {
                published.extend(up.ports.iter().map(|port| (port.clone(), address)));
            }
        }
        Net {
            bridge: self.bridge.clone(),
            subnet: self.file.subnet,
            internal: self.file.internal,
            published,
        }
    }
}

fn view(file: &Network, up: &BTreeMap<Uuid, Up>) -> View {
    let hosts = file.members.iter().map(|member| Host {
        name: member.name.clone(),
        mac: member.mac,
        address: member.address,
        is_up: up.contains_key(&member.id),
    });
    View {
        network: file.name.clone(),
        subnet: file.subnet,
        internal: file.internal,
        hosts: hosts.collect(),
    }
}

impl Inner {
    fn links(&mut self) -> Result<Links> {
        if let Some(links) = &self.links {
            return Ok(links.clone());
        }
        let links = Links::open()?;
        self.links = Some(links.clone());
        Ok(links)
    }

    fn live(&mut self, name: &str) -> Result<&mut Live> {
        self.all.get_mut(name).ok_or_else(|| NetError::Absent(name.to_owned()))
    }
}

impl Networks {
    /// The networks of a state directory, which are brought up if there are any. What fails of that is
    /// logged, and tried again by the next operation that needs it.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub async fn open(root: &Path) -> Result<Self> {
        let real = fs::canonicalize(root).map_err(crate::error::file("finding", root))?;
        let (root, store) = (RootId::of(&real), Store::of(&real));
        let (found, wrong) = store.read()?;
        let is_whole = wrong.is_empty();
        for error in wrong {
            tracing::error!(error = &error as &dyn std::error::Error, "a network is left out");
        }
        let live = found.into_iter().map(|file| (file.name.clone(), Live::new(&root, file)));
        let inner = Inner { all: live.collect(), links: None, is_whole };
        let networks = Self { root, store, inner: Mutex::new(inner) };
        if networks.store.directory().exists() {
            let mut inner = networks.inner.lock().await;
            if let Err(error) = networks.settle(&mut inner).await {
                let error = &error as &dyn std::error::Error;
                tracing::error!(error, "the networks are not as they should be");
            }
            drop(inner);
        }
        Ok(networks)
    }

    /// Brings the host to what is to be.
    async fn settle(&self, inner: &mut Inner) -> Result<()> {
        let links = inner.links()?;
        for bridge in links.bridges(&self.root.bridges()).await? {
            if inner.is_whole && inner.all.values().all(|live| live.bridge != bridge) {
                links.remove(&bridge).await?;
            }
        }
        self.apply(inner).await?;
        let names: Vec<_> = inner.all.keys().cloned().collect();
        for name in names {
            self.realise(inner, &name).await?;
        }
        Ok(())
    }

    /// Brings rules and forwarding to what is to be.
    async fn apply(&self, inner: &Inner) -> Result<()> {
        let nets: Vec<_> = inner.all.values().map(Live::net).collect();
        if inner.is_whole && nets.iter().all(|net| net.internal) {
            sysctl::forward_no_more(self.store.directory())?;
        }
        let table = self.root.table();
        match nets.is_empty() {
            true => nft::apply(&rules::removal(&table)).await,
            false => nft::apply(&rules::commands(&table, &nets)).await,
        }
    }

    /// Makes what a network has on the host, if it is not there.
    async fn realise(&self, inner: &mut Inner, name: &str) -> Result<()> {
        let links = inner.links()?;
        let live = inner.live(name)?;
        let (bridge, subnet) = (live.bridge.clone(), live.file.subnet);
        if links.make_bridge(&bridge, live.file.id).await? {
            // They listened to one that is gone.
            live.servers = None;
        }
        sysctl::without_ipv6(&bridge)?;
        links.set_up(&bridge, subnet.gateway(), subnet).await?;
        for id in live.up.keys() {
            links.put_into(&self.root.tap(*id), &bridge).await?;
        }
        if !live.file.internal {
            sysctl::forward(self.store.directory())?;
        }
        if live.servers.is_none() {
            live.servers = Some(Servers::start(name, &bridge, &live.view).await?);
        }
        Ok(())
    }

    /// All networks, by name.
    pub async fn list(&self) -> Vec<Description> {
        self.inner.lock().await.all.values().map(describe).collect()
    }

    /// A network.
    ///
    /// # Errors
    /// [`NetError::Absent`].
    pub async fn find(&self, name: &str) -> Result<Description> {
        self.inner.lock().await.live(name).map(|live| describe(live))
    }

    /// Creates a network; without a subnet it gets one that nothing of the host uses.
    ///
    /// # Errors
    /// The name or the subnet is taken, or the host refuses something; then there is nothing of it.
    pub async fn create(
        &self,
        name: &str,
        subnet: Option<Subnet>,
        internal: bool,
    ) -> Result<Description> {
        let mut inner = self.inner.lock().await;
        if !is_label(name) || name.chars().any(|c| c.is_ascii_uppercase()) {
            return Err(NetError::Invalid(format!("`{name}` is no name of a network")));
        }
        // One whose file is not understood is there, too.
        if inner.all.contains_key(name) || self.store.path(name).exists() {
            return Err(NetError::Exists(name.to_owned()));
        }
        if inner.all.len() >= NETWORKS_MAX {
            return Err(NetError::Invalid(format!("{NETWORKS_MAX} networks are the most")));
        }
        let links = inner.links()?;
        let mut taken = links.routes().await?;
        taken.extend(inner.all.values().map(|live| live.file.subnet));
        let subnet = choose(subnet, &taken)?;
        let mut id = Uuid::new_v4();
        while inner.all.values().any(|live| live.bridge == self.root.bridge(id)) {
            id = Uuid::new_v4();
        }
        let created = Timestamp::now();
        let members = Vec::new();
        let file = Network { name: name.to_owned(), id, created, subnet, internal, members };
        self.store.write(&file)?;
        inner.all.insert(name.to_owned(), Live::new(&self.root, file));
        let mut made = self.apply(&inner).await;
        if made.is_ok() {
            made = self.realise(&mut inner, name).await;
        }
        if let Err(error) = made {
            if let Err(error) = self.take_away(&mut inner, name).await {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(network = name, error, "something is left of it");
            }
            return Err(error);
        }
        inner.live(name).map(|live| describe(live))
    }

    /// Removes a network that has no members.
    ///
    /// # Errors
    /// [`NetError::InUse`], or the host refuses something: then the next start removes what is left.
    pub async fn remove(&self, name: &str) -> Result<()> {
        let mut inner = self.inner.lock().await;
        let members = &inner.live(name)?.file.members;
        if !members.is_empty() {
            let mut names: Vec<_> =
                members.iter().take(4).map(|member| member.name.as_str()).collect();
            if members.len() > names.len() {
                names.push("others");
            }
            let (name, members) = (name.to_owned(), names.join(", "));
            return Err(NetError::InUse { name, members });
        }
        self.take_away(&mut inner, name).await
    }

    async fn take_away(&self, inner: &mut Inner, name: &str) -> Result<()> {
        // First what says that it is to be: from here on a start removes the rest.
        self.store.remove(name)?;
        let Some(live) = inner.all.remove(name) else { return Ok(()) };
        let links = inner.links()?;
        drop(live.servers);
        let removed = links.remove(&live.bridge).await;
        self.apply(inner).await?;
        removed?;
        if inner.all.is_empty() {
            // If nothing else is in it.
            let _ = fs::remove_dir(self.store.directory());
        }
        Ok(())
    }

    /// Gives somebody an address in a network, and takes him out of others; whoever is in it keeps his.
    ///
    /// # Errors
    /// There is no such network, or no address left in it.
    pub async fn join(&self, joining: &Joining) -> Result<Ipv4Addr> {
        self.join_in(&mut *self.inner.lock().await, joining)
    }

    fn join_in(&self, inner: &mut Inner, joining: &Joining) -> Result<Ipv4Addr> {
        if !is_label(&joining.name) {
            let name = &joining.name;
            return Err(NetError::Invalid(format!(
                "`{name}` is no name for a member of a network"
            )));
        }
        inner.live(&joining.network)?;
        self.leave_but(inner, joining.id, Some(&joining.network))?;
        let live = inner.live(&joining.network)?;
        let mut file = live.file.clone();
        let known = file.members.iter_mut().find(|member| member.id == joining.id);
        let address = match known {
            Some(member) => {
                (member.name, member.mac) = (joining.name.clone(), joining.mac);
                member.address
            }
            None => {
                let taken: Vec<_> = file.members.iter().map(|member| member.address).collect();
                let free = file.subnet.free(&taken).filter(|_| taken.len() < MEMBERS_MAX);
                let Some(address) = free else {
                    let (name, subnet) = (file.name, file.subnet.to_string());
                    return Err(NetError::Full { name, subnet });
                };
                let (id, name, mac) = (joining.id, joining.name.clone(), joining.mac);
                file.members.push(Member { id, name, mac, address });
                file.members.sort_by(|a, b| a.name.cmp(&b.name));
                address
            }
        };
        self.change(live, file)?;
        Ok(address)
    }

    /// Takes somebody out of all networks. He is down.
    ///
    /// # Errors
    /// A file cannot be written.
    pub async fn leave(&self, id: Uuid) -> Result<()> {
        self.leave_but(&mut *self.inner.lock().await, id, None)
    }

    fn leave_but(&self, inner: &mut Inner, id: Uuid, stays: Option<&str>) -> Result<()> {
        for live in inner.all.values_mut() {
            if stays != Some(live.file.name.as_str()) && live.address(id).is_some() {
                let mut file = live.file.clone();
                file.members.retain(|member| member.id != id);
                live.up.remove(&id);
                self.change(live, file)?;
            }
        }
        Ok(())
    }

    /// Writes a network's file if it is to be another.
    fn change(&self, live: &mut Live, file: Network) -> Result<()> {
        if file != live.file {
            self.store.write(&file)?;
            live.file = file;
        }
        live.show();
        Ok(())
    }

    /// Takes all out of networks who are not in them by this list of identities and networks.
    ///
    /// # Errors
    /// A file cannot be written.
    pub async fn keep_only(&self, members: &BTreeMap<Uuid, String>) -> Result<()> {
        let mut inner = self.inner.lock().await;
        for live in inner.all.values_mut() {
            let mut file = live.file.clone();
            let name = file.name.clone();
            file.members.retain(|member| members.get(&member.id) == Some(&name));
            self.change(live, file)?;
        }
        Ok(())
    }

    /// Gives a member another name, if it is one.
    ///
    /// # Errors
    /// A file cannot be written.
    pub async fn rename(&self, id: Uuid, name: &str) -> Result<()> {
        let mut inner = self.inner.lock().await;
        for live in inner.all.values_mut() {
            let mut file = live.file.clone();
            if let Some(member) = file.members.iter_mut().find(|member| member.id == id) {
                name.clone_into(&mut member.name);
                self.change(live, file)?;
            }
        }
        Ok(())
    }

    /// Makes a tap interface in a network, and publishes ports: the member is up, as long as somebody has
    /// the interface. It is a member before if it was none.
    ///
    /// # Errors
    /// A port is taken, or the host refuses something; then the member is down.
    pub async fn plug(&self, joining: &Joining, ports: &[Port]) -> Result<OwnedFd> {
        let mut inner = self.inner.lock().await;
        let address = self.join_in(&mut inner, joining)?;
        let (name, id) = (joining.network.as_str(), joining.id);
        let live = inner.live(name)?;
        check_ports(&live.file, ports)?;
        self.realise(&mut inner, name).await?;
        let proxy = Some(Proxy::start(ports, address)?);
        let own = self.root.tap(id);
        let tap = make_tap(&own).await?;
        sysctl::without_ipv6(&own)?;
        let (links, live) = (inner.links()?, inner.live(name)?);
        let bridge = live.bridge.clone();
        links.put_into(&own, &bridge).await?;
        live.up.insert(id, Up { ports: ports.to_vec(), _proxy: proxy });
        live.show();
        if let Err(error) = self.apply(&inner).await {
            let live = inner.live(name)?;
            live.up.remove(&id);
            live.show();
            return Err(error);
        }
        Ok(tap)
    }

    /// A member that was up before this began; gives its address. One that is known to be up stays as it is.
    ///
    /// # Errors
    /// As [`Self::plug`]; a port that is taken is one that this daemon does not listen at.
    pub async fn found(&self, joining: &Joining, ports: &[Port]) -> Result<Ipv4Addr> {
        let mut inner = self.inner.lock().await;
        let (name, id) = (joining.network.as_str(), joining.id);
        let is_up = inner.live(name)?.up.contains_key(&id);
        let address = self.join_in(&mut inner, joining)?;
        if is_up {
            return Ok(address);
        }
        let proxy = match Proxy::start(ports, address) {
            Ok(proxy) => Some(proxy),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::error!(member = joining.name, error, "ports lead to it from outside only");
                None
            }
        };
        let live = inner.live(name)?;
        live.up.insert(id, Up { ports: ports.to_vec(), _proxy: proxy });
        live.show();
        self.realise(&mut inner, name).await?;
        self.apply(&inner).await?;
        Ok(address)
    }

    /// A member's interface is gone: so are its ports and its name. It keeps its address.
    ///
    /// # Errors
    /// The rules cannot be changed.
    pub async fn down(&self, id: Uuid) -> Result<()> {
        let mut inner = self.inner.lock().await;
        let mut published = false;
        for live in inner.all.values_mut() {
            if let Some(up) = live.up.remove(&id) {
                published |= !up.ports.is_empty();
                live.show();
            }
        }
        match published {
            true => self.apply(&inner).await,
            false => Ok(()),
        }
    }
}

fn describe(live: &Live) -> Description {
    let ports = live.up.iter().map(|(id, up)| (*id, up.ports.clone()));
    Description { network: live.file.clone(), bridge: live.bridge.clone(), ports: ports.collect() }
}

fn check_ports(network: &Network, ports: &[Port]) -> Result<()> {
    match ports.first() {
        Some(port) if network.internal => Err(NetError::Invalid(format!(
            "cannot publish {port}: the network {} is internal, and nothing leads into it",
            network.name
        ))),
        _ => Ok(()),
    }
}

fn choose(asked: Option<Subnet>, taken: &[Subnet]) -> Result<Subnet> {
    let Some(subnet) = asked else {
        return Subnet::choose(taken).ok_or_else(|| {
            NetError::Invalid("no subnet is free of the host's routes; --subnet gives one".into())
        });
    };
    match taken.iter().find(|other| other.overlaps(subnet)) {
        None => Ok(subnet),
        Some(other) => Err(NetError::Invalid(format!(
            "the subnet {subnet} overlaps {other}, which this host has a route to; choose another one"
        ))),
    }
}

/// The process that had it before may take a moment to be gone.
async fn make_tap(name: &str) -> Result<OwnedFd> {
    let began = Instant::now();
    loop {
        match tap::make(name) {
            Err(NetError::Tap { source, .. })
                if source.kind() == ErrorKind::ResourceBusy && began.elapsed() < TAP_TIME =>
            {
                sleep(TAP_POLL).await;
            }
            made => return made,
        }
    }
}
