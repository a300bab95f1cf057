//! qcow2 images of any shape: opened, read, written, checked.
#![no_main]

use std::io;
use std::sync::Mutex;

use berth_disk::qcow2::check::check;
use berth_disk::qcow2::create::NewImage;
use berth_disk::qcow2::image::Image;
use berth_disk::storage::Storage;

/// Files in memory do not become larger.
const BYTES_MAX: usize = 4 << 20;
/// The largest disk that is used everywhere.
const STEPS: u64 = 8;

#[derive(Debug, Default)]
struct Memory(Mutex<Vec<u8>>);

impl Storage for Memory {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let data = self.0.lock().expect("one thread");
        let rest = usize::try_from(offset).ok().and_then(|at| data.get(at..)).unwrap_or_default();
        let count = rest.len().min(buffer.len());
        buffer[..count].copy_from_slice(&rest[..count]);
        Ok(count)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut data = self.0.lock().expect("one thread");
        let at =
            usize::try_from(offset).ok().filter(|at| at.saturating_add(bytes.len()) <= BYTES_MAX);
        let at = at.ok_or(io::ErrorKind::FileTooLarge)?;
        let len = data.len().max(at + bytes.len());
        data.resize(len, 0);
        data[at..at + bytes.len()].copy_from_slice(bytes);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn punch(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.lock().expect("one thread").len() as u64)
    }
}

/// A small image that is sound, to be damaged.
fn image() -> Vec<u8> {
    let new = NewImage { cluster_bits: 9, ..NewImage::new(256 << 10) };
    let file = std::sync::Arc::new(Memory::default());
    new.write(Box::new(Shared(std::sync::Arc::clone(&file)))).expect("a new image");
    let image = Image::open(Box::new(Shared(std::sync::Arc::clone(&file))), true, None);
    let image = image.expect("the new image");
    image.write(1000, &[7; 20_000]).expect("writing to it");
    image.write_zeroes(4096, 1024, false).expect("zeroes");
    drop(image);
    let data = file.0.lock().expect("one thread");
    data.clone()
}

#[derive(Debug)]
struct Shared(std::sync::Arc<Memory>);

impl Storage for Shared {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }

    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }
}

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    static SOUND: std::sync::OnceLock<Vec<u8>> = std::sync::OnceLock::new();
    let Some((how, data)) = data.split_first() else { return };
    let bytes = if how & 1 == 0 {
        data.to_vec()
    } else {
        // Pieces of four bytes: where, and two bytes for there.
        let mut bytes = SOUND.get_or_init(image).clone();
        for piece in data.chunks_exact(4) {
            let at = usize::from(u16::from_le_bytes([piece[0], piece[1]]));
            for (slot, new) in bytes.iter_mut().skip(at).zip(&piece[2..]) {
                *slot = *new;
            }
        }
        bytes
    };
    // Whether it can be used does not matter; that it does not panic, hang or take much memory does.
    let _ = check(&Memory(Mutex::new(bytes.clone())));
    let storage = Box::new(Memory(Mutex::new(bytes)));
    let Ok(image) = Image::open(storage, how & 2 == 0, None) else { return };
    let mut buffer = vec![0; 3000];
    for step in 0..STEPS {
        let at = image.size().saturating_sub(3000) / STEPS * step;
        let _ = image.read(at, &mut buffer);
        let _ = image.extent(at, 3000);
        let _ = image.write(at, &buffer);
        let _ = image.discard(at, 2048);
        let _ = image.write_zeroes(at, 2048, how & 4 == 0);
        if step % 3 == 0 {
            let _ = image.flush();
        }
    }
});
