//! The table of known traps: the bare processor must agree with it.

use berth_difftest::case::{Backend, Outcome};
use berth_difftest::native::NativeBackend;
use berth_difftest::translated::{TranslatedBackend, Way};
use berth_difftest::traps;

/// Checks the whole table on a backend.
fn check(backend: &mut dyn Backend) {
    let mut wrong = Vec::new();
    for trap in traps::all().expect("the table can be assembled") {
        match backend.run(&trap.case) {
            Outcome::Stopped(end) => wrong.extend(trap.check(&end)),
            other => wrong.push(format!("{}: {other:?}", trap.name)),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_of_traps_is_what_the_processor_does() {
    check(&mut NativeBackend::new().unwrap());
}

#[test]
fn the_translator_knows_the_table_of_traps() {
    check(&mut TranslatedBackend::new(Way::default()).unwrap());
}
