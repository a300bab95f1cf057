//! Makes a case that shows a difference smaller while it still shows one.

use berth_x86::state::XsaveArea;

use crate::case::Case;

/// Single-byte NOP; takes the place of removed instructions so that nothing moves.
const NOP: u8 = 0x90;

/// The smallest case found for which `fails` holds, starting from one for which it does.
pub fn shrink(case: &Case, mut fails: impl FnMut(&Case) -> bool) -> Case {
    let mut best = case.clone();
    loop {
        let before = best.clone();
        drop_instructions(&mut best, &mut fails);
        simplify_state(&mut best, &mut fails);
        drop_patches(&mut best, &mut fails);
        if best == before {
            return best;
        }
    }
}

/// Keeps `changed` if it still fails.
fn attempt(best: &mut Case, changed: Case, fails: &mut impl FnMut(&Case) -> bool) -> bool {
    let better = changed != *best && fails(&changed);
    if better {
        *best = changed;
    }
    better
}

fn drop_instructions(best: &mut Case, fails: &mut impl FnMut(&Case) -> bool) {
    // From the end: later instructions depend on earlier ones. First cut, then blank.
    while best.spans.len() > 1 {
        let mut changed = best.clone();
        if let Some(last) = changed.spans.pop() {
            changed.code.truncate(usize::from(last.start));
        }
        if !attempt(best, changed, fails) {
            break;
        }
    }
    for i in (0..best.spans.len()).rev() {
        let mut changed = best.clone();
        let span = changed.spans[i];
        let start = usize::from(span.start);
        changed.code[start..start + usize::from(span.len)].fill(NOP);
        attempt(best, changed, fails);
    }
}

fn simplify_state(best: &mut Case, fails: &mut impl FnMut(&Case) -> bool) {
    let mut changed = best.clone();
    changed.xsave = XsaveArea::default();
    if !attempt(best, changed, fails) {
        // Control words apart, then register by register.
        let pieces = (0..8)
            .map(|i| (32 + i * 16, 16))
            .chain((0..16).map(|i| (160 + i * 16, 16)))
            .chain((0..16).map(|i| (576 + i * 16, 16)))
            .chain([(0, 2), (2, 3), (24, 4)]);
        for (at, len) in pieces {
            let mut changed = best.clone();
            let simple = XsaveArea::default();
            changed.xsave.0[at..at + len].copy_from_slice(&simple.0[at..at + len]);
            attempt(best, changed, fails);
        }
    }
    for value in [0, 1] {
        for i in 0..16 {
            if best.gpr[i] > value {
                let mut changed = best.clone();
                changed.gpr[i] = value;
                attempt(best, changed, fails);
            }
        }
    }
    let mut changed = best.clone();
    changed.rflags = 0;
    attempt(best, changed, fails);
    for i in 0..16 {
        let mut changed = best.clone();
        changed.gpr[i] &= 0xffff_ffff;
        attempt(best, changed, fails);
    }
}

fn drop_patches(best: &mut Case, fails: &mut impl FnMut(&Case) -> bool) {
    for i in (0..best.patches.len()).rev() {
        let mut changed = best.clone();
        changed.patches.remove(i);
        attempt(best, changed, fails);
    }
}
