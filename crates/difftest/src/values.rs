//! Operand values that are likely to matter: integers around limits, floating-point specials.

use crate::rng::Rng;

const F32: [u32; 14] = [
    0,
    0x8000_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0xffc0_1234,
    0x7f80_0001,
    0x0000_0001,
    0x807f_ffff,
    0x7f7f_ffff,
    0x0080_0000,
    0x4f00_0000,
];

const F64: [u64; 14] = [
    0,
    0x8000_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff8_0000_0000_0000,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff8_0000_0000_1234,
    0x7ff0_0000_0000_0001,
    0x0000_0000_0000_0001,
    0x800f_ffff_ffff_ffff,
    0x7fef_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x41e0_0000_0000_0000,
];

/// An integer of 64 bits; small, near a limit, or anything.
pub fn integer(rng: &mut Rng) -> u64 {
    let value = match rng.below(8) {
        0 => u64::from(rng.below(4)),
        1 => u64::from(rng.below(256)),
        2 => (1u64 << rng.below(64)).wrapping_add(u64::from(rng.below(3))).wrapping_sub(1),
        3 => 0u64.wrapping_sub(1 << rng.below(64)),
        4 => rng.pick(&[0x7f, 0x80, 0x7fff, 0x8000, 0x7fff_ffff, 0x8000_0000, u64::MAX, 1 << 63]),
        5 => rng.next_u64() & 0xffff_ffff,
        _ => rng.next_u64(),
    };
    // A 32-bit or narrower case has arbitrary upper halves.
    if rng.percent(10) { (value & 0xffff_ffff) | (rng.next_u64() << 32) } else { value }
}

/// A single-precision number.
pub fn single(rng: &mut Rng) -> u32 {
    match rng.below(4) {
        0 => rng.pick(&F32),
        1 => rng.next_u64() as u32,
        2 => ((rng.below(2000) as f32 - 1000.0) / 8.0).to_bits(),
        // Exponents near 1, full mantissas: rounding matters.
        _ => 0x3d80_0000 + (rng.next_u64() as u32 & 0x83ff_ffff),
    }
}

/// A double-precision number.
pub fn double(rng: &mut Rng) -> u64 {
    match rng.below(4) {
        0 => rng.pick(&F64),
        1 => rng.next_u64(),
        2 => ((f64::from(rng.below(200_000)) - 100_000.0) / 16.0).to_bits(),
        _ => 0x3fb0_0000_0000_0000u64.wrapping_add(rng.next_u64() & 0x807f_ffff_ffff_ffff),
    }
}

/// An 80-bit number of the x87, unusual formats included.
pub fn extended(rng: &mut Rng) -> [u8; 10] {
    let mantissa = match rng.below(4) {
        0 => 1 << 63,
        1 => rng.pick(&[0, 1, 3 << 62, (1 << 63) | 1, u64::MAX, 0x4000_0000_0000_0000]),
        _ => rng.next_u64() | (1 << 63),
    };
    let exponent = match rng.below(6) {
        0 => rng.pick(&[0, 1, 0x7fff, 0x7ffe, 0x8000, 0xffff]),
        1 => rng.next_u64() as u16,
        _ => (0x3fff - 40 + rng.below(80)) as u16 | (rng.next_u64() as u16 & 0x8000),
    };
    let mut bytes = [0; 10];
    bytes[..8].copy_from_slice(&mantissa.to_le_bytes());
    bytes[8..].copy_from_slice(&exponent.to_le_bytes());
    bytes
}

/// 32 bytes for a vector register or a piece of memory.
pub fn vector(rng: &mut Rng) -> [u8; 32] {
    let mut bytes = [0; 32];
    let style = rng.below(8);
    for lane in bytes.chunks_exact_mut(8) {
        let value = match style {
            0 => 0,
            1 => u64::MAX,
            2 | 3 => u64::from(single(rng)) | (u64::from(single(rng)) << 32),
            4 => double(rng),
            5 => integer(rng),
            6 => rng.next_u64() & 0x0f0f_0f0f_0f0f_0f0f,
            _ => rng.next_u64(),
        };
        lane.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}
