//! The files that the guest has open, by numbers that it was given.

use std::collections::HashMap;
use std::os::fd::OwnedFd;

use rustix::io::Errno;

/// What is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A regular file.
    File,
    /// A folder.
    Folder,
}

/// The open files.
pub(super) struct Handles {
    open: HashMap<u64, (Kind, u64, OwnedFd)>,
    next: u64,
    max: usize,
}

impl Handles {
    /// At most so many.
    pub fn new(max: usize) -> Self {
        Self { open: HashMap::new(), next: 1, max }
    }

    /// Whether there is room for one more.
    pub fn check_room(&self) -> Result<(), Errno> {
        if self.open.len() < self.max { Ok(()) } else { Err(Errno::NFILE) }
    }

    /// The number of one that was opened, of the node with that number.
    pub fn add(&mut self, kind: Kind, node: u64, file: OwnedFd) -> Result<u64, Errno> {
        self.check_room()?;
        let number = self.next;
        self.next += 1;
        self.open.insert(number, (kind, node, file));
        Ok(number)
    }

    /// One of that kind.
    pub fn get(&self, kind: Kind, number: u64) -> Result<&OwnedFd, Errno> {
        match self.open.get(&number) {
            Some((found, _, file)) if *found == kind => Ok(file),
            _ => Err(Errno::BADF),
        }
    }

    /// Closes one; gives its node.
    pub fn close(&mut self, number: u64) -> Result<u64, Errno> {
        self.open.remove(&number).map(|(_, node, _)| node).ok_or(Errno::BADF)
    }

    /// Closes all.
    pub fn close_all(&mut self) {
        self.open.clear();
    }
}
