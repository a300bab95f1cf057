//! The agent's protocol from both sides: frames and messages of any bytes, in pieces, and a client
//! whose agent says anything.
#![no_main]

use berth_api::agent::client::Client;
use berth_api::agent::frame::Decoder;
use berth_api::agent::message::{Exec, ToAgent, ToHost};

/// Events of one session that are looked at.
const EVENTS_MAX: usize = 64;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let mut decoder = Decoder::default();
    'pieces: for piece in data.chunks(7) {
        decoder.push(piece);
        loop {
            let frame = match decoder.next_frame() {
                Ok(Some(frame)) => frame,
                Ok(None) => break,
                Err(_) => break 'pieces,
            };
            // What is understood says the same when it is sent again.
            if let Ok(message) = ToAgent::from_frame(frame.clone()) {
                let again = ToAgent::from_frame(message.to_frame().expect("it fitted before"));
                assert_eq!(format!("{:?}", again.expect("it was understood before")), format!("{message:?}"));
            }
            if let Ok(message) = ToHost::from_frame(frame) {
                let again = ToHost::from_frame(message.to_frame().expect("it fitted before"));
                assert_eq!(format!("{:?}", again.expect("it was understood before")), format!("{message:?}"));
            }
        }
    }
    let Ok(client) = Client::connect(data, std::io::sink(), "fuzz") else { return };
    let Ok(mut session) = client.exec(&Exec::default()) else { return };
    for _ in 0..EVENTS_MAX {
        if session.next_event().is_err() {
            return;
        }
    }
});
