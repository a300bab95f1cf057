//! Any packets from the guest against the multiplexer.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use crate::virtio::device::Poller;
use crate::virtio::vsock::host::{Call, Shared};
use crate::virtio::vsock::muxer::Muxer;
use crate::virtio::vsock::packet::{HEADER_SIZE, HOST_CID, Header};

const GUEST_CID: u64 = 3;
const LISTENING: u32 = 1;
const OUTPUTS_PER_PACKET: usize = 8;

/// Feeds packets of 16 bytes each (operation, flags, ports, credit, length) and what the host does
/// in between. Returns how many packets went to the guest, so that a test can tell that the input
/// led somewhere.
pub fn packets(data: &[u8]) -> usize {
    let (Ok(shared), Ok(poller)) = (Shared::new(), Poller::new()) else { return 0 };
    let mut sent = 0;
    let (sender, streams) = std::sync::mpsc::channel();
    shared.register(LISTENING, sender);
    let mut muxer = Muxer::new(GUEST_CID, None, std::sync::Arc::clone(&shared));
    let mut accepted: Vec<UnixStream> = Vec::new();
    let mut buffer = vec![0; 4096];
    for action in data.chunks_exact(16) {
        let &[op, flags, host, guest, a0, a1, a2, a3, f0, f1, f2, f3, l0, l1, what, kind] = action
        else {
            continue;
        };
        let mut header = Header {
            src_cid: GUEST_CID,
            dst_cid: HOST_CID,
            src_port: u32::from(guest & 3),
            // Ports of the listener and of the host's own connections.
            dst_port: if host & 0x80 == 0 {
                u32::from(host & 3)
            } else {
                1 << 30 | u32::from(host & 7)
            },
            len: u32::from(u16::from_le_bytes([l0, l1])),
            kind: if kind == 0xff { 9 } else { 1 },
            op: u16::from(op % 10),
            flags: u32::from(flags),
            buf_alloc: u32::from_le_bytes([a0, a1, a2, a3]),
            fwd_cnt: u32::from_le_bytes([f0, f1, f2, f3]),
        };
        assert_eq!(Header::parse(&header.encode()), header);
        if let (true, Ok(raw)) = (what == 0xfe, data.get(..HEADER_SIZE).unwrap_or(&[]).try_into()) {
            header = Header::parse(raw);
        }
        let payload = vec![what; header.len.min(0xffff) as usize];
        muxer.receive(&poller, &header, &payload);
        accepted.extend(streams.try_iter());
        host_action(&mut muxer, &shared, &poller, &mut accepted, what);
        for _ in 0..OUTPUTS_PER_PACKET {
            let Some(header) = muxer.output(&poller, &mut buffer) else { break };
            sent += 1;
            assert!(header.len as usize <= buffer.len());
            assert_eq!((header.src_cid, header.dst_cid), (HOST_CID, GUEST_CID));
        }
    }
    sent
}

fn host_action(
    muxer: &mut Muxer,
    shared: &Shared,
    poller: &Poller,
    accepted: &mut Vec<UnixStream>,
    what: u8,
) {
    match what & 7 {
        0 => {
            let Ok((near, far)) = UnixStream::pair() else { return };
            let ready = [&near, &far].into_iter().all(|end| end.set_nonblocking(true).is_ok());
            let (answer, _) = std::sync::mpsc::sync_channel(1);
            let deadline = Instant::now() + Duration::from_secs(60);
            if ready {
                shared.push_call(Call {
                    port: u32::from(what >> 3 & 3),
                    stream: far,
                    answer,
                    deadline,
                });
                muxer.take_calls(poller);
                accepted.push(near);
            }
        }
        1 => drop(accepted.pop()),
        2 => {
            for stream in accepted.iter_mut() {
                let _ = stream.set_nonblocking(true);
                let _ = stream.write(&[what; 3000]);
            }
        }
        3 => {
            for stream in accepted.iter_mut() {
                let _ = stream.set_nonblocking(true);
                let _ = stream.read(&mut [0; 3000]);
            }
        }
        4 | 5 => {
            // Events as the poller could report them, true or not.
            let events = [EventSet::IN, EventSet::OUT, EventSet::HANG_UP, EventSet::IN];
            for (id, events) in (1..5).zip(events) {
                muxer.socket_event(poller, 1 << 31 | id, events);
            }
        }
        _ => {}
    }
}
