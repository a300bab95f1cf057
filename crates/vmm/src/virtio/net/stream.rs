//! Frames over a stream socket, each after its length as four bytes, big-endian.
//!
//! This is the protocol of QEMU's `-netdev stream`, which passt speaks.

use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use crate::virtio::limits::{NET_FRAME_MAX, NET_RECEIVE_BUFFER, NET_TRANSMIT_BACKLOG};
use crate::virtio::net::backend::{Backend, HEADER_SIZE, Header};
use crate::virtio::net::passt::Passt;

const LENGTH_SIZE: usize = 4;

/// A socket with framed packets.
pub struct Stream {
    socket: UnixStream,
    /// Dropped after the socket, whose end it notices.
    _process: Option<Passt>,
    mtu: Option<u16>,
    out: Vec<u8>,
    /// What of `out` is gone already.
    out_start: usize,
    input: Vec<u8>,
    input_start: usize,
    input_end: usize,
}

impl Stream {
    /// Frames over `socket`; the guest is told `mtu`.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn new(socket: UnixStream, mtu: Option<u16>) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            _process: None,
            mtu,
            out: Vec::new(),
            out_start: 0,
            input: vec![0; NET_RECEIVE_BUFFER],
            input_start: 0,
            input_end: 0,
        })
    }

    /// Frames from and to passt, which ends with this.
    pub(super) fn with_process(self, process: Passt) -> Self {
        Self { _process: Some(process), ..self }
    }

    /// Length of the first complete frame in the buffer.
    fn complete(&self) -> io::Result<Option<usize>> {
        let held = self.input.get(self.input_start..self.input_end).unwrap_or(&[]);
        let Some((length, rest)) = held.split_first_chunk::<LENGTH_SIZE>() else { return Ok(None) };
        let len = u32::from_be_bytes(*length) as usize;
        if len > NET_FRAME_MAX {
            return Err(io::Error::new(ErrorKind::InvalidData, "a frame longer than any can be"));
        }
        Ok((rest.len() >= len).then_some(len))
    }

    /// Reads once; `false` when there was nothing.
    fn fill(&mut self) -> io::Result<bool> {
        if self.input_start > 0 {
            // Only the rest of one frame is left here.
            self.input.copy_within(self.input_start..self.input_end, 0);
            self.input_end -= self.input_start;
            self.input_start = 0;
        }
        loop {
            let target = self.input.get_mut(self.input_end..).unwrap_or(&mut []);
            match self.socket.read(target) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.input_end += count;
                    return Ok(true);
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }
}

impl Backend for Stream {
    fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    fn features(&self) -> u64 {
        0
    }

    fn mtu(&self) -> Option<u16> {
        self.mtu
    }

    fn negotiated(&mut self, _features: u64) -> io::Result<()> {
        Ok(())
    }

    fn send(
        &mut self,
        _header: &Header,
        len: usize,
        fill: &mut dyn FnMut(&mut [u8]) -> bool,
    ) -> io::Result<bool> {
        if self.out.len() - self.out_start > NET_TRANSMIT_BACKLOG {
            return Ok(false);
        }
        let start = self.out.len();
        self.out.extend((len as u32).to_be_bytes());
        self.out.resize(start + LENGTH_SIZE + len, 0);
        if !self.out.get_mut(start + LENGTH_SIZE..).is_some_and(fill) {
            self.out.truncate(start);
        }
        Ok(true)
    }

    fn flush(&mut self) -> io::Result<bool> {
        while let Some(rest) = self.out.get(self.out_start..).filter(|rest| !rest.is_empty()) {
            match self.socket.write(rest) {
                Ok(count) => self.out_start += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    self.out.drain(..self.out_start);
                    self.out_start = 0;
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        self.out.clear();
        self.out_start = 0;
        Ok(true)
    }

    fn peek(&mut self) -> io::Result<Option<(Header, &[u8])>> {
        let len = loop {
            if let Some(len) = self.complete()? {
                break len;
            }
            if !self.fill()? {
                return Ok(None);
            }
        };
        let start = self.input_start + LENGTH_SIZE;
        let frame = self.input.get(start..start + len);
        Ok(frame.map(|frame| ([0; HEADER_SIZE], frame)))
    }

    fn consume(&mut self) {
        if let Ok(Some(len)) = self.complete() {
            self.input_start += LENGTH_SIZE + len;
            if self.input_start == self.input_end {
                self.input_start = 0;
                self.input_end = 0;
            }
        }
    }
}
