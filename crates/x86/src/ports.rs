//! Who may use I/O ports (Intel SDM vol. 1, 19.5).

use crate::desc::wrap;
use crate::platform::{Access, LinearMem};
use crate::state::{CpuState, Exception};

/// Where a 32-bit or 64-bit TSS says where its I/O permission bitmap is.
const BITMAP_POINTER: u64 = 0x66;

/// Checks an access of `size` bytes (1, 2 or 4) to `port`: allowed with CPL <= IOPL (but for
/// virtual-8086 mode), in real mode, or when the bits of all its bytes in the bitmap of the TSS are clear.
///
/// # Errors
/// #GP(0) when the access is not allowed; faults of reading the TSS.
pub fn check(
    cpu: &mut CpuState,
    mem: &mut dyn LinearMem,
    port: u16,
    size: u8,
) -> Result<(), Exception> {
    if !cpu.protected() || !cpu.virtual_8086() && cpu.cpl() <= cpu.iopl() {
        return Ok(());
    }
    let refuse = Exception::gp(0);
    // A 16-bit TSS has no bitmap.
    if !cpu.tr.present() || cpu.tr.typ() & 8 == 0 {
        return Err(refuse);
    }
    let pointer = read_u16(cpu, mem, BITMAP_POINTER)?;
    let bits = read_u16(cpu, mem, u64::from(pointer) + u64::from(port >> 3))?;
    let wanted = ((1u32 << size) - 1) << (port & 7);
    if u32::from(bits) & wanted == 0 { Ok(()) } else { Err(refuse) }
}

/// Reads two bytes of the TSS, #GP(0) when they are not within its limit.
fn read_u16(cpu: &mut CpuState, mem: &mut dyn LinearMem, offset: u64) -> Result<u16, Exception> {
    if offset + 1 > u64::from(cpu.tr.limit) {
        return Err(Exception::gp(0));
    }
    let mut bytes = [0; 2];
    let at = wrap(cpu, cpu.tr.base.wrapping_add(offset));
    mem.read(cpu, at, &mut bytes, Access::System)?;
    Ok(u16::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::check;
    use crate::fake::{Flat, TSS, long, protected, real};
    use crate::state::{Exception, flags};

    #[test]
    fn iopl_and_bitmap() {
        let mut mem = Flat::new();
        mem.put(TSS + 0x66, 0x68u16.to_le_bytes());
        // Port 0x3f8 and 0x3f9 are open, all others closed.
        for byte in 0..=0x80 {
            mem.put(TSS + 0x68 + byte, [0xff]);
        }
        mem.put(TSS + 0x68 + 0x7f, [0xfc]);
        for (port, size, open) in [
            (0x3f8, 1, true),
            (0x3f9, 1, true),
            (0x3fa, 1, false),
            (0x3f8, 2, true),
            (0x3f9, 2, false),
            (0x3f8, 4, false),
            (0x3f7, 2, false),
            (0x70, 1, false),
            // Beyond the limit of the TSS.
            (0x400, 1, false),
        ] {
            for mut cpu in [long(3), protected(3)] {
                cpu.tr.limit = 0x68 + 0x80;
                let expected = if open { Ok(()) } else { Err(Exception::gp(0)) };
                assert_eq!(check(&mut cpu, &mut mem, port, size), expected, "{port:#x} {size}");
                cpu.rflags |= flags::IOPL;
                assert_eq!(check(&mut cpu, &mut mem, port, size), Ok(()));
            }
            assert_eq!(check(&mut long(0), &mut mem, port, size), Ok(()));
            assert_eq!(check(&mut real(), &mut mem, port, size), Ok(()));
        }
        let mut cpu = protected(3);
        cpu.tr.attr = 0x83;
        assert_eq!(check(&mut cpu, &mut mem, 0x3f8, 1), Err(Exception::gp(0)));
    }
}
