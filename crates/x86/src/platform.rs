//! What the rules of the processor need from the outside, as traits.

use crate::state::{CpuState, Exception};

/// Physical memory as the page walker sees it.
///
/// Reads of addresses without memory return all ones; writes there are dropped. Nothing here fails:
/// a page-table pointer outside memory behaves as on a PC.
pub trait PhysMem {
    /// Reads an aligned 8-byte entry.
    fn read_u64(&self, gpa: u64) -> u64;
    /// Reads an aligned 4-byte entry.
    fn read_u32(&self, gpa: u64) -> u32;
    /// Atomically replaces an aligned 8-byte entry if it still is `old`; tells whether it did.
    fn cas_u64(&self, gpa: u64, old: u64, new: u64) -> bool;
    /// Atomically replaces an aligned 4-byte entry if it still is `old`; tells whether it did.
    fn cas_u32(&self, gpa: u64, old: u32, new: u32) -> bool;
}

/// Whose rights an access to linear memory has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// With the rights of the current privilege level (an explicit access).
    Current,
    /// As supervisor, whatever the CPL: descriptor tables, TSS, stacks of inner levels (implicit;
    /// SMAP applies to user pages regardless of EFLAGS.AC).
    System,
}

/// Linear memory of the vCPU whose state is passed along.
///
/// A write that would cross into a page that faults has no effect: implementations check all bytes
/// first. Errors are #PF (or #GP for a non-canonical address) ready to be delivered.
pub trait LinearMem {
    /// Reads `buf.len()` bytes (at most 4096) at `addr`.
    ///
    /// # Errors
    /// The exception the access raises.
    fn read(
        &mut self,
        cpu: &mut CpuState,
        addr: u64,
        buf: &mut [u8],
        access: Access,
    ) -> Result<(), Exception>;
    /// Writes `data` (at most 4096 bytes) at `addr`.
    ///
    /// # Errors
    /// The exception the access raises.
    fn write(
        &mut self,
        cpu: &mut CpuState,
        addr: u64,
        data: &[u8],
        access: Access,
    ) -> Result<(), Exception>;
    /// Checks that `len` bytes (at most 4096) at `addr` could be written, without writing.
    ///
    /// # Errors
    /// The exception the write would raise.
    fn probe_write(
        &mut self,
        cpu: &mut CpuState,
        addr: u64,
        len: usize,
        access: Access,
    ) -> Result<(), Exception>;
    /// A task switch: loads CR3, if there is another one, by [`crate::control::load_cr3`]; the vCPU
    /// is in the new task then, whatever follows.
    ///
    /// # Errors
    /// What loading CR3 raises; there is no switch then.
    fn enter_task(&mut self, cpu: &mut CpuState, cr3: Option<u64>) -> Result<(), Exception>;
    /// The task that was switched to asks for a trap before its first instruction. It is delivered
    /// later, since tasks that do so can follow each other without end.
    fn task_trap(&mut self, trap: Exception);
}

/// The machine around a translated vCPU, called on the vCPU's thread.
///
/// Implemented by the machine (and by small fakes in tests). Physical RAM is not reached through
/// this trait; these are the accesses that are not RAM.
pub trait Platform: Send {
    /// A read of `data.len()` bytes (1 to 64) from a physical address that is not RAM.
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]);
    /// A write to a physical address that is not RAM.
    fn mmio_write(&mut self, gpa: u64, data: &[u8]);
    /// A port read of `size` 1, 2 or 4 bytes.
    fn port_read(&mut self, port: u16, size: u8) -> u32;
    /// A port write of `size` 1, 2 or 4 bytes.
    fn port_write(&mut self, port: u16, size: u8, value: u32);
    /// Reads an MSR that the processor model does not own (APIC base, x2APIC, TSC deadline, KVM
    /// clock). `None`: no such MSR, #GP.
    fn read_msr(&mut self, cpu: &CpuState, msr: u32) -> Option<u64>;
    /// Writes such an MSR. `None`: no such MSR or a reserved bit, #GP.
    fn write_msr(&mut self, cpu: &CpuState, msr: u32, value: u64) -> Option<()>;
    /// Takes the interrupt to deliver now (local APIC first, then the 8259 pair), marking it as in
    /// service. `None` when nothing is deliverable.
    fn acknowledge_interrupt(&mut self) -> Option<u8>;
    /// Whether [`Platform::acknowledge_interrupt`] would return a vector.
    fn interrupt_pending(&mut self) -> bool;
    /// CR8: the task priority class, 0 to 15.
    fn cr8(&mut self) -> u8;
    /// Sets CR8.
    fn set_cr8(&mut self, class: u8);
    /// A hypercall (VMCALL/VMMCALL) by KVM's convention; the result goes to RAX.
    fn hypercall(&mut self, number: u64, args: [u64; 4]) -> u64;
}
