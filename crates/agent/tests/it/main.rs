//! The agent as the host meets it: the real program on a unix socket, spoken to with the client of
//! `berth-api`.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use berth_api::agent::client::{Client, ClientError, Event, Session};
use berth_api::agent::frame::Frame;
use berth_api::agent::limits::{FRAME_PAYLOAD_BYTES_MAX, STDIN_WINDOW_BYTES};
use berth_api::agent::message::{
    Exec, Exit, Identify, Reason, Shutdown, TerminalSize, ToAgent, ToHost,
};

struct Agent {
    process: Child,
    directory: PathBuf,
}

impl Agent {
    fn start(name: &str) -> Self {
        let directory =
            std::env::temp_dir().join(format!("berth-agent-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        // What the agent inherits does not reach programs: with SIGINT ignored no shell could trap it.
        let process = Command::new("sh")
            .args(["-c", "trap '' INT; exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_berth-agent")])
            .arg("--serve-unix")
            .arg(directory.join("socket"))
            .spawn()
            .unwrap();
        Self { process, directory }
    }

    fn stream(&self) -> UnixStream {
        let began = Instant::now();
        loop {
            match UnixStream::connect(self.directory.join("socket")) {
                Ok(stream) => {
                    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
                    return stream;
                }
                Err(error) => assert!(began.elapsed() < Duration::from_secs(10), "{error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn client(&self) -> Client<UnixStream, UnixStream> {
        let stream = self.stream();
        Client::connect(stream.try_clone().unwrap(), stream, "test").unwrap()
    }

    fn exec(&self, exec: &Exec) -> Session<UnixStream, UnixStream> {
        self.client().exec(exec).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
        std::fs::remove_dir_all(&self.directory).unwrap();
    }
}

/// As whom the tests run: the agent without root cannot become root.
fn me() -> Option<String> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("Uid:")).unwrap();
    line.split_whitespace().next().map(str::to_owned)
}

fn sh(script: &str) -> Exec {
    let argv = ["sh", "-c", script].map(str::to_owned).to_vec();
    Exec { argv, user: me(), ..Exec::default() }
}

fn collect(session: &mut Session<UnixStream, UnixStream>) -> (Vec<u8>, Vec<u8>, Exit) {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    loop {
        match session.next_event().unwrap() {
            Event::Stdout(bytes) => out.extend(bytes),
            Event::Stderr(bytes) => err.extend(bytes),
            Event::Exit(exit) => return (out, err, exit),
        }
    }
}

#[test]
fn requests_are_answered() {
    let agent = Agent::start("requests");
    let mut client = agent.client();
    assert!(client.agent().software.starts_with("berth-agent"));
    client.ping().unwrap();
    let before = client.clocks().unwrap();
    let after = client.clocks().unwrap();
    assert!(after.uptime_ns > before.uptime_ns && after.realtime_ns >= before.realtime_ns);
    let refused = client.shutdown(Shutdown::PowerOff).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(_)), "{refused}");
    // Nor does it make this host another machine.
    let identity = Identify {
        hostname: "another".into(),
        machine_id: "0".repeat(32),
        mac: [2, 0, 0, 0, 0, 1],
        leave_address: true,
    };
    let refused = client.identify(&identity).unwrap_err();
    assert!(matches!(refused, ClientError::Refused(_)), "{refused}");
    client.ping().unwrap();
}

#[test]
fn output_status_environment_and_directory() {
    let agent = Agent::start("exec");
    let exec = Exec {
        env: vec![("GREETING".into(), "hello there".into())],
        cwd: Some("/".into()),
        ..sh("echo $GREETING from $PWD; echo oops >&2; exit 7")
    };
    let mut session = agent.exec(&exec);
    // The command may have ended by now.
    let _ = session.input().stdin_eof();
    let (out, err, exit) = collect(&mut session);
    assert_eq!(String::from_utf8(out).unwrap(), "hello there from /\n");
    assert_eq!(String::from_utf8(err).unwrap(), "oops\n");
    assert_eq!(exit, Exit::Status(7));
}

#[test]
fn what_cannot_be_started_is_refused_with_a_reason() {
    let agent = Agent::start("refuse");
    let cases = [
        (Exec { argv: vec!["/no/such/program".into()], ..sh("") }, Reason::NotFound),
        (Exec { argv: vec!["/etc/passwd".into()], ..sh("") }, Reason::NotExecutable),
        (Exec { argv: vec![], ..sh("") }, Reason::Protocol),
        (Exec { user: Some("nobody-of-that-name".into()), ..sh("") }, Reason::NotFound),
        (Exec { cwd: Some("/no/such/directory".into()), ..sh("") }, Reason::NotFound),
        (Exec { env: vec![("A=B".into(), String::new())], ..sh("") }, Reason::Protocol),
    ];
    for (exec, reason) in cases {
        match agent.client().exec(&exec).map(|_| ()) {
            Err(ClientError::Refused(refusal)) => assert_eq!(refusal.reason, reason, "{exec:?}"),
            other => panic!("{exec:?}: {other:?}"),
        }
    }
}

#[test]
fn megabytes_go_through_both_ways() {
    let agent = Agent::start("bulk");
    let mut session = agent.exec(&sh("cat"));
    let input = session.input();
    let sent: Vec<u8> = (0..8_000_000u32).map(|i| (i ^ (i >> 9)) as u8).collect();
    let copy = sent.clone();
    let feeder = std::thread::spawn(move || {
        assert!(input.stdin(&copy).unwrap());
        input.stdin_eof().unwrap();
    });
    let (out, _, exit) = collect(&mut session);
    feeder.join().unwrap();
    assert!(out == sent, "{} of {} bytes came back right", out.len(), sent.len());
    assert_eq!(exit, Exit::Status(0));
}

#[test]
fn a_process_that_does_not_read_still_gets_signals() {
    let agent = Agent::start("deaf");
    let mut session = agent
        .exec(&sh("trap 'echo caught; exit 3' USR1; echo ready; while :; do sleep 0.05; done"));
    assert_eq!(session.next_event().unwrap(), Event::Stdout(b"ready\n".to_vec()));
    let input = session.input();
    assert!(input.stdin(&vec![b'x'; STDIN_WINDOW_BYTES]).unwrap());
    input.signal(10).unwrap();
    let (out, _, exit) = collect(&mut session);
    assert_eq!((out, exit), (b"caught\n".to_vec(), Exit::Status(3)));
    // Nobody waits for credit that will never come.
    assert!(!input.stdin(&vec![b'x'; STDIN_WINDOW_BYTES]).unwrap_or(false));
}

#[test]
fn output_nobody_reads_is_not_collected_in_the_agent() {
    let agent = Agent::start("flood");
    let mut session = agent.exec(&sh("exec cat /dev/zero"));
    let _first = session.next_event().unwrap();
    std::thread::sleep(Duration::from_millis(500));
    let status = std::fs::read_to_string(format!("/proc/{}/status", agent.process.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident_kib: u64 = line.split_whitespace().next().unwrap().parse().unwrap();
    assert!(resident_kib < 32 << 10, "{resident_kib} KiB");
    session.input().signal(9).unwrap();
    loop {
        if let Event::Exit(exit) = session.next_event().unwrap() {
            assert_eq!(exit, Exit::Signal(9));
            break;
        }
    }
}

#[test]
fn a_terminal_has_a_size_and_delivers_control_characters() {
    let agent = Agent::start("tty");
    let exec = Exec {
        tty: Some(TerminalSize { rows: 33, cols: 101 }),
        ..sh("stty size; trap 'stty size; exit 9' INT; echo go; while :; do :; done")
    };
    let mut session = agent.exec(&exec);
    let mut seen = String::new();
    while !seen.contains("go\r\n") {
        let Event::Stdout(bytes) = session.next_event().unwrap() else { panic!("{seen}") };
        seen.push_str(&String::from_utf8(bytes).unwrap());
    }
    assert!(seen.contains("33 101\r\n"), "{seen}");
    let input = session.input();
    input.resize(TerminalSize { rows: 20, cols: 60 }).unwrap();
    assert!(input.stdin(b"\x03").unwrap());
    let (out, err, exit) = collect(&mut session);
    assert!(String::from_utf8_lossy(&out).contains("20 60"), "{}", String::from_utf8_lossy(&out));
    assert_eq!((err.len(), exit), (0, Exit::Status(9)));
}

#[test]
fn a_host_that_leaves_takes_its_process_along() {
    let agent = Agent::start("leave");
    let session = agent.exec(&sh("sleep 1000"));
    let process = PathBuf::from(format!("/proc/{}", session.pid()));
    assert!(process.exists());
    drop(session);
    let began = Instant::now();
    while process.exists() {
        assert!(began.elapsed() < Duration::from_secs(10), "the process lives on");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn hostile_hosts_are_shown_out_and_others_served() {
    let agent = Agent::start("hostile");
    let hello =
        ToAgent::Hello(berth_api::agent::message::Hello { version: 1, software: "hostile".into() });
    let hello = hello.to_frame().unwrap().encode().unwrap();
    let frame = |message: ToAgent| message.to_frame().unwrap().encode().unwrap();
    let mut too_long = (FRAME_PAYLOAD_BYTES_MAX as u32 + 1).to_le_bytes().to_vec();
    too_long.push(1);
    let flood = [
        hello.clone(),
        frame(ToAgent::Exec(sh("sleep 100"))),
        frame(ToAgent::Stdin(vec![0; FRAME_PAYLOAD_BYTES_MAX])),
        frame(ToAgent::Stdin(vec![0; FRAME_PAYLOAD_BYTES_MAX])),
    ];
    let cases: Vec<Vec<u8>> = vec![
        too_long,
        frame(ToAgent::Ping),
        [hello.clone(), hello.clone()].concat(),
        [hello.clone(), vec![0, 0, 0, 0, 0x55]].concat(),
        [hello.clone(), vec![3, 0, 0, 0, 2, b'{', b'}', b'}']].concat(),
        [hello.clone(), frame(ToAgent::StdinEof)].concat(),
        flood.concat(),
    ];
    for (number, bytes) in cases.iter().enumerate() {
        let mut stream = agent.stream();
        // The agent may close before everything is written.
        let _ = stream.write_all(bytes);
        let mut last = None;
        while let Ok(Some(frame)) = Frame::read_from(&mut stream) {
            last = Some(ToHost::from_frame(frame).unwrap());
        }
        assert!(
            matches!(&last, Some(ToHost::Refused(refusal)) if refusal.reason == Reason::Protocol),
            "case {number}: {last:?}"
        );
    }
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..200 {
        let mut stream = agent.stream();
        let rubbish: Vec<u8> = (0..64)
            .map(|_| {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (seed >> 56) as u8
            })
            .collect();
        let _ = stream.write_all(&hello);
        let _ = stream.write_all(&rubbish);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        // A reset is as good as an end.
        let _ = stream.read_to_end(&mut rest);
    }
    agent.client().ping().unwrap();
}
