//! Backends that are wrong on purpose, to show that the test finds what it shall find.

use iced_x86::Mnemonic;

use crate::case::{Backend, Case, Outcome};
use crate::compare::decode;
use crate::native::NativeBackend;

/// What is done wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mistake {
    /// ADC loses the carry flag it makes.
    Carry,
    /// One bit of XMM3 flips in sequences with a shuffle.
    Vector,
    /// #PF reports a read as a write.
    ErrorCode,
    /// The last changed word of memory is lost.
    Memory,
}

impl Mistake {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Carry, Self::Vector, Self::ErrorCode, Self::Memory];
}

/// The bare processor, with its results made wrong.
pub struct WrongBackend {
    /// Gives the results.
    pub native: NativeBackend,
    /// What to spoil.
    pub mistake: Mistake,
}

impl Backend for WrongBackend {
    fn run(&mut self, case: &Case) -> Outcome {
        let mut outcome = self.native.run(case);
        let contains = |m: Mnemonic| decode(case).iter().any(|i| i.mnemonic() == m);
        if let Outcome::Stopped(end) = &mut outcome {
            match self.mistake {
                Mistake::Carry if contains(Mnemonic::Adc) => end.rflags ^= 1,
                Mistake::Vector if contains(Mnemonic::Pshufd) => end.xsave.0[160 + 48] ^= 1,
                Mistake::ErrorCode if end.fault.vector == 14 => end.fault.error ^= 2,
                Mistake::Memory => drop(end.memory.pop()),
                _ => {}
            }
        }
        outcome
    }
}
