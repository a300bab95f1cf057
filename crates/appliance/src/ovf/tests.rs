use super::{OvaFile, name_of, read, sums, write};
use crate::manifest::{FileEntry, Manifest, Role};

/// As VirtualBox writes it, shortened.
const BOX: &str = r##"<?xml version="1.0"?>
<Envelope ovf:version="1.0" xmlns="http://schemas.dmtf.org/ovf/envelope/1"
  xmlns:ovf="http://schemas.dmtf.org/ovf/envelope/1" xmlns:rasd="r">
  <References><File ovf:id="file1" ovf:href="box-disk001.vmdk"/></References>
  <DiskSection><Info>List of the virtual disks</Info>
    <Disk ovf:capacity="8388608" ovf:diskId="vmdisk1" ovf:fileRef="file1"
      ovf:format="http://www.vmware.com/interfaces/specifications/vmdk.html#streamOptimized"/>
  </DiskSection>
  <VirtualSystem ovf:id="my box">
    <VirtualHardwareSection>
      <Item><rasd:ResourceType>3</rasd:ResourceType><rasd:VirtualQuantity>2</rasd:VirtualQuantity></Item>
      <Item><rasd:AllocationUnits>MegaBytes</rasd:AllocationUnits>
        <rasd:ResourceType>4</rasd:ResourceType><rasd:VirtualQuantity>64</rasd:VirtualQuantity></Item>
      <Item><rasd:HostResource>/disk/vmdisk1</rasd:HostResource>
        <rasd:ResourceType>17</rasd:ResourceType></Item>
      <Item><rasd:ResourceType>10</rasd:ResourceType></Item>
    </VirtualHardwareSection>
  </VirtualSystem>
</Envelope>"##;

#[test]
fn what_others_write_is_read() {
    let found = read(BOX).unwrap();
    assert_eq!((found.cpus, found.memory_bytes, found.has_net), (2, 64 << 20, true));
    assert_eq!(found.disks.len(), 1);
    assert_eq!(found.disks[0].file.as_deref(), Some("box-disk001.vmdk"));
    assert_eq!(found.disks[0].bytes, 8 << 20);
    assert!(found.own.is_none());
    assert_eq!(name_of(&found.name), "my-box");
    assert_eq!(name_of("///"), "imported");
}

#[test]
fn what_is_written_is_read() {
    let mut manifest: Manifest = serde_json::from_value(serde_json::json!({
        "id": uuid::Uuid::from_u128(1), "name": "web", "created": "2026-01-01T00:00:00Z",
        "software": "a \"<&>", "machine": {"append": "a=\"b c\" <&'", "cpus": 3}, "files": [],
    }))
    .unwrap();
    manifest.files = [(Role::Kernel, 5), (Role::Initrd, 6), (Role::Disk, 1024), (Role::Disk, 512)]
        .map(|(role, size)| FileEntry::new(role, size))
        .to_vec();
    let file = |name: &str| OvaFile { name: name.into(), size: 7 };
    let files = ["web-kernel", "web-initrd0", "web-disk0.vmdk", "web-disk1.vmdk"].map(file);
    let found = read(&write(&manifest, &files).unwrap()).unwrap();
    assert_eq!((found.cpus, found.memory_bytes, found.has_net), (3, 512 << 20, true));
    let disks: Vec<_> = found.disks.iter().map(|d| (d.file.clone().unwrap(), d.bytes)).collect();
    assert_eq!(disks, [("web-disk0.vmdk".into(), 1024), ("web-disk1.vmdk".into(), 512)]);
    let (own, names) = found.own.unwrap();
    assert_eq!((own, names), (manifest, vec!["web-kernel".into(), "web-initrd0".into()]));
}

#[test]
fn what_is_wrong_is_refused() {
    let check = |from: &str, to: &str, part: &str| {
        assert!(BOX.contains(from), "{from}");
        let error = read(&BOX.replacen(from, to, 1)).unwrap_err().to_string();
        assert!(error.contains(part), "{part}: {error}");
    };
    check("box-disk001.vmdk", "../../etc/shadow", "not beside it");
    check("box-disk001.vmdk", "/etc/shadow", "not beside it");
    check("box-disk001.vmdk", "http://a", "not beside it");
    check("box-disk001.vmdk", "..", "not beside it");
    check("8388608", "18446744073709551615", "impossible size");
    check("8388608", "-1", "impossible size");
    check("ovf:fileRef=\"file1\"", "ovf:fileRef=\"file2\"", "`file2` is not described");
    check("/disk/vmdisk1", "/disk/other", "`other` is not described");
    check("/disk/vmdisk1", "/etc/passwd", "not in it");
    check(">64<", ">99999999999999999<", "memory");
    check(">2<", ">two<", "processors");
    check("<?xml version=\"1.0\"?>", "<!DOCTYPE a [<!ENTITY b \"c\">]>", "document type");
    check("</Envelope>", "", "ends too early");
    check("<DiskSection>", "<DiskSectio>", "no XML");
    check("ovf:id=\"file1\"", "ovf:id=\"file1\" ovf:chunkSize=\"9\"", "in pieces");
    check("<VirtualSystem ", "<VirtualSystem/><VirtualSystem ", "2 machines");
    let deep = "<a>".repeat(10_000);
    assert!(read(&deep).unwrap_err().to_string().contains("too many"));
    assert!(read("").is_err());
}

#[test]
fn lists_of_sums_are_read() {
    let text = "SHA256(a.ovf)= ABC\nSHA1(b (1).vmdk)= 12\n\nSHA512(c) = 3\r\n";
    let found = sums::read(text).unwrap();
    let shown: Vec<_> = found.iter().map(|s| (s.name.as_str(), s.hex.as_str())).collect();
    assert_eq!(shown, [("a.ovf", "abc"), ("b (1).vmdk", "12"), ("c", "3")]);
    assert!(sums::read("MD5(a)= 1").is_err() && sums::read("hello").is_err());
    let sum = sums::Algorithm::Sha1.sum(b"abc".as_slice()).unwrap();
    assert_eq!(sum, "a9993e364706816aba3e25717850c26c9cd0d89d");
}
