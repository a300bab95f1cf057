//! Appliances: a machine in one file, `NAME.berth`, with its configuration, kernel, disks and, if that
//! was asked for, its memory.
//!
//! The file is a stream: [`write`] needs no seeking, and [`read`] none either. What is in it is
//! `docs/formats/appliance.md`. Nothing of what a stream says is believed before it has been checked
//! against [`limits`], and there are no paths in it: files have roles, and whoever unpacks them knows
//! where they go. A stream that broke off goes on at a [`checkpoint`]. [`ovf`] is what other programs have instead. Nothing here knows disks or folders; the daemon and the command line call it.
#![forbid(unsafe_code)]

pub mod check;
pub mod checkpoint;
pub mod error;
pub mod head;
pub mod limits;
pub mod manifest;
pub mod ovf;
pub mod read;
mod wire;
pub mod write;

#[cfg(test)]
mod tests;
