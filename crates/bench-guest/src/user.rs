//! Integer code: loops, calls, jumps, trees, loads of every distance.

use std::hint::black_box;

use crate::row::{Group, Random, Row, Work, row};

const SIEVE_LIMIT: usize = 1 << 20;
const QSORT_VALUES: usize = 100_000;
const TREE_DEPTH: u32 = 14;
const TREE_NODES: u64 = (1 << (TREE_DEPTH + 1)) - 1;
const FIB_ARGUMENT: u64 = 35;
/// How often `fib` is entered for the argument above: 2 * F(36) - 1.
const FIB_CALLS: u64 = 29_860_703;

/// The rows of this module.
pub const ROWS: &[Row] = &[
    row("registers", Group::User, 40_000_000, registers),
    row("sieve", Group::User, 24 * SIEVE_LIMIT as u64, sieve),
    row("qsort", Group::User, 8 * QSORT_VALUES as u64, qsort),
    row("tree", Group::User, 40 * TREE_NODES, tree),
    row("fib", Group::User, FIB_CALLS, fib),
    row("indirect", Group::User, 30_000_000, indirect),
    row("interpreter", Group::User, 40_000_000, interpreter),
    row("load-64m", Group::User, 6_000_000, load_64m),
    row("chase-128k", Group::User, 16_000_000, chase_128k),
    row("chase-16m", Group::User, 1_500_000, chase_16m),
];

fn registers(ops: u64) -> Result<Work, String> {
    Ok(Box::new(move || {
        let mut x = black_box(0x9e37_79b9_7f4a_7c15_u64);
        for _ in 0..ops {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
        }
        x
    }))
}

fn sieve(ops: u64) -> Result<Work, String> {
    let mut composite = vec![false; SIEVE_LIMIT];
    Ok(Box::new(move || {
        let mut primes = 0;
        for _ in 0..ops / SIEVE_LIMIT as u64 {
            primes += sieve_once(black_box(&mut composite));
        }
        primes
    }))
}

/// How many primes there are below the length.
pub fn sieve_once(composite: &mut [bool]) -> u64 {
    composite.fill(false);
    let mut primes = 0;
    for number in 2..composite.len() {
        if composite[number] {
            continue;
        }
        primes += 1;
        let mut multiple = number * number;
        while multiple < composite.len() {
            composite[multiple] = true;
            multiple += number;
        }
    }
    primes
}

fn qsort(ops: u64) -> Result<Work, String> {
    extern "C" fn compare(a: *const libc::c_void, b: *const libc::c_void) -> libc::c_int {
        // SAFETY: qsort below calls this with elements of an array of u32.
        let (a, b) = unsafe { (*a.cast::<u32>(), *b.cast::<u32>()) };
        i32::from(a > b) - i32::from(a < b)
    }
    let mut random = Random::new(42);
    let shuffled: Vec<u32> = (0..QSORT_VALUES).map(|_| random.next() as u32).collect();
    let mut values = shuffled.clone();
    Ok(Box::new(move || {
        let mut sum = 0_u64;
        for round in 0..ops / QSORT_VALUES as u64 {
            values.copy_from_slice(&shuffled);
            // SAFETY: the array has that many elements of that size, and `compare` takes them.
            unsafe {
                libc::qsort(
                    values.as_mut_ptr().cast(),
                    values.len(),
                    size_of::<u32>(),
                    Some(compare),
                );
            }
            let middle = values[QSORT_VALUES / 2 + round as usize];
            sum = sum.wrapping_mul(31).wrapping_add(u64::from(middle));
        }
        sum
    }))
}

struct Node {
    left: Option<Box<Node>>,
    right: Option<Box<Node>>,
    value: u64,
}

fn tree(ops: u64) -> Result<Work, String> {
    fn build(depth: u32, value: u64) -> Option<Box<Node>> {
        let (mut left, mut right) = (None, None);
        if depth > 0 {
            left = build(depth - 1, 2 * value);
            right = build(depth - 1, 2 * value + 1);
        }
        Some(Box::new(Node { left, right, value }))
    }
    fn sum(node: Option<&Node>) -> u64 {
        node.map_or(0, |n| {
            n.value.wrapping_add(sum(n.left.as_deref())).wrapping_mul(3) ^ sum(n.right.as_deref())
        })
    }
    Ok(Box::new(move || {
        let mut total = 0_u64;
        for round in 0..ops / TREE_NODES {
            let root = black_box(build(TREE_DEPTH, round + 1));
            total = total.wrapping_add(sum(root.as_deref()));
        }
        total
    }))
}

fn fib(_: u64) -> Result<Work, String> {
    // Not the sum, which the compiler would make half a loop.
    #[inline(never)]
    fn calls(n: u64) -> u64 {
        if n < 2 { n } else { calls(n - 1).rotate_left(1).wrapping_sub(calls(n - 2)) }
    }
    Ok(Box::new(|| calls(black_box(FIB_ARGUMENT))))
}

fn indirect(ops: u64) -> Result<Work, String> {
    type Step = fn(u64) -> u64;
    const STEPS: [Step; 8] = [
        |x| x.wrapping_add(0x1234_5678_9abc),
        |x| x.rotate_left(5),
        |x| x ^ (x >> 3),
        |x| x.wrapping_mul(5),
        |x| !x,
        |x| x.wrapping_sub(99),
        |x| x.swap_bytes(),
        |x| x ^ 0x5555_5555,
    ];
    // Longer than a branch predictor's shortest patterns, as the calls of an object-oriented program.
    let mut random = Random::new(7);
    let order: Vec<u8> = (0..256).map(|_| random.below(STEPS.len()) as u8).collect();
    Ok(Box::new(move || {
        let steps = black_box(STEPS);
        let order = black_box(&order[..256]);
        let mut x = 1;
        for i in 0..ops {
            x = steps[usize::from(order[(i & 255) as usize] & 7)](x);
        }
        x
    }))
}

/// Operation, destination, source; a jump has its target where others have the source.
type Code = [u8; 3];

const MOVE: u8 = 0;
const ADD: u8 = 1;
const XOR: u8 = 2;
const SHIFT_LEFT: u8 = 3;
const SHIFT_RIGHT: u8 = 4;
const MULTIPLY: u8 = 5;
const STORE: u8 = 6;
const LOAD: u8 = 7;
const JUMP_IF_ODD: u8 = 8;
const JUMP: u8 = 9;

fn interpreter(ops: u64) -> Result<Work, String> {
    let program: Vec<Code> = vec![
        [ADD, 0, 1],
        [MOVE, 2, 0],
        [SHIFT_LEFT, 2, 13],
        [XOR, 0, 2],
        [STORE, 0, 4],
        [JUMP_IF_ODD, 0, 9],
        [MULTIPLY, 3, 0],
        [LOAD, 2, 4],
        [JUMP, 0, 11],
        [SHIFT_RIGHT, 0, 7],
        [XOR, 3, 0],
        [ADD, 1, 3],
        [JUMP, 0, 0],
    ];
    Ok(Box::new(move || interpret(black_box(&program), ops)))
}

#[inline(never)]
fn interpret(program: &[Code], steps: u64) -> u64 {
    let mut registers = [1_u64, 0x9e37_79b9, 0, 1];
    let mut memory = [0_u64; 16];
    let mut at = 0;
    for _ in 0..steps {
        let [operation, to, from] = program[at];
        at += 1;
        let (to, source) = (usize::from(to & 3), registers[usize::from(from & 3)]);
        match operation {
            MOVE => registers[to] = source,
            ADD => registers[to] = registers[to].wrapping_add(source),
            XOR => registers[to] ^= source,
            SHIFT_LEFT => registers[to] <<= from & 63,
            SHIFT_RIGHT => registers[to] >>= from & 63,
            MULTIPLY => registers[to] = registers[to].wrapping_mul(source | 1),
            STORE => memory[usize::from(from & 15)] = registers[to],
            LOAD => registers[to] = registers[to].wrapping_add(memory[usize::from(from & 15)]),
            JUMP_IF_ODD if registers[to] & 1 == 0 => {}
            _ => at = usize::from(from),
        }
    }
    registers[0] ^ registers[1] ^ registers[3]
}

fn load_64m(ops: u64) -> Result<Work, String> {
    const BITS: u32 = 23;
    let values: Vec<u64> = (0..1_u64 << BITS).map(|i| i.wrapping_mul(0x9e37_79b9)).collect();
    Ok(Box::new(move || {
        let values = black_box(&values[..1 << BITS]);
        let (mut x, mut sum) = (1_u64, 0_u64);
        for _ in 0..ops {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            sum = sum.wrapping_add(values[(x >> (64 - BITS)) as usize]);
        }
        sum
    }))
}

fn chase_128k(ops: u64) -> Result<Work, String> {
    chase(128 << 10, ops)
}

fn chase_16m(ops: u64) -> Result<Work, String> {
    chase(16 << 20, ops)
}

#[derive(Clone)]
#[repr(align(64))]
struct Line {
    next: usize,
}

/// Follows one cycle through all lines, in random order.
fn chase(bytes: usize, ops: u64) -> Result<Work, String> {
    let mut lines: Vec<Line> = (0..bytes / size_of::<Line>()).map(|next| Line { next }).collect();
    let mut random = Random::new(3);
    // Sattolo's shuffle leaves a single cycle.
    for last in (1..lines.len()).rev() {
        lines.swap(last, random.below(last));
    }
    Ok(Box::new(move || {
        let lines = black_box(&lines);
        let (mut at, mut sum) = (0, 0_u64);
        for _ in 0..ops {
            at = lines[at].next;
            sum = sum.wrapping_add(at as u64);
        }
        sum
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_results() {
        assert_eq!(sieve_once(&mut vec![false; 1_000_000]), 78_498);
        fn entered(n: u64) -> u64 {
            if n < 2 { 1 } else { 1 + entered(n - 1) + entered(n - 2) }
        }
        assert_eq!(entered(20), 21_891);
        // The recurrence of the count, carried on to the argument used.
        let (mut a, mut b) = (1_u64, 1_u64);
        for _ in 2..=FIB_ARGUMENT {
            (a, b) = (b, 1 + a + b);
        }
        assert_eq!(b, FIB_CALLS);
    }

    #[test]
    fn a_chase_visits_every_line_once() {
        let lines = (64 << 10) / size_of::<Line>() as u64;
        let mut once = chase(64 << 10, lines).unwrap();
        assert_eq!(once(), lines * (lines - 1) / 2);
    }
}
