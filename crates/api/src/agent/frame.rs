//! Frames: a length, a kind and a payload, cut out of a byte stream without trusting it.

use std::io::{self, Read, Write};

use super::limits::FRAME_PAYLOAD_BYTES_MAX;

const HEADER_BYTES: usize = 5;

/// One frame as it is on the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the payload is; see [`super::message`].
    pub kind: u8,
    /// At most [`FRAME_PAYLOAD_BYTES_MAX`] bytes.
    pub payload: Vec<u8>,
}

/// Why a frame could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// The header claims more than the protocol allows.
    #[error("a frame of kind {kind:#x} claims {len} bytes, more than {FRAME_PAYLOAD_BYTES_MAX}")]
    TooLong {
        /// The frame's kind.
        kind: u8,
        /// The claimed length.
        len: usize,
    },
    /// The stream ended inside a frame.
    #[error("the connection ended inside a frame")]
    Truncated,
    /// The stream failed.
    #[error("the connection failed")]
    Stream(#[source] io::Error),
}

impl Frame {
    /// The bytes of this frame.
    ///
    /// # Errors
    /// [`FrameError::TooLong`] when the payload is over the limit.
    pub fn encode(&self) -> Result<Vec<u8>, FrameError> {
        let len = self.payload.len();
        let too_long = FrameError::TooLong { kind: self.kind, len };
        let claimed = match u32::try_from(len) {
            Ok(claimed) if len <= FRAME_PAYLOAD_BYTES_MAX => claimed,
            _ => return Err(too_long),
        };
        let mut bytes = Vec::with_capacity(HEADER_BYTES + len);
        bytes.extend_from_slice(&claimed.to_le_bytes());
        bytes.push(self.kind);
        bytes.extend_from_slice(&self.payload);
        Ok(bytes)
    }

    /// Writes this frame whole and flushes.
    ///
    /// # Errors
    /// [`FrameError`] when it is too long or the stream fails.
    pub fn write_to(&self, stream: &mut impl Write) -> Result<(), FrameError> {
        stream.write_all(&self.encode()?).map_err(FrameError::Stream)?;
        stream.flush().map_err(FrameError::Stream)
    }

    /// Reads the next frame; `None` when the stream ends between two frames.
    ///
    /// # Errors
    /// [`FrameError`] when the stream fails, ends inside a frame, or claims too much.
    pub fn read_from(stream: &mut impl Read) -> Result<Option<Self>, FrameError> {
        let mut header = [0u8; HEADER_BYTES];
        let mut have = 0;
        while let Some(rest) = header.get_mut(have..).filter(|rest| !rest.is_empty()) {
            match stream.read(rest) {
                Ok(0) if have == 0 => return Ok(None),
                Ok(0) => return Err(FrameError::Truncated),
                Ok(read) => have += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(FrameError::Stream(error)),
            }
        }
        let (kind, len) = parse_header(header)?;
        let mut payload = vec![0u8; len];
        stream.read_exact(&mut payload).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => FrameError::Truncated,
            _ => FrameError::Stream(error),
        })?;
        Ok(Some(Self { kind, payload }))
    }
}

/// Cuts frames out of bytes that arrive in pieces; holds at most one unfinished frame and what was
/// pushed after it.
#[derive(Debug, Default)]
pub struct Decoder {
    bytes: Vec<u8>,
    taken: usize,
}

impl Decoder {
    /// Adds bytes read from the stream.
    pub fn push(&mut self, bytes: &[u8]) {
        if self.taken > 0 {
            self.bytes.drain(..self.taken);
            self.taken = 0;
        }
        self.bytes.extend_from_slice(bytes);
    }

    /// Whether the stream may end here: no part of a frame is waiting.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.taken == self.bytes.len()
    }

    /// The next whole frame, if there is one.
    ///
    /// # Errors
    /// [`FrameError::TooLong`]; the stream is useless after that.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let waiting = self.bytes.get(self.taken..).unwrap_or_default();
        let Some((header, rest)) = waiting.split_first_chunk::<HEADER_BYTES>() else {
            return Ok(None);
        };
        let (kind, len) = parse_header(*header)?;
        let Some(payload) = rest.get(..len) else {
            return Ok(None);
        };
        let payload = payload.to_vec();
        self.taken += HEADER_BYTES + len;
        Ok(Some(Frame { kind, payload }))
    }
}

fn parse_header(header: [u8; HEADER_BYTES]) -> Result<(u8, usize), FrameError> {
    let [a, b, c, d, kind] = header;
    let len = usize::try_from(u32::from_le_bytes([a, b, c, d])).unwrap_or(usize::MAX);
    if len > FRAME_PAYLOAD_BYTES_MAX {
        return Err(FrameError::TooLong { kind, len });
    }
    Ok((kind, len))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// xorshift64*: the tests must not depend on anything outside them.
    struct Random(u64);

    impl Random {
        fn next(&mut self) -> u64 {
            self.0 ^= self.0 >> 12;
            self.0 ^= self.0 << 25;
            self.0 ^= self.0 >> 27;
            self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
        }

        fn below(&mut self, limit: usize) -> usize {
            (self.next() % limit as u64) as usize
        }
    }

    fn frames(random: &mut Random, count: usize) -> Vec<Frame> {
        (0..count)
            .map(|_| {
                let len = random.below(2000);
                Frame {
                    kind: random.next() as u8,
                    payload: (0..len).map(|_| random.next() as u8).collect(),
                }
            })
            .collect()
    }

    #[test]
    fn pieces_of_any_size_give_the_same_frames() {
        for seed in 1..200 {
            let mut random = Random(seed);
            let sent = frames(&mut random, 20);
            let wire: Vec<u8> = sent.iter().flat_map(|frame| frame.encode().unwrap()).collect();
            let mut decoder = Decoder::default();
            let mut got = Vec::new();
            let mut rest = wire.as_slice();
            while !rest.is_empty() {
                let (piece, after) = rest.split_at(1 + random.below(rest.len().min(3000)));
                decoder.push(piece);
                while let Some(frame) = decoder.next_frame().unwrap() {
                    got.push(frame);
                }
                rest = after;
            }
            assert_eq!(got, sent, "seed {seed}");
            assert!(decoder.is_empty());
            let mut stream = wire.as_slice();
            for frame in &sent {
                assert_eq!(Frame::read_from(&mut stream).unwrap().as_ref(), Some(frame));
            }
            assert!(Frame::read_from(&mut stream).unwrap().is_none());
        }
    }

    #[test]
    fn both_readers_agree_on_damaged_streams() {
        let mut refused = 0;
        for seed in 1..3000 {
            let mut random = Random(seed);
            let sent = frames(&mut random, 4);
            let mut wire: Vec<u8> = sent.iter().flat_map(|f| f.encode().unwrap()).collect();
            let at = random.below(wire.len());
            match seed % 3 {
                0 => wire.truncate(at),
                1 => wire[at] ^= 1 << random.below(8),
                _ => wire = (0..at.min(64)).map(|_| random.next() as u8).collect(),
            }
            let mut decoder = Decoder::default();
            decoder.push(&wire);
            let mut pushed = Vec::new();
            let pushed_error = loop {
                match decoder.next_frame() {
                    Ok(Some(frame)) => pushed.push(frame),
                    Ok(None) => break !decoder.is_empty(),
                    Err(_) => break true,
                }
            };
            let mut stream = wire.as_slice();
            let mut read = Vec::new();
            let read_error = loop {
                match Frame::read_from(&mut stream) {
                    Ok(Some(frame)) => read.push(frame),
                    Ok(None) => break false,
                    Err(_) => break true,
                }
            };
            assert_eq!((&read, read_error), (&pushed, pushed_error), "seed {seed}");
            refused += usize::from(read_error);
        }
        assert!(refused > 500, "the damage must be noticed: {refused}");
    }

    #[test]
    fn a_claim_over_the_limit_is_refused_before_the_payload() {
        let mut wire = (FRAME_PAYLOAD_BYTES_MAX as u32 + 1).to_le_bytes().to_vec();
        wire.push(7);
        let mut decoder = Decoder::default();
        decoder.push(&wire);
        assert!(matches!(decoder.next_frame(), Err(FrameError::TooLong { kind: 7, .. })));
        let long = Frame { kind: 1, payload: vec![0; FRAME_PAYLOAD_BYTES_MAX + 1] };
        assert!(matches!(long.encode(), Err(FrameError::TooLong { .. })));
    }
}
