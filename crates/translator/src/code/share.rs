//! A cache that is shared with the caches of clones, which begin with all that it holds.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::notes::{Counts, Slow};
use super::segment::SEGMENTS;
use super::store::{Store, Stream};
use super::{CodeCache, PERMANENT};
use crate::SetupError;
use crate::ahead::Copies;
use crate::ram::Origin;

/// What else a cache holds, in its store as long as it is shared.
pub struct CodePart {
    slow: Stream<(u32, Slow)>,
    detours: Stream<(u32, u32)>,
    second_pages: Stream<(u64, u64)>,
}

impl CodePart {
    /// At the place `next` of a store for `code` bytes.
    pub(super) fn new(next: &mut usize, code: usize) -> Self {
        Self {
            slow: Stream::new(next, code / 16),
            detours: Stream::new(next, code / 32),
            second_pages: Stream::new(next, code / 64),
        }
    }

    pub(super) fn connect(&mut self, store: &Store) {
        self.slow.connect(store);
        self.detours.connect(store);
        self.second_pages.connect(store);
    }

    fn live(&self) -> [Range<usize>; 3] {
        [self.slow.live(), self.detours.live(), self.second_pages.live()]
    }
}

impl Counts {
    const fn numbers(self) -> [u64; 7] {
        [
            self.steps as u64,
            self.sites as u64,
            self.links as u64,
            self.branches as u64,
            self.strings as u64,
            self.helpers as u64,
            self.fixups as u64,
        ]
    }

    fn from_numbers(mut next: impl FnMut() -> Option<u32>) -> Option<Self> {
        Some(Self {
            steps: next()?,
            sites: next()?,
            links: next()?,
            branches: next()?,
            strings: next()?,
            helpers: next()?,
            fixups: next()?,
        })
    }
}

fn too_much() -> io::Error {
    io::Error::other("the code cache has too many slow paths to be shared")
}

impl CodeCache {
    /// Shares all that it holds; gives where that is, and numbers that belong to it. It is not
    /// changed any more: what this cache writes from here on is its own.
    ///
    /// # Errors
    /// The system refuses.
    pub fn share(&mut self) -> io::Result<(Origin, Vec<u64>)> {
        let (part, store) = (&mut self.part, &mut self.store);
        part.slow.clear();
        part.detours.clear();
        part.second_pages.clear();
        let mut numbers = vec![self.size as u64, self.current as u64, self.drops];
        for (n, segment) in (0..).zip(&self.segments) {
            let slow: Vec<_> = segment.notes.slow.iter().map(|(n, slow)| (*n, *slow)).collect();
            let detours: Vec<_> = segment.detours.iter().map(|&link| (n, link)).collect();
            let second = segment.second_pages.iter();
            let second: Vec<_> = second.map(|(&id, &gpa)| (u64::from(id), gpa)).collect();
            let fits = part.slow.has_room(slow.len())
                && part.detours.has_room(detours.len())
                && part.second_pages.has_room(second.len());
            if !fits {
                return Err(too_much());
            }
            part.slow.extend(store, &slow);
            part.detours.extend(store, &detours);
            part.second_pages.extend(store, &second);
            let lens = [segment.used, segment.cold_used, segment.blocks.len(), slow.len()];
            numbers.extend(lens.map(|len| len as u64));
            numbers.push(segment.stubs.len() as u64);
            numbers.extend(segment.notes.counts().numbers());
        }
        let lens = [self.far_links.len(), part.detours.len(), part.second_pages.len()];
        numbers.extend(lens.map(|len| len as u64));
        numbers.extend(self.far_reach);
        let mut live = vec![0..PERMANENT, self.buckets.live(), self.places.live()];
        live.push(self.far_links.live());
        live.extend(self.part.live());
        live.extend(self.segments.iter().flat_map(super::Segment::live));
        Ok((self.store.share(&live)?, numbers))
    }

    /// What was copied of what it began with, if it did.
    pub fn copies(&self) -> Option<Arc<Copies>> {
        self.store.copies()
    }

    /// A cache that begins with what another one of the same program has shared, but for code that
    /// stays, which has to be put there before anything else.
    ///
    /// # Errors
    /// When the host refuses the mappings; `None` when it is not of such a cache.
    pub fn begin_with(
        size: usize,
        pages: &Origin,
        numbers: &[u64],
    ) -> Result<Option<Self>, SetupError> {
        let mut cache = Self::with(size, Some(pages))?;
        Ok(cache.adopt(numbers).map(|()| cache))
    }

    fn adopt(&mut self, numbers: &[u64]) -> Option<()> {
        let mut numbers = numbers.iter().copied();
        let mut next = || usize::try_from(numbers.next()?).ok();
        if next()? != self.size {
            return None;
        }
        self.current = next().filter(|&n| n < SEGMENTS)?;
        self.drops = next()? as u64;
        let mut slow_lens = Vec::new();
        for segment in &mut self.segments {
            let (used, cold_used, blocks) = (next()?, next()?, next()?);
            slow_lens.push(next()?);
            let stubs = next()?;
            let counts = Counts::from_numbers(|| u32::try_from(next()?).ok())?;
            let fits = segment.adopt_used(used, cold_used)
                && segment.set_blocks(blocks)
                && segment.stubs.set_len(stubs)
                && segment.notes.set_counts(counts)
                && segment.listed.set_len(counts.links as usize);
            if !fits {
                return None;
            }
        }
        let fits = self.far_links.set_len(next()?)
            && self.part.detours.set_len(next()?)
            && self.part.second_pages.set_len(next()?)
            && self.part.slow.set_len(slow_lens.iter().sum());
        if !fits {
            return None;
        }
        for word in &mut self.far_reach {
            *word = next()? as u64;
        }
        let mut slow = self.part.slow.iter().copied();
        for (segment, len) in self.segments.iter_mut().zip(slow_lens) {
            segment.notes.slow = slow.by_ref().take(len).collect();
        }
        for &(n, link) in self.part.detours.iter() {
            self.segments.get_mut(n as usize)?.detours.push(link);
        }
        for &(id, gpa) in self.part.second_pages.iter() {
            let id = u32::try_from(id).ok()?;
            self.segments.get_mut(super::segment_of(id))?.crosses(id, gpa);
        }
        self.stay();
        Some(())
    }
}
