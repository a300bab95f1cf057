//! What can be wrong with an appliance.

use std::io;

/// Why an appliance cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ApplianceError {
    /// It begins as something else.
    #[error("this is no appliance: it does not begin as a .berth file")]
    Other,
    /// A later program made it.
    #[error("the appliance has version {found}, and this program knows {known} only")]
    Version {
        /// What it says.
        found: u32,
        /// What is known.
        known: u32,
    },
    /// It ends before its end.
    #[error("the appliance ends too early, after {at} bytes; was it copied as a whole?")]
    Truncated {
        /// Bytes that were there.
        at: u64,
    },
    /// Something follows its end.
    #[error("something follows the end of the appliance, which is at {at} bytes")]
    Trailing {
        /// Where it ends.
        at: u64,
    },
    /// Bytes were altered, or it was made to be wrong.
    #[error("the appliance is damaged at {at} bytes: {what}")]
    Damaged {
        /// Where the record begins.
        at: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// A record does not fit those before it: what is wrong may be before it, too.
    #[error("the appliance is damaged at {at} bytes: {what}")]
    Unfit {
        /// Where the record begins.
        at: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// What was kept of one that broke off.
    #[error("what is kept of the appliance cannot be used: {what}")]
    Kept {
        /// What is wrong with it.
        what: &'static str,
    },
    /// What it says of itself is impossible.
    #[error("the appliance cannot be used: {reason}")]
    Manifest {
        /// Why.
        reason: String,
    },
    /// The stream cannot be read.
    #[error("reading the appliance failed")]
    Read(#[source] io::Error),
    /// The stream cannot be written.
    #[error("writing the appliance failed")]
    Write(#[source] io::Error),
    /// A file that is packed cannot be read.
    #[error("reading {file} failed")]
    Source {
        /// Which, for people.
        file: String,
        /// The system's reason.
        source: io::Error,
    },
    /// A file that is unpacked cannot be written.
    #[error("writing {file} failed")]
    Place {
        /// Which, for people.
        file: String,
        /// The system's reason.
        source: io::Error,
    },
}

/// A manifest that cannot be used.
pub(crate) fn refused(reason: impl Into<String>) -> ApplianceError {
    ApplianceError::Manifest { reason: reason.into() }
}
