//! Debian guests that are suspended, restored and cloned in the middle of their work, with memory and
//! disk checked afterwards.

use std::collections::HashSet;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crate::guest::{Debian, LIMIT, run};
use crate::kept::Cloud;

/// Writes numbered lines to a file in memory and one on the disk, each with a checksum, as fast as it can,
/// and changes 16 MiB of memory meanwhile.
const WORK: &str = r#"
dd if=/dev/urandom of=/dev/shm/a bs=1M count=8 2>/dev/null
sha256sum < /dev/shm/a > /dev/shm/a.sum
n=0
while :; do
    n=$((n + 1))
    cat /dev/shm/a > /dev/shm/b
    sha256sum < /dev/shm/b | cmp -s - /dev/shm/a.sum || echo $n >> /dev/shm/bad
    echo $n $(echo $n | cksum) > /dev/shm/n.new && mv /dev/shm/n.new /dev/shm/n
    echo $n $(echo $n | cksum) > /var/n.new && sync /var/n.new && mv /var/n.new /var/n
done
"#;

/// Fails unless both lines are sound, their numbers are as they must be, and memory is.
const CHECK: &str = r#"
set -e
for f in /dev/shm/n /var/n; do
    read n sum rest < $f
    test "$sum $rest" = "$(echo $n | cksum)"
    echo $n
done
test ! -e /dev/shm/bad
sha256sum < /dev/shm/a | cmp - /dev/shm/a.sum
dmesg | grep -E 'I/O error|EXT4-fs error|rcu.*stall|soft lockup|BUG:' >&2 && exit 1
exit 0
"#;

struct Box<'a>(&'a Cloud, &'a str);

impl Box<'_> {
    fn shell(&self, script: &str) -> String {
        let ran = run(self.0.command("vm").args(["exec", self.1, "sh", "-c", script]), b"");
        ran.check(0);
        ran.text()
    }

    fn begin(&self) {
        self.shell(&format!("({WORK}) > /dev/null 2>&1 &"));
        for _ in 0..600 {
            if self.shell("test -e /var/n && echo yes; true") == "yes\n" {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        panic!("the work does not begin");
    }

    /// The numbers that memory and the disk hold.
    fn check(&self) -> (u64, u64) {
        let said = self.shell(CHECK);
        let numbers: Vec<u64> = said.lines().map(|line| line.parse().unwrap()).collect();
        let [memory, disk] = numbers[..] else { panic!("{said}") };
        (memory, disk)
    }

    /// Its work goes on, however busy the host is.
    fn goes_on_from(&self, before: (u64, u64)) {
        let began = Instant::now();
        loop {
            let (memory, disk) = self.check();
            if memory > before.0 && disk > before.1 {
                return;
            }
            assert!(began.elapsed() < LIMIT, "{memory} {disk} after {before:?}");
        }
    }

    /// The time of day is right within 10 ms.
    fn check_clock(&self) {
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs_f64();
        let before = clock();
        let inside: f64 = self.shell("date +%s.%N").trim().parse().unwrap();
        let range = before - 0.01..clock() + 0.01;
        assert!(range.contains(&inside), "{inside} is not in {range:?}");
    }
}

/// Rounds of a test; more with BERTH_ROUNDS.
fn rounds() -> u64 {
    let given = std::env::var("BERTH_ROUNDS").ok();
    given.map_or(6, |rounds| rounds.parse().unwrap())
}

#[test]
fn work_goes_on_after_a_suspend() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    cloud.ok("vm create --net none --cpus 2 a debian:bookworm");
    cloud.ok("vm start a");
    let guest = Box(&cloud, "a");
    guest.begin();
    let first = guest.check();
    let mut last = first;
    for _ in 0..rounds() {
        cloud.ok("vm suspend a");
        cloud.ok("vm resume a");
        guest.check_clock();
        let (memory, disk) = guest.check();
        let goes_on = memory >= last.0 && disk >= last.1;
        assert!(goes_on && disk <= memory + 1, "{last:?} {memory} {disk}");
        last = (memory, disk);
    }
    guest.goes_on_from(first);
    // Zeroes are not stored.
    guest.shell("rm /dev/shm/a; sync; echo 3 > /proc/sys/vm/drop_caches");
    cloud.ok("vm suspend a");
    let memory = cloud.root().join("machines/a/state/suspended/memory");
    let blocks = std::os::unix::fs::MetadataExt::blocks(&memory.metadata().unwrap());
    assert!(blocks * 512 < (512 << 20) * 4 / 10, "{} MiB are stored", blocks >> 11);
}

#[test]
fn restored_machines_are_as_they_were() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    cloud.ok("vm create --net none a debian:bookworm");
    cloud.ok("vm start a");
    let guest = Box(&cloud, "a");
    guest.begin();
    std::thread::sleep(Duration::from_secs(1));
    let before = guest.check();
    cloud.ok("vm snapshot --tag then a");
    let after = guest.check();
    let mut random = HashSet::new();
    for _ in 0..rounds() {
        cloud.ok("vm restore --force a then");
        guest.check_clock();
        assert!(
            random.insert(guest.shell("head -c 32 /dev/urandom | sha256sum")),
            "the same again"
        );
        let (memory, disk) = guest.check();
        // Both of one instant, at which the snapshot was taken.
        assert!(memory >= before.0 && disk >= before.1 && disk <= memory + 1, "{memory} {disk}");
        // It has gone on since, but not from later.
        assert!(memory < after.0 + 200, "{memory} after {after:?}");
    }
    // A snapshot of what was restored from a snapshot, of which parts were changed.
    for round in 0..3 {
        cloud.ok(&format!("vm snapshot --tag t{round} a"));
        let now = guest.check();
        cloud.ok(&format!("vm restore --force a t{round}"));
        assert!(guest.check().0 + 50 > now.0);
    }
    let tree = cloud.ok("vm snapshots a");
    assert!(tree.contains("then") && tree.contains("t2"), "{tree}");
}

#[test]
fn running_clones_are_machines_of_their_own() {
    let Some(debian) = Debian::take() else { return };
    let cloud = debian.cloud();
    cloud.ok("vm create a debian:bookworm");
    cloud.ok("vm start a");
    let guest = Box(&cloud, "a");
    guest.begin();
    let mut seen = HashSet::new();
    let facts = "hostname; cat /sys/class/net/eth0/address; head -c 32 /dev/urandom | sha256sum";
    seen.extend(guest.shell(facts).lines().map(ToOwned::to_owned));
    for round in 0..rounds().div_ceil(2) {
        cloud.ok(&format!("vm clone --running --count 2 a b{round}"));
        // What they share with it stays as it was.
        cloud.ok(&format!("vm snapshot --tag s{round} a"));
        for number in 1..=2 {
            let name = format!("b{round}-{number}");
            let clone = Box(&cloud, &name);
            clone.check_clock();
            for fact in clone.shell(facts).lines() {
                assert!(seen.insert(fact.to_owned()), "{name} has {fact}, as another one");
            }
            let (memory, disk) = clone.check();
            assert!(disk <= memory + 1, "{memory} {disk}");
            if round > 0 {
                // Each of them works as hard as it can.
                cloud.ok(&format!("vm rm --force {name}"));
            }
        }
        guest.check();
    }
    // A clone's clone, which goes on when the others are gone.
    cloud.ok("vm clone --running b0-1 c");
    cloud.ok("vm kill a");
    cloud.ok("vm kill b0-1");
    let clone = Box(&cloud, "c");
    let before = clone.check();
    cloud.ok("vm suspend c");
    cloud.ok("vm resume c");
    assert_eq!(clone.shell("hostname"), "c\n");
    clone.goes_on_from(before);
    cloud.ok("vm stop b0-2");
    cloud.ok("vm start b0-2");
    assert_eq!(Box(&cloud, "b0-2").shell("hostname"), "b0-2\n");
}
