//! From the decoder to the emitter: arbitrary bytes as guest code in one of three modes.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let Some((mode, code)) = data.split_first() else { return };
    let bits = [16, 32, 64][usize::from(*mode) % 3];
    berth_translator::translate_only(code, bits).expect("the host has what the translator needs");
});
