//! The table of guests: processors, number of checks, and where the oracle is known to be wrong.

use std::time::Duration;

use crate::table::GUESTS;

/// How a guest must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    /// All checks pass and the debug-exit port is written.
    Checks(usize),
    /// The machine resets (triple fault), after this text was printed.
    Reset(&'static str),
}

/// What a guest does that software-emulated KVM (a host without VMX and SVM) cannot do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Need {
    /// CMPXCHG16B in kernel mode.
    Cmpxchg16b,
    /// INT3 in kernel mode.
    Int3,
    /// XSAVE and XRSTOR in kernel mode.
    Xsave,
    /// Exceptions and privileged instructions that its instruction emulator leaves out.
    FullEmulation,
    /// Enough speed for loops of a million instructions.
    Speed,
    /// Locked accesses across cache lines that end while other processors spin.
    BusLocks,
}

/// A check in which QEMU TCG 7.2 does not do what the manual says.
#[derive(Clone, Copy, Debug)]
pub struct Deviation {
    /// Name of the check.
    pub check: &'static str,
    /// The manual's section and what is different.
    pub manual: &'static str,
}

/// One guest.
#[derive(Clone, Copy, Debug)]
pub struct Guest {
    /// Name: the source is `guests/NAME.S`.
    pub name: &'static str,
    /// The ELF file.
    pub elf: &'static [u8],
    /// The same file in the build directory, for tests of this workspace.
    pub path: &'static str,
    /// Numbers of vCPUs to run it with.
    pub cpus: &'static [u32],
    /// How it must end.
    pub expect: Expect,
    /// What it asks of a KVM that has no hardware under it.
    pub needs: &'static [Need],
    /// Checks that fail under QEMU TCG.
    pub qemu_differs: &'static [Deviation],
    /// The check at which QEMU TCG is lost, so that nothing after it can be compared.
    pub qemu_lost_at: Option<&'static str>,
    /// What QEMU TCG 7.2 lacks, when it cannot run the guest at all.
    pub qemu_skips: Option<&'static str>,
    /// Time after which it counts as hung.
    pub timeout: Duration,
}

impl Guest {
    /// Whether software-emulated KVM (see the design's note on `--accel auto`) can run it.
    #[must_use]
    pub const fn kvm_here(&self) -> bool {
        self.needs.is_empty()
    }
}

/// All guests.
#[must_use]
pub fn all() -> &'static [Guest] {
    GUESTS
}

#[cfg(test)]
mod tests {
    use super::{Guest, all};

    const SOURCES: &[&str] = include!(concat!(env!("OUT_DIR"), "/names.rs"));

    #[test]
    fn every_source_is_listed_once() {
        let mut names: Vec<&str> = all().iter().map(|g: &Guest| g.name).collect();
        names.sort_unstable();
        assert_eq!(names, SOURCES);
    }

    #[test]
    fn images_carry_both_boot_headers() {
        for guest in all() {
            let head = guest.elf.get(..8192).unwrap_or(guest.elf);
            assert_eq!(&head[..5], b"\x7fELF\x02", "{}", guest.name);
            let magic = 0x1bad_b002u32.to_le_bytes();
            assert!(head.chunks(4).any(|w| w == magic), "{}: Multiboot 1", guest.name);
            assert!(
                guest.elf.windows(8).any(|w| w == b"\x12\0\0\0Xen\0"),
                "{}: PVH note",
                guest.name
            );
        }
    }
}
