//! Bytes moved between two connections.

use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy, split};

/// Moves bytes both ways until both directions have ended. One that fails ends like one whose sender
/// has finished; the other goes on: what an end said before it went away is not lost because something
/// could not be said to it any more.
pub async fn both<A, B>(near: A, far: B)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let ((mut from_near, mut to_near), (mut from_far, mut to_far)) = (split(near), split(far));
    // How it ends is for the two ends to notice.
    let there = async {
        let _ = copy(&mut from_near, &mut to_far).await;
        let _ = to_far.shutdown().await;
    };
    let back = async {
        let _ = copy(&mut from_far, &mut to_near).await;
        let _ = to_near.shutdown().await;
    };
    tokio::join!(there, back);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::thread;

    fn pair() -> (UnixStream, tokio::net::UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        (ours, tokio::net::UnixStream::from_std(theirs).unwrap())
    }

    #[tokio::test]
    async fn last_words_arrive() {
        for round in 0..100 {
            let ((mut client, near), (mut server, far)) = (pair(), pair());
            let relay = tokio::spawn(super::both(near, far));
            let server = thread::spawn(move || {
                server.read_exact(&mut [0; 1]).unwrap();
                server.write_all(&[7; 100_000]).unwrap();
                // It goes without having read all that it was sent.
            });
            let client = thread::spawn(move || {
                client.write_all(b"x").unwrap();
                let mut sender = client.try_clone().unwrap();
                let more = thread::spawn(move || while sender.write_all(b"more").is_ok() {});
                let mut all = Vec::new();
                let _ = client.read_to_end(&mut all);
                drop(client.shutdown(std::net::Shutdown::Both));
                more.join().unwrap();
                all.len()
            });
            relay.await.unwrap();
            server.join().unwrap();
            assert_eq!(client.join().unwrap(), 100_000, "round {round}");
        }
    }
}
