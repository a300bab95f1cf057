//! The disk as a virtio device: one queue, many requests under way, finished in any order.

use std::os::fd::RawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use crate::virtio::block::disk::{Contents, Disk, DiskConfig, DiskError};
use crate::virtio::block::engine::{Buffers, Done, Engine, Job};
use crate::virtio::block::live::DiskSwitch;
use crate::virtio::block::request::{
    self, HEADER_SIZE, ID_SIZE, Request, STATUS_IOERR, STATUS_OK, STATUS_UNSUPPORTED,
};
use crate::virtio::chain::{Chain, Direction};
use crate::virtio::device::{Context, Device, DeviceConfig, DeviceError, Info};
use crate::virtio::limits::{
    BLOCK_DISCARD_SECTORS_MAX, BLOCK_REQUESTS_MAX, CHAIN_DESCRIPTORS_MAX, CHAINS_PER_EVENT,
};
use crate::virtio::queue::Virtqueue;

/// Feature: the largest number of segments is in the configuration.
pub const F_SEG_MAX: u64 = 1 << 2;
/// Feature: read-only.
pub const F_RO: u64 = 1 << 5;
/// Feature: the block size is in the configuration.
pub const F_BLK_SIZE: u64 = 1 << 6;
/// Feature: flush requests.
pub const F_FLUSH: u64 = 1 << 9;
/// Feature: the topology is in the configuration.
pub const F_TOPOLOGY: u64 = 1 << 10;
/// Feature: discard requests.
pub const F_DISCARD: u64 = 1 << 13;
/// Feature: write-zeroes requests.
pub const F_WRITE_ZEROES: u64 = 1 << 14;

const QUEUE_SIZE: u16 = 256;
const TOKEN_ENGINE: u64 = 0;
/// Segments of one request: what the chain limit leaves after header and status.
const SEGMENTS_MAX: u32 = 254;
const BLOCK_SIZE: u32 = 512;
/// log2 of the sectors of a page: files are cached in pages.
const PHYSICAL_BLOCK_EXPONENT: u8 = 3;

const _: () = assert!(SEGMENTS_MAX as usize + 2 <= CHAIN_DESCRIPTORS_MAX);

static ZEROES: [u8; 64 * 1024] = [0; 64 * 1024];

/// A request under way.
struct Pending {
    chain: Chain,
    /// Bytes of the chain that are written when it ends well, without the status.
    data_len: u64,
    kind: Kind,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Transfer,
    Flush,
    Discard,
    WriteZeroes { offset: u64, len: u64 },
}

/// A virtio-blk device.
pub struct Block {
    disk: Disk,
    config: Arc<DeviceConfig>,
    no_io_uring: bool,
    engine: Option<Engine>,
    pending: Vec<Option<Pending>>,
    free: Vec<u16>,
    durable_writes: bool,
    done: Vec<Done>,
}

impl Block {
    /// Opens and locks the disk.
    ///
    /// # Errors
    /// The file cannot be used, or another VM uses it.
    pub fn new(config: &DiskConfig) -> Result<Self, DiskError> {
        Ok(Self::with_disk(Disk::open(config)?, config.no_io_uring))
    }

    /// A device for a disk that is open already.
    pub fn with_disk(disk: Disk, no_io_uring: bool) -> Self {
        let bytes = config_bytes(&disk);
        Self {
            disk,
            config: DeviceConfig::new(bytes),
            no_io_uring,
            engine: None,
            pending: (0..BLOCK_REQUESTS_MAX).map(|_| None).collect(),
            free: (0..BLOCK_REQUESTS_MAX as u16).rev().collect(),
            durable_writes: false,
            done: Vec::new(),
        }
    }

    /// Size in sectors of 512 bytes.
    pub fn sectors(&self) -> u64 {
        self.disk.sectors
    }

    /// What freezes the disk, if it can be.
    #[must_use]
    pub fn switch(&self) -> Option<DiskSwitch> {
        self.disk.switch()
    }

    fn begin(&mut self, queue: &mut Virtqueue, chain: Chain) -> Result<(), DeviceError> {
        let memory = Arc::clone(queue.memory());
        let parsed = request::parse(&chain, &memory, self.disk.sectors, self.disk.read_only)
            .ok_or(DeviceError::Request("a disk request without room for its status"))?;
        let request = match parsed {
            Ok(request) => request,
            Err(status) => return finish(queue, &chain, 0, status),
        };
        let mut list = Vec::new();
        let (job, kind, data_len) = match request {
            Request::GetId => {
                let mut id = [0; ID_SIZE];
                for (byte, new) in id.iter_mut().zip(self.disk.serial.bytes()) {
                    *byte = new;
                }
                let written = chain.write(&memory, 0, &id);
                let status = if written.is_ok() { STATUS_OK } else { STATUS_IOERR };
                return finish(queue, &chain, ID_SIZE as u64, status);
            }
            Request::Read { len: 0, .. } | Request::Write { len: 0, .. } => {
                return finish(queue, &chain, 0, STATUS_OK);
            }
            Request::Read { offset, len } => {
                if chain.host_buffers(&memory, Direction::Writable, 0, len, &mut list).is_err() {
                    return finish(queue, &chain, 0, STATUS_IOERR);
                }
                (Job::Read { buffers: Buffers(list), offset }, Kind::Transfer, len)
            }
            Request::Write { offset, len } => {
                let from = HEADER_SIZE;
                if chain.host_buffers(&memory, Direction::Readable, from, len, &mut list).is_err() {
                    return finish(queue, &chain, 0, STATUS_IOERR);
                }
                let durable = self.durable_writes;
                (Job::Write { buffers: Buffers(list), offset, durable }, Kind::Transfer, 0)
            }
            Request::Flush => (Job::Flush, Kind::Flush, 0),
            Request::Discard { len: 0, .. } | Request::WriteZeroes { len: 0, .. } => {
                return finish(queue, &chain, 0, STATUS_OK);
            }
            Request::Discard { offset, len } => (Job::Discard { offset, len }, Kind::Discard, 0),
            Request::WriteZeroes { offset, len, unmap } => {
                (Job::Zero { offset, len, unmap }, Kind::WriteZeroes { offset, len }, 0)
            }
        };
        let Some(id) = self.free.pop() else {
            return Err(DeviceError::Request("more disk requests than the device takes"));
        };
        if let Some(slot) = self.pending.get_mut(usize::from(id)) {
            *slot = Some(Pending { chain, data_len, kind });
        }
        self.submit(queue, id, job)
    }

    fn submit(&mut self, queue: &mut Virtqueue, id: u16, job: Job) -> Result<(), DeviceError> {
        let engine = self.engine.as_mut().ok_or(DeviceError::Request("the disk is stopped"))?;
        match engine.submit(id, job) {
            Ok(()) => Ok(()),
            Err(_) => self.end(queue, id, STATUS_IOERR),
        }
    }

    /// What a finished system call means for its request.
    fn complete(&mut self, queue: &mut Virtqueue, done: Done) -> Result<(), DeviceError> {
        let Done { id, job, result } = done;
        let Some(kind) = self.pending.get(usize::from(id)).and_then(Option::as_ref).map(|p| p.kind)
        else {
            return Ok(());
        };
        let unsupported = result == -i64::from(libc::EOPNOTSUPP);
        let retry =
            matches!(-result, e if e == i64::from(libc::EINTR) || e == i64::from(libc::EAGAIN));
        match (job, kind) {
            (job, _) if retry => self.submit(queue, id, job),
            (Job::Read { mut buffers, offset }, _) if result > 0 => {
                buffers.advance(result as usize);
                let offset = offset + result as u64;
                self.go_on(queue, id, Job::Read { buffers, offset })
            }
            (Job::Write { mut buffers, offset, durable }, _) if result > 0 => {
                buffers.advance(result as usize);
                let offset = offset + result as u64;
                self.go_on(queue, id, Job::Write { buffers, offset, durable })
            }
            // Discarding is advice; a file system that cannot is no error.
            (_, Kind::Discard) if unsupported => self.end(queue, id, STATUS_OK),
            (Job::Zero { .. }, Kind::WriteZeroes { offset, len }) if unsupported => {
                let durable = self.durable_writes;
                self.submit(queue, id, Job::Write { buffers: zeroes(len), offset, durable })
            }
            (Job::Flush | Job::Discard { .. } | Job::Zero { .. }, _) if result == 0 => {
                self.end(queue, id, STATUS_OK)
            }
            (_, Kind::Flush) if unsupported => self.end(queue, id, STATUS_UNSUPPORTED),
            // A read of nothing: the file became shorter.
            (job, _) => {
                let error = std::io::Error::from_raw_os_error((-result).max(0) as i32);
                tracing::debug!(?job, %error, "disk request failed");
                self.end(queue, id, STATUS_IOERR)
            }
        }
    }

    fn go_on(&mut self, queue: &mut Virtqueue, id: u16, job: Job) -> Result<(), DeviceError> {
        let left = match &job {
            Job::Read { buffers, .. } | Job::Write { buffers, .. } => buffers.len(),
            Job::Flush | Job::Discard { .. } | Job::Zero { .. } => 0,
        };
        if left == 0 { self.end(queue, id, STATUS_OK) } else { self.submit(queue, id, job) }
    }

    fn end(&mut self, queue: &mut Virtqueue, id: u16, status: u8) -> Result<(), DeviceError> {
        let Some(pending) = self.pending.get_mut(usize::from(id)).and_then(Option::take) else {
            return Ok(());
        };
        self.free.push(id);
        let memory = Arc::clone(queue.memory());
        // Also after an error: some of the bytes may have changed.
        let marked = pending.chain.mark_written(&memory, 0, pending.data_len);
        let status = if marked.is_ok() { status } else { STATUS_IOERR };
        finish(queue, &pending.chain, pending.data_len, status)
    }

    fn collect(&mut self, queue: &mut Virtqueue) -> Result<(), DeviceError> {
        let mut done = std::mem::take(&mut self.done);
        if let Some(engine) = &mut self.engine {
            engine.take_done(&mut done);
        }
        for item in done.drain(..) {
            self.complete(queue, item)?;
        }
        self.done = done;
        Ok(())
    }

    fn work(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let Some(queue) = context.queue(0) else { return Ok(()) };
        self.collect(queue)?;
        let mut budget = CHAINS_PER_EVENT;
        queue.disable_notification()?;
        let more = loop {
            // A request that ends makes room and comes here again.
            if self.free.is_empty() {
                break false;
            }
            if budget == 0 {
                break true;
            }
            match queue.pop()? {
                Some(chain) => self.begin(queue, chain)?,
                None if queue.enable_notification()? => {}
                None => break false,
            }
            budget -= 1;
        };
        if let Some(engine) = &mut self.engine {
            engine.flush().map_err(DeviceError::host("submitting disk requests"))?;
        }
        // Requests served from the page cache are done already: one interrupt less later.
        self.collect(queue)?;
        if let Some(engine) = &mut self.engine {
            engine.flush().map_err(DeviceError::host("submitting disk requests"))?;
        }
        queue.signal()?;
        if more {
            context.revisit(0);
        }
        Ok(())
    }
}

/// Sets the status (the last writable byte) and gives the chain back.
fn finish(
    queue: &mut Virtqueue,
    chain: &Chain,
    data_len: u64,
    status: u8,
) -> Result<(), DeviceError> {
    let memory = Arc::clone(queue.memory());
    let last = chain.writable_len().saturating_sub(1);
    chain
        .write(&memory, last, &[status])
        .map_err(|_| DeviceError::Request("a disk request without room for its status"))?;
    // The used length covers what was written from the start; up to the status only if all was.
    let written = if data_len == last { data_len + 1 } else { data_len };
    queue.push(chain.head(), u32::try_from(written).unwrap_or(u32::MAX))?;
    Ok(())
}

fn zeroes(len: u64) -> Buffers {
    let mut left = usize::try_from(len).unwrap_or(usize::MAX);
    let mut list = Vec::new();
    while left > 0 {
        let part = left.min(ZEROES.len());
        // The kernel only reads from it.
        list.push(libc::iovec { iov_base: ZEROES.as_ptr().cast_mut().cast(), iov_len: part });
        left -= part;
    }
    Buffers(list)
}

fn config_bytes(disk: &Disk) -> Vec<u8> {
    let mut bytes = vec![0; 60];
    let mut put = |at: usize, value: &[u8]| {
        for (byte, new) in bytes.iter_mut().skip(at).zip(value) {
            *byte = *new;
        }
    };
    put(0, &disk.sectors.to_le_bytes());
    put(12, &SEGMENTS_MAX.to_le_bytes());
    put(20, &BLOCK_SIZE.to_le_bytes());
    put(24, &[PHYSICAL_BLOCK_EXPONENT]);
    put(26, &1u16.to_le_bytes());
    // max_discard_sectors, max_discard_seg, discard_sector_alignment
    put(36, &BLOCK_DISCARD_SECTORS_MAX.to_le_bytes());
    put(40, &1u32.to_le_bytes());
    put(44, &disk.discard_sectors().to_le_bytes());
    // max_write_zeroes_sectors, max_write_zeroes_seg, write_zeroes_may_unmap
    put(48, &BLOCK_DISCARD_SECTORS_MAX.to_le_bytes());
    put(52, &1u32.to_le_bytes());
    put(56, &[1]);
    bytes
}

impl Device for Block {
    fn info(&self) -> Info {
        let access = if self.disk.read_only { F_RO } else { F_DISCARD | F_WRITE_ZEROES };
        Info {
            device_type: 2,
            class: 0x01_0000,
            features: F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_TOPOLOGY | access,
            queue_sizes: vec![QUEUE_SIZE],
            name: "virtio-blk",
        }
    }

    fn config(&self) -> Arc<DeviceConfig> {
        Arc::clone(&self.config)
    }

    fn start(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let engine =
            Engine::new(&self.disk.contents, Arc::clone(&context.memory), self.no_io_uring)
                .map_err(DeviceError::host("setting up disk I/O"))?;
        let fd: RawFd = engine.event_fd();
        context
            .poller
            .add(fd, TOKEN_ENGINE, EventSet::IN)
            .map_err(DeviceError::host("watching disk I/O"))?;
        // A driver that cannot flush expects that a finished write is on the disk.
        self.durable_writes = !context.negotiated(F_FLUSH);
        self.engine = Some(engine);
        Ok(())
    }

    fn queue_event(&mut self, context: &mut Context, _queue: usize) -> Result<(), DeviceError> {
        self.work(context)
    }

    fn fd_event(
        &mut self,
        context: &mut Context,
        _token: u64,
        _events: EventSet,
    ) -> Result<(), DeviceError> {
        self.work(context)
    }

    fn drain(&mut self, context: &mut Context) -> Result<(), DeviceError> {
        let Some(queue) = context.queue(0) else { return Ok(()) };
        self.collect(queue)?;
        while self.free.len() < BLOCK_REQUESTS_MAX {
            let Some(engine) = &mut self.engine else { break };
            engine.flush().map_err(DeviceError::host("submitting disk requests"))?;
            engine.wait().map_err(DeviceError::host("waiting for disk requests"))?;
            self.collect(queue)?;
        }
        queue.signal()?;
        Ok(())
    }

    fn stop(&mut self, context: &mut Context) {
        if let Some(engine) = self.engine.take() {
            context.poller.remove(engine.event_fd());
            // Waits for the requests under way.
            drop(engine);
            if let Contents::Qcow2(image) = &self.disk.contents
                && let Err(error) = image.close()
            {
                tracing::warn!(%error, "writing a disk out at its end failed");
            }
        }
        self.pending.fill_with(|| None);
        self.free = (0..BLOCK_REQUESTS_MAX as u16).rev().collect();
        self.done.clear();
    }
}
