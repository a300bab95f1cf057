//! A local APIC as its page of registers (SDM vol. 3, table 11-1), in which KVM gives and takes it.

use crate::chips::lapic::timer::{Remainder, Timer};
use crate::chips::lapic::{Registers, VERSION, VectorSet, lvt, register};

/// Bytes of the page that have registers.
pub const PAGE: usize = 0x400;

/// What there is of an APIC besides its page, and the time at which that was looked at.
#[derive(Clone, Copy, Debug, Default)]
pub struct Around {
    /// IA32_APIC_BASE.
    pub base: u64,
    /// IA32_TSC_DEADLINE.
    pub deadline_tsc: u64,
    /// The guest's time-stamp counter.
    pub tsc: u64,
    /// How fast that counts, in Hz.
    pub tsc_hz: u64,
    /// The clock of chips.
    pub now_ns: u64,
    /// The timer ran at an earlier look, and the vCPU has not run since.
    pub ran: bool,
}

fn read(page: &[u8; PAGE], number: u32) -> u32 {
    let at = number as usize * 16;
    let bytes = page.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    bytes.map_or(0, u32::from_le_bytes)
}

fn write(page: &mut [u8; PAGE], number: u32, value: u32) {
    let at = number as usize * 16;
    if let Some(bytes) = page.get_mut(at..at + 4) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}

impl Registers {
    /// An APIC with these registers.
    #[must_use]
    pub fn from_page(page: &[u8; PAGE], around: &Around) -> Self {
        let get = |number| read(page, number);
        let set = |first: u32| VectorSet([0, 1, 2, 3, 4, 5, 6, 7].map(|word| get(first + word)));
        let mut entries = [0; lvt::COUNT];
        for ((entry, number), writable) in
            entries.iter_mut().zip(register::LVT_TIMER..).zip(lvt::WRITABLE)
        {
            *entry = get(number) & writable;
        }
        let remainder = Remainder {
            initial: get(register::TIMER_INITIAL),
            divide: get(register::TIMER_DIVIDE),
            current: get(register::TIMER_CURRENT),
            deadline_tsc: around.deadline_tsc,
        };
        Self {
            base: around.base,
            tpr: get(register::TPR) as u8,
            ldr: get(register::LDR),
            dfr: get(register::DFR) | 0x0fff_ffff,
            svr: get(register::SVR) & 0x1ff,
            irr: set(register::IRR),
            isr: set(register::ISR),
            tmr: set(register::TMR),
            errors: 0,
            esr: get(register::ESR),
            icr: u64::from(get(register::ICR_HIGH)) << 32
                | u64::from(get(register::ICR_LOW) & !(1 << 12)),
            lvt: entries,
            timer: Timer::from_remainder(&remainder, entries[lvt::TIMER], around),
        }
    }

    /// The page of this APIC, whose number is `id`, at a time of the clock by which it was stored.
    #[must_use]
    pub fn to_page(&self, id: u32, now_ns: u64) -> [u8; PAGE] {
        let mut page = [0; PAGE];
        let mut put = |number, value| write(&mut page, number, value);
        put(register::ID, id << 24);
        put(register::VERSION, VERSION);
        put(register::TPR, u32::from(self.tpr));
        put(register::PPR, u32::from(self.ppr()));
        put(register::LDR, self.ldr);
        put(register::DFR, self.dfr);
        put(register::SVR, self.svr);
        let sets =
            [(register::ISR, &self.isr), (register::TMR, &self.tmr), (register::IRR, &self.irr)];
        for (first, set) in sets {
            for (number, &word) in (first..).zip(&set.0) {
                put(number, word);
            }
        }
        put(register::ESR, self.esr);
        put(register::ICR_LOW, self.icr as u32);
        put(register::ICR_HIGH, (self.icr >> 32) as u32);
        for (number, &entry) in (register::LVT_TIMER..).zip(&self.lvt) {
            put(number, entry);
        }
        let remainder = self.timer.remainder(now_ns);
        put(register::TIMER_INITIAL, remainder.initial);
        put(register::TIMER_CURRENT, remainder.current);
        put(register::TIMER_DIVIDE, remainder.divide);
        page
    }

    /// IA32_APIC_BASE.
    #[must_use]
    pub fn apic_base(&self) -> u64 {
        self.base
    }

    /// The class of the task priority, which is CR8.
    #[must_use]
    pub fn priority_class(&self) -> u8 {
        self.tpr >> 4
    }

    /// IA32_TSC_DEADLINE.
    #[must_use]
    pub fn deadline(&self) -> u64 {
        self.timer.deadline_tsc()
    }

    /// Whether the timer counts down.
    #[must_use]
    pub fn counts_down(&self) -> bool {
        self.timer.is_running()
    }

    /// As it is after INIT.
    pub fn init(&mut self) {
        *self = Self::reset(self.base);
    }

    /// An interrupt that the processor has acknowledged, and then not begun to handle, is requested again.
    /// Tells whether it was one of this APIC.
    pub fn request_again(&mut self, vector: u8) -> bool {
        let is_it = self.isr.highest() == Some(vector);
        if is_it {
            self.isr.clear(vector);
            self.irr.set(vector);
        }
        is_it
    }
}

#[cfg(test)]
mod tests {
    use super::{Around, PAGE, read, write};
    use crate::chips::lapic::{Registers, register};

    fn around() -> Around {
        Around {
            base: 0xfee0_0900,
            tsc: 5_000,
            tsc_hz: 2_000_000_000,
            now_ns: 1_000_000,
            ..Around::default()
        }
    }

    /// As KVM gives it for a Linux guest: enabled, with interrupts in service and requested.
    fn page() -> [u8; PAGE] {
        let mut page = [0; PAGE];
        for (number, value) in [
            (register::VERSION, 0x0005_0014),
            (register::LDR, 0x0100_0000),
            (register::DFR, !0),
            (register::SVR, 0x1ff),
            (register::ISR + 1, 1 << 4),
            (register::IRR + 7, 1 << 12),
            (register::TMR + 1, 1 << 4),
            (register::ICR_LOW, 0x000c_08fb),
            (register::LVT_TIMER, 0x0002_00ec),
            (0x33, 0x0001_0000),
            (0x34, 0x0001_0000),
            (0x35, 0x0000_0700),
            (0x36, 0x0000_0400),
            (0x37, 0x0000_00fe),
            (register::TIMER_INITIAL, 1_000),
            (register::TIMER_CURRENT, 250),
            (register::TIMER_DIVIDE, 3),
        ] {
            write(&mut page, number, value);
        }
        page
    }

    #[test]
    fn a_page_becomes_an_apic_and_that_page() {
        let apic = Registers::from_page(&page(), &around());
        let again = apic.to_page(0, 1_000_000);
        let mut wanted = page();
        // What is served has this priority.
        write(&mut wanted, register::PPR, 0x20);
        for number in 0..0x40 {
            assert_eq!(read(&again, number), read(&wanted, number), "{number:#x}");
        }
        // Some of the count passes, and then another period.
        let later = |ns: u64| read(&apic.to_page(0, 1_000_000 + ns), register::TIMER_CURRENT);
        assert_eq!((later(16 * 50), later(16 * 250)), (200, 1), "a divider of 16");
        assert_eq!(apic.apic_base(), 0xfee0_0900);
    }

    #[test]
    fn a_deadline_is_a_time() {
        let mut page = page();
        write(&mut page, register::LVT_TIMER, 0x0004_00ec);
        let deadline = Around { deadline_tsc: 9_000, ..around() };
        let apic = Registers::from_page(&page, &deadline);
        assert!(apic.counts_down() && apic.deadline() == 9_000);
        assert_eq!(apic.timer.expires_at(), Some(1_002_000));
        let passed = Registers::from_page(&page, &Around { deadline_tsc: 1, ..around() });
        assert_eq!(passed.timer.expires_at(), Some(1_000_000));
        assert!(!Registers::from_page(&page, &around()).counts_down());
    }

    #[test]
    fn a_timer_that_ran_out_while_the_vcpu_stood_still_has_not_interrupted() {
        let mut page = page();
        write(&mut page, register::LVT_TIMER, 0x0000_00ec);
        write(&mut page, register::TIMER_CURRENT, 0);
        let apic = Registers::from_page(&page, &around());
        assert!(!apic.counts_down());
        // KVM would let it expire again if there were a count.
        assert_eq!(read(&apic.to_page(0, 0), register::TIMER_INITIAL), 0);
        let apic = Registers::from_page(&page, &Around { ran: true, ..around() });
        assert!(apic.counts_down());
        assert_eq!(read(&apic.to_page(0, 2_000_000), register::TIMER_CURRENT), 1);
    }

    #[test]
    fn an_interrupt_that_was_not_begun_is_requested_again() {
        let mut apic = Registers::from_page(&page(), &around());
        assert!(!apic.request_again(0x25), "it is not in service");
        assert!(apic.request_again(0x24));
        let page = apic.to_page(3, 0);
        let words = [register::ISR + 1, register::IRR + 1, register::ID];
        assert_eq!(words.map(|number| read(&page, number)), [0, 1 << 4, 3 << 24]);
        apic.init();
        assert_eq!(read(&apic.to_page(0, 0), register::SVR), 0xff);
    }

    #[test]
    fn any_page_is_an_apic() {
        for byte in 0..=255 {
            let around = Around {
                base: !0,
                deadline_tsc: !0,
                tsc: 1,
                tsc_hz: 1,
                now_ns: !0,
                ran: byte & 1 == 1,
            };
            let apic = Registers::from_page(&[byte; PAGE], &around);
            let _ = (apic.to_page(!0, 0), apic.to_page(0, !0));
        }
    }
}
