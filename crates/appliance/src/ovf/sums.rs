//! The list of checksums beside a description: `SHA256(NAME)= HEX`, a line each.

use std::io::{self, Read};

use sha1::Sha1;
use sha2::digest::DynDigest;
use sha2::{Digest, Sha256, Sha512};

use crate::ovf::OvfError;

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 256 << 10;

/// How a file is summed up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Algorithm {
    /// As older programs do.
    Sha1,
    /// What is written.
    Sha256,
    /// As few programs do.
    Sha512,
}

/// A line of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sum {
    /// Of which file.
    pub name: String,
    /// How.
    pub algorithm: Algorithm,
    /// In hexadecimal, with small letters.
    pub hex: String,
}

/// Reads a list.
///
/// # Errors
/// [`OvfError`] names the line that is not understood.
pub fn read(text: &str) -> Result<Vec<Sum>, OvfError> {
    let mut sums = Vec::new();
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let parsed = (|| {
            let (kind, rest) = line.split_once('(')?;
            let (name, hex) = rest.rsplit_once(")=").or_else(|| rest.rsplit_once(") ="))?;
            let algorithm = match kind.trim().to_ascii_uppercase().as_str() {
                "SHA1" => Algorithm::Sha1,
                "SHA256" => Algorithm::Sha256,
                "SHA512" => Algorithm::Sha512,
                _ => return None,
            };
            let hex = hex.trim().to_ascii_lowercase();
            Some(Sum { name: name.to_owned(), algorithm, hex })
        })();
        match parsed {
            Some(sum) => sums.push(sum),
            None => return Err(OvfError(format!("no checksum is in the line `{line}`"))),
        }
    }
    Ok(sums)
}

impl Algorithm {
    /// The sum of what comes, in hexadecimal.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn sum(self, mut from: impl Read) -> io::Result<String> {
        let mut digest: Box<dyn DynDigest> = match self {
            Self::Sha1 => Box::new(Sha1::new()),
            Self::Sha256 => Box::new(Sha256::new()),
            Self::Sha512 => Box::new(Sha512::new()),
        };
        let mut chunk = vec![0; CHUNK_BYTES];
        loop {
            match from.read(&mut chunk) {
                Ok(0) => break,
                Ok(count) => digest.update(chunk.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// A line of a list.
#[must_use]
pub fn line(name: &str, hex: &str) -> String {
    format!("SHA256({name})= {hex}\n")
}
