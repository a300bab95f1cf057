//! Memory that a guest gives and takes.

use std::os::unix::fs::MetadataExt;

use vm_memory::{Bytes, GuestAddress};

use crate::virtio::balloon::device::{Balloon, F_DEFLATE_ON_OOM, F_REPORTING};
use crate::virtio::testing::{Guest, Part};

const PLACE: u64 = 0x100_0000;

fn numbers(gpas: &[u64]) -> Vec<u8> {
    gpas.iter().flat_map(|gpa| ((gpa / 4096) as u32).to_le_bytes()).collect()
}

fn filled(guest: &Guest, pages: u64) {
    guest.memory.write_slice(&vec![7; pages as usize * 4096], GuestAddress(PLACE)).unwrap();
}

fn byte(guest: &Guest, page: u64) -> u8 {
    guest.memory.read_obj(GuestAddress(PLACE + page * 4096 + 5)).unwrap()
}

#[test]
fn pages_in_it_are_the_hosts_and_come_back_empty() {
    let mut guest = Guest::new(Balloon::new());
    guest.start(F_DEFLATE_ON_OOM, 0);
    filled(&guest, 600);
    let before = guest.ram.file().metadata().unwrap().blocks();
    // In any order, twice, and some that are no memory.
    let mut pages: Vec<u64> = (100..500).rev().map(|page| PLACE + page * 4096).collect();
    pages.extend([PLACE + 100 * 4096, 1 << 40, u64::from(u32::MAX) * 4096]);
    guest.request(0, &[Part::Out(&numbers(&pages))], false);
    let freed = (before - guest.ram.file().metadata().unwrap().blocks()) * 512;
    assert!(freed >= 390 * 4096, "{freed}");
    assert_eq!([99, 100, 300, 499, 500].map(|page| byte(&guest, page)), [7, 0, 0, 0, 7]);
    guest.request(1, &[Part::Out(&numbers(&pages))], true);
    guest.memory.write_slice(&[9; 4096], GuestAddress(PLACE + 200 * 4096)).unwrap();
    assert_eq!([199, 200, 201].map(|page| byte(&guest, page)), [0, 9, 0]);
    // Half a number at the end, nothing at all, and what the device cannot read.
    guest.request(0, &[Part::Out(&[1, 2])], false);
    guest.request(0, &[Part::In(64)], false);
    assert_eq!(guest.status(), 0xf);
}

#[test]
fn what_is_free_is_given_back_in_whole_pages() {
    let mut guest = Guest::new(Balloon::new());
    guest.start(F_REPORTING, 0);
    filled(&guest, 8);
    let end = guest.ram.bytes() - 4096;
    guest.memory.write_slice(&[7; 4096], GuestAddress(end)).unwrap();
    let memory = &guest.memory;
    assert_eq!(memory.discard(PLACE + 1, 3 * 4096 - 1).unwrap(), 2 * 4096);
    assert_eq!([0, 1, 2, 3].map(|page| byte(&guest, page)), [7, 0, 0, 7]);
    assert_eq!(memory.discard(end, u64::MAX).unwrap(), 4096);
    // Through the queue: the buffers themselves, which are within a page or more.
    guest.request(2, &[Part::In(3 * 4096), Part::In(10)], true);
    assert_eq!(guest.status(), 0xf);
    // Without the feature nothing is.
    guest.start(0, F_REPORTING);
    let (_, data) = guest.request(2, &[Part::In(3 * 4096)], false);
    assert!(data.iter().all(|&byte| byte == 0xcc));
}

#[test]
fn what_it_holds_goes_with_the_machine() {
    let balloon = Balloon::new();
    let switch = balloon.switch();
    let mut guest = Guest::new(balloon);
    assert!(!switch.is_used());
    guest.start(F_DEFLATE_ON_OOM, 0);
    guest.sink.wait_until("the driver", || switch.is_used());
    switch.want(64 << 20);
    assert_eq!(guest.device_config(0, 4), 16_384);
    // The driver says how far it is, and may say nothing else.
    guest.bar_write(0x2004, 4, 100);
    guest.bar_write(0x2000, 4, 1);
    guest.bar_write(0x2006, 8, 0);
    assert_eq!((switch.wanted(), switch.given()), (64 << 20, 400 << 10));
    let other = Balloon::new();
    let switch = other.switch();
    let mut guest = guest.moved(|| other);
    guest.sink.wait_until("the driver", || switch.is_used());
    assert_eq!((switch.wanted(), switch.given()), (64 << 20, 400 << 10));
    guest.request(0, &[Part::Out(&numbers(&[PLACE]))], false);
    guest.reset();
    assert_eq!((switch.is_used(), switch.given()), (false, 0));
}
