//! Random bytes as the guest gets them.

use crate::virtio::rng::device::Rng;
use crate::virtio::testing::{Guest, Part};

#[test]
fn fills_buffers() {
    let mut guest = Guest::new(Rng::new());
    guest.start(0, 0);
    let mut seen = Vec::new();
    for len in [1, 64, 4096] {
        let (used, data) = guest.request(0, &[Part::In(len), Part::In(8)], len == 64);
        assert_eq!(used, len + 8);
        seen.push(data[data.len() - 8..].to_vec());
    }
    seen.dedup();
    assert_eq!(seen.len(), 3);
    assert!(seen.iter().all(|bytes| bytes != &[0xcc; 8]));
}

#[test]
fn large_requests_are_cut_and_unwritable_ones_get_nothing() {
    let mut guest = Guest::new(Rng::new());
    guest.start(0, 0);
    let (used, data) = guest.request(0, &[Part::In(100_000)], false);
    assert_eq!(used, 65_536);
    assert_eq!(data[65_536..], [0xcc; 34_464]);
    assert_eq!(guest.request(0, &[Part::Out(&[1, 2, 3])], false).0, 0);
    assert_eq!(guest.status(), 0xf);
}
