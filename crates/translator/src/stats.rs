//! What a vCPU did, in numbers, for whoever wants to know where its time goes.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::shared::lock;

/// Counts of what a vCPU did. Times are zero unless reports are wanted.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Blocks translated.
    pub blocks: u64,
    /// Guest instructions in them.
    pub guest_instructions: u64,
    /// Host bytes made of them.
    pub host_bytes: u64,
    /// Time in which that was done.
    pub translation: Duration,
    /// Blocks copied from another guest address of the same code.
    pub moved: u64,
    /// Blocks changed for another guest address, because the address space of theirs is gone.
    pub moved_in_place: u64,
    /// Blocks kept by a copy when the segment of the cache that they were in was about to be dropped.
    pub rescued: u64,
    /// Blocks that were found where one was looked for.
    pub found: u64,
    /// Entries into generated code from the dispatcher.
    pub entries: u64,
    /// Returns to generated code from Rust past the dispatcher, by the jump cache.
    pub resumed: u64,
    /// Exits at direct jumps that were not linked.
    pub link_exits: u64,
    /// Exits at indirect jumps that missed the jump cache.
    pub indirect_exits: u64,
    /// Exits at returns that went elsewhere than their calls, and missed the jump cache.
    pub return_exits: u64,
    /// Exits because something outside was to be done: interrupts, kicks, what other vCPUs ask for.
    pub interrupt_exits: u64,
    /// Exits after instructions, accesses and exceptions that Rust code dealt with.
    pub helper_exits: u64,
    /// Exits at faults of the host that are the guest's, of arithmetic.
    pub fault_exits: u64,
    /// Accesses that took the slow path.
    pub slow_accesses: u64,
    /// Of these: came by a signal, the page being unknown or not to be reached that way.
    pub signals: u64,
    /// Of these: entered their page in the software TLB.
    pub entered: u64,
    /// Of these: reached into another page.
    pub crossed: u64,
    /// Of these: devices, and what lies in two places.
    pub bounced: u64,
    /// Of these: page faults and the like of the guest's.
    pub guest_faults: u64,
    /// Pages entered in the software TLB besides those asked for: neighbours, and pages the guest
    /// has just had a page fault for.
    pub entered_ahead: u64,
    /// Time in slow accesses.
    pub slow: Duration,
    /// Instructions executed by helpers.
    pub helpers: u64,
    /// Time in them.
    pub helping: Duration,
    /// Exceptions and interrupts delivered.
    pub events: u64,
    /// Stores to pages with translations.
    pub code_stores: u64,
    /// Pages whose blocks were dropped.
    pub page_drops: u64,
    /// Times a segment of the cache, or all of it, was dropped.
    pub cache_drops: u64,
    /// Times the jump caches were cleared.
    pub jump_cache_clears: u64,
    /// Times the supervisor's was.
    pub kernel_jump_cache_clears: u64,
    /// MOV CR3.
    pub space_switches: u64,
    /// Times an instruction was given other look-ups because it trapped too often at the ends of pages.
    pub crossings: u64,
    /// Mappings of two pages across whose border accesses go again and again.
    pub pairs: u64,
    /// Times all of them were forgotten to make room for others.
    pub pair_overflows: u64,
    /// Times that the processor executed user code directly.
    pub direct_runs: u64,
    /// Time in which it did.
    pub direct: Duration,
    /// Time in which it did, and in which that was prepared and what came of it was looked at.
    pub direct_all: Duration,
    /// Of these: ended by a system call.
    pub direct_calls: u64,
    /// Of these: ended by an access to a page that was not mapped, or not for such an access.
    pub direct_faults: u64,
    /// Pages mapped for that.
    pub direct_pages: u64,
    /// Pages mapped because the translator knew them.
    pub direct_known: u64,
    /// Places from which on code in copies of pages was shown to processes.
    pub direct_shown: u64,
    /// Times the limit of guarded pages was met (see `ram`).
    pub guard_overflows: u64,
}

/// What one vCPU did.
#[derive(Clone, Debug)]
pub struct Report {
    /// Its number.
    pub vcpu: usize,
    /// Counts and times.
    pub stats: Stats,
    /// Instructions that helpers executed, by mnemonic, the most frequent first.
    pub helpers: Vec<(String, u64)>,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let s = &self.stats;
        let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
        writeln!(f, "vCPU {}", self.vcpu)?;
        writeln!(
            f,
            "  blocks     {} translated in {}: {} instructions to {} bytes",
            s.blocks,
            ms(s.translation),
            s.guest_instructions,
            s.host_bytes
        )?;
        writeln!(
            f,
            "             {} found, {} copied, {} changed in place, {} rescued",
            s.found, s.moved, s.moved_in_place, s.rescued
        )?;
        writeln!(
            f,
            "             dropped: {} times a part of the cache, {} pages; {} stores to code",
            s.cache_drops, s.page_drops, s.code_stores
        )?;
        writeln!(
            f,
            "  jumps      {} entries by the dispatcher, {} past it; jump caches cleared {} times, the \
             kernel's {}",
            s.entries, s.resumed, s.jump_cache_clears, s.kernel_jump_cache_clears
        )?;
        writeln!(
            f,
            "  exits      {} links, {} indirect jumps, {} returns, {} interrupts, {} helpers, {} \
             faults",
            s.link_exits,
            s.indirect_exits,
            s.return_exits,
            s.interrupt_exits,
            s.helper_exits,
            s.fault_exits
        )?;
        writeln!(
            f,
            "  TLB        {} slow accesses in {}, {} by a signal: {} entered their page, {} crossed \
             into another, {} devices and pieces, {} faults of the guest's",
            s.slow_accesses,
            ms(s.slow),
            s.signals,
            s.entered,
            s.crossed,
            s.bounced,
            s.guest_faults
        )?;
        writeln!(
            f,
            "             {} pages entered ahead; {} address space switches; {} pairs of pages \
             (forgotten {} times), {} changes of look-ups at the ends of pages",
            s.entered_ahead, s.space_switches, s.pairs, s.pair_overflows, s.crossings
        )?;
        writeln!(
            f,
            "  direct     {} runs of user code in {} of {}: {} ended by system calls, {} by accesses; {} \
             pages mapped, {} beforehand; {} times code in copies was shown",
            s.direct_runs,
            ms(s.direct),
            ms(s.direct_all),
            s.direct_calls,
            s.direct_faults,
            s.direct_pages + s.direct_known,
            s.direct_known,
            s.direct_shown
        )?;
        writeln!(f, "  events     {} exceptions and interrupts", s.events)?;
        write!(f, "  helpers    {} instructions in {}", s.helpers, ms(s.helping))?;
        for (index, (name, count)) in self.helpers.iter().enumerate() {
            let separator = if index == 0 { ":" } else { "," };
            write!(f, "{separator} {count} {name}")?;
        }
        Ok(())
    }
}

/// Reports of vCPUs that have ended; clones share them.
#[derive(Clone, Debug, Default)]
pub struct Reports(Arc<Mutex<Vec<Report>>>);

impl Reports {
    /// Adds one.
    pub fn add(&self, report: Report) {
        lock(&self.0).push(report);
    }

    /// Takes all, by the number of the vCPU.
    #[must_use]
    pub fn take(&self) -> Vec<Report> {
        let mut all = std::mem::take(&mut *lock(&self.0));
        all.sort_by_key(|report| report.vcpu);
        all
    }
}
