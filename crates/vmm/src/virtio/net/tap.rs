//! A tap interface of the host: the guest's card at one end, the host's network at the other.

use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;

use thiserror::Error;

use crate::virtio::limits::NET_FRAME_MAX;
use crate::virtio::net::backend::{Backend, HEADER_SIZE, Header};
use crate::virtio::net::device::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6,
};

const DEVICE: &str = "/dev/net/tun";
/// Ethernet frames with a header before each and nothing else.
const FLAGS: libc::c_int = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
const OFFLOAD_CSUM: u32 = 1;
const OFFLOAD_TSO4: u32 = 2;
const OFFLOAD_TSO6: u32 = 4;

/// Why an interface cannot be used.
#[derive(Debug, Error)]
pub enum TapError {
    /// No interface can have that name.
    #[error("{name:?} is no name of a network interface")]
    Name {
        /// The name.
        name: String,
    },
    /// The driver is missing or forbidden.
    #[error("cannot open {DEVICE}")]
    Open(#[source] io::Error),
    /// It was to be handed over.
    #[error("no tap interface was handed to the machine's process; `berth vm start` does that")]
    Handed(#[source] io::Error),
    /// The interface is missing, in use, or not allowed.
    #[error("cannot {operation} of tap interface {name}")]
    Setup {
        /// The name.
        name: String,
        /// What was attempted.
        operation: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// An attached tap interface.
pub struct Tap {
    file: File,
    packet: Vec<u8>,
    packet_len: usize,
    out: Vec<u8>,
    out_len: usize,
}

impl Tap {
    /// Attaches to the interface `name`, which is created if that is allowed.
    ///
    /// # Errors
    /// The interface cannot be used.
    pub fn open(name: &str) -> Result<Self, TapError> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(DEVICE)
            .map_err(TapError::Open)?;
        // SAFETY: ifreq is plain data, for which zeroes are a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        let valid = !name.is_empty() && name.len() < request.ifr_name.len();
        if !valid || name.bytes().any(|byte| byte == 0 || byte == b'/') {
            return Err(TapError::Name { name: name.to_owned() });
        }
        for (target, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *target = byte as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = FLAGS as libc::c_short;
        let setup =
            |operation| move |source| TapError::Setup { name: name.to_owned(), operation, source };
        // SAFETY: TUNSETIFF reads and writes one ifreq, which is live.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        check(result).map_err(setup("attach to the queue"))?;
        Self::with(file).map_err(setup("set the header size"))
    }

    /// The interface that whoever started this process has attached to: standard input.
    ///
    /// # Errors
    /// It is no such interface.
    pub fn handed() -> Result<Self, TapError> {
        let fd = io::stdin().as_fd().try_clone_to_owned().map_err(TapError::Handed)?;
        let file = File::from(fd);
        // SAFETY: ifreq is plain data, for which zeroes are a valid value.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        // SAFETY: TUNGETIFF writes one ifreq, which is live. Another kind of file refuses it.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNGETIFF, &raw mut request) };
        check(result).map_err(TapError::Handed)?;
        // SAFETY: TUNGETIFF wrote the flags, and any value of them is valid.
        let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        if flags & FLAGS != FLAGS {
            return Err(TapError::Handed(ErrorKind::InvalidInput.into()));
        }
        Self::with(file).map_err(TapError::Handed)
    }

    fn with(file: File) -> io::Result<Self> {
        let size = HEADER_SIZE as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads one int, which is live.
        let result =
            unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
        check(result)?;
        let size = HEADER_SIZE + NET_FRAME_MAX;
        Ok(Self { file, packet: vec![0; size], packet_len: 0, out: vec![0; size], out_len: 0 })
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

impl Backend for Tap {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn features(&self) -> u64 {
        F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_HOST_TSO4 | F_HOST_TSO6
    }

    fn mtu(&self) -> Option<u16> {
        None
    }

    fn negotiated(&mut self, features: u64) -> io::Result<()> {
        let pairs = [
            (F_GUEST_CSUM, OFFLOAD_CSUM),
            (F_GUEST_TSO4, OFFLOAD_TSO4),
            (F_GUEST_TSO6, OFFLOAD_TSO6),
        ];
        let chosen = pairs.iter().filter(|(feature, _)| features & feature != 0);
        let offload: u32 = chosen.map(|(_, flag)| *flag).sum();
        // Segments need checksums; a driver that asks for one without the other gets neither.
        let offload = if offload & OFFLOAD_CSUM == 0 { 0 } else { offload };
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let result = unsafe {
            libc::ioctl(self.file.as_raw_fd(), libc::TUNSETOFFLOAD, libc::c_ulong::from(offload))
        };
        check(result)
    }

    fn send(
        &mut self,
        header: &Header,
        len: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> bool,
    ) -> io::Result<bool> {
        if !self.flush()? {
            return Ok(false);
        }
        if let Some((start, rest)) = self.out.split_first_chunk_mut::<HEADER_SIZE>() {
            *start = *header;
            if rest.get_mut(..len).is_some_and(fill) {
                self.out_len = HEADER_SIZE + len;
            }
        }
        self.flush()?;
        Ok(true)
    }

    fn flush(&mut self) -> io::Result<bool> {
        while let Some(packet) = self.out.get(..self.out_len).filter(|packet| !packet.is_empty()) {
            match self.file.write(packet) {
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                // A frame the host cannot take (interface down, bad header) is lost, as on a wire.
                Ok(_) | Err(_) => self.out_len = 0,
            }
        }
        Ok(true)
    }

    fn peek(&mut self) -> io::Result<Option<(Header, &[u8])>> {
        while self.packet_len == 0 {
            match self.file.read(&mut self.packet) {
                Ok(count) if count > HEADER_SIZE => self.packet_len = count,
                Ok(_) => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
            }
        }
        let packet = self.packet.get(..self.packet_len).unwrap_or(&[]);
        Ok(packet.split_first_chunk::<HEADER_SIZE>().map(|(header, frame)| (*header, frame)))
    }

    fn consume(&mut self) {
        self.packet_len = 0;
    }
}
