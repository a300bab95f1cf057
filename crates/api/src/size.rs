//! Sizes as people write them: `512M`, `2G`, `4096`. Units are powers of 1024.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A number of bytes. As text it is exact: `512M`, or bytes where no unit fits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
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

impl Serialize for Size {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let exact = [("T", 40), ("G", 30), ("M", 20), ("K", 10)]
            .into_iter()
            .find(|(_, shift)| self.0 > 0 && self.0.trailing_zeros() >= *shift);
        match exact {
            Some((unit, shift)) => {
                serializer.collect_str(&format_args!("{}{unit}", self.0 >> shift))
            }
            None => serializer.collect_str(&self.0),
        }
    }
}

impl<'de> Deserialize<'de> for Size {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Bytes(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Bytes(bytes) => Ok(Self(bytes)),
            Written::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(feature = "v1")]
impl utoipa::PartialSchema for Size {
    fn schema() -> utoipa::openapi::RefOr<utoipa::openapi::schema::Schema> {
        use utoipa::openapi::schema::{SchemaType, Type};
        let text = utoipa::openapi::Object::builder()
            .schema_type(SchemaType::from_iter([Type::String, Type::Integer]))
            .description(Some("bytes, or a number with K, M, G or T, powers of 1024"))
            .minimum(Some(0))
            .pattern(Some("^[0-9]+[KMGTkmgt]?$"));
        text.build().into()
    }
}

#[cfg(feature = "v1")]
impl utoipa::ToSchema for Size {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_sizes_exactly() {
        for (bytes, json) in [(512 << 20, "\"512M\""), (1536, "\"1536\""), (0, "\"0\"")] {
            let size = Size::from(bytes);
            assert_eq!(serde_json::to_string(&size).unwrap(), json);
            assert_eq!(serde_json::from_str::<Size>(json).unwrap(), size);
        }
        assert_eq!(serde_json::from_str::<Size>("4096").unwrap().bytes(), 4096);
        assert!(serde_json::from_str::<Size>("\"many\"").is_err());
        assert!(serde_json::from_str::<Size>("-1").is_err());
    }

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
