//! Machines.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use crate::processors::Processors;
use crate::size::Size;
use crate::v1::network::Port;

/// Most characters of a name; it is the guest's host name too (RFC 1123).
pub const NAME_MAX: usize = 63;

/// Whether this can be a machine's name: letters, digits and `-`, which is not first.
#[must_use]
pub fn is_name(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-';
    !text.is_empty() && text.len() <= NAME_MAX && text.chars().all(good) && !text.starts_with('-')
}

/// What a machine is made of; the table `machine` of its `vm.toml`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// The image it was made from, whose kernel it boots unless it has one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// A kernel file of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub kernel: Option<PathBuf>,
    /// The initial RAM disk or the Multiboot modules that go with it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub initrd: Option<PathBuf>,
    /// Words added to the kernel command line.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub append: String,
    /// Virtual processors, 1 to 16.
    #[serde(default = "one")]
    #[schema(minimum = 1, maximum = 16)]
    pub cpus: u8,
    /// Memory, as `512M`.
    #[serde(default = "default_memory")]
    #[schema(example = "512M")]
    pub memory: Size,
    /// Processor time that its process may have at most, as `1.5` for that of one and a half processors.
    /// None: as much as there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_limit: Option<Processors>,
    /// Memory that its process may have at most, as `768M`: that of its guest and about 100 MiB. Beyond
    /// that it is killed. None: as much as there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_limit: Option<Size>,
    /// What runs the guest's instructions.
    #[serde(default)]
    pub accel: Accel,
    /// The processor that the guest sees.
    #[serde(default, skip_serializing_if = "Cpu::is_host")]
    pub cpu: Cpu,
    /// Whether the guest has port 0xf4, which ends the machine.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub debug_exit: bool,
    /// The network card.
    #[serde(default)]
    pub net: Net,
    /// Variables of the environment of what runs in the guest: commands, and the console's shell. They
    /// need an image, whose agent sets them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Its disks, in the order the guest numbers them.
    #[serde(default, rename = "disk", skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<Disk>,
    /// Folders of the host that the guest has, too.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shares: Vec<Share>,
    /// Ports of the host that lead to the guest. They need a network card of `user` or in a network.
    #[serde(default, rename = "port", skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<Port>,
}

fn one() -> u8 {
    1
}

fn default_memory() -> Size {
    Size::from(512 << 20)
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            image: None,
            kernel: None,
            initrd: None,
            append: String::new(),
            cpus: one(),
            memory: default_memory(),
            cpu_limit: None,
            memory_limit: None,
            accel: Accel::default(),
            cpu: Cpu::default(),
            debug_exit: false,
            net: Net::default(),
            env: BTreeMap::new(),
            disks: Vec::new(),
            shares: Vec::new(),
            ports: Vec::new(),
        }
    }
}

/// What runs the guest's instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// The fastest that really works on the host.
    #[default]
    Auto,
    /// Berth's own translator.
    Translate,
    /// The kernel's KVM.
    Kvm,
}

/// The processor that a guest sees: what its snapshots need of the host on which they go on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub enum Cpu {
    /// The host's, as far as guests can use it.
    #[default]
    #[serde(rename = "host")]
    Host,
    /// What every x86-64 processor has.
    #[serde(rename = "x86-64")]
    V1,
    /// The second level of the x86-64 ABI.
    #[serde(rename = "x86-64-v2")]
    V2,
    /// The third level.
    #[serde(rename = "x86-64-v3")]
    V3,
}

impl Cpu {
    const ALL: [Self; 4] = [Self::Host, Self::V1, Self::V2, Self::V3];

    /// The name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::V1 => "x86-64",
            Self::V2 => "x86-64-v2",
            Self::V3 => "x86-64-v3",
        }
    }

    /// Whether it is the host's.
    #[must_use]
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
    pub const fn is_host(&self) -> bool {
        matches!(self, Self::Host)
    }
}

impl std::fmt::Display for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl std::str::FromStr for Cpu {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|cpu| cpu.name() == text).ok_or_else(|| match text {
            "x86-64-v4" => "x86-64-v4 needs AVX-512, which the translator does not have".to_owned(),
            _ => format!("there are {}", Self::ALL.map(Self::name).join(", ")),
        })
    }
}

/// The network card.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Net {
    /// The host's network through passt, without privileges.
    User,
    /// A tap interface of this name.
    Tap(String),
    /// In this network of the daemon's.
    Network(String),
    /// No card.
    #[default]
    None,
}

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// The file; without a leading `/` in the machine's folder.
    #[schema(value_type = String)]
    pub file: PathBuf,
    /// What the file holds; it is never guessed.
    #[serde(default, skip_serializing_if = "DiskFormat::is_raw")]
    pub format: DiskFormat,
    /// The guest may not write.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
}

/// What the file of a disk holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum DiskFormat {
    /// The disk's bytes, one after the other.
    #[default]
    Raw,
    /// An image in QEMU's format, with what it is based on.
    Qcow2,
}

impl DiskFormat {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
    fn is_raw(&self) -> bool {
        *self == Self::Raw
    }
}

/// A folder of the host that the guest has, too.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// The folder: an absolute path of the host on which the machine runs.
    #[schema(value_type = String, pattern = "^/")]
    pub host: PathBuf,
    /// Where it is in a guest of an image: an absolute path. Without an image, the tag by which the
    /// guest can mount it: 1 to 36 bytes without `/`.
    #[schema(min_length = 1, max_length = 512)]
    pub guest: String,
    /// The guest may not change anything in it; the host sees to that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
}

/// Most folders that a machine shares with its host.
pub const SHARES_MAX: usize = 8;
/// Most bytes of a path in the guest; the kernel command line carries it.
const SHARE_PATH_MAX: usize = 512;
/// Most bytes of a tag (virtio 1.2, 5.11.4).
const SHARE_TAG_MAX: usize = 36;
/// What a guest cannot be without.
const SHARE_NOT_ON: [&str; 4] = ["", "/dev", "/proc", "/sys"];

impl Share {
    /// By what name the guest mounts the share that is at `index` among its machine's.
    #[must_use]
    pub fn tag(&self, index: usize, has_image: bool) -> String {
        if has_image { format!("share{index}") } else { self.guest.clone() }
    }

    fn check(&self, has_image: bool) -> Result<(), String> {
        let (host, guest) = (self.host.display(), &self.guest);
        if !self.host.is_absolute() {
            return Err(format!("cannot share {host}: it is no absolute path"));
        }
        if !has_image {
            let fits = (1..=SHARE_TAG_MAX).contains(&guest.len()) && !guest.contains(['/', '\0']);
            return if fits {
                Ok(())
            } else {
                Err(format!(
                    "cannot share {host} as `{guest}`: a guest without an image mounts it itself, by a \
                     tag of 1 to {SHARE_TAG_MAX} bytes without `/`; try HOSTDIR:TAG"
                ))
            };
        }
        let plain = guest.split('/').all(|part| part != "." && part != "..");
        let free = !SHARE_NOT_ON.contains(&guest.trim_end_matches('/'));
        let fits = guest.len() <= SHARE_PATH_MAX && !guest.contains('\0');
        if guest.starts_with('/') && plain && free && fits {
            return Ok(());
        }
        Err(format!(
            "cannot share {host} on `{guest}` in the guest: that must be an absolute path of at most \
             {SHARE_PATH_MAX} bytes without `..`, and none of /, /dev, /proc and /sys; try HOSTDIR:/DIR"
        ))
    }
}

/// Whether a machine, which was made from an image or not, can have these shares. Whether the folders
/// are there is for the host to say.
///
/// # Errors
/// What is wrong with which, for people.
pub fn check_shares(shares: &[Share], has_image: bool) -> Result<(), String> {
    if shares.len() > SHARES_MAX {
        return Err(format!("{} shared folders; {SHARES_MAX} are the most", shares.len()));
    }
    for (index, share) in shares.iter().enumerate() {
        share.check(has_image)?;
        let place = share.guest.trim_end_matches('/');
        let before = shares.get(..index).unwrap_or_default();
        if before.iter().any(|other| other.guest.trim_end_matches('/') == place) {
            return Err(format!("two folders are shared on {} in the guest", share.guest));
        }
    }
    Ok(())
}

/// A disk of a machine that is to be created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum NewDisk {
    /// An empty one of this size, in the machine's folder.
    Size(Size),
    /// A file that is there, which stays where it is.
    File(Disk),
}

/// `POST /machines`: a machine to be created.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateMachine {
    /// Its name: letters, digits and `-`, 63 at most.
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$")]
    pub name: String,
    /// What it is made of. With an image a copy of the image's disk comes before all other disks.
    #[serde(default)]
    pub config: MachineConfig,
    /// Disks after those of the configuration.
    #[serde(default)]
    pub disks: Vec<NewDisk>,
}

/// `POST /adopt`: a folder that is to be a machine of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AdoptMachine {
    /// An absolute path. A folder elsewhere stays there.
    #[schema(value_type = String, pattern = "^/")]
    pub folder: PathBuf,
    /// The machine's name; without one, the folder's.
    #[serde(default)]
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$")]
    pub name: Option<String>,
}

/// `POST /machines/{name}/rename`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenameMachine {
    /// What it is to be called.
    #[schema(pattern = r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$")]
    pub name: String,
}

/// A machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Machine {
    /// Its name.
    pub name: String,
    /// Its identity, which no other machine has.
    #[schema(value_type = String, format = Uuid)]
    pub id: Uuid,
    /// What it is doing.
    pub state: MachineState,
    /// When it was created or adopted.
    #[schema(value_type = String, format = DateTime)]
    pub created: Timestamp,
    /// Since when it runs.
    #[schema(value_type = Option<String>, format = DateTime)]
    pub started: Option<Timestamp>,
    /// Its process.
    pub pid: Option<u32>,
    /// How it ended the last time.
    pub last_exit: Option<Exit>,
    /// Where it is.
    pub folder: String,
    /// Its address in the network it is in.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub address: Option<Ipv4Addr>,
    /// It is removed when it ends.
    #[serde(default)]
    pub temporary: bool,
    /// The directories of its control group while it runs. None: it has no group.
    #[serde(default)]
    pub control_group: Vec<String>,
    /// What it is made of.
    pub config: MachineConfig,
}

/// What a machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// Nothing: no process.
    Stopped,
    /// It runs.
    Running,
    /// Its vCPUs stand still.
    Paused,
    /// Nothing, and its last run ended in a failure.
    Failed,
    /// Nothing, and it goes on where it was when it is started.
    Suspended,
}

impl MachineState {
    /// Whether there is a process.
    #[must_use]
    pub fn is_up(self) -> bool {
        matches!(self, Self::Running | Self::Paused)
    }

    /// The word for people and for JSON.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Stopped => "stopped",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Failed => "failed",
            Self::Suspended => "suspended",
        }
    }
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Exit {
    /// When.
    #[schema(value_type = String, format = DateTime)]
    pub time: Timestamp,
    /// Whether that is in order: it powered off, was stopped, or wrote to the debug-exit port.
    pub in_order: bool,
    /// For people.
    pub reason: String,
    /// What `berth vm run` would have as its exit status.
    pub status: u8,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_host_names() {
        for good in ["a", "A-1", "web-01", &"x".repeat(63)] {
            assert!(is_name(good), "{good}");
        }
        for bad in ["", "-a", "a/b", "..", "a.b", "a b", "é", &"x".repeat(64)] {
            assert!(!is_name(bad), "{bad}");
        }
    }

    #[test]
    fn shares_are_checked() {
        let share = |host: &str, guest: &str| Share {
            host: host.into(),
            guest: guest.into(),
            read_only: false,
        };
        let check = |guest: &str, has_image| check_shares(&[share("/a", guest)], has_image);
        for good in ["/data", "/a b/ü/", "/srv/..x"] {
            assert_eq!(check(good, true), Ok(()), "{good}");
        }
        for bad in ["", "data", "/", "//", "/a/../b", "/./a", "/proc/", "/dev", "/a\0"] {
            assert!(check(bad, true).is_err(), "{bad}");
        }
        assert!(check("data", false).is_ok() && check(&"x".repeat(36), false).is_ok());
        for bad in ["", "/data", "a/b", &"x".repeat(37)] {
            let error = check(bad, false).unwrap_err();
            assert!(error.contains("HOSTDIR:TAG"), "{error}");
        }
        assert!(
            check_shares(&[share("a", "/a")], true).is_err_and(|error| error.contains("absolute"))
        );
        let twice = check_shares(&[share("/a", "/x"), share("/b", "/x/")], true);
        assert!(twice.is_err_and(|error| error.contains("two folders")));
        assert!(check_shares(&vec![share("/a", "/x"); 9], true).is_err_and(|e| e.contains("9")));
        assert_eq!(share("/a", "t").tag(3, false), "t");
        assert_eq!(share("/a", "/t").tag(3, true), "share3");
    }
}
