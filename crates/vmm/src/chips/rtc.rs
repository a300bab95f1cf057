//! The CMOS clock: time and date of the host (UTC) in registers 0 to 9 and 0x32.
//!
//! A guest that sets the clock moves an offset. There are no alarms and no interrupts, and the ACPI
//! tables promise none.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::bus::BusDevice;
use crate::clock::Clock;

/// First port; there are two.
pub const PORT: u64 = 0x70;
/// Number of ports.
pub const LEN: u64 = 2;
/// The register with the century, as the FADT says.
pub const CENTURY: u8 = 0x32;

const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
const UPDATE_IN_PROGRESS: u8 = 0x80;
const SET: u8 = 0x80;
const BINARY: u8 = 4;
const HOURS_24: u8 = 2;
/// How long before a second changes the update flag is set.
const UPDATE_NS: u32 = 244_000;

/// A date and time, as the registers have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Date {
    year: i64,
    month: u8,
    day: u8,
    hour: u8,
    minute: u8,
    second: u8,
    /// 1 is Sunday.
    weekday: u8,
}

/// Days since 1970-01-01 of a civil date; the calendar repeats every 400 years (146097 days), and
/// years are counted from March so that the leap day is the last.
fn days_of(year: i64, month: u8, day: u8) -> i64 {
    let (month, year) = (i64::from(month), if month <= 2 { year - 1 } else { year });
    let era = year.div_euclid(400);
    let year_of_era = year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + i64::from(day) - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

fn date_of(seconds: i64) -> Date {
    let days = seconds.div_euclid(86_400);
    let time = seconds.rem_euclid(86_400);
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    Date {
        year: year_of_era + era * 400 + i64::from(month <= 2),
        month: month as u8,
        day: (day_of_year - (153 * march_month + 2) / 5 + 1) as u8,
        hour: (time / 3600) as u8,
        minute: (time / 60 % 60) as u8,
        second: (time % 60) as u8,
        weekday: ((days + 4).rem_euclid(7) + 1) as u8,
    }
}

impl Date {
    fn seconds(&self) -> i64 {
        days_of(self.year, self.month, self.day) * 86_400
            + i64::from(self.hour) * 3600
            + i64::from(self.minute) * 60
            + i64::from(self.second)
    }
}

/// The chip.
pub struct Rtc {
    clock: Arc<dyn Clock>,
    index: u8,
    ram: [u8; 128],
    /// Seconds that the guest's clock is ahead of the host's.
    ahead: i64,
    /// The date while the guest sets it (status B, bit 7).
    setting: Option<Date>,
}

/// All of it, as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Registers {
    index: u8,
    ram: Vec<u8>,
    ahead: i64,
    setting: Option<Date>,
}

impl Rtc {
    /// What is to be stored.
    #[must_use]
    pub fn save(&self) -> Registers {
        let &Self { index, ram, ahead, setting, .. } = self;
        Registers { index, ram: ram.to_vec(), ahead, setting }
    }

    /// Puts back what was stored. The time of day is the host's, as before.
    ///
    /// # Errors
    /// What cannot be.
    pub fn restore(&mut self, saved: Registers) -> Result<(), &'static str> {
        self.ram = saved.ram.try_into().map_err(|_| "the RTC has 128 bytes of memory")?;
        let sound = |date: &Date| {
            (0..10_000).contains(&date.year)
                && (1..=12).contains(&date.month)
                && (1..=31).contains(&date.day)
                && (1..=7).contains(&date.weekday)
                && date.hour < 24
                && date.minute < 60
                && date.second < 61
        };
        if !saved.setting.iter().all(sound) {
            return Err("the RTC is being set to no date");
        }
        (self.index, self.ahead, self.setting) = (saved.index, saved.ahead, saved.setting);
        Ok(())
    }

    /// With the sizes of memory below and from 4 GiB in the usual places.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, low_bytes: u64, high_bytes: u64) -> Self {
        let mut ram = [0; 128];
        ram[usize::from(STATUS_A)] = 0x26;
        ram[usize::from(STATUS_B)] = HOURS_24;
        let mut put = |at: usize, value: u64, count: usize| {
            for (to, from) in ram.iter_mut().skip(at).zip(value.to_le_bytes().iter().take(count)) {
                *to = *from;
            }
        };
        put(0x15, 640, 2);
        let extended = (low_bytes.saturating_sub(1 << 20) >> 10).min(0xffff);
        put(0x17, extended, 2);
        put(0x30, extended, 2);
        put(0x34, (low_bytes.saturating_sub(16 << 20) >> 16).min(0xffff), 2);
        put(0x5b, (high_bytes >> 16).min(0xff_ffff), 3);
        Self { clock, index: 0, ram, ahead: 0, setting: None }
    }

    fn register(&self, index: u8) -> u8 {
        self.ram.get(usize::from(index)).copied().unwrap_or(0)
    }

    fn date(&self) -> Date {
        let host = i64::try_from(self.clock.wall().as_secs()).unwrap_or(i64::MAX / 2);
        self.setting.unwrap_or_else(|| date_of(host.saturating_add(self.ahead)))
    }

    fn encode(&self, value: u8) -> u8 {
        if self.register(STATUS_B) & BINARY != 0 {
            value
        } else {
            ((value / 10) << 4) | (value % 10)
        }
    }

    fn decode(&self, value: u8) -> u8 {
        if self.register(STATUS_B) & BINARY != 0 { value } else { (value >> 4) * 10 + (value & 15) }
    }

    fn hour(&self, hour: u8) -> u8 {
        if self.register(STATUS_B) & HOURS_24 != 0 {
            return self.encode(hour);
        }
        let half = if hour.is_multiple_of(12) { 12 } else { hour % 12 };
        self.encode(half) | u8::from(hour >= 12) << 7
    }

    fn read_register(&self) -> u8 {
        let date = self.date();
        match self.index {
            0 => self.encode(date.second),
            2 => self.encode(date.minute),
            4 => self.hour(date.hour),
            6 => self.encode(date.weekday),
            7 => self.encode(date.day),
            8 => self.encode(date.month),
            9 => self.encode((date.year.rem_euclid(100)) as u8),
            CENTURY => self.encode((date.year.div_euclid(100)) as u8),
            STATUS_A => {
                let soon = self.clock.wall().subsec_nanos() >= 1_000_000_000 - UPDATE_NS;
                let updating = soon && self.setting.is_none();
                self.register(STATUS_A) & !UPDATE_IN_PROGRESS
                    | if updating { UPDATE_IN_PROGRESS } else { 0 }
            }
            STATUS_C => 0,
            // The battery is good.
            STATUS_D => 0x80,
            index => self.register(index),
        }
    }

    fn write_register(&mut self, value: u8) {
        match self.index {
            0 | 2 | 4 | 6..=9 | CENTURY => self.set_date(value),
            STATUS_C | STATUS_D => {}
            index => {
                if index == STATUS_B {
                    self.set_mode(value & SET != 0);
                }
                if let Some(slot) = self.ram.get_mut(usize::from(index)) {
                    *slot = value;
                }
            }
        }
    }

    fn set_mode(&mut self, setting: bool) {
        if setting {
            self.setting = Some(self.date());
        } else if let Some(date) = self.setting.take() {
            let host = i64::try_from(self.clock.wall().as_secs()).unwrap_or(0);
            self.ahead = date.seconds() - host;
        }
    }

    fn set_date(&mut self, value: u8) {
        let mut date = self.date();
        let plain = self.decode(value);
        match self.index {
            0 => date.second = plain.min(59),
            2 => date.minute = plain.min(59),
            4 if self.register(STATUS_B) & HOURS_24 != 0 => date.hour = plain.min(23),
            4 => date.hour = (self.decode(value & 0x7f) % 12 + (value >> 7) * 12).min(23),
            7 => date.day = plain.clamp(1, 31),
            8 => date.month = plain.clamp(1, 12),
            9 => date.year = date.year.div_euclid(100) * 100 + i64::from(plain.min(99)),
            CENTURY => date.year = i64::from(plain.min(99)) * 100 + date.year.rem_euclid(100),
            _ => {}
        }
        if self.setting.is_some() {
            self.setting = Some(date);
        } else {
            let host = i64::try_from(self.clock.wall().as_secs()).unwrap_or(0);
            self.ahead = date.seconds() - host;
        }
    }
}

impl BusDevice for Rtc {
    fn read(&mut self, _base: u64, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, Some(first)) = (offset, data.first_mut()) {
            *first = self.read_register();
        }
    }

    fn write(&mut self, _base: u64, offset: u64, data: &[u8]) {
        let Some(&value) = data.first() else { return };
        if offset == 0 {
            // Bit 7 masks NMIs, which nothing here raises.
            self.index = value & 0x7f;
        } else {
            self.write_register(value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Rtc, date_of, days_of};
    use crate::bus::BusDevice;
    use crate::clock::fake::FakeClock;
    use std::sync::Arc;

    fn read(rtc: &mut Rtc, index: u8) -> u8 {
        let mut data = [0];
        rtc.write(0x70, 0, &[index]);
        rtc.read(0x70, 1, &mut data);
        data[0]
    }

    fn write(rtc: &mut Rtc, index: u8, value: u8) {
        rtc.write(0x70, 0, &[index]);
        rtc.write(0x70, 1, &[value]);
    }

    fn all(rtc: &mut Rtc) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| read(rtc, index))
    }

    #[test]
    fn civil_dates() {
        assert_eq!(days_of(1970, 1, 1), 0);
        assert_eq!(days_of(2000, 3, 1), 11_017);
        for day in (-800_000..800_000).step_by(37) {
            let date = date_of(day * 86_400 + 3_661);
            assert_eq!(date.seconds(), day * 86_400 + 3_661);
        }
        assert_eq!(date_of(951_782_400).day, 29, "2000 had a leap day");
    }

    #[test]
    fn the_hosts_time_in_decimal_and_binary() {
        let clock = Arc::new(FakeClock::default());
        let mut rtc = Rtc::new(clock.clone(), 512 << 20, 0);
        assert_eq!(all(&mut rtc), [0x20, 0x26, 0x02, 0x28, 7, 0x23, 0x59, 0x58]);
        clock.pass(2_000_000_000);
        assert_eq!(all(&mut rtc), [0x20, 0x26, 0x03, 0x01, 1, 0, 0, 0]);
        write(&mut rtc, 0x0b, 0x04);
        assert_eq!(read(&mut rtc, 4), 12, "midnight in 12-hour mode");
        write(&mut rtc, 0x0b, 0x06);
        assert_eq!(read(&mut rtc, 0x32), 20);
        assert_eq!(read(&mut rtc, 0x0d), 0x80);
    }

    #[test]
    fn the_update_flag_comes_before_the_second_changes() {
        let clock = Arc::new(FakeClock::default());
        let mut rtc = Rtc::new(clock.clone(), 512 << 20, 0);
        assert_eq!(read(&mut rtc, 0x0a) & 0x80, 0);
        clock.pass(999_900_000);
        assert_eq!(read(&mut rtc, 0x0a) & 0x80, 0x80);
        clock.pass(200_000);
        assert_eq!(read(&mut rtc, 0x0a) & 0x80, 0);
    }

    #[test]
    fn a_set_clock_goes_on_from_there() {
        let clock = Arc::new(FakeClock::default());
        let mut rtc = Rtc::new(clock.clone(), 512 << 20, 0);
        write(&mut rtc, 0x0b, 0x82);
        let date = [0x20, 0x30, 0x12, 0x31, 0, 0x23, 0x59, 0x59];
        for (index, value) in [0x32, 9, 8, 7, 6, 4, 2, 0].into_iter().zip(date) {
            write(&mut rtc, index, value);
        }
        clock.pass(3_000_000_000);
        write(&mut rtc, 0x0b, 0x02);
        assert_eq!(read(&mut rtc, 0), 0x59);
        clock.pass(1_000_000_000);
        assert_eq!(all(&mut rtc), [0x20, 0x31, 0x01, 0x01, 4, 0, 0, 0]);
    }

    #[test]
    fn any_bytes_do_no_harm() {
        let clock = Arc::new(FakeClock::default());
        let mut rtc = Rtc::new(clock, 512 << 20, 0);
        for index in 0..=255 {
            for value in [0, 0x12, 0x7f, 0x80, 0x99, 0xff] {
                write(&mut rtc, index, value);
                read(&mut rtc, index);
                all(&mut rtc);
            }
        }
    }
}
