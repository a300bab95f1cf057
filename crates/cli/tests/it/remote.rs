//! A daemon on TCP: certificates on both sides, and who does not come in.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use serde_json::Value;
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, version};

use crate::guest::{Debian, ECHO, LIMIT, Ran, Running, run};
use crate::images::Maker;
use crate::kept::{Cloud, get};

/// An authority and what it signed.
struct Authority {
    directory: PathBuf,
    certificate: rcgen::Certificate,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(directory: &Path, name: &str) -> Self {
        let directory = directory.join(name);
        fs::create_dir_all(&directory).unwrap();
        let mut params = CertificateParams::new([]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let certificate = params.self_signed(&key).unwrap();
        fs::write(directory.join("ca.pem"), certificate.pem()).unwrap();
        Self { directory, certificate, issuer: Issuer::new(params, key) }
    }

    /// Writes `NAME.pem` and `NAME.key`.
    fn sign(&self, name: &str, names: &[&str]) {
        let names: Vec<_> = names.iter().map(|&name| name.to_owned()).collect();
        let key = KeyPair::generate().unwrap();
        let signed = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        fs::write(self.file(&format!("{name}.pem")), signed.pem()).unwrap();
        fs::write(self.file(&format!("{name}.key")), key.serialize_pem()).unwrap();
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn flags(&self, name: &str) -> String {
        let file = |name: String| self.file(&name).display().to_string();
        let ca = file("ca.pem".to_owned());
        let (cert, key) = (file(format!("{name}.pem")), file(format!("{name}.key")));
        format!("--tls-ca {ca} --tls-cert {cert} --tls-key {key}")
    }
}

/// A daemon on TCP at 127.0.0.1 and on its socket.
pub(crate) struct Remote {
    pub(crate) cloud: Cloud,
    ours: Authority,
    pub(crate) address: SocketAddr,
    daemon: Running,
}

impl Remote {
    pub(crate) fn new() -> Self {
        Self::in_cloud(Cloud::new(), |command| command)
    }

    /// It finds what makes images where that says.
    pub(crate) fn beside(maker: Maker) -> Self {
        let path = maker.path();
        Self::in_cloud(maker.cloud, |command| command.env("PATH", path))
    }

    fn in_cloud(
        cloud: Cloud,
        set: impl FnOnce(&mut std::process::Command) -> &mut std::process::Command,
    ) -> Self {
        let ours = Authority::new(cloud.root(), "ours");
        ours.sign("host", &["127.0.0.1", "localhost"]);
        ours.sign("me", &["me"]);
        let mut command =
            cloud.command(&format!("daemon --listen tcp://127.0.0.1:0 {}", ours.flags("host")));
        set(&mut command);
        let daemon = Running::start(command.stdin(Stdio::null()).stderr(Stdio::null()));
        let began = Instant::now();
        let info = loop {
            match get(&cloud.root().join("berth.sock"), "/berth/v1/info") {
                Some(info) => break serde_json::from_str::<Value>(&info).unwrap(),
                None => assert!(began.elapsed() < LIMIT),
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        let address = info["addresses"][1].as_str().unwrap().strip_prefix("tcp://").unwrap();
        let address = address.parse().unwrap();
        Self { cloud, ours, address, daemon }
    }

    /// The authority's certificate, and that of one who may ask with its key.
    pub(crate) fn files(&self) -> [PathBuf; 3] {
        ["ca.pem", "me.pem", "me.key"].map(|name| self.ours.file(name))
    }

    fn words(&self, flags: &str, words: &str) -> std::process::Command {
        let mut command = self.cloud.command(&format!("--host tcp://{} {flags}", self.address));
        command.args(words.split_whitespace());
        command
    }

    pub(crate) fn run(&self, words: &str) -> Ran {
        run(&mut self.words(&self.ours.flags("me"), words), b"")
    }

    pub(crate) fn ok(&self, words: &str) -> String {
        let ran = self.run(words);
        ran.check(0);
        assert_eq!(ran.stderr, "", "{words}");
        ran.text()
    }

    /// It still answers one who may ask.
    fn works(&self) {
        self.ok("vm ls");
    }
}

#[test]
fn a_daemon_on_tcp_does_all_that_it_does_on_its_socket() {
    let mut remote = Remote::new();
    let kernel = remote.cloud.kernel("a.elf", &ECHO);
    let create = format!("vm create --memory 64M --debug-exit --kernel {kernel} a");
    assert_eq!(remote.ok(&create), "a\n");
    let mut events = remote.words(&remote.ours.flags("me"), "events");
    let mut events = Running::start(events.stdin(Stdio::null()).stdout(Stdio::piped()));
    let mut heard = events.stdout();
    std::thread::sleep(Duration::from_millis(500));
    remote.ok("vm start a");
    let mut first = [0; 8];
    heard.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"{\"time\":");

    let mut console = remote.words(&remote.ours.flags("me"), "vm console a");
    let mut console =
        Running::start(console.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()));
    let (mut to, mut from) = (console.stdin(), console.stdout());
    for round in 0..200u8 {
        to.write_all(&[round + 1]).unwrap();
        let mut byte = [0];
        from.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [round + 2]);
    }
    assert_eq!(remote.run("vm logs a").stdout.len(), 200);
    remote.ok("vm kill a");
    assert_eq!(console.wait(LIMIT), Some(0), "who is attached is told of the end");
    let ran = remote.run("vm start nobody");
    ran.check_failed(&["no machine nobody"]);
    // By another of its names, and by the environment.
    let mut by_name = remote.cloud.command("vm ls");
    by_name.env("BERTH_HOST", format!("tcp://localhost:{}", remote.address.port()));
    for (name, file) in
        [("BERTH_TLS_CA", "ca.pem"), ("BERTH_TLS_CERT", "me.pem"), ("BERTH_TLS_KEY", "me.key")]
    {
        by_name.env(name, remote.ours.file(file));
    }
    run(&mut by_name, b"").check(0);
    // Streams do not keep it from ending.
    let pid = rustix::process::Pid::from_child(&remote.daemon.0);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(remote.daemon.wait(LIMIT), Some(0));
    remote.run("vm ls").check_failed(&["no daemon answers", "tcp://127.0.0.1"]);
}

#[test]
fn nobody_comes_in_without_a_certificate() {
    let remote = Remote::new();
    let theirs = Authority::new(remote.cloud.root(), "theirs");
    theirs.sign("me", &["me"]);
    theirs.sign("host", &["127.0.0.1"]);
    // One of another authority, which the daemon does not know.
    let file = |name: &str| remote.ours.file(name).display().to_string();
    let other = |name: &str| theirs.file(name).display().to_string();
    let flags = format!(
        "--tls-ca {} --tls-cert {} --tls-key {}",
        file("ca.pem"),
        other("me.pem"),
        other("me.key")
    );
    let ran = run(&mut remote.words(&flags, "vm ls"), b"");
    ran.check_failed(&["does not accept this certificate", "--tls-cert"]);
    // A daemon of another authority, which the client does not know.
    let ran = run(&mut remote.words(&theirs.flags("me"), "vm ls"), b"");
    ran.check_failed(&["no secure connection", "UnknownIssuer"]);
    // None at all, from a client that does not mind.
    let mut roots = RootCertStore::empty();
    roots.add(remote.ours.certificate.der().clone()).unwrap();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let client = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut stream = StreamOwned::new(client, TcpStream::connect(remote.address).unwrap());
    let _ = stream.write_all(b"GET /berth/v1/machines HTTP/1.1\r\nHost: berth\r\n\r\n");
    let mut answer = Vec::new();
    let error = stream.read_to_end(&mut answer).unwrap_err();
    assert!(error.to_string().contains("CertificateRequired"), "{error}");
    assert_eq!(answer, b"");
    // HTTP without TLS, and rubbish.
    for sent in
        [&b"GET /berth/v1/info HTTP/1.1\r\nHost: berth\r\n\r\n"[..], &[0x16; 70_000], b"\x16"]
    {
        let mut stream = TcpStream::connect(remote.address).unwrap();
        let _ = stream.write_all(sent);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        let mut answer = Vec::new();
        // It may be reset.
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP") && answer.len() < 100, "{answer:?}");
    }
    remote.works();
}

/// A connection from that address of this host.
fn connect_from(from: [u8; 4], to: SocketAddr) -> TcpStream {
    use rustix::net::{AddressFamily, SocketType, bind, connect, socket};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&socket, &SocketAddr::from((from, 0))).unwrap();
    connect(&socket, &to).unwrap();
    socket.into()
}

#[test]
fn those_who_dawdle_keep_nobody_out() {
    let remote = Remote::new();
    let began = Instant::now();
    let mut slow: Vec<_> = (0..40).map(|_| connect_from([127, 0, 0, 2], remote.address)).collect();
    for stream in &mut slow {
        // The head of a handshake, of which no more comes. Some are refused by now.
        let _ = stream.write_all(&[0x16, 3, 1, 1, 0, 1]);
    }
    remote.works();
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    for stream in &mut slow {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
    }
    assert!(began.elapsed() < Duration::from_secs(15), "{:?}", began.elapsed());
    remote.works();
}

#[test]
fn tcp_needs_all_its_files() {
    let cloud = Cloud::new();
    let ours = Authority::new(cloud.root(), "ours");
    ours.sign("host", &["127.0.0.1"]);
    ours.sign("other", &["127.0.0.1"]);
    let file = |name: &str| ours.file(name).display().to_string();
    let (ca, cert, key) = (file("ca.pem"), file("host.pem"), file("host.key"));
    let check = |words: &str, status, parts: &[&str]| {
        let ran = cloud.run(words);
        ran.check(status);
        assert_eq!(ran.stderr.lines().count(), 1, "{}", ran.stderr);
        for part in parts {
            assert!(ran.stderr.contains(part), "no `{part}` in: {}", ran.stderr);
        }
    };
    let listen = "daemon --listen tcp://127.0.0.1:0";
    check(listen, 2, &["--tls-ca is missing"]);
    check(&format!("{listen} --tls-ca {ca} --tls-cert {cert}"), 2, &["--tls-key is missing"]);
    let all = format!("--tls-ca {ca} --tls-cert {cert} --tls-key {key}");
    check(&format!("daemon --listen 127.0.0.1:0 {all}"), 2, &["tcp://ADDRESS:PORT"]);
    check(&format!("daemon --listen tcp://10.255.255.1:1 {all}"), 1, &["tcp://10.255.255.1:1"]);
    let with = |ca: &str, cert: &str, key: &str| {
        format!("{listen} --tls-ca {ca} --tls-cert {cert} --tls-key {key}")
    };
    check(&with("/nonexistent", &cert, &key), 1, &["/nonexistent", "No such file"]);
    check(&with(&key, &cert, &key), 1, &["host.key", "0 certificates"]);
    check(&with(&ca, &cert, &cert), 1, &["a private key", "host.pem"]);
    check(&with(&ca, &cert, &file("other.key")), 1, &["host.pem", "other.key"]);
    check("--host tcp://127.0.0.1:1 vm ls", 1, &["--tls-ca is missing", "BERTH_TLS_CA"]);
    check(&format!("--host tcp://127.0.0.1:1 {all} vm ls"), 1, &["no daemon", "refused"]);
}

#[test]
fn debian_runs_commands_over_tcp() {
    let Some(debian) = Debian::take() else { return };
    let remote = Remote::new();
    debian.lend_to(remote.cloud.root());
    remote.ok("vm create --net none box debian:bookworm");
    remote.ok("vm start box");
    assert_eq!(remote.ok("vm exec box hostname"), "box\n");
    let mut command = remote.words(&remote.ours.flags("me"), "vm exec box sha256sum");
    let data: Vec<u8> = (0..3_000_000u32).map(|i| (i.wrapping_mul(i) >> 7) as u8).collect();
    let ran = run(&mut command, &data);
    ran.check(0);
    use sha2::{Digest, Sha256};
    let hash: String = Sha256::digest(&data).iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(ran.text().starts_with(&hash), "{}", ran.text());
    assert_eq!(remote.run("vm exec box -- sh -c false").status, Some(1));
    remote.ok("vm stop box");
}
