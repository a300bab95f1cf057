//! What is known of accesses at the ends of pages, where the next page may be another one in the host
//! than in the guest: which instructions make them often, and between which pages.

use crate::code::FastMap;
use crate::translate::Ends;

/// Instructions remembered before all are forgotten.
const INSTRUCTIONS_MAX: usize = 1 << 14;
/// Borders remembered before all are forgotten.
const BORDERS_MAX: usize = 1 << 12;
/// Accesses of an instruction after which it is translated in another way.
const OFTEN: u8 = 16;

/// What one vCPU knows.
#[derive(Default)]
pub struct PageEnds {
    /// By physical address: how an instruction is translated, and how often that was wrong.
    instructions: FastMap<u64, (Ends, u8)>,
    /// Physical addresses of pages between which an access crossed once.
    borders: FastMap<(u64, u64), ()>,
}

impl PageEnds {
    /// How the instruction at a physical address is to be translated.
    pub fn of(&self, gpa: u64) -> Ends {
        self.instructions.get(&gpa).map_or(Ends::Seldom, |(ends, _)| *ends)
    }

    /// The instruction at `gpa` went beyond the end of a page; for that, `wanted` would be right.
    /// `paired`: between pages that have a mapping of both now, so that nothing would. Whether it is
    /// to be translated in another way from now on.
    pub fn crossed(&mut self, gpa: u64, wanted: Ends, paired: bool) -> bool {
        if self.instructions.len() >= INSTRUCTIONS_MAX {
            self.instructions.clear();
        }
        let (now, count) = self.instructions.entry(gpa).or_default();
        let change = match (*now, paired) {
            (Ends::Cross, true) => Ends::Seldom,
            (_, true) => return false,
            (now, false) if now == wanted || now == Ends::Cross => return false,
            (_, false) => wanted,
        };
        *count += 1;
        if *count < OFTEN {
            return false;
        }
        (*now, *count) = (change, 0);
        true
    }

    /// An access went from one page to another; whether one did before.
    pub fn again(&mut self, pages: (u64, u64)) -> bool {
        if self.borders.len() >= BORDERS_MAX {
            self.borders.clear();
        }
        self.borders.insert(pages, ()).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::{OFTEN, PageEnds};
    use crate::translate::Ends;

    #[test]
    fn instructions_change_when_they_were_wrong_often() {
        let mut ends = PageEnds::default();
        for (wanted, paired, then) in [
            (Ends::Apart, false, Ends::Apart),
            (Ends::Cross, false, Ends::Cross),
            (Ends::Cross, true, Ends::Seldom),
        ] {
            for _ in 1..OFTEN {
                assert!(!ends.crossed(7, wanted, paired));
                assert_ne!(ends.of(7), then);
            }
            assert!(ends.crossed(7, wanted, paired));
            assert_eq!((ends.of(7), ends.of(8)), (then, Ends::Seldom));
        }
        // What looks for itself is right for accesses within a page, too; pairs need nothing.
        for _ in 0..2 * OFTEN {
            assert!(!ends.crossed(7, Ends::Cross, true));
            assert!(!ends.crossed(7, Ends::Seldom, false));
        }
        assert!(!ends.again((1, 2)) && !ends.again((2, 1)) && ends.again((1, 2)));
    }
}
