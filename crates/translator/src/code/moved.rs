//! Copies of blocks at other guest addresses.
//!
//! A program that is loaded at another address each time is the same code in the same frames. What
//! depends on the address, or on where the host code lies, is noted while a block is made; a copy
//! gets it put right.

use iced_x86::OpKind;

use super::{Block, BlockKey, CodeCache, Helped, Link, Made, NO_LINK, Site, StringSite};

/// Something in host code that depends on where its block is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fixup {
    /// Offset of the first byte behind it.
    pub at: u32,
    /// What it is.
    pub kind: Fix,
}

/// Kinds of [`Fixup`]: displacements of 32 bits, guest addresses of 64, and numbers of 32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fix {
    /// Displacement to a fixed host address.
    Absolute,
    /// Displacement from the body to the cold part or back.
    Across,
    /// Guest address.
    Address,
    /// Complement of a guest address.
    NotAddress,
    /// Number of an access.
    Site,
    /// Number of an instruction for a helper.
    Helper,
    /// Number of a link.
    Link,
    /// Number of a return.
    Return,
}

/// A copy of a block for another guest address.
pub struct Moved {
    block: Block,
    insns: Vec<(u16, u16)>,
    code: Vec<u8>,
    cold: Vec<u8>,
    links: Vec<Link>,
    returns: Vec<(u64, i32)>,
    sites: Vec<Site>,
    strings: Vec<StringSite>,
    helpers: Vec<Helped>,
    fixups: Vec<Fixup>,
}

impl Moved {
    /// The copy must be what the translator would make, unless that found out since that an
    /// instruction crosses into another page.
    #[cfg(any(debug_assertions, test))]
    pub fn check(&self, made: &Made<'_>) {
        if self.block.looks != made.block.looks {
            return;
        }
        let fresh = (made.code, made.cold, made.insns, made.returns);
        let copied = (&self.code[..], &self.cold[..], &self.insns[..], &self.returns[..]);
        assert_eq!(copied, fresh, "a copied block at {:#x}", self.block.key.rip);
        let sites = |sites: &[Site]| sites.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>();
        assert_eq!(sites(&self.sites), sites(made.sites));
        let strings = |s: &[StringSite]| s.iter().map(|s| format!("{s:?}")).collect::<Vec<_>>();
        assert_eq!(strings(&self.strings), strings(made.strings));
        let links = |l: &[Link]| l.iter().map(|l| format!("{l:?}")).collect::<Vec<_>>();
        assert_eq!(links(&self.links), links(made.links));
        let helpers = |h: &[Helped]| h.iter().map(|h| (h.ins, h.ins.ip())).collect::<Vec<_>>();
        assert_eq!(helpers(&self.helpers), helpers(made.helpers));
    }

    /// As a translation.
    pub fn made(&self) -> Made<'_> {
        Made {
            block: self.block,
            insns: &self.insns,
            code: &self.code,
            cold: &self.cold,
            links: &self.links,
            returns: &self.returns,
            sites: &self.sites,
            strings: &self.strings,
            helpers: &self.helpers,
            fixups: Some(&self.fixups),
        }
    }
}

impl CodeCache {
    /// A copy of a translation of the same code for another guest address, to be put at the end of
    /// the cache.
    pub fn moved(&self, key: &BlockKey) -> Option<Moved> {
        let b = self.blocks.get(self.movable.get(&(key.gpa, key.mode))?.0 as usize)?;
        if !b.valid {
            return None;
        }
        fn part<T: Clone>(all: &[T], (first, count): (u32, u32)) -> Option<Vec<T>> {
            Some(all.get(first as usize..)?.get(..count as usize)?.to_vec())
        }
        let delta = key.rip.wrapping_sub(b.key.rip);
        let (hot, cold) = (self.next_host(), self.next_cold());
        // How far the parts move, and the cold part away from the body.
        let (by_hot, by_cold) = (hot.wrapping_sub(b.host), cold.wrapping_sub(b.cold));
        let apart = by_cold.wrapping_sub(by_hot) as u32;
        let cold_offset = b.cold.wrapping_sub(b.host) as u32;
        let shifted = |at: u32| if at > b.len { at.wrapping_add(apart) } else { at };
        let mut to = Moved {
            block: Block { key: *key, incoming: NO_LINK, ..*b },
            insns: self.insns_of(b).to_vec(),
            code: self.bytes(b.host, b.len)?.to_vec(),
            cold: self.bytes(b.cold, b.cold_len)?.to_vec(),
            links: part(&self.links, b.others[0])?,
            returns: part(&self.returns, b.others[1])?,
            sites: self.sites_of(b).to_vec(),
            strings: self.strings_of(b).to_vec(),
            helpers: part(&self.helpers, b.others[2])?,
            fixups: part(&self.fixups, b.fixups)?,
        };
        let numbers = |kind| match kind {
            Fix::Site => self.next_site().wrapping_sub(b.sites.0),
            Fix::Link => self.next_link().wrapping_sub(b.others[0].0),
            Fix::Return => self.next_return().wrapping_sub(b.others[1].0),
            _ => self.next_helper().wrapping_sub(b.others[2].0),
        };
        for fixup in &mut to.fixups {
            let Fixup { at, kind } = *fixup;
            let in_body = at <= b.len;
            let (bytes, end) = match in_body {
                true => (&mut to.code, at as usize),
                false => (&mut to.cold, at.checked_sub(cold_offset)? as usize),
            };
            fixup.at = shifted(at);
            if matches!(kind, Fix::Address | Fix::NotAddress) {
                let field = bytes.get_mut(end.checked_sub(8)?..end)?.as_mut_array::<8>()?;
                let old = u64::from_le_bytes(*field);
                let new = if kind == Fix::Address {
                    old.wrapping_add(delta)
                } else {
                    old.wrapping_sub(delta)
                };
                // Others would be loaded by a shorter instruction.
                if u32::try_from(new).is_ok() || i32::try_from(new as i64).is_ok() {
                    return None;
                }
                *field = new.to_le_bytes();
                continue;
            }
            let field = bytes.get_mut(end.checked_sub(4)?..end)?.as_mut_array::<4>()?;
            let old = u32::from_le_bytes(*field);
            let new = match (kind, in_body) {
                (Fix::Absolute, true) => old.wrapping_sub(by_hot as u32),
                (Fix::Absolute, false) => old.wrapping_sub(by_cold as u32),
                (Fix::Across, true) => old.wrapping_add(apart),
                (Fix::Across, false) => old.wrapping_sub(apart),
                _ => old.wrapping_add(numbers(kind)),
            };
            *field = new.to_le_bytes();
        }
        to.put_right(b, delta, (by_hot, by_cold))?;
        Some(to)
    }
}

impl Moved {
    /// Changes what is noted of the block `b`, which moves by `delta` in the guest and by so much in
    /// the cache.
    fn put_right(&mut self, b: &Block, delta: u64, (by_hot, by_cold): (u64, u64)) -> Option<()> {
        let apart = by_cold.wrapping_sub(by_hot) as u32;
        let cold_offset = b.cold.wrapping_sub(b.host) as u32;
        let (hot, cold) = (b.host.wrapping_add(by_hot), b.cold.wrapping_add(by_cold));
        let shifted = |at: u32| if at > b.len { at.wrapping_add(apart) } else { at };
        for link in &mut self.links {
            let in_body = link.patch <= b.host + u64::from(b.len);
            link.patch = link.patch.wrapping_add(if in_body { by_hot } else { by_cold });
            link.stub = link.stub.wrapping_add(by_cold);
            link.target = link.target.wrapping_add(delta);
            // The original may lead to a block.
            let (bytes, start) =
                if in_body { (&mut self.code, hot) } else { (&mut self.cold, cold) };
            let end = usize::try_from(link.patch.checked_sub(start)?).ok()?;
            let field = bytes.get_mut(end.checked_sub(4)?..end)?;
            field.copy_from_slice(&(link.stub.wrapping_sub(link.patch) as u32).to_le_bytes());
        }
        for (rip, _) in &mut self.returns {
            *rip = rip.wrapping_add(delta);
        }
        for site in &mut self.sites {
            site.rip = site.rip.wrapping_add(delta);
            site.crossings = 0;
            let own = site.cold >= cold_offset && site.cold_end <= cold_offset + b.cold_len;
            let places = [
                &mut site.cold,
                &mut site.cold_end,
                &mut site.ret,
                &mut site.commit_ret,
                &mut site.direct,
            ];
            for place in places.into_iter().chain(&mut site.cross) {
                *place = if own { shifted(*place) } else { 0 };
            }
        }
        for s in &mut self.strings {
            s.rip = s.rip.wrapping_add(delta);
            let places = [&mut s.look, &mut s.begun, &mut s.op, &mut s.cold];
            for place in places.into_iter().chain([&mut s.cold_fault, &mut s.cold_stop]) {
                *place = shifted(*place);
            }
        }
        for Helped { ins, .. } in &mut self.helpers {
            ins.set_ip(ins.ip().wrapping_add(delta));
            if ins.is_ip_rel_memory_operand() {
                ins.set_memory_displacement64(ins.memory_displacement64().wrapping_add(delta));
            }
            if ins.op_kinds().any(|k| k == OpKind::NearBranch64) {
                ins.set_near_branch64(ins.near_branch64().wrapping_add(delta));
            }
        }
        Some(())
    }
}
