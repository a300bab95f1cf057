//! The header of a vsock packet.
//!
//! ```text
//! 0 src_cid u64    16 src_port u32   24 len u32    30 op u16      36 buf_alloc u32
//! 8 dst_cid u64    20 dst_port u32   28 type u16   32 flags u32   40 fwd_cnt u32
//! ```

/// Bytes of the header.
pub(super) const HEADER_SIZE: usize = 44;
/// The host's address.
pub(super) const HOST_CID: u64 = 2;
/// The only type of socket offered.
pub(super) const TYPE_STREAM: u16 = 1;

/// SHUTDOWN flag: the sender receives no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// SHUTDOWN flag: the sender sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// What a packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Op {
    pub fn from_raw(raw: u16) -> Option<Self> {
        let all = [
            Self::Request,
            Self::Response,
            Self::Reset,
            Self::Shutdown,
            Self::Data,
            Self::CreditUpdate,
            Self::CreditRequest,
        ];
        all.into_iter().find(|op| *op as u16 == raw)
    }
}

/// A header in the host's byte order; nothing in it has been checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub src_cid: u64,
    pub dst_cid: u64,
    pub src_port: u32,
    pub dst_port: u32,
    pub len: u32,
    pub kind: u16,
    pub op: u16,
    pub flags: u32,
    pub buf_alloc: u32,
    pub fwd_cnt: u32,
}

impl Header {
    pub fn parse(raw: &[u8; HEADER_SIZE]) -> Self {
        let u32_at = |at: usize| {
            let bytes = raw.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let kind_and_op = u32_at(28);
        Self {
            src_cid: u64_at(0),
            dst_cid: u64_at(8),
            src_port: u32_at(16),
            dst_port: u32_at(20),
            len: u32_at(24),
            kind: kind_and_op as u16,
            op: (kind_and_op >> 16) as u16,
            flags: u32_at(32),
            buf_alloc: u32_at(36),
            fwd_cnt: u32_at(40),
        }
    }

    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let mut raw = [0; HEADER_SIZE];
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        for (byte, value) in raw.iter_mut().zip(fields.into_iter().flatten()) {
            *byte = *value;
        }
        raw
    }
}
