//! The power button, where no init of the image's own looks after it: whoever presses it wants the
//! guest off. The kernel's drivers `button` and `evdev` make key events of it.

use std::fs::{self, File};
use std::io::{self, Read};
use std::sync::Arc;

use crate::boot::say;
use crate::power::Power;

const INPUTS: &str = "/dev/input";
/// Bytes of an `input_event`: the time, 16 bytes; kind and code, 2 each; the value, 4.
const EVENT_BYTES: usize = 24;
const KIND_KEY: u16 = 1;
const KEY_POWER: u16 = 116;
const PRESSED: u32 = 1;

/// Watches every input device that is there, each in a thread of its own.
pub fn watch(power: &Arc<Power>) {
    // No driver, no button.
    for entry in fs::read_dir(INPUTS).into_iter().flatten().flatten() {
        let (power, path) = (Arc::clone(power), entry.path());
        // Folders of names for the same devices may be there too.
        if path.is_dir() {
            continue;
        }
        let watched = File::open(&path).and_then(|mut device| {
            std::thread::Builder::new().spawn(move || {
                // A device that goes away is no button any more.
                if wait(&mut device).is_ok() {
                    say("the power button was pressed");
                    power.off();
                }
            })
        });
        if let Err(error) = watched {
            say(&format!("{} is not watched: {error}", path.display()));
        }
    }
}

/// Returns when the power key is pressed.
fn wait(device: &mut impl Read) -> io::Result<()> {
    let mut event = [0; EVENT_BYTES];
    loop {
        device.read_exact(&mut event)?;
        if is_power(&event) {
            return Ok(());
        }
    }
}

fn is_power(event: &[u8; EVENT_BYTES]) -> bool {
    let [.., k0, k1, c0, c1, v0, v1, v2, v3] = *event;
    u16::from_ne_bytes([k0, k1]) == KIND_KEY
        && u16::from_ne_bytes([c0, c1]) == KEY_POWER
        && u32::from_ne_bytes([v0, v1, v2, v3]) == PRESSED
}

#[cfg(test)]
mod tests {
    use super::wait;

    fn event(kind: u16, code: u16, value: u32) -> Vec<u8> {
        let mut bytes = vec![7; 16];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(code.to_ne_bytes());
        bytes.extend(value.to_ne_bytes());
        bytes
    }

    #[test]
    fn only_the_power_key_counts_and_only_when_pressed() {
        let others = [event(1, 30, 1), event(0, 0, 0), event(1, 116, 0), event(4, 116, 1)].concat();
        assert!(wait(&mut others.as_slice()).is_err());
        let mut stream = [others, event(1, 116, 1), event(1, 30, 1)].concat();
        let len = stream.len();
        let mut rest = stream.as_slice();
        wait(&mut rest).unwrap();
        assert_eq!(len - rest.len(), 5 * 24);
        stream.truncate(4 * 24 + 23);
        assert!(wait(&mut stream.as_slice()).is_err());
    }
}
