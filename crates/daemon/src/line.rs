//! Lines on the sockets between daemon and processes of machines. What comes behind one is not read: it
//! may be somebody else's, or come with open files.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use berth_api::vmm::LINE_MAX;
use rustix::io::retry_on_intr;
use rustix::net::{RecvFlags, recv};
use tokio::io::Interest;

/// Bytes that are looked at together.
const AHEAD: usize = 4096;

/// Takes what there is of a line; whether that was its end.
fn take(socket: impl AsFd, line: &mut Vec<u8>) -> io::Result<bool> {
    let mut bytes = [0; AHEAD];
    let (_, seen) = retry_on_intr(|| recv(&socket, &mut bytes, RecvFlags::PEEK))?;
    if seen == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let end = bytes.iter().take(seen).position(|&byte| byte == b'\n');
    let part = bytes.get_mut(..end.map_or(seen, |end| end + 1)).unwrap_or_default();
    let (_, taken) = retry_on_intr(|| recv(&socket, &mut *part, RecvFlags::empty()))?;
    line.extend(part.iter().take(taken));
    if line.len() as u64 > LINE_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the line is too long"));
    }
    Ok(line.pop_if(|last| *last == b'\n').is_some())
}

/// Reads a line, without its end.
///
/// # Errors
/// There is none, it is longer than [`LINE_MAX`], or does not come in time.
pub fn read(stream: &UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    while !take(stream, &mut line)? {}
    Ok(line)
}

/// The same without waiting for it on this thread.
///
/// # Errors
/// As [`read`].
pub async fn read_soon(stream: &tokio::net::UnixStream) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    // Nobody waits within.
    let mut part = || take(stream, &mut line);
    while !stream.async_io(Interest::READABLE, &mut part).await? {}
    Ok(line)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn what_is_behind_a_line_is_left() {
        let (mut near, mut far) = UnixStream::pair().unwrap();
        let long = "x".repeat(3 * AHEAD);
        near.write_all(format!("one\n\n{long}\nrest").as_bytes()).unwrap();
        assert_eq!(read(&far).unwrap(), b"one");
        assert_eq!(read(&far).unwrap(), b"");
        assert_eq!(read(&far).unwrap(), long.as_bytes());
        let mut rest = [0; 4];
        far.read_exact(&mut rest).unwrap();
        assert_eq!(&rest, b"rest");
        near.write_all(b"no end").unwrap();
        drop(near);
        assert_eq!(read(&far).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn endless_lines_are_refused() {
        let (mut near, far) = UnixStream::pair().unwrap();
        let writer = std::thread::spawn(move || {
            let _ = near.write_all(&vec![b'x'; LINE_MAX as usize + 1]);
            near
        });
        assert!(read(&far).unwrap_err().to_string().contains("too long"));
        drop(far);
        writer.join().unwrap();
    }

    #[tokio::test]
    async fn a_line_in_parts_is_waited_for() {
        let (mut near, far) = UnixStream::pair().unwrap();
        far.set_nonblocking(true).unwrap();
        let far = tokio::net::UnixStream::from_std(far).unwrap();
        let writer = std::thread::spawn(move || {
            for part in ["a ", "line", "\nand"] {
                near.write_all(part.as_bytes()).unwrap();
                std::thread::sleep(std::time::Duration::from_millis(5));
            }
            near
        });
        assert_eq!(read_soon(&far).await.unwrap(), b"a line");
        writer.join().unwrap();
    }
}
