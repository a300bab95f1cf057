//! Debian guests as people and scripts use them: processors, commands and their streams, the ends a
//! guest can have.

use std::io::Read;
use std::process::Stdio;

use sha2::{Digest, Sha256};

use crate::guest::{Debian, LIMIT, Running, run};

#[test]
fn boots_with_one_to_sixteen_processors() {
    let Some(debian) = Debian::take() else { return };
    for (cpus, online) in [("1", "0"), ("2", "0-1"), ("4", "0-3"), ("16", "0-15")] {
        let script = "nproc; grep -c '^processor' /proc/cpuinfo; cat /sys/devices/system/cpu/online; \
                      grep '^ID=' /etc/os-release; findmnt -no SOURCE,FSTYPE / || mount | grep ' / '";
        let ran = debian.shell(&["--cpus", cpus], script);
        ran.check(0);
        let text = ran.text();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..2], [cpus, cpus], "{text}");
        assert_eq!(lines[2], online, "{text}");
        assert_eq!(lines[3], "ID=debian", "{text}");
        assert!(lines[4].contains("/dev/vda") && lines[4].contains("ext4"), "{text}");
        assert_eq!(ran.stderr, "", "only the command's output");
    }
}

/// Programs that compute, share pages after a fork, are interrupted by signals and die of them.
const PROGRAMS: &str = r#"perl -e '
my @children;
for my $k (1 .. 3) {
    pipe(my $read, my $write);
    my $pid = fork;
    if (!$pid) {
        my ($x, $s, %h) = ($k, 0);
        for my $i (1 .. 100000) {
            $x = ($x * 1103515245 + 12345) & 0x7fffffff;
            $h{$x % 1000} += $i;
            $s ^= $x;
        }
        my $t = 0;
        $t += $_ * $h{$_} for keys %h;
        print $write "$s $t ", join(" ", map { sprintf "%.6f", sqrt($_ * $k) / 3 } 1 .. 5), "\n";
        exit;
    }
    close $write;
    push @children, [$pid, $read];
}
for (@children) { my $line = readline $_->[1]; waitpid $_->[0], 0; print $line }
my ($hits, $me) = (0, $$);
$SIG{USR1} = sub { $hits++ };
if (!fork) { for (1 .. 20) { kill USR1 => $me; select undef, undef, undef, 0.01 } exit }
1 while $hits < 10;
print "interrupted\n";
wait;
for my $signal ("SEGV", "TERM", "KILL") {
    if (!fork) { kill $signal => $$; 1 while 1 }
    wait;
    print "died of ", $? & 127, "\n";
}
my $text = "";
$text .= chr(97 + $_ % 26) for 1 .. 300000;
my $copy = reverse $text;
$copy =~ tr/a-m/A-M/;
print length($copy), " ", substr($copy, 1000, 40), " ", unpack("%32C*", $copy), "\n";
'; seq 1 50000 | sha256sum; dd if=/dev/zero bs=1M count=8 2>/dev/null | md5sum; gzip -c /bin/bash | gzip -d | cmp - /bin/bash"#;

#[test]
fn programs_do_the_same_on_the_processor_itself() {
    let Some(debian) = Debian::take() else { return };
    if let Err(error) = berth_vmm::vcpu::translated::direct_check() {
        return println!("skipped: no process can be traced here: {error}");
    }
    let translated = debian.shell(&["--translator-opt", "no-direct"], PROGRAMS);
    let expected = translated.check(0).text();
    assert!(expected.contains("died of 11\ndied of 15\ndied of 9\n"), "{expected}");
    for cpus in ["1", "2"] {
        let flags = ["--always-direct", "--stats", "--accel", "translate", "--cpus", cpus];
        let ran = debian.shell(&flags, PROGRAMS);
        assert_eq!(ran.check(0).text(), expected);
        let line = ran.stderr.lines().find(|line| line.trim_start().starts_with("direct "));
        let runs = line.and_then(|line| line.split_whitespace().nth(1)).unwrap_or("none");
        assert!(runs.parse::<u64>().is_ok_and(|runs| runs > 100), "{}", ran.stderr);
    }
}

#[test]
fn time_in_the_guest_is_the_hosts() {
    let Some(debian) = Debian::take() else { return };
    let now = || std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let before = now().as_secs();
    let script = "date +%s; a=$(date +%s%N); sleep 2; b=$(date +%s%N); echo $(((b-a)/1000000))";
    let ran = debian.shell(&[], script);
    let after = now().as_secs();
    let text = ran.check(0).text();
    let values: Vec<u64> = text.lines().map(|line| line.parse().unwrap()).collect();
    assert!((before..=after).contains(&values[0]), "{} not in {before}..={after}", values[0]);
    assert!((1990..3500).contains(&values[1]), "two seconds took {} ms", values[1]);
}

#[test]
fn a_command_has_its_status_and_its_streams() {
    let Some(debian) = Debian::take() else { return };
    let ran = debian.shell(&[], "echo out; echo err >&2; exit 42");
    ran.check(42);
    assert_eq!((ran.text().as_str(), ran.stderr.as_str()), ("out\n", "err\n"));
    let ran = run(&mut debian.command(&[], &["cat"]), b"hi\n");
    assert_eq!((ran.check(0).text().as_str(), ran.stderr.as_str()), ("hi\n", ""));
    let ran = debian.shell(&[], "kill -9 $$");
    ran.check(137);
    let ran = run(&mut debian.command(&[], &["no-such-program"]), b"");
    ran.check(127);
    assert!(ran.stdout.is_empty() && ran.stderr.contains("no-such-program"), "{}", ran.stderr);
}

#[test]
fn ten_megabytes_pass_through_unchanged() {
    let Some(debian) = Debian::take() else { return };
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(10 << 20)
    .collect();
    let script = "tee /dev/shm/copy && sha256sum < /dev/shm/copy >&2";
    let ran = run(&mut debian.command(&[], &["sh", "-c", script]), &bytes);
    ran.check(0);
    assert!(ran.stdout == bytes, "{} bytes came back, not the ones sent", ran.stdout.len());
    let sum: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(ran.stderr.split_whitespace().next(), Some(sum.as_str()));
}

#[test]
fn a_reader_that_had_enough_ends_the_run() {
    let Some(debian) = Debian::take() else { return };
    let mut command = debian.command(&[], &["yes"]);
    let piped = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Running::start(piped);
    let mut some = [0; 4];
    let mut stdout = child.stdout();
    stdout.read_exact(&mut some).unwrap();
    assert_eq!(&some, b"y\ny\n");
    drop(stdout);
    assert!(child.wait(LIMIT).is_some(), "still runs though nobody reads");
}

/// A shell on the console instead of a command through the agent; its input is what is typed.
fn console(debian: &Debian, typed: &str) -> crate::guest::Ran {
    run(&mut debian.command(&[], &[]), typed.as_bytes())
}

#[test]
fn leaving_the_shell_powers_off() {
    let Some(debian) = Debian::take() else { return };
    let ran = console(&debian, "echo $((6 * 7))-from-the-shell\nexit\n");
    ran.check(0);
    assert!(ran.text().contains("42-from-the-shell"), "{}", ran.text());
    assert_eq!(ran.stderr, "");
}

#[test]
fn a_reset_and_a_panic_are_failures_with_one_line() {
    let Some(debian) = Debian::take() else { return };
    let sysrq = |key: &str| console(&debian, &format!("echo {key} > /proc/sysrq-trigger\n"));
    sysrq("b").check_failed(&["debian", "the guest reset itself"]);
    let ran = sysrq("c");
    ran.check_failed(&["debian", "the guest reset itself"]);
    assert!(ran.text().contains("Kernel panic"), "{}", ran.text());
    let ran = sysrq("o");
    ran.check(0);
}

#[test]
fn a_guest_that_ends_under_its_command_is_a_failure() {
    let Some(debian) = Debian::take() else { return };
    // The agent has time to say what was printed: the guest may else be gone before it runs.
    let ran = debian.shell(&[], "echo before; sleep 1; echo b > /proc/sysrq-trigger; sleep 100");
    ran.check(1);
    assert_eq!(ran.text(), "before\n");
    assert!(!ran.stderr.is_empty());
}

#[test]
fn a_quick_look_at_the_processor() {
    let Some(debian) = Debian::take() else { return };
    let check = |script: &str, want: &str| {
        let ran = debian.shell(&["--cpus", "2"], script);
        assert_eq!(ran.check(0).text().trim_end(), want, "{script}\n{}", ran.stderr);
    };
    // Values from the FIPS 180 vectors, perl's own arithmetic on real hosts, and zlib's checks.
    check(
        "printf abc | sha256sum; printf abc | sha512sum | cut -c1-32; printf abc | md5sum; \
         printf 123456789 | cksum; perl -e 'printf \"%.17g %.17g %.17g\\n\", sin(1), exp(1), sqrt(2)'; \
         perl -e '$s=0; $s = ($s*31 + $_) % 1000003 for 1..300000; print \"$s\\n\"'; \
         perl -e '$_ = join \",\", sort { $b <=> $a } map { $_*7%101 } 1..100; s/(\\d+),(\\d+)/$2;$1/g; \
         print unpack(\"%32C*\", $_), \"\\n\"'",
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad  -\n\
         ddaf35a193617abacc417349ae204131\n\
         900150983cd24fb0d6963f7d28e17f72  -\n\
         930766865 9\n\
         0.8414709848078965 2.7182818284590451 1.4142135623730951\n\
         742112\n\
         15223",
    );
    check(
        "seq 400000 > /dev/shm/a; gzip -9 < /dev/shm/a | gzip -d | cmp - /dev/shm/a && \
         gzip -1 < /dev/shm/a | tee /dev/shm/b | gzip -t && sha256sum < /dev/shm/a",
        "88d1bf216a4a23b8ef0ad575bf91511a3929458e2babeed31ff8a89f7c5dbac3  -",
    );
    check(
        "for i in 1 2 3; do (seq 200000 | sort -R | sort -n | md5sum) & done; wait",
        &["0e10426a1d5bddffcef02f1345787128  -"; 3].join("\n"),
    );
}

#[test]
fn a_guest_without_network_card_has_none() {
    let Some(debian) = Debian::take() else { return };
    let ran = debian.shell(&["--net", "none"], "ls /sys/class/net");
    assert_eq!(ran.check(0).text(), "lo\n");
}
