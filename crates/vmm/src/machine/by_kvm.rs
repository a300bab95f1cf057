//! Machines under KVM as they are stored, and those that go on under KVM, whichever processor they were
//! stored from.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use berth_x86::CpuState;
use berth_x86::state::{cr0, cr4, efer};
use vm_memory::{Bytes, GuestAddress};

use crate::clock::Clock;
use crate::error::MachineError;
use crate::machine::Board;
use crate::machine::stored::{Core, Hardware, Resumed};
use crate::memory::GuestRam;
use crate::pvclock::{self, page_of};
use crate::state::{Moment, StateError, StoredCpu, fill_memory};
use crate::vcpu::kvm::KvmVcpu;
use crate::vcpu::kvm::vm::{KvmChips, KvmError};
use crate::vcpu::mailbox::{Mailbox, Standing};
use crate::vcpu::{Inside, Vcpu};

/// Time-stamp counters that are no further apart than this are the same one, looked at one after the
/// other.
const SAME_TSC: u64 = 10_000_000;

fn unsaved(error: &KvmError) -> StateError {
    StateError::Unsaved(error.to_string())
}

impl Hardware {
    /// What vCPUs and interrupt controllers hold.
    pub(super) fn save(
        &self,
        standing: Vec<Standing>,
        now: &Moment,
        ram: &GuestRam,
        tsc_khz: u32,
    ) -> Result<Core, StateError> {
        let (ioapic, mut pic) = self.chips.save().map_err(|error| unsaved(&error))?;
        let mut cpus = Vec::new();
        let mut pages = BTreeMap::new();
        let mut first_offset = None;
        for (index, standing) in (0..).zip(standing) {
            let Some(mut inside) = standing.inside else {
                return Err(StateError::Unsaved(format!("vCPU {index} does not tell all of it")));
            };
            if let Some(vector) = inside.acknowledged
                && !inside.apic.request_again(vector)
            {
                pic.request_again(vector);
            }
            let mut state = standing.state;
            let first = *first_offset.get_or_insert(state.tsc_offset);
            let apart = state.tsc_offset.wrapping_sub(first).cast_signed();
            if apart.unsigned_abs() < SAME_TSC {
                state.tsc_offset = first;
            }
            if let Some(entries) = pdptes(&state, ram) {
                state.pdpte = entries;
            }
            if let Some(page) = page_of(inside.system_time) {
                pages.insert(index, page);
            }
            cpus.push(StoredCpu {
                state,
                waiting: inside.waiting,
                init: false,
                startup: inside.startup,
                system_time: inside.system_time,
                wall_clock: inside.wall_clock,
                apic: inside.apic,
                cpuid: Vec::new(),
            });
        }
        let clock_ns = self.chips.clock_ns().map_err(|error| unsaved(&error))?;
        let hz = if self.scaled { u64::from(tsc_khz) * 1000 } else { now.tsc_hz };
        let wall = Duration::from_nanos(now.wall_ns);
        let pvclock = pvclock::Stored::of_kvm(clock_ns, (now.tsc, hz), wall, pages);
        Ok(Core { cpus, pvclock, ioapic, pic })
    }

    /// The moment at which it was stored: counters at a rate of their own go on by the time of day, as if
    /// this were another host.
    pub(super) fn moment(&self, now: Moment, tsc_khz: u32) -> Moment {
        if !self.scaled {
            return now;
        }
        Moment { tsc_hz: u64::from(tsc_khz) * 1000, boot_id: String::new(), ..now }
    }

    /// Puts back the interrupt controllers, after those of the vCPUs.
    pub(super) fn restore(
        &self,
        resumed: &Resumed,
        mailboxes: &[Arc<Mailbox>],
    ) -> Result<(), StateError> {
        let state = &resumed.state;
        let restored = self.chips.restore(&state.ioapic, &state.pic);
        restored.map_err(|error| StateError::Unfit(error.to_string()))?;
        // The first vCPU has received INIT: the machine is about to be reset. Others have acted on it.
        if let (Some(mailbox), Some(cpu)) = (mailboxes.first(), state.cpus.first()) {
            mailbox.restore(cpu.init, None);
        }
        Ok(())
    }
}

/// The page-directory-pointer entries that the processor has loaded, which KVM does not tell. They are
/// those in memory if the guest keeps to the rules (SDM vol. 3, 4.4.1).
fn pdptes(state: &CpuState, ram: &GuestRam) -> Option<[u64; 4]> {
    let by_pae = state.cr0 & cr0::PG != 0 && state.cr4 & cr4::PAE != 0;
    if !by_pae || state.efer & efer::LMA != 0 {
        return None;
    }
    ram.memory().read_obj(GuestAddress(state.cr3 & 0xffff_ffe0)).ok()
}

impl Resumed {
    /// Puts memory and the clock in place.
    pub(super) fn begin_kvm(&self, board: &Board, chips: &KvmChips) -> Result<(), MachineError> {
        fill_memory(&board.ram, &self.memory)?;
        let shown = self.state.pvclock.shows(board.clock.tsc(), self.shift.tsc_back);
        Ok(chips.set_clock_ns(shown)?)
    }

    /// Puts a vCPU in place.
    pub(super) fn begin_kvm_cpu(
        &self,
        index: u32,
        vcpu: &mut KvmVcpu,
        clock: &dyn Clock,
    ) -> Result<(), MachineError> {
        let mut state = self.cpu_state(index);
        let Some(cpu) = self.cpu(index) else { return Ok(()) };
        let mut inside = Inside {
            apic: cpu.apic.clone(),
            waiting: cpu.waiting,
            startup: None,
            system_time: cpu.system_time,
            wall_clock: cpu.wall_clock,
            acknowledged: None,
        };
        // What it was told and has not acted on.
        if cpu.init && index != 0 {
            state.init(false);
            inside.apic.init();
            inside.waiting = true;
        }
        if let Some(vector) = cpu.startup.filter(|_| inside.waiting) {
            state.sipi(vector);
            inside.waiting = false;
        }
        vcpu.set_state(&state)?;
        // By the clock by which its timer was stored.
        let now = clock.now_ns().saturating_add_signed(self.shift.clock_ahead_ns.saturating_neg());
        vcpu.set_inside(&state, &inside, now)?;
        Ok(())
    }
}
