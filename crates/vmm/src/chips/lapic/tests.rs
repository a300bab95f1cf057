use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use super::message::{ApicBus, Delivery, Destination};
use super::{CpuSignals, Effect, Lapic};
use crate::clock::fake::FakeClock;
use crate::timer::Alarm;

#[derive(Default)]
struct Signals(Mutex<Vec<String>>);

impl Signals {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl CpuSignals for Signals {
    fn interrupt(&self) {
        self.0.lock().unwrap().push("interrupt".into());
    }
    fn nmi(&self) {
        self.0.lock().unwrap().push("nmi".into());
    }
    fn init(&self) {
        self.0.lock().unwrap().push("init".into());
    }
    fn startup(&self, vector: u8) {
        self.0.lock().unwrap().push(format!("startup {vector:#x}"));
    }
}

/// Remembers what it was set to; 0 is "cleared".
#[derive(Default)]
struct FakeAlarm(AtomicU64);

impl Alarm for FakeAlarm {
    fn set(&self, after_ns: u64) {
        self.0.store(after_ns, Ordering::SeqCst);
    }
    fn clear(&self) {
        self.0.store(0, Ordering::SeqCst);
    }
}

struct Fixture {
    clock: Arc<FakeClock>,
    signals: Vec<Arc<Signals>>,
    alarms: Vec<Arc<FakeAlarm>>,
    bus: ApicBus,
}

impl Fixture {
    /// APICs in xAPIC mode, enabled by software.
    fn new(count: u32) -> Self {
        let clock = Arc::new(FakeClock::default());
        let mut fixture = (Vec::new(), Vec::new(), Vec::new());
        for id in 0..count {
            let signals = Arc::new(Signals::default());
            let alarm = Arc::new(FakeAlarm::default());
            let apic = Lapic::new(id, id == 0, clock.clone(), signals.clone());
            apic.set_alarm(alarm.clone());
            apic.mmio_write(0xf0, &0x1ffu32.to_le_bytes());
            fixture.0.push(signals);
            fixture.1.push(alarm);
            fixture.2.push(apic);
        }
        Self { clock, signals: fixture.0, alarms: fixture.1, bus: ApicBus::new(fixture.2) }
    }

    fn apic(&self, index: usize) -> &Lapic {
        &self.bus.apics()[index]
    }

    fn write(&self, index: usize, offset: u64, value: u32) {
        match self.apic(index).mmio_write(offset, &value.to_le_bytes()) {
            Effect::Send(icr) => self.bus.send(index as u32, icr),
            Effect::Eoi(_) | Effect::None => {}
        }
    }

    fn read(&self, index: usize, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.apic(index).mmio_read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn fixed(&self, vector: u8, level: bool) {
        let destination = Destination { id: 0, logical: false, wide: false };
        self.bus.deliver(destination, Delivery::Fixed, vector, level);
    }

    fn switch_to_x2(&self) {
        for apic in self.bus.apics() {
            apic.set_base(apic.base() | 1 << 10).unwrap();
        }
    }

    fn who_got(&self, vector: u8) -> Vec<u32> {
        let mut got = Vec::new();
        for apic in self.bus.apics() {
            if apic.acknowledge() == Some(vector) {
                got.push(apic.id());
                apic.mmio_write(0xb0, &[0; 4]);
                let _ = apic.write_msr(0x80b, 0);
            }
        }
        got
    }
}

#[test]
fn higher_classes_preempt_and_equal_ones_wait() {
    let f = Fixture::new(1);
    f.fixed(0x31, false);
    assert_eq!(f.apic(0).acknowledge(), Some(0x31));
    assert_eq!(f.read(0, 0xa0), 0x30);
    f.fixed(0x3f, false);
    assert!(!f.apic(0).pending(), "the same class waits");
    f.fixed(0x41, false);
    f.fixed(0x52, false);
    assert_eq!(f.apic(0).acknowledge(), Some(0x52));
    assert!(!f.apic(0).pending());
    f.write(0, 0xb0, 0);
    assert_eq!(f.apic(0).acknowledge(), Some(0x41));
    f.write(0, 0xb0, 0);
    assert!(!f.apic(0).pending());
    f.write(0, 0xb0, 0);
    assert_eq!(f.apic(0).acknowledge(), Some(0x3f));
}

#[test]
fn the_task_priority_holds_back_and_releases() {
    let f = Fixture::new(1);
    f.write(0, 0x80, 0x4f);
    assert_eq!(f.apic(0).task_priority_class(), 4);
    f.fixed(0x4f, false);
    assert!(!f.apic(0).pending());
    assert_eq!(f.read(0, 0x220), 1 << 0xf, "waits in IRR");
    f.signals[0].take();
    f.apic(0).set_task_priority_class(3);
    assert_eq!(f.signals[0].take(), ["interrupt"]);
    assert_eq!(f.apic(0).acknowledge(), Some(0x4f));
    assert_eq!(f.read(0, 0x120), 1 << 0xf);
}

#[test]
fn only_level_interrupts_tell_their_end() {
    let f = Fixture::new(1);
    f.fixed(0x60, true);
    assert_eq!(f.read(0, 0x1b0), 1);
    assert_eq!(f.apic(0).acknowledge(), Some(0x60));
    assert_eq!(f.apic(0).mmio_write(0xb0, &[0; 4]), Effect::Eoi(0x60));
    f.fixed(0x60, false);
    assert_eq!(f.apic(0).acknowledge(), Some(0x60));
    assert_eq!(f.apic(0).mmio_write(0xb0, &[0; 4]), Effect::None);
    assert_eq!(f.apic(0).mmio_write(0xb0, &[0; 4]), Effect::None, "nothing in service");
}

#[test]
fn a_disabled_apic_takes_nothing_but_signals() {
    let f = Fixture::new(1);
    f.write(0, 0xf0, 0xff);
    f.fixed(0x60, false);
    assert!(!f.apic(0).pending());
    f.write(0, 0x320, 0x30);
    assert_eq!(f.read(0, 0x320), 0x1_0030, "entries stay masked");
    f.write(0, 0x300, 0x4_0400);
    assert!(f.signals[0].take().contains(&"nmi".to_owned()));
}

#[test]
fn one_shot_counts_down_once() {
    let f = Fixture::new(1);
    f.write(0, 0x3e0, 0b1011);
    f.write(0, 0x320, 0x40);
    f.write(0, 0x380, 1000);
    assert_eq!(f.alarms[0].0.load(Ordering::SeqCst), 1000);
    f.clock.pass(400);
    assert_eq!(f.read(0, 0x390), 600);
    f.apic(0).timer_expired();
    assert!(!f.apic(0).pending(), "an early alarm is none");
    f.clock.pass(600);
    f.apic(0).timer_expired();
    assert_eq!(f.read(0, 0x390), 0);
    assert_eq!(f.apic(0).acknowledge(), Some(0x40));
    f.write(0, 0xb0, 0);
    f.clock.pass(5000);
    f.apic(0).timer_expired();
    assert!(!f.apic(0).pending());
}

#[test]
fn dividers_are_those_of_the_manual() {
    for (bits, divide) in [(0, 2), (1, 4), (2, 8), (3, 16), (8, 32), (9, 64), (10, 128), (11, 1)] {
        let f = Fixture::new(1);
        f.write(0, 0x3e0, bits);
        f.write(0, 0x380, 1000);
        assert_eq!(f.alarms[0].0.load(Ordering::SeqCst), 1000 * divide, "{bits:#b}");
    }
}

#[test]
fn periods_do_not_drift_and_missed_ones_are_skipped() {
    let f = Fixture::new(1);
    f.write(0, 0x3e0, 0b1011);
    f.write(0, 0x320, 0x2_0040);
    f.write(0, 0x380, 1_000_000);
    f.clock.pass(1_000_300);
    f.apic(0).timer_expired();
    assert_eq!(f.who_got(0x40), [0]);
    assert_eq!(f.alarms[0].0.load(Ordering::SeqCst), 999_700);
    f.clock.pass(5_000_000);
    f.apic(0).timer_expired();
    assert_eq!(f.who_got(0x40), [0]);
    assert_eq!(f.alarms[0].0.load(Ordering::SeqCst), 999_700);
    f.apic(0).timer_expired();
    assert!(!f.apic(0).pending());
    f.write(0, 0x380, 0);
    assert_eq!(f.alarms[0].0.load(Ordering::SeqCst), 0);
}

#[test]
fn deadlines_follow_the_guests_counter() {
    let f = Fixture::new(1);
    f.clock.pass(1000);
    f.apic(0).set_tsc_deadline(5000, 0);
    assert_eq!(f.apic(0).tsc_deadline(), 0, "not in deadline mode");
    f.write(0, 0x320, 0x4_0040);
    // The guest's counter reads 2000 + 3000 now; the deadline is 1000 ticks (500 ns) ahead.
    f.apic(0).set_tsc_deadline(6000, 3000);
    assert_eq!(f.alarms[0].0.load(Ordering::SeqCst), 501);
    assert_eq!(f.apic(0).tsc_deadline(), 6000);
    f.clock.pass(501);
    f.apic(0).timer_expired();
    assert_eq!(f.apic(0).tsc_deadline(), 0);
    assert_eq!(f.who_got(0x40), [0]);
    f.apic(0).set_tsc_deadline(1, 0);
    assert_eq!(f.who_got(0x40), [0], "a deadline in the past expires at once");
    f.apic(0).set_tsc_deadline(u64::MAX, 0);
    f.write(0, 0x320, 0x40);
    assert_eq!(f.apic(0).tsc_deadline(), 0, "a change of mode stops it");
}

#[test]
fn shorthands_reach_whom_they_say() {
    let f = Fixture::new(3);
    for (bits, want) in [(1, vec![1]), (2, vec![0, 1, 2]), (3, vec![0, 2])] {
        f.write(1, 0x300, 0x55 | bits << 18);
        assert_eq!(f.who_got(0x55), want);
    }
}

#[test]
fn physical_and_logical_destinations() {
    let f = Fixture::new(4);
    f.write(0, 0x310, 2 << 24);
    f.write(0, 0x300, 0x61);
    assert_eq!(f.who_got(0x61), [2]);
    f.write(0, 0x310, 0xff << 24);
    f.write(0, 0x300, 0x61);
    assert_eq!(f.who_got(0x61), [0, 1, 2, 3]);
    // Flat model.
    for index in 0..4 {
        f.write(index, 0xd0, 1 << (24 + index));
    }
    f.write(0, 0x310, 0b1010 << 24);
    f.write(0, 0x300, 0x861);
    assert_eq!(f.who_got(0x61), [1, 3]);
    // Cluster model: two clusters of two.
    for index in 0..4 {
        f.write(index, 0xe0, 0x0fff_ffff);
        f.write(index, 0xd0, ((index as u32 / 2) << 4 | 1 << (index % 2)) << 24);
    }
    f.write(0, 0x310, 0x13 << 24);
    f.write(0, 0x300, 0x861);
    assert_eq!(f.who_got(0x61), [2, 3]);
}

#[test]
fn lowest_priority_goes_to_one_that_is_least_busy() {
    let f = Fixture::new(3);
    f.write(0, 0x80, 0x20);
    f.write(2, 0x80, 0x20);
    for _ in 0..4 {
        f.write(0, 0x310, 0xff << 24);
        f.write(0, 0x300, 0x171);
        assert_eq!(f.who_got(0x71), [1]);
    }
    f.write(0, 0x80, 0);
    f.write(2, 0x80, 0);
    let mut seen = [false; 3];
    for _ in 0..3 {
        f.write(0, 0x300, 0x171);
        let got = f.who_got(0x71);
        assert_eq!(got.len(), 1);
        seen[got[0] as usize] = true;
    }
    assert_eq!(seen, [true; 3], "equals take turns");
}

#[test]
fn init_and_startup_reach_the_vcpu() {
    let f = Fixture::new(2);
    f.write(0, 0x310, 1 << 24);
    f.write(0, 0x300, 0xc500);
    f.write(0, 0x300, 0x8500);
    f.write(0, 0x300, 0x0699);
    assert_eq!(f.signals[1].take(), ["init", "startup 0x99"]);
    assert!(f.signals[0].take().is_empty());
}

#[test]
fn illegal_vectors_are_errors() {
    let f = Fixture::new(1);
    f.write(0, 0x370, 0xfe);
    f.write(0, 0x300, 0x4_0005);
    assert_eq!(f.read(0, 0x280), 0, "shown only after a write");
    f.write(0, 0x280, 0);
    assert_eq!(f.read(0, 0x280), 1 << 5);
    assert_eq!(f.apic(0).acknowledge(), Some(0xfe));
    f.fixed(0x0f, false);
    f.write(0, 0x280, 0);
    assert_eq!(f.read(0, 0x280), 1 << 6);
}

#[test]
fn x2apic_by_msrs() {
    let f = Fixture::new(4);
    assert_eq!(f.apic(0).read_msr(0x802), None, "not in xAPIC mode");
    f.switch_to_x2();
    assert_eq!(f.apic(3).read_msr(0x802), Some(3));
    assert_eq!(f.apic(3).read_msr(0x80d), Some(1 << 3));
    assert_eq!(f.apic(0).mmio_offset(0xfee0_0020), None);
    assert_eq!(f.apic(0).write_msr(0x80e, 0), None, "no DFR");
    assert_eq!(f.apic(0).write_msr(0x80b, 1), None, "EOI takes only zero");
    assert_eq!(f.apic(0).read_msr(0x831), None, "ICR is one register");
    assert_eq!(f.apic(0).write_msr(0x808, 1 << 32), None);
    let Some(Effect::Send(icr)) = f.apic(0).write_msr(0x830, 2 << 32 | 0x81) else { panic!() };
    f.bus.send(0, icr);
    assert_eq!(f.who_got(0x81), [2]);
    assert_eq!(f.apic(0).read_msr(0x830), Some(2 << 32 | 0x81));
    let Some(Effect::Send(icr)) = f.apic(0).write_msr(0x830, 0b1001 << 32 | 0x881) else {
        panic!()
    };
    f.bus.send(0, icr);
    assert_eq!(f.who_got(0x81), [0, 3]);
    let Some(Effect::Send(icr)) = f.apic(1).write_msr(0x83f, 0x82) else { panic!() };
    f.bus.send(1, icr);
    assert_eq!(f.who_got(0x82), [1]);
}

#[test]
fn modes_change_only_along_the_allowed_ways() {
    let f = Fixture::new(1);
    let apic = f.apic(0);
    let xapic = apic.base();
    assert_eq!(xapic, 0xfee0_0900);
    assert!(apic.set_base(0xfee0_0500).is_none(), "extended without enabled");
    apic.set_base(0xfee0_0d00).unwrap();
    assert!(apic.set_base(xapic).is_none(), "x2APIC goes only to off");
    apic.set_base(0xfee0_0100).unwrap();
    assert!(apic.set_base(0xfee0_0d00).is_none(), "off goes only to xAPIC");
    apic.set_base(xapic).unwrap();
    assert!(apic.set_base(1 << 60).is_none());
    assert!(apic.set_base(1).is_none());
    assert_eq!(apic.mmio_offset(0xfee0_0020), Some(0x20));
}

#[test]
fn messages_carry_their_destination_in_the_address() {
    let f = Fixture::new(3);
    assert!(f.bus.deliver_msi(0xfee0_0000 | 2 << 12, 0x91));
    assert_eq!(f.who_got(0x91), [2]);
    assert!(!f.bus.deliver_msi(0xfee0_0000 | 9 << 12, 0x91));
    f.switch_to_x2();
    assert!(f.bus.deliver_msi(0xfee0_0004 | 0b110 << 12, 0x91));
    assert_eq!(f.who_got(0x91), [1, 2]);
}

#[test]
fn the_8259_pair_reaches_the_boot_processor_until_it_is_masked() {
    let f = Fixture::new(2);
    assert!(!f.apic(1).accepts_external());
    f.write(0, 0x350, 0x700);
    assert!(f.apic(0).accepts_external());
    f.write(0, 0x350, 0x1_0700);
    assert!(!f.apic(0).accepts_external());
    f.apic(0).reset();
    assert!(f.apic(0).accepts_external());
}
