//! Compares the counts of an image with what refers to its clusters. Reads only.

use std::collections::HashSet;
use std::io;

use crate::limits::{CHECK_CLUSTERS_MAX, CHECK_FINDINGS_MAX, CHECK_TABLES_MAX};
use crate::qcow2::header::{Header, HeaderError, be32, be64};
use crate::qcow2::refcounts::count_in;
use crate::qcow2::table::{COPIED, Mapping, PLACE, to_numbers};
use crate::storage::{Storage, read_exact, read_padded};

/// What a check found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// References without a count, impossible places and the like: data is lost or will be.
    pub corruptions: u64,
    /// Clusters that are counted and not used: lost space.
    pub leaks: u64,
    /// Clusters of the disk that have data in the file.
    pub data_clusters: u64,
    /// The first findings.
    pub findings: Vec<String>,
}

impl Report {
    /// Whether the image can be used.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.corruptions == 0
    }

    fn corruption(&mut self, text: impl FnOnce() -> String) {
        self.corruptions += 1;
        self.tell(text);
    }

    fn tell(&mut self, text: impl FnOnce() -> String) {
        if self.findings.len() < CHECK_FINDINGS_MAX {
            self.findings.push(text());
        }
    }
}

struct Check<'a> {
    storage: &'a dyn Storage,
    header: Header,
    /// References found to each cluster of the file; 255 and more are 255.
    found: Vec<u8>,
    /// What the image says of it, likewise.
    stored: Vec<u8>,
    /// L2 tables that were looked into.
    visited: HashSet<u64>,
    /// How many more may be, with those that snapshots share.
    visits_left: u64,
    report: Report,
}

/// Checks an image.
///
/// # Errors
/// It is none, it cannot be read, or it is too large to be checked.
pub fn check(storage: &dyn Storage) -> Result<Report, HeaderError> {
    let header = Header::read(storage)?;
    let size = storage.size().map_err(HeaderError::Read)?;
    let clusters = size.div_ceil(header.cluster_bytes());
    if clusters > CHECK_CLUSTERS_MAX {
        return Err(HeaderError::Unsupported("more clusters than can be checked".into()));
    }
    let mut check = Check {
        storage,
        header,
        found: vec![0; clusters as usize],
        stored: vec![0; clusters as usize],
        visited: HashSet::new(),
        visits_left: CHECK_TABLES_MAX,
        report: Report::default(),
    };
    check.run().map_err(HeaderError::Read)?;
    Ok(check.report)
}

impl Check<'_> {
    fn run(&mut self) -> io::Result<()> {
        let cluster = self.header.cluster_bytes();
        if self.header.corrupt {
            self.report.corruption(|| "it is marked as corrupt".to_owned());
        }
        if self.header.dirty {
            self.report.corruption(|| "it was not closed by its last user".to_owned());
        }
        self.refer("the header", 0, cluster);
        let table_bytes = u64::from(self.header.reftable_clusters) * cluster;
        self.refer("the table of counts", self.header.reftable_offset, table_bytes);
        let mut raw = vec![0; table_bytes as usize];
        read_padded(self.storage, &mut raw, self.header.reftable_offset)?;
        for (index, place) in to_numbers(&raw).into_iter().enumerate() {
            if place != 0 && self.refer("a block of counts", place, cluster) {
                self.take_counts(index as u64, place)?;
            }
        }
        let (offset, entries) = (self.header.l1_offset, self.header.l1_entries);
        self.visit_l1(offset, entries)?;
        self.visit_snapshots()?;
        self.visit_flags()?;
        self.compare();
        Ok(())
    }

    /// Counts of a block without a place are taken for zero.
    fn take_counts(&mut self, index: u64, place: u64) -> io::Result<()> {
        let order = self.header.refcount_order;
        let per_block = (self.header.cluster_bytes() * 8) >> order;
        let first = index.saturating_mul(per_block).min(self.stored.len() as u64) as usize;
        let mut raw = vec![0; self.header.cluster_bytes() as usize];
        read_padded(self.storage, &mut raw, place)?;
        let counts = self.stored.iter_mut().skip(first).take(per_block as usize);
        for (slot, count) in counts.enumerate() {
            *count = count_in(&raw, order, slot).min(255) as u8;
        }
        Ok(())
    }

    /// Notes that something is in a range of the file. Says whether it can be there.
    fn refer(&mut self, what: &str, place: u64, bytes: u64) -> bool {
        let bits = self.header.cluster_bits;
        let end = place.saturating_add(bytes.max(1));
        let (first, last) = (place >> bits, (end - 1) >> bits);
        let aligned = place.is_multiple_of(self.header.cluster_bytes());
        if !aligned || last >= self.found.len() as u64 {
            self.report.corruption(|| format!("{what} is said to be at {place:#x}"));
            return false;
        }
        self.count(first, last);
        true
    }

    fn count(&mut self, first: u64, last: u64) {
        let range = self.found.get_mut(first as usize..=last as usize);
        range.unwrap_or_default().iter_mut().for_each(|count| *count = count.saturating_add(1));
    }

    fn visit_l1(&mut self, offset: u64, entries: u32) -> io::Result<()> {
        let bytes = u64::from(entries) * 8;
        if entries == 0 || !self.refer("an L1 table", offset, bytes) {
            return Ok(());
        }
        let mut raw = vec![0; bytes as usize];
        read_padded(self.storage, &mut raw, offset)?;
        for entry in to_numbers(&raw).into_iter().filter(|entry| entry & PLACE != 0) {
            let cluster = self.header.cluster_bytes();
            let there = self.refer("an L2 table", entry & PLACE, cluster);
            // Only snapshots share tables; else it is damage, and is counted once.
            let again = !self.visited.insert(entry & PLACE);
            if !there || (again && self.header.snapshots == 0) {
                continue;
            }
            let left = self.visits_left.checked_sub(1);
            self.visits_left = left.ok_or_else(|| io::Error::other("too many L2 tables"))?;
            self.visit_l2(entry & PLACE)?;
        }
        Ok(())
    }

    fn read_table(&self, place: u64) -> io::Result<Vec<u64>> {
        let mut raw = vec![0; self.header.cluster_bytes() as usize];
        read_padded(self.storage, &mut raw, place)?;
        Ok(to_numbers(&raw))
    }

    fn visit_l2(&mut self, place: u64) -> io::Result<()> {
        let cluster = self.header.cluster_bytes();
        for entry in self.read_table(place)? {
            match Mapping::decode(entry, &self.header) {
                Ok(Mapping::Data { place, .. } | Mapping::Zero { place: Some(place) }) => {
                    self.report.data_clusters += 1;
                    self.refer("a cluster of the disk", place, cluster);
                }
                Ok(Mapping::Compressed { place, bytes }) => {
                    self.report.data_clusters += 1;
                    let bits = self.header.cluster_bits;
                    let (first, last) = (place >> bits, (place + bytes - 1) >> bits);
                    // The last sector may be beyond the end.
                    if first < self.found.len() as u64 {
                        self.count(first, last.min(self.found.len() as u64 - 1));
                    } else {
                        let text = || format!("a compressed cluster is said to be at {place:#x}");
                        self.report.corruption(text);
                    }
                }
                Ok(Mapping::Below | Mapping::Zero { place: None }) => {}
                Err(_) => {
                    let text = || format!("entry {entry:#x} of the L2 table at {place:#x}");
                    self.report.corruption(text);
                }
            }
        }
        Ok(())
    }

    /// Snapshots have L1 tables of their own.
    fn visit_snapshots(&mut self) -> io::Result<()> {
        let mut at = self.header.snapshots_offset;
        for _ in 0..self.header.snapshots {
            let mut entry = [0; 40];
            if read_exact(self.storage, &mut entry, at).is_err() {
                self.report.corruption(|| format!("no snapshot is at {at:#x}"));
                return Ok(());
            }
            let (l1_offset, l1_entries) = (be64(&entry, 0), be32(&entry, 8));
            if u64::from(l1_entries) * 8 > crate::limits::L1_BYTES_MAX {
                self.report.corruption(|| "the L1 table of a snapshot is too large".to_owned());
                return Ok(());
            }
            self.visit_l1(l1_offset, l1_entries)?;
            let (id, name) = (be32(&entry, 12) >> 16, be32(&entry, 12) & 0xffff);
            let bytes = 40 + u64::from(be32(&entry, 36)) + u64::from(id) + u64::from(name);
            at = at.saturating_add(bytes.next_multiple_of(8));
        }
        let bytes = at - self.header.snapshots_offset;
        if bytes > 0 {
            self.refer("the table of snapshots", self.header.snapshots_offset, bytes);
        }
        Ok(())
    }

    /// What may be written in place must be counted once.
    fn visit_flags(&mut self) -> io::Result<()> {
        let mut raw = vec![0; self.header.l1_entries as usize * 8];
        read_padded(self.storage, &mut raw, self.header.l1_offset)?;
        self.visited.clear();
        for entry in to_numbers(&raw).into_iter().filter(|entry| entry & PLACE != 0) {
            self.compare_flag("an L2 table", entry & PLACE, entry & COPIED != 0);
            let there = (entry & PLACE) >> self.header.cluster_bits < self.found.len() as u64;
            if !there || !self.visited.insert(entry & PLACE) {
                continue;
            }
            for entry in self.read_table(entry & PLACE)? {
                let mapping = Mapping::decode(entry, &self.header);
                if let Ok(Mapping::Data { place, .. } | Mapping::Zero { place: Some(place) }) =
                    mapping
                {
                    self.compare_flag("a cluster of the disk", place, entry & COPIED != 0);
                }
            }
        }
        Ok(())
    }

    fn compare_flag(&mut self, what: &str, place: u64, copied: bool) {
        let index = (place >> self.header.cluster_bits) as usize;
        let count = self.stored.get(index).copied().unwrap_or_default();
        if copied && count != 1 {
            let text = || format!("{what} at {place:#x} is its own, and is counted {count} times");
            self.report.corruption(text);
        }
    }

    fn compare(&mut self) {
        for (cluster, (stored, found)) in self.stored.iter().zip(&self.found).enumerate() {
            let text =
                || format!("cluster {cluster} is counted {stored} times, used {found} times");
            if stored < found {
                self.report.corruption(text);
            } else if stored > found && *found < 255 {
                self.report.leaks += 1;
                self.report.tell(|| format!("leaked: {}", text()));
            }
        }
    }
}
