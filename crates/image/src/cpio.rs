//! Writes the archive format Linux unpacks as its initramfs: cpio "newc"
//! (Documentation/driver-api/early-userspace/buffer-format.rst). Everything belongs to root and has
//! no time, so that the same content gives the same bytes.

const TRAILER: &str = "TRAILER!!!";
const TYPE_FILE: u32 = 0o100_000;
const TYPE_DIRECTORY: u32 = 0o040_000;
const TYPE_CHARACTER_DEVICE: u32 = 0o020_000;

/// An archive being written.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// A file too large for the format's 32-bit sizes.
#[derive(Debug, thiserror::Error)]
#[error("{name} has {len} bytes, more than an initramfs can hold")]
pub struct TooLarge {
    /// Its name in the archive.
    pub name: String,
    /// Its size.
    pub len: usize,
}

impl Archive {
    /// Adds a directory.
    ///
    /// # Errors
    /// [`TooLarge`] never, in practice.
    pub fn directory(&mut self, name: &str) -> Result<(), TooLarge> {
        self.entry(name, TYPE_DIRECTORY | 0o755, (0, 0), &[])
    }

    /// Adds a file.
    ///
    /// # Errors
    /// [`TooLarge`] for 4 GiB and more.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<(), TooLarge> {
        self.entry(name, TYPE_FILE | (mode & 0o7777), (0, 0), content)
    }

    /// Adds a character device.
    ///
    /// # Errors
    /// [`TooLarge`] never, in practice.
    pub fn device(&mut self, name: &str, mode: u32, number: (u32, u32)) -> Result<(), TooLarge> {
        self.entry(name, TYPE_CHARACTER_DEVICE | (mode & 0o7777), number, &[])
    }

    /// Ends the archive.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.header(0, 0, 0, (0, 0), TRAILER);
        self.bytes
    }

    fn entry(
        &mut self,
        name: &str,
        mode: u32,
        device: (u32, u32),
        content: &[u8],
    ) -> Result<(), TooLarge> {
        let size = u32::try_from(content.len())
            .map_err(|_| TooLarge { name: name.to_owned(), len: content.len() })?;
        self.entries += 1;
        self.header(self.entries, mode, size, device, name);
        self.bytes.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn header(&mut self, inode: u32, mode: u32, size: u32, device: (u32, u32), name: &str) {
        let links = if mode & TYPE_DIRECTORY != 0 { 2 } else { 1 };
        let name_size = name.len() as u32 + 1;
        let fields = [inode, mode, 0, 0, links, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn the_hosts_cpio_reads_it_back() {
        let mut archive = Archive::default();
        archive.directory("dev").unwrap();
        archive.device("dev/console", 0o600, (5, 1)).unwrap();
        archive.file("init", 0o755, b"#!/bin/sh\n").unwrap();
        archive.file("odd", 0o644, b"12345").unwrap();
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701000000010000"));
        // busybox or cpio; where neither is installed, the header above has to do.
        let Ok(mut cpio) = Command::new("busybox")
            .args(["cpio", "-t", "-v"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
        else {
            return;
        };
        cpio.stdin.take().unwrap().write_all(&bytes).unwrap();
        let out = cpio.wait_with_output().unwrap();
        let list = String::from_utf8(out.stdout).unwrap();
        assert!(list.lines().count() == 4 && list.contains("crw-------"), "{list}");
        assert!(list.lines().any(|line| line.starts_with("-rwxr-xr-x") && line.ends_with("init")));
    }
}
