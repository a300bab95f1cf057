//! The stress test: programs that use the whole processor, in Debian guests, against answers known
//! from standards or taken from the same command on the host. And boots in a row.

use std::io::Write;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Boots of `cargo xtask boots` when not told otherwise.
pub const BOOTS_DEFAULT: usize = 20;
const IMAGE: &str = "debian-stress";
const PACKAGES: &str = "openssl,python3,libpython3.11-testsuite,gcc,libc6-dev,xz-utils,bzip2,perl";
/// The longest a case may take; a guest that hangs is ended then.
const CASE_LIMIT: Duration = Duration::from_secs(900);
const BOOT_LIMIT: Duration = Duration::from_secs(60);

/// What a case must print.
#[derive(Clone, Copy)]
enum Want {
    /// Exactly this, but for white space at the end.
    Text(&'static str),
    /// What the same script prints on the host.
    AsHost,
    /// Anything with status 0 that contains this.
    Contains(&'static str),
}

struct Case {
    name: &'static str,
    cpus: &'static str,
    script: &'static str,
    want: Want,
}

const fn case(name: &'static str, script: &'static str, want: Want) -> Case {
    Case { name, cpus: "2", script, want }
}

const CASES: &[Case] = &[
    case(
        "openssl digests",
        "for d in md5 sha1 sha256 sha512 sha3-256 blake2b512; do
             printf abc | openssl dgst -r -$d | cut -c1-40; done
         printf 'what do ya want for nothing?' | openssl dgst -r -sha256 -hmac Jefe | cut -c1-40",
        // RFC 1321, FIPS 180-4, FIPS 202, RFC 7693, RFC 4231 case 2.
        Want::Text(
            "900150983cd24fb0d6963f7d28e17f72 *stdin\n\
             a9993e364706816aba3e25717850c26c9cd0d89d\n\
             ba7816bf8f01cfea414140de5dae2223b00361a3\n\
             ddaf35a193617abacc417349ae20413112e6fa4e\n\
             3a985da74fe225b2045c172d6bd390bd855f086e\n\
             ba80a53f981c4d0d6a2797b69f12f6e94c212f14\n\
             5bdcc146bf60754e6a042426089575c75a003f08",
        ),
    ),
    case(
        "openssl ciphers",
        "p=6bc1bee22e409f96e93d7e117393172a
         k=2b7e151628aed2a6abf7158809cf4f3c
         hex() { perl -e 'print pack \"H*\", shift' $1; }
         hex $p | openssl enc -aes-128-ecb -K $k -nopad | od -An -tx1 | tr -d ' \\n'; echo
         hex $p | openssl enc -aes-128-cbc -K $k -iv 000102030405060708090a0b0c0d0e0f -nopad |
             od -An -tx1 | tr -d ' \\n'; echo
         hex $p | openssl enc -aes-128-ctr -K $k -iv f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff |
             od -An -tx1 | tr -d ' \\n'; echo
         seq 300000 | openssl enc -chacha20 -K $k$k -iv $k | openssl enc -d -chacha20 -K $k$k -iv $k |
             md5sum",
        // SP 800-38A, F.1.1, F.2.1, F.5.1.
        Want::Text(
            "3ad77bb40d7a3660a89ecaf32466ef97\n\
             7649abac8119b246cee98e9b12e9197d\n\
             874d6191b620e3261bef6864990db6ce\n\
             daef482d6c698625ab13d987d14e8781  -",
        ),
    ),
    case(
        "openssl keys",
        "cd /tmp; set -e
         for kind in 'RSA -pkeyopt rsa_keygen_bits:2048' 'EC -pkeyopt ec_paramgen_curve:P-256' ED25519; do
             openssl genpkey -quiet -algorithm $kind -out key 2>/dev/null ||
                 openssl genpkey -algorithm $kind -out key 2>/dev/null
             openssl pkey -in key -pubout -out pub; head -c 100 /dev/urandom > text
             openssl pkeyutl -sign -rawin -inkey key -in text -out sig
             openssl pkeyutl -verify -rawin -pubin -inkey pub -in text -sigfile sig
         done
         openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=a -keyout k -out c 2>/dev/null
         openssl verify -CAfile c c",
        Want::Text(
            "Signature Verified Successfully\nSignature Verified Successfully\n\
             Signature Verified Successfully\nc: OK",
        ),
    ),
    case(
        "openssl speed",
        "cd /tmp; openssl speed -seconds 1 -bytes 1024 sha256 > one 2>/dev/null; s=$?
         openssl speed -seconds 1 -bytes 1024 -evp aes-128-gcm > two 2>/dev/null; t=$?
         openssl speed -seconds 1 rsa2048 > three 2>/dev/null; u=$?
         tail -qn 1 one two three; echo status $s $t $u",
        Want::Contains("status 0 0 0"),
    ),
    case(
        "python test_float test_math",
        "cd /tmp; python3 -m test -v test_float test_math > log 2>&1; s=$?;
         grep -E '^(FAIL|ERROR)' log; tail -60 log >&2; echo status $s",
        Want::Text("status 0"),
    ),
    case(
        "python test_struct test_zlib test_hashlib",
        "cd /tmp; python3 -m test -v test_struct test_zlib test_hashlib > log 2>&1; s=$?;
         grep -E '^(FAIL|ERROR)' log; tail -60 log >&2; echo status $s",
        Want::Text("status 0"),
    ),
    case(
        "python test_long test_re test_json and others",
        "cd /tmp; python3 -m test test_complex test_random test_long test_array test_re \
             test_json test_statistics test_cmath > log 2>&1; s=$?; tail -30 log >&2; echo status $s",
        Want::Text("status 0"),
    ),
    case(
        "python numbers",
        "python3 -c '
import math, fractions, decimal, hashlib, random
random.seed(7)
values = [random.random() * 10 ** random.randint(-20, 20) for _ in range(20000)]
out = hashlib.sha256()
for v in values:
    for f in (math.sin, math.cos, math.atan, math.sqrt, math.log, math.cbrt, math.gamma if v < 100 else math.lgamma):
        out.update(repr(f(v)).encode())
    out.update(repr(math.fmod(v, 0.7)).encode()); out.update(v.hex().encode())
    out.update(repr(round(v, 3)).encode()); out.update(repr(int(v)).encode())
print(out.hexdigest()); print(math.factorial(2000) % (10**9 + 7)); print(pow(3, 10**50, 10**40 + 7))
decimal.getcontext().prec = 200; print(decimal.Decimal(2).sqrt())'",
        Want::AsHost,
    ),
    case(
        "gzip, xz, bzip2",
        "cd /tmp; seq 1500000 > a; (cat a; cat a /bin/bash /usr/bin/perl) > b
         for z in 'gzip -9' 'gzip -1' 'xz -1' 'xz -6 -T2' 'bzip2'; do
             p=${z%% *}; $z < b > c; $p -d < c | cmp - b && $p -t c 2>/dev/null || $p -dc < c | cmp - b
             echo $z $?; done; sha256sum < a",
        Want::Text(
            "gzip -9 0\ngzip -1 0\nxz -1 0\nxz -6 -T2 0\nbzip2 0\n\
             9ab1c76a034ecb9d31c317ffc180849e0d61ab92d80897b3ffa1ce93d8890505  -",
        ),
    ),
    case(
        "perl",
        "perl -e 'my %h; $h{($_ * 7919) % 10007} .= chr(65 + $_ % 26) for 1..200000;
             my $s = 0; for my $k (sort { $a <=> $b } keys %h) { $s = ($s * 33 + $k + length $h{$k}) % 4294967291 }
             print \"$s\\n\"'
         perl -e 'my $x = join \" \", map { $_ * $_ } 1..20000; my $n = () = $x =~ /(\\d)\\1/g; print \"$n\\n\";
             printf \"%.15e %.15e %.17g\\n\", atan2(1, 3), 2 ** 0.3, 1e308 * 1.5;
             print unpack(\"%32C*\", pack(\"w*\", 1..100000)), \"\\n\"'",
        Want::AsHost,
    ),
    case("C: floats, jumps, signals, threads", concat!("cat > /tmp/a.c <<'END'\n", include_str!("stress/stress.c"), "END\ncd /tmp; for o in -O0 -O2 '-O3 -mavx2 -mfma' '-O2 -mfpmath=387'; do gcc $o -ffp-contract=off -pthread -o a a.c -lm && ./a || echo failed $?; done"), Want::Text("ok\nok\nok\nok")),
    Case {
        name: "C on four processors",
        cpus: "4",
        script: concat!("cat > /tmp/a.c <<'END'\n", include_str!("stress/stress.c"), "END\ncd /tmp; gcc -O2 -ffp-contract=off -pthread -o a a.c -lm && for i in 1 2 3 4 5; do ./a; done"),
        want: Want::Text("ok\nok\nok\nok\nok"),
    },
    Case {
        name: "processes on four processors",
        cpus: "4",
        script: "cd /tmp; for i in 1 2 3 4 5 6 7 8; do (for j in $(seq 30); do
                 seq $((i * 100)) | sort -R | sort -n | tail -1; done | sort -u) & done | sort -n; wait",
        want: Want::Text("100\n200\n300\n400\n500\n600\n700\n800"),
    },
];

/// Runs all cases whose names contain `only`; fails when one does.
pub fn run(only: &str) -> Result<()> {
    let berth = crate::target().join("release/berth");
    let names = Command::new(&berth).args(["image", "ls", "--json"]).output().context("berth")?;
    if !String::from_utf8_lossy(&names.stdout).contains(&format!("\"{IMAGE}\"")) {
        let status = Command::new(&berth)
            .args(["image", "bootstrap", "--name", IMAGE, "--include", PACKAGES])
            .args(["debian", "bookworm"])
            .status()?;
        if !status.success() {
            bail!("the image {IMAGE} could not be made");
        }
    }
    let mut failed = Vec::new();
    for case in CASES.iter().filter(|case| case.name.contains(only)) {
        let began = Instant::now();
        let found = judge(case, &berth)?;
        let seconds = began.elapsed().as_secs_f64();
        match found {
            None => println!("ok      {:6.1} s  {}", seconds, case.name),
            Some(what) => {
                println!("FAILED  {:6.1} s  {}\n{what}", seconds, case.name);
                failed.push(case.name);
            }
        }
    }
    if failed.is_empty() {
        return Ok(());
    }
    bail!("{} failed: {}", failed.len(), failed.join("; "))
}

/// What is wrong, when something is.
fn judge(case: &Case, berth: &std::path::Path) -> Result<Option<String>> {
    let mut command = Command::new("timeout");
    command.arg(CASE_LIMIT.as_secs().to_string()).arg(berth);
    command.args(["vm", "run", "--memory", "1G", "--cpus", case.cpus, IMAGE, "--", "bash", "-s"]);
    let (status, stdout, stderr) = feed(command, case.script)?;
    let right = match case.want {
        Want::Text(text) => stdout.trim_end() == text,
        Want::Contains(text) => stdout.contains(text),
        Want::AsHost => {
            let mut bash = Command::new("bash");
            bash.arg("-s");
            stdout == feed(bash, case.script)?.1
        }
    };
    if status == Some(0) && right {
        return Ok(None);
    }
    Ok(Some(format!("status {status:?}\n--- stdout\n{stdout}--- stderr\n{stderr}---")))
}

fn feed(mut command: Command, script: &str) -> Result<(Option<i32>, String, String)> {
    let piped = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = piped.spawn().context("starting a program")?;
    if let Some(mut stdin) = child.stdin.take() {
        // A program that ends without reading says why by its status.
        let _ = stdin.write_all(script.as_bytes());
    }
    let output = child.wait_with_output()?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ok((output.status.code(), text(&output.stdout), text(&output.stderr)))
}

/// Boots `count` guests one after the other, with one, two and four processors in turn.
pub fn boots(count: usize) -> Result<()> {
    let berth = crate::target().join("release/berth");
    let mut times = Vec::new();
    let mut failures = 0;
    for number in 1..=count {
        let cpus = ["1", "2", "4"][number % 3];
        let began = Instant::now();
        let mut command = Command::new("timeout");
        command.arg(BOOT_LIMIT.as_secs().to_string()).arg(&berth);
        command.args(["vm", "run", "--cpus", cpus, "debian:bookworm", "--", "nproc"]);
        let (status, stdout, stderr) = feed(command, "")?;
        if status != Some(0) || stdout.trim() != cpus {
            failures += 1;
            println!("boot {number} with {cpus} vCPUs FAILED: {status:?} {stdout} {stderr}");
            continue;
        }
        times.push(began.elapsed().as_secs_f64());
    }
    times.sort_by(f64::total_cmp);
    let at = |index: usize| times.get(index).copied().unwrap_or_default();
    println!(
        "{count} boots, {failures} failed; to the end of a command: {:.2} s median, {:.2} to {:.2} s",
        at(times.len() / 2),
        at(0),
        at(times.len().saturating_sub(1))
    );
    match failures {
        0 => Ok(()),
        _ => bail!("{failures} of {count} boots failed"),
    }
}
