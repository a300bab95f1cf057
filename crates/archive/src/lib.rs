//! Files and folders as tar streams: what `berth vm cp` sends, in either direction.
//!
//! [`pack`] reads what its caller may read. [`unpack`] trusts nothing of a stream: whatever it says,
//! files appear in the destination and nowhere else. Owners, modes, times, links and the contents of
//! files are kept; extended attributes and what is neither file, folder nor link are not.
#![forbid(unsafe_code)]

pub mod error;
pub mod flat;
pub mod limits;
pub mod pack;
pub mod place;
pub mod unpack;
