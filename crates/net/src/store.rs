//! The files of networks: `networks/NAME.toml` of the state directory, described in
//! `docs/formats/networks.md`. A file is at every instant as before a change or as after it.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::error::{NetError, Result, file};
use crate::limits::{FILE_BYTES_MAX, MEMBERS_MAX};
use crate::subnet::Subnet;
use crate::view::Mac;

/// The version that is written.
const VERSION: u32 = 1;
/// How names of files that are not complete begin.
const UNFINISHED: &str = ".new-";
const ENDING: &str = ".toml";
/// Characters of a name: a label of DNS.
const NAME_MAX: usize = 63;

/// What is kept of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its name.
    pub name: String,
    /// Its identity, which its bridge is named after.
    pub id: Uuid,
    /// When it was created.
    pub created: Timestamp,
    /// Its addresses.
    pub subnet: Subnet,
    /// Members reach each other and nothing else.
    pub internal: bool,
    /// Who has addresses in it.
    pub members: Vec<Member>,
}

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its identity.
    pub id: Uuid,
    /// Its name: a single label.
    pub name: String,
    /// Its hardware address.
    pub mac: Mac,
    /// Its address.
    pub address: Ipv4Addr,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNetwork {
    version: u32,
    id: Uuid,
    created: Timestamp,
    subnet: String,
    #[serde(default)]
    internal: bool,
    #[serde(default, rename = "member", skip_serializing_if = "Vec::is_empty")]
    members: Vec<RawMember>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawMember {
    id: Uuid,
    name: String,
    mac: String,
    address: Ipv4Addr,
}

/// Whether this can be the name of a member, or in lower case of a network: a label of DNS.
#[must_use]
pub fn is_label(text: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || c == '-';
    !text.is_empty() && text.len() <= NAME_MAX && text.chars().all(good) && !text.starts_with('-')
}

/// A hardware address as text.
#[must_use]
pub fn mac_text(mac: Mac) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

fn parse_mac(text: &str) -> Option<Mac> {
    let byte = |part: &str| (part.len() == 2).then(|| u8::from_str_radix(part, 16).ok()).flatten();
    let bytes: Option<Vec<u8>> = text.split(':').map(byte).collect();
    bytes?.try_into().ok()
}

/// Reads what a network's file says.
///
/// # Errors
/// What is wrong with it.
pub fn parse(name: &str, text: &str) -> std::result::Result<Network, String> {
    let raw: RawNetwork = toml::from_str(text).map_err(|error| error.message().to_owned())?;
    if raw.version != VERSION {
        return Err(format!("version {} is not known here", raw.version));
    }
    let subnet: Subnet = raw.subnet.parse()?;
    if raw.members.len() > MEMBERS_MAX {
        return Err(format!("{} members; {MEMBERS_MAX} are the most", raw.members.len()));
    }
    let mut members: Vec<Member> = Vec::new();
    for RawMember { id, name, mac, address } in raw.members {
        let Some(bytes) = parse_mac(&mac) else {
            return Err(format!("`{mac}` is no hardware address"));
        };
        if !is_label(&name) {
            return Err(format!("`{name}` is no name of a member"));
        }
        let is_host = subnet.contains(address)
            && ![subnet.first(), subnet.gateway(), subnet.broadcast()].contains(&address);
        if !is_host || members.iter().any(|other| other.address == address || other.id == id) {
            return Err(format!("{name} cannot have {address}"));
        }
        members.push(Member { id, name, mac: bytes, address });
    }
    Ok(Network {
        name: name.to_owned(),
        id: raw.id,
        created: raw.created,
        subnet,
        internal: raw.internal,
        members,
    })
}

/// The directory of networks.
#[derive(Clone, Debug)]
pub struct Store {
    directory: PathBuf,
}

impl Store {
    /// That of a state directory. It need not exist.
    #[must_use]
    pub fn of(root: &Path) -> Self {
        Self { directory: root.join("networks") }
    }

    /// Where it is.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Reads all networks; what was not completed is removed. Files that are not understood are errors
    /// besides.
    ///
    /// # Errors
    /// The directory cannot be read.
    pub fn read(&self) -> Result<(Vec<Network>, Vec<NetError>)> {
        let (mut found, mut wrong) = (Vec::new(), Vec::new());
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok((found, wrong)),
            entries => entries.map_err(file("reading", &self.directory))?,
        };
        for entry in entries {
            let entry = entry.map_err(file("reading", &self.directory))?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            if name.starts_with(UNFINISHED) {
                // It was not there yet.
                let _ = fs::remove_file(entry.path());
            } else if let Some(name) = name.strip_suffix(ENDING)
                && is_label(name)
            {
                match read_one(name, &entry.path()) {
                    Ok(network) => found.push(network),
                    Err(error) => wrong.push(error),
                }
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok((found, wrong))
    }

    /// Writes a network's file.
    ///
    /// # Errors
    /// The system's; then the old one is still there.
    pub fn write(&self, network: &Network) -> Result<()> {
        let mut builder = fs::DirBuilder::new();
        let made = builder.recursive(true).mode(0o700).create(&self.directory);
        made.map_err(file("creating", &self.directory))?;
        let path = self.path(&network.name);
        let raw = RawNetwork {
            version: VERSION,
            id: network.id,
            created: network.created,
            subnet: network.subnet.to_string(),
            internal: network.internal,
            members: network.members.iter().map(RawMember::of).collect(),
        };
        let text = toml::to_string(&raw)
            .map_err(|error| NetError::Config { path: path.clone(), reason: error.to_string() })?;
        replace(&path, text.as_bytes())
    }

    /// Removes a network's file.
    ///
    /// # Errors
    /// The system's.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(file("removing", &path)(error))
            }
            _ => sync(&self.directory),
        }
    }

    /// Where the network of a name is.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}{ENDING}"))
    }
}

impl RawMember {
    fn of(member: &Member) -> Self {
        Self {
            id: member.id,
            name: member.name.clone(),
            mac: mac_text(member.mac),
            address: member.address,
        }
    }
}

fn read_one(name: &str, path: &Path) -> Result<Network> {
    let mut text = String::new();
    let opened = File::open(path).map_err(file("reading", path))?;
    let read = opened.take(FILE_BYTES_MAX + 1).read_to_string(&mut text);
    read.map_err(file("reading", path))?;
    let wrong = |reason| NetError::Config { path: path.to_owned(), reason };
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(wrong(format!("it has more than {FILE_BYTES_MAX} bytes")));
    }
    parse(name, &text).map_err(wrong)
}

/// Writes beside, syncs, renames, syncs the directory.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let beside = directory.join(format!("{UNFINISHED}{}", Uuid::new_v4()));
    let written = (|| {
        let options = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside);
        let mut file = options?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&beside, path)
    })();
    if written.is_err() {
        // The next start removes what cannot be removed now.
        let _ = fs::remove_file(&beside);
    }
    written.map_err(file("writing", path))?;
    sync(directory)
}

fn sync(directory: &Path) -> Result<()> {
    let synced = File::open(directory).and_then(|opened| opened.sync_all());
    synced.map_err(file("syncing", directory))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn network() -> Network {
        Network {
            name: "lab".into(),
            id: Uuid::from_u128(7),
            created: Timestamp::UNIX_EPOCH,
            subnet: "10.1.2.0/24".parse().unwrap(),
            internal: true,
            members: vec![Member {
                id: Uuid::from_u128(8),
                name: "web".into(),
                mac: [2, 0, 0, 0, 0, 0xab],
                address: Ipv4Addr::new(10, 1, 2, 2),
            }],
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::of(dir.path());
        assert_eq!(store.read().unwrap().0, []);
        store.write(&network()).unwrap();
        fs::write(store.directory().join(".new-1"), "half").unwrap();
        fs::write(store.directory().join("other.toml"), "version = 2").unwrap();
        let (found, wrong) = store.read().unwrap();
        assert_eq!(found, [network()]);
        assert!(wrong.len() == 1 && wrong[0].to_string().contains("other.toml"), "{wrong:?}");
        assert!(!store.directory().join(".new-1").exists());
        store.remove("lab").unwrap();
        assert_eq!(store.read().unwrap().0, []);
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let text = "version = 1\nid = \"00000000-0000-0000-0000-000000000007\"\ncreated = \
                    \"1970-01-01T00:00:00Z\"\nsubnet = \"10.1.2.0/24\"\n";
        let member = |name: &str, mac: &str, address: &str| {
            format!(
                "[[member]]\nid = \"00000000-0000-0000-0000-000000000008\"\nname = \"{name}\"\nmac = \
                 \"{mac}\"\naddress = \"{address}\"\n"
            )
        };
        let check = |more: String, part: &str| {
            let error = parse("lab", &format!("{text}{more}")).unwrap_err();
            assert!(error.contains(part), "{error}");
        };
        let mac = "02:00:00:00:00:01";
        assert!(parse("lab", &format!("{text}{}", member("a", mac, "10.1.2.9"))).is_ok());
        check("strange = 1\n".into(), "strange");
        check(member("a", mac, "10.1.3.1"), "10.1.3.1");
        check(member("a", mac, "10.1.2.1"), "10.1.2.1");
        check(member("a", mac, "10.1.2.255"), "10.1.2.255");
        check(member("a", "02:0:0:0:0:1", "10.1.2.2"), "hardware");
        check(member("a.b", mac, "10.1.2.2"), "a.b");
        check(member("a", mac, "10.1.2.2") + &member("b", mac, "10.1.2.3"), "10.1.2.3");
    }
}
