//! What an appliance says of itself, before any of its files.

use std::fmt;

use berth_api::v1::machine::{MachineConfig, is_name};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{ApplianceError, refused};
use crate::limits::{
    DISK_BYTES_MAX, DISKS_MAX, KERNEL_BYTES_MAX, MEMORY_BYTES_MAX, MODULE_BYTES_MAX, MODULES_MAX,
    SECTOR_BYTES, STATE_BYTES_MAX, WORDS_BYTES_MAX,
};

/// The first record.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Of this appliance: no other one has it.
    pub id: Uuid,
    /// The machine's name.
    pub name: String,
    /// When it was packed.
    pub created: Timestamp,
    /// What packed it.
    pub software: String,
    /// What the machine is made of: no kernel, no initrd and no disks, which are files.
    pub machine: MachineConfig,
    /// The files in the order of the stream: sorted by their roles.
    pub files: Vec<FileEntry>,
}

/// A file of an appliance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// What it is.
    pub role: Role,
    /// Its bytes.
    pub size: u64,
    /// Words of a Multiboot module.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub words: String,
    /// Of a disk: the guest may not write it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub read_only: bool,
}

/// What a file is, in the order they come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// What processors and devices hold (`machine.json`). First, so that a host on which they cannot go on
    /// reads no more than this.
    State,
    /// The kernel.
    Kernel,
    /// An initial RAM disk or a Multiboot module; several are in their order.
    Initrd,
    /// A disk, as the guest sees it; several are in their order.
    Disk,
    /// Memory. Last, so that whoever does not want it need not keep it.
    Memory,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "the kernel",
            Self::Initrd => "an initrd",
            Self::Disk => "a disk",
            Self::State => "the state of the processors",
            Self::Memory => "the memory",
        })
    }
}

impl FileEntry {
    /// A file without anything special.
    #[must_use]
    pub fn new(role: Role, size: u64) -> Self {
        Self { role, size, words: String::new(), read_only: false }
    }

    fn check(&self, machine: &MachineConfig) -> Result<(), ApplianceError> {
        let (role, size) = (self.role, self.size);
        let most = match role {
            Role::Kernel => KERNEL_BYTES_MAX,
            Role::Initrd => MODULE_BYTES_MAX,
            Role::Disk => DISK_BYTES_MAX,
            Role::State => STATE_BYTES_MAX,
            Role::Memory => MEMORY_BYTES_MAX,
        };
        if size == 0 || size > most {
            return Err(refused(format!(
                "{role} cannot have {size} bytes: 1 to {most} are possible"
            )));
        }
        if role == Role::Disk && !size.is_multiple_of(SECTOR_BYTES) {
            return Err(refused(format!(
                "a disk cannot have {size} bytes: {SECTOR_BYTES} must divide them"
            )));
        }
        if role == Role::Memory && size != machine.memory.bytes() {
            let said = machine.memory;
            return Err(refused(format!("its memory has {size} bytes, and the machine {said}")));
        }
        if self.read_only && role != Role::Disk {
            return Err(refused(format!("{role} is said to be read-only")));
        }
        let is_plain = !self.words.contains([',', '\0', '\n']);
        if !is_plain || self.words.len() > WORDS_BYTES_MAX {
            return Err(refused(format!("the words of {role} are none that a module can have")));
        }
        if role != Role::Initrd && !self.words.is_empty() {
            return Err(refused(format!("{role} has words, as only a module can")));
        }
        Ok(())
    }
}

impl Manifest {
    /// Whether it goes on where it was.
    #[must_use]
    pub fn has_state(&self) -> bool {
        self.files.iter().any(|file| file.role == Role::Memory)
    }

    /// Whether all of it is possible. What the machine is made of is for others to judge.
    ///
    /// # Errors
    /// [`ApplianceError::Manifest`].
    pub fn check(&self) -> Result<(), ApplianceError> {
        if !is_name(&self.name) {
            return Err(refused("the machine's name is none"));
        }
        let machine = &self.machine;
        let boots = machine.kernel.is_some() || machine.initrd.is_some();
        if boots || !machine.disks.is_empty() || !machine.shares.is_empty() {
            return Err(refused("it names files of a host"));
        }
        let sorted = self.files.is_sorted_by_key(|file| file.role);
        if !sorted {
            return Err(refused("its files are not in order"));
        }
        let count = |role| self.files.iter().filter(|file| file.role == role).count();
        let most = [
            (Role::Kernel, 1),
            (Role::Initrd, MODULES_MAX),
            (Role::Disk, DISKS_MAX),
            (Role::State, 1),
            (Role::Memory, 1),
        ];
        for (role, most) in most {
            if count(role) > most {
                return Err(refused(format!("{role} is there {} times", count(role))));
            }
        }
        if count(Role::Kernel) == 0 {
            return Err(refused("it has no kernel"));
        }
        if machine.image.is_some() && count(Role::Initrd) == 0 {
            return Err(refused("it was made from an image and has no initrd"));
        }
        if count(Role::State) != count(Role::Memory) {
            return Err(refused("it has memory or processors, but not both"));
        }
        self.files.iter().try_for_each(|file| file.check(machine))
    }
}
