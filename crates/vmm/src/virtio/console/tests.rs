//! The console as the guest uses it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use crate::virtio::console::device::{Console, F_SIZE};
use crate::virtio::testing::{Guest, Part};

#[test]
fn carries_bytes_both_ways() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut guest = Guest::new(Console::new(far).unwrap());
    guest.start(F_SIZE, 0);
    near.write_all(b"early").unwrap();
    assert_eq!(guest.request(0, &[Part::In(64)], false).1[..5], *b"early");
    guest.add(0, &[Part::In(3)], false);
    guest.add(0, &[Part::In(64)], false);
    guest.kick(0);
    near.write_all(b"abcdef").unwrap();
    assert_eq!(guest.used(0).2, b"abc");
    let (_, len, data) = guest.used(0);
    assert_eq!(data[..len as usize], *b"def");
    guest.request(1, &[Part::Out(b"prom"), Part::Out(b"pt$ ")], false);
    let mut data = [0; 8];
    near.read_exact(&mut data).unwrap();
    assert_eq!(&data, b"prompt$ ");
}

#[test]
fn a_slow_reader_holds_the_guest_back_and_loses_nothing() {
    let (mut near, far) = UnixStream::pair().unwrap();
    let mut guest = Guest::new(Console::new(far).unwrap());
    guest.start(F_SIZE, 0);
    let blocks: Vec<Vec<u8>> = (0..60u8).map(|i| vec![i; 32_768]).collect();
    for block in &blocks {
        guest.add(1, &[Part::Out(block)], false);
    }
    guest.kick(1);
    let mut got = vec![0; 60 * 32_768];
    near.read_exact(&mut got).unwrap();
    assert_eq!(got, blocks.concat());
    for _ in 0..60 {
        guest.used(1);
    }
    // Nobody reads any more: output is dropped, the guest goes on.
    drop(near);
    for block in &blocks {
        guest.request(1, &[Part::Out(block)], false);
    }
}

#[test]
fn tells_the_terminal_size() {
    let (_near, far) = UnixStream::pair().unwrap();
    let console = Console::new(far).unwrap();
    let size = console.size();
    let mut guest = Guest::new(console);
    guest.start(F_SIZE, 0);
    assert_eq!((guest.device_config(0, 2), guest.device_config(2, 2)), (80, 25));
    let generation = guest.bar_read(21, 1);
    size.set(132, 43);
    assert_eq!((guest.device_config(0, 2), guest.device_config(2, 2)), (132, 43));
    assert_ne!(guest.bar_read(21, 1), generation);
    // The configuration's vector comes after those of the two queues.
    assert!(guest.sink.messages().contains(&(0xfee0_0000, 0x42)));
}
