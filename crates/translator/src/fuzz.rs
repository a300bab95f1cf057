//! Translation of arbitrary bytes without running them, for fuzzing and for a test with seeded
//! rubbish.

use berth_x86::cpuid::{CpuidTable, Topology};
use iced_x86::{Decoder, DecoderOptions};

use crate::Optimizations;
use crate::SetupError;
use crate::code::{BlockKey, CodeCache};
use crate::features::Allowed;
use crate::ram::PAGE;
use crate::thunks::{Then, Thunks};
use crate::translate::{MAX_BLOCK_BYTES, MAX_INSNS, Mode, Translation, classify};

/// Translates code that is never run; see [`crate::translate_only`].
pub fn translate_only(bytes: &[u8], bits: u8) -> Result<usize, SetupError> {
    extern "C" fn never(_: u64, _: u64, _: u64) -> Then {
        Then::Exit
    }
    let mut cache = CodeCache::new(4 << 20)?;
    let thunks = Thunks::new(&mut cache, [never; 4]);
    let table = CpuidTable::new(&crate::host_cpuid(), Topology { index: 0, count: 1 }, 1_000_000);
    let allowed = Allowed::new(table.features());
    let bits = if matches!(bits, 16 | 32) { bits } else { 64 };
    let mode = Mode::flat(bits, true);
    let code = bytes.get(..bytes.len().min(PAGE as usize)).unwrap_or_default();
    let mut t = Translation::new(thunks, Optimizations::all());
    let (mut at, mut total) = (0, 0);
    while at < code.len() {
        let key = BlockKey { rip: 0x1000 + at as u64, gpa: 0x1000 + at as u64, mode: mode.pack() };
        t.begin(&cache, key, mode);
        let mut ended = false;
        for _ in 0..MAX_INSNS {
            let rest = code.get(at..).unwrap_or_default();
            let mut d =
                Decoder::with_ip(u32::from(bits), rest, 0x1000 + at as u64, DecoderOptions::NONE);
            let ins = d.decode();
            if ins.is_invalid() {
                at += 1;
                break;
            }
            at += ins.len();
            ended = t.instruction(&ins, classify(&ins, mode, allowed.instruction(&ins)));
            if ended || at >= code.len() || t.len() >= MAX_BLOCK_BYTES / 3 {
                break;
            }
        }
        if !ended {
            t.continue_at(0x1000 + at as u64);
        }
        let made = t.finish();
        total += made.code.len() + made.cold.len();
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::translate_only;

    #[test]
    fn rubbish_is_translated_without_panic() {
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let mut bytes = [0u8; 4096];
        for round in 0..60 {
            for b in &mut bytes {
                x ^= x << 13;
                x ^= x >> 7;
                x ^= x << 17;
                *b = x as u8;
            }
            let bits = [16, 32, 64][round % 3];
            assert!(translate_only(&bytes, bits).unwrap() > 4096);
        }
    }
}
