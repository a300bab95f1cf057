//! Sets of pages that jump caches lead to.

/// Pages, some more than were added.
pub struct Sources([u64; 64]);

impl Default for Sources {
    fn default() -> Self {
        Self([0; 64])
    }
}

impl Sources {
    /// Word and bit of page `n`, or of gibibyte `n` with large pages.
    const fn place(n: u64, large: bool) -> (usize, u64) {
        let hash = (n ^ (large as u64) << 60).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 52;
        ((hash >> 6) as usize, 1 << (hash & 63))
    }

    /// Adds the page of `va`, or its gibibyte if it is mapped by a large page.
    pub fn add(&mut self, va: u64, large: bool) {
        let (word, bit) = Self::place(if large { va >> 30 } else { va >> 12 }, large);
        self.0[word] |= bit;
    }

    /// Whether page `n`, or gibibyte `n`, may have been added.
    pub fn have(&self, n: u64, large: bool) -> bool {
        let (word, bit) = Self::place(n, large);
        self.0[word] & bit != 0
    }
}
