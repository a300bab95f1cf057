//! Whether a stream that goes by is an appliance to its end. Nothing is unpacked: that its records are
//! those that were written is enough.

use crate::error::ApplianceError;
use crate::wire::{Chain, HEAD_BYTES, Kind, MAGIC, VERSION, opening};

/// Looks at a stream in pieces of any length.
#[derive(Debug)]
pub struct Checker {
    /// What has come of the next record.
    record: Vec<u8>,
    /// Bytes before that record.
    at: u64,
    chain: Chain,
    is_over: bool,
}

impl Default for Checker {
    fn default() -> Self {
        Self { record: Vec::new(), at: 0, chain: Chain::new(), is_over: false }
    }
}

impl Checker {
    /// Looks at what comes next.
    ///
    /// # Errors
    /// [`ApplianceError`] when it cannot be part of an appliance.
    pub fn push(&mut self, bytes: &[u8]) -> Result<(), ApplianceError> {
        let mut bytes = bytes;
        while !bytes.is_empty() {
            if self.is_over {
                return Err(ApplianceError::Trailing { at: self.at });
            }
            let missing = self.missing()?;
            let (part, rest) = bytes.split_at(missing.min(bytes.len()));
            self.record.extend_from_slice(part);
            bytes = rest;
            if self.missing()? == 0 {
                self.end_record()?;
            }
        }
        Ok(())
    }

    /// Bytes until the next thing can be said.
    fn missing(&self) -> Result<usize, ApplianceError> {
        let have = self.record.len();
        if self.at == 0 {
            return Ok((MAGIC.len() + 4).saturating_sub(have));
        }
        match self.record.first_chunk::<HEAD_BYTES>() {
            None => Ok(HEAD_BYTES - have),
            Some(head) => Ok((Kind::parse(*head, self.at)?.1 + HEAD_BYTES).saturating_sub(have)),
        }
    }

    fn end_record(&mut self) -> Result<(), ApplianceError> {
        if self.at == 0 {
            if self.record != opening(VERSION) {
                return Err(ApplianceError::Other);
            }
        } else if let Some((head, body)) = self.record.split_first_chunk::<HEAD_BYTES>() {
            let (kind, _) = Kind::parse(*head, self.at)?;
            if kind == Kind::End {
                self.is_over = body.get(8..) == Some(self.chain.0.as_bytes());
                if !self.is_over {
                    let what = "the checksum of all of it is another";
                    return Err(ApplianceError::Damaged { at: self.at, what });
                }
            }
            self.chain.add(head, body);
        }
        self.at += self.record.len() as u64;
        self.record.clear();
        Ok(())
    }

    /// Whether that was all.
    ///
    /// # Errors
    /// [`ApplianceError::Truncated`] when it was not.
    pub fn finish(self) -> Result<(), ApplianceError> {
        match self.is_over {
            true => Ok(()),
            false => Err(ApplianceError::Truncated { at: self.at + self.record.len() as u64 }),
        }
    }
}
