//! What others who copy a slot of the software TLB have to drop.

/// What was dropped from a slot and is to be dropped by others who copy it.
#[derive(Default)]
pub struct Dropped {
    /// Everything.
    pub all: bool,
    /// Addresses and lengths, which are whole pages.
    pub pieces: Vec<(u64, u64)>,
}

impl Dropped {
    /// More pieces than it pays to drop one by one.
    const MANY: usize = 256;

    /// Adds a piece.
    pub fn add(&mut self, va: u64, len: u64) {
        if self.all {
            return;
        }
        self.pieces.push((va, len));
        if self.pieces.len() > Self::MANY {
            self.pieces.clear();
            self.all = true;
        }
    }
}
