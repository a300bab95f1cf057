//! The configuration space of a type-0 function.
//!
//! ```text
//! 0x00 vendor, device    0x08 revision, class   0x2c subsystem     0x3c interrupt line, pin
//! 0x04 command, status   0x10..0x28 BARs 0-5    0x34 capabilities  0x40.. capability bodies
//! ```
//!
//! A mask of writable bits does most of the work: the address bits of a BAR that are smaller than
//! its size are not writable, so the sizing protocol (write ones, read back) needs no code.

use thiserror::Error;

/// Bytes of configuration space reachable through the ports.
pub const CONFIG_SPACE_SIZE: usize = 256;
/// Base address registers of a type-0 function.
pub const BAR_COUNT: usize = 6;

const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const BARS: usize = 0x10;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
const INTERRUPT_PIN: usize = 0x3d;
const FIRST_CAPABILITY: usize = 0x40;

const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_BUS_MASTER: u8 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
const STATUS_CAPABILITIES: u8 = 1 << 4;

/// Why a function could not be built or attached.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PciError {
    /// A BAR is not a power of two of at least 16 bytes, or its index is taken or out of range.
    #[error("BAR {index} of {size:#x} bytes is not possible")]
    BadBar {
        /// Which BAR.
        index: usize,
        /// The size asked for.
        size: u32,
    },
    /// No room for another capability.
    #[error("capability {id:#x} of {len} bytes does not fit the configuration space")]
    CapabilitySpace {
        /// The capability's identifier.
        id: u8,
        /// Its length.
        len: usize,
    },
    /// All slots of the bus are taken.
    #[error("all {0} PCI slots are taken")]
    NoSlot(usize),
    /// The window for BARs is used up.
    #[error("no room for a BAR of {0:#x} bytes in the PCI memory window")]
    NoBarSpace(u64),
}

/// Who a function says it is.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity {
    /// Vendor.
    pub vendor: u16,
    /// Device.
    pub device: u16,
    /// Revision.
    pub revision: u8,
    /// Class, subclass and programming interface: 0xCCSSPP.
    pub class: u32,
    /// Subsystem vendor.
    pub subsystem_vendor: u16,
    /// Subsystem.
    pub subsystem: u16,
}

/// 256 bytes and which of their bits software may change.
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SPACE_SIZE],
    writable: [u8; CONFIG_SPACE_SIZE],
    bar_sizes: [u32; BAR_COUNT],
    last_capability: Option<usize>,
    next_capability: usize,
}

impl ConfigSpace {
    /// A function without BARs and capabilities; with interrupt pin INTA if `intx`.
    pub fn new(identity: &Identity, intx: bool) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_SPACE_SIZE],
            writable: [0; CONFIG_SPACE_SIZE],
            bar_sizes: [0; BAR_COUNT],
            last_capability: None,
            next_capability: FIRST_CAPABILITY,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND] = COMMAND_MEMORY | COMMAND_BUS_MASTER;
        if intx {
            space.writable[COMMAND + 1] = (COMMAND_INTX_DISABLE >> 8) as u8;
            space.writable[INTERRUPT_LINE] = 0xff;
            space.put(INTERRUPT_PIN, &[1]);
        }
        space
    }

    /// Declares a 32-bit memory BAR.
    ///
    /// # Errors
    /// The size is not a power of two of at least 16, or the BAR exists already.
    pub fn add_memory_bar(&mut self, index: usize, size: u32) -> Result<(), PciError> {
        let slot = self.bar_sizes.get_mut(index).filter(|s| **s == 0);
        let slot = slot.ok_or(PciError::BadBar { index, size })?;
        if !size.is_power_of_two() || size < 16 {
            return Err(PciError::BadBar { index, size });
        }
        *slot = size;
        let mask = (!(size - 1) & !0xf).to_le_bytes();
        for (target, bits) in self.writable.iter_mut().skip(BARS + index * 4).zip(mask) {
            *target = bits;
        }
        Ok(())
    }

    /// Appends a capability to the list; `body` follows the two bytes of identifier and link.
    /// Returns where the capability starts.
    ///
    /// # Errors
    /// No room left.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> Result<usize, PciError> {
        let start = self.next_capability;
        let end = start + 2 + body.len();
        let full = PciError::CapabilitySpace { id, len: body.len() };
        let link = u8::try_from(start).map_err(|_| full)?;
        if end > CONFIG_SPACE_SIZE {
            return Err(PciError::CapabilitySpace { id, len: body.len() });
        }
        self.put(start, &[id, 0]);
        self.put(start + 2, body);
        let from = self.last_capability.map_or(CAPABILITIES_POINTER, |last| last + 1);
        self.put(from, &[link]);
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_capability = Some(start);
        self.next_capability = end.next_multiple_of(4);
        Ok(start)
    }

    /// Lets software change the bits of `mask` from `offset` on.
    pub fn allow_writes(&mut self, offset: usize, mask: &[u8]) {
        for (target, bits) in self.writable.iter_mut().skip(offset).zip(mask) {
            *target |= bits;
        }
    }

    /// Reads; bytes past the end are all ones.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            *byte = self.bytes.get(offset.saturating_add(index)).copied().unwrap_or(0xff);
        }
    }

    /// Writes what is writable.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let target = self.bytes.iter_mut().zip(self.writable).skip(offset);
        for ((byte, mask), new) in target.zip(data) {
            *byte = (*byte & !mask) | (new & mask);
        }
    }

    /// The 16-bit register at `offset`.
    pub fn u16_at(&self, offset: usize) -> u16 {
        let mut raw = [0; 2];
        self.read(offset, &mut raw);
        u16::from_le_bytes(raw)
    }

    /// The 32-bit register at `offset`.
    pub fn u32_at(&self, offset: usize) -> u32 {
        let mut raw = [0; 4];
        self.read(offset, &mut raw);
        u32::from_le_bytes(raw)
    }

    /// Whether the function may raise its interrupt pin.
    pub fn intx_allowed(&self) -> bool {
        self.u16_at(COMMAND) & COMMAND_INTX_DISABLE == 0
    }

    /// Address and size of a BAR that exists, as programmed.
    pub fn bar(&self, index: usize) -> Option<(u64, u64)> {
        let size = self.bar_sizes.get(index).copied().filter(|size| *size > 0)?;
        let address = self.u32_at(BARS + index * 4) & !0xf;
        Some((u64::from(address), u64::from(size)))
    }

    /// Programs a BAR as firmware would.
    pub fn set_bar(&mut self, index: usize, address: u32) {
        self.write(BARS + index * 4, &address.to_le_bytes());
    }

    /// The BARs that respond now: none while memory decoding is off.
    pub fn decoded_bars(&self) -> [Option<(u64, u64)>; BAR_COUNT] {
        let decoding = self.bytes[COMMAND] & COMMAND_MEMORY != 0;
        std::array::from_fn(|index| self.bar(index).filter(|_| decoding))
    }

    /// All of it, by double words.
    pub fn save(&self) -> Vec<u32> {
        (0..CONFIG_SPACE_SIZE).step_by(4).map(|offset| self.u32_at(offset)).collect()
    }

    /// Writes what is writable as it was stored.
    ///
    /// # Errors
    /// What is not writable was different.
    pub fn restore(&mut self, stored: &[u32]) -> Result<(), &'static str> {
        let bytes: Vec<u8> = stored.iter().flat_map(|word| word.to_le_bytes()).collect();
        let fixed = self.bytes.iter().zip(self.writable).zip(&bytes);
        let differs = fixed.into_iter().any(|((now, mask), then)| (now ^ then) & !mask != 0);
        if bytes.len() != CONFIG_SPACE_SIZE || differs {
            return Err("a device in the place of another one");
        }
        self.write(0, &bytes);
        Ok(())
    }

    /// Changes bytes from the device side, whatever software may write.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(offset).zip(data) {
            *byte = *new;
        }
    }
}
