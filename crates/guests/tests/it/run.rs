//! Starts a program, collects what it prints, and ends it when it takes too long.

use std::io::Read;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

/// What became of the program.
pub enum Outcome {
    /// It ended by itself.
    Ended { status: Option<i32>, stdout: String, stderr: String },
    /// It did not end in time.
    Hung { stdout: String },
    /// It could not be started.
    NotStarted(std::io::Error),
}

/// Runs `command` for at most `limit`.
pub fn run(mut command: Command, limit: Duration) -> Outcome {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => return Outcome::NotStarted(error),
    };
    let stdout = collect(child.stdout.take().expect("piped"));
    let stderr = collect(child.stderr.take().expect("piped"));
    let deadline = Instant::now() + limit;
    let status = loop {
        match child.try_wait().expect("the child is ours") {
            Some(status) => break Some(status),
            None if Instant::now() >= deadline => break None,
            None => thread::sleep(Duration::from_millis(5)),
        }
    };
    if status.is_none() {
        child.kill().expect("the child is ours");
        child.wait().expect("the child is ours");
    }
    let stdout = stdout.join().expect("reader does not panic");
    let stderr = stderr.join().expect("reader does not panic");
    match status {
        Some(status) => Outcome::Ended { status: status.code(), stdout, stderr },
        None => Outcome::Hung { stdout },
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error still tells how far the guest came.
        let _ = pipe.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    })
}
