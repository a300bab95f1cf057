//! Control groups: one for each machine that runs, with what it may use.
//!
//! ```text
//! /sys/fs/cgroup/berth/ID.RUN                     version 2
//! /sys/fs/cgroup/cpu/OURS/berth/ID.RUN            version 1, in the group that the daemon is in
//! /sys/fs/cgroup/memory/OURS/berth/ID.RUN
//! ```
//!
//! Each start of a machine has a group of its own, so that one that is still being removed is in nobody's
//! way. `groups/ID.RUN` in the state directory says where it is: a daemon that starts removes those whose
//! machines do not run. Machines cannot write there.
//!
//! Where the host has no control groups that this user may change, machines run without.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use berth_api::processors::Processors;
use berth_api::size::Size;
use berth_api::v1::machine::MachineConfig;
use procfs::process::Process;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::folder::read_bounded;

/// The group of all machines' groups.
const PARENT: &str = "berth";
/// Where it is noted what there is, in the state directory.
const NOTES: &str = "groups";
/// Bytes of such a note.
const NOTE_MAX: u64 = 16 << 10;
/// Time in which processors are counted.
const PERIOD_US: u64 = 100_000;
/// The kernel takes no less.
const QUOTA_US_MIN: u64 = 1000;
/// How long processes of a machine that has ended may take to be gone before they are killed, and then.
const END_TIME: Duration = Duration::from_secs(1);
const KILL_TIME: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(2);
/// How often a parent that somebody else removes at that moment is made again.
const TRIES: usize = 8;

/// What a machine may use at most.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Its processors: where time is short, it gets as much as so many processes.
    pub weight: u8,
    /// Processor time.
    pub cpu: Option<Processors>,
    /// Memory of its process.
    pub memory: Option<Size>,
}

impl Limits {
    /// Those of a machine.
    #[must_use]
    pub fn of(config: &MachineConfig) -> Self {
        Self { weight: config.cpus, cpu: config.cpu_limit, memory: config.memory_limit }
    }

    /// Whether there are any.
    #[must_use]
    pub fn any(self) -> bool {
        self.cpu.is_some() || self.memory.is_some()
    }
}

/// A directory in which groups can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    directory: PathBuf,
    kind: Kind,
}

/// What a group of a hierarchy limits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Kind {
    /// Version 2: all.
    Unified,
    /// Version 1.
    Cpu,
    /// Version 1.
    Memory,
    /// Version 1, both.
    Both,
}

/// The groups of machines.
#[derive(Debug)]
pub struct Groups {
    places: Result<Vec<Place>, String>,
    notes: PathBuf,
}

/// The group of a machine that runs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Group {
    /// Its own name.
    name: String,
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Part {
    directory: PathBuf,
    kind: Kind,
}

impl Groups {
    /// Looks what this host has.
    #[must_use]
    pub fn find(root: &Path) -> Self {
        let read = |path| fs::read_to_string(path).map_err(|error| format!("{path}: {error}"));
        let places = read("/proc/self/mountinfo")
            .and_then(|mounts| Ok((mounts, read("/proc/self/cgroup")?)))
            .and_then(|(mounts, own)| places(&mounts, &own, &has_controllers));
        Self { places, notes: root.join(NOTES) }
    }

    /// Makes a group and removes it.
    ///
    /// # Errors
    /// Why machines run without.
    pub fn check(&self) -> Result<Vec<PathBuf>, String> {
        let group = self.make(Uuid::nil(), Limits::default())?;
        let places =
            group.parts.iter().filter_map(|part| Some(part.directory.parent()?.to_owned()));
        let places = places.collect();
        self.try_to_remove(&group).map_err(|error| error.to_string())?;
        Ok(places)
    }

    /// Makes the group of a machine that is about to run.
    ///
    /// # Errors
    /// Why it runs without.
    pub fn make(&self, id: Uuid, limits: Limits) -> Result<Group, String> {
        let places = self.places.as_ref().map_err(String::clone)?;
        let run = Uuid::new_v4().simple().to_string();
        let name = format!("{id}.{}", run.get(..8).unwrap_or_default());
        let part =
            |place: &Place| Part { directory: place.directory.join(&name), kind: place.kind };
        let group = Group { parts: places.iter().map(part).collect(), name };
        let failed = |what: &Path, error: io::Error| format!("{}: {error}", what.display());
        // First, so that it is found whatever happens.
        let note = self.notes.join(&group.name);
        let text = serde_json::to_vec(&group).map_err(|error| error.to_string())?;
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        let mut tries = 0;
        loop {
            builder.create(&self.notes).map_err(|error| failed(&self.notes, error))?;
            match fs::write(&note, &text) {
                // The directory was removed with the last note in it.
                Err(error) if error.kind() == ErrorKind::NotFound && tries < TRIES => tries += 1,
                written => break written.map_err(|error| failed(&note, error))?,
            }
        }
        let made = group.parts.iter().try_for_each(|part| {
            part.make().map_err(|error| failed(&part.directory, error))?;
            Ok(())
        });
        let made: Result<(), String> = made.and_then(|()| group.limit(limits));
        if let Err(why) = made {
            // What is left is removed when the next daemon starts.
            let _ = self.try_to_remove(&group);
            return Err(why);
        }
        Ok(group)
    }

    /// The group that a process of a machine is in.
    #[must_use]
    pub fn of_process(&self, id: Uuid, pid: u32) -> Option<Group> {
        let is_in = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
        self.noted().find(|group| group.is_of(id) && is_in.contains(&group.name))
    }

    /// Removes the group of a machine that has ended, and ends what is left of it.
    pub fn remove(&self, group: &Group) {
        let began = Instant::now();
        let mut killed = false;
        while let Err(error) = self.try_to_remove(group) {
            if began.elapsed() > KILL_TIME {
                tracing::warn!(group = group.name, %error, "a control group stays");
                return;
            }
            if began.elapsed() > END_TIME && !killed {
                killed = true;
                group.kill();
            }
            std::thread::sleep(POLL);
        }
    }

    /// Removes what is left of machines that do not run: `runs` says of which run a group is.
    pub fn sweep(&self, runs: impl Fn(&Group) -> bool) {
        for group in self.noted().filter(|group| !runs(group)) {
            if let Err(error) = self.try_to_remove(&group) {
                // Somebody is in it; the next daemon looks again.
                tracing::info!(group = group.name, %error, "a control group stays");
            }
        }
    }

    fn try_to_remove(&self, group: &Group) -> io::Result<()> {
        for part in &group.parts {
            gone(fs::remove_dir(&part.directory))?;
            // As long as others are in it, it stays.
            let _ = part.directory.parent().map(fs::remove_dir);
        }
        gone(fs::remove_file(self.notes.join(&group.name)))?;
        let _ = fs::remove_dir(&self.notes);
        Ok(())
    }

    fn noted(&self) -> impl Iterator<Item = Group> + use<> {
        let entries = fs::read_dir(&self.notes).into_iter().flatten().flatten();
        entries.filter_map(|entry| {
            let group: Group =
                serde_json::from_str(&read_bounded(&entry.path(), NOTE_MAX).ok()?).ok()?;
            (entry.file_name() == group.name.as_str()).then_some(group)
        })
    }
}

/// What is not there need not be removed.
fn gone(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

impl Group {
    /// Whether it is of that machine.
    #[must_use]
    pub fn is_of(&self, id: Uuid) -> bool {
        self.name.split('.').next() == Some(&id.to_string())
    }

    /// Its directories.
    pub fn directories(&self) -> impl Iterator<Item = &Path> {
        self.parts.iter().map(|part| part.directory.as_path())
    }

    /// Puts a process into it, and those that it has started before. That takes the kernel some
    /// milliseconds.
    ///
    /// # Errors
    /// The process is gone, or the kernel refuses.
    pub fn join(&self, pid: u32) -> io::Result<()> {
        self.directories().try_for_each(|directory| join(directory, pid))?;
        // From here on what it starts is in it.
        for child in children(pid) {
            // It may have ended.
            let _ = self.directories().try_for_each(|directory| join(directory, child));
        }
        Ok(())
    }

    /// Sets what it may use; what has no limit has none.
    ///
    /// # Errors
    /// Why not, for people.
    pub fn limit(&self, limits: Limits) -> Result<(), String> {
        let failed = |what| move |error| format!("a limit of {what} cannot be set: {error}");
        for part in &self.parts {
            part.weigh(limits.weight).map_err(failed("processors"))?;
            part.limit_cpu(limits.cpu).map_err(failed("processors"))?;
            part.limit_memory(limits.memory).map_err(failed("memory"))?;
        }
        Ok(())
    }

    /// Kills whoever is in it.
    fn kill(&self) {
        for part in &self.parts {
            if part.kind == Kind::Unified && part.put("cgroup.kill", "1").is_ok() {
                continue;
            }
            for pid in part.members() {
                let process =
                    Pid::from_raw(pid).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
                // The number could have become somebody else's before it was opened.
                if let Some(process) = process.filter(|_| part.members().contains(&pid)) {
                    let _ = pidfd_send_signal(process, Signal::KILL);
                }
            }
        }
    }
}

/// Writes to a file of a group, which is not made where the kernel does not have it.
fn put(path: &Path, value: &str) -> io::Result<()> {
    let file = fs::File::options().write(true).open(path);
    file.and_then(|mut file| io::Write::write_all(&mut file, value.as_bytes()))
}

/// The processes that a process has started.
fn children(pid: u32) -> Vec<u32> {
    let process = i32::try_from(pid).ok().and_then(|pid| Process::new(pid).ok());
    let tasks = process.and_then(|process| process.tasks().ok()).into_iter().flatten().flatten();
    tasks.flat_map(|task| task.children().unwrap_or_default()).collect()
}

/// Puts a process into a group.
///
/// # Errors
/// The process is gone, or the kernel refuses.
pub fn join(directory: &Path, pid: u32) -> io::Result<()> {
    fs::write(directory.join("cgroup.procs"), pid.to_string())
}

impl Part {
    fn put(&self, name: &str, value: &str) -> io::Result<()> {
        put(&self.directory.join(name), value)
    }

    fn members(&self) -> Vec<i32> {
        let text = fs::read_to_string(self.directory.join("cgroup.procs")).unwrap_or_default();
        text.lines().filter_map(|line| line.parse().ok()).collect()
    }

    fn make(&self) -> io::Result<()> {
        let parent = self.directory.parent().ok_or(ErrorKind::InvalidInput)?;
        let mut tries = 0;
        loop {
            match fs::create_dir(parent) {
                Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
                _ => {}
            }
            if self.kind == Kind::Unified {
                let mut above = [parent.parent(), Some(parent)].into_iter().flatten();
                match above.try_for_each(give_controllers) {
                    Err(error) if error.kind() == ErrorKind::NotFound && tries < TRIES => {
                        tries += 1;
                        continue;
                    }
                    other => other?,
                }
            }
            match fs::create_dir(&self.directory) {
                // The parent was removed with the last one in it.
                Err(error) if error.kind() == ErrorKind::NotFound && tries < TRIES => tries += 1,
                other => return other,
            }
        }
    }

    /// So many times as much as a process has by default, and all machines together as much as so many
    /// processes as the host has processors.
    fn weigh(&self, weight: u8) -> io::Result<()> {
        let (name, one, most) = match self.kind {
            Kind::Unified => ("cpu.weight", 100, 10_000),
            Kind::Cpu | Kind::Both => ("cpu.shares", 1024, 262_144),
            Kind::Memory => return Ok(()),
        };
        let put = |directory: Option<&Path>, weight: usize| {
            let path = directory.ok_or(ErrorKind::InvalidInput)?.join(name);
            put(&path, &(weight.max(1) * one).min(most).to_string())
        };
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        put(self.directory.parent(), processors)?;
        put(Some(&self.directory), usize::from(weight))
    }

    fn limit_cpu(&self, limit: Option<Processors>) -> io::Result<()> {
        let quota = limit.map(|limit| {
            (u64::from(limit.thousandths()) * PERIOD_US / 1000).max(QUOTA_US_MIN).to_string()
        });
        match self.kind {
            Kind::Unified => {
                let quota = quota.unwrap_or_else(|| "max".into());
                self.put("cpu.max", &format!("{quota} {PERIOD_US}"))
            }
            Kind::Cpu | Kind::Both => {
                self.put("cpu.cfs_period_us", &PERIOD_US.to_string())?;
                self.put("cpu.cfs_quota_us", quota.as_deref().unwrap_or("-1"))
            }
            Kind::Memory => Ok(()),
        }
    }

    fn limit_memory(&self, limit: Option<Size>) -> io::Result<()> {
        match self.kind {
            Kind::Unified => {
                // Here the kernel would kill what does not fit; the other version refuses.
                if let Some(limit) = limit
                    && self.cannot_be_dropped() > limit.bytes()
                {
                    let used = Size::from(self.cannot_be_dropped());
                    return Err(io::Error::other(format!("{used} are in use")));
                }
                let limit = limit.map_or_else(|| "max".into(), |limit| limit.bytes().to_string());
                self.put("memory.max", &limit)
            }
            Kind::Memory | Kind::Both => {
                let limit = limit.map_or_else(|| "-1".into(), |limit| limit.bytes().to_string());
                self.put("memory.limit_in_bytes", &limit)
            }
            Kind::Cpu => Ok(()),
        }
    }

    /// Bytes of memory that are more than copies of files.
    fn cannot_be_dropped(&self) -> u64 {
        let read = |name| fs::read_to_string(self.directory.join(name)).unwrap_or_default();
        let all: u64 = read("memory.current").trim().parse().unwrap_or(0);
        let stat = read("memory.stat");
        let of = |key: &str| {
            let line = stat.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
            line.and_then(|count| count.parse::<u64>().ok()).unwrap_or(0)
        };
        all.saturating_sub(of("active_file") + of("inactive_file"))
    }
}

/// Lets groups in this one limit what we limit.
fn give_controllers(directory: &Path) -> io::Result<()> {
    let path = directory.join("cgroup.subtree_control");
    let given = fs::read_to_string(&path)?;
    let missing: Vec<_> = ["cpu", "memory"]
        .into_iter()
        .filter(|wanted| !given.split_whitespace().any(|has| has == *wanted))
        .map(|name| format!("+{name}"))
        .collect();
    if missing.is_empty() { Ok(()) } else { fs::write(&path, missing.join(" ")) }
}

fn has_controllers(directory: &Path) -> bool {
    let has = fs::read_to_string(directory.join("cgroup.controllers")).unwrap_or_default();
    ["cpu", "memory"].iter().all(|wanted| has.split_whitespace().any(|name| name == *wanted))
}

/// Where groups of machines can be, by `/proc/self/mountinfo` and `/proc/self/cgroup`.
fn places(
    mounts: &str,
    own: &str,
    has_controllers: &dyn Fn(&Path) -> bool,
) -> Result<Vec<Place>, String> {
    let own_path = |wanted: &str| {
        own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let (controllers, path) = (fields.next()?, fields.next()?);
            controllers.split(',').any(|name| name == wanted).then_some(path)
        })
    };
    // Where each file system is mounted, which directory of it, its kind and its options.
    let all: Vec<_> = mounts
        .lines()
        .filter_map(|line| {
            let (front, back) = line.split_once(" - ")?;
            let (mut front, mut back) = (front.split(' ').skip(3), back.split(' '));
            let (root, at) = (front.next()?, front.next()?);
            let (kind, options) = (back.next()?, back.nth(1)?);
            Some((kind, Path::new(at), root, options))
        })
        .collect();
    let unified = all.iter().find(|(kind, ..)| *kind == "cgroup2");
    if let Some((_, at, ..)) = unified.filter(|(_, at, ..)| has_controllers(at)) {
        let root = rustix::process::geteuid().is_root();
        let own = own_path("").unwrap_or("/").trim_start_matches('/');
        // Others than root may have been given the group in which theirs is.
        let of_ours = at.join(own);
        let above = if root { at } else { of_ours.parent().unwrap_or(at) };
        return Ok(vec![Place { directory: above.join(PARENT), kind: Kind::Unified }]);
    }
    let mut places: Vec<Place> = Vec::new();
    for (wanted, kind) in [("cpu", Kind::Cpu), ("memory", Kind::Memory)] {
        let is_it = |options: &str| options.split(',').any(|option| option == wanted);
        let mount = all.iter().find(|(kind, _, _, options)| *kind == "cgroup" && is_it(options));
        let Some((_, at, root, _)) = mount else {
            return Err(format!("this host has no control groups for {wanted} mounted"));
        };
        let own = own_path(wanted).unwrap_or("/");
        // Of a container only its own part is mounted.
        let within = Path::new(own).strip_prefix(root).unwrap_or(Path::new(""));
        let within = within.strip_prefix("/").unwrap_or(within);
        let directory = at.join(within).join(PARENT);
        match places.iter_mut().find(|place| place.directory == directory) {
            Some(place) => place.kind = Kind::Both,
            None => places.push(Place { directory, kind }),
        }
    }
    Ok(places)
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1: &str = "\
30 1 0:27 / /sys/fs/cgroup rw shared:1 - tmpfs tmpfs rw,mode=755
31 30 0:28 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
32 30 0:29 / /sys/fs/cgroup/memory rw,relatime shared:3 - cgroup cgroup rw,memory
33 30 0:30 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";

    #[test]
    fn groups_are_where_the_host_has_them() {
        let of = |mounts: &str, own: &str, two| {
            let places = places(mounts, own, &|_| two)?;
            Ok::<_, String>(
                places
                    .iter()
                    .map(|place| (place.directory.display().to_string(), place.kind))
                    .collect::<Vec<_>>(),
            )
        };
        let own = "4:memory:/a/b\n1:cpu:/\n0::/\n";
        let one = [
            ("/sys/fs/cgroup/cpu/berth".into(), Kind::Cpu),
            ("/sys/fs/cgroup/memory/a/b/berth".into(), Kind::Memory),
        ];
        assert_eq!(of(V1, own, false).unwrap(), one);
        let container = V1.replace("0:29 /", "0:29 /a");
        assert_eq!(of(&container, own, false).unwrap()[1].0, "/sys/fs/cgroup/memory/b/berth");
        let both = "31 30 0:28 / /c rw - cgroup cgroup rw,cpu,cpuacct,memory\n";
        let own = "3:cpu,cpuacct,memory:/x\n";
        assert_eq!(of(both, own, false).unwrap(), [("/c/x/berth".into(), Kind::Both)]);
        assert!(of("", own, false).unwrap_err().contains("cpu"));
        let two = "30 1 0:27 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n";
        let place = match rustix::process::geteuid().is_root() {
            true => "/sys/fs/cgroup/berth",
            false => "/sys/fs/cgroup/user.slice/berth",
        };
        let own = "0::/user.slice/x.scope\n";
        assert_eq!(of(two, own, true).unwrap(), [(place.into(), Kind::Unified)]);
    }

    #[test]
    fn limits_are_written_as_each_version_has_them() {
        let above = tempfile::tempdir().unwrap();
        let dir = above.path().join("x");
        fs::create_dir(&dir).unwrap();
        for name in ["cpu.shares", "cpu.weight"] {
            fs::write(above.path().join(name), "").unwrap();
        }
        let read = |name: &str| fs::read_to_string(dir.join(name)).unwrap_or_default();
        // Files keep the rest of what was longer; the kernel's do not.
        let clear = |names: &[&str]| {
            names.iter().for_each(|name| fs::write(dir.join(name), "").unwrap());
        };
        let group =
            |kind| Group { name: "x".into(), parts: vec![Part { directory: dir.clone(), kind }] };
        let limits = Limits {
            weight: 4,
            cpu: Some(Processors::from_thousandths(1500)),
            memory: Some(Size::from(1 << 30)),
        };
        let one = ["cpu.shares", "cpu.cfs_period_us", "cpu.cfs_quota_us", "memory.limit_in_bytes"];
        let two = ["cpu.weight", "cpu.max", "memory.max"];
        clear(&one);
        group(Kind::Both).limit(limits).unwrap();
        assert_eq!(one.map(read), ["4096", "100000", "150000", "1073741824"]);
        clear(&one);
        group(Kind::Cpu).limit(Limits::default()).unwrap();
        group(Kind::Memory).limit(Limits::default()).unwrap();
        assert_eq!(one.map(read), ["1024", "100000", "-1", "-1"]);
        assert!(group(Kind::Unified).limit(limits).is_err(), "it has no such files");
        clear(&two);
        group(Kind::Unified).limit(limits).unwrap();
        assert_eq!(two.map(read), ["400", "150000 100000", "1073741824"]);
        clear(&two);
        group(Kind::Unified).limit(Limits::default()).unwrap();
        assert_eq!(two.map(read), ["100", "max 100000", "max"]);
        // More than that is in use, and not only copies of files.
        fs::write(dir.join("memory.current"), "3221225472\n").unwrap();
        let stat = "anon 5\nactive_file 1073741824\ninactive_file 4096\n";
        fs::write(dir.join("memory.stat"), stat).unwrap();
        let why = group(Kind::Unified).limit(limits).unwrap_err();
        assert!(why.contains("1.9G are in use"), "{why}");
    }

    #[test]
    fn what_is_noted_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        // A directory takes the place of a hierarchy.
        let place = Place { directory: dir.path().join("cpu/berth"), kind: Kind::Cpu };
        fs::create_dir(dir.path().join("cpu")).unwrap();
        let groups = Groups { places: Ok(vec![place]), notes: dir.path().join("groups") };
        let id = Uuid::new_v4();
        // It has no such files.
        assert!(groups.make(id, Limits::default()).unwrap_err().contains("processors"));
        assert!(!dir.path().join("cpu/berth").exists() && !dir.path().join("groups").exists());
        let parts = vec![Part { directory: dir.path().join("cpu/berth/x"), kind: Kind::Cpu }];
        let group = Group { name: format!("{id}.1"), parts };
        assert!(group.is_of(id) && !group.is_of(Uuid::nil()));
        fs::create_dir_all(dir.path().join("cpu/berth/x")).unwrap();
        fs::create_dir(dir.path().join("groups")).unwrap();
        fs::write(dir.path().join("groups").join(&group.name), serde_json::to_vec(&group).unwrap())
            .unwrap();
        fs::write(dir.path().join("groups/rubbish"), "x").unwrap();
        groups.sweep(|_| true);
        assert_eq!(groups.noted().collect::<Vec<_>>(), [group]);
        groups.sweep(|_| false);
        assert!(!dir.path().join("cpu/berth").exists());
        assert_eq!(groups.noted().count(), 0);
    }
}
