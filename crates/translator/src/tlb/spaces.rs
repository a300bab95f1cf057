//! Which address spaces there are, for the vCPU of a clone.

use super::Tlb;

impl Tlb {
    /// How many address spaces there were so far; it wraps.
    pub fn spaces(&self) -> u16 {
        self.spaces
    }

    /// For each slot its PCID, and the number of the address space.
    pub fn space_slots(&self) -> Vec<(Option<u16>, u16)> {
        self.slots.iter().map(|s| (s.pcid, s.space)).collect()
    }

    /// Takes over the address spaces of another vCPU, without any translations of addresses.
    pub fn adopt_spaces(&mut self, spaces: u16, slots: &[(Option<u16>, u16)]) {
        self.spaces = spaces;
        for (slot, &(pcid, space)) in self.slots.iter_mut().zip(slots) {
            (slot.pcid, slot.space) = (pcid, space);
        }
    }
}
