//! The beginning of a stream: that it is an appliance, and its manifest. It tells one appliance from
//! another before any of its files has come.

use std::io::Read;

use crate::error::{ApplianceError, refused};
use crate::manifest::Manifest;
use crate::read::Stream;
use crate::wire::{Chain, Kind, MAGIC, VERSION};

/// A manifest as it came.
#[derive(Clone, Debug)]
pub struct Head {
    manifest: Manifest,
    bytes: Vec<u8>,
    pub(crate) chain: Chain,
}

impl Head {
    /// Reads the beginning of a stream, and no byte more.
    ///
    /// # Errors
    /// [`ApplianceError`].
    pub fn read(from: impl Read) -> Result<Self, ApplianceError> {
        let mut stream = Stream { from, at: 0 };
        let mut magic = [0; MAGIC.len()];
        match stream.fill(&mut magic) {
            Err(ApplianceError::Truncated { .. }) => return Err(ApplianceError::Other),
            result => result?,
        }
        if magic != MAGIC {
            return Err(ApplianceError::Other);
        }
        let mut version = [0; 4];
        stream.fill(&mut version)?;
        match u32::from_le_bytes(version) {
            VERSION => {}
            found => return Err(ApplianceError::Version { found, known: VERSION }),
        }
        let (begin, mut chain, mut body) = (stream.at, Chain::new(), Vec::new());
        let (kind, head) = stream.record(&mut body)?;
        if kind != Kind::Manifest {
            let what = "the first record is no manifest";
            return Err(ApplianceError::Damaged { at: begin, what });
        }
        chain.add(&head, &body);
        let manifest: Manifest =
            serde_json::from_slice(&body).map_err(|error| refused(error.to_string()))?;
        manifest.check()?;
        let bytes = [magic.as_slice(), &version, &head, &body].concat();
        Ok(Self { manifest, bytes, chain })
    }

    /// What it says of itself.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The bytes that were read.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The checksum of the beginning, in hexadecimal: another appliance has another one.
    #[must_use]
    pub fn sum(&self) -> String {
        self.chain.0.to_hex().to_string()
    }

    pub(crate) fn into_manifest(self) -> Manifest {
        self.manifest
    }
}
