//! User code left to the processor: what its processes have mapped.

use std::io;
use std::os::fd::AsRawFd;

use berth_x86::paging::{self, Kind, Rights, Walk};

use super::{Inner, around};
use crate::direct::copy::{Copies, Copy, tail};
use crate::direct::scan::look;
use crate::direct::space::{LARGE, Mapped, Places, Space, Wanted};
use crate::direct::stub::Regs;
use crate::direct::{MOST_ACCESSES, May, Verdict};
use crate::ram::PAGE;
use crate::shared::UNMIRROR;
use crate::translate::LONGEST;

/// Pages from the one that is needed to those that are mapped with it although they lie elsewhere in
/// RAM, which takes a mapping of its own.
const NEAR: u64 = 3;

/// How a page may be mapped for being executed.
enum How {
    /// As it is, with breakpoints.
    Stops(Places),
    /// This page of the copies instead, or one that is still to be made.
    Copy(Option<u16>),
}

/// A process that is not in its place, and whose slot that is.
type At<'a> = (&'a Space, usize);

/// Whether a page may be used for more than it may be so far.
fn is_new(space: &Space, wanted: &Wanted, fetch: bool) -> bool {
    let known = space.get(wanted.va).filter(|m| m.gpa == wanted.page.gpa);
    let more = |m: Mapped| m.prot | wanted.page.prot != m.prot && (fetch || !m.is_copy());
    known.is_none_or(more)
}

impl Inner {
    /// Maps what is needed for an access that was refused, with neighbours; `false` when the translator
    /// has to make it.
    ///
    /// # Errors
    /// The process is of no use any more.
    pub(super) fn map_for(
        &mut self,
        space: &mut Space,
        slot: usize,
        address: u64,
        mapped: bool,
        fetch: bool,
    ) -> io::Result<bool> {
        let Some(pages) = self.pages_for(space, slot, address, mapped, fetch)? else {
            return Ok(false);
        };
        self.stats.direct_pages += pages.len() as u64;
        space.drop_pages(self.tlb.dropped(slot))?;
        space.map(pages)?;
        Ok(true)
    }

    /// What to map for that.
    fn pages_for(
        &mut self,
        space: &Space,
        slot: usize,
        address: u64,
        mapped: bool,
        fetch: bool,
    ) -> io::Result<Option<Vec<Wanted>>> {
        let page = address & !(PAGE - 1);
        let have = space.get(page);
        if !space.can_map(page) || mapped != have.is_some() {
            return Ok(None);
        }
        let kind = match have {
            Some(m) if m.is_copy() => {
                self.accessed((space, slot), m.gpa);
                return Ok(None);
            }
            _ if fetch => Kind::Fetch,
            Some(m) if m.prot & libc::PROT_WRITE == 0 => Kind::Write,
            Some(_) => return Ok(None),
            None => Kind::Read,
        };
        let rights = Rights::explicit(&self.area.state, kind);
        let Ok(w) = self.lin.walk(&self.area.state, address, rights) else { return Ok(None) };
        let Some(wanted) = self.wanted((space, slot), page, &w, fetch, true)? else {
            return Ok(None);
        };
        let needs = match kind {
            Kind::Fetch => libc::PROT_EXEC,
            Kind::Write => libc::PROT_WRITE,
            Kind::Read => libc::PROT_READ,
        };
        if wanted.page.prot & needs == 0 {
            return Ok(None);
        }
        // A large page is one mapping, whatever of it is needed.
        let large = w.page_bytes >= LARGE && !fetch;
        let beside = (page & !(LARGE - 1)..).step_by(PAGE as usize).take((LARGE / PAGE) as usize);
        let beside = if large { beside.collect() } else { around(page).collect::<Vec<_>>() };
        let mut pages = Vec::with_capacity(beside.len());
        for va in beside {
            if va == page {
                pages.push(wanted.clone());
                continue;
            }
            if !space.can_map(va) {
                continue;
            }
            let gpa = w.gpa & !(LARGE - 1) | va & (LARGE - 1);
            let peek = || paging::peek(&self.lin.shared.ram, &self.area.state, va);
            let Some(w) = (if large { Some(Walk { gpa, ..w }) } else { peek() }) else { continue };
            let Some(around) = self.wanted((space, slot), va, &w, fetch, false)? else { continue };
            if is_new(space, &around, fetch) {
                pages.push(around);
            }
        }
        let mut kept = Vec::with_capacity(pages.len());
        for run in pages.chunk_by(Wanted::goes_on) {
            let ends = run.first().zip(run.last());
            let near = |w: &Wanted| w.va.abs_diff(page) <= NEAR * PAGE;
            if ends.is_some_and(|(a, b)| near(a) || near(b) || (a.va..b.va).contains(&page)) {
                kept.extend_from_slice(run);
            }
        }
        self.settle((space, slot), &mut kept)?;
        Ok(Some(kept))
    }

    /// Maps what the translator has found in user memory: each page costs much less than to wait until it is
    /// missed.
    ///
    /// # Errors
    /// The process is of no use any more.
    pub(super) fn map_known(&mut self, space: &mut Space, slot: usize) -> io::Result<()> {
        let code = self.tlb.known_code(slot);
        let mut data = self.tlb.known_data(slot);
        data.retain(|va| code.binary_search(va).is_err());
        let all =
            code.into_iter().map(|va| (va, true)).chain(data.into_iter().map(|va| (va, false)));
        let mut pages = Vec::new();
        for (va, fetch) in all {
            if self.area.run() == 0 {
                // There is something more urgent.
                break;
            }
            if !space.can_map(va) {
                continue;
            }
            let Some(w) = paging::peek(&self.lin.shared.ram, &self.area.state, va) else {
                continue;
            };
            let wanted = self.wanted((space, slot), va, &w, fetch, fetch)?;
            pages.extend(wanted.filter(|wanted| is_new(space, wanted, fetch)));
        }
        pages.sort_unstable_by_key(|w| w.va);
        self.settle((space, slot), &mut pages)?;
        self.stats.direct_known += pages.len() as u64;
        space.drop_pages(self.tlb.dropped(slot))?;
        space.map(pages)
    }

    /// Makes pages, which are in ascending order, fit each other and what is mapped.
    fn settle(&mut self, at: At<'_>, pages: &mut Vec<Wanted>) -> io::Result<()> {
        self.join_pages(at, pages)?;
        pages.retain(|w| self.holds(w));
        // What is executable at one address was perhaps still to be writable at another.
        for w in pages.iter_mut().filter(|w| w.page.prot & libc::PROT_WRITE != 0) {
            if !self.lin.shared.may_mirror(w.page.gpa / PAGE, self.lin.index) {
                w.page.prot &= !libc::PROT_WRITE;
            }
        }
        Ok(())
    }

    /// Whether a page may still be executed as it was to be: one that is at several addresses is looked
    /// at again where another page is behind it.
    fn holds(&self, w: &Wanted) -> bool {
        if w.page.prot & libc::PROT_EXEC == 0 {
            return true;
        }
        match self.direct.verdicts.get(&w.page.gpa).map(|verdict| &verdict.may) {
            Some(May::But(places)) => !w.page.is_copy() && *places == w.stops,
            Some(May::Copy(Some(copy))) => {
                w.page.is_copy() && u64::from(copy.page) * PAGE == w.offset
            }
            _ => false,
        }
    }

    /// How a page is to be mapped, if it may be: the one that is `needed`, or one beside it.
    fn wanted(
        &mut self,
        at: At<'_>,
        va: u64,
        w: &Walk,
        fetch: bool,
        needed: bool,
    ) -> io::Result<Option<Wanted>> {
        let gpa = w.gpa & !(PAGE - 1);
        if !w.readable_user || w.global {
            return Ok(None);
        }
        // Where it is must not change as long as a process has it mapped.
        self.lin.shared.ram.own(gpa, PAGE);
        let Some((file, mut offset)) = self.lin.shared.ram.file_of(gpa) else { return Ok(None) };
        let mut fd = file.as_raw_fd();
        let mut prot = libc::PROT_READ;
        let mut stops = Places::new();
        let how = if w.nx { None } else { self.executable(at, va, gpa, fetch) };
        match how {
            Some(How::Stops(places)) => {
                prot |= libc::PROT_EXEC;
                stops = places;
            }
            Some(How::Copy(page)) if fetch => {
                let page = if needed { self.copy_page(at, gpa)? } else { page };
                let copies = self.direct.copies.as_ref();
                let Some((copies, page)) = copies.zip(page) else { return Ok(None) };
                (fd, offset, prot) = (copies.fd(), u64::from(page) * PAGE, libc::PROT_EXEC);
            }
            _ if w.writable && w.dirty && !self.lin.shared.has_code(gpa / PAGE) => {
                prot |= libc::PROT_WRITE;
            }
            _ => {}
        }
        if prot & libc::PROT_EXEC != 0 {
            self.follows(at, va, gpa);
        }
        if w.page_bytes > PAGE {
            self.tlb.reaches_into(va, w.page_bytes);
        }
        Ok(Some(Wanted { va, page: Mapped { gpa, prot }, fd, offset, stops }))
    }

    /// A page is about to be executed, behind one that perhaps was looked at with another.
    fn follows(&mut self, (space, slot): At<'_>, va: u64, gpa: u64) {
        let before = va.wrapping_sub(PAGE);
        let verdict = space.get(before).and_then(|m| self.direct.verdicts.get(&m.gpa));
        if verdict.is_some_and(|v| v.next.is_some_and(|next| next != Some(gpa))) {
            self.tlb.dropped(slot).add(before, PAGE);
        }
    }

    /// What the processor may execute of a page, which is watched for changes then.
    fn executable(&mut self, at: At<'_>, va: u64, gpa: u64, new: bool) -> Option<How> {
        let known = self.direct.verdicts.get(&gpa);
        if known.is_none_or(|v| v.next.is_some_and(|next| next != self.page_behind(va))) {
            if !new {
                return None;
            }
            self.judge(at, va, gpa);
        }
        match &self.direct.verdicts.get(&gpa)?.may {
            May::Nothing => None,
            May::But(places) => Some(How::Stops(places.clone())),
            May::Copy(copy) => Some(How::Copy(copy.as_ref().map(|copy| copy.page))),
        }
    }

    /// Looks for what the processor must not execute in a page.
    fn judge(&mut self, at: At<'_>, va: u64, gpa: u64) {
        self.watch(at, gpa);
        let mut found = look(&self.code_of(gpa, None), self.direct.cpuid_traps);
        let mut next = None;
        if found.at_end {
            let behind = self.page_behind(va);
            next = Some(behind);
            if let Some(behind) = behind {
                self.watch(at, behind);
                found = look(&self.code_of(gpa, Some(behind)), self.direct.cpuid_traps);
            }
        }
        // Where prefixes may be its own, it may begin in several places.
        let begins = found.places.iter().flat_map(|p| p.first..=p.opcode);
        let few =
            begins.clone().count() <= Places::new().capacity() && begins.clone().all(|b| b > 0);
        // Breakpoints make other code slower, and IRET with RF passes them.
        let few = few && (found.places.is_empty() || !self.direct.pieces);
        let may = match few {
            _ if found.at_end => May::Nothing,
            true => May::But(begins.collect()),
            false if self.direct.pieces => May::Copy(None),
            false => May::Nothing,
        };
        if self.direct.verdicts.contains_key(&gpa) {
            // It was executed with another page behind it.
            self.refuse(at, gpa);
        }
        self.direct.verdicts.insert(gpa, Verdict { may, next });
    }

    /// A page is not to be executed any more.
    fn refuse(&mut self, at: At<'_>, gpa: u64) {
        self.drop_mirrors(gpa / PAGE);
        self.drop_from(at, gpa);
        if let Some(verdict) = self.direct.verdicts.get_mut(&gpa) {
            let may = std::mem::replace(&mut verdict.may, May::Nothing);
            self.free(&may);
        }
    }

    /// The page of a copy is not needed any more.
    fn free(&mut self, may: &May) {
        if let (May::Copy(Some(copy)), Some(copies)) = (may, &mut self.direct.copies) {
            copies.give_back(copy.page);
        }
    }

    /// A page that is mapped as a copy is accessed as data.
    fn accessed(&mut self, at: At<'_>, gpa: u64) {
        if let Some(copy) = self.copy_of(gpa) {
            copy.accesses += 1;
            if copy.accesses > MOST_ACCESSES {
                self.refuse(at, gpa);
            }
        }
    }

    /// The copy of a page.
    fn copy_of(&mut self, gpa: u64) -> Option<&mut Copy> {
        match &mut self.direct.verdicts.get_mut(&gpa)?.may {
            May::Copy(copy) => copy.as_deref_mut(),
            _ => None,
        }
    }

    /// The page of a copy, which is made if need be.
    fn copy_page(&mut self, at: At<'_>, gpa: u64) -> io::Result<Option<u16>> {
        self.direct.copies_used += 1;
        let used = self.direct.copies_used;
        if let Some(copy) = self.copy_of(gpa) {
            copy.used = used;
            return Ok(Some(copy.page));
        }
        let Some(Verdict { may: May::Copy(None), next }) = self.direct.verdicts.get(&gpa) else {
            return Ok(None);
        };
        let found = look(&self.code_of(gpa, next.flatten()), self.direct.cpuid_traps);
        let Some(copies) = &mut self.direct.copies else { return Ok(None) };
        let mut page = copies.take()?;
        if page.is_none() {
            self.give_one_up(at);
            page = self.direct.copies.as_mut().map_or(Ok(None), Copies::take)?;
        }
        if let (Some(page), Some(verdict)) = (page, self.direct.verdicts.get_mut(&gpa)) {
            let mut copy = Copy::new(page, &found.places);
            copy.used = used;
            verdict.may = May::Copy(Some(Box::new(copy)));
        }
        Ok(page)
    }

    /// Forgets the copy that was mapped least recently.
    fn give_one_up(&mut self, at: At<'_>) {
        let copies = self.direct.verdicts.iter().filter_map(|(gpa, verdict)| match &verdict.may {
            May::Copy(Some(copy)) => Some((copy.used, *gpa)),
            _ => None,
        });
        if let Some((_, gpa)) = copies.min() {
            self.refuse(at, gpa);
            if let Some(verdict) = self.direct.verdicts.get_mut(&gpa) {
                verdict.may = May::Copy(None);
            }
        }
    }

    /// Before copies are mapped, and before anything is mapped in front of them: they show what
    /// instructions that begin in the page before may end with. Those that cannot are left out.
    fn join_pages(&mut self, at: At<'_>, wanted: &mut Vec<Wanted>) -> io::Result<()> {
        let executed = |va: u64, wanted: &[Wanted]| {
            let new = wanted.binary_search_by_key(&va, |w| w.va).ok().map(|i| wanted[i].page);
            new.or_else(|| at.0.get(va)).filter(|m| m.prot & libc::PROT_EXEC != 0)
        };
        let new = wanted.iter().filter(|w| w.page.prot & libc::PROT_EXEC != 0);
        let pairs = new.flat_map(|w| [w.va.wrapping_sub(PAGE), w.va]);
        let pairs = pairs.map(|va| (executed(va, wanted), executed(va.wrapping_add(PAGE), wanted)));
        for pair in pairs.collect::<Vec<_>>() {
            let (Some(first), Some(second)) = pair else { continue };
            if second.is_copy() && !self.join(first.gpa, second.gpa)? {
                self.refuse(at, second.gpa);
                wanted.retain(|w| w.page.gpa != second.gpa || !w.page.is_copy());
            }
        }
        Ok(())
    }

    /// Does that for a copy and the page before; `false` if it must not show that.
    fn join(&mut self, first: u64, second: u64) -> io::Result<bool> {
        let page = self.code_of(second, None);
        let mut border = [0; 2 * LONGEST];
        self.lin.shared.ram.read(first + PAGE - LONGEST as u64, &mut border[..LONGEST]);
        border[LONGEST..].copy_from_slice(&page[..LONGEST]);
        let (Some(Verdict { may: May::Copy(Some(copy)), .. }), Some(copies)) =
            (self.direct.verdicts.get_mut(&second), &self.direct.copies)
        else {
            return Ok(true);
        };
        let Ok(new) = copy.show_first(&page, tail(&border)) else { return Ok(false) };
        copy.write(copies, &page, new)?;
        Ok(true)
    }

    /// Shows what is executed from here on, if that is in a copy and was not known; user code can go on
    /// then. `false` if the translator has to execute it.
    ///
    /// # Errors
    /// The process is of no use any more.
    pub(super) fn reach(
        &mut self,
        space: &mut Space,
        slot: usize,
        regs: &Regs,
    ) -> io::Result<bool> {
        let page = regs.rip & !(PAGE - 1);
        let Some(mapped) = space.get(page).filter(|m| m.is_copy()) else { return Ok(false) };
        let shown = self.show((space, slot), page, mapped.gpa, (regs.rip - page) as usize)?;
        self.stats.direct_shown += u64::from(shown);
        space.drop_pages(self.tlb.dropped(slot))?;
        if shown {
            space.stub.set_registers(regs)?;
        }
        Ok(shown)
    }

    fn show(&mut self, at: At<'_>, va: u64, gpa: u64, offset: usize) -> io::Result<bool> {
        let behind = self.page_behind(va);
        let mut code = self.code_of(gpa, None);
        let mut from = offset;
        loop {
            let (Some(Verdict { may: May::Copy(Some(copy)), next }), Some(copies)) =
                (self.direct.verdicts.get_mut(&gpa), &self.direct.copies)
            else {
                return Ok(false);
            };
            if copy.begins(from) {
                return Ok(false);
            }
            let Ok(reached) = copy.reach(&code, from) else {
                self.refuse(at, gpa);
                return Ok(false);
            };
            copy.write(copies, &code, reached.new)?;
            let shown = copy.begins(offset);
            let Some((behind, crossing)) = behind.zip(reached.crossing) else { return Ok(shown) };
            if *next.get_or_insert(Some(behind)) != Some(behind) {
                self.refuse(at, gpa);
                return Ok(false);
            }
            self.watch(at, behind);
            code = self.code_of(gpa, Some(behind));
            from = crossing;
        }
    }

    /// The physical address of the page of code behind a page.
    fn page_behind(&self, va: u64) -> Option<u64> {
        self.ram_at(va.wrapping_add(PAGE)).map(|w| w.gpa & !(PAGE - 1))
    }

    /// The bytes of a page of code, and the first ones of the page behind if that is known.
    fn code_of(&self, gpa: u64, behind: Option<u64>) -> Vec<u8> {
        let mut code = vec![0; PAGE as usize + if behind.is_some() { LONGEST } else { 0 }];
        let (page, next) = code.split_at_mut(PAGE as usize);
        self.lin.shared.ram.read(gpa, page);
        if let Some(behind) = behind {
            self.lin.shared.ram.read(behind, next);
        }
        code
    }

    /// Changes of a page of code are noticed from here on.
    fn watch(&mut self, at: At<'_>, gpa: u64) {
        if self.mark_code(gpa / PAGE) {
            // This one is not in its place.
            self.drop_from(at, gpa);
        }
    }

    /// Before a page is read to be translated, or executed by the processor: nobody writes to it
    /// without our noticing from here on. Tells whether a process may have mapped it for writing.
    pub(super) fn mark_code(&mut self, page: u64) -> bool {
        self.lin.shared.mark_code(page, self.lin.index);
        let mirrors = self.lin.shared.mirrors(page);
        if mirrors == 0 {
            return false;
        }
        self.drop_mirrors(page);
        let others = mirrors & !(1 << self.lin.index);
        if others != 0 {
            self.lin.shared.stop_others(self.lin.index);
            self.lin.shared.leave_mail(others, page | UNMIRROR);
            self.lin.shared.world.resume();
        }
        self.lin.shared.no_mirrors(page, self.lin.index);
        true
    }

    /// A page of RAM is not to be mapped in processes any more.
    pub(super) fn drop_mirrors(&mut self, page: u64) {
        let spaces = std::mem::take(&mut self.direct.spaces);
        for (slot, space) in spaces.iter().enumerate() {
            if let Some(space) = space {
                self.drop_from((space, slot), page * PAGE);
            }
        }
        self.direct.spaces = spaces;
    }

    fn drop_from(&mut self, (space, slot): (&Space, usize), gpa: u64) {
        let dropped = self.tlb.dropped(slot);
        space.of_page(gpa).for_each(|va| dropped.add(va, PAGE));
    }

    /// The bytes of a page of code have changed, or are about to.
    pub(super) fn code_changed(&mut self, page: u64) {
        let gpa = page * PAGE;
        if self.direct.verdicts.is_empty() {
            return;
        }
        self.drop_mirrors(page);
        self.forget(gpa);
        // Those whose last instruction goes on in this one.
        let verdicts = self.direct.verdicts.iter();
        let before = verdicts.filter(|(_, v)| v.next == Some(Some(gpa))).map(|(before, _)| *before);
        for before in before.collect::<Vec<_>>() {
            self.forget(before);
            self.drop_mirrors(before / PAGE);
        }
    }

    fn forget(&mut self, gpa: u64) {
        if let Some(verdict) = self.direct.verdicts.remove(&gpa) {
            self.free(&verdict.may);
        }
    }

    /// The same for all pages.
    pub(super) fn all_code_changed(&mut self) {
        let verdicts = std::mem::take(&mut self.direct.verdicts);
        verdicts.values().for_each(|verdict| self.free(&verdict.may));
        if !verdicts.is_empty() {
            for slot in 0..self.direct.spaces.len() {
                self.tlb.dropped(slot).all = true;
            }
        }
    }
}
