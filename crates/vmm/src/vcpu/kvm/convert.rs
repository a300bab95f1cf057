//! Between [`CpuState`] and the structures of KVM.

use berth_x86::state::{XsaveArea, flags, sreg};
use berth_x86::{CpuState, Segment, TableReg};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_SIPI_RECEIVED, KVM_MP_STATE_UNINITIALIZED, Msrs, kvm_debugregs, kvm_dtable,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Error, VcpuFd};

use crate::chips::lapic::page::Around;
use crate::chips::lapic::{self, MSR_TSC_DEADLINE};
use crate::pvclock::{MSR_SYSTEM_TIME, MSR_WALL_CLOCK};
use crate::vcpu::{Inside, reset};

type Result<T> = std::result::Result<T, (&'static str, Error)>;

const IA32_TSC: u32 = 0x10;
/// Where the header of an XSAVE area is, how long, and the parts that guests have: x87, SSE, AVX.
const HEADER: usize = 512;
const HEADER_SIZE: usize = 64;
const PARTS: u8 = 7;

/// Where the state keeps an MSR.
type Field = fn(&mut CpuState) -> &mut u64;

/// MSRs that are one field each.
const MSRS: [(u32, Field); 17] = [
    (0xc000_0081, |s| &mut s.star),
    (0xc000_0082, |s| &mut s.lstar),
    (0xc000_0083, |s| &mut s.cstar),
    (0xc000_0084, |s| &mut s.sfmask),
    (0xc000_0102, |s| &mut s.kernel_gs_base),
    (0xc000_0103, |s| &mut s.tsc_aux),
    (0x174, |s| &mut s.sysenter_cs),
    (0x175, |s| &mut s.sysenter_esp),
    (0x176, |s| &mut s.sysenter_eip),
    (0x277, |s| &mut s.pat),
    (0x3b, |s| &mut s.tsc_adjust),
    (0x1a0, |s| &mut s.misc_enable),
    (0x48, |s| &mut s.spec_ctrl),
    (0x2ff, |s| &mut s.mtrr_def_type),
    (0x17a, |s| &mut s.mcg_status),
    (0x250, |s| &mut s.mtrr_fixed[0]),
    (0x258, |s| &mut s.mtrr_fixed[1]),
];
/// The other MTRRs: first MSR, and which fields.
const MTRR_VARIABLE: u32 = 0x200;
const MTRR_FIXED_16K_A0000: u32 = 0x259;
const MTRR_FIXED_4K: u32 = 0x268;

fn mtrrs(state: &mut CpuState) -> Vec<(u32, &mut u64)> {
    let variable = (MTRR_VARIABLE..).zip(&mut state.mtrr_var);
    let fixed = [MTRR_FIXED_16K_A0000].into_iter().chain(MTRR_FIXED_4K..);
    variable.chain(fixed.zip(state.mtrr_fixed.iter_mut().skip(2))).collect()
}

fn to_segment(segment: &Segment) -> kvm_segment {
    let bit = |at: u16| (segment.attr >> at & 1) as u8;
    kvm_segment {
        base: segment.base,
        limit: segment.limit,
        selector: segment.selector,
        type_: segment.typ(),
        present: bit(7),
        dpl: segment.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(!segment.present()),
        padding: 0,
    }
}

fn from_segment(segment: &kvm_segment) -> Segment {
    let bit = |value: u8, at: u16| u16::from(value & 1) << at;
    let attr = u16::from(segment.type_ & 15)
        | bit(segment.s, 4)
        | u16::from(segment.dpl & 3) << 5
        | if segment.unusable != 0 { 0 } else { bit(segment.present, 7) }
        | bit(segment.avl, 12)
        | bit(segment.l, 13)
        | bit(segment.db, 14)
        | bit(segment.g, 15);
    Segment { base: segment.base, limit: segment.limit, selector: segment.selector, attr }
}

fn to_table(table: TableReg) -> kvm_dtable {
    kvm_dtable { base: table.base, limit: table.limit as u16, padding: [0; 3] }
}

fn from_table(table: kvm_dtable) -> TableReg {
    TableReg { base: table.base, limit: u32::from(table.limit), pad: 0 }
}

fn to_regs(state: &CpuState) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = state.gpr;
    let (rip, rflags) = (state.rip, state.rflags | flags::FIXED);
    kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    }
}

/// Gives a vCPU this state.
pub(super) fn set(fd: &VcpuFd, state: &CpuState) -> Result<()> {
    let mut sregs = fd.get_sregs().map_err(|e| ("KVM_GET_SREGS", e))?;
    set_sregs(&mut sregs, state);
    fd.set_sregs(&sregs).map_err(|e| ("KVM_SET_SREGS", e))?;
    fd.set_regs(&to_regs(state)).map_err(|e| ("KVM_SET_REGS", e))?;
    set_msrs(fd, state)?;

    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..kvm_xcrs::default() };
    xcrs.xcrs[0].value = state.xcr0;
    fd.set_xcrs(&xcrs).map_err(|e| ("KVM_SET_XCRS", e))?;
    let xsave = to_xsave(&state.xsave);
    // SAFETY: no dynamically enabled XSAVE features are in use, so KVM reads 4096 bytes, the size of
    // the structure.
    unsafe { fd.set_xsave(&xsave) }.map_err(|e| ("KVM_SET_XSAVE", e))?;

    let debug =
        kvm_debugregs { db: state.dr, dr6: state.dr6, dr7: state.dr7, ..kvm_debugregs::default() };
    fd.set_debug_regs(&debug).map_err(|e| ("KVM_SET_DEBUGREGS", e))?;
    let mut events = fd.get_vcpu_events().map_err(|e| ("KVM_GET_VCPU_EVENTS", e))?;
    events.interrupt.shadow = shadow(state.interrupt_shadow as u8);
    events.nmi.pending = u8::from(state.nmi_pending != 0);
    events.nmi.masked = u8::from(state.nmi_masked != 0);
    fd.set_vcpu_events(&events).map_err(|e| ("KVM_SET_VCPU_EVENTS", e))?;
    let mp_state = if state.halted != 0 { KVM_MP_STATE_HALTED } else { KVM_MP_STATE_RUNNABLE };
    match fd.set_mp_state(kvm_mp_state { mp_state }) {
        // Without KVM's interrupt controllers there is only "runnable".
        Err(_) if state.halted == 0 => Ok(()),
        result => result.map_err(|e| ("KVM_SET_MP_STATE", e)),
    }
}

fn set_sregs(sregs: &mut kvm_sregs, state: &CpuState) {
    let seg = |index: usize| to_segment(&state.seg[index]);
    (sregs.es, sregs.cs, sregs.ss) = (seg(sreg::ES), seg(sreg::CS), seg(sreg::SS));
    (sregs.ds, sregs.fs, sregs.gs) = (seg(sreg::DS), seg(sreg::FS), seg(sreg::GS));
    (sregs.tr, sregs.ldt) = (to_segment(&state.tr), to_segment(&state.ldtr));
    (sregs.gdt, sregs.idt) = (to_table(state.gdtr), to_table(state.idtr));
    (sregs.cr0, sregs.cr2, sregs.cr3) = (state.cr0, state.cr2, state.cr3);
    (sregs.cr4, sregs.efer) = (state.cr4, state.efer);
    sregs.interrupt_bitmap = [0; 4];
}

fn set_msrs(fd: &VcpuFd, state: &CpuState) -> Result<()> {
    let mut copy = state.clone();
    let fresh = reset::power_up();
    let mut wanted: Vec<(u32, u64, u64)> = Vec::new();
    for (index, field) in MSRS {
        wanted.push((index, *field(&mut copy), *field(&mut fresh.clone())));
    }
    let mut unset = fresh;
    let pairs = mtrrs(&mut copy).into_iter().zip(mtrrs(&mut unset));
    wanted.extend(pairs.map(|((index, value), (_, initial))| (index, *value, *initial)));
    if state.tsc_offset != 0 {
        wanted.push((IA32_TSC, host_tsc().wrapping_add(state.tsc_offset), 0));
    }
    for (index, data, initial) in wanted {
        let entry = kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
        let msrs =
            Msrs::from_entries(&[entry]).map_err(|_| ("KVM_SET_MSRS", Error::new(libc::ENOMEM)))?;
        match fd.set_msrs(&msrs) {
            Ok(1) => {}
            // One that this KVM does not have may keep its initial value.
            _ if data == initial => {}
            Ok(_) => tracing::warn!(msr = index, value = data, "KVM does not take an MSR"),
            Err(e) => return Err(("KVM_SET_MSRS", e)),
        }
    }
    Ok(())
}

/// The state of a vCPU.
pub(super) fn get(fd: &VcpuFd) -> Result<CpuState> {
    let regs = fd.get_regs().map_err(|e| ("KVM_GET_REGS", e))?;
    let sregs = fd.get_sregs().map_err(|e| ("KVM_GET_SREGS", e))?;
    let mut state = reset::power_up();
    state.gpr = [
        regs.rax, regs.rcx, regs.rdx, regs.rbx, regs.rsp, regs.rbp, regs.rsi, regs.rdi, regs.r8,
        regs.r9, regs.r10, regs.r11, regs.r12, regs.r13, regs.r14, regs.r15,
    ];
    (state.rip, state.rflags) = (regs.rip, regs.rflags);
    state.seg[sreg::ES] = from_segment(&sregs.es);
    state.seg[sreg::CS] = from_segment(&sregs.cs);
    state.seg[sreg::SS] = from_segment(&sregs.ss);
    state.seg[sreg::DS] = from_segment(&sregs.ds);
    state.seg[sreg::FS] = from_segment(&sregs.fs);
    state.seg[sreg::GS] = from_segment(&sregs.gs);
    (state.tr, state.ldtr) = (from_segment(&sregs.tr), from_segment(&sregs.ldt));
    (state.gdtr, state.idtr) = (from_table(sregs.gdt), from_table(sregs.idt));
    (state.cr0, state.cr2, state.cr3) = (sregs.cr0, sregs.cr2, sregs.cr3);
    (state.cr4, state.efer) = (sregs.cr4, sregs.efer);
    for (index, field) in MSRS {
        if let Some(value) = get_msr(fd, index) {
            *field(&mut state) = value;
        }
    }
    for (index, field) in mtrrs(&mut state) {
        if let Some(value) = get_msr(fd, index) {
            *field = value;
        }
    }
    if let Some(tsc) = get_msr(fd, IA32_TSC) {
        state.tsc_offset = tsc.wrapping_sub(host_tsc());
    }
    let xcrs = fd.get_xcrs().map_err(|e| ("KVM_GET_XCRS", e))?;
    if let Some(xcr0) = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0) {
        state.xcr0 = xcr0.value;
    }
    let xsave = fd.get_xsave().map_err(|e| ("KVM_GET_XSAVE", e))?;
    state.xsave = from_xsave(&xsave);
    let debug = fd.get_debug_regs().map_err(|e| ("KVM_GET_DEBUGREGS", e))?;
    (state.dr, state.dr6, state.dr7) = (debug.db, debug.dr6, debug.dr7);
    let events = fd.get_vcpu_events().map_err(|e| ("KVM_GET_VCPU_EVENTS", e))?;
    set_events(&mut state, &events);
    let halted = fd.get_mp_state().is_ok_and(|mp| mp.mp_state == KVM_MP_STATE_HALTED);
    state.halted = u32::from(halted);
    Ok(state)
}

/// The first parts of KVM's area, which has places for whatever the host has. What guests have no use of
/// (protection keys, AVX-512) is not told of by our CPUID.
fn from_xsave(kvm: &kvm_xsave) -> XsaveArea {
    let mut area = XsaveArea::default();
    let bytes = kvm.region.iter().flat_map(|word| word.to_le_bytes());
    for (to, from) in area.0.iter_mut().zip(bytes) {
        *to = from;
    }
    for (at, byte) in area.0.iter_mut().enumerate().skip(HEADER).take(HEADER_SIZE) {
        // The parts that are there, in the standard format.
        *byte &= if at == HEADER { PARTS } else { 0 };
    }
    area
}

fn to_xsave(area: &XsaveArea) -> kvm_xsave {
    let mut kvm = kvm_xsave::default();
    for (to, from) in kvm.region.iter_mut().zip(area.0.chunks_exact(4)) {
        *to = u32::from_le_bytes([from[0], from[1], from[2], from[3]]);
    }
    kvm
}

/// Between KVM's numbers of the shadows (MOV SS first) and ours (STI first).
fn shadow(bits: u8) -> u8 {
    bits >> 1 & 1 | (bits & 1) << 1
}

/// What waits to be delivered. An exception or a software interrupt under way comes again when its
/// instruction, at which RIP still is, is executed again; an NMI waits as before.
fn set_events(state: &mut CpuState, events: &kvm_vcpu_events) {
    state.interrupt_shadow = u32::from(shadow(events.interrupt.shadow));
    let begun = events.nmi.injected != 0;
    state.nmi_pending = u32::from(begun || events.nmi.pending != 0);
    state.nmi_masked = u32::from(!begun && events.nmi.masked != 0);
}

/// Whether a vCPU runs. To be asked before anything else: KVM acts on start-up messages by that.
pub(super) fn get_mp_state(fd: &VcpuFd) -> Result<u32> {
    Ok(fd.get_mp_state().map_err(|e| ("KVM_GET_MP_STATE", e))?.mp_state)
}

/// What is inside of a vCPU besides its registers.
pub(super) fn get_inside(fd: &VcpuFd, mp_state: u32, timing: Timing) -> Result<Inside> {
    let events = fd.get_vcpu_events().map_err(|e| ("KVM_GET_VCPU_EVENTS", e))?;
    let sregs = fd.get_sregs().map_err(|e| ("KVM_GET_SREGS", e))?;
    let kvm = fd.get_lapic().map_err(|e| ("KVM_GET_LAPIC", e))?;
    let msr = |index| get_msr(fd, index).unwrap_or(0);
    let around = Around {
        base: sregs.apic_base,
        deadline_tsc: msr(MSR_TSC_DEADLINE),
        tsc: msr(IA32_TSC),
        tsc_hz: timing.tsc_hz,
        now_ns: timing.now_ns,
        ran: timing.ran,
    };
    let apic = lapic::Registers::from_page(&kvm.regs.map(|byte| byte as u8), &around);
    let began = mp_state == KVM_MP_STATE_SIPI_RECEIVED;
    let waiting = [KVM_MP_STATE_UNINITIALIZED, KVM_MP_STATE_INIT_RECEIVED].contains(&mp_state);
    let acknowledged = events.interrupt.injected != 0 && events.interrupt.soft == 0;
    Ok(Inside {
        apic,
        waiting: waiting || began,
        startup: began.then_some(events.sipi_vector as u8),
        system_time: msr(MSR_SYSTEM_TIME),
        wall_clock: msr(MSR_WALL_CLOCK),
        acknowledged: acknowledged.then_some(events.interrupt.nr),
    })
}

/// Gives a vCPU what is inside of it, after its registers. Its timer counts from `now_ns`.
pub(super) fn set_inside(
    fd: &VcpuFd,
    index: u32,
    state: &CpuState,
    inside: &Inside,
    now_ns: u64,
) -> Result<()> {
    let mut sregs = fd.get_sregs().map_err(|e| ("KVM_GET_SREGS", e))?;
    sregs.apic_base = inside.apic.apic_base();
    sregs.cr8 = u64::from(inside.apic.priority_class());
    fd.set_sregs(&sregs).map_err(|e| ("KVM_SET_SREGS", e))?;
    // The deadline is one by this counter.
    set_msr(fd, IA32_TSC, host_tsc().wrapping_add(state.tsc_offset))?;
    let page = inside.apic.to_page(index, now_ns);
    let kvm = kvm_lapic_state { regs: page.map(|byte| byte as _) };
    fd.set_lapic(&kvm).map_err(|e| ("KVM_SET_LAPIC", e))?;
    for (msr, value) in [
        (MSR_TSC_DEADLINE, inside.apic.deadline()),
        (MSR_WALL_CLOCK, inside.wall_clock),
        (MSR_SYSTEM_TIME, inside.system_time),
    ] {
        if value != 0 {
            set_msr(fd, msr, value)?;
        }
    }
    let mp_state = match (inside.waiting, state.halted != 0) {
        (true, _) => KVM_MP_STATE_INIT_RECEIVED,
        (false, true) => KVM_MP_STATE_HALTED,
        (false, false) => KVM_MP_STATE_RUNNABLE,
    };
    fd.set_mp_state(kvm_mp_state { mp_state }).map_err(|e| ("KVM_SET_MP_STATE", e))
}

/// Sets one that this KVM has to have.
fn set_msr(fd: &VcpuFd, index: u32, data: u64) -> Result<()> {
    let entry = kvm_msr_entry { index, data, ..kvm_msr_entry::default() };
    let msrs =
        Msrs::from_entries(&[entry]).map_err(|_| ("KVM_SET_MSRS", Error::new(libc::ENOMEM)))?;
    match fd.set_msrs(&msrs) {
        Ok(1) => Ok(()),
        Ok(_) => Err(("KVM_SET_MSRS", Error::new(libc::EINVAL))),
        Err(e) => Err(("KVM_SET_MSRS", e)),
    }
}

/// When somebody looks.
#[derive(Clone, Copy)]
pub(super) struct Timing {
    pub(super) tsc_hz: u64,
    pub(super) now_ns: u64,
    pub(super) ran: bool,
}

fn get_msr(fd: &VcpuFd, index: u32) -> Option<u64> {
    let entry = kvm_msr_entry { index, ..kvm_msr_entry::default() };
    let mut msrs = Msrs::from_entries(&[entry]).ok()?;
    (fd.get_msrs(&mut msrs).ok()? == 1).then(|| msrs.as_slice().first().map(|e| e.data))?
}

fn host_tsc() -> u64 {
    // SAFETY: RDTSC exists on every x86-64 processor and only writes registers.
    unsafe { std::arch::x86_64::_rdtsc() }
}

#[cfg(test)]
mod tests {
    use super::{from_segment, from_xsave, set_events, shadow, to_segment, to_xsave};
    use crate::vcpu::reset;
    use berth_x86::state::{Segment, XsaveArea};
    use kvm_bindings::{kvm_vcpu_events, kvm_xsave};

    #[test]
    fn what_the_guest_does_not_have_is_left_out_of_its_extended_registers() {
        let mut kvm = kvm_xsave { region: [0x0101_0101; 1024], ..kvm_xsave::default() };
        // x87, SSE, AVX and protection keys; compacted.
        (kvm.region[128], kvm.region[129]) = (0x0207, 0);
        (kvm.region[130], kvm.region[131]) = (7, 1 << 31);
        let area = from_xsave(&kvm);
        let mut header = [0; 64];
        header[0] = 7;
        assert_eq!(area.0[512..576], header);
        assert!(area.0[..512].iter().chain(&area.0[576..]).all(|&byte| byte == 1));
        let again = to_xsave(&area);
        assert_eq!(from_xsave(&again), area);
        assert!(again.region[208..].iter().all(|&word| word == 0));
        assert_eq!(from_xsave(&to_xsave(&XsaveArea::default())), XsaveArea::default());
    }

    #[test]
    fn shadows_have_other_numbers() {
        assert_eq!([0, 1, 2, 3].map(shadow), [0, 2, 1, 3]);
    }

    #[test]
    fn an_nmi_that_was_not_begun_waits() {
        let mut state = reset::power_up();
        let mut events = kvm_vcpu_events::default();
        events.nmi.masked = 1;
        set_events(&mut state, &events);
        assert_eq!((state.nmi_pending, state.nmi_masked), (0, 1));
        events.nmi.injected = 1;
        events.interrupt.shadow = 2;
        set_events(&mut state, &events);
        assert_eq!((state.nmi_pending, state.nmi_masked, state.interrupt_shadow), (1, 0, 1));
    }

    #[test]
    fn segments_there_and_back() {
        for attr in [0x209b, 0xc093, 0xf3, 0x8b, 0x82, 0] {
            let segment = Segment { base: 0x1_0000, limit: 0xf_ffff, selector: 8, attr };
            assert_eq!(from_segment(&to_segment(&segment)), segment);
        }
    }
}
