//! The local APIC of one vCPU (Intel SDM vol. 3, chapter 11), as xAPIC and as x2APIC.
//!
//! This module has the registers and the priorities, `timer` the timer, `message` what travels
//! between APICs. What an access causes outside (an IPI, an EOI for the I/O APIC) is returned as an
//! [`Effect`], so that no two APICs are ever locked at once.

pub mod message;
pub mod page;
mod timer;

#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};

use crate::chips::lapic::message::{Delivery, Icr};
use crate::chips::lapic::timer::Timer;
use crate::clock::Clock;
use crate::memory::LAPIC_BASE;
use crate::timer::Alarm;

/// IA32_APIC_BASE.
pub const MSR_APIC_BASE: u32 = 0x1b;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// The first MSR of an x2APIC; there are 256.
pub const MSR_X2APIC: u32 = 0x800;

/// Bits of IA32_APIC_BASE.
mod base {
    pub const BSP: u64 = 1 << 8;
    pub const EXTENDED: u64 = 1 << 10;
    pub const ENABLED: u64 = 1 << 11;
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
}

/// Register numbers: the xAPIC offset divided by 16, which is also the x2APIC MSR less 0x800.
mod register {
    pub const ID: u32 = 0x02;
    pub const VERSION: u32 = 0x03;
    pub const TPR: u32 = 0x08;
    pub const APR: u32 = 0x09;
    pub const PPR: u32 = 0x0a;
    pub const EOI: u32 = 0x0b;
    pub const LDR: u32 = 0x0d;
    pub const DFR: u32 = 0x0e;
    pub const SVR: u32 = 0x0f;
    pub const ISR: u32 = 0x10;
    pub const TMR: u32 = 0x18;
    pub const IRR: u32 = 0x20;
    pub const ESR: u32 = 0x28;
    pub const ICR_LOW: u32 = 0x30;
    pub const ICR_HIGH: u32 = 0x31;
    pub const LVT_TIMER: u32 = 0x32;
    pub const LVT_ERROR: u32 = 0x37;
    pub const TIMER_INITIAL: u32 = 0x38;
    pub const TIMER_CURRENT: u32 = 0x39;
    pub const TIMER_DIVIDE: u32 = 0x3e;
    pub const SELF_IPI: u32 = 0x3f;
}

/// Indexes of [`Registers::lvt`], in register order.
mod lvt {
    pub const TIMER: usize = 0;
    pub const LINT0: usize = 3;
    pub const LINT1: usize = 4;
    pub const ERROR: usize = 5;
    pub const COUNT: usize = 6;
    pub const MASKED: u32 = 1 << 16;
    pub const LEVEL: u32 = 1 << 15;
    /// Which bits of each entry can be written.
    pub const WRITABLE: [u32; COUNT] =
        [0x0007_00ff, 0x1_07ff, 0x1_07ff, 0x1_a7ff, 0x1_a7ff, 0x1_00ff];
}

/// Version 0x14, six LVT entries (the last is number 5), no EOI-broadcast suppression.
const VERSION: u32 = 0x0005_0014;
/// Bit of the spurious-interrupt register: software has enabled the APIC.
const SVR_ENABLED: u32 = 1 << 8;
/// Bits of the error status register.
const ERROR_SEND_VECTOR: u32 = 1 << 5;
const ERROR_RECEIVE_VECTOR: u32 = 1 << 6;
const ERROR_REGISTER: u32 = 1 << 7;

/// How an APIC makes its vCPU notice; called without locks held by the APIC.
pub trait CpuSignals: Send + Sync {
    /// There may be an interrupt to take.
    fn interrupt(&self);
    /// A non-maskable interrupt.
    fn nmi(&self);
    /// INIT: the vCPU resets and waits for a start-up message.
    fn init(&self);
    /// Start-up message: a vCPU that waits for one starts at `vector << 12`.
    fn startup(&self, vector: u8);
}

/// What an access asks others to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Send this interrupt command to APICs.
    Send(Icr),
    /// A level-triggered interrupt ended; the I/O APIC has to know the vector.
    Eoi(u8),
}

/// A set of 256 vectors.
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct VectorSet([u32; 8]);

impl VectorSet {
    fn set(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] |= 1 << (vector & 31);
    }
    fn clear(&mut self, vector: u8) {
        self.0[usize::from(vector >> 5)] &= !(1 << (vector & 31));
    }
    fn has(&self, vector: u8) -> bool {
        self.0[usize::from(vector >> 5)] >> (vector & 31) & 1 == 1
    }
    fn highest(&self) -> Option<u8> {
        let word = self.0.iter().rposition(|&bits| bits != 0)?;
        Some((word as u32 * 32 + 31 - self.0[word].leading_zeros()) as u8)
    }
    fn word(&self, index: u32) -> u32 {
        self.0.get(index as usize).copied().unwrap_or(0)
    }
}

/// All of a local APIC, as it is stored.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    base: u64,
    tpr: u8,
    ldr: u32,
    dfr: u32,
    svr: u32,
    irr: VectorSet,
    isr: VectorSet,
    tmr: VectorSet,
    /// Errors seen since ESR was last written, and what ESR shows.
    errors: u32,
    esr: u32,
    icr: u64,
    lvt: [u32; lvt::COUNT],
    timer: Timer,
}

/// The local APIC of one vCPU.
pub struct Lapic {
    id: u32,
    clock: Arc<dyn Clock>,
    signals: Arc<dyn CpuSignals>,
    registers: Mutex<Registers>,
}

impl Lapic {
    /// An APIC after power-up. With `bootstrap`, the state a BIOS leaves: the 8259 pair reaches the
    /// vCPU through LINT0.
    #[must_use]
    pub fn new(
        id: u32,
        bootstrap: bool,
        clock: Arc<dyn Clock>,
        signals: Arc<dyn CpuSignals>,
    ) -> Arc<Self> {
        let bsp = if bootstrap { base::BSP } else { 0 };
        let registers = Registers::reset(LAPIC_BASE | base::ENABLED | bsp);
        Arc::new(Self { id, clock, signals, registers: Mutex::new(registers) })
    }

    /// Connects the timer; it expires into [`Lapic::timer_expired`].
    pub fn set_alarm(&self, alarm: Arc<dyn Alarm>) {
        self.lock().timer.set_alarm(alarm);
    }

    /// What is to be stored.
    #[must_use]
    pub fn save(&self) -> Registers {
        self.lock().clone()
    }

    /// Puts back what was stored, when the clock has been set forward by `ahead_ns` since.
    pub fn restore(&self, saved: Registers, ahead_ns: i64) {
        let now = self.clock.now_ns();
        self.change(|registers| {
            let timer = std::mem::take(&mut registers.timer);
            *registers = saved;
            registers.timer.go_on(timer, ahead_ns, now);
        });
    }

    /// The APIC's number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.id
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs `change`; afterwards, tells the vCPU when something became deliverable.
    fn change<T>(&self, change: impl FnOnce(&mut Registers) -> T) -> T {
        let mut registers = self.lock();
        let result = change(&mut registers);
        let pending = registers.deliverable().is_some();
        drop(registers);
        if pending {
            self.signals.interrupt();
        }
        result
    }

    /// After INIT: as after power-up, but mode and address stay.
    pub fn reset(&self) {
        let mut registers = self.lock();
        let base = registers.base;
        let timer = std::mem::take(&mut registers.timer);
        *registers = Registers::reset(base);
        registers.timer = timer;
        registers.timer.stop();
    }

    /// IA32_APIC_BASE.
    #[must_use]
    pub fn base(&self) -> u64 {
        self.lock().base
    }

    /// Writes IA32_APIC_BASE. `None`: #GP, for a reserved bit or a change of mode that is not allowed.
    #[must_use]
    pub fn set_base(&self, value: u64) -> Option<()> {
        let mut registers = self.lock();
        let known = base::BSP | base::EXTENDED | base::ENABLED | base::ADDRESS;
        let mode = |value: u64| (value & base::ENABLED != 0, value & base::EXTENDED != 0);
        let forbidden = matches!(
            (mode(registers.base), mode(value)),
            (_, (false, true)) | ((false, _), (true, true)) | ((true, true), (true, false))
        );
        if value & !known != 0 || forbidden {
            return None;
        }
        let bsp = registers.base & base::BSP;
        if mode(value) == (false, false) && mode(registers.base).0 {
            let timer = std::mem::take(&mut registers.timer);
            *registers = Registers::reset(0);
            registers.timer = timer;
            registers.timer.stop();
        }
        registers.base = value & !base::BSP | bsp;
        Some(())
    }

    /// Whether an access to `gpa` is one to this APIC's registers, and at what offset.
    #[must_use]
    pub fn mmio_offset(&self, gpa: u64) -> Option<u64> {
        let base = self.lock().base;
        let xapic = base & (base::ENABLED | base::EXTENDED) == base::ENABLED;
        (xapic && gpa & !0xfff == base & base::ADDRESS).then_some(gpa & 0xfff)
    }

    /// A read in the register page.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let within = (offset & 15) as usize;
        let value = self.read(offset as u32 >> 4, false).unwrap_or(0) as u32;
        for (to, from) in data.iter_mut().zip(value.to_le_bytes().iter().skip(within)) {
            *to = *from;
        }
    }

    /// A write in the register page; only aligned ones of 4 bytes do something.
    pub fn mmio_write(&self, offset: u64, data: &[u8]) -> Effect {
        match <[u8; 4]>::try_from(data) {
            Ok(bytes) if offset & 15 == 0 => self
                .write(offset as u32 >> 4, u64::from(u32::from_le_bytes(bytes)), false)
                .unwrap_or(Effect::None),
            _ => Effect::None,
        }
    }

    /// Reads an x2APIC MSR. `None`: #GP.
    #[must_use]
    pub fn read_msr(&self, msr: u32) -> Option<u64> {
        if self.base() & base::EXTENDED == 0 {
            return None;
        }
        self.read(msr.checked_sub(MSR_X2APIC)?, true)
    }

    /// Writes an x2APIC MSR. `None`: #GP.
    #[must_use]
    pub fn write_msr(&self, msr: u32, value: u64) -> Option<Effect> {
        if self.base() & base::EXTENDED == 0 {
            return None;
        }
        self.write(msr.checked_sub(MSR_X2APIC)?, value, true)
    }

    fn read(&self, number: u32, x2: bool) -> Option<u64> {
        let registers = self.lock();
        let value = match number {
            register::ID if x2 => self.id,
            register::ID => self.id << 24,
            register::VERSION => VERSION,
            register::TPR => u32::from(registers.tpr),
            register::APR if !x2 => 0,
            register::PPR => u32::from(registers.ppr()),
            register::LDR if x2 => message::x2apic_logical(self.id),
            register::LDR => registers.ldr,
            register::DFR if !x2 => registers.dfr,
            register::SVR => registers.svr,
            register::ISR..register::TMR => registers.isr.word(number - register::ISR),
            register::TMR..register::IRR => registers.tmr.word(number - register::TMR),
            register::IRR..register::ESR => registers.irr.word(number - register::IRR),
            register::ESR => registers.esr,
            register::ICR_LOW if x2 => return Some(registers.icr),
            register::ICR_LOW => registers.icr as u32,
            register::ICR_HIGH if !x2 => (registers.icr >> 32) as u32,
            register::LVT_TIMER..=register::LVT_ERROR => {
                registers.lvt[(number - register::LVT_TIMER) as usize]
            }
            register::TIMER_INITIAL => registers.timer.initial(),
            register::TIMER_CURRENT => registers.timer.current(self.clock.now_ns()),
            register::TIMER_DIVIDE => registers.timer.divide(),
            _ => return None,
        };
        Some(u64::from(value))
    }

    fn write(&self, number: u32, value: u64, x2: bool) -> Option<Effect> {
        if x2 && number != register::ICR_LOW && value >> 32 != 0 {
            return None;
        }
        let low = value as u32;
        self.change(|registers| {
            match number {
                register::TPR if x2 && low > 0xff => return None,
                register::TPR => registers.tpr = low as u8,
                register::EOI if x2 && low != 0 => return None,
                register::EOI => return Some(registers.end_of_interrupt()),
                register::LDR if !x2 => registers.ldr = low & 0xff00_0000,
                register::DFR if !x2 => registers.dfr = low | 0x0fff_ffff,
                register::SVR => registers.set_svr(low),
                register::ESR if x2 && low != 0 => return None,
                register::ESR => registers.esr = std::mem::take(&mut registers.errors),
                register::ICR_LOW => {
                    registers.icr =
                        if x2 { value } else { registers.icr >> 32 << 32 | u64::from(low) };
                    // Delivery status: always idle.
                    registers.icr &= !(1 << 12);
                    return Some(registers.send(x2));
                }
                register::ICR_HIGH if !x2 => {
                    registers.icr = registers.icr & 0xffff_ffff | u64::from(low) << 32;
                }
                register::LVT_TIMER..=register::LVT_ERROR => {
                    registers.set_lvt((number - register::LVT_TIMER) as usize, low);
                }
                register::TIMER_INITIAL => {
                    registers.timer.set_initial(low, self.clock.now_ns());
                }
                register::TIMER_DIVIDE => {
                    registers.timer.set_divide(low, self.clock.now_ns());
                }
                register::SELF_IPI if x2 && low <= 0xff => {
                    return Some(Effect::Send(Icr::to_self(low as u8)));
                }
                _ if x2 => return None,
                _ => registers.error(ERROR_REGISTER),
            }
            Some(Effect::None)
        })
    }

    /// IA32_TSC_DEADLINE: zero when not armed.
    #[must_use]
    pub fn tsc_deadline(&self) -> u64 {
        self.lock().timer.deadline_tsc()
    }

    /// Writes IA32_TSC_DEADLINE; `tsc_offset` leads from the host's counter to the guest's.
    pub fn set_tsc_deadline(&self, value: u64, tsc_offset: u64) {
        let clock = &self.clock;
        self.change(|registers| registers.timer.set_deadline(value, tsc_offset, &**clock));
        // A deadline in the past expires now.
        self.timer_expired();
    }

    /// The alarm went off (perhaps for a time that is no longer set).
    pub fn timer_expired(&self) {
        let now = self.clock.now_ns();
        self.change(|registers| {
            if registers.timer.expire(now) {
                registers.local(lvt::TIMER);
            }
        });
    }

    /// CR8.
    #[must_use]
    pub fn task_priority_class(&self) -> u8 {
        self.lock().tpr >> 4
    }

    /// Writes CR8.
    pub fn set_task_priority_class(&self, class: u8) {
        self.change(|registers| registers.tpr = class << 4);
    }

    /// Whether an interrupt can be taken now.
    #[must_use]
    pub fn pending(&self) -> bool {
        self.lock().deliverable().is_some()
    }

    /// Takes the interrupt of highest priority, which is in service from now on.
    pub fn acknowledge(&self) -> Option<u8> {
        let mut registers = self.lock();
        let vector = registers.deliverable()?;
        registers.irr.clear(vector);
        registers.isr.set(vector);
        Some(vector)
    }

    /// Whether the 8259 pair reaches this vCPU: through LINT0, or because the APIC is off.
    #[must_use]
    pub fn accepts_external(&self) -> bool {
        let registers = self.lock();
        let lint0 = registers.lvt[lvt::LINT0];
        let bsp = registers.base & base::BSP != 0;
        let through = lint0 & lvt::MASKED == 0 && lint0 >> 8 & 7 == 7;
        bsp && (registers.base & base::ENABLED == 0 || through)
    }

    /// How busy the vCPU is, for lowest-priority delivery.
    #[must_use]
    pub fn priority(&self) -> u8 {
        self.lock().ppr()
    }

    /// Whether a message with this destination is for this APIC.
    #[must_use]
    pub fn is_destination(&self, destination: message::Destination) -> bool {
        let registers = self.lock();
        if registers.base & base::ENABLED == 0 {
            return false;
        }
        let x2 = registers.base & base::EXTENDED != 0;
        destination.matches(self.id, x2, registers.ldr, registers.dfr)
    }

    /// Receives a message. Tells whether it was taken.
    pub fn receive(&self, delivery: Delivery, vector: u8, level: bool) -> bool {
        match delivery {
            Delivery::Fixed | Delivery::LowestPriority => {
                self.change(|registers| registers.accept(vector, level))
            }
            Delivery::Nmi => {
                self.signals.nmi();
                true
            }
            Delivery::Init => {
                self.signals.init();
                true
            }
            Delivery::Startup => {
                self.signals.startup(vector);
                true
            }
            // No system management mode; ExtINT comes over LINT0.
            Delivery::Smi | Delivery::External | Delivery::Reserved => false,
        }
    }
}

impl Registers {
    fn reset(base: u64) -> Self {
        let mut lvt = [lvt::MASKED; lvt::COUNT];
        if base & base::BSP != 0 {
            lvt[lvt::LINT0] = 0x700;
        }
        Self {
            base,
            tpr: 0,
            ldr: 0,
            dfr: !0,
            svr: 0xff,
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            errors: 0,
            esr: 0,
            icr: 0,
            lvt,
            timer: Timer::default(),
        }
    }

    fn enabled(&self) -> bool {
        self.base & base::ENABLED != 0 && self.svr & SVR_ENABLED != 0
    }

    fn ppr(&self) -> u8 {
        let serving = self.isr.highest().unwrap_or(0);
        if self.tpr >> 4 >= serving >> 4 { self.tpr } else { serving & 0xf0 }
    }

    fn deliverable(&self) -> Option<u8> {
        if !self.enabled() {
            return None;
        }
        self.irr.highest().filter(|vector| vector >> 4 > self.ppr() >> 4)
    }

    fn accept(&mut self, vector: u8, level: bool) -> bool {
        if vector < 16 {
            self.error(ERROR_RECEIVE_VECTOR);
            return false;
        }
        if !self.enabled() {
            return false;
        }
        self.irr.set(vector);
        if level {
            self.tmr.set(vector);
        } else {
            self.tmr.clear(vector);
        }
        true
    }

    /// Delivers a local interrupt by its table entry.
    fn local(&mut self, entry: usize) {
        let value = self.lvt[entry];
        if value & lvt::MASKED == 0 {
            self.accept(value as u8, false);
        }
    }

    fn error(&mut self, bits: u32) {
        let new = bits & !self.errors;
        self.errors |= bits;
        let value = self.lvt[lvt::ERROR];
        // An illegal vector in the error entry itself must not recurse.
        if new != 0 && value & lvt::MASKED == 0 && value as u8 >= 16 {
            self.accept(value as u8, false);
        }
    }

    fn end_of_interrupt(&mut self) -> Effect {
        let Some(vector) = self.isr.highest() else { return Effect::None };
        self.isr.clear(vector);
        if self.tmr.has(vector) { Effect::Eoi(vector) } else { Effect::None }
    }

    fn set_svr(&mut self, value: u32) {
        self.svr = value & 0x1ff;
        if value & SVR_ENABLED == 0 {
            for entry in &mut self.lvt {
                *entry |= lvt::MASKED;
            }
        }
    }

    fn set_lvt(&mut self, entry: usize, value: u32) {
        let (Some(slot), Some(writable)) = (self.lvt.get_mut(entry), lvt::WRITABLE.get(entry))
        else {
            return;
        };
        *slot = value & writable;
        if self.svr & SVR_ENABLED == 0 {
            *slot |= lvt::MASKED;
        }
        if entry == lvt::LINT1 || entry == lvt::LINT0 {
            // Level-triggered LINT pins are not wired to anything.
            *slot &= !lvt::LEVEL;
        }
        if entry == lvt::TIMER {
            self.timer.set_mode(value);
        }
    }

    fn send(&mut self, x2: bool) -> Effect {
        let icr = Icr::parse(self.icr, x2);
        if icr.is_fixed() && icr.vector < 16 {
            self.error(ERROR_SEND_VECTOR);
            return Effect::None;
        }
        Effect::Send(icr)
    }
}
