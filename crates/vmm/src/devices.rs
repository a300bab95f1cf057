//! The PCI devices of a machine, made from their configuration.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};

use berth_disk::format::Format;

use crate::console::{Console, ConsoleError, SerialConfig};
use crate::machine::{AttachPci, DeviceContext};
use crate::pci::root::PciRoot;
use crate::virtio::balloon::device::{self as balloon, Balloon, BalloonSwitch};
use crate::virtio::block::device::Block;
use crate::virtio::block::disk::{DiskConfig, DiskError};
use crate::virtio::block::live::DiskSwitch;
use crate::virtio::console::device::{Console as ConsoleDevice, ConsoleSize};
use crate::virtio::fs::device::{Folder, FolderShare, ShareError, files_for_each};
use crate::virtio::net::device::{Mac, Net};
use crate::virtio::net::forward::Forward;
use crate::virtio::net::passt::{self, Passt, PasstConfig, PasstError};
use crate::virtio::net::tap::{Tap, TapError};
use crate::virtio::rng::device::Rng;
use crate::virtio::transport_pci::{AttachError, attach};
use crate::virtio::vsock::device::{VsockConfig, VsockDevice};
use crate::virtio::vsock::host::{Vsock, VsockError};

/// A disk of the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskFile {
    /// A file or a block device.
    pub path: PathBuf,
    /// What it holds.
    pub format: Format,
    /// The guest may not write.
    pub read_only: bool,
}

/// What the network card is connected to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NetConfig {
    /// No card.
    #[default]
    None,
    /// The host's network through passt, without privileges; these ports of the host lead to the guest.
    User(Vec<Forward>),
    /// A tap interface of this name.
    Tap(String),
    /// A tap interface that somebody else has attached to: standard input.
    Handed,
}

/// The host's end of a network card.
enum Link {
    User(passt::Begun),
    Tap(Tap),
}

/// The devices of a machine.
#[derive(Default)]
pub struct Devices {
    /// In the order the guest numbers them.
    pub disks: Vec<DiskFile>,
    /// Folders of the host.
    pub shares: Vec<FolderShare>,
    /// The network card.
    pub net: NetConfig,
    /// Its address; without one it gets a random one.
    pub mac: Option<Mac>,
    /// The guest's vsock address, at least 3; none: no vsock.
    pub vsock_cid: Option<u32>,
    /// Where the virtio console leads; none: no such device.
    pub console: Option<SerialConfig>,
    /// Whether the guest can be asked for memory. One that was stored without that cannot.
    pub balloon: bool,
    /// The network card's, once it is connected.
    pub link: Connected,
}

/// The host's end of a network card, unless it is made with the machine.
#[derive(Default)]
pub struct Connected(Option<Link>);

/// Why a device could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DevicesError {
    /// A disk.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A shared folder.
    #[error(transparent)]
    Share(#[from] ShareError),
    /// passt.
    #[error(transparent)]
    Passt(#[from] PasstError),
    /// A tap interface.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// vsock.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The virtio console's target.
    #[error(transparent)]
    Console(#[from] ConsoleError),
    /// The virtio console's connection to its target.
    #[error("no stream for the virtio console")]
    ConsoleStream(#[source] std::io::Error),
    /// The bus is full.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// No random numbers.
    #[error("no random hardware address for the network card")]
    Mac(#[source] std::io::Error),
}

/// The host's ends of devices, once the machine has been started.
#[derive(Clone, Default)]
pub struct HostEnds {
    /// For connections to the guest.
    pub vsock: Arc<OnceLock<Vsock>>,
    /// For the size of the terminal that the virtio console is.
    pub console: Arc<OnceLock<ConsoleSize>>,
    /// What freezes the disks, in their order; nothing for those that cannot be.
    pub disks: Arc<OnceLock<Vec<Option<DiskSwitch>>>>,
    /// For the guest's memory.
    pub balloon: Arc<OnceLock<BalloonSwitch>>,
    /// Whether the network card lets nothing in or out.
    pub net_held: Arc<AtomicBool>,
}

impl Devices {
    /// What [`crate::machine::Machine::start_with`] wants; the host's ends appear in `ends`.
    #[must_use]
    pub fn into_attach(mut self, ends: &HostEnds) -> AttachPci {
        let ends = ends.clone();
        Box::new(move |context| {
            let root = self.make(context, &ends)?;
            Ok(Arc::new(Mutex::new(root)))
        })
    }

    /// Connects the network card before the machine is made: no thread is started for it, and what needs
    /// the host's network is done then.
    ///
    /// # Errors
    /// As when it is made.
    pub fn connect(&mut self) -> Result<(), DevicesError> {
        self.link.0 = match &self.net {
            NetConfig::None => None,
            NetConfig::User(ports) => {
                let config = PasstConfig { ports: ports.clone(), ..PasstConfig::default() };
                Some(Link::User(Passt::begin(&config)?))
            }
            NetConfig::Tap(name) => Some(Link::Tap(Tap::open(name)?)),
            NetConfig::Handed => Some(Link::Tap(Tap::handed()?)),
        };
        Ok(())
    }

    fn mac(&self) -> Result<Mac, DevicesError> {
        self.mac.map_or_else(Mac::random, Ok).map_err(DevicesError::Mac)
    }

    fn make(&mut self, context: &DeviceContext, ends: &HostEnds) -> Result<PciRoot, DevicesError> {
        let memory = Arc::new(context.memory.clone());
        let mut root = PciRoot::new(Arc::clone(&context.mmio), Arc::clone(&context.interrupts));
        let mut switches = Vec::new();
        for (i, disk) in self.disks.iter().enumerate() {
            let config = DiskConfig {
                path: disk.path.clone(),
                format: disk.format,
                read_only: disk.read_only,
                serial: format!("disk{i}"),
                no_io_uring: false,
            };
            let device = Block::new(&config)?;
            switches.push(device.switch());
            attach(&mut root, Arc::clone(&memory), Box::new(device))?;
        }
        // A machine is started once; a second attempt keeps the first handles.
        let _ = ends.disks.set(switches);
        let files = if self.shares.is_empty() { 0 } else { files_for_each(self.shares.len()) };
        for share in &self.shares {
            attach(&mut root, Arc::clone(&memory), Box::new(Folder::new(share, files)?))?;
        }
        if self.link.0.is_none() {
            self.connect()?;
        }
        let mac = self.mac()?;
        match self.link.0.take() {
            None => {}
            Some(Link::User(begun)) => {
                let card = Net::new(begun.connect(), mac).held_by(Arc::clone(&ends.net_held));
                attach(&mut root, Arc::clone(&memory), Box::new(card))?;
            }
            Some(Link::Tap(tap)) => {
                let card = Net::new(tap, mac).held_by(Arc::clone(&ends.net_held));
                attach(&mut root, Arc::clone(&memory), Box::new(card))?;
            }
        }
        attach(&mut root, Arc::clone(&memory), Box::new(Rng::new()))?;
        if let Some(guest_cid) = self.vsock_cid {
            let (device, host) = VsockDevice::new(&VsockConfig { guest_cid, path: None })?;
            attach(&mut root, Arc::clone(&memory), Box::new(device))?;
            // As above.
            let _ = ends.vsock.set(host);
        }
        if let Some(target) = &self.console {
            let (near, far) = UnixStream::pair().map_err(DevicesError::ConsoleStream)?;
            let device = ConsoleDevice::new(far).map_err(DevicesError::ConsoleStream)?;
            let size = device.size();
            let mut console = Console::open(target)?;
            console.connect(near, &context.ending)?;
            context.consoles.add(console);
            attach(&mut root, Arc::clone(&memory), Box::new(device))?;
            // As above.
            let _ = ends.console.set(size);
        }
        // Last: machines that were stored before there were any have the others in their places.
        let had = |types: &Vec<u16>| types.contains(&balloon::DEVICE_TYPE);
        if self.balloon && context.goes_on_with.as_ref().is_none_or(had) {
            let device = Balloon::new();
            let switch = device.switch();
            attach(&mut root, memory, Box::new(device))?;
            // As above.
            let _ = ends.balloon.set(switch);
        }
        Ok(root)
    }
}
