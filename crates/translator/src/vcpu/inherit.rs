//! What a vCPU has translated, for the vCPU of a clone.

use std::io;
use std::time::{Duration, Instant};

use crate::code::CodeCache;
use crate::ram::Origin;
use crate::sys;
use crate::{Config, Optimizations, SetupError};

use super::Inner;

/// How long a clone takes until most of the pages it needs are its own.
const SETTLING: Duration = Duration::from_millis(300);

/// What a vCPU has translated. It is of use to a vCPU of a machine that goes on with the same memory,
/// in another process of the same program.
#[derive(Clone, Debug, Default)]
pub struct SharedCode {
    /// Where host code and its tables are.
    pub pages: Origin,
    /// What else belongs to it.
    pub numbers: Vec<u64>,
    /// Numbers of the guest physical pages that it was made from.
    pub guest_pages: Vec<u64>,
}

/// What the code was made for.
fn made_for(thunk_bytes: u64, optimizations: Optimizations) -> Option<[u64; 5]> {
    let [a, b, c] = sys::build_id()?;
    Some([a, b, c, thunk_bytes, u64::from(optimizations.bits())])
}

/// What belongs to code besides the cache.
pub(super) struct Around {
    /// Bytes of the thunks it calls.
    pub(super) thunks: u64,
    /// Blocks look for accesses that cross into another page.
    checked: bool,
    /// How many address spaces there were.
    spaces: u16,
    /// For each slot its PCID, and the number of the address space.
    slots: Vec<(Option<u16>, u16)>,
    /// The guest pages it was made from.
    guest_pages: Vec<u64>,
}

/// What another vCPU has translated, taken over for one that is not made yet.
pub struct TakenCode {
    pub(super) code: CodeCache,
    pub(super) around: Around,
}

impl TakenCode {
    /// A cache of the same program, for a vCPU with these limits; `None` if it is not of the same, or the
    /// host refuses the mappings: then the vCPU translates.
    #[must_use]
    pub fn new(config: &Config, from: &SharedCode) -> Option<Self> {
        Self::take(config, from).ok().flatten()
    }

    fn take(config: &Config, from: &SharedCode) -> Result<Option<Self>, SetupError> {
        let Some((made, numbers)) = from.numbers.split_first_chunk::<5>() else {
            return Ok(None);
        };
        let Some((&[checked, spaces, slots], numbers)) = numbers.split_first_chunk() else {
            return Ok(None);
        };
        let thunks = made[3];
        let same = made_for(thunks, config.optimizations).as_ref() == Some(made)
            && slots == config.address_spaces as u64;
        if !same {
            return Ok(None);
        }
        let Some((slots, numbers)) = numbers.split_at_checked(slots as usize) else {
            return Ok(None);
        };
        let slot = |&n: &u64| ((n >> 32).checked_sub(1).map(|pcid| pcid as u16), n as u16);
        let slots = slots.iter().map(slot).collect();
        let code = CodeCache::begin_with(config.code_cache_bytes, &from.pages, numbers)?;
        let around = Around {
            thunks,
            checked: checked != 0,
            spaces: spaces as u16,
            slots,
            guest_pages: from.guest_pages.clone(),
        };
        Ok(code.map(|code| Self { code, around }))
    }
}

impl Inner {
    /// Shares what was translated so far. The vCPU is not in `run`.
    ///
    /// # Errors
    /// The system refuses, or it is too much; the vCPU can go on.
    pub fn share_code(&mut self) -> io::Result<SharedCode> {
        let thunks = self.thunks.len();
        let made_for = made_for(thunks, self.optimizations)
            .ok_or_else(|| io::Error::other("the program has no build ID"))?;
        // What others have changed is not to be found any more.
        self.take_mail();
        if self.state_changed {
            self.flush_everything();
        }
        let mut numbers = made_for.to_vec();
        numbers.extend([u64::from(self.checked), u64::from(self.tlb.spaces())]);
        let slots = self.tlb.space_slots();
        numbers.push(slots.len() as u64);
        let slot = |(pcid, space): (Option<u16>, u16)| {
            pcid.map_or(0, |pcid| u64::from(pcid) + 1) << 32 | u64::from(space)
        };
        numbers.extend(slots.into_iter().map(slot));
        let guest_pages = self.lin.shared.pages_with_code(self.lin.index);
        let (pages, cache) = self.code.share()?;
        numbers.extend(cache);
        Ok(SharedCode { pages, numbers, guest_pages })
    }

    /// Goes on with the address spaces of the vCPU whose code this one has.
    pub(super) fn adopt(&mut self, around: &Around) {
        if self.lin.shared.adopt_code(&around.guest_pages, self.lin.index) {
            self.checked = around.checked;
            self.tlb.adopt_spaces(around.spaces, &around.slots);
            self.inherited = true;
            if let Some(copies) = self.code.copies() {
                self.lin.shared.note_copies(self.lin.index, copies);
            }
            self.direct.not_before = Some(Instant::now() + SETTLING);
        } else {
            self.code.flush();
        }
    }
}
