//! qcow2 images, versions 2 and 3.
//!
//! An image maps clusters of the disk to clusters of its file by tables of two levels, and counts the
//! references to each cluster of the file:
//!
//! ```text
//! header ── L1 table ── L2 tables ── data clusters         what has no mapping is the backing file's,
//!   └────── table of counts ── blocks of counts            or zero
//! ```
//!
//! `header` reads the first cluster and refuses what is damaged or not supported, `image` maps reads
//! and writes, `refcounts` finds free clusters, `commit` writes tables out in an order that survives a
//! crash at any point, `check` compares counts with references.

pub mod check;
mod commit;
pub mod create;
pub mod header;
pub mod image;
mod refcounts;
mod table;
#[cfg(test)]
mod tests;
