//! What others who copy a slot of the software TLB have to drop.

/// What was dropped from a slot and is to be dropped by others who copy it.
#[derive(Default)]
pub struct Dropped {
    /// Everything.
    pub all: bool,
    /// Addresses of pages.
    pub pages: Vec<u64>,
    /// Addresses of regions of 2 MiB.
    pub regions: Vec<u64>,
}

impl Dropped {
    /// More pages than it pays to drop one by one.
    const MANY: usize = 256;

    /// Adds a page.
    pub fn add(&mut self, va: u64) {
        if self.all {
            return;
        }
        self.pages.push(va);
        if self.pages.len() > Self::MANY {
            self.everything();
        }
    }

    /// Adds a region.
    pub fn add_region(&mut self, va: u64) {
        if self.all {
            return;
        }
        self.regions.push(va);
        if self.regions.len() > Self::MANY {
            self.everything();
        }
    }

    fn everything(&mut self) {
        self.pages.clear();
        self.regions.clear();
        self.all = true;
    }
}
