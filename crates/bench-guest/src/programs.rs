//! Programs of Debian, each with a fixed amount of work, in the root file system we are told.
//!
//! The guest's initramfs has this program as its init, with the modules that the disk needs; on the
//! host the same disk is mounted. Either way all files written are in memory.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::{Command, Stdio};

/// A program, or a few in a pipe.
pub struct Program {
    /// Its name, without spaces.
    pub name: &'static str,
    /// For the shell; not measured.
    prepare: &'static str,
    /// For the shell.
    script: &'static str,
    /// What its time is.
    kind: Kind,
}

#[derive(Clone, Copy)]
enum Kind {
    /// From start to end; what it prints must be the same everywhere.
    Whole,
    /// What it prints, in operations a second: for programs that measure themselves.
    Rate,
}

const fn whole(name: &'static str, prepare: &'static str, script: &'static str) -> Program {
    Program { name, prepare, script, kind: Kind::Whole }
}

const fn rate(name: &'static str, script: &'static str) -> Program {
    Program { name, prepare: ":", script, kind: Kind::Rate }
}

/// Makes 4.6 MB of words in lines, some more frequent than others.
const TEXT: &str = r#"[ -e /tmp/text ] || perl -e 'srand(1);
my @w = map { join "", map { chr(97 + int rand 26) } 0..2+int rand 8 } 1..3000;
for (1..60000) {
    print join(" ", map { $w[int(rand(60)*rand(50))] } 1..8+int rand 6), ".\n"
}' > /tmp/text; head -c 600000 /tmp/text > /tmp/text-600k; head -c 2000000 /tmp/text > /tmp/text-2m"#;

/// Makes a C program of functions that call each other.
const SOURCE: &str = r##"perl -e 'print "#include <stdio.h>\n#include <string.h>\n";
for my $i (0..11) {
    my $call = $i ? "f" . ($i - 1) . "(x >> 1, s)" : "x";
    print "unsigned f$i(unsigned x, char *s) {
    for (int i = 0; s[i] && i < $i + 9; i++) {
        switch ((x + i) % 5) {
        case 0: x = x * 31 + s[i]; break;
        case 1: x ^= x << ($i % 13 + 1); break;
        case 2: s[i] = (char)(x % 26 + 97); break;
        case 3: x += (unsigned)strlen(s + i); break;
        default: if (x & 8) x -= $call; else x /= 3;
        }
    }
    return x ^ (unsigned)($i * 1.5 + x * 0.25);
}\n" }
print "int main(void) { char s[] = \"hello, world\"; printf(\"%u\\n\", f11(7, s)); }\n"' > /tmp/a.c"##;

/// All of them.
pub const PROGRAMS: &[Program] = &[
    whole(
        "python",
        ":",
        "python3 -c '
def work(n):
    counts, total = {}, 0
    for i in range(n):
        k = i * 7919 % 1000
        counts[k] = counts.get(k, 0) + i * i % 7
        total += len(str(i))
    return total + sum(v for v in counts.values() if v % 2)
class Point:
    def __init__(self, x, y): self.x, self.y = x, y
    def turn(self): return Point(-self.y, self.x + 0.5)
p = Point(1.0, 2.0)
for i in range(150000): p = p.turn()
print(work(500000), p.x, p.y, sum(1.0 / (i * i) for i in range(1, 300000)))'",
    ),
    whole("python-start", ":", "for i in 1 2 3 4 5; do python3 -c \"print($i)\"; done"),
    whole("gzip", TEXT, "gzip -6 < /tmp/text | gzip -d | cksum"),
    whole("xz", TEXT, "xz -2 < /tmp/text-600k | xz -d | cksum"),
    rate("openssl-sha256", "openssl speed -mr -elapsed -seconds 1 -bytes 16384 -evp sha256"),
    rate("openssl-aes-gcm", "openssl speed -mr -elapsed -seconds 1 -bytes 16384 -evp aes-128-gcm"),
    rate("openssl-rsa2048", "openssl speed -mr -elapsed -seconds 1 rsa2048"),
    whole(
        "sqlite",
        ":",
        "rm -f /tmp/db; sqlite3 /tmp/db 'pragma synchronous = off;
create table t(a integer primary key, b text, c real);
insert into t with recursive n(i) as (select 1 union all select i + 1 from n where i < 60000)
    select i, \"name\" || (i * 7919 % 10007), i * 0.37 from n;
create index x on t(b);
select count(*), sum(c) from t where b like \"name1%\";
select b, count(*) as k from t group by b order by k desc, b limit 3;
update t set c = c + 1 where a % 3 = 0; select round(sum(c)) from t;'",
    ),
    whole("gcc", SOURCE, "gcc -O2 -o /tmp/a /tmp/a.c && /tmp/a && cksum < /tmp/a"),
    whole(
        "perl",
        TEXT,
        "perl -ne 'for (split /\\W+/) { $n{lc $_}++ } s/(\\w)(\\w+)/$2$1/g; $x += tr/a-e//;
END { print \"$x \", scalar(keys %n), \"\\n\" }' /tmp/text-2m",
    ),
    whole("sort", TEXT, "sort /tmp/text-2m | uniq -c | sort -rn | cksum"),
    whole("shell", ":", "for i in $(seq 60); do /bin/true; x=$(echo $i | cat); done; echo $x"),
];

impl Program {
    /// Does what is not measured.
    pub fn prepare(&self) -> Result<(), String> {
        shell(self.prepare).map(|_| ())
    }

    /// Runs it once; returns the checksum of what it printed, and the nanoseconds it measured itself.
    pub fn run(&self) -> Result<(u64, Option<u64>), String> {
        let output = shell(self.script)?;
        match self.kind {
            Kind::Whole => Ok((checksum(&output), None)),
            Kind::Rate => {
                let text = String::from_utf8_lossy(&output);
                let per_second = rate_in(&text).ok_or_else(|| format!("no result in {text}"))?;
                Ok((0, Some((1e9 / per_second) as u64)))
            }
        }
    }
}

/// What `openssl speed -mr` found: millions of bytes, or signatures, a second.
fn rate_in(text: &str) -> Option<f64> {
    let line = text.lines().find(|line| line.starts_with("+F"))?;
    let number = |word: Option<&str>| word?.parse::<f64>().ok();
    let words: Vec<&str> = line.split(':').collect();
    match words.first()? {
        // +F:NUMBER:NAME:BYTES
        &"+F" => number(words.get(3).copied()).map(|bytes| bytes / 1e6),
        // +F2:NUMBER:BITS:SIGNATURES:VERIFICATIONS
        _ => number(words.get(3).copied()),
    }
    .filter(|rate| *rate > 0.0)
}

fn shell(script: &str) -> Result<Vec<u8>, String> {
    let output = Command::new("/bin/sh")
        .args(["-c", script])
        .env_clear()
        .env("PATH", "/usr/bin:/bin")
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("/bin/sh: {error}"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr).replace('\n', "; ");
        return Err(format!("{}: {complaint}", output.status));
    }
    Ok(output.stdout)
}

/// FNV-1a.
fn checksum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum: u64, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
    })
}

/// Loads what the initramfs has and mounts the disk on `root`: for process 1.
pub fn mount_disk(root: &Path) -> Result<(), String> {
    let list = match fs::read_to_string("/modules/order") {
        Ok(list) => list,
        // An initramfs for rows that need no disk.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(format!("/modules/order: {error}")),
    };
    for name in list.lines() {
        let path = format!("/modules/{name}");
        let file = fs::File::open(&path).map_err(|error| format!("{path}: {error}"))?;
        // SAFETY: the descriptor is open and the parameters are a string.
        unsafe {
            use std::os::fd::AsRawFd;
            // A driver without a device may refuse; what is missed is noticed by the mount.
            libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0);
        }
    }
    fs::create_dir_all(root).map_err(|error| format!("{}: {error}", root.display()))?;
    for _ in 0..500 {
        if Path::new("/dev/vda").exists() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    mount(c"/dev/vda", root, c"ext4", libc::MS_RDONLY)
}

/// Makes `root` the root of this process, with what programs expect in it.
pub fn enter(root: &Path) -> Result<(), String> {
    mount(c"tmpfs", &root.join("tmp"), c"tmpfs", 0)?;
    mount(c"proc", &root.join("proc"), c"proc", 0)?;
    mount(c"devtmpfs", &root.join("dev"), c"devtmpfs", 0)?;
    std::os::unix::fs::chroot(root).map_err(|error| format!("{}: {error}", root.display()))?;
    std::env::set_current_dir("/").map_err(|error| format!("/: {error}"))
}

/// Mounts a file system without data.
pub fn mount(
    source: &CStr,
    target: &Path,
    kind: &CStr,
    flags: libc::c_ulong,
) -> Result<(), String> {
    let place = CString::new(target.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: all are strings, and these file systems need no data.
    let result = unsafe {
        libc::mount(source.as_ptr(), place.as_ptr(), kind.as_ptr(), flags, std::ptr::null())
    };
    if result == 0 {
        return Ok(());
    }
    Err(format!("mounting {}: {}", target.display(), io::Error::last_os_error()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_openssl_says_is_understood() {
        let digest = "+DT:sha256:1:16384\n+R:8979:sha256:1.0\n+H:16384\n+F:25:sha256:2000000.00\n";
        assert_eq!(rate_in(digest), Some(2.0));
        assert_eq!(rate_in("+F2:2:2048:936.000000:29377.000000\n"), Some(936.0));
        assert_eq!(rate_in("+H:16384\n"), None);
        assert_eq!(rate_in("+F:25:sha256:0\n"), None);
    }

    #[test]
    fn a_program_that_fails_is_an_error_with_its_words() {
        assert!(shell("echo why >&2; exit 3").is_err_and(|error| error.contains("why")));
        assert_eq!(shell("echo $LC_ALL").unwrap(), b"C\n");
        assert_ne!(checksum(b"a"), checksum(b"b"));
    }
}
