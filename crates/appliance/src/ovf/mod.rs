//! OVF 1.0, as an OVA has it: the description of one machine, read without trust and written.
//!
//! Only what Berth has is read: processors, memory, disks, whether there is a network card. [`sums`] is
//! the list of checksums beside it. What a machine of Berth boots is in files of their own, which the
//! section `berth:MachineSection` names; others leave it out.

pub mod sums;
mod xml;

use std::fmt::Write as _;

use berth_api::v1::machine::is_name;
use quick_xml::escape::escape;

use crate::limits::DISK_BYTES_MAX;
use crate::manifest::{Manifest, Role};
use crate::ovf::xml::Element;

/// Bytes of memory units when nothing is said.
const MEGABYTE: u64 = 1 << 20;
/// Where our section comes from.
const NAMESPACE: &str = "https://github.com/berth/berth/ovf/1";

/// Why a description is of no use.
#[derive(Debug, thiserror::Error)]
#[error("the OVF description cannot be used: {0}")]
pub struct OvfError(pub String);

fn bad<T>(reason: impl Into<String>) -> Result<T, OvfError> {
    Err(OvfError(reason.into()))
}

/// A machine that was described.
#[derive(Clone, Debug, PartialEq)]
pub struct Described {
    /// What it is called; perhaps no name that a machine here can have.
    pub name: String,
    /// Virtual processors.
    pub cpus: u64,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// Whether it has a network card.
    pub has_net: bool,
    /// Its disks in their order.
    pub disks: Vec<DescribedDisk>,
    /// What Berth says of it, if Berth packed it, with the files of its kernel and initrd in their order.
    pub own: Option<(Manifest, Vec<String>)>,
}

/// A disk that was described.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescribedDisk {
    /// Its file, beside the description; none if it is empty.
    pub file: Option<String>,
    /// Its bytes.
    pub bytes: u64,
    /// What it is said to hold: an address that names a format.
    pub format: String,
}

/// Reads a description.
///
/// # Errors
/// [`OvfError`].
pub fn read(text: &str) -> Result<Described, OvfError> {
    let root = xml::parse(text)?;
    if root.name != "Envelope" {
        return bad(format!("it is a `{}`", root.name));
    }
    let machines: Vec<_> = root.find("VirtualSystem").collect();
    let [system] = machines.as_slice() else {
        return bad(format!("it has {} machines; one is possible", machines.len()));
    };
    let mut found = Described {
        name: system.attribute("id").unwrap_or_default().to_owned(),
        cpus: 1,
        memory_bytes: 512 * MEGABYTE,
        has_net: false,
        disks: Vec::new(),
        own: None,
    };
    for item in system.find("Item").chain(system.find("StorageItem")) {
        let text = |name: &str| item.child(name).map(|child| child.text.trim());
        let quantity = || text("VirtualQuantity").and_then(|text| text.parse::<u64>().ok());
        match text("ResourceType") {
            Some("3") => match quantity() {
                Some(cpus) => found.cpus = cpus,
                None => return bad("its number of processors is none"),
            },
            Some("4") => {
                let unit = text("AllocationUnits").map_or(Some(MEGABYTE), unit);
                let bytes = quantity().zip(unit).and_then(|(count, unit)| count.checked_mul(unit));
                match bytes {
                    Some(bytes) => found.memory_bytes = bytes,
                    None => return bad("its memory is none"),
                }
            }
            Some("10") => found.has_net = true,
            Some("17" | "31") => {
                let Some(resource) = text("HostResource") else { continue };
                found.disks.push(disk(&root, resource)?);
            }
            _ => {}
        }
    }
    if let Some(section) = root.find("MachineSection").next() {
        found.own = Some(own(&root, section)?);
    }
    Ok(found)
}

/// `byte * 2^20`, or the words that older descriptions have.
fn unit(text: &str) -> Option<u64> {
    let text = text.trim();
    if let Some(rest) = text.strip_prefix("byte") {
        let rest = rest.trim();
        if rest.is_empty() {
            return Some(1);
        }
        let power = rest.strip_prefix('*')?.trim().strip_prefix("2^")?.trim();
        return 1_u64.checked_shl(power.parse().ok()?).filter(|unit| *unit > 0);
    }
    match text {
        "KiloBytes" | "KB" => Some(1 << 10),
        "MegaBytes" | "MB" => Some(1 << 20),
        "GigaBytes" | "GB" => Some(1 << 30),
        _ => None,
    }
}

fn disk(root: &Element, resource: &str) -> Result<DescribedDisk, OvfError> {
    let id = resource.rsplit('/').next().unwrap_or_default();
    if !resource.contains("/disk/") {
        return bad(format!("a disk is `{resource}`, which is not in it"));
    }
    let with = |name: &'static str, key: &'static str, id: &str| {
        let id = id.to_owned();
        root.find(name).find(move |found| found.attribute(key) == Some(id.as_str()))
    };
    let Some(disk) = with("Disk", "diskId", id) else {
        return bad(format!("the disk `{id}` is not described"));
    };
    if disk.attribute("parentRef").is_some() {
        return bad(format!("the disk `{id}` is based on another one"));
    }
    let unit = disk.attribute("capacityAllocationUnits").map_or(Some(1), unit);
    let count = disk.attribute("capacity").and_then(|count| count.parse::<u64>().ok());
    let bytes = count.zip(unit).and_then(|(count, unit)| count.checked_mul(unit));
    let Some(bytes) = bytes.filter(|bytes| *bytes <= DISK_BYTES_MAX) else {
        return bad(format!("the disk `{id}` has an impossible size"));
    };
    let file = match disk.attribute("fileRef") {
        None => None,
        Some(reference) => {
            let Some(file) = with("File", "id", reference) else {
                return bad(format!("the file `{reference}` is not described"));
            };
            if file.attribute("compression").is_some_and(|how| !how.is_empty() && how != "identity")
                || file.attribute("chunkSize").is_some()
            {
                return bad(format!("the file `{reference}` is compressed or in pieces"));
            }
            Some(file_name(file.attribute("href").unwrap_or_default())?)
        }
    };
    let format = disk.attribute("format").unwrap_or_default().to_owned();
    Ok(DescribedDisk { file, bytes, format })
}

/// A name that stays beside the description.
fn file_name(name: &str) -> Result<String, OvfError> {
    let is_plain = !name.is_empty() && name != "." && name != ".." && !name.contains(['/', '\0']);
    match is_plain && !name.contains("://") {
        true => Ok(name.to_owned()),
        false => bad(format!("the file `{name}` is not beside it")),
    }
}

fn own(root: &Element, section: &Element) -> Result<(Manifest, Vec<String>), OvfError> {
    let text = section.attribute("manifest").unwrap_or_default();
    let manifest: Manifest = serde_json::from_str(text)
        .map_err(|error| OvfError(format!("what Berth says of it is not understood: {error}")))?;
    manifest.check().map_err(|error| OvfError(error.to_string()))?;
    let mut names = Vec::new();
    let files = manifest.files.iter().filter(|file| is_boot(file.role)).enumerate();
    for (index, _) in files {
        let id = format!("berth-file{index}");
        let mut all = root.find("File");
        match all.find(|file| file.attribute("id") == Some(id.as_str())) {
            Some(file) => names.push(file_name(file.attribute("href").unwrap_or_default())?),
            None => return bad(format!("the file `{id}` is not described")),
        }
    }
    Ok((manifest, names))
}

/// Whether a file is not a disk and in an OVA all the same.
#[must_use]
pub fn is_boot(role: Role) -> bool {
    matches!(role, Role::Kernel | Role::Initrd)
}

/// A name for a machine, of whatever it was called.
#[must_use]
pub fn name_of(said: &str) -> String {
    let good = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let name: String = said.chars().map(good).collect();
    let name = name.trim_matches('-').chars().take(63).collect::<String>();
    if is_name(&name) { name } else { "imported".to_owned() }
}

/// A file of an OVA.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OvaFile {
    /// Its name, beside the description.
    pub name: String,
    /// Its bytes there.
    pub size: u64,
}

/// Writes a description. `files` are those of the manifest, in its order; disks are VMDK,
/// stream-optimized.
///
/// # Errors
/// [`OvfError`] when the manifest cannot be written.
pub fn write(manifest: &Manifest, files: &[OvaFile]) -> Result<String, OvfError> {
    let json = serde_json::to_string(manifest).map_err(|error| OvfError(error.to_string()))?;
    let (mut references, mut disks, mut items) = (String::new(), String::new(), String::new());
    let (mut boot, mut number) = (0, 0);
    for (entry, file) in manifest.files.iter().zip(files) {
        let (name, size) = (escape(file.name.as_str()), file.size);
        let id = match is_boot(entry.role) {
            true => format!("berth-file{boot}"),
            false => format!("file{number}"),
        };
        // Writing to a string does not fail.
        let _ = writeln!(
            references,
            "    <File ovf:id=\"{id}\" ovf:href=\"{name}\" ovf:size=\"{size}\"/>"
        );
        if is_boot(entry.role) {
            boot += 1;
            continue;
        }
        let capacity = entry.size;
        let _ = writeln!(
            disks,
            "    <Disk ovf:diskId=\"disk{number}\" ovf:fileRef=\"{id}\" ovf:capacity=\"{capacity}\" \
             ovf:capacityAllocationUnits=\"byte\" ovf:format=\"{VMDK}\"/>"
        );
        let instance = number + 20;
        let _ = write!(
            items,
            "      <Item>\n        <rasd:AddressOnParent>{number}</rasd:AddressOnParent>\n        \
             <rasd:ElementName>disk{number}</rasd:ElementName>\n        \
             <rasd:HostResource>ovf:/disk/disk{number}</rasd:HostResource>\n        \
             <rasd:InstanceID>{instance}</rasd:InstanceID>\n        \
             <rasd:Parent>3</rasd:Parent>\n        \
             <rasd:ResourceType>17</rasd:ResourceType>\n      </Item>\n"
        );
        number += 1;
    }
    let machine = &manifest.machine;
    Ok(TEMPLATE
        .replace("@references@\n", &references)
        .replace("@disks@\n", &disks)
        .replace("@items@\n", &items)
        .replace("@name@", &manifest.name)
        .replace("@cpus@", &machine.cpus.to_string())
        .replace("@megabytes@", &machine.memory.bytes().div_ceil(MEGABYTE).to_string())
        .replace("@namespace@", NAMESPACE)
        // Last: it may hold anything.
        .replace("@manifest@", &escape(json.as_str())))
}

/// What says that a disk is a stream-optimized VMDK.
pub const VMDK: &str = "http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized";

const TEMPLATE: &str = include_str!("template.ovf");

#[cfg(test)]
mod tests;
