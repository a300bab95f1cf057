//! What the generator knows about register contents while it makes a sequence.
//!
//! Initial values are chosen late: a register gets its value when an instruction first needs it, so
//! that whoever needs a pointer first can have one.

use crate::rng::Rng;
use crate::values;

/// Hardware number of RSP.
pub const RSP: usize = 4;

/// Contents of the general registers.
#[derive(Clone, Debug)]
pub struct Registers {
    /// The value at the start; `None`: nobody has needed it.
    initial: [Option<u64>; 16],
    /// The value now; `None`: unknown (or not chosen yet).
    known: [Option<u64>; 16],
    /// Registers that must not be written now (a loop counter).
    pub protected: u16,
}

impl Registers {
    /// Nothing chosen but the stack pointer.
    #[must_use]
    pub fn new(stack_pointer: u64) -> Self {
        let mut this = Self { initial: [None; 16], known: [None; 16], protected: 0 };
        this.initial[RSP] = Some(stack_pointer);
        this.known[RSP] = Some(stack_pointer);
        this
    }

    /// Whether the initial value can still be chosen.
    #[must_use]
    pub fn free(&self, reg: usize) -> bool {
        self.initial[reg].is_none()
    }

    /// The value now, if it is certain.
    #[must_use]
    pub fn known(&self, reg: usize) -> Option<u64> {
        self.known[reg]
    }

    /// Chooses the initial value of a free register.
    pub fn choose(&mut self, reg: usize, value: u64) {
        self.initial[reg] = Some(value);
        self.known[reg] = Some(value);
    }

    /// An instruction uses the register as data.
    pub fn touch(&mut self, reg: usize, rng: &mut Rng) {
        if self.free(reg) {
            self.choose(reg, values::integer(rng));
        }
    }

    /// An instruction writes the register.
    pub fn written(&mut self, reg: usize, value: Option<u64>) {
        self.known[reg] = value;
    }

    /// The initial values, chosen or not.
    pub fn finish(&self, rng: &mut Rng) -> [u64; 16] {
        self.initial.map(|v| v.unwrap_or_else(|| values::integer(rng)))
    }
}
