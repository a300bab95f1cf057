//! Floating-point and vector code.

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_add_epi32, _mm_loadu_si128, _mm_mul_epu32, _mm_set1_epi32,
    _mm_shuffle_epi32, _mm_slli_epi32, _mm_srli_epi32, _mm_storeu_si128, _mm_unpacklo_epi8,
    _mm_xor_si128, _mm256_add_epi32, _mm256_castps_si256, _mm256_fmadd_ps, _mm256_loadu_ps,
    _mm256_loadu_si256, _mm256_mullo_epi32, _mm256_permute4x64_epi64, _mm256_set1_epi32,
    _mm256_set1_ps, _mm256_shuffle_epi8, _mm256_slli_epi32, _mm256_srli_epi32, _mm256_storeu_si256,
    _mm256_xor_si256,
};
use std::hint::black_box;

use crate::row::{Group, Random, Row, Work, row};

const DOT_ELEMENTS: usize = 4096;
const BUFFER: usize = 16 << 10;

/// The rows of this module.
pub const ROWS: &[Row] = &[
    row("nbody", Group::Vector, 600_000, nbody),
    row("dot-f64", Group::Vector, 100_000_000, dot),
    row("div-sqrt-f64", Group::Vector, 8_000_000, div_sqrt),
    row("convert-f64", Group::Vector, 8_000_000, convert),
    row("int-128", Group::Vector, 40_000_000, int_128),
    row("int-256", Group::Vector, 40_000_000, int_256),
    row("fma-256", Group::Vector, 40_000_000, fma_256),
];

#[derive(Clone, Copy)]
struct Body {
    at: [f64; 3],
    speed: [f64; 3],
    mass: f64,
}

/// Sun, Jupiter, Saturn, Uranus and Neptune, roughly, in astronomical units, days and solar masses
/// times 4π².
const BODIES: [Body; 5] = [
    Body { at: [0.0; 3], speed: [0.0; 3], mass: 39.47 },
    Body { at: [4.84, -1.16, -0.10], speed: [0.606, 2.81, -0.02], mass: 0.037 },
    Body { at: [8.34, 4.12, -0.40], speed: [-1.01, 1.82, 0.008], mass: 0.011 },
    Body { at: [12.89, -15.11, -0.22], speed: [1.08, 0.868, -0.010], mass: 0.0017 },
    Body { at: [15.37, -25.9, 0.179], speed: [0.979, 0.594, -0.034], mass: 0.0020 },
];

fn nbody(ops: u64) -> Result<Work, String> {
    Ok(Box::new(move || {
        let mut bodies = black_box(BODIES);
        for _ in 0..ops {
            advance(&mut bodies, 0.001);
        }
        let places = bodies.iter().flat_map(|body| body.at);
        places.fold(0_u64, |sum, x| sum.wrapping_mul(31) ^ x.to_bits())
    }))
}

#[inline(never)]
fn advance(bodies: &mut [Body; 5], step: f64) {
    for i in 0..bodies.len() {
        for j in i + 1..bodies.len() {
            let d = [0, 1, 2].map(|k| bodies[i].at[k] - bodies[j].at[k]);
            let square = d[0] * d[0] + d[1] * d[1] + d[2] * d[2];
            let magnitude = step / (square * square.sqrt());
            let (mass_i, mass_j) = (bodies[i].mass * magnitude, bodies[j].mass * magnitude);
            for (k, d) in d.into_iter().enumerate() {
                bodies[i].speed[k] -= d * mass_j;
                bodies[j].speed[k] += d * mass_i;
            }
        }
    }
    for body in bodies {
        for k in 0..3 {
            body.at[k] += step * body.speed[k];
        }
    }
}

fn dot(ops: u64) -> Result<Work, String> {
    let mut random = Random::new(5);
    let mut numbers =
        || -> Vec<f64> { (0..DOT_ELEMENTS).map(|_| (random.next() >> 40) as f64 / 1e6).collect() };
    let (a, b) = (numbers(), numbers());
    Ok(Box::new(move || {
        let mut sum = 0.0;
        for _ in 0..ops / DOT_ELEMENTS as u64 {
            sum += dot_once(black_box(&a), black_box(&b));
        }
        f64::to_bits(sum)
    }))
}

#[inline(never)]
fn dot_once(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        for k in 0..8 {
            sums[k] += a[k] * b[k];
        }
    }
    sums.iter().sum()
}

fn div_sqrt(ops: u64) -> Result<Work, String> {
    Ok(Box::new(move || {
        let mut x = black_box(2.0_f64);
        for _ in 0..ops {
            x = (x + 3.7 / x).sqrt();
        }
        x.to_bits()
    }))
}

fn convert(ops: u64) -> Result<Work, String> {
    Ok(Box::new(move || {
        let (mut whole, mut x) = (black_box(1_i64), 0.5_f64);
        for _ in 0..ops {
            x += whole as f64 * 0.25;
            // SAFETY: x is never below 0 and grows by at most 2^14 beyond 1e9.
            whole = unsafe { (x * 0.125).to_int_unchecked::<i64>() } & 0xffff | 1;
            if x > 1e9 {
                x = 0.5;
            }
        }
        x.to_bits() ^ whole as u64
    }))
}

fn buffer() -> Vec<u8> {
    let mut random = Random::new(11);
    (0..BUFFER).map(|_| random.next() as u8).collect()
}

fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |sum: u64, byte| sum.wrapping_mul(31).wrapping_add(u64::from(*byte)))
}

fn int_128(ops: u64) -> Result<Work, String> {
    let source = buffer();
    Ok(Box::new(move || {
        let mut bytes = source.clone();
        for _ in 0..ops / (BUFFER / 16) as u64 {
            mix_128(black_box(&mut bytes));
        }
        checksum(&bytes)
    }))
}

#[inline(never)]
fn mix_128(bytes: &mut [u8]) {
    // SAFETY: SSE2 belongs to every x86-64 processor; each access is within a chunk of 16 bytes.
    unsafe {
        let mut sum = _mm_set1_epi32(0x1234_5678);
        for chunk in bytes.chunks_exact_mut(16) {
            let at: *mut __m128i = chunk.as_mut_ptr().cast();
            let x = _mm_loadu_si128(at);
            let turned = _mm_xor_si128(_mm_slli_epi32(x, 7), _mm_srli_epi32(x, 25));
            let product = _mm_mul_epu32(x, _mm_shuffle_epi32(turned, 0b10_11_00_01));
            sum = _mm_add_epi32(_mm_xor_si128(sum, product), _mm_unpacklo_epi8(turned, x));
            _mm_storeu_si128(at, sum);
        }
    }
}

fn int_256(ops: u64) -> Result<Work, String> {
    if !is_x86_feature_detected!("avx2") {
        return Err("the processor has no AVX2".into());
    }
    let source = buffer();
    Ok(Box::new(move || {
        let mut bytes = source.clone();
        for _ in 0..ops / (BUFFER / 32) as u64 {
            // SAFETY: the processor has AVX2, as found above.
            unsafe { mix_256(black_box(&mut bytes)) };
        }
        checksum(&bytes)
    }))
}

#[target_feature(enable = "avx2")]
#[inline(never)]
fn mix_256(bytes: &mut [u8]) {
    let mut sum = _mm256_set1_epi32(0x1234_5678);
    let order = _mm256_set1_epi32(0x0407_0d02);
    for chunk in bytes.chunks_exact_mut(32) {
        let at: *mut __m256i = chunk.as_mut_ptr().cast();
        // SAFETY: the access is within a chunk of 32 bytes.
        let x = unsafe { _mm256_loadu_si256(at) };
        let turned = _mm256_xor_si256(_mm256_slli_epi32(x, 7), _mm256_srli_epi32(x, 25));
        let product = _mm256_mullo_epi32(x, _mm256_permute4x64_epi64(turned, 0b00_11_10_01));
        let shuffled = _mm256_shuffle_epi8(turned, order);
        sum = _mm256_add_epi32(_mm256_xor_si256(sum, product), shuffled);
        // SAFETY: as above.
        unsafe { _mm256_storeu_si256(at, sum) };
    }
}

fn fma_256(ops: u64) -> Result<Work, String> {
    if !is_x86_feature_detected!("fma") || !is_x86_feature_detected!("avx2") {
        return Err("the processor has no FMA".into());
    }
    let mut random = Random::new(13);
    let numbers: Vec<f32> =
        (0..BUFFER / 4).map(|_| (random.next() >> 44) as f32 / 1_048_576.0).collect();
    Ok(Box::new(move || {
        let mut sum = 0;
        for _ in 0..ops / (BUFFER / 32) as u64 {
            // SAFETY: the processor has FMA and AVX2, as found above.
            let part = unsafe { polynomial(black_box(&numbers)) };
            sum = (sum * 31 + part) & 0xffff_ffff_ffff;
        }
        sum
    }))
}

#[target_feature(enable = "avx2,fma")]
#[inline(never)]
fn polynomial(numbers: &[f32]) -> u64 {
    let mut sums: [__m256; 2] = [_mm256_set1_ps(0.0); 2];
    for pair in numbers.chunks_exact(16) {
        for (k, chunk) in pair.chunks_exact(8).enumerate() {
            // SAFETY: the access is within a chunk of 8 floats.
            let x = unsafe { _mm256_loadu_ps(chunk.as_ptr()) };
            let inner = _mm256_fmadd_ps(x, _mm256_set1_ps(0.3), _mm256_set1_ps(-0.2));
            sums[k] = _mm256_fmadd_ps(sums[k], inner, x);
        }
    }
    let mut words = [0_u32; 8];
    let both = _mm256_xor_si256(_mm256_castps_si256(sums[0]), _mm256_castps_si256(sums[1]));
    // SAFETY: the array has 32 bytes.
    unsafe { _mm256_storeu_si256(words.as_mut_ptr().cast(), both) };
    words.iter().fold(0, |sum, word| sum ^ u64::from(*word))
}
