//! Messages between APICs: interrupt commands, message-signalled interrupts and destinations.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::chips::lapic::Lapic;

/// Delivery mode (bits 8 to 10 of a command, of MSI data and of a redirection entry).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// To all destinations.
    Fixed,
    /// To the destination that is least busy.
    LowestPriority,
    /// System management interrupt.
    Smi,
    /// Not defined.
    Reserved,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up.
    Startup,
    /// From the 8259 pair.
    External,
}

impl Delivery {
    /// By the three bits.
    #[must_use]
    pub const fn from_bits(bits: u64) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::Reserved,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            _ => Self::External,
        }
    }
}

/// Whom a message is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// The destination field.
    pub id: u32,
    /// It is a set of logical ids, not one APIC id.
    pub logical: bool,
    /// The field has 32 bits (from an x2APIC), not 8.
    pub wide: bool,
}

impl Destination {
    fn broadcast(self) -> bool {
        self.id == if self.wide { u32::MAX } else { 0xff }
    }

    /// Whether the APIC `id`, in x2APIC mode or with these LDR and DFR, is meant.
    #[must_use]
    pub fn matches(self, id: u32, x2: bool, ldr: u32, dfr: u32) -> bool {
        if self.broadcast() {
            return true;
        }
        if !self.logical {
            return self.id == id;
        }
        if x2 {
            let own = x2apic_logical(id);
            return self.id >> 16 == own >> 16 && self.id & own & 0xffff != 0;
        }
        if self.id > 0xff {
            return false;
        }
        let own = ldr >> 24;
        if dfr >> 28 == 0xf {
            self.id & own != 0
        } else {
            self.id >> 4 == own >> 4 && self.id & own & 0xf != 0
        }
    }
}

/// The logical id of an x2APIC: cluster in the high half, one bit in the low half.
#[must_use]
pub const fn x2apic_logical(id: u32) -> u32 {
    id >> 4 << 16 | 1 << (id & 15)
}

/// Short ways to name destinations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// None: see the destination.
    No,
    /// The sender.
    Myself,
    /// All APICs.
    All,
    /// All but the sender.
    Others,
}

/// An interrupt command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Icr {
    /// Vector.
    pub vector: u8,
    /// Delivery mode.
    pub delivery: Delivery,
    /// Destination, unless there is a shorthand.
    pub destination: Destination,
    /// Shorthand.
    pub shorthand: Shorthand,
    /// INIT with level de-assert: does nothing on processors with a version from 0x10.
    pub deassert: bool,
}

impl Icr {
    /// By the 64 bits of the register; `x2` when it is that of an x2APIC.
    #[must_use]
    pub const fn parse(value: u64, x2: bool) -> Self {
        let id = if x2 { (value >> 32) as u32 } else { (value >> 56) as u32 };
        let logical = value >> 11 & 1 == 1;
        Self {
            vector: value as u8,
            delivery: Delivery::from_bits(value >> 8),
            destination: Destination { id, logical, wide: x2 },
            shorthand: match value >> 18 & 3 {
                0 => Shorthand::No,
                1 => Shorthand::Myself,
                2 => Shorthand::All,
                _ => Shorthand::Others,
            },
            deassert: value >> 14 & 1 == 0 && value >> 15 & 1 == 1,
        }
    }

    /// The command of the self-IPI register.
    #[must_use]
    pub const fn to_self(vector: u8) -> Self {
        Self {
            vector,
            delivery: Delivery::Fixed,
            destination: Destination { id: 0, logical: false, wide: true },
            shorthand: Shorthand::Myself,
            deassert: false,
        }
    }

    /// Whether the vector has to be a legal one.
    #[must_use]
    pub const fn is_fixed(&self) -> bool {
        matches!(self.delivery, Delivery::Fixed | Delivery::LowestPriority)
    }
}

/// All local APICs of the machine.
pub struct ApicBus {
    apics: Vec<Arc<Lapic>>,
    /// Where the search for the least busy APIC begins, so that equals take turns.
    turn: AtomicUsize,
}

impl ApicBus {
    /// With these APICs.
    #[must_use]
    pub fn new(apics: Vec<Arc<Lapic>>) -> Self {
        Self { apics, turn: AtomicUsize::new(0) }
    }

    /// The APICs, by vCPU.
    #[must_use]
    pub fn apics(&self) -> &[Arc<Lapic>] {
        &self.apics
    }

    /// Sends a command of the APIC with the number `sender`.
    pub fn send(&self, sender: u32, icr: Icr) {
        if icr.delivery == Delivery::Init && icr.deassert {
            return;
        }
        let chosen = |apic: &&Arc<Lapic>| match icr.shorthand {
            Shorthand::No => apic.is_destination(icr.destination),
            Shorthand::Myself => apic.id() == sender,
            Shorthand::All => true,
            Shorthand::Others => apic.id() != sender,
        };
        self.give(chosen, icr.delivery, icr.vector, false);
    }

    /// Delivers an interrupt from the I/O APIC or a message; `level` when it is level-triggered.
    /// Tells whether an APIC took it.
    pub fn deliver(
        &self,
        destination: Destination,
        delivery: Delivery,
        vector: u8,
        level: bool,
    ) -> bool {
        self.give(|apic| apic.is_destination(destination), delivery, vector, level)
    }

    fn give(
        &self,
        chosen: impl Fn(&&Arc<Lapic>) -> bool,
        delivery: Delivery,
        vector: u8,
        level: bool,
    ) -> bool {
        if delivery != Delivery::LowestPriority {
            let mut taken = false;
            for apic in self.apics.iter().filter(chosen) {
                taken |= apic.receive(delivery, vector, level);
            }
            return taken;
        }
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let count = self.apics.len();
        let rotated = (0..count).filter_map(|i| self.apics.get((turn.wrapping_add(i)) % count));
        let least = rotated.filter(chosen).min_by_key(|apic| apic.priority());
        least.is_some_and(|apic| apic.receive(delivery, vector, level))
    }

    /// Delivers a message-signalled interrupt (Intel SDM vol. 3, 11.11). The destination has 15
    /// bits: bits 5 to 11 of the address are its high part, as KVM defines it for guests without an
    /// interrupt remapper.
    pub fn deliver_msi(&self, address: u64, data: u32) -> bool {
        let low = (address >> 12 & 0xff) as u32;
        let high = (address >> 5 & 0x7f) as u32;
        let destination =
            Destination { id: high << 8 | low, logical: address >> 2 & 1 == 1, wide: false };
        // The redirection hint asks for one of the destinations.
        let hint = address >> 3 & 1 == 1;
        let delivery = match Delivery::from_bits(u64::from(data) >> 8) {
            Delivery::Fixed if hint && destination.logical => Delivery::LowestPriority,
            delivery => delivery,
        };
        self.deliver(destination, delivery, data as u8, data >> 15 & 1 == 1)
    }
}
