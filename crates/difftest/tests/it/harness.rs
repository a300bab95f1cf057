//! The harness tested with itself: the processor agrees with itself, and mistakes are found.

use std::process::Command;

use berth_difftest::case::Backend;
use berth_difftest::compare::compare;
use berth_difftest::generate::{Generator, Options};
use berth_difftest::native::NativeBackend;
use berth_difftest::run::{minimize, run};
use berth_difftest::wrong::{Mistake, WrongBackend};
use berth_translator::Optimizations;

/// No case differs.
fn agrees(against: &str, cases: &str) {
    let output = Command::new(env!("CARGO_BIN_EXE_difftest"))
        .args(["--against", against, "--cases", cases, "--failures", "20"])
        .output()
        .expect("difftest is built with its tests");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn the_processor_agrees_with_itself() {
    agrees("native", "20000");
}

#[test]
fn the_translator_agrees_with_the_processor() {
    agrees("translated", "100000");
}

#[test]
fn the_translator_agrees_when_accesses_look_for_crossings() {
    agrees("looking", "20000");
}

/// Interrupts come at any time; what was begun then must be done once.
#[test]
fn the_translator_agrees_when_it_is_stopped() {
    agrees("stopped", "20000");
    agrees("looking-stopped", "20000");
}

/// Processes of their own execute what can be left to the processor.
#[test]
fn direct_execution_agrees_with_the_processor() {
    agrees("direct", "10000");
}

/// Each page is copied before it is first written, also while the processor executes user code.
#[test]
fn memory_that_is_shared_is_copied_in_time() {
    agrees("frozen", "5000");
    agrees("frozen-direct", "5000");
}

#[test]
fn the_translator_agrees_with_each_optimization_alone() {
    agrees("translated:none", "3000");
    for name in Optimizations::names() {
        agrees(&format!("translated:none,{name}"), "3000");
    }
}

#[test]
fn mistakes_are_found_and_made_small() {
    let generator = Generator::new(7, Options::default());
    for mistake in Mistake::ALL {
        let mut native = NativeBackend::new().unwrap();
        let mut wrong = WrongBackend { native: NativeBackend::new().unwrap(), mistake };
        let mut small = None;
        let stats = run(&generator, 0..5000, &mut native, &mut wrong, |finding, a, b| {
            small = Some(minimize(&finding.case, a, b));
            false
        });
        assert_eq!(stats.different, 1, "{mistake:?}");
        let (case, differences) = small.unwrap();
        assert!(!differences.is_empty(), "{mistake:?}");
        let left = case
            .spans
            .iter()
            .filter(|s| {
                case.code[usize::from(s.start)..][..usize::from(s.len)].iter().any(|b| *b != 0x90)
            })
            .count();
        assert!(left <= 2, "{mistake:?}: {left} instructions left");
    }
}

#[test]
fn a_case_is_its_number() {
    let one = Generator::new(3, Options::default());
    let two = Generator::new(3, Options::default());
    let mut native = NativeBackend::new().unwrap();
    for number in [0, 17, 123_456_789] {
        let case = one.case(number);
        assert_eq!(case, two.case(number));
        let (a, b) = (native.run(&case), native.run(&case));
        assert_eq!(compare(&case, &a, &b), []);
    }
}
