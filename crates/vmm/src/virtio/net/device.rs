//! The network card: one receive and one transmit queue.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::epoll::EventSet;

use crate::virtio::chain::Chain;
use crate::virtio::device::{Context, Device, DeviceConfig, DeviceError, Info};
use crate::virtio::limits::{CHAINS_PER_EVENT, NET_FRAME_MAX};
use crate::virtio::net::backend::{Backend, HEADER_SIZE, Header};
use crate::virtio::queue::Virtqueue;

/// Feature: checksums of the guest's frames may be left to the host.
pub const F_CSUM: u64 = 1 << 0;
/// Feature: checksums of frames to the guest may be left to it.
pub const F_GUEST_CSUM: u64 = 1 << 1;
/// Feature: the largest packet is in the configuration.
pub const F_MTU: u64 = 1 << 3;
/// Feature: the address is in the configuration.
pub const F_MAC: u64 = 1 << 5;
/// Feature: large TCP over IPv4 segments to the guest.
pub const F_GUEST_TSO4: u64 = 1 << 7;
/// Feature: large TCP over IPv6 segments to the guest.
pub const F_GUEST_TSO6: u64 = 1 << 8;
/// Feature: large TCP over IPv4 segments from the guest.
pub const F_HOST_TSO4: u64 = 1 << 11;
/// Feature: large TCP over IPv6 segments from the guest.
pub const F_HOST_TSO6: u64 = 1 << 12;
/// Feature: a received frame may fill several buffers.
pub const F_MRG_RXBUF: u64 = 1 << 15;
/// Feature: the link's state is in the configuration.
pub const F_STATUS: u64 = 1 << 16;

const QUEUE_SIZE: u16 = 256;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const TOKEN_BACKEND: u64 = 0;
const CONFIG_STATUS: usize = 6;
const LINK_UP: u16 = 1;

/// An Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mac(pub [u8; 6]);

impl Mac {
    /// A random, locally administered, unicast address.
    ///
    /// # Errors
    /// The kernel gives no random bytes.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 6];
        crate::virtio::rng::fill_random(&mut bytes)?;
        bytes[0] = bytes[0] & 0xfc | 0x02;
        Ok(Self(bytes))
    }
}

/// A virtio-net device.
pub struct Net<B> {
    backend: B,
    config: Arc<DeviceConfig>,
    mergeable: bool,
    /// The backend failed; frames are dropped from then on.
    down: bool,
    /// Events the poller watches the backend for.
    interest: EventSet,
    /// Some of the guest's frames wait for the backend.
    blocked: bool,
    /// Frames wait for buffers of the guest.
    starved: bool,
    /// Nothing goes in or out.
    held: Arc<AtomicBool>,
}

impl<B: Backend> Net<B> {
    /// A card with this address, connected to `backend`.
    pub fn new(backend: B, mac: Mac) -> Self {
        let mut bytes = mac.0.to_vec();
        bytes.extend(LINK_UP.to_le_bytes());
        bytes.extend(1u16.to_le_bytes());
        bytes.extend(backend.mtu().unwrap_or(0).to_le_bytes());
        Self {
            backend,
            config: DeviceConfig::new(bytes),
            mergeable: false,
            down: false,
            interest: EventSet::empty(),
            blocked: false,
            starved: false,
            held: Arc::default(),
        }
    }

    /// Drops all frames, of the guest and for it, as long as this is true: a guest that goes on as another's
    /// copy has the other's addresses until it knows better.
    #[must_use]
    pub fn held_by(self, held: Arc<AtomicBool>) -> Self {
        Self { held, ..self }
    }

    /// The cable is cut: tells the guest, once.
    fn cut(&mut self, context: &Context, error: &io::Error) {
        if !self.down {
            tracing::warn!(%error, "the network backend is gone; the guest's link is down");
            self.down = true;
            context.poller.remove(self.backend.fd());
            self.config.update(CONFIG_STATUS, &0u16.to_le_bytes());
        }
    }

    fn transmit(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        if self.blocked {
            return Ok(());
        }
        let Some(queue) = context.queue(TRANSMIT) else { return Ok(()) };
        let mut budget = CHAINS_PER_EVENT;
        let mut cut = None;
        queue.disable_notification()?;
        let more = loop {
            if budget == 0 {
                break true;
            }
            let chain = match queue.pop()? {
                Some(chain) => chain,
                None if queue.enable_notification()? => continue,
                None => break false,
            };
            budget -= 1;
            match self.send(queue, &chain) {
                Ok(true) => queue.push(chain.head(), 0)?,
                Ok(false) => {
                    queue.undo_pop();
                    self.blocked = true;
                    break false;
                }
                Err(error) => {
                    queue.push(chain.head(), 0)?;
                    cut = Some(error);
                }
            }
        };
        queue.signal()?;
        if more {
            context.revisit(TRANSMIT);
        }
        if let Some(error) = cut {
            self.cut(context, &error);
        }
        self.flush(context);
        Ok(())
    }

    /// Gives one frame to the backend; one that is too short or too long is dropped.
    fn send(&mut self, queue: &Virtqueue, chain: &Chain) -> io::Result<bool> {
        let memory = queue.memory();
        let mut header: Header = [0; HEADER_SIZE];
        let frame_len = chain.readable_len().saturating_sub(HEADER_SIZE as u64);
        let len = usize::try_from(frame_len).unwrap_or(usize::MAX);
        let broken = chain.read(memory, 0, &mut header).is_err();
        let held = self.held.load(Ordering::Acquire);
        if self.down || held || broken || len == 0 || len > NET_FRAME_MAX {
            return Ok(true);
        }
        self.backend.send(&header, len, &mut |target| {
            chain.read(memory, HEADER_SIZE as u64, target).is_ok()
        })
    }

    fn flush(&mut self, context: &Context) {
        if self.down {
            return;
        }
        match self.backend.flush() {
            Ok(done) => {
                if done && std::mem::take(&mut self.blocked) {
                    // A frame was left in the queue, and the driver was asked not to notify.
                    context.revisit(TRANSMIT);
                }
                self.watch(context, !done);
            }
            Err(error) => self.cut(context, &error),
        }
    }

    fn receive(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.starved = false;
        let mut budget = CHAINS_PER_EVENT;
        let mut cut = None;
        let Some(queue) = context.queue(RECEIVE) else {
            // Without a queue nothing can arrive; the descriptor must not wake us for ever.
            self.starved = true;
            return Ok(());
        };
        let more = loop {
            if self.down {
                break false;
            }
            if budget == 0 {
                break true;
            }
            budget -= 1;
            let (header, frame) = match self.backend.peek() {
                Ok(Some(packet)) => packet,
                Ok(None) => break false,
                Err(error) => {
                    cut = Some(error);
                    break false;
                }
            };
            let held = self.held.load(Ordering::Acquire);
            if held || deliver(queue, self.mergeable, header, frame)? {
                self.backend.consume();
            } else {
                self.starved = true;
                break false;
            }
        };
        queue.signal()?;
        if more {
            context.revisit(RECEIVE);
        }
        if let Some(error) = cut {
            self.cut(context, &error);
        }
        Ok(())
    }

    /// Watches for arriving frames unless the guest has no buffers, and for room if `write`.
    fn watch(&mut self, context: &Context, write: bool) {
        let mut wanted = EventSet::empty();
        if !self.starved {
            wanted |= EventSet::IN;
        }
        if write {
            wanted |= EventSet::OUT;
        }
        if !self.down && wanted != self.interest {
            let changed = context.poller.modify(self.backend.fd(), TOKEN_BACKEND, wanted);
            match changed {
                Ok(()) => self.interest = wanted,
                Err(error) => self.cut(context, &error),
            }
        }
    }
}

/// Puts a frame into the guest's buffers. `false`: it has too few now. A frame that does not fit
/// the buffers the driver gives is dropped.
fn deliver(
    queue: &mut Virtqueue,
    mergeable: bool,
    mut header: Header,
    frame: &[u8],
) -> Result<bool, DeviceError> {
    let memory = Arc::clone(queue.memory());
    let total = (HEADER_SIZE + frame.len()) as u64;
    let mut chains: Vec<Chain> = Vec::new();
    let mut room = 0;
    queue.disable_notification()?;
    while room < total && (chains.is_empty() || mergeable) {
        match queue.pop()? {
            Some(chain) => {
                if chain.writable_len() < HEADER_SIZE as u64 {
                    return Err(DeviceError::Request("a receive buffer smaller than a header"));
                }
                if chains.len() >= usize::from(QUEUE_SIZE) {
                    return Err(DeviceError::Request("a frame that fills the whole ring"));
                }
                room += chain.writable_len();
                chains.push(chain);
            }
            None => {
                // Buffers may have come just now; otherwise the driver's next ones are announced.
                if queue.enable_notification()? {
                    continue;
                }
                for _ in &chains {
                    queue.undo_pop();
                }
                return Ok(false);
            }
        }
    }
    let [.., low, high] = &mut header;
    [*low, *high] = (chains.len() as u16).to_le_bytes();
    let mut used = Vec::with_capacity(chains.len());
    let (mut frame, mut first) = (frame, true);
    for chain in &chains {
        let start = if first { HEADER_SIZE as u64 } else { 0 };
        let space = usize::try_from(chain.writable_len() - start).unwrap_or(usize::MAX);
        let (now, later) = frame.split_at(space.min(frame.len()));
        let head = if first { chain.write(&memory, 0, &header) } else { Ok(()) };
        head.and_then(|()| chain.write(&memory, start, now))
            .map_err(|_| DeviceError::Request("a receive buffer that is too short"))?;
        used.push((chain.head(), (start as usize + now.len()) as u32));
        (frame, first) = (later, false);
    }
    if frame.is_empty() {
        queue.push_together(&used)?;
    } else {
        for _ in &chains {
            queue.undo_pop();
        }
    }
    Ok(true)
}

impl<B: Backend> Device for Net<B> {
    fn info(&self) -> Info {
        let mtu = if self.backend.mtu().is_some() { F_MTU } else { 0 };
        Info {
            device_type: 1,
            class: 0x02_0000,
            features: F_MAC | F_STATUS | F_MRG_RXBUF | mtu | self.backend.features(),
            queue_sizes: vec![QUEUE_SIZE; 2],
            name: "virtio-net",
        }
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        self.mergeable = context.negotiated(F_MRG_RXBUF);
        self.backend
            .negotiated(context.features)
            .map_err(DeviceError::host("setting up the network's offloads"))?;
        (self.blocked, self.starved) = (false, false);
        self.interest = EventSet::IN;
        if !self.down {
            context
                .poller
                .add(self.backend.fd(), TOKEN_BACKEND, self.interest)
                .map_err(DeviceError::host("watching the network"))?;
        }
        Ok(())
    }

    fn queue_event(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        if queue == TRANSMIT {
            self.transmit(context)?;
        } else {
            self.receive(context)?;
        }
        self.watch(context, self.interest.contains(EventSet::OUT));
        Ok(())
    }

    fn fd_event(
        &mut self,
        context: &mut Context,
        _token: u64,
        events: EventSet,
    ) -> Result<(), DeviceError> {
        if events.contains(EventSet::OUT) {
            self.flush(context);
        }
        if events.intersects(EventSet::IN | EventSet::HANG_UP | EventSet::ERROR) {
            self.receive(context)?;
            if events.contains(EventSet::HANG_UP) && self.starved {
                // Reported again and again, also to those who do not ask.
                self.cut(context, &io::ErrorKind::ConnectionReset.into());
            }
        }
        self.watch(context, self.interest.contains(EventSet::OUT));
        Ok(())
    }

    fn stop(&mut self, context: &mut Context) {
        context.poller.remove(self.backend.fd());
    }
}
