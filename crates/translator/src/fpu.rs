//! The floating-point units: moving state between [`CpuState`], [`Area`] and the processor.
//!
//! While a vCPU runs, x87 state is in the processor's registers, and XMM/YMM and MXCSR are in the
//! area whenever Rust code runs. The state's XSAVE area is current only outside `run`.

use std::sync::LazyLock;

use berth_x86::state::XsaveArea;

use crate::layout::Area;

/// 512 bytes as FXSAVE wants them.
#[repr(C, align(64))]
pub struct Fx(pub [u8; 512]);

/// Offset of XMM0 in an FXSAVE image.
pub const XMM: usize = 160;
/// Offset of the upper halves of YMM in a standard XSAVE area.
pub const YMM_HIGH: usize = 576;

/// Stores the processor's x87 state (and vector registers, which mean nothing) as FXSAVE64 does.
///
/// The instruction and data pointers are zeroed: they would be host addresses.
pub fn store_x87() -> Fx {
    let mut fx = Fx([0; 512]);
    // SAFETY: writes 512 bytes to an aligned buffer of that size.
    unsafe { std::arch::asm!("fxsave64 [{}]", in(reg) fx.0.as_mut_ptr(), options(nostack)) };
    fx.0[8..24].fill(0);
    fx
}

/// Loads x87 state from the first 160 bytes of an FXSAVE image.
pub fn load_x87(image: &[u8; 160]) {
    let mut fx = store_x87();
    fx.0[..24].copy_from_slice(&image[..24]);
    fx.0[32..160].copy_from_slice(&image[32..160]);
    fx.0[24..32].copy_from_slice(&[0x80, 0x1f, 0, 0, 0, 0, 0, 0]);
    // SAFETY: reads 512 bytes; MXCSR is a valid value. Vector registers are declared clobbered.
    unsafe {
        std::arch::asm!(
            "fxrstor64 [{}]",
            in(reg) fx.0.as_ptr(),
            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
            out("xmm12") _, out("xmm13") _, out("xmm14") _, out("xmm15") _,
            options(nostack)
        );
    }
}

/// Loads what [`store_x87`] returned.
pub fn reload_x87(fx: &Fx) {
    load_x87(&bytes(&fx.0, 0));
}

/// Whether the control word unmasks an exception that suppresses stores.
pub fn unmasked() -> bool {
    control() & 0x1f != 0x1f
}

fn control() -> u16 {
    let mut control = 0u16;
    // SAFETY: stores the control word in the variable; does not wait.
    unsafe { std::arch::asm!("fnstcw [{}]", in(reg) &raw mut control, options(nostack)) };
    control
}

/// The x87 part after FNINIT.
pub fn initial_x87() -> [u8; 160] {
    let mut i = [0; 160];
    i[0] = 0x7f;
    i[1] = 0x03;
    i
}

fn bytes<const N: usize>(from: &[u8], at: usize) -> [u8; N] {
    let mut out = [0; N];
    if let Some(s) = from.get(at..at + N) {
        out.copy_from_slice(s);
    }
    out
}

/// Whether the host tells which state components are in their initial configuration (SDM vol. 1,
/// 13.6; XGETBV with ECX = 1).
pub fn knows_upper() -> bool {
    // CPUID is slow where the host is a virtual machine itself.
    static KNOWS: LazyLock<bool> = LazyLock::new(|| {
        use core::arch::x86_64::{__cpuid, __cpuid_count};
        __cpuid(0).eax >= 0xd && __cpuid_count(0xd, 1).eax & 4 != 0
    });
    *KNOWS
}

/// To be called after the upper halves of YMM registers were changed in the area.
pub fn upper_changed(area: &mut Area) {
    let used = || area.ymm.iter().any(|y| y[16..].iter().any(|&b| b != 0));
    area.upper = u64::from(!knows_upper() || used());
}

/// Takes the state's XSAVE area into the area's registers and the processor.
pub fn load(area: &mut Area) {
    let x: &XsaveArea = &area.state.xsave;
    let bv = x.0[512];
    let image = if bv & 1 != 0 { bytes::<160>(&x.0, 0) } else { initial_x87() };
    let mxcsr = u32::from_le_bytes(bytes::<4>(&x.0, 24)) & 0xffff;
    let mut ymm = [[0u8; 32]; 16];
    for (i, y) in ymm.iter_mut().enumerate() {
        if bv & 2 != 0 {
            y[..16].copy_from_slice(&bytes::<16>(&x.0, XMM + i * 16));
        }
        if bv & 4 != 0 {
            y[16..].copy_from_slice(&bytes::<16>(&x.0, YMM_HIGH + i * 16));
        }
    }
    area.ymm = ymm;
    upper_changed(area);
    area.mxcsr = if bv & 6 != 0 { mxcsr } else { 0x1f80 };
    load_x87(&image);
}

/// Brings the state's XSAVE area up to date.
pub fn save(area: &mut Area) {
    let fx = store_x87();
    let mut x = XsaveArea::default();
    x.0[..160].copy_from_slice(&fx.0[..160]);
    x.0[24..28].copy_from_slice(&area.mxcsr.to_le_bytes());
    x.0[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
    for (i, y) in area.ymm.iter().enumerate() {
        x.0[XMM + i * 16..XMM + i * 16 + 16].copy_from_slice(&y[..16]);
        x.0[YMM_HIGH + i * 16..YMM_HIGH + i * 16 + 16].copy_from_slice(&y[16..]);
    }
    x.0[512] = 7;
    area.state.xsave = x;
    // What pends for the guest must not hit the host's code.
    load_x87(&initial_x87());
}

/// FNSTENV: the 28-byte environment; masks all exceptions, as the instruction does.
pub fn environment() -> [u8; 28] {
    let mut env = [0u8; 28];
    // SAFETY: writes 28 bytes.
    unsafe { std::arch::asm!("fnstenv [{}]", in(reg) env.as_mut_ptr(), options(nostack)) };
    env[12..28].fill(0);
    env
}

/// FLDENV.
pub fn load_environment(env: &[u8; 28]) {
    // SAFETY: reads 28 bytes; any value is accepted by the instruction.
    unsafe { std::arch::asm!("fldenv [{}]", in(reg) env.as_ptr(), options(nostack)) };
}

/// FNSAVE: environment and registers; initializes the unit.
pub fn save_all() -> [u8; 108] {
    let mut image = [0u8; 108];
    // SAFETY: writes 108 bytes.
    unsafe { std::arch::asm!("fnsave [{}]", in(reg) image.as_mut_ptr(), options(nostack)) };
    image[12..28].fill(0);
    image
}

/// FRSTOR.
pub fn restore_all(image: &[u8; 108]) {
    // SAFETY: reads 108 bytes; any value is accepted by the instruction.
    unsafe { std::arch::asm!("frstor [{}]", in(reg) image.as_ptr(), options(nostack)) };
}

/// What an MMX store that faults leaves behind: top of stack 0; the tags stay.
pub fn clear_top() {
    let old = store_x87();
    let mut new = store_x87();
    let top = usize::from(old.0[3] >> 3 & 7);
    new.0[3] &= !0x38;
    // The image is in stack order.
    for i in 0..8 {
        let (to, from) = (32 + i * 16, 32 + ((i + 8 - top) & 7) * 16);
        new.0[to..to + 16].copy_from_slice(&old.0[from..from + 16]);
    }
    reload_x87(&new);
}

/// What every MMX instruction does: all registers valid, top of stack 0. Waits, so nothing may be
/// [`pending`].
pub fn enter_mmx() {
    let mut unused = 0u64;
    // SAFETY: writes 8 bytes to the variable; changes only tags and TOP of the x87 state, which is
    // the guest's.
    unsafe { std::arch::asm!("movq [{}], mm0", in(reg) &raw mut unused, options(nostack)) };
}

/// Whether an unmasked exception of the last x87 instruction kept it from storing its result: any
/// but "inexact".
pub fn suppressed() -> bool {
    status() & !control() & 0x1f != 0
}

fn status() -> u16 {
    let status: u16;
    // SAFETY: reads the status word; does not wait.
    unsafe { std::arch::asm!("fnstsw ax", out("ax") status, options(nomem, nostack)) };
    status
}

/// Whether an unmasked x87 exception waits to be raised by the next waiting instruction.
pub fn pending() -> bool {
    status() & 0x80 != 0
}
