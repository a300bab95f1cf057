//! Names of host registers for iced-x86, and renaming of guest registers.

use iced_x86::Register;

use crate::layout::mapped;

/// The host register `n` at a width of `size` bytes.
pub fn host_reg(n: u8, size: usize) -> Register {
    let n32 = u32::from(n);
    match size {
        1 if n < 4 => Register::AL + n32,
        1 => Register::SPL + (n32 - 4),
        2 => Register::AX + n32,
        4 => Register::EAX + n32,
        _ => Register::RAX + n32,
    }
}

/// A guest general register operand.
#[derive(Clone, Copy, Debug)]
pub struct GuestReg {
    /// Number.
    pub n: u8,
    /// Width in bytes.
    pub size: usize,
    /// AH, CH, DH or BH.
    pub high: bool,
}

impl GuestReg {
    /// Takes a general register apart; `None` for others.
    pub fn of(r: Register) -> Option<Self> {
        if !r.is_gpr() {
            return None;
        }
        let high = matches!(r, Register::AH | Register::CH | Register::DH | Register::BH);
        let n = r.full_register() as u32 - Register::RAX as u32;
        Some(Self { n: u8::try_from(n).ok()?, size: r.size(), high })
    }

    /// Where it lives, when it has a register of its own that can be named directly.
    pub fn direct(self) -> Option<Register> {
        if self.high {
            return None;
        }
        mapped(self.n).map(|h| host_reg(h, self.size))
    }
}
