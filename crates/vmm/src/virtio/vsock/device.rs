//! The vsock device: its three queues and the events of the muxer.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use crate::virtio::chain::Chain;
use crate::virtio::device::{Context, Device, DeviceConfig, DeviceError, Info};
use crate::virtio::limits::{CHAINS_PER_EVENT, VSOCK_BUFFER, VSOCK_PACKET_MAX};
use crate::virtio::queue::Virtqueue;
use crate::virtio::vsock::host::{Shared, Vsock, VsockError};
use crate::virtio::vsock::muxer::{Muxer, TOKEN_LISTENER, TOKEN_WAKE};
use crate::virtio::vsock::packet::{HEADER_SIZE, Header};

const QUEUE_SIZE: u16 = 256;
const RECEIVE: usize = 0;
const TRANSMIT: usize = 1;
const EVENT: usize = 2;
/// The event that says that all connections are gone.
const TRANSPORT_RESET: u32 = 0;

/// The address of the guest unless another is asked for.
pub const GUEST_CID: u32 = 3;

/// What is needed to make a vsock device.
#[derive(Clone, Debug)]
pub struct VsockConfig {
    /// The guest's address, at least 3.
    pub guest_cid: u32,
    /// Where to listen for `CONNECT <port>` clients; the guest's connections to port P go to the
    /// socket at this path with `_P` appended, unless a listener was registered. A stale socket at
    /// the path is replaced.
    pub path: Option<PathBuf>,
}

impl Default for VsockConfig {
    fn default() -> Self {
        Self { guest_cid: GUEST_CID, path: None }
    }
}

/// A virtio-vsock device.
pub struct VsockDevice {
    config: Arc<DeviceConfig>,
    shared: Arc<Shared>,
    listener: Option<(UnixListener, PathBuf)>,
    muxer: Muxer,
    buffer: Vec<u8>,
    /// The driver has to be told that all its connections are gone.
    connections_lost: bool,
}

impl VsockDevice {
    /// The device, and the handle by which this process uses it.
    ///
    /// # Errors
    /// The path cannot be listened on, or there is no descriptor left.
    pub fn new(config: &VsockConfig) -> Result<(Self, Vsock), VsockError> {
        let shared = Shared::new()?;
        let listener = config.path.as_ref().map(listen).transpose()?;
        let guest_cid = u64::from(config.guest_cid);
        let muxer = Muxer::new(guest_cid, config.path.clone(), Arc::clone(&shared));
        let device = Self {
            config: DeviceConfig::new(guest_cid.to_le_bytes().to_vec()),
            shared: Arc::clone(&shared),
            listener,
            muxer,
            buffer: vec![0; VSOCK_PACKET_MAX as usize],
            connections_lost: false,
        };
        Ok((device, Vsock { shared }))
    }

    /// Tells the driver that its connections are gone, if they are (virtio 1.2, 5.10.6.7).
    fn tell_of_loss(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        if !self.connections_lost {
            return Ok(());
        }
        let Some(queue) = context.queue(EVENT) else { return Ok(()) };
        let memory = Arc::clone(queue.memory());
        // Without a buffer it comes back when the driver gives one.
        let Some(chain) = queue.pop()? else { return Ok(()) };
        chain
            .write(&memory, 0, &TRANSPORT_RESET.to_le_bytes())
            .map_err(|_| DeviceError::Request("a vsock event buffer that is too short"))?;
        queue.push(chain.head(), size_of_val(&TRANSPORT_RESET) as u32)?;
        self.connections_lost = false;
        queue.signal()?;
        Ok(())
    }

    fn transmit(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let mut budget = CHAINS_PER_EVENT;
        loop {
            let Some(queue) = context.queue(TRANSMIT) else { return Ok(()) };
            queue.disable_notification()?;
            let chain = match queue.pop()? {
                Some(chain) => chain,
                None if queue.enable_notification()? => continue,
                None => break,
            };
            let packet = self.read_packet(queue, &chain);
            queue.push(chain.head(), 0)?;
            if let Some((header, len)) = packet {
                let data = self.buffer.get(..len).unwrap_or(&[]);
                self.muxer.receive(&context.poller, &header, data);
            }
            budget -= 1;
            if budget == 0 {
                context.revisit(TRANSMIT);
                break;
            }
        }
        if let Some(queue) = context.queue(TRANSMIT) {
            queue.signal()?;
        }
        Ok(())
    }

    /// The packet in a chain, its data in `self.buffer`; a packet that is too short or claims more
    /// data than it has is dropped.
    fn read_packet(&mut self, queue: &Virtqueue, chain: &Chain) -> Option<(Header, usize)> {
        let memory = queue.memory();
        let mut raw = [0; HEADER_SIZE];
        chain.read(memory, 0, &mut raw).ok()?;
        let header = Header::parse(&raw);
        if header.len > VSOCK_BUFFER {
            return None;
        }
        let len = header.len as usize;
        if len > self.buffer.len() {
            self.buffer.resize(len, 0);
        }
        chain.read(memory, HEADER_SIZE as u64, self.buffer.get_mut(..len)?).ok()?;
        Some((header, len))
    }

    /// Sends the guest what there is, as far as it has buffers.
    fn receive(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let mut budget = CHAINS_PER_EVENT;
        while self.muxer.has_output() {
            if budget == 0 {
                context.revisit(RECEIVE);
                break;
            }
            budget -= 1;
            let Some(queue) = context.queue(RECEIVE) else { return Ok(()) };
            queue.disable_notification()?;
            let chain = match queue.pop()? {
                Some(chain) => chain,
                None if queue.enable_notification()? => continue,
                None => break,
            };
            let Some(room) = chain.writable_len().checked_sub(HEADER_SIZE as u64) else {
                return Err(DeviceError::Request("a vsock buffer smaller than a header"));
            };
            let room = usize::try_from(room).unwrap_or(usize::MAX).min(VSOCK_PACKET_MAX as usize);
            let mut buffer = std::mem::take(&mut self.buffer);
            let target = buffer.get_mut(..room).unwrap_or(&mut []);
            let header = self.muxer.output(&context.poller, target);
            self.buffer = buffer;
            let Some(queue) = context.queue(RECEIVE) else { return Ok(()) };
            match header {
                Some(header) => self.write_packet(queue, &chain, &header)?,
                None => queue.undo_pop(),
            }
        }
        if let Some(queue) = context.queue(RECEIVE) {
            queue.signal()?;
        }
        Ok(())
    }

    fn write_packet(
        &self,
        queue: &mut Virtqueue,
        chain: &Chain,
        header: &Header,
    ) -> Result<(), DeviceError> {
        let memory = Arc::clone(queue.memory());
        let data = self.buffer.get(..header.len as usize).unwrap_or(&[]);
        chain
            .write(&memory, 0, &header.encode())
            .and_then(|()| chain.write(&memory, HEADER_SIZE as u64, data))
            .map_err(|_| DeviceError::Request("a vsock buffer that is too short"))?;
        queue.push(chain.head(), HEADER_SIZE as u32 + header.len)?;
        Ok(())
    }
}

fn listen(path: &PathBuf) -> Result<(UnixListener, PathBuf), VsockError> {
    use std::os::unix::fs::FileTypeExt;
    let error = |source| VsockError::Listen { path: path.clone(), source };
    let stale = std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if stale {
        std::fs::remove_file(path).map_err(error)?;
    }
    let listener = UnixListener::bind(path).map_err(error)?;
    listener.set_nonblocking(true).map_err(error)?;
    Ok((listener, path.clone()))
}

impl Drop for VsockDevice {
    fn drop(&mut self) {
        self.shared.close();
        if let Some((_, path)) = &self.listener {
            // Someone may have removed it; nothing else is to be done then.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Device for VsockDevice {
    fn info(&self) -> Info {
        Info {
            device_type: 19,
            class: 0x02_8000,
            features: 0,
            queue_sizes: vec![QUEUE_SIZE; 3],
            name: "virtio-vsock",
        }
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let watching = DeviceError::host;
        let poller = &context.poller;
        poller
            .add(self.shared.wake.as_raw_fd(), TOKEN_WAKE, EventSet::IN)
            .map_err(watching("watching for vsock calls"))?;
        if let Some((listener, _)) = &self.listener {
            poller
                .add(listener.as_raw_fd(), TOKEN_LISTENER, EventSet::IN)
                .map_err(watching("watching the vsock socket"))?;
        }
        // Before any new connection.
        self.tell_of_loss(context)?;
        let poller = &context.poller;
        // Calls may have come before the driver did.
        self.muxer.take_calls(poller);
        Ok(())
    }

    fn queue_event(&mut self, context: &mut Context, queue: usize) -> Result<(), DeviceError> {
        match queue {
            TRANSMIT => self.transmit(context)?,
            EVENT => self.tell_of_loss(context)?,
            _ => {}
        }
        self.receive(context)
    }

    fn fd_event(
        &mut self,
        context: &mut Context,
        token: u64,
        events: EventSet,
    ) -> Result<(), DeviceError> {
        match token {
            TOKEN_WAKE => self.muxer.take_calls(&context.poller),
            TOKEN_LISTENER => {
                if let Some((listener, _)) = &self.listener {
                    self.muxer.take_clients(&context.poller, listener);
                }
            }
            _ => self.muxer.socket_event(&context.poller, token, events),
        }
        self.receive(context)
    }

    fn restore(&mut self, saved: &[u8]) -> Result<(), &'static str> {
        self.connections_lost = true;
        if saved.is_empty() {
            Ok(())
        } else {
            Err("a vsock device that stores nothing has stored something")
        }
    }

    fn stop(&mut self, context: &mut Context) {
        context.poller.remove(self.shared.wake.as_raw_fd());
        if let Some((listener, _)) = &self.listener {
            context.poller.remove(listener.as_raw_fd());
        }
        self.muxer.clear();
    }
}
