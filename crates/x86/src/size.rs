//! Operand sizes of instructions that transfer control or flags.

/// The operand size an instruction executes with, after prefixes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpSize {
    /// 16 bits.
    Bits16,
    /// 32 bits.
    Bits32,
    /// 64 bits; only in 64-bit mode.
    Bits64,
}

impl OpSize {
    /// Bytes of one operand.
    #[must_use]
    pub const fn bytes(self) -> usize {
        match self {
            Self::Bits16 => 2,
            Self::Bits32 => 4,
            Self::Bits64 => 8,
        }
    }

    /// `value` cut to the size.
    #[must_use]
    pub const fn cut(self, value: u64) -> u64 {
        match self {
            Self::Bits16 => value & 0xffff,
            Self::Bits32 => value & 0xffff_ffff,
            Self::Bits64 => value,
        }
    }
}
