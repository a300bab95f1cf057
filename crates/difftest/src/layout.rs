//! Where code, data and stack of a case live: the same linear addresses in the native child process
//! and in the guest.
//!
//! A *world* is one base address with three regions at fixed offsets. The low world lies below
//! 2 GiB, so that absolute 32-bit displacements, the 67 prefix and compatibility mode reach it; the
//! high world needs all 64 bits.
//!
//! ```text
//! base+0x00000  code   2 pages  read write execute
//! base+0x10000  data   4 pages  read write          (page before: unmapped)
//! base+0x14000  hole            unmapped
//! base+0x15000  const  1 page   read only           (page after: unmapped)
//! base+0x20000  stack  2 pages  read write          (pages around: unmapped)
//! ```
//!
//! The *image* is the mapped pages of a world one after another: what is reset before and compared
//! after each case.

/// Bytes of a page.
pub const PAGE: u32 = 4096;

/// Which base address a case uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum World {
    /// Below 2 GiB.
    Low,
    /// Above 4 GiB.
    High,
}

impl World {
    /// Both worlds, in the order of their images in the backing file.
    pub const ALL: [Self; 2] = [Self::Low, Self::High];

    /// Linear address of the world.
    #[must_use]
    pub const fn base(self) -> u64 {
        match self {
            Self::Low => 0x3000_0000,
            Self::High => 0x10_0000_0000,
        }
    }

    /// Position in [`World::ALL`].
    #[must_use]
    pub const fn index(self) -> usize {
        match self {
            Self::Low => 0,
            Self::High => 1,
        }
    }

    /// The linear address of a byte of the image.
    #[must_use]
    pub fn linear(self, image_offset: u32) -> Option<u64> {
        Region::ALL.iter().find_map(|r| {
            let within = image_offset.checked_sub(r.image)?;
            (within < r.pages * PAGE).then(|| self.base() + u64::from(r.offset + within))
        })
    }

    /// The image offset of a linear address, when `len` bytes there are in one region.
    #[must_use]
    pub fn image_offset(self, addr: u64, len: u32) -> Option<u32> {
        let rel = u32::try_from(addr.checked_sub(self.base())?).ok()?;
        Region::ALL.iter().find_map(|r| {
            let within = rel.checked_sub(r.offset)?;
            (within.checked_add(len)? <= r.pages * PAGE).then_some(r.image + within)
        })
    }
}

/// Rights of a region's pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Read, write and execute.
    All,
    /// Read and write.
    Write,
    /// Read.
    Read,
}

/// A run of pages with the same rights.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Offset from the world's base.
    pub offset: u32,
    /// Offset in the image.
    pub image: u32,
    /// Number of pages.
    pub pages: u32,
    /// Rights of the user program.
    pub rights: Rights,
}

/// Code.
pub const CODE: Region = Region { offset: 0, image: 0, pages: 2, rights: Rights::All };
/// Data.
pub const DATA: Region =
    Region { offset: 0x1_0000, image: 2 * PAGE, pages: 4, rights: Rights::Write };
/// Data that may only be read.
pub const CONST: Region =
    Region { offset: 0x1_5000, image: 6 * PAGE, pages: 1, rights: Rights::Read };
/// Stack.
pub const STACK: Region =
    Region { offset: 0x2_0000, image: 7 * PAGE, pages: 2, rights: Rights::Write };
/// Offset of the unmapped page between data and constants.
pub const HOLE: u32 = 0x1_4000;

impl Region {
    /// All regions in image order.
    pub const ALL: [Self; 4] = [CODE, DATA, CONST, STACK];

    /// Bytes of the region.
    #[must_use]
    pub const fn len(&self) -> u32 {
        self.pages * PAGE
    }

    /// Never: a region has at least one page.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.pages == 0
    }
}

/// Bytes of a world's image.
pub const IMAGE: u32 = 9 * PAGE;

/// The byte every unused place of the code region holds: INT3, so that a case that runs off its
/// instructions ends.
pub const FILL: u8 = 0xcc;

/// The image before the patches of a case: INT3 in the code region, elsewhere numbers that mean
/// something to some instruction (integers near limits, floating-point values, small numbers).
#[must_use]
pub fn base_image() -> Vec<u8> {
    let mut rng = crate::rng::Rng::new(0x6265_7274_685f_6d65);
    let mut image = vec![FILL; CODE.len() as usize];
    while image.len() < IMAGE as usize {
        image.extend_from_slice(&crate::values::vector(&mut rng));
    }
    image
}

#[cfg(test)]
mod tests {
    use super::{DATA, IMAGE, PAGE, Region, World, base_image};

    #[test]
    fn image_offsets_and_addresses_are_inverse() {
        for world in World::ALL {
            for offset in (0..IMAGE).step_by(64) {
                let addr = world.linear(offset).unwrap();
                assert_eq!(world.image_offset(addr, 64), Some(offset));
            }
            assert_eq!(world.linear(IMAGE), None);
            assert_eq!(world.image_offset(world.base() + u64::from(DATA.offset) - 1, 1), None);
        }
    }

    #[test]
    fn the_regions_fill_the_image() {
        let pages: u32 = Region::ALL.iter().map(|r| r.pages).sum();
        assert_eq!(pages * PAGE, IMAGE);
        assert_eq!(base_image().len(), IMAGE as usize);
    }
}
