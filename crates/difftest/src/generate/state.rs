//! Initial flags, segment bases and floating-point state.

use berth_x86::state::{XsaveArea, flags};

use crate::case::Mode;
use crate::layout::{DATA, World};
use crate::rng::Rng;
use crate::values;

/// Arithmetic flags at random; DF sometimes.
pub fn initial_flags(rng: &mut Rng) -> u64 {
    let mut value = rng.next_u64() & flags::ARITH;
    if rng.percent(20) {
        value |= flags::DF;
    }
    value
}

/// Bases of FS and GS: near the data, or zero.
pub fn segment_bases(mode: Mode, world: World, rng: &mut Rng) -> [u64; 2] {
    if mode == Mode::Compat32 {
        return [0; 2];
    }
    std::array::from_fn(|_| match rng.below(4) {
        0 => 0,
        1 => world.base() + u64::from(DATA.offset),
        2 => world.base().wrapping_add(u64::from(rng.below(1 << 20))),
        _ => world.base() - u64::from(rng.below(1 << 20)),
    })
}

/// x87, MXCSR and vector registers.
pub fn initial_xsave(rng: &mut Rng) -> XsaveArea {
    let mut area = XsaveArea::default();
    let bytes = &mut area.0;
    // Control word: all exceptions masked most of the time; any precision and rounding.
    let mut control = 0x037f_u16;
    if rng.percent(40) {
        control = 0x007f | (rng.pick(&[0u16, 2, 3]) << 8) | (rng.below(4) as u16) << 10;
    }
    if rng.percent(10) {
        control &= !(rng.below(64) as u16);
    }
    // Sticky exception bits only where they are masked, else the first x87 instruction faults.
    let sticky = rng.below(64) as u16 & control & 0x3f;
    let top = rng.below(8) as u16;
    let conditions = (rng.next_u64() as u16) & 0x4700;
    let status = if rng.percent(70) { (top << 11) | conditions | sticky } else { 0 };
    bytes[0..2].copy_from_slice(&control.to_le_bytes());
    bytes[2..4].copy_from_slice(&status.to_le_bytes());
    bytes[4] = match rng.below(4) {
        0 => 0,
        1 => 0xff,
        2 => rng.next_u64() as u8,
        _ => 0x0f,
    };
    for i in 0..8 {
        let at = 32 + i * 16;
        bytes[at..at + 10].copy_from_slice(&values::extended(rng));
    }
    // MXCSR: rounding, DAZ and FTZ at random, some exceptions unmasked rarely.
    let mut mxcsr = 0x1f80_u32;
    if rng.percent(30) {
        mxcsr |= (rng.below(4) << 13) | (rng.below(2) << 15) | (rng.below(2) << 6);
    }
    if rng.percent(30) {
        mxcsr |= rng.below(64);
    }
    if rng.percent(8) {
        mxcsr &= !(rng.below(64) << 7);
    }
    bytes[24..28].copy_from_slice(&mxcsr.to_le_bytes());
    for i in 0..16 {
        let lanes = values::vector(rng);
        bytes[160 + i * 16..176 + i * 16].copy_from_slice(&lanes[..16]);
        bytes[576 + i * 16..592 + i * 16].copy_from_slice(&lanes[16..]);
    }
    area
}
