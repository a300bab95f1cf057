//! Sizes as people write them: `512M`, `2G`, `4096`. Units are powers of 1024.

use std::fmt;
use std::str::FromStr;

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(u64);

impl Size {
    /// The bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }
}

impl From<u64> for Size {
    fn from(bytes: u64) -> Self {
        Self(bytes)
    }
}

impl FromStr for Size {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || format!("`{text}` is no size; write bytes, or a number with K, M, G or T");
        let (number, shift) = match text.chars().last().map(|unit| unit.to_ascii_uppercase()) {
            Some('K') => (1, 10),
            Some('M') => (1, 20),
            Some('G') => (1, 30),
            Some('T') => (1, 40),
            _ => (0, 0),
        };
        let digits = text.get(..text.len().saturating_sub(number)).ok_or_else(wrong)?;
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(wrong());
        }
        let count: u64 = digits.parse().map_err(|_| wrong())?;
        count.checked_mul(1 << shift).map(Self).ok_or_else(wrong)
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, shift) in [("T", 40), ("G", 30), ("M", 20), ("K", 10)] {
            if self.0 >= 1 << shift {
                let whole = self.0 >> shift;
                let tenth = ((self.0 & ((1 << shift) - 1)) * 10) >> shift;
                return match tenth {
                    0 => write!(f, "{whole}{unit}"),
                    _ => write!(f, "{whole}.{tenth}{unit}"),
                };
            }
        }
        write!(f, "{}", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("512M", 512 << 20), ("2g", 2 << 30), ("1T", 1 << 40)]
        {
            assert_eq!(text.parse::<Size>().unwrap().bytes(), bytes, "{text}");
        }
        for bad in ["", "M", "-1M", "1.5G", "1MB", "99999999999999999999", "99999999T", "é", "1é"]
        {
            assert!(bad.parse::<Size>().is_err(), "{bad}");
        }
        for (bytes, text) in [(5, "5"), (1536, "1.5K"), (512 << 20, "512M"), (4 << 30, "4G")] {
            assert_eq!(Size::from(bytes).to_string(), text);
        }
    }
}
